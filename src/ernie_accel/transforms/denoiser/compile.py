"""Compile the repeated blocks of a model: seconds instead of a minute, and no recompiling for each prompt length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, cast

import torch

from ernie_accel.common.language import joined, said
from ernie_accel.core.components import Pipeline, absent_components, modules_of, staying_denoisers_note
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError, UnknownNameError
from ernie_accel.core.library_hooks import library_hooks
from ernie_accel.core.peft_layers import unchanged_if_it_fails
from ernie_accel.core.planned import Blocks, PlannedPipe
from ernie_accel.core.stand_in import Bound, StandInMethod
from ernie_accel.core.transform import MACHINE_LOCAL, Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.families import repeated_blocks
from ernie_accel.models.adapters import adaptables
from ernie_accel.models.compile_cache import as_folder, compile_module, unsupported_cache_reasons
from ernie_accel.models.stacked_adapters import forget_stacked, stack_in_place_of_names


@dataclass(frozen=True, repr=False)
class Compile(Transform):
    """Compile every repeated block of a model with ``torch.compile`` ("regional compilation").

    One graph serves all blocks and, with ``dynamic=True``, all prompt lengths and sizes. Batch 1 has a graph of its
    own, and all larger batches share another. The first picture takes longer. State-dict keys stay the same.

    Pays:
        From a handful of pictures on. A step of the stock transformer takes 134 to 139 ms instead of 201 in bfloat16,
        and quantized weights need it (fp8 takes 95 ms compiled, 223 without). The first call takes 8 to 10 s longer.
        Not proven for Lumina 2, whose RoPE is complex and stays outside the generated code.

    Attributes:
        components: Component names; their classes must declare ``_repeated_blocks``, as most of diffusers' models do,
            or belong to a known family.
        dynamic: Compile for any sequence length. False recompiles for each length; there is room for 64.
        fullgraph: Refuse graph breaks instead of running slowly.
        mode: As in ``torch.compile``; None is its default.
        cache: Folder that keeps the compiled code, so that the next process need not compile; None leaves this to
            torch and its own settings. It holds code that is run: nobody else may be able to write to it. `save`
            leaves it out; give it again, as in ``load(saved, Compile(cache=...))``.
    """

    phase: ClassVar[Phase] = Phase.COMPILE
    slot: ClassVar[str] = "compile"
    effect: ClassVar[Effect] = Effect.ROUNDING

    components: tuple[str, ...] = field(default=("transformer",), kw_only=True)
    dynamic: bool = field(default=True, kw_only=True)
    fullgraph: bool = field(default=True, kw_only=True)
    mode: str | None = field(default=None, kw_only=True)
    cache: str | None = field(default=None, kw_only=True, metadata=MACHINE_LOCAL)

    def __post_init__(self) -> None:
        if self.mode is not None:
            from torch._inductor import list_mode_options  # here, because it takes a second and few name a mode

            if self.mode not in (modes := list_mode_options()):
                raise UnknownNameError("mode", self.mode, modes)
        object.__setattr__(self, "cache", as_folder(self.cache))

    @property
    def changes_inside(self) -> tuple[str, ...]:
        return self.components

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons = absent_components(pipe, self.components)
        if context.no_compile is not None:
            reasons.append(context.no_compile)
        reasons += unsupported_cache_reasons(self.cache, context.device)
        if reasons:
            return reasons
        return (
            self._broken_by_quantization(pipe, context)
            + self._broken_by_hooks(pipe, context)
            + self._broken_by_loras(pipe, context)
            + self.family_reasons(pipe)
        )

    def family_reasons(self, pipe: Pipeline) -> list[str]:
        modules = modules_of(pipe)
        return [
            said(
                "{model} declares no repeated blocks to compile (_repeated_blocks)",
                model=type(modules[name]).__name__,
            )
            for name in self.components
            if name in modules and not repeated_blocks(modules[name])
        ]

    def _broken_by_quantization(self, pipe: Pipeline, context: Context) -> list[str]:
        broken = context.planned(pipe).breaks_graph if self.fullgraph else {}
        fix = said("take another backend or scheme, or Compile(fullgraph=False)")
        return [said("{first}: {second}", first=broken[name], second=fix) for name in self.components if name in broken]

    def _broken_by_hooks(self, pipe: Pipeline, context: Context) -> list[str]:
        """Return which hooks of diffusers, there or planned, would break a full graph."""
        if not self.fullgraph:
            return []
        planned = {"Offload('group')"} if context.planned(pipe).offload == "group" else set()
        found = planned | {
            call
            for _, block in self._blocks(pipe, context)
            for part in block.modules()
            for name, call in _HOOKS_THAT_BREAK.items()
            if library_hooks(part).named(name)
        }
        fix = said("do without it, or take Compile(fullgraph=False)")
        return [
            said("{call} attaches hooks that torch.compile cannot trace in a full graph: {fix}", call=call, fix=fix)
            for call in sorted(found)
        ]

    def _broken_by_loras(self, pipe: Pipeline, context: Context) -> list[str]:
        """Return where a LoRA is loaded that would break a full graph."""
        blocks = self._blocks(pipe, context) if self.fullgraph else ()
        path = next((f"{name}.{path}" for name, block in blocks if (path := _untraceable(block)) is not None), None)
        if path is None:
            return []
        fix = said("merge it first (pipe.fuse_lora()), or take Compile(fullgraph=False)")
        return [said("{path} has a DoRA, which torch.compile cannot trace in a full graph: {fix}", path=path, fix=fix)]

    def _leaves_to_kernels(self, pipe: Pipeline, context: Context) -> bool:
        return "transformer" in self.components and context.planned(pipe).blocks is Blocks.KERNELS

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        changes = tuple(name for name, block in self._blocks(pipe, context) if not _is_compiled(block))
        notes = [said("the first picture compiles")] if changes else []
        if self._leaves_to_kernels(pipe, context):
            notes.append(said("the blocks run on fused kernels, which need no compiling"))
        notes = notes or [said("the blocks are compiled already")]
        stays = staying_denoisers_note(pipe, self.components)
        return Preview(changes, note=joined((*notes, stays)))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        return context.planned(pipe).compiling(self.slot)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        blocks = dict(self._blocks(pipe, context))
        compiled = {name: said("was compiled before") for name, block in blocks.items() if _is_compiled(block)}
        with Undo() as undo:
            for name, block in blocks.items():
                if name not in compiled:
                    undo.restore_attribute(block, "_compiled_call_impl")  # what nn.Module.compile fills in
                    compile_module(block, self.cache, fullgraph=self.fullgraph, dynamic=self.dynamic, mode=self.mode)
            if self.fullgraph and len(blocks) > len(compiled):
                _refuse_hooks(pipe, self.components, undo)
            if len(blocks) > len(compiled):
                for module in modules_of(pipe, self.components).values():
                    for name in ("load_lora_adapter", "load_adapter", "add_adapter"):
                        if hasattr(module, name):
                            undo.setattr(module, name, _AddsToCompiled(module, name, self.fullgraph))
                    stack_in_place_of_names(pipe, module, undo)
        return Applied(
            tuple(name for name in blocks if name not in compiled),
            undo=undo,
            skipped=compiled,
            note=said("the first picture compiles"),
        )

    def _blocks(self, pipe: Pipeline, context: Context) -> Iterator[tuple[str, torch.nn.Module]]:
        left = {"transformer"} if self._leaves_to_kernels(pipe, context) else set()
        for component, module in modules_of(pipe, [name for name in self.components if name not in left]).items():
            names = repeated_blocks(module)
            for path, part in module.named_modules():
                if type(part).__name__ in names:
                    yield f"{component}.{path}", part


#: Hooks of diffusers within blocks that ``torch.compile(fullgraph=True)`` cannot trace, and what attaches them.
_HOOKS_THAT_BREAK = {
    "group_offloading": "enable_group_offload()",
    "lazy_prefetch_group_offloading": "enable_group_offload()",
    "layer_execution_tracker": "enable_group_offload()",
    "layerwise_casting": "enable_layerwise_casting()",
}


def _refuse_hooks(pipe: Pipeline, components: tuple[str, ...], undo: Undo) -> None:
    """Make what attaches such hooks raise, on the pipe and on these components, in place."""
    for owner in (pipe, *modules_of(pipe, components).values()):
        for name in ("enable_group_offload", "enable_layerwise_casting"):
            if callable(getattr(owner, name, None)):
                undo.setattr(owner, name, Bound(partial(_refuse, name), owner))


def _refuse(name: str, self: object, *_: object, **__: object) -> None:
    raise ErnieAccelError(
        f"{type(self).__name__}.{name}(): its blocks are compiled as full graphs, and torch.compile cannot trace the "
        "hooks that this attaches. Call ernie_accel.restore(pipe), then this, then take Compile(fullgraph=False)"
    )


def _untraceable(module: torch.nn.Module) -> str | None:
    """Return the path of the first layer with a DoRA, whose forward cannot be traced in a full graph; None if none."""
    return next((path for path, layer in module.named_modules() if vars(layer).get("lora_variant")), None)


class _AddsToCompiled(StandInMethod):
    """A method of a model with compiled blocks that adds an adapter."""

    def __init__(self, owner: object, name: str, fullgraph: bool) -> None:
        super().__init__(owner, name)
        self.fullgraph = fullgraph

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Add it.

        Raises:
            ErnieAccelError: It is a DoRA, and the blocks are compiled as full graphs; nothing was changed.
        """
        model = cast(torch.nn.Module, self.owner)
        try:
            with unchanged_if_it_fails(model):
                result = self.call_inner(*args, **kwargs)
                path = _untraceable(model) if self.fullgraph else None
                if path is not None:
                    raise ErnieAccelError(
                        f"{self.name}: {path} gets a DoRA, and its blocks are compiled as full graphs, in which "
                        "torch.compile cannot trace one; nothing was changed. Call ernie_accel.restore(pipe), load and "
                        "merge it (pipe.fuse_lora()), then optimize again, or take Compile(fullgraph=False)"
                    )
        except BaseException:
            for part in adaptables(model):
                part.fuse_again()
            raise
        forget_stacked(model)  # it may have been written over another, which torch does not count
        return result


def _is_compiled(block: torch.nn.Module) -> bool:
    return block._compiled_call_impl is not None

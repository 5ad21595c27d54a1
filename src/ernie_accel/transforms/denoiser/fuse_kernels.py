"""Run the rewritten blocks on fused Triton kernels, with fp8 products: the fastest path on Hopper and Ada cards."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch

from ernie_accel.common.language import joined, said
from ernie_accel.common.text import human_bytes
from ernie_accel.core.arguments import check_patterns
from ernie_accel.core.components import DENOISERS, Pipeline, other_denoisers_note, quantizing_device
from ernie_accel.core.context import Context
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.planned import Blocks, PlannedPipe, PlannedWeight
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo, place_of
from ernie_accel.families import family_of
from ernie_accel.kernels.linear import Fp8Linear, Kept
from ernie_accel.models.adapters import (
    Lifted,
    adaptables,
    adapter_problems,
    bind_layers,
    close_sites,
    lift,
    open_sites,
    put_back,
)
from ernie_accel.models.rewritten import block_paths, kernel_model, kernels_of, rewritten_blocks, whose
from ernie_accel.quantization.guard import refuse_casts
from ernie_accel.quantization.layers import idle_patterns
from ernie_accel.quantization.refusals import refuse_other_weights, refuse_saving, refuse_unmerging

PRECISIONS = ("fp8", "bf16")
ATTENTIONS = ("auto", "fp8", "bf16")
_CUDNN_CAPABILITY = (9, 0)
#: What a LoRA adds to the path of the layer that it is around.
_BENEATH = re.compile(r"\.base_layer(\.product)*|(?<=\w)\.product\b")


@dataclass(frozen=True, repr=False)
class FuseKernels(Transform):
    """Run rewritten blocks on fused kernels, and store and multiply their linear layers in fp8.

    Norm, modulation, residual, RoPE, GELU or SiLU and the fp8 conversion of activations (one scale per row) take six or
    seven launches per block; the products run on the fp8 tensor cores. On Hopper cards the product of gate and up gates
    its result before writing it, by a kernel of this library. Nothing is compiled by ``torch.compile``, so the
    first picture takes only seconds. It replaces ``Quantize("fp8")``, and needs `RewriteBlocks`.

    With the extra "cudnn" and capability 9.0 or higher, attention skips padding by the lengths of prompts, without a
    mask. On Hopper cards (9.0), heads of 96 and 128, those of ERNIE-Image, Z-Image and NewBie-image, have a kernel of
    this library, after FlashAttention-3. Elsewhere cuDNN is called directly: one plan serves 64 prompt lengths, where
    torch makes a plan for each. If attention is in bfloat16 and you choose a backend by name ("native" is torch's own),
    that backend is used instead.

    LoRAs are loaded, switched, scaled, merged and unloaded by diffusers' own calls, before and after: each is a
    low-rank part beside the product (``docs/lora.md``).

    Pays:
        "fp8" on Hopper and Ada cards: on an H200 a step of ERNIE-Image takes 69.2 ms, where compiled torchao fp8 takes
        96.1 and stock 201.6, and nothing has to be compiled. "bf16": a step takes 122.5 ms, where
        `RewriteBlocks` with `Compile` takes 125.

    Attributes:
        precision: "fp8", or "bf16" for the kernels without quantization, which is a no-op where they cannot run.
        attention: With precision "fp8": "fp8" (with the extra "cudnn" and capability 9.0 or higher), "bf16", or "auto"
            for fp8 where that is possible; the plan says which one it is.
        exclude: Regular expressions of layers to leave in bfloat16, matched from the start of the path within the
            transformer; None takes the family's list.
        keep_originals: Keep the unquantized weights in host memory, so that ``restore`` is exact, and LoRAs can be
            merged.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZE
    slot: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = Effect.LOSSY

    precision: str
    attention: str = field(default="auto", kw_only=True)
    exclude: tuple[str, ...] | None = field(default=None, kw_only=True)
    keep_originals: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UnknownNameError("precision", self.precision, PRECISIONS)
        if self.attention not in ATTENTIONS:
            raise UnknownNameError("attention", self.attention, ATTENTIONS)
        check_patterns("exclude", self.exclude or ())

    @property
    def floor_db(self) -> float:
        """SQNR of the final latents in dB against the pipe before, same seed."""
        return 10.0 if self.precision == "fp8" else 25.0

    @property
    def changes_inside(self) -> tuple[str, ...]:
        return DENOISERS

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        # Without the bf16 kernels a pipe computes the same thing more slowly, so there is nothing to refuse.
        return self._unsupported_reasons(pipe, context) if self.precision == "fp8" else []

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        reasons = self._unsupported_reasons(pipe, context)
        if reasons:
            return Preview((), note=said("the kernels cannot run here: {reasons}", reasons=joined(reasons)))
        if kernels_of(pipe).is_installed(pipe.transformer):
            return Preview((), note=said("the blocks run on the kernels already"))
        note = joined((self._attention_note(context), other_denoisers_note(pipe)))
        return Preview(self._on_kernels(pipe, context), note)

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        planned, new = _beneath_loras(pipe, context), {}
        gone = set()
        for path in self._layers(pipe, context)[0]:
            name = f"transformer.{path}.weight"
            weight = planned.weights[name]
            gone.add(name)
            rows, columns = weight.shape
            new[name] = replace(weight, nbytes=rows * columns, stored_as=said("fp8 by fused kernels"), is_fresh=True)
            new[f"{name}_scale"] = PlannedWeight((1, rows), torch.float32, 4 * rows, is_fresh=True)
        if self.keep_originals:
            planned = planned.keeping(gone)
        lengths = self._attention(context) is not None and kernels_of(pipe).is_left_open(pipe.transformer)
        return replace(
            planned.with_weights(new, frozenset(gone)).compiling(self.slot),  # Triton compiles at the first launch
            blocks=Blocks.KERNELS,
            takes_lengths=lengths,
            always_lengths=self._attention(context) == "fp8",
            tokens_multiple_of=kernels_of(pipe).TOKENS_MULTIPLE_OF if lengths else 1,
        )

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        transformer, kept_bytes = pipe.transformer, 0
        where = quantizing_device(transformer, context.torch_device)
        on_kernels, (to_quantize, left_out) = self._on_kernels(pipe, context), self._layers(pipe, context)
        with Undo() as undo:
            lifted: list[Lifted] = []
            undo.push(partial(_settle, transformer, lifted))
            lift(transformer, lifted)
            skipped = left_out | kernels_of(pipe).install(transformer, undo, self._attention(context))
            for path in to_quantize:
                linear: Any = transformer.get_submodule(path)
                kept_bytes += linear.weight.numel() * linear.weight.element_size()
                owner, _, name = path.rpartition(".")
                new = Fp8Linear(linear.weight.to(where)).to(linear.weight.device)
                _swap(transformer.get_submodule(owner), name, new, undo, self.keep_originals)
            if lifted:
                open_sites(transformer, [part for part in adaptables(transformer) if part.on_kernels])
                put_back(lifted)
                bind_layers(transformer)
            if kept_bytes:
                refuse_casts(pipe, ("transformer",), undo)
                refuse_saving(pipe, ("transformer",), undo)
                refuse_other_weights(pipe, ("transformer",), undo)
                refuse_unmerging(pipe, ("transformer",), undo)
        if not self.keep_originals and kept_bytes:
            return Applied(on_kernels, no_undo=said("keep_originals=False: the weights are gone"), skipped=skipped)
        size = human_bytes(kept_bytes)
        kept = said("keeps {size} of originals in host memory for restore()", size=size) if kept_bytes else ""
        note = joined((self._attention_note(context), kept))
        return Applied(on_kernels, undo=undo, skipped=skipped, note=note)

    def _unsupported_reasons(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons = context.missing_triton(self.precision, (8, 9) if self.precision == "fp8" else (8, 0))
        family = family_of(pipe)
        if kernel_model(pipe) is None:
            instead = said(": use Quantize('fp8') in its place") if self.precision == "fp8" else ""
            return [
                *reasons,
                said(
                    "there are no fused kernels for {name} {whose}{instead}",
                    name=family.name_for(pipe),
                    whose=whose(pipe),
                    instead=instead,
                ),
            ]
        if self.attention == "fp8":
            reasons += self._no_fp8_attention_reasons(context)
        planned = _beneath_loras(pipe, context)
        if planned.blocks < Blocks.REWRITTEN and not rewritten_blocks(pipe).is_rewritten(pipe.transformer):
            reasons.append(said("it builds on the rewritten blocks: add RewriteBlocks()"))
        elif not self._on_kernels(pipe, context):
            reasons.append(
                said("the linear layers of the rewritten blocks stand apart: use RewriteBlocks(), with fuse=True")
            )
        reasons += adapter_problems(pipe.transformer, rewritten_blocks(pipe).BLOCKS)
        paths = [name.removeprefix("transformer.").removesuffix(".weight") for name in planned.weights]
        reasons += idle_patterns(self.exclude, paths)
        dtype = planned.dtype_of("transformer")
        if dtype != torch.bfloat16 and planned.blocks < Blocks.KERNELS:
            found = str(dtype).removeprefix("torch.")
            reasons.append(
                said("the kernels take bfloat16 weights, found {found}: add CastDtype('bfloat16')", found=found)
            )
        return reasons

    def _no_fp8_attention_reasons(self, context: Context) -> list[str]:
        reasons = [] if self.precision == "fp8" else [said("fp8 attention goes with FuseKernels('fp8')")]
        return reasons + _no_cudnn_reasons(context)

    def _attention(self, context: Context) -> str | None:
        """Return the precision of attention by lengths, or None where torch's stays."""
        if _no_cudnn_reasons(context):
            return None
        return "fp8" if self.attention != "bf16" and self.precision == "fp8" else "bf16"

    def _attention_note(self, context: Context) -> str:
        attention = self._attention(context)
        if attention is not None:
            if attention == "bf16":
                return said(
                    "attention in {precision} by the lengths of prompts where no backend is chosen", precision=attention
                )
            return said("attention in {precision} by the lengths of prompts", precision=attention)
        if self.precision != "fp8":
            missing = context.missing("cudnn") if (context.capability or (0, 0)) >= _CUDNN_CAPABILITY else []
            return joined(
                said("attention by torch, planned anew for each prompt length: {reason}", reason=each)
                for each in missing
            )
        reasons = _no_cudnn_reasons(context) if self.attention == "auto" else []
        plain = said("attention in bf16")
        return said("{first}: {second}", first=plain, second=joined(reasons)) if reasons else plain

    def _on_kernels(self, pipe: Pipeline, context: Context) -> tuple[str, ...]:
        """Return the blocks that can run on the kernels: those whose linear layers are concatenated by then."""
        planned, fused = _beneath_loras(pipe, context).weights, rewritten_blocks(pipe).FUSED_LAYERS
        return tuple(block for block in block_paths(pipe) if all(f"{block}.{name}.weight" in planned for name in fused))

    def _layers(self, pipe: Pipeline, context: Context) -> tuple[list[str], dict[str, str]]:
        """Return the paths within the transformer of the linear layers that become fp8, and why others do not."""
        exclude = family_of(pipe).keep_precise.get("transformer", ()) if self.exclude is None else self.exclude
        planned, blocks = (
            _beneath_loras(pipe, context).weights,
            tuple(f"{path}." for path in self._on_kernels(pipe, context)),
        )
        todo, left_out = [], {}
        for name, weight in planned.items():
            path = name.removeprefix("transformer.").removesuffix(".weight")
            is_linear = name.startswith(blocks) and name.endswith(".weight") and len(weight.shape) == 2
            is_linear = is_linear and ".lora_" not in name
            if self.precision != "fp8" or not is_linear or any(re.match(pattern, path) for pattern in exclude):
                continue
            why = _not_fp8_reason(weight, has_bias=f"transformer.{path}.bias" in planned)
            if why is None:
                todo.append(path)
            else:
                left_out[f"transformer.{path}"] = why
        return todo, left_out


def _beneath_loras(pipe: Pipeline, context: Context) -> PlannedPipe:
    """Return the pipe as planned, with the layers beneath a LoRA's under their own names, fused as they will be."""
    planned = context.planned(pipe)
    blocks = tuple(f"{path}." for path in block_paths(pipe))
    names = {name: _BENEATH.sub("", name) for name in planned.weights if name.startswith(blocks)}
    new = {plain: planned.weights[name] for name, plain in names.items() if plain != name}
    if not new:
        return planned
    planned = planned.with_weights(new, frozenset(name for name, plain in names.items() if plain != name))
    for path, parts in rewritten_blocks(pipe).to_be_fused(pipe.transformer, beneath_loras=True).items():
        layers = tuple(f"transformer.{part}" for part in parts)
        weights = [f"{layer}.weight" for layer in layers]
        if f"transformer.{path}.weight" not in planned.weights and all(each in planned.weights for each in weights):
            whole = {f"transformer.{path}.weight": planned.concatenated(layers)}
            planned = planned.with_weights(whole, frozenset(weights))
    return planned


def _no_cudnn_reasons(context: Context) -> list[str]:
    """Return why attention by lengths is not possible."""
    old = (context.capability or (0, 0)) < _CUDNN_CAPABILITY
    reasons = [said("attention by the lengths of prompts needs CUDA compute capability >= 9.0")] if old else []
    return reasons + context.missing("cudnn")


def _not_fp8_reason(weight: PlannedWeight, *, has_bias: bool) -> str | None:
    """Return why a linear layer cannot become an `Fp8Linear`, or None."""
    rows, columns = weight.shape
    if has_bias:
        return said("it has a bias")
    if weight.stored_as is not None:
        return said("its weight is quantized already")
    if weight.dtype != torch.bfloat16:
        return said("its weight is {dtype}, not torch.bfloat16", dtype=weight.dtype)
    if rows % 16 or columns % 16:
        return said("its shape {rows} x {columns} is not a multiple of 16", rows=rows, columns=columns)
    return None


def _settle(transformer: torch.nn.Module, lifted: list[Lifted]) -> None:
    """Give the layers that a LoRA adapts back to it, as layers of their own."""
    close_sites(transformer)
    put_back(lifted)


def _swap(owner: torch.nn.Module, name: str, new: Fp8Linear, undo: Undo, keep: bool) -> None:
    """Replace a linear layer by `new`; its weight waits on the host, or is dropped, until the undo."""
    linear: torch.nn.Linear = getattr(owner, name)
    if keep:
        new.kept = Kept(linear.weight.data.cpu())

        def put_back() -> None:
            place = place_of(new, owner, name)  # a LoRA may have been put around it
            if place is not None and new.kept is not None:
                linear.weight.data = new.kept.weight.to(next(new.buffers()).device)  # the pipe may have moved since
                place[0]._modules[place[1]] = linear

        undo.push(put_back)
    else:
        undo.give_up(said("keep_originals=False: the weights are gone"))
    setattr(owner, name, new)
    linear.weight.data = linear.weight.data.new_empty(0)

"""Refuse, before anything changes, what would lose, copy or overwrite weights that are not on the device."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from ernie_accel.core.components import Pipeline, modules_of
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.stand_in import Bound, StandInMethod
from ernie_accel.core.undo import Undo

#: Methods of a component that write to its weights, or read them all.
_REFUSED = (
    "half",
    "float",
    "double",
    "bfloat16",
    "type",
    "cpu",
    "to_empty",
    "load_state_dict",
    "state_dict",
    "save_pretrained",
    "fuse_lora",
    "unfuse_lora",
    "enable_group_offload",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_layerwise_casting",
)


def refuse_moves(pipe: Pipeline, modules: Iterable[nn.Module], device: torch.device, undo: Undo) -> None:
    """Make these components, and the pipe, refuse to be moved, cast, saved, or given other weights, on the instances.

    Moving them to the device that they are on is allowed, and moves nothing.
    """
    for owner in (pipe, *modules):
        undo.setattr(owner, "to", Bound(partial(_to, str(device)), owner))
        for name in _REFUSED:
            if callable(getattr(owner, name, None)):
                undo.setattr(owner, name, Bound(partial(_refuse, name), owner))
    for module in modules:
        for name in ("compile", "compile_repeated_blocks"):
            if callable(getattr(module, name, None)):
                undo.setattr(module, name, Bound(partial(_refuse_to_compile, name), module))
        undo.setattr(module, "cuda", Bound(partial(_to, str(device)), module))
        if callable(getattr(module, "load_lora_adapter", None)):
            undo.setattr(module, "load_lora_adapter", _LoadLora(module, "load_lora_adapter"))


def refuse_to_compile(blocks: Iterable[nn.Module], undo: Undo) -> None:
    """Make blocks that wait for their weights refuse ``block.compile()``, which would take that wait's place."""
    for block in blocks:
        undo.setattr(block, "compile", Bound(partial(_refuse_to_compile, "compile"), block))


class _LoadLora(StandInMethod):
    """`load_lora_adapter`, but for one that writes into another's weights: where these wait on the host, it is lost."""

    def __call__(
        self, weights: object, prefix: str | None = "transformer", hotswap: bool = False, **kwargs: object
    ) -> object:
        """Load a LoRA beside those that are there.

        Raises:
            ErnieAccelError: It is to be swapped in the place of another one (``hotswap=True``).
        """
        if hotswap:
            raise _refusal(self.owner, "load_lora_adapter(hotswap=True)")
        # diffusers asks for the state dict, of which it reads nothing, and loads one with the adapter's weights alone.
        state = vars(self.owner)
        refused: dict[str, object] = {n: state.pop(n) for n in ("state_dict", "load_state_dict") if n in state}
        try:
            return self.call_inner(weights, prefix=prefix, hotswap=False, **kwargs)
        finally:
            state.update(refused)


def _to(device: str, self: nn.Module | Pipeline, *args: object, **kwargs: object) -> object:
    here = torch.device(device)
    given = [value.device if isinstance(value, torch.Tensor) else value for value in (*args, *kwargs.values())]
    wanted = [torch.device(value) for value in given if isinstance(value, (str, torch.device))]
    wanted += [torch.device(here.type, value) for value in given if type(value) is int]
    dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
    if any(each.type != here.type or (each.index or 0) != (here.index or 0) for each in wanted):
        raise _refusal(self, f"to({', '.join(map(str, wanted))})")
    modules = [self] if isinstance(self, nn.Module) else modules_of(self).values()
    floating = {p.dtype for module in modules for p in module.parameters() if p.is_floating_point()}
    if any(dtype not in floating or len(floating) > 1 for dtype in dtypes):
        raise _refusal(self, f"to({', '.join(map(str, dtypes))})")
    return self


def _refuse(name: str, self: object, *_: object, **__: object) -> None:
    raise _refusal(self, f"{name}()")


def _refuse_to_compile(name: str, self: object, *_: object, **__: object) -> None:
    raise ErnieAccelError(
        f"{type(self).__name__}.{name}(): Residency brings the weights of a block before each call, and compiled code "
        "would not wait for them. Use ernie_accel.Compile() beside it, or call ernie_accel.restore(pipe) first"
    )


def _refusal(owner: object, call: str) -> ErnieAccelError:
    return ErnieAccelError(
        f"{type(owner).__name__}.{call}: Residency keeps its weights, some of them on the host, and this would lose or "
        "copy them. Call ernie_accel.restore(pipe) first, then optimize again. (ernie_accel.save(pipe, folder) works.)"
    )

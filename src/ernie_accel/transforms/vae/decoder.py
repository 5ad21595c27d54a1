"""Run the VAE in channels-last layout: convolutions without transposes, norms and activations fused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ernie_accel.common.language import joined, said
from ernie_accel.core.components import Pipeline, weights_of
from ernie_accel.core.context import Context
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.stand_in import standing_in
from ernie_accel.core.transform import MACHINE_LOCAL, Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.models.autoencoder import FusedDecoder, FusedEncoder, unsupported_reason
from ernie_accel.models.compile_cache import as_folder, compile_module, unsupported_cache_reasons


@dataclass(frozen=True, repr=False)
class CompileVae(Transform):
    """Give the VAE decoder's convolutions channels-last weights and compile it.

    The two belong together. Channels-last weights alone slow the stock decoder down on an H200, because the norms
    between the convolutions have no kernel for this layout. The first picture compiles for its size; the first picture
    of another size compiles for all sizes.

    Pays:
        From 300 pictures on: decoding 1024x1024 takes 35 ms instead of 85, but the first picture takes 15 s longer.

    Attributes:
        cache: Folder to keep the compiled code in, as in `Compile`; they may share it.
    """

    phase: ClassVar[Phase] = Phase.COMPILE
    slot: ClassVar[str] = "vae-compile"
    effect: ClassVar[Effect] = Effect.ROUNDING

    cache: str | None = field(default=None, kw_only=True, metadata=MACHINE_LOCAL)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", as_folder(self.cache))

    @property
    def changes_inside(self) -> tuple[str, ...]:
        return ("vae",)

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons = [] if context.no_compile is None else [context.no_compile]
        if not isinstance(_decoder(pipe), torch.nn.Module):
            reasons.append(said("{pipe} has no vae.decoder", pipe=type(pipe).__name__))
        return reasons + unsupported_cache_reasons(self.cache, context.device)

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        if _decoder(pipe)._compiled_call_impl is not None:
            return Preview((), note=said("the decoder is compiled already"))
        return Preview(("vae.decoder",), note=said("the first picture compiles"))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        return context.planned(pipe).compiling(self.slot)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        decoder = _decoder(pipe)
        with Undo() as undo:
            _lay_out(decoder, undo)
            undo.restore_attribute(decoder, "_compiled_call_impl")  # what nn.Module.compile fills in
            compile_module(decoder, self.cache, fullgraph=True)
        return Applied(("vae.decoder",), undo=undo, note=said("the first picture compiles"))


@dataclass(frozen=True, repr=False)
class FuseVae(Transform):
    """Run the VAE channels-last, with its norms, activations, biases and residuals in fused kernels.

    It replaces `CompileVae`, and compiles only eight small kernels, which serve decoder and encoder and all picture
    sizes. It supports ``AutoencoderKL`` and ``AutoencoderKLFlux2``: those of ERNIE-Image, Z-Image, FLUX and Stable
    Diffusion. It rounds at other places than stock. With random weights in bfloat16, on a CPU, the relative L2 distance
    from float32 is 0.024 for its pictures and 0.026 for stock's, and the two are 0.030 apart.

    Pays:
        Always where it can run. On an H200 a decode takes 21 ms (stock 86, `CompileVae` 34). The first decode takes
        3.6 s, or 0.2 s in the next process (`CompileVae` 22 s).
    """

    phase: ClassVar[Phase] = Phase.COMPILE
    slot: ClassVar[str] = "vae-compile"
    effect: ClassVar[Effect] = Effect.ROUNDING

    @property
    def changes_inside(self) -> tuple[str, ...]:
        return ("vae",)

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        if not isinstance(_decoder(pipe), torch.nn.Module):
            return [said("{pipe} has no vae.decoder", pipe=type(pipe).__name__)]
        return []  # where it cannot work it does nothing, and the pipe computes the same

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        reasons = context.missing_triton("FuseVae", (8, 0))
        if reasons:
            return Preview((), note=said("the kernels cannot run here: {reasons}", reasons=joined(reasons)))
        found = {half: _left_out(module, half) for half, module in _halves(pipe).items()}
        notes = [reason for reason in found.values() if reason is not None]
        changes = tuple(f"vae.{half}" for half, reason in found.items() if reason is None)
        return Preview(changes, note=joined(notes))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        return context.planned(pipe).compiling(self.slot)  # Triton compiles each kernel when it is first launched

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        preview = self.preview(pipe, context)
        with Undo() as undo:
            for half, module in _halves(pipe).items():
                if f"vae.{half}" in preview.changes:
                    _lay_out(module, undo)
                    _FUSED[half](module).install(undo)
        return Applied(preview.changes, undo=undo, note=preview.note)


_FUSED: dict[str, type[FusedDecoder] | type[FusedEncoder]] = {"decoder": FusedDecoder, "encoder": FusedEncoder}


def _halves(pipe: Pipeline) -> dict[str, torch.nn.Module]:
    """Return the decoder and, if there is one, the encoder."""
    parts = {half: getattr(pipe.vae, half, None) for half in _FUSED}
    return {half: part for half, part in parts.items() if isinstance(part, torch.nn.Module)}


def _left_out(module: torch.nn.Module, half: str) -> str | None:
    """Return why a decoder or encoder is left as it is; None if it is not."""
    if standing_in(module, _FUSED[half]) is not None:
        return said("the {half} runs on the kernels already", half=half)
    if module._compiled_call_impl is not None:
        return said("the {half} is compiled already", half=half)
    reason = unsupported_reason(module)
    return None if reason is None else said("not this {half}: {reason}", half=half, reason=reason)


def _lay_out(decoder: torch.nn.Module, undo: Undo) -> None:
    """Give the convolutions channels-last weights."""
    for weight in weights_of(decoder):
        if weight.tensor.ndim == 4:
            undo.set_data(weight, weight.tensor.data.contiguous(memory_format=torch.channels_last))


def _decoder(pipe: Pipeline) -> Any:
    return getattr(getattr(pipe, "vae", None), "decoder", None)

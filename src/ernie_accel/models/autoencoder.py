"""Decoder and encoder of diffusers' KL autoencoders with their norms, activations, biases and residuals fused.

Between two convolutions lie a bias, perhaps a residual, a group norm and a SiLU: four or five passes over the picture
in torch, two here. The convolutions are cuDNN's, in the channels-last layout that its fastest ones want, so nothing is
compiled but a few small kernels, which serve pictures of all sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.common.language import said
from ernie_accel.core.stand_in import StandInForward
from ernie_accel.kernels import ops, wide_attention

_COPIED = torch.complex128  # the widest dtype there is: what is copied is bytes, whatever they mean

#: A part takes the hidden states, the scale and shift of the norm it begins with, and the norm that the next part
#: begins with; it returns the hidden states and the scale and shift of that one. Up- and downsamplers have no norm.
_Part: TypeAlias = Callable[[Any, Tensor, Tensor | None, "nn.GroupNorm | None"], tuple[Tensor, Tensor | None]]


# Diffusers' classes as a type checker sees them: they come without types, and these are never made.


class _Resnet(nn.Module):
    norm1: nn.GroupNorm
    norm2: nn.GroupNorm
    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv_shortcut: nn.Conv2d | None
    nonlinearity: nn.Module
    dropout: nn.Dropout
    time_emb_proj: nn.Module | None
    time_embedding_norm: str
    upsample: object
    downsample: object
    output_scale_factor: float


class _Attention(nn.Module):
    heads: int
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: tuple[nn.Linear, nn.Dropout]
    processor: object
    group_norm: nn.GroupNorm
    spatial_norm: nn.Module | None
    norm_q: nn.Module | None
    norm_k: nn.Module | None
    residual_connection: bool
    rescale_output_factor: float


class _Upsampler(nn.Module):
    norm: nn.Module | None
    conv: nn.Conv2d
    interpolate: bool
    use_conv_transpose: bool
    name: str


class _Downsampler(nn.Module):
    norm: nn.Module | None
    conv: nn.Conv2d
    padding: int
    use_conv: bool


class _MidBlock(nn.Module):
    resnets: Sequence[_Resnet]
    attentions: Sequence[_Attention | None]


class _UpBlock(nn.Module):
    resnets: Sequence[_Resnet]
    upsamplers: Sequence[_Upsampler] | None


class _DownBlock(nn.Module):
    resnets: Sequence[_Resnet]
    downsamplers: Sequence[_Downsampler] | None


class _Half(nn.Module):
    conv_in: nn.Conv2d
    mid_block: _MidBlock
    conv_norm_out: nn.GroupNorm
    conv_act: nn.Module
    conv_out: nn.Conv2d


class _Decoder(_Half):
    up_blocks: Sequence[_UpBlock]


class _Encoder(_Half):
    down_blocks: Sequence[_DownBlock]


class FusedDecoder(StandInForward):
    """The forward of a decoder that `unsupported_reason` accepts; same arguments, same result up to rounding.

    It holds no weights: what is loaded into the decoder or cast counts from the next call on. Convolutions should have
    channels-last weights.
    """

    def __call__(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """Return the pictures [B, 3, 8 * H, 8 * W] of latents [B, C, H, W].

        The forward runs as before if gradients are on, which the kernels do not compute, or if layers have hooks or
        other forwards (offloading adds them).
        """
        decoder = self.module
        out: Tensor
        if torch.is_grad_enabled() or latent_embeds is not None or _has_altered_layers(decoder):
            out = self.inner_forward(sample, latent_embeds)
            return out
        return _run(decoder, sample)


class FusedEncoder(StandInForward):
    """The forward of an encoder, as `FusedDecoder` is that of a decoder."""

    def __call__(self, sample: Tensor) -> Tensor:
        """Return the moments [B, 2 * C, H / 8, W / 8] of pictures [B, 3, H, W]."""
        encoder = self.module
        if torch.is_grad_enabled() or _has_altered_layers(encoder):
            out: Tensor = self.inner_forward(sample)
            return out
        return _run(encoder, sample)


def _run(half: _Half, sample: Tensor) -> Tensor:
    x_bchw = half.conv_in(sample)
    parts = [(part, _KINDS[_path_of(part)]) for part in _parts(half)]
    norms = [None if kind.first_norm is None else kind.first_norm(part) for part, kind in parts]
    affine_b2c = ops.group_norm_affine(x_bchw, None, *_norm(cast(nn.GroupNorm, norms[0])))  # both begin with a resnet
    for (part, kind), following in zip(parts, [*norms[1:], half.conv_norm_out], strict=True):
        x_bchw, affine_b2c = kind.run(part, x_bchw, affine_b2c, following)
    out: Tensor = half.conv_out(ops.affine(x_bchw, affine_b2c, True))
    return out


def unsupported_reason(half: nn.Module) -> str | None:
    """Return what in a decoder or an encoder the fused one would compute differently, or None."""
    if "forward" in vars(half):
        return said("its forward was replaced (by offloading, for instance)")
    kinds = {"diffusers.models.autoencoders.vae.Decoder": "up_blocks"}
    kinds["diffusers.models.autoencoders.vae.Encoder"] = "down_blocks"
    stages = kinds.get(_path_of(half))
    if stages is None:
        return said("it is a {kind}", kind=_path_of(half))
    known = "UpDecoderBlock2D" if stages == "up_blocks" else "DownEncoderBlock2D"
    blocks: dict[str, tuple[nn.Module, str]] = {"mid_block": (half.get_submodule("mid_block"), "UNetMidBlock2D")}
    blocks |= {f"{stages}.{i}": (block, known) for i, block in enumerate(half.get_submodule(stages).children())}
    for path, (block, expected) in blocks.items():
        if _path_of(block) != f"diffusers.models.unets.unet_2d_blocks.{expected}":
            return said("{path} is a {kind}", path=path, kind=_path_of(block))
    if reason := _unsupported_norm_reason(half.conv_norm_out, half.conv_act):
        return said("it ends with {reason}", reason=reason)
    paths = {part: path for path, part in half.named_modules()}
    for part in _parts(cast(_Half, half)):
        kind = _KINDS.get(_path_of(part))
        reason = said("is a {kind}", kind=_path_of(part)) if kind is None else kind.unsupported_reason(part)
        if reason is not None:
            return said("{name} {reason}", name=paths[part], reason=reason)
    return None


def _parts(half: _Half) -> list[nn.Module]:
    """Return the resnets, attentions, upsamplers and downsamplers in the order in which they run."""
    middle = half.mid_block
    parts: list[nn.Module] = [middle.resnets[0]]
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        parts += [resnet] if attention is None else [attention, resnet]
    before: list[nn.Module] = []
    for down in cast(Sequence[_DownBlock], getattr(half, "down_blocks", ())):
        before += [*down.resnets, *(down.downsamplers or ())]
    for up in cast(Sequence[_UpBlock], getattr(half, "up_blocks", ())):
        parts += [*up.resnets, *(up.upsamplers or ())]
    return before + parts


def _unsupported_resnet_reason(block: _Resnet) -> str | None:
    if any(type(conv) is not nn.Conv2d for conv in (block.conv1, block.conv2, block.conv_shortcut or block.conv2)):
        return said("has quantized or adapted convolutions")
    for norm in (block.norm1, block.norm2):
        if reason := _unsupported_norm_reason(norm, block.nonlinearity):
            return said("has {reason}", reason=reason)
    if block.dropout.p > 0:
        return said("drops values out")
    if block.time_emb_proj is not None or block.time_embedding_norm not in ("default", "group"):
        return said("takes a time embedding")
    if block.upsample is not None or block.downsample is not None or block.output_scale_factor != 1:
        return said("resamples, or scales its output")
    return None


def _unsupported_attention_reason(block: _Attention) -> str | None:
    if any(type(linear) is not nn.Linear for linear in (block.to_q, block.to_k, block.to_v, block.to_out[0])):
        return said("has quantized or adapted layers")
    if type(block.processor).__name__ != "AttnProcessor2_0":
        return said("computes with a {processor}", processor=type(block.processor).__name__)
    if reason := _unsupported_norm_reason(block.group_norm):
        return said("has {reason}", reason=reason)
    if any(norm is not None for norm in (block.spatial_norm, block.norm_q, block.norm_k)):
        return said("has other norms")
    if block.to_out[1].p > 0:
        return said("drops values out")
    if not block.residual_connection or block.rescale_output_factor != 1:
        return said("has no residual, or scales its output")
    return None


def _unsupported_norm_reason(norm: object, activation: object = None) -> str | None:
    if type(norm) is not nn.GroupNorm or not norm.affine:
        return said("a {norm} for a norm", norm=type(norm).__name__)
    if activation is not None and type(activation) is not nn.SiLU:
        return said("a {activation} for an activation", activation=type(activation).__name__)
    return None


def _unsupported_upsampler_reason(block: _Upsampler) -> str | None:
    if block.norm is not None or not block.interpolate or block.use_conv_transpose or block.name != "conv":
        return said("does not interpolate and then convolve")
    return None if type(block.conv) is nn.Conv2d else said("has no convolution, or a quantized or adapted one")


def _unsupported_downsampler_reason(block: _Downsampler) -> str | None:
    if block.norm is not None or not block.use_conv:
        return said("does not only convolve")
    return None if type(block.conv) is nn.Conv2d else said("has no convolution, or a quantized or adapted one")


def _run_resnet(
    block: _Resnet, x_bchw: Tensor, affine_b2c: Tensor | None, following: nn.GroupNorm | None
) -> tuple[Tensor, Tensor | None]:
    y_bchw = _convolve(block.conv1, ops.affine(x_bchw, affine_b2c, True))
    middle_b2c = ops.group_norm_affine(y_bchw, block.conv1.bias, *_norm(block.norm2))
    y_bchw = _convolve(block.conv2, ops.affine(y_bchw, middle_b2c, True))
    if block.conv_shortcut is None:
        return _finish(y_bchw, x_bchw, block.conv2.bias, following)
    biases = [conv.bias for conv in (block.conv2, block.conv_shortcut) if conv.bias is not None]
    bias_c = cast(Tensor, sum(biases)) if biases else None
    return _finish(y_bchw, _convolve(block.conv_shortcut, x_bchw), bias_c, following)


def _run_attention(
    block: _Attention, x_bchw: Tensor, affine_b2c: Tensor | None, following: nn.GroupNorm | None
) -> tuple[Tensor, Tensor | None]:
    batch, channels, height, width = x_bchw.shape
    rows_bsc = ops.affine(x_bchw, affine_b2c, False).permute(0, 2, 3, 1).flatten(1, 2)
    q_bnsd, k_bnsd, v_bnsd = (
        to(rows_bsc).unflatten(-1, (block.heads, -1)).transpose(1, 2) for to in (block.to_q, block.to_k, block.to_v)
    )
    out_bsc = wide_attention.attention(q_bnsd, k_bnsd, v_bnsd).transpose(1, 2).flatten(2)
    out_bsc = F.linear(out_bsc, block.to_out[0].weight)
    out_bchw = out_bsc.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return _finish(out_bchw, x_bchw, block.to_out[0].bias, following)


def _run_upsampler(
    block: _Upsampler, x_bchw: Tensor, affine_b2c: Tensor | None, following: nn.GroupNorm | None
) -> tuple[Tensor, Tensor | None]:
    return _finish(_convolve(block.conv, _twice_as_large(x_bchw)), None, block.conv.bias, following)


def _run_downsampler(
    block: _Downsampler, x_bchw: Tensor, affine_b2c: Tensor | None, following: nn.GroupNorm | None
) -> tuple[Tensor, Tensor | None]:
    x_bchw = F.pad(x_bchw, (0, 1, 0, 1)) if block.padding == 0 else x_bchw
    return _finish(_convolve(block.conv, x_bchw), None, block.conv.bias, following)


def _twice_as_large(x_bchw: Tensor) -> Tensor:
    """Return every pixel four times, as nearest-neighbour interpolation does, channels-last.

    Copied 16 bytes at a time, it takes a tenth of the time of torch's interpolation in this layout (0.17 ms vs 1.6 ms).
    """
    batch, channels, height, width = x_bchw.shape
    if channels * x_bchw.element_size() % _COPIED.itemsize:
        return F.interpolate(x_bchw.contiguous(), scale_factor=2.0, mode="nearest")
    pixels = x_bchw.permute(0, 2, 3, 1).reshape(-1, channels).view(_COPIED)
    wide_bhwc = pixels.view(batch, height, 1, width, 1, -1).expand(-1, -1, 2, -1, 2, -1)
    wide_bhwc = wide_bhwc.reshape(batch, 2 * height, 2 * width, -1)
    return wide_bhwc.view(x_bchw.dtype).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _Kind:
    run: _Part
    unsupported_reason: Callable[[Any], str | None]
    first_norm: Callable[[Any], nn.GroupNorm] | None


_KINDS = {
    "diffusers.models.resnet.ResnetBlock2D": _Kind(_run_resnet, _unsupported_resnet_reason, attrgetter("norm1")),
    "diffusers.models.attention_processor.Attention": _Kind(
        _run_attention, _unsupported_attention_reason, attrgetter("group_norm")
    ),
    "diffusers.models.upsampling.Upsample2D": _Kind(_run_upsampler, _unsupported_upsampler_reason, None),
    "diffusers.models.downsampling.Downsample2D": _Kind(_run_downsampler, _unsupported_downsampler_reason, None),
}


def _finish(
    x_bchw: Tensor, residual_bchw: Tensor | None, bias_c: Tensor | None, following: nn.GroupNorm | None
) -> tuple[Tensor, Tensor | None]:
    """Return the sum of all three, and the scale and shift of the norm that follows, if one does."""
    if following is not None:
        out: tuple[Tensor, Tensor] = ops.add_group_norm_affine(x_bchw, residual_bchw, bias_c, *_norm(following))
        return out
    x_bchw = x_bchw if bias_c is None else x_bchw.add_(bias_c.view(-1, 1, 1))  # made by the caller, for this
    return x_bchw if residual_bchw is None else x_bchw.add_(residual_bchw), None


def _norm(norm: nn.GroupNorm) -> tuple[Tensor, Tensor, int, float]:
    return norm.weight, norm.bias, norm.num_groups, norm.eps


def _convolve(conv: nn.Conv2d, x_bchw: Tensor) -> Tensor:
    """Return the convolution without its bias, which torch would add in a pass of its own."""
    out: Tensor = conv._conv_forward(x_bchw, conv.weight, None)  # minds its padding_mode, which may be circular
    return out


def _path_of(part: object) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _has_altered_layers(half: nn.Module) -> bool:
    parts = (part for part in half.modules() if part is not half)
    return any("forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks for part in parts)

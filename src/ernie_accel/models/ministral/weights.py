"""The weights of a language model in the form that the decoding kernels take: pointers, no copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.kernels import decode
from ernie_accel.kernels.decode import DecodeWeight
from ernie_accel.models.language.architecture import CausalLanguageModel, Norm
from ernie_accel.models.ministral.state import DecodeState

#: Dtype of the hidden states: products run on tensor cores and round as cuBLAS does.
_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class _Layer:
    qkv: tuple[DecodeWeight, DecodeWeight, DecodeWeight]
    out: DecodeWeight
    gate: DecodeWeight
    up: DecodeWeight
    down: DecodeWeight
    norm: tuple[Tensor, float]
    norm_mlp: tuple[Tensor, float]
    scaling: float


@dataclass(frozen=True)
class KernelWeights:
    """A language model for the kernels of ``kernels/decode.py``; made by `kernel_weights`."""

    layers: tuple[_Layer, ...]
    norm: tuple[Tensor, float]
    head: DecodeWeight

    def logits(self, x_bh: Tensor, state: DecodeState) -> Tensor:
        """Return the logits [B, V] of one token a row, and put its key and value into the cache of `state`."""
        for layer, keys_bnpd, values_bnpd in zip(self.layers, state.keys_lbnpd, state.values_lbnpd, strict=True):
            qkv_bn = decode.linear(x_bh, layer.qkv, norm=layer.norm)
            tables = (state.cos_pd, state.sin_pd, state.q_scale_p, state.position_b)
            heads_bn = decode.attend(qkv_bn, *tables, keys_bnpd, values_bnpd, layer.scaling)
            x_bh = decode.linear(heads_bn, (layer.out,), residual_bn=x_bh)
            active_bn = decode.gate_up(x_bh, layer.gate, layer.up, layer.norm_mlp)
            x_bh = decode.linear(active_bn, (layer.down,), residual_bn=x_bh)
        return decode.linear(x_bh, (self.head,), norm=self.norm)

    @staticmethod
    def project(linear: nn.Module, x_btk: Tensor) -> Tensor:
        """Return the product [B, T, N] of many rows with the weight of `linear`, one of these."""
        weight = _decode_weight(linear)
        if isinstance(weight, str):
            raise TypeError(weight)
        return F.linear(x_btk, decode.dequantize(weight, x_btk.dtype))


def kernel_weights(model: CausalLanguageModel) -> KernelWeights | str:
    """Return the weights of `model`, a ``Ministral3ForCausalLM``, or why the kernels cannot take them."""
    inner, found, problems = model.model, {}, []
    if model.config.hidden_act != "silu":
        return f"its activation is {model.config.hidden_act}, not silu"
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj") or (
            name == "lm_head"
        ):
            weight = _decode_weight(module)
            if isinstance(weight, str):
                problems.append(f"{name} {weight}")
            else:
                found[name] = weight
    if problems:
        return problems[0]
    too_old = _too_old(inner.embed_tokens.weight.device, [weight.values_nk.dtype for weight in found.values()])
    if too_old is not None:
        return too_old
    embed = inner.embed_tokens.weight
    size = inner.layers[0].self_attn.head_dim
    if embed.dtype != _DTYPE:
        return (
            f"its hidden states are {str(embed.dtype).removeprefix('torch.')}, not {str(_DTYPE).removeprefix('torch.')}"
        )
    if size < 16 or size & (size - 1):
        return f"its heads of {size} are not a power of two"

    layers = []
    for i, layer in enumerate(inner.layers):
        at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        qkv = (found[f"{at}.q_proj"], found[f"{at}.k_proj"], found[f"{at}.v_proj"])
        gate, up = found[f"{mlp}.gate_proj"], found[f"{mlp}.up_proj"]
        for together in (qkv, (gate, up)):
            if len({weight.values_nk.dtype for weight in together}) > 1:
                return f"layer {i} has projections of several dtypes that are computed in one launch"
        layers.append(
            _Layer(
                qkv=qkv,
                out=found[f"{at}.o_proj"],
                gate=gate,
                up=up,
                down=found[f"{mlp}.down_proj"],
                norm=_norm(layer.input_layernorm),
                norm_mlp=_norm(layer.post_attention_layernorm),
                scaling=layer.self_attn.scaling,
            )
        )
    return KernelWeights(tuple(layers), _norm(inner.norm), found["lm_head"])


def _too_old(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """Return why Triton cannot compile the kernels for these weights on a CUDA device, or None."""
    if device.type != "cuda":
        return None
    have = torch.cuda.get_device_capability(device)
    need = (8, 9) if torch.float8_e4m3fn in dtypes else (8, 0)
    if have >= need:
        return None
    return "its weights need CUDA compute capability >= {}.{}; this device has {}.{}".format(*need, *have)


def _norm(norm: Norm) -> tuple[Tensor, float]:
    return norm.weight, norm.variance_epsilon


def _decode_weight(linear: nn.Module) -> DecodeWeight | str:
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__name__}, not a plain linear layer"
    if linear.bias is not None:
        return "has a bias"
    weight: object = linear.weight
    rows, columns = weight.shape
    if rows % decode.MULTIPLE_N or columns % decode.MULTIPLE_K:
        return f"is {rows} x {columns}, not a multiple of {decode.MULTIPLE_N} x {decode.MULTIPLE_K}"
    if type(weight) is nn.Parameter:
        if weight.dtype == _DTYPE and weight.is_contiguous():
            return DecodeWeight(weight.detach())
        return f"has a weight in {str(weight.dtype).removeprefix('torch.')}, or with strides"
    # torchao's weight-only float8: values, and one scale a row (torchao/quantization/.../float8_tensor.py).
    if type(weight).__name__ == "Float8Tensor" and weight.act_quant_kwargs is None and weight.scale.numel() == rows:
        return DecodeWeight(weight.qdata.contiguous(), weight.scale.float().view(-1))
    return f"has a weight of {type(weight).__name__}"

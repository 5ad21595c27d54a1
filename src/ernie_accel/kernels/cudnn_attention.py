"""Attention in float8 by cuDNN, through the package nvidia-cudnn-frontend; the twin is ``reference.attention_fp8``."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Scale of the probabilities, which are at most 1: a power of two below float8_e4m3fn's 448.
_PROBABILITY_SCALE = 256.0


@dataclass(frozen=True)
class _Plan:
    """A compiled cuDNN graph for one shape, with the tensors of its own that it needs."""

    graph: Any
    names: dict[str, Any]
    constants: dict[Any, Tensor]
    workspace_bytes: int


def attention_fp8(q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, scale: Tensor) -> Tensor:
    """Return the attention output [B, S, N * D] in float8.

    Args:
        q_bsnd: Queries in float8_e4m3fn [B, S, N, D], contiguous, not scaled.
        k_bsnd: Keys, likewise.
        v_bsnd: Values, likewise, to be multiplied by `scale`.
        scale: float32, all elements equal; the scale of the values and of the output.
    """
    import cudnn

    batch, tokens, heads, size = q_bsnd.shape
    plan = _plan(batch, tokens, heads, size, q_bsnd.device)
    out_bsnd = torch.empty_like(q_bsnd)
    # The kernel computes in units of the scale: values in, output out; neither needs to be multiplied by it.
    tensors = {"q": q_bsnd, "k": k_bsnd, "v": v_bsnd, "out": out_bsnd}
    pack = {plan.names[name]: tensor.transpose(1, 2) for name, tensor in tensors.items()} | plan.constants
    workspace = torch.empty(plan.workspace_bytes, device=q_bsnd.device, dtype=torch.uint8)
    handle = _handle(q_bsnd.device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(q_bsnd.device).cuda_stream)
    plan.graph.execute(pack, workspace, handle=handle)
    return out_bsnd.flatten(2, 3)


@functools.cache
def _handle(device: torch.device) -> Any:
    import cudnn

    return cudnn.create_handle()


@functools.lru_cache(maxsize=64)
def _plan(batch: int, tokens: int, heads: int, size: int, device: torch.device) -> _Plan:
    """Build the graph for one shape; takes part of a second, and the last shapes are kept."""
    import cudnn

    fp8, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=fp8, intermediate_data_type=fp32, compute_data_type=fp32, handle=_handle(device))
    shape, stride = [batch, heads, tokens, size], [tokens * heads * size, size, heads * size, 1]
    names = {name: graph.tensor(name=name, dim=shape, stride=stride, data_type=fp8) for name in ("q", "k", "v")}
    one = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1], "data_type": fp32}
    values = {"descale_q": 1.0, "descale_k": 1.0, "descale_v": 1.0, "scale_o": 1.0}
    values |= {"descale_s": 1 / _PROBABILITY_SCALE, "scale_s": _PROBABILITY_SCALE}
    scales = {name: graph.tensor(name=name, **one) for name in values}
    out, _, amax_s, amax_o = graph.sdpa_fp8(
        **names, **scales, attn_scale=size**-0.5, is_inference=True, use_causal_mask=False
    )
    out.set_output(True).set_dim(shape).set_stride(stride)
    for amax in (amax_s, amax_o):
        amax.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(fp32)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    constants = {scales[name]: torch.full((1, 1, 1, 1), value, device=device) for name, value in values.items()}
    constants |= {amax: torch.zeros(1, 1, 1, 1, device=device) for amax in (amax_s, amax_o)}
    return _Plan(graph, names | {"out": out}, constants, max(1, graph.get_workspace_size()))

"""Attention called from cuDNN directly, through the package nvidia-cudnn-frontend; twins are in ``reference.py``.

It is called where ``hopper/`` has no kernel: on other cards than Hopper's, for heads of other sizes than 96 and 128, or
without NVRTC.

cuDNN plans for a number of tokens, which takes part of a second. It can read on the device how many tokens of each row
are real, so one plan serves batches with padded prompts. On an H200, with heads of 128, this cost it a fifth more time
in bfloat16 (0.52 ms instead of 0.43 at 4224 tokens); in fp8 it was the faster kernel (4224 tokens, 30 heads: 0.323 ms
with 60 of them padding, 0.358 without lengths), so lengths are passed there even where nothing is padded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.kernels.kept_plans import KeptPlans
from ernie_accel.kernels.reference import ROOM

if TYPE_CHECKING:
    import cudnn

#: Plans that are kept beside those that captured graphs read; each is for one number of tokens and one batch size.
_KEEP = 64
#: Scale of the probabilities, which are at most 1: a power of two below float8_e4m3fn's 448.
_PROBABILITY_SCALE = 256.0


@dataclass(frozen=True)
class _Plan:
    """A compiled cuDNN graph for one shape, with the tensors that it needs."""

    graph: cudnn.pygraph
    names: dict[str, object]
    constants: dict[object, Tensor]
    workspace_bytes: int


_PLANS: KeptPlans[_Plan] = KeptPlans(_KEEP, torch.cuda.synchronize)


def attention(q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, lengths_b: Tensor | None) -> Tensor:
    """Return the attention output [B, S, N * D].

    Args:
        q_bsnd: Queries in bfloat16 or float16 [B, S, N, D].
        k_bsnd: Keys, likewise; there may be fewer heads, each for as many of the queries' in a row.
        v_bsnd: Values, likewise; their rows may be further apart, as in a fused projection.
        lengths_b: int32, how many keys of each row are real; the others may be any finite numbers. None: all are real.

    Raises:
        ErnieAccelError: cuDNN has no kernel for these arguments.
    """
    q_bsnd, k_bsnd = q_bsnd.contiguous(), k_bsnd.contiguous()
    return _run(q_bsnd, k_bsnd, v_bsnd, lengths_b)


def attention_fp8(
    q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, scale: Tensor, lengths_b: Tensor | None, spare: int = 0
) -> Tensor:
    """Return the attention output [B, S, N * D + spare] in float8; the spare columns are not written.

    Args:
        q_bsnd: Queries in float8_e4m3fn [B, S, N, D], contiguous, not scaled.
        k_bsnd: Keys, likewise.
        v_bsnd: Values, likewise, to be multiplied by `scale`.
        scale: float32, all elements equal; the scale of the output: that of the values, or with `spare` ROOM times it.
        lengths_b: As in `attention`.
        spare: Columns that follow the output's rows, which are smaller by ROOM then.
    """
    # The kernel computes in units of the scale: values in, output out; neither needs to be multiplied by it.
    return _run(q_bsnd, k_bsnd, v_bsnd, lengths_b, spare)


def _run(q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, lengths_b: Tensor | None, spare: int = 0) -> Tensor:
    import cudnn

    by_lengths = lengths_b is not None or q_bsnd.dtype is torch.float8_e4m3fn
    of = (q_bsnd.shape, k_bsnd.shape[2], v_bsnd.stride(), q_bsnd.dtype, q_bsnd.device, by_lengths, spare)
    plan = _PLANS.get(of, lambda: _build(*of))
    batch, tokens, heads, size = q_bsnd.shape
    out_bsw = q_bsnd.new_empty(batch, tokens, heads * size + spare)
    out_bsnd = out_bsw[..., : heads * size].view(batch, tokens, heads, size)
    tensors = {"q": q_bsnd, "k": k_bsnd, "v": v_bsnd, "out": out_bsnd}
    pack = {plan.names[name]: tensor.transpose(1, 2) for name, tensor in tensors.items()} | plan.constants
    if lengths_b is not None:
        pack[plan.names["seq_len_kv"]] = lengths_b.view(-1, 1, 1, 1)
    workspace = torch.empty(plan.workspace_bytes, device=q_bsnd.device, dtype=torch.uint8)
    handle = _handle(q_bsnd.device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(q_bsnd.device).cuda_stream)
    plan.graph.execute(pack, workspace, handle=handle)
    return out_bsw


@functools.cache
def _handle(device: torch.device) -> object:
    import cudnn

    return cudnn.create_handle()


def _build(
    shape_bsnd: torch.Size,
    kv_heads: int,
    v_strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    by_lengths: bool,
    spare: int,
) -> _Plan:
    """Build the graph for one shape; takes 35 to 65 ms on an H200, the first of its kind 0.5 to 0.8 s."""
    import cudnn

    batch, tokens, heads, size = shape_bsnd
    kinds = {torch.float8_e4m3fn: cudnn.data_type.FP8_E4M3, torch.bfloat16: cudnn.data_type.BFLOAT16}
    kinds[torch.float16] = cudnn.data_type.HALF
    kind, fp32, is_fp8 = kinds[dtype], cudnn.data_type.FLOAT, dtype is torch.float8_e4m3fn
    graph = cudnn.pygraph(
        io_data_type=kind, intermediate_data_type=fp32, compute_data_type=fp32, handle=_handle(device)
    )
    shape, shared = [batch, heads, tokens, size], [batch, kv_heads, tokens, size]
    pitch = heads * size + spare
    laid_out = {
        "q": (shape, [tokens * heads * size, size, heads * size, 1]),
        "k": (shared, [tokens * kv_heads * size, size, kv_heads * size, 1]),
        "v": (shared, [v_strides[at] for at in (0, 2, 1, 3)]),
    }
    names = {
        name: graph.tensor(name=name, dim=dim, stride=strides, data_type=kind)
        for name, (dim, strides) in laid_out.items()
    }
    one, each = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1]}, {"dim": [batch, 1, 1, 1], "stride": [1, 1, 1, 1]}
    counts, constants = {}, {}
    if by_lengths:
        for name in ("seq_len_q", "seq_len_kv"):
            counts[name] = graph.tensor(name=name, **each, data_type=cudnn.data_type.INT32)
            # All queries are computed, so that the output at padding is finite; of the keys all are real unless a
            # call says otherwise.
            constants[counts[name]] = torch.full((batch, 1, 1, 1), tokens, device=device, dtype=torch.int32)
    options = {"attn_scale": size**-0.5, "is_inference": True, "use_causal_mask": False, "use_padding_mask": by_lengths}
    if is_fp8:
        values = {"descale_q": 1.0, "descale_k": 1.0, "descale_v": 1.0}
        values["scale_o"] = 1 / ROOM if spare else 1.0
        values |= {"descale_s": 1 / _PROBABILITY_SCALE, "scale_s": _PROBABILITY_SCALE}
        scales = {name: graph.tensor(name=name, **one, data_type=fp32) for name in values}
        out, _, *largest = graph.sdpa_fp8(**names, **scales, **counts, **options)
        for amax in largest:
            amax.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(fp32)
        constants |= {scales[name]: torch.full((1, 1, 1, 1), value, device=device) for name, value in values.items()}
        constants |= {amax: torch.zeros(1, 1, 1, 1, device=device) for amax in largest}
    else:
        out, _ = graph.sdpa(**names, **counts, **options)
    out.set_output(True).set_dim(shape).set_stride([tokens * pitch, size, pitch, 1])
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
    except (RuntimeError, cudnn.cudnnGraphNotSupportedError) as error:
        raise ErnieAccelError(
            f"cuDNN has no attention for {batch} x {tokens} tokens and {heads} heads of {size} in "
            f"{str(dtype).removeprefix('torch.')}: {error}. Use torch's: FuseKernels(..., attention='bf16') and "
            "SetAttention('native')."
        ) from error
    return _Plan(
        graph,
        names | counts | {"out": out},
        constants,
        max(1, graph.get_workspace_size()),
    )

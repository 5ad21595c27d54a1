"""A stand-in for torch_npu: Ascend's fused attention on the CPU, as strict about its mask as the kernel.

Shapes and the refusal are those of FlashAttentionScore (ops-transformer, flash_attention_score_tiling_general.cpp),
dtypes and the meaning of the mask those of the documentation of ``torch_npu.npu_fusion_attention``:
https://www.hiascend.com/document/detail/zh/Pytorch/730/apiref/torchnpuCustomsapi/docs/context/torch_npu-npu_fusion_attention.md
"""

import torch

__version__ = "2.9.0"

#: The masks of all calls, as the kernel got them.
calls = []


def check_mask_shape(mask, batch, heads, queries, keys):
    """Refuse what the kernel refuses, in its words."""
    supported = [(batch, heads, queries, keys), (batch, 1, queries, keys), (1, 1, queries, keys), (queries, keys)]
    if tuple(mask.shape) not in supported:
        raise RuntimeError(
            f"get unsupported atten_mask shape, the shape is {list(mask.shape)}. B=[{batch}], N=[{heads}], "
            f"Sq=[{queries}], Skv=[{keys}], supported atten_mask shape can be [B, N, Sq, Skv], [B, 1, Sq, Skv], "
            "[1, 1, Sq, Skv] and [Sq, Skv]."
        )
    if not mask.is_contiguous():
        raise RuntimeError("atten_mask must be contiguous")


def npu_fusion_attention(
    query,
    key,
    value,
    head_num,
    input_layout,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    pre_tockens=2147483647,
    next_tockens=2147483647,
    inner_precise=0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    gen_mask_parallel=True,
    sync=False,
):
    """Return attention over [B, S, N, D] and the placeholders of the kernel's other results; True masks out."""
    if input_layout != "BSND" or query.shape[2] != head_num:
        raise RuntimeError(f"expected BSND with {head_num} heads, got {input_layout} {list(query.shape)}")
    if len({query.dtype, key.dtype, value.dtype}) != 1:
        raise RuntimeError("query, key and value must have the same dtype")
    calls.append(atten_mask)
    if atten_mask is not None:
        if atten_mask.dtype not in (torch.bool, torch.uint8):
            raise RuntimeError(f"atten_mask must be BOOL or UINT8, got {atten_mask.dtype}")
        check_mask_shape(atten_mask, query.shape[0], head_num, query.shape[1], key.shape[1])
    scores = torch.einsum("bqnd,bknd->bnqk", query.float(), key.float()) * scale
    if atten_mask is not None:
        scores = scores.masked_fill(atten_mask.bool(), float("-inf"))
    out = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), value.float()).to(query.dtype)
    return out, None, None, None, 0, 0, 0


def npu_rms_norm(x, weight, epsilon=1e-6):
    """Return RMS norm as diffusers calls it on an NPU."""
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (normed.to(x.dtype) * weight,)

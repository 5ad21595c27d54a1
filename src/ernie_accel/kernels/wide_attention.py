"""Attention with heads too wide for flash kernels, as two matrix products with a softmax between them.

An autoencoder attends with one head of 512 over every pixel of its smallest picture: 16,384 of them at 1024x1024. On
an H200 torch's own attention takes 4.0 ms for that size, and this takes 1.9.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_FLASH_SIZE = 256  # widest heads that flash kernels support
_SCORES = 2**27  # held at a time, in float32; with their softmax, 1 GiB


def attention(q_bnsd: Tensor, k_bnsd: Tensor, v_bnsd: Tensor) -> Tensor:
    """Return ``scaled_dot_product_attention(q, k, v)`` [B, N, S, D], by the faster of two ways."""
    is_wide = q_bnsd.is_cuda and q_bnsd.shape[-1] > _FLASH_SIZE and q_bnsd.dtype != torch.float32
    # The products below are new in torch 2.8.
    if is_wide and torch.__version__ >= "2.8":
        return attention_by_products(q_bnsd, k_bnsd, v_bnsd)
    return F.scaled_dot_product_attention(q_bnsd, k_bnsd, v_bnsd)


def attention_by_products(q_bnsd: Tensor, k_bnsd: Tensor, v_bnsd: Tensor) -> Tensor:
    """Return ``scaled_dot_product_attention(q, k, v)`` [B, N, S, D], with the scores of some rows held in float32."""
    tokens, size = k_bnsd.shape[-2:]
    rows = max(1, _SCORES // tokens)
    out_bnsd = torch.empty_like(q_bnsd, memory_format=torch.contiguous_format)
    heads = (x.flatten(0, 1).unbind() for x in (q_bnsd * size**-0.5, k_bnsd, v_bnsd, out_bnsd))
    for q_sd, k_sd, v_sd, out_sd in zip(*heads, strict=True):
        for q_rd, out_rd in zip(q_sd.split(rows), out_sd.split(rows), strict=True):
            weights_rs = torch.softmax(_product_in_float32(q_rd, k_sd.t()), -1)
            torch.mm(weights_rs.to(v_sd.dtype), v_sd, out=out_rd)
            del weights_rs  # before the next ones are allocated
    return out_bnsd


def _product_in_float32(a_mk: Tensor, b_kn: Tensor) -> Tensor:
    if a_mk.is_cuda and a_mk.dtype != torch.float32:
        return torch.mm(a_mk, b_kn, out_dtype=torch.float32)
    return a_mk.float() @ b_kn.float()

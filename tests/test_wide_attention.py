"""Attention by two products is torch's own, however many rows of scores are held."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ernie_accel.kernels import wide_attention


def heads(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("scores", [1, 37, 100, 2**27])
@pytest.mark.parametrize("shape", [(1, 1, 37, 512), (3, 2, 20, 48)], ids=str)
def test_it_is_torchs_attention(shape: tuple[int, ...], scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_attention, "_SCORES", scores)
    q, k, v = heads(*shape)
    got = wide_attention.attention_by_products(4 * q, k, v)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(4 * q, k, v))


def test_a_projection_is_taken_as_it_lies() -> None:
    """Heads [B, N, S, D] cut out of rows [B, S, N * D] are no contiguous tensors."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in heads(2, 3, 10, 16))
    got = wide_attention.attention_by_products(q, k, v)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v))


def test_in_bfloat16_it_is_about_as_near_to_float32_as_torchs() -> None:
    q, k, v = (x.bfloat16() for x in heads(1, 1, 400, 512))
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    ways = wide_attention.attention_by_products, F.scaled_dot_product_attention
    ours, torchs = (float((way(q, k, v).float() - expected).norm()) for way in ways)
    assert ours < 1.3 * torchs  # its queries are rounded once more, after scaling

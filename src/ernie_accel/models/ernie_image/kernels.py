"""The rewritten ERNIE-Image block on the fused kernels: six launches beside the products and the attention.

`FuseKernels` installs it. What each launch computes is in ``kernels/reference.py``.
"""

from __future__ import annotations

from torch import Tensor, nn

from ernie_accel.core.undo import Undo
from ernie_accel.kernels import ops
from ernie_accel.kernels.linear import Fp8Rows
from ernie_accel.kernels.low_rank import gated, product_of, spare_columns, takes_fp8
from ernie_accel.models import on_kernels
from ernie_accel.models.ernie_image.blocks import BLOCKS, Modulation, RewrittenErnieBlock
from ernie_accel.models.on_kernels import TOKENS_MULTIPLE_OF, KernelBlock

__all__ = ["TOKENS_MULTIPLE_OF", "KernelErnieBlock", "attends_by_lengths", "install", "is_installed", "is_left_open"]


class KernelErnieBlock(KernelBlock, RewrittenErnieBlock):
    """A `RewrittenErnieBlock` on the kernels."""

    def forward(
        self,
        x_bsh: Tensor,
        cos_bs1d: Tensor,
        sin_bs1d: Tensor,
        modulation: Modulation,
        mask_b11s: Tensor | None = None,
        lengths_b: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states [B, S, H] after this block; see `RewrittenErnieBlock.forward`.

        `lengths_b`, how many tokens of each row are real, is what `mask_b11s` says, for attention by lengths; with
        both None all are.
        """
        shift_sa, scale_sa, gate_sa, shift_mlp, scale_mlp, gate_mlp = modulation
        attention, mlp, norm_sa, norm_mlp = self.self_attention, self.mlp, self.adaLN_sa_ln, self.adaLN_mlp_ln
        to_qkv, to_out = attention.get_submodule(attention.fused_name), product_of(attention.last)
        gate_up, down = mlp.get_submodule(mlp.fused_name), product_of(mlp.linear_fc2)

        rows: Tensor | Fp8Rows
        if takes_fp8(to_qkv):
            norm = (x_bsh, norm_sa.weight, scale_sa, shift_sa, norm_sa.eps)
            rows = Fp8Rows(*ops.norm_modulate_fp8(*norm, spare_columns(to_qkv)))
        else:
            rows = ops.norm_modulate(x_bsh, norm_sa.weight, scale_sa, shift_sa, norm_sa.eps)
        qkv_bs3h = to_qkv(rows)
        (norm_q, norm_k), heads = attention.norms, attention.heads
        qk = (qkv_bs3h, norm_q.weight, norm_k.weight, cos_bs1d, sin_bs1d, heads, norm_q.eps)
        padding_is_known = lengths_b is not None or mask_b11s is None
        if padding_is_known and self.has_fp8_attention:
            spare = spare_columns(to_out)
            *qkv_bsnd, scale = ops.qkv_fp8(*qk, spare)
            branch_bsh = to_out(Fp8Rows(ops.attention_fp8(*qkv_bsnd, scale, lengths_b, spare), scale))
        else:
            q_bsnd, k_bsnd = ops.qk_norm_rope(*qk)
            v_bsnd = qkv_bs3h.chunk(3, -1)[2].unflatten(-1, (heads, -1))
            if padding_is_known and self.takes_lengths:
                branch_bsh = to_out(ops.attention(q_bsnd, k_bsnd, v_bsnd, lengths_b))
            else:
                branch_bsh = to_out(attention.attend(q_bsnd, k_bsnd, v_bsnd, mask_b11s))

        add = (x_bsh, branch_bsh, gate_sa, norm_mlp.weight, scale_mlp, shift_mlp, norm_mlp.eps)
        if takes_fp8(gate_up):
            x_bsh, values, scale = ops.add_norm_modulate_fp8(*add, spare_columns(gate_up))
            rows = Fp8Rows(values, scale)
        else:
            x_bsh, rows = ops.add_norm_modulate(*add)
        spare = spare_columns(down)
        gated_rows = gated(gate_up, rows, spare, silu=False) if takes_fp8(down) else None
        if gated_rows is not None:
            rows = gated_rows
        else:
            gate_up_bs2f = gate_up(rows)
            rows = Fp8Rows(*ops.gelu_mul_fp8(gate_up_bs2f, spare)) if takes_fp8(down) else ops.gelu_mul(gate_up_bs2f)
        out_bsh: Tensor = ops.gated_add(x_bsh, down(rows), gate_mlp)
        return out_bsh


def is_left_open(transformer: nn.Module) -> bool:
    """Return whether nobody has chosen an attention backend for any block, stock or not, or by diffusers' defaults."""
    return on_kernels.is_left_open(transformer, BLOCKS, "self_attention")


def attends_by_lengths(transformer: nn.Module) -> bool:
    """Return whether all blocks attend by lengths themselves now."""
    return on_kernels.attends_by_lengths(transformer, BLOCKS)


def is_installed(transformer: nn.Module) -> bool:
    """Return whether `install` has been here."""
    return on_kernels.is_installed(transformer, BLOCKS)


def install(transformer: nn.Module, undo: Undo, attention: str | None = None) -> dict[str, str]:
    """Put the rewritten blocks of `transformer` on the kernels in place; return what could not be: path -> reason.

    `attention` is `KernelBlock.attends_in`.
    """
    return on_kernels.install(transformer, BLOCKS, RewrittenErnieBlock, KernelErnieBlock, undo, attention)

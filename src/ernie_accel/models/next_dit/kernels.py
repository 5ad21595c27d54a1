"""The block of Z-Image and Lumina 2 on the fused kernels: seven launches beside the products and the attention.

What each launch computes is in ``kernels/reference.py``.
"""

from __future__ import annotations

from torch import Tensor

from ernie_accel.kernels import ops
from ernie_accel.kernels.linear import Fp8Linear, Fp8Rows
from ernie_accel.models.next_dit.blocks import Modulation, RewrittenNextBlock
from ernie_accel.models.next_dit.positions import real
from ernie_accel.models.on_kernels import KernelBlock


class KernelNextBlock(KernelBlock, RewrittenNextBlock):
    """A `RewrittenNextBlock` on the kernels; tokens with modulations of their own run without them."""

    def modulated(self, mod_b4h: Tensor) -> Modulation:
        """Return scales and gates of what the modulation layer gives [B, 4 * H]."""
        return Modulation(*ops.scales_and_gates(mod_b4h).split(1, 1))

    def compute(
        self,
        x_bsh: Tensor,
        rope: Tensor | None,
        modulation: Modulation | None,
        mask: Tensor | None,
        lengths_b: Tensor | None,
    ) -> Tensor:
        """Return the hidden states after this block; see `RewrittenNextBlock.compute`.

        `lengths_b`, how many tokens of each row are real, is what `mask` says, for cuDNN's own attention; with both
        None all are.
        """
        if rope is None or (modulation is not None and modulation.is_per_token):
            return super().compute(x_bsh, rope, modulation, mask, lengths_b)
        if rope.is_complex():
            rope = real(rope)
        if mask is not None and mask.ndim == 2:
            mask = mask.bool()[:, None, None]
        scale_sa, gate_sa, scale_mlp, gate_mlp = (None,) * 4 if modulation is None else modulation
        norm_sa, after_sa, norm_mlp, after_mlp = self.norms
        attention, feed_forward = self.attention_part, self.parts[self.names.feed_forward]
        to_qkv, to_out = attention.get_submodule(attention.fused_name), attention.to_out[0]
        gate_up, down = (feed_forward.get_submodule(name) for name in (feed_forward.fused_name, feed_forward.taken[1]))

        rows: Tensor | Fp8Rows
        if isinstance(to_qkv, Fp8Linear):
            rows = Fp8Rows(*ops.norm_scale_fp8(x_bsh, norm_sa.weight, scale_sa, norm_sa.eps))
        else:
            rows = ops.norm_scale(x_bsh, norm_sa.weight, scale_sa, norm_sa.eps)
        qkv_bsm = to_qkv(rows)
        norm_q, norm_k, heads = attention.norm_q, attention.norm_k, attention.heads
        qk = (qkv_bsm, norm_q.weight, norm_k.weight, rope, heads, norm_q.eps)
        padding_is_known = lengths_b is not None or mask is None
        if padding_is_known and self.has_fp8_attention:
            *qkv_bsnd, scale = ops.qkv_fp8_pairs(*qk)
            branch_bsh = to_out(Fp8Rows(ops.attention_fp8(*qkv_bsnd, scale, lengths_b), scale))
        else:
            q_bsnd, k_bsnd = ops.qk_norm_rope_pairs(*qk)
            v_bsnd = qkv_bsm[..., -k_bsnd.shape[2] * k_bsnd.shape[3] :].unflatten(-1, k_bsnd.shape[2:])
            if padding_is_known and self.takes_lengths:
                branch_bsh = to_out(ops.attention(q_bsnd, k_bsnd, v_bsnd, lengths_b))
            else:
                branch_bsh = to_out(attention.attend(q_bsnd, k_bsnd, v_bsnd, mask))

        add = (x_bsh, branch_bsh, after_sa.weight, gate_sa, norm_mlp.weight, scale_mlp, norm_mlp.eps)
        if isinstance(gate_up, Fp8Linear):
            x_bsh, values, scale = ops.add_norm_scale_fp8(*add)
            rows = Fp8Rows(values, scale)
        else:
            x_bsh, rows = ops.add_norm_scale(*add)
        gate_up_bs2f = gate_up(rows)
        rows = Fp8Rows(*ops.silu_mul_fp8(gate_up_bs2f)) if isinstance(down, Fp8Linear) else ops.silu_mul(gate_up_bs2f)
        out_bsh: Tensor = ops.add_normed(x_bsh, down(rows), after_mlp.weight, gate_mlp, after_mlp.eps)
        return out_bsh

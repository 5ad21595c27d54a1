"""The block of Z-Image and Lumina 2 on the fused kernels: six launches beside the products and the attention.

What each launch computes is in ``kernels/reference.py``.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ernie_accel.kernels import ops
from ernie_accel.kernels.linear import Fp8Rows
from ernie_accel.kernels.low_rank import gated, is_bare, product_of, spare_columns, takes_fp8
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

        `lengths_b`, how many tokens of each row are real, is what `mask` says, for attention by lengths; with both
        None all are.
        """
        if rope is None or (modulation is not None and modulation.is_per_token):
            return super().compute(x_bsh, rope, modulation, mask, lengths_b)
        if rope.is_complex():
            rope = real(rope)
        if mask is not None and mask.ndim == 2:
            mask = mask.bool()[:, None, None]
        rows = self._start(x_bsh, modulation)
        x_bsh, branch_bsh = self._body(x_bsh, rows, rope, modulation, mask, lengths_b)
        after_mlp, gate_mlp = self.norms[3], None if modulation is None else modulation.gate_mlp
        out_bsh: Tensor = ops.add_normed(x_bsh, branch_bsh, after_mlp.weight, gate_mlp, after_mlp.eps)
        return out_bsh

    def run_together(
        self,
        blocks: nn.ModuleList,
        x_bsh: Tensor,
        mask: Tensor | None,
        rope: Tensor,
        condition: Tensor | None,
        lengths_b: Tensor | None,
    ) -> Tensor | None:
        """Return what `run_blocks` does; the end of each block and the start of the next are one launch.

        None if something may have to happen between them: if not all are alike, or one has hooks.
        """
        if not all(type(block) is type(self) and is_bare(block) for block in blocks):
            return None
        if rope.is_complex():
            rope = real(rope)
        chain = [cast(KernelNextBlock, block) for block in blocks]
        modulations = [block.modulation_of(condition) for block in chain]
        rows = self._start(x_bsh, modulations[0])
        for i, block in enumerate(chain):
            modulation = modulations[i]
            x_bsh, branch_bsh = block._body(x_bsh, rows, rope, modulation, mask, lengths_b)
            after, gate = block.norms[3], None if modulation is None else modulation.gate_mlp
            if i + 1 < len(chain):
                x_bsh, rows = chain[i + 1]._start_after(x_bsh, branch_bsh, after.weight, gate, modulations[i + 1])
            else:
                x_bsh = ops.add_normed(x_bsh, branch_bsh, after.weight, gate, after.eps)
        return x_bsh

    def _start(self, x_bsh: Tensor, modulation: Modulation | None) -> Tensor | Fp8Rows:
        """Return what the first product reads."""
        norm, scale = self.norms[0], None if modulation is None else modulation.scale_sa
        if self._attends_from_fp8:
            return Fp8Rows(*ops.norm_scale_fp8(x_bsh, norm.weight, scale, norm.eps, self._spare))
        plain: Tensor = ops.norm_scale(x_bsh, norm.weight, scale, norm.eps)
        return plain

    def _start_after(
        self, x_bsh: Tensor, branch_bsh: Tensor, weight_h: Tensor, gate: Tensor | None, modulation: Modulation | None
    ) -> tuple[Tensor, Tensor | Fp8Rows]:
        """Return the hidden states after the branch of the block before, and what the first product reads."""
        norm, scale = self.norms[0], None if modulation is None else modulation.scale_sa
        add = (x_bsh, branch_bsh, weight_h, gate, norm.weight, scale, norm.eps)
        if self._attends_from_fp8:
            x_bsh, *rows = ops.add_norm_scale_fp8(*add, self._spare)
            return x_bsh, Fp8Rows(*rows)
        plain: tuple[Tensor, Tensor] = ops.add_norm_scale(*add)
        return plain

    @property
    def _attends_from_fp8(self) -> bool:
        return takes_fp8(self.attention_part.fused)

    @property
    def _spare(self) -> int:
        """Columns that follow what the first product reads."""
        attention = self.attention_part
        return spare_columns(product_of(attention.get_submodule(attention.fused_name)))

    def _body(
        self,
        x_bsh: Tensor,
        rows: Tensor | Fp8Rows,
        rope: Tensor,
        modulation: Modulation | None,
        mask: Tensor | None,
        lengths_b: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states after the attention, and the branch of the feed-forward, not normed yet."""
        gate_sa, scale_mlp = (None, None) if modulation is None else (modulation.gate_sa, modulation.scale_mlp)
        _, after_sa, norm_mlp, _ = self.norms
        attention, feed_forward = self.attention_part, self.parts[self.names.feed_forward]
        to_qkv, to_out = product_of(attention.get_submodule(attention.fused_name)), product_of(attention.last)
        gate_up = feed_forward.get_submodule(feed_forward.fused_name)
        down = product_of(feed_forward.get_submodule(feed_forward.taken[1]))

        qkv_bsm = to_qkv(rows)
        (norm_q, norm_k), heads = attention.norms, attention.heads
        qk = (qkv_bsm, norm_q.weight, norm_k.weight, rope, heads, norm_q.eps)
        padding_is_known = lengths_b is not None or mask is None
        if padding_is_known and self.has_fp8_attention:
            spare = spare_columns(to_out)
            *qkv_bsnd, scale = ops.qkv_fp8_pairs(*qk, spare)
            branch_bsh = to_out(Fp8Rows(ops.attention_fp8(*qkv_bsnd, scale, lengths_b, spare), scale))
        else:
            q_bsnd, k_bsnd = ops.qk_norm_rope_pairs(*qk)
            v_bsnd = qkv_bsm[..., -k_bsnd.shape[2] * k_bsnd.shape[3] :].unflatten(-1, k_bsnd.shape[2:])
            if padding_is_known and self.takes_lengths:
                branch_bsh = to_out(ops.attention(q_bsnd, k_bsnd, v_bsnd, lengths_b))
            else:
                branch_bsh = to_out(attention.attend(q_bsnd, k_bsnd, v_bsnd, mask))

        add = (x_bsh, branch_bsh, after_sa.weight, gate_sa, norm_mlp.weight, scale_mlp, norm_mlp.eps)
        if takes_fp8(gate_up):
            x_bsh, *quantized = ops.add_norm_scale_fp8(*add, spare_columns(gate_up))
            rows = Fp8Rows(*quantized)
        else:
            x_bsh, rows = ops.add_norm_scale(*add)
        spare = spare_columns(down)
        gated_rows = gated(gate_up, rows, spare, silu=True) if takes_fp8(down) else None
        if gated_rows is not None:
            rows = gated_rows
        else:
            gate_up_bs2f = gate_up(rows)
            rows = Fp8Rows(*ops.silu_mul_fp8(gate_up_bs2f, spare)) if takes_fp8(down) else ops.silu_mul(gate_up_bs2f)
        return x_bsh, down(rows)

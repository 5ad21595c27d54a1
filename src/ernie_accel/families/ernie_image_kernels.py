"""The rewritten ERNIE-Image block on the fused kernels: six launches beside the products and the attention.

`FuseKernels` installs it. What each launch computes is in ``kernels/reference.py``.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.undo import Undo
from ernie_accel.families.ernie_image_blocks import Modulation, RewrittenErnieBlock
from ernie_accel.kernels import ops
from ernie_accel.kernels.linear import Fp8Linear, Fp8Rows


class KernelErnieBlock(RewrittenErnieBlock):
    """A `RewrittenErnieBlock` with fused layers, computed by fused kernels; its children are that block's own.

    Each product may be bfloat16 or fp8 (`Fp8Linear`); the kernel before it writes what it reads.
    With `fp8_attention` the attention between two fp8 products is in fp8, too, where no prompt is padded.
    """

    def __init__(self, block: RewrittenErnieBlock, fp8_attention: bool) -> None:
        nn.Module.__init__(self)
        self.fp8_attention = fp8_attention
        for name, child in block.named_children():
            setattr(self, name, child)

    def forward(
        self,
        x_bsh: Tensor,
        cos_bs1d: Tensor,
        sin_bs1d: Tensor,
        modulation: Modulation,
        mask_b11s: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states [B, S, H] after this block; see `RewrittenErnieBlock.forward`."""
        shift_sa, scale_sa, gate_sa, shift_mlp, scale_mlp, gate_mlp = modulation
        attention, mlp, norm_sa, norm_mlp = self.self_attention, self.mlp, self.adaLN_sa_ln, self.adaLN_mlp_ln
        to_qkv, to_out = attention.get_submodule(attention.fused_name), attention.to_out[0]
        gate_up, down = mlp.get_submodule(mlp.fused_name), mlp.linear_fc2

        rows: Tensor | Fp8Rows
        if isinstance(to_qkv, Fp8Linear):
            rows = Fp8Rows(*ops.norm_modulate_fp8(x_bsh, norm_sa.weight, scale_sa, shift_sa, norm_sa.eps))
        else:
            rows = ops.norm_modulate(x_bsh, norm_sa.weight, scale_sa, shift_sa, norm_sa.eps)
        qkv_bs3h = to_qkv(rows)
        norm_q, norm_k, heads = attention.norm_q, attention.norm_k, attention.heads
        qk = (qkv_bs3h, norm_q.weight, norm_k.weight, cos_bs1d, sin_bs1d, heads, norm_q.eps)
        if self.fp8_attention and mask_b11s is None and isinstance(to_out, Fp8Linear):
            *qkv_bsnd, scale = ops.qkv_fp8(*qk)
            branch_bsh = to_out(Fp8Rows(ops.attention_fp8(*qkv_bsnd, scale), scale))
        else:
            q_bsnd, k_bsnd = ops.qk_norm_rope(*qk)
            v_bsnd = qkv_bs3h.chunk(3, -1)[2].unflatten(-1, (heads, -1))
            branch_bsh = to_out(attention.attend(q_bsnd, k_bsnd, v_bsnd, mask_b11s))

        add = (x_bsh, branch_bsh, gate_sa, norm_mlp.weight, scale_mlp, shift_mlp, norm_mlp.eps)
        if isinstance(gate_up, Fp8Linear):
            x_bsh, values, scale = ops.add_norm_modulate_fp8(*add)
            rows = Fp8Rows(values, scale)
        else:
            x_bsh, rows = ops.add_norm_modulate(*add)
        gate_up_bs2f = gate_up(rows)
        rows = Fp8Rows(*ops.gelu_mul_fp8(gate_up_bs2f)) if isinstance(down, Fp8Linear) else ops.gelu_mul(gate_up_bs2f)
        out_bsh: Tensor = ops.gated_add(x_bsh, down(rows), gate_mlp)
        return out_bsh


def is_installed(transformer: Any) -> bool:
    """Return whether `install` has been here."""
    return any(isinstance(layer, KernelErnieBlock) for layer in transformer.layers)


def install(transformer: Any, undo: Undo, fp8_attention: bool = False) -> dict[str, str]:
    """Put the rewritten blocks of `transformer` on the kernels in place; return what could not be: path -> reason."""
    skipped = {}
    for i, block in enumerate(transformer.layers):
        apart = [part for part in block.parts.values() if part.fused is None]
        if apart:
            skipped[f"transformer.layers.{i}"] = "; ".join(str(part.why_not_fused()) for part in apart)
            continue
        undo.push(partial(transformer.layers.__setitem__, i, block))
        transformer.layers[i] = KernelErnieBlock(block, fp8_attention)
    undo.setattr(transformer, "_repeated_blocks", [*transformer._repeated_blocks, KernelErnieBlock.__name__])
    for method in ("load_lora_adapter", "add_adapter"):
        undo.setattr(transformer, method, MethodType(_refuse_lora, transformer))
    return skipped


def _refuse_lora(self: Any, *args: Any, **kwargs: Any) -> None:
    raise ErnieAccelError(
        "Cannot load a LoRA: the blocks run on fused kernels, which have no layers for it. Call "
        "ernie_accel.restore(pipe), load the LoRA, then optimize with Quantize('fp8') in place of FuseKernels()."
    )

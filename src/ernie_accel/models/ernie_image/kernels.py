"""The rewritten ERNIE-Image block on the fused kernels: six launches beside the products and the attention.

`FuseKernels` installs it. What each launch computes is in ``kernels/reference.py``.
"""

from __future__ import annotations

from functools import partial

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.stand_in import Bound
from ernie_accel.core.undo import Undo
from ernie_accel.kernels import ops
from ernie_accel.kernels.linear import Fp8Linear, Fp8Rows
from ernie_accel.models.ernie_image.architecture import Attention, attention_of, transformer_of
from ernie_accel.models.ernie_image.blocks import Modulation, RewrittenAttention, RewrittenErnieBlock
from ernie_accel.models.ernie_image.positions import LAYOUT, PaddingRule

#: With cuDNN's own attention tokens are padded to a multiple of this: for each number of tokens it plans anew, which
#: takes 35 to 65 ms on an H200. A product works on tiles of 128 rows, so the padding costs nearly nothing.
TOKENS_MULTIPLE_OF = 64


class KernelErnieBlock(RewrittenErnieBlock):
    """A `RewrittenErnieBlock` with fused layers, computed by fused kernels; its children are that block's own.

    Each product may be bfloat16 or fp8 (`Fp8Linear`); the kernel before it writes what it reads.

    Attributes:
        attention: Precision of cuDNN's own attention, "fp8" (between two fp8 products) or "bf16"; None for torch's.
    """

    def __init__(self, block: RewrittenErnieBlock, attention: str | None) -> None:
        nn.Module.__init__(self)
        self.attention = attention
        for name, child in block.named_children():
            setattr(self, name, child)

    @property
    def takes_lengths(self) -> bool:
        """Whether it needs no mask, as the attention backends are chosen now."""
        return self.has_fp8_attention or (self.attention is not None and _is_unnamed(self.self_attention))

    @property
    def has_fp8_attention(self) -> bool:
        """Whether cuDNN attends in fp8, whichever backends are chosen."""
        return self.attention == "fp8" and isinstance(self.self_attention.to_out[0], Fp8Linear)

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

        `lengths_b`, how many tokens of each row are real, is what `mask_b11s` says, for cuDNN's own attention; with
        both None all are.
        """
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
        padding_is_known = lengths_b is not None or mask_b11s is None
        if padding_is_known and self.has_fp8_attention:
            *qkv_bsnd, scale = ops.qkv_fp8(*qk)
            branch_bsh = to_out(Fp8Rows(ops.attention_fp8(*qkv_bsnd, scale, lengths_b), scale))
        else:
            q_bsnd, k_bsnd = ops.qk_norm_rope(*qk)
            v_bsnd = qkv_bs3h.chunk(3, -1)[2].unflatten(-1, (heads, -1))
            if padding_is_known and self.takes_lengths:
                branch_bsh = to_out(ops.attention(q_bsnd, k_bsnd, v_bsnd, lengths_b))
            else:
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


def is_left_open(transformer: nn.Module) -> bool:
    """Return whether nobody has chosen an attention backend for any block, stock or not, or by diffusers' defaults."""
    return all(_is_unnamed(attention_of(block)) for block in transformer_of(transformer).layers)


def calls_cudnn(transformer: nn.Module) -> bool:
    """Return whether all blocks call cuDNN's attention themselves now."""
    return _padding_rule(tuple(transformer_of(transformer).layers)).padding_input == "lengths"


def _is_unnamed(attention: Attention | RewrittenAttention) -> bool:
    default = AttentionBackendName(_AttentionBackendRegistry.get_active_backend()[0])
    chosen = getattr(attention.processor, "_attention_backend", None)  # processors of others may have no such name
    return chosen is None and default is AttentionBackendName.NATIVE


def _padding_rule(blocks: tuple[nn.Module, ...]) -> PaddingRule:
    """Return how the rows of a transformer are padded, given all its blocks.

    To a multiple only where all blocks take lengths: others would need a mask, which is slow or refused.
    In fp8 attention takes as long with lengths as without, so it needs no second plan; in bfloat16 it takes longer.
    """
    on_kernels = [block for block in blocks if isinstance(block, KernelErnieBlock)]
    if len(on_kernels) < len(blocks) or not all(block.takes_lengths for block in on_kernels):
        return PaddingRule()
    always_lengths = any(block.has_fp8_attention for block in on_kernels)
    return PaddingRule(TOKENS_MULTIPLE_OF, "lengths", always_lengths=always_lengths)


def is_installed(transformer: nn.Module) -> bool:
    """Return whether `install` has been here."""
    return any(isinstance(block, KernelErnieBlock) for block in transformer_of(transformer).layers)


def install(transformer: nn.Module, undo: Undo, attention: str | None = None) -> dict[str, str]:
    """Put the rewritten blocks of `transformer` on the kernels in place; return what could not be: path -> reason.

    `attention` is that of `KernelErnieBlock`.
    """
    model, skipped = transformer_of(transformer), {}
    for i, block in enumerate(model.layers):
        if not isinstance(block, RewrittenErnieBlock):
            skipped[f"transformer.layers.{i}"] = "it is no rewritten block"
            continue
        apart = [part for part in block.parts.values() if part.fused is None]
        if apart:
            skipped[f"transformer.layers.{i}"] = "; ".join(str(part.unfusible_reason()) for part in apart)
            continue
        undo.push(partial(model.layers.__setitem__, i, block))
        model.layers[i] = KernelErnieBlock(block, attention)
    if attention is not None:
        # These, not those in `layers` at the time: caches put others in their place while a forward lasts.
        undo.setattr(LAYOUT.required(model), "padding_rule", partial(_padding_rule, tuple(model.layers)))
    undo.setattr(model, "_repeated_blocks", [*model._repeated_blocks, KernelErnieBlock.__name__])
    for method in ("load_lora_adapter", "add_adapter"):
        undo.setattr(model, method, Bound(_refuse_lora, transformer))
    return skipped


def _refuse_lora(self: object, *args: object, **kwargs: object) -> None:
    raise ErnieAccelError(
        "Cannot load a LoRA: the blocks run on fused kernels, which have no layers for it. Call "
        "ernie_accel.restore(pipe), load the LoRA, then optimize with Quantize('fp8') in place of FuseKernels()."
    )

"""The block of Z-Image and Lumina 2 rewritten: the same numbers from fewer operations.

    to_q, to_k, to_v and gate, up as five products     two: the weights are concatenated (`FusedLinear`)
    RoPE as a product of complex numbers in float32    real ones, except on the CPU, where they round otherwise
    (in Lumina 2: in float64)

Every arithmetic operation that is left has the operands and the rounding of stock. Shapes in names: b batch, s tokens,
h hidden size, n heads, d head size, f hidden size of the feed-forward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.models.rewriting import Part, RewrittenBlock, SelfAttention


class Names(NamedTuple):
    """What a family calls the layers of its blocks.

    Attributes:
        attention: The attention.
        feed_forward: The feed-forward; like the attention, a stock module that keeps its name.
        norms: The norms before and after the attention, then before and after the feed-forward.
        others: Layers that it has besides, such as that of the modulation.
    """

    attention: str
    feed_forward: str
    norms: tuple[str, str, str, str]
    others: tuple[str, ...] = ()


class Modulation(NamedTuple):
    """Scales (one is added already) and gates (through tanh) [B, 1 or S, H] of the attention, then of the MLP."""

    scale_sa: Tensor
    gate_sa: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor

    @property
    def is_per_token(self) -> bool:
        """Whether the tokens of a row have modulations of their own."""
        return self.scale_sa.shape[1] != 1


class RewrittenAttention(SelfAttention):
    """Self-attention over [B, S, H]."""

    def forward(self, x_bsh: Tensor, rope: Tensor | None, mask: Tensor | None) -> Tensor:
        q_bsnd, k_bsnd, v_bsnd = self.project(x_bsh)
        norm_q, norm_k = self.norms
        q_bsnd, k_bsnd = norm_q(q_bsnd), norm_k(k_bsnd)
        if rope is not None:
            q_bsnd, k_bsnd = rotate(q_bsnd, rope), rotate(k_bsnd, rope)
        return self.last(self.attend(q_bsnd, k_bsnd, v_bsnd, mask))  # type: ignore[no-any-return]


class RewrittenFeedForward(Part):
    """down(silu(gate(x)) * up(x)) over [B, S, H]; `taken` are gate, down and up."""

    def forward(self, x_bsh: Tensor) -> Tensor:
        gate, down, up = self.taken
        if self.fused is not None:
            gate_bsf, up_bsf = self.fused(x_bsh).chunk(2, -1)
        else:
            gate_bsf, up_bsf = self.get_submodule(gate)(x_bsh), self.get_submodule(up)(x_bsh)
        # On the CPU torch may round otherwise over a view; compiled, the copy is no operation of its own.
        out_bsh: Tensor = self.get_submodule(down)(F.silu(gate_bsf.contiguous()) * up_bsf)
        return out_bsh


class RewrittenNextBlock(RewrittenBlock, ABC):
    """One block over [B, S, H]: the stock block's layers under the stock names.

    Class-level facts:
        names: Of its layers.
        attention_class: Takes over the attention.
        feed_forward_class: Takes over the feed-forward.
    """

    names: ClassVar[Names]
    attention_class: ClassVar[type[RewrittenAttention]] = RewrittenAttention
    feed_forward_class: ClassVar[type[RewrittenFeedForward]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "names" in vars(cls):
            cls.part_names = (cls.names.attention, cls.names.feed_forward)

    def __init__(self, stock: nn.Module) -> None:
        super().__init__(stock)
        names = self.names
        for name, child in stock.named_children():
            if name == names.attention:
                self.add_module(name, self.attention_class(child))
            elif name == names.feed_forward:
                self.add_module(name, self.feed_forward_class(child))
            elif name in names.norms or name in names.others:
                self.add_module(name, child)

    @property
    def norms(self) -> tuple[Any, ...]:
        """The four norms, in the order of `Names.norms`: diffusers' ``RMSNorm``, or what stands in for one."""
        return (self.first_norm(), *(self.get_submodule(name) for name in self.names.norms[1:]))

    def first_norm(self) -> nn.Module:
        """Return the norm before the attention."""
        return self.get_submodule(self.names.norms[0])

    @abstractmethod
    def modulation_of(self, condition: Tensor | None) -> Modulation | None:
        """Return the modulation by what the family's blocks take, the embedded time; None for a block without."""

    def run_together(
        self,
        blocks: nn.ModuleList,
        x_bsh: Tensor,
        mask: Tensor | None,
        rope: Tensor,
        condition: Tensor | None,
        lengths_b: Tensor | None,
    ) -> Tensor | None:
        """Return what `run_blocks` does with blocks of which this is the first; None: one after the other."""
        return None

    def modulated(self, mod_b4h: Tensor) -> Modulation:
        """Return scales and gates of what the modulation layer gives [B, 4 * H]."""
        scale_sa, gate_sa, scale_mlp, gate_mlp = mod_b4h.unsqueeze(1).chunk(4, -1)
        return Modulation(1 + scale_sa, gate_sa.tanh(), 1 + scale_mlp, gate_mlp.tanh())

    def compute(
        self,
        x_bsh: Tensor,
        rope: Tensor | None,
        modulation: Modulation | None,
        mask: Tensor | None,
        lengths_b: Tensor | None,
    ) -> Tensor:
        """Return the hidden states after this block.

        Args:
            x_bsh: Hidden states [B, S, H].
            rope: RoPE table, in one of the forms of `Position`.
            modulation: None for a block without.
            mask: True where a token is real, [B, 1, 1, S] or [B, S]; None if all are, or if `lengths_b` says it.
            lengths_b: Real tokens of each row, for blocks that need no mask (not for these).
        """
        norm_sa, norm_after_sa, norm_mlp, norm_after_mlp = self.norms
        attention, feed_forward = self.attention_part, self.get_submodule(self.names.feed_forward)
        if mask is not None and mask.ndim == 2:
            mask = mask.bool()[:, None, None]
        if modulation is None:
            x_bsh = x_bsh + norm_after_sa(attention(norm_sa(x_bsh), rope, mask))
            return x_bsh + norm_after_mlp(feed_forward(norm_mlp(x_bsh)))  # type: ignore[no-any-return]
        scale_sa, gate_sa, scale_mlp, gate_mlp = modulation
        x_bsh = x_bsh + gate_sa * norm_after_sa(attention(norm_sa(x_bsh) * scale_sa, rope, mask))
        return x_bsh + gate_mlp * norm_after_mlp(feed_forward(norm_mlp(x_bsh) * scale_mlp))  # type: ignore[no-any-return]


class _OriginalFeedForward(RewrittenFeedForward):
    taken = ("w1", "w2", "w3")
    fusible = ("w1", "w3")
    fused_name = "w13"


class RewrittenOriginalBlock(RewrittenNextBlock, ABC):
    """A block whose layers have the names of the original NextDiT code, as Z-Image's and NewBie-image's own have."""

    names = Names(
        "attention",
        "feed_forward",
        ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"),
        ("adaLN_modulation",),
    )
    feed_forward_class = _OriginalFeedForward

    def modulation_of(self, condition: Tensor | None) -> Modulation | None:
        """Return the modulation by the embedded time [B, E]; None for a block without."""
        layer = self._modules.get("adaLN_modulation")
        return None if layer is None else self.modulated(layer(condition))


def run_blocks(
    blocks: nn.ModuleList,
    x_bsh: Tensor,
    mask: Tensor | None,
    rope: Tensor,
    condition: Tensor | None = None,
    lengths_b: Tensor | None = None,
) -> Tensor:
    """Return the hidden states after all of `blocks`.

    Args:
        blocks: Rewritten blocks of one family, or what stands in for them.
        x_bsh: Hidden states [B, S, H].
        mask: See `RewrittenNextBlock.compute`, as for the others.
        rope: RoPE table.
        condition: The embedded time; None for blocks without modulation.
        lengths_b: Real tokens of each row.
    """
    first = blocks[0] if len(blocks) else None
    if isinstance(first, RewrittenNextBlock):
        out_bsh = first.run_together(blocks, x_bsh, mask, rope, condition, lengths_b)
        if out_bsh is not None:
            return out_bsh
    for block in blocks:
        x_bsh = block(x_bsh, mask, rope, condition, lengths_b=lengths_b)
    return x_bsh


def rotate(x_bsnd: Tensor, rope: Tensor) -> Tensor:
    """Return `x_bsnd` rotated by RoPE: dimensions 2 i and 2 i + 1 belong together.

    Args:
        x_bsnd: Queries or keys.
        rope: In one of the forms of `Position`.
    """
    if rope.is_complex():
        pairs = torch.view_as_complex(x_bsnd.float().reshape(*x_bsnd.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rope[:, :, None]).flatten(3).type_as(x_bsnd)
    cos_bs1p, sin_bs1p = rope.unbind(0)
    even, odd = x_bsnd.float().reshape(*x_bsnd.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack((even * cos_bs1p - odd * sin_bs1p, even * sin_bs1p + odd * cos_bs1p), -1)
    return rotated.flatten(3).type_as(x_bsnd)

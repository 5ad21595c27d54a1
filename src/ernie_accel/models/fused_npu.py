"""Ascend's fused attention with a mask that was prepared once for all blocks.

In every layer, the "npu" backend of diffusers checks whether a mask masks anything, which waits for the device, then
expands and inverts it. A mask from `ExpandAttentionMask` needs none of that.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ernie_accel.common.notes import Note


@dataclass(frozen=True)
class KernelMask:
    """What the fused kernel takes instead of a mask.

    Attributes:
        masked_out_b1ss: [B, 1, S, S], True where masked out; None if nothing is.
    """

    masked_out_b1ss: Tensor | None


KERNEL_MASK = Note("kernel_mask", KernelMask, "tensor", "what Ascend's fused kernel takes in the place of this mask")


def prepared(attended_b1ss: Tensor, pads: bool) -> Tensor:
    """Return a mask, True where attended, that carries what the fused kernel takes instead of it.

    Args:
        attended_b1ss: [B, 1, S, S].
        pads: Whether it masks anything; if not, the kernel gets no mask, and else the inverse: True masked out.
    """
    KERNEL_MASK.put(attended_b1ss, KernelMask(~attended_b1ss if pads else None))
    return attended_b1ss


def with_prepared_masks(processor: object) -> Any:
    """Return a copy of a processor whose calls to diffusers' dispatcher take a prepared mask straight to the kernel."""
    cls: object = type(processor)
    made: object = object.__new__(_prepared_class(cls))  # copy.copy would leave its notes on the class
    vars(made).update(vars(processor))
    return made


@functools.cache  # one class for all blocks: torch.compile would compile each class anew
def _prepared_class(cls: Any) -> type:
    """Return a subclass of a processor class that runs its code with another function for `dispatch_attention_fn`.

    The code is the stock one over a copy of its names, so neither the class nor diffusers' module is changed.
    """
    stock = cls.__call__
    names = {**stock.__globals__, "dispatch_attention_fn": attend}
    call = FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__)
    call.__kwdefaults__, call.__annotations__ = stock.__kwdefaults__, stock.__annotations__
    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    parallel_config: object = None,
    **kwargs: object,
) -> Tensor:
    """Attend as diffusers' ``dispatch_attention_fn`` does; a prepared mask reaches the fused kernel as it is.

    Args:
        query: [B, S, N, D].
        key: [B, S, N, D].
        value: [B, S, N, D].
        attn_mask: [B, 1, S, S], True where attended; made by `prepared`, or any that diffusers takes.
        dropout_p: Probability of dropping a weight.
        is_causal: Not with a prepared mask.
        scale: Of the scores; None: 1 / sqrt(D).
        parallel_config: Not with a prepared mask.
        **kwargs: What else the dispatcher takes.

    Returns:
        [B, S, N, D].
    """
    found = None if torch.compiler.is_compiling() else KERNEL_MASK.of(attn_mask)
    if found is None or is_causal or parallel_config is not None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        stock: Tensor = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            parallel_config=parallel_config,
            **kwargs,
        )
        return stock
    from torch_npu import npu_fusion_attention

    out: Tensor = npu_fusion_attention(
        query,
        key,
        value,
        query.size(2),
        atten_mask=found.masked_out_b1ss,
        input_layout="BSND",
        pse=None,
        scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
        pre_tockens=65536,
        next_tockens=65536,
        keep_prob=1.0 - dropout_p,
        sync=False,
        inner_precise=0,
    )[0]
    return out

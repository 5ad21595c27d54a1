"""Lumina 2's attention through diffusers' dispatcher, which its own processor bypasses: any kernel, any mask."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


class DispatchedProcessor:
    """Stands in for ``Lumina2AttnProcessor2_0``; takes masks of any shape that its kernel takes.

    The signature is the stock one, because attention modules pass a processor only what its signature names.
    """

    _attention_backend: object = None
    _parallel_config: object = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:
        """Return attention [B, S, H] of `hidden_states` [B, S, H] over `encoder_hidden_states` [B, S, H].

        Args:
            attn: The attention module.
            hidden_states: What attends.
            encoder_hidden_states: What is attended to.
            attention_mask: [B, S] or [B, 1, 1 or S, S], nonzero where attended.
            image_rotary_emb: Complex rotations.
            base_sequence_length: For attention in proportion to the length.
        """
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from diffusers.models.embeddings import apply_rotary_emb

        q_bshd = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        head_dim = q_bshd.shape[-1]
        k_bshd = attn.to_k(encoder_hidden_states).unflatten(-1, (-1, head_dim))
        v_bshd = attn.to_v(encoder_hidden_states).unflatten(-1, (-1, head_dim))
        dtype = q_bshd.dtype
        if attn.norm_q is not None:
            q_bshd = attn.norm_q(q_bshd)
        if attn.norm_k is not None:
            k_bshd = attn.norm_k(k_bshd)
        if image_rotary_emb is not None:
            q_bshd = apply_rotary_emb(q_bshd, image_rotary_emb, use_real=False)
            k_bshd = apply_rotary_emb(k_bshd, image_rotary_emb, use_real=False)
        q_bshd, k_bshd = q_bshd.to(dtype), k_bshd.to(dtype)
        queries_per_key = attn.heads // k_bshd.shape[2]
        k_bshd = k_bshd.repeat_interleave(queries_per_key, dim=2)
        v_bshd = v_bshd.repeat_interleave(queries_per_key, dim=2)
        scale = attn.scale
        if base_sequence_length is not None:
            scale *= math.sqrt(math.log(hidden_states.shape[1], base_sequence_length))
        if attention_mask is not None:
            attention_mask = attention_mask.bool()  # of a bool mask this is the mask itself
            if attention_mask.ndim == 2:
                attention_mask = attention_mask[:, None, None, :]
        out_bshd = dispatch_attention_fn(
            q_bshd,
            k_bshd,
            v_bshd,
            attn_mask=attention_mask,
            scale=scale,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        projection, dropout = attn.to_out
        out_bsh: Tensor = dropout(projection(out_bshd.flatten(2, 3).type_as(q_bshd)))
        return out_bsh

"""What decoding reads and writes at every step. Shapes in names: see ``decoder.py``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class DecodeState:
    """What a step reads and writes, all of it on the device.

    Attributes:
        ids_bt: The prompts, padded on the right.
        token_b: The last token of each row; its key and value are not in the cache yet.
        position_b: Its position.
        step_1: How many tokens have been chosen.
        done_b: Whether the row has ended.
        chosen_bt: The tokens chosen so far.
        draws_bt: A random number for each of them.
        keys_lbnpd: Rotated keys of all positions before.
        values_lbnpd: Their values.
        cos_pd: Rotary cosines of all positions.
        sin_pd: Sines.
        q_scale_p: Factor of the queries at each position.
    """

    ids_bt: Tensor
    token_b: Tensor
    position_b: Tensor
    step_1: Tensor
    done_b: Tensor
    chosen_bt: Tensor
    draws_bt: Tensor
    keys_lbnpd: Tensor
    values_lbnpd: Tensor
    cos_pd: Tensor
    sin_pd: Tensor
    q_scale_p: Tensor

    @property
    def capacity(self) -> int:
        """Positions that the cache has room for."""
        return self.keys_lbnpd.shape[3]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values; the rest is negligible."""
        return 2 * self.keys_lbnpd.numel() * self.keys_lbnpd.element_size()

    def take_over(self, other: DecodeState) -> None:
        """Continue, in place, from a state with as many rows and a smaller cache; `draws_bt` is not copied."""
        for name in ("token_b", "position_b", "step_1", "done_b"):
            getattr(self, name).copy_(getattr(other, name))
        self.chosen_bt[:, : other.capacity] = other.chosen_bt
        for name in ("keys_lbnpd", "values_lbnpd"):
            getattr(self, name)[:, :, :, : other.capacity] = getattr(other, name)

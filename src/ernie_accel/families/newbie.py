"""NewBie-image: a NextDiT in the manner of Lumina 2, run in diffusers by its Lumina 2 transformer."""

from __future__ import annotations

from types import MappingProxyType

from ernie_accel.families.family import CallSettings, Family

NEWBIE = Family(
    name="NewBie-image",
    transformer_classes=("Lumina2Transformer2DModel",),
    modes=MappingProxyType({"quality": CallSettings(28, None, "the authors' guides name 20 to 28 steps")}),
    size_multiple=16,
    sizes=((1024, 1024),),
    keep_precise=MappingProxyType(
        {
            "transformer": (
                r"x_embedder\b",
                r"time_caption_embed\b",
                r"norm_out\b",
                r".*norm1\.linear\b",
            ),
        }
    ),
)

"""A family: what FLUX.1 needs for the presets to know its steps and what must stay precise."""

from __future__ import annotations

from ernie_accel.families import CallSettings, Family

FLUX = Family(
    name="FLUX.1",
    transformer_classes=("FluxTransformer2DModel",),
    modes={
        "turbo": CallSettings(4, 0.0, "the model card of FLUX.1-schnell"),
        "quality": CallSettings(50, 3.5, "the model card of FLUX.1-dev"),
    },
    size_multiple=16,
    sizes=((1024, 1024), (1360, 768)),
    keep_precise={
        "transformer": (r"x_embedder\b", r"context_embedder\b", r"proj_out\b", r".*norm", r"time_text_embed\b")
    },
    text_argument="encoder_hidden_states",
)

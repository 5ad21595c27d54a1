"""The shape of what is known of one architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CallSettings:
    """Arguments a pipeline should be called with, for one way of using it.

    Attributes:
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance (for a distilled checkpoint the family's own value for "none"); None
            leaves the pipe's default.
        source: Where the values come from.
    """

    num_inference_steps: int
    guidance_scale: float | None
    source: str


@dataclass(frozen=True)
class Family:
    """What is known of one architecture.

    Attributes:
        name: As its authors write it.
        transformer_classes: Class names of its denoiser in diffusers.
        modes: Call settings by mode: "turbo" for the distilled checkpoint, "quality" for the base one.
        size_multiple: Width and height must be divisible by this, in pixels.
        sizes: Recommended (width, height) in pixels.
        keep_precise: Regular expressions of the linear layers of each component that quantization leaves out, found
            by the field by breaking them. They match from the start of the module path.
        max_prompt_tokens: What the tokenizer accepts.
        encodes_one_by_one: Whether the stock pipeline runs its causal text encoder once for each prompt of a batch.
        rewritten: Name of the module with its rewritten blocks (see ``RewriteBlocks``), or None.
        kernels: Name of the module with its blocks on fused kernels (see ``FuseKernels``), or None.
    """

    name: str
    transformer_classes: tuple[str, ...]
    modes: Mapping[str, CallSettings]
    size_multiple: int
    sizes: tuple[tuple[int, int], ...]
    keep_precise: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    max_prompt_tokens: int | None = None
    encodes_one_by_one: bool = False
    rewritten: str | None = None
    kernels: str | None = None

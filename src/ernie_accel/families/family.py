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
class Shape:
    """What a denoiser looks like from outside, for duck typing: forks and remote code rename the class.

    Attributes:
        modules: Names of child modules, all of which it has.
        config: Names of settings, all of which its config has, and not as None.
    """

    modules: tuple[str, ...]
    config: tuple[str, ...]

    def fits(self, transformer: object) -> bool:
        """Return whether `transformer` has all of these."""
        config = getattr(transformer, "config", None) or {}
        return all(hasattr(transformer, name) for name in self.modules) and all(
            _setting(config, name) is not None for name in self.config
        )


def _setting(config: object, name: str) -> object:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


@dataclass(frozen=True)
class Family:
    """What is known of one architecture.

    Attributes:
        name: As its authors write it.
        transformer_classes: Class names of its denoiser in diffusers.
        shape: What tells a denoiser of this architecture under another class name; None where nothing does.
        modes: Call settings by mode: "turbo" for the distilled checkpoint, "quality" for the base one.
        size_multiple: Width and height must be divisible by this, in pixels.
        sizes: Recommended (width, height) in pixels.
        keep_precise: Regular expressions of the linear layers of each component that quantization leaves out, found
            by the field by breaking them. They match from the start of the module path.
        schedulers: Names for `SwapScheduler` that its authors recommend, the first one first; empty where they ship
            the scheduler they mean.
        weight_bytes: Bytes of each component of the published bfloat16 checkpoint, for planning without a pipe.
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
    shape: Shape | None = None
    schedulers: tuple[str, ...] = ()
    weight_bytes: Mapping[str, int] = field(default_factory=dict)
    max_prompt_tokens: int | None = None
    encodes_one_by_one: bool = False
    rewritten: str | None = None
    kernels: str | None = None

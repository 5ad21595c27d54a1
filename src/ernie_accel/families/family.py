"""The form in which the facts about an architecture are written down."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ernie_accel.common.language import said


@dataclass(frozen=True)
class CallSettings:
    """Arguments a pipeline should be called with, for one way of using it.

    Attributes:
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance (for a distilled checkpoint the family's own value for "none"); None
            leaves the pipe's default.
        source: Where the values come from.
        highest_guidance: Above it, pictures can show a grid (`fidelity.grid_score`); None: not known to.
    """

    num_inference_steps: int
    guidance_scale: float | None
    source: str
    highest_guidance: float | None = None


@dataclass(frozen=True)
class AlwaysMasks:
    """How a transformer that builds an attention mask for every forward learns what is padded.

    Attributes:
        lengths: Argument of its forward: tokens of each prompt [B].
        text: Argument of its forward: the padded text [B, T, H].
        pad_method: Method of the pipeline that makes both out of a list of [T, H], and so knows the lengths.
    """

    lengths: str
    text: str
    pad_method: str


@dataclass(frozen=True)
class PromptEncoding:
    """How a pipeline uses its text encoder.

    Attributes:
        layers: Attribute path of the encoder's layers, or several, of which the first that it has counts; the last
            layer's result is not used.
        hidden_state: Which of ``hidden_states`` conditions the picture.
        unused: Attribute paths of parts that encoding a prompt never runs.
        methods: Methods that encode a list of texts, their first argument; the first that the pipeline has counts.
            Empty for a pipeline whose ``encode_prompt`` encodes prompts one by one.
        encoders: Components that take part.
        beside: Other methods that encode the same texts, each with the component and the tokenizer that it uses
            (method, component, tokenizer); those that the pipeline has count.
        guided_above: Negative prompts are encoded, too, if the guidance scale is above this.
    """

    layers: str | tuple[str, ...]
    hidden_state: int
    unused: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ("text_encoder",)
    beside: tuple[tuple[str, str, str], ...] = ()
    guided_above: float = 1.0

    def layers_of(self, text_encoder: object) -> str | None:
        """Return the path of the layers in `text_encoder`, or None if it has none of the known ones."""
        for path in (self.layers,) if isinstance(self.layers, str) else self.layers:
            part: object = text_encoder
            for name in path.split("."):
                part = getattr(part, name, None)
            if part is not None:
                return path
        return None

    def beside_on(self, pipe: object) -> list[tuple[str, str, str]]:
        """Return those of `beside` that `pipe` has, with the component and the tokenizer."""
        return [
            each
            for each in self.beside
            if callable(getattr(type(pipe), each[0], None))
            and all(getattr(pipe, part, None) is not None for part in each[1:])
        ]

    def method_of(self, pipe: object) -> str | None:
        """Return the method that encodes a list of texts, or None where prompts are encoded one by one."""
        return next((name for name in self.methods if callable(getattr(type(pipe), name, None))), None)


@dataclass(frozen=True)
class PromptEnhancement:
    """How a pipeline has a language model write longer prompts, one by one.

    Attributes:
        model: Component that writes.
        tokenizer: Component with its tokenizer and chat template.
        method: Method of the pipeline that enhances one prompt.
        switch: Argument of the pipeline's call that turns it on and off.
    """

    model: str
    tokenizer: str
    method: str
    switch: str


@dataclass(frozen=True)
class SingleFileNames:
    """How single files of a denoiser, as ComfyUI keeps them, name what diffusers names otherwise.

    Attributes:
        renamed: Pairs of a regular expression and what takes its place (``re.sub``), applied in this order.
        fused: A layer of the file, by its path within a block -> the layers that its rows belong to, in their order.
        unused: Tensors of the file that the denoiser never uses.
    """

    renamed: tuple[tuple[str, str], ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class GuidanceCalls:
    """How a pipeline guides that calls its transformer twice a step, with the prompt and with the negative one.

    Attributes:
        prompt: Arguments of the transformer's forward that hold an encoded prompt, tensors [B, T, ...] each; those that
            it has count. All others are the same in both calls.
        method: Method of the pipeline that returns these for the prompt, and then for the negative one.
    """

    prompt: tuple[str, ...]
    method: str

    def prompt_of(self, transformer: object) -> tuple[str, ...]:
        """Return those of `prompt` that the forward of `transformer` takes."""
        takes = inspect.signature(type(transformer).forward).parameters  # type: ignore[attr-defined]
        return tuple(name for name in self.prompt if name in takes)


@dataclass(frozen=True)
class Shape:
    """What a denoiser looks like from outside, for duck typing, because forks and remote code rename the class.

    Attributes:
        modules: Names of child modules, all of which it has.
        config: Names of settings, all of which its config has, and not as None.
    """

    modules: tuple[str, ...]
    config: tuple[str, ...] = ()

    def fits(self, transformer: object) -> bool:
        """Return whether `transformer` has all of these."""
        config = getattr(transformer, "config", None) or {}
        named = all(hasattr(transformer, name) for name in self.modules)
        return named and all(_setting(config, name) is not None for name in self.config)


def _setting(config: object, name: str) -> object:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


@dataclass(frozen=True)
class Family:
    """What is known of one architecture.

    Attributes:
        name: As its authors write it.
        transformer_classes: Class names of its denoiser in diffusers.
        shape: What identifies a denoiser of this architecture under another class name; None if nothing does.
        modes: Call settings by mode: "turbo" for the distilled checkpoint, "quality" for the base one.
        size_multiple: Width and height must be divisible by this, in pixels.
        sizes: Recommended (width, height) in pixels.
        keep_precise: Regular expressions of the linear layers of each component that quantization leaves out, found in
            practice, by breaking them. They match from the start of the module path.
        schedulers: Names for `SwapScheduler` that its authors recommend, the first one first; empty where they ship
            the scheduler they mean.
        weight_bytes: Bytes of each component of the published bfloat16 checkpoint, for planning without a pipe.
        max_prompt_tokens: What the tokenizer accepts.
        rewritten: Its rewritten blocks for ``RewriteBlocks``: a `RewrittenModel` (``models/rewritten.py``), or the name
            of a module that is one, or "module:attribute"; None if there are none.
        kernels: Its blocks on fused kernels for ``FuseKernels``: a `KernelModel`, likewise.
        repeated_blocks: Class names of the repeated blocks, where the transformer's class does not declare them
            (``_repeated_blocks``).
        dispatched: Class name of an attention processor that bypasses diffusers' dispatcher -> "module:class" of one
            that goes through it.
        forward_inputs: Function (or "module:function") that returns arguments of the transformer's forward without
            values, given (transformer, rows, width, height, tokens); None: what a step needs cannot be worked out.
        encode_pictures: Function (or "module:function") that returns latents [B, C, H, W] of pictures [B, 3, H, W] in
            [-1, 1], on their device, in the dtype in which the pipeline draws its noise, given (pipe, pictures); None:
            pictures cannot be edited.
        text_argument: Argument of the transformer's forward that holds the encoded prompts, [B, T, H] or a
            list of [T, H].
        guidance_calls: Set where the pipeline calls the transformer once for each half of guidance.
        prompt_encoding: How its pipelines encode prompts; None where nothing is to be gained, or nothing is known.
        prompt_enhancement: Set where the pipeline can have a language model rewrite prompts.
        always_masks: Set where stock diffusers builds a mask also for batches in which nothing is padded.
        single_file: What single files of the denoiser name otherwise than diffusers, for ``load(transformer=)``; None:
            nothing.
        vae_dtypes: Class name of a pipeline -> dtype that its calls give the VAE pictures in, whatever its weights are.
        reads_timesteps: Whether the pipeline reads every timestep on the host, and so waits for the device.
        other_codes: The same architecture as code outside of diffusers writes it, with what is known of that code. Each
            has a shape; what is rewritten is the very class in `transformer_classes`.
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
    rewritten: object | None = None
    kernels: object | None = None
    repeated_blocks: tuple[str, ...] = ()
    dispatched: Mapping[str, str] = field(default_factory=dict)
    forward_inputs: object | None = None
    encode_pictures: object | None = None
    text_argument: str | None = None
    always_masks: AlwaysMasks | None = None
    guidance_calls: GuidanceCalls | None = None
    prompt_encoding: PromptEncoding | None = None
    prompt_enhancement: PromptEnhancement | None = None
    single_file: SingleFileNames | None = None
    vae_dtypes: Mapping[str, str] = field(default_factory=dict)
    reads_timesteps: bool = False
    other_codes: tuple[Family, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether this is a real family; `UNKNOWN` is not."""
        return True

    def name_for(self, pipe: object) -> str:
        """Return what messages call the architecture of `pipe`: the family's name, or the pipe's class."""
        return self.name

    def of_other_code(self) -> Family:
        """Return what is known of a denoiser that has the shape, but not the class whose code was rewritten."""
        return replace(self, rewritten=None, kernels=None) if self.rewritten or self.kernels else self

    def unknown_reasons(self, pipe: object, why: str) -> list[str]:
        """Return the reason why facts that depend on the family are missing for `pipe`; empty for a known family.

        Args:
            pipe: The pipe that is asked about.
            why: The second half of the sentence: "blocks are rewritten family by family".
        """
        return []


@dataclass(frozen=True)
class _UnknownFamily(Family):
    @property
    def is_known(self) -> bool:
        return False

    def name_for(self, pipe: object) -> str:
        return type(pipe).__name__

    def unknown_reasons(self, pipe: object, why: str) -> list[str]:
        return [said("{pipe} is of no known family, and {why}", pipe=type(pipe).__name__, why=why)]


#: The family of every pipe that no other one fits: nothing is left precise, rewritten, enhanced or masked for it, it
#: has no modes and no sizes. Transforms ask it like any other.
UNKNOWN: Family = _UnknownFamily(
    name="unknown", transformer_classes=(), modes=MappingProxyType({}), size_multiple=1, sizes=()
)

"""The rows of the matrix, and the tiny pipelines that they are applied to."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import ernie_accel
from ernie_accel import (
    BatchGuidance,
    CallDefaults,
    CaptureGraphs,
    CastDtype,
    Compile,
    Context,
    KeepTimestepsOnHost,
    MakeContiguous,
    Plan,
    Quantize,
    RewriteBlocks,
    SwapScheduler,
    Transform,
    Warmup,
)
from ernie_accel.core import context
from ernie_accel.core.outputs import images_of
from tests import pipelines
from tests.examples import ELSEWHERE, EXAMPLES, TINY_LORA, make_awkward
from tests.own_newbie import tiny_own_newbie
from tests.test_captured import Frozen
from tests.z_image_pipes import Z_IMAGE_PIPES

#: The class of each pipeline that diffusers draws with Z-Image beside the one from text.
BESIDE_Z_IMAGE = {
    "z_image from a picture": "ZImageImg2ImgPipeline",
    "z_image within a mask": "ZImageInpaintPipeline",
    "z_image controlled": "ZImageControlNetPipeline",
    "z_image controlled within a mask": "ZImageControlNetInpaintPipeline",
    "z_image omni": "ZImageOmniPipeline",
}
#: Those of them that begin between noise and the picture.
STRENGTH = ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
#: Tiny pipelines by name: of every family, of an unknown one, with a UNet, and with two transformers.
PIPES: dict[str, Callable[[], Any]] = pipelines.PIPELINES | {"sd": pipelines.tiny_sd, "wan": pipelines.tiny_wan}
#: Those that have a table of their own: Z-Image's, and NewBie-image in the manner of its authors' code.
OTHERS: dict[str, Callable[[], Any]] = {
    **{family: Z_IMAGE_PIPES[cls][0] for family, cls in BESIDE_Z_IMAGE.items()},
    "own_newbie": tiny_own_newbie,
}

TITLES = {
    "ernie": "ERNIE-Image",
    "z_image": "Z-Image",
    "lumina2": "Lumina 2",
    "newbie": "NewBie-image",
    "own_newbie": "NewBie-image, its authors' code",
    "flux": "FLUX.1",
    "sd": "Stable Diffusion",
    "wan": "Wan 2.2",
    "z_image from a picture": "Z-Image img2img",
    "z_image within a mask": "Z-Image inpaint",
    "z_image controlled": "Z-Image ControlNet",
    "z_image controlled within a mask": "Z-Image ControlNet inpaint",
    "z_image omni": "Z-Image Omni",
}
#: What calls leave to the pipe where a row changes its defaults.
LEFT_TO_DEFAULTS = ("num_inference_steps", "guidance_scale")
PROMPT = "a big red circle on a small blue square on red"  # longer than what is kept of it

#: A machine with a GPU, to plan for; what it would do without one is done here as well.
H200 = Context("cuda", "NVIDIA H200", (9, 0))


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the matrix: transforms, or a preset.

    Attributes:
        name: The call's arguments, as a reader would write them.
        transforms: What is applied.
        preset: The name of a preset instead.
        context: The machine to plan for; default this one.
        gpu: Why it needs a GPU and is only planned here; empty if it runs.
    """

    name: str
    transforms: tuple[Transform, ...] = ()
    preset: str | None = None
    context: Context | None = None
    gpu: str = ""

    @property
    def enhances(self) -> bool:
        """Whether prompts are to be enhanced: where this is its own row, as it takes time."""
        return bool(self.transforms) and self.has("RewriteEnhancer")

    @property
    def awkward(self) -> bool:
        """Whether it has nothing to do but on weights in an awkward layout."""
        return self.transforms == (MakeContiguous(),)

    @property
    def traced(self) -> bool:
        return not self.preset and len(self.transforms) == 1 and (self.has("Compile") or self.has("CompileVae"))

    @property
    def all_transforms(self) -> tuple[Transform, ...]:
        return ernie_accel.presets[self.preset].transforms if self.preset else self.transforms

    def has(self, name: str) -> bool:
        return any(type(each).__name__ == name for each in (*self.all_transforms, *self.transforms))

    def plan(self, pipe: Any) -> Plan:
        return ernie_accel.plan(pipe, *self.transforms, preset=self.preset, context=self.context)

    def optimize(self, pipe: Any) -> Any:
        skip: Any = "skip" if self.preset else "error"
        return ernie_accel.optimize(
            pipe, *self.transforms, preset=self.preset, context=self.context, on_unsupported=skip
        )

    @contextlib.contextmanager
    def simulated(self) -> Iterator[None]:
        """Let graphs be captured by a stand-in for CUDA, nothing be compiled, and default calls be short.

        Compiled code would differ from eager code by rounding alone, and take seconds for each cell. `Compile` is
        traced in a row of its own, which finds what it cannot trace; elsewhere its blocks run eagerly.
        """
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as backends

        eager, backend = functools.partial(torch.compile, backend="eager"), backends._active_backend
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch("ernie_accel.models.replays.capture_cuda", Frozen()))
            stack.enter_context(mock.patch("torch.compile", eager))
            if self.traced:  # cells may go on with the traces of those before
                stack.enter_context(torch._dynamo.config.patch(accumulated_recompile_limit=4096))
            else:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(mock.patch("ernie_accel.core.context.installed_versions", _versions))
            if self.has("CallDefaults"):
                for make in PIPES | OTHERS:
                    call = inspect.unwrap(type(_template(make, False)).__call__)
                    stack.enter_context(mock.patch.object(call, "__defaults__", _short(call)))
            try:
                yield
            finally:
                backends._active_backend = backend  # diffusers' set_attention_backend sets that of the process, too


_versions = functools.cache(context.installed_versions)


def _short(call: Any) -> tuple[Any, ...]:
    """Return the defaults of a pipeline's call with four steps."""
    parameters = inspect.signature(call).parameters.values()
    given = [each for each in parameters if each.default is not inspect.Parameter.empty]
    return tuple(4 if each.name == "num_inference_steps" else each.default for each in given)


def _row(*transforms: Transform, **kwargs: Any) -> Row:
    name = ", ".join(map(repr, transforms))
    return Row(name.replace(f"{TINY_LORA.parent}{os.sep}", ""), transforms, **kwargs)


def _presets() -> Iterator[Row]:
    """Yield a row for each preset; for all presets that differ in their steps and guidance alone, one: the last.

    Their calls have three steps, for time's sake.
    """
    rows: dict[tuple[Transform, ...], Row] = {}
    for name, preset in ernie_accel.presets.items():
        steps = any(type(transform).__name__ == "CallDefaults" for transform in preset.transforms)
        same = tuple(each for each in preset.transforms if type(each).__name__ not in ("CallDefaults", "BatchGuidance"))
        given = (ernie_accel.CallDefaults(num_inference_steps=3),) if steps else ()
        machine = H200 if preset.mode == "exact" else None  # on the CPU it has nothing to do
        title = f"{rows[same].name}, {name}" if same in rows else f"preset {name}"
        rows[same] = Row(title, given, preset=name, context=machine)
    yield from rows.values()


#: Examples whose arguments make no difference to what a script can do to them.
_VARIANTS = (
    CallDefaults("turbo", guidance_scale=2.0),
    CastDtype("float16", components=("transformer",)),
    SwapScheduler("euler_ancestral"),
    SwapScheduler("euler", shift=5.0),
    SwapScheduler("dpmpp_sde", timestep_spacing="trailing"),
    SwapScheduler("lcm"),
)


def rows() -> tuple[Row, ...]:
    """Return all rows: every example of a transform, some that belong together, and every preset."""
    simulated = {"BatchGuidance", "CaptureGraphs", "KeepTimestepsOnHost", "Warmup"}
    return (
        *(_row(transform) for transform in EXAMPLES if transform not in _VARIANTS),
        _row(Quantize("int8-weight-only", backend="quanto")),
        _row(Quantize("nf4")),
        _row(RewriteBlocks(), Quantize("int8-weight-only")),
        _row(RewriteBlocks(), CaptureGraphs(), context=H200),
        _row(RewriteBlocks(), BatchGuidance()),
        _row(KeepTimestepsOnHost(), context=H200),
        _row(Compile(), Warmup(sizes=((32, 32),))),
        *_presets(),
        *(
            _row(transform, context=H200, gpu="only planned here: it needs a GPU")
            for transform in ELSEWHERE
            if type(transform).__name__ not in simulated
        ),
    )


ROWS = {row.name: row for row in rows()}


@functools.cache
def _template(family: str, enhancer: bool) -> Any:
    make = (PIPES | OTHERS)[family]
    if family == "ernie":
        return make(enhancer=enhancer)
    return make()


class _Pickler(pickle.Pickler):
    """Pickles all but tensors, and keeps these."""

    def __init__(self, file: io.BytesIO, tensors: dict[int, torch.Tensor]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def persistent_id(self, obj: object) -> int | None:
        if not isinstance(obj, torch.Tensor):
            return None
        self._tensors[id(obj)] = obj
        return id(obj)


class _Unpickler(pickle.Unpickler):
    """Copies each tensor once, so that tied weights stay tied."""

    def __init__(self, file: io.BytesIO, tensors: dict[int, torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._memo: dict[int, Any] = {}

    def persistent_load(self, pid: int) -> torch.Tensor:
        return copy.deepcopy(self._tensors[pid], self._memo)


@functools.cache
def _pickled(family: str, enhancer: bool) -> tuple[bytes, dict[int, torch.Tensor]]:
    file, tensors = io.BytesIO(), dict[int, torch.Tensor]()
    _Pickler(file, tensors).dump(_template(family, enhancer))
    return file.getvalue(), tensors


def stock(family: str, row: Row | None = None) -> Any:
    """Return a fresh pipe of `family`, with what `row` would change: a prompt enhancer, weights laid out otherwise.

    Unpickled, which is many times faster than `copy.deepcopy`: a cell makes several.
    """
    pickled, tensors = _pickled(family, row is not None and row.enhances)
    pipe = _Unpickler(io.BytesIO(pickled), tensors).load()
    if row is not None and row.awkward and getattr(pipe, "transformer", None) is not None:
        make_awkward(pipe)
    return pipe


def part(family: str, name: str, like: Any) -> Any:
    """Return another component of the same class, with other weights, in the dtype of `like`."""
    made = copy.deepcopy(getattr(_template(family, False), name))
    pipelines.randomize(made, seed=5)
    return made.to(like.dtype).eval().requires_grad_(False)


def _pictures_for(cls: str, width: int, height: int) -> dict[str, Any]:
    """Return what calls of a pipeline of Z-Image need: pictures in the size of what is drawn, except for references."""
    given = Z_IMAGE_PIPES[cls][1]
    pictures = {name: x if isinstance(x, list) else x.resize((width, height)) for name, x in given.items()}
    return pictures | ({"strength": 0.9} if cls in STRENGTH else {})  # so that two steps are two


def draw(pipe: Any, row: Row | None = None, *, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    """Return a small picture, around 0, leaving to the pipe what the row would change of the call."""
    name, given = type(pipe).__name__, torch.Generator().manual_seed(7)
    steps = 20 if row is not None and row.has("CacheSteps") else 2
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "pt",
        "height": 32,
        "width": 32,
        "guidance_scale": 3.0 if row is not None and row.has("BatchGuidance") else 1.0,
    }
    if name.startswith(("Flux", "StableDiffusion", "Wan")):
        dtype = next(m for m in (getattr(pipe, n, None) for n in ("unet", "transformer", "transformer_2")) if m).dtype
        arguments["prompt_embeds"] = torch.randn(1, 5, 32, generator=given).to(dtype)
        if row is not None and row.has("CallDefaults") and not name.startswith("Flux"):
            arguments["negative_prompt_embeds"] = arguments["prompt_embeds"] * 0.5  # by default they are guided
        if name.startswith("Flux"):
            arguments["pooled_prompt_embeds"] = torch.randn(1, 32, generator=given).to(dtype)
        if name.startswith("Wan"):
            arguments |= {"num_frames": 1, "height": 16, "width": 16}
    else:
        arguments["prompt"] = PROMPT
    if name.startswith(("ZImage", "Lumina2")):
        arguments["max_sequence_length"] = 48
    if name.startswith("ErnieImage"):
        arguments["use_pe"] = row is not None and row.enhances
        if row is not None and row.enhances:
            arguments["height"] = arguments["width"] = 64
    if row is not None and row.has("CallDefaults"):
        for left in LEFT_TO_DEFAULTS:
            del arguments[left]
    arguments |= kwargs
    if name in BESIDE_Z_IMAGE.values():
        arguments = _pictures_for(name, arguments["width"], arguments["height"]) | arguments
    torch.manual_seed(0)  # stock draws the enhancer's words from the global random numbers
    made = pipe(**arguments)
    picture = made.frames if hasattr(made, "frames") else images_of(made)
    return torch.as_tensor(picture).float() - 0.5

"""Draw from a picture with a text-to-image pipeline as it is, optimized or not: no other pipeline, no other weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from ernie_accel.core.components import AnyPipeline, CallablePipeline, Pipeline, device_of, is_skeleton
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.outputs import images_of
from ernie_accel.core.plan import check_pipeline
from ernie_accel.core.turns import turn_of
from ernie_accel.core.undo import Undo
from ernie_accel.editing.files import PictureError
from ernie_accel.editing.late_start import LateStart
from ernie_accel.editing.pictures import (
    Picture,
    as_masks,
    as_pictures,
    check_strength,
    finished,
    padded,
    resized,
)
from ernie_accel.families import families, family_of
from ernie_accel.models.rewritten import named_object

#: Arguments of a second pass (`refine`), as the authors' guide to batches of ERNIE-Image gives them.
SECOND_PASS: Mapping[str, Any] = {"strength": 0.3, "num_inference_steps": 20, "guidance_scale": 2.0}


def image_to_image(
    pipe: AnyPipeline,
    image: Picture | Sequence[Picture],
    prompt: str | list[str] | None = None,
    *,
    strength: float = 0.3,
    height: int | None = None,
    width: int | None = None,
    latents: torch.Tensor | None = None,
    **call: object,
) -> Any:
    """Draw `prompt`, beginning at a picture instead of at pure noise.

    The picture is encoded by the pipe's VAE and noised to one of the scheduler's own levels; the pipe's own call does
    the rest of the steps. So everything that was applied to the pipe applies here, too. Sides that are no multiple of
    what the architecture needs are padded, and the result is cut to the size of the picture.

    Args:
        pipe: A text-to-image pipeline of a known family with a flow-matching scheduler.
        image: A file, a PIL picture, an array [H, W, 3] or a tensor [3, H, W] with floats from 0 to 1; several of one
            size for one prompt each, or for the same one.
        prompt: What to draw; None with ``prompt_embeds``.
        strength: 0 to 1: how far back in the schedule to begin. 0 is the picture through the VAE, 1 is text to image.
            Of n steps, the last ``n * strength`` run, at least one.
        height: Resize the picture to this first, in pixels; None: its own.
        width: Likewise.
        latents: The noise, of the shape and dtype of the pipe's initial latents; None: drawn from ``generator`` as
            the pipe draws it.
        **call: Further arguments of the pipe's call: ``num_inference_steps``, ``guidance_scale``, ``generator``,
            ``num_images_per_prompt``, ``callback_on_step_end``, ``output_type``, ...

    Returns:
        What the pipe's call returns. With ``output_type="latent"`` these are the latents of the padded picture.

    Raises:
        PictureError: A picture or the strength cannot be used; nothing was drawn.
        ErnieAccelError: The pipe cannot do this.
        TypeError: The pipe's call does not take one of the arguments.
    """
    return draw_from(pipe, image, None, prompt, strength, height, width, latents, call)


def inpaint(
    pipe: AnyPipeline,
    image: Picture | Sequence[Picture],
    mask: Picture | Sequence[Picture],
    prompt: str | list[str] | None = None,
    *,
    strength: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    latents: torch.Tensor | None = None,
    **call: object,
) -> Any:
    """Draw `prompt` where a mask is white. Where it is black, the picture keeps its pixels, bit for bit.

    After every step, the rest is set to the picture with noise of that step's level, so the new part is drawn to fit.

    Args:
        pipe: As for `image_to_image`.
        image: Likewise.
        mask: One for all pictures or one each, of their size: white (1) is drawn anew, black (0) is kept, grey blends.
            A file, a PIL picture, or an array or tensor [H, W] with bool or floats from 0 to 1.
        prompt: What to draw; None with ``prompt_embeds``.
        strength: 0 to 1; how much of what was below the mask is forgotten.
        height: As for `image_to_image`; the mask is resized as well.
        width: Likewise.
        latents: As for `image_to_image`.
        **call: As for `image_to_image`.

    Returns:
        What the pipe's call returns.

    Raises:
        PictureError: A picture, a mask or the strength cannot be used; nothing was drawn.
        ErnieAccelError: The pipe cannot do this.
        TypeError: The pipe's call does not take one of the arguments.
    """
    return draw_from(pipe, image, (mask,), prompt, strength, height, width, latents, call)


def refine(
    turbo_pipe: AnyPipeline,
    base_pipe: AnyPipeline,
    prompt: str | list[str],
    *,
    strength: float = SECOND_PASS["strength"],
    num_inference_steps: int = SECOND_PASS["num_inference_steps"],
    guidance_scale: float = SECOND_PASS["guidance_scale"],
    generator: torch.Generator | list[torch.Generator] | None = None,
    num_images_per_prompt: int = 1,
    first: Mapping[str, object] | None = None,
    **second: Any,
) -> Any:
    """Draw with a distilled pipe, then go over the picture with the base pipe, which removes the grid of the first.

    Args:
        turbo_pipe: Draws the picture.
        base_pipe: Refines it; the two may share components, or be the same pipe.
        prompt: What to draw. If the first pass enhances it, the second one gets the enhanced text.
        strength: Of the second pass, 0 to 1.
        num_inference_steps: Of the second pass's whole schedule, of which `strength` runs.
        guidance_scale: Of the second pass.
        generator: For the noise of both passes, one after the other.
        num_images_per_prompt: For each prompt.
        first: Further arguments of the first call: height, width, steps.
        **second: Further arguments of the second call.

    Returns:
        What the call of `base_pipe` returns.

    Raises:
        PictureError: The strength cannot be used; nothing was drawn.
        ErnieAccelError: One of the pipes cannot do this.
    """
    check_strength(strength)
    base = cast(CallablePipeline, _checked(base_pipe))
    turbo = cast(CallablePipeline, check_pipeline(turbo_pipe))
    inspect.signature(base).bind(prompt=prompt, **second)
    shared = {"generator": generator, "num_images_per_prompt": num_images_per_prompt}
    drawn = turbo(prompt=prompt, **{**(first or {}), **shared, "output_type": "pt"})
    written = getattr(drawn, "revised_prompts", None)
    if written is not None:
        prompt, second = list(written), second | _unenhanced(base)
    texts = [prompt] if isinstance(prompt, str) else prompt
    return image_to_image(
        base,
        images_of(drawn).float().clamp(0, 1),
        [text for text in texts for _ in range(num_images_per_prompt)],
        strength=strength,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=generator,
        **second,
    )


def draw_from(
    given: AnyPipeline,
    image: Picture | Sequence[Picture],
    mask: tuple[Picture | Sequence[Picture]] | None,
    prompt: str | list[str] | None,
    strength: float,
    height: int | None,
    width: int | None,
    latents: torch.Tensor | None,
    call: Mapping[str, Any],
    draw: Callable[..., object] | None = None,
) -> object:
    """Do what `image_to_image` and, with a mask, `inpaint` say; `draw` is called in the place of the pipe itself."""
    strength = check_strength(strength)
    pictures = as_pictures(image)
    masks = None if mask is None else as_masks(mask[0], (pictures.shape[-2], pictures.shape[-1]))
    for name, value in (("height", height), ("width", width)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise PictureError(f"{name} must be a number of pixels, at least 1, or None, got {value!r}")
    pipe = _checked(given, draw)
    arguments = dict(call) | {"prompt": prompt}
    rows, each = _rows(arguments, pictures, masks)
    draw = draw or cast(Callable[..., object], pipe)
    inspect.signature(draw).bind(**arguments, height=1, width=1, latents=None)

    size = height or pictures.shape[-2], width or pictures.shape[-1]
    pictures = _repeated(resized(pictures, *size), rows, each)
    masks = None if masks is None else _repeated(resized(masks, *size), rows, each)
    with turn_of(pipe), Undo() as undo:
        device = device_of(pipe)
        whole = padded(pictures, _multiple(pipe)).to(device)
        encoded = _encode(pipe, whole)
        if latents is not None and latents.shape != encoded.shape:
            raise PictureError(
                f"latents are {tuple(latents.shape)}; for these pictures, the noise is {tuple(encoded.shape)}"
            )
        noise = None if latents is None else latents.to(device, encoded.dtype)
        drawn = None if masks is None else F.adaptive_max_pool2d(padded(masks, _multiple(pipe)), encoded.shape[-2:])
        begin = LateStart(
            pipe, encoded, strength, noise, call.get("generator"), None if drawn is None else drawn.to(device)
        )
        try:
            begin.install(undo)
            output = draw(**arguments, height=whole.shape[-2], width=whole.shape[-1], latents=begin.latents)
        finally:
            undo()
    begin.check_begun()
    if call.get("output_type") == "latent" or (masks is None and whole.shape == pictures.shape):
        return output
    return _with_images(output, lambda images: finished(images, pictures, masks))


def refusal(pipe: AnyPipeline) -> str | None:
    """Return why `image_to_image` cannot be used with a pipe; None if it can."""
    try:
        _checked(pipe)
    except ErnieAccelError as error:
        return str(error)
    return None


def _checked(given: AnyPipeline, draw: Callable[..., object] | None = None) -> Pipeline:
    """Return a pipe that can begin at a picture.

    Raises:
        ErnieAccelError: It cannot.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = check_pipeline(given)
    name, family = type(pipe).__name__, family_of(pipe)
    if draw is None and not {"image", "strength"}.isdisjoint(inspect.signature(cast(Any, pipe)).parameters):
        raise ErnieAccelError(f"{name} takes pictures itself: call it, or pass a text-to-image pipe of its components")
    if family.encode_pictures is None:
        known = ", ".join(each.name for each in families() if each.encode_pictures is not None)
        raise ErnieAccelError(
            f"{family.name_for(pipe)}: how its pictures become latents is not known (Family.encode_pictures); it is "
            f"for {known}"
        )
    if is_skeleton(pipe):
        raise ErnieAccelError(f"this {name} was made without weights, for plans; load(...) reads them")
    if getattr(getattr(pipe, "vae", None), "encoder", None) is None:
        raise ErnieAccelError(f"this {name} has no VAE with an encoder, which a picture needs")
    scheduler = getattr(pipe, "scheduler", None)
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.invert_sigmas:
        inverted = " with invert_sigmas=True" if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else ""
        raise ErnieAccelError(
            f"a picture is noised for a FlowMatchEulerDiscreteScheduler with falling sigmas; this {name} has "
            f"{type(scheduler).__name__}{inverted}. Other samplers: optimize(pipe, SwapScheduler(...))"
        )
    return pipe


def _rows(arguments: dict[str, Any], pictures: torch.Tensor, masks: torch.Tensor | None) -> tuple[int, int]:
    """Return how many prompts there are, and how many pictures are drawn of each; a single prompt serves all pictures.

    Args:
        arguments: Of the call; the prompt is repeated in place.
        pictures: What to begin at.
        masks: For the pictures.

    Raises:
        PictureError: The numbers do not match.
    """
    prompt, embedded = arguments["prompt"], arguments.get("prompt_embeds")
    if prompt is None and embedded is None:
        raise PictureError("there is no prompt: pass prompt= (or prompt_embeds=); '' draws without one")
    if isinstance(prompt, str) and len(pictures) > 1:
        arguments["prompt"] = prompt = [prompt] * len(pictures)
    several: Any = embedded if prompt is None else prompt
    rows = 1 if isinstance(several, str) else len(several)
    for kind, tensor in (("pictures", pictures), ("masks", masks)):
        if tensor is not None and len(tensor) not in (1, rows):
            raise PictureError(f"{len(tensor)} {kind} for {rows} prompts: give one for all, or one for each prompt")
    each = arguments.get("num_images_per_prompt", 1)
    generator = arguments.get("generator")
    if isinstance(generator, list) and len(generator) != rows * each:
        raise PictureError(f"{len(generator)} generators for {rows * each} pictures: give one, or one for each picture")
    return rows, each


def _repeated(tensor: torch.Tensor, rows: int, each: int) -> torch.Tensor:
    """Return one entry for each picture that is drawn, in the order in which pipelines draw them."""
    return tensor.expand(rows, *tensor.shape[1:]).repeat_interleave(each, 0)


def _multiple(pipe: Pipeline) -> int:
    """Return what must divide both sides of a picture, in pixels."""
    return math.lcm(family_of(pipe).size_multiple, getattr(pipe, "vae_scale_factor", 1))


def _encode(pipe: Pipeline, pictures: torch.Tensor) -> torch.Tensor:
    encode = named_object(family_of(pipe).encode_pictures)
    if not callable(encode):
        raise ErnieAccelError(f"{family_of(pipe).name}: Family.encode_pictures is {encode!r}; expected a function")
    encoded: torch.Tensor = encode(pipe, pictures * 2 - 1)
    return encoded


def _unenhanced(pipe: Pipeline) -> dict[str, object]:
    """Return the argument that keeps a pipe from enhancing its prompts, if it does."""
    enhancement = family_of(pipe).prompt_enhancement
    return {} if enhancement is None else {enhancement.switch: False}


def _with_images(output: Any, change: Callable[[object], object]) -> object:
    """Return a call's output with other pictures."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    output.images = change(output.images)
    return output

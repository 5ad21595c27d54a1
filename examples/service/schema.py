"""What a request may say: the fields of OpenAI's images API, and those that SGLang and vLLM-Omni have beside them.

A field that would change the picture is heeded or refused, never dropped. What has no effect here is listed as such.
"""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ernie_accel.batch import Row
from ernie_accel.batch.engines.base import PictureFile
from ernie_accel.batch.input.row import MAX_SEED, MIN_SIDE
from examples.service.answers import ApiError
from examples.service.settings import Settings

FORMATS = ("png", "jpeg", "webp")

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


class Extra(BaseModel):
    """What vLLM-Omni passes on to a model."""

    model_config = ConfigDict(extra="forbid")

    apply_pe: bool | None = None


class ImageRequest(BaseModel):
    """A request for pictures, as `/v1/images/generations` and `/v1/images/edits` take it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    # Fewer may be sent than are asked for, says OpenAI; none are here: half-denoised latents are no picture.
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    background: Literal["auto", "opaque"] | None = None

    # SGLang and vLLM-Omni
    width: Annotated[int, Field(ge=MIN_SIDE)] | None = None
    height: Annotated[int, Field(ge=MIN_SIDE)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    negative_prompt: str | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    use_pe: bool | None = None
    enhance_prompt: bool | None = None
    extra_params: Extra | None = None

    # Without effect: they name whoever asks, or choose what this service has only one of.
    user: str | None = None
    safety_identifier: str | None = None
    moderation: Literal["auto", "low"] | None = None
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = None
    style: Literal["vivid", "natural"] | None = None
    input_fidelity: Literal["high", "low"] | None = None
    output_quality: str | None = None
    generator_device: str | None = None
    vae_use_slicing: bool | None = None
    vae_use_tiling: bool | None = None

    # Known, and not offered: any other value would change the picture.
    true_cfg_scale: None = None
    enable_teacache: Literal[False] | None = None
    rollout: Literal[False] | None = None
    lora: None = None
    diffusers_kwargs: None = None

    @classmethod
    def of(cls, fields: Mapping[str, object], *, strict: bool) -> ImageRequest:
        """Return what a request says.

        Args:
            fields: By name.
            strict: Whether types must be right; in a form everything is text.

        Raises:
            ApiError: A field is unknown, missing, of another type, or out of range.
        """
        try:
            return cls.model_validate(fields, strict=strict)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False)[0]
            param = ".".join(map(str, problem["loc"])) or None
            if problem["type"] == "extra_forbidden":
                raise ApiError(400, f"Unknown parameter: {_short(param)}.", param, "unknown_parameter") from None
            if problem["type"] == "missing":
                raise ApiError(
                    400, f"Missing required parameter: {_short(param)}.", param, "missing_required_parameter"
                ) from None
            raise ApiError(
                400, f"Invalid value for {_short(param)}: {problem['msg']}.", param, "invalid_value"
            ) from None

    def rows(
        self, settings: Settings, *, image: PictureFile | None = None, mask: PictureFile | None = None
    ) -> list[Row]:
        """Return the pictures to make, each with a name and a seed of its own.

        Raises:
            ApiError: Something is beyond the service's limits, or another model is asked for.
        """
        if self.model not in (None, settings.name):
            message = f"The model {_short(self.model)} does not exist; this service has '{settings.name}'."
            raise ApiError(404, message, "model", "model_not_found")
        count = self.n or 1
        width, height = self._size(settings, image)
        self._check(settings, count, image)
        seed = secrets.randbits(32) if self.seed is None else self.seed
        try:
            return [
                Row(
                    line=index + 1,
                    index=index,
                    prompt=self.prompt,
                    file_name=f"{uuid.uuid4().hex}.png",
                    negative_prompt=self.negative_prompt or None,
                    seed=seed + index,
                    width=width,
                    height=height,
                    steps=self.num_inference_steps,
                    guidance_scale=self.guidance_scale,
                    image=image,
                    mask=mask,
                    strength=self.strength,
                )
                for index in range(count)
            ]
        except ValueError as error:  # no UTF-8
            raise ApiError(400, f"Invalid value for 'prompt': {error}.", "prompt", "invalid_value") from None

    def _size(self, settings: Settings, image: PictureFile | None) -> tuple[int | None, int | None]:
        width, height, param = self.width, self.height, "width"
        if self.size not in (None, "auto"):
            param = "size"
            found = _SIZE.fullmatch(self.size or "")
            if found is None:
                raise ApiError(
                    400, f"Invalid size {_short(self.size)}; expected one like '1024x1024'.", param, "invalid_value"
                )
            named = int(found[1]), int(found[2])
            if (width, height) not in ((None, None), named):
                raise ApiError(400, "'size' says one thing, 'width' and 'height' another.", param, "invalid_value")
            width, height = named
        if (width is None) != (height is None):
            raise ApiError(400, "'width' and 'height' go together; give both, or neither.", param, "invalid_value")
        drawn = (image.width, image.height) if width is None and image is not None else (width, height)
        if drawn[0] is not None and drawn[1] is not None:
            sides = drawn[0], drawn[1]
            if sides[0] * sides[1] > settings.max_pixels:
                message = f"{sides[0]}x{sides[1]} has more than the {settings.max_pixels:,} pixels allowed."
                raise ApiError(400, message, "image" if width is None else param, "invalid_value")
            if width is not None and (min(sides) < MIN_SIDE or any(side % settings.multiple for side in sides)):
                message = f"Width and height must be multiples of {settings.multiple}, and are {width} and {height}."
                raise ApiError(400, message, param, "invalid_value")
        return width, height

    def _check(self, settings: Settings, count: int, image: PictureFile | None) -> None:
        """Refuse what is beyond the service's limits, or not offered."""
        if not self.prompt.strip():
            raise ApiError(400, "'prompt' is empty.", "prompt", "invalid_value")
        limits: list[tuple[str, Any, float]] = [
            ("prompt", len(self.prompt), settings.max_prompt),
            ("negative_prompt", len(self.negative_prompt or ""), settings.max_prompt),
            ("n", count, min(settings.max_n, settings.max_queue)),  # more would never find room
            ("num_inference_steps", self.num_inference_steps or 0, settings.max_steps),
            ("guidance_scale", self.guidance_scale or 0, settings.max_guidance),
            ("seed", (self.seed or 0) + count - 1, MAX_SEED),
        ]
        for param, value, most in limits:
            if value > most:
                what = f"{value:,}"
                what = f"{what[:40]}..." if len(what) > 40 else what
                what += " characters" if "prompt" in param else ""
                raise ApiError(
                    400, f"'{param}' is {what}; this service takes {most:,} at most.", param, "above_max_value"
                )
        if self.strength is not None and image is None:
            raise ApiError(400, "'strength' is for edits.", "strength", "invalid_value")
        wanted = {"use_pe": self.use_pe, "enhance_prompt": self.enhance_prompt}
        wanted["extra_params"] = None if self.extra_params is None else self.extra_params.apply_pe
        for param, value in wanted.items():
            if value is not None and value != settings.enhancer:
                does = "enhances" if settings.enhancer else "does not enhance"
                raise ApiError(400, f"This service {does} prompts; leave '{param}' out.", param, "invalid_value")


def _short(text: object) -> str:
    shown = str(text)
    return repr(shown if len(shown) <= 60 else shown[:57] + "...")

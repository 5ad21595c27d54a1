"""`image_to_image` and `inpaint` as classes in the manner of diffusers, for scripts that are written for those."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from types import MethodType
from typing import Any, TypeVar

import torch
from diffusers import ErnieImagePipeline

from ernie_accel.core.apply import report_of
from ernie_accel.core.components import AnyPipeline, CallablePipeline
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.plan import check_pipeline
from ernie_accel.editing.edit import draw_from
from ernie_accel.editing.pictures import Picture

_S = TypeVar("_S", bound="_FromPicture")


class _FromPicture(ErnieImagePipeline):  # type: ignore[misc]  # diffusers comes without types
    """An ErnieImagePipeline that begins at a picture."""

    #: The text-to-image pipe that it was made from, and that draws for it.
    _drawn_by: CallablePipeline | None = None

    @classmethod
    def from_pipe(
        cls: type[_S], pipeline: AnyPipeline, *, torch_dtype: torch.dtype | None = None, **components: object
    ) -> _S:
        """Return a pipeline with the components of another one: the same objects, in the same dtypes.

        Unlike diffusers' own, it casts nothing, and what was applied to `pipeline` (its call settings, cached prompts)
        holds for this one, too, until you give this one other components or optimize it by itself.

        Args:
            pipeline: A pipeline of ERNIE-Image.
            torch_dtype: As scripts for diffusers pass it; the one that the transformer has, or None.
            **components: Others to use instead.

        Raises:
            ErnieAccelError: `pipeline` is no pipeline, or its transformer has another dtype than `torch_dtype`.
            TypeError: It has other components than an ERNIE-Image pipeline.
        """
        source = check_pipeline(pipeline)
        made = cls(**{**source.components, **components})
        if torch_dtype is not None and (has := made.transformer.dtype) != torch_dtype:
            name = str(torch_dtype).removeprefix("torch.")
            raise ErnieAccelError(
                f"from_pipe shares the components, and casts none: the transformer is {has}, not {torch_dtype}. Leave "
                f"torch_dtype out, or cast the pipe itself: optimize(pipe, CastDtype({name!r}))"
            )
        object.__setattr__(made, "_drawn_by", getattr(source, "_drawn_by", None) or source)
        made.set_progress_bar_config(**getattr(source, "_progress_bar_config", {}))
        return made

    def to_json_string(self) -> str:
        """Return the configuration as JSON, under the name of the stock pipeline, which everything can load."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = ErnieImagePipeline.__name__
        return f"{json.dumps(config, indent=2, sort_keys=True)}\n"

    def _draw(
        self,
        image: Picture | Sequence[Picture],
        mask: tuple[Picture | Sequence[Picture]] | None,
        prompt: str | list[str] | None,
        strength: float,
        height: int | None,
        width: int | None,
        latents: torch.Tensor | None,
        call: dict[str, object],
    ) -> object:
        source, mine = self._drawn_by, self.components
        if source is not None and not report_of(self).entries:
            its = source.components
            if all(mine[name] is its[name] for name in mine):
                return draw_from(source, image, mask, prompt, strength, height, width, latents, call)
        stock = MethodType(ErnieImagePipeline.__call__, self)
        return draw_from(self, image, mask, prompt, strength, height, width, latents, call, draw=stock)


class ErnieImageImg2ImgPipeline(_FromPicture):
    """`image_to_image` as a pipeline class: ``ErnieImageImg2ImgPipeline.from_pipe(pipe)(prompt, image, strength=0.3)``.

    It has the components, and the methods, of an ``ErnieImagePipeline``.
    """

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Picture | Sequence[Picture] | None = None,
        strength: float = 0.3,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        **call: object,
    ) -> Any:
        """Draw `prompt`, beginning at `image`; see `image_to_image`, and ErnieImagePipeline for the other arguments."""
        return self._draw(image, None, prompt, strength, height, width, latents, call)  # type: ignore[arg-type]


class ErnieImageInpaintPipeline(_FromPicture):
    """`inpaint` as a pipeline class: ``ErnieImageInpaintPipeline.from_pipe(pipe)(prompt, image, mask_image)``.

    It has the components, and the methods, of an ``ErnieImagePipeline``.
    """

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Picture | Sequence[Picture] | None = None,
        mask_image: Picture | Sequence[Picture] | None = None,
        strength: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        **call: object,
    ) -> Any:
        """Draw `prompt` where `mask_image` is white; see `inpaint`, and ErnieImagePipeline for the other arguments."""
        return self._draw(image, (mask_image,), prompt, strength, height, width, latents, call)  # type: ignore[arg-type]


def _with_stock_arguments(cls: type) -> None:
    """Let the call's signature name what ``**call`` takes: `CallDefaults` and others look there."""
    call = cls.__call__
    own = inspect.signature(call)
    mine = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    stock = inspect.signature(ErnieImagePipeline.__call__).parameters.values()
    rest = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in stock if each.name not in own.parameters]
    call.__signature__ = own.replace(parameters=[*mine, *rest], return_annotation=inspect.Signature.empty)  # type: ignore[attr-defined]


_with_stock_arguments(ErnieImageImg2ImgPipeline)
_with_stock_arguments(ErnieImageInpaintPipeline)

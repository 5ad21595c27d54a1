"""What a type checker says of a user's code: checked by mypy (``nox -s typing``), never run.

A line that must be an error is marked ``type: ignore`` with its code; mypy reports a mark that nothing needs any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ErnieImagePipeline
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from typing_extensions import assert_type

    import ernie_accel
    from ernie_accel.models.ernie_image import blocks, kernels
    from ernie_accel.models.rewritten import KernelModel, RewrittenModel

    rewritten: RewrittenModel = blocks
    on_kernels: KernelModel = kernels


class Pipe:
    """What diffusers declares of every pipeline."""

    transformer: torch.nn.Module

    @property
    def components(self) -> dict[str, Any]:
        """Models by name."""
        return {}

    @property
    def config(self) -> dict[str, Any]:
        """Settings by name."""
        return {}

    def to(self, *args: Any, **kwargs: Any) -> Pipe:
        """Move all models."""
        return self

    def __getattr__(self, name: str) -> Any:
        """Diffusers declares this, too: attributes that it moved into `config`."""


def what_goes_in_comes_out(
    pipe: Pipe, ours: DiffusionPipeline, theirs: ErnieImagePipeline, whole: FluxPipeline
) -> None:
    """The class of a pipe is kept, so completion and checks go on after `optimize`."""
    assert_type(ernie_accel.optimize(pipe, preset="exact"), Pipe)
    assert_type(ernie_accel.restore(pipe), Pipe)
    assert_type(ernie_accel.optimize(ours, ernie_accel.Compile()), DiffusionPipeline)
    assert_type(ernie_accel.restore(theirs), ErnieImagePipeline)
    assert_type(ernie_accel.optimize(whole, preset="turbo-fp8"), FluxPipeline)
    assert_type(ernie_accel.plan(pipe), ernie_accel.Plan)
    assert_type(ernie_accel.report(ours), ernie_accel.Report)


def what_is_no_pipeline(model: torch.nn.Module, parts: Mapping[str, object]) -> None:
    """A number, a name, a bare model and a mapping of parts are refused before anything runs."""
    ernie_accel.optimize(42)  # type: ignore[type-var]
    ernie_accel.restore("turbo-fp8")  # type: ignore[type-var]
    ernie_accel.plan(42)  # type: ignore[arg-type]
    ernie_accel.report(parts)  # type: ignore[arg-type]
    ernie_accel.plan(model)  # type: ignore[arg-type]


def wrong_arguments(pipe: Pipe) -> None:
    """Names that are not there, and values of another type."""
    ernie_accel.optimize(pipe, "turbo-fp8")  # type: ignore[arg-type]
    ernie_accel.optimize(pipe, on_unsupported="ignore")  # type: ignore[arg-type]
    ernie_accel.optimize(pipe, presets="exact")  # type: ignore[call-arg]
    ernie_accel.Quantize("fp8", components="pe")  # type: ignore[arg-type]
    ernie_accel.recommend(pipe)  # type: ignore[arg-type]


def what_is_loaded_can_be_called(folder: str) -> None:
    """`load` returns a pipeline that draws."""
    pipe = ernie_accel.load(folder)
    pipe("a red circle").images[0].save("circle.png")
    assert_type(ernie_accel.optimize(pipe, preset="exact"), ernie_accel.CallablePipeline)

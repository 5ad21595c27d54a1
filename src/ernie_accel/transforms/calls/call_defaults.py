"""Change the defaults of ``pipe(prompt)``: steps, guidance, prompt enhancer."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from ernie_accel.common.language import said
from ernie_accel.core.components import Pipeline
from ernie_accel.core.context import Context
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import Defaults, Inner, add_layer, new_defaults

MODES = ("turbo", "quality")


@dataclass(frozen=True, repr=False)
class CallDefaults(Transform):
    """Change the default arguments of calls of this one pipe. Arguments that the caller passes always win.

    Python looks a call up on the class, so the instance gets a class of its own: a subclass of the same name whose
    signature shows the new defaults. The original class is not touched. A pipe that a script makes of this one
    (`from_pipe`) shares its parts, but its calls have the pipeline's own defaults.

    Pays:
        More than anything else: 8 steps at guidance 1 are 8 forwards of one prompt, and 50 steps at guidance 4 are 50
        forwards of two. But only for a checkpoint that was distilled for it: eight steps of a base checkpoint look bad.

    Guidance above what a distilled checkpoint bears (1.5 for ERNIE-Image-Turbo) raises a UserWarning.

    Attributes:
        mode: "turbo" (a distilled checkpoint) or "quality" (a base one): the family's own settings.
        num_inference_steps: Denoising steps, >= 1. This and the following arguments override the mode.
        guidance_scale: Classifier-free guidance.
        true_cfg_scale: Classifier-free guidance of pipelines whose `guidance_scale` is an input of a distilled model
            (Qwen-Image, FLUX).
        use_pe: Whether prompts are enhanced (ERNIE-Image).
        negative_prompt: What the picture should not show.
    """

    phase: ClassVar[Phase] = Phase.CALL
    slot: ClassVar[str] = "call-defaults"
    effect: ClassVar[Effect] = Effect.RESAMPLES

    mode: str | None = None
    num_inference_steps: int | None = field(default=None, kw_only=True)
    guidance_scale: float | None = field(default=None, kw_only=True)
    true_cfg_scale: float | None = field(default=None, kw_only=True)
    use_pe: bool | None = field(default=None, kw_only=True)
    negative_prompt: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise UnknownNameError("mode", self.mode, MODES)
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be >= 1, got {self.num_inference_steps}")
        if all(getattr(self, f.name) is None for f in fields(self)):
            raise ValueError("CallDefaults() changes nothing: give a mode ('turbo', 'quality') or an argument")

    def family_reasons(self, pipe: Pipeline) -> list[str]:
        from ernie_accel.families import family_of

        family = family_of(pipe)
        if self.mode is None or family.modes:
            return []
        unknown = said("no {mode} settings are known for {name}", mode=self.mode, name=family.name_for(pipe))
        return [
            said(
                "{unknown}: give values, as in CallDefaults(num_inference_steps=8, guidance_scale=1.0)", unknown=unknown
            )
        ]

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        from ernie_accel.families import family_of

        family = family_of(pipe)
        if self.family_reasons(pipe):
            return self.family_reasons(pipe)
        if self.mode is not None and self.mode not in family.modes:
            other = next(iter(family.modes))
            has = said(
                "{name} has no {mode!r} settings; it has {modes}",
                name=family.name,
                mode=self.mode,
                modes=", ".join(family.modes),
            )
            return [
                said(
                    "{has}: use CallDefaults({other!r}), or a preset whose name begins with {prefix!r}",
                    has=has,
                    other=other,
                    prefix=f"{other}-",
                )
            ]
        accepted = inspect.signature(type(pipe).__call__).parameters
        return [
            said("{pipe} takes no argument {name!r}", pipe=type(pipe).__name__, name=name)
            for name in self.wanted(pipe)
            if name not in accepted
        ]

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        changes = self._changes(pipe)
        return Preview(changes, note=self._note(pipe) if changes else said("the pipe's own defaults are these"))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        wanted, planned = self.wanted(pipe), context.planned(pipe)
        steps, enhances = wanted.get("num_inference_steps"), wanted.get("use_pe")
        return replace(
            planned,
            num_inference_steps=planned.num_inference_steps if steps is None else steps,
            enhances_prompts=planned.enhances_prompts if enhances is None else enhances,
        )

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        changes = self._changes(pipe)
        with Undo() as undo:
            add_layer(pipe, _Defaults(self.wanted(pipe), self._highest_guidance(pipe)), undo)
        return Applied(changes, undo=undo, note=self._note(pipe))

    def wanted(self, pipe: Pipeline) -> dict[str, Any]:
        """Return the arguments by name: those of the mode, overridden by those given."""
        from ernie_accel.families import family_of

        modes = family_of(pipe).modes
        wanted: dict[str, object] = {}
        if self.mode is not None and self.mode in modes:
            settings = modes[self.mode]
            wanted["num_inference_steps"] = settings.num_inference_steps
            if settings.guidance_scale is not None:
                wanted["guidance_scale"] = settings.guidance_scale
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "mode"}
        return wanted | {name: value for name, value in given.items() if value is not None}

    def _highest_guidance(self, pipe: Pipeline) -> float | None:
        """Return the guidance above which pictures of this mode can show a grid."""
        from ernie_accel.families import family_of

        settings = None if self.mode is None else family_of(pipe).modes.get(self.mode)
        return None if settings is None else settings.highest_guidance

    def _note(self, pipe: Pipeline) -> str:
        highest = self._highest_guidance(pipe)
        if highest is None or self.guidance_scale is None or self.guidance_scale <= highest:
            return ""
        return _grid_warning(self.guidance_scale, highest)

    def _changes(self, pipe: Pipeline) -> tuple[str, ...]:
        return new_defaults(pipe, self.wanted(pipe))


def _grid_warning(guidance: float, highest: float) -> str:
    return said(
        "guidance_scale {guidance:g} is above {highest:g}, where a distilled checkpoint can draw a grid of 8 "
        "or 16 px: lower it, or look at pictures with ernie_accel.fidelity.grid_score",
        guidance=guidance,
        highest=highest,
    )


@dataclass(frozen=True, eq=False)
class _Defaults(Defaults):
    """A warning beside other defaults, where a guidance is too high for a distilled checkpoint."""

    highest_guidance: float | None = None

    def call(
        self, inner: Inner, signature: inspect.Signature, pipe: Pipeline, *args: object, **kwargs: object
    ) -> object:
        given = signature.bind_partial(pipe, *args, **kwargs).arguments
        guidance = given.get("guidance_scale", self.values.get("guidance_scale"))
        highest = self.highest_guidance
        if highest is not None and isinstance(guidance, (int, float)) and guidance > highest:
            warnings.warn(_grid_warning(guidance, highest), UserWarning, stacklevel=2)
        return super().call(inner, signature, pipe, *args, **kwargs)

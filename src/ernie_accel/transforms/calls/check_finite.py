"""Detect NaN and infinity where they arise, instead of delivering a black picture."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from ernie_accel.common.language import listed, said
from ernie_accel.core.components import Pipeline, Weight, modules_of, weights_of
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.stand_in import StandInMethod
from ernie_accel.core.step_ends import OnStepEnd, has_steps, watching_steps
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import Arguments, Call, wrap_call
from ernie_accel.families import family_of

#: Argument of a call that names what the callback is given.
_INPUTS = "callback_on_step_end_tensor_inputs"
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, repr=False)
class CheckFinite(Transform):
    """Check the latents after every step and the decoded picture for NaN and infinity.

    A call that fails the check is repeated once in float32, with the same noise, and a UserWarning names the step. If
    it cannot be repeated, or fails again, an error names the step. The check reads one number per step from the device.
    Where a pipeline's call takes no ``callback_on_step_end`` with the latents, it looks at what the scheduler returns.

    Pays:
        With float16, whose largest number is 65504, with quantized models, and in batches, where nobody looks at each
        picture. A rerun needs memory for the weights in float32, in addition to those of the pipe.

    Attributes:
        rerun: Whether a call may be repeated in float32. Quantized weights cannot.
    """

    phase: ClassVar[Phase] = Phase.CALL
    slot: ClassVar[str] = "finite"
    effect: ClassVar[Effect] = Effect.EXACT

    rerun: bool = field(default=True, kw_only=True)

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        if not (_tells_step_ends(pipe) or has_steps(pipe)):
            return [
                said(
                    "{pipe} cannot tell when a step ends (it takes no callback_on_step_end with latents, and has no "
                    "scheduler that steps)",
                    pipe=type(pipe).__name__,
                )
            ]
        if getattr(pipe, "vae", None) is None:
            return [said("{pipe} has no component 'vae'", pipe=type(pipe).__name__)]
        return []

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        return Preview(("call", "vae.decode"))

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        check = _Check(pipe, self.rerun)
        with Undo() as undo:
            undo.setattr(pipe.vae, "decode", _Decode(pipe.vae, "decode"))
            wrap_call(pipe, "finite", check.around, undo)
        return Applied(("call", "vae.decode"), undo=undo)


class _NotFiniteError(ErnieAccelError):
    """Says where the first number that is not finite was seen."""


class _Check:
    """Looks at the calls of one pipe."""

    def __init__(self, pipe: Pipeline, rerun: bool) -> None:
        self._pipe, self._rerun = pipe, rerun

    def around(self, call: Call, arguments: Arguments) -> object:
        """Call the pipe; if it fails the check, call it once more in float32."""
        noise = _Noise(arguments.get("generator"))
        try:
            return self._call(call, arguments)
        except _NotFiniteError as error:
            rerun_problem = self._no_rerun_reason()
            if rerun_problem is not None:
                raise ErnieAccelError(f"{error}. {rerun_problem}") from error
            found = str(error)
        weights = self._half_weights()
        dtypes = listed(sorted({_name(weight.tensor.dtype) for weight in weights}))
        text = f"{found}: the call is made again in float32 (the weights are {dtypes})"
        warnings.warn(text, UserWarning, stacklevel=2)
        noise.rewind()
        with Undo() as undo:
            for weight in weights:
                undo.set_data(weight, weight.tensor.data.float())
            try:
                return self._call(call, {name: _in_float32(value) for name, value in arguments.items()})
            except _NotFiniteError as error:
                raise ErnieAccelError(f"{found}; also in float32, {error}") from error
            finally:
                undo()

    def _call(self, call: Call, arguments: Arguments) -> object:
        """Call the pipe and look at the latents after every step.

        Raises:
            _NotFiniteError: A number in them, or in the decoded picture, is not finite.
        """
        steps, looks = arguments.get("num_inference_steps"), 0

        def check(step: int, latents: Tensor) -> None:
            nonlocal looks
            looks += 1
            of_all = "" if steps is None else f" of {steps}"
            require_finite(latents, f"the latents after step {step + 1}{of_all} in {_name(latents.dtype)}")

        if _tells_step_ends(self._pipe):
            return call(self._with_callback(arguments, check))
        with watching_steps(self._pipe, check):
            result = call(arguments)
        if looks == 0:
            text = "its scheduler made no step in this call, so that only the decoded picture was checked"
            warnings.warn(f"{type(self._pipe).__name__}: {text}", UserWarning, stacklevel=3)
        return result

    def _with_callback(self, arguments: Arguments, check: OnStepEnd) -> dict[str, object]:
        """Return the arguments of a call with a callback that looks at the latents before the caller's own does."""
        theirs: Any = arguments["callback_on_step_end"]
        named = arguments.get(_INPUTS)  # None is allowed, too
        if isinstance(theirs, _classes_asked(self._pipe)):
            named = theirs.tensor_inputs
        wanted = [] if named is None else list(named)

        def check_and_call(
            pipe: Pipeline, step: int, timestep: object, tensors: dict[str, Tensor]
        ) -> dict[str, object]:
            check(step, tensors["latents"])
            if theirs is None:
                return {}
            given = {name: tensor for name, tensor in tensors.items() if name in wanted}
            changed: dict[str, object] = theirs(pipe, step, timestep, given)
            return changed

        inputs = wanted if "latents" in wanted else [*wanted, "latents"]
        return {
            **arguments,
            "callback_on_step_end": check_and_call,
            _INPUTS: inputs,
        }

    def _half_weights(self) -> list[Weight]:
        """Return what a call in float32 casts: all but a VAE that gets its pictures in half precision anyway."""
        needs = family_of(self._pipe).vae_dtypes.get(type(self._pipe).__name__, "float32")
        modules = [m for name, m in modules_of(self._pipe).items() if name != "vae" or needs == "float32"]
        return [weight for module in modules for weight in weights_of(module) if weight.tensor.dtype in _HALF]

    def _no_rerun_reason(self) -> str | None:
        """Return why the call cannot be made again in float32; None if it can."""
        if not self._rerun:
            return "CheckFinite(rerun=False) makes no second try: use bfloat16 or float32"
        if any(hasattr(t, "__tensor_flatten__") for m in modules_of(self._pipe).values() for t in m.parameters()):
            return "Quantized weights cannot be computed in float32: quantize fewer layers (exclude=...), or none"
        if not self._half_weights():
            return "The weights are float32 already, so the checkpoint or the arguments are at fault"
        return None


class _HasDtype(Protocol):
    dtype: torch.dtype


class _Decode(StandInMethod):
    """A VAE's ``decode`` that looks at what it returns."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        result = self.call_inner(*args, **kwargs)
        dtype = cast(_HasDtype, self.owner).dtype
        require_finite(result[0], f"the pixels that the VAE decoded in {_name(dtype)}")
        return result


class _Noise:
    """The state of all generators a call draws from."""

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None) -> None:
        given = generator if isinstance(generator, list) else [generator]
        self._states = [(g, g.get_state()) for g in given if g is not None]
        self._global = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def rewind(self) -> None:
        """Let the next call draw the same noise."""
        for generator, state in self._states:
            generator.set_state(state)
        torch.set_rng_state(self._global)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


def _tells_step_ends(pipe: Pipeline) -> bool:
    """Return whether calls of `pipe` take a callback that gets the latents after every step."""
    takes = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
    return takes and "latents" in getattr(type(pipe), "_callback_tensor_inputs", ("latents",))


def _classes_asked(pipe: Pipeline) -> tuple[Any, ...]:
    """Return the classes of callbacks that this pipeline itself asks what they read, whatever the argument says.

    Not all pipelines do. Those that do have imported the classes for it.
    """
    names = inspect.unwrap(type(pipe).__call__).__globals__
    return tuple(names[name] for name in ("PipelineCallback", "MultiPipelineCallbacks") if name in names)


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise if `tensor` of any shape holds a number that is not finite; `what` says which tensor it is."""
    if bool(torch.isfinite(tensor).all()):
        return
    nans, bad = int(torch.isnan(tensor).sum()), int((~torch.isfinite(tensor)).sum())
    raise _NotFiniteError(f"{what} hold {nans} NaN and {bad - nans} infinite numbers of {tensor.numel()}")


def _in_float32(value: object) -> object:
    if isinstance(value, list):
        return [_in_float32(item) for item in value]
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Choose a preset for a machine and say why this one, and why none of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ernie_accel.common.language import listed, localized, one_of, said, say
from ernie_accel.common.text import html_lines, html_table, human_bytes
from ernie_accel.core.components import AnyPipeline, Pipeline
from ernie_accel.core.context import OPTIONAL_PACKAGES, Context
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.hardware import hardware_called
from ernie_accel.core.plan import Plan, check_pipeline, compose, plan_request
from ernie_accel.core.preset import Preset
from ernie_accel.core.transform import Transform
from ernie_accel.families import family_of
from ernie_accel.families.ernie_image import ERNIE_IMAGE
from ernie_accel.families.published import published
from ernie_accel.plugins import load_plugins
from ernie_accel.recipes.presets import presets
from ernie_accel.transforms.calls.call_defaults import MODES
from ernie_accel.transforms.denoiser.fuse_kernels import FuseKernels
from ernie_accel.transforms.weights.cast_dtype import CastDtype
from ernie_accel.transforms.weights.quantize import Quantize


@dataclass(frozen=True)
class Rung:
    """One precision of the ladder, and where it pays. The transforms decide what can run, not this table.

    Attributes:
        precision: `Preset.precision` of the presets on it.
        why: Why it is worth having.
        devices: Device types.
        capability: Lowest and highest CUDA compute capability, inclusive; None: any.
        package: Optional package that its transforms need, or None.
    """

    precision: str
    why: str
    devices: tuple[str, ...]
    capability: tuple[tuple[int, int], tuple[int, int]] | None = None
    package: str | None = None

    def problems(self, context: Context) -> list[str]:
        """Return every reason why this is not for the machine of `context`."""
        if context.device not in self.devices:
            return [
                said("pays on {devices}, and this is {device}", devices=listed(self.devices), device=context.device)
            ]
        reasons = []
        if self.capability is not None and context.device == "cuda":
            low, high = self.capability
            have = context.capability or (0, 0)
            if not low <= have <= high:
                least, most, found = ("{}.{}".format(*each) for each in (low, high, have))
                to = said("{least} to {most}", least=least, most=most)
                wanted = said("{least} and above", least=least) if high == _ANY else to
                template = "pays on CUDA compute capability {wanted}; this device has {found}"
                reasons.append(said(template, wanted=wanted, found=found))
        return reasons + _missing(context, self.package)


_ANY = (99, 9)
_FOUR_BITS = ("nvfp4", "nf4", "fp4", "int4")
#: Slots that a preset can do without and still give the precision it is named after.
_NOT_PRECISION = frozenset({"blocks", "call-defaults", "compile", "graphs", "layout", "prompt-encoding", "vae-compile"})

#: What a process needs on a device beside large weights, for a picture of 1024x1024; the memory planner works it out.
_BESIDE = int(3.5 * 2**30)

#: From the fastest down; the first that pays here and can run here is recommended. nvfp4 is left to the user: it is
#: faster than fp8 where it can run, and the loss can be seen.
LADDER: tuple[Rung, ...] = (
    Rung("fp8", said("half the bytes of bf16, multiplied in fp8"), ("cuda",), ((8, 9), _ANY), "triton"),
    Rung("int8", said("half the bytes of bf16, multiplied in int8"), ("cuda",), ((8, 6), (8, 8)), "torchao"),
    Rung("bf16", said("the checkpoint's own precision on tensor cores"), ("cuda", "npu"), ((8, 0), _ANY)),
    Rung("fp16", said("tensor cores of this generation know no bfloat16"), ("cuda",), ((7, 0), (7, 9))),
    Rung("q4", said("a quarter of the bytes: for memory and not for speed"), ("cuda",), ((7, 5), _ANY), "bitsandbytes"),
    Rung(
        "fp32",
        said("few CPUs have bfloat16 units; `ernie-accel demo` measures this one"),
        ("cpu", "npu", "cuda"),
    ),
)


@dataclass(frozen=True)
class Recommendation:
    """A preset and why. Printing it explains the choice; pass `preset` to ``optimize``.

    Attributes:
        preset: The preset.
        context: The machine it is for.
        why: Reasons for it.
        rejected: Presets that come before it and are not for this machine or pipe, each with its reasons.
        warnings: What to expect although it is the best choice.
    """

    preset: Preset
    context: Context
    why: tuple[str, ...]
    rejected: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [self._heading(), *self._about()]
        if self.rejected:
            lines.append(say("Not:"))
        for name, reasons in self.rejected.items():
            lines += [say("  {first}: {second}", first=name, second=reason) for reason in reasons]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return what notebooks show."""
        rows = [(name, localized(reason)) for name, reasons in self.rejected.items() for reason in reasons]
        table = html_table((say("not"), say("because")), rows) if rows else ""
        return html_lines(self._about(), self._heading()) + table

    def _heading(self) -> str:
        return say("Recommended on {machine}: preset {name!r}", machine=self.context.localized(), name=self.preset.name)

    def _about(self) -> Iterator[str]:
        yield f"  {localized(self.preset.summary)}"
        yield from (f"  + {localized(reason)}" for reason in self.why)
        yield from (f"  ! {localized(warning)}" for warning in self.warnings)


def recommend(
    context: Context | None = None, pipe: AnyPipeline | None = None, *, mode: str | None = None
) -> Recommendation:
    """Choose a preset for a machine, and for a pipe if one is given. Changes nothing and needs no accelerator.

    Args:
        context: The machine; default this one. ``Context.named("rtx3060")`` asks for another.
        pipe: With a pipe every transform is asked whether it can run on it; without one only the machine is judged,
            and memory by the size of ERNIE-Image.
        mode: "turbo" for a distilled checkpoint, "quality" for a base one. A pipe does not show which it is; None
            is "turbo" unless the pipe's family has no distilled checkpoint.

    Raises:
        UnknownNameError: There is no such mode.
    """
    check_mode(mode)
    load_plugins()
    checked = check_pipeline(pipe) if pipe is not None else None
    family = family_of(checked)
    if mode is None:
        mode = "turbo" if "turbo" in family.modes else next(iter(family.modes), "turbo")
    samplers = one_of(f"SwapScheduler({name!r})" for name in family.schedulers)
    template = "{family}'s guides sample with {samplers}: pass it beside the preset"
    advice = (said(template, family=family.name, samplers=samplers),) if samplers else ()
    machine = context or Context.detect(checked)
    rejected: dict[str, tuple[str, ...]] = {}
    candidates = [(*candidate, _refused(checked, candidate[0], machine)) for candidate in _candidates(machine, mode)]
    # First what runs whole; else what gives the precision at least, with the rest of the preset left out.
    for allowed in (frozenset[str](), _NOT_PRECISION):
        rejected.clear()
        for preset, why, problems, refused in candidates:
            if not problems and refused is not None and {transform.slot for transform in refused} <= allowed:
                left_out = [
                    said("pass on_unsupported='skip', which leaves out {line}", line=line) for line in _lines(refused)
                ]
                warnings = (*left_out, *_without_family(checked, preset), *_memory_warnings(checked, preset, machine))
                return Recommendation(preset, machine, why + advice, MappingProxyType(rejected), warnings)
            rejected[preset.name] = (
                (*problems, *_lines(refused)) if refused is not None else (said("the pipe cannot run"),)
            )
    last = machine.not_supported or said("nothing else can run")
    return Recommendation(presets["exact"], machine, (last,), MappingProxyType(rejected))


def check_mode(mode: str | None) -> None:
    """Refuse a mode that `recommend` does not know.

    Raises:
        UnknownNameError: It is neither None nor one of `MODES`.
    """
    if mode not in (None, *MODES):
        raise UnknownNameError("mode", mode, MODES)


def _candidates(machine: Context, mode: str) -> list[tuple[Preset, tuple[str, ...], list[str]]]:
    """Return (preset, why, what speaks against it on this machine), in the order in which they are considered.

    The card's own comes first. Before it stand only faster ones that cannot run here, so that the reader learns why.
    """
    found: list[tuple[Preset, tuple[str, ...], list[str]]] = []
    rungs, row = _by_precision(machine, mode), hardware_called(machine.device_name, machine.memory_bytes)
    own = None if row is None or row.preset is None else presets[row.preset]
    if row is not None and own is not None and mode == own.mode:
        package = next((rung.package for rung in LADDER if rung.precision == own.precision), None)
        found.append((own, (said("{first}: {second}", first=row.name, second=row.why),), _missing(machine, package)))
    precisions = [rung.precision for rung in LADDER]
    faster = precisions[: precisions.index(own.precision)] if found and own and own.precision in precisions else []
    ahead = 0
    for rung in LADDER:
        preset = rungs.get(rung.precision)
        if preset is None or preset.name in {other.name for other, _, _ in found}:
            continue
        problems = rung.problems(machine)
        at = ahead if rung.precision in faster and problems else len(found)
        found.insert(at, (preset, (rung.why,), problems))
        ahead += at < len(found) - 1
    return found


def _by_precision(machine: Context, mode: str) -> dict[str | None, Preset]:
    """Return the presets of a mode: those made for this type of device where there are any, else those for all."""
    of_mode = [preset for preset in presets.values() if preset.mode == mode]
    made_for = {preset.device for preset in of_mode}
    device = machine.device if machine.device in made_for else None
    return {preset.precision: preset for preset in of_mode if preset.device == device}


def _missing(context: Context, package: str | None) -> list[str]:
    """Return the reason why `package` cannot be imported; empty if it can, or if none is needed."""
    if package is None or package in context.versions:
        return []
    if package in OPTIONAL_PACKAGES:
        return context.missing(package)
    return [
        said("{package} is not installed (it comes with CUDA builds of torch): pip install {package}", package=package)
    ]


def _without_family(pipe: Pipeline | None, preset: Preset) -> Iterator[str]:
    """Yield what of a preset a pipe of no known family does without, and why."""
    if pipe is not None:
        for transform in preset.transforms_on(pipe):
            yield from (
                said("does without {transform}: {reason}", transform=repr(transform), reason=reason)
                for reason in transform.family_reasons(pipe)
            )


def _refused(pipe: Pipeline | None, preset: Preset, machine: Context) -> Mapping[Transform, tuple[str, ...]] | None:
    """Return the transforms that cannot run on `pipe`, with their reasons; None if the pipe cannot run at all."""
    if pipe is None:
        return {}
    the_plan = _planned(pipe, preset, machine)
    return None if the_plan.blockers else the_plan.problems


def _planned(pipe: Pipeline, preset: Preset, machine: Context) -> Plan:
    return plan_request(pipe, compose((), preset, pipe), preset, machine)


def _lines(refused: Mapping[Transform, tuple[str, ...]]) -> list[str]:
    return [
        said("{first}: {second}", first=repr(transform), second=reason)
        for transform, reasons in refused.items()
        for reason in reasons
    ]


def _memory_warnings(pipe: Pipeline | None, preset: Preset, machine: Context) -> tuple[str, ...]:
    if machine.memory_bytes is None:
        return ()
    weights = _weight_bytes(pipe, preset, machine)
    beside = 0 if machine.device == "cpu" else min(_BESIDE, weights)
    if weights + beside < machine.memory_bytes:
        return ()
    computing = said(" and about {size} for a call, graphs and the driver", size=human_bytes(beside)) if beside else ""
    too_much = said(
        "about {size} of weights{computing} do not fit into {memory}",
        size=human_bytes(weights),
        computing=computing,
        memory=human_bytes(machine.memory_bytes),
    )
    if machine.device == "cpu":
        return (
            said(
                "{too_much}: in bfloat16 they take half; load(..., prompt_enhancer=False) leaves the enhancer out",
                too_much=too_much,
            ),
        )
    return (
        said(
            "{too_much}: leave the pipe on the CPU; optimize(pipe, preset=..., memory='auto') brings it to the "
            "device in the fastest way that fits",
            too_much=too_much,
        ),
    )


def _weight_bytes(pipe: Pipeline | None, preset: Preset, machine: Context) -> int:
    """Return the bytes of all weights afterwards: planned on the pipe, or estimated for ERNIE-Image."""
    if pipe is not None:
        the_plan = _planned(pipe, preset, machine)
        sizes = [step.planned.nbytes for step in the_plan.steps if step.planned is not None]
        return sizes[-1] if sizes else the_plan.bytes_before
    sizes_bf16 = dict(ERNIE_IMAGE.weight_bytes)
    quantized = any(
        isinstance(transform, Quantize) or (isinstance(transform, FuseKernels) and transform.precision == "fp8")
        for transform in preset.transforms
    )
    cast = any(isinstance(transform, CastDtype) for transform in preset.transforms)
    transformer = sizes_bf16.pop("transformer")
    if any(isinstance(transform, Quantize) and transform.scheme in _FOUR_BITS for transform in preset.transforms):
        transformer //= 4
    elif quantized:
        transformer //= 2
    in_bf16 = transformer + sum(sizes_bf16.values())
    return in_bf16 if cast else 2 * in_bf16


def fitting_preset(context: Context, pipe: AnyPipeline | None = None, *, model: str | None = None) -> Preset:
    """Return the preset that pays most on a machine and can run there, as `recommend` does.

    Args:
        context: The machine.
        pipe: See `recommend`.
        model: Its hub id, where it has one: of a published checkpoint it shows the mode that it was made for.
    """
    return recommend(context, pipe, mode=mode_of(model)).preset


def mode_of(model: str | None) -> str | None:
    """Return the mode that a published checkpoint was made for; None for anything else, a folder for instance."""
    checkpoint = None if model is None else published(model)
    return None if checkpoint is None else checkpoint.mode

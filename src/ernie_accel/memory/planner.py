"""Choose where the weights of a pipe live, and in how many bits, so that a call fits; from the fastest way down."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ernie_accel.common.language import listed, localized, said, say
from ernie_accel.common.text import html_lines, html_table, human_gib, table
from ernie_accel.core.components import PROMPT_COMPONENTS, Pipeline, device_of, modules_of, pipe_bytes
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.hardware import GIB, hardware_called
from ernie_accel.core.plan import Plan, compose, plan_request
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.preset import Preset
from ernie_accel.core.transform import Transform
from ernie_accel.families import family_of
from ernie_accel.memory.call import Call
from ernie_accel.memory.stages import BETWEEN, POOLS, ROUNDING, UNKNOWN, Stage, activations_of, weights_by_stage
from ernie_accel.transforms.calls.call_defaults import CallDefaults
from ernie_accel.transforms.calls.explain_out_of_memory import ExplainOutOfMemory
from ernie_accel.transforms.calls.few_steps import FewSteps
from ernie_accel.transforms.denoiser.fuse_kernels import FuseKernels
from ernie_accel.transforms.vae.slices_and_tiles import TileVae
from ernie_accel.transforms.weights.move_to import MoveTo
from ernie_accel.transforms.weights.quantize import Quantize
from ernie_accel.transforms.weights.residency import Residency, least_weights

#: What a process cannot have of a card: the driver's share, and the desktop's.
TAKEN = int(0.7 * GIB)
#: What a process takes later outside torch's allocator: code of kernels, workspaces.
_LATER = 256 * 2**20
_NOT_KEPT = said("no unquantized weights wait in host memory: restore() cannot bring them back")
#: Slots that say where weights live: who fills one has chosen.
_PLACING = ("offload", "device", "free-after-use")
_UNITS = {"gib": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6}


_HEADER, _FIGURES = ("stage", "weights", "computing", "in use"), frozenset({1, 2, 3})


@dataclass(frozen=True)
class MemoryPlan:
    """Where weights will live and what the device will hold, stage by stage; print it.

    Attributes:
        call: What it is for.
        budget: Bytes of device memory that the process may use; None where it is not known.
        stages: What the device holds in each stage.
        spare: Bytes that captured graphs and the allocator hold beyond what is in use.
        host: Bytes of host memory for what is not on the device.
        transforms: What was chosen, to be applied beside what was asked for.
        why: The reasons, one a line.
        fits: Whether it fits the budget.
    """

    call: Call
    budget: int | None
    stages: tuple[Stage, ...]
    spare: int
    host: int
    transforms: tuple[Transform, ...]
    why: tuple[str, ...]
    fits: bool

    @property
    def peak(self) -> int:
        """Bytes in use in the stage that needs most."""
        return max((stage.total for stage in self.stages), default=0)

    @property
    def needed(self) -> int:
        """Bytes that the process needs: `peak` and `spare`."""
        return self.peak + self.spare

    @property
    def least(self) -> str:
        """The smallest budget that it fits, as `memory` takes it."""
        return f"{math.ceil(self.needed / GIB * 100) / 100:.2f}GiB"

    def to_json(self) -> dict[str, Any]:
        """Return plain data, in bytes."""
        stages = [asdict(stage) | {"total": stage.total} for stage in self.stages]
        return {
            "call": asdict(self.call),
            "budget": self.budget,
            "needed": self.needed,
            "peak": self.peak,
            "spare": self.spare,
            "host": self.host,
            "stages": stages,
            "chosen": [transform.to_json() for transform in self.transforms],
            "why": list(self.why),
            "fits": self.fits,
        }

    def __str__(self) -> str:
        header = tuple(map(say, _HEADER))
        return "\n".join([self._heading(), table(header, self._rows(), _FIGURES), *self._about()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return what notebooks show."""
        rows = html_table(tuple(map(say, _HEADER)), self._rows(), _FIGURES)
        return html_lines((), self._heading()) + rows + html_lines(self._about())

    def _heading(self) -> str:
        return say(
            "Memory for {call}: {needed}{budget}: {verdict}",
            call=self.call.said(),
            needed=human_gib(self.needed),
            budget="" if self.budget is None else said(" of {budget} it may use", budget=human_gib(self.budget)),
            verdict=said("fits") if self.fits else said("does NOT fit"),
        )

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for stage in self.stages:
            computing = say("unknown") if stage.activations is None else human_gib(stage.activations + BETWEEN)
            yield say(stage.name), human_gib(stage.weights), computing, human_gib(stage.total)

    def _about(self) -> Iterator[str]:
        yield say(
            "Peak in use {peak}, and {spare} for graphs and the allocator.",
            peak=human_gib(self.peak),
            spare=human_gib(self.spare),
        )
        if self.host:
            yield say("Host memory for what is not on the device: {host}.", host=human_gib(self.host))
        yield from (f"  + {localized(reason)}" for reason in self.why)
        if not self.fits:
            yield say("The smallest budget that works: memory='{least}' (--memory {least}).", least=self.least)


def budget_of(memory: str | int, context: Context) -> int | None:
    """Return the bytes of device memory that a process may use.

    Args:
        memory: "auto" for what a card has, less what driver and desktop take; "12GiB" for a budget; "-2GiB" for all but
            that; or bytes.
        context: The machine.

    Raises:
        ErnieAccelError: It is none of these.
    """
    if isinstance(memory, bool) or not isinstance(memory, (str, int)):
        raise ErnieAccelError(f"memory takes 'auto', '12GiB', '-2GiB' (leave that free) or bytes, got {memory!r}")
    if isinstance(memory, int):
        if memory < 1:
            raise ErnieAccelError(f"memory takes bytes above 0, got {memory!r}")
        return memory
    if memory == "auto":
        return None if context.memory_bytes is None else context.memory_bytes - TAKEN
    found = re.fullmatch(r"(-?)(\d+(?:\.\d+)?)\s*([a-z]+)", memory.strip().lower())
    if found is None or found.group(3) not in _UNITS:
        fix = f"; write {memory.strip()}GiB" if re.fullmatch(r"\d+(\.\d+)?", memory.strip()) else ""
        raise ErnieAccelError(f"memory takes 'auto', '12GiB', '-2GiB' (leave that free) or bytes, got {memory!r}{fix}")
    nbytes = int(float(found.group(2)) * _UNITS[found.group(3)])
    if not found.group(1):
        return nbytes
    if context.memory_bytes is None:
        raise ErnieAccelError(f"memory={memory!r} leaves some free, and how much {context} has is not known")
    return context.memory_bytes - nbytes


def plan_memory(
    pipe: Pipeline,
    transforms: Iterable[Transform],
    preset: Preset | None,
    context: Context,
    memory: str | int = "auto",
    call: Call | None = None,
    device: str | None = None,
    free: int | None = None,
) -> MemoryPlan:
    """Choose the fastest way in which a call fits. Changes nothing and needs no device and no weights.

    What the user chose wins: components that are to be quantized stay so, and where a transform says where weights live
    (`Offload`, `MoveTo`, `Residency`, `FreeAfterUse`), nothing is chosen and only the memory is worked out.

    Args:
        pipe: As it is now; one made by `skeleton` will do.
        transforms: The user's, beside the preset.
        preset: The preset, if one was named.
        context: The machine.
        memory: See `budget_of`.
        call: What will be asked of the pipe; default: one picture of 1024x1024.
        device: What torch calls the device, "cuda:1"; default: the context's, without a number.
        free: Bytes that can be had there now, see `free_on_device`. A budget relative to what the card has is no more
            than that; one in bytes stays. None: not asked.

    Raises:
        ErnieAccelError: Nothing fits; the error says how much would be needed at least, stage by stage.
    """
    own = tuple(transforms)
    call, budget = call or Call(), budget_of(memory, context)
    shared: tuple[str, ...] = ()
    if free is not None and budget is not None and is_relative(memory) and free < budget:
        held = human_gib(budget - free)
        shared = (said("other work on the card holds {held} of what it may use otherwise", held=held),)
        budget = free
    wanted = compose(own, preset, pipe)
    call = replace(call, guidance=_is_guided(pipe, wanted)) if call.guidance is None else call
    best: MemoryPlan | None = None
    activations: dict[str, int | None] = {}
    for tiles, why in _tilings(pipe, wanted, own, context):
        if tiles and (best is None or max(best.stages, key=lambda stage: stage.total).name != "decode"):
            continue
        with_tiles = compose((*own, *tiles), preset, pipe)
        before = activations.get("decode")
        known = {name: need for name, need in activations.items() if name != "decode"}  # all that tiles change
        activations = activations_of(pipe, with_tiles, context, call, known)
        if before is not None and (activations["decode"] or 0) >= before:
            continue  # the picture is no larger than a tile
        for found in _placings(pipe, own, tiles, preset, context, call, device, budget, activations):
            found = replace(found, why=(*shared, *why, *found.why))
            if found.fits:
                return found
            if best is None or found.needed < best.needed:
                best = found
    if best is None:
        raise ErnieAccelError("no way to place the weights can run here; see plan(pipe, ...) for the reasons")
    return best


def _tilings(
    pipe: Pipeline, wanted: tuple[Transform, ...], own: tuple[Transform, ...], context: Context
) -> Iterator[tuple[tuple[Transform, ...], tuple[str, ...]]]:
    """Yield how pictures may be decoded, and why: whole, then in smaller and smaller tiles."""
    yield (), ()
    if _placed_by_request(wanted, own) or any(isinstance(each, TileVae) for each in wanted):
        return
    for tiles in (TileVae(), TileVae(tile_px=512)):
        if not tiles.unsupported(pipe, context) and tiles.preview(pipe, context).changes:
            size = said(" of {pixels} pixels", pixels=tiles.tile_px) if tiles.tile_px else ""
            why = said("pictures decoded in tiles{size}, as nothing else fits: their seams may show", size=size)
            yield (tiles,), (why,)


def _placings(
    pipe: Pipeline,
    own: tuple[Transform, ...],
    tiles: tuple[Transform, ...],
    preset: Preset | None,
    context: Context,
    call: Call,
    device: str | None,
    budget: int | None,
    activations: dict[str, int | None],
) -> Iterator[MemoryPlan]:
    """Yield the plans of all ways to place the weights that can run here, from the fastest down."""
    wanted = compose((*own, *tiles), preset, pipe)
    for chosen, why in _candidates(pipe, wanted, own, context, device or context.torch_device, budget, activations):
        chosen = (*tiles, *chosen)
        the_plan = plan_request(pipe, compose((*own, *chosen), preset, pipe), preset, context)
        if any(isinstance(each, Residency) for each in chosen) and (lean := tuple(_without_originals(the_plan, own))):
            chosen, why = (*chosen, *lean), (*why, _NOT_KEPT)
            the_plan = plan_request(pipe, compose((*own, *chosen), preset, pipe), preset, context)
        found = _judge(pipe, the_plan, chosen, why, context, call, budget, activations)
        if found is not None:
            yield found


def _is_guided(pipe: Pipeline, transforms: Iterable[Transform]) -> bool:
    """Return whether calls will denoise each picture twice, because classifier-free guidance is their default."""
    scale = None
    for transform in transforms:
        if isinstance(transform, CallDefaults):
            mode = family_of(pipe).modes.get(transform.mode or "")
            scale = transform.guidance_scale
            scale = mode.guidance_scale if scale is None and mode is not None else scale
        if isinstance(transform, FewSteps):
            scale = transform.wanted(pipe)["guidance_scale"]
    if scale is None and family_of(pipe).is_known:  # elsewhere the argument may mean something else, as FLUX's does
        parameter = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
        scale = None if parameter is None else parameter.default
    return isinstance(scale, (int, float)) and scale > 1


def is_relative(memory: str | int) -> bool:
    """Return whether a budget is relative to what a card has: "auto", or "-2GiB"."""
    return isinstance(memory, str) and (memory == "auto" or memory.strip().startswith("-"))


def free_on_device(pipe: Pipeline, device: str) -> int | None:
    """Return the bytes of device memory that this process could have for a pipe now; None where torch does not say.

    What the pipe has there already counts as free, and so does what torch's allocator keeps without using it.

    Args:
        pipe: The pipe.
        device: What torch calls the device.
    """
    there = torch.device(device)
    if there.type != "cuda" or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(there)
    cached = torch.cuda.memory_reserved(there) - torch.cuda.memory_allocated(there)
    own = pipe_bytes(pipe) if device_of(pipe).type == "cuda" else 0
    return max(1, free + cached + own - _LATER)


def available_on_host() -> int | None:
    """Return the bytes of host memory that this machine could give a process now; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(size) * 1024 for size in sizes), None)


def check_fits(found: MemoryPlan, host: int | None = None) -> MemoryPlan:
    """Return a plan that fits.

    Args:
        found: The plan.
        host: Bytes of host memory that can be had; None: not asked.

    Raises:
        ErnieAccelError: It does not; the error shows the least that would.
    """
    if found.fits and host is not None and found.host > host:
        raise ErnieAccelError(
            f"there is not enough host memory: {human_gib(found.host)} are needed for weights that are not on the "
            f"device, and {human_gib(host)} can be had.\n{found}\nMore device memory (memory=) leaves less to the host."
        )
    if found.fits:
        return found
    raise ErnieAccelError(
        f"this does not fit: {human_gib(found.needed)} are needed at least, and the process may use "
        f"{human_gib(found.budget or 0)}.\n{found}\n"
        "Smaller pictures, fewer at once, or a preset with fewer bits need less."
    )


def places(transform: Transform) -> bool:
    """Return whether a transform says where weights live."""
    return transform.slot in _PLACING or getattr(transform, "device", None) is not None


def _placed_by_request(wanted: Iterable[Transform], own: tuple[Transform, ...]) -> bool:
    """Return whether the user, or more than a preset's `MoveTo`, says where weights live."""
    return any(places(each) for each in wanted if each in own or not isinstance(each, MoveTo))


def _candidates(
    pipe: Pipeline,
    wanted: tuple[Transform, ...],
    own: tuple[Transform, ...],
    context: Context,
    device: str,
    budget: int | None,
    activations: dict[str, int | None],
) -> Iterator[tuple[tuple[Transform, ...], tuple[str, ...]]]:
    """Yield what might be chosen, and why, from the fastest down."""
    if _placed_by_request(wanted, own):
        yield (), (said("the request says where the weights live"),)
        return
    move = (MoveTo(device),)
    stays = said("everything stays on the device")
    if any(map(places, wanted)):  # the preset's own, which a chosen `Residency` could not replace
        yield move, (said("{stays}: the preset moves it there as a whole", stays=stays),)
        return
    yield move, (stays,)
    eight = _eight_bits(pipe, wanted, context)
    lossy = any(
        isinstance(each, Quantize) or (isinstance(each, FuseKernels) and each.precision == "fp8") for each in wanted
    )
    less = (
        said("{names} in 8 bits ({scheme})", names=listed(eight[0].components), scheme=eight[0].scheme) if eight else ""
    )
    if budget is None:
        return
    most = max((UNKNOWN if need is None else need for need in activations.values()), default=0)
    # Without any room it does not fit, and the least that would is still to be found: `_judge` knows it.
    room = max(1, budget - most - BETWEEN - _spare(wanted, activations))
    keep: tuple[Transform, ...] = (Residency(room, device=device),)
    fetched = _fetched(room)
    ways: list[tuple[tuple[Transform, ...], tuple[str, ...]]] = []
    if eight:
        ways.append(((*eight, *move), (less, stays)))
    ways.insert(len(ways) if lossy else 0, (keep, (fetched,)))
    if eight:
        ways.append(((*eight, *keep), (less, fetched)))
    yield from ways


def _without_originals(the_plan: Plan, own: tuple[Transform, ...]) -> Iterator[Transform]:
    """Yield what the preset quantizes with, but without keeping in host memory what it replaces."""
    for step in the_plan.steps:
        each, keeps = step.transform, step.planned is not None and step.planned.kept_on_host > 0
        if each in own or not keeps or step.verdict != "apply":
            continue
        if isinstance(each, (Quantize, FuseKernels)) and each.keep_originals:
            yield replace(each, keep_originals=False)


def _eight_bits(pipe: Pipeline, wanted: Iterable[Transform], context: Context) -> tuple[Quantize, ...]:
    """Return what quantizes the prompt components that nobody has chosen a precision for; empty if there are none."""
    taken = {name for each in wanted if isinstance(each, Quantize) for name in each.components}
    left = tuple(name for name in modules_of(pipe) if name in PROMPT_COMPONENTS and name not in taken)
    if not left or context.torch_device != "cuda":
        return ()
    scheme = "fp8-weight-only" if (context.capability or (0, 0)) >= (8, 9) else "int8-weight-only"
    return (Quantize(scheme, components=left, keep_originals=False),)


def _spare(transforms: Iterable[Transform], activations: dict[str, int | None]) -> int:
    slots = {each.slot for each in transforms}
    if "graphs" in slots:  # they keep what a step computes for themselves, while others decode
        return max(POOLS, activations.get("denoise") or 0)
    return POOLS if slots & {"text-encoder", "enhancer"} else ROUNDING


def _judge(
    pipe: Pipeline,
    the_plan: Plan,
    chosen: tuple[Transform, ...],
    why: tuple[str, ...],
    context: Context,
    call: Call,
    budget: int | None,
    activations: dict[str, int | None],
) -> MemoryPlan | None:
    """Return what one choice needs; None if it cannot run."""
    mine = {step.transform for step in the_plan.steps if step.verdict == "unsupported"} & set(chosen)
    planned = next((step.planned for step in reversed(the_plan.steps) if step.planned is not None), None)
    planned = PlannedPipe.of(pipe) if planned is None else planned
    keeps = [step.transform for step in the_plan.steps if isinstance(step.transform, Residency)]
    kept = keeps[0].weights if keeps else None
    if kept is not None and kept < (least := least_weights(pipe, planned)):
        why = tuple(_fetched(least) if reason == _fetched(kept) else reason for reason in why)
        chosen = tuple(replace(each, weights=least) if isinstance(each, Residency) else each for each in chosen)
        kept, mine = least, set()
    if mine:
        return None
    by_stage = weights_by_stage(planned, activations, kept)
    stages = tuple(Stage(name, by_stage[name], need) for name, need in activations.items())
    transforms = [step.transform for step in the_plan.steps]
    spare = _spare(transforms, activations)
    unknown = [name for name, need in activations.items() if need is None]
    if unknown:
        left = "what {names} computes is not known of this pipeline: {size} are left for it"
        why = (*why, said(left, names=listed([said(name) for name in unknown]), size=human_gib(UNKNOWN)))
    host = planned.kept_on_host
    if kept is not None and kept < planned.nbytes:
        layout = replace(keeps[0], weights=kept).layout(pipe, planned)
        host += sum(layout.sizes[name] for name in layout.moving)
        why = (*why, *_cost(layout.fetched(_turns(pipe, planned)), context))
    elif planned.offload is not None:
        host += planned.nbytes
    if planned.kept_on_host:
        waiting = human_gib(planned.kept_on_host)
        why = (*why, said("{size} of unquantized weights wait in host memory for restore()", size=waiting))
    found = MemoryPlan(call, budget, stages, spare, host, chosen, why, fits=True)
    if chosen:
        found = replace(found, transforms=(*chosen, ExplainOutOfMemory(predicted=found.needed)))
    return replace(found, fits=budget is None or found.needed <= budget)


def _fetched(weights: int) -> str:
    return said("weights within {size}, the rest fetched from the host in turn", size=human_gib(weights))


def _turns(pipe: Pipeline, planned: PlannedPipe) -> list[tuple[str, int]]:
    steps = planned.num_inference_steps or 1
    names = [name for name in modules_of(pipe) if name != "vae"]
    prompts = [name for name in PROMPT_COMPONENTS if name in names]
    order = (["pe"] if "pe" in prompts else []) + [name for name in prompts if name != "pe"]
    return [(name, 1) for name in order] + [(name, steps) for name in names if name not in prompts]


def _cost(fetched: int, context: Context) -> Iterator[str]:
    row = hardware_called(context.device_name)
    rate = None if row is None else row.host_gb_s
    if fetched:
        link = ": {seconds:.2f} s of its link, at {rate:g} GB/s"
        time = "" if rate is None else said(link, seconds=fetched / rate / 1e9, rate=rate)
        yield said("{size} come from the host for each picture{time}", size=human_gib(fetched), time=time)

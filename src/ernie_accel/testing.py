"""Contracts that a transform, a family or a quantization backend has to keep, to run in the tests of whoever wrote it.

    from ernie_accel import testing

    def test_my_transform():
        testing.check_transform(MyTransform(), make_pipe, draw)

Each check raises `ContractError` with what was promised and what was found, and returns nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ernie_accel.api import optimize, plan, report, restore
from ernie_accel.core.components import Pipeline, modules_of, pipe_bytes
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ApplyError
from ernie_accel.core.planned import CARRIED, PlannedPipe
from ernie_accel.core.transform import ROUNDING_REL, Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.turns import Turns
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import class_without
from ernie_accel.families import Family, families, family_of
from ernie_accel.models.lora_loading import reads_loras
from ernie_accel.models.rewritten import block_paths, rewritten_model
from ernie_accel.quantization.backend import SCHEMES, LinearSpec, QuantizationBackend
from ernie_accel.quantization.correction import dequantized, quantize_corrected
from ernie_accel.quantization.layers import sqnr_db
from ernie_accel.transforms import transform_from_json
from ernie_accel.transforms.denoiser.rewrite_blocks import RewriteBlocks

__all__ = ["ContractError", "check_backend", "check_family", "check_transform", "differences", "snapshot"]

_PLAIN = (bool, int, float, str, type(None), dict, tuple)

#: Returns a fresh pipe, the same one each time.
MakePipe = Callable[[], Pipeline]
#: Draws with a pipe, by its own call defaults where a transform changes those, and returns the picture or the latents.
Draw = Callable[[Pipeline], torch.Tensor]


class ContractError(AssertionError):
    """A promise was not kept."""


def check_transform(transform: Transform, make_pipe: MakePipe, draw: Draw, *, context: Context | None = None) -> None:
    """Check that a transform keeps the contract of all transforms, on a pipe that it can change.

    Its repr and JSON give it back; asking changes nothing; the receipt says what the plan said, bytes included; it
    really changes the pipe, and the picture as its effect declares; twice is once; a failure after it and ``restore``
    give the original back bit for bit.

    Args:
        transform: One that has something to do on the pipe.
        make_pipe: Makes the pipe.
        draw: Draws with it, always from the same seed. For RESAMPLES it must leave to the pipe what is changed.
        context: The machine; default this one.

    Raises:
        ContractError: The first promise that was not kept.
    """
    name = repr(transform)
    _same(transform_from_json(_through_json(transform), known=(type(transform),)), transform, f"{name}: JSON and back")

    pipe = make_pipe()
    machine = context or Context.detect(pipe)
    original = draw(pipe)  # a first call leaves attributes on a pipe
    _same(bool(torch.equal(draw(pipe), original)), True, "draw: the same picture twice")
    before = snapshot(pipe)
    (step,) = plan(pipe, transform, context=machine).steps
    _same(differences(before, snapshot(pipe)), [], f"{name}: asking changes nothing")
    _same(step.reasons, (), f"{name}: it can run here")
    if step.preview is None or not step.preview.changes or step.planned is None:
        raise ContractError(f"{name}: it would change nothing on this pipe; use a pipe that it changes")

    size = pipe_bytes(pipe)
    optimize(pipe, transform, context=machine)
    (entry,) = report(pipe).entries
    if entry.applied is None:
        raise ContractError(f"{name}: the plan said it would be applied, and it was not")
    _same(entry.applied.changed, step.preview.changes, f"{name}: the receipt says what the plan said")
    _same(entry.applied.bytes_after, step.planned.nbytes, f"{name}: bytes are what was planned")
    _same(pipe_bytes(pipe), entry.applied.bytes_after, f"{name}: bytes are what the receipt says")
    _same(size, entry.applied.bytes_before, f"{name}: bytes before are what the receipt says")
    if not differences(before, snapshot(pipe)):
        raise ContractError(f"{name}: the receipt lists {entry.applied.changed}, and nothing of the pipe is changed")
    _check_effect(transform, draw(pipe), original)

    once = snapshot(pipe)
    optimize(pipe, transform, context=machine)
    _same(differences(once, snapshot(pipe)), [], f"{name}: twice is once")
    if entry.applied.undo is None:
        return
    restore(pipe)
    _same(bool(torch.equal(draw(pipe), original)), True, f"{name}: the restored pipe draws the original picture")
    _same(differences(before, snapshot(pipe)), [], f"{name}: restore gives the original back")
    with contextlib.suppress(ApplyError):
        optimize(pipe, transform, _Breaks(), context=machine)
    _same(differences(before, snapshot(pipe)), [], f"{name}: a failure after it undoes it")


def _check_effect(transform: Transform, after: torch.Tensor, before: torch.Tensor) -> None:
    name, effect = repr(transform), transform.effect
    equal = after.shape == before.shape and bool(torch.equal(after, before))
    if effect is Effect.RESAMPLES:
        if equal:
            raise ContractError(f"{name} resamples, so another picture is expected, and this one is equal bit for bit")
        return
    if after.shape != before.shape:
        raise ContractError(f"{name}: shape {tuple(before.shape)} became {tuple(after.shape)}")
    if effect is Effect.EXACT and not equal:
        raise ContractError(f"{name} is exact, and the picture differs by {_distance(after, before):.1e} (relative L2)")
    if effect is Effect.ROUNDING:
        limit = ROUNDING_REL[str(before.dtype).removeprefix("torch.")]
        if (distance := _distance(after, before)) > limit:
            raise ContractError(
                f"{name} only rounds, so at most {limit:.0e} is expected; the distance is {distance:.1e}"
            )
    if effect is Effect.LOSSY:
        floor = transform.floor_db
        if floor is None:
            raise ContractError(f"{name} is lossy and declares no floor_db")
        if (found := -20 * math.log10(max(_distance(after, before), 1e-20))) < floor:
            raise ContractError(f"{name} promises {floor:g} dB, and the picture has {found:.1f}")


def check_family(family: Family, make_pipe: MakePipe, draw: Draw) -> None:
    """Check that a family fits the pipe it is meant for, and that its rewritten blocks, if any, compute the same.

    Args:
        family: Registered already, or not.
        make_pipe: Makes a pipe of that family; a tiny one will do.
        draw: Draws with it, always from the same seed.

    Raises:
        ContractError: The first promise that was not kept.
    """
    pipe = make_pipe()
    if family not in families():
        raise ContractError(f"{family.name}: register it first, by ernie_accel.register_family(...)")
    _same(family_of(pipe), family, f"{family.name}: the pipe is found to be of this family")
    parameters = inspect.signature(type(pipe.transformer).forward).parameters
    if family.text_argument is not None:
        _same(family.text_argument in parameters, True, f"{family.name}: the forward takes {family.text_argument!r}")
    for component in family.keep_precise:
        _same(component in modules_of(pipe), True, f"{family.name}: keep_precise names a component, {component!r}")
    for mode, settings in family.modes.items():
        _same(settings.num_inference_steps > 0, True, f"{family.name}: mode {mode!r} has steps")
    for width, height in family.sizes:
        multiple = family.size_multiple
        _same(
            (width % multiple, height % multiple), (0, 0), f"{family.name}: {width}x{height} is divisible by {multiple}"
        )
    blocks = rewritten_model(pipe)
    if blocks is None:
        return
    _same(blocks.unsupported_reasons(pipe.transformer), [], f"{family.name}: the transformer can be rewritten")
    _same(len(block_paths(pipe)) > 0, True, f"{family.name}: there are blocks in {blocks.BLOCKS!r}")
    check_transform(RewriteBlocks(), make_pipe, draw)


def check_backend(backend: QuantizationBackend, *, context: Context | None = None) -> None:
    """Check that a quantization backend keeps its promises for every scheme that this machine can run.

    The weight comes back as near as the scheme promises, in the bytes that were planned; its tensors are all of it; the
    layer computes a product with that weight; nothing else is treated as a layer of this backend.

    Args:
        backend: The backend.
        context: The machine; default this one.

    Raises:
        ContractError: The first promise that was not kept.
    """
    machine = context or Context.detect()
    able = [scheme for scheme in backend.schemes if not backend.unsupported(scheme, machine)]
    if not able:
        reasons = [reason for scheme in backend.schemes for reason in backend.unsupported(scheme, machine)]
        raise ContractError(f"{backend.name}: none of its schemes can run here: {'; '.join(reasons)}")
    for scheme in able:
        what = f"{backend.name}, {scheme}"
        linear = torch.nn.Linear(128, 256, bias=True, dtype=torch.bfloat16).requires_grad_(False)
        torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
        weight, bias = linear.weight.clone(), linear.bias.clone()
        spec = LinearSpec(256, 128, torch.bfloat16, bias.numel() * bias.itemsize)
        _same(backend.layer_problem(scheme, spec), None, f"{what}: a layer of 256 x 128 can be stored")
        layer = backend.quantize(scheme, linear)
        _same(bool(torch.equal(linear.weight, weight)), True, f"{what}: the layer it was given is not changed")
        _same((backend.holds(layer), backend.holds(linear)), (True, False), f"{what}: it knows its layers from others")
        _same(_bytes(layer), backend.stored_bytes(scheme, spec), f"{what}: bytes are what was planned")
        found = sqnr_db(weight, backend.dequantize(layer).reshape(weight.shape))
        if found < SCHEMES[scheme].weight_db:
            raise ContractError(f"{what}: promises {SCHEMES[scheme].weight_db} dB of a weight, and it has {found:.1f}")
        x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
        expected = torch.nn.functional.linear(x, backend.dequantize(layer).reshape(weight.shape).to(x.dtype), bias)
        distance = _distance(layer(x), expected)
        _same(
            distance < 0.1, True, f"{what}: the layer computes x @ weight.T + bias (relative distance {distance:.2e})"
        )
        blank = backend.blank(scheme, linear)
        for name, tensor in backend.tensors(blank).items():
            tensor.copy_(backend.tensors(layer)[name])
        same = torch.equal(backend.dequantize(blank), backend.dequantize(layer))
        _same(bool(same), True, f"{what}: its tensors are all of a weight")
        if backend.takes_correction:
            corrected = quantize_corrected(backend, scheme, linear, 8)
            _same(backend.holds(corrected), True, f"{what}: it knows its layers once they are corrected")
            expected = torch.nn.functional.linear(x, dequantized(backend, corrected).to(x.dtype), bias)
            distance = _distance(corrected(x), expected)
            _same(distance < 0.1, True, f"{what}: its layers add a correction, or takes_correction is False")


def snapshot(pipe: Pipeline) -> dict[str, object]:
    """Return all that a transform could change: classes, tensors, strides, settings, call defaults; not the report."""
    added = {name for name, value in vars(pipe).items() if reads_loras(name, value)}  # whatever a transform does, too
    own = {name: value for name, value in vars(pipe).items() if name not in (CARRIED.attribute, *added)}
    modules = modules_of(pipe)
    tensors = {
        f"{component}.{name}": (id(tensor), tensor.dtype, tensor.stride(), tensor.device, tensor.detach().clone())
        for component, module in modules.items()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }
    return {
        "class": class_without(type(pipe), Turns),  # which `optimize` itself adds, whatever a transform does
        "instance": sorted(own),
        "attributes": str({name: value for name, value in own.items() if isinstance(value, _PLAIN)}),
        "signature": str(inspect.signature(pipe.__call__)),
        "components": {name: id(part) for name, part in pipe.components.items()},
        "config": str(dict(pipe.config)),
        "methods": {name: id(value) for name, value in own.items() if inspect.isfunction(value)},
        "scheduler": str(dict(pipe.scheduler.config)),
        "modules": {
            f"{component}.{name}": (id(part), type(part), part._compiled_call_impl, _plain(part), _behaviour(part))
            for component, module in modules.items()
            for name, part in module.named_modules()
        },
        "tensors": tensors,
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what differs between two snapshots, in words; tensors must agree bit for bit."""
    found = [key for key in before if key != "tensors" and before[key] != after[key]]
    for name in before["tensors"].keys() | after["tensors"].keys():
        old, new = before["tensors"].get(name), after["tensors"].get(name)
        if old is None or new is None or old[:4] != new[:4] or not torch.equal(_values(old[4]), _values(new[4])):
            found.append(name)
    return found


def _values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if hasattr(tensor, "__tensor_flatten__") else tensor


def _plain(module: torch.nn.Module) -> str:
    """Return the module's simple attributes, where switches such as `use_tiling` live."""
    return str({k: v for k, v in vars(module).items() if isinstance(v, _PLAIN[:5]) and k != "_compiled_call_impl"})


def _behaviour(module: torch.nn.Module) -> tuple[object, ...]:
    """Return what changes what a module does and is no tensor: hooks, a forward of its own, its processor."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    processor = getattr(module, "processor", None)
    return (
        *map(id, hooks),
        vars(module).get("forward"),
        type(processor),
        str(getattr(processor, "_attention_backend", None)),
    )


def _bytes(layer: torch.nn.Module) -> int:
    from ernie_accel.core.components import module_bytes

    return module_bytes(layer)


def _distance(after: torch.Tensor, before: torch.Tensor) -> float:
    return float((after.double() - before.double()).norm() / before.double().norm())


def _through_json(transform: Transform) -> dict[str, object]:
    data: dict[str, object] = json.loads(json.dumps(transform.to_json()))
    return data


def _same(found: object, expected: object, promise: str) -> None:
    if found != expected:
        raise ContractError(f"{promise}: expected {expected!r}, found {found!r}")


@dataclass(frozen=True, repr=False)
class _Breaks(Transform):
    """Fails, last of all, after it has changed something."""

    phase: ClassVar[Phase] = Phase.WARMUP
    slot: ClassVar[str] = "breaks"
    effect: ClassVar[Effect] = Effect.EXACT

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        return []

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        return Preview(("something",))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        return replace(context.planned(pipe), offload="half-way")

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        with Undo() as undo:
            undo.setattr(pipe, "_half_way", True)
            raise OSError("it broke")

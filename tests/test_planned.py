"""What a plan promises is what is done: of every pair of transforms, on every family, bytes included."""

from __future__ import annotations

import itertools
import random
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch

import ernie_accel
from ernie_accel import (
    CaptureGraphs,
    CastDtype,
    Context,
    Effect,
    FuseKernels,
    FuseVae,
    KeepTimestepsOnHost,
    Phase,
    Preview,
    Quantize,
    RewriteBlocks,
    Transform,
)
from ernie_accel.core.planned import PlannedPipe, PlannedWeight
from tests.attack import SEED, rounds
from tests.examples import EXAMPLES, make_awkward
from tests.pipelines import PIPELINES, tiny_ernie

CPU = Context.detect(tiny_ernie())
#: What only an H200 can run, a CPU can at least install.
H200 = replace(Context.named("h200"), versions={**CPU.versions, "triton": "3.6", "cudnn": "1.14"})
ON_H200 = (
    CaptureGraphs(),
    FuseKernels("fp8"),
    FuseKernels("fp8", exclude=()),
    FuseKernels("bf16"),
    FuseVae(),
    KeepTimestepsOnHost(),
    CastDtype("bfloat16"),
    CastDtype("bfloat16", components=("vae",)),
    RewriteBlocks(),
    RewriteBlocks(fuse=False),
)
MORE = (
    CastDtype("bfloat16", components=("vae",)),
    Quantize("int8-weight-only", exclude=()),
    Quantize("fp8-weight-only", components=("text_encoder",)),
    Quantize("nf4"),
    RewriteBlocks(fuse=False),
)


def sizes_by_module(weights) -> dict[str, int]:
    """Return the bytes of each module: quantization backends name what they store for a weight as they like.

    PEFT puts a layer beneath its own, as "base_layer", and both matrices of an adapter beside it.
    """
    sizes: dict[str, int] = defaultdict(int)
    for name, weight in weights.items():
        module = name.rpartition(".")[0].removesuffix(".base_layer").replace(".base_layer.", ".")
        sizes[re.sub(r"\.lora_[AB]\.", ".lora.", module)] += weight.nbytes
    return {name: size for name, size in sizes.items() if size}


def check(pipe, transforms, context) -> bool:
    """Apply what a plan allows and compare; return whether it allowed all."""
    plan = ernie_accel.plan(pipe, *transforms, context=context)
    if not plan.ok:
        return False
    ernie_accel.optimize(pipe, *transforms, context=context)
    planned = PlannedPipe.seen(pipe, None).weights
    for step, entry in zip(plan.steps, ernie_accel.report(pipe).entries, strict=True):
        what = f"{step.transform!r} of {transforms!r} on {type(pipe).__name__}"
        assert (entry.status == "applied") == (step.verdict == "apply"), what
        if entry.applied is None:
            continue
        assert entry.applied.changed == step.preview.changes, what
        assert entry.applied.bytes_after == step.planned.nbytes, what
        planned = step.planned.weights
    really = PlannedPipe.seen(pipe, None).weights
    assert sizes_by_module(planned) == sizes_by_module(really), transforms
    plain = {name for name, weight in planned.items() if weight.stored_as is None and name in really}
    assert {name: planned[name].dtype for name in plain} == {name: really[name].dtype for name in plain}, transforms
    ernie_accel.restore(pipe)
    return True


def pairs(*transforms):
    return [pair for pair in itertools.combinations(transforms, 2) if pair[0].occupies != pair[1].occupies]


@pytest.mark.parametrize("family", sorted(PIPELINES))
def test_a_receipt_says_what_the_plan_said(family):
    wanted = [(*pair, CPU) for pair in pairs(*EXAMPLES, *MORE)] + [(*pair, H200) for pair in pairs(*ON_H200)]
    if len(wanted) > (most := rounds(short=40, full=10_000)):
        wanted = random.Random(f"{SEED} {family}").sample(wanted, most)
    pipe = PIPELINES[family]()
    make_awkward(pipe)
    done = sum(check(pipe, transforms, context) for *transforms, context in wanted)
    assert done > 10


def test_a_cast_of_another_component_does_not_make_fp8_layers_possible():
    """It was planned, promised bytes, was reported as applied, and made no fp8 layer."""
    transforms = CastDtype("bf16", components=("vae",)), RewriteBlocks(), FuseKernels("fp8")
    plan = ernie_accel.plan(tiny_ernie(), *transforms, context=H200)
    assert plan.problems[FuseKernels("fp8")] == (
        "the kernels take bfloat16 weights, found float32: add CastDtype('bfloat16')",
    )
    pipe = tiny_ernie(layers=3)
    assert check(pipe, (CastDtype("bf16"), *transforms[1:]), H200)


def test_the_bytes_of_two_quantizations_add_up():
    pipe = tiny_ernie(enhancer=True)
    two = Quantize("int8-weight-only"), Quantize("fp8-weight-only", components=("pe",))
    plan = ernie_accel.plan(pipe, *two)
    first, second = (step.planned.nbytes for step in plan.steps)
    assert plan.bytes_before > first > second
    assert check(pipe, two, CPU)


@dataclass(frozen=True, repr=False)
class Halve(Transform):
    """A third party's cast, of which no other transform has heard."""

    phase: ClassVar[Phase] = Phase.DTYPE
    slot: ClassVar[str] = "third-party-cast"
    effect: ClassVar[Effect] = Effect.LOSSY
    floor_db = 20.0

    def unsupported(self, pipe, context):
        return []

    def preview(self, pipe, context):
        return Preview(("transformer",))

    def planned(self, pipe, context):
        return context.planned(pipe).cast(torch.bfloat16, lambda name: name.startswith("transformer."))

    def apply(self, pipe, context):
        with ernie_accel.Undo() as undo:
            before = pipe.transformer.dtype
            undo.push(lambda: pipe.transformer.to(before))
            pipe.transformer.to(torch.bfloat16)
        return ernie_accel.Applied(("transformer",), undo=undo)


def test_a_cast_that_no_transform_knows_is_visible_to_all():
    assert check(tiny_ernie(layers=3), (Halve(), RewriteBlocks(), FuseKernels("fp8")), H200)
    assert check(tiny_ernie(), (Halve(), CastDtype("bf16"), Quantize("int8-weight-only")), CPU)


@dataclass(frozen=True, repr=False)
class Notes(Transform):
    """Notes what it is told of the pipe while it is planned and applied, and plans that masks are elided."""

    phase: ClassVar[Phase] = Phase.CALL
    slot: ClassVar[str] = "notes"
    effect: ClassVar[Effect] = Effect.EXACT
    seen: list[tuple[str, object, str | None]] = field(default_factory=list, compare=False)

    def unsupported(self, pipe, context):
        return []

    def preview(self, pipe, context):
        return Preview(("something",))

    def planned(self, pipe, context):
        self._note("planned", pipe, context)
        return replace(context.planned(pipe), elides_mask="by notes")

    def apply(self, pipe, context):
        self._note("applied", pipe, context)
        return ernie_accel.Applied(("something",), undo=ernie_accel.Undo())

    def _note(self, when, pipe, context):
        planned = context.planned(pipe)
        self.seen.append((when, planned.dtype_of("transformer"), planned.elides_mask))


def test_a_transform_is_applied_in_the_state_that_it_was_planned_in():
    """Not in its own, which the pipe's report has while it runs, so that an interrupt finds it there."""
    notes = Notes()
    ernie_accel.optimize(tiny_ernie(), CastDtype("bfloat16"), notes)
    assert set(notes.seen) == {
        ("planned", torch.bfloat16, None),
        ("applied", torch.bfloat16, None),
    }


def test_a_planned_pipe_knows_its_components_by_their_whole_names_and_most_bytes():
    small, large = PlannedWeight((2,), torch.float32, 8), PlannedWeight((8,), torch.bfloat16, 16)
    planned = PlannedPipe({"text_encoder.a": small, "text_encoder.b": large, "text_encoder_2.a": small}, "cpu")
    assert (planned.bytes_of("text_encoder"), planned.bytes_of("text_encoder_2")) == (24, 8)
    assert planned.dtype_of("text_encoder") == torch.bfloat16
    assert planned.dtype_of("text_encoder_2") == torch.float32


def test_the_steps_that_can_be_seen_on_a_pipe_count_and_not_those_that_were_planned():
    pipe = tiny_ernie()
    planned = replace(PlannedPipe.of(pipe), num_inference_steps=3)
    assert PlannedPipe.seen(pipe, planned).num_inference_steps == 50

"""Where the order of phases matters, and what would go wrong in another."""

from __future__ import annotations

import pytest
import torch

import ernie_accel
from ernie_accel import CallDefaults, CastDtype, Compile, Context, MakeContiguous, Phase, Quantize, RewriteBlocks
from ernie_accel.core.transform import Transform
from tests.examples import ELSEWHERE, EXAMPLES, make_awkward


def test_phases_run_in_this_order():
    assert [phase.name for phase in sorted(Phase)] == [
        "DTYPE",
        "REWRITE",
        "QUANTIZE",
        "SCHEDULER",
        "ATTENTION",
        "LAYOUT",
        "MEMORY",
        "CALL",
        "COMPILE",
        "RESIDENCY",
        "WARMUP",
    ]


def test_a_plan_of_everything_is_sorted_by_phase(ernie):
    by_slot: dict[str, Transform] = {t.slot: t for t in EXAMPLES + ELSEWHERE}
    phases = [step.transform.phase for step in ernie_accel.plan(ernie, *by_slot.values()).steps]
    assert phases == sorted(phases)


def test_a_cast_comes_before_quantizing_because_fp8_starts_from_bfloat16(ernie):
    h200 = Context.named("h200")
    assert ernie_accel.plan(ernie, Quantize("fp8"), CastDtype("bf16"), context=h200).ok
    assert "bfloat16" in str(ernie_accel.plan(ernie, Quantize("fp8"), context=h200))


def test_blocks_are_rewritten_before_they_are_compiled(ernie):
    assert RewriteBlocks.phase < Compile.phase
    ernie.transformer.layers[0].compile()
    (step,) = ernie_accel.plan(ernie, RewriteBlocks()).steps
    assert "your own torch.compile of transformer.layers.0 is taken off" in step.preview.note


def test_layout_comes_after_casting_which_lays_out_anew(ernie):
    make_awkward(ernie)
    ernie_accel.optimize(ernie, MakeContiguous(), CastDtype("bf16"))
    assert all(p.is_contiguous() and p.data_ptr() % 16 == 0 for p in ernie.transformer.parameters())


@pytest.mark.parametrize("order", [1, -1])
def test_whatever_order_is_given_the_picture_is_the_same(ernie, order):
    from tests.pipelines import picture, tiny_ernie

    request = [CastDtype("bf16"), RewriteBlocks(), MakeContiguous(), CallDefaults("turbo")]
    other = ernie_accel.optimize(tiny_ernie(), *request)
    assert torch.equal(picture(ernie_accel.optimize(ernie, *request[::order])), picture(other))

"""What every transform promises, checked on every transform."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import ernie_accel
from ernie_accel.core.components import pipe_bytes
from ernie_accel.core.context import Context
from ernie_accel.core.transform import machine_local_fields, undeclared_paths
from ernie_accel.transforms import TRANSFORMS, transform_class
from tests.examples import ELSEWHERE, EXAMPLES, differences, make_awkward, snapshot
from tests.pipelines import picture, tiny_ernie

every_transform = pytest.mark.parametrize("transform", EXAMPLES, ids=repr)
wherever_it_runs = pytest.mark.parametrize("transform", EXAMPLES + ELSEWHERE, ids=repr)


@pytest.fixture
def ernie():
    return tiny_ernie(enhancer=True)  # with every component that a transform could change


def test_every_transform_of_the_catalogue_has_an_example():
    assert {type(transform).__name__ for transform in EXAMPLES + ELSEWHERE} == set(TRANSFORMS)


@wherever_it_runs
def test_repr_is_the_call_that_makes_it(transform):
    assert eval(repr(transform), {name: transform_class(name) for name in TRANSFORMS}) == transform


@wherever_it_runs
def test_it_survives_json(transform):
    data = json.loads(json.dumps(transform.to_json()))
    assert ernie_accel.transform_from_json(data) == transform


@wherever_it_runs
def test_it_is_an_immutable_value(transform):
    assert hash(transform) == hash(dataclasses.replace(transform))
    with pytest.raises(dataclasses.FrozenInstanceError):
        transform.anything = 1


@wherever_it_runs
def test_it_states_its_facts(transform):
    assert isinstance(transform.phase, ernie_accel.Phase)
    assert isinstance(transform.effect, ernie_accel.Effect)
    assert "effect" not in vars(transform)  # a class attribute or a property, never overwritten
    assert isinstance(transform.slot, str)
    assert (transform.floor_db is not None) == (transform.effect is ernie_accel.Effect.LOSSY)
    assert type(transform).__doc__


@wherever_it_runs
def test_what_belongs_to_one_machine_is_declared_so(transform):
    """A folder from a stranger could otherwise choose what is read, run or written here."""
    assert undeclared_paths(type(transform)) == []


#: Text that no part of a transform looks up: it is only passed on to the pipe.
PROSE = {("CallDefaults", "negative_prompt")}


@wherever_it_runs
def test_text_that_is_not_declared_so_is_one_of_known_names(transform, ernie, tmp_path):
    """No path, module or address gets past the checks of a field that a saved folder may give."""
    local = machine_local_fields(type(transform))
    for f in dataclasses.fields(transform):
        if "str" not in str(f.type) or f.name in local or (type(transform).__name__, f.name) in PROSE:
            continue
        for text in (str(tmp_path / "evil"), "evil_module:Evil", "someone/kernels"):
            value = (text,) if "tuple" in str(f.type) else text
            try:
                hostile = dataclasses.replace(transform, **{f.name: value})
            except ValueError:
                continue
            if f.name == "exclude":  # patterns of layer names, which match or do not
                continue
            reasons = hostile.unsupported(ernie, Context.named("cpu"))
            assert reasons or f.name == "mode", (f.name, value)
            if f.name == "mode":  # torch knows the modes, and refuses others
                with pytest.raises(ernie_accel.ApplyError):
                    ernie_accel.optimize(ernie, hostile)
    assert list(tmp_path.iterdir()) == []


@wherever_it_runs
def test_asking_changes_nothing(transform, ernie):
    make_awkward(ernie)
    before = snapshot(ernie)
    for device in ("cpu", "h200", "rtx3060", "v100", "ascend910b"):
        context = Context.named(device)
        if not transform.unsupported(ernie, context):
            transform.preview(ernie, context)
    assert differences(before, snapshot(ernie)) == []


@every_transform
def test_the_receipt_is_what_the_preview_said_and_what_happened(transform, ernie):
    make_awkward(ernie)
    before = snapshot(ernie)
    step = ernie_accel.plan(ernie, transform).steps[0]
    assert step.reasons == ()
    ernie_accel.optimize(ernie, transform)
    (entry,) = ernie_accel.report(ernie).entries
    assert entry.applied.changed == step.preview.changes != ()
    assert entry.applied.seconds > 0
    assert entry.applied.bytes_after == pipe_bytes(ernie)
    assert entry.applied.bytes_after == step.planned.nbytes
    assert differences(before, snapshot(ernie)) != []


@every_transform
def test_restore_gives_the_original_back_bit_for_bit(transform, ernie):
    make_awkward(ernie)
    original, before = picture(ernie), snapshot(ernie)
    ernie_accel.optimize(ernie, transform)
    assert ernie_accel.restore(ernie) is ernie
    assert differences(before, snapshot(ernie)) == []
    assert torch.equal(picture(ernie), original)
    assert ernie_accel.report(ernie).entries == ()


@pytest.mark.parametrize("transform", ELSEWHERE, ids=repr)
def test_what_needs_an_accelerator_or_another_family_says_so(transform, ernie):
    (step,) = ernie_accel.plan(ernie, transform).steps
    assert step.verdict != "apply"
    said = " ".join(step.reasons) or step.preview.note
    assert "cpu" in said or "ERNIE-Image" in said


@every_transform
def test_twice_is_once(transform, ernie):
    make_awkward(ernie)
    ernie_accel.optimize(ernie, transform)
    once, report = snapshot(ernie), ernie_accel.report(ernie)
    ernie_accel.optimize(ernie, transform)
    assert differences(once, snapshot(ernie)) == []
    assert ernie_accel.report(ernie).entries == report.entries


@every_transform
def test_a_pipe_of_an_unknown_family_is_changed_and_restored_or_refused_with_reasons(transform, flux):
    before = snapshot(flux)
    plan = ernie_accel.plan(flux, transform)
    if plan.ok:
        ernie_accel.optimize(flux, transform)
        ernie_accel.restore(flux)
    else:
        with pytest.raises(ernie_accel.UnsupportedError, match="FluxPipeline"):
            ernie_accel.optimize(flux, transform)
    assert differences(before, snapshot(flux)) == []


@every_transform
def test_a_failure_after_it_undoes_it(transform, ernie):
    make_awkward(ernie)
    before = snapshot(ernie)
    with pytest.raises(ernie_accel.ApplyError, match="it broke"):
        ernie_accel.optimize(ernie, transform, Breaks())
    assert differences(before, snapshot(ernie)) == []


@dataclasses.dataclass(frozen=True, repr=False)
class Breaks(ernie_accel.Transform):
    """Fails, last of all, after it has changed something."""

    phase = ernie_accel.Phase.WARMUP
    slot = "breaks"
    effect = ernie_accel.Effect.EXACT

    def unsupported(self, pipe, context):
        return []

    def preview(self, pipe, context):
        return ernie_accel.Preview(("something",))

    def apply(self, pipe, context):
        with ernie_accel.Undo() as undo:
            undo.setattr(pipe.vae, "use_slicing", "half-way")
            raise OSError("it broke")

"""Arguments of every transform: of the declared types, or refused when the transform is made."""

from __future__ import annotations

import math
import typing
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

import ernie_accel
from ernie_accel import Effect, Phase, Preview, Quantize, SwapScheduler, Transform
from ernie_accel.exports import TRANSFORMS
from ernie_accel.transforms import transform_class, transform_from_json
from tests.examples import ELSEWHERE, EXAMPLES

#: Values of every kind, each with the annotations that take it.
VALUES: tuple[tuple[Any, tuple[Any, ...]], ...] = (
    ("mlp", (str,)),
    (True, (bool,)),
    (2.5, (float,)),
    (float("nan"), ()),
    (float("inf"), ()),
    (np.float32("nan"), ()),
    (b"mlp", ()),
    ({"mlp"}, ()),
    (frozenset({1}), ()),
    ({"mlp": 1}, ()),
    ((None,), ()),
    ((True,), ()),
    ((1.5,), ()),
    ((("mlp",),), ()),
    (iter("mlp"), ()),
    (object(), ()),
    (Path("mlp"), ()),
)
FIELDS = [(cls, f.name) for cls in map(transform_class, TRANSFORMS) for f in fields(cls)]


def example(cls: type[Transform]) -> Transform:
    return next(each for each in EXAMPLES + ELSEWHERE if type(each) is cls)


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda each: getattr(each, "__name__", each))
def test_a_value_of_another_type_is_refused_with_its_name_and_what_it_takes(cls, name):
    f = next(f for f in fields(cls) if f.name == name)
    declared = typing.get_type_hints(cls)[name]
    kinds = {declared, *typing.get_args(declared)}
    for value, takers in VALUES:
        if kinds & set(takers) or (isinstance(value, Path) and "machine_local" in f.metadata):
            continue
        with pytest.raises(ValueError, match=f"{cls.__name__}: {name} takes ") as caught:
            replace(example(cls), **{name: value})
        assert repr(value) in str(caught.value)
    if type(None) not in kinds and f.default is not None:
        with pytest.raises(ValueError, match=f"{name} takes "):
            replace(example(cls), **{name: None})


@pytest.mark.parametrize(
    ("cls", "name"),
    [(cls, name) for cls, name in FIELDS if int in typing.get_args(h := typing.get_type_hints(cls)[name]) or h is int],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_negative_counts_are_refused(cls, name):
    with pytest.raises(ValueError, match=name):
        replace(example(cls), **{name: -1})


@pytest.mark.parametrize("transform", EXAMPLES + ELSEWHERE, ids=repr)
def test_lists_become_tuples_and_plain_data_makes_the_same_transform(transform):
    data = transform.to_json()
    listed = {name: _listed(value) for name, value in data.items()}
    made = transform_from_json(listed)
    assert made == transform
    assert hash(made) == hash(transform)
    assert all(type(getattr(made, f.name)) is type(getattr(transform, f.name)) for f in fields(transform))


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, tuple) else value


def test_numbers_of_numpy_become_numbers_of_python():
    made = ernie_accel.CallDefaults(num_inference_steps=np.int64(8), guidance_scale=np.float32(1))
    assert [type(made.num_inference_steps), type(made.guidance_scale)] == [int, float]
    assert made == ernie_accel.CallDefaults(num_inference_steps=8, guidance_scale=1)
    assert ernie_accel.Warmup(sizes=[[64, np.int32(32)]]) == ernie_accel.Warmup(sizes=((64, 32),))


def test_a_bare_string_is_answered_with_the_tuple_that_was_meant():
    with pytest.raises(ValueError, match=r"got 'mlp': write exclude=\('mlp',\)$"):
        Quantize("int8-weight-only", exclude="mlp")


def test_all_mistakes_are_named_together():
    with pytest.raises(
        ValueError, match=r"SwapScheduler: shift takes a finite float or None, got nan; karras takes bool"
    ):
        SwapScheduler("unipc", shift=math.nan, karras=1)


@pytest.mark.parametrize("transform", [Quantize("nf4"), ernie_accel.FuseKernels("fp8")], ids=repr)
def test_what_is_no_regular_expression_is_refused(transform):
    with pytest.raises(ValueError, match=r"exclude takes regular expressions, and '\(mlp' is not one: "):
        replace(transform, exclude=("(mlp",))


def test_a_pattern_that_matches_nothing_is_refused_in_the_plan(ernie):
    plan = ernie_accel.plan(ernie, Quantize("int8-weight-only", exclude=["mlp", r"layers\.0\b"]))
    assert "exclude: 'mlp' matches no layer from the start of its path, as 'layers.0." in str(plan)
    assert "write '.*mlp'" in str(plan)
    assert r"layers\\.0" not in str(plan).partition("cannot: ")[2]
    typo = ernie_accel.plan(ernie, Quantize("int8-weight-only", exclude=("lairs",)))
    assert "exclude: 'lairs' matches no layer: leave it out" in str(typo)
    assert ernie_accel.plan(ernie, Quantize("int8-weight-only", exclude=[".*mlp"])).ok


@dataclass(frozen=True, repr=False)
class Own(Transform):
    """A transform of a third party."""

    phase: ClassVar[Phase] = Phase.LAYOUT
    slot: ClassVar[str] = "own"
    effect: ClassVar[Effect] = Effect.EXACT

    how: Literal["a", 2] = "a"
    pair: tuple[int, float] = (1, 2.0)
    thing: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pair[0] > 5:  # of the right type by now
            raise ValueError("too large")

    def unsupported(self, pipe, context):
        return []

    def preview(self, pipe, context):
        return Preview(())

    def apply(self, pipe, context):
        raise AssertionError


def test_a_transform_of_a_third_party_is_checked_too():
    assert Own(how=2, pair=[1, 3]).pair == (1, 3)
    assert next(f for f in fields(Own) if f.name == "thing").default is MISSING
    for wrong in ({"how": "b"}, {"how": 2.0}, {"pair": (1,)}, {"pair": ("1", 2)}, {"pair": 1}):
        with pytest.raises(ValueError, match=f"Own: {next(iter(wrong))} takes "):
            Own(**wrong)
    with pytest.raises(ValueError, match="too large"):
        Own(pair=(6, 1))

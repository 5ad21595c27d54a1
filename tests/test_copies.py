"""The tiny pipelines that tests get are copies: they equal what is built anew, and share nothing that changes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.pipelines import PIPELINES, picture, tiny_ernie, tiny_sd, tiny_wan

BUILDERS = {
    **PIPELINES,
    "ernie with enhancer": functools.partial(tiny_ernie, layers=3, enhancer=True),
    "ernie in bfloat16": functools.partial(tiny_ernie, dtype=torch.bfloat16),
    "sd": tiny_sd,
    "wan": tiny_wan,
    "wan, second alone": functools.partial(tiny_wan, first=False),
}


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


def built_anew(build: Any) -> Any:
    given = build.keywords if isinstance(build, functools.partial) else {}
    build = build.func if isinstance(build, functools.partial) else build
    return build.__wrapped__(**given)


def seen_in(value: Any, path: str, known: dict[int, str]) -> Iterator[tuple[str, Any]]:
    """Yield all that is in an object, with paths; what comes again is named by its first path."""
    if id(value) in known and not isinstance(value, (int, str, float, bool, type(None), tuple)):
        yield path, known[id(value)]
        return
    known[id(value)] = path
    if isinstance(value, torch.Tensor):
        yield path, (type(value), value.dtype, value.stride(), value.requires_grad, value.device, value.tolist())
    elif isinstance(value, (dict, list, tuple)):
        yield path, (type(value), list(value) if isinstance(value, dict) else len(value))
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from seen_in(each, f"{path}[{key!r}]", known)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(getattr(value, "__get__", None)):
        yield path, type(value)
        yield from seen_in(vars(value), path, known)
    elif isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
        yield path, value
    else:
        yield path, type(value)


def test_a_copy_is_what_is_built_anew_and_so_are_the_random_numbers_after_it(build):
    expected = dict(seen_in(built_anew(build), "", {}))
    numbers = torch.rand(3)
    build()
    torch.rand(100)
    copied = build()
    assert torch.equal(torch.rand(3), numbers)
    assert dict(seen_in(copied, "", {})) == expected
    assert len(expected) > 1000


def mutable(value: Any, known: dict[int, Any]) -> None:
    """Collect the objects in `value` that could be changed."""
    if id(value) in known or isinstance(value, (int, float, str, bool, type(None), type)):
        return
    if isinstance(value, (dict, list, tuple)):
        known |= {} if isinstance(value, tuple) else {id(value): value}
        for each in value.values() if isinstance(value, dict) else value:
            mutable(each, known)
    elif isinstance(value, torch.Tensor):
        known[id(value)] = value
    elif hasattr(value, "__dict__") and not callable(getattr(value, "__get__", None)):
        known[id(value)] = value
        mutable(vars(value), known)


def test_two_copies_share_nothing_that_can_be_changed(build):
    first, second = build(), build()
    of_first: dict[int, Any] = {}
    of_second: dict[int, Any] = {}
    mutable(first, of_first)
    mutable(second, of_second)
    assert {str(type(of_first[each])) for each in of_first.keys() & of_second.keys()} == set()
    storages = [
        {
            each.untyped_storage().data_ptr()
            for each in found.values()
            if isinstance(each, torch.Tensor) and each.numel()
        }
        for found in (of_first, of_second)
    ]
    assert storages[0].isdisjoint(storages[1])
    assert len(storages[0]) > 40


@pytest.mark.parametrize("name", PIPELINES)
def test_a_copy_draws_what_is_built_anew_does(name):
    changed = PIPELINES[name]()
    next(changed.transformer.parameters()).data.zero_()
    assert torch.equal(picture(PIPELINES[name]()), picture(built_anew(PIPELINES[name])))

"""Who changed a component that pipes share: claims are made, asked, released, and forgotten with their pipe."""

from __future__ import annotations

import pytest
from torch import nn

import ernie_accel
from ernie_accel import CallDefaults, SliceVae, TileVae
from ernie_accel.core import owners
from ernie_accel.core.turns import Turns
from ernie_accel.core.wrap_call import class_without


class Pipe:
    """A pipeline as far as owners look at it."""

    def __init__(self, **components):
        self.components = components


@pytest.fixture(autouse=True)
def no_claims(monkeypatch):
    monkeypatch.setattr(owners, "_claims", [])


@pytest.fixture
def pipes():
    vae = nn.Linear(2, 2)
    return Pipe(vae=vae, transformer=nn.Linear(2, 2)), Pipe(vae=vae, transformer=nn.Linear(2, 2))


def test_a_change_names_its_component_first(pipes):
    changes = ("vae.use_slicing", "transformer (8 blocks)", "steps 50 -> 8")
    assert owners.changed_components(pipes[0], changes) == pipes[0].components


def test_a_claim_stands_in_the_way_of_others_until_it_is_released(pipes):
    pipe, other = pipes
    owners.claim(pipe, SliceVae(), ["vae"])
    owners.claim(pipe, TileVae(), ["vae"])
    (reason,) = owners.sharing_problems(other, ["vae.use_slicing"])
    assert "SliceVae(), TileVae()" in reason
    assert owners.sharing_problems(pipe, ["vae"]) == owners.sharing_problems(other, ["transformer"]) == []
    owners.release(other, TileVae())
    owners.release(pipe, SliceVae())
    (reason,) = owners.sharing_problems(other, ["vae"])
    assert "TileVae()" in reason and "SliceVae" not in reason
    owners.release(pipe, TileVae())
    assert owners.sharing_problems(other, ["vae"]) == []


def test_a_component_that_was_replaced_since_it_was_claimed_is_noticed(pipes):
    pipe, _ = pipes
    both = ["vae", "transformer"]
    assert not owners.was_replaced(pipe, SliceVae(), both), "nothing was claimed"
    owners.claim(pipe, SliceVae(), both)
    assert not owners.was_replaced(pipe, SliceVae(), both)
    pipe.components["vae"] = nn.Linear(2, 2)
    assert owners.was_replaced(pipe, SliceVae(), both)
    owners.claim(pipe, TileVae(), both)
    assert owners.was_replaced(pipe, SliceVae(), both), "another transform has claimed the new one"
    assert not owners.was_replaced(pipe, TileVae(), both)


def test_claims_go_with_their_pipe(pipes):
    other = pipes[1]
    owners.claim(Pipe(vae=other.components["vae"]), SliceVae(), ["vae"])
    assert owners.sharing_problems(other, ["vae"]) == []
    owners.claim(other, SliceVae(), ["vae"])
    assert [claim.pipe() for claim in owners._claims] == [other]


def test_threads_wait_around_all_other_layers_of_a_call_those_added_later_too(ernie):
    ernie_accel.optimize(ernie, CallDefaults("turbo"))
    _, layers = class_without(type(ernie), int)
    assert len(layers) > 1
    assert [isinstance(layer, Turns) for layer in layers] == [False] * (len(layers) - 1) + [True]

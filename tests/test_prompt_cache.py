"""Embeddings of prompts are kept until the weights they come from change, in memory or in files."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from ernie_accel.models.prompt_cache import PromptFiles, PromptMemory

CPU = torch.device("cpu")


def encoders(count: int = 2) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(4, 4) for _ in range(count)]


def change(encoder: nn.Module) -> None:
    with torch.no_grad():
        encoder.weight[0].add_(1)


@pytest.fixture(params=["memory", "files"])
def make(request, tmp_path):
    """Return size -> a place where embeddings are kept."""
    return (lambda size: PromptFiles(size, tmp_path)) if request.param == "files" else PromptMemory


@pytest.mark.parametrize("which", [0, 1])
def test_a_change_of_any_encoder_makes_all_stale(make, which):
    kept, both = make(3), encoders()
    kept.look_at(both, pins=False)
    kept.put("a mug", torch.ones(2))
    kept.look_at(both, pins=False)
    assert torch.equal(kept.get("a mug", CPU), torch.ones(2))
    change(both[which])
    kept.look_at(both, pins=False)
    assert kept.get("a mug", CPU) is None


def test_what_is_pinned_goes_too_and_is_looked_after_where_nothing_else_is_kept():
    kept, both = PromptMemory(0), encoders()
    kept.look_at(both, pins=True)
    kept.put("", torch.ones(2), pin=True)
    kept.put("a mug", torch.ones(2))
    kept.look_at(both, pins=True)
    assert kept.get("a mug", CPU) is None
    assert torch.equal(kept.get("", CPU), torch.ones(2))
    change(both[1])
    kept.look_at(both, pins=True)
    assert kept.get("", CPU) is None


NESTED = [
    torch.ones(2),
    (torch.zeros(1), torch.ones(3)),
    [torch.zeros(1), (torch.ones(3), None), [torch.full((2,), 7.0)]],
]


@pytest.mark.parametrize("embedded", NESTED, ids=["tensor", "tuple", "nested"])
def test_what_a_pipeline_makes_comes_back_as_it_was_on_the_device_that_asks(make, embedded):
    def shown(value, device):
        if isinstance(value, (tuple, list)):
            return type(value)(shown(part, device) for part in value)
        return None if value is None else (value.device.type, tuple(value.shape), value.tolist() if device else None)

    kept = make(3)
    kept.look_at(encoders(), pins=False)
    kept.put("a mug", embedded)
    assert shown(kept.get("a mug", CPU), True) == shown(embedded, True)
    elsewhere = kept.get("a mug", torch.device("meta"))
    assert str(shown(elsewhere, False)) == str(shown(embedded, False)).replace("cpu", "meta")


def test_files_are_those_of_the_weights_and_adapters_of_all_encoders(tmp_path):
    def found(both: list[nn.Module]) -> bool:
        kept = PromptFiles(9, tmp_path)  # as another process opens it
        kept.look_at(both, pins=False)
        is_there = kept.get("a mug", CPU) is not None
        kept.put("a mug", torch.ones(2))
        return is_there

    assert not found(encoders())
    assert found(encoders())
    other = encoders()
    change(other[1])
    assert not found(other)
    adapted = encoders()
    adapted[1]._disable_adapters = False  # as PEFT's layers say which adapters count
    assert not found(adapted)
    assert found(encoders())


def test_no_file_is_read_or_written_while_weights_are_elsewhere(tmp_path):
    kept, both = PromptFiles(3, tmp_path), encoders()
    kept.look_at(both, pins=False)
    kept.put("a mug", torch.ones(2))
    away = [encoder.to("meta") for encoder in encoders()]
    other = PromptFiles(3, tmp_path)
    other.look_at(away, pins=False)
    other.put("a cup", torch.ones(2))
    assert other.get("a mug", CPU) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_the_file_that_was_not_used_for_longest_goes_although_the_clock_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    kept = PromptFiles(3, tmp_path)
    kept.look_at(encoders(), pins=False)
    for name in "abc":
        kept.put(name, torch.ones(2))
    assert kept.get("a", CPU) is not None
    kept.put("d", torch.ones(2))
    assert [name for name in "abcd" if kept.get(name, CPU) is not None] == ["a", "c", "d"]
    assert len({file.stat().st_mtime_ns for file in tmp_path.iterdir()}) == 3

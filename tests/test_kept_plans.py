"""Plans for shapes are bounded, and one that a captured graph reads stays for as long as the graph."""

from __future__ import annotations

import gc
import sys
import weakref
from unittest.mock import MagicMock

import pytest
import torch

from ernie_accel.kernels import cudnn_attention, kept_plans
from ernie_accel.kernels.kept_plans import KeptPlans, collected_plans


class Plan:
    """What is planned for one shape."""


@pytest.fixture
def drained():
    return []


@pytest.fixture
def plans(drained):
    return KeptPlans(3, lambda: drained.append(True))


def is_alive(reference):
    gc.collect()
    return reference() is not None


def test_the_one_that_was_not_used_for_longest_goes_once_the_device_is_done(plans, drained):
    first, second = (weakref.ref(plans.get(key, Plan)) for key in ("a", "b"))
    plans.get("c", Plan)
    plans.get("a", Plan)  # used again
    assert (len(plans), drained) == (3, [])
    plans.get("d", Plan)
    assert (len(plans), drained) == (3, [True])
    assert is_alive(first)
    assert not is_alive(second)


def test_a_plan_that_a_graph_reads_stays_as_long_as_the_graph(plans):
    with collected_plans() as graph:
        read = weakref.ref(plans.get("a", Plan))
    for key in "bcdef":
        plans.get(key, Plan)
    assert is_alive(read)
    graph.clear()
    assert not is_alive(read)


def test_a_plan_that_somebody_else_captures_is_kept_for_good(plans, drained, monkeypatch):
    monkeypatch.setattr(kept_plans, "_is_capturing", lambda: True)
    read = [weakref.ref(plans.get(key, Plan)) for key in "aabcd"]
    assert (len(plans), drained) == (4, [])  # a device that captures cannot be waited for
    monkeypatch.setattr(kept_plans, "_is_capturing", lambda: False)
    for key in "efgh":
        plans.get(key, Plan)
    assert len(plans) == 3
    assert all(map(is_alive, read))


def test_a_plan_that_cannot_be_made_is_not_kept(plans):
    def fail():
        raise ValueError("no engine")

    with pytest.raises(ValueError, match="no engine"):
        plans.get("a", fail)
    assert len(plans) == 0


def test_attention_of_many_lengths_keeps_a_bounded_number_of_plans(monkeypatch):
    cudnn = MagicMock(cudnnGraphNotSupportedError=RuntimeError)
    cudnn.pygraph.return_value.sdpa.return_value = (MagicMock(), None)
    cudnn.pygraph.return_value.get_workspace_size.return_value = 1
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    kept = KeptPlans(8, lambda: None)
    monkeypatch.setattr(cudnn_attention, "_PLANS", kept)
    for tokens in (*range(1, 21), 20, 19):
        x = torch.zeros(1, tokens, 2, 8, dtype=torch.bfloat16)
        cudnn_attention.attention(x, x, x, None)
    assert len(kept) == 8
    assert cudnn.pygraph.call_count == 20

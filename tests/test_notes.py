"""What the library keeps on objects that it did not make: typed notes, listed, and taken away again."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

import ernie_accel
from ernie_accel import CastDtype, Quantize, RewriteBlocks, SwapScheduler, Undo
from ernie_accel.common import notes
from ernie_accel.common.notes import NOTES, Note
from ernie_accel.core.planned import CARRIED
from ernie_accel.models import fused_npu, masks, processors
from ernie_accel.models.token_layout import LAYOUT
from ernie_accel.quantization.layers import RECEIPT
from ernie_accel.samplers.stepping import STEPPING

DOCS = Path(__file__).parents[1] / "docs" / "concepts.md"


class Holder:
    """Something that somebody else made."""


@pytest.fixture
def note():
    made = Note("of_a_test", int, "holder", "a number")
    yield made
    del notes._notes["of_a_test"]


def test_a_note_is_put_read_and_dropped(note):
    holder = Holder()
    assert note.of(holder) is None
    with pytest.raises(LookupError, match="this Holder has no of_a_test: a number"):
        note.required(holder)
    note.drop(holder)  # a no-op
    note.put(holder, 3)
    assert (note.of(holder), note.required(holder)) == (3, 3)
    assert [note.of(each) for each in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder)))] == [3, 3]
    note.drop(holder)
    assert vars(holder) == {}


def test_what_somebody_else_keeps_under_the_name_is_no_note(note):
    holder = Holder()
    setattr(holder, note.attribute, "theirs")
    assert note.of(holder) is None
    assert note.of(None) is None


def test_names_are_unique(note):
    with pytest.raises(ValueError, match=r"'of_a_test' is defined already: Note\('of_a_test', int, on a holder\)"):
        Note("of_a_test", str, "holder", "text")


def test_an_undo_puts_the_former_value_back(note):
    holder = Holder()
    with Undo() as first:
        first.attach(note, holder, 1)
    with Undo() as second:
        second.attach(note, holder, 2)
    assert second.is_in_place()
    second()
    assert note.of(holder) == 1
    first()
    assert vars(holder) == {}


def test_every_note_is_documented_and_is_an_attribute_that_nobody_else_uses():
    text = DOCS.read_text(encoding="utf-8")
    assert {masks.PADDING.name, fused_npu.KERNEL_MASK.name, processors.BY_MASK.name} <= NOTES.keys()
    for name, note in NOTES.items():
        assert note.attribute == f"_ernie_accel_{name}"
        assert f"| `{note.attribute}` | {note.holder} |" in text


def test_notes_are_there_while_they_are_needed_and_gone_after_restore(ernie):
    transformer, scheduler = ernie.transformer, ernie.scheduler
    ernie_accel.optimize(
        ernie,
        CastDtype("bf16"),
        RewriteBlocks(),
        Quantize("int8-weight-only", backend="quanto"),
        SwapScheduler("unipc"),
    )
    layers = [layer for layer in transformer.modules() if RECEIPT.of(layer) is not None]
    assert CARRIED.of(ernie) is not None
    assert LAYOUT.of(transformer) is not None
    assert STEPPING.of(ernie.scheduler) is not None
    assert layers
    ernie_accel.restore(ernie)
    for holder in (ernie, transformer, scheduler, ernie.scheduler, *transformer.modules()):
        assert [name for name in vars(holder) if name.startswith("_ernie_accel")] == []
    assert torch.isfinite(next(transformer.parameters())).all()

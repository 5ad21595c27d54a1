"""A swap back to the adapters of a moment ago is a copy: of the same bits, never stale, and bounded."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ernie_accel.core.captured import mark_as_coming_and_going
from ernie_accel.kernels import low_rank, spare_terms
from ernie_accel.kernels.linear import Fp8Linear
from ernie_accel.kernels.low_rank import LowRankProduct
from ernie_accel.kernels.spare_terms import KEPT_CHANGES, KEPT_PART_OF_WEIGHT, KeptTerms, Term, Wanted, computed
from ernie_accel.models.adapters import PRODUCTS, narrow_products, update_products
from tests.test_lora import adapter, fused, load, made

ADAPTERS = ("a", "b", "c", "d", "e")


@pytest.fixture
def misses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many terms were computed by each change so far, with room for all of them."""
    counts: list[int] = []

    def counted(wanted: list[Wanted]) -> object:
        counts.append(len(wanted))
        return computed(wanted)

    monkeypatch.setattr(low_rank, "computed", counted)
    monkeypatch.setattr(low_rank, "KEPT_PART_OF_WEIGHT", 1e9)
    return counts


def with_adapters(names: tuple[str, ...] = ("a", "b"), **kwargs: Any) -> Any:
    pipe = fused(made("ernie"))
    for seed, name in enumerate(names):
        load(pipe, "ernie", name, seed=seed, **kwargs)
    swap(pipe, names[0])
    return pipe


def swap(pipe: Any, *names: str, scales: tuple[float, ...] | None = None) -> list[bytes]:
    """Return what the products have in spare columns, and whatever else they add, after a swap."""
    pipe.set_adapters(list(names), list(scales or (1.0,) * len(names)))
    update_products(pipe.transformer)
    return content(pipe)


def products(pipe: Any) -> list[LowRankProduct]:
    return PRODUCTS.required(pipe.transformer)


def content(pipe: Any) -> list[bytes]:
    held = [each for part in products(pipe) for each in (part.wide, part.down, part.factor, part.up)]
    return [bytes(each.contiguous().view(torch.uint8).flatten().tolist()) for each in held if each is not None]


def first_layer(pipe: Any) -> Any:
    """Return PEFT's layer around the first layer of the first product in float8."""
    return next(part for part in products(pipe) if part.wide is not None).places[0].adapted


def test_a_swap_back_computes_nothing_and_gives_the_same_bits(misses: list[int]) -> None:
    pipe, anew = with_adapters(), with_adapters()
    terms = sum(len(part.places) for part in products(pipe) if part.wide is not None)
    swaps: list[tuple[str, ...]] = [("b",), ("a",), ("a", "b"), ("b",), ("a",)]
    for names in swaps:
        got = swap(pipe, *names)
        for part in products(anew):
            part.forget()
        assert got == swap(anew, *names)
    assert terms > 0
    loads = [terms, terms, 0]  # and the swap to the first of them
    assert misses == [*loads, *loads, 0, terms, 0, terms, 0, 2 * terms, 0, terms, 0, terms]


@pytest.mark.parametrize("searches", [True, False])
def test_nothing_searches_for_garbage_while_a_lora_is_loaded(searches: bool) -> None:
    pipe, seen = fused(made("ernie")), []
    inner = pipe.transformer.load_state_dict  # by which PEFT loads

    def looking(*args: Any, **kwargs: Any) -> Any:
        seen.append(gc.isenabled())
        return inner(*args, **kwargs)

    pipe.transformer.load_state_dict = looking
    before = gc.isenabled()
    try:
        (gc.enable if searches else gc.disable)()
        load(pipe, "ernie", "a")
        assert gc.isenabled() is searches
    finally:
        (gc.enable if before else gc.disable)()
    assert seen
    assert not any(seen)


def test_weights_are_checked_in_one_look_through_the_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT loads a LoRA through `load_state_dict`; a look for each of 250 products would take half of that time."""
    pipe, looks = with_adapters(), 0
    inner = torch.nn.Module.named_modules

    def counting(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal looks
        looks += self is pipe.transformer
        return inner(self, *args, **kwargs)

    weights = {name: x for name, x in pipe.transformer.state_dict().items() if "lora_" in name}
    monkeypatch.setattr(torch.nn.Module, "named_modules", counting)
    pipe.transformer.load_state_dict(weights, strict=False)
    assert looks == 1


def test_the_bits_of_a_term_do_not_depend_on_what_it_is_computed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    scale = randn(1, 64).abs() + 0.1
    terms = [Wanted(Term(randn(3, 500), randn(16, 3), 0.1 * i, 16 * (i % 4)), scale) for i in range(9)]
    terms += [Wanted(Term(randn(5, 500), randn(16, 5).bfloat16(), 1.0, 0), scale) for _ in range(2)]
    terms.append(Wanted(Term(randn(3, 500), 1e6 * randn(16, 3), 1.0, 0), scale))
    together = computed(terms)
    assert [each is None for each in together] == [False] * 11 + [True]
    monkeypatch.setattr(spare_terms, "_AT_ONCE_BYTES", 4 * 4 * 1500)
    for some in (computed(terms), [computed([each])[0] for each in terms]):
        for one, other in zip(together[:-1], some, strict=False):
            assert one is not None
            assert other is not None
            assert all(map(torch.equal, one, other))
        assert some[-1] is None


def in_place(pipe: Any) -> None:
    with torch.no_grad():
        first_layer(pipe).lora_A["a"].weight.mul_(2)


def other_memory(pipe: Any) -> None:
    weight: Tensor = first_layer(pipe).lora_B["a"].weight
    weight.data = weight.data * 2


def other_parameter(pipe: Any) -> None:
    layer = first_layer(pipe)
    layer.lora_B["a"].weight = torch.nn.Parameter(layer.lora_B["a"].weight.detach() * 2)


def other_scale_of_the_weight(pipe: Any) -> None:
    for part in products(pipe):
        if part.wide is not None:
            cast(Fp8Linear, part.product).weight_scale.mul_(2)
            return


def hot_swap(pipe: Any) -> None:
    pipe.set_adapters(["a"])
    pipe.load_lora_weights(adapter("ernie", seed=7), adapter_name="a", hotswap=True)
    pipe.set_adapters(["b"])


@pytest.mark.parametrize(
    "change",
    [in_place, other_memory, other_parameter, other_scale_of_the_weight, hot_swap],
    ids=lambda each: each.__name__,
)
def test_what_has_changed_meanwhile_is_computed_anew(misses: list[int], change: Callable[[Any], None]) -> None:
    pipe = with_adapters()
    before = swap(pipe, "a")
    swap(pipe, "b")
    misses.clear()
    change(pipe)
    got = swap(pipe, "a")
    assert sum(misses) >= 1
    assert got != before
    for part in products(pipe):
        part.forget()
    update_products(pipe.transformer)
    assert got == content(pipe)


def test_memory_that_was_freed_and_given_to_another_adapter_is_not_taken_for_it(misses: list[int]) -> None:
    """An address and a count of changes are not enough to know a tensor by."""
    pipe = with_adapters()
    weight = first_layer(pipe).lora_B["a"].weight
    memory = bytearray(weight.nbytes)
    contents, addresses = [], []
    for value in (0.25, 0.5):
        memory[:] = bytes(torch.full(weight.shape, value, dtype=weight.dtype).view(torch.uint8).flatten().tolist())
        weight.data = torch.frombuffer(memory, dtype=weight.dtype).view(weight.shape)
        addresses.append((weight.data_ptr(), weight._version))
        swap(pipe, "b")
        misses.clear()
        contents.append(swap(pipe, "a"))
        assert misses == [1]
    assert addresses[0] == addresses[1]
    assert contents[0] != contents[1]


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_an_adapter_that_is_loaded_where_a_deleted_one_of_its_name_was_counts(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, other = fused(made("ernie"), precision), fused(made("ernie"), precision)
    monkeypatch.setattr(LowRankProduct, "_look_at_layers", lambda self: ["the same addresses"])
    load(pipe, "ernie", "a", seed=1)
    pipe.delete_adapters("a")
    for each in (pipe, other):
        load(each, "ernie", "a", seed=5)
    assert content(pipe) == content(other)


def test_values_that_come_and_go_and_changes_that_nobody_counts_are_not_kept() -> None:
    scale = torch.ones(1, 16)

    def keeps(down: Tensor, up: Tensor, scale: Tensor) -> bool:
        wanted, kept = Wanted(Term(down, up, 1.0, 0), scale), KeptTerms()
        kept.keep(wanted, computed([wanted])[0])
        return kept.find(wanted) is not None

    down, up = torch.ones(4, 32), torch.ones(16, 4)
    with torch.inference_mode():
        uncounted = down.clone(), up.clone(), scale.clone()
    assert keeps(down, up, scale)
    for i, each in enumerate(uncounted):
        given = [down, up, scale]
        given[i] = each
        assert not keeps(*given)
    for each in (down, up):
        mark_as_coming_and_going(each, True)
        assert not keeps(down, up, scale)
        mark_as_coming_and_going(each, False)
    assert keeps(down, up, scale)


def kept_bytes(pipe: Any) -> int:
    return sum(part._kept.nbytes for part in products(pipe))


def test_the_last_few_sets_are_kept_and_no_others(misses: list[int]) -> None:
    pipe, sizes = fused(made("ernie")), []
    for seed, name in enumerate(ADAPTERS):
        load(pipe, "ernie", name, seed=seed)
        sizes.append(kept_bytes(pipe))
    assert sizes[0] > 0
    assert sizes == [sizes[0] * min(number, KEPT_CHANGES) for number in range(1, len(ADAPTERS) + 1)]
    misses.clear()
    for name in ADAPTERS[1:]:
        swap(pipe, name)
    assert misses == [0] * (len(ADAPTERS) - 1)
    pipe.delete_adapters(["b", "c"])
    swap(pipe, "d")
    assert kept_bytes(pipe) == 2 * sizes[0]
    pipe.disable_lora()
    update_products(pipe.transformer)
    assert kept_bytes(pipe) == 0


def test_what_is_kept_is_bounded_by_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    for part_of_weight in (KEPT_PART_OF_WEIGHT, 1.0, 0.0):
        monkeypatch.setattr(low_rank, "KEPT_PART_OF_WEIGHT", part_of_weight)
        pipe = with_adapters(("a", "b", "c"))
        for name in ("b", "c", "a", "b"):
            swap(pipe, name)
            for part in products(pipe):
                assert part._kept.nbytes <= part_of_weight * part.weight.nbytes
        assert part_of_weight < 1 or kept_bytes(pipe) > 0


def test_what_is_kept_is_no_buffer_and_travels_in_no_copy(misses: list[int]) -> None:
    pipe = with_adapters()
    with_b = swap(pipe, "b")
    before = kept_bytes(pipe)
    assert before > 0
    part = next(each for each in products(pipe) if each.wide is not None)
    kept = [each.made for each in part._kept._kept if each.made is not None]
    held = {tensor.data_ptr() for tensor in (*part.buffers(), *part.parameters(), *part.state_dict().values())}
    assert held.isdisjoint(tensor.data_ptr() for each in kept for tensor in each)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)), copy.copy(part)):
        found = [other] if isinstance(other, LowRankProduct) else products(other)
        assert [len(each._kept) for each in found] == [0] * len(found)
    assert kept_bytes(pipe) == before
    assert content(pipe) == with_b


@pytest.mark.parametrize("how", ["moved", "narrowed"])
def test_weights_that_are_moved_or_taken_back_leave_nothing(misses: list[int], how: str) -> None:
    pipe = with_adapters()
    swap(pipe, "b")
    assert kept_bytes(pipe) > 0
    if how == "moved":
        pipe.transformer.to("meta")
    else:
        narrow_products(pipe.transformer)
    assert kept_bytes(pipe) == 0
    assert all(part.wide is None and not part._slots for part in products(pipe))


def test_adapters_that_are_too_large_are_swapped_in_the_same_memory(
    misses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare_terms, "LARGEST_FACTOR", 0.0)
    pipe = with_adapters()
    swap(pipe, "b")
    places = [(part.weight.data_ptr(), part.down.data_ptr()) for part in products(pipe) if part.down is not None]
    assert len(places) == len(products(pipe))
    misses.clear()
    swap(pipe, "a")
    swap(pipe, "b")
    assert misses == [0, 0]
    assert places == [
        (part.weight.data_ptr(), part.down.data_ptr()) for part in products(pipe) if part.down is not None
    ]


def test_a_swap_that_failed_half_way_is_done_again(misses: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = with_adapters()
    with_b, with_a = swap(pipe, "b"), swap(pipe, "a")
    given = low_rank._copy_all

    def fails(slots: list[Tensor], values: list[Tensor]) -> None:
        given(slots[:5], values[:5])
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(low_rank, "_copy_all", fails)
    with pytest.raises(torch.OutOfMemoryError):
        swap(pipe, "b")
    monkeypatch.setattr(low_rank, "_copy_all", given)
    assert swap(pipe, "a") == with_a
    assert swap(pipe, "b") == with_b

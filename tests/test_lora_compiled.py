"""LoRAs on compiled blocks: a swap compiles nothing, a change of rank one graph a kind of block, and nothing fails."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import ernie_accel
from ernie_accel import Compile, ErnieAccelError, Quantize, RewriteBlocks, Transform
from ernie_accel.core.compiled import is_compiled_in_place
from ernie_accel.models import compile_cache, stacked_adapters
from ernie_accel.models.adapters import adaptables
from ernie_accel.models.rewriting import FusedLinear
from ernie_accel.models.stacked_adapters import StackedAdapters, update_stacked
from tests.examples import differences, snapshot
from tests.test_fuse_kernels import sqnr_db
from tests.test_lora import CALLS, FAMILIES, TO_Q, adapter, latents, load

pytestmark = pytest.mark.usefixtures("traced_only")
BLOCKS: dict[str, tuple[Transform, ...]] = {
    "stock": (),
    "rewritten": (RewriteBlocks(),),
    "quantized": (Quantize("int8-weight-only", backend="torchao"),),
    "both": (RewriteBlocks(), Quantize("int8-weight-only", backend="torchao")),
    "gguf": (Quantize("gguf-q8_0"),),
}
#: SQNR in dB that one and the same thing has in float32.
FLOOR = 70


def made(family: str, *transforms: Transform) -> Any:
    """Return a pipe in float32, in which one and the same thing is within rounding."""
    pipe = FAMILIES[family]()
    return ernie_accel.optimize(pipe, *transforms) if transforms else pipe


def compiled(blocks: str, family: str = "ernie", **kwargs: Any) -> Any:
    return ernie_accel.optimize(made(family), *BLOCKS[blocks], Compile(**kwargs))


def new_graphs(pipe: Any, call: Callable[[], object] = lambda: None) -> int:
    """Return how many graphs a picture after `call` compiles."""
    call()
    before = counters["stats"]["unique_graphs"]
    latents(pipe)
    return int(counters["stats"]["unique_graphs"] - before)


def stacks(pipe: Any) -> list[StackedAdapters]:
    return [part for part in pipe.transformer.modules() if isinstance(part, StackedAdapters)]


@pytest.mark.parametrize("family", ["ernie", pytest.param("z_image", marks=pytest.mark.slow)])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_swap_compiles_nothing_and_a_change_of_rank_once(blocks: str, family: str) -> None:
    pipe = compiled(blocks, family)
    kinds = new_graphs(pipe)
    load(pipe, family)
    assert new_graphs(pipe) <= kinds
    for seed in (2, 3):
        assert new_graphs(pipe, lambda seed=seed: load(pipe, family, f"s{seed}", seed=seed)) == 0
        assert new_graphs(pipe, lambda seed=seed: pipe.set_adapters([f"s{seed}"], [0.1 * seed])) == 0
    load(pipe, family, "part", seed=7, only="to_")
    if blocks != "both":  # there a product of several layers has a sum of ranks of its own
        assert new_graphs(pipe, lambda: pipe.set_adapters(["part"])) == 0
    load(pipe, family, "wide", seed=8, rank=20)
    assert 0 < new_graphs(pipe, lambda: pipe.set_adapters(["wide"])) <= kinds
    assert 0 < new_graphs(pipe, pipe.disable_lora) <= kinds
    changes = [
        lambda: pipe.enable_lora(),
        lambda: pipe.set_adapters(["s2", "s3"], [0.5, 0.5]),
        lambda: pipe.set_adapters(["part"]),
        lambda: pipe.delete_adapters("wide"),
        lambda: pipe.unload_lora_weights(),
        lambda: [load(pipe, family, name, seed=9) for name in ("s2", "s3", "part")],
        lambda: load(pipe, family, "wide", seed=9, rank=20),
    ]
    for change in changes:
        assert new_graphs(pipe, change) <= kinds
    assert [new_graphs(pipe, change) for change in changes] == [0] * len(changes)


@pytest.fixture
def old_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `torch.compile` take no limit of graphs, as in torch 2.11 and before; the global one is 8."""
    monkeypatch.setattr(compile_cache, "_takes_limit", lambda: False)
    before, torch._dynamo.config.recompile_limit = torch._dynamo.config.recompile_limit, 8
    yield
    torch._dynamo.config.recompile_limit = before  # what raises it does not lower it again


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["stock", "both"])
def test_where_torch_knows_one_limit_for_all_it_is_raised(blocks: str, old_torch: None) -> None:
    test_a_swap_compiles_nothing_and_a_change_of_rank_once(blocks, "z_image")


def test_blocks_are_known_as_compiled_in_place_there_too(old_torch: None) -> None:
    pipe = compiled("stock")
    assert all(is_compiled_in_place(block) for block in pipe.transformer.layers)
    assert not is_compiled_in_place(ernie_accel.restore(pipe).transformer.layers[0])


def test_it_is_raised_in_every_thread_and_never_lowered(old_torch: None) -> None:
    """Torch 2.12 has a limit for each thread."""
    look = compile_cache._WithinLimit(lambda: torch._dynamo.config.recompile_limit)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(look).result() == compile_cache.RECOMPILE_LIMIT
    torch._dynamo.config.recompile_limit = 100
    assert look() == 100


@pytest.mark.parametrize("blocks", BLOCKS)
def test_every_call_does_what_it_does_where_nothing_is_compiled(blocks: str) -> None:
    pipe, eager = compiled(blocks), made("ernie", *BLOCKS[blocks])
    plain = latents(pipe)
    assert torch.equal(plain, latents(eager))
    for each in (pipe, eager):
        load(each, "ernie")
    first = latents(pipe)
    assert sqnr_db(first, latents(eager)) > FLOOR
    for name, call in CALLS.items():
        for each in (pipe, eager):
            call(each, "ernie")
        got, expected = latents(pipe), latents(eager)
        assert sqnr_db(got, expected) > FLOOR, name
        assert (sqnr_db(plain, expected) > FLOOR) == (name == "disable"), name
    pipe.unload_lora_weights()
    after = latents(pipe)
    assert torch.equal(after, plain) or sqnr_db(after, plain) > FLOOR  # merged, unmerged


@pytest.mark.parametrize("blocks", ["stock", "rewritten", "both"])
def test_loaded_before_is_as_loaded_after_and_restore_leaves_pefts_layers_as_they_were(blocks: str) -> None:
    stock, before, after = made("ernie"), made("ernie"), compiled(blocks)
    for each in (stock, before, after):
        load(each, "ernie")
    ernie_accel.optimize(before, *BLOCKS[blocks], Compile())
    assert sqnr_db(latents(before), latents(after)) > FLOOR
    assert stacks(before) and stacks(after)
    expected = latents(stock)
    for pipe in (before, after):
        ernie_accel.restore(pipe)
        assert not stacks(pipe)
        assert torch.equal(latents(pipe), expected)
        kinds = [type(layer) for layer in stock.transformer.modules()]
        assert [type(layer) for layer in pipe.transformer.modules()] == kinds


def test_copies_and_pickles_have_pefts_own_layers_and_can_be_compiled_again() -> None:
    pipe = compiled("rewritten")
    load(pipe, "ernie")
    expected = latents(pipe)
    copied, pickled = copy.deepcopy(pipe), copy.deepcopy(pipe)
    pickled.transformer = pickle.loads(pickle.dumps(pipe.transformer))
    for other in (copied, pickled):
        assert not stacks(other)
        assert sqnr_db(latents(other), expected) > FLOOR
        other.set_adapters(["a"], [0.3])
        changed = latents(other)
        pipe.set_adapters(["a"], [0.3])
        assert sqnr_db(changed, latents(pipe)) > FLOOR > sqnr_db(changed, expected)
        pipe.set_adapters(["a"], [1.0])
    assert torch.equal(latents(pipe), expected)


def test_state_dicts_do_not_have_what_is_stacked() -> None:
    pipe, stock = compiled("stock"), made("ernie")
    for each in (pipe, stock):
        load(each, "ernie")
        latents(each)
    assert stacks(pipe) and list(pipe.transformer.state_dict()) == list(stock.transformer.state_dict())


def test_an_adapter_that_is_written_over_another_is_seen_and_compiles_nothing() -> None:
    pipe, stock = compiled("stock"), made("ernie")
    for each in (pipe, stock):
        load(each, "ernie")
        latents(each)
    for each in (pipe, stock):
        each.load_lora_weights(adapter("ernie", seed=5), adapter_name="a", hotswap=True)
    assert new_graphs(pipe) == 0
    assert sqnr_db(latents(pipe), latents(stock)) > FLOOR


def test_a_dora_where_graphs_may_break_is_pefts_own() -> None:
    weights = dict(adapter("ernie"))
    for name, up in adapter("ernie").items():
        if ".lora_B." in name:
            weights[name.replace("lora_B", "lora_magnitude_vector")] = torch.ones(len(up))
    pipe, stock = compiled("stock", fullgraph=False), made("ernie")
    for each in (pipe, stock):
        each.load_lora_weights(dict(weights), adapter_name="a")
    assert sqnr_db(latents(pipe), latents(stock)) > FLOOR
    assert not any(stacked.serves for stacked in stacks(pipe))


def test_gradients_reach_the_adapters() -> None:
    pipe = compiled("stock")
    load(pipe, "ernie")
    latents(pipe)
    layer = pipe.transformer.get_submodule(TO_Q)
    x = torch.randn(3, layer.in_features, dtype=torch.float32)
    with torch.no_grad():
        expected = layer(x)
    layer(x).sum().backward()
    assert layer.lora_A["a"].weight.grad is not None
    assert sqnr_db(layer(x).detach(), expected) > FLOOR


def test_old_graphs_make_room_before_a_full_graph_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PEFT's own layers are traced, each adapter is a graph."""
    monkeypatch.setattr(compile_cache, "RECOMPILE_LIMIT", 8)
    monkeypatch.setattr(compile_cache, "_ROOM", 3)
    monkeypatch.setattr(stacked_adapters, "_is_plain", lambda layer: False)
    pipe, graphs = compiled("stock"), []
    for i in range(12):
        load(pipe, "ernie", f"s{i}", seed=i, only="to_")
        graphs.append(new_graphs(pipe, lambda i=i: pipe.set_adapters([f"s{i}"])))
    assert sum(graphs) > 8, "else nothing had to be dropped"


def test_a_hook_before_the_forward_writes_only_what_changed() -> None:
    pipe = compiled("stock")
    load(pipe, "ernie")
    latents(pipe)
    versions = [(part.down.data_ptr(), part.down._version) for part in stacks(pipe) if part.down is not None]
    assert versions
    update_stacked(pipe.transformer)
    assert versions == [(part.down.data_ptr(), part.down._version) for part in stacks(pipe) if part.down is not None]


def test_what_another_thread_changes_during_the_writing_is_seen_at_the_next_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, other = compiled("stock"), compiled("stock")
    for each in (pipe, other):
        load(each, "ernie")
    other.set_adapters(["a"], [0.3])
    write = stacked_adapters._write

    def meanwhile(layers: list[torch.nn.Module]) -> None:
        write(layers)
        for layer in layers:
            layer.set_scale("a", 0.3)

    with monkeypatch.context() as patch:
        patch.setattr(stacked_adapters, "_write", meanwhile)
        stacked_adapters.forget_stacked(pipe.transformer)
        update_stacked(pipe.transformer)
    assert torch.equal(latents(pipe), latents(other))


def test_blocks_whose_weights_are_on_disk_until_they_run_have_pefts_own_layers(tmp_path: Path) -> None:
    pipe, stock = compiled("stock", fullgraph=False), made("ernie")
    for each in (pipe, stock):
        load(each, "ernie")
    host = torch.device("cpu")
    pipe.transformer.enable_group_offload(host, host, "block_level", 1, offload_to_disk_path=str(tmp_path))
    assert sqnr_db(latents(pipe), latents(stock)) > FLOOR


def test_a_dora_that_is_refused_leaves_no_weights_behind() -> None:
    weights = dict(adapter("ernie"))
    for name, up in adapter("ernie").items():
        if ".lora_B." in name:
            weights[name.replace("lora_B", "lora_magnitude_vector")] = torch.ones(len(up))
    pipe = compiled("rewritten")
    expected = latents(pipe)
    fused = [part._joined for part in adaptables(pipe.transformer) if part._joined is not None]
    with pytest.raises(ErnieAccelError, match="gets a DoRA"):
        pipe.transformer.load_lora_adapter(weights, adapter_name="a")
    assert [part._joined for part in adaptables(pipe.transformer) if part._joined is not None] == fused
    held = [part.weight.numel() for each in fused if isinstance(each, FusedLinear) for part in each._parts.values()]
    assert held
    assert not any(held)
    assert torch.equal(latents(pipe), expected)


def test_a_restored_pipe_is_as_it_was() -> None:
    pipe = made("ernie")
    load(pipe, "ernie")
    latents(pipe)
    pipe.unload_lora_weights()
    before = snapshot(pipe)
    ernie_accel.optimize(pipe, Compile())
    load(pipe, "ernie")
    latents(pipe)
    pipe.unload_lora_weights()
    ernie_accel.restore(pipe)
    assert differences(before, snapshot(pipe)) == []

"""Weights that are fetched while the pipe runs, on a stand-in for a device whose copies arrive as late as they may."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import ernie_accel
from ernie_accel import CaptureGraphs, CastDtype, Compile, Quantize, Residency, RewriteBlocks, RewriteEnhancer
from ernie_accel.core.errors import ErnieAccelError, UnsupportedError
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.models.ernie_image import blocks as ernie_image_blocks
from ernie_accel.models.graphed_forward import GraphedForward
from ernie_accel.residency import movers as movers_module
from ernie_accel.residency.layout import ComponentSize, PieceSize, lay_out, least_bytes
from ernie_accel.residency.movers import MOVERS, Mover, StreamMover
from ernie_accel.transforms.weights.residency import least_weights
from tests.pipelines import picture, tiny_ernie, tiny_flux, tiny_lumina2, tiny_sd, tiny_wan, tiny_z_image
from tests.test_denoisers import draw


class LateMover(Mover):
    """Spoils the target when a copy starts, and makes the copy only when somebody waits for it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.started = self.waited = self.nbytes = self.pending = 0

    def start(self, target: torch.Tensor, source: torch.Tensor) -> object:
        target.fill_(255)  # NaN in every float dtype
        self.started, self.nbytes = self.started + 1, self.nbytes + source.nbytes
        self.pending += 1
        return [target, source]

    def wait(self, ticket: Any) -> None:
        if ticket:
            target, source = ticket
            target.copy_(source)
            ticket.clear()
            self.waited += 1
            self.pending -= 1


class Streams:
    """Stands in for ``torch.cuda``: streams that remember what they wait for, and graphs that are being captured."""

    def __init__(self) -> None:
        self.capturing = False
        self.current = self.Stream()

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.waits_for: list[Any] = []

        def wait_event(self, event: Any) -> None:
            self.waits_for.append(event)

        def synchronize(self) -> None:
            pass

    class Event:
        def record(self, stream: Any) -> None:
            self.stream = stream

    def current_device(self) -> int:
        return 0

    def current_stream(self, device: Any) -> Any:
        return self.current

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def set_device(self, device: Any) -> None:
        pass

    def device(self, device: Any) -> Any:
        return contextlib.nullcontext()


def test_a_copy_waits_for_every_stream_that_may_still_read_its_place():
    kind = Streams()
    mover = StreamMover(torch.device("cpu"), kind)
    first, second = kind.current, Streams.Stream()
    place = torch.zeros(2)
    mover.wait(mover.start(place, torch.ones(2)))
    kind.current = second
    mover._stream.waits_for.clear()
    mover.start(place, torch.ones(2))
    assert {id(event.stream) for event in mover._stream.waits_for} == {id(first), id(second)}


def test_a_graph_does_not_wait_for_what_is_outside_of_it():
    kind = Streams()
    mover = StreamMover(torch.device("cpu"), kind)
    ticket = mover.start(torch.zeros(2), torch.ones(2))
    kind.capturing = True
    mover.wait(ticket)
    assert kind.current.waits_for == []
    kind.capturing = False
    mover.wait(ticket)
    assert kind.current.waits_for == [ticket]


def test_a_device_without_a_number_is_the_one_that_is_current_then():
    assert StreamMover(torch.device("cpu"), Streams()).device == torch.device("cpu", 0)


class Runtime:
    """Notes which memory is pinned; memory that is freed meanwhile would be noticed."""

    def __init__(self) -> None:
        self.pinned: dict[int, Any] = {}

    def cudaHostRegister(self, place: int, nbytes: int, flags: int) -> int:
        self.pinned[place] = nbytes
        return 0

    def cudaHostUnregister(self, place: int) -> int:
        del self.pinned[place]
        return 0


@pytest.mark.parametrize("way", ["closed", "dropped"])
def test_memory_is_unpinned_before_it_is_freed(way, monkeypatch):
    """The trap: copies from memory that is used again while a freed part of it is pinned fail, in other places."""
    runtime, kind = Runtime(), Streams()
    monkeypatch.setattr(movers_module, "_runtime", lambda: runtime)
    mover = StreamMover(torch.device("cuda", 0), kind)
    source = torch.zeros(64)
    place, freed = source.data_ptr(), []
    weakref.finalize(source, lambda: freed.append(place in runtime.pinned))
    mover.pin([source])
    mover._pins._thread.join()
    assert runtime.pinned == {place: 256}
    del source
    gc.collect()
    assert freed == []
    if way == "closed":
        mover.close()
    del mover
    gc.collect()
    for thread in [each for each in threading.enumerate() if each.name == "ernie-accel-unpinning"]:
        thread.join()
    gc.collect()
    assert (runtime.pinned, freed) == ({}, [False])


def test_a_graph_of_your_own_cannot_have_weights_that_come_and_go(movers, monkeypatch):
    pipe = tiny_ernie(layers=5)
    ernie_accel.optimize(pipe, Residency(least(pipe)))
    monkeypatch.setattr(LateMover, "is_capturing", lambda self: True)
    with pytest.raises(ErnieAccelError, match="cannot be captured into a graph of your own"):
        picture(pipe)


def loras(value: float) -> dict[str, torch.Tensor]:
    name = "transformer.layers.2.self_attention.to_q.lora"
    return {f"{name}_A.weight": torch.full((4, 128), value), f"{name}_B.weight": torch.full((128, 4), value)}


@pytest.fixture
def movers(monkeypatch: pytest.MonkeyPatch) -> list[LateMover]:
    made: list[LateMover] = []

    def make(device: torch.device) -> Mover:
        made.append(LateMover(device))
        return made[-1]

    monkeypatch.setitem(MOVERS, "cpu", make)
    return made


def least(pipe: Any) -> int:
    return least_weights(pipe, PlannedPipe.of(pipe))


def state(pipe: Any) -> dict[str, torch.Tensor]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        f"{name}.{path}": tensor.clone()
        for name, part in parts.items()
        for path, tensor in (*part.named_parameters(), *part.named_buffers())
    }


PIPES = {
    "ernie": lambda: tiny_ernie(layers=7),
    "z_image": tiny_z_image,
    "lumina2": tiny_lumina2,
    "flux": tiny_flux,
    "wan": tiny_wan,
    "sd": tiny_sd,
}


def drawn(pipe: Any) -> torch.Tensor:
    if type(pipe).__name__ in ("WanPipeline", "StableDiffusionPipeline"):
        return draw(pipe)
    return picture(pipe)


@pytest.mark.parametrize("name", PIPES)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, 1.1])
def test_every_budget_gives_the_bits_of_the_whole_pipe(movers, name, share):
    pipe = PIPES[name]()
    before, was = drawn(pipe), state(pipe)
    low = least(pipe)
    weights = int(low + share * max(0, PlannedPipe.of(pipe).nbytes - low))
    ernie_accel.optimize(pipe, Residency(weights))
    for _ in range(2):
        assert torch.equal(drawn(pipe), before)
    if share == 0.0 and keeper_of(pipe).layout.moving:
        assert movers[0].waited > 0
    ernie_accel.restore(pipe)
    assert torch.equal(drawn(pipe), before)
    now = state(pipe)
    assert all(torch.equal(was[key], now[key]) for key in was)


def test_without_waiting_the_picture_would_be_noise(movers, monkeypatch):
    """The stand-in device must be able to show a missing wait."""
    pipe = tiny_ernie(layers=7)
    ernie_accel.optimize(pipe, Residency(least(pipe)))
    monkeypatch.setattr(LateMover, "wait", lambda self, ticket: None)
    assert picture(pipe).isnan().any()


def test_the_next_block_is_on_its_way_while_one_computes(movers):
    pipe = tiny_ernie(layers=8)
    ernie_accel.optimize(pipe, Residency(least(pipe)))
    picture(pipe, steps=1)
    mover, transformer = movers[0], pipe.transformer
    ahead = []

    def look(*_: object) -> None:
        ahead.append(mover.pending)

    for block in transformer.layers:
        block.register_forward_pre_hook(look)
    picture(pipe, steps=2)
    assert len(ahead) == 16
    assert min(ahead) >= 1


def test_what_fits_is_never_fetched(movers):
    pipe = tiny_ernie()
    ernie_accel.optimize(pipe, Residency(2 * PlannedPipe.of(pipe).nbytes))
    picture(pipe)
    assert movers[0].started == 0


def test_a_picture_fetches_what_the_layout_says(movers):
    pipe = tiny_ernie(layers=8)
    ernie_accel.optimize(pipe, Residency(least(pipe)))
    keeper = keeper_of(pipe)
    picture(pipe, steps=4)
    mover = movers[0]
    mover.nbytes = 0
    picture(pipe, steps=4)
    assert mover.nbytes <= 1.25 * keeper.layout.fetched([("text_encoder", 1), ("transformer", 4)])


def keeper_of(pipe: Any) -> Any:
    from ernie_accel.residency.keeper import Entrance

    hooks = getattr(pipe, "transformer", None) or pipe.unet
    hooks = hooks._forward_pre_hooks.values()
    return next(hook.keeper for hook in hooks if isinstance(hook, Entrance))


@pytest.mark.parametrize(
    "beside", [(RewriteBlocks(),), (Quantize("int8-weight-only"),), (CastDtype("bfloat16"), Quantize("int8"))]
)
def test_beside_others(movers, beside):
    pipe = tiny_ernie(layers=5)
    ernie_accel.optimize(pipe, *beside)
    before = picture(pipe)
    weights = least(pipe)
    ernie_accel.restore(pipe)
    ernie_accel.optimize(pipe, *beside, Residency(weights))
    assert torch.equal(picture(pipe), before)
    assert movers[-1].waited > 0
    ernie_accel.restore(pipe)


def test_the_enhancer_is_brought_for_its_turn(movers):
    pipe = tiny_ernie(layers=5, enhancer=True)
    arguments = {"use_pe": True, "generator": torch.Generator().manual_seed(3)}
    ernie_accel.optimize(pipe, RewriteEnhancer(max_new_tokens=6))
    before = picture(pipe, **arguments)
    ernie_accel.optimize(pipe, RewriteEnhancer(max_new_tokens=6), Residency(least(pipe)))
    arguments["generator"].manual_seed(3)
    assert torch.equal(picture(pipe, **arguments), before)


def test_graphs_are_not_used_where_blocks_are_streamed_and_are_where_all_fit(movers):
    from ernie_accel.core.captured import bring_whole

    pipe = tiny_ernie(layers=7)
    ernie_accel.optimize(pipe, Residency(least(pipe)))
    assert not bring_whole(pipe.transformer)
    assert bring_whole(pipe.text_encoder)
    ernie_accel.optimize(pipe, Residency(2 * PlannedPipe.of(pipe).nbytes))
    assert bring_whole(pipe.transformer)


@pytest.mark.parametrize(
    "act",
    [
        lambda pipe: pipe.to("meta"),
        lambda pipe: pipe.to(torch.bfloat16),
        lambda pipe: pipe.transformer.half(),
        lambda pipe: pipe.transformer.state_dict(),
        lambda pipe: pipe.transformer.load_state_dict({}),
        lambda pipe: pipe.text_encoder.to("meta"),
        lambda pipe: pipe.transformer.to(1),
        lambda pipe: pipe.transformer.compile(),
        lambda pipe: pipe.transformer.compile_repeated_blocks(),
        lambda pipe: pipe.transformer.layers[2].compile(),
        lambda pipe: pipe.transformer.load_lora_adapter({}, prefix="transformer", hotswap=True),
        lambda pipe: pipe.load_lora_weights(loras(2.0), adapter_name="a", hotswap=True),
        lambda pipe: pipe.enable_model_cpu_offload(device="cuda"),
        lambda pipe: pipe.enable_sequential_cpu_offload(device="cuda"),
        lambda pipe: copy.deepcopy(pipe),
        lambda pipe: copy.deepcopy(pipe.transformer),
        lambda pipe: pickle.dumps(pipe.text_encoder),
    ],
)
def test_what_would_lose_weights_is_refused_first(movers, act, tmp_path):
    pipe = tiny_ernie(layers=5)
    before = picture(pipe)
    ernie_accel.optimize(pipe, Residency(least(pipe)))
    with pytest.raises(ErnieAccelError, match="restore"):
        act(pipe)
    assert torch.equal(picture(pipe), before)
    ernie_accel.restore(pipe)
    assert torch.equal(picture(pipe), before)


def test_moving_it_where_it_is_changes_nothing(movers):
    pipe = tiny_ernie(layers=5)
    before = picture(pipe)
    ernie_accel.optimize(pipe, Residency(least(pipe)))
    assert torch.equal(picture(pipe.to("cpu")), before)
    assert pipe.transformer.to(torch.float32) is pipe.transformer


def test_it_is_saved_and_restored_around(movers, tmp_path):
    pipe = tiny_ernie(layers=5)
    before = picture(pipe)
    ernie_accel.optimize(pipe, Residency(least(pipe)))
    ernie_accel.save(pipe, tmp_path / "saved")
    assert torch.equal(picture(pipe), before)
    assert torch.equal(picture(ernie_accel.load(tmp_path / "saved")), before)


def test_too_little_is_refused_with_the_least_that_works(movers):
    pipe = tiny_ernie(layers=5)
    low = least(pipe)
    with pytest.raises(UnsupportedError, match=str(low)):
        ernie_accel.optimize(pipe, Residency(low - 1))
    ernie_accel.optimize(pipe, Residency(low))


def test_without_a_device_it_is_refused():
    with pytest.raises(UnsupportedError, match="no device memory"):
        ernie_accel.optimize(tiny_ernie(), Residency(10**6))


def test_a_pipe_on_the_host_goes_to_the_device_that_was_planned_for(movers, monkeypatch):
    pipe = tiny_ernie(layers=5)
    before = picture(pipe)
    monkeypatch.setattr("ernie_accel.transforms.weights.residency.device_of", lambda pipe: torch.device("meta"))
    ernie_accel.optimize(pipe, Residency(least(pipe)))
    assert torch.equal(picture(pipe), before)


def test_an_interrupt_half_way_leaves_the_pipe_as_it_was(movers, monkeypatch):
    pipe = tiny_ernie(layers=5)
    before = picture(pipe)
    taken = []
    from ernie_accel.residency import keeper

    original = keeper.Keeper._take_piece

    def take(self: Any, name: str, piece: Any) -> None:
        if len(taken) == 4:
            raise KeyboardInterrupt
        taken.append(name)
        original(self, name, piece)

    monkeypatch.setattr(keeper.Keeper, "_take_piece", take)
    with pytest.raises(KeyboardInterrupt):
        ernie_accel.optimize(pipe, Residency(least(pipe)))
    assert torch.equal(picture(pipe), before)


def test_a_device_too_full_for_the_block_is_emptied_first_and_given_back_through_the_host(movers, monkeypatch):
    pipe = tiny_ernie(layers=5)
    before = picture(pipe)
    there = [StorageWeakRef(p.untyped_storage()) for p in pipe.transformer.parameters()]
    full: list[int] = []

    def allocate(self: Mover, nbytes: int) -> torch.Tensor:
        full.append(sum(not reference.expired() for reference in there))
        if len(full) == 1:
            raise torch.OutOfMemoryError
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(LateMover, "allocate", allocate)
    ernie_accel.optimize(pipe, Residency(least(pipe)))
    assert full == [len(there), 0]
    assert torch.equal(picture(pipe), before)

    copied: list[int] = []

    def copy_back(self: Mover, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        copied.append(1)
        if len(copied) % 2:
            raise torch.OutOfMemoryError
        return values.clone()

    monkeypatch.setattr(LateMover, "copy_back", copy_back)
    ernie_accel.restore(pipe)
    assert torch.equal(picture(pipe), before)


def test_the_host_does_not_hold_all_weights_twice_while_they_are_given_back(movers, monkeypatch):
    pipe = tiny_ernie(layers=8)
    ernie_accel.optimize(pipe, Residency(least(pipe)))
    keeper, kept = keeper_of(pipe), []
    original = LateMover.copy_back

    def copy_back(self: Mover, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        kept.append(len(keeper._hosts))
        return original(self, values, device)

    monkeypatch.setattr(LateMover, "copy_back", copy_back)
    ernie_accel.restore(pipe)
    assert kept[0] > 8
    assert kept[-1] == 1


def test_what_several_blocks_read_is_there_for_all_of_them(movers):
    pipe = tiny_ernie(layers=7)
    table = pipe.transformer.layers[0].self_attention.norm_q.weight
    for layer in pipe.transformer.layers:
        layer.self_attention.norm_q.weight = table
    before = picture(pipe)
    ernie_accel.optimize(pipe, Residency(least(pipe)))
    assert torch.equal(picture(pipe), before)
    ernie_accel.restore(pipe)
    assert pipe.transformer.layers[6].self_attention.norm_q.weight is table


def test_components_with_weights_in_common_are_refused(movers):
    pipe = tiny_ernie(layers=5, enhancer=True)
    pipe.pe.model.norm.weight = pipe.text_encoder.language_model.norm.weight
    with pytest.raises(UnsupportedError, match="text_encoder and pe have weights in common"):
        ernie_accel.optimize(pipe, Residency(10**9))


def sizes(blocks: int, first: int = 1, large: tuple[int, ...] = ()) -> ComponentSize:
    pieces = [PieceSize("t", first)]
    pieces += [PieceSize(f"t.{i}", 2048 if i in large else 1024) for i in range(blocks)]
    return ComponentSize("t", tuple(pieces))


def test_a_layout_covers_as_little_as_it_can():
    prompts = [
        ComponentSize(name, (PieceSize(name, size),), streams=False) for name, size in (("p", 4096), ("e", 3072))
    ]
    denoiser = sizes(8)
    total = 8 * 1024 + 512 + 4096 + 3072
    assert not lay_out([*prompts, denoiser], total).moving
    tight = lay_out([*prompts, denoiser], 8 * 1024 + 512 + 4096)
    assert tight.moving == {"p", "e"}  # they cover each other, and nothing of the denoiser
    tighter = lay_out([*prompts, denoiser], 8 * 1024 + 512 + 2048)
    assert tighter.moving == {"p", "e", "t.6", "t.7"}
    assert not tighter.streamed
    streamed = lay_out([*prompts, denoiser], 6 * 1024 + 512)
    assert len(streamed.streamed) == 4
    assert streamed.nbytes <= 6 * 1024 + 512


def test_streamed_blocks_are_spread_evenly_and_large_ones_stay():
    layout = lay_out([sizes(12, large=(0,))], 512 + 2048 + 5 * 1024)
    moving = sorted(int(name.partition(".")[2]) for name in layout.streamed)
    assert 0 not in moving
    gaps = [after - before for before, after in itertools.pairwise(moving)]
    assert max(gaps) - min(gaps) <= 1


def test_no_two_pieces_of_one_component_share_an_address_unless_they_take_turns():
    for capacity in range(least_bytes([sizes(9)]), 12 * 1024, 300):
        layout = lay_out([sizes(9)], capacity)
        for name in layout.offsets:
            if name not in layout.streamed:
                assert not list(layout.overlapping(name))
        assert layout.nbytes <= capacity


def test_a_lora_loaded_later_is_drawn_and_outlives_the_restore(movers):
    from tests.test_rewrite import lora as add_lora

    stock, pipe = tiny_ernie(layers=5), tiny_ernie(layers=5)
    ernie_accel.optimize(pipe, Residency(least(pipe)))
    add_lora(stock), add_lora(pipe)
    assert torch.equal(picture(pipe), picture(stock))
    with pytest.raises(ErnieAccelError, match="restore"):
        pipe.transformer.fuse_lora()
    ernie_accel.restore(pipe)
    assert torch.equal(picture(pipe), picture(stock))


@pytest.mark.parametrize("loaded", ["before", "after"])
def test_a_lora_beside_fused_kernels_is_read_when_its_block_has_arrived(movers, monkeypatch, loaded):
    """The pre-hook that looks for changed adapters runs before any block has: what it would read is another block's."""
    from ernie_accel import Context, FuseKernels
    from ernie_accel.models.adapters import bind_layers
    from tests.test_fuse_kernels import sqnr_db
    from tests.test_lora import adapter

    monkeypatch.setattr(FuseKernels, "_unsupported_reasons", lambda self, pipe, context: [])
    context = Context("cpu", "a test", (9, 0), versions={"triton": "3.6"})
    transforms = (RewriteBlocks(), FuseKernels("fp8"))
    stock, pipe = (tiny_ernie(layers=5, dtype=torch.bfloat16) for _ in range(2))
    weights = adapter("ernie") | {
        key.replace("layers.1.", f"layers.{i}."): tensor for key, tensor in adapter("ernie").items() for i in (2, 3, 4)
    }
    for each in (stock, *([pipe] if loaded == "before" else [])):
        each.load_lora_weights(dict(weights), adapter_name="a")
    ernie_accel.optimize(stock, *transforms, context=context)
    ernie_accel.optimize(pipe, *transforms, context=context)
    picture(pipe)  # stacks the adapters before some of what holds them comes and goes
    ernie_accel.optimize(pipe, *transforms, Residency(least(pipe)), context=context)
    if loaded == "before":
        assert sqnr_db(picture(pipe), picture(stock)) > 25  # in spare columns, where all weights stay
    monkeypatch.setattr("ernie_accel.kernels.spare_terms.LARGEST_FACTOR", 0.0)  # from here on apart, as beside others
    bind_layers(stock.transformer)
    if loaded == "after":
        pipe.load_lora_weights(dict(weights), adapter_name="a")
        with pytest.raises(ErnieAccelError, match="restore"):
            pipe.transformer.state_dict()
    assert torch.equal(picture(pipe), picture(stock))
    for each in (stock, pipe):
        each.set_adapters(["a"], [0.4])
    assert torch.equal(picture(pipe), picture(stock))


def test_graphs_replay_weights_that_left_and_came_back(movers, monkeypatch):
    """Within a graph nothing waits for a copy, so all must have arrived before each replay."""
    pipe = ernie_accel.optimize(tiny_ernie(layers=5), RewriteBlocks())
    expected = [picture(pipe, steps=4), picture(pipe, steps=4, prompt="a")]
    inside: list[bool] = []

    def capture(work: Any, pool: object) -> Any:
        inside.append(True)
        output = work()
        inside.pop()

        class Graph:
            def pool(self) -> None: ...

            def replay(self) -> None:
                inside.append(True)
                output.copy_(work())
                inside.pop()
                replays.append(1)

        return Graph(), output

    wait, replays = LateMover.wait, []
    monkeypatch.setattr(LateMover, "wait", lambda self, ticket: None if inside else wait(self, ticket))
    pipe.transformer.forward = GraphedForward(pipe.transformer, ernie_image_blocks, 64, 2, capture)
    planned = PlannedPipe.of(pipe)
    ernie_accel.optimize(pipe, RewriteBlocks(), Residency(planned.nbytes - planned.bytes_of("text_encoder") // 2))
    layout = keeper_of(pipe).layout
    assert not layout.streamed
    assert any(name.startswith("transformer") for name in layout.moving)
    for _ in range(2):
        got = [picture(pipe, steps=4), picture(pipe, steps=4, prompt="a")]
        assert all(map(torch.equal, got, expected))
    assert len(replays) == 14  # of 16 steps; the first of each shape runs as it is


def test_compiled_blocks_wait_for_their_weights(movers, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    pipe = tiny_ernie(layers=5)
    before = picture(pipe)
    ernie_accel.optimize(pipe, Residency(least(pipe)))
    ernie_accel.optimize(pipe, Compile(), Residency(least(pipe)))
    assert torch.equal(picture(pipe), before)
    assert movers[-1].waited > 0


def test_graphs_and_residency_are_planned_together(movers):
    pipe = tiny_ernie(layers=5)
    the_plan = ernie_accel.plan(pipe, RewriteBlocks(), CaptureGraphs(), Residency(least(pipe)))
    assert the_plan.ok
    assert [type(step.transform).__name__ for step in the_plan.steps][-1] == "Residency"

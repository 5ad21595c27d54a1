"""Calls of optimized pipes from several threads give the pictures they give one after the other."""

from __future__ import annotations

import copy
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import ernie_accel
from ernie_accel import (
    BatchPromptEncoding,
    CacheSteps,
    CallDefaults,
    CastDtype,
    ElideMask,
    ExpandAttentionMask,
    RewriteBlocks,
    SwapScheduler,
)
from ernie_accel.core import turns
from ernie_accel.models.token_layout import Positions, Prepared
from ernie_accel.transforms.denoiser.cache_steps.cache_steps import LEAST_STEPS
from tests.pipelines import picture, tiny_ernie, tiny_z_image


@pytest.mark.parametrize("make", [tiny_ernie, tiny_z_image])
@pytest.mark.parametrize(
    "transforms",
    [(CastDtype("float32"),), (SwapScheduler("unipc"), BatchPromptEncoding()), (CacheSteps(), CallDefaults("turbo"))],
    ids=str,
)
def test_threads_on_one_pipe_draw_what_one_thread_draws(make, transforms):
    pipe = ernie_accel.optimize(make(), *transforms, on_unsupported="skip")
    # Of fewer steps a call is computed whole.
    seeds, steps = (2, LEAST_STEPS) if isinstance(transforms[0], CacheSteps) else (4, 4)
    expected = [picture(pipe, seed=seed, steps=steps) for seed in range(seeds)]
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda seed: picture(pipe, seed=seed, steps=steps), [*range(seeds)] * 2))
    for seed, one in enumerate(drawn):
        assert torch.equal(one, expected[seed % seeds])


def test_threads_on_two_pipes_over_the_same_components_take_turns():
    pipe = tiny_ernie()
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    ernie_accel.optimize(pipe, RewriteBlocks(), CacheSteps())
    ernie_accel.optimize(other, CallDefaults(num_inference_steps=2))
    expected = [picture(each, seed=seed) for seed in range(3) for each in (pipe, other)]
    with ThreadPoolExecutor(4) as pool:
        drawn = list(
            pool.map(lambda job: picture(job[1], seed=job[0]), [(s, p) for s in range(3) for p in (pipe, other)])
        )
    for one, two in zip(drawn, expected, strict=True):
        assert torch.equal(one, two)


def test_a_plain_pipe_over_a_transformer_with_cached_steps_draws_beside_it_what_it_draws_alone():
    pipe = tiny_ernie()
    want = picture(pipe, steps=LEAST_STEPS)
    plain = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    plain.set_progress_bar_config(disable=True)
    ernie_accel.optimize(pipe, CacheSteps())
    cached = picture(pipe, steps=LEAST_STEPS)
    assert not torch.equal(cached, want)
    with ThreadPoolExecutor(2) as pool:  # one thread a pipe: calls of the plain one do not take turns
        drawn = pool.map(lambda each: [picture(each, steps=LEAST_STEPS) for _ in range(4)], (pipe, plain))
    for pictures, expected in zip(drawn, (cached, want), strict=True):
        assert all(torch.equal(one, expected) for one in pictures)


def test_threads_get_their_turns_in_the_order_in_which_they_asked():
    """One that calls in a loop does not keep the others waiting: its next call comes after theirs."""
    pipe = SimpleNamespace(components={"transformer": torch.nn.Identity()})
    order, held = [], threading.Event()
    lock_of = turns._locks

    def waiting():
        return sum(len(lock._waiting) for _, lock in lock_of.values())

    def call(name, times):
        for _ in range(times):
            with turns.turn_of(pipe):
                order.append(name)
                held.wait(30)

    before = waiting()
    threads = []
    for number, (name, times) in enumerate([("loop", 3), ("a", 1), ("b", 1), ("c", 1)]):
        threads.append(threading.Thread(target=call, args=(name, times)))
        threads[-1].start()
        ends = time.monotonic() + 30
        while not order or waiting() - before < number:
            assert time.monotonic() < ends
            time.sleep(0.001)
    held.set()
    for thread in threads:
        thread.join(30)
    assert order == ["loop", "a", "b", "c", "loop", "loop"]


def test_ctrl_c_while_waiting_for_a_turn_leaves_it_to_the_others():
    lock = turns._Lock()
    other = threading.Thread(target=lambda: [lock.__enter__(), begun.set(), go_on.wait(30), lock.__exit__()])
    begun, go_on = threading.Event(), threading.Event()
    other.start()
    assert begun.wait(30)
    handler = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            lock.__enter__()
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert not lock._waiting
    go_on.set()
    other.join(30)
    with lock, lock:
        assert lock._depth == 2
    assert (lock._depth, lock._owner) == (0, None)


def test_a_call_within_a_call_does_not_wait_for_itself():
    pipe = ernie_accel.optimize(tiny_ernie(), CallDefaults("turbo"))
    errors = []

    def callback(self, step, timestep, kwargs):
        try:
            pipe("a prompt", height=7, width=7)
        except ValueError as error:
            errors.append(error)
        return kwargs

    with ThreadPoolExecutor(1) as pool:
        pool.submit(picture, pipe, callback_on_step_end=callback).result(timeout=60)
    assert len(errors) == 3


def test_after_restore_nobody_waits_and_the_class_is_the_pipelines_own():
    pipe = tiny_ernie()
    cls = type(pipe)
    ernie_accel.optimize(pipe, CallDefaults("turbo"), BatchPromptEncoding())
    assert type(pipe) is not cls
    assert type(pipe).__name__ == cls.__name__
    ernie_accel.restore(pipe)
    assert type(pipe) is cls


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"])
def test_copies_and_pickles_keep_what_goes_around_their_calls(twin):
    pipe = ernie_accel.optimize(tiny_ernie(), CallDefaults("turbo"), BatchPromptEncoding())
    other = twin(pipe)  # before the first call: transformers attaches hooks that no pickle takes
    expected = picture(pipe)
    assert torch.equal(picture(other), expected)
    assert type(other).__call__.__signature__.parameters["num_inference_steps"].default == 8
    ernie_accel.restore(pipe)
    assert torch.equal(picture(other), expected)


LENGTHS = {"one": ["a red circle", "a red circle"], "two": ["a red circle", "a red circle on a small blue square"]}


@pytest.mark.parametrize("transforms", [(ElideMask(),), (ExpandAttentionMask(),), (RewriteBlocks(),)], ids=repr)
def test_a_second_pipe_that_does_not_wait_draws_with_its_own_masks(transforms):
    """Both threads stop in the first block: what each has said of its padding by then must not reach the other."""
    pipe, stock = tiny_ernie(), tiny_ernie()
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    expected = {name: picture(stock, prompt=prompts, steps=6) for name, prompts in LENGTHS.items()}
    ernie_accel.optimize(pipe, *transforms)
    barrier = threading.Barrier(2)

    def stop(*_):
        barrier.wait(60)

    pipe.transformer.layers[0].register_forward_pre_hook(stop, prepend=True)
    with ThreadPoolExecutor(2) as threads:
        drawn = {
            name: threads.submit(picture, each, prompt=LENGTHS[name], steps=6)
            for name, each in (("one", pipe), ("two", other))
        }
        found = {name: future.result(120) for name, future in drawn.items()}
    for name, image in found.items():
        torch.testing.assert_close(image, expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("transforms", [(ElideMask(),), (ExpandAttentionMask(),), (RewriteBlocks(),)], ids=repr)
def test_threads_keep_their_own_masks_in_a_transformer_compiled_whole_whose_graph_breaks(transforms):
    """Both stop at a break between the graph that learns of the padding and the graph of the first block."""
    torch._dynamo.reset()
    pipe, stock = tiny_ernie(layers=1), tiny_ernie(layers=1)
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    expected = {name: picture(stock, prompt=prompts, steps=2) for name, prompts in LENGTHS.items()}
    ernie_accel.optimize(pipe, *transforms)
    waits = []

    @torch._dynamo.disable
    def stop(*_):
        for barrier in waits:
            barrier.wait(60)

    pipe.transformer.layers[0].register_forward_pre_hook(stop, prepend=True)
    pipe.transformer.compile(backend="eager")
    pipes = {"one": pipe, "two": other}
    for name, each in pipes.items():  # compiles for both
        picture(each, prompt=LENGTHS[name], steps=2)
    waits.append(threading.Barrier(2))
    with ThreadPoolExecutor(2) as threads:
        drawn = {name: threads.submit(picture, pipes[name], prompt=LENGTHS[name], steps=2) for name in pipes}
        found = {name: future.result(120) for name, future in drawn.items()}
    torch._dynamo.reset()
    for name, image in found.items():
        torch.testing.assert_close(image, expected[name], rtol=0, atol=1e-5)


def test_positions_are_remembered_while_threads_draw_in_many_sizes():
    @dataclass(frozen=True)
    class Size(Prepared):
        size: torch.Tensor

    positions = Positions(keep=1)

    def look(size):
        for _ in range(2000):
            assert positions.get(size, lambda: Size(torch.tensor(size))).size == size

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(look, range(1, 5)))
    finally:
        sys.setswitchinterval(switch)

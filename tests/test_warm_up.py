"""`Warmup`: what it has called before, the first real picture does not compile; and nothing else notices it."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch._dynamo.testing

import ernie_accel
from ernie_accel import (
    BatchPromptEncoding,
    CacheSteps,
    CallDefaults,
    CaptureGraphs,
    Compile,
    CompileVae,
    Context,
    FreeAfterUse,
    FuseKernels,
    FuseVae,
    RewriteBlocks,
    RewriteEnhancer,
    RewriteTextEncoder,
    SetAttention,
    TruncatePrompts,
    Warmup,
)
from ernie_accel.core.wrap_call import wrapper
from ernie_accel.models.ministral.decoder import Decoder
from ernie_accel.transforms.calls.warm_up import prompt_of
from ernie_accel.transforms.prompts.encode_prompts import _Encoder
from tests.examples import differences, snapshot
from tests.pipelines import PIPELINES, after, picture, tiny_ernie
from tests.test_graphs import H200, Recorder

SMALL = Warmup(sizes=((64, 64),))


@pytest.fixture
def graphs(monkeypatch):
    """Count graphs: the compiler is replaced by one that runs them as they are."""
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounter()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **(k | {"backend": count, "mode": None})))
    yield count
    torch._dynamo.reset()


def calls_of(pipe):
    """Return a list that fills with (size, batch, text tokens, whether it is decoded) of each forward."""
    calls = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            (*kwargs["hidden_states"].shape[-2:], len(kwargs["text_lens"]), kwargs["text_bth"].shape[1])
        ),
        with_kwargs=True,
    )
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: calls.append("decode"))
    return calls


def test_the_first_picture_compiles_nothing(graphs):
    request = CallDefaults(guidance_scale=1.0), Compile(), CompileVae(), Warmup(sizes=((64, 64),), batch_sizes=(1, 2))
    pipe = ernie_accel.optimize(tiny_ernie(), *request)
    compiled = graphs.frame_count
    assert compiled > 0
    picture(pipe)
    picture(pipe, prompt=["a red circle", "a big blue square"])
    assert graphs.frame_count == compiled


def test_without_it_the_first_picture_compiles(graphs):
    """The other half: the count above really counts."""
    pipe = ernie_accel.optimize(tiny_ernie(), Compile(), CompileVae())
    assert graphs.frame_count == 0
    picture(pipe)
    assert graphs.frame_count > 0


@pytest.mark.parametrize("cache", [(), (CacheSteps(),)], ids=repr)
def test_the_first_picture_is_replayed_from_its_first_step(cache, monkeypatch):
    """On a stand-in that records calls instead of CUDA graphs."""
    recorder = Recorder()
    monkeypatch.setattr("ernie_accel.models.replays.capture_cuda", recorder)
    once = CallDefaults(num_inference_steps=24, guidance_scale=1.0)
    expected = picture(ernie_accel.optimize(tiny_ernie(), RewriteBlocks(), once, *cache), steps=24)
    wanted = Warmup(sizes=((64, 64),), prompt_lengths=(5,))  # as many tokens as the prompt of `picture`
    pipe = ernie_accel.optimize(tiny_ernie(), RewriteBlocks(), once, CaptureGraphs(), *cache, wanted, context=H200)
    assert (recorder.captures, recorder.replays) == (1, 1)
    assert torch.equal(picture(pipe, steps=24), expected)
    computed = sum(cache[0].computes(step, 24) for step in range(24)) if cache else 24
    assert (recorder.captures, recorder.replays) == (1, 1 + computed)


def test_the_enhancer_is_warmed_up_for_each_batch_size_before_the_pictures(monkeypatch):
    pipe, log = tiny_ernie(enhancer=True), []
    monkeypatch.setattr(Decoder, "_read", lambda self, workplace, prompts: log.append(f"read {len(prompts)}"))
    monkeypatch.setattr(Decoder, "_step", lambda *_: log.append("step"))
    pipe.transformer.register_forward_pre_hook(lambda *_: log.append("draw"))
    wanted = Warmup(sizes=((64, 64),), batch_sizes=(1, 3))
    ernie_accel.optimize(pipe, RewriteEnhancer(max_new_tokens=9), wanted, context=H200)
    # Twice, of three tokens: what is done for the second time is captured, reading a prompt as well as a token.
    assert log == (["read 1", *["step"] * 3] * 2 + ["read 3", *["step"] * 3] * 2) + ["draw"] * 4
    note = ernie_accel.report(pipe).entries[-1].applied.note
    assert re.match(r"prompts enhanced, batch 1: \d+ ms; prompts enhanced, batch 3: \d+ ms; 64x64, batch 1: \d+", note)


def test_an_enhancer_that_is_off_by_default_is_not_warmed_up():
    pipe, enhancer = tiny_ernie(enhancer=True), RewriteEnhancer()

    def captures(pipe, context, *before):
        return "enhancer" in after(context, pipe, *before, enhancer).planned(pipe).on_first_call

    assert captures(pipe, H200)
    assert captures(pipe, H200, CallDefaults("turbo"))
    assert not captures(pipe, H200, CallDefaults(use_pe=False))
    assert not captures(pipe, Context.named("cpu"))
    assert not captures(tiny_ernie(), H200)


@pytest.mark.parametrize(("max_tokens", "times"), [(1024, 2), (0, 1)])
def test_the_text_encoder_is_called_again_where_the_second_forward_is_captured(max_tokens, times):
    pipe, seen = tiny_ernie(), []
    pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    calls = calls_of(pipe)
    wanted = Warmup(sizes=((64, 64),), prompt_lengths=(4, 9))
    planned = CallDefaults(guidance_scale=1.0), RewriteBlocks(), RewriteTextEncoder(max_tokens=max_tokens)
    ernie_accel.optimize(pipe, *planned, CaptureGraphs(max_tokens=0), wanted, context=H200)
    assert seen == [(1, 4)] * times + [(1, 9)] * times
    assert calls.count("decode") == 1


def test_more_graphs_than_are_kept_is_a_reason_with_the_number_to_keep(ernie):
    def reasons(*planned, sizes=((64, 64), (96, 64), (64, 96))):
        wanted = Warmup(sizes=sizes, batch_sizes=(1, 2))
        return wanted.unsupported(ernie, after(H200, ernie, RewriteBlocks(), *planned))

    assert reasons(CaptureGraphs(keep=4)) == [
        "6 of these pictures are captured, and 4 graphs are kept: use CaptureGraphs(keep=6)"
    ]
    assert reasons(CaptureGraphs(keep=6)) == reasons(CaptureGraphs()) == []
    assert (
        reasons(CaptureGraphs(keep=1), sizes=((1024, 1024), (848, 1264), (1264, 848))) == []
    )  # too large to be captured
    assert reasons(Compile()) == []


@pytest.mark.parametrize(("precision", "captured"), [("fp8", 3), ("bf16", 0)])
def test_large_pictures_count_where_they_may_be_captured(precision, captured):
    pipe = tiny_ernie(dtype=torch.bfloat16)
    cudnn = Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.6", "cudnn": "1.32"})
    planned = RewriteBlocks(), FuseKernels(precision), CaptureGraphs(keep=1)
    wanted = Warmup(sizes=((1024, 1024), (848, 1264), (1264, 848), (2048, 2048)))  # the last is too large
    reasons = wanted.unsupported(pipe, after(cudnn, pipe, *planned))
    assert [f"{captured} of these pictures are captured" in each for each in reasons] == [True] * bool(captured)


def test_prompt_lengths_that_share_a_graph_are_one():
    pipe = tiny_ernie(dtype=torch.bfloat16)
    cudnn = Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.6", "cudnn": "1.32"})
    wanted = Warmup(sizes=((64, 64),), prompt_lengths=(5, 7, 8, 9, 10))  # with 16 tokens of the image

    def reasons(*planned):
        return wanted.unsupported(
            pipe, after(cudnn, pipe, RewriteBlocks(), FuseKernels("bf16"), *planned, CaptureGraphs(keep=1))
        )

    assert reasons() == reasons(SetAttention()) == []
    assert "5 of these pictures are captured" in reasons(SetAttention("native"))[0]
    lengths = replace(wanted, prompt_lengths=(5, 7, 8, 9, 10, 49, 50)).unsupported  # beyond 64 tokens: another graph
    planned = RewriteBlocks(), FuseKernels("bf16"), CaptureGraphs(keep=1)
    assert "2 of these pictures are captured" in lengths(pipe, after(cudnn, pipe, *planned))[0]


def test_every_combination_is_called_for_two_steps_and_each_shape_decoded_once(graphs, ernie):
    calls = calls_of(ernie)
    wanted = Warmup(sizes=((64, 64), (96, 64)), batch_sizes=(1, 2), prompt_lengths=(4, 9))
    ernie_accel.optimize(ernie, CallDefaults(guidance_scale=1.0), Compile(), wanted)
    expected = []
    for width in (4, 6):
        for batch in (1, 2):
            expected += [(4, width, batch, 4)] * 2 + ["decode"] + [(4, width, batch, 9)] * 2
    assert calls == expected


def test_the_receipt_tells_the_milliseconds_of_each(graphs, ernie):
    wanted = Warmup(sizes=((64, 64),), batch_sizes=(1, 2), prompt_lengths=(4,))
    ernie_accel.optimize(ernie, Compile(), wanted)
    applied = ernie_accel.report(ernie).entries[-1].applied
    assert applied.changed == ("64x64, batch 1, 4 tokens", "64x64, batch 2, 4 tokens")
    spent = re.findall(r"(64x64, batch \d, 4 tokens): (\d+) ms", applied.note)
    assert tuple(name for name, _ in spent) == applied.changed
    assert 0 < sum(int(ms) for _, ms in spent) <= 1000 * applied.seconds + 1
    assert "compiled code goes with the undo of what compiled it" in applied.note


def test_no_random_state_no_scheduler_and_no_picture_notices_it(graphs, ernie):
    before = picture(ernie_accel.optimize(tiny_ernie(), Compile(), BatchPromptEncoding(cache=4)))
    instance, scheduler = dict(vars(ernie)), str(vars(ernie.scheduler))
    states = torch.random.get_rng_state(), random.getstate(), str(np.random.get_state())
    ernie_accel.optimize(ernie, Compile(), BatchPromptEncoding(cache=4), SMALL)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert str(vars(ernie.scheduler)) == scheduler
    assert torch.equal(picture(ernie), before)
    ernie_accel.restore(ernie)
    assert {name: value for name, value in vars(ernie).items() if name in instance} == instance


@pytest.mark.parametrize("on_disk", [False, True])
def test_prompts_that_are_remembered_stay_those_of_the_user(graphs, ernie, tmp_path, on_disk):
    """A warm-up takes no place among them, and none of those it happens to draw counts as used again."""
    encoding = BatchPromptEncoding(cache=2, folder=str(tmp_path) if on_disk else None)
    theirs = prompt_of(ernie.tokenizer, 5)
    ernie_accel.optimize(ernie, encoding)
    picture(ernie, prompt=theirs)
    picture(ernie, prompt="a red circle")
    memory = wrapper(ernie, "prompts", _Encoder)._memory

    def remembered():
        if not on_disk:
            return [(ids, id(hidden_th)) for ids, hidden_th in memory._kept.items()]
        return sorted((file.stat().st_mtime_ns, file.name, file.read_bytes()) for file in tmp_path.iterdir())

    before, read = remembered(), []
    assert len(before) == 2
    # With guidance, so that the empty negative prompt is encoded, too; and with a prompt that is remembered.
    ernie.text_encoder.register_forward_pre_hook(lambda *_: read.append(1))
    ernie_accel.optimize(ernie, encoding, Compile(), Warmup(sizes=((64, 64),), prompt_lengths=(5, 9)))
    assert len(read) == 2
    assert wrapper(ernie, "prompts", _Encoder)._memory is memory
    assert remembered() == before


def test_restore_gives_the_original_back(graphs, ernie):
    picture(ernie)  # its first call makes transformers note things on the text encoder
    before = snapshot(ernie)
    ernie_accel.optimize(ernie, Compile(), SMALL)
    ernie_accel.restore(ernie)
    assert differences(before, snapshot(ernie)) == []


def test_it_runs_again_only_after_something_before_it_changed(graphs, ernie):
    calls = calls_of(ernie)
    ernie_accel.optimize(ernie, Compile(), SMALL)
    once = len(calls)
    ernie_accel.optimize(ernie, Compile(), SMALL)
    assert len(calls) == once > 0
    ernie_accel.optimize(ernie, Compile(mode="default"), SMALL)
    assert len(calls) == 2 * once
    ernie_accel.optimize(ernie, Compile(mode="default"))
    assert len(calls) == 2 * once
    ernie_accel.optimize(ernie, Compile(mode="default"), SMALL)
    assert len(calls) == 3 * once


def test_where_nothing_compiles_there_is_nothing_to_do(ernie):
    calls = calls_of(ernie)
    ernie_accel.optimize(ernie, RewriteBlocks(), FuseKernels("bf16"), CaptureGraphs(), SMALL)
    (entry,) = (entry for entry in ernie_accel.report(ernie).entries if entry.step.transform == SMALL)
    assert entry.status == "nothing to do"
    assert "nothing is compiled or captured on cpu" in entry.step.preview.note
    assert calls == []


def test_what_somebody_else_compiled_is_warmed_up_too(graphs, ernie):
    assert not ernie_accel.plan(ernie, SMALL).steps[0].preview.changes
    ernie.transformer.layers[0].compile()
    assert ernie_accel.plan(ernie, SMALL).steps[0].preview.changes == ("64x64, batch 1",)


@pytest.mark.parametrize(
    "transforms",
    [
        (Compile(),),
        (CompileVae(),),
        (FuseVae(),),
        (RewriteBlocks(), CaptureGraphs()),
        (RewriteBlocks(), FuseKernels("bf16")),
    ],
    ids=repr,
)
def test_everything_that_makes_a_first_picture_slow_counts(transforms):
    context = Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.5"})
    plan = ernie_accel.plan(tiny_ernie(dtype=torch.bfloat16), *transforms, SMALL, context=context)
    assert plan.steps[-1].verdict == "apply", str(plan)


@pytest.mark.parametrize("name", ["ernie", "z_image"])
def test_without_sizes_it_takes_those_of_the_family(name):
    pipe = PIPELINES[name]()
    plan = ernie_accel.plan(pipe, Compile(), Warmup(), context=Context("cuda", "NVIDIA H200", (9, 0)))
    sizes = [change.split(",")[0] for change in plan.steps[-1].preview.changes]
    assert sizes == [f"{width}x{height}" for width, height in ernie_accel.families.family_of(pipe).sizes]


@pytest.mark.parametrize("name", ["ernie", "z_image", "lumina2", "newbie"])
def test_it_runs_on_every_family_and_changes_no_picture(name, graphs):
    pipe, plain = PIPELINES[name](), PIPELINES[name]()
    for each in (pipe, plain):
        ernie_accel.optimize(each, CompileVae())
    expected = picture(plain, steps=2)
    ernie_accel.optimize(pipe, CompileVae(), Warmup(sizes=((64, 64),), batch_sizes=(2,), prompt_lengths=(5,)))
    assert ernie_accel.report(pipe).entries[-1].status == "applied"
    assert torch.equal(picture(pipe, steps=2), expected)


def test_prompts_have_exactly_the_tokens_asked_for(ernie):
    for tokenizer, length in product((ernie.tokenizer, ernie_accel.demo.load().tokenizer), range(1, 30)):
        prompt = prompt_of(tokenizer, length)
        special = len(tokenizer("")["input_ids"])
        assert (prompt is None) == (length <= special), length
        assert prompt is None or len(tokenizer(prompt)["input_ids"]) == length, length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": ()}, "sizes takes"),
        ({"sizes": (64, 64)}, r"sizes takes a tuple of \(int, int\) or None, got"),
        ({"sizes": ((64, 0),)}, "got"),
        ({"batch_sizes": (0,)}, "batch_sizes takes whole numbers >= 1"),
        ({"batch_sizes": 2}, "batch_sizes takes a tuple of int, got 2"),
        ({"prompt_lengths": (0,)}, "prompt_lengths takes token counts >= 1"),
        ({"prompt_lengths": (True,)}, "prompt_lengths takes a tuple of int or None"),
    ],
)
def test_bad_values_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        Warmup(**arguments)


def test_what_this_pipe_cannot_draw_is_refused_with_what_it_can(ernie, flux):
    def reasons(transform, *planned):
        return transform.unsupported(ernie, after(Context.named("cpu"), ernie, *planned))

    assert reasons(Warmup(sizes=((100, 64),))) == [
        "ErnieImagePipeline draws sizes divisible by 16, got 100x64: use 96x64"
    ]
    assert reasons(Warmup(prompt_lengths=(65,))) == ["the tokenizer of ErnieImagePipeline cuts at 64 tokens, got 65"]
    assert "prompts are cut at 8 tokens, so none has 9" in reasons(Warmup(prompt_lengths=(9,)), TruncatePrompts(8))[0]
    assert "a warm-up would be that one" in reasons(SMALL, FreeAfterUse("nowhere"))[0]
    assert reasons(SMALL, FreeAfterUse("disk"), TruncatePrompts(8)) == []
    assert "without text encoder or tokenizer" in SMALL.unsupported(flux, Context.named("cpu"))[0]


def test_it_survives_json_with_its_pairs():
    wanted = Warmup(sizes=((64, 96), (32, 32)), batch_sizes=(1, 3), prompt_lengths=(7,))
    assert ernie_accel.transform_from_json(wanted.to_json()) == wanted
    assert Warmup(sizes=[[64, 96], [32, 32]], batch_sizes=[1, 3], prompt_lengths=[7]) == wanted

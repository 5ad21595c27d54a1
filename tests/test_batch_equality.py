"""A picture made in a batch equals the one made alone: noise, words and padding of neighbours do not reach it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import ernie_accel
from ernie_accel.batch import Row, produce
from ernie_accel.batch.engines import LocalEngine, Request
from ernie_accel.models.ministral.enhancer import PromptEnhancer
from ernie_accel.models.ministral.stand_in import enhancer_of
from tests.pipelines import randomize, tiny_ernie, tiny_tokenizer
from tests.stub_engine import make_rows

PROMPTS = (
    "a big red circle on a small blue square on a big red square",
    "red",
    "a small circle",
    "a blue square on red",
    "a big circle on blue on a small red circle on a big square",
)
NEGATIVE = ("", "small", "a big blue square on red", "square", "")


def pixels(outcome: Image.Image) -> np.ndarray:
    return np.asarray(outcome, dtype=np.int16)


def request(i: int, **settings: object) -> Request:
    usual = {"width": 64, "height": 64, "steps": 3, "guidance_scale": 1.0}
    return Request(prompt=PROMPTS[i], seed=100 + i, **(usual | settings))


@pytest.fixture(scope="module")
def pipe():
    return tiny_ernie()


def stock(pipe, request: Request) -> Image.Image:
    generator = torch.Generator().manual_seed(request.seed)
    return pipe(**request.arguments(), generator=generator).images[0]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("ahead", [True, False])
def test_a_picture_made_in_a_batch_equals_the_one_stock_makes_alone(pipe, guidance_scale, ahead):
    requests = [request(i, guidance_scale=guidance_scale, negative_prompt=NEGATIVE[i]) for i in range(len(PROMPTS))]
    engine = LocalEngine(pipe)
    if ahead:
        engine.prepare(requests)
    together = engine.render(requests)
    for one, picture in zip(requests, together, strict=True):
        # Float32 rounding before the rounding to bytes: a value may fall on the other side of one step.
        assert np.abs(pixels(stock(pipe, one)) - pixels(picture)).max() <= 1
    assert len({picture.tobytes() for picture in together}) == len(PROMPTS)


def test_a_neighbour_changes_nothing(pipe):
    engine = LocalEngine(pipe)
    with_long = engine.render([request(1), request(0)])[0]
    with_short = engine.render([request(1), request(2)])[0]
    assert np.abs(pixels(with_long) - pixels(with_short)).max() <= 1


def test_batches_of_a_job_hold_alike_rows_only_and_every_picture_is_right(pipe, tmp_path):
    rows = [
        Row(
            line=i + 2,
            index=i,
            prompt=PROMPTS[i % 5],
            file_name=f"{i}.png",
            width=64 + 16 * (i % 2),
            height=64,
            steps=2,
        )
        for i in range(10)
    ]
    seen = []

    class Watched(LocalEngine):
        def begin(self, requests, timeout_s=None):
            seen.append(list(requests))
            return super().begin(requests, timeout_s)

    results = list(produce(Watched(pipe), rows, tmp_path, progress=False, batch_size=4))
    assert len(results) == 10
    assert max(map(len, seen)) > 1
    for batch in seen:
        assert len({one.shape() for one in batch}) == 1
    for result in results:
        one = Request(prompt=result.row.prompt, seed=result.seed, width=result.row.width, height=64, steps=2)
        with Image.open(result.path) as picture:
            assert np.abs(pixels(picture) - pixels(stock(pipe, one))).max() <= 1


def test_prompts_are_bucketed_by_length(pipe):
    engine = LocalEngine(pipe)
    requests = [request(i) for i in range(len(PROMPTS))]
    engine.prepare(requests)
    assert [engine.bucket(one)[1] for one in requests] == [16, 1, 4, 8, 16]


def test_texts_are_encoded_once_and_in_batches(tmp_path):
    pipe = tiny_ernie()
    calls = []
    forward = pipe.text_encoder.forward
    pipe.text_encoder.forward = lambda **inputs: (calls.append(inputs["input_ids"].shape), forward(**inputs))[1]
    rows = [
        replace(row, prompt=PROMPTS[row.index % 4])
        for row in make_rows(8, width=64, height=64, steps=1, guidance_scale=4.0)
    ]
    assert [result.error for result in produce(pipe, rows, tmp_path, progress=False)] == [None] * 8
    assert [shape[0] for shape in calls] == [5]  # four prompts and the empty negative one, in one call


def tiny_enhancer():
    from transformers import Ministral3Config, Ministral3ForCausalLM

    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 12
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = Ministral3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=12,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    enhancer = Ministral3ForCausalLM(config)
    randomize(enhancer, std=0.4)
    return enhancer.eval().requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def enhancing_pipe():
    pipe = tiny_ernie()
    pipe.register_modules(**dict(zip(("pe", "pe_tokenizer"), tiny_enhancer(), strict=True)))
    return pipe


def enhanced(pipe, requests):
    engine = LocalEngine(pipe)
    engine.prepare(requests)
    return [engine._prompts._text(one) for one in requests]


def test_enhanced_words_depend_on_the_rows_own_seed_only(enhancing_pipe):
    requests = [request(i) for i in range(len(PROMPTS))]
    together = enhanced(enhancing_pipe, requests)
    alone = [enhanced(enhancing_pipe, [one])[0] for one in requests]
    assert together == alone
    other_seeds = {enhanced(enhancing_pipe, [Request(**{**vars(requests[0]), "seed": seed})])[0] for seed in range(8)}
    assert len(other_seeds) > 1


def test_enhancing_leaves_the_global_random_numbers_alone(enhancing_pipe):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    LocalEngine(enhancing_pipe).render([request(0), request(1)])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_enhancer_that_cannot_be_decoded_in_batches_writes_one_by_one_from_each_rows_seed(
    enhancing_pipe, monkeypatch
):
    monkeypatch.setattr(enhancing_pipe.pe.generation_config, "repetition_penalty", 1.05)
    before = torch.random.get_rng_state()
    together = enhanced(enhancing_pipe, [request(0), request(1)])
    assert [enhanced(enhancing_pipe, [request(i)])[0] for i in (0, 1)] == together
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("top_k", "words"), [(1, 1), (None, 2), (0, 2)])
def test_words_come_from_as_many_tokens_as_the_checkpoint_says(enhancing_pipe, monkeypatch, top_k, words):
    monkeypatch.setattr(enhancing_pipe.pe.generation_config, "top_k", top_k)
    texts = {enhanced(enhancing_pipe, [Request(**{**vars(request(0)), "seed": seed})])[0] for seed in range(8)}
    assert len(texts) == 1 if words == 1 else len(texts) >= words


def test_encoders_leave_the_device_and_come_back():
    pipe = tiny_ernie()
    encoder = pipe.text_encoder
    engine = LocalEngine(pipe, free_encoders=True)
    expected = stock(pipe, request(0, guidance_scale=4.0))
    engine.prepare([request(0, guidance_scale=4.0)])
    assert pipe.text_encoder is None
    (picture,) = engine.render([request(0, guidance_scale=4.0)])
    assert np.abs(pixels(picture) - pixels(expected)).max() <= 1
    assert pipe.text_encoder is None
    (unprepared,) = engine.render([request(1)])  # brings the encoder back for as long as it takes
    assert np.abs(pixels(unprepared) - pixels(stock(tiny_ernie(), request(1)))).max() <= 1
    engine.close()
    assert pipe.text_encoder is encoder


def test_what_the_enhancer_keeps_on_the_device_leaves_it_with_the_enhancer(monkeypatch):
    forgotten, forget = [], PromptEnhancer.forget
    monkeypatch.setattr(PromptEnhancer, "forget", lambda self: (forgotten.append(self), forget(self)))
    for transforms in ((), (ernie_accel.RewriteEnhancer(),)):
        pipe = tiny_ernie()
        pipe.register_modules(**dict(zip(("pe", "pe_tokenizer"), tiny_enhancer(), strict=True)))
        if transforms:
            ernie_accel.optimize(pipe, *transforms)
        engine = LocalEngine(pipe, free_encoders=True)
        engine.prepare([request(0)])
        assert pipe.pe is None
        made = enhancer_of(pipe)._enhancer if transforms else engine._prompts._enhancer
        assert made is None if transforms else forgotten == [made]
        engine.close()


def test_a_preset_that_changes_how_prompts_are_encoded_changes_no_embedding():
    plain, changed = tiny_ernie(), tiny_ernie()
    ernie_accel.optimize(changed, ernie_accel.BatchPromptEncoding())
    requests = [request(i) for i in range(len(PROMPTS))]
    for one, other in zip(encoded(plain, requests), encoded(changed, requests), strict=True):
        assert torch.equal(one, other)


def encoded(pipe, requests):
    engine = LocalEngine(pipe)
    engine.prepare(requests)
    return [engine._prompts.arguments([one])["prompt_embeds"][0] for one in requests]

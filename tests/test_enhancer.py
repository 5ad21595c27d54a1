"""The rewritten prompt enhancer: stock's tokens, stock's distribution, and a row that never sees its neighbours."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import ernie_accel
from ernie_accel import Autocast, FreeAfterUse, Offload, RewriteEnhancer
from ernie_accel.batch import BatchInputError, Producer, Row, produce
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.models.ministral import decoder
from ernie_accel.models.ministral.decoder import Decoder, _Workplace
from ernie_accel.models.ministral.enhancer import (
    TEMPERATURE,
    TOP_P,
    EnhanceRequest,
    PromptEnhancer,
    unsupported_reasons,
)
from ernie_accel.models.ministral.sampling import Sampling, choose, draws_for
from ernie_accel.models.ministral.stand_in import enhancer_of
from tests.pipelines import picture, randomize, tiny_enhancer, tiny_ernie, tiny_tokenizer

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares on the left", "红色的圆", "a big green triangle and a small yellow star"]
GREEDY = {"temperature": 1.0, "top_p": 1.0}


@pytest.fixture(scope="module")
def trained():
    return ernie_accel.demo.load()


def language_model(std=0.3, **settings):
    model = tiny_enhancer(**settings).eval()
    randomize(model, std=std)
    return model


def stock_greedy(model, ids, tokens, eos=2):
    given = torch.tensor([ids])
    mask = torch.ones_like(given)
    out = model.generate(
        input_ids=given, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=eos
    )
    return out[0, len(ids) :].tolist()


# The same tokens -----------------------------------------------------------------------------------------------------


def test_greedy_texts_of_the_trained_enhancer_are_those_of_stock_alone_and_together(trained):
    stock = [trained._enhance_prompt_with_pe(prompt, CPU, 128, 96, **GREEDY) for prompt in PROMPTS]
    enhancer = PromptEnhancer(trained.pe, trained.pe_tokenizer)
    requests = [EnhanceRequest(prompt, 128, 96, seed) for seed, prompt in enumerate(PROMPTS)]
    assert enhancer.enhance(requests, **GREEDY) == stock
    assert [enhancer.enhance([request], **GREEDY)[0] for request in requests] == stock
    assert len(set(stock)) == len(stock)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"max_position_embeddings": 64},
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_stock_through_a_cache_that_grows_twice(settings, monkeypatch):
    monkeypatch.setattr(decoder, "_ROOM", 8)
    model = language_model(**settings)
    prompts, tokens, never = [[5, 6, 7, 8, 9, 10], [11], [12, 13]], 50, 99
    mine = Decoder(model).generate(prompts, tokens, [never], None, torch.zeros(3, tokens))
    assert mine == [stock_greedy(model, ids, tokens, eos=never) for ids in prompts]


def test_positions_beyond_the_trained_length_scale_the_queries_as_stock_does():
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 1000.0,
        "original_max_position_embeddings": 16,
        "llama_4_scaling_beta": 0.5,
    }
    model = language_model(rope_parameters=rope, max_position_embeddings=64)
    (mine,) = Decoder(model).generate([[5, 6, 7]], 40, [31], None, torch.zeros(1, 40))
    stock = stock_greedy(model, [5, 6, 7], 40, eos=31)
    assert mine == stock[: len(mine)]
    assert len(mine) > 20


def test_a_row_stops_at_its_end_and_the_others_go_on():
    model = language_model()
    alone = [stock_greedy(model, [5 + i], 30) for i in range(12)]
    mine = Decoder(model).generate([[5 + i] for i in range(12)], 30, [2], None, torch.zeros(12, 30))
    assert mine == [row[:-1] if row[-1] == 2 else row for row in alone]
    assert len(set(map(len, mine))) > 1


def test_more_prompts_than_are_decoded_together():
    model = language_model()
    prompts = [[3 + i % 20, 4 + i % 7] for i in range(19)]
    draws = draws_for(range(19), 12)
    sampling = Sampling(0.6, 10, 0.9)
    together = Decoder(model).generate(prompts, 12, [2], sampling, draws)
    assert together == [
        Decoder(model).generate([prompt], 12, [2], sampling, draws[i : i + 1])[0] for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize(
    "mode", [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)], ids=["inference", "auto"]
)
def test_what_the_caller_has_switched_on_changes_no_token_and_marks_no_cache(mode, monkeypatch):
    model, begin, states = language_model(), Decoder._begin, []
    monkeypatch.setattr(Decoder, "_begin", lambda self, state, *rest: (states.append(state), begin(self, state, *rest)))
    with mode:
        (mine,) = Decoder(model).generate([[5, 6, 7]], 12, [31], None, torch.zeros(1, 12))
    assert mine == stock_greedy(model, [5, 6, 7], 12, eos=31)[: len(mine)]
    assert len(mine) > 3
    assert not states[0].token_b.is_inference()


# What is kept between calls ------------------------------------------------------------------------------------------


def test_work_that_failed_counts_as_not_done_and_graphs_share_a_memory(monkeypatch):
    """On a stand-in for CUDA graphs; tests/gpu has the real ones."""
    log, failures = [], []

    class Graph:
        def pool(self):
            return "the first one's"

        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def capture(graph, pool, capture_error_mode):
        log.append(f"capture in {pool}")
        yield

    def work():
        log.append("work")
        if failures:
            raise failures.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    workplace = _Workplace(None, captures=True)
    for kind in ("eager", "captured"):
        failures.append(OSError(kind))
        with pytest.raises(OSError, match=kind):
            workplace.run("step", work)
        workplace.run("step", work)
    workplace.run("step", work)
    assert log == ["work"] * 2 + ["capture in None", "work"] * 2 + ["replay"] * 2
    log.clear()
    for _ in range(2):
        workplace.run("read", work)
    assert log == ["work", "capture in the first one's", "work", "replay"]


def test_the_largest_caches_go_first_until_the_others_fit():
    def kept(most_bytes):
        mine = Decoder(None)
        mine._workplaces.update(
            {size: SimpleNamespace(state=SimpleNamespace(cache_bytes=size)) for size in (20, 100, 30)}
        )
        mine._keep(most_bytes)
        return list(mine._workplaces)

    assert [kept(size) for size in (150, 149, 50, 49, 0)] == [[20, 100, 30], [20, 30], [20, 30], [20], []]


def test_only_plain_linear_layers_are_captured():
    """An adapter is switched without any weight moving, and the graph would go on with it as it was."""
    from peft import LoraConfig, inject_adapter_in_model

    model = language_model()
    assert Decoder(model)._is_plain()
    inject_adapter_in_model(LoraConfig(target_modules=["up_proj"], init_lora_weights=False), model)
    assert not Decoder(model)._is_plain()
    mine = Decoder(model).generate([[5, 6]], 12, [31], None, torch.zeros(1, 12))
    assert mine == [stock_greedy(model, [5, 6], 12, eos=31)]


# The same distribution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "top_p"), [(50, 0.95), (3, 0.95), (0, 0.5), (0, 1.0), (1, 0.9), (50, 1e-9)])
def test_tokens_are_drawn_from_the_distribution_that_transformers_computes(top_k, top_p):
    model, ids = language_model(std=0.2), torch.tensor([[5, 6, 7]])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=True, temperature=0.6,
        top_k=top_k, top_p=top_p, pad_token_id=0, eos_token_id=2, output_scores=True, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    expected = out.scores[0][0].softmax(-1)
    count = 20_000
    draws = (torch.arange(count) + 0.5) / count  # every random number once: frequencies without noise
    drawn = choose(out.logits[0].expand(count, -1), Sampling(0.6, top_k, top_p), draws)
    frequency = torch.bincount(drawn, minlength=32) / count
    torch.testing.assert_close(frequency, expected, atol=2 / count, rtol=0)


def test_the_largest_random_number_still_draws_a_token_that_may_be_drawn():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    last = torch.tensor([1.0 - 2**-24])
    assert choose(logits, Sampling(1.0, 0, 0.6), last).item() == 1
    assert choose(logits, Sampling(1.0, 2, 1.0), last).item() == 3


def test_it_samples_with_what_the_checkpoint_says_or_transformers_default(trained):
    enhancer, seen = PromptEnhancer(trained.pe, trained.pe_tokenizer), []
    enhancer._decoder.generate = lambda ids, limit, eos, sampling, *_: seen.append(sampling) or [[5]]
    enhancer.enhance([EnhanceRequest("x", 64, 64, 0)])
    trained.pe.generation_config.top_k = 7
    enhancer.enhance([EnhanceRequest("x", 64, 64, 0)])
    trained.pe.generation_config.top_k = None
    enhancer.enhance([EnhanceRequest("x", 64, 64, 0)], **GREEDY)
    assert seen == [Sampling(TEMPERATURE, 50, TOP_P), Sampling(TEMPERATURE, 7, TOP_P), None]
    assert type(trained.pe.generation_config)._get_default_generation_params()["top_k"] == 50


@pytest.mark.parametrize(
    ("values", "message"),
    [((0.0, 50, 0.9), "temperature must be > 0, got 0.0"), ((0.6, -1, 0.9), "top_k"), ((0.6, 50, 0.0), "top_p")],
)
def test_sampling_that_no_distribution_has_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(*values)


def test_a_tokenizer_without_a_limit_leaves_that_of_the_model(trained, monkeypatch):
    enhancer, seen = PromptEnhancer(trained.pe, trained.pe_tokenizer), []
    monkeypatch.setattr(trained.pe_tokenizer, "model_max_length", 10**30)
    enhancer._decoder.generate = lambda ids, limit, *_: seen.append(limit) or [[5]]
    enhancer.enhance([EnhanceRequest("x", 64, 64, 0)])
    assert seen == [trained.pe.config.max_position_embeddings]
    assert enhancer.enhance([]) == []


def test_a_prompt_beyond_the_models_positions_is_refused_before_it_takes_the_memory(trained):
    """35,000 letters without a space took 13 GB and the process."""
    enhancer = PromptEnhancer(trained.pe, trained.pe_tokenizer)
    requests = [EnhanceRequest(prompt, 128, 128, seed=0) for prompt in ("red circle", "x" * 35_000)]
    with pytest.raises(ErnieAccelError, match=r"has \d{5} tokens, and the prompt enhancer reads 1024 at most; shorten"):
        enhancer.enhance(requests)


def test_a_prompt_too_long_for_the_enhancer_is_refused_with_its_line_before_a_picture_is_drawn(trained, tmp_path):
    rows = ["a large red circle", "x" * 35_000, "1girl, " * 5_000]
    with pytest.raises(BatchInputError, match=r"(?s)line 2: the prompt has .*line 3: the prompt has .*--no-enhancer"):
        produce(trained, rows, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    with Producer(trained, tmp_path / "service") as producer, pytest.raises(BatchInputError, match="1024 at most"):
        producer.submit(Row(line=1, index=0, prompt=rows[1], file_name="a.png"))


def test_the_random_numbers_of_many_seeds_are_uniform():
    draws = draws_for(range(2000), 4)
    shares = torch.histc(draws, 10, 0, 1) / draws.numel()
    assert (shares - 0.1).abs().max() < 0.015  # more than four standard deviations
    assert draws.min() >= 0 and draws.max() < 1


# Seeds ---------------------------------------------------------------------------------------------------------------


def test_a_wish_gives_the_same_words_alone_among_others_and_again(trained):
    enhancer = PromptEnhancer(trained.pe, trained.pe_tokenizer)
    requests = [EnhanceRequest("a red circle", 128, 128, seed) for seed in range(12)]
    together = enhancer.enhance(requests)
    before = torch.get_rng_state()
    assert [enhancer.enhance([request])[0] for request in requests[::-1]] == together[::-1]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(Counter(together)) > 6


def revised(pipe, prompts, **arguments):
    small = {"height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}
    return pipe(prompts, **(small | arguments)).revised_prompts


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_words_come_from_the_generators_of_the_call(trained):
    pipe = copy.deepcopy(trained)
    ernie_accel.optimize(pipe, RewriteEnhancer())
    one, two = revised(pipe, PROMPTS[:2], generator=seeded(5, 6))
    assert [one] == revised(pipe, PROMPTS[0], generator=seeded(5)[0])
    assert [two] == revised(pipe, [PROMPTS[1]], generator=seeded(6))
    assert [one, two] == revised(pipe, PROMPTS[:2], generator=seeded(5)[0])  # one generator: its seed, the next, ...
    assert revised(pipe, PROMPTS[:2], generator=seeded(5, 5, 6, 6), num_images_per_prompt=2) == [one, two]
    assert revised(pipe, PROMPTS[:2], generator=seeded(5)) == [one, two]  # as stock takes a list of one
    large = seeded(2**64 - 1)
    assert revised(pipe, PROMPTS[0], generator=large) == revised(pipe, PROMPTS[0], generator=large[0])
    torch.manual_seed(3)
    fresh = revised(pipe, PROMPTS[:2])
    assert fresh != revised(pipe, PROMPTS[:2])
    torch.manual_seed(3)
    assert fresh == revised(pipe, PROMPTS[:2])


# In the pipe ---------------------------------------------------------------------------------------------------------


def test_use_pe_stays_what_it_is_and_restore_gives_stock_back(trained):
    pipe = copy.deepcopy(trained)
    before = picture(pipe)
    ernie_accel.optimize(pipe, RewriteEnhancer())
    assert torch.equal(picture(pipe), before)
    assert revised(pipe, "a red circle", use_pe=False) is None
    ernie_accel.restore(pipe)
    assert "_enhance_prompt_with_pe" not in vars(pipe)
    torch.manual_seed(0)
    stock = revised(pipe, PROMPTS[:2])
    torch.manual_seed(0)
    assert stock == revised(trained, PROMPTS[:2])


def test_the_method_alone_takes_what_the_method_of_the_pipeline_takes(trained):
    pipe = copy.deepcopy(trained)
    ernie_accel.optimize(pipe, RewriteEnhancer())
    for arguments in ({}, {"width": 96, "height": 128}, {"system_prompt": "Be brief."}):
        assert pipe._enhance_prompt_with_pe("a red circle", CPU, **arguments, **GREEDY) == (
            trained._enhance_prompt_with_pe("a red circle", CPU, **arguments, **GREEDY)
        )


def test_an_error_of_the_call_leaves_no_texts_for_the_next(trained):
    pipe = copy.deepcopy(trained)
    ernie_accel.optimize(pipe, RewriteEnhancer())
    with pytest.raises(ValueError, match="negative_prompt"):
        revised(pipe, PROMPTS[:2], generator=seeded(1, 2), negative_prompt=["one too", "few or", "many"])
    assert revised(pipe, PROMPTS[0], generator=seeded(5)[0]) == revised(pipe, PROMPTS[0], generator=seeded(5)[0])


def test_what_the_call_refuses_or_leaves_out_is_not_enhanced(trained, monkeypatch):
    pipe = copy.deepcopy(trained)
    ernie_accel.optimize(pipe, RewriteEnhancer())
    with monkeypatch.context() as patch:
        patch.setattr(PromptEnhancer, "enhance", lambda *_, **__: pytest.fail("it was enhanced"))
        with pytest.raises(ValueError, match="divisible by 16"):
            revised(pipe, PROMPTS[0], height=65)
        with pytest.raises(ValueError, match="Must provide either"):
            revised(pipe, None)
        with pytest.raises(ValueError, match="Cannot provide both"):
            revised(pipe, PROMPTS[0], prompt_embeds=[torch.zeros(1, 8)])
        pe, pipe.pe = pipe.pe, None
        assert revised(pipe, PROMPTS[0]) is None
    pipe.pe = pe
    assert len(revised(pipe, PROMPTS[0])) == 1


def test_a_call_that_is_made_again_gets_the_same_words(trained):
    """`CheckFinite` does that, in float32, within the call."""
    pipe = copy.deepcopy(trained)
    ernie_accel.optimize(pipe, RewriteEnhancer())
    arguments = {"prompt": PROMPTS[:2], "use_pe": True, "generator": None, "num_images_per_prompt": 1}

    def twice(given):
        return [[pipe._enhance_prompt_with_pe(prompt, CPU) for prompt in given["prompt"]] for _ in range(2)]

    first, again = enhancer_of(pipe).around(twice, arguments | {"width": 64, "height": 64})
    assert first == again
    assert first[0] != first[1]


def test_under_autocast_the_enhancer_stays_in_its_own_dtype(trained):
    pipe = copy.deepcopy(trained)
    ernie_accel.optimize(pipe, RewriteEnhancer())
    expected = revised(pipe, PROMPTS[:2], generator=seeded(1, 2))
    ernie_accel.optimize(pipe, Autocast("bfloat16"), RewriteEnhancer())
    assert revised(pipe, PROMPTS[:2], generator=seeded(1, 2)) == expected


def test_weights_that_are_freed_after_use_come_back(trained):
    pipe = copy.deepcopy(trained)
    ernie_accel.optimize(pipe, RewriteEnhancer())
    before = revised(pipe, PROMPTS[0], generator=seeded(1)[0])
    ernie_accel.optimize(pipe, FreeAfterUse(), RewriteEnhancer())
    for _ in range(2):
        assert revised(pipe, PROMPTS[0], generator=seeded(1)[0]) == before
        assert pipe.pe.lm_head.weight.numel() == 0


def test_a_limit_of_new_tokens(trained):
    pipe = copy.deepcopy(trained)
    ernie_accel.optimize(pipe, RewriteEnhancer(max_new_tokens=3))
    (text,) = revised(pipe, PROMPTS[0], generator=seeded(1)[0])
    assert 1 <= len(pipe.pe_tokenizer(text, add_special_tokens=False)["input_ids"]) <= 3
    with pytest.raises(ValueError, match=">= 1, got 0"):
        RewriteEnhancer(max_new_tokens=0)


def test_a_pipe_without_enhancer_has_nothing_to_do(ernie, flux):
    for pipe in (ernie, flux):
        (step,) = ernie_accel.plan(pipe, RewriteEnhancer()).steps
        assert step.verdict == "nothing to do"
        assert "has no prompt enhancer" in step.preview.note


# What is left to stock -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda pe: setattr(pe.generation_config, "repetition_penalty", 1.2), "repetition_penalty=1.2"),
        (lambda pe: setattr(pe.generation_config, "num_beams", 4), "num_beams=4"),
        (lambda pe: setattr(pe.generation_config, "max_time", 1.0), "max_time=1.0"),
        (lambda pe: setattr(pe.config, "sliding_window", 8), "slides over 8 tokens"),
        (lambda pe: pe.config.rope_parameters.update(rope_type="dynamic"), "changes with the length"),
        (lambda pe: setattr(pe.model.layers[0], "_hf_hook", object()), "layer by layer"),
    ],
)
def test_an_enhancer_that_would_write_something_else_is_left_to_stock_with_the_reason(change, reason):
    pipe = tiny_ernie(enhancer=True)
    change(pipe.pe)
    plan = ernie_accel.plan(pipe, RewriteEnhancer())
    assert plan.ok
    assert plan.steps[0].verdict == "nothing to do"
    assert reason in plan.steps[0].preview.note
    ernie_accel.optimize(pipe, RewriteEnhancer())
    assert "_enhance_prompt_with_pe" not in vars(pipe)


@pytest.mark.parametrize(
    ("mode", "verdict"), [("sequential", "nothing to do"), ("group", "nothing to do"), ("model", "apply")]
)
def test_a_plan_knows_that_the_weights_will_come_layer_by_layer(mode, verdict):
    h200 = ernie_accel.Context("cuda", "NVIDIA H200", (9, 0))
    plan = ernie_accel.plan(tiny_ernie(enhancer=True), RewriteEnhancer(), Offload(mode), context=h200)
    assert (plan.steps[-1].transform, plan.steps[-1].verdict) == (RewriteEnhancer(), verdict)


def test_an_unknown_language_model_is_refused_by_name():
    (reason,) = unsupported_reasons(torch.nn.Linear(1, 1), tiny_tokenizer())
    assert reason == "its prompt enhancer is a Linear, not a Ministral3ForCausalLM"


def test_what_is_ignored_in_a_generation_config_is_without_effect_by_default():
    assert unsupported_reasons(tiny_enhancer(), tiny_tokenizer()) == []

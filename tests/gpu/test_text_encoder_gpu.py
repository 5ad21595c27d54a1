"""`RewriteTextEncoder` on a GPU: replays give the bits of the same forward without graphs, whatever came in between."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import ernie_accel
from ernie_accel.core.transform import ROUNDING_REL
from ernie_accel.models.language.text_encoder import RewrittenForward


def language_model(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    from transformers import Ministral3Config, Ministral3Model

    config = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    torch.manual_seed(0)
    model = Ministral3Model(Ministral3Config(**config | settings))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.to("cuda", dtype).eval().requires_grad_(False)


def rewritten(model: Any, max_tokens: int = 1024, keep: int = 4) -> RewrittenForward:
    """Return the rewritten forward of a model, which itself keeps its own."""
    return RewrittenForward(model, max_tokens, keep)


def ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 512, (rows, tokens), generator=torch.Generator().manual_seed(seed)).cuda()


@torch.no_grad()
def states(forward: Any, *args: int, **kwargs: int) -> list[Tensor]:
    return list(forward(input_ids=ids(*args, **kwargs).to(forward_device(forward)), output_hidden_states=True)[-1])


def forward_device(forward: Any) -> torch.device:
    model = getattr(forward, "module", None) or forward
    return next(model.parameters()).device


def graphs(forward: RewrittenForward) -> int:
    return len(forward._graphs)


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def error(got: list[Tensor], expected: list[Tensor]) -> float:
    pairs = list(zip(got, expected, strict=True))
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 128), (8, 100), (3, 5)])
def test_replays_give_the_bits_of_the_same_forward_without_graphs(dtype: torch.dtype, rows: int, tokens: int) -> None:
    forward = rewritten(language_model(dtype))
    for seed in range(5):  # other prompts of the same shape
        eager = states(rewritten(language_model(dtype)), rows, tokens, seed=seed)  # its first forward: not captured
        assert same(states(forward, rows, tokens, seed=seed), eager)
        assert graphs(forward) == (seed > 0)


@pytest.mark.parametrize("tokens", [1, 128, 700])
def test_hidden_states_are_no_further_from_float32_than_stocks(tokens: int) -> None:
    exact, model = language_model(torch.float32).double(), language_model()
    exact.load_state_dict(model.state_dict())
    expected, stock, forward = states(exact, 2, tokens), states(model, 2, tokens), rewritten(model)
    for _ in range(3):
        assert error(states(forward, 2, tokens), expected) <= 1.05 * error(stock, expected)
    assert graphs(forward) == (tokens < 700)


def test_in_float32_many_lengths_in_any_order_are_stocks() -> None:
    model = language_model(torch.float32)
    forward, chance = rewritten(model, max_tokens=256, keep=2), random.Random(0)
    replays = 0
    for seed in range(60):
        rows, tokens = chance.choice([1, 1, 1, 4]), chance.randint(1, 80)
        before = graphs(forward)
        assert error(states(forward, rows, tokens, seed=seed), states(model, rows, tokens, seed=seed)) < 1e-5
        replays += before > 0
    assert replays > 10


def test_weights_that_leave_and_come_back_are_read_where_they_are() -> None:
    model = language_model()
    forward = rewritten(model)
    for _ in range(3):
        expected = states(forward, 2, 40)
    assert graphs(forward) == 1
    for _ in range(2):
        model.to("cpu")
        assert error(states(forward, 2, 40), [state.cpu() for state in expected]) < 0.05
        torch.cuda.empty_cache()
        others = [torch.full((1 << 18,), float("nan"), device="cuda") for _ in range(64)]  # where the weights were
        model.to("cuda")
        for _ in range(3):
            assert same(states(forward, 2, 40), expected)
        assert graphs(forward) == 1
        del others
    for parameter in model.parameters():  # in place: the graph reads the new values
        parameter.data.mul_(0.5)
    assert same(states(forward, 2, 40), states(rewritten(model), 2, 40))
    assert not same(states(forward, 2, 40), expected)


def test_graphs_made_in_inference_mode_serve_calls_outside_of_it() -> None:
    forward = rewritten(language_model())
    with torch.inference_mode():
        expected = [states(forward, 2, 40) for _ in range(2)][-1]
    assert same(states(forward, 2, 40), expected)
    assert graphs(forward) == 1


def test_results_stay_when_other_shapes_are_captured_and_dropped() -> None:
    forward = rewritten(language_model(), keep=2)
    kept = [(tokens, states(forward, 1, tokens)) for tokens in (30, 30, 60, 60, 90, 90, 120, 120, 30)]
    for tokens, got in kept:
        assert same(got, states(rewritten(language_model()), 1, tokens))


@pytest.mark.parametrize("together", [False, True])
def test_prompts_of_the_embedded_model_are_those_of_stock(together: bool) -> None:
    pipe = ernie_accel.demo.load(torch.bfloat16, prompt_enhancer=False).to("cuda")
    prompts = ["a red circle", "two blue squares on the left of a big green triangle", "a red circle", ""]
    device = torch.device("cuda")
    stock = pipe.encode_prompt(prompts, device)
    transforms = [ernie_accel.RewriteTextEncoder(), *[ernie_accel.BatchPromptEncoding()] * together]
    ernie_accel.optimize(pipe, *transforms)
    for _ in range(3):
        assert error(pipe.encode_prompt(prompts, device), stock) < ROUNDING_REL["bfloat16"]
    assert graphs(pipe.text_encoder.language_model.forward) > 0
    ernie_accel.restore(pipe)
    assert same(pipe.encode_prompt(prompts, device), stock)


def test_after_a_warm_up_no_prompt_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ernie_accel.demo.load(prompt_enhancer=False).to("cuda")
    wanted = ernie_accel.Warmup(sizes=((64, 64),), prompt_lengths=(8,))
    ernie_accel.optimize(pipe, ernie_accel.RewriteTextEncoder(), wanted)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: pytest.fail("captured after the warm-up"))
    for prompt in ("a red circle", "two blue squares"):
        pipe(prompt, height=64, width=64, num_inference_steps=1, guidance_scale=1.0, output_type="latent")


def other_model(kind: str, dtype: torch.dtype) -> Any:
    """Return a text encoder of Z-Image, Lumina 2 or NewBie-image, with windows shorter than the texts."""
    import transformers

    sizes = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        **({} if kind == "Qwen3" else {"sliding_window": 16}),
    }
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")(**sizes)
    torch.manual_seed(0)
    config._attn_implementation = "eager" if kind == "Gemma2" else "sdpa"  # some releases drop the cap on sdpa
    model = getattr(transformers, f"{kind}TextModel" if kind == "Gemma3" else f"{kind}Model")(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.to("cuda", dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["Qwen3", "Gemma2", "Gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_other_architectures_replay_padded_batches_as_stock_encodes_them(kind: str, dtype: torch.dtype) -> None:
    model = other_model(kind, dtype)
    forward = rewritten(model)
    lengths = torch.tensor([[30], [7], [19]], device="cuda")
    mask = torch.arange(48, device="cuda") < lengths
    for seed in range(4):
        given = {"input_ids": ids(3, 48, seed=seed), "attention_mask": mask, "output_hidden_states": True}
        stock, mine = model(**given).hidden_states, forward(**given).hidden_states
        limit = 1e-5 if dtype is torch.float32 else ROUNDING_REL["bfloat16"]
        assert error([state[mask] for state in mine], [state[mask] for state in stock]) < limit
        assert all(state[~mask].abs().max() == 0 for state in mine)
        assert graphs(forward) == (seed > 0)

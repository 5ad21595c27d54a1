"""The kernels of a decoded token against plain torch: on a GPU, or interpreted on the CPU (TRITON_INTERPRET=1)."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ernie_accel
from ernie_accel.models.ministral.decoder import Decoder, _Workplace
from ernie_accel.models.ministral.enhancer import EnhanceRequest, PromptEnhancer
from ernie_accel.models.ministral.sampling import Sampling, draws_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter loses the carry where rounding to bfloat16 reaches the next power of two.
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
ROWS = [1, 3, 16]


@pytest.fixture
def decode() -> Any:
    from ernie_accel.kernels import decode

    return decode


def rand(*shape: int, dtype: torch.dtype = DTYPE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)


def close(got: Tensor, expected: Tensor) -> None:
    """Equal up to the roundings of a norm and a product: 2 units in the last place of a row's norm."""
    assert got.dtype == DTYPE
    unit = torch.finfo(got.dtype).eps
    got, expected = got.double(), expected.double()
    assert ((got - expected).norm(dim=-1) <= max(2 * unit, 1e-5) * expected.norm(dim=-1)).all()


def rms_norm(x: Tensor, norm: tuple[Tensor, float] | None) -> Tensor:
    x = x.double()
    if norm is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm[1]) * norm[0].double()


def fp8(decode: Any, weight_nk: Tensor) -> tuple[Any, Tensor]:
    """Return a weight in float8 and what it stands for, in float64."""
    scale = weight_nk.float().abs().amax(1) / 448
    values = (weight_nk.float() / scale[:, None]).to(torch.float8_e4m3fn)
    return decode.DecodeWeight(values, scale), values.double() * scale.double()[:, None]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [64, 80, 1040])
@pytest.mark.parametrize("sizes", [(64,), (128, 64, 64)])
@pytest.mark.parametrize("quantized", [False, True])
def test_linear(decode: Any, rows: int, width: int, sizes: tuple[int, ...], quantized: bool) -> None:
    x, norm, residual = rand(rows, width), (rand(width, seed=1), 1e-5), rand(rows, sum(sizes), seed=2)
    plain = [rand(size, width, seed=3 + i) for i, size in enumerate(sizes)]
    weights = [fp8(decode, w) if quantized else (decode.DecodeWeight(w), w.double()) for w in plain]
    kernel, exact = tuple(w for w, _ in weights), torch.cat([w for _, w in weights])
    # The tiles for one row are of 2 to 4 features, and the interpreter takes milliseconds for each.
    tile = decode.Tile(32, 256, 1, 1) if INTERPRETED and len(sizes) > 1 else None
    close(decode.linear(x, kernel, tile=tile), x.double() @ exact.t())
    close(decode.linear(x, kernel, residual_bn=residual, tile=tile), residual.double() + x.double() @ exact.t())
    close(decode.linear(x, kernel, norm=norm, tile=tile), rms_norm(x, norm) @ exact.t())


def test_dequantize(decode: Any) -> None:
    weight, exact = fp8(decode, rand(64, 1040))
    assert torch.equal(decode.dequantize(weight, torch.float32), exact.float())
    plain = decode.DecodeWeight(rand(64, 1040))
    assert decode.dequantize(plain, DTYPE) is plain.values_nk


@pytest.mark.parametrize(
    ("size", "shared_kib", "blocks"),
    [
        (128, 227, (128, 8, 3)),
        (128, 163, (128, 8, 3)),
        (128, 99, (128, 8, 2)),
        (256, 99, (64, 4, 2)),
        (32, 99, (128, 8, 3)),
    ],
)
def test_attention_tiles_fit_the_shared_memory_of_the_card(
    decode: Any, size: int, shared_kib: int, blocks: tuple[int, int, int]
) -> None:
    assert decode.attention_blocks(size, shared_kib * 1024) == blocks


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 5), torch.bfloat16, ">= 8.0; this device has 7.5"),
        ((8, 0), torch.bfloat16, None),
        ((8, 6), torch.float8_e4m3fn, ">= 8.9; this device has 8.6"),
        ((8, 9), torch.float8_e4m3fn, None),
    ],
)
def test_cards_for_which_triton_has_no_such_type_get_the_plain_forward(
    capability: tuple[int, int], dtype: torch.dtype, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernie_accel.models.ministral.weights import _too_old

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = _too_old(torch.device("cuda"), [torch.bfloat16, dtype])
    assert found is None if reason is None else reason in str(found)
    assert _too_old(torch.device("cpu"), [dtype]) is None


@pytest.mark.parametrize("rows", ROWS)
def test_gate_up(decode: Any, rows: int) -> None:
    x, norm = rand(rows, 80), (rand(80, seed=1), 1e-5)
    gate, up = rand(64, 80, seed=2), rand(64, 80, seed=3)
    y = rms_norm(x, norm)
    expected = F.silu(y @ gate.double().t()) * (y @ up.double().t())
    close(decode.gate_up(x, decode.DecodeWeight(gate), decode.DecodeWeight(up), norm), expected)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 1, 32), (2, 2, 16), (32, 8, 128)])
def test_attend(decode: Any, heads: int, kv_heads: int, size: int) -> None:
    capacity, position = 256, torch.tensor([0, 1, 64, 200], device=DEVICE)
    rows = len(position)
    cos, sin = rand(capacity, size, seed=1), rand(capacity, size, seed=2)
    cos[:, size // 2 :], sin[:, size // 2 :] = cos[:, : size // 2], sin[:, : size // 2]
    q_scale = 1 + rand(capacity, seed=3).abs()
    qkv = rand(rows, (heads + 2 * kv_heads) * size, seed=4)
    keys, values = (rand(rows, kv_heads, capacity, size, seed=s) for s in (5, 6))

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[position][:, None] + torch.cat((-second, first), -1) * sin[position][:, None]

    q, k, v = qkv.view(rows, -1, size).split([heads, kv_heads, kv_heads], 1)
    expected_keys, expected_values, row = keys.clone(), values.clone(), torch.arange(rows, device=DEVICE)
    expected_keys[row, :, position], expected_values[row, :, position] = rotated(k), v
    visible = (torch.arange(capacity, device=DEVICE) <= position[:, None])[:, None, None]
    q = rotated(q) * q_scale[position][:, None, None]
    expected = F.scaled_dot_product_attention(
        q[:, :, None].double(),
        expected_keys.double(),
        expected_values.double(),
        attn_mask=visible,
        scale=0.1,
        enable_gqa=True,
    )
    got = decode.attend(qkv, cos, sin, q_scale, position, keys, values, 0.1)
    close(got, expected[:, :, 0].flatten(1))
    close(keys.flatten(1), expected_keys.flatten(1))
    assert torch.equal(values, expected_values)


def model(**settings: Any) -> Any:
    """Return a random enhancer of 3 layers whose shapes the kernels can take."""
    from transformers import Ministral3Config, Ministral3ForCausalLM

    config = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    built = Ministral3ForCausalLM(Ministral3Config(**config | settings))
    for parameter in built.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return built.to(DEVICE, DTYPE).eval().requires_grad_(False)


def test_a_step_of_the_kernels_equals_the_plain_forward(decode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ernie_accel.models.ministral import weights

    monkeypatch.setattr(weights, "_DTYPE", DTYPE)
    language_model = model(num_hidden_layers=2)
    decoder, kernels = Decoder(language_model), weights.kernel_weights(language_model)
    assert not isinstance(kernels, str), kernels
    with torch.no_grad():
        workplace, prompts = decoder._workplace(2, 64), [[5, 6, 7, 8, 9], [10, 11]]
        state = workplace.state
        decoder._begin(state, prompts, torch.zeros(2, 4))
        decoder._read(workplace, prompts)
        other = copy.deepcopy(state)
        hidden = decoder._forward(state, state.token_b[:, None], state.position_b[:, None], 64)
        expected = language_model.lm_head(language_model.model.norm(hidden[:, 0]))
        got = kernels.logits(language_model.model.embed_tokens(other.token_b), other)
    tolerance = 1e-5 if INTERPRETED else 0.02
    assert (got - expected).norm() <= tolerance * expected.norm()
    assert (other.keys_lbnpd - state.keys_lbnpd).norm() <= tolerance * state.keys_lbnpd.norm()


if not INTERPRETED:

    @pytest.mark.parametrize("sampling", [None, Sampling(0.6, 50, 0.95)])
    def test_graphs_choose_the_tokens_of_the_same_steps_without_graphs(
        decode: Any, sampling: Sampling | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        language_model, draws = model().float(), draws_for([1, 2, 3], 600)  # roundings would choose other tokens
        prompts = [[5, 6, 7, 8, 9], [10, 11], [12]]
        monkeypatch.setattr(Decoder, "_kernel_weights", lambda self: None)
        graphed = Decoder(language_model)
        first, second = (graphed.generate(prompts, 600, [2], sampling, draws) for _ in range(2))
        monkeypatch.setattr(_Workplace, "run", lambda self, name, work: work())
        plain = Decoder(language_model).generate(prompts, 600, [2], sampling, draws)
        assert first == second == plain
        assert max(map(len, plain)) > 5

    def test_kernels_in_graphs_give_the_same_again_and_notice_new_weights(decode: Any) -> None:
        language_model = model()
        decoder, draws = Decoder(language_model), draws_for([1, 2], 600)
        prompts = [[5, 6, 7, 8, 9], [10, 11]]
        assert not isinstance(decoder._kernel_weights(), str)
        first = decoder.generate(prompts, 600, [2], None, draws)  # grows its cache once
        assert decoder.generate(prompts, 600, [2], None, draws) == first
        for layer in language_model.model.layers:
            layer.mlp.down_proj.weight.data = -layer.mlp.down_proj.weight.data
        changed = decoder.generate(prompts, 600, [2], None, draws)
        assert changed != first
        assert changed == Decoder(language_model).generate(prompts, 600, [2], None, draws)

    def test_after_a_warm_up_no_prompt_is_captured(decode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = ernie_accel.demo.load().to("cuda")
        ernie_accel.optimize(pipe, ernie_accel.RewriteEnhancer(), ernie_accel.Warmup(sizes=((64, 64),)))
        monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: pytest.fail("captured after the warm-up"))
        assert pipe._enhance_prompt_with_pe("a red circle", torch.device("cuda"), 128, 128)

    def test_graphs_made_in_inference_mode_serve_calls_outside_of_it(decode: Any) -> None:
        decoder, draws, prompts = Decoder(model()), draws_for([1, 2], 40), [[5, 6, 7, 8, 9], [10, 11]]
        with torch.inference_mode():
            first = decoder.generate(prompts, 40, [2], None, draws)
        assert decoder.generate(prompts, 40, [2], None, draws) == first
        decoder.forget()
        assert decoder.generate(prompts, 40, [2], None, draws) == first

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_greedy_texts_of_the_trained_enhancer_are_those_of_stock(dtype: torch.dtype) -> None:
        pipe = ernie_accel.demo.load(dtype).to("cuda")
        prompts = ["a red circle", "two blue squares on the left", "a big green triangle and a small star"]
        greedy: Any = {"temperature": 1.0, "top_p": 1.0}
        stock = [pipe._enhance_prompt_with_pe(p, torch.device("cuda"), 128, 128, **greedy) for p in prompts]
        enhancer = PromptEnhancer(pipe.pe, pipe.pe_tokenizer)
        requests = [EnhanceRequest(prompt, 128, 128, 0) for prompt in prompts]
        assert enhancer.enhance(requests, **greedy) == stock
        assert [enhancer.enhance([request], **greedy)[0] for request in requests * 2] == stock * 2

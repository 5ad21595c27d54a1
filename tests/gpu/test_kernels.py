"""The Triton kernels against their plain-torch twins: on a GPU, or interpreted on the CPU (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.kernels import reference
from ernie_accel.kernels.hopper import attention as hopper
from ernie_accel.kernels.hopper import compiling, product

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter loses the carry where rounding to bfloat16 or float8 reaches the next power of two, and NaN in float8.
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16

EPS = 1e-6
SIZES = [(1, 5, 64), (2, 7, 96), (3, 1, 33), (2, 3, 1100), (1, 2, 1636), (1, 2, 100), (1, 2, 1)]
SIZES += [(1, 300, 4096), (2, 130, 3840), (2, 130, 2304)] if DEVICE == "cuda" else []


def rand(*shape: int, dtype: torch.dtype = DTYPE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def modulation(batch: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(rand(batch, 1, width, dtype=torch.float32, seed=s) for s in (1, 2, 3))  # type: ignore[return-value]


def close(got: Tensor, expected: Tensor) -> None:
    """Equal up to roundings: four units in the last place of a row's largest value, 1 % over all; GELU's 3e-5."""
    unit = torch.finfo(got.dtype).eps
    got, expected = got.double(), expected.double()
    assert ((got - expected).abs() <= 4 * unit * expected.abs().amax(-1, keepdim=True) + 1e-4).all()
    assert (got - expected).norm() <= 0.01 * expected.norm()


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    return values.float() * scale.view(*values.shape[:-1], 1)


def close_fp8(got: tuple[Tensor, Tensor], expected: Tensor, largest: float = 448) -> None:
    """Each value within half a step of float8 (three mantissa bits) and of the roundings of `close`; 4 % over all."""
    values, scale = got
    assert values.dtype == torch.float8_e4m3fn
    assert scale.shape == (expected.shape[:-1].numel(), 1)
    assert scale.dtype == torch.float32
    expected = expected.float()
    amax = expected.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale, amax.view(-1, 1) / largest, rtol=0.02, atol=0)
    error = (dequantize(values, scale) - expected).abs()
    steps = 8.5 if INTERPRETED else 1
    assert (error <= steps * 2.0**-4 * expected.abs() + 4 * 2.0**-8 * amax).all()
    assert error.norm() <= steps * 0.04 * expected.norm()


@pytest.fixture
def gpu() -> object:
    pytest.importorskip("triton")
    from ernie_accel.kernels import gpu

    return gpu


@pytest.mark.parametrize(("b", "s", "h"), SIZES)
@pytest.mark.parametrize("with_branch", [False, True])
def test_norm_modulate(gpu, b: int, s: int, h: int, with_branch: bool) -> None:
    x, branch, weight = rand(b, s, h), rand(b, s, h, seed=9), rand(h, seed=4)
    scale, shift, gate = modulation(b, h)
    x_expected = reference.gated_add(x, branch, gate) if with_branch else x
    expected = reference.norm_modulate(x_expected, weight, scale, shift, EPS)
    args = (branch, gate) if with_branch else (None, None)
    x_out, y, none = gpu.norm_modulate(x, *args, weight, scale, shift, EPS, False)
    assert none is None
    close(x_out, x_expected)
    close(y, expected)
    x_out, *quantized = gpu.norm_modulate(x, *args, weight, scale, shift, EPS, True)
    close(x_out, x_expected)
    close_fp8(tuple(quantized), expected)
    _, wide, wide_scale = gpu.norm_modulate(x, *args, weight, scale, shift, EPS, True, spare=64)
    assert wide.shape[-1] == h + 64
    close_fp8((wide[..., :h], wide_scale), expected, largest=14)


@pytest.mark.parametrize(("b", "s", "h"), SIZES)
def test_gated_add(gpu, b: int, s: int, h: int) -> None:
    x, branch, gate = rand(b, s, h), rand(b, s, h, seed=9), modulation(b, h)[0]
    close(gpu.gated_add(x, branch, gate), reference.gated_add(x, branch, gate))


@pytest.mark.parametrize(("b", "s", "h"), SIZES)
def test_quantize_rows(gpu, b: int, s: int, h: int) -> None:
    x = rand(b, s, h)
    close_fp8(gpu.quantize_rows(x), x)
    strided = rand(b, s, 2 * h)[..., :h]
    close_fp8(gpu.quantize_rows(strided), strided)


@pytest.mark.parametrize(("b", "s", "h"), SIZES)
@pytest.mark.parametrize("ranks", [3, 16, 96])
def test_low_rank_fp8(gpu, b: int, s: int, h: int, ranks: int) -> None:
    values, scale = reference.quantize_rows(rand(b, s, h))
    down = rand(ranks, h, seed=5)
    close(gpu.low_rank_fp8(values, scale, down), reference.low_rank_fp8(values, scale, down))


@pytest.mark.parametrize(("b", "s", "h"), [(1, 5, 64), (2, 70, 96), *((1, 300, 4096),) * (DEVICE == "cuda")])
@pytest.mark.parametrize(("ranks", "spare"), [(3, 64), (48, 64), (96, 192)])
def test_low_rank_in_spare_columns(gpu, b: int, s: int, h: int, ranks: int, spare: int) -> None:
    x = rand(b, s, h)
    values, scale = reference.quantize_rows(x)
    down, down_scale = reference.quantize_rows(rand(ranks, h, seed=5))
    factor = down_scale.view(-1) * rand(ranks, dtype=torch.float32, seed=6).abs() * 16
    wide, wide_scale = gpu.with_low_rank(values, scale, down, factor, spare)
    expected, expected_scale = reference.with_low_rank(values, scale, down, factor, spare)
    assert torch.equal(wide_scale, expected_scale)
    close_wide(wide, expected, h)
    assert not wide[..., h + ranks :].float().any()
    into, into_scale = gpu.quantize_rows(x, spare)
    close_fp8((into[..., :h], into_scale), x, largest=14)
    into.view(torch.uint8)[..., h:] = 0x7F  # what was not written yet may be anything, such as NaN
    expected = into.clone()
    gpu.low_rank_into(into, down, factor)
    reference.low_rank_into(expected, down, factor)
    assert torch.equal(into[..., :h].float(), expected[..., :h].float())
    close_wide(into, expected, h)


def close_wide(got: Tensor, expected: Tensor, width: int) -> None:
    """Equal up to a step of float8; larger ones are where the interpreter loses a carry.

    Hopper's tensor cores add float8 products with 14 bits, so that sums of a few thousand are off by up to 2 % of the
    largest (DeepSeek-V3 Technical Report, section 3.3.2): small sums by many of their own steps.
    """
    assert got.shape == expected.shape
    got, expected = got.float(), expected.float()
    steps = 8.5 if INTERPRETED else 1.1
    error, allowed = (got - expected).abs(), steps * (2.0**-3 * expected.abs() + 2.0**-9)
    if not INTERPRETED:
        allowed[..., width:] += 0.02 * expected[..., width:].abs().amax(-1, keepdim=True)
    assert (error <= allowed).all()
    most = steps * 0.02 if INTERPRETED else 0.04
    assert error[..., width:].norm() <= most * expected[..., width:].norm()


def test_chunks_cover_every_width_with_little_left_over(gpu) -> None:
    for width in range(1, 16385):
        chunks = gpu._chunks(width)
        assert len(chunks) == 3
        assert all(each & (each - 1) == 0 for each in chunks)
        assert width <= sum(chunks) <= max(gpu._SMALLEST_CHUNK, width * 4 / 3)
    assert [gpu._chunks(width) for width in (9216, 10240, 12288)] == [(8192, 1024, 0), (8192, 2048, 0), (8192, 4096, 0)]


@pytest.mark.parametrize(("b", "s", "f"), [*SIZES, (1, 3, 12288), (1, 2, 5000), (1, 2, 11008)])
def test_gelu_mul(gpu, b: int, s: int, f: int) -> None:
    gate_up = rand(b, s, 2 * f)
    expected = reference.gelu_mul(gate_up)
    close(gpu.gelu_mul(gate_up, False)[0], expected)
    close_fp8(gpu.gelu_mul(gate_up, True), expected)
    wide, wide_scale = gpu.gelu_mul(gate_up, True, 64)
    assert wide.shape[-1] == f + 64
    close_fp8((wide[..., :f], wide_scale), expected, largest=14)


def test_gelu_is_within_3e_5(gpu) -> None:
    gate = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, 1e4])]).to(DEVICE)
    got = gpu.gelu_mul(torch.cat([gate, torch.ones_like(gate)])[None, None], False)[0][0, 0]
    exact = torch.nn.functional.gelu(gate.double())
    assert (got.double() - exact).abs().max() < 3e-5


@pytest.mark.parametrize(("b", "s", "n", "d"), [(1, 5, 2, 64), (2, 3, 3, 48), (2, 9, 32, 128)])
def test_qk_norm_rope(gpu, b: int, s: int, n: int, d: int) -> None:
    qkv, weight_q, weight_k = rand(b, s, 3 * n * d), rand(d, seed=1), rand(d, seed=2)
    angles = rand(b, s, 1, d, dtype=torch.float32, seed=3) * 3
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    got = gpu.qk_norm_rope(qkv, weight_q, weight_k, cos, sin, n, EPS)
    expected = reference.qk_norm_rope(qkv, weight_q, weight_k, cos, sin, n, EPS)
    for a, e in zip(got, expected, strict=True):
        close(a, e)


@pytest.mark.parametrize(("b", "s", "n", "d"), [(1, 5, 2, 64), (2, 9, 32, 128)])
def test_qkv_fp8(gpu, b: int, s: int, n: int, d: int) -> None:
    qkv, weight_q, weight_k = rand(b, s, 3 * n * d), rand(d, seed=1), rand(d, seed=2)
    angles = rand(b, s, 1, d, dtype=torch.float32, seed=3) * 3
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    *qk, v, scale = gpu.qkv_fp8(qkv, weight_q, weight_k, cos, sin, n, EPS)
    got = (*qk, as_they_are(v, qk[1].shape))
    *expected, expected_scale = reference.qkv_fp8(qkv, weight_q, weight_k, cos, sin, n, EPS)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    for a, e in zip(got, expected, strict=True):
        assert a.dtype == torch.float8_e4m3fn
        assert (a.float() - e.float()).norm() <= (0.3 if INTERPRETED else 0.03) * e.float().norm()


@pytest.mark.parametrize(("b", "s", "h"), SIZES)
@pytest.mark.parametrize("modulated", [False, True])
def test_norm_scale_and_sandwich(gpu, b: int, s: int, h: int, modulated: bool) -> None:
    """RMS norms before and after a branch; scales and gates lie in one tensor, rows apart, in the dtype of `x`."""
    x, branch, weight, branch_weight = rand(b, s, h), rand(b, s, h, seed=9), rand(h, seed=4), rand(h, seed=5)
    vectors = gpu.scales_and_gates(rand(b, 4 * h, seed=6))
    scale, gate = (vectors[:, i : i + 1] if modulated else None for i in (0, 1))
    for args, weight_args in (((None, None), ()), ((branch, gate), (branch_weight,))):
        x_expected = reference.add_normed(x, branch, branch_weight, gate, EPS) if weight_args else x
        expected = reference.norm_scale(x_expected, weight, scale, EPS)
        x_out, y, none = gpu.norm_modulate(x, *args, weight, scale, None, EPS, False, *weight_args)
        assert none is None
        close(x_out, x_expected)
        close(y, expected)
        x_out, *quantized = gpu.norm_modulate(x, *args, weight, scale, None, EPS, True, *weight_args)
        close(x_out, x_expected)
        close_fp8(tuple(quantized), expected)
    close(gpu.gated_add(x, branch, gate, branch_weight, EPS), reference.add_normed(x, branch, branch_weight, gate, EPS))


def test_scales_and_gates(gpu) -> None:
    mod = rand(2, 4 * 96) * 0.02
    mod[:, ::7] *= 200
    got, expected = gpu.scales_and_gates(mod), reference.scales_and_gates(mod)
    torch.testing.assert_close(got, expected, rtol=2e-5 if DTYPE is torch.float32 else 8e-3, atol=1e-7)


@pytest.mark.parametrize(("b", "s", "f"), [(1, 5, 64), (2, 3, 170), (1, 2, 10240), (1, 2, 9216)])
def test_silu_mul(gpu, b: int, s: int, f: int) -> None:
    gate_up = rand(b, s, 2 * f)
    expected = reference.silu_mul(gate_up)
    close(gpu.silu_mul(gate_up, False)[0], expected)
    close_fp8(gpu.silu_mul(gate_up, True), expected)


PAIRED = pytest.mark.parametrize(
    ("b", "s", "n", "kv", "d"), [(1, 5, 2, 2, 64), (2, 3, 6, 2, 48), (1, 4, 24, 8, 96), (2, 9, 30, 30, 128)]
)


@PAIRED
def test_qk_norm_rope_of_pairs(gpu, b: int, s: int, n: int, kv: int, d: int) -> None:
    qkv, weight_q, weight_k = rand(b, s, (n + 2 * kv) * d), rand(d, seed=1), rand(d, seed=2)
    angles = rand(b, s, 1, d // 2, dtype=torch.float32, seed=3) * 3
    rope = torch.stack((angles.cos(), angles.sin()))
    got = gpu.qk_norm_rope(qkv, weight_q, weight_k, *rope, n, EPS, True)
    expected = reference.qk_norm_rope_pairs(qkv, weight_q, weight_k, rope, n, EPS)
    assert [x.shape for x in got] == [(b, s, n, d), (b, s, kv, d)]
    for a, e in zip(got, expected, strict=True):
        close(a, e)


@PAIRED
def test_qkv_fp8_of_pairs(gpu, b: int, s: int, n: int, kv: int, d: int) -> None:
    qkv, weight_q, weight_k = rand(b, s, (n + 2 * kv) * d), rand(d, seed=1), rand(d, seed=2)
    angles = rand(b, s, 1, d // 2, dtype=torch.float32, seed=3) * 3
    rope = torch.stack((angles.cos(), angles.sin()))
    *qk, v, scale = gpu.qkv_fp8(qkv, weight_q, weight_k, *rope, n, EPS, True)
    got = (*qk, as_they_are(v, qk[1].shape))
    *expected, expected_scale = reference.qkv_fp8_pairs(qkv, weight_q, weight_k, rope, n, EPS)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    for a, e in zip(got, expected, strict=True):
        assert a.dtype == torch.float8_e4m3fn
        assert a.shape == e.shape
        assert (a.float() - e.float()).norm() <= (0.3 if INTERPRETED else 0.03) * e.float().norm()


@pytest.mark.parametrize(("n", "kv", "d"), [(2, 2, 64), (6, 2, 48), (24, 8, 96), (30, 30, 128), (3, 3, 36)])
def test_quarters_of_queries_and_keys_are_mixed(gpu, n: int, kv: int, d: int) -> None:
    """Compared before they are rounded to float8; 8 does not divide the last size."""
    qkv, weight_q, weight_k = rand(2, 5, (n + 2 * kv) * d), rand(d, seed=1), rand(d, seed=2)
    angles = rand(2, 5, 1, d // 2, dtype=torch.float32, seed=3) * 3
    rope, amax = torch.stack((angles.cos(), angles.sin())), torch.zeros(1, device=DEVICE)
    got = gpu._qk_norm_rope(qkv, weight_q, weight_k, *rope, n, EPS, True, torch.float32, amax)
    plain = reference.qk_norm_rope_pairs(qkv.float(), weight_q, weight_k, rope, n, EPS)
    for a, turned in zip(got, plain, strict=True):
        torch.testing.assert_close(a, reference.mixed(turned), rtol=1e-4, atol=1e-5)
        assert torch.equal(reference.mixed(turned), turned) == (d % 8 != 0)
    torch.testing.assert_close(amax[0], qkv[..., -kv * d :].abs().max().float())


def test_mixed_queries_and_keys_have_the_same_products() -> None:
    q, k = rand(2, 7, 3, 96, dtype=torch.float32), rand(2, 7, 3, 96, dtype=torch.float32, seed=1)
    products, mixed = ((a * b).sum(-1) for a, b in ((q, k), (reference.mixed(q), reference.mixed(k))))
    torch.testing.assert_close(mixed, products, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="attention by lengths needs a GPU")
@pytest.mark.parametrize(("n", "kv", "d"), [(30, 30, 128), (24, 8, 96)])
@pytest.mark.parametrize("lengths", [None, [640, 577]])
def test_attention_of_fewer_heads_of_keys(n: int, kv: int, d: int, lengths: list[int] | None) -> None:
    """Z-Image's heads, and NewBie's: 24 of queries for 8 of keys, of 96."""
    from ernie_accel.kernels import ops

    qkv = rand(2, 640, (n + 2 * kv) * d) * 0.5
    angles = rand(2, 640, 1, d // 2, dtype=torch.float32, seed=3)
    rope, weight = torch.stack((angles.cos(), angles.sin())), torch.ones(d, device=DEVICE, dtype=DTYPE)
    counts = None if lengths is None else torch.tensor(lengths, device=DEVICE, dtype=torch.int32)
    q, k = ops.qk_norm_rope_pairs(qkv, weight, weight, rope, n, EPS)
    v = qkv[..., -kv * d :].unflatten(-1, (kv, d))
    expected = reference.attention(q, k, v, counts).float()
    got = ops.attention(q, k, v, counts).float()
    q8, k8, v8, scale = ops.qkv_fp8_pairs(qkv, weight, weight, rope, n, EPS)
    in_fp8 = ops.attention_fp8(q8, k8, v8, scale, counts).float() * scale[0]
    rows = [640, 640] if lengths is None else lengths
    for row, count in enumerate(rows):
        errors = [
            float((x[row, :count] - expected[row, :count]).norm() / expected[row, :count].norm()) for x in (got, in_fp8)
        ]
        print(f"{n}/{kv} heads of {d}, row of {count}: bf16 {errors[0]:.4f}, fp8 {errors[1]:.4f}")
        assert errors[0] < 0.01
        assert errors[1] < 0.15


@pytest.fixture(params=["hopper", "cudnn"])
def attends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who attends: the kernel of Hopper cards, or cuDNN there, too."""
    if request.param == "cudnn":
        pytest.importorskip("cudnn")
        monkeypatch.setattr(hopper, "takes", lambda q: False)
    elif not hopper.takes(torch.empty(1, 1, 1, 128, device=DEVICE, dtype=DTYPE)):
        pytest.skip("needs a Hopper card")
    return str(request.param)


def as_they_are(v: torch.Tensor, shape_bsnd: torch.Size) -> torch.Tensor:
    """Return values [B, S, N, D], whichever kernel they are laid out for."""
    if v.shape == shape_bsnd:
        return v
    tokens = shape_bsnd[1]
    # Where each token of a group went, found by laying out their numbers.
    numbers = torch.arange(hopper.GROUP, dtype=torch.uint8).view(1, -1, 1, 1)
    place = hopper.laid_out(numbers.view(torch.float8_e4m3fn)).view(torch.uint8).flatten().long()
    token = torch.arange(v.shape[-1]) // hopper.GROUP * hopper.GROUP + place.repeat(v.shape[-1] // hopper.GROUP)
    found = torch.empty_like(v.view(torch.uint8))
    found[..., token.to(v.device)] = v.view(torch.uint8)
    return found[..., :tokens].permute(0, 3, 1, 2).contiguous().view(v.dtype)


LENGTHS = pytest.mark.parametrize(("s", "lengths"), [(4224, [4224]), (257, [257]), (384, [384, 321]), (640, [1, 640])])


@pytest.mark.skipif(DEVICE == "cpu", reason="attention by lengths needs a GPU")
@LENGTHS
def test_attention_fp8(attends: str, s: int, lengths: list[int]) -> None:
    from ernie_accel.kernels import ops

    b, counts = len(lengths), torch.tensor(lengths, device=DEVICE, dtype=torch.int32)
    q, k, v = (rand(b, s, 4, 128, seed=seed) for seed in range(3))
    qkv, weight = torch.cat([x.flatten(2, 3) for x in (q, k, v)], -1), torch.ones(128, device=DEVICE, dtype=DTYPE)
    cos = torch.ones(b, s, 1, 128, device=DEVICE, dtype=DTYPE)
    q8, k8, v8, scale = ops.qkv_fp8(qkv, weight, weight, cos, torch.zeros_like(cos), 4, EPS)
    got = ops.attention_fp8(q8, k8, v8, scale, counts).float()
    expected = reference.attention_fp8(q8, k8, as_they_are(v8, k8.shape), scale, counts).float()
    for row in range(b):
        assert (got[row] - expected[row]).norm() < 0.06 * expected[row].norm()


@pytest.mark.skipif(DEVICE == "cpu", reason="attention by lengths needs a GPU")
@LENGTHS
@pytest.mark.parametrize("spare", [64, 192])
def test_attention_fp8_with_spare_columns(attends: str, s: int, lengths: list[int], spare: int) -> None:
    from ernie_accel.kernels import ops

    b, counts = len(lengths), torch.tensor(lengths, device=DEVICE, dtype=torch.int32)
    qkv, weight = rand(b, s, 3 * 4 * 128), torch.ones(128, device=DEVICE, dtype=DTYPE)
    cos = torch.ones(b, s, 1, 128, device=DEVICE, dtype=DTYPE)
    rotary = (qkv, weight, weight, cos, torch.zeros_like(cos), 4, EPS)
    *narrow, scale = ops.qkv_fp8(*rotary)
    *wide, wide_scale = ops.qkv_fp8(*rotary, spare)
    torch.testing.assert_close(wide_scale, reference.ROOM * scale)
    assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(narrow, wide, strict=True))
    got = ops.attention_fp8(*wide, wide_scale, counts, spare)
    assert got.shape == (b, s, 512 + spare)
    got = got[..., :512].float() * wide_scale.view(b, s, 1)
    expected = ops.attention_fp8(*narrow, scale, counts).float() * scale.view(b, s, 1)
    for row in range(b):
        assert (got[row] - expected[row]).norm() < 0.04 * expected[row].norm()


@pytest.mark.skipif(DEVICE == "cpu", reason="attention by lengths needs a GPU")
@LENGTHS
def test_attention_takes_values_as_they_lie_in_a_projection(attends: str, s: int, lengths: list[int]) -> None:
    from ernie_accel.kernels import ops

    counts = torch.tensor(lengths, device=DEVICE, dtype=torch.int32)
    q, k, v = rand(len(lengths), s, 3 * 4 * 128).chunk(3, -1)
    q, k, v = (x.unflatten(-1, (4, 128)) for x in (q.contiguous(), k.contiguous(), v))
    got, expected = ops.attention(q, k, v, counts), reference.attention(q, k, v, counts)
    assert got.shape == expected.shape
    for row in range(len(lengths)):
        assert (got[row].float() - expected[row].float()).norm() < 0.01 * expected[row].float().norm()


@pytest.mark.skipif(DEVICE == "cpu", reason="cuDNN needs a GPU")
def test_one_plan_serves_all_lengths() -> None:
    pytest.importorskip("cudnn")
    from ernie_accel.kernels import cudnn_attention

    q, k, v = (rand(2, 192, 4, 128, seed=seed) for seed in range(3))
    before = len(cudnn_attention._PLANS)
    for length in range(1, 192, 13):
        counts = torch.tensor([length, 192], device=DEVICE, dtype=torch.int32)
        got, expected = (attend(q, k, v, counts).float() for attend in (cudnn_attention.attention, reference.attention))
        assert (got - expected).norm() < 0.01 * expected.norm()
    assert len(cudnn_attention._PLANS) == before + 1


@pytest.mark.skipif(DEVICE == "cpu", reason="attention by lengths needs a GPU")
@pytest.mark.parametrize("s", [4224, 257])
def test_without_lengths_all_keys_count(attends: str, s: int) -> None:
    from ernie_accel.kernels import ops

    q, k, v = (rand(2, s, 4, 128, seed=seed) for seed in range(3))
    got, expected = (attend(q, k, v, None).float() for attend in (ops.attention, reference.attention))
    assert (got - expected).norm() < 0.01 * expected.norm()
    q8, k8, v8 = (x.to(torch.float8_e4m3fn) for x in (q, k, v))
    scale = torch.ones(2 * s, 1, device=DEVICE)
    laid_out = hopper.laid_out(v8) if attends == "hopper" else v8
    got = ops.attention_fp8(q8, k8, laid_out, scale, None).float()
    expected = reference.attention_fp8(q8, k8, v8, scale, None).float()
    assert (got - expected).norm() < 0.06 * expected.norm()


@pytest.mark.skipif(DEVICE == "cpu", reason="the twin attends there")
@pytest.mark.parametrize("lengths", [None, [7, 3]])
def test_attention_in_float32(lengths: list[int] | None) -> None:
    """No kernel takes it; `CheckFinite` repeats a picture in it."""
    from ernie_accel.kernels import ops

    q, k, v = (rand(2, 7, 4, 128, seed=seed).float() for seed in range(3))
    counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    expected = reference.attention(q.cpu(), k.cpu(), v.cpu(), None if counts is None else counts.cpu())
    torch.testing.assert_close(ops.attention(q, k, v, counts).cpu(), expected, rtol=1e-3, atol=1e-3)


TILINGS = [(size, element, tiling) for (size, element), tilings in hopper.TILINGS.items() for tiling in tilings]


@pytest.mark.parametrize(("b", "s", "n", "kv", "d"), [(1, 5, 2, 2, 96), (2, 33, 6, 2, 96), (2, 140, 3, 3, 128)])
def test_values_are_laid_out_for_hopper(gpu, monkeypatch, b: int, s: int, n: int, kv: int, d: int) -> None:
    qkv, weight = rand(b, s, (n + 2 * kv) * d), torch.ones(d, device=DEVICE, dtype=DTYPE)
    rope = torch.stack((torch.ones(b, s, 1, d // 2, device=DEVICE), torch.zeros(b, s, 1, d // 2, device=DEVICE)))
    monkeypatch.setattr(hopper, "takes", lambda q: False)
    *_, plain, scale = gpu.qkv_fp8(qkv, weight, weight, *rope, n, EPS, True, 64)
    monkeypatch.setattr(hopper, "takes", lambda q: True)
    *_, got, same_scale = gpu.qkv_fp8(qkv, weight, weight, *rope, n, EPS, True, 64)
    assert torch.equal(scale, same_scale)
    assert got.shape == hopper.shape_of_values(plain.shape)
    assert torch.equal(got.view(torch.uint8), hopper.laid_out(plain).view(torch.uint8))
    assert torch.equal(as_they_are(got, plain.shape).view(torch.uint8), plain.view(torch.uint8))


by_hopper = pytest.mark.parametrize("attends", ["hopper"], indirect=True)


@by_hopper
@pytest.mark.parametrize(("size", "element", "tiling"), TILINGS)
@pytest.mark.parametrize(
    ("s", "n", "kv", "lengths", "blocks"),
    [
        (256, 2, 2, None, 132),
        (200, 6, 2, [200, 77], 132),
        (1000, 3, 1, [993], 132),
        (33, 200, 100, [1], 132),
        (1000, 4, 2, [1, 500, 1000], 3),  # a thread block has tiles of different lengths, one after the other
        (700, 3, 3, [700, 2, 400], 1),
    ],
)
def test_every_tiling_of_hoppers_attention(
    attends: str,
    size: int,
    element: int,
    tiling: hopper.Tiling,
    s: int,
    n: int,
    kv: int,
    lengths: list[int] | None,
    blocks: int,
) -> None:
    b = 1 if lengths is None else len(lengths)
    counts = None if lengths is None else torch.tensor(lengths, device=DEVICE, dtype=torch.int32)
    for dtype in (torch.float8_e4m3fn,) if element == 1 else (torch.bfloat16, torch.float16):
        q, k, v = (
            rand(b, s, heads, size, dtype=torch.float32, seed=at).to(dtype) for at, heads in enumerate((n, kv, kv))
        )
        values = hopper.laid_out(v) if element == 1 else v
        spare = 64 if element == 1 else 0
        got = hopper.run(tiling, blocks, q, k, values, counts, spare, 1.0).float()[..., : n * size]
        expected = reference.attention(q.float(), k.float(), v.float(), counts)
        assert got.shape == expected.shape
        wrong = (got - expected).view(b, s, n, size).norm(dim=-1) / expected.view(b, s, n, size).norm(dim=-1)
        assert wrong.max() < (0.2 if element == 1 else 0.02)
        assert wrong.mean() < (0.05 if element == 1 else 0.005)


@by_hopper
def test_lengths_beyond_the_row_and_of_nothing_leave_finite_rows(attends: str) -> None:
    from ernie_accel.kernels import ops

    q, k, v = (rand(3, 100, 2, 96, seed=seed) for seed in range(3))
    got = ops.attention(q, k, v, torch.tensor([0, 1000, -5], device=DEVICE, dtype=torch.int32))
    assert torch.equal(got[1], ops.attention(q, k, v, None)[1])
    assert torch.equal(got[0].view(100, 2, 96), v[0, :1].expand(100, 2, 96))
    assert got.isfinite().all()


@by_hopper
def test_a_captured_graph_reads_other_lengths(attends: str) -> None:
    from ernie_accel.kernels import ops

    q, k, v = (rand(2, 300, 4, 128, seed=seed) for seed in range(3))
    counts = torch.tensor([300, 200], device=DEVICE, dtype=torch.int32)
    ops.attention(q, k, v, counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.attention(q, k, v, counts)
    for lengths in ([300, 200], [17, 299]):
        counts.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(got, ops.attention(q, k, v, counts))


@by_hopper
def test_values_that_are_not_aligned_are_copied(attends: str) -> None:
    from ernie_accel.kernels import ops

    q, k, v = (rand(1, 70, 2, 96, seed=seed) for seed in range(3))
    memory = torch.empty(v.numel() + 8, device=DEVICE, dtype=DTYPE)
    shifted = memory[1 : 1 + v.numel()].view(v.shape).copy_(v)
    narrow = torch.empty(1, 70, 2, 97, device=DEVICE, dtype=DTYPE)[..., :96].copy_(v)
    for other in (shifted, narrow):
        assert torch.equal(ops.attention(q, k, other, None), ops.attention(q, k, v, None))


@by_hopper
def test_a_new_thread_attends(attends: str) -> None:
    from ernie_accel.kernels import ops

    q, k, v = (rand(1, 70, 2, 128, seed=seed) for seed in range(3))
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(ops.attention, q, k, v, None).result()
    assert torch.equal(got, ops.attention(q, k, v, None))


@by_hopper
def test_what_does_not_go_together_is_refused(attends: str) -> None:
    from ernie_accel.kernels import ops

    q, k, v = (rand(2, 64, 4, 128, seed=seed) for seed in range(3))
    for arguments, message in (
        ((q, k, v, torch.tensor([64, 64], device=DEVICE)), "int32"),
        ((q, k[:, :, :3], v[:, :, :3], None), "cannot share"),
        ((q, k.half(), v, None), "same dtype"),
        ((q, k[:, :32], v[:, :32], None), "do not go together"),
    ):
        with pytest.raises(ErnieAccelError, match=message):
            ops.attention(*arguments)
    in_fp8 = [x.to(torch.float8_e4m3fn) for x in (q, k, v)]
    with pytest.raises(ErnieAccelError, match="expected values"):
        ops.attention_fp8(*in_fp8, torch.ones(128, 1, device=DEVICE), None)


@by_hopper
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_get_lost_in_hoppers_attention(attends: str, bad: float) -> None:
    from ernie_accel.kernels import ops

    q, k, v = (rand(1, 300, 2, 128, seed=seed) for seed in range(3))
    q[0, 7, 1, 3] = bad
    rows = ops.attention(q, k, v, None).isfinite().view(300, 2, 128).all(-1)
    assert rows.sum() == 599
    assert not rows[7, 1]


@by_hopper
@pytest.mark.parametrize("size", [96, 128])
def test_long_sums_in_fp8_are_not_too_small(attends: str, size: int) -> None:
    """Thousands of keys of about the same weight, and values of one sign: what tensor cores cut off would add up."""
    from ernie_accel.kernels import ops

    q, k, v = (rand(1, 4224, 2, size, dtype=torch.float32, seed=seed) for seed in range(3))
    q8, k8, v8 = (x.to(torch.float8_e4m3fn) for x in (q * 0.2, k * 0.2, v * 0.2 + 0.5))
    got = ops.attention_fp8(q8, k8, hopper.laid_out(v8), torch.ones(4224, 1, device=DEVICE), None).float()
    expected = reference.attention(q8.float(), k8.float(), v8.float(), None)
    assert abs(float(got.mean() / expected.mean()) - 1) < 0.02
    assert (got - expected).norm() < 0.025 * expected.norm()


@pytest.mark.parametrize(
    ("tokens", "heads", "size", "element", "queries"),
    [
        (4224, 30, 128, 1, 192),
        (4224, 32, 128, 1, 128),
        (4224, 48, 96, 1, 192),
        (1152, 30, 128, 2, 192),
        (4224, 30, 128, 2, 192),
        (4224, 32, 128, 2, 128),
    ],
)
def test_hoppers_attention_is_tiled_so_that_multiprocessors_are_busy(
    tokens: int, heads: int, size: int, element: int, queries: int
) -> None:
    """30 heads of 4224 tokens in tiles of 192 are five rounds of 132 multiprocessors, 32 heads of 128 eight."""
    assert hopper.cheapest(hopper.TILINGS[size, element], tokens, heads, 132).queries == queries


def test_zero_rows_stay_zero_and_finite(gpu) -> None:
    x = rand(1, 3, 64)
    x[0, 1] = 0
    values, scale = gpu.quantize_rows(x)
    assert (values[0, 1].float() == 0).all()
    assert scale.isfinite().all()
    assert (scale > 0).all()
    values, scale = gpu.gelu_mul(torch.zeros(1, 2, 128, device=DEVICE, dtype=DTYPE), True)
    assert (values.float() == 0).all()
    assert scale.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_with_nan_or_infinity_is_marked_and_others_are_not(gpu, bad: float) -> None:
    x = rand(1, 4, 64)
    x[0, 2, 5] = bad
    scale, shift, gate = modulation(1, 64)
    weight = rand(64)
    for values, row_scale in (
        gpu.quantize_rows(x),
        gpu.norm_modulate(x, None, None, weight, scale, shift, EPS, True)[1:],
        gpu.norm_modulate(rand(1, 4, 64, seed=5), x, gate, weight, scale, shift, EPS, True)[1:],
        gpu.gelu_mul(torch.cat([x, rand(1, 4, 64, seed=8)], -1), True),
    ):
        result = dequantize(values, row_scale)
        assert INTERPRETED or result[0, 2].isnan().any()
        assert result[0, [0, 1, 3]].isfinite().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="operators run their twin on the CPU")
def test_operators_run_the_kernels_and_compile_to_one_graph() -> None:
    from ernie_accel.kernels import ops
    from ernie_accel.kernels.linear import Fp8Linear

    x, weight = rand(2, 40, 256), rand(256, seed=1)
    scale, shift, gate = modulation(2, 256)
    linear = Fp8Linear(rand(512, 256) * 0.05)

    def block(x: Tensor) -> Tensor:
        x, *rows = ops.add_norm_modulate_fp8(x, x, gate, weight, scale, shift, EPS)
        y = ops.linear_fp8(*rows, linear.weight, linear.weight_scale)
        return ops.gelu_mul(y) + x

    with torch.no_grad():
        eager = block(x)
        torch.testing.assert_close(torch.compile(block, fullgraph=True, dynamic=True)(x), eager, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="fp8 products need a GPU")
def test_linear_fp8_equals_its_twin() -> None:
    from ernie_accel.kernels import ops

    x, x_scale = reference.quantize_rows(rand(2, 40, 256))
    weight, weight_scale = reference.quantize_rows(rand(512, 256, seed=3))
    weight_scale = weight_scale.view(1, -1)
    got = ops.linear_fp8(x, x_scale, weight, weight_scale)
    expected = ops.linear_fp8(x.cpu(), x_scale.cpu(), weight.cpu(), weight_scale.cpu())
    assert (got.cpu().float() - expected.float()).norm() / expected.float().norm() < 1e-2


on_hopper = pytest.mark.skipif(
    DEVICE == "cpu" or not compiling.is_usable(torch.device(DEVICE, 0)), reason="needs a Hopper card"
)


def product_of(m: int, n: int, k: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return operands of a product in float8 and the product in float64."""
    x, x_scale = reference.quantize_rows(rand(m, k))
    weight, weight_scale = reference.quantize_rows(rand(n, k, seed=3))
    exact = (x.double() * x_scale.double()) @ (weight.double() * weight_scale.double().view(-1, 1)).t()
    return (x, x_scale, weight, weight_scale.view(1, -1)), exact


@on_hopper
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 256, 144),
        (128, 512, 128),
        (300, 1280, 160),
        (77, 528, 4112),
        (4224, 3840, 3840),
        (8448, 2320, 2304),
        (4224, 3840, 3888),  # several tiles for each thread block, and a rest
    ],
)
def test_hoppers_product(m: int, n: int, k: int, activation: str | None) -> None:
    """Tiles that are full and that are not, of rows, features and terms; each often enough to find a race."""
    operands, exact = product_of(m, n, k)
    got = product.product(*operands, k, activation)
    if activation is not None:
        gate, up = exact.bfloat16().double().chunk(2, 1)
        exact = (functional.silu(gate) if activation == "silu" else functional.gelu(gate)) * up
    assert (got.double() - exact).norm() / exact.norm() < 4e-3
    for _ in range(20):
        assert torch.equal(product.product(*operands, k, activation), got)


@on_hopper
@pytest.mark.parametrize("activation", [None, "silu"])
def test_hoppers_product_reads_only_the_terms_that_count(activation: str | None) -> None:
    """Of rows and of a weight that are wider, in whatever rest of a block they end."""
    for terms in (256, 272, 304, 352, 368):
        operands, exact = product_of(200, 1040, terms)
        x, x_scale, weight, weight_scale = operands
        wide_x, wide_weight = (torch.full((len(each), 512), float("nan"), device=DEVICE) for each in (x, weight))
        wide_x[:, :terms], wide_weight[:, :terms] = x.float(), weight.float()
        wide = wide_x.to(x.dtype), x_scale, wide_weight.to(x.dtype), weight_scale
        got = product.product(*wide, terms, activation)
        assert torch.equal(got, product.product(*operands, terms, activation))
        if activation is None:
            assert (got.double() - exact).norm() / exact.norm() < 4e-3


@on_hopper
def test_hoppers_product_by_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """They give what cuBLAS and the kernels beside it do, within a rounding; spare columns are left to others."""
    from ernie_accel.kernels import ops

    operands, _ = product_of(4224, 4096, 2048)
    assert product.takes(*operands, 2048, gated=False)
    assert product.takes(*operands, 2048, gated=True)
    calls = [lambda: (ops.linear_fp8(*operands),)]
    calls += [lambda silu=silu, spare=spare: ops.gated_linear_fp8(*operands, silu, spare) for silu, spare in CHOICES]
    got = [call() for call in calls]
    monkeypatch.setattr(product, "takes", lambda *_, gated: False)
    for ours, theirs, (_, spare) in zip(got, [call() for call in calls], [(None, 0), *CHOICES], strict=True):
        one, other = ours[0].float(), theirs[0].float()
        if len(ours) == 2:
            columns = one.shape[-1] - spare
            one, other = ((x[..., :columns] * scale) for x, (_, scale) in ((one, ours), (other, theirs)))
        assert one.shape == other.shape
        assert (one - other).norm() / other.norm() < (3e-2 if len(ours) == 2 else 4e-3)


CHOICES = [(True, 0), (False, 0), (True, 128)]


@on_hopper
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_does_not_get_lost_in_hoppers_product(bad: float) -> None:
    (x, x_scale, weight, weight_scale), _ = product_of(256, 512, 256)
    x_scale[5] = bad
    for activation in (None, "silu", "gelu"):
        got = product.product(x, x_scale, weight, weight_scale, 256, activation)
        assert not got[5].isfinite().all()
        assert got[:5].isfinite().all()
        assert got[6:].isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2 or DEVICE == "cpu", reason="needs two GPUs")
def test_operators_run_on_the_device_of_their_tensors() -> None:
    from ernie_accel.kernels import ops

    x, scale, shift = rand(1, 5, 64), *modulation(1, 64)[:2]
    here = ops.norm_modulate_fp8(x, x[0, 0], scale, shift, EPS)
    x, scale, shift = (tensor.to("cuda:1") for tensor in (x, scale, shift))
    there = ops.norm_modulate_fp8(x, x[0, 0], scale, shift, EPS)
    for a, b in zip(there, here, strict=True):
        assert a.device == torch.device("cuda:1")
        assert torch.equal(a.cpu().float(), b.cpu().float())

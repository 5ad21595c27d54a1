"""Every Triton kernel compiles for the cards it is meant for, at the sizes of the real models, without such a card.

The interpreter, which runs the kernels on the CPU, checks no types and knows no machine code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ernie_accel.kernels import decode, gpu, group_norm
from ernie_accel.kernels.hopper import attention as hopper

EPS = 1e-6
WIDTH, HEADS, HIDDEN = 4096, 32, 12288  # ERNIE-Image's transformer
LOW_RANK = {"_low_rank_kernel", "_fp8_low_rank_kernel"}
FP8_ONLY = {"_gated_quantize_kernel", "_quantize_rows_kernel", "_quantize_values_kernel"} | LOW_RANK
#: Compute capability -> bytes of shared memory that a block can have (CUDA C++ Programming Guide, technical limits).
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}


class AbsentCard:
    """What Triton asks of a driver when it compiles and does not launch."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(params=[80, 90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (89, 120))])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    """Compile for a card instead of launching, and yield what was compiled, by kernel."""
    kernels: dict[str, list[Any]] = {}

    def compile_it(self: JITFunction[Any], grid: object) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            kernels.setdefault(self.fn.__name__, []).append(self.warmup(*args, grid=grid, **options))

        return launch

    monkeypatch.setattr(driver, "_active", AbsentCard(request.param))
    monkeypatch.setattr(JITFunction, "__getitem__", compile_it)
    monkeypatch.setattr(gpu, "_shared_memory", lambda _: SHARED[request.param])
    yield kernels
    for name, some in kernels.items():
        for kernel in some:
            assert kernel.asm["cubin"]
            assert kernel.metadata.shared <= SHARED[request.param], name


def names(module: Any) -> set[str]:
    """Return the kernels of a module, without the functions they share."""
    return {name for name, value in vars(module).items() if isinstance(value, JITFunction) and name.endswith("_kernel")}


@pytest.fixture(params=[False, True], ids=["", "hopper"])
def values_of(request: pytest.FixtureRequest, compiled: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the kernel that nobody needs: values are laid out on Hopper cards alone, and there not for all heads."""
    if request.param and driver.active.get_current_target().arch != 90:
        pytest.skip("no Hopper card")
    monkeypatch.setattr(hopper, "takes", lambda _: request.param)
    return "_quantize_values_kernel" if request.param else "_lay_out_values_kernel"


@pytest.fixture
def has_fp8(compiled: dict[str, list[Any]]) -> bool:
    return bool(driver.active.get_current_target().arch >= 89)


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def test_the_blocks(compiled: dict[str, list[Any]], has_fp8: bool, values_of: str) -> None:
    x, weight = rows(1, 2, WIDTH), rows(WIDTH)
    scale, shift, gate = (rows(1, 1, WIDTH, dtype=torch.float32) for _ in range(3))
    qkv, head = rows(1, 2, 3 * WIDTH), rows(WIDTH // HEADS)
    cos = rows(1, 2, 1, WIDTH // HEADS)
    for quantize in (False, True)[: 1 + has_fp8]:
        gpu.norm_modulate(x, None, None, weight, scale, shift, EPS, quantize)
        gpu.norm_modulate(x, x, gate, weight, scale, shift, EPS, quantize)
        gpu.gelu_mul(rows(1, 2, 2 * HIDDEN), quantize)
    gpu.gated_add(x, x, gate)
    gpu.qk_norm_rope(qkv, head, head, cos, cos, HEADS, EPS)
    if has_fp8:
        values, row_scale = gpu.quantize_rows(x)
        for ranks in (16, 48, 192):
            gpu.low_rank_fp8(values, row_scale, rows(ranks, WIDTH))
        for ranks, spare in ((16, 64), (192, 192)):
            down, factor = rows(ranks, WIDTH, dtype=torch.float8_e4m3fn), rows(ranks, dtype=torch.float32)
            wide = gpu.with_low_rank(values, row_scale, down, factor, spare)[0]
            gpu.low_rank_into(wide, down, factor)
        for spare in (64, 192):  # one kernel for any number of them
            gpu.norm_modulate(x, x, gate, weight, scale, shift, EPS, True, spare=spare)
        assert len(set(map(id, compiled["_norm_modulate_kernel"][-2:]))) == 1
        gpu.gelu_mul(rows(1, 2, 2 * HIDDEN), True, 64)
        gpu.qkv_fp8(qkv, head, head, cos, cos, HEADS, EPS)
        gpu.qkv_fp8(qkv, head, head, cos, cos, HEADS, EPS, spare=64)
    assert names(gpu) - set(compiled) == {"_scales_and_gates_kernel", values_of} | (set() if has_fp8 else FP8_ONLY)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "hidden"), [(30, 30, 128, 10240), (24, 8, 96, 9216)], ids=["Z-Image", "NewBie-image"]
)
def test_the_blocks_of_next_dit(
    compiled: dict[str, list[Any]], has_fp8: bool, values_of: str, heads: int, kv_heads: int, size: int, hidden: int
) -> None:
    width = heads * size
    x, weight, head = rows(1, 2, width), rows(width), rows(size)
    scale, gate, *_ = gpu.scales_and_gates(rows(1, 4 * width)).split(1, 1)
    qkv, table = rows(1, 2, (heads + 2 * kv_heads) * size), rows(1, 2, 1, size // 2, dtype=torch.float32)
    for quantize in (False, True)[: 1 + has_fp8]:
        for vectors in ((scale, gate), (None, None)):
            gpu.norm_modulate(x, None, None, weight, vectors[0], None, EPS, quantize)
            gpu.norm_modulate(x, x, vectors[1], weight, vectors[0], None, EPS, quantize, weight)
        gpu.silu_mul(rows(1, 2, 2 * hidden), quantize)
    gpu.gated_add(x, x, gate, weight, EPS)
    gpu.gated_add(x, x, None, weight, EPS)
    gpu.qk_norm_rope(qkv, head, head, table, table, heads, EPS, True)
    if has_fp8:
        gpu.quantize_rows(x)
        gpu.qkv_fp8(qkv, head, head, table, table, heads, EPS, True)
    assert names(gpu) - set(compiled) == LOW_RANK | {values_of} | (set() if has_fp8 else FP8_ONLY)


def test_the_vae_decoder(compiled: dict[str, list[Any]]) -> None:
    """One kernel for each way it is used, not for each number of channels or size of picture: eight in all."""
    for channels, *size in ((512, 16, 16), (512, 126, 126), (256, 1, 1), (128, 1008, 752), (128, 5, 7)):
        x, c = rows(1, channels, *size).contiguous(memory_format=torch.channels_last), rows(channels)
        group_norm.group_norm_affine(x, None, c, c, 32, EPS)
        group_norm.group_norm_affine(x, c, c, c, 32, EPS)
        group_norm.add_group_norm_affine(x, None, c, c, c, 32, EPS)
        affine = group_norm.add_group_norm_affine(x, x, c, c, c, 32, EPS)[1]
        group_norm.affine(x, affine, True)
        group_norm.affine(x, affine, False)
    assert {name: len(set(map(id, some))) for name, some in compiled.items()} == {
        "_statistics_kernel": 4,
        "_affine_of_group_kernel": 2,
        "_affine_kernel": 2,
    }


@pytest.mark.parametrize("count", [1, 8])
def test_a_token_of_the_enhancer(
    compiled: dict[str, list[Any]], has_fp8: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_shared_bytes", lambda device: SHARED[driver.active.get_current_target().arch])
    width, hidden, heads, kv_heads, size = 3072, 9216, 32, 8, 128
    x, norm = rows(count, width), (rows(width), EPS)

    def weight(features: int, inputs: int, scaled: bool) -> decode.DecodeWeight:
        if not scaled:
            return decode.DecodeWeight(rows(features, inputs))
        return decode.DecodeWeight(
            rows(features, inputs, dtype=torch.float8_e4m3fn), rows(features, dtype=torch.float32)
        )

    for scaled in (False, True)[: 1 + has_fp8]:
        q, kv = weight(heads * size, width, scaled), weight(kv_heads * size, width, scaled)
        decode.linear(x, (q, kv, kv), norm=norm)
        decode.linear(rows(count, hidden), (weight(width, hidden, scaled),), residual_bn=x)
        decode.gate_up(x, weight(hidden, width, scaled), weight(hidden, width, scaled), norm)
        decode.dequantize(kv, torch.bfloat16)
    cache = rows(count, kv_heads, 512, size)
    table = rows(512, size, dtype=torch.float32)
    qkv = rows(count, (heads + 2 * kv_heads) * size)
    decode.attend(qkv, table, table, table[:, 0], torch.zeros(count, dtype=torch.int64), cache, cache, size**-0.5)
    assert names(decode) - set(compiled) == (set() if has_fp8 else {"_dequantize_kernel"})

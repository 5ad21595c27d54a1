"""The kernels as torch operators: schema, fakes and twins agree, and a backward is refused, not taken for zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ernie_accel
from ernie_accel.kernels import ops, reference

EPS = 1e-6


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _cases() -> list[tuple[str, tuple[Any, ...]]]:
    modulation = (rand(32), rand(2, 1, 32), rand(2, 1, 32), EPS)
    x, gate = rand(2, 5, 32), rand(2, 1, 32)
    rotary = (rand(2, 5, 96), rand(8), rand(8), rand(2, 5, 1, 8), rand(2, 5, 1, 8), 4, EPS)
    heads, (rows, scale), (weight, weight_scale) = (
        rand(1, 5, 4, 8, dtype=torch.float8_e4m3fn),
        reference.quantize_rows(x),
        reference.quantize_rows(rand(16, 32)),
    )
    pictures = {
        "contiguous": rand(2, 16, 3, 5),
        "channels-last": rand(2, 16, 3, 5).contiguous(memory_format=torch.channels_last),
    }
    c, norm = rand(16), (rand(16), rand(16), 4, EPS)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("norm_modulate", (x, *modulation)),
        ("norm_modulate_fp8", (x, *modulation)),
        ("add_norm_modulate", (x, x, gate, *modulation)),
        ("add_norm_modulate_fp8", (x, x, gate, *modulation)),
        ("gated_add", (x, x, gate)),
        ("quantize_rows", (x,)),
        ("gelu_mul", (x,)),
        ("gelu_mul_fp8", (x,)),
        ("qk_norm_rope", rotary),
        ("qkv_fp8", rotary),
        ("attention", (*(rand(1, 5, 4, 8) for _ in range(3)), torch.tensor([4], dtype=torch.int32))),
        ("attention_fp8", (heads, heads, heads, torch.ones(5, 1), torch.tensor([5], dtype=torch.int32))),
        ("attention", (*(rand(1, 5, 4, 8) for _ in range(3)), None)),
        ("attention_fp8", (heads, heads, heads, torch.ones(5, 1), None)),
        *(
            (name, (x, *branch, rand(32), vector, EPS))
            for vector in (None, gate)
            for name, branch in (
                ("norm_scale", ()),
                ("norm_scale_fp8", ()),
                ("add_norm_scale", (x, rand(32), vector)),
                ("add_norm_scale_fp8", (x, rand(32), vector)),
            )
        ),
        ("add_normed", (x, x, rand(32), gate, EPS)),
        ("add_normed", (x, x, rand(32), None, EPS)),
        ("scales_and_gates", (rand(2, 128),)),
        ("silu_mul", (x,)),
        ("silu_mul_fp8", (x,)),
        *(
            (name, (rand(2, 5, (4 + 2 * kv) * 8), rand(8), rand(8), rand(2, 2, 5, 1, 4), 4, EPS))
            for name in ("qk_norm_rope_pairs", "qkv_fp8_pairs")
            for kv in (2, 4)
        ),
        ("linear_fp8", (rows, scale, weight, weight_scale.view(1, -1))),
        ("linear_fp8", (rows, scale, weight, weight_scale.view(1, -1), 16)),
        *(
            ("gated_linear_fp8", (rows, scale, weight, weight_scale.view(1, -1), *others))
            for others in ((True,), (False,), (True, 64), (False, 64, 16))
        ),
        ("low_rank_fp8", (rows, scale, rand(3, 32))),
        *((name, (*arguments, 64)) for name, arguments in _with_spare_columns()),
        ("with_low_rank", (rows, scale, weight[:3], rand(3), 64)),
        ("low_rank_into", (reference.quantize_rows(x, 64)[0], weight[:3], rand(3))),
    ]
    for picture in pictures.values():
        cases += [("group_norm_affine", (picture, add, *norm)) for add in (None, c)]
        cases += [("add_group_norm_affine", (picture, None, None, *norm))]
        cases += [("add_group_norm_affine", (picture, picture.clone(), c, *norm))]
        cases += [("affine", (picture, rand(2, 2, 16), silu)) for silu in (False, True)]
    return cases


def _with_spare_columns() -> list[tuple[str, tuple[Any, ...]]]:
    x, gate, modulation = rand(2, 5, 32), rand(2, 1, 32), (rand(32), rand(2, 1, 32), rand(2, 1, 32), EPS)
    return [
        ("norm_modulate_fp8", (x, *modulation)),
        ("add_norm_modulate_fp8", (x, x, gate, *modulation)),
        ("norm_scale_fp8", (x, rand(32), gate, EPS)),
        ("add_norm_scale_fp8", (x, x, rand(32), gate, rand(32), gate, EPS)),
        ("quantize_rows", (x,)),
        ("gelu_mul_fp8", (x,)),
        ("silu_mul_fp8", (x,)),
        ("qkv_fp8", (rand(2, 5, 96), rand(8), rand(8), rand(2, 5, 1, 8), rand(2, 5, 1, 8), 4, EPS)),
        ("qkv_fp8_pairs", (rand(2, 5, 64), rand(8), rand(8), rand(2, 2, 5, 1, 4), 4, EPS)),
        ("attention_fp8", (*(rand(2, 5, 4, 8).to(ops.FP8) for _ in range(3)), torch.ones(10, 1), None)),
    ]


CASES = _cases()


def test_keys_beyond_the_length_of_a_row_do_not_count() -> None:
    q, k, v = (rand(2, 7, 4, 8 * i)[..., :8] for i in (1, 2, 3))
    counts = [7, 3]
    lengths = torch.tensor(counts, dtype=torch.int32)
    alone = [
        reference.attention(q[i : i + 1], k[i : i + 1, :count], v[i : i + 1, :count], lengths[i : i + 1])
        for i, count in enumerate(counts)
    ]
    torch.testing.assert_close(reference.attention(q, k, v, lengths), torch.cat(alone))
    q8, k8, v8 = (x.to(ops.FP8) for x in (q, k, v))
    wide = reference.attention(q8.float(), k8.float(), v8.float(), lengths)
    in_fp8 = reference.attention_fp8(q8, k8, v8, torch.ones(14, 1), lengths)
    assert torch.equal(in_fp8.float(), wide.to(ops.FP8).float())


def test_without_lengths_all_keys_count() -> None:
    q, k, v = (rand(2, 7, 4, 8) for _ in range(3))
    every = torch.tensor([7, 7], dtype=torch.int32)
    torch.testing.assert_close(reference.attention(q, k, v, None), reference.attention(q, k, v, every))
    q8, k8, v8 = (x.to(ops.FP8) for x in (q, k, v))
    got, expected = (reference.attention_fp8(q8, k8, v8, torch.ones(14, 1), each) for each in (None, every))
    assert torch.equal(got.float(), expected.float())


def test_attention_leaves_spare_columns_and_room_in_its_rows() -> None:
    """The rows of the wide result mean the same: they are smaller by as much as their scale is larger."""
    qkv, weight, rope = rand(2, 5, 64), torch.ones(8), rand(2, 2, 5, 1, 4)
    *narrow, scale = reference.qkv_fp8_pairs(qkv, weight, weight, rope, 4, EPS)
    *wide, wide_scale = reference.qkv_fp8_pairs(qkv, weight, weight, rope, 4, EPS, 64)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(narrow, wide, strict=True))
    assert torch.equal(wide_scale, scale * reference.ROOM)
    alone = reference.attention_fp8(*narrow, scale, None).float() * scale.view(2, 5, 1)
    got = reference.attention_fp8(*wide, wide_scale, None, 64).float()
    assert got.shape == (2, 5, 96)
    assert not got[..., 32:].any()
    torch.testing.assert_close(got[..., :32] * wide_scale.view(2, 5, 1), alone, rtol=0.1, atol=0.01)


def test_every_operator_has_a_case() -> None:
    names = {name for name, value in vars(ops).items() if callable(value) and not name.startswith("_")}
    assert {name for name, _ in CASES} == names & set(dir(torch.ops.ernie_accel))
    assert len({name for name, _ in CASES}) == 30


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_schema_and_fakes_hold(name: str, arguments: tuple[Any, ...]) -> None:
    """That nothing else is changed in place or returned, and fakes have the shapes, dtypes and strides of results."""
    takes_float8 = any(isinstance(a, Tensor) and a.dtype == ops.FP8 for a in arguments)
    # The check of the schema multiplies the inputs, which float8 cannot on a CPU.
    checks = ("test_faketensor",) if takes_float8 else ("test_schema", "test_faketensor")
    # Raises where one does not hold.
    torch.library.opcheck(getattr(torch.ops.ernie_accel, name).default, arguments, test_utils=checks)


@pytest.mark.parametrize(("name", "arguments"), CASES[:8], ids=lambda value: value if isinstance(value, str) else "")
def test_a_backward_is_refused(name: str, arguments: tuple[Any, ...]) -> None:
    x = arguments[0].clone().requires_grad_()
    out = getattr(ops, name)(x, *arguments[1:])
    out = out[0] if isinstance(out, tuple) else out
    with torch.no_grad():
        plain = getattr(ops, name)(*arguments)
    assert torch.equal(out.detach().float(), (plain[0] if isinstance(plain, tuple) else plain).float())
    with pytest.raises(ernie_accel.ErnieAccelError, match=rf"^ernie_accel::{name} has no backward"):
        out.float().sum().backward()


def _first(argument: Any, length: int) -> Any:
    """Return the first of five rows, if it has so many."""
    has_rows = isinstance(argument, Tensor) and argument.shape[1:2] == (5,)
    return (
        argument[:, :length].clone(memory_format=torch.contiguous_format) if has_rows else argument
    )  # a copy: views are graphs of their own


@pytest.mark.parametrize(("name", "arguments"), CASES[:8], ids=lambda value: value if isinstance(value, str) else "")
def test_an_operator_is_one_node_of_a_graph_that_serves_all_lengths(name: str, arguments: tuple[Any, ...]) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *a: getattr(ops, name)(*a), fullgraph=True, dynamic=True, backend=keep)
    with torch.no_grad():
        for length in (5, 4, 3):
            some = tuple(_first(a, length) for a in arguments)
            torch.testing.assert_close(compiled(*some), getattr(ops, name)(*some))
    assert len(graphs) == 1
    nodes = [node for node in graphs[0].graph.nodes if "ernie_accel" in str(node.target)]
    assert [str(node.target) for node in nodes] == [f"ernie_accel.{name}.default"]
    torch._dynamo.reset()

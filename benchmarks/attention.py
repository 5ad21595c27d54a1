"""Attention by itself, as the fused kernels call it: the kernel for Hopper cards, and cuDNN's.

On a GPU: ``python benchmarks/attention.py --out benchmarks/results/attention_NAME``; it takes half a minute. On a CPU
``--tiny`` runs the same code on the twins in plain torch; its times say nothing. Writes OUT.json and OUT.md, by
default into the folder that the environment variable OUT names.

Sizes are those of the three families at 1024x1024 pixels with 128 text tokens, of which 60 are padding. Times are
medians of calls back to back, after half a second of them, which brings the card to its sustained clock. Errors are of
the first head, against float32 with the same operands: for values around 0, and for values around 1/2 at nearly equal
weights, where sums are long and of one sign. In fp8, laying out the values is not counted: in a block, the launch that
quantizes them does it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ladder_measures import CUDA, milliseconds, record_of
from torch import Tensor

from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.kernels import reference
from ernie_accel.kernels.hopper import attention as hopper
from ernie_accel.quantization.layers import sqnr_db

#: Name -> (rows, tokens, heads, heads of keys, dimensions of a head).
FULL = {"ERNIE-Image": (1, 4224, 32, 32, 128), "Z-Image": (1, 4224, 30, 30, 128), "NewBie-image": (2, 4224, 24, 8, 96)}
TINY = {"Z-Image": (1, 80, 2, 2, 128), "NewBie-image": (2, 80, 3, 1, 96)}
PADDING = 60
CALLS = 1000 if CUDA else 1
COLUMNS = ("sizes", "precision", "who", "us", "TFLOP/s", "dB, values around 0", "dB, around 1/2")


def main() -> None:
    """Measure everything that can run here, and write the table."""
    arguments = parse()
    device = "cpu" if arguments.tiny else "cuda"
    context = Context.detect(device=device)
    result: dict[str, Any] = {
        **record_of("attention", context),
        "rows": [
            row for name, sizes in (TINY if arguments.tiny else FULL).items() for row in rows(name, sizes, device)
        ],
    }
    print(write(result, arguments.out))


@torch.no_grad()
def rows(name: str, sizes: tuple[int, int, int, int, int], device: str) -> Iterator[dict[str, Any]]:
    """Yield what each kernel makes of these sizes, in both precisions."""
    batch, tokens, heads, _, size = sizes
    lengths_b = torch.full((batch,), tokens - PADDING, dtype=torch.int32, device=device)
    flops = 4 * batch * heads * tokens * (tokens - PADDING) * size
    for precision, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        operands = [drawn(sizes, spread, mean, dtype, device) for spread, mean in ((1.0, 0.0), (0.2, 0.5))]
        expected = [reference.attention(*(x[:1, :, :1].float() for x in each), lengths_b[:1]) for each in operands]
        for who, attend in attends(precision, operands[0][0], lengths_b):
            try:
                got = [attend(*each)[:1, :, :size] for each in operands]
                milliseconds(lambda attend=attend, each=operands[0]: attend(*each), CALLS)
                us = milliseconds(lambda attend=attend, each=operands[0]: attend(*each), CALLS) * 1e3
            except ErnieAccelError as error:
                yield {"sizes": name, "precision": precision, "who": who, "error": str(error)}
                continue
            yield {
                "sizes": name, "precision": precision, "who": who, "us": us, "tflops": flops / us / 1e6,
                "db": [sqnr_db(want, found.float()) for want, found in zip(expected, got, strict=True)],
            }  # fmt: skip


def attends(
    precision: str, q_bsnd: Tensor, lengths_b: Tensor
) -> Iterator[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
    """Yield who attends here, and how; for the kernel for Hopper cards, values are laid out once."""
    if not q_bsnd.is_cuda:
        yield "twin", lambda q, k, v: reference.attention(q.float(), k.float(), v.float(), lengths_b)
        return
    from ernie_accel.kernels import cudnn_attention

    one, laid_out = torch.ones(1, 1, device=q_bsnd.device), {}

    def by_hopper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if precision == "bf16":
            return hopper.attention(q, k, v, lengths_b)
        if v.data_ptr() not in laid_out:
            laid_out[v.data_ptr()] = hopper.laid_out(v)
        return hopper.attention_fp8(q, k, laid_out[v.data_ptr()], one, lengths_b)

    if hopper.takes(q_bsnd):
        yield "this library", by_hopper
    if precision == "fp8":
        yield "cuDNN", lambda q, k, v: cudnn_attention.attention_fp8(q, k, v, one, lengths_b)
    else:
        yield "cuDNN, by lengths", lambda q, k, v: cudnn_attention.attention(q, k, v, lengths_b)
        yield "cuDNN, padding counted", lambda q, k, v: cudnn_attention.attention(q, k, v, None)


def drawn(
    sizes: tuple[int, int, int, int, int], spread: float, mean: float, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values; `spread` is their standard deviation, `mean` the values' mean."""
    batch, tokens, heads, kv_heads, size = sizes
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(batch, tokens, count, size, generator=generator, device=device) * spread
        for count in (heads, kv_heads, kv_heads)
    )
    return q.to(dtype), k.to(dtype), (v + mean).to(dtype)


def write(result: dict[str, Any], out: Path) -> str:
    """Write OUT.json and OUT.md; return the latter."""
    lines = [f"# Attention on {result['device']}", "", f"`{result['command']}`", ""]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += [f"python {result['python']}, {versions}; commit {result['commit'] or 'unknown'}.", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for row in result["rows"]:
        start = f"| {row['sizes']} | {row['precision']} | {row['who']} |"
        if "error" in row:
            lines.append(f"{start} {row['error']} | - | - | - |")
        else:
            lines.append(f"{start} {row['us']:.1f} | {row['tflops']:.0f} | {row['db'][0]:.1f} | {row['db'][1]:.1f} |")
    text = "\n".join(lines) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU; times say nothing")
    folder = Path(os.environ.get("OUT", "."))
    parser.add_argument("--out", type=Path, default=folder / "attention", help="path of the results, without suffix")
    return parser.parse_args()


if __name__ == "__main__":
    main()

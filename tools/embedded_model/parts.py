"""What each part of fp8 costs the prediction of Z-Image's and Lumina 2's miniatures: by operand, by product, by block.

    python -m tools.embedded_model.parts --architecture z-image --folder tools/embedded_model/trained/z-image

Two presets draw nearly the same objects, so objects cannot show where an error comes from. The distance of the
transformer's output from float32's can, on the inputs of all steps of a few pictures, with one part at a time in fp8.
As in ``sensitivity.py``, fp8 is emulated: what the kernels round is rounded, and so are the probabilities, as in cuDNN;
all else is float32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ernie_accel
from ernie_accel import RewriteBlocks
from ernie_accel.kernels import reference
from ernie_accel.models.rewriting import SelfAttention
from tools.embedded_model import miniatures
from tools.embedded_model.miniatures import MINIATURES
from tools.embedded_model.sensitivity import error_db, in_fp8, kept_precise, linears_of, replayed

#: What attention in fp8 rounds. Its output is what the next product reads, and counts there.
OPERANDS = ("queries", "keys", "probabilities", "values")
_PROBABILITY_SCALE = 256.0  # that of kernels/cudnn_attention.py


def attend(q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, mask: Tensor | None, *, of: set[str], mixes: bool) -> Tensor:
    """Return the attention output [B, S, N * D] with these `OPERANDS` in fp8, as ``SelfAttention.attend`` does.

    Args:
        q_bsnd: Queries.
        k_bsnd: Keys.
        v_bsnd: Values.
        mask: True where a token is real; None if all are.
        of: What is rounded.
        mixes: Whether queries and keys are mixed before (`reference.mixed`).
    """
    share = q_bsnd.shape[2] // k_bsnd.shape[2]
    if mixes:
        q_bsnd, k_bsnd = reference.mixed(q_bsnd), reference.mixed(k_bsnd)
    q_bsnd, k_bsnd = (_in_e4m3(x) if name in of else x for name, x in zip(OPERANDS, (q_bsnd, k_bsnd), strict=False))
    if "values" in of:
        v_bsnd = _in_e4m3(v_bsnd, v_bsnd.abs().amax() / reference.FP8_MAX)
    q, k, v = (x.transpose(1, 2) for x in (q_bsnd, *(x.repeat_interleave(share, 2) for x in (k_bsnd, v_bsnd))))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    if "probabilities" in of:
        weights = _in_e4m3(weights, torch.tensor(1 / _PROBABILITY_SCALE))
    return (weights @ v / total).transpose(1, 2).flatten(2, 3)


def _in_e4m3(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return `x` through float8, in units of `scale`."""
    units = x if scale is None else x / scale
    units = units.clamp(-reference.FP8_MAX, reference.FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype)
    return units if scale is None else units * scale


@contextlib.contextmanager
def parts_in_fp8(
    pipe: Any, products: str | None = None, operands: set[str] | None = None, *, within: str = "", mixes: bool = True
) -> Iterator[None]:
    """Compute parts of a rewritten transformer in fp8, within the block.

    Args:
        pipe: In float32.
        products: Regular expression, searched for in the paths of the linear layers that the family does not keep
            precise; None takes none of them.
        operands: Of the attention, where the product after it may be in fp8; None takes none.
        within: Regular expression of the blocks of these.
        mixes: As in `attend`.
    """
    precise = kept_precise(pipe)
    with contextlib.ExitStack() as stack:
        if products is not None:
            wanted = {path: each for path, each in linears_of(pipe).items() if path not in precise}
            stack.enter_context(in_fp8(each for path, each in wanted.items() if re.search(products, path)))
        for path, part in pipe.transformer.named_modules():
            is_taken = isinstance(part, SelfAttention) and f"{path}.to_out.0" not in precise
            if operands is not None and is_taken and re.match(within, path):
                stack.callback(partial(delattr, part, "attend"))
                setattr(part, "attend", partial(attend, of=operands, mixes=mixes))  # noqa: B010  a method to mypy
        yield


@torch.no_grad()
def part_errors_db(pipe: Any, steps: int, guidance_scale: float, prompts: int = 8) -> dict[str, float | list[float]]:
    """Return how far each part in fp8 moves the output: name -> dB; for "by step", a list.

    Args:
        pipe: In float32. Its blocks are rewritten.
        steps: Of the pictures whose steps are replayed.
        guidance_scale: Of these pictures.
        prompts: How many are drawn.
    """
    outputs = replayed(ernie_accel.optimize(pipe, RewriteBlocks()), steps, guidance_scale, prompts)
    exact, all_of_it = outputs(), set(OPERANDS)
    paths = sorted(set(linears_of(pipe)) - kept_precise(pipe))
    kinds = sorted({re.sub(r"^\w+\.\d+\.", "", path) for path in paths})
    blocks = list(dict.fromkeys(".".join(path.split(".")[:2]) for path in paths))
    parts: dict[str, dict[str, Any]] = {
        "all": {"products": "", "operands": all_of_it},
        "all, queries and keys not mixed": {"products": "", "operands": all_of_it, "mixes": False},
        "products": {"products": ""},
        "attention": {"operands": all_of_it},
        "attention, not mixed": {"operands": all_of_it, "mixes": False},
        **{f"attention: {name}": {"operands": {name}} for name in OPERANDS},
        **{f"attention: {name}, not mixed": {"operands": {name}, "mixes": False} for name in OPERANDS[:2]},
        **{f"products: {kind}": {"products": rf"\.{re.escape(kind)}$"} for kind in kinds},
        **{
            f"block: {block}": {"products": rf"^{re.escape(block)}\.", "operands": all_of_it, "within": rf"{block}\."}
            for block in blocks
        },
    }
    errors: dict[str, float | list[float]] = {}
    for name, chosen in parts.items():
        with parts_in_fp8(pipe, **chosen):
            found = outputs()
        errors[name] = error_db(found, exact)
        if name == "all":
            errors["by step"] = [error_db(one, of) for one, of in zip(found, exact, strict=True)]
    return errors


def main() -> None:
    """Measure a miniature from the command line, print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=[each for each in MINIATURES if each != "ernie-image"], required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    pipe = miniatures.load(options.folder, options.architecture)
    pipe.set_progress_bar_config(disable=True)
    errors = part_errors_db(pipe, 9, MINIATURES[options.architecture].guidance_scale, options.prompts)
    print("| in fp8 | dB |\n|---|---|")
    for name, error in errors.items():
        print(f"| {name} | {' '.join(f'{each:.1f}' for each in (error if isinstance(error, list) else [error]))} |")
    if options.out is not None:
        record = {
            "command": shlex.join(["python", "-m", "tools.embedded_model.parts", *sys.argv[1:]]),
            "torch": torch.__version__,
            "architecture": options.architecture,
            "part_errors_db": errors,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

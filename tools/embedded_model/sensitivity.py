"""Which layers of a miniature must stay precise, and what fp8 costs in pictures.

    python -m tools.embedded_model.sensitivity                                      # the embedded ERNIE-Image
    python -m tools.embedded_model.sensitivity --architecture z-image --folder FOLDER
    python -m tools.embedded_model.sensitivity --presets turbo-bf16 turbo-fp8       # what a card really computes

fp8 is emulated, so that any machine can tell: weights and activations are rounded to e4m3 with a scale per row, as
torchao's row-wise scheme does, and multiplied in float32. First each linear layer alone is rounded, and the distance
of the transformer's output from float32's is measured on the inputs of real steps. Then pictures are judged: in
float32, in bfloat16, in fp8 without what the family keeps precise, in fp8 throughout, and on the fused kernels, in
bfloat16 and in fp8, attention included. On a CPU these are computed by their twins in plain torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ernie_accel
from ernie_accel import CastDtype, Context, FuseKernels, RewriteBlocks
from ernie_accel.demo.judge import Adherence, adherence, unseen_prompts
from ernie_accel.families import family_of
from tools.embedded_model import miniatures
from tools.embedded_model.miniatures import MINIATURES

_E4M3, _E4M3_MAX, _LEAST = torch.float8_e4m3fn, 448.0, 1e-12


class Interval(NamedTuple):
    """Where the true share of successes lies with 95 % confidence, by Wilson's formula."""

    low: float
    high: float


def wilson(share: float, n: int, z: float = 1.96) -> Interval:
    """Return the interval of a share that was measured `n` times."""
    middle, wide = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval((middle - wide) / (1 + z * z / n), (middle + wide) / (1 + z * z / n))


def rounded(x: Tensor) -> Tensor:
    """Return `x` [..., K] through e4m3, with a scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=_LEAST) / _E4M3_MAX
    return (x / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(_E4M3).to(x.dtype) * scale


@contextlib.contextmanager
def in_fp8(linears: Iterable[nn.Linear]) -> Iterator[None]:
    """Compute these layers as fp8 would, within the block."""
    with contextlib.ExitStack() as stack:
        for linear in linears:
            stack.callback(partial(setattr, linear.weight, "data", linear.weight.data))
            linear.weight.data = rounded(linear.weight.data)
            hook = linear.register_forward_pre_hook(lambda _, args: (rounded(args[0]), *args[1:]))
            stack.callback(hook.remove)
        yield


def linears_of(pipe: Any) -> dict[str, nn.Linear]:
    """Return the linear layers of a pipe's transformer by path."""
    return {path: part for path, part in pipe.transformer.named_modules() if isinstance(part, nn.Linear)}


def kept_precise(pipe: Any) -> set[str]:
    """Return the paths that the family's quantization leaves out."""
    patterns = family_of(pipe).keep_precise["transformer"]
    return {path for path in linears_of(pipe) if any(re.match(pattern, path) for pattern in patterns)}


@torch.no_grad()
def layer_errors_db(pipe: Any, steps: int, guidance_scale: float, prompts: int = 8) -> dict[str, float]:
    """Return how far each layer alone, in fp8, moves the transformer's output: 20 log10 of the relative distance.

    Args:
        pipe: In float32.
        steps: Of the pictures whose steps are replayed.
        guidance_scale: Of these pictures.
        prompts: How many are drawn.
    """
    calls: list[tuple[Any, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    texts = [text for text, _ in unseen_prompts(prompts, seed=3)]
    noise = [torch.Generator().manual_seed(i) for i in range(prompts)]
    switch = {"use_pe": False} if hasattr(pipe, "pe") else {}
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "latent", **switch}
    pipe(texts, height=128, width=128, generator=noise, **arguments)
    hook.remove()

    def outputs() -> Tensor:
        found = [pipe.transformer(*copied(args), **kwargs)[0] for args, kwargs in calls]
        return torch.stack([torch.stack(each) if isinstance(each, list) else each for each in found])

    def copied(args: Any) -> Any:
        return [list(each) if isinstance(each, list) else each for each in args]

    exact, errors = outputs(), {}
    for path, linear in linears_of(pipe).items():
        with in_fp8([linear]):
            errors[path] = 20 * math.log10(max(float((outputs() - exact).norm() / exact.norm()), 1e-12))
    return errors


def by_kind(errors: dict[str, float]) -> dict[str, tuple[float, str]]:
    """Return the worst error of each kind of layer (its path without numbers) and which layer that is, worst first."""
    kinds: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for path, error in errors.items():
        kinds[re.sub(r"\.\d+(?=\.|$)", ".*", path)].append((error, path))
    return dict(sorted(((kind, max(each)) for kind, each in kinds.items()), key=lambda entry: -entry[1][0]))


def judged(load: Callable[[], Any], prompts: int, steps: int, guidance_scale: float) -> dict[str, Adherence]:
    """Return the adherence in float32, bfloat16, fp8 with and without what the family keeps precise, and on kernels."""
    measure = partial(adherence, n=prompts, steps=steps, guidance_scale=guidance_scale)
    found = {}
    pipe = load()
    found["float32"] = measure(pipe)
    linears, precise = linears_of(pipe), kept_precise(pipe)
    with in_fp8(linear for path, linear in linears.items() if path not in precise):
        found["fp8, the family's layers kept"] = measure(pipe)
    with in_fp8(linears.values()):
        found["fp8 throughout"] = measure(pipe)
    found["bfloat16"] = measure(pipe.to(torch.bfloat16))
    context = Context.detect() if pipe.device.type == "cuda" else Context.named("h200")
    for precision in ("bf16", "fp8"):
        pipe = load()
        on_kernels = CastDtype("bfloat16"), RewriteBlocks(), FuseKernels(precision)
        found[f"fused kernels, {precision}"] = measure(ernie_accel.optimize(pipe, *on_kernels, context=context))
    return found


def main() -> None:
    """Measure a miniature from the command line, print the tables, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=MINIATURES, default="ernie-image")
    parser.add_argument("--folder", type=Path, help="of a miniature that is not in the package")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--presets", nargs="*", default=[], help="judge these on this machine, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if (options.architecture == "ernie-image") != (options.folder is None):
        parser.error("--folder goes with every architecture but ernie-image, which is in the package")
    miniature = MINIATURES[options.architecture]
    steps = 8 if miniature.has_enhancer else 9

    def load() -> Any:
        pipe: Any = (
            ernie_accel.demo.load(prompt_enhancer=False)
            if options.folder is None
            else miniatures.load(options.folder, options.architecture)
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(options.device)

    errors = layer_errors_db(load(), steps, miniature.guidance_scale)
    precise = kept_precise(load())
    print("| layers | worst, dB | which | kept precise by the family |\n|---|---|---|---|")
    for kind, (error, path) in by_kind(errors).items():
        print(f"| `{kind}` | {error:.1f} | `{path}` | {'yes' if path in precise else ''} |", flush=True)
    results = judged(load, options.prompts, steps, miniature.guidance_scale)
    for preset in options.presets:
        pipe = ernie_accel.optimize(load(), preset=preset)
        results[preset] = adherence(pipe, options.prompts, steps, guidance_scale=miniature.guidance_scale)
    print("\n| computed in | objects right | 95 % interval | pictures right |\n|---|---|---|---|")
    for name, found in results.items():
        low, high = wilson(found.object_fraction, found.objects)
        shares = (
            f"{found.object_fraction:.2%} of {found.objects} | {low:.2%} to {high:.2%} | {found.picture_fraction:.1%}"
        )
        print(f"| {name} | {shares} |", flush=True)
    if options.out is not None:
        record = {
            "command": shlex.join(["python", "-m", "tools.embedded_model.sensitivity", *sys.argv[1:]]),
            "device": options.device,
            "torch": torch.__version__,
            "architecture": options.architecture,
            "layer_errors_db": errors,
            "adherence": {
                name: {"objects": each.objects, "right": each.object_fraction, "pictures_right": each.picture_fraction}
                for name, each in results.items()
            },
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

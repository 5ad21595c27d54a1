"""Which layers of a miniature must stay precise, and what fp8 costs in pictures.

    python -m tools.embedded_model.sensitivity                                      # the embedded ERNIE-Image
    python -m tools.embedded_model.sensitivity --architecture z-image --folder FOLDER
    python -m tools.embedded_model.sensitivity --presets turbo-bf16 turbo-fp8       # what a card really computes
    python -m tools.embedded_model.sensitivity --compare turbo-bf16 turbo-fp8       # only these two, prompt by prompt

fp8 is emulated, so that any machine can tell: weights and activations are rounded to e4m3 with a scale per row, as
torchao's row-wise scheme does, and multiplied in float32. First each linear layer alone is rounded, and the distance
of the transformer's output from float32's is measured on the inputs of real steps. Then pictures are judged: in
float32, in bfloat16, in fp8 without what the family keeps precise, in fp8 throughout, and on the fused kernels, in
bfloat16 and in fp8, attention included. On a CPU these are computed by their twins in plain torch.

Presets run as they would anywhere, but for one thing: a CPU without float16 arithmetic takes a hundred times as long
for convolutions in float16, so on CPUs they are computed in float32, from float16 and rounded to it.

With ``--compare`` nothing else is measured: each prompt is drawn from the same noise in each way, and the objects that
one way draws right and another does not are counted. That shows far smaller differences than two shares do.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ernie_accel
from ernie_accel import CastDtype, Context, FuseKernels, RewriteBlocks
from ernie_accel.demo.judge import Adherence, Verdict, adherence, summarize, unseen_prompts, verdicts
from ernie_accel.families import family_of
from tools.embedded_model import miniatures
from tools.embedded_model.miniatures import MINIATURES

#: Ways to compute beside the presets: in a dtype, or on the kernels (on a CPU, by their twins in plain torch).
WAYS = ("float32", "bfloat16", "kernels-bf16", "kernels-fp8")
_RESAMPLES = 10_000
#: Those that compute, beside torch: results name their versions.
_LIBRARIES = ("diffusers", "transformers", "torchao", "bitsandbytes")
_E4M3, _E4M3_MAX, _LEAST = torch.float8_e4m3fn, 448.0, 1e-12


class Interval(NamedTuple):
    """Where the true share of successes lies with 95 % confidence, by Wilson's formula."""

    low: float
    high: float


def wilson(share: float, n: int, z: float = 1.96) -> Interval:
    """Return the interval of a share that was measured `n` times."""
    middle, wide = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval((middle - wide) / (1 + z * z / n), (middle + wide) / (1 + z * z / n))


class Kept(NamedTuple):
    """Of the objects that one way draws right, what another keeps, and how many the other draws right in all.

    Attributes:
        right_in_both: Objects.
        lost: Right in the first way only.
        gained: Right in the other only.
        interval: Where the true `share` lies with 95 % confidence, by a bootstrap over prompts.
        right_ratio_interval: The same of `right_ratio`.
    """

    right_in_both: int
    lost: int
    gained: int
    interval: Interval | None = None
    right_ratio_interval: Interval | None = None

    @property
    def share(self) -> float:
        """What the other keeps of the objects that the first draws right: gains do not count."""
        return self.right_in_both / max(self.right_in_both + self.lost, 1)

    @property
    def right_ratio(self) -> float:
        """How many the other draws right over how many the first does: the ratio of adherences, gains included."""
        return (self.right_in_both + self.gained) / max(self.right_in_both + self.lost, 1)

    def as_json(self) -> dict[str, Any]:
        """Return all of it, without intervals that are not known."""
        found = self._asdict() | {"share": self.share, "right_ratio": self.right_ratio}
        return {name: value for name, value in found.items() if value is not None}


def kept(reference: list[Verdict], other: list[Verdict]) -> Kept:
    """Compare two ways by their verdicts on the same prompts, in the same order."""
    pairs = [
        torch.tensor([(one.is_right, two.is_right) for one, two in zip(first.objects, second.objects, strict=True)])
        for first, second in zip(reference, other, strict=True)
    ]
    # For each prompt: right in the first way, in the other, and in both.
    counts = torch.stack([torch.stack([*pair.sum(0), pair.all(1).sum()]) for pair in pairs])
    right, right_then, both = counts.sum(0).tolist()
    # The objects of a picture stand or fall together, so prompts are drawn again and not objects.
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(_RESAMPLES):
        before, *after = counts[torch.randint(len(counts), (len(counts),), generator=generator)].sum(0).tolist()
        drawn.append([each / max(before, 1) for each in after])
    (ratio_low, low), (ratio_high, high) = torch.tensor(drawn).quantile(torch.tensor([0.025, 0.975]), dim=0).tolist()
    return Kept(both, right - both, right_then - both, Interval(low, high), Interval(ratio_low, ratio_high))


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
    outputs = replayed(pipe, steps, guidance_scale, prompts)
    exact, errors = outputs(), {}
    for path, linear in linears_of(pipe).items():
        with in_fp8([linear]):
            errors[path] = error_db(outputs(), exact)
    return errors


def replayed(pipe: Any, steps: int, guidance_scale: float, prompts: int) -> Callable[[], Tensor]:
    """Draw pictures, and return a function that returns the transformer's outputs on their inputs [calls, B, ...]."""
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

    return outputs


def error_db(found: Tensor, exact: Tensor) -> float:
    """Return the distance of `found` from `exact`, relative to the latter, in dB."""
    return 20 * math.log10(max(float((found - exact).norm() / exact.norm()), 1e-12))


def by_kind(errors: dict[str, float]) -> dict[str, tuple[float, str]]:
    """Return the worst error of each kind of layer (its path without numbers) and which layer that is, worst first."""
    kinds: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for path, error in errors.items():
        kinds[re.sub(r"\.\d+(?=\.|$)", ".*", path)].append((error, path))
    return dict(sorted(((kind, max(each)) for kind, each in kinds.items()), key=lambda entry: -entry[1][0]))


def judged(load: Callable[[], Any], prompts: int, **call: Any) -> dict[str, Adherence]:
    """Return the adherence in float32, bfloat16, fp8 with and without what the family keeps precise, and on kernels.

    `call` are further arguments of ``judge.adherence``.
    """
    measure = partial(adherence, n=prompts, **call)
    found = {}
    pipe = load()
    found["float32"] = measure(pipe)
    linears, precise = linears_of(pipe), kept_precise(pipe)
    with in_fp8(linear for path, linear in linears.items() if path not in precise):
        found["fp8, the family's layers kept"] = measure(pipe)
    with in_fp8(linears.values()):
        found["fp8 throughout"] = measure(pipe)
    found["bfloat16"] = measure(pipe.to(torch.bfloat16))
    for precision in ("bf16", "fp8"):
        found[f"fused kernels, {precision}"] = measure(computed(load(), f"kernels-{precision}"))
    return found


def computed(pipe: Any, way: str) -> Any:
    """Return `pipe`, in float32, made to compute in one of `WAYS`, or by a preset.

    Args:
        pipe: A miniature.
        way: What is in fp8 may have options: "turbo-fp8@attention=bf16" attends in bfloat16, and
            "kernels-fp8@keep=layers[.]0[.]" keeps layers in bfloat16 beside the family's, by a regular expression.
    """
    way, *options = way.split("@")
    if way in ("float32", "bfloat16"):
        return pipe.to(getattr(torch, way))
    given: dict[str, Any] = dict(option.split("=", 1) for option in options)
    if "keep" in given:
        theirs = family_of(pipe).keep_precise["transformer"]
        of_it = [pattern for pattern in theirs if any(re.match(pattern, path) for path in linears_of(pipe))]
        given["exclude"] = (*of_it, given.pop("keep"))
    if way not in WAYS:
        return quick_on_cpu(ernie_accel.optimize(pipe, *([FuseKernels("fp8", **given)] if given else []), preset=way))
    twins = Context.named("h200")
    twins = replace(twins, versions={**twins.versions, "cudnn": "unknown"})  # whose attention has a twin, too
    context = Context.detect() if pipe.device.type == "cuda" else twins
    on_kernels = FuseKernels(way.removeprefix("kernels-"), **given)
    return ernie_accel.optimize(pipe, CastDtype("bfloat16"), RewriteBlocks(), on_kernels, context=context)


def quick_on_cpu(pipe: Any) -> Any:
    """Let convolutions of a VAE in float16, on a CPU, multiply in float32 and round, in place; return the pipe."""
    for part in pipe.vae.modules():
        if isinstance(part, nn.Conv2d) and part.weight.dtype == torch.float16 and part.weight.device.type == "cpu":
            part.forward = partial(_convolved, part)  # type: ignore[method-assign]
    return pipe


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    bias = None if conv.bias is None else conv.bias.float()
    return conv._conv_forward(x.float(), conv.weight.float(), bias).to(x.dtype)


def compared(load: Callable[[], Any], ways: Sequence[str], prompts: int, **call: Any) -> dict[str, Any]:
    """Draw the same prompts in several ways; print and return how many objects each draws right and keeps of the first.

    Args:
        load: Returns a fresh miniature in float32.
        ways: As in `computed`.
        prompts: How many.
        call: Further arguments of ``judge.verdicts``.
    """
    scenes = [scene for _, scene in unseen_prompts(prompts)]
    columns = f"ratio to {ways[0]}'s | 95 % interval | kept of {ways[0]}'s | 95 % interval | lost | gained"
    print(f"| computed in | objects right | {columns} |")
    print("|---|---|---|---|---|---|---|---|")
    read, record = {}, {}
    for way in ways:
        read[way] = verdicts(computed(load(), way), prompts, **call)
        found, of = summarize(read[way], scenes), kept(read[ways[0]], read[way])
        ratio = f"{of.right_ratio:.2%} | {_text(of.right_ratio_interval)}"
        share = f"{of.share:.2%} | {_text(of.interval)}"
        right = f"{found.object_fraction:.2%} of {found.objects}"
        print(f"| {way} | {right} | {ratio} | {share} | {of.lost} | {of.gained} |", flush=True)
        record[way] = _as_json(found) | {"kept": of.as_json()}
    return {"prompts": prompts, "compared_with": ways[0], "resamples": _RESAMPLES, "ways": record}


def _text(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:.2%} to {interval.high:.2%}"


def _as_json(found: Adherence) -> dict[str, Any]:
    return {
        "objects": found.objects,
        "right": found.object_fraction,
        "pictures_right": found.picture_fraction,
    }


def main() -> None:
    """Measure a miniature from the command line, print the tables, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=MINIATURES, default="ernie-image")
    parser.add_argument("--folder", type=Path, help="of a miniature that is not in the package")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--presets", nargs="*", default=[], help="judge these on this machine, too")
    parser.add_argument(
        "--compare",
        nargs="*",
        metavar="WAY",
        default=[],
        help=f"only compare with the first: {', '.join(WAYS)}, presets",
    )
    parser.add_argument("--batch", type=int, default=16, help="prompts a call")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if (options.architecture == "ernie-image") != (options.folder is None):
        parser.error("--folder goes with every architecture but ernie-image, which is in the package")
    if len(options.compare) == 1:
        parser.error("--compare takes two ways to compute, or more")
    miniature = MINIATURES[options.architecture]
    call = {
        "steps": 8 if miniature.has_enhancer else 9,
        "guidance_scale": miniature.guidance_scale,
        "batch_size": options.batch,
    }

    def load() -> Any:
        pipe: Any = (
            ernie_accel.demo.load(prompt_enhancer=False)
            if options.folder is None
            else miniatures.load(options.folder, options.architecture)
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(options.device)

    if options.compare:
        found = {"compared": compared(load, options.compare, options.prompts, **call)}
    else:
        found = _everything(load, options.prompts, options.presets, call)
    if options.out is not None:
        record = {
            "command": shlex.join(["python", "-m", "tools.embedded_model.sensitivity", *sys.argv[1:]]),
            "device": options.device,
            "torch": torch.__version__,
            **{name: version for name, version in Context.detect().versions.items() if name in _LIBRARIES},
            "architecture": options.architecture,
            **found,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _everything(load: Callable[[], Any], prompts: int, presets: list[str], call: dict[str, Any]) -> dict[str, Any]:
    errors = layer_errors_db(load(), call["steps"], call["guidance_scale"])
    precise = kept_precise(load())
    print("| layers | worst, dB | which | kept precise by the family |\n|---|---|---|---|")
    for kind, (error, path) in by_kind(errors).items():
        print(f"| `{kind}` | {error:.1f} | `{path}` | {'yes' if path in precise else ''} |", flush=True)
    results = judged(load, prompts, **call)
    for preset in presets:
        results[preset] = adherence(computed(load(), preset), prompts, **call)
    print("\n| computed in | objects right | 95 % interval | pictures right |\n|---|---|---|---|")
    for name, found in results.items():
        low, high = wilson(found.object_fraction, found.objects)
        shares = (
            f"{found.object_fraction:.2%} of {found.objects} | {low:.2%} to {high:.2%} | {found.picture_fraction:.1%}"
        )
        print(f"| {name} | {shares} |", flush=True)
    return {"layer_errors_db": errors, "adherence": {name: _as_json(each) for name, each in results.items()}}


if __name__ == "__main__":
    main()

"""Draw many pictures of changing sizes, prompts and batch sizes under a memory cap: memory must stay flat.

``python benchmarks/long_run.py --size full --cap 16 --pictures 1000`` on a GPU: the full-size pipeline with random
weights, placed as ``memory=`` plans it. Flat: what the device holds between calls, its reserve, and the host's memory
grow by no more than 2 % after the first 50 pictures.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
#: What a process cannot have of a card: the driver's share, and the desktop's.
TAKEN_GIB = 0.7
#: Pictures until everything that is kept between calls is there.
WARM = 50
#: How much memory may grow afterwards.
GROWTH = 0.02
#: (width, height) of the pictures; batches are as large as the largest of them allows for the memory planned.
SIZES = {
    "full": ((1024, 1024), (848, 1264), (1264, 848), (512, 512), (768, 1024), (1024, 768), (640, 640), (896, 1152)),
    "tiny": ((64, 64), (32, 64), (64, 32), (96, 64), (48, 48), (80, 64), (64, 80), (32, 32)),
}
#: Pixels that are drawn at once at most: two pictures of 1024x1024.
MOST_PIXELS = {"full": 2 * 1024 * 1024, "tiny": 3 * 64 * 64}
TOKENS = {"full": 300, "tiny": 40}


@dataclass(frozen=True)
class Sample:
    """What was held after some pictures.

    Attributes:
        pictures: How many had been drawn.
        host_bytes: Memory of its own that the process has.
        device_bytes: Of the device, in use between calls.
        reserved_bytes: Of the device, held by torch's allocator.
        peak_bytes: Of the device, in use at most since the start.
    """

    pictures: int
    host_bytes: int
    device_bytes: int = 0
    reserved_bytes: int = 0
    peak_bytes: int = 0


def calls(size: str, pictures: int, seed: int = 0) -> Iterator[tuple[int, int, list[str]]]:
    """Yield width, height and prompts of one call after the other, so many pictures in all.

    All sizes, with all batches that are drawn of them, come within the first `WARM`.
    """
    chance = random.Random(seed)
    drawn = 0
    while drawn < pictures:
        for width, height in chance.sample(SIZES[size], len(SIZES[size])):
            most = max(1, min(3, MOST_PIXELS[size] // (width * height)))
            count = min(chance.randint(1, most) if drawn >= WARM else most, pictures - drawn)
            if count:
                yield width, height, [_prompt(chance, TOKENS[size]) for _ in range(count)]
            drawn += count


def _prompt(chance: random.Random, most: int) -> str:
    return " ".join(f"w{chance.randint(4, 59)}" for _ in range(chance.randint(1, most)))


def draw(
    pipe: Any, size: str, pictures: int, every: int = 10, steps: int = 2, collect: bool = True, **more: Any
) -> Iterator[Sample]:
    """Draw pictures, and yield what is held after every few of them; with `collect`, once cycles were collected."""
    drawn = noted = 0
    for width, height, prompts in calls(size, pictures):
        generator = torch.Generator().manual_seed(drawn)
        options = {"num_inference_steps": steps, "guidance_scale": 1.0, "generator": generator, "output_type": "pt"}
        pipe(prompts, width=width, height=height, **options | more)
        drawn += len(prompts)
        if drawn - noted >= every or drawn == pictures:
            noted = drawn
            if collect:
                gc.collect()
            yield sample(drawn)


def sample(drawn: int) -> Sample:
    """Return what is held now."""
    if not torch.cuda.is_available():
        return Sample(drawn, _host_bytes())
    device = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated()
    return Sample(drawn, _host_bytes(), *device)


def _host_bytes() -> int:
    """Return the memory of its own that this process has, as Linux counts it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def growth(samples: Sequence[Sample], of: Callable[[Sample], int], warm: int = WARM) -> float:
    """Return by which part memory grew: the most in the last quarter, against the most until soon after `warm`.

    "Soon" is as many pictures again, so that all sizes and batches have come; the last quarter, so that what comes and
    goes counts for nothing.
    """
    pictures = samples[-1].pictures
    first = [of(each) for each in samples if each.pictures <= 2 * warm]
    last = [of(each) for each in samples if each.pictures > pictures * 3 // 4]
    return max(last) / max(first) - 1 if first and max(first) else 0.0


def judge(samples: Sequence[Sample], warm: int = WARM) -> dict[str, float]:
    """Return the growth of each kind of memory."""
    return {
        "host": growth(samples, lambda each: each.host_bytes, warm),
        "device in use": growth(samples, lambda each: each.device_bytes, warm),
        "device reserved": growth(samples, lambda each: each.reserved_bytes, warm),
    }


def _pipe(arguments: argparse.Namespace) -> Any:
    """Return the pipeline, placed within the cap."""
    from ladder_parts import add_enhancer
    from random_pipeline import random_pipeline

    import ernie_accel
    from ernie_accel import Call

    on_cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_cuda else torch.float32
    pipe = random_pipeline(arguments.size, "cuda" if on_cuda else "cpu", dtype)
    if arguments.enhancer:
        add_enhancer(pipe, arguments.size)
    pipe.to("cpu")
    if not on_cuda:
        return ernie_accel.optimize(pipe, preset="turbo-fp32", on_unsupported="skip")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    usable = int((arguments.cap - TAKEN_GIB) * GIB)
    torch.cuda.set_per_process_memory_fraction(usable / torch.cuda.get_device_properties(0).total_memory)
    call = Call(1024, 1024, pictures=2, prompt_tokens=TOKENS[arguments.size] + 64)
    ernie_accel.optimize(pipe, preset=arguments.preset, memory=usable, call=call)
    print(ernie_accel.report(pipe))
    return pipe


def main() -> None:
    """Draw, save what was held, and print a table; the exit code is 1 if memory grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2, help="of each picture: memory does not depend on it")
    parser.add_argument("--cap", type=float, default=16, help="GiB of the card that is imitated; needs CUDA")
    parser.add_argument("--preset", default="turbo-fp8")
    parser.add_argument("--enhancer", action="store_true", help="with prompt enhancer, asked for every call")
    parser.add_argument("--save", type=Path, help="JSON file for what was held")
    arguments = parser.parse_args()
    pipe = _pipe(arguments)
    pipe.set_progress_bar_config(disable=True)
    start, samples = time.perf_counter(), []
    more = {"use_pe": arguments.enhancer} if pipe.components.get("pe") is not None else {}
    for each in draw(pipe, arguments.size, arguments.pictures, steps=arguments.steps, **more):
        samples.append(each)
        if len(samples) % 10 == 0:
            print(json.dumps(asdict(each)), flush=True)
    found = judge(samples)
    if arguments.save is not None:
        facts = {"arguments": {name: str(value) for name, value in vars(arguments).items()}, "growth": found}
        facts |= {"seconds": time.perf_counter() - start, "samples": [asdict(each) for each in samples]}
        arguments.save.write_text(json.dumps(facts, indent=1))
    print(f"{samples[-1].pictures} pictures in {time.perf_counter() - start:.0f} s")
    print("| memory | growth after the first pictures | at most |\n|---|---|---|")
    for name, part in found.items():
        print(f"| {name} | {part:+.2%} | {GROWTH:.0%} |")
    raise SystemExit(int(any(part > GROWTH for part in found.values())))


if __name__ == "__main__":
    main()

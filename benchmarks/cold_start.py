"""From process start to the first picture: the original loaded, quantized and compiled, vs a folder of `save`.

``python benchmarks/cold_start.py --size full --folder /scratch`` on a GPU: 24 GB of random bfloat16 weights without
prompt enhancer, and some 13 GB saved. Each figure is of a fresh process. Each kind is measured twice: with empty caches
of compiled code (Inductor's and Triton's), then, unless ``--first-only``, with those that its first process left, as a
user's second process finds them. The files are in the system's cache, unless ``--cold`` drops them from there first
(Linux; files that nobody has mapped). Modules have bytecode, as installers leave it: where the packages have none, that
of all modules is written to the folder before anything is timed.

    stock   diffusers' from_pretrained, .to(device), Quantize("fp8"), Compile()
    preset  ernie_accel.load(original, preset="turbo-fp8")
    saved   ernie_accel.load(folder that save wrote of it)

On the CPU: stock is Quantize("int8-weight-only") and Compile(), preset is the former alone.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.util
import json
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

GB = 10**9
KINDS = ("stock", "preset", "saved")
#: Pixels of a side.
PIXELS = {"full": 1024, "tiny": 64}
#: What the folder may take.
MOST_BYTES = 40 * GB
STEPS = 8
#: Where compiled code is kept between processes.
_CODE = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
#: What is in these caches when a process starts.
CACHES = {"runs": "empty", "again": "of the process before"}
#: Packages that show whether the environment has bytecode.
_LARGE = ("torch", "diffusers", "transformers")


# ---- in processes of their own ---------------------------------------------------------------------------------------


def make(folder: Path, size: str, device: str) -> dict[str, Any]:
    """Write the original, component by component in diffusers' layout, and what `save` makes of it; or find them."""
    import torch
    from random_pipeline import random_pipeline

    import ernie_accel
    from ernie_accel.storage.manifest import MANIFEST

    start = time.perf_counter()
    original = folder / "original"
    if not (original / "model_index.json").is_file():
        pipe = random_pipeline(size, device, torch.bfloat16)
        pipe.save_pretrained(folder / "unfinished")
        (folder / "unfinished").rename(original)
        del pipe
        if device != "cpu":
            torch.cuda.empty_cache()
    made = time.perf_counter() - start
    if (folder / "saved" / MANIFEST).is_file():
        return {"found": "in the folder, from an earlier run"}
    pipe = ernie_accel.load(original, *_transforms(device), preset=_preset(device), device=device, dtype="bfloat16")
    start = time.perf_counter()
    ernie_accel.save(pipe, folder / "saved")
    return {"made_s": made, "saved_s": time.perf_counter() - start, "report": str(ernie_accel.report(pipe))}


def measure(
    folder: Path, size: str, device: str, kind: str, began: float, profile: Path | None = None
) -> dict[str, Any]:
    """Draw the first pictures of a fresh process; seconds count from `began`, when it was started.

    With `profile`, write there which functions loading spends its time in (which takes longer then).
    """
    facts: dict[str, Any] = {}
    profiler = cProfile.Profile()

    def note(name: str) -> None:
        if device != "cpu":
            torch.cuda.synchronize()
        facts[f"{name}_s"] = time.time() - began

    import torch
    from random_pipeline import prompt_of

    import ernie_accel

    note("imported")
    if profile is not None:
        profiler.enable()
    if kind == "stock":
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(folder / "original", torch_dtype=torch.bfloat16).to(device)
        note("loaded")
        quantize = ernie_accel.Quantize("int8-weight-only" if device == "cpu" else "fp8", keep_originals=False)
        encoder = [each for each in _transforms(device) if "text_encoder" in each.components]
        ernie_accel.optimize(pipe, quantize, *encoder, ernie_accel.Compile(), memory=None)
        note("optimized")
    elif kind == "preset":
        pipe = ernie_accel.load(
            folder / "original", *_transforms(device), preset=_preset(device), device=device, dtype="bfloat16"
        )
        note("loaded")
    else:
        pipe = ernie_accel.load(folder / "saved", device=device)
        note("loaded")
    profiler.disable()
    if profile is not None:
        with profile.open("w", encoding="utf-8") as file:
            pstats.Stats(profiler, stream=file).sort_stats("cumulative").print_stats(90)
    pipe.set_progress_bar_config(disable=True)
    for name in ("first", "second"):
        image = pipe(
            prompt_of(64),
            height=PIXELS[size],
            width=PIXELS[size],
            num_inference_steps=STEPS if size == "full" else 2,
            guidance_scale=1.0,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
            **({} if pipe.components.get("pe") is None else {"use_pe": False}),
        ).images[0]
        note(name)
    facts["finite"] = bool(torch.isfinite(torch.as_tensor(image)).all())
    if device != "cpu":
        facts["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    facts["host_gib"] = _most_host_bytes() / 2**30
    return facts


def _transforms(device: str) -> tuple[Any, ...]:
    from ernie_accel import Quantize

    encoder = ("text_encoder",)
    if device == "cpu":
        return (Quantize("int8-weight-only"), Quantize("int8-weight-only", components=encoder, keep_originals=False))
    return (Quantize("fp8-weight-only", components=encoder, keep_originals=False),)


def _preset(device: str) -> str | None:
    return None if device == "cpu" else "turbo-fp8"


def _most_host_bytes() -> int:
    """Return the most memory of its own that this process had: without files that were mapped."""
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return sizes.get("RssAnon", 0)


# ---- here ------------------------------------------------------------------------------------------------------------


def bytecode(folder: Path, packages: Iterable[str] = _LARGE) -> tuple[dict[str, str], str]:
    """Return environment variables with which processes find the bytecode of all modules, and where that is, in words.

    It is written to `folder` first, by as many processes as there are cores, if a package has none. Some hosts
    set ``PYTHONDONTWRITEBYTECODE``: there each process would compile thousands of modules anew.
    """
    files = [spec.origin for name in packages if (spec := importlib.util.find_spec(name)) is not None and spec.origin]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    if all(Path(importlib.util.cache_from_source(file)).exists() for file in files):
        return environment, "found with the packages"
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    folders = [path for path in sys.path if Path(path).is_dir()]
    # Packages hold some files for other versions of Python, which fail to compile and are never imported.
    command = [sys.executable, "-m", "compileall", "-qq", "-j", "0", *folders]
    subprocess.run(command, env=environment, check=False)
    return environment, "written to the folder before anything was timed: the packages had none"


def in_a_process(
    arguments: argparse.Namespace, what: str, environment: Mapping[str, str], code: Path
) -> dict[str, Any]:
    """Run this file anew for one piece of work, with compiled code kept in the folder `code`; return what it prints."""
    command = [sys.executable, __file__, "--do", what, "--size", arguments.size, "--device", arguments.device]
    caches = {name: str(code / name) for name in _CODE}
    command += ["--folder", str(arguments.folder), "--began", repr(time.time())]
    if arguments.profile is not None and what == "saved":
        command += ["--profile", str(arguments.profile)]
    done = subprocess.run(
        command, env={**environment, **caches, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def weights(folder: Path) -> list[Path]:
    """Return the files of weights in a folder."""
    return sorted(folder.rglob("*.safetensors"))


def read_rate(files: list[Path]) -> float:
    """Return the GB/s at which one thread reads files from the system's cache or the disk, as ``dd bs=1M`` does."""
    start, total = time.perf_counter(), 0
    block = bytearray(2**20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                total += count
    return total / (time.perf_counter() - start) / GB


def drop_from_cache(files: list[Path]) -> None:
    """Have the system forget what it has read of these files."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all kinds in turns, and return what was found."""
    original, saved = (arguments.folder / name for name in ("original", "saved"))
    environment, where = bytecode(arguments.folder)
    with tempfile.TemporaryDirectory() as code:
        made = in_a_process(arguments, "make", environment, Path(code))
    sizes = {path.name: sum(file.stat().st_size for file in weights(path)) for path in (original, saved)}
    if sum(sizes.values()) > MOST_BYTES:
        raise SystemExit(f"the folders take {sum(sizes.values()) / GB:.1f} GB, more than {MOST_BYTES / GB:.0f}")
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {each: {kind: [] for kind in KINDS} for each in CACHES}
    for _ in range(arguments.rounds):
        for kind in KINDS:
            files = weights(saved if kind == "saved" else original)
            with tempfile.TemporaryDirectory() as code:
                for each, caches in list(CACHES.items())[: 1 if arguments.first_only else None]:
                    if arguments.cold:
                        drop_from_cache(files)
                    else:
                        read_rate(files)
                    facts = in_a_process(arguments, kind, environment, Path(code))
                    runs[each][kind].append(facts)
                    print(f"{kind}, caches of compiled code {caches}:", json.dumps(facts), flush=True)
    if arguments.cold:
        drop_from_cache(weights(saved))
    return {
        "size": arguments.size,
        "device": arguments.device,
        "cache": "cold" if arguments.cold else "warm",
        "versions": {name: version(name) for name in _LARGE},
        "bytes": sizes,
        "read_gb_s": read_rate(weights(saved)),
        "bytecode": where,
        "made": made,
        **runs,
    }


def table(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a table: medians, and how many times as long as a saved pipe takes with the same caches."""

    def median(each: str, kind: str, name: str) -> float:
        return statistics.median(run[name] for run in found[each][kind])

    yield "| | compiled code | first picture | imports | load | GB/s | until the first picture | a picture | vs saved |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for each, caches in CACHES.items():
        for kind in KINDS if found[each][KINDS[0]] else ():
            nbytes = found["bytes"]["saved" if kind == "saved" else "original"]
            first, imported, loaded = (median(each, kind, f"{name}_s") for name in ("first", "imported", "loaded"))
            cells = [kind, caches, f"{first:.1f} s", f"{imported:.1f} s", f"{loaded - imported:.1f} s"]
            cells += [f"{nbytes / (loaded - imported) / GB:.2f}", f"{first - loaded:.1f} s"]
            cells += [f"{median(each, kind, 'second_s') - first:.2f} s"]
            cells += [f"{first / median(each, 'saved', 'first_s'):.1f}x"]
            yield f"| {' | '.join(cells)} |"
    yield (
        f"{found['size']} on {found['device']}, {found['cache']} cache: {found['bytes']['original'] / GB:.2f} GB "
        f"original, {found['bytes']['saved'] / GB:.2f} GB saved; one thread reads {found['read_gb_s']:.1f} GB/s; "
        f"bytecode {found['bytecode']}"
    )


def main() -> None:
    """Measure, save the figures, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(PIXELS), default="tiny")
    parser.add_argument("--folder", type=Path, help="where the pipelines go, and stay; default: a temporary folder")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--first-only", action="store_true", help="measure with empty caches of compiled code only")
    parser.add_argument("--cold", action="store_true", help="drop the files from the system's cache before each run")
    parser.add_argument("--save", type=Path, help="JSON file for the figures; default: in the folder")
    parser.add_argument("--profile", type=Path, help="text file for what loading a saved folder spends its time in")
    parser.add_argument("--do", choices=("make", *KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.do is not None:
        place = (arguments.folder, arguments.size, arguments.device)
        if arguments.do == "make":
            done = make(*place)
        else:
            done = measure(*place, arguments.do, arguments.began, arguments.profile)
        print(json.dumps(done))
        return
    if arguments.device is None:
        import torch

        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    temporary = arguments.folder is None
    arguments.folder = arguments.folder or Path(tempfile.mkdtemp(prefix="cold-start-"))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        found = compare(arguments)
        file = arguments.save or (Path("cold_start.json") if temporary else arguments.folder / "cold_start.json")
        file.write_text(json.dumps(found, indent=1))
        print("\n".join(table(found)))
    finally:
        if temporary:
            shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()

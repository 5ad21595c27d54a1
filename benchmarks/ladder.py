"""Measure what each technique adds, on the full-size model with random weights; a fresh process for everything.

    python benchmarks/ladder.py              # all rungs at 1024, 512 and 256 px on the GPU; tiny on a CPU
    python benchmarks/ladder.py --sweep      # batches 1 to 8 and sizes of pictures
    python benchmarks/ladder.py --peers      # other libraries, where they are installed
    python benchmarks/ladder.py --parts      # the parts beside the denoiser, each alone
    python benchmarks/ladder.py --family z-image   # or newbie: stock, compiled, fp8 by torchao, the presets
    python benchmarks/ladder.py --fits       # on cards of 24, 16, 12 and 8 GB: this one, with its memory capped
    python benchmarks/ladder.py --only stock,turbo-fp8 --save benchmarks/results/ladder_h200_202611
    python benchmarks/ladder.py --tables benchmarks/results/ladder_h200_202611.json

ms/step is the median over steps run back to back (the card throttles when it is busy, so a burst is no result). The
first picture includes optimizing and compiling, with no compiled code on disk, or in a rung named "again" with what
the rung before it left there. SQNR is against float32 with the same weights and inputs. The roofline is the time of the
products and the attention alone at the rates this card sustained in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ladder_families import MEASURED, make_family_reference, measure_family
from ladder_families import PIXELS as FAMILY_PIXELS
from ladder_fits import FITTED, fit_rung
from ladder_measures import CUDA, PIXELS, Job, make_reference
from ladder_parts import PARTS, measure_part
from ladder_peers import PEERS, measure_peer
from ladder_rungs import RUNGS, measure_rung
from ladder_sweep import SWEPT, sweep_rung
from ladder_tables import plot, tables, text_of

#: Ends a name that is measured with the compiled code its namesake left on disk.
AGAIN = " again"
REFERENCE = "reference"


@dataclass(frozen=True)
class Section:
    """A part of the benchmark that runs on its own.

    Attributes:
        names: What it measures where nothing is chosen.
        measure: Measures one of them in a process of its own.
        needs_reference: Compare to float32 and to the ceilings of the card, which takes a process before the first.
        reference: What that process does; it returns the ceilings.
        pixels: Squares that it measures, by size.
    """

    names: tuple[str, ...]
    measure: Callable[[str, Job], dict[str, Any]]
    needs_reference: bool = True
    reference: Callable[[Job], dict[str, float]] = make_reference
    pixels: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: PIXELS)


SECTIONS = {
    "ladder": Section((*RUNGS, *(name + AGAIN for name in ("turbo-fp8", "rewrite+compile cache"))), measure_rung),
    "sweep": Section(SWEPT, sweep_rung, needs_reference=False),
    "peers": Section(tuple(PEERS), measure_peer),
    "fits": Section(tuple(FITTED), fit_rung, needs_reference=False),
    "parts": Section(tuple(PARTS), measure_part, needs_reference=False),
    **{
        name: Section(
            tuple(family.rungs),
            partial(measure_family, name),
            reference=partial(make_family_reference, name),
            pixels=FAMILY_PIXELS,
        )
        for name, family in MEASURED.items()
    },
}


def main() -> None:
    arguments = parse()
    if arguments.tables:
        for file in arguments.tables:
            print(tables({"section": "ladder"} | json.loads(file.read_text())), end="\n\n")
        return
    if arguments.worker:
        print(json.dumps(work(arguments)))
        return
    names = chosen(arguments)
    options = {"--size": arguments.size, "--only": ",".join(names), "--seconds": f"{arguments.seconds:.0f}"}
    switch = ["--family", arguments.section] if arguments.section in MEASURED else [f"--{arguments.section}"]
    switches = switch * (arguments.section != "ladder") + ["--profile"] * arguments.profile
    words = [word for option in options.items() for word in option]
    result: dict[str, Any] = {
        "section": arguments.section,
        "device": torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU",
        "command": shlex.join(["python", "benchmarks/ladder.py", *switches, *words]),
        "commit": arguments.commit or os.environ.get("COMMIT") or commit(),
        "versions": versions(),
        "pixels": SECTIONS[arguments.section].pixels[arguments.size],
        "ceilings": {},
        "rungs": [],
    }
    measure_all(names, arguments, result)
    if arguments.save:
        save(result, arguments.save, draw=True)
    print(tables(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    others = tuple(MEASURED)
    which.add_argument("--family", dest="section", choices=others, default="ladder", help="another than ERNIE-Image")
    for name in [name for name in SECTIONS if name != "ladder" and name not in MEASURED]:
        which.add_argument(f"--{name}", dest="section", action="store_const", const=name, default="ladder")
    which.add_argument("--tables", type=Path, nargs="+", metavar="JSON", help="print the tables of earlier results")
    parser.add_argument("--size", choices=tuple(PIXELS), default="full" if CUDA else "tiny")
    parser.add_argument("--only", help="comma-separated names of the section")
    parser.add_argument("--save", type=Path, help="path without suffix for .json, .md and .svg")
    parser.add_argument("--seconds", type=float, default=240, help="start nothing more after this time")
    parser.add_argument("--profile", action="store_true", help="add the kernels that take longest")
    parser.add_argument("--commit", help="the commit that is measured; default: $COMMIT, else asked of git")
    parser.add_argument("--section", dest="section", choices=tuple(SECTIONS), help=argparse.SUPPRESS)
    for hidden in ("--worker", "--folder", "--cache"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(arguments: argparse.Namespace) -> list[str]:
    """Return the names to measure; exits where one is unknown."""
    section = SECTIONS[arguments.section]
    names = arguments.only.split(",") if arguments.only else list(section.names)
    known = {name.removesuffix(AGAIN) for name in section.names}
    unknown = sorted({name.removesuffix(AGAIN) for name in names} - known)
    if unknown:
        sys.exit(f"unknown in {arguments.section}: {', '.join(unknown)}. Known: {', '.join(section.names)}")
    return names


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one thing in this process; what it raises becomes its row."""
    job = Job(arguments.size, Path(arguments.folder), Path(arguments.cache), arguments.profile)
    try:
        if arguments.worker == REFERENCE:
            return dict(SECTIONS[arguments.section].reference(job))
        return SECTIONS[arguments.section].measure(arguments.worker, job)
    except Exception as error:  # a recipe that fails is a result, too
        import traceback

        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"[:400]}


def measure_all(names: list[str], arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fill in the result, one process after the other, and save it after each, for what interrupts."""
    end = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        common = ["--section", arguments.section, "--size", arguments.size, "--folder", temporary]
        common += ["--profile"] * arguments.profile
        if SECTIONS[arguments.section].needs_reference:
            rates = run([*common, "--worker", REFERENCE, "--cache", temporary], folder / REFERENCE, arguments.seconds)
            if "error" in rates:
                sys.exit(f"no reference: {rates['error']}")
            result["ceilings"] = rates
        for name in names:
            left = end - time.monotonic()
            base = name.removesuffix(AGAIN)
            kept = folder / "kept" / file_name(base)
            # What has a folder of its own must find nothing elsewhere; the others keep what torch and Triton keep.
            compiled = folder / "compiled" / file_name(name if base.endswith(" cache") else base)
            row: dict[str, Any] = {"error": f"not started: {arguments.seconds:.0f} s were over"}
            if left > 0:
                command = [*common, "--worker", base, "--cache", str(kept)]
                row = run(command, compiled, max(60.0, left + 60))
            result["rungs"].append({"rung": name} | row)
            print(json.dumps(result["rungs"][-1]), file=sys.stderr, flush=True)
            if arguments.save:
                save(result, arguments.save)


def file_name(name: str) -> str:
    """Return a name without what a C++ compiler's command line takes for something else."""
    return re.sub(r"[^\w+-]", "_", name)


def run(arguments: list[str], compiled: Path, timeout: float) -> dict[str, Any]:
    """Run this script in a process of its own, with its compiled code in `compiled`; return its row."""
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"), "TRITON_CACHE_DIR": str(compiled / "triton")}
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | folders, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {timeout:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"error": f"exit status {done.returncode}: {(done.stderr.splitlines() or ['no message'])[-1][:200]}"}
    row: dict[str, Any] = json.loads(lines[-1])
    if "error" in row:
        print(done.stderr[-3000:], file=sys.stderr)
    return row


def save(result: dict[str, Any], stem: Path, *, draw: bool = False) -> None:
    """Write the result as JSON, markdown and, where asked and matplotlib is installed, a plot."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text_of(result))
    if not draw or all("error" in row for row in result["rungs"]):
        return
    try:
        from matplotlib import rc_context

        figure = plot(result)
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    with rc_context({"svg.hashsalt": "ladder", "svg.fonttype": "none"}):  # the same figures give the same bytes
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    packages = ("torch", "triton", "diffusers", "transformers", "torchao", "nvidia-cudnn-frontend")
    for package in (*packages, "sdnq", "optimum-quanto", "bitsandbytes", "cache-dit"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if CUDA and shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
        found |= {"cuda": str(torch.version.cuda)} | ({"driver": driver[0]} if driver else {})
    return found


if __name__ == "__main__":
    main()

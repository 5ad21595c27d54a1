"""Run diffusers' own pipeline tests on stock pipelines and on optimized ones, and say which are lost.

``python -m tools.diffusers_tests PATH``, with PATH a checkout of huggingface/diffusers. Each file of tests runs once on
stock pipelines; the tests that pass there run again for each request, on pipelines passed through `optimize`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .hub import write_cache
from .request import parse
from .table import as_table, counts_of, write_into

_HERE = Path(__file__).resolve().parent
#: Beside the files that pytest would find by itself: what stands above the pipelines.
_PIPELINES = "tests/pipelines"


def main(arguments: list[str] | None = None) -> int:
    """Run the tests and return 1 if `optimize` lost one, else 0."""
    options = _parser().parse_args(arguments)
    checkout: Path = options.path.resolve()
    if not (checkout / _PIPELINES).is_dir():
        raise SystemExit(f"{options.path} is no checkout of huggingface/diffusers: it has no folder {_PIPELINES}")
    requests: list[str] = options.optimize or ["exact"]
    for request in requests:
        try:
            parse(request)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    files = list(_files(checkout, options.only))
    if not files:
        raise SystemExit(f"no file in {checkout / _PIPELINES} has one of {options.only} in its path")
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not options.download:
        write_cache(work / "hub")
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(work / "hub")}
    paths = [str(_HERE.parent), str(_HERE.parent.parent / "src"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    run = _Runner(checkout, work, environment, options.numprocesses)
    stock = run("stock", None, files)
    passed = [each["test"] for each in stock if each["outcome"] == "passed"]
    (work / "passed.txt").write_text("\n".join(passed))
    kept = sorted({test.split("::")[0] for test in passed})
    results = {request: run(_slug(request), request, kept, only=work / "passed.txt") for request in requests}
    counts = counts_of(stock, results) | ({"note": options.note} if options.note else {})
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(counts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(as_table(counts))
    if options.page is not None:
        write_into(options.page, counts)
    return int(any(row["lost"] for row in counts["rows"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.diffusers_tests", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="a checkout of huggingface/diffusers, of the installed version or near")
    parser.add_argument(
        "--optimize",
        action="append",
        help="a preset, or transforms as a plan prints them: \"SwapScheduler('unipc')\"; may be repeated "
        "(default: exact)",
    )
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="PART", help="only files with one of these in the path"
    )
    parser.add_argument("-n", "--numprocesses", default="2", help="how many processes of tests (default: 2)")
    parser.add_argument("--work", type=Path, default=Path("build/diffusers_tests"), help="folder for raw results")
    parser.add_argument("--json", type=Path, default=Path("build/diffusers_tests/counts.json"), help="the counts")
    parser.add_argument("--page", type=Path, default=None, help="also write the table into this page, below its marker")
    parser.add_argument("--note", default="", help="a sentence on this run for the page, as on its machine")
    parser.add_argument("--download", action="store_true", help="take tiny models from the hub, not their stand-ins")
    return parser


def _files(checkout: Path, parts: Iterable[str]) -> Iterator[str]:
    parts = tuple(parts)
    for path in sorted((checkout / _PIPELINES).glob("*/test_*.py")):
        name = path.relative_to(checkout).as_posix()
        if not parts or any(part in name for part in parts):
            yield name


def _slug(request: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in request).strip("_")


class _Runner:
    """Runs pytest in the checkout, in processes of its own: what one request did to a class must not meet the next."""

    def __init__(self, checkout: Path, work: Path, environment: dict[str, str], processes: str) -> None:
        self._checkout, self._work, self._environment, self._processes = checkout, work, environment, processes

    def __call__(
        self, name: str, request: str | None, files: list[str], only: Path | None = None
    ) -> list[dict[str, Any]]:
        if not files:
            return []
        results = self._work / f"{name}.jsonl"
        results.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-p", "diffusers_tests.plugin", "-p", "no:cacheprovider"]
        command += ["--results", str(results), "-q", "--tb=no", "--no-header", "--disable-warnings"]
        command += ["--continue-on-collection-errors"]
        command += ["-n", self._processes, "--dist=worksteal"]
        command += ["--optimize", request] if request is not None else []
        command += ["--only", str(only)] if only is not None else []
        print(f"{name}: {len(files)} files", flush=True)
        with (self._work / f"{name}.log").open("w") as log:
            done = subprocess.run(
                [*command, *files], cwd=self._checkout, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        # 0: all passed; 1: some failed; 2: some files cannot be imported, which --continue-on-collection-errors skips
        if done.returncode not in (0, 1, 2, 5) or not results.exists():
            raise SystemExit(f"pytest ended with {done.returncode}; its output is in {self._work / name}.log")
        return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    raise SystemExit(main())

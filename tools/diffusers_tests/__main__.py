"""Run diffusers' own pipeline tests on stock pipelines and on optimized ones, and say which are lost.

``python -m tools.diffusers_tests PATH``, with PATH a checkout of huggingface/diffusers. Each file of tests runs once on
stock pipelines; the tests that pass there run again for each request, on pipelines passed through `optimize`. Without
further arguments that is what the documentation counts (selection.py), and the counts are written there. A run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .hub import write_cache
from .request import parse
from .selection import FILES, SAMPLE, SAMPLE_REQUESTS
from .table import as_table, counts_of, versions, write_into

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
#: Beside the files that pytest would find by itself: what stands above the pipelines.
_PIPELINES = "tests/pipelines"


def main(arguments: list[str] | None = None) -> int:
    """Run the tests and return 1 if `optimize` lost one, else 0."""
    options = _parser().parse_args(arguments)
    checkout: Path = options.path.resolve()
    if not (checkout / _PIPELINES).is_dir():
        raise SystemExit(f"{options.path} is no checkout of huggingface/diffusers: it has no folder {_PIPELINES}")
    documented = not (options.optimize or options.only or options.all)
    requests: list[str] = options.optimize or ["exact", *(SAMPLE_REQUESTS if documented else ())]
    for request in requests:
        try:
            parse(request)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    files = list(_files(checkout, options.only or (() if options.all else FILES)))
    if not files:
        raise SystemExit(f"no file in {checkout / _PIPELINES} has one of {options.only or FILES} in its path")
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not options.so_far:
        _go_on(work, fresh=options.fresh)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not options.download:
        write_cache(work / "hub")
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(work / "hub")}
    paths = [str(_HERE.parent), str(_ROOT / "src"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    run = _Runner(checkout, work, environment, "" if options.so_far else options.numprocesses)
    stock = run("stock", None, files)
    passed = [each["test"] for each in stock if each["outcome"] == "passed"]
    sampled = [each for each in passed if any(part in each.split("::")[0] for part in SAMPLE)]
    wanted = {request: sampled if documented and request in SAMPLE_REQUESTS else passed for request in requests}
    results = {request: run(_slug(request), request, files, tests) for request, tests in wanted.items()}
    if options.so_far:
        wanted = {request: [each["test"] for each in records] for request, records in results.items()}
    counts = counts_of(stock, results, wanted, _source(checkout)) | {"not_reached": _not_reached(passed, wanted)}
    written = options.json or (_HERE if documented else work) / "counts.json"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(json.dumps(counts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(as_table(counts))
    page = options.page or (_ROOT / "docs" / "lifecycle.md" if documented else None)
    if page is not None:
        write_into(page, counts)
    if not options.so_far:
        (work / _FINISHED).touch()
    return int(any(row["lost"] for row in counts["rows"]))


def _not_reached(passed: list[str], wanted: dict[str, list[str]]) -> int:
    """Return how many tests that pass on stock `exact`, or whatever was asked first, has not reached."""
    return len(passed) - len(next(iter(wanted.values()), ()))


def _source(checkout: Path) -> str:
    """Return the version that the checkout names, as "diffusers 0.40.0"."""
    setup = checkout / "setup.py"
    found = re.search(r'version="([^"]+)"', setup.read_text(encoding="utf-8")) if setup.exists() else None
    return f"diffusers {found[1]}" if found else ""


#: In the folder of raw results: which versions they are of, and that they are complete.
_VERSIONS, _FINISHED = "versions.json", "finished"


def _go_on(work: Path, *, fresh: bool) -> None:
    """Keep the results of a run that was stopped; remove those of one that ended."""
    if fresh or (work / _FINISHED).exists():
        for each in (*work.glob("*.jsonl"), work / _FINISHED, work / _VERSIONS):
            each.unlink(missing_ok=True)
    now, kept = versions(), work / _VERSIONS
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else now
    if before != now:
        raise SystemExit(f"{work} has the results of a stopped run with {before}; this is {now}. Start anew: --fresh")
    kept.write_text(json.dumps(now), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.diffusers_tests", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="a checkout of huggingface/diffusers, of the installed version or near")
    parser.add_argument(
        "--optimize",
        action="append",
        help="a preset, or transforms as a plan prints them: \"SwapScheduler('unipc')\"; may be repeated "
        "(default: exact)",
    )
    parser.add_argument("--all", action="store_true", help="all files of pipeline tests, not those of selection.py")
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="PART", help="only files with one of these in the path"
    )
    parser.add_argument("-n", "--numprocesses", default="2", help="how many processes of tests (default: 2)")
    parser.add_argument("--work", type=Path, default=Path("build/diffusers_tests"), help="folder for raw results")
    parser.add_argument("--fresh", action="store_true", help="start anew, even if a run before was stopped")
    parser.add_argument("--so-far", action="store_true", help="run nothing; count what a stopped run has reached")
    parser.add_argument("--json", type=Path, help="the counts (default: in this tool, or in --work for part of them)")
    parser.add_argument("--page", type=Path, help="the page whose table is written, below its marker")
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
        self, name: str, request: str | None, files: list[str], only: list[str] | None = None
    ) -> list[dict[str, Any]]:
        """Run the tests of `files`, or only those named, that have no record yet; return all records.

        Without processes (""), nothing runs.
        """
        results, skipped = self._work / f"{name}.jsonl", self._work / f"{name}.skip.txt"
        before = _records(results)
        done = {each["test"] for each in before}
        command = [sys.executable, "-m", "pytest", "-p", "diffusers_tests.plugin", "-p", "no:cacheprovider"]
        command += ["--results", str(results), "-q", "--tb=no", "--no-header", "--disable-warnings"]
        command += ["--continue-on-collection-errors"]
        command += ["-n", self._processes, "--dist=worksteal"]
        command += ["--optimize", request] if request is not None else []
        if only is not None:
            left = [test for test in only if test not in done]
            files = sorted({test.split("::")[0] for test in left})
            (self._work / f"{name}.only.txt").write_text("\n".join(left), encoding="utf-8")
            command += ["--only", str(self._work / f"{name}.only.txt")]
        if done:
            skipped.write_text("\n".join(sorted(done)), encoding="utf-8")
            command += ["--skip", str(skipped)]
        files = [file for file in files if file not in done]  # a file that cannot be imported is its own record
        print(f"{name}: {len(files)} files, {len(done)} tests done before", flush=True)
        if files and self._processes:
            with (self._work / f"{name}.log").open("w") as log:
                ended = subprocess.run(
                    [*command, *files], cwd=self._checkout, env=self._environment, stdout=log, stderr=subprocess.STDOUT
                )
            # 0: all passed; 1: some failed; 2: some cannot be imported, but the others ran; 5: none was left
            if ended.returncode not in (0, 1, 2, 5):
                raise SystemExit(f"pytest ended with {ended.returncode}; its output is in {self._work / name}.log")
        return _records(results)


def _records(results: Path) -> list[dict[str, Any]]:
    """Return the records of a run, without a last line that a stop has cut off, which goes from the file, too."""
    if not results.exists():
        return []
    text = results.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        results.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


if __name__ == "__main__":
    raise SystemExit(main())

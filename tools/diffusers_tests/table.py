"""The counts of a run: by pipeline file and request, as data and as a table for the documentation."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

MARKER = "<!-- diffusers -->"

_HEADING = "## Diffusers' own tests"
_CHART = "![Diffusers' own tests: how many that pass on stock pass with each request](images/diffusers_tests.svg)"
_EXPLANATION = """\
`nox -s diffusers -- PATH` runs the pipeline tests of diffusers from a checkout of it, each on a stock pipeline and on
one that was passed through `optimize` when it was made. A test that passes on stock only is lost. "With a changed pipe"
counts the tests in which the request changed a pipe; elsewhere it had nothing to do, or its plan refused. Tiny models
that the tests download are replaced by stand-ins, random weights of the same classes, which `--download` turns off.
Their tokenizers count letters, so `TruncatePrompts(16)` cuts most prompts: what compares a cut prompt with whole
embeddings, or expects the warning of a pipeline that cuts prompts itself, is lost by what the request means. With
`TruncatePrompts(77)` such embeddings are equal."""


def versions() -> dict[str, str]:
    """Return the versions that the counts are of."""
    return {name: version(name) for name in ("ernie-accel", "diffusers", "transformers", "peft", "torch")}


def counts_of(
    stock: list[dict[str, Any]],
    results: dict[str, list[dict[str, Any]]],
    wanted: dict[str, list[str]] | None = None,
    source: str = "",
) -> dict[str, Any]:
    """Return the counts by file and request.

    Args:
        stock: One record for each test, as the plugin writes them, of the run without a request.
        results: The same for each request, of the tests that passed on stock.
        wanted: Which of these tests each request was to run; default all of them.
        source: What the tests are of, as "diffusers 0.40.0".

    Returns:
        ``stock``: by file, how many tests passed, failed, need a download or were skipped ("not collected": the file
        cannot be imported). ``rows``: by file and request, how many of those that passed on stock were changed by the
        request, passed on both, and the lost ones.
    """
    files: dict[str, Counter[str]] = defaultdict(Counter)
    for each in stock:
        files[_file(each)][_outcome(each)] += 1
    passed = {each["test"] for each in stock if each["outcome"] == "passed"}
    rows = []
    for request, records in results.items():
        ended = {each["test"]: each for each in records}
        asked = passed if wanted is None else set(wanted[request])
        for file in sorted({test.split("::")[0] for test in asked}):
            tests = sorted(test for test in asked if test.split("::")[0] == file)
            # A test without a record was never reached: its process died.
            lost = {
                test: ended.get(test, {}).get("reason", "did not end")
                for test in tests
                if ended.get(test, {}).get("outcome") != "passed"
            }
            rows.append(
                {
                    "file": file,
                    "request": request,
                    "passed_on_stock": len(tests),
                    "optimized": sum(bool(ended.get(test, {}).get("pipes")) for test in tests),
                    "changed": sum(bool(ended.get(test, {}).get("changed")) for test in tests),
                    "passed_on_both": len(tests) - len(lost),
                    "lost": lost,
                }
            )
    return {
        "tests_of": source,
        "versions": versions(),
        "stock": {file: dict(counter) for file, counter in sorted(files.items())},
        "requests": list(results),
        "rows": rows,
    }


def as_table(counts: dict[str, Any]) -> str:
    """Return the counts as a Markdown table, one line for each file and request that has tests."""
    lines = [
        "| tests | request | pass on stock | with a changed pipe | pass on both | lost |",
        "|---|---|--:|--:|--:|--:|",
    ]
    sums: dict[str, Counter[str]] = {}
    for row in counts["rows"]:
        numbers = Counter({name: row[name] for name in ("passed_on_stock", "changed", "passed_on_both")})
        numbers["lost"] = len(row["lost"])
        numbers["files"] = 1
        sums.setdefault(row["request"], Counter()).update(numbers)
        lines.append(_line(_short(row["file"]), row["request"], numbers))
    for request, numbers in sums.items():
        lines.append(_line(f"**{numbers['files']} files**", request, numbers))
    return "\n".join(lines)


def _line(name: str, request: str, numbers: Counter[str]) -> str:
    cells = (numbers["passed_on_stock"], numbers["changed"], numbers["passed_on_both"], numbers["lost"])
    return f"| {name} | `{request}` | {' | '.join(map(str, cells))} |"


def write_into(page: Path, counts: dict[str, Any]) -> None:
    """Replace what follows the marker of `page` by the table; a page that does not exist is made."""
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    head = before.split(MARKER)[0].rstrip()
    page.write_text(f"{head}\n\n{MARKER}\n\n{section(counts)}".lstrip(), encoding="utf-8")


def section(counts: dict[str, Any]) -> str:
    """Return the section of the page: what the columns say, what was not run, and the table."""
    ended: Counter[str] = Counter()
    for numbers in counts["stock"].values():
        ended.update(numbers)
    shown = ", ".join(f"{name} {number}" for name, number in counts["versions"].items())
    stock = ", ".join(f"{number} {outcome}" for outcome, number in ended.most_common())
    source = (
        f"The tests are of {counts['tests_of']}, {len(counts['stock'])} files of them." if counts["tests_of"] else ""
    )
    prose = f"{source} On stock pipelines: {stock} ({shown})."
    if counts.get("not_reached"):
        prose += f" The run was stopped: {counts['not_reached']} of the tests that pass on stock were not reached."
        idle = [f"`{name}`" for name in counts["requests"] if all(row["request"] != name for row in counts["rows"])]
        prose += f" Not begun: {', '.join(idle)}." if idle else ""
    prose = textwrap.fill(prose, 120, break_on_hyphens=False)
    return "\n\n".join(filter(None, (_HEADING, _EXPLANATION, prose, _CHART, as_table(counts), _lost(counts)))) + "\n"


def _lost(counts: dict[str, Any]) -> str:
    """Return each lost test with the first line of its error; "" if none was lost."""
    lines = [
        f"- `{row['request']}`: `{test.removeprefix('tests/pipelines/')}`: {str(reason).strip().partition(chr(10))[0]}"
        for row in counts["rows"]
        for test, reason in row["lost"].items()
    ]
    return "\n".join(("What was lost:", "", *lines)) if lines else ""


def _file(record: dict[str, Any]) -> str:
    return str(record["test"]).split("::")[0]


def _outcome(record: dict[str, Any]) -> str:
    if record["outcome"] not in ("passed", "skipped") and record.get("download"):
        return "needs a download"
    return {"error": "failed"}.get(record["outcome"], str(record["outcome"]))


def _short(file: str) -> str:
    return file.removeprefix("tests/pipelines/").removesuffix(".py")

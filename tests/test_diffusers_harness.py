"""The harness that runs diffusers' own tests on optimized pipes: what it asks for, counts, and writes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tools.diffusers_tests import __main__ as command
from tools.diffusers_tests.plugin import lacks_a_download
from tools.diffusers_tests.request import Wanted, parse
from tools.diffusers_tests.table import MARKER, as_table, counts_of, write_into

from ernie_accel import CallDefaults, SetAttention, SwapScheduler
from tests.forked import Forked


def test_a_request_is_a_preset_or_transforms_as_a_plan_prints_them():
    assert parse("exact") == Wanted("exact", ())
    transforms = (SwapScheduler("unipc", shift=2.0), SetAttention("math"))
    assert parse(", ".join(map(repr, transforms))) == Wanted(None, transforms)
    assert parse("CallDefaults('turbo')").transforms == (CallDefaults("turbo"),)


@pytest.mark.parametrize(
    ("request_text", "told"),
    [
        ("exakt", "exakt is no transform"),
        ("Swap('unipc')", "no transform 'Swap'"),
        ("Context('cpu')", "no transform 'Context'"),
        ("SwapScheduler(open('x'))", "malformed"),
        ("SwapScheduler('unipc'", "SwapScheduler('unipc'"),
        ("SwapScheduler('unipic')", "unipic"),
        ("", "at least one transform"),
    ],
)
def test_other_requests_are_refused_with_what_was_found(request_text, told):
    with pytest.raises(ValueError, match="--optimize takes") as refused:
        parse(request_text)
    assert told in str(refused.value)


def record(test, outcome="passed", **more):
    return {"test": f"tests/pipelines/{test}", "outcome": outcome, **more}


STOCK = [
    record("wan/test_wan.py::A::test_one"),
    record("wan/test_wan.py::A::test_two"),
    record("wan/test_wan.py::A::test_three", "failed", reason="x"),
    record("wan/test_wan.py::A::test_four", "skipped"),
    record("flux/test_flux.py::A::test_one"),
    record("sana/test_sana.py::A::test_one", "error", download=True),
]


def test_what_passed_on_stock_and_not_on_optimized_pipes_is_lost():
    exact = [
        record("wan/test_wan.py::A::test_one", pipes=1, changed=1),
        record("wan/test_wan.py::A::test_two", "failed", reason="KeyError: 'x'", pipes=1),
        # flux: its process died, so that no record is there
    ]
    counts = counts_of(STOCK, {"exact": exact})
    assert counts["stock"] == {
        "tests/pipelines/flux/test_flux.py": {"passed": 1},
        "tests/pipelines/sana/test_sana.py": {"needs a download": 1},
        "tests/pipelines/wan/test_wan.py": {"passed": 2, "failed": 1, "skipped": 1},
    }
    flux, wan = counts["rows"]
    assert (flux["passed_on_stock"], flux["passed_on_both"], list(flux["lost"].values())) == (1, 0, ["did not end"])
    assert (wan["passed_on_stock"], wan["passed_on_both"], wan["changed"]) == (2, 1, 1)
    assert wan["lost"] == {"tests/pipelines/wan/test_wan.py::A::test_two": "KeyError: 'x'"}
    assert "| **2 files** | `exact` | 3 | 1 | 1 | 2 |" in as_table(counts)


def test_the_page_keeps_what_stands_above_the_marker(tmp_path):
    page, counts = tmp_path / "lifecycle.md", counts_of(STOCK, {"exact": STOCK[:2]})
    page.write_text(f"# Lifecycle\n\nThe matrix.\n\n{MARKER}\nold table\n")
    for _ in range(2):
        write_into(page, counts)
        text = page.read_text()
        assert "On stock pipelines: 3 passed, " in text
        assert text.startswith(f"# Lifecycle\n\nThe matrix.\n\n{MARKER}\n\n## ")
        assert "old table" not in text
        assert text.count(MARKER) == 1
    write_into(tmp_path / "new.md", counts)
    assert (tmp_path / "new.md").read_text().startswith(MARKER)


def test_the_page_names_what_was_lost(tmp_path):
    write_into(tmp_path / "kept.md", counts_of(STOCK[:2], {"exact": STOCK[:2]}))
    assert "lost:" not in (tmp_path / "kept.md").read_text()
    ended = [STOCK[0], record("wan/test_wan.py::A::test_two", "failed", reason="KeyError: 'x'\n  and more")]
    write_into(tmp_path / "lost.md", counts_of(STOCK[:2], {"exact": ended}))
    assert (tmp_path / "lost.md").read_text().endswith("\n- `exact`: `wan/test_wan.py::A::test_two`: KeyError: 'x'\n")


def test_a_request_of_part_of_the_tests_counts_only_these():
    one = "tests/pipelines/wan/test_wan.py::A::test_one"
    counts = counts_of(STOCK, {"exact": STOCK[:1]}, {"exact": [one]}, "diffusers 0.40.0")
    assert [(row["passed_on_stock"], row["lost"]) for row in counts["rows"]] == [(1, {})]
    assert counts["tests_of"] == "diffusers 0.40.0"


class Pytest:
    """Stands in for pytest: writes a record for each test it would run, and is killed in the third."""

    def __init__(self):
        self.ran = []

    def __call__(self, command, **kwargs):
        options = dict(itertools.pairwise(command))
        only, skip = (Path(options[name]).read_text().split() if name in options else [] for name in ONLY_AND_SKIP)
        ran = [test for test in only or [each["test"] for each in STOCK] if test not in skip]
        lines = [json.dumps(record(test.removeprefix("tests/pipelines/"))) + "\n" for test in ran]
        first = not self.ran
        self.ran.append(ran)
        with Path(options["--results"]).open("a") as results:
            results.writelines(lines[:2] if first else lines)
            results.write(lines[2][:9] if first else "")
        return subprocess.CompletedProcess(command, -9 if first else 1)


ONLY_AND_SKIP = ("--only", "--skip")


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    for file in {each["test"].split("::")[0] for each in STOCK}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setattr(command.subprocess, "run", pytest_run := Pytest())
    every, work = [each["test"] for each in STOCK], tmp_path / "work"
    arguments = [str(tmp_path), "--all", "--work", str(work), "--download"]
    with pytest.raises(SystemExit, match="pytest ended with -9"):
        command.main(arguments)
    assert not (work / "counts.json").exists()
    (work / "exact.jsonl").write_text(json.dumps(STOCK[0]) + "\n")
    assert command.main([*arguments, "--so-far", "--page", str(tmp_path / "page.md")]) == 0
    assert json.loads((work / "counts.json").read_text())["rows"][0]["passed_on_both"] == 1
    assert "1 of the tests that pass on stock were not reached" in (tmp_path / "page.md").read_text()
    (work / "exact.jsonl").unlink()
    assert command.main(arguments) == 0
    assert pytest_run.ran == [every, every[2:], every]  # the rest on stock, then all of them with preset exact
    assert json.loads((work / "counts.json").read_text())["rows"][-1]["passed_on_stock"] == 4
    assert command.main([*arguments, "--so-far"]) == 0  # an ended run can be counted again
    assert json.loads((work / "counts.json").read_text())["rows"][-1]["passed_on_both"] == 4
    command.main(arguments)
    assert pytest_run.ran[3:] == [every, every]  # the run before ended, so that this is a new one


def test_a_run_does_not_go_on_with_other_versions(tmp_path, monkeypatch):
    (tmp_path / "tests" / "pipelines" / "wan").mkdir(parents=True)
    (tmp_path / "tests" / "pipelines" / "wan" / "test_wan.py").touch()
    (tmp_path / "versions.json").write_text('{"torch": "1.0"}')
    with pytest.raises(SystemExit, match="Start anew: --fresh"):
        command.main([str(tmp_path), "--all", "--work", str(tmp_path)])


def test_what_a_download_lacks_is_told_from_other_failures():
    from huggingface_hub.errors import LocalEntryNotFoundError

    inner = LocalEntryNotFoundError("not in the cache")
    wrapped = OSError("We couldn't connect to the hub to load the files")
    wrapped.__cause__ = inner
    assert lacks_a_download(inner)
    assert lacks_a_download(wrapped)
    assert not lacks_a_download(AssertionError("outgoing traffic has been disabled"))
    assert not lacks_a_download(OSError("no such file"))


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="has no folder tests/pipelines"):
        command.main([str(tmp_path)])
    (tmp_path / "tests" / "pipelines").mkdir(parents=True)
    with pytest.raises(SystemExit, match="takes the name of a preset"):
        command.main([str(tmp_path), "--optimize", "exakt"])
    for chosen in (["--only", "wan"], []):
        with pytest.raises(SystemExit, match="has one of"):
            command.main([str(tmp_path), *chosen])


TESTS = """
import pytest, torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

class Pipe(DiffusionPipeline):
    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(self):
        return self.transformer(torch.ones(1, 2, dtype=self.transformer.weight.dtype))

def make():
    return Pipe(torch.nn.Linear(2, 2), FlowMatchEulerDiscreteScheduler())

def test_dtype():
    assert make().transformer.weight.dtype == torch.float32

def test_call():
    assert make()().shape == (1, 2)

def test_without_a_pipe():
    assert torch.ones(1) == 1

def test_hub():
    from transformers import CLIPTokenizer
    assert CLIPTokenizer.from_pretrained("hf-internal-testing/tiny-random-clip").model_max_length == 77

def test_other_model():
    from transformers import AutoConfig
    AutoConfig.from_pretrained("hf-internal-testing/some-other-model")
"""


#: What ``python -m pytest`` does, in a process where most of what it imports has been imported.
PYTEST = """
import json, os, sys
import pytest
arguments, folder, environment = json.loads(sys.argv[1])
os.environ.update(environment)
os.chdir(folder)
sys.path[:0] = [folder, *environment["PYTHONPATH"].split(os.pathsep)]
status = pytest.main(arguments)
sys.stdout.flush()
os._exit(status)
"""


@pytest.fixture(scope="module")
def forked_pytest(tmp_path_factory):
    """Return a folder to work in, and what stands in for `subprocess.run`."""
    work = tmp_path_factory.mktemp("work")
    imported = "tests.loaded_ernie", "ernie_accel.transforms", "transformers.models.clip.tokenization_clip"
    forked = Forked(*imported, environment={"HF_HUB_CACHE": str(work / "hub")})  # read while it is imported

    def run(command, *, cwd, env, stdout, stderr):
        assert command[:3] == [sys.executable, "-m", "pytest"]
        done = forked.run(PYTEST, json.dumps([command[3:], str(cwd), env]))
        stdout.write(done.stdout + done.stderr)
        return done

    yield work, run
    forked.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_both_runs_are_counted(workers, tmp_path, capsys, forked_pytest, monkeypatch):
    work, run = forked_pytest
    monkeypatch.setattr(command.subprocess, "run", run)
    folder = tmp_path / "tests" / "pipelines" / "tiny"
    folder.mkdir(parents=True)
    (folder / "test_tiny.py").write_text(TESTS)
    (folder / "test_other.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    arguments = [
        str(tmp_path),
        "--all",
        "--fresh",
        "--work",
        str(work),
        "--json",
        str(work / "counts.json"),
        "-n",
        workers,
    ]
    cast = "CastDtype('bfloat16')"
    assert command.main([*arguments, "--optimize", "exact", "--optimize", cast]) == 1
    counts = json.loads((work / "counts.json").read_text())
    assert counts["stock"] == {
        "tests/pipelines/tiny/test_other.py": {"not collected": 1},
        "tests/pipelines/tiny/test_tiny.py": {"passed": 4, "needs a download": 1},
    }
    exact, changed = counts["rows"]
    assert exact["lost"] == {}
    assert (exact["optimized"], exact["changed"]) == (2, 0)
    assert [test.rpartition("::")[2] for test in changed["lost"]] == ["test_dtype"]
    assert f"`{cast}` | 4 | 2 | 3 | 1 |" in capsys.readouterr().out

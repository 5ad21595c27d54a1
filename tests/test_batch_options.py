"""An option is declared once: the command, a job file and the Python API have the same names, bounds and refusals."""

from __future__ import annotations

import inspect
import json
import math
import re
from contextlib import suppress
from typing import get_args, get_type_hints

import numpy
import pytest

from ernie_accel.batch import BatchInputError, MetricsServer, Producer, Sift, produce, read_rows, read_table
from ernie_accel.batch.engines.http import HttpEngine
from ernie_accel.batch.engines.ray import RayEngine
from ernie_accel.batch.input.job import plan_job
from ernie_accel.batch.input.options import OPTION_OF, OPTIONS, check_arguments
from ernie_accel.batch.input.row import DEFAULTS
from ernie_accel.batch.line.produce import produce_job
from ernie_accel.batch.output.report import write_report
from ernie_accel.cli import main
from ernie_accel.cli.batch import batch_command
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.fidelity.grid import VISIBLE
from tests.stub_engine import StubEngine, make_rows

API = {
    each.__name__: each
    for each in (produce, Producer, read_table, read_rows, Sift, HttpEngine, RayEngine, MetricsServer, write_report)
}
BOUNDED = [option for option in OPTIONS.values() if option.low is not None]
#: What the API has beside a job's options: objects, what a program decides, and details of an engine.
OWN = {
    "produce": "pipe rows out resume sift refiner facts writers progress metrics interval_s stop",
    "Producer": "pipe out sift refiner facts writers metrics max_queue",
    "read_table": "path size_multiple default_size defaults skipped",
    "read_rows": "rows size_multiple defaults skipped",
    "Sift": "blank_std grid_ratio",
    "HttpEngine": "endpoints retries request_timeout_s backoff_s steps guidance_scale use_pe api_key enhancer_api_key",
    "RayEngine": "load actors num_cpus max_batch address",
    "MetricsServer": "port",
    "write_report": "out",
}


def arguments():
    return [(option, *argument.split(".")) for option in OPTIONS.values() for argument in option.names.python]


def values_outside(option):
    """Return the nearest values that the bounds exclude."""
    step = 1 if option.kind is int else 0.01
    found = [option.low - step]
    if option.high is not None:
        found.append(option.high + step)
    return [option.kind(value) for value in found]


def values_at(option):
    return [option.kind(bound) for bound in (option.low, option.high) if bound is not None]


def test_the_command_has_every_option_with_its_help_and_bounds():
    given = inspect.signature(batch_command).parameters
    assert list(given) == [option.command for option in OPTIONS.values()]
    for option in OPTIONS.values():
        parameter = given[option.command]
        kind, info = get_args(parameter.annotation)
        assert set(get_args(kind) or {kind}) - {type(None)} in ({option.kind}, {list[str]})
        assert parameter.default in (None, inspect.Parameter.empty)
        assert (info.help, info.min, info.max) == (option.help, option.low, option.high)
    assert [name for name, each in given.items() if each.default is inspect.Parameter.empty] == ["table"]


def test_every_argument_of_the_api_is_an_option_or_known_to_be_none():
    for owner, thing in API.items():
        options = {argument for _, of, argument in arguments() if of == owner}
        assert not options & set(OWN[owner].split())
        assert options | set(OWN[owner].split()) == set(inspect.signature(thing).parameters), owner


@pytest.mark.parametrize(("option", "owner", "argument"), arguments())
def test_an_argument_has_the_options_default_and_type(option, owner, argument):
    thing = API[owner]
    assert inspect.signature(thing).parameters[argument].default == option.default
    hints = get_type_hints(thing.__init__ if isinstance(thing, type) else thing)
    kinds = set(get_args(hints[argument])) or {hints[argument]}
    if option.kind is not tuple:
        assert kinds - {str} == ({option.kind} - {str}) | ({type(None)} if option.optional else set())


def test_settings_of_rows_have_the_bounds_of_their_columns():
    assert {name: (OPTIONS[option].low, OPTIONS[option].high) for name, option in OPTION_OF.items()} == DEFAULTS


@pytest.mark.parametrize("option", BOUNDED, ids=lambda option: option.name)
def test_what_is_out_of_range_is_refused_alike_by_the_command_and_a_job_file(tmp_path, capsys, option):
    (tmp_path / "t.csv").write_text("prompt\na\n")
    for value in values_outside(option):
        with pytest.raises(SystemExit) as caught:
            main(["batch", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), f"{flag(option)}={value}"])
        assert caught.value.code == 2
        assert f"Invalid value for '{flag(option)}'" in capsys.readouterr().err
        file = tmp_path / "job.json"
        file.write_text(json.dumps({"input_file": "t.csv", "output_dir": "out", option.name: value}))
        for source, given in ((file, {}), (tmp_path / "t.csv", {"output_dir": tmp_path / "out", option.name: value})):
            with pytest.raises(BatchInputError) as refused:
                plan_job(source, given)
            assert (None, f"{option.name} is {value}; expected {option.range}") in refused.value.problems
    assert not (tmp_path / "out").exists()


def flag(option):
    return "--" + option.command.replace("_", "-")


@pytest.mark.parametrize("option", BOUNDED, ids=lambda option: option.name)
def test_bounds_themselves_are_allowed(tmp_path, monkeypatch, option):
    needs = {"max_concurrent": {"endpoint": ["http://a"]}, "ray_gpus": {"ray_actors": 1}, "watts": {"power_price": 1.0}}
    given = []
    monkeypatch.setattr("ernie_accel.cli.batch.plan_job", lambda table, options: given.append(options))
    monkeypatch.setattr("ernie_accel.cli.batch.run_job", lambda job: 0)
    for value in values_at(option):
        with suppress(SystemExit):
            main(["batch", str(tmp_path / "t.csv"), f"{flag(option)}={value}"])
        assert given.pop() == {option.name: value}
        job = plan_job(tmp_path / "t.csv", {"output_dir": tmp_path, option.name: value} | needs.get(option.name, {}))
        assert getattr(job, option.name) == value


CALLS = {
    "produce": lambda out, **given: produce(StubEngine(), make_rows(1), out, **given),
    "Producer": lambda out, **given: Producer(StubEngine(), out, **given),
    "Sift": lambda out, **given: Sift(**given),
    "HttpEngine": lambda out, **given: HttpEngine(["http://a"], **given),
    "RayEngine": lambda out, **given: RayEngine(StubEngine, **given),
    "write_report": lambda out, **given: write_report(out, **given),
}


@pytest.mark.parametrize(
    ("option", "owner", "argument"),
    [each for each in arguments() if each[0] in BOUNDED],
    ids=lambda value: str(value)[:20],
)
def test_the_api_refuses_the_same_before_anything_is_made(tmp_path, option, owner, argument):
    out = tmp_path / "out"
    for value in values_outside(option):
        with pytest.raises(ErnieAccelError) as caught:
            CALLS[owner](out, **{argument: value})
        assert f"{argument} is {value}; expected {option.range}" in str(caught.value)
    assert not out.exists()


def test_the_api_names_every_argument_that_is_wrong_and_takes_numbers_of_numpy(tmp_path):
    with pytest.raises(ErnieAccelError) as caught:
        produce(StubEngine(), make_rows(1), tmp_path / "out", batch_size=0, retries="2", timeout_s=math.inf, seed=True)
    assert str(caught.value).splitlines() == [
        "seed is True; expected a whole number",
        "batch_size is 0; expected 1 or more",
        "retries is '2'; expected a whole number",
        "timeout_s is inf; expected a finite number",
    ]
    given = {"batch_size": numpy.int64(2), "timeout_s": numpy.float32(9), "log_json": str(tmp_path / "l"), "seed": 1}
    check_arguments("produce", given)
    with pytest.raises(ErnieAccelError, match=re.escape(f"batch_size is {numpy.int64(0)!r}; expected 1 or more")):
        check_arguments("produce", {"batch_size": numpy.int64(0)})


def test_secrets_are_in_no_message_and_no_repr(tmp_path):
    given = {"endpoint": ["http://user:hunter2@a", 7], "api_key_env": ["hunter2"], "enhancer": ["http://x:hunter2@b"]}
    with pytest.raises(BatchInputError) as caught:
        plan_job(tmp_path / "t.csv", {"output_dir": tmp_path} | given)
    assert len(caught.value.problems) == 3
    assert "hunter2" not in str(caught.value)
    job = plan_job(tmp_path / "t.csv", {"output_dir": tmp_path, "endpoint": "http://user:hunter2@a"})
    assert "hunter2" not in repr(job)


def test_a_jobs_production_has_every_option_that_is_about_it(tmp_path, monkeypatch):
    """The command and ComfyUI's node both run `produce_job`, so that neither can leave one out."""
    given = {}
    monkeypatch.setattr(
        "ernie_accel.batch.line.produce.produce", lambda pipe, rows, out, **options: given.update(options)
    )
    options = {"overwrite": True, "free_encoders": True, "retries": 2, "fail_fast": True, "batch_size": 3, "seed": 4}
    options |= {"timeout": 5.0, "log_json": tmp_path / "log", "prometheus": tmp_path / "prom"}
    of_produce = {option.name: argument for option, owner, argument in arguments() if owner == "produce"}
    assert options.keys() == of_produce.keys()
    job = plan_job(tmp_path / "t.csv", {"output_dir": tmp_path, **options, "grid": 0.5})
    produce_job(job, StubEngine(), make_rows(1))
    assert {name: given[argument] for name, argument in of_produce.items()} == options
    assert given["sift"] == Sift(grid_score=0.5)


@pytest.mark.parametrize("written", [["--sift", "grid"], ["--sift=grid"], ["--grid", "2", "--sift", "grid"]])
def test_sift_grid_is_short_for_sifting_by_the_grid_that_is_visible(tmp_path, monkeypatch, written):
    jobs = []
    monkeypatch.setattr("ernie_accel.cli.batch.run_job", lambda job: jobs.append(job) or 0)
    (tmp_path / "t.csv").write_text("prompt\na red circle\n")
    with pytest.raises(SystemExit, match="0"):
        main(["batch", *written, str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), "--model", "some/model"])
    file = tmp_path / "job.json"
    asked = {"input_file": "t.csv", "output_dir": "out", "model": "some/model", "sift": "grid"}
    file.write_text(json.dumps(asked | {"grid": 2.0 if "--grid" in written else None}))
    for job in (*jobs, plan_job(file, {})):
        assert job.sifting() == Sift(grid_score=2.0 if "--grid" in written else VISIBLE)
    assert len(jobs) == 1


def test_a_jobs_table_is_read_with_every_option_that_is_about_it(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("ernie_accel.batch.input.job.read_table", lambda path, **options: given.update(options))
    options = {"naming_pattern": "{sku}.png", "template": "{prompt}", "folder_by": "a", "extra_columns": ("b",)}
    options |= {"image_root": tmp_path / "i", "lora_root": tmp_path / "l"}
    of_table = {option.name: argument for option, owner, argument in arguments() if owner == "read_table"}
    assert options.keys() == of_table.keys()
    plan_job(tmp_path / "t.csv", {"output_dir": tmp_path, **options, "steps": 7}).rows((64, 32))
    assert {name: given[argument] for name, argument in of_table.items()} == options
    assert (given["defaults"], given["default_size"], given["skipped"]) == ({"steps": 7}, (64, 32), None)
    skipped = []
    plan_job(tmp_path / "t.csv", {"output_dir": tmp_path, "skip_bad": True}).rows(skipped=skipped)
    assert given["skipped"] is skipped

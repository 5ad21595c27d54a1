"""The command refuses what cannot work before it loads anything, and says what it did in its exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from ernie_accel.batch import BatchChangedError, BatchInputError, BatchOutputError
from ernie_accel.batch.input.job import plan_job
from ernie_accel.batch.line.compile_rule import skip_compile_reason
from ernie_accel.batch.output import report
from ernie_accel.batch.output.ledger import open_job
from ernie_accel.cli import batch as command
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError
from tests.child_paths import PYTHONPATH
from tests.stub_engine import StubEngine, make_rows, picture_of


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("prompt\none\ntwo\nthree\n")
    return path


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(job, facts):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(command, "_engine", load)


def plan(table, **given):
    return plan_job(table, {"output_dir": table.parent / "out", "model": "some/model"} | given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected 1 or more"),
        ({"retries": -1}, "retries is -1; expected 0 or more"),
        ({"seed": 2**64}, f"seed is {2**64}; expected 0 to"),
        ({"timeout": 0.0}, "timeout is 0.0; expected 0.1 or more"),
        ({"metrics_port": 65536}, "metrics_port is 65536; expected 0 to 65535"),
        ({"duplicates": 65}, "duplicates is 65; expected 0 to 64"),
        ({"endpoint": ("http://a",), "preset": "exact"}, "preset has no effect with endpoint"),
        ({"endpoint": ("http://a",), "free_encoders": True}, "free_encoders has no effect with endpoint"),
        ({"enhancer": "http://a"}, "enhancer has no effect without endpoint"),
        ({"ray_actors": 2, "free_encoders": True}, "free_encoders has no effect with ray_actors"),
        ({"refine_model": "a/b"}, "refine_model has no effect without refine"),
        ({"refine_model": "a/b", "ray_actors": 2}, "refine_model has no effect with ray_actors"),
        ({"endpoint": ("http://a",), "transformer": "a.gguf"}, "transformer has no effect with endpoint"),
        ({"metrics_host": "0.0.0.0"}, "metrics_host has no effect without metrics_port"),
        ({"steps": 0}, "steps is 0; expected 1 to 1000"),
        ({"width": 9000}, "width is 9000; expected 16 to 8192"),
        ({"guidance": 101.0}, "guidance is 101.0; expected 0 to 100"),
        ({"variants": 0}, "variants is 0; expected 1 to 1000"),
        ({"sampler": "unipcc"}, "sampler: Unknown scheduler 'unipcc'. Did you mean 'unipc'?"),
        ({"blur": -1.0}, "blur is -1.0; expected 0 to 1e+06"),
        ({"endpoint": ("http://a",), "sampler": "unipc"}, "sampler has no effect with endpoint"),
        ({"endpoint": ("http://a",), "no_enhancer": True}, "no_enhancer has no effect with endpoint"),
        ({"endpoint": ("http://a",), "ray_gpus": 2.0}, "ray_gpus has no effect with endpoint"),
        ({"endpoint": ("http://a",), "demo_model": True}, "demo_model has no effect with endpoint"),
        ({"model": "a/b", "demo_model": True}, "demo_model has no effect with model 'a/b'"),
        ({"server": "sglang"}, "server has no effect without endpoint"),
        ({"ray_gpus": 1.0}, "ray_gpus has no effect without ray_actors"),
        ({"report": False, "gpu_price": 2.0}, "gpu_price has no effect without a report"),
        ({"watts": 300.0}, "watts has no effect without power_price"),
    ],
)
def test_options_that_cannot_work_are_named_whoever_gives_them(table, options, message):
    with pytest.raises(BatchInputError, match=re.escape(message)):
        plan(table, **options)
    file = table.parent / "job.json"
    content = {"input_file": "t.csv", "output_dir": "out"} | options
    file.write_text(json.dumps(content | {k: list(v) for k, v in content.items() if isinstance(v, tuple)}))
    with pytest.raises(BatchInputError, match=re.escape(message)):
        plan_job(file, {})


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"max_concurrent": 4}, "max_concurrent has no effect without endpoint"),
        ({"endpoint": ("http://a",), "batch_size": 4}, "batch_size has no effect with endpoint"),
        ({"skip_unsupported": True}, "skip_unsupported has no effect without preset"),
    ],
)
def test_options_of_guides_that_do_nothing_are_pointed_out(table, monkeypatch, capsys, options, note):
    monkeypatch.setattr(command, "_engine", lambda job, facts: StubEngine())
    assert command.run_job(plan(table, **options)) == 0
    assert f"note: {note}" in capsys.readouterr().err
    assert not plan(table).notes()


def test_options_that_every_row_overrules_are_pointed_out(table, monkeypatch, capsys):
    monkeypatch.setattr(command, "_engine", lambda job, facts: StubEngine())
    table.write_text("prompt,steps,seed,width\na,4,1,64\nb,5,2,\n")
    assert command.run_job(plan(table, steps=8, seed=3, width=32, height=32, template="cup {steps}")) == 0
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if line.startswith("note: ")] == [
        "note: steps has no effect: every row has a steps of its own",
        "note: seed has no effect: every row has a seed of its own",
        "note: the column 'prompt' has no effect: template makes the prompts; to use both, write {prompt} in it",
    ]


def test_settings_of_the_whole_job_are_for_rows_that_leave_them_open(table, monkeypatch):
    engine = StubEngine()
    monkeypatch.setattr(command, "_engine", lambda job, facts: engine)
    table.write_text("prompt,width,steps,guidance_scale,variants\na,64,4,3.5,1\nb,,,,\n")
    file = table.parent / "job.yaml"
    file.write_text(
        "input_file: t.csv\noutput_dir: out\nmodel: a/b\nwidth: 32\nheight: 48\nsteps: 9\nguidance: 1\nvariants: 2"
    )
    assert command.run_job(plan_job(file, {"steps": 8})) == 0
    made = sorted((r for batch in engine.batches for r in batch), key=lambda r: (r.prompt, r.seed))
    assert [(r.prompt, r.width, r.height, r.steps, r.guidance_scale) for r in made] == [
        ("a", 64, 48, 4, 3.5),
        ("b", 32, 48, 8, 1.0),
        ("b", 32, 48, 8, 1.0),
    ]
    with pytest.raises(BatchInputError, match="default width 1000 is not made of multiples of 16"):
        command.run_job(plan(table, width=1000))


@pytest.fixture
def loaded(monkeypatch):
    """Have `_engine` load as ever, and render with a stub; yields the pipes that were loaded."""
    pipes = []
    load = command._load

    def note(job, preset):
        pipes.append(load(job, preset))
        return pipes[-1]

    monkeypatch.setattr(command, "_load", note)
    monkeypatch.setattr("ernie_accel.batch.engines.LocalEngine", lambda pipe, **options: StubEngine())
    return pipes


def texts_of(out):
    return [Image.open(path).text for path in sorted(out.glob("*.png"))]


def test_sampler_and_enhancer_are_as_asked_for_and_are_part_of_what_a_job_is(table, loaded, capsys):
    options = {"model": None, "demo_model": True, "preset": "exact"}
    assert command.run_job(plan(table, **options, sampler="unipc", no_enhancer=True)) == 0
    (pipe,) = loaded
    assert pipe.pe is None
    assert pipe.pe_tokenizer is None
    assert re.search(r"SwapScheduler\('unipc'\) +resamples +applied", capsys.readouterr().out)
    assert texts_of(table.parent / "out")[0].items() >= {"sampler": "unipc", "prompt enhancer": "off"}.items()
    for left in ({"sampler": "unipc"}, {"no_enhancer": True}):
        with pytest.raises(BatchChangedError, match=r"setting '(sampler|prompt enhancer)' was .* and is now None"):
            command.run_job(plan(table, **options, **left))


SHAPES = "no model is named, and the embedded demo model draws nothing but flat shapes"


@pytest.mark.parametrize(
    "prompt", ["a product photo of a red mug", "teal square", "红色的马克杯", "a large red", "cup 🙂"]
)
def test_the_demo_model_refuses_what_it_cannot_draw(table, nothing_is_loaded, capsys, prompt):
    table.write_text(f"sku,prompt\na,a large red circle\nb,{prompt}\n", encoding="utf-8")
    with pytest.raises(BatchInputError) as caught:
        command.run_job(plan(table, model=None))
    assert SHAPES in str(caught.value)
    assert "--model baidu/ERNIE-Image-Turbo" in str(caught.value)
    assert re.search(rf"line 3: .*: '{prompt}'", str(caught.value))
    assert capsys.readouterr().out.startswith("Model: the embedded demo model (draws flat shapes only); for other")
    assert not (table.parent / "out").exists()


def test_of_many_prompts_that_it_cannot_draw_a_few_are_shown(table, nothing_is_loaded):
    table.write_text("prompt\n" + "a mug\n" * 50)
    with pytest.raises(BatchInputError) as caught:
        command.run_job(plan(table, model=None))
    assert len(str(caught.value).splitlines()) == 9
    assert "45 more prompts of 50 are like these" in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        (["a large red circle in the center on a cream background", "two rings", "Please draw a blue cross"], {}),
        (["左上角有一个红色的大圆形，米色背景", "画两个圆环"], {}),
        (["a product photo of a red mug"], {"demo_model": True}),
    ],
)
def test_the_demo_model_says_everywhere_that_it_is_one(table, monkeypatch, capsys, prompts, options):
    monkeypatch.setattr(command, "_engine", lambda job, facts: StubEngine())
    table.write_text("prompt\n" + "\n".join(prompts), encoding="utf-8")
    for _ in range(2):  # made, and nothing left to do
        assert command.run_job(plan(table, model=None, **options)) == 0
        out, err = capsys.readouterr()
        assert out.splitlines()[0].startswith("Model: the embedded demo model (draws flat shapes only)")
        assert out.splitlines()[-1].endswith("out, made with the embedded demo model (draws flat shapes only)")
        if _ == 0:
            assert "demo model, shapes only: " in err, "before the bar"
    folder = table.parent / "out"
    for text in ((folder / "report.md").read_text(), (folder / "report.html").read_text()):
        assert "embedded demo model, which draws flat shapes and nothing else" in text
    assert {text["model"] for text in texts_of(folder)} == {"embedded demo model (draws flat shapes only)"}


def compiles(table, monkeypatch, rows, **options):
    """Return whether a job of the embedded model leaves compiling in; it is stopped before it loads anything."""
    jobs = []

    def stop(job, facts):
        jobs.append(job)
        raise RuntimeError

    monkeypatch.setattr(command, "_engine", stop)
    monkeypatch.setattr(Context, "detect", lambda *_: CPU)
    table.write_text("prompt\n" + "a red circle\n" * rows)
    with pytest.raises(RuntimeError):
        command.run_job(plan(table, **({"model": None} | options)))
    return jobs[0].compiled


CPU = Context(device="cpu", device_name="2 CPU cores")


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (20, {}, False),
        (1300, {}, False),
        (1400, {}, True),
        (700, {"steps": 16}, True),
        (20, {"width": 1024, "height": 1024}, False),
        (21, {"width": 1024, "height": 1024}, True),
        (20, {"preset": "turbo-fp32"}, True),
        (20, {"model": "a/b"}, True),
    ],
)
def test_a_short_job_on_a_cpu_does_not_compile(table, monkeypatch, capsys, rows, options, expected):
    assert compiles(table, monkeypatch, rows, **options) is expected
    said = "Not compiled: compiling takes some 40 s on a CPU and would save some"
    assert (said in capsys.readouterr().out) is not expected


def test_only_a_cpu_that_can_compile_is_spared_it():
    rows = make_rows(20)
    assert skip_compile_reason(rows, Context.named("cpu"))
    assert skip_compile_reason(rows, replace(Context.named("cpu"), no_compile="there is no C++ compiler")) is None
    assert skip_compile_reason(rows, Context.named("h200")) is None


def test_without_compiling_the_rest_of_the_preset_is_applied(table, loaded, capsys):
    table.write_text("prompt\na red circle\n")
    assert command.run_job(plan(table, model=None)) == 0
    out = capsys.readouterr().out
    assert "would save some 0.0 s on 1 picture; to compile all the same, name the preset (--preset turbo-" in out
    assert "CallDefaults('turbo')" in out
    assert "Compile()" not in out


def test_every_mistake_of_the_options_is_reported_at_once(table):
    with pytest.raises(BatchInputError) as caught:
        plan(table, retries=-1, batch_size=0, enhancer="http://a")
    assert len(caught.value.problems) == 3


def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_loaded(table, nothing_is_loaded):
    (table.parent / "out").write_text("in the way")
    with pytest.raises(BatchOutputError, match="a file of this name is in the way"):
        command.run_job(plan(table))


@pytest.mark.parametrize("stop", [RuntimeError("no such model"), KeyboardInterrupt()], ids=repr)
def test_a_job_that_never_began_leaves_no_empty_folder(table, monkeypatch, stop):
    def refuse(job, facts):
        assert job.output_dir.is_dir() and job.log_json.parent.is_dir()
        raise stop

    monkeypatch.setattr(command, "_engine", refuse)
    folder = table.parent
    before = sorted(folder.rglob("*"))
    wanted = {"output_dir": folder / "a" / "b", "log_json": folder / "logs" / "log.jsonl"}
    with pytest.raises(type(stop)):
        command.run_job(plan(table, **wanted))
    assert sorted(folder.rglob("*")) == before
    (folder / "a").mkdir()
    (folder / "logs").mkdir()
    (folder / "logs" / "other").touch()
    with pytest.raises(type(stop)):
        command.run_job(plan(table, **wanted))
    assert sorted(folder.rglob("*")) == sorted([*before, folder / "a", folder / "logs", folder / "logs" / "other"])


@pytest.mark.parametrize("option", ["log_json", "prometheus"])
def test_a_log_that_cannot_be_written_is_refused_before_anything_is_loaded(table, nothing_is_loaded, option):
    (table.parent / "file").write_text("")
    with pytest.raises(BatchOutputError, match="a file of this name is in the way"):
        command.run_job(plan(table, **{option: table.parent / "file" / "log"}))
    with pytest.raises(BatchOutputError, match="is a folder; choose another name"):
        command.run_job(plan(table, **{option: table.parent}))


def test_what_the_folder_holds_is_refused_before_anything_is_loaded(table, monkeypatch):
    """Another process's job, changed rows and settings, and pictures of others."""
    loads = []
    monkeypatch.setattr(command, "_engine", lambda job, facts: (loads.append(job), StubEngine())[1])
    assert command.run_job(plan(table)) == 0
    out = table.parent / "out"
    with open_job(out), pytest.raises(BatchOutputError, match="another process is working on this job"):
        command.run_job(plan(table))
    with pytest.raises(BatchChangedError, match=r"line 2: '00000\.png': seed was 0 and is now 5"):
        command.run_job(plan(table, seed=5))
    with pytest.raises(BatchChangedError, match="setting 'preset' was"):
        command.run_job(plan(table, preset="turbo-bf16"))
    with pytest.raises(BatchChangedError, match=r"setting 'sift' was None and is now"):
        command.run_job(plan(table, sift=True))
    shutil.rmtree(out / ".ernie-accel")
    with pytest.raises(BatchOutputError, match=r"'00000\.png' exists; allow overwriting or choose another output"):
        command.run_job(plan(table))
    assert len(loads) == 1
    assert command.run_job(plan(table, overwrite=True)) == 0


def test_a_price_without_the_power_is_refused_before_anything_is_loaded(table, nothing_is_loaded, monkeypatch):
    monkeypatch.setattr(report, "measured_watts", lambda: None)
    with pytest.raises(ErnieAccelError, match="add --watts"):
        command.run_job(plan(table, power_price=0.3))


def test_power_is_measured_while_pictures_are_made(table, monkeypatch):
    draws = iter([650, 600, 700])  # when it is asked whether power can be measured at all, and then while it works
    monkeypatch.setattr(report, "measured_watts", lambda: next(draws, 20))
    monkeypatch.setattr(command, "_POWER_EVERY_S", 0.0)
    monkeypatch.setattr(command, "_engine", lambda job, facts: StubEngine(max_batch=1))
    (table.parent / "t.csv").write_text("prompt\none\ntwo\n")
    assert command.run_job(plan(table, power_price=0.3)) == 0
    assert " at 650 W and 0.3 a kWh" in (table.parent / "out" / "report.md").read_text()


def test_a_log_that_breaks_in_the_middle_costs_no_picture(table, monkeypatch):
    log = table.parent / "logs" / "log.jsonl"

    def before(requests, call):
        log.unlink(missing_ok=True)
        log.parent.rmdir() if log.parent.is_dir() else None

    monkeypatch.setattr(command, "_engine", lambda job, facts: StubEngine(before, max_batch=1))
    with pytest.warns(UserWarning, match="the job's state could not be written: .*; the job goes on"):
        assert command.run_job(plan(table, log_json=log)) == 0
    assert len(list((table.parent / "out").glob("*.png"))) == 3


def test_a_job_that_is_done_loads_no_model_and_one_with_a_lost_picture_does(table, monkeypatch, capsys):
    monkeypatch.setattr(command, "_engine", lambda job, facts: StubEngine())
    assert command.run_job(plan(table)) == 0
    loads = []
    monkeypatch.setattr(command, "_engine", lambda job, facts: (loads.append(job), StubEngine())[1])
    assert command.run_job(plan(table, report=True)) == 0
    assert not loads
    assert "Nothing to do, 3 rows were finished before: " in capsys.readouterr().out
    assert (table.parent / "out" / "report.md").is_file()

    next((table.parent / "out").glob("*.png")).unlink()
    assert command.run_job(plan(table)) == 0
    assert len(loads) == 1
    table.write_text("prompt\none\ntwo\nthree\nfour\n")
    assert command.run_job(plan(table)) == 0
    assert len(loads) == 2


def test_a_job_that_is_done_gets_the_manifest_that_a_kill_kept_from_it(table, monkeypatch, nothing_is_loaded):
    out = table.parent / "out"
    with monkeypatch.context() as patch:
        patch.setattr(command, "_engine", lambda job, facts: StubEngine())
        assert command.run_job(plan(table)) == 0
    (out / "manifest.jsonl").unlink()
    lines = table.read_text().split()
    table.write_text("\n".join([f"{lines[0]},shelf", *(f"{line},left" for line in lines[1:])]))
    assert command.run_job(plan(table)) == 0
    assert [json.loads(line)["shelf"] for line in (out / "manifest.jsonl").open()] == ["left"] * 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_setting_that_is_given_no_more_is_a_change(table, monkeypatch, overwrite):
    monkeypatch.setattr(command, "_engine", lambda job, facts: StubEngine())
    assert command.run_job(plan(table, sift=True, duplicates=64)) == command.EXIT_FAILED
    if overwrite:
        assert command.run_job(plan(table, overwrite=True)) == 0
        assert len(list((table.parent / "out").glob("*.png"))) == 3
    else:
        with pytest.raises(BatchChangedError, match=r"setting 'sift' was .* and is now None"):
            command.run_job(plan(table))


@pytest.mark.parametrize(
    ("change", "named"), [({"server": "vllm-omni"}, "pipeline"), ({"endpoint": None, "server": None}, "preset")]
)
def test_other_image_servers_or_none_are_a_change(table, monkeypatch, change, named):
    """Each engine adds what it says of itself; a local one is known by its preset before it is loaded."""

    class Server(StubEngine):
        def __init__(self, kind):
            super().__init__()
            self._kind = kind

        def identity(self):
            return {"pipeline": self._kind}

    monkeypatch.setattr(command, "_engine", lambda job, facts: Server(job.server))
    options = {"endpoint": ("http://a",), "server": "sglang"}
    assert command.run_job(plan(table, **options)) == 0
    with pytest.raises(BatchChangedError, match=f"setting '{named}' was"):
        command.run_job(plan(table, **{k: v for k, v in (options | change).items() if v is not None}))


LOADING = """
import signal, sys, time
from ernie_accel.cli import batch as command
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
def load(job, facts):
    print("loading", flush=True)
    while True:
        time.sleep(0.05)
command._engine = load
from ernie_accel.cli import main
main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_an_interrupt_while_the_model_loads_ends_the_command_at_once(table):
    job = subprocess.Popen(
        [sys.executable, "-c", LOADING, "batch", str(table), "--out", str(table.parent / "out"), "--model", "a/b"],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert job.stdout.readline() == "loading\n"
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=30)
    finally:
        job.kill()
    assert job.returncode == 130, err
    assert "Traceback" not in err


def test_rejected_rows_are_counted_apart_and_give_exit_code_three(table, monkeypatch, capsys):
    class Blank(StubEngine):
        def render(self, requests, timeout_s=None):
            return [Image.new("RGB", (32, 32)) if request.seed == 1 else picture_of(request) for request in requests]

    monkeypatch.setattr(command, "_engine", lambda job, facts: Blank())
    assert command.run_job(plan(table, sift=True)) == command.EXIT_FAILED
    out, err = capsys.readouterr()
    assert "2 succeeded, 0 failed, 1 rejected, in " in out
    assert "t.csv:3: 00001.png rejected: blank: " in err

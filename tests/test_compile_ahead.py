"""Kernels that are compiled before they are launched: the lists, and when compiling begins."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from tools.kernel_lists.recording import write_list

import ernie_accel
from ernie_accel import FuseKernels, MoveTo, Quantize
from ernie_accel.core.context import Context
from ernie_accel.families import families
from ernie_accel.kernels import ahead
from ernie_accel.storage import loading, meanwhile, reading
from ernie_accel.storage.manifest import SavedTransform, open_manifest
from tests.pipelines import tiny_ernie, tiny_z_image

triton = pytest.importorskip("triton")
H200 = Context.named("h200")
LISTED = [(family.name, precision) for family in families() for precision in ahead.listed(family.name)]


@pytest.fixture(autouse=True)
def nothing_begun(monkeypatch):
    """Let each test begin anew what another has begun."""
    monkeypatch.setattr(ahead, "_begun", set())


@pytest.fixture
def kernel():
    """A kernel that compiles fast."""
    return next(each for each in ahead.listed("ERNIE-Image")["fp8"] if each.kernel == "_lay_out_values_kernel")


@pytest.fixture
def woken(monkeypatch):
    """Return, when called, the devices that were woken, where there are several GPUs and the second is current."""
    devices = []

    def after_all():
        for thread in threading.enumerate():
            if thread.name.endswith("wakes the device"):
                thread.join()
        return devices

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(meanwhile, "_wake", devices.append)
    return after_all


@pytest.fixture
def begun(monkeypatch):
    """The commands of processes that were begun, their environments and what they were told."""
    processes = []

    class Process:
        def __init__(self, command, env, **_):
            self.command, self.env = command, env
            processes.append(self)

        def communicate(self, work):
            self.work = json.loads(work)

    monkeypatch.setenv(ahead.VARIABLE, "1")
    monkeypatch.setattr(ahead, "cores", lambda: 16)
    monkeypatch.setattr(subprocess, "Popen", Process)
    return processes


@pytest.fixture
def started(monkeypatch):
    """What compiling was begun for."""
    calls = []
    monkeypatch.setattr(ahead, "start", lambda *arguments: calls.append(arguments))
    return calls


# ---- the lists -------------------------------------------------------------------------------------------------------


def test_every_family_of_the_package_has_lists():
    assert sorted(LISTED) == sorted(
        (name, precision) for name in ("ERNIE-Image", "Z-Image", "NewBie-image") for precision in ("bf16", "fp8")
    )


@pytest.mark.parametrize(("family", "precision"), LISTED)
def test_listed_kernels_are_those_of_the_package(family, precision):
    for each in ahead.listed(family)[precision]:
        kernel = getattr(ahead._module(each.module), each.kernel)
        assert list(each.signature) == kernel.arg_names
        assert set(each.constants) == {name for name, kind in each.signature.items() if kind == "constexpr"}
        assert {kernel.arg_names[number] for number in kernel.constexprs} <= set(each.constants)
        assert set(each.multiples) <= set(kernel.arg_names) - set(each.constants)


def test_a_listed_kernel_compiles_without_a_gpu_and_is_found_again(kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert ahead.compile_all([kernel], (9, 0)) == 1
    assert [path.suffix for path in tmp_path.rglob("_lay_out_values_kernel.cubin")] == [".cubin"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert ahead.compile_all([kernel], (9, 0)) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_kernel_that_does_not_compile_is_left_out(kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bad = ahead.Launched(kernel.module, kernel.kernel, kernel.signature, {**kernel.constants, "BLOCK": 3000}, {}, 4, 3)
    gone = ahead.Launched(kernel.module, "_kernel_of_a_later_version", {}, {}, {}, 4, 3)
    assert ahead.compile_all([bad, gone, kernel], (9, 0)) == 1


@pytest.mark.parametrize("methods", [["fork", "spawn"], ["spawn"]])
def test_several_compile_at_once_where_processes_can_be_forked(methods, kernel, monkeypatch, tmp_path):
    def compiled_by(*_):
        (tmp_path / str(os.getpid())).touch()

    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: methods)
    monkeypatch.setattr(ahead, "compile_one", compiled_by)
    assert ahead.compile_all([kernel] * 4, (9, 0), workers=2) == 4
    here = (tmp_path / str(os.getpid())).exists()
    assert here is ("fork" not in methods)
    assert ahead.compile_all([], (9, 0), workers=2) == 0


def test_a_worker_that_dies_holds_nobody_up(kernel, monkeypatch):
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("processes cannot be forked here")
    found = []
    monkeypatch.setattr(ahead, "compile_one", lambda *_: os._exit(1))
    work = lambda: found.append(ahead.compile_all([kernel] * 3, (9, 0), workers=2))  # noqa: E731
    compiling = threading.Thread(target=work, daemon=True)
    compiling.start()
    compiling.join(timeout=60)
    assert found == [0]


def test_a_list_is_written_as_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "LISTS", tmp_path)
    one = ahead.Launched("gpu", "kernel", {"X": "*bf16", "N": "constexpr"}, {"N": None}, {"X": True}, 4, 3)
    write_list("Mine", {"fp8": [one, one]})
    assert ahead.listed("Mine") == {"fp8": (one,)}
    (again,) = ahead.listed("Mine")["fp8"]
    assert list(again.signature) == ["X", "N"]  # as declared, not sorted: Triton looks a kernel up by that order, too
    assert ahead.listed("Other") == {}


# ---- the process -----------------------------------------------------------------------------------------------------


def test_a_process_of_its_own_fills_the_cache_and_imports_nothing_of_its_folder(kernel, tmp_path, monkeypatch):
    folder, cache = tmp_path / "folder", tmp_path / "cache"
    for name in ("ernie_accel", "json", "torch", "triton"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"open({str(tmp_path / name)!r}, 'w')")
    monkeypatch.chdir(folder)
    monkeypatch.setenv(ahead.VARIABLE, "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(ahead, "cores", lambda: 16)
    monkeypatch.setattr(ahead, "listed", lambda _: {"fp8": (kernel,)})
    process = ahead.start("ERNIE-Image", "fp8", (9, 0))
    assert process.wait(timeout=120) == 0
    assert [path.name for path in cache.rglob("*.cubin")] == ["_lay_out_values_kernel.cubin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "folder"]


def test_it_starts_one_process_that_sees_no_gpu_and_begins_no_other(begun):
    assert ahead.start("ERNIE-Image", "fp8", (9, 0)) is not None
    (process,) = begun
    assert process.command[:2] == [sys.executable, "-c"]
    assert process.env["CUDA_VISIBLE_DEVICES"] == ""
    assert process.env[ahead.VARIABLE] == "0"
    assert process.work["capability"] == [9, 0]
    assert tuple(ahead.Launched(**each) for each in process.work["launched"]) == ahead.listed("ERNIE-Image")["fp8"]


def test_what_one_load_has_begun_another_does_not_begin_again(begun, monkeypatch):
    loads = [threading.Thread(target=ahead.start, args=("ERNIE-Image", "fp8", (9, 0))) for _ in range(4)]
    for load in loads:
        load.start()
    for load in loads:
        load.join()
    assert len(begun) == 1
    ahead.start("ERNIE-Image", "bf16", (9, 0))
    ahead.start("ERNIE-Image", "fp8", (10, 0))
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    ahead.start("ERNIE-Image", "fp8", (9, 0))
    assert len(begun) == 4


@pytest.mark.parametrize(
    "why",
    [
        "switched off",
        "few cores",
        "no list",
        "no such precision",
        "no interpreter",
        "frozen",
        "no triton",
        "no process",
    ],
)
def test_where_it_cannot_help_nothing_is_begun(why, monkeypatch):
    def refuse(*_, **__):
        if why != "no process":
            pytest.fail("a process was started")
        raise BlockingIOError

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(ahead, "cores", lambda: 2 if why == "few cores" else 16)
    monkeypatch.setenv(ahead.VARIABLE, "0" if why == "switched off" else "1")
    if why == "no interpreter":
        monkeypatch.setattr(sys, "executable", "")
    if why == "frozen":  # sys.executable is the program itself
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    if why == "no triton":
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    family = "Other" if why == "no list" else "ERNIE-Image"
    assert ahead.start(family, "int8" if why == "no such precision" else "fp8", (9, 0)) is None
    assert ahead._begun == set()  # so that a later load tries again


# ---- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "family"), [(tiny_ernie, "ERNIE-Image"), (tiny_z_image, "Z-Image")])
def test_it_begins_for_what_a_folder_of_diffusers_will_launch(build, family, tmp_path, started):
    build().save_pretrained(tmp_path)
    meanwhile.prepare(tmp_path, (Quantize("int8"), FuseKernels("bf16")), H200)
    assert started == [(family, "bf16", (9, 0))]
    meanwhile.prepare(tmp_path, (Quantize("fp8"),), H200)
    assert len(started) == 1


def test_it_begins_for_what_a_folder_was_saved_with(tmp_path, started, monkeypatch):
    ernie_accel.save(tiny_ernie(), tmp_path / "saved")
    meanwhile.prepare(tmp_path / "saved", (), H200)
    assert started == []
    manifest = open_manifest(tmp_path / "saved")
    fused = SavedTransform(transform={"transform": "FuseKernels", "precision": "fp8"}, changed=("a",), skipped={})
    without_effect = fused.model_copy(update={"changed": ()})
    for saved in (without_effect, fused):
        monkeypatch.setattr(
            meanwhile, "open_manifest", lambda _, saved=saved: manifest.model_copy(update={"transforms": (saved,)})
        )
        meanwhile.prepare(tmp_path / "saved", (), H200)
    assert started == [("ERNIE-Image", "fp8", (9, 0))]


def test_of_two_precisions_that_of_your_own_transform_counts(tmp_path, started):
    tiny_ernie().save_pretrained(tmp_path)
    meanwhile.prepare(tmp_path, (FuseKernels("bf16"), FuseKernels("fp8")), H200)
    assert started == [("ERNIE-Image", "bf16", (9, 0))]


def test_a_damaged_manifest_is_left_to_whoever_reads_it(tmp_path, started):
    ernie_accel.save(tiny_ernie(), tmp_path / "saved")
    (tmp_path / "saved" / "ernie_accel.json").write_text("{")
    meanwhile.prepare(tmp_path / "saved", (), H200)
    assert started == []


@pytest.mark.parametrize("machine", [Context.named("cpu"), Context.named("ascend910b"), Context.named("mps")])
def test_it_begins_only_for_cuda(machine, tmp_path, started):
    tiny_ernie().save_pretrained(tmp_path)
    meanwhile.prepare(tmp_path, (FuseKernels("fp8"),), machine)
    assert started == []


@pytest.mark.parametrize(
    "index", [b"", b"{", b"\xff", b"[]", b'{"transformer": 3}', b'{"transformer": [["a"], ["b"]]}']
)
def test_a_damaged_index_is_left_to_whoever_reads_it(index, tmp_path, started):
    (tmp_path / "model_index.json").write_bytes(index)
    meanwhile.prepare(tmp_path, (FuseKernels("fp8"),), H200)
    assert started == []


@pytest.mark.parametrize("preset", ["turbo-fp8", "auto"])
def test_load_begins_before_it_reads(preset, tmp_path, started, monkeypatch):
    tiny_ernie().save_pretrained(tmp_path)
    monkeypatch.setattr(Context, "detect", classmethod(lambda cls, device=None, **_: H200))
    monkeypatch.setattr("ernie_accel.api.load_pipeline", lambda *_, **__: pytest.fail("read") if not started else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ernie_accel.load(tmp_path, preset=preset)
    assert started == [("ERNIE-Image", "fp8", (9, 0))]


def test_load_on_the_cpu_begins_nothing(tmp_path, started):
    tiny_ernie().save_pretrained(tmp_path)
    ernie_accel.load(tmp_path, device="cpu")
    assert started == []


def test_the_device_wakes_beside_it_and_no_failure_is_heard_of(tmp_path, started, monkeypatch):
    tiny_ernie().save_pretrained(tmp_path)
    woken = threading.Event()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *_: woken.set())
    meanwhile._wake("cpu")
    assert woken.is_set()
    meanwhile._wake("a device that is not here")
    meanwhile.prepare(tmp_path, (), H200)  # where there is no CUDA, its thread fails, and this goes on


@pytest.mark.parametrize(
    ("device", "transforms", "expected"),
    [
        (None, (), "cuda:1"),  # the current one of the thread that loads; a new thread's is cuda:0
        ("cuda", (), "cuda:1"),
        ("cuda:0", (), "cuda:0"),
        ("cuda:3", (MoveTo("cuda:2"),), "cuda:3"),
        (None, (MoveTo("cuda:2"),), "cuda:2"),
    ],
)
def test_the_device_that_is_meant_wakes_and_no_other(device, transforms, expected, tmp_path, started, woken):
    tiny_ernie().save_pretrained(tmp_path)
    meanwhile.prepare(tmp_path, transforms, H200, device)
    assert woken() == [expected]


def test_no_device_wakes_for_what_stays_on_the_host(tmp_path, started, woken):
    tiny_ernie().save_pretrained(tmp_path)
    meanwhile.prepare(tmp_path, (MoveTo("cpu"),), H200)
    meanwhile.prepare(tmp_path / "a folder that is gone", (), H200)
    assert woken() == []


@pytest.mark.parametrize("saved", [False, True])
def test_load_tells_which_device_wakes(saved, tmp_path, started, woken, monkeypatch):
    if saved:
        ernie_accel.save(tiny_ernie(), tmp_path / "pipe")
    else:
        tiny_ernie().save_pretrained(tmp_path / "pipe")
    monkeypatch.setattr("ernie_accel.api.is_here", lambda device: True)
    monkeypatch.setattr(Context, "detect", classmethod(lambda cls, device=None, **_: H200))
    for name in ("load_pipeline", "read_saved"):
        monkeypatch.setattr(f"ernie_accel.api.{name}", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ernie_accel.load(tmp_path / "pipe", device="cuda:0")
    assert woken() == ["cuda:0"]


def test_reading_does_not_search_for_garbage_and_leaves_the_search_as_it_was(tmp_path, monkeypatch):
    tiny_ernie().save_pretrained(tmp_path / "original")
    ernie_accel.save(tiny_ernie(), tmp_path / "saved")
    found = []
    for module in (loading, reading):
        real = module.assemble
        monkeypatch.setattr(
            module, "assemble", lambda *given, real=real: (found.append(gc.isenabled()), real(*given))[1]
        )
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            ernie_accel.load(tmp_path / "original", device="cpu")
            ernie_accel.load(tmp_path / "saved", device="cpu")
            with pytest.raises(ernie_accel.ErnieAccelError):
                ernie_accel.load(tmp_path / "neither", device="cpu")
            assert gc.isenabled() is enabled
        finally:
            gc.enable()
    assert found == [False] * 4

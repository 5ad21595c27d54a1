"""Many pictures of changing sizes, prompts and batch sizes: what is kept between calls has a bound."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from benchmarks import cold_start, long_run

import ernie_accel
from ernie_accel import BatchPromptEncoding, CallDefaults, RewriteBlocks, RewriteTextEncoder
from ernie_accel.models.replays import Replays
from tests.pipelines import tiny_ernie

SOURCE = Path(ernie_accel.__file__).parent
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what the process holds")


def drawn(pictures: int, warm: int) -> float:
    """Draw pictures with a tiny pipe, and return by which part the memory of this process grew."""
    pipe = tiny_ernie()
    parts = RewriteBlocks(), BatchPromptEncoding(cache=8), RewriteTextEncoder(), CallDefaults("turbo")
    ernie_accel.optimize(pipe, *parts, on_unsupported="skip")
    samples = list(long_run.draw(pipe, "tiny", pictures, every=4, steps=1, collect=False))
    assert samples[-1].pictures == pictures
    return long_run.judge(samples, warm)["host"]


@ON_LINUX
def test_memory_of_the_host_stays_flat():
    assert drawn(32, warm=12) <= long_run.GROWTH


@ON_LINUX
@pytest.mark.slow
def test_memory_of_the_host_stays_flat_for_long():
    assert drawn(300, warm=long_run.WARM) <= long_run.GROWTH


def test_a_leak_is_noticed():
    flat = [long_run.Sample(10 * i, 1000, 500 if i > 4 else 10 * i) for i in range(1, 101)]
    assert set(long_run.judge(flat).values()) == {0.0}
    leaks = [long_run.Sample(10 * i, 1000 + i, 500) for i in range(1, 101)]
    assert long_run.judge(leaks)["host"] > long_run.GROWTH


def test_all_sizes_and_batches_come_early_and_prompts_differ():
    calls = list(long_run.calls("tiny", 200))
    assert sum(len(prompts) for _, _, prompts in calls) == 200
    seen, early = 0, set()
    for width, height, prompts in calls:
        if seen < long_run.WARM:
            early.add((width, height))
        seen += len(prompts)
    assert early == set(long_run.SIZES["tiny"])
    assert len({len(prompts) for _, _, prompts in calls}) > 1
    assert len({prompt for _, _, prompts in calls for prompt in prompts}) > 150


#: Functions that are cached without bound, and of what there are only a few.
FEW = {"_checker": "options", "_kernel": "cuts and devices"}
FEW |= dict.fromkeys(("_handle", "_shared_memory", "is_usable", "multiprocessors"), "devices")
FEW |= dict.fromkeys(("_by_mask_class", "_by_stacked", "_corrected_class", "_prepared_class"), "classes")


def test_every_cache_has_a_bound():
    """A new one gets a bound, or its arguments a reason why there are only a few of them."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                text = ast.unparse(decorator)
                if text.endswith(("functools.cache", "lru_cache(None)", "lru_cache(maxsize=None)")) or text == "cache":
                    found[node.name] = node.args.args
    unbounded = {name for name, arguments in found.items() if arguments}
    assert unbounded <= FEW.keys()


def test_graphs_go_once_there_are_more_than_are_kept():
    class Graph:
        def pool(self):
            return None

        def replay(self):
            pass

    replays = Replays(3, lambda work, pool: (Graph(), work()))
    for name in range(10):
        for _ in range(2):
            replays.run(name, lambda: None)
    assert replays.names == (7, 8, 9)
    assert len(replays) == 3


# ---- from process start to the first picture -------------------------------------------------------------------------


def test_the_table_of_a_cold_start_compares_with_a_saved_pipe_with_the_same_caches():
    run = {"imported_s": 2.0, "loaded_s": 4.0, "first_s": 6.0, "second_s": 6.5}
    runs = {"stock": [run | {"first_s": 30.0, "second_s": 31.0}], "preset": [run], "saved": [run]}
    again = runs | {"saved": [run | {"first_s": 5.0, "second_s": 5.5}]}
    sizes = {"original": 8 * 10**9, "saved": 4 * 10**9}
    found = {"size": "full", "device": "cuda", "cache": "warm", "bytes": sizes, "read_gb_s": 5.0, "bytecode": "there"}
    lines = list(cold_start.table(found | {"runs": runs, "again": again}))
    assert lines[2] == "| stock | empty | 30.0 s | 2.0 s | 2.0 s | 4.00 | 26.0 s | 1.00 s | 5.0x |"
    assert lines[4] == "| saved | empty | 6.0 s | 2.0 s | 2.0 s | 2.00 | 2.0 s | 0.50 s | 1.0x |"
    assert lines[5] == "| stock | of the process before | 30.0 s | 2.0 s | 2.0 s | 4.00 | 26.0 s | 1.00 s | 6.0x |"
    assert lines[-1].endswith("8.00 GB original, 4.00 GB saved; one thread reads 5.0 GB/s; bytecode there")


def test_processes_of_a_cold_start_find_bytecode(tmp_path, monkeypatch):
    package = tmp_path / "packages" / "some_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    (package / "broken.py").write_text("print 'for another Python'\n")
    monkeypatch.setattr(cold_start.sys, "path", [str(package.parent)])
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    environment, where = cold_start.bytecode(tmp_path, ["some_package"])
    assert "PYTHONDONTWRITEBYTECODE" not in environment
    assert Path(environment["PYTHONPYCACHEPREFIX"]) == tmp_path / "bytecode"
    assert [file.parent.name for file in (tmp_path / "bytecode").rglob("some_package/*.pyc")] == ["some_package"]
    assert where.startswith("written to the folder")
    cold_start.subprocess.run([sys.executable, "-m", "compileall", "-q", str(package / "__init__.py")], check=True)
    environment, where = cold_start.bytecode(tmp_path / "other", ["some_package"])
    assert "PYTHONPYCACHEPREFIX" not in environment
    assert where == "found with the packages"


def test_files_are_read_at_a_rate_and_dropped_from_the_cache(tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        file.write_bytes(bytes(2**20 + 5))
    assert cold_start.weights(tmp_path) == files
    assert cold_start.read_rate(files) > 0
    if hasattr(cold_start.os, "posix_fadvise"):
        cold_start.drop_from_cache(files)
    assert files[0].stat().st_size == 2**20 + 5


@pytest.mark.slow
def test_what_is_measured_is_a_fresh_process_in_miniature(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(cold_start.__file__).parent))
    folder = tmp_path / "work"
    folder.mkdir()
    made = cold_start.make(folder, "tiny", "cpu")
    assert "Quantize('int8-weight-only'" in made["report"]
    facts = cold_start.measure(folder, "tiny", "cpu", "saved", cold_start.time.time())
    assert facts["finite"]
    assert 0 < facts["imported_s"] <= facts["loaded_s"] < facts["first_s"] < facts["second_s"]


def test_graphs_share_the_memory_of_one_that_is_still_there():
    pools = []

    class Graph:
        def __init__(self, pool):
            pools.append(pool)
            self._pool = len(pools) if pool is None else pool

        def pool(self):
            return self._pool

        def replay(self):
            pass

    replays = Replays(2, lambda work, pool: (Graph(pool), work()))
    for name in ("a", "b", "c"):
        replays.run(name, lambda: None)
        replays.run(name, lambda: None)
    assert pools == [None, 1, 1]

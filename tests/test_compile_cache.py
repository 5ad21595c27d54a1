"""`Compile(cache=folder)`: the next process compiles nothing, gives the same bits, and no setting stays changed."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest
import torch

import ernie_accel
from ernie_accel import Compile, CompileVae, Context
from ernie_accel.models.compile_cache import InductorIn, compile_module
from tests.forked import Forked
from tests.pipelines import picture, tiny_ernie

#: A process of a user: a model of one block, one picture; then what the caches saw, and what is left of the settings.
PROCESS = """
import json, os, sys, types
import torch
import torch._functorch.config as autograd
import torch._inductor.config as inductor
import ernie_accel
from torch._dynamo.utils import counters

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, generator=torch.Generator().manual_seed(0)), False)
    def forward(self, x):
        return torch.nn.functional.gelu(x) * self.weight + x.sum(-1, keepdim=True)

class Model(torch.nn.Sequential):
    _repeated_blocks = ["Block"]

pipe = types.SimpleNamespace(transformer=Model(Block()))
pipe.components = {"transformer": pipe.transformer}
settings = lambda: [os.environ.get("TORCHINDUCTOR_CACHE_DIR"), os.environ.get("TRITON_CACHE_DIR"),
                    inductor.fx_graph_cache, autograd.enable_autograd_cache]
before = settings()
ernie_accel.Compile(cache=sys.argv[1]).apply(pipe, ernie_accel.Context.detect(device="cpu"))
with torch.no_grad():
    out = pipe.transformer(torch.linspace(-1, 1, 40).view(5, 8))
print(json.dumps({"out": out.tolist(), "hits": counters["inductor"]["fxgraph_cache_hit"],
                  "misses": counters["inductor"]["fxgraph_cache_miss"], "same_settings": settings() == before}))
"""


@pytest.mark.slow
def test_the_next_process_finds_what_the_first_compiled_and_damage_is_compiled_anew(tmp_path):
    folder, own = tmp_path / "kept" / "here", tmp_path / "own"
    # What each imports, and nothing that it compiled; with threads of its own, torch would start more processes ahead.
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(own), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    forked = Forked("torch._inductor.compile_fx", "torch._dynamo", "ernie_accel.transforms", environment=environment)

    def run_process():
        return json.loads(forked.lines(PROCESS, str(folder))[-1])

    first = run_process()
    assert (first["hits"], first["misses"]) == (0, 1)
    second = run_process()
    assert (second["hits"], second["misses"]) == (1, 0)
    assert second["out"] == first["out"]
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    third = run_process()
    assert third["hits"] == 0 and third["misses"] > 0
    torch.testing.assert_close(third["out"], first["out"])  # torch may take other instructions then, so not bitwise
    assert first["same_settings"] and second["same_settings"] and third["same_settings"]
    assert not [file for file in own.rglob("*") if file.is_file()]
    forked.close()


def test_all_blocks_share_one_graph_as_they_do_without_a_folder(tmp_path, monkeypatch):
    import torch._inductor

    graphs = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, _, options: graphs.append(graph) or graph.forward)
    torch._dynamo.reset()
    pipe = tiny_ernie(layers=3)
    expected = picture(pipe)
    ernie_accel.optimize(pipe, Compile(cache=tmp_path), context=Context("cuda", "a test", (9, 0)))
    assert torch.equal(picture(pipe), expected)
    assert torch.equal(picture(pipe, prompt="a red"), picture(ernie_accel.restore(pipe), prompt="a red"))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_settings_are_back_when_compiling_fails(tmp_path, monkeypatch):
    import torch._functorch.config as autograd
    import torch._inductor
    import torch._inductor.config as inductor

    seen = {}

    def fail(graph, inputs, options):
        seen.update({name: os.environ[name] for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")})
        seen["enabled"] = inductor.fx_graph_cache and autograd.enable_autograd_cache
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "theirs")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with inductor.patch(fx_graph_cache=False):
        with pytest.raises(RuntimeError, match="no compiler today"):
            InductorIn(str(tmp_path), None, True)(None, [])
        assert inductor.fx_graph_cache is False
    assert seen["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path)) and seen["enabled"]
    assert seen["TRITON_CACHE_DIR"].startswith(str(tmp_path))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "theirs" and "TRITON_CACHE_DIR" not in os.environ


def test_a_mode_reaches_inductor(tmp_path, monkeypatch):
    import torch._inductor

    seen = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: seen.append(options))
    InductorIn(str(tmp_path), "max-autotune-no-cudagraphs", True)(None, [])
    InductorIn(str(tmp_path), None, True)(None, [])
    assert seen == [torch._inductor.list_mode_options("max-autotune-no-cudagraphs"), None]


@pytest.mark.parametrize("transform", [Compile, CompileVae])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_changes(transform, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    pipe = tiny_ernie()
    with pytest.raises(ernie_accel.UnsupportedError, match="file is a file; give a folder"):
        ernie_accel.optimize(pipe, transform(cache=str(tmp_path / "file" / "cache")), context=Context("cuda", "a test"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    request = transform(cache=tmp_path / "new")
    assert request.unsupported(pipe, Context("cuda", "a test")) == [
        f"cache={str(tmp_path / 'new')!r}: {tmp_path} cannot be written to; give another folder"
    ]
    assert pipe.vae.decoder._compiled_call_impl is None and pipe.transformer.layers[0]._compiled_call_impl is None


def test_a_space_in_the_path_is_refused_where_a_command_line_would_break_at_it(tmp_path):
    request = Compile(cache=tmp_path / "my cache")
    assert ["space in" in reason for reason in request.unsupported(tiny_ernie(), Context("cpu", "a test"))] == [True]
    assert request.unsupported(tiny_ernie(), Context("cuda", "a test")) == []


@pytest.mark.parametrize("transform", [Compile, CompileVae])
def test_a_folder_is_plain_data(transform, tmp_path):
    assert transform(cache=tmp_path) == transform(cache=str(tmp_path))
    json.dumps(transform(cache=tmp_path).to_json())


def test_both_transforms_compile_with_files_in_the_folder(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, recompile_limit=0, **how: given.append(how))
    ernie_accel.optimize(
        tiny_ernie(layers=1), Compile(cache=tmp_path, mode="max-autotune"), CompileVae(cache=tmp_path),
        context=Context("cuda", "a test", (9, 0)),
    )  # fmt: skip
    assert given == [
        {"backend": InductorIn(str(tmp_path), "max-autotune", True), "fullgraph": True, "dynamic": True},
        {"backend": InductorIn(str(tmp_path), None, None), "fullgraph": True, "dynamic": None},
    ]


class _Scaled(torch.nn.Module):
    """Has one graph for each scale, as a block has one for each state of its LoRA."""

    scale = "0"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * int(self.scale)


@pytest.mark.parametrize("cache", [False, True], ids=["without folder", "folder"])
def test_a_block_may_have_more_graphs_than_torch_allows_by_default(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(InductorIn, "__call__", lambda self, graph, inputs: graph.forward)
    torch._dynamo.reset()
    block = _Scaled()
    compile_module(block, str(tmp_path) if cache else None, fullgraph=True)
    for scale in range(16):  # the default is 8
        block.scale = str(scale)
        assert block(torch.ones(2)).tolist() == [scale, scale]

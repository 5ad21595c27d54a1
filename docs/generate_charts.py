"""Draw the charts of the pages from saved benchmarks: ``python -m docs.generate_charts``; a test holds them to it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from docs.bar_chart import Bar, bar_chart
from docs.charts_zh import in_chinese

IMAGES = Path(__file__).parent / "images"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SOURCE = "benchmarks/results/{}.json"

#: File -> (title, results, [(label, rung)]), for charts of one figure a rung; the figure's key comes last.
BY_RUNG = {
    "parts": (
        "Beside the denoiser on an H200, ms",
        "parts_fused_h200_202611",
        (
            ("8 prompts encoded: the pipeline's loop", "prompts: stock"),
            ("BatchPromptEncoding", "prompts: BatchPromptEncoding"),
            ("BatchPromptEncoding and RewriteTextEncoder", "prompts: RewriteTextEncoder"),
            ("VAE decode: stock", "vae: stock"),
            ("CompileVae", "vae: CompileVae"),
            ("FuseVae", "vae: FuseVae"),
        ),
        "ms",
    ),
    "peers": (
        "Other libraries on an H200, ms per step at 1024x1024 px",
        "peers_h200_202611",
        (
            ("stock diffusers, bf16", "stock"),
            ("bitsandbytes nf4, weights only", "bnb-nf4"),
            ("SDNQ uint4", "sdnq-uint4"),
            ("SDNQ int8", "sdnq-int8"),
            ("SDNQ float8_e4m3fn", "sdnq-fp8"),
            ("preset turbo-fp8", "turbo-fp8"),
        ),
        "ms",
    ),
}
CAPS = (("stock, no cap", "fits_h200_202611", "stock"), *(
    (f"capped at {gb} GB", "fits_8gb_h200_202611" if gb == 8 else "fits_h200_202611", f"{gb} GB fp8")
    for gb in (24, 16, 12, 8)
))  # fmt: skip


#: What was measured in several runs: title and bars, (label, results, rung) each.
BY_RUNS = {
    "ladder": (
        "ERNIE-Image on an H200, ms per step at 1024x1024 px",
        (
            ("stock diffusers, bf16", "ladder_products", "stock"),
            ("with compile_repeated_blocks", "ladder_products", "stock+compile"),
            ("preset turbo-bf16, in an earlier run", "ladder_presets", "turbo-bf16"),
            ("torchao fp8, compiled", "ladder_products", "torchao-fp8+compile"),
            ("preset turbo-fp8", "ladder_products", "turbo-fp8"),
        ),
    ),
    "z_image": (
        "Z-Image-Turbo on an H200, ms per step at 1024x1024 px",
        (
            ("stock diffusers, bf16", "z_image_products", "stock"),
            ("with compile_repeated_blocks", "z_image_products", "stock+compile"),
            ("preset turbo-bf16", "z_image_products", "turbo-bf16"),
            ("torchao fp8, compiled", "z_image_products", "torchao-fp8+compile"),
            ("preset turbo-fp8", "z_image_products", "turbo-fp8"),
        ),
    ),
    "newbie": (
        "NewBie-image with guidance on an H200, ms per step at 1024x1024 px",
        (
            ("stock diffusers, bf16", "newbie_products", "stock"),
            ("with compile_repeated_blocks", "newbie_products", "compiled-bf16"),
            ("preset quality-bf16", "newbie_products", "quality-bf16"),
            ("torchao fp8, compiled", "newbie_products", "compiled-fp8"),
            ("preset quality-fp8", "newbie_products", "quality-fp8"),
        ),
    ),
}
#: A row of the table of samplers: its name, and the order that was measured.
ORDER = re.compile(r"^\| `(\w+)` \|.*\| ([\d.]+)( \(weak\))? \|$", re.MULTILINE)
#: A row of the table of diffusers' tests: a request, tests that pass on stock, with the request too, and lost ones.
TESTS = re.compile(r"^\| \*\*\d+ files\*\* \| `(.+)` \| (\d+) \| \d+ \| (\d+) \| (\d+) \|$", re.MULTILINE)

Say = Callable[[str], str]


def charts() -> dict[str, str]:
    """Return the text of every chart, by file name, in both languages."""
    drawn = {
        "fits": _fits,
        "batch": _batch,
        "schemes": _schemes,
        "lora": _lora,
        "orders": _orders,
        "diffusers_tests": _diffusers_tests,
    }
    return {
        f"{name}{ending}": text
        for ending, say in ((".svg", str), (".zh.svg", in_chinese))
        for name, text in (*_by_rung(say), *_by_runs(say), *((name, draw(say)) for name, draw in drawn.items()))
    }


def _by_runs(say: Say) -> Iterator[tuple[str, str]]:
    for name, (title, shown) in BY_RUNS.items():
        figures = ((label, _rung(f"{results}_h200_202611", rung)["ms_1024"]) for label, results, rung in shown)
        bars = [Bar(label, (ms,), f"{ms:.1f} ms") for label, ms in figures]
        yield name, bar_chart(title, bars, note=f"benchmarks/results/{name}*h200_202611.json", say=say)


def _lora(say: Say) -> str:
    runs = [_read(name)["rows"] for name in ("lora_h200_202611", "lora_all_h200_202611")]
    rows = sorted(itertools.chain(*runs), key=lambda row: (row["layers"] == "all", row["rank"]))
    bars = []
    for _, those in itertools.groupby(rows, key=lambda row: (row["layers"], row["rank"])):
        for number, row in enumerate(those):
            layers = {"attention": "attention", "all": "all layers"}[row["layers"]]
            label = "second run" if number else f"{layers}, rank {row['rank']}"
            bars.append(Bar(label, (row["percent"],), f"{row['percent']:.1f} %"))
    title = "What a LoRA adds to a step of turbo-fp8 on an H200"
    return bar_chart(title, bars, note="benchmarks/results/lora*_h200_202611.json", say=say)


def _orders(say: Say) -> str:
    bars = [
        Bar(f"{name}: weak order" if weak else name, (float(order),), order)
        for name, order, weak in ORDER.findall(_page("schedulers"))
    ]
    return bar_chart("Order of convergence, measured", bars, note="by tests/test_scheduler_solvers.py", say=say)


def _diffusers_tests(say: Say) -> str:
    bars = [
        Bar(request, (int(both), int(lost)), f"{both}/{stock}")
        for request, stock, both, lost in TESTS.findall(_page("lifecycle"))
    ]
    title, series = "Diffusers' own tests that pass on stock, by request", ("pass with the request too", "lost")
    return bar_chart(title, bars, series, note="by nox -s diffusers", say=say)


def _page(name: str) -> str:
    return (Path(__file__).parent / f"{name}.md").read_text(encoding="utf-8")


def _by_rung(say: Say) -> Iterator[tuple[str, str]]:
    for name, (title, results, rows, key) in BY_RUNG.items():
        figures = ((label, _rung(results, rung)[key]) for label, rung in rows)
        bars = [Bar(label, (ms,), f"{ms:.1f} ms") for label, ms in figures]
        yield name, bar_chart(title, bars, note=SOURCE.format(results), say=say)


def _rung(results: str, name: str) -> dict[str, Any]:
    """Return one rung of a results file."""
    (found,) = (rung for rung in _read(results)["rungs"] if rung["rung"] == name)
    return dict(found)


def _fits(say: Say) -> str:
    bars = []
    for label, results, name in CAPS:
        rung = _rung(results, name)
        bars.append(Bar(f"{label}: enhancer off", (rung["off_s"],), f"{rung['off_s']:.2f} s"))
        bars.append(Bar(f"{label}: enhancer on", (0, rung["on_s"]), f"{rung['on_s']:.2f} s"))
    title = "A picture on an H200 under a cap of memory, s"
    series = ("enhancer off", "enhancer on")
    return bar_chart(title, bars, series, note="benchmarks/results/fits_*h200_202611.json", say=say)


def _batch(say: Say) -> str:
    found = _read("batch_h200_202611")
    bars = [Bar("stock pipe, one by one", (found["loop_pictures_per_min"],), f"{found['loop_pictures_per_min']:.0f}")]
    bars += [
        Bar(f"batch, preset {each['preset']}", (each["pictures_per_min"],), f"{each['pictures_per_min']:.0f}")
        for each in found["candidates"]
    ]
    title = "Pictures per minute on an H200, 512 px, 8 steps"
    return bar_chart(title, bars, note=SOURCE.format("batch_h200_202611"), say=say)


def _schemes(say: Say) -> str:
    bars = [
        Bar(
            " by ".join(each for each in (row["scheme"], row["backend"]) if each != "-"),
            (row["bytes"] / 1e6,),
            f"{row['bytes'] / 1e6:.0f} MB, {row['compiled_ms']:.1f} ms",
        )
        for row in _read("quantization_h200_202611")["rows"]
    ]
    title = "A full-size block on an H200: bytes, and ms compiled"
    return bar_chart(title, bars, note=SOURCE.format("quantization_h200_202611"), say=say)


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    for name, text in charts().items():
        (IMAGES / name).write_text(text, encoding="utf-8")

"""Draw the charts of the pages from saved benchmarks: ``python -m docs.generate_charts``; a test holds them to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.bar_chart import Bar, bar_chart

IMAGES = Path(__file__).parent / "images"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SOURCE = "benchmarks/results/{}.json"

#: File -> (title, results, [(label, rung)]), for charts of one figure a rung; the figure's key comes last.
BY_RUNG = {
    "ladder": (
        "ERNIE-Image on an H200, ms per step at 1024x1024 px",
        "ladder_presets_h200_202611",
        (
            ("stock diffusers, bf16", "stock"),
            ("with compile_repeated_blocks", "stock+compile"),
            ("preset turbo-bf16", "turbo-bf16"),
            ("torchao fp8, compiled", "torchao-fp8+compile"),
            ("preset turbo-fp8", "turbo-fp8"),
        ),
        "ms_1024",
    ),
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


def charts() -> dict[str, str]:
    """Return the text of every chart, by file name."""
    return {
        f"{name}.svg": text
        for name, text in (*_by_rung(), ("fits", _fits()), ("batch", _batch()), ("schemes", _schemes()))
    }


def _by_rung() -> Iterator[tuple[str, str]]:
    for name, (title, results, rows, key) in BY_RUNG.items():
        rungs = {rung["rung"]: rung for rung in _read(results)["rungs"]}
        bars = [Bar(label, (rungs[rung][key],), f"{rungs[rung][key]:.1f} ms") for label, rung in rows]
        yield name, bar_chart(title, bars, note=SOURCE.format(results))


def _fits() -> str:
    bars = []
    for label, results, name in CAPS:
        (rung,) = (rung for rung in _read(results)["rungs"] if rung["rung"] == name)
        bars.append(Bar(f"{label}: enhancer off", (rung["off_s"],), f"{rung['off_s']:.2f} s"))
        bars.append(Bar(f"{label}: enhancer on", (0, rung["on_s"]), f"{rung['on_s']:.2f} s"))
    title = "A picture on an H200 under a cap of memory, s"
    return bar_chart(title, bars, ("enhancer off", "enhancer on"), note="benchmarks/results/fits_*h200_202611.json")


def _batch() -> str:
    found = _read("batch_h200_202611")
    bars = [Bar("stock pipe, one by one", (found["loop_pictures_per_min"],), f"{found['loop_pictures_per_min']:.0f}")]
    bars += [
        Bar(f"batch, preset {each['preset']}", (each["pictures_per_min"],), f"{each['pictures_per_min']:.0f}")
        for each in found["candidates"]
    ]
    title = "Pictures per minute on an H200, 512 px, 8 steps"
    return bar_chart(title, bars, note=SOURCE.format("batch_h200_202611"))


def _schemes() -> str:
    bars = [
        Bar(
            " by ".join(each for each in (row["scheme"], row["backend"]) if each != "-"),
            (row["bytes"] / 1e6,),
            f"{row['bytes'] / 1e6:.0f} MB, {row['compiled_ms']:.1f} ms",
        )
        for row in _read("quantization_h200_202611")["rows"]
    ]
    title = "A full-size block on an H200: bytes, and ms compiled"
    return bar_chart(title, bars, note=SOURCE.format("quantization_h200_202611"))


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    for name, text in charts().items():
        (IMAGES / name).write_text(text, encoding="utf-8")

"""Write a page for each size of card: ``python -m docs.generate_cards``; ``--plan`` plans anew first (four minutes).

Each page is also written in Chinese, by the sentences in docs/cards_zh.py.

What the pages predict is in ``docs/cards/figures.json``, as ``plan`` works it out from the published configurations;
what they say of speed comes from ``benchmarks/results`` and from the table of devices. Nothing is typed by hand.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from docs.bar_chart import Bar, bar_chart
from docs.cards_zh import in_chinese
from docs.charts_zh import in_chinese as words_in_chinese

import ernie_accel
from ernie_accel import Context
from ernie_accel.core.components import pipe_bytes
from ernie_accel.core.hardware import HARDWARE, Hardware
from ernie_accel.storage.reading import forgetful
from ernie_accel.storage.skeleton import skeleton

FOLDER = Path(__file__).parent / "cards"
FIGURES = FOLDER / "figures.json"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
GIB = 2**30

MODELS = ("baidu/ERNIE-Image-Turbo", "Tongyi-MAI/Z-Image-Turbo", "NewBie-AI/NewBie-image-Exp0.1")
ERNIE = MODELS[0]
#: Page -> (title, cards by their keys in the table of devices).
PAGES = {
    "8gb": ("8 GB", ("rtx4060", "rtx4060ti")),
    "12gb": ("12 GB", ("rtx3060",)),
    "16gb": ("16 GB", ("rtx4060ti16gb", "rtx4080", "t4")),
    "24gb": ("24 and 32 GB", ("rtx3090", "rtx4090", "l4", "rtx5090")),
    "48gb": ("40 and 48 GB", ("a10040gb", "a6000", "l40s")),
    "80gb": ("80 GB and more", ("a100", "h100", "h200", "b200")),
    "ascend": ("Ascend", ("ascend910b",)),
}
#: What an H200 with so much of its memory measured, for the pages of such cards.
MEASURED = {
    "8gb": ("fits_8gb_h200_202611", "8 GB fp8"),
    "12gb": ("fits_h200_202611", "12 GB fp8"),
    "16gb": ("fits_h200_202611", "16 GB fp8"),
    "24gb": ("fits_h200_202611", "24 GB fp8"),
}
STEPS = 8
LINES = """\
```python
import ernie_accel

pipe = ernie_accel.load("baidu/ERNIE-Image-Turbo", preset="auto")
pipe("a lighthouse at dusk").images[0].save("lighthouse.png")
```
"""


def planned(model: str, card: str) -> dict[str, Any]:
    """Return what `load(model, preset="auto")` would do on a card, from shapes alone."""
    pipe = _skeleton(model)
    context = Context.named(card)
    # The least that is promised: the extra cudnn is left out, which needs Hopper and saves some memory there.
    context = replace(context, versions={name: each for name, each in context.versions.items() if name != "cudnn"})
    preset = ernie_accel.recommend(context, pipe).preset
    asked = map(forgetful, preset.transforms_on(pipe))
    plan = ernie_accel.plan(pipe, *asked, preset=preset, context=context, memory="auto")
    memory = plan.memory
    if memory is None or memory.budget is None or not memory.fits:
        raise SystemExit(f"{model} on {card} has no plan that fits:\n{plan}")
    fullest = max(memory.stages, key=lambda stage: stage.total)
    return {
        "preset": preset.name,
        "budget": memory.budget,
        "weights": fullest.weights,
        "computing": fullest.total - fullest.weights,
        "spare": memory.spare,
        "host": memory.host,
        "why": list(memory.why),
    }


def weights(model: str) -> dict[str, int]:
    """Return the bytes of a model's weights in bfloat16, and of its prompt enhancer among them."""
    pipe = _skeleton(model)
    enhancer = getattr(pipe, "pe", None)
    return {
        "all": pipe_bytes(pipe),
        "enhancer": 0 if enhancer is None else sum(each.nbytes for each in enhancer.parameters()),
    }


@cache
def _skeleton(model: str) -> Any:
    return skeleton(model, torch.bfloat16)


def all_figures() -> dict[str, Any]:
    """Plan everything that the pages show."""
    cards = [card for _, keys in PAGES.values() for card in keys]
    return {model: {card: planned(model, card) for card in cards} | {"cpu": weights(model)} for model in MODELS}


def files() -> dict[str, str]:
    """Return the text of every file in docs/cards, by name, from the figures that are kept there."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    made = {"index.md": index(figures), "cpu.md": cpu_page(figures)}
    for page in PAGES:
        made[f"{page}.md"] = card_page(page, figures)
    for ending, say in ((".svg", str), (".zh.svg", words_in_chinese)):
        made |= {f"{page}{ending}": chart(page, figures, say) for page in PAGES}
        made |= {f"index{ending}": every_card(figures, say), f"cpu{ending}": cpu_chart(figures, say)}
    return made | {
        name.replace(".md", ".zh.md"): in_chinese(text) for name, text in made.items() if name.endswith(".md")
    }


def chart(page: str, figures: dict[str, Any], say: Callable[[str], str] = str) -> str:
    """Draw what each card of a page will hold."""
    bars = [
        memory_bar(f"{short(model)} on {named(card)}", figures[model][card])
        for card in PAGES[page][1]
        for model in MODELS
    ]
    return bar_chart("Predicted device memory, GiB", bars, SERIES, "may be used", PREDICTED, say)


def every_card(figures: dict[str, Any], say: Callable[[str], str] = str) -> str:
    """Draw what ERNIE-Image-Turbo will hold on each card of all pages."""
    found = {card: figures[ERNIE][card] for _, cards in PAGES.values() for card in cards}
    bars = [memory_bar(f"preset {each['preset']} on {named(card)}", each) for card, each in found.items()]
    bars = [replace(bar, limit=None) for bar in bars]  # 180 GB would leave little room for the bars
    title = "Predicted device memory of ERNIE-Image-Turbo, GiB"
    return bar_chart(title, bars, SERIES, note=PREDICTED, say=say)


SERIES = ("weights", "computing", "graphs, allocator")
PREDICTED = "by ernie-accel plan, 1024x1024 px"


def memory_bar(label: str, found: dict[str, Any]) -> Bar:
    """Return the bar of what was predicted, with its limit."""
    parts = (found["weights"] / GIB, found["computing"] / GIB, found["spare"] / GIB)
    return Bar(label, parts, f"{needed(found) / GIB:.1f} GiB", found["budget"] / GIB)


def cpu_chart(figures: dict[str, Any], say: Callable[[str], str] = str) -> str:
    """Draw what the weights of each model take in each dtype."""
    bars = []
    for model in MODELS:
        found = figures[model]["cpu"]
        rows = [("float32", 2 * found["all"]), ("bfloat16", found["all"])]
        if found["enhancer"]:
            rows.append(("bfloat16, without the enhancer", found["all"] - found["enhancer"]))
        bars += [Bar(f"{short(model)} in {kind}", (nbytes / 1e9,), _gb(nbytes)) for kind, nbytes in rows]
    return bar_chart("Weights in host memory, GB", bars, note="by the published configurations", say=say)


def card_page(page: str, figures: dict[str, Any]) -> str:
    """Return the page of one size of card."""
    title, cards = PAGES[page]
    names = ", ".join(named(card) for card in cards)
    return "\n".join(
        [
            f"# {title}\n",
            f"For {names}, and other cards with as much memory. ERNIE-Image-Turbo, with its prompt enhancer:\n",
            LINES,
            _ASCEND if page == "ascend" else _TORCHAO,
            _ELSEWHERE,
            "## Predicted memory\n",
            f"![Predicted device memory, in GiB, for each model and card]({page}.svg)\n",
            '<div class="wide" markdown>\n',
            *memory_table(cards, figures),
            "\n</div>\n",
            _PREDICTED,
            "```sh",
            *(f"ernie-accel plan --device {card}" for card in cards),
            f"ernie-accel plan --device {cards[0]} --model {MODELS[1]} --width 1264 --height 848",
            "```\n",
            "## What to expect\n",
            *expectations(page, cards, figures),
            "",
            *sources(page, cards),
            "",
        ]
    )


_TORCHAO = """\
Install the extra `torchao` with it: `pip install 'ernie-accel[torchao]'`.
"""
_ASCEND = """\
It needs Ascend's own build of torch: `pip install 'ernie-accel[npu]'`, on a machine with its drivers. The preset was
tested on a stand-in for the device only; [Performance](../performance.md) says what is known.
"""
_ELSEWHERE = """\
The model may also be a folder, for instance from ModelScope. Then nothing needs to be online:
[where the model comes from](../tutorials/first-picture.md#where-the-model-comes-from).
"""
_PREDICTED = """\
Nothing was run for these figures. `ernie-accel plan` works them out from the shapes of the published configurations,
for one picture of 1024x1024 px, and does the same for your card and your sizes:
"""


def memory_table(cards: tuple[str, ...], figures: dict[str, Any]) -> Iterator[str]:
    """Yield the table of what is chosen and held."""
    yield "| model | card | preset | device memory | may be used | host memory | how it fits |"
    yield "|---|---|---|---|---|---|---|"
    for model in MODELS:
        for card in cards:
            found = figures[model][card]
            yield (
                f"| {short(model)} | {named(card)} | `{found['preset']}` "
                f"| {needed(found) / GIB:.1f} GiB | {found['budget'] / GIB:.1f} GiB | {_gib(found['host'])} "
                f"| {'; '.join(why for why in found['why'] if 'restore()' not in why)} |"
            )


def expectations(page: str, cards: tuple[str, ...], figures: dict[str, Any]) -> Iterator[str]:
    """Yield what is known of speed: measured, published, or bounded."""
    yield "One picture of ERNIE-Image-Turbo, 1024x1024 px, 8 steps, without the prompt enhancer:\n"
    yield "| card | at best | published | why this preset |"
    yield "|---|---|---|---|"
    for card in cards:
        row, found = HARDWARE[card], figures[ERNIE][card]
        seconds = at_best(row, found["preset"])
        said = row.why.removeprefix("published: ") if row.evidence == "published" else "-"
        why = "by what is published" if row.evidence == "published" else row.why
        yield f"| {named(card)} | {'-' if seconds is None else f'{seconds:.1f} s'} | {said} | {why} |"
    products, attention = work()
    yield _AT_BEST.format(products=products, attention=attention, sustained=sustained())
    if page in MEASURED:
        file, name = MEASURED[page]
        (rung,) = (rung for rung in _rungs(file) if rung["rung"] == name)
        (stock,) = (rung for rung in _rungs(file) if rung["rung"] == "stock")
        yield _CAPPED.format(rung=rung, stock=stock, ratio=rung["off_s"] / stock["off_s"])
    elif page == "80gb":
        rungs = {rung["rung"]: rung for rung in _rungs("ladder_presets_h200_202611")}
        yield _UNCAPPED.format(stock=rungs["stock"], turbo=rungs["turbo-fp8"])
    else:
        yield "\nNothing was measured on these cards."
    yield "\nThe [first picture](../performance.md#presets) takes seconds longer, because kernels are compiled."


_AT_BEST = """
**At best** is a bound, not a forecast. It is the time of eight steps ({products:.0f} TFLOP each in matrix products,
{attention:.0f} in attention) at the card's published peak rates.
An H200 sustains {sustained:.0%} of its published peak in such products, so expect more."""
_CAPPED = """
**Measured** on an H200 whose memory was capped at {rung[cap_gib]} GB, with preset `turbo-fp8`:
{rung[off_s]:.2f} s a picture, where stock diffusers without a cap took {stock[off_s]:.2f} s ({ratio:.2f} x).
With the prompt enhancer it was {rung[on_s]:.2f} s against {stock[on_s]:.2f} s.
The peak in use was {rung[peak_gib]:.2f} GiB, and {rung[predicted_peak_gib]:.2f} GiB were predicted.
A smaller card computes and fetches more slowly than an H200."""
_UNCAPPED = """
**Measured** on an H200 with `ernie-accel[cudnn]`: {turbo[picture_ms]:.0f} ms a picture with preset `turbo-fp8`,
where stock diffusers took {stock[picture_ms]:.0f} ms. The first picture took {turbo[first_picture_s]:.1f} s."""


def sources(page: str, cards: tuple[str, ...]) -> Iterator[str]:
    """Yield where the figures come from."""
    yield "## Sources\n"
    yield "| figure | source |"
    yield "|---|---|"
    yield "| device memory, host memory, what is chosen | `ernie-accel plan`, kept in `docs/cards/figures.json` |"
    for card in cards:
        row = HARDWARE[card]
        yield f"| {named(card)}: memory | {row.source} |"
        if rates := row.published():
            yield f"| {named(card)}: rates | {rates.source} |"
    yield "| TFLOP of a step, share of the peak | `benchmarks/results/ladder_presets_h200_202611.json` |"
    yield "| published seconds | the library's table of devices, `src/ernie_accel/core/hardware.py` |"
    if page in MEASURED:
        yield f"| measured under a cap | `benchmarks/results/{MEASURED[page][0]}.json` |"


def cpu_page(figures: dict[str, Any]) -> str:
    """Return the page of machines without an accelerator."""
    sizes = {model: figures[model]["cpu"] for model in MODELS}
    rows = [
        f"| {short(model)} | {_gb(2 * found['all'])} | {_gb(found['all'])} "
        f"| {_gb(found['all'] - found['enhancer']) if found['enhancer'] else '-'} |"
        for model, found in sizes.items()
    ]
    return _CPU.format(lines=LINES.replace('preset="auto"', _CPU_OPTIONS), elsewhere=_ELSEWHERE, rows="\n".join(rows))


_CPU_OPTIONS = 'preset="auto", dtype="bfloat16", prompt_enhancer=False'
_CPU = """\
# CPU

A full-size model takes minutes a picture on a CPU. Use one if there is nothing else, or to try a script.
ERNIE-Image-Turbo in bfloat16, without its prompt enhancer:

{lines}
{elsewhere}
## Memory

Weights, by the published configurations. Computing needs some GB more.

![Weights of each model in each dtype, in GB](cpu.svg)

| model | float32 | bfloat16 | bfloat16, without the enhancer |
|---|---|---|---|
{rows}

`dtype="bfloat16"` halves the bytes. Whether it is also faster depends on the CPU: `ernie-accel demo` measures that.

## What to expect

No full-size model was timed on a CPU. `torch.compile` needs a C++ compiler and takes
[some 40 s](../batch.md#compiling) at the first picture. Without a compiler, pass `on_unsupported="skip"`; the report
says what was left out.

To see what the library does, run `ernie-accel demo`. It draws with [a small trained model](../embedded-model.md), in
seconds.
"""


def index(figures: dict[str, Any]) -> str:
    """Return the page that leads to the others."""
    rows = []
    for page, (title, cards) in PAGES.items():
        found = [figures[ERNIE][card] for card in cards]
        presets = ", ".join(dict.fromkeys(f"`{each['preset']}`" for each in found))
        least, most = min(map(needed, found)) / GIB, max(map(needed, found)) / GIB
        holds = f"{least:.1f} GiB" if f"{least:.1f}" == f"{most:.1f}" else f"{least:.1f} to {most:.1f} GiB"
        names = ", ".join(named(card) for card in cards)
        rows.append(f"| [{title}]({page}.md) | {names} | {presets} | {holds} |")
    return _INDEX.format(lines=LINES, rows="\n".join(rows))


_INDEX = """\
# Your card

The same lines run ERNIE-Image-Turbo on each of these, and bring the weights to the device in the fastest way that fits:

{lines}
What they choose, and the device memory that ERNIE-Image-Turbo is predicted to need:

![Predicted device memory of ERNIE-Image-Turbo on each card, in GiB](index.svg)

| page | cards | preset | device memory |
|---|---|---|---|
{rows}
| [CPU](cpu.md) | any machine | `turbo-fp32` | - |

`ernie-accel recommend` says what fits the card that is here, and `ernie-accel recommend --device "RTX 3060"` what fits
another. A card that is not in the library's table is described by its compute capability and memory:
`--device cuda:8.9:16GiB`.
[It fits](../memory.md) explains how the choice is made.
"""


def needed(found: dict[str, Any]) -> int:
    """Return the bytes of device memory that were predicted."""
    return int(found["weights"] + found["computing"] + found["spare"])


def at_best(row: Hardware, preset: str) -> float | None:
    """Return the seconds that eight steps take at a card's published peaks at least; None where no peak is known."""
    rates = row.published()
    if rates is None:
        return None
    halves = rates.bf16_tflops or rates.fp16_tflops
    kinds = {"fp8": rates.fp8_tflops, "int8": rates.int8_tops, "bf16": halves, "fp16": halves}
    of_products = kinds.get(preset.split("-")[1])
    if halves is None or of_products is None:
        return None
    products, attention = work()
    return STEPS * (products / of_products + attention / halves)


@cache
def work() -> tuple[float, float]:
    """Return the TFLOP of a step of ERNIE-Image at 1024 px: in products, and in attention.

    The ladder computes a step's time at the sustained rates of bf16 and of fp8, with attention in bf16 in both.
    """
    found = json.loads((RESULTS / "ladder_presets_h200_202611.json").read_text(encoding="utf-8"))["ceilings"]
    bf16, fp8, attention = found["bf16_tflops"], found["fp8_tflops"], found["attention_tflops"]
    both = found["roofline_bf16_ms"], found["roofline_fp8_ms"]
    products = (both[0] - both[1]) / 1000 / (1 / bf16 - 1 / fp8)
    return products, (both[0] / 1000 - products / bf16) * attention


def sustained() -> float:
    """Return the share of its published peak in fp8 that an H200 sustains."""
    found = json.loads((RESULTS / "ladder_presets_h200_202611.json").read_text(encoding="utf-8"))["ceilings"]
    rates = HARDWARE["h200"].published()
    assert rates is not None
    assert rates.fp8_tflops is not None
    return float(found["fp8_tflops"]) / rates.fp8_tflops


def _rungs(name: str) -> list[dict[str, Any]]:
    return list(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rungs"])


def named(card: str) -> str:
    """Return a card's name without its maker's, with its memory where others have the same name."""
    row = HARDWARE[card]
    name = row.name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    twins = sum(other.name == row.name for other in HARDWARE.values()) > 1
    return f"{name} {row.memory_bytes // GIB} GB" if twins and row.memory_bytes else name


def short(model: str) -> str:
    """Return a model's name without its owner."""
    return model.split("/")[1]


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes else "-"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    if "--plan" in sys.argv:
        logging.disable(logging.WARNING)
        FIGURES.write_text(json.dumps(all_figures(), indent=1) + "\n", encoding="utf-8")
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")

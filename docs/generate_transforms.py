"""Write docs/transforms.md from the code: ``python docs/generate_transforms.py``; a test holds the file to it."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path

from ernie_accel import Effect, Transform
from ernie_accel.core.context import OPTIONAL_PACKAGES
from ernie_accel.transforms import TRANSFORMS, transform_class

PAGE = Path(__file__).parent / "transforms.md"
INTRODUCTION = """\
# Transforms

Every transform of the catalogue, in the order in which they run. `ernie_accel.plan(pipe, ...)` says what each would
change in your pipe on your machine, or why it cannot run.

`docs/generate_transforms.py` writes this page from the docstrings. Figures without another source were measured on an
NVIDIA H200 at 1024x1024, batch 1.
"""
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
LADDER, PARTS, FUSED = "ladder_h200_202611", "parts_h200_202611", "parts_fused_h200_202611"
#: Transform -> (result file, what is timed, its column, without, with), of those that were timed one by one.
MEASURED = {
    "RewriteBlocks": ((LADDER, "a step, both compiled", "ms_1024", "stock+compile", "rewrite+compile"),),
    "FuseKernels": (
        (LADDER, "a step in bfloat16 instead of RewriteBlocks compiled", "ms_1024", "rewrite+compile", "turbo-bf16"),
        (LADDER, "a step in fp8 instead of torchao's compiled", "ms_1024", "torchao-fp8+compile", "turbo-fp8"),
    ),
    "Quantize": ((LADDER, "a step in fp8, both compiled", "ms_1024", "stock+compile", "torchao-fp8+compile"),),
    "Compile": ((LADDER, "a step of stock blocks", "ms_1024", "stock", "stock+compile"),),
    "CompileVae": ((FUSED, "a decode", "ms", "vae: stock", "vae: CompileVae"),),
    "FuseVae": ((FUSED, "a decode", "ms", "vae: stock", "vae: FuseVae"),),
    "MakeContiguous": ((PARTS, "an eager decode, channels_last", "ms", "vae: stock", "vae: channels_last"),),
    "BatchPromptEncoding": ((FUSED, "8 prompts", "ms", "prompts: stock", "prompts: BatchPromptEncoding"),),
    "RewriteTextEncoder": (
        (FUSED, "8 prompts, batched", "ms", "prompts: BatchPromptEncoding", "prompts: RewriteTextEncoder"),
    ),
    "RewriteEnhancer": (
        (PARTS, "a prompt", "ms", "enhancer: stock", "enhancer: RewriteEnhancer"),
        (PARTS, "8 prompts", "ms", "8 prompts enhanced: stock", "8 prompts enhanced: RewriteEnhancer"),
    ),
}


def page() -> str:
    """Return the whole page."""
    classes = sorted(map(transform_class, TRANSFORMS), key=lambda cls: (cls.phase, cls.slot))
    return INTRODUCTION + "".join("\n" + "\n".join(section(cls)) + "\n" for cls in classes)


def section(cls: type[Transform]) -> Iterator[str]:
    """Yield the lines of one transform: what it does, when it pays, its facts, what was measured, its arguments."""
    text, sections = split_docstring(inspect.getdoc(cls) or "")
    yield f"## {cls.__name__}\n"
    yield text.replace("``", "`")
    if "Pays" in sections:
        yield f"\n**When it pays:** {' '.join(sections['Pays'].split())}".replace("``", "`")
    yield "\n| | |\n|---|---|"
    yield f"| call | `{signature(cls)}` |"
    yield f"| phase, slot | {cls.phase.name}, `{cls.slot}` |"
    yield f"| effect | {effect(cls)} |"
    yield f"| needs | {needs(cls)} |"
    yield f"| undo | {undo(cls)} |"
    yield f"| measured | {'; '.join(measured(cls)) or 'not separately'} |"
    if "Attributes" in sections:
        yield ""
        yield from (f"- {line}".replace("``", "`") for line in attributes(sections["Attributes"]))


def split_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """Return the prose of a Google-style docstring, and its sections by name."""
    sections: dict[str, str] = {}
    prose, name = [], ""
    for line in doc.splitlines():
        if line.endswith(":") and line[:-1].isidentifier() and not line.startswith(" "):
            name = line[:-1]
            sections[name] = ""
        elif name:
            sections[name] += line + "\n"
        else:
            prose.append(line)
    return "\n".join(prose).strip(), {name: textwrap.dedent(body).strip() for name, body in sections.items()}


def attributes(body: str) -> Iterator[str]:
    """Yield one Markdown line for each attribute."""
    joined = body.replace("\n    ", " ")
    for line in joined.splitlines():
        name, _, what = line.partition(": ")
        yield f"`{name}`: {what}"


def signature(cls: type[Transform]) -> str:
    """Return how the transform is written, with its defaults."""
    return f"{cls.__name__}({', '.join(map(argument, (f for f in fields(cls) if f.init)))})"


def argument(field: Field[object]) -> str:
    """Return one argument of a call, with its default."""
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return field.name if default is MISSING else f"{field.name}={default!r}"


def effect(cls: type[Transform]) -> str:
    """Return the effect, and those of its arguments that change it."""
    words = {
        Effect.EXACT: "the same bits",
        Effect.ROUNDING: "rounding only",
        Effect.LOSSY: "loses bits, above a floor in dB that the plan shows",
        Effect.RESAMPLES: "another picture by design",
    }
    declared = inspect.getattr_static(cls, "effect")
    usual = cls().effect if isinstance(declared, property) else declared
    other = [e for e in Effect if e is not usual and f"Effect.{e.name}" in inspect.getsource(cls)]
    also = "".join(f"; with some arguments `{e.value}`: {words[e]}" for e in other)
    return f"`{usual.value}`: {words[usual]}{also}"


def needs(cls: type[Transform]) -> str:
    """Return the pip extra a transform needs."""
    if cls.extra is not None:
        return f"`pip install 'ernie-accel[{cls.extra}]'`"
    own = Path(inspect.getfile(cls))
    modules = own.parent.glob("*.py") if own.stem == own.parent.name else [own]  # a package of its own: all of it
    source = "".join(module.read_text(encoding="utf-8") for module in modules)
    extras = [f"`{extra}`" for package, extra in OPTIONAL_PACKAGES.items() if f'"{package}"' in source]
    plural = "s" if len(extras) > 1 else ""
    return f"nothing; for some arguments the extra{plural} {', '.join(extras)}" if extras else "nothing"


def undo(cls: type[Transform]) -> str:
    """Return whether it can be undone, from the receipts that `apply` writes."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    given = (node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "no_undo")
    reasons = [
        each.args[0].value
        for each in given
        if isinstance(each, ast.Call) and each.args and isinstance(each.args[0], ast.Constant)
    ]
    return "; ".join(["exact", *(f"none with {reason}" for reason in reasons)])


def measured(cls: type[Transform]) -> Iterator[str]:
    """Yield what the saved benchmarks say of a transform, a pair of times each."""
    for name, what, column, without, having in MEASURED.get(cls.__name__, ()):
        rungs = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rungs"]
        before, after = (next(rung[column] for rung in rungs if rung["rung"] == asked) for asked in (without, having))
        yield f"{what}: {before:.0f} -> {after:.0f} ms (`benchmarks/results/{name}.md`)"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

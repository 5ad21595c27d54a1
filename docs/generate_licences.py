"""Write docs/licences.md: the licences of what the package needs or can use, as the installed releases declare them.

    python docs/generate_licences.py

A package that is not installed keeps its row; to have all: ``pip install '.[all,onnx,cudnn]'``.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licences.md"

HEAD = """# Licences

ernie_accel is under the Apache License 2.0: see `LICENSE`. <!-- written by docs/generate_licences.py -->

## What the package contains

| part | licence |
|---|---|
| the code | Apache-2.0 |
| the embedded model with its tokenizers | Apache-2.0 |
| fonts, pictures | none |

`tools/embedded_model` trained the embedded model for this package, from random weights. A program drew the pictures
that it learned from and wrote their captions; no pictures, texts or weights of others went into it.

The package contains no weights of published models. ERNIE-Image, Z-Image and NewBie-image have licences of their own;
read them where you download the weights.

## What it needs, and what it can use

pip installs these packages; none of them is part of this one. Each licence is what the project declares in its own
metadata. torch's wheels for CUDA bring NVIDIA's libraries, which are under NVIDIA's own terms.

| package | for | licence |
|---|---|---|
"""
ROW = re.compile(r"^\| ([\w.-]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
#: What some declare in words, or as the text itself.
_SPDX = {
    "apache software license": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache": "Apache-2.0",
    "bsd license": "BSD",
    "bsd-3-clause license": "BSD-3-Clause",
    "mit license": "MIT",
}
#: What only the text itself has.
_TEXTS = {
    "MIT": "Permission is hereby granted, free of charge, to any person obtaining a copy",
    "Apache-2.0": "Apache License",
    "BSD-3-Clause": "may be used to endorse or promote products derived from",
    "BSD-2-Clause": "Redistribution and use in source and binary forms",
}


def uses() -> dict[str, str]:
    """Return every dependency of pyproject.toml by name, and what it is for: "everything", or the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    parts = {"everything": project["dependencies"]}
    parts |= {f"`{extra}`": lines for extra, lines in project["optional-dependencies"].items() if extra != "all"}
    found: dict[str, list[str]] = {}
    for part, lines in parts.items():
        for line in lines:
            found.setdefault(Requirement(line).name, []).append(part)
    return {name: ", ".join(sorted(parts)) for name, parts in sorted(found.items())}


def licence(name: str) -> str | None:
    """Return what the installed release declares, as SPDX writes it where that is known; None: it is not installed."""
    try:
        installed = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    declared = installed.metadata
    text = (declared.get("License-Expression") or declared.get("License") or "").strip()
    if not text or "\n" in text:
        files = [
            file for file in installed.files or [] if file.name.upper().startswith("LICENSE") and file.suffix != ".py"
        ]
        texts = [text, *(file.read_text("utf-8") for file in files if file.parts[0].endswith(".dist-info"))]
        trove = [each.split(" :: ")[-1] for each in declared.get_all("Classifier") or [] if "License" in each]
        text = next((name for each in texts for name, words in _TEXTS.items() if words in each), ", ".join(trove))
    if not text:
        raise ValueError(f"{name} {installed.version} declares no licence that this script can read")
    return _SPDX.get(text.lower(), text)


def page() -> str:
    """Return the page; what is not installed keeps its row."""
    kept = {name: found for name, _, found in ROW.findall(PAGE.read_text("utf-8"))} if PAGE.exists() else {}
    rows = (f"| {name} | {use} | {licence(name) or kept.get(name, 'not installed')} |" for name, use in uses().items())
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

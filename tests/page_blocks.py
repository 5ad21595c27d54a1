"""The code blocks of the pages, and what they run on: the embedded model stands in for the published checkpoints."""

from __future__ import annotations

import inspect
import io
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest

import ernie_accel
from ernie_accel import api, cli
from ernie_accel.families.published import CHECKPOINTS
from ernie_accel.recipes import presets

EMBEDDED = Path(ernie_accel.__file__).parent / "embedded" / "model"
#: Names of published checkpoints, and of folders that a user has downloaded.
PUBLISHED = frozenset(name for checkpoint in CHECKPOINTS for name in checkpoint.names)
DOWNLOADED = frozenset(name.split("/")[1] for name in PUBLISHED)
_BLOCK = re.compile(r"(?P<mark><!-- (?P<why>.+?) -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"^cat > (\S+) <<'END'\n(.*?)^END\n", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: Of its first line of code in the page.
        kind: "python", "sh", "text", ...; "" if nothing is said.
        code: Its lines.
        mark: The comment before it: "run", "not run: why", or "".
    """

    line: int
    kind: str
    code: str
    mark: str

    @property
    def is_run(self) -> bool:
        """Whether a test runs it: Python unless it says why not, commands where they say so."""
        if self.kind == "python":
            return not self.mark.startswith("not run: ")
        return self.kind == "sh" and self.mark == "run"

    def commands(self) -> list[list[str]]:
        """Return the arguments of each ``ernie-accel`` that it shows."""
        text = re.sub(r"\\\n\s*", "", _FILE.sub("", self.code))
        lines = (line.removeprefix("$ ") for part in text.splitlines() for line in part.split(" && "))
        return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("ernie-accel ")]


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(text[: found.start("code")].count("\n") + 1, found["kind"], found["code"], found["why"] or "")
        for found in _BLOCK.finditer(text)
    ]


def embedded_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the embedded model stand in for the published ones, at 128 px; "auto" is a preset that compiles nothing."""
    load, from_pretrained = api.load, diffusers.DiffusionPipeline.from_pretrained

    def load_instead(model: Any, *transforms: Any, **options: Any) -> Any:
        return load(_instead(model), *transforms, **options)

    def from_pretrained_instead(name: Any, **options: Any) -> Any:
        return from_pretrained(_instead(name), **options)

    monkeypatch.setattr(ernie_accel, "load", load_instead)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained_instead)
    monkeypatch.setattr(api, "recommend", lambda *_, **__: _Exact())
    call = inspect.unwrap(diffusers.ErnieImagePipeline.__call__)
    usual = [
        parameter
        for parameter in inspect.signature(call).parameters.values()
        if parameter.default is not inspect._empty
    ]
    small = {"height": 128, "width": 128, "num_inference_steps": 4}
    monkeypatch.setattr(call, "__defaults__", tuple(small.get(each.name, each.default) for each in usual))


class _Exact:
    """What `recommend` would return."""

    preset = replace(presets.presets["exact"])


def _instead(model: Any) -> Any:
    return EMBEDDED if str(model) in PUBLISHED or str(model) in DOWNLOADED else model


def run_commands(block: Block) -> None:
    """Write the files that a block writes, and run its commands; no published model is named, so the embedded draws."""
    names = "|".join(map(re.escape, sorted(PUBLISHED, key=len, reverse=True)))
    code = re.sub(rf' ?"model": "(?:{names})",\n| --model (?:{names})', "", block.code)
    for name, text in _FILE.findall(code):
        Path(name).write_text(text, encoding="utf-8")
    for arguments in replace(block, code=code).commands():
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit) as ended:
            cli.main([*arguments, "--steps", "2"] if arguments[0] == "batch" else arguments)
        assert not ended.value.code, f"ernie-accel {shlex.join(arguments)}\n{out.getvalue()}"

"""Say what one picture of a batch is: its settings, its name, and where in the input it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ernie_accel.batch.engines.base import AdapterFile, PictureFile
from ernie_accel.batch.errors import shown
from ernie_accel.batch.input.gate import fields_problem
from ernie_accel.batch.input.naming import folder_problem, name_problem

OF_FILES = ("image", "mask", "strength", "lora", "lora_scale")
"""Settings that a table may have as columns of its own, if they are said to be."""

SETTINGS = (
    "prompt", "negative_prompt", "seed", "width", "height", "steps", "guidance_scale", "variants", *OF_FILES
)  # fmt: skip
"""The columns that say how a picture is made; every other column is the user's own."""

MAX_SEED = 2**64 - 1  # the largest that torch.Generator.manual_seed takes
MIN_SIDE = 16  # pixels
MAX_SIDE = 8192  # pixels; beyond it a typing mistake is far likelier than a real request
MAX_STEPS = 1000  # the training timesteps of every supported scheduler
MAX_GUIDANCE = 100.0
MAX_VARIANTS = 1000
MAX_LORA_SCALE = 10.0

DEFAULTS: Mapping[str, tuple[float, float]] = {
    "width": (MIN_SIDE, MAX_SIDE),
    "height": (MIN_SIDE, MAX_SIDE),
    "steps": (1, MAX_STEPS),
    "guidance_scale": (0, MAX_GUIDANCE),
    "variants": (1, MAX_VARIANTS),
}
"""The settings that a job can give for rows that leave them open, and their lowest and highest values."""


class Columns(Mapping[str, str]):
    """The fields of one row by column name, as in the file; read-only, yet picklable for worker processes."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = dict(fields)

    def __getitem__(self, name: str) -> str:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"Columns({self._fields!r})"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture to make. What is None is left to the pipeline's own defaults.

    Attributes:
        line: 1-based line of the input file where the row starts.
        index: 0-based number of the row, which `{index}` in a naming pattern and derived seeds use.
        prompt: What to draw; never empty.
        file_name: Name of the picture, without folders.
        negative_prompt: What to keep away from.
        seed: Of this row's own generator, 0 to 2**64 - 1.
        width: In pixels.
        height: In pixels.
        steps: Denoising steps.
        guidance_scale: Weight of the prompt against the negative prompt.
        image: What to begin at; None: noise alone.
        mask: What of it is drawn anew; None: all of it.
        strength: How far to go from it, 0 to 1.
        lora: The adapter to draw with; None: none.
        lora_scale: How strongly; None: 1.
        variant: 0-based number among the pictures of one input row; its seed is that much larger.
        folder: Name of the sub-folder of the output folder; empty: the output folder itself.
        columns: Every named column of the file, unparsed.

    Raises:
        ValueError: If `file_name` or `folder` could leave the output folder, or a text cannot be written as UTF-8: no
            such `Row` can exist.
    """

    line: int
    index: int
    prompt: str
    file_name: str
    negative_prompt: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    image: PictureFile | None = None
    mask: PictureFile | None = None
    strength: float | None = None
    lora: AdapterFile | None = None
    lora_scale: float | None = None
    variant: int = 0
    folder: str = ""
    columns: Mapping[str, str] = field(default_factory=lambda: Columns({}), hash=False)

    def __post_init__(self) -> None:
        if reason := name_problem(self.file_name):
            raise ValueError(f"file name {shown(self.file_name)} {reason}; expected one like 'red-mug.png'")
        if self.folder and (reason := folder_problem(self.folder)):
            raise ValueError(f"folder {shown(self.folder)} {reason}; expected one like 'mugs'")
        own = {"prompt": self.prompt, "negative_prompt": self.negative_prompt or ""}
        if reason := fields_problem(own) or fields_problem(self.columns):
            raise ValueError(reason)

    @property
    def path(self) -> str:
        """Where the picture goes, relative to the output folder, with '/' on every system."""
        return f"{self.folder}/{self.file_name}" if self.folder else self.file_name

"""Check one row: its settings, its name, its structured prompt; every problem found comes with its fix."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ernie_accel.batch.engines.base import AdapterFile, PictureFile
from ernie_accel.batch.errors import shown
from ernie_accel.batch.input.gate import text_problem
from ernie_accel.batch.input.naming import TakenNames, fill_pattern, folder_problem, name_problem
from ernie_accel.batch.input.newbie import structure_problems
from ernie_accel.batch.input.pictures import AdapterFolder, PictureFolder
from ernie_accel.batch.input.row import (
    DEFAULTS,
    MAX_GUIDANCE,
    MAX_LORA_SCALE,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    MAX_VARIANTS,
    MIN_SIDE,
    Columns,
    Row,
)
from ernie_accel.common.language import said

_OUTSIDE = "{name} {found} is not within {low} to {high}; {fix}"


@dataclass
class RowCheck:
    """How rows are checked, and the names that those before have taken.

    Attributes:
        pattern: How pictures are named; None if the pattern itself is bad, and names are not checked.
        template: How prompts are made from columns; None: the column `prompt` holds them.
        folder_by: The column that names a sub-folder.
        size_multiple: Width and height must be divisible by this, in pixels.
        defaults: Settings for rows that leave them open, by column.
        pictures: Where rows' pictures are; None: in the working folder.
        adapters: Where their LoRAs are; likewise.
        own: Columns that are not settings, although they are named like one.
    """

    pattern: str | None
    template: str | None = None
    folder_by: str | None = None
    size_multiple: int = 16
    defaults: Mapping[str, float] = field(default_factory=dict)
    pictures: PictureFolder | None = None
    adapters: AdapterFolder | None = None
    own: Collection[str] = ()
    _taken: TakenNames = field(default_factory=TakenNames)

    def rows(self, line: int, index: int, columns: Columns) -> tuple[list[Row], list[str]]:
        """Return the pictures that an input row asks for, or what is wrong with it."""
        settings = Settings({k: v for k, v in columns.items() if k not in self.own}, self.defaults)
        prompt = settings.text("prompt") if self.template is None else fill_pattern(self.template, columns, index)
        if prompt is not None and not prompt.strip():
            prompt = None
        if prompt is None and ("prompt" in columns or self.template is not None):
            settings.messages.append(said("prompt is empty; write what to draw, or delete the line"))
        if self.template is not None and (reason := text_problem(prompt or "")):
            # The columns' own text was looked at when it was read.
            settings.messages.append(said("{name} {reason}", name="prompt", reason=reason))
        settings.messages += structure_problems(prompt or "")
        seed = settings.whole("seed", 0, MAX_SEED, said("write digits, e.g. 42, or leave it empty"))
        image, mask, strength = self._pictures(settings)
        lora, lora_scale = self._adapter(settings)
        # A picture has its own size, unless the row itself gives another one.
        width, height = settings.size(self.size_multiple, with_defaults=not settings.text("image"))
        steps = settings.whole("steps", 1, MAX_STEPS, said("write digits, e.g. 8, or leave it empty"))
        guidance_scale = settings.number("guidance_scale", MAX_GUIDANCE, said("write e.g. 4.0, or leave it empty"))
        how_many = said("write how many pictures, e.g. 4, or leave it empty")
        variants = settings.whole("variants", 1, MAX_VARIANTS, how_many) or 1
        if seed is not None and seed + variants - 1 > MAX_SEED:
            room = "seed {seed} leaves no room for {variants} variants; choose a smaller one"
            settings.messages.append(said(room, seed=seed, variants=variants))
        names = [] if self.pattern is None else self._names(line, index, columns, variants)
        folder = columns.get(self.folder_by, "").strip() if self.folder_by else ""
        messages: list[str] = []
        if folder and (reason := folder_problem(folder)):
            wrong = "folder {name} (from column {column}) {reason}; change the value"
            messages.append(said(wrong, name=shown(folder), column=shown(self.folder_by), reason=reason))
            folder = ""
        elif folder and (reason := self._taken.take_folder(folder, line)):
            wrong = "folder {name} (from column {column}) {reason}; write both alike"
            messages.append(said(wrong, name=shown(folder), column=shown(self.folder_by), reason=reason))
        for name in names:
            if self.pattern and (reason := self._name_problem(name, folder, line, index, self.pattern)):
                messages.append(reason)
        messages += settings.messages
        if prompt is None or not names or messages:
            return [], messages
        return [
            Row(
                line=line,
                index=index,
                prompt=prompt,
                file_name=name,
                negative_prompt=settings.text("negative_prompt"),
                seed=seed,
                width=width,
                height=height,
                steps=steps,
                guidance_scale=guidance_scale,
                image=image,
                mask=mask,
                strength=strength,
                lora=lora,
                lora_scale=lora_scale,
                variant=variant,
                folder=folder,
                columns=columns,
            )
            for variant, name in enumerate(names)
        ], []

    def _pictures(self, settings: Settings) -> tuple[PictureFile | None, PictureFile | None, float | None]:
        """Return the picture that a row begins at, its mask, and how far to go from it."""
        if self.pictures is None:
            self.pictures = PictureFolder(Path())
        found: dict[str, PictureFile | None] = dict.fromkeys(("image", "mask"))
        for name in found:
            text = settings.text(name)
            picture = None if text is None else self.pictures.find(text.strip())
            if isinstance(picture, str):
                settings.messages.append(said("{name} {reason}", name=name, reason=picture))
            else:
                found[name] = picture
        image, mask = found["image"], found["mask"]
        strength = settings.number("strength", 1, said("write e.g. 0.3, or leave it empty"))
        if settings.text("image") is None:
            settings.messages += [
                said("{name} has no effect without image; name the picture, or leave it empty", name=name)
                for name in ("mask", "strength")
                if settings.text(name) is not None
            ]
        if image is not None and not all(MIN_SIDE <= side <= MAX_SIDE for side in (image.width, image.height)):
            size = f"{image.width}x{image.height}"
            settings.messages.append(f"image {shown(image.name)} is {size}; expected sides of {MIN_SIDE} to {MAX_SIDE}")
        if image is not None and mask is not None and (mask.width, mask.height) != (image.width, image.height):
            settings.messages.append(
                f"mask {shown(mask.name)} is {mask.width}x{mask.height}, and image {shown(image.name)} is "
                f"{image.width}x{image.height}; a mask has the size of its picture"
            )
        return image, mask, strength

    def _adapter(self, settings: Settings) -> tuple[AdapterFile | None, float | None]:
        """Return the LoRA of a row, and how strong it is."""
        if self.adapters is None:
            self.adapters = AdapterFolder(Path())
        text = settings.text("lora")
        found = None if text is None else self.adapters.find(text.strip())
        scale = settings.number("lora_scale", MAX_LORA_SCALE, said("write e.g. 0.8, or leave it empty"))
        if isinstance(found, str):
            settings.messages.append(said("{name} {reason}", name="lora", reason=found))
            return None, scale
        if text is None and settings.text("lora_scale") is not None:
            settings.messages.append(said("lora_scale has no effect without lora; name the file, or leave it empty"))
        return found, scale

    def _names(self, line: int, index: int, columns: Columns, variants: int) -> list[str]:
        """Return a file name per variant; those of several are told apart by a number, counted from 1."""
        name = fill_pattern(self.pattern or "", columns, index)
        if variants == 1:
            return [name]
        stem, suffix = (name[:-4], name[-4:]) if name.lower().endswith(".png") else (name, "")
        return [f"{stem}_v{variant + 1}{suffix}" for variant in range(variants)]

    def _name_problem(self, name: str, folder: str, line: int, index: int, pattern: str) -> str | None:
        """Return why a row cannot have its file name, by itself or beside the rows before."""
        what = said("file name {name} (from {pattern})", name=shown(name), pattern=shown(pattern))
        if reason := name_problem(name):
            fix = "{what} {reason}; change the value, or name pictures by another column"
            return said(fix, what=what, reason=reason)
        if reason := self._taken.take(f"{folder}/{name}" if folder else name, line, index):
            unique = pattern.removesuffix(".png") + "_{index}.png"
            fix = "{what} {reason}; change one, or name pictures by {unique}"
            return said(fix, what=what, reason=reason, unique=shown(unique))
        return None


class Settings:
    """The settings of one row, parsed; what is wrong with them gathers in `messages`."""

    def __init__(
        self, columns: Mapping[str, str], defaults: Mapping[str, float], messages: list[str] | None = None
    ) -> None:
        self._columns, self._defaults = columns, defaults
        self.messages: list[str] = [] if messages is None else messages

    def text(self, name: str) -> str | None:
        value = self._columns.get(name, "")
        return value if value.strip() else None

    def whole(self, name: str, low: int, high: int, fix: str) -> int | None:
        text = (self.text(name) or "").strip()
        if not text:
            return self._default(name)
        # Not int() alone: it also takes '1_000' and the digits of other scripts, and balks at very long ones.
        if not re.fullmatch(r"[+-]?[0-9]{1,30}", text):
            self.messages.append(
                said("{name} {found} is not a whole number; {fix}", name=name, found=shown(text), fix=fix)
            )
        elif not low <= int(text) <= high:
            self.messages.append(said(_OUTSIDE, name=name, found=text, low=low, high=high, fix=fix))
        else:
            return int(text)
        return None

    def number(self, name: str, high: float, fix: str) -> float | None:
        text = (self.text(name) or "").strip()
        if not text:
            return self._defaults.get(name)
        if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)", text):
            self.messages.append(said("{name} {found} is not a number; {fix}", name=name, found=shown(text), fix=fix))
        elif not 0 <= float(text) <= high:
            self.messages.append(said(_OUTSIDE, name=name, found=text, low=0, high=f"{high:g}", fix=fix))
        else:
            return float(text)
        return None

    def _default(self, name: str) -> int | None:
        return int(self._defaults[name]) if name in self._defaults else None

    def size(self, multiple: int, *, with_defaults: bool = True) -> tuple[int | None, int | None]:
        if not with_defaults:
            self = Settings(self._columns, {}, self.messages)
        # Any whole number passes here, so that a bad size is reported with the nearest good one.
        limit = 10**30
        fix = said("write pixels, e.g. {pixels}, or leave it empty", pixels=64 * multiple)
        width, height = (self.whole(side, -limit, limit, fix) for side in ("width", "height"))
        if reason := size_problem(width, height, multiple):
            self.messages.append(reason)
        return width, height


def default_problems(defaults: Mapping[str, float], multiple: int) -> list[str]:
    """Return what is wrong with settings for rows that leave them open (empty list: nothing)."""
    messages = [
        f"default {name!r} is not a setting; valid: {', '.join(DEFAULTS)}" for name in defaults if name not in DEFAULTS
    ]
    for name, (low, high) in DEFAULTS.items():
        value = defaults.get(name)
        if value is not None and name not in ("width", "height") and not low <= value <= high:
            messages.append(f"default {name} {value} is not within {low:g} to {high:g}; choose another")
    width, height = (None if defaults.get(name) is None else int(defaults[name]) for name in ("width", "height"))
    if reason := size_problem(width, height, multiple):
        messages.append(said("default {reason}", reason=reason))
    return messages


def size_problem(width: int | None, height: int | None, multiple: int) -> str | None:
    """Return why a size cannot be made, with the nearest that can (None: it can, or is not given)."""
    given = {name: side for name, side in (("width", width), ("height", height)) if side is not None}
    nearest = {name: _nearest_side(side, multiple) for name, side in given.items()}
    if nearest == given:
        return None
    what = "size" if len(given) == 2 else next(iter(given))
    return said(
        "{what} {given} is not made of multiples of {multiple} from {multiple} to {most}; "
        "the nearest valid {what} is {nearest}",
        what=said(what),
        given=_by(given),
        multiple=multiple,
        most=MAX_SIDE,
        nearest=_by(nearest),
    )


def _nearest_side(side: int, multiple: int) -> int:
    nearest = (side + multiple // 2) // multiple * multiple  # a tie goes up: no detail is lost
    return min(max(nearest, multiple), MAX_SIDE // multiple * multiple)


def _by(sides: Mapping[str, int]) -> str:
    return "x".join(str(side) for side in sides.values())

"""Tie a row to what an engine is asked for, and count how often that was tried."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ernie_accel.batch.engines.base import Engine, PictureFile, Request
from ernie_accel.batch.errors import Problem
from ernie_accel.batch.input.row import MAX_SEED, Row

#: Settings that ledgers have always held, given or not; others are left out, so that older jobs go on.
_ALWAYS = frozenset({"prompt", "seed", "negative_prompt", "width", "height", "steps", "guidance_scale"})
SECOND_PASS_STRENGTH, SECOND_PASS_STEPS, SECOND_PASS_GUIDANCE = 0.3, 20, 2.0
"""How a picture with a grid is drawn once more. The guidance is a base model's; the same model keeps the row's."""

_REROLL_STRIDE = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, odd: rerolled seeds do not meet other rows'


@dataclass(frozen=True)
class SecondPass:
    """How a picture with a grid is drawn once more.

    Attributes:
        picture: The one with the grid, in its file.
        grid_score: Its score.
        guidance_scale: For this pass; None: the row's own.
        enhanced: What its prompt was enhanced to, which is drawn again; None: it was not.
    """

    picture: PictureFile
    grid_score: float
    guidance_scale: float | None = None
    enhanced: str | None = None


@dataclass(eq=False)
class Task:
    """One row on its way through the line.

    Attributes:
        row: The row.
        request: What the engine is asked for; the seed as the row and the job give it.
        attempts: How often rendering it has failed.
        lost: How often a worker died while it was rendered.
        rerolls: How often it was given another seed because its picture was sifted out.
        second_pass: How it is drawn once more, because its picture had a grid; None: it is not.
        alone: Whether it must be rendered in a batch of its own, so that a failure is surely its own.
        arrival: Its number in the order in which the schedule got rows; None: it has not been there.
    """

    row: Row
    request: Request
    attempts: int = 0
    lost: int = 0
    rerolls: int = 0
    second_pass: SecondPass | None = None
    alone: bool = False
    arrival: int | None = None

    def current(self) -> Request:
        """Return the request with the seed of the present reroll, and of a second pass what that begins at."""
        request = self.request
        if self.rerolls:
            request = replace(request, seed=(request.seed + self.rerolls * _REROLL_STRIDE) & MAX_SEED)
        again = self.second_pass
        if again is not None:
            # A mask is of the row's own picture, which may have another size; the grid is everywhere.
            request = replace(
                request,
                image=again.picture,
                mask=None,
                width=again.picture.width,
                height=again.picture.height,
                strength=SECOND_PASS_STRENGTH,
                steps=SECOND_PASS_STEPS,
                guidance_scale=request.guidance_scale if again.guidance_scale is None else again.guidance_scale,
            )
            if again.enhanced is not None:
                request = replace(request, prompt=again.enhanced, enhance=False)
        return request

    def fingerprint(self) -> str:
        """Return a short digest of all that the row's picture is made from."""
        return hashlib.sha256(self.described().encode()).hexdigest()[:16]

    def described(self) -> str:
        """Return the request as JSON, as the ledger keeps it to name what changed."""
        values = {name: value for name, value in vars(self.request).items() if value is not None or name in _ALWAYS}
        del values["enhance"]  # the engine's business: a row cannot say it
        for name in ("image", "mask", "lora"):
            file = getattr(self.request, name)
            if file is not None:
                values |= {name: file.name, f"{name}_sha256": file.digest}
        return json.dumps(values, ensure_ascii=False, sort_keys=True)


def seed_of(row: Row, seed: int) -> int:
    """Return the seed of a row in a job with `seed`: the row's own or one derived, and the variant on top."""
    return (seed + row.index if row.seed is None else row.seed) + row.variant


def tasks_of(rows: Iterable[Row], seed: int, default_size: tuple[int | None, int | None] = (None, None)) -> list[Task]:
    """Return a task per row; `default_size`, width and height, is for rows that leave theirs open."""
    return [
        Task(
            row,
            Request(
                prompt=row.prompt,
                seed=seed_of(row, seed),
                negative_prompt=row.negative_prompt,
                width=row.width or (row.image.width if row.image else default_size[0]),
                height=row.height or (row.image.height if row.image else default_size[1]),
                steps=row.steps,
                guidance_scale=row.guidance_scale,
                image=row.image,
                mask=row.mask,
                strength=row.strength,
                lora=row.lora,
                lora_scale=row.lora_scale,
            ),
        )
        for row in rows
    ]


def edit_problems(
    engine: Engine, tasks: Iterable[Task], *, refines: bool = False, refiner: Engine | None = None
) -> list[Problem]:
    """Return which rows name a picture or a LoRA that an engine would not look at; of second passes likewise.

    Args:
        engine: Draws the rows.
        tasks: The rows.
        refines: Whether pictures with a grid are drawn once more.
        refiner: By what; None: by the same engine.
    """
    found: list[Problem] = []
    if refines:
        found += _refiner_problems(refiner or engine)
    elif refiner is not None:
        found.append((None, "refiner has no effect without Sift(refine=True); leave it out, or ask for second passes"))
    if found:
        return found
    for task in tasks:
        for each in (engine, *(() if refiner is None else (refiner,))):
            if task.request.lora is not None and not each.adapts:
                found.append((task.row.line, f"names a LoRA, and {type(each).__name__} does not draw with LoRAs"))
        if task.request.image is not None and not engine.edits:
            what = f"names a picture to begin at, and {type(engine).__name__} does not draw from pictures"
            found.append((task.row.line, what))
    return found


def _refiner_problems(engine: Engine) -> list[Problem]:
    """Return why an engine cannot draw pictures from themselves."""
    anything = PictureFile("its own picture", "", "", 16, 16)
    asked = Request(prompt="", seed=0, image=anything, steps=SECOND_PASS_STEPS, strength=SECOND_PASS_STRENGTH)
    reasons = [reason for _, reason in engine.problems([(0, asked)])]
    if engine.edits and not reasons:
        return []
    why = reasons[0] if reasons else f"{type(engine).__name__} does not draw from pictures"
    return [(None, f"refine draws pictures from themselves: {why}; leave it out, or use reroll")]

"""What the embedded model draws: scenes as plain data, their sampler, and the renderer that is the ground
truth.

A scene is one to four flat objects on a 3x3 grid over a plain, graded or textured background. Everything a
caption can ask for is a discrete attribute of :class:`Scene`, so that a picture can be judged exactly. Only
a little jitter of position and radius is random, as in hand-made drawings.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (215, 30, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 215, 30),
    "green": (25, 150, 60),
    "cyan": (0, 185, 205),
    "blue": (35, 65, 215),
    "purple": (135, 45, 175),
    "black": (20, 20, 25),
}
"""Saturated colours of objects."""

TINTS: dict[str, RGB] = {
    "white": (250, 250, 250),
    "cream": (245, 234, 200),
    "grey": (182, 182, 184),
    "pale blue": (188, 210, 240),
    "pale green": (198, 230, 198),
    "pale pink": (243, 202, 212),
}
"""Muted colours of backgrounds: none of them is near an object's colour."""

SHAPES = ("circle", "square", "triangle", "ring", "cross")
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
TEXTURES = ("striped", "dotted", "checked")
CANVASES = ((128, 128), (128, 160), (160, 128), (128, 192), (192, 128))
"""(height, width) in pixels; the model is trained on these."""

MAX_OBJECTS = 4
RADIUS_PX = {"small": 10.0, "large": 18.0}
MARGIN_PX = 25
"""Distance of the outer row of object centres from the edge of the canvas."""
IN_FRONT_OFFSET_PX = 12.0
"""How far right of and below the hidden object's centre the object in front of it lies."""
POSITION_JITTER_PX = 3.0
RADIUS_JITTER = 0.05
TEXTURE_SHADE = 0.84
"""Brightness of a texture's darker half, relative to its tint."""
TEXTURE_PERIOD_PX = 16
_HELD_OUT_OF = 16


@dataclass(frozen=True)
class Object:
    """One shape. `place` is one of :data:`PLACES`; the other fields name keys of the tables above."""

    colour: str
    shape: str
    size: str
    place: str


@dataclass(frozen=True)
class Background:
    """A tint, optionally textured (`texture`) or fading from top to bottom into another tint (`fades_to`)."""

    tint: str
    texture: str | None = None
    fades_to: str | None = None


@dataclass(frozen=True)
class Scene:
    """A picture's content.

    `objects` are in drawing order. At most two share a place: then the first is large, the second is small
    and lies in front of it, over its lower right part.
    """

    objects: tuple[Object, ...]
    background: Background
    height: int = 128
    width: int = 128

    def lies_in_front(self, index: int) -> bool:
        """Return whether object `index` lies in front of another one at the same place."""
        return any(o.place == self.objects[index].place for o in self.objects[:index])

    def centre_px(self, index: int) -> tuple[float, float]:
        """Return the (x, y) of object `index` before jitter, in pixels."""
        cell = PLACES.index(self.objects[index].place)
        offset = IN_FRONT_OFFSET_PX if self.lies_in_front(index) else 0.0
        return _grid_px(cell % 3, self.width) + offset, _grid_px(cell // 3, self.height) + offset


def _grid_px(step: int, extent: int) -> float:
    return MARGIN_PX + step * (extent - 2 * MARGIN_PX) / 2


def all_backgrounds() -> tuple[Background, ...]:
    """Return all backgrounds: 6 plain, 18 textured, 30 graded."""
    plain = [Background(t) for t in TINTS]
    textured = [Background(t, texture=x) for t in TINTS for x in TEXTURES]
    graded = [Background(a, fades_to=b) for a in TINTS for b in TINTS if a != b]
    return tuple(plain + textured + graded)


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene is among the one in sixteen that training never sees, whatever its canvas."""
    return zlib.crc32(repr((scene.objects, scene.background)).encode()) % _HELD_OUT_OF == 0


def random_scene(rng: random.Random, canvas: tuple[int, int] | None = None, *, held_out: bool | None = None) -> Scene:
    """Draw a scene.

    Args:
        rng: The only source of chance.
        canvas: (height, width) in pixels; a random one of :data:`CANVASES` by default.
        held_out: True for the evaluation split, False for the training split, None for either.
    """
    height, width = canvas if canvas is not None else rng.choice(CANVASES)
    while True:
        scene = Scene(_random_objects(rng), _random_background(rng), height, width)
        if held_out is None or is_held_out(scene) == held_out:
            return scene


def _random_background(rng: random.Random) -> Background:
    tint, other = rng.sample(list(TINTS), 2)
    kind = rng.randrange(3)
    if kind == 0:
        return Background(tint)
    return Background(tint, texture=rng.choice(TEXTURES)) if kind == 1 else Background(tint, fades_to=other)


def _random_objects(rng: random.Random) -> tuple[Object, ...]:
    count = rng.randint(1, MAX_OBJECTS)
    with_pair = count > 1 and rng.random() < 0.35
    places = rng.sample(PLACES, count - with_pair)
    objects: list[Object] = []
    for position, place in enumerate(places):
        pair = with_pair and position == 0
        for size in ("large", "small") if pair else (rng.choice(SIZES),):
            objects.append(Object(_free_colour(rng, objects, place), rng.choice(SHAPES), size, place))
    return tuple(objects)


def _free_colour(rng: random.Random, objects: Sequence[Object], place: str) -> str:
    """Choose a colour that no object at this place or beside it has, because objects of one colour must
    not merge.
    """
    taken = {o.colour for o in objects if _beside(o.place, place)}
    return rng.choice([c for c in COLOURS if c not in taken])


def _beside(one: str, other: str) -> bool:
    a, b = PLACES.index(one), PLACES.index(other)
    return max(abs(a // 3 - b // 3), abs(a % 3 - b % 3)) <= 1


@dataclass(frozen=True)
class SceneBatch:
    """Scenes of one canvas as tensors, the renderer's input.

    Attributes:
        objects: int64 [N, MAX_OBJECTS, 4]: colour (-1: no object), shape, place, 1 if large.
        in_front: bool [N, MAX_OBJECTS].
        background: int64 [N], an index into :func:`all_backgrounds`.
        height: Pixels.
        width: Pixels.
    """

    objects: torch.Tensor
    in_front: torch.Tensor
    background: torch.Tensor
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.background)

    def take(self, rows: torch.Tensor) -> SceneBatch:
        """Return the scenes at the int64 indices `rows`."""
        return SceneBatch(self.objects[rows], self.in_front[rows], self.background[rows], self.height, self.width)

    def to(self, device: torch.device | str) -> SceneBatch:
        """Return the same scenes on `device`."""
        objects, in_front = self.objects.to(device), self.in_front.to(device)
        return SceneBatch(objects, in_front, self.background.to(device), self.height, self.width)


def to_batch(scenes: Sequence[Scene]) -> SceneBatch:
    """Pack scenes, which must share one canvas, into tensors on the CPU."""
    import torch

    canvases = {(s.height, s.width) for s in scenes}
    if len(canvases) != 1:
        raise ValueError(f"A batch holds scenes of one canvas; got {sorted(canvases)}. Group them by canvas.")
    rows, front = [], []
    for scene in scenes:
        missing = MAX_OBJECTS - len(scene.objects)
        rows.append([_object_codes(o) for o in scene.objects] + [[-1, 0, 0, 0]] * missing)
        front.append([scene.lies_in_front(i) for i in range(len(scene.objects))] + [False] * missing)
    backgrounds = all_backgrounds()
    index = torch.tensor([backgrounds.index(s.background) for s in scenes])
    return SceneBatch(torch.tensor(rows), torch.tensor(front), index, scenes[0].height, scenes[0].width)


def _object_codes(o: Object) -> list[int]:
    colour, shape, place = list(COLOURS).index(o.colour), SHAPES.index(o.shape), PLACES.index(o.place)
    return [colour, shape, place, SIZES.index(o.size)]


def palette(table: dict[str, RGB], device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a colour table as float32 [len(table), 3] in 0..1."""
    import torch

    return torch.tensor(list(table.values()), dtype=torch.float32, device=device) / 255


def draw_backgrounds(height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw every background of :func:`all_backgrounds`: float32 [54, 3, height, width] in 0..1."""
    import torch

    y = torch.arange(height, device=device).view(-1, 1)
    x = torch.arange(width, device=device).view(1, -1)
    period, half = TEXTURE_PERIOD_PX, TEXTURE_PERIOD_PX // 2
    from_cell_centre = ((x % period - half + 0.5) ** 2 + (y % period - half + 0.5) ** 2).sqrt()
    darker = {
        "striped": ((x + y) % period < half).float(),
        "dotted": (4.5 - from_cell_centre).clamp(0, 1),
        "checked": ((x // half + y // half) % 2).float(),
    }
    fade = (y / (height - 1)).expand(height, width)
    tints = dict(zip(TINTS, palette(TINTS, device).view(-1, 3, 1, 1), strict=True))
    pictures = []
    for background in all_backgrounds():
        tint = tints[background.tint]
        if background.fades_to is not None:
            pictures.append(tint + (tints[background.fades_to] - tint) * fade)
        elif background.texture is not None:
            pictures.append(tint * (1 - (1 - TEXTURE_SHADE) * darker[background.texture]))
        else:
            pictures.append(tint.expand(3, height, width))
    return torch.stack(pictures)


def signed_distances(dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Return how far each point lies outside each shape, in pixels (negative inside).

    Args:
        dx: Offsets to the right of the shape's centre, any shape that broadcasts with `dy` and `radius`.
        dy: Offsets below it.
        radius: Half the extent of the shape.

    Returns:
        A tensor with a new first axis in the order of :data:`SHAPES`.
    """
    import torch

    dx, dy, radius = torch.broadcast_tensors(dx, dy, radius)  # type: ignore[no-untyped-call]
    across, down, from_centre = dx.abs(), dy.abs(), (dx * dx + dy * dy).sqrt()
    arm = 0.34 * radius
    bar, post = torch.maximum(across - radius, down - arm), torch.maximum(across - arm, down - radius)
    return torch.stack(
        [
            from_centre - radius,
            torch.maximum(across, down) - 0.88 * radius,
            torch.maximum(dy - 0.8 * radius, (1.9 * across - dy - radius) / 2.15),
            (from_centre - 0.75 * radius).abs() - 0.25 * radius,
            torch.minimum(bar, post),
        ]
    )


def render_batch(batch: SceneBatch, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw a batch on its device.

    Args:
        batch: What to draw.
        generator: A generator of that device, for the jitter of position and radius; None draws without any.

    Returns:
        float32 [N, 3, height, width] in 0..1, edges anti-aliased over one pixel.
    """
    import torch

    device = batch.background.device
    image = draw_backgrounds(batch.height, batch.width, device)[batch.background]
    jitter = torch.zeros(len(batch), len(PLACES), 2, device=device)
    stretch = torch.ones(len(batch), MAX_OBJECTS, device=device)
    if generator is not None:  # a place's objects move together, so that a pair keeps its overlap
        jitter = (torch.rand(jitter.shape, device=device, generator=generator) * 2 - 1) * POSITION_JITTER_PX
        stretch += (torch.rand(stretch.shape, device=device, generator=generator) * 2 - 1) * RADIUS_JITTER
    y = torch.arange(batch.height, device=device, dtype=torch.float32).view(1, -1, 1)
    x = torch.arange(batch.width, device=device, dtype=torch.float32).view(1, 1, -1)
    rows = torch.arange(len(batch), device=device)
    colours = palette(COLOURS, device)
    for k in range(MAX_OBJECTS):
        colour, shape, place, large = batch.objects[:, k].unbind(1)
        centre = torch.stack([_grid(place % 3, batch.width), _grid(place // 3, batch.height)], 1)
        centre = centre + jitter[rows, place] + batch.in_front[:, k, None] * IN_FRONT_OFFSET_PX
        radius = torch.where(large.bool(), RADIUS_PX["large"], RADIUS_PX["small"]) * stretch[:, k]
        dx, dy = x - centre[:, 0].view(-1, 1, 1), y - centre[:, 1].view(-1, 1, 1)
        outside = signed_distances(dx, dy, radius.view(-1, 1, 1))[shape, rows]
        alpha = ((0.5 - outside).clamp(0, 1) * (colour >= 0).view(-1, 1, 1))[:, None]
        image = image * (1 - alpha) + colours[colour].view(-1, 3, 1, 1) * alpha
    return image


def _grid(step: torch.Tensor, extent: int) -> torch.Tensor:
    return MARGIN_PX + step * ((extent - 2 * MARGIN_PX) / 2)


def render(scenes: Sequence[Scene], generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw scenes of one canvas on the CPU: float32 [N, 3, height, width] in 0..1; see
    :func:`render_batch`.
    """
    return render_batch(to_batch(scenes), generator)

"""Judge from pixels alone whether a picture has the requested shapes and colours at the requested places.

Because scenes are procedural, prompt adherence is a measurement and not an opinion, and the same figure
shows what a quantization really costs. Each pixel gets the name of its nearest colour. The pixels of the
requested colour around the requested place are compared with every shape at many radii and positions (intersection
over union, without hidden parts), and the rest of the picture with every background.
"""

from __future__ import annotations

import inspect
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ernie_accel.core.outputs import images_of
from ernie_accel.embedded.captions import caption
from ernie_accel.embedded.scenes import (
    CANVASES,
    COLOURS,
    RADIUS_PX,
    SHAPES,
    TEXTURE_SHADE,
    TINTS,
    Background,
    Scene,
    all_backgrounds,
    draw_backgrounds,
    palette,
    random_scene,
    signed_distances,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from ernie_accel.core.components import CallablePipeline

NOTHING = "nothing"
"""What the judge reads where no object colour fills the requested place."""
ATTRIBUTES = ("colour and place", "shape", "size")

_WINDOW_PX = 72
_TEMPLATE_PX = 48
_RADII_PX = (7.5, 8.5, 9.5, 10.5, 11.5, 12.7, 14.7, 16.0, 17.0, 18.0, 19.0, 20.5)
_LARGE_FROM_PX = (RADIUS_PX["small"] * RADIUS_PX["large"]) ** 0.5
_LEAST_IOU = 0.6
_LEAST_PIXELS = 40
_STRAY_PIXELS = 60
_BACKGROUND_RMSE = 0.07


@dataclass(frozen=True)
class ObjectVerdict:
    """What the judge reads where one object was requested; each `read_*` is a key of the scene tables or `NOTHING`.

    `iou` is that of the best template, 0..1: a blurred or broken shape scores low even if it is recognised.
    """

    read_colour: str
    read_shape: str
    read_size: str
    iou: float
    is_placed: bool
    has_shape: bool
    has_size: bool

    @property
    def is_right(self) -> bool:
        """Whether colour, place, shape and size are all right."""
        return self.is_placed and self.has_shape and self.has_size


@dataclass(frozen=True)
class Verdict:
    """The comparison of one picture with its scene.

    Attributes:
        objects: In the scene's order.
        read_background: The nearest of all backgrounds.
        has_background: Whether it is the requested one, and near enough.
        stray_pixels: Pixels in an object's colour away from every requested object.
    """

    objects: tuple[ObjectVerdict, ...]
    read_background: Background
    has_background: bool
    stray_pixels: int

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing but the requested objects."""
        return self.stray_pixels < _STRAY_PIXELS

    @property
    def is_right(self) -> bool:
        """Whether everything requested is there and nothing else."""
        return all(o.is_right for o in self.objects) and self.has_background and self.is_clean


def judge(
    images: Image | torch.Tensor | Sequence[Image] | Sequence[torch.Tensor], scenes: Scene | Sequence[Scene]
) -> list[Verdict]:
    """Judge pictures.

    Args:
        images: One picture or many: PIL images, or float tensors [3, H, W] or [N, 3, H, W] in 0..1.
        scenes: One scene for each, of the picture's size.

    Returns:
        One verdict per picture, in order.

    Raises:
        ValueError: If the numbers or sizes of pictures and scenes differ.
    """
    wanted = [scenes] if isinstance(scenes, Scene) else list(scenes)
    pictures = _as_tensors(images)
    if len(pictures) != len(wanted):
        raise ValueError(f"Got {len(pictures)} pictures and {len(wanted)} scenes; expected one scene for each.")
    verdicts: list[Verdict | None] = [None] * len(wanted)
    for canvas, rows in _rows_by_canvas(wanted).items():
        for i in rows:
            if pictures[i].shape != (3, *canvas):
                found = tuple(pictures[i].shape)
                raise ValueError(f"Picture {i} has shape {found}; its scene asks for {(3, *canvas)}.")
        batch = torch.stack([pictures[i] for i in rows])
        for i, verdict in zip(rows, _judge_canvas(batch, [wanted[i] for i in rows]), strict=True):
            verdicts[i] = verdict
    return [v for v in verdicts if v is not None]


def _rows_by_canvas(scenes: Sequence[Scene]) -> dict[tuple[int, int], list[int]]:
    rows: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, scene in enumerate(scenes):
        rows[scene.height, scene.width].append(i)
    return rows


def _as_tensors(images: Any) -> list[torch.Tensor]:
    """Return float32 CPU tensors [3, H, W] in 0..1."""
    import numpy as np
    from PIL.Image import Image as PilImage

    if isinstance(images, PilImage) or (isinstance(images, torch.Tensor) and images.ndim == 3):
        images = [images]
    tensors = []
    for image in images:
        if isinstance(image, PilImage):
            image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
        tensors.append(image.detach().float().cpu())
    return tensors


def _judge_canvas(images: torch.Tensor, scenes: Sequence[Scene]) -> list[Verdict]:
    """Judge pictures [N, 3, H, W] of one size."""
    labels = _name_pixels(images)
    objects = _judge_objects(labels, scenes)
    near = _near_objects(scenes)
    is_ground = labels >= len(COLOURS)
    stray = ((~is_ground) & ~near).flatten(1).sum(1).tolist()
    grounds = _judge_backgrounds(images, is_ground & ~near)
    return [
        Verdict(tuple(o), ground, ground == scene.background and rmse < _BACKGROUND_RMSE, int(pixels))
        for scene, o, (ground, rmse), pixels in zip(scenes, objects, grounds, stray, strict=True)
    ]


def _name_pixels(images: torch.Tensor) -> torch.Tensor:
    """Return int64 [N, H, W]: the index of the nearest object colour, or len(COLOURS) for any background."""
    tints = palette(TINTS)
    known = torch.cat([palette(COLOURS), tints, tints * TEXTURE_SHADE])
    n, _, h, w = images.shape
    distance = torch.cdist(images.permute(0, 2, 3, 1).reshape(-1, 3), known)
    return distance.argmin(1).clamp(max=len(COLOURS)).view(n, h, w)


def _judge_objects(labels: torch.Tensor, scenes: Sequence[Scene]) -> list[list[ObjectVerdict]]:
    asked = [(n, k) for n, scene in enumerate(scenes) for k in range(len(scene.objects))]
    colours = list(COLOURS)
    windows = torch.stack([_window(labels[n], *scenes[n].centre_px(k)) for n, k in asked])
    masks, visible = [], []
    for (n, k), window in zip(asked, windows, strict=True):
        own = colours.index(scenes[n].objects[k].colour)
        others = torch.tensor([colours.index(o.colour) for o in scenes[n].objects if o.colour != colours[own]])
        masks.append(window == own)
        visible.append(~torch.isin(window, others.to(window.dtype)))
    iou = _best_ious(torch.stack(masks).float(), torch.stack(visible).float())
    verdicts: list[list[ObjectVerdict]] = [[] for _ in scenes]
    for row, (n, k) in enumerate(asked):
        verdicts[n].append(_object_verdict(scenes[n], k, windows[row], masks[row], iou[row]))
    return verdicts


def _window(labels: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Cut [_WINDOW_PX, _WINDOW_PX] pixels centred at (x, y); beyond the edge is background."""
    half = _WINDOW_PX // 2
    padded = F.pad(labels, (half, half, half, half), value=len(COLOURS))
    top, left = round(y), round(x)
    return padded[top : top + _WINDOW_PX, left : left + _WINDOW_PX]


@lru_cache(maxsize=1)
def _templates() -> torch.Tensor:
    """Return float32 [len(SHAPES), len(_RADII_PX), _TEMPLATE_PX, _TEMPLATE_PX]: every shape at every
    radius.
    """
    axis = torch.arange(_TEMPLATE_PX) - (_TEMPLATE_PX - 1) / 2
    radius = torch.tensor(_RADII_PX).view(-1, 1, 1)
    return (signed_distances(axis.view(1, 1, -1), axis.view(1, -1, 1), radius) < 0).float()


def _best_ious(masks: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Return [M, shapes, radii]: the best intersection over union of each template over all shifts.

    Args:
        masks: 1 where a pixel has the asked colour, [M, window, window].
        visible: 0 where another requested object may hide this one.
    """
    templates = _templates()
    kernel = templates.flatten(0, 1)[:, None]
    overlap = F.conv2d(masks[:, None], kernel)
    template_area = F.conv2d(visible[:, None], kernel)
    union = template_area + masks.sum((1, 2)).view(-1, 1, 1, 1) - overlap
    best = (overlap / union.clamp(min=1)).amax((2, 3))
    return best.view(len(best), *templates.shape[:2])


def _object_verdict(scene: Scene, k: int, window: torch.Tensor, mask: torch.Tensor, iou: torch.Tensor) -> ObjectVerdict:
    asked = scene.objects[k]
    best = float(iou.max())
    is_placed = bool(mask.sum() >= _LEAST_PIXELS) and best >= _LEAST_IOU
    if not is_placed:
        return ObjectVerdict(_dominant_colour(window), NOTHING, NOTHING, best, False, False, False)
    shape, radius = divmod(int(iou.argmax()), len(_RADII_PX))
    size = "large" if _RADII_PX[radius] >= _LARGE_FROM_PX else "small"
    return ObjectVerdict(
        asked.colour, SHAPES[shape], size, best, True, SHAPES[shape] == asked.shape, size == asked.size
    )


def _dominant_colour(window: torch.Tensor) -> str:
    """Return the object colour that fills most of a window's middle, or NOTHING."""
    margin = _WINDOW_PX // 2 - 14
    middle = window[margin:-margin, margin:-margin]
    counts = torch.bincount(middle.flatten(), minlength=len(COLOURS) + 1)[: len(COLOURS)]
    return list(COLOURS)[int(counts.argmax())] if int(counts.max()) >= _LEAST_PIXELS else NOTHING


def _near_objects(scenes: Sequence[Scene]) -> torch.Tensor:
    """Return bool [N, H, W]: where the requested objects may be, whatever their jitter."""
    height, width = scenes[0].height, scenes[0].width
    y, x = torch.arange(height).view(-1, 1), torch.arange(width).view(1, -1)
    near = torch.zeros(len(scenes), height, width, dtype=torch.bool)
    for n, scene in enumerate(scenes):
        for k, o in enumerate(scene.objects):
            cx, cy = scene.centre_px(k)
            reach = RADIUS_PX[o.size] * 1.1 + 6
            near[n] |= torch.maximum((x - cx).abs(), (y - cy).abs()) < reach
    return near


def _judge_backgrounds(images: torch.Tensor, care: torch.Tensor) -> list[tuple[Background, float]]:
    """Return the nearest background of each picture and its distance (root mean square, 0..1) where
    `care`.
    """
    height, width = images.shape[-2:]
    candidates = draw_backgrounds(height, width).flatten(1)
    names = all_backgrounds()
    found = []
    for image, kept in zip(images.flatten(2), care.flatten(1), strict=True):
        if not kept.any():
            found.append((names[0], 1.0))
            continue
        columns = kept.repeat(3)
        errors = (candidates[:, columns] - image.flatten()[columns]).pow(2).mean(1)
        best = int(errors.argmin())
        found.append((names[best], float(errors[best]) ** 0.5))
    return found


@dataclass(frozen=True)
class Adherence:
    """How well pictures match their prompts; all fractions are 0..1.

    Attributes:
        pictures: Number of pictures judged.
        objects: Number of objects asked for.
        object_fraction: Objects right in colour, place, shape and size: the headline figure.
        picture_fraction: Pictures with every object and the background right, and nothing else in them.
        by_attribute: Fraction right for each of "colour and place", "shape" and "size" (the latter two among
            the objects found at their place), "background" and "no strays" (among pictures).
        confusion: {attribute: {asked: {read: count}}}, wrong and right readings.
    """

    pictures: int
    objects: int
    object_fraction: float
    picture_fraction: float
    by_attribute: Mapping[str, float]
    confusion: Mapping[str, Mapping[str, Mapping[str, int]]]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.1%}" for name, value in self.by_attribute.items())
        return (
            f"{self.object_fraction:.1%} of {self.objects} objects and {self.picture_fraction:.1%} of "
            f"{self.pictures} pictures right ({parts})"
        )


def summarize(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> Adherence:
    """Count verdicts, one per scene, in order."""
    pairs = [
        pair
        for scene, verdict in zip(scenes, verdicts, strict=True)
        for pair in zip(scene.objects, verdict.objects, strict=True)
    ]
    placed = [v for _, v in pairs if v.is_placed]
    return Adherence(
        pictures=len(verdicts),
        objects=len(pairs),
        object_fraction=_fraction(v.is_right for _, v in pairs),
        picture_fraction=_fraction(v.is_right for v in verdicts),
        by_attribute={
            "colour and place": _fraction(v.is_placed for _, v in pairs),
            "shape": _fraction(v.has_shape for v in placed),
            "size": _fraction(v.has_size for v in placed),
            "background": _fraction(v.has_background for v in verdicts),
            "no strays": _fraction(v.is_clean for v in verdicts),
        },
        confusion={
            "colour": _confusion((o.colour, v.read_colour) for o, v in pairs),
            "place": _confusion((o.place, o.place if v.is_placed else NOTHING) for o, v in pairs),
            "shape": _confusion((o.shape, v.read_shape) for o, v in pairs),
            "size": _confusion((o.size, v.read_size) for o, v in pairs),
            "background": _confusion(
                (_name(s.background), _name(v.read_background)) for s, v in zip(scenes, verdicts, strict=True)
            ),
        },
    )


def _fraction(outcomes: Iterable[bool]) -> float:
    values = list(outcomes)
    return sum(values) / len(values) if values else 0.0


def _confusion(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for asked, read in pairs:
        table[asked][read] += 1
    return {asked: dict(row.most_common()) for asked, row in sorted(table.items())}


def _name(background: Background) -> str:
    if background.fades_to is not None:
        return f"{background.tint} to {background.fades_to}"
    return f"{background.texture or 'plain'} {background.tint}"


def unseen_prompts(n: int, seed: int = 0) -> list[tuple[str, Scene]]:
    """Return `n` captions, half English and half Chinese, of scenes held out from training, with the
    scenes.
    """
    rng = random.Random(f"unseen-{seed}")
    prompts = []
    for i in range(n):
        scene = random_scene(rng, CANVASES[i % len(CANVASES)], held_out=True)
        language = "en" if i // len(CANVASES) % 2 else "zh"
        prompts.append((caption(scene, rng, language), scene))
    return prompts


def adherence(
    pipe: CallablePipeline,
    n: int = 200,
    steps: int = 8,
    seed: int = 0,
    *,
    guidance_scale: float = 1.0,
    batch_size: int = 16,
) -> Adherence:
    """Measure how well a pipeline's pictures match unseen prompts.

    Each prompt has its own noise, drawn on the CPU, so the figure does not depend on batch size or device
    beyond rounding. The prompt enhancer is off: the captions are full ones.

    Args:
        pipe: The embedded pipeline or another miniature, or what a transform made of it. Called as it is, on its own
            device.
        n: Number of prompts, of one to four objects each, spread over all canvases and both languages.
        steps: Denoising steps.
        seed: Chooses prompts and noise.
        guidance_scale: 1.0 means no guidance; 0.0 for Z-Image.
        batch_size: Prompts per call.
    """
    scenes = [scene for _, scene in unseen_prompts(n, seed)]
    return summarize(verdicts(pipe, n, steps, seed, guidance_scale=guidance_scale, batch_size=batch_size), scenes)


def verdicts(
    pipe: CallablePipeline,
    n: int = 200,
    steps: int = 8,
    seed: int = 0,
    *,
    guidance_scale: float = 1.0,
    batch_size: int = 16,
) -> list[Verdict]:
    """Draw what `adherence` draws and return the verdict on each prompt, in the order of `unseen_prompts`."""
    prompts = unseen_prompts(n, seed)
    scenes = [scene for _, scene in prompts]
    pictures: list[torch.Tensor] = [torch.empty(0)] * n
    for (height, width), rows in _rows_by_canvas(scenes).items():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            output = pipe(
                [prompts[i][0] for i in batch],
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed * 1_000_003 + i) for i in batch],
                output_type="pt",
                **({"use_pe": False} if "use_pe" in inspect.signature(type(pipe).__call__).parameters else {}),
            )
            for i, picture in zip(batch, images_of(output).float().cpu(), strict=True):
                pictures[i] = picture
    return judge(pictures, scenes)

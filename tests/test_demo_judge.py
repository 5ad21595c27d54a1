"""The judge reads true drawings, and refuses drawings that differ in one attribute from what was asked."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from PIL import Image

from ernie_accel.demo.judge import NOTHING, judge, summarize, unseen_prompts
from ernie_accel.embedded.scenes import (
    CANVASES,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Background,
    Object,
    Scene,
    all_backgrounds,
    is_held_out,
    random_scene,
    render,
)
from tests.attack import rounds

LEAST_ON_TRUE_DRAWINGS = 0.99
CHOICES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES, "place": PLACES}


def to_pil(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("canvas", CANVASES)
def test_true_drawings_are_right(canvas: tuple[int, int]) -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng, canvas) for _ in range(rounds(short=40, full=500))]
    found = summarize(judge(render(scenes, torch.Generator().manual_seed(0)), scenes), scenes)
    assert found.pictures == len(scenes)
    assert found.object_fraction >= LEAST_ON_TRUE_DRAWINGS
    assert all(value >= LEAST_ON_TRUE_DRAWINGS for value in found.by_attribute.values()), found


def test_noise_and_rounding_do_not_mislead() -> None:
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    scenes = [random_scene(rng, (128, 128)) for _ in range(rounds(short=50, full=100))]
    pictures = render(scenes, generator)
    noisy = (pictures + 0.04 * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)
    assert summarize(judge([to_pil(p) for p in noisy], scenes), scenes).object_fraction >= LEAST_ON_TRUE_DRAWINGS


@pytest.mark.parametrize("attribute", CHOICES)
def test_one_wrong_attribute_is_refused(attribute: str) -> None:
    """Draw scenes with one attribute of one object changed; judged against what was asked, that object is
    wrong.
    """
    rng = random.Random(2)
    asked, drawn, changed, count = [], [], [], rounds(short=50, full=100)
    while len(asked) < count:
        scene = random_scene(rng, (128, 160))
        k = rng.randrange(len(scene.objects))
        used = {getattr(o, attribute) for o in scene.objects} if attribute in ("place", "colour") else set()
        own = getattr(scene.objects[k], attribute)
        paired = len({o.place for o in scene.objects}) < len(scene.objects)
        if attribute in ("place", "size") and paired:  # there, another place or size would move the partner too
            continue
        value = rng.choice([v for v in CHOICES[attribute] if v != own and v not in used])
        objects = list(scene.objects)
        objects[k] = replace(objects[k], **{attribute: value})
        asked.append(scene)
        drawn.append(replace(scene, objects=tuple(objects)))
        changed.append(k)
    verdicts = judge(render(drawn, torch.Generator().manual_seed(2)), asked)
    refused = [not v.objects[k].is_right for v, k in zip(verdicts, changed, strict=True)]
    assert sum(refused) >= 0.99 * count
    others = [o.is_right for v, k in zip(verdicts, changed, strict=True) for i, o in enumerate(v.objects) if i != k]
    assert sum(others) / len(others) > 0.95
    assert not any(v.is_right for v, r in zip(verdicts, refused, strict=True) if r)


def test_a_wrong_background_is_refused_and_named() -> None:
    objects = (Object("red", "circle", "small", "top"),)
    asked = [Scene(objects, b) for b in all_backgrounds()]
    drawn = asked[1:] + asked[:1]
    for verdict, picture in zip(judge(render(drawn), asked), drawn, strict=True):
        assert not verdict.has_background
        assert verdict.read_background == picture.background
        assert all(o.is_right for o in verdict.objects)


def test_an_extra_object_is_a_stray() -> None:
    one, extra = Object("red", "circle", "large", "left"), Object("black", "ring", "small", "right")
    asked, drawn = Scene((one,), Background("grey")), Scene((one, extra), Background("grey"))
    verdict = judge(render([drawn])[0], asked)[0]
    assert verdict.objects[0].is_right and not verdict.is_clean and not verdict.is_right


def test_what_is_read_has_a_name() -> None:
    asked = Scene((Object("red", "circle", "large", "left"),), Background("grey"))
    blue_ring = replace(asked, objects=(Object("blue", "ring", "large", "left"),))
    small_cross = replace(asked, objects=(Object("red", "cross", "small", "left"),))
    empty = replace(asked, objects=(Object("red", "circle", "large", "bottom right"),))
    read = [v.objects[0] for v in judge(render([blue_ring, small_cross, empty]), [asked] * 3)]
    assert read[0].read_colour == "blue" and not read[0].is_placed
    assert (read[1].read_shape, read[1].read_size) == ("cross", "small") and read[1].is_placed
    assert read[2].read_colour == NOTHING


def test_a_grey_picture_holds_nothing() -> None:
    scenes = [random_scene(random.Random(i), (128, 128)) for i in range(8)]
    found = summarize(judge(torch.full((8, 3, 128, 128), 0.5), scenes), scenes)
    assert found.object_fraction == found.picture_fraction == 0


def test_pictures_and_scenes_must_fit() -> None:
    scene = random_scene(random.Random(0), (128, 128))
    with pytest.raises(ValueError, match="1 pictures and 2 scenes"):
        judge(torch.zeros(1, 3, 128, 128), [scene, scene])
    with pytest.raises(ValueError, match=r"asks for \(3, 128, 128\)"):
        judge(torch.zeros(3, 64, 64), scene)


def test_confusion_counts_every_object_once() -> None:
    scenes = [random_scene(random.Random(i), (128, 128)) for i in range(20)]
    found = summarize(judge(render(scenes), scenes), scenes)
    for attribute in ("colour", "place", "shape", "size"):
        assert sum(sum(row.values()) for row in found.confusion[attribute].values()) == found.objects
    assert "objects" in str(found)


def test_unseen_prompts_are_held_out_varied_and_repeatable() -> None:
    prompts = unseen_prompts(40)
    assert prompts == unseen_prompts(40) and prompts[:20] == unseen_prompts(20)
    assert all(is_held_out(scene) for _, scene in prompts)
    assert {(s.height, s.width) for _, s in prompts} == set(CANVASES)
    assert sum(text.isascii() for text, _ in prompts) == 20

"""The embedded model's scenes and captions: what is written is what is read and what is drawn."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ernie_accel.embedded.captions import (
    LANGUAGES,
    RequestedObject,
    SceneRequest,
    caption,
    full_caption,
    language_of,
    parse,
    random_request,
    same_content,
    unknown_part,
)
from ernie_accel.embedded.scenes import (
    CANVASES,
    COLOURS,
    MAX_OBJECTS,
    TINTS,
    Background,
    Object,
    Scene,
    all_backgrounds,
    is_held_out,
    palette,
    random_scene,
    render,
    to_batch,
)

RED_CIRCLE = Scene((Object("red", "circle", "large", "left"),), Background("cream"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_caption_reads_back_as_its_scene(language: str) -> None:
    rng = random.Random(0)
    for _ in range(2000):
        scene = random_scene(rng)
        for text in (caption(scene, rng, language), full_caption(scene, language)):
            read = parse(text)
            assert read is not None and same_content(read, scene), text
            assert language_of(text) == language


def test_captions_vary_in_words_and_length() -> None:
    rng = random.Random(0)
    texts = {caption(RED_CIRCLE, rng) for _ in range(400)}
    assert len(texts) > 100
    lengths = [len(caption(random_scene(rng), rng, "en").split()) for _ in range(400)]
    assert min(lengths) <= 13 and max(lengths) >= 40


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "red circle",
        "a large red circle at the left",
        "a red circle at the left on a cream background",
        "a large red circle on a cream background",
        "a large red circle at the left on a cream background with a dog",
        "a large red blue circle at the left on a cream background",
        "a large red circle in front of a large blue square at the left on a cream background",
        "a large red circle at the left and a small blue square at the left on a cream background",
        "左边有一个红色的圆形，米色背景",
        "左边有一个红色的大圆形",
    ],
)
def test_incomplete_or_foreign_text_is_not_read(text: str) -> None:
    assert parse(text) is None


def test_parse_knows_synonyms_and_both_orders() -> None:
    for text in (
        "A big red disc on the left side on a cream background",
        "on the left side, a large red circle; on a plain cream background",
        "左侧有一个大的红色圆，米色背景",
    ):
        assert parse(text) == RED_CIRCLE


def test_a_pair_is_read_back_to_front() -> None:
    read = parse("a small red ring in front of a large blue square at the top on a striped grey background")
    assert read is not None
    assert [o.colour for o in read.objects] == ["blue", "red"]
    assert not read.lies_in_front(0) and read.lies_in_front(1)


def test_random_scenes_keep_their_promises() -> None:
    rng = random.Random(0)
    counts = set()
    for _ in range(3000):
        scene = random_scene(rng)
        counts.add(len(scene.objects))
        places = [o.place for o in scene.objects]
        assert all(places.count(p) <= 2 for p in places)
        for i, o in enumerate(scene.objects):
            if scene.lies_in_front(i):
                assert o.size == "small" and scene.objects[places.index(o.place)].size == "large"
    assert counts == set(range(1, MAX_OBJECTS + 1))


def test_the_held_out_split_is_disjoint_and_about_a_sixteenth() -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(4000)]
    assert sum(map(is_held_out, scenes)) / len(scenes) == pytest.approx(1 / 16, abs=0.015)
    assert all(is_held_out(random_scene(rng, held_out=True)) for _ in range(20))
    assert not any(is_held_out(random_scene(rng, held_out=False)) for _ in range(200))
    assert is_held_out(RED_CIRCLE) == is_held_out(replace(RED_CIRCLE, height=192))


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_requests_own_scene_keeps_it(language: str) -> None:
    rng = random.Random(0)
    for _ in range(1000):
        request, scene = random_request(rng, language)
        assert request.is_kept_by(scene), request


def test_a_request_is_not_kept_by_another_scene() -> None:
    request = SceneRequest("red circle", (RequestedObject("red", "circle"),))
    assert request.is_kept_by(RED_CIRCLE)
    assert not request.is_kept_by(None)
    for change in ({"colour": "blue"}, {"shape": "ring"}):
        other = replace(RED_CIRCLE, objects=(replace(RED_CIRCLE.objects[0], **change),))
        assert not request.is_kept_by(other)
    assert not request.is_kept_by(replace(RED_CIRCLE, objects=RED_CIRCLE.objects * 2))


@pytest.mark.parametrize("canvas", CANVASES)
def test_a_drawing_has_its_colours_where_they_belong(canvas: tuple[int, int]) -> None:
    height, width = canvas
    scene = replace(RED_CIRCLE, height=height, width=width)
    picture = render([scene])[0]
    assert picture.shape == (3, height, width)
    x, y = (round(v) for v in scene.centre_px(0))
    torch.testing.assert_close(picture[:, y, x], palette(COLOURS)[0])
    torch.testing.assert_close(picture[:, 2, -2], palette(TINTS)[1])


def test_drawing_is_deterministic_and_jitter_is_seeded() -> None:
    scenes = [random_scene(random.Random(i), (128, 160)) for i in range(4)]
    assert torch.equal(render(scenes), render(scenes))
    one, same, other = (render(scenes, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_pair_overlaps_and_the_later_object_covers() -> None:
    pair = (Object("blue", "square", "large", "center"), Object("red", "square", "small", "center"))
    picture = render([Scene(pair, Background("white"))])[0]
    x, y = (round(v) for v in Scene(pair, Background("white")).centre_px(1))
    torch.testing.assert_close(picture[:, y, x], palette(COLOURS)[list(COLOURS).index("red")])
    torch.testing.assert_close(picture[:, 64, 64], palette(COLOURS)[list(COLOURS).index("blue")])


def test_backgrounds_all_differ() -> None:
    scenes = [Scene(RED_CIRCLE.objects, b) for b in all_backgrounds()]
    pictures = render(scenes).flatten(1)
    assert len(all_backgrounds()) == 54
    assert torch.cdist(pictures, pictures).fill_diagonal_(1e9).min() > 1


def test_a_batch_of_mixed_canvases_is_refused() -> None:
    with pytest.raises(ValueError, match="one canvas"):
        to_batch([RED_CIRCLE, replace(RED_CIRCLE, height=160)])


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, ernie_accel.demo; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_caption_and_every_short_prompt_is_known_to_the_embedded_model():
    rng = random.Random(5)
    for _ in range(500):
        for text in (caption(random_scene(rng), rng), random_request(rng)[0].text):
            assert unknown_part(text) is None, text


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a product photo of a red mug", "it does not know 'product'"),
        ("a red t-shirt", "it does not know 't-shirt'"),
        ("a teal square", "it does not know 'teal'"),
        ("红色的马克杯", "it does not know '马'"),
        ("red on cream", "it names no shape"),
        ("", "it names no shape"),
        ("a red circle, masterpiece", "it does not know 'masterpiece'"),
    ],
)
def test_what_the_embedded_model_does_not_know_is_named(prompt, reason):
    assert unknown_part(prompt) == reason

"""The language of the scenes: English and Chinese captions, the parser that reads them back, and short
prompts.

`caption` and `parse` are a pair: whatever `caption` writes, `parse` reads as the same objects and
background. A :class:`SceneRequest` is what a person in a hurry types ("red circle", "两个圆形"). The
prompt enhancer turns it into a `full_caption`, and `SceneRequest.is_kept_by` checks whether the result still holds
what was asked for.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

from ernie_accel.common.language import said
from ernie_accel.embedded.scenes import (
    COLOURS,
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    TINTS,
    Background,
    Object,
    Scene,
    random_scene,
)

LANGUAGES = ("en", "zh")

# The first word of each entry is the one that `full_caption` uses.
_WORDS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "en": {
        "colour": {c: (c,) for c in COLOURS} | {"purple": ("purple", "violet"), "cyan": ("cyan", "turquoise")},
        "shape": {s: (s,) for s in SHAPES} | {"circle": ("circle", "disc"), "cross": ("cross", "plus sign")},
        "size": {"small": ("small", "little"), "large": ("large", "big")},
        "place": {
            "top left": ("top left", "upper left"),
            "top": ("top",),
            "top right": ("top right", "upper right"),
            "left": ("left",),
            "center": ("center", "middle"),
            "right": ("right",),
            "bottom left": ("bottom left", "lower left"),
            "bottom": ("bottom",),
            "bottom right": ("bottom right", "lower right"),
        },
        "tint": {t: (t, t.replace("pale", "light")) if "pale" in t else (t,) for t in TINTS},
        "texture": {"striped": ("striped",), "dotted": ("dotted",), "checked": ("checked", "checkered")},
        "in front": {"in front": ("in front of", "partly covering", "overlapping")},
    },
    "zh": {
        "colour": {
            "red": ("红色",),
            "orange": ("橙色",),
            "yellow": ("黄色",),
            "green": ("绿色",),
            "cyan": ("青色",),
            "blue": ("蓝色",),
            "purple": ("紫色",),
            "black": ("黑色",),
        },
        "shape": {
            "circle": ("圆形", "圆"),
            "square": ("正方形", "方块"),
            "triangle": ("三角形",),
            "ring": ("圆环",),
            "cross": ("十字", "十字形"),
        },
        "size": {"small": ("小",), "large": ("大",)},
        "place": {
            "top left": ("左上角", "左上方"),
            "top": ("上方", "顶部"),
            "top right": ("右上角", "右上方"),
            "left": ("左边", "左侧"),
            "center": ("中间", "中央"),
            "right": ("右边", "右侧"),
            "bottom left": ("左下角", "左下方"),
            "bottom": ("下方", "底部"),
            "bottom right": ("右下角", "右下方"),
        },
        "tint": {
            "white": ("白色",),
            "cream": ("米色",),
            "grey": ("灰色",),
            "pale blue": ("浅蓝色",),
            "pale green": ("浅绿色",),
            "pale pink": ("浅粉色",),
        },
        "texture": {"striped": ("条纹",), "dotted": ("圆点",), "checked": ("方格",)},
        "in front": {"in front": ("挡在",)},
    },
}
_FILLERS = {
    "en": [
        "a",
        "an",
        "one",
        "the",
        "at",
        "in",
        "on",
        "of",
        "with",
        "and",
        "there",
        "is",
        "from",
        "to",
        "fading",
        "gradient",
        "plain",
        "background",
        "corner",
        "side",
        "edge",
        "picture",
        "drawing",
        "image",
        "showing",
    ],
    "zh": [
        "一个",
        "一幅画",
        "图片",
        "画面",
        "的",
        "有",
        "在",
        "是",
        "和",
        "上",
        "从",
        "渐变",
        "到",
        "纯色",
        "背景",
        "前面",
    ],
}
_PUNCTUATION = ",.:;，。：；、"
_PARTLY_VISIBLE = "in front"


def _build_lexicon() -> tuple[re.Pattern[str], dict[str, tuple[str, str]]]:
    """Return a pattern that matches one known word or phrase, longest first, and the meaning of each."""
    meaning: dict[str, tuple[str, str]] = {}
    patterns: dict[str, str] = {}
    for language in LANGUAGES:
        phrases = {p: (kind, key) for kind, t in _WORDS[language].items() for key, ps in t.items() for p in ps}
        meaning |= phrases
        for phrase in (*phrases, *_FILLERS[language]):
            patterns[phrase] = rf"\b{phrase}\b" if language == "en" else phrase
    patterns |= {mark: re.escape(mark) for mark in _PUNCTUATION}
    longest_first = sorted(patterns, key=len, reverse=True)
    return re.compile(r"\s*(" + "|".join(patterns[p] for p in longest_first) + r")\s*"), meaning


_TOKEN, _MEANING = _build_lexicon()


def language_of(text: str) -> str:
    """Return "zh" if there is any Chinese character in the text, else "en"."""
    return "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"


_NUMBERED = {"en": ("two", "2"), "zh": ("两个", "2个")}
_ASKING = {"en": ("please", "draw", "i", "want"), "zh": ("请画", "画")}


def _build_request_token() -> re.Pattern[str]:
    """Return a pattern that matches what a short prompt may contain beside the words of a caption."""
    english = [*_NUMBERED["en"], *_ASKING["en"], *(_plural(s) for ss in _WORDS["en"]["shape"].values() for s in ss)]
    chinese = [*_NUMBERED["zh"], *_ASKING["zh"]]
    alternatives = sorted([*(rf"\b{word}\b" for word in english), *chinese], key=len, reverse=True)
    return re.compile(r"\s*(" + "|".join(alternatives) + r")\s*")


def _plural(word: str) -> str:
    return f"{word}es" if word.endswith("s") else f"{word}s"


_REQUEST_TOKEN = _build_request_token()
_SHAPES = tuple(word for t in _WORDS.values() for words in t["shape"].values() for word in words)


def unknown_part(prompt: str) -> str | None:
    """Return what the embedded model cannot draw in a prompt: an unknown word, or the lack of a shape; None: nothing.

    Every word must occur in captions or in short prompts, in English or Chinese. Whether the words make sense together
    is not checked.
    """
    text, position = prompt.strip().lower(), 0
    while position < len(text):
        ends = [found.end() for token in (_TOKEN, _REQUEST_TOKEN) if (found := token.match(text, position))]
        if not ends:
            words = re.findall(r"[a-z0-9'-]+|\S", text[position : position + 40])
            return said("it does not know {word!r}", word=words[0])
        position = max(ends)
    return None if any(shape in text for shape in _SHAPES) else said("it names no shape")


def parse(text: str, canvas: tuple[int, int] = (128, 128)) -> Scene | None:
    """Read a full caption of the grammar.

    Returns:
        The scene, its objects in the order of places and then back to front, with the given (height, width);
        None if the text has a word the grammar does not know, or an object without its colour, shape, size or
        place.
    """
    words = _read_words(text.strip().lower())
    if words is None:
        return None
    background = _read_background(words)
    objects = _read_objects([w for w in words if w[0] not in ("tint", "texture")])
    if background is None or objects is None:
        return None
    return Scene(tuple(objects), background, *canvas)


def _read_words(text: str) -> list[tuple[str, str]] | None:
    words, position = [], 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            return None
        if found[1] in _MEANING:
            words.append(_MEANING[found[1]])
        position = found.end()
    return words


def _read_background(words: Iterable[tuple[str, str]]) -> Background | None:
    tints = [key for kind, key in words if kind == "tint"]
    textures = [key for kind, key in words if kind == "texture"]
    if len(tints) == 1 and len(textures) <= 1:
        return Background(tints[0], texture=textures[0] if textures else None)
    if len(tints) == 2 and tints[0] != tints[1] and not textures:
        return Background(tints[0], fades_to=tints[1])
    return None


def _read_objects(words: Sequence[tuple[str, str]]) -> list[Object] | None:
    """Read (place, group) clauses, or (group, place) clauses if the first word is no place."""
    place_first = bool(words) and words[0][0] == "place"
    clauses: list[list[tuple[str, str]]] = [[]]
    for word in words:
        if place_first and word[0] == "place" and clauses[-1]:
            clauses.append([])
        clauses[-1].append(word)
        if not place_first and word[0] == "place":
            clauses.append([])
    groups = [_read_group(clause) for clause in clauses if clause]
    objects = [o for group in groups if group is not None for o in group]
    places = {o.place for o in objects}
    if None in groups or len(places) != len(groups) or not 1 <= len(objects) <= MAX_OBJECTS:
        return None
    return sorted(objects, key=lambda o: PLACES.index(o.place))


def _read_group(clause: Sequence[tuple[str, str]]) -> list[Object] | None:
    """Read one object, or two of which the first lies in front of the second, and their one place."""
    places = [key for kind, key in clause if kind == "place"]
    words = [w for w in clause if w[0] != "place"]
    expected = {"colour", "shape", "size"}
    halves = [words[:3], words[4:]] if len(words) == 7 and words[3][0] == _PARTLY_VISIBLE else [words]
    if len(places) != 1 or any(len(h) != 3 or {kind for kind, _ in h} != expected for h in halves):
        return None
    back_to_front = [Object(place=places[0], **dict(h)) for h in reversed(halves)]
    if len(back_to_front) == 2 and [o.size for o in back_to_front] != ["large", "small"]:
        return None
    return back_to_front


def same_content(one: Scene, other: Scene) -> bool:
    """Return whether two scenes have the same content, whatever the canvas and the order of places."""
    ordered = [sorted(s.objects, key=lambda o: PLACES.index(o.place)) for s in (one, other)]
    return ordered[0] == ordered[1] and one.background == other.background


def caption(scene: Scene, rng: random.Random, language: str | None = None) -> str:
    """Write one of the many captions of a scene; about a dozen styles, in English or Chinese (by chance)."""
    language = language if language is not None else rng.choice(LANGUAGES)
    return _CaptionWriter(language, rng).write(scene)


def full_caption(scene: Scene, language: str) -> str:
    """Write the one canonical caption of a scene, objects in the scene's order: the prompt enhancer's
    style.
    """
    return _CaptionWriter(language, None).write(scene)


class _CaptionWriter:
    """Choose words and word order at random, or always the first choice if there is no `rng`."""

    def __init__(self, language: str, rng: random.Random | None) -> None:
        self._words = _WORDS[language]
        self._is_english = language == "en"
        self._rng = rng

    def write(self, scene: Scene) -> str:
        groups = self._groups(scene)
        text = self._english(groups, scene.background) if self._is_english else self._chinese(groups, scene)
        return text[0].upper() + text[1:] if self._is_english and self._pick("keep", "capital") == "capital" else text

    def _pick(self, *choices: str) -> str:
        return choices[0] if self._rng is None else self._rng.choice(choices)

    def _word(self, kind: str, key: str) -> str:
        return self._pick(*self._words[kind][key])

    def _groups(self, scene: Scene) -> list[tuple[str, str]]:
        """Return (what, where) of each place, pairs as one group."""
        by_place: dict[str, list[Object]] = {}
        for o in scene.objects:
            by_place.setdefault(o.place, []).append(o)
        places = list(by_place)
        if self._rng is not None:
            places.sort(key=PLACES.index)
            self._rng.shuffle(places)
        return [(self._group(by_place[p]), self._place(p)) for p in places]

    def _group(self, objects: Sequence[Object]) -> str:
        front_to_back = [self._object(o) for o in reversed(objects)]
        if len(front_to_back) == 1:
            return front_to_back[0]
        link = self._word("in front", "in front")
        return (
            f"{front_to_back[0]} {link} {front_to_back[1]}"
            if self._is_english
            else (f"{front_to_back[0]}{link}{front_to_back[1]}前面")
        )

    def _object(self, o: Object) -> str:
        colour, shape, size = (
            self._word("colour", o.colour),
            self._word("shape", o.shape),
            self._word("size", o.size),
        )
        if self._is_english:
            return f"a {size} {colour} {shape}"
        return self._pick(f"一个{colour}的{size}{shape}", f"一个{size}的{colour}{shape}", f"{colour}{size}{shape}")

    def _place(self, place: str) -> str:
        word = self._word("place", place)
        if not self._is_english:
            return word
        if " " in place:
            return self._pick(f"at the {word}", f"in the {word} corner", f"in the {word}")
        if place == "center":
            return self._pick(f"in the {word}", f"at the {word}")
        return self._pick(f"at the {word}", f"on the {word} side", f"at the {word} edge")

    def _background(self, background: Background) -> str:
        tint = self._word("tint", background.tint)
        if background.fades_to is not None:
            other = self._word("tint", background.fades_to)
            if not self._is_english:
                return f"从{tint}渐变到{other}的背景"
            return self._pick(
                f"background fading from {tint} to {other}", f"gradient background from {tint} to {other}"
            )
        if background.texture is not None:
            texture = self._word("texture", background.texture)
            return f"{texture} {tint} background" if self._is_english else f"{tint}的{texture}背景"
        if self._is_english:
            return self._pick(f"plain {tint} background", f"{tint} background")
        return self._pick(f"{tint}背景", f"{tint}的纯色背景")

    def _english(self, groups: Sequence[tuple[str, str]], background: Background) -> str:
        setting = self._background(background)
        intro = self._pick("", "", "a picture of ", "a drawing of ", "an image showing ")
        style = self._pick("list", "place first", "sentences", "background first")
        if style == "list":
            return f"{intro}{_join_english([f'{what} {where}' for what, where in groups])} on a {setting}"
        if style == "place first":
            return f"{'; '.join(f'{where}, {what}' for what, where in groups)}; on a {setting}"
        if style == "sentences":
            return " ".join(f"There is {what} {where}." for what, where in groups) + f" There is a {setting}."
        return f"a {setting} with {_join_english([f'{what} {where}' for what, where in groups])}"

    def _chinese(self, groups: Sequence[tuple[str, str]], scene: Scene) -> str:
        setting = self._background(scene.background)
        style = self._pick("place first", "background first", "list", "sentences")
        if style == "place first":
            return "，".join(f"{where}有{what}" for what, where in groups) + f"，{setting}"
        if style == "background first":
            return f"{setting}上，" + "，".join(f"{where}是{what}" for what, where in groups)
        if style == "list":
            return self._pick("", "一幅画：") + "、".join(f"{what}在{where}" for what, where in groups) + f"，{setting}"
        return f"画面{'。画面'.join(f'的{where}有{what}' for what, where in groups)}。背景是{setting}。"


def _join_english(parts: Sequence[str]) -> str:
    return " and ".join(parts) if len(parts) < 3 else ", ".join(parts[:-1]) + " and " + parts[-1]


@dataclass(frozen=True)
class RequestedObject:
    """What a short prompt says about one object; None is left open."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    place: str | None = None

    def is_met_by(self, o: Object) -> bool:
        """Return whether the object has every attribute that is asked for."""
        asked = (self.colour, self.shape, self.size, self.place)
        return all(a in (None, b) for a, b in zip(asked, (o.colour, o.shape, o.size, o.place), strict=True))


@dataclass(frozen=True)
class SceneRequest:
    """A short prompt, and what it asks for."""

    text: str
    objects: tuple[RequestedObject, ...]
    background: Background | None = None

    def is_kept_by(self, scene: Scene | None) -> bool:
        """Return whether the scene has the requested objects, no others, and the requested background."""
        if scene is None or len(scene.objects) != len(self.objects):
            return False
        if self.background not in (None, scene.background):
            return False
        return any(
            all(r.is_met_by(o) for r, o in zip(self.objects, order, strict=True))
            for order in permutations(scene.objects)
        )


def random_request(
    rng: random.Random, language: str | None = None, *, held_out: bool | None = None
) -> tuple[SceneRequest, Scene]:
    """Draw a short prompt and one scene that answers it (`held_out` as in `random_scene`)."""
    language = language if language is not None else rng.choice(LANGUAGES)
    while True:
        scene = random_scene(rng, held_out=held_out)
        places = {o.place for o in scene.objects}
        alike = len(scene.objects) == 2 and scene.objects[0].shape == scene.objects[1].shape
        if len(places) == len(scene.objects) and (alike or rng.random() < (0.9, 0.5, 0.2, 0.1)[len(places) - 1]):
            break
    if alike:
        shape = scene.objects[0].shape
        return SceneRequest(_counted(shape, language, rng), (RequestedObject(shape=shape),) * 2), scene
    asked = [_forget(o, rng) for o in scene.objects]  # in the scene's order, which the answer keeps
    background = scene.background if rng.random() < 0.25 else None
    return SceneRequest(_short_text(asked, background, language, rng), tuple(asked), background), scene


def _forget(o: Object, rng: random.Random) -> RequestedObject:
    """Leave some attributes open; keep the shape, which the sentence needs."""
    return RequestedObject(
        colour=o.colour if rng.random() < 0.85 else None,
        shape=o.shape,
        size=o.size if rng.random() < 0.25 else None,
        place=o.place if rng.random() < 0.35 else None,
    )


def _counted(shape: str, language: str, rng: random.Random) -> str:
    word = rng.choice(_WORDS[language]["shape"][shape])
    if language == "zh":
        return f"{rng.choice(_NUMBERED['zh'])}{word}"
    return f"{rng.choice(_NUMBERED['en'])} {_plural(word)}"


def _short_text(
    asked: Sequence[RequestedObject], background: Background | None, language: str, rng: random.Random
) -> str:
    """Write "red circle", "a blue square left and a ring on cream", "左边的红色圆形" and the like."""
    words = _WORDS[language]
    english = language == "en"
    article = rng.choice(("", "a ")) if english else rng.choice(("", "一个"))

    def say(r: RequestedObject) -> str:
        values = (("size", r.size), ("colour", r.colour), ("shape", r.shape))
        said = [rng.choice(words[kind][key]) for kind, key in values if key is not None]
        where = rng.choice(words["place"][r.place]) if r.place is not None else ""
        if not english:
            return (f"{where}的" if where else "") + article + "".join(said)
        prefix = rng.choice(("", "on the ", "at the ")) if where else ""
        return f"{article}{' '.join(said)} {prefix}{where}".strip()

    parts = [say(r) for r in asked]
    text = (rng.choice((" and ", ", ")) if english else rng.choice(("和", "，"))).join(parts)
    if background is not None:
        setting = _CaptionWriter(language, rng)._background(background)
        text += f" on a {setting}" if english else f"，{setting}"
    if rng.random() < 0.1:
        text = rng.choice(("draw ", "please draw ", "I want ")) + text if english else rng.choice(("画", "请画")) + text
    return text

"""Judge what servers answer: sizes before contents, types before use, and words before anybody sees them."""

from __future__ import annotations

import base64
import email.utils
import io
import json
import re
import struct
import time
import unicodedata
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from ernie_accel.batch.engines.address import redacted
from ernie_accel.batch.engines.wire import Answer
from ernie_accel.common.text import one_line

MAX_UNASKED_PIXELS = 2048 * 2048
"""The largest picture taken where the row leaves the size to the server."""

MAX_WORDS_BYTES = 1 << 20
"""The largest answer that holds words: an enhanced prompt, the names of models."""

MAX_REFUSAL_BYTES = 64 << 10
"""What is read of an answer that is an error."""

_ENVELOPE = 256 << 10  # bytes of an answer around its picture: a revised prompt, names, times
_MAX_BRACKETS = 5_000  # of lists and objects; an answer has a handful, a prompt that it repeats may have some
_MAX_COMMAS = 50_000
_MAX_MESSAGE = 300  # characters
_MAX_PROMPT = 20_000  # characters; the enhancer is asked for 2048 tokens

_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

_UNPACKED_AT_ONCE = 1 << 18  # bytes
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_END = 33  # signature, and the chunk IHDR
_COLOURS = {0: "grayscale", 2: "RGB", 3: "palette", 4: "grayscale with alpha", 6: "RGBA"}
_OTHER_FORMATS = ((b"\xff\xd8\xff", "JPEG"), (b"GIF8", "GIF"), (b"RIFF", "WebP"), (b"BM", "BMP"), (b"II*\0", "TIFF"))


class PassingError(Exception):
    """An answer that may be better at the next attempt.

    Attributes:
        wait_s: Seconds that the server wants to be left alone; None: it does not say.
    """

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        self.wait_s = wait_s
        super().__init__(reason)


class RefusalError(Exception):
    """An answer that will be the same however often the server is asked.

    Attributes:
        status: The HTTP status; None if the server answered well-formed and wrongly.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(reason)


def picture_limit(size: tuple[int, int] | None) -> int:
    """Return how many bytes an answer with a picture of `size` may have.

    8-bit RGB that does not compress takes three bytes a pixel and one a row in PNG, and in base64 four thirds of that.
    """
    pixels = MAX_UNASKED_PIXELS if size is None else size[0] * size[1]
    return _ENVELOPE + 5 * pixels


def parse_answer(answer: Answer, hide: Callable[[str], str]) -> object:
    """Return the JSON of a good answer.

    Args:
        answer: As received.
        hide: Hides credentials in a text; applied to what is shown, before it is cut.

    Raises:
        PassingError: The server is busy or failed, or what it sent is not JSON.
        RefusalError: The server does not want to.
    """
    status = answer.status
    if status in _RETRIED_STATUS:
        raise PassingError(f"answered {status}: {message_in(answer.content, hide)}", retry_after_s(answer.headers))
    if 300 <= status < 400:
        target = redacted(hide(answer.headers.get("location", "nowhere")))[:_MAX_MESSAGE]
        raise RefusalError(f"it redirects to {target}; that is not followed, name the final address", status)
    if status != 200:
        raise RefusalError(message_in(answer.content, hide), status)
    content = answer.content
    if content.count(b"[") + content.count(b"{") > _MAX_BRACKETS or content.count(b",") > _MAX_COMMAS:
        raise PassingError(f"sent {len(content)} bytes of far more values than an answer has")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or nested too deeply
        kind = one_line(hide(answer.headers.get("content-type", "no content type")), 60)
        raise PassingError(f"sent {len(content)} bytes ({kind}) that are not JSON, or were cut off") from None


def picture_in(answer: object, size: tuple[int, int] | None) -> Image.Image:
    """Return the picture of an answer, decoded in full, so that one cut off shows here and not in the file.

    Args:
        answer: As parsed.
        size: Width and height that were asked for; None: they were left to the server.

    Raises:
        PassingError: There is none, or it is damaged.
        RefusalError: It is not what was asked for.
    """
    encoded = _only(answer).get("b64_json")
    if not isinstance(encoded, str) or not encoded:
        raise PassingError("answered without data[0].b64_json, the picture as base64 text")
    try:
        png = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise PassingError("sent a picture whose base64 is damaged") from None
    _check_header(png, size)
    try:
        picture = Image.open(io.BytesIO(_pixels_only(png)), formats=("PNG",))
        picture.load()
    # What Pillow raises for damaged files (SyntaxError: a broken chunk), and for what exceeds its own limit of pixels.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise PassingError(f"sent a picture that cannot be decoded ({one_line(str(error), 100)})") from None
    return picture


def revised_prompt_in(answer: object, sent: str) -> str | None:
    """Return the prompt that the server says it used, if it differs from what was sent; None proves nothing."""
    revised = _only(answer).get("revised_prompt")
    if not isinstance(revised, str) or not revised.strip() or len(revised) > _MAX_PROMPT:
        return None
    return None if _prompt(revised) == _prompt(sent) else _prompt(revised)


def enhanced_prompt_in(answer: Any) -> str:
    """Return the words of a chat answer; empty where it has none.

    Raises:
        PassingError: It is no chat answer, or is too long for a prompt.
    """
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise PassingError("answered without choices[0].message.content as text")
    if len(content) > _MAX_PROMPT:
        raise PassingError(f"enhanced a prompt to {len(content)} characters; expected {_MAX_PROMPT} at most")
    return _prompt(content)


def model_in(answer: Any) -> str:
    """Return the name of the first model that a server lists.

    Raises:
        PassingError: It lists none.
    """
    try:
        name = answer["data"][0]["id"]
    except (KeyError, IndexError, TypeError):
        name = None
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_MESSAGE:
        raise PassingError("names no model")
    return name


def message_in(content: bytes | bytearray, hide: Callable[[str], str]) -> str:
    """Return what a server says went wrong, in one line: OpenAI's error, FastAPI's detail, or the text itself."""
    text = bytes(content[:MAX_REFUSAL_BYTES]).decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        error = found.get("error", found.get("detail"))
        error = error.get("message") if isinstance(error, dict) else error
        text = error if isinstance(error, str) else text
    return one_line(" ".join(hide(text).split()), _MAX_MESSAGE) or "no reason given"


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After header, which holds a number or a date; None for anything else."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value[:100]).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _only(answer: object) -> Mapping[str, object]:
    """Return the one object in an answer's `data`, empty if it is not so."""
    data = answer.get("data") if isinstance(answer, dict) else None
    return data[0] if isinstance(data, list) and len(data) == 1 and isinstance(data[0], dict) else {}


def _prompt(text: str) -> str:
    """Return words as a prompt can hold them: in any language and in lines, without controls and lone surrogates."""
    bad = {ord(c): " " for c in set(text) if c != "\n" and unicodedata.category(c) in ("Cc", "Cs")}
    return text.translate(bad).strip()


def _check_header(png: bytes, size: tuple[int, int] | None) -> None:
    """Refuse a picture by the 33 bytes that say what it is, before any memory is taken for it."""
    if not png.startswith(_SIGNATURE):
        for beginning, name in _OTHER_FORMATS:
            if png.startswith(beginning):
                raise RefusalError(f"it made a {name} where PNG, which loses nothing, was asked for")
        raise PassingError(f"sent {len(png)} bytes that are not a PNG")
    if len(png) < _HEADER_END or png[8:16] != b"\0\0\0\rIHDR" or not _intact(png, 8, _HEADER_END):
        raise PassingError("sent a PNG whose header is damaged")
    width, height, bits, colours = struct.unpack_from(">IIBB", png, 16)
    if size is not None and (width, height) != size:
        raise RefusalError(f"it made a picture of {width}x{height} px where {size[0]}x{size[1]} were asked for")
    if width * height > MAX_UNASKED_PIXELS and size is None:
        reason = f"it made a picture of {width}x{height} px, more than is accepted unasked; give rows width and height"
        raise RefusalError(reason)
    if (bits, colours) != (8, 2):
        found = f"{bits}-bit {_COLOURS.get(colours, f'colour type {colours}')}"
        raise RefusalError(f"it made a picture in {found}; expected 8-bit RGB")


def _pixels_only(png: bytes) -> bytes:
    """Return a PNG without texts, profiles and whatever else is not its pixels: those could be large once unpacked."""
    kept, at = [png[:_HEADER_END]], _HEADER_END
    pixels = _Pixels(png)
    while at + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        end = at + 12 + length
        if end > len(png):
            break
        if kind == b"acTL":
            raise RefusalError("it made an animated picture; expected a still one")
        if not _intact(png, at, end):
            raise PassingError("sent a picture that is damaged: a checksum is wrong")
        if kind == b"IEND" or (kind == b"IDAT" and length):
            kept.append(png[at:end])
            pixels.add(memoryview(png)[at + 8 : end - 4])
        if kind == b"IEND":
            pixels.check()
            return b"".join(kept)
        at = end
    raise PassingError("sent a picture that is cut off")


class _Pixels:
    """Counts the bytes of unpacked pixels without keeping them: Pillow leaves missing ones black, silently."""

    def __init__(self, png: bytes) -> None:
        width, height, _, _, _, _, interlaced = struct.unpack_from(">IIBBBBB", png, 16)
        self._left = height * (1 + 3 * width)  # a row begins with a byte that names its filter
        self._counted = not interlaced
        self._unpacker = zlib.decompressobj()

    def add(self, packed: memoryview) -> None:
        rest: bytes | memoryview = packed
        while self._counted and not self._unpacker.eof:
            try:
                count = len(self._unpacker.decompress(rest, _UNPACKED_AT_ONCE))
            except zlib.error:
                raise PassingError("sent a picture whose pixels cannot be unpacked") from None
            self._left -= count
            rest = self._unpacker.unconsumed_tail
            if self._left < 0 or (not rest and count < _UNPACKED_AT_ONCE):
                break

    def check(self) -> None:
        if self._counted and self._left:
            which = "fewer" if self._left > 0 else "more"
            raise PassingError(f"sent a picture of {which} pixels than its header says")


def _intact(png: bytes, start: int, end: int) -> bool:
    (checksum,) = struct.unpack_from(">I", png, end - 4)
    return bool(zlib.crc32(memoryview(png)[start + 4 : end - 4]) == checksum)

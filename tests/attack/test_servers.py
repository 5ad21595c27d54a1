"""Image servers that do their worst: each answer ends as a picture or a clear error, in bounded time and memory."""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import random
import socket
import struct
import threading
import time
import traceback
import tracemalloc
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from PIL import Image

from ernie_accel.batch import produce
from ernie_accel.batch.engines import Request
from ernie_accel.batch.engines.http import HttpEngine, ServerRefusedError, ServersFailedError
from tests.attack import FULL, SEED, rounds
from tests.little_work import little_work
from tests.stub_engine import make_rows

TIMEOUT_S = 0.25
MAX_GROWTH = 64 * 2**20
SIZE = (64, 48)
USER, PASSWORD, TOKEN, KEY, ENHANCER_KEY = "maker", "pa%2Fss-wørd", "tok-4711", "sk-image-0815", "sk-enhancer-0042"
SECRETS = ("pa%2Fss-w", "pa/ss-w", TOKEN, KEY, ENHANCER_KEY, base64.b64encode(f"{USER}:pa/ss-wørd".encode()).decode())

Deed = Callable[[socket.socket], None]
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\r\n"


class Server:
    """Reads each request and does a deed with its connection, then closes it."""

    def __init__(self) -> None:
        self.deed: Deed = lambda connection: None
        self.requests: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection, self.deed), daemon=True).start()

    def _serve(self, connection: socket.socket, deed: Deed) -> None:
        with suppress(OSError), connection:
            connection.settimeout(5)
            self.requests.append(_request(connection))
            deed(connection)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            connection.settimeout(0.1)
            while connection.recv(65536):  # or the reset would overtake what was sent
                pass


def _request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:]).get(b"content-length", 0))
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def sends(*pieces: bytes, pause_s: float = 0.0, for_ever: bool = False) -> Deed:
    def deed(connection: socket.socket) -> None:
        while True:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
            if not for_ever:
                return

    return deed


def then(*deeds: Deed) -> Deed:
    def deed(connection: socket.socket) -> None:
        for each in deeds:
            each(connection)

    return deed


def slowly(data: bytes) -> Deed:
    return sends(*(data[i : i + 1] for i in range(len(data))), pause_s=0.02)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def answer(body: bytes | str, status: str = "200 OK", *headers: str, length: str | None = None) -> bytes:
    content = body.encode() if isinstance(body, str) else body
    lines = [
        f"HTTP/1.1 {status}",
        "Connection: close",
        *headers,
        f"Content-Length: {len(content) if length is None else length}",
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


def gives(value: object, status: str = "200 OK", *headers: str) -> Deed:
    return sends(answer(json.dumps(value), status, *headers))


def gives_picture(png: bytes, **more: object) -> Deed:
    return gives({"data": [{"b64_json": base64.b64encode(png).decode(), **more}]})


def image(mode: str = "RGB", kind: str = "PNG", size: tuple[int, int] = SIZE, **options: object) -> bytes:
    file = io.BytesIO()
    noise = random.Random(0).randbytes(3 * size[0] * size[1])
    Image.frombytes("RGB", size, noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    *chunks: bytes, size: tuple[int, int] = SIZE, bits: int = 8, colours: int = 2, rows: int | None = None
) -> bytes:
    """Return a black PNG with `chunks` before its pixels."""
    pixels = zlib.compressobj(1)
    line = bytes(1 + size[0] * 3 * bits // 8)
    data = b"".join(pixels.compress(line) for _ in range(size[1] if rows is None else rows)) + pixels.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def zeros(megabytes: int, wbits: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(megabytes)) + packer.flush()


GOOD = image()
GOOD_ANSWER = answer(json.dumps({"data": [{"b64_json": base64.b64encode(GOOD).decode()}]}))
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BOMB_MB = 1000 if FULL else 64
FAILED, REFUSED, MADE = "failed", "refused", "made"


def faults() -> Iterator[tuple[str, str, Deed]]:
    """Yield what a server does, and how that must end."""
    # time
    yield "silent", FAILED, lambda connection: time.sleep(2 * TIMEOUT_S)
    yield "slow status line", FAILED, slowly(HEAD)
    yield "slow headers", FAILED, then(sends(HEAD), slowly(b"X-Header: " + b"x" * 999))
    yield "slow body", FAILED, then(sends(GOOD_ANSWER[:60]), slowly(GOOD_ANSWER[60:]))
    yield "slow chunks", FAILED, then(sends(CHUNKED), sends(b"1\r\n{\r\n", pause_s=0.02, for_ever=True))
    yield "slow interim answers", FAILED, sends(b"HTTP/1.1 100 Continue\r\n\r\n", pause_s=0.02, for_ever=True)
    # endless
    yield "endless interim answers", FAILED, sends(b"HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n" * 999, for_ever=True)
    yield "endless header", FAILED, then(sends(HEAD + b"X: "), sends(b"x" * 65536, for_ever=True))
    yield "endless headers", FAILED, then(sends(HEAD), sends(b"X: y\r\n" * 9999, for_ever=True))
    yield "endless body", FAILED, then(sends(HEAD + b"\r\n"), sends(b" " * 65536, for_ever=True))
    yield "endless chunks", FAILED, then(sends(CHUNKED), sends(b"ffff\r\n" + b" " * 65535 + b"\r\n", for_ever=True))
    yield "endless tiny chunks", FAILED, then(sends(CHUNKED), sends(b"1\r\n \r\n" * 9999, for_ever=True))
    trailer = b"0\r\n" + b"X: y\r\n" * 9999
    yield "endless trailers", FAILED, then(sends(CHUNKED), sends(trailer), sends(b"X: y\r\n" * 9999, for_ever=True))
    endless_error = then(sends(b"HTTP/1.1 400 No\r\n\r\n"), sends(b"no " * 9999, for_ever=True))
    yield "endless refusal", REFUSED, endless_error
    endless_error = then(sends(b"HTTP/1.1 503 No\r\n\r\n"), sends(b"no " * 9999, for_ever=True))
    yield "endless failure", FAILED, endless_error
    # framing
    yield "closed at once", FAILED, sends()
    yield "reset at once", FAILED, reset
    yield "reset in the body", FAILED, then(sends(GOOD_ANSWER[:200]), reset)
    for name, at in [("status", 7), ("header", 30), ("blank line", 40), ("body", 60), ("last byte", -1)]:
        yield f"closed in the {name}", FAILED, sends(GOOD_ANSWER[:at])
    yield "length too long", FAILED, sends(answer(b"{}", length="99"))
    yield "length too short", FAILED, sends(answer(b'{"data": []}', length="5"))
    yield "length negative", FAILED, sends(answer(b"{}", length="-1"))
    yield "length no number", FAILED, sends(answer(b"{}", length="two"))
    yield "length of a terabyte", FAILED, sends(answer(b"{}", length=str(10**12)))
    yield "length of 5000 digits", FAILED, sends(answer(b"{}", length="9" * 5000))
    yield "two lengths", FAILED, sends(answer(b"{}", "200 OK", "Content-Length: 7"))
    yield "chunk size no number", FAILED, sends(CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n")
    yield "chunk size huge", FAILED, sends(CHUNKED + b"f" * 18 + b"\r\n{}\r\n0\r\n\r\n")
    yield "chunk size long", FAILED, sends(CHUNKED + b"0" * 99999 + b"2\r\n{}\r\n0\r\n\r\n")
    yield "another protocol", FAILED, sends(b"SSH-2.0-OpenSSH_9.9\r\n")
    yield "another version", MADE, sends(GOOD_ANSWER.replace(b"HTTP/1.1", b"HTTP/9.9"))
    yield "bare body", FAILED, sends(b'{"data": []}')
    yield "status no number", FAILED, sends(answer(b"{}", "abc OK"))
    yield "status of four digits", FAILED, sends(answer(b"{}", "2000 OK"))
    yield "switching protocols", FAILED, sends(b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\n\r\n")
    yield "NUL in a header", FAILED, sends(answer(b"{}", "200 OK", "X: a\0b"))
    yield "header of a megabyte", FAILED, sends(answer(b"{}", "200 OK", "X: " + "x" * 2**20))
    yield "no content", REFUSED, sends(b"HTTP/1.1 204 No Content\r\n\r\n")
    # compression
    yield "gzip bomb", FAILED, sends(answer(zeros(BOMB_MB, 31), "200 OK", "Content-Encoding: gzip"))
    bomb = answer(zeros(BOMB_MB, 31), "500 No", "Content-Encoding: gzip")
    yield "gzip bomb as a failure", FAILED, sends(bomb)
    yield "bad gzip", FAILED, sends(answer(b"\x1f\x8bno", "200 OK", "Content-Encoding: gzip"))
    yield "honest gzip", FAILED, sends(answer(gzip.compress(b"{}"), "200 OK", "Content-Encoding: gzip"))
    yield "brotli", FAILED, sends(answer(b"\x0b\x02\x80{}\x03", "200 OK", "Content-Encoding: br"))
    # redirects
    for status in (301, 302, 303, 307, 308):
        target = f"Location: http://{USER}:{PASSWORD.encode().decode('latin-1')}@127.0.0.2/?token={TOKEN}\x1b[2J"
        target = target.replace("\x1b", "%1b")
        yield f"redirect {status}", REFUSED, sends(answer(b"", f"{status} Moved", target))
    yield "redirect nowhere", REFUSED, sends(answer(b"", "302 Found"))
    # refusals and failures in odd words
    for status, end in (("400 No", REFUSED), ("401 No", REFUSED), ("500 No", FAILED), ("503 No", FAILED)):
        yield f"{status[:3]} with escape sequences", end, gives({"error": {"message": ESCAPES * 99}}, status)
        yield f"{status[:3]} in invalid UTF-8", end, sends(answer(b"\xff\xfe\x80" * 99 + ESCAPES.encode(), status))
        yield f"{status[:3]} nested deeply", end, sends(answer(b'{"error":' * 5000 + b"1" + b"}" * 5000, status))
        yield f"{status[:3]} of another shape", end, gives({"error": {"message": {"a": [ESCAPES]}}}, status)
    for after in (
        "-1",
        "1e9",
        "nan",
        "inf",
        "9" * 5000,
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "Thu, 99 Foo 2000",
        "0x10",
        "",
    ):
        yield f"429, Retry-After {after[:30]}", FAILED, gives({}, "429 Busy", f"Retry-After: {after}")
    # JSON
    yield "nested deeply", FAILED, sends(answer(b"[" * 4000 + b"]" * 4000))
    yield "nested very deeply", FAILED, sends(answer(b"[" * 99999))
    yield "a million values", FAILED, sends(answer(b"[" + b"[]," * 90000 + b"1]"))
    yield "a number of 5000 digits", FAILED, sends(answer(b'{"data": ' + b"9" * 5000 + b"}"))
    yield "HTML", FAILED, sends(answer(b"<html>" + ESCAPES.encode(), "200 OK", "Content-Type: text/html\t\x0b"))
    yield "nothing", FAILED, sends(answer(b""))
    yield "UTF-8 that is none", FAILED, sends(answer(b'{"data": "\xff"}'))
    wrong: list[object] = [None, 1, "x", [], {}, [[]], True]
    for value in wrong:
        yield f"answer {value!r}", FAILED, gives(value)
        yield f"data {value!r}", FAILED, gives({"data": value})
        yield f"data[0] {value!r}", FAILED, gives({"data": [value]})
        yield f"b64_json {value!r}", FAILED, gives({"data": [{"b64_json": value}]})
    for value in ("@@@@", "é", "AA", "data:image/png;base64,AAAA", "A" * 99999, "\ud800"):
        yield f"base64 {value[:9]!r}", FAILED, gives({"data": [{"b64_json": value}]})
    yield "two pictures", FAILED, gives({"data": [{"b64_json": base64.b64encode(GOOD).decode()}] * 2})
    # pictures
    yield "another size", REFUSED, gives_picture(image(size=(48, 64)))
    yield "bomb of 13000 x 13000", REFUSED, gives_picture(png(size=(13000, 13000), rows=500))
    yield "bomb of 2**31 x 2**31", REFUSED, gives_picture(png(size=(2**31 - 1, 2**31 - 1), rows=0, bits=0))
    yield "no pixels", REFUSED, gives_picture(png(size=(0, 0), rows=0))
    yield "too few pixels", FAILED, gives_picture(png(rows=3))
    text = chunk(b"zTXt", b"a\0\0" + zeros(16, 15))
    yield "bomb of texts", MADE, gives_picture(png(*[text] * 8))
    yield "bomb of a profile", MADE, gives_picture(png(chunk(b"iCCP", b"a\0\0" + zeros(16, 15))))
    yield "more pixels than announced", FAILED, gives_picture(png(rows=99999))
    yield "empty chunks", MADE, gives_picture(png(*[chunk(b"IDAT", b"")] * 9999))
    yield "chunks of 2**32", FAILED, gives_picture(png(b"\xff\xff\xff\xffabcd"))
    for name in ("JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        yield name, REFUSED, gives_picture(image(kind=name))
    for mode in ("RGBA", "P", "L", "LA", "I;16", "1"):
        yield f"mode {mode}", REFUSED, gives_picture(image(mode))
    yield "16-bit RGB", REFUSED, gives_picture(png(bits=16))
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue")]
    yield "animated", REFUSED, gives_picture(image(save_all=True, append_images=frames))
    for at in (0, 4, 12, 20, 32, 40, len(GOOD) // 2, len(GOOD) - 1):
        yield f"cut off after {at}", FAILED, gives_picture(GOOD[:at])
    for at in (0, 9, 13, 19, 30, 45, len(GOOD) - 2):
        yield f"flipped at {at}", FAILED, gives_picture(flipped(GOOD, at))
    # words
    yield "good", MADE, gives_picture(GOOD)
    yield "good, in chunks", MADE, sends(CHUNKED + b"".join(_chunks(GOOD_ANSWER.partition(b"\r\n\r\n")[2])))
    yield "revised with escape sequences", MADE, gives_picture(GOOD, revised_prompt=ESCAPES + "\ud800" + "x" * 99)
    yield "revised to a novel", MADE, gives_picture(GOOD, revised_prompt="x" * 100_000)
    yield "revised to a list", MADE, gives_picture(GOOD, revised_prompt=[1])
    echoed = f"{KEY} ?token={TOKEN} {'x' * 268} {KEY}"
    yield "refusal that echoes credentials", REFUSED, gives({"detail": echoed}, "401 No")
    yield "failure that echoes credentials", FAILED, sends(answer(echoed, "500 No"))
    yield "status line that echoes credentials", FAILED, sends(f"HTTP/1.1 {KEY} {TOKEN}\r\n\r\n".encode())
    yield "revised to credentials", MADE, gives_picture(GOOD, revised_prompt=echoed)


def _chunks(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), 99):
        piece = content[start : start + 99]
        yield f"{len(piece):x};extension=1\r\n".encode() + piece + b"\r\n"
    yield b"0\r\nTrailer: 1\r\n\r\n"


@contextmanager
def bounded(what: str, seconds: float) -> Iterator[None]:
    """Fail if the block takes more work than it may, or more memory than is allowed."""
    reference, peak = _peak_meter()
    before = reference()
    with little_work(seconds, what):
        yield
    growth = peak() - before
    assert growth < MAX_GROWTH, f"{what} took {growth / 2**20:.0f} MiB"


def _peak_meter() -> tuple[Callable[[], int], Callable[[], int]]:
    """Return two functions: reset the process's peak of memory and return its memory now; return the peak since."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def field(name: str) -> int:
        return 1024 * int(status.read_text().partition(f"{name}:")[2].split()[0])

    def now() -> int:
        clear.write_text("5")
        return field("VmRSS")

    try:
        now()
    except OSError:  # no Linux: what Python itself allocates
        tracemalloc.start()
        return lambda: tracemalloc.get_traced_memory()[0], lambda: tracemalloc.get_traced_memory()[1]
    return now, lambda: field("VmHWM")


def check_harmless(text: str, what: str) -> None:
    for secret in SECRETS:
        assert secret not in text, f"{what} shows {secret!r} in {text!r}"


def check_words(error: Exception, what: str) -> None:
    text = str(error)
    assert len(text) < 700, f"{what}: {len(text)} characters"
    bad = [
        c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) == "RLO"
    ]
    assert not bad, f"{what}: {bad} in {text!r}"
    check_harmless("".join([text, repr(error), *traceback.format_exception(error)]), what)


def engine_for(server: Server, **options: object) -> HttpEngine:
    usual = {"retries": 0, "backoff_s": 0.0, "request_timeout_s": 10, "api_key": KEY}
    return HttpEngine([f"http://127.0.0.1:{server.port}/?token={TOKEN}"], **(usual | options))


def outcome(engine: HttpEngine, what: str, size: tuple[int | None, int | None] = SIZE) -> tuple[str, str]:
    """Return how a request ended, and the words."""
    try:
        (picture,) = engine.render([Request(prompt="a cup", seed=1, width=size[0], height=size[1])])
    except ServersFailedError as error:
        check_words(error, what)
        return FAILED, str(error)
    except ServerRefusedError as error:
        check_words(error, what)
        return REFUSED, str(error)
    assert isinstance(picture, Image.Image)
    assert (picture.size, picture.mode) == (SIZE, "RGB"), what
    check_harmless(repr(picture.info), what)
    assert set(picture.info) <= {"enhanced_prompt"}, what
    return MADE, repr(picture.info)


def test_every_fault_ends_in_bounds_and_in_clean_words(server, caplog):
    caplog.set_level(logging.DEBUG, "ernie_accel")
    listed = list(faults())
    assert len({name for name, _, _ in listed}) == len(listed) >= 60
    engine, impatient = engine_for(server), engine_for(server, request_timeout_s=TIMEOUT_S)
    wrong = []
    for name, expected, deed in listed:
        server.deed = deed
        slow = name.startswith(("silent", "slow"))
        with bounded(name, seconds=5.0):
            found, words = outcome(impatient if slow else engine, name)
        if found != expected or slow != ("timed out" in words):
            wrong.append(f"{name}: {found} ({words}), expected {expected}")
    engine.close()
    impatient.close()
    assert not wrong, "\n".join(wrong)
    check_harmless(caplog.text, "the log")


def test_sizes_left_to_the_server_are_bounded_too(server):
    engine = engine_for(server)
    endless = then(sends(HEAD + b"\r\n"), sends(b" " * 65536, for_ever=True))
    for name, deed, expected, words in [
        ("endless body", endless, FAILED, "goes on after"),
        ("bomb", gives_picture(png(size=(13000, 13000), rows=13000 if FULL else 2000)), REFUSED, "13000x13000 px"),
        ("values", sends(answer(b"[" + b"[]," * 5_000_000 + b"1]")), FAILED, "far more values"),
        ("good", gives_picture(GOOD), MADE, ""),
    ]:
        server.deed = deed
        with bounded(name, seconds=5.0):
            found, said = outcome(engine, name, (None, None))
        assert found == expected and words in said
    engine.close()


def test_damaged_answers_end_in_bounds(server):
    """Flip, delete, insert and repeat bytes of a good answer, in its head more often than in its picture."""
    random_ = random.Random(SEED)
    engine = engine_for(server)
    head = GOOD_ANSWER.index(b"iVBOR")
    for number in range(rounds(short=60, full=40_000)):
        data = bytearray(GOOD_ANSWER)
        for _ in range(random_.choice((1, 1, 2, 5))):
            at = random_.randrange(head if random_.random() < 0.7 else len(data))
            piece = random_.choice(
                (b"\r\n", b"\r\n\r\n", b"[", b'"', b"{", b"\0", b"9", bytes([random_.randrange(256)]))
            )
            length = random_.choice((0, 1, 1, 2, 20))
            data[at : at + length] = piece if random_.random() < 0.8 else data[at : at + 40] * 2
        server.deed = sends(bytes(data))
        what = f"round {number} of seed {SEED}: {bytes(data)!r}"
        with bounded(what, seconds=5.0):
            outcome(engine, what)
    engine.close()


def test_no_proxy_is_taken_from_the_environment(server, monkeypatch):
    """Whoever sets the environment of a job would read its prompts and keys."""
    proxy = Server()
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    server.deed = gives_picture(GOOD)
    engine = engine_for(server)
    assert outcome(engine, "good")[0] == MADE
    engine.close()
    assert (len(server.requests), proxy.requests) == (1, [])
    proxy.close()


def test_no_secret_reaches_messages_logs_or_files(server, tmp_path, caplog, capfd):
    """A job whose servers echo what they were sent, with credentials in every place where there can be some."""
    caplog.set_level(logging.DEBUG, "ernie_accel")

    def echo(connection: socket.socket) -> None:
        request = server.requests[-1]
        if b"/v1/models" in request:
            connection.sendall(answer(json.dumps({"data": [{"id": "pe"}]})))
        elif b"/v1/chat" in request:
            words = {"choices": [{"message": {"content": request.decode("latin-1")[:999]}}]}
            connection.sendall(answer(json.dumps(words)))
        else:
            number = request.count(b"cup 1")
            connection.sendall(answer(request[:4000], "400 No" if number else "503 No"))

    server.deed = echo
    base = f"127.0.0.1:{server.port}/?token={TOKEN}"
    engine = HttpEngine(
        [f"http://{USER}:{PASSWORD}@{base}"],
        enhancer=f"http://{base}",
        enhancer_api_key=ENHANCER_KEY,
        retries=1,
        backoff_s=0.0,
        request_timeout_s=5,
        concurrency=1,
    )
    results = list(produce(engine, make_rows(3, width=64, height=48), tmp_path / "out", progress=False))
    engine.close()
    assert len(results) == 3 and all(result.error for result in results)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"manifest.csv", "manifest.jsonl", "ledger.sqlite"} <= {path.name for path in files}
    for path in files:
        check_harmless(path.read_bytes().decode("latin-1"), path.name)
        check_harmless(path.read_bytes().decode("utf-8", "replace"), path.name)
    captured = capfd.readouterr()
    for text in (caplog.text, captured.out, captured.err, repr(vars(engine)), *(repr(result) for result in results)):
        check_harmless(text, "a message")


def test_slots_are_free_again_after_the_worst(server):
    """Eight slots at eight endless servers: none is held, and the next request is served."""
    server.deed = then(sends(HEAD + b"\r\n"), sends(b" " * 65536, pause_s=0.01, for_ever=True))
    engine = engine_for(server, concurrency=8)
    with bounded("eight endless answers", seconds=5.0):
        threads = [threading.Thread(target=outcome, args=(engine, "endless")) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    server.deed = gives_picture(GOOD)
    assert outcome(engine, "good")[0] == MADE
    engine.close()

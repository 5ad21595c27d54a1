"""Fuzzed tables, job files, names and structured prompts: a result or a short message, within seconds, in the folder.

In the full form 20,000 inputs and more: valid files in every format, damaged, and files that hypothesis makes up.
"""

from __future__ import annotations

import io
import json
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

import ernie_accel
from ernie_accel.batch import produce, read_table
from ernie_accel.batch.input.job import plan_job
from ernie_accel.batch.input.naming import collision_key
from ernie_accel.batch.input.newbie import structure_problems
from ernie_accel.batch.input.options import OPTIONS
from ernie_accel.core.errors import ErnieAccelError
from tests.attack import SEED, rounds
from tests.little_work import little_work
from tests.stub_engine import StubEngine

LIMIT_S = 5.0  # of processor time, for any one input

ROWS = [
    {"sku": "A1", "prompt": "a red mug", "seed": 7, "width": 512, "height": 768, "kind": "mugs", "guidance_scale": 4.5},
    {"sku": "果", "prompt": 'ein "Käfer", 果', "seed": None, "width": None, "height": None, "kind": "", "steps": 8},
    {"sku": "B", "prompt": "<character_1><n>a</n></character_1><general_tags><style>b</style></general_tags>"},
    {"sku": "C", "prompt": "line\nbreak", "variants": 2, "kind": "cups", "note": "x" * 50},
]
NAMES = list(dict.fromkeys(name for row in ROWS for name in row))
JOB = {
    "batch_mode": "csv",
    "input_file": "t.csv",
    "output_dir": "out",
    "naming_pattern": "{sku}_{index}.png",
    "folder_by": "kind",
    "seed": 3,
    "timeout": 30.5,
    "endpoint": ["http://a:1", "http://b:2"],
    "sift": True,
    "blur": 20.0,
    "log_json": "log.jsonl",
    "extra_columns": [],
}
_ = ernie_accel.SwapScheduler  # it loads torch, which is not to count as the time of the first job that names a sampler
# What parsers, file systems, terminals and spreadsheets have each been broken by.
TOKENS = [
    *(b'"', b"'", b",", b";", b"\t", b"\n", b"\r", b"\0", b"\\", b"{", b"}", b"[", b"]", b":", b"- ", b"&a ", b"*a"),
    *(b"<<: *a", b"!!python/object:os.system ", b"!!binary ", b"!!timestamp ", b"? ", b"| ", b"%YAML 9.9\n", b"---\n"),
    *(b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc2\x85", b"\xe2\x80\xa8", b"\\ud83d", b"\\u0000"),
    *(b"1e400", b"NaN", b"-Infinity", b"9" * 5000, b"1:30", b"0x10", b"2025-13-45", b"null", b"true", b"[" * 3000),
    *(b'{"a":' * 3000, b"../", b"/etc/passwd", b"con", b"a.png", b"manifest.csv", b"rejected", b".ernie-accel", b"A1"),
    *(
        b"\xcc\x81",
        b"\x1b[2J",
        b"\xe2\x80\xae",
        b"=cmd|' /C calc'!A0",
        b"<!DOCTYPE a>",
        b"&b;",
        b"<character_",
        b"</n>",
    ),
    *(b"cfg", b"prompt", b"seed", b"{sku.__class__}", b"{", b"x" * 140_000),
]


@contextmanager
def within_limit() -> Iterator[None]:
    """Interrupt what takes longer than any one input may."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no answer within {LIMIT_S} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)  # what other processes compute does not count
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def answered(call: Callable[[], object]) -> object | None:
    """Return what a call returns, or None for an error of ours, whose message must be fit for a terminal."""
    with within_limit():
        try:
            return call()
        except ErnieAccelError as error:
            text = str(error)
    assert len(text) < 120_000
    assert all(c == "\n" or c.isprintable() for c in text), repr(text[:500])
    return None


def separated(mark: str) -> bytes:
    def quoted(value: object) -> str:
        return "" if value is None else '"' + str(value).replace('"', '""') + '"'

    lines = [mark.join(NAMES), *(mark.join(quoted(row.get(name)) for name in NAMES) for row in ROWS)]
    return "\n".join(lines).encode()


def as_parquet() -> bytes:
    table = pyarrow.Table.from_pylist([dict.fromkeys(NAMES) | row for row in ROWS])
    extra = {
        "at": pyarrow.array([1, None, 2**40, -1], pyarrow.timestamp("ns", "Europe/Berlin")),
        "tags": pyarrow.array([["x"], None, [], ["y", "z"]]),
        "box": pyarrow.array([{"w": 1, "day": 0}] * 4, pyarrow.struct([("w", "int8"), ("day", "date32")])),
        "key": pyarrow.array(["a", "b", "a", None]).dictionary_encode(),
        "raw": pyarrow.array([b"\xff", b"", None, b"a"]),
    }
    for name, column in extra.items():
        table = table.append_column(name, column)
    file = io.BytesIO()
    parquet.write_table(table, file, compression="none", use_dictionary=["kind"])
    return file.getvalue()


def as_yaml() -> bytes:
    lines = [f"{name}: {json.dumps(value)}" for name, value in JOB.items()]
    return ("\n".join(lines) + "\nmodel: |\n  some\n  folder\n").encode()


FILES = {
    "t.csv": separated(","),
    "t.tsv": separated("\t"),
    "t.json": json.dumps(ROWS, ensure_ascii=False).encode(),
    "indented.json": json.dumps(ROWS, indent=1).encode(),
    "t.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "t.parquet": as_parquet(),
    "job.yaml": as_yaml(),
    "job.json": json.dumps(JOB, indent=1).encode(),
}


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return a file with one to four faults: what is torn, swapped, doubled, flipped, or put in."""
    for _ in range(chance.randint(1, 4)):
        if not data:
            return data
        at, to = sorted(chance.choices(range(len(data) + 1), k=2))
        to = min(to, at + chance.choice((1, 4, 40, 400)))
        match chance.randrange(7):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + data[to:]
            case 2:
                data = data[:at] + data[at:to] * chance.randint(2, 40) + data[to:]
            case 3:
                data = data[:at] + bytes(byte ^ (1 << chance.randrange(8)) for byte in data[at:to]) + data[to:]
            case 4:
                data = data[:to] + data[at:]
            case 5:
                data = data[:at] + chance.choice(list(FILES.values()))[: to - at] + data[to:]
            case _:
                data = data[:at] + chance.choice(TOKENS) + data[at if chance.random() < 0.5 else to :]
    return data


def flipped(data: bytes, chance: random.Random) -> bytes:
    """Return a file of the same length with a few other bytes: what gets past the checks of a file's frame."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(changed) - 4)
        if chance.random() < 0.5:
            changed[at] ^= 1 << chance.randrange(8)
        else:
            value = chance.choice((b"\xff", b"\x7f", b"\0", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff"))
            changed[at : at + len(value)] = value
    return bytes(changed)


class Small(StubEngine):
    """Draws the same few pixels whatever the row asks for."""

    def render(self, requests, timeout_s=None):
        return [Image.new("RGB", (4, 4))] * len(requests)


def make_pictures(rows, folder: Path) -> None:
    """Run the job of a table that was accepted, and look at what it wrote: its pictures, inside its folder."""
    out = folder / "out"
    before = set(folder.rglob("*"))
    results = list(produce(Small(), rows, out, progress=False))
    assert [result.error for result in results if result.error] == []
    assert {out / row.path for row in rows} <= set(folder.rglob("*.[pP][nN][gG]"))
    assert {path for path in set(folder.rglob("*")) - before if not path.is_relative_to(out)} == set()
    assert len({collision_key(row.path) for row in rows}) == len(rows)


def read_and_draw(path: Path, chance: random.Random, **options) -> None:
    skipped: list | None = [] if chance.random() < 0.5 else None
    rows = answered(lambda: read_table(path, skipped=skipped, **options))
    for row in rows or ():
        (row.prompt + row.path + "".join(row.columns) + "".join(row.columns.values())).encode()
    if rows and len(rows) <= 20 and chance.random() < 0.05:
        with within_limit():
            make_pictures(rows, path.parent)


@pytest.mark.parametrize(("name", "fault"), [*((name, damaged) for name in FILES), ("t.parquet", flipped)])
def test_damaged_files_are_read_or_refused(tmp_path, name, fault):
    chance = random.Random(f"{SEED} {name}")
    # Of Parquet with flipped bytes one file in 5,000 went wrong.
    for number in range(rounds(short=40, full=5_000 if fault is flipped else 2_000)):
        data = fault(FILES[name], chance)
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            path = Path(folder) / name
            path.write_bytes(data)
            try:
                if not name.startswith("job"):
                    options = chance.choice(({}, {"folder_by": "kind"}, {"template": "{sku} {prompt}"}))
                    read_and_draw(path, chance, **options)
                elif job := answered(lambda path=path, folder=folder: plan_job(path, {"output_dir": Path(folder)})):
                    assert job.output_dir == Path(folder)
            except Exception as error:
                kept = tmp_path / f"found-{number}-{name}"
                kept.write_bytes(data)
                raise AssertionError(f"{name}, round {number}: {error!r}; the file is {kept}") from error
        assert set(tmp_path.iterdir()) == set()


def attack(examples: int):
    """Run a property test for as many examples, drawn from the attacks' seed."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    shared = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=checks)
    return lambda test: seed(SEED)(shared(test))


TEXTS = st.text(max_size=20) | st.sampled_from([token.decode(errors="surrogateescape") for token in TOKENS])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
RECORDS = st.dictionaries(st.sampled_from([*NAMES, "cfg", "own", ""]) | TEXTS, VALUES, max_size=6)


@attack(rounds(short=60, full=2_000))
@given(rows=st.lists(RECORDS | VALUES, max_size=5) | VALUES, lines=st.booleans())
def test_any_json_is_read_or_refused(rows, lines):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("t.jsonl" if lines else "t.json")
        texts = map(json.dumps, rows) if lines and isinstance(rows, list) else [json.dumps(rows)]
        path.write_text("\n".join(texts))
        read_and_draw(path, random.Random(SEED))


@attack(rounds(short=60, full=2_000))
@given(
    options=st.dictionaries(st.sampled_from(sorted(OPTIONS)) | TEXTS, VALUES, max_size=8), kind=st.sampled_from("jyp")
)
def test_any_options_are_a_job_or_refused(options, kind):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / {"j": "job.json", "y": "job.yaml", "p": "t.csv"}[kind]
        if kind == "p":
            answered(lambda: plan_job(path, options))
        else:
            path.write_text(json.dumps({"input_file": "t.csv", "output_dir": "out"} | options))
            answered(lambda: plan_job(path, {}))


@attack(rounds(short=60, full=2_000))
@given(
    values=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=4),
    pattern=st.none() | TEXTS | st.builds("{{{}}}{}.png".format, st.sampled_from(["sku", "index", "kind"]), TEXTS),
    template=st.none() | TEXTS | st.builds("{}{{sku}}".format, TEXTS),
    column=st.sampled_from(["kind", "no such"]) | TEXTS,
)
def test_any_names_are_inside_the_folder_or_refused(values, pattern, template, column):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.jsonl"
        records = [{"sku": sku, "prompt": prompt or "a", "kind": kind} for sku, prompt, kind in values]
        path.write_text("\n".join(map(json.dumps, records)))
        read_and_draw(path, random.Random(SEED), pattern=pattern, template=template, folder_by=column)


PIECES = st.sampled_from(
    [
        *("<character_1>", "</character_1>", "<character_2>", "<general_tags>", "</general_tags>", "<img>", "</img>"),
        *(
            "<n>",
            "</n>",
            "<style/>",
            "<styel>a</styel>",
            "<!--",
            "-->",
            "<![CDATA[",
            "]]>",
            "<?x?>",
            "<?xml version='1'?>",
        ),
        *("<!DOCTYPE a [<!ENTITY b 'c'>]>", "<!ENTITY b SYSTEM 'file:///etc/passwd'>", "&b;", "&amp;", "&#0;"),
        *("&#xd800;", "&", "<", ">", "</prompt>", "<prompt>", "<character_" + "9" * 5000 + ">", "<a>" * 2000, "<x:y>"),
        *(" xmlns:x='y'", "\ud83d", "\0", "\x1b", "\ufffe", "red mug"),
    ]
)


@attack(rounds(short=60, full=2_000))
@given(st.lists(PIECES | st.text(max_size=8), max_size=14).map("".join))
def test_any_structured_prompt_is_good_or_named(prompt):
    problems = answered(lambda: structure_problems(prompt))
    assert isinstance(problems, list)
    assert all(isinstance(problem, str) for problem in problems)


@pytest.mark.parametrize(
    "prompt",
    [
        "<general_tags>" + "".join(f"<tag{i}>a</tag{i}>" for i in range(7_000)) + "</general_tags>",
        "<general_tags>" * 9_000,
        "<general_tags>" + "&" * 130_000,
        "<" + " " * 130_000 + "general_tags>",
        "< " * 65_000 + "<general_tags>",
        "<general_tags>" + "<a " + " ".join(f'a{i}="b"' for i in range(12_000)) + "/></general_tags>",
    ],
    ids=["tags", "deep", "ampersands", "space", "openings", "attributes"],
)
def test_structured_prompts_take_no_longer_than_their_length(prompt):
    with little_work(LIMIT_S / 2):
        answered(lambda: structure_problems(prompt))

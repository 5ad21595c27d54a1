"""Every format, template and job file reads as the same rows, or is refused with every mistake and its fix."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from ernie_accel.batch import BatchInputError, read_rows, read_table
from ernie_accel.batch.input import formats
from ernie_accel.batch.input.job import Job, plan_job
from ernie_accel.batch.input.newbie import structure_problems
from ernie_accel.core.errors import ErnieAccelError, MissingExtraError

RECORDS = [
    {"sku": "A1", "prompt": "a mug", "seed": 7, "width": 512, "height": 768, "guidance_scale": 4.5},
    {"sku": "A2", "prompt": "ein Käfer, 果", "steps": 8, "height": None},
]


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def problems_of(path, **options):
    with pytest.raises(BatchInputError) as caught:
        read_table(path, **options)
    return list(caught.value.problems)


def as_csv(folder):
    text = "sku,prompt,seed,width,height,guidance_scale,steps\nA1,a mug,7,512,768,4.5,\n"
    return write(folder, "t.csv", text + 'A2,"ein Käfer, 果",,,,,8\n')


def as_json(folder):
    return write(folder, "t.json", json.dumps(RECORDS, ensure_ascii=False, indent=1))


def as_json_lines(folder):
    return write(folder, "t.jsonl", "".join(json.dumps(record) + "\n\n" for record in RECORDS))


def as_parquet(folder):
    import pyarrow
    from pyarrow import parquet

    path = folder / "t.parquet"
    names = {name: None for record in RECORDS for name in record}  # a table has every column in every row
    parquet.write_table(pyarrow.Table.from_pylist([names | record for record in RECORDS]), path)
    return path


@pytest.mark.parametrize("make", [as_csv, as_json, as_json_lines, as_parquet])
def test_every_format_gives_the_same_rows(tmp_path, make):
    first, second = read_table(make(tmp_path))
    assert (first.prompt, first.file_name, first.seed, first.width, first.height) == ("a mug", "A1.png", 7, 512, 768)
    assert (first.guidance_scale, first.steps) == (4.5, None)
    assert (second.prompt, second.file_name, second.steps) == ("ein Käfer, 果", "A2.png", 8)
    assert {second.seed, second.width, second.height, second.guidance_scale} == {None}


def test_lines_of_json_are_those_of_the_objects(tmp_path):
    path = write(tmp_path, "t.json", '[\n {"prompt": "a"},\n {"prompt":\n  ""},\n 5,\n {"prompt": ["x"]}\n]')
    assert problems_of(path) == [
        (3, "prompt is empty; write what to draw, or delete the line"),
        (5, 'is a number; expected an object such as {"prompt": "a red mug"}'),
        (6, "'prompt' is a list; expected text, a number, true, false or null"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("t.json", "[{]", (1, "is not valid JSON (Expecting property name enclosed in double quotes at column 3); ")),
        ("t.json", '"a"', (1, 'is not a JSON array; expected [{"prompt": "a red mug"}, ...]')),
        ("t.jsonl", '{"prompt": "a"}\n{"prompt"\n', (2, "is not valid JSON (Expecting ':' delimiter at column 10)")),
        ("t.json", '[{"Seed": 1, "prompt": "a"}]', (None, "column 'Seed' would be ignored; rename it to 'seed'")),
        ("t.parquet", "no parquet", (None, "cannot be read as Parquet")),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, problem):
    ((line, message),) = problems_of(write(tmp_path, name, content))
    assert line == problem[0]
    assert message.startswith(problem[1])


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ('[{"prompt":"a"}]\n[{"prompt":"b"}]', 2, "is not valid JSON (Extra data at column 1)"),
        ('[{"prompt":"a"}] and so on', 1, "is not valid JSON (Extra data at column 18)"),
        ('[{"prompt":"a"} {"prompt":"b"}]', 1, "is not valid JSON (Expecting ',' delimiter at column 17)"),
        ('[{"prompt":"a"},,{"prompt":"b"}]', 1, "is not valid JSON (Expecting value at column 17)"),
        ('[{"prompt":"a"},]', 1, "is not valid JSON ("),  # Python 3.13 says more of it
        ('[{"prompt":"a"}', 1, "is not valid JSON (Expecting ',' delimiter at column 16)"),
        ('[{"prompt":"a"},\n{"prompt":"b","prompt":"c"}]', 2, "names 'prompt' twice; keep one"),
        ('[{"prompt":"a","own":{"x":1,"x":2}}]', 1, "'own' has the key 'x' twice; keep one"),
        ('[{"prompt":"a"," prompt ":"b"}]', 1, "names 'prompt' twice, once with spaces around it; keep one"),
        ('[{"prompt":"a","":"b"}]', 1, "has a value without a name, 'b'; name it or delete it"),
        ('[{"prompt":"a \\ud83d"}]', 1, "'prompt' has half of a surrogate pair, '\\ud83d', at character 3"),
        ('[{"prompt":"a\\u0000"}]', 1, "'prompt' has a NUL character; remove it"),
        ('[{"prompt":"a","\\ud83d":"b"}]', 1, "'\\ud83d' has half of a surrogate pair"),
        ('[{"prompt":"a","seed":' + "9" * 5000 + "}]", 1, "seed '999999"),
        ('[\n{"prompt":"a","own":' + "[" * 100_000 + "]" * 100_000 + "}]", 2, "is nested more than 32 levels deep at"),
        ('[\n{"prompt":"a","own":' + "[" * 40 + "]" * 40 + "}]", 2, "'own' is nested more than 32 levels deep"),
        ("[]", None, "has no rows; add one per picture"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else value,
)
def test_json_is_read_strictly(tmp_path, content, line, message):
    (found, *_), *_ = [problems_of(write(tmp_path, "t.json", content))]
    assert found[0] == line
    assert found[1].startswith(message)


def test_a_problem_of_a_row_of_json_leaves_the_others_their_numbers(tmp_path):
    content = '[{"prompt":"a"},{"prompt":"b","prompt":"c"},\n{"prompt":"d","n":[1]},{"prompt":[]},{"prompt":"e"}]'
    skipped: list = []
    rows = read_table(write(tmp_path, "t.json", content), skipped=skipped)
    assert [(row.prompt, row.index, row.line, row.columns["n"]) for row in rows] == [
        ("a", 0, 1, ""),
        ("d", 2, 2, "[1]"),
        ("e", 4, 2, ""),
    ]
    assert [line for line, _ in skipped] == [1, 2]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_json_lines_end_at_line_feeds_alone(tmp_path, mark):
    text = json.dumps(f"a{mark}b", ensure_ascii=False)
    rows = read_table(write(tmp_path, "t.jsonl", f'{{"prompt":{text}}}\r\n{{"prompt":"c"}}\n'))
    assert [(row.line, row.index, row.prompt) for row in rows] == [(1, 0, f"a{mark}b"), (2, 1, "c")]


def test_two_rows_of_one_name_on_one_line_are_found_before_anything_is_loaded(tmp_path):
    path = write(tmp_path, "t.json", '[{"prompt":"a","sku":"x"},{"prompt":"b","sku":"X"}]')
    ((line, message),) = problems_of(path)
    assert line == 1
    assert "is taken by row 1, on the same line as 'x.png'" in message


def test_rows_of_nothing_but_empty_values_are_left_out_of_every_format(tmp_path):
    rows = [{"sku": "A", "prompt": "a"}, {"sku": "", "prompt": None}, {}, {"sku": "B", "prompt": "b"}]
    for made in (
        write(tmp_path, "t.json", json.dumps(rows)),
        write(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows))),
        write(tmp_path, "t.csv", "sku,prompt\nA,a\n,\n\nB,b\n"),
    ):
        assert [(row.file_name, row.index) for row in read_table(made)] == [("A.png", 0), ("B.png", 1)]


def test_parquet_columns_of_ones_own_of_any_type_pass_through(tmp_path):
    import pyarrow
    from pyarrow import parquet

    columns = {
        "prompt": pyarrow.array(["a"]),
        "ns": pyarrow.array([1], pyarrow.timestamp("ns")),
        "far": pyarrow.array([9 * 10**15], pyarrow.timestamp("ms")),
        "zone": pyarrow.array([0], pyarrow.timestamp("us", "Nowhere/Land")),
        "day": pyarrow.array([2**31 - 1], pyarrow.date32()),
        "clock": pyarrow.array([1], pyarrow.time64("ns")),
        "took": pyarrow.array([1], pyarrow.duration("ns")),
        "price": pyarrow.array(["12.50"]).cast(pyarrow.decimal128(9, 2)),
        "single": pyarrow.array([4.1], pyarrow.float32()),
        "bytes": pyarrow.array([b"caf\xc3\xa9"]),
        "blob": pyarrow.array([b"\xff\x00"]),
        "tags": pyarrow.array([["x", "\u00e9"]]),
        "times": pyarrow.array([[1]], pyarrow.list_(pyarrow.timestamp("ns", "Nowhere/Land"))),
        "box": pyarrow.array(
            [{"w": 1, "at": 1}], pyarrow.struct([("w", pyarrow.int8()), ("at", pyarrow.duration("ns"))])
        ),
        "map": pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "kind": pyarrow.array(["mug"]).dictionary_encode(),
        "flag": pyarrow.array([True]),
        "none": pyarrow.array([None], pyarrow.null()),
    }
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    ((row),) = read_table(path)
    assert dict(row.columns) == {
        "prompt": "a",
        "ns": "1970-01-01 00:00:00.000000001",
        "far": "<value out of range: 9000000000000000>",
        "zone": "1970-01-01 00:00:00.000000Z",
        "day": "<value out of range: 2147483647>",
        "clock": "00:00:00.000000001",
        "took": "1",
        "price": "12.50",
        "single": "4.1",
        "bytes": "caf\u00e9",
        "blob": "ff00",
        "tags": '["x", "\u00e9"]',
        "times": '["1970-01-01 00:00:00.000000001Z"]',
        "box": '{"w": 1, "at": "1"}',
        "map": '[["k", 1]]',
        "kind": "mug",
        "flag": "true",
        "none": "",
    }


def test_parquet_settings_that_are_no_scalars_or_not_exact_are_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "year=2026" / "t.parquet"  # no column of that name: the folder is not part of the table
    path.parent.mkdir()
    columns = {"prompt": [["a"], ["b"]], "seed": [2.0**53 + 2, 7.0]}
    parquet.write_table(pyarrow.table(columns), path)
    found = problems_of(path)
    assert found == [
        (1, "'prompt' is a list; expected text, a number, true, false or null"),
        (2, "'prompt' is a list; expected text, a number, true, false or null"),
    ]
    parquet.write_table(pyarrow.table(columns | {"prompt": ["a", "b"]}), path)
    assert problems_of(path) == [
        (1, "seed '9007199254740994.0' is not a whole number; write digits, e.g. 42, or leave it empty")
    ]
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([b"\xff"])}), path)
    assert problems_of(path) == [(1, "'prompt' is not UTF-8; save it as text")]
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([b"\xff"]).cast(pyarrow.string(), safe=False)}), path)
    ((line, message),) = problems_of(path)
    assert line == 1
    assert "that cannot be read" in message


def test_a_damaged_dictionary_is_refused_and_a_large_one_is_not_repeated(tmp_path):
    import pyarrow
    from pyarrow import parquet

    broken = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1]), pyarrow.array(["a"]), safe=False)
    with pytest.raises(ValueError, match="a value points beyond its dictionary"):
        formats._python_values(broken)
    path = tmp_path / "t.parquet"  # 20 kB, in which one text of 5 MB stands 1,000 times
    long = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), ["x" * 5_000_000])
    parquet.write_table(pyarrow.table({"prompt": long}), path, compression="zstd")
    assert problems_of(path) == [(None, "holds more than 536,870,912 characters; split it")]


def test_a_missing_reader_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path, "t.parquet", "x")
    with pytest.raises(MissingExtraError, match=r"pyarrow is not installed: pip install 'ernie-accel\[parquet\]'"):
        read_table(path)


def test_values_that_only_python_programs_have_are_their_rows_problems():
    endless: list = []
    endless += [endless, endless]
    rows = [{"prompt": "a", "own": value} for value in (10**5000, endless, {(1, 2): 3}, [10**5000])]
    with pytest.raises(BatchInputError) as caught:
        read_rows([*rows, {"prompt": "b", "own": {3, 4}.__class__}])
    (first, second, third, fourth) = caught.value.problems
    assert first == (1, "'own' has thousands of digits; save it as text")
    assert second == (2, "'own' has more than 131,072 values in it; flatten it")
    assert third[1].startswith("'own' cannot be kept as JSON text (keys must be str")
    assert fourth[1].startswith("'own' cannot be kept as JSON text (Exceeds the limit")


# Templates, variants, folders, skipping


def test_templates_make_prompts_from_columns(tmp_path):
    path = write(tmp_path, "t.csv", "name,style\nmug,flat {x}\ncup,\n")
    rows = read_table(path, template="a {{photo}} of {name}, {style}")
    assert [row.prompt for row in rows] == ["a {photo} of mug, flat {x}", "a {photo} of cup, "]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a {nam}", "uses {nam}, but there is no such column; valid here: {name}, {style}"),
        ("a {name!r}", "has {name!r}; columns go in as they are: {name}"),
        ("a {name.__class__}", "uses {name.__class__}, but there is no such column"),
        ("a mug", "names no column; every picture would have the same prompt"),
        ("a {", "cannot be read"),
    ],
)
def test_bad_templates_are_refused(tmp_path, template, message):
    ((_, found),) = problems_of(write(tmp_path, "t.csv", "name,style\nmug,flat\n"), template=template)
    assert message in found


def test_variants_are_pictures_of_their_own(tmp_path):
    rows = read_table(write(tmp_path, "t.csv", "sku,prompt,variants,seed\nA,a mug,3,10\nB,a cup,,\n"))
    assert [(row.file_name, row.index, row.variant) for row in rows] == [
        ("A_v1.png", 0, 0),
        ("A_v2.png", 0, 1),
        ("A_v3.png", 0, 2),
        ("B.png", 1, 0),
    ]


def test_pictures_are_sorted_into_folders_that_stay_inside(tmp_path):
    path = write(tmp_path, "t.csv", "sku,prompt,kind\nA,a,mugs\nA,b,cups\nB,c,\n")
    rows = read_table(path, folder_by="kind")
    assert [row.path for row in rows] == ["mugs/A.png", "cups/A.png", "B.png"]
    bad = write(tmp_path, "bad.csv", "sku,prompt,kind\nA,a,../up\nB,b,rejected\nC,c,.ernie-accel\n")
    assert problems_of(bad, folder_by="kind") == [
        (
            2,
            "folder '../up' (from column 'kind') has '/' and has '..' and starts with a dot or space; change the value",
        ),
        (3, "folder 'rejected' (from column 'kind') is a folder the job itself uses; change the value"),
        (4, "folder '.ernie-accel' (from column 'kind') starts with a dot or space; change the value"),
    ]
    assert problems_of(path, folder_by="sort", pattern="{index}.png") == [
        (None, "pictures cannot be sorted by 'sort': there is no such column; found: 'sku', 'prompt', 'kind'")
    ]


def test_bad_rows_can_be_left_out_without_moving_the_others(tmp_path):
    path = write(tmp_path, "t.csv", "prompt,seed\na,\n,\nc,x\nd,\ne,1,2\nf,\n")
    skipped = []
    rows = read_table(path, skipped=skipped)
    assert [(row.prompt, row.index, row.file_name) for row in rows] == [
        ("a", 0, "00000.png"),
        ("d", 3 - 1, "00002.png"),
        ("f", 5 - 1, "00004.png"),
    ]
    assert [line for line, _ in skipped] == [4, 6]


def test_a_table_without_one_good_row_is_refused_all_the_same(tmp_path):
    assert len(problems_of(write(tmp_path, "t.csv", "prompt,seed\na,x\nb,y\n"), skipped=[])) == 2


# NewBie's structured prompts

GOOD = """You are an artist. <character_1>
<n>$character_1$</n><gender>1girl</gender><appearance>red & blue_hair</appearance>
</character_1><character_2><n>b</n></character_2>
<general_tags><count>2girls</count><mine>x</mine></general_tags> <caption>Two.</caption>"""
PLAIN = "a sign that says <character> & <b>general</b>, <characteristics>none</characteristics>"


@pytest.mark.parametrize("prompt", [GOOD, f"<img>{GOOD}</img>", "a <lora:x> & a plain prompt", "1 < 2", PLAIN])
def test_good_prompts_pass(prompt):
    assert structure_problems(prompt) == []


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("<character_1><n>a</character_1>", "is not well-formed XML (mismatched tag) at its line 1, column 20"),
        ("<character_2><n>a</n></character_2>", "numbers its characters 2; expected 1 to 1, in order"),
        ("<character_1><apearance>x</apearance></character_1>", "did you mean <appearance>?"),
        ("<character_1></character_1>", "has nothing in <character_1>; fill it or delete it"),
        ("<general_tags><style>a</style><style>b</style></general_tags>", "has 2 <style> in <general_tags>; join them"),
        ("<general_tag><count>1</count></general_tag><general_tags>a</general_tags>", "did you mean <general_tags>?"),
        ("<charcter_1><n>a</n></charcter_1>", "has a block <charcter_1>; did you mean <character_1>?"),
        ("<Character_2>a</Character_2>", "has a block <Character_2>; did you mean <character_2>?"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><general_tags>&b;</general_tags>', "declares a document type or entities"),
    ],
)
def test_bad_structured_prompts_are_named(prompt, problem):
    (found,) = structure_problems(prompt)
    assert problem in found


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("<general_tags>a \ud83d</general_tags>", "half of a surrogate pair"),
        ("<general_tags>a\0</general_tags>", "NUL character"),
        (
            "<general_tags>&x;</general_tags>",
            "(undefined entity) at its line 1, column 15; there are no entities; write",
        ),
        ("a & b & <general_tags>1 < 2</general_tags>", "at its line 1, column 26; write '<' as '&lt;'"),
        ("<general_tags>a\x01</general_tags>", "(invalid token)"),
        ("<character_" + "9" * 5000 + "><n>a</n>", "not well-formed XML"),
        ("<general_tags>" + "<a>" * 5000 + "</a>" * 5000 + "</general_tags>", "has more than 1,000 tags"),
        (
            '<!DOCTYPE a [<!ENTITY b "lol"><!ENTITY c "&b;&b;&b;">]><general_tags>&c;</general_tags>',
            "declares a document type or entities",
        ),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><general_tags>b</general_tags>', "declares a document type"),
        ("<<!--!DOCTYPE a><general_tags>b</general_tags>", "declares a document type"),
        ("</prompt><prompt><general_tags>a</general_tags>", "not well-formed XML"),
    ],
    ids=lambda value: value[:40],
)
def test_hostile_structured_prompts_are_named(prompt, problem):
    (found,) = structure_problems(prompt)
    assert problem in found


def test_huge_numbers_of_characters_are_other_tags():
    assert structure_problems(f"<character_{'9' * 5000}>a</character_{'9' * 5000}>") == []


def test_structured_prompts_are_checked_with_their_row(tmp_path):
    path = write(tmp_path, "t.jsonl", json.dumps({"prompt": "<character_1><n>a</character_1>"}) + "\n")
    ((line, message),) = problems_of(path)
    assert line == 1
    assert "not well-formed XML" in message


# Job files


def test_the_shape_of_comfyui_guides_is_a_job(tmp_path):
    path = write(
        tmp_path,
        "job.json",
        json.dumps(
            {
                "batch_mode": "csv",
                "input_file": "products.csv",
                "output_dir": "out",
                "naming_pattern": "{sku}_{index}.png",
                "batch_size": 4,
                "max_concurrent": 2,
            }
        ),
    )
    job = plan_job(path, {"seed": 3})
    assert (job.input_file, job.output_dir) == (tmp_path / "products.csv", tmp_path / "out")
    assert (job.naming_pattern, job.batch_size, job.max_concurrent, job.seed) == ("{sku}_{index}.png", 4, 2, 3)


def test_a_yaml_job_and_the_command_lines_options_go_before_it(tmp_path):
    text = "input_file: p.jsonl\noutput_dir: out\ntimeout: 30\nendpoint: [http://a:1, http://b:1]\nsift: true\n"
    job = plan_job(write(tmp_path, "job.yaml", text), {"retries": 5})
    assert (job.timeout, job.endpoint, job.retries) == (30.0, ("http://a:1", "http://b:1"), 5)
    assert job.sifting() is not None


def test_a_table_is_no_job(tmp_path):
    assert plan_job(as_json(tmp_path), {"output_dir": tmp_path}) == Job(
        input_file=tmp_path / "t.json", output_dir=tmp_path
    )


def test_every_mistake_of_a_job_file_is_named_at_once(tmp_path):
    text = "batch_mode: json\ninput_file: p.csv\noutput: out\nbatch_size: four\nretries: true\n"
    with pytest.raises(BatchInputError) as caught:
        plan_job(write(tmp_path, "job.yml", text), {})
    assert [message for _, message in caught.value.problems] == [
        "key 'output' is unknown; did you mean 'output_dir'?",
        "batch_size is 'four'; expected a whole number",
        "retries is True; expected a whole number",
        "batch_mode is 'json', but input_file is 'p.csv'; expected a name ending in .json",
    ]


def test_an_empty_json_table_is_said_to_be_empty(tmp_path):
    with pytest.raises(BatchInputError, match=r'is empty; expected \[{"prompt": "a red mug"}, ...\]'):
        read_table(write(tmp_path, "a.json", " \n"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "input_file: [", "is not valid YAML"),
        ("a.json", "{", "is not valid JSON"),
        ("a.yaml", "", "is empty; expected keys such as input_file and output_dir"),
        ("a.yaml", "- 1", "is not a job; expected keys such as input_file and output_dir"),
        ("a.yaml", "seed: 1", "has no input_file; name the table"),
        ("a.yaml", "input_file: a.csv", "no output folder is given; add --out, or output_dir to the job file"),
    ],
)
def test_broken_job_files_are_named(tmp_path, name, text, message):
    with pytest.raises(ErnieAccelError, match=message):
        plan_job(write(tmp_path, name, text), {})


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("seed: 1\nseed: 2", 2, "found the key 'seed' twice; keep one at column 1"),
        ("1: a", 1, "found a key that is not text; put it in quotes"),
        ("null: a", 1, "found a key that is not text"),
        ("[a]: b", 1, "found a key that is not text"),
        ("a: &x [b]\nc: *x", 2, "found the alias *x; write the value out at column 4"),
        ("a: &a [&b [x]]\n<<: *a", 2, "found the alias *a"),
        ("input_file: !!python/name:os.system a", 1, "found the tag tag:yaml.org,2002:python/name:os.system"),
        ("input_file: !include a", 1, "found the tag !include"),
        ("output_dir: !!binary aGk=", 1, "found the tag tag:yaml.org,2002:binary"),
        ("a: " + "[" * 5000, 1, "nested more than 32 levels deep"),
        ("a: b\x07", 1, "'\\x07': special characters are not allowed"),
        ("a: \t- b", 1, "found character '\\t'"),
        ("a: 1\n---\nb: 2", 2, "but found another document"),
        ("#" * 200_000, None, "has more than 100,000 bytes"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else value,
)
def test_yaml_is_plain_data_or_refused_with_its_place(tmp_path, text, line, message):
    with pytest.raises(BatchInputError) as caught:
        plan_job(write(tmp_path, "job.yaml", text), {})
    ((found, problem),) = caught.value.problems
    assert (found, message in problem) == (line, True), problem
    assert len(str(caught.value)) < 1000


def test_an_alias_bomb_is_refused_at_its_first_alias(tmp_path):
    names = "abcdefghi"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in itertools.pairwise(names)]
    with pytest.raises(BatchInputError, match=r"line 2: is not valid YAML \(found the alias \*a") as caught:
        plan_job(write(tmp_path, "job.yaml", "\n".join(lines)), {})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("timeout: 1e400", "timeout is inf; expected a finite number"),
        ("timeout: .inf", "timeout is '.inf'; expected a number"),
        ("timeout: 1:30", "timeout is '1:30'; expected a number"),
        ("seed: 010", "seed is '010'; expected a whole number"),
        ("seed: 0x10", "seed is '0x10'; expected a whole number"),
        ("seed: " + "9" * 5000, "seed is '99999"),
        ("seed: 2025-13-45", "seed is '2025-13-45'; expected a whole number"),
        ("model: 2025-02-30", ""),
        ("model: no", "model is False; expected text in quotes"),
        ("model: 7", "model is 7; expected text in quotes"),
        ("log_json: [a]", "log_json is ['a']; expected a path"),
        ('log_json: "a\\0b"', "log_json is 'a\\x00b'; it has a NUL character; remove it"),
        ('log_json: ""', "log_json is ''; expected a path"),
        ('model: "a\\0b"', "model is 'a\\x00b'; it has a NUL character; remove it"),
        ("endpoint: {a: b}", "endpoint is {'a': 'b'}; expected text, or a list of texts"),
        ("endpoint: [1]", "endpoint is [1]; expected text, or a list of texts"),
        ("batch_mode: [csv]", "batch_mode is ['csv']; expected one of csv, json, jsonl, parquet"),
        ("retries: [[[[[[[[[[[1]]]]]]]]]]]", "retries is [[[[[[[...]]]]]]]; expected a whole number"),
        ("input_file: null", "names 'input_file' twice"),
        ("sift: yes", ""),
    ],
    ids=lambda value: value[:30],
)
def test_options_of_another_type_are_named(tmp_path, option, message):
    text = "input_file: a.csv\noutput_dir: out\n" if "input_file" not in option else "output_dir: out\n"
    path = write(tmp_path, "job.yaml", f"{text}{option}\n")
    if not message:
        assert plan_job(path, {})
        return
    with pytest.raises(BatchInputError) as caught:
        plan_job(path, {})
    ((_, problem),) = caught.value.problems
    assert problem.startswith(message if "input_file" not in option else "has no input_file; name the table")


def test_options_from_python_are_checked_as_those_of_a_file_are(tmp_path):
    given = {"output_dir": tmp_path, "retries": "2", "seed": 10**5000, "ouput": 1, "endpoint": ["http://a", 7]}
    with pytest.raises(BatchInputError) as caught:
        plan_job(as_csv(tmp_path), given)
    messages = [message for _, message in caught.value.problems]
    assert messages[0] == "retries is '2'; expected a whole number"
    assert messages[1].startswith("key 'ouput' is unknown; did you mean 'output_dir'?")
    assert messages[2] == "endpoint is ['http://a', 7]; expected text, or a list of texts"
    for name in ("seed", "enhancer", "model"):
        with pytest.raises(BatchInputError, match=f"{name} is a number of thousands of digits; expected "):
            plan_job(as_csv(tmp_path), {"output_dir": tmp_path, name: 10**5000})


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            '{"input_file": "a.csv", "input_file": "b.csv", "output_dir": "o"}',
            None,
            "names 'input_file' twice; keep one",
        ),
        ('{"input_file": "a.csv", "output_dir": "o", "timeout": 1e400}', None, "timeout is '1e400'; expected a number"),
        (
            '{"input_file": "a.csv", "output_dir": "o", "timeout": NaN}',
            None,
            "timeout is nan; expected a finite number",
        ),
        ('{"input_file": "a\\u0000", "output_dir": "o"}', None, "input_file is 'a\\x00'; it has a NUL character"),
        ('{"model": "\\ud83d", "input_file": "a", "output_dir": "o"}', None, "model is '\\ud83d'; it has half of"),
        ('{"input_file": "a.csv"}\n{"input_file": "b.csv"}', 2, "is not valid JSON (Extra data at column 1)"),
        ('{"a": ' + "[" * 50_000, 1, "is nested more than 32 levels deep at column 38"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else value,
)
def test_json_jobs_are_read_strictly(tmp_path, text, line, message):
    with pytest.raises(BatchInputError) as caught:
        plan_job(write(tmp_path, "job.json", text), {})
    ((found, problem),) = caught.value.problems
    assert found == line
    assert problem.startswith(message)


def test_columns_of_ones_own_can_be_named_in_a_job_file(tmp_path):
    write(tmp_path, "t.csv", "prompt,cfg\na,7\n")
    job = plan_job(write(tmp_path, "job.yaml", "input_file: t.csv\noutput_dir: o\nextra_columns: cfg\n"), {})
    assert job.extra_columns == ("cfg",)
    assert read_table(job.input_file, extra_columns=job.extra_columns)

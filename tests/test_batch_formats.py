"""Every format, template and job file reads as the same rows, or is refused with every mistake and its fix."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ernie_accel.batch import BatchInputError, read_table
from ernie_accel.batch.job import Job, plan_job
from ernie_accel.batch.newbie import structure_problems
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
        ("t.json", "[{]", (1, "is not valid JSON (Expecting property name enclosed in double quotes); ")),
        ("t.json", '"a"', (1, 'is no JSON array; expected [{"prompt": "a red mug"}, ...]')),
        ("t.jsonl", '{"prompt": "a"}\n{"prompt"\n', (2, "is not valid JSON (Expecting ':' delimiter at column 10)")),
        ("t.json", '[{"Seed": 1, "prompt": "a"}]', (None, "column 'Seed' would be ignored; rename it to 'seed'")),
        ("t.parquet", "no parquet", (None, "cannot be read as Parquet")),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, problem):
    ((line, message),) = problems_of(write(tmp_path, name, content))
    assert line == problem[0]
    assert message.startswith(problem[1])


def test_a_missing_reader_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path, "t.parquet", "x")
    with pytest.raises(MissingExtraError, match=r"pyarrow is not installed: pip install 'ernie-accel\[parquet\]'"):
        read_table(path)


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


@pytest.mark.parametrize("prompt", [GOOD, f"<img>{GOOD}</img>", "a <lora:x> & a plain prompt", "1 < 2"])
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
        ('<!DOCTYPE a [<!ENTITY b "c">]><general_tags>&b;</general_tags>', "declares a document type or entities"),
    ],
)
def test_bad_structured_prompts_are_named(prompt, problem):
    (found,) = structure_problems(prompt)
    assert problem in found


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
        "batch_size is 'four'; expected int | None",
        "retries is True; expected int",
        "batch_mode is 'json', but input_file is 'p.csv'; expected a name ending in .json",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "input_file: [", "is not valid YAML"),
        ("a.json", "{", "is not valid JSON"),
        ("a.yaml", "- 1", "is no job; expected keys such as input_file and output_dir"),
        ("a.yaml", "seed: 1", "has no input_file; name the table"),
        ("a.yaml", "input_file: a.csv", "names no output folder; add --out, or output_dir to the job file"),
    ],
)
def test_broken_job_files_are_named(tmp_path, name, text, message):
    with pytest.raises(ErnieAccelError, match=message):
        plan_job(write(tmp_path, name, text), {})

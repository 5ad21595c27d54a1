"""A table is read exactly, or refused with every problem, its line and its fix."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from ernie_accel.batch import BatchInputError, Row, read_table
from ernie_accel.batch.input import formats, gate, table
from ernie_accel.batch.input.naming import JOB_FILES, collision_key, name_problem


@pytest.fixture
def write(tmp_path):
    """Write text (as UTF-8) or bytes to a CSV file and return its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "prompts.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def problems_of(path, **options):
    with pytest.raises(BatchInputError) as caught:
        read_table(path, **options)
    assert caught.value.path == Path(path)
    return list(caught.value.problems)


# What is read


def test_every_setting_is_parsed_and_every_column_kept(write):
    path = write(
        "sku,name,style,prompt,seed,width,height,steps,guidance_scale,negative_prompt\n"
        'A1,Mug,flat,"a mug, red",18446744073709551615,1264,848,8,4.5,blurry\n'
        "A2,Cup,,a cup,,,,,,\n"
    )
    first, second = read_table(path)
    assert (first.line, first.index, first.prompt, first.file_name) == (2, 0, "a mug, red", "A1.png")
    assert (first.seed, first.width, first.height) == (2**64 - 1, 1264, 848)
    assert (first.steps, first.guidance_scale, first.negative_prompt) == (8, 4.5, "blurry")
    assert first.columns["style"] == "flat"
    assert list(first.columns)[:3] == ["sku", "name", "style"]
    assert (second.line, second.index, second.file_name) == (3, 1, "A2.png")
    assert {second.seed, second.width, second.height, second.steps, second.guidance_scale} == {None}
    assert second.negative_prompt is None


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old-mac"])
def test_boms_and_line_ends_make_no_difference(write, bom, end):
    path = write(bom + end.join(["prompt,sku", "一只红苹果,果", "ein Käfer,K"]).encode())
    assert [(row.prompt, row.file_name, row.line) for row in read_table(path)] == [
        ("一只红苹果", "果.png", 2),
        ("ein Käfer", "K.png", 3),
    ]


def test_lines_stay_right_where_fields_span_lines_and_blank_lines_intervene(write):
    path = write('prompt,sku\n"a\n\nb",1\n\n"c\r\nd",2\n,\ne,3\n')
    assert [(row.line, row.index, row.prompt) for row in read_table(path)] == [
        (2, 0, "a\n\nb"),
        (6, 1, "c\r\nd"),
        (9, 2, "e"),
    ]


def test_spaces_after_commas_do_not_break_quoting(write):
    (row,) = read_table(write('sku, prompt\nA, "red, glossy"\n'))
    assert row.prompt == "red, glossy"


def test_trailing_unnamed_columns_of_a_spreadsheet_are_fine_while_empty(write):
    path = write("sku,prompt,,\nA,a cup,,\n")
    assert list(read_table(path)[0].columns) == ["sku", "prompt"]
    assert problems_of(write("sku,prompt,,\nA,a cup,,x\n")) == [
        (1, "column 4 has values but no name; name it or delete it (pandas: to_csv(..., index=False))")
    ]


@pytest.mark.parametrize(
    ("header", "pattern", "name"),
    [
        ("sku,prompt", None, "A.png"),
        ("name,prompt", None, "00000.png"),
        ("sku,prompt", "{index:02d}-{sku}.png", "00-A.png"),
        ("sku,prompt", "{index}_{{x}}.PNG", "0_{x}.PNG"),
        ("a.b,prompt", "{a.b}.png", "A.png"),
    ],
)
def test_naming_patterns(write, header, pattern, name):
    assert read_table(write(f"{header}\nA,a cup\n"), pattern=pattern)[0].file_name == name


def test_default_size_fills_what_a_row_leaves_open(write):
    path = write("prompt,width,height\na,,\nb,512,\nc,256,384\n")
    sizes = [(row.width, row.height) for row in read_table(path, default_size=(1024, 768))]
    assert sizes == [(1024, 768), (512, 768), (256, 384)]


def test_rows_are_immutable_hashable_and_picklable(write):
    (row,) = read_table(write("sku,prompt\nA,a cup\n"))
    with pytest.raises(FrozenInstanceError):
        row.prompt = "b"
    with pytest.raises(TypeError):
        row.columns["sku"] = "B"
    assert pickle.loads(pickle.dumps(row)) == row
    assert len({row, pickle.loads(pickle.dumps(row))}) == 1


# What is refused


def test_all_problems_come_in_one_error(write):
    path = write(
        "sku,prompt,seed,width,height\nA,a cup,7,1024,1024\na,a mug,x,1000,1024\n../up,,1,,\nD,a jug,1\nE,a pot,-1,,8\n"
    )
    with pytest.raises(BatchInputError) as caught:
        read_table(path)
    assert (
        str(caught.value)
        == f"""\
Cannot use '{path}' (8 problems):
  line 3: file name 'a.png' (from '{{sku}}.png') is taken by line 2 as 'A.png', the same name where letter \
case or Unicode form is ignored; change one, or name pictures by '{{sku}}_{{index}}.png'
  line 3: seed 'x' is not a whole number; write digits, e.g. 42, or leave it empty
  line 3: size 1000x1024 is not made of multiples of 16 from 16 to 8192; the nearest valid size is 1008x1024
  line 4: file name '../up.png' (from '{{sku}}.png') has '/' and has '..' and starts with a dot or space; \
change the value, or name pictures by another column
  line 4: prompt is empty; write what to draw, or delete the line
  line 5: has 3 fields, the header has 5; nothing is given for 'width', 'height': add the value, or a comma \
for each empty one
  line 6: seed -1 is not within 0 to 18446744073709551615; write digits, e.g. 42, or leave it empty
  line 6: height 8 is not made of multiples of 16 from 16 to 8192; the nearest valid height is 16
Fix these and run again; nothing was rendered."""
    )


def test_long_lists_are_cut_in_the_text_only(write):
    with pytest.raises(BatchInputError, match=r"\.\.\. and 50 more\n") as caught:
        read_table(write("prompt,seed\n" + "a cup,x\n" * 150))
    assert len(caught.value.problems) == 150


def test_errors_survive_pickling(write):
    with pytest.raises(BatchInputError) as caught:
        read_table(write(""))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.path, copy.problems) == (
        str(caught.value),
        caught.value.path,
        caught.value.problems,
    )


OR_YOURS = ", or, if it is a column of your own, name it in extra_columns (--extra-columns)"
SAVE_AS = "save it as UTF-8 (in Excel: 'CSV UTF-8') and run again"


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"", None, "is empty; expected a header such as 'sku,prompt' and a line per picture"),
        (b"\xef\xbb\xbf", None, "is empty; expected a header such as 'sku,prompt' and a line per picture"),
        (b"\n , \n\n", None, "is empty; expected a header such as 'sku,prompt' and a line per picture"),
        (b"prompt\n", None, "has a header and no rows; add one line per picture"),
        (b"prompt\nK\xe4fer\n", 2, f"is not UTF-8: byte 0xE4 at offset 8; {SAVE_AS}"),
        (b"\xef\xbb\xbfprompt\r\nK\xe4", 2, f"is not UTF-8: byte 0xE4 at offset 12; {SAVE_AS}"),
        ("prompt\na".encode("utf-16"), 1, f"is UTF-16, as Excel's 'Unicode Text' is; {SAVE_AS}"),
        ("prompt\na".encode("utf-16-le"), 1, f"is UTF-16, as Excel's 'Unicode Text' is; {SAVE_AS}"),
        (b"sku,prompt\nA,b\nx\0y,c\n", 3, "'sku' has a NUL character; remove it"),
        (b"sku,name\nA,b\n", 1, "has no 'prompt' column; found: 'sku', 'name'"),
        (
            b"sku;prompt\nA;a, b\n",
            1,
            "has no 'prompt' column; found: 'sku;prompt'. The separator looks like ';'; "
            "expected ',': save the file with commas",
        ),
        (
            b"sku\tprompt\nA\tb\n",
            1,
            "has no 'prompt' column; found: 'sku\\tprompt'. The separator looks like '\\t'; "
            "expected ',': save the file with commas",
        ),
        (
            b'"sku";"prompt"\n"A";"b"\n',
            1,
            "is not valid CSV (',' expected after '\"'); the separator looks like ';', expected ','",
        ),
        (b"sku,prompt,sku\nA,b,C\n", 1, "has 2 columns named 'sku'; rename or delete all but one"),
        (b"prompt,Seed\na,1\n", 1, f"column 'Seed' would be ignored; rename it to 'seed'{OR_YOURS}"),
        (
            b"prompt,num_inference_steps\na,1\n",
            1,
            f"column 'num_inference_steps' would be ignored; rename it to 'steps'{OR_YOURS}",
        ),
        (
            b"sku,prompt\nA,red, glossy\n",
            2,
            'has 3 fields, the header has 2; put quotes around a value with a comma in it: "red, glossy"',
        ),
        (
            b'sku,prompt\nA,"b\nB,c\n',
            2,
            "is not valid CSV (unexpected end of data); "
            'close every quote, and double a quote inside quotes: "a 5"" plate"',
        ),
        (b'prompt\n""\n', 2, "prompt is empty; write what to draw, or delete the line"),
    ],
)
def test_bad_files(write, content, line, message):
    assert problems_of(write(content)) == [(line, message)]


def test_missing_files_and_folders(tmp_path):
    assert problems_of(tmp_path / "no.csv") == [(None, "does not exist; check the path")]
    assert problems_of(tmp_path) == [(None, "is a folder; expected a file such as prompts.csv")]
    assert problems_of("a\0b.csv")[0][1].startswith("cannot be read: ")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("seed", "4.2", "seed '4.2' is not a whole number; write digits, e.g. 42, or leave it empty"),
        ("seed", "1_0", "seed '1_0' is not a whole number; write digits, e.g. 42, or leave it empty"),
        ("seed", "٣", "seed '٣' is not a whole number; write digits, e.g. 42, or leave it empty"),
        (
            "seed",
            "18446744073709551616",
            "seed 18446744073709551616 is not within 0 to 18446744073709551615; "
            "write digits, e.g. 42, or leave it empty",
        ),
        ("width", "wide", "width 'wide' is not a whole number; write pixels, e.g. 1024, or leave it empty"),
        ("steps", "0", "steps 0 is not within 1 to 1000; write digits, e.g. 8, or leave it empty"),
        (
            "steps",
            "9" * 5000,
            f"steps '{'9' * 77}...' is not a whole number; write digits, e.g. 8, or leave it empty",
        ),
        ("guidance_scale", "nan", "guidance_scale 'nan' is not a number; write e.g. 4.0, or leave it empty"),
        (
            "guidance_scale",
            "-1",
            "guidance_scale -1 is not within 0 to 100; write e.g. 4.0, or leave it empty",
        ),
    ],
)
def test_bad_numbers(write, column, value, message):
    assert problems_of(write(f"prompt,{column}\na,{value}\n")) == [(2, message)]


@pytest.mark.parametrize(
    ("width", "nearest"),
    [
        (0, 16),
        (-64, 16),
        (8, 16),
        (15, 16),
        (1000, 1008),
        (1001, 1008),
        (999, 992),
        (8200, 8192),
        (10**12, 8192),
    ],
)
def test_bad_sizes_name_the_nearest_valid_one(write, width, nearest):
    (problem,) = problems_of(write(f"prompt,width\na,{width}\n"))
    assert problem == (
        2,
        f"width {width} is not made of multiples of 16 from 16 to 8192; the nearest valid width is {nearest}",
    )
    assert read_table(write(f"prompt,width\na,{nearest}\n"))[0].width == nearest


def test_the_size_multiple_and_the_default_size_are_checked(write):
    path = write("prompt,width\na,48\nb,\n")
    assert [line for line, _ in problems_of(path, size_multiple=32)] == [2]
    assert problems_of(path, default_size=(1000, 1000)) == [
        (
            None,
            "default size 1000x1000 is not made of multiples of 16 from 16 to 8192; "
            "the nearest valid size is 1008x1008",
        )
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{skew}.png", " uses {skew}, but there is no such column; valid here: {sku}, {prompt}, {index}"),
        (
            "{sku.__class__}.png",
            " uses {sku.__class__}, but attributes and indices are refused; valid here: {sku}, {prompt}, {index}",
        ),
        (
            "{sku[0]}.png",
            " uses {sku[0]}, but attributes and indices are refused; valid here: {sku}, {prompt}, {index}",
        ),
        ("{}.png", " uses {}, but there is no such column; valid here: {sku}, {prompt}, {index}"),
        ("{sku!r}.png", " has {sku!r}; columns go in as they are: {sku}"),
        ("{sku:>9999999999}.png", " has {sku:>9999999999}; columns go in as they are: {sku}"),
        ("{index:099999999d}.png", " has {index:099999999d}; expected {index} or {index:05d}"),
        ("{index:{sku}}.png", " has {index:{sku}}; expected {index} or {index:05d}"),
        ("{sku.png", " cannot be read (expected '}' before end of string); write it like '{sku}.png'"),
        ("{sku}.jpg", " does not end in '.png', the only format written; end it so"),
        ("", " does not end in '.png', the only format written; end it so"),
        ("a/{sku}.png", " has '/'; pictures go straight into the output folder"),
    ],
)
def test_bad_naming_patterns(write, pattern, message):
    path = write("sku,prompt\nA,a cup\n")
    assert problems_of(path, pattern=pattern) == [(None, f"naming pattern {pattern!r}{message}")]


def test_a_column_called_index_must_not_hide_the_row_number(write):
    path = write("index,prompt\n7,a cup\n")
    assert problems_of(path) == [
        (
            None,
            "naming pattern '{index:05d}.png' uses {index}, the row number; rename the column of that name",
        )
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a/b.png", "has '/'"),
        ("a\\b.png", "has '\\\\'"),
        ("C:b.png", "has ':'"),
        ("a..png", "has '..' and has a dot or space at its end"),
        ("..png", "has '..' and starts with a dot or space and has a dot or space at its end"),
        (".png", "has nothing before '.png'"),
        ("", "does not end in '.png' and has nothing before '.png'"),
        (".hidden.png", "starts with a dot or space"),
        ("a .png", "has a dot or space at its end"),
        ("a\0b.png", "has NUL"),
        ("a\nb.png", "has '\\n'"),
        ("a\x85b.png", "has '\\x85'"),
        ("a\u2028b.png", "has '\\u2028'"),
        ("a\ud800b.png", "has '\\ud800'"),
        ("con.png", "is a device name on Windows"),
        ("LPT1.front.png", "is a device name on Windows"),
        ("COM¹.png", "is a device name on Windows"),
        ("a.jpg", "does not end in '.png'"),
        ("果" * 84 + ".png", "takes 256 bytes, more than the 255 a file name may have"),
    ],
)
def test_names_that_could_leave_or_break_the_folder(write, name, reason):
    assert name_problem(name) == reason
    with pytest.raises(ValueError, match=r"expected one like 'red-mug\.png'$"):
        Row(line=2, index=0, prompt="a", file_name=name)  # not even by hand


@pytest.mark.parametrize("name", ["a.png", "果 1.png", "console.png", "a.b-c_(d)é.PNG", "x" * 251 + ".png"])
def test_good_names(name):
    assert name_problem(name) is None


@pytest.mark.parametrize(
    ("first", "second"), [("a", "a"), ("A", "a"), ("é", "e\u0301"), ("STRASSE", "straße"), ("É", "e\u0301")]
)
def test_names_that_some_file_system_holds_for_one_are_duplicates(write, first, second):
    assert collision_key(first) == collision_key(second)
    ((line, message),) = problems_of(write(f"sku,prompt\n{first},a\n{second},b\n"))
    assert line == 3
    assert "is taken by line 2" in message


@pytest.mark.parametrize("value", ["/etc/passwd", "..", "../x", "x/../y", "a\\..\\b", "nul", "."])
def test_hostile_values_are_refused_in_tables(write, value):
    ((line, message),) = problems_of(write(f"sku,prompt\n{value},a\n"))
    assert line == 2
    assert message.startswith(f"file name {value + '.png'!r} (from '{{sku}}.png') ")


def test_a_folder_and_a_picture_never_share_a_name_whatever_the_order_of_rows(write):
    for rows in ("A,a,\nB,b,A.png\n", "B,b,A.png\nA,a,\n"):
        ((_, message),) = problems_of(write("sku,prompt,kind\n" + rows), folder_by="kind")
        assert message.startswith("folder 'A.png' (from column 'kind') ends in '.png', as pictures do")


@pytest.mark.parametrize("name", [*JOB_FILES, "Manifest.CSV", "REPORT.html", "Rejected", "reroll-1"])
def test_folders_named_like_what_a_job_writes_are_refused(write, name):
    ((line, message),) = problems_of(write(f"sku,prompt,kind\nA,a,{name}\n"), folder_by="kind")
    assert line == 2
    assert "the job itself" in message


def test_one_folder_is_spelt_in_one_way(write):
    path = write("sku,prompt,kind\nA,a,Mugs\nB,b,mugs\nC,c,Mugs\nD,d,caf\u00e9\nE,e,cafe\u0301\n")
    same = "the same where letter case or Unicode form is ignored; write both alike"
    assert problems_of(path, folder_by="kind") == [
        (3, f"folder 'mugs' (from column 'kind') is 'Mugs' on line 2, {same}"),
        (6, f"folder 'cafe\u0301' (from column 'kind') is 'caf\u00e9' on line 5, {same}"),
    ]


def test_rows_made_by_hand_hold_only_text_that_can_be_written():
    for bad in ({"prompt": "a \ud83d"}, {"negative_prompt": "\0"}, {"columns": {"a": "\udc00"}}):
        with pytest.raises(ValueError, match=r"surrogate pair|NUL"):
            Row(**({"line": 2, "index": 0, "prompt": "a", "file_name": "a.png"} | bad))


# Columns that look like a setting


@pytest.mark.parametrize(
    ("column", "meant"),
    [
        ("cfg", "guidance_scale"),
        ("cfg_scale", "guidance_scale"),
        ("cfgScale", "guidance_scale"),
        ("CFG scale", "guidance_scale"),
        ("guidance", "guidance_scale"),
        ("guidence_scale", "guidance_scale"),
        ("step", "steps"),
        ("Sampling steps", "steps"),
        ("negative", "negative_prompt"),
        ("negativ_prompt", "negative_prompt"),
        ("Negative Prompt", "negative_prompt"),
        ("seeds", "seed"),
        ("widht", "width"),
        ("hieght", "height"),
        ("variant", "variants"),
    ],
)
def test_settings_in_other_words_are_pointed_out_unless_they_are_the_users_own(write, column, meant):
    path = write(f"prompt,{column}\na,7\n")
    assert problems_of(path) == [(1, f"column {column!r} would be ignored; rename it to {meant!r}{OR_YOURS}")]
    (row,) = read_table(path, extra_columns=[column])
    assert row.columns[column] == "7"


def test_a_sampler_of_a_row_and_a_setting_given_twice_are_pointed_out(write):
    messages = [message for _, message in problems_of(write("prompt,steps,step,sampler\na,7,8,euler\n"))]
    assert messages == [
        f"column 'step' would be ignored; delete it, beside 'steps'{OR_YOURS}",
        "column 'sampler' would be ignored; the whole job has one sampler: choose it with --sampler; "
        f"delete it{OR_YOURS}",
    ]


@pytest.mark.parametrize(
    "column",
    ["sku", "name", "style", "size", "weight", "speed", "model", "prompt_id", "prompt_zh", "category", "id", "depth"],
)
def test_columns_of_ones_own_need_no_mention(write, column):
    (row,) = read_table(write(f"prompt,{column}\na,7\n"))
    assert row.columns[column] == "7"


def test_extra_columns_that_say_nothing_are_refused(write):
    path = write("prompt,cfg\na,7\n")
    assert problems_of(path, extra_columns=["cfg", "steps", "cgf"]) == [
        (1, "extra_columns names 'steps', which is a setting; leave it out there"),
        (1, "extra_columns names 'cgf', but there is no such column; found: 'prompt', 'cfg'"),
    ]


def test_a_template_reads_no_column_prompt_and_so_misses_none(write):
    (row,) = read_table(write("prompts,x\na,b\n"), template="{prompts} {x}")
    assert row.prompt == "a b"


# Sizes, and what messages show


def test_tables_beyond_a_limit_are_refused(write, monkeypatch):
    wide = write("prompt," + ",".join(f"c{i}" for i in range(1000)) + "\na\n")
    assert problems_of(wide) == [(None, "has more than 1,000 columns; leave out those that no picture needs")]
    monkeypatch.setattr(formats, "MAX_ROWS", 3)
    assert problems_of(write("prompt\na\nb\nc\nd\n")) == [(None, "has more than 3 rows; split it")]
    monkeypatch.setattr(table, "MAX_ROWS", 3)
    assert problems_of(write("prompt,variants\na,2\nb,2\n")) == [(3, "asks for more than 3 pictures; split the table")]


def test_no_more_of_a_file_is_read_than_a_table_may_have(write):
    path = write("prompt\n" + "a\n" * 50)
    assert gate.read_text(path, most=107) == path.read_text()
    with pytest.raises(BatchInputError, match="has more than 106 bytes; split it"):
        gate.read_text(path, most=106)


@pytest.mark.parametrize("template", [None, "{sku} {prompt}"])
def test_a_header_that_was_misread_is_the_only_problem(write, template):
    ((line, message),) = problems_of(write("sku;prompt;seed\nA;a, b;x\n\nB;c;y\n"), template=template)
    assert line == 1
    assert message.endswith("The separator looks like ';'; expected ',': save the file with commas")


def test_a_value_that_is_too_long_is_refused_where_it_stands(write, tmp_path):
    ((line, message),) = problems_of(write('prompt,note\na,b\nc,"' + "d\n" * 65_537 + '"\n'))
    assert line == 3
    assert message.startswith("is not valid CSV (field larger than field limit (131072)); close every quote")
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt":"a"}\n{"prompt":"' + "b" * 131_073 + '"}\n')
    assert problems_of(path) == [(2, "'prompt' has 131,073 characters; expected at most 131,072")]


def test_messages_stay_short_and_move_no_cursor(write):
    columns = ",".join(f"\x1b[2J{'c' * 50}{i}" for i in range(200))
    with pytest.raises(BatchInputError) as caught:
        read_table(write(f"{columns}\n"), pattern="{" + "p" * 5000 + "}.png")
    assert len(str(caught.value)) < 5000
    assert "\x1b" not in str(caught.value)
    assert "\\x1b[2J" in str(caught.value)


def test_a_nul_is_refused_with_its_row_and_skipped_with_it(write):
    path = write("sku,prompt\nA,a\nB,b\0\nC,c\n")
    assert problems_of(path) == [(3, "'prompt' has a NUL character; remove it")]
    skipped: list = []
    assert [row.file_name for row in read_table(path, skipped=skipped)] == ["A.png", "C.png"]
    assert len(skipped) == 1


def test_tables_separated_by_tabs_are_read_as_such(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text('sku\tprompt\nA\tred, glossy\nB\t"a\tb"\n')
    assert [row.prompt for row in read_table(path)] == ["red, glossy", "a\tb"]
    path.write_text("sku,prompt\nA,a\n")
    ((line, message),) = problems_of(path)
    assert line == 1
    assert message.endswith("The separator looks like ','; expected '\\t': save the file with tabs, or name it .csv")
    path.write_text("sku\tprompt\nA\n")
    assert problems_of(path)[0][1].endswith("nothing is given for 'prompt': add the value, or a tab for each empty one")


def test_a_table_is_checked_without_torch():
    code = "import sys, ernie_accel.batch; print({'torch', 'diffusers', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "set()\n"

"""Declare every option of a batch job once; the command's options and a job file's keys are made from this.

The Python API spells its keyword arguments out, for editors; it takes their bounds from here, and a test compares the
rest.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from ernie_accel.batch.errors import shown
from ernie_accel.batch.input.gate import text_problem
from ernie_accel.batch.input.row import DEFAULTS, MAX_GUIDANCE, MAX_SEED, MAX_SIDE, MAX_STEPS, MAX_VARIANTS, MIN_SIDE
from ernie_accel.core.errors import ErnieAccelError

REAL_MODEL = "baidu/ERNIE-Image-Turbo"
"""The model that messages advise."""

_EXPECTED = {Path: "a path", str: "text in quotes", bool: "true or false", int: "a whole number", float: "a number"}

_OUT_OF_RANGE = ("greater_than_equal", "less_than_equal")  # of pydantic's types of errors


def _usable(text: str) -> str:
    if reason := text_problem(text):
        raise PydanticCustomError("unusable", "{reason}", {"reason": f"it {reason}"})
    return text


def none_if_auto(value: object) -> object:
    """Return None, with which a command chooses a preset by itself, for "auto"; anything else as it is."""
    return None if value == "auto" else value


def _resolved(value: object) -> object:
    """Return a path for text; a path from the command line may hold bytes that are not UTF-8, but no NUL."""
    if value is None or not isinstance(value, str | Path):
        return value
    if "\0" in str(value):
        raise PydanticCustomError("unusable", "it has a NUL character; remove it")
    if not str(value):
        raise PydanticCustomError("unusable", "expected a path")
    return Path(value)


def _as_tuple(value: object) -> object:
    """Return texts as a tuple; one alone is a list of one."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise PydanticCustomError("unusable", "expected text, or a list of texts")
    if reason := next((reason for item in items if (reason := text_problem(item))), None):
        raise PydanticCustomError("unusable", "{reason}", {"reason": f"one of them {reason}"})
    return tuple(items)


Text: TypeAlias = Annotated[str, AfterValidator(_usable)]
Texts: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


@dataclass(frozen=True)
class Names:
    """What an option is called outside job files, where it has its field's name.

    Attributes:
        command: On the command line, with underscores; None: as the field.
        python: In the API: functions and classes with their arguments, such as "produce.timeout_s".
        secret: Whether its value may be shown: a "key" never, an "address" without the credentials in it.
    """

    command: str | None = None
    python: tuple[str, ...] = ()
    secret: Literal["key", "address"] | None = None


class Options(BaseModel):
    """Everything that ``ernie-accel batch`` can be asked for: name, type, bounds, default and help of each option."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    input_file: Annotated[
        Path,
        BeforeValidator(_resolved),
        Field(description="CSV, JSON, JSONL or Parquet with a column `prompt`; or a job file."),
        Names(command="table"),
    ]
    output_dir: Annotated[
        Path,
        BeforeValidator(_resolved),
        Field(description="Folder for the pictures; the job's ledger lives in it."),
        Names(command="out"),
    ]
    naming_pattern: Annotated[
        Text | None,
        Field(description="File names: '{sku}.png', '{name}_{index:04d}.png'."),
        Names(command="pattern", python=("read_table.pattern", "read_rows.pattern")),
    ] = None
    template: Annotated[
        Text | None,
        Field(description="Prompts: 'a product photo of {name}, {style}'."),
        Names(python=("read_table.template", "read_rows.template")),
    ] = None
    folder_by: Annotated[
        Text | None,
        Field(description="Column to sort pictures by into sub-folders."),
        Names(python=("read_table.folder_by", "read_rows.folder_by")),
    ] = None
    extra_columns: Annotated[
        Texts,
        Field(description="Column of your own, though named like a setting; repeatable."),
        Names(python=("read_table.extra_columns", "read_rows.extra_columns")),
    ] = ()
    image_root: Annotated[
        Path | None,
        BeforeValidator(_resolved),
        Field(description="Folder below which the table may name pictures; default: the table's."),
        Names(python=("read_table.image_root", "read_rows.image_root")),
    ] = None
    lora_root: Annotated[
        Path | None,
        BeforeValidator(_resolved),
        Field(description="Folder below which the table may name LoRAs; default: the table's."),
        Names(python=("read_table.lora_root", "read_rows.lora_root")),
    ] = None
    skip_bad: Annotated[bool, Field(description="Leave out rows with mistakes.")] = False
    seed: Annotated[
        int,
        Field(description="Seed of the first row, for rows without one.", ge=0, le=MAX_SEED),
        Names(python=("produce.seed", "Producer.seed")),
    ] = 0
    width: Annotated[int | None, Field(description="In pixels, for rows that give none.", ge=MIN_SIDE, le=MAX_SIDE)] = (
        None
    )
    height: Annotated[int | None, Field(description="The same.", ge=MIN_SIDE, le=MAX_SIDE)] = None
    steps: Annotated[int | None, Field(description="Denoising steps, for rows that give none.", ge=1, le=MAX_STEPS)] = (
        None
    )
    guidance: Annotated[
        float | None, Field(description="Guidance scale, for rows that give none.", ge=0, le=MAX_GUIDANCE)
    ] = None
    variants: Annotated[
        int | None, Field(description="Pictures of each row, for rows that do not say.", ge=1, le=MAX_VARIANTS)
    ] = None
    overwrite: Annotated[
        bool,
        Field(description="Replace what exists or has changed."),
        Names(python=("produce.overwrite", "Producer.overwrite", "write_report.overwrite")),
    ] = False
    model: Annotated[
        Text | None,
        Field(description=f"Pipeline folder or hub id, e.g. {REAL_MODEL}; default: the demo model."),
        Names(python=("HttpEngine.model",)),
    ] = None
    transformer: Annotated[
        Path | None,
        BeforeValidator(_resolved),
        Field(description="Single file with the model's transformer, as ComfyUI keeps it."),
    ] = None
    demo_model: Annotated[bool, Field(description="Let the demo model draw its flat shapes for any prompt.")] = False
    sampler: Annotated[Text | None, Field(description="Sampler to swap in: unipc, dpmpp_2m, heun, ...")] = None
    no_enhancer: Annotated[bool, Field(description="Do without the pipeline's prompt enhancer.")] = False
    preset: Annotated[
        Text | None,
        BeforeValidator(none_if_auto),
        Field(description="Preset, see `ernie-accel info`; default, and auto: what pays."),
    ] = None
    dtype: Annotated[Text, Field(description="float32, bfloat16, float16 or auto.")] = "auto"
    skip_unsupported: Annotated[bool, Field(description="Leave out what cannot run here instead of refusing.")] = False
    batch_size: Annotated[
        int | None,
        Field(description="Pictures per batch; default: tuned while it runs.", ge=1),
        Names(python=("produce.batch_size", "Producer.batch_size")),
    ] = None
    free_encoders: Annotated[
        bool,
        Field(description="Encode all prompts first, then free the encoders' memory."),
        Names(python=("produce.free_encoders",)),
    ] = False
    retries: Annotated[
        int,
        Field(description="Further attempts for a row that fails.", ge=0),
        Names(python=("produce.retries", "Producer.retries")),
    ] = 0
    fail_fast: Annotated[
        bool, Field(description="Stop at the first row that fails."), Names(python=("produce.fail_fast",))
    ] = False
    timeout: Annotated[
        float | None,
        Field(description="Seconds for a batch, in a child process.", ge=0.1),
        Names(python=("produce.timeout_s", "Producer.timeout_s")),
    ] = None
    endpoint: Annotated[
        Texts, Field(description="Image server to use instead; repeatable.", repr=False), Names(secret="address")
    ] = ()
    server: Annotated[
        Text,
        Field(description="What the image servers run: sglang or vllm-omni."),
        Names(python=("HttpEngine.server",)),
    ] = "sglang"
    enhancer: Annotated[
        Text | None,
        Field(description="vLLM server with the prompt enhancer.", repr=False),
        Names(python=("HttpEngine.enhancer",), secret="address"),
    ] = None
    api_key_env: Annotated[
        Text | None,
        Field(description="Environment variable with the API key of the image servers.", repr=False),
        Names(secret="key"),
    ] = None
    enhancer_api_key_env: Annotated[
        Text | None,
        Field(description="Environment variable with the API key of the enhancer.", repr=False),
        Names(secret="key"),
    ] = None
    max_concurrent: Annotated[
        int, Field(description="Requests at once to each server.", ge=1), Names(python=("HttpEngine.concurrency",))
    ] = 4
    ray_actors: Annotated[int, Field(description="Pipelines to run as Ray actors instead; 0: none.", ge=0)] = 0
    ray_gpus: Annotated[
        float, Field(description="GPUs of each actor.", ge=0), Names(python=("RayEngine.num_gpus",))
    ] = 1.0
    sift: Annotated[bool, Field(description="Set blank and grid-patterned pictures aside.")] = False
    blur: Annotated[
        float | None,
        Field(description="Also blurred ones, of a Laplacian variance below this.", ge=0, le=1e6),
        Names(python=("Sift.blur_variance",)),
    ] = None
    grid: Annotated[
        float | None,
        Field(description="Also those with a faint grid, of a score above this; 0.5 is visible.", ge=0, le=255),
        Names(python=("Sift.grid_score",)),
    ] = None
    refine: Annotated[
        bool,
        Field(description="Draw those with a faint grid once more from themselves."),
        Names(python=("Sift.refine",)),
    ] = False
    refine_model: Annotated[
        Text | None,
        Field(description="Pipeline that does so, such as the base checkpoint; default: the same."),
    ] = None
    duplicates: Annotated[
        int | None,
        Field(description="Also near-duplicates, up to so many bits of 64.", ge=0, le=64),
        Names(python=("Sift.duplicate_bits",)),
    ] = None
    reroll: Annotated[
        int, Field(description="Further seeds for a picture set aside.", ge=0, le=100), Names(python=("Sift.reroll",))
    ] = 0
    report: Annotated[bool, Field(description="Write report.html and report.md at the end.")] = True
    gpu_price: Annotated[
        float | None,
        Field(description="Price of a GPU-hour, for the report.", ge=0),
        Names(python=("write_report.gpu_price",)),
    ] = None
    power_price: Annotated[
        float | None,
        Field(description="Price of a kWh, for the report.", ge=0),
        Names(python=("write_report.power_price",)),
    ] = None
    watts: Annotated[
        float | None,
        Field(description="Power drawn, where it cannot be measured.", ge=0),
        Names(python=("write_report.watts",)),
    ] = None
    log_json: Annotated[
        Path | None,
        BeforeValidator(_resolved),
        Field(description="Append the job's state as JSON lines."),
        Names(python=("produce.log_json",)),
    ] = None
    prometheus: Annotated[
        Path | None,
        BeforeValidator(_resolved),
        Field(description="Keep the job's state in Prometheus' text format."),
        Names(python=("produce.prometheus",)),
    ] = None
    metrics_port: Annotated[
        int | None,
        Field(description="Serve the same at http://127.0.0.1:PORT/metrics; 0: any free.", ge=0, le=65535),
    ] = None
    metrics_host: Annotated[
        Text,
        Field(description="Listen there instead; 0.0.0.0: on every network."),
        Names(python=("MetricsServer.host",)),
    ] = "127.0.0.1"


OPTION_OF: Mapping[str, str] = {name: "guidance" if name == "guidance_scale" else name for name in DEFAULTS}
"""Column of a table -> the option that says it for rows that leave it open."""


@dataclass(frozen=True)
class Option:
    """One option, as `Options` declares it.

    Attributes:
        name: Its key in a job file.
        names: What it is called elsewhere.
        kind: Its type; `tuple` for several texts.
        optional: Whether None means that nothing was asked for.
        default: Its default; `...` where there is none.
        help: What the command's help says.
        low: The lowest value; None: no bound.
        high: The highest.
    """

    name: str
    names: Names
    kind: type
    optional: bool
    default: object
    help: str
    low: float | None
    high: float | None

    @property
    def command(self) -> str:
        """Its name on the command line, with underscores."""
        return self.names.command or self.name

    @property
    def range(self) -> str:
        """The values that it may have, in words; for options with bounds."""
        low, high = (bound if bound is None or self.kind is int else f"{bound:g}" for bound in (self.low, self.high))
        return f"{low} or more" if high is None else f"{low} to {high}"


def _option(name: str, field: FieldInfo) -> Option:
    bounds = {bound: getattr(each, bound) for each in field.metadata for bound in ("ge", "le") if hasattr(each, bound)}
    kinds = get_args(field.annotation) if NoneType in get_args(field.annotation) else (field.annotation,)
    (kind,) = (each for each in kinds if each is not NoneType)
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return Option(
        name=name,
        names=next((each for each in field.metadata if isinstance(each, Names)), Names()),
        kind=get_origin(kind) or kind,
        optional=len(kinds) > 1,
        default=... if field.is_required() else field.default,
        help=field.description or "",
        low=bounds.get("ge"),
        high=bounds.get("le"),
    )


OPTIONS: Mapping[str, Option] = {name: _option(name, field) for name, field in Options.model_fields.items()}
"""Every option by its key in a job file."""


@functools.cache
def _checker(name: str) -> TypeAdapter[Any]:
    field = Options.model_fields[name]
    hint: Any = field.annotation
    for each in field.metadata:
        hint = Annotated[hint, each]
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def check_option(name: str, value: object) -> tuple[object, str | None]:
    """Return an option's value as `Options` holds it, and what was expected instead (None: it is right).

    The value is None where it is of another type, and what was given where it is only out of range.
    """
    try:
        return _checker(name).validate_python(value), None
    except ValidationError as error:
        (detail,) = error.errors(include_url=False)
        return value if detail["type"] in _OUT_OF_RANGE else None, _reason(OPTIONS[name], value, detail)


def _reason(option: Option, value: object, error: ErrorDetails) -> str:
    if error["type"] == "unusable":
        return error["msg"]
    if error["type"] in _OUT_OF_RANGE:
        return f"expected {option.range}"
    # A whole number that is larger than any float.
    huge = option.kind is float and isinstance(value, int) and not isinstance(value, bool)
    if huge or error["type"] == "finite_number":
        return "expected a finite number"
    return f"expected {_EXPECTED[option.kind]}"


def check_arguments(of: str, arguments: Mapping[str, object]) -> None:
    """Refuse arguments of the API that are out of range, or of another type; those that are no options are left alone.

    Args:
        of: The function or class, as `Names.python` has it.
        arguments: By their names there.

    Raises:
        ErnieAccelError: With every problem.
    """
    problems = []
    for option in OPTIONS.values():
        for argument in option.names.python:
            owner, _, name = argument.partition(".")
            if owner == of and name in arguments:
                reason = check_option(option.name, _plain_number(arguments[name]))[1]
                problems += [] if reason is None else [f"{name} is {shown(arguments[name])}; {reason}"]
    if problems:
        raise ErnieAccelError("\n".join(problems))


def _plain_number(value: object) -> object:
    """Return a number of Python's in place of one of numpy's."""
    if isinstance(value, bool | int | float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)

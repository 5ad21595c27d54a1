"""Describe a whole job in one YAML or JSON file, so that it can be repeated, reviewed and scheduled.

The keys are the long names of the command's options. The shape that guides for ComfyUI show is taken as well::

    {"batch_mode": "csv", "input_file": "products.csv", "output_dir": "out",
     "naming_pattern": "{sku}_{index}.png", "batch_size": 4, "max_concurrent": 2}
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ernie_accel.batch.errors import BatchInputError, Problem, shown
from ernie_accel.batch.gate import MAX_JOB_BYTES, NotJsonError, Repeated, decode_json, read_text, text_problem
from ernie_accel.batch.plain_yaml import parse_yaml
from ernie_accel.batch.row import DEFAULTS, MAX_SEED
from ernie_accel.batch.sift import Sift
from ernie_accel.core.errors import ErnieAccelError, UnknownNameError

JOB_SUFFIXES = (".yaml", ".yml", ".json")

EMBEDDED_MODEL = "embedded demo model (draws flat shapes only)"
"""How pictures, reports and messages name the model of a job that names none, so that nobody takes it as real."""

REAL_MODEL = "baidu/ERNIE-Image-Turbo"
"""The model that messages advise."""

_MODES = {"csv": (".csv", ".txt", ".tsv"), "json": (".json",), "jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",)}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that ``ernie-accel batch`` can be asked for.

    Attributes:
        input_file: The table.
        output_dir: Folder for the pictures.
        naming_pattern: How pictures are named.
        template: How prompts are made from columns.
        folder_by: The column that pictures are sorted by into sub-folders.
        extra_columns: Columns of the table that look like a setting and are the user's own.
        skip_bad: Leave out rows with mistakes instead of refusing the table.
        seed: Of the first row, for rows that give none.
        width: In pixels, for rows that give none.
        height: In pixels, for rows that give none.
        steps: Denoising steps, for rows that give none; None: the preset's for the family, else the pipeline's own.
        guidance: Guidance scale, for rows that give none; None: likewise.
        variants: Pictures of each row, for rows that do not say.
        overwrite: Replace pictures that exist, and make again what has changed.
        model: Pipeline folder or hub id; None: the embedded model.
        demo_model: Draw whatever the prompts say with the embedded model, which knows flat shapes only.
        sampler: Sampler to swap in, as `SwapScheduler` names it; None: the model's own.
        no_enhancer: Do without the pipeline's prompt enhancer, and do not load it.
        preset: Preset to optimize with; None: what pays here.
        dtype: Of the weights.
        skip_unsupported: Leave out transforms that cannot run here.
        batch_size: Pictures per batch; None: tuned automatically.
        free_encoders: Take the encoders off the device once all prompts are encoded.
        retries: Further attempts for a row that fails.
        fail_fast: Begin nothing more once a row has failed.
        timeout: Seconds for a batch; the pipeline then lives in a child process.
        endpoint: Image servers to use instead of a pipeline here.
        server: What they run: sglang or vllm-omni.
        enhancer: A vLLM server with the prompt enhancer.
        api_key_env: Name of the environment variable that holds the API key of the image servers.
        enhancer_api_key_env: Likewise, of the enhancer.
        max_concurrent: Requests at once to each image server.
        ray_actors: Pipelines to run as Ray actors instead of one here.
        ray_gpus: GPUs of each.
        sift: Set blank and grid-patterned pictures aside.
        blur: Also those whose Laplacian variance is below this.
        duplicates: Also near-duplicates, of up to so many differing bits of 64.
        reroll: Further seeds for a picture that was set aside.
        report: Write report.html and report.md at the end.
        gpu_price: Price of a GPU-hour, for the report.
        power_price: Price of a kilowatt-hour, for the report.
        watts: Power drawn, in watts, where it cannot be measured.
        log_json: File for JSON lines.
        prometheus: File in Prometheus' text format.
        metrics_port: Port at which a Prometheus can scrape the same; 0: any that is free.
        metrics_host: Address to listen at for that.
        notes: No option: what `plan_job` found that has no effect and does no harm.
        compiled: No option: whether a preset that nobody chose by name may compile; decided by the rows.
    """

    input_file: Path
    output_dir: Path
    naming_pattern: str | None = None
    template: str | None = None
    folder_by: str | None = None
    extra_columns: tuple[str, ...] = ()
    skip_bad: bool = False
    seed: int = 0
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    variants: int | None = None
    overwrite: bool = False
    model: str | None = None
    demo_model: bool = False
    sampler: str | None = None
    no_enhancer: bool = False
    preset: str | None = None
    dtype: str = "auto"
    skip_unsupported: bool = False
    batch_size: int | None = None
    free_encoders: bool = False
    retries: int = 0
    fail_fast: bool = False
    timeout: float | None = None
    endpoint: tuple[str, ...] = field(default=(), repr=False)  # addresses may hold credentials
    server: str = "sglang"
    enhancer: str | None = field(default=None, repr=False)
    api_key_env: str | None = field(default=None, repr=False)
    enhancer_api_key_env: str | None = field(default=None, repr=False)
    max_concurrent: int = 4
    ray_actors: int = 0
    ray_gpus: float = 1.0
    sift: bool = False
    blur: float | None = None
    duplicates: int | None = None
    reroll: int = 0
    report: bool = True
    gpu_price: float | None = None
    power_price: float | None = None
    watts: float | None = None
    log_json: Path | None = None
    prometheus: Path | None = None
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    notes: tuple[str, ...] = field(default=(), compare=False)
    compiled: bool = True

    @property
    def uses_embedded(self) -> bool:
        """Whether the pictures come from the embedded model."""
        return not self.endpoint and self.model is None

    def defaults(self) -> dict[str, float]:
        """Return the settings for rows that leave them open, by column."""
        given = {name: getattr(self, option) for name, option in OPTION_OF.items()}
        return {name: value for name, value in given.items() if value is not None}

    def sifting(self) -> Sift | None:
        """Return what is sifted out; None: nothing was asked for."""
        if not (self.sift or self.blur is not None or self.duplicates is not None or self.reroll):
            return None
        return Sift(blur_variance=self.blur, duplicate_bits=self.duplicates, reroll=self.reroll)


OPTION_OF: Mapping[str, str] = {name: "guidance" if name == "guidance_scale" else name for name in DEFAULTS}
"""Column of a table -> the option that says it for rows that leave it open."""

_RANGES: Mapping[str, tuple[float, float | None]] = {
    **{option: DEFAULTS[name] for name, option in OPTION_OF.items()},
    "seed": (0, MAX_SEED),
    "batch_size": (1, None),
    "retries": (0, None),
    "timeout": (0.1, None),
    "max_concurrent": (1, None),
    "ray_actors": (0, None),
    "ray_gpus": (0, None),
    "blur": (0, 1e6),
    "duplicates": (0, 64),
    "reroll": (0, 100),
    "gpu_price": (0, None),
    "power_price": (0, None),
    "watts": (0, None),
    "metrics_port": (0, 65535),
}
_OF_A_PIPELINE = (
    "preset", "dtype", "skip_unsupported", "free_encoders", "ray_actors", "ray_gpus", "sampler", "no_enhancer"
)  # fmt: skip
_OF_SERVERS = ("server", "enhancer", "api_key_env", "enhancer_api_key_env")
_ADDRESSES = ("endpoint", "enhancer")
_KEY_NAMES = ("api_key_env", "enhancer_api_key_env")
_OF_THE_REPORT = ("gpu_price", "power_price", "watts")
_TYPES = get_type_hints(Job)
_LISTS = ("endpoint", "extra_columns")  # a text alone is a list of one
_NAMES = tuple(each.name for each in fields(Job) if each.name not in ("notes", "compiled"))


def plan_job(table: Path, given: Mapping[str, Any]) -> Job:
    """Return the job that a table or job file and the options of the command line make together.

    Args:
        table: A table, or a job file: YAML, or JSON that is an object.
        given: Options by their names in `Job`; they go before what the file says.

    Raises:
        BatchInputError: With every mistake of the job file, or because there is no output folder.
    """
    described = _read_job(table)
    options: dict[str, Any] = {"input_file": table} if described is None else described
    wrong: list[Problem] = []
    options |= _options(given, Path(), wrong)
    if wrong:
        raise BatchInputError(table, wrong)
    if "output_dir" not in options:
        raise BatchInputError(table, [(None, "no output folder is given; add --out, or output_dir to the job file")])
    job = Job(**options)
    given_names = {name for name, value in options.items() if value is not None and value is not False}
    if problems := [*_range_problems(job), *_useless_options(job, given_names)]:
        raise BatchInputError(table, problems)
    return replace(job, notes=tuple(_harmless_options(job, given_names)))


def _read_job(path: Path) -> dict[str, Any] | None:
    """Return the options in a job file, None if `path` is a table; relative paths start at the file's folder."""
    suffix = path.suffix.lower()
    if suffix not in JOB_SUFFIXES or not path.is_file():
        return None
    if suffix == ".json":
        text = read_text(path)
        if not text.lstrip(" \t\r\n").startswith("{"):
            return None
    if path.stat().st_size > MAX_JOB_BYTES:
        raise BatchInputError(path, [(None, f"has more than {MAX_JOB_BYTES:,} bytes; expected a job of a few lines")])
    content = _parse_json(path, text) if suffix == ".json" else parse_yaml(path, read_text(path, MAX_JOB_BYTES))
    if not isinstance(content, dict):
        found = "is empty" if content is None else "is not a job"
        raise BatchInputError(path, [(None, f"{found}; expected keys such as input_file and output_dir")])
    problems: list[Problem] = []
    if isinstance(content, Repeated):
        problems += [(None, f"names {shown(name)} twice; keep one") for name in content.names]
    mode = content.pop("batch_mode", None)
    options = _options(content, path.parent, problems)
    if content.get("input_file") is None:
        problems.append((None, "has no input_file; name the table"))
    problems += _mode_problems(mode, options.get("input_file"))
    if problems:
        raise BatchInputError(path, problems)
    return options


def _parse_json(path: Path, text: str) -> object:
    try:
        return decode_json(text)
    except NotJsonError as error:
        raise BatchInputError(path, [error.problem]) from error


def _options(content: Mapping[str, object], folder: Path, problems: list[Problem]) -> dict[str, Any]:
    """Return options as `Job` holds them; those that are no options, or of another type, are noted as problems."""
    found = {}
    for name, value in content.items():
        if name not in _NAMES:
            close = difflib.get_close_matches(name, _NAMES, n=1) if len(name) < 100 else []
            hint = f"did you mean {close[0]!r}?" if close else f"valid: batch_mode, {', '.join(_NAMES)}"
            problems.append((None, f"key {shown(name)} is unknown; {hint}"))
        elif value is not None:
            typed, reason = _typed(name, value, folder)
            if reason:
                problems.append((None, f"{name} is {_shown_option(name, value)}; {reason}"))
            else:
                found[name] = typed
    return found


def _shown_option(name: str, value: object) -> str:
    """Return an option's value for a message, without the credentials that it may hold."""
    if name in _KEY_NAMES:
        return "***"
    if name not in _ADDRESSES:
        return shown(value)
    from ernie_accel.batch.engines.address import redacted

    if isinstance(value, str):
        return shown(redacted(value))
    try:
        whole = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return shown(value)
    return shown(value) if redacted(whole) == whole else "***"


def _server_problems(job: Job) -> list[Problem]:
    """Return what is wrong with the addresses of servers, and with the variables that hold their keys."""
    from ernie_accel.batch.engines.address import check_key, parse_address

    problems: list[Problem] = []
    keys: dict[str, str | None] = dict.fromkeys(_KEY_NAMES)
    for name, whose in zip(_KEY_NAMES, ("the image servers", "the enhancer"), strict=True):
        try:
            keys[name] = key_in(getattr(job, name))
            check_key(keys[name], whose)
        except ErnieAccelError as error:
            problems.append((None, f"{name}: {error}"))
    addresses = [("endpoint", each, keys["api_key_env"]) for each in job.endpoint]
    addresses += [("enhancer", each, keys["enhancer_api_key_env"]) for each in [job.enhancer] if each is not None]
    for name, address, key in addresses:
        try:
            parse_address(address, key=key)
        except ErnieAccelError as error:
            problems.append((None, f"{name}: {error}"))
    return problems


def key_in(variable: str | None) -> str | None:
    """Return the API key that an environment variable holds; None where none is named.

    Raises:
        ErnieAccelError: There is no such variable, or nothing in it. The text shows no name that could be a key itself.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        name = f"{variable} " if re.fullmatch(r"[A-Z_][A-Z0-9_]{0,60}", variable) else ""
        raise ErnieAccelError(
            f"the environment variable {name}is not set, or empty; expected the name of the variable that holds the "
            "key, such as IMAGE_SERVER_KEY, and not the key itself"
        )
    return key


def _typed(name: str, value: object, folder: Path) -> tuple[Any, str | None]:
    """Return an option's value as `Job` holds it, and why there is none."""
    hint = _TYPES[name]
    kinds = set(get_args(hint)) or {hint}
    if name in _LISTS:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            return None, "expected text, or a list of texts"
        return tuple(items), next((f"one of them {why}" for item in items if (why := text_problem(item))), None)
    if Path in kinds and isinstance(value, str | Path):
        # A path from the command line may hold bytes that are not UTF-8; a NUL no path can hold.
        reason = "it has a NUL character; remove it" if "\0" in str(value) else None
        return folder / value, reason if value else "expected a path"
    if str in kinds and isinstance(value, str):
        reason = text_problem(value)
        return value, f"it {reason}" if reason else None
    if bool in kinds and isinstance(value, bool):
        return value, None
    if int in kinds and isinstance(value, int) and not isinstance(value, bool):
        return value, None
    if float in kinds and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        return number, None if math.isfinite(number) else "expected a finite number"
    expected = {Path: "a path", str: "text in quotes", bool: "true or false", int: "a whole number", float: "a number"}
    return None, f"expected {' or '.join(text for kind, text in expected.items() if kind in kinds)}"


def _range_problems(job: Job) -> list[Problem]:
    """Return the options that are out of range: a job file can hold what the command line refuses."""
    problems: list[Problem] = []
    for name, (low, high) in _RANGES.items():
        value = getattr(job, name)
        if value is not None and not (low <= value and (high is None or value <= high)):
            expected = f"{low:g} or more" if high is None else f"{low:g} to {high:g}"
            problems.append((None, f"{name} is {shown(value)}; expected {expected}"))
    if job.endpoint or job.enhancer is not None:
        problems += _server_problems(job)
    if job.sampler is not None:
        from ernie_accel.transforms.scheduler.swap_scheduler import SwapScheduler  # here, because it loads torch

        try:
            SwapScheduler(job.sampler)
        except UnknownNameError as error:
            problems.append((None, f"sampler: {error}"))
    return problems


def _useless_options(job: Job, given: Collection[str]) -> list[Problem]:
    """Return the options that would have no effect beside others, and not do what was meant: they are refused."""
    clashes: list[tuple[str, str]] = []
    if job.endpoint:
        why = "has no effect with endpoint: the image servers hold the pipeline; start them with it, or leave it out"
        clashes += [(name, why) for name in _OF_A_PIPELINE if name in given and getattr(job, name) != 0]
        if job.demo_model:
            clashes.append(("demo_model", "has no effect with endpoint: the image servers have a model; leave it out"))
    else:
        clashes += [
            (name, "has no effect without endpoint; name the image servers") for name in _OF_SERVERS if name in given
        ]
        if job.demo_model and job.model is not None:
            clashes.append(("demo_model", f"has no effect with model {job.model!r}; leave one of them out"))
        if "ray_gpus" in given and not job.ray_actors:
            clashes.append(("ray_gpus", "has no effect without ray_actors; say how many"))
    if job.endpoint and job.enhancer is None and "enhancer_api_key_env" in given:
        clashes.append(("enhancer_api_key_env", "has no effect without enhancer; name that server, or leave it out"))
    if job.ray_actors and job.free_encoders:
        clashes.append(("free_encoders", "has no effect with ray_actors: they encode each batch; leave it out"))
    if job.metrics_port is None and "metrics_host" in given:
        clashes.append(("metrics_host", "has no effect without metrics_port; name the port"))
    if not job.report:
        clashes += [
            (name, "has no effect without a report; leave out --no-report") for name in _OF_THE_REPORT if name in given
        ]
    elif job.watts is not None and job.power_price is None:
        clashes.append(("watts", "has no effect without power_price; give the price of a kWh"))
    return [(None, f"{name} {why}") for name, why in clashes]


def _harmless_options(job: Job, given: Collection[str]) -> list[str]:
    """Return what has no effect here and does no harm: guides give some of these always."""
    notes = []
    if "max_concurrent" in given and not job.endpoint:
        notes.append(
            "max_concurrent has no effect without endpoint: it counts requests to image servers; "
            "batch_size says how many pictures a pipeline makes at once"
        )
    if "batch_size" in given and job.endpoint:
        notes.append(
            "batch_size has no effect with endpoint: image servers make batches of their own; "
            "max_concurrent says how many requests each gets at once"
        )
    if "skip_unsupported" in given and job.preset is None and not job.endpoint:
        notes.append("skip_unsupported has no effect without preset: the default preset leaves out what cannot run")
    return notes


def _mode_problems(mode: object, table: object) -> list[Problem]:
    if mode is None:
        return []
    if not isinstance(mode, str) or mode not in _MODES:
        return [(None, f"batch_mode is {shown(mode)}; expected one of {', '.join(_MODES)}")]
    if isinstance(table, Path) and table.suffix.lower() not in _MODES[mode]:
        name, expected = shown(table.name), " or ".join(_MODES[mode])
        return [(None, f"batch_mode is {mode!r}, but input_file is {name}; expected a name ending in {expected}")]
    return []

"""Describe a whole job in one YAML or JSON file, so that it can be repeated, reviewed and scheduled.

The keys are those that `options` declares. The shape that guides for ComfyUI show is taken as well::

    {"batch_mode": "csv", "input_file": "products.csv", "output_dir": "out",
     "naming_pattern": "{sku}_{index}.png", "batch_size": 4, "max_concurrent": 2}
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_accel.batch.errors import BatchInputError, Problem, shown
from ernie_accel.batch.input.gate import MAX_JOB_BYTES, NotJsonError, Repeated, decode_json, read_text
from ernie_accel.batch.input.options import OPTION_OF, OPTIONS, Option, Options, check_option
from ernie_accel.batch.input.plain_yaml import parse_yaml
from ernie_accel.batch.input.row import Row
from ernie_accel.batch.input.sift import Sift
from ernie_accel.batch.input.table import read_table
from ernie_accel.core.errors import ErnieAccelError, UnknownNameError

JOB_SUFFIXES = (".yaml", ".yml", ".json")

EMBEDDED_MODEL = "embedded demo model (draws flat shapes only)"
"""How pictures, reports and messages name the model of a job that names none, so that nobody takes it as real."""

_MODES = {"csv": (".csv", ".txt", ".tsv"), "json": (".json",), "jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",)}


class Job(Options):
    """What a job was asked for, all together, and what follows from it.

    Attributes:
        compiled: No option: whether a preset that nobody chose by name may compile; decided by the rows.
    """

    compiled: bool = True

    @property
    def uses_embedded(self) -> bool:
        """Whether the pictures come from the embedded model."""
        return not self.endpoint and self.model is None

    @property
    def asked_for(self) -> frozenset[str]:
        """The options that were given, but for switches that were given as off."""
        return frozenset(name for name in self.model_fields_set if getattr(self, name) is not False)

    def notes(self) -> list[str]:
        """Return what has no effect here and does no harm: guides give some of these always."""
        notes = []
        if "max_concurrent" in self.asked_for and not self.endpoint:
            notes.append(
                "max_concurrent has no effect without endpoint: it counts requests to image servers; "
                "batch_size says how many pictures a pipeline makes at once"
            )
        if "batch_size" in self.asked_for and self.endpoint:
            notes.append(
                "batch_size has no effect with endpoint: image servers make batches of their own; "
                "max_concurrent says how many requests each gets at once"
            )
        if "skip_unsupported" in self.asked_for and self.preset is None and not self.endpoint:
            notes.append("skip_unsupported has no effect without preset: the default preset leaves out what cannot run")
        return notes

    def defaults(self) -> dict[str, float]:
        """Return the settings for rows that leave them open, by column."""
        given = {name: getattr(self, option) for name, option in OPTION_OF.items()}
        return {name: value for name, value in given.items() if value is not None}

    def rows(self, default_size: tuple[int, int] | None = None, skipped: list[Problem] | None = None) -> list[Row]:
        """Read the job's table.

        Args:
            default_size: As for `read_table`.
            skipped: Takes the rows that `skip_bad` leaves out.

        Raises:
            BatchInputError: As `read_table`.
        """
        return read_table(
            self.input_file,
            pattern=self.naming_pattern,
            template=self.template,
            folder_by=self.folder_by,
            extra_columns=self.extra_columns,
            default_size=default_size,
            defaults=self.defaults(),
            skipped=([] if skipped is None else skipped) if self.skip_bad else None,
            image_root=self.image_root,
            lora_root=self.lora_root,
        )

    def sifting(self) -> Sift | None:
        """Return what is sifted out; None: nothing was asked for."""
        asked_for = (self.blur, self.grid, self.duplicates)
        if not (self.sift or self.refine or self.reroll or any(each is not None for each in asked_for)):
            return None
        return Sift(
            blur_variance=self.blur,
            grid_score=self.grid,
            refine=self.refine,
            duplicate_bits=self.duplicates,
            reroll=self.reroll,
        )


_OF_A_PIPELINE = (
    "preset", "dtype", "skip_unsupported", "free_encoders", "ray_actors", "ray_gpus", "sampler", "no_enhancer",
    "transformer",
)  # fmt: skip
_OF_SERVERS = ("server", "enhancer", "api_key_env", "enhancer_api_key_env")
_KEY_NAMES = ("api_key_env", "enhancer_api_key_env")
_OF_THE_REPORT = ("gpu_price", "power_price", "watts")


def plan_job(table: Path, given: Mapping[str, object]) -> Job:
    """Return the job that a table or job file and the options of the command line make together.

    Args:
        table: A table, or a job file: YAML, or JSON that is an object.
        given: Options by their names in `Job`; they go before what the file says.

    Raises:
        BatchInputError: With every mistake of the job file, or because there is no output folder.
    """
    problems = _Problems()
    described = _read_job(table, problems)
    options: dict[str, object] = {"input_file": table} if described is None else described
    options |= _options(given, Path(), problems)
    return _planned(table, options, problems)


def plan_text(text: str) -> Job:
    """Return the job that a text describes as JSON job files do; its paths are as they stand there.

    Raises:
        BatchInputError: With every mistake.
    """
    problems = _Problems()
    content = _parse_json(None, text)
    return _planned(None, _described(None, content, Path(), problems), problems)


def _planned(table: Path | None, options: dict[str, Any], problems: _Problems) -> Job:
    """Return the job of checked options.

    Raises:
        BatchInputError: With what is wrong with them, alone and together.
    """
    if problems.wrong:
        raise BatchInputError(table, problems.wrong)
    if "output_dir" not in options:
        raise BatchInputError(table, [(None, "no output folder is given; add --out, or output_dir to the job file")])
    job = Job.model_construct(**options)  # each is checked, and one out of range is still a sign of what was meant
    if found := [*problems.out_of_range, *_setting_problems(job), *_useless_options(job)]:
        raise BatchInputError(table, found)
    return job


@dataclass
class _Problems:
    """What is wrong with single options; only where none is of a wrong type can they be held against each other."""

    wrong: list[Problem] = field(default_factory=list)
    out_of_range: list[Problem] = field(default_factory=list)


def _read_job(path: Path, problems: _Problems) -> dict[str, object] | None:
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
    return _described(path, content, path.parent, problems)


def _described(path: Path | None, content: object, folder: Path, problems: _Problems) -> dict[str, object]:
    """Return the options in the content of a job file; relative paths start at `folder`."""
    if not isinstance(content, dict):
        found = "is empty" if content is None else "is not a job"
        raise BatchInputError(path, [(None, f"{found}; expected keys such as input_file and output_dir")])
    if isinstance(content, Repeated):
        problems.wrong += [(None, f"names {shown(name)} twice; keep one") for name in content.names]
    mode = content.pop("batch_mode", None)
    options = _options(content, folder, problems)
    if content.get("input_file") is None:
        problems.wrong.append((None, "has no input_file; name the table"))
    problems.wrong += _mode_problems(mode, options.get("input_file"))
    return options


def _parse_json(path: Path | None, text: str) -> object:
    try:
        return decode_json(text)
    except NotJsonError as error:
        raise BatchInputError(path, [error.problem]) from error


def _options(content: Mapping[str, object], folder: Path, problems: _Problems) -> dict[str, object]:
    """Return options as `Job` holds them; those that are no options, or of another type, are noted as problems."""
    found = {}
    if content.get("sift") == "grid":  # as on the command line: short for both
        from ernie_accel.fidelity.grid import VISIBLE

        limit = content.get("grid")
        content = {**content, "sift": True, "grid": VISIBLE if limit is None else limit}
    for name, value in content.items():
        if name not in OPTIONS:
            close = difflib.get_close_matches(name, OPTIONS, n=1) if len(name) < 100 else []
            hint = f"did you mean {close[0]!r}?" if close else f"valid: batch_mode, {', '.join(OPTIONS)}"
            problems.wrong.append((None, f"key {shown(name)} is unknown; {hint}"))
        elif value is not None:
            checked, reason = check_option(name, value)
            if reason is not None:
                where = problems.wrong if checked is None else problems.out_of_range
                where.append((None, f"{name} is {_shown_option(OPTIONS[name], value)}; {reason}"))
            if checked is not None:
                found[name] = folder / checked if isinstance(checked, Path) else checked
    return found


def _shown_option(option: Option, value: object) -> str:
    """Return an option's value for a message, without the credentials that it may hold."""
    if option.names.secret == "key":
        return "***"
    if option.names.secret is None:
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


def _setting_problems(job: Job) -> list[Problem]:
    """Return what is wrong with settings that only other parts of the package can judge."""
    problems: list[Problem] = []
    if job.endpoint or job.enhancer is not None:
        problems += _server_problems(job)
    if job.sampler is not None:
        from ernie_accel.transforms.scheduler.swap_scheduler import SwapScheduler  # here, because it loads torch

        try:
            SwapScheduler(job.sampler)
        except UnknownNameError as error:
            problems.append((None, f"sampler: {error}"))
    return problems


def _useless_options(job: Job) -> list[Problem]:
    """Return the options that would have no effect beside others, and not do what was meant: they are refused."""
    given = job.asked_for
    clashes: list[tuple[str, str]] = []
    if job.endpoint:
        reason = "has no effect with endpoint: the image servers hold the pipeline; start them with it, or leave it out"
        clashes += [(name, reason) for name in _OF_A_PIPELINE if name in given and getattr(job, name) != 0]
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
    if job.refine and job.grid is None:
        clashes.append(("refine", "has no effect without grid; give its threshold, such as 0.5"))
    if job.refine and job.endpoint:
        clashes.append(("refine", "has no effect with endpoint: image servers do not draw from pictures; leave it out"))
    if job.refine_model is not None and not job.refine:
        clashes.append(("refine_model", "has no effect without refine; add it, with the threshold of grid"))
    if job.refine_model is not None and job.ray_actors:
        reason = "has no effect with ray_actors: each would hold both models; leave out one of the two options"
        clashes.append(("refine_model", reason))
    if job.metrics_port is None and "metrics_host" in given:
        clashes.append(("metrics_host", "has no effect without metrics_port; name the port"))
    if not job.report:
        clashes += [
            (name, "has no effect without a report; leave out --no-report") for name in _OF_THE_REPORT if name in given
        ]
    elif job.watts is not None and job.power_price is None:
        clashes.append(("watts", "has no effect without power_price; give the price of a kWh"))
    return [(None, f"{name} {reason}") for name, reason in clashes]


def _mode_problems(mode: object, table: object) -> list[Problem]:
    if mode is None:
        return []
    if not isinstance(mode, str) or mode not in _MODES:
        return [(None, f"batch_mode is {shown(mode)}; expected one of {', '.join(_MODES)}")]
    if isinstance(table, Path) and table.suffix.lower() not in _MODES[mode]:
        name, expected = shown(table.name), " or ".join(_MODES[mode])
        return [(None, f"batch_mode is {mode!r}, but input_file is {name}; expected a name ending in {expected}")]
    return []

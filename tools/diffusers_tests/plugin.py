"""A pytest plugin that passes every pipeline a test makes through `optimize`, and writes down how each test ended.

``pytest -p diffusers_tests.plugin --results FILE [--optimize REQUEST]``; without a request the pipelines are stock.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

import ernie_accel

from .request import Wanted, parse

#: Of huggingface_hub and requests: something lies neither here nor can it be had.
_DOWNLOAD_ERRORS = {
    "ConnectionError",
    "ConnectError",
    "LocalEntryNotFoundError",
    "MaxRetryError",
    "OfflineModeIsEnabled",
    "ProxyError",
}
_DOWNLOAD_WORDS = ("outgoing traffic has been disabled", "couldn't connect to", "offline mode", "HF_HUB_OFFLINE")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ernie_accel")
    group.addoption("--optimize", default=None, help="a preset, or transforms as a plan prints them; default: stock")
    group.addoption("--results", default=None, help="write one line of JSON for each test to this file")
    group.addoption("--only", default=None, help="run only the tests whose ids this file lists")
    group.addoption("--skip", default=None, help="do not run the tests whose ids this file lists")


def pytest_configure(config: pytest.Config) -> None:
    request = config.getoption("--optimize")
    if request is not None:
        try:
            wanted = parse(request)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        config.pluginmanager.register(Optimizing(wanted), "ernie_accel_optimizing")
    if config.getoption("--results") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recording(Path(config.getoption("--results"))), "ernie_accel_recording")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--only"):
        wanted = set(Path(config.getoption("--only")).read_text().splitlines())
        items[:] = [item for item in items if item.nodeid in wanted]
    if config.getoption("--skip"):
        done = set(Path(config.getoption("--skip")).read_text().splitlines())
        items[:] = [item for item in items if item.nodeid not in done]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if call.excinfo is not None and lacks_a_download(call.excinfo.value):
        report.user_properties.append(("download", True))
    return report


def lacks_a_download(error: BaseException | None) -> bool:
    """Return whether `error`, or what caused it, is that something would have to be downloaded."""
    while error is not None:
        words = str(error)
        if {each.__name__ for each in type(error).__mro__} & _DOWNLOAD_ERRORS and not isinstance(error, AssertionError):
            return True
        if isinstance(error, (OSError, ValueError)) and any(each in words for each in _DOWNLOAD_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


class Optimizing:
    """Has every class of pipeline optimize its instances as soon as they are made.

    A test may then do with an optimized pipe all that it does with a new one: move, cast, save and load it, take its
    components, load adapters.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._made: Counter[str] = Counter()
        self._steps: set[str] = set()
        self._wrapped: set[type] = set()

    def pytest_sessionstart(self) -> None:
        def new(cls: type, *args: object, **kwargs: object) -> Any:
            self._wrap(cls)
            return object.__new__(cls)

        DiffusionPipeline.__new__ = new

    def _wrap(self, cls: Any) -> None:
        if cls in self._wrapped:
            return
        self._wrapped.add(cls)
        init = cls.__init__

        @functools.wraps(init)  # diffusers reads the names of the components from its signature
        def optimized(pipe: Any, *args: object, **kwargs: object) -> None:
            init(pipe, *args, **kwargs)
            if type(pipe) is cls:  # not while a class that derives from this one still makes its own
                self._optimize(pipe)

        cls.__init__ = optimized

    def _optimize(self, pipe: Any) -> None:
        self._made["pipes"] += 1
        ernie_accel.optimize(pipe, *self._wanted.transforms, preset=self._wanted.preset, on_unsupported="skip")
        if any(entry.applied is not None and entry.applied.changed for entry in ernie_accel.report(pipe).entries):
            self._made["changed"] += 1

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self._made.clear()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        report.user_properties += list(self._made.items())
        return report


class Recording:
    """Writes one line for each test; beside pytest-xdist it runs in the process that hands out the tests."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ended: dict[str, dict[str, Any]] = {}
        self._not_collected: set[str] = set()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        # Beside pytest-xdist every process collects all files, and hands on what it cannot import.
        if report.failed and report.nodeid not in self._not_collected:
            self._not_collected.add(report.nodeid)
            self._write({"test": report.nodeid, "outcome": "not collected", "reason": _last_line(report)})

    def _write(self, record: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ended = self._ended.setdefault(report.nodeid, {"test": report.nodeid, "outcome": "passed"})
        ended |= dict(report.user_properties)
        if report.outcome != "passed" and ended["outcome"] == "passed":
            ended["outcome"] = report.outcome if report.when == "call" or report.skipped else "error"
            ended["reason"] = _last_line(report)
        if report.when == "teardown":
            self._write(self._ended.pop(report.nodeid))


def _last_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr)[-2000:]

"""Say what stops a batch (bad input rows, an unusable folder or port), with every problem found in one message.

Messages quote what a file holds, and a file can hold anything: `shown` quotes a value, `tidy` bounds a whole message.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from ernie_accel.common.language import localized, said, say
from ernie_accel.core.errors import ErnieAccelError

Problem = tuple[int | None, str]
"""The 1-based line of the input file (None: the file as a whole), and what is wrong, with the fix."""

MAX_SHOWN = 100

_MAX_QUOTED, _MAX_MESSAGE = 80, 1000  # characters


def shown(value: object) -> str:
    """Return a value as messages quote it, cut where it is long."""
    if isinstance(value, str):
        return repr(value if len(value) <= _MAX_QUOTED else value[: _MAX_QUOTED - 3] + "...")
    try:
        text = reprlib.repr(value)
    except ValueError:  # a whole number of thousands of digits, which Python does not write out
        return "a number of thousands of digits"
    return text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + "..."


def listed(names: Iterable[object], most: int = 20) -> str:
    """Return names as messages list them: quoted, with commas, and a count of those beyond `most`."""
    names = list(names)
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def tidy(message: str) -> str:
    """Return a message on one line of bounded length, in which nothing can move a terminal's cursor.

    Doing it twice changes nothing.
    """
    if not message.isprintable():
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    if len(message) <= _MAX_MESSAGE:
        return message
    half = _MAX_MESSAGE // 2 - 5
    return f"{message[:half]} ... {message[-half:]}"  # the fix stands at the end


def _tidied(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    return tuple((line, tidy(text)) for line, text in problems)


class BatchInputError(ErnieAccelError, ValueError):
    """The rows cannot be used; nothing was rendered.

    Attributes:
        path: The input file; None for rows that did not come from one file.
        problems: Every problem found, as ``(line or None, message)``. The text shows 100.
    """

    def __init__(self, path: Path | None, problems: Sequence[Problem]) -> None:
        self.path = path
        self.problems = _tidied(problems)
        super().__init__(path, self.problems)  # these, not the text, so that the error survives pickling

    def __str__(self) -> str:
        """Return the heading, one line per problem, and what to do."""
        name = said("the rows") if self.path is None else f"'{tidy(str(self.path))}'"
        heading, ending = said("Cannot use {name}", name=name), said("Fix these and run again; nothing was rendered.")
        return _listing(heading, self.problems, ending)


class BatchOutputError(ErnieAccelError):
    """The output folder cannot take the pictures, or could not take one of them.

    Attributes:
        path: The output folder.
        problems: Every problem found, as ``(line of the row or None, message)``. The text shows 100.
    """

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        self.path = path
        self.problems = _tidied(problems)
        super().__init__(path, self.problems)

    def __str__(self) -> str:
        """Return the heading, one line per problem, and what stays true."""
        heading = said("Cannot write to '{path}'", path=tidy(str(self.path)))
        return _listing(heading, self.problems, said("No picture was left half-written."))


class BatchChangedError(ErnieAccelError):
    """A job cannot go on, because finished pictures were made from another input or with other settings.

    Attributes:
        path: The output folder.
        problems: Every change, as ``(line of the row or None, message)``. The text shows 100.
    """

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        self.path = path
        self.problems = _tidied(problems)
        super().__init__(path, self.problems)

    def __str__(self) -> str:
        """Return the heading, one line per change, and the ways out."""
        heading = said("Cannot resume the job in '{path}': it has changed", path=tidy(str(self.path)))
        fix = said("Change it back, choose another output, or allow overwriting: then what changed is made again.")
        return _listing(heading, self.problems, fix)


class QueueFullError(ErnieAccelError):
    """As many rows wait as a producer lets wait; what was submitted before is made.

    Attributes:
        waiting: Rows that wait for their batch.
        max_queue: How many may.
    """

    def __init__(self, waiting: int, max_queue: int) -> None:
        self.waiting, self.max_queue = waiting, max_queue
        super().__init__(waiting, max_queue)

    def __str__(self) -> str:
        """Return how many wait, and the ways out."""
        rows = "row waits" if self.waiting == 1 else "rows wait"
        return f"the queue is full: {self.waiting} {rows}, and max_queue is {self.max_queue}; submit it again later"


class WaitedTooLongError(ErnieAccelError, TimeoutError):
    """A row's batch was not begun in the time that the row was to wait at most; nothing was rendered.

    Attributes:
        wait_s: The seconds it was to wait.
    """

    def __init__(self, wait_s: float) -> None:
        self.wait_s = wait_s
        super().__init__(wait_s)

    def __str__(self) -> str:
        """Return what was exceeded, and the ways out."""
        waited = f"not begun within {self.wait_s:g} s (wait_s), and not made any more"
        return f"{waited}; submit it again, or let it wait longer"


class MetricsServerError(ErnieAccelError):
    """The metrics cannot be served at the address that was asked for.

    Attributes:
        host: The address to listen at.
        port: The port.
        reason: Why not, with the fix.
    """

    def __init__(self, host: str, port: int, reason: str) -> None:
        self.host, self.port, self.reason = host, port, reason
        super().__init__(host, port, reason)

    def __str__(self) -> str:
        """Return the address and the reason."""
        return f"Cannot serve metrics at {self.host}:{self.port}: {self.reason}"


def _listing(heading: str, problems: Sequence[Problem], ending: str) -> str:
    count = len(problems)
    lines = [
        say("{heading} (1 problem):", heading=heading)
        if count == 1
        else say("{heading} ({count} problems):", heading=heading, count=count)
    ]
    for line, text in problems[:MAX_SHOWN]:
        lines.append(f"  {'' if line is None else say('line {line}: ', line=line)}{localized(text)}")
    if count > MAX_SHOWN:
        lines.append(say("  ... and {count} more", count=count - MAX_SHOWN))
    return "\n".join([*lines, localized(ending)])

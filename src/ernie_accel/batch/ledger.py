"""Keep a job's ledger: which picture is pending, running, done, failed or rejected, whatever kills the process.

A picture is done when its file was renamed into place *and* the ledger says so, in this order. Between the two a
kill leaves a whole picture that the ledger calls running: the next run makes it again and replaces it in one step.
SQLite in exclusive mode is the job's lock as well: the system releases it when the process ends, however it ends.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ernie_accel.batch.errors import BatchChangedError, BatchOutputError, Problem
from ernie_accel.batch.task import Task

FINAL = ("done", "rejected")
"""The states of rows that need no work; of the others 'failed' rows are tried again by the next run."""

JOB_FOLDER = ".ernie-accel"
"""The folder inside the output folder that holds the ledger."""

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rows (
    path TEXT PRIMARY KEY,         -- relative to the output folder
    line INTEGER NOT NULL,         -- of the input
    fingerprint TEXT NOT NULL,     -- of the request
    request TEXT NOT NULL,         -- JSON
    columns TEXT NOT NULL,         -- JSON: the input's own columns
    state TEXT NOT NULL DEFAULT 'pending',
    seed TEXT,                     -- the one that made the picture; text: SQLite's integers end at 2**63
    error TEXT,
    bytes INTEGER,                 -- of the file
    seconds REAL,                  -- from the start of its batch to the finished file
    batch_size INTEGER,
    hash TEXT,                     -- perceptual, hexadecimal, for near-duplicates
    finished_at REAL               -- Unix time
);
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the ledger knows of one picture; the columns of its table, see there."""

    path: str
    line: int
    request: Mapping[str, object]
    columns: Mapping[str, str]
    state: str
    seed: int | None
    error: str | None
    bytes: int | None
    seconds: float | None
    batch_size: int | None
    hash: str | None
    finished_at: float | None


class Ledger:
    """The rows of one job and their states, in the output folder or, for a job nobody resumes, in memory."""

    @classmethod
    def exists(cls, out: Path) -> bool:
        """Return whether there is a ledger in the output folder `out`."""
        return (out / JOB_FOLDER / "ledger.sqlite").is_file()

    def __init__(self, out: Path, *, durable: bool = True) -> None:
        """Open the ledger of the output folder `out`, or create it, and lock the job.

        Raises:
            BatchOutputError: Another process is at work there, or the ledger cannot be written or read.
        """
        self._out = out
        self._path = out / JOB_FOLDER / "ledger.sqlite" if durable else None
        try:
            if self._path:
                self._path.parent.mkdir(exist_ok=True)
            # autocommit: every statement outside a `with self._db` block stands on its own
            self._db = sqlite3.connect(self._path or ":memory:", timeout=0, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise self._broken(error) from error
        try:
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(f"BEGIN EXCLUSIVE;{_SCHEMA}COMMIT;")
            self._check_version()
        except sqlite3.Error as error:
            self._db.close()
            raise self._broken(error) from error

    def begin(self, tasks: Sequence[Task], settings: Mapping[str, str], *, overwrite: bool) -> list[Task]:
        """Take a job's rows in, and return those that are still to be made, in their order.

        Args:
            tasks: Every row of the job, with distinct paths.
            settings: What changes pictures beside the rows: model, preset, engine.
            overwrite: Make changed rows again, and replace pictures that are not this job's.

        Raises:
            BatchChangedError: Finished pictures were made from other rows or settings, and `overwrite` is off.
            BatchOutputError: Pictures that are not this job's are in the way.
        """
        prints, changed_settings, changed, gone = self._compare(tasks, settings, overwrite)
        stale = {task.row.path for task in (tasks if changed_settings else changed)}
        self._store(tasks, prints, settings, stale, gone)
        states = {path: state for path, state, _ in self._states()}
        lost = self._lost_files()
        return [task for task in tasks if states[task.row.path] not in FINAL or task.row.path in lost]

    def check(self, tasks: Sequence[Task], settings: Mapping[str, str | None], *, overwrite: bool) -> bool:
        """Raise what `begin` would, and return whether it would leave anything to do; change nothing.

        Settings that are not named are taken to be as they were; those that are None, not to be any more.
        """
        assumed = {name: value for name, value in {**self.settings(), **settings}.items() if value is not None}
        _, changed_settings, changed, gone = self._compare(tasks, assumed, overwrite)
        final = {path for path, state, _ in self._states() if state in FINAL}
        return bool(changed_settings or changed or gone or final != {t.row.path for t in tasks} or self._lost_files())

    def _compare(
        self, tasks: Sequence[Task], settings: Mapping[str, str], overwrite: bool
    ) -> tuple[dict[str, str], list[str], list[Task], set[str]]:
        """Return the rows' fingerprints by path, what settings and which rows have changed, and which paths are gone.

        Raises:
            BatchChangedError: As `begin`.
            BatchOutputError: As `begin`.
        """
        known = {path: (state, fingerprint) for path, state, fingerprint in self._states()}
        prints = {task.row.path: task.fingerprint() for task in tasks}
        changed_settings = self._changed_settings(settings)
        changed = [t for t in tasks if t.row.path in known and known[t.row.path][1] != prints[t.row.path]]
        gone = known.keys() - prints.keys()
        if not overwrite:
            final = {path for path, (state, _) in known.items() if state in FINAL}
            self._refuse_changes(
                changed_settings if final else [], [t for t in changed if t.row.path in final], gone & final
            )
        self._refuse_foreign(tasks, known, overwrite)
        return prints, changed_settings, changed, gone

    def running(self, tasks: Iterable[Task]) -> None:
        """Note that the pictures are being made; from here on a file of their name is this job's."""
        self._update("UPDATE rows SET state='running' WHERE path=?", [(task.row.path,) for task in tasks])

    def pending(self, tasks: Iterable[Task]) -> None:
        """Note that the pictures are not being made any more, and were not."""
        self._update("UPDATE rows SET state='pending' WHERE path=?", [(task.row.path,) for task in tasks])

    def settle(self, entries: Sequence[Mapping[str, object]]) -> None:
        """Note what became of rows: mappings with `path`, `state` and the other columns of an `Entry`."""
        self._update(
            "UPDATE rows SET state=:state, seed=:seed, error=:error, bytes=:bytes, seconds=:seconds,"
            " batch_size=:batch_size, hash=:hash, finished_at=:finished_at WHERE path=:path",
            entries,
        )

    def entries(self) -> Iterator[Entry]:
        """Yield every row in the order of the input."""
        cursor = self._db.execute("SELECT * FROM rows ORDER BY rowid")
        names = [column[0] for column in cursor.description]
        kept = [(field.name, names.index(field.name)) for field in fields(Entry)]
        for values in cursor:
            known: dict[str, Any] = {name: values[place] for name, place in kept}
            known |= {name: json.loads(known[name]) for name in ("request", "columns")}
            known["seed"] = None if known["seed"] is None else int(known["seed"])
            yield Entry(**known)

    def hashes(self) -> Iterator[tuple[str, str]]:
        """Yield the perceptual hash and the path of every picture in its place that has one."""
        yield from self._db.execute("SELECT hash, path FROM rows WHERE state='done' AND hash IS NOT NULL")

    def column_names(self) -> list[str]:
        """Return the names of the input's own columns, in the order in which they appear."""
        names: dict[str, None] = {}
        for (columns,) in self._db.execute("SELECT columns FROM rows ORDER BY rowid"):
            names.update(dict.fromkeys(json.loads(columns)))
        return list(names)

    def counts(self) -> dict[str, int]:
        """Return the number of rows by state."""
        return dict(self._db.execute("SELECT state, count(*) FROM rows GROUP BY state"))

    def settings(self) -> dict[str, str]:
        """Return what the job was begun with."""
        return dict(self._db.execute("SELECT name, value FROM settings"))

    def close(self) -> None:
        """Close the ledger and release the job's lock."""
        self._db.close()

    def _check_version(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):  # 0: just created
            raise sqlite3.DatabaseError(f"it has format {version}; this release reads {_VERSION}")
        self._db.execute(f"PRAGMA user_version={_VERSION}")

    def _states(self) -> Iterator[tuple[str, str, str]]:
        yield from self._db.execute("SELECT path, state, fingerprint FROM rows")

    def _update(self, statement: str, rows: Sequence[Mapping[str, object]] | Sequence[tuple[str]]) -> None:
        if not rows:
            return
        try:
            with self._db:  # one transaction, so one fsync
                self._db.executemany(statement, rows)
        except sqlite3.Error as error:
            raise self._broken(error) from error

    def _store(
        self,
        tasks: Sequence[Task],
        prints: Mapping[str, str],
        settings: Mapping[str, str],
        stale: set[str],
        gone: Iterable[str],
    ) -> None:
        rows = (  # made as they are stored: their JSON is larger than the rows
            (path, t.row.line, prints[path], t.described(), json.dumps(dict(t.row.columns), ensure_ascii=False))
            for t in tasks
            for path in (t.row.path,)
        )
        try:
            with self._db:
                self._db.executemany("DELETE FROM rows WHERE path=?", [(path,) for path in gone])
                self._db.executemany(
                    "INSERT INTO rows (path, line, fingerprint, request, columns) VALUES (?, ?, ?, ?, ?)"
                    " ON CONFLICT(path) DO UPDATE SET line=excluded.line, fingerprint=excluded.fingerprint,"
                    " request=excluded.request, columns=excluded.columns",
                    rows,
                )
                # Their pictures exist and are this job's, to be replaced: as if they had been begun.
                self._db.executemany(
                    "UPDATE rows SET state='running' WHERE path=? AND state IN ('done', 'rejected')",
                    [(path,) for path in stale],
                )
                self._db.execute("DELETE FROM settings")
                self._db.executemany("INSERT INTO settings VALUES (?, ?)", settings.items())
        except sqlite3.Error as error:
            raise self._broken(error) from error

    def _changed_settings(self, settings: Mapping[str, str]) -> list[str]:
        before = self.settings()
        if not before:
            return []
        return [
            f"setting {name!r} was {before.get(name)!r} and is now {settings.get(name)!r}"
            for name in dict.fromkeys([*before, *settings])
            if before.get(name) != settings.get(name)
        ]

    def _refuse_changes(self, settings: Sequence[str], changed: Sequence[Task], gone: Iterable[str]) -> None:
        problems: list[Problem] = [(None, text) for text in settings]
        before = {entry.path: entry.request for entry in self.entries()} if changed else {}
        for task in changed:
            now = json.loads(task.described())
            old = before[task.row.path]
            what = "; ".join(f"{k} was {old.get(k)!r} and is now {now[k]!r}" for k in now if old.get(k) != now[k])
            problems.append((task.row.line, f"{task.row.path!r}: {what}"))
        problems += [(None, f"{path!r} is in the folder's ledger and no longer in the input") for path in sorted(gone)]
        if problems:
            raise BatchChangedError(self._out, problems)

    def _refuse_foreign(self, tasks: Sequence[Task], known: Mapping[str, tuple[str, str]], overwrite: bool) -> None:
        """Refuse pictures in the way, but for those that an earlier run of this job has made or begun."""
        problems: list[Problem] = []
        out = str(self._out)
        for task in tasks:
            path = task.row.path
            if (mode := _mode(os.path.join(out, path))) is None:  # noqa: PTH118  # a Path takes longer than the look
                continue
            if stat.S_ISDIR(mode):
                problems.append((task.row.line, f"{path!r} is a folder; move it or choose another output"))
            elif not overwrite and known.get(path, ("pending",))[0] == "pending":
                problems.append((task.row.line, f"{path!r} exists; allow overwriting or choose another output"))
        if problems:
            raise BatchOutputError(self._out, problems)

    def _lost_files(self) -> set[str]:
        """Return the paths of pictures that the ledger calls done and the folder does not hold as they were."""
        out = str(self._out)
        done = self._db.execute("SELECT path, bytes FROM rows WHERE state='done'")
        return {path for path, size in done if _file_size(os.path.join(out, path)) != size}  # noqa: PTH118

    def _broken(self, error: Exception) -> BatchOutputError:
        if "locked" in str(error):
            reason = "another process is at work on this job; wait for it, or choose another output"
        else:
            reason = (
                f"the job's ledger {JOB_FOLDER}/ledger.sqlite cannot be used ({error}); free space, or move it away"
            )
        return BatchOutputError(self._out, [(None, reason)])


def _mode(path: str) -> int | None:
    """Return the mode of what has this name, a link's own if it is one; None if there is nothing."""
    try:
        return os.lstat(path).st_mode
    except OSError:
        return None


def _file_size(path: str) -> int | None:
    """Return the size of a file, at the end of a link if it is one; None if there is no such file."""
    try:
        found = os.stat(path)  # noqa: PTH116  # as above
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None

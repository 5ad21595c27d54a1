"""Keep a job's ledger: which picture is pending, running, done, failed or rejected, whatever kills the process.

A picture is done when its file was renamed into place *and* the ledger says so, in this order. Between the two a
kill leaves a whole picture that the ledger calls running: the next run makes it again and replaces it in one step.
SQLite in exclusive mode is the job's lock as well: the system releases it when the process ends, however it ends.

A ledger can be damaged, or be another file altogether: each row carries a checksum, and what does not fit is refused.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ernie_accel.batch.errors import BatchChangedError, BatchOutputError, Problem
from ernie_accel.batch.input.naming import JOB_FILES, JOB_FOLDER, REJECTED_FOLDER
from ernie_accel.batch.input.task import Task
from ernie_accel.batch.output.folder import OutputFolder, is_link

FINAL = ("done", "rejected")
"""The states of rows that need no work; of the others 'failed' rows are tried again by the next run."""

REJECTED = "rejected: "
"""How the errors of pictures that were sifted out begin."""

MANIFESTS = ("manifest.jsonl", "manifest.csv")
"""The files that every job with a ledger writes beside its pictures."""

_FILE = f"{JOB_FOLDER}/ledger.sqlite"
_OPENED = (_FILE, f"{_FILE}-wal")  # what SQLite writes to
_VERSION = 2  # 1: without checksums, and without the digests of the job's own files
_ROWS = {  # the columns of the table of rows, with their types
    "path": "TEXT PRIMARY KEY",  # relative to the output folder
    "line": "INTEGER NOT NULL",  # of the input
    "fingerprint": "TEXT NOT NULL",  # of the request
    "request": "TEXT NOT NULL",  # JSON
    "columns": "TEXT NOT NULL",  # JSON: the input's own columns
    "state": "TEXT NOT NULL DEFAULT 'pending'",
    "seed": "TEXT",  # the one that made the picture; text: SQLite's integers end at 2**63
    "error": "TEXT",
    "bytes": "INTEGER",  # of the file
    "seconds": "REAL",  # from the start of its batch to the finished file
    "batch_size": "INTEGER",
    "hash": "TEXT",  # perceptual, hexadecimal, for near-duplicates
    "finished_at": "REAL",  # Unix time
    "place": "INTEGER",  # in the input: rows are added in the middle, too
}
_INDEX = "CREATE INDEX places ON rows (place)"  # or all rows would be sorted in memory to be listed
_FILES_TABLE = "CREATE TABLE files (name TEXT, digest TEXT, PRIMARY KEY (name, digest))"  # that the job wrote: SHA-256
_SCHEMA = (
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    f"CREATE TABLE rows ({', '.join(f'{name} {kind}' for name, kind in _ROWS.items())}, checksum INTEGER)",
    _FILES_TABLE,
    _INDEX,
)
_COLUMNS = {"settings": ("name", "value"), "rows": (*_ROWS, "checksum"), "files": ("name", "digest")}
# How SQLite's messages begin that are not about damage.
_NOT_DAMAGED = ("database or disk is full", "disk I/O error", "unable to open", "attempt to write a readonly")


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
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
    """The rows of one job and their states, in the output folder or, for a job nobody resumes, in memory.

    Attributes:
        durable: Whether it is in the folder.
    """

    @classmethod
    def exists(cls, folder: OutputFolder) -> bool:
        """Return whether there is a ledger, or anything in its place, in an output folder."""
        return folder.status(_FILE) is not None

    def __init__(self, folder: OutputFolder, *, durable: bool = True) -> None:
        """Say where the ledger is; `open` opens it.

        These are two steps so that whoever is interrupted between them has already seen to it that it will be closed: a
        ledger left open would lock the job.
        """
        self._folder = folder
        self.durable = durable
        self._overwrite = False
        self._identities: dict[str, tuple[int, int]] = {}
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open the ledger, or create it, and lock the job.

        Raises:
            BatchOutputError: Another process is at work there, the ledger cannot be written or read, or it is damaged.
        """
        try:
            if self.durable:
                if problems := _job_folder_problems(self._folder):
                    raise BatchOutputError(self._folder.path, problems)
                self._folder.append(_FILE, b"")  # not by SQLite, which would follow a link
            path = self._folder.absolute(_FILE) if self.durable else ":memory:"
            # autocommit: every statement outside a `with self._db` block stands on its own
            self._connection = sqlite3.connect(path, timeout=0, check_same_thread=False)
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise self._broken(error) from error

    def begin(
        self, tasks: Sequence[Task], settings: Mapping[str, str], *, overwrite: bool, files: Iterable[str] = MANIFESTS
    ) -> list[Task]:
        """Take a job's rows in, and return those that are still to be made, in their order.

        Args:
            tasks: Every row of the job, with distinct paths.
            settings: What changes pictures beside the rows: model, preset, engine.
            overwrite: Make changed rows again, and replace files that are not this job's.
            files: The names of what will be written beside the pictures, if the ledger is durable.

        Raises:
            BatchChangedError: Finished pictures were made from other rows or settings, and `overwrite` is off.
            BatchOutputError: Files that are not this job's, or links, are in the way.
        """
        written = files if self.durable else ()
        prints, changed_settings, changed, gone = self._compare(tasks, settings, overwrite, written)
        self._overwrite = overwrite
        stale = {task.row.path for task in (tasks if changed_settings else changed)}
        self._store(tasks, prints, settings, stale, gone)
        self.disclaim_lost()
        states = {path: state for path, state, _ in self._states()}
        return [task for task in tasks if states[task.row.path] not in FINAL]

    def check(
        self,
        tasks: Sequence[Task],
        settings: Mapping[str, str | None],
        *,
        overwrite: bool,
        files: Iterable[str] = MANIFESTS,
    ) -> bool:
        """Raise what `begin` would, and return whether it would leave anything to do; change nothing.

        Settings that are not named are taken to be as they were; those that are None, not to be any more.
        """
        assumed = {name: value for name, value in {**self.settings(), **settings}.items() if value is not None}
        _, changed_settings, changed, gone = self._compare(tasks, assumed, overwrite, files)
        final = {path for path, state, _ in self._states() if state in FINAL}
        return bool(changed_settings or changed or gone or final != {t.row.path for t in tasks} or self._lost_files())

    def disclaim_lost(self) -> list[str]:
        """Call no picture done that the folder does not hold as it was made; return the paths of those that were."""
        lost = sorted(self._lost_files())
        # Not pending: what is there is this job's, to be replaced.
        self._update(_to_state("running"), [(path,) for path in lost])
        return lost

    def write(self, name: str, data: bytes, *, overwrite: bool = False) -> None:
        """Write one of the job's own files, such as its manifest, so that later runs know that it is theirs.

        Args:
            name: Directly in the output folder.
            data: All that it will hold.
            overwrite: Replace a file that is not this job's, or was changed; so do jobs begun with `overwrite`.

        Raises:
            BatchOutputError: It cannot be written, or such a file is in its place.
        """
        if problems := self._foreign_files([name], overwrite or self._overwrite):
            raise BatchOutputError(self._folder.path, problems)
        digest = hashlib.sha256(data).hexdigest()
        # Before the file, so that a kill after it leaves none that is unknown; the old one is known until then.
        self._update("INSERT OR IGNORE INTO files VALUES (?, ?)", [(name, digest)])
        try:
            self._folder.write(name, data)
        except OSError as error:
            reason = f"{name!r} could not be written: {error.strerror or error}; the pictures are not affected"
            raise BatchOutputError(self._folder.path, [(None, reason)]) from error
        self._update("DELETE FROM files WHERE name=? AND digest<>?", [(name, digest)])

    def _compare(
        self, tasks: Sequence[Task], settings: Mapping[str, str], overwrite: bool, files: Iterable[str]
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
        self._refuse_foreign(tasks, known, overwrite, files)
        return prints, changed_settings, changed, gone

    def running(self, tasks: Iterable[Task]) -> None:
        """Note that the pictures are being made; from here on a file of their name is this job's."""
        self._update(_to_state("running"), [(t.row.path,) for t in tasks])

    def pending(self, tasks: Iterable[Task]) -> None:
        """Note that the pictures are not being made any more, and were not."""
        self._update(_to_state("pending"), [(t.row.path,) for t in tasks])

    def settle(self, entries: Sequence[Mapping[str, object]]) -> None:
        """Note what became of rows: mappings with `path`, `state` and the other columns of a `LedgerEntry`."""
        settled = ("state", "seed", "error", "bytes", "seconds", "batch_size", "hash", "finished_at")
        self._update(f"UPDATE rows SET {_changed(**{name: f':{name}' for name in settled})} WHERE path=:path", entries)

    def entries(self) -> Iterator[LedgerEntry]:
        """Yield every row in the order of the input."""
        names = [field.name for field in fields(LedgerEntry)]
        for values in self._select(f"SELECT {', '.join(names)} FROM rows ORDER BY place"):
            known: dict[str, Any] = dict(zip(names, values, strict=True))
            known |= {name: self._json(known[name]) for name in ("request", "columns")}
            known["seed"] = None if known["seed"] is None else int(known["seed"])
            yield LedgerEntry(**known)

    def hashes(self) -> Iterator[tuple[str, str]]:
        """Yield the perceptual hash and the path of every picture in its place that has one."""
        yield from self._select("SELECT hash, path FROM rows WHERE state='done' AND hash IS NOT NULL")

    def column_names(self) -> list[str]:
        """Return the names of the input's own columns, in the order in which they appear."""
        names: dict[str, None] = {}
        for (columns,) in self._select("SELECT columns FROM rows ORDER BY place"):
            names.update(dict.fromkeys(self._json(columns)))
        return list(names)

    def counts(self) -> dict[str, int]:
        """Return the number of rows by state."""
        return dict(self._select("SELECT state, count(*) FROM rows GROUP BY state"))

    def settings(self) -> dict[str, str]:
        """Return what the job was begun with."""
        return dict(self._select("SELECT name, value FROM settings"))

    def close(self) -> None:
        """Close the ledger and release the job's lock; nothing happens if it is not open."""
        if self._connection is not None:
            self._connection.close()

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise RuntimeError("the ledger is not open")
        return self._connection

    def _prepare(self) -> None:
        """Lock the ledger, make its tables if it is new, and check them if it is not."""
        # Not a function in Python: SQLite would turn Ctrl-C in it into an error, as if the ledger were damaged.
        self._db.create_function("crc32", 1, zlib.crc32, deterministic=True)
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        with self._db:
            self._db.execute("BEGIN EXCLUSIVE")
            for (found,) in self._db.execute("PRAGMA quick_check(1)"):
                if found != "ok":
                    raise sqlite3.DatabaseError(found)
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            new = not version and not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if not new and version not in (1, _VERSION):
                reads = f"this release reads {_VERSION}" if version else "it is another program's database"
                raise sqlite3.DatabaseError(f"it has format {version}; {reads}")
            if new:
                for statement in _SCHEMA:
                    self._db.execute(statement)
            elif version == 1:
                self._renew()
            self._check_rows()
            self._db.execute(f"PRAGMA user_version={_VERSION}")  # in one transaction with the tables
        if self.durable:
            self._identities = {name: (s.st_dev, s.st_ino) for name in _OPENED if (s := self._folder.status(name))}

    def _renew(self) -> None:
        """Bring a ledger of format 1 to the present one; the files that such a job has written become known."""
        self._check_columns({"settings": _COLUMNS["settings"], "rows": tuple(_ROWS)[:-1]})
        for column in ("place", "checksum"):
            self._db.execute(f"ALTER TABLE rows ADD COLUMN {column} INTEGER")
        self._db.execute(f"UPDATE rows SET {_changed(place='rowid')}")
        self._db.execute(_FILES_TABLE)
        self._db.execute(_INDEX)
        known = [(name, digest) for name in JOB_FILES if (digest := self._folder.digest(name)) is not None]
        self._db.executemany("INSERT INTO files VALUES (?, ?)", known)

    def _check_rows(self) -> None:
        self._check_columns(_COLUMNS)
        for (number,) in self._db.execute(f"SELECT rowid FROM rows WHERE checksum IS NOT {_checksum()} LIMIT 1"):
            raise sqlite3.DatabaseError(f"the checksum of row {number} does not match")

    def _check_columns(self, expected: Mapping[str, tuple[str, ...]]) -> None:
        for table, columns in expected.items():
            found = tuple(name for _, name, *_ in self._db.execute(f"PRAGMA table_info({table})"))
            if found != columns:
                raise sqlite3.DatabaseError(f"its table {table!r} is missing, or has other columns")

    def _states(self) -> Iterator[tuple[str, str, str]]:
        yield from self._select("SELECT path, state, fingerprint FROM rows")

    def _select(self, statement: str) -> Iterator[tuple[Any, ...]]:
        try:
            for row in self._db.execute(statement):  # noqa: UP028  # would close the cursor, which a closed ledger refuses
                yield row
        except sqlite3.Error as error:
            raise self._broken(error) from error

    def _json(self, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise self._broken(error) from error

    def _update(self, statement: str, rows: Sequence[Mapping[str, object]] | Sequence[tuple[str, ...]]) -> None:
        if not rows:
            return
        with self._writing():
            self._db.executemany(statement, rows)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Make what follows one transaction, so one fsync, in a ledger that is still the job's."""
        try:
            with self._db:
                yield
        except sqlite3.Error as error:
            raise self._broken(error) from error
        # SQLite does not notice: it writes on into what was deleted.
        for name, identity in self._identities.items():
            found = self._folder.status(name)
            if found is None or (found.st_dev, found.st_ino) != identity:
                gone = self._folder.problem() or (
                    f"the job's ledger {name} was deleted or replaced while the job ran; put it back, or allow "
                    "overwriting: then everything is made again"
                )
                raise BatchOutputError(self._folder.path, [(None, gone)])

    def _store(
        self,
        tasks: Sequence[Task],
        prints: Mapping[str, str],
        settings: Mapping[str, str],
        stale: set[str],
        gone: Iterable[str],
    ) -> None:
        new = {**dict.fromkeys(_ROWS, "NULL"), "state": "'pending'"}
        given = ("path", "line", "fingerprint", "request", "columns", "place")
        new |= {name: f"?{number}" for number, name in enumerate(given, 1)}
        rows = (  # made as they are stored: their JSON is larger than the rows
            (path, t.row.line, prints[path], t.described(), _json_of(t.row.columns), place)
            for place, t in enumerate(tasks)
            for path in (t.row.path,)
        )
        with self._writing():
            self._db.executemany("DELETE FROM rows WHERE path=?", [(path,) for path in gone])
            self._db.executemany(
                f"INSERT INTO rows ({', '.join(new)}, checksum) VALUES ({', '.join(new.values())}, {_checksum(**new)})"
                f" ON CONFLICT(path) DO UPDATE SET {_changed(**{name: f'excluded.{name}' for name in given[1:]})}",
                rows,
            )
            # Their pictures exist and are this job's, to be replaced: as if they had been begun.
            self._db.executemany(
                _to_state("running") + " AND state IN ('done', 'rejected')",
                [(path,) for path in stale],
            )
            self._db.execute("DELETE FROM settings")
            self._db.executemany("INSERT INTO settings VALUES (?, ?)", settings.items())

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
            raise BatchChangedError(self._folder.path, problems)

    def _refuse_foreign(
        self,
        tasks: Sequence[Task],
        known: Mapping[str, tuple[str, str]],
        overwrite: bool,
        files: Iterable[str],
    ) -> None:
        """Refuse what is in the way, but for the files that an earlier run of this job has made or begun."""
        folders = dict.fromkeys(task.row.folder for task in tasks if task.row.folder)
        problems = _job_folder_problems(self._folder)
        problems += self._folder.link_problems([*folders, *self._folder.folders_inside(REJECTED_FOLDER)])
        for task in tasks:
            path = task.row.path
            if (found := self._folder.status(path)) is None:
                continue
            if stat.S_ISDIR(found.st_mode):
                problems.append((task.row.line, f"{path!r} is a folder; move it or choose another output"))
            elif not overwrite and known.get(path, ("pending",))[0] == "pending":
                problems.append((task.row.line, f"{path!r} exists; allow overwriting or choose another output"))
        problems += self._foreign_files(files, overwrite)
        if problems:
            raise BatchOutputError(self._folder.path, problems)

    def _foreign_files(self, names: Iterable[str], overwrite: bool) -> list[Problem]:
        """Return which of the job's own files are in truth somebody else's, or were changed by somebody."""
        ours = set(self._select("SELECT name, digest FROM files"))
        problems: list[Problem] = []
        for name in names:
            if (found := self._folder.status(name)) is None:
                continue
            if stat.S_ISDIR(found.st_mode):
                problems.append((None, f"{name!r} is a folder; move it or choose another output"))
            elif not overwrite and (name, self._folder.digest(name)) not in ours:
                reason = "exists, and is not as this job wrote it"
                problems.append((None, f"{name!r} {reason}; move it, allow overwriting or choose another output"))
        return problems

    def _lost_files(self) -> set[str]:
        """Return the paths of pictures that the ledger calls done and the folder does not hold as they were."""
        done = self._select("SELECT path, bytes FROM rows WHERE state='done'")
        return {path for path, size in done if self._folder.size(path) != size}

    def _broken(self, error: Exception) -> BatchOutputError:
        text = getattr(error, "strerror", None) or str(error)
        if isinstance(error, sqlite3.Error) and "locked" in text:
            reason = "another process is working on this job; wait for it, or choose another output"
        elif isinstance(error, OSError) or text.startswith(_NOT_DAMAGED):
            fix = "free space, allow writing there, or choose another output"
            reason = f"the job's ledger {_FILE} cannot be used ({text}); {fix}"
        else:
            fix = "move it away and allow overwriting: then everything is made again; or choose another output"
            reason = f"the job's ledger {_FILE} cannot be used ({text}); {fix}"
        return BatchOutputError(self._folder.path, [(None, reason)])


@contextmanager
def open_job(out: Path, *, durable: bool | None = True) -> Iterator[tuple[OutputFolder, Ledger]]:
    """Open a job's folder and its ledger.

    Args:
        out: The output folder.
        durable: Whether the ledger is in that folder; None: if there is one.

    Raises:
        BatchOutputError: There is no such folder, or the ledger cannot be opened, see there.
    """
    with ExitStack() as closing:
        folder = OutputFolder(out)
        closing.callback(folder.close)
        ledger = Ledger(folder, durable=Ledger.exists(folder) if durable is None else durable)
        closing.callback(ledger.close)
        ledger.open()
        yield folder, ledger


def _job_folder_problems(folder: OutputFolder) -> list[Problem]:
    """Return which parts of a job's own folder are links, or no files."""
    problems = folder.link_problems([JOB_FOLDER])
    names = (_FILE, *(f"{_FILE}-{end}" for end in ("wal", "shm", "journal")), f"{JOB_FOLDER}/runs.jsonl")
    for name in () if problems else names:
        if (found := folder.status(name)) is not None and not stat.S_ISREG(found.st_mode):
            what = "a link, which can lead out of the folder" if is_link(found) else "not a file"
            problems.append((None, f"{name!r} is {what}; move it away, or choose another output"))
    return problems


def _json_of(columns: Mapping[str, str]) -> str:
    return json.dumps(dict(columns), ensure_ascii=False)


def _to_state(state: str) -> str:
    return f"UPDATE rows SET {_changed(state=repr(state))} WHERE path=?"


def _changed(**values: str) -> str:
    """Return what goes behind SET in SQL to change columns of a row to SQL expressions, and its checksum with them."""
    stored = {name: f"CAST({value} AS {_ROWS[name].split()[0]})" for name, value in values.items()}
    return ", ".join([*(f"{name}={value}" for name, value in stored.items()), f"checksum={_checksum(**stored)}"])


def _checksum(**values: str) -> str:
    """Return the SQL expression of a row's checksum; columns that are not given are as they are."""
    # Seconds as whole microseconds: how SQLite writes fractions as text has changed between its releases.
    parts = [
        f"CAST({values.get(name, name)} * 1e6 AS INTEGER)" if kind == "REAL" else values.get(name, name)
        for name, kind in _ROWS.items()
    ]
    text = " || char(31) || ".join(f"ifnull({part}, char(30))" for part in parts)
    return f"crc32(CAST({text} AS BLOB))"

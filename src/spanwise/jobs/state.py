"""The state file of a job: what has come, and how far the output is written. SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from spanwise.errors import InputError, SpanwiseError

_TABLES = """
CREATE TABLE IF NOT EXISTS job (
    identity TEXT NOT NULL, next_index INTEGER NOT NULL, num_errors INTEGER NOT NULL,
    output_bytes INTEGER NOT NULL, error_bytes INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS waiting (
    item INTEGER PRIMARY KEY, is_error INTEGER NOT NULL, line BLOB NOT NULL
);
"""


class Row(NamedTuple):
    """What came of an item: a line of the output or of the error file."""

    is_error: bool
    line: bytes


class Written(NamedTuple):
    """How far the files are written: all items before ``next_index`` stand in one of them.

    ``output_bytes``, ``error_bytes``: the lengths of the files at that moment.
    """

    next_index: int = 0
    num_errors: int = 0
    output_bytes: int = 0
    error_bytes: int = 0


class StateFile:
    """Owned by one process at a time; whatever kills it leaves the last commit.

    Rows that have come before those ahead of them wait here. Raises InputError where another
    process works on it, or it is no state file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=0)
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")  # until this process ends
            self._db.execute("PRAGMA journal_mode=WAL")
            # The files are on the disk before the state says so: a lost commit loses no line.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("BEGIN EXCLUSIVE")
            for statement in filter(str.strip, _TABLES.split(";")):
                self._db.execute(statement)
            self._db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: sqlite3.DatabaseError) -> InputError:
        if "locked" in str(error):
            return InputError(f"another process works on this job ({self.path}); wait for its end")
        if isinstance(error, sqlite3.OperationalError):
            return InputError(f"the state file {self.path} cannot be written: {error}")
        return InputError(f"{self.path} is no state file ({error}); remove it, or move it away")

    @property
    def identity(self) -> dict[str, str] | None:
        """What the job was begun with; None where none was."""
        found = self._db.execute("SELECT identity FROM job").fetchone()
        return None if found is None else msgspec.json.decode(found[0], type=dict[str, str])

    @property
    def written(self) -> Written:
        """How far the files were written at the last commit."""
        columns = ", ".join(Written._fields)
        return Written(*self._db.execute(f"SELECT {columns} FROM job").fetchone())

    def begin(self, identity: Mapping[str, str]) -> None:
        """Forget everything and begin a job."""
        text = msgspec.json.encode(dict(identity), order="sorted").decode()
        with self._transaction():
            self._db.execute("DELETE FROM job")
            self._db.execute("DELETE FROM waiting")
            self._db.execute("INSERT INTO job VALUES (?, 0, 0, 0, 0)", (text,))

    def waiting(self) -> set[int]:
        """The items whose rows wait here."""
        return {item for (item,) in self._db.execute("SELECT item FROM waiting")}

    def num_waiting_errors(self) -> int:
        """How many of them are errors."""
        query = "SELECT count(*) FROM waiting WHERE is_error"
        return int(self._db.execute(query).fetchone()[0])

    def row(self, item: int) -> Row:
        """The row of an item that waits."""
        query = "SELECT is_error, line FROM waiting WHERE item = ?"
        is_error, line = self._db.execute(query, (item,)).fetchone()
        return Row(bool(is_error), line)

    def commit(self, rows: Iterable[tuple[int, Row]], written: Written) -> None:
        """Keep rows that have to wait, and say how far the files are written: both or neither."""
        new = ((item, row.is_error, row.line) for item, row in rows)
        changes = ", ".join(f"{name} = ?" for name in Written._fields)
        with self._transaction():
            self._db.executemany("INSERT INTO waiting VALUES (?, ?, ?)", new)
            self._db.execute("DELETE FROM waiting WHERE item < ?", (written.next_index,))
            self._db.execute(f"UPDATE job SET {changes}", written)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of the block or nothing. Raises SpanwiseError where it cannot be written."""
        try:
            self._db.execute("BEGIN")
            with self._db:  # commits, or rolls back
                yield
        except sqlite3.OperationalError as error:
            raise SpanwiseError(
                f"the state file {self.path} cannot be written: {error}; mend that, then run again"
            ) from error

    def close(self) -> None:
        """Let it go; another process may take it."""
        self._db.close()

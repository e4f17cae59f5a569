"""The output and the error file of a job: written in input order, each item once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from spanwise.errors import InputError
from spanwise.jobs.state import Row, StateFile, Written

_PIECE_BYTES = 1 << 20


class Results:
    """Takes what came of items, in any order; a state file beside the output keeps it.

    ``flush`` makes what has come survive any end. What is in the files beyond the last flush is
    cut off when the job goes on. An error file is there only where there are errors.

    Args:
        output: the output's path; ``OUTPUT.errors.jsonl`` and ``OUTPUT.state.sqlite`` go beside it.
        identity: what makes it this job and no other, by name.
        restart: begin anew, whatever is there.

    Raises InputError for a state of another job, and for files that no job left there.
    """

    def __init__(self, output: Path, identity: Mapping[str, str], *, restart: bool = False) -> None:
        self.output = output
        self.errors = output.with_name(f"{output.name}.errors.jsonl")
        self._check_place()
        self._state = StateFile(output.with_name(f"{output.name}.state.sqlite"))
        try:
            self._begin(identity, restart)
            self._written = self._state.written
            self._output = self._opened(self.output, self._written.output_bytes)
            self._errors = self._opened_errors()
        except BaseException:
            self._state.close()
            raise
        self._new: dict[int, Row] = {}
        self._new_bytes = 0
        self._kept = self._state.waiting()
        self._num_errors = self._written.num_errors + self._state.num_waiting_errors()

    @property
    def written(self) -> Written:
        """How far the files are written."""
        return self._written

    @property
    def num_done(self) -> int:
        """Items of which is known what came, written or not."""
        return self._written.next_index + len(self._kept) + len(self._new)

    @property
    def num_errors(self) -> int:
        """Those of them that are errors."""
        return self._num_errors

    @property
    def unsaved_bytes(self) -> int:
        """What the next flush will save."""
        return self._new_bytes

    def is_done(self, index: int) -> bool:
        """Whether it is known what came of an item."""
        return index < self._written.next_index or index in self._kept or index in self._new

    def add(self, index: int, row: Row) -> None:
        """Take what came of an item that is not done."""
        assert not self.is_done(index), index
        self._new[index] = row
        self._new_bytes += len(row.line)
        self._num_errors += row.is_error

    def flush(self) -> None:
        """Write what is next in order, keep the rest in the state file."""
        if not self._new:
            return
        written = self._write_next()
        os.fsync(self._output)
        if self._errors is not None:
            os.fsync(self._errors)
        rows = {index: row for index, row in self._new.items() if index >= written.next_index}
        self._state.commit(rows.items(), written)
        self._kept = {index for index in self._kept if index >= written.next_index} | rows.keys()
        self._written, self._new, self._new_bytes = written, {}, 0

    def close(self) -> None:
        """Save what has come and let the files go."""
        self.flush()
        os.close(self._output)
        if self._errors is not None:
            os.close(self._errors)
        self._state.close()

    # -- beginning -------------------------------------------------------------------------------

    def _check_place(self) -> None:
        if not self.output.parent.is_dir():
            raise InputError(f"there is no folder {self.output.parent} for the output; make it")
        if self.output.exists() and not self.output.is_file():
            raise InputError(f"the output {self.output} is no file; give a file's name")

    def _begin(self, identity: Mapping[str, str], restart: bool) -> None:
        known = self._state.identity
        if restart:
            self._state.begin(identity)
        elif known is None:
            self._refuse_strangers()
            self._state.begin(identity)
        elif known != dict(identity):
            raise InputError(self._other_job(known, identity))

    def _refuse_strangers(self) -> None:
        for path in (self.output, self.errors):
            if path.exists():
                raise InputError(
                    f"{path} is there, and no job left it; give another --output, or --restart to "
                    "overwrite it"
                )

    def _other_job(self, known: Mapping[str, str], wanted: Mapping[str, str]) -> str:
        names = [name for name in (*wanted, *known) if known.get(name) != wanted.get(name)]
        before, now = known.get(names[0], "not given"), wanted.get(names[0], "not given")
        return (
            f"{self._state.path} belongs to a job with another {names[0]} ({before}; now {now}); "
            "give another --output, or --restart to begin anew"
        )

    def _opened(self, path: Path, length: int) -> int:
        """Open, cut to a length that the state knows."""
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(f"the output {path} cannot be written: {error.strerror}") from error
        if (found := os.fstat(file).st_size) < length:
            os.close(file)
            raise InputError(
                f"{path} has {found} bytes, and the job had written {length}; put it back, or "
                "begin anew with --restart"
            )
        os.truncate(file, length)
        return file

    def _opened_errors(self) -> int | None:
        if self._written.error_bytes:
            return self._opened(self.errors, self._written.error_bytes)
        self.errors.unlink(missing_ok=True)
        return None

    # -- writing ---------------------------------------------------------------------------------

    def _write_next(self) -> Written:
        """Write the rows that are next in order, and give how far that is.

        All at places that follow from the last commit: who fails here may try again.
        """
        written, lines, errors = self._written, bytearray(), bytearray()
        while (row := self._row(written.next_index)) is not None:
            (errors if row.is_error else lines).extend(row.line)
            written = _after(written, row)
            if len(lines) + len(errors) >= _PIECE_BYTES:
                self._write(lines, errors, written)
                lines, errors = bytearray(), bytearray()
        self._write(lines, errors, written)
        return written

    def _row(self, index: int) -> Row | None:
        if index in self._new:
            return self._new[index]
        return self._state.row(index) if index in self._kept else None

    def _write(self, lines: bytearray, errors: bytearray, written: Written) -> None:
        """Write lines that end where ``written`` says."""
        _write_at(self._output, lines, written.output_bytes - len(lines))
        if errors:
            if self._errors is None:
                self._errors = self._opened(self.errors, 0)
            _write_at(self._errors, errors, written.error_bytes - len(errors))


def _after(written: Written, row: Row) -> Written:
    if row.is_error:
        return written._replace(
            next_index=written.next_index + 1,
            num_errors=written.num_errors + 1,
            error_bytes=written.error_bytes + len(row.line),
        )
    return written._replace(
        next_index=written.next_index + 1, output_bytes=written.output_bytes + len(row.line)
    )


def _write_at(file: int, data: bytearray, offset: int) -> None:
    view = memoryview(data)
    while view:
        num_written = os.pwrite(file, view, offset)
        view, offset = view[num_written:], offset + num_written

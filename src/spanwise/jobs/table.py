"""A table: CSV or parquet, of which some columns are wanted."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spanwise.errors import InputError
from spanwise.jobs.extras import optional_module
from spanwise.jobs.item import Extent, Item

_CHUNK_BYTES = 1 << 20
_CHUNK_ROWS = 1024
TABLES = (".csv", ".parquet")


class Table:
    """The wanted columns of every row, as a tuple: texts where the file is CSV.

    The first row of a CSV file names its columns.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path, self._columns = path, tuple(columns)
        self._is_csv = path.suffix.lower() == ".csv"

    def extent(self) -> Extent:
        """See ``Source``."""
        digest = hashlib.sha256()
        try:
            with self._path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
            return Extent(sum(1 for _ in self._rows()), digest.hexdigest())
        except OSError as error:
            raise InputError(f"the input {self._path} cannot be read: {error.strerror}") from error

    def items(self, first: int) -> Iterator[Item]:
        """See ``Source``."""
        for index, row in enumerate(self._rows()):
            if index >= first:
                yield Item(index, f"row {index}", row)

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        return self._csv_rows() if self._is_csv else self._parquet_rows()

    def _csv_rows(self) -> Iterator[tuple[Any, ...]]:
        with self._path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file)
            names = next(rows, [])
            self._check(names)
            places = [names.index(column) for column in self._columns]
            try:
                for row in rows:
                    if row:  # a short row lacks its last values
                        yield tuple(row[place] if place < len(row) else None for place in places)
            except csv.Error as error:
                where = f"{self._path} line {rows.line_num}"
                raise InputError(f"{where}: {error}; mend the file") from error

    def _parquet_rows(self) -> Iterator[tuple[Any, ...]]:
        parquet = optional_module("pyarrow.parquet", "parquet files")
        arrow = optional_module("pyarrow", "parquet files")
        try:
            with parquet.ParquetFile(self._path) as file:
                self._check(file.schema_arrow.names)
                for batch in file.iter_batches(_CHUNK_ROWS, columns=list(self._columns)):
                    values = [batch.column(column).to_pylist() for column in self._columns]
                    yield from zip(*values, strict=True)
        except arrow.ArrowException as error:
            raise InputError(f"{self._path} is no whole parquet file: {error}") from error

    def _check(self, names: Sequence[str]) -> None:
        if missing := [column for column in self._columns if column not in names]:
            raise InputError(
                f"{self._path} has no column {missing[0]!r}; it has {', '.join(names)}"
            )

"""A file with one item a line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from spanwise.errors import InputError
from spanwise.jobs.item import Extent, Item


class LinesFile:
    """Lines as bytes; empty ones are passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def extent(self) -> Extent:
        """See ``Source``."""
        digest, num_items = hashlib.sha256(), 0
        for _, line in self._lines():
            digest.update(line)
            num_items += 1
        return Extent(num_items, digest.hexdigest())

    def items(self, first: int) -> Iterator[Item]:
        """See ``Source``."""
        for index, (number, line) in enumerate(self._lines()):
            if index >= first:
                yield Item(index, f"line {number}", line)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.isspace():
                        yield number, line.rstrip(b"\r\n") + b"\n"
        except OSError as error:
            raise InputError(f"the input {self._path} cannot be read: {error.strerror}") from error

"""A folder of files of one kind."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from spanwise.errors import InputError
from spanwise.jobs.item import Extent, Item


class FilesFolder:
    """The paths of the files with given endings, in it and in all folders below, sorted.

    Others, and those whose name begins with a dot, are passed over. Links to folders are not
    followed. What a file holds is known by its size and the time of its last change.
    """

    def __init__(self, folder: Path, endings: Collection[str]) -> None:
        self._folder, self._endings = folder, frozenset(endings)

    def extent(self) -> Extent:
        """See ``Source``."""
        digest, num_items = hashlib.sha256(), 0
        for name in self._names():
            digest.update(os.fsencode(name) + b"\0%d\0%d\0" % self._facts(name))
            num_items += 1
        return Extent(num_items, digest.hexdigest())

    def items(self, first: int) -> Iterator[Item]:
        """See ``Source``."""
        for index, name in enumerate(self._names()):
            if index >= first:
                shown = os.fsencode(name).decode(errors="backslashreplace")
                yield Item(index, shown, self._folder / name)

    def _facts(self, name: str) -> tuple[int, int]:
        """Size and time of change; of a link that leads nowhere, which is an item too, none."""
        try:
            facts = (self._folder / name).stat()
        except OSError:
            return -1, -1
        return facts.st_size, facts.st_mtime_ns

    def _names(self) -> Iterator[str]:
        yield from self._names_below("")

    def _names_below(self, folder: str) -> Iterator[str]:
        for name, is_folder in self._entries(folder):
            if is_folder:
                yield from self._names_below(f"{folder}{name}/")
            elif os.path.splitext(name)[1].lower() in self._endings:
                yield f"{folder}{name}"

    def _entries(self, folder: str) -> list[tuple[str, bool]]:
        """Names and whether they are folders; pipes and devices are passed over."""
        where = self._folder / folder
        try:
            with os.scandir(where) as scan:
                return sorted(
                    (entry.name, entry.is_dir(follow_symlinks=False))
                    for entry in scan
                    if not entry.name.startswith(".")
                    and (entry.is_dir() or entry.is_file() or entry.is_symlink())
                )
        except OSError as error:
            raise InputError(f"the folder {where} cannot be read: {error.strerror}") from error

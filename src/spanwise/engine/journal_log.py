"""The journal where it outlives the engine: in memory that the supervisor owns."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from spanwise.control.entries import Entry
from spanwise.control.frames import FrameChain
from spanwise.control.journal import Journal

_MAGIC = 0x4C4E524A_4E415053
_HEADER = struct.Struct("<QQ")  # magic; which of the two regions is the one that counts
_REGION = struct.Struct("<QQQ")  # generation of its frames, offset, bytes
_PAGE = mmap.PAGESIZE
_LEAST_BYTES = 1 << 18


@dataclass(frozen=True)
class _Region:
    generation: int
    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


class JournalLog:
    """Writes each entry before it takes effect; read back from the same file by the next engine.

    The file begins with which of two regions holds the log. A log that has filled its region is
    written anew into another, as short as what is live allows, and only then is that one the log:
    whenever the writer is killed, one whole log is there. Memory that counts no more is given back.
    """

    def __init__(self, fd: int) -> None:
        """Open the log in this file, which is the caller's to close; an empty one is begun."""
        self._fd = fd
        self._index = 0
        if os.fstat(fd).st_size == 0:
            self.journal = Journal()
            self._region = _Region(1, _PAGE, _LEAST_BYTES)
            self._map(self._region.end)
            self._chain, self._used = FrameChain(1), 0
            self._point_to(self._region)
        else:
            self._map(os.fstat(fd).st_size)
            self._region = self._find_region()
            self._chain = FrameChain(self._region.generation)
            log = memoryview(self._memory)[self._region.offset : self._region.end]
            with log:
                entries, self._used = self._chain.decode(log)
            self.journal = Journal(entries)

    def write(self, entry: Entry) -> None:
        """Write an entry; once this returns it survives this process."""
        self.journal.apply(entry)
        frame = self._chain.encode(entry)
        if self._used + len(frame) > self._region.num_bytes:
            self._rewrite(self.journal.snapshot())
            return
        begin = self._region.offset + self._used
        self._memory[begin : begin + len(frame)] = frame
        self._used += len(frame)

    def close(self) -> None:
        """Let the memory go; the file stays."""
        self._memory.close()

    def _rewrite(self, entries: Sequence[Entry]) -> None:
        old = self._region
        chain = FrameChain(old.generation + 1)
        log = b"".join(chain.encode(entry) for entry in entries)
        # Room for as much again, so that rewriting stays rare.
        num_bytes = max(_LEAST_BYTES, -(-2 * len(log) // _PAGE) * _PAGE)
        offset = _PAGE if _PAGE + num_bytes <= old.offset else old.end
        self._region = _Region(old.generation + 1, offset, num_bytes)
        if self._region.end > len(self._memory):
            self._memory.close()
            self._map(self._region.end)
        self._memory[offset : offset + len(log)] = log
        self._chain, self._used = chain, len(log)
        self._index = 1 - self._index
        self._point_to(self._region)
        self._memory.madvise(mmap.MADV_REMOVE, old.offset, old.num_bytes)

    def _map(self, num_bytes: int) -> None:
        if os.fstat(self._fd).st_size < num_bytes:
            os.ftruncate(self._fd, num_bytes)
        self._memory = mmap.mmap(self._fd, num_bytes)

    def _point_to(self, region: _Region) -> None:
        """Say where the log is: first the place that does not count yet, then that it does."""
        values = (region.generation, region.offset, region.num_bytes)
        _REGION.pack_into(self._memory, _HEADER.size + self._index * _REGION.size, *values)
        _HEADER.pack_into(self._memory, 0, _MAGIC, self._index)

    def _find_region(self) -> _Region:
        magic, self._index = _HEADER.unpack_from(self._memory)
        assert magic == _MAGIC, "this file holds no journal"
        at = _HEADER.size + self._index * _REGION.size
        return _Region(*_REGION.unpack_from(self._memory, at))

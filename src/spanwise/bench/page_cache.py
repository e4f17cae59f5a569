"""Whether files lie in the page cache, and getting them in or out."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

_PAGE = mmap.PAGESIZE
_CHUNK = 1 << 24


def weight_files(folder: Path) -> list[Path]:
    """The files of a model folder that hold its weights."""
    return sorted(path.resolve() for path in folder.glob("*.safetensors"))


def read_in(files: Sequence[Path]) -> None:
    """Read files from beginning to end."""
    buffer = bytearray(_CHUNK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                continue


def drop(files: Sequence[Path]) -> None:
    """Ask the kernel to forget files; it keeps what others have mapped, and what is not written."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(files: Sequence[Path]) -> float:
    """The share of the files' pages that are in memory (mincore(2)).

    The kernel tells it of files that this user may write, and calls any other all there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    num_pages = num_cached = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        pages = -(-size // _PAGE)
        states = (ctypes.c_ubyte * pages)()
        with path.open("rb") as file, _mapped(file.fileno(), size) as view:
            first = ctypes.c_char.from_buffer(view)
            code = libc.mincore(
                ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), states
            )
            del first  # or the view could not be closed
            if code:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        num_pages += pages
        num_cached += sum(state & 1 for state in states)
    return num_cached / num_pages if num_pages else 1.0


def _mapped(fd: int, size: int) -> mmap.mmap:
    # Writable, though nobody writes: ctypes gives the address of no other buffer.
    return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)

"""One safetensors file: its header checked, its tensors as views of the mapped file.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from os import SEEK_END
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
import torch

from spanwise.errors import ModelError

_LENGTH_BYTES = 8
_LFS_POINTER = b"version https://git-lfs"
_Count = Annotated[int, msgspec.Meta(ge=0)]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _HeaderEntry(msgspec.Struct, frozen=True):
    """A tensor as the header describes it; offsets count from the end of the header."""

    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; nothing of it is read before ``view``."""

    file: SafetensorsFile
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def where(self) -> str:
        """Name and file, for messages."""
        return f"'{self.name}' in {self.file.path}"

    def view(self) -> torch.Tensor:
        """The tensor over the mapped file: no copy, must not be written to."""
        return self.file.view(self.offset, self.dtype, self.shape)


class SafetensorsFile:
    """An open safetensors file. Raises ModelError where it is absent, cut short or malformed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, SEEK_END)
                start, header = self._read_header(file, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelError(f"{path} is missing; download the model again") from None
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from error
        self.tensors: Mapping[str, StoredTensor] = self._place(header, start, size)

    def view(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor over the file's bytes from ``offset`` on. It must not be written to."""
        count = prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            # torch warns that the mapping is read-only; whoever takes a view copies out of it.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)
        return flat.view(shape)

    def _read_header(self, file: BinaryIO, size: int) -> tuple[int, dict[str, _HeaderEntry]]:
        """Where the data starts, and what the header says of it."""
        file.seek(0)
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError(f"{self.path} is a git-lfs pointer; run 'git lfs pull' in its folder")
        file.seek(0)
        start = _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if start > size:
            raise self._damaged(f"its header ends at byte {start}, the file at {size}")
        try:
            header = msgspec.json.decode(file.read(start - _LENGTH_BYTES))
            if isinstance(header, dict):
                header.pop("__metadata__", None)
            return start, msgspec.convert(header, dict[str, _HeaderEntry])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._damaged(f"its header is no safetensors header ({error})") from error

    def _place(
        self, header: Mapping[str, _HeaderEntry], start: int, size: int
    ) -> dict[str, StoredTensor]:
        tensors = {}
        for name, entry in header.items():
            dtype = _DTYPES.get(entry.dtype)
            if dtype is None:
                raise ModelError(
                    f"'{name}' in {self.path} is stored as {entry.dtype}, which is not supported; "
                    "use the model in F32, F16 or BF16"
                )
            begin, end = entry.data_offsets
            if end - begin != prod(entry.shape) * dtype.itemsize:
                raise self._damaged(
                    f"'{name}' has {end - begin} bytes for a {entry.dtype} of {list(entry.shape)}"
                )
            if start + end > size:
                raise self._damaged(f"'{name}' ends at byte {start + end}, the file at {size}")
            tensors[name] = StoredTensor(self, name, dtype, entry.shape, start + begin)
        return tensors

    def _damaged(self, why: str) -> ModelError:
        return ModelError(f"{self.path} is truncated or damaged: {why}; download it again")

"""The kernels for CPUs of ``device/kernels``: C, built with the package, called by address.

``loaded()`` is None where they could not be built; torch operations serve then, as they do for
every tensor that the kernels do not take. Results are the same within rounding.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch

from spanwise.device.attention import AttentionRule

_VERSION = 2  # as in device/kernels/cpu.c
_logger = logging.getLogger(__name__)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ADDRESS, _NUMBER, _CHOICE, _FLOAT = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.c_float,
)
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "kernels_use_threads": (None, [_ADDRESS]),
    "linear_most_rows": (_NUMBER, [_NUMBER]),
    "linear": (
        None,
        [
            *(_ADDRESS, _NUMBER, _ADDRESS, _NUMBER, _ADDRESS, _ADDRESS, _NUMBER, _ADDRESS),
            *(_NUMBER,) * 3,
            *(_CHOICE,) * 3,
        ],
    ),
    "int8_most_rows": (_NUMBER, []),
    "int8_quantize": (None, [*(_ADDRESS,) * 3, *(_NUMBER,) * 3]),
    "int8_linear": (None, [*(_ADDRESS,) * 7, *(_NUMBER,) * 3, _CHOICE]),
    "rms_norm": (None, [*(_ADDRESS,) * 3, *(_NUMBER,) * 7, _FLOAT, *(_CHOICE,) * 3]),
    "rotate_and_write": (None, [*(_ADDRESS,) * 6, *(_NUMBER,) * 6, *(_CHOICE,) * 2]),
    "attention_most_group": (_NUMBER, []),
    "attention_most_dim": (_NUMBER, []),
    "attend_decodes": (
        None,
        [*(_ADDRESS,) * 7, *(_NUMBER,) * 7, *(_FLOAT,) * 2, *(_CHOICE,) * 2],
    ),
}


@cache
def loaded() -> ctypes.CDLL | None:
    """The kernels, or None where they were not built."""
    built = Path(__file__).with_name("_kernels.so")
    if not built.is_file():
        _logger.warning(
            "no kernels for CPU devices were built with this installation: torch computes alone, "
            "which is slower; install a C compiler, then spanwise again"
        )
        return None
    kernels = ctypes.CDLL(str(built))
    kernels.kernels_version.restype = _NUMBER
    if kernels.kernels_version() != _VERSION:
        _logger.warning("%s is of another version: install spanwise again", built)
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(kernels, name)
        function.restype, function.argtypes = result, arguments
    kernels.kernels_use_threads(_parallel())
    return kernels


def _parallel() -> int | None:
    """The entry of the OpenMP library that torch computes with; None: one thread at a time."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def takes(tensor: torch.Tensor) -> bool:
    """Whether there are kernels for tensors like this one."""
    return tensor.device.type == "cpu" and tensor.dtype in _DTYPES and loaded() is not None


@cache
def linear_most_rows(width: int) -> int:
    """With panels of ``width`` columns, the most rows of ``linear``; 0 for none on this CPU."""
    kernels = loaded()
    return 0 if kernels is None else kernels.linear_most_rows(width)


def linear(
    address: int,
    width: int,
    hidden: torch.Tensor,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    out: torch.Tensor,
    activation: int,
    combine: int,
) -> None:
    """``hidden`` ``[rows, in]`` times a packed weight, to ``out`` ``[rows, out]``, in bfloat16.

    ``address``: of panels as ``device/kernels/linear.c`` has them; it also has the numbers of
    ``activation`` and ``combine``. ``in`` is a multiple of 32.
    """
    kernels = loaded()
    assert kernels is not None and hidden.dtype == torch.bfloat16
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    if other is not None:
        assert other.dtype == torch.bfloat16 and other.shape == out.shape
        if other.stride(1) != 1:
            other = other.contiguous()
    kernels.linear(
        *(address, width, hidden.data_ptr(), hidden.stride(0)),
        *(None if bias is None else bias.data_ptr(), None if other is None else other.data_ptr()),
        *(0 if other is None else other.stride(0), out.data_ptr()),
        *(hidden.shape[0], hidden.shape[1], out.shape[1]),
        *(activation, combine, torch.get_num_threads()),
    )


@cache
def int8_most_rows() -> int:
    """The most rows of ``int8_linear``; 0 for none on this CPU."""
    kernels = loaded()
    return 0 if kernels is None else kernels.int8_most_rows()


def int8_quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ``[rows, in]`` in bfloat16 u8 around 128, and the step of each row, ``[rows]``."""
    kernels = loaded()
    assert kernels is not None and rows.dtype == torch.bfloat16 and rows.stride(1) == 1
    tokens = torch.empty(rows.shape, dtype=torch.uint8)
    steps = torch.empty(rows.shape[0], dtype=rows.dtype)
    kernels.int8_quantize(
        *(rows.data_ptr(), tokens.data_ptr(), steps.data_ptr(), *rows.shape, rows.stride(0))
    )
    return tokens, steps


def int8_linear(
    address: int,
    tokens: torch.Tensor,
    steps: torch.Tensor,
    offsets: torch.Tensor,
    token_steps: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """``tokens`` ``[rows, in]`` times an int8 weight, to ``out`` ``[rows, out]`` in bfloat16.

    ``address``: of panels as ``device/kernels/int8.c`` has them. ``steps`` and ``offsets``
    ``[out]``; ``token_steps`` ``[rows]``. ``in`` is a multiple of 64.
    """
    kernels = loaded()
    assert kernels is not None and tokens.is_contiguous() and out.is_contiguous()
    assert out.dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16)
    scales = (steps, offsets, token_steps)
    kernels.int8_linear(
        *(address, tokens.data_ptr(), *(scale.data_ptr() for scale in scales)),
        *(None if bias is None else bias.data_ptr(), out.data_ptr()),
        *(tokens.shape[0], tokens.shape[1], out.shape[1], torch.get_num_threads()),
    )


def rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Root mean square norm of ``[rows, dim]`` or ``[rows, heads, dim]`` over ``dim``, contiguous.

    A ``weight`` ``[dim]`` of the input's dtype is applied after the rounding to it, another before.
    ``out`` may be ``hidden``.
    """
    kernels = loaded()
    assert kernels is not None and hidden.dim() in (2, 3)
    assert weight.shape == hidden.shape[-1:] and weight.is_contiguous()
    if hidden.stride(-1) != 1:
        assert out is None
        hidden = hidden.contiguous()
    if out is None:
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    else:
        assert out.shape == hidden.shape and out.dtype == hidden.dtype and out.stride(-1) == 1
    rows, groups = hidden.shape[0], hidden.shape[1] if hidden.dim() == 3 else 1
    kernels.rms_norm(
        *(hidden.data_ptr(), weight.data_ptr(), out.data_ptr()),
        *(rows, groups, hidden.shape[-1]),
        *(hidden.stride(0), hidden.stride(-2), out.stride(0), out.stride(-2)),
        *(eps, _DTYPES[hidden.dtype], _DTYPES[weight.dtype], torch.get_num_threads()),
    )
    return out


def rotate_and_write(
    heads: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Rotate queries and keys where they stand; copy keys and values to their slots.

    ``heads`` ``[tokens, query + 2 * kv heads, dim]``, dense but for its tokens' distance;
    ``tables``: cosines and sines ``[tokens, rotated dim]``, float32; None for no positions.
    ``keys`` and ``values`` ``[slots, kv_heads, dim]``.
    """
    kernels = loaded()
    assert kernels is not None and keys.shape == values.shape
    assert heads.dtype == keys.dtype == values.dtype, "the cache holds what the model computes in"
    assert keys.is_contiguous() and values.is_contiguous()
    tokens, num_heads, dim = heads.shape
    num_kv = keys.shape[1]
    assert keys.shape[2] == dim and heads.stride()[1:] == (dim, 1)
    assert slots.shape == (tokens,) and slots.dtype == torch.int64 and slots.is_contiguous()
    cosines, sines = (None, None) if tables is None else (t.data_ptr() for t in tables)
    rotated = 0 if tables is None else tables[0].shape[1]
    assert tables is None or (tables[0].shape[0] == tokens and rotated <= dim)
    kernels.rotate_and_write(
        *(heads.data_ptr(), cosines, sines),
        *(slots.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(tokens, num_heads - 2 * num_kv, num_kv, dim),
        *(rotated, heads.stride(0)),
        *(_DTYPES[heads.dtype], torch.get_num_threads()),
    )


def attends(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rule: AttentionRule,
    sinks: torch.Tensor | None,
) -> bool:
    """Whether ``attend_decodes`` serves for such a layer."""
    if not takes(keys) or rule.kv_index is not None:
        return False
    group, widest = _most_heads()
    fits = query.shape[2] <= group and max(query.shape[3], values.shape[2]) <= widest
    return fits and (sinks is None or (sinks.dtype == query.dtype and sinks.is_contiguous()))


@cache
def _most_heads() -> tuple[int, int]:
    kernels = loaded()
    assert kernels is not None
    return kernels.attention_most_group(), kernels.attention_most_dim()


def attend_decodes(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
    rule: AttentionRule,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of many sequences' last token, ``query`` ``[rows, kv_heads, group, dim]``.

    Keys and values ``[slots, kv_heads, dim]`` are read where they lie: row i reads
    ``slots[i, :counts[i]]`` of ``[rows, length]``. Returns ``[rows, kv_heads, group, value_dim]``.
    """
    kernels = loaded()
    assert kernels is not None and keys.is_contiguous() and values.is_contiguous()
    assert slots.dtype == counts.dtype == torch.int64
    assert slots.is_contiguous() and counts.is_contiguous()
    if query.stride()[1:] != (query.shape[2] * query.shape[3], query.shape[3], 1):
        query = query.contiguous()
    assert query.dtype == keys.dtype == values.dtype, "the cache holds what the model computes in"
    rows, kv_heads, group, dim = query.shape
    value_dim = values.shape[2]
    assert keys.shape[1:] == (kv_heads, dim) and values.shape[1] == kv_heads
    assert slots.shape[0] == counts.shape[0] == rows
    out = query.new_empty(rows, kv_heads, group, value_dim)
    kernels.attend_decodes(
        *(query.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(slots.data_ptr(), counts.data_ptr(), None if sinks is None else sinks.data_ptr()),
        *(out.data_ptr(), rows, slots.shape[1], kv_heads, group, dim, value_dim),
        *(
            query.stride(0),
            rule.scaling,
            rule.softcap,
            _DTYPES[query.dtype],
            torch.get_num_threads(),
        ),
    )
    return out

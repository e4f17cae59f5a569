"""Fused operations give what a layer's own parts give, by torch, and by Triton's interpreter.

The kernels run where Triton is installed, which torch's builds for the CPU leave out (then it has
to be on PYTHONPATH): with TRITON_INTERPRET=1 they are interpreted, without it they are compiled
for every generation of cards, of which none is needed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from tests.support import fused
from tests.support.fused import dtypes, gates, norms, quantizings, rotaries

from spanwise.device import fused_cuda
from spanwise.device.fused_cuda import ACTIVATIONS, GateKind, NormKind, QuantizeKind, RotaryKind
from spanwise.device.rounding import TINY

CPU = torch.device("cpu")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = find_spec("triton") is not None
WAYS = ["torch", *(["interpreter"] if HAS_TRITON and IS_INTERPRETED else [])]
KINDS = [
    NormKind(CPU, torch.bfloat16, torch.bfloat16, 48, 2, True),
    NormKind(CPU, torch.float32, torch.float32, 16, 3, False),
    RotaryKind(CPU, torch.bfloat16, torch.float32, 4, 2, 16, 12),
    QuantizeKind(CPU, torch.bfloat16, 37, 48),
    GateKind(CPU, torch.bfloat16, 37, "silu"),
]


@pytest.fixture(params=WAYS, autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "interpreter":
        monkeypatch.setattr(fused_cuda, "_serves", lambda kind: kind.fits)
        round_as_cards_do(monkeypatch)
    return str(request.param)


def round_as_cards_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the nearest number, ties to the even one: the interpreter cuts off."""
    import numpy as np
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from triton.runtime import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        interpreter,
    )

    own = interpreter._convert_float

    def convert(given: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target == tl.float8e4nv and source == tl.float32:
            return torch.from_numpy(given).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if target != tl.bfloat16 or source != tl.float32:
            return own(given, source, target, rounding)
        bits = np.ascontiguousarray(given).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = np.where(np.isnan(given), 0x7FC0, nearest)
        return nearest.astype(np.uint16).reshape(given.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@norms
@dtypes
@pytest.mark.parametrize("exact_weight", [False, True])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype, exact_weight: bool) -> None:
    fused.check_norm(shape, dtype, exact_weight, "cpu")


@rotaries
@dtypes
@pytest.mark.parametrize("has_exact_tables", [False, True])
@pytest.mark.parametrize("is_signed", [False, True])
def test_rotary_positions(
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    rotated: int,
    dtype: torch.dtype,
    has_exact_tables: bool,
    is_signed: bool,
) -> None:
    kinds = (dtype, torch.float32 if has_exact_tables else dtype)
    fused.check_rotary(tokens, heads, dim, rotated, kinds, is_signed, "cpu")


@gates
@dtypes
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates(rows: int, dim: int, name: str, dtype: torch.dtype) -> None:
    fused.check_gate(rows, dim, name, dtype, "cpu")


@quantizings
def test_quantizing(rows: int, dim: int, num_filled: int) -> None:
    with numpy.errstate(invalid="ignore"):  # of which the interpreter makes an error
        fused.check_quantizing(rows, dim, num_filled, "cpu")


@dtypes
def test_a_row_is_the_same_alone(dtype: torch.dtype, way: str) -> None:
    if way == "torch":
        pytest.skip("of the kernels")
    fused.check_rows_alone(dtype, "cpu")


def test_no_rows_give_none() -> None:
    assert fused_cuda.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
    assert fused_cuda.gated(torch.empty(0, 8), "silu").shape == (0, 4)
    assert [part.shape for part in fused_cuda.quantized(torch.empty(0, 8), 16)] == [(0, 1), (0, 16)]
    pages, tables = torch.zeros(4, 1, 8), torch.empty(0, 1, 8)
    none = torch.empty(0, dtype=torch.long)
    heads = torch.empty(0, 5, 8)
    query = fused_cuda.rotate_and_write(heads, tables, tables, none, pages, pages.clone())
    assert query.shape == (0, 3, 8)


# --- the check


class KernelFailureError(Exception):
    """Stands for Triton's own."""


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches that give what torch does, as the kernels have to."""
    kernels = SimpleNamespace(TritonError=KernelFailureError)
    monkeypatch.setitem(sys.modules, "spanwise.device.fused_kernels", kernels)
    monkeypatch.setattr(fused_cuda, "_normed", fused_cuda._plain_norm)
    monkeypatch.setattr(fused_cuda, "_rotated_and_written", fused_cuda._plain_rotate_and_write)
    monkeypatch.setattr(fused_cuda, "_gated", fused_cuda._plain_gated)
    monkeypatch.setattr(fused_cuda, "_quantized", fused_cuda._plain_quantized)

    def added(residual: torch.Tensor, hidden: torch.Tensor, *rest: Any) -> Any:
        return residual + hidden, fused_cuda._plain_norm(residual + hidden, *rest)

    monkeypatch.setattr(fused_cuda, "_added_and_normed", added)


def serves(kind: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Anew, and as on a card: what was found before is remembered."""
    fault = fused_cuda._fault(kind)
    monkeypatch.setattr(fused_cuda, "_fault", lambda _: fault)
    card = type(kind)(**{**vars(kind), "device": torch.device("cuda", 0)})
    return bool(ORIGINAL.__wrapped__(card))


ORIGINAL: Any = fused_cuda._serves


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_a_kernel_that_gives_the_same_is_taken(
    kind: fused_cuda.Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serves(kind, monkeypatch)


def test_the_cpu_and_sizes_beyond_a_program_take_torch() -> None:
    assert not any(ORIGINAL.__wrapped__(kind) for kind in KINDS)
    card = torch.device("cuda", 0)
    too_wide = NormKind(card, torch.bfloat16, torch.bfloat16, 1 << 16, 2, False)
    odd = RotaryKind(card, torch.bfloat16, torch.bfloat16, 4, 2, 16, 5)
    double = GateKind(card, torch.float64, 8, "silu")
    assert not any(ORIGINAL.__wrapped__(kind) for kind in (too_wide, odd, double))


def not_a_number(*arguments: Any) -> torch.Tensor:
    return fused_cuda._plain_gated(*arguments) * torch.nan


def off(*arguments: Any) -> torch.Tensor:
    return fused_cuda._plain_gated(*arguments) * 1.1


def unbuilt(*_: Any) -> torch.Tensor:
    raise RuntimeError("Failed to find C compiler.")


def out_of_resources(*_: Any) -> torch.Tensor:
    raise KernelFailureError("out of resource: shared memory")


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (off, "off by"),
        (not_a_number, "off by nan"),
        (unbuilt, "C compiler"),
        (out_of_resources, "shared memory"),
    ],
)
def test_a_kernel_that_does_not_work_is_not_taken(
    kernel: Callable[..., torch.Tensor],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fused_cuda, "_gated", kernel)
    with caplog.at_level(logging.WARNING):
        assert not serves(KINDS[-1], monkeypatch)
    assert said in caplog.text and len(caplog.records) == 1


def test_without_triton_torch_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "spanwise.device.fused_kernels", None)
    with caplog.at_level(logging.WARNING):
        assert not serves(KINDS[0], monkeypatch)
    assert len(caplog.records) == 1


# --- what cards would run


COMPILED: list[tuple[str, dict[str, Any]]] = [
    ("norm_rows", {"DIM": 4096, "BLOCK": 4096, "HAS_RESIDUAL": True, "WEIGHT_LAST": True}),
    ("norm_rows", {"DIM": 80, "BLOCK": 128, "HAS_RESIDUAL": False, "WEIGHT_LAST": False}),
    *(
        (
            "rotate_and_write",
            {
                "NUM_QUERY": 32,
                "NUM_KV": 8,
                "DIM": 128,
                "HALF": half,
                "BLOCK_HEADS": 8,
                "BLOCK_HALF": 64,
                "BLOCK_REST": 64,
                "ROUNDS": half == 64,
            },
        )
        for half in (64, 48)
    ),
    *(
        ("gate_rows", {"DIM": 14336, "BLOCK": 1024, "ACTIVATION": activation})
        for activation in ACTIVATIONS
    ),
    *(
        (
            "quantize_rows",
            {"DIM": dim, "FILLED": dim + 8, "BLOCK": block, "LARGEST": 448.0, "TINY": TINY},
        )
        for dim, block in ((4088, 4096), (28664, 32768))
    ),
]
WHOLE_ROWS = ("norm_rows", "quantize_rows")
POINTERS = {("quantize_rows", "steps"): "*fp32", ("quantize_rows", "out"): "*fp8e4nv"}
NUMBERS = frozenset(
    {
        *("hidden_row", "hidden_head", "residual_row", "heads_row", "heads_head", "row_stride"),
        *("cos_row", "sin_row", "key_slot", "key_head", "value_slot", "value_head"),
    }
)


@pytest.mark.skipif(not HAS_TRITON or IS_INTERPRETED, reason="Triton compiles it")
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("value", ["bf16", "fp32"])
def test_kernels_compile_for_every_generation(capability: int, value: str) -> None:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from triton.backends.compiler import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        GPUTarget,
    )

    from spanwise.device import fused_kernels

    for name, constants in COMPILED:
        if name == "quantize_rows" and capability < 89:  # which have no such numbers
            continue
        kernel = getattr(fused_kernels, name)

        def kind(argument: str, name: str = name, constants: Any = constants) -> str:
            if argument in constants:
                return "constexpr"
            if argument == "slots":
                return "*i64"
            if (name, argument) in POINTERS:
                return POINTERS[name, argument]
            if argument == "eps":
                return "fp32"
            is_count = name == "norm_rows" and argument == "heads"
            return "i32" if argument in NUMBERS or is_count else f"*{value}"

        signature = {argument: kind(argument) for argument in kernel.arg_names}
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, argument in enumerate(kernel.arg_names)
            if signature[argument] != "constexpr" and argument not in ("eps", "heads")
        }
        source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
        warps = fused_cuda._warps(constants["BLOCK"]) if name in WHOLE_ROWS else 4
        target = GPUTarget("cuda", capability, 32)
        built = triton.compile(source, target=target, options={"num_warps": warps})
        assert built.asm["cubin"]

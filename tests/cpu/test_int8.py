"""Linears in 8 bits: how far from exact ones, never by a neighbour, and no worse a model for it."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from scripts.embedded_training.corpus import read_corpus
from scripts.embedded_training.quality import measure
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from spanwise.device import int8, native
from spanwise.device.int8 import Int8Linear
from spanwise.embedded import EMBEDDED
from spanwise.errors import DeviceError, ModelError
from spanwise.model.parallel import replace_forward

DTYPES = (torch.bfloat16, torch.float32)
SHAPES = ((1, 1), (7, 5), (192, 576), (1280, 1920))  # (in, out)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def steps(of: torch.Tensor) -> torch.Tensor:
    """The distance between two numbers that 8 bits hold, for each row of ``of``."""
    return of.abs().amax(1) / 127


def exact(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden.double() @ weight.double().T


def worst_error(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """No product may be further from the exact one than this, ``[tokens, out]``.

    Each activation and each weight is off by at most half a step. A token's step is itself rounded
    to the format, and the result twice; half of ``eps`` is the error of a rounding. Places among
    256 steps are fp32, off by 2**-16 at most.
    """
    eps = torch.finfo(hidden.dtype).eps
    x, w = hidden.double(), weight.double()
    half_x, half_w = steps(x)[:, None] * (0.50002 + eps / 4), steps(w)[None] * 0.50002
    from_weight = x.abs().sum(1)[:, None] * half_w
    from_tokens = w.abs().sum(1)[None] * half_x
    both = x.shape[1] * half_x * half_w
    result = exact(hidden, weight).abs() + from_weight + from_tokens
    return from_weight + from_tokens + both + result * (eps + eps**2 + 1e-6)


def noise_ratio(layer: Int8Linear, hidden: torch.Tensor, weight: torch.Tensor) -> float:
    """Error over what roundings spread evenly over their steps give: 1 where all is right."""
    x, w = hidden.double(), weight.double()
    variance = x.square().sum(1)[:, None] * steps(w)[None] ** 2
    variance = (variance + w.square().sum(1)[None] * steps(x)[:, None] ** 2) / 12
    error = layer(hidden).double() - exact(hidden, weight)
    return float((error.square() / variance).mean().sqrt())


@each_dtype
@each_shape
def test_no_product_is_off_by_more_than_the_steps_allow(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = normal(*reversed(shape), dtype=dtype)
    hidden = normal(9, shape[0], dtype=dtype, seed=1) * torch.logspace(-3, 3, 9)[:, None]
    hidden = hidden.to(dtype)
    out = Int8Linear(weight)(hidden)
    assert out.dtype == dtype
    error = (out.double() - exact(hidden, weight)).abs()
    assert bool((error <= worst_error(hidden, weight)).all())


def test_the_error_is_what_rounding_gives_and_wrong_scales_show() -> None:
    weight, hidden = normal(512, 1280), normal(32, 1280, seed=1)
    layer = Int8Linear(weight)
    assert noise_ratio(layer, hidden, weight) == pytest.approx(1, abs=0.05)
    layer._steps *= 1.01
    assert noise_ratio(layer, hidden, weight) > 1.2


@pytest.mark.parametrize("wrong", [127, 129])
def test_a_wrong_zero_point_shows(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hidden = normal(512, 1280), normal(32, 1280, seed=1)
    layer = Int8Linear(weight)
    quantized = int8._quantize_tokens(hidden)
    monkeypatch.setattr(int8, "_quantize_tokens", lambda _: quantized)
    monkeypatch.setattr(int8, "_ZERO_POINT", wrong)
    assert noise_ratio(layer, hidden, weight) > 1.2


@each_dtype
def test_a_bias_is_added(dtype: torch.dtype) -> None:
    weight, bias = normal(24, 40, dtype=dtype), normal(24, dtype=dtype, seed=2)
    hidden = normal(5, 40, dtype=dtype, seed=1)
    assert torch.equal(Int8Linear(weight, bias)(hidden), Int8Linear(weight)(hidden) + bias)


@each_dtype
@each_shape
def test_a_row_does_not_depend_on_its_batch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = Int8Linear(normal(*reversed(shape), dtype=dtype), normal(shape[1], dtype=dtype))
    hidden = normal(512, shape[0], dtype=dtype, seed=1)
    whole = layer(hidden)
    for size in (1, 2, 3, 7, 16, 64):
        for start in (0, 5, 512 - size):
            part = slice(start, start + size)
            assert torch.equal(layer(hidden[part]), whole[part]), size


@each_dtype
def test_a_column_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    """What makes fused projections, and splits of the output over ranks, change nothing."""
    weight, hidden = normal(200, 96, dtype=dtype), normal(3, 96, dtype=dtype, seed=1)
    parts = [Int8Linear(part)(hidden) for part in torch.split(weight, [8, 91, 101])]
    assert torch.equal(torch.cat(parts, dim=1), Int8Linear(weight)(hidden))


def test_weights_may_lie_in_memory_in_any_order() -> None:
    weight, hidden = normal(24, 40), normal(6, 40, seed=1)
    assert torch.equal(Int8Linear(weight.T.contiguous().T)(hidden), Int8Linear(weight)(hidden))


def test_any_leading_shape() -> None:
    layer, hidden = Int8Linear(normal(24, 40)), normal(6, 40, seed=1)
    flat = layer(hidden)
    assert torch.equal(layer(hidden.view(1, 6, 40)), flat[None])
    assert torch.equal(layer(hidden.view(2, 3, 40)), flat.view(2, 3, 24))
    assert torch.equal(layer(hidden[0]), flat[0])
    assert torch.equal(layer(hidden.T.contiguous().T), flat)
    assert layer(hidden[:0][None]).shape == (1, 0, 24)
    many = normal(1, 3000, 40)
    assert many.numel() > int8._CACHED_VALUES
    assert torch.equal(layer(many)[0], layer(many[0]))


def test_tokens_and_weights_without_size() -> None:
    weight, hidden, bias = normal(24, 40), normal(4, 40, seed=1), normal(24, seed=2)
    weight[3], hidden[1], hidden[2] = 0, 0, hidden[2] * 1e-38
    out = Int8Linear(weight, bias)(hidden)
    assert torch.equal(out[1], bias) and torch.equal(out[:, 3], bias[3].expand(4))
    torch.testing.assert_close(out[2], bias)


def test_a_token_that_is_not_a_number_stays_so() -> None:
    hidden = normal(3, 40)
    hidden[1, 7] = float("nan")
    out = Int8Linear(normal(24, 40))(hidden)
    assert bool(out[1].isnan().all()) and bool(out[[0, 2]].isfinite().all())


def test_bytes() -> None:
    assert Int8Linear(normal(64, 128)).num_bytes == 64 * 128 + 64 * 8


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 96])
@pytest.mark.parametrize(("out", "width"), [(64, 64), (77, 128), (640, 1280)])
def test_our_own_kernel_gives_the_bits_of_onednns(
    out: int, width: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias = normal(out, width).bfloat16(), normal(1, out)[0].bfloat16()
    hidden = normal(rows, width + 3).bfloat16()[:, :width]
    hidden[rows // 2] *= 1000
    hidden[rows // 3] = 0
    own = Int8Linear(weight, bias)
    assert own.most_few_rows == native.int8_most_rows()
    found = own(hidden)
    monkeypatch.setattr(native, "int8_most_rows", lambda: 0)
    assert torch.equal(found, Int8Linear(weight, bias)(hidden))


def test_weights_that_eight_bits_cannot_hold_are_refused() -> None:
    weight = normal(4, 4)
    with pytest.raises(ModelError, match="bfloat16 or float32"):
        Int8Linear(weight.half())
    weight[1, 1] = float("inf")
    with pytest.raises(ModelError, match="NaN or infinity"):
        Int8Linear(weight)


def test_an_inexact_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a CPU without VNNI, which adds two products in 16 bits."""
    monkeypatch.setattr(int8, "_multiply", lambda *_: torch.full((2, 64), 32 * 32767.0))
    int8._check_kernel.cache_clear()
    with pytest.raises(DeviceError, match="inexactly"):
        Int8Linear(normal(4, 4))


def test_a_torch_without_the_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    int8._check_kernel.cache_clear()
    with pytest.raises(DeviceError, match="no oneDNN int8 linears"):
        Int8Linear(normal(4, 4))


def run_script(script: str, **environment: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


FORKED = """
import os, torch
torch.set_num_threads(1)
from spanwise.device.int8 import Int8Linear
with torch.inference_mode():
    layers = [Int8Linear(torch.randn(256, 192)) for _ in range(3)]
    hidden = torch.randn(4, 192)
    right = [layer(hidden) for layer in layers]
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    with torch.inference_mode():
        same = all(torch.equal(layer(hidden), out) for layer, out in zip(layers, right))
    os._exit(0 if same else 7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_packed_weights_survive_a_fork() -> None:
    assert run_script(FORKED) == "0\n"


CALLED = """
import torch
from spanwise.device import native
from spanwise.device.int8 import Int8Linear
native.int8_most_rows = lambda: 0  # our own kernel is none of oneDNN's
layer = Int8Linear(torch.randn(1920, 1280, dtype=torch.bfloat16))
for size in (1, 2, 8, 64):
    print("tokens", size, flush=True)
    layer(torch.randn(size, 1280, dtype=torch.bfloat16))
"""


def test_a_call_is_one_fast_kernel() -> None:
    """The reference kernel is a thousand times slower; a weight reordered each time is as bad."""
    _, *calls = run_script(CALLED, ONEDNN_VERBOSE="1").split("tokens ")
    for call in calls:
        kernels = [line.split(",") for line in call.splitlines() if ",exec,cpu," in line]
        names = [fields[fields.index("cpu") + 1 :][:2] for fields in kernels]
        assert [kind for kind, _ in names] == ["matmul"], call
        assert "ref" not in names[0][1] and "gemm:jit" not in names[0][1], call


# -- what it does to a model ---------------------------------------------------------------------


@cache
def held_out() -> str:
    """The largest file of the standard library that the models were not trained on."""
    _, texts = read_corpus()
    return max(texts, key=len)


def quantize(model: Any) -> int:
    """Replace every linear of the layers; how many there were."""
    linears = [part for part in model.model.layers.modules() if type(part) is nn.Linear]
    for linear in linears:
        replace_forward(linear, Int8Linear(linear.weight, linear.bias))
    return len(linears)


@each_dtype
@pytest.mark.parametrize(("name", "per_layer"), [("tiny-dense", 7), ("tiny-moe", 4)])
def test_perplexity_hardly_rises(name: str, per_layer: int, dtype: torch.dtype) -> None:
    folder = EMBEDDED[f"spanwise/{name}"]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    before = measure(model, tokenizer, [held_out()], 20_000).per_token
    with torch.no_grad():
        assert quantize(model) == per_layer * model.config.num_hidden_layers
    after = measure(model, tokenizer, [held_out()], 20_000).per_token
    assert after / before < 1.01

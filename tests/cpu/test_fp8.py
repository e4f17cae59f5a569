"""Linears in 8-bit floats: how far from exact ones, and what they do to a model.

Users are refused them on a CPU; what runs here is the same code, by torch's own kernel for CPUs.
``tests/gpu/test_fp8.py`` has it on a card.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
import torch
from tests.cpu.test_int8_engine import SCORED_TOKENS, windows
from tests.support.fp8 import (
    SHAPES,
    check_product,
    exact,
    normal,
    rounding_ratio,
    worst_error,
)
from tests.support.shards import shard_specs
from tests.support.tiny_models import FAMILIES, save_tiny_model

from spanwise import LLM, SamplingParams
from spanwise.device import fp8
from spanwise.device.fp8 import Fp8Linear
from spanwise.embedded import EMBEDDED
from spanwise.engine import language_launch as launch
from spanwise.errors import DeviceError, InputError, ModelError
from spanwise.model.shard import describe_shard, load_shard
from spanwise.types.worker import Quantization

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@each_shape
def test_no_product_is_off_by_more_than_the_format_allows(shape: tuple[int, int]) -> None:
    check_product(shape, "cpu")


def test_the_product_is_that_of_the_nearest_numbers_and_wrong_scales_show() -> None:
    weight, hidden = normal(512, 1280), normal(32, 1280, seed=1)
    layer = Fp8Linear(weight)
    assert rounding_ratio(layer, hidden, weight) < 1.5
    layer._steps *= 1.01
    assert rounding_ratio(layer, hidden, weight) > 3


@each_shape
def test_a_bias_is_added(shape: tuple[int, int]) -> None:
    weight, bias = normal(*reversed(shape)), normal(shape[1], seed=2)
    hidden = normal(5, shape[0], seed=1)
    plain = Fp8Linear(weight)(hidden).double()
    error = (Fp8Linear(weight, bias)(hidden).double() - (plain + bias.double())).abs()
    assert bool((error <= (plain.abs() * 2 + bias.double().abs()) * 2**-8).all())


@each_shape
def test_shares_of_a_weight_give_the_whole(shape: tuple[int, int]) -> None:
    """Columns of the output side by side, and products of parts of the input added up."""
    weight, hidden = normal(*reversed(shape)), normal(3, shape[0], seed=1)
    whole = Fp8Linear(weight)(hidden)
    parts = [Fp8Linear(part)(hidden) for part in weight.tensor_split(3) if part.numel()]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=2**-7, atol=1e-3)
    pairs = zip(weight.tensor_split(3, 1), hidden.tensor_split(3, 1), strict=True)
    shares = [(w.contiguous(), x) for w, x in pairs if w.numel()]
    total = sum((Fp8Linear(w)(x).double() for w, x in shares), torch.zeros(3, shape[1]))
    allowed = sum((worst_error(x, w) for w, x in shares), torch.zeros(3, shape[1]))
    assert bool(((total - exact(hidden, weight)).abs() <= allowed).all())


def test_any_leading_shape_and_order_in_memory() -> None:
    weight, hidden = normal(24, 40), normal(6, 40, seed=1)
    layer = Fp8Linear(weight)
    flat = layer(hidden)
    assert torch.equal(layer(hidden.view(1, 6, 40)), flat[None])
    assert torch.equal(layer(hidden.view(2, 3, 40)), flat.view(2, 3, 24))
    assert torch.equal(layer(hidden[0]), flat[0])
    assert torch.equal(layer(hidden.T.contiguous().T), flat)
    assert torch.equal(Fp8Linear(weight.T.contiguous().T)(hidden), flat)
    assert layer(hidden[:0][None]).shape == (1, 0, 24)
    residual = normal(6, 24, seed=3)
    assert torch.equal(layer.add_to(residual, hidden), residual + flat)


def test_tokens_and_weights_without_size() -> None:
    weight, hidden, bias = normal(24, 40), normal(4, 40, seed=1), normal(24, seed=2)
    weight[3], hidden[1], hidden[2] = 0, 0, hidden[2] * 1e-38
    out = Fp8Linear(weight, bias)(hidden)
    assert torch.equal(out[1], bias) and torch.equal(out[:, 3], bias[3].expand(4))
    torch.testing.assert_close(out[2], bias)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_is_not_a_number_stays_so(value: float) -> None:
    hidden = normal(3, 40)
    hidden[1, 7] = value
    out = Fp8Linear(normal(24, 40))(hidden)
    assert bool(out[1].isnan().all()) and bool(out[[0, 2]].isfinite().all())


def test_bytes() -> None:
    assert Fp8Linear(normal(64, 128)).num_bytes == 64 * 128 + 64 * 4
    filled = Fp8Linear(normal(5, 7))
    assert filled.num_bytes == 16 * 16 + 16 * 4
    assert filled.num_bytes == filled._weight.nbytes + filled._steps.nbytes


def test_weights_that_the_format_cannot_hold_are_refused() -> None:
    weight = normal(4, 4)
    with pytest.raises(ModelError, match="fp8 linears are made of bfloat16, not of"):
        Fp8Linear(weight.float())
    weight[1, 1] = float("inf")
    with pytest.raises(ModelError, match="NaN or infinity, which fp8"):
        Fp8Linear(weight)


@pytest.mark.parametrize("fault", ["wrong", "missing"])
def test_a_kernel_that_does_not_serve_is_refused(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "wrong":
        monkeypatch.setattr(fp8, "_multiply", lambda *_: torch.zeros(3, 16, dtype=torch.bfloat16))
    else:
        monkeypatch.delattr(torch, "_scaled_mm")
    fp8._check_kernel.cache_clear()
    with pytest.raises(DeviceError, match="has no fp8 linears on cpu") as refused:
        Fp8Linear(normal(4, 4))
    assert "\n" not in str(refused.value)


# -- what it does to a model ---------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_card_is_sized_by_what_its_shard_will_hold(family: str, tmp_path: Path) -> None:
    """Less only by what is filled up once where linears become one."""
    save_tiny_model(family, tmp_path)
    for spec in (*shard_specs(tmp_path), shard_specs(tmp_path, tp=3)[1], *shard_specs(tmp_path, 2)):
        plain = msgspec.structs.replace(spec, dtype="bfloat16")
        rounded = msgspec.structs.replace(plain, quantization="fp8")
        described, shard = describe_shard(rounded), load_shard(rounded)
        layers, width = spec.end_layer - spec.first_layer, 48
        filled = described.weight_bytes - shard.weight_bytes
        assert 0 <= filled <= layers * 3 * 15 * (width + 4)
        assert described.weight_bytes != describe_shard(plain).weight_bytes


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an engine take CPU devices for cards."""
    monkeypatch.setattr(launch.quantization, "check_devices", lambda *_: None)


def perplexity(name: str, quantization: Quantization | None, tp: int = 1) -> float:
    """Per token, by the engine's own prompt logprobs."""
    with LLM(name, devices=f"cpu:{tp}", tensor_parallel_size=tp, quantization=quantization) as llm:
        results = llm.generate(windows(name), SamplingParams(max_tokens=1, prompt_logprobs=0))
    scored = [entry.logprob for one in results for entry in one.prompt_logprobs or () if entry]
    assert len(scored) == SCORED_TOKENS
    return math.exp(-sum(scored) / SCORED_TOKENS)


@pytest.mark.parametrize("name", EMBEDDED)
def test_perplexity_hardly_rises(name: str, on_cpu: None) -> None:
    before, after = perplexity(name, None), perplexity(name, "fp8")
    assert before != after and after / before < 1.01


def test_ranks_share_a_rounded_model(on_cpu: None) -> None:
    """Three ranks of three heads, none of whose shares is what the kernels want."""
    before, after = (perplexity("spanwise/tiny-dense", way, 3) for way in (None, "fp8"))
    assert before != after and after / before < 1.01


def test_other_numbers_are_refused(on_cpu: None) -> None:
    with pytest.raises(InputError, match="fp8 computes in bfloat16, not in float32; use --dtype"):
        LLM("spanwise/tiny-dense", devices="cpu", dtype="float32", quantization="fp8")


@pytest.mark.parametrize(
    ("name", "weights", "rows"), [("tiny-dense", 479_232, 2048), ("tiny-moe", 196_608, 768)]
)
def test_the_layers_shrink_and_the_plan_says_so(
    name: str, weights: int, rows: int, on_cpu: None
) -> None:
    """Of each of 6 layers the linears' weights, which keep a number a row; experts do not."""
    plans = []
    for quantization in (None, "fp8"):
        with LLM(f"spanwise/{name}", devices="cpu", quantization=quantization) as llm:
            plans.append(llm.plan)
    assert [plan.dtype for plan in plans] == ["bfloat16", "bfloat16 + fp8"]
    before, after = (plan.ranks[0].weight_bytes for plan in plans)
    assert before - after == 6 * (weights - 4 * rows)

"""The C kernels give what the torch operations they replace give, for odd shapes and in company."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from spanwise.device import native
from spanwise.device.activations import ACTIVATIONS
from spanwise.device.attention import AttentionRule, attend_decodes, mask_of
from spanwise.device.linear import PackedGate, PackedLinear, can_pack
from spanwise.device.rotary import Angles, place

DTYPES = (torch.float32, torch.bfloat16)
# Of the largest value: another order of sums in float32; one rounding to bfloat16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
BATCHES = (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 48, 50, 96)


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(own: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    assert own.shape == right.shape and own.dtype == dtype
    worst = (own.double() - right.double()).abs().max()
    assert worst <= TOLERANCE[dtype] * right.double().abs().max()


def test_the_kernels_were_built() -> None:
    assert native.loaded() is not None


def test_a_library_of_another_version_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_VERSION", native._VERSION + 1)
    assert native.loaded.__wrapped__() is None
    assert "install spanwise again" in caplog.text


def test_without_a_library_torch_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native.loaded.__wrapped__() is None
    assert "install a C compiler" in caplog.text


# -- few rows times a packed weight ----------------------------------------------------------------


LINEARS = [(32, 32, False), (1000, 64, True), (257, 96, True), (1, 32, True), (640, 4096, False)]


@pytest.mark.parametrize(("out", "width", "has_bias"), LINEARS, ids=lambda v: str(v))
def test_few_rows(out: int, width: int, has_bias: bool) -> None:
    dtype = torch.bfloat16
    if not can_pack(torch.empty(1, 1, dtype=dtype)):
        assert not any(native.linear_most_rows(width) for width in (32, 64))
        return
    weight = drawn(out, width, dtype=dtype) * 0.1
    bias = drawn(out, dtype=dtype, seed=1) if has_bias else None
    linear = PackedLinear(weight, bias)
    assert linear.most_few_rows == max(native.linear_most_rows(panels) for panels in (32, 64))
    exact = weight.double()
    for rows in BATCHES:
        hidden = drawn(rows, width + 8, dtype=dtype, seed=rows)[:, :width]  # rows with a distance
        other = drawn(rows, out + 3, dtype=dtype, seed=rows)[:, :out]
        right = hidden.double() @ exact.T + (0.0 if bias is None else bias.double())
        assert_close(linear(hidden), right, dtype)
        assert_close(linear.add_to(other, hidden), other.double() + right, dtype)
        assert_close(linear.times(other, hidden), other.double() * right, dtype)
        for name, activation in ACTIVATIONS.items():
            assert_close(linear.activated(hidden, name), activation(right), dtype)


def test_few_rows_of_a_gate() -> None:
    dtype = torch.bfloat16
    if not can_pack(torch.empty(1, 1, dtype=dtype)):
        assert not any(native.linear_most_rows(width) for width in (32, 64))
        return
    gate, up = (drawn(96, 64, dtype=dtype, seed=seed) * 0.1 for seed in (1, 2))
    own = PackedGate(PackedLinear(gate, None), PackedLinear(up, None), "silu")
    hidden = drawn(5, 64, dtype=dtype)
    exact = hidden.double()
    right = F.silu(exact @ gate.double().T) * (exact @ up.double().T)
    assert_close(own(hidden), right, dtype)


def test_few_rows_that_lie_otherwise() -> None:
    dtype = torch.bfloat16
    if not native.linear_most_rows(32):
        return
    linear = PackedLinear(drawn(96, 64, dtype=dtype), drawn(192, dtype=dtype)[::2])
    hidden, other = drawn(5, 64, dtype=dtype), drawn(5, 96, dtype=dtype)
    across, other_across = hidden.t().contiguous().t(), other.t().contiguous().t()
    assert torch.equal(linear(across), linear(hidden))
    assert torch.equal(linear.times(other_across, across), linear.times(other, hidden))
    with pytest.raises(AssertionError):
        linear.add_to(other.float(), hidden)


def test_activations_at_the_ends_of_the_numbers() -> None:
    dtype = torch.bfloat16
    if not native.linear_most_rows(32):
        return
    numbers = torch.tensor([-3e38, -1e30, -100, -5, -0.01, 0, 0.01, 5, 100, 1e30, 3e38]).to(dtype)
    hidden = torch.zeros(len(numbers) + 1, 32, dtype=dtype)
    hidden[:-1, 0], hidden[-1] = numbers, float("nan")
    linear = PackedLinear(torch.eye(32, dtype=dtype), None)
    for name in ("silu", "relu", "gelu-tanh"):
        own = linear.activated(hidden, name)[:, 0]
        torch.testing.assert_close(
            own[:-1].double(), ACTIVATIONS[name](numbers.double()), rtol=8e-3, atol=1e-6
        )
        assert own[-1].isnan()


def test_a_row_of_few_has_the_same_bits_in_any_company() -> None:
    """On a processor whose kernel is the same for one row and many."""
    dtype = torch.bfloat16
    if not native.linear_most_rows(32):
        assert native.linear_most_rows(64) in (0, 4)
        return
    linear = PackedLinear(drawn(320, 256, dtype=dtype), None)
    hidden = drawn(96, 256, dtype=dtype, seed=1)
    together = linear(hidden)
    for rows in (1, 2, 16, 17, 33, 95):
        assert torch.equal(linear(hidden[:rows]), together[:rows])


@pytest.mark.parametrize("isa", ["AVX512_CORE_BF16", "AVX2"])
def test_blocks_for_other_processors(isa: str) -> None:
    """oneDNN packs otherwise for them: those blocks are known too, or left to oneDNN."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "blocks_are",
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout


def test_blocks_are_known_or_left() -> None:
    if not can_pack(torch.empty(1, 1, dtype=torch.bfloat16)):
        return
    weight = drawn(200, 128, dtype=torch.bfloat16)
    PackedLinear(torch.zeros_like(weight), None)  # shows nothing, so it must not decide
    linear = PackedLinear(weight, None)
    for rows in (1, 3, 4, 9):
        hidden = drawn(rows, 128, dtype=torch.bfloat16, seed=rows)
        assert_close(linear(hidden), hidden.double() @ weight.double().T, torch.bfloat16)


def test_blocks_are_not_taken_for_others_beside_a_large_bias() -> None:
    if not can_pack(torch.empty(1, 1, dtype=torch.bfloat16)):
        return
    weight = drawn(168, 128, dtype=torch.bfloat16)
    PackedLinear(weight, torch.full((168,), 1e6).bfloat16())
    hidden = drawn(3, 128, dtype=torch.bfloat16, seed=1)
    right = hidden.double() @ weight.double().T
    assert_close(PackedLinear(weight, None)(hidden), right, torch.bfloat16)


# -- norms -----------------------------------------------------------------------------------------


def exact_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    exact = hidden.double()
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return exact * scale * weight.double()


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "dim"), [(1, 1280), (3, 8), (17, 77), (40, 2048)])
def test_rms_norm(rows: int, dim: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    hidden, weight = drawn(rows, dim, dtype=dtype), drawn(dim, dtype=weight_dtype, seed=1)
    assert_close(native.rms_norm(hidden, weight, 1e-5), exact_norm(hidden, weight, 1e-5), dtype)
    across = hidden.t().contiguous().t()
    assert torch.equal(native.rms_norm(across, weight, 1e-5), native.rms_norm(hidden, weight, 1e-5))


def test_rms_norm_in_place_of_some_heads() -> None:
    heads, weight = drawn(5, 7, 16, dtype=torch.float32), drawn(16, dtype=torch.float32, seed=1)
    kept, middle = heads.clone(), heads[:, 2:5]
    native.rms_norm(middle, weight, 1e-6, out=middle)
    assert_close(middle, exact_norm(kept[:, 2:5], weight, 1e-6), torch.float32)
    assert torch.equal(heads[:, :2], kept[:, :2]) and torch.equal(heads[:, 5:], kept[:, 5:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_of_what_is_no_number_is_none(dtype: torch.dtype) -> None:
    hidden = torch.ones(2, 32, dtype=dtype)
    hidden[0, 3] = float("nan")
    own = native.rms_norm(hidden, torch.ones(32, dtype=dtype), 1e-6)
    assert own[0].isnan().all() and own[1].isfinite().all()


# -- rotary positions and the cache ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (16, 8), (6, 2), (80, 0)])
@pytest.mark.parametrize("tokens", [1, 35])
def test_place(tokens: int, dim: int, rotated: int, dtype: torch.dtype) -> None:
    num_query, num_kv = 6, 2
    heads = drawn(tokens, num_query + 2 * num_kv, dim, dtype=dtype)
    slots = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:tokens]
    keys, values = (torch.zeros(50, num_kv, dim, dtype=dtype) for _ in range(2))
    turns = drawn(tokens, rotated // 2, dtype=torch.float32, seed=2).repeat(1, 2)
    angles = Angles(turns.cos().to(dtype), turns.sin().to(dtype)) if rotated else None
    exact = heads.double()
    turned = exact[:, : num_query + num_kv, :rotated]
    if angles is not None:
        swapped = torch.cat((-turned[..., rotated // 2 :], turned[..., : rotated // 2]), dim=-1)
        cosines, sines = angles.cosines.double()[:, None], angles.sines.double()[:, None]
        exact[:, : num_query + num_kv, :rotated] = turned * cosines + swapped * sines
    query = place(heads, angles, slots, keys, values)
    assert_close(query, exact[:, :num_query], dtype)
    assert_close(keys[slots], exact[:, num_query : num_query + num_kv], dtype)
    assert_close(values[slots], exact[:, num_query + num_kv :], dtype)
    others = [slot for slot in range(50) if slot not in slots.tolist()]
    assert not keys[others].any() and not values[others].any()


def test_no_tokens_are_placed() -> None:
    pages = torch.zeros(4, 1, 8)
    slots = torch.empty(0, dtype=torch.int64)
    assert place(torch.empty(0, 4, 8), None, slots, pages, pages.clone()).shape == (0, 2, 8)


def test_pages_of_another_dtype_are_not_written() -> None:
    pages, slots = torch.zeros(4, 1, 8), torch.arange(2)
    with pytest.raises(AssertionError):
        place(torch.ones(2, 4, 8), None, slots, pages.bfloat16(), pages.bfloat16())
    with pytest.raises(AssertionError):
        place(torch.ones(2, 4, 8), None, slots.int(), pages, pages.clone())


# -- attention of last tokens ----------------------------------------------------------------------

SHAPES = [
    (1, 1, 1, 1, 8, 8),
    (3, 5, 2, 2, 8, 8),
    (4, 70, 2, 3, 16, 8),
    (2, 40, 1, 4, 80, 96),
    (5, 33, 3, 1, 128, 64),
    (2, 100, 2, 16, 256, 256),
]
RULES = [AttentionRule(0.3), *(AttentionRule(0.3, softcap=softcap) for softcap in (5.0, 50.0))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, length, kv_heads, group, dim, value_dim = shape
    keys = drawn(500, kv_heads, dim, dtype=dtype)
    values = drawn(500, kv_heads, value_dim, dtype=dtype, seed=1)
    query = drawn(rows, kv_heads * group + 2, dim, dtype=dtype, seed=2)[:, : kv_heads * group]
    query = query.view(rows, kv_heads, group, dim)
    generator = torch.Generator().manual_seed(3)
    slots = torch.randint(0, 500, (rows, length), generator=generator)
    counts = torch.randint(1, length + 1, (rows,), generator=generator)
    for sinks in (None, drawn(kv_heads * group, dtype=dtype, seed=4)):
        for rule in RULES:
            assert native.attends(query, keys, values, rule, sinks)
            own = native.attend_decodes(query, keys, values, slots, counts, rule, sinks)
            right = attend_decodes(
                query.double(),
                keys[slots].double(),
                values[slots].double(),
                mask_of(counts, length, torch.float64),
                rule,
                None if sinks is None else sinks.double(),
            )
            assert_close(own, right, dtype)


def test_attention_never_reads_beyond_a_rows_count() -> None:
    keys, values = (drawn(8, 1, 64, dtype=torch.float32, seed=seed) for seed in (1, 2))
    keys[7] = values[7] = float("nan")
    query = drawn(1, 1, 2, 64, dtype=torch.float32)
    slots = torch.tensor([[0, 1, 2, 7, 7, 7]])
    counts = torch.tensor([3])
    own = native.attend_decodes(query, keys, values, slots, counts, RULES[0])
    assert own.isfinite().all()


def test_attention_where_nothing_is_seen_at_first() -> None:
    """A whole block of keys with scores of -inf takes no weight."""
    keys, values = (drawn(40, 1, 8, dtype=torch.float32, seed=seed) for seed in (1, 2))
    query = torch.ones(1, 1, 1, 8)
    keys[:35] = float("-inf")
    slots, counts = torch.arange(40)[None], torch.tensor([40])
    own = native.attend_decodes(query, keys, values, slots, counts, RULES[0])
    seen = keys[None, 35:], values[None, 35:]
    right = attend_decodes(query, *seen, torch.zeros(1, 5), RULES[0])
    assert_close(own, right, torch.float32)


def test_attention_takes_slots_of_one_kind() -> None:
    pages, query = torch.ones(8, 1, 8), torch.ones(1, 1, 1, 8)
    slots, counts = torch.arange(8)[None], torch.tensor([8])
    for given in ((slots.int(), counts), (slots, counts.int())):
        with pytest.raises(AssertionError):
            native.attend_decodes(query, pages, pages, *given, RULES[0])


def test_a_row_has_the_same_bits_in_any_company() -> None:
    keys, values = (drawn(200, 2, 64, dtype=torch.float32, seed=seed) for seed in (1, 2))
    query = drawn(4, 2, 3, 64, dtype=torch.float32)
    slots = torch.randint(0, 200, (4, 150), generator=torch.Generator().manual_seed(3))
    counts = torch.tensor([150, 3, 32, 33])
    together = native.attend_decodes(query, keys, values, slots, counts, RULES[0])
    for row in range(4):
        part = slice(row, row + 1)
        own_slots = slots[part, : int(counts[row])].contiguous()
        own = native.attend_decodes(
            query[part], keys, values, own_slots, counts[part].clone(), RULES[0]
        )
        assert torch.equal(own, together[part])


def test_heads_too_wide_are_left_to_torch() -> None:
    wide = drawn(1, 1, 1, 320, dtype=torch.float32)
    pages = drawn(4, 1, 320, dtype=torch.float32)
    assert not native.attends(wide, pages, pages, RULES[0], None)
    many = drawn(1, 1, 17, 64, dtype=torch.float32)
    assert not native.attends(many, pages[..., :64], pages[..., :64], RULES[0], None)
    apart = torch.zeros(34)[::2]
    assert not native.attends(many[:, :, :16], pages[..., :64], pages[..., :64], RULES[0], apart)


# -- where results lie -----------------------------------------------------------------------------


def test_results_lie_with_the_inputs_whatever_the_default_is() -> None:
    hidden, weight, slots = torch.ones(1, 8), torch.ones(8), torch.zeros(1, 1, dtype=torch.int64)
    pages, query, counts = torch.ones(8, 1, 8), torch.ones(1, 1, 1, 8), torch.ones(1).long()
    with torch.device("meta"):
        assert native.rms_norm(hidden, weight, 1e-6).device.type == "cpu"
        own = native.attend_decodes(query, pages, pages, slots, counts, RULES[0])
        assert own.device.type == "cpu"


# -- threads ---------------------------------------------------------------------------------------


def test_several_threads_give_the_same_bits() -> None:
    hidden = drawn(100, 256, dtype=torch.float32)
    weight = torch.ones(256)
    threads = torch.get_num_threads()
    linear = PackedLinear(drawn(320, 256, dtype=torch.float32).bfloat16(), None)
    rows = hidden[:7].bfloat16()
    try:
        results = []
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append((native.rms_norm(hidden, weight, 1e-6), linear(rows)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])

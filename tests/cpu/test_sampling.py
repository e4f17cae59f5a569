"""Draws follow the softmax, depend on nothing but their own row, and agree with transformers."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spanwise.runner.filters import keep_min_p, keep_top_k, keep_top_p
from spanwise.runner.logprobs import prompt_logprobs, token_logprobs
from spanwise.runner.mass import centred
from spanwise.runner.noise import MAX_NOISE, gumbel_noise, stream_key
from spanwise.runner.penalties import Changes, adjust
from spanwise.runner.sampling import SampleRow, sample
from spanwise.types.sampling import MAX_SEED, SamplingSpec

VOCAB = 41
DRAWS = 20_000
PROMPT = (3, 8, 8, 1)
OUTPUT = (5, 8, 5, 5, 40)
Filter = Callable[[torch.Tensor], torch.Tensor]


def logits_of(seed: int, *shape: int, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * spread


def row_of(spec: SamplingSpec, position: int = 9) -> SampleRow:
    return SampleRow(spec, position, (PROMPT + OUTPUT)[:position], len(PROMPT))


def draw(logits: torch.Tensor, *specs: SamplingSpec) -> list[int]:
    return sample(logits, [row_of(spec) for spec in specs])[0]


def chi_square_p(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """The chance of counts at least this far from ``probs``; rare outcomes share a cell."""
    expected = probs.double() * counts.sum()
    rare = expected < 5
    assert not counts[probs == 0].any()
    observed = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    half = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))


def reference(spec: SamplingSpec, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities after transformers' own warpers."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    scores = logits[None] / spec.temperature
    if spec.top_k:
        scores = TopKLogitsWarper(spec.top_k)(ids, scores)
    if spec.top_p < 1:
        scores = TopPLogitsWarper(spec.top_p)(ids, scores)
    if spec.min_p:
        scores = MinPLogitsWarper(spec.min_p)(ids, scores)
    return scores.softmax(-1)[0]


# ---- draws against the distribution


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("vary", ["position", "seed", "choice"])
def test_draws_follow_the_softmax(options: dict[str, float], vary: str) -> None:
    logits = logits_of(1, VOCAB)
    spec = SamplingSpec(**{"temperature": 1.0, "seed": 11, **options})
    rows = []
    for number in range(DRAWS):
        seed = 11 + number if vary == "seed" else 11
        choice = number if vary == "choice" else 0
        position = number if vary == "position" else 0
        each = SamplingSpec(**{"temperature": 1.0, **options, "seed": seed, "choice": choice})
        rows.append(SampleRow(each, position, (), 0))
    tokens, _ = sample(logits.expand(DRAWS, -1), rows)
    counts = torch.tensor(tokens).bincount(minlength=VOCAB)
    assert chi_square_p(counts, reference(spec, logits)) > 1e-4


def test_the_chi_square_has_teeth() -> None:
    logits = logits_of(1, VOCAB)
    rows = [SampleRow(SamplingSpec(temperature=1.0), n, (), 0) for n in range(DRAWS)]
    counts = torch.tensor(sample(logits.expand(DRAWS, -1), rows)[0]).bincount(minlength=VOCAB)
    assert chi_square_p(counts, (logits / 1.05).softmax(-1)) < 1e-4


def test_unlikely_tokens_are_drawn_as_often_as_they_should_be() -> None:
    logits = torch.tensor([0.0] + [-9.0] * 40)
    rows = [SampleRow(SamplingSpec(temperature=1.0), n, (), 0) for n in range(DRAWS * 5)]
    hits = sum(token > 0 for token in sample(logits.expand(len(rows), -1), rows)[0])
    expected = len(rows) * 40 * math.exp(-9)
    assert abs(hits - expected) < 4 * math.sqrt(expected)


# ---- a pure function of the row


def mixed_rows() -> list[SampleRow]:
    chooser = random.Random(5)
    rows = []
    for number in range(60):
        spec = SamplingSpec(
            temperature=chooser.choice([0.0, 0.5, 1.0, 1.3]),
            top_k=chooser.choice([0, 1, 20, 5000]),
            top_p=chooser.choice([1.0, 1.0, 0.3, 0.95]),
            min_p=chooser.choice([0.0, 0.0, 0.1]),
            seed=chooser.choice([number, -number, MAX_SEED, -MAX_SEED - 1]),
            choice=chooser.randrange(3),
            repetition_penalty=chooser.choice([1.0, 1.2]),
            presence_penalty=chooser.choice([0.0, 0.5]),
            logit_bias=chooser.choice([{}, {7: 3.0}]),
            min_tokens=chooser.choice([0, 9]),
            stop_token_ids=(2, 5),
            logprobs=chooser.choice([-1, 0, 3]),
        )
        rows.append(row_of(spec, position=chooser.randrange(4, 10)))
    return rows


@pytest.mark.parametrize("vocab", [997, 20_011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gives_the_same_alone_and_in_any_batch(vocab: int, dtype: torch.dtype) -> None:
    rows = mixed_rows()
    logits = logits_of(2, len(rows), vocab).to(dtype)
    kept = logits.clone()
    together = list(zip(*sample(logits, rows), strict=True))
    order = random.Random(6).sample(range(len(rows)), len(rows))
    shuffled = zip(*sample(logits[order], [rows[index] for index in order]), strict=True)
    assert list(shuffled) == [together[index] for index in order]
    for index, row in enumerate(rows):
        (token,), (logprobs,) = sample(logits[index : index + 1], [row])
        assert (token, logprobs) == together[index]
    assert torch.equal(logits, kept)


def test_draws_do_not_touch_the_generator() -> None:
    before = torch.get_rng_state()
    draw(logits_of(3, 1, VOCAB), SamplingSpec(temperature=1.0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("field", ["seed", "choice", "position"])
def test_seed_choice_and_position_each_give_another_stream(field: str) -> None:
    logits = torch.zeros(300, 1000)

    def stream(**change: int) -> list[int]:
        spec = SamplingSpec(
            temperature=1.0, seed=change.get("seed", 4), choice=change.get("choice", 0)
        )
        first = change.get("position", 0)
        rows = [SampleRow(spec, first + number, (), 0) for number in range(300)]
        return sample(logits, rows)[0]

    assert stream() == stream()
    same = sum(a == b for a, b in zip(stream(), stream(**{field: 1000}), strict=True))
    assert same < 5


def test_the_noise_picks_the_winner() -> None:
    logits = logits_of(4, 1, 5000)
    scores = (logits[0] - logits.max()) / 1.3
    for seed in range(50):
        noise = gumbel_noise(stream_key(seed, 0, 9), torch.arange(5000))
        expected = int((scores + noise).argmax())
        assert draw(logits, SamplingSpec(temperature=1.3, seed=seed)) == [expected]


def test_picking_out_the_able_tokens_changes_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(5, 200, 3000, spread=9.0)
    specs = [SamplingSpec(temperature=1.0, seed=seed) for seed in range(200)]
    dense = draw(logits, *specs)
    assert len(set(dense)) > 100
    monkeypatch.setattr("spanwise.runner.sampling._FEW", 0)
    assert draw(logits, *specs) == dense
    monkeypatch.setattr("spanwise.runner.sampling._FEW", 10**9)
    assert draw(logits, *specs) == dense


# ---- greedy and the edges


def test_greedy_takes_the_smallest_of_equal_ids() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [9, 30]] = 4.0
    logits[1, [0, 40]] = 4.0
    assert draw(logits, SamplingSpec(), SamplingSpec()) == [9, 0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-12, 1e-4])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    logits = logits_of(6, 1, VOCAB, spread=30.0)
    spec = SamplingSpec(temperature=temperature, top_k=5, top_p=0.9, min_p=0.1)
    assert draw(logits, spec) == [int(logits.argmax())]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((500, VOCAB), -torch.inf)
    logits[:, [3, 17]] = 0.0
    specs = [SamplingSpec(temperature=100.0, seed=n, top_p=0.999) for n in range(500)]
    assert set(draw(logits, *specs)) == {3, 17}


def test_a_row_with_nothing_left_gives_a_token_and_harms_no_neighbour() -> None:
    logits = logits_of(7, 2, VOCAB)
    spec = SamplingSpec(temperature=1.0, top_p=0.9, top_k=3, min_p=0.1)
    alone = draw(logits[1:], spec)
    stuck = SamplingSpec(
        temperature=1.0, top_p=0.9, min_tokens=99, stop_token_ids=tuple(range(VOCAB))
    )
    assert draw(logits, stuck, spec) == [0, *alone]


def test_no_rows_is_a_step_like_any_other() -> None:
    assert sample(torch.empty(0, VOCAB), []) == ([], [])


def test_half_precision_logits_are_widened_before_anything() -> None:
    logits = logits_of(8, 1, VOCAB).bfloat16()
    specs = [SamplingSpec(temperature=0.7, seed=n, logprobs=2) for n in range(20)]
    for spec in specs:
        assert sample(logits, [row_of(spec)]) == sample(logits.float(), [row_of(spec)])


# ---- filters against transformers


@pytest.mark.parametrize("k", [1, 2, 7, 40, 41, 1000])
def test_top_k_as_transformers(k: int) -> None:
    logits = logits_of(9, 30, VOCAB)
    assert_keeps(keep_top_k(centred(logits), [k] * 30), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_as_transformers(p: float) -> None:
    logits = logits_of(10, 30, VOCAB)
    assert_keeps(keep_top_p(centred(logits), [p] * 30), TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [1e-9, 0.01, 0.3, 1.0])
def test_min_p_as_transformers(p: float) -> None:
    logits = logits_of(11, 30, VOCAB)
    assert_keeps(keep_min_p(centred(logits), [p] * 30), MinPLogitsWarper(p)(None, logits))


def test_top_p_counts_only_what_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    specs = [SamplingSpec(temperature=1.0, seed=n, top_k=2, top_p=0.55) for n in range(300)]
    assert set(draw(logits.expand(300, -1), *specs)) == {0}
    specs = [SamplingSpec(temperature=1.0, seed=n, top_p=0.55) for n in range(300)]
    assert set(draw(logits.expand(300, -1), *specs)) == {0, 1}


def test_equals_at_the_border() -> None:
    scores = torch.tensor([[-1.0, 0.0, -1.0, -1.0, -5.0]])
    assert kept_ids(keep_top_k(scores, [2])) == [0, 1, 2, 3]
    assert kept_ids(keep_top_p(torch.zeros(1, 8), [0.5])) == [0, 1, 2, 3]
    assert kept_ids(keep_top_p(torch.zeros(1, 8), [0.51])) == [0, 1, 2, 3, 4]


def test_each_row_has_its_own_limits() -> None:
    scores = centred(logits_of(12, 1, VOCAB)).expand(4, -1)
    sizes = keep_top_k(scores, [0, 3, 9, 3]).isfinite().sum(-1).tolist()
    assert sizes == [VOCAB, 3, 9, 3]
    probs = scores[0].softmax(-1).sort(descending=True).values.cumsum(0)
    sizes = keep_top_p(scores, [1.0, 0.5, 0.9, 0.99]).isfinite().sum(-1).tolist()
    assert sizes == [VOCAB] + [int((probs < p).sum()) + 1 for p in (0.5, 0.9, 0.99)]


def kept_ids(scores: torch.Tensor) -> list[int]:
    return scores[0].isfinite().nonzero().flatten().tolist()


def assert_keeps(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.equal(ours.isfinite(), theirs.isfinite())


# ---- bias, minimum length, penalties


def adjusted(logits: torch.Tensor, spec: SamplingSpec) -> torch.Tensor:
    changes, changed = Changes(VOCAB), logits[None].clone()
    changes.add(0, spec, PROMPT + OUTPUT, len(PROMPT))
    adjust(changed, changes.tensors())
    return changed[0]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_as_transformers(penalty: float) -> None:
    logits = logits_of(13, VOCAB)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([PROMPT + OUTPUT]), logits[None]
    )
    ours = adjusted(logits, SamplingSpec(repetition_penalty=penalty))
    assert torch.equal(ours, theirs[0])
    assert not torch.equal(ours, logits)


def test_presence_and_frequency_count_the_output_alone() -> None:
    logits = logits_of(14, VOCAB)
    ours = adjusted(logits, SamplingSpec(presence_penalty=0.5, frequency_penalty=0.25))
    expected = logits.clone()
    for token, count in Counter(OUTPUT).items():
        expected[token] -= 0.5 + 0.25 * count
    torch.testing.assert_close(ours, expected)
    assert torch.equal(ours[[3, 1]], logits[[3, 1]])


def test_logit_bias_as_transformers() -> None:
    logits = logits_of(15, VOCAB)
    theirs = SequenceBiasLogitsProcessor([[[4], 2.5], [[11], -100.0]])(
        torch.tensor([PROMPT]), logits[None].clone()
    )
    torch.testing.assert_close(
        adjusted(logits, SamplingSpec(logit_bias={4: 2.5, 11: -100.0})), theirs[0]
    )


@pytest.mark.parametrize("minimum", [5, 6])
def test_min_tokens_as_transformers(minimum: int) -> None:
    logits = logits_of(16, VOCAB)
    theirs = MinNewTokensLengthLogitsProcessor(len(PROMPT), minimum, [2, 7])(
        torch.tensor([PROMPT + OUTPUT]), logits[None]
    )
    ours = adjusted(logits, SamplingSpec(min_tokens=minimum, stop_token_ids=(2, 7, 9999)))
    assert torch.equal(ours, theirs[0])
    assert torch.isneginf(ours[[2, 7]]).all() == (minimum == 6)


def test_the_order_of_changes() -> None:
    """Bias first, so the repetition penalty scales it; a stop token stays out whatever follows."""
    logits = torch.zeros(VOCAB)
    spec = SamplingSpec(
        logit_bias={8: 4.0, 5: 50.0}, repetition_penalty=2.0, presence_penalty=0.5,
        min_tokens=6, stop_token_ids=(5,),
    )  # fmt: skip
    ours = adjusted(logits, spec)
    assert ours[8] == 4.0 / 2.0 - 0.5
    assert torch.isneginf(ours[5])
    stacked = logits[None]
    assert sample(stacked, [row_of(spec)])[0] == [8]


# ---- log probabilities


def test_logprobs_of_drawn_and_top_tokens() -> None:
    logits = logits_of(17, 1, VOCAB)
    expected = logits.log_softmax(-1)[0]
    spec = SamplingSpec(
        temperature=0.5, top_k=2, logit_bias={30: 90.0}, repetition_penalty=1.5, logprobs=4
    )
    (token,), (found,) = sample(logits, [row_of(spec)])
    assert token == 30
    assert found is not None
    assert found.token_id == 30
    assert found.logprob == pytest.approx(float(expected[30]), abs=2e-6)
    assert found.rank == 1 + int((logits[0] > logits[0, 30]).sum()) > 1
    assert found.top_ids == tuple(expected.topk(4).indices.tolist())
    assert found.top_logprobs == pytest.approx(expected.topk(4).values.tolist(), abs=2e-6)


def test_how_many_logprobs() -> None:
    logits = logits_of(18, 3, VOCAB)
    specs = [SamplingSpec(logprobs=count) for count in (-1, 0, 1000)]
    none, drawn, everything = sample(logits, [row_of(spec) for spec in specs])[1]
    assert none is None
    assert drawn is not None
    assert drawn.rank == 1
    assert drawn.top_ids == drawn.top_logprobs == ()
    assert everything is not None
    assert sorted(everything.top_ids) == list(range(VOCAB))
    assert sum(math.exp(value) for value in everything.top_logprobs) == pytest.approx(1, abs=1e-6)


def test_equal_logprobs_go_to_the_smaller_id_and_share_a_rank() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, -0.0, -torch.inf, 3.0]])
    (found,) = token_logprobs(logits, [6], [7])
    assert found.top_ids == (1, 2, 6, 0, 3, 4, 5)
    assert found.rank == 1
    assert found.top_logprobs[-1] == -math.inf


@pytest.mark.parametrize("num_top", [0, 3])
def test_prompt_logprobs_are_those_of_each_row(num_top: int) -> None:
    logits = logits_of(19, 37, 30_011, spread=6.0)
    token_ids = list(range(100, 137))
    expected = logits.double().log_softmax(-1)  # in fp32 torch itself is 6e-6 off here
    found = prompt_logprobs(logits, token_ids, num_top)
    for index, (token_id, each) in enumerate(zip(token_ids, found, strict=True)):
        assert each.token_id == token_id
        assert each.logprob == pytest.approx(float(expected[index, token_id]), abs=4e-6)
        assert len(each.top_ids) == num_top
        (alone,) = token_logprobs(logits[index : index + 1], [token_id], [num_top])
        assert alone == each
    assert prompt_logprobs(torch.empty(0, 9), [], 3) == ()


# ---- the noise itself


def uniforms(noise: torch.Tensor) -> torch.Tensor:
    """Undo the Gumbel transform."""
    return torch.exp(-torch.exp(-noise))


STREAMS = {
    "token": lambda: gumbel_noise(stream_key(1, 0, 0), torch.arange(100_000)),
    "position": lambda: gumbel_noise(keys_over(lambda n: (1, 0, n)), torch.tensor(7)),
    "seed": lambda: gumbel_noise(keys_over(lambda n: (n, 0, 3)), torch.tensor(7)),
    "choice": lambda: gumbel_noise(keys_over(lambda n: (1, n, 3)), torch.tensor(7)),
}


def keys_over(place: Callable[[int], tuple[int, int, int]]) -> torch.Tensor:
    return torch.tensor([stream_key(*place(number)) for number in range(100_000)])


@pytest.mark.parametrize("along", STREAMS)
def test_noise_is_uniform_beneath_and_independent_of_its_neighbours(along: str) -> None:
    noise = STREAMS[along]()
    count = len(noise)
    assert float(noise.mean()) == pytest.approx(0.5772157, abs=4 * 1.2825 / math.sqrt(count))
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.04)
    uniform = uniforms(noise)
    steps = torch.arange(1, count + 1) / count
    distance = (uniform.sort().values - steps).abs().max()
    assert distance < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov, p = 0.001
    for lag in (1, 2, 32, 1024):
        pair = torch.stack([uniform[:-lag], uniform[lag:]])
        assert abs(float(pair.corrcoef()[0, 1])) < 4 / math.sqrt(count)


def test_streams_next_to_one_another_are_independent() -> None:
    ids = torch.arange(100_000)
    base = uniforms(gumbel_noise(stream_key(5, 0, 9), ids))
    for neighbour in [(5, 0, 10), (5, 1, 9), (6, 0, 9), (5, 9, 0), (9, 0, 5), (-5, 0, 9)]:
        other = uniforms(gumbel_noise(stream_key(*neighbour), ids))
        assert abs(float(torch.stack([base, other]).corrcoef()[0, 1])) < 4 / math.sqrt(len(ids))


def test_a_vocabulary_shard_draws_the_same_noise() -> None:
    ids = torch.arange(1003)
    keys = torch.tensor([[stream_key(1, 2, 3)], [stream_key(2**62, 0, 10**6)]])
    whole = gumbel_noise(keys, ids)
    for shard in ids.split(77):
        torch.testing.assert_close(
            gumbel_noise(keys, shard), whole[:, shard], rtol=1e-14, atol=1e-14
        )
    assert torch.equal(ids, torch.arange(1003))


def test_the_hash_is_splitmix64() -> None:
    """The published generator's first outputs for seed 0, seen through the transform."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    expected = [-math.log(-math.log(((word >> 12) + 0.5) / 2**52)) for word in published]
    assert gumbel_noise(0, torch.arange(3)).tolist() == pytest.approx(expected, rel=1e-12)


def test_no_noise_reaches_the_bound() -> None:
    assert pytest.approx(53 * math.log(2)) == MAX_NOISE
    noise = gumbel_noise(stream_key(0, 0, 0), torch.arange(1_000_000))
    assert noise.isfinite().all()
    assert 11 < float(noise.max()) < MAX_NOISE

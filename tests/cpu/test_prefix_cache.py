"""The prefix cache with real models: the same tokens with it and without it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tests.support.compare import LOGIT_TOLERANCE, NUM_TOKENS, reference_of, worst_difference
from tests.support.replica import Replica
from tests.support.tiny_models import VOCAB, prompts, save_tiny_model

from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.scheduler import Scheduler
from spanwise.types.plan import TokenLogprobs
from spanwise.types.sampling import SamplingSpec

GREEDY = SamplingSpec(logprobs=VOCAB)
DRAWN = SamplingSpec(temperature=1.0, seed=5)
FAMILIES = ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "phi3"]
STEM = prompts()[7]  # 30 tokens: seven full blocks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


class Engine:
    """A replica that goes on from one call to the next, with the cache switched on or off."""

    def __init__(self, folder: Path, *, prefix_caching: bool = True, **options: int) -> None:
        self.replica = Replica(folder, **options)
        config = self.replica.scheduler._config
        self.scheduler = self.replica.scheduler = Scheduler(
            msgspec.structs.replace(config, prefix_caching=prefix_caching)
        )
        self.num_asked = 0

    def ask(
        self, given: list[list[int]], sampling: SamplingSpec = GREEDY, max_tokens: int = NUM_TOKENS
    ) -> list[list[int]]:
        """The tokens of every prompt, all asked at once."""
        self.cached = [0 for _ in given]
        self.logprobs: list[list[TokenLogprobs]] = [[] for _ in given]
        tokens: list[list[int]] = [[] for _ in given]
        for index, prompt in enumerate(given):
            self.scheduler.add(
                SequenceRequest(
                    sequence_id=self.num_asked + index,
                    prompt_token_ids=tuple(prompt),
                    sampling=msgspec.structs.replace(sampling, choice=index),
                    max_tokens=max_tokens,
                )
            )
        while self.scheduler.num_waiting or self.scheduler.num_running:
            plans = []
            while (plan := self.scheduler.next_plan()) is not None:
                plans.append(plan)
            for result in self.replica._execute(plans):
                for update in self.scheduler.accept(result):
                    index = update.sequence_id - self.num_asked
                    tokens[index] += update.token_ids
                    self.logprobs[index] += update.logprobs
                    self.cached[index] += update.num_cached_tokens
        self.num_asked += len(given)
        return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_asked_again_prompts_are_found_and_answers_stay_those_of_transformers(
    family: str, root: Path
) -> None:
    right = reference_of(family, root)
    max_step_tokens = 8 if FAMILIES.index(family) % 2 else 64
    engine = Engine(right.folder, max_step_tokens=max_step_tokens)
    off = Engine(right.folder, max_step_tokens=max_step_tokens, prefix_caching=False)
    for _ in range(2):
        assert engine.ask(right.prompts) == off.ask(right.prompts) == right.tokens
        assert worst_difference(right.tokens, engine.logprobs, right) < LOGIT_TOLERANCE
    for prompt, tokens in zip(right.prompts, right.tokens, strict=True):
        engine.ask([prompt], max_tokens=4)
        before = engine.scheduler.stats.planned_prefill_tokens
        assert engine.ask([prompt], max_tokens=4) == [tokens[:4]]
        found = (len(prompt) - 1) // 4 * 4
        assert engine.cached == [found]
        assert engine.scheduler.stats.planned_prefill_tokens - before == len(prompt) - found
    assert off.scheduler.stats.prefix_hit_tokens == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_begin_alike_share_within_a_batch(family: str, root: Path) -> None:
    folder = reference_of(family, root).folder
    tails = prompts(8, seed=1)
    given = [STEM[: 29 - 3 * index] + tail for index, tail in enumerate(tails)]
    on, off = Engine(folder), Engine(folder, prefix_caching=False)
    assert on.ask(given) == off.ask(given)
    assert sum(cached > 0 for cached in on.cached) >= 4
    assert on.ask(given[::-1]) == off.ask(given[::-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_of_one_prompt_share_it_and_differ(family: str, root: Path) -> None:
    folder = reference_of(family, root).folder
    on, off = Engine(folder), Engine(folder, prefix_caching=False)
    choices = on.ask([STEM] * 4, DRAWN)
    assert choices == off.ask([STEM] * 4, DRAWN)
    assert on.cached == [0, 28, 28, 28]
    assert len({tuple(choice) for choice in choices}) == 4


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3", "phi3"])
def test_a_conversation_goes_on_from_its_own_answers(family: str, root: Path) -> None:
    folder = reference_of(family, root).folder
    on, off = Engine(folder), Engine(folder, prefix_caching=False)
    talk = STEM[:13]
    for turn in range(4):
        (answer,) = on.ask([talk], max_tokens=11)
        assert [answer] == off.ask([talk], max_tokens=11)
        assert turn == 0 or on.cached[0] > 0 or family == "phi3"
        talk = talk + answer + STEM[turn : turn + 5]
    assert len(talk) > 40, "longer than the short factors hold"


@pytest.mark.parametrize(("family", "pp", "tp"), [("gemma2", 2, 1), ("deepseek_v3", 2, 2)])
def test_the_stages_and_ranks_of_a_replica_share_alike(
    family: str, pp: int, tp: int, root: Path
) -> None:
    right = reference_of(family, root)
    engine = Engine(right.folder, pp=pp, tp=tp, max_step_tokens=24)
    assert engine.ask(right.prompts) == right.tokens
    assert engine.ask(right.prompts) == right.tokens
    assert sum(engine.cached) > 60
    choices = engine.ask([STEM] * 3)
    assert choices == [right.tokens[7]] * 3


def test_blocks_are_reused_when_the_cache_is_full(root: Path) -> None:
    folder = root / "crowded"
    save_tiny_model("mistral", folder)
    on, off = Engine(folder), Engine(folder, prefix_caching=False)
    for seed in range(6):
        given = [STEM[: 4 * index] + p for index, p in enumerate(prompts(8, seed))]
        assert on.ask(given) == off.ask(given)
    (total,) = on.scheduler.stats.total_blocks
    kept = len(on.scheduler._pools[0]._kept)
    assert kept + len(on.scheduler._pools[0]._blank) == total
    assert on.scheduler.stats.prefix_hit_tokens > 100

"""A sequence's tokens do not depend on who shares its steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.compare import reference_of
from tests.support.replica import Replica
from tests.support.tiny_models import FAMILIES, LONG_ROPE, prompts

from spanwise.types.sampling import SamplingSpec

NUM_TOKENS = 12
ALONE = (0, 3, 5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_change_nothing(family: str, root: Path) -> None:
    right = reference_of(family, root)
    # Longer than the length at which long-RoPE changes its factors, and than every window.
    giant = [token for prompt in prompts(8, seed=1) for token in prompt][:70]
    assert len(giant) > int(LONG_ROPE["original_max_position_embeddings"])
    sampling = [SamplingSpec(), SamplingSpec(temperature=1.0, seed=3)]
    replica = Replica(right.folder, max_step_tokens=48)
    own = [right.prompts[index] for index in ALONE]
    mixed = [*own, *own, giant, *right.prompts[4:7]]
    specs = [sampling[0]] * 3 + [sampling[1]] * 3 + [sampling[0], *[sampling[1]] * 3]
    crowded, _ = replica.generate(mixed, NUM_TOKENS, specs)
    for index, prompt in enumerate(own):
        for kind in (0, 1):
            alone, _ = Replica(right.folder).generate([prompt], NUM_TOKENS, [sampling[kind]])
            assert crowded[index + 3 * kind] == alone[0]
        if len(prompt) + NUM_TOKENS <= 40:
            assert crowded[index] == right.tokens[ALONE[index]][:NUM_TOKENS]


def test_a_sequence_that_outgrows_short_factors_is_computed_anew(root: Path) -> None:
    """As transformers does for Phi-3; beside a neighbour that never outgrows them."""
    right = reference_of("phi3", root)
    crossing = [i for i, p in enumerate(right.prompts) if len(p) <= 40 < len(p) + 32]
    staying = [i for i, p in enumerate(right.prompts) if len(p) + 32 <= 40]
    assert crossing and staying
    chosen = [*crossing, *staying]
    tokens, _ = Replica(right.folder, pp=2).generate(
        [right.prompts[i] for i in chosen], 32, [SamplingSpec()] * len(chosen)
    )
    assert tokens == [right.tokens[i] for i in chosen]

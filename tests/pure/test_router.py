from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from spanwise.control.router import Router


def test_a_sequence_goes_where_the_fewest_tokens_are_outstanding() -> None:
    router = Router(3)
    assert [router.assign(i, tokens) for i, tokens in enumerate([10, 5, 7, 1, 1])] == [
        0, 1, 2, 1, 1,
    ]  # fmt: skip
    router.release(0)
    assert router.assign(5, 1) == 0


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 8))
def test_no_replica_is_more_than_one_sequence_ahead(sizes: list[int], replicas: int) -> None:
    router = Router(replicas)
    load = [0] * replicas
    for sequence_id, size in enumerate(sizes):
        chosen = router.assign(sequence_id, size)
        assert load[chosen] == min(load)
        load[chosen] += size
        assert router.replica_of(sequence_id) == chosen
    for sequence_id in range(len(sizes)):
        router.release(sequence_id)
    assert router.assign(len(sizes), 1) == 0

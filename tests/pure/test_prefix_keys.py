"""Keys of full blocks: equal where the cache holds the same, and nowhere else."""

from __future__ import annotations

import struct
import sys
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanwise.scheduler.key_chain import KeyChain, horizon

TOKENS = list(range(50, 70))


def keys(
    tokens: list[int] = TOKENS, salt: str = "", reach: int = sys.maxsize, block_size: int = 4
) -> list[bytes]:
    return KeyChain(salt, reach, block_size).keys(tokens, 0, len(tokens) // block_size)


def test_a_key_is_the_hash_over_the_one_before_and_the_tokens() -> None:
    root = sha256(b"40 2 pepper").digest()
    first = sha256(root + struct.pack("<II", 7, 70_000)).digest()
    second = sha256(first + struct.pack("<II", 8, 9)).digest()
    assert keys([7, 70_000, 8, 9, 10], "pepper", 40, 2) == [first, second]


def test_equal_beginnings_have_equal_keys_and_the_rest_differs() -> None:
    other = [*TOKENS[:9], 3, *TOKENS[10:]]
    same = [ours == theirs for ours, theirs in zip(keys(), keys(other), strict=True)]
    assert same == [True, True, False, False, False]


@pytest.mark.parametrize(
    "changes", [{"salt": "a"}, {"reach": 40}, {"salt": "0"}, {"salt": "\ud800"}, {"block_size": 5}]
)
def test_nothing_is_shared_under_another_root(changes: dict[str, object]) -> None:
    assert not set(keys()) & set(keys(**changes))  # type: ignore[arg-type]


def test_salt_and_horizon_cannot_be_taken_for_one_another() -> None:
    assert not set(keys(reach=4, salt="4 x")) & set(keys(reach=44, salt="x"))


def test_a_block_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []

    def counted(data: bytes) -> object:
        hashed.append(data)
        return sha256(data)

    monkeypatch.setattr("spanwise.scheduler.key_chain.sha256", counted)
    chain = KeyChain("", 9, 4)
    tokens = TOKENS[:9]
    first = chain.keys(tokens, 0, 2)
    tokens += TOKENS[9:]
    assert chain.keys(tokens, 1, 4)[0] == first[1]
    assert chain.keys(tokens, 0, 4)[:2] == first
    assert len(hashed) == 1 + 4, "the root and each block"


@given(st.lists(st.integers(0, 3), max_size=24), st.lists(st.integers(0, 3), max_size=24))
def test_keys_are_equal_exactly_where_all_tokens_up_to_there_are(
    ours: list[int], theirs: list[int]
) -> None:
    for index, (a, b) in enumerate(zip(keys(ours), keys(theirs), strict=False)):
        end = 4 * (index + 1)
        assert (a == b) == (ours[:end] == theirs[:end])


def test_the_horizon_is_the_next_length_of_recomputing() -> None:
    assert [horizon(n, (5, 9)) for n in (1, 5, 6, 9, 10)] == [5, 5, 9, 9, sys.maxsize]
    assert horizon(3, ()) == sys.maxsize

from __future__ import annotations

import hashlib
import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from spanwise.control.prefixes import PrefixMemory
from spanwise.control.router import Move, ReplicaQueue, Router

BLOCK = 16


def keys(name: str, num_blocks: int, after: tuple[bytes, ...] = ()) -> tuple[bytes, ...]:
    """A chain of block keys: each stands for its block and all before it."""
    chain = list(after)
    for index in range(num_blocks):
        parent = chain[-1] if chain else b""
        chain.append(hashlib.sha256(parent + f"{name} {index}".encode()).digest())
    return tuple(chain)


# --- least outstanding


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
        assert router.outstanding == tuple(load)
    for sequence_id in range(len(sizes)):
        router.release(sequence_id)
    assert router.outstanding == (0,) * replicas
    assert router.assign(len(sizes), 1) == 0


# --- prefixes


def test_a_known_prefix_draws_a_sequence_to_its_replica() -> None:
    router, prompt = Router(2, BLOCK), keys("a", 4)
    assert router.assign(0, 70, prompt) == 0
    assert router.assign(1, 10) == 1
    assert router.assign(2, 70, prompt) == 0
    assert router.outstanding == (70 + 6, 10), "what matches has not to be computed again"


def test_the_match_weighs_twice_its_tokens() -> None:
    prompt = keys("a", 4)
    for outstanding, expected in [(2 * 64, 1), (2 * 64 + 1, 0)]:
        router = Router(2, BLOCK)
        router.set_available(0, False)
        router.assign(0, 64, prompt)
        router.release(0)
        router.assign(1, outstanding)
        router.set_available(0, True)
        assert router.assign(2, 70, prompt) == expected


def test_the_longer_match_wins_among_equals() -> None:
    router, system = Router(3, BLOCK), keys("system", 2)
    longer = keys("user", 2, after=system)
    placed = [router.assign(i, 100, prefix) for i, prefix in enumerate([(), system, longer])]
    assert placed == [0, 1, 2], "100 tokens outstanding outweigh a match of 32"
    for sequence_id in range(3):
        router.release(sequence_id)
    assert router.assign(9, 100, longer) == 2
    router.release(9)
    assert router.assign(10, 100, keys("other", 1)) == 0


def test_choices_of_one_request_stay_together_while_that_saves_more_than_it_costs() -> None:
    long_prompt, short_prompt = keys("long", 64), keys("short", 2)
    router = Router(2, BLOCK)
    assert {router.assign(i, 64 * BLOCK + 32, long_prompt) for i in range(8)} == {0}
    router = Router(2, BLOCK)
    assert {router.assign(i, 2 * BLOCK + 512, short_prompt) for i in range(8)} == {0, 1}


def test_the_prefix_seen_longest_ago_is_forgotten_deepest_block_first() -> None:
    memory, first, second = PrefixMemory(5), keys("a", 3), keys("b", 3)
    memory.remember(first)
    memory.remember(second)
    assert (len(memory), memory.match(first), memory.match(second)) == (5, 2, 3)
    memory.remember(first[:1])
    memory.remember(keys("c", 2))
    assert memory.match(first) == 1, "touched last, so kept"
    assert memory.match(second) == 2
    memory.remember(keys("d", 9))
    assert (len(memory), memory.match(keys("d", 9))) == (5, 5)


@given(
    st.integers(0, 12),
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), max_size=30),
)
def test_memory_is_bounded_and_never_invents(max_blocks: int, paths: list[list[str]]) -> None:
    memory = PrefixMemory(max_blocks)
    given_so_far: set[bytes] = set()
    for path in paths:
        chain: tuple[bytes, ...] = ()
        for name in path:
            chain = keys(name, 1, after=chain)
        assert memory.match(chain) <= sum(key in given_so_far for key in chain)
        memory.remember(chain)
        given_so_far |= set(chain)
        assert len(memory) <= max_blocks
        assert memory.match(chain) == min(max_blocks, len(chain))
    memory.forget()
    assert len(memory) == 0


# --- replicas out of service


def test_a_replica_taken_out_gets_nothing_until_it_is_put_back() -> None:
    router = Router(2, BLOCK)
    router.set_available(0, False)
    assert [router.assign(i, 10) for i in range(3)] == [1, 1, 1]
    router.set_available(0, True)
    assert router.assign(3, 10) == 0


def test_a_replica_taken_out_loses_its_prefixes_and_keeps_its_sequences() -> None:
    router, prompt = Router(2, BLOCK), keys("a", 4)
    router.assign(0, 64, prompt)
    router.set_available(0, False)
    router.set_available(0, True)
    assert router.replica_of(0) == 0
    assert router.assign(1, 64, prompt) == 1


def test_with_every_replica_out_a_sequence_waits_where_least_is_outstanding() -> None:
    router = Router(2)
    router.assign(0, 10)
    for replica in range(2):
        router.set_available(replica, False)
    assert router.assign(1, 1) == 1


# --- moves


def busy_router(num_replicas: int, waiting: int, size: int = 10) -> Router:
    """A router with 0 to ``waiting - 1`` on replica 0."""
    router = Router(num_replicas, BLOCK)
    for replica in range(1, num_replicas):
        router.set_available(replica, False)
    for sequence_id in range(waiting):
        router.assign(sequence_id, size)
    for replica in range(1, num_replicas):
        router.set_available(replica, True)
    return router


def test_one_waiting_sequence_moves_to_each_idle_replica() -> None:
    router = busy_router(4, 5)
    queues = [
        ReplicaQueue((4, 3, 2)),
        ReplicaQueue((), True),
        ReplicaQueue((), False),
        ReplicaQueue((), True),
    ]
    assert router.moves(queues) == [Move(4, 0, 1), Move(3, 0, 3)]
    assert router.outstanding == (50, 0, 0, 0), "a decision changes nothing"
    router.move(4, 1)
    assert router.replica_of(4) == 1
    assert router.outstanding == (40, 10, 0, 0)


def test_nothing_moves_to_a_replica_that_is_out() -> None:
    router = busy_router(2, 3)
    router.set_available(1, False)
    assert router.moves([ReplicaQueue((2, 1)), ReplicaQueue((), True)]) == []


def test_what_moves_leaves_less_to_wait_for() -> None:
    prompt = keys("a", 2)
    router = Router(3, BLOCK)
    router.assign(0, 32, prompt)
    router.set_available(1, False)
    router.set_available(2, False)
    for sequence_id in (1, 2):
        router.assign(sequence_id, 64, prompt)
    router.set_available(1, True)
    router.set_available(2, True)
    idle = ReplicaQueue((), True)
    # Before 2 there are 32 + 32 tokens, as much as 2 * 32; once it has gone, 1 has 32 before it.
    assert router.moves([ReplicaQueue((2, 1)), idle, idle]) == [Move(2, 0, 1)]


def test_a_replica_keeps_the_sequence_it_can_start_itself() -> None:
    router = busy_router(2, 2)
    idle = ReplicaQueue((), True)
    assert router.moves([ReplicaQueue((1,), True), idle]) == []
    assert router.moves([ReplicaQueue((1, 0), True), idle]) == [Move(1, 0, 1)]


def test_a_sequence_stays_while_its_match_saves_more_than_the_wait() -> None:
    prompt = keys("a", 8)
    for ahead, moves in [(2 * 128 - 1, []), (2 * 128, [Move(1, 0, 1)])]:
        router = Router(2, BLOCK)
        router.assign(0, 128, prompt)
        router.release(0)
        router.set_available(1, False)
        router.assign(1, 130, prompt)
        router.assign(2, ahead)
        router.set_available(1, True)
        assert router.moves([ReplicaQueue((1,)), ReplicaQueue((), True)]) == moves


def test_what_waits_at_a_replica_that_is_out_goes_first() -> None:
    router = Router(3)
    for sequence_id, size in enumerate([100, 10, 1000]):
        router.assign(sequence_id, size)
    router.set_available(1, False)
    queues = [ReplicaQueue((0,)), ReplicaQueue((1,), True), ReplicaQueue((), True)]
    assert router.moves(queues) == [Move(1, 1, 2)]


def test_a_sequence_never_goes_back_unless_its_replica_is_out() -> None:
    router = busy_router(2, 2)
    router.move(1, 1)
    back = [ReplicaQueue((), True), ReplicaQueue((1,))]
    router.assign(2, 1000)
    assert router.moves(back) == []
    router.set_available(1, False)
    assert router.moves(back) == [Move(1, 1, 0)]


@given(st.integers(2, 5), st.integers(1, 25), st.integers(0, 2**32 - 1))
def test_moves_are_sound_whatever_the_replicas_say(
    num_replicas: int, num_sequences: int, seed: int
) -> None:
    chance = random.Random(seed)
    router = Router(num_replicas, BLOCK, max_prefix_blocks=6)
    waiting: list[list[int]] = [[] for _ in range(num_replicas)]
    tokens = {}
    for sequence_id in range(num_sequences):
        prefix = keys(chance.choice("abc"), chance.randint(0, 4))
        tokens[sequence_id] = len(prefix) * BLOCK + chance.randint(1, 80)
        waiting[router.assign(sequence_id, tokens[sequence_id], prefix)].append(sequence_id)
    been = {s: {r} for r, queue in enumerate(waiting) for s in queue}
    for _ in range(30):
        queues = [ReplicaQueue(tuple(reversed(queue)), chance.random() < 0.5) for queue in waiting]
        moves = router.moves(queues)
        assert moves == router.moves(queues)
        targets = [move.target for move in moves]
        assert len(set(targets)) == len(targets)
        assert len({move.sequence_id for move in moves}) == len(moves)
        for move in moves:
            assert queues[move.target] == ReplicaQueue((), True)
            assert move.target not in been[move.sequence_id]
            been[move.sequence_id].add(move.target)
            waiting[move.source].remove(move.sequence_id)
            waiting[move.target].append(move.sequence_id)
            router.move(move.sequence_id, move.target)
            assert router.replica_of(move.sequence_id) == move.target
        for queue in waiting:
            if queue and chance.random() < 0.3:
                router.release(queue.pop(0))
    assert all(
        0 <= load <= sum(tokens[s] for s in queue)
        for load, queue in zip(router.outstanding, waiting, strict=True)
    )
    for queue in waiting:
        for sequence_id in queue:
            router.release(sequence_id)
    assert router.outstanding == (0,) * num_replicas


def test_a_burst_on_one_replica_is_spread_and_then_comes_to_rest() -> None:
    router = busy_router(3, 30)
    waiting: list[list[int]] = [list(range(30)), [], []]
    running = [0, 0, 0]
    num_moves = 0
    while any(waiting):
        for replica, queue in enumerate(waiting):
            if queue and running[replica] < 12:
                queue.pop(0)
                running[replica] += 1
        queues = [
            ReplicaQueue(tuple(reversed(queue)), running[replica] < 12)
            for replica, queue in enumerate(waiting)
        ]
        for move in router.moves(queues):
            num_moves += 1
            waiting[move.source].remove(move.sequence_id)
            waiting[move.target].append(move.sequence_id)
            router.move(move.sequence_id, move.target)
    assert num_moves < 30
    assert max(running) <= 12
    assert router.outstanding == tuple(10 * num for num in running)


def test_an_idle_replica_takes_its_share_of_what_waits_but_no_more_than_it_has_places_for() -> None:
    router = Router(3)
    for is_there in (False, True):
        router.set_available(1, is_there)
        router.set_available(2, is_there)
        for sequence_id in range(0 if is_there else 7):
            assert router.assign(sequence_id, 1) == 0
    waiting = ReplicaQueue(tuple(range(6, -1, -1)))

    def taken(*idle: ReplicaQueue) -> Counter[int]:
        moves = router.moves([waiting, *idle])
        assert [move.source for move in moves] == [0] * len(moves)
        assert [move.sequence_id for move in moves] == list(range(6, 6 - len(moves), -1))
        return Counter(move.target for move in moves)

    roomy, busy = ReplicaQueue((), 8), ReplicaQueue((), 0)
    assert taken(roomy, busy) == {1: 4}
    assert taken(roomy, roomy) == {1: 3, 2: 3}
    assert taken(ReplicaQueue((), 2), busy) == {1: 2}


def test_a_group_stays_together_while_its_replica_is_there() -> None:
    router = Router(2)
    first = router.assign(0, 5, group="camera")
    router.assign(1, 1)
    assert [router.assign(i, 9, group="camera") for i in (2, 3)] == [first, first]
    router.set_available(first, False)
    assert router.assign(4, 9, group="camera") == 1 - first
    router.set_available(first, True)
    assert router.assign(5, 9, group="camera") == 1 - first, "where its last one went"

"""Shared prefixes by example: what is found, what is computed all the same, what is forgotten."""

from __future__ import annotations

import sys

import pytest
from tests.pure.scheduling import (
    EOS,
    add,
    add_prompt,
    answer,
    begun,
    make_scheduler,
    plan,
    rows,
    run,
)

from spanwise.scheduler.key_chain import KeyChain
from spanwise.scheduler.scheduler import Scheduler
from spanwise.types.cache import CacheGroup, CacheLayout
from spanwise.types.plan import Row
from spanwise.types.sampling import SamplingSpec

STEM = tuple(range(10, 40))


def after(stem: int, *tail: int) -> tuple[int, ...]:
    return (*STEM[:stem], *tail)


def starts(scheduler: Scheduler) -> dict[int, int]:
    """Where each sequence of the next plan starts."""
    return {row[0]: row[1] for row in rows(plan(scheduler))}


def computed(
    scheduler: Scheduler, sequence_id: int, prompt: tuple[int, ...], **changes: object
) -> int:
    """How many tokens it takes to run a prompt to its first token."""
    add_prompt(scheduler, sequence_id, prompt, max_tokens=1, **changes)
    return sum(row[2] for made in run(scheduler) for row in rows(made))


def test_a_prompt_goes_on_where_an_earlier_one_ended() -> None:
    scheduler = make_scheduler(max_in_flight=1)
    add_prompt(scheduler, 1, after(10), max_tokens=1)
    made = plan(scheduler)
    assert made.lanes[0].rows[0].new_blocks == ((0, 1, 2),)
    (update,) = answer(scheduler, made)
    assert update.num_cached_tokens == 0
    add_prompt(scheduler, 2, after(12, 5, 6), max_tokens=2)
    made = plan(scheduler)
    assert made.lanes[0].new[0].token_ids == after(12, 5, 6), "a rank is told all tokens"
    assert made.lanes[0].rows == (Row(2, 8, 6, 14, ((0, 1, 2, 3),), True),)
    told = [answer(scheduler, made)[0], answer(scheduler, plan(scheduler))[0]]
    assert [update.num_cached_tokens for update in told] == [8, 0]


@pytest.mark.parametrize(("num_prompt", "found"), [(4, 0), (5, 4), (8, 4), (9, 8), (11, 8)])
def test_the_last_token_is_computed_in_any_case(num_prompt: int, found: int) -> None:
    scheduler = make_scheduler()
    assert computed(scheduler, 1, after(num_prompt)) == num_prompt
    assert computed(scheduler, 2, after(num_prompt)) == num_prompt - found


def test_only_full_blocks_are_shared() -> None:
    scheduler = make_scheduler()
    computed(scheduler, 1, after(7))
    assert computed(scheduler, 2, after(7, 1, 2, 3)) == 6


def test_another_beginning_is_another_prefix() -> None:
    scheduler = make_scheduler()
    computed(scheduler, 1, after(12))
    assert computed(scheduler, 2, (1, *STEM[1:12])) == 12


def test_choices_of_one_prompt_share_it_from_the_first_step_on() -> None:
    scheduler = make_scheduler()
    for sequence_id in (1, 2, 3):
        add_prompt(scheduler, sequence_id, after(10))
    made = plan(scheduler)
    assert rows(made) == [(1, 0, 10, 10, True), (2, 8, 2, 10, True), (3, 8, 2, 10, True)]
    assert [row.new_blocks for row in made.lanes[0].rows] == [
        ((0, 1, 2),),
        ((0, 1, 3),),
        ((0, 1, 4),),
    ]
    assert scheduler.num_used_blocks == (5,)
    answer(scheduler, made, EOS)
    assert scheduler.num_used_blocks == (0,)


def test_choices_of_a_prompt_longer_than_a_step_wait_for_it() -> None:
    scheduler = make_scheduler(max_step_tokens=12, max_in_flight=9)
    for sequence_id in (1, 2):
        add_prompt(scheduler, sequence_id, after(30), max_tokens=1)
    made = [plan(scheduler) for _ in range(3)]
    assert [rows(m) for m in made] == [
        [(1, 0, 12, 30, False)],
        [(1, 12, 12, 30, False)],
        [(1, 24, 6, 30, True), (2, 28, 2, 30, True)],
    ]


def test_nobody_computes_what_a_running_prompt_is_about_to() -> None:
    """Sequence 9 has one token left; a full micro-batch of decodes goes before it."""
    scheduler = make_scheduler(num_micro_batches=2, max_in_flight=9, min_chunk_tokens=7)
    for sequence_id in (1, 2, 3):
        add(scheduler, sequence_id, 1)
    plan(scheduler)
    add_prompt(scheduler, 9, after(8), max_tokens=1)
    assert (9, 0, 7, 8, False) in rows(plan(scheduler))
    add_prompt(scheduler, 10, after(12), max_tokens=1)
    add(scheduler, 11, 2)
    made = plan(scheduler)
    assert 9 not in [row[0] for row in rows(made)]
    assert begun(made) == [11], "10 lets 11 pass"
    made = plan(scheduler)
    assert {9: 7, 10: 8}.items() <= {row[0]: row[1] for row in rows(made)}.items()


@pytest.mark.parametrize("end", ["abort", "priority"])
def test_nobody_waits_for_what_may_never_come(end: str) -> None:
    scheduler = make_scheduler(num_micro_batches=2, max_in_flight=9, min_chunk_tokens=7)
    for sequence_id in (1, 2, 3):
        add(scheduler, sequence_id, 1)
    plan(scheduler)
    add_prompt(scheduler, 9, after(8), max_tokens=1)
    plan(scheduler)
    if end == "abort":
        add_prompt(scheduler, 10, after(12), max_tokens=1)
        scheduler.abort(9)
    else:
        add_prompt(scheduler, 10, after(12), max_tokens=1, priority=-1)
    assert starts(scheduler)[10] == 4


def test_nobody_waits_for_what_can_be_found_already() -> None:
    scheduler = make_scheduler(num_micro_batches=2, max_in_flight=9, min_chunk_tokens=7)
    computed(scheduler, 0, after(8))
    for sequence_id in (1, 2, 3):
        add(scheduler, sequence_id, 1)
    plan(scheduler)
    scored = SamplingSpec(prompt_logprobs=0)
    add_prompt(scheduler, 9, after(8), max_tokens=1, sampling=scored)
    assert (9, 0, 7, 8, False) in rows(plan(scheduler))
    add_prompt(scheduler, 10, after(12), max_tokens=1)
    made = {row[0]: row[1] for row in rows(plan(scheduler))}
    assert 9 not in made
    assert made[10] == 8


def test_what_was_generated_is_found_by_the_next_turn() -> None:
    scheduler = make_scheduler()
    add_prompt(scheduler, 1, after(6), max_tokens=7)
    run(scheduler)  # draws 7 each time; the last token drawn is never computed
    assert computed(scheduler, 2, after(6, *[7] * 7, 1)) == 14 - 12
    scheduler = make_scheduler()
    add_prompt(scheduler, 1, after(6), max_tokens=6)
    run(scheduler)
    assert computed(scheduler, 2, after(6, *[7] * 6, 1)) == 13 - 8


def test_a_resumed_sequence_reports_only_its_prompt_as_cached() -> None:
    scheduler = make_scheduler()
    computed(scheduler, 1, after(20))
    add_prompt(scheduler, 2, after(10), output_token_ids=STEM[10:18])
    made = plan(scheduler)
    assert rows(made) == [(2, 16, 2, 18, True)]
    assert answer(scheduler, made)[0].num_cached_tokens == 10


@pytest.mark.parametrize("salts", [("", "a"), ("a", ""), ("a", "b")])
def test_salts_keep_prefixes_apart(salts: tuple[str, str]) -> None:
    scheduler = make_scheduler()
    needed = [
        computed(scheduler, sequence_id, after(10), cache_salt=salt)
        for sequence_id, salt in enumerate((*salts, *salts))
    ]
    assert needed == [10, 10, 2, 2]


def test_what_holds_for_short_sequences_only_is_not_shared_with_long_ones() -> None:
    scheduler = make_scheduler(recompute_lengths=(12,))
    assert computed(scheduler, 1, after(12)) == 12
    assert computed(scheduler, 2, after(13)) == 13
    assert computed(scheduler, 3, after(11)) == 3
    assert computed(scheduler, 4, after(14)) == 2


def test_a_sequence_that_grows_too_long_finds_nothing_of_its_own() -> None:
    scheduler = make_scheduler(recompute_lengths=(10,), max_in_flight=1)
    add_prompt(scheduler, 1, after(9), max_tokens=4)
    made = run(scheduler)
    assert [rows(m)[0][1:3] for m in made] == [(0, 9), (9, 1), (0, 11), (11, 1)]


@pytest.mark.parametrize(
    "changes", [{"sampling": SamplingSpec(prompt_logprobs=0)}, {"task": "pool_mean"}]
)
def test_who_needs_every_position_computes_it_and_shares_it(changes: dict[str, object]) -> None:
    scheduler = make_scheduler()
    computed(scheduler, 1, after(8))
    assert computed(scheduler, 2, after(16), **changes) == 16
    assert computed(scheduler, 3, after(17)) == 1


def test_pooling_the_last_position_reuses_the_rest() -> None:
    scheduler = make_scheduler()
    computed(scheduler, 1, after(8))
    add_prompt(scheduler, 2, after(9), task="pool_last")
    made = plan(scheduler)
    assert rows(made) == [(2, 8, 1, 9, True)]
    assert answer(scheduler, made)[0].num_cached_tokens == 8


def test_switched_off_nothing_is_shared() -> None:
    scheduler = make_scheduler(prefix_caching=False)
    for sequence_id in (1, 2):
        assert computed(scheduler, sequence_id, after(10)) == 10
    assert scheduler.stats.prefix_queried_tokens == 0


def test_a_restart_forgets_every_prefix() -> None:
    scheduler = make_scheduler()
    computed(scheduler, 1, after(10))
    scheduler.restart(1)
    assert computed(scheduler, 2, after(10)) == 10
    assert computed(scheduler, 3, after(10)) == 2


def test_a_preempted_sequence_finds_what_is_left_of_its_own() -> None:
    scheduler = make_scheduler(num_blocks=6, max_in_flight=1)
    add(scheduler, 1, 11, max_tokens=4)
    add(scheduler, 2, 11, max_tokens=10)
    made = []
    while 2 not in [i for m in made for i in m.lanes[0].dropped]:
        made.append(plan(scheduler))
        answer(scheduler, made[-1])
    assert rows(made[-1]) == [(1, 12, 1, 13, True)], "a fourth block for 1"
    later = run(scheduler)
    (back,) = [row for m in later for row in rows(m) if begun(m) == [2] and row[0] == 2]
    # Of its three blocks the last was taken, as the end of a prefix goes first.
    assert back[1] == 8


def test_untouched_blocks_are_taken_before_kept_ones() -> None:
    scheduler = make_scheduler(num_blocks=8)
    computed(scheduler, 1, after(10))
    add(scheduler, 2, 17, max_tokens=1)
    assert plan(scheduler).lanes[0].rows[0].new_blocks == ((2, 3, 4, 5, 6),)


def test_what_was_used_longest_ago_goes_first_and_of_that_the_end() -> None:
    scheduler = make_scheduler(num_blocks=8)
    old, new = after(13), (1, *STEM[1:13])
    computed(scheduler, 1, old)  # keeps three blocks
    computed(scheduler, 2, new)  # three more
    computed(scheduler, 3, old)  # used again: now the second is the older one
    add(scheduler, 4, 13, max_tokens=1)  # two blocks are blank, two of the second go
    run(scheduler)
    assert computed(scheduler, 5, old) == 1
    assert computed(scheduler, 6, new) == 9


def test_a_block_in_use_is_never_taken() -> None:
    scheduler = make_scheduler(num_blocks=4, max_in_flight=1)
    add_prompt(scheduler, 1, after(9), max_tokens=4)
    answer(scheduler, plan(scheduler))
    add_prompt(scheduler, 2, after(9), max_tokens=2)
    made = plan(scheduler)
    assert rows(made) == [(1, 9, 1, 10, True), (2, 8, 1, 9, True)]
    assert scheduler.num_used_blocks == (4,)
    add(scheduler, 3, 3, max_tokens=1)
    answer(scheduler, made)
    assert 3 not in starts(scheduler), "all four are held, two of them twice"


# Windows.


def windowed(window: int, num_blocks: int = 50) -> Scheduler:
    cache = CacheLayout(4, (CacheGroup((0,), 0, 50), CacheGroup((1,), window, num_blocks)))
    return make_scheduler(cache=cache, max_in_flight=1)


@pytest.mark.parametrize(
    ("window", "read"), [(1, ()), (2, (3,)), (5, (3,)), (6, (2, 3)), (9, (2, 3)), (10, (1, 2, 3))]
)
def test_a_windowed_group_brings_what_is_still_read(window: int, read: tuple[int, ...]) -> None:
    scheduler = windowed(window)
    computed(scheduler, 1, after(17))
    add_prompt(scheduler, 2, after(17))
    made = plan(scheduler)
    assert rows(made) == [(2, 16, 1, 17, True)]
    full, behind = made.lanes[0].rows[0].new_blocks
    assert full[:4] == (0, 1, 2, 3) and len(full) == 5
    assert len(behind) == 5
    assert behind[4 - len(read) : 4] == read
    assert scheduler.num_used_blocks == (5, len(read) + 1)


@pytest.mark.parametrize("window", [3, 5, 6])
def test_a_window_that_lacks_a_block_makes_the_hit_shorter(window: int) -> None:
    """After 16 tokens blocks 2 and 3 are read, or 3 alone; after 12 blocks 1 and 2, or 2."""
    scheduler = windowed(window)
    computed(scheduler, 1, after(17))
    keys = KeyChain("", sys.maxsize, 4).keys(after(17), 0, 4)
    lost = scheduler._pools[1].find(keys[3])
    scheduler._pools[1]._index.discard(lost)
    scheduler._pools[1]._index.add(b"of another prefix", lost)
    assert computed(scheduler, 2, after(17)) == 17 - 12


def test_a_hit_holds_for_every_group_at_once() -> None:
    cache = CacheLayout(4, (CacheGroup((0,), 0, 6), CacheGroup((1,), 9, 50)))
    scheduler = make_scheduler(cache=cache, max_in_flight=1)
    computed(scheduler, 1, after(21))
    add(scheduler, 2, 12, max_tokens=1)  # of the full group one blank block and two kept ones
    run(scheduler)
    assert computed(scheduler, 3, after(21)) == 21 - 12

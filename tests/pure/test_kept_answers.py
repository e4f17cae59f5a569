"""Which answers may be asked for again, and what is said of them then."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanwise.control.answers import Answers
from spanwise.control.replay import Replay
from spanwise.errors import KeyReusedError
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import TokenLogprobs
from spanwise.types.resume import AnswerName, Resume


def resume(key: str, part: int = 0, body: str = "body") -> Resume:
    return Resume(key.encode(), body.encode(), AnswerName("id", 1), part)


# --- how long


def test_an_answer_is_found_from_its_beginning_to_the_end_of_its_window() -> None:
    answers = Answers[str](60.0)
    assert answers.find(resume("k")) is None
    answers.begin(resume("k"), "it")
    assert answers.find(resume("k")) == "it" and answers.wake_at_s is None
    assert answers.expire(1e9) == [], "it runs"
    assert answers.end(resume("k"), 10, now_s=5.0) == []
    assert answers.wake_at_s == 65.0
    assert answers.expire(64.9) == [] and answers.find(resume("k")) == "it"
    assert answers.expire(65.0) == ["it"]
    assert answers.find(resume("k")) is None and answers.wake_at_s is None and len(answers) == 0


def test_a_window_of_nothing_keeps_what_runs_and_nothing_else() -> None:
    answers = Answers[str](0.0)
    answers.begin(resume("k"), "it")
    assert answers.find(resume("k")) == "it"
    assert answers.end(resume("k"), 10, now_s=5.0) == ["it"]


def test_a_key_means_one_request() -> None:
    answers = Answers[str](60.0)
    answers.begin(resume("k"), "it")
    with pytest.raises(KeyReusedError, match="new key"):
        answers.find(resume("k", body="other"))
    assert answers.find(resume("K", body="other")) is None


def test_the_window_begins_when_the_last_part_has_ended() -> None:
    answers = Answers[str](60.0)
    for part in range(2):
        answers.begin(resume("k", part), f"part {part}")
    answers.end(resume("k", 0), 10, now_s=0.0)
    assert answers.wake_at_s is None
    answers.end(resume("k", 1), 10, now_s=50.0)
    assert answers.wake_at_s == 110.0
    answers.begin(resume("k", 2), "part 2")
    assert answers.wake_at_s is None, "a part that comes later is waited for too"
    answers.end(resume("k", 2), 10, now_s=100.0)
    assert answers.expire(160.0) == ["part 0", "part 1", "part 2"]


def test_what_ended_first_makes_room() -> None:
    answers = Answers[int](60.0, max_bytes=100)
    for number in range(4):
        answers.begin(resume(str(number)), number)
    assert [answers.end(resume(str(n)), 40, now_s=float(n)) for n in (2, 0, 3)] == [[], [], [2]]
    assert answers.end(resume("1"), 101, now_s=4.0) == [0, 3, 1], "too large to be kept at all"


def test_forgotten_answers_take_no_room() -> None:
    answers = Answers[str](60.0, max_bytes=100)
    for key in "ab":
        answers.begin(resume(key), key)
        answers.end(resume(key), 50, now_s=0.0)
    assert answers.forget(b"a") == ["a"]
    answers.begin(resume("c"), "c")
    assert answers.end(resume("c"), 50, now_s=1.0) == []
    answers.clear()
    assert len(answers) == 0 and answers.wake_at_s is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60), st.floats(0, 5)), max_size=60))
def test_what_has_ended_never_takes_more_than_it_may(
    steps: list[tuple[int, int, float]],
) -> None:
    answers, kept, now_s = Answers[str](10.0, max_bytes=100), {}, 0.0
    for key, size, passed_s in steps:
        now_s += passed_s
        for gone in answers.expire(now_s):
            del kept[gone]
        name = str(key)
        if answers.find(resume(name)) is None:
            answers.begin(resume(name), name)
            kept[name] = size
            for gone in answers.end(resume(name), size, now_s):
                del kept[gone]
        assert sum(kept.values()) <= 100
        assert len(answers) == len(kept)


# --- what is said again


def logprobs(token_id: int, num_top: int = 0) -> TokenLogprobs:
    return TokenLogprobs(token_id, -1.0, 1, tuple(range(num_top)), (-1.0,) * num_top)


def test_updates_are_said_again_in_one() -> None:
    replay = Replay((7, 8), 2)
    assert replay.updates() == []
    replay.take(
        1,
        SequenceUpdate(
            sequence_id=4,
            token_ids=(1,),
            logprobs=(logprobs(1),),
            prompt_logprobs=(logprobs(8),),
            num_cached_tokens=1,
        ),
        100,
    )
    replay.take(1, SequenceUpdate(sequence_id=4, token_ids=(2,), logprobs=(logprobs(2),)), 101)
    end = SequenceUpdate(sequence_id=3, token_ids=(5,), finish_reason="stop", stop_reason=5)
    replay.take(0, end, 102)
    whole = SequenceUpdate(
        sequence_id=4,
        token_ids=(1, 2),
        logprobs=(logprobs(1), logprobs(2)),
        prompt_logprobs=(logprobs(8),),
        num_cached_tokens=1,
    )
    assert replay.updates() == [(0, end, 102), (1, whole, 101)]


def test_a_choice_that_was_cut_ends_after_its_tokens() -> None:
    """Whoever reads it finds the end in the text; the last update is for who does not."""
    replay = Replay((7,), 1)
    for token_id in (1, 2, 3):
        reason = "length" if token_id == 3 else None
        replay.take(
            0, SequenceUpdate(sequence_id=0, token_ids=(token_id,), finish_reason=reason), 9
        )
    replay.cut(0, 3)
    assert [update.finish_reason for _, update, _ in replay.updates()] == ["length"]
    replay.cut(0, 2)
    replay.cut(0, 5)
    assert [(u.token_ids, u.finish_reason) for _, u, _ in replay.updates()] == [
        ((1, 2), None),
        ((), "stop"),
    ]


def test_what_is_kept_is_counted() -> None:
    small, large = Replay((1,) * 10, 1), Replay((1,) * 10_000, 1)
    assert large.num_bytes - small.num_bytes >= 9_990 * 8
    before = small.num_bytes
    small.take(0, SequenceUpdate(sequence_id=0, token_ids=(1,), logprobs=(logprobs(1, 20),)), 0)
    assert small.num_bytes - before >= 20 * 16

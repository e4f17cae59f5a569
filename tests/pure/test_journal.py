from __future__ import annotations

import random
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanwise.control.entries import (
    Accepted,
    Admitted,
    ChoiceRecord,
    Entry,
    Finished,
    Forgotten,
    Progress,
    Sent,
)
from spanwise.control.frames import FrameChain
from spanwise.control.journal import Journal
from spanwise.errors import EngineError
from spanwise.scheduler.request import SequenceRequest
from spanwise.types.outputs import FinishReason
from spanwise.types.plan import TokenLogprobs
from spanwise.types.sampling import Grammar, SamplingSpec

RICH = SamplingSpec(
    temperature=0.7,
    seed=2**63 - 1,
    choice=1,
    logit_bias={5: -1.5, 70_000: 2.0},
    stop_token_ids=(2, 3),
    logprobs=2,
    grammar=Grammar("regex", "[a-z]+é"),
)
LOGPROBS = TokenLogprobs(9, -0.25, 1, (9, 4), (-0.25, -3.5))


def admitted(request_id: int = 1, *sequence_ids: int) -> Admitted:
    choices = tuple(ChoiceRecord(s, SamplingSpec(choice=i)) for i, s in enumerate(sequence_ids))
    return Admitted(request_id=request_id, prompt_token_ids=(1, 2, 3), choices=choices)


# --- the fold


def test_a_request_is_resumed_with_the_tokens_it_has() -> None:
    sampling = msgspec.structs.replace(RICH, logprobs=-1)
    for_scheduler: dict[str, Any] = {"priority": 2, "tenant": "t", "cache_salt": "s"}
    request = Admitted(
        request_id=4,
        prompt_token_ids=(1, 2, 3),
        choices=(ChoiceRecord(10, SamplingSpec()), ChoiceRecord(11, sampling)),
        max_tokens=8,
        stop_token_ids=(0,),
        **for_scheduler,
        deadline_s=50.0,
    )
    journal = Journal([request, Accepted((10, 11), (7, 8)), Accepted((11, 11), (9, 6))])
    assert journal.live() == [
        SequenceRequest(
            sequence_id=10,
            prompt_token_ids=(1, 2, 3),
            max_tokens=8,
            stop_token_ids=(0,),
            output_token_ids=(7,),
            **for_scheduler,
        ),
        SequenceRequest(
            sequence_id=11,
            prompt_token_ids=(1, 2, 3),
            sampling=sampling,
            max_tokens=8,
            stop_token_ids=(0,),
            output_token_ids=(8, 9, 6),
            **for_scheduler,
        ),
    ]


def test_a_deadline_holds_until_the_first_token() -> None:
    journal = Journal([msgspec.structs.replace(admitted(1, 10), deadline_s=50.0)])
    assert [sequence.deadline_s for sequence in journal.live()] == [50.0]
    journal.apply(Accepted((10,), (7,)))
    assert [sequence.deadline_s for sequence in journal.live()] == [None]


def test_a_pooled_prompt_is_resumed_as_what_it_is() -> None:
    request = msgspec.structs.replace(admitted(1, 10), task="pool_mean")
    assert [s.task for s in Journal([request]).live()] == ["pool_mean"]


def test_a_finished_choice_is_kept_until_its_request_is_forgotten() -> None:
    end = Finished(10, "stop", 7)
    journal = Journal([admitted(1, 10, 11), Accepted((10, 11), (7, 8), (end,))])
    assert [sequence.sequence_id for sequence in journal.live()] == [11]
    (state,) = journal.snapshot()
    assert state.choices[0].token_ids == (7,)
    assert (state.choices[0].finish_reason, state.choices[0].stop_reason) == ("stop", 7)
    journal.apply(Forgotten(1))
    assert (len(journal), journal.live(), journal.snapshot()) == (0, [], [])


def test_what_is_forgotten_leaves_nothing_behind() -> None:
    again = admitted(1, 10)
    journal = Journal([again, Accepted((10,), (7,)), Forgotten(1), again])
    assert journal.snapshot() == [again]
    with pytest.raises(KeyError):
        Journal([again, Forgotten(1), Accepted((10,), (7,))])


def test_a_stop_string_found_late_cuts_what_came_after_it() -> None:
    wants = Admitted(request_id=1, prompt_token_ids=(1,), choices=(ChoiceRecord(10, RICH),))
    journal = Journal(
        [
            wants,
            Accepted((10,) * 4, (5, 6, 7, 8), (Finished(10, "length"),), (LOGPROBS,) * 4),
            Sent((Progress(10, 3, 1),)),
            Finished(10, "stop", "END", num_tokens=2),
        ]
    )
    (choice,) = journal.snapshot()[0].choices
    assert (choice.token_ids, choice.logprobs) == ((5, 6), (LOGPROBS,))
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "END")


def test_logprobs_are_kept_until_their_tokens_are_sent() -> None:
    other = msgspec.structs.replace(LOGPROBS, token_id=4)
    wants = Admitted(request_id=1, prompt_token_ids=(1,), choices=(ChoiceRecord(10, RICH),))
    plain = admitted(2, 20)
    journal = Journal(
        [wants, plain, Accepted((10, 20, 10), (9, 5, 4), (), (LOGPROBS, None, other))]
    )
    assert journal.snapshot()[0].choices[0].logprobs == (LOGPROBS, other)
    journal.apply(Sent((Progress(10, 2, 1), Progress(20, 1, 1))))
    state = journal.snapshot()
    assert state[0].choices[0].logprobs == (other,)
    assert state[0].choices[0].num_chars_sent == 2
    assert state[1].choices[0].num_tokens_sent == 1


CONTRADICTIONS: list[list[Entry]] = [
    [admitted(1, 10), admitted(1, 11)],
    [admitted(1, 10), admitted(2, 10)],
    [admitted(1, 10), Finished(10, "stop"), Accepted((10,), (1,))],
    [admitted(1, 10), Sent((Progress(10, 1, 1),))],
    [admitted(1, 10), Sent((Progress(10, 5, 0),)), Sent((Progress(10, 4, 0),))],
    [admitted(1, 10), Finished(10, "stop", None, 1)],
]


@pytest.mark.parametrize("entries", CONTRADICTIONS)
def test_an_entry_that_contradicts_the_others_is_an_error(entries: list[Entry]) -> None:
    with pytest.raises(AssertionError):
        Journal(entries)


# --- random histories against a model with nothing but lists


@dataclass
class ModelChoice:
    request: Admitted
    record: ChoiceRecord
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    num_chars: int = 0
    num_sent: int = 0
    end: tuple[FinishReason, int | str | None] | None = None


History = tuple[list[Entry], list[ModelChoice]]


def make_history(num_steps: int, seed: int) -> History:
    """Entries that could be, and the choices not forgotten after them."""
    chance = random.Random(seed)
    entries: list[Entry] = []
    choices: list[ModelChoice] = []
    for step in range(num_steps):
        kind = chance.choice(["admit", "accept", "accept", "send", "finish", "forget"])
        open_choices = [c for c in choices if c.end is None]
        if kind == "admit":
            request = make_request(chance, 10 * step)
            entries.append(request)
            choices += [ModelChoice(request, record) for record in request.choices]
        elif kind == "accept" and open_choices:
            entries.append(_accept(chance, open_choices))
        elif kind == "send" and choices:
            entries.append(_send(chance, choices))
        elif kind == "finish" and open_choices:
            entries.append(_finish(chance, chance.choice(open_choices)))
        elif kind == "forget" and choices:
            request_id = chance.choice(choices).request.request_id
            entries.append(Forgotten(request_id))
            choices = [c for c in choices if c.request.request_id != request_id]
    return entries, choices


# From a seed: drawn one by one, histories would take most of the time of these tests.
histories = st.builds(make_history, st.integers(0, 30), st.integers(0, 2**32 - 1))


def make_request(chance: random.Random, first_id: int) -> Admitted:
    samplings = chance.choices([SamplingSpec(), RICH], k=chance.randint(1, 3))
    return Admitted(
        request_id=first_id,
        prompt_token_ids=_tokens(chance, chance.randint(1, 6)),
        # Ids fall: an order taken from ids would show.
        choices=tuple(ChoiceRecord(first_id + 9 - i, s) for i, s in enumerate(samplings)),
        max_tokens=chance.choice([None, 1, 9]),
        stop_token_ids=chance.choice([(), (2,)]),
        stop_strings=chance.choice([(), ("END", "é")]),
        skip_special_tokens=chance.random() < 0.5,
        priority=chance.randint(-3, 3),
        tenant=chance.choice(["", "a"]),
        cache_salt=chance.choice(["", "s"]),
        deadline_s=chance.choice([None, 1e9 * chance.random()]),
    )


def _tokens(chance: random.Random, count: int) -> tuple[int, ...]:
    return tuple(chance.choice([0, 100, 200, 70_000, 200_000]) for _ in range(count))


def _accept(chance: random.Random, choices: list[ModelChoice]) -> Accepted:
    named = chance.choices(choices, k=chance.randint(1, 5))
    tokens = _tokens(chance, len(named))
    logprobs = [LOGPROBS if c.record.sampling.logprobs >= 0 else None for c in named]
    for choice, token, logprob in zip(named, tokens, logprobs, strict=True):
        choice.tokens.append(token)
        choice.logprobs.append(logprob)
    ended = [named[-1]] if chance.random() < 0.3 else []
    return Accepted(
        tuple(c.record.sequence_id for c in named),
        tokens,
        tuple(_finish(chance, c) for c in ended),
        tuple(logprobs) if any(logprobs) else (),
    )


def _finish(chance: random.Random, choice: ModelChoice) -> Finished:
    reason: FinishReason = chance.choice(["stop", "length", "deadline"])
    stop_reason = chance.choice([None, 2, "END"])
    num_tokens = chance.choice([None, chance.randint(choice.num_sent, len(choice.tokens))])
    choice.end = (reason, stop_reason)
    if num_tokens is not None:
        del choice.tokens[num_tokens:], choice.logprobs[num_tokens:]
    return Finished(choice.record.sequence_id, reason, stop_reason, num_tokens)


def _send(chance: random.Random, choices: list[ModelChoice]) -> Sent:
    progress = []
    for choice in chance.choices(choices, k=chance.randint(1, 3)):
        choice.num_chars += chance.randint(0, 9)
        choice.num_sent = chance.randint(choice.num_sent, len(choice.tokens))
        progress.append(Progress(choice.record.sequence_id, choice.num_chars, choice.num_sent))
    return Sent(tuple(progress))


def model_choice(choice: ModelChoice) -> ChoiceRecord:
    reason, stop_reason = choice.end or (None, None)
    return ChoiceRecord(
        sequence_id=choice.record.sequence_id,
        sampling=choice.record.sampling,
        token_ids=tuple(choice.tokens),
        logprobs=tuple(p for p in choice.logprobs[choice.num_sent :] if p is not None),
        num_chars_sent=choice.num_chars,
        num_tokens_sent=choice.num_sent,
        finish_reason=reason,
        stop_reason=stop_reason,
    )


@given(histories)
def test_the_fold_is_what_a_naive_model_says(
    history: History,
) -> None:
    entries, choices = history
    journal = Journal(entries)
    assert [(s.sequence_id, s.output_token_ids, s.sampling) for s in journal.live()] == [
        (c.record.sequence_id, tuple(c.tokens), c.record.sampling) for c in choices if c.end is None
    ]
    ids = list(dict.fromkeys(c.request.request_id for c in choices))
    asked = {c.request.request_id: c.request for c in choices}
    assert journal.snapshot() == [
        msgspec.structs.replace(
            asked[i],
            choices=tuple(model_choice(c) for c in choices if c.request.request_id == i),
        )
        for i in ids
    ]
    assert len(journal) == len(ids)


@given(histories, st.data())
def test_a_snapshot_stands_for_the_entries_before_it(history: History, data: st.DataObject) -> None:
    entries, _ = history
    cut = data.draw(st.integers(0, len(entries)))
    snapshot = Journal(entries[:cut]).snapshot()
    assert Journal(snapshot).snapshot() == snapshot
    whole, compacted = Journal(entries), Journal([*snapshot, *entries[cut:]])
    assert compacted.snapshot() == whole.snapshot()
    assert compacted.live() == whole.live()


# --- frames


def frames(entries: list[Entry], generation: int = 0) -> list[bytes]:
    chain = FrameChain(generation)
    return [chain.encode(entry) for entry in entries]


@given(histories, st.data())
def test_any_prefix_of_the_bytes_gives_a_prefix_of_the_entries(
    history: History, data: st.DataObject
) -> None:
    entries, _ = history
    parts = frames(entries)
    log = b"".join(parts)
    cut = data.draw(st.integers(0, len(log)))
    decoded, taken = FrameChain().decode(log[:cut])
    num_whole = len(decoded)
    assert decoded == entries[:num_whole]
    assert taken == len(b"".join(parts[:num_whole])) <= cut
    if num_whole < len(parts):
        assert cut < taken + len(parts[num_whole]), "a whole frame was dropped"
    padded = log[:cut] + bytes(data.draw(st.integers(1, 64)))
    again, taken_padded = FrameChain().decode(padded)
    # A frame whose last bytes are zeros is whole without them having been written.
    assert entries[:num_whole] == again[:num_whole]
    assert again == entries[: len(again)]
    assert taken_padded >= taken


@given(histories, st.data())
def test_a_damaged_byte_ends_the_log_there(history: History, data: st.DataObject) -> None:
    parts = frames(history[0])
    log = bytearray(b"".join(parts))
    if not log:
        return
    place = data.draw(st.integers(0, len(log) - 1))
    log[place] ^= data.draw(st.integers(1, 255))
    decoded, taken = FrameChain().decode(log)
    assert decoded == history[0][: len(decoded)]
    assert taken <= place < taken + len(parts[len(decoded)])


@given(histories, histories, st.data())
def test_a_writer_goes_on_over_a_torn_tail(
    first: History,
    second: History,
    data: st.DataObject,
) -> None:
    log = b"".join(frames(first[0]))
    segment = bytearray(len(log) + (1 << 16))
    cut = data.draw(st.integers(0, len(log)))
    segment[:cut] = log[:cut]
    chain = FrameChain()
    before, taken = chain.decode(segment)
    for entry in second[0]:
        frame = chain.encode(entry)
        segment[taken : taken + len(frame)] = frame
        taken += len(frame)
    assert FrameChain().decode(segment) == ([*before, *second[0]], taken)


@given(histories, histories)
def test_a_log_written_over_another_never_ends_in_its_remains(old: History, new: History) -> None:
    old_frames, new_frames = frames(old[0], 1), frames(new[0], 2)
    # The worst place: where the new log ends, an old frame begins.
    for begin in range(len(old_frames)):
        segment = b"".join([*new_frames, *old_frames[begin:]])
        decoded, taken = FrameChain(2).decode(segment)
        assert (decoded, taken) == (new[0], len(b"".join(new_frames)))
    if old[0]:
        assert FrameChain(2).decode(b"".join(old_frames)) == ([], 0)


def test_a_step_costs_a_few_bytes_a_token() -> None:
    step = Accepted(tuple(range(100_000, 100_064)), tuple(range(64_000, 64_064)))
    assert len(FrameChain().encode(step)) < 64 * 9


def test_empty_and_zeroed_memory_holds_nothing() -> None:
    assert FrameChain().decode(b"") == ([], 0)
    assert FrameChain().decode(bytes(4096)) == ([], 0)


def test_a_whole_frame_of_another_version_is_refused() -> None:
    body = msgspec.msgpack.encode([99, "later"])
    seed = zlib.crc32(struct.pack("<Q", 0))
    checksum = zlib.crc32(struct.pack("<I", len(body)) + body, seed)
    frame = struct.pack("<II", len(body), checksum) + body
    with pytest.raises(EngineError, match="another version"):
        FrameChain().decode(frame)

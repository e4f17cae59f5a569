"""What the engine writes to its journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spanwise.control.entries import Accepted, Admitted, ChoiceRecord, Finished
from spanwise.engine.messages import Admit, Submit
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import TokenLogprobs
from spanwise.types.sampling import SamplingSpec


def admitted(
    number: int, asked: Admit, wanted: Submit, specs: Mapping[int, SamplingSpec]
) -> Admitted:
    """A request that begins; ``specs`` are its choices by sequence."""
    return Admitted(
        request_id=number,
        prompt_token_ids=wanted.prompt_token_ids,
        choices=tuple(ChoiceRecord(each, spec) for each, spec in specs.items()),
        max_tokens=wanted.max_tokens,
        stop_token_ids=wanted.stop_token_ids,
        stop_strings=wanted.stop_strings,
        skip_special_tokens=wanted.skip_special_tokens,
        task=wanted.task,
        priority=wanted.priority,
        tenant=asked.tenant,
        cache_salt=wanted.cache_salt,
        deadline_s=wanted.deadline_s,
        resume=asked.resume,
    )


def accepted(updates: Sequence[SequenceUpdate]) -> Accepted:
    """What of a step's updates must survive. A pooled prompt is done once its vector has left."""
    tokens = [(each.sequence_id, token) for each in updates for token in each.token_ids]
    ends = [
        Finished(each.sequence_id, each.finish_reason, each.stop_reason)
        for each in updates
        if each.finish_reason is not None and each.pooled is None
    ]
    logprobs = tuple(x for each in updates for x in _logprobs(each))
    return Accepted(
        tuple(sequence_id for sequence_id, _ in tokens),
        tuple(token for _, token in tokens),
        tuple(ends),
        logprobs if any(x is not None for x in logprobs) else (),
    )


def _logprobs(update: SequenceUpdate) -> tuple[TokenLogprobs | None, ...]:
    return update.logprobs or (None,) * len(update.token_ids)

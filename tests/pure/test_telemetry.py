"""What is counted of sequences, by a clock of the test's own."""

from __future__ import annotations

from itertools import count
from typing import Any

from tests.pure.scheduling import add, make_scheduler, plan

from spanwise.engine.telemetry import Telemetry
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import StepPlan
from spanwise.types.serving import Histogram, ReplicaStats


def stats_of(telemetry: Telemetry, replica: int = 0) -> ReplicaStats:
    return telemetry.stats([make_scheduler() for _ in range(replica + 1)]).replicas[replica]


def told(telemetry: Telemetry, name: str, replica: int = 0) -> tuple[int, float]:
    """How many observations there are, and their sum."""
    histogram = stats_of(telemetry, replica).histograms[name]
    return sum(histogram.counts), round(histogram.total, 6)


def step_with(sequence_id: int, num_prompt: int) -> StepPlan:
    scheduler = make_scheduler()
    add(scheduler, sequence_id, num_prompt)
    return plan(scheduler)


def token(sequence_id: int, **more: Any) -> SequenceUpdate:
    return SequenceUpdate(sequence_id=sequence_id, token_ids=(7,), **more)


def test_a_sequence_from_its_arrival_to_its_end() -> None:
    telemetry = Telemetry()
    telemetry.asked(0, 1, 32)
    telemetry.queued(5, 0, num_prompt=6, arrived_s=10.0)
    telemetry.planned(0, step_with(5, 6), 10.5)
    telemetry.brought(token(5, num_cached_tokens=2), 11.0)
    telemetry.brought(token(5), 11.25)
    telemetry.brought(token(5, finish_reason="length"), 12.0)
    wanted = {
        "time_to_first_token_seconds": (1, 1.0),
        "inter_token_latency_seconds": (2, 1.0),
        "request_time_per_output_token_seconds": (1, 0.5),
        "e2e_request_latency_seconds": (1, 2.0),
        "request_queue_time_seconds": (1, 0.5),
        "request_inference_time_seconds": (1, 1.5),
        "request_prefill_time_seconds": (1, 0.5),
        "request_decode_time_seconds": (1, 1.0),
        "request_prompt_tokens": (1, 6.0),
        "request_generation_tokens": (1, 3.0),
        "request_prefill_kv_computed_tokens": (1, 4.0),
        "request_params_max_tokens": (1, 32.0),
        "request_params_n": (1, 1.0),
        "iteration_tokens_total": (1, 6.0),
    }
    assert {name: told(telemetry, name) for name in wanted} == wanted
    stats = stats_of(telemetry)
    assert set(stats.histograms) == set(wanted)
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generation_tokens) == (6, 2, 3)
    assert stats.finished == {"stop": 0, "length": 1, "deadline": 0, "abort": 0}


def test_a_text_that_ends_a_sequence_ends_its_times_too() -> None:
    telemetry = Telemetry()
    telemetry.queued(5, 0, num_prompt=6, arrived_s=10.0)
    telemetry.planned(0, step_with(5, 6), 10.0)
    telemetry.brought(token(5), 11.0)
    telemetry.ended(5, "stop", 13.0)
    assert told(telemetry, "e2e_request_latency_seconds") == (1, 3.0)
    assert told(telemetry, "request_time_per_output_token_seconds") == (0, 0.0)


def test_what_is_given_up_has_no_times() -> None:
    telemetry, ids = Telemetry(), count()
    waiting, running = next(ids), next(ids)
    for sequence_id in (waiting, running):
        telemetry.queued(sequence_id, 0, num_prompt=6, arrived_s=10.0)
    telemetry.brought(SequenceUpdate(sequence_id=waiting, finish_reason="deadline"), 20.0)
    telemetry.planned(0, step_with(running, 6), 10.0)
    telemetry.brought(token(running), 11.0)
    telemetry.ended(running, "abort", 30.0)
    assert stats_of(telemetry).finished == {"stop": 0, "length": 0, "deadline": 1, "abort": 1}
    assert told(telemetry, "e2e_request_latency_seconds") == (0, 0.0)
    assert told(telemetry, "time_to_first_token_seconds") == (1, 1.0)


def test_what_is_counted_counts_for_the_replica_that_computes_it() -> None:
    telemetry = Telemetry()
    telemetry.queued(5, 0, num_prompt=6, arrived_s=10.0)
    telemetry.planned(1, step_with(5, 6), 11.0)  # it was moved while it waited
    telemetry.planned(1, step_with(5, 6), 12.0)  # it was preempted, and came back
    telemetry.brought(token(5, finish_reason="stop"), 13.0)
    assert told(telemetry, "request_queue_time_seconds", 1) == (1, 1.0)
    assert stats_of(telemetry, 1).finished["stop"] == 1
    assert stats_of(telemetry, 0).generation_tokens == 0


def test_a_pooled_prompt_has_no_first_token() -> None:
    telemetry = Telemetry()
    telemetry.queued(5, 0, num_prompt=6, arrived_s=10.0)
    telemetry.planned(0, step_with(5, 6), 10.0)
    pooled = SequenceUpdate(sequence_id=5, pooled=(1.0,), finish_reason="stop")
    telemetry.brought(pooled, 11.0)
    assert told(telemetry, "time_to_first_token_seconds") == (0, 0.0)
    assert told(telemetry, "e2e_request_latency_seconds") == (1, 1.0)
    assert stats_of(telemetry).prompt_tokens == 6


def test_buckets_of_times_between_tokens_begin_below_10_ms() -> None:
    bounds = stats_of(Telemetry()).histograms["inter_token_latency_seconds"].bounds
    assert sum(bound < 0.01 for bound in bounds) >= 5
    for histogram in stats_of(Telemetry()).histograms.values():
        assert isinstance(histogram, Histogram)
        assert list(histogram.bounds) == sorted(set(histogram.bounds))
        assert len(histogram.counts) == len(histogram.bounds) + 1

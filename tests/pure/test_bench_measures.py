"""What is made of measured times and sizes, and what can be known before measuring."""

from __future__ import annotations

import pytest

from spanwise.bench import devices
from spanwise.bench.attention import (
    AttentionSettings,
    Cost,
    Point,
    measure_attention,
    verdicts,
    wanted_bytes,
)
from spanwise.bench.children import Children
from spanwise.bench.job import LoadRun, Moment, RequestTimes
from spanwise.bench.knee import knee
from spanwise.bench.latency import latency_of
from spanwise.bench.methods import MethodsSettings, experts_per_token, methods_over
from spanwise.bench.numbers import rising
from spanwise.bench.scaling import ScalingSettings, Workload, jobs_and_skipped
from spanwise.bench.spread import Spread, spread
from spanwise.bench.startup import phases_of
from spanwise.bench.traffic import decode_step_bytes
from spanwise.engine.config import EngineConfig
from spanwise.errors import InputError
from spanwise.layout.request import Degrees
from spanwise.types.cache import LayerCache
from spanwise.types.model import ModelFacts


class Silent:
    def step(self, line: str) -> None:
        pass

    def detail(self, line: str) -> None:
        pass

    def end(self) -> None:
        pass

    def note(self, line: str) -> None:
        pass


def facts(num_experts: int = 0, pipeline_refusal: str = "") -> ModelFacts:
    return ModelFacts(
        architecture="Some",
        model_type="some",
        num_layers=6,
        hidden_size=192,
        vocab_size=4096,
        max_position=2048,
        num_attention_heads=4,
        num_kv_heads=4,
        intermediate_size=576,
        num_experts=num_experts,
        tied_embeddings=True,
        layer_bytes=(1000,) * 6,
        first_bytes=10,
        last_bytes=10,
        layer_caches=(LayerCache("full", 4, 32, 32, 0),) * 6,
        pipeline_refusal=pipeline_refusal,
        dtype="bfloat16",
    )


# --- numbers


def test_a_spread_is_the_middle_and_the_ends() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert spread([0.5]) == Spread(0.5, 0.5, 0.5)
    assert Spread(0.002, 0.001, 1.2345).text(1000, 2) == "2.00 (1.00..1,234.50)"


@pytest.mark.parametrize("values", [(), (0, 1), (2, 2), (4, 2)])
def test_sizes_must_rise(values: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"devices must rise from 1"):
        rising("devices", values)
    rising("devices", (1, 2, 5))


def test_a_batch_counts_its_middle_sequence_and_ends_with_its_last() -> None:
    def run(*ends_s: float) -> LoadRun:
        return LoadRun(
            tuple(
                RequestTimes(sent_s=0.5, first_s=1.0, end_s=end_s, input_tokens=4, output_tokens=5)
                for end_s in ends_s
            )
        )

    found = latency_of([run(2.0, 3.0, 5.0), run(2.0, 2.0, 2.0)])
    assert found.ttft_s == Spread(0.5, 0.5, 0.5)
    assert found.tpot_s == Spread(0.375, 0.25, 0.5)
    assert found.e2e_s == Spread(3.5, 2.0, 5.0)
    assert run(2.0, 4.0).output_rate == 2.5 and run(2.0, 4.0).input_rate == 2.0
    assert run(2.0, 4.0).request_rate == 0.5


def test_one_token_has_no_time_per_token() -> None:
    one = RequestTimes(sent_s=0.0, first_s=1.0, end_s=1.0, input_tokens=1, output_tokens=1)
    assert latency_of([LoadRun((one,))]).tpot_s is None


@pytest.mark.parametrize(
    ("sizes", "rates", "bend"),
    [
        ((1, 2, 4, 8), (10.0, 19.0, 30.0, 33.0), 4),
        ((1, 2, 4), (10.0, 20.0, 24.0), None),  # 1.2x still pays
        ((1, 2, 4), (10.0, 11.0, 22.0), 1),
        ((1, 4), (10.0, 14.0), 1),  # 1.18x for each doubling
        ((1, 4), (10.0, 15.0), None),
        ((1, 2), (10.0, 9.0), 1),
        ((8,), (10.0,), None),
    ],
)
def test_the_knee_is_where_doubling_gains_little(
    sizes: tuple[int, ...], rates: tuple[float, ...], bend: int | None
) -> None:
    assert knee(sizes, rates) == bend


def test_a_phase_lasts_until_the_next() -> None:
    moments = [Moment("import", 1.0), Moment("config", 3.0), Moment("first token", 3.5)]
    assert phases_of(moments, 4.5) == {"import": 2.0, "config": 0.5, "first token": 1.0}


# --- bytes moved


@pytest.mark.parametrize(
    ("degrees", "experts", "num_bytes"),
    [
        (Degrees(2, 1, 1), None, 0),
        # 13 all-reduces of 10 x 192 bf16 values, and 10 x 4096 logits.
        (Degrees(1, 1, 2), None, 13 * 3840 + 81920),
        (Degrees(1, 1, 4), None, 13 * 3840 + 81920),
        (Degrees(1, 3, 1), None, 2 * 3840 + 80),
        # Attention and two products a token in each layer, and the embedding.
        (Degrees(1, 1, 2), 2, 19 * 3840 + 81920),
    ],
)
def test_bytes_moved_follow_from_the_layout(
    degrees: Degrees, experts: int | None, num_bytes: int
) -> None:
    assert decode_step_bytes(facts(), degrees, 10, experts) == num_bytes


def test_experts_per_token_come_from_the_config() -> None:
    assert experts_per_token({"num_experts_per_tok": 2}) == 2
    assert experts_per_token({"text_config": {"num_experts_per_tok": 4}}) == 4
    assert experts_per_token({"text_config": None}) is None


def test_experts_have_a_method_of_their_own() -> None:
    dense = [method.name for method in methods_over(2, facts())]
    assert [method.name for method in methods_over(2, facts(8))] == [
        *dense[:4],
        "expert parallel",
        *dense[4:],
    ]
    assert dense[1] == "layers over devices" and methods_over(2, facts())[1].one_micro_batch


def test_methods_want_two_devices() -> None:
    with pytest.raises(InputError, match="devices must be 2 or more"):
        MethodsSettings(
            model="m",
            engine=EngineConfig(model="m"),
            device="cpu",
            num_devices=1,
            num_prompts=1,
            input_len=1,
            output_len=1,
            num_runs=1,
            seed=0,
        )


# --- what can be measured here


def scaling(**changes: object) -> ScalingSettings:
    given = {
        "model": "m",
        "engine": EngineConfig(model="m"),
        "device": "cpu",
        "devices": (1, 2, 4, 8),
        "layouts": ("dp", "tp", "pp"),
        "workloads": (Workload(256, 8), Workload(64, 64)),
        "num_prompts": 48,
        "num_runs": 3,
        "seed": 0,
    }
    return ScalingSettings(**given | changes)  # type: ignore[arg-type]


def test_what_cannot_be_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "num_devices", lambda device: 4)
    jobs, skipped = jobs_and_skipped(scaling(), facts(pipeline_refusal="its layers share weights"))
    assert list(jobs) == ["1 device", "dp=2", "tp=2", "dp=4", "tp=4"]
    reasons = {each.name: each.reason for each in skipped}
    assert list(reasons) == ["pp=2", "pp=4", "dp=8", "tp=8", "pp=8"]
    assert "share weights" in reasons["pp=2"]
    assert reasons["dp=8"] == "8 devices want 8 cores, 4 are there"
    _, count, job = jobs["tp=4"]
    assert (count, job.num_cores, job.engine.devices) == (4, 4, "cpu:4")
    assert job.engine.layout.tensor_parallel_size == 4
    assert [load.input_len.longest for load in job.loads] == [256, 64]


def test_cards_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "num_devices", lambda device: 2)
    jobs, _ = jobs_and_skipped(scaling(device="cuda"), facts())
    job = jobs["pp=2"][2]
    assert (job.engine.devices, job.num_cores) == ("cuda:0,1", None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_runs": 2}, "runs must be 3 or more"),
        ({"devices": (2, 1)}, "devices must rise"),
        ({"layouts": ("dp", "dp")}, "layouts must be some of"),
        ({"workloads": (Workload(0, 8),)}, "a workload's input must be 1"),
    ],
)
def test_wrong_scaling_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        scaling(**changes)


# --- attention


def attention(lengths: tuple[int, ...]) -> AttentionSettings:
    return AttentionSettings(
        lengths=lengths, num_heads=8, head_dim=64, dtype="float32", device="cpu", num_runs=3
    )


def point(length: int, standard_bytes: int, flash_bytes: int) -> Point:
    def cost(added_bytes: int) -> Cost:
        return Cost(input_bytes=100, added_bytes=added_bytes, time_s=Spread(1.0, 1.0, 1.0))

    return Point(length=length, standard=cost(standard_bytes), flash=cost(flash_bytes))


def test_a_claim_is_judged_with_the_inputs() -> None:
    said = verdicts([point(1024, 9, 1), point(2048, 1900, 100), point(4096, 3800, 100)])
    assert len(said) == 2, "of 1K nothing is claimed"
    assert said[0].startswith("the claim of 10x less memory at 2K holds here: 10.0x with")
    assert said[1].startswith("the claim of 20x less memory at 4K does NOT hold here: 19.5x with")
    assert "38.0x without" in said[1]


def test_scores_and_probabilities_are_what_is_wanted() -> None:
    scores = 2 * 8 * 1024 * 1024 * 4
    assert scores < wanted_bytes(attention((1024,)), 1024) < 1.5 * scores


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"1048576 tokens: takes about .* lower --lengths"):
        measure_attention(attention((1 << 20,)), Children(Silent()))

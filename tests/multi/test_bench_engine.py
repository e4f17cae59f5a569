"""`spanwise bench` on engines and attention: what it writes, refuses and leaves behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import torch
from tests.multi.test_core import InstantExecutor

from spanwise.bench import children as children_module
from spanwise.bench.attention_run import flash_attention, standard_attention
from spanwise.bench.children import Children
from spanwise.bench.engine_run import Driver
from spanwise.bench.job import (
    AttentionJob,
    AttentionResult,
    DescribeJob,
    DescribeResult,
    EngineJob,
    EngineResult,
    Load,
)
from spanwise.bench.latency import batch_load
from spanwise.bench.lengths import parse_lengths
from spanwise.embedded import embedded_folder
from spanwise.engine.config import EngineConfig
from spanwise.engine.launch import ReplicaHandle
from spanwise.errors import DeviceError, EngineError, InputError
from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.scheduler import Scheduler
from spanwise.types.cache import CacheGroup, CacheLayout
from spanwise.types.plan import StepPlan

DENSE, MOE = "spanwise/tiny-dense", "spanwise/tiny-moe"
_TIMEOUT_S = 400.0  # the machine may be busy
_GONE_S = 2.0
_CACHE = ("--kv-cache-memory", "32MiB", "--max-model-len", "256", "--max-num-seqs", "8")


class Told:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def step(self, line: str) -> None:
        self.lines.append(line)

    def detail(self, line: str) -> None:
        self.lines.append(line)

    def end(self) -> None:
        self.lines.append("end")

    def note(self, line: str) -> None:
        self.lines.append(line)


def bench(folder: Path, *arguments: str) -> tuple[dict[str, Any], str, str]:
    """Run the program; give its JSON, the table and what went to standard error."""
    words = [*arguments, "--output", str(folder)]
    answer = subprocess.run(
        [sys.executable, "-m", "spanwise", "bench", *words],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    assert answer.returncode == 0, answer.stderr
    name = arguments[0]
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / f"{name}.json").read_text())
    assert found["bench"] == name and found["machine"]["cores"] >= 1
    return found, answer.stdout, answer.stderr


def engine_job(num_requests: int = 2, **limits: Any) -> EngineJob:
    folder = embedded_folder(DENSE)
    assert folder is not None
    limits = {"devices": "cpu:1", "kv_cache_memory": 8 << 20, "max_model_len": 128} | limits
    load = batch_load(num_requests, 8, 4)
    return EngineJob(engine=EngineConfig(model=str(folder), **limits), loads=(load,))


# --- each measurement


def test_latency(tmp_path: Path) -> None:
    lengths = ("--input-len", "16", "--output-len", "4", "--batch-size", "3", "--runs", "2")
    found, table, said = bench(tmp_path, "latency", DENSE, *lengths, *_CACHE)
    results = found["results"]
    for key in ("ttft_s", "tpot_s", "e2e_s"):
        each = results[key]
        assert 0 < each["low"] <= each["median"] <= each["high"]
    assert results["ttft_s"]["median"] < results["e2e_s"]["median"]
    requests = found["runs"][1][0]["requests"]
    assert [(r["input_tokens"], r["output_tokens"]) for r in requests] == [(16, 4)] * 3
    assert "time per output token" in table and "3 at once, 16 in / 4 out" in table
    assert said.splitlines()[0] == "[1/1] latency"
    assert said.splitlines()[-1].startswith("written: ")


def test_throughput_of_a_layout(tmp_path: Path) -> None:
    lengths = ("--num-prompts", "6", "--input-len", "4:8", "--output-len", "2@3,5@1")
    layout = ("-tp", "2", "--devices", "cpu:2", "--runs", "2")
    found, table, _ = bench(tmp_path, "throughput", DENSE, *lengths, *layout, *_CACHE)
    assert "tp=2" in table
    for run in found["runs"]:
        assert {request["output_tokens"] for request in run[0]["requests"]} <= {2, 5}
        assert {request["input_tokens"] for request in run[0]["requests"]} <= set(range(4, 9))
    rates = found["results"]
    assert rates["output_tokens_per_s"]["median"] > rates["requests_per_s"]["median"] > 0


def test_startup_phases_add_up(tmp_path: Path) -> None:
    found, table, said = bench(tmp_path, "startup", DENSE, "--runs", "1", *_CACHE)
    (start,) = found["runs"]
    names = ["import", "config", "weights", "workers", "first token"]
    assert list(start["phases_s"]) == names and all(name in table for name in names)
    assert all(seconds > 0 for seconds in start["phases_s"].values())
    assert sum(start["phases_s"].values()) == pytest.approx(start["total_s"])
    assert start["cached_share"] == 1.0 and "page cache warm: 100% to 100%" in table
    assert said.startswith("[1/2] a start that is not counted\n[2/2] start 1 of 1\n")


def test_scaling_alternates_and_skips(tmp_path: Path) -> None:
    chosen = ("--device", "cpu", "--devices", "1,4096", "--layouts", "tp", "--workloads", "8/2")
    arguments = (*chosen, "--num-prompts", "2", *_CACHE)
    found, table, said = bench(tmp_path, "scaling", DENSE, *arguments)
    assert "not measured: tp=4096: 4096 devices want 4096 cores" in table
    assert [line for line in said.splitlines() if "round" in line] == [
        f"[{number + 1}/4] 1 device, round {number} of 3" for number in (1, 2, 3)
    ]
    (point,) = found["results"]["points"]
    assert point["devices"] == 1 and point["efficiency"] == 1.0
    assert point["speed_up"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_batch_sizes(tmp_path: Path) -> None:
    sizes = ("--batch-sizes", "1,4", "--input-len", "8", "--output-len", "4", "--runs", "1")
    found, table, _ = bench(tmp_path, "batch", DENSE, *sizes, *_CACHE)
    points = found["results"]["points"]
    assert [each["batch_size"] for each in points] == [1, 4]
    assert found["results"]["knee"] in (None, 1)
    assert "less than 1.2x throughput" in table


def test_methods_of_a_model_with_experts(tmp_path: Path) -> None:
    sizes = ("--num-prompts", "3", "--input-len", "8", "--output-len", "3", "--runs", "1")
    found, table, _ = bench(tmp_path, "methods", MOE, "--device", "cpu", *sizes, *_CACHE)
    points = {each["method"]: each for each in found["results"]["points"]}
    assert list(points) == ["data parallel", "layers over devices", "pipeline parallel",
                            "tensor parallel", "expert parallel", "queue"]  # fmt: skip
    whole = points["data parallel"]["weight_bytes"]
    assert all(points[name]["weight_bytes"] < 0.75 * whole for name in list(points)[1:5])
    assert points["queue"]["weight_bytes"] == whole
    # 6 layers; 3 tokens of 256 bf16 values; 4096 logits each.
    hidden, logits = 3 * 256 * 2, 3 * 4096 * 2
    moved = {name: each["step_bytes"] for name, each in points.items()}
    assert moved["queue"] == moved["data parallel"] == 0
    assert moved["tensor parallel"] == 13 * hidden + logits
    assert moved["expert parallel"] == 19 * hidden + logits
    assert moved["pipeline parallel"] == hidden + 3 * 8
    assert "computed from the layout" in table and "a server exits" in table


def test_attention(tmp_path: Path) -> None:
    sizes = ("--lengths", "256,2048", "--heads", "2", "--runs", "1", "--device", "cpu")
    found, table, _ = bench(tmp_path, "attention", *sizes)
    long = found["results"]["points"][1]
    inputs, scores = 3 * 2 * 2048 * 64 * 4, 2 * 2048 * 2048 * 4
    assert long["standard"]["input_bytes"] == inputs
    assert 2 * scores <= long["standard"]["added_bytes"] < 3 * scores
    assert inputs / 3 <= long["flash"]["added_bytes"] < scores / 2
    assert long["total_ratio"] > 10 and "the claim of 10x less memory at 2K holds" in table


def test_both_ways_to_attend_give_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 3, 70, 16, generator=generator) for _ in range(3))
    torch.testing.assert_close(flash_attention(q, k, v), standard_attention(q, k, v))


# --- how requests are given


class WatchedExecutor(InstantExecutor):
    """Notes how many steps were on their way at once, and of how many sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.most_steps = self.most_sequences = 0

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        self.most_steps = max(self.most_steps, len(self.plans))
        together = {row.sequence_id for each in self.plans for row in each.lanes[0].rows}
        self.most_sequences = max(self.most_sequences, len(together))


@pytest.mark.parametrize(
    ("one_micro_batch", "concurrency", "most_steps", "most_sequences"),
    [(False, None, 4, 8), (True, None, 1, 8), (False, 3, 4, 3)],
)
def test_requests_and_steps_on_their_way(
    one_micro_batch: bool, concurrency: int | None, most_steps: int, most_sequences: int
) -> None:
    layers = CacheGroup(layers=(0,), num_blocks=400, window=0)
    config = SchedulerConfig(
        max_step_tokens=64,
        max_num_seqs=8,
        max_model_len=64,
        cache=CacheLayout(block_size=4, groups=(layers,)),
        vocab_size=100,
        num_micro_batches=2,
        max_in_flight=4,
    )
    executor = WatchedExecutor()
    replicas = (ReplicaHandle(Scheduler(config), executor),)
    driver = Driver(replicas, config, one_micro_batch)
    lengths = parse_lengths("x", "5:9")
    load = Load(num_requests=8, input_len=lengths, output_len=lengths, concurrency=concurrency)
    run = driver.run(load, Random(1))
    assert run.requests == tuple(sorted(run.requests, key=lambda request: request.sent_s))
    assert all(5 <= request.output_tokens <= 9 for request in run.requests)
    assert all(0 <= r.sent_s <= r.first_s < r.end_s <= run.elapsed_s for r in run.requests)
    assert len(run.requests) == 8 and executor.most_steps <= most_steps
    assert executor.most_steps == 1 or not one_micro_batch
    assert executor.most_sequences <= most_sequences
    if concurrency is None and not one_micro_batch:
        assert executor.most_steps > 1, "else the other case would show nothing"
    driver.close()
    executor.close()


# --- processes


def test_a_job_that_cannot_be_is_the_callers_error() -> None:
    children = Children(Told())
    with pytest.raises(InputError, match="more than max_model_len 8"):
        children.run("x", engine_job(max_model_len=8), EngineResult)
    with pytest.raises(DeviceError, match="tokens of KV cache"):
        children.run("x", engine_job(40, kv_cache_memory=1 << 20), EngineResult)
    with pytest.raises(InputError, match="more than max_num_seqs 4"):
        children.run("x", engine_job(5, max_num_seqs=4), EngineResult)


def test_what_torch_cannot_is_the_callers_error() -> None:
    job = AttentionJob(method="flash", length=128, num_heads=1, head_dim=64, dtype="int8",
                       device="cpu", num_runs=0)  # fmt: skip
    with pytest.raises(InputError, match="choose another --dtype"):
        Children(Told()).run("x", job, AttentionResult)


def test_a_process_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children_module.sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match="that measured 'x' ended with exit code 1"):
        Children(Told()).run("x", DescribeJob(folder="", dtype="auto"), DescribeResult)


def test_one_process_after_the_other_and_none_stays() -> None:
    told = Told()
    children = Children(told)
    children.expect(2)
    others = psutil.Process().children()  # of other tests
    first = children.run("first", engine_job(), EngineResult)
    assert psutil.Process().children() == others
    second = children.run("second", engine_job(), EngineResult)
    assert psutil.Process().children() == others
    assert [line for line in told.lines if line.startswith("[")] == ["[1/2] first", "[2/2] second"]
    assert "loading weights" in told.lines and "run 1 of 1" in told.lines
    assert len(first.runs[0][0].requests) == len(second.runs[0][0].requests) == 2


def test_ctrl_c_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    lengths = ("--input-len", "4", "--output-len", "1500", "--runs", "50", "-tp", "2")
    words = ("latency", DENSE, *lengths, "--devices", "cpu:2", "--output", str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-m", "spanwise", "bench", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        children = grown(psutil.Process(program.pid), 5)
        program.send_signal(signal.SIGINT)
        stdout, stderr = program.communicate(timeout=_TIMEOUT_S)
    assert (program.returncode, stdout, stderr) == (130, "", "[1/1] latency\n")
    deadline = time.monotonic() + _GONE_S
    assert [process for process in children if not gone(process, deadline)] == []
    assert list(tmp_path.iterdir()) == []


def grown(process: psutil.Process, count: int) -> list[psutil.Process]:
    """Its processes, once there are so many: the engine's, a fork server, zygotes, workers."""
    deadline = time.monotonic() + _TIMEOUT_S
    while len(found := process.children(recursive=True)) < count:
        assert time.monotonic() < deadline and process.is_running()
        time.sleep(0.05)
    return found


def gone(process: psutil.Process, deadline: float) -> bool:
    """Whether a process ends in time; one that only waits to be reaped has ended."""
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False

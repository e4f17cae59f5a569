"""Processes, channels and executors, with stand-ins for the model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import msgspec
import psutil
import pytest
from tests.multi.fakes import (
    AWAIT,
    COMPLAIN,
    COUNT_ARENA,
    DIE,
    DIE_LATER,
    FAKES,
    NOTHING,
    RAISE,
    READ_WEIGHTS,
    SLEEP,
    SPIN,
    plan,
    plan_of_two,
    replica_spec,
)

from spanwise.errors import CommunicationError, DeviceError, EngineError, ModelError, WorkerError
from spanwise.types.model import ModelSource
from spanwise.types.plan import StepResult
from spanwise.worker.channel import Channel, ChannelClosed, encode
from spanwise.worker.entries import Entries, resolve
from spanwise.worker.executor import Executor, wait_any
from spanwise.worker.failure import error_of, failure_of
from spanwise.worker.in_process import InProcessExecutor, load_in_process
from spanwise.worker.local import LocalProcessExecutor
from spanwise.worker.messages import Command, Execute, Failed
from spanwise.worker.replica import Replica, ReplicaSpec
from spanwise.worker.supervisor import Supervisor


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    made = Supervisor(FAKES)
    yield made
    made.shutdown()


def start_replicas(supervisor: Supervisor, *specs: ReplicaSpec) -> list[Replica]:
    supervisor.load(list(dict.fromkeys(worker.shard for spec in specs for worker in spec.workers)))
    return supervisor.spawn(specs)


def start(supervisor: Supervisor, *specs: ReplicaSpec) -> list[LocalProcessExecutor]:
    return [LocalProcessExecutor(replica, 0.5) for replica in start_replicas(supervisor, *specs)]


def gather(executor: Executor, number: int) -> list[StepResult]:
    results: list[StepResult] = []
    while len(results) < number:
        arrived = executor.wait(20.0)
        assert arrived, f"only {len(results)} of {number} results came"
        results += arrived
    return results


def token(executor: Executor, step: int, order: int) -> int:
    executor.submit(plan(step, order))
    (result,) = gather(executor, 1)
    return result.lanes[0].sampled[0].token_id


def wait_until(holds: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- channels


@pytest.fixture
def ends() -> Iterator[tuple[Channel[Any], Channel[Any]]]:
    left, right = socket.socketpair()
    channels = Channel[Any](left, Command), Channel[Any](right, Command)
    yield channels
    for channel in channels:
        channel.close()


def test_channel_keeps_order_and_kinds(ends: tuple[Channel[Any], Channel[Any]]) -> None:
    left, right = ends
    for step in range(3):
        left.send(Execute(plan(step)))
    assert [right.receive().plan.step for _ in range(3)] == [0, 1, 2]


def test_channel_puts_pieces_together(ends: tuple[Channel[Any], Channel[Any]]) -> None:
    left, right = ends
    frame = encode(Execute(plan(7))) * 2
    arrived = []
    for byte in frame:
        left.post(bytes([byte]))
        arrived += [message.plan.step for message, _ in right.arrived()]
    assert arrived == [7, 7]


def test_posting_more_than_fits_does_not_wait(ends: tuple[Channel[Any], Channel[Any]]) -> None:
    left, right = ends
    big = plan(1, num_tokens=2_000_000)
    assert not left.post(encode(Execute(big)))
    received: list[Any] = []
    reader = threading.Thread(target=lambda: received.append(right.receive()))
    reader.start()
    assert wait_until(left.flush, 20)
    reader.join()
    assert received == [Execute(big)]


def test_channel_passes_open_files(ends: tuple[Channel[Any], Channel[Any]]) -> None:
    left, right = ends
    read_fd, write_fd = os.pipe()
    left.send(Execute(plan(0)), [write_fd])
    left.send(Execute(plan(1)))
    os.close(write_fd)
    _, (received,) = right.receive_with_fds()
    assert right.receive_with_fds() == (Execute(plan(1)), ())
    assert not os.get_inheritable(received)
    os.write(received, b"x")
    assert os.read(read_fd, 2) == b"x"
    os.close(read_fd)
    os.close(received)


def test_channel_gives_what_came_before_its_end(ends: tuple[Channel[Any], Channel[Any]]) -> None:
    left, right = ends
    left.send(Execute(plan(0)))
    left.close()
    assert right.receive() == Execute(plan(0))
    with pytest.raises(ChannelClosed):
        right.receive()
    with pytest.raises(ChannelClosed):
        right.send(Execute(plan(0)))


# --- errors across the border


def test_kinds_of_errors_survive() -> None:
    def across(error: Exception) -> Exception:
        failed = msgspec.msgpack.decode(
            msgspec.msgpack.encode(failure_of(error, "worker x in step 3")), type=Failed
        )
        return error_of(failed)

    model = across(ModelError("folder x\nis empty"))
    assert type(model) is ModelError and str(model) == "folder x is empty"
    late = across(CommunicationError("rank 1 is late"))
    assert type(late) is CommunicationError
    assert str(late) == "worker x in step 3 failed: rank 1 is late"
    unknown = across(KeyError("b"))
    assert type(unknown) is WorkerError
    assert str(unknown) == "worker x in step 3 failed: KeyError: 'b'"
    assert type(across(ChannelClosed("gone"))) is EngineError


# --- the process tree


def test_describes_in_a_child(supervisor: Supervisor) -> None:
    facts = supervisor.describe(ModelSource(folder="folder", dtype="bfloat16"))
    assert facts.architecture == "Fake in folder as bfloat16"
    assert wait_until(lambda: not psutil.Process(supervisor.pids()[0]).children(), 5)


def test_loading_fails_with_the_error_of_the_model(supervisor: Supervisor) -> None:
    with pytest.raises(ModelError, match=r"^missing is no model folder: give one that has a con"):
        supervisor.describe(ModelSource(folder="missing", dtype="float32"))
    shard = replica_spec("missing").workers[0].shard
    with pytest.raises(ModelError, match=r"^missing is no model folder: give one that has a con"):
        supervisor.load([shard])


def test_loading_that_breaks_is_one_line(supervisor: Supervisor) -> None:
    with pytest.raises(WorkerError) as caught:
        supervisor.load([replica_spec("broken").workers[0].shard])
    text = "loading shard pp0/tp0 of broken failed: ValueError: cannot read this"
    assert str(caught.value) == text


def test_a_killed_child_is_named(supervisor: Supervisor) -> None:
    with pytest.raises(WorkerError, match=r"^the process describing killed died from signal 9$"):
        supervisor.describe(ModelSource(folder="killed", dtype="float32"))
    with pytest.raises(WorkerError, match=r"^the zygote of shard pp0/tp0 died from signal 9$"):
        supervisor.load([replica_spec("killed").workers[0].shard])


def test_a_worker_that_cannot_start_is_named(supervisor: Supervisor) -> None:
    text = r"^worker dp0/pp0/tp0 on cpu:0 starting failed: ValueError: no such attention$"
    with pytest.raises(WorkerError, match=text):
        start(supervisor, replica_spec("fails-to-start"))


def test_cores_that_are_not_there_are_named(supervisor: Supervisor) -> None:
    spec = replica_spec()
    device = msgspec.structs.replace(spec.workers[0].device, cores=(4000,))
    worker = msgspec.structs.replace(spec.workers[0], device=device)
    with pytest.raises(DeviceError, match=r"^cpu:0 names the cores 4000, but this process may use"):
        start(supervisor, ReplicaSpec((worker,), spec.arena_bytes, spec.segment))


def test_a_fork_server_that_cannot_import_says_so() -> None:
    broken = Supervisor(msgspec.structs.replace(FAKES, preload=("no_such_module",)))
    with pytest.raises(WorkerError, match=r"^the fork server failed: ModuleNotFoundError: No mod"):
        broken.describe(ModelSource(folder="folder", dtype="float32"))
    broken.shutdown()


def test_loads_all_shards_and_tells_progress(supervisor: Supervisor) -> None:
    progress: list[tuple[int, int]] = []
    shards = [worker.shard for worker in replica_spec("fake-3", tp_size=3).workers]
    infos = supervisor.load(shards, lambda loaded, wanted: progress.append((loaded, wanted)))
    assert [info.weight_bytes for info in infos] == [3 << 20] * 3
    assert progress == [(1, 3), (2, 3), (3, 3)]


def test_starts_and_stops_without_a_trace(capfd: pytest.CaptureFixture[str]) -> None:
    open_files, children = psutil.Process().num_fds(), set(psutil.Process().children())
    supervisor = Supervisor(FAKES)
    (executor,) = start(supervisor, replica_spec(pp_size=2, tp_size=2))
    pids = supervisor.pids()
    assert len(pids) == 1 + 4 + 4
    executor.submit(plan(0))
    gather(executor, 1)
    executor.close()
    supervisor.shutdown()
    supervisor.shutdown()
    assert not any(map(psutil.pid_exists, pids))
    assert set(psutil.Process().children()) == children
    assert psutil.Process().num_fds() == open_files
    assert capfd.readouterr() == ("", "")


def test_workers_ignore_ctrl_c(supervisor: Supervisor) -> None:
    (executor,) = start(supervisor, replica_spec(tp_size=2))
    for pid in supervisor.pids():
        assert os.getpgid(pid) != os.getpgid(0)
        os.kill(pid, signal.SIGINT)
    assert token(executor, 0, NOTHING) == 1
    executor.close()


@pytest.mark.parametrize("phase", ["loading", "idle", "stuck"])
def test_nothing_survives_the_supervising_process(phase: str) -> None:
    script = subprocess.Popen(
        [sys.executable, "-m", "tests.multi.fakes", phase],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with script:
        assert script.stdout is not None
        pids = [int(pid) for pid in script.stdout.readline().split()]
        assert len(pids) == (3 if phase == "loading" else 5) and all(map(is_alive, pids))
        script.kill()
        assert wait_until(lambda: not any(map(is_alive, pids)), 2.0)


def test_a_forked_copy_of_the_supervising_process_holds_nobody_alive(
    supervisor: Supervisor,
) -> None:
    supervisor.describe(ModelSource(folder="folder", dtype="float32"))
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:  # as multiprocessing does; it outlives the lifeline's owner
        os.read(read_fd, 1)
        os._exit(0)
    server = supervisor.pids()[0]
    supervisor._lifeline.cut()
    assert wait_until(lambda: not is_alive(server), 2.0)
    os.write(write_fd, b"x")
    os.waitpid(child, 0)
    os.close(read_fd)
    os.close(write_fd)


def test_replicas_share_the_weights_of_one_zygote(supervisor: Supervisor) -> None:
    before = (
        _pss_bytes(supervisor.pids())
        if supervisor.describe(ModelSource(folder="folder", dtype="float32"))
        else 0
    )
    executors = start(supervisor, replica_spec("fake-100"), replica_spec("fake-100", dp=1))
    pages = (100 << 20) // 4096
    assert [token(executor, 0, READ_WEIGHTS) for executor in executors] == [pages, pages]
    workers = supervisor.pids()[1:]
    assert len(workers) == 3
    grown = _pss_bytes(supervisor.pids()) - before
    assert 100 << 20 <= grown < 140 << 20
    for executor in executors:
        executor.close()


def _pss_bytes(pids: list[int]) -> int:
    return sum(psutil.Process(pid).memory_full_info().pss for pid in pids)


def test_a_cuda_worker_is_forked_from_the_server_and_loads_itself(supervisor: Supervisor) -> None:
    (replica,) = supervisor.spawn([replica_spec("fake-2", kind="cuda")])
    assert [shard.weight_bytes for shard in replica.shards] == [2 << 20]
    assert psutil.Process(replica.workers[0].pid).ppid() == supervisor.pids()[0]
    replica.close(1.0)


def test_the_arena_outlives_the_worker(supervisor: Supervisor) -> None:
    (executor,) = start(supervisor, replica_spec())
    assert [token(executor, step, COUNT_ARENA) for step in range(2)] == [1, 2]
    executor.submit(plan(2, DIE))
    with pytest.raises(WorkerError):
        executor.wait(20.0)
    (arena_fd,) = executor._replica._fds[1:]
    assert os.pread(arena_fd, 1, 0) == b"\2"
    executor.close()


# --- executors


def test_many_plans_in_flight_come_back_in_order(supervisor: Supervisor) -> None:
    (executor,) = start(supervisor, replica_spec(pp_size=2, tp_size=2))
    for step in range(50):
        executor.submit(plan(step))
    assert [result.step for result in gather(executor, 50)] == list(range(50))
    assert executor.wait(None) == [], "nothing is in flight, nothing to wait for"
    executor.close()


def test_submitting_and_asking_do_not_wait(supervisor: Supervisor) -> None:
    (executor,) = start(supervisor, replica_spec())
    started = time.monotonic()
    for step in range(40):  # two seconds of work
        executor.submit(plan(step, SLEEP))
    assert executor.results() == []
    assert executor.wait(0.01) == []
    assert time.monotonic() - started < 1.0
    assert len(gather(executor, 40)) == 40
    executor.close()


def test_big_plans_pass(supervisor: Supervisor) -> None:
    (executor,) = start(supervisor, replica_spec(tp_size=2))
    assert len(encode(Execute(plan(0, num_tokens=10_000_000)))) > 10_000_000
    for step in range(2):
        executor.submit(plan(step, num_tokens=10_000_000))
    lengths = [result.lanes[0].sampled[0].token_id for result in gather(executor, 2)]
    assert lengths == [10_000_000] * 2
    executor.close()


def test_waits_for_several_replicas_at_once(supervisor: Supervisor) -> None:
    slow, fast = start(supervisor, replica_spec(), replica_spec(dp=1))
    slow.submit(plan(0, SPIN))
    fast.submit(plan(0, SLEEP))
    assert wait_any([slow, fast], 0.0) == []
    assert wait_any([slow, fast], 20.0) == [fast]
    assert [result.step for result in fast.results()] == [0]
    slow.close()
    fast.close()


def test_a_killed_worker_is_named_with_its_step(supervisor: Supervisor) -> None:
    (executor,) = start(supervisor, replica_spec(pp_size=2))
    for step in range(12):
        executor.submit(plan(step))
    gather(executor, 12)
    executor.submit(plan(12, DIE, rank=1))
    text = r"^worker dp0/pp1/tp0 on cpu:0 died from signal 9 in step 12$"
    with pytest.raises(WorkerError, match=text):
        executor.wait(20.0)
    with pytest.raises(WorkerError, match=text):
        executor.submit(plan(13))
    executor.close()


def test_the_rank_that_died_is_blamed_and_not_the_one_that_waited(supervisor: Supervisor) -> None:
    (executor,) = start(supervisor, replica_spec(tp_size=2))
    executor.submit(plan_of_two(0, COMPLAIN, DIE_LATER))
    with pytest.raises(WorkerError, match=r"tp1 on cpu:1 died from signal 9 in step 0$"):
        executor.wait(20.0)
    executor.close()


def test_closing_breaks_collectives(supervisor: Supervisor) -> None:
    (replica,) = start_replicas(supervisor, replica_spec(tp_size=2))
    executor = LocalProcessExecutor(replica, close_timeout_s=20.0)
    executor.submit(plan(0, AWAIT))
    assert executor.wait(0.1) == []
    started = time.monotonic()
    executor.close()
    assert time.monotonic() - started < 10.0, "they were ended by force"
    assert "exit code" in replica.explain(0)


def test_a_worker_killed_between_steps_is_seen_without_a_plan(supervisor: Supervisor) -> None:
    (executor,) = start(supervisor, replica_spec(tp_size=2))
    assert wait_any([executor], 0.0) == []
    os.kill(executor._replica.workers[1].pid, signal.SIGKILL)
    assert wait_any([executor], 20.0) == [executor]
    text = r"^worker dp0/pp0/tp1 on cpu:1 died from signal 9 between steps$"
    with pytest.raises(WorkerError, match=text):
        executor.results()
    executor.close()


def test_a_failing_step_is_one_line(
    supervisor: Supervisor, capfd: pytest.CaptureFixture[str]
) -> None:
    (executor,) = start(supervisor, replica_spec(pp_size=2))
    executor.submit(plan(0, RAISE, rank=1))
    text = r"^worker dp0/pp1/tp0 on cpu:0 in step 0 failed: IndexError: no block 7$"
    with pytest.raises(WorkerError, match=text):
        executor.wait(20.0)
    executor.close()
    assert capfd.readouterr() == ("", "")


def test_the_traceback_comes_on_request(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPANWISE_DEBUG", "1")
    supervisor = Supervisor(FAKES)
    (executor,) = start(supervisor, replica_spec())
    executor.submit(plan(0, RAISE))
    with pytest.raises(WorkerError):
        executor.wait(20.0)
    supervisor.shutdown()
    assert "IndexError: no block 7" in capfd.readouterr().err
    executor.close()


def test_workers_live_on_without_their_zygote(supervisor: Supervisor) -> None:
    (executor,) = start(supervisor, replica_spec())
    server, zygote, worker = supervisor.pids()
    os.kill(zygote, signal.SIGKILL)
    assert wait_until(lambda: psutil.Process(worker).ppid() == server, 5)
    assert token(executor, 0, NOTHING) == 1
    os.kill(worker, signal.SIGTERM)
    with pytest.raises(WorkerError, match=r"tp0 on cpu:0 died from signal 15 in step 1$"):
        token(executor, 1, NOTHING)
    executor.close()


def test_a_dead_worker_harms_no_other_replica(supervisor: Supervisor) -> None:
    doomed, lucky = start(supervisor, replica_spec(), replica_spec(dp=1))
    doomed.submit(plan(0, DIE))
    with pytest.raises(WorkerError, match="dp0"):
        doomed.wait(20.0)
    doomed.close()
    assert token(lucky, 0, NOTHING) == 1
    (again,) = (LocalProcessExecutor(each) for each in supervisor.spawn([replica_spec(dp=2)]))
    assert token(again, 0, NOTHING) == 1, "the zygote forks on"
    lucky.close()
    again.close()


@pytest.mark.parametrize("order", [SPIN, SLEEP])
def test_a_stuck_worker_is_ended_in_time(supervisor: Supervisor, order: int) -> None:
    (executor,) = start(supervisor, replica_spec())
    pids = supervisor.pids()
    for step in range(100):
        executor.submit(plan(step, order))
    executor.wait(0.1)
    started = time.monotonic()
    supervisor.shutdown(0.5)
    assert time.monotonic() - started < 4.0
    assert not any(map(is_alive, pids))
    executor.close()


def test_a_stopped_worker_is_killed(supervisor: Supervisor) -> None:
    (executor,) = start(supervisor, replica_spec())
    (worker,) = executor._replica.workers
    os.kill(worker.pid, signal.SIGSTOP)
    executor.close()
    assert not is_alive(worker.pid)


def test_in_process_runs_without_children() -> None:
    children = set(psutil.Process().children())
    (spec,) = replica_spec("fake-2").workers
    shard = load_in_process(spec.shard, FAKES)
    with closing(InProcessExecutor(shard, spec, 4096, FAKES)) as executor:
        assert wait_any([executor], 0.0) == []
        assert executor.wait(None) == []
        for step in range(3):
            executor.submit(plan(step, COUNT_ARENA))
        assert wait_any([executor], 0.0) == [executor]
        results = gather(executor, 3)
        assert [result.lanes[0].sampled[0].token_id for result in results] == [1, 2, 3]
        assert [result.step for result in results] == [0, 1, 2]
        assert wait_any([executor], 0.0) == []
        assert set(psutil.Process().children()) == children


def test_in_process_fails_as_a_worker_does() -> None:
    (spec,) = replica_spec().workers
    with pytest.raises(WorkerError, match=r"^loading shard pp0/tp0 of broken failed: ValueError"):
        load_in_process(replica_spec("broken").workers[0].shard, FAKES)
    with pytest.raises(ModelError, match=r"^missing is no model folder"):
        load_in_process(replica_spec("missing").workers[0].shard, FAKES)
    shard = load_in_process(spec.shard, FAKES)
    with closing(InProcessExecutor(shard, spec, 4096, FAKES)) as executor:
        executor.submit(plan(0, RAISE))
        text = r"^worker dp0/pp0/tp0 on cpu:0 in step 0 failed: IndexError: no block 7$"
        with pytest.raises(WorkerError, match=text):
            executor.wait()
        with pytest.raises(WorkerError, match=text):
            executor.submit(plan(1))


def test_the_real_entries_exist() -> None:
    real = Entries()
    for entry in (real.describe, real.load, real.comm, real.runner):
        assert callable(resolve(entry))

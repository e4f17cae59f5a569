"""How busy devices are, from the worker to the engine."""

from __future__ import annotations

import os
import time
from typing import cast

import psutil
import pytest
from tests.multi.fakes import FAKES, SLEEP, plan, replica_spec

from spanwise.device.devices import host_memory
from spanwise.device.memory import memory_use
from spanwise.engine import heartbeats
from spanwise.engine.heartbeats import Heartbeats
from spanwise.engine.launch import DeviceUse, ReplicaHandle
from spanwise.scheduler.scheduler import Scheduler
from spanwise.types.worker import DeviceReading, DeviceSpec
from spanwise.worker.device_meter import DeviceMeter
from spanwise.worker.local import LocalProcessExecutor
from spanwise.worker.supervisor import Supervisor

_PATIENCE_S = 20.0


def wait_for_other(
    executor: LocalProcessExecutor, than: list[DeviceReading | None]
) -> list[DeviceReading | None]:
    """The readings, once none of them is as it was."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while any(new == old for new, old in zip(executor.readings, than, strict=True)):
        assert time.monotonic() < deadline_s
        executor.results()
        time.sleep(0.005)
    return list(executor.readings)


def test_time_in_steps_becomes_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "_EVERY_S", 0.0)
    spec = replica_spec(tp_size=2)
    uses = [
        DeviceUse(place=worker.place, device=str(worker.device), weight_bytes=5, cache_bytes=7)
        for worker in spec.workers
    ]
    supervisor = Supervisor(FAKES)
    try:
        supervisor.load([worker.shard for worker in spec.workers])
        executor = LocalProcessExecutor(supervisor.spawn([spec])[0], 0.5)
        beats = Heartbeats([ReplicaHandle(cast(Scheduler, None), executor)], uses, 15.0)
        beats.ask()
        assert beats.devices() == ()
        first = wait_for_other(executor, [None, None])
        beats.ask()
        for device in beats.devices():
            assert (device.utilization, device.busy_s) == (0.0, 0.0)
            assert (device.memory_used_bytes, device.memory_total_bytes) == (1 << 10, 3 << 10)
            assert (device.weight_bytes, device.cache_bytes) == (5, 7)
        begin_s = time.monotonic()
        executor.submit(plan(0, SLEEP))  # 50 ms, on both ranks
        executor.wait(_PATIENCE_S)
        beats.ask()
        wait_for_other(executor, first)
        second = wait_for_other(executor, list(executor.readings))
        beats.ask()
        elapsed_s = time.monotonic() - begin_s
        assert [(each.device, each.rank) for each in beats.devices()] == [
            ("cpu:0", 0),
            ("cpu:1", 1),
        ]
        for device, reading in zip(beats.devices(), second, strict=True):
            assert reading is not None and device.busy_s == reading.busy_s
            assert 0.05 <= device.busy_s <= elapsed_s
            assert 0.0 < device.utilization <= 1.0
        executor.close()
    finally:
        supervisor.shutdown()


def test_a_meter_counts_what_it_surrounds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 10.0, 10.5, 11.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    meter = DeviceMeter(lambda: (1, 2))
    for _ in range(2):
        with meter:
            pass
    assert meter.read() == DeviceReading(2.5, 11.0, 1, 2)


def test_memory_of_a_cpu_device_is_what_is_resident() -> None:
    used, total = memory_use(DeviceSpec(kind="cpu"))
    resident = psutil.Process(os.getpid()).memory_info().rss
    assert used == pytest.approx(resident, rel=0.05)
    assert used < total == host_memory()[0]

"""Signs of life of every rank's model thread, and what they say of its device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from spanwise.engine.launch import DeviceUse, ReplicaHandle
from spanwise.types.serving import DeviceStats, EngineHealth, RankHealth
from spanwise.types.worker import DeviceReading
from spanwise.worker.local import LocalProcessExecutor

_EVERY_S = 1.0


class Heartbeats:
    """Asks every rank for a sign of life each second, and says who has been silent for long.

    A rank answers between two steps: one that computes a long step is silent for that long.
    ``uses`` are the ranks as they were planned, replica by replica.
    """

    def __init__(
        self,
        replicas: Sequence[ReplicaHandle[Any]],
        uses: Sequence[DeviceUse],
        silent_after_s: float,
    ) -> None:
        executors = [replica.executor for replica in replicas]
        self._executors = [each for each in executors if isinstance(each, LocalProcessExecutor)]
        self._loads = [_DeviceLoad(use) for use in uses]
        self._silent_after_s = silent_after_s
        self._due_s = 0.0

    def patience_s(self) -> float:
        """How long until the next sign is to be asked for."""
        return max(0.0, self._due_s - time.monotonic())

    def ask(self) -> None:
        """Ask, where it is time to. Raises EngineError where a rank is found dead."""
        if time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + _EVERY_S
            self._note()
            for executor in self._executors:
                executor.ping()

    def health(self) -> EngineHealth:
        """Who was heard of when."""
        now_s = time.monotonic()
        ranks = []
        for executor in self._executors:
            for name, heard_at_s in executor.heard_at_s:
                age_s = now_s - heard_at_s
                device = name.rpartition(" on ")[2]
                ranks.append(RankHealth(name, device, age_s, age_s < self._silent_after_s))
        silent = next((rank for rank in ranks if not rank.healthy), None)
        reason = f"{silent.name} has not answered for {silent.age_s:.0f} s" if silent else None
        return EngineHealth(silent is None, tuple(ranks), reason)

    def devices(self) -> tuple[DeviceStats, ...]:
        """Every rank's device by its latest answers, replica by replica; none before the first."""
        return tuple(stats for load in self._loads if (stats := load.stats()) is not None)

    def _note(self) -> None:
        readings = [reading for executor in self._executors for reading in executor.readings]
        for load, reading in zip(self._loads, readings, strict=True):
            load.note(reading)


class _DeviceLoad:
    """One rank's device: its last reading, and its load between that and the one before."""

    def __init__(self, use: DeviceUse) -> None:
        self._use = use
        self._reading: DeviceReading | None = None
        self._utilization = 0.0

    def note(self, reading: DeviceReading | None) -> None:
        """Take the latest reading, which may be the one known already: a step then goes on."""
        last, self._reading = self._reading, reading
        if last is not None and reading is not None and reading.at_s > last.at_s:
            self._utilization = (reading.busy_s - last.busy_s) / (reading.at_s - last.at_s)

    def stats(self) -> DeviceStats | None:
        """As it stands; None before the first reading."""
        if self._reading is None:
            return None
        return DeviceStats(
            device=self._use.device,
            replica=self._use.place.dp,
            stage=self._use.place.pp,
            rank=self._use.place.tp,
            utilization=self._utilization,
            busy_s=self._reading.busy_s,
            memory_used_bytes=self._reading.memory_used_bytes,
            memory_total_bytes=self._reading.memory_total_bytes,
            weight_bytes=self._use.weight_bytes,
            cache_bytes=self._use.cache_bytes,
        )

"""Signs of life of every rank's model thread."""

from __future__ import annotations

import time
from collections.abc import Sequence

from spanwise.engine.launch import ReplicaHandle
from spanwise.types.serving import EngineHealth, RankHealth
from spanwise.worker.local import LocalProcessExecutor

_EVERY_S = 1.0


class Heartbeats:
    """Asks every rank for a sign of life each second, and says who has been silent for long.

    A rank answers between two steps: one that computes a long step is silent for that long.
    """

    def __init__(self, replicas: Sequence[ReplicaHandle], silent_after_s: float) -> None:
        executors = [replica.executor for replica in replicas]
        self._executors = [each for each in executors if isinstance(each, LocalProcessExecutor)]
        self._silent_after_s = silent_after_s
        self._due_s = 0.0

    def patience_s(self) -> float:
        """How long until the next sign is to be asked for."""
        return max(0.0, self._due_s - time.monotonic())

    def ask(self) -> None:
        """Ask, where it is time to. Raises EngineError where a rank is found dead."""
        if time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + _EVERY_S
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

"""Work recorded once for a shape and replayed: on a card, CUDA graphs.

What Python and the driver do for each launch of a decode step takes longer than the step; a
recording is one launch for all of them. It knows addresses and not values: what differs from step
to step has to stand in memory that stays where it is, and nothing may wait for the device.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

import torch

from spanwise.device.memory import free_bytes
from spanwise.errors import CommunicationError, WaitInterruptedError, reason

Compute = Callable[[], torch.Tensor]
Shape = TypeVar("Shape", bound=Hashable)

# A shape is recorded when it comes this often: what comes once is not worth the stop.
_USES = 2
# What recording may take in all: how many, how long, and what has to stay free on the card.
_MOST = 64
_MOST_S = 30.0
_LEAST_FREE_BYTES = 1 << 29
# Of the largest value: a product may take another kernel where it is recorded.
_TOLERANCE = 2e-2
_logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """Records work on one device."""

    def has_room(self) -> bool:
        """Whether there is memory for another recording."""
        ...

    def record(self, compute: Compute) -> Compute:
        """Note what ``compute`` launches, without doing it.

        The result does all of it again, on the same memory, and gives the same tensor each time.
        Raises RuntimeError for what cannot be recorded.
        """
        ...

    def drop(self) -> None:
        """Let go of what recordings share; none is replayed after this."""
        ...


class CudaRecorder:
    """CUDA graphs of one card. They share one pool of memory, since only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # torch changes what it calls this

    def has_room(self) -> bool:
        """Whether there is memory for another recording."""
        return free_bytes(self._device) >= _LEAST_FREE_BYTES

    def record(self, compute: Compute) -> Compute:
        """A graph of what ``compute`` launches on this thread; NCCL's own threads go on."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            out = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay

    def drop(self) -> None:
        """The next recording begins a pool of its own."""
        self._pool = None


def recorder_of(device: torch.device) -> Recorder | None:
    """What records on a device; None where launches cost little beside their work."""
    return CudaRecorder(device) if device.type == "cuda" else None


class Recordings(Generic[Shape]):
    """One recording for each shape of some work, made when the shape has come before.

    A recording is replayed once beside the work itself before it is taken. Where it cannot be made,
    or gives something else, all are let go, one line is logged, and none is made again.

    ``agree`` is True where all ranks that compute together say so: NCCL wants an operation recorded
    by all of them or by none. Which shapes come, and when, has to be equal on them.
    """

    def __init__(self, recorder: Recorder, agree: Callable[[bool], bool] = bool) -> None:
        self._recorder, self._agree = recorder, agree
        self._replays: dict[Shape, Compute] = {}
        self._uses: Counter[Shape] = Counter()
        self._spent_s = 0.0
        self._is_full = self._is_broken = False

    def __len__(self) -> int:
        """How many there are."""
        return len(self._replays)

    def takes(self, shape: Shape) -> bool:
        """Whether work of this shape is to go through ``run`` now; it counts as a use."""
        if shape in self._replays:
            return True
        if self._is_full or self._is_broken:
            return False
        self._uses[shape] += 1
        return self._uses[shape] >= _USES

    def run(self, shape: Shape, compute: Compute) -> torch.Tensor:
        """What ``compute`` gives; good until the next run of any shape.

        For one shape it has to read and write the same memory each time, and nothing else.
        """
        replay = self._replays.get(shape)
        if replay is not None:
            return replay()
        # The work itself: it also builds whatever is built at the first use.
        found = compute().clone()
        has_room = self._spent_s < _MOST_S and len(self) < _MOST and self._recorder.has_room()
        if self._agree(has_room):
            self._record(shape, compute, found)
        else:
            self._is_full = True
        return found

    def drop(self) -> None:
        """Let go of everything recorded: before collectives are aborted, and for a new epoch.

        Shapes are recorded anew as they come.
        """
        self._replays.clear()
        self._uses.clear()
        self._is_full = self._is_broken = False
        self._spent_s = 0.0
        self._recorder.drop()

    def _record(self, shape: Shape, compute: Compute, found: torch.Tensor) -> None:
        started = perf_counter()
        replay, fault = self._recorded(compute)
        if self._agree(replay is not None):
            assert replay is not None
            fault = "" if self._agree(_is_close(replay(), found)) else "a replay gives other values"
        self._spent_s += perf_counter() - started
        if replay is not None and not fault:
            self._replays[shape] = replay
            return
        self.drop()
        self._is_broken = True
        _logger.warning(
            "Decode steps are not recorded on this device (%s): every step is launched operation "
            "by operation instead, which is slower",
            fault,
        )

    def _recorded(self, compute: Compute) -> tuple[Compute | None, str]:
        """The recording, or why there is none here (where there is, another rank may have none)."""
        try:
            return self._recorder.record(compute), "another rank could not record"
        except WaitInterruptedError:
            raise
        except (RuntimeError, CommunicationError) as error:
            return None, reason(error)


def _is_close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    exact = wanted.float()
    return bool((found.float() - exact).abs().max() <= _TOLERANCE * exact.abs().max())

"""Any module's forward taken apart into pieces that follow one another.

A pipeline stage owns a run of them. There are two ways, the first that works is taken: by the
operations of an exported graph, and by the order in which the module calls its submodules.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Protocol

import torch
from torch import nn

from spanwise.device.memory import synchronize
from spanwise.errors import ModelError
from spanwise.model.carried import Carried, num_bytes
from spanwise.model.exported_pieces import ExportedPieces
from spanwise.model.module_pieces import ModulePieces
from spanwise.model.piece_proof import Case, cases, prove, run_all, several
from spanwise.model.trace import trace

Inputs = Sequence[torch.Tensor]
Varying = Sequence[Sequence[int]]
Operations = Mapping[object, Callable[..., object]]


class Stage(Protocol):
    """A run of pieces, with the tensors it needs and no others."""

    def run(self, inputs: Inputs, inbound: Sequence[Carried]) -> list[Carried]:
        """What the next stage takes, or of the last one the module's outputs.

        ``inputs``: all of the module's, on every stage, left as they are. ``inbound``: what the
        stage before gave, nothing for the first; it belongs to the stage, which may write to it.
        Raises InputError for inputs that the pieces are not made for.
        """
        ...

    def tensors(self) -> Iterable[torch.Tensor]:
        """Parameters, buffers and constants it holds; the module's own, not copies."""
        ...

    def to(self, device: torch.device) -> None:
        """Move it."""
        ...


class Way(Protocol):
    """How a module is taken apart."""

    num_pieces: int
    weight_bytes: tuple[int, ...]

    def stage(self, first: int, end: int, operations: Operations) -> Stage:
        """As ``Pieces.stage``."""
        ...


@dataclass(frozen=True)
class Pieces:
    """A module in pieces.

    ``varying``: the dims whose sizes may differ from the example's, by input; fewer than were asked
    for where the module allows only the batch to. ``carried_bytes``: between two pieces, for the
    example.
    """

    way: Way
    varying: tuple[tuple[int, ...], ...]
    carried_bytes: tuple[int, ...]

    @property
    def num_pieces(self) -> int:
        """At least one."""
        return self.way.num_pieces

    @property
    def weight_bytes(self) -> tuple[int, ...]:
        """Of each piece; a tensor that several need counts in the first."""
        return self.way.weight_bytes

    def stage(self, first: int, end: int, operations: Operations | None = None) -> Stage:
        """Pieces ``first`` to before ``end``.

        ``operations``: what to call in place of operations of torch, as
        ``{torch.ops.spanwise.sum_over_ranks: communicator.sum}``.
        """
        assert 0 <= first < end <= self.num_pieces, f"no pieces {first} to {end}"
        return self.way.stage(first, end, operations or {})

    @torch.inference_mode()
    def costs_s(self, inputs: Inputs, repeats: int = 3) -> tuple[float, ...]:
        """The measured time of each piece, the median of ``repeats`` after one to warm up."""
        stages = [self.stage(piece, piece + 1) for piece in range(self.num_pieces)]
        rounds = [_times_s(stages, inputs) for _ in range(1 + repeats)]
        return tuple(median(times) for times in zip(*rounds[1:], strict=True))


def take_apart(module: nn.Module, example: Inputs, varying: Varying) -> Pieces:
    """Take the forward of ``module`` apart; what it gives was compared with the whole.

    ``module`` takes tensors by place and gives a tuple of tensors; it is in eval mode. ``varying``:
    the dims of each input that differ between calls, dim 0 wherever that is the batch. Raises
    ModelError where neither way gives what the module gives.
    """
    if any(part.training for part in module.modules()):
        raise ModelError("the module is in training mode; call its eval() first")
    if len(varying) != len(example):
        raise ModelError(f"{len(example)} inputs, but varying dims of {len(varying)}")
    ways = [(by_operations, varying), (by_submodules, varying)]
    if any(isinstance(part, _FUSED) for part in module.modules()):
        ways.reverse()
    only_batch = [[dim for dim in dims if dim == 0] for dims in varying]
    if only_batch != [list(dims) for dims in varying]:
        ways.append((by_operations, only_batch))
    undivided, refusals = list[Pieces](), dict[str, str]()
    for way, dims in ways:
        try:
            pieces = way(module, example, dims)
        except ModelError as error:
            refusals.setdefault(str(error), _NAMES[way])
            continue
        if pieces.num_pieces > 1 or way is by_operations:
            return pieces
        undivided.append(pieces)
    if undivided:
        return undivided[0]
    reasons = "; ".join(f"{name}: {refusal}" for refusal, name in refusals.items())
    raise ModelError(f"the module cannot be taken apart ({reasons})")


@torch.inference_mode(False)
def by_operations(module: nn.Module, example: Inputs, varying: Varying) -> Pieces:
    """As ``take_apart``, the first way only: between any two operations of an exported graph."""
    known = cases(module, example, varying)
    traced = trace(module, several(example, varying), varying)
    return _proved(ExportedPieces(traced), varying, known)


@torch.inference_mode(False)
def by_submodules(module: nn.Module, example: Inputs, varying: Varying) -> Pieces:
    """As ``take_apart``, the second way only: the module's own code, between two submodules."""
    known = cases(module, example, varying)
    way = ModulePieces(module, example)
    try:
        return _proved(way, varying, known)
    except ModelError:
        failing = {place for place in way.starts[1:-1] if not _holds(way, place, known)}
        return _proved(ModulePieces(module, example, failing), varying, known)


def _holds(way: ModulePieces, place: int, known: Sequence[Case]) -> bool:
    """Whether two stages with a border at ``place`` give what the whole gives."""
    piece = way.starts.index(place)
    stages = [way.stage(0, piece, {}), way.stage(piece, way.num_pieces, {})]
    try:
        for case in known:
            prove(stages, case)
    except ModelError:
        return False
    return True


# In eval mode they compute with one fused operation, which an export takes apart: a fifth slower.
_FUSED = (nn.TransformerEncoderLayer,)
_NAMES = {by_operations: "by operations", by_submodules: "by submodules"}


def _proved(way: Way, varying: Varying, known: Sequence[Case]) -> Pieces:
    stages = [way.stage(piece, piece + 1, {}) for piece in range(way.num_pieces)]
    carried, *_ = [prove(stages, case) for case in known]
    dims = tuple(tuple(dims) for dims in varying)
    return Pieces(way, dims, tuple(num_bytes(border) for border in carried))


def _times_s(stages: Sequence[Stage], inputs: Inputs) -> list[float]:
    """How long each stage takes."""
    devices = {given.device for given in inputs}
    times = [_now_s(devices)]
    for _ in run_all(stages, inputs):
        times.append(_now_s(devices))
    return [end - start for start, end in pairwise(times)]


def _now_s(devices: Iterable[torch.device]) -> float:
    for device in devices:
        synchronize(device)
    return time.perf_counter()

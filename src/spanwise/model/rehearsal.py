"""Whether shares compute what the whole does: seen on an example before anything is cut.

The model runs once as it is, and what comes into and out of every linear that would sum is kept.
Then it runs once for each rank with all shares of that rank in place; where a linear would sum over
the ranks, what comes into it must be the rank's columns of what came into the whole one, and what
came out of the whole one is handed on. So every product that a rank adds is the right one, on every
layer, with the masks, biases and states that layers hand one another, and the model's outputs must
be those of the whole. The weights are views of the whole ones: this takes about the time of two
forwards, and the memory of the activations that are kept.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from spanwise.model.share import Share, on_trial, slices
from spanwise.model.unit import Unit

Run = Callable[[], Sequence[torch.Tensor]]
Forward = Callable[[torch.Tensor], torch.Tensor]

# Relative. A linear may round otherwise with fewer columns, and attention passes that on: a bf16
# number rounded anew differs by up to 0.008, and by 0.006 at most was seen. An error of structure
# is of the size of the numbers; of some percent, at many places, where it shifts a mean over heads.
_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class _RefutedError(Exception):
    """What came to a linear is not what came to it, or to its share of it, in the whole model."""


@dataclass(frozen=True)
class _Entry:
    """A call of a unit's first linear; ``size``: of the numbers that came in."""

    column: nn.Module
    size: float


@dataclass(frozen=True)
class _Sum:
    """A call of the linear that would sum over the ranks."""

    row: nn.Module
    entering: torch.Tensor
    leaving: torch.Tensor


class Rehearsal:
    """One run of a model as it is, to hold shares of ``units`` against.

    Calls are watched by forwards put in the place of the linears' own, as a share's are, and not by
    hooks: modules of torch look for hooks, and compute another way where they find any.
    """

    def __init__(self, units: Sequence[Unit], run: Run) -> None:
        self._run = run
        self._entries: list[_Entry] = []
        self._sums: list[_Sum] = []
        watched = [(unit.columns[0], self._entering(unit.columns[0])) for unit in units]
        watched += [(unit.row, self._summing(unit.row)) for unit in units]
        with on_trial([], watched):
            self._outputs = [output.clone() for output in run()]

    def _entering(self, column: nn.Module) -> Forward:
        forward: Forward = column.forward

        def enter(hidden: torch.Tensor) -> torch.Tensor:
            self._entries.append(_Entry(column, _size(hidden)))
            return forward(hidden)

        return enter

    def _summing(self, row: nn.Module) -> Forward:
        forward: Forward = row.forward

        def add(hidden: torch.Tensor) -> torch.Tensor:
            entering, leaving = hidden.clone(), forward(hidden)
            self._sums.append(_Sum(row, entering, leaving.clone()))
            return leaving

        return add

    def has_seen(self, unit: Unit) -> bool:
        """Whether the unit took part, from one end to the other."""
        entered = any(entry.column is unit.columns[0] for entry in self._entries)
        return entered and any(each.row is unit.row for each in self._sums)

    def refuted(self, units: Sequence[Unit], shares: Sequence[Share]) -> list[Unit]:
        """Run with one rank's share of each unit; the units that cannot be what they seemed.

        Empty: the rank computes what the whole does. Where it cannot be told which unit is to
        blame, all those since the numbers were last right, or else all.
        """
        trial = _Trial(self._entries, self._sums, units)
        forwards = [(unit.columns[0], trial.entering(unit)) for unit in units]
        forwards += [(u.row, trial.summing(u, s)) for u, s in zip(units, shares, strict=True)]
        with on_trial(shares, forwards):
            try:
                outputs = self._run()
            except Exception:  # of any kind: code that met shapes it was not written for
                return trial.suspects or list(units)
        if trial.is_over() and _are_same(outputs, self._outputs):
            return []
        return trial.suspects or list(units)


class _Trial:
    """One run with shares in place. ``suspects``: units entered since the numbers were right."""

    def __init__(
        self, entries: Sequence[_Entry], sums: Sequence[_Sum], units: Sequence[Unit]
    ) -> None:
        columns = {id(unit.columns[0]) for unit in units}
        rows = {id(unit.row) for unit in units}
        self._entries = deque(each for each in entries if id(each.column) in columns)
        self._sums = deque(each for each in sums if id(each.row) in rows)
        self._within: list[Unit] = []
        self.suspects: list[Unit] = []

    def is_over(self) -> bool:
        """Whether all came that came in the run of the whole."""
        return not self._entries and not self._sums

    def entering(self, unit: Unit) -> Forward:
        """What stands for a unit's first linear: what comes there shows what was before."""
        column = unit.columns[0]
        forward: Forward = column.forward

        def enter(hidden: torch.Tensor) -> torch.Tensor:
            expected = self._entries.popleft() if self._entries else None
            bound = _BOUNDS.get(hidden.dtype, 0.0)
            if (
                expected is None
                or expected.column is not column
                or not math.isclose(_size(hidden), expected.size, rel_tol=bound)
            ):
                raise _RefutedError
            self._within.append(unit)
            self.suspects = list(self._within)
            return forward(hidden)

        return enter

    def summing(self, unit: Unit, share: Share) -> Forward:
        """What stands for the unit's sum: checks what comes, and gives what the whole gave."""

        def replay(hidden: torch.Tensor) -> torch.Tensor:
            expected = self._sums.popleft() if self._sums else None
            if (
                expected is None
                or expected.row is not unit.row
                or not _is_same(hidden, slices(expected.entering, -1, share.entering))
            ):
                self.suspects = [unit]
                raise _RefutedError
            self._within = [each for each in self._within if each is not unit]
            return expected.leaving.clone()

        return replay


def _size(tensor: torch.Tensor) -> float:
    """All numbers of a tensor without their signs; those that are none do not count."""
    return float(tensor.abs().nan_to_num(0, 0, 0).sum(dtype=torch.float64))


def _are_same(given: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    return len(given) == len(expected) and all(map(_is_same, given, expected))


def _is_same(given: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors differ by rounding only, measured by the size of their numbers."""
    if given.shape != expected.shape or given.dtype != expected.dtype:
        return False
    bound = _BOUNDS.get(expected.dtype)
    if bound is None or not expected.numel():
        return torch.equal(given, expected)
    near_zero = bound * _size(expected) / expected.numel()
    return torch.allclose(given, expected, rtol=bound, atol=near_zero, equal_nan=True)

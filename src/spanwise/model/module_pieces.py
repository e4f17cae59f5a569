"""A module in pieces by the order in which it calls its submodules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

import torch
from torch import nn

from spanwise.errors import ModelError, reason
from spanwise.model.borders import choose_borders
from spanwise.model.carried import num_bytes
from spanwise.model.module_calls import divide, done_before, open_between, owned_between, units
from spanwise.model.module_stage import REST, Border, ModuleStage, StagePlan
from spanwise.model.module_watch import Call, Key, watch

# What writing an element costs beside a multiplication: memory is slow.
_ELEMENT_FLOPS = 64


class _LostError(Exception):
    """A value is needed that no call gave and that cannot be made again."""


class ModulePieces:
    """Runs of calls of submodules. ``without``: borders that turned out not to hold."""

    def __init__(
        self, module: nn.Module, example: Sequence[torch.Tensor], without: Set[int] = frozenset()
    ) -> None:
        self._module = module
        constants = [*example, *_constants(module)]
        try:
            self._watched = watched = watch(module, example)
        except Exception as error:  # the module's own code, which raises what it likes
            raise ModelError(f"it cannot run while it is watched: {reason(error)}") from error
        self._root = watched.root
        self._weights = {watched.key(weight): weight for weight in _weights(module)}
        self._given = {watched.key(given) for given in constants}
        divide(watched, self._given | self._weights.keys())
        self._units = list(units(self._root))
        borders = [border for border in self._choose() if border not in without]
        self.starts = [0, *borders, len(self._units)]
        self.num_pieces = len(borders) + 1
        self.weight_bytes = self._weight_bytes()
        watched.kept.clear()

    def stage(
        self, first: int, end: int, operations: Mapping[object, Callable[..., object]]
    ) -> ModuleStage:
        """Pieces ``first`` to before ``end``; ``operations`` are called in place of their keys."""
        try:
            plan = self._plan(self.starts[first], self.starts[end])
        except _LostError as error:
            raise ModelError(
                "values pass between its submodules that are neither their outputs nor arguments"
            ) from error
        try:
            return ModuleStage(self._module, plan, operations)
        except (TypeError, RuntimeError) as error:  # of a tensor within its graph, for one
            raise ModelError(f"the module cannot be copied: {reason(error)}") from error

    def _plan(self, start: int, end: int) -> StagePlan:
        inbound = self._border(start) if start else None
        outbound = self._border(end) if end < len(self._units) else None
        return StagePlan(
            self._root, start, end, inbound, outbound, self._held(start, end, outbound)
        )

    def _border(self, place: int) -> Border:
        """What passes at ``place``. Raises _LostError where that is not enough."""
        needed, _ = self._needs(place, len(self._units), self._root.keys.values())
        return Border(list(done_before(self._root, place)), frozenset(needed))

    def _held(self, start: int, end: int, outbound: Border | None) -> frozenset[int]:
        owned = list(owned_between(self._root, start, end))
        is_whole = end - start == len(self._units) or any(call.name == REST for call in owned)
        if is_whole:  # what is yet called may be anything
            return frozenset(id(weight) for weight in self._weights.values())
        sent = self._root.keys.values() if outbound is None else outbound.needed
        _, touched = self._needs(start, end, sent)
        own = (weight for call in owned for weight in _weights(self._module, call.name))
        return frozenset(id(weight) for weight in (*own, *(self._weights[key] for key in touched)))

    def _needs(self, start: int, end: int, sent: Iterable[Key]) -> tuple[set[Key], set[Key]]:
        """Of a stage: outputs of calls before it, and weights that code between calls takes.

        Raises _LostError.
        """
        owned = list(owned_between(self._root, start, end))
        came = {key for call in done_before(self._root, start) for key in call.keys.values()}
        # What only passes a call, as dropout that drops nothing, was made elsewhere.
        made = ({*call.keys.values()}.difference(call.arguments) for call in owned)
        known = self._given.union(*made)
        keys = [*sent, *(key for call in owned for key in call.arguments)]
        opened = set(open_between(self._root, start, end))
        keys += [
            key
            for read in self._watched.reads
            if read.owner in opened and (read.place < end or end == len(self._units))
            for key in read.sources
        ]
        needed, touched, seen = set[Key](), set[Key](), set[Key]()
        while keys:
            key = keys.pop()
            if key in seen:
                continue
            seen.add(key)
            if key in came:
                needed.add(key)
            elif key in self._weights:
                touched.add(key)
            elif key not in known:
                record = self._watched.made.get(key)
                if record is None or record.owner.end <= start:
                    raise _LostError
                keys += record.sources
        return needed, touched

    def _choose(self) -> list[int]:
        flops = [self._flops(unit) for unit in self._units]
        carried = [self._carried_bytes(place) for place in range(1, len(self._units))]
        return choose_borders(carried, flops, self._first_held_bytes())

    def _carried_bytes(self, place: int) -> int | None:
        try:
            border = self._border(place)
        except _LostError:
            return None
        return num_bytes(border.pack({call: call.leaves for call in border.done}))

    def _flops(self, unit: Call) -> float:
        """Roughly: every weight once for every row of the output."""
        given = [leaf for leaf in unit.leaves if isinstance(leaf, torch.Tensor)]
        elements = sum(leaf.numel() for leaf in given)
        rows = max((_num_rows(leaf) for leaf in given), default=1)
        weights = sum(weight.numel() for weight in _weights(self._module, unit.name))
        return 2.0 * rows * weights + _ELEMENT_FLOPS * elements

    def _first_held_bytes(self) -> list[int]:
        seen = set[int]()
        return [_fresh_bytes(_weights(self._module, unit.name), seen) for unit in self._units]

    def _weight_bytes(self) -> tuple[int, ...]:
        weights = {id(weight): weight for weight in self._weights.values()}
        seen = set[int]()
        counts = []
        for start, end in zip(self.starts, self.starts[1:], strict=False):
            held = self._plan(start, end).held
            counts.append(_fresh_bytes((weights[each] for each in sorted(held)), seen))
        return tuple(counts)


def _num_rows(output: torch.Tensor) -> int:
    channels = output.shape[1] if output.dim() > 3 else output.shape[-1] if output.dim() else 1
    return output.numel() // max(channels, 1)


def _fresh_bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    fresh = {id(tensor): tensor.nbytes for tensor in tensors if id(tensor) not in seen}
    seen.update(fresh)
    return sum(fresh.values())


def _weights(module: nn.Module, name: str = "") -> Iterator[torch.Tensor]:
    part = module if name in ("", REST) else module.get_submodule(name)
    yield from part.parameters()
    yield from part.buffers()


def _constants(module: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors that hang on modules unregistered; every copy of the module has them."""
    for part in module.modules():
        yield from (value for value in vars(part).values() if isinstance(value, torch.Tensor))

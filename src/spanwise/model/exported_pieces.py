"""A traced forward in pieces: which operations are whose, and what passes between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import fx

from spanwise.errors import ModelError
from spanwise.model.borders import choose_borders
from spanwise.model.exported_stage import ExportedStage, Recipe
from spanwise.model.flops import flops_of
from spanwise.model.trace import Trace, aliased, has_effect, size_bytes

# Of all work, and of all weights: what a stage may do and hold again rather than have it carried.
_CHEAP_SHARE = 1 / 256


class ExportedPieces:
    """Runs of operations, each with what it takes from those before.

    What is made of the inputs alone, and cheaply, as masks are, every stage makes for itself.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._place = {node: place for place, node in enumerate(trace.operations)}
        self._written = _written_groups(trace)
        self._flops = {node: flops_of(node) for node in trace.operations}
        self._remade = self._what_is_remade()
        self._last_use = self._last_uses()
        self._starts = [0, *self._borders(), len(self._place)]
        self.num_pieces = len(self._starts) - 1
        self.weight_bytes = self._weight_bytes()

    def stage(
        self, first: int, end: int, operations: Mapping[object, Callable[..., object]]
    ) -> ExportedStage:
        """Pieces ``first`` to before ``end``; ``operations`` are called in place of their keys."""
        return ExportedStage(self._recipe(self._starts[first], self._starts[end]), operations)

    def _recipe(self, start: int, end: int) -> Recipe:
        is_last = end == len(self._place)
        inbound = self._carried_at(start)
        outbound = self._trace.outputs if is_last else self._carried_at(end)
        own = [node for node in self._trace.operations[start:end] if node not in self._remade]
        return Recipe(self._trace, inbound, self._complete(inbound, [*own, *outbound]), outbound)

    def _complete(self, given: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> list[fx.Node]:
        """``wanted``, and what has to be made for them, each after what it takes."""
        made = dict.fromkeys(given)
        for node in wanted:
            stack = [node]
            while stack:
                lacking = [
                    each
                    for each in stack[-1].all_input_nodes
                    if each in self._place and each not in made
                ]
                if stack[-1] not in self._place or stack[-1] in made:
                    stack.pop()
                elif lacking:
                    stack += lacking
                else:
                    made[stack.pop()] = None
        return [*made][len(given) :]

    def _carried_at(self, place: int) -> list[fx.Node]:
        if place in (0, len(self._place)):
            return []
        return [node for node, last in self._last_use.items() if self._place[node] < place <= last]

    def _last_uses(self) -> dict[fx.Node, int]:
        """Up to which place a value is carried, of those that are at all."""
        last = dict[fx.Node, int]()
        for node in self._place.keys() - self._remade:
            users = [user for user in node.users if user not in self._remade]
            if users:
                last[node] = max(self._place.get(user, len(self._place)) for user in users)
        return {node: last[node] for node in self._place if node in last}

    def _what_is_remade(self) -> set[fx.Node]:
        limit = _CHEAP_SHARE * sum(self._flops.values())
        sources = dict[fx.Node, frozenset[fx.Node]]()
        for node in self._trace.operations:
            takes = [each for each in node.all_input_nodes if each not in self._trace.inputs]
            cheap = all(each in sources or each in self._trace.tensors for each in takes)
            if not cheap or node in self._written or not _is_plain(node):
                continue
            # Sums of whole numbers: the order in a set, which differs by process, changes nothing.
            all_of = frozenset({node, *takes}).union(*(sources.get(each, ()) for each in takes))
            if sum(self._flops.get(each, 0.0) for each in all_of) <= limit:
                sources[node] = all_of
        return {node for node, all_of in sources.items() if self._is_light(node, all_of)}

    def _is_light(self, node: fx.Node, sources: Iterable[fx.Node]) -> bool:
        """Whether what a value is made of takes no more memory than the value, or next to none."""
        held = self._trace.tensors
        limit = max(size_bytes(node), _CHEAP_SHARE * sum(each.nbytes for each in held.values()))
        return sum(held[each].nbytes for each in sources if each in held) <= limit

    def _borders(self) -> list[int]:
        carried = self._carried_bytes()
        flops = [self._flops[node] for node in self._trace.operations]
        return choose_borders(carried, flops, self._first_held_bytes())

    def _carried_bytes(self) -> list[int | None]:
        """Of every place between two operations; None where none may be cut."""
        changes = [0] * (len(self._place) + 2)
        barred = [0] * (len(self._place) + 2)
        for node, last in self._last_use.items():
            first = self._place[node] + 1
            for counts, amount in ((changes, size_bytes(node)), (barred, not _can_travel(node))):
                counts[first] += amount
                counts[last + 1] -= amount
        for first, last in self._barred_by_writes():
            barred[first] += 1
            barred[last + 1] -= 1
        sums = zip(accumulate(changes), accumulate(barred), strict=True)
        return [None if bars else amount for amount, bars in sums][1 : len(self._place)]

    def _barred_by_writes(self) -> Iterator[tuple[int, int]]:
        """Places, both ends included, where memory that is yet written to has two names alive.

        Beyond the border they would be two copies, and a write to one would miss the other.
        """
        for group in set(self._written.values()):
            written = max(self._place[node] for node in group if has_effect(node))
            alive = sorted(
                (min(self._last_use[node], written), self._place[node] + 1)
                for node in group
                if node in self._last_use
            )
            for number, (last, first) in enumerate(alive):
                for other_last, other_first in alive[number + 1 :]:
                    if max(first, other_first) <= min(last, other_last):
                        yield max(first, other_first), min(last, other_last)

    def _first_held_bytes(self) -> list[int]:
        """Weights by the operation that takes them first."""
        seen = set[fx.Node]()
        counts = []
        for node in self._trace.operations:
            fresh = {each for each in node.all_input_nodes if each in self._trace.tensors} - seen
            counts.append(sum(self._trace.tensors[each].nbytes for each in fresh))
            seen |= fresh
        return counts

    def _weight_bytes(self) -> tuple[int, ...]:
        seen = set[int]()
        counts = []
        for start, end in zip(self._starts, self._starts[1:], strict=False):
            recipe = self._recipe(start, end)
            leaves = {each for node in recipe.operations for each in node.all_input_nodes}
            tensors = [
                tensor
                for node, tensor in self._trace.tensors.items()
                if node in leaves or node in recipe.outbound
            ]
            fresh = {tensor.data_ptr(): tensor for tensor in tensors}
            counts.append(sum(t.nbytes for pointer, t in fresh.items() if pointer not in seen))
            seen |= fresh.keys()
        return tuple(counts)


def _is_plain(node: fx.Node) -> bool:
    """Whether an operation gives the same wherever it runs: no chance, no talk with other ranks."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return not isinstance(node.target, torch._ops.HigherOrderOperator)
    drawn = torch.Tag.nondeterministic_seeded in node.target.tags
    return node.target.namespace in ("aten", "prims") and not drawn


def _can_travel(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor | torch.SymInt | int)


def _written_groups(trace: Trace) -> dict[fx.Node, frozenset[fx.Node]]:
    """All names of memory that is written to, by each of the names. Raises ModelError."""
    groups: dict[fx.Node, set[fx.Node]] = {}
    for node in trace.operations:
        joined = {node}.union(*(groups.get(each, {each}) for each in aliased(node)))
        groups.update(dict.fromkeys(joined, joined))
    written = {
        node: frozenset(groups[node])
        for writer in trace.operations
        if has_effect(writer)
        for node in groups[writer]
    }
    if not written.keys().isdisjoint({*trace.inputs, *trace.tensors}):
        raise ModelError("its forward writes into its inputs or weights; that is not supported")
    return written

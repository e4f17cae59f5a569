"""Which calls of a watched run a module is divided at, and which lie where."""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch

from spanwise.model.module_stage import REST
from spanwise.model.module_watch import Call, Key, Read, Watched


def divide(watched: Watched, given: Set[Key]) -> None:
    """Give every call its steps and its place.

    A call stays whole where its own code looks at values that submodules computed, for then it may
    go another way next time; so do modules of torch, which may compute what they hold otherwise.
    """
    outputs = {key for call in watched.root.walk() for key in call.keys.values()} - given
    looked: dict[Call, int] = {}
    for read in watched.reads:
        if _is_computed(read, watched, given, outputs):
            looked.setdefault(read.owner, read.num_children)
    _divide(watched.root, looked)
    _number(watched.root, 0)
    for read in watched.reads:
        begun = read.owner.children[: read.num_children]
        read.place = begun[-1].end if begun else read.owner.start


def _is_computed(read: Read, watched: Watched, given: Set[Key], outputs: Set[Key]) -> bool:
    """Whether a value comes of a submodule, and not of inputs and weights alone."""
    keys, seen = list(read.sources), set[Key]()
    while keys:
        key = keys.pop()
        if key in seen or key in given:
            continue
        seen.add(key)
        made = watched.made.get(key)
        if key in outputs or made is None or made.owner not in read.owner.ancestors():
            return True
        keys += made.sources
    return False


def _divide(call: Call, looked: dict[Call, int]) -> None:
    whole = not all(_can_be_stood_in_for(child) for child in call.children)
    if call.is_builtin or whole or (call in looked and call.parent is not None):
        return
    call.steps = list(call.children)
    if call in looked:
        first = looked[call]
        rest = Call(REST, False, call, children=call.children[first:])
        rest.arguments = [key for child in rest.children for key in child.arguments]
        call.steps = [*call.children[:first], rest] if first else []
    for step in call.steps:
        if step.name != REST:
            _divide(step, looked)


def _can_be_stood_in_for(call: Call) -> bool:
    """Whether its output is made of tensors, sizes, and what is the same each time."""
    return call.spec is not None and all(
        isinstance(leaf, torch.Tensor | int | str | None) for leaf in call.leaves
    )


def _number(call: Call, place: int) -> int:
    call.start = call.end = place
    for step in call.steps:
        call.end = _number(step, call.end)
    if not call.steps:
        call.end += 1
        for inner in call.walk():
            inner.start, inner.end = call.start, call.end
    return call.end


def units(call: Call) -> Iterator[Call]:
    """The calls that stay whole, in their order."""
    if not call.steps:
        yield call
    for step in call.steps:
        yield from units(step)


def done_before(call: Call, place: int) -> Iterator[Call]:
    """The largest calls that are over at ``place``, in their order."""
    for step in call.steps:
        if step.end <= place:
            yield step
        elif step.start < place:
            yield from done_before(step, place)


def owned_between(call: Call, start: int, end: int) -> Iterator[Call]:
    """The largest calls within ``[start, end)``."""
    for step in call.steps:
        if start <= step.start and step.end <= end:
            yield step
        elif step.start < end and start < step.end:
            yield from owned_between(step, start, end)


def open_between(call: Call, start: int, end: int) -> Iterator[Call]:
    """The calls of which only a part lies within ``[start, end)``, and the first one."""
    yield call
    for step in call.steps:
        if step.start < end and start < step.end and not (start <= step.start and step.end <= end):
            yield from open_between(step, start, end)

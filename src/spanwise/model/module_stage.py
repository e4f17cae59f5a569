"""A module's own forward, of which one stage runs only the submodules it owns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from spanwise.errors import InputError
from spanwise.model.carried import Carried
from spanwise.model.module_watch import Call, Key

# The call that stands for all that follows a look at values: which calls those are may differ.
REST = "*"
_NO_WAY = (
    "for these inputs the module calls its submodules in another order than for the example, or "
    "needs values that it did not need there; run it undivided"
)


@dataclass(frozen=True)
class Border:
    """What passes between two stages: outputs of the calls that are done there, in their order.

    Of those in ``needed`` the tensors, each once; of others only sizes, so that code between
    submodules that still asks for them gets an answer.
    """

    done: Sequence[Call]
    needed: frozenset[Key]

    def pack(self, outputs: Mapping[Call, Sequence[object]]) -> list[Carried]:
        """To be sent."""
        packed, sent = list[Carried](), set[Key]()
        for call in self.done:
            for place, leaf in enumerate(outputs[call]):
                key = call.keys.get(place)
                if isinstance(leaf, torch.Tensor) and key is not None:
                    if key not in self.needed:
                        packed += leaf.shape
                    elif key not in sent:
                        packed.append(leaf)
                        sent.add(key)
                elif type(leaf) is int:
                    packed.append(leaf)
        return packed

    def unpack(self, packed: Iterable[Carried]) -> dict[Call, list[object]]:
        """The outputs again; without their values where only sizes came."""
        rest, came = iter(packed), dict[Key, Carried]()
        return {
            call: [self._unpack(call, place, rest, came) for place in range(len(call.leaves))]
            for call in self.done
        }

    def _unpack(
        self, call: Call, place: int, rest: Iterator[Carried], came: dict[Key, Carried]
    ) -> object:
        seen = call.leaves[place]
        key = call.keys.get(place)
        if isinstance(seen, torch.Tensor) and key is not None:
            if key not in self.needed:
                sizes = [next(rest) for _ in seen.shape]
                return seen.new_empty(sizes, device="meta")  # type: ignore[arg-type]
            if key not in came:
                came[key] = next(rest)
            return came[key]
        return next(rest) if type(seen) is int else seen


@dataclass(frozen=True)
class StagePlan:
    """Calls ``[start, end)``; a border is None at the ends. ``held``: ids of what it needs."""

    root: Call
    start: int
    end: int
    inbound: Border | None
    outbound: Border | None
    held: frozenset[int]


class ModuleStage:
    """Runs a copy of the module that has the plan's tensors and no others."""

    def __init__(
        self, module: nn.Module, plan: StagePlan, replaced: Mapping[object, Callable[..., object]]
    ) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        self._module: nn.Module = copy.deepcopy(module, {id(each): each for each in tensors})
        _keep(self._module, plan.held)
        self._plan, self._replaced = plan, replaced
        self._now: _Run | None = None
        for name in {call.name for call in _steps(plan.root)} - {REST}:
            part = self._module.get_submodule(name)
            part.__dict__["forward"] = _Step(self, name, part.forward)

    def run(self, inputs: Sequence[torch.Tensor], inbound: Sequence[Carried]) -> list[Carried]:
        """What the next stage takes, or of the last one the outputs. Raises InputError."""
        plan = self._plan
        came = plan.inbound.unpack(inbound) if plan.inbound else {}
        self._now = run = _Run(plan, came, _Absence(inputs[0].device))
        try:
            with _Replacing(self._replaced) if self._replaced else nullcontext(), run.absence:
                outputs = self._module(*inputs)
            if plan.outbound is not None:
                raise InputError(_NO_WAY)
            given: list[Carried] = list(outputs)
        except _LeftError:
            assert plan.outbound is not None
            given = plan.outbound.pack(run.outputs)
        finally:
            self._now = None
        if _is_absent(given):
            raise InputError(_NO_WAY)
        return given

    def call(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a submodule does within a run."""
        assert self._now is not None
        return self._now.call(name, forward, args, kwargs)

    def tensors(self) -> Iterable[torch.Tensor]:
        """Parameters and buffers: the module's own, not copies."""
        held = (*self._module.parameters(), *self._module.buffers())
        return [tensor for tensor in held if not tensor.is_meta]

    def to(self, device: torch.device) -> None:
        """Move the tensors to ``device``."""
        moved = {id(tensor): tensor.detach().to(device) for tensor in self.tensors()}
        _replace_tensors(self._module, lambda tensor: moved.get(id(tensor), tensor))


class _LeftError(BaseException):
    """Leaves the module's forward, past whatever it catches; nothing went wrong."""


class _Step:
    """Stands in for a submodule's forward."""

    def __init__(self, stage: ModuleStage, name: str, forward: Callable[..., Any]) -> None:
        self._stage, self._name, self._forward = stage, name, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._stage.call(self._name, self._forward, args, kwargs)


class _Run:
    """One forward on its way: which call comes next, and what the calls so far gave."""

    def __init__(
        self, plan: StagePlan, came: Mapping[Call, list[object]], absence: _Absence
    ) -> None:
        self.absence = absence
        self.outputs: dict[Call, list[object]] = dict(came)
        self._plan = plan
        self._open = [_Open(plan.root)]
        self._is_inside = False

    def call(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._is_inside:
            return forward(*args, **kwargs)
        step = self._open[-1].next_step(name)
        if step.name == REST:
            return self._inside(forward, args, kwargs)
        if step.end <= self._plan.start:
            assert step.spec is not None
            return tree_unflatten(self.outputs[step], step.spec)
        if self._plan.start <= step.start and step.end <= self._plan.end:
            output = self._inside(forward, args, kwargs)
        else:
            self._open.append(_Open(step))
            output = forward(*args, **kwargs)
            self._open.pop()
        self._returned(step, output)
        return output

    def _inside(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A submodule as it is, and all it calls."""
        if any(
            isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))
        ):
            raise InputError(_NO_WAY)
        self._is_inside = True
        self.absence.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            return forward(*args, **kwargs)
        finally:
            self.absence.__enter__()  # type: ignore[no-untyped-call]
            self._is_inside = False

    def _returned(self, step: Call, output: object) -> None:
        self.outputs[step], _ = tree_flatten(output)
        if len(self.outputs[step]) != len(step.leaves):
            raise InputError(_NO_WAY)
        if self._plan.outbound is not None and step is self._plan.outbound.done[-1]:
            raise _LeftError


@dataclass
class _Open:
    """A call whose own code runs."""

    call: Call
    num_begun: int = 0

    def next_step(self, name: str) -> Call:
        """The call that it begins now. Raises InputError where the example began another."""
        if self.num_begun == len(self.call.steps):
            raise InputError(_NO_WAY)
        step = self.call.steps[self.num_begun]
        if step.name != REST:
            self.num_begun += 1
            if step.name != name:
                raise InputError(_NO_WAY)
        return step


class _Absence(TorchFunctionMode):
    """Computes with tensors of which only the sizes are known: what they touch is such a one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_absent((args, kwargs)):
            return func(*args, **kwargs)
        if func == _DEVICE:
            return self._device  # where what is made beside it belongs
        args, kwargs = tree_map(_without_values, (args, kwargs))
        return func(*args, **kwargs)


_DEVICE = torch.Tensor.device.__get__


def _is_absent(tree: object) -> bool:
    """Whether of any tensor only the sizes are known."""
    return any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves(tree))


def _without_values(leaf: object) -> object:
    if isinstance(leaf, torch.Tensor):
        return leaf.to("meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


class _Replacing(TorchFunctionMode):
    """Calls others in place of operations of torch."""

    def __init__(self, replaced: Mapping[object, Callable[..., object]]) -> None:
        super().__init__()
        # Python calls an operation without saying which of its overloads.
        packets = {getattr(key, "overloadpacket", key): other for key, other in replaced.items()}
        self._replaced = {**packets, **replaced}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "overloadpacket", func)
        other = self._replaced.get(func) or self._replaced.get(packet) or func
        return other(*args, **(kwargs or {}))


def _steps(call: Call) -> Iterator[Call]:
    for step in call.steps:
        yield step
        yield from _steps(step)


def _keep(module: nn.Module, held: frozenset[int]) -> None:
    def kept(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if id(tensor) in held else torch.empty_like(tensor, device="meta")

    _replace_tensors(module, kept)


def _replace_tensors(
    module: nn.Module, replacement: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Every parameter and buffer, wherever it is registered."""
    for part in module.modules():
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is None or (other := replacement(tensor)) is tensor:
                continue
            is_parameter = isinstance(tensor, nn.Parameter)
            # By assignment, of which modules that hold their weights in lists take notice.
            setattr(part, name, nn.Parameter(other, requires_grad=False) if is_parameter else other)

"""One run of a module, watched: which submodules it calls, and what passes between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

# A tensor, and how often it had been written to.
Key = tuple[int, int]

# What makes a number of Python, or a size, of a tensor's values: the way on may depend on them.
_READS = {
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "__contains__"),
    *("item", "tolist", "numpy", "is_nonzero", "equal", "allclose", "nonzero", "argwhere"),
    *("unique", "unique_consecutive", "masked_select", "bincount", "repeat_interleave"),
}


@dataclass(eq=False)
class Call:
    """One call of a submodule; of a module that is called twice there are two.

    ``leaves`` of what it gave, in the order of ``spec``; ``keys`` of those that are tensors.
    ``children``: all it made; ``steps``: those to tell apart, none where it stays whole.
    ``[start, end)``: its place among the calls that stay whole.
    """

    name: str
    is_builtin: bool
    parent: Call | None
    arguments: Sequence[Key] = ()
    children: list[Call] = field(default_factory=list)
    steps: list[Call] = field(default_factory=list)
    leaves: Sequence[object] = ()
    keys: dict[int, Key] = field(default_factory=dict)
    spec: TreeSpec | None = None
    start: int = 0
    end: int = 0

    def walk(self) -> Iterator[Call]:
        """This call and all within it, as they began."""
        yield self
        for child in self.children:
            yield from child.walk()

    def ancestors(self) -> Iterator[Call]:
        """This call and all it is within."""
        yield self
        if self.parent is not None:
            yield from self.parent.ancestors()


@dataclass(frozen=True)
class Made:
    """What a tensor was made of, and in whose own code."""

    sources: Sequence[Key]
    owner: Call


@dataclass
class Read:
    """Values that ``owner``'s own code looked at after its first ``num_children`` calls."""

    sources: Sequence[Key]
    owner: Call
    num_children: int
    place: int = 0


@dataclass
class Watched:
    """All that a run showed; tensors are kept so that no two of them have one key."""

    root: Call
    made: dict[Key, Made] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)

    def key(self, tensor: torch.Tensor) -> Key:
        """The tensor as it is now."""
        self.kept.append(tensor)
        return id(tensor), _version(tensor)


class _Watch(TorchFunctionMode):
    """Writes down what every operation makes of what."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self._watched = watched
        self.open = watched.root

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        sources = [self._watched.key(tensor) for tensor in given]
        result = func(*args, **kwargs)
        record = Made(sources, self.open)
        for tensor in _tensors(result):
            self._note(tensor, record)
        for tensor, (_, version) in zip(given, sources, strict=True):
            if _version(tensor) != version:
                self._note(tensor, record)
        if given and _reads(func, args):
            self._watched.reads.append(Read(sources, self.open, len(self.open.children)))
        return result

    def _note(self, tensor: torch.Tensor, record: Made) -> None:
        key = self._watched.key(tensor)
        if key not in record.sources:
            self._watched.made.setdefault(key, record)


def _version(tensor: torch.Tensor) -> int:
    """How often it was written to; one made in inference mode cannot be, outside of it."""
    return 0 if tensor.is_inference() else tensor._version


def _reads(func: Any, args: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__getitem__":
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1:]))
    return name in _READS or (name == "where" and len(args) == 1)


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
def watch(module: nn.Module, inputs: Sequence[torch.Tensor]) -> Watched:
    """Run ``module`` and see."""
    watched = Watched(Call("", _is_builtin(module), None))
    mode = _Watch(watched)
    with _hooks(module, watched, mode), mode:
        outputs = module(*inputs)
        _returned(watched.root, outputs, watched)
    return watched


@contextmanager
def _hooks(root: nn.Module, watched: Watched, mode: _Watch) -> Iterator[None]:
    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        keys = [watched.key(tensor) for tensor in _tensors((args, kwargs))]
        call = Call(name, _is_builtin(module), mode.open, keys)
        mode.open.children.append(call)
        mode.open = call

    def leave(name: str, output: object) -> None:
        while mode.open.name != name:  # of which an error was caught; it gave nothing
            assert mode.open.parent is not None
            mode.open = mode.open.parent
        assert mode.open.parent is not None
        _returned(mode.open, output, watched)
        mode.open = mode.open.parent

    handles = []
    for name, module in root.named_modules():
        if name:
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, name=name: enter(name, module, args, kwargs),
                    with_kwargs=True,
                )
            )
            handles.append(
                module.register_forward_hook(lambda _, __, output, name=name: leave(name, output))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _returned(call: Call, output: object, watched: Watched) -> None:
    leaves, call.spec = tree_flatten(output)
    call.keys = {
        place: watched.key(leaf)
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor)
    }
    # Their sizes are enough: a stage that keeps them must not keep the example's values.
    call.leaves = [
        torch.empty_like(leaf, device="meta") if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves
    ]


def _is_builtin(module: nn.Module) -> bool:
    """Whether it is a module of torch that may compute what its submodules would in another way."""
    return type(module).__module__.startswith("torch.nn.modules") and not isinstance(
        module, nn.Sequential | nn.TransformerEncoder
    )

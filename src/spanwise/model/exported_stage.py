"""A run of traced operations as generated Python, with the tensors it needs and no others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from spanwise.model.carried import Carried
from spanwise.model.trace import Trace


@dataclass(frozen=True)
class Recipe:
    """A stage in nodes of the whole trace: what comes in, what it does in order, what goes out."""

    trace: Trace
    inbound: Sequence[fx.Node]
    operations: Sequence[fx.Node]
    outbound: Sequence[fx.Node]


class ExportedStage:
    """Runs the operations of a recipe. ``replaced``: what is called in place of an operation."""

    def __init__(self, recipe: Recipe, replaced: Mapping[object, Callable[..., object]]) -> None:
        self._check = recipe.trace.check
        self._num_inbound = len(recipe.inbound)
        self._program = _program(recipe)
        for graph in _graphs(self._program):
            _replace(graph, replaced)
        self._compile()

    def run(self, inputs: Sequence[torch.Tensor], inbound: Sequence[Carried]) -> list[Carried]:
        """What the next stage takes, or of the last one the outputs. Raises InputError."""
        self._check(inputs)
        assert len(inbound) == self._num_inbound, "this is not what the stage before gives"
        return list(self._run(*inputs, *inbound))

    def tensors(self) -> Iterable[torch.Tensor]:
        """Parameters, buffers and constants: the module's own, not copies."""
        return self._program.state_dict(keep_vars=True).values()

    def to(self, device: torch.device) -> None:
        """Move tensors, and what operations make anew, to ``device``."""
        self._program.to(device)
        for graph in _graphs(self._program):
            for node in graph.nodes:
                node.args = map_aggregate(node.args, lambda value: _on(device, value))
                node.kwargs = map_aggregate(node.kwargs, lambda value: _on(device, value))
        self._compile()

    def _compile(self) -> None:
        for module in self._program.modules():
            if isinstance(module, fx.GraphModule):
                module.recompile()
        self._run: Callable[..., tuple[Carried, ...]] = self._program.forward


def _program(recipe: Recipe) -> fx.GraphModule:
    graph, held = fx.Graph(), dict[str, Any]()
    own: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate([*recipe.trace.inputs, *recipe.inbound]):
        own[node] = graph.placeholder(f"given_{number}")
    used = {each for node in recipe.operations for each in node.all_input_nodes}
    leaves = {*used, *recipe.outbound}
    for node, tensor in recipe.trace.tensors.items():
        if node in leaves:
            held[node.name] = tensor
            own[node] = graph.get_attr(node.name)
    for node, part in recipe.trace.parts.items():
        if node in used:
            held[node.name] = copy.deepcopy(part)
            own[node] = graph.get_attr(node.name)
    for node in recipe.operations:
        own[node] = graph.node_copy(node, own.__getitem__)
        own[node].meta = {}
    graph.output(tuple(own[node] for node in recipe.outbound))
    # Buffers one and all: no gradients, and the names are the trace's.
    return fx.GraphModule(held, graph)


def _graphs(program: fx.GraphModule) -> list[fx.Graph]:
    return [module.graph for module in program.modules() if isinstance(module, fx.GraphModule)]


def _replace(graph: fx.Graph, replaced: Mapping[object, Callable[..., object]]) -> None:
    for node in graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        for key in (node.target, packet):
            if node.op == "call_function" and key in replaced:
                node.target = _named(replaced[key])
                break


def _named(operation: Callable[..., object]) -> Callable[..., object]:
    """Generated code refers to what it calls by a name, which not everything callable has."""

    def replaced_operation(*args: object, **kwargs: object) -> object:
        return operation(*args, **kwargs)

    return replaced_operation


def _on(device: torch.device, value: Any) -> Any:
    return device if isinstance(value, torch.device) and value.type != "meta" else value

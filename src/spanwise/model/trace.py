"""A module's forward as one list of operations, for any sizes of the dims that vary."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind

from spanwise.errors import InputError, ModelError, reason

_UNUSED = {torch.ops.aten._assert_tensor_metadata.default}
_DROPOUT = {torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default}
# A symbol that stands for no dim of an input has no size before the program runs.
_UNKNOWN_SIZE = 64


@dataclass(frozen=True)
class Trace:
    """Operations in the order they run in; every node of ``tensors`` and ``parts`` is a leaf.

    ``tensors``: parameters, buffers and constants. ``parts``: graphs that operations take whole.
    ``check(*inputs)`` raises InputError where the operations do not hold for the inputs.
    """

    inputs: list[fx.Node]
    tensors: dict[fx.Node, torch.Tensor]
    parts: dict[fx.Node, nn.Module]
    operations: list[fx.Node]
    outputs: list[fx.Node]
    check: Callable[[Sequence[torch.Tensor]], None]


class _Positional(nn.Module):
    """Takes any number of tensors, by place, and gives a tuple."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.module(*inputs)
        return tuple(outputs)


def trace(
    module: nn.Module, example: Sequence[torch.Tensor], varying: Sequence[Sequence[int]]
) -> Trace:
    """Export ``module``. Raises ModelError, saying why, where that cannot be done.

    Sizes of 0 and 1 in the varying dims of ``example`` would be taken for fixed ones.
    """
    return _read(_export(module, example, varying))


def _export(
    module: nn.Module, example: Sequence[torch.Tensor], varying: Sequence[Sequence[int]]
) -> ExportedProgram:
    shapes = (tuple(dict.fromkeys(dims, Dim.DYNAMIC) for dims in varying),)
    unmarked = tuple(given.detach() for given in example)  # it marks the tensors it is given
    with _left_as_it_was(module), _quiet(), torch.no_grad():
        try:
            return torch.export.export(
                _Positional(module), unmarked, dynamic_shapes=shapes, strict=False
            )
        except Exception as error:  # it runs the module's own code, and raises whatever that does
            raise ModelError(f"torch.export cannot follow it: {reason(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter says of its own ways is not for users, nor the graph where it gave up.

    That which matters is in the error; and what it gives is proved afterwards.
    """
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """What a forward keeps on its modules is, within an export, no tensor to compute with."""
    before = [(vars(part), dict(vars(part))) for part in module.modules()]
    try:
        yield
    finally:
        for attributes, own in before:
            attributes.clear()
            attributes.update(own)


def _read(program: ExportedProgram) -> Trace:
    graph = program.graph
    _refuse_effects(program)
    _leave_out_idle(graph)
    nodes = list(graph.nodes)
    specs = dict(
        zip(graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True)
    )
    inputs = [node for node, spec in specs.items() if spec.kind == InputKind.USER_INPUT]
    return Trace(
        inputs,
        {node: _tensor(program, spec) for node, spec in specs.items() if node not in inputs},
        {
            node: program.graph_module.get_submodule(node.target)
            for node in nodes
            if node.op == "get_attr"
        },
        [node for node in nodes if node.op not in ("placeholder", "get_attr", "output")],
        _outputs(graph),
        _Check(inputs, program),
    )


def _refuse_effects(program: ExportedProgram) -> None:
    kinds = {spec.kind for spec in program.graph_signature.output_specs}
    if kinds - {OutputKind.USER_OUTPUT}:
        raise ModelError("its forward changes its own buffers or its inputs; that is not supported")


def _leave_out_idle(graph: fx.Graph) -> None:
    """Erase what computes nothing: checks of the exporter, dropout that drops none, dead code."""
    for node in reversed(list(graph.nodes)):
        if node.target in _DROPOUT and node.args[2:] == (False,):
            dropped = node.args[0]
            assert isinstance(dropped, fx.Node)
            node.replace_all_uses_with(dropped)
        if node.op == "call_function" and not node.users and not has_effect(node):
            graph.erase_node(node)


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    (outputs,) = graph.output_node().args
    assert isinstance(outputs, tuple | list)
    for number, output in enumerate(outputs):
        if not (isinstance(output, fx.Node) and isinstance(output.meta["val"], torch.Tensor)):
            raise ModelError(
                f"output {number} of the module is no tensor; let its wrapper leave it out"
            )
    return [output for output in outputs if isinstance(output, fx.Node)]


def _tensor(program: ExportedProgram, spec: InputSpec) -> torch.Tensor:
    """The tensor itself, no copy, without its gradient."""
    assert spec.target is not None
    held = program.state_dict if spec.target in program.state_dict else program.constants
    tensor = held[spec.target]
    if not isinstance(tensor, torch.Tensor):
        raise ModelError(f"{spec.target} is a {type(tensor).__name__}, no tensor; not supported")
    return tensor.detach()


class _Check:
    """Holds inputs against the shapes that the operations are for."""

    def __init__(self, inputs: Sequence[fx.Node], program: ExportedProgram) -> None:
        self._expected = [
            (meta.dtype, [size if isinstance(size, int) else None for size in meta.shape])
            for meta in (node.meta["val"] for node in inputs)
        ]
        # How sizes depend on each other, and their bounds: what the exporter made of them.
        self._guards = getattr(program.module(), "_guards_fn", None)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> None:
        if len(inputs) != len(self._expected):
            raise InputError(f"{len(inputs)} inputs came, {len(self._expected)} are expected")
        for number, (given, (dtype, sizes)) in enumerate(zip(inputs, self._expected, strict=True)):
            matches = len(given.shape) == len(sizes) and all(
                wanted is None or wanted == size
                for wanted, size in zip(sizes, given.shape, strict=True)
            )
            if given.dtype != dtype or not matches:
                raise InputError(
                    f"input {number} is {given.dtype} {list(given.shape)}, expected is {dtype} "
                    f"{sizes}, None for any size"
                )
        if self._guards is not None:
            try:
                self._guards(*inputs)
            except AssertionError as error:
                raise InputError(f"these sizes do not go together: {reason(error)}") from error


def has_effect(node: fx.Node) -> bool:
    """Whether an operation writes to one of its arguments, or is there for what it checks."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return any(has_effect(inner) for part in parts(node) for inner in part.graph.nodes)
    if not isinstance(node.target, torch._ops.OpOverload) or node.target in _UNUSED:
        return False
    return node.target._schema.is_mutable or not node.target._schema.returns


def aliased(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory an operation may write to, or share with what it gives."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes  # an item of a list, or a whole graph
    schema = node.target._schema.arguments
    given = [
        *zip(schema, node.args, strict=False),
        *((each, node.kwargs.get(each.name)) for each in schema),
    ]
    shared = [value for argument, value in given if argument.alias_info is not None]
    found = [
        leaf for value in shared for leaf in (value if isinstance(value, tuple | list) else [value])
    ]
    return [leaf for leaf in found if isinstance(leaf, fx.Node)]


def parts(node: fx.Node) -> Iterator[fx.GraphModule]:
    """The graphs that an operation takes whole."""
    for argument in node.all_input_nodes:
        if argument.op == "get_attr":
            owner = argument.graph.owning_module
            assert owner is not None
            part = owner.get_submodule(str(argument.target))
            assert isinstance(part, fx.GraphModule)
            yield part


def size_bytes(node: fx.Node) -> int:
    """What a node's value takes at the example's sizes; of a list, all of it."""
    value = node.meta["val"]
    tensors = value if isinstance(value, tuple | list) else [value]
    return sum(
        num_elements(each) * each.element_size() if isinstance(each, torch.Tensor) else 8
        for each in tensors
    )


def num_elements(tensor: torch.Tensor) -> int:
    """Of the example's sizes."""
    elements = 1
    for size in tensor.shape:
        elements *= size_of(size)
    return elements


def size_of(size: int | torch.SymInt) -> int:
    """A size as the example had it."""
    if isinstance(size, int):
        return size
    hint = size.node.hint if size.node.has_hint() else _UNKNOWN_SIZE
    return int(hint)

"""What an operation of a traced forward costs, by its shapes alone; near enough to weigh pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from spanwise.model.trace import aliased, has_effect, num_elements, parts, size_of

# Making an element, beside one multiplication: memory is slow.
_ELEMENT_FLOPS = 64


def flops_of(node: fx.Node) -> float:
    """Multiplications and additions, at the example's sizes."""
    inner = [
        each for part in parts(node) for each in part.graph.nodes if each.op == "call_function"
    ]
    if inner:
        return sum(flops_of(each) for each in inner)
    products = _PRODUCTS.get(getattr(node.target, "_opname", ""), _none)
    return products(node) + _written(node)


def _written(node: fx.Node) -> float:
    if aliased(node) and not has_effect(node):
        return 0.0  # a view
    value = node.meta.get("val")
    tensors = value if isinstance(value, tuple | list) else [value]
    return sum(
        _ELEMENT_FLOPS * num_elements(tensor)
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
    )


def _value(argument: object) -> torch.Tensor:
    assert isinstance(argument, fx.Node)
    value = argument.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def _none(node: fx.Node) -> float:
    return 0.0


def _of_rows(first: int) -> Callable[[fx.Node], float]:
    """A matrix product whose left side is argument ``first``."""

    def products(node: fx.Node) -> float:
        depth = size_of(_value(node.args[first]).shape[-1])
        return 2.0 * num_elements(node.meta["val"]) * depth

    return products


def _convolution(node: fx.Node) -> float:
    weight = _value(node.args[1])
    return 2.0 * num_elements(node.meta["val"]) * num_elements(weight) / size_of(weight.shape[0])


def _transposed_convolution(node: fx.Node) -> float:
    weight = _value(node.args[1])
    return (
        2.0 * num_elements(_value(node.args[0])) * num_elements(weight) / size_of(weight.shape[0])
    )


def _attention(node: fx.Node) -> float:
    keys = size_of(_value(node.args[1]).shape[-2])
    return 4.0 * num_elements(_value(node.args[0])) * keys


def _recurrent(node: fx.Node) -> float:
    """Every step multiplies by every weight once."""
    steps, *weights = (_value(each) for each in node.all_input_nodes)
    rows = num_elements(steps) / max(size_of(steps.shape[-1]), 1)
    return 2.0 * rows * sum(num_elements(weight) for weight in weights)


_PRODUCTS: dict[str, Callable[[fx.Node], float]] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm"), _of_rows(0)),
    **dict.fromkeys(("addmm", "baddbmm"), _of_rows(1)),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution
    ),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
}

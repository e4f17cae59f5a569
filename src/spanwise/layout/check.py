"""Whether a layout can be for a model on so many devices, and the nearest ones that can."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from spanwise.layout.request import Degrees, LayoutRequest
from spanwise.types.model import ModelFacts

_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_MAX_NEIGHBOURS = 3


def layout_problem(request: LayoutRequest, facts: ModelFacts, num_devices: int) -> str:
    """Return in one line the first reason why the layout cannot be; "" where it can."""
    return " ".join(next(_problems(request, facts, num_devices), "").split())


def nearest_layouts(
    request: LayoutRequest, facts: ModelFacts, num_devices: int
) -> tuple[LayoutRequest, ...]:
    """Find up to three layouts that can be, nearest to the wanted one first.

    Near means few factors away, in each degree and in the devices used. Hand-set layers are kept
    where they still fit, expert parallelism wherever the model has experts.
    """
    unsound: dict[str, Any] = dict.fromkeys(_unsound_sizes(request), 1)
    wanted = dataclasses.replace(request, **unsound).degrees(num_devices)
    possible = [
        degrees
        for degrees in _all_degrees(num_devices)
        if not layout_problem(_variant(request, facts, degrees), facts, num_devices)
    ]
    possible.sort(key=lambda degrees: (_distance(degrees, wanted, num_devices), degrees))
    return tuple(_variant(request, facts, degrees) for degrees in possible[:_MAX_NEIGHBOURS])


def _problems(request: LayoutRequest, facts: ModelFacts, num_devices: int) -> Iterator[str]:
    if num_devices < 1:
        yield "no device was given; give at least one (e.g. --devices cpu:1)"
    for name in _unsound_sizes(request):
        yield f"{name} must be a whole number from 1, got {getattr(request, name)!r:.80}"
    degrees = request.degrees(num_devices)
    yield from _tensor_problems(degrees.tp, facts)
    yield from _stage_problems(request.pp_layers, degrees.pp, facts)
    if request.enable_expert_parallel:
        yield from _expert_problems(degrees.tp, facts)
    if degrees.num_ranks > num_devices:
        given = "1 was" if num_devices == 1 else f"{num_devices} were"
        yield f"the layout {degrees} wants {degrees.num_ranks} devices, {given} given"


def _tensor_problems(tp: int, facts: ModelFacts) -> Iterator[str]:
    if tp > 1 and facts.tensor_refusal:
        yield f"tensor_parallel_size={tp} cannot be for this model: {facts.tensor_refusal}"
    if tp > facts.num_attention_heads:
        yield (
            f"tensor_parallel_size={tp} needs at least {tp} attention heads,"
            f" the model has {facts.num_attention_heads}"
        )


def _stage_problems(pp_layers: tuple[int, ...] | None, pp: int, facts: ModelFacts) -> Iterator[str]:
    if pp > 1 and facts.pipeline_refusal:
        yield f"pipeline_parallel_size={pp} cannot be for this model: {facts.pipeline_refusal}"
    if pp > facts.num_layers:
        yield (
            f"pipeline_parallel_size={pp} needs at least {pp} layers,"
            f" the model has {facts.num_layers}"
        )
    if pp_layers is None:
        return
    text = ",".join(map(str, pp_layers)) or "(empty)"
    if len(pp_layers) != pp:
        yield f"pp_layers {text} names {len(pp_layers)} stages, pipeline_parallel_size is {pp}"
    if not all(map(_is_size, pp_layers)):
        yield f"pp_layers {text} must give every stage a whole number of layers from 1"
    if sum(pp_layers) != facts.num_layers:
        total = sum(pp_layers)
        yield f"pp_layers {text} adds up to {total}, the model has {facts.num_layers} layers"


def _expert_problems(tp: int, facts: ModelFacts) -> Iterator[str]:
    if facts.num_experts == 0:
        yield "expert parallel needs a model with experts, this one is dense; leave it out"
    if tp > facts.num_experts:
        yield (
            f"expert parallel over {tp} ranks needs at least {tp} experts,"
            f" the model has {facts.num_experts}"
        )


def _unsound_sizes(request: LayoutRequest) -> list[str]:
    given = {name: getattr(request, name) for name in _SIZES}
    return [name for name, size in given.items() if size is not None and not _is_size(size)]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _all_degrees(num_devices: int) -> Iterator[Degrees]:
    for dp in range(1, num_devices + 1):
        for pp in range(1, num_devices // dp + 1):
            for tp in range(1, num_devices // (dp * pp) + 1):
                yield Degrees(dp, pp, tp)


def _variant(request: LayoutRequest, facts: ModelFacts, degrees: Degrees) -> LayoutRequest:
    """Give the request these degrees, without what then no longer fits."""
    layers = request.pp_layers
    fits = not any(_stage_problems(layers, degrees.pp, facts))
    return LayoutRequest(
        tensor_parallel_size=degrees.tp,
        pipeline_parallel_size=degrees.pp,
        data_parallel_size=degrees.dp,
        enable_expert_parallel=request.enable_expert_parallel and facts.num_experts > 0,
        pp_layers=layers if fits else None,
    )


def _distance(degrees: Degrees, wanted: Degrees, num_devices: int) -> Fraction:
    # Exact fractions: float logarithms would break ties by rounding.
    distance = _ratio(degrees.num_ranks, min(wanted.num_ranks, num_devices))
    for degree, want in zip(degrees, wanted, strict=True):
        distance *= _ratio(degree, want)
    return distance


def _ratio(first: int, second: int) -> Fraction:
    return Fraction(max(first, second), min(first, second))

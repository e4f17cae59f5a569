"""Layouts: places and ranks, groups, stages, and what is said when a layout cannot be."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from spanwise.errors import LayoutError
from spanwise.layout.check import layout_problem, nearest_layouts
from spanwise.layout.layout import Layout, expert_shares, plan_layout
from spanwise.layout.request import LayoutRequest
from spanwise.types.cache import LayerCache
from spanwise.types.model import ModelFacts


def facts(**changes: Any) -> ModelFacts:
    num_layers = changes.get("num_layers", 12)
    base: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "num_layers": num_layers,
        "hidden_size": 64,
        "vocab_size": 512,
        "max_position": 2048,
        "num_attention_heads": 8,
        "num_kv_heads": 4,
        "intermediate_size": 256,
        "num_experts": 0,
        "tied_embeddings": False,
        "layer_bytes": (100,) * num_layers,
        "first_bytes": 0,
        "last_bytes": 0,
        "layer_caches": (LayerCache("full", 4, 8, 8),) * num_layers,
    }
    return ModelFacts(**(base | changes))


def ask(
    dp: int | None = None,
    pp: int | None = None,
    tp: int | None = None,
    *,
    ep: bool = False,
    layers: tuple[int, ...] | None = None,
) -> LayoutRequest:
    return LayoutRequest(
        data_parallel_size=dp,
        pipeline_parallel_size=pp,
        tensor_parallel_size=tp,
        enable_expert_parallel=ep,
        pp_layers=layers,
    )


def parse(flags: str) -> LayoutRequest:
    """Read flags back the way a command line would."""
    sizes = {name: int(size) for name, size in re.findall(r"-(dp|pp|tp) (\d+)", flags)}
    layers = re.search(r"--pp-layers ([\d,]+)", flags)
    return ask(
        **sizes,
        ep="--enable-expert-parallel" in flags,
        layers=tuple(map(int, layers[1].split(","))) if layers else None,
    )


def refusal(request: LayoutRequest, model: ModelFacts, num_devices: int) -> str:
    with pytest.raises(LayoutError) as caught:
        plan_layout(request, model, num_devices)
    return str(caught.value)


sizes = st.integers(1, 4)
layouts = st.builds(
    lambda dp, pp, lanes, tp: Layout(
        dp=dp,
        pp=pp,
        lanes=lanes,
        tp=tp,
        stages=tuple(range(p, p + 1) for p in range(pp)),
        num_devices=dp * pp * lanes * tp,
    ),
    sizes,
    sizes,
    sizes,
    sizes,
)


@given(layouts)
def test_rank_and_place_round_trip_in_order(layout: Layout) -> None:
    places = layout.places
    assert len(set(places)) == layout.num_ranks == layout.dp * layout.pp * layout.lanes * layout.tp
    assert list(places) == sorted(places)
    assert [layout.rank_index(place) for place in places] == list(range(layout.num_ranks))
    assert not layout.idle_devices


@given(layouts)
def test_groups_are_the_ranks_that_differ_in_one_coordinate(layout: Layout) -> None:
    everywhere = list(enumerate(layout.places))
    for here in layout.places:
        assert list(layout.tp_group(here)) == [
            r for r, p in everywhere if (p.dp, p.pp, p.lane) == (here.dp, here.pp, here.lane)
        ]
        assert list(layout.stage_peers(here)) == [
            r for r, p in everywhere if (p.dp, p.lane, p.tp) == (here.dp, here.lane, here.tp)
        ]
        assert list(layout.expert_group(here)) == [
            r for r, p in everywhere if (p.dp, p.pp) == (here.dp, here.pp)
        ]
        assert list(layout.replica_ranks(here.dp)) == [r for r, p in everywhere if p.dp == here.dp]


@given(layouts, st.booleans(), st.integers(1, 40))
def test_each_expert_is_owned_once_or_sliced_everywhere(
    layout: Layout, whole: bool, num_experts: int
) -> None:
    layout = Layout(
        dp=layout.dp,
        pp=layout.pp,
        lanes=layout.lanes,
        tp=layout.tp,
        stages=layout.stages,
        num_devices=layout.num_devices,
        expert_parallel=whole,
    )
    shares = expert_shares(num_experts, layout)
    assert len(shares) == len(layout.expert_group(layout.place(0)))
    if whole:
        assert [expert for share in shares for expert in share] == list(range(num_experts))
    else:
        assert set(shares) == {range(num_experts)}


@pytest.mark.parametrize(
    ("request_", "degrees", "idle"),
    [
        (ask(), (8, 1, 1), 0),
        (ask(tp=1), (1, 1, 1), 7),
        (ask(tp=2), (1, 1, 2), 6),
        (ask(tp=3, pp=2), (1, 2, 3), 2),
        (ask(dp=3), (3, 1, 1), 5),
        (ask(dp=2, pp=2, tp=2), (2, 2, 2), 0),
        (ask(layers=(5, 7)), (1, 2, 1), 6),
    ],
)
def test_what_is_not_given(
    request_: LayoutRequest, degrees: tuple[int, int, int], idle: int
) -> None:
    layout = plan_layout(request_, facts(), 8)
    assert (layout.dp, layout.pp, layout.tp, layout.lanes) == (*degrees, 1)
    assert list(layout.idle_devices) == list(range(8 - idle, 8))


def test_stages_by_hand_and_by_weight() -> None:
    by_hand = plan_layout(ask(pp=2, layers=(5, 7)), facts(), 2)
    assert by_hand.stages == (range(0, 5), range(5, 12))
    even = plan_layout(ask(pp=2), facts(), 2)
    assert even.stages == (range(0, 6), range(6, 12))
    heavy_head = plan_layout(ask(pp=2), facts(last_bytes=200), 2)
    assert heavy_head.stages == (range(0, 7), range(7, 12))
    heavy_front = plan_layout(ask(pp=3), facts(first_bytes=300, last_bytes=300), 3)
    assert heavy_front.stages == (range(0, 3), range(3, 9), range(9, 12))
    assert plan_layout(ask(), facts(first_bytes=1, last_bytes=1), 1).stages == (range(0, 12),)


def test_owned_layers_follow_the_stage() -> None:
    layout = plan_layout(ask(dp=2, pp=2, tp=2, layers=(5, 7)), facts(), 8)
    owned = [layout.owned_layers(place) for place in layout.places]
    assert owned == [range(0, 5)] * 2 + [range(5, 12)] * 2 + [range(0, 5)] * 2 + [range(5, 12)] * 2


def test_describe() -> None:
    moe = facts(num_experts=8)
    layout = plan_layout(ask(2, 2, 2, ep=True, layers=(5, 7)), moe, 8)
    assert layout.describe() == "dp=2 x pp=2 x tp=2 (experts whole), layers 5+7"
    alone = plan_layout(ask(tp=1), facts(), 4)
    assert alone.describe() == "dp=1 x pp=1 x tp=1, layers 12, 3 of 4 devices idle"


DENSE = facts(num_layers=4)
MOE = facts(num_layers=4, num_experts=3)


@pytest.mark.parametrize(
    ("request_", "model", "devices", "said"),
    [
        (ask(pp=5), DENSE, 8, "pipeline_parallel_size=5 needs at least 5 layers, the model has 4;"),
        (ask(tp=9), DENSE, 16, "tensor_parallel_size=9 needs at least 9 attention heads, the mod"),
        (ask(2, 2, 2), DENSE, 4, "the layout dp=2 x pp=2 x tp=2 wants 8 devices, 4 were given;"),
        (ask(tp=2), DENSE, 1, "the layout dp=1 x pp=1 x tp=2 wants 2 devices, 1 was given;"),
        (ask(tp=2, ep=True), DENSE, 4, "expert parallel needs a model with experts, this one is"),
        (ask(tp=4, ep=True), MOE, 4, "expert parallel over 4 ranks needs at least 4 experts, the"),
        (ask(tp=0), DENSE, 4, "tensor_parallel_size must be a whole number from 1, got 0;"),
        (ask(pp=-2), DENSE, 4, "pipeline_parallel_size must be a whole number from 1, got -2;"),
        (ask(dp=True), DENSE, 4, "data_parallel_size must be a whole number from 1, got True;"),
        (ask(pp=2, layers=(1, 2)), DENSE, 4, "pp_layers 1,2 adds up to 3, the model has 4 layers;"),
        (ask(pp=3, layers=(2, 2)), DENSE, 4, "pp_layers 2,2 names 2 stages, pipeline_parallel_si"),
        (ask(pp=2, layers=(4, 0)), DENSE, 4, "pp_layers 4,0 must give every stage a whole number"),
        (ask(layers=()), DENSE, 4, "pp_layers (empty) names 0 stages, pipeline_parallel_size is 1"),
        (ask(), DENSE, 0, "no device was given; give at least one (e.g. --devices cpu:1)"),
        (
            ask(pp=2),
            facts(pipeline_refusal="layers share\na cache"),
            2,
            "pipeline_parallel_size=2 cannot be for this model: layers share a cache;",
        ),
        (
            ask(tp=2),
            facts(tensor_refusal="no plan"),
            2,
            "tensor_parallel_size=2 cannot be for this model: no plan;",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    request_: LayoutRequest, model: ModelFacts, devices: int, said: str
) -> None:
    message = refusal(request_, model, devices)
    assert message.startswith(said)
    assert "\n" not in message
    assert ("would work: -" in message) == (devices > 0)


@pytest.mark.parametrize(
    ("request_", "model", "devices", "near"),
    [
        (ask(2, 2, 2), DENSE, 4, "-pp 2 -tp 2, -dp 2 -tp 2, -dp 2 -pp 2"),
        (ask(pp=5), DENSE, 8, "-pp 4, -pp 3, -pp 3 -tp 2"),
        (ask(tp=16), DENSE, 16, "-tp 8, -pp 2 -tp 8, -dp 2 -tp 8"),
        (ask(tp=2), DENSE, 1, "-dp 1"),
        (ask(dp=2, layers=(1, 3)), DENSE, 2, "-pp 2 --pp-layers 1,3, -dp 2, -dp 1"),
    ],
)
def test_neighbours_by_example(
    request_: LayoutRequest, model: ModelFacts, devices: int, near: str
) -> None:
    assert refusal(request_, model, devices).split("would work: ")[1] == near


degrees = st.none() | st.integers(-1, 9)
requests = st.builds(
    ask,
    degrees,
    degrees,
    degrees,
    ep=st.booleans(),
    layers=st.none() | st.lists(st.integers(0, 4), max_size=4).map(tuple),
)
models = st.builds(
    lambda num_layers, num_heads, num_experts, no_pp, no_tp: facts(
        num_layers=num_layers,
        num_attention_heads=num_heads,
        num_kv_heads=1,
        num_experts=num_experts,
        pipeline_refusal=no_pp,
        tensor_refusal=no_tp,
    ),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0, 2, 8]),
    st.sampled_from(["", "no"]),
    st.sampled_from(["", "no"]),
)


@given(requests, models, st.integers(1, 8))
def test_a_refused_layout_comes_with_ones_that_work(
    request_: LayoutRequest, model: ModelFacts, num_devices: int
) -> None:
    assume(layout_problem(request_, model, num_devices))
    message = refusal(request_, model, num_devices)
    assert "\n" not in message
    near = nearest_layouts(request_, model, num_devices)
    assert 1 <= len(near) <= 3
    assert len(set(near)) == len(near)
    assert message.endswith(", ".join(other.flags() for other in near))
    for other in near:
        layout = plan_layout(other, model, num_devices)
        assert plan_layout(parse(other.flags()), model, num_devices) == layout


@st.composite
def possible(draw: st.DrawFn) -> tuple[LayoutRequest, ModelFacts, int]:
    """A request made to fit a model and devices."""
    stages = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple))
    dp, tp = draw(sizes), draw(st.integers(1, 6))
    experts = draw(st.sampled_from([0, tp, tp + 5]))
    model = facts(
        num_layers=sum(stages),
        layer_bytes=draw(st.tuples(*[st.integers(1, 100)] * sum(stages))),
        first_bytes=draw(st.integers(0, 300)),
        last_bytes=draw(st.integers(0, 300)),
        num_attention_heads=tp + draw(st.integers(0, 3)),
        num_kv_heads=1,
        num_experts=experts,
    )
    by_hand = stages if draw(st.booleans()) else None
    request = ask(dp, len(stages), tp, ep=experts > 0 and draw(st.booleans()), layers=by_hand)
    return request, model, dp * len(stages) * tp + draw(st.integers(0, 3))


@given(possible())
def test_what_fits_is_accepted_and_owns_every_layer_once(
    case: tuple[LayoutRequest, ModelFacts, int],
) -> None:
    request_, model, num_devices = case
    layout = plan_layout(request_, model, num_devices)
    assert [layer for stage in layout.stages for layer in stage] == list(range(model.num_layers))
    assert all(layout.stages)
    assert (layout.dp, layout.pp, layout.tp) == request_.degrees(num_devices)
    assert layout.num_ranks + len(layout.idle_devices) == num_devices
    assert all(expert_shares(model.num_experts, layout)) == (model.num_experts > 0)
    if request_.pp_layers is not None:
        assert tuple(map(len, layout.stages)) == request_.pp_layers
    assert plan_layout(parse(request_.flags()), model, num_devices) == layout

"""The layout of a model over devices: who stands where, which layers each stage owns."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from spanwise.errors import LayoutError
from spanwise.layout.check import layout_problem, nearest_layouts
from spanwise.layout.request import LayoutRequest
from spanwise.layout.split import split_by_weight, split_evenly
from spanwise.types.model import ModelFacts
from spanwise.types.worker import RankPlace

__all__ = ["Layout", "LayoutRequest", "expert_shares", "nearest_layouts", "plan_layout"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """``dp`` replicas of ``pp`` stages of ``lanes x tp`` ranks; rank r stands on device r.

    Ranks count with ``tp`` fastest, then lane, stage, replica: a replica's devices are neighbours.
    ``stages[p]`` are the decoder layers of stage p.
    """

    dp: int
    pp: int
    tp: int
    stages: tuple[range, ...]
    num_devices: int
    lanes: int = 1
    expert_parallel: bool = False

    @property
    def num_ranks(self) -> int:
        """How many devices are used."""
        return self.dp * self.ranks_per_replica

    @property
    def ranks_per_replica(self) -> int:
        """How many devices hold one copy of the model."""
        return self.pp * self.lanes * self.tp

    @property
    def idle_devices(self) -> range:
        """The devices given that no rank stands on; empty where all are used."""
        return range(self.num_ranks, self.num_devices)

    @property
    def places(self) -> tuple[RankPlace, ...]:
        """Every place, in the order of ranks (and so of devices)."""
        return tuple(self.place(rank) for rank in range(self.num_ranks))

    def place(self, rank: int) -> RankPlace:
        """Return where ``rank`` stands."""
        assert 0 <= rank < self.num_ranks, (rank, self.num_ranks)
        rest, tp = divmod(rank, self.tp)
        rest, lane = divmod(rest, self.lanes)
        dp, pp = divmod(rest, self.pp)
        return RankPlace(dp=dp, pp=pp, lane=lane, tp=tp)

    def rank_index(self, place: RankPlace) -> int:
        """Return the rank (and device index) at a place."""
        assert 0 <= place.dp < self.dp and 0 <= place.pp < self.pp, place
        assert 0 <= place.lane < self.lanes and 0 <= place.tp < self.tp, place
        return ((place.dp * self.pp + place.pp) * self.lanes + place.lane) * self.tp + place.tp

    def tp_group(self, place: RankPlace) -> tuple[int, ...]:
        """Return the ranks that share this place's heads and columns, by tp rank."""
        first = self.rank_index(place) - place.tp
        return tuple(range(first, first + self.tp))

    def expert_group(self, place: RankPlace) -> tuple[int, ...]:
        """Return the ranks that share this stage's experts: its lanes x tp, lane by lane."""
        first = self.rank_index(place) - place.lane * self.tp - place.tp
        return tuple(range(first, first + self.lanes * self.tp))

    def stage_peers(self, place: RankPlace) -> tuple[int, ...]:
        """Return the ranks a token passes here, stage by stage: same replica, lane and tp rank."""
        step = self.lanes * self.tp
        first = self.rank_index(place) - place.pp * step
        return tuple(range(first, first + self.pp * step, step))

    def replica_ranks(self, dp: int) -> range:
        """Return the ranks of one replica."""
        assert 0 <= dp < self.dp, dp
        return range(dp * self.ranks_per_replica, (dp + 1) * self.ranks_per_replica)

    def owned_layers(self, place: RankPlace) -> range:
        """Return the decoder layers that the place's stage holds."""
        return self.stages[place.pp]

    def describe(self) -> str:
        """Say the layout in one line: "dp=2 x pp=2 x tp=2 (experts whole), layers 5+7"."""
        lanes = f" x lanes={self.lanes}" if self.lanes > 1 else ""
        experts = " (experts whole)" if self.expert_parallel else ""
        layers = "+".join(str(len(stage)) for stage in self.stages)
        idle = len(self.idle_devices)
        rest = f", {idle} of {self.num_devices} devices idle" if idle else ""
        return f"dp={self.dp} x pp={self.pp}{lanes} x tp={self.tp}{experts}, layers {layers}{rest}"


def plan_layout(request: LayoutRequest, facts: ModelFacts, num_devices: int) -> Layout:
    """Lay the model out as asked on the first devices of those given.

    Without any degree: one replica per device. Stages are balanced by weight bytes unless set by
    hand. Raises LayoutError, naming the nearest layouts that work, where the wanted one cannot be.
    """
    if problem := layout_problem(request, facts, num_devices):
        near = ", ".join(other.flags() for other in nearest_layouts(request, facts, num_devices))
        raise LayoutError(f"{problem}; would work: {near}" if near else problem)
    dp, pp, tp = request.degrees(num_devices)
    return Layout(
        dp=dp,
        pp=pp,
        tp=tp,
        stages=_stages(request.pp_layers, pp, facts),
        num_devices=num_devices,
        expert_parallel=request.enable_expert_parallel,
    )


def expert_shares(num_experts: int, layout: Layout) -> tuple[range, ...]:
    """Return the experts held by each rank of an expert group, in the group's order.

    Whole experts dealt evenly with expert parallelism; without it every rank holds its slice of
    all of them.
    """
    ranks = layout.lanes * layout.tp
    if not layout.expert_parallel:
        return (range(num_experts),) * ranks
    return split_evenly(num_experts, ranks)


def _stages(pp_layers: tuple[int, ...] | None, pp: int, facts: ModelFacts) -> tuple[range, ...]:
    if pp_layers is not None:
        borders = accumulate(pp_layers, initial=0)
        return tuple(range(start, end) for start, end in pairwise(borders))
    loads = [0] * pp
    loads[0] += facts.first_bytes
    loads[-1] += facts.last_bytes
    return split_by_weight(facts.layer_costs_s or facts.layer_bytes, pp, loads)

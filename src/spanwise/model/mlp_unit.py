"""MLPs of any module: linears whose columns another linear takes, found by their sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from spanwise.layout.split import split_evenly
from spanwise.model import tables
from spanwise.model.parallel import features, is_linear
from spanwise.model.share import Share, column_share, joined, row_share
from spanwise.model.unit import Unit, children, moved, only_linear, scaled


@dataclass(frozen=True, kw_only=True)
class MlpUnit(Unit):
    """Linears out to ``width`` columns, or to a multiple of them, and one linear back."""

    width: int

    @property
    def most(self) -> int:
        """One column each."""
        return self.width

    def shares(self, size: int) -> tuple[Share, ...]:
        """As many columns on each rank, but for one more on the first ranks."""
        if size > self.width:
            return ()
        return tuple(map(self._share, split_evenly(self.width, size)))

    def _share(self, own: range) -> Share:
        ranges = scaled(own, 1)
        outs = [
            column_share(
                linear,
                tuple(
                    each
                    for copy_at in range(0, features(linear)[1], self.width)
                    for each in moved(ranges, copy_at)
                ),
            )
            for linear in self.columns
        ]
        return joined((*outs, row_share(self.row, ranges)))


def find_mlps(named: Mapping[str, nn.Module], taken: set[int]) -> Iterator[MlpUnit]:
    """All MLPs of linears that are not ``taken``, which learns theirs."""
    for name, module in named.items():
        for unit in _mlps(name, module, taken):
            taken |= {id(linear) for linear in (*unit.columns, unit.row)}
            yield unit


def _mlps(name: str, module: nn.Module, taken: set[int]) -> Iterator[MlpUnit]:
    """Pairs of linears in a module, or in two modules of it that have one each; gated ones."""
    direct = {
        leaf: child
        for leaf, child in module.named_children()
        if is_linear(child) and id(child) not in taken
    }
    back = _back_projection(direct) if len(direct) > 2 else None
    if back is not None:
        outs = tuple(linear for linear in direct.values() if linear is not back)
        yield _mlp(name, module, outs, back)
        return
    before: nn.Module | None = None
    for linear in _chain(module, taken):
        fits = before is not None and linear is not None and _fits(before, linear)
        if before is not None and linear is not None and fits:
            yield _mlp(name, module, (before,), linear)
        before = None if fits else linear


def _chain(module: nn.Module, taken: set[int]) -> Iterator[nn.Module | None]:
    """The linears of a module and of its children in order; None: other weights stand between."""
    for child in module.children():
        if is_linear(child):
            yield None if id(child) in taken else child
        elif (only := only_linear(child)) is not None and id(only) not in taken:
            for inside in child.children():
                if inside is only or _has_vectors(inside):
                    yield only if inside is only else None
        elif _has_vectors(child):
            yield None


def _mlp(name: str, module: nn.Module, outs: tuple[nn.Module, ...], back: nn.Module) -> MlpUnit:
    shapes = tuple(features(linear) for linear in (*outs, back))
    return MlpUnit(
        name=name,
        kind=(type(module), shapes, *children(module)),
        columns=outs,
        row=back,
        width=features(back)[0],
    )


def _fits(out: nn.Module, back: nn.Module) -> bool:
    """Whether a linear's columns, or half of them where they are gated, are what another takes."""
    return features(out)[1] in (features(back)[0], 2 * features(back)[0])


def _back_projection(linears: Mapping[str, nn.Module]) -> nn.Module | None:
    """Among three linears and more, the one that takes what all others give."""
    fits = {
        leaf: back
        for leaf, back in linears.items()
        if all(
            features(other) == features(back)[::-1]
            for other in linears.values()
            if other is not back
        )
    }
    if len(fits) > 1:
        fits = {leaf: back for leaf, back in fits.items() if leaf in tables.BACK_PROJECTIONS}
    return next(iter(fits.values())) if len(fits) == 1 else None


def _has_vectors(module: nn.Module) -> bool:
    """Whether a module has weights; single numbers, as some activations have, do not count."""
    return any(parameter.numel() > 1 for parameter in module.parameters())

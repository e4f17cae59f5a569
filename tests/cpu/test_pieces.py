"""Modules of every shape taken apart give what they give whole, or are refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tests.support.pieces import assert_same, cut, draw_weights, run_cut
from torch import library, nn

from spanwise.errors import InputError, ModelError
from spanwise.model import exported_pieces
from spanwise.model.exported_pieces import ExportedPieces
from spanwise.model.module_pieces import ModulePieces
from spanwise.model.pieces import Pieces, by_operations, by_submodules, take_apart

Outputs = tuple[torch.Tensor, ...]
WAYS = {"operations": by_operations, "submodules": by_submodules}


class Residual(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ResidualMlp(nn.Module):
    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(Residual() for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> Outputs:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return (self.last(x),)


class Unet(nn.Module):
    """Each level up takes what the level down of the same size gave; sizes may be odd."""

    def __init__(self) -> None:
        super().__init__()
        widths = [4, 6, 8, 10]
        pairs = list(pairwise(widths))
        self.first, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.up = nn.ModuleList(nn.Conv2d(a + b, a, 3, padding=1) for a, b in reversed(pairs))

    def forward(self, image: torch.Tensor) -> Outputs:
        x = self.first(image)
        skips = []
        for down in self.down:
            skips.append(x)
            x = F.relu(down(x))
        for up in self.up:
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[-2:])
            x = F.relu(up(torch.cat([x, skip], dim=1)))
        return self.last(x), x.mean(dim=(1, 2, 3))


class BasicBlock(nn.Module):
    """Writes in place where it can."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.norms[0](self.convs[0](x)))
        out = self.norms[1](self.convs[1](out))
        out += x
        return self.relu(out)


class InPlaceResnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        self.blocks = nn.Sequential(*(BasicBlock(6) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> Outputs:
        return (self.last(self.blocks(self.first(x)).mean(dim=(2, 3))),)


class ThroughViews(nn.Module):
    """Parts of a tensor are written while the whole has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> Outputs:
        whole = self.layers[0](x)
        part = whole[:, :2]
        part.mul_(self.layers[1](x)[:, :2])
        whole = self.layers[2](whole) + part.sum(dim=1, keepdim=True) + whole
        whole[:, 0] = 3.0
        return (self.layers[3](whole), whole)


class Tied(nn.Module):
    """The table of the first operation is the weight of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.blocks = nn.Sequential(*(Residual() for _ in range(3)))

    def forward(self, ids: torch.Tensor) -> Outputs:
        return (F.linear(self.blocks(self.table(ids)), self.table.weight),)


class SharedBlock(nn.Module):
    """One block is called again and again, another between."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Residual(), Residual()

    def forward(self, x: torch.Tensor) -> Outputs:
        x = self.block(self.block(x))
        return (self.block(self.other(x)),)


class Buffered(nn.Module):
    """Adds positions from buffers, which are of no state dict, and looks at sizes on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(50, 16), persistent=False)
        self.register_buffer("scale", torch.tensor(1.5))
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: torch.Tensor) -> Outputs:
        for block in self.blocks:
            positions = torch.arange(x.shape[1], device=x.device)
            x = block(x + self.table[positions] * self.scale) / x.shape[1]
        return (x,)


class Positioned(nn.Module):
    """Makes beside its first layer's output what its last layers need."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x: torch.Tensor) -> Outputs:
        x = self.blocks[0](x)
        positions = torch.arange(x.shape[1], device=x.device)[:, None] / x.shape[1]
        for block in self.blocks[1:]:
            x = block(x + positions)
        return (x,)


class Masked(nn.Module):
    """What is made of the mask is needed in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Outputs:
        bias = torch.zeros_like(x[..., :1]).masked_fill(~mask[..., None], -3.0)
        for block in self.blocks:
            x = block(x + bias)
        return (x,)


class WrittenMask(nn.Module):
    """Makes of its inputs alone, in place, what all blocks add."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(32) for _ in range(6))

    def forward(self, x: torch.Tensor) -> Outputs:
        bias = torch.zeros(x.shape[1], 1)
        bias[:2] = -3.0
        for block in self.blocks:
            x = block(x + bias)
        return (x,)


class PlainMask(WrittenMask):
    def forward(self, x: torch.Tensor) -> Outputs:
        bias = torch.arange(x.shape[1])[:, None] * 0.5
        for block in self.blocks:
            x = block(x + bias)
        return (x,)


class LastFirst(nn.Module):
    """Gives its input back, and something of the first layer last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> Outputs:
        first = self.layers[0](x)
        return x, self.layers[2](self.layers[1](first)), first


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Hardswish(), nn.Conv1d(8, 8, 3),
            nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.5), nn.Conv1d(8, 4, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> Outputs:
        return (self.layers(x),)


class Branching(nn.Module):
    """Goes one way or another by what a layer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left = nn.Linear(8, 16), Residual()
        self.middle, self.right, self.last = Residual(), Residual(), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> Outputs:
        x = self.middle(self.first(x))
        x = self.left(x) if bool(x.mean() > 0) else self.right(self.right(x))
        return (self.last(x),)


class Gated(nn.Module):
    """Only looks at what its first layer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.first = nn.Linear(8, 3), nn.Linear(8, 16)
        self.left, self.right = Residual(), Residual()

    def forward(self, x: torch.Tensor) -> Outputs:
        is_left = bool(self.gate(x).mean() > 0)
        x = self.first(x)
        return (self.left(x) if is_left else self.right(x),)


class BranchingInside(nn.Module):
    """One of its blocks does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ResidualMlp(2), Branching(), ResidualMlp(2)])
        self.joints = nn.ModuleList([nn.Linear(5, 8), nn.Linear(3, 8)])

    def forward(self, x: torch.Tensor) -> Outputs:
        x = self.joints[0](self.blocks[0](x)[0])
        x = self.joints[1](self.blocks[1](x)[0])
        return self.blocks[2](x)


class BranchingByInput(nn.Module):
    """Goes another way by its inputs alone, through the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Outputs:
        bias = 0.0 if bool(mask.all()) else mask[..., None].float() - 1.0
        for block in self.blocks:
            x = block(x + bias)
        return (x,)


@dataclass(frozen=True)
class Shape:
    """``inputs`` draws for a batch and a length."""

    module: Callable[[], nn.Module]
    inputs: Callable[[int, int], list[torch.Tensor]]
    varying: Sequence[Sequence[int]] = ((0,),)
    pieces: tuple[int, int] = (3, 64)


def rows(batch: int, length: int) -> list[torch.Tensor]:
    return [torch.randn(batch, 8)]


def mask(batch: int, length: int) -> torch.Tensor:
    return torch.arange(length) < torch.randint(1, length + 1, (batch, 1))


SHAPES = {
    "residual_mlp": Shape(ResidualMlp, rows, pieces=(5, 10)),
    "unet": Shape(
        Unet, lambda b, n: [torch.randn(b, 2, n + 14, 2 * n + 11)], [[0, 2, 3]], pieces=(4, 64)
    ),
    "in_place": Shape(InPlaceResnet, lambda b, n: [torch.randn(b, 3, 9, 9)], pieces=(4, 64)),
    "through_views": Shape(ThroughViews, lambda b, n: [torch.randn(b, 6)], pieces=(1, 64)),
    "tied": Shape(Tied, lambda b, n: [torch.randint(0, 30, (b, n))], [[0, 1]]),
    "shared_block": Shape(SharedBlock, lambda b, n: [torch.randn(b, 16)]),
    "buffered": Shape(Buffered, lambda b, n: [torch.randn(b, n, 16)], [[0, 1]]),
    "positioned": Shape(Positioned, lambda b, n: [torch.randn(b, n, 16)], [[0, 1]]),
    "masked": Shape(
        Masked, lambda b, n: [torch.randn(b, n, 16), mask(b, n)], [[0, 1], [0, 1]]
    ),
    "written_mask": Shape(WrittenMask, lambda b, n: [torch.randn(b, n, 32)], [[0, 1]]),
    "plain_mask": Shape(PlainMask, lambda b, n: [torch.randn(b, n, 32)], [[0, 1]]),
    "last_first": Shape(LastFirst, rows),
    "normed": Shape(Normed, lambda b, n: [torch.randn(b, 3, n + 5)], [[0, 2]]),
}  # fmt: skip
BRANCHING = {
    "branching": Shape(Branching, rows, pieces=(2, 4)),
    "gated": Shape(Gated, rows, pieces=(2, 2)),
    "branching_inside": Shape(BranchingInside, rows, pieces=(4, 20)),
    "branching_by_input": Shape(
        BranchingByInput, lambda b, n: [torch.randn(b, n, 16), mask(b, n)], [[0, 1], [0, 1]]
    ),
}


def assert_right(pieces: Pieces, module: nn.Module, shape: Shape) -> None:
    cuts = [cut(pieces, num) for num in {1, *(min(n, pieces.num_pieces) for n in (2, 3, 64))}]
    for batch, length in [(2, 6), (1, 5), (7, 11)]:
        for seed in range(3):
            torch.manual_seed(seed)
            inputs = shape.inputs(batch, length)
            with torch.inference_mode():
                wanted = module(*(given.clone() for given in inputs))
            for stages in cuts:
                assert_same(run_cut(stages, inputs), wanted)


def drawn(shape: Shape) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return draw_weights(shape.module()), shape.inputs(2, 6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SHAPES)
def test_stages_give_what_the_module_gives(name: str, way: str) -> None:
    shape = SHAPES[name]
    module, example = drawn(shape)
    pieces = WAYS[way](module, example, shape.varying)
    least, most = shape.pieces
    assert least <= pieces.num_pieces <= most
    assert len(pieces.carried_bytes) == pieces.num_pieces - 1
    assert all(count > 0 for count in pieces.carried_bytes)
    held = sum(weight.nbytes for weight in [*module.parameters(), *module.buffers()])
    assert 0.9 * held <= sum(pieces.weight_bytes) <= 1.1 * held
    assert_right(pieces, module, shape)


@pytest.mark.parametrize("name", BRANCHING)
def test_what_looks_at_values_goes_by_submodules(name: str) -> None:
    shape = BRANCHING[name]
    module, example = drawn(shape)
    with pytest.raises(ModelError, match=r"torch\.export cannot follow"):
        by_operations(module, example, shape.varying)
    pieces = take_apart(module, example, shape.varying)
    assert not isinstance(pieces.way, ExportedPieces)
    least, most = shape.pieces
    assert least <= pieces.num_pieces <= most
    assert_right(pieces, module, shape)


def test_what_the_inputs_alone_give_is_made_anew_unless_written_to() -> None:
    hidden = 2 * 6 * 32 * 4
    for name, extra in {"plain_mask": 0, "written_mask": 6 * 4}.items():
        module, example = drawn(SHAPES[name])
        pieces = by_operations(module, example, [[0, 1]])
        assert min(pieces.carried_bytes[1:-1]) == hidden + extra


def test_what_is_made_where_an_earlier_output_lies_bars_no_border() -> None:
    module, example = drawn(SHAPES["positioned"])
    pieces = by_submodules(module, example, [[0, 1]])
    assert pieces.num_pieces == ModulePieces(module, example).num_pieces > 4


def test_what_is_written_through_views_is_cut_where_no_name_is_lost() -> None:
    module, example = drawn(SHAPES["through_views"])
    assert by_operations(module, example, [[0]]).num_pieces > 1


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> Outputs:
        return (self.layer(x),)


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> Outputs:
        return (x,)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Single, Nothing])
def test_one_layer_or_none_is_one_piece(kind: type[nn.Module], way: str) -> None:
    module = draw_weights(kind())
    pieces = WAYS[way](module, [torch.randn(2, 8)], [[0]])
    assert pieces.num_pieces == 1
    assert pieces.carried_bytes == ()
    x = torch.randn(5, 8)
    assert_same(run_cut(cut(pieces, 1), [x]), module(x))


class Experts(nn.Module):
    """Each row is computed by the experts that its own values choose."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.norm = nn.Linear(16, 4), nn.LayerNorm(16)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.router(x).argmax(dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (index,) = torch.where(chosen == number)
            if len(index):
                out[index] = expert(x[index])
        return self.norm(x + out)


class RoutedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(3))

    def forward(self, x: torch.Tensor) -> Outputs:
        for layer in self.layers:
            x = layer(x)
        return (x,)


def test_routing_by_values_stays_within_a_piece(capfd: pytest.CaptureFixture[str]) -> None:
    shape = Shape(RoutedMlp, lambda b, n: [torch.randn(b, 16)])
    module, example = drawn(shape)
    pieces = take_apart(module, example, [[0]])
    assert capfd.readouterr() == ("", "")
    assert pieces.num_pieces >= 3
    assert_right(pieces, module, shape)


class KeptAside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.store, self.rest = Storing(), nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: torch.Tensor) -> Outputs:
        y = self.store(x)
        if bool(y.isnan().any()):
            raise ValueError("not a number")
        for block in self.rest:
            y = block(y)
        return (y + self.store.aside[0],)


class Storing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.aside: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        self.aside[:] = [y * 2]
        return y.tanh()


def test_values_that_pass_aside_of_outputs_allow_no_border() -> None:
    shape = Shape(KeptAside, lambda b, n: [torch.randn(b, 16)])
    module, example = drawn(shape)
    pieces = take_apart(module, example, [[0]])
    assert pieces.num_pieces == 1
    assert_right(pieces, module, shape)


def test_another_way_than_the_examples_is_refused_not_computed() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Residual() for _ in range(3))

        def forward(self, x: torch.Tensor, flag: torch.Tensor) -> Outputs:
            x = self.blocks[0](x)
            if bool(flag.any()):
                x = self.blocks[1](x)
            return (self.blocks[2](x),)

    module = draw_weights(Skipping())
    x, flag = torch.randn(2, 16), torch.ones(2, dtype=torch.bool)
    pieces = take_apart(module, [x, flag], [[0], [0]])
    assert pieces.num_pieces >= 3
    assert_same(run_cut(cut(pieces, 3), [x, flag]), module(x, flag))
    with pytest.raises(InputError, match="another order"):
        run_cut(cut(pieces, 3), [x, ~flag])


class WritesOutput(nn.Module):
    """Writes to what a layer gave, which is needed again much later."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: torch.Tensor) -> Outputs:
        first = self.first(x)
        first += 1.0
        y = self.blocks[0](first.tanh())
        y = self.blocks[1](y) * first
        return (self.blocks[2](y),)


def test_borders_that_fail_the_proof_are_left_out() -> None:
    shape = Shape(WritesOutput, rows)
    module, example = drawn(shape)
    places = ModulePieces(module, example).starts
    pieces = by_submodules(module, example, [[0]])
    assert 2 <= pieces.num_pieces < len(places) - 1
    assert_right(pieces, module, shape)


class WritesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Outputs:
        x.mul_(2.0)
        return (self.layer(x),)


class Counts(WritesInput):
    """Its result depends on how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Outputs:
        self.calls += 1
        return (self.layer(x) * self.calls,)


class Listed(WritesInput):
    def forward(self, x: torch.Tensor) -> Outputs:
        return [self.layer(x)]  # type: ignore[return-value]


class Random(WritesInput):
    def forward(self, x: torch.Tensor) -> Outputs:
        return (self.layer(x) + torch.randn_like(x),)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (WritesInput, "writes into its inputs"),
        (Counts, "buffers|inputs or weights|differs"),
        (Listed, "tuple of tensors"),
        (Random, "differs from the whole"),
    ],
)
def test_what_cannot_be_right_is_refused(kind: type[nn.Module], said: str) -> None:
    module = draw_weights(kind())
    with pytest.raises(ModelError, match=said) as caught:
        take_apart(module, [torch.randn(2, 8)], [[0]])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_weights_and_callers_may_be_in_inference_mode(way: str) -> None:
    shape = SHAPES["buffered"]
    with torch.inference_mode():
        module, example = drawn(shape)
        pieces = WAYS[way](module, example, shape.varying)
    assert pieces.num_pieces >= 3
    assert_right(pieces, module, shape)


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_stages_run_outside_of_inference_mode_too(way: str, is_trained: bool) -> None:
    shape = SHAPES["tied"]
    module, example = drawn(shape)
    module.requires_grad_(is_trained)
    pieces = WAYS[way](module, example, shape.varying)
    carried: list[torch.Tensor | int] = []
    with torch.no_grad():
        for piece in range(pieces.num_pieces):
            carried = pieces.stage(piece, piece + 1).run(example, carried)
        assert_same([t for t in carried if isinstance(t, torch.Tensor)], module(*example))


def test_training_mode_is_refused() -> None:
    with pytest.raises(ModelError, match=r"call its eval\(\)"):
        take_apart(ResidualMlp(), [torch.randn(2, 8)], [[0]])


def test_inputs_that_the_pieces_are_not_for_are_refused() -> None:
    shape = SHAPES["masked"]
    module, example = drawn(shape)
    stage = by_operations(module, example, shape.varying).stage(0, 2)
    x, seen = shape.inputs(3, 7)
    for wrong, said in [
        ([x], "1 inputs came, 2 are expected"),
        ([x.double(), seen], "input 0 is torch.float64"),
        ([x[..., :15], seen], r"expected is torch.float32 \[None, None, 16\]"),
        ([x, seen[:, :5]], "do not go together"),
    ]:
        with pytest.raises(InputError, match=said):
            stage.run(wrong, [])


def test_what_only_the_batch_may_vary_in_says_so() -> None:
    """Python turns the length into a number of layers: no graph and no order holds for all."""

    class Deep(ResidualMlp):
        def forward(self, x: torch.Tensor) -> Outputs:
            x = self.first(x)
            for block in self.blocks[: x.shape[1] % 4 + 1]:
                x = block(x)
            return (self.last(x),)

    module = draw_weights(Deep())
    example = torch.randn(2, 7, 8)
    pieces = take_apart(module, [example], [[0, 1]])
    assert pieces.varying == ((0,),)
    x = torch.randn(5, 7, 8)
    assert_same(run_cut(cut(pieces, 3), [x]), module(x))
    with pytest.raises(InputError, match="input 0"):
        run_cut(cut(pieces, 3), [x[:, :6]])


@pytest.mark.parametrize("way", WAYS)
def test_a_stage_keeps_its_own_weights_and_no_others(way: str) -> None:
    module, example = drawn(SHAPES["residual_mlp"])
    pieces = WAYS[way](module, example, [[0]])
    last = pieces.stage(pieces.num_pieces - 1, pieces.num_pieces)
    own = {tensor.data_ptr() for tensor in last.tensors()}
    assert 0 < sum(tensor.nbytes for tensor in last.tensors()) == pieces.weight_bytes[-1]
    assert pieces.weight_bytes[-1] < 0.5 * sum(pieces.weight_bytes)
    others = [
        weakref.ref(weight.untyped_storage())
        for weight in module.parameters()
        if weight.data_ptr() not in own
    ]
    assert len(others) + len(own) == len(list(module.parameters()))
    del module, pieces
    gc.collect()
    assert [other() for other in others if other() is not None] == []
    assert {tensor.data_ptr() for tensor in last.tensors()} == own


@library.custom_op("spanwise_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class WithOperation(ResidualMlp):
    def forward(self, x: torch.Tensor) -> Outputs:
        x = self.first(x)
        for block in self.blocks:
            x = torch.ops.spanwise_tests.twice(block(x))
        return (self.last(x),)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("overload", [True, False])
def test_operations_are_replaced(way: str, overload: bool) -> None:
    module = draw_weights(WithOperation())
    x = torch.randn(3, 8)
    pieces = WAYS[way](module, [x], [[0]])
    packet = torch.ops.spanwise_tests.twice
    calls = list[torch.Size]()

    class Twice:
        def __call__(self, given: torch.Tensor) -> torch.Tensor:
            calls.append(given.shape)
            return given + given

    stage = pieces.stage(0, pieces.num_pieces, {packet.default if overload else packet: Twice()})
    with torch.inference_mode():
        assert_same([t for t in stage.run([x], []) if isinstance(t, torch.Tensor)], module(x))
    assert calls == [torch.Size([3, 16])] * 4


def test_a_stage_moves_with_all_it_makes() -> None:
    """Onto a device where nothing can be mixed with what was left behind."""
    module, example = drawn(SHAPES["buffered"])
    pieces = by_operations(module, example, [[0, 1]])
    meta = torch.device("meta")
    carried: list[torch.Tensor | int] = []
    for piece in range(pieces.num_pieces):
        stage = pieces.stage(piece, piece + 1)
        stage.to(meta)
        assert all(tensor.is_meta for tensor in stage.tensors())
        carried = stage.run([torch.empty(3, 7, 16, device=meta)], carried)
    (output,) = carried
    assert isinstance(output, torch.Tensor) and output.is_meta
    assert output.shape == (3, 7, 16)
    assert not any(weight.is_meta for weight in module.parameters())


def test_every_process_cuts_alike() -> None:
    module, example = drawn(SHAPES["unet"])
    first, again = (take_apart(module, example, [[0, 2, 3]]) for _ in range(2))
    assert first.carried_bytes == again.carried_bytes
    assert first.weight_bytes == again.weight_bytes


def test_costs_are_of_the_pieces() -> None:
    class Lopsided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up = nn.Embedding(50_000, 16), nn.Linear(16, 2048)
            self.large = nn.Linear(2048, 2048)

        def forward(self, ids: torch.Tensor) -> Outputs:
            return (self.large(self.up(self.table(ids))),)

    module = draw_weights(Lopsided())
    ids = torch.randint(0, 50_000, (64,))
    pieces = take_apart(module, [ids], [[0]])
    costs = pieces.costs_s([ids])
    assert len(costs) == pieces.num_pieces == 2
    assert 0 < 3 * costs[0] < costs[1]


class Caching(nn.Module):
    """Keeps what it made for a length until another comes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> Outputs:
        if self.table is None or self.table.shape[0] != x.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        for block in self.blocks:
            x = block(x + self.table)
        return (x,)


def test_what_a_module_keeps_is_not_of_an_export() -> None:
    shape = Shape(Caching, lambda b, n: [torch.randn(b, n, 16)], [[0, 1]])
    module, example = drawn(shape)
    pieces = take_apart(module, example, shape.varying)
    assert type(module.get_parameter("blocks.0.up.weight")) is nn.Parameter
    assert type(vars(module)["table"]) is torch.Tensor
    assert pieces.num_pieces >= 3
    assert_right(pieces, module, shape)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.LSTM(8, 16, 2, batch_first=True), Residual()
        self.middle = nn.GRU(16, 8, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> Outputs:
        y, _ = self.first(x)
        y, state = self.middle(y)
        return self.last(y), state


class Attending(nn.Module):
    """Modules of torch which have a faster way than that through their submodules."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> Outputs:
        x = self.encoder(x)
        output, weights = self.attention(x, x, x)
        return output, weights


class Mixed(nn.Module):
    """Computes a part in another precision, and a part on numbers that are no floats."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x: torch.Tensor) -> Outputs:
        x = self.blocks[0](x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.blocks[1](x)
        x = self.blocks[2](x.float())
        largest, place = x.topk(3)
        spectrum = torch.fft.rfft(x)
        return self.blocks[3](x), spectrum.abs(), place, largest > 0


@pytest.mark.parametrize(("kind", "width"), [(Recurrent, 8), (Attending, 16), (Mixed, 16)])
def test_modules_of_torch(kind: type[nn.Module], width: int) -> None:
    shape = Shape(kind, lambda b, n: [torch.randn(b, n, width)], [[0, 1]])
    module, example = drawn(shape)
    pieces = take_apart(module, example, shape.varying)
    assert isinstance(pieces.way, ExportedPieces) == (kind is Mixed)
    assert pieces.num_pieces >= 3
    assert pieces.varying == ((0, 1),)
    assert_right(pieces, module, shape)


@pytest.mark.parametrize("name", SHAPES)
def test_every_place_that_is_not_barred_can_be_cut(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everywhere(carried: Sequence[int | None], *_: object) -> list[int]:
        return [place for place, count in enumerate(carried, 1) if count is not None]

    monkeypatch.setattr(exported_pieces, "choose_borders", everywhere)
    shape = SHAPES[name]
    module, example = drawn(shape)
    pieces = by_operations(module, example, shape.varying)
    assert pieces.num_pieces >= 3
    assert_right(pieces, module, shape)


def test_the_module_is_left_as_it_was() -> None:
    module, example = drawn(SHAPES["masked"])
    before = {name: dict(vars(part)) for name, part in module.named_modules()}
    marks = [set(dir(given)) for given in example]
    for way in WAYS.values():
        way(module, example, [[0, 1], [0, 1]])
    assert {name: dict(vars(part)) for name, part in module.named_modules()} == before
    assert [set(dir(given)) for given in example] == marks

"""Modules of all kinds over ranks that are threads, against the whole module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.support.ranks import on_ranks
from torch import library, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedModel, ResNetConfig, ResNetModel
from transformers.pytorch_utils import Conv1D

from spanwise.comm.communicator import RankComm
from spanwise.comm.segment import SegmentLayout
from spanwise.model.exchange import Exchange
from spanwise.model.module_parallel import (
    SplitReport,
    max_tensor_parallel,
    split_module,
    tensor_refusal,
)

Outputs = tuple[torch.Tensor, ...]
BOUND = 1e-5
TEXT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "max_position_embeddings": 32,
}
IMAGE: dict[str, Any] = TEXT | {"image_size": 16, "patch_size": 4, "num_channels": 3}
SEQUENCES = {"d_model": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
WHISPER = {
    "vocab_size": 61,
    "d_model": 32,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 16,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 37),
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
CONVOLUTIONS = {
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}


@dataclass(frozen=True)
class Family:
    """A tiny model: its config, the shapes of what it takes, how many parts it has to split."""

    config: Mapping[str, Any]
    inputs: Mapping[str, tuple[int, ...]]
    attentions: int
    mlps: int
    whole: tuple[str, ...] = ()


POOLER = ("pooler.dense",)
IDS, DECODER, MASK = {"input_ids": (2, 9)}, {"decoder_input_ids": (2, 5)}, "attention_mask"
FAMILIES: dict[str, Family] = {
    "vit": Family(IMAGE, {"pixel_values": (2, 3, 16, 16)}, 2, 2, POOLER),
    "bert": Family(TEXT, IDS | {MASK: (2, 9)}, 2, 2, POOLER),
    "distilbert": Family(
        {"vocab_size": 61, "dim": 40, "n_heads": 5, "hidden_dim": 37, "n_layers": 2},
        IDS | {MASK: (2, 9)},
        2,
        2,
    ),
    "albert": Family(
        TEXT | {"embedding_size": 12}, IDS, 1, 1, ("encoder.embedding_hidden_mapping_in", "pooler")
    ),
    "whisper": Family(WHISPER, {"input_features": (2, 8, 24)} | DECODER, 6, 4),
    "wav2vec2": Family(
        TEXT | CONVOLUTIONS | {"num_attention_heads": 4},
        {"input_values": (2, 400)},
        2,
        2,
        ("feature_projection.projection",),
    ),
    "clip": Family(
        {
            "text_config": TEXT | {"num_attention_heads": 4},
            "vision_config": IMAGE,
            "projection_dim": 24,
        },
        IDS | {MASK: (2, 9), "pixel_values": (2, 3, 16, 16)},
        4,
        4,
        ("visual_projection", "text_projection"),
    ),
    "t5": Family(
        SEQUENCES | {"vocab_size": 61, "d_kv": 6, "d_ff": 37},
        IDS | DECODER | {MASK: (2, 9)},
        6,
        4,
    ),
    "t5-gated": Family(
        SEQUENCES | {"vocab_size": 61, "d_kv": 6, "d_ff": 37, "feed_forward_proj": "gated-gelu"},
        IDS | DECODER,
        6,
        4,
    ),
    "deberta-v2": Family(
        TEXT
        | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
        | {"share_att_key": False},
        IDS,
        2,
        2,
    ),
    "swin": Family(
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "window_size": 4}
        | {"num_heads": [4, 4]},
        {"pixel_values": (2, 3, 16, 16)},
        2,
        2,
        ("encoder.layers.0.downsample.reduction",),
    ),
    "parakeet_encoder": Family(
        TEXT | {"subsampling_conv_channels": 8, "num_mel_bins": 80},
        {"input_features": (2, 40, 80)},
        2,
        4,
        ("subsampling.linear",),
    ),
    "modernbert": Family(TEXT | {"pad_token_id": 0}, IDS, 2, 2),
}


def shuffle(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all weights so large that a lost bias, skip or head shows in every digit."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in sorted(module.named_parameters()):
            drawn = torch.randn(each.shape, generator=generator)
            if each.dim() > 1 and "embed" not in name:
                drawn *= 1.2 / each[0].numel() ** 0.5
            each.copy_(drawn + 1 if "norm" in name.lower() and name.endswith("weight") else drawn)
    return module.eval().requires_grad_(False)


def model_of(family: str) -> PreTrainedModel:
    kind = family.removesuffix("-gated")
    config = AutoConfig.for_model(kind, **FAMILIES[family].config)
    model = shuffle(AutoModel.from_config(config))
    assert isinstance(model, PreTrainedModel)
    return model


def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    if name == MASK:
        mask = torch.ones(shape, dtype=torch.long)
        mask[-1, -2:] = 0
        return mask
    if name.endswith("ids"):
        return torch.randint(3, 60, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    return {name: drawn(name, shape) for name, shape in FAMILIES[family].inputs.items()}


def run_family(family: str, inputs: Mapping[str, torch.Tensor]) -> Callable[[nn.Module], Outputs]:
    options = {"use_cache": False} if "decoder_input_ids" in inputs else {}

    def run(model: nn.Module) -> Outputs:
        given = model(**inputs, **options).values()
        return tuple(each for each in given if isinstance(each, torch.Tensor))

    return run


@dataclass(frozen=True)
class Rank:
    """What one rank made of it; ``held``: the bytes of each parameter, and those it holds on to."""

    report: SplitReport
    outputs: Outputs
    held: Mapping[str, tuple[int, int]]


def split_over(
    module: nn.Module,
    size: int,
    example: Callable[[nn.Module], Outputs],
    task: Callable[[nn.Module], Outputs] | None = None,
) -> list[Rank]:
    """Split on ``example`` and run ``task``, or that again, on ranks that are threads."""

    def body(comm: RankComm, rank: int) -> Rank:
        own, exchange = copy.deepcopy(module), Exchange()
        report = split_module(own, rank, size, exchange, lambda: example(own))
        exchange.tp = comm.tp
        with torch.inference_mode():
            outputs = (task or example)(own)
        held = {
            name: (each.nbytes, each.untyped_storage().nbytes())
            for name, each in own.named_parameters()
        }
        return Rank(report, outputs, held)

    return on_ranks(SegmentLayout(1, size, slot_bytes=1 << 16), body)


def assert_equal(outputs: Outputs, whole: Outputs) -> None:
    assert len(outputs) == len(whole) > 0
    for one, other in zip(outputs, whole, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= BOUND * other.abs().max()


# -- models of transformers --------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranks_compute_what_the_whole_does(family: str, size: int) -> None:
    model, inputs = model_of(family), inputs_of(family)
    other = {name: each.flip(0) if name != MASK else each for name, each in inputs.items()}
    task = run_family(family, other)
    whole = task(model)
    ranks = split_over(model, size, run_family(family, inputs), task)
    for rank in ranks:
        assert_equal(rank.outputs, whole)
        assert len(rank.report.attentions) == FAMILIES[family].attentions
        assert len(rank.report.mlps) == FAMILIES[family].mlps
        assert rank.report.whole == FAMILIES[family].whole
        assert rank.report == ranks[0].report


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_holds_a_share(family: str, size: int) -> None:
    """And nothing of what the others hold: a slice has memory of its own."""
    model = model_of(family)
    ranks = split_over(model, size, run_family(family, inputs_of(family)))
    linears = {name for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    for linear in linears - set(FAMILIES[family].whole):
        whole = model.get_submodule(linear).weight.nbytes
        shares = [rank.held[f"{linear}.weight"] for rank in ranks]
        assert sum(nbytes for nbytes, _ in shares) == whole
        assert all(0 < nbytes == storage < 0.7 * whole for nbytes, storage in shares)


def test_a_position_bias_is_held_for_the_own_heads() -> None:
    model = model_of("t5")
    ranks = split_over(model, 3, run_family("t5", inputs_of("t5")))
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    whole = model.get_parameter(name).nbytes
    assert [rank.held[name] for rank in ranks] == [(whole // n,) * 2 for n in (2, 4, 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_taken_for_an_error(dtype: torch.dtype) -> None:
    model = model_of("vit").to(dtype)
    inputs = {name: each.to(dtype) for name, each in inputs_of("vit").items()}
    report = split_module(model, 1, 3, Exchange(), lambda: run_family("vit", inputs)(model))
    assert len(report.attentions) == len(report.mlps) == 2


def test_a_model_is_run_once_whole_and_once_for_each_rank() -> None:
    model, runs = model_of("bert"), []

    def run() -> Outputs:
        runs.append(True)
        return run_family("bert", inputs_of("bert"))(model)

    split_module(model, 1, 3, Exchange(), run)
    assert len(runs) == 1 + 3


# -- modules written by hand -------------------------------------------------------------------


class Residual(nn.Module):
    """MLPs of every arrangement, the columns not a multiple of the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(12, 31), nn.GELU(), nn.Linear(31, 12))
        self.norm = nn.LayerNorm(12)
        self.up, self.gate, self.down = nn.Linear(12, 17), nn.Linear(12, 17), nn.Linear(17, 12)
        self.glu = nn.Sequential(nn.Linear(12, 22), nn.GLU(), nn.Linear(11, 12))
        self.old = nn.ModuleList([Conv1D(29, 12), Conv1D(12, 29)])
        self.ends = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 7), nn.Linear(7, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(self.norm(x))
        x = x + self.down(functional.silu(self.gate(x)) * self.up(x))
        x = x + self.glu(x)
        x = x + self.old[1](torch.relu(self.old[0](x)))
        return self.ends[2](self.ends[1](self.ends[0](x).tanh()))


class Attention(nn.Module):
    """Attention over ``heads`` of 4, packed by role or by head, or with fewer KV heads."""

    def __init__(self, heads: int = 6, kv_heads: int = 6, packed: str = "") -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.packed = heads, kv_heads, packed
        self.inner_dim = heads * 4
        if packed:
            self.qkv = nn.Linear(12, 3 * heads * 4)
        else:
            self.to_q, self.to_k = nn.Linear(12, heads * 4), nn.Linear(12, kv_heads * 4)
            self.to_v = nn.Linear(12, kv_heads * 4)
        self.to_out = nn.Sequential(nn.Linear(heads * 4, 12), nn.Dropout(0.1))
        self.sinks = nn.Parameter(torch.zeros(heads, 1, 1))
        self.register_buffer("slopes", torch.arange(1.0, heads + 1)[:, None, None])

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_q(x)

    def heads_of(self, x: torch.Tensor) -> list[torch.Tensor]:
        items, length = x.shape[:2]
        if self.packed == "by_role":
            return [*self.qkv(x).view(items, length, 3, self.num_heads, 4).unbind(2)]
        if self.packed == "by_head":
            return [*self.qkv(x).view(items, length, self.num_heads, 3, 4).unbind(3)]
        return [
            each.unflatten(-1, (-1, 4)) for each in (self.queries(x), self.to_k(x), self.to_v(x))
        ]

    def attend(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = (each.transpose(1, 2) for each in self.heads_of(x))
        group = self.num_heads // self.num_kv_heads
        key, value = (each.repeat_interleave(group, 1) for each in (key, value))
        scores = query @ key.transpose(2, 3) + self.slopes * torch.arange(x.shape[1])
        weights = scores.softmax(-1)
        given = (weights @ value + self.sinks).transpose(1, 2)
        return given.reshape(*x.shape[:2], self.inner_dim), weights

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self.to_out(self.attend(x)[0])


def on_vectors(model: nn.Module) -> Outputs:
    given = model(torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3)))
    return given if isinstance(given, tuple) else (given,)


@pytest.mark.parametrize("size", [2, 3])
def test_mlps_written_by_hand(size: int) -> None:
    module = shuffle(Residual())
    whole = on_vectors(module)
    for rank in split_over(module, size, on_vectors):
        assert rank.report == SplitReport((), ("", "first", "glu", "old", "ends"), ("ends.2",))
        assert_equal(rank.outputs, whole)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("packed", ["", "by_role", "by_head"])
def test_attention_written_by_hand(packed: str, size: int) -> None:
    module = shuffle(Attention(packed=packed))
    for rank in split_over(module, size, on_vectors):
        assert rank.report == SplitReport(("",), (), ())
        assert_equal(rank.outputs, on_vectors(module))
        assert rank.held["sinks"] in [(4 * n, 4 * n) for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("kv_heads", "size", "splits"), [(2, 2, True), (1, 3, True), (2, 4, False)]
)
def test_grouped_heads(kv_heads: int, size: int, splits: bool) -> None:
    """Of four ranks one would hold three queries that read two keys: two of them the first."""
    module = shuffle(Attention(heads=10, kv_heads=kv_heads))
    for rank in split_over(module, size, on_vectors):
        assert bool(rank.report.attentions) == splits
        assert_equal(rank.outputs, on_vectors(module))


def test_keys_are_held_by_each_rank_that_reads_them() -> None:
    """Four heads read two keys in groups that the module counts: of two, of one and of one."""
    config = AutoConfig.for_model(
        "eurobert",
        **TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
    )
    model, run = shuffle(AutoModel.from_config(config)), run_family("bert", inputs_of("bert"))
    for rank in split_over(model, 3, run):
        assert len(rank.report.attentions) == 2
        assert_equal(rank.outputs, run(model))
        whole = model.layers[0].self_attn.k_proj.weight.nbytes
        assert rank.held["layers.0.self_attn.k_proj.weight"] == (whole // 2, whole // 2)


class NormOfHeads(Attention):
    """Queries normed over each head: as many weights as there are heads, and yet not one each."""

    def __init__(self) -> None:
        super().__init__(heads=4, kv_heads=4)
        self.query_norm = nn.LayerNorm(4)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        return self.query_norm(self.to_q(x).unflatten(-1, (-1, 4))).flatten(-2)


def test_a_norm_over_each_head() -> None:
    module = shuffle(NormOfHeads())
    for rank in split_over(module, 2, on_vectors):
        assert rank.report == SplitReport(("",), (), ())
        assert_equal(rank.outputs, on_vectors(module))


# -- what only looks like it -------------------------------------------------------------------


class NormOverHeads(Attention):
    """Queries normed over all heads, by a norm without weights, which takes any width."""

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(self.to_q(x), (self.to_q.out_features,))


class WeightedNormOverHeads(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(24)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        return self.query_norm(self.to_q(x))


class MixedHeads(Attention):
    """Each head's values are those of the next one."""

    def heads_of(self, x: torch.Tensor) -> list[torch.Tensor]:
        query, key, value = super().heads_of(x)
        return [query, key, value.roll(1, 2)]


class Softmaxed(nn.Sequential):
    """Columns that depend on one another."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 20), nn.Softmax(-1), nn.Linear(20, 12))


class Read(nn.Module):
    """Columns that go another way too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        columns = self.up(x)
        return self.down(columns) * columns.mean(-1, keepdim=True)


class WeightsRead(nn.Module):
    """Linears that are not called: only their weights are used."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.up.weight.T @ self.down.weight.T


class Twice(nn.Module):
    """The linear back is called with what the other gave, and with what it did not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x)) + self.down(x.new_ones(20))


class Fickle(nn.Module):
    """Asks how wide a linear is, and leaves others out: their sums would come on no other rank."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.idle = nn.ModuleList([nn.Linear(12, 30), nn.Linear(30, 12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = self.down(self.up(x))
        if self.up.out_features == 20:
            self.idle[1](self.idle[0](x))
        return given


def test_sums_that_do_not_come_are_missed() -> None:
    module = shuffle(Fickle())
    report = split_module(module, 1, 2, Exchange(), lambda: on_vectors(module))
    assert report == SplitReport((), ("idle",), ("up", "down"))


LOOKALIKES = [
    *(NormOverHeads, WeightedNormOverHeads, MixedHeads),
    *(Softmaxed, Read, WeightsRead, Twice),
]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", LOOKALIKES)
def test_what_only_looks_like_it_stays_whole(kind: Callable[[], nn.Module], size: int) -> None:
    """What stands before it and behind it is split."""
    module = shuffle(nn.Sequential(Residual().first, kind(), Residual().first))
    linears = (f"1.{n}" for n, m in module[1].named_modules() if isinstance(m, nn.Linear))
    report = SplitReport((), ("0", "2"), tuple(linears))
    for rank in split_over(module, size, on_vectors):
        assert rank.report == report
        assert_equal(rank.outputs, on_vectors(module))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_over_all_heads_is_seen_in_half_precision(dtype: torch.dtype) -> None:
    module = shuffle(NormOverHeads(heads=48, kv_heads=48)).to(dtype)
    report = split_module(
        module, 0, 2, Exchange(), lambda: (module(drawn("x", (2, 9, 12)).to(dtype)),)
    )
    assert report == SplitReport((), (), ("to_q", "to_k", "to_v", "to_out.0"))


class WeightsGiven(Attention):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads, weights = self.attend(x)
        return self.to_out(heads), weights


def test_a_trial_leaves_no_trace() -> None:
    """Weights given beside the result are those of the own heads: nothing can be split."""
    module = shuffle(WeightsGiven())
    whole, before = on_vectors(module), dict(module.named_parameters())
    report = split_module(module, 0, 2, Exchange(), lambda: on_vectors(module))
    assert report == SplitReport((), (), ("to_q", "to_k", "to_v", "to_out.0"))
    assert all(each is before[name] for name, each in module.named_parameters())
    assert "forward" not in module.to_out[0].__dict__
    assert (module.num_heads, module.to_q.out_features) == (6, 24)
    assert all(torch.equal(*pair) for pair in zip(on_vectors(module), whole, strict=True))


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_layer_of_torch_that_does_not_call_its_linears_stays_whole(batch_first: bool) -> None:
    """A fast path reads their weights, but not where it finds a hook, or items second."""
    module = shuffle(nn.TransformerEncoderLayer(12, 2, 20, batch_first=batch_first))
    with torch.inference_mode():
        whole = on_vectors(module)
    for rank in split_over(module, 2, on_vectors):
        assert rank.report.mlps == (() if batch_first else ("",))
        assert_equal(rank.outputs, whole)


def test_what_is_split_is_not_split_again() -> None:
    module = shuffle(nn.Sequential(Attention(), Residual().first))
    first = split_module(module, 0, 2, Exchange(), lambda: on_vectors(module))
    assert (first.attentions, first.mlps) == (("0",), ("1",))
    again = split_module(module, 0, 2, Exchange(), lambda: on_vectors(module))
    assert (again.attentions, again.mlps) == ((), ())


def test_weights_can_be_exported_after_a_split_in_inference_mode() -> None:
    module = shuffle(Residual())
    with torch.inference_mode():
        split_module(module, 0, 2, Exchange(), lambda: on_vectors(module))
    assert not any(each.is_inference() for each in module.parameters())


def test_what_the_model_raises_is_passed_on() -> None:
    module = shuffle(Residual())

    def run() -> Outputs:
        return (module(torch.zeros(2, 11)),)

    with pytest.raises(RuntimeError, match="normalized_shape"):
        split_module(module, 0, 2, Exchange(), run)


# -- facts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "heads"), [("vit", 5), ("clip", 5), ("t5", 4), ("whisper", 4), ("modernbert", 5)]
)
def test_the_heads_say_how_many_ranks(family: str, heads: int) -> None:
    with torch.device("meta"):
        kind = AutoConfig.for_model(family, **FAMILIES[family].config)
        model = AutoModel.from_config(kind)
    assert (tensor_refusal(model), max_tensor_parallel(model)) == ("", heads)


def test_the_columns_say_how_many_ranks_where_there_are_no_heads() -> None:
    assert (tensor_refusal(Residual()), max_tensor_parallel(Residual())) == ("", 31)


def test_convolutions_are_refused() -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_channels=3)
    with torch.device("meta"):
        model = ResNetModel(config)
    assert max_tensor_parallel(model) == 1
    assert "ResNetModel has no attention" in tensor_refusal(model)
    assert "convolutions stay whole" in tensor_refusal(model)


def test_more_ranks_than_heads_leave_the_attention_whole() -> None:
    """The MLPs are split all the same."""
    model, run = model_of("bert"), run_family("bert", inputs_of("bert"))
    for rank in split_over(model, 6, run):
        assert rank.report.attentions == ()
        assert len(rank.report.mlps) == 2
        assert_equal(rank.outputs, run(model))


# -- exported graphs ---------------------------------------------------------------------------


class Positional(nn.Module):
    """A model of transformers called with a tensor, giving one."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(pixel_values).last_hidden_state
        return hidden


def retargeted(program: torch.export.ExportedProgram, exchange: Exchange) -> tuple[Any, int]:
    """The graph with the group's sum in the place of the operation, and how many there were."""
    graph_module = program.module()
    nodes = [
        node
        for node in graph_module.graph.nodes
        if node.target is torch.ops.spanwise.sum_over_ranks.default
    ]
    for node in nodes:
        node.target = exchange.all_reduce
    graph_module.recompile()
    return graph_module, len(nodes)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_exported_share_sums_where_it_is_told_to(size: int) -> None:
    model = Positional(model_of("vit"))
    pixels = drawn("pixel_values", (2, 3, 16, 16))
    whole = model(pixels)

    def body(comm: RankComm, rank: int) -> torch.Tensor:
        graph_module, num_sums = retargeted(programs[rank], Exchange(comm.tp))
        assert num_sums == 4  # of two attentions and two MLPs
        with torch.inference_mode():
            given: torch.Tensor = graph_module(pixels)
        return given

    programs = []
    for rank in range(size):
        own, exchange = copy.deepcopy(model), Exchange()
        split_module(own, rank, size, exchange, lambda own=own: (own(pixels),))
        programs.append(torch.export.export(own, (pixels,), strict=False))
    for outputs in on_ranks(SegmentLayout(1, size, slot_bytes=1 << 16), body):
        assert_equal((outputs,), (whole,))


def test_the_operation_alone_is_the_sum_over_one() -> None:
    tensor = drawn("x", (3, 4))
    total = torch.ops.spanwise.sum_over_ranks(tensor)
    assert torch.equal(total, tensor) and total is not tensor
    library.opcheck(torch.ops.spanwise.sum_over_ranks, (tensor,))

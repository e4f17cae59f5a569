"""Checkpoints of tiny random models of every family: what is loaded is what was saved."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import Chunk, Concatenate, Transpose, WeightConverter

from spanwise.errors import ModelError
from spanwise.model import conversion, source
from spanwise.model.checkpoint import Checkpoint, TensorCut, WantedTensor

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MOE = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
}
FAMILIES = {
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": COMMON,
    "qwen2": COMMON,
    "qwen3": COMMON,
    "mistral": COMMON,
    "gemma2": COMMON | {"head_dim": 8},
    "phi3": COMMON,
    "olmo2": COMMON,
    "mixtral": COMMON | {"num_local_experts": 8},
    "qwen3_moe": COMMON | MOE,
    "deepseek_v3": COMMON | MLA | {"num_key_value_heads": 4},
    "gpt_oss": COMMON | {"num_local_experts": 8, "head_dim": 8},
}
MERGED_NAMES = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.7.w3.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "deepseek_v3": "model.layers.1.mlp.experts.5.up_proj.weight",
}


def make_model(family: str, **changes: object) -> PreTrainedModel:
    """A random model in which no two values agree by accident."""
    config = AutoConfig.for_model(family, **(FAMILIES[family] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(len(family))
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def on_meta(family: str, **changes: object) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **(FAMILIES[family] | changes))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def whole(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> WantedTensor:
    return WantedTensor(tuple(tensor.shape), dtype)


def random_cuts(shape: torch.Size, draw: random.Random) -> tuple[TensorCut, ...]:
    dims = draw.sample(range(len(shape)), draw.randint(0, len(shape)))
    return tuple(TensorCut(dim, random_ranges(shape[dim], draw)) for dim in dims)


def random_ranges(size: int, draw: random.Random) -> tuple[tuple[int, int], ...]:
    edges = sorted(draw.randint(0, size) for _ in range(2 * draw.randint(1, 3)))
    ranges = list(zip(edges[::2], edges[1::2], strict=True))
    draw.shuffle(ranges)
    return tuple(ranges)


def apply_cuts(tensor: torch.Tensor, cuts: tuple[TensorCut, ...]) -> torch.Tensor:
    for cut in cuts:
        kept = [index for begin, end in cut.ranges for index in range(begin, end)]
        tensor = tensor.index_select(cut.dim, torch.tensor(kept, dtype=torch.int64))
    return tensor


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_loaded_as_it_was_saved(
    family: str, shard_size: str, tmp_path: Path
) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    stored = {name for path in tmp_path.glob("*.safetensors") for name in load_file(path)}
    assert MERGED_NAMES.get(family, next(iter(stored))) in stored

    checkpoint = Checkpoint.open(tmp_path, on_meta(family))
    checkpoint.validate()
    draw = random.Random(family)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(checkpoint.load(name, whole(expected)), expected, rtol=0, atol=0)
        for _ in range(4):
            cuts = random_cuts(expected.shape, draw)
            got = checkpoint.load(name, WantedTensor(tuple(expected.shape), torch.float32, cuts))
            assert got.is_contiguous()
            torch.testing.assert_close(got, apply_cuts(expected, cuts), rtol=0, atol=0)
            view = checkpoint.view(name, WantedTensor(tuple(expected.shape), torch.float32, cuts))
            assert view is None or torch.equal(view, got)


def test_what_lies_in_one_piece_is_seen_without_a_copy(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path, on_meta("llama"))
    name = "model.layers.0.mlp.up_proj.weight"
    stored = load_file(tmp_path / "model.safetensors")[name]
    rows, columns = stored.shape

    def seen(*cuts: TensorCut, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        return checkpoint.view(name, WantedTensor((rows, columns), dtype, cuts))

    part = seen(TensorCut(0, ((1, 5),)))
    assert part is not None and torch.equal(part, stored[1:5])
    again = seen(TensorCut(0, ((1, 5),)))
    assert again is not None and again.data_ptr() == part.data_ptr()
    assert seen(TensorCut(0, ((1, 2), (4, 5)))) is None
    assert seen(TensorCut(1, ((0, columns // 2),))) is None
    assert seen(dtype=torch.bfloat16) is None


def test_values_are_converted_to_the_wanted_dtype(tmp_path: Path) -> None:
    model = make_model("mixtral")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path, on_meta("mixtral"))
    for name, expected in model.state_dict().items():
        got = checkpoint.load(name, whole(expected, torch.bfloat16))
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, expected.to(torch.bfloat16))


def test_loaded_memory_is_its_own(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path, on_meta("llama"))
    wanted = whole(model.state_dict()["model.norm.weight"])
    checkpoint.load("model.norm.weight", wanted).zero_()
    assert checkpoint.load("model.norm.weight", wanted).abs().min() > 0


@pytest.mark.parametrize("family", MERGED_NAMES)
def test_only_the_wanted_experts_are_read(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(family).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path, on_meta(family))
    read: list[int] = []
    copy_into = source.Stored.copy_into

    def spy(self: source.Stored, out: torch.Tensor, part: source.Part) -> None:
        read.append(out.numel())
        copy_into(self, out, part)

    monkeypatch.setattr(source.Stored, "copy_into", spy)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    shape = tuple(checkpoint.full.tensors[name].shape)
    width = shape[1]
    # One expert of eight, and of it a half of gate and a half of up.
    halves = ((0, width // 4), (width // 2, 3 * width // 4))
    cuts = (TensorCut(0, ((3, 4),)), TensorCut(1, halves))
    got = checkpoint.load(name, WantedTensor(shape, torch.float32, cuts))
    assert got.shape == (1, width // 2, shape[2])
    assert sum(read) == got.numel()


def test_a_base_model_without_its_prefix_loads_with_buffers_of_old(tmp_path: Path) -> None:
    model = make_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    assert "h.0.attn.c_attn.weight" in stored
    stored |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.ones(1)}
    save_file(stored, path)
    checkpoint = Checkpoint.open(tmp_path, on_meta("gpt2"))
    checkpoint.validate()
    for name, expected in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(checkpoint.load(name, whole(expected)), expected)
    head = checkpoint.load("lm_head.weight", whole(model.state_dict()["transformer.wte.weight"]))
    assert torch.equal(head, model.state_dict()["transformer.wte.weight"])


def test_drafting_layers_are_left_out(tmp_path: Path) -> None:
    make_model("deepseek_v3").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    parts = ("eh_proj", "self_attn.o_proj")
    drafts = {f"model.layers.2.{part}.weight": torch.ones(4) for part in parts}
    save_file(load_file(path) | drafts, path)
    Checkpoint.open(tmp_path, on_meta("deepseek_v3")).validate()


def test_tied_names_share_one_tensor(tmp_path: Path) -> None:
    model = make_model("gemma2")
    model.save_pretrained(tmp_path)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    assert head not in stored
    assert Checkpoint.open(tmp_path, on_meta("gemma2")).same(head, embedding)

    save_file(stored | {head: stored[embedding].clone()}, path)
    assert Checkpoint.open(tmp_path, on_meta("gemma2")).same(head, embedding)

    save_file(stored | {head: stored[embedding] + 1}, path)
    checkpoint = Checkpoint.open(tmp_path, on_meta("gemma2"))
    checkpoint.validate()
    assert not checkpoint.same(head, embedding)
    assert torch.equal(checkpoint.load(head, whole(stored[embedding])), stored[embedding] + 1)

    only_head = {name: tensor for name, tensor in stored.items() if name != embedding}
    save_file(only_head | {head: stored[embedding]}, path)
    checkpoint = Checkpoint.open(tmp_path, on_meta("gemma2"))
    checkpoint.validate()
    assert torch.equal(checkpoint.load(embedding, whole(stored[embedding])), stored[embedding])


def test_untied_names_are_not_the_same(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path, on_meta("llama"))
    assert not checkpoint.same("lm_head.weight", "model.embed_tokens.weight")


def use_converters(monkeypatch: pytest.MonkeyPatch, *converters: WeightConverter) -> None:
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model: list(converters))


def test_operations_that_are_not_taken_apart_run_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", num_key_value_heads=4)
    state = model.state_dict()
    stored = {name: tensor for name, tensor in state.items() if "_proj" not in name}
    for layer in (0, 1):
        prefix = f"model.layers.{layer}."
        qkv = [state[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]
        stored[f"{prefix}self_attn.qkv.weight"] = torch.cat(qkv)
        for part in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"):
            stored[f"{prefix}{part}.weight"] = state[f"{prefix}{part}.weight"]
        down = state[f"{prefix}mlp.down_proj.weight"]
        stored[f"{prefix}mlp.down.left"] = down.T[:20].contiguous()
        stored[f"{prefix}mlp.down.right"] = down.T[20:].contiguous()
    save_file(stored, tmp_path / "model.safetensors")
    targets = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    use_converters(
        monkeypatch,
        WeightConverter("self_attn.qkv.weight", targets, [Chunk(0)]),
        WeightConverter(
            ["mlp.down.left", "mlp.down.right"],
            "mlp.down_proj.weight",
            [Concatenate(0), Transpose(0, 1)],
        ),
    )
    checkpoint = Checkpoint.open(tmp_path, on_meta("llama", num_key_value_heads=4))
    checkpoint.validate()
    draw = random.Random(0)
    for name, expected in state.items():
        cuts = random_cuts(expected.shape, draw)
        got = checkpoint.load(name, WantedTensor(tuple(expected.shape), torch.float32, cuts))
        assert torch.equal(got, apply_cuts(expected, cuts))


def test_an_operation_that_fails_names_itself_and_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama").save_pretrained(tmp_path)

    class Strange(Chunk):
        def convert(self, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
            raise ValueError("not today\nnor ever")

    use_converters(
        monkeypatch,
        WeightConverter("self_attn.o_proj.weight", "self_attn.o_proj.weight", [Strange()]),
    )
    message = refusal(tmp_path, on_meta("llama"))
    assert "model.layers.0.self_attn.o_proj.weight" in message
    assert "Strange (not today)" in message


def refusal(folder: Path, model: PreTrainedModel) -> str:
    """The one-line message with which a folder is refused."""
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(folder, model).validate()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A llama in one file."""
    make_model("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A llama in several files."""
    make_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; ``__`` stands for a dot."""
    path = folder / "model.safetensors"
    stored = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in stored.items() if value is not None}, path)


def test_missing_folder(tmp_path: Path) -> None:
    assert "nowhere is no folder" in refusal(tmp_path / "nowhere", on_meta("llama"))


def test_folder_with_pickled_weights_only(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    message = refusal(tmp_path, on_meta("llama"))
    assert "only pytorch_model.bin, a format that is not read" in message


def test_folder_without_weights(tmp_path: Path) -> None:
    assert "has no model.safetensors and no model" in refusal(tmp_path, on_meta("llama"))


def test_missing_shard(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    message = refusal(sharded, on_meta("llama"))
    assert f"{victim} is missing" in message
    assert "model.safetensors.index.json names" in message


def test_truncated_shard(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-1])
    assert f"{victim} is truncated or damaged: 'model." in refusal(sharded, on_meta("llama"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "its header ends at byte 8, the file at 0"),
        (b"\x00\x01", "its header ends at byte"),
        (b"\xff" * 64, "its header ends at byte"),
        (b"\x04\x00\x00\x00\x00\x00\x00\x00{{{{", "no safetensors header"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "no safetensors header"),
        (b'\x08\x00\x00\x00\x00\x00\x00\x00{"a":{}}', "no safetensors header"),
    ],
)
def test_corrupt_header(single: Path, content: bytes, why: str) -> None:
    path = single / "model.safetensors"
    path.write_bytes(content)
    message = refusal(single, on_meta("llama"))
    assert message.startswith(f"{path} is truncated or damaged: ")
    assert why in message


def test_header_whose_sizes_disagree(single: Path) -> None:
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}
    header = json.dumps({"model.norm.weight": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (single / "model.safetensors").write_bytes(content)
    assert "'model.norm.weight' has 8 bytes for a F32 of [3]" in refusal(single, on_meta("llama"))


def test_unknown_stored_type(single: Path) -> None:
    entry = {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}
    header = json.dumps({"model.norm.weight": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(1)
    (single / "model.safetensors").write_bytes(content)
    assert "is stored as F4, which is not supported" in refusal(single, on_meta("llama"))


def test_lfs_pointer(single: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (single / "model.safetensors").write_bytes(pointer)
    assert "run 'git lfs pull'" in refusal(single, on_meta("llama"))


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_broken_index(sharded: Path, content: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(content)
    assert f"{index} is damaged" in refusal(sharded, on_meta("llama"))


def test_index_that_places_a_tensor_wrongly(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    name = next(key for key, file in content["weight_map"].items() if file == files[0])
    content["weight_map"][name] = files[1]
    index.write_text(json.dumps(content))
    assert f"'{name}' is not in {sharded / files[1]}" in refusal(sharded, on_meta("llama"))


def test_missing_tensor(single: Path) -> None:
    edit(single, model__layers__1__mlp__up_proj__weight=None)
    message = refusal(single, on_meta("llama"))
    assert "model.safetensors has no tensor for 'model.layers.1.mlp.up_proj.weight'" in message
    assert "1 of the 21" in message


def test_unexpected_tensor(single: Path) -> None:
    edit(single, model__layers__1__self_attn__q_proj__bias=torch.ones(32))
    message = refusal(single, on_meta("llama"))
    assert "'model.layers.1.self_attn.q_proj.bias' in" in message
    assert "has no place in the model" in message


def test_rotary_frequencies_of_old_are_no_error(single: Path) -> None:
    edit(single, model__layers__1__self_attn__rotary_emb__inv_freq=torch.ones(4))
    Checkpoint.open(single, on_meta("llama")).validate()


def test_wrong_shape(single: Path) -> None:
    edit(single, model__norm__weight=torch.ones(31))
    message = refusal(single, on_meta("llama"))
    assert "'model.norm.weight' in" in message
    assert "has shape [31], by config.json it should be [32]" in message


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_wrong_type(single: Path, dtype: torch.dtype) -> None:
    edit(single, model__norm__weight=torch.ones(32).to(dtype))
    message = refusal(single, on_meta("llama"))
    assert f"is stored as {str(dtype).removeprefix('torch.')}, F32, F16 or BF16" in message


@pytest.mark.parametrize(
    ("family", "changes", "parts"),
    [
        (
            "llama",
            {"num_hidden_layers": 1},
            ["'model.layers.1.", "num_hidden_layers is 1", "place"],
        ),
        ("llama", {"num_hidden_layers": 3}, ["'model.layers.2.", "num_hidden_layers is 3", "9 of"]),
        ("llama", {"hidden_size": 64}, ["model.embed_tokens.weight", "[96, 32]", "[96, 64]"]),
        ("llama", {"attention_bias": True}, ["has no tensor for", "q_proj.bias"]),
        ("gpt2", {"n_layer": 1}, ["'transformer.h.1.", "num_hidden_layers is 1"]),
        ("deepseek_v3", {"num_hidden_layers": 1}, ["'model.layers.1.", "num_hidden_layers is 1"]),
        ("mixtral", {"num_local_experts": 4}, ["model.layers.0.", "should be [4, "]),
    ],
)
def test_config_that_disagrees(
    family: str, changes: dict[str, object], parts: list[str], tmp_path: Path
) -> None:
    make_model(family).save_pretrained(tmp_path)
    message = refusal(tmp_path, on_meta(family, **changes))
    assert str(tmp_path / "model.safetensors") in message
    for part in parts:
        assert part in message


def test_missing_expert(tmp_path: Path) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path)
    edit(tmp_path, model__layers__0__mlp__experts__3__down_proj__weight=None)
    message = refusal(tmp_path, on_meta("qwen3_moe"))
    assert "merged from 7 tensors into 'model.layers.0.mlp.experts.down_proj'" in message


def test_experts_of_different_shape(tmp_path: Path) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path)
    edit(tmp_path, model__layers__0__mlp__experts__3__down_proj__weight=torch.ones(32, 23))
    message = refusal(tmp_path, on_meta("qwen3_moe"))
    assert "experts.3.down_proj.weight' in" in message
    assert "cannot be merged into 'model.layers.0.mlp.experts.down_proj'" in message

"""How much memory each rank takes while a model is loaded, and after.

Makes a random Llama of about 500 million parameters in bf16 (1 GB, several files and an index) in
a temporary folder, starts it on one device and on tp=2, pp=2 and dp=2, and watches every process
from its start to the first tokens. Ends with exit code 1 where a limit is missed.

    python benchmarks/load_memory.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import save, table_of
from process_memory import TreeMemory

LAYOUTS: dict[str, dict[str, Any]] = {
    "1": {},
    "tp=2": {"tensor_parallel_size": 2},
    "pp=2": {"pipeline_parallel_size": 2},
    "dp=2": {"data_parallel_size": 2},
}
# What a process takes that has torch and transformers imported, computes, and holds no weights.
ALLOWANCE_BYTES = 350 * 10**6
RANK_SHARE = 0.55
WHOLE_SHARE = 1.15
SAMPLE_EVERY_S = 0.02
MODEL = {
    "vocab_size": 32000,
    "hidden_size": 1280,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
}


def main() -> int:
    """Measure every layout and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="use this folder instead of making one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        run_layout(chosen.model, chosen.child)
        return 0
    with tempfile.TemporaryDirectory(prefix="spanwise-load-") as scratch:
        folder = chosen.model or Path(scratch)
        if chosen.model is None:
            in_child(write_model, folder)
        measured = {layout: measure(folder, layout) for layout in LAYOUTS}
    single = measured["1"]
    rows = judge(measured, single["weight_bytes"][0], single["peak_total_bytes"])
    save("load_memory", {"layouts": measured, "limits": rows}, table(measured, rows))
    return 0 if all(row["holds"] for row in rows) else 1


def measure(folder: Path, layout: str) -> dict[str, Any]:
    """Start a layout in a child, and sample its processes until it has generated and ended."""
    command = [sys.executable, __file__, "--model", str(folder), "--child", layout]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        memory = TreeMemory(child.pid)
        while True:
            memory.sample()
            try:
                child.wait(SAMPLE_EVERY_S)
                break
            except subprocess.TimeoutExpired:
                continue
        assert child.stdout is not None
        said = child.stdout.read()
    if child.returncode != 0:
        raise SystemExit(f"layout {layout} failed with exit code {child.returncode}")
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    num_shards = 1 if layout in ("1", "dp=2") else 2
    return found | {
        "peak_rank_bytes": memory.peak_rank_bytes(num_shards),
        "peak_total_bytes": memory.peak_total_bytes,
        "num_samples": memory.num_samples,
    }


def judge(
    measured: dict[str, dict[str, Any]], weight_bytes: int, single_total: int
) -> list[dict[str, Any]]:
    """What is compared with what."""
    rank_limit = int(RANK_SHARE * weight_bytes) + ALLOWANCE_BYTES
    rows = [
        {"layout": layout, "what": f"rank {rank}", "bytes": num_bytes, "limit_bytes": rank_limit}
        for layout in ("tp=2", "pp=2")
        for rank, num_bytes in enumerate(measured[layout]["peak_rank_bytes"])
    ]
    whole_limit = int(WHOLE_SHARE * single_total) + ALLOWANCE_BYTES
    total = measured["dp=2"]["peak_total_bytes"]
    rows.append(
        {"layout": "dp=2", "what": "everything", "bytes": total, "limit_bytes": whole_limit}
    )
    return [row | {"holds": row["bytes"] <= row["limit_bytes"]} for row in rows]


def table(measured: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Peaks in MB (10^6 bytes)."""
    single = measured["1"]
    cells = [["layout", "what", "weights held MB", "peak PSS MB", "limit MB", "holds"]]
    held, peak = mega(single["weight_bytes"][0]), mega(single["peak_total_bytes"])
    cells.append(["1", "everything", held, peak, "-", "-"])
    for row in rows:
        rank = int(row["what"].split()[1]) if row["what"].startswith("rank") else 0
        held = mega(measured[row["layout"]]["weight_bytes"][rank])
        limit, holds = mega(row["limit_bytes"]), "yes" if row["holds"] else "NO"
        cells.append([row["layout"], row["what"], held, mega(row["bytes"]), limit, holds])
    return table_of(cells) + (
        f"\n\nLimits: a rank {RANK_SHARE} of the single device's weights + "
        f"{mega(ALLOWANCE_BYTES)} MB; dp=2, all processes together, {WHOLE_SHARE} of the single "
        f"device's total + {mega(ALLOWANCE_BYTES)} MB (two copies of the weights would not fit). "
        "PSS, mapped checkpoint files not counted; a rank is its zygote and its worker."
    )


def mega(num_bytes: int) -> str:
    """Bytes in MB."""
    return f"{num_bytes / 1e6:.0f}"


# -- in the child


def run_layout(folder: Path, layout: str) -> None:
    """Load, generate a little, and say what each rank holds."""
    from spanwise import LLM, SamplingParams

    degrees = LAYOUTS[layout]
    with LLM(
        str(folder),
        devices=f"cpu:{2 if degrees else 1}",
        dtype="bfloat16",
        max_model_len=256,
        kv_cache_memory=64 << 20,
        **degrees,
    ) as llm:
        prompts = [{"prompt_token_ids": [5 + i, 6, 7, 8]} for i in range(4)]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
        assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)
        print(json.dumps({"weight_bytes": [rank.weight_bytes for rank in llm.plan.ranks]}))


def in_child(function: Any, *arguments: Any) -> None:
    """Run in a fork, so that this process stays without torch."""
    from multiprocessing import get_context

    process = get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the model could not be written")


def write_model(folder: Path, num_files: int = 9, **changes: int) -> None:
    """A random Llama in bf16, one file after the other: memory for one file is enough."""
    import torch
    from safetensors.torch import save_file

    sizes = MODEL | changes
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        **sizes,
    }
    folder.joinpath("config.json").write_text(json.dumps(config))
    shapes = list(tensor_shapes(sizes).items())
    generator = torch.Generator().manual_seed(0)
    weight_map, total = {}, 0
    for number in range(num_files):
        name = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        own = shapes[number * len(shapes) // num_files : (number + 1) * len(shapes) // num_files]
        tensors = {key: random_tensor(shape, generator) for key, shape in own}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    folder.joinpath("model.safetensors.index.json").write_text(json.dumps(index))


def random_tensor(shape: tuple[int, ...], generator: Any) -> Any:
    """Scaled like trained weights, so that activations stay finite."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02).bfloat16()


def tensor_shapes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama, in the order of its layers."""
    hidden, mlp, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    kv = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(sizes["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", mlp, hidden),
            ("mlp.up_proj", mlp, hidden),
            ("mlp.down_proj", hidden, mlp),
        ):
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


if __name__ == "__main__":
    sys.exit(main())

"""What cannot be is refused in one line, and leaves nothing running."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.layouts import running
from tests.support.replica import MAX_LEN
from tests.support.tiny_models import VOCAB, save_tiny_model

from spanwise import LLM, SamplingParams
from spanwise.errors import DeviceError, InputError, LayoutError, ModelError
from spanwise.worker.supervisor import Supervisor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "llama"
    save_tiny_model("llama", folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path, supervisor: Supervisor) -> Iterator[LLM]:
    with running(folder, "tp2-pp2", supervisor) as llm:
        yield llm


def refusal(kind: type[Exception], act: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(kind) as error:
        act(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({"prompt_token_ids": list(range(3, 3 + MAX_LEN))}, f"the prompt has {MAX_LEN} tokens"),
        ({"prompt_token_ids": [5, VOCAB]}, f"token id {VOCAB} is not in the vocabulary"),
        ({"prompt_token_ids": [-1]}, "token id -1"),
        ({"prompt_token_ids": []}, "no tokens"),
        ({"prompt": "text"}, "no tokenizer"),
    ],
)
def test_a_prompt_that_cannot_be_and_the_engine_goes_on(
    prompt: dict[str, Any], said: str, llm: LLM
) -> None:
    good = {"prompt_token_ids": [5, 6, 7]}
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    before = llm.generate(good, params)
    assert said in refusal(InputError, llm.generate, prompt, params)
    several = refusal(InputError, llm.generate, [good, good, prompt], params)
    assert said in several and several.startswith("prompt 2: ")
    after = llm.generate(good, params)
    assert [o.outputs for o in before] == [o.outputs for o in after]


def test_a_prompt_up_to_the_limit_ends_for_its_length(llm: LLM) -> None:
    prompt = {"prompt_token_ids": [5] * (MAX_LEN - 1)}
    (output,) = llm.generate(prompt, SamplingParams(max_tokens=9, ignore_eos=True))
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 1


def test_arguments_of_the_wrong_kind(llm: LLM) -> None:
    assert "5" in refusal(InputError, llm.generate, 5)
    prompt = {"prompt_token_ids": [5]}
    assert "dict" in refusal(InputError, llm.generate, prompt, {"max_tokens": 3})


def test_as_many_parameters_as_prompts(llm: LLM) -> None:
    prompts = [{"prompt_token_ids": [5]}] * 3
    assert "3 prompts" in refusal(InputError, llm.generate, prompts, [SamplingParams()] * 2)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"pipeline_parallel_size": 5}, LayoutError, "layers"),
        ({"tensor_parallel_size": 16}, LayoutError, "heads"),
        ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, LayoutError, "expert"),
        ({"devices": "cpu:2", "tensor_parallel_size": 4}, LayoutError, "2 were given"),
        ({"tensor_parallel_size": 0}, LayoutError, "tensor_parallel_size"),
        ({"pipeline_parallel_size": 2, "pp_layers": (3, 3)}, LayoutError, "pp_layers"),
        ({"devices": "cuda:7"}, DeviceError, "CUDA card 7 is not there"),
        ({"devices": "tpu"}, DeviceError, "tpu"),
        ({"max_model_len": 100_000}, InputError, "max_model_len"),
        ({"max_num_seqs": 0}, InputError, "max_num_seqs"),
        ({"dtype": "int3"}, ModelError, "int3"),
        ({"kv_cache_memory": 100, "tensor_parallel_size": 2}, DeviceError, "KV cache"),
    ],
    ids=str,
)
def test_a_start_that_cannot_be(
    options: dict[str, Any], kind: type[Exception], said: str, folder: Path, supervisor: Supervisor
) -> None:
    before = set(supervisor.pids())
    assert said in refusal(kind, LLM, str(folder), supervisor=supervisor, **options)
    assert set(supervisor.pids()) <= before


def broken(folder: Path, copy: Path, **changes: Any) -> Path:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": "x"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 6},
        {"hidden_size": 56},
    ],
    ids=str,
)
def test_a_config_that_disagrees_with_the_weights(
    changes: dict[str, Any], folder: Path, tmp_path: Path, supervisor: Supervisor
) -> None:
    before = set(supervisor.pids())
    copy = broken(folder, tmp_path / "copy", **changes)
    said = refusal(ModelError, LLM, str(copy), tensor_parallel_size=2, supervisor=supervisor)
    assert any(word in said for word in ("safetensors", "layers", "config.json", "built"))
    assert set(supervisor.pids()) <= before


def test_a_truncated_file(folder: Path, tmp_path: Path, supervisor: Supervisor) -> None:
    copy = broken(folder, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    said = refusal(ModelError, LLM, str(copy), pipeline_parallel_size=2, supervisor=supervisor)
    assert "model.safetensors" in said


@pytest.mark.parametrize("tokenizer", ["{", '{"model": {"type": "Zzz"}}'])
def test_a_broken_tokenizer_is_said_at_the_start(
    tokenizer: str, folder: Path, tmp_path: Path, supervisor: Supervisor
) -> None:
    before = set(supervisor.pids())
    copy = broken(folder, tmp_path / "copy")
    (copy / "tokenizer.json").write_text(tokenizer)
    said = refusal(ModelError, LLM, str(copy), tensor_parallel_size=2, supervisor=supervisor)
    assert "tokenizer" in said
    assert set(supervisor.pids()) <= before


def test_a_missing_folder_and_a_missing_shard(
    folder: Path, tmp_path: Path, supervisor: Supervisor
) -> None:
    assert "nowhere" in refusal(ModelError, LLM, str(tmp_path / "nowhere"), supervisor=supervisor)
    copy = broken(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    assert "safetensors" in refusal(ModelError, LLM, str(copy), supervisor=supervisor)

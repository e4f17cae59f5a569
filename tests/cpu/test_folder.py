"""From a model's name to its folder; what a folder's small files may be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from spanwise.embedded import EMBEDDED
from spanwise.errors import ModelError
from spanwise.model import folder as module
from spanwise.model.folder import read_config, read_generation_config, resolve_model


def refusal(call: object, *arguments: object) -> str:
    """The one-line message of a refused call."""
    assert callable(call)
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_existing_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_embedded_names() -> None:
    for name, folder in EMBEDDED.items():
        assert resolve_model(name) == folder


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "../x", "a/b/c", "", "a b"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    message = refusal(resolve_model, name)
    assert f"there is no model folder {name!r}" in message
    assert "spanwise/tiny-dense" in message


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert "is a file; give the model's folder" in refusal(resolve_model, str(path))


def test_a_hub_name_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, **options: object) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_model("some/model", progress=False) == tmp_path
    ((name, options),) = asked
    assert name == "some/model"
    useful = [
        "model-1.safetensors",
        "config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
    ]
    useless = ["pytorch_model.bin", "consolidated.00.safetensors", "original/x.safetensors"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [*useful, *useless],
        allow_patterns=options["allow_patterns"],
        ignore_patterns=options["ignore_patterns"],
    )
    assert list(kept) == useful
    bar = options["tqdm_class"](total=3, disable=False)
    assert bar.disable


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (errors.GatedRepoError, "is gated: accept its terms"),
        (errors.RepositoryNotFoundError, "no folder and no hub model 'some/model'"),
        (errors.HFValidationError, "no folder and no hub model 'some/model'"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (OSError, "could not be downloaded: No space left"),
    ],
)
def test_what_the_hub_refuses(
    error: type[Exception], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        # Made without its __init__: what that wants differs between versions of the hub.
        failure = error.__new__(error)
        failure.args = ("No space left\non this device",)
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert part in refusal(resolve_model, "some/model")


def test_the_cache_is_used_offline_and_torch_is_not_imported(tmp_path: Path) -> None:
    commit = "0" * 40
    model = tmp_path / "hub" / "models--some--model"
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "snapshots" / commit / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    script = """
import sys
from spanwise.errors import ModelError
from spanwise.model.folder import resolve_model
print(resolve_model("some/model"))
try:
    resolve_model("other/model")
except ModelError as error:
    print(error)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    source = Path(module.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ
        | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": search_path(source)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found, refused = result.stdout.splitlines()
    assert Path(found) == model / "snapshots" / commit
    assert "'other/model'" in refused
    assert "HF_HUB_OFFLINE" in refused


def search_path(source: Path) -> str:
    return os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(source)])


def write_config(folder: Path, config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_config_is_read(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": None}
    assert read_config(write_config(tmp_path, config)) == config


def test_missing_folder(tmp_path: Path) -> None:
    assert "nowhere is no folder" in refusal(read_config, tmp_path / "nowhere")


def test_no_config(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(read_config, tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "", "\udcff"])
def test_broken_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    assert f"{tmp_path / 'config.json'} is not a JSON object" in refusal(read_config, tmp_path)


def test_config_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    assert "cannot be read: Is a directory" in refusal(read_config, tmp_path)


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": 3}])
def test_config_without_model_type(tmp_path: Path, config: dict[str, object]) -> None:
    assert "names no model_type" in refusal(read_config, write_config(tmp_path, config))


@pytest.mark.parametrize(
    ("extra", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"bits": 4}}, "unnamed"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
    ],
)
def test_quantized_checkpoints(tmp_path: Path, extra: dict[str, object], method: str) -> None:
    folder = write_config(tmp_path, {"model_type": "llama"} | extra)
    message = refusal(read_config, folder)
    assert f"quantized checkpoints ({method}) are not supported yet" in message


def test_generation_config(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": [1, 2]}')
    assert read_generation_config(tmp_path) == {"eos_token_id": [1, 2]}
    path.write_text("no")
    assert f"{path} is not a JSON object" in refusal(read_generation_config, tmp_path)

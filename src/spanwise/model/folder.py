"""From a model's name to its folder, and the folder's small files. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from spanwise.embedded import EMBEDDED, embedded_folder
from spanwise.errors import ModelError, reason

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "tokenizer*"]
# Second copies of the weights, in other layouts.
_UNWANTED_FILES = ["*/*.safetensors", "consolidated*"]
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_QUANTIZED = ("quantization_config", "compression_config")


def resolve_model(name: str, progress: bool = True) -> Path:
    """The folder of a model given by path, by embedded name, or by its name on the hub.

    A hub name is fetched into the hub's own cache (``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``
    count as ever). Raises ModelError where there is no such model, or it cannot be had.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"{name} is a file; give the model's folder")
    embedded = embedded_folder(name)
    if embedded is not None:
        return embedded
    if _HUB_NAME.fullmatch(name) is None or name.startswith("."):
        raise ModelError(
            f"there is no model folder {name!r}; give an existing folder, a name on the hub "
            f"(organisation/model), or one of {', '.join(EMBEDDED)}"
        )
    return _fetch(name, progress)


def is_factory(model: str) -> bool:
    """Whether a model is given as ``module:factory``."""
    module, colon, name = model.partition(":")
    dotted = all(part.isidentifier() for part in (*module.split("."), *name.split(".")))
    return bool(colon) and dotted and not Path(model).exists()


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises ModelError where it is absent, broken or refused."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder; give a model folder or a model's name")
    config = _read_json(folder / _CONFIG)
    if config is None:
        raise ModelError(f"{folder} has no {_CONFIG}; give the folder of a transformers model")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / _CONFIG} names no model_type; use a transformers config")
    _refuse_quantized(config)
    return config


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The model's generation_config.json, empty where it has none. Raises ModelError if broken."""
    return _read_json(folder / _GENERATION) or {}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not a JSON object ({error}); repair or replace it") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


def _refuse_quantized(config: dict[str, Any]) -> None:
    for part in (config, config.get("text_config")):
        keys = part if isinstance(part, dict) else {}
        found = next((keys[key] for key in _QUANTIZED if keys.get(key)), None)
        if found is not None:
            method = found.get("quant_method", "unnamed") if isinstance(found, dict) else "unnamed"
            raise ModelError(
                f"quantized checkpoints ({method}) are not supported yet; use the unquantized model"
            )


def _fetch(name: str, progress: bool) -> Path:
    # Imported here: it takes longer than everything else that a local folder needs.
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]

    try:
        folder = snapshot_download(
            name,
            allow_patterns=_WANTED_FILES,
            ignore_patterns=_UNWANTED_FILES,
            tqdm_class=tqdm if progress else Silent,
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms on the hub, then set HF_TOKEN to your token"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f"there is no folder and no hub model {name!r}; check the name, or set HF_TOKEN if the "
            "model is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"there is no folder {name!r}, and the hub model of that name is not in the local "
            "cache and the hub cannot be reached; check the network and HF_HUB_OFFLINE"
        ) from error
    except Exception as error:
        # The HTTP library below, and with it the exceptions, differs between versions of the hub.
        raise ModelError(f"{name} could not be downloaded: {reason(error)}; try again") from error
    return Path(folder)

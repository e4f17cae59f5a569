"""A model's weights on disk: checked by their headers, then read slice by slice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from transformers import PreTrainedModel

from spanwise.errors import ModelError
from spanwise.model.conversion import Converted, FullShapes, convert_names
from spanwise.model.safetensors_file import SafetensorsFile, StoredTensor
from spanwise.model.source import Part, Source, Stored, part_shape, whole

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
_LOADABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Buffers that older models stored and that are computed today.
_COMPUTED_TODAY = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"attn\.masked_bias$")


@dataclass(frozen=True)
class TensorCut:
    """What is kept along a dim: half-open ranges, one after the other in this order."""

    dim: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class WantedTensor:
    """A tensor to load: its full shape in the model, the dtype wanted, cuts on distinct dims."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    cuts: tuple[TensorCut, ...] = ()

    @property
    def part(self) -> Part:
        """The wanted part, with ranges for every dim."""
        ranges = dict(enumerate(whole(self.shape)))
        ranges.update((cut.dim, cut.ranges) for cut in self.cuts)
        return tuple(ranges[dim] for dim in range(len(self.shape)))


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint, matched with the model it is for. ``origin`` is its file or its index."""

    origin: Path
    converted: Converted
    full: FullShapes
    ties: tuple[frozenset[str], ...]
    ignored: re.Pattern[str] = field(repr=False)

    @classmethod
    def open(cls, folder: Path, model: PreTrainedModel) -> Checkpoint:
        """Read the headers in ``folder`` for a model on the meta device, with its full shapes.

        Raises ModelError for files that are missing, cut short, or not of the format.
        """
        origin, stored = _open_files(folder)
        full = FullShapes(model)
        converted = convert_names(stored, model, full)
        ignored = _ignored(model, [name for name, _ in converted.unplaced])
        return cls(origin, converted, full, _ties(model), ignored)

    def validate(self) -> None:
        """Raise ModelError unless the checkpoint gives every tensor of the model, and no other."""
        self._require_all()
        self._require_no_more()
        for name in self.full.tensors:
            if name in self.converted.sources:
                self._require_fit(name, self.converted.sources[name])

    def load(self, name: str, wanted: WantedTensor) -> torch.Tensor:
        """The wanted part of the model's tensor ``name``: contiguous, on the CPU, of its own."""
        source = self._source(name, wanted)
        out = torch.empty(part_shape(wanted.part), dtype=wanted.dtype)
        source.copy_into(out, wanted.part)
        return out

    def view(self, name: str, wanted: WantedTensor) -> torch.Tensor | None:
        """As ``load``, but over the mapped file: it must not be written to, nor kept for long.

        None where the part does not lie there in one piece, in the dtype wanted.
        """
        source = self._source(name, wanted)
        if not isinstance(source, Stored) or source.tensor.dtype != wanted.dtype:
            return None
        found = source.tensor.view()
        for dim, ranges in enumerate(wanted.part):
            if len(ranges) != 1:
                return None
            begin, end = ranges[0]
            found = found.narrow(dim, begin, end - begin)
        return found if found.is_contiguous() else None

    def same(self, name: str, other: str) -> bool:
        """Whether two names that the config ties hold the same values.

        False where both are stored and differ: transformers does not tie them then. Reads both.
        """
        providers = self._provider(name), self._provider(other)
        if None in providers or not any({name, other} <= tie for tie in self.ties):
            return False
        one, two = (self.converted.sources[provider] for provider in providers if provider)
        return one is two or torch.equal(_read(one), _read(two))

    def _source(self, name: str, wanted: WantedTensor) -> Source:
        provider = self._provider(name)
        if provider is None:
            raise self._missing([name])
        source = self.converted.sources[provider]
        assert source.shape == wanted.shape, (name, source.shape, wanted.shape)
        return source

    def _provider(self, name: str) -> str | None:
        """The name under which the tensor is there: its own, or one it is tied to."""
        group = next((tie for tie in self.ties if name in tie), frozenset[str]())
        candidates = [name, *sorted(group - {name})]
        return next((each for each in candidates if each in self.converted.sources), None)

    def _require_all(self) -> None:
        missing = [name for name in self.full.tensors if self._provider(name) is None]
        if missing:
            raise self._missing(missing)

    def _missing(self, names: list[str]) -> ModelError:
        return ModelError(
            f"{self.origin} has no tensor for '{names[0]}'{_layer_hint(names[0], self.full)}: "
            f"{len(names)} of the {len(self.full.tensors)} that config.json asks for are missing; "
            "use the config.json and the weights of the same model"
        )

    def _require_no_more(self) -> None:
        for name, tensor in self.converted.unplaced:
            if self.ignored.search(name) is None:
                raise ModelError(
                    f"{tensor.where} has no place in the model that config.json describes"
                    f"{_layer_hint(name, self.full)}; use the config.json and the weights of the "
                    "same model"
                )

    def _require_fit(self, name: str, source: Source) -> None:
        expected = self.full.tensors[name]
        first, count = source.stored[0], len(source.stored)
        merged = f" (merged from {count} tensors into '{name}')" if count > 1 else ""
        if source.shape != tuple(expected.shape):
            raise ModelError(
                f"{first.where}{merged} has shape {list(source.shape)}, by config.json it should "
                f"be {list(expected.shape)}; use the config.json and the weights of the same model"
            )
        for tensor in source.stored:
            if expected.is_floating_point() and tensor.dtype not in _LOADABLE:
                raise ModelError(
                    f"{tensor.where} is stored as {str(tensor.dtype).removeprefix('torch.')}, F32, "
                    "F16 or BF16 was expected; quantized checkpoints are not supported yet"
                )


def _open_files(folder: Path) -> tuple[Path, Mapping[str, StoredTensor]]:
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder; give a model folder or a model's name")
    single, index = folder / _SINGLE, folder / _INDEX
    if single.exists():
        return single, SafetensorsFile(single).tensors
    if index.exists():
        return index, _open_shards(index)
    found = sorted({path.name for pattern in _OTHER_FORMATS for path in folder.glob(pattern)})
    instead = f", only {found[0]}, a format that is not read" if found else ""
    raise ModelError(
        f"{folder} has no {_SINGLE} and no {_INDEX}{instead}; save the model as safetensors"
    )


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = _read_index(index)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise ModelError(
                f"{index.parent / shard} is missing, one of the {len(shards)} files that "
                f"{index.name} names; download the model again"
            )
    files = {shard: SafetensorsFile(index.parent / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise ModelError(
                f"'{name}' is not in {files[shard].path}, where {index.name} places it; "
                "download the model again"
            )
    everything = {name: tensor for file in files.values() for name, tensor in file.tensors.items()}
    return everything | {name: files[shard].tensors[name] for name, shard in weight_map.items()}


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _read_index(index: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{index} is damaged ({error}); download it again") from error
    except OSError as error:
        raise ModelError(f"{index} cannot be read: {error.strerror}") from error


def _ties(model: PreTrainedModel) -> tuple[frozenset[str], ...]:
    """The groups of names that are one tensor by the model's config."""
    groups: dict[str, set[str]] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        groups.setdefault(source, {source}).add(target)
    return tuple(frozenset(group) for group in groups.values())


def _ignored(model: PreTrainedModel, names: Iterable[str]) -> re.Pattern[str]:
    """Matches those of ``names`` that a checkpoint may hold although no model tensor takes them."""
    patterns = [*_COMPUTED_TODAY, *(model._keys_to_ignore_on_load_unexpected or ())]
    # A layer with such a projection predicts further tokens after the last one; it is not run.
    drafts = {found[1] for name in names if (found := re.search(r"(\.layers\.\d+\.)eh_proj", name))}
    return re.compile("|".join(f"({pattern})" for pattern in [*patterns, *map(re.escape, drafts)]))


def _layer_hint(name: str, full: FullShapes) -> str:
    """The number of layers, where a name speaks of a layer."""
    layers = getattr(full.config.get_text_config(), "num_hidden_layers", None)
    spoken = re.search(r"\.(?:h|layers)\.\d+\.", name)
    return f" (num_hidden_layers is {layers})" if spoken and layers is not None else ""


def _read(source: Source) -> torch.Tensor:
    out = torch.empty(source.shape, dtype=source.stored[0].dtype)
    source.copy_into(out, whole(source.shape))
    return out

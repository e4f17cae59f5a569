"""What a batch job is, from its options: which items, which model, and how they meet."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from spanwise.engine.launch import EnginePlan
from spanwise.engine.model import Model
from spanwise.engine.tokenizer import Tokenizer
from spanwise.errors import InputError, ModelError
from spanwise.jobs import pictures, sound
from spanwise.jobs.files import FilesFolder
from spanwise.jobs.forward import ForwardTask, Named, Prepare, Read, Texts, numbers
from spanwise.jobs.identity import job_identity
from spanwise.jobs.item import Source
from spanwise.jobs.language import LanguageTask, PromptsTask, RequestLLM, RequestsTask
from spanwise.jobs.lines import LinesFile
from spanwise.jobs.pictures import Pictures, PictureSettings
from spanwise.jobs.readings import Labels, read_transcript
from spanwise.jobs.sound import Sound, SoundSettings
from spanwise.jobs.table import TABLES, Table
from spanwise.jobs.task import Task
from spanwise.model.folder import is_factory, read_config, resolve_model

Progress = Callable[[str], None]
Settings = TypeVar("Settings", PictureSettings, SoundSettings)

_PREPROCESSOR = "preprocessor_config.json"
_LINES = (".jsonl", ".ndjson")
_MAX_THREADS = 4
_WINDOWS = 4  # items in flight: so many times what all devices work on
_DEFAULT_BATCH_SIZE = 32
# Of the arguments of LLM, those that Model takes too, and what the others must be left at.
_SHARED = frozenset(
    {"devices", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "dtype"}
)
_LEFT_OUT = {"enable_expert_parallel": False, "prefix_caching": True}


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What a job is asked to do.

    ``engine`` are arguments of ``LLM`` (for other models: those that ``Model`` takes too),
    ``sampling`` fields of ``SamplingParams`` for items that leave them out.
    """

    model: str
    input: Path
    columns: tuple[str, ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_batch_size: int | None = None
    max_audio_s: float = 300.0


@dataclass(frozen=True)
class Started:
    """A running model as a task, and what was decided for it."""

    task: Task
    plan: EnginePlan


class Batch(ABC):
    """One kind of job: its items are known, its model is not started."""

    num_threads = 1

    def __init__(self, options: BatchOptions, folder: Path | None, source: Source) -> None:
        self.source = source
        self._options, self._folder = options, folder
        self.extent = source.extent()
        if not self.extent.num_items:
            raise InputError(f"{options.input} holds no items; {self.expected}")
        self.identity = job_identity(options.model, folder, self._settings(), self.extent.digest)

    expected = "write one on each line"

    def _settings(self) -> dict[str, Any]:
        """The options that change results."""
        return {
            "--dtype": self._options.engine.get("dtype", "auto"),
            "--column": self._options.columns,
        }

    @abstractmethod
    def started(self, progress: Progress) -> AbstractContextManager[Started]:
        """Start the model, and end it after the block."""


class LanguageBatch(Batch):
    """A language model: lines of requests, or a column of prompts."""

    def __init__(self, options: BatchOptions, folder: Path) -> None:
        if options.max_batch_size is not None:
            raise InputError("--max-batch-size goes with other models; use --max-num-seqs")
        for name in ("logprobs", "prompt_logprobs"):
            if name in options.sampling:
                raise InputError(f"--{name.replace('_', '-')} is not told by a job; leave it out")
        self._task: type[LanguageTask]
        if options.input.suffix.lower() in TABLES:
            source: Source = Table(options.input, _columns(options, most=1))
            self._task = PromptsTask
        elif options.input.suffix.lower() in _LINES:
            source = LinesFile(options.input)
            self._task = RequestsTask
        else:
            raise InputError(
                f"{options.model} is a language model: --input takes a .jsonl file of requests, or "
                f"a .csv or .parquet file of prompts, got {options.input}"
            )
        super().__init__(options, folder, source)

    def _settings(self) -> dict[str, Any]:
        engine = self._options.engine
        return super()._settings() | {
            "--quantization": engine.get("quantization"),
            "--max-model-len": engine.get("max_model_len"),
            "sampling flags": dict(self._options.sampling),
        }

    @contextmanager
    def started(self, progress: Progress) -> Iterator[Started]:
        """See ``Batch``."""
        options = self._options
        with RequestLLM(options.model, **options.engine, progress=progress) as llm:
            task = self._task(llm, options.model, options.sampling, self.identity)
            yield Started(task, llm.plan)


class ForwardBatch(Batch):
    """A model that is run by one forward an item: files of a folder, or rows of a table."""

    def __init__(self, options: BatchOptions, folder: Path | None) -> None:
        self._model_arguments = _model_arguments(options)
        if options.input.suffix.lower() in TABLES and not options.input.is_dir():
            self._take_rows(options, folder)
            source: Source = Table(options.input, _columns(options))
        elif options.input.is_dir():
            self.num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
            source = FilesFolder(options.input, self._take_files(options, folder))
        else:
            raise InputError(
                f"{options.model} is no language model: --input takes a folder of images or audio, "
                f"or a .csv or .parquet file, got {options.input}"
            )
        super().__init__(options, folder, source)

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"--max-audio-s": self._options.max_audio_s}

    @contextmanager
    def started(self, progress: Progress) -> Iterator[Started]:
        """See ``Batch``."""
        with Model(self._options.model, **self._model_arguments, progress=progress) as model:
            places = [use.place for use in model.plan.ranks]
            spread = (1 + max(p.dp for p in places)) * (1 + max(p.pp for p in places))
            capacity = _WINDOWS * spread * self._model_arguments["max_batch_size"]
            read = self._read or Labels(model.labels)
            yield Started(ForwardTask(model, self._prepare, read, capacity), model.plan)

    _prepare: Prepare
    _read: Read | None = None

    def _take_rows(self, options: BatchOptions, folder: Path | None) -> None:
        is_text = folder is not None and Tokenizer(folder).exists
        if is_text:
            _columns(options, most=1)
        self._prepare = Texts(folder) if folder is not None and is_text else numbers

    def _take_files(self, options: BatchOptions, folder: Path | None) -> tuple[str, ...]:
        """Choose how files are read; give their endings."""
        settings = _read_preprocessor(folder)
        if "image_processor_type" in settings:
            self.expected = f"images end with {', '.join(pictures.ENDINGS)}"
            config = read_config(folder) if folder is not None else {}
            channels = config.get("num_channels", 3)
            reader = Pictures(_converted(settings, PictureSettings), channels)
            self._prepare = Named("pixel_values", reader.read)
            return pictures.ENDINGS
        self.expected = f"audio files end with {', '.join(sound.ENDINGS)}"
        listener = Sound(_converted(settings, SoundSettings), options.max_audio_s)
        self._prepare = Named("input_values", listener.read)
        if folder is not None and _architecture(folder).endswith("ForCTC"):
            self._read = read_transcript(folder)
        return sound.ENDINGS


def open_batch(options: BatchOptions) -> Batch:
    """Find out what kind of job it is. Raises InputError."""
    if not options.input.exists():
        raise InputError(f"there is no input {options.input}; give a file or a folder")
    if is_factory(options.model):
        return ForwardBatch(options, None)
    folder = resolve_model(options.model)
    if _architecture(folder).endswith("ForCausalLM"):
        return LanguageBatch(options, folder)
    return ForwardBatch(options, folder)


def _architecture(folder: Path) -> str:
    named = read_config(folder).get("architectures") or [""]
    return str(named[0])


def _columns(options: BatchOptions, most: int | None = None) -> tuple[str, ...]:
    if not options.columns or (most is not None and len(options.columns) > most):
        wanted = "the column" if most == 1 else "the columns"
        raise InputError(f"name {wanted} of {options.input} to read: --column NAME")
    return options.columns


def _model_arguments(options: BatchOptions) -> dict[str, Any]:
    if options.sampling:
        name = next(iter(options.sampling)).replace("_", "-")
        raise InputError(f"--{name} goes with language models; leave it out")
    for name, value in options.engine.items():
        if name not in _SHARED and _LEFT_OUT.get(name) != value:
            raise InputError(f"--{name.replace('_', '-')} goes with language models; leave it out")
    shared = {name: value for name, value in options.engine.items() if name in _SHARED}
    return shared | {"max_batch_size": options.max_batch_size or _DEFAULT_BATCH_SIZE}


def _read_preprocessor(folder: Path | None) -> dict[str, Any]:
    if folder is None or not (folder / _PREPROCESSOR).is_file():
        raise InputError(
            f"a folder of files needs a model folder with {_PREPROCESSOR}, which says how they are "
            "prepared; give one, or a table of numbers"
        )
    try:
        return msgspec.json.decode((folder / _PREPROCESSOR).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{folder / _PREPROCESSOR} cannot be read: {error}") from error


def _converted(settings: Mapping[str, Any], kind: type[Settings]) -> Settings:
    try:
        return msgspec.convert(settings, kind)
    except msgspec.ValidationError as error:
        raise ModelError(f"{_PREPROCESSOR}: {error}; mend that file") from error

"""Offline generation: the class a script uses."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from spanwise.engine.choice import LiveRequest
from spanwise.engine.config import OFFLINE_STEP_TOKENS, engine_config
from spanwise.engine.core import EngineCore
from spanwise.engine.engine import Engine
from spanwise.engine.grammar import GrammarChecker
from spanwise.engine.language_launch import Started, launch
from spanwise.engine.launch import EnginePlan
from spanwise.engine.prompt import Prompt, read_prompt
from spanwise.engine.sampling_defaults import read_defaults
from spanwise.engine.tokenizer import Tokenizer
from spanwise.errors import EngineError, InputError
from spanwise.model.folder import read_config, read_generation_config, resolve_model
from spanwise.scheduler.request import SequenceRequest
from spanwise.types.outputs import RequestOutput
from spanwise.types.sampling import SamplingParams
from spanwise.types.worker import Quantization
from spanwise.worker.supervisor import Supervisor


class LLM:
    """A model spread over devices, used from a script.

    Args:
        model: a folder, ``spanwise/tiny-dense``, ``spanwise/tiny-moe``, or a name on the hub.
        devices: ``cpu``, ``cpu:4`` (four devices sharing the cores), ``cuda``, ``cuda:0,1``,
            ``cuda:0*2`` (two ranks on one card). None: all CUDA cards, else the CPU.
        tensor_parallel_size, pipeline_parallel_size, data_parallel_size: the layout; with none of
            them, data parallel over the devices.
        enable_expert_parallel: whole experts on each tensor-parallel rank, not slices of each.
        pp_layers: layers of each stage by hand.
        dtype: ``auto`` (the model's), ``float32``, ``bfloat16``, ``float16``.
        quantization: the layers' linears in 8 bits: ``int8`` on CPU devices, ``fp8`` on CUDA cards
            of compute capability 8.9 or more. None: as loaded.
        max_model_len: longest sequence in tokens; None: what the model was made for, or fits.
        max_num_seqs: sequences computed at once in a replica.
        max_step_tokens: tokens computed in one step; prompts are cut to it.
        block_size: tokens of one block of the KV cache.
        kv_cache_memory: bytes for the KV caches of this host; None: what is free.
        prefix_caching: keys and values of a prompt's beginning that was computed before are used
            again.
        progress: called with a line as the start goes on.
        supervisor: processes that several LLMs of this process share, so that each but the first
            starts at once; it is the caller's to shut down.

    Raises InputError (and its kinds ModelError, LayoutError, DeviceError) for what cannot be.
    """

    def __init__(
        self,
        model: str,
        *,
        devices: str | None = None,
        tensor_parallel_size: int | None = None,
        pipeline_parallel_size: int | None = None,
        data_parallel_size: int | None = None,
        enable_expert_parallel: bool = False,
        pp_layers: Sequence[int] | None = None,
        dtype: str = "auto",
        quantization: Quantization | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_step_tokens: int = OFFLINE_STEP_TOKENS,
        block_size: int = 16,
        kv_cache_memory: int | None = None,
        prefix_caching: bool = True,
        progress: Callable[[str], None] | None = None,
        supervisor: Supervisor | None = None,
    ) -> None:
        config = engine_config(
            model,
            devices=devices,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            data_parallel_size=data_parallel_size,
            enable_expert_parallel=enable_expert_parallel,
            pp_layers=pp_layers,
            dtype=dtype,
            quantization=quantization,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_step_tokens=max_step_tokens,
            block_size=block_size,
            kv_cache_memory=kv_cache_memory,
            prefix_caching=prefix_caching,
        )
        folder = resolve_model(config.model)
        defaults = read_defaults(read_generation_config(folder), read_config(folder))
        self._tokenizer = Tokenizer(folder)
        self._started = launch(
            config, folder, progress or (lambda _: None), supervisor, self._tokenizer.start
        )
        # Also when the LLM is forgotten, or the script ends, without a shutdown.
        core = EngineCore(self._started.replicas)
        self._grammars = GrammarChecker(folder)
        self._close = weakref.finalize(
            self, _close_in, os.getpid(), core, self._started, self._grammars
        )
        self._news: dict[int, LiveRequest] = {}
        self._engine = Engine(
            core,
            self._tokenizer,
            defaults,
            self._started.facts.vocab_size,
            self.plan.max_model_len,
        )
        try:
            self._tokenizer.wait()
        except BaseException:
            self._close()
            raise

    @property
    def plan(self) -> EnginePlan:
        """What was decided at start: layout, bytes per device, limits."""
        return self._started.plan

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt; results in input order.

        A prompt is a text, ``{"prompt": text}``, ``{"prompt_token_ids": ids}`` or
        ``{"messages": conversation}``. ``sampling_params`` is one for all, or one for each.
        ``on_output`` is called with each finished request as it comes. Raises InputError before
        anything is computed if any prompt or parameter cannot be.
        """
        if not isinstance(prompts, str | Mapping | Sequence):
            raise InputError(f"prompts must be a prompt or a list of them, got {prompts!r:.80}")
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        wanted = _one_each(sampling_params, len(many))
        ids = self._add_all(list(zip(many, wanted, strict=True)))
        finished: dict[int, RequestOutput] = {}
        for request in self._live(ids):
            if request.finished:
                output = finished[request.request_id] = request.output()
                if on_output is not None:
                    on_output(output)
        return [finished[request_id] for request_id in ids]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Generate for one prompt; yields the whole request each time it has grown.

        Several streams may be read in turns. Leaving one early ends its request.
        """
        for request in self._live(self._add_all([(prompt, sampling_params or SamplingParams())])):
            yield request.output()

    def shutdown(self) -> None:
        """End every process and give memory back. May be called again."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _require_open(self) -> None:
        if not self._close.alive:
            raise EngineError("this LLM is shut down; make a new one")

    def _add_all(self, wanted: Sequence[tuple[Prompt, SamplingParams]]) -> list[int]:
        """Admit all requests or none."""
        self._require_open()
        ids: list[int] = []
        try:
            for number, (prompt, params) in enumerate(wanted):
                ids.append(self._add(number, len(wanted), prompt, params))
        except BaseException:
            for request_id in ids:
                self._engine.abort(request_id)
            raise
        return ids

    def _add(self, number: int, of: int, prompt: Prompt, params: SamplingParams) -> int:
        try:
            text, token_ids = read_prompt(prompt, self._tokenizer)
            if params.grammar is not None:
                self._grammars.check(params.grammar, params.stop_token_ids or ())
            return self._engine.add(text, token_ids, params)
        except InputError as error:
            if of == 1:
                raise
            raise type(error)(f"prompt {number}: {error}") from error

    def _live(self, ids: Sequence[int]) -> Iterator[LiveRequest]:
        """These requests as news of them come, until all have finished; an early end aborts them.

        A step may bring news of requests that are read elsewhere: those wait for their reader.
        """
        going = set(ids)
        try:
            while going:
                self._require_open()
                if not (come := going & self._news.keys()):
                    self._news.update((each.request_id, each) for each in self._step())
                for request_id in sorted(come):
                    request = self._news.pop(request_id)
                    if request.finished:
                        going.discard(request_id)
                    yield request
        finally:
            for request_id in going:
                self._news.pop(request_id, None)
                if self._close.alive:
                    self._engine.abort(request_id)

    def _step(self) -> list[LiveRequest]:
        """One step of the engine; whatever breaks it off leaves plans and results out of step."""
        try:
            return self._engine.step()
        except BaseException:
            self.shutdown()
            raise


def _close_in(
    pid: int, core: EngineCore[SequenceRequest], started: Started, grammars: GrammarChecker
) -> None:
    """Close in the process that started; a fork of it owns nothing."""
    if os.getpid() == pid:
        core.close()
        grammars.close()
        started.close()


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    given = list(params) if isinstance(params, Sequence) else [params]
    wrong = [each for each in given if not isinstance(each, SamplingParams)]
    if wrong:
        raise InputError(f"sampling_params must be SamplingParams, got {type(wrong[0]).__name__}")
    if len(given) != count:
        raise InputError(
            f"{count} prompts came with {len(given)} sampling_params; give one for all, or as many"
        )
    return given

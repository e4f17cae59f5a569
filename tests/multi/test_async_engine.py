"""The engine as a service: many requests at once, over the borders of its processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import psutil
import pytest

from spanwise import LLM, SamplingParams
from spanwise.control.admission import AdmissionLimits
from spanwise.engine.async_engine import AsyncEngine
from spanwise.engine.config import EngineConfig, ServiceConfig
from spanwise.engine.service import EngineService
from spanwise.errors import EngineError, InputError, ModelError, OverloadedError
from spanwise.layout.request import LayoutRequest
from spanwise.types.sampling import Grammar
from spanwise.types.serving import EngineHealth, EngineRequest

MODEL = "spanwise/tiny-dense"
PROMPTS = ["def main(", "import os", "class Node:\n", "for x in range(", "return "]


def config(**changes: object) -> ServiceConfig:
    layout = LayoutRequest(data_parallel_size=2)
    engine = EngineConfig(model=MODEL, devices="cpu:2", layout=layout, dtype="float32")
    return ServiceConfig(engine=engine, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def service() -> Iterator[EngineService]:
    running = EngineService(config())
    with_engine(running, lambda _: asyncio.sleep(0))  # its processes are all there from here on
    yield running
    running.close()


@asynccontextmanager
async def connected(service: EngineService) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(service.connect())
    await engine.wait_ready()
    try:
        yield engine
    finally:
        await engine.close()


def with_engine(service: EngineService, use: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    async def run() -> None:
        async with connected(service) as engine:
            await use(engine)

    asyncio.run(run())


def workers_of(service: EngineService) -> list[psutil.Process]:
    """The processes that compute: children of zygotes."""
    below = [psutil.Process(pid) for pid in service.pids()]
    parents = {process.ppid() for process in below}
    return [each for each in below if each.pid not in parents and each.pid != service.engine.pid]


async def idle(engine: AsyncEngine) -> None:
    """Wait until nothing runs and no block is in use."""
    for _ in range(200):
        stats = await engine.stats()
        if not any(r.num_running or r.num_waiting or r.num_used_blocks for r in stats.replicas):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"not idle: {stats.replicas}")


def test_many_at_once_give_what_an_llm_gives(service: EngineService) -> None:
    params = [
        SamplingParams(max_tokens=8 + 3 * i, temperature=0.7 * (i % 2), seed=i, n=1 + i % 3)
        for i in range(12)
    ]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(12)]
    with LLM(MODEL, devices="cpu:1", dtype="float32") as llm:
        wanted = [
            [(choice.text, choice.token_ids, choice.finish_reason) for choice in output.outputs]
            for output in llm.generate(prompts, params)
        ]

    async def use(engine: AsyncEngine) -> None:
        async def one(prompt: str, param: SamplingParams) -> list[tuple[object, ...]]:
            stream = await engine.open(EngineRequest(prompt=prompt, params=param))
            texts = [""] * param.n
            async for news in stream:
                for delta in news.deltas:
                    texts[delta.index] += delta.text
            outputs = stream.live.output().outputs
            assert [choice.text for choice in outputs] == texts, "deltas add up to the whole"
            return [(choice.text, choice.token_ids, choice.finish_reason) for choice in outputs]

        assert await asyncio.gather(*map(one, prompts, params)) == wanted
        await idle(engine)

    with_engine(service, use)


def test_text_before_a_stop_string_never_shows_its_beginning(service: EngineService) -> None:
    async def use(engine: AsyncEngine) -> None:
        whole = ""
        async for output in engine.generate("import os", SamplingParams(max_tokens=40, seed=1)):
            whole = output.outputs[0].text
        at = len(whole) // 2
        stop = whole[at : at + 5]
        params = SamplingParams(max_tokens=40, seed=1, stop=[stop, "never there"])
        stream = await engine.open(EngineRequest(prompt="import os", params=params))
        told = ""
        async for news in stream:
            told += news.deltas[0].text
            assert whole[: whole.index(stop)].startswith(told)
        assert told == whole[: whole.index(stop)]
        assert news.deltas[0].stop_reason == stop and news.deltas[0].finish_reason == "stop"
        await idle(engine)

    with_engine(service, use)


def test_logprobs_of_prompt_and_answer_come_once(service: EngineService) -> None:
    async def use(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=5, temperature=0.0, logprobs=2, prompt_logprobs=1)
        stream = await engine.open(EngineRequest(prompt="def main(x):", params=params))
        prompt, tokens, logprobs = [], [], []
        async for news in stream:
            prompt += news.prompt_logprobs
            for delta in news.deltas:
                tokens += delta.token_ids
                logprobs += delta.logprobs
        assert prompt[0] is None
        read = [each.token_id for each in prompt[1:] if each is not None]
        assert tuple(read) == stream.prompt_token_ids[1:]
        assert [each.token_id for each in logprobs] == tokens and len(tokens) == 5

    with_engine(service, use)


def test_answers_match_their_grammar_and_a_bad_grammar_is_refused(service: EngineService) -> None:
    async def use(engine: AsyncEngine) -> None:
        async def answer(kind: str, text: str) -> str:
            grammar = Grammar(kind, text)  # type: ignore[arg-type]
            params = SamplingParams(max_tokens=120, seed=4, ignore_eos=True, grammar=grammar)
            outputs = [out async for out in engine.generate("x = ", params)]
            assert outputs[-1].outputs[0].finish_reason == "stop"
            return outputs[-1].outputs[0].text

        number, flag = await asyncio.gather(
            answer("regex", "[0-9]{3}-[ab]"),
            answer("json_schema", '{"type": "object", "properties": {"on": {"type": "boolean"}},'
                   ' "required": ["on"], "additionalProperties": false}'),
        )  # fmt: skip
        assert re.fullmatch("[0-9]{3}-[ab]", number)
        assert json.loads(flag) in ({"on": True}, {"on": False})
        with pytest.raises(InputError, match="regular expression"):
            await answer("regex", "(")
        await idle(engine)

    with_engine(service, use)


def test_an_abandoned_request_gives_its_blocks_back(service: EngineService) -> None:
    async def use(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=1500, ignore_eos=True)
        streams = [
            await engine.open(EngineRequest(prompt=prompt, params=params)) for prompt in PROMPTS
        ]
        for stream in streams[:3]:
            await anext(stream)
        for stream in streams:
            stream.abort()
            stream.abort()
        await idle(engine)
        with pytest.raises(StopAsyncIteration):
            await anext(streams[0])

    with_engine(service, use)


def test_a_front_that_goes_takes_its_requests_along(service: EngineService) -> None:
    async def run() -> None:
        async with connected(service) as other:
            async with connected(service) as engine:
                params = SamplingParams(max_tokens=1500, ignore_eos=True)
                stream = await engine.open(EngineRequest(prompt="x", params=params))
                await anext(stream)
            await idle(other)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("prompt", "params", "part"),
    [
        ({"prompt_token_ids": []}, SamplingParams(), "no tokens"),
        ({"prompt_token_ids": [1, 999_999]}, SamplingParams(), "not in the vocabulary"),
        ({"prompt_token_ids": [5] * 4000}, SamplingParams(), "max_model_len"),
        ("x", SamplingParams(stop_token_ids=[70_000]), "not in the vocabulary"),
        ({"nothing": 1}, SamplingParams(), "exactly one of"),
    ],
)
def test_what_cannot_be_is_refused_and_costs_nothing(
    service: EngineService, prompt: object, params: SamplingParams, part: str
) -> None:
    async def use(engine: AsyncEngine) -> None:
        with pytest.raises(InputError, match=part):
            await engine.open(EngineRequest(prompt=prompt, params=params))  # type: ignore[arg-type]
        await idle(engine)

    with_engine(service, use)


def test_health_tells_of_a_rank_that_hangs_and_of_its_return() -> None:
    running = EngineService(config(silent_after_s=1.5))
    try:

        async def use(engine: AsyncEngine) -> None:
            async def healthy(wanted: bool) -> EngineHealth:
                while (health := await engine.health()).healthy is not wanted:
                    await asyncio.sleep(0.05)
                return health

            good = await asyncio.wait_for(healthy(True), 20)
            assert {rank.device for rank in good.ranks} == {"cpu:0", "cpu:1"}
            victim = workers_of(running)[0]
            victim.suspend()
            bad = await asyncio.wait_for(healthy(False), 20)
            assert [rank.healthy for rank in bad.ranks].count(False) == 1
            assert bad.reason is not None and "has not answered for" in bad.reason
            victim.resume()
            await asyncio.wait_for(healthy(True), 20)

        with_engine(running, use)
    finally:
        running.close()


def test_too_much_is_refused_before_it_costs_anything() -> None:
    limits = AdmissionLimits(max_waiting_requests=1, max_requests_per_tenant=2)
    running = EngineService(config(admission=limits))
    try:

        async def use(engine: AsyncEngine) -> None:
            params = SamplingParams(max_tokens=1900, ignore_eos=True)

            async def one(tenant: str) -> str:
                request = EngineRequest(prompt="x", params=params, tenant=tenant)
                try:
                    stream = await engine.open(request)
                except OverloadedError as error:
                    assert error.retry_after_s >= 1
                    return "tenant" if error.of_tenant else "server"
                await anext(stream)
                return "taken"

            assert [await one("a"), await one("a"), await one("a")] == ["taken", "taken", "tenant"]
            answers = await asyncio.gather(*[one(f"b{i}") for i in range(5)])
            assert "server" in answers and "taken" in answers

        with_engine(running, use)
    finally:
        running.close()


def test_a_request_that_is_cancelled_at_any_moment_gives_its_place_back() -> None:
    running = EngineService(config(admission=AdmissionLimits(max_requests_per_tenant=3)))
    try:

        async def use(engine: AsyncEngine) -> None:
            request = EngineRequest(prompt="x", params=SamplingParams(max_tokens=2), tenant="t")

            async def whole() -> None:
                async for _ in await engine.open(request):
                    continue

            for number in range(60):
                opening = asyncio.ensure_future(engine.open(request))
                for _ in range(number % 6):  # as many turns of the loop
                    await asyncio.sleep(0)
                if not opening.cancel():
                    (await opening).abort()
                await asyncio.gather(opening, return_exceptions=True)
            await idle(engine)
            await asyncio.gather(whole(), whole(), whole())

        with_engine(running, use)
    finally:
        running.close()


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path: object) -> None:
    async def run() -> None:
        with pytest.raises(ModelError, match="no-such-model"):
            await AsyncEngine.start(EngineConfig(model="./no-such-model"))

    asyncio.run(run())


def test_the_owners_death_ends_everything_while_streams_run() -> None:
    """In a process of its own, killed with -9."""
    script = (
        "import asyncio, sys\n"
        "from tests.multi.test_async_engine import stream_for_ever\n"
        "asyncio.run(stream_for_ever())\n"
    )
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover - another process
        os.dup2(write_end, 1)
        os.execv(sys.executable, [sys.executable, "-c", script])
    os.close(write_end)
    with os.fdopen(read_end) as told:
        pids = [int(word) for word in told.readline().split()]
        assert len(pids) >= 5, "engine, fork server, zygote, two workers"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        deadline = time.monotonic() + 2
        while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not [each for each in pids if psutil.pid_exists(each)]


async def stream_for_ever() -> None:
    service = EngineService(config())
    engine = AsyncEngine(service.connect())
    await engine.wait_ready()
    params = SamplingParams(max_tokens=1900, ignore_eos=True)
    stream = await engine.open(EngineRequest(prompt="x", params=params))
    await anext(stream)
    print(*service.pids(), flush=True)
    async for _ in stream:
        continue


def test_a_dead_worker_fails_its_requests_with_a_reason() -> None:
    running = EngineService(config())
    try:

        async def use(engine: AsyncEngine) -> None:
            params = SamplingParams(max_tokens=1900, ignore_eos=True)
            stream = await engine.open(EngineRequest(prompt="x", params=params))
            await anext(stream)
            workers_of(running)[0].kill()
            with pytest.raises(EngineError, match="died from signal 9"):
                while True:
                    await anext(stream)
                    (await engine.open(EngineRequest(prompt="x", params=params))).abort()
            assert not (await engine.health()).healthy

        with_engine(running, use)
    finally:
        running.close()

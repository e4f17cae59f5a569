"""What a server says of itself: health, readiness, models, metrics, and its API's document."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.server.asgi import Call
from tests.server.contract import check_refusal
from tests.server.fakes import CONTEXT, MODEL, TIMES, FakeEngine
from tests.server.running import Running, running

from spanwise.errors import EngineError
from spanwise.server.app import create_app
from spanwise.server.metrics import metrics_text
from spanwise.server.options import ServerOptions, digest
from spanwise.server.routes.table import ROUTES
from spanwise.server.service import version
from spanwise.types.serving import EngineHealth, EngineStats

OPTIONS = ServerOptions(served_model_names=("main", "other/name"), health_timeout_s=0.2)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(OPTIONS) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client
    server.engine.is_ready, server.engine.phase, server.engine.is_healthy = True, "ready", True


def test_health(server: Running, client: httpx2.Client) -> None:
    well = client.get("/health").json()
    assert well["status"] == "ok" and well["ranks"][0]["device"] == "cpu:0"
    server.engine.is_healthy = False
    error = check_refusal(client.get("/health"), 503)
    assert error["code"] == "unhealthy" and "rank 0" in error["message"]


def test_health_of_an_engine_that_says_nothing(server: Running, client: httpx2.Client) -> None:
    async def silent() -> EngineHealth:
        await asyncio.Event().wait()
        raise AssertionError

    server.engine.health = silent  # type: ignore[method-assign]
    try:
        check_refusal(client.get("/health"), 503)
    finally:
        del server.engine.health  # type: ignore[method-assign]


def test_ready(server: Running, client: httpx2.Client) -> None:
    assert client.get("/ready").json() == {"status": "ready"}
    server.engine.is_ready, server.engine.phase = False, "loading weights"
    assert "loading weights" in check_refusal(client.get("/ready"), 503)["message"]
    for path in ("/metrics", "/tokenizer_info"):
        check_refusal(client.get(path), 503)
    server.engine.phase = "failed: no such file: /srv/ann/model"
    error = check_refusal(client.get("/ready"), 503)
    assert error["code"] == "engine_unavailable" and "ann" not in error["message"]


def test_models(client: httpx2.Client) -> None:
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["main", "other/name"]
    for name in ("main", "other/name", "other%2Fname"):
        model = client.get(f"/v1/models/{name}").json()
        assert model["max_model_len"] == CONTEXT and model["root"] == MODEL
    check_refusal(client.get(f"/v1/models/{MODEL}"), 404)
    body = {"prompt": "a", "max_tokens": 1}
    answer = client.post("/v1/completions", json={**body, "model": "other/name"})
    assert answer.json()["model"] == "other/name"
    assert client.get("/version").json() == {"version": version()}


def test_where_a_model_lies_is_nobodys_business() -> None:
    class Elsewhere(FakeEngine):
        @property
        def plan(self) -> Any:
            return msgspec.structs.replace(super().plan, model="/srv/ann/llama")

    async def ask() -> str:
        body = {"model": "llama", "prompt": "a"}
        call = Call(create_app(Elsewhere(), ServerOptions()), "/v1/completions", body)
        await call.task
        assert call.status == 200
        return call.text

    assert "ann" not in asyncio.run(ask())


def test_tokenizer_info(client: httpx2.Client) -> None:
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|eos|>" and info["bos_token"] == "<|bos|>"
    assert "<|im_start|>" in info["chat_template"] and info["added_tokens"]["<|im_end|>"] == 4


def test_tokens_and_back(client: httpx2.Client) -> None:
    text = "def main(): # ünï 😀"
    tokens = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == CONTEXT
    back = client.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": text}
    named = client.post("/tokenize", json={"prompt": "hi", "return_token_strs": True}).json()
    assert named["token_strs"] == ["<|bos|>", "hi"] and named["tokens"][0] == 1
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    ready = client.post("/tokenize", json=chat).json()["tokens"]
    bare = client.post("/tokenize", json={**chat, "add_generation_prompt": False}).json()["tokens"]
    assert ready[: len(bare)] == bare and len(ready) > len(bare)


def samples_of(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every value by its name and its labels but the model's, which is always there."""
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "main"
            key = (sample.name, frozenset(labels.items()))
            assert key not in samples, "told twice"
            samples[key] = sample.value
    return samples


def test_metrics(client: httpx2.Client) -> None:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    samples = samples_of(answer.text)

    def value(name: str, engine: str = "0", **labels: str) -> float:
        wanted = frozenset({"engine": engine, **labels}.items())
        found = {samples[f"{prefix}:{name}", wanted] for prefix in ("spanwise", "vllm")}
        assert len(found) == 1
        return found.pop()

    assert value("num_requests_running") == 2 and value("num_requests_running", "1") == 0
    assert value("num_requests_waiting") == 3
    assert value("kv_cache_usage_perc") == 0.25
    assert (value("prefix_cache_queries_total"), value("prefix_cache_hits_total")) == (100, 40)
    assert (value("prompt_tokens_total"), value("generation_tokens_total")) == (11, 22)
    assert value("prompt_tokens_cached_total") == 5 and value("prompt_tokens_total", "1") == 0
    assert value("request_success_total", finished_reason="stop") == 4
    assert value("request_success_total", finished_reason="length") == 2
    for name in TIMES:
        assert value(f"{name}_bucket", le="0.01") == 3
        assert value(f"{name}_bucket", le="0.1") == 5
        assert value(f"{name}_bucket", le="+Inf") == 6
        assert value(f"{name}_count") == 6 and value(f"{name}_sum") == 0.5
        assert value(f"{name}_count", "1") == 0
    cache = {
        "block_size": "16",
        "num_gpu_blocks": "20",
        "kv_cache_size_tokens": "320",
        "enable_prefix_caching": "True",
    }
    assert value("cache_config_info", **cache) == value("cache_config_info", "1", **cache) == 1
    assert samples["vllm:request_refused_total", frozenset()] == 7


def test_metrics_of_devices(client: httpx2.Client) -> None:
    samples = samples_of(client.get("/metrics").text)
    place = {"device": "cpu:0", "replica": "0", "stage": "1", "rank": "2"}
    found = {name: value for (name, labels), value in samples.items() if labels == place.items()}
    assert found == {
        "spanwise:device_utilization": 0.75,
        "spanwise:device_memory_used_bytes": 300,
        "spanwise:device_memory_total_bytes": 1000,
        "spanwise:device_weight_bytes": 100,
        "spanwise:device_kv_cache_bytes": 50,
        "spanwise:device_busy_seconds_total": 12.5,
    }


def test_metrics_of_an_engine_that_has_done_nothing() -> None:
    text = metrics_text(EngineStats(), 'a"b\n').decode()
    assert "vllm:e2e_request_latency_seconds" in text
    assert [*text_string_to_metric_families(text)]


# What dashboards and autoscalers ask for by name, and as what.
ASKED_FOR = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "cache_config_info": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "prompt_tokens": "counter",
    "prompt_tokens_cached": "counter",
    "generation_tokens": "counter",
    "num_preemptions": "counter",
    "request_success": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "request_prefill_kv_computed_tokens": "histogram",
    "request_params_max_tokens": "histogram",
    "request_params_n": "histogram",
    "iteration_tokens_total": "histogram",
}


def test_metrics_have_the_names_and_types_that_dashboards_ask_for(client: httpx2.Client) -> None:
    families = text_string_to_metric_families(client.get("/metrics").text)
    types = {family.name: family.type for family in families}
    assert {name: types[f"vllm:{name}"] for name in ASKED_FOR} == ASKED_FOR
    assert {name: types[f"spanwise:{name}"] for name in ASKED_FOR} == ASKED_FOR


def test_the_document_is_true(client: httpx2.Client) -> None:
    document = client.get("/openapi.json").json()
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.partition('"')[0] in schemas
    for route in ROUTES:
        operation = document["paths"][route.path.replace(":path}", "}")][route.method.lower()]
        assert "200" in operation["responses"] and "503" in operation["responses"]
        assert ("requestBody" in operation) == (route.body is not None)
    chat = schemas["ChatRequest"]
    assert chat["additionalProperties"] is False and set(chat["required"]) == {"model", "messages"}
    assert chat["properties"]["temperature"]["anyOf"][0]["maximum"] == 2


def test_a_mistake_of_ours_is_no_traceback(server: Running, client: httpx2.Client) -> None:
    async def broken(request: Any) -> Any:
        raise RuntimeError("a secret at 0x7f0123456789")

    server.engine.open = broken  # type: ignore[method-assign]
    try:
        body = {"model": "main", "prompt": "a"}
        check_refusal(client.post("/v1/completions", json=body), 500)
    finally:
        del server.engine.open  # type: ignore[method-assign]


def test_the_log_says_it_in_one_clean_line(
    server: Running, client: httpx2.Client, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.refusal = EngineError("rank 0 died:\r\nsee \x1b[31mhere")
    try:
        check_refusal(client.post("/v1/completions", json={"model": "main", "prompt": "a"}), 500)
    finally:
        server.engine.refusal = None
    (line,) = [record.getMessage() for record in caplog.records]
    assert "rank 0 died" in line and line.isprintable()


def test_options_travel_between_processes() -> None:
    options = ServerOptions(api_key_digests=(digest("sk-x"),), allowed_hosts=("a",), pooling="mean")
    assert msgspec.json.decode(msgspec.json.encode(options), type=ServerOptions) == options
    assert "sk-x" not in repr(options)

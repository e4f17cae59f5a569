"""The API's document and the server say the same: schemathesis finds no difference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.server.contract import check_refusal
from tests.server.fakes import MODEL
from tests.server.running import running
from tests.support.server import RealServer, serving

from spanwise.server.options import ServerOptions, digest

KEY = "sk-schema"
ROOT = Path(__file__).resolve().parents[2]
# It shows tools, reasoning and documents, so that requests with these go on to the engine.
TEMPLATE = (
    "{%- if tools %}{{- '<tools>' + (tools | tojson) + '</tools> answer with <tool_call>\\n"
    '{"name": ..., "arguments": ...}\\n</tool_call>\' }}{%- endif %}'
    "{{- reasoning_effort or '' }}{{- documents or '' }}"
    "{%- for m in messages %}{{- m['role'] + ': ' + m['content'] + '\\n' }}"
    "{%- for call in m['tool_calls'] or [] %}"
    "{{- '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}{%- endfor %}"
    "{%- endfor %}"
)


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    # The short context keeps answers short that say nothing of their length. On a busy machine
    # threads that spin while they wait would make each of them take ten times as long.
    options = ("--max-model-len", "32", "--trust-request-chat-template")
    with serving(*options, "--chat-template", TEMPLATE, SPANWISE_API_KEY=KEY,
                 OMP_WAIT_POLICY="passive") as server:  # fmt: skip
        # The process that checks grammars starts with the first; it is no leftover of a test.
        body = {"prompt": "a", "max_tokens": 1, "structured_outputs": {"regex": "a"}}
        server.complete(body, key=KEY).raise_for_status()
        yield server


def checked(server: RealServer, folder: Path, *options: str) -> dict[str, Any]:
    """The report of a run of all checks, in which nothing failed."""
    document, report = folder / "openapi.json", folder / "report.json"
    with server.client(KEY) as client:
        document.write_bytes(client.get("/openapi.json").raise_for_status().content)
    command = [sys.executable, "-m", "schemathesis.cli"]
    command += ["--config-file", str(Path(__file__).with_name("schemathesis.toml"))]
    command += ["run", str(document), "--url", server.url, "--no-color"]
    command += ["--report-json-path", str(report)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "SCHEMA_KEY": KEY},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.said}"
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["complete"] and not found["failures"] and not found["errors"]
    assert found["operations"]["tested"] == found["operations"]["total"]
    return found


def check_accepted(found: dict[str, Any]) -> None:
    """No operation is only ever refused: what lies behind the checks was reached too."""
    for operation, phases in found["valid_rates"].items():
        rates = list(phases.values())
        assert sum(rate["accepted"] for rate in rates) > 0, (operation, rates)


def test_the_document_is_kept(server: RealServer, tmp_path: Path) -> None:
    found = checked(server, tmp_path, "--phases", "fuzzing,stateful", "--max-examples", "14")
    assert found["test_cases"]["generated"] >= 200
    check_accepted(found)
    assert server.is_idle(key=KEY)


@pytest.mark.full
def test_the_document_is_kept_in_thousands_of_cases(server: RealServer, tmp_path: Path) -> None:
    found = checked(server, tmp_path, "--max-examples", "60")
    assert found["test_cases"]["generated"] >= 2_000
    check_accepted(found)
    assert server.is_idle(key=KEY)


# --- what it has found


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    with running() as server, server.client() as client:
        yield client


USER = {"role": "user", "content": "hi"}
FUNCTION = {"type": "function", "function": {"name": "f"}}
WHOLE = [
    ("/v1/completions", {"prompt": [5.0, 6e0], "max_tokens": 3.0, "n": 2.0, "seed": -7.0}),
    ("/v1/chat/completions", {"messages": [USER], "max_tokens": 1.0, "top_logprobs": 0.0}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 1e0, "priority": -0.0}),
    ("/v1/embeddings", {"input": [[5.0], [6]]}),
    ("/detokenize", {"tokens": [5.0]}),
]

STREAMED = {
    "/v1/chat/completions": "ChatChunk",
    "/v1/completions": "Completion",
    "/v1/responses": "TextDelta",
}


@pytest.mark.parametrize(("path", "body"), WHOLE)
def test_a_whole_number_may_have_a_point(
    client: httpx2.Client, path: str, body: dict[str, Any]
) -> None:
    body = {"model": MODEL, "logprobs": True} | body if "chat" in path else {"model": MODEL} | body
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    whole = json.loads(json.dumps(body), parse_float=lambda text: int(float(text)))
    same = client.post(path, json=whole).json()
    assert same.get("usage") == answer.json().get("usage")


@pytest.mark.parametrize("number", ["1e400", "-1e999999", "1e309"])
def test_a_number_too_large_for_json_is_refused_wherever_it_stands(
    client: httpx2.Client, number: str
) -> None:
    body = f'{{"model": "{MODEL}", "messages": [], "response_format": {{"x": {number}}}}}'
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/chat/completions", content=body, headers=headers)
    assert check_refusal(answer, 400)["code"] == "invalid_json"


@pytest.mark.parametrize("part", [{}, {"text": "x"}, {"type": None}, {"type": 5, "text": "x"}])
def test_a_part_without_a_type_is_refused_by_its_place(
    client: httpx2.Client, part: dict[str, Any]
) -> None:
    said = {"role": "user", "content": [part]}
    for path, field in (("/v1/chat/completions", "messages"), ("/v1/responses", "input"),
                        ("/tokenize", "messages")):  # fmt: skip
        error = check_refusal(client.post(path, json={"model": MODEL, field: [said]}), 400)
        assert error["param"] == f"{field}[0].content[0]"


def test_an_item_whose_type_is_null_is_a_message(client: httpx2.Client) -> None:
    item = USER | {"type": None}
    answer = client.post("/v1/responses", json={"model": MODEL, "input": [item]})
    assert answer.status_code == 200, answer.text
    error = check_refusal(
        client.post("/v1/responses", json={"model": MODEL, "input": [{"type": None}]}), 400
    )
    assert error["param"] == "input[0]"


def test_events_are_documented_as_they_come(client: httpx2.Client) -> None:
    document = client.get("/openapi.json").json()
    for path, operation in document["paths"].items():
        content = next(iter(operation.values()))["responses"]["200"]["content"]
        assert ("text/event-stream" in content) == (path in STREAMED)
    for path, record in STREAMED.items():
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        data = content["text/event-stream"]["itemSchema"]["properties"]["data"]
        kinds = json.dumps(data)
        assert f'"#/components/schemas/{record}"' in kinds
        assert ('"[DONE]"' in kinds) == (path != "/v1/responses")


@pytest.mark.parametrize("keys", [(), (KEY,)])
def test_the_document_says_whether_a_key_is_needed(keys: tuple[str, ...]) -> None:
    options = ServerOptions(api_key_digests=tuple(map(digest, keys)))
    headers = {"authorization": f"Bearer {KEY}"}
    with running(options) as server, server.client(headers=headers) as client:
        document = client.get("/openapi.json").json()
    assert ("security" in document) == bool(keys)
    assert document["paths"]["/health"]["get"]["security"] == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ([FUNCTION, FUNCTION], "tools[1].function.name 'f' is that of tools[0] already"),
        ([{**FUNCTION, "function": {"name": "f", "parameters": {"type": "array"}}}], "parameters"),
    ],
)
def test_wrong_tools_are_refused_wherever_they_stand(
    client: httpx2.Client, path: str, tools: list[Any], said: str
) -> None:
    body = {"model": MODEL, "messages": [USER], "tools": tools}
    assert said in check_refusal(client.post(path, json=body), 400)["message"]


def test_a_prediction_is_text(client: httpx2.Client) -> None:
    def answer(content: Any) -> httpx2.Response:
        prediction = {"type": "content", "content": content}
        body = {"model": MODEL, "messages": [USER], "max_tokens": 1, "prediction": prediction}
        return client.post("/v1/chat/completions", json=body)

    assert answer("x").status_code == answer([{"type": "text", "text": "x"}]).status_code == 200
    error = check_refusal(answer([{"x": 1}] * 10_000), 400)
    assert error["param"] == "prediction.content[0]"

"""``spanwise serve`` from outside: what it answers, whom it lets in, and every way it can end."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from tests.support.server import (
    DENSE,
    PATIENCE_S,
    RealServer,
    command,
    is_alive,
    serving,
    until,
)

from spanwise import LLM, SamplingParams

GREEDY: dict[str, Any] = {"prompt": "def main(", "max_tokens": 24, "temperature": 0}
SAMPLED: dict[str, Any] = {"prompt": "import os", "max_tokens": 16, "seed": 7, "temperature": 1}
SHORT: dict[str, Any] = GREEDY | {"max_tokens": 12, "ignore_eos": True}
ENDLESS: dict[str, Any] = GREEDY | {"max_tokens": 1900, "ignore_eos": True}
_GONE_S = 5.0
_SILENT_S = 15.0  # what a rank may be silent


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    """On two ranks, with two processes for HTTP."""
    with serving("--devices", "cpu:2", "-tp", "2", "--http-workers", "2") as running:
        yield running


# --- answers


def test_the_port_opens_at_once_and_ready_tells_the_phases(server: RealServer) -> None:
    assert server.phases and len(server.http()) == 2
    for phase in server.phases:
        assert phase.startswith("the engine is not ready: "), phase
    assert any("model" in phase or "weights" in phase for phase in server.phases)
    assert until(lambda: server.said[-1] == "ready; Ctrl-C ends it")
    assert server.said[1].startswith(f"plan: {DENSE} (LlamaForCausalLM, float32)")


def test_the_text_is_that_of_the_library_streamed_or_not(server: RealServer) -> None:
    with LLM(DENSE, devices="cpu:1", dtype="float32", kv_cache_memory=32 << 20) as llm:
        for body in (GREEDY, SAMPLED):
            settings = {name: value for name, value in body.items() if name != "prompt"}
            (output,) = llm.generate(body["prompt"], SamplingParams(**settings))
            expected = output.outputs[0].text
            assert expected
            whole = server.complete(body).raise_for_status().json()
            streamed = server.stream(body).finish()
            assert whole["choices"][0]["text"] == expected
            assert streamed.is_done and streamed.text == expected


def test_a_hung_rank_turns_health_red_until_it_moves_again(server: RealServer) -> None:
    with server.client() as client:
        assert client.get("/health").status_code == 200
        hung = server.workers()[-1]
        hung.suspend()
        try:
            silent = lambda: client.get("/health").status_code == 503  # noqa: E731
            assert until(silent, _SILENT_S + PATIENCE_S)
            assert "/tp1" in client.get("/health").text or "/tp0" in client.get("/health").text
        finally:
            hung.resume()
        assert until(lambda: client.get("/health").status_code == 200)


# --- whom it lets in, and what it is called


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One of this machine's own, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    made = (folder / "server.pem", folder / "key.pem")
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-out", str(made[0]), "-keyout", str(made[1])]
    asked = ["openssl", "req", *kind, "-days", "2", *name, *files]
    subprocess.run(asked, check=True, capture_output=True, timeout=PATIENCE_S)
    return made


def test_keys_names_and_tls(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("from-file\n\nanother\n")
    trusting = ssl.create_default_context(cafile=certificate[0])
    files = ("--ssl-certfile", str(certificate[0]), "--ssl-keyfile", str(certificate[1]))
    keys = ("--api-key", "from-flag", "--api-key-file", str(tmp_path / "keys"))
    names = ("--served-model-name", "first", "--served-model-name", "second")
    with serving(
        *files, *keys, *names, verify=trusting, SPANWISE_API_KEY="from-a, from-b"
    ) as server:
        assert server.url.startswith("https://")
        for key in ("from-flag", "from-file", "another", "from-a", "from-b"):
            with server.client(key) as client:
                listed = client.get("/v1/models").raise_for_status().json()["data"]
                assert [each["id"] for each in listed] == ["first", "second"]
        for name in ("first", "second"):
            answer = server.complete(SHORT | {"model": name}, key="from-a")
            assert answer.raise_for_status().json()["model"] == name
        assert server.complete(SHORT, key="from-a").status_code == 404
        for wrong in (None, "from", "from-a, from-b", "x"):
            with server.client(wrong) as client:
                assert client.get("/v1/models").status_code == 401
                assert client.get("/metrics").status_code == 401
                assert client.get("/health").status_code == 200
        with httpx2.Client(trust_env=False) as plain, pytest.raises(httpx2.HTTPError):
            plain.get(server.url.replace("https", "http") + "/health")
        shown = [word for each in server.processes() for word in each.cmdline()]
        assert not any("from-b" in word or "from-file" in word for word in shown)


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["./no-such-folder", "--port", "0"], "no model folder"),
        ([DENSE, "--port", "70000"], "port must be"),
        ([DENSE, "--host", "no.such.host.invalid", "--port", "0"], "cannot listen on"),
        ([DENSE, "--http-workers", "0"], "http_workers must be"),
        ([DENSE, "--shutdown-timeout", "-1"], "shutdown_timeout must be"),
        ([DENSE, "--shutdown-timeout", "nan"], "shutdown_timeout must be"),
        ([DENSE, "--ssl-keyfile", "key.pem"], "ssl_keyfile"),
        ([DENSE, "--ssl-certfile", "no-such.pem", "--port", "0"], "no-such.pem"),
        ([DENSE, "--api-key-file", "no-such-keys"], "no-such-keys"),
        ([DENSE, "--chat-template", "@no-such-template"], "no-such-template"),
        ([DENSE, "--max-waiting-requests", "-1"], "max_waiting_requests"),
        ([DENSE, "--batching", "sometimes"], "batching"),
        ([DENSE, "--no-such-flag"], "no-such-flag"),
        ([DENSE, "--devices", "cuda:99", "--port", "0"], "cuda:99"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(arguments: list[str], said: str) -> None:
    refused(arguments, said)


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused([DENSE, "--port", str(taken.getsockname()[1])], "give another --port")


def refused(arguments: list[str], said: str) -> None:
    answer = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=PATIENCE_S * 2
    )
    lines = [line for line in answer.stderr.splitlines() if not line.endswith("(loading)")]
    assert (answer.returncode, answer.stdout, len(lines)) == (2, "", 1), answer
    assert lines[0].startswith("spanwise: ") and said in lines[0], lines


# --- the end


def everything(server: RealServer) -> list[psutil.Process]:
    return [psutil.Process(server.popen.pid), *server.processes()]


def all_gone(processes: list[psutil.Process]) -> bool:
    return until(lambda: not any(map(is_alive, processes)), _GONE_S)


def test_sigterm_lets_short_streams_finish_and_tells_the_others() -> None:
    with serving("--shutdown-timeout", "3") as server:
        processes = everything(server)
        endless = [server.stream(ENDLESS) for _ in range(8)]
        assert all(each.has_begun.wait(PATIENCE_S) for each in endless)
        short = [server.stream(SHORT) for _ in range(8)]
        assert all(each.has_begun.wait(PATIENCE_S) for each in short)
        began_s = time.monotonic()
        server.popen.terminate()
        assert server.popen.wait(PATIENCE_S) == 0
        assert 2.5 < time.monotonic() - began_s < 3 + 5 + 10
        ends = [each.finish().lines[-1] for each in short]
        assert ends == ["data: [DONE]"] * len(short)
        assert len({each.text for each in short}) == 1
        for each in endless:
            assert not each.finish().is_done
            assert each.failure is not None and "again" in each.failure["message"]
        assert all_gone(processes)
        assert not any("Traceback" in line for line in server.end_log())


def test_a_dead_http_process_is_replaced_and_a_second_ctrl_c_hurries() -> None:
    with serving("--http-workers", "2", "--shutdown-timeout", "60") as server:
        dead, other = server.http()
        streams = [server.stream(ENDLESS) for _ in range(8)]
        assert all(each.has_begun.wait(PATIENCE_S) for each in streams)
        of_other = [each for each in streams if is_of(each, other, server)]
        dead.kill()
        lost = [each for each in streams if each not in of_other]
        assert not any(each.finish().is_done for each in lost)
        assert until(lambda: len(server.http()) == 2)
        assert until(lambda: server.metrics()["num_requests_running"] == len(of_other))
        assert "an HTTP process ended with code -9; starting another" in server.said
        for _ in range(8):  # whichever of the two answers
            server.wait_ready()
            assert server.complete(SHORT).status_code == 200
        assert all(each.is_alive() for each in of_other), "the other process's streams go on"

        processes = everything(server)
        last = server.stream(ENDLESS)
        assert last.has_begun.wait(PATIENCE_S)
        os.killpg(server.popen.pid, signal.SIGINT)
        assert until(lambda: refuses(server))
        assert last.is_alive()
        os.killpg(server.popen.pid, signal.SIGINT)
        assert server.popen.wait(20) == 0
        for each in (last, *of_other):
            assert not each.finish().is_done and each.failure is not None
        assert all_gone(processes)


def is_of(listener: Any, process: psutil.Process, server: RealServer) -> bool:
    """Whether a stream's connection is this process's."""
    ports = {found.raddr.port for found in process.net_connections("tcp") if found.raddr}
    return listener.port in ports


def refuses(server: RealServer) -> bool:
    address = httpx2.URL(server.url)
    try:
        with socket.create_connection((address.host, address.port or 0), PATIENCE_S):
            return False
    except ConnectionRefusedError:
        return True


@pytest.mark.parametrize(
    ("victim", "cause"),
    [
        ("engine", "the engine process is gone"),
        ("worker", r"worker dp0/pp0/tp(\d) on cpu:\1 died from signal 9"),
        ("program", ""),
    ],
)
def test_a_killed_process_is_the_end_of_all(victim: str, cause: str) -> None:
    with serving("--devices", "cpu:2", "-tp", "2") as server:
        processes = everything(server)
        streams = [server.stream(ENDLESS) for _ in range(4)]
        assert all(each.has_begun.wait(PATIENCE_S) for each in streams)
        victims = {
            "engine": server.engine(),
            "worker": server.workers()[-1],
            "program": processes[0],
        }
        victims[victim].kill()
        code = server.popen.wait(PATIENCE_S)
        assert all_gone(processes)
        for each in streams:
            assert not each.finish().is_done
            assert each.failure is not None or each.error is not None
        said = server.end_log()
        assert not any("Traceback" in line for line in said), said
        if victim == "program":
            assert code == -signal.SIGKILL
        else:
            errors = [line for line in said if line.startswith("spanwise: ")]
            assert (code, len(errors)) == (1, 1), said
            assert re.search(cause, errors[0]), errors

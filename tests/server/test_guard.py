"""Who is let in: keys, hosts, origins; and how a request is named."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx2
import pytest
from tests.server.contract import check_refusal
from tests.server.fakes import MODEL
from tests.server.running import Running, running

from spanwise.errors import InputError
from spanwise.server.guard import is_loopback
from spanwise.server.options import ServerOptions, digest
from spanwise.server.routes.table import ROUTES

KEYS = ("sk-first", "sk-Second")
PUBLIC = ("/health", "/ready")
PATHS = [*(route.path for route in ROUTES), "/openapi.json", "/docs", "/nope", "/invocations"]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServerOptions(api_key_digests=tuple(map(digest, KEYS)))) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


WRONG = [
    {},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": "Bearer sk-wrong"},
    {"authorization": "Bearer sk-FIRST"},
    {"authorization": "Bearer sk-second"},
    {"authorization": "Bearer sk-firs"},
    {"authorization": "Bearer sk-firstt"},
    {"authorization": "Basic sk-first"},
    {"authorization": "sk-first"},
    {"authorization": "Bearer sk-first sk-Second"},
    {"authorization": b"Bearer \xff\xfe"},
    {"authorization": "Bearer " + "x" * 10_000},
    {"api-key": "sk-first"},
]


@pytest.mark.parametrize("headers", WRONG, ids=lambda headers: ascii(headers)[:40])
def test_a_key_that_is_wrong(client: httpx2.Client, headers: dict[str, str]) -> None:
    for method in ("GET", "POST"):
        answer = client.request(method, "/v1/models", headers=headers)
        error = check_refusal(answer, 401)
        assert error["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "sk-" not in answer.text


def test_two_keys_at_once_are_none(client: httpx2.Client) -> None:
    headers = [("authorization", "Bearer sk-first"), ("authorization", "Bearer sk-first")]
    check_refusal(client.get("/v1/models", headers=headers), 401)


@pytest.mark.parametrize("path", PATHS)
def test_every_route_but_two_wants_a_key(client: httpx2.Client, path: str) -> None:
    path = path.replace("{model:path}", MODEL)
    for method in ("GET", "POST", "DELETE", "OPTIONS", "HEAD"):
        answer = client.request(method, path)
        if path in PUBLIC:
            assert answer.status_code == (200 if method in ("GET", "HEAD") else 405)
        elif method == "HEAD":
            assert answer.status_code == 401
        else:
            check_refusal(answer, 401)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_right_keys(server: Running, client: httpx2.Client, scheme: str) -> None:
    tenants = set()
    for key in KEYS:
        body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
        headers = {"authorization": f"{scheme} {key}"}
        assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
        tenants.add(server.engine.requests[-1].tenant)
    assert len(tenants) == 2 and "" not in tenants
    assert not any(key in tenant for key in KEYS for tenant in tenants)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "evil.example:8000"},
        {"host": ""},
        {"host": "localhost@evil.example"},
        {"host": "\u00e9vil".encode("latin-1")},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
    ],
    ids=ascii,
)
def test_pages_of_other_sites(client: httpx2.Client, headers: dict[str, str]) -> None:
    key = {"authorization": "Bearer sk-first"}
    for path in ("/v1/models", "/health", "/nope"):
        for method in ("GET", "POST", "DELETE"):
            answer = client.request(method, path, headers={**key, **headers})
            assert check_refusal(answer, 403)["type"] == "permission_error"
            assert "access-control-allow-origin" not in answer.headers


def test_this_machine_and_the_servers_own_page(client: httpx2.Client) -> None:
    key = {"authorization": "Bearer sk-first"}
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:9", "[::1]:80"):
        assert client.get("/v1/models", headers={**key, "host": host}).status_code == 200
        origin = {"host": host, "origin": f"http://{host}"}
        answer = client.get("/v1/models", headers={**key, **origin})
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


def test_names_that_were_allowed() -> None:
    options = ServerOptions(host="0.0.0.0", allowed_hosts=("api.example",))
    with running(options) as server, server.client() as client:
        assert client.get("/health", headers={"host": "API.example:80"}).status_code == 200
        check_refusal(client.get("/health", headers={"host": "evil.example"}), 403)
    with running(ServerOptions(host="0.0.0.0")) as server, server.client() as client:
        headers = {"host": "any.example", "origin": "http://other.example"}
        assert client.get("/health", headers=headers).status_code == 200
        check_refusal(client.get("/nope", headers={"host": "["}), 404)


def test_pages_of_sites_that_are_named_may_ask_from_a_browser() -> None:
    options = ServerOptions(
        api_key_digests=(digest(KEYS[0]),), allowed_origins=("https://app.example",)
    )
    ours, theirs = {"origin": "https://app.example"}, {"origin": "https://evil.example"}
    key = {"authorization": f"Bearer {KEYS[0]}"}
    asking = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    with running(options) as server, server.client() as client:
        answer = client.options("/v1/chat/completions", headers=ours | asking)
        assert answer.status_code == 200, "a browser asks without the key"
        assert answer.headers["access-control-allow-origin"] == ours["origin"]
        assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
        answer = client.get("/v1/models", headers=ours | key)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == ours["origin"]
        check_refusal(client.get("/v1/models", headers=ours), 401)
        assert client.options("/v1/models", headers=theirs | asking).status_code == 400
        answer = check_refusal_of_origin(client, theirs | key)
        assert "access-control-allow-origin" not in answer.headers
    with running(ServerOptions(allowed_origins=("*",))) as server, server.client() as client:
        assert client.get("/v1/models", headers=theirs).status_code == 200


def check_refusal_of_origin(client: httpx2.Client, headers: dict[str, str]) -> httpx2.Response:
    answer = client.get("/v1/models", headers=headers)
    assert "Origin" in check_refusal(answer, 403)["message"]
    return answer


@pytest.mark.parametrize("origin", ["", "app.example", "https://app.example/", "ftp://a", "null"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(InputError, match="is no origin"):
        ServerOptions(allowed_origins=(origin,))


def test_the_name_of_a_request(client: httpx2.Client) -> None:
    given = client.get("/health", headers={"x-request-id": "my-Request_1.2"})
    assert given.headers["x-request-id"] == "my-Request_1.2"
    for bad in ("", "a b", "x" * 129, "a/b", b"\xff", "{}"):
        answer = client.get("/health", headers={"x-request-id": bad})
        assert re.fullmatch(r"req_[0-9a-f]{32}", answer.headers["x-request-id"])
    headers = [("x-request-id", "a"), ("x-request-id", "b")]
    answer = client.get("/health", headers=headers)
    assert answer.headers["x-request-id"].startswith("req_")


def test_addresses_of_this_machine() -> None:
    here = ("127.0.0.1", "127.9.9.9", "::1", "localhost")
    assert all(map(is_loopback, here))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))


def test_options_that_are_mistakes() -> None:
    for bad in ("", "a b", "\u00e4", "a\n"):
        with pytest.raises(InputError):
            digest(bad)
    with pytest.raises(InputError):
        ServerOptions(api_key_digests=(b"sk-plain",))
    with pytest.raises(InputError):
        ServerOptions(served_model_names=("",))
    with pytest.raises(InputError):
        ServerOptions(max_body_bytes=0)
    with pytest.raises(InputError):
        ServerOptions(queue_timeout_s=float("nan"))

"""Section 2, rows 19 to 26: keys, other sites, routes and models that are not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tests.server.bad_input.case import BODIES, KEYS, TEXT, Case, changed, named
from tests.support.server import DENSE

GUARDED = {
    "GET": ("/v1/models", f"/v1/models/{DENSE}", "/tokenizer_info", "/version", "/metrics",
            "/status", "/openapi.json", "/docs", "/nope"),
    "POST": (*BODIES, "/invocations", "/pause", "/update_weights"),
    "DELETE": ("/v1/models", "/v1/completions", "/v1/responses/x"),
}  # fmt: skip
WRONG_KEYS: dict[str, Mapping[str, str | bytes]] = {
    "none": {},
    "only the scheme": {"authorization": "Bearer"},
    "another": {"authorization": "Bearer sk-wrong"},
    "upper case": {"authorization": "Bearer SK-FIRST"},
    "lower case": {"authorization": "Bearer sk-second"},
    "cut": {"authorization": "Bearer sk-firs"},
    "one more": {"authorization": "Bearer sk-firstt"},
    "basic": {"authorization": "Basic sk-first"},
    "no scheme": {"authorization": "sk-first"},
    "two": {"authorization": "Bearer sk-first sk-Second"},
    "no text": {"authorization": b"Bearer \xff\xfe"},
    "long": {"authorization": "Bearer " + "x" * 10_000},
    "by another name": {"api-key": KEYS[0]},
    "with a quote": {"authorization": "Bearer 'sk-first'"},
}
_EVIL = "evil.example"
OTHER_SITES: dict[str, Mapping[str, str | bytes]] = {
    "host": {"host": _EVIL},
    "our address as a name": {"host": f"127.0.0.1.{_EVIL}"},
    "host and port": {"host": f"{_EVIL}:8000"},
    "user part": {"host": f"localhost@{_EVIL}"},
    "not ASCII": {"host": "\u00e9vil".encode("latin-1")},
    "origin": {"origin": f"http://{_EVIL}"},
    "null origin": {"origin": "null"},
    "another port": {"origin": "http://127.0.0.1:1"},
}
NOT_THERE = (
    "/v1", "/invocations", "/pause", "/sleep", "/wake_up", "/update_weights", "/load_lora_adapter",
    "/v1/load_lora_adapter", "/docs", "/redoc", "/%2e%2e", "/abort_requests", "/collective_rpc",
    "/v1/responses/resp_x/cancel", "/" + "x" * 5000,
)  # fmt: skip
METHODS = ("GET", "PUT", "PATCH", "DELETE", "OPTIONS")
MODELS = ("gpt-4", "../../etc/passwd", "x" * (1 << 20), "", "a\r\nb", f"{DENSE}/../x", "a\x1b[31m")


def _keys() -> list[Case]:
    cases = [
        Case(19, name, "/v1/models", method=method, status=401, headers=headers)
        for name, headers in WRONG_KEYS.items()
        for method in ("GET", "POST")
    ]
    cases += [
        Case(19, f"key {name}", path, body, status=401, headers=WRONG_KEYS[name])
        for path, body in BODIES.items()
        for name in ("none", "another", "upper case")
    ]
    cases += [
        Case(23, "without a key", path, method=method, status=401)
        for method, paths in GUARDED.items()
        for path in paths
    ]
    return [
        replace(case, code="invalid_api_key", has_key=False, row=21 if "case" in case.name else
                case.row)
        for case in cases
    ]  # fmt: skip


def _sites() -> list[Case]:
    found = []
    for name, headers in OTHER_SITES.items():
        case = Case(25, name, "/v1/models", status=403, code="forbidden", headers=headers)
        found += [replace(case, method=method) for method in ("GET", "POST", "DELETE")]
        found += [replace(case, path=path, method="GET") for path in ("/health", "/metrics")]
        found += [replace(case, path=path, body=body) for path, body in BODIES.items()]
    return found


def _routes() -> list[Case]:
    found = [
        Case(23, "not there", path, method=method, status=404, code="unknown_url")
        for path in NOT_THERE
        for method in ("GET", "POST", "DELETE")
    ]
    found.append(Case(23, "no name", "/v1/models/", method="GET", status=404, param="*"))
    found.append(Case(23, "no name", "/v1/models/", status=405))
    found += [
        Case(25, "method", path, method=method, status=405)
        for path in BODIES
        for method in METHODS
    ]  # fmt: skip
    return found


def _models() -> list[Case]:
    missing = "model_not_found"
    found = [
        Case(26, named(name), path, changed(path, model=name), "model", 404, missing)
        for path in BODIES
        for name in MODELS
    ]
    found += [
        Case(26, named(name), f"/v1/models/{name}", None, "model", 404, missing, "GET")
        for name in ("gpt-4", "..%2f..%2fetc%2fpasswd", "x" * 5000, "a%1b%7f")
    ]
    lines = "/v1/models/a%0d%0ab%1b[31m"
    found.append(Case(26, "lines", lines, status=404, code="unknown_url", method="GET"))
    adapters = {"lora": "../../etc/passwd", "lora_request": {"path": "/etc"}, "adapter": "x"}
    found += [
        Case(26, field, path, changed(path, **{field: value}), field, code="unknown_parameter")
        for path in TEXT
        for field, value in adapters.items()
    ]
    for path in (*TEXT, "/v1/embeddings"):
        without = {name: value for name, value in BODIES[path].items() if name != "model"}
        found += [
            Case(26, f"model {value!r}", path, changed(path, model=value), "model")
            for value in (None, 4, ["x"], {"a": 1})
        ]
        found.append(Case(26, "no model", path, without, "model"))
    return found


CASES = [*_keys(), *_sites(), *_routes(), *_models()]

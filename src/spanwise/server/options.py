"""What a server is started with."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import msgspec

from spanwise.errors import InputError

Pooling = Literal["last", "mean"]

_ORIGIN = re.compile(r"https?://[a-z0-9.\[\]:-]+")  # as browsers send it


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the routes behave.

    ``served_model_names``: what clients may call the model; () for its own name.
    ``api_key_digests``: of the keys that are let in (see ``digest``); () lets everybody in.
    ``host``: where the server listens. On a loopback address only requests that name this machine
    in their ``Host`` are answered, and none from the pages of other sites; ``allowed_hosts`` are
    further names of it. ``allowed_origins``: other sites whose pages may ask from a browser (CORS),
    as in ``https://app.example``; ``*`` for any.
    ``chat_template``: a template in place of the model's own.
    ``trust_request_chat_template``: requests may bring templates and set their variables.
    ``queue_timeout_s``: how long a request may wait for its first step. ``health_timeout_s``: an
    engine that does not say in so long how it is, is not well. ``pooling``: what an embedding is
    made of where the request does not say. ``log_prompts``: prompts stand in the log.
    ``keeps_answers``: a request with an ``Idempotency-Key`` runs on when its client leaves; for how
    long its answer is kept, the engine is told.
    """

    served_model_names: tuple[str, ...] = ()
    api_key_digests: tuple[bytes, ...] = ()
    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 32 << 20
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    queue_timeout_s: float | None = None
    health_timeout_s: float = 5.0
    pooling: Pooling = "last"
    log_prompts: bool = False
    keeps_answers: bool = True

    def __post_init__(self) -> None:
        """Raise InputError for what could only be a mistake."""
        if not all(self.served_model_names):
            raise InputError("served_model_names has an empty name; leave it out")
        if any(len(each) != hashlib.sha256().digest_size for each in self.api_key_digests):
            raise InputError("api_key_digests holds something else than digests; use digest(key)")
        for origin in self.allowed_origins:
            if origin != "*" and _ORIGIN.fullmatch(origin) is None:
                raise InputError(
                    f"{origin!r} is no origin; write it as in https://app.example:8443, without a "
                    "path, or * for any"
                )
        for name in ("max_body_bytes", "queue_timeout_s", "health_timeout_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} must be above 0, got {value}")


def digest(api_key: str) -> bytes:
    """What is kept of an API key. Raises InputError for a key that no header could carry."""
    if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise InputError("an API key must be printable ASCII without spaces, and not empty")
    return hashlib.sha256(api_key.encode()).digest()

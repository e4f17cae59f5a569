"""What a server and its HTTP processes are started with."""

from __future__ import annotations

import msgspec

from spanwise.engine.config import ServiceConfig
from spanwise.errors import InputError
from spanwise.server.logs import LogFormat
from spanwise.server.options import ServerOptions
from spanwise.server.transport.limits import TransportLimits


class HttpConfig(msgspec.Struct, frozen=True, kw_only=True):
    """An HTTP process: what its routes do, what a client may ask of the wire, and its end.

    ``shutdown_timeout_s`` is what requests have to finish once it is told to end.
    """

    options: ServerOptions = ServerOptions()
    limits: TransportLimits = TransportLimits()
    shutdown_timeout_s: float = 30.0
    certfile: str | None = None
    keyfile: str | None = None
    access_log: bool = False
    log_format: LogFormat = "text"

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        if not 0 <= self.shutdown_timeout_s < float("inf"):
            raise InputError(
                f"shutdown_timeout must be a number from 0 up, got {self.shutdown_timeout_s}"
            )
        if self.keyfile is not None and self.certfile is None:
            raise InputError("ssl_keyfile goes with ssl_certfile; give both")
        if self.options.log_prompts and not self.access_log:
            raise InputError(
                "log_prompts goes with access_log, in whose lines they stand; give both"
            )


class ServingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A server: its engine, its HTTP processes, its address."""

    service: ServiceConfig
    http: HttpConfig = HttpConfig()
    host: str = "127.0.0.1"
    port: int = 8000
    http_workers: int = 1

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must be from 0 to 65535, got {self.port}")
        if not 1 <= self.http_workers <= 64:
            raise InputError(f"http_workers must be from 1 to 64, got {self.http_workers}")

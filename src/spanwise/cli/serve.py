"""``spanwise serve``: an OpenAI-compatible server."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from spanwise.cli.engine_flags import EngineFlags
from spanwise.cli.notes import LoggedNotes, Notes, plan_line
from spanwise.cli.starting import silence_libraries
from spanwise.errors import InputError

if TYPE_CHECKING:
    from spanwise.engine.launch import EnginePlan

_KEYS_VARIABLE = "SPANWISE_API_KEY"


@Parameter(name="*", group=Group("Server", sort_key=5))
@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    """What the server listens to, and whom."""

    host: Annotated[str, Parameter(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Parameter(help="Port to listen on; 0: any that is free.")] = 8000
    http_workers: Annotated[int, Parameter(help="Processes that answer HTTP.")] = 1
    served_model_name: Annotated[
        tuple[str, ...],
        Parameter(negative="", help="Names clients may call the model. Default: its own."),
    ] = ()
    api_key: Annotated[
        tuple[str, ...],
        Parameter(negative="", help="Keys to let in. Better: $SPANWISE_API_KEY, with commas."),
    ] = ()
    api_key_file: Annotated[Path | None, Parameter(help="A file of keys, one a line.")] = None
    allowed_host: Annotated[
        tuple[str, ...], Parameter(negative="", help="Further names this server may be called by.")
    ] = ()
    allowed_origin: Annotated[
        tuple[str, ...],
        Parameter(negative="", help="Sites whose pages may ask, as https://app.example; *: any."),
    ] = ()
    chat_template: Annotated[
        str | None, Parameter(help="A chat template in place of the model's: text or @FILE.")
    ] = None
    trust_request_chat_template: Annotated[
        bool, Parameter(negative="", help="Requests may bring chat templates of their own.")
    ] = False
    shutdown_timeout: Annotated[
        float, Parameter(help="Seconds that requests have to finish at the end.")
    ] = 30.0
    resume_window: Annotated[
        float,
        Parameter(help="Seconds an answer is kept for who repeats its Idempotency-Key; 0: not."),
    ] = 60.0
    ssl_certfile: Annotated[str | None, Parameter(help="Certificate, for HTTPS.")] = None
    ssl_keyfile: Annotated[str | None, Parameter(help="Its key, where it is not beside it.")] = None
    access_log: Annotated[bool, Parameter(negative="", help="Log every request.")] = False
    log_format: Annotated[
        Literal["text", "json"], Parameter(help="How log lines look; json: one object a line.")
    ] = "text"
    log_prompts: Annotated[
        bool, Parameter(negative="", help="Log prompts too, with --access-log.")
    ] = False


@Parameter(name="*", group=Group("Queue and batches", sort_key=7))
@dataclass(frozen=True, kw_only=True)
class QueueFlags:
    """How much may wait, and how sequences are put together."""

    max_waiting_requests: Annotated[
        int, Parameter(help="Requests that may wait; more are told when to come again.")
    ] = 1024
    max_waiting_tokens: Annotated[
        int | None, Parameter(help="Prompt tokens that may wait. Default: no limit.")
    ] = None
    max_requests_per_tenant: Annotated[
        int | None, Parameter(help="Requests under way for one API key. Default: no limit.")
    ] = None
    max_queue_delay: Annotated[
        float,
        Parameter(help="Seconds a request may expect to wait while too many come; inf: no limit."),
    ] = 0.0
    queue_timeout: Annotated[
        float | None, Parameter(help="Seconds a request may wait for its first step.")
    ] = None
    batching: Annotated[
        Literal["continuous", "dynamic", "static"],
        Parameter(help="When sequences join a batch; the last two are for comparison."),
    ] = "continuous"
    batch_size: Annotated[int | None, Parameter(help="Sequences of a dynamic or static batch.")] = (
        None
    )
    batch_window: Annotated[
        float, Parameter(help="Seconds a dynamic or static batch waits to be full.")
    ] = 0.1


def serve(
    model: Annotated[
        str, Parameter(help="A folder, spanwise/tiny-dense, spanwise/tiny-moe, or a hub name.")
    ],
    /,
    *,
    quiet: Annotated[bool, Parameter(negative="", help="Say nothing at the start.")] = False,
    server: ServerFlags = ServerFlags(),  # frozen
    queue: QueueFlags = QueueFlags(),  # frozen
    engine: EngineFlags = EngineFlags(),  # noqa: B008 # frozen
) -> None:
    """Serve a model over OpenAI's HTTP protocol until Ctrl-C or SIGTERM."""
    from spanwise.control.admission import AdmissionLimits
    from spanwise.engine.config import ServiceConfig, engine_config
    from spanwise.server.config import HttpConfig, ServingConfig
    from spanwise.server.options import ServerOptions, digest
    from spanwise.server.serving import Serving

    keys = _keys(server)
    options = ServerOptions(
        served_model_names=server.served_model_name,
        api_key_digests=tuple(digest(key) for key in keys),
        host=server.host,
        allowed_hosts=server.allowed_host,
        allowed_origins=server.allowed_origin,
        chat_template=_template(server.chat_template),
        trust_request_chat_template=server.trust_request_chat_template,
        queue_timeout_s=queue.queue_timeout,
        log_prompts=server.log_prompts,
        keeps_answers=server.resume_window > 0,
    )
    service = ServiceConfig(
        engine=engine_config(
            model,
            **engine.llm_arguments(),
            batching=queue.batching,
            batch_size=queue.batch_size,
            batch_window_s=queue.batch_window,
        ),
        admission=AdmissionLimits(
            max_waiting_requests=queue.max_waiting_requests,
            max_waiting_tokens=queue.max_waiting_tokens,
            max_requests_per_tenant=queue.max_requests_per_tenant,
            max_queue_delay_s=None if queue.max_queue_delay == inf else queue.max_queue_delay,
        ),
        resume_window_s=server.resume_window,
    )
    config = ServingConfig(
        service=service,
        http=HttpConfig(
            options=options,
            shutdown_timeout_s=server.shutdown_timeout,
            certfile=server.ssl_certfile,
            keyfile=server.ssl_keyfile,
            access_log=server.access_log,
            log_format=server.log_format,
        ),
        host=server.host,
        port=server.port,
        http_workers=server.http_workers,
    )
    silence_libraries()
    notes = LoggedNotes(quiet) if server.log_format == "json" else Notes(quiet)
    scheme = "http" if server.ssl_certfile is None else "https"
    with ExitStack() as starting:
        show = starting.enter_context(notes.starting())

        def ready(plan: EnginePlan) -> None:
            starting.close()
            notes.line(plan_line(plan))
            notes.line("ready; Ctrl-C ends it")

        serving = Serving(config, show, ready, notes.line)
        host, port = serving.address
        shown = f"[{host}]" if ":" in host else host
        notes.line(f"serving {model} on {scheme}://{shown}:{port} (loading)")
        if not keys and not _is_loopback(host):
            notes.line("warning: everybody who reaches this address is let in; give --api-key")
        serving.run()


def _keys(flags: ServerFlags) -> list[str]:
    """Every key to let in. Raises InputError for a file that cannot be read or has none."""
    keys = [*flags.api_key]
    keys += [key.strip() for key in os.environ.pop(_KEYS_VARIABLE, "").split(",") if key.strip()]
    if flags.api_key_file is not None:
        try:
            lines = flags.api_key_file.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read --api-key-file {flags.api_key_file}: {error}") from error
        if not lines:
            raise InputError(f"--api-key-file {flags.api_key_file} has no key in it")
        keys += lines
    return keys


def _template(given: str | None) -> str | None:
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --chat-template {given}: {error}") from error


def _is_loopback(host: str) -> bool:
    import ipaddress

    return ipaddress.ip_address(host.partition("%")[0]).is_loopback

"""``spanwise bench serve``: flags, progress and results of a measurement."""

from __future__ import annotations

import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import Group, Parameter

from spanwise.cli.bench_progress import ProgressLine
from spanwise.cli.client_key import client_key
from spanwise.cli.notes import Notes
from spanwise.errors import InputError, SpanwiseError


@Parameter(name="*", group=Group("Load", sort_key=10))
@dataclass(frozen=True, kw_only=True)
class LoadFlags:
    """What is sent, and when."""

    endpoint: Annotated[
        Literal["completions", "chat"],
        Parameter(help="What is asked: prompts of exact length, or conversations."),
    ] = "completions"
    num_requests: Annotated[
        int | None, Parameter(help="Requests to send. Default: 100, or the lines of --prompts.")
    ] = None
    request_rate: Annotated[
        float | None,
        Parameter(help="Requests a second, at random times; inf: all at once. Default: inf."),
    ] = None
    concurrency: Annotated[
        int | None, Parameter(help="Instead: so many requests in flight, always.")
    ] = None
    input_len: Annotated[
        str, Parameter(help="Tokens of a prompt: 128, 32:256 or a mix, 32@3,512@1.")
    ] = "128"
    output_len: Annotated[str, Parameter(help="Tokens of an answer, in the same form.")] = "64"
    prompts: Annotated[str | None, Parameter(help="A file of prompts, one JSON object a line.")] = (
        None
    )
    ignore_eos: Annotated[
        bool, Parameter(help="Ask for answers of the full length; some servers refuse that.")
    ] = True
    extra_body: Annotated[
        str | None, Parameter(help='More fields of every request, as JSON: {"top_p": 0.9}.')
    ] = None
    seed: Annotated[int, Parameter(help="The same seed: the same prompts, lengths and times.")] = 0
    warmup: Annotated[int, Parameter(help="Requests sent before, all at once, unmeasured.")] = 0
    timeout: Annotated[float, Parameter(help="Seconds that an answer may take.")] = 600.0


def serve(
    *,
    base_url: Annotated[
        str, Parameter(help="Where the server is: http://localhost:8000, with /v1 or without.")
    ],
    model: Annotated[
        str | None, Parameter(help="The model to ask for. Default: the server's one model.")
    ] = None,
    api_key: Annotated[
        str | None, Parameter(help="The server's key. Default: $SPANWISE_API_KEY.")
    ] = None,
    goodput: Annotated[
        str | None, Parameter(help="Limits of a good answer, in ms: ttft:500,tpot:50,e2e:2000.")
    ] = None,
    json_name: Annotated[
        str | None, Parameter(name="--json", help="A file for all settings and results.")
    ] = None,
    quiet: Annotated[bool, Parameter(negative="", help="Print nothing but the results.")] = False,
    load: LoadFlags = LoadFlags(),  # frozen
) -> None:
    """Measure a server that speaks OpenAI's protocol."""
    from spanwise.bench.goodput import parse_goodput
    from spanwise.bench.lengths import parse_lengths
    from spanwise.bench.prompts_file import read_prompts
    from spanwise.bench.report import json_report, print_report
    from spanwise.bench.serve import Watcher, measure
    from spanwise.bench.settings import ServeSettings

    lines = [] if load.prompts is None else read_prompts(load.prompts, load.endpoint)
    request_rate = load.request_rate
    if request_rate is None and load.concurrency is None:
        request_rate = math.inf
    settings = ServeSettings(
        base_url=base_url,
        model=model,
        endpoint=load.endpoint,
        num_requests=(len(lines) or 100) if load.num_requests is None else load.num_requests,
        request_rate=request_rate,
        concurrency=load.concurrency,
        input_len=parse_lengths("--input-len", load.input_len),
        output_len=parse_lengths("--output-len", load.output_len),
        prompts=load.prompts,
        ignore_eos=load.ignore_eos,
        extra_body=_fields(load.extra_body),
        seed=load.seed,
        num_warmup=load.warmup,
        timeout_s=load.timeout,
        goodput=None if goodput is None else parse_goodput(goodput),
    )
    _check_place(json_name)
    line = ProgressLine(quiet)
    watcher = Watcher(Notes(quiet).line, line.show)
    measurement = measure(settings, client_key(api_key), watcher, lines)
    line.clear()
    print_report(measurement)
    if json_name is not None:
        Path(json_name).write_bytes(json_report(measurement))
    if measurement.run.interrupted:
        sys.stdout.flush()
        signal.raise_signal(signal.SIGINT)  # now it ends the program as ever
    if not measurement.summary.num_ok:
        raise SpanwiseError(f"none of {measurement.summary.num_requests} requests was answered")


def _fields(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeEncodeError):
        raise InputError(
            f'--extra-body must be JSON such as {{"top_p": 0.9}}, got {text!r:.80}'
        ) from None


def _check_place(name: str | None) -> None:
    """Refuse, before the measurement, a file that could not be written after it."""
    if name is not None and (Path(name).is_dir() or not Path(name).parent.is_dir()):
        raise InputError(f"--json {name} cannot be written: not a file in a folder that is there")

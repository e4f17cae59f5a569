"""A file of prompts: lines of JSON, each with fields of a request's body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from spanwise.bench.settings import Endpoint
from spanwise.errors import InputError


def read_prompts(name: str, endpoint: Endpoint) -> list[dict[str, Any]]:
    """Give the fields of every line; empty lines are passed over.

    A line has ``prompt`` (a text; for completions also token ids), ``prompt_token_ids``
    (completions) or ``messages`` (chat); other fields are sent as they stand. Raises InputError
    with file and line number of what is wrong.
    """
    try:
        lines = Path(name).read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"the prompts {name} cannot be read: {error.strerror}") from error
    found = [
        _fields(f"{name} line {number}", line, endpoint)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise InputError(f'{name} holds no prompts; write {{"prompt": "text"}} on each line')
    return found


def _fields(where: str, line: bytes, endpoint: Endpoint) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: {error}; write one JSON object a line, in UTF-8") from error
    if "prompt_token_ids" in fields:
        fields["prompt"] = fields.pop("prompt_token_ids")
    prompt = fields.get("prompt")
    if endpoint == "chat" and isinstance(prompt, str):
        del fields["prompt"]
        fields["messages"] = [{"role": "user", "content": prompt}]
    wanted = "messages" if endpoint == "chat" else "prompt"
    if not isinstance(fields.get(wanted), str | list) or not fields[wanted]:
        also = "messages or a prompt's text" if endpoint == "chat" else "prompt or prompt_token_ids"
        raise InputError(f"{where}: the {endpoint} endpoint takes {also}")
    return fields

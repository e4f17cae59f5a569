"""The process that tries grammars out: ``-m`` this module.

A grammar can make llguidance take minutes or all memory, and one with some thousand rules that lead
to one another overflows the stack: the process is gone. So it is tried here, under tighter limits
than a worker has, before a worker sees it.
"""

from __future__ import annotations

import os
import random
import re
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from llguidance import LLMatcher, LLTokenizer

from spanwise.errors import ModelError
from spanwise.runner.grammar import load_tokenizer, start_matcher
from spanwise.types.sampling import Grammar
from spanwise.worker.channel import Channel, ChannelClosed
from spanwise.worker.lifeline import hang_on

_STACK_BYTES = 2 << 20  # a quarter of what a worker has
_MEMORY_BYTES = 1 << 30  # more than it takes before the first grammar
# Processor time. All streams of a replica wait while one of them begins its answer.
_MAX_START_S = 0.25
_NUM_STEPS = 32
_MAX_STEPS_S = 0.25  # for all of them
_NO_WAY_ON = "NoExtensionBias"  # the grammar goes on, with nothing that the model can write
_PLACE = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")


class TryGrammar(msgspec.Struct, frozen=True, array_like=True):
    """Try a grammar out; answered by a ``Verdict``."""

    grammar: Grammar


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """``problem``: why the grammar cannot be used, empty where it can.

    The first one comes unasked when the process is ready; its problem is with the tokenizer.
    """

    problem: str


def try_grammar(
    tokenizer: LLTokenizer, grammar: Grammar, clock: Callable[[], float] = time.thread_time
) -> str:
    """Begin an answer as a worker would, and say what went wrong; ``clock`` gives seconds."""
    started_s = clock()
    matcher = start_matcher(tokenizer, grammar)
    if matcher.is_error():
        return in_one_line(matcher.get_error(), with_place=grammar.kind == "lark")
    mask = matcher.compute_bitmask()
    lots = random.Random(0)
    if _draw(mask, tokenizer.eos_token, lots) is None and not matcher.is_accepting():
        return _why_stopped(matcher) or "no text that the model can write matches it"
    if clock() - started_s > _MAX_START_S:
        return f"it is too complex: beginning an answer takes over {_MAX_START_S:g} s"
    started_s = clock()
    for _ in range(_NUM_STEPS):
        token = _draw(mask, tokenizer.eos_token, lots)
        if token is None:
            return ""
        matcher.consume_token(token)
        if matcher.is_stopped():
            return _why_stopped(matcher)
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            return _why_stopped(matcher)
        if clock() - started_s > _MAX_STEPS_S:
            return (
                f"it is too complex: {_NUM_STEPS} tokens of an answer take over {_MAX_STEPS_S:g} s"
            )
    return ""


def _draw(mask: bytes, end: int, lots: random.Random) -> int | None:
    """A token that the mask allows, not the end; None where there is none."""
    bits = bytearray(mask)
    bits[end // 8] &= ~(1 << end % 8)
    if not any(bits):
        return None
    first = lots.randrange(len(bits))
    at = next(i % len(bits) for i in range(first, first + len(bits)) if bits[i % len(bits)])
    return 8 * at + lots.choice([bit for bit in range(8) if bits[at] >> bit & 1])


def _why_stopped(matcher: LLMatcher) -> str:
    """What limit was reached; empty where an answer has ended, or has no way on."""
    error = in_one_line(matcher.get_error())
    return "" if error in ("", _NO_WAY_ON) else f"it is too complex: {error}"


def in_one_line(error: str, with_place: bool = False) -> str:
    """What llguidance says, without the lines that show where."""
    lines = error.strip().splitlines()
    if not lines:
        return ""
    place, first = _PLACE.match(lines[0]), _PLACE.sub("", lines[0])
    causes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = " ".join((causes[-1] if causes else first).split())
    return f"line {place[1]}, column {place[2]}: {said}" if place and with_place else said


def _serve(folder: str, channel: Channel[TryGrammar]) -> None:
    try:
        tokenizer = load_tokenizer(folder)
    except ModelError as error:
        channel.send(Verdict(str(error)))
        return
    channel.send(Verdict(""))
    limit = _address_space() + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        while True:
            channel.send(Verdict(try_grammar(tokenizer, channel.receive().grammar)))
    except ChannelClosed:
        return


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def main(channel_fd: int, lifeline_fd: int, folder: str) -> None:
    """Serve until the channel ends."""
    hang_on(lifeline_fd)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not os.environ.get("SPANWISE_DEBUG"):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a panic would show what a user has sent
    channel: Channel[TryGrammar] = Channel(socket.socket(fileno=channel_fd), TryGrammar)
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve, args=(folder, channel))
    thread.start()
    thread.join()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

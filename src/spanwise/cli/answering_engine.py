"""Answers from an engine in this process."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, cast

from spanwise.cli.answerer import Message, Reply
from spanwise.cli.ctrl_c import ends_answer
from spanwise.cli.text_stream import TextStream
from spanwise.types.outputs import RequestOutput
from spanwise.types.sampling import SamplingParams

if TYPE_CHECKING:
    from spanwise.engine.llm import LLM


class AnsweringEngine:
    """Asks an ``LLM``; ``given`` are fields of its sampling parameters."""

    def __init__(self, llm: LLM, given: dict[str, Any]) -> None:
        self._llm, self._given = llm, given
        self._is_stopped = False

    def answer(self, messages: Sequence[Message], attempt: int) -> Reply:
        """Print and give the answer, as `Answerer.answer` says."""
        params = SamplingParams(**seeded({"max_tokens": None} | self._given, attempt))
        stream = TextStream(params.stop_strings)
        outputs = cast(
            Generator[RequestOutput], self._llm.stream({"messages": list(messages)}, params)
        )
        self._is_stopped = False
        text = ""
        with closing(outputs), ends_answer(self._stop):
            for output in outputs:
                choice = output.outputs[0]
                stream.show(choice)
                text = choice.text
                if choice.finish_reason is not None:
                    return Reply(text, choice.finish_reason)
                # Here, between two steps, an answer may end: leaving the loop aborts its request.
                # KeyboardInterrupt would come inside a step, and cost the whole engine.
                if self._is_stopped:
                    break
        return Reply(text, None)

    def close(self) -> None:
        """Shut the engine down."""
        self._llm.shutdown()

    def _stop(self) -> None:
        self._is_stopped = True


def seeded(given: dict[str, Any], attempt: int) -> dict[str, Any]:
    """The fields with the seed of this attempt, where there is one."""
    return given | {"seed": given["seed"] + attempt} if "seed" in given else given

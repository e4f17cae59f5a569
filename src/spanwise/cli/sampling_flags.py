"""Every field of ``SamplingParams`` as a flag of its own name, and two names more for grammars."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from cyclopts import Group, Parameter

from spanwise.cli.grammar_fields import FIELDS, one_grammar, read_file
from spanwise.cli.numbers import parse_whole_numbers
from spanwise.errors import InputError
from spanwise.types.sampling import Grammar


@Parameter(name="*", group=Group("Sampling", sort_key=20))
@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """None is "not given": the field's own default, or the model's, stands."""

    max_tokens: Annotated[int | None, Parameter(help="Most tokens to generate. Default: 16.")] = (
        None
    )
    temperature: Annotated[
        float | None, Parameter(help="0: always the likeliest token. Default: the model's, else 1.")
    ] = None
    top_p: Annotated[
        float | None, Parameter(help="Only the likeliest tokens that sum to this probability.")
    ] = None
    top_k: Annotated[int | None, Parameter(help="Only so many of the likeliest tokens.")] = None
    min_p: Annotated[
        float | None, Parameter(help="Only tokens this probable, relative to the likeliest.")
    ] = None
    seed: Annotated[
        int | None, Parameter(help="The same seed gives the same tokens, on any layout.")
    ] = None
    n: Annotated[int | None, Parameter(help="Answers to give for a prompt. Default: 1.")] = None
    stop: Annotated[
        tuple[str, ...],
        Parameter(
            negative="",
            show_default=False,
            allow_leading_hyphen=True,
            help="Text that ends an answer. May be repeated.",
        ),
    ] = ()
    stop_token_ids: Annotated[
        tuple[str, ...],
        Parameter(negative="", show_default=False, help="Tokens that end an answer: 5,7."),
    ] = ()
    min_tokens: Annotated[int | None, Parameter(help="Tokens before an answer may end.")] = None
    ignore_eos: Annotated[
        bool | None, Parameter(negative="", help="Go on after the model's end-of-text token.")
    ] = None
    presence_penalty: Annotated[
        float | None, Parameter(help="Lowers tokens that the answer holds (-2 to 2).")
    ] = None
    frequency_penalty: Annotated[
        float | None, Parameter(help="Lowers tokens by how often the answer holds them (-2 to 2).")
    ] = None
    repetition_penalty: Annotated[
        float | None, Parameter(help="Divides the score of tokens seen before; 1: off.")
    ] = None
    logit_bias: Annotated[
        str | None, Parameter(help='Added to tokens\' scores, as JSON: {"5": -100}.')
    ] = None
    logprobs: Annotated[
        int | None, Parameter(help="Also log probabilities of so many tokens (output file).")
    ] = None
    prompt_logprobs: Annotated[
        int | None, Parameter(help="The same for the prompt's tokens (output file).")
    ] = None
    skip_special_tokens: Annotated[
        bool | None, Parameter(help="Leave special tokens out of the text. Default: yes.")
    ] = None
    json_schema: Annotated[
        str | None, Parameter(help="Answers are JSON of this schema; @FILE reads it.")
    ] = None
    regex: Annotated[
        str | None,
        Parameter(
            allow_leading_hyphen=True, help="Answers match this regular expression, as a whole."
        ),
    ] = None
    grammar: Annotated[
        str | None, Parameter(help="Answers match this Lark grammar; @FILE reads it.")
    ] = None

    def given(self) -> dict[str, Any]:
        """Give the fields of ``SamplingParams`` that were set. Raises InputError."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = {name: value for name, value in fields.items() if value not in (None, ())}
        if self.stop:
            given["stop"] = list(self.stop)
        if self.stop_token_ids:
            given["stop_token_ids"] = parse_whole_numbers("--stop-token-ids", self.stop_token_ids)
        if self.logit_bias is not None:
            given["logit_bias"] = _logit_bias(self.logit_bias)
        if (grammar := self._grammar({name: given.pop(name, None) for name in FIELDS})) is not None:
            given["grammar"] = grammar
        return given

    def _grammar(self, texts: dict[str, str | None]) -> Grammar | None:
        for name in ("json_schema", "grammar"):
            if (text := texts[name]) is not None:
                texts[name] = read_file(f"--{name.replace('_', '-')}", text)
        return one_grammar(texts)


def _logit_bias(text: str) -> dict[int, float]:
    try:
        return msgspec.json.decode(text, type=dict[int, float])
    except (msgspec.MsgspecError, UnicodeEncodeError):
        raise InputError(
            f'--logit-bias must be JSON such as {{"5": -100, "7": 2.5}}, got {text!r:.80}'
        ) from None

"""Which tokens a sequence may draw next, where its answer has to match a grammar.

llguidance follows the grammars (https://github.com/guidance-ai/llguidance): a lexer of regular
expression derivatives below an Earley parser. Imports no torch: admission checks grammars with
the same tokenizer and the same limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from spanwise.errors import ModelError, reason
from spanwise.model.folder import read_config, read_generation_config
from spanwise.types.sampling import Grammar

# A state takes about half a kilobyte, and a sequence's lexer keeps those it has seen.
_MAX_LEXER_STATES = 50_000
_OWN_END = "<|the matcher's own end|>"
_NUM_TOKENIZERS = 2


def start_matcher(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """A matcher at the beginning of an answer; what is wrong with the grammar is its error.

    Never a copy of another one: copies share a lexer, and with it a neighbour's limits.
    """
    limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
    return LLMatcher(tokenizer, _source(grammar), log_level=0, limits=limits)


@lru_cache(maxsize=_NUM_TOKENIZERS)
def _load_tokenizer(folder: str) -> LLTokenizer:
    parts = _tokenizer_parts(Path(folder))
    added = parts["added_tokens"]
    ids = [token["id"] for token in added]
    vocab = parts["model"]["vocab"]
    ids += vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    own_end = max(ids) + 1
    # The matcher wants an end token. With one that no model can draw, the real ones are tokens
    # like any other to it, and whether they may be drawn is decided here.
    added.append({**_ADDED_TOKEN, "id": own_end, "content": _OWN_END})
    parts["truncation"] = parts["padding"] = None
    try:
        tokenizer = LLTokenizer(msgspec.json.encode(parts).decode(), eos_token=own_end)
    except ValueError as error:
        raise ModelError(
            f"the tokenizer in {folder} cannot be used with a grammar: {reason(error)}"
        ) from error
    return tokenizer


_ADDED_TOKEN = {
    "special": True,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
}
_loading = Lock()


def load_tokenizer(folder: str) -> LLTokenizer:
    """A model folder's tokenizer as the matchers read it; built once a process, on first use.

    That takes 0.6 s of processor time and 100 MB for 128,000 tokens. Raises ModelError where the
    folder has no tokenizer whose tokens are known as bytes.
    """
    with _loading:
        return _load_tokenizer(folder)


def end_token_ids(folder: str) -> tuple[int, ...]:
    """The tokens with which the model ends a text; empty where its configs name none."""
    for config in (read_generation_config(Path(folder)), read_config(Path(folder))):
        ids = config.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


class AnswerMatcher:
    """Follows one sequence's answer; what it allows is a function of the output tokens alone.

    It reads those that are new to it. So one that is made for a sequence whose answer has begun
    (after a preemption, in another epoch) allows what the one before it would have allowed.

    What the grammar leaves open is allowed, and ``stop_token_ids`` wherever the answer is complete;
    a stop token that is ordinary text also where it stands in the answer. Nothing but stop tokens
    is allowed once nothing can follow, once the sequence has ended, and once the grammar has grown
    too large to be followed, so that the sequence ends. Where a request has no stop tokens
    (``ignore_eos``), the model's own end tokens stand for them there, and only there.
    """

    def __init__(
        self,
        tokenizer: LLTokenizer,
        grammar: Grammar,
        stop_token_ids: Sequence[int],
        end_token_ids: Sequence[int],
    ) -> None:
        self._matcher = start_matcher(tokenizer, grammar)
        self._own_end = tokenizer.eos_token
        self._stops = stop_token_ids
        self._last_resort = stop_token_ids or end_token_ids
        self._num_read = 0
        self._is_over = False

    def allowed(self, output_ids: Sequence[int], vocab_size: int) -> bytes:
        """The tokens that may follow: bit ``i % 8`` of byte ``i // 8`` for token ``i``.

        ``output_ids`` are all tokens of the answer so far. A token that the tokenizer does not know
        is never allowed, unless it is a stop token. Empty only where there is no token to end with.
        """
        self._read(output_ids)
        bits = self._text_bits(vocab_size)
        if not self._is_over and self._matcher.is_accepting():
            _add(bits, self._stops, vocab_size)
        if not any(bits):
            _add(bits, self._last_resort, vocab_size)
        return bytes(bits)

    def _read(self, output_ids: Sequence[int]) -> None:
        for token_id in output_ids[self._num_read :]:
            # One that does not fit is a stop token: the answer has ended there. Steps that were
            # sent ahead may still draw.
            self._is_over = self._is_over or not self._matcher.consume_token(token_id)
        self._num_read = len(output_ids)

    def _text_bits(self, vocab_size: int) -> bytearray:
        """What may follow by the grammar, without regard to how the answer ends."""
        num_bytes = -(-vocab_size // 8)
        if self._is_over or self._matcher.is_stopped():
            return bytearray(num_bytes)
        found = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            return bytearray(num_bytes)
        bits = bytearray(found[:num_bytes])
        bits.extend(bytes(num_bytes - len(bits)))
        if self._own_end < 8 * num_bytes:
            bits[self._own_end // 8] &= ~(1 << self._own_end % 8)
        if vocab_size % 8:
            bits[-1] &= (1 << vocab_size % 8) - 1
        return bits


def _add(bits: bytearray, token_ids: Sequence[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if token_id < vocab_size:
            bits[token_id // 8] |= 1 << token_id % 8


# White space ends somewhere: models that are not sure go on writing it. Enough to indent by.
_JSON_STYLE = r'{"whitespace_pattern": "[ \\n\\r\\t]{1,24}"}'


def _source(grammar: Grammar) -> str:
    """The grammar as llguidance takes it."""
    match grammar.kind:
        case "json_schema":
            return _json_source(grammar.text)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            # As it is, a text that begins with a brace would be taken for something else.
            return msgspec.json.encode({"grammars": [{"lark_grammar": grammar.text}]}).decode()


def _json_source(schema: str) -> str:
    """The schema's grammar, with a style where it has none of its own."""
    inner = schema.strip()
    if inner == "true":
        inner = "{}"  # says the same
    # As text: a schema may be nested deeper than a parser cares for, which llguidance then says.
    if inner.startswith("{") and '"x-guidance"' not in inner:
        rest = inner[1:].lstrip()
        inner = f'{{"x-guidance":{_JSON_STYLE}{"" if rest.startswith("}") else ","}{rest}'
    return LLMatcher.grammar_from_json_schema(inner)


def _tokenizer_parts(folder: Path) -> dict[str, Any]:
    """What a tokenizer.json holds, also for a folder that has the tokenizer in another form."""
    path = folder / "tokenizer.json"
    try:
        text = path.read_bytes() if path.is_file() else _converted(folder).encode()
        parts: dict[str, Any] = msgspec.json.decode(text, type=dict[str, Any])
        if not isinstance(parts["added_tokens"], list) or not parts["model"]["vocab"]:
            raise KeyError("vocab")
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ModelError(
            f"the tokenizer in {folder} cannot be used with a grammar: {reason(error)}"
        ) from error
    return parts


def _converted(folder: Path) -> str:
    from transformers import AutoTokenizer  # takes seconds, and few folders need it

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        converted: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # transformers and tokenizers raise plain ones of any kind
        raise ModelError(
            f"the folder {folder} has no tokenizer.json, which a grammar needs: {reason(error)}"
        ) from error
    return converted

"""What each token of a vocabulary adds to the bytes of a text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenBytes = Callable[[int], bytes]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def token_bytes_of(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """The function that gives a token's bytes, b"" for an id that is no token.

    Tokens written in the byte alphabet (byte-level BPE) and the sentencepiece forms are read as
    they are spelled; of other vocabularies, a token is what it decodes to on its own.
    """
    added = {number: text.encode() for text, number in tokenizer.get_added_vocab().items()}
    spelling = _spelling(tokenizer)
    known: dict[int, bytes] = dict(added)

    def read(token_id: int) -> bytes:
        if token_id not in known:
            known[token_id] = _read(tokenizer, token_id, spelling)
        return known[token_id]

    return read


def _read(
    tokenizer: PreTrainedTokenizerBase, token_id: int, spelling: Callable[[str], bytes] | None
) -> bytes:
    if not 0 <= token_id < len(tokenizer):
        return b""
    if spelling is None:
        text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text.encode()
    token = tokenizer.convert_ids_to_tokens(token_id)
    return spelling(token) if isinstance(token, str) else b""


def _spelling(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes] | None:
    """How the vocabulary spells bytes, as the decoder that turns it into text says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return None
    kinds = _kinds(msgspec.json.decode(backend.decoder.__getstate__()))
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds & {"ByteFallback", "Metaspace"}:
        return _sentencepiece
    return None


def _kinds(decoder: dict[str, Any]) -> set[str]:
    inner = decoder.get("decoders", ())
    return {str(decoder.get("type"))}.union(*(_kinds(each) for each in inner))


def _byte_level(token: str) -> bytes:
    try:
        return bytes(map(_ALPHABET.__getitem__, token))
    except KeyError:  # not in the alphabet: added in plain letters
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if byte := _BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(_SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()

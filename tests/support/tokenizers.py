"""Tokenizers for the tiny models: their vocabulary is as wide, and partly without tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

BOS, EOS, PAD = range(3)
NUM_TOKENS = 111
"""Ids from here on have no token, as in a vocabulary that was padded."""

_SPECIAL = ["<bos>", "<eos>", "<pad>"]
_PRINTABLE = [chr(code) for code in range(33, 127)]
_MERGES = ["a b", "ab c", "c d", "e f", "f f", "1 2", '{ "', '" :', '" }', ": 1", "l l", "o n"]


def byte_level() -> Tokenizer:
    """As GPT-2's: bytes stand for themselves, a space is another letter."""
    vocab = _numbered([*_PRINTABLE, "Ġ", "Ċ"])
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_pairs()))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer)


def sentencepiece() -> Tokenizer:
    """As Llama 2's: a space is a low line, and unknown characters fall back to bytes."""
    vocab = _numbered([*_PRINTABLE, "▁", "<0x0A>"])
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_pairs(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _finished(tokenizer)


def unigram() -> Tokenizer:
    """As Gemma's first: pieces with scores, and no space put in front."""
    vocab = _numbered([*_PRINTABLE, "▁", "<0x0A>"])
    scored = [(piece, -float(10 - len(piece))) for piece in vocab]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=PAD, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _finished(tokenizer)


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Give a model folder a tokenizer, set to cut texts to a few tokens as some are."""
    tokenizer.enable_truncation(3, direction="left")
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()


def _numbered(pieces: list[str]) -> dict[str, int]:
    merged = [merge.replace(" ", "") for merge in _MERGES]
    return {piece: index for index, piece in enumerate([*_SPECIAL, *pieces, *merged])}


def _pairs() -> list[Any]:
    return [tuple(merge.split(" ")) for merge in _MERGES]


def _finished(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    return tokenizer

"""What a forward task's outputs say: a label, a transcript, or just the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from spanwise.errors import InputError, ModelError

Outputs = Mapping[str, NDArray[Any]]
_DIGITS = 6


def numbers_of(outputs: Outputs) -> dict[str, Any]:
    """All outputs, as nested lists. Raises InputError for what JSON cannot say."""
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"the model's output '{name}' is not finite for it")
    return {"outputs": {name: array.tolist() for name, array in outputs.items()}}


class Labels:
    """The likeliest class, and its probability."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels

    def __call__(self, outputs: Outputs) -> dict[str, Any]:
        """Label and score; all numbers where the outputs are no classes' logits."""
        logits = outputs.get("logits")
        if logits is None or logits.shape != (len(self._labels),):
            return numbers_of(outputs)
        if not np.isfinite(logits).all():
            raise InputError("the model's logits are not finite for it")
        best = int(logits.argmax())
        score = 1 / float(np.exp(logits.astype(np.float64) - float(logits[best])).sum())
        return {"label": self._labels[best], "score": round(score, _DIGITS)}


class Transcript:
    """The likeliest token of each frame, repeats as one, without blanks (CTC)."""

    def __init__(self, tokens: Sequence[str], blank: int, delimiter: str) -> None:
        self._tokens, self._blank, self._delimiter = tokens, blank, delimiter

    def __call__(self, outputs: Outputs) -> dict[str, Any]:
        """The words that were heard."""
        logits = outputs["logits"]
        if not np.isfinite(logits).all():
            raise InputError("the model's logits are not finite for it")
        best = logits.argmax(-1).tolist()
        changed = (b for a, b in zip([None, *best], best, strict=False) if a != b)
        text = "".join(self._tokens[token] for token in changed if token != self._blank)
        return {"transcript": " ".join(text.replace(self._delimiter, " ").split())}


class _SpeechConfig(msgspec.Struct):
    pad_token_id: int = 0


class _TokenizerConfig(msgspec.Struct):
    word_delimiter_token: str = "|"


def read_transcript(folder: Path) -> Transcript:
    """The alphabet of a CTC model's folder. Raises ModelError."""
    try:
        ids = msgspec.json.decode((folder / "vocab.json").read_bytes(), type=dict[str, int])
        blank = msgspec.json.decode((folder / "config.json").read_bytes(), type=_SpeechConfig)
        path = folder / "tokenizer_config.json"
        written = path.read_bytes() if path.is_file() else b"{}"
        config = msgspec.json.decode(written, type=_TokenizerConfig)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"the vocabulary in {folder} cannot be read: {error}") from error
    tokens = {token_id: token for token, token_id in ids.items()}
    alphabet = [tokens.get(token_id, "") for token_id in range(max(tokens, default=-1) + 1)]
    return Transcript(alphabet, blank.pad_token_id, config.word_delimiter_token)

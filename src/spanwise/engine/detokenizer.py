"""Text of one growing choice: never half a character, and stop strings across token borders."""

from __future__ import annotations

from collections.abc import Sequence

from spanwise.engine.tokenizer import Tokenizer

# What an incomplete UTF-8 sequence decodes to.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character misses at most its last 3 bytes; a longer run of replacements is no beginning of one.
_LONGEST_PENDING = 3
# Tokens decoded before the new ones, so that a word's leading space is seen.
_CONTEXT = 6


class Detokenizer:
    """Turns tokens into text as they come.

    ``text`` is everything that is certain; characters still incomplete are held back until they
    are complete or the choice ends. With stop strings, ``stopped_by`` names the one that was met,
    and ``text`` ends before it.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool, stop: Sequence[str], min_tokens: int
    ) -> None:
        self._tokenizer, self._skip, self._stop = tokenizer, skip_special_tokens, tuple(stop)
        self._min_tokens = min_tokens
        self._token_ids: list[int] = []
        self._shown = 0  # tokens whose text is in self.text
        self.text = ""
        self.stopped_by: str | None = None
        self._has_ended = False

    def add(self, token_ids: Sequence[int]) -> str | None:
        """Take tokens one by one; return the stop string met, after which no more is taken."""
        for token_id in token_ids:
            if self.stopped_by is None:
                self._token_ids.append(token_id)
                self._grow(final=False)
        return self.stopped_by

    def finish(self) -> None:
        """The choice has ended: show what was held back."""
        self._has_ended = True
        if self.stopped_by is None:
            self._grow(final=True)

    @property
    def num_settled(self) -> int:
        """Characters of ``text`` that will stay, whatever comes: none that may begin a stop."""
        if self._has_ended or self.stopped_by is not None:
            return len(self.text)
        return len(self.text) - max((_begun(stop, self.text) for stop in self._stop), default=0)

    @property
    def num_tokens(self) -> int:
        """Tokens taken so far, those of a stop string included."""
        return len(self._token_ids)

    def _grow(self, *, final: bool) -> None:
        begin = max(0, self._shown - _CONTEXT)
        before = self._decode(self._token_ids[begin : self._shown])
        after = self._decode(self._token_ids[begin:])
        if not after.startswith(before):
            # The tokenizer reads the new tokens together with the old: decode from the start.
            before, after = self.text, self._decode(self._token_ids)
        checked, new = len(self.text), after[len(before) :]
        whole = new.rstrip(_REPLACEMENT)
        if 0 < len(new) - len(whole) <= _LONGEST_PENDING and not final:
            # A stop string may stand before the half character already.
            self._find_stop(self.text + whole, checked)
            return
        self.text += new
        self._shown = len(self._token_ids)
        self._find_stop(self.text, checked)

    def _find_stop(self, text: str, checked: int) -> None:
        if len(self._token_ids) < self._min_tokens:
            return
        found = []
        for stop in self._stop:
            at = text.find(stop, max(0, checked - len(stop) + 1))
            if at >= 0:
                found.append((at, stop))
        if found:
            at, self.stopped_by = min(found)
            self.text = text[:at]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip) if token_ids else ""


def _begun(stop: str, text: str) -> int:
    """How many characters of a stop string the text ends with, at most all but one."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)

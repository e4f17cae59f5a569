"""How large a chunk of a prompt should be on a pipeline, learnt from when results come."""

from __future__ import annotations

from math import log2

_KEPT = 0.95  # of what is known, with each step: about the last twenty of a kind count
_ENOUGH = 3.0  # steps of a kind, before they tell anything
_STEPS_IN_CHUNK = 10  # a chunk takes so many times what a step takes by itself
_MIN_TOKENS = 16
_LEAST_ROUND = 16
_SLACK = 0.75  # in powers of two: times that vary a little change nothing
_PARTS, _PARTS_UNMEASURED = 8, 2  # chunks a stage of all there is, where those are not too small


def rounded_down(num_tokens: int) -> int:
    """By less than an eighth, to a multiple of 16 or of more; less than 16 stay as they are."""
    size = max(_LEAST_ROUND, 1 << num_tokens.bit_length() >> 4)
    return num_tokens // size * size if num_tokens >= size else num_tokens


class StepTimes:
    """What a step takes by itself (weights are read, kernels launched), and for each token.

    The first is paid again for each chunk, so chunks should not be small; but other stages wait for
    a prompt's first chunk, and while the last is computed the first ones have nothing of it, so
    they should not be large. The least is ``unmeasured`` at first, then a power of two of tokens,
    which take about ten times what a step takes by itself. It is a function of the times given; no
    token depends on it.
    """

    def __init__(self, num_stages: int, unmeasured: int, max_tokens: int) -> None:
        self._num_stages, self._max_tokens = num_stages, max_tokens
        self._least, self._parts = unmeasured, _PARTS_UNMEASURED
        self._decodes = _Mean()
        self._prefills = _Mean()

    def chunk(self, num_tokens: int) -> int:
        """How many tokens of prompts a step should take where so many are to be computed."""
        return max(self._least, -(-num_tokens // (self._parts * self._num_stages)))

    def add(self, num_rows: int, num_tokens: int, taken_s: float) -> None:
        """A step took so long, on the stage that takes the longest."""
        kind = self._decodes if num_tokens == num_rows else self._prefills
        kind.add(num_tokens, taken_s)
        if min(self._decodes.weight, self._prefills.weight) >= _ENOUGH:
            self._choose()

    def _choose(self) -> None:
        wanted = min(max(_STEPS_IN_CHUNK * self._own_tokens(), _MIN_TOKENS), self._max_tokens)
        if abs(log2(wanted / self._least)) > _SLACK:
            self._least = min(2 ** round(log2(wanted)), self._max_tokens)
        self._parts = _PARTS

    def _own_tokens(self) -> float:
        """How many tokens of a prompt take as long as a step does by itself.

        A decoding row takes about as long as a token of a prompt, or less.
        """
        decode_s, prefill_s = self._decodes.taken_s, self._prefills.taken_s
        rows_s = self._decodes.tokens * prefill_s / self._prefills.tokens
        own_s = max(decode_s - rows_s, decode_s / 2)
        if prefill_s <= own_s:
            return self._max_tokens
        return own_s * self._prefills.tokens / (prefill_s - own_s)


class _Mean:
    """The mean step of one kind, later ones weighing more."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.tokens = 0.0
        self.taken_s = 0.0

    def add(self, num_tokens: int, taken_s: float) -> None:
        self.weight = self.weight * _KEPT + 1
        self.tokens += (num_tokens - self.tokens) / self.weight
        self.taken_s += (taken_s - self.taken_s) / self.weight

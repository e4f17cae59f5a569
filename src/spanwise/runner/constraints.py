"""What the grammars of a rank's sequences allow."""

from __future__ import annotations

from spanwise.runner.grammar import AnswerMatcher, end_token_ids, load_tokenizer
from spanwise.runner.sequences import KnownSequence


class Constraints:
    """Every rank that draws has its own and comes to the same; the first grammar costs the most.

    A grammar comes here checked: it can be followed with this folder's tokenizer.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._end_token_ids: tuple[int, ...] | None = None

    def allowed(self, sequence: KnownSequence, vocab_size: int) -> bytes | None:
        """Which tokens the sequence may draw next; None for all.

        Bit ``i % 8`` of byte ``i // 8`` stands for token ``i``.
        """
        intro = sequence.intro
        if intro.sampling.grammar is None:
            return None
        if sequence.matcher is None:
            sequence.matcher = self._matcher(sequence)
        return sequence.matcher.allowed(sequence.token_ids[intro.num_prompt :], vocab_size)

    def _matcher(self, sequence: KnownSequence) -> AnswerMatcher:
        spec = sequence.intro.sampling
        assert spec.grammar is not None
        if self._end_token_ids is None:
            self._end_token_ids = end_token_ids(self._folder)
        return AnswerMatcher(
            load_tokenizer(self._folder), spec.grammar, spec.stop_token_ids, self._end_token_ids
        )

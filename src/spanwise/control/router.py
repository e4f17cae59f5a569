"""Which replica takes a sequence."""

from __future__ import annotations


class Router:
    """Gives each sequence to the replica with the fewest outstanding tokens, ties to the first.

    A sequence counts with the tokens it may still need: its prompt and what it may generate.
    """

    def __init__(self, num_replicas: int) -> None:
        self._outstanding = [0] * num_replicas
        self._placed: dict[int, tuple[int, int]] = {}

    def assign(self, sequence_id: int, num_tokens: int) -> int:
        """Choose a replica for a new sequence."""
        replica = min(range(len(self._outstanding)), key=lambda r: self._outstanding[r])
        self._outstanding[replica] += num_tokens
        self._placed[sequence_id] = (replica, num_tokens)
        return replica

    def replica_of(self, sequence_id: int) -> int:
        """The replica a sequence was given to."""
        return self._placed[sequence_id][0]

    def release(self, sequence_id: int) -> None:
        """A sequence has ended."""
        replica, num_tokens = self._placed.pop(sequence_id)
        self._outstanding[replica] -= num_tokens

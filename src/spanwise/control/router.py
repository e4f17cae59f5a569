"""Which replica takes a sequence, and which waiting sequences change theirs."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

import msgspec

from spanwise.control.prefixes import PrefixMemory

# A match spares the sequence the wait for these tokens, and the replicas together the work.
_MATCH_WEIGHT = 2
_MOST_GROUPS = 1 << 14


class ReplicaQueue(msgspec.Struct, frozen=True):
    """What one replica has waiting.

    ``waiting``: sequences of which no step has begun, in the order they would be withdrawn.
    ``num_places``: how many sequences more could begin with the next step.
    """

    waiting: tuple[int, ...] = ()
    num_places: int = 0


class Move(msgspec.Struct, frozen=True, array_like=True):
    """A waiting sequence that is to change its replica."""

    sequence_id: int
    source: int
    target: int


class _Placed(msgspec.Struct, frozen=True):
    """Where a sequence is; ``match`` prompt tokens were remembered there when it came.

    ``left`` are the replicas it was moved away from.
    """

    replica: int
    num_tokens: int
    prefix: tuple[bytes, ...]
    match: int
    left: frozenset[int]

    @property
    def cost(self) -> int:
        """The tokens its replica is expected to compute for it."""
        return self.num_tokens - self.match


class Router:
    """Gives each sequence to the available replica with the least outstanding - 2 * match tokens.

    Ties go to the longer match, then to the first replica. ``outstanding`` counts for each
    sequence the tokens it may still need (its prompt and what it may generate) less those that
    matched; ``match`` are the leading prompt tokens the replica has lately been given. So the
    replica with the longest match takes the sequence unless it has more outstanding than the least
    loaded one by over twice the tokens the match saves: once for the sequence, which need not wait
    for them, and once for all, who are spared the work. Choices of one request share their prompt,
    and stay together by the same rule.

    ``block_size`` is the tokens of one prefix block; of each replica ``max_prefix_blocks`` are
    remembered, best as many as its cache holds.
    """

    def __init__(
        self, num_replicas: int, block_size: int = 16, max_prefix_blocks: int = 1 << 15
    ) -> None:
        self._block_size = block_size
        self._outstanding = [0] * num_replicas
        self._available = [True] * num_replicas
        self._prefixes = [PrefixMemory(max_prefix_blocks) for _ in range(num_replicas)]
        self._placed: dict[int, _Placed] = {}
        self._groups: OrderedDict[str, int] = OrderedDict()  # the last sequence of each

    @property
    def outstanding(self) -> tuple[int, ...]:
        """Per replica, the tokens its sequences may still need."""
        return tuple(self._outstanding)

    def assign(
        self,
        sequence_id: int,
        num_tokens: int,
        prefix: Sequence[bytes] = (),
        group: str = "",
    ) -> int:
        """Choose a replica for a new sequence; one of a ``group`` goes where its last one still is.

        ``prefix`` are the keys of the prompt's full blocks, each key standing for its block and
        all before it. Where no replica is available the sequence goes to one that is not, to wait.
        """
        assert sequence_id not in self._placed, "a sequence was assigned twice"
        assert len(prefix) * self._block_size <= num_tokens, "a prefix outgrows its sequence"
        replicas = range(len(self._outstanding))
        candidates = [r for r in replicas if self._available[r]] or replicas
        chosen = self._best(candidates, prefix)
        if group:
            chosen = self._with_group(group, candidates, chosen)
            self._groups.pop(group, None)
            self._groups[group] = sequence_id
            if len(self._groups) > _MOST_GROUPS:
                self._groups.popitem(last=False)
        self._put(sequence_id, chosen, num_tokens, tuple(prefix), frozenset())
        return chosen

    def replica_of(self, sequence_id: int) -> int:
        """The replica a sequence was given to."""
        return self._placed[sequence_id].replica

    def release(self, sequence_id: int) -> None:
        """A sequence has ended."""
        placed = self._placed.pop(sequence_id)
        self._outstanding[placed.replica] -= placed.cost

    def set_available(self, replica: int, is_available: bool) -> None:
        """Take a replica out, or put it back. Its sequences stay its own until they are moved.

        One taken out is expected to come back with an empty cache.
        """
        self._available[replica] = is_available
        if not is_available:
            self._prefixes[replica].forget()

    def moves(self, queues: Sequence[ReplicaQueue]) -> list[Move]:
        """Decide which waiting sequences move to idle replicas; carry each out, then ``move`` it.

        ``queues`` has one entry for each replica. Idle is an available replica that could start
        sequences and has none waiting; it gets at most as many, of each replica no more than leave
        as many there and for every other idle one; ask again for more. Replicas that are
        out give first, then those with the most outstanding, and keep what they could start
        themselves. A sequence stays where what is before it is less than twice the match it would
        lose, and never goes back to a replica it was moved away from, unless its own is out.
        """
        idle = [r for r, q in enumerate(queues) if self._is_idle(r, q) for _ in range(q.num_places)]
        donors = [r for r, queue in enumerate(queues) if queue.waiting]
        donors.sort(key=lambda r: (self._available[r], -self._outstanding[r]))
        moves = []
        for source in donors:
            load, spare = self._outstanding[source], self._spare(source, queues[source])
            share, taken = -(-len(spare) // (len(set(idle)) + 1)), Counter[int]()
            for sequence_id in spare:
                placed = self._placed[sequence_id]
                assert placed.replica == source, f"sequence {sequence_id} waits somewhere else"
                near = [r for r in sorted(set(idle)) if taken[r] < share]
                targets = [r for r in near if self._gains(placed, load, r)]
                if targets:
                    target = self._best(targets, placed.prefix)
                    moves.append(Move(sequence_id, source, target))
                    idle.remove(target)
                    taken[target] += 1
                    load -= placed.cost
        return moves

    def move(self, sequence_id: int, target: int) -> None:
        """A sequence that had not begun waits at another replica now."""
        placed = self._placed[sequence_id]
        assert target != placed.replica, f"sequence {sequence_id} is there already"
        self.release(sequence_id)
        left = placed.left | {placed.replica}
        self._put(sequence_id, target, placed.num_tokens, placed.prefix, left)

    def _with_group(self, group: str, candidates: Sequence[int], otherwise: int) -> int:
        """Where the group's last sequence still is, if it is one of the candidates."""
        last = self._placed.get(self._groups.get(group, -1))
        return last.replica if last is not None and last.replica in candidates else otherwise

    def _put(
        self,
        sequence_id: int,
        replica: int,
        num_tokens: int,
        prefix: tuple[bytes, ...],
        left: frozenset[int],
    ) -> None:
        placed = _Placed(replica, num_tokens, prefix, self._match(replica, prefix), left)
        self._placed[sequence_id] = placed
        self._outstanding[replica] += placed.cost
        self._prefixes[replica].remember(prefix)

    def _match(self, replica: int, prefix: Sequence[bytes]) -> int:
        return self._block_size * self._prefixes[replica].match(prefix)

    def _best(self, replicas: Sequence[int], prefix: Sequence[bytes]) -> int:
        def rank(replica: int) -> tuple[int, int]:
            match = self._match(replica, prefix)
            return self._outstanding[replica] - _MATCH_WEIGHT * match, -match

        return min(replicas, key=rank)

    def _is_idle(self, replica: int, queue: ReplicaQueue) -> bool:
        return self._available[replica] and queue.num_places > 0 and not queue.waiting

    def _spare(self, replica: int, queue: ReplicaQueue) -> tuple[int, ...]:
        own = queue.num_places if self._available[replica] else 0
        return queue.waiting[: max(len(queue.waiting) - own, 0)]

    def _gains(self, placed: _Placed, load: int, target: int) -> bool:
        """Whether a sequence at a replica with ``load`` tokens outstanding is better off there."""
        if not self._available[placed.replica]:
            return True
        lost = placed.match - self._match(target, placed.prefix)
        return target not in placed.left and load - placed.cost >= _MATCH_WEIGHT * lost

"""Proportional memory of a process tree over time, the mapped checkpoint not counted."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

_PSS = re.compile(rb"^Pss: +(\d+) kB", re.MULTILINE)
# Of a mapping of a checkpoint: the rest of its first line, and then the first Pss.
_CHECKPOINT_PSS = re.compile(rb"\.safetensors\n(?:(?!Pss:)[^\n]*\n)*Pss: +(\d+) kB")


@dataclass
class TreeMemory:
    """Samples of every process below ``root`` (itself included), by what it is.

    A *rank* is a child of the fork server that loads weights (a zygote) together with its own
    children (the workers); ranks count in the order they were started. Without a fork server the
    root is the only rank.
    """

    root: int
    peak_total_bytes: int = 0
    num_samples: int = 0
    _parents: dict[int, int] = field(default_factory=dict)
    _peak_of: Counter[int] = field(default_factory=Counter)

    def sample(self) -> None:
        """Look at every process once."""
        by_group: Counter[int] = Counter()
        for pid in self._tree():
            by_group[self._group(pid)] += pss_bytes(pid)
        for group, num_bytes in by_group.items():
            self._peak_of[group] = max(self._peak_of[group], num_bytes)
        self.peak_total_bytes = max(self.peak_total_bytes, by_group.total())
        self.num_samples += 1

    def peak_rank_bytes(self, num_ranks: int) -> list[int]:
        """The peak of each rank; a child of the fork server that is none holds less than they."""
        groups = [group for group in self._peak_of if self._depth(group) == 2] or [self.root]
        largest = sorted(groups, key=lambda group: -self._peak_of[group])[:num_ranks]
        return [self._peak_of[group] for group in sorted(largest)]

    def _tree(self) -> list[int]:
        found, waiting = [], [self.root]
        while waiting:
            pid = waiting.pop()
            children = _children(pid)
            for child in children:
                self._parents.setdefault(child, pid)
            found.append(pid)
            waiting += children
        return found

    def _depth(self, pid: int) -> int:
        depth = 0
        while pid != self.root:
            pid, depth = self._parents[pid], depth + 1
        return depth

    def _group(self, pid: int) -> int:
        """The process itself, or for a worker its zygote."""
        while self._depth(pid) > 2:
            pid = self._parents[pid]
        return pid


def pss_bytes(pid: int) -> int:
    """Proportional memory of a process; 0 where it is gone. Mapped checkpoints do not count."""
    try:
        mapped = b".safetensors" in Path(f"/proc/{pid}/maps").read_bytes()
        # First what is taken off: what is read meanwhile is then counted, not hidden.
        smaps = Path(f"/proc/{pid}/smaps").read_bytes() if mapped else b""
        rollup = _PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    checkpoint_kb = sum(int(found[1]) for found in _CHECKPOINT_PSS.finditer(smaps))
    return max(0, int(rollup[1]) - checkpoint_kb) << 10 if rollup else 0


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found

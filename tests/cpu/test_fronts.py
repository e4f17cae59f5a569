"""The engine's fronts, when one of them is gone."""

from __future__ import annotations

import selectors
import socket

import pytest

from spanwise.engine.fronts import FrontPort, Fronts
from spanwise.engine.messages import Abort, FromFront, Phase
from spanwise.worker.channel import encode


class Met:
    """Fronts with one that has come, which is told much for everything it says."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.heard: list[FromFront] = []
        self.parted: list[FrontPort] = []
        self.fronts = Fronts(self.selector, self._hear, self.parted.append)
        self.ours, theirs = socket.socketpair()
        self.fronts.add(theirs)

    def _hear(self, front: FrontPort, message: FromFront) -> None:
        self.heard.append(message)
        while not self.parted:
            self.fronts.send(front, Phase("x" * 10_000))


@pytest.mark.parametrize("knows_by", ["what it is told", "what it says"])
def test_a_front_that_goes_while_it_is_served_is_let_go(knows_by: str) -> None:
    """What was still to be heard of it is nothing then."""
    met = Met()
    with met.selector, met.ours:
        for number in range(3):
            met.ours.sendall(encode(Abort(number)))
        ((key, _),) = met.selector.select(0)
        met.ours.close()
        if knows_by == "what it is told":
            met.fronts.tell(Phase("loading"))
        key.data()
        assert len(met.parted) == 1 and not met.selector.get_map()
        assert len(met.heard) <= 1
        key.data()
        met.fronts.tell(Phase("loading"))
        assert len(met.parted) == 1

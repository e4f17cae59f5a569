"""The engine process's side of its fronts: who is there, what they say, what they are told."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable
from functools import partial

from spanwise.engine.messages import FromFront, Phase, ToFront
from spanwise.worker.channel import Channel, ChannelClosed, encode


class FrontPort:
    """One front's channel; what it cannot take yet waits here, and holds nobody up."""

    def __init__(self, sock: socket.socket) -> None:
        self.channel: Channel[FromFront] = Channel(sock, FromFront)
        self.events = selectors.EVENT_READ


class Fronts:
    """All fronts. ``hear(front, message)`` is called for what they say, ``part(front)`` at an end.

    What is said to all is said to those that come later too, in order, phases only the last.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        hear: Callable[[FrontPort, FromFront], None],
        part: Callable[[FrontPort], None],
    ) -> None:
        self._selector, self._hear, self._part = selector, hear, part
        self._ports: list[FrontPort] = []
        self._greeting: list[ToFront] = []

    def add(self, sock: socket.socket) -> None:
        """A front has come."""
        port = FrontPort(sock)
        self._ports.append(port)
        self._selector.register(port.channel, port.events, partial(self._serve, port))
        for message in self._greeting:
            self.send(port, message)

    def send(self, port: FrontPort, message: ToFront) -> None:
        """Tell one front; nothing happens where it has gone."""
        if port not in self._ports:
            return
        try:
            self._watch_writing(port, not port.channel.post(encode(message)))
        except ChannelClosed:
            self._remove(port)

    def tell(self, message: ToFront) -> None:
        """Tell all fronts, and those that come later."""
        if self._greeting and isinstance(self._greeting[-1], Phase):
            self._greeting.pop()
        self._greeting.append(message)
        for port in list(self._ports):
            self.send(port, message)

    def tell_end(self, message: ToFront) -> None:
        """Tell all fronts, and those that come later nothing else."""
        self._greeting.clear()
        self.tell(message)

    def _serve(self, port: FrontPort) -> None:
        """Read what a front says, and write what it could not take before.

        It may be found gone by what it is told: before its turn in the loop, and while it is heard.
        """
        if port not in self._ports:
            return
        try:
            self._watch_writing(port, not port.channel.flush())
            for message, _ in port.channel.arrived():
                self._hear(port, message)
                if port not in self._ports:
                    return
        except ChannelClosed:
            self._remove(port)

    def _remove(self, port: FrontPort) -> None:
        if port not in self._ports:
            return
        self._ports.remove(port)
        self._selector.unregister(port.channel)
        self._part(port)
        port.channel.close()

    def _watch_writing(self, port: FrontPort, wanted: bool) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
        if port in self._ports and port.events != events:
            port.events = events
            self._selector.modify(port.channel, events, partial(self._serve, port))

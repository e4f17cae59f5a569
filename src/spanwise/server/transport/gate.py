"""Who may have a connection open."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable

from spanwise.server.transport.limits import TransportLimits

# One customer's network: whoever has an IPv6 address has all of these.
_IPV6_PREFIX = 64


class Place:
    """A connection's place among those open, from accept to its end.

    ``evict`` closes the connection; it is called only while it has no request.
    """

    def __init__(self, gate: Gate, client: str, evict: Callable[[], None]) -> None:
        self._gate = gate
        self.client = client
        self.evict = evict

    def wait(self, now_s: float) -> None:
        """It has no request from now on, so that it may be evicted."""
        self._gate.wait(self, now_s)

    def work(self) -> None:
        """It has a request."""
        self._gate.work(self)

    def leave(self) -> None:
        """It is closed; saying so again changes nothing."""
        self._gate.leave(self)


class _Group:
    """Places that share a limit; those that wait stand in the order in which they began to."""

    def __init__(self, max_places: int, evict_after_s: float) -> None:
        self._max_places = max_places
        self._evict_after_s = evict_after_s
        self.places: set[Place] = set()
        self.waiting: dict[Place, float] = {}

    def is_full(self) -> bool:
        return len(self.places) >= self._max_places

    def idler(self, now_s: float) -> Place | None:
        """Who has waited longest, if long enough."""
        place, since_s = next(iter(self.waiting.items()), (None, now_s))
        return place if now_s - since_s >= self._evict_after_s else None


class Gate:
    """Bounds open connections, in all and per client address.

    Once ``is_closed`` nobody is to come in any more.
    """

    def __init__(self, limits: TransportLimits) -> None:
        self.is_closed = False
        self._limits = limits
        self._all = _Group(limits.num_connections(), limits.evict_after_s)
        self._clients: dict[str, _Group] = {}
        self._unfinished_bodies_bytes = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def enter(self, host: str, evict: Callable[[], None], now_s: float) -> Place | None:
        """A place for a connection from ``host`` ("" for one of no address), or None.

        Where there is none, whoever has waited longest for nothing is evicted.
        """
        client = client_of(host)
        for group in (self._clients.get(client), self._all):
            if group is not None and group.is_full():
                idler = group.idler(now_s)
                if idler is None:
                    return None
                self.leave(idler)
                idler.evict()
        place = Place(self, client, evict)
        for group in self._groups(client):
            group.places.add(place)
        self._is_empty.clear()
        self.wait(place, now_s)
        return place

    def wait(self, place: Place, now_s: float) -> None:
        """The place has no request from now on."""
        if place in self._all.places:
            for group in self._groups(place.client):
                group.waiting.pop(place, None)
                group.waiting[place] = now_s

    def work(self, place: Place) -> None:
        """The place has a request."""
        if place in self._all.places:
            for group in self._groups(place.client):
                group.waiting.pop(place, None)

    def leave(self, place: Place) -> None:
        """The place is free again."""
        if place not in self._all.places:
            return
        for group in self._groups(place.client):
            group.places.remove(place)
            group.waiting.pop(place, None)
        if place.client in self._clients and not self._clients[place.client].places:
            del self._clients[place.client]
        if not self._all.places:
            self._is_empty.set()

    async def wait_until_empty(self) -> None:
        """Return once no connection is open."""
        await self._is_empty.wait()

    def hold_body(self, num_bytes: int) -> bool:
        """Whether so much more of an unfinished body may be kept; it then counts."""
        held = self._unfinished_bodies_bytes + num_bytes
        if held > self._limits.max_unfinished_bodies_bytes:
            return False
        self._unfinished_bodies_bytes = held
        return True

    def release_body(self, num_bytes: int) -> None:
        """So much of a body is no longer unfinished."""
        self._unfinished_bodies_bytes -= num_bytes
        assert self._unfinished_bodies_bytes >= 0

    def _groups(self, client: str) -> list[_Group]:
        if not client:
            return [self._all]
        if client not in self._clients:
            most = self._limits.num_connections_per_client()
            self._clients[client] = _Group(most, self._limits.evict_after_s)
        return [self._all, self._clients[client]]


def client_of(host: str) -> str:
    """Whom an address belongs to: itself, or its network in IPv6."""
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address.packed, _IPV6_PREFIX), strict=False))

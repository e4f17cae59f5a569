"""The parts of the transport by themselves."""

from __future__ import annotations

import asyncio
import resource
import socket
from typing import Any

import pytest
import uvloop

from spanwise.errors import InputError, SpanwiseError
from spanwise.server.transport import protocol as protocol_module
from spanwise.server.transport.access_log import AccessLog
from spanwise.server.transport.envelope import Envelope
from spanwise.server.transport.gate import Gate, Place, client_of
from spanwise.server.transport.limits import TransportLimits
from spanwise.server.transport.listener import Listener
from spanwise.server.transport.meter import RequestMeter
from spanwise.server.transport.refusal import RefusedError


def test_limits_are_checked_and_follow_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="linger_s must be above 0"):
            TransportLimits(linger_s=bad)
    with pytest.raises(InputError, match="must not be above max_unfinished_bodies_bytes"):
        TransportLimits(max_body_bytes=2**30)
    wanted = {64: 16, 256: 64, 1024: 768, 10**6: 4096, resource.RLIM_INFINITY: 4096}
    for descriptors, num in wanted.items():
        monkeypatch.setattr(resource, "getrlimit", lambda _, found=descriptors: (found, found))
        assert TransportLimits().num_connections() == num
        assert TransportLimits().num_connections_per_client() == num * 3 // 4
    assert TransportLimits(max_connections=7).num_connections() == 7
    assert TransportLimits(max_connections_per_client=3).num_connections_per_client() == 3


def test_a_meter_starts_anew_with_each_request() -> None:
    limits = TransportLimits(max_num_headers=2, max_body_bytes=3)
    meter = RequestMeter(limits)
    for _ in range(3):
        meter.begin()
        meter.feed(50)
        meter.header(b"a", b"b")
        meter.header(b"content-length", b"3")
        meter.headers_end()
        meter.body(3)
        assert meter.room_bytes == limits.max_headers_bytes + 1
        meter.end()
    meter.begin()
    meter.feed(meter.room_bytes)
    with pytest.raises(RefusedError, match="too large together"):
        meter.check()


@pytest.mark.parametrize("at", ["before", "in"])
def test_a_connection_that_begins_as_the_listener_closes_gives_its_place_back(at: str) -> None:
    """At a loop iteration before ``connection_made``, and in it."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        limits = TransportLimits()
        gate = Gate(limits)
        made: list[asyncio.Transport] = []

        class Closing(asyncio.Protocol):
            is_connected = False
            _place: Place

            @property
            def place(self) -> Place:
                return self._place

            @place.setter
            def place(self, place: Place) -> None:
                """Accepted, and about to be connected."""
                self._place = place
                if at == "before":
                    loop.call_soon(lambda: loop.call_soon(listener.close))

            def connection_made(self, transport: Any) -> None:
                self.is_connected = True
                made.append(transport)
                if at == "in":
                    listener.close()

            def connection_lost(self, exc: Exception | None) -> None:
                self.place.leave()

        listening = socket.create_server(("127.0.0.1", 0))
        address = listening.getsockname()
        make: Any = Closing
        listener = Listener(listening, None, limits, gate, AccessLog(None), make)
        listener.open()
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, address)
            while not made:
                await asyncio.sleep(0)
            made[0].abort()
            await asyncio.wait_for(gate.wait_until_empty(), 5)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def test_places_are_given_back_once_and_taken_from_the_one_that_waited_longest() -> None:
    gate = Gate(TransportLimits(max_connections=3, max_connections_per_client=2, evict_after_s=1.0))
    evicted: list[str] = []

    def enter(host: str, now_s: float) -> Any:
        return gate.enter(host, lambda: evicted.append(f"{host} {now_s}"), now_s)

    first, second = enter("a", 0.0), enter("a", 0.1)
    assert enter("a", 0.2) is None
    first.work()
    assert enter("a", 1.05) is None
    assert enter("b", 1.05) is not None
    third = enter("a", 1.2)
    assert third is not None
    assert evicted == ["a 0.1"]
    second.leave()
    assert enter("c", 1.3) is None
    first.wait(1.4)
    assert enter("c", 2.2) is not None
    assert evicted == ["a 0.1", "b 1.05"]
    for place in (first, first, third):
        place.leave()
    assert enter("a", 2.3) is not None
    assert enter("", 2.3) is not None
    assert enter("", 2.3) is None


def test_an_address_stands_for_whoever_has_it() -> None:
    assert client_of("10.1.2.3") == "10.1.2.3"
    assert client_of("::ffff:10.1.2.3") == "10.1.2.3"
    assert client_of("2001:db8:1:2:3::1") == client_of("2001:db8:1:2:ffff::9")
    assert client_of("2001:db8:1:2::1") != client_of("2001:db8:1:3::1")
    assert client_of("fe80::1%eth0") == client_of("fe80::2")
    assert client_of("") == ""


def test_another_uvicorn_is_refused_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol_module, "_METHODS", ("on_header", "on_something"))
    monkeypatch.setattr(protocol_module, "_CYCLE_ATTRIBUTES", frozenset({"else"}))
    with pytest.raises(SpanwiseError, match="on_something, else of its httptools protocol"):
        protocol_module._check_uvicorn()


def test_a_body_is_sent_in_pieces() -> None:
    sent: list[dict[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"abcdefg", "more_body": True})
        await send({"type": "http.response.body"})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/"}
    asyncio.run(Envelope(application, 3, AccessLog(None))(scope, None, send))  # type: ignore[arg-type]
    bodies = [(message.get("body"), message.get("more_body", False)) for message in sent[1:]]
    assert bodies == [(b"abc", True), (b"def", True), (b"g", True), (b"", False)]

"""Every row of the list, on every route that takes such a body, streamed and not."""

from __future__ import annotations

import time

import httpx2
import pytest
from tests.server.bad_input.case import KEYS, MAX_BODY_BYTES, Case
from tests.server.bad_input.table import BY_ROUTE, DANGEROUS, LARGE, ROWS, SECTIONS
from tests.server.contract import check_alive, check_log, unharmed
from tests.support.server import RealServer

_TRIES = 5  # on a busy machine the best of them counts


@pytest.mark.parametrize("place", BY_ROUTE, ids=lambda place: f"{place[0]}-{place[1]}")
def test_what_it_is_answered(
    server: RealServer, client: httpx2.Client, ours: httpx2.Client, place: tuple[int, str]
) -> None:
    """Nothing else runs: this is where the time counts."""
    num_lines = len(server.said)
    for case in BY_ROUTE[place]:
        ask(client, case, tries=_TRIES)
    check_alive(ours)
    check_log(server.said[num_lines:])


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_harms_nobody(server: RealServer, section: str) -> None:
    """They have all been asked before, and some twice: this is about the third time."""
    cases = [case for case in SECTIONS[section] if case.row not in DANGEROUS]
    with unharmed(server, KEYS[0]), server.client() as client:
        for case in cases:
            case.check(case.ask(client))


@pytest.mark.parametrize("row", DANGEROUS)
def test_a_dangerous_row_harms_nobody(server: RealServer, row: int) -> None:
    harmless(server, ROWS[row])


@pytest.mark.full
@pytest.mark.parametrize("row", ROWS)
def test_three_times_a_row_harms_nobody(server: RealServer, row: int) -> None:
    harmless(server, ROWS[row] * 3)


def harmless(server: RealServer, cases: list[Case]) -> None:
    slack_bytes = 2 * MAX_BODY_BYTES if cases[0].row in LARGE else 0
    with unharmed(server, KEYS[0], slack_bytes), server.client() as client:
        for case in cases:
            ask(client, case)


def ask(client: httpx2.Client, case: Case, tries: int = 0) -> None:
    """Streamed and not, with the same answer; in time, where it may be tried."""
    error = case.check(in_time(client, case, tries) if tries else case.ask(client))
    if case.can_stream:
        assert case.check(case.ask(client, streams=True)) == error


def in_time(client: httpx2.Client, case: Case, tries: int) -> httpx2.Response:
    took_s = []
    for _ in range(tries):
        began_s = time.monotonic()
        answer = case.ask(client)
        took_s.append(time.monotonic() - began_s)
        if took_s[-1] <= case.within_s:
            return answer
    raise AssertionError(f"{case} took {min(took_s):.3f} s, {case.within_s} s at most")

"""All cases, by section of the list, and by row and route."""

from __future__ import annotations

from collections import defaultdict

from tests.server.bad_input import access, bodies, numbers, outputs, prompts
from tests.server.bad_input.case import BODIES, Case

SECTIONS: dict[str, list[Case]] = {
    "bodies": bodies.CASES,
    "access": access.CASES,
    "numbers": numbers.CASES,
    "prompts": prompts.CASES,
    "outputs": outputs.CASES,
}
CASES = [case for section in SECTIONS.values() for case in section]
# Those that take much of something: each has canaries of its own.
DANGEROUS = (7, 11, 12, 55, 56, 59, 61, 70, 71, 76)
# Bodies of many megabytes, of which the last may lie about for a while.
LARGE = (11, 55, 56, 59, 61)
ROWS: dict[int, list[Case]] = defaultdict(list)
BY_ROUTE: dict[tuple[int, str], list[Case]] = defaultdict(list)
for _case in sorted(CASES, key=lambda case: case.row):
    ROWS[_case.row].append(_case)
    BY_ROUTE[_case.row, _case.path if _case.path in BODIES else "other"].append(_case)

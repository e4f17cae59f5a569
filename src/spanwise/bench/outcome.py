"""What a measurement found: a table for people, results for programs, panels for a picture."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Table(msgspec.Struct, frozen=True):
    """Cells as they are shown; the first ``num_names`` columns are names, the rest are numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_names: int = 1


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One line, or one colour of bars. ``low`` and ``high`` are the ends of its whiskers."""

    label: str
    x: tuple[float, ...] = ()
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    is_ideal: bool = False


class Mark(msgspec.Struct, frozen=True):
    """A place on the x axis, and what is there."""

    x: float
    label: str


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """One drawing. Bars and stacks stand over ``names``, lines over their own x."""

    title: str
    y_label: str
    series: tuple[Series, ...]
    kind: Literal["lines", "bars", "stack"] = "lines"
    names: tuple[str, ...] = ()
    x_label: str = ""
    is_log_y: bool = False
    marks: tuple[Mark, ...] = ()


class Skipped(msgspec.Struct, frozen=True):
    """What was not measured, and why."""

    name: str
    reason: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A whole measurement. ``results`` and ``runs`` go to JSON as they are."""

    name: str
    title: str
    settings: Any
    table: Table
    notes: tuple[str, ...]
    results: Any
    runs: Any
    panels: tuple[Panel, ...]

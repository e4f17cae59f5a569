"""Panels drawn with matplotlib, which is an extra: imported by who has it."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spanwise.bench.machine import Machine
from spanwise.bench.outcome import Outcome, Panel, Series

# Okabe and Ito's, told apart by every kind of eye.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_PANEL_INCHES = (5.2, 4.2)
_NARROWEST_INCHES = 7.5
_LETTERS_AN_INCH = 12
_DPI = 120
_GROUP_WIDTH = 0.8
_ROOM = 40  # letters of names under a panel


def draw(outcome: Outcome, machine: Machine, path: Path) -> None:
    """Write a PNG of all panels, side by side."""
    panel_width, height = _PANEL_INCHES
    width = max(_NARROWEST_INCHES, panel_width * len(outcome.panels))
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(fill(outcome.title, int(width * _LETTERS_AN_INCH)), fontsize=10)
    figure.supxlabel(machine.line(), fontsize=7, color="0.4")
    axes = figure.subplots(1, len(outcome.panels), squeeze=False)[0]
    for panel, own in zip(outcome.panels, axes, strict=True):
        _draw_panel(panel, own)
    figure.savefig(path, dpi=_DPI)


def _draw_panel(panel: Panel, axes: Axes) -> None:
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    {"lines": _draw_lines, "bars": _draw_bars, "stack": _draw_stack}[panel.kind](panel, axes)
    if panel.is_log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    for mark in panel.marks:
        axes.axvline(mark.x, color="0.5", linestyle=":")
        axes.annotate(
            mark.label,
            (mark.x, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
        )
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    if panel.kind == "stack":  # in the order of the stack, beside it
        axes.legend(
            fontsize=8,
            frameon=False,
            reverse=True,
            loc="upper left",
            bbox_to_anchor=(1, 1),
        )
    elif len(panel.series) > 1:
        axes.legend(fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_lines(panel: Panel, axes: Axes) -> None:
    for number, series in enumerate(panel.series):
        if series.is_ideal:
            axes.plot(series.x, series.y, color="0.6", linestyle="--", label=series.label)
            continue
        axes.errorbar(
            series.x,
            series.y,
            yerr=_whiskers(series),
            color=_COLOURS[number % len(_COLOURS)],
            marker="o",
            markersize=4,
            capsize=3,
            label=series.label,
        )
    places = sorted({x for series in panel.series for x in series.x})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()


def _draw_bars(panel: Panel, axes: Axes) -> None:
    width = _GROUP_WIDTH / len(panel.series)
    for number, series in enumerate(panel.series):
        shift = (number - (len(panel.series) - 1) / 2) * width
        axes.bar(
            [place + shift for place in range(len(panel.names))],
            series.y,
            width,
            yerr=_whiskers(series),
            color=_COLOURS[number % len(_COLOURS)],
            capsize=3,
            label=series.label,
        )
    _name_bars(panel, axes)


def _draw_stack(panel: Panel, axes: Axes) -> None:
    bottom = [0.0] * len(panel.names)
    for number, series in enumerate(panel.series):
        colour = _COLOURS[number % len(_COLOURS)]
        axes.bar(panel.names, series.y, 0.6, bottom=bottom, color=colour, label=series.label)
        bottom = [below + own for below, own in zip(bottom, series.y, strict=True)]
    _name_bars(panel, axes)


def _name_bars(panel: Panel, axes: Axes) -> None:
    is_crowded = sum(map(len, panel.names)) > _ROOM
    turn, side = (20, "right") if is_crowded else (0, "center")
    axes.set_xticks(range(len(panel.names)), panel.names, rotation=turn, ha=side, fontsize=8)


def _whiskers(series: Series) -> list[list[float]] | None:
    """How far the ends are below and above the middle."""
    if not series.low:
        return None
    below = [y - low for y, low in zip(series.y, series.low, strict=True)]
    above = [high - y for y, high in zip(series.y, series.high, strict=True)]
    return [below, above]

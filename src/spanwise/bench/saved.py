"""A measurement on the terminal and on disk."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table as RichTable

from spanwise.bench.machine import Machine
from spanwise.bench.outcome import Outcome, Table
from spanwise.errors import InputError

NO_PICTURE = 'for a picture: pip install "spanwise[bench]"'

_WIDE = 1000  # a table that is cut to a narrow terminal loses its numbers


def make_folder(name: str) -> Path:
    """The folder that results go to, made where it is missing. Raises InputError."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {name} cannot be a folder: {error.strerror}") from error
    return folder


def print_outcome(outcome: Outcome, machine: Machine) -> None:
    """Print the title, the table and the notes."""
    console = Console(highlight=False, soft_wrap=True, width=_WIDE)
    console.print(outcome.title, markup=False)
    console.print()
    console.print(_shown(outcome.table))
    console.print()
    for note in outcome.notes:
        console.print(f"note: {note}", markup=False)
    if machine.is_busy:
        console.print(
            f"note: the machine was busy before (load {machine.load_average:g} on {machine.cores} "
            "cores): measure again when it is not",
            markup=False,
        )


def save_outcome(outcome: Outcome, machine: Machine, folder: Path) -> list[str]:
    """Write JSON, and the picture where matplotlib is; give what to say of them."""
    json_path = folder / f"{outcome.name}.json"
    json_path.write_bytes(json_of(outcome, machine))
    if find_spec("matplotlib") is None:
        return [f"written: {json_path}", NO_PICTURE]
    from spanwise.bench.picture import draw

    png_path = folder / f"{outcome.name}.png"
    draw(outcome, machine, png_path)
    return [f"written: {json_path}, {png_path}"]


def json_of(outcome: Outcome, machine: Machine) -> bytes:
    """Machine, settings, results and every run; times in seconds, sizes in bytes."""
    report = {
        "spanwise_version": version("spanwise"),
        "bench": outcome.name,
        "title": outcome.title,
        "machine": machine,
        "settings": outcome.settings,
        "notes": outcome.notes,
        "results": outcome.results,
        "runs": outcome.runs,
    }
    return msgspec.json.format(msgspec.json.encode(report)) + b"\n"


def _shown(table: Table) -> RichTable:
    shown = RichTable(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(table.columns):
        is_name = number < table.num_names
        shown.add_column(column, justify="left" if is_name else "right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*row)
    return shown

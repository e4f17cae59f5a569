"""A measurement from its beginning to its files."""

from __future__ import annotations

from collections.abc import Callable

from spanwise.bench.children import Children, Watcher
from spanwise.bench.machine import describe_machine
from spanwise.bench.outcome import Outcome
from spanwise.bench.saved import make_folder, print_outcome, save_outcome


def measure_and_save(measure: Callable[[Children], Outcome], output: str, watcher: Watcher) -> None:
    """Measure, print the table, write the files to ``output``.

    Raises InputError where ``output`` cannot be a folder, before anything is measured.
    """
    folder = make_folder(output)
    machine = describe_machine()
    try:
        outcome = measure(Children(watcher))
    finally:
        watcher.end()
    print_outcome(outcome, machine)
    for line in save_outcome(outcome, machine, folder):
        watcher.note(line)

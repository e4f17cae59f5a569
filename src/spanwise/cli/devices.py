"""``spanwise devices``: what this machine has to compute with."""

from __future__ import annotations

import os
from typing import Annotated

import msgspec
from cyclopts import Parameter

from spanwise.cli.byte_size import format_bytes
from spanwise.device.devices import cuda_cards, host_memory


class DeviceRow(msgspec.Struct, frozen=True, kw_only=True):
    """One device as it is shown. ``cores`` is 0 for a card; memory in bytes."""

    device: str
    name: str
    cores: int
    memory_bytes: int
    free_bytes: int


def devices(
    *,
    as_json: Annotated[
        bool, Parameter(name="--json", negative="", help="Print a JSON list, sizes in bytes.")
    ] = False,
) -> None:
    """Show the devices of this machine: accelerators, cores, memory."""
    rows = device_rows()
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(rows)).decode())
    else:
        _print_table(rows)


def device_rows() -> list[DeviceRow]:
    """Every CUDA card, then the CPU: the cores and the memory this process may use."""
    rows = [
        DeviceRow(device=f"cuda:{index}", name=name, cores=0, memory_bytes=total, free_bytes=free)
        for index, (name, total, free) in enumerate(cuda_cards())
    ]
    total, free = host_memory()
    cores = len(os.sched_getaffinity(0))
    cpu = DeviceRow(device="cpu", name="CPU", cores=cores, memory_bytes=total, free_bytes=free)
    return [*rows, cpu]


def _print_table(rows: list[DeviceRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("device", "name"):
        table.add_column(heading, no_wrap=True)
    for heading in ("cores", "memory", "free"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        sizes = format_bytes(row.memory_bytes), format_bytes(row.free_bytes)
        table.add_row(row.device, row.name, str(row.cores or "-"), *sizes)
    Console(highlight=False).print(table)
    if len(rows) == 1:
        print(f"\nNo CUDA card. The CPU can stand for several devices: --devices cpu:{row.cores}")

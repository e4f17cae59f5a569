"""So many devices of one kind, each CPU device one core, and which layouts fit on them."""

from __future__ import annotations

import os

import msgspec

from spanwise.bench.job import Device
from spanwise.device.devices import cuda_cards
from spanwise.engine.config import EngineConfig
from spanwise.layout.check import layout_problem
from spanwise.layout.request import LayoutRequest
from spanwise.types.model import ModelFacts


def default_device() -> Device:
    """Cards where there are any."""
    return "cuda" if cuda_cards() else "cpu"


def num_devices(device: Device) -> int:
    """How many there are: cards, or cores this process may use."""
    return len(cuda_cards()) if device == "cuda" else len(os.sched_getaffinity(0))


def placed(engine: EngineConfig, layout: LayoutRequest, device: Device, count: int) -> EngineConfig:
    """The engine with this layout on the first ``count`` devices.

    A process that may use ``count`` cores only has one for each CPU device.
    """
    names = f"cpu:{count}" if device == "cpu" else f"cuda:{','.join(map(str, range(count)))}"
    return msgspec.structs.replace(engine, devices=names, layout=layout)


def why_not(layout: LayoutRequest, facts: ModelFacts, device: Device, count: int) -> str:
    """Why a layout on so many devices cannot be measured here; "" where it can."""
    there = num_devices(device)
    if count > there:
        what = "cores" if device == "cpu" else "cards"
        return f"{count} devices want {count} {what}, {there} are there"
    return layout_problem(layout, facts, count)

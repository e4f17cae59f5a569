from __future__ import annotations

import os

import pytest

from spanwise.device import devices
from spanwise.device.devices import host_memory, parse_devices
from spanwise.errors import DeviceError

CORES = sorted(os.sched_getaffinity(0))


def test_cpu_devices_share_the_cores_there_are() -> None:
    for count in (1, 2, 3, 8):
        found = parse_devices(f"cpu:{count}")
        assert len(found) == count
        assert {core for device in found for core in device.cores} <= set(CORES)
        assert all(device.threads == len(device.cores) >= 1 for device in found)
        if count <= len(CORES):
            assert sum(len(device.cores) for device in found) == len(CORES)


def test_plain_cpu_is_as_many_devices_as_a_layout_wants() -> None:
    assert len(parse_devices("cpu")) == 1
    assert len(parse_devices("cpu", 4)) == 4
    assert len(parse_devices("cpu:2", 4)) == 2


@pytest.mark.parametrize(
    "text", ["", "cpu:0", "cpu:x", "gpu", "cuda:", "cuda:0*0", "cpu:2,3", "cpu:9999"]
)
def test_what_cannot_be_read_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(DeviceError) as error:
        parse_devices(text)
    assert "\n" not in str(error.value)


def test_cards_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_cards", lambda: [("card", 100, 50)] * 2)
    assert [d.index for d in parse_devices("cuda")] == [0, 1]
    assert [(d.index, d.share) for d in parse_devices("cuda:1*2")] == [(1, 2), (1, 2)]
    assert [d.kind for d in parse_devices(None)] == ["cuda", "cuda"]
    with pytest.raises(DeviceError, match="CUDA card 2 is not there"):
        parse_devices("cuda:0,2")
    with pytest.raises(DeviceError, match="twice"):
        parse_devices("cuda:0,0")
    monkeypatch.setattr(devices, "cuda_cards", list)
    with pytest.raises(DeviceError, match="no CUDA card is there"):
        parse_devices("cuda")
    assert [d.kind for d in parse_devices(None)] == ["cpu"]


def test_memory_is_never_more_than_the_machine_has() -> None:
    total, free = host_memory()
    assert 0 < free <= total

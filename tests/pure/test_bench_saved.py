"""A measurement's table, files and picture, and the page cache it was made in."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from spanwise.bench import saved
from spanwise.bench.machine import Machine, describe_machine
from spanwise.bench.outcome import Mark, Outcome, Panel, Series, Table
from spanwise.bench.page_cache import cached_share, drop, read_in, weight_files
from spanwise.bench.saved import NO_PICTURE, make_folder, print_outcome, save_outcome
from spanwise.errors import InputError


def machine(load_average: float = 0.0) -> Machine:
    return Machine(
        cpu="some cpu",
        cores=2,
        memory_bytes=1 << 34,
        cards=("a card",),
        kernel="6",
        python="3",
        torch="2",
        transformers="5",
        load_average=load_average,
        when="2026-01-01T00:00:00",
    )


def outcome() -> Outcome:
    whiskers = {"low": (0.5, 1.5), "high": (1.5, 3.0)}
    line = Series(label="tp", x=(1.0, 2.0), y=(1.0, 2.0), **whiskers)
    ideal = Series(label="ideal", x=(1.0, 2.0), y=(1.0, 2.0), is_ideal=True)
    bars = Series(label="ms", y=(3.0, 4.0), low=(3.0, 3.5), high=(3.0, 5.0))
    names = ("layers over devices", "a method with quite a long name")
    return Outcome(
        name="some",
        title="a [title] of it",
        settings={"runs": 3},
        table=Table(("what", "ms"), (("first [x]", "1.50"), ("second", "12.00"))),
        notes=("as it [is]",),
        results={"points": [line]},
        runs={},
        panels=(
            Panel(title="lines", y_label="y", series=(line, ideal), marks=(Mark(2.0, "knee: 2"),)),
            Panel(title="bars", y_label="y", kind="bars", names=names, series=(bars,)),
            Panel(title="stack", y_label="y", kind="stack", names=("a", "b"), series=(bars, bars)),
            Panel(title="log", y_label="y", series=(line,), is_log_y=True),
        ),
    )


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_outcome(outcome(), machine())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a [title] of it"
    assert lines[2].split() == ["what", "ms"] and lines[4].split() == ["second", "12.00"]
    assert lines[-1] == "note: as it [is]"


def test_a_busy_machine_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    print_outcome(outcome(), machine(1.5))
    assert "busy before (load 1.5 on 2 cores)" in capsys.readouterr().out


def test_json_and_picture_are_written(tmp_path: Path) -> None:
    said = save_outcome(outcome(), machine(), tmp_path)
    assert said == [f"written: {tmp_path / 'some.json'}, {tmp_path / 'some.png'}"]
    found = json.loads((tmp_path / "some.json").read_text())
    assert found["bench"] == "some" and found["settings"] == {"runs": 3}
    assert found["machine"]["cpu"] == "some cpu"
    assert found["results"]["points"][0]["high"] == [1.5, 3.0]
    picture = (tmp_path / "some.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_without_matplotlib_json_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "find_spec", lambda name: None)
    said = save_outcome(outcome(), machine(), tmp_path)
    assert said == [f"written: {tmp_path / 'some.json'}", NO_PICTURE]
    assert [path.name for path in tmp_path.iterdir()] == ["some.json"]


def test_a_place_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--output .* cannot be a folder"):
        make_folder(str(tmp_path / "file"))
    assert make_folder(str(tmp_path / "new" / "deep")).is_dir()


def test_the_machine_is_described() -> None:
    found = describe_machine()
    assert found.cores >= 1 and found.memory_bytes > 0 and found.torch


def test_files_go_in_and_out_of_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(100 * 4096 + 1))
    (tmp_path / "empty.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "empty.safetensors", path]
    subprocess.run(["sync", str(path)], check=True)  # what is not written cannot be dropped
    read_in([path])
    assert cached_share([path]) == 1.0
    drop([path])
    # Files in memory have nowhere else to be.
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True)
    in_memory = kind.stdout.strip() == "tmpfs"
    assert cached_share(weight_files(tmp_path)) == 1.0 if in_memory else cached_share([path]) < 0.5
    read_in([path])
    assert cached_share([path]) == 1.0

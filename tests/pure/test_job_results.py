"""The files of a job: in order, each item once, whatever ends the process at whatever byte."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spanwise.errors import InputError
from spanwise.jobs.results import Results
from spanwise.jobs.state import Row, StateFile

IDENTITY = {"model": "m", "input": "sha256 1"}


def row(index: int) -> Row:
    """Every seventh item is an error; lines differ in length."""
    return Row(index % 7 == 3, b"%d %s\n" % (index, b"x" * (index % 11)))


def expected(num_items: int, errors: bool) -> bytes:
    rows = [row(index) for index in range(num_items)]
    return b"".join(each.line for each in rows if each.is_error == errors)


def opened(folder: Path, **options: bool) -> Results:
    return Results(folder / "out.jsonl", IDENTITY, **options)


def written(folder: Path) -> tuple[bytes, bytes]:
    errors = folder / "out.jsonl.errors.jsonl"
    found = errors.read_bytes() if errors.exists() else b""
    return (folder / "out.jsonl").read_bytes(), found


def crashed(folder: Path, place: Path, garbage: bytes) -> Path:
    """What a process that is killed now leaves: the files as they are, and a write cut anywhere."""
    shutil.copytree(folder, place)
    for name in ("out.jsonl", "out.jsonl.errors.jsonl"):
        if (place / name).exists():
            with (place / name).open("ab") as file:
                file.write(garbage)
    return place


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), num_items=st.integers(1, 60), window=st.integers(1, 30))
def test_any_order_and_any_number_of_ends_give_the_same_files(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num_items: int, window: int
) -> None:
    chance, base = random.Random(seed), tmp_path_factory.mktemp("job")
    folder, ends = base / "0", 0
    folder.mkdir()
    results = opened(folder)
    while (undone := [i for i in range(num_items) if not results.is_done(i)]) or ends < 3:
        if undone:
            index = chance.choice(undone[:window])
            results.add(index, row(index))
        if chance.random() < 0.3:
            results.flush()
        if not undone or chance.random() < 0.1:
            ends += 1
            after = crashed(folder, base / str(ends), b"half a li"[: chance.randrange(9)])
            results.close()
            folder, results = after, opened(after)
    results.close()
    assert written(folder) == (expected(num_items, False), expected(num_items, True))
    assert opened(folder).written.next_index == num_items


def test_what_was_not_flushed_is_asked_for_again(tmp_path: Path) -> None:
    results = opened(tmp_path)
    for index in (0, 1, 4):
        results.add(index, row(index))
    results.flush()
    results.add(2, row(2))
    again = opened(crashed(tmp_path, tmp_path / "again", b""))
    assert [again.is_done(index) for index in range(6)] == [True, True, False, False, True, False]
    assert again.num_done == 3 and again.written.next_index == 2
    results.close()
    again.close()


def test_an_error_file_is_there_only_where_there_are_errors(tmp_path: Path) -> None:
    results = opened(tmp_path)
    results.add(0, row(0))
    results.close()
    assert not results.errors.exists()
    results = opened(tmp_path)
    for index in (1, 2, 3):
        results.add(index, row(index))
    results.close()
    assert results.errors.read_bytes() == row(3).line
    assert results.written.num_errors == 1


def test_a_failed_flush_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the middle of a write, and has room again later."""
    results = opened(tmp_path)
    for index in (1, 2, 3):
        results.add(index, row(index))
    results.flush()  # they wait in the state file
    results.add(0, row(0))
    import os

    def half(file: int, data: bytes, offset: int) -> int:
        monkeypatch.undo()
        os.pwrite(file, bytes(data)[:2], offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", half)
    with pytest.raises(OSError, match="No space"):
        results.flush()
    results.close()
    assert written(tmp_path) == (expected(4, False), expected(4, True))


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        ({"model": "other", "input": "sha256 1"}, r"another model \(m; now other\)"),
        ({"model": "m", "input": "sha256 2"}, "another input"),
        ({**IDENTITY, "--dtype": "float32"}, "another --dtype"),
        ({"model": "m"}, "another input"),
    ],
)
def test_another_job_is_refused_in_one_line(
    tmp_path: Path, identity: dict[str, str], said: str
) -> None:
    results = opened(tmp_path)
    results.add(0, row(0))
    results.close()
    with pytest.raises(InputError, match=said) as caught:
        Results(tmp_path / "out.jsonl", identity)
    assert "--restart" in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "out.jsonl").read_bytes() == row(0).line
    anew = Results(tmp_path / "out.jsonl", identity, restart=True)
    assert anew.num_done == 0 and (tmp_path / "out.jsonl").read_bytes() == b""
    anew.close()


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.errors.jsonl"])
def test_what_no_job_left_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    for _ in range(2):  # the refusal leaves nothing that would let it pass
        with pytest.raises(InputError, match="--restart"):
            opened(tmp_path)
    assert (tmp_path / name).read_text() == "precious"
    opened(tmp_path, restart=True).close()


def test_an_output_that_was_cut_is_refused(tmp_path: Path) -> None:
    results = opened(tmp_path)
    results.add(0, row(0))
    results.close()
    (tmp_path / "out.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match="put it back"):
        opened(tmp_path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    results = opened(tmp_path)
    with pytest.raises(InputError, match="another process works on this job"):
        opened(tmp_path)
    results.close()
    opened(tmp_path).close()


def test_a_file_that_is_no_state_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    path.write_bytes(b"something else" * 100)
    with pytest.raises(InputError, match="no state file"):
        StateFile(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        opened(tmp_path / "missing")
    (tmp_path / "out.jsonl").mkdir()
    with pytest.raises(InputError, match="is no file"):
        opened(tmp_path)

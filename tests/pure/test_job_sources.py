"""Where a job's items come from, and what of them is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from spanwise.errors import InputError
from spanwise.jobs.files import FilesFolder
from spanwise.jobs.identity import folder_digest, item_seed
from spanwise.jobs.item import Source
from spanwise.jobs.lines import LinesFile
from spanwise.jobs.requests import read_custom_id, read_request
from spanwise.jobs.table import Table
from spanwise.types.sampling import Grammar


def contents(source: Source, first: int = 0) -> list[Any]:
    return [item.content for item in source.items(first)]


# --- lines


def test_lines_are_counted_and_named_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"a\n\n  \nb\r\nlast")
    source = LinesFile(path)
    assert [(i.index, i.name, i.content) for i in source.items(0)] == [
        (0, "line 1", b"a\n"),
        (1, "line 4", b"b\n"),
        (2, "line 5", b"last\n"),
    ]
    assert contents(source, 2) == [b"last\n"] and source.extent().num_items == 3
    before = source.extent().digest
    path.write_bytes(b"a\nb\nlast\n")
    assert source.extent().digest == before, "the same items"
    path.write_bytes(b"a\nblast\n")
    assert source.extent().digest != before


def test_an_input_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for source in (LinesFile(tmp_path / "x.jsonl"), Table(tmp_path / "x.csv", ("a",))):
        with pytest.raises(InputError, match="cannot be read: No such file"):
            source.extent()


# --- files


def test_files_come_sorted_from_all_folders(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.PNG", "a/c/y.png", "a.png", "notes.txt", ".hidden.png", "c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    source = FilesFolder(tmp_path, (".png", ".jpg"))
    names = [item.name for item in source.items(0)]
    assert names == ["a/c/y.png", "a/z.PNG", "a.png", "b.png", "c.jpg"]
    assert [item.name for item in source.items(3)] == names[3:]
    assert [item.index for item in source.items(3)] == [3, 4]
    assert contents(source)[0] == tmp_path / "a/c/y.png"
    before = source.extent()
    assert before.num_items == 5
    (tmp_path / "notes.txt").write_text("longer than before")
    assert source.extent() == before
    (tmp_path / "b.png").write_text("longer than before")
    assert source.extent().digest != before.digest


def test_odd_names_and_odd_files_do_no_harm(tmp_path: Path) -> None:
    """A name that is no UTF-8 is spelled out; a link to nowhere is an item, a pipe is none."""
    (tmp_path / os.fsdecode(b"a\xff.png")).touch()
    (tmp_path / "b.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "c.png")
    source = FilesFolder(tmp_path, (".png",))
    assert [item.name for item in source.items(0)] == ["a\\xff.png", "b.png"]
    assert source.extent().num_items == 2 and contents(source)[0].exists()


# --- tables


def test_columns_of_csv_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('\ufeffid,text,x\n1,"a, b\nc",2\n2,d\n\n3,e,5\n')
    assert contents(Table(path, ("text",))) == [("a, b\nc",), ("d",), ("e",)]
    assert contents(Table(path, ("x", "id")), 1) == [(None, "2"), ("5", "3")]
    assert Table(path, ("id",)).extent().num_items == 3
    with pytest.raises(InputError, match="no column 'y'; it has id, text, x"):
        Table(path, ("y",)).extent()


def test_columns_of_parquet_keep_their_kind(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    path = tmp_path / "t.parquet"
    columns = {"t": ["a", None, "c"] * 1000, "x": [1.5, 2.5, 3.5] * 1000, "v": [[1, 2], [], [3]]}
    columns["v"] = columns["v"] * 1000
    parquet.write_table(pyarrow.table(columns), path)
    source = Table(path, ("v", "t"))
    assert source.extent().num_items == 3000
    assert contents(source)[:2] == [([1, 2], "a"), ([], None)]
    assert contents(source, 2999) == [([3], "c")]
    with pytest.raises(InputError, match="no column 'y'; it has t, x, v"):
        Table(path, ("y",)).extent()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="no whole parquet file"):
        Table(path, ("x",)).extent()


# --- requests


def line(body: dict[str, Any], url: str = "/v1/completions", **others: Any) -> bytes:
    return json.dumps(
        {"custom_id": "c", "method": "POST", "url": url, "body": body} | others
    ).encode()


def read(body: dict[str, Any], url: str = "/v1/completions", **defaults: Any) -> Any:
    return read_request(line(body, url), defaults, seed=99)


CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def test_a_completion_is_read() -> None:
    request = read({"model": "any", "prompt": "a", "max_tokens": 3, "user": "u", "stream": False})
    assert request.custom_id == "c" and request.url == "/v1/completions"
    assert request.prompt == {"prompt": "a", "add_special_tokens": None}
    assert (request.params.max_tokens, request.params.seed) == (3, 99)
    assert read({"prompt": [5, 6]}).prompt == {"prompt_token_ids": [5, 6]}
    assert read({"prompt": "a"}).params.max_tokens == 16
    assert read({"prompt": "a", "logit_bias": {"7": -2}}).params.logit_bias == {7: -2.0}


def test_what_a_line_says_comes_before_the_flags() -> None:
    flags = {"temperature": 0.5, "seed": 7, "max_tokens": 30}
    params = read({"prompt": "a", "temperature": 0, "seed": None}, **flags).params
    assert (params.temperature, params.seed, params.max_tokens) == (0, 7, 30)
    assert read({"messages": HELLO}, CHAT).params.max_tokens is None
    assert read({"messages": HELLO}, CHAT, max_tokens=30).params.max_tokens == 30
    assert read({"messages": HELLO, "max_completion_tokens": 4}, CHAT).params.max_tokens == 4


def test_a_conversation_is_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}
    request = read({"messages": messages, "response_format": wanted}, CHAT)
    assert request.prompt == {
        "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "a\nb"}]
    }
    assert request.params.grammar == Grammar("json_schema", '{"type":"null"}')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "broken JSON"),
        (b"\xff\n", "broken JSON"),
        (b"[]", '"custom_id"'),
        (line({"prompt": "a"}, custom_id=7), "custom_id"),
        (line({"prompt": "a"}, method="GET"), "method must be POST"),
        (line({"prompt": "a"}, url="/v1/embeddings"), "url must be"),
        (line({}), "prompt must be one text"),
        (line({"prompt": ["a", "b"]}), "a line for each"),
        (line({"prompt": [True]}), "prompt must be one text"),
        (line({"prompt": "a", "temperature": "hot"}), "temperature must be a number"),
        (line({"prompt": "a", "max_tokens": 0}), "max_tokens must be a whole number from 1"),
        (line({"prompt": "a", "stream": True}), "stream is not supported"),
        (line({"prompt": "a", "logprobs": 2}), "logprobs is not supported"),
        (line({"prompt": "a", "bogus": 2}), "bogus is not supported"),
        (line({"prompt": "a", "logit_bias": {"x": 2}}), "logit_bias must be token ids"),
        (line({"messages": []}, CHAT), "messages must be a non-empty list"),
        (line({"messages": [{"content": "a"}]}, CHAT), "a message is"),
        (line({"messages": [{"role": "user", "content": None}]}, CHAT), "must be text"),
        (line({"messages": HELLO, "tools": [{"type": "function"}]}, CHAT), "tools is not"),
        (line({"messages": HELLO, "response_format": {"type": "xml"}}, CHAT), "json_schema"),
        (
            line({"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2}, CHAT),
            "leave max_tokens out",
        ),
    ],
)
def test_a_line_that_cannot_be_says_why(text: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_request(text, {}, 1)
    assert "\n" not in str(caught.value)


def test_a_line_that_cannot_be_still_has_its_name() -> None:
    assert read_custom_id(line({"bogus": 1}, url="x")) == "c"
    assert read_custom_id(b'{"custom_id": 7}') is None and read_custom_id(b"{") is None


# --- identity


def test_a_seed_follows_from_the_job_and_the_item() -> None:
    seeds = {item_seed({"model": m}, index) for m in ("a", "b") for index in range(100)}
    assert len(seeds) == 200 and item_seed({"model": "a"}, 3) == item_seed({"model": "a"}, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_model_is_known_by_what_its_files_hold(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(3 << 20))
    (tmp_path / "config.json").write_text("{}")
    before = folder_digest(tmp_path)
    (tmp_path / "README.md").write_text("x")
    assert folder_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(bytes((3 << 20) - 1) + b"x")
    assert folder_digest(tmp_path) != before

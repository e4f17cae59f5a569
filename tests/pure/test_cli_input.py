"""The command line's own small parts: sizes, prompt files, results files, streamed text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spanwise.cli.byte_size import format_bytes, parse_bytes
from spanwise.cli.notes import plan_line, speed_line
from spanwise.cli.prompts_file import read_prompts
from spanwise.cli.results_file import result_record, results_file
from spanwise.cli.sampling_flags import SamplingFlags
from spanwise.cli.text_stream import TextStream, held_back
from spanwise.engine.launch import DeviceUse, EnginePlan
from spanwise.errors import InputError
from spanwise.types.outputs import CompletionOutput, FinishReason, RequestOutput
from spanwise.types.plan import TokenLogprobs
from spanwise.types.sampling import Grammar
from spanwise.types.worker import RankPlace


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("2GiB", 2 << 30), ("512MB", 512_000_000), ("1.5 kib", 1536), ("7", 7), ("7B", 7)],
)
def test_sizes_are_read(text: str, num_bytes: int) -> None:
    assert parse_bytes("--x", text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2G", "1e9", "2GiB more"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--x must be a size"):
        parse_bytes("--x", text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(812, "812 B"), (17 << 20, "17.0 MiB"), (768 << 20, "768 MiB"), (1000 << 20, "1.0 GiB")],
)
def test_sizes_are_shown(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def _file(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_a_line_comes_before_the_flags(tmp_path: Path) -> None:
    name = _file(
        tmp_path,
        '{"prompt": "a", "max_tokens": 5, "logit_bias": {"7": -2}}',
        "",
        '{"prompt_token_ids": [5, 6], "stop": "x"}',
        '{"messages": [{"role": "user", "content": "hi"}], "stop": ["x", "y"]}',
    )
    jobs = read_prompts(name, {"max_tokens": 9, "seed": 3, "logit_bias": {1: 1.0}, "stop": ["z"]})
    assert [job.prompt for job in jobs] == [
        {"prompt": "a"},
        {"prompt_token_ids": [5, 6]},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    assert [job.params.max_tokens for job in jobs] == [5, 9, 9]
    assert {job.params.seed for job in jobs} == {3}
    assert [job.params.logit_bias for job in jobs] == [{7: -2.0}, {1: 1.0}, {1: 1.0}]
    assert [job.params.stop_strings for job in jobs] == [("z",), ("x",), ("x", "y")]


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ("", Grammar("regex", "-?[0-9]+")),
        (', "regex": "[a/]+"', Grammar("regex", "[a/]+")),
        (', "grammar": "start: /a/"', Grammar("lark", "start: /a/")),
        (', "json_schema": "true"', Grammar("json_schema", "true")),
        (
            ', "json_schema": {"b": {"z": 1.0, "a": ["é", null]}, "a": true}',
            Grammar("json_schema", '{"b":{"z":1.0,"a":["é",null]},"a":true}'),
        ),
        (', "json_schema": false', Grammar("json_schema", "false")),
        (', "json_schema": null, "regex": "x"', Grammar("regex", "x")),
        (', "grammar": null', None),
    ],
)
def test_a_line_says_what_its_answer_must_match(
    tmp_path: Path, fields: str, grammar: Grammar | None
) -> None:
    defaults = SamplingFlags(regex="-?[0-9]+", max_tokens=9).given()
    (job,) = read_prompts(_file(tmp_path, f'{{"prompt": "a"{fields}}}'), defaults)
    assert job.params.grammar == grammar
    assert job.params.max_tokens == 9


def test_flags_give_one_grammar(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"enum": ["é"]}')
    assert SamplingFlags().given() == {}
    for flags, grammar in (
        (SamplingFlags(json_schema='{"a": 1}'), Grammar("json_schema", '{"a": 1}')),
        (SamplingFlags(json_schema=f"@{file}"), Grammar("json_schema", '{"enum": ["é"]}')),
        (SamplingFlags(grammar=f"@{file}"), Grammar("lark", '{"enum": ["é"]}')),
        (SamplingFlags(regex="@file"), Grammar("regex", "@file")),
    ):
        assert flags.given() == {"grammar": grammar}
    with pytest.raises(InputError, match="this has json_schema and regex"):
        SamplingFlags(json_schema="{}", regex="a").given()
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"--grammar: .* is not UTF-8"):
        SamplingFlags(grammar=f"@{file}").given()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"', "broken JSON"),
        ('{"prompt": "a", "regex": 5}', "regex must be a text, got 5"),
        ('{"prompt": "a", "regex": " "}', "regular expression is empty"),
        ('{"prompt": "a", "json_schema": [1]}', "json_schema must be a text"),
        ('{"prompt": "a", "json_schema": "{"}', "JSON schema is not JSON"),
        ('{"prompt": "a", "grammar": ["regex", "a"]}', "grammar must be a text"),
        ('{"prompt": "a", "grammar": "start: /a/", "regex": "b"}', "this has (regex|grammar) and"),
        ('["a"]', "Expected `object`"),
        ('{"prompt": "a", "max_token": 5}', "max_token"),
        ('{"prompt": "a", "max_tokens": "5"}', "max_tokens"),
        ('{"prompt": "a", "max_tokens": -5}', "max_tokens must be"),
        ('{"prompt": 5}', "prompt"),
        ('{"prompt_token_ids": [1, "2"]}', "prompt_token_ids"),
        ('{"prompt_token_ids": [true]}', "prompt_token_ids"),
        ('{"prompt": "a", "messages": []}', "prompt and messages"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"content": "hi"}]}', "messages"),
        ('{"max_tokens": 5}', "none"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    name = _file(tmp_path, '{"prompt": "fine"}', "", line)
    with pytest.raises(InputError, match=rf"prompts\.jsonl line 3: .*({said})"):
        read_prompts(name, {})


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match="line 1"):
        read_prompts(str(path), {})


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(_file(tmp_path), {})


def _result(text: str = "b", reason: FinishReason | None = "length") -> RequestOutput:
    choice = CompletionOutput(
        index=0,
        text=text,
        token_ids=(8, 9),
        finish_reason=reason,
        logprobs=(TokenLogprobs(8, -0.5, 1, (8,), (-0.5,)),),
    )
    return RequestOutput(request_id=4, prompt="a", prompt_token_ids=(7,), outputs=(choice,))


def test_a_result_is_one_record() -> None:
    assert result_record(2, _result()) == {
        "index": 2,
        "prompt": "a",
        "outputs": [
            {
                "index": 0,
                "text": "b",
                "token_ids": (8, 9),
                "finish_reason": "length",
                "stop_reason": None,
                "logprobs": [
                    {
                        "token_id": 8,
                        "logprob": -0.5,
                        "rank": 1,
                        "top_ids": (8,),
                        "top_logprobs": (-0.5,),
                    }
                ],
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }


def test_results_take_the_place_of_the_old_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with results_file(str(path)) as write:
        write([_result()])
        assert path.read_text() == "old"
    assert json.loads(path.read_text())["prompt"] == "a"
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_results_stand(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(InputError), results_file(str(path)) as write:
        write([_result()])
        raise InputError("x")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_keeps_its_place(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "out.jsonl"
    link.symlink_to(tmp_path / "far" / "real.jsonl")
    with results_file(str(link)) as write:
        write([_result()])
    assert link.is_symlink() and link.read_text().startswith('{"index":0')


@pytest.mark.parametrize("name", ["none/out.jsonl", "."])
def test_an_output_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be written"), results_file(str(tmp_path / name)):
        pass


def test_what_is_no_file_is_written_as_it_is() -> None:
    with results_file("/dev/null") as write:
        write([_result()])
    assert Path("/dev/null").is_char_device()


def test_text_is_shown_as_it_grows(capsys: pytest.CaptureFixture[str]) -> None:
    stream = TextStream(["STOP"])
    for text, reason in (
        ("a", None),
        ("aS", None),
        ("aSa", None),
        ("aSaST", None),
        ("aSa", "stop"),
    ):
        stream.show(_result(text, reason).outputs[0])  # type: ignore[arg-type]
    assert capsys.readouterr().out == "aSa\n"


@pytest.mark.parametrize(
    ("text", "stops", "count"),
    [
        ("abc", [], 0),
        ("abS", ["ST"], 1),
        ("aST", ["STOP", "T."], 2),
        ("", ["x"], 0),
        ("x", ["y"], 0),
    ],
)
def test_the_beginning_of_a_stop_string_is_held_back(
    text: str, stops: list[str], count: int
) -> None:
    assert held_back(text, stops) == count


def test_plan_and_speed_lines() -> None:
    ranks = tuple(
        DeviceUse(
            place=RankPlace(dp=0, pp=0, lane=0, tp=i),
            device=f"cpu:{i}",
            weight_bytes=17 << 20,
            cache_bytes=96 << 20,
        )
        for i in range(2)
    )
    plan = EnginePlan(
        model="m",
        architecture="A",
        dtype="float32",
        layout="dp=1 x pp=1 x tp=2, layers 6",
        max_model_len=9,
        cache_tokens=9,
        ranks=ranks,
    )
    assert plan_line(plan) == (
        "plan: m (A, float32): dp=1 x pp=1 x tp=2, layers 6; "
        "cpu:0, cpu:1 each 17.0 MiB weights + 96.0 MiB cache"
    )
    assert speed_line([_result()], 0.5, plan) == (
        "done: 1 tokens read, 2 generated in 0.50 s on 2 devices: "
        "4.0 tokens/s, 2.0 tokens/s per device"
    )

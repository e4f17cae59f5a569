"""What `spanwise bench` and `spanwise chat` say before anything is asked of a model."""

from __future__ import annotations

import pytest
from tests.pure.test_cli_help import spanwise

_URL = "http://127.0.0.1:1"
_DENSE = "spanwise/tiny-dense"
_SERVE = ["bench", "serve", "--base-url", _URL]


@pytest.mark.parametrize(
    ("arguments", "examples"),
    [
        (["bench", "--help"], 5),
        (["bench", "serve", "--help"], 8),
        (["bench", "latency", "--help"], 2),
        (["bench", "throughput", "--help"], 3),
        (["bench", "startup", "--help"], 2),
        (["bench", "scaling", "--help"], 3),
        (["bench", "attention", "--help"], 2),
        (["bench", "batch", "--help"], 2),
        (["bench", "methods", "--help"], 2),
        (["chat", "--help"], 3),
    ],
)
def test_help_is_light_and_ends_with_examples(arguments: list[str], examples: int) -> None:
    answer = spanwise(*arguments, probe=True)
    assert (answer.returncode, answer.stderr) == (0, "[]\n")
    _, _, tail = answer.stdout.partition("Examples:\n")
    lines = [line for line in tail.splitlines() if line.startswith("  ")]
    assert len(lines) == examples and max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["bench", "serve"], 2, "--base-url"),
        ([*_SERVE], 1, f"{_URL} cannot be reached"),
        ([*_SERVE, "--request-rate", "0"], 2, "request_rate must be above 0"),
        ([*_SERVE, "--request-rate", "2", "--concurrency", "2"], 2, "one of request_rate"),
        ([*_SERVE, "--input-len", "9:5"], 2, "--input-len must be tokens"),
        ([*_SERVE, "--api-key", "two\r\nlines"], 2, "API key"),
        ([*_SERVE, "--goodput", "fast"], 2, "ttft:500"),
        ([*_SERVE, "--extra-body", "[]"], 2, "--extra-body must be JSON"),
        ([*_SERVE, "--prompts", "no such file"], 2, "no such file cannot be read"),
        ([*_SERVE, "--json", "no such folder/x"], 2, "--json no such folder/x"),
        ([*_SERVE, "--endpoint", "responses"], 2, "completions"),
        (["bench", "serve", "--base-url", "http://:80/"], 2, "names no host"),
        (["bench", "serve", "--base-url", "http://a:99999/"], 2, "no URL"),
        (["bench", "latency"], 2, "MODEL"),
        (["bench", "latency", "./no such folder"], 2, "no model folder"),
        (["bench", "latency", _DENSE, "--batch-size", "0"], 2, "batch_size must be 1 or more"),
        (["bench", "latency", _DENSE, "--runs", "0"], 2, "runs must be 1 or more"),
        (["bench", "latency", _DENSE, "--output", "/dev/null"], 2, "cannot be a folder"),
        (["bench", "throughput", _DENSE, "--input-len", "9:5"], 2, "--input-len must be tokens"),
        (["bench", "throughput", _DENSE, "--num-prompts", "0"], 2, "num_prompts must be 1"),
        (["bench", "startup", _DENSE, "--max-num-seqs", "0"], 2, "max_num_seqs must be at least 1"),
        (["bench", "scaling", _DENSE, "--devices", "2,x"], 2, "--devices must be whole numbers"),
        (["bench", "scaling", _DENSE, "--devices", "2,1"], 2, "devices must rise"),
        (["bench", "scaling", _DENSE, "--runs", "2"], 2, "runs must be 3 or more"),
        (["bench", "scaling", _DENSE, "--layouts", "dp,xp"], 2, "--layouts must be some of"),
        (["bench", "scaling", _DENSE, "--workloads", "256:8"], 2, "--workloads must be"),
        (["bench", "scaling", _DENSE, "--device", "tpu"], 2, "cpu"),
        (["bench", "attention", "--lengths", "0"], 2, "lengths must rise from 1"),
        (["bench", "attention", "--heads", "0"], 2, "heads must be 1 or more"),
        (["bench", "batch", _DENSE, "--batch-sizes", "4,2"], 2, "batch_sizes must rise"),
        (["bench", "batch", _DENSE, "--batch-sizes", "1,,2"], 2, "--batch-sizes must be whole"),
        (["bench", "methods", _DENSE, "--devices", "1"], 2, "devices must be 2 or more"),
        (["chat"], 2, "MODEL"),
        (["chat", "m", "--model", "x"], 2, "go with a server's URL"),
        (["chat", "m", "--logprobs", "2"], 2, "--logprobs"),
        (["chat", _URL, "--devices", "cpu"], 2, "are the server's"),
        (["chat", _URL], 1, f"{_URL} cannot be reached"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], code: int, said: str) -> None:
    answer = spanwise(*arguments)
    assert (answer.returncode, answer.stdout) == (code, "")
    assert answer.stderr.startswith("spanwise: ") and answer.stderr.count("\n") == 1
    assert said in answer.stderr

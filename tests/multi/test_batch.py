"""Jobs as a user runs them: killed and begun again, they end as the undisturbed run does."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests import forward_models

DENSE, DIGITS = "spanwise/tiny-dense", "spanwise/digits-image"
_TIMEOUT_S = 240.0  # the machine may be busy
_NUM_REQUESTS = 240
_NUM_KILLS = 3
# Few at once, so that there is a middle to be killed in.
_OPTIONS = ("--dtype", "float32", "--max-num-seqs", "2")
_BAD = {5: "{broken", 70: "[]", 71: '{"custom_id": "c71", "url": "/v1/completions", "body": {}}'}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "spanwise", "batch", *map(str, arguments)]


def batch(*arguments: str | Path, code: int = 0) -> str:
    """Run a job to its end and give what it says."""
    answer = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=_TIMEOUT_S)
    assert answer.returncode == code, answer.stderr
    assert answer.stdout == ""
    return answer.stderr


@contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A job in a process group of its own, which is gone after the block."""
    process = subprocess.Popen(
        command(*arguments), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=_TIMEOUT_S)


def wait_for_bytes(process: subprocess.Popen[str], output: Path, num_bytes: int) -> None:
    """Return when the output is so long, or the job has ended."""
    deadline = time.monotonic() + _TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if output.exists() and output.stat().st_size >= num_bytes:
            return
        time.sleep(0.005)
    assert process.poll() is not None, "the job writes nothing"


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def request(index: int) -> str:
    """Greedy, seeded and unseeded ones, of different lengths."""
    if index in _BAD:
        return _BAD[index]
    body: dict[str, Any] = {"prompt": f"def f{index}(", "max_tokens": 1 + index * 7 % 9}
    body |= ({"temperature": 0}, {"seed": index}, {})[index % 3]
    url = "/v1/completions"
    return json.dumps({"custom_id": f"c{index}", "method": "POST", "url": url, "body": body})


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("requests") / "in.jsonl"
    path.write_text("".join(request(index) + "\n" for index in range(_NUM_REQUESTS)))
    return path


@pytest.fixture(scope="module")
def undisturbed(requests: Path) -> Path:
    """The output of a run that nothing disturbed."""
    output = requests.with_name("undisturbed.jsonl")
    said = batch(DENSE, *_OPTIONS, "--input", requests, "--output", output)
    assert f"done: {_NUM_REQUESTS - len(_BAD)} items in {output}, 3 errors in " in said
    assert "items/s" in said
    return output


def test_every_request_is_answered_in_order(undisturbed: Path) -> None:
    found = records(undisturbed)
    good = [index for index in range(_NUM_REQUESTS) if index not in _BAD]
    assert [each["custom_id"] for each in found] == [f"c{index}" for index in good]
    assert all(each["response"]["status_code"] == 200 for each in found)
    usages = [each["response"]["body"]["usage"]["completion_tokens"] for each in found]
    assert all(0 < used <= 1 + i * 7 % 9 for used, i in zip(usages, good, strict=True))
    errors = records(Path(f"{undisturbed}.errors.jsonl"))
    assert [each["id"] for each in errors] == [f"batch_req_{index}" for index in _BAD]
    assert errors[2]["custom_id"] == "c71"
    assert errors[0]["error"]["message"].startswith("line 6: broken JSON")


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(
    requests: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """``kill -9`` of everything; the last run has another layout."""
    output, chance = tmp_path / "out.jsonl", random.Random(7)
    job = (DENSE, *_OPTIONS, "--input", requests, "--output", output)
    size = undisturbed.stat().st_size
    for number in range(_NUM_KILLS):
        with running(*job) as process:
            wait_for_bytes(process, output, int(size * (number + chance.random()) / 5))
            time.sleep(chance.random() / 10)
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait(_TIMEOUT_S) == -signal.SIGKILL, "it was to be killed, not done"
    assert 0 < output.stat().st_size < size
    said = batch(*job, "-dp", "2", "--devices", "cpu:2")
    assert said.startswith("going on: ")
    assert output.read_bytes() == undisturbed.read_bytes()
    errors = [Path(f"{path}.errors.jsonl").read_bytes() for path in (output, undisturbed)]
    assert errors[0] == errors[1]
    assert batch(*job).startswith("nothing is left to do: ")


def test_ctrl_c_ends_it_with_all_saved(requests: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    job = (DENSE, *_OPTIONS, "--input", requests, "--output", output)
    with running(*job) as process:
        wait_for_bytes(process, output, 1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=_TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGINT
    stopped = said.splitlines()[-1]
    assert stopped.startswith("stopped: ") and "run the same command again" in stopped
    num_done = stopped.split()[1]
    said = batch(*job)
    assert f"going on: {num_done} of 240 items are done" in said
    assert output.read_bytes() == undisturbed.read_bytes()


def test_another_job_is_refused(requests: Path, undisturbed: Path) -> None:
    before = undisturbed.read_bytes()
    job = (DENSE, "--input", requests, "--output", undisturbed)
    for others, said in (
        (("--dtype", "bfloat16"), "--dtype"),
        (("--dtype", "float32", "--temperature", "0.5"), "sampling flags"),
    ):
        answer = batch(*job, *others, code=2)
        assert answer.count("\n") == 1 and said in answer and "--restart" in answer
    assert undisturbed.read_bytes() == before


# --- images, audio, rows


def test_a_folder_of_images_is_labelled(tmp_path: Path) -> None:
    """The good ones get their digit; each bad one stands in the error file with the reason."""
    with np.load(Path(__file__).parents[1] / "data" / "digits" / "held_out.npz") as held_out:
        images, labels = held_out["images"][:40], held_out["labels"][:40]
    folder = tmp_path / "images"
    for index, pixels in enumerate(images):
        path = folder / str(index % 3) / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    whole = (folder / "0" / "00.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "junk.gif").write_bytes(b"GIF89a junk")
    output = tmp_path / "labels.jsonl"
    batch(DIGITS, "--input", folder, "--output", output)
    found = records(output)
    names = sorted(f"{index % 3}/{index:02}.png" for index in range(40))
    assert [each["file"] for each in found] == names
    right = sum(each["label"] == str(labels[int(each["file"][2:4])]) for each in found)
    assert right >= 38 and all(0.1 < each["score"] <= 1 for each in found)
    errors = {each["file"]: each["error"] for each in records(Path(f"{output}.errors.jsonl"))}
    assert errors.keys() == {"cut.png", "empty.jpg", "junk.gif"}
    assert errors["empty.jpg"] == "the file is empty"
    assert errors["cut.png"].startswith("the image cannot be read: ")


def write_wav(path: Path, num_samples: int, rate: int = 16_000) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        noise = np.random.default_rng(num_samples).integers(-9000, 9000, num_samples)
        file.writeframes(noise.astype("<i2").tobytes())


def write_sparse_wav(path: Path, seconds: int) -> None:
    """Silence that takes no room on the disk."""
    size = seconds * 32_000
    form = struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    head = b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + form
    with path.open("wb") as file:
        file.write(head + b"data" + struct.pack("<I", size))
        file.truncate(44 + size)


def test_a_folder_of_audio_is_transcribed(tmp_path: Path) -> None:
    model, folder, output = tmp_path / "model", tmp_path / "clips", tmp_path / "words.jsonl"
    forward_models.save("wav2vec2", model)
    extractor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16_000}
    (model / "preprocessor_config.json").write_text(json.dumps(extractor))
    alphabet = ["<pad>", "|", *"abcdefghij"]
    (model / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(alphabet)}))
    folder.mkdir()
    for name, num_samples in (("a.wav", 4000), ("b.wav", 7000), ("no_time.wav", 0)):
        write_wav(folder / name, num_samples)
    write_wav(folder / "slow.wav", 4000, 8000)
    write_sparse_wav(folder / "ten_hours.wav", 36_000)
    (folder / "empty.wav").touch()
    (folder / "cut.wav").write_bytes((folder / "a.wav").read_bytes()[:5000])
    (folder / "song.mp3").write_bytes(b"ID3")
    batch(model, "--input", folder, "--output", output)
    found = records(output)
    assert [each["file"] for each in found] == ["a.wav", "b.wav"]
    assert all(set(each["transcript"]) <= set("abcdefghij ") for each in found)
    assert found[0]["transcript"] and found[0]["transcript"] != found[1]["transcript"]
    errors = {each["file"]: each["error"] for each in records(Path(f"{output}.errors.jsonl"))}
    assert {name: said.partition(",")[0] for name, said in errors.items()} == {
        "cut.wav": "the WAV file is cut off: it is shorter than it says",
        "empty.wav": "the file is empty",
        "no_time.wav": "the audio is 0 s long",
        "slow.wav": "the audio has 8000 samples a second",
        "song.mp3": ".mp3 files are not read; convert it: ffmpeg -i FILE -ar 16000 FILE.wav",
        "ten_hours.wav": "the audio is 36000 s long",
    }


_FACTORY = """
from torch import nn
def double():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x
    return Double()
"""


def test_rows_of_numbers_go_through_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "doubling.py").write_text(_FACTORY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    table, output = tmp_path / "rows.csv", tmp_path / "doubled.jsonl"
    rows = [f"{index},{index / 4}" for index in range(50)]
    rows[7], rows[9], rows[11] = "7,nan", "9,many", "11"
    table.write_text("\n".join(["x,y", *rows]))
    columns = ("--column", "y", "--column", "x")
    batch("doubling:double", "--input", table, "--output", output, *columns)
    good = [index for index in range(50) if index not in (7, 9, 11)]
    assert [(each["index"], each["outputs"]) for each in records(output)] == [
        (index, {"output": [index / 2, 2.0 * index]}) for index in good
    ]
    errors = records(Path(f"{output}.errors.jsonl"))
    assert [each["index"] for each in errors] == [7, 9, 11]
    assert "NaN" in errors[0]["error"] and "many" in errors[1]["error"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((DENSE, "--input", "."), "a .jsonl file of requests"),
        ((DIGITS, "--input", "rows.csv"), "--column NAME"),
        ((DIGITS, "--input", "rows.jsonl"), "a folder of images or audio"),
        ((DIGITS, "--input", ".", "--max-tokens", "3"), "--max-tokens goes with language models"),
        ((DIGITS, "--input", ".", "--quantization", "int8"), "--quantization goes with"),
        ((DIGITS, "--input", "."), "holds no items; images end with .png"),
        ((DENSE, "--input", "nothing.jsonl"), "there is no input nothing.jsonl"),
        ((DENSE, "--input", "rows.csv", "--column", "z"), "no column 'z'; it has x"),
        ((DENSE, "--input", "rows.jsonl", "--logprobs", "1"), "--logprobs is not told"),
        ((DENSE, "--input", "rows.jsonl", "--output", "rows.jsonl"), "are both rows.jsonl"),
        (("json:loads", "--input", "."), "needs a model folder with preprocessor_config.json"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("x\n1\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    others = () if "--output" in arguments else ("--output", "out.jsonl")
    answer = batch(*arguments, *others, code=2)
    assert said in answer and answer.startswith("spanwise: ") and answer.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()

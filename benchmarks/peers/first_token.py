"""From the start of a process to its first token, for the same folder.

A plain script each, as a user would write it, on all the cores there are. Warm: files are in the
page cache, and vLLM has the folder of what it compiled before. Cold: the files of the model, of the
engine and of the libraries it uses have left the page cache, as far as nobody has them mapped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SPANWISE = """
import sys
from spanwise import LLM, SamplingParams
params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
with LLM(sys.argv[1], devices="cpu", dtype="bfloat16") as llm:
    outputs = llm.generate({"prompt_token_ids": list(range(5, 37))}, params)
    print("first", outputs[0].outputs[0].token_ids, flush=True)
"""
_VLLM = """
import sys
from vllm import LLM, SamplingParams
params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
llm = LLM(model=sys.argv[1], dtype="bfloat16", skip_tokenizer_init=True)
outputs = llm.generate([{"prompt_token_ids": list(range(5, 37))}], params, use_tqdm=False)
print("first", outputs[0].outputs[0].token_ids, flush=True)
"""
_END_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Starter:
    """A script under its Python, and the folders whose files it reads."""

    script: str
    python: Path
    environment: Mapping[str, str]
    folders: tuple[Path, ...]

    def first_token_s(self, model: Path, log: Path) -> float:
        """Seconds from the start of the process to the line that says its first token."""
        command = [str(self.python), "-c", self.script, str(model)]
        with log.open("w") as errors:
            begin_s = time.perf_counter()
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | dict(self.environment),
            )
        assert process.stdout is not None
        with process:
            for line in process.stdout:
                if line.startswith("first"):
                    elapsed_s = time.perf_counter() - begin_s
                    process.wait(_END_TIMEOUT_S)
                    return elapsed_s
        raise SystemExit(
            f"no first token came; see the end of this log:\n{log.read_text()[-4000:]}"
        )

    def forget_files(self, model: Path) -> None:
        """Take its files out of the page cache."""
        for folder in (model, *self.folders):
            for path in folder.rglob("*"):
                if path.is_file():
                    _forget(path)


def _forget(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(handle)  # a page that is not on disk yet stays
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def starters(vllm_python: Path | None, environment: Mapping[str, str]) -> dict[str, Starter]:
    """The engines that are started: Spanwise, and vLLM where its Python is given."""
    source = Path(__file__).resolve().parents[2] / "src"
    own = Starter(_SPANWISE, Path(sys.executable), {}, (source, _libraries(Path(sys.executable))))
    if vllm_python is None:
        return {"spanwise": own}
    vllm = Starter(_VLLM, vllm_python, environment, (_libraries(vllm_python),))
    return {"spanwise": own, "vllm": vllm}


def _libraries(python: Path) -> Path:
    return python.parent.parent / "lib"

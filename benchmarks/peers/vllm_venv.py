"""vLLM for CPU in a venv of its own, .venv-peers, made when it is first wanted (2.4 GB, 2 minutes).

``vllm.txt`` names every version, and pip resolves nothing: what vLLM asks for would bring
torchaudio, torchvision and torchcodec, which a Llama needs not, and with them another torch.

What was found by trying, with vLLM 0.32:

- ``LLM(model=folder, dtype="bfloat16", skip_tokenizer_init=True)`` serves a folder without a
  tokenizer; it logs that it could not warm up a chat template, and goes on.
- As it comes, it compiles the model with inductor and g++, and keeps that in VLLM_CACHE_ROOT; two
  starts with one such folder took 92 and 85 s on a busy machine, so the second saves little. It is
  not asked for ``enforce_eager``.
- VLLM_CPU_OMP_THREADS_BIND names the cores: "0" for one device, "0|1" for two ranks. The cores of
  the process itself are limited besides, for its engine and its workers are processes of their own.
- VLLM_CPU_KVCACHE_SPACE is in GiB, and each rank takes as much. Without it, it takes 0.92 of the
  memory of the machine, and refuses to start where that is not free.
- It preloads its own tcmalloc and torch's libgomp, without being told to.
- The registry's triton has no backend for CPU: with it or without it vLLM says that it goes without
  and takes its kernels in C++, so its gigabyte is left out.
- Its processes poll while they wait, and take a quarter of a busy core (see ``child.py``).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import _setup

_LISTED = Path(__file__).with_name("vllm.txt")


def vllm_python() -> Path:
    """Its interpreter; what is missing is installed first, by one process at a time."""
    environment = _setup.Environment(
        _setup.ROOT / ".venv-peers", "vLLM for CPU", ("--no-deps", "-r", str(_LISTED)), (_LISTED,)
    )
    wanted = _setup.stamp(environment)
    if not _setup.is_ready(environment, wanted):
        with _LISTED.open() as lock:
            _setup.wait_for_lock(environment, lock.fileno())
            if not _setup.is_ready(environment, wanted):
                _setup.make_ready(environment, wanted, lock.fileno())
    return environment.python

"""What one core can do at best: read memory, and multiply by the model's packed weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from answering import Job, Options, serve

_PASSES = 8
_READ_BYTES = 1 << 30


@contextmanager
def start(options: Options) -> Iterator[Callable[[Job], float]]:
    """A filled buffer and the packed linears of a whole model, fused as engines fuse them."""
    import torch

    torch.set_num_threads(len(options["cores"]))
    # Filled: pages that were never written are all the same one.
    buffer = torch.ones(_READ_BYTES // 4, dtype=torch.float32)
    linears = _Linears(options["sizes"])

    def once(job: Job) -> float:
        if job["do"] == "linears":
            return linears.seconds(job["batch"])
        num_bytes: int = job["bytes"]
        # Which of them reads faster differs between processors.
        return min(_seconds(buffer.sum), _seconds(buffer.max)) * num_bytes / _READ_BYTES

    yield lambda job: median(once(job) for _ in range(_PASSES))


def _seconds(function: Callable[[], Any]) -> float:
    begin_s = time.perf_counter()
    function()
    return time.perf_counter() - begin_s


class _Linears:
    """Every linear of a Llama, as oneDNN packs it for a batch."""

    def __init__(self, sizes: dict[str, int]) -> None:
        import torch

        hidden, mlp = sizes["hidden_size"], sizes["intermediate_size"]
        kv = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
        layer = [(hidden + 2 * kv, hidden), (hidden, hidden), (2 * mlp, hidden), (hidden, mlp)]
        shapes = layer * sizes["num_hidden_layers"] + [(sizes["vocab_size"], hidden)]
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self._packed = [
            (columns, reorder(torch.randn(rows, columns).bfloat16(), None))
            for rows, columns in shapes
        ]

    def seconds(self, batch: int) -> float:
        import torch

        inputs: dict[int, Any] = {
            columns: torch.randn(batch, columns).bfloat16() for columns, _ in self._packed
        }
        linear = torch.ops.mkldnn._linear_pointwise

        def step() -> None:
            for columns, weight in self._packed:
                linear(inputs[columns], weight, None, "none", [], "")

        with torch.inference_mode():
            return _seconds(step)


if __name__ == "__main__":
    serve(start, ["torch"])

"""``spanwise bench attention``: two ways to attend, without a model."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from spanwise.cli.bench_devices import DeviceFlag
from spanwise.cli.bench_flags import ResultFlags, Runs
from spanwise.cli.bench_progress import watching
from spanwise.cli.engine_flags import Dtype
from spanwise.cli.numbers import parse_whole_numbers


def attention(
    *,
    lengths: Annotated[str, Parameter(help="Tokens, rising.")] = "1024,2048,4096,8192",
    heads: Annotated[int, Parameter(help="Attention heads.")] = 8,
    head_dim: Annotated[int, Parameter(help="Values of a head.")] = 64,
    dtype: Annotated[Dtype, Parameter(help="auto: float32 on a CPU, bfloat16 on a card.")] = "auto",
    device: DeviceFlag = None,
    runs: Runs = 3,
    results: ResultFlags = ResultFlags(),  # noqa: B008 # frozen
) -> None:
    """Measure memory and time of standard attention against flash attention."""
    from spanwise.bench.attention import AttentionSettings, measure_attention
    from spanwise.bench.devices import default_device
    from spanwise.bench.session import measure_and_save

    chosen = device or default_device()
    usual = "bfloat16" if chosen == "cuda" else "float32"
    settings = AttentionSettings(
        lengths=tuple(parse_whole_numbers("--lengths", [lengths])),
        num_heads=heads,
        head_dim=head_dim,
        dtype=usual if dtype == "auto" else dtype,
        device=chosen,
        num_runs=runs,
    )
    with watching(results.quiet) as progress:
        measure_and_save(lambda each: measure_attention(settings, each), results.output, progress)

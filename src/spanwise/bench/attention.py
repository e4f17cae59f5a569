"""``spanwise bench attention``: what it costs to hold every score, against blocks of them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from spanwise.bench.children import Children
from spanwise.bench.job import AttentionJob, AttentionMethod, AttentionResult, Device
from spanwise.bench.numbers import at_least, rising
from spanwise.bench.outcome import Outcome, Panel, Series, Skipped, Table
from spanwise.bench.spread import Spread, spread
from spanwise.device.devices import cuda_cards, host_memory
from spanwise.errors import InputError

_METHODS: tuple[AttentionMethod, ...] = ("standard", "flash")
_VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Dao et al. 2022, arXiv:2205.14135, and the table beside its code: of training, on cards.
_CLAIMS = {2048: 10.0, 4096: 20.0}
_SPARE = 1.2
# What is freed goes back to the system, so that it does not hide what comes after it.
_PLAIN_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}


class AttentionSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence of each length; ``dtype`` is a torch name."""

    lengths: tuple[int, ...]
    num_heads: int
    head_dim: int
    dtype: str
    device: Device
    num_runs: int

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        rising("lengths", self.lengths)
        at_least("heads", self.num_heads, 1)
        at_least("head_dim", self.head_dim, 1)
        at_least("runs", self.num_runs, 1)


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Of one call. ``added_bytes``: its peak beyond q, k and v, which are ``input_bytes``."""

    input_bytes: int
    added_bytes: int
    time_s: Spread

    @property
    def total_bytes(self) -> int:
        """The peak with q, k and v."""
        return self.input_bytes + self.added_bytes


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """Both methods at one length."""

    length: int
    standard: Cost
    flash: Cost

    @property
    def total_ratio(self) -> float:
        """Standard by flash, the peaks with q, k and v."""
        return self.standard.total_bytes / self.flash.total_bytes

    @property
    def added_ratio(self) -> float:
        """Standard by flash, without q, k and v."""
        return self.standard.added_bytes / max(self.flash.added_bytes, 1)

    @property
    def speed_up(self) -> float:
        """Time of standard by time of flash."""
        return self.standard.time_s.median / self.flash.time_s.median


def measure_attention(settings: AttentionSettings, children: Children) -> Outcome:
    """Measure memory and time of both, each in a fresh process. Raises InputError, EngineError."""
    lengths, skipped = _possible(settings)
    children.expect(2 * len(_METHODS) * len(lengths))
    runs: dict[str, dict[str, list[AttentionResult]]] = {}
    points = []
    for length in lengths:
        found = {method: _measure(settings, children, method, length) for method in _METHODS}
        runs[str(length)] = {name: list(results) for name, results in found.items()}
        costs = {name: _cost(*results) for name, results in found.items()}
        points.append(Point(length=length, standard=costs["standard"], flash=costs["flash"]))
    return Outcome(
        name="attention",
        title=(
            f"attention, one sequence, {settings.num_heads} heads of {settings.head_dim}, "
            f"{settings.dtype}, {settings.device}"
        ),
        settings=settings,
        table=_table(points),
        notes=(
            *verdicts(points),
            *(f"not measured: {each.name}: {each.reason}" for each in skipped),
            "memory: the peak of one forward call with q, k and v, measured ("
            + ("what torch allocates" if settings.device == "cuda" else "resident, per process")
            + f"); time: median of {settings.num_runs} calls; no mask; flash: torch's "
            "scaled_dot_product_attention",
        ),
        results={"points": [_builtins(point) for point in points], "skipped": skipped},
        runs=runs,
        panels=_panels(points),
    )


def verdicts(points: Sequence[Point]) -> list[str]:
    """Of each claim about a length that was measured, whether it holds here."""
    said = []
    for point in points:
        if (claim := _CLAIMS.get(point.length)) is not None:
            said.append(
                f"the claim of {claim:g}x less memory at {point.length // 1024}K "
                f"{'holds' if point.total_ratio >= claim else 'does NOT hold'} here: "
                f"{point.total_ratio:.1f}x with q, k, v and the output, {point.added_ratio:.1f}x "
                "without q, k, v (the claim is of training on a card, this is one forward)"
            )
    return said


def _possible(settings: AttentionSettings) -> tuple[list[int], list[Skipped]]:
    free = cuda_cards()[0][2] if settings.device == "cuda" and cuda_cards() else host_memory()[1]
    lengths, skipped = [], []
    for length in settings.lengths:
        wanted = wanted_bytes(settings, length)
        if wanted > free:
            reason = f"takes about {wanted / 1e9:.1f} GB, {free / 1e9:.1f} are free"
            skipped.append(Skipped(f"{length} tokens", reason))
        else:
            lengths.append(length)
    if not lengths:
        raise InputError(f"{skipped[0].name}: {skipped[0].reason}; lower --lengths or --heads")
    return lengths, skipped


def wanted_bytes(settings: AttentionSettings, length: int) -> int:
    """About what standard attention takes: scores, probabilities, q, k, v and the output."""
    values = settings.num_heads * length * (2 * length + 5 * settings.head_dim)
    return int(_SPARE * values * _VALUE_BYTES[settings.dtype])


def _measure(
    settings: AttentionSettings, children: Children, method: AttentionMethod, length: int
) -> tuple[AttentionResult, AttentionResult]:
    def job(num_runs: int) -> AttentionJob:
        return AttentionJob(
            method=method,
            length=length,
            num_heads=settings.num_heads,
            head_dim=settings.head_dim,
            dtype=settings.dtype,
            device=settings.device,
            num_runs=num_runs,
        )

    name = f"{method} attention, {length} tokens"
    memory = children.run(f"{name}, memory", job(0), AttentionResult, _PLAIN_MALLOC)
    times = children.run(f"{name}, time", job(settings.num_runs), AttentionResult)
    return memory, times


def _cost(memory: AttentionResult, times: AttentionResult) -> Cost:
    assert memory.added_bytes is not None
    return Cost(
        input_bytes=memory.input_bytes,
        added_bytes=memory.added_bytes,
        time_s=spread(times.times_s),
    )


def _builtins(point: Point) -> dict[str, object]:
    fields: dict[str, object] = msgspec.structs.asdict(point)
    return fields | {
        "total_ratio": point.total_ratio,
        "added_ratio": point.added_ratio,
        "speed_up": point.speed_up,
    }


def _table(points: Sequence[Point]) -> Table:
    columns = ("length", "standard MB", "flash MB", "less memory", "without q k v",
               "standard ms", "flash ms", "faster")  # fmt: skip
    rows = tuple(
        (
            f"{point.length}",
            f"{point.standard.total_bytes / 1e6:,.1f}",
            f"{point.flash.total_bytes / 1e6:,.1f}",
            f"{point.total_ratio:.1f}x",
            f"{point.added_ratio:.1f}x",
            f"{point.standard.time_s.median * 1000:,.2f}",
            f"{point.flash.time_s.median * 1000:,.2f}",
            f"{point.speed_up:.2f}x",
        )
        for point in points
    )
    return Table(columns, rows)


def _panels(points: Sequence[Point]) -> tuple[Panel, ...]:
    lengths = tuple(float(point.length) for point in points)
    memory = tuple(
        Series(
            label=name,
            x=lengths,
            y=tuple(getattr(point, name).total_bytes / 1e6 for point in points),
        )
        for name in _METHODS
    )
    times = tuple(
        _time_line(name, lengths, [getattr(point, name).time_s for point in points])
        for name in _METHODS
    )
    ratio = Series(label="measured", x=lengths, y=tuple(point.total_ratio for point in points))
    claims = [(float(length), claim) for length, claim in _CLAIMS.items()]
    claimed = Series(
        label="claimed", x=tuple(x for x, _ in claims), y=tuple(y for _, y in claims), is_ideal=True
    )
    panels = (
        Panel(title="memory, q k v included", y_label="MB", series=memory, is_log_y=True),
        Panel(title="less memory", y_label="times", series=(ratio, claimed)),
        Panel(title="time", y_label="ms", series=times, is_log_y=True),
    )
    return tuple(msgspec.structs.replace(panel, x_label="tokens") for panel in panels)


def _time_line(name: str, lengths: tuple[float, ...], found: Sequence[Spread]) -> Series:
    return Series(
        label=name,
        x=lengths,
        y=tuple(each.median * 1000 for each in found),
        low=tuple(each.low * 1000 for each in found),
        high=tuple(each.high * 1000 for each in found),
    )

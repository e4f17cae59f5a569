"""The layout somebody asks for, before it is known whether it can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Degrees(NamedTuple):
    """How many replicas, stages of each, and ranks of each stage."""

    dp: int
    pp: int
    tp: int

    @property
    def num_ranks(self) -> int:
        """How many devices the degrees take."""
        return self.dp * self.pp * self.tp

    def __str__(self) -> str:
        return f"dp={self.dp} x pp={self.pp} x tp={self.tp}"


@dataclass(frozen=True, kw_only=True)
class LayoutRequest:
    """Degrees as the caller gave them; None is "not given".

    ``pp_layers`` are the layers per stage by hand; without ``pipeline_parallel_size`` their number
    is the number of stages.
    """

    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    data_parallel_size: int | None = None
    enable_expert_parallel: bool = False
    pp_layers: tuple[int, ...] | None = None

    def degrees(self, num_devices: int) -> Degrees:
        """Fill in what was not given: 1, but one replica per device where nothing was given."""
        pp, tp = self.pipeline_parallel_size, self.tensor_parallel_size
        if pp is None and self.pp_layers:
            pp = len(self.pp_layers)
        dp = self.data_parallel_size
        if dp is None:
            dp = num_devices if pp is None and tp is None else 1
        return Degrees(dp, 1 if pp is None else pp, 1 if tp is None else tp)

    def flags(self) -> str:
        """Return the command-line flags that ask for this layout: "-pp 2 -tp 2"."""
        sizes = {
            "-dp": self.data_parallel_size,
            "-pp": self.pipeline_parallel_size,
            "-tp": self.tensor_parallel_size,
        }
        # Without any flag all devices would be used, so one device has to be asked for.
        words = [f"{flag} {size}" for flag, size in sizes.items() if size and size > 1] or ["-dp 1"]
        if self.pp_layers:
            words.append(f"--pp-layers {','.join(map(str, self.pp_layers))}")
        if self.enable_expert_parallel:
            words.append("--enable-expert-parallel")
        return " ".join(words)

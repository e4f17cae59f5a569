"""What of a card's memory is left to a rank's cache."""

from __future__ import annotations

from spanwise.errors import DeviceError

_CONTEXT_BYTES = 1 << 30
"""What CUDA, its libraries and NCCL take for themselves in each process."""


def card_cache_bytes(
    name: str, free_bytes: int, num_ranks: int, weight_bytes: int, margin_share: float
) -> int:
    """Bytes for the cache of one of ``num_ranks`` equal ranks on a card, weights not yet loaded.

    ``free_bytes`` of the whole card, of which ``margin_share`` stays for a step's own tensors.
    Raises DeviceError where the weights do not fit.
    """
    share = int(free_bytes * (1 - margin_share)) // num_ranks
    left = share - weight_bytes - _CONTEXT_BYTES
    if left < 0:
        ranks = f"each of the {num_ranks} ranks" if num_ranks > 1 else "the rank"
        raise DeviceError(
            f"{name} has {_mib(free_bytes)} free, too little for {ranks} on it to hold "
            f"{_mib(weight_bytes)} of weights beside {_mib(_CONTEXT_BYTES)} of CUDA's own and a "
            f"margin of {margin_share:.0%}; use more devices or end what else uses the card"
        )
    return left


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"

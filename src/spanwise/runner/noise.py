"""Gumbel noise without a generator: a hash of (seed, choice, position, token id).

The hash is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014): the output function of its 64-bit state ``key + (id + 1) * gamma``, so each key opens
one SplitMix64 stream and a token's noise is the stream's value at its id. A vocabulary shard asks
for its own ids and gets what the whole vocabulary would give.
"""

from __future__ import annotations

import math

import torch

_GAMMA = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = 2**64
_BITS = 52
_STEP = 2.0**-_BITS

MAX_NOISE = -math.log(-math.log1p(-_STEP / 2))
"""No noise is larger than this (36.7): the largest uniform is half a step below 1."""


def stream_key(seed: int, choice: int, position: int) -> int:
    """Hash what a draw is known by to one signed 64-bit number."""
    key = 0
    for part in (seed, choice, position):
        key = _mix(key + part + _GAMMA)
    return _signed(key)


def gumbel_noise(keys: torch.Tensor | int, token_ids: torch.Tensor) -> torch.Tensor:
    """Give standard Gumbel noise, fp64, in the shape of ``keys`` and ``token_ids`` broadcast.

    ``keys`` come from ``stream_key``; both are int64. The uniforms have 52 bits and are never 0 or
    1, so the noise is finite and at most ``MAX_NOISE``.
    """
    hashed = _mix_each((token_ids + 1) * _signed(_GAMMA) + keys)
    uniform = _shifted(hashed, 64 - _BITS).double().add_(0.5).mul_(_STEP)
    return uniform.log_().neg_().log_().neg_()


def _mix(state: int) -> int:
    """SplitMix64's output function on a number."""
    state %= _WORD
    state = (state ^ (state >> 30)) * _FIRST % _WORD
    state = (state ^ (state >> 27)) * _SECOND % _WORD
    return state ^ (state >> 31)


def _mix_each(state: torch.Tensor) -> torch.Tensor:
    """Do the same to every number of an int64 tensor, in place; products wrap around."""
    state.bitwise_xor_(_shifted(state, 30)).mul_(_signed(_FIRST))
    state.bitwise_xor_(_shifted(state, 27)).mul_(_signed(_SECOND))
    return state.bitwise_xor_(_shifted(state, 31))


def _shifted(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (state >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _signed(word: int) -> int:
    return (word + _WORD // 2) % _WORD - _WORD // 2

"""What a step's rows ask of sampling, brought to where their logits are in one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spanwise.device.memory import move_words
from spanwise.runner.mask import packed_masks
from spanwise.runner.noise import stream_key
from spanwise.runner.penalties import Changes, needs_adjusting
from spanwise.types.sampling import SamplingSpec

_NONE = torch.empty(0, dtype=torch.int64)
_NO_NUMBERS = torch.empty(4, 0, dtype=torch.float64)
_COLDEST = 1e-30
"""Below this a temperature's inverse nears overflow; the draw has long been greedy."""


@dataclass(frozen=True)
class SampleRow:
    """One token to draw: the one at index ``position`` of the sequence.

    ``token_ids`` are the ``position`` tokens before it, the first ``num_prompt`` of them the
    prompt; they are read only where ``needs_adjusting(spec)``. ``allowed``: the tokens that may be
    drawn, as ``packed_masks`` takes them; None for all.
    """

    spec: SamplingSpec
    position: int
    token_ids: Sequence[int]
    num_prompt: int
    allowed: bytes | None = None


@dataclass(frozen=True)
class Draws:
    """Rows to draw: those whose temperature is above 0.

    Beside their ``specs``, tensors [rows] on the device of the logits: the ``rows`` among all of
    the step, ``keys`` of their noise, temperatures (``heat``), and the limits of the filters.
    ``floor``: the logarithm of ``min_p``.
    """

    specs: Sequence[SamplingSpec]
    rows: torch.Tensor
    keys: torch.Tensor
    heat: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    floor: torch.Tensor

    def __getitem__(self, part: slice) -> Draws:
        """Some of them."""
        if part.start == 0 and part.stop >= len(self):
            return self
        limits = self.top_k[part], self.top_p[part], self.floor[part]
        return Draws(self.specs[part], self.rows[part], self.keys[part], self.heat[part], *limits)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.specs)


@dataclass(frozen=True)
class Asked:
    """What is asked of a step's rows, on the device of their logits.

    ``changes`` as ``adjust`` takes them, ``masked`` rows and ``masks`` as ``keep_allowed`` does;
    ``scored``: the rows whose log probabilities are wanted.
    """

    changes: Sequence[torch.Tensor]
    masked: torch.Tensor
    masks: torch.Tensor
    scored: torch.Tensor
    draws: Draws

    @property
    def changes_logits(self) -> bool:
        """Whether some logits are not taken as they are."""
        return len(self.masked) > 0 or any(change.numel() for change in self.changes)


def gather(rows: Sequence[SampleRow], vocab_size: int, device: torch.device) -> Asked:
    """Bring to the device what these rows ask; nothing where nothing is."""
    if not any(_asks(row) for row in rows):
        return _NOTHING
    changes = Changes(vocab_size)
    for index, row in enumerate(rows):
        if needs_adjusting(row.spec):
            changes.add(index, row.spec, row.token_ids, row.num_prompt)
    masks = {index: row.allowed for index, row in enumerate(rows) if row.allowed is not None}
    scored = [index for index, row in enumerate(rows) if row.spec.logprobs >= 0]
    drawn = [index for index, row in enumerate(rows) if row.spec.temperature > 0]
    made = [
        _whole(list(masks)),
        packed_masks(list(masks.values())) if masks else _NONE,
        _whole(scored),
        _whole(drawn),
        _whole([_key(rows[index]) for index in drawn]),
        _real([_numbers(rows[index].spec) for index in drawn]) if drawn else _NO_NUMBERS,
        *changes.tensors(),
    ]
    moved = iter(move_words([tensor for tensor in made if tensor.numel()], device))
    masked, packed, wanted, places, keys, numbers, *changed = (
        next(moved) if tensor.numel() else tensor for tensor in made
    )
    heat, top_k, top_p, floor = numbers
    specs = [rows[at].spec for at in drawn]
    draws = Draws(specs, places, keys, heat.float(), top_k.long(), top_p, floor.float())
    return Asked(changed, masked, packed, wanted, draws)


def _asks(row: SampleRow) -> bool:
    """Whether a row wants more than its largest logit."""
    spec = row.spec
    asks = spec.temperature > 0 or spec.logprobs >= 0 or row.allowed is not None
    return asks or needs_adjusting(spec)


def _whole(numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64) if numbers else _NONE


def _real(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """Columns of the rows, each dense."""
    return torch.tensor(list(zip(*rows, strict=True)), dtype=torch.float64)


def _key(row: SampleRow) -> int:
    return stream_key(row.spec.seed, row.spec.choice, row.position)


def _numbers(spec: SamplingSpec) -> tuple[float, ...]:
    floor = math.log(spec.min_p) if spec.min_p else -math.inf
    return max(spec.temperature, _COLDEST), spec.top_k, spec.top_p, floor


_NOTHING = Asked(
    (), _NONE, _NONE, _NONE, Draws((), _NONE, _NONE, *(_NO_NUMBERS[0] for _ in range(4)))
)

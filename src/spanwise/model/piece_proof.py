"""The proof that pieces give what their module gives, for the example's sizes and for others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from spanwise.errors import InputError, ModelError, reason
from spanwise.model.carried import Carried

# Of the largest value: what rounding in another order may change.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.bfloat16: 4e-2,
    torch.float16: 5e-3,
}


class Runs(Protocol):
    """What a stage does."""

    def run(self, inputs: Sequence[torch.Tensor], inbound: Sequence[Carried]) -> list[Carried]:
        """As ``pieces.Stage``."""
        ...


@dataclass(frozen=True)
class Case:
    """Inputs, and what the whole module makes of them."""

    inputs: Sequence[torch.Tensor]
    outputs: Sequence[torch.Tensor]


def cases(
    module: nn.Module, example: Sequence[torch.Tensor], varying: Sequence[Sequence[int]]
) -> list[Case]:
    """The example, and one with other sizes in all varying dims. Raises ModelError.

    A batch of 1 is among them, for programs are apt to take that for something else.
    """
    batches = [given.shape[0] for given, dims in zip(example, varying, strict=True) if 0 in dims]
    other = 1 if max(batches, default=1) > 1 else 3
    try:
        changed = _case(module, resized(example, varying, other, _shorter))
    except ModelError:  # a length may have to be odd, or have a least
        changed = _case(module, resized(example, varying, other, _next))
    return [_case(module, example), changed]


def several(
    example: Sequence[torch.Tensor], varying: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """The example with no varying dim smaller than 2, which exporting would take for fixed."""
    batches = [given.shape[0] for given, dims in zip(example, varying, strict=True) if 0 in dims]
    return resized(example, varying, max(2, *batches, 0), lambda size: max(2, size))


def resized(
    example: Sequence[torch.Tensor],
    varying: Sequence[Sequence[int]],
    batch: int,
    length: Callable[[int], int],
) -> list[torch.Tensor]:
    """The example's own values over and over, or fewer of them."""
    sized = []
    for given, dims in zip(example, varying, strict=True):
        for dim in dims:
            size = given.shape[dim]
            wanted = length(size) if dim else batch
            if wanted != size:
                given = given.index_select(dim, torch.arange(wanted, device=given.device) % size)
        sized.append(given)
    return sized


def _shorter(size: int) -> int:
    """Another length; equal ones stay equal. Too short ones grow: 0 and 1 are often special."""
    return size - size // 4 if size >= 4 else size + 1


def _next(size: int) -> int:
    return size + 1


def _case(module: nn.Module, inputs: Sequence[torch.Tensor]) -> Case:
    shapes = ", ".join(str(list(given.shape)) for given in inputs)
    versions = [given.clone() for given in inputs]
    with torch.no_grad():
        try:
            outputs = module(*versions)
        except Exception as error:  # the module's own code, which raises what it likes
            raise ModelError(
                f"the module cannot run on inputs {shapes}: {reason(error)}"
            ) from error
    if not isinstance(outputs, tuple) or not all(isinstance(o, torch.Tensor) for o in outputs):
        raise ModelError("the module has to give a tuple of tensors; wrap it in one that does")
    if not all(torch.equal(a, b) for a, b in zip(inputs, versions, strict=True)):
        raise ModelError("its forward writes into its inputs; that is not supported")
    return Case(inputs, outputs)


def run_all(stages: Sequence[Runs], inputs: Sequence[torch.Tensor]) -> Iterator[list[Carried]]:
    """What each stage gives, the next fed with it."""
    carried: list[Carried] = []
    for stage in stages:
        carried = stage.run(inputs, carried)
        yield list(carried)


def prove(stages: Sequence[Runs], case: Case) -> list[list[Carried]]:
    """What passed each border. Raises ModelError where the result is not the module's."""
    kept = [given.clone() for given in case.inputs]
    shapes = ", ".join(str(list(given.shape)) for given in case.inputs)
    with torch.inference_mode():
        try:
            *borders, outputs = run_all(stages, case.inputs)
        except InputError as error:
            raise ModelError(f"its pieces refuse inputs {shapes}: {error}") from error
        except Exception as error:  # the module's own code again
            raise ModelError(f"its pieces cannot run on {shapes}: {reason(error)}") from error
    if not all(torch.equal(a, b) for a, b in zip(case.inputs, kept, strict=True)):
        raise ModelError("its pieces write into the inputs")
    if len(outputs) != len(case.outputs):
        raise ModelError(f"its pieces give {len(outputs)} outputs, not {len(case.outputs)}")
    for number, (own, wanted) in enumerate(zip(outputs, case.outputs, strict=True)):
        if not isinstance(own, torch.Tensor) or not is_same(own, wanted):
            raise ModelError(f"output {number} of its pieces differs from the whole on {shapes}")
    return borders


def is_same(own: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two results differ by no more than rounding; what is not finite is the same."""
    if own.shape != wanted.shape or own.dtype != wanted.dtype or own.device != wanted.device:
        return False
    if wanted.dtype not in _TOLERANCE:
        return torch.equal(own, wanted)
    finite = wanted.isfinite()
    largest = float(wanted[finite].abs().max()) if bool(finite.any()) else 0.0
    atol = _TOLERANCE[wanted.dtype] * largest
    return torch.allclose(own, wanted, rtol=0.0, atol=atol, equal_nan=True)

"""Forward tasks: one item in, one forward, named tensors out. What is said of their tensors."""

from __future__ import annotations

import msgspec


class TensorData(msgspec.Struct, frozen=True, array_like=True):
    """A tensor on its way between processes: row-major bytes, dtype by its torch name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __repr__(self) -> str:
        return f"TensorData({self.name}: {self.dtype}{list(self.shape)})"


class InputSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One input of a model, of one item: without the batch's dim.

    ``shape``: sizes, None where items may differ; None alone: any. ``dtype`` "": any. ``pad``: what
    a shorter item is filled up with to the longest of its batch; None where that would change its
    result, so that only items of equal shape share a batch. ``like``: an input that is made where
    an item lacks it: ``value`` as far as the item's input of that name goes, ``pad`` beyond.
    ``optional``: items may lack it, all of a batch or none.
    """

    name: str
    dtype: str = ""
    shape: tuple[int | None, ...] | None = None
    pad: float | None = None
    like: str = ""
    value: int = 1
    optional: bool = False


class ForwardFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a forward task takes. ``labels`` are the names of classes, by number.

    ``carried_bytes[i]`` goes from piece i to the next for one item, if the model was taken apart.
    """

    inputs: tuple[InputSpec, ...]
    labels: tuple[str, ...] = ()
    carried_bytes: tuple[int, ...] = ()

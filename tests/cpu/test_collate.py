"""Items to batches and back, and what goes over a link between two stages."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from spanwise.errors import InputError, ModelError
from spanwise.model.carried import Carried
from spanwise.model.tensor_data import from_tensor, to_tensor
from spanwise.runner.collate import Batch, collate, outputs_of
from spanwise.runner.forward import Failure, receive, send
from spanwise.types.forward import InputSpec, TensorData

SPECS = (
    InputSpec(name="input_ids", dtype="int64", shape=(None,), pad=9.0),
    InputSpec(name="attention_mask", dtype="int64", shape=(None,), pad=0.0, like="input_ids"),
    InputSpec(name="image", dtype="float32", shape=(2,)),
)


def _item(ids: list[int], image: list[float]) -> tuple[TensorData, ...]:
    tensors = {"input_ids": torch.tensor(ids), "image": torch.tensor(image)}
    return tuple(from_tensor(name, tensor) for name, tensor in tensors.items())


def test_items_are_filled_up_and_masked() -> None:
    items = [_item([1, 2, 3], [0.5, 1.0]), _item([4], [2.0, -1.0])]
    batch = collate(items, SPECS, torch.bfloat16)
    assert batch.names == ("input_ids", "attention_mask", "image")
    ids, mask, image = batch.tensors
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert image.dtype == torch.bfloat16 and image.tolist() == [[0.5, 1.0], [2.0, -1.0]]
    assert (batch.lengths, batch.filled_to) == ((3, 1), 3)


def test_an_items_own_mask_is_kept() -> None:
    own = from_tensor("attention_mask", torch.tensor([1, 0, 1]))
    batch = collate([(*_item([1, 2, 3], [0, 0]), own)], SPECS, None)
    assert batch.tensors[1].tolist() == [[1, 0, 1]]


def test_outputs_are_cut_to_the_items_own_length() -> None:
    batch = Batch(("input_ids",), (torch.zeros(2, 4),), (4, 2), 4)
    tensors = [torch.arange(24.0).reshape(2, 4, 3), torch.ones(2, 4), torch.ones(2, 7)]
    names = ["states", "logits", "other"]
    first, second = outputs_of(
        batch, names, tensors, lambda name, dims: (lambda n: n) if dims == 3 else None
    )
    assert [each.shape for each in first] == [(4, 3), (4,), (7,)]
    assert [each.shape for each in second] == [(2, 3), (4,), (7,)]
    assert torch.equal(to_tensor(second[0]), tensors[0][1, :2])


def test_frames_are_fewer_than_samples() -> None:
    batch = Batch(("input_values",), (torch.zeros(2, 40),), (40, 15), 40)
    logits = torch.randn(2, 4, 5)
    first, second = outputs_of(batch, ["logits"], [logits], lambda *_: lambda n: n // 10)
    assert (first[0].shape, second[0].shape) == ((4, 5), (1, 5))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8]
)
def test_bytes_there_and_back(dtype: torch.dtype) -> None:
    for shape in ((), (3,), (2, 0), (2, 3, 4)):
        tensor = (torch.randn(shape) * 3).to(dtype)
        back = to_tensor(from_tensor("x", tensor))
        assert back.dtype == dtype and torch.equal(back, tensor)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (TensorData("x", "complex64", (1,), b"12345678"), "dtype 'complex64'"),
        (TensorData("x", "float32", (2, 2), b"1234"), "4 bytes"),
    ],
)
def test_bytes_that_are_no_tensor_are_refused(data: TensorData, said: str) -> None:
    with pytest.raises(InputError, match=said):
        to_tensor(data)


class _Line:
    """A link in this process."""

    def __init__(self) -> None:
        self.sent: deque[torch.Tensor] = deque()

    def send(self, tensor: torch.Tensor) -> None:
        if tensor.numel():  # as the ring: what is empty does not travel
            self.sent.append(tensor.clone())

    def recv(self, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(self.sent.popleft()) if out.numel() else out


def test_what_passes_between_stages_comes_as_it_was() -> None:
    given: list[Carried] = [
        torch.randn(2, 3).t(),
        5,
        torch.tensor(True),
        torch.empty(0, 4),
        -1,
        torch.arange(4, dtype=torch.int32),
        torch.randn(1, 2, 1).bfloat16(),
    ]
    line, cpu = _Line(), torch.device("cpu")
    for carried in (given, []):
        send(line, carried, cpu)
        got = receive(line, cpu)
        assert isinstance(got, list) and len(got) == len(carried)
        for one, other in zip(carried, got, strict=True):
            if isinstance(one, torch.Tensor):
                assert isinstance(other, torch.Tensor)
                assert one.dtype == other.dtype and torch.equal(one, other)
            else:
                assert one == other
    send(line, Failure("sizes 3 and 4 — no"), cpu)
    assert receive(line, cpu) == Failure("sizes 3 and 4 — no")
    assert not line.sent


def test_an_output_of_an_unexpected_length_is_whole_where_nothing_was_filled_up() -> None:
    states = [torch.randn(2, 9, 3)]
    alike = Batch(("input_ids",), (torch.zeros(2, 4),), (4, 4), 4)
    first, _ = outputs_of(alike, ["states"], states, lambda *_: lambda n: n)
    assert first[0].shape == (9, 3)
    filled = Batch(("input_ids",), (torch.zeros(2, 4),), (4, 2), 4)
    with pytest.raises(ModelError, match="'states' has 9 entries"):
        outputs_of(filled, ["states"], states, lambda *_: lambda n: n)

"""Items as callers have them, checked and turned into tensors that travel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spanwise.engine.items import Items, read_example, to_array, to_arrays
from spanwise.errors import InputError
from spanwise.types.forward import InputSpec, TensorData

IMAGE = InputSpec(name="pixel_values", dtype="float32", shape=(1, 4, 4))
IDS = InputSpec(name="input_ids", dtype="int64", shape=(None,), pad=0.0)
MASK = InputSpec(name="attention_mask", dtype="int64", shape=(None,), pad=0.0, like="input_ids")
KINDS = InputSpec(name="token_type_ids", dtype="int64", shape=(None,), pad=0.0, optional=True)
TEXT = Items([IDS, MASK, KINDS])


def test_an_array_alone_is_the_first_input() -> None:
    (read,) = Items([IMAGE]).read(np.arange(16.0).reshape(1, 4, 4))
    assert (read.name, read.dtype, read.shape) == ("pixel_values", "float32", (1, 4, 4))
    assert np.array_equal(to_array(read), np.arange(16, dtype=np.float32).reshape(1, 4, 4))


def test_nested_numbers_a_tuple_and_a_dict_are_items_too() -> None:
    (alone,) = TEXT.read([3, 1, 2])
    assert (alone.dtype, alone.shape) == ("int64", (3,))
    both = TEXT.read(([3, 1, 2], [1, 1, 0]))
    assert [each.name for each in both] == ["input_ids", "attention_mask"]
    named = TEXT.read({"token_type_ids": [0, 1], "input_ids": [5, 6]})
    assert [each.name for each in named] == ["input_ids", "token_type_ids"]


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (np.zeros((1, 4, 5)), "'pixel_values' has shape [1, 4, 5], expected [1, 4, 4]"),
        (np.zeros((4, 4)), "'pixel_values' has shape [4, 4], expected [1, 4, 4]"),
        (np.full((1, 4, 4), np.nan), "'pixel_values' holds NaN"),
        (np.array([["a"]]), "'pixel_values' holds"),
        ([[1.0], [1.0, 2.0]], "'pixel_values' is no array"),
        (None, "'pixel_values' holds object"),
        ({}, "'pixel_values' is missing"),
        ({"pixels": 1}, "'pixel_values' is missing"),
        ((np.zeros((1, 4, 4)), 1), "2 inputs were given"),
    ],
)
def test_what_is_wrong_is_named(item: Any, said: str) -> None:
    with pytest.raises(InputError) as error:
        Items([IMAGE]).read(item)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"input_ids": [1, 2], "attention_mask": [1]}, "one length"),
        ({"input_ids": []}, "'input_ids'"),
        ({"input_ids": [1.5]}, "whole numbers"),
        ({"input_ids": [1], "more": 2}, "'more' is not known"),
    ],
)
def test_what_is_wrong_with_texts_is_named(item: Any, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("'", "'")):
        TEXT.read(item)


def test_lengths_that_can_be_filled_up_share_buckets() -> None:
    def shape(length: int) -> object:
        return TEXT.shape(TEXT.read(list(range(length))))

    assert shape(1) == shape(16) != shape(17)
    assert shape(33) == shape(40) != shape(41)
    for length in range(17, 3000):
        longest = next(n for n in range(length, 2 * length) if shape(n + 1) != shape(length))
        assert longest <= 1.25 * length
        if length > 300:
            break
    assert TEXT.cost(TEXT.read([1, 2, 3])) == 3


def test_what_cannot_be_filled_up_must_be_equal() -> None:
    free = Items([InputSpec(name="x")])
    one, two = free.read(np.zeros((3, 5))), free.read(np.zeros((3, 6)))
    assert free.shape(one) != free.shape(two)
    assert free.shape(one) == free.shape(free.read(np.ones((3, 5))))
    assert free.shape(one) != free.shape(free.read(np.zeros((3, 5), np.float32)))
    assert free.cost(one) == 1


def test_an_example_may_name_its_inputs_or_not() -> None:
    assert [each.name for each in read_example((np.zeros(2), np.zeros(3)))] == ["0", "1"]
    assert [each.name for each in read_example({"x": np.zeros(2)})] == ["x"]


def test_bfloat16_comes_as_float32() -> None:
    bits = np.array([0x3F80, 0xC040, 0x0000], np.uint16)  # 1, -3, 0
    got = to_arrays([TensorData("x", "bfloat16", (3,), bits.tobytes())])["x"]
    assert got.dtype == np.float32 and got.tolist() == [1.0, -3.0, 0.0]
    got[0] = 5  # the caller's own


def test_bytes_in_another_order_are_turned() -> None:
    (read,) = Items([InputSpec(name="x")]).read(np.array([0.0, 1.0, 2.5], ">f4"))
    assert read.dtype == "float32" and to_array(read).tolist() == [0.0, 1.0, 2.5]

"""The embedded classifier: the same predictions on every layout, and most of them right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spanwise.engine.model import Model
from spanwise.worker.supervisor import Supervisor

HELD_OUT = Path(__file__).parents[1] / "data" / "digits" / "held_out.npz"


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Supervisor]:
    """One fork server for all layouts."""
    supervisor = Supervisor()
    yield supervisor
    supervisor.shutdown()


def images() -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """As the model's processor gives them, and their labels."""
    with np.load(HELD_OUT) as arrays:
        scaled = (arrays["images"].astype(np.float32) / 255 - 0.5) / 0.5
        return [np.repeat(image[None], 3, 0) for image in scaled], arrays["labels"]


@pytest.fixture(scope="module")
def alone() -> np.ndarray[Any, Any]:
    """The logits of one device."""
    with Model("spanwise/digits-image") as model:
        assert model.labels == tuple("0123456789")
        return np.stack([result["logits"] for result in model.map(images()[0])])


def test_one_device_knows_its_digits(alone: np.ndarray[Any, Any]) -> None:
    labels = images()[1]
    assert len(labels) >= 300
    assert (alone.argmax(1) == labels).mean() >= 0.97


@pytest.mark.parametrize(
    "layout",
    [
        {"data_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 3},
        {"pipeline_parallel_size": 2, "data_parallel_size": 2},
    ],
    ids=str,
)
def test_the_same_predictions_on_every_layout(
    layout: dict[str, Any], alone: np.ndarray[Any, Any], supervisor: Supervisor
) -> None:
    with Model("spanwise/digits-image", devices="cpu", supervisor=supervisor, **layout) as model:
        got = np.stack([result["logits"] for result in model.map(images()[0])])
    assert (got.argmax(1) == alone.argmax(1)).all()
    assert np.abs(got - alone).max() <= 1e-5 * np.abs(alone).max()

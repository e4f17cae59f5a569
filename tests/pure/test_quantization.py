"""What is asked of quantization before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spanwise.cli.engine_flags import EngineFlags, LimitFlags
from spanwise.engine import language_launch as launch
from spanwise.engine.config import EngineConfig, engine_config
from spanwise.errors import DeviceError, InputError
from spanwise.types.worker import DeviceSpec, Quantization, ShardSpec


def test_none_is_the_default_everywhere() -> None:
    assert EngineConfig(model="m").quantization is None
    assert "quantization" not in EngineFlags().llm_arguments()
    shard = ShardSpec(folder="", dtype="float32", first_layer=0, end_layer=1, num_layers=1)
    assert shard.quantization is None


def test_the_flag_reaches_the_config() -> None:
    given = EngineFlags(limits=LimitFlags(quantization="int8")).llm_arguments()
    assert engine_config("m", **given).quantization == "int8"


def test_an_unknown_one_is_refused() -> None:
    unknown: Any = "int3"
    with pytest.raises(InputError, match="quantization 'int3' is not known; use int8, fp8"):
        EngineConfig(model="m", quantization=unknown)


CPU, CARD = DeviceSpec(kind="cpu"), DeviceSpec(kind="cuda", index=1)


@pytest.mark.parametrize(
    ("quantization", "devices", "said"),
    [
        ("int8", (CPU, CARD), "int8 is for CPU devices, not for cuda:1; .*fp8"),
        ("fp8", (CARD, CPU), "fp8 is for CUDA cards of .* 8.9 or more, not for cpu:0; use int8"),
        ("fp8", (CARD,), r"fp8 is for CUDA cards of .* 8.9 or more, cuda:1 has 8\.6; leave it out"),
    ],
)
def test_other_devices_are_refused_before_anything_starts(
    quantization: Quantization,
    devices: tuple[DeviceSpec, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "devices_for", lambda *_: devices)
    second = (8, 9) if CPU in devices else (8, 6)
    monkeypatch.setattr(launch.quantization, "cuda_capabilities", lambda: [(9, 0), second])
    with pytest.raises(DeviceError, match=said) as refused:
        launch.launch(EngineConfig(model="m", quantization=quantization), Path("m"), lambda _: None)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_newer_cards_have_8_bit_floats(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.quantization, "cuda_capabilities", lambda: [(7, 0), capability])
    launch.quantization.check_devices("fp8", (CARD,))
    launch.quantization.check_devices("int8", (CPU,))

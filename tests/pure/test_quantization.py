"""What is asked of quantization before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spanwise.cli.engine_flags import EngineFlags, LimitFlags
from spanwise.engine import launch
from spanwise.engine.config import EngineConfig, engine_config
from spanwise.errors import DeviceError, InputError
from spanwise.types.worker import DeviceSpec, ShardSpec


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
    with pytest.raises(InputError, match="quantization 'int3' is not known; use int8"):
        EngineConfig(model="m", quantization=unknown)


def test_cards_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = (DeviceSpec(kind="cpu"), DeviceSpec(kind="cuda", index=1))
    monkeypatch.setattr(launch, "parse_devices", lambda *_: mixed)
    with pytest.raises(DeviceError, match="int8 is for CPU devices, not for cuda:1") as refused:
        launch.launch(EngineConfig(model="m", quantization="int8"), Path("m"), lambda _: None)
    assert "\n" not in str(refused.value)

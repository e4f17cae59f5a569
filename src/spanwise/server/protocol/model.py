"""``/v1/models`` and what a server says of itself."""

from __future__ import annotations

from typing import Literal

import msgspec


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["spanwise"] = "spanwise"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All names of what is served."""

    object: Literal["list"] = "list"
    data: list[Model]


class RankStatus(msgspec.Struct, frozen=True):
    """One rank, and when its model thread was last heard of."""

    name: str
    device: str
    age_s: float
    healthy: bool


class HealthStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``/health`` where all is well."""

    status: Literal["ok"] = "ok"
    ranks: list[RankStatus]


class ReadyStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``/ready`` where requests are taken."""

    status: Literal["ready"] = "ready"


class Version(msgspec.Struct, frozen=True):
    """The answer to ``/version``."""

    version: str

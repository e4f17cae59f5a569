"""``/v1/embeddings``: what answers say."""

from __future__ import annotations

from typing import Literal

import msgspec

from spanwise.server.protocol.usage import EmbeddingUsage


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """One vector: numbers, or their little-endian 32-bit floats in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    """The vectors, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage

"""``/v1/embeddings``: what a request may say."""

from __future__ import annotations

from typing import Annotated, Literal

from spanwise.server.protocol.prompts import Inputs
from spanwise.server.protocol.sampling import RequestFields
from spanwise.server.protocol.strict import Strict, Unsupported


class EmbeddingRequest(RequestFields, Strict):
    """The body of an embedding request. ``pooling`` is Spanwise's own: which states become it."""

    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    normalize: bool | None = None
    pooling: Literal["last", "mean"] | None = None
    add_special_tokens: bool | None = None

    dimensions: Annotated[object, Unsupported()] = None
    truncate_prompt_tokens: Annotated[object, Unsupported()] = None

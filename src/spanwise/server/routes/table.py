"""All routes: what they take, what they give, and who answers them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from starlette.responses import Response

from spanwise.server.errors import ErrorAnswer
from spanwise.server.exchange import Exchange
from spanwise.server.page.status import ServerStatus, status
from spanwise.server.protocol.chat import ChatRequest
from spanwise.server.protocol.chat_answer import ChatChunk, ChatCompletion
from spanwise.server.protocol.completion import CompletionRequest
from spanwise.server.protocol.completion_answer import Completion
from spanwise.server.protocol.embedding import EmbeddingRequest
from spanwise.server.protocol.embedding_answer import Embeddings
from spanwise.server.protocol.model import (
    HealthStatus,
    Model,
    ModelList,
    ReadyStatus,
    Version,
)
from spanwise.server.protocol.response import ResponseRequest
from spanwise.server.protocol.response_answer import EVENTS as RESPONSE_EVENTS
from spanwise.server.protocol.response_answer import Response as ResponseObject
from spanwise.server.protocol.strict import Strict
from spanwise.server.protocol.tokenization import (
    DetokenizeRequest,
    Text,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
)
from spanwise.server.routes.chat import chat_completions
from spanwise.server.routes.completions import completions
from spanwise.server.routes.embeddings import embeddings
from spanwise.server.routes.health import health, metrics, ready
from spanwise.server.routes.models import list_models, show_model, show_version
from spanwise.server.routes.responses import responses
from spanwise.server.routes.tokenization import detokenize, tokenize, tokenizer_info
from spanwise.server.service import Service

_DONE = "[DONE]"

Handler = Callable[[Service, Exchange], Awaitable[Response]]


@dataclass(frozen=True)
class RouteSpec:
    """One route. ``answer`` None: it answers in text that is no JSON.

    ``events``: what the data of a streamed answer's events may be, where there may be one: the
    JSON of a record, or a text. ``computes``: it needs a place in the engine.
    """

    path: str
    handler: Handler
    summary: str
    answer: type[msgspec.Struct] | None
    body: type[Strict] | None = None
    events: tuple[type[msgspec.Struct] | str, ...] = ()
    computes: bool = False

    @property
    def method(self) -> str:
        """The one that it takes."""
        return "GET" if self.body is None else "POST"


ROUTES = (
    RouteSpec(
        "/v1/chat/completions",
        chat_completions,
        "Answer a conversation",
        ChatCompletion,
        ChatRequest,
        (ChatChunk, ErrorAnswer, _DONE),
        computes=True,
    ),
    RouteSpec(
        "/v1/completions",
        completions,
        "Complete texts",
        Completion,
        CompletionRequest,
        (Completion, ErrorAnswer, _DONE),
        computes=True,
    ),
    RouteSpec(
        "/v1/responses",
        responses,
        "Respond to an input",
        ResponseObject,
        ResponseRequest,
        RESPONSE_EVENTS,
        computes=True,
    ),
    RouteSpec(
        "/v1/embeddings", embeddings, "Make vectors", Embeddings, EmbeddingRequest, computes=True
    ),
    RouteSpec("/v1/models", list_models, "List the model's names", ModelList),
    RouteSpec("/v1/models/{model:path}", show_model, "Show one name", Model),
    RouteSpec("/tokenize", tokenize, "Make tokens", Tokens, TokenizeRequest),
    RouteSpec("/detokenize", detokenize, "Make text", Text, DetokenizeRequest),
    RouteSpec("/tokenizer_info", tokenizer_info, "Describe the tokenizer", TokenizerInfo),
    RouteSpec("/health", health, "Whether every thread answers", HealthStatus),
    RouteSpec("/ready", ready, "Whether requests are taken", ReadyStatus),
    RouteSpec("/status", status, "Show plan, health and counts", ServerStatus),
    RouteSpec("/version", show_version, "Show the version", Version),
    RouteSpec("/metrics", metrics, "Count, for Prometheus", None),
)

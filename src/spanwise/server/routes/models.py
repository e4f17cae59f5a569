"""``/v1/models`` and ``/version``."""

from __future__ import annotations

from starlette.responses import Response

from spanwise.server.answers import json_answer
from spanwise.server.exchange import Exchange
from spanwise.server.protocol.model import Model, ModelList, Version
from spanwise.server.service import Service, version


async def list_models(service: Service, exchange: Exchange) -> Response:
    """What the model is called here."""
    return json_answer(ModelList(data=[_model(service, name) for name in service.model_names]))


async def show_model(service: Service, exchange: Exchange) -> Response:
    """One of these names."""
    name = service.check_model(exchange.path_parameter("model"))
    return json_answer(_model(service, name))


async def show_version(service: Service, exchange: Exchange) -> Response:
    """The version of the server."""
    return json_answer(Version(version()))


def _model(service: Service, name: str) -> Model:
    return Model(
        id=name,
        created=service.created,
        root=service.own_name,
        max_model_len=service.plan.max_model_len,
    )

"""The HTTP application: its routes, and what every request passes through on its way in and out."""

from __future__ import annotations

import hmac
import logging

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from server.completions import chat_completions, completions
from server.errors import RETRY_AFTER_SECONDS, STATUS, ApiError, api_error, error_json, shutting_down
from server.metrics import CONTENT_TYPE
from server.responses import ModelCard, ModelList
from server.state import STATE, ServerState

MAX_BODY_BYTES = 32 * 2**20
_TYPE_OF_STATUS = {status: type_ for type_, status in STATUS.items()}

log = logging.getLogger("server")


def make_app(state: ServerState) -> web.Application:
    app = web.Application(middlewares=[_errors, _authorised], client_max_size=MAX_BODY_BYTES)
    app[STATE] = state
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat_completions),
            web.post("/v1/completions", completions),
            web.get("/v1/models", _models),
            web.get("/v1/models/{model:.+}", _model),
            web.get("/health", _health),
            web.get("/metrics", _metrics),
        ]
    )
    app.on_response_prepare.append(_count)
    return app


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong before a response has begun becomes an error in OpenAI's shape, with its status."""
    try:
        return await handler(request)
    except web.HTTPException as error:  # aiohttp's own: no such route, wrong method, body too large
        message = f"{error.reason}: {request.method} {request.path}"
        if error.status == 413:
            message = f"the body is larger than {MAX_BODY_BYTES} bytes"
        status = error.status if error.status in _TYPE_OF_STATUS else 400
        failure = ApiError(_TYPE_OF_STATUS[status], message)
    except ConnectionError:
        raise  # the client has left; there is nobody to tell
    except Exception as error:
        failure = api_error(error)
        if failure.status == 500 and not isinstance(error, ApiError):
            log.exception("%s %s failed", request.method, request.path)
    headers = {}
    if failure.status in RETRY_AFTER_SECONDS:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS[failure.status])
    return web.Response(
        status=failure.status, body=error_json(failure), content_type="application/json", headers=headers
    )


@web.middleware
async def _authorised(request: web.Request, handler: Handler) -> web.StreamResponse:
    """With --api-key, everything but /health wants `Authorization: Bearer KEY`; every key is compared in full."""
    keys = request.app[STATE].api_keys
    if keys and request.path != "/health":
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        token = given.strip().encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(token, key) for key in keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError("authentication_error", "wrong or missing API key", code="invalid_api_key")
    return await handler(request)


async def _count(request: web.Request, response: web.StreamResponse) -> None:
    resource = request.match_info.route.resource
    route = "none" if resource is None else resource.canonical
    request.app[STATE].metrics.responses.labels(route, str(response.status)).inc()


async def _health(request: web.Request) -> web.Response:
    """200 while requests are taken; 503 when the engine is gone or the server shuts down."""
    state = request.app[STATE]
    state.check_engine()
    if state.admission.closed:
        raise shutting_down()
    return web.json_response({"status": "ok"})


async def _metrics(request: web.Request) -> web.Response:
    return web.Response(body=request.app[STATE].metrics.render(), headers={"Content-Type": CONTENT_TYPE})


async def _models(request: web.Request) -> web.Response:
    return _json(ModelList(data=[_card(request.app[STATE])]))


async def _model(request: web.Request) -> web.Response:
    state = request.app[STATE]
    state.check_model(request.match_info["model"])
    return _json(_card(state))


def _card(state: ServerState) -> ModelCard:
    return ModelCard(
        id=state.model_name, created=state.created, root=state.model_path, max_model_len=state.engine.info.max_len
    )


def _json(value: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")

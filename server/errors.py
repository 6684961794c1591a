"""Every error a client can get: its type, its status, its shape. The one place that knows HTTP statuses of failures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from engine.errors import RequestError

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "method_not_allowed_error",
    "request_timeout_error",
    "request_too_large_error",
    "rate_limit_error",
    "service_unavailable_error",
    "server_error",
]

STATUS: dict[ErrorType, int] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "not_found_error": 404,
    "method_not_allowed_error": 405,
    "request_timeout_error": 408,
    "request_too_large_error": 413,
    "rate_limit_error": 429,
    "server_error": 500,
    "service_unavailable_error": 503,
}
RETRY_AFTER_SECONDS = {429: 1, 503: 5}


@dataclass
class ApiError(Exception):
    """Ends a request with the status of its type. `param`: the offending field; `code`: a word for programs."""

    type: ErrorType
    message: str
    param: str | None = None
    code: str | None = None

    @property
    def status(self) -> int:
        return STATUS[self.type]


class EngineGone(Exception):
    """The engine's process has ended; requests it had cannot be finished."""


def shutting_down() -> ApiError:
    return ApiError("service_unavailable_error", "the server is shutting down", code="shutting_down")


class ErrorInfo(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """OpenAI's error shape."""

    error: ErrorInfo


def api_error(error: Exception) -> ApiError:
    """What a client is told of an exception. Of a fault of the server's own, no more than that there was one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError("invalid_request_error", str(error), error.param)
    if isinstance(error, EngineGone):
        return ApiError("service_unavailable_error", str(error), code="engine_gone")
    return ApiError("server_error", "the server failed to serve this request; its log says why")


def error_json(error: ApiError) -> bytes:
    info = ErrorInfo(error.message, error.type, error.param, error.code)
    return msgspec.json.encode(ErrorBody(info))

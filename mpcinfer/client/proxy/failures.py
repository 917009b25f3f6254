"""Errors as OpenAI's API tells them. The status comes from `mpcinfer.errors`, where it is written once."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from mpcinfer.client.proxy.body import ParameterError
from mpcinfer.errors import (
    BusyError,
    ContextLengthError,
    IdentityError,
    InputError,
    MpcInferError,
    NotFoundError,
)

_log = logging.getLogger(__name__)


class TokenError(IdentityError):
    """The caller's token is missing or wrong. Never leaves the proxy."""


_CODES: dict[type[MpcInferError], str] = {
    NotFoundError: "model_not_found",
    ContextLengthError: "context_length_exceeded",
    BusyError: "rate_limit_exceeded",
    TokenError: "invalid_api_key",
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def problem(error: BaseException) -> tuple[int, dict[str, Any]]:
    """The status and the error object for what went wrong.

    What nobody raised on purpose is a bug: its message may hold anything, so that only its kind and place are logged.
    """
    param = code = None
    if isinstance(error, MpcInferError):
        status, message = error.http_status, str(error)
        code = _CODES.get(type(error)) or (None if isinstance(error, InputError) else error.grpc_status.lower())
        param = "model" if isinstance(error, NotFoundError) else None
        if isinstance(error, ParameterError):
            param, code = error.param, error.code
    elif isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
    else:
        status, message = 500, "an error inside the proxy; its log says where"
        place = traceback.extract_tb(error.__traceback__)[-1:]
        at = f"{place[0].filename}:{place[0].lineno}" if place else "an unknown place"
        _log.error("%s at %s", type(error).__name__, at)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"message": message, "type": kind, "param": param, "code": code}


def refusal(error: BaseException) -> JSONResponse:
    """A whole response that tells an error."""
    status, content = problem(error)
    headers = getattr(error, "headers", None)
    if status == 401 and headers is None:
        headers = {"WWW-Authenticate": "Bearer"}
    return JSONResponse({"error": content}, status, headers)

"""Errors as problem details (RFC 9457): the exceptions of `services.errors`, by status.

::

    {"type": "urn:milonga:problem:InvalidInputError", "title": "Bad Request", "status": 400, "detail": "…",
     "errors": [{"field": "audio_length", "description": "is 99 s, must be between 0.16 and 10 s"}]}
"""

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from services.errors import (
    AlreadyUnderWayError,
    ConnectionOptionsError,
    DeadlineExceededError,
    FieldViolation,
    InvalidInputError,
    MilongaError,
    PermissionDeniedError,
    QueueFullError,
    QuotaExceededError,
    RequestCancelledError,
    ServiceUnavailableError,
    TooLargeError,
    UnauthenticatedError,
    UnsupportedError,
    shown_value,
)

log = structlog.get_logger()

CLIENT_GONE: Final = 499
"""Status in metrics and logs for a client that went away, as nginx has it."""
PROBLEM_JSON: Final = "application/problem+json"


class ClientGoneError(RequestCancelledError):
    """The client went away before its response."""


class UnknownModelError(InvalidInputError):
    """No served model has the name that a request asks for."""


class BodyTooLargeError(MilongaError):
    """A body is larger than the web door accepts."""


class SlowBodyError(MilongaError):
    """A body did not arrive in time."""


class ForeignOriginError(MilongaError):
    """A page of another site made a browser send the request."""


STATUSES: Final[Mapping[type[MilongaError], HTTPStatus]] = {
    InvalidInputError: HTTPStatus.BAD_REQUEST,
    UnauthenticatedError: HTTPStatus.UNAUTHORIZED,
    PermissionDeniedError: HTTPStatus.FORBIDDEN,
    ForeignOriginError: HTTPStatus.FORBIDDEN,
    UnknownModelError: HTTPStatus.NOT_FOUND,
    SlowBodyError: HTTPStatus.REQUEST_TIMEOUT,
    AlreadyUnderWayError: HTTPStatus.CONFLICT,
    BodyTooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    TooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    QuotaExceededError: HTTPStatus.TOO_MANY_REQUESTS,
    UnsupportedError: HTTPStatus.NOT_IMPLEMENTED,
    QueueFullError: HTTPStatus.SERVICE_UNAVAILABLE,
    ServiceUnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
    ConnectionOptionsError: HTTPStatus.BAD_GATEWAY,
    DeadlineExceededError: HTTPStatus.GATEWAY_TIMEOUT,
    RequestCancelledError: HTTPStatus.SERVICE_UNAVAILABLE,
}
"""Status of each exception class. Any other exception is an internal error: 500."""


def status_of(error: Exception) -> HTTPStatus:
    """Return the status of an exception: that of its nearest class in `STATUSES`."""
    known = (STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
    return next(known, HTTPStatus.INTERNAL_SERVER_ERROR)


def problem(error: Exception) -> dict[str, Any]:
    """Return the problem details of an exception. Those of a bug say nothing of it."""
    status = status_of(error)
    known = isinstance(error, MilongaError)
    found: dict[str, Any] = {
        "type": f"urn:milonga:problem:{type(error).__name__ if known else 'InternalError'}",
        "title": status.phrase,
        "status": status.value,
        "detail": str(error) if known else "internal error; the web door's log has its cause",
    }
    if isinstance(error, InvalidInputError):
        found["errors"] = [{"field": one.field, "description": one.description} for one in error.violations]
    if isinstance(error, QueueFullError):
        found["retry_after"] = error.retry_after
    return found


def respond(error: Exception) -> Response:
    """Return the response that reports an exception; a bug is also logged."""
    if isinstance(error, ClientGoneError):
        return Response(status_code=CLIENT_GONE)
    if not isinstance(error, MilongaError):
        log.error("request failed", exc_info=error)
    headers: dict[str, str] = {}
    if isinstance(error, UnauthenticatedError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return JSONResponse(problem(error), status_of(error), headers, PROBLEM_JSON)


async def on_error(request: Request, error: Exception) -> Response:
    """Report an exception that an endpoint raised."""
    return respond(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Report an error of HTTP itself, such as an unknown path."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    detail = str(error.detail)
    if status is HTTPStatus.NOT_FOUND:
        detail = f"there is no {request.url.path[:80]!r}; /docs lists the paths"
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"{request.url.path} does not take {request.method}"
    body = {
        "type": "about:blank", "title": status.phrase, "status": status.value, "detail": detail,
    }  # fmt: skip
    return JSONResponse(body, status, error.headers, PROBLEM_JSON)


async def on_invalid(request: Request, error: Exception) -> Response:
    """Report a body or a query of the wrong form."""
    assert isinstance(error, RequestValidationError)
    return respond(InvalidInputError(*(_violation(fault) for fault in error.errors())))


def check_query(request: Request, *known: str) -> None:
    """Raise `InvalidInputError` if a query has a name that is not known, or one twice."""
    names = [name for name, _ in request.query_params.multi_items()]
    unknown = [name for name in dict.fromkeys(names) if name not in known]
    twice = [name for name in known if names.count(name) > 1]
    faults = [FieldViolation(_shortened(one), "is unknown in the query; leave it out") for one in unknown]
    faults += [FieldViolation(one, "is given twice in the query; give it once") for one in twice]
    if faults:
        raise InvalidInputError(*faults)


def _violation(fault: Mapping[str, Any]) -> FieldViolation:
    place, kind = [part for part in fault["loc"] if part not in ("body", "query")], fault["type"]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    shown = shown_value(fault.get("input"))
    match kind:
        case "json_invalid":
            reason = fault.get("ctx", {}).get("error", "")
            return FieldViolation("body", f"is no JSON ({reason} at character {place[-1] if place else 0})")
        case "missing":
            return FieldViolation(field or "body", "is missing; give it")
        case "extra_forbidden":
            return FieldViolation(_shortened(field), "is unknown; leave it out (/docs lists the fields)")
        case "model_attributes_type" | "dict_type" if not field:
            return FieldViolation("body", f"is {shown}, must be a JSON object")
    message = str(fault["msg"]).removeprefix("Value error, ")
    return FieldViolation(_shortened(field) or "body", f"is {shown}: {message[:1].lower()}{message[1:]}")


def _shortened(field: str) -> str:
    return field if len(field) <= 80 else f"{field[:80]}…"

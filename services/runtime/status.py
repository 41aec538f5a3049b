"""The one table between `services.errors` and gRPC statuses: the server reads it, the client backwards.

A status carries google.rpc details: ErrorInfo (which class of the tree), RequestInfo (the id under which the
server's log has it), BadRequest (every violated field), RetryInfo (when to come back).
"""

import math
from collections.abc import Mapping, Sequence

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from services.errors import (
    AlreadyUnderWayError,
    DeadlineExceededError,
    DigestMismatchError,
    FieldViolation,
    InvalidInputError,
    MilongaError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    OutputError,
    QueueFullError,
    RequestCancelledError,
    ServiceUnavailableError,
    UnauthenticatedError,
    UnsupportedError,
)

STATUS_CODES: dict[type[MilongaError], grpc.StatusCode] = {
    InvalidInputError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelError: grpc.StatusCode.FAILED_PRECONDITION,
    ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    ModelFormatError: grpc.StatusCode.FAILED_PRECONDITION,
    DigestMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RequestCancelledError: grpc.StatusCode.CANCELLED,
    DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    ServiceUnavailableError: grpc.StatusCode.UNAVAILABLE,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    AlreadyUnderWayError: grpc.StatusCode.ABORTED,
    UnsupportedError: grpc.StatusCode.UNIMPLEMENTED,
    OutputError: grpc.StatusCode.INTERNAL,
}
"""Every class of the tree that crosses the wire. What is not here is our fault: INTERNAL."""

INFERENCE_STATUS_CODES: dict[type[MilongaError], grpc.StatusCode] = STATUS_CODES | {
    ModelError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelFormatError: grpc.StatusCode.INVALID_ARGUMENT,
    DigestMismatchError: grpc.StatusCode.INVALID_ARGUMENT,
    QueueFullError: grpc.StatusCode.UNAVAILABLE,
    AlreadyUnderWayError: grpc.StatusCode.UNAVAILABLE,
}
"""The same for the Open Inference Protocol: what Triton answers in their place."""

ERROR_DOMAIN = "milonga"
"""`domain` of every ErrorInfo."""

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata under which gRPC carries a google.rpc.Status."""

MAX_TEXT_CHARACTERS = 1000
"""Status text travels in HTTP/2 headers, which clients limit to 8 KiB: longer messages are cut."""

MAX_VIOLATION_BYTES = 2500
"""So do the violations, a third larger in base64: of very many, the first ones are told."""

_CLASSES = {error.__name__: error for error in STATUS_CODES}

_AMBIGUOUS = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
)
"""Codes that alone, without our ErrorInfo, name no class of the tree."""


def status_code(
    error: BaseException, codes: Mapping[type[MilongaError], grpc.StatusCode] = STATUS_CODES
) -> grpc.StatusCode:
    """Code of an exception: that of its nearest class in `codes`, INTERNAL where there is none."""
    known = (codes[kind] for kind in type(error).__mro__ if kind in codes)
    return next(known, grpc.StatusCode.INTERNAL)


def to_status(
    error: BaseException,
    request_id: str,
    codes: Mapping[type[MilongaError], grpc.StatusCode] = STATUS_CODES,
) -> status_pb2.Status:
    """Return the status of an exception, details included.

    The text of an exception outside the tree stays on the server: it may hold paths or prompts of others.
    """
    code: int = status_code(error, codes).value[0]
    if not isinstance(error, MilongaError):
        message = f"internal error; the service's log has its cause under request_id {request_id}"
        return status_pb2.Status(
            code=code, message=message, details=[_pack(error_details_pb2.RequestInfo(request_id=request_id))]
        )
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=ERROR_DOMAIN),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if isinstance(error, InvalidInputError):
        details.append(_bad_request(error.violations))
    if isinstance(error, QueueFullError):
        details.append(error_details_pb2.RetryInfo(retry_delay=_duration(error.retry_after)))
    return status_pb2.Status(
        code=code, message=str(error)[:MAX_TEXT_CHARACTERS], details=[_pack(detail) for detail in details]
    )


def from_status(code: grpc.StatusCode, text: str, details: bytes | None) -> MilongaError:
    """Return the exception of a status: what `to_status` was given, as far as the wire carries it.

    `details` is the serialized google.rpc.Status of the trailing metadata, None where there is none: statuses
    that gRPC itself, a proxy or another server made are understood by their code.
    """
    rich = _parse(details)
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in rich.details:
        for kind in (info, bad_request, retry):
            if detail.Is(kind.DESCRIPTOR):
                detail.Unpack(kind)
    message = " ".join((rich.message or text).split()) or code.name
    kind_of_error = _CLASSES.get(info.reason) if info.domain == ERROR_DOMAIN else None
    return _rebuild(kind_of_error or _class_of_code(code, retry), code, message, bad_request, retry)


def retry_delay(details: bytes | None) -> float | None:
    """Return the seconds that a status asks its caller to stay away; None where it does not say.

    `details` as for `from_status`. Any code may carry it: proxies say so of UNAVAILABLE too.
    """
    retry = error_details_pb2.RetryInfo()
    for detail in _parse(details).details:
        if detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
    return retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None


def _rebuild(
    kind: type[MilongaError],
    code: grpc.StatusCode,
    message: str,
    bad_request: error_details_pb2.BadRequest,
    retry: error_details_pb2.RetryInfo,
) -> MilongaError:
    if kind is InvalidInputError:
        violations = [FieldViolation(v.field, v.description) for v in bad_request.field_violations]
        return InvalidInputError(*(violations or [FieldViolation("request", message)]))
    if kind is QueueFullError:
        return QueueFullError(message, retry_after=retry.retry_delay.ToNanoseconds() / 1e9)
    if kind is MilongaError:
        return MilongaError(f"the service answered {code.name}: {message}")
    return kind(message)


def _class_of_code(code: grpc.StatusCode, retry: error_details_pb2.RetryInfo) -> type[MilongaError]:
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # gRPC itself gives this code to messages over the size limit, where coming back would not help.
        return QueueFullError if retry.HasField("retry_delay") else MilongaError
    if code in _AMBIGUOUS:
        return MilongaError
    return next((kind for kind, known in STATUS_CODES.items() if known is code), MilongaError)


def _bad_request(violations: Sequence[FieldViolation]) -> error_details_pb2.BadRequest:
    """The violations; of more than the trailers hold, the first ones and how many there are besides."""
    told = error_details_pb2.BadRequest()
    for number, violation in enumerate(violations):
        told.field_violations.add(field=violation.field, description=violation.description)
        if number and told.ByteSize() > MAX_VIOLATION_BYTES:
            del told.field_violations[-1]
            left = len(violations) - number
            told.field_violations.add(
                field=violation.field,
                description=f"is wrong as well, and so are {left - 1} more; mend the others first",
            )
            break
    return told


def _duration(seconds: float) -> Duration:
    # At least a millisecond: a delay of 0 would mean to hammer a service that is full.
    duration = Duration()
    duration.FromMilliseconds(max(1, math.ceil(seconds * 1000)))
    return duration


def _pack(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed


def _parse(details: bytes | None) -> status_pb2.Status:
    try:
        return status_pb2.Status.FromString(details or b"")
    except DecodeError:
        return status_pb2.Status()

"""Map `services.errors` to gRPC statuses (in the server) and statuses back to exceptions (in the client).

A status carries google.rpc details: ErrorInfo (name of the exception's class), RequestInfo (request id in the
server's log), BadRequest (every invalid field) and RetryInfo (time to wait before a retry).
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
    ConnectionOptionsError,
    DeadlineExceededError,
    DigestMismatchError,
    FieldViolation,
    InvalidInputError,
    MilongaError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    NotFiniteError,
    OutputError,
    PermissionDeniedError,
    QueueFullError,
    QuotaExceededError,
    RequestCancelledError,
    ServiceUnavailableError,
    TooLargeError,
    UnauthenticatedError,
    UnsupportedError,
    is_out_of_memory,
)

STATUS_CODES: dict[type[MilongaError], grpc.StatusCode] = {
    InvalidInputError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelError: grpc.StatusCode.FAILED_PRECONDITION,
    ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    ModelFormatError: grpc.StatusCode.FAILED_PRECONDITION,
    DigestMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    QuotaExceededError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TooLargeError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotFiniteError: grpc.StatusCode.INTERNAL,
    RequestCancelledError: grpc.StatusCode.CANCELLED,
    DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    ServiceUnavailableError: grpc.StatusCode.UNAVAILABLE,
    ConnectionOptionsError: grpc.StatusCode.UNAVAILABLE,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    AlreadyUnderWayError: grpc.StatusCode.ABORTED,
    UnsupportedError: grpc.StatusCode.UNIMPLEMENTED,
    OutputError: grpc.StatusCode.INTERNAL,
}
"""Status code of each exception class. Any other exception is an internal error: INTERNAL."""

INFERENCE_STATUS_CODES: dict[type[MilongaError], grpc.StatusCode] = STATUS_CODES | {
    ModelError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelFormatError: grpc.StatusCode.INVALID_ARGUMENT,
    DigestMismatchError: grpc.StatusCode.INVALID_ARGUMENT,
    QueueFullError: grpc.StatusCode.UNAVAILABLE,
    AlreadyUnderWayError: grpc.StatusCode.UNAVAILABLE,
}
"""The same for the Open Inference Protocol, with the codes that Triton uses."""

ERROR_DOMAIN = "milonga"
"""`domain` of every ErrorInfo that a milonga service sends."""

DETAILS_KEY = "grpc-status-details-bin"
"""Key of the trailing metadata in which gRPC sends a google.rpc.Status."""

MAX_TEXT_CHARACTERS = 1000
"""Longer messages are cut: a status is sent in HTTP/2 headers, which clients limit to 8 KiB."""

MAX_VIOLATION_BYTES = 2500
"""Further violations are only counted: they share those headers, a third larger in base64."""

_CLASSES = {error.__name__: error for error in STATUS_CODES}
"""Exception classes by the `reason` of their ErrorInfo."""

_AMBIGUOUS = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
)
"""Codes that don't identify a class without a milonga ErrorInfo: other servers use them differently."""


def status_code(
    error: BaseException, codes: Mapping[type[MilongaError], grpc.StatusCode] = STATUS_CODES
) -> grpc.StatusCode:
    """Return the status code of an exception: that of its nearest class in `codes`, otherwise INTERNAL."""
    known = (codes[kind] for kind in type(_reported(error)).__mro__ if kind in codes)
    return next(known, grpc.StatusCode.INTERNAL)


def to_status(
    error: BaseException,
    request_id: str,
    codes: Mapping[type[MilongaError], grpc.StatusCode] = STATUS_CODES,
) -> status_pb2.Status:
    """Return the status of an exception, with its details.

    The message of an exception outside the tree is not sent: it may hold paths, or prompts of other callers.

    Args:
        error: the exception.
        request_id: id of the request in the server's log.
        codes: status code of each exception class.
    """
    error = _reported(error)
    code: int = status_code(error, codes).value[0]
    if not isinstance(error, MilongaError):
        message = f"internal error; find its cause in the service's log under request_id {request_id}"
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
    """Return the exception of a status: the inverse of `to_status`.

    Args:
        code: the status code.
        text: the status message.
        details: serialized google.rpc.Status of the trailing metadata; None if the status came from gRPC
            itself, a proxy or another server. The exception's class then follows from `code`.
    """
    status = _parse(details)
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        for message_type in (info, bad_request, retry):
            if detail.Is(message_type.DESCRIPTOR):
                detail.Unpack(message_type)
    message = " ".join((status.message or text).split()) or code.name
    error_class = _CLASSES.get(info.reason) if info.domain == ERROR_DOMAIN else None
    return _rebuild(error_class or _class_of_code(code, retry), code, message, bad_request, retry)


def retry_delay(details: bytes | None) -> float | None:
    """Return the seconds to wait before a retry, from the RetryInfo in `details`; None without one.

    `details` as for `from_status`. Any code may have a RetryInfo: proxies send one with UNAVAILABLE.
    """
    retry = error_details_pb2.RetryInfo()
    for detail in _parse(details).details:
        if detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
    return retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None


def _reported(error: BaseException) -> BaseException:
    """Return the exception to report for `error`: `TooLargeError` wherever memory was short."""
    if is_out_of_memory(error):
        return TooLargeError("the request needs more memory than the service has; send less at a time")
    return error


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
    if issubclass(kind, QueueFullError):
        return kind(message, retry_after=retry.retry_delay.ToNanoseconds() / 1e9)
    if kind is MilongaError:
        return MilongaError(f"the service responded {code.name}: {message}")
    return kind(message)


def _class_of_code(code: grpc.StatusCode, retry: error_details_pb2.RetryInfo) -> type[MilongaError]:
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # Without a delay the code is gRPC's own, for a message over the size limit: a retry would not help.
        return QueueFullError if retry.HasField("retry_delay") else MilongaError
    if code in _AMBIGUOUS:
        return MilongaError
    return next((kind for kind, known in STATUS_CODES.items() if known is code), MilongaError)


def _bad_request(violations: Sequence[FieldViolation]) -> error_details_pb2.BadRequest:
    """Return the violations' message. Beyond `MAX_VIOLATION_BYTES`, the last one counts the others."""
    request = error_details_pb2.BadRequest()
    for number, violation in enumerate(violations):
        request.field_violations.add(field=violation.field, description=violation.description)
        if number and request.ByteSize() > MAX_VIOLATION_BYTES:
            del request.field_violations[-1]
            others = len(violations) - number - 1
            request.field_violations.add(
                field=violation.field,
                description=f"is also invalid, as are {others} more fields; fix the ones above first",
            )
            break
    return request


def _duration(seconds: float) -> Duration:
    # At least a millisecond: with a delay of 0, clients would retry a full service in a tight loop.
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

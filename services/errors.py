"""The exceptions that the product raises on purpose.

::

    MilongaError
    ├── InvalidInputError       fields of the request are invalid; has every violation
    ├── ModelError              weights or a model folder were refused
    │   ├── ModelNotFoundError  there is no model at the model URI
    │   ├── ModelFormatError    the files are not the expected model (keys, shapes, architecture, pickle)
    │   └── DigestMismatchError the files don't have the expected digest
    ├── QueueFullError          a bounded queue is full; has the time to wait before a retry
    │   └── QuotaExceededError  the caller has used up its quota; another caller may be served
    ├── TooLargeError           one item of the request needs more memory than the service has
    ├── NotFiniteError          the model returned NaN or infinity for the request
    ├── RequestCancelledError   the caller cancelled the request
    ├── DeadlineExceededError   the caller's deadline passed before the request was done
    ├── ServiceUnavailableError the service can't be reached, or is stopping
    │   └── ConnectionOptionsError the address answers, but TLS, certificates or the port are wrong
    ├── UnauthenticatedError    the caller's token is missing or wrong
    ├── PermissionDeniedError   the caller is known, but has no role that may call the method
    ├── AlreadyUnderWayError    an operation that must not run twice at a time is already running
    ├── UnsupportedError        this service does not offer the operation or option
    └── OutputError             a result can't be written

`services.runtime.status` maps the tree to gRPC statuses, `services.cli` to exit codes. Any other exception is
an internal error (INTERNAL, exit code 1), and is never reported as the caller's fault.
"""

from dataclasses import dataclass
from typing import Self


class MilongaError(Exception):
    """Root of the tree. The message is one line with the field, its value and the remedy."""

    refusal: str | None = None
    """Why the call was refused before any work was done for it, in one word for metrics; None: it was not."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One invalid field."""

    field: str
    """Path of the field in the wire's spelling: ``num_inference_steps``, ``clips[2].audio``."""
    description: str
    """Its value, the limit and the remedy."""


class InvalidInputError(MilongaError):
    """Fields of the request are invalid. `violations` has all of them, not only the first."""

    def __init__(self, *violations: FieldViolation) -> None:
        if not violations:
            raise ValueError("InvalidInputError needs at least one violation")
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


def invalid(field: str, description: str) -> InvalidInputError:
    """Return the error of one invalid field."""
    return InvalidInputError(FieldViolation(field, description))


def shown_value(value: object) -> str:
    """Return how a message names a value of a caller: text and numbers literally, in 40 characters at most.

    Other objects are named by their type: their text may be an address (``<_io.BytesIO object at 0x…>``).
    """
    if value is None or isinstance(value, str | int | float):
        return repr(value[:40] if isinstance(value, str) else value)[:42]
    return f"of type {type(value).__name__}"


class ModelError(MilongaError):
    """Weights or a model folder were refused."""


class ModelNotFoundError(ModelError):
    """There is no model at the model URI."""


class ModelFormatError(ModelError):
    """The files are not the expected model: wrong keys, shapes or architecture, or a pickle payload."""


class DigestMismatchError(ModelError):
    """The files don't have the digest of the manifest or of the model URI's pin."""


class QueueFullError(MilongaError):
    """A bounded queue is full. `retry_after` estimates the seconds until it has room.

    `needed`: seconds that the call would take, if there is not the time before its deadline.
    """

    refusal = "room"

    def __init__(
        self, message: str, *, retry_after: float, refusal: str | None = None, needed: float | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after, self.needed = retry_after, needed
        self.refusal = refusal or self.refusal


class QuotaExceededError(QueueFullError):
    """The caller has used up its quota. `retry_after` is the seconds until it may make this call."""

    refusal = "quota"


class TooLargeError(MilongaError):
    """One item of the request needs more memory than the service has, even alone. A retry would not help."""

    refusal = "size"


class NotFiniteError(MilongaError):
    """The model returned NaN or infinity for this request; others are not affected."""

    @classmethod
    def of(cls, output: str, digest: str) -> Self:
        """Return the error of an `output`, such as "reward of clip 0", of the model with `digest`."""
        return cls(
            f"the {output} is NaN or infinite, which is a fault of the model ({digest}) or of its device; "
            "other requests are not affected"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory could not be allocated, on the device or the CPU.

    Torch, which this module does not import, has a class for the device only.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error))
    )


class RequestCancelledError(MilongaError):
    """The caller cancelled the request, or disconnected."""


class DeadlineExceededError(MilongaError):
    """The caller's deadline passed before the request was done, or would pass."""

    def __init__(self, message: str, *, refusal: str | None = None) -> None:
        super().__init__(message)
        self.refusal = refusal


class ServiceUnavailableError(MilongaError):
    """The service can't be reached, or is stopping."""


class ConnectionOptionsError(ServiceUnavailableError):
    """The address answers, but TLS, certificates or the port are wrong. A retry does not help."""


class UnauthenticatedError(MilongaError):
    """The caller's token is missing or wrong."""

    refusal = "token"


class PermissionDeniedError(MilongaError):
    """The caller is known, but has no role that may call the method."""

    refusal = "role"


class AlreadyUnderWayError(MilongaError):
    """An operation that must not run twice at a time is already running; this call did nothing."""


class UnsupportedError(MilongaError):
    """This service does not offer the operation or option."""


class OutputError(MilongaError):
    """A result can't be written."""

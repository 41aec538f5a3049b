"""Every exception the product raises on purpose, and nothing else.

::

    MilongaError
    ├── InvalidInputError       the caller's fields are wrong; carries every violation at once
    ├── ModelError              weights or a model folder were refused
    │   ├── ModelNotFoundError  nothing is where the model URI points
    │   ├── ModelFormatError    what is there is not the model (keys, shapes, architecture, pickle)
    │   └── DigestMismatchError what is there is not the version that was asked for
    ├── QueueFullError          the engine's bounded queue is full; says when to come back
    ├── RequestCancelledError   the caller went away
    ├── DeadlineExceededError   the caller's deadline passed before the clip was done
    ├── ServiceUnavailableError the service can't be reached, or is stopping
    ├── UnauthenticatedError    the caller did not prove that it may do this
    ├── AlreadyUnderWayError    what was asked for is being done for somebody else, and only once at a time
    ├── UnsupportedError        what was asked for is not offered here
    └── OutputError             a result could not be written

`services.runtime.status` maps this tree to gRPC statuses, `services.cli` maps it to exit codes.
Whatever is not in the tree is our fault (INTERNAL) and is never blamed on the caller.
"""

from dataclasses import dataclass


class MilongaError(Exception):
    """Root of the tree. The message is one line that names the field, the value and the remedy."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field.

    `field` is its path as the wire spells it (``num_inference_steps``, ``clips[2].audio``);
    `description` states the value found, the limit and the remedy.
    """

    field: str
    description: str


class InvalidInputError(MilongaError):
    """The caller's fields are wrong. Carries every violation, not only the first."""

    def __init__(self, *violations: FieldViolation) -> None:
        if not violations:
            raise ValueError("InvalidInputError needs at least one violation")
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


class ModelError(MilongaError):
    """Weights or a model folder were refused."""


class ModelNotFoundError(ModelError):
    """Nothing is where the model URI points."""


class ModelFormatError(ModelError):
    """What is there is not the expected model: wrong keys, shapes, architecture, or a pickle payload."""


class DigestMismatchError(ModelError):
    """What is there is not the version that was asked for."""


class QueueFullError(MilongaError):
    """The engine's queue is full. `retry_after` is an estimate in seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestCancelledError(MilongaError):
    """The caller went away before the clip was done."""


class DeadlineExceededError(MilongaError):
    """The caller's deadline passed before the clip was done."""


class ServiceUnavailableError(MilongaError):
    """The service can't be reached, or is stopping."""


class UnauthenticatedError(MilongaError):
    """The caller gave no token, or a wrong one."""


class AlreadyUnderWayError(MilongaError):
    """Something that only one can do at a time is being done; nothing was begun."""


class UnsupportedError(MilongaError):
    """What was asked for exists, and is not offered here."""


class OutputError(MilongaError):
    """A result could not be written."""

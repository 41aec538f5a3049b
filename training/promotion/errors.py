"""Errors of a promotion, below `services.errors.MilongaError`, and their exit codes.

::

    MilongaError
    └── PromotionError
        ├── GatesRefusedError   the challenger was measured and is not good enough
        ├── RolloutError        the new pods, or the new weights, did not become ready; all is rolled back
        ├── BusyError           another promotion runs, or one was left unfinished
        ├── RollbackError       a change could not be undone: needs a person
        │   └── ForeignPinError because somebody else changed the pin
        └── UnrecordedError     all is done, but not recorded in the ledger

All other errors are those of `services.errors`: `InvalidInputError`, `ModelError`, `ServiceUnavailableError`,
…
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from services.errors import MilongaError
from training import exits
from training.cluster.namespace import EXIT_CODES as CLUSTER_EXIT_CODES


class PromotionError(MilongaError):
    """A promotion failed."""


class GatesRefusedError(PromotionError):
    """The challenger was measured and is not good enough."""


class RolloutError(PromotionError):
    """The new pods, or the new weights, did not become ready, or failed the verification."""


class BusyError(PromotionError):
    """Another promotion runs, or one was left unfinished, or the lock was lost."""


class RollbackError(PromotionError):
    """A change could not be undone."""


class ForeignPinError(RollbackError):
    """Somebody else changed the pin during the promotion. Their pin stays."""


class UnrecordedError(PromotionError):
    """All is done, but not recorded in the ledger."""


EXIT_CODES: Final[Mapping[type[BaseException], int]] = MappingProxyType(
    {
        **CLUSTER_EXIT_CODES,
        GatesRefusedError: 3,
        RolloutError: 4,
        BusyError: 5,
        RollbackError: 7,
        UnrecordedError: 8,
    }
)
"""Exit code of `milonga promote` by error class, the nearest first; 1, a bug, for classes not listed."""


def exit_code(error: BaseException) -> int:
    """Return the exit code of `milonga promote` for `error`."""
    return exits.exit_code(error, EXIT_CODES)

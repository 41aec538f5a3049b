"""How a promotion can end other than well, below `services.errors.MilongaError`.

::

    MilongaError
    └── PromotionError
        ├── GatesRefusedError   the challenger was measured and is not good enough
        ├── RolloutError        the new pods, or the new weights, did not come up; all is as it was
        ├── BusyError           another promotion runs, or one was left unfinished
        ├── RollbackError       what was changed could not be changed back: needs a person
        │   └── ForeignPinError since somebody else changed it meanwhile
        └── UnrecordedError     all is done, only the ledger does not say so

Everything else is `services.errors`' own: `InvalidInputError`, `ModelError`, `ServiceUnavailableError`, …
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from services.errors import MilongaError
from training import exits
from training.cluster.namespace import EXIT_CODES as CLUSTER_EXIT_CODES


class PromotionError(MilongaError):
    """A promotion did not come about."""


class GatesRefusedError(PromotionError):
    """The challenger was measured and is not good enough."""


class RolloutError(PromotionError):
    """The new pods, or the new weights, did not come up, or did not answer as they should."""


class BusyError(PromotionError):
    """Another promotion runs, or one was left unfinished, or the lock was lost to one."""


class RollbackError(PromotionError):
    """What was changed could not be changed back."""


class ForeignPinError(RollbackError):
    """Somebody else pinned something meanwhile. It stays."""


class UnrecordedError(PromotionError):
    """All is done, only the ledger does not say so."""


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
"""Exit code of `milonga promote` by error, the nearest class first; 1 for what is not here: our fault."""


def exit_code(error: BaseException) -> int:
    """The exit code that `error` ends `milonga promote` with."""
    return exits.exit_code(error, EXIT_CODES)

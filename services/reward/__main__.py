"""Run the reward service in this process.

    MILONGA_MODEL=mini MILONGA_LISTEN=0.0.0.0:50053 python -m services.reward

Settings come from the environment (``MILONGA_*``, see `RewardSettings`); `milonga serve reward` takes them as
flags. Exit codes: 0 stopped by a signal, 1 our fault, 2 a setting or a model was refused.
"""

import sys

from services.errors import InvalidInputError, MilongaError, ModelError
from services.reward.serve import run
from services.reward.settings import RewardSettings
from services.runtime.settings import load_settings


def main() -> int:
    """Entry point; returns the exit code."""
    try:
        run(load_settings(RewardSettings))
    except (InvalidInputError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MilongaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

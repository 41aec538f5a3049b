"""Run the scoring service in this process.

    MILONGA_SCORERS='{"a": "mini:clap-a", "b": "mini:clap-b"}' python -m services.scoring

Settings come from the environment (``MILONGA_*``, see `ScoringSettings`); `milonga serve scoring` takes them
as flags. Exit codes: 0 stopped by a signal, 1 our fault, 2 a setting or a model was refused.
"""

import sys

from services.errors import InvalidInputError, MilongaError, ModelError
from services.runtime.settings import load_settings
from services.scoring.serve import run
from services.scoring.settings import ScoringSettings


def main() -> int:
    """Entry point; returns the exit code."""
    try:
        run(load_settings(ScoringSettings))
    except (InvalidInputError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MilongaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

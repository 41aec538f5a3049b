"""Run the generation service in this process.

    MILONGA_MODEL=mini MILONGA_LISTEN=0.0.0.0:50051 python -m services.generation

Settings come from the environment (``MILONGA_*``, see `GenerationSettings`); `milonga serve generation` takes
them as flags. Exit codes: 0 stopped by a signal, 1 our fault, 2 a setting or the model was refused.
"""

import sys

from services.errors import InvalidInputError, MilongaError, ModelError
from services.generation.serve import run
from services.generation.settings import GenerationSettings
from services.runtime.settings import load_settings


def main() -> int:
    """Entry point; returns the exit code."""
    try:
        run(load_settings(GenerationSettings))
    except (InvalidInputError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MilongaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

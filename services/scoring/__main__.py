"""`python -m services.scoring`: run the service with settings from the environment (``MILONGA_*``).

Exit codes: 0 stopped by a signal; 1 internal error; 2 a setting or a model was refused.
"""

import sys

from services.runtime.serving import main
from services.scoring.serve import SERVICE

if __name__ == "__main__":
    sys.exit(main(SERVICE))

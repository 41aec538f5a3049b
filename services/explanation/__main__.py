"""`python -m services.explanation`: run the service with settings from the environment (``MILONGA_*``).

Exit codes: 0 stopped by a signal; 1 internal error; 2 a setting or a model was refused.
"""

import sys

from services.explanation.serve import SERVICE
from services.runtime.serving import main

if __name__ == "__main__":
    sys.exit(main(SERVICE))

"""``python -m services.web``: the web door with settings from the environment."""

import sys

from services.web.serve import main

sys.exit(main())

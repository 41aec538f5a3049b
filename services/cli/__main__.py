"""`python -m services.cli`: the `milonga` command without its console script."""

from services.cli import main

main()

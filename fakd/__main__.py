"""`python -m fakd` is the `fakd` command."""

from .cli import main

main()

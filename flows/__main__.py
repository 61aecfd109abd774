"""`python -m flows` is the `ekiben` command."""

from flows.cli import main

main()

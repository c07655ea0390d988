"""``python -m experiments`` is the console script ``iontwin``."""

from experiments.cli import main

main()

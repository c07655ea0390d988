"""Studies: numbers that documents quote, each printed by ``python -m experiments.studies.NAME``."""

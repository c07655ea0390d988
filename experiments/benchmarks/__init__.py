"""Benchmarks: `python -m experiments.benchmarks` runs them here; writes results.json and the table of the README."""

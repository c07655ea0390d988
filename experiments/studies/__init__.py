"""Studies: what the tests promise, measured on many synthetic tables."""

"""Everything that optimizes or infers: loop tables, likelihoods, fits and pulse design.

Import from the modules (`from calibration.fit import fit`); `calibration.data` works without JAX.
"""

"""The master equation of a level graph once more, by dense matrix exponentials in NumPy and SciPy.

Slow, and without anything in common with `twin.slices` but the definition of the graph: what an optimizer found is
judged by it.
"""

import numpy as np
from jaxtyping import Complex, Float
from scipy.linalg import expm

from twin.levels import LevelSystem


def generators(
    system: LevelSystem, drives_rad_s: Complex[np.ndarray, "slices couplings"]
) -> Complex[np.ndarray, "slices square square"]:
    """The Liouvillian of each slice, 1/s, for density matrices in rows: vec(A rho B) = (A x B^T) vec(rho).

    Args:
        system: the graph, of known numbers without a batch.
        drives_rad_s: `Omega exp(-i phi)` of each coupling.
    """
    system.refuse_light_shifts("the exponential of a slice")
    n = len(system.levels)
    one, h = np.eye(n), np.zeros((len(drives_rad_s), n, n), complex)
    for k, (source, target) in enumerate(system.couplings):
        a, b = system.index(target), system.index(source)
        h[:, a, b] += drives_rad_s[:, k] / 2
        h[:, b, a] += drives_rad_s[:, k].conj() / 2
    h += np.diag(np.asarray(system.energies_rad_s))
    constant = np.zeros((n * n, n * n), complex)
    for jump in _jumps(system):
        loss = jump.conj().T @ jump / 2
        constant += np.kron(jump, jump.conj()) - np.kron(loss, one) - np.kron(one, loss.T)
    return constant - 1j * np.stack([np.kron(row, one) - np.kron(one, row.T) for row in h])


def carried(
    system: LevelSystem,
    drives_rad_s: Complex[np.ndarray, "slices couplings"],
    slice_s: float,
    start: Complex[np.ndarray, "levels levels starts"],
) -> Complex[np.ndarray, "slices levels levels starts"]:
    """The density matrix of each start after every slice of length `slice_s`."""
    n, path = len(system.levels), []
    rho = start.reshape(n * n, -1)
    for step in expm(slice_s * generators(system, drives_rad_s)):
        rho = step @ rho
        path.append(rho.reshape(n, n, -1))
    return np.stack(path)


def _jumps(system: LevelSystem) -> list[Float[np.ndarray, "levels levels"]]:
    n, found = len(system.levels), []
    for decay in system.decays:
        jump = np.zeros((n, n))
        jump[system.index(decay.target), system.index(decay.source)] = np.sqrt(float(decay.rate_per_s))
        found.append(jump)
    return found + [np.diag(d.weights) * np.sqrt(2 * float(d.rate_per_s)) for d in system.dephasings]

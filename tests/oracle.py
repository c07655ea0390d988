"""The ion's master equation once more, as dense NumPy matrices: written from the operators, not from the package.

Roles v, s, m and, for V and ladder, a leak level l. hbar = 1, rad/s. Detunings are laser minus line.
"""

import numpy as np
from scipy.linalg import expm

LEVELS = {"lambda": "vsm", "v": "vsml", "ladder": "vsml"}


def op(levels: str, ket: str, bra: str) -> np.ndarray:
    """|ket><bra|."""
    matrix = np.zeros((len(levels), len(levels)), complex)
    matrix[levels.index(ket), levels.index(bra)] = 1
    return matrix


def ion(
    scheme: str,
    *,
    detuning_1_hz=0.0,
    detuning_2_hz=0.0,
    lifetime_s=np.inf,
    branching=0.4,
    m_lifetime_s=np.inf,
    shared_linewidth_hz=0.0,
    linewidth_1_hz=0.0,
    linewidth_2_hz=0.0,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Hamiltonian without drives, and jump operators."""
    levels = LEVELS[scheme]
    p = lambda j: op(levels, j, j)
    d1, d2 = 2 * np.pi * detuning_1_hz, 2 * np.pi * detuning_2_hz
    rate, top = 1 / lifetime_s, 1 / m_lifetime_s
    if scheme == "lambda":
        h = -d1 * p("s") + (d2 - d1) * p("m")
        channels = [("v", "s", rate * branching), ("m", "s", rate * (1 - branching))]
        common = p("s")
    elif scheme == "v":
        h = -d1 * p("v") - d2 * p("m")
        channels = [(a, j, rate * b) for j in "vm" for a, b in (("s", branching), ("l", 1 - branching))]
        common = p("v") + p("m")
    else:
        h = -d1 * p("s") - (d1 + d2) * p("m")
        channels = [("v", "s", rate * branching), ("l", "s", rate * (1 - branching)), ("l", "m", top)]
        # One phase per photon: the top level carries two.
        common = p("s") + 2 * p("m")
    jumps = [np.sqrt(r) * op(levels, a, j) for a, j, r in channels]
    jumps += [np.sqrt(2 * np.pi * shared_linewidth_hz) * common]
    jumps += [np.sqrt(2 * np.pi * linewidth_1_hz) * p("v"), np.sqrt(2 * np.pi * linewidth_2_hz) * p("m")]
    return h, [jump for jump in jumps if np.any(jump)]


def drive(levels: str, omega_1: complex, omega_2: complex) -> np.ndarray:
    """(Omega_1 |s><v| + Omega_2 |m><s| + h.c.) / 2 for complex Omega exp(-i phi)."""
    half = (omega_1 * op(levels, "s", "v") + omega_2 * op(levels, "m", "s")) / 2
    return half + half.conj().T


def liouvillian(h: np.ndarray, jumps: list[np.ndarray]) -> np.ndarray:
    """Superoperator on row-stacked density matrices."""
    one = np.eye(len(h))
    total = -1j * (np.kron(h, one) - np.kron(one, h.T))
    for jump in jumps:
        square = jump.conj().T @ jump
        total += np.kron(jump, jump.conj()) - 0.5 * (np.kron(square, one) + np.kron(one, square.T))
    return total


def evolved(rho: np.ndarray, h: np.ndarray, jumps: list[np.ndarray], duration_s: float) -> np.ndarray:
    """The density matrix after a time of constant Hamiltonian."""
    return (expm(liouvillian(h, jumps) * duration_s) @ rho.ravel()).reshape(rho.shape)

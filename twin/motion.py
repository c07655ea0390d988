"""The ion's motion as the carrier sees it: Debye-Waller factors and their thermal average.

A phonon number n slows the carrier to `Omega_n = Omega exp(-eta^2/2) L_n(eta^2)`, the same n for both pulses of a
cycle, so that x and y are averaged jointly: y = sum_n p_n x_n (1 - R_n) with p_n = n_bar^n / (n_bar + 1)^(n + 1).
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.linalg import eigh_tridiagonal
from scipy.special import eval_laguerre

# Terms of the series of L_n(z) for real n; with n z < 8 the last one is below 1e-16.
_LAGUERRE_TERMS = 48
# Keeps d sqrt(n_bar) finite at n_bar = 0; the result depends on n_bar analytically and moves by 1e-14.
_N_BAR_SHIFT = 1e-14


def thermal_quadrature(
    n_bar: Float[Array, "..."], nodes: int
) -> tuple[Float[Array, "nodes ..."], Float[Array, "nodes ..."]]:
    """Gauss quadrature for the thermal distribution: sum_n p_n f(n) = sum_i w_i f(n_i) for polynomials to 2 nodes - 1.

    The orthogonal polynomials are Meixner's; nodes and weights are eigenvalues and squared first components of their
    Jacobi matrix, with diagonal k (2 n_bar + 1) + n_bar and off-diagonal k sqrt(n_bar (n_bar + 1)).

    Args:
        n_bar: mean phonon number, not negative, shape (*batch).
        nodes: number of (real) phonon numbers.

    Returns:
        Phonon numbers and weights, shape (nodes, *batch).

    References: Golub and Welsch, Math. Comp. 23, 221 (1969).
    """
    n_bar = (jnp.asarray(n_bar) + _N_BAR_SHIFT)[..., None, None]
    k = jnp.arange(nodes)
    diagonal = jnp.eye(nodes) * (k * (2 * n_bar + 1) + n_bar)
    off = jnp.diag(k[1:], 1) * jnp.sqrt(n_bar * (n_bar + 1))
    values, vectors = jnp.linalg.eigh(diagonal + off + jnp.swapaxes(off, -1, -2))
    return jnp.moveaxis(values, -1, 0), jnp.moveaxis(vectors[..., 0, :] ** 2, -1, 0)


def carrier_factor(eta: Float[Array, "..."], n: Float[Array, "..."]) -> Float[Array, "..."]:
    """`exp(-eta^2/2) L_n(eta^2)` for real n >= 0, by the series sum_k (-n)_k eta^(2k) / k!^2.

    Args:
        eta: Lamb-Dicke parameter.
        n: phonon number; between integers, the polynomial's continuation, which the quadrature needs.
    """
    z = eta**2
    k = jnp.arange(_LAGUERRE_TERMS).reshape((-1,) + (1,) * len(jnp.broadcast_shapes(jnp.shape(z), jnp.shape(n))))
    terms = jnp.cumprod((k - n) * z / (k + 1) ** 2, axis=0)
    return jnp.exp(-z / 2) * (1 + jnp.sum(terms, axis=0))


def carrier_factors(
    n_bar: Float[Array, "..."], nodes: int, pulses: Sequence[tuple], axes: int
) -> tuple[list[Float[Array, "nodes ..."]], Float[Array, "nodes ..."]]:
    """Debye-Waller factors of pulses on one thermal ion, phonon number by phonon number of the quadrature.

    Args:
        n_bar: mean phonon number at preparation, shape (*batch).
        nodes: of the quadrature.
        pulses: (eta, phonons gained before it) of each pulse, numbers that broadcast to the axes below.
        axes: how many axes (cycles or rows, then their batch) follow that of the phonon numbers.

    Returns:
        The factors of each pulse, and the weights; phonon numbers come first.
    """
    numbers, weights = (
        a.reshape(a.shape[:1] + (1,) * (axes + 1 - a.ndim) + a.shape[1:]) for a in thermal_quadrature(n_bar, nodes)
    )
    return [carrier_factor(eta, numbers + gained) for eta, gained in pulses], weights


def thermal_error(n_bar: float, eta: float, area_rad: float, nodes: int) -> float:
    """Error of the quadrature in sin^2(theta_n / 2), the largest for areas theta up to `area_rad`.

    Detuned and damped pulses oscillate no faster in their area, so the resonant one is the hard case.
    """
    area = np.linspace(0, area_rad, 65)[1:, None]
    # p_n below 1e-14 is left out.
    n = np.arange(2 + int(33 * (n_bar + 1)))
    exact = np.exp(n * np.log(n_bar / (n_bar + 1)) - np.log(n_bar + 1)) if n_bar > 0 else 1.0 * (n == 0)
    slowed = np.exp(-(eta**2) / 2) * eval_laguerre(n, eta**2)
    # The nodes of `thermal_quadrature`, without compiling anything.
    k = np.arange(nodes)
    at, vectors = eigh_tridiagonal(k * (2 * n_bar + 1) + n_bar, k[1:] * np.sqrt(n_bar * (n_bar + 1)))
    weights, factors = vectors[0] ** 2, np.exp(-(eta**2) / 2) * eval_laguerre(at, eta**2)
    transfer = lambda factor: np.sin(area * factor / 2) ** 2
    return float(np.max(np.abs(transfer(factors) @ weights - transfer(slowed) @ exact)))


_MOST_NODES = 128


def nodes_for(n_bar: float, eta: float, area_rad: float, error: float) -> int:
    """Fewest nodes (1, 2, 3, 4, 6, 8, 12, ... 128) whose `thermal_error` is below `error`.

    Raises:
        ValueError: not even the largest number serves.
    """
    sizes = [1, 2, 3] + [k * 2**j for j in range(2, 8) for k in (1, 1.5) if k * 2**j <= _MOST_NODES]
    for nodes in map(int, sizes):
        if thermal_error(n_bar, eta, area_rad, nodes) <= error:
            return nodes
    raise ValueError(
        f"an area of {area_rad:g} rad on an ion with n_bar = {n_bar:g} and eta = {eta:g} needs more than "
        f"{_MOST_NODES} thermal nodes for an error of {error:g}; lower the area or `n_bar`, or raise `error`."
    )

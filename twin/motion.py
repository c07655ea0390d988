"""The ion's motion as the carrier sees it: Debye-Waller factors and their thermal average.

A phonon number n slows the carrier to `Omega_n = Omega exp(-eta^2/2) L_n(eta^2)`, the same n for both pulses of a
cycle, so that x and y are averaged jointly: y = sum_n p_n x_n (1 - R_n) with p_n = n_bar^n / (n_bar + 1)^(n + 1).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

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

"""States of two qubits in real numbers, and how entangled they are.

A state is its correlations with the Pauli matrices, real for every density matrix:

    t_ij = Tr( rho sigma_i (x) sigma_j ),    rho = 1/4 sum_ij t_ij sigma_i (x) sigma_j,    i, j in I, X, Y, Z

Each qubit has |0> = v and |1> = s, so that sigma_z = +1 in v; the first index is node A. t_II is the trace, less than
one where population has leaked; measures are those of the matrix as it is, and scale with the trace.
Batch axes come last.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from twin.batching import real_array
from twin.closed_form import flat_root

Correlations = Float[Array, "4 4 ..."]

_PAULI = np.array([[[1, 0], [0, 1]], [[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]])
_PAIRS = np.stack([np.stack([np.kron(a, b) for b in _PAULI]) for a in _PAULI])
_FLIP = np.real(np.kron(_PAULI[2], _PAULI[2]))
# Below this a population, a sum of four correlations of order one, is rounding. Its root, 3e-8, would not look like it.
_ROUNDING = 1e-15
# Below these the sum of two roots of eigenvalues, and a singular value, are.
_ROOT_FLOOR, _SINGULAR_FLOOR = 3e-8, 1e-12


# ------------------------------------------------------------------------------------------------------------- states


def x_state(populations, inner=(0.0, 0.0), outer=(0.0, 0.0)) -> Correlations:
    """A state without other elements than the two diagonals of its matrix.

    Args:
        populations: of 00, 01, 10, 11, shape (4, *batch).
        inner: real and imaginary part of <01|rho|10>, each of shape (*batch).
        outer: real and imaginary part of <00|rho|11>, each of shape (*batch).

    Returns:
        Correlations, shape (4, 4, *batch).
    """
    p00, p01, p10, p11, *parts = jnp.broadcast_arrays(*(real_array(a) for a in (*populations, *inner, *outer)))
    in_re, in_im, out_re, out_im = parts
    zero = jnp.zeros_like(p00)
    return jnp.stack(
        [
            jnp.stack([p00 + p01 + p10 + p11, zero, zero, p00 - p01 + p10 - p11]),
            jnp.stack([zero, 2 * (in_re + out_re), 2 * (in_im - out_im), zero]),
            jnp.stack([zero, -2 * (in_im + out_im), 2 * (in_re - out_re), zero]),
            jnp.stack([p00 + p01 - p10 - p11, zero, zero, p00 - p01 - p10 + p11]),
        ]
    )


def one_excitation(x_a, phase_rad=0.0) -> Correlations:
    """sqrt(1 - x_a) |01> + e^{i f} sqrt(x_a) |10>: one excitation, at A with probability x_a; Bell psi at 1/2.

    Args:
        x_a: in [0, 1], shape (*batch). phase_rad: f.
    """
    x_a = real_array(x_a)
    zero, root = jnp.zeros_like(x_a), flat_root(x_a * (1 - x_a))
    return x_state((zero, 1 - x_a, x_a, zero), inner=(root * jnp.cos(phase_rad), -root * jnp.sin(phase_rad)))


def both_or_none(x, phase_rad=0.0) -> Correlations:
    """sqrt(1 - x) |00> + e^{i f} sqrt(x) |11>: both excited or none; Bell phi at 1/2.

    Args:
        x: in [0, 1], shape (*batch). phase_rad: f.
    """
    x = real_array(x)
    zero, root = jnp.zeros_like(x), flat_root(x * (1 - x))
    return x_state((1 - x, zero, zero, x), outer=(root * jnp.cos(phase_rad), -root * jnp.sin(phase_rad)))


def werner(bell: Correlations, weight) -> Correlations:
    """A state mixed with the even one, `weight` bell + (1 - weight) 1/4; for a Bell state it is a Werner state.

    Args:
        bell: any state of trace one, shape (4, 4, *batch). weight: in [0, 1], shape (*batch).
    """
    even = np.zeros((4, 4) + (1,) * (bell.ndim - 2))
    even[0, 0] = 1.0
    return weight * bell + (1 - real_array(weight)) * even


def product_state(x_a, x_b) -> Correlations:
    """sqrt(1 - x) |0> + sqrt(x) |1> at each node, independent of each other; x_a, x_b of shape (*batch)."""
    x_a, x_b = jnp.broadcast_arrays(real_array(x_a), real_array(x_b))

    def bloch(x):
        return jnp.stack([jnp.ones_like(x), 2 * flat_root(x * (1 - x)), jnp.zeros_like(x), 1 - 2 * x])

    return bloch(x_a)[:, None] * bloch(x_b)[None]


def correlations(rho) -> Correlations:
    """Correlations of a density matrix in the basis 00, 01, 10, 11, shape (4, 4, *batch) and Hermitian."""
    return jnp.real(jnp.einsum("ijab,ba...->ij...", _PAIRS, jnp.asarray(rho)))


def density_matrix(t: Correlations) -> Complex[Array, "4 4 ..."]:
    """The density matrix in the basis 00, 01, 10, 11."""
    return jnp.einsum("ijab,ij...->ab...", _PAIRS, t) / 4


def excitations(t: Correlations) -> Float[Array, "2 ..."]:
    """Population of s at A and at B; leaked population counts at neither."""
    return jnp.stack([(t[0, 0] - t[3, 0]) / 2, (t[0, 0] - t[0, 3]) / 2])


# ----------------------------------------------------------------------------------------------------------- measures


@jax.jit
def x_concurrence(t: Correlations) -> Float[Array, "..."]:
    """Concurrence of an X-state, in real arithmetic; of any other state a lower bound.

        C = 2 max(0, |rho_01,10| - sqrt(p00 p11), |rho_00,11| - sqrt(p01 p10))

    It is that of the state after a random phase f at A and f or -f at B, which is a local operation with classical
    communication and adds no entanglement: hence the bound. A population below 1e-15 is rounding and counts as zero;
    derivatives of a root are 0 where it is 0.
    """
    signs = ((1, 1), (1, -1), (-1, 1), (-1, -1))
    p00, p01, p10, p11 = (_empty(t[0, 0] + a * t[3, 0] + b * t[0, 3] + a * b * t[3, 3]) for a, b in signs)
    inner = flat_root((t[1, 1] + t[2, 2]) ** 2 + (t[1, 2] - t[2, 1]) ** 2)
    outer = flat_root((t[1, 1] - t[2, 2]) ** 2 + (t[1, 2] + t[2, 1]) ** 2)
    one, two = inner - flat_root(p00 * p11), outer - flat_root(p01 * p10)
    return jnp.maximum(0.0, jnp.maximum(one, two)) / 2


def _empty(population: Float[Array, "..."]) -> Float[Array, "..."]:
    """Zero where only rounding is left; further below zero it stays, and its root becomes NaN."""
    return jnp.where(jnp.abs(population) < _ROUNDING, 0.0, population)


@jax.jit
def concurrence(t: Correlations) -> Float[Array, "..."]:
    """Concurrence of any state, max(0, l_1 - l_2 - l_3 - l_4): 1 for a Bell state, 0 for a separable one.

    l_k are the roots of the eigenvalues of rho (sigma_y sigma_y) rho* (sigma_y sigma_y), found as singular values of
    S^T (sigma_y sigma_y) S with S = sqrt(rho): no digits are lost where rho has no full rank. The derivative is that
    along directions that keep the rank; where populations can grow from nothing, the concurrence has a kink or an
    infinite slope, and 0 is given for that part.

    References:
        [1] W. K. Wootters, Phys. Rev. Lett. 80, 2245 (1998).
    """
    return jnp.maximum(0.0, _spectral(jnp.moveaxis(t, (0, 1), (-2, -1))))


@jax.custom_jvp
def _spectral(t: Float[Array, "... 4 4"]) -> Float[Array, "..."]:
    """l_1 - l_2 - l_3 - l_4; matrix axes last."""
    singular = _decomposed(t)[3]
    return 2 * singular[..., 0] - jnp.sum(singular, axis=-1)


def _decomposed(t):
    rho = jnp.einsum("ijab,...ij->...ab", _PAIRS, t) / 4
    weights, vectors = jnp.linalg.eigh(rho)
    roots = jnp.sqrt(jnp.where(weights > _ROUNDING, weights, 0.0))
    root = (vectors * roots[..., None, :]) @ _dagger(vectors)
    left, singular, right = jnp.linalg.svd(_transposed(root) @ _FLIP @ root)
    return roots, vectors, root, singular, left, right


def _transposed(matrix):
    return jnp.swapaxes(matrix, -1, -2)


def _dagger(matrix):
    return jnp.conj(_transposed(matrix))


@_spectral.defjvp
def _spectral_jvp(primals, tangents):
    (t,), (dt,) = primals, tangents
    roots, vectors, root, singular, left, right = _decomposed(t)
    d_rho = jnp.einsum("ijab,...ij->...ab", _PAIRS, dt) / 4
    # S dS + dS S = d rho, solved in the eigenbasis: equal eigenvalues do no harm.
    sums = roots[..., :, None] + roots[..., None, :]
    known = sums > _ROOT_FLOOR
    turned = jnp.where(known, _dagger(vectors) @ d_rho @ vectors / jnp.where(known, sums, 1.0), 0.0)
    d_root = vectors @ turned @ _dagger(vectors)
    half = _transposed(root) @ _FLIP @ d_root
    change = _dagger(left) @ (half + _transposed(half)) @ _dagger(right)
    d_singular = jnp.where(singular > _SINGULAR_FLOOR, jnp.real(jnp.diagonal(change, axis1=-2, axis2=-1)), 0.0)
    value = 2 * singular[..., 0] - jnp.sum(singular, axis=-1)
    return value, 2 * d_singular[..., 0] - jnp.sum(d_singular, axis=-1)


@jax.jit
def negativity(t: Correlations) -> Float[Array, "..."]:
    """Minus the sum of the negative eigenvalues of the partial transpose: 1/2 for a Bell state, 0 iff separable.

    References:
        [1] G. Vidal, R. F. Werner, Phys. Rev. A 65, 032314 (2002).
    """
    # Transposing B changes the sign of its sigma_y.
    flipped = t * np.array([1.0, 1.0, -1.0, 1.0]).reshape((1, 4) + (1,) * (t.ndim - 2))
    rho = jnp.einsum("ijab,...ij->...ab", _PAIRS, jnp.moveaxis(flipped, (0, 1), (-2, -1))) / 4
    return jnp.sum(jnp.maximum(0.0, -jnp.linalg.eigvalsh(rho)), axis=-1)


@jax.jit
def l1_coherence(t: Correlations) -> Float[Array, "..."]:
    """Sum of the magnitudes of all off-diagonal elements in the basis of v and s."""
    total = jnp.zeros(t.shape[2:])
    for a in range(4):
        for b in range(a + 1, 4):
            weights = _PAIRS[:, :, a, b] / 4
            real, imag = (jnp.einsum("ij,ij...->...", part, t) for part in (weights.real, weights.imag))
            total = total + 2 * flat_root(real**2 + imag**2)
    return total

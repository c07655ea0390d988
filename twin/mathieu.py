"""The Mathieu equation of one axis of a Paul trap: characteristic exponent, stability, Floquet solution.

    u'' + [a - 2 q cos(2 xi)] u = 0,    u = e^{i beta xi} sum_n C_2n e^{2 i n xi}

The first stability region, 0 < beta < 1, is the one that traps work in: a_0(q) < a < b_1(|q|) in the standard
characteristic values. Outside of it, and for |q| > 10, results are NaN. All functions broadcast their arguments and
can be differentiated, also at q = 0.

The exponent is exact to rounding: no expansion in q. Even (u_1) and odd (u_2) solutions on a quarter of the period of
2 xi = 2 pi give it by symmetry,

    cos^2(pi beta/2) = u_1(pi/2) u_2'(pi/2),    sin^2(pi beta/2) = -u_1'(pi/2) u_2(pi/2),

of which one or the other is well conditioned everywhere. They solve Volterra integral equations for u'', collocated at
Gauss nodes, where entire functions converge faster than any power.

References:
    [1] N. W. McLachlan, Theory and Application of Mathieu Functions, Oxford 1947.
    [2] D. Leibfried, R. Blatt, C. Monroe, D. Wineland, Rev. Mod. Phys. 75, 281 (2003), Sec. II.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real

from twin.batching import real_array

Input = Real[ArrayLike, "*#batch"]
Output = Float[Array, "..."]

LARGEST_Q = 10.0
# More nodes or levels change nothing but rounding up to |q| = 10.
_NODES = 32
_LEVELS = 10
# Halvings of [0, 10] until rounding is left.
_HALVINGS = 56


def _broadcast(*values: ArrayLike) -> tuple[Array, ...]:
    return tuple(jnp.broadcast_arrays(*(real_array(value) for value in values)))


@functools.cache
def _quadrature() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gauss nodes x_i on [0, pi/2], weights, and the matrix of int_0^{x_i} (x_i - t) f(t) dt."""
    x, weights = np.polynomial.legendre.leggauss(_NODES)
    # Legendre coefficients of the interpolant, whose integrals are known exactly.
    degree = np.arange(_NODES)
    coefficients = (degree[:, None] + 0.5) * np.polynomial.legendre.legvander(x, _NODES - 1).T * weights
    twice = np.polynomial.legendre.legint(coefficients, m=2, lbnd=-1, axis=0)
    half = np.pi / 4
    return half * (x + 1), half * weights, half**2 * np.polynomial.legendre.legval(x, twice).T


def _quarter_period(a: Array, q: Array) -> tuple[Array, Array, Array, Array]:
    """u_1, u_1', u_2, u_2' at xi = pi/2, with u_1(0) = u_2'(0) = 1 and u_1'(0) = u_2(0) = 0."""
    x, weights, twice = _quadrature()
    spring = a[..., None] - 2 * q[..., None] * np.cos(2 * x)
    # u'' = -spring u and u = start + twice u'': one linear system for u'' at the nodes, for both solutions.
    start = np.stack([np.ones_like(x), x], axis=-1)
    curvature = jnp.linalg.solve(np.eye(_NODES) + spring[..., None] * twice, -spring[..., None] * start)
    slope = jnp.sum(weights[:, None] * curvature, axis=-2)
    value = jnp.sum((weights * (np.pi / 2 - x))[:, None] * curvature, axis=-2)
    return 1 + value[..., 0], slope[..., 0], np.pi / 2 + value[..., 1], 1 + slope[..., 1]


def _in_first_region(a: Array, q: Array, ends: tuple[Array, Array, Array, Array]) -> Array:
    even, even_slope, odd, odd_slope = ends
    # Higher regions differ by a sign, up to the fifth, which needs a > 1 or a larger q.
    return (a < 1) & (jnp.abs(q) <= LARGEST_Q) & (even > 0) & (odd_slope > 0) & (even_slope < 0) & (odd > 0)


def characteristic_exponent(a: Input, q: Input) -> Output:
    """Exponent beta in (0, 1) of the first stability region; the secular frequency is beta f_rf/2.

    Largest error against power series of 50 digits, for exponents of 0.02 to 0.98: 8e-15 for |q| < 0.9, 4e-14 to
    |q| = 2, 2e-13 to 4; at |q| = 10, where the region is 4e-4 wide, 7e-11.

    Args:
        a, q: of the Mathieu equation, any sign.

    Returns:
        beta, broadcast shape; NaN where the motion is not bounded, a = q = 0 included.
    """
    a, q = _broadcast(a, q)
    inside = stable(a, q)
    # A point that is well inside keeps NaN out of the derivatives of other lanes.
    even, even_slope, odd, odd_slope = _quarter_period(jnp.where(inside, a, 0.0), jnp.where(inside, q, 0.5))
    beta = 2 / jnp.pi * jnp.arctan2(jnp.sqrt(-even_slope * odd), jnp.sqrt(even * odd_slope))
    return jnp.where(inside, beta, jnp.nan)


def stable(a: Input, q: Input) -> Bool[Array, "..."]:
    """Whether (a, q) lies inside the first stability region; False on its edge and for |q| > 10. Args: as above."""
    a, q = _broadcast(a, q)
    return _in_first_region(a, q, _quarter_period(a, q))


def characteristic_value(beta: Input, q: Input) -> Output:
    """The a that has the exponent beta at this q, inverse of `characteristic_exponent` in its first argument.

    Floquet's equations for C_2n are an eigenvalue problem, tridiagonal with (beta + 2 n)^2 on the diagonal and q beside
    it; a is its lowest eigenvalue. Concave in q, and falling with |q|.

    Args:
        beta: in (0, 1). q: any sign, |q| <= 10.

    Returns:
        a, broadcast shape; NaN for other arguments.
    """
    beta, q = _broadcast(beta, q)
    inside = (beta > 0) & (beta < 1) & (jnp.abs(q) <= LARGEST_Q)
    squares = (jnp.where(inside, beta, 0.5)[..., None] + 2 * np.arange(-_LEVELS, _LEVELS + 1)) ** 2
    size = 2 * _LEVELS + 1
    beside = np.eye(size, k=1) + np.eye(size, k=-1)
    matrix = np.eye(size) * squares[..., None] + jnp.where(inside, q, 0.0)[..., None, None] * beside
    return jnp.where(inside, jnp.linalg.eigvalsh(matrix)[..., 0], jnp.nan)


def pseudopotential_exponent(a: Input, q: Input) -> Output:
    """Lowest order in a and q^2, beta = sqrt(a + q^2/2): the pseudopotential. NaN where a + q^2/2 is negative."""
    a, q = _broadcast(a, q)
    return _root(a + q**2 / 2)


def second_order_exponent(a: Input, q: Input) -> Output:
    """Next order [1], where |q| stays below about 0.4.

        beta^2 = a - (a - 1) q^2/[2 (a - 1)^2 - q^2] - (5 a + 7) q^4/[32 (a - 1)^3 (a - 4)]

    At a = 0 it is low by 5e-6 at q = 0.2, 4e-5 at 0.3, 9e-4 at 0.5 (relative). NaN where beta^2 is negative.
    """
    a, q = _broadcast(a, q)
    second = (a - 1) * q**2 / (2 * (a - 1) ** 2 - q**2)
    return _root(a - second - (5 * a + 7) * q**4 / (32 * (a - 1) ** 3 * (a - 4)))


def _root(square: Array) -> Array:
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), jnp.where(square == 0, 0.0, jnp.nan))


@functools.partial(jax.jit, static_argnums=1)
def _boundary(a: Array, which: int) -> Array:
    """The q in (0, 10) where one of the four ends of `_quarter_period` vanishes, the only zero it has there."""
    end = lambda q: _quarter_period(a, q)[which]

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        beyond = jnp.sign(end(middle)) != at_zero
        return jnp.where(beyond, low, middle), jnp.where(beyond, middle, high)

    at_zero = jnp.sign(jax.lax.stop_gradient(end(jnp.zeros_like(a))))
    bracket = (jnp.zeros_like(a), jnp.full_like(a, LARGEST_Q))
    q = jax.lax.stop_gradient(jax.lax.fori_loop(0, _HALVINGS, halve, bracket)[1])
    # Two Newton steps from the root bring its first and second derivatives with respect to a.
    for _ in range(2):
        value, slope = jax.jvp(end, (q,), (jnp.ones_like(q),))
        q = q - value / slope
    return q


def largest_stable_q(a: Input) -> Output:
    """Largest q of the first stability region at this a, where beta = 1 and a = b_1(q); 0.908046 at a = 0.

    A linear trap needs it of both radial axes: the smaller of those of a_x and a_y.

    Args:
        a: below 1, above -13.9.

    Returns:
        q, shape of a; NaN for other a.
    """
    (a,) = _broadcast(a)
    return _between(a, lambda a: _boundary(a, 3))


def smallest_stable_q(a: Input) -> Output:
    """Smallest q of the first stability region at this a: where beta = 0 and a = a_0(q), or 0 for a not negative.

    Args and returns: as `largest_stable_q`. Near a = 0 it is sqrt(-2 a), the pseudopotential's.
    """
    (a,) = _broadcast(a)
    negative = a < 0
    root = _between(jnp.where(negative, a, -1.0), lambda a: _boundary(a, 1))
    return jnp.where(negative, root, jnp.where(a < 1, 0.0, jnp.nan))


def _between(a: Array, solve) -> Array:
    inside = (a < 1) & (a > -13.9)
    return jnp.where(inside, solve(jnp.where(inside, a, -1.0)), jnp.nan)


def _ratios(a: Array, q: Array, beta: Array, count: int) -> Array:
    """C_2n/C_2n-2 for n = 1 ... count: [a - (beta + 2 n)^2] C_2n = q (C_2n-2 + C_2n+2) as a continued fraction."""
    ratios = [jnp.zeros_like(a)]
    for n in range(count + _LEVELS, 0, -1):
        ratios.append(q / (a - (beta + 2 * n) ** 2 - q * ratios[-1]))
    return jnp.stack(ratios[: -count - 1 : -1])


def floquet_coefficients(a: Input, q: Input, harmonics: int = 4) -> Float[Array, "coefficients ..."]:
    """Fourier coefficients C_2n of the Floquet solution, normalized to C_0 = 1, n = -harmonics ... harmonics.

    An ion of secular amplitude u_1 moves as u = u_1 sum_n C_2n cos[(beta + 2 n) xi]. Lowest order: C_{+-2} = -q/4.

    Args:
        a, q: of the Mathieu equation.
        harmonics: at least 1.

    Returns:
        Real, shape (2 harmonics + 1, *batch); NaN where the motion is not bounded.
    """
    _check_harmonics(harmonics)
    a, q = _broadcast(a, q)
    beta = characteristic_exponent(a, q)
    # Going down in n is going up with the exponent's sign turned.
    up = jnp.cumprod(_ratios(a, q, beta, harmonics), axis=0)
    down = jnp.cumprod(_ratios(a, q, -beta, harmonics), axis=0)
    return jnp.concatenate([down[::-1], jnp.ones_like(beta)[None], up])


def driven_coefficients(a: Input, q: Input, harmonics: int = 4) -> Float[Array, "coefficients ..."]:
    """Cosine coefficients of the periodic solution of u'' + [a - 2 q cos(2 xi)] u = 1, a constant force.

        u = d_0 + d_1 cos(2 xi) + d_2 cos(4 xi) + ...,    d_0 ~ 1/(a + q^2/2),  d_1 ~ -(q/2) d_0 to lowest order

    The excess micromotion of an ion that a static field pushes off the rf null.

    Args:
        a, q, harmonics: as `floquet_coefficients`.

    Returns:
        Real, shape (harmonics + 1, *batch); NaN where the motion is not bounded.
    """
    _check_harmonics(harmonics)
    a, q = _broadcast(a, q)
    inside = stable(a, q)
    ratios = _ratios(a, q, jnp.zeros_like(a), harmonics)
    mean = 1 / jnp.where(inside, a - 2 * q * ratios[0], jnp.nan)
    return jnp.concatenate([mean[None], 2 * mean * jnp.cumprod(ratios, axis=0)])


def _check_harmonics(harmonics: int) -> None:
    if harmonics < 1:
        raise ValueError(f"`harmonics` must be at least 1, but is {harmonics}; four are enough for q below 0.9.")

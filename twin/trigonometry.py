"""Sine, cosine and the area of a commanded transfer in vector registers.

XLA on CPU computes those of 64-bit numbers one by one with the C library; in the interaction picture they took most of
a solve. Here sine and cosine come from one argument reduction and two polynomials, the area from a root and one.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# pi/2 in three parts: multiples of the first two are exact for quotients below 2^20.
_PARTS = (1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21)
_SINE = [(-1.0) ** k / math.factorial(2 * k + 1) for k in range(8)]
_COSINE = [(-1.0) ** k / math.factorial(2 * k) for k in range(9)]
# 2 asin(sqrt z)/sqrt z for z = (1 + t)/4, from 0 to 1/2. It is singular at z = 1 only, t = 3, so that Chebyshev
# coefficients fall like (3 + sqrt 8)^-k, and powers of t are as good. More are
# computed, and left out, to average out rounding.
_RATIO = np.polynomial.chebyshev.chebinterpolate(lambda t: 4 * np.arcsin(np.sqrt(1 + t) / 2) / np.sqrt(1 + t), 63)
_ARCSINE = np.polynomial.chebyshev.cheb2poly(_RATIO[:22]).tolist()


@jax.custom_jvp
def cos_sin(angle: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Cosine and sine of an angle in rad, to 3e-16 below 1e6."""
    quarter = jnp.round(angle * (2 / math.pi))
    rest = angle
    for part in _PARTS:
        rest = rest - quarter * part
    square = rest * rest
    # Taylor: below pi/4 the first term left out is 5e-17.
    sine, cosine = rest * _polynomial(_SINE, square), _polynomial(_COSINE, square)
    turns = quarter - 4 * jnp.floor(0.25 * quarter)
    odd = (turns == 1) | (turns == 3)
    cos, sin = jnp.where(odd, sine, cosine), jnp.where(odd, cosine, sine)
    return jnp.where((turns == 1) | (turns == 2), -cos, cos), jnp.where(turns >= 2, -sin, sin)


@cos_sin.defjvp
def _derivative(primals, tangents):
    cos, sin = cos_sin(*primals)
    return (cos, sin), (-sin * tangents[0], cos * tangents[0])


@jax.custom_jvp
def transfer_area(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """2 asin(sqrt x) in rad, to 2e-15 of itself; NaN outside [0, 1]. The derivative diverges at 0 and 1: 0 by rule."""
    small = jnp.minimum(x, 1 - x)
    area = jnp.sqrt(small) * _polynomial(_ARCSINE, 4 * small - 1)
    return jnp.where(x > 0.5, math.pi - area, area)


@transfer_area.defjvp
def _area_derivative(primals, tangents):
    (x,), (dx,) = primals, tangents
    square = x * (1 - x)
    end = (x == 0) | (x == 1)
    return transfer_area(x), jnp.where(end, 0.0, 1 / jnp.sqrt(jnp.where(end, 1.0, square))) * dx


def _polynomial(coefficients: list[float], x: Float[Array, "..."]) -> Float[Array, "..."]:
    total = jnp.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total

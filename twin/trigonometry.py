"""Sine and cosine in vector registers.

XLA on CPU computes those of 64-bit numbers one by one with the C library; in the interaction picture they took most of
a solve. Here both come from one argument reduction and two polynomials.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# pi/2 in three parts: multiples of the first two are exact for quotients below 2^20.
_PARTS = (1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21)
_SINE = [(-1.0) ** k / math.factorial(2 * k + 1) for k in range(8)]
_COSINE = [(-1.0) ** k / math.factorial(2 * k) for k in range(9)]


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


def _polynomial(coefficients: list[float], x: Float[Array, "..."]) -> Float[Array, "..."]:
    total = jnp.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total

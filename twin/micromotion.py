"""What a laser beam sees of an ion that the rf shakes: modulation index and Bessel factors.

Light of wave vector k that meets an ion at u(t) = u_mm cos(Om t) is modulated in phase by beta cos(Om t) with
beta = k u_mm, and so has a carrier and sidebands at multiples of the rf, of relative amplitude J_n(beta).

References:
    [1] D. J. Berkeland, J. D. Miller, J. C. Bergquist, W. M. Itano, D. J. Wineland, J. Appl. Phys. 83, 5025 (1998).
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from twin.batching import physical, real_array

# Midpoints of a half period: exact to rounding up to an argument of about 30.
_REACH = 30.0
_ANGLES = (np.arange(48) + 0.5) * np.pi / 48


def bessel_j(order: int, x: Real[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Bessel function J_n(x), by the mean of cos(n t - x sin t) over a period: entire, so with all derivatives.

    Args:
        order: n, 0 to 10. x: real, |x| < 30; absolute error below 1e-14 there, and NaN beyond.
    """
    x = real_array(x)[..., None]
    mean = jnp.mean(jnp.cos(order * _ANGLES - x * np.sin(_ANGLES)), axis=-1)
    return jnp.where(jnp.abs(x[..., 0]) < _REACH, mean, jnp.nan)


class ExcessMicromotion(eqx.Module):
    """Driven motion at the rf of an ion off the rf null, as `AbstractTrap.excess_micromotion` gives it.

    Args:
        displacement_m: mean displacement along the trap's axes, m, shape (3, *batch).
        amplitude_m: coefficient of cos(Om t), signed, m, shape (3, *batch).
        index: modulation index k . amplitude, rad, signed, shape (*batch).
    """

    displacement_m: Float[Array, "3 ..."] = physical(1)
    amplitude_m: Float[Array, "3 ..."] = physical(1)
    index: Float[Array, "..."] = physical()

    @property
    def carrier_factor(self) -> Float[Array, "..."]:
        """J_0 of the index: multiplies the Rabi frequency of the carrier, and so areas of pulses."""
        return bessel_j(0, self.index)

    @property
    def sideband_factor(self) -> Float[Array, "..."]:
        """|J_1| of the index: the Rabi frequency one rf frequency off, over that without micromotion."""
        return jnp.abs(bessel_j(1, self.index))

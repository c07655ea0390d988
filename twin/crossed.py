"""Closed forms of two crossed memristors and of a cascade, driven by sines of equal period.

Two memristors remember each other's inputs (`twin.graph.crossed`), moving average over T of a period T_osc:

    x_A = (1 - cos u)/2,    x_B = (1 - cos(u + Phi))/2,    R_A = mean of x_B,    R_B = mean of x_A

so that B leads by Phi. With S = sin(phi)/phi and the lag phi = pi T/T_osc

    y_A = x_A [1 + S cos(u + Phi - phi)] / 2

In cycles, K a period and n remembered, the same holds exactly with S = sin(n w/2)/(n sin(w/2)), lag w (n + 1)/2 and
w = 2 pi/K, and the whole area of a loop of the polygon is smaller by sin(w)/w. Valid from a time T after the start on.

Areas are the closed integral of y dx, positive where the rising branch lies above. *Intra*: y_A over x_A, *inter*: y_A
over x_B.

References:
    [1] Baldazzi et al., arXiv:2602.14736 (2026) report form factors up to about 0.95 for such a pair; only the abstract
        was readable here, and the wiring is an assumption that reproduces the number.
"""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from twin.batching import physical


class CrossedPair(eqx.Module):
    """Two ideal memristors with crossed feedback in their steady state; numbers and arrays broadcast.

    Args:
        window: T in periods, larger than 0.
        phase_rad: Phi by which the input of B leads.
        cycles_per_period: K; None for the continuum. T K is then the number n of remembered cycles, a whole one.
    """

    window: Float[Array, "..."] = physical()
    phase_rad: Float[Array, "..."] = physical(default=0.0)
    cycles_per_period: int | None = eqx.field(static=True, default=None)

    @property
    def shrink(self) -> Float[Array, "..."]:
        """S: half the range of the transfer is S/2."""
        phi = jnp.pi * self.window
        if self.cycles_per_period is None:
            return jnp.sinc(self.window)
        n = self.window * self.cycles_per_period
        return jnp.sin(phi) / (n * math.sin(math.pi / self.cycles_per_period))

    @property
    def lag_rad(self) -> Float[Array, "..."]:
        """How far the mean lags behind its input."""
        return jnp.pi * (self.window + (0.0 if self.cycles_per_period is None else 1 / self.cycles_per_period))

    @property
    def _polygon(self) -> float:
        if self.cycles_per_period is None:
            return 1.0
        w = 2 * math.pi / self.cycles_per_period
        return math.sin(w) / w

    def points(self, u) -> dict[str, Float[Array, "..."]]:
        """x_A, x_B, r_A, r_B, y_A, y_B at the phase u of A's input."""
        s, lag, phase = self.shrink, self.lag_rad, self.phase_rad
        x_a, x_b = (1 - jnp.cos(u)) / 2, (1 - jnp.cos(u + phase)) / 2
        r_a, r_b = (1 - s * jnp.cos(u + phase - lag)) / 2, (1 - s * jnp.cos(u - lag)) / 2
        return {"x_a": x_a, "x_b": x_b, "r_a": r_a, "r_b": r_b, "y_a": (1 - r_a) * x_a, "y_b": (1 - r_b) * x_b}

    @property
    def intra_area(self) -> Float[Array, "..."]:
        """Area of y_A over x_A: (pi/8) S sin(lag - Phi)."""
        return math.pi / 8 * self.shrink * jnp.sin(self.lag_rad - self.phase_rad) * self._polygon

    @property
    def inter_area(self) -> Float[Array, "..."]:
        """Area of y_A over x_B: (pi/8) [S sin(lag) - sin(Phi)], with the signs of the lobes."""
        return math.pi / 8 * self._width_offset * self._polygon

    def inter_width(self, s) -> Float[Array, "..."]:
        """Rising minus falling branch of y_A at x_B = (1 - cos s)/2, 0 < s < pi.

        With `cycles_per_period` that of the smooth curve on which the points of the cycles lie.
        """
        return jnp.sin(s) / 2 * (self._width_offset - self._width_slope * jnp.cos(s))

    @property
    def _width_offset(self) -> Float[Array, "..."]:
        """S sin(lag) - sin(Phi)."""
        return self.shrink * jnp.sin(self.lag_rad) - jnp.sin(self.phase_rad)

    @property
    def _width_slope(self) -> Float[Array, "..."]:
        """S sin(Phi + lag)."""
        return self.shrink * jnp.sin(self.phase_rad + self.lag_rad)

    @property
    def crosses_itself(self) -> Array:
        """Whether the inter loop crosses itself inside: |S sin(lag) - sin(Phi)| < S |sin(Phi + lag)|."""
        return jnp.abs(self._width_offset) < jnp.abs(self._width_slope)

    @property
    def _crossing_cosine(self) -> Float[Array, "..."]:
        """cos s at the crossing; -1, the end of the loop, where there is none."""
        slope = jnp.where(self.crosses_itself, self._width_slope, 1.0)
        return jnp.where(self.crosses_itself, self._width_offset / slope, -1.0)

    @property
    def crossing_x(self) -> Float[Array, "..."]:
        """x_B at which the inter loop crosses itself; NaN where it does not."""
        return jnp.where(self.crosses_itself, (1 - self._crossing_cosine) / 2, jnp.nan)

    @property
    def lobe_areas(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Signed areas of the inter loop below and above its crossing; the whole and 0 without one.

        The width times dx_B = sin(s)/2 ds, integrated from 0 to s*:
        [m (s* - sin s* cos s*)/2 - q sin^3(s*)/3]/4 with m = S sin(lag) - sin(Phi), q = S sin(Phi + lag).

        Raises:
            ValueError: a pair with `cycles_per_period`: lobes of its polygon have no closed form.
        """
        if self.cycles_per_period is not None:
            raise ValueError(
                "`lobe_areas` are those of the continuum, but `cycles_per_period` is "
                f"{self.cycles_per_period}; leave it out, or take the area of the points."
            )
        offset, cosine = self._width_offset, self._crossing_cosine
        s = jnp.arccos(cosine)
        sine = jnp.sin(s)
        lower = (offset * (s - sine * cosine) / 2 - self._width_slope * sine**3 / 3) / 4
        whole = self.inter_area
        return jnp.where(self.crosses_itself, lower, whole), jnp.where(self.crosses_itself, whole - lower, 0.0)


def cascade_outputs(window_a, window_b, u) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """y_A and y_B of a cascade x_B = y_A in its steady state, each memristor remembering its own input.

    x_A = (1 - cos u)/2 gives y_A with harmonics up to the second; a moving average over T = `window` periods multiplies
    the m-th harmonic by sinc(m T) and delays it by m pi T.

    Args:
        window_a, window_b: T in periods.
        u: phase of the input.
    """
    mean = lambda m, c, d, t: jnp.sinc(m * t) * (c * jnp.cos(m * (u - jnp.pi * t)) + d * jnp.sin(m * (u - jnp.pi * t)))
    s, lag = jnp.sinc(window_a), jnp.pi * window_a
    x_a = (1 - jnp.cos(u)) / 2
    y_a = x_a * (1 + s * jnp.cos(u - lag)) / 2
    # y_A = 1/4 - S cos(lag)/8 + (S cos(u - lag) - cos u)/4 - S cos(2u - lag)/8
    cos_lag, sin_lag = jnp.cos(lag), jnp.sin(lag)
    r_b = (
        (2 - s * cos_lag) / 8
        + mean(1, (s * cos_lag - 1) / 4, s * sin_lag / 4, window_b)
        + mean(2, -s * cos_lag / 8, -s * sin_lag / 8, window_b)
    )
    return y_a, (1 - r_b) * y_a

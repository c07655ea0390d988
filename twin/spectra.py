"""Spectra of frequency noise, and random noise that has them.

S(f) is one-sided, in Hz^2/Hz: the noise dnu(t) of a laser's frequency has the autocovariance <dnu(t) dnu(t + tau)> =
int_0^inf S(f) cos(2 pi f tau) df. For calculations a spectrum is a set of harmonics ("lines") whose cosines sum to this
integral on a time grid. They lie evenly at high and logarithmically at low frequencies, so that noise far slower than a
pulse is there as well.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from twin.batching import check_not_negative, check_positive, is_traced, physical, real_array
from twin.closed_form import flat_root

# Lines reach down to e^-32 of 4/T, an eighth of an e-fold apart.
_FOLDS, _PER_FOLD = 32, 8
# Where a Gaussian is 1e-11 of its height.
_BUMP_REACH = 7.0


class AbstractSpectrum(eqx.Module):
    """One-sided spectrum of frequency noise; spectra add with `+`."""

    @abc.abstractmethod
    def density(self, f_hz: ArrayLike) -> Float[Array, "..."]:
        """S(f) in Hz^2/Hz at f >= 0."""

    @abc.abstractmethod
    def lines(self, duration_s: Float[Array, ""], cells: int) -> tuple[Float[Array, " lines"], Float[Array, " lines"]]:
        """Frequencies in Hz and mean squares in Hz^2 of harmonics with this spectrum, for cells of a time grid.

        Their sum of cosines is the autocovariance at all lags up to the duration; nothing is left above the grid's
        Nyquist frequency, cells/(2 duration).
        """

    @property
    @abc.abstractmethod
    def needs_hz(self) -> Float[Array, ""]:
        """A frequency that the time grid must resolve."""

    def __add__(self, other: "AbstractSpectrum") -> "Sum":
        return Sum((self, other))


class Sum(AbstractSpectrum):
    """Independent noises of one laser."""

    parts: tuple[AbstractSpectrum, ...]

    def density(self, f_hz):
        return sum((part.density(f_hz) for part in self.parts), jnp.zeros(()))

    def lines(self, duration_s, cells):
        f_hz, square_hz2 = zip(*(part.lines(duration_s, cells) for part in self.parts), strict=True)
        return jnp.concatenate(f_hz), jnp.concatenate(square_hz2)

    @property
    def needs_hz(self):
        return jnp.max(jnp.stack([part.needs_hz for part in self.parts]))


class White(AbstractSpectrum):
    """S = Dnu/pi at all frequencies: a Lorentzian line.

    Args:
        linewidth_hz: FWHM Dnu, Hz.
    """

    linewidth_hz: Float[Array, ""] = physical()

    def __check_init__(self):
        check_not_negative("linewidth_hz", self.linewidth_hz, "Hz")

    def density(self, f_hz):
        return jnp.broadcast_to(self.linewidth_hz / jnp.pi, jnp.shape(f_hz))

    def lines(self, duration_s, cells):
        f_hz, width_hz = _broad_lines(duration_s, cells)
        return f_hz, self.density(f_hz) * width_hz

    @property
    def needs_hz(self):
        # White noise of the grid is white up to its Nyquist frequency, which is all that a pulse sees.
        return jnp.zeros(())


class Flicker(AbstractSpectrum):
    """S = A f/(f^2 + low^2)/(1 + (f/high)^2): A/f between two cutoffs, with mean square A h^2 ln(h/l)/(h^2 - l^2).

    Args:
        level_hz2: A in Hz^2, the mean square of an e-fold of frequencies.
        low_hz: below it noise counts as calibrated away, S falls to 0; the inverse of the time between calibrations.
        high_hz: above it S falls as f^-3.
    """

    level_hz2: Float[Array, ""] = physical()
    low_hz: Float[Array, ""] = physical()
    high_hz: Float[Array, ""] = physical()

    def __check_init__(self):
        check_not_negative("level_hz2", self.level_hz2, "Hz^2")
        check_positive("low_hz", self.low_hz, "Hz")
        check_positive("high_hz", self.high_hz, "Hz")
        if not is_traced(self.low_hz, self.high_hz) and not self.low_hz < self.high_hz:
            raise ValueError(f"`low_hz` must be below `high_hz`, but they are {self.low_hz} and {self.high_hz}.")

    def density(self, f_hz):
        f = real_array(f_hz)
        return self.level_hz2 * f / (f**2 + self.low_hz**2) / (1 + (f / self.high_hz) ** 2)

    def lines(self, duration_s, cells):
        f_hz, width_hz = _broad_lines(duration_s, cells)
        return f_hz, self.density(f_hz) * width_hz

    @property
    def needs_hz(self):
        return self.low_hz


class ServoBump(AbstractSpectrum):
    """A Gaussian bump, S = h {exp[-(f - f_0)^2/(2 w^2)] + exp[-(f + f_0)^2/(2 w^2)]}, of mean square sqrt(2 pi) h w.

    The second term matters only where f_0 is within a few w of zero. A narrow bump is a line of the mains.

    Args:
        center_hz: f_0, Hz; of a servo, where its gain is one.
        height_hz2_per_hz: h, Hz^2/Hz.
        width_hz: w, standard deviation, Hz.
    """

    center_hz: Float[Array, ""] = physical()
    height_hz2_per_hz: Float[Array, ""] = physical()
    width_hz: Float[Array, ""] = physical()

    def __check_init__(self):
        check_not_negative("center_hz", self.center_hz, "Hz")
        check_not_negative("height_hz2_per_hz", self.height_hz2_per_hz, "Hz^2/Hz")
        check_positive("width_hz", self.width_hz, "Hz")

    def density(self, f_hz):
        f = real_array(f_hz)
        both = [jnp.exp(-0.5 * ((f - sign * self.center_hz) / self.width_hz) ** 2) for sign in (1, -1)]
        return self.height_hz2_per_hz * (both[0] + both[1])

    def lines(self, duration_s, cells):
        # Lines of negative frequency are the second term: a cosine does not know the sign.
        u = (np.arange(2 * cells) + 0.5) / cells - 1
        at, step = real_array(_BUMP_REACH * u), _BUMP_REACH / cells
        square = self.height_hz2_per_hz * self.width_hz * step * jnp.exp(-(at**2) / 2)
        return self.center_hz + self.width_hz * at, square

    @property
    def needs_hz(self):
        return self.center_hz + _BUMP_REACH * self.width_hz


def _broad_lines(duration_s, cells: int) -> tuple[Array, Array]:
    """Midpoints and widths, even in u with f = (4/T) ln(1 + e^u): 1/(2T) apart at high f, even in ln f at low f."""
    top = cells / 8
    u = np.arange(-_FOLDS * _PER_FOLD, round(top * _PER_FOLD)) / _PER_FOLD + 0.5 / _PER_FOLD
    scale_hz = 4 / duration_s
    return scale_hz * np.logaddexp(0.0, u), scale_hz / _PER_FOLD / (1 + np.exp(-u))


def frequency_noise(
    spectrum: AbstractSpectrum, duration_s: ArrayLike, steps: int, trajectories: int, key: PRNGKeyArray
) -> Float[Array, "steps trajectories"]:
    """Random frequency noise at the centres of cells, Hz: harmonics with Gaussian amplitudes.

    dnu(t) = sum_l sigma_l [a_l cos(2 pi f_l t) + b_l sin(2 pi f_l t)] over the lines of the spectrum, a and b normal: a
    Gaussian process of exactly the autocovariance that the filter function is integrated with. The derivative with
    respect to a strength that is zero comes out as 0.
    """
    duration_s = real_array(duration_s)
    f_hz, square_hz2 = spectrum.lines(duration_s, steps)
    t_s = duration_s / steps * (jnp.arange(steps) + 0.5)
    phase = 2 * jnp.pi * t_s[:, None] * f_hz
    a, b = jax.random.normal(key, (2, len(f_hz), trajectories)) * flat_root(square_hz2)[:, None]
    return jnp.cos(phase) @ a + jnp.sin(phase) @ b

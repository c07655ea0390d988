"""Laser pulses: waveforms that know their area, support and breakpoints.

A pulse is the complex Rabi drive `Omega(t) exp(-i phi)` of one transition in rad/s, given as two real fields so that
parameters and derivatives stay real. `Omega` is the Rabi envelope (the field envelope for E1, E2 and E3 lines): the
area is `theta = int Omega dt` and a resonant pulse transfers `sin^2(theta / 2)`. Numeric fields may carry trailing
batch axes, which broadcast against each other.
"""

import abc
import math
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from twin.batching import check_positive, physical, real_array

_SQRT_2PI = math.sqrt(2 * math.pi)
# erfc(6.2 / sqrt 2) = 6e-10 and (4 / pi) exp(-21) = 1e-9: the parts of the area outside the support.
_GAUSSIAN_SUPPORT_SIGMAS = 6.2
_SECH_SUPPORT_TAUS = 21.0


class Drive(NamedTuple):
    """Real and imaginary part of `Omega(t) exp(-i phi)`, rad/s; `imag` is None where it vanishes identically."""

    real: Float[Array, "..."]
    imag: Float[Array, "..."] | None


def _with_phase(envelope: Float[Array, "..."], phase_rad: Float[Array, "..."] | None) -> Drive:
    if phase_rad is None:
        return Drive(envelope, None)
    return Drive(envelope * jnp.cos(phase_rad), -envelope * jnp.sin(phase_rad))


def _pick(slices: Float[Array, "slices ..."], piece: Int[Array, "..."]) -> Float[Array, "..."]:
    """Slice `piece - 1` of each lane; zero before the first edge (piece 0) and after the last."""
    shape = jnp.broadcast_shapes(slices.shape[1:], piece.shape)
    # New axes go behind that of the slices.
    slices = slices.reshape(slices.shape[0], *(1,) * (len(shape) + 1 - slices.ndim), *slices.shape[1:])
    zero = jnp.zeros((1, *shape))
    padded = jnp.concatenate([zero, jnp.broadcast_to(slices, (slices.shape[0], *shape)), zero])
    return jnp.take_along_axis(padded, jnp.broadcast_to(piece, shape)[None], axis=0)[0]


class AbstractPulse(eqx.Module):
    """A waveform on one transition, with the metadata from which time grids are laid.

    `peak_rad_s` is the Rabi frequency of largest magnitude, rad/s.
    """

    peak_rad_s: eqx.AbstractVar[Float[Array, "..."]]

    @abc.abstractmethod
    def drive(self, t_s: Float[Array, "..."], within_s: Float[Array, "..."]) -> Drive:
        """Complex Rabi frequency at `t_s` (s), rad/s.

        `within_s` is a time strictly inside the integrator's current step. A discontinuous waveform takes the piece
        that holds `within_s`, so that a stage at the very end of a step never reads the next piece.
        """

    @property
    @abc.abstractmethod
    def area_rad(self) -> Float[Array, "..."]:
        """Pulse area: the integral of the signed envelope over all times, rad."""

    @property
    @abc.abstractmethod
    def support_s(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Interval outside which at most 1e-9 of the area lies, s."""

    @abc.abstractmethod
    def largest_rad_s(self, low_s: Float[Array, "..."], high_s: Float[Array, "..."]) -> Float[Array, "..."]:
        """Bound on the Rabi frequency between two times, rad/s, tight where the envelope is smooth."""

    @property
    @abc.abstractmethod
    def core_s(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Interval with the bulk of the area: a solution without steps here never saw the pulse, s."""

    @property
    @abc.abstractmethod
    def timescale_s(self) -> Float[Array, "..."]:
        """Shortest time on which the envelope changes between its breakpoints, s; infinite where it is constant."""

    @property
    @abc.abstractmethod
    def breakpoints_s(self) -> tuple[Float[Array, "..."], ...]:
        """Times where the waveform jumps, s; every time grid has a knot at each."""


class Gaussian(AbstractPulse):
    """`Omega(t) = peak exp(-(t - center)^2 / (2 sigma^2))`, not cut and not renormalized.

    Args:
        peak_rad_s: peak Rabi frequency, rad/s (may be negative: a phase of pi).
        center_s: time of the peak, s.
        sigma_s: standard deviation of the *Rabi* envelope, s, positive. Other conventions have constructors.
        phase_rad: laser phase, rad; None where it plays no role (saves half the work).
    """

    peak_rad_s: Float[Array, "..."] = physical()
    center_s: Float[Array, "..."] = physical()
    sigma_s: Float[Array, "..."] = physical()
    phase_rad: Float[Array, "..."] | None = physical(default=None)

    def __check_init__(self):
        check_positive("sigma_s", self.sigma_s, "seconds")

    @classmethod
    def from_area(cls, area_rad, *, center_s, sigma_s, phase_rad=None) -> "Gaussian":
        """The Gaussian of a given area: `peak = theta / (sqrt(2 pi) sigma)`."""
        return cls(real_array(area_rad) / (_SQRT_2PI * real_array(sigma_s)), center_s, sigma_s, phase_rad)

    @classmethod
    def from_tau(cls, area_rad, *, center_s, tau_s, phase_rad=None) -> "Gaussian":
        """From the convention `exp(-(t - center)^2 / tau^2)`: `tau = sqrt(2) sigma`."""
        check_positive("tau_s", tau_s, "seconds")
        sigma_s = real_array(tau_s) / math.sqrt(2)
        return cls.from_area(area_rad, center_s=center_s, sigma_s=sigma_s, phase_rad=phase_rad)

    @classmethod
    def from_field_fwhm(cls, area_rad, *, center_s, fwhm_s, phase_rad=None) -> "Gaussian":
        """From the full width at half maximum of the field (Rabi) envelope: `2 sqrt(2 ln 2) sigma`."""
        check_positive("fwhm_s", fwhm_s, "seconds")
        sigma_s = real_array(fwhm_s) / (2 * math.sqrt(2 * math.log(2)))
        return cls.from_area(area_rad, center_s=center_s, sigma_s=sigma_s, phase_rad=phase_rad)

    @classmethod
    def from_intensity_fwhm(cls, area_rad, *, center_s, fwhm_s, phase_rad=None) -> "Gaussian":
        """From the full width at half maximum of the intensity: `2 sqrt(ln 2) sigma`."""
        check_positive("fwhm_s", fwhm_s, "seconds")
        sigma_s = real_array(fwhm_s) / (2 * math.sqrt(math.log(2)))
        return cls.from_area(area_rad, center_s=center_s, sigma_s=sigma_s, phase_rad=phase_rad)

    def drive(self, t_s, within_s) -> Drive:
        del within_s  # smooth: one formula everywhere
        return _with_phase(self._envelope(t_s), self.phase_rad)

    def largest_rad_s(self, low_s, high_s) -> Float[Array, "..."]:
        return jnp.abs(self._envelope(jnp.clip(self.center_s, low_s, high_s)))

    def _envelope(self, t_s) -> Float[Array, "..."]:
        return self.peak_rad_s * jnp.exp(-0.5 * ((t_s - self.center_s) / self.sigma_s) ** 2)

    @property
    def area_rad(self) -> Float[Array, "..."]:
        return _SQRT_2PI * self.peak_rad_s * self.sigma_s

    @property
    def support_s(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        half_s = _GAUSSIAN_SUPPORT_SIGMAS * self.sigma_s
        return self.center_s - half_s, self.center_s + half_s

    @property
    def core_s(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        return self.center_s - 2 * self.sigma_s, self.center_s + 2 * self.sigma_s

    @property
    def timescale_s(self) -> Float[Array, "..."]:
        return self.sigma_s

    @property
    def breakpoints_s(self) -> tuple[Float[Array, "..."], ...]:
        return ()


class Sech(AbstractPulse):
    """`Omega(t) = peak sech((t - center) / tau)`, area `pi peak tau`: the pulse of Rosen and Zener (1932).

    Args:
        peak_rad_s: peak Rabi frequency, rad/s.
        center_s: time of the peak, s.
        tau_s: width, s, positive.
        phase_rad: laser phase, rad; None where it plays no role.
    """

    peak_rad_s: Float[Array, "..."] = physical()
    center_s: Float[Array, "..."] = physical()
    tau_s: Float[Array, "..."] = physical()
    phase_rad: Float[Array, "..."] | None = physical(default=None)

    def __check_init__(self):
        check_positive("tau_s", self.tau_s, "seconds")

    @classmethod
    def from_area(cls, area_rad, *, center_s, tau_s, phase_rad=None) -> "Sech":
        """The sech pulse of a given area: `peak = theta / (pi tau)`."""
        return cls(real_array(area_rad) / (math.pi * real_array(tau_s)), center_s, tau_s, phase_rad)

    def drive(self, t_s, within_s) -> Drive:
        del within_s
        return _with_phase(self._envelope(t_s), self.phase_rad)

    def largest_rad_s(self, low_s, high_s) -> Float[Array, "..."]:
        return jnp.abs(self._envelope(jnp.clip(self.center_s, low_s, high_s)))

    def _envelope(self, t_s) -> Float[Array, "..."]:
        # 2 e^-u / (1 + e^-2u) with u = |t| / tau never overflows, unlike 1 / cosh.
        decay = jnp.exp(-jnp.abs((t_s - self.center_s) / self.tau_s))
        return self.peak_rad_s * 2 * decay / (1 + decay**2)

    @property
    def area_rad(self) -> Float[Array, "..."]:
        return math.pi * self.peak_rad_s * self.tau_s

    @property
    def support_s(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        half_s = _SECH_SUPPORT_TAUS * self.tau_s
        return self.center_s - half_s, self.center_s + half_s

    @property
    def core_s(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        return self.center_s - 3 * self.tau_s, self.center_s + 3 * self.tau_s

    @property
    def timescale_s(self) -> Float[Array, "..."]:
        return self.tau_s

    @property
    def breakpoints_s(self) -> tuple[Float[Array, "..."], ...]:
        return ()


class PiecewiseConstant(AbstractPulse):
    """Equal slices of constant complex Rabi frequency; one slice is a square pulse.

    Args:
        real_rad_s: real part of each slice, rad/s, shape (slices, *batch).
        imag_rad_s: imaginary part, the same shape; None where all slices are real.
        start_s: beginning of the first slice, s.
        duration_s: length of all slices together, s, positive.
    """

    real_rad_s: Float[Array, "slices ..."] = physical(1)
    imag_rad_s: Float[Array, "slices ..."] | None = physical(1)
    start_s: Float[Array, "..."] = physical()
    duration_s: Float[Array, "..."] = physical()

    def __check_init__(self):
        check_positive("duration_s", self.duration_s, "seconds")
        if self.real_rad_s.ndim == 0:
            raise ValueError(
                "`real_rad_s` must have a leading axis of slices, but is a scalar; give one value a slice."
            )

    @classmethod
    def square(cls, area_rad, *, center_s, duration_s, phase_rad=None) -> "PiecewiseConstant":
        """A square pulse of given area and duration around its centre."""
        duration_s = real_array(duration_s)
        check_positive("duration_s", duration_s, "seconds")
        drive = _with_phase(real_array(area_rad) / duration_s, None if phase_rad is None else real_array(phase_rad))
        imag = None if drive.imag is None else drive.imag[None]
        return cls(drive.real[None], imag, real_array(center_s) - duration_s / 2, duration_s)

    @property
    def slices(self) -> int:
        """Number of slices."""
        return self.real_rad_s.shape[0]

    @property
    def _slice_s(self) -> Float[Array, "..."]:
        return self.duration_s / self.slices

    def drive(self, t_s, within_s) -> Drive:
        del t_s  # constant inside the piece that holds `within_s`
        # Counting the edges passed uses the very numbers of `breakpoints_s`: no rounding can move a time across one.
        piece = sum((within_s >= edge).astype(int) for edge in self.breakpoints_s)
        return Drive(_pick(self.real_rad_s, piece), None if self.imag_rad_s is None else _pick(self.imag_rad_s, piece))

    @property
    def area_rad(self) -> Float[Array, "..."]:
        if self.imag_rad_s is None:
            return jnp.sum(self.real_rad_s, axis=0) * self._slice_s
        square = self.real_rad_s**2 + self.imag_rad_s**2
        # An empty slice has no direction in which it would grow: slope 0, not NaN.
        magnitude = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
        return jnp.sum(magnitude, axis=0) * self._slice_s

    def largest_rad_s(self, low_s, high_s) -> Float[Array, "..."]:
        return jnp.broadcast_to(self.peak_rad_s, jnp.broadcast_shapes(low_s.shape, high_s.shape))

    @property
    def peak_rad_s(self) -> Float[Array, "..."]:
        square = self.real_rad_s**2 + (0.0 if self.imag_rad_s is None else self.imag_rad_s**2)
        return jnp.sqrt(jnp.max(square, axis=0))

    @property
    def support_s(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        return self.start_s, self.start_s + self.duration_s

    @property
    def core_s(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        return self.support_s

    @property
    def timescale_s(self) -> Float[Array, "..."]:
        return jnp.full(jnp.shape(self.duration_s), jnp.inf)

    @property
    def breakpoints_s(self) -> tuple[Float[Array, "..."], ...]:
        return tuple(self.start_s + k * self._slice_s for k in range(self.slices + 1))

"""Sampled waveforms: what a generator holds in its memory, before anything that happens on the way to the ion.

A sample is the complex Rabi drive `Omega exp(-i phi)` of one channel (laser line), held for one period of the sample
clock (zero-order hold). Real and imaginary part are two real arrays, so that parameters and derivatives stay real.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from scipy.fft import next_fast_len

from twin.batching import check_positive, check_values, physical


class Spectrum(NamedTuple):
    """Two-sided spectrum of a waveform: ascending frequencies, Hz, and the modulus at each, rad."""

    frequency_hz: Float[Array, "samples ..."]
    amplitude_rad: Float[Array, "samples channels ..."]


class Waveform(eqx.Module):
    """Samples of the complex Rabi frequency of some channels on one sample clock; zero before and after them.

    Args:
        real_rad_s: real part, rad/s, shape (samples, channels, *batch).
        imag_rad_s: imaginary part, rad/s, the same shape; zeros where the phase is fixed.
        sample_s: time for which each sample is held, s, positive; a scalar or with the batch axes of the samples.
        start_s: beginning of the first sample, s; a scalar or with the batch axes of the samples.

    Raises:
        ValueError: parts of unlike or of no shape (samples, channels, *batch), numbers that are not finite, or a
            sample time that is not positive.
    """

    real_rad_s: Float[Array, "samples channels ..."] = physical(2)
    imag_rad_s: Float[Array, "samples channels ..."] = physical(2)
    sample_s: Float[Array, "..."] = physical()
    start_s: Float[Array, "..."] = physical(default=0.0)

    def __check_init__(self):
        shape = self.real_rad_s.shape
        if len(shape) < 2 or 0 in shape[:2]:
            raise ValueError(
                f"`real_rad_s` must have axes of samples and channels, neither empty, but has shape {shape}; give one "
                "row a sample and one column a channel."
            )
        if self.imag_rad_s.shape != shape:
            raise ValueError(
                f"`imag_rad_s` must have the shape {shape} of `real_rad_s`, but has {self.imag_rad_s.shape}; give "
                "zeros where the phase is fixed."
            )
        check_positive("sample_s", self.sample_s, "seconds")
        for name in ("real_rad_s", "imag_rad_s", "start_s"):
            check_values(name, getattr(self, name), lambda v: v == v, "finite", "give every sample a number")
        for name in ("sample_s", "start_s"):
            if getattr(self, name).ndim > len(shape) - 2:
                raise ValueError(
                    f"`{name}` has the batch shape {getattr(self, name).shape}, but the samples have {shape[2:]}; give "
                    "the samples these axes too."
                )

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.real_rad_s.shape[0]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.real_rad_s.shape[1]

    @property
    def duration_s(self) -> Float[Array, "..."]:
        """Time for which all samples together are held, s."""
        return self.samples * self.sample_s

    @property
    def area_rad(self) -> Float[Array, "channels ..."]:
        """Integral of the real part, rad, shape (channels, *batch).

        Note:
            On resonance and with a fixed phase this is the angle of the rotation. The imaginary part, which turns
            the axis, is not in it, and other than for `PiecewiseConstant` negative samples count as negative.
        """
        return jnp.sum(self.real_rad_s, axis=0) * self.sample_s

    @property
    def peak_rad_s(self) -> Float[Array, "channels ..."]:
        """Largest modulus, rad/s, shape (channels, *batch)."""
        return jnp.max(jnp.abs(self._complex), axis=0)

    @property
    def largest_slew_rad_s2(self) -> Float[Array, "channels ..."]:
        """Largest modulus of the step between neighbours over `sample_s`, rad/s^2, shape (channels, *batch).

        The steps from zero to the first sample and from the last to zero count.
        """
        zero = jnp.zeros_like(self._complex[:1])
        steps = jnp.diff(jnp.concatenate([zero, self._complex, zero]), axis=0)
        return jnp.max(jnp.abs(steps), axis=0) / self.sample_s

    def spectrum(self) -> Spectrum:
        """Modulus of `sample_s sum_k Omega_k exp(-2 pi i f k sample_s)` at the frequencies of the DFT.

        Returns:
            Frequencies in Hz, ascending from minus half the sample clock, shape (samples, *batch of the sample time),
            and the amplitude in rad, shape (samples, channels, *batch); at zero it is the modulus of the area.
        """
        cycles = np.fft.fftshift(np.fft.fftfreq(self.samples)).reshape(-1, *(1,) * self.sample_s.ndim)
        amplitude = jnp.abs(jnp.fft.fftshift(jnp.fft.fft(self._complex, axis=0), axes=0)) * self.sample_s
        return Spectrum(cycles / self.sample_s, amplitude)

    @property
    def _complex(self):
        # The modulus of a complex zero has slope 0 in JAX, that of a square root of squares has none.
        return lax.complex(self.real_rad_s, self.imag_rad_s)


def convolved(
    samples: Float[Array, "n channels ..."], kernels: Float[np.ndarray, "weights channels"]
) -> Float[Array, "full channels ..."]:
    """Full convolution of each channel with a kernel of unit sum, shape (n + weights - 1, channels, *batch)."""
    if len(kernels) == 1:
        return samples
    size = len(samples) + len(kernels) - 1
    points = next_fast_len(size, real=True)
    transfer = jnp.fft.rfft(kernels, points, axis=0)
    transfer = transfer.reshape(*transfer.shape, *(1,) * (samples.ndim - 2))
    return jnp.fft.irfft(transfer * jnp.fft.rfft(samples, points, axis=0), points, axis=0)[:size]

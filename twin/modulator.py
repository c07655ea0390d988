"""From a generator's samples to the light on the ion: crosstalk between channels and the modulator's rise.

The acoustic wave in an acousto-optic modulator crosses a Gaussian beam. The share of the beam that it has reached is a
normal distribution function, so that a step comes out as `Phi(t / sigma)`. The constant delay from the transducer to
the middle of the beam is left out. Everything here is linear in the samples.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import ndtr, ndtri

from twin.batching import check_not_negative
from twin.waveform import Waveform, convolved

# From 10 % to 90 % of a normal distribution: 2.563 standard deviations.
RISE_SIGMAS = 2 * float(ndtri(0.9))
# Beyond 6.2 standard deviations on both sides lie 6e-10 of a normal distribution.
_RESPONSE_SIGMAS = 6.2


def step_response(t_s: Float[Array, "..."], rise_s: float) -> Float[Array, "..."]:
    """Response to a unit step at time 0: `Phi(t / sigma)` with the 10-90 % rise time `rise_s = 2.563 sigma`, s."""
    if rise_s == 0:
        return jnp.heaviside(t_s, 0.5)
    return jax.scipy.special.ndtr(t_s * (RISE_SIGMAS / rise_s))


def mixed(
    waveform: Waveform,
    share_real: Float[Array, "lines channels"] | None,
    share_imag: Float[Array, "lines channels"] | None,
) -> Waveform:
    """The waveform of each line: a complex share of each channel (None: the identity, and zeros)."""
    if share_real is None and share_imag is None:
        return waveform
    real, imag = waveform.real_rad_s, waveform.imag_rad_s
    along = jnp.eye(waveform.channels) if share_real is None else share_real
    across = jnp.zeros_like(along) if share_imag is None else share_imag
    mix = lambda share, part: jnp.einsum("lc,nc...->nl...", share, part)
    parts = mix(along, real) - mix(across, imag), mix(along, imag) + mix(across, real)
    return Waveform(*parts, waveform.sample_s, waveform.start_s)


def modulated(waveform: Waveform, *, sample_s: float, rise_s: float, oversampling: int) -> Waveform:
    """The held samples behind the modulator, on a finer clock: exact means over each fine sample.

    Args:
        waveform: samples, each held for its time.
        sample_s: their clock, s, a known number: it and `rise_s` decide the shape of the answer.
        rise_s: 10-90 % rise time, s; 0 repeats the samples.
        oversampling: fine samples per sample, at least 1.

    Returns:
        A waveform that begins earlier and ends later by the part of the response that matters (at most 1e-9 of it is
        cut). The weights are of unit sum: the area is kept.

    Raises:
        ValueError: a negative rise time, or no fine samples.
    """
    check_not_negative("rise_s", rise_s, "seconds")
    if oversampling < 1:
        raise ValueError(f"`oversampling` must be at least 1, but is {oversampling}; 1 keeps the sample clock.")
    real, imag = (jnp.repeat(part, oversampling, axis=0) for part in (waveform.real_rad_s, waveform.imag_rad_s))
    fine_s = waveform.sample_s / oversampling
    if rise_s == 0:
        return Waveform(real, imag, fine_s, waveform.start_s)
    weights = _mean_response(rise_s / RISE_SIGMAS / sample_s * oversampling)
    reach = len(weights) // 2
    real, imag = (convolved(part, np.tile(weights[:, None], waveform.channels)) for part in (real, imag))
    return Waveform(real, imag, fine_s, waveform.start_s - reach * fine_s)


def _mean_response(sigma: float) -> Float[np.ndarray, " weights"]:
    """Mean over each slice of the response to one held slice in the middle; sigma in slices, the weights of unit sum.

    With `G(t) = t Phi(t / sigma) + sigma phi(t / sigma)`, the integral of the step response, the mean over slice m is
    `G(m + 1) - 2 G(m) + G(m - 1)`.
    """
    reach = math.ceil(_RESPONSE_SIGMAS * sigma) + 1
    m = np.arange(-reach - 1, reach + 2)
    integral = m * ndtr(m / sigma) + sigma * np.exp(-0.5 * (m / sigma) ** 2) / math.sqrt(2 * math.pi)
    weights = np.diff(integral, 2)
    return weights / np.sum(weights)

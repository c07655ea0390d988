"""Pulse families: few numbers that make the unconstrained samples of `Hardware.allowed`, so that every limit holds.

Piecewise constant (GRAPE): every sample is free. Cubic B-splines and random Fourier series (CRAB, added to the pulses
at the start) have fewer numbers and smooth pulses. DRAG adds a quadrature proportional to the slope of the envelope and
a phase that follows its square, against what shifts a line while light is on.

References:
    Khaneja et al., J. Magn. Reson. 172, 296 (2005), GRAPE. Caneva, Calarco and Montangero, Phys. Rev. A 84, 022326
    (2011), CRAB. Motzoi et al., Phys. Rev. Lett. 103, 110501 (2009), DRAG. Wimperis, J. Magn.
    Reson. A 109, 221 (1994), BB1. Brown, Harrow and Chuang, Phys. Rev. A 70, 052318 (2004), SK1. Cummins, Llewellyn
    and Jones, Phys. Rev. A 67, 042308 (2003), CORPSE.
"""

import math
from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.interpolate import BSpline

from calibration.hardware import Hardware
from twin.waveform import Waveform

Raw = tuple[Float[Array, "raw channels"], Float[Array, "raw channels"] | None]
_CUBIC = 3
# Flip angle and phase of each piece of a pi pulse that corrects itself, rad.
_BB1 = math.acos(-1 / 4)
_SK1 = math.acos(-1 / 4)
_CORPSE = math.asin(math.sin(math.pi / 2) / 2)
COMPOSITES = {
    # Against wrong Rabi frequencies, to sixth and to fourth order.
    "bb1": ((math.pi, 0.0), (math.pi, _BB1), (2 * math.pi, 3 * _BB1), (math.pi, _BB1)),
    "sk1": ((math.pi, 0.0), (2 * math.pi, -_SK1), (2 * math.pi, _SK1)),
    # Against detunings, to fourth order.
    "corpse": (
        (2 * math.pi + math.pi / 2 - _CORPSE, 0.0), (2 * math.pi - 2 * _CORPSE, math.pi),
        (math.pi / 2 - _CORPSE, 0.0),
    ),
}  # fmt: skip


class AbstractFamily(eqx.Module):
    """A map from free numbers to unconstrained samples of all channels."""

    @abstractmethod
    def first(self, raw: Raw) -> Float[Array, " numbers"]:
        """The numbers whose samples are closest to given ones, where a search begins."""

    @abstractmethod
    def raw(self, point: Float[Array, " numbers"]) -> Raw:
        """Unconstrained samples: real parts, and imaginary parts where the phase is free."""


class Linear(AbstractFamily):
    """Samples are `base + basis @ numbers`, each channel and part with numbers of its own.

    Args:
        basis: shape (raw samples, numbers of a channel and part).
        base: what the numbers are added to, shape (parts, raw samples, channels); None: zero.
        parts: 1 where the phase is fixed, else 2. channels: of the hardware.
    """

    basis: Float[Array, "raw numbers"]
    base: Float[Array, "parts raw channels"] | None
    parts: int = eqx.field(static=True)
    channels: int = eqx.field(static=True)

    def first(self, raw: Raw) -> Float[Array, " numbers"]:
        given = _stacked(raw) - (0.0 if self.base is None else self.base)
        least = jnp.linalg.lstsq(self.basis, jnp.moveaxis(given, 1, 0).reshape(len(self.basis), -1))[0]
        return jnp.moveaxis(least.reshape(-1, self.parts, self.channels), 0, 1).ravel()

    def raw(self, point: Float[Array, " numbers"]) -> Raw:
        numbers = point.reshape(self.parts, -1, self.channels)
        raw = jnp.einsum("rk,pkc->prc", self.basis, numbers)
        raw = raw if self.base is None else self.base + raw
        return raw[0], None if self.parts == 1 else raw[1]


class Drag(AbstractFamily):
    """Envelopes u with a quadrature and a phase: `(u + i a T du/dt) exp(i b integral of u^2 dt / T)`, T the length.

    Args:
        envelope: family of the real envelopes u; a and b are two further numbers a channel.
    """

    envelope: Linear

    def first(self, raw: Raw) -> Float[Array, " numbers"]:
        return jnp.append(self.envelope.first((raw[0], None)), jnp.zeros(2 * self.envelope.channels))

    def raw(self, point: Float[Array, " numbers"]) -> Raw:
        channels = self.envelope.channels
        u, _ = self.envelope.raw(point[: -2 * channels])
        quadrature, chirp = point[-2 * channels :].reshape(2, channels)
        slope = quadrature * len(u) * jnp.asarray(jnp.gradient(u, axis=0))
        phase = chirp * jnp.cumsum(u**2, axis=0) / len(u)
        return u * jnp.cos(phase) - slope * jnp.sin(phase), u * jnp.sin(phase) + slope * jnp.cos(phase)


FAMILIES = ("samples", "splines", "fourier", "drag")


def family(name: str, hardware: Hardware, raw: Raw, *, numbers: int = 12, seed: int = 0) -> AbstractFamily:
    """A family by name, for pulses that begin at `raw`.

    Args:
        name: "samples", "splines", "fourier" or "drag" (splines for the envelopes).
        hardware: limits of the channels. raw: unconstrained samples at the start.
        numbers: of each channel and part: B-splines, or sines and cosines.
        seed: of the random frequencies of a Fourier series.

    Raises:
        ValueError: an unknown name, more numbers than samples, or DRAG with a fixed phase.
    """
    samples, channels = raw[0].shape
    parts = 1 if hardware.real_only else 2
    if name not in FAMILIES:
        raise ValueError(f"the family must be one of {', '.join(FAMILIES)}, but is {name!r}.")
    if name != "samples" and not _CUBIC < numbers <= samples:
        raise ValueError(f"a family of {numbers} numbers cannot shape {samples} free samples; "
                         f"give 4 to {samples} numbers.")  # fmt: skip
    if name == "samples":
        return Linear(jnp.eye(samples), None, parts, channels)
    if name == "fourier":
        return Linear(_random_fourier(samples, numbers, seed), _stacked(raw), parts, channels)
    if name == "splines":
        return Linear(_cubic_splines(samples, numbers), None, parts, channels)
    if hardware.real_only:
        raise ValueError("DRAG turns the phase, but that of this hardware is fixed; free it.")
    return Drag(Linear(_cubic_splines(samples, numbers), None, 1, channels))


def composite(name: str, hardware: Hardware, samples: int) -> Waveform:
    """A pi pulse on every channel that corrects itself, in pieces of constant amplitude that fill their time.

    Args:
        name: "bb1" or "sk1", against wrong Rabi frequencies; "corpse", against detunings.
        hardware: its clock; the phase must be free, but for "corpse", which only changes sign.
        samples: of the pulse.

    Raises:
        ValueError: an unknown name, or a phase that is fixed.
    """
    if name not in COMPOSITES:
        raise ValueError(f"the composite pulse must be one of {', '.join(COMPOSITES)}, but is {name!r}.")
    if hardware.real_only and name != "corpse":
        raise ValueError(f"{name} turns the phase, but that of this hardware is fixed; free it, or begin at corpse.")
    angles, phases = np.array(COMPOSITES[name]).T
    # The mean of the pieces within each sample, so that every piece has its area however few the samples.
    edges = np.concatenate([[0.0], np.cumsum(angles)]) / np.sum(angles) * samples
    held = np.clip(np.arange(1, samples + 1)[:, None], edges[:-1], edges[1:])
    before = np.clip(np.arange(samples)[:, None], edges[:-1], edges[1:])
    z = (held - before) @ np.exp(1j * phases) * np.sum(angles) / (samples * hardware.sample_s)
    both = np.repeat(z[:, None], hardware.channels, axis=1)
    return Waveform(both.real, both.imag, hardware.sample_s)


def _stacked(raw: Raw) -> Float[Array, "parts raw channels"]:
    return jnp.stack([part for part in raw if part is not None])


def _cubic_splines(samples: int, numbers: int) -> Float[Array, "raw numbers"]:
    """Cubic B-splines on evenly spaced knots, at the middles of the samples."""
    inner = np.linspace(0, 1, numbers - _CUBIC + 1)
    knots = np.concatenate([np.zeros(_CUBIC), inner, np.ones(_CUBIC)])
    at = (np.arange(samples) + 0.5) / samples
    return jnp.asarray(BSpline.design_matrix(at, knots, _CUBIC).toarray())


def _random_fourier(samples: int, numbers: int, seed: int) -> Float[Array, "raw numbers"]:
    """Sines and cosines of randomly shifted harmonics, `n + u` periods with u in [-1/2, 1/2]."""
    harmonics = np.arange(1, (numbers + 1) // 2 + 1)
    periods = harmonics + np.random.default_rng(seed).uniform(-0.5, 0.5, len(harmonics))
    angle = 2 * np.pi * (np.arange(samples)[:, None] + 0.5) / samples * periods
    return jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], axis=1)[:, :numbers])

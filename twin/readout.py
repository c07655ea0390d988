"""Readout by shelving: from the dark population to what the detector says, shot by shot, and photon by photon."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.special import gammainc, gammaincc, gammaln, xlogy
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, Real


def _require(name: str, value: ArrayLike, good, must: str, hint: str) -> None:
    """Refuse a bad argument where its value is known; a traced one becomes NaN in its lane."""
    if isinstance(value, Tracer):
        return
    bad = ~np.asarray(good(np.asarray(value)))
    if bad.any():
        raise ValueError(f"`{name}` must be {must}, but is {np.asarray(value)[bad].flat[0]:g}. {hint}")


def _in_unit_interval(value: Real[ArrayLike, "..."]) -> Array:
    value = jnp.asarray(value, float)
    return jnp.where((value >= 0.0) & (value <= 1.0), value, jnp.nan)


def assignment_probability(
    p_dark: Real[ArrayLike, "*#batch"],
    readout_error_bright: Real[ArrayLike, "*#batch"],
    readout_error_dark: Real[ArrayLike, "*#batch"],
) -> Float[Array, "..."]:
    """Probability that a shot is assigned "dark", with independent errors on the two outcomes.

        P("dark") = (1 - e_d) p_dark + e_b (1 - p_dark)

    Args:
        p_dark: population of the shelved (dark) levels when readout starts; s in the Lambda scheme. Not restricted to
            [0, 1], so that the rounding of a solver passes through.
        readout_error_bright: e_b in [0, 1], a bright ion read dark.
        readout_error_dark: e_d in [0, 1], a dark ion read bright; includes decay during detection.

    Returns:
        Probability, broadcast shape.

    Raises:
        ValueError: an error outside [0, 1]; NaN in its lane while tracing.
    """
    for name, value in (("readout_error_bright", readout_error_bright), ("readout_error_dark", readout_error_dark)):
        hint = "It is a probability, not a percentage."
        _require(name, value, lambda e: (e >= 0) & (e <= 1), "in [0, 1]", hint)
    e_bright, e_dark = _in_unit_interval(readout_error_bright), _in_unit_interval(readout_error_dark)
    p_dark = jnp.asarray(p_dark, float)
    return (1.0 - e_dark) * p_dark + e_bright * (1.0 - p_dark)


def check_shots(shots: Real[ArrayLike, "..."] | None, key: PRNGKeyArray | None) -> None:
    """Refuse shots that nobody can play: both are given, or neither for expectation values.

    Args:
        shots: repetitions of each setting, whole and at least 1. key: of the counts.

    Raises:
        ValueError: one without the other; known shots that are fractional or below 1.
    """
    if (shots is None) != (key is None):
        raise ValueError("`shots` and `key` go together: give both for sampled counts, or neither for expectations.")
    if shots is not None:
        hint = "None plays expectation values."
        _require("shots", shots, lambda n: (n >= 1) & (n == np.floor(n)), "whole and at least 1", hint)


def sample_counts(
    key: PRNGKeyArray,
    probability: Real[ArrayLike, "*#batch"],
    shots: Real[ArrayLike, "*#batch"],
    *,
    tolerance: float = 1e-7,
) -> Float[Array, "..."]:
    """Number of shots with a given outcome, n ~ Binomial(shots, probability), independent in each lane.

    Args:
        key: random key; the same key gives the same counts.
        probability: of the outcome in one shot.
        shots: repetitions of each setting, non-negative whole numbers.
        tolerance: how far the probability may lie outside [0, 1]. A population integrated to 1e-8 can come out as
            -1e-9; such a lane is drawn at the nearest end of the interval. Anything further out is refused.

    Returns:
        Counts as whole floats, broadcast shape: a lane whose probability or number of shots is bad is NaN.

    Raises:
        ValueError: a probability further outside [0, 1] than the tolerance, or shots that are negative or fractional;
            NaN in its lane while tracing. A NaN probability is that of an invalid lane, and gives NaN.
    """

    def inside(p):
        return (p >= -tolerance) & (p <= 1 + tolerance)

    def whole(n):
        return (n >= 0) & (n == jnp.floor(n))

    hint = f"Beyond the tolerance of {tolerance:g} it is not the rounding of a solver."
    _require("probability", probability, lambda p: np.isnan(p) | inside(p), "in [0, 1]", hint)
    _require("shots", shots, whole, "a non-negative whole number", "It counts repetitions of one setting.")
    p, n = jnp.broadcast_arrays(jnp.asarray(probability, float), jnp.asarray(shots, float))
    valid = inside(p) & whole(n)
    # Bad lanes draw from a harmless law first, so that the sampler's loop never sees them.
    counts = jax.random.binomial(key, jnp.where(valid, n, 0.0), jnp.where(valid, jnp.clip(p, 0.0, 1.0), 0.5))
    return jnp.where(valid, counts, jnp.nan)


def standard_error(probability: Real[ArrayLike, "*#batch"], shots: Real[ArrayLike, "*#batch"]) -> Float[Array, "..."]:
    """Standard deviation of an estimated probability, sqrt(p (1 - p)/N): quantum projection noise.

    Args:
        probability: p in [0, 1] of the outcome in one shot.
        shots: N, repetitions.

    Returns:
        Standard deviation of counts/shots, broadcast shape; NaN for p outside [0, 1]. A measured frequency of 0 or 1
        gives 0, which is not an error bar: use counts and their likelihood there.
    """
    p = _in_unit_interval(probability)
    return jnp.sqrt(p * (1.0 - p) / jnp.asarray(shots, float))


def bright_photons(
    photons: Real[ArrayLike, "*#batch"],
    bright_rate_per_s: Real[ArrayLike, "*#batch"],
    background_rate_per_s: Real[ArrayLike, "*#batch"],
    detection_s: Real[ArrayLike, "*#batch"],
) -> Float[Array, "..."]:
    """Probability of counting n photons from a bright ion: Poisson with mean (R_B + R_D) t.

    Args:
        photons: n, a non-negative whole number.
        bright_rate_per_s: R_B, detected photons of the ion a second.
        background_rate_per_s: R_D, counted whether or not the ion shines.
        detection_s: t, how long is counted.
    """
    mean = (jnp.asarray(bright_rate_per_s, float) + background_rate_per_s) * detection_s
    return _poisson(jnp.asarray(photons, float), mean)


def dark_photons(
    photons: Real[ArrayLike, "*#batch"],
    bright_rate_per_s: Real[ArrayLike, "*#batch"],
    background_rate_per_s: Real[ArrayLike, "*#batch"],
    detection_s: Real[ArrayLike, "*#batch"],
    lifetime_s: Real[ArrayLike, "*#batch"],
) -> Float[Array, "..."]:
    """Probability of counting n photons from a shelved ion, which shines from the moment it decays.

        P(n) = e^(-g t) Pois(n; R_D t)
             + (g / R_B) e^(-g t (1 + R_D / R_B)) k^-(n+1) [ P(n+1, k (R_D + R_B) t) - P(n+1, k R_D t) ]

    with g = 1 / lifetime, k = 1 - g / R_B and P the regularised lower gamma function: the mean count of a decay at
    time u is R_D t + R_B (t - u), averaged over the exponential law of u.

    Args:
        photons, bright_rate_per_s, background_rate_per_s, detection_s: see `bright_photons`; R_B above g.
        lifetime_s: of the shelved level, s, finite.

    Raises:
        ValueError: an ion that decays faster than it shines; NaN in its lane while tracing.
    """
    n, shining = jnp.asarray(photons, float), jnp.asarray(bright_rate_per_s, float)
    background, t, decay = (jnp.asarray(a, float) for a in (background_rate_per_s, detection_s, 1 / lifetime_s))
    hint = "The law holds for an ion that counts photons before it decays."
    _require("bright_rate_per_s * lifetime_s", shining / decay, lambda r: r > 1, "larger than 1", hint)
    k = jnp.where(shining > decay, 1 - decay / shining, jnp.nan)
    late, early = gammainc(n + 1, k * (background + shining) * t), gammainc(n + 1, k * background * t)
    weight = decay / shining * jnp.exp(-decay * t * (1 + background / shining) - (n + 1) * jnp.log(k))
    return jnp.exp(-decay * t) * _poisson(n, background * t) + weight * (late - early)


def threshold_errors(
    threshold: int,
    bright_rate_per_s: Real[ArrayLike, "*#batch"],
    background_rate_per_s: Real[ArrayLike, "*#batch"],
    detection_s: Real[ArrayLike, "*#batch"],
    lifetime_s: Real[ArrayLike, "*#batch"],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(readout_error_bright, readout_error_dark) of calling a shot dark below `threshold` photons.

    Args:
        threshold: fewest photons of a shot that is called bright, at least 1.
        bright_rate_per_s, background_rate_per_s, detection_s, lifetime_s: see `dark_photons`.
    """
    if threshold < 1:
        raise ValueError(f"`threshold` must be at least 1, but is {threshold}. No shot has fewer than 0 photons.")
    mean = (jnp.asarray(bright_rate_per_s, float) + background_rate_per_s) * detection_s
    # A bright ion is called dark below the threshold: the Poisson law summed is an upper gamma function.
    missed = gammaincc(float(threshold), mean)
    numbers = jnp.arange(threshold, dtype=float).reshape((-1,) + (1,) * mean.ndim)
    called_dark = dark_photons(numbers, bright_rate_per_s, background_rate_per_s, detection_s, lifetime_s)
    return missed, 1 - jnp.sum(called_dark, axis=0)


def _poisson(n: Float[Array, "..."], mean: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.exp(xlogy(n, mean) - mean - gammaln(n + 1))

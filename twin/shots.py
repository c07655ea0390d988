"""Devices whose shots differ: responses averaged over the slow noise of `twin.slow_noise`.

Amplitudes multiply areas, so their draws are more cycles of one device: a new first axis, as phonon numbers are.
Detunings change the equations of motion, so their draws are more devices: a new last axis of the batch. Nodes are
static, and laid for the largest noise, areas and widths that will occur; beyond these, cycles are flagged and NaN.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from twin.batching import real_array, with_last_axis
from twin.loop import Responder, Response, Settings, averaged
from twin.methods import ClosedForm
from twin.slow_noise import (
    Draws,
    Nodes,
    SlowNoise,
    nodes_for,
    noisy_coherence,
    noisy_populations,
    slow_quadrature,
    without_detuning,
)

# Of the averages of methods that state no error of their own.
_DEFAULT_ERROR = 1e-8
# Where nodes are not laid yet, draws are taken to reach this many standard deviations.
_REACH = 5.0
ROUNDING = 1e-6


class Reach(NamedTuple):
    """Largest factors on the two areas, and the largest offset of a detuning, Hz, among the draws."""

    factor_1: float
    factor_2: float
    detuning_hz: float


def laid(ion, box: Mapping[str, tuple[float, float]], areas_rad: tuple, sigmas_s: tuple, error: float | None):
    """The ion with as many nodes as its slow noise needs anywhere in a box; nodes that a user gave are kept.

    Args:
        ion: an `IonMemristor` of known values. box: (low, high) of each parameter that will vary.
        areas_rad, sigmas_s: of both pulses, the largest in the box.
        error: of populations, by the average alone; None for that of a method without one.
    """
    noise = ion.slow_noise
    if noise is None and not any(name in box for name in SlowNoise.parameters()):
        return ion
    noise = SlowNoise() if noise is None else noise
    own = noise.nodes is not None and noise.served is None
    if own or (isinstance(ion.method, ClosedForm) and not ion.moves):
        return dataclasses.replace(ion, slow_noise=noise)
    error = _DEFAULT_ERROR if error is None else error
    most = largest_noise(noise, box)
    served = sizes(most, tuple(map(_largest, areas_rad)), tuple(map(_largest, sigmas_s)))
    noise = dataclasses.replace(
        noise, nodes=nodes_for(most, areas_rad, sigmas_s, error), served=jnp.stack(served), error=error
    )
    return dataclasses.replace(ion, slow_noise=noise)


def reach(ion, box: Mapping[str, tuple[float, float]]) -> Reach:
    """How far the draws of an ion go, anywhere in a box; known values."""
    if ion.slow_noise is None:
        return Reach(1.0, 1.0, 0.0)
    most, nodes = largest_noise(ion.slow_noise, box), ion.slow_noise.nodes
    outermost = [float(np.polynomial.hermite_e.hermegauss(n)[0][-1]) for n in nodes] if nodes else [_REACH] * 4
    # A correlated variable has parts of both: sqrt(a^2 + b^2) at the most.
    first, second = math.hypot(*outermost[:2]), math.hypot(*outermost[2:])
    e_1, e_2 = (_largest(s) for s in (most.amplitude_noise_1, most.amplitude_noise_2))
    d = max(_largest(s) for s in (most.detuning_noise_1_hz, most.detuning_noise_2_hz))
    return Reach(1 + first * e_1, 1 + first * e_2, second * d)


def amplitude_draws(ion) -> int:
    """How many cycles stand for one."""
    noise = ion.slow_noise
    return 1 if noise is None or noise.nodes is None else noise.nodes[0] * noise.nodes[1]


def averaging(ion, settings: Settings, largest: tuple[Float[Array, "..."], Float[Array, "..."]]) -> Responder:
    """What answers mean areas, rad, by populations averaged over the shots: `IonMemristor.by_area` of a noisy ion.

    Raises:
        ValueError: nodes that are not laid; detuning noise that is known, with `ClosedForm`.
    """
    noise = ion.slow_noise
    silent = without_detuning(noise) if isinstance(ion.method, ClosedForm) else jnp.zeros(())
    if isinstance(ion.method, ClosedForm) and not ion.moves:
        return _exact(ion, silent)
    if noise.nodes is None:
        raise ValueError(
            "the nodes of `slow_noise` are chosen by `run`, `prepared` and `planned` from known values; inside jit, "
            "grad or vmap plan the device before, or give `SlowNoise(nodes=...)`."
        )
    e, d = _parts(noise, noise.nodes)
    many = noise.nodes[2:] != (1, 1)
    still = dataclasses.replace(ion, slow_noise=None)
    last = (lambda a: a[..., None]) if many else (lambda a: a)
    if many:
        still, settings = with_last_axis(still), dataclasses.replace(
            settings,
            **{k: _behind(getattr(settings, k)) for k in ("detuning_1_hz", "detuning_2_hz")},
        )  # fmt: skip
        still = dataclasses.replace(
            still,
            detuning_1_hz=still.detuning_1_hz + d.detuning_1_hz,
            detuning_2_hz=still.detuning_2_hz + d.detuning_2_hz,
        )
    grown = [
        last(theta * lax.stop_gradient(jnp.max(jnp.abs(factor), axis=-1)))
        for theta, factor in zip(largest, (e.factor_1, e.factor_2), strict=True)
    ]
    # Room for the largest draw, in whatever is laid by areas at full command.
    own = still.largest_areas
    shares = [jnp.max(lax.stop_gradient(g / jnp.maximum(o, 1e-12))) for g, o in zip(grown, own, strict=True)]
    still = dataclasses.replace(
        still, amplitude_1=still.amplitude_1 * shares[0], amplitude_2=still.amplitude_2 * shares[1]
    )
    by_area = still.by_area(settings, (grown[0], grown[1]))
    now = sizes(noise, largest, (ion.sigma_1_s, ion.sigma_2_s))
    inside = jnp.asarray(True)
    if noise.served is not None:
        for size, most in zip(now, noise.served, strict=True):
            inside = inside & (size <= most * (1 + ROUNDING))
    # NaN where one node stands for noise that is traced.
    known = d.factor_1 if many else d.factor_1[..., 0]

    def respond(theta_1, theta_2, *, alone, of_cycle=None) -> Response:
        axes = jnp.ndim(theta_1)

        def drawn(theta, factor) -> Array:
            first = jnp.moveaxis(factor, -1, 0)
            first = first.reshape(first.shape[:1] + (1,) * (axes + 1 - first.ndim) + first.shape[1:])
            return last(theta * first) * known

        if many and jnp.ndim(alone):
            alone = jnp.asarray(alone)[..., None]
        response = by_area(drawn(theta_1, e.factor_1), drawn(theta_2, e.factor_2), alone=alone, of_cycle=of_cycle)
        if many:
            response = averaged(response, d.weights, -1)
        response = averaged(response, e.weights.reshape((-1,) + (1,) * axes))
        valid = response.valid & inside & (silent == 0)
        lost = jnp.where(valid, 0.0, jnp.nan)
        error = response.error_estimate + noise.error
        return Response(response.populations + lost, response.coherence_vs + lost, valid, error, response.method)

    return respond


def _exact(ion, silent: Float[Array, "..."]) -> Responder:
    """Closed forms of an ion at rest have closed means."""

    def respond(theta_1, theta_2, *, alone, of_cycle=None) -> Response:
        del of_cycle  # closed forms know no laser offset
        theta_1, theta_2 = ion.at_rest(theta_1, theta_2)
        areas = theta_1, jnp.where(alone, 0.0, theta_2), ion.slow_noise, ion.start
        populations = [p + silent for p in noisy_populations(*areas)]
        zero = jnp.zeros_like(populations[0])
        stacked = jnp.stack(populations + [zero] * (len(ion.system(0.0, 0.0).levels) - 3))
        valid = jnp.all(jnp.isfinite(stacked), axis=0)
        return Response(stacked, jnp.stack([zero, noisy_coherence(*areas) + zero]), valid, zero, "closed form")

    return respond


def _parts(noise: SlowNoise, nodes: Nodes) -> tuple[Draws, Draws]:
    """Draws of amplitudes alone and of detunings alone, which are independent."""
    zero = jnp.zeros(())
    amplitudes = dataclasses.replace(noise, detuning_noise_1_hz=zero, detuning_noise_2_hz=zero)
    detunings = dataclasses.replace(noise, amplitude_noise_1=zero, amplitude_noise_2=zero)
    return slow_quadrature(amplitudes, (*nodes[:2], 1, 1)), slow_quadrature(detunings, (1, 1, *nodes[2:]))


def sizes(noise: SlowNoise, areas_rad: tuple, sigmas_s: tuple) -> list[Float[Array, "..."]]:
    """What nodes depend on: spreads of the areas, rad, and of the detunings over the widths of the lines."""
    stds = (noise.amplitude_noise_1, noise.amplitude_noise_2, noise.detuning_noise_1_hz, noise.detuning_noise_2_hz)
    return [real_array(std * jnp.abs(by)) for std, by in zip(stds, (*areas_rad, *sigmas_s), strict=True)]


def largest_noise(noise: SlowNoise, box: Mapping[str, tuple[float, float]]) -> SlowNoise:
    """The largest standard deviations in a box, and the correlations at its ends and where they vanish."""
    values = {}
    for name in SlowNoise.parameters():
        now = np.asarray(getattr(noise, name)).ravel()
        if name.endswith("correlation"):
            low, high = box.get(name, (0.0, 0.0))
            ends = [low, high, 0.0] if low < 0 < high else [low, high]
            values[name] = np.array(ends) if name in box else now
        else:
            values[name] = np.asarray(float(box[name][1]) if name in box else np.max(now))
    return SlowNoise(**values)


def _largest(values) -> float:
    return float(np.max(np.abs(np.asarray(values))))


def _behind(array: Float[Array, "..."]) -> Float[Array, "..."]:
    return array[..., None] if array.ndim else array

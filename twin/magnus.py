"""Commutator-free Magnus steps of fourth order on a static grid: the hot path of large batches at errors near 1e-6.

    y(t + h) = exp(h (a A_2 + b A_1)) exp(h (a A_1 + b A_2)) y(t),   A_k = A(t + c_k h)

with the Gauss nodes c = 1/2 -+ sqrt(3)/6 and a, b = 1/4 +- sqrt(3)/6. Each exponential is its Taylor polynomial of
degree six acting on the state, so no matrix is ever formed. With saves, all lanes take the same number of steps between
two saves: the saved states are then rows of the scan, and need no gathering lane by lane.

The loop is a bare `lax.scan`, not Diffrax's: experiments/benchmarks measures both with this very step (`loop`).

References: Blanes and Moan, Appl. Numer. Math. 56, 1519 (2006); Alvermann and Fehske, J. Comput. Phys. 230, 5930
(2011).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from twin import grid as grids
from twin.levels import LevelSystem
from twin.pulses import AbstractPulse, Drive

DEGREE = 6
# Factors of a Taylor polynomial in one pass of its loop. One leaves the loop copying states as long as it multiplies;
# all six take longer to compile and to run.
_UNROLLED = 3
_SQRT3_6 = math.sqrt(3) / 6
_NODES = (0.5 - _SQRT3_6, 0.5 + _SQRT3_6)
_NEAR, _FAR = 0.25 + _SQRT3_6, 0.25 - _SQRT3_6

State = tuple[Float[Array, "..."], ...]


class EvenPlan(NamedTuple):
    """Steps common to all lanes: beginning and length of each, the points, and the worst action of a step."""

    start_s: Float[Array, "steps ..."]
    length_s: Float[Array, "steps ..."]
    t_s: Float[Array, "points ..."]
    action_per_step: Float[Array, "..."]


# Weights of the action density, 1/s: a / timescale + b sum(Rabi frequencies) + c (spread of energies) + d (rates) over
# the pulses present, and at least e times the norm of their Rabi frequencies, which bounds what the Taylor polynomial
# leaves out. Measured: tests/test_batch.py holds them over random devices.
_TIME_WEIGHT, _RABI_WEIGHT, _ENERGY_WEIGHT, _RATE_WEIGHT, _NORM_WEIGHT = 4.0, 0.4, 0.75, 1.4, 1.65


def _change(
    system: LevelSystem, pulses: tuple[AbstractPulse, ...], t_s: Float[Array, "times ..."]
) -> tuple[Float[Array, "times ..."], Float[Array, "times ..."]]:
    """The sum of the weights at `t_s`, and the norm of the Rabi frequencies of the pulses present."""
    fastest, rabi, square = (jnp.zeros(t_s.shape) for _ in range(3))
    for pulse in pulses:
        present = grids.present(pulse, t_s)
        fastest = jnp.maximum(fastest, jnp.where(present, 1 / pulse.timescale_s, 0.0))
        peak = jnp.where(present, jnp.abs(pulse.peak_rad_s), 0.0)
        rabi, square = rabi + peak, square + peak**2
    energies = system.energies_rad_s
    spread = jnp.max(energies, axis=0) - jnp.min(energies, axis=0)
    slow = _ENERGY_WEIGHT * spread + _RATE_WEIGHT * grids.rates(system, ())
    return _TIME_WEIGHT * fastest + _RABI_WEIGHT * rabi + slow, jnp.sqrt(square)


def _density(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    left: Float[Array, "segments ..."],
    right: Float[Array, "segments ..."],
) -> Float[Array, "segments ..."]:
    change, norm = _change(system, pulses, 0.5 * (left + right))
    return jnp.maximum(change, _NORM_WEIGHT * norm)


RULE = grids.StepRule(_density, order=4, action=1.0, error=1e-6)


@eqx.filter_jit
def peak_density(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    window_s: tuple[Float[Array, "..."], Float[Array, "..."]],
    shape: tuple[int, ...],
) -> Float[Array, "..."]:
    """Largest action density of each lane anywhere in the window, 1/s."""
    knot = grids.knots(pulses, window_s, shape)
    change, _ = _change(system, pulses, 0.5 * (knot[:-1] + knot[1:]))
    # The norm is largest where the core of a pulse begins: in their wings pulses are weak.
    norms = [jnp.zeros(shape)]
    for low_s in (pulse.core_s[0] for pulse in pulses):
        together = [(p.core_s[0] <= low_s) & (low_s <= p.core_s[1]) for p in pulses]
        norms.append(jnp.sqrt(sum(jnp.where(t, p.peak_rad_s, 0.0) ** 2 for t, p in zip(together, pulses, strict=True))))
    norm = jnp.max(jnp.stack([jnp.broadcast_to(norm, shape) for norm in norms]), axis=0)
    return lax.stop_gradient(jnp.maximum(jnp.max(change, axis=0), _NORM_WEIGHT * norm))


def plan_steps(density: Float[Array, "..."], edge_s: Float[Array, "edges ..."], error: float) -> int | tuple[int, ...]:
    """Steps that the hungriest lane needs in each interval; one number if that costs at most a quarter more."""
    actions = np.diff(np.asarray(edge_s), axis=0) * np.asarray(density)
    actions = np.where(np.isfinite(actions), actions, 0.0).reshape(len(actions), -1)
    needed = np.maximum(1, np.ceil(np.max(actions, axis=1) / RULE.allowed_action(error))).astype(int)
    if needed.max() * needed.size <= 1.25 * needed.sum():
        return int(needed.max())
    # Powers of two, so that other values seldom compile again.
    return tuple(int(2 ** math.ceil(math.log2(n))) for n in needed)


def even_plan(density: Float[Array, "..."], edge_s: Float[Array, "edges ..."], steps: np.ndarray) -> EvenPlan:
    """Divides interval k between two edges into `steps[k]` equal steps."""
    interval = np.repeat(np.arange(len(steps)), steps)
    # In the precision of the times: a NumPy array would promote everything to its own.
    column = lambda values: jnp.asarray(values, edge_s.dtype).reshape((-1,) + (1,) * (edge_s.ndim - 1))
    part, count = column(np.concatenate([np.arange(n) / n for n in steps])), column(steps)
    lengths = jnp.diff(edge_s, axis=0) / count
    start_s = edge_s[interval] + part * (lengths * count)[interval]
    t_s = lax.stop_gradient(jnp.concatenate([start_s, edge_s[-1:]]))
    action = lax.stop_gradient(jnp.max(lengths, axis=0)) * density
    return EvenPlan(start_s, lengths[interval], t_s, action)


def step(
    slopes: Callable,
    system: LevelSystem,
    drives: Callable[[grids.StageTime], list[Drive]],
    y: State,
    start_s: Float[Array, "..."],
    length_s: Float[Array, "..."],
) -> State:
    """One step of the state, a tuple of components; `slopes(system, drives, y)` is the right-hand side of each."""
    nodes = [drives(grids.StageTime(start_s + c * length_s, start_s + 0.5 * length_s)) for c in _NODES]
    # The two exponentials share the part that does not depend on time; each takes half a step of it.
    half = times(system, 0.5 * length_s)
    for near, far in ((0, 1), (1, 0)):
        blend = [
            _blend(length_s * _NEAR, first, length_s * _FAR, second)
            for first, second in zip(nodes[near], nodes[far], strict=True)
        ]
        y = exponential(lambda v, blend=blend: slopes(half, blend, v), y)
    return y


def times(system: LevelSystem, length_s: Float[Array, "..."]) -> LevelSystem:
    """The graph with its generator multiplied by a time: every number of it is an energy or a rate."""
    return jax.tree.map(lambda number: number * length_s, system)


def walk(
    advance: Callable[[State, Any], State],
    start: Float[Array, "components ..."],
    rows: Any,
    keep: np.ndarray | None,
) -> Float[Array, "saves components ..."]:
    """All steps in a scan, `advance(state, row)` for each; `keep` names the rows after which to save, None the last.

    Reverse mode keeps one state a step and computes the inside of the step again.
    """
    one = jax.checkpoint(advance)

    def body(y, row):
        y = one(y, row)
        return y, None if keep is None else y

    last, path = lax.scan(body, tuple(start), rows)
    if keep is None:
        return jnp.stack(last)[None]
    every = np.array_equal(keep, np.arange(len(path[0])))
    return jnp.stack([component if every else component[keep] for component in path], axis=1)


def _blend(a, one: Drive, b, other: Drive) -> Drive:
    imag = None if one.imag is None else a * one.imag + b * other.imag
    return Drive(a * one.real + b * other.real, imag)


def exponential(generator: Callable[[State], list[Float[Array, "..."]]], y: State, degree: int = DEGREE) -> State:
    """exp(generator) y by its Taylor polynomial, with Horner's rule: y + G (y + G/2 (y + G/3 (...)))."""

    def factor(v: State, divisor) -> State:
        share = 1.0 / divisor
        return tuple(a + jnp.asarray(share, a.dtype) * b for a, b in zip(y, generator(v), strict=True))

    def some_factors(i, v):
        for k in range(_UNROLLED):
            v = factor(v, degree - over - _UNROLLED * i - k)
            # Without the barrier the compiler computes each factor again for every component of the next.
            v = lax.optimization_barrier(v) if k < _UNROLLED - 1 else v
        return v

    over = degree % _UNROLLED
    v = y
    for k in range(over):
        v = lax.optimization_barrier(factor(v, degree - k))
    return lax.fori_loop(0, degree // _UNROLLED, some_factors, v)

"""Static time grids laid from pulse metadata.

The number of steps is static, so one compiled program serves every value; the *times* are traced, one grid a lane, so
that no lane ever influences another. A lane's grid has a knot at each end of the window, at the edges of each pulse's
support and core, half way between these, and at each breakpoint; between the knots, steps are spread in proportion to
an action density

    density = max_k w_k (a / timescale_k + c |detuning_k|) + b sum_k Omega_k + d (sum of jump rates)       (1/s)
              + c (light shifts at Omega_k)

over the pulses present, with Omega_k the largest Rabi frequency between the two knots. In the interaction picture an
error of a step, in a wing where little happens, is small with Omega_k: w_k = (Omega_k / peak_k)^(1/8). The integral of
the density is the lane's action S; with n steps each advances the state by an action q = S / n, and the error grows as
q^8. Weights and the action that a step may take were measured: tests/test_dynamics.py holds them over random devices.
Another method brings its own (`StepRule`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from twin.levels import LevelSystem
from twin.pulses import AbstractPulse

_ORDER = 8
# Weights of the action density, see above.
_TIME_WEIGHT, _RABI_WEIGHT, _ENERGY_WEIGHT, _RATE_WEIGHT = 0.7, 0.9, 0.9, 0.7
# With fewer steps than this on the core of a pulse the solution has not seen it.
MIN_COVERAGE = 1


class StepRule(NamedTuple):
    """How long a method's step may be: its action density, and the action a step takes for an error."""

    density: Callable[..., Float[Array, "segments ..."]]
    order: int
    action: float
    error: float

    def allowed_action(self, error):
        """Action a step may take for a population error."""
        return self.action * (error / self.error) ** (1 / self.order)

    def error_of(self, action):
        """Population error expected of steps with this action."""
        return self.error * (action / self.action) ** self.order


class Grid(eqx.Module):
    """A time grid for each lane: knots, and the number of the step that ends at each.

    Times are computed from the few knots where they are needed. A table of all points would be differentiated entry by
    entry, and cost more than the dynamics.
    """

    knot_s: Float[Array, "knots ..."]
    knot_index: Int[Array, "knots ..."]

    def point(self, i: Int[Array, ""] | int) -> Float[Array, "..."]:
        """Time of point i, s: the sum of the parts of all segments that lie before it."""
        return self.knot_s[0] + jnp.sum(jnp.diff(self.knot_s, axis=0) * self._passed(i), axis=0)

    def step_length(self, i: Int[Array, ""] | int) -> Float[Array, "..."]:
        """Length of the step from point i to the next, s."""
        return jnp.sum(jnp.diff(self.knot_s, axis=0) * (self._passed(i + 1) - self._passed(i)), axis=0)

    def _passed(self, i) -> Float[Array, "segments ..."]:
        """Share of each segment that lies before point i."""
        count = jnp.maximum(jnp.diff(self.knot_index, axis=0), 1)
        return jnp.clip((i - self.knot_index[:-1]) / count, 0.0, 1.0)


class Plan(NamedTuple):
    """A grid and what can be said of it before solving."""

    grid: Grid
    walked: Int[Array, ""]
    t_s: Float[Array, "points ..."]
    action_per_step: Float[Array, "..."]
    coverage: Int[Array, "pulses ..."]


class StageTime(NamedTuple):
    """A Runge-Kutta stage: its time, and a time strictly inside the step (see `AbstractPulse.drive`)."""

    t_s: Float[Array, "..."]
    within_s: Float[Array, "..."]


def rates(system: LevelSystem, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Sum of the rates of all jumps, 1/s."""
    total = jnp.zeros(shape)
    for decay in system.decays:
        total = total + decay.rate_per_s
    for d in system.dephasings:
        total = total + (max(d.weights) - min(d.weights)) ** 2 * d.rate_per_s
    return total


def knots(
    pulses: tuple[AbstractPulse, ...],
    window_s: tuple[Float[Array, "..."], Float[Array, "..."]],
    shape: tuple[int, ...],
    save_s: Float[Array, "saves ..."] | None = None,
) -> Float[Array, "knots ..."]:
    """Sorted times where a grid must have a point, s; those outside the window collapse onto its ends."""
    start, stop = (jnp.broadcast_to(t, shape) for t in window_s)
    # Where a smooth pulse begins to matter is a choice of ours: the solution has no derivative with respect to it.
    inner = [lax.stop_gradient(t) for p in pulses for t in _zones(p)]
    inner += [t for p in pulses for t in p.breakpoints_s]
    inner += [] if save_s is None else list(save_s)
    inner = [jnp.clip(jnp.broadcast_to(t, shape), start, stop) for t in inner]
    return jnp.sort(jnp.stack([start, *inner, stop]), axis=0)


def present(pulse: AbstractPulse, t_s: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Whether a time lies in the support of a pulse."""
    low, high = pulse.support_s
    return (t_s > low) & (t_s < high)


def _zones(pulse: AbstractPulse) -> list[Float[Array, "..."]]:
    """Times between which a pulse is weak, middling or strong, s."""
    (low, high), (rise, fall) = pulse.support_s, pulse.core_s
    return [low, 0.5 * (low + rise), rise, fall, 0.5 * (fall + high), high]


def _density(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    left: Float[Array, "segments ..."],
    right: Float[Array, "segments ..."],
) -> Float[Array, "segments ..."]:
    """Action a second in each segment, see above."""
    turn, rabi = jnp.zeros(left.shape), jnp.zeros(left.shape)
    of_line: dict = {}
    for (source, target), pulse in zip(system.couplings, pulses, strict=False):
        detuning = jnp.abs(system.energies_rad_s[system.index(target)] - system.energies_rad_s[system.index(source)])
        peak = jnp.abs(pulse.peak_rad_s)
        largest = jnp.where(present(pulse, 0.5 * (left + right)), pulse.largest_rad_s(left, right), 0.0)
        weight = jnp.where(peak > 0, (largest / jnp.where(peak > 0, peak, 1.0)) ** (1 / _ORDER), 0.0)
        turn = jnp.maximum(turn, weight * (_TIME_WEIGHT / pulse.timescale_s + _ENERGY_WEIGHT * detuning))
        rabi = rabi + largest
        of_line[frozenset((source, target))] = of_line.get(frozenset((source, target)), 0.0) + largest
    shifts = [shift.spread_s * of_line.get(frozenset(shift.coupling), 0.0) ** 2 for shift in system.light_shifts]
    slow = _RATE_WEIGHT * rates(system, ())
    return turn + _RABI_WEIGHT * rabi + _ENERGY_WEIGHT * sum(shifts, jnp.zeros(())) + slow


DOPRI8 = StepRule(_density, order=_ORDER, action=0.66, error=1e-8)


def lay(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    window_s: tuple[Float[Array, "..."], Float[Array, "..."]],
    steps: int,
    share: Float[Array, ""] | float,
    shape: tuple[int, ...],
    save_s: Float[Array, "saves ..."] | None = None,
    rule: StepRule = DOPRI8,
) -> Plan:
    """Lays a grid in each lane. Derivatives flow through the knots; the allotment of steps has none.

    Where `shape`, that of the grids, has a one in place of many lanes, these share the grid that the hungriest needs.
    `steps` is the static length of the program. It walks the `share` in (0, 1] of them that a coarser error needs; the
    share is traced, so that a search and its polish are one program.
    """
    knot = knots(pulses, window_s, shape, save_s)
    segments = knot.shape[0] - 1
    left, right = lax.stop_gradient(knot[:-1]), lax.stop_gradient(knot[1:])
    actions = (right - left) * _hungriest(rule.density(system, pulses, left, right), shape)
    cumulative = jnp.cumsum(actions, axis=0)
    # Every segment that has a length has one step; the others go where the action is. Floors of a sum always add up.
    walked = segments + jnp.ceil((steps - segments) * share).astype(int)
    filled = jnp.cumsum(right > left, axis=0)
    part = cumulative / cumulative[-1]
    ends = filled + jnp.floor((walked - filled[-1]) * part)
    ends = jnp.where(jnp.isfinite(ends), ends, 0).astype(int).at[-1].set(walked)
    knot_index = jnp.concatenate([jnp.zeros((1, *shape), int), ends])
    grid = Grid(knot, knot_index)
    t_s = lax.stop_gradient(jax.vmap(grid.point)(jnp.arange(steps + 1)))
    # An integer allotment can leave a segment with coarser steps than the mean: judge the worst one.
    per_step = jnp.max(actions / jnp.maximum(jnp.diff(knot_index, axis=0), 1), axis=0)
    return Plan(grid, walked, t_s, per_step, coverage(pulses, t_s))


def _hungriest(density: Float[Array, "segments ..."], shape: tuple[int, ...]) -> Float[Array, "segments ..."]:
    """Largest density of the lanes that share a grid, along the axes where `shape` has a one; NaN lanes have no say."""
    density = lax.stop_gradient(density)
    shared = tuple(k + 1 for k, n in enumerate(shape) if n == 1 and density.shape[k + 1] > 1)
    return jnp.nanmax(density, axis=shared, keepdims=True) if shared else density


def coverage(pulses: tuple[AbstractPulse, ...], t_s: Float[Array, "points ..."]) -> Int[Array, "pulses ..."]:
    """Number of steps that overlap the core of each pulse."""
    if not pulses:
        return jnp.zeros((0, *t_s.shape[1:]), int)
    counts = []
    for pulse in pulses:
        low, high = pulse.core_s
        counts.append(jnp.sum((t_s[1:] > low) & (t_s[:-1] < high) & (t_s[1:] > t_s[:-1]), axis=0))
    return jnp.stack(counts)


def coarser_share(error, finest: float) -> Float[Array, ""]:
    """Share of the steps laid for the error `finest` that a larger `error` needs."""
    return jnp.minimum(1.0, (finest / error) ** (1 / _ORDER))


def plan_steps(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    window_s: tuple[Float[Array, "..."], Float[Array, "..."]],
    error: float,
    shape: tuple[int, ...],
    rule: StepRule = DOPRI8,
) -> int:
    """Steps that the hungriest lane needs, rounded up to a multiple of four; every value must be known now."""
    action, filled = (np.asarray(a, float).ravel() for a in _total_action(system, pulses, window_s, shape, rule))
    # One step a segment is given away before the others are shared out, and floors cost another at most.
    needed = action / rule.allowed_action(error) + filled + 1
    return 4 * math.ceil(max((n for n in needed if math.isfinite(n)), default=1.0) / 4)


@eqx.filter_jit
def _total_action(system, pulses, window_s, shape: tuple[int, ...], rule: StepRule):
    """Action of each lane, and its segments of any length; one program compiles faster than a dozen small ones."""
    knot = knots(pulses, window_s, shape)
    actions = jnp.diff(knot, axis=0) * _hungriest(rule.density(system, pulses, knot[:-1], knot[1:]), shape)
    return jnp.sum(actions, axis=0), jnp.sum(knot[1:] > knot[:-1], axis=0)

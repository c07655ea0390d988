"""Static time grids laid from pulse metadata, and the eighth-order Runge-Kutta step that walks them inside Diffrax.

The number of steps is static, so one compiled program serves every value; the *times* are traced, one grid a lane, so
that no lane ever influences another. A lane's grid has a knot at each end of the window, at the edges of each pulse's
support and core, half way between these, and at each breakpoint; between the knots, steps are spread in proportion to
an action density

    density = max_k w_k (a / timescale_k + c |detuning_k|) + b sum_k Omega_k + d (sum of jump rates)       (1/s)

over the pulses present, with Omega_k the largest Rabi frequency between the two knots. In the interaction picture an
error of a step, in a wing where little happens, is small with Omega_k: w_k = (Omega_k / peak_k)^(1/8). The integral of
the density is the lane's action S; with n steps each advances the state by an action q = S / n, and the error grows as
q^8. `ACTION_PER_STEP` was measured: tests/test_dynamics.py holds it over random devices.
"""

import math
from functools import partial
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from twin.levels import LevelSystem
from twin.pulses import AbstractPulse, Drive

# Weights of the action density, see above.
_TIME_WEIGHT, _RABI_WEIGHT, _ENERGY_WEIGHT, _RATE_WEIGHT = 0.7, 0.9, 0.9, 0.7
# The action a step may take for a population error of 1e-8; others follow from the order of the method.
ACTION_PER_STEP = 0.66
ORDER = 8
# With fewer steps than this on the core of a pulse the solution has not seen it.
MIN_COVERAGE = 1


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


def _rates(system: LevelSystem, shape: tuple[int, ...]) -> Float[Array, "..."]:
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


def _zones(pulse: AbstractPulse) -> list[Float[Array, "..."]]:
    """Times between which a pulse is weak, middling or strong, s."""
    (low, high), (rise, fall) = pulse.support_s, pulse.core_s
    return [low, 0.5 * (low + rise), rise, fall, 0.5 * (fall + high), high]


def lay(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    window_s: tuple[Float[Array, "..."], Float[Array, "..."]],
    steps: int,
    share: Float[Array, ""] | float,
    shape: tuple[int, ...],
    save_s: Float[Array, "saves ..."] | None = None,
) -> Plan:
    """Lays a grid in each lane. Derivatives flow through the knots; the allotment of steps has none.

    `steps` is the static length of the program. It walks the `share` in (0, 1] of them that a coarser error needs; the
    share is traced, so that a search and its polish are one program.
    """
    knot = knots(pulses, window_s, shape, save_s)
    segments = knot.shape[0] - 1
    left, right = lax.stop_gradient(knot[:-1]), lax.stop_gradient(knot[1:])
    actions = (right - left) * _density(system, pulses, left, right)
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


def _density(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    left: Float[Array, "segments ..."],
    right: Float[Array, "segments ..."],
) -> Float[Array, "segments ..."]:
    """Action a second in each segment, see above."""
    turn, rabi = jnp.zeros(left.shape), jnp.zeros(left.shape)
    for (source, target), pulse in zip(system.couplings, pulses, strict=False):
        low, high = pulse.support_s
        middle = 0.5 * (left + right)
        present = (middle > low) & (middle < high)
        detuning = jnp.abs(system.energies_rad_s[system.index(target)] - system.energies_rad_s[system.index(source)])
        peak = jnp.abs(pulse.peak_rad_s)
        largest = jnp.where(present, pulse.largest_rad_s(left, right), 0.0)
        weight = jnp.where(peak > 0, (largest / jnp.where(peak > 0, peak, 1.0)) ** (1 / ORDER), 0.0)
        turn = jnp.maximum(turn, weight * (_TIME_WEIGHT / pulse.timescale_s + _ENERGY_WEIGHT * detuning))
        rabi = rabi + largest
    return lax.stop_gradient(turn + _RABI_WEIGHT * rabi + _RATE_WEIGHT * _rates(system, ()))


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
    return jnp.minimum(1.0, (finest / error) ** (1 / ORDER))


def allowed_action(error):
    """Action a step may take for a population error, from the measured constant and the order of the method."""
    return ACTION_PER_STEP * (error / 1e-8) ** (1 / ORDER)


def plan_steps(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    window_s: tuple[Float[Array, "..."], Float[Array, "..."]],
    error: float,
    shape: tuple[int, ...],
) -> int:
    """Steps that the hungriest lane needs, rounded up to a multiple of four; every value must be known now."""
    action, filled = (np.asarray(a, float).ravel() for a in _total_action(system, pulses, window_s, shape))
    # One step a segment is given away before the others are shared out, and floors cost another at most.
    needed = action / allowed_action(error) + filled + 1
    return 4 * math.ceil(max((n for n in needed if math.isfinite(n)), default=1.0) / 4)


@eqx.filter_jit
def _total_action(system, pulses, window_s, shape: tuple[int, ...]):
    """Action of each lane, and its segments of any length; one program compiles faster than a dozen small ones."""
    knot = knots(pulses, window_s, shape)
    actions = jnp.diff(knot, axis=0) * _density(system, pulses, knot[:-1], knot[1:])
    return jnp.sum(actions, axis=0), jnp.sum(knot[1:] > knot[:-1], axis=0)


class GridDopri8(diffrax.AbstractSolver):
    """Dormand and Prince's eighth-order step on the lane's own grid; Diffrax's time counts steps.

    A lane has its own times and each stage a second one (`StageTime`), which Diffrax's scalar time cannot carry: the
    step asks the problem in `args` for drives and slope, and uses no term.

    References: Prince and Dormand, J. Comput. Appl. Math. 7, 67 (1981); tableau as in `diffrax.Dopri8`.
    """

    grid: Grid
    reverse: bool = eqx.field(static=True)

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms):
        del terms
        return ORDER

    def init(self, terms, t0, t1, y0, args):
        del terms, t0, t1, y0, args

    def func(self, terms, t0, y0, args):
        del terms
        time = jnp.broadcast_to(t0, self.grid.knot_s.shape[1:])
        return args.rhs(args.system, args.drives(StageTime(time, time)), y0)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del terms, t1, solver_state, made_jump
        i = jnp.round(t0).astype(int)
        start, h = self.grid.point(i), self.grid.step_length(i)
        # The drives of all stages at once: the loop over stages is left with additions and multiplications.
        nodes = _C.reshape((-1,) + (1,) * h.ndim)
        drives = args.drives(StageTime(start + nodes * h, jnp.broadcast_to(start + 0.5 * h, (_C.size, *h.shape))))
        step = reversible_step if self.reverse else plain_step
        y1 = step(args.rhs, args.system, drives, y0, h)
        return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful


def _dopri8_tableau() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, c) of the 13 stages; Diffrax lists a 14th, which only repeats the solution."""
    tableau = diffrax.Dopri8.tableau
    stages = len(tableau.b_sol) - 1
    a = np.zeros((stages, stages))
    for j, row in enumerate(tableau.a_lower[: stages - 1]):
        a[j + 1, : j + 1] = row
    return a, np.asarray(tableau.b_sol[:stages]), np.concatenate([[0.0], tableau.c[: stages - 1]])


_A, _B, _C = _dopri8_tableau()


def _stages(rhs, system, drives, y0, h):
    """States and slopes of all stages, (stages, components, *batch) each.

    A loop over a buffer: unrolled, the stages compile ten times longer (their gradient a hundred) and run no faster.
    """

    def stage(carry, row):
        slopes, j = carry
        weights, drive = row
        y = y0 + h * jnp.tensordot(weights, slopes, 1)
        # Not `.at[].set`: its scatter is slow on CPU.
        return (lax.dynamic_update_index_in_dim(slopes, rhs(system, drive, y), j, axis=0), j + 1), y

    empty = jnp.zeros((_C.size, *y0.shape))
    (slopes, _), states = lax.scan(stage, (empty, 0), (jnp.asarray(_A), drives))
    return states, slopes


def plain_step(rhs, system: LevelSystem, drives: list[Drive], y0: Float[Array, "components ..."], h):
    """One step; `drives` have a leading axis of stages."""
    _, slopes = _stages(rhs, system, drives, y0, h)
    return y0 + h * jnp.tensordot(jnp.asarray(_B), slopes, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def reversible_step(rhs, system: LevelSystem, drives: list[Drive], y0: Float[Array, "components ..."], h):
    """`plain_step` with its own reverse rule.

    The reverse of a Runge-Kutta step is the same recursion with the transposed tableau. JAX's own rule carries a
    cotangent of the whole buffer through each stage, which costs four times more.
    """
    return plain_step(rhs, system, drives, y0, h)


def _step_forward(rhs, system, drives, y0, h):
    states, slopes = _stages(rhs, system, drives, y0, h)
    y1 = y0 + h * jnp.tensordot(jnp.asarray(_B), slopes, 1)
    return y1, (system, drives, states, slopes, h)


def _step_reverse(rhs, saved, from_y1):
    system, drives, states, slopes, h = saved

    def stage(carry, row):
        from_states, to_system, to_h, j = carry
        weights, b, drive, y, slope = row
        from_slope = b * from_y1 + jnp.tensordot(weights, from_states, 1)
        _, pullback = jax.vjp(rhs, system, drive, y)
        to_system_j, to_drive, from_y = pullback(h * from_slope)
        from_states = lax.dynamic_update_index_in_dim(from_states, from_y, j, axis=0)
        to_system = jax.tree.map(jnp.add, to_system, to_system_j)
        return (from_states, to_system, to_h + jnp.sum(from_slope * slope, axis=0), j - 1), to_drive

    start = (jnp.zeros_like(states), jax.tree.map(jnp.zeros_like, system), jnp.zeros_like(h), _C.size - 1)
    rows = (jnp.asarray(_A.T), jnp.asarray(_B), drives, states, slopes)
    (from_states, to_system, to_h, _), to_drives = lax.scan(stage, start, rows, reverse=True)
    return to_system, to_drives, from_y1 + jnp.sum(from_states, axis=0), to_h


reversible_step.defvjp(_step_forward, _step_reverse)

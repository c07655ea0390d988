"""Static time grids laid from pulse metadata, and the eighth-order Runge-Kutta step that walks them inside Diffrax.

The number of steps is static, so one compiled program serves every value; the *times* are traced, one grid a lane, so
that no lane ever influences another. A lane's grid has a knot at each end of the window, at the edges of each pulse's
support and at each breakpoint; between the knots, steps are spread in proportion to an action density

    density = a max(1 / timescale) + b sum(peak Rabi frequency) + c (spread of energies) + d (sum of jump rates)

(1/s), the first two over the pulses present, and at least e times the norm of their peak Rabi frequencies. Its integral
is the lane's action S; with n steps each advances the state by an action q = S / n, and the error grows as q to the
order of the method. Each method has its own weights and the action that a step may take (`StepRule`), all measured: the
tests hold them over random devices.
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


class StepRule(NamedTuple):
    """How long a method's step may be: weights of the action density, and the action a step takes for an error."""

    timescale: float
    rabi: float
    energy: float
    rate: float
    turn: float
    order: int
    action: float
    error: float

    def allowed_action(self, error):
        """Action a step may take for a population error."""
        return self.action * (error / self.error) ** (1 / self.order)

    def error_of(self, action):
        """Population error expected of steps with this action."""
        return self.error * (action / self.action) ** self.order


DOPRI8 = StepRule(timescale=0.5, rabi=1.2, energy=1.8, rate=0.7, turn=0.0, order=8, action=0.85, error=1e-8)
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
    inner = [lax.stop_gradient(t) for p in pulses for t in p.support_s]
    inner += [t for p in pulses for t in p.breakpoints_s]
    inner += [] if save_s is None else list(save_s)
    inner = [jnp.clip(jnp.broadcast_to(t, shape), start, stop) for t in inner]
    return jnp.sort(jnp.stack([start, *inner, stop]), axis=0)


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

    `steps` is the static length of the program. It walks the `share` in (0, 1] of them that a coarser error needs; the
    share is traced, so that a search and its polish are one program.
    """
    knot = knots(pulses, window_s, shape, save_s)
    segments = knot.shape[0] - 1
    left, right = lax.stop_gradient(knot[:-1]), lax.stop_gradient(knot[1:])
    actions = (right - left) * density(system, pulses, 0.5 * (left + right), rule)
    cumulative = jnp.cumsum(actions, axis=0)
    # Every segment has one step; the others go where the action is. Floors of a cumulative sum always add up.
    walked = segments + jnp.ceil((steps - segments) * share).astype(int)
    part = cumulative / cumulative[-1]
    ends = jnp.arange(1, segments + 1).reshape((-1,) + (1,) * len(shape)) + jnp.floor((walked - segments) * part)
    ends = jnp.where(jnp.isfinite(ends), ends, 0).astype(int).at[-1].set(walked)
    knot_index = jnp.concatenate([jnp.zeros((1, *shape), int), ends])
    grid = Grid(knot, knot_index)
    t_s = lax.stop_gradient(jax.vmap(grid.point)(jnp.arange(steps + 1)))
    # An integer allotment can leave a segment with coarser steps than the mean: judge the worst one.
    per_step = jnp.max(actions / jnp.maximum(jnp.diff(knot_index, axis=0), 1), axis=0)
    return Plan(grid, walked, t_s, per_step, coverage(pulses, t_s))


def density(
    system: LevelSystem, pulses: tuple[AbstractPulse, ...], t_s: Float[Array, "..."], rule: StepRule
) -> Float[Array, "..."]:
    """Action density at `t_s`, 1/s: see above."""
    energies = system.energies_rad_s
    spread = jnp.max(energies, axis=0) - jnp.min(energies, axis=0)
    fastest, rabi, square = (jnp.zeros(t_s.shape) for _ in range(3))
    for pulse in pulses:
        low, high = pulse.support_s
        present = (t_s > low) & (t_s < high)
        fastest = jnp.maximum(fastest, jnp.where(present, 1 / pulse.timescale_s, 0.0))
        peak = jnp.where(present, jnp.abs(pulse.peak_rad_s), 0.0)
        rabi, square = rabi + peak, square + peak**2
    slow = rule.energy * spread + rule.rate * _rates(system, ())
    total = rule.timescale * fastest + rule.rabi * rabi + slow
    return lax.stop_gradient(jnp.maximum(total, rule.turn * jnp.sqrt(square)) if rule.turn else total)


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
    return jnp.minimum(1.0, (finest / error) ** (1 / DOPRI8.order))


def plan_steps(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    window_s: tuple[Float[Array, "..."], Float[Array, "..."]],
    error: float,
    shape: tuple[int, ...],
    rule: StepRule = DOPRI8,
) -> int:
    """Steps that the hungriest lane needs, rounded up to a multiple of four; every value must be known now."""
    total, points = _total_action(system, pulses, window_s, shape, rule)
    total = np.asarray(total, float).ravel()
    largest = max((float(s) for s in total if math.isfinite(s)), default=0.0)
    # One step a segment is given away before the others are shared out.
    return 4 * math.ceil((largest / rule.allowed_action(error) + points) / 4)


@eqx.filter_jit
def _total_action(system, pulses, window_s, shape: tuple[int, ...], rule: StepRule):
    """Action of each lane, and the number of its knots; one program compiles faster than a dozen small ones."""
    knot = knots(pulses, window_s, shape)
    actions = jnp.diff(knot, axis=0) * density(system, pulses, 0.5 * (knot[:-1] + knot[1:]), rule)
    return jnp.sum(actions, axis=0), knot.shape[0]


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
        return DOPRI8.order

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

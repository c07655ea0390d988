"""Dormand and Prince's eighth-order step on a static grid: the loop of the hot path, and its reverse.

A lane has its own times, and each stage a second one (`StageTime`). Reverse mode keeps one state a step and computes
the stages again. The loop is our own, not Diffrax's, which takes half as long again to compile
(experiments/benchmarks measures both).

References: Prince and Dormand, J. Comput. Appl. Math. 7, 67 (1981); tableau as in `diffrax.Dopri8`.
"""

import abc

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from twin.grid import Grid, StageTime
from twin.levels import LevelSystem
from twin.pulses import Drive


class AbstractEquation(eqx.Module):
    """A linear equation `d state / dt = rhs(system, drives, state)`; its numbers have gradients."""

    system: eqx.AbstractVar[LevelSystem]
    state: eqx.AbstractVar[Float[Array, "components ..."]]

    @abc.abstractmethod
    def drives(self, time: StageTime) -> list[Drive]:
        """The drives at a time; a leading axis of stages may come before the batch."""

    @abc.abstractmethod
    def rhs(self, system: LevelSystem, drives: list[Drive], state: Float[Array, "components ..."]) -> Array:
        """d state / dt, 1/s."""


def walk(
    equation: AbstractEquation,
    grid: Grid,
    system: LevelSystem,
    walked: Int[Array, ""],
    *,
    steps: int,
    reverse: bool,
    saved: bool,
) -> Float[Array, "points components ..."]:
    """States at the points of a grid, or at its end only.

    Args:
        equation: what to integrate, and its state at the beginning.
        grid: of each lane, or of lanes that share one (an axis of length one).
        system: the graph of the equation with one number a lane: those shared by lanes would be summed over them at
            every stage of a gradient.
        walked: number of steps to walk, at most `steps`, the length of the grid; states at later points are zero.
        reverse: for `jax.grad`; else for `jax.jvp`.
        saved: whether to return the states at all points.
    """
    go = _reversible if reverse else _march
    return go((equation, grid, system), walked, steps, saved)


def _march(numbers: tuple[AbstractEquation, Grid, LevelSystem], walked, steps: int, saved: bool):
    equation = numbers[0]

    def advance(i, y):
        drives, h = _stage_drives(numbers, i)
        _, slopes = _stages(numbers, drives, y, h)
        return y + h * jnp.tensordot(jnp.asarray(_B), slopes, 1)

    if not saved:
        return lax.fori_loop(0, walked, advance, equation.state)[None]

    def body(i, carry):
        y, points = carry
        y = advance(i, y)
        return y, lax.dynamic_update_index_in_dim(points, y, i + 1, axis=0)

    points = jnp.concatenate([equation.state[None], jnp.zeros((steps, *equation.state.shape))])
    return lax.fori_loop(0, walked, body, (equation.state, points))[1]


def _stage_drives(numbers, i) -> tuple[list[Drive], Float[Array, "..."]]:
    """Drives of all stages at once, and the length of the step, for every lane.

    So the loop over stages is left with additions and multiplications.
    """
    equation, grid, _ = numbers
    shape = equation.state.shape[1:]
    start, h = grid.point(i), grid.step_length(i)
    nodes = _C.reshape((-1,) + (1,) * h.ndim)
    time = StageTime(start + nodes * h, jnp.broadcast_to(start + 0.5 * h, (_C.size, *h.shape)))
    drives = jax.tree.map(lambda part: jnp.broadcast_to(part, (_C.size, *shape)), equation.drives(time))
    return drives, jnp.broadcast_to(h, shape)


def _dopri8_tableau() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, c) of the 13 stages; Diffrax lists a 14th, which only repeats the solution."""
    tableau = diffrax.Dopri8.tableau
    stages = len(tableau.b_sol) - 1
    a = np.zeros((stages, stages))
    for j, row in enumerate(tableau.a_lower[: stages - 1]):
        a[j + 1, : j + 1] = row
    return a, np.asarray(tableau.b_sol[:stages]), np.concatenate([[0.0], tableau.c[: stages - 1]])


_A, _B, _C = _dopri8_tableau()


def _stages(numbers, drives: list[Drive], y0, h):
    """States and slopes of all stages, (stages, components, *batch) each.

    A loop over a buffer: unrolled, the stages compile ten times longer (their gradient a hundred) and run no faster.
    """
    equation, _, system = numbers

    def stage(carry, row):
        slopes, j = carry
        weights, drive = row
        y = y0 + h * jnp.tensordot(weights, slopes, 1)
        # Not `.at[].set`: its scatter is slow on CPU.
        return (lax.dynamic_update_index_in_dim(slopes, equation.rhs(system, drive, y), j, axis=0), j + 1), y

    empty = jnp.zeros((_C.size, *y0.shape))
    (slopes, _), states = lax.scan(stage, (empty, 0), (jnp.asarray(_A), drives))
    return states, slopes


_reversible = eqx.filter_custom_vjp(_march)


@_reversible.def_fwd
def _forward(perturbed, numbers, walked, steps: int, saved: bool):
    del perturbed
    points = _march(numbers, walked, steps, saved=True)
    return points if saved else points[walked][None], points


@_reversible.def_bwd
def _backward(points, from_result, perturbed, numbers, walked, steps: int, saved: bool):
    """The reverse of a Runge-Kutta step is the same recursion with the transposed tableau.

    JAX's own rule would carry a cotangent of the whole buffer through each stage, which costs four times more.
    """
    del perturbed, steps
    varied, fixed = eqx.partition(numbers, eqx.is_inexact_array)
    equation = numbers[0]

    def slope(system, drive, y):
        return equation.rhs(eqx.combine(system, fixed[2]), drive, y)

    def body(k, carry):
        from_y, to_numbers, to_system = carry
        i = walked - 1 - k
        (drives, h), to_inputs = jax.vjp(lambda v: _stage_drives(eqx.combine(v, fixed), i), varied)
        states, slopes = _stages(numbers, drives, points[i], h)

        def stage(carry, row):
            from_states, to_system, to_h, j = carry
            weights, b, drive, y, slope_j = row
            from_slope = b * from_y + jnp.tensordot(weights, from_states, 1)
            _, pullback = jax.vjp(slope, varied[2], drive, y)
            to_system_j, to_drive, from_state = pullback(h * from_slope)
            from_states = lax.dynamic_update_index_in_dim(from_states, from_state, j, axis=0)
            to_h = to_h + jnp.sum(from_slope * slope_j, axis=0)
            return (from_states, jax.tree.map(jnp.add, to_system, to_system_j), to_h, j - 1), to_drive

        start = (jnp.zeros_like(states), to_system, jnp.zeros_like(h), _C.size - 1)
        rows = (jnp.asarray(_A.T), jnp.asarray(_B), drives, states, slopes)
        (from_states, to_system, to_h, _), to_drives = lax.scan(stage, start, rows, reverse=True)
        (to_numbers_i,) = to_inputs((to_drives, to_h))
        from_y = from_y + jnp.sum(from_states, axis=0) + (from_result[i] if saved else 0.0)
        return from_y, jax.tree.map(jnp.add, to_numbers, to_numbers_i), to_system

    zeros = jax.tree.map(jnp.zeros_like, (varied, varied[2]))
    from_end = from_result[walked] if saved else from_result[0]
    from_start, to_numbers, to_system = lax.fori_loop(0, walked, body, (from_end, *zeros))
    to_equation, to_grid, _ = to_numbers
    to_equation = eqx.tree_at(lambda e: e.state, to_equation, to_equation.state + from_start)
    return to_equation, to_grid, to_system

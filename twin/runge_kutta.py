"""Dormand and Prince's eighth-order step on a static grid: the loop of the hot path, and its reverse.

A lane has its own times, and each stage a second one (`StageTime`). Reverse mode keeps one state a step and computes
the stages again. The loop is our own: Diffrax's takes longer, above all to compile (`loop` of experiments/benchmarks
measures both around one step).

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
    start: Float[Array, "components ..."],
    walked: Int[Array, ""],
    *,
    steps: int,
    reverse: bool,
    saved: bool,
) -> Float[Array, "points components ..."]:
    """States at the points of a grid, or at its end only.

    Args:
        equation: what to integrate.
        grid: of each lane, or of lanes that share one (an axis of length one).
        system: the graph of the equation with one number a lane: those shared by lanes would be summed over them at
            every stage of a gradient.
        start: the state at the beginning.
        walked: number of steps to walk, at most `steps`, the length of the grid; states at later points are zero.
        reverse: for `jax.grad`; else for `jax.jvp`.
        saved: whether to return the states at all points.
    """
    # Lanes as one axis: loops over several short ones are slow.
    shape = start.shape[1:]
    flat = lambda tree: jax.tree.map(lambda a: a.reshape(*a.shape[: a.ndim - len(shape)], -1), tree)
    start, system = lax.optimization_barrier((flat(start), flat(system)))
    go = _reversible if reverse else _march
    states = go((equation, grid, system, start), walked, shape, steps, saved)
    return states.reshape(*states.shape[:-1], *shape)


def _march(numbers, walked, shape: tuple[int, ...], steps: int, saved: bool):
    """`numbers`: equation, grid, system and state; the last two have one axis of lanes, which stands for `shape`."""
    y0 = numbers[3]

    def advance(i, y):
        drives, h = _stage_drives(numbers, i, shape)
        _, slopes = _stages(numbers, drives, y, h)
        return y + h * jnp.tensordot(jnp.asarray(_B), slopes, 1)

    if not saved:
        return lax.fori_loop(0, walked, advance, y0)[None]

    def body(i, carry):
        y, points = carry
        y = advance(i, y)
        return y, lax.dynamic_update_index_in_dim(points, y, i + 1, axis=0)

    points = jnp.concatenate([y0[None], jnp.zeros((steps, *y0.shape))])
    return lax.fori_loop(0, walked, body, (y0, points))[1]


def _stage_drives(numbers, i, shape: tuple[int, ...]) -> tuple[list[Drive], Float[Array, "..."]]:
    """Drives of all stages at once, and the length of the step, for every lane.

    So the loop over stages is left with additions and multiplications.
    """
    equation, grid = numbers[:2]
    start, h = grid.point(i), grid.step_length(i)
    nodes = _C.reshape((-1,) + (1,) * h.ndim)
    time = StageTime(start + nodes * h, jnp.broadcast_to(start + 0.5 * h, (_C.size, *h.shape)))
    drives = jax.tree.map(lambda p: jnp.broadcast_to(p, (_C.size, *shape)).reshape(_C.size, -1), equation.drives(time))
    return lax.optimization_barrier((drives, jnp.broadcast_to(h, shape).ravel()))


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

    A loop over a buffer: unrolled, the stages take longer to compile and run no faster.
    """
    equation, _, system, _ = numbers

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
def _forward(perturbed, numbers, walked, shape, steps: int, saved: bool):
    del perturbed
    points = _march(numbers, walked, shape, steps, saved=True)
    return points if saved else points[walked][None], points


@_reversible.def_bwd
def _backward(points, from_result, perturbed, numbers, walked, shape, steps: int, saved: bool):
    """The reverse of a Runge-Kutta step is the same recursion with the transposed tableau.

    JAX's own rule would carry a cotangent of the whole buffer through each stage.
    """
    del perturbed, steps
    varied, fixed = eqx.partition(numbers, eqx.is_inexact_array)
    equation = numbers[0]

    def slopes_of(system, drives, states):
        """Slopes of all stages; the axis of stages goes behind that of components."""
        return equation.rhs(eqx.combine(system, fixed[2]), drives, jnp.moveaxis(states, 0, 1))

    def body(k, carry):
        from_y, to_numbers, to_system = carry
        i = walked - 1 - k
        (drives, h), to_inputs = jax.vjp(lambda v: _stage_drives(eqx.combine(v, fixed), i, shape), varied)
        states, slopes = _stages(numbers, drives, points[i], h)

        def stage(carry, row):
            from_states, j = carry
            weights, b, drive = row
            from_slope = b * from_y + jnp.tensordot(weights, from_states, 1)
            # The equation is linear: its transpose needs no state.
            _, transposed = jax.vjp(lambda y: equation.rhs(numbers[2], drive, y), from_y)
            (from_state,) = transposed(h * from_slope)
            return (lax.dynamic_update_index_in_dim(from_states, from_state, j, axis=0), j - 1), from_slope

        rows = (jnp.asarray(_A.T), jnp.asarray(_B), drives)
        (from_states, _), from_slopes = lax.scan(stage, (jnp.zeros_like(states), _C.size - 1), rows, reverse=True)
        # Everything that is no recursion, for all stages at once.
        _, pullback = jax.vjp(lambda s, d: slopes_of(s, d, states), varied[2], drives)
        to_system_i, to_drives = pullback(jnp.moveaxis(h * from_slopes, 0, 1))
        (to_numbers_i,) = to_inputs((to_drives, jnp.sum(from_slopes * slopes, axis=(0, 1))))
        from_y = from_y + jnp.sum(from_states, axis=0) + (from_result[i] if saved else 0.0)
        add = lambda old, new: jax.tree.map(jnp.add, old, new)
        return from_y, add(to_numbers, to_numbers_i), add(to_system, to_system_i)

    zeros = jax.tree.map(jnp.zeros_like, (varied, varied[2]))
    from_end = from_result[walked] if saved else from_result[0]
    from_start, to_numbers, to_system = lax.fori_loop(0, walked, body, (from_end, *zeros))
    return *to_numbers[:2], to_system, from_start

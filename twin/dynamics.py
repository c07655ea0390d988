"""Time evolution: a level graph under its pulses. `evolve` is the one door, and the one call of `diffeqsolve`.

Three methods stand behind it. `StaticGrid`: a fixed number of steps of eighth order laid from the pulse metadata, lanes
independent. `Magnus`: fourth-order steps, in equal numbers between saves, several times faster where an error near 1e-6
is enough: the hot path of large batches (`twin.batch.evolve_batch`). `Adaptive`: Diffrax's error control with knots at
the pulses, one lane at a time; the reference, and the way for stiff rates.
"""

import dataclasses
from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from twin import grid as grids
from twin import magnus, runge_kutta
from twin.batching import batch_shape, broadcast_batch, is_traced, physical, real_array
from twin.levels import LevelSystem
from twin.master_equation import (
    lindblad_components,
    pack_density,
    reached,
    schroedinger_components,
    turned_back,
    turning,
)
from twin.methods import Adaptive, Magnus, StaticGrid
from twin.pulses import AbstractPulse, Drive


class Solution(eqx.Module):
    """What `evolve` returns; `saves` is 1 without save times.

    Attributes:
        t_s: times of the states, s, shape (saves, *batch).
        state: real components, shape (saves, components, *batch): see `twin.master_equation`.
        populations: shape (saves, levels, *batch).
        coverage: steps within the core of each pulse, shape (pulses, *batch).
        valid: per lane: finite, every pulse seen, steps short enough for the error asked for. Invalid lanes are NaN.
        error_estimate: population error expected from the step length, shape (*batch), rounding not included; NaN for
            `Adaptive`, whose error is set by its tolerances.
    """

    t_s: Float[Array, "saves ..."]
    state: Float[Array, "saves components ..."]
    populations: Float[Array, "saves levels ..."]
    coverage: Int[Array, "pulses ..."]
    valid: Bool[Array, "..."]
    error_estimate: Float[Array, "..."]


class Problem(runge_kutta.AbstractEquation):
    """An evolution that has been checked: what `solve` integrates.

    `state` holds only the components that this graph and start can reach (`kept`): one pulse from a level reaches five
    of nine.
    """

    system: LevelSystem
    pulses: tuple[AbstractPulse, ...]
    window_s: tuple[Float[Array, "..."], Float[Array, "..."]]
    pure: bool = eqx.field(static=True)
    kept: tuple[int, ...] = eqx.field(static=True)
    save_s: Float[Array, "saves ..."] = physical(1)
    state: Float[Array, "components ..."] = physical(1)

    def drives(self, time: grids.StageTime) -> list[Drive]:
        """Each pulse's drive, turning; a leading axis of stages may come before the batch."""
        drives = [pulse.drive(time.t_s, time.within_s) for pulse in self.pulses]
        return turning(self.system, drives, time.t_s - self.window_s[0])

    def rhs(self, system: LevelSystem, drives: list[Drive], state: Float[Array, "components ..."]) -> Array:
        """d state / dt in the interaction picture, 1/s."""
        return jnp.stack(self.slopes(system, drives, tuple(state), rotating=False))

    def slopes(
        self, system: LevelSystem, drives: list[Drive], state: tuple[Float[Array, "..."], ...], *, rotating: bool
    ) -> list[Float[Array, "..."]]:
        """d state / dt component by component: arrays that are never stacked are never copied."""
        n = len(system.levels)
        parts: list = [None] * (2 * n if self.pure else n * n)
        for k, part in zip(self.kept, state, strict=True):
            parts[k] = part
        components = schroedinger_components if self.pure else lindblad_components
        slopes = components(system, drives, parts, rotating=rotating)
        zero = jnp.zeros_like(state[0])
        return [zero if part is None else part + zero for part in (slopes[k] for k in self.kept)]

    def whole(self, state: Float[Array, "saves kept ..."]) -> Float[Array, "saves components ..."]:
        """All components."""
        n = len(self.system.levels)
        full = jnp.zeros((len(state), 2 * n if self.pure else n * n, *state.shape[2:]), state.dtype)
        return full.at[:, np.array(self.kept)].set(state)


def evolve(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    *,
    start: str | np.ndarray,
    window_s: tuple,
    save_s=None,
    method: StaticGrid | Magnus | Adaptive | None = None,
) -> Solution:
    """Evolves a level graph under its pulses: Schrödinger if it is closed and starts pure, else Lindblad.

    Main arguments:
        system: the graph; `couplings[k]` is driven by `pulses[k]`. Fewer pulses leave the last couplings undriven.
        pulses: the waveforms. Numbers in `system`, `pulses` and `window_s` may have trailing batch axes.
        start: a level's name, a ket of shape (levels,), or a Hermitian matrix of shape (levels, levels, *batch).
        window_s: beginning and end of the evolution, s.

    Other arguments:
        save_s: times to save, s, shape (saves,) or (saves, *batch), inside the window; None saves the end.
        method: `StaticGrid()` (default), `Magnus()` or `Adaptive()`.

    Returns:
        A `Solution`, batch axes last.

    Raises:
        ValueError: 64-bit JAX is off; a window that ends before it begins; a traced value without `steps`; light shifts
            under `Magnus()`; at the unbatched door, a pulse that no step has seen or a grid too coarse for the
            requested error.
    """
    problem, shape, method = pose(system, pulses, start=start, window_s=window_s, save_s=save_s, method=method)
    solution, seen, success = solve(problem, shape, method, save_s is None)
    if shape == ():
        state = _refuse(solution.state, ~seen, _NOT_SEEN)
        state = _refuse(state, ~success, _NOT_SOLVED if isinstance(method, Adaptive) else _TOO_COARSE)
        solution = eqx.tree_at(lambda s: s.state, solution, state)
    return solution


def pose(
    system: LevelSystem, pulses: tuple[AbstractPulse, ...], *, start, window_s: tuple, save_s, method
) -> tuple[Problem, tuple[int, ...], StaticGrid | Magnus | Adaptive]:
    """Checks the arguments of `evolve`: the problem, its batch shape, and the method with its steps laid."""
    if not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "64-bit JAX is switched off, which this solver needs; set JAX_ENABLE_X64=1, "
            "or call jax.config.update('jax_enable_x64', True) before the first array."
        )
    method = StaticGrid() if method is None else method
    if isinstance(method, Magnus):
        system.refuse_light_shifts("`Magnus()`")
    if len(pulses) > len(system.couplings):
        raise ValueError(
            f"{len(pulses)} pulses for {len(system.couplings)} couplings; give at most one pulse a coupling."
        )
    system = dataclasses.replace(system, couplings=system.couplings[: len(pulses)])
    window = (real_array(window_s[0]), real_array(window_s[1]))
    if not is_traced(window) and np.any(np.asarray(window[1]) <= np.asarray(window[0])):
        raise ValueError(f"`window_s` must end after it begins, but is {window_s}; times are in seconds.")
    shape = batch_shape(system, pulses, window)
    if save_s is None:
        saves = window[1][None]
    else:
        saves = real_array(save_s)
        if saves.ndim == 1:
            saves = saves.reshape((-1,) + (1,) * len(shape))
        if not is_traced(saves, window) and bool(jnp.any((saves < window[0]) | (saves > window[1]))):
            raise ValueError(f"`save_s` must lie inside the window {window_s}, but is {save_s}; times are in seconds.")
    pure = system.closed and (isinstance(start, str) or np.ndim(start) == 1)
    state = initial_components(system, start, pure)
    kept = reached(system, np.flatnonzero(np.any(state.reshape(len(state), -1), axis=1)).tolist(), pure=pure)
    state = jnp.asarray(state[np.array(kept)])
    missing = (1,) * (1 + len(shape) - state.ndim)
    state = jnp.broadcast_to(state.reshape(state.shape[:1] + missing + state.shape[1:]), (state.shape[0], *shape))
    problem = Problem(system, tuple(pulses), window, pure, kept, saves, state)
    return problem, shape, _with_steps(method, problem, shape, save_s is None)


def _with_steps(method, problem: Problem, shape: tuple[int, ...], at_end: bool):
    """The method with as many steps as the values at hand need."""
    if isinstance(method, Magnus) and not at_end and any(pulse.breakpoints_s for pulse in problem.pulses):
        raise ValueError(
            "`Magnus()` takes equal steps between saves, which a pulse with jumps must not be crossed by; "
            "use `StaticGrid()`, or save the end only."
        )
    if isinstance(method, Adaptive) or method.steps is not None:
        return method
    if is_traced(problem, method):
        raise ValueError(
            f"the number of steps cannot be laid from traced values; give `{type(method).__name__}(steps=...)`, "
            "with the number from `plan_steps` over the box of values that will occur."
        )
    system, pulses, window, saves = problem.system, problem.pulses, problem.window_s, problem.save_s
    if isinstance(method, StaticGrid):
        narrow = _grid_shape(shape, method)
        steps = grids.plan_steps(system, pulses, window, float(method.error), narrow) + saves.shape[0]
    elif at_end:
        steps = grids.plan_steps(system, pulses, window, float(method.error), shape, magnus.RULE)
    else:
        steps = magnus.plan_steps(
            magnus.peak_density(system, pulses, window, shape), _edges(problem), float(method.error)
        )
    return dataclasses.replace(method, steps=steps)


def _edges(problem: Problem) -> Float[Array, "edges ..."]:
    """Beginning of the window and the save times."""
    first, saves = problem.window_s[0], problem.save_s
    shape = jnp.broadcast_shapes(first.shape, saves.shape[1:])
    return jnp.concatenate([jnp.broadcast_to(first, (1, *shape)), jnp.broadcast_to(saves, (len(saves), *shape))])


@eqx.filter_jit
def solve(
    problem: Problem, shape: tuple[int, ...], method: StaticGrid | Magnus | Adaptive, at_end: bool
) -> tuple[Solution, Bool[Array, "..."], Bool[Array, "..."]]:
    """(solution, pulses seen, success): everything behind the checks as one program, compiled once for all values."""
    if isinstance(method, StaticGrid):
        problem = _spread(problem, shape, _grid_shape(shape, method))
    else:
        problem = broadcast_batch(problem, shape)
    system, pulses = problem.system, problem.pulses
    if isinstance(method, Adaptive):
        t_s, state, coverage, success = _solve_lanes(problem, method, len(shape))
        bound = jnp.full(shape, jnp.nan)
    elif isinstance(method, Magnus):
        t_s, state, coverage, success, bound = _solve_magnus(problem, shape, method, at_end=at_end)
    else:
        t_s, state, coverage, success, bound = _solve_grid(problem, shape, method, at_end=at_end)
    if not isinstance(method, Magnus):
        elapsed_s = t_s - problem.window_s[0]
        state = turned_back(system, state, elapsed_s, problem.kept, pure=problem.pure)
    state = problem.whole(state)
    # A pulse without amplitude cannot be missed: a lane may leave pulse 2 out by setting its area to zero.
    silent = jnp.array([jnp.broadcast_to(pulse.peak_rad_s == 0, shape) for pulse in pulses], bool)
    seen = jnp.all((coverage >= grids.MIN_COVERAGE) | silent.reshape((-1, *shape)), axis=0)
    valid = seen & success & _sensible(problem, shape) & jnp.all(jnp.isfinite(state), axis=(0, 1))
    state = jnp.where(valid, state, jnp.nan)
    populations = _populations(state, len(system.levels), problem.pure)
    t_s, coverage = (jnp.broadcast_to(a, (len(a), *shape)) for a in (t_s, coverage))
    return Solution(t_s, state, populations, coverage, valid, jnp.broadcast_to(bound, shape)), seen, success


def _grid_shape(shape: tuple[int, ...], method: StaticGrid) -> tuple[int, ...]:
    return (1, *shape[1:]) if method.shared and shape else shape


def _spread(problem: Problem, shape: tuple[int, ...], narrow: tuple[int, ...]) -> Problem:
    """One number a lane; what lanes of a shared grid have in common stays one number."""
    new = broadcast_batch(problem, shape, narrow=narrow)
    if new.window_s[0].shape != narrow or new.window_s[1].shape != narrow or new.save_s.shape[1:] != narrow:
        raise ValueError("lanes along the first axis share their grid, and must share window and save times.")
    return dataclasses.replace(new, state=jnp.broadcast_to(problem.state, (len(problem.kept), *shape)))


_NOT_SEEN = (
    "a pulse was stepped over: no step of the solution lies within its core; "
    "widen `window_s` to hold the pulse, or raise `steps`."
)
_TOO_COARSE = (
    "the static grid is too coarse for the requested error; raise `steps`, raise `error`, or use `Adaptive()`."
)
_NOT_SOLVED = "the adaptive solver did not reach the end; raise `max_steps`, or set `stiff=True` for fast rates."


def _refuse(state: Float[Array, "..."], condition: Bool[Array, ""], message: str) -> Float[Array, "..."]:
    if is_traced(condition):
        return eqx.error_if(state, condition, message)
    if bool(condition):
        raise ValueError(message)
    return state


def _sensible(problem: Problem, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """What the constructors refuse in known values, judged lane by lane in traced ones."""
    good = jnp.all((problem.save_s >= problem.window_s[0]) & (problem.save_s <= problem.window_s[1]), axis=0)
    for pulse in problem.pulses:
        low, high = pulse.support_s
        good = good & (low < high) & jnp.isfinite(low) & jnp.isfinite(high)
    for jump in (*problem.system.decays, *problem.system.dephasings):
        good = good & (jump.rate_per_s >= 0)
    return jnp.broadcast_to(good, shape)


def initial_components(system: LevelSystem, start, pure: bool) -> Float[np.ndarray, "components ..."]:
    """Real components of a level's name, a ket or a density matrix; of a ket where `pure`.

    Raises:
        ValueError: a name or a shape that the graph does not have.
    """
    n = len(system.levels)
    if isinstance(start, str):
        if start not in system.levels:
            raise ValueError(f"`start` must be one of the levels {system.levels}, but is {start!r}.")
        start = np.eye(n)[system.index(start)]
    start = np.asarray(start)
    if start.shape != (n,) and start.shape[:2] != (n, n):
        raise ValueError(f"`start` must be a ket ({n},) or a density matrix ({n}, {n}), but has shape {start.shape}.")
    if pure:
        return np.concatenate([start.real, start.imag])
    return pack_density(np.outer(start, start.conj()) if start.ndim == 1 else start)


def _populations(state: Float[Array, "saves components ..."], n: int, pure: bool) -> Float[Array, "saves levels ..."]:
    return state[:, :n] ** 2 + state[:, n : 2 * n] ** 2 if pure else state[:, :n]


def _solve_grid(problem: Problem, shape: tuple[int, ...], method: StaticGrid, at_end: bool):
    system, pulses, window = problem.system, problem.pulses, problem.window_s
    steps = method.steps
    saves = None if at_end else problem.save_s
    share = 1.0 if method.finest is None else grids.coarser_share(method.error, method.finest)
    plan = grids.lay(system, pulses, window, steps, share, window[0].shape, saves)
    reverse = method.differentiation == "reverse"
    wide = broadcast_batch(system, shape)
    state = runge_kutta.walk(
        problem, plan.grid, wide, problem.state, plan.walked, steps=steps, reverse=reverse, saved=not at_end
    )
    if saves is not None:
        # Save times are knots of the grid: pick each lane's own point.
        nearest = jnp.argmin(jnp.abs(plan.t_s[None] - saves[:, None]), axis=1)
        nearest = jnp.broadcast_to(nearest, (len(saves), *shape))
        state = jnp.take_along_axis(state, nearest[:, None], axis=0)
    fine = plan.action_per_step <= grids.DOPRI8.allowed_action(method.error) * (1 + 1e-9)
    return problem.save_s, state, plan.coverage, fine, grids.DOPRI8.error_of(plan.action_per_step)


def _solve_magnus(problem: Problem, shape: tuple[int, ...], method: Magnus, at_end: bool):
    double = problem
    if method.precision == "single":
        problem = jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, problem)
    system, pulses = problem.system, problem.pulses
    slopes = partial(problem.slopes, rotating=True)
    drives = lambda time: [pulse.drive(time.t_s, time.within_s) for pulse in pulses]
    step = lambda y, start_s, length_s: magnus.step(slopes, system, drives, y, start_s, length_s)
    per_interval = np.atleast_1d(np.asarray(method.steps, int))
    if at_end:
        # Lanes have their own grids: nothing is read before the end, and the gaps between pulses cost little.
        steps = int(per_interval.sum())
        plan = grids.lay(double.system, double.pulses, double.window_s, steps, 1.0, shape, rule=magnus.RULE)
        grid = grids.Grid(plan.grid.knot_s.astype(problem.save_s.dtype), plan.grid.knot_index)
        times = lambda i: (t.astype(problem.save_s.dtype) for t in (grid.point(i), grid.step_length(i)))
        state = magnus.walk(lambda y, i: step(y, *times(i)), problem.state, jnp.arange(steps), None)
    else:
        edges = _edges(problem)
        counts = np.broadcast_to(per_interval, len(edges) - 1)
        density = magnus.peak_density(double.system, double.pulses, double.window_s, shape)
        plan = magnus.even_plan(density, edges, counts)
        rows = (plan.start_s, plan.length_s)
        state = magnus.walk(lambda y, row: step(y, *row), problem.state, rows, np.cumsum(counts) - 1)
    fine = plan.action_per_step <= magnus.RULE.allowed_action(method.error) * (1 + 1e-9)
    return double.save_s, state, grids.coverage(pulses, plan.t_s), fine, magnus.RULE.error_of(plan.action_per_step)


def _solve_lanes(problem: Problem, method: Adaptive, axes: int):
    solve = lambda p: _solve_adaptive(p, method)
    for _ in range(axes):
        solve = jax.vmap(solve, in_axes=-1, out_axes=-1)
    return solve(problem)


def _solve_adaptive(problem: Problem, method: Adaptive):
    edges = [t for p in problem.pulses for t in (*p.support_s, *p.core_s, 0.5 * (p.core_s[0] + p.core_s[1]))]
    breaks = [t for p in problem.pulses for t in p.breakpoints_s]
    start, stop = problem.window_s
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=method.rtol, atol=method.atol),
        step_ts=jnp.sort(jnp.stack(edges)) if edges else None,
        jump_ts=jnp.sort(jnp.stack(breaks)) if breaks else None,
    )
    saveat = diffrax.SaveAt(
        subs=[
            diffrax.SubSaveAt(ts=problem.save_s),
            diffrax.SubSaveAt(t0=True, steps=True, fn=_time),
        ]
    )
    _, (state, steps_s), success = _integrate(
        diffrax.Kvaerno5() if method.stiff else diffrax.Dopri8(),
        (start, stop, None),
        problem,
        saveat,
        controller,
        diffrax.RecursiveCheckpointAdjoint(),
        method.max_steps,
    )
    # Unused places of the record are infinite; repeating the end there adds no steps.
    steps_s = jnp.where(jnp.isfinite(steps_s), steps_s, stop)
    return problem.save_s, state, grids.coverage(problem.pulses, steps_s), success


def _slope(t, state, problem: Problem):
    return problem.rhs(problem.system, problem.drives(grids.StageTime(t, t)), state)


def _time(t, state, problem):
    del state, problem
    return t


# Module level, so that calls of the same shapes share one compiled program.
_TERM = diffrax.ODETerm(_slope)


def _integrate(solver, times, problem: Problem, saveat, controller, adjoint, max_steps: int):
    """The one call of `diffeqsolve`: (times, saved states, success)."""
    start, stop, first = times
    solution = diffrax.diffeqsolve(
        _TERM,
        solver,
        start,
        stop,
        first,
        problem.state,
        args=problem,
        saveat=saveat,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=max_steps,
        throw=False,
    )
    return solution.ts, solution.ys, solution.result == diffrax.RESULTS.successful

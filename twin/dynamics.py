"""Time evolution: a level graph under its pulses. `evolve` is the one door, and the one call of `diffeqsolve`.

Two methods stand behind it. `StaticGrid`: a fixed number of steps laid from the pulse metadata, lanes independent, the
hot path. `Adaptive`: Diffrax's error control with knots at the pulses, one lane at a time; the reference, and the way
for stiff rates.
"""

import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from twin import grid as grids
from twin.batching import batch_shape, broadcast_batch, check_values, is_traced, physical, real_array
from twin.levels import LevelSystem
from twin.master_equation import lindblad_rhs, pack_density, schroedinger_rhs, turned_back, turning
from twin.pulses import AbstractPulse, Drive


class StaticGrid(eqx.Module):
    """Eighth-order steps on a static grid.

    Args:
        error: largest population error aimed at; lanes that need more steps than there are become NaN and are flagged.
        steps: length of the compiled program. None lays it from the values at hand, which must then be known (outside
            `jit`); give a number (`twin.grid.plan_steps` over the largest values) where they are traced.
        finest: the error for which `steps` were laid, if `error` is larger: then only a share of them is walked, and
            `error` may change without compiling again.
        differentiation: "reverse" for `jax.grad` (one state a step is kept, stages are recomputed), "forward" for
            `jax.jvp` and `jax.jacfwd`.
    """

    error: Float[Array, ""] = physical(default=1e-8)
    steps: int | None = eqx.field(static=True, default=None)
    finest: float | None = eqx.field(static=True, default=None)
    differentiation: str = eqx.field(static=True, default="reverse")

    def __check_init__(self):
        within = "between 1e-13 and 1e-3"
        check_values("error", self.error, lambda v: (v >= 1e-13) & (v <= 1e-3), within, "the default is 1e-8")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, but is {self.steps}; None lays the number from the pulses.")
        if self.differentiation not in ("reverse", "forward"):
            raise ValueError(
                "`differentiation` must be 'reverse' (jax.grad) or 'forward' (jax.jvp), "
                f"but is {self.differentiation!r}."
            )


class Adaptive(eqx.Module):
    """Diffrax with error control and knots at the pulses, lane by lane: the reference.

    Args:
        rtol, atol: tolerances of a step; the error of a solution is some ten times larger.
        stiff: Kvaerno5 in place of Dopri8, for rates far above the Rabi frequencies.
        max_steps: a lane that needs more is flagged and NaN.
    """

    rtol: float = eqx.field(static=True, default=1e-12)
    atol: float = eqx.field(static=True, default=1e-13)
    stiff: bool = eqx.field(static=True, default=False)
    max_steps: int = eqx.field(static=True, default=16384)


class Solution(eqx.Module):
    """What `evolve` returns; `saves` is 1 without save times.

    Attributes:
        t_s: times of the states, s, shape (saves, *batch).
        state: real components, shape (saves, components, *batch): see `twin.master_equation`.
        populations: shape (saves, levels, *batch).
        coverage: steps within the core of each pulse, shape (pulses, *batch).
        valid: per lane: finite, every pulse seen, steps short enough for the error asked for. Invalid lanes are NaN.
        error_estimate: population error expected from the step length, shape (*batch); NaN for `Adaptive`, whose error
            is set by its tolerances.
    """

    t_s: Float[Array, "saves ..."]
    state: Float[Array, "saves components ..."]
    populations: Float[Array, "saves levels ..."]
    coverage: Int[Array, "pulses ..."]
    valid: Bool[Array, "..."]
    error_estimate: Float[Array, "..."]


class _Problem(eqx.Module):
    system: LevelSystem
    pulses: tuple[AbstractPulse, ...]
    window_s: tuple[Float[Array, "..."], Float[Array, "..."]]
    pure: bool = eqx.field(static=True)
    save_s: Float[Array, "saves ..."] = physical(1)
    state: Float[Array, "components ..."] = physical(1)

    def drives(self, time: grids.StageTime) -> list[Drive]:
        """Each pulse's drive, turning; a leading axis of stages may come before the batch."""
        drives = [pulse.drive(time.t_s, time.within_s) for pulse in self.pulses]
        return turning(self.system, drives, time.t_s - self.window_s[0])

    @property
    def rhs(self):
        """The right-hand side, `rhs(system, drives, state)`."""
        return schroedinger_rhs if self.pure else lindblad_rhs


def evolve(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    *,
    start: str | np.ndarray,
    window_s: tuple,
    save_s=None,
    method: StaticGrid | Adaptive | None = None,
) -> Solution:
    """Evolves a level graph under its pulses: Schrödinger if it is closed and starts pure, else Lindblad.

    Main arguments:
        system: the graph; `couplings[k]` is driven by `pulses[k]`. Fewer pulses leave the last couplings undriven.
        pulses: the waveforms. Numbers in `system`, `pulses` and `window_s` may have trailing batch axes.
        start: a level's name, a ket of shape (levels,), or a Hermitian matrix of shape (levels, levels, *batch).
        window_s: beginning and end of the evolution, s.

    Other arguments:
        save_s: times to save, s, shape (saves,) or (saves, *batch), inside the window; None saves the end.
        method: `StaticGrid()` (default) or `Adaptive()`.

    Returns:
        A `Solution`, batch axes last.

    Raises:
        ValueError: 64-bit JAX is off; a window that ends before it begins; a traced value without `steps`; at the
            unbatched door, a pulse that no step has seen or a grid too coarse for the requested error.
    """
    if not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "64-bit JAX is switched off, which this solver needs; set JAX_ENABLE_X64=1, "
            "or call jax.config.update('jax_enable_x64', True) before the first array."
        )
    method = StaticGrid() if method is None else method
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
        saves = jnp.broadcast_to(window[1], (1, *shape))
    else:
        saves = real_array(save_s)
        if saves.ndim == 1:
            saves = saves.reshape((-1,) + (1,) * len(shape))
        saves = jnp.broadcast_to(saves, (saves.shape[0], *shape))
        if not is_traced(saves, window) and bool(jnp.any((saves < window[0]) | (saves > window[1]))):
            raise ValueError(f"`save_s` must lie inside the window {window_s}, but is {save_s}; times are in seconds.")
    pure = system.closed and (isinstance(start, str) or np.ndim(start) == 1)
    state = _initial_state(system, start, pure)
    missing = (1,) * (1 + len(shape) - state.ndim)
    state = jnp.broadcast_to(state.reshape(state.shape[:1] + missing + state.shape[1:]), (state.shape[0], *shape))
    problem = _Problem(system, tuple(pulses), window, pure, saves, state)
    if isinstance(method, StaticGrid) and method.steps is None:
        if is_traced(problem, method):
            raise ValueError(
                "the number of steps cannot be laid from traced values; give `StaticGrid(steps=...)`, "
                "with the number from `plan_steps` over the box of values that will occur."
            )
        steps = grids.plan_steps(system, pulses, window, float(method.error), shape) + saves.shape[0]
        method = dataclasses.replace(method, steps=steps)
    solution, seen, success = _solve(problem, shape, method, save_s is None)
    if shape == ():
        state = _refuse(solution.state, ~seen, _NOT_SEEN)
        state = _refuse(state, ~success, _TOO_COARSE if isinstance(method, StaticGrid) else _NOT_SOLVED)
        solution = eqx.tree_at(lambda s: s.state, solution, state)
    return solution


@eqx.filter_jit
def _solve(problem: _Problem, shape: tuple[int, ...], method: StaticGrid | Adaptive, at_end: bool):
    """(solution, seen, success): everything behind the checks as one program, compiled once for all values."""
    # One number a lane from here on: a number shared by lanes would be summed over them at every stage of a gradient.
    problem = broadcast_batch(problem, shape)
    system, pulses = problem.system, problem.pulses
    if isinstance(method, Adaptive):
        t_s, state, coverage, success = _solve_lanes(problem, method, len(shape))
        bound = jnp.full(shape, jnp.nan)
    else:
        t_s, state, coverage, success, bound = _solve_grid(problem, shape, method, at_end=at_end)
    back = lambda components, time_s: turned_back(system, components, time_s - problem.window_s[0], pure=problem.pure)
    state = jax.vmap(back)(state, t_s)
    # A pulse without amplitude cannot be missed: a lane may leave pulse 2 out by setting its area to zero.
    silent = [jnp.broadcast_to(pulse.peak_rad_s == 0, shape) for pulse in pulses]
    seen = jnp.all((coverage >= grids.MIN_COVERAGE) | jnp.array(silent, bool).reshape(coverage.shape), axis=0)
    valid = seen & success & _sensible(problem, shape) & jnp.all(jnp.isfinite(state), axis=(0, 1))
    state = jnp.where(valid, state, jnp.nan)
    populations = _populations(state, len(system.levels), problem.pure)
    return Solution(t_s, state, populations, coverage, valid, bound), seen, success


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


def _sensible(problem: _Problem, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """What the constructors refuse in known values, judged lane by lane in traced ones."""
    good = jnp.all((problem.save_s >= problem.window_s[0]) & (problem.save_s <= problem.window_s[1]), axis=0)
    for pulse in problem.pulses:
        low, high = pulse.support_s
        good = good & (low < high) & jnp.isfinite(low) & jnp.isfinite(high)
    for jump in (*problem.system.decays, *problem.system.dephasings):
        good = good & (jump.rate_per_s >= 0)
    return jnp.broadcast_to(good, shape)


def _initial_state(system: LevelSystem, start, pure: bool) -> Float[Array, "components ..."]:
    n = len(system.levels)
    if isinstance(start, str):
        if start not in system.levels:
            raise ValueError(f"`start` must be one of the levels {system.levels}, but is {start!r}.")
        start = np.eye(n)[system.index(start)]
    start = np.asarray(start)
    if start.shape != (n,) and start.shape[:2] != (n, n):
        raise ValueError(f"`start` must be a ket ({n},) or a density matrix ({n}, {n}), but has shape {start.shape}.")
    if pure:
        return jnp.asarray(np.concatenate([start.real, start.imag]))
    return pack_density(np.outer(start, start.conj()) if start.ndim == 1 else start)


def _populations(state: Float[Array, "saves components ..."], n: int, pure: bool) -> Float[Array, "saves levels ..."]:
    return state[:, :n] ** 2 + state[:, n : 2 * n] ** 2 if pure else state[:, :n]


def _solve_grid(problem: _Problem, shape: tuple[int, ...], method: StaticGrid, at_end: bool):
    system, pulses, window = problem.system, problem.pulses, problem.window_s
    steps = method.steps
    saves = None if at_end else problem.save_s
    share = 1.0 if method.finest is None else grids.coarser_share(method.error, method.finest)
    plan = grids.lay(system, pulses, window, steps, share, shape, saves)
    _, state = _integrate(
        grids.GridDopri8(plan.grid, method.differentiation == "reverse"),
        (0.0, plan.walked.astype(float), 1.0),
        problem,
        diffrax.SaveAt(t1=True) if at_end else diffrax.SaveAt(t0=True, steps=True),
        diffrax.ConstantStepSize(),
        diffrax.ForwardMode() if method.differentiation == "forward" else diffrax.RecursiveCheckpointAdjoint(steps),
        steps,
    )[:2]
    if saves is not None:
        # Save times are knots of the grid: pick each lane's own point.
        nearest = jnp.argmin(jnp.abs(plan.t_s[None] - saves[:, None]), axis=1)
        state = jnp.take_along_axis(state, nearest[:, None], axis=0)
    bound = 1e-8 * (plan.action_per_step / grids.ACTION_PER_STEP) ** grids.ORDER
    fine = plan.action_per_step <= grids.allowed_action(method.error) * (1 + 1e-9)
    return problem.save_s, state, plan.coverage, fine, bound


def _solve_lanes(problem: _Problem, method: Adaptive, axes: int):
    solve = lambda p: _solve_adaptive(p, method)
    for _ in range(axes):
        solve = jax.vmap(solve, in_axes=-1, out_axes=-1)
    return solve(problem)


def _solve_adaptive(problem: _Problem, method: Adaptive):
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


def _slope(t, state, problem: _Problem):
    return problem.rhs(problem.system, problem.drives(grids.StageTime(t, t)), state)


def _time(t, state, problem):
    del state, problem
    return t


# Module level, so that calls of the same shapes share one compiled program.
_TERM = diffrax.ODETerm(_slope)


def _integrate(solver, times, problem: _Problem, saveat, controller, adjoint, max_steps: int):
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

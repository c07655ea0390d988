"""The full solve of ion and motion: a level graph times one or two harmonic modes, in truncated Fock space.

    H = sum_j E_j |j><j| + sum_m omega_m a_m^+ a_m
        + 1/2 sum_k ( Omega_k(t) e^{-i phi_k} exp[i sum_m eta_km (a_m + a_m^+)] |to_k><from_k| + h.c. )

with the jumps of the graph and heating `sqrt(ndot_m) a_m`, `sqrt(ndot_m) a_m^+`. It is the reference for the thermal
averages of `twin.motion`, which know the carrier alone. Recoil of the decay is left out.

The state turns with E_j and omega_m, so that only the pulses move it; its columns are kets, one a Fock state of the
thermal mixture, where nothing jumps, else those of the density matrix, of which half the commutator is computed.
The displacement operator acts band by band, as one shifted array each. In the basis i^n |n> its elements are real.
"""

import dataclasses
import math

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from twin.batching import is_traced, real_array
from twin.fock import Equation, Modes, Plan, band_table, damping_rates
from twin.levels import LevelSystem
from twin.pulses import AbstractPulse
from twin.sidebands import displaced_states, needed_cutoff

__all__ = ["Modes", "Plan", "SpinMotion", "plan_solve", "solve"]

# Points of the table from which the steps are laid.
_TABLE = 2048
# Population of so many Fock states at the end of a mode is watched.
_TOP = 2
# Eighth order: measured over the cases of tests/test_spin_motion.py.
_ERROR_OF_A_STEP = 1.2e-13
# The same of a decay, about 1/9!; for steps beyond the second number of decay times the method is not stable.
_ERROR_OF_DECAY, _LONGEST_STEP = 2e-6, 3.0
# The coarse grid has half the steps. So long steps do not show the full order: it is counted as the third.
_RATIO = 2**3
_PULSES = 2


class SpinMotion(eqx.Module):
    """What `solve` returns.

    Attributes:
        populations: of the levels at the end, summed over the motion, shape (levels,); NaN where not `valid`.
        n_mean: mean phonon number of each mode at the end, shape (modes,).
        cutoff_population: population of the last two Fock states of a mode, the largest over modes and run, and what
            the mixture at the beginning left out.
        error_estimate: population error of the time steps, from a grid of half as many.
        valid: whether the numbers are finite and both errors below the one aimed at.
        plan: the sizes it ran with.
    """

    populations: Float[Array, "levels"]
    n_mean: Float[Array, "modes"]
    cutoff_population: Float[Array, ""]
    error_estimate: Float[Array, ""]
    valid: Bool[Array, ""]
    plan: Plan = eqx.field(static=True)


def solve(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    modes: Modes,
    *,
    start: str,
    window_s: tuple,
    cutoff: int | tuple[int, ...] | None = None,
    error: float = 1e-7,
    plan: Plan | None = None,
) -> SpinMotion:
    """Populations and phonon numbers after the pulses.

    Main arguments:
        system: the graph; `couplings[k]` is driven by `pulses[k]`. Its numbers are scalars; use `jax.vmap` for batches.
        pulses: one or two, smooth.
        modes: the motion.
        start: the level prepared.
        window_s: beginning and end, s.

    Other arguments:
        cutoff: Fock states of each mode; None takes `needed_cutoff`.
        error: population error aimed at.
        plan: sizes, from `plan_solve`; needed where values are traced (`jax.jit`, `jax.grad`, `jax.vmap`).

    Returns:
        `SpinMotion`. Traced, a run that misses its error is flagged and NaN.

    Raises:
        ValueError: traced values without a plan; known values with a cutoff or steps that do not serve.
    """
    numbers = (system, pulses, modes, window_s)
    planned = plan is None
    if planned:
        if is_traced(*numbers):
            raise ValueError(
                "the sizes of a solve cannot be laid from traced values; give `plan=plan_solve(...)` for the largest "
                "values that will occur."
            )
        plan = plan_solve(system, pulses, modes, window_s=window_s, cutoff=cutoff, error=error)
    if start not in system.levels:
        raise ValueError(f"`start` must be one of the levels {system.levels}, but is {start!r}.")
    window = (real_array(window_s[0]), real_array(window_s[1]))
    result = _solve(system, tuple(pulses), modes, window, system.index(start), plan)
    if planned and result.error_estimate > error:
        # The law of the steps is one of weak pulses; a strong one is seen to need more.
        more = min(4.0, 1.2 * float(result.error_estimate / error) ** (1 / 6))
        plan = dataclasses.replace(plan, steps=2 * math.ceil(more * plan.steps / 2))
        result = _solve(system, tuple(pulses), modes, window, system.index(start), plan)
    if not is_traced(*numbers) and not bool(result.valid):
        _refuse(result, modes, window)
    return result


def _refuse(result: SpinMotion, modes: Modes, window):
    plan, lost = result.plan, float(result.cutoff_population)
    if lost > plan.error:
        serve = _cutoffs(modes, window, plan.error)
        if all(a <= b for a, b in zip(serve, plan.cutoff, strict=True)):
            serve = tuple(2 * n for n in plan.cutoff)  # the pulses themselves excite the motion
        raise ValueError(
            f"`cutoff` must hold the motion, but {plan.cutoff} leaves {lost:.1e} of the population at or beyond its "
            f"end, and the error aimed at is {plan.error:g}; {serve} would serve, or raise `error`."
        )
    raise ValueError(
        f"{plan.steps} steps leave a population error of {float(result.error_estimate):.1e}, and the error aimed at is "
        f"{plan.error:g}; plan more `steps`, or raise `error`."
    )


def _cutoffs(modes: Modes, window, error: float) -> tuple[int, ...]:
    gained = np.asarray(modes.each("heating_rate_per_s") * (window[1] - window[0]))
    alpha = np.hypot(np.asarray(modes.each("alpha_real")), np.asarray(modes.each("alpha_imag")))
    n_bar = np.asarray(modes.each("n_bar"))
    # Half the error, for the mixture and for the end of the run.
    return tuple(
        needed_cutoff(float(n), float(a), float(g), error / 2) for n, a, g in zip(n_bar, alpha, gained, strict=True)
    )


def plan_solve(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    modes: Modes,
    *,
    window_s: tuple,
    cutoff: int | tuple[int, ...] | None = None,
    error: float = 1e-7,
) -> Plan:
    """Sizes for these values, which must be known: give the largest that will occur.

    Bands are left out while the integral of their Hamiltonian's norm, which bounds the change of any population, stays
    below a tenth of `error`.

    Raises:
        ValueError: more pulses than couplings or than two, pulses with jumps, a window or an error out of range.
    """
    if not 1e-12 <= error <= 1e-2:
        raise ValueError(f"`error` must lie between 1e-12 and 1e-2, but is {error}; the default is 1e-7.")
    if len(pulses) > min(len(system.couplings), _PULSES):
        raise ValueError(f"{len(pulses)} pulses for {len(system.couplings)} couplings; give at most one each, and two.")
    if any(pulse.breakpoints_s for pulse in pulses):
        raise ValueError("`pulses` must be smooth, but one of them jumps; use `Gaussian` or `Sech`.")
    window = (real_array(window_s[0]), real_array(window_s[1]))
    if not float(window[0]) < float(window[1]):
        raise ValueError(f"`window_s` must end after it begins, but is {window_s}; times are in seconds.")
    if cutoff is None:
        cutoffs = _cutoffs(modes, window, error)
    else:
        cutoffs = (cutoff,) * modes.count if isinstance(cutoff, int) else tuple(cutoff)
    if len(cutoffs) != modes.count or min(cutoffs) < 2:
        raise ValueError(f"`cutoff` must be at least 2 for each of {modes.count} modes, but is {cutoff}.")
    rates = [d.rate_per_s for d in (*system.decays, *system.dephasings)] + [modes.each("heating_rate_per_s")]
    pure = not any(np.any(np.asarray(rate) > 0) for rate in rates)
    terms = cutoffs
    if pure:
        thermal = [needed_cutoff(float(n), error=error / 20) - 4 if n > 0 else 1 for n in modes.each("n_bar")]
        terms = tuple(min(n, t) for n, t in zip(cutoffs, thermal, strict=True))
    bands = _bands(pulses, modes, cutoffs, error)
    plan = Plan(cutoffs, bands, 2, terms, pure, error)
    steps = float(_steps_density(system, tuple(pulses), modes, window, plan)[-1])
    return Plan(cutoffs, bands, 2 * math.ceil(steps / 2) + 4, terms, pure, error)


def _bands(pulses, modes: Modes, cutoffs: tuple[int, ...], error: float) -> tuple[int, ...]:
    found = []
    for m, cutoff in enumerate(cutoffs):
        left_out = np.zeros(cutoff)
        for k, pulse in enumerate(pulses):
            largest = np.max(np.abs(band_table(modes.eta(k)[m], cutoff - 1, cutoff)), axis=1)
            # Both signs of s, and twice the distance of two states in their populations.
            left_out += 2 * float(jnp.abs(pulse.area_rad)) * (np.sum(largest) - np.cumsum(largest))
        found.append(int(np.argmax(left_out <= 0.1 * error / len(cutoffs))))
    return tuple(found)


@eqx.filter_jit
def _steps_density(system: LevelSystem, pulses, modes: Modes, window, plan: Plan) -> Float[Array, "table"]:
    """Steps laid until each point of a table over the window.

    A band of frequency nu and strength Omega d / 2 has in one step of length h an error of (nu h)^9 d Omega / nu,
    by which h follows from the error aimed at.
    """
    t_s = jnp.linspace(window[0], window[1], _TABLE)
    damping = 2 * sum((d.rate_per_s for d in system.decays), jnp.zeros(()))
    damping += sum((d.rate_per_s * (max(d.weights) - min(d.weights)) ** 2 for d in system.dephasings), jnp.zeros(()))
    damping += jnp.sum(4 * modes.each("heating_rate_per_s") * jnp.array(plan.cutoff))
    duration = window[1] - window[0]
    decaying = (_ERROR_OF_DECAY * damping * duration / plan.error) ** 0.125
    density = damping * jnp.maximum(decaying, 1 / _LONGEST_STEP) + 2 / duration * jnp.ones(_TABLE)
    for k, pulse in enumerate(pulses):
        source, target = (system.index(name) for name in system.couplings[k])
        offset = jnp.abs(system.energies_rad_s[target] - system.energies_rad_s[source])
        rabi = jnp.abs(pulse.largest_rad_s(*window))
        weight, nu = jnp.ones(()), jnp.zeros(())
        for m, (bands, cutoff) in enumerate(zip(plan.bands, plan.cutoff, strict=True)):
            strength = jnp.max(jnp.abs(band_table(modes.eta(k)[m], bands, cutoff)), axis=1)
            weight = weight[..., None] * strength
            nu = nu[..., None] + 2 * jnp.pi * modes.secular_hz[m] * jnp.arange(bands + 1)
        nu = nu + offset + rabi + 3 / pulse.timescale_s
        per_s = (_ERROR_OF_A_STEP * jnp.sum(jnp.abs(pulse.area_rad) * weight * nu**8) / plan.error) ** 0.125
        drive = pulse.drive(t_s, t_s)
        magnitude = jnp.hypot(drive.real, 0.0 if drive.imag is None else drive.imag)
        # Where the pulse is weak, steps of equal error are longer.
        density += per_s * (magnitude / jnp.maximum(rabi, 1e-300)) ** (1 / 9)
    steps = 0.5 * (density[1:] + density[:-1]) * duration / (_TABLE - 1)
    return jnp.concatenate([jnp.zeros(1), jnp.cumsum(steps)])


# ------------------------------------------------------------------------------------------------------- the steps


def _tableau() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, c) of Prince and Dormand's eighth-order step, without the last stage, which only repeats the solution."""
    tableau = diffrax.Dopri8.tableau
    stages = len(tableau.b_sol) - 1
    a = np.zeros((stages, stages))
    for j, row in enumerate(tableau.a_lower[: stages - 1]):
        a[j + 1, : j + 1] = row
    return a, np.asarray(tableau.b_sol[:stages]), np.concatenate([[0.0], tableau.c[: stages - 1]])


_A, _B, _C = _tableau()


def _walk(equation: Equation, knots_s, state, watch):
    """State at the last knot, and the largest of what `watch` finds at each; a gradient keeps one state a step."""

    @jax.checkpoint
    def advance(y, times):
        t, h = times

        def stage(carry, row):
            slopes, j = carry
            weights, c = row
            slope = equation.rhs(t + c * h, y + h * jnp.tensordot(weights, slopes, 1))
            return (lax.dynamic_update_index_in_dim(slopes, slope, j, axis=0), j + 1), None

        empty = jnp.zeros((_C.size, *y.shape))
        (slopes, _), _ = lax.scan(stage, (empty, 0), (jnp.asarray(_A), jnp.asarray(_C)))
        y = y + h * jnp.tensordot(jnp.asarray(_B), slopes, 1)
        return y, watch(y)

    state, seen = lax.scan(advance, state, (knots_s[:-1], jnp.diff(knots_s)))
    return state, jnp.max(seen)


@eqx.filter_jit
def _solve(system: LevelSystem, pulses, modes: Modes, window, start: int, plan: Plan) -> SpinMotion:
    kets, weights, lost = _mixture(modes, plan)
    levels, columns = len(system.levels), weights.size
    at = np.zeros((1, levels) + (1,) * (modes.count + 1))
    at[0, start] = 1.0
    state = at * jnp.stack([kets.real, kets.imag])[:, None]
    if not plan.pure:
        flat = state.reshape(2, -1, columns)
        re = (flat[0] * weights) @ flat[0].T + (flat[1] * weights) @ flat[1].T
        im = (flat[1] * weights) @ flat[0].T - (flat[0] * weights) @ flat[1].T
        state = jnp.stack([re, im]).reshape(2, levels, *plan.cutoff, -1)
    tables = tuple(
        tuple(band_table(eta, s, n) for eta, s, n in zip(modes.eta(k), plan.bands, plan.cutoff, strict=True))
        for k in range(len(pulses))
    )
    damping = None if plan.pure else damping_rates(system, modes, plan)
    heating, heated = modes.each("heating_rate_per_s"), modes.heating_rate_per_s is not None
    equation = Equation(system, pulses, 2 * jnp.pi * modes.secular_hz, tables, damping, heating, heated, plan)

    def distribution(y) -> Float[Array, "levels ..."]:
        if plan.pure:
            return jnp.sum((y[0] ** 2 + y[1] ** 2) * weights, axis=-1)
        size = y.shape[-1]
        return jnp.diagonal(y[0].reshape(size, size)).reshape(levels, *plan.cutoff)

    def top(y):
        p = jnp.sum(distribution(y), axis=0)
        ends = [jnp.sum(lax.slice_in_dim(p, max(n - _TOP, 0), n, axis=m)) for m, n in enumerate(plan.cutoff)]
        return jnp.max(jnp.stack(ends))

    until = _steps_density(*lax.stop_gradient((system, pulses, modes, window)), plan)
    share = jnp.interp(jnp.linspace(0, 1, plan.steps + 1), until / until[-1], jnp.linspace(0, 1, _TABLE))
    # Where the knots lie moves the result by less than its error.
    share = lax.stop_gradient(share).at[-1].set(1.0)
    knots = window[0] + (window[1] - window[0]) * share
    end, highest = _walk(equation, knots, state, top)
    p = distribution(end)
    populations = jnp.sum(p.reshape(levels, -1), axis=1)
    coarse, _ = _walk(*lax.stop_gradient((equation, knots[::2], state)), lambda y: jnp.zeros(()))
    estimate = jnp.max(jnp.abs(jnp.sum(distribution(coarse).reshape(levels, -1), axis=1) - populations)) / _RATIO
    beyond = lost + jnp.maximum(highest, top(state))
    valid = jnp.all(jnp.isfinite(populations)) & (beyond <= plan.error) & (estimate <= plan.error)
    shared = jnp.sum(p, axis=0)
    n_mean = jnp.stack(
        [
            jnp.sum(jnp.sum(shared, axis=tuple(a for a in range(modes.count) if a != m)) * jnp.arange(n))
            for m, n in enumerate(plan.cutoff)
        ]
    )
    populations, n_mean = (jnp.where(valid, x, jnp.nan) for x in (populations, n_mean))
    return SpinMotion(populations, n_mean, lax.stop_gradient(beyond), lax.stop_gradient(estimate), valid, plan)


def _mixture(modes: Modes, plan: Plan):
    """Kets (*cutoff, columns) of displaced Fock states in the basis i^n |n>, their weights, and what is left out."""
    each_kets, each_weights = [], []
    displaced = modes.alpha_real is not None or modes.alpha_imag is not None
    for m, (cutoff, terms) in enumerate(zip(plan.cutoff, plan.terms, strict=True)):
        if displaced:
            kets = displaced_states(modes.each("alpha_real")[m], modes.each("alpha_imag")[m], terms, cutoff)
            kets = kets * (-1j) ** np.arange(cutoff)[:, None]
        else:
            kets = jnp.eye(cutoff, terms, dtype=complex)
        ratio = modes.each("n_bar")[m] / (1 + modes.each("n_bar")[m])
        each_kets.append(kets)
        powers = jnp.cumprod(jnp.concatenate([jnp.ones(1), jnp.broadcast_to(ratio, (terms - 1,))]))
        each_weights.append((1 - ratio) * powers)
    kets, weights = each_kets[0], each_weights[0]
    if modes.count == 2:
        kets = jnp.einsum("ac,bd->abcd", *each_kets).reshape(*plan.cutoff, -1)
        weights = jnp.outer(*each_weights).ravel()
    kept = jnp.sum(jnp.abs(kets) ** 2, axis=tuple(range(modes.count)))
    total = jnp.sum(weights * kept)
    return kets, weights / total, 1 - total

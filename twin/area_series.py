"""Responses as series in the pulse areas: a few solves serve every cycle of a device.

Within one device all cycles share pulse shapes and noise, and differ in two areas only. A population after the pulses
is an *entire* function of each area theta, bounded on the real axis and growing like exp|Im theta| off it: it
oscillates no faster than cos theta. So its Chebyshev coefficients on [-theta_max, theta_max] fall like those of the
cosine, 2 J_j(theta_max), faster than any power once j exceeds theta_max. And it is even, because the sign of a pulse is
a choice of phase: half of the coefficients are missing, and the value at theta = 0 is that of free flight, which needs
no solve. rho_vs is odd in theta_1 and even in theta_2.

Where the pulses are apart, the response factors. Pulse 1 alone leads from the prepared level to populations and rho_vs,
pulse 2 alone maps populations to populations and rho_vs to itself, and populations do not see rho_vs any more:

    P(theta_1, theta_2) = M(theta_2) F P_1(theta_1),    F: free flight between the two solves, possibly backwards.

A light shift turns phases by an angle in theta^2: populations are still even and entire, of order two, and take more
nodes (`truncation`).

What overlap does to this is the residual, interpolated on a tensor grid. It is of the size of the overlap angle
(`twin.closed_form.overlap_bound`) and entire as well, so that it needs fewer nodes, or none.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from scipy.special import erfcinv, jv

from twin.area_table import AreaTable, even_series, judged, odd_series, points, times
from twin.batching import batch_shape, physical
from twin.dynamics import StaticGrid, evolve
from twin.levels import LevelSystem, side_by_side
from twin.pulses import Gaussian
from twin.trigonometry import cos_sin

# Shares of the requested error: of each series' truncation, and of the areas beyond the reach of a solve.
SOLVE_SHARE, _SERIES_SHARE, _REACH_SHARE = 0.25, 0.1, 0.05
# Coefficients below this are rounding.
_ROUNDING = 1e-15


class Nodes(NamedTuple):
    """Sizes of the series, static.

    Attributes:
        pulse: nodes in the area of each pulse, zero not counted.
        overlap: the same for each side of the residual; 0 where pulses are apart.
        cut: whether the run of pulse 1 alone is read out before that pulse has faded, and needs solves of its own.
    """

    pulse: int
    overlap: int
    cut: bool

    def lanes(self, starts: int) -> int:
        """Number of solves for one setting."""
        return self.pulse * (1 + self.cut + starts) + self.overlap**2


class AreaSeries(eqx.Module):
    """Lindblad dynamics by Chebyshev series in both areas.

    Args:
        grid: the method of the solves at the nodes; its error is the one aimed at by solves and series together.
        nodes: None lets `IonMemristor.prepared` choose them, and the steps, from the values at hand.
        steps: of a solve of one pulse, and of both.
    """

    grid: StaticGrid = eqx.field(default_factory=StaticGrid)
    nodes: Nodes | None = eqx.field(static=True, default=None)
    steps: tuple[int, int] | None = eqx.field(static=True, default=None)

    @property
    def finest_error(self) -> float:
        """The error for which nodes and steps are laid."""
        return float(self.grid.error) if self.grid.finest is None else self.grid.finest

    def solves(self, *, both: bool) -> StaticGrid:
        """The method of a solve of one pulse, or of both: three of them, and the series, share the error."""
        finest = None if self.grid.finest is None else SOLVE_SHARE * self.grid.finest
        steps = None if self.steps is None else self.steps[both]
        error = SOLVE_SHARE * self.grid.error
        return dataclasses.replace(self.grid, error=error, finest=finest, steps=steps, shared=True)


def reach(error: float) -> float:
    """Half-width of a solve in sigmas: the area of a Gaussian beyond it moves populations by less than the error."""
    # A missing area a on top of theta changes a population by at most a / 2; both wings together are theta erfc(...).
    return math.sqrt(2) * float(erfcinv(_REACH_SHARE * error / math.pi))


def truncation(theta_max: float, nodes: int, phase: float = 0.0) -> float:
    """Error of an even series through this many nodes and zero, for a function that fills [0, 1] like cos^2(theta/2).

    Coefficients left out, J_j(theta_max) for even j > 2 nodes, count twice: they are also folded back on the others.
    With a light shift that turns by `phase` rad at theta_max they are those of cos(theta) exp(i phase u^2), which grows
    off the real axis as fast as any population.
    """
    j = 2 * nodes + 2 + 2 * np.arange(60)
    if phase == 0:
        return math.inf if j[0] <= theta_max else 2 * float(np.sum(jv(j, theta_max)))
    size = _left_out(theta_max, phase)
    return math.inf if j[0] <= theta_max + 2 * phase else float(size[min(nodes + 1, len(size) - 1)])


@functools.cache
def _left_out(theta_max: float, phase: float) -> np.ndarray:
    """Sum of the coefficients of T_2n, T_2n+2, ... of cos(theta_max u) exp(i phase u^2), for each n."""
    count = 2 * math.ceil(theta_max + 2 * phase) + 128
    angle = np.pi * (np.arange(count) + 0.5) / count
    u = np.cos(angle)
    values = np.cos(theta_max * u) * np.exp(1j * phase * u**2)
    even = 2 * np.arange(count // 2)
    size = np.abs(np.cos(np.outer(even, angle)) @ values) * 2 / count
    return np.cumsum(np.where(size > _ROUNDING, size, 0.0)[::-1])[::-1]


def nodes_for(theta_max: float, error: float, phase: float = 0.0) -> int:
    """Fewest nodes of an even series whose truncation is below `error`."""
    return next(n for n in range(1, 1000) if truncation(theta_max, n, phase) <= error)


def choose_nodes(theta_1: float, theta_2: float, overlap: float, error: float, cut: bool, phase: float = 0.0) -> Nodes:
    """Sizes for the largest areas, overlap angle and light-shift phase (rad) that will occur."""
    own = _SERIES_SHARE * error
    # The residual is smaller than half of the overlap angle: 2.2 times and more where it is largest.
    size = min(1.0, 0.5 * overlap)
    rest = nodes_for(max(theta_1, theta_2), own / size, phase) if size > own else 0
    return Nodes(nodes_for(max(theta_1, theta_2), own, phase), rest, cut)


def light_phases(system: LevelSystem, timing: "Timing", areas: tuple) -> list[Float[Array, "..."]] | None:
    """Phase that the light shifts of each line turn in all, rad, at these areas; None without light shifts.

    int |Omega|^2 dt = theta^2 / (2 sqrt(pi) sigma) of a Gaussian.
    """
    if not system.light_shifts:
        return None
    phases = []
    for line, theta, sigma_s in zip(system.couplings, areas, (timing.sigma_1_s, timing.sigma_2_s), strict=True):
        of_line = [shift.spread_s for shift in system.light_shifts if set(shift.coupling) == set(line)]
        phases.append(sum(of_line, jnp.zeros(())) * theta**2 / (2 * math.sqrt(math.pi) * sigma_s))
    return phases


def starts_of(system: LevelSystem) -> tuple[str, ...]:
    """Levels whose population pulse 2 or a decay can move; the others stay, and need no solve."""
    moved = {*system.couplings[1], *(decay.source for decay in system.decays)}
    return tuple(level for level in system.levels if level in moved)


class Timing(eqx.Module):
    """Pulse shapes and windows of a device, s; the centre of pulse 1 is at time zero."""

    sigma_1_s: Float[Array, "..."] = physical()
    sigma_2_s: Float[Array, "..."] = physical()
    separation_s: Float[Array, "..."] = physical()
    lead_s: Float[Array, "..."] = physical()
    tail_s: Float[Array, "..."] = physical()

    @property
    def end_s(self) -> Float[Array, "..."]:
        """Read-out after both pulses."""
        return self.separation_s + self.tail_s

    def pulses(self, theta_1, theta_2) -> tuple[Gaussian, Gaussian]:
        """The waveforms of these areas."""
        return (
            Gaussian.from_area(theta_1, center_s=0.0, sigma_s=self.sigma_1_s),
            Gaussian.from_area(theta_2, center_s=self.separation_s, sigma_s=self.sigma_2_s),
        )

    def windows(self, sigmas: float) -> dict[str, tuple[Float[Array, "..."], Float[Array, "..."]]]:
        """(begin, end) of each kind of solve; beyond `sigmas` a pulse does nothing, and flight is free."""
        begin, faded = jnp.maximum(-self.lead_s, -sigmas * self.sigma_1_s), sigmas * self.sigma_1_s
        first = begin, jnp.minimum(self.end_s, faded)
        second = (
            jnp.maximum(-self.lead_s, self.separation_s - sigmas * self.sigma_2_s),
            jnp.minimum(self.end_s, self.separation_s + sigmas * self.sigma_2_s),
        )
        both = jnp.minimum(begin, second[0]), jnp.maximum(first[1], second[1])
        return {"first": first, "alone": (begin, jnp.minimum(self.tail_s, faded)), "second": second, "both": both}


# ---------------------------------------------------------------------------------------------------- free flight

_TAYLOR, _SQUARINGS = 12, 8


def _population_flight(system: LevelSystem, time_s: Float[Array, "..."]) -> Float[Array, "levels levels ..."]:
    """Map (to, from) of populations by the decays alone; the time may be negative.

    exp(R t) by a Taylor series of R t / 2^8 and eight squarings: exact to rounding up to |R t| of some hundred.
    """
    n = len(system.levels)
    step: list[list] = [[jnp.zeros_like(time_s) for _ in range(n)] for _ in range(n)]
    for decay in system.decays:
        a, b = system.index(decay.source), system.index(decay.target)
        move = decay.rate_per_s * time_s / 2**_SQUARINGS
        step[b][a] = step[b][a] + move
        step[a][a] = step[a][a] - move
    matrix = jnp.stack([jnp.stack(row) for row in step])
    identity = jnp.eye(n).reshape((n, n) + (1,) * time_s.ndim)
    horner = lambda flight, k: (identity + _compose(matrix, flight) / k, None)
    flight, _ = lax.scan(horner, identity + jnp.zeros_like(matrix), jnp.arange(_TAYLOR, 0, -1.0))
    return lax.scan(lambda flight, _: (_compose(flight, flight), None), flight, None, length=_SQUARINGS)[0]


def _compose(a: Float[Array, "to via ..."], b: Float[Array, "via columns ..."]) -> Float[Array, "to columns ..."]:
    return jnp.sum(a[:, :, None] * b[None], axis=1)


def _coherence_flight(system: LevelSystem, time_s: Float[Array, "..."]) -> Float[Array, "2 ..."]:
    """Complex factor of rho_vs by energies, decays and dephasing alone."""
    v, s = 0, 1
    damping = jnp.zeros_like(time_s)
    for decay in system.decays:
        if system.index(decay.source) in (v, s):
            damping = damping + 0.5 * decay.rate_per_s
    for d in system.dephasings:
        damping = damping + (d.weights[v] - d.weights[s]) ** 2 * d.rate_per_s
    angle = (system.energies_rad_s[s] - system.energies_rad_s[v]) * time_s
    return jnp.exp(-damping * time_s) * jnp.stack(cos_sin(angle))


def _flights(system: LevelSystem, times_s: list, shape: tuple[int, ...]) -> list[tuple[Array, Array]]:
    """Map of populations and factor of rho_vs for each time; all in one program, which compiles faster than each."""
    time_s = jnp.stack([jnp.broadcast_to(t, shape) for t in times_s])
    maps, factors = _population_flight(system, time_s), _coherence_flight(system, time_s)
    return [(maps[:, :, k], factors[:, k]) for k in range(len(times_s))]


# ---------------------------------------------------------------------------------------------------- the solves


def tabulate(
    method: AreaSeries,
    system: LevelSystem,
    timing: Timing,
    largest: tuple[Float[Array, "..."], Float[Array, "..."]],
    start: str,
) -> AreaTable:
    """Solves the nodes of a device, all as lanes of one batch, and makes their series.

    Args:
        method: with its nodes and steps decided.
        system: the level graph, pulse 1 on its first coupling (v-s), pulse 2 on its second (s-m).
        timing: widths and times.
        largest: the largest areas that will be asked for, rad.
        start: the prepared level, one that does not decay.

    Returns:
        An `AreaTable`; its batch axes are those of all arguments together.
    """
    nodes = method.nodes
    if nodes is None:
        raise ValueError("`AreaSeries` needs its nodes; `prepared` or `planned` chooses them.")
    shape = batch_shape(system, timing, largest)
    # Where the nodes lie is a choice of ours, without derivative. A pulse that is never driven gets a token range.
    theta_1, theta_2 = (jnp.broadcast_to(jnp.maximum(jnp.abs(lax.stop_gradient(t)), 1e-6), shape) for t in largest)
    windows = timing.windows(reach(float(method.finest_error)))
    rest = nodes.overlap
    u, u_rest = points(nodes.pulse), points(rest)
    starts = starts_of(system)
    solve = _Solver(method, system, timing, windows, (theta_1, theta_2))
    rows = [(0, "first", start)] + [(0, "alone", start)] * nodes.cut + [(1, "second", level) for level in starts]
    states, errors, valid = solve.one_pulse(u, rows)
    levels = len(system.levels)

    def populations(flight, state) -> Array:
        """(levels, lanes, *S) carried on."""
        return _compose(flight[0], state[:levels])

    def coherence(flight, state) -> Array:
        return times(flight[1][:, None], state[levels : levels + 2])

    which = "alone" if nodes.cut else "first"
    times_s = [
        windows["second"][0] - windows["first"][1],
        timing.end_s - windows["second"][1],
        timing.tail_s - windows[which][1],
        timing.end_s - windows["second"][0],
        timing.end_s - windows["both"][1],
    ]
    to_second, to_end, to_own_end, through, to_read_out = _flights(system, times_s, shape)
    own = states[1] if nodes.cut else states[0]
    begin = 1 + nodes.cut
    columns = dict(zip(starts, states[begin : begin + len(starts)], strict=True))
    # Without a pulse the prepared level stays, and populations only decay.
    rest_state = jnp.zeros((levels, *shape)).at[system.index(start)].set(1.0)
    first, alone = (_lanes_first(populations(*pair)) for pair in ((to_second, states[0]), (to_own_end, own)))
    # Shape (nodes, to, from, *S); the flight serves levels that no solve was made for.
    second = jnp.broadcast_to(through[0], (nodes.pulse, *through[0].shape))
    for level, state in columns.items():
        second = second.at[:, :, system.index(level)].set(_lanes_first(populations(to_end, state)))
    factor = _lanes_first(coherence(to_end, solve.carried_coherence(u)))
    table = AreaTable(
        theta_1=theta_1,
        theta_2=theta_2,
        alone=even_series(alone, rest_state),
        alone_coherence=odd_series(_lanes_first(coherence(to_own_end, own))),
        first=even_series(first, rest_state),
        first_coherence=odd_series(_lanes_first(coherence(to_second, states[0]))),
        second=even_series(second, through[0]),
        second_coherence=even_series(factor, through[1]),
        residual=jnp.zeros((0, 0, levels, *shape)),
        residual_coherence=jnp.zeros((0, 0, 2, *shape)),
        valid=valid,
        error_alone=errors[begin - 1],
        error_both=errors[0] + sum(errors[begin : begin + len(starts)]),
    )
    if rest:
        theta = solve.areas(np.repeat(u_rest, rest), 0), solve.areas(np.tile(u_rest, rest), 1)
        both, error, both_valid = solve.two_pulses(theta, start)
        solved = populations(to_read_out, both), coherence(to_read_out, both)
        # What is left of the solves, shape (nodes of pulse 1, nodes of pulse 2, levels or 2, *S).
        left = [
            _lanes_first(a - b).reshape((rest, rest, len(a), *shape))
            for a, b in zip(solved, table.after_both(*theta), strict=True)
        ]
        by_second = [even_series(jnp.swapaxes(x, 0, 1), jnp.zeros_like(x[0])) for x in left]
        residual = even_series(jnp.swapaxes(by_second[0], 0, 1), jnp.zeros_like(by_second[0][:, 0]))
        table = dataclasses.replace(
            table,
            residual=residual,
            residual_coherence=odd_series(jnp.swapaxes(by_second[1], 0, 1)),
            error_both=error,
            valid=table.valid & both_valid,
        )
    phases = light_phases(system, timing, (theta_1, theta_2))
    return judged(table, None if phases is None else tuple(lax.stop_gradient(phase) for phase in phases))


def _lanes_first(values: Float[Array, "components lanes ..."]) -> Float[Array, "lanes components ..."]:
    return jnp.swapaxes(values, 0, 1)


class _Solver(NamedTuple):
    """Makes the solves of a device, all nodes of a kind as lanes of one batch, shape (lanes, *S)."""

    method: AreaSeries
    system: LevelSystem
    timing: Timing
    windows: dict
    largest: tuple[Float[Array, "..."], Float[Array, "..."]]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.largest[0].shape

    def areas(self, u: np.ndarray, pulse: int) -> Float[Array, "lanes ..."]:
        return jnp.asarray(u).reshape((-1,) + (1,) * len(self.shape)) * self.largest[pulse]

    def one_pulse(self, u: np.ndarray, rows: list[tuple[int, str, str]]):
        """Solves of one pulse, a row for each (pulse, window, prepared level), all nodes of a row in one grid.

        Which two levels a pulse drives is no difference to its solve: both pulses are lanes of one program.

        Returns:
            Components of each row (populations in the order of the graph, then the driven coherence), the error of each
            row, and validity.
        """
        graphs, orders = zip(*(self.system.alone(k) for k in (0, 1)), strict=True)
        n, of_row = len(self.system.levels), [pulse for pulse, _, _ in rows]
        prepared = np.zeros((n, n, 1, len(rows)))
        for row, (pulse, _, level) in enumerate(rows):
            place = orders[pulse].index(self.system.index(level))
            prepared[place, place, 0, row] = 1.0
        timing, stack = self.timing, lambda row: jnp.stack([jnp.broadcast_to(v, self.shape) for v in row])
        centers, sigmas = (0.0, timing.separation_s), (timing.sigma_1_s, timing.sigma_2_s)
        pulse = Gaussian.from_area(
            jnp.stack([self.areas(u, k) for k in of_row], axis=1),
            center_s=stack([centers[k] for k in of_row]),
            sigma_s=stack([sigmas[k] for k in of_row]),
        )
        windows = [self.windows[window] for _, window, _ in rows]
        solution = evolve(
            side_by_side([graphs[k] for k in of_row], self.shape),
            (pulse,),
            start=prepared.reshape((*prepared.shape, *(1,) * len(self.shape))),
            window_s=tuple(stack([window[end] for window in windows]) for end in (0, 1)),
            method=self.method.solves(both=False),
        )
        states = [
            jnp.concatenate([solution.state[0, np.argsort(orders[k]), :, row], solution.state[0, n : n + 2, :, row]])
            for row, k in enumerate(of_row)
        ]
        return states, list(jnp.max(solution.error_estimate, axis=0)), jnp.all(solution.valid, axis=(0, 1))

    def carried_coherence(self, u: np.ndarray):
        """Components at the end of pulse 2 alone of a rho_vs that was 1 before it; NaN if invalid.

        Of its own, because populations do not need it: where nobody asks for a coherence, it is not solved.
        """
        n = len(self.system.levels)
        rho = np.zeros((n, n))
        rho[0, 1] = rho[1, 0] = 1.0
        system = dataclasses.replace(self.system, couplings=self.system.couplings[1:])
        solution = evolve(
            system,
            self.timing.pulses(0.0, self.areas(u, 1))[1:],
            start=rho,
            window_s=self.windows["second"],
            method=self.method.solves(both=False),
        )
        return solution.state[0]

    def two_pulses(self, theta: tuple[Float[Array, "lanes ..."], Float[Array, "lanes ..."]], start: str):
        """Components after both pulses, the error and validity."""
        solution = evolve(
            self.system,
            self.timing.pulses(*theta),
            start=start,
            window_s=self.windows["both"],
            method=self.method.solves(both=True),
        )
        return solution.state[0], jnp.max(solution.error_estimate, axis=0), jnp.all(solution.valid, axis=0)

"""Samples that steer a level graph: each coupling has a line, each sample is free within what the hardware allows.

The optimizer moves raw numbers, `Hardware.allowed` makes samples of them that obey every limit, and `twin.slices`
carries the states, with derivatives through all of it. Limits make local minima, and a search may end in one: hence
several random starts, the best of which counts.
"""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from calibration import direct
from calibration._minimize import Progress, Stage, minimize
from calibration.goals import AbstractGoal, Play, Weighted
from calibration.hardware import Hardware
from twin.levels import LevelSystem
from twin.master_equation import pack_density
from twin.slices import Slices, Taylor, largest_action, propagate, taylor
from twin.waveform import Waveform


class Tuning(eqx.Module):
    """Lasers whose detunings are free too.

    Args:
        slopes: dE_j / d delta_k of each laser k and level j, shape (lasers, levels); `Scheme.slopes` of an ion.
        largest_hz: the offsets stay within plus and minus this, Hz.
    """

    slopes: tuple[tuple[float, ...], ...] = eqx.field(static=True)
    largest_hz: float = eqx.field(static=True, converter=float)

    @property
    def largest_shift_rad_s(self) -> float:
        """Largest change of the distance of two levels, rad/s."""
        return 2 * np.pi * self.largest_hz * float(np.sum(np.ptp(np.asarray(self.slopes), axis=1)))

    def offsets_hz(self, raw: Float[Array, " lasers"]) -> Float[Array, " lasers"]:
        """Offsets of unconstrained numbers."""
        return self.largest_hz * raw / jnp.sqrt(1 + raw**2)

    def tuned(self, system: LevelSystem, offsets_hz: Float[Array, " lasers"]) -> LevelSystem:
        """The graph with its lasers moved."""
        shift = 2 * jnp.pi * jnp.asarray(self.slopes).T @ offsets_hz
        return dataclasses.replace(system, energies_rad_s=system.energies_rad_s + shift)


@dataclasses.dataclass(frozen=True)
class Steered:
    """What an optimization found.

    Attributes:
        status: "converged" or "not converged: WHY".
        seen: value of each goal, in its order and unit, as the optimizer saw it at its best point.
        recomputed: the same of the quantized samples, by dense matrix exponentials (`calibration.direct`).
        waveform: the samples, quantized.
        offsets_hz: laser offsets that go with them, shape (lasers,); None where they were not free.
        losses: weighted sum of the goals at the end of every start, shape (starts,).
        history: best weighted sum after each chunk of iterations.
        iterations: of all starts together, each one evaluation with its gradient.
    """

    status: str
    seen: tuple[float, ...]
    recomputed: tuple[float, ...]
    waveform: Waveform
    offsets_hz: Float[np.ndarray, " lasers"] | None
    losses: Float[np.ndarray, " starts"]
    history: list[float]
    iterations: int


def steer(
    system: LevelSystem,
    hardware: Hardware,
    goal: AbstractGoal | Sequence[tuple[AbstractGoal, float]],
    samples: int,
    *,
    start: Waveform | None = None,
    starts: int = 8,
    seed: int = 0,
    tuning: Tuning | None = None,
    oversampling: int = 1,
    iterations: int = 500,
    tolerance: float = 1e-10,
    error: float = 1e-12,
    on_progress: Progress | None = None,
) -> Steered:
    """Finds samples that serve a goal, or a weighted sum of goals, best.

    Main arguments:
        system: the graph, of known numbers without a batch.
        hardware: one line for each coupling, in the order of the graph.
        goal: one goal, or pairs (goal, weight); weights in one over the goal's unit.
        samples: of the waveform, zero ends included.

    Other arguments:
        start: a waveform where one more search begins.
        starts: number of random starts. seed: of their draws.
        tuning: lasers whose detunings are free too.
        oversampling: slices a sample; more than 1 matters only behind a modulator.
        iterations: most iterations of L-BFGS a start.
        tolerance: of the loss, below which a start is done.
        error: of the state, a slice.
        on_progress: called as (stage, iterations done, most iterations, best value so far).

    Raises:
        ValueError: another number of lines than couplings, a batch, no start, or a waveform too short for the limits.
    """
    lines = hardware.channels if hardware.mixing_real is None else len(hardware.mixing_real)
    if lines != len(system.couplings):
        raise ValueError(
            f"the graph has {len(system.couplings)} couplings, but the hardware {lines} lines; give one to each."
        )
    if system.energies_rad_s.ndim != 1:
        raise ValueError(
            f"`energies_rad_s` must have shape (levels,), but has {system.energies_rad_s.shape}; steer one graph at "
            "a time."
        )
    if starts < 1 and start is None:
        raise ValueError(f"`starts` must be at least 1 without a `start`, but is {starts}; a search begins somewhere.")
    pairs = [(goal, 1.0)] if isinstance(goal, AbstractGoal) else goal
    terms = tuple(Weighted(one, weight) for one, weight in pairs)
    problem = posed(system, hardware, terms, samples, tuning, oversampling, error)
    points = problem.starting_points(start, starts, seed)
    history: list[float] = []

    def report(done, losses):
        history.append(float(np.nanmin(losses)))
        if on_progress is not None:
            on_progress("steer", done, iterations, history[-1])

    found = minimize(loss, problem, points, Stage("lbfgs", iterations, tolerance), on_progress=report)
    losses = np.asarray(found.values)
    if not np.any(np.isfinite(losses)):
        raise ValueError("the goals are finite at no starting point; start from other samples.")
    best = int(np.nanargmin(losses))
    point = found.points[best]
    offsets = problem.offsets_hz(point)
    waveform = hardware.quantized(problem.waveform(point))
    return Steered(
        status="converged" if found.converged[best] else "not converged: the search still moved at its last iteration",
        seen=tuple(float(v) for v in _values(problem, point)),
        recomputed=judged(
            system, hardware, [term.goal for term in terms], waveform, tuning=tuning, offsets_hz=offsets,
            oversampling=oversampling,
        ),
        waveform=waveform,
        offsets_hz=None if offsets is None else np.asarray(offsets),
        losses=losses,
        history=history,
        iterations=int(np.sum(found.iterations)),
    )  # fmt: skip


def judged(
    system: LevelSystem,
    hardware: Hardware,
    goals: Sequence[AbstractGoal],
    waveform: Waveform,
    *,
    tuning: Tuning | None = None,
    offsets_hz: Float[Array, " lasers"] | None = None,
    oversampling: int = 1,
) -> tuple[float, ...]:
    """Value of each goal for samples from anywhere, by dense matrix exponentials.

    Args: as of `steer`; `offsets_hz` belong to the lasers of `tuning`.
    """
    graph = _tuned(system, tuning, offsets_hz)
    lit = hardware.played(waveform, oversampling)
    drives = np.asarray(lit.real_rad_s) + 1j * np.asarray(lit.imag_rad_s)

    def states(start, *, last=False):
        path = direct.carried(graph, drives, float(lit.sample_s), start)
        packed = np.stack([pack_density(rho) for rho in (path[-1:] if last else path)])
        return jnp.asarray(packed[0] if last else packed)

    return tuple(float(goal.value(Play(system.levels, hardware, waveform, states))) for goal in goals)


class Problem(eqx.Module):
    """All that the loss needs; limits, lengths and polynomials are static."""

    system: LevelSystem
    hardware: Hardware
    terms: tuple[Weighted, ...]
    tuning: Tuning | None
    samples: int = eqx.field(static=True)
    oversampling: int = eqx.field(static=True)
    rule: Taylor = eqx.field(static=True)
    pure_rule: Taylor = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Parts, raw samples and channels of the numbers that make the waveform."""
        parts = 1 if self.hardware.real_only else 2
        return parts, self.hardware.raw_samples(self.samples), self.hardware.channels

    def starting_points(self, start: Waveform | None, count: int, seed: int) -> Float[np.ndarray, "starts numbers"]:
        """Random raw numbers about a level of each channel, after those of the given waveform."""
        rng, lasers = np.random.default_rng(seed), 0 if self.tuning is None else len(self.tuning.slopes)
        rows = []
        if start is not None:
            raw = np.stack([part for part in self.hardware.unconstrained(start) if part is not None])
            rows.append(np.concatenate([raw.ravel(), np.zeros(lasers)]))
        parts, _, channels = self.shape
        for _ in range(count):
            level = rng.normal(size=(parts, 1, channels))
            raw = level + 0.5 * rng.normal(size=self.shape)
            rows.append(np.concatenate([raw.ravel(), 0.1 * rng.normal(size=lasers)]))
        return np.stack(rows)

    def waveform(self, point: Float[Array, " numbers"]) -> Waveform:
        """The allowed samples of a point."""
        parts = point[: int(np.prod(self.shape))].reshape(self.shape)
        return self.hardware.allowed(parts[0], None if self.hardware.real_only else parts[1])

    def offsets_hz(self, point: Float[Array, " numbers"]) -> Float[Array, " lasers"] | None:
        """The laser offsets of a point."""
        return None if self.tuning is None else self.tuning.offsets_hz(point[int(np.prod(self.shape)) :])

    def play(self, point: Float[Array, " numbers"]) -> Play:
        """The performance of a point by the engine of slices."""
        system = _tuned(self.system, self.tuning, self.offsets_hz(point))
        waveform = self.waveform(point)
        lit = self.hardware.played(waveform, self.oversampling)
        imag = None if _real(self.hardware) else lit.imag_rad_s

        def states(start, *, last=False):
            count = start.shape[-1]
            lengths = jnp.broadcast_to(lit.sample_s, (len(lit.real_rad_s), count))
            ket = _ket(start[..., 0]) if system.closed and count == 1 else None
            if ket is None:
                drives = (None if part is None else part[..., None] for part in (lit.real_rad_s, imag))
                return propagate(system, Slices(*drives, lengths), start, self.rule, saved=not last).state
            slices = Slices(lit.real_rad_s, imag, lengths[:, 0])
            state = propagate(system, slices, ket, self.pure_rule, saved=not last).state
            return _density_of_kets(state, len(ket))[..., None]

        return Play(system.levels, self.hardware, waveform, states)


def posed(
    system: LevelSystem,
    hardware: Hardware,
    terms: tuple[Weighted, ...],
    samples: int,
    tuning: Tuning | None = None,
    oversampling: int = 1,
    error: float = 1e-12,
) -> Problem:
    """The problem of `steer`, whose arguments these are, for those who run the search themselves."""
    shares = np.eye(hardware.channels)
    if hardware.mixing_real is not None or hardware.mixing_imag is not None:
        parts = [np.abs(np.asarray(p)) for p in (hardware.mixing_real, hardware.mixing_imag) if p is not None]
        shares = sum(parts) + (shares if hardware.mixing_real is None else 0)
    # A modulator's response has unit sum and no negative weight: it does not amplify.
    largest = float(np.linalg.norm(shares @ np.asarray(hardware.largest_rad_s)))
    largest += 0.0 if tuning is None else tuning.largest_shift_rad_s
    rules = (
        taylor(largest_action(system, largest, hardware.sample_s / oversampling, pure=pure), error)
        for pure in (False, True)
    )
    return Problem(system, hardware, terms, tuning, samples, oversampling, *rules)


def _tuned(system: LevelSystem, tuning: Tuning | None, offsets_hz: Float[Array, " lasers"] | None) -> LevelSystem:
    return system if tuning is None or offsets_hz is None else tuning.tuned(system, offsets_hz)


def _real(hardware: Hardware) -> bool:
    return hardware.real_only and hardware.mixing_imag is None


def _ket(rho: np.ndarray) -> np.ndarray | None:
    """The ket of a pure state, with some phase; None where it is mixed."""
    weights, kets = np.linalg.eigh(rho)
    return kets[:, -1] if abs(weights[-1] - 1) < 1e-12 else None


def _density_of_kets(state: Float[Array, "... components"], n: int) -> Float[Array, "..."]:
    """Real components of |psi><psi|; the axis of components is the last one of `state`."""
    re, im = state[..., :n], state[..., n:]
    first, second = np.triu_indices(n, 1)
    real = re[..., first] * re[..., second] + im[..., first] * im[..., second]
    imag = im[..., first] * re[..., second] - re[..., first] * im[..., second]
    return jnp.concatenate([re**2 + im**2, jnp.stack([real, imag], axis=-1).reshape(*real.shape[:-1], -1)], axis=-1)


def _goal_values(problem: Problem, point) -> list[Float[Array, ""]]:
    play = problem.play(point)
    return [term.goal.value(play) for term in problem.terms]


_values = eqx.filter_jit(_goal_values)


def loss(point: Float[Array, " numbers"], problem: Problem, each) -> Float[Array, ""]:
    """The weighted sum of the goals at a point."""
    del each
    values = _goal_values(problem, point)
    return sum((term.weight * v for term, v in zip(problem.terms, values, strict=True)), jnp.zeros(()))

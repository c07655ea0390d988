"""Calibration: the parameters of a device that make recorded tables most probable.

Many starts in the prior box, each to the bottom of its basin, the best basins polished. Two optimizers end in one
result: Adam, then L-BFGS (Optax), which serve any likelihood; and Levenberg-Marquardt (Optimistix), which is faster and
serves those that are sums of squares. Fisher information at the optimum gives errors, verdicts and sentences.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from calibration import identifiability, least_squares, uncertainty
from calibration._minimize import Minimum, Progress, Stage, minimize
from calibration.data import LoopTable
from calibration.identifiability import Degeneracy
from calibration.likelihood import Prediction
from calibration.observations import m_estimation
from calibration.parameters import FreeParameters, with_ion
from calibration.posing import Posed
from calibration.problem import Problem, informed
from calibration.register import posed as pose
from calibration.scan_tables import ScanTable
from calibration.uncertainty import Estimate
from twin.emulator import EmulatedSeries
from twin.loop import AbstractMemristor
from twin.memristor import coarsened

OPTIMIZERS = ("adam+lbfgs", "levenberg_marquardt")
# Solver errors of the first two stages, where the dynamics are integrated at each step. A step more or less in a grid
# moves the log-likelihood by some sqrt(data) of its error over a count's: Adam does not mind, a line search would.
_EXPLORATION_ERROR, _DESCENT_ERROR = 1e-4, 1e-6
# Basins closer than this in log-likelihood (nats) and parameters (shares of the box) are one.
_SAME_VALUE, _SAME_PLACE = 0.1, 0.02
_POLISHED = 3
# Losses are log-likelihoods: 1e-5 nats is a 200th of a standard error; basins are told apart by a tenth of a nat.
_EXPLORATION = Stage("adam", iterations=25, tolerance=1e-2, learning_rate=0.3)
_DESCENT = Stage("lbfgs", iterations=60, tolerance=1e-2)
_POLISH = _DESCENT._replace(tolerance=1e-5)
# Rounds of Levenberg-Marquardt that the best few take after the first.
_LM_ROUNDS = 4
_EDGE = 1e-9
# An emulated device whose optimum lies further off than this, in standard errors, is said to.
_LARGEST_SHIFT = 0.05


@dataclass(frozen=True)
class Basin:
    """A local optimum, how many starts found it, and which start came lowest."""

    log_likelihood: float
    starts: int
    best_start: int
    values: dict[str, float]


@dataclass(frozen=True)
class FitResult:
    """What a calibration found; `status` is "converged" or "not converged: WHY".

    Attributes:
        device: the calibrated device; of the first table where tables have parameters of their own.
        parameters: estimates by name. covariance: in the order of the names.
        predictions: model probabilities of every row at the optimum, by table (an array for a scan); empty if there is
            no optimum.
        basins: ranked, best first. history: per stage, best loss after each chunk of iterations.
        seconds: wall time of each stage.
        problem: what was asked, for profiles and samples. values: the optimum, in the order of its names.
        emulation: of an emulated device: its error of populations, the points solved, and the largest shift of an
            estimate against the device's own method, in standard errors; empty otherwise.
        degeneracies: groups of parameters that the data leave open.
        areas: value and standard error of the area scale of each pulse whose width and Rabi scale are both free.
    """

    status: str
    device: AbstractMemristor
    parameters: dict[str, Estimate]
    covariance: np.ndarray
    log_likelihood: float
    chi2_per_dof: float
    n_data: int
    n_free: int
    notes: list[str]
    basins: list[Basin]
    predictions: dict[str, Prediction | Array]
    problem: Problem
    values: np.ndarray
    history: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    emulation: dict[str, float] = field(default_factory=dict)
    degeneracies: list[Degeneracy] = field(default_factory=list)
    areas: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def converged(self) -> bool:
        """Whether the search ended at an optimum."""
        return self.status == "converged"

    @property
    def prediction(self) -> Prediction | None:
        """Model probabilities of the first table of loops; None if there is no optimum."""
        return next((p for p in self.predictions.values() if isinstance(p, Prediction)), None)

    @property
    def correlation(self) -> np.ndarray:
        """Correlation matrix in the order of `parameters`."""
        return uncertainty.correlation(self.covariance)


def fit(
    device: AbstractMemristor,
    table: LoopTable | Mapping[str, LoopTable | ScanTable],
    free: Mapping[str, tuple[float, float]],
    *,
    optimizer: Literal["adam+lbfgs", "levenberg_marquardt"] = "adam+lbfgs",
    starts: int = 16,
    sampling: Literal["random", "sobol"] = "random",
    per_table: Sequence[str] = (),
    per_ion: Sequence[str] = (),
    noise: str = "binomial",
    seed: int = 0,
    on_progress: Progress | None = None,
) -> FitResult:
    """Calibrates a device to recorded tables.

    Main arguments:
        device: supplies the scheme, the method, and every parameter that is not free.
        table: recorded loops, or several tables by name, auxiliary scans among them.
        free: prior box (low, high) of each free parameter, by name.

    Other arguments:
        optimizer: one of `OPTIMIZERS`.
        starts: number of starts. sampling: drawn uniformly from the box, or spread over it (Sobol).
        per_table: free parameters of which each table has its own, NAME@TABLE in the result.
        per_ion: of a register (`calibration.register`), those of which each ion has its own, NAME@ION.
        noise: how counts scatter: "binomial", "beta_binomial", "outliers" or "student_t"
            (`calibration.observations.Noise`).
        seed: of the starts.
        on_progress: called as (stage, iterations done, most iterations, best log-likelihood so far).

    Returns:
        A `FitResult`; a search that fails says why in `status` and does not raise.

    Raises:
        ValueError: an unknown parameter name or option, an empty box, an optimizer that cannot serve the noise.

    Example:
        >>> device = IonMemristor(memory=MovingAverage(10.0))
        >>> result = fit(device, read_table("loops.csv"), {"rabi_scale_1": (0.7, 1.3)})
    """
    began = time.perf_counter()
    posed = pose(device, table, free, per_table=per_table, per_ion=per_ion, noise=noise)
    return solve(posed, optimizer=optimizer, starts=starts, sampling=sampling, seed=seed, on_progress=on_progress,
                 seconds={"prepare": time.perf_counter() - began})  # fmt: skip


def solve(
    posed: Posed,
    *,
    optimizer: str = "adam+lbfgs",
    starts: int = 16,
    sampling: str = "random",
    seed: int = 0,
    on_progress: Progress | None = None,
    seconds: dict[str, float] | None = None,
) -> FitResult:
    """Finds the optimum of a problem that is posed; arguments as for `fit`."""
    problem = posed.problem
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"`optimizer` must be one of {OPTIMIZERS}, but is {optimizer!r}.")
    if optimizer == "levenberg_marquardt" and (why := least_squares.serves(problem)):
        raise ValueError(why)
    free = problem.free
    drawn = free.spread(seed, starts) if sampling == "sobol" else free.draw(jax.random.key(seed), starts)
    search = _Search(problem, on_progress, {} if seconds is None else seconds)
    points = free.unbounded(drawn)
    # The check against the device's own method compiles while the first stage is compiled and used.
    ahead = lambda: _checked(posed.reference, free.middle)
    if optimizer == "levenberg_marquardt":
        settled, polished = search.levenberg_marquardt(points)
    else:
        settled, polished = search.adam_lbfgs(points, ahead)
    values = np.asarray(settled.values)
    if not np.any(np.isfinite(values)):
        why = ("the likelihood is not finite from any start; is there a count where the model allows none? "
               "Free the readout errors or widen the boxes.")  # fmt: skip
        return _failed(posed, why, search)
    best = np.where(np.isnan(polished.values), np.inf, np.asarray(polished.values))
    winner = int(np.argmin(best))
    began = time.perf_counter()
    optimum = free.bounded(polished.points[winner])
    result = _conclude(posed, optimum, _rank(free, settled), starts)
    search.seconds["uncertainty"] = time.perf_counter() - began
    status = "converged"
    if not bool(polished.converged[winner]):
        status = f"not converged: the polish still moved after {int(polished.iterations[winner])} iterations"
    return dataclasses.replace(result, status=status, history=search.history, seconds=search.seconds)


class _Search:
    """The stages of a search, with their progress, history and wall time."""

    def __init__(self, problem: Problem, on_progress: Progress | None, seconds: dict[str, float]):
        self.problem, self.on_progress = problem, on_progress
        self.history: dict[str, list[float]] = {}
        self.seconds = seconds

    def adam_lbfgs(self, points, ahead) -> tuple[Minimum, Minimum]:
        """Where all starts settled, and the best of them polished."""
        rough, coarse = (
            self.problem.with_devices(lambda device, _, e=error: with_ion(device, lambda ion: coarsened(ion, e)))
            for error in (_EXPLORATION_ERROR, _DESCENT_ERROR)
        )
        explored = self._stage("search", rough, points, _EXPLORATION, meanwhile=ahead)
        settled = self._stage("descend", coarse, explored.points, _DESCENT)
        if not np.any(np.isfinite(settled.values)):
            return settled, settled
        return settled, self._stage("polish", self.problem, settled.points, _POLISH, active=self._best(settled))

    def levenberg_marquardt(self, points) -> tuple[Minimum, Minimum]:
        """The same by Levenberg-Marquardt."""
        settled = self._descend("descend", points, 1)
        if not np.any(np.isfinite(settled.values)):
            return settled, settled
        active = np.flatnonzero(self._best(settled))
        polished = self._descend("polish", settled.points[active], _LM_ROUNDS)
        return settled, polished

    def _best(self, settled: Minimum) -> np.ndarray:
        best = np.zeros(len(settled.values), bool)
        ranked = _rank(self.problem.free, settled)
        best[[basin.best_start for basin in ranked[:_POLISHED]]] = True
        return best

    def _told(self, name: str, done: int, most: int, values) -> None:
        best = -float(np.min(np.where(np.isnan(values), np.inf, values)))
        self.history[name].append(best)
        if self.on_progress is not None:
            self.on_progress(name, done, most, best)

    def _begin(self, name: str, most: int) -> float:
        self.history[name] = []
        if self.on_progress is not None:
            self.on_progress(name, 0, most, -np.inf)
        return time.perf_counter()

    def _descend(self, name: str, points, rounds: int) -> Minimum:
        steps = rounds * least_squares.STEPS
        began = self._begin(name, steps)
        free = self.problem.free
        found = least_squares.descend(self.problem, free.bounded(points), rounds)
        # An edge of the box lies at infinity in unbounded coordinates.
        share = jnp.clip((found.values - free.low) / free.width, _EDGE, 1 - _EDGE)
        places = free.unbounded(free.low + share * free.width)
        losses = np.asarray(-found.log_likelihood)
        self._told(name, steps, steps, losses)
        self.seconds[name] = time.perf_counter() - began
        return Minimum(places, jnp.asarray(losses), found.converged, found.steps)

    def _stage(self, name: str, problem: Problem, points, stage: Stage, **options) -> Minimum:
        began = self._begin(name, stage.iterations)
        # L-BFGS walks in coordinates whitened by the Fisher information, where every basin is nearly round.
        scales = np.broadcast_to(np.eye(points.shape[1]), (len(points), points.shape[1], points.shape[1]))
        if stage.optimizer == "lbfgs":
            scales = np.asarray(_scales(problem, points))
        told = lambda done, values: self._told(name, done, stage.iterations, values)
        each = (points, scales)
        found = minimize(_loss, problem, np.zeros(points.shape), stage, each=each, on_progress=told, **options)
        self.seconds[name] = time.perf_counter() - began
        return found._replace(points=points + jnp.asarray(np.einsum("sij,sj->si", scales, found.points)))


def _loss(z: Float[Array, " parameters"], problem: Problem, each) -> Float[Array, ""]:
    origin, scale = each
    return -problem.log_likelihood(problem.free.bounded(origin + scale @ z))


@eqx.filter_jit
def _scales(problem: Problem, points: Float[Array, "starts n"]) -> Float[Array, "starts n n"]:
    """Inverse square root of the information in unbounded coordinates; the uniform prior adds 3 / pi^2 to it."""
    problem = least_squares.forward(problem)

    def scale(u):
        values, slopes = jax.jvp(problem.free.bounded, (u,), (jnp.ones_like(u),))
        scaled = slopes[:, None] * problem.information(values) * slopes
        eigenvalues, vectors = jnp.linalg.eigh(jnp.nan_to_num(scaled))
        return (vectors / jnp.sqrt(jnp.maximum(eigenvalues, 0.0) + 3 / np.pi**2)) @ vectors.T

    return lax.map(scale, points)


@eqx.filter_jit
def _inliers(problem: Problem, values: Float[Array, " parameters"]) -> Float[Array, " cells"]:
    return problem.inliers(values)


@eqx.filter_jit
def _checked(reference: Problem, values: Float[Array, " parameters"]):
    """What the devices' own method says: predictions of each table, log-likelihood, probabilities of the cells."""
    predictions = {
        part.name: part.data.prediction(reference.device(part, values), reference.own_window(part))
        for part in reference.parts
    }
    return predictions, reference.log_likelihood(values), reference.cells(values)[0]


def _rank(free: FreeParameters, found: Minimum) -> list[Basin]:
    places = np.asarray(free.bounded(found.points))
    values = np.asarray(found.values)
    groups: list[list[int]] = []
    for k in np.argsort(np.where(np.isnan(values), np.inf, values)):
        if np.isnan(values[k]):
            continue
        for group in groups:
            apart = np.abs(places[k] - places[group[0]]) / np.asarray(free.width)
            if values[k] - values[group[0]] < _SAME_VALUE and np.all(apart < _SAME_PLACE):
                group.append(int(k))
                break
        else:
            groups.append([int(k)])
    return [
        Basin(-float(values[g[0]]), len(g), g[0], dict(zip(free.names, places[g[0]].tolist(), strict=True)))
        for g in groups
    ]


def _merged(basins: list[Basin], free: FreeParameters, cov: np.ndarray) -> list[Basin]:
    """Basins that the data can tell apart: one that lies within two standard errors of a better one is its slope."""
    width = np.asarray(free.width)
    information = np.linalg.pinv(cov / np.outer(width, width))
    kept: list[Basin] = []
    for basin in basins:
        place = np.array(list(basin.values.values())) / width
        for k, better in enumerate(kept):
            apart = place - np.array(list(better.values.values())) / width
            if apart @ information @ apart < 4:
                kept[k] = dataclasses.replace(better, starts=better.starts + basin.starts)
                break
        else:
            kept.append(basin)
    return kept


def _conclude(posed: Posed, optimum: Float[Array, " parameters"], basins: list[Basin], starts: int) -> FitResult:
    problem, free = posed.problem, posed.problem.free
    at = jax.tree.map(np.asarray, informed(problem, optimum))
    predictions, value, p_own = _checked(posed.reference, optimum)
    residuals = at.residuals[np.isfinite(at.residuals)]
    notes = list(posed.notes)
    information = at.information
    if problem.noise.kind == "student_t":
        information = information / m_estimation(residuals)
        far = int(np.sum(np.abs(residuals) > 4))
        notes.append(f"{far} of {len(residuals)} cells lie more than four standard errors from the model; the t-law "
                     "gives them little weight.")  # fmt: skip
    if problem.noise.kind == "outliers":
        inliers = np.asarray(_inliers(problem, optimum))[np.isfinite(at.residuals)]
        # Cells that may be outliers inform that much less.
        information = information * np.mean(inliers)
        notes.append(f"{int(np.sum(inliers < 0.5))} of {len(inliers)} cells are more likely outliers than not.")
        residuals = residuals[inliers > 0.5]
    cov = uncertainty.covariance(information, np.asarray(free.width))
    std = np.sqrt(np.diag(cov))
    emulation = {}
    if posed.reference is not problem:
        shift = cov @ (at.slopes.T @ (at.weights * (np.asarray(p_own) - at.p)))
        largest = float(np.max(np.abs(shift) / std))
        methods = [getattr(part.device, "method", None) for part in problem.parts]
        emulation = {
            "error": max(float(m.deviation + m.error_of_tables) for m in methods if isinstance(m, EmulatedSeries)),
            "points": max(m.points for m in methods if isinstance(m, EmulatedSeries)),
            "largest_shift_in_std": largest,
        }
        if largest > _LARGEST_SHIFT:
            notes.append(f"Solving the dynamics at the optimum moves an estimate by {largest:.2g} standard errors: the "
                         "emulated dynamics are too coarse here; narrow the boxes.")  # fmt: skip
    values = np.asarray(optimum)
    found = uncertainty.estimates(free, values, cov)
    groups = identifiability.degeneracies(problem, values, information)
    notes += identifiability.sentences(free, found, cov, groups)
    areas = identifiability.areas(problem, values, information)
    for name, (value, error) in areas.items():
        notes.append(f"The area is known all the same: `{name}` (Rabi scale times width, over the nominal one) is "
                     f"{value:.5g} ± {error:.2g}.")  # fmt: skip
    basins = _merged(basins, free, cov)
    notes.append(f"{basins[0].starts} of {starts} starts ended in the best basin of {len(basins)}.")
    for rival in basins[1:]:
        behind = basins[0].log_likelihood - rival.log_likelihood
        if behind < 5:
            notes.append(f"Another optimum lies only {behind:.2f} nats behind: the data hardly exclude it.")
    dof = len(residuals) - len(free.names)
    chi2 = float(np.sum(residuals**2)) / dof if dof > 0 else float("nan")
    if dof > 0 and abs(chi2 - 1) > 5 * np.sqrt(2 / dof):
        notes.append(
            f"Pearson chi2/dof is {chi2:.2f}, more than five standard deviations from 1: the model does not describe "
            "these data, or their errors are misstated; the intervals are not to be trusted."
        )
    return FitResult(
        status="",
        device=posed.reference.device(posed.reference.parts[0], optimum),
        parameters=found,
        covariance=cov,
        log_likelihood=float(value),
        chi2_per_dof=chi2,
        n_data=problem.n_data,
        n_free=len(free.names),
        notes=notes,
        basins=basins,
        # Without the filler.
        predictions={
            part.name: jax.tree.map(lambda column, n=int(part.rows): column[:n], predictions[part.name])
            for part in problem.parts
        },
        problem=problem,
        values=values,
        emulation=emulation,
        degeneracies=groups,
        areas=areas,
    )


def _failed(posed: Posed, why: str, search: _Search) -> FitResult:
    n = len(posed.problem.names)
    return FitResult(
        status=f"not converged: {why}",
        device=posed.reference.parts[0].device,
        parameters={},
        covariance=np.full((n, n), np.nan),
        log_likelihood=float("nan"),
        chi2_per_dof=float("nan"),
        n_data=posed.problem.n_data,
        n_free=n,
        notes=[why],
        basins=[],
        predictions={},
        problem=posed.problem,
        values=np.full(n, np.nan),
        history=search.history,
        seconds=search.seconds,
    )

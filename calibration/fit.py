"""Calibration: the parameters of a device that make a loop table most probable.

Adam from random starts in the prior box, L-BFGS to the bottom of each basin at a coarse solver error, then the best
basins polished at the device's own error. Fisher information at the optimum gives errors, verdicts and sentences.
"""

import dataclasses
import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from calibration import uncertainty
from calibration._minimize import Minimum, Progress, Stage, minimize
from calibration.data import LoopTable
from calibration.likelihood import Experiment, Prediction, bucketed, log_likelihood
from calibration.parameters import FreeParameters, anchored
from calibration.uncertainty import Estimate
from twin.loop import AbstractMemristor
from twin.memristor import Automatic, IonMemristor, Lindblad, coarsened, planned

# Solver errors of the first two stages. A step more or less in a grid moves the log-likelihood by some sqrt(data) of
# its error over a count's: Adam does not mind, a line search would.
_EXPLORATION_ERROR, _DESCENT_ERROR = 1e-4, 1e-6
# Basins closer than this in log-likelihood (nats) and parameters (shares of the box) are one.
_SAME_VALUE, _SAME_PLACE = 0.1, 0.02
_POLISHED = 3
# Losses are log-likelihoods: 1e-5 nats is a 200th of a standard error; basins are told apart by a tenth of a nat.
_EXPLORATION = Stage("adam", iterations=25, tolerance=1e-2, learning_rate=0.3)
_DESCENT = Stage("lbfgs", iterations=60, tolerance=1e-2)
_POLISH = _DESCENT._replace(tolerance=1e-5)


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
        device: the calibrated device. parameters: estimates by name. covariance: in the order of the names.
        prediction: model probabilities of every row at the optimum; None if there is no optimum.
        basins: ranked, best first. history: per stage, best loss after each chunk of iterations.
        seconds: wall time of each stage.
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
    prediction: Prediction | None
    history: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def converged(self) -> bool:
        """Whether the search ended at an optimum."""
        return self.status == "converged"

    @property
    def correlation(self) -> np.ndarray:
        """Correlation matrix in the order of `parameters`."""
        return uncertainty.correlation(self.covariance)


def fit(
    device: AbstractMemristor,
    table: LoopTable,
    free: Mapping[str, tuple[float, float]],
    *,
    starts: int = 16,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> FitResult:
    """Calibrates a device to a loop table.

    Main arguments:
        device: supplies the scheme, the method, and every parameter that is not free.
        table: recorded loops.
        free: prior box (low, high) of each free parameter, by name.

    Other arguments:
        starts: random starts, drawn uniformly from the box.
        seed: of the starts.
        on_progress: called as (stage, iterations done, most iterations, best log-likelihood so far).

    Returns:
        A `FitResult`; a search that fails says why in `status` and does not raise.

    Raises:
        ValueError: an unknown parameter name, an empty box, a method that cannot serve (`Automatic` cannot choose
            while parameters vary).

    Example:
        >>> device = IonMemristor(memory=MovingAverage(10.0))
        >>> result = fit(device, read_table("loops.csv"), {"rabi_scale_1": (0.7, 1.3)})
    """
    parameters = FreeParameters.from_boxes(free)
    experiment = Experiment.from_table(table)
    fine = _ready(device, experiment, parameters)
    experiment = bucketed(fine, experiment, own_window="window_cycles" in parameters.names)
    rough, coarse = (coarsened(fine, error) for error in (_EXPLORATION_ERROR, _DESCENT_ERROR))
    points = parameters.unbounded(parameters.draw(jax.random.key(seed), starts))
    history: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}

    def search(name: str, twin: AbstractMemristor, points, stage: Stage, **options) -> Minimum:
        began = time.perf_counter()
        history[name] = []

        def report(done: int, values: Float[np.ndarray, " starts"]) -> None:
            best = -float(np.min(np.where(np.isnan(values), np.inf, values)))
            history[name].append(best)
            if on_progress is not None:
                on_progress(name, done, stage.iterations, best)

        if on_progress is not None:
            on_progress(name, 0, stage.iterations, -np.inf)
        # L-BFGS walks in coordinates whitened by the Fisher information, where every basin is nearly round.
        scales = np.broadcast_to(np.eye(points.shape[1]), (len(points), points.shape[1], points.shape[1]))
        if stage.optimizer == "lbfgs":
            scales = _scales(twin, experiment, parameters, points)
        args = (twin, experiment, parameters)
        each = (points, scales)
        found = minimize(_loss, args, np.zeros(points.shape), stage, each=each, on_progress=report, **options)
        seconds[name] = time.perf_counter() - began
        return found._replace(points=points + jnp.asarray(np.einsum("sij,sj->si", scales, found.points)))

    # The second of two large programs compiles while the first is compiled and used.
    ahead = lambda: uncertainty.evaluate(fine, experiment, parameters, parameters.middle)
    explored = search("search", rough, points, _EXPLORATION, meanwhile=ahead)
    settled = search("descend", coarse, explored.points, _DESCENT)
    values = np.asarray(settled.values)
    if not np.any(np.isfinite(values)):
        return _failed(fine, parameters, experiment, "the likelihood is not finite from any start; "
                       "is there a count where the model allows none? Free the readout errors or widen the boxes.",
                       history, seconds)  # fmt: skip
    basins = _rank(parameters, settled)
    best = np.zeros(starts, bool)
    best[[basin.best_start for basin in basins[:_POLISHED]]] = True
    polished = search("polish", fine, settled.points, _POLISH, active=best)
    began = time.perf_counter()
    winner = int(np.nanargmin(np.asarray(polished.values)))
    optimum = np.asarray(parameters.bounded(polished.points[winner]))
    result = _conclude(fine, parameters, experiment, table, optimum, basins, len(values))
    seconds["uncertainty"] = time.perf_counter() - began
    status = "converged"
    if not bool(polished.converged[winner]):
        status = f"not converged: the polish still moved after {int(polished.iterations[winner])} iterations"
    return dataclasses.replace(result, status=status, history=history, seconds=seconds)


def _ready(device: AbstractMemristor, experiment: Experiment, parameters: FreeParameters) -> AbstractMemristor:
    if isinstance(device, IonMemristor) and isinstance(device.method, Automatic):
        device = dataclasses.replace(device, method=Lindblad(device.method.error))
    device = anchored(device)
    # Checks the names, and that the middle of the box is a device.
    parameters.apply(device, parameters.middle)
    largest, solves = experiment.settings.largest_hz, experiment.solves_of_setting
    return planned(device, parameters.boxes, detuning_set_hz=largest, solves=solves)


def _loss(z: Float[Array, " parameters"], args, each) -> Float[Array, ""]:
    device, experiment, parameters = args
    origin, scale = each
    own_window = "window_cycles" in parameters.names
    values = parameters.bounded(origin + scale @ z)
    return -log_likelihood(parameters.apply(device, values), experiment, own_window=own_window)


def _scales(
    device: AbstractMemristor, experiment: Experiment, parameters: FreeParameters, points: Float[Array, "starts n"]
) -> Float[np.ndarray, "starts n n"]:
    """Inverse square root of the information in unbounded coordinates; the uniform prior adds 3 / pi^2 to it."""

    def scale(u):
        values, slopes = jax.jvp(parameters.bounded, (u,), (jnp.ones_like(u),))
        information = uncertainty.fisher_information(device, experiment, parameters, values)
        scaled = np.asarray(slopes)[:, None] * np.asarray(information) * np.asarray(slopes)
        eigenvalues, vectors = np.linalg.eigh(np.nan_to_num(scaled))
        return (vectors / np.sqrt(np.maximum(eigenvalues, 0.0) + 3 / np.pi**2)) @ vectors.T

    with ThreadPoolExecutor(multiprocessing.cpu_count()) as pool:
        return np.stack(list(pool.map(scale, points)))


def _rank(parameters: FreeParameters, found: Minimum) -> list[Basin]:
    places = np.asarray(parameters.bounded(found.points))
    values = np.asarray(found.values)
    groups: list[list[int]] = []
    for k in np.argsort(np.where(np.isnan(values), np.inf, values)):
        if np.isnan(values[k]):
            continue
        for group in groups:
            apart = np.abs(places[k] - places[group[0]]) / np.asarray(parameters.width)
            if values[k] - values[group[0]] < _SAME_VALUE and np.all(apart < _SAME_PLACE):
                group.append(int(k))
                break
        else:
            groups.append([int(k)])
    return [
        Basin(-float(values[g[0]]), len(g), g[0], dict(zip(parameters.names, places[g[0]].tolist(), strict=True)))
        for g in groups
    ]


def _merged(basins: list[Basin], parameters: FreeParameters, cov: np.ndarray) -> list[Basin]:
    """Basins that the data can tell apart: one that lies within two standard errors of a better one is its slope."""
    width = np.asarray(parameters.width)
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


def _conclude(
    device: AbstractMemristor,
    parameters: FreeParameters,
    experiment: Experiment,
    table: LoopTable,
    optimum: np.ndarray,
    basins: list[Basin],
    starts: int,
) -> FitResult:
    own_window = "window_cycles" in parameters.names
    calibrated = parameters.apply(device, jnp.asarray(optimum))
    prediction, value, chi2, information = uncertainty.evaluate(device, experiment, parameters, jnp.asarray(optimum))
    cov = uncertainty.covariance(np.asarray(information), np.asarray(parameters.width))
    found = uncertainty.estimates(parameters, optimum, cov)
    notes = uncertainty.sentences(parameters, found, cov)
    if own_window and table.r_set is not None:
        notes.append("`window_cycles` cannot be identified: the table records `r_set`, so the memory is never used.")
    basins = _merged(basins, parameters, cov)
    notes.append(f"{basins[0].starts} of {starts} random starts ended in the best basin of {len(basins)}.")
    for rival in basins[1:]:
        behind = basins[0].log_likelihood - rival.log_likelihood
        if behind < 5:
            notes.append(f"Another optimum lies only {behind:.2f} nats behind: the data hardly exclude it.")
    dof = experiment.n_data - len(parameters.names)
    chi2 = float(chi2) / dof if dof > 0 else float("nan")
    if dof > 0 and abs(chi2 - 1) > 5 * np.sqrt(2 / dof):
        notes.append(
            f"Pearson chi2/dof is {chi2:.2f}, more than five standard deviations from 1: the model does not describe "
            "these data, or their errors are misstated; the intervals are not to be trusted."
        )
    return FitResult(
        status="",
        device=calibrated,
        parameters=found,
        covariance=cov,
        log_likelihood=float(value),
        chi2_per_dof=chi2,
        n_data=experiment.n_data,
        n_free=len(parameters.names),
        notes=notes,
        basins=basins,
        # Without the filler.
        prediction=jax.tree.map(lambda column: column[: len(table)], prediction),
    )


def _failed(device, parameters: FreeParameters, experiment: Experiment, why: str, history, seconds) -> FitResult:
    n = len(parameters.names)
    return FitResult(
        status=f"not converged: {why}",
        device=device,
        parameters={},
        covariance=np.full((n, n), np.nan),
        log_likelihood=float("nan"),
        chi2_per_dof=float("nan"),
        n_data=experiment.n_data,
        n_free=n,
        notes=[why],
        basins=[],
        prediction=None,
        history=history,
        seconds=seconds,
    )

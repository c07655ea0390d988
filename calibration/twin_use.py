"""What a twin expects, with bands; and which of two twins new loops are more probable for."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax

from calibration import bad_data
from calibration.data import LoopTable
from calibration.likelihood import Experiment, bucketed
from calibration.parameters import FreeParameters
from calibration.problem import Loops, Part, Problem
from calibration.twin_file import Twin
from twin.memristor import IonMemristor
from twin.planning import Automatic, Lindblad, planned


class Bands(NamedTuple):
    """Probability of s in each row, with 95 % bands of what the calibration left open; sentences that warn."""

    p_x: np.ndarray
    p_y: np.ndarray
    x_low: np.ndarray
    x_high: np.ndarray
    y_low: np.ndarray
    y_high: np.ndarray
    warnings: tuple[str, ...]


def predict(twin: Twin, settings: LoopTable) -> Bands:
    """What the twin expects under the settings of a table, whose counts matter only where the memory reads them.

    Bands are quantiles over the posterior's draws; without draws the covariance is carried through the slopes, on the
    scale of log p / (1 - p), where a band cannot leave [0, 1].
    """
    problem = _both_columns(twin, settings)
    cells, rows = bad_data.look(problem, twin.inside), len(settings)
    keep = np.concatenate([np.arange(rows), len(cells.p) // 2 + np.arange(rows)])
    p = cells.p[keep]
    if twin.draws is not None:
        drawn = np.asarray(_each(problem, jnp.asarray(twin.draws)))[:, keep]
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    else:
        slopes = cells.slopes[keep]
        spread = np.sqrt(np.einsum("ci,ij,cj->c", slopes, twin.covariance, slopes))
        inner = np.clip(p, 1e-12, 1 - 1e-12)
        logit, reach = np.log(inner / (1 - inner)), 1.96 * spread / (inner * (1 - inner))
        low, high = 1 / (1 + np.exp(-(logit - reach))), 1 / (1 + np.exp(-(logit + reach)))
    return Bands(p[:rows], p[rows:], low[:rows], high[:rows], low[rows:], high[rows:], tuple(outside(twin, settings)))


def outside(twin: Twin, settings: LoopTable) -> list[str]:
    """Which settings lie outside what the twin was calibrated with, in sentences."""
    sentences = []
    for name, known in twin.document.validity.settings.items():
        values = getattr(settings, name)
        if values is None or name == "shots" or known is None:
            continue
        low, high = float(np.min(values)), float(np.max(values))
        slack = 1e-9 + 0.02 * (known[1] - known[0])
        if low < known[0] - slack or high > known[1] + slack:
            sentences.append(
                f"`{name}` reaches from {low:g} to {high:g}, but the twin was calibrated from {known[0]:g} to "
                f"{known[1]:g}: beyond, its bands are not tested."
            )
    return sentences


def _both_columns(twin: Twin, settings: LoopTable) -> Problem:
    """A problem with both columns "measured" in every row, solved by the device's own method."""
    rows = np.ones(len(settings))
    fake = {"shots": rows.astype(int), "n_m": None, "x": None, "x_err": None, "y": None, "y_err": None}
    if settings.r_set is None:
        # The memory reads what was measured; where nothing was, it reads the model.
        part = (problem := _problem(twin, settings)).parts[0]
        assert isinstance(part.data, Loops)
        own = "window_cycles" in twin.names
        r = part.data.prediction(problem.device(part, jnp.asarray(twin.inside)), own).r
        settings = dataclasses.replace(settings, r_set=np.clip(r[: len(settings)], 0.0, 1.0), sha256="")
    return _problem(twin, dataclasses.replace(settings, n_x=0 * rows, n_y=0 * rows, sha256="", **fake))


def _problem(twin: Twin, table: LoopTable) -> Problem:
    """A table under the twin's own method, planned for where it will be evaluated: its mean, and its draws."""
    device = twin.device
    if isinstance(device, IonMemristor) and isinstance(device.method, Automatic):
        device = dataclasses.replace(device, method=Lindblad(device.method.error))
    points = np.vstack([twin.inside, *([] if twin.draws is None else [twin.draws])])
    hull = {name: (float(points[:, k].min()), float(points[:, k].max())) for k, name in enumerate(twin.names)}
    experiment = Experiment.from_table(table)
    device = planned(device, hull, detuning_set_hz=experiment.settings.largest_hz, solves=experiment.solves_of_setting)
    data = bucketed(device, experiment, own_window="window_cycles" in twin.names)
    part = Part("loops", device, Loops(data), len(table))
    return Problem(FreeParameters.from_boxes(twin.boxes), (part,))


@eqx.filter_jit
def _each(problem: Problem, values):
    return lax.map(lambda v: problem.cells(v)[0], values)


# ------------------------------------------------------------------------------------------------ comparing


class Comparison(NamedTuple):
    """A candidate against an incumbent on new tables.

    Attributes:
        verdict: "improved", "degraded" or "inconclusive". reason: the evidence in words.
        tables: for each its name, the candidate's log-likelihood minus the incumbent's, and the standard error of that.
        difference, error: of all tables together.
        evidence: log Bayes factor for the candidate, each twin averaged over its posterior. needed: what two honest
            calibrations of one device exceed by luck in 5 %.
    """

    verdict: str
    reason: str
    tables: list[dict[str, Any]]
    difference: float
    error: float
    evidence: float
    needed: float


def compare(incumbent: Twin, candidate: Twin, tables: Sequence[LoopTable]) -> Comparison:
    """Which of two twins new loops are more probable for.

    Two honest calibrations of the same device never coincide, and enough loops tell which happens to lie closer to it.
    So a verdict asks for more: the log Bayes factor must exceed what that luck gives in 5 % of cases, the difference of
    two halved chi-squared variables; and the plain difference of log-likelihoods twice its standard error.
    """
    old, new = (
        [bad_data.look(_problem(twin, table), twin.inside) for table in tables] for twin in (incumbent, candidate)
    )
    rows: list[dict[str, Any]] = []
    for table, a, b in zip(tables, old, new, strict=True):
        # The variance of sum n (logit p' - logit p) under their mean; of values, the same with their errors.
        p = 0.5 * (a.p + b.p)
        variance = np.where(a.counted, p * (1 - p) / a.scale, a.variance)
        squares = np.where(a.there & (variance > 0), (b.p - a.p) ** 2 / np.where(variance > 0, variance, 1.0), 0.0)
        difference = float(np.sum(b.terms - a.terms))
        rows.append({"table": Path(table.name).name, "difference": difference, "error": float(np.sqrt(squares.sum()))})
    difference = sum(row["difference"] for row in rows)
    error = float(np.sqrt(sum(row["error"] ** 2 for row in rows)))
    evidence, needed = (
        _averaged(candidate, new) - _averaged(incumbent, old),
        _luck(len(incumbent.names), len(candidate.names)),
    )
    verdict = "inconclusive"
    if abs(evidence) > needed and abs(difference) > 1.96 * error and np.sign(evidence) == np.sign(difference):
        verdict = "improved" if evidence > 0 else "degraded"
    beyond = "more than" if verdict != "inconclusive" else "against"
    than = "more" if difference > 0 else "less"
    reason = (
        f"{len(rows)} new tables are {abs(difference):.1f} ± {error:.1f} nats {than} probable for the candidate; "
        f"averaged over both posteriors {evidence:+.1f} nats, {beyond} the {needed:.1f} that luck gives two honest "
        "calibrations"
    )
    return Comparison(verdict, reason, rows, float(difference), error, float(evidence), needed)


def _averaged(twin: Twin, seen: Sequence[bad_data.Cells]) -> float:
    """Log probability of all tables, averaged over a Gaussian posterior; exact for a quadratic log-likelihood.

    log L(m) + s^T (C^-1 + F)^-1 s / 2 - log det(1 + C F) / 2
    """
    score, information = sum(one.score for one in seen), sum(one.information for one in seen)
    width = np.array([high - low for low, high in twin.boxes.values()])
    # In units of the boxes, whose own width bounds what was not identified.
    values, vectors = np.linalg.eigh(twin.covariance / np.outer(width, width))
    prior = (vectors / np.maximum(values, 1e-14)) @ vectors.T + 12 * np.eye(len(width))
    score, information = score * width, information * np.outer(width, width)
    gain = 0.5 * score @ np.linalg.solve(prior + information, score)
    volume = 0.5 * (np.linalg.slogdet(prior + information)[1] - np.linalg.slogdet(prior)[1])
    return float(sum(np.sum(one.terms) for one in seen) + gain - volume)


def _luck(n: int, m: int) -> float:
    """95 % quantile of |chi2_n - chi2_m| / 2, of independent variables."""
    rng = np.random.default_rng(0)
    return float(np.quantile(np.abs(rng.chisquare(n, 200_000) - rng.chisquare(m, 200_000)) / 2, 0.95))

"""Intervals beyond the Fisher matrix: profile likelihood, parametric bootstrap, where methods disagree; and of means.

A Laplace interval assumes that the log-likelihood is a parabola that no bound cuts off. The profile follows its true
shape, the bootstrap refits tables that the calibrated twin could have shown, the posterior weighs the whole box.
"""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq

from calibration.least_squares import Descent, descend_one, forward
from calibration.problem import Problem

CHI2_95 = 3.841458820694124
"""95 % quantile of chi2 with one degree of freedom."""
# Standard errors that a profile spans on each side, and points on each side.
_SPAN, _POINTS = 3.5, 8
# No point of a profile or start of a refit lies closer to an edge than this share of the box.
_EDGE = 1e-4
# Refits in one call of the compiled program.
_CHUNK = 20
# Two methods disagree on an end that differs by more than this share of their half-width.
_DISAGREEMENT = 0.35


class Profile(NamedTuple):
    """Twice the log-likelihood lost when one parameter is held and all others are fitted again.

    Attributes:
        name: the parameter.
        values: where it was held, increasing, the optimum among them.
        deviance: 2 (log L_max - log L) there.
        ci95: where the deviance passes 3.84; the edge of the box where it never does.
        gain: log-likelihood by which a refit beat the optimum, nats; above a hundredth, that was none.
        settled: share of refits that reached their optimum.
    """

    name: str
    values: Float[np.ndarray, " points"]
    deviance: Float[np.ndarray, " points"]
    ci95: tuple[float, float]
    gain: float
    settled: float


class Bootstrap(NamedTuple):
    """Refits of tables simulated at the optimum.

    Attributes:
        draws: optimum of each refit that settled, shape (refits, parameters).
        std: their standard deviation. ci95: their percentiles, shape (2, parameters).
        bias: their mean minus the optimum they were simulated at.
        settled: share of refits that reached their optimum.
    """

    draws: Float[np.ndarray, "refits parameters"]
    std: Float[np.ndarray, " parameters"]
    ci95: Float[np.ndarray, "2 parameters"]
    bias: Float[np.ndarray, " parameters"]
    settled: float


def profile(
    problem: Problem, optimum: Float[np.ndarray, " parameters"], cov: Float[np.ndarray, "n n"], name: str
) -> Profile:
    """Profile likelihood of one parameter around an optimum.

    Args:
        problem: the question.
        optimum: values of all parameters. cov: their Laplace covariance.
        name: the parameter to profile.
    """
    free, k = problem.free, problem.names.index(name)
    low, high = np.asarray(free.low), np.asarray(free.high)
    inner_low, inner_high = low + _EDGE * (high - low), high - _EDGE * (high - low)
    optimum = np.clip(np.asarray(optimum), inner_low, inner_high)
    std = np.sqrt(cov[k, k])
    sides = [
        np.linspace(optimum[k], end, _POINTS + 1)[1:]
        for end in (max(optimum[k] - _SPAN * std, inner_low[k]), min(optimum[k] + _SPAN * std, inner_high[k]))
    ]
    held = np.sort(np.concatenate([*sides, [optimum[k]]]))
    # Along the regression of the others on this one, which is where a parabola has its ridge.
    starts = optimum + (held - optimum[k])[:, None] * (cov[k] / cov[k, k])[None]
    starts = np.clip(starts, inner_low, inner_high)
    starts[:, k] = held
    found = _refitted(problem, jnp.asarray(starts), jnp.arange(len(low)) == k)
    value = np.asarray(found.log_likelihood)
    at_optimum = int(np.argmin(np.abs(held - optimum[k])))
    deviance = 2 * (np.nanmax(value) - value)
    ends = (float(low[k]), float(high[k]))
    gain = float(np.nanmax(value) - value[at_optimum])
    return Profile(name, held, deviance, _crossings(held, deviance, ends), gain, float(np.mean(found.converged)))


def _crossings(x: np.ndarray, deviance: np.ndarray, ends: tuple[float, float]) -> tuple[float, float]:
    """Where the deviance passes 3.84 on either side of its minimum; an end of the box where it does not."""
    best = int(np.nanargmin(deviance))
    # The root of the deviance is nearly a straight line on each side.
    root = np.where(np.arange(len(x)) < best, -1.0, 1.0) * np.sqrt(np.maximum(deviance, 0.0))
    curve = PchipInterpolator(x, root)
    limits = []
    for sign, outer, end in ((-1, x[0], ends[0]), (1, x[-1], ends[1])):
        target = sign * np.sqrt(CHI2_95)
        missed = sign * float(curve(outer)) < np.sqrt(CHI2_95)
        limits.append(end if missed else brentq(lambda v, t=target: float(curve(v)) - t, *sorted((x[best], outer))))
    return float(limits[0]), float(limits[1])


def _refitted(problem: Problem, starts: Float[Array, "fits parameters"], held: Bool[Array, " parameters"]) -> Descent:
    one: Any = _refit
    first = one(problem, starts[0], held)
    with ThreadPoolExecutor(multiprocessing.cpu_count()) as pool:
        every = [first, *pool.map(lambda u: one(problem, u, held), starts[1:])]
    return jax.tree.map(lambda *rows: np.stack([np.asarray(row) for row in rows]), *every)


@eqx.filter_jit
def _refit(problem: Problem, start, held) -> Descent:
    return descend_one(forward(problem), start, held)


def bootstrap(
    problem: Problem,
    optimum: Float[np.ndarray, " parameters"],
    *,
    refits: int = 200,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Bootstrap:
    """Parametric bootstrap: tables simulated at the optimum, each fitted again from there.

    Args:
        problem: the question.
        optimum: values of all parameters.
        refits: number of tables.
        seed: of their counts.
        on_progress: called as (what, done, of how many).
    """
    free = problem.free
    width = np.asarray(free.width)
    inside = np.clip(np.asarray(optimum), np.asarray(free.low) + _EDGE * width, np.asarray(free.high) - _EDGE * width)
    start = jnp.asarray(inside)
    keys = jax.random.split(jax.random.key(seed), -(-refits // _CHUNK) * _CHUNK).reshape(-1, _CHUNK)
    one: Any = _resampled
    told = on_progress or (lambda what, done, most: None)
    told("refits", 0, refits)
    found = [one(problem, start, keys[0])]
    with ThreadPoolExecutor(multiprocessing.cpu_count()) as pool:
        for more in pool.map(lambda k: jax.block_until_ready(one(problem, start, k)), keys[1:]):
            found.append(more)
            told("refits", min(len(found) * _CHUNK, refits), refits)
    joined = jax.tree.map(lambda *rows: np.concatenate([np.asarray(row) for row in rows])[:refits], *found)
    settled = joined.converged
    draws = joined.values[settled]
    if len(draws) < 2:
        nothing = np.full(len(width), np.nan)
        return Bootstrap(draws, nothing, np.full((2, len(width)), np.nan), nothing, float(np.mean(settled)))
    ends = np.quantile(draws, [0.025, 0.975], axis=0)
    return Bootstrap(
        draws, np.std(draws, axis=0, ddof=1), ends, np.mean(draws, axis=0) - optimum, float(np.mean(settled))
    )


@eqx.filter_jit
def _resampled(problem: Problem, start, keys) -> Descent:
    simulated = lambda key: problem.simulated(key, start)
    return jax.lax.map(lambda key: descend_one(forward(simulated(key)), start), keys)


def disagreements(
    intervals: Mapping[str, Mapping[str, tuple[float, float]]], boxes: Mapping[str, tuple[float, float]]
) -> list[str]:
    """Sentences on parameters whose intervals differ from method to method.

    Args:
        intervals: {method: {parameter: 95 % interval}}, "laplace" among the methods.
        boxes: prior boxes.
    """
    notes = []
    for name, (a, b) in intervals["laplace"].items():
        others = {m: found[name] for m, found in intervals.items() if m != "laplace" and name in found}
        apart = {
            method: (low, high)
            for method, (low, high) in others.items()
            if max(abs(a - low), abs(b - high)) > _DISAGREEMENT * 0.25 * ((high - low) + (b - a))
        }
        if not apart:
            continue
        box = boxes[name]
        edge = min(abs(a - box[0]), abs(b - box[1])) <= 1e-3 * (box[1] - box[0])
        why = ("it is cut off by the prior box, where the parabola behind it does not hold" if edge
               else "the likelihood is no parabola over it")  # fmt: skip
        told = "; ".join(f"{_METHODS[method]} gives [{low:.4g}, {high:.4g}]" for method, (low, high) in apart.items())
        best = next(method for method in _METHODS if method in apart)
        notes.append(
            f"`{name}`: Laplace's interval [{a:.4g}, {b:.4g}] is not to be trusted: {why}. "
            f"{told[0].upper()}{told[1:]}. Use that of {_METHODS[best]}."
        )
    return notes


class MeanInterval(NamedTuple):
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Float[np.ndarray, " runs"] | Sequence[float], resamples: int = 10_000) -> MeanInterval:
    """Mean of independent runs, or of paired differences of runs, resampled with a fixed seed.

    Raises:
        ValueError: a value that is not finite, or fewer than two.
    """
    values = np.asarray(values, float)
    if len(values) < 2 or not np.all(np.isfinite(values)):
        raise ValueError(f"the interval of a mean needs at least two finite values, but is given {values}; make more "
                         "runs, or narrow the ranges that they are drawn from.")  # fmt: skip
    means = np.mean(np.random.default_rng(0).choice(values, (resamples, len(values))), axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return MeanInterval(float(np.mean(values)), float(low), float(high))


# The one to be trusted first comes first.
_METHODS = {"posterior": "the posterior", "profile": "the profile likelihood", "bootstrap": "the bootstrap"}


def chosen(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Parameters wanted for a profile: ["all"], or names; one without ``@PART`` stands for those of all parts."""
    return [name for name in names if {"all", name, name.partition("@")[0]} & set(wanted)]

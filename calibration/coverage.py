"""Do our own intervals hold what they promise? Simulation-based calibration of Laplace, profile and posterior.

Tables are simulated at a truth fixed in advance, fitted, and the 95 % intervals that hold the truth are counted. For
the posterior the truth is drawn from the prior: its rank among draws is then uniform if the sampler and the likelihood
are right (Talts et al., arXiv:1804.06788). Every table is a lane of one compiled program.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key
from scipy.stats import beta, chisquare

from calibration.intervals import CHI2_95
from calibration.least_squares import STEPS, descend_one, forward
from calibration.posterior import INSIDE, density_of, root, walk, warm_up
from calibration.problem import Problem
from calibration.uncertainty import Z95

LEVEL = 0.95
# What may go wrong by chance: a thousandth, shared out over the parameters.
_CHANCE = 1e-3
_BINS = 20
# Refits whose parameters lean on two edges at once take more steps than a fit's usual round.
_STEPS = 3 * STEPS


class Trials(NamedTuple):
    """Fits of simulated tables, one a row.

    Attributes:
        estimate, std: optimum and Laplace standard error, shape (tables, parameters).
        deviance: 2 (log L_max - log L with this parameter held at the truth); NaN if not asked for.
        settled: whether the search reached an optimum, shape (tables,).
    """

    estimate: Float[Array, "tables parameters"]
    std: Float[Array, "tables parameters"]
    deviance: Float[Array, "tables parameters"]
    settled: Bool[Array, " tables"]


class Coverage(NamedTuple):
    """How often the 95 % intervals of one method hold the truth of one parameter.

    Attributes:
        held, tables: how many did, of how many.
        low, high: interval of the coverage, at a confidence that all parameters share.
    """

    parameter: str
    method: str
    held: int
    tables: int
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Whether 95 % lies in the interval."""
        return self.low <= LEVEL <= self.high


@eqx.filter_jit
def trials(
    problem: Problem, truth: Float[Array, " parameters"], keys: Key[Array, " tables"], *, profile: bool
) -> Trials:
    """Fits of tables simulated at a truth, from there; a key a table.

    Args:
        problem: settings and devices; its counts are not looked at.
        truth: values inside the boxes.
        profile: whether each parameter is also held at its truth, and the others fitted again.
    """
    problem = forward(problem)
    free = problem.free
    count = truth.size

    def one(key):
        asked = problem.simulated(key, truth)
        found = descend_one(asked, truth, steps=_STEPS)
        scaled = free.width[:, None] * asked.information(found.values) * free.width
        values, vectors = jnp.linalg.eigh(jnp.nan_to_num(scaled))
        variance = jnp.sum(vectors**2 / jnp.maximum(values, 1e-12), axis=1)
        std = free.width * jnp.sqrt(variance)
        if not profile:
            return Trials(found.values, std, jnp.full(count, jnp.nan), found.converged)

        def held_at_truth(k):
            held = jnp.arange(count) == k
            # From within the box, so that no coordinate begins where its slope vanishes.
            inside = jnp.clip(found.values, free.low + 1e-4 * free.width, free.high - 1e-4 * free.width)
            other = descend_one(asked, jnp.where(held, truth, inside), held, _STEPS)
            return 2 * (found.log_likelihood - other.log_likelihood), other.converged

        deviance, settled = lax.map(held_at_truth, jnp.arange(count))
        return Trials(found.values, std, deviance, found.converged & jnp.all(settled))

    return lax.map(one, keys)


@eqx.filter_jit
def ranks(
    problem: Problem, keys: Key[Array, " tables"], *, draws: int, thin: int, warmup: int
) -> Int[Array, "tables n"]:
    """Rank of a truth drawn from the prior among thinned draws of its posterior, a table a key.

    Args:
        problem: settings and devices; its counts are not looked at.
        draws: kept draws; ranks run from 0 to `draws`.
        thin: steps of the chain a draw. warmup: steps that adapt it.
    """
    problem = forward(problem)
    free = problem.free

    def one(key):
        for_truth, for_data, for_start, adapt, run = jax.random.split(key, 5)
        truth = free.draw(for_truth, 1)[0]
        asked = problem.simulated(for_data, truth)
        share = jnp.clip((descend_one(asked, truth).values - free.low) / free.width, INSIDE, 1 - INSIDE)
        inside = free.low + share * free.width
        center, scale = free.to_normal(inside), root(asked, inside)
        density = density_of(asked, center, scale)
        state, parameters = warm_up(density, adapt, jax.random.normal(for_start, center.shape), warmup)
        _, (z, *_) = walk(density, run, state, parameters, draws * thin)
        return jnp.sum(free.from_normal(center + z[::thin] @ scale.T) < truth, axis=0)

    return jax.vmap(one)(keys)


def coverages(found: Trials, truth: np.ndarray, names: tuple[str, ...]) -> list[Coverage]:
    """Counts of both methods; tables whose search did not settle count as not held."""
    settled = np.asarray(found.settled)[:, None]
    held = {"laplace": np.abs(np.asarray(found.estimate) - truth) <= Z95 * np.asarray(found.std)}
    if np.all(np.isfinite(found.deviance)):
        held["profile"] = np.asarray(found.deviance) <= CHI2_95
    return [
        _counted(name, method, int(np.sum((inside & settled)[:, k])), len(settled), len(names))
        for method, inside in held.items()
        for k, name in enumerate(names)
    ]


def _counted(parameter: str, method: str, held: int, tables: int, parameters: int) -> Coverage:
    tail = _CHANCE / parameters / 2
    low = 0.0 if held == 0 else float(beta.ppf(tail, held, tables - held + 1))
    high = 1.0 if held == tables else float(beta.ppf(1 - tail, held + 1, tables - held))
    return Coverage(parameter, method, held, tables, low, high)


def uniformity(found: Int[np.ndarray, "tables parameters"], draws: int) -> Float[np.ndarray, " parameters"]:
    """p-value of each parameter's ranks against uniform ones, chi2 over twenty bins."""
    edges = np.linspace(0, draws + 1, _BINS + 1)
    width = np.diff(np.searchsorted(np.arange(draws + 1), edges))
    counts = np.stack([np.histogram(column, edges)[0] for column in np.asarray(found).T])
    return np.array([chisquare(row, len(found) * width / (draws + 1)).pvalue for row in counts])

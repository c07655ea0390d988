"""The posterior of a calibration by the No-U-Turn sampler, with what tells whether its chains can be trusted.

Uniform prior in the boxes, sampled in coordinates in which it is normal, whitened by the Fisher information at the
optimum: there an identified posterior is a unit ball, and the windowed adaptation (Blackjax) has little left to learn.
Where a posterior leans on a bound it is still smooth in these coordinates, so that its intervals hold where those of
Laplace fail.
"""

import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.diagnostics import effective_sample_size, potential_scale_reduction
from jaxtyping import Array, Float, PRNGKeyArray

from calibration.least_squares import forward
from calibration.problem import Problem

# Trees of more than 2^8 steps would mean that whitening failed.
_DOUBLINGS = 8
_ACCEPTANCE = 0.85
# Centre and scales are taken no closer to an edge of the box than this share, where these coordinates run away.
_INSIDE = 0.01
RHAT = 1.01
"""Chains agree when the potential scale reduction is below this (Vehtari et al. 2021)."""


class Posterior(NamedTuple):
    """Draws from the posterior and their diagnostics.

    Attributes:
        draws: values in the boxes, shape (chains, draws, parameters).
        log_likelihood: of each draw, nats, shape (chains, draws).
        rhat: rank-normalized split potential scale reduction, shape (parameters,); 1 for chains that agree.
        effective: effective sample size of the mean of each parameter, all chains together.
        divergences: steps at which the integrator failed; the draws miss the region around them.
        gradients: evaluations of the gradient, warm-up not included.
    """

    draws: Float[np.ndarray, "chains draws parameters"]
    log_likelihood: Float[np.ndarray, "chains draws"]
    rhat: Float[np.ndarray, " parameters"]
    effective: Float[np.ndarray, " parameters"]
    divergences: int
    gradients: int

    @property
    def flat(self) -> Float[np.ndarray, "all parameters"]:
        """All chains together."""
        return self.draws.reshape(-1, self.draws.shape[-1])

    def interval(self, level: float = 0.95) -> Float[np.ndarray, "2 parameters"]:
        """Central interval of each parameter."""
        return np.quantile(self.flat, [(1 - level) / 2, (1 + level) / 2], axis=0)

    def doubts(self, names: tuple[str, ...]) -> list[str]:
        """Sentences on why the draws should not be trusted; none if they can be."""
        notes = []
        if len(bad := [f"`{n}` ({r:.3f})" for n, r in zip(names, self.rhat, strict=True) if not r < RHAT]):
            notes.append(
                f"The chains disagree on {', '.join(bad)} (R-hat above {RHAT}); take more draws, or look at the basins."
            )
        if len(few := [f"`{n}` ({e:.0f})" for n, e in zip(names, self.effective, strict=True) if e < 400]):
            notes.append(f"Fewer than 400 effective draws of {', '.join(few)}; intervals are rough, take more draws.")
        if self.divergences:
            notes.append(f"{self.divergences} steps diverged: the posterior has a corner that the draws may miss.")
        return notes


class _Walk(NamedTuple):
    """Chains between chunks."""

    state: Any
    parameters: Any
    key: PRNGKeyArray


def sample(
    problem: Problem,
    values: Float[Array, " parameters"],
    *,
    chains: int = 4,
    draws: int = 1000,
    warmup: int = 600,
    chunk: int = 100,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Posterior:
    """Samples the posterior.

    Args:
        problem: emulated devices make this fast; others integrate the dynamics at every step.
        values: the optimum.
        chains: independent chains, shared out over the cores.
        draws, warmup: of each chain.
        chunk: draws between calls of `on_progress`, as (what, done, of how many).
        seed: of starts and draws.

    Returns:
        A `Posterior`; look at its `doubts`.
    """
    center, scale = whitened(problem, values)
    groups = math.gcd(chains, multiprocessing.cpu_count())
    keys = jax.random.split(jax.random.key(seed), chains).reshape(groups, -1)
    begin: Any = partial(_warmed, problem, center, scale, warmup)
    advance: Any = partial(_advanced, problem, center, scale, min(chunk, draws))
    told = on_progress or (lambda what, done, most: None)
    told("warm-up", 0, warmup)
    _warmed.lower(problem, center, scale, warmup, keys[0]).compile()
    kept: list[list[Any]] = [[] for _ in range(groups)]
    with ThreadPoolExecutor(groups) as pool:
        walks = list(pool.map(lambda k: jax.block_until_ready(begin(k)), keys))
        told("warm-up", warmup, warmup)
        done = 0
        _advanced.lower(problem, center, scale, min(chunk, draws), walks[0]).compile()
        while done < draws:
            found = list(pool.map(lambda walk: jax.block_until_ready(advance(walk)), walks))
            walks = [walk for walk, _ in found]
            for group, (_, one) in zip(kept, found, strict=True):
                group.append(jax.tree.map(np.asarray, one))
            done = min(done + chunk, draws)
            told("draws", done, draws)
    # Chunks follow one another on the draws, groups on the chains.
    joined = [jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *group) for group in kept]
    z, density, divergent, steps = jax.tree.map(lambda *parts: np.concatenate(parts, axis=0)[:, :draws], *joined)
    u = np.asarray(center) + z @ np.asarray(scale).T
    found = np.asarray(problem.free.from_normal(jnp.asarray(u)))
    likelihood = density + 0.5 * np.sum(u**2, axis=-1)
    return Posterior(
        found, likelihood, rhat(u), np.asarray(effective_sample_size(u)), int(np.sum(divergent)), int(steps.sum())
    )


def rhat(draws: Float[np.ndarray, "chains draws parameters"]) -> Float[np.ndarray, " parameters"]:
    """Rank-normalized split potential scale reduction (Vehtari et al., Bayesian Analysis 16, 667 (2021))."""
    from scipy.stats import norm, rankdata

    half = draws.shape[1] // 2
    split = np.concatenate([draws[:, :half], draws[:, half : 2 * half]])
    ranks = rankdata(split.reshape(-1, split.shape[-1]), axis=0).reshape(split.shape)
    normal = norm.ppf((ranks - 0.375) / (ranks.shape[0] * ranks.shape[1] + 0.25))
    return np.asarray(potential_scale_reduction(normal))


def whitened(
    problem: Problem, values: Float[Array, " parameters"]
) -> tuple[Float[Array, " parameters"], Float[Array, "parameters parameters"]]:
    """Centre, and inverse root of the information, in the sampler's coordinates, near an optimum."""
    free = problem.free
    share = jnp.clip((jnp.asarray(values) - free.low) / free.width, _INSIDE, 1 - _INSIDE)
    inside = free.low + share * free.width
    return free.to_normal(inside), _root(problem, inside)


@eqx.filter_jit
def _root(problem: Problem, values: Float[Array, " parameters"]) -> Float[Array, "parameters parameters"]:
    problem = forward(problem)
    free = problem.free
    slopes = free.width * jax.scipy.stats.norm.pdf(free.to_normal(values))
    scaled = slopes[:, None] * problem.information(values) * slopes
    eigenvalues, vectors = jnp.linalg.eigh(jnp.nan_to_num(scaled))
    # The prior adds its own 1.
    return (vectors / jnp.sqrt(jnp.maximum(eigenvalues, 0.0) + 1)) @ vectors.T


def warm_up(density: Callable, key: PRNGKeyArray, start: Float[Array, " parameters"], steps: int):
    """Adapted state and step size, mass matrix; for use inside jit and vmap."""
    adaptation = blackjax.window_adaptation(
        blackjax.nuts,
        density,
        is_mass_matrix_diagonal=False,
        target_acceptance_rate=_ACCEPTANCE,
        initial_step_size=0.5,
        max_num_doublings=_DOUBLINGS,
    )
    (state, parameters), _ = adaptation.run(key, start, steps)
    # Static, it must not become a traced array.
    parameters = {name: value for name, value in parameters.items() if name != "max_num_doublings"}
    return state, parameters


def walk(density: Callable, key: PRNGKeyArray, state, parameters, draws: int):
    """Draws of one chain: state after, (position, log density, diverged, gradients) of each; inside jit and vmap."""
    step = blackjax.nuts(density, **parameters, max_num_doublings=_DOUBLINGS).step

    def one(state, key):
        state, info = step(key, state)
        return state, (state.position, state.logdensity, info.is_divergent, info.num_integration_steps)

    return jax.lax.scan(one, state, jax.random.split(key, draws))


def _density(problem: Problem, center, scale):
    return lambda z: problem.log_density(center + scale @ z)


@eqx.filter_jit
def _warmed(problem: Problem, center, scale, steps: int, keys) -> _Walk:
    density = _density(problem, center, scale)

    def one(key):
        start, run, later = jax.random.split(key, 3)
        # Wider than the posterior, so that chains that agree have come together.
        state, parameters = warm_up(density, run, 2 * jax.random.normal(start, center.shape), steps)
        return _Walk(state, parameters, later)

    return jax.vmap(one)(keys)


@eqx.filter_jit
def _advanced(problem: Problem, center, scale, draws: int, walks: _Walk):
    density = _density(problem, center, scale)

    def one(chain: _Walk):
        now, later = jax.random.split(chain.key)
        state, kept = walk(density, now, chain.state, chain.parameters, draws)
        return _Walk(state, chain.parameters, later), kept

    return jax.vmap(one)(walks)

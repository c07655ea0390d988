"""The sampler against quadrature, and what it says of its chains."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from test_demo_data import DEMO

from calibration.data import read_table, synthesize
from calibration.fit import solve
from calibration.posing import pose
from calibration.posterior import Posterior, rhat, sample
from calibration.problem import Problem
from twin.memristor import Lindblad

BOXES = {"rabi_scale_2": (0.7, 1.3), "readout_error_dark": (0.0, 0.05)}
NAMES = ("rabi_scale_2", "readout_error_dark")
DRAWS = 1000
_on_grid = eqx.filter_jit(lambda problem, points: jax.lax.map(problem.log_likelihood, points))


@functools.cache
def posed(dark: float = 0.02) -> Problem:
    """Few shots: the posterior is wide, skew, and reaches the edge of the box."""
    truth = tables.TRUTH | {"readout_error_dark": dark}
    settings = tables.settings((5.0,), cycles=21, shots=60)
    device = tables.ion(rabi_scale_1=truth["rabi_scale_1"], readout_error_bright=truth["readout_error_bright"])
    return pose(device, synthesize(tables.ion(**truth), settings, jax.random.key(4)), BOXES).problem


@functools.cache
def sampled(dark: float = 0.02, seed: int = 0) -> Posterior:
    return sample(posed(dark), jnp.array([0.95, 0.01]), draws=DRAWS, warmup=400, seed=seed)


@functools.cache
def by_grid(dark: float) -> tuple[list[np.ndarray], np.ndarray]:
    """Midpoints of a grid over the boxes and the posterior's weights there."""
    axes = [low + (high - low) * (np.arange(240) + 0.5) / 240 for low, high in BOXES.values()]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    value = np.asarray(_on_grid(posed(dark), jnp.asarray(points)))
    weights = np.exp(value - value.max()).reshape(240, 240)
    return axes, weights / weights.sum()


# ------------------------------------------------------------------------------------------------ the right posterior


def test_mean_and_covariance_are_those_of_the_grid():
    (scale, dark), weights = by_grid(0.02)
    grid = np.stack(np.meshgrid(scale, dark, indexing="ij"), axis=-1)
    mean = np.einsum("ij,ijk->k", weights, grid)
    cov = np.einsum("ij,ijk,ijl->kl", weights, grid - mean, grid - mean)
    found = sampled()
    std, own = np.sqrt(np.diag(cov)), found.flat
    error = 4.5 / np.sqrt(found.effective)
    assert np.all(np.abs(own.mean(0) - mean) < error * std)
    scatter = np.cov(own.T) / np.outer(std, std)
    assert np.max(np.abs(scatter - cov / np.outer(std, std))) < 2 * error.max()
    assert np.all(found.rhat < 1.01)
    assert np.all(found.effective > 800)
    assert found.divergences == 0
    assert found.doubts(NAMES) == []


def test_a_posterior_that_leans_on_a_bound_is_that_of_quadrature():
    """No error of dark ions: quantiles of the marginal, which is cut off at zero."""
    _, weights = by_grid(0.0)
    marginal = weights.sum(axis=0)
    assert marginal[0] > 0.5 * marginal.max(), "it leans on the bound"
    cumulative = np.concatenate([[0.0], np.cumsum(marginal)])
    found = sampled(0.0)
    own = np.sort(found.flat[:, 1])
    assert own[0] > 0.0
    edges = np.linspace(*BOXES["readout_error_dark"], 241)
    for level in (0.025, 0.25, 0.5, 0.75, 0.975):
        reached = np.interp(np.quantile(own, level), edges, cumulative)
        assert abs(reached - level) < 4.5 * np.sqrt(level * (1 - level) / found.effective[1]), level
    low, high = found.interval()[:, 1]
    np.testing.assert_allclose([low, high], np.quantile(own, [0.025, 0.975]))


def test_what_else_it_holds():
    found = sampled()
    assert found.draws.shape == (4, DRAWS, 2)
    likelihood = np.asarray(_on_grid(posed(), jnp.asarray(found.draws[1, :5])))
    np.testing.assert_allclose(found.log_likelihood[1, :5], likelihood, rtol=1e-10)
    assert found.gradients > 4 * DRAWS
    chain = found.interval(0.5)
    assert np.all(chain[0] < chain[1])
    assert np.all(found.interval()[0] < chain[0])


def test_the_seed_makes_the_draws():
    again = sample(posed(), jnp.array([0.95, 0.01]), draws=DRAWS, warmup=400, seed=0)
    np.testing.assert_array_equal(again.draws, sampled().draws)
    assert not np.allclose(sampled(seed=1).draws, sampled().draws)


def test_progress_is_told():
    told = []
    sample(posed(), jnp.array([0.95, 0.01]), draws=DRAWS, warmup=400, on_progress=lambda *news: told.append(news))
    assert told[:2] == [("warm-up", 0, 400), ("warm-up", 400, 400)]
    assert told[-1] == ("draws", DRAWS, DRAWS)


# ------------------------------------------------------------------------------------------------ diagnostics


def test_chains_of_one_law_agree_and_shifted_ones_do_not():
    draws = np.random.default_rng(0).normal(size=(4, 1000, 3))
    draws[2, :, 1] += 1.0
    draws[:, :, 2] += np.linspace(0, 1, 1000)  # each chain drifts: its halves disagree
    agreed, shifted, drifting = rhat(draws)
    assert 0.999 < agreed < 1.005
    assert shifted > 1.02
    assert drifting > 1.02
    # Ranks: a heavy tail and a change of units alter nothing.
    np.testing.assert_allclose(rhat(np.exp(3 * draws)), [agreed, shifted, drifting], rtol=1e-12)


def test_doubts_name_their_parameters():
    draws = np.zeros((4, 10, 2))
    good = Posterior(draws, draws[..., 0], np.array([1.002, 1.003]), np.array([900.0, 1200.0]), 0, 100)
    assert good.doubts(NAMES) == []
    bad = good._replace(rhat=np.array([1.002, 1.034]), effective=np.array([900.0, 87.2]), divergences=3)
    chains, few, diverged = bad.doubts(NAMES)
    assert "disagree on `readout_error_dark` (1.034)" in chains
    assert "Fewer than 400 effective draws of `readout_error_dark` (87)" in few
    assert diverged.startswith("3 steps diverged")
    (stuck,) = good._replace(rhat=np.array([np.nan, 1.0])).doubts(NAMES)
    assert "`rabi_scale_2` (nan)" in stuck


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_demo_is_sampled(seed):
    """Seven parameters, four chains of 1,000 draws; two of them trade along a ridge that leans on the box."""
    boxes = {
        **tables.SCALES, "detuning_1_hz": (-5e3, 5e3), "detuning_2_hz": (-5e3, 5e3),
        "laser_linewidth_hz": (0.0, 2e3), **tables.READOUT,
    }  # fmt: skip
    fitted = solve(pose(tables.ion(method=Lindblad()), read_table(DEMO), boxes), optimizer="levenberg_marquardt",
                   starts=4, seed=1, sampling="sobol")  # fmt: skip
    found = sample(fitted.problem, jnp.asarray(fitted.values), chains=4, draws=1000, seed=seed)
    print(dict(zip(boxes, zip(found.rhat.round(4), found.effective.round(), strict=True), strict=True)))
    assert found.divergences == 0
    assert found.doubts(tuple(boxes)) == []

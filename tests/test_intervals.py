"""Profiles and bootstraps against parabolas, root finding and the Fisher information; who is told to disagree."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from scipy.optimize import brentq, minimize_scalar

from calibration import intervals
from calibration.data import synthesize
from calibration.least_squares import Descent, descend_one, forward
from calibration.posing import pose
from calibration.problem import Problem
from calibration.uncertainty import Z95, covariance

BOXES = {"rabi_scale_2": (0.7, 1.3), "readout_error_dark": (0.0, 0.05)}
_descend = eqx.filter_jit(lambda problem, start: descend_one(forward(problem), start))
log_likelihood_of = eqx.filter_jit(lambda problem, values: problem.log_likelihood(values))


@functools.cache
def optimum(dark: float = 0.02, shots: int = 400, noise: str = "binomial") -> tuple[Problem, np.ndarray, np.ndarray]:
    """Problem of two parameters, its optimum and Laplace covariance."""
    truth = tables.TRUTH | {"readout_error_dark": dark}
    settings = tables.settings((5.0,), cycles=21, shots=shots)
    device = tables.ion(rabi_scale_1=truth["rabi_scale_1"], readout_error_bright=truth["readout_error_bright"])
    table = synthesize(tables.ion(**truth), settings, jax.random.key(4))
    problem = pose(device, table, BOXES, noise=noise).problem
    found: Descent = _descend(problem, jnp.array([0.95, max(dark, 0.002)]))
    assert bool(found.converged)
    information = np.asarray(problem.information(found.values))
    return problem, np.asarray(found.values), covariance(information, np.asarray(problem.free.width))


# ------------------------------------------------------------------------------------------------ profiles


def test_the_profile_of_a_parabola_is_laplace():
    """A million shots a cycle: the log-likelihood is a parabola as far as it matters."""
    problem, values, cov = optimum(shots=1_000_000)
    for k, name in enumerate(BOXES):
        found = intervals.profile(problem, values, cov, name)
        std = np.sqrt(cov[k, k])
        assert found.name == name
        assert found.settled == 1.0
        assert abs(found.gain) < 1e-3
        np.testing.assert_allclose(found.ci95, values[k] + np.array([-1, 1]) * Z95 * std, atol=0.02 * std)
        np.testing.assert_allclose(found.deviance, ((found.values - values[k]) / std) ** 2, rtol=0.03, atol=0.01)


def test_the_deviance_passes_its_quantile_where_root_finding_says():
    """Against refits by bounded scalar minimization, for few shots, where the profile is no parabola."""
    problem, values, cov = optimum(shots=40)
    found = intervals.profile(problem, values, cov, "rabi_scale_2")

    def lost(scale: float) -> float:
        loss = lambda dark: -float(log_likelihood_of(problem, jnp.array([scale, dark])))
        best = minimize_scalar(loss, bounds=BOXES["readout_error_dark"], method="bounded", options={"xatol": 1e-7})
        return 2 * (best.fun + float(log_likelihood_of(problem, jnp.asarray(values)))) - intervals.CHI2_95

    std = np.sqrt(cov[0, 0])
    expected = (brentq(lost, values[0] - 3.5 * std, values[0]), brentq(lost, values[0], values[0] + 3.5 * std))
    np.testing.assert_allclose(found.ci95, expected, atol=0.01 * std)
    # Laplace would have been off by more than what is tested.
    laplace = values[0] + np.array([-1, 1]) * Z95 * std
    assert np.max(np.abs(laplace - expected)) > 0.03 * std


def test_a_profile_at_a_bound_ends_at_the_edge():
    """No error of dark ions, and few shots: the interval begins at zero, and is no symmetric one cut off."""
    problem, values, cov = optimum(dark=0.0)
    found = intervals.profile(problem, values, cov, "readout_error_dark")
    low, high = found.ci95
    assert low == 0.0
    assert values[1] < high < 0.05
    assert np.all(np.diff(found.values) >= 0)
    assert found.values[0] >= 0.0
    inside = np.interp(high, found.values, found.deviance)
    np.testing.assert_allclose(inside, intervals.CHI2_95, rtol=0.05)


def test_a_missed_optimum_is_a_gain():
    problem, values, cov = optimum()
    off = values + np.array([1.5, 0.0]) * np.sqrt(np.diag(cov))
    found = intervals.profile(problem, off, cov, "rabi_scale_2")
    # Half a chi-squared of 1.5 standard errors.
    np.testing.assert_allclose(found.gain, 0.5 * 1.5**2, rtol=0.1)
    assert intervals.profile(problem, values, cov, "rabi_scale_2").gain < 1e-3


def test_profiles_serve_noise_that_is_no_sum_of_squares():
    """Student's t, minimized by BFGS: an interval like that of projection noise, where nothing is an outlier."""
    problem, values, cov = optimum(noise="student_t")
    found = intervals.profile(problem, values, cov, "rabi_scale_2")
    low, high = found.ci95
    assert found.settled == 1.0
    assert low < values[0] < high
    std = np.sqrt(cov[0, 0])
    assert 0.7 < (high - low) / (2 * Z95 * std) < 1.5
    assert np.min(found.deviance) == 0.0


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([], []),
        (["all"], ["a", "b@monday", "b@tuesday"]),
        (["b"], ["b@monday", "b@tuesday"]),
        (["b@tuesday"], ["b@tuesday"]),
        (["a", "c"], ["a"]),
    ],
)
def test_a_name_stands_for_those_of_all_tables(wanted, expected):
    assert intervals.chosen(["a", "b@monday", "b@tuesday"], wanted) == expected


# ------------------------------------------------------------------------------------------------ bootstrap


def test_the_bootstrap_scatters_as_the_information_says():
    problem, values, cov = optimum()
    told = []
    found = intervals.bootstrap(problem, values, refits=200, seed=1, on_progress=lambda *news: told.append(news))
    assert found.draws.shape == (200, 2)
    assert found.settled == 1.0
    std = np.sqrt(np.diag(cov))
    np.testing.assert_allclose(found.std / std, 1.0, atol=4 / np.sqrt(2 * 200))
    np.testing.assert_allclose(found.bias / std, 0.0, atol=4 / np.sqrt(200))
    np.testing.assert_allclose(found.ci95, np.quantile(found.draws, [0.025, 0.975], axis=0))
    np.testing.assert_allclose(found.std, np.std(found.draws, axis=0, ddof=1))
    assert np.max(np.abs(np.corrcoef(found.draws.T) - cov / np.outer(std, std))) < 4 / np.sqrt(200)
    assert told[0] == ("refits", 0, 200)
    assert told[-1] == ("refits", 200, 200)


def test_refits_are_of_the_seed_and_of_their_number():
    problem, values, _ = optimum()
    one, same = (intervals.bootstrap(problem, values, refits=30, seed=1) for _ in range(2))
    other = intervals.bootstrap(problem, values, refits=30, seed=2)
    np.testing.assert_array_equal(one.draws, same.draws)
    assert len(one.draws) == 30
    assert not np.allclose(one.draws, other.draws)


# ------------------------------------------------------------------------------------------------ who disagrees

PRIOR = {"a": (0.0, 1.0), "b": (0.0, 1.0), "c": (0.0, 1.0)}
LAPLACE = {"a": (0.4, 0.6), "b": (0.0, 0.3), "c": (0.5, 0.7)}


def test_methods_that_agree_need_no_words():
    near = {name: (low + 0.01, high + 0.01) for name, (low, high) in LAPLACE.items()}
    assert intervals.disagreements({"laplace": LAPLACE, "profile": near, "posterior": near}, PRIOR) == []
    assert intervals.disagreements({"laplace": LAPLACE}, PRIOR) == []


def test_a_disagreement_is_one_sentence_a_parameter():
    """It names what to use instead, and whether the box or the shape is to blame."""
    methods = {
        "laplace": LAPLACE,
        "bootstrap": {"a": (0.3, 0.6), "b": (0.0, 0.5), "c": (0.5, 0.7)},
        "profile": {"a": (0.3, 0.6)},
        "posterior": {"b": (0.1, 0.5), "c": (0.51, 0.7)},
    }
    first, second = intervals.disagreements(methods, PRIOR)
    assert first.startswith("`a`: Laplace's interval [0.4, 0.6] is not to be trusted: the likelihood is no parabola")
    assert "The bootstrap gives [0.3, 0.6]; the profile likelihood gives [0.3, 0.6]." in first
    assert first.endswith("Use that of the profile likelihood.")
    assert second.startswith("`b`: Laplace's interval [0, 0.3]")
    assert "cut off by the prior box" in second
    assert second.endswith("Use that of the posterior.")


# ------------------------------------------------------------------------------------------------ means


@pytest.mark.parametrize("runs", [20, 2000])
def test_the_interval_of_a_mean_is_its_standard_error(runs):
    values = np.random.default_rng(0).normal(3.0, 1.0, runs)
    mean, low, high = intervals.mean_interval(values)
    assert mean == pytest.approx(values.mean())
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(runs), rel=0.1)


@pytest.mark.parametrize("values", [[1.0], [1.0, np.nan]])
def test_a_mean_of_too_little_has_no_interval(values):
    with pytest.raises(ValueError, match="at least two finite values"):
        intervals.mean_interval(values)

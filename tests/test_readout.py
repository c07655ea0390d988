"""Readout errors and shot noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from twin.readout import (
    assignment_probability,
    bright_photons,
    dark_photons,
    sample_counts,
    standard_error,
    threshold_errors,
)


def test_assignment_mixes_the_two_outcomes():
    assert assignment_probability(1.0, 0.02, 0.03) == pytest.approx(0.97, rel=1e-15)
    assert assignment_probability(0.0, 0.02, 0.03) == pytest.approx(0.02, rel=1e-15)
    assert assignment_probability(0.4, 0.02, 0.03) == pytest.approx(0.4 * 0.97 + 0.6 * 0.02, rel=1e-15)
    p = jnp.linspace(0, 1, 11)
    np.testing.assert_array_equal(assignment_probability(p, 0, 0), p)
    np.testing.assert_allclose(assignment_probability(p, 0.5, 0.5), 0.5)


def test_assignment_derivatives():
    # dP/dp = 1 - e_b - e_d, dP/de_b = 1 - p, dP/de_d = -p.
    gradient = jax.grad(assignment_probability, argnums=(0, 1, 2))(0.4, 0.02, 0.03)
    np.testing.assert_allclose(gradient, [0.95, 0.6, -0.4], rtol=1e-14)


@pytest.mark.parametrize("bad", [-0.01, 1.01, np.nan])
def test_readout_errors_outside_the_unit_interval_are_refused(bad):
    with pytest.raises(ValueError, match=r"`readout_error_bright` must be in \[0, 1\], but is"):
        assignment_probability(0.5, bad, 0.0)
    with pytest.raises(ValueError, match=r"`readout_error_dark` must be in \[0, 1\], but is"):
        assignment_probability(0.5, 0.0, jnp.array([0.1, bad]))
    p = jax.jit(assignment_probability)(0.5, jnp.array([0.1, bad]), 0.0)
    np.testing.assert_array_equal(jnp.isnan(p), [False, True])


def test_projection_noise():
    assert standard_error(0.42, 200) == pytest.approx(0.034900, rel=1e-5)
    np.testing.assert_allclose(standard_error(jnp.array([0.5, 0.0, 1.0]), 100), [0.05, 0, 0])
    assert np.isnan(standard_error(1.1, 100))


@pytest.mark.parametrize(("p", "shots"), [(0.42, 200), (0.03, 40), (0.97, 1000), (0.4, 1)])
def test_counts_follow_the_binomial_law(p, shots):
    lanes = 20000
    counts = np.asarray(sample_counts(jax.random.key(0), jnp.full(lanes, p), shots))
    assert ((counts >= 0) & (counts <= shots) & (counts == np.floor(counts))).all()
    # Five standard deviations of the sample mean and of the sample variance.
    law = stats.binom(shots, p)
    variance, excess = law.stats(moments="vk")
    assert counts.mean() == pytest.approx(law.mean(), abs=5 * np.sqrt(variance / lanes))
    assert counts.var() == pytest.approx(variance, abs=5 * variance * np.sqrt((2 + excess) / lanes) + 1e-12)
    assert (counts / shots).std() == pytest.approx(float(standard_error(p, shots)), rel=0.03)
    # The whole histogram: cells with fewer than five expected counts are merged into the tails.
    n = np.arange(shots + 1)
    expected = lanes * law.pmf(n)
    full = expected >= 5
    observed = np.bincount(counts.astype(int), minlength=shots + 1)
    cells = np.r_[observed[full], observed[~full].sum()], np.r_[expected[full], expected[~full].sum()]
    chi2 = np.sum((cells[0] - cells[1]) ** 2 / np.maximum(cells[1], 1e-9))
    assert chi2 < stats.chi2(full.sum()).ppf(1 - 1e-5)


def test_counts_are_those_of_their_key():
    p, shots = jnp.linspace(0.1, 0.9, 50), jnp.full(50, 300)
    first = sample_counts(jax.random.key(1), p, shots)
    np.testing.assert_array_equal(first, sample_counts(jax.random.key(1), p, shots))
    assert (first != sample_counts(jax.random.key(2), p, shots)).any()


def test_lanes_are_independent():
    counts = sample_counts(jax.random.key(3), jnp.full((2, 20000), 0.3), 50)
    assert abs(np.corrcoef(counts)[0, 1]) < 5 / np.sqrt(20000)


def test_certain_outcomes_and_no_shots():
    counts = sample_counts(
        jax.random.key(0), jnp.array([0.0, 1.0, 0.5, -1e-9, 1 + 1e-9]), jnp.array([80, 80, 0, 80, 80])
    )
    np.testing.assert_array_equal(counts, [0, 80, 0, 0, 80])


@pytest.mark.parametrize(
    ("p", "shots", "sentence"),
    [
        (-0.01, 10, r"`probability` must be in \[0, 1\], but is -0.01"),
        (1.2, 10, r"`probability` must be in \[0, 1\], but is 1.2"),
        (0.5, -1, "`shots` must be a non-negative whole number, but is -1"),
        (0.5, 2.5, "`shots` must be a non-negative whole number, but is 2.5"),
    ],
)
def test_bad_samples_are_refused(p, shots, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample_counts(jax.random.key(0), p, shots)
    lanes = jax.jit(lambda p, n: sample_counts(jax.random.key(0), p, n))(jnp.array([0.3, p]), jnp.array([10.0, shots]))
    np.testing.assert_array_equal(jnp.isnan(lanes), [False, True])


def test_an_invalid_lane_stays_invalid_and_alone():
    p = jnp.full(20, 0.3)
    clean, dirty = (sample_counts(jax.random.key(5), q, 100) for q in (p, p.at[4].set(jnp.nan)))
    assert np.isnan(dirty[4])
    np.testing.assert_array_equal(np.delete(clean, 4), np.delete(dirty, 4))


def test_a_new_value_does_not_recompile():
    traces = []

    @jax.jit
    def draw(key, p, shots, e_bright):
        traces.append(None)
        return sample_counts(key, assignment_probability(p, e_bright, 0.0), shots)

    for seed in range(3):
        draw(jax.random.key(seed), 0.1 * seed, 100.0 + seed, 0.01 * seed)
    assert len(traces) == 1


# Detected photons a second of the ion and of the background, and the lifetime of 2D3/2.
LAB = {"bright_rate_per_s": 50e3, "background_rate_per_s": 0.5e3, "lifetime_s": 52.7e-3}


def photon_laws(detection_s):
    n = jnp.arange(int(120e3 * detection_s) + 40)
    rates = LAB["bright_rate_per_s"], LAB["background_rate_per_s"], detection_s
    return bright_photons(n, *rates), dark_photons(n, *rates, LAB["lifetime_s"])


@pytest.mark.parametrize(
    ("detection_s", "threshold", "dark", "bright"), [(0.3e-3, 4, 4.24e-3, 1.87e-4), (1e-3, 30, 7.75e-3, 7.3e-4)]
)
def test_threshold_errors_of_the_reference(detection_s, threshold, dark, bright):
    e_bright, e_dark = threshold_errors(threshold, **LAB, detection_s=detection_s)
    assert e_dark == pytest.approx(dark, rel=2e-3)
    assert e_bright == pytest.approx(bright, rel=1e-2)
    laws = photon_laws(detection_s)
    assert e_bright == pytest.approx(float(jnp.sum(laws[0][:threshold])), rel=1e-10)
    assert e_dark == pytest.approx(float(jnp.sum(laws[1][threshold:])), rel=1e-9)


@pytest.mark.parametrize("detection_s", [0.3e-3, 1e-3])
def test_photon_laws_are_normalized_and_those_of_a_decay_in_time(detection_s):
    bright, dark = photon_laws(detection_s)
    np.testing.assert_allclose([jnp.sum(bright), jnp.sum(dark)], 1, atol=1e-12)
    shining, background, lifetime = LAB["bright_rate_per_s"], LAB["background_rate_per_s"], LAB["lifetime_s"]
    for n in (0, 1, 5, 17, 40):
        mean = lambda u: background * detection_s + shining * (detection_s - u)
        decayed = lambda u, n=n, mean=mean: np.exp(-u / lifetime) / lifetime * stats.poisson.pmf(n, mean(u))
        late, _ = integrate.quad(decayed, 0, detection_s, epsabs=1e-14, epsrel=1e-11, limit=200)
        never = np.exp(-detection_s / lifetime) * stats.poisson.pmf(n, background * detection_s)
        assert dark[n] == pytest.approx(never + late, rel=1e-9, abs=1e-14)


def test_photon_counts_of_simulated_shots():
    rng, shots, t = np.random.default_rng(4), 400_000, 0.3e-3
    after = np.maximum(t - rng.exponential(LAB["lifetime_s"], shots), 0)
    seen = rng.poisson(LAB["background_rate_per_s"] * t + LAB["bright_rate_per_s"] * after)
    _, e_dark = threshold_errors(4, **LAB, detection_s=t)
    assert np.mean(seen >= 4) == pytest.approx(e_dark, abs=5 * np.sqrt(e_dark / shots))


def test_threshold_errors_have_slopes_in_every_number():
    names = ("bright_rate_per_s", "background_rate_per_s", "detection_s", "lifetime_s")
    point = np.array([50e3, 0.5e3, 0.3e-3, 52.7e-3])
    errors = lambda v: jnp.stack(threshold_errors(4, **dict(zip(names, v, strict=True))))
    slopes = jax.jacrev(errors)(jnp.asarray(point))
    for k in range(4):
        step = 1e-5 * point * (np.arange(4) == k)
        difference = (errors(point + step) - errors(point - step)) / (2e-5 * point[k])
        np.testing.assert_allclose(slopes[:, k], difference, rtol=1e-6, atol=1e-12 / point[k])


def test_bad_photon_laws_are_refused():
    with pytest.raises(ValueError, match="`threshold` must be at least 1, but is 0"):
        threshold_errors(0, **LAB, detection_s=1e-3)
    with pytest.raises(ValueError, match=r"`bright_rate_per_s \* lifetime_s` must be larger than 1, but is 0.5"):
        dark_photons(2, 10.0, 0.0, 1e-3, 0.05)
    assert np.isnan(jax.jit(dark_photons)(2, 10.0, 0.0, 1e-3, 0.05))

"""Debye-Waller factors and their thermal average, against direct sums over phonon numbers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import eval_laguerre, hyp1f1

from twin import motion
from twin.closed_form import thermal_carrier_factor

N_BARS = [0.0, 0.05, 1.0, 9.8, 20.0]
quadrature = jax.jit(motion.thermal_quadrature, static_argnums=1)


def carrier_factor(eta, n):
    return motion.carrier_factor(jnp.asarray(eta, float), jnp.asarray(n, float))


@functools.cache
def thermal(n_bar):
    """Phonon numbers and their probabilities, until nothing is left."""
    n = np.arange(3000)
    return n, np.exp(n * math.log(n_bar / (n_bar + 1))) / (n_bar + 1) if n_bar else (n == 0).astype(float)


def test_the_thermal_sum_is_complete():
    for n_bar in N_BARS:
        n, p = thermal(n_bar)
        assert p.sum() == pytest.approx(1, abs=1e-14)
        assert (n * p).sum() == pytest.approx(n_bar, abs=1e-12)


# ------------------------------------------------------------------------------------------------ quadrature


@pytest.mark.parametrize("nodes", [1, 2, 5, 8])
@pytest.mark.parametrize("n_bar", N_BARS)
def test_quadrature_is_exact_for_polynomials(n_bar, nodes):
    numbers, weights = quadrature(n_bar, nodes)
    assert weights.sum() == pytest.approx(1, abs=1e-13)
    assert np.all(weights >= 0)
    # Laguerre polynomials of the phonon number, at a scale where they are of order one.
    n, p = thermal(n_bar)
    scale = 1 / (n_bar + 1)
    for degree in range(2 * nodes):
        exact = (p * eval_laguerre(degree, scale * n)).sum()
        assert (weights * eval_laguerre(degree, scale * numbers)).sum() == pytest.approx(exact, abs=1e-11), degree


def test_quadrature_is_not_exact_beyond_its_degree():
    n, p = thermal(1.0)
    numbers, weights = quadrature(1.0, 3)
    # A polynomial that vanishes at all nodes, squared: the sum is zero, the mean is not.
    values = lambda x: np.prod([(x - node) ** 2 for node in np.asarray(numbers)], axis=0)
    assert (weights * values(numbers)).sum() == pytest.approx(0, abs=1e-12)
    assert (p * values(n)).sum() > 1


@pytest.mark.parametrize("n_bar", N_BARS)
def test_thermal_means_of_transfers(n_bar):
    # eta = 0.08, areas to 1.3 pi: what a hot ion asks of eight nodes. x and y, jointly.
    eta, theta_1, theta_2 = 0.08, 1.3 * math.pi, 0.7 * math.pi
    n, p = thermal(n_bar)
    keep = p > 1e-18
    factors = np.exp(-(eta**2) / 2) * np.array([eval_laguerre(int(k), eta**2) for k in n[keep]])
    x = lambda f: np.sin(theta_1 * f / 2) ** 2
    kept = lambda f: np.cos(theta_2 * f / 2) ** 2
    numbers, weights = quadrature(n_bar, 8)
    f = np.asarray(carrier_factor(eta, numbers))
    assert (weights * x(f)).sum() == pytest.approx((p[keep] * x(factors)).sum(), abs=1e-7)
    joint = (p[keep] * x(factors) * kept(factors)).sum()
    assert (weights * x(f) * kept(f)).sum() == pytest.approx(joint, abs=1e-7)
    if n_bar >= 1:
        product = (p[keep] * x(factors)).sum() * (p[keep] * kept(factors)).sum()
        assert abs(joint - product) > 1e-5


@pytest.mark.parametrize("nodes", [2, 8])
def test_derivative_with_respect_to_n_bar(nodes):
    # d<f>/d n_bar of a mean that is known: exp(-eta^2 (n_bar + 1/2)), from the cold ion on.
    eta = 0.3

    @jax.jit
    def mean(n_bar):
        numbers, weights = motion.thermal_quadrature(n_bar, nodes)
        return jnp.sum(weights * carrier_factor(eta, numbers))

    for n_bar in (0.0, 1e-3, 0.5):
        expected = -(eta**2) * math.exp(-(eta**2) * (n_bar + 0.5))
        tolerance = 1e-6 if nodes == 8 else 2e-3
        assert jax.grad(mean)(n_bar) == pytest.approx(expected, rel=tolerance)
        assert jax.jvp(mean, (n_bar,), (1.0,))[1] == pytest.approx(expected, rel=tolerance)


# ------------------------------------------------------------------------------------------------ carrier factor


@pytest.mark.parametrize("eta", [0.0, 0.0784, 0.3])
def test_carrier_factor_is_laguerre(eta):
    n = np.arange(80)
    expected = np.exp(-(eta**2) / 2) * eval_laguerre(n, eta**2)
    np.testing.assert_allclose(carrier_factor(eta, n), expected, atol=1e-13)


def test_carrier_factor_between_integers_is_the_continued_polynomial():
    # L_n(z) = 1F1(-n, 1, z).
    n, z = np.array([0.3, 2.7, 11.1, 55.5]), 0.08
    expected = np.exp(-z / 2) * hyp1f1(-n, 1.0, z)
    np.testing.assert_allclose(carrier_factor(math.sqrt(z), n), expected, rtol=1e-12)


def test_thermal_carrier_factor():
    # exp(-eta^2 (n_bar + 1/2)) for eta = .0784, n_bar = 9.8.
    numbers, weights = quadrature(9.8, 8)
    mean = float(jnp.sum(weights * carrier_factor(0.0784, numbers)))
    assert mean == pytest.approx(0.938652851822, rel=1e-10)
    assert mean == pytest.approx(float(thermal_carrier_factor(0.0784, 9.8)), rel=1e-12)


def test_the_cold_ion_has_one_factor():
    numbers, weights = quadrature(0.0, 6)
    assert weights[0] == pytest.approx(1, abs=1e-12)
    assert carrier_factor(0.1, numbers)[0] == pytest.approx(math.exp(-0.005), rel=1e-12)


def test_carrier_factor_broadcasts_and_differentiates():
    eta, n = jnp.array([0.05, 0.2]), jnp.array([[0.0], [3.0], [20.0]])
    table = carrier_factor(eta, n)
    assert table.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            assert table[i, j] == pytest.approx(float(carrier_factor(eta[j], n[i, 0])), rel=1e-15)
    step = 1e-6
    slope = jax.grad(lambda e: carrier_factor(e, 7.0))(0.2)
    difference = carrier_factor(0.2 + step, 7.0) - carrier_factor(0.2 - step, 7.0)
    assert slope == pytest.approx(float(difference) / (2 * step), rel=1e-8)

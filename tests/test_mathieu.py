"""Mathieu's equation against its own integration, its characteristic values, and known exponents and limits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.special import mathieu_a, mathieu_b

from twin import mathieu

exponent = jax.jit(mathieu.characteristic_exponent)
POINTS = [(0.0, 0.3), (0.01, 0.3), (-0.01, 0.3), (0.2, 0.6), (-0.2, 0.75), (0.0, 0.9), (0.9, 0.05), (1e-4, 0.0)]


@functools.cache
def integrated(a, q, end=math.pi):
    """Even and odd solution and their slopes at `end`, by Runge-Kutta steps."""
    f = lambda t, u: [u[1], -(a - 2 * q * math.cos(2 * t)) * u[0], u[3], -(a - 2 * q * math.cos(2 * t)) * u[2]]
    return solve_ivp(f, (0, end), [1.0, 0.0, 0.0, 1.0], method="DOP853", rtol=1e-13, atol=1e-15).y[:, -1]


# ------------------------------------------------------------------------------------------------ exponent


@pytest.mark.parametrize(
    ("a", "q", "beta"),
    [
        (0, 0.1, 0.070849553),
        (0, 0.2, 0.142551327),
        (0, 0.3, 0.216059135),
        (0, 0.5, 0.373744122),
        (0.01, 0.3, 0.239133577),
        (-0.01, 0.3, 0.190234381),
    ],
)
def test_known_exponents(a, q, beta):
    assert exponent(a, q) == pytest.approx(beta, abs=6e-10)


def test_lowest_order_is_that_of_the_pseudopotential():
    assert mathieu.pseudopotential_exponent(0, 0.3) == pytest.approx(0.212132034, abs=1e-9)


@pytest.mark.parametrize(("a", "q"), [*POINTS, (-0.5, 1.15), (-2.67, 2.9)])
def test_exponent_is_the_trace_of_one_period(a, q):
    # cos(pi beta) = u_1(pi): the monodromy matrix has determinant one.
    assert jnp.cos(jnp.pi * exponent(a, q)) == pytest.approx(integrated(a, q)[0], abs=1e-11)


@pytest.mark.parametrize("a", [1e-8, 1e-3, 0.25, 0.999])
def test_without_rf_the_exponent_is_the_root_of_a(a):
    assert exponent(a, 0.0) == pytest.approx(math.sqrt(a), rel=1e-12)


@pytest.mark.parametrize("q", [1.0, 3.0])
def test_small_exponents_follow_the_distance_from_the_boundary(q):
    # beta^2 is analytic in a and vanishes at a_0: close to it a straight line.
    edge = mathieu_a(0, q)
    width = mathieu_b(1, q) - edge
    squares = [float(exponent(edge + width * x, q)) ** 2 for x in (1e-5, 2e-5)]
    assert squares[1] / squares[0] == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize("q", [0.2, 0.7, 2.0, 6.0, 10.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_region_ends_at_the_characteristic_values(q, sign):
    # At q = 10 the first region is 4e-4 wide.
    low, high = mathieu_a(0, q), mathieu_b(1, q)
    near = 1e-6 * (high - low)
    assert mathieu.stable(np.array([low + near, high - near]), sign * q).tolist() == [True, True]
    assert mathieu.stable(np.array([low - near, high + near]), sign * q).tolist() == [False, False]
    assert np.isnan(exponent(high + near, sign * q)) and np.isnan(exponent(low - near, sign * q))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_higher_stability_regions_are_refused(order):
    # Their motion is bounded, |cos pi beta| < 1, but not what a trap's exponent means.
    a = (float(mathieu_a(order, 0.7)) + float(mathieu_b(order + 1, 0.7))) / 2
    assert abs(integrated(a, 0.7)[0]) < 1
    assert not mathieu.stable(a, 0.7)
    assert np.isnan(exponent(a, 0.7))


def test_a_free_ion_is_not_stable():
    assert not mathieu.stable(0.0, 0.0)
    assert np.isnan(exponent(0.0, 0.0))


def test_the_sign_of_q_is_a_choice_of_phase():
    for a, q in POINTS:
        assert exponent(a, -q) == pytest.approx(float(exponent(a, q)), rel=1e-12)


@pytest.mark.parametrize("q", [0.0, -0.3, 0.9, 3.0])
@pytest.mark.parametrize("beta", [0.05, 0.5, 0.97])
def test_the_characteristic_value_is_the_inverse(beta, q):
    # Two methods, an eigenvalue problem and integral equations.
    assert exponent(mathieu.characteristic_value(beta, q), q) == pytest.approx(beta, abs=3e-12)
    step = 1e-4
    difference = (
        (mathieu.characteristic_value(beta, q + step) - mathieu.characteristic_value(beta, q - step)) / 2 / step
    )
    assert jax.grad(mathieu.characteristic_value, 1)(beta, q) == pytest.approx(float(difference), rel=1e-6, abs=1e-9)


def test_the_characteristic_value_outside_its_range():
    assert np.all(np.isnan(mathieu.characteristic_value(np.array([0.0, 1.0, -0.2, np.nan]), 0.3)))


# ------------------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize(("a", "q"), [*POINTS[:-1], (0.04, 0.0)])
def test_derivatives_of_the_exponent(a, q):
    step = 1e-5
    slopes = jax.grad(mathieu.characteristic_exponent, (0, 1))(a, q)
    for slope, (da, dq) in zip(slopes, [(step, 0), (0, step)], strict=True):
        difference = (exponent(a + da, q + dq) - exponent(a - da, q - dq)) / (2 * step)
        assert slope == pytest.approx(float(difference), rel=1e-6, abs=1e-10)


def test_second_derivative_at_zero_q():
    # beta^2 = a - q^2/(2 (a - 1)) + ..., so that d^2 beta/dq^2 = 1/(2 (1 - a) beta).
    a = 0.04
    curvature = jax.grad(jax.grad(mathieu.characteristic_exponent, 1), 1)(a, 0.0)
    assert curvature == pytest.approx(1 / (2 * (1 - a) * math.sqrt(a)), rel=1e-9)


def test_an_unstable_lane_leaves_the_others_alone():
    total = lambda q: jnp.nansum(mathieu.characteristic_exponent(0.0, q))
    slopes = jax.grad(total)(jnp.array([0.3, 2.0, 0.5]))
    assert np.all(np.isfinite(slopes))
    assert slopes[0] == pytest.approx(float(jax.grad(total)(0.3)), rel=1e-12)


def test_arguments_broadcast():
    a, q = np.linspace(-0.05, 0.05, 3)[:, None], np.linspace(0.4, 0.8, 4)
    table = exponent(a, q)
    assert table.shape == (3, 4)
    assert table[2, 1] == pytest.approx(float(exponent(a[2, 0], q[1])), rel=1e-13)


# ------------------------------------------------------------------------------------------------ approximations


def test_order_of_the_approximations():
    # Relative errors grow as q^2 and q^4 (a = 0): doubling q multiplies them by 4 and 16.
    def error(approximation, q):
        return abs(float(approximation(0, q) / exponent(0, q)) - 1)

    for approximation, order in [(mathieu.pseudopotential_exponent, 2), (mathieu.second_order_exponent, 4)]:
        assert math.log2(error(approximation, 0.2) / error(approximation, 0.1)) == pytest.approx(order, abs=0.7)
    assert error(mathieu.second_order_exponent, 0.3) == pytest.approx(4.4e-5, rel=0.02)


def test_second_order_with_a():
    assert mathieu.second_order_exponent(0.01, 0.2) == pytest.approx(float(exponent(0.01, 0.2)), rel=1e-5)


def test_approximations_are_nan_where_they_have_no_root():
    assert np.isnan(mathieu.pseudopotential_exponent(-0.1, 0.3))
    assert np.isnan(mathieu.second_order_exponent(-0.1, 0.3))
    assert mathieu.pseudopotential_exponent(0.0, 0.0) == 0


# ------------------------------------------------------------------------------------------------ boundaries


def test_largest_stable_q_without_a_static_field():
    assert mathieu.largest_stable_q(0.0) == pytest.approx(0.908046, abs=1e-6)


@pytest.mark.parametrize("a", [-10.0, -1.0, -0.2, 0.0, 0.5])
def test_boundaries_are_characteristic_values(a):
    assert mathieu_b(1, float(mathieu.largest_stable_q(a))) == pytest.approx(a, abs=1e-9)
    if a < 0:
        assert mathieu_a(0, float(mathieu.smallest_stable_q(a))) == pytest.approx(a, abs=1e-9)
    else:
        assert mathieu.smallest_stable_q(a) == 0


def test_boundaries_have_derivatives():
    step = 1e-4
    for boundary in (mathieu.largest_stable_q, mathieu.smallest_stable_q):
        f = jax.jit(boundary)
        difference = (f(-0.1 + step) - f(-0.1 - step)) / (2 * step)
        assert jax.grad(boundary)(-0.1) == pytest.approx(float(difference), rel=1e-6)
        second = (f(-0.1 + step) - 2 * f(-0.1) + f(-0.1 - step)) / step**2
        assert jax.grad(jax.grad(boundary))(-0.1) == pytest.approx(float(second), rel=1e-5)


def test_boundaries_beyond_their_range_are_nan():
    assert np.all(np.isnan(mathieu.largest_stable_q(np.array([1.2, -15.0]))))
    assert np.all(np.isnan(mathieu.smallest_stable_q(np.array([1.2, -15.0]))))


# ------------------------------------------------------------------------------------------------ Floquet solution


@pytest.mark.parametrize(("a", "q"), POINTS)
def test_floquet_solution_obeys_the_equation(a, q):
    c = np.asarray(mathieu.floquet_coefficients(a, q, 8))
    frequencies = float(exponent(a, q)) + 2 * np.arange(-8, 9)
    # At xi = 0 it is even, so it is u_1 times its value there.
    for end in (1.0, 20.0):
        solution = (c * np.cos(frequencies * end)).sum() / c.sum()
        assert solution == pytest.approx(integrated(a, q, end)[0], abs=2e-10)


def test_floquet_coefficients_to_lowest_order():
    c = mathieu.floquet_coefficients(0.0, 1e-3, 1)
    assert c[1] == 1
    np.testing.assert_allclose(np.asarray(c)[[0, 2]], -1e-3 / 4, rtol=1e-3)


def test_more_harmonics_change_no_coefficient():
    few, many = mathieu.floquet_coefficients(0.1, 0.7, 2), mathieu.floquet_coefficients(0.1, 0.7, 9)
    np.testing.assert_allclose(few, many[7:12], rtol=1e-14)


@pytest.mark.parametrize(("a", "q"), [(0.0, 0.3), (-0.2, 0.75), (0.0, 0.9)])
def test_driven_solution_obeys_the_equation(a, q):
    d, n = np.asarray(mathieu.driven_coefficients(a, q, 8)), np.arange(9)
    xi = np.linspace(0, 3, 7)[:, None]
    u, curvature = (d * np.cos(2 * n * xi)).sum(1), (-4 * n**2 * d * np.cos(2 * n * xi)).sum(1)
    np.testing.assert_allclose(curvature + (a - 2 * q * np.cos(2 * xi[:, 0])) * u, 1, atol=1e-9 * abs(d[0]))


def test_driven_solution_to_lowest_order():
    d = mathieu.driven_coefficients(1e-5, 1e-2, 1)
    assert d[0] == pytest.approx(1 / (1e-5 + 1e-4 / 2), rel=1e-4)
    assert d[1] / d[0] == pytest.approx(-1e-2 / 2, rel=1e-4)


def test_floquet_solutions_are_nan_outside():
    assert np.all(np.isnan(mathieu.driven_coefficients(0.0, 0.95)))
    assert np.isnan(mathieu.floquet_coefficients(0.0, 0.95)[0])
    with pytest.raises(ValueError, match="`harmonics` must be at least 1, but is 0"):
        mathieu.floquet_coefficients(0.0, 0.3, 0)

"""Exact solutions against direct integration of the Schroedinger equation, reference values and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp
from scipy.special import eval_laguerre

from twin import closed_form as cf

STARTS = pytest.mark.parametrize("start", ["v", "s"])
GRID = np.linspace(0.1, np.pi - 0.05, 15)


def gaussian(t, area, center, sigma):
    return area / (np.sqrt(2 * np.pi) * sigma) * np.exp(-((t - center) ** 2) / (2 * sigma**2))


def integrate(theta_1, theta_2, separation, sigma_1=1.0, sigma_2=1.0, *, start="v", phases=(0.0, 0.0), times=None):
    """Amplitudes (c_v, c_s, c_m) by DOP853 at rtol 1e-12; pulse 1 at time 0, many pairs of areas in one system."""
    theta_1, theta_2 = np.broadcast_arrays(theta_1, theta_2)
    shape, (a, b) = theta_1.shape, (theta_1.ravel(), theta_2.ravel())
    e_1, e_2 = np.exp(-1j * np.array(phases))
    c_0 = np.zeros((3, a.size), complex)
    c_0["vs".index(start)] = 1

    def rhs(t, c):
        v, s, m = c.reshape(3, -1)
        half_1, half_2 = gaussian(t, a, 0, sigma_1) / 2, gaussian(t, b, separation, sigma_2) / 2
        to_s = half_1 * e_1 * v + half_2 * e_2.conj() * m
        return -1j * np.concatenate([half_1 * e_1.conj() * s, to_s, half_2 * e_2 * s])

    span = min(-9 * sigma_1, separation - 9 * sigma_2), max(9 * sigma_1, separation + 9 * sigma_2)
    t_eval = span[1:] if times is None else times
    c = solve_ivp(rhs, span, c_0.ravel(), method="DOP853", rtol=1e-12, atol=1e-14, t_eval=t_eval).y
    return c.reshape(3, *shape) if times is None else np.moveaxis(c.reshape(3, *shape, -1), -1, 0)


def populations(amplitudes):
    return np.abs(np.asarray(amplitudes)) ** 2


# ------------------------------------------------------------------------------------------------ the oracle itself


@pytest.mark.parametrize(
    ("start", "theta", "separation", "expected"),
    [
        ("v", np.pi / 2, 2, (0.5041948112, 0.2741327549, 0.2216724339)),
        ("v", np.pi, 2, (0.0013465530, 0.0019125407, 0.9967409063)),
        ("s", np.pi / 2, 2, (0.4935761142, 0.2322911309, 0.2741327549)),
        ("v", np.pi / 2, 4, (0.5000409782, 0.2507196016, 0.2492394201)),
    ],
)
def test_direct_integration_gives_the_reference_populations(start, theta, separation, expected):
    np.testing.assert_allclose(
        populations(integrate(theta, theta, separation, start=start)), expected, rtol=0, atol=1e-8
    )


# ------------------------------------------------------------------------------------------------ pulse areas


def test_peak_of_a_pi_pulse():
    assert cf.gaussian_area(1.253314137, 1.0) == pytest.approx(np.pi, rel=1e-9)
    assert cf.gaussian_area(2 * np.pi * 9.97356e3, 20e-6) == pytest.approx(np.pi, rel=1e-5)


def test_partial_area_is_the_integral_of_the_envelope():
    for t in (-30e-6, 5e-6, 70e-6):
        expected, _ = quad(gaussian, -300e-6, t, args=(2.5, 10e-6, 20e-6), epsabs=1e-14, points=[10e-6])
        assert cf.partial_area(t, 2.5, 10e-6, 20e-6) == pytest.approx(expected, rel=1e-10)
    assert cf.partial_area(10e-6, 2.5, 10e-6, 20e-6) == 1.25
    # The leading tail keeps its digits: (theta/2) erfc(8/sqrt 2) at 8 sigma.
    assert cf.partial_area(-8.0, 2.0, 0.0, 1.0) == pytest.approx(1.2441921148543568e-15, rel=1e-12, abs=0)


# ------------------------------------------------------------------------------------------------ set points


def test_set_area_and_back():
    x = jnp.concatenate([jnp.array([0.0, 1e-300, 1e-12, 1 - 1e-12, 1.0]), jnp.linspace(0.01, 0.99, 50)])
    np.testing.assert_allclose(jnp.sin(cf.set_area(x) / 2) ** 2, x, rtol=1e-14)
    assert cf.set_area(1.0) == np.pi
    assert cf.set_area(0.0) == 0
    assert cf.set_area(0.5) == pytest.approx(np.pi / 2)
    # pi - theta near x = 1, which asin would lose: 2 asin(sqrt(1 - x)).
    assert np.pi - cf.set_area(1 - 1e-10) == pytest.approx(2 * np.arcsin(np.sqrt(1 - (1 - 1e-10))), rel=1e-9)


def test_set_area_has_derivative_one_in_the_population():
    derivative = jax.vmap(jax.grad(lambda x: jnp.sin(cf.set_area(x) / 2) ** 2))
    x = jnp.concatenate([10.0 ** -jnp.arange(1, 11), 1 - 10.0 ** -jnp.arange(1, 11), jnp.linspace(0.01, 0.99, 50)])
    np.testing.assert_allclose(derivative(x), 1.0, rtol=0, atol=1e-10)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_set_area_has_a_finite_derivative_at_its_ends(end):
    for rule in (jax.grad, jax.jacfwd):
        assert rule(cf.set_area)(end) == 0
        assert rule(lambda x: jnp.sin(1.02 * cf.set_area(x) / 2) ** 2)(end) == 0
    assert np.isfinite(jax.grad(jax.grad(cf.set_area))(end))
    assert jax.grad(cf.set_area)(0.25) == pytest.approx(1 / np.sqrt(0.25 * 0.75), rel=1e-14)


def test_set_area_outside_the_range_is_nan():
    assert np.isnan(cf.set_area(jnp.array([-1e-3, 1.001]))).all()


# ------------------------------------------------------------------------------------------------ separated pulses


def test_memristor_set_point():
    p_v, y, p_m = cf.separated_populations(cf.set_area(0.6), cf.set_area(0.3))
    assert y == pytest.approx(0.42, abs=1e-9)
    assert p_v == pytest.approx(0.4, abs=1e-14)
    assert p_m == pytest.approx(0.18, abs=1e-14)
    # V scheme: theta_1 = 2 acos(sqrt x) from s.
    assert cf.separated_populations(cf.set_area(1 - 0.6), cf.set_area(0.3), "s")[1] == pytest.approx(0.42, abs=1e-14)


@STARTS
def test_separated_pulses_against_integration(start):
    theta_1, theta_2 = np.random.default_rng(0).uniform(0.05, 2 * np.pi, size=(2, 30))
    exact = integrate(theta_1, theta_2, 13.0, sigma_2=1.3, start=start, phases=(0.4, -1.1))
    np.testing.assert_allclose(cf.separated_amplitudes(theta_1, theta_2, start, 0.4, -1.1), exact, rtol=0, atol=1e-10)
    closed = np.array(cf.separated_populations(theta_1, theta_2, start))
    np.testing.assert_allclose(closed, populations(exact), rtol=0, atol=1e-10)
    np.testing.assert_allclose(closed.sum(axis=0), 1, rtol=0, atol=1e-14)


@STARTS
def test_separated_pulses_resolved_in_time(start):
    t = np.linspace(-5, 18, 47)
    exact = populations(integrate(2.2, 1.9, 13.0, start=start, times=t)).T
    now = cf.partial_area(t, 2.2, 0.0, 1.0), cf.partial_area(t, 1.9, 13.0, 1.0)
    np.testing.assert_allclose(cf.separated_populations(*now, start), exact, rtol=0, atol=2e-10)


@STARTS
def test_populations_are_the_squares_of_amplitudes(start):
    a, b = GRID[:, None], GRID
    for amplitude, population in (
        (cf.separated_amplitudes, cf.separated_populations),
        (cf.simultaneous_amplitudes, cf.simultaneous_populations),
    ):
        np.testing.assert_allclose(
            populations(amplitude(a, b, start, 0.3, 1.2)), population(a, b, start), rtol=0, atol=1e-15
        )


def test_derivatives_of_the_output():
    # dy/dtheta_2 = -(x/2) sin theta_2, dy/dtheta_1 = (1 - R)/2 sin theta_1; in set points dy/dR = -x, dy/dx = 1 - R.
    gradient = jax.grad(lambda a, b: cf.separated_populations(a, b)[1], argnums=(0, 1))(1.1, 2.3)
    x, r = np.sin(0.55) ** 2, np.sin(1.15) ** 2
    np.testing.assert_allclose(gradient, [(1 - r) / 2 * np.sin(1.1), -x / 2 * np.sin(2.3)], rtol=1e-13)
    by_command = jax.grad(lambda x, r: cf.separated_populations(cf.set_area(x), cf.set_area(r))[1], argnums=(0, 1))
    np.testing.assert_allclose(by_command(0.6, 0.3), [0.7, -0.6], rtol=1e-13)


# ------------------------------------------------------------------------------------------------ overlap


@pytest.fixture(scope="module")
def overlap_errors():
    """Exact minus closed populations on a 9 x 9 grid of areas in (0, pi], by separation in sigma and start."""
    grid = np.linspace(np.pi / 9, np.pi, 9)
    pair = grid[:, None], grid

    def error(separation, start, widths=(1.0, 1.0)):
        exact = populations(integrate(*pair, separation, *widths, start=start))
        return exact - np.asarray(cf.separated_populations(*pair, start))

    return pair, error


@STARTS
@pytest.mark.parametrize("separation", [3, 4, 5, 6, 7, 8])
def test_bound_holds_and_is_not_loose(overlap_errors, separation, start):
    pair, error = overlap_errors
    bound = np.asarray(cf.overlap_bound(*pair, separation, 1.0, 1.0))
    worst = np.abs(error(separation, start)).max(axis=0)
    assert (bound >= worst).all()
    place = np.unravel_index(worst.argmax(), worst.shape)
    assert bound[place] < 2.7 * worst[place]
    assert bound.max() < 6.5 * worst.max()


@STARTS
@pytest.mark.parametrize(
    ("separation", "widths"), [(0.0, (1.0, 1.0)), (1.5, (1.0, 1.0)), (4.0, (1.0, 2.0)), (4.0, (1.4, 0.3))]
)
def test_bound_holds_for_strong_overlap_and_unequal_widths(overlap_errors, separation, widths, start):
    pair, error = overlap_errors
    assert (cf.overlap_bound(*pair, separation, *widths) >= np.abs(error(separation, start, widths)).max(axis=0)).all()


@STARTS
@pytest.mark.parametrize(("separation", "widths"), [(6.0, (1.0, 1.0)), (7.0, (1.0, 1.0)), (8.0, (1.2, 1.0))])
def test_leading_law_of_the_error(overlap_errors, separation, widths, start):
    pair, error = overlap_errors
    measured = error(separation, start, widths)
    law = np.asarray(cf.overlap_error(*pair, separation, *widths, start))
    np.testing.assert_allclose(measured[1], law, rtol=0, atol=0.03 * np.abs(law).max())
    np.testing.assert_allclose(measured[2], -law, rtol=0, atol=0.05 * np.abs(law).max())  # P_m changes by the opposite
    assert np.abs(measured[0]).max() < 0.05 * np.abs(law).max()  # P_v less
    assert np.sign(law[4, 4]) == (1 if start == "v" else -1)


def test_input_from_the_untouched_level_is_less_sensitive(overlap_errors):
    # The change of P_v follows w^(4/3) at equal widths: more than the second order, w^2, less than the first.
    _, error = overlap_errors
    for separation in (5.0, 6.0, 7.0, 8.0):
        change_v, change_s, _ = np.abs(error(separation, "v")).max(axis=(1, 2))
        assert 1.2 < change_v / change_s ** (4 / 3) < 2.2


@pytest.mark.parametrize(("separation", "table"), [(8, 3.2e-9), (6, 4.6e-6), (4, 9.7e-4), (3, 7.0e-3), (0, 0.21)])
def test_table_of_the_leading_law(separation, table):
    assert np.abs(cf.overlap_error(GRID[:, None], GRID, separation, 1.0, 1.0)).max() == pytest.approx(table, rel=0.02)


def test_separation_for_a_relative_error_of_three_in_ten_thousand():
    def rsd(separation):
        exact = populations(integrate(GRID[:, None], GRID, separation))[1]
        closed = np.asarray(cf.separated_populations(GRID[:, None], GRID)[1])
        return np.sqrt(np.mean((exact - closed) ** 2)) / closed.mean()

    low, high = rsd(4.6), rsd(4.8)
    crossing = 4.6 + 0.2 * np.log(low / 3e-4) / np.log(low / high)
    assert crossing == pytest.approx(4.71, rel=0.01)


# ------------------------------------------------------------------------------------------------ simultaneous pulses


def test_two_simultaneous_pi_pulses():
    expected = (0.0388681487, 0.3165638355, 0.6445680158)
    np.testing.assert_allclose(cf.simultaneous_populations(np.pi, np.pi), expected, rtol=0, atol=1e-8)


@STARTS
def test_simultaneous_pulses_against_integration(start):
    theta_1, theta_2 = np.random.default_rng(1).uniform(0, 2 * np.pi, size=(2, 30))
    exact = integrate(theta_1, theta_2, 0.0, start=start, phases=(0.4, -1.1))
    np.testing.assert_allclose(
        cf.simultaneous_amplitudes(theta_1, theta_2, start, 0.4, -1.1), exact, rtol=0, atol=1e-11
    )
    np.testing.assert_allclose(
        cf.simultaneous_populations(theta_1, theta_2, start), populations(exact), rtol=0, atol=1e-11
    )


@STARTS
def test_simultaneous_pulses_at_vanishing_areas(start):
    def y(areas):
        return jnp.stack(cf.simultaneous_populations(areas[0], areas[1], start))

    # To fourth order P_s = theta_1^2/4 from v and 1 - (theta_1^2 + theta_2^2)/4 from s: all derivatives exist at zero.
    np.testing.assert_array_equal(y(jnp.zeros(2)), [1, 0, 0] if start == "v" else [0, 1, 0])
    np.testing.assert_allclose(jax.jacrev(y)(jnp.zeros(2)), 0, rtol=0, atol=1e-15)
    curvature = jax.hessian(lambda a: y(a)[1])(jnp.zeros(2))
    np.testing.assert_allclose(
        curvature, [[0.5, 0], [0, 0]] if start == "v" else [[-0.5, 0], [0, -0.5]], rtol=0, atol=1e-14
    )
    # Both sides of the change between the series and the sine, for each of the two that enter.
    for theta in (np.sqrt(0.05) * 2, np.sqrt(0.05) * 4):
        for factor in (1 - 1e-9, 1 + 1e-9):
            p = np.sin(theta * factor / 2) ** 2
            expected = [1 - p, p, 0] if start == "v" else [p, 1 - p, 0]
            np.testing.assert_allclose(y(jnp.array([theta * factor, 0.0])), expected, rtol=0, atol=1e-15)


# ------------------------------------------------------------------------------------------------ imperfections


def test_rosen_zener():
    assert cf.rosen_zener(2.0, 0.7 / 3e-6, 3e-6) == pytest.approx(0.2545211644, rel=1e-8)
    theta, detuning = 4.1, -0.9

    def rhs(t, c):
        half = theta / (2 * np.pi) / np.cosh(t)
        return -1j * np.array([half * c[1], half * c[0] - detuning * c[1]])

    c = solve_ivp(rhs, (-40, 40), np.array([1, 0], complex), method="DOP853", rtol=1e-12, atol=1e-14).y[:, -1]
    assert cf.rosen_zener(theta, detuning, 1.0) == pytest.approx(abs(c[1]) ** 2, rel=1e-9)


def test_dephasing_of_a_pi_pulse():
    assert 2 * cf.pi_pulse_dephasing(1.0, 1.0) == pytest.approx(1.45721730, rel=1e-7)
    law = cf.pi_pulse_dephasing(20e-6, 1e-3 / 20e-6)
    assert law == pytest.approx(7.2808e-4, rel=1e-3)
    assert cf.pi_pulse_dephasing(20e-6, np.pi * 10) == pytest.approx(4.6e-4, rel=0.01)

    def rhs(t, bloch, rate=1e-3):  # components along the drive's plane: coherence, inversion
        omega = gaussian(t, np.pi, 0, 1)
        return [-rate * bloch[0] + omega * bloch[1], -omega * bloch[0]]

    z = solve_ivp(rhs, (-9, 9), [0, -1], method="DOP853", rtol=1e-12, atol=1e-14).y[1, -1]
    assert (1 - z) / 2 == pytest.approx(7.2808e-4, rel=1e-4)
    assert law / ((1 - z) / 2) - 1 == pytest.approx(7.3e-4, rel=0.02)


def test_thermal_carrier_factor():
    eta, n_bar = 0.0784, 9.8
    assert cf.thermal_carrier_factor(eta, n_bar) == pytest.approx(0.938652851822, rel=1e-10)
    n = np.arange(400)
    p_n = (n_bar / (n_bar + 1)) ** n / (n_bar + 1)
    exact = np.sum(p_n * np.exp(-(eta**2) / 2) * eval_laguerre(n, eta**2))
    assert cf.thermal_carrier_factor(eta, n_bar) == pytest.approx(exact, rel=1e-12)
    assert cf.thermal_carrier_factor(0.0, 12.0) == 1


@STARTS
def test_thermal_populations(start):
    theta, eta, n_bar = (2.0, 2.7), (0.0784, 0.06), 9.8
    n = np.arange(500)
    p_n = (n_bar / (n_bar + 1)) ** n / (n_bar + 1)
    bare = [a * np.exp(-(e**2) / 2) for a, e in zip(theta, eta, strict=True)]
    got = cf.thermal_populations(*theta, *eta, n_bar, start)

    linear = cf.separated_populations(*(b * (1 - e**2 * n) for b, e in zip(bare, eta, strict=True)), start)
    np.testing.assert_allclose(got, [np.sum(p_n * np.asarray(p)) for p in linear], rtol=0, atol=1e-13)
    laguerre = cf.separated_populations(*(b * eval_laguerre(n, e**2) for b, e in zip(bare, eta, strict=True)), start)
    neglected = sum(b * (e**2 * n_bar) ** 2 / 2 for b, e in zip(bare, eta, strict=True))
    np.testing.assert_allclose(got, [np.sum(p_n * np.asarray(p)) for p in laguerre], rtol=0, atol=neglected / 2)
    assert float(sum(got)) == pytest.approx(1, abs=1e-14)
    # The joint average is not the product of the averages.
    x = cf.thermal_populations(theta[0], 0.0, *eta, n_bar, start)[1]
    kept = cf.thermal_populations(0.0, theta[1], *eta, n_bar, "s")[1]
    assert abs(float(got[1] - x * kept)) > 1e-3
    # Single pulse, as quoted: 1/2 [1 - Re e^{i th'}/(n_bar + 1 - n_bar e^{-i th' eta^2})].
    phase = np.exp(1j * bare[0]) / (n_bar + 1 - n_bar * np.exp(-1j * bare[0] * eta[0] ** 2))
    transferred = cf.thermal_populations(theta[0], 0.0, *eta, n_bar, "v")[1]
    assert transferred == pytest.approx((1 - phase.real) / 2, rel=1e-13)


@STARTS
def test_cold_ion_has_no_thermal_average(start):
    np.testing.assert_allclose(
        cf.thermal_populations(1.3, 2.1, 0.0, 0.0, 20.0, start),
        cf.separated_populations(1.3, 2.1, start),
        rtol=0,
        atol=1e-15,
    )


# ------------------------------------------------------------------------------------------------ output state


def test_output_state_is_amplitude_damping():
    x, r, phase = 0.6, 0.3, 0.7
    psi = np.array([np.sqrt(1 - x), np.exp(1j * phase) * np.sqrt(x)])
    kraus = np.diag([1, np.sqrt(1 - r)]), np.array([[0, np.sqrt(r)], [0, 0]])
    expected = sum(k @ np.outer(psi, psi.conj()) @ k.T for k in kraus)
    np.testing.assert_allclose(cf.output_state(x, r, phase), expected, rtol=0, atol=1e-15)
    # The same from the amplitudes of the ion: m goes to v without coherence.
    c_v, c_s, c_m = (complex(c) for c in cf.separated_amplitudes(cf.set_area(x), cf.set_area(r), "v", 0.2, 1.0))
    repumped = np.outer([c_v, c_s], np.conj([c_v, c_s])) + np.diag([abs(c_m) ** 2, 0])
    np.testing.assert_allclose(cf.output_state(x, r, -0.2 - np.pi / 2), repumped, rtol=0, atol=1e-15)


def test_purity_and_coherence_of_the_output():
    x, r = np.linspace(0, 1, 11)[:, None], np.linspace(0, 1, 9)
    rho = np.moveaxis(np.asarray(cf.output_state(x, r, 0.3)), (0, 1), (-2, -1))
    assert rho.shape == (11, 9, 2, 2)
    np.testing.assert_allclose(np.trace(rho @ rho, axis1=-2, axis2=-1), cf.output_purity(x, r), rtol=0, atol=1e-12)
    np.testing.assert_allclose(cf.output_purity(x, r), 1 - 2 * r * (1 - r) * x**2, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        np.abs(rho[..., 0, 1]) + np.abs(rho[..., 1, 0]), cf.output_coherence(x, r), rtol=0, atol=1e-15
    )
    np.testing.assert_allclose(cf.output_coherence(x, r), 2 * np.sqrt(x * (1 - x) * (1 - r)), rtol=0, atol=1e-15)
    np.testing.assert_allclose(np.trace(rho, axis1=-2, axis2=-1), 1, rtol=0, atol=1e-15)
    assert np.linalg.eigvalsh(rho).min() > -1e-15


def test_output_state_has_finite_derivatives_everywhere():
    for x in (0.0, 0.4, 1.0):
        for r in (0.0, 0.6, 1.0):
            gradient = jax.grad(lambda x, r: cf.output_state(x, r).real.sum(), argnums=(0, 1))(x, r)
            assert np.isfinite(gradient).all()
    slope = jax.grad(cf.output_coherence)(0.3, 0.2)
    assert slope == pytest.approx(np.sqrt(0.8) * (1 - 0.6) / np.sqrt(0.3 * 0.7), rel=1e-13)


# ------------------------------------------------------------------------------------------------ shapes


def test_arguments_broadcast():
    a, b = jnp.linspace(0, 3, 4)[:, None], jnp.linspace(0, 3, 5)
    for values in (
        cf.separated_populations(a, b),
        cf.separated_amplitudes(a, b, "s", 0.1),
        cf.simultaneous_amplitudes(a, b),
        cf.thermal_populations(a, 1.0, 0.1, b, 2),
        [cf.overlap_error(a, b, 3, 1.0, 1.0), cf.rosen_zener(a, 0, b), cf.partial_area(a, 1, b, 2)],
    ):
        assert all(value.shape == (4, 5) for value in values)

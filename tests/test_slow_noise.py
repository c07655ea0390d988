"""Shot-to-shot noise: closed forms against integrals and samples, quadrature against both, devices against loops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.parameters import value_of, with_parameters
from twin import slow_noise
from twin.closed_form import separated_coherence, separated_populations
from twin.emulator import EmulatedSeries, EmulationError
from twin.loop import Settings
from twin.memory import MovingAverage
from twin.memristor import (
    AreaSeries,
    Automatic,
    ClosedForm,
    IonMemristor,
    Lindblad,
    PhotonicMemristor,
    planned,
    run,
    stream,
)
from twin.methods import StaticGrid
from twin.planning import emulated
from twin.register import Register
from twin.sampled import sampled
from twin.scans import PulseScan, RamseyScan
from twin.slow_noise import SlowNoise, noisy_coherence, noisy_populations, slow_average, slow_quadrature, slow_samples
from twin.waveform import Waveform

CORRELATIONS = [-1.0, -0.3, 0.0, 0.8, 1.0]
X_SET, R_SET = np.array([0.1, 0.5, 0.97]), np.array([0.9, 0.3, 0.6])


def device(**changes):
    defaults = {"memory": MovingAverage(5.0), "lifetime_s": math.inf, "separation_s": 160e-6, "method": ClosedForm()}
    return IonMemristor(**(defaults | changes))


def bivariate(s_1, s_2, correlation, points=401, reach=9.0):
    """Errors e_1, e_2 on a plane and their probabilities, from the density of the normal distribution."""
    u = np.linspace(-reach, reach, points)
    a, b = np.meshgrid(u, u, indexing="ij")
    # Principal axes of the unit covariance, which exist at full correlation too.
    e_1 = np.sqrt((1 + correlation) / 2) * a + np.sqrt((1 - correlation) / 2) * b
    e_2 = np.sqrt((1 + correlation) / 2) * a - np.sqrt((1 - correlation) / 2) * b
    p = np.exp(-(a**2 + b**2) / 2)
    return s_1 * e_1, s_2 * e_2, p / p.sum()


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("start", ["v", "s"])
@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_closed_form_is_the_integral_over_the_plane(correlation, start):
    noise = SlowNoise(0.07, 0.11, correlation)
    e_1, e_2, p = bivariate(0.07, 0.11, correlation)
    exact = separated_populations(2.2 * (1 + e_1), 1.4 * (1 + e_2), start)
    for found, values in zip(noisy_populations(2.2, 1.4, noise, start), exact, strict=True):
        assert found == pytest.approx(float((p * values).sum()), abs=1e-13)
    coherence = (p * separated_coherence(2.2 * (1 + e_1), 1.4 * (1 + e_2), start)).sum()
    assert noisy_coherence(2.2, 1.4, noise, start) == pytest.approx(float(coherence), abs=1e-13)


def test_one_pulse_is_the_law_of_a_damped_cosine():
    theta, s = np.linspace(0, 4 * math.pi, 9), 0.04
    _, x, m = noisy_populations(theta, 0.0, SlowNoise(s, 0.5, 0.7))
    np.testing.assert_allclose(x, 0.5 * (1 - np.cos(theta) * np.exp(-((theta * s) ** 2) / 2)), atol=1e-15)
    np.testing.assert_allclose(m, 0, atol=1e-15)


def test_joint_mean_is_no_product_of_means():
    theta_1, theta_2, s = 2.0, 2.5, 0.1
    x = noisy_populations(theta_1, 0.0, SlowNoise(s))[1]
    kept = noisy_populations(0.0, theta_2, SlowNoise(0.0, s), "s")[1]
    y = lambda c: float(noisy_populations(theta_1, theta_2, SlowNoise(s, s, c))[1])
    assert y(0.0) == pytest.approx(float(x * kept), abs=1e-15)
    assert y(1.0) < y(0.0) - 5e-3 and y(-1.0) > y(0.0) + 5e-3


def test_random_shots_agree():
    rng = np.random.default_rng(3)
    s, c = np.array([0.07, 0.11]), 0.6
    e_1, e_2 = rng.multivariate_normal([0, 0], np.outer(s, s) * np.array([[1, c], [c, 1]]), 400_000).T
    y = np.sin(1.1 * (1 + e_1)) ** 2 * np.cos(0.7 * (1 + e_2)) ** 2
    found = float(noisy_populations(2.2, 1.4, SlowNoise(*s, c))[1])
    assert found == pytest.approx(y.mean(), abs=4 * y.std() / math.sqrt(len(y)))
    # The package's own shots too.
    draws = slow_samples(SlowNoise(*s, c), 400_000, jax.random.key(0))
    y = np.sin(1.1 * draws.factor_1) ** 2 * np.cos(0.7 * draws.factor_2) ** 2
    assert found == pytest.approx(y.mean(), abs=4 * y.std() / math.sqrt(len(y)))


def test_detuning_noise_has_no_closed_form():
    with pytest.raises(ValueError, match="detuning_noise_1_hz"):
        noisy_populations(1.0, 1.0, SlowNoise(detuning_noise_2_hz=1.0))
    p_v, p_s, p_m = jax.jit(lambda d: noisy_populations(1.0, 1.0, SlowNoise(detuning_noise_2_hz=d)))(1.0)
    assert np.all(np.isnan([p_v, p_s, p_m]))


# ------------------------------------------------------------------------------------------------ quadrature


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_quadrature_has_the_covariance_of_the_noise(correlation):
    noise = SlowNoise(0.07, 0.11, correlation, 400.0, 900.0, -correlation)
    draws = slow_quadrature(noise, (3, 3, 3, 3))
    assert draws.weights.shape == (81,) and draws.weights.sum() == pytest.approx(1, abs=1e-14)
    rows = np.stack(draws[:4]) - np.array([1, 1, 0, 0])[:, None]
    rows /= np.array([0.07, 0.11, 400, 900])[:, None]
    expected = np.eye(4)
    expected[0, 1] = expected[1, 0] = correlation
    expected[2, 3] = expected[3, 2] = -correlation
    np.testing.assert_allclose((rows * draws.weights) @ rows.T, expected, atol=1e-12)
    np.testing.assert_allclose(rows @ draws.weights, 0, atol=1e-13)


@pytest.mark.parametrize("error", [1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_planned_nodes_keep_their_error(correlation, error):
    noise = SlowNoise(0.12, 0.05, correlation)
    areas = (1.2 * math.pi, math.pi)
    nodes = slow_noise.nodes_for(noise, areas, (2e-5, 2e-5), error)
    assert nodes[2:] == (1, 1) and (nodes[1] == 1) == (abs(correlation) == 1)
    draws = slow_quadrature(noise, nodes)
    theta_1, theta_2 = (
        a.ravel()[:, None] for a in np.meshgrid(np.linspace(0, areas[0], 9), np.linspace(0, areas[1], 9))
    )
    found = separated_populations(theta_1 * draws.factor_1, theta_2 * draws.factor_2)
    for mine, exact in zip(found, noisy_populations(theta_1[:, 0], theta_2[:, 0], noise), strict=True):
        assert np.max(np.abs(mine @ draws.weights - exact)) < error


def test_too_few_nodes_are_seen():
    assert slow_noise.amplitude_error(1.0, 2) > 0.05 > slow_noise.amplitude_error(1.0, 4)
    # Two nodes stand at one standard deviation: the mean cosine is a cosine.
    spread = np.linspace(0, 1, 33)
    assert slow_noise.amplitude_error(1.0, 2) == pytest.approx(
        np.max(np.abs(np.cos(spread) - np.exp(-(spread**2) / 2)))
    )


def test_detuning_rule_against_the_transfer_of_a_detuned_pulse():
    # A Gaussian pi pulse at delta sigma = 0.2 transfers 0.95656088 (integrated), at 0 all. Two nodes are +- one
    # deviation.
    std_hz = 0.2 / (2 * math.pi * 20e-6)
    two = slow_noise.detuning_error(std_hz, 20e-6, math.pi, 2)
    assert 1e-5 < two < 1 - 0.95656088
    assert slow_noise.detuning_error(std_hz, 20e-6, math.pi, 8) < 1e-7
    one = slow_noise.detuning_error(1e-9, 20e-6, math.pi, 1)
    assert one < 1e-12


def test_what_no_quadrature_serves_is_refused():
    with pytest.raises(ValueError, match="48 nodes"):
        slow_noise.nodes_for(SlowNoise(5.0), (3.0, 3.0), (2e-5, 2e-5), 1e-9)
    with pytest.raises(ValueError, match="known values"):
        jax.jit(lambda s: slow_noise.nodes_for(SlowNoise(s), (3.0, 3.0), (2e-5, 2e-5), 1e-9))(0.1)
    with pytest.raises(ValueError, match="larger than 1"):
        slow_quadrature(SlowNoise(0.1), (1, 3, 1, 1))
    with pytest.raises(ValueError, match="larger than 1"):
        slow_quadrature(SlowNoise(0.0, 0.1, 0.999), (3, 1, 1, 1))
    with pytest.raises(ValueError, match="four numbers"):
        slow_quadrature(SlowNoise(), (3, 3))
    lost = jax.jit(lambda s: slow_quadrature(SlowNoise(s), (1, 3, 1, 1)).factor_1)(0.1)
    assert np.all(np.isnan(lost))


@pytest.mark.parametrize(
    ("field", "value"),
    [("amplitude_noise_1", -0.1), ("detuning_noise_2_hz", np.nan), ("amplitude_correlation", 1.01),
     ("detuning_correlation", -2.0)],
)  # fmt: skip
def test_bad_noise_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        SlowNoise(**{field: value})


def joint(noise, nodes=(8, 8, 1, 1)):
    draws = slow_quadrature(noise, nodes)
    return separated_populations(2.2 * draws.factor_1, 1.4 * draws.factor_2)[1] @ draws.weights


@pytest.mark.parametrize(
    "at", [(0.0, 0.0, 0.3), (0.05, 0.0, 0.0), (0.05, 0.1, 0.5), (0.05, 0.1, 1.0), (0.05, 0.1, -1.0)]
)
def test_quadrature_has_the_derivatives_of_the_closed_form(at):
    # The closed form is entire in all three, so its derivative exists at zero noise and at full correlation.
    exact = jax.grad(lambda *a: noisy_populations(2.2, 1.4, SlowNoise(*a))[1], (0, 1, 2))(*at)
    found = jax.grad(lambda *a: joint(SlowNoise(*a)), (0, 1, 2))(*at)
    np.testing.assert_allclose(found, exact, atol=1e-8)
    assert np.all(np.isfinite(exact))


def test_closed_form_derivatives_are_differences():
    at, step = np.array([2.2, 1.4, 0.05, 0.1, 0.5]), 1e-6
    y = lambda a: noisy_populations(a[0], a[1], SlowNoise(a[2], a[3], a[4]))[1]
    slopes = jax.grad(y)(jnp.asarray(at))
    for k in range(5):
        move = step * np.eye(5)[k]
        assert slopes[k] == pytest.approx(float(y(at + move) - y(at - move)) / (2 * step), abs=1e-9)


# ------------------------------------------------------------------------------------------------ devices


def test_device_of_closed_forms_is_the_closed_form():
    noise = SlowNoise(0.05, 0.08, 0.4)
    ion = device(rabi_scale_1=1.03)
    first, second = slow_average(ion, X_SET, R_SET, noise, error=1e-10)
    theta_1, theta_2 = ion.areas(jnp.asarray(X_SET), jnp.asarray(R_SET))
    np.testing.assert_allclose(first.populations, noisy_populations(theta_1, 0.0, noise), atol=1e-10)
    np.testing.assert_allclose(second.populations, noisy_populations(theta_1, theta_2, noise), atol=1e-10)
    np.testing.assert_allclose(second.coherence_vs[1], noisy_coherence(theta_1, theta_2, noise), atol=1e-10)
    assert np.all(second.valid) and np.all(second.error_estimate == 1e-10)


def test_negative_rabi_frequencies_are_phases():
    # Three tenths of noise and twelve nodes: the outermost have negative factors.
    noise, nodes = SlowNoise(0.3, 0.3), (12, 12, 1, 1)
    assert np.any(slow_quadrature(noise, nodes).factor_1 < 0)
    _, second = slow_average(device(), X_SET, R_SET, noise, nodes=nodes)
    theta_1, theta_2 = device().areas(jnp.asarray(X_SET), jnp.asarray(R_SET))
    np.testing.assert_allclose(second.populations, noisy_populations(theta_1, theta_2, noise), atol=2e-6)
    np.testing.assert_allclose(second.coherence_vs[1], noisy_coherence(theta_1, theta_2, noise), atol=2e-6)


@pytest.mark.slow
def test_weak_detuned_pulses_average_to_a_narrower_gaussian():
    # P = theta^2/4 exp(-delta^2 sigma^2), whose mean over delta ~ N(0, s) is that over sqrt(1 + 2 s^2 sigma^2).
    x_set, noise = np.array([1e-6]), SlowNoise(detuning_noise_1_hz=6e3)
    first, _ = slow_average(device(method=StaticGrid(error=1e-10)), x_set, 0 * x_set, noise, error=1e-7)
    spread = 2 * math.pi * 6e3 * 20e-6
    assert first.populations[1, 0] == pytest.approx(1e-6 / math.sqrt(1 + 2 * spread**2), rel=1e-5)
    # And it is not what one node says.
    assert first.populations[1, 0] < 0.85e-6


@pytest.mark.slow
def test_quadrature_is_the_mean_of_devices():
    noise = SlowNoise(0.03, 0.05, 0.4, 1500.0, 800.0, 0.7)
    ion = device(method=StaticGrid(), separation_s=90e-6, detuning_1_hz=1000.0, laser_linewidth_hz=200.0)
    first, second = slow_average(ion, X_SET, R_SET, noise, error=1e-5)
    assert np.all(second.valid)
    rng = np.random.default_rng(5)
    e = rng.multivariate_normal([0, 0], np.outer([0.03, 0.05], [0.03, 0.05]) * [[1, 0.4], [0.4, 1]], 2_000)
    d = rng.multivariate_normal([0, 0], np.outer([1500, 800], [1500, 800]) * [[1, 0.7], [0.7, 1]], 2_000)
    shots = dataclasses.replace(
        ion, rabi_scale_1=1 + e[:, 0], rabi_scale_2=1 + e[:, 1], detuning_1_hz=1000 + d[:, 0], detuning_2_hz=d[:, 1]
    )
    loop = run(shots, np.repeat(X_SET[:, None], 2_000, 1), np.repeat(R_SET[:, None], 2_000, 1))
    for found, each in ((first, loop.x), (second, loop.y)):
        wrong = np.abs(found.populations[1] - np.mean(each, 1)) * math.sqrt(2_000) / np.std(each, 1)
        assert np.all(wrong < 4)
    quiet = run(ion, X_SET, R_SET)
    assert np.max(np.abs(quiet.y - second.populations[1])) > 5e-3


@pytest.mark.slow
def test_planned_error_holds_for_devices():
    noise = SlowNoise(0.05, 0.05, 1.0, 1500.0, 1500.0, 1.0)
    ion = device(method=StaticGrid(), separation_s=90e-6)
    loose, fine = (slow_average(ion, X_SET, R_SET, noise, error=error)[1] for error in (1e-4, 1e-6))
    assert np.max(np.abs(loose.populations - fine.populations)) < 1e-4
    assert np.all(loose.error_estimate >= 1e-4) and np.all(fine.error_estimate < 2e-6)


def test_batches_of_devices_and_of_noise():
    noise = SlowNoise(np.array([0.0, 0.05]), 0.05, 0.4)
    ion = device(rabi_scale_1=np.array([0.9, 1.1]))
    columns = lambda a: np.stack([a, a], 1)
    _, both = slow_average(ion, columns(X_SET), columns(R_SET), noise, nodes=(6, 6, 1, 1))
    assert both.populations.shape == (3, 3, 2)
    for lane, (scale, std) in enumerate(((0.9, 0.0), (1.1, 0.05))):
        _, one = slow_average(device(rabi_scale_1=scale), X_SET, R_SET, SlowNoise(std, 0.05, 0.4), nodes=(6, 6, 1, 1))
        np.testing.assert_allclose(both.populations[..., lane], one.populations, atol=1e-15)


def test_motion_and_known_offsets_are_averaged_along():
    ion = device(n_bar=5.0, eta_1=0.08, eta_2=0.08, phonon_nodes=6, method=StaticGrid())
    offsets = {"detuning_1_set_hz": np.array([0.0, 500.0, 900.0]), "detuning_2_set_hz": 300.0}
    silent = slow_average(ion, X_SET, R_SET, SlowNoise(), nodes=(2, 2, 1, 1), **offsets)
    loop = run(ion, X_SET, R_SET, **offsets)
    np.testing.assert_allclose(silent[0].populations, loop.populations_1, atol=1e-9)
    np.testing.assert_allclose(silent[1].populations, loop.populations_2, atol=1e-9)


@pytest.mark.slow
def test_derivatives_of_an_averaged_device():
    box = {"rabi_scale_1": (0.6, 1.4), "detuning_1_hz": (-9e3, 9e3), "detuning_2_hz": (-9e3, 9e3)}
    ion = planned(device(method=StaticGrid()), box)

    @jax.jit
    def output(a):
        noise = SlowNoise(a[0], 0.04, a[1], 1e3 * a[2], 500.0, 0.5)
        own = dataclasses.replace(ion, rabi_scale_1=a[3])
        return slow_average(own, X_SET[1:2], R_SET[1:2], noise, nodes=(3, 3, 3, 2))[1].populations[1, 0]

    at, step = np.array([0.05, 0.3, 1.2, 1.04]), 1e-4
    slopes = jax.grad(output)(jnp.asarray(at))
    for k in range(4):
        move = step * np.eye(4)[k]
        assert slopes[k] == pytest.approx(float(output(at + move) - output(at - move)) / (2 * step), rel=1e-5, abs=1e-9)
    # From zero noise on, where correlated noise of the other pulse makes the slope other than zero.
    at = np.array([0.0, 0.3, 0.0, 1.04])
    slopes = jax.grad(output)(jnp.asarray(at))
    for k in (0, 2):
        ahead = [float(output(at + n * 1e-3 * np.eye(4)[k])) for n in range(3)]
        one_sided = (-3 * ahead[0] + 4 * ahead[1] - ahead[2]) / 2e-3
        assert slopes[k] == pytest.approx(one_sided, rel=1e-3, abs=1e-8)
    assert abs(slopes[0]) > 1e-3


def test_what_the_device_cannot_average_is_refused():
    noise = SlowNoise(detuning_noise_1_hz=100.0)
    with pytest.raises(ValueError, match="slow_average"):
        slow_average(device(), X_SET, R_SET, noise)
    traced = jax.jit(
        lambda d: slow_average(device(), X_SET, R_SET, SlowNoise(detuning_noise_1_hz=d), nodes=(1, 1, 3, 1))
    )
    first, second = traced(100.0)
    assert not np.any(first.valid) and not np.any(second.valid) and np.all(np.isnan(second.populations))
    with pytest.raises(ValueError, match="axis of cycles"):
        slow_average(device(), 0.5, 0.5, SlowNoise(0.1))
    with pytest.raises(ValueError, match="EmulatedSeries"):
        slow_average(device(method=object.__new__(EmulatedSeries)), X_SET, R_SET, SlowNoise(0.1))


def test_new_values_do_not_compile_again(monkeypatch):
    traces, mean = [], slow_noise.mean_response
    monkeypatch.setattr(slow_noise, "mean_response", lambda *a: (traces.append(1), mean(*a))[1])
    for scale, std in ((1.0, 0.03), (1.02, 0.06), (0.9, 0.0)):
        slow_average(device(rabi_scale_2=scale), X_SET, R_SET, SlowNoise(std, std), nodes=(5, 7, 1, 1))
    assert len(traces) == 2  # the two kinds of run


# ------------------------------------------------------------------------------------------------ noise of a device

NOISE = SlowNoise(0.04, 0.03, 0.4, 400.0, 300.0, 0.7)
BOX = {"amplitude_noise_1": (0.0, 0.06), "detuning_noise_1_hz": (0.0, 600.0)}


@pytest.mark.parametrize(
    "method",
    [pytest.param(StaticGrid(1e-7), marks=pytest.mark.slow), AreaSeries(StaticGrid(1e-7))],
    ids=["grid", "series"],
)
def test_run_of_a_noisy_device_is_the_average(method):
    ion = device(method=StaticGrid(1e-9), separation_s=100e-6, detuning_1_hz=300.0)
    offsets = {"detuning_1_set_hz": np.array([0.0, 400.0, 400.0])}
    first, second = slow_average(ion, X_SET, R_SET, NOISE, error=1e-8, **offsets)
    loop = run(dataclasses.replace(ion, method=method, slow_noise=NOISE), X_SET, R_SET, **offsets)
    assert np.all(loop.valid) and np.all(loop.error_estimate < 3e-7)
    np.testing.assert_allclose(loop.populations_1, first.populations, atol=2e-7)
    np.testing.assert_allclose(loop.populations_2, second.populations, atol=2e-7)
    # rho_vs turns for all of the wait, which nodes are not chosen for.
    np.testing.assert_allclose(loop.coherence, 2 * np.linalg.norm(second.coherence_vs, axis=0), atol=2e-4)
    assert np.max(np.abs(run(ion, X_SET, R_SET, **offsets).y - loop.y)) > 1e-3


def test_closed_forms_of_a_noisy_device_are_exact():
    noise = SlowNoise(np.array([0.2, 0.5]), 0.3, 0.4)
    ion = device(rabi_scale_1=np.array([1.03, 0.9]), slow_noise=noise, scheme="ladder")
    columns = lambda a: np.stack([a, a], 1)
    loop = run(ion, columns(X_SET), columns(R_SET))
    theta = ion.areas(jnp.asarray(columns(X_SET)), jnp.asarray(columns(R_SET)))
    exact = noisy_populations(*theta, noise)
    np.testing.assert_allclose(loop.populations_2[:3], exact, atol=1e-15)
    np.testing.assert_allclose(loop.coherence, 2 * np.abs(noisy_coherence(*theta, noise)), atol=1e-15)
    assert np.all(loop.valid) and loop.method == "closed form"


def test_moving_ions_are_averaged_jointly():
    ion = device(n_bar=5.0, eta_1=0.08, eta_2=0.08, phonon_nodes=6, rabi_scale_2=1.1)
    noise = SlowNoise(0.05, 0.08, 0.4)
    loop = run(dataclasses.replace(ion, slow_noise=noise), X_SET, R_SET)
    _, second = slow_average(ion, X_SET, R_SET, noise, error=1e-9)
    np.testing.assert_allclose(loop.populations_2, second.populations, atol=2e-8)


@pytest.mark.slow
def test_random_shots_of_a_device_agree():
    ion = device(method=StaticGrid(1e-6), separation_s=90e-6)
    loop = run(dataclasses.replace(ion, slow_noise=NOISE), X_SET, R_SET)
    shots = 4000
    lanes = slow_noise.drawn(ion, slow_samples(NOISE, shots, jax.random.key(4)))
    each = run(lanes, np.repeat(X_SET[:, None], shots, 1), np.repeat(R_SET[:, None], shots, 1))
    for found, sampled_ in ((loop.x, each.x), (loop.y, each.y)):
        wrong = np.abs(found - np.mean(sampled_, 1)) * math.sqrt(shots) / np.std(sampled_, 1)
        assert np.all(wrong < 4)


def test_loops_with_memory_and_streams():
    x_set = np.sin(np.linspace(0, 6, 25)) ** 2
    ion = device(slow_noise=SlowNoise(0.1, 0.1, 1.0))
    loop = run(ion, x_set)
    np.testing.assert_allclose(stream(ion, x_set).y, loop.y, atol=1e-13)
    theta = ion.areas(jnp.asarray(x_set), loop.r)
    np.testing.assert_allclose(loop.y, noisy_populations(*theta, ion.slow_noise)[1], atol=1e-14)


@pytest.mark.slow
def test_strengths_are_parameters_with_derivatives():
    plain = device(method=AreaSeries(StaticGrid(1e-9)), separation_s=160e-6)
    ion = planned(plain, BOX)
    assert value_of(plain, "detuning_noise_1_hz") == 0 and ion.slow_noise.nodes[1] == ion.slow_noise.nodes[3] == 1
    traces = []

    @jax.jit
    def output(a):
        traces.append(1)
        own = with_parameters(ion, {"amplitude_noise_1": a[0], "detuning_noise_1_hz": 1e3 * a[1]})
        return run(own, X_SET[1:], R_SET[1:]).y @ jnp.array([0.4, 1.0])

    slopes, step = jax.jit(jax.grad(output)), 1e-4
    for at in (np.array([0.03, 0.3]), np.array([0.05, 0.5])):
        found = slopes(jnp.asarray(at))
        for k in range(2):
            move = step * np.eye(2)[k]
            difference = float(output(at + move) - output(at - move)) / (2 * step)
            assert found[k] == pytest.approx(difference, rel=1e-6, abs=1e-9) and abs(difference) > 1e-3
    np.testing.assert_allclose(slopes(jnp.zeros(2)), 0, atol=1e-12)  # even in each, and finite
    assert len(traces) == 1
    # Nodes serve the box and no more.
    assert np.isfinite(output(np.array([0.06, 0.6]))) and np.isnan(output(np.array([0.07, 0.6])))
    np.testing.assert_allclose(
        output(np.zeros(2)), run(plain, X_SET[1:], R_SET[1:]).y @ np.array([0.4, 1.0]), atol=2e-9
    )


@pytest.mark.slow
def test_emulated_devices_have_amplitude_noise_alone():
    settings = Settings(jnp.zeros(1), jnp.zeros(1), jnp.zeros(len(X_SET), int))
    ion = device(method=Lindblad(1e-6))
    box = {"amplitude_noise_1": (0.0, 0.06), "rabi_scale_1": (0.9, 1.1), "detuning_1_hz": (-300.0, 300.0)}
    fast = emulated(ion, box, settings, error=1e-6)
    assert isinstance(fast.method, EmulatedSeries)
    values = {"amplitude_noise_1": jnp.asarray(0.05), "rabi_scale_1": jnp.asarray(1.08)}
    respond = with_parameters(fast, values).under(settings)
    found = respond(jnp.asarray(X_SET), jnp.asarray(R_SET), alone=False)
    exact = run(with_parameters(device(method=StaticGrid(1e-9)), values), X_SET, R_SET)
    assert np.all(found.valid)
    np.testing.assert_allclose(found.populations, exact.populations_2, atol=3e-6)
    with pytest.raises(EmulationError, match="detuning noise"):
        emulated(ion, BOX, settings, error=1e-6)


@pytest.mark.slow
def test_registers_are_averaged():
    noise = SlowNoise(0.05, 0.04, 1.0)
    ion = device(slow_noise=noise, rabi_scale_1=np.array([1.0, 0.95, 1.02]))
    register = Register(ion=ion, count=3, crosstalk_1=0.02, crosstalk_2=0.03)
    x_set, r_set = (np.stack([a, a[::-1], a], 1) for a in (X_SET, R_SET))
    far = dict.fromkeys(("tail_s", "lead_s", "separation_s"), 0.0002)
    solved = Register(
        ion=dataclasses.replace(ion, method=AreaSeries(StaticGrid(1e-6)), **far),
        count=3,
        crosstalk_1=0.02,
        crosstalk_2=0.03,
    )
    for one, tolerance in ((register, 1e-14), (solved, 2e-6)):
        loop = run(one, x_set, r_set)
        theta = one.ion.areas(jnp.asarray(x_set), jnp.asarray(r_set))
        mixed = [theta[k] @ one.shares(k + 1)[0].T for k in (0, 1)]
        assert np.all(loop.valid)
        np.testing.assert_allclose(loop.populations_2, noisy_populations(*mixed, noise), atol=tolerance)


def test_scans_are_averaged():
    # A Ramsey fringe of pulses short against everything falls like a Gaussian of the wait.
    wait_s, std_hz = np.array([50e-6, 200e-6, 500e-6]), 500.0
    ion = device(method=StaticGrid(1e-7), sigma_1_s=0.5e-6, lead_s=5e-6, tail_s=5e-6,
                 slow_noise=SlowNoise(detuning_noise_1_hz=std_hz))  # fmt: skip
    fringe = RamseyScan(wait_s).probability(ion)
    np.testing.assert_allclose(fringe, (1 + np.exp(-((2 * np.pi * std_hz * wait_s) ** 2) / 2)) / 2, atol=2e-3)
    # Rabi oscillations under amplitude noise are damped cosines, far beyond the areas of a cycle.
    area = np.array([1.0, 5.0, 12.0]) * math.pi
    ion = device(method=StaticGrid(1e-8), slow_noise=SlowNoise(0.02), lead_s=160e-6, tail_s=160e-6)
    scan = PulseScan(1, area)
    exact = noisy_populations(area, 0.0, SlowNoise(0.02))[1]
    np.testing.assert_allclose(scan.probability(ion), exact, atol=1e-7)
    quiet = dataclasses.replace(ion, slow_noise=None)
    plan = scan.planned(quiet, {"amplitude_noise_1": (0.0, 0.03)})
    p = jax.jit(lambda s: plan.probability(with_parameters(quiet, {"amplitude_noise_1": s})))
    np.testing.assert_allclose(p(0.02), exact, atol=1e-7)
    assert np.all(np.isnan(p(0.04)))
    with pytest.raises(ValueError, match="planned without slow noise"):
        scan.planned(quiet, {}).probability(ion)


def test_what_noisy_devices_cannot_do_is_refused():
    noisy = device(slow_noise=SlowNoise(detuning_noise_1_hz=100.0))
    with pytest.raises(ValueError, match="detuning_noise_1_hz"):
        run(noisy, X_SET, R_SET)
    assert run(dataclasses.replace(noisy, method=Automatic(1e-3)), X_SET, R_SET).method != "closed form"
    grid = device(method=StaticGrid(steps=200))
    with pytest.raises(ValueError, match="nodes of `slow_noise`"):
        jax.jit(lambda s: run(with_parameters(grid, {"amplitude_noise_1": s}), X_SET, R_SET).y)(0.1)
    with pytest.raises(ValueError, match="slow_noise"):
        sampled(noisy, Waveform(np.ones((4, 2, 2)), np.zeros((4, 2, 2)), 1e-6), alone_slices=2)
    photonic = PhotonicMemristor(memory=MovingAverage(5.0))
    with pytest.raises(ValueError, match="no parameter of Photonic"):
        with_parameters(photonic, {"amplitude_noise_1": jnp.asarray(0.1)})


def test_large_batches_in_blocks():
    scale = np.linspace(0.9, 1.1, 40)
    ion = device(rabi_scale_1=scale, slow_noise=SlowNoise(0.05, 0.05, 1.0), n_bar=2.0, eta_1=0.05, eta_2=0.05,
                 phonon_nodes=4)  # fmt: skip
    wide = lambda a: np.repeat(a[:, None], 40, 1)
    loop = run(ion, wide(X_SET), wide(R_SET))
    one = run(dataclasses.replace(ion, rabi_scale_1=scale[7]), X_SET, R_SET)
    assert np.all(loop.valid)
    np.testing.assert_allclose(loop.y[:, 7], one.y, atol=3e-8)

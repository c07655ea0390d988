"""The devices against exact loops, against each other, and against finite differences."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from twin.dynamics import Adaptive, StaticGrid
from twin.hysteresis import form_factor, perimeter, signed_area
from twin.memory import Exponential, MovingAverage
from twin.memristor import (
    Automatic,
    ClosedForm,
    IonMemristor,
    PhotonicMemristor,
    planned,
    run,
    sine_input,
    stream,
)

K = 40


def ideal(window, **changes):
    return IonMemristor(memory=MovingAverage(window), method=ClosedForm(), **changes)


def last_period(device, cycles_per_period=K, periods=3):
    loop = run(device, sine_input(periods=periods, cycles_per_period=cycles_per_period))
    last = slice(-cycles_per_period - 1, -1)
    return loop.x[last], loop.y[last], loop


def polygon_area(k, n):
    """The exact polygon of the moving-average loop: (pi/8) S_d sin(lag) sin(2 pi/K)/(2 pi/K)."""
    w = 2 * np.pi / k
    shrink = np.sin(n * w / 2) / (n * np.sin(w / 2))
    return np.pi / 8 * shrink * np.sin(w * (n + 1) / 2) * np.sin(w) / w


@pytest.mark.parametrize(("window", "area"), [(10, 0.2680153507), (15, 0.2919843430), (20, 0.2484610426)])
def test_discrete_loop_area(window, area):
    x, y, _ = last_period(ideal(float(window)))
    assert float(signed_area(x, y)) == pytest.approx(polygon_area(K, window), abs=1e-10)
    assert float(signed_area(x, y)) == pytest.approx(area, abs=1e-8)


def test_discrete_form_factor_and_transfer():
    x, y, loop = last_period(ideal(10.0))
    assert float(form_factor(x, y)) == pytest.approx(0.56275702, rel=1e-8)
    assert float(loop.r[2 * K + 7]) == pytest.approx(0.0618294105, abs=1e-9)


def richardson(value, *, ks=(60, 120, 240, 480)):
    """Limit of a quantity with an error series in 1/K."""
    table = [value(k) for k in ks]
    for order in range(1, len(ks)):
        table = [(2**order * b - a) / (2**order - 1) for a, b in itertools.pairwise(table)]
    return table[0]


@pytest.mark.parametrize(("share", "area"), [(0.25, 0.25), (0.5, 0.25), (0.75, 1 / 12), (1.0, 0.0), (2.5, 1 / 20)])
def test_continuum_loop_area(share, area):
    def discrete(k):
        x, y, _ = last_period(ideal(share * k), cycles_per_period=k, periods=4)
        return float(signed_area(x, y))

    assert richardson(discrete) == pytest.approx(area, abs=1e-6)


def test_continuum_perimeter_of_a_whole_period():
    # There and back along y = x/2.
    x, y, _ = last_period(ideal(float(K)))
    assert float(perimeter(x, y)) == pytest.approx(np.sqrt(5), rel=1e-6)
    np.testing.assert_allclose(y, x / 2, rtol=0, atol=1e-12)


def test_exponential_kernel_reaches_pi_over_16():
    def discrete(k):
        device = dataclasses.replace(ideal(1.0), memory=Exponential(k / (2 * np.pi)))
        x, y, _ = last_period(device, cycles_per_period=k, periods=8)
        return float(signed_area(x, y))

    assert richardson(discrete) == pytest.approx(np.pi / 16, abs=2e-6)


def window_area(window, k=K):
    x, y, _ = last_period(ideal(window), cycles_per_period=k)
    return signed_area(x, y)


@pytest.mark.parametrize("window", [1.3, 7.25, 10.5, 39.9])
def test_window_derivative_against_finite_differences(window):
    h = 1e-5
    numeric = (window_area(window + h) - window_area(window - h)) / (2 * h)
    assert float(jax.grad(window_area)(window)) == pytest.approx(float(numeric), abs=1e-8)


def test_window_derivative_at_an_integer_is_the_right_one():
    h = 1e-6
    right = (window_area(10.0 + h) - window_area(10.0)) / h
    left = (window_area(10.0) - window_area(10.0 - h)) / h
    slope = float(jax.grad(window_area)(10.0))
    assert slope == pytest.approx(float(right), abs=1e-6)
    assert abs(slope - float(left)) > 1e-5


def test_window_derivative_in_the_continuum():
    # dA/dT = (pi/2 - 1)/T_osc at T = T_osc/4; the mean of both one-sided slopes is free of the kink.
    def discrete(k):
        both = [jax.grad(lambda w: window_area(w, k))(k / 4 + shift) for shift in (-1e-9, 0.0)]
        return float(sum(both)) / 2 * k

    assert richardson(discrete, ks=(80, 160, 320)) == pytest.approx(np.pi / 2 - 1, rel=1e-4)


@pytest.mark.parametrize("source", ["measured", "model", "command"])
@pytest.mark.parametrize("platform", ["ion", "photonic"])
def test_run_equals_stream(platform, source):
    errors = {"readout_error_bright": 0.01, "readout_error_dark": 0.02, "source": source}
    memory = MovingAverage(4.5)
    if platform == "ion":
        device = IonMemristor(memory=memory, method=ClosedForm(), rabi_scale_1=0.93, **errors)
    else:
        device = PhotonicMemristor(memory=memory, loss=0.1, efficiency=0.98, dark_counts=0.01, source=source)
    x = sine_input(periods=2, cycles_per_period=12)
    at_once, one_by_one = run(device, x), stream(device, x)
    for name in ("x", "y", "r", "p_x", "p_y", "coherence", "purity", "populations_1", "populations_2"):
        np.testing.assert_allclose(getattr(one_by_one, name), getattr(at_once, name), rtol=0, atol=1e-12, err_msg=name)


def test_run_equals_stream_with_the_full_dynamics():
    device = IonMemristor(memory=Exponential(3.0), detuning_1_hz=2e3, laser_linewidth_hz=300.0)
    x = sine_input(periods=1, cycles_per_period=6)
    at_once, one_by_one = run(device, x), stream(device, x)
    np.testing.assert_allclose(one_by_one.y, at_once.y, rtol=0, atol=1e-12)
    assert bool(jnp.all(at_once.valid))


def test_platforms_agree_where_both_are_ideal():
    x = sine_input(periods=1, cycles_per_period=12)
    ion, photon = run(ideal(3.0), x), run(PhotonicMemristor(memory=MovingAverage(3.0)), x)
    for name in ("x", "y", "r", "coherence", "purity", "populations_2"):
        np.testing.assert_allclose(getattr(ion, name), getattr(photon, name), rtol=0, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(ion.purity, 1 - 2 * ion.r * (1 - ion.r) * ion.x**2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", ["lambda", "v", "ladder"])
def test_schemes_agree_where_they_are_ideal(scheme):
    far = {"lifetime_s": np.inf, "separation_s": 260e-6, "lead_s": 160e-6, "tail_s": 160e-6}
    x = sine_input(periods=1, cycles_per_period=10)
    device = IonMemristor(memory=MovingAverage(3.0), scheme=scheme, **far)
    np.testing.assert_allclose(run(device, x).y, run(ideal(3.0), x).y, rtol=0, atol=1e-8)


def test_automatic_says_what_it_chose():
    x = sine_input(periods=1, cycles_per_period=6)
    far = {"lifetime_s": np.inf, "separation_s": 260e-6, "lead_s": 160e-6, "tail_s": 160e-6}
    memory = MovingAverage(3.0)
    assert run(IonMemristor(memory=memory, method=Automatic(), **far), x).method == "closed form"
    assert run(IonMemristor(memory=memory, method=Automatic(1e-2)), x).method == "closed form"
    assert run(IonMemristor(memory=memory, method=Automatic()), x).method == "static grid"
    with pytest.raises(ValueError, match="name the method"):
        jax.grad(lambda s: run(IonMemristor(memory=memory, method=Automatic(), rabi_scale_1=s), x).y[3])(1.0)


def test_bound_on_the_closed_form_holds():
    r = np.random.default_rng(3)
    n = 60
    numbers = {
        "detuning_1_hz": r.normal(0, 500, n),
        "detuning_2_hz": r.normal(0, 500, n),
        "laser_linewidth_hz": r.uniform(0, 200, n),
        "lifetime_s": 10 ** r.uniform(-2, 1, n),
        "separation_s": r.uniform(70e-6, 200e-6, n),
        "rabi_scale_1": r.uniform(0.7, 1.2, n),
    }
    exact = IonMemristor(memory=MovingAverage(1.0), method=StaticGrid(error=1e-10, steps=160), **numbers)
    closed = dataclasses.replace(exact, method=ClosedForm())
    x, transfer, zero = (jnp.asarray(a) for a in (r.uniform(0, 1, n), r.uniform(0, 1, n), np.zeros(n)))
    populations = [d.respond(x, transfer, zero, zero, alone=False).populations for d in (exact, closed)]
    error = jnp.max(jnp.abs(populations[0] - populations[1]), axis=0)
    bound = exact.closed_form_error(x, transfer)
    assert bool(jnp.all(error <= bound))
    assert float(jnp.median(bound / error)) < 100


def test_mixed_batch_equals_separate_runs():
    device = planned(IonMemristor(memory=MovingAverage(2.0), detuning_2_hz=1e3), {})
    x, transfer, zero = jnp.array([0.2, 0.7, 0.2, 0.7]), jnp.array([0.0, 0.0, 0.4, 0.9]), jnp.zeros(4)
    alone = jnp.array([True, True, False, False])
    mixed = device.respond(x, transfer, zero, zero, alone=alone).populations
    first = device.respond(x[:2], zero[:2], zero[:2], zero[:2], alone=True).populations
    both = device.respond(x[2:], transfer[2:], zero[:2], zero[:2], alone=False).populations
    np.testing.assert_allclose(mixed, jnp.concatenate([first, both], axis=1), rtol=0, atol=1e-8)


def test_recorded_transfers_make_cycles_independent():
    device = IonMemristor(memory=MovingAverage(2.0), method=ClosedForm(), rabi_scale_2=0.9)
    r = np.random.default_rng(0)
    x, transfer, order = r.uniform(0, 1, 9), r.uniform(0, 1, 9), r.permutation(9)
    np.testing.assert_array_equal(run(device, x[order], transfer[order]).y, run(device, x, transfer).y[order])


def test_counts_feed_the_memory():
    device = IonMemristor(memory=MovingAverage(3.0), method=ClosedForm(), readout_error_dark=0.1)
    x = sine_input(periods=2, cycles_per_period=20)
    loop = run(device, x, shots=50, key=jax.random.key(1))
    np.testing.assert_allclose(loop.r, device.memory.filter(loop.n_x / 50), rtol=0, atol=1e-14)
    again = run(device, x, shots=50, key=jax.random.key(1))
    np.testing.assert_array_equal(loop.n_y, again.n_y)
    many = run(device, x, shots=10**6, key=jax.random.key(2))
    np.testing.assert_allclose(many.n_x / 10**6, many.p_x, rtol=0, atol=5e-3)


def test_readout_errors_by_scheme():
    x = jnp.array([0.3])
    for scheme, expected in (("lambda", 0.98 * 0.3 + 0.01 * 0.7), ("v", 0.99 * 0.3 + 0.02 * 0.7)):
        device = ideal(1.0, scheme=scheme, readout_error_bright=0.01, readout_error_dark=0.02)
        assert float(run(device, x).p_x[0]) == pytest.approx(expected, abs=1e-12)


def test_thermal_loop_is_a_joint_average():
    hot = {"n_bar": 9.8, "eta_1": 0.0784, "eta_2": 0.0784, "phonon_nodes": 8}
    device = ideal(1.0, **hot)
    x, transfer, zero = jnp.array([0.9]), jnp.array([0.8]), jnp.zeros(1)
    y = device.respond(x, transfer, zero, zero, alone=False).populations[1]
    n = np.arange(2000)
    weight = 1 / 10.8 * (9.8 / 10.8) ** n
    factor = np.exp(-(0.0784**2) / 2) * scipy.special.eval_laguerre(n, 0.0784**2)
    theta_1, theta_2 = (float(t[0]) for t in device.areas(x, transfer))
    x_n, r_n = np.sin(factor * theta_1 / 2) ** 2, np.sin(factor * theta_2 / 2) ** 2
    assert float(y[0]) == pytest.approx(np.sum(weight * x_n * (1 - r_n)), abs=1e-8)
    product_of_means = np.sum(weight * x_n) * (1 - np.sum(weight * r_n))
    assert abs(float(y[0]) - product_of_means) > 1e-3


def test_mean_phonon_number_has_a_derivative_at_zero():
    def y(n_bar):
        device = ideal(1.0, n_bar=n_bar, eta_1=0.08, eta_2=0.08, phonon_nodes=8)
        zero = jnp.zeros(1)
        return device.respond(jnp.array([0.6]), jnp.array([0.3]), zero, zero, alone=False).populations[1, 0]

    for n_bar in (0.0, 0.5, 5.0):
        h = 1e-5
        numeric = (y(n_bar + h) - y(max(n_bar - h, 0.0))) / (h + min(n_bar, h))
        assert float(jax.grad(y)(n_bar)) == pytest.approx(float(numeric), rel=1e-4)


def test_gradients_through_the_full_dynamics():
    base = IonMemristor(memory=MovingAverage(2.5), source="model", method=StaticGrid(), steps=(48, 96))
    x = jnp.array([0.1, 0.6, 0.9, 0.4])
    values = {
        "rabi_scale_1": 0.95,
        "rabi_scale_2": 1.04,
        "detuning_1_hz": 1500.0,
        "detuning_2_hz": -900.0,
        "laser_linewidth_hz": 400.0,
        "sigma_1_s": 20e-6,
        "separation_s": 80e-6,
        "lifetime_s": 2e-3,
        "branching": 0.4,
        "tail_s": 100e-6,
    }

    @jax.jit
    def total(numbers):
        return jnp.sum(run(dataclasses.replace(base, **numbers), x).y[2:])

    slopes = jax.jit(jax.grad(total))({name: jnp.asarray(value) for name, value in values.items()})
    for name, value in values.items():
        h = 1e-4 * abs(value)
        numeric = (total({**values, name: value + h}) - total({**values, name: value - h})) / (2 * h)
        # Per relative change of the parameter, so that one absolute tolerance serves all.
        assert float(slopes[name]) * value == pytest.approx(float(numeric) * value, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sigma_1_s": -1e-6}, "`sigma_1_s` must be positive"),
        ({"sigma_2_s": np.nan}, "`sigma_2_s` must be positive and finite"),
        ({"laser_linewidth_hz": -5.0}, "`laser_linewidth_hz` must be finite"),
        ({"lifetime_s": 0.0}, "`lifetime_s` must be positive"),
        ({"branching": 1.2}, "`branching` must be in"),
        ({"readout_error_dark": -0.1}, "`readout_error_dark` must be in"),
        ({"scheme": "W"}, "`scheme` must be one of"),
        ({"n_bar": 3.0}, "`phonon_nodes` must be larger than 1"),
        ({"detuning_1_hz": np.inf}, "`detuning_1_hz` must be finite"),
    ],
)
def test_bad_devices_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        IonMemristor(memory=MovingAverage(2.0), **changes)


def test_bad_runs_are_refused():
    x = jnp.array([0.1, 0.2])
    with pytest.raises(ValueError, match="`shots` and `key` go together"):
        run(ideal(2.0), x, shots=10)
    for shots in (0, 2.5):
        with pytest.raises(ValueError, match=f"`shots` must be whole and at least 1, but is {shots}"):
            run(ideal(2.0), x, shots=shots, key=jax.random.key(0))
    with pytest.raises(ValueError, match="`source` must be one of"):
        run(ideal(2.0, source="rumour"), x)
    with pytest.raises(ValueError, match="at least one cycle"):
        ideal(0.5)


@pytest.mark.slow
def test_reference_method_agrees():
    x = jnp.array([0.15, 0.85])
    grid = IonMemristor(memory=MovingAverage(1.0), detuning_1_hz=3e3, laser_linewidth_hz=500.0, separation_s=60e-6)
    loop, reference = run(grid, x), run(dataclasses.replace(grid, method=Adaptive()), x)
    np.testing.assert_allclose(loop.y, reference.y, rtol=0, atol=1e-8)
    np.testing.assert_allclose(loop.coherence, reference.coherence, rtol=0, atol=1e-7)
    np.testing.assert_allclose(loop.purity, reference.purity, rtol=0, atol=1e-7)
    assert np.all(loop.purity < 1 - 2 * loop.r * (1 - loop.r) * loop.x**2 - 1e-3)  # a broad line costs purity
    assert reference.method == "adaptive"


def test_many_photonic_devices_are_cut_into_blocks():
    """They have no method whose numbers would belong to no lane."""
    x, losses = sine_input(periods=1, cycles_per_period=12), np.linspace(0, 0.5, 70)
    many = run(PhotonicMemristor(memory=MovingAverage(3.0), loss=losses), x[:, None])
    for k in (0, 33, 69):
        one = run(PhotonicMemristor(memory=MovingAverage(3.0), loss=losses[k]), x)
        np.testing.assert_allclose(many.y[:, k], one.y, rtol=0, atol=1e-14)


def test_loss_thins_the_photonic_output():
    """y = (1 - loss)(1 - R) x, coherence 2 sqrt((1 - loss)(1 - R) x (1 - x)); the input run sees no loss."""
    x, r = jnp.array([0.0, 0.3, 0.8, 1.0]), jnp.array([0.5, 0.2, 0.7, 0.0])
    loop = run(PhotonicMemristor(memory=MovingAverage(2.0), loss=0.1), x, r)
    np.testing.assert_array_equal(loop.x, x)
    np.testing.assert_allclose(loop.y, 0.9 * (1 - r) * x, rtol=0, atol=1e-15)
    np.testing.assert_allclose(loop.coherence, 2 * np.sqrt(0.9 * (1 - r) * x * (1 - x)), rtol=0, atol=1e-15)
    np.testing.assert_allclose(jnp.sum(loop.populations_2, axis=0), 1.0, rtol=0, atol=1e-15)


def test_heating_weakens_pulse_2_more():
    """Each pulse sees the phonons that there are at its centre: the same as a warmer ion for that pulse."""
    x, r, zero = jnp.array([0.9]), jnp.array([0.8]), jnp.zeros(1)
    hot = {"n_bar": 2.0, "eta_1": 0.08, "phonon_nodes": 8, "lead_s": 0.0}
    heated = ideal(1.0, eta_2=0.08, heating_rate_per_s=2e4, **hot)
    y = heated.respond(x, r, zero, zero, alone=False).populations[1]
    cold = ideal(1.0, eta_2=0.08, **hot)
    np.testing.assert_allclose(
        heated.respond(x, zero, zero, zero, alone=True).populations,
        cold.respond(x, zero, zero, zero, alone=True).populations,
        rtol=0,
        atol=1e-14,
    )
    n = np.arange(400)
    weight, gained = 1 / 3 * (2 / 3) ** n, 2e4 * 120e-6
    factor = lambda number: np.exp(-(0.08**2) / 2) * scipy.special.hyp1f1(-number, 1.0, 0.08**2)  # Laguerre, real n
    theta_1, theta_2 = (float(t[0]) for t in heated.areas(x, r))
    terms = np.sin(factor(n) * theta_1 / 2) ** 2 * np.cos(factor(n + gained) * theta_2 / 2) ** 2
    assert float(y[0]) == pytest.approx(np.sum(weight * terms), abs=1e-8)


def test_batches_of_devices():
    """Trailing axes of the parameters, and `filter_vmap` over devices, give each device's own loop."""
    x = sine_input(periods=1, cycles_per_period=8)
    scales, windows = jnp.array([0.9, 1.0, 1.1]), jnp.array([1.0, 2.5, 4.0])
    own = [run(ideal(w, rabi_scale_1=s, source="model"), x) for s, w in zip(scales, windows, strict=True)]
    trailing = run(ideal(windows, rabi_scale_1=scales, source="model"), jnp.broadcast_to(x[:, None], (x.size, 3)))
    mapped = eqx.filter_vmap(lambda w, s: run(ideal(w, rabi_scale_1=s, source="model"), x))(windows, scales)
    for k, loop in enumerate(own):
        np.testing.assert_allclose(trailing.y[:, k], loop.y, rtol=0, atol=1e-14)
        np.testing.assert_allclose(mapped.y[k], loop.y, rtol=0, atol=1e-14)

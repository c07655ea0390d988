"""The area series against direct solves: the stated error holds, for every scheme, overlap and noise."""

import dataclasses
import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twin.area_series import AreaSeries, choose_nodes, reach, truncation
from twin.area_table import even_series, odd_series, points
from twin.dynamics import StaticGrid
from twin.loop import Settings
from twin.memory import MovingAverage
from twin.memristor import IonMemristor, Lindblad, coarsened, planned, run, sine_input, stream

BOX = {
    "rabi_scale_1": (0.6, 1.3),
    "rabi_scale_2": (0.6, 1.3),
    "detuning_1_hz": (-5e3, 5e3),
    "detuning_2_hz": (-5e3, 5e3),
    "laser_linewidth_hz": (0.0, 2e3),
    "sigma_1_s": (15e-6, 25e-6),
    "sigma_2_s": (15e-6, 25e-6),
    "separation_s": (40e-6, 300e-6),
    "lead_s": (60e-6, 200e-6),
    "tail_s": (60e-6, 200e-6),
    "lifetime_s": (1e-3, 1e-1),
    "branching": (0.0, 1.0),
}
ERROR = 1e-8


def ion(**parameters) -> IonMemristor:
    return IonMemristor(**({"memory": MovingAverage(3.0)} | parameters))


@functools.cache
def programs(scheme: str):
    """One program by series and one directly, for any device of the box."""
    series, direct = (
        planned(ion(scheme=scheme, method=method), BOX, detuning_set_hz=2e3)
        for method in (AreaSeries(StaticGrid(ERROR)), StaticGrid(1e-11))
    )

    @eqx.filter_jit
    def both(values, x, r, d1, d2):
        pair = []
        for twin in (series, direct):
            twin = dataclasses.replace(twin, **values)
            pair.append([twin.under(Settings(d1, d2))(x, r, alone=alone) for alone in (True, False)])
        return pair

    return both


def assert_within_the_stated_error(by_series, directly, requested=ERROR):
    for one, other in zip(by_series, directly, strict=True):
        assert bool(jnp.all(one.valid))
        assert bool(jnp.all(other.valid))
        error = jnp.max(jnp.abs(one.populations - other.populations), axis=0)
        assert float(jnp.max(one.error_estimate)) <= requested
        # The grid and the reach of each solve are guarantees of their own, of a few per cent of the request.
        assert bool(jnp.all(error <= one.error_estimate + 0.1 * requested))


@pytest.mark.parametrize(
    ("scheme", "draws"), [("lambda", 200), *(pytest.param(s, 50, marks=pytest.mark.slow) for s in ("v", "ladder"))]
)
def test_random_devices(scheme, draws):
    """Each with 12 cycles of its own; 0 and 1 among the commands."""
    rng = np.random.default_rng(11)
    values = {name: jnp.asarray(rng.uniform(*box, draws)) for name, box in BOX.items()}
    ends = np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])[..., None]
    x, r = (jnp.asarray(np.concatenate([e + np.zeros(draws), rng.uniform(0, 1, (9, draws))])) for e in ends)
    d1, d2 = (jnp.asarray(rng.uniform(-2e3, 2e3, draws)) for _ in (1, 2))
    assert_within_the_stated_error(*programs(scheme)(values, x, r, d1, d2))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_device(data):
    values = {name: jnp.asarray(data.draw(st.floats(*box))) for name, box in BOX.items()}
    commands = [jnp.asarray(data.draw(st.lists(st.floats(0, 1), min_size=3, max_size=3))) for _ in (1, 2)]
    offsets = [jnp.asarray(data.draw(st.floats(-2e3, 2e3))) for _ in (1, 2)]
    assert_within_the_stated_error(*programs("lambda")(values, *commands, *offsets))


def test_coherence():
    device = ion(detuning_1_hz=900.0, detuning_2_hz=-1500.0, laser_linewidth_hz=400.0, separation_s=90e-6)
    x = sine_input(periods=3, cycles_per_period=30)
    by_series, directly = (run(dataclasses.replace(device, method=m), x) for m in (AreaSeries(), StaticGrid(1e-10)))
    assert (by_series.method, directly.method) == ("area series", "static grid")
    np.testing.assert_allclose(by_series.coherence, directly.coherence, rtol=0, atol=2e-8)
    np.testing.assert_allclose(by_series.purity, directly.purity, rtol=0, atol=2e-8)


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("theta_max", [0.5, 3.3, 4.1, 9.0])
@pytest.mark.parametrize("nodes", [3, 6, 9])
def test_truncation_bounds_the_error_of_a_full_transfer(theta_max, nodes):
    u = np.linspace(0, 1, 201)
    values = np.sin(theta_max * points(nodes) / 2) ** 2
    series = np.asarray(even_series(jnp.asarray(values), jnp.zeros(())))
    orders = 2 * np.arange(nodes + 1)
    error = np.abs(np.cos(np.arccos(u)[:, None] * orders) @ series - np.sin(theta_max * u / 2) ** 2).max()
    assert error <= truncation(theta_max, nodes) + 1e-14
    if math.isfinite(truncation(theta_max, nodes)) and truncation(theta_max, nodes) > 1e-12:
        assert error > 0.02 * truncation(theta_max, nodes)


def test_odd_series_are_exact_for_odd_polynomials():
    n = 5
    coefficients = np.asarray(odd_series(jnp.asarray(points(n) ** 7 - 2 * points(n))))
    u = np.linspace(-1, 1, 31)
    orders = 2 * np.arange(n) + 1
    np.testing.assert_allclose(np.cos(np.arccos(u)[:, None] * orders) @ coefficients, u**7 - 2 * u, atol=1e-13)


def test_fewer_nodes_for_larger_errors_and_none_for_the_overlap_of_distant_pulses():
    coarse, fine = choose_nodes(3.3, 3.3, 1e-3, 1e-5, False), choose_nodes(3.3, 3.3, 1e-3, 1e-10, False)
    assert coarse.pulse < fine.pulse
    assert coarse.overlap < fine.overlap
    assert choose_nodes(3.3, 3.3, 2e-10, 1e-8, False).overlap == 0
    assert choose_nodes(3.3, 3.3, 0.0, 1e-8, False).overlap == 0
    assert reach(1e-12) > reach(1e-6) > 5


# ------------------------------------------------------------------------------------------------ where it serves


@pytest.mark.slow
def test_series_serve_long_loops_and_direct_solves_short_ones():
    x = sine_input(periods=3, cycles_per_period=40)
    assert run(ion(), x).method == "area series"
    assert run(ion(), x[:12]).method == "static grid"
    assert run(ion(method=Lindblad(1e-6)), x[:45]).method == "area series"  # coarser: fewer nodes


@pytest.mark.parametrize(
    "moving",
    [pytest.param({}, marks=pytest.mark.slow), {"n_bar": 5.0, "eta_1": 0.08, "eta_2": 0.07, "phonon_nodes": 6}],
    ids=str,
)
def test_loops_under_several_settings_with_motion(moving):
    x = sine_input(periods=2, cycles_per_period=40)
    offsets = {"detuning_1_set_hz": np.where(np.arange(81) < 40, 0.0, 2e3), "detuning_2_set_hz": -700.0}
    device = ion(laser_linewidth_hz=300.0, **moving)
    one, other = (run(dataclasses.replace(device, method=m), x, **offsets) for m in (AreaSeries(), StaticGrid(1e-10)))
    np.testing.assert_allclose(one.y, other.y, rtol=0, atol=ERROR)
    streamed = stream(dataclasses.replace(device, method=AreaSeries()), x, **offsets)
    np.testing.assert_allclose(streamed.y, one.y, rtol=0, atol=1e-13)


@pytest.mark.slow
def test_gradients_in_every_parameter():
    """Through nodes, flights and areas, against central differences of the series themselves."""
    values = {name: 0.4 * low + 0.6 * high for name, (low, high) in BOX.items()} | {"separation_s": 80e-6}
    box = {name: (0.95 * value, 1.05 * value) for name, value in values.items()}
    twin = planned(ion(method=AreaSeries(StaticGrid(1e-10)), source="model"), box)
    x = jnp.array([0.1, 0.6, 0.9, 0.4])

    @jax.jit
    def total(numbers):
        return jnp.sum(run(dataclasses.replace(twin, **numbers), x).y[1:])

    slopes = jax.jit(jax.grad(total))({name: jnp.asarray(v) for name, v in values.items()})
    for name, value in values.items():
        h = 2e-4 * abs(value)
        numeric = (total({**values, name: value + h}) - total({**values, name: value - h})) / (2 * h)
        assert float(slopes[name]) * value == pytest.approx(float(numeric) * value, rel=2e-5, abs=2e-7), name


@pytest.mark.slow
def test_the_derivative_in_the_areas_is_exact():
    """At a point, to the error of the series; and zero by rule at commands of 0 and 1."""
    twin = ion(method=AreaSeries(StaticGrid(1e-10)), detuning_1_hz=800.0).prepared(jnp.ones(1), Settings())
    respond = twin.under(Settings())

    def y(x, r):
        return respond(jnp.array([x]), jnp.array([r]), alone=False).populations[1, 0]

    for x, r in ((0.3, 0.6), (0.9, 0.05)):
        h = 1e-4
        for k in (0, 1):
            step = (h, 0.0) if k == 0 else (0.0, h)
            numeric = (y(x + step[0], r + step[1]) - y(x - step[0], r - step[1])) / (2 * h)
            assert float(jax.grad(y, argnums=k)(x, r)) == pytest.approx(float(numeric), rel=1e-5)
    assert float(jax.grad(y)(0.0, 0.5)) == 0.0
    assert float(jax.grad(y, argnums=1)(0.5, 1.0)) == 0.0


@pytest.mark.slow
def test_a_bad_device_spoils_no_other():
    values = {name: jnp.full(4, 0.5 * sum(box)) for name, box in BOX.items()}
    x = r = jnp.full((3, 4), 0.5)
    zero = jnp.zeros(4)
    healthy = programs("lambda")(values, x, r, zero, zero)[0][1]
    hurt = values | {"detuning_1_hz": jnp.array([0.0, 0.0, np.nan, 0.0])}
    spoilt = programs("lambda")(hurt, x, r, zero, zero)[0][1]
    keep = np.array([True, True, False, True])
    np.testing.assert_array_equal(spoilt.populations[..., keep], healthy.populations[..., keep])
    assert not np.any(spoilt.valid[:, 2])
    assert np.all(np.isnan(spoilt.populations[..., 2]))


@pytest.mark.parametrize("scale", [1.3, 2.2])
def test_beyond_the_planned_box_is_flagged(scale):
    """Whether the series or the steps are too few."""
    twin = planned(ion(method=AreaSeries()), {"rabi_scale_1": (0.9, 1.0)})
    wild = dataclasses.replace(twin, rabi_scale_1=scale)
    response = wild.under(Settings())(jnp.full(3, 0.5), jnp.full(3, 0.5), alone=False)
    assert not np.any(response.valid)
    assert np.all(np.isnan(response.populations))


def test_a_coarser_error_is_the_same_program():
    twin = planned(ion(method=AreaSeries()), BOX)
    traces = []

    @eqx.filter_jit
    def solve(device):
        traces.append(None)
        return device.under(Settings())(jnp.full(2, 0.3), jnp.full(2, 0.7), alone=False)

    fine, coarse = solve(coarsened(twin, ERROR)), solve(coarsened(twin, 1e-5))
    assert len(traces) == 1
    assert float(fine.error_estimate.max()) <= ERROR
    assert 10 * float(fine.error_estimate.max()) < float(coarse.error_estimate.max()) <= 1e-5
    np.testing.assert_allclose(fine.populations, coarse.populations, rtol=0, atol=1e-5)


def test_undecided_methods_are_refused_inside_a_trace():
    with pytest.raises(ValueError, match="`Lindblad` is decided from known values"):
        jax.jit(lambda s: run(ion(rabi_scale_1=s), sine_input(periods=1, cycles_per_period=8)).y)(1.0)

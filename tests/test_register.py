"""Registers: ions without crosstalk are single ions; with it they see the sum of the fields."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twin.dynamics import StaticGrid, evolve
from twin.loop import Settings
from twin.memory import MovingAverage
from twin.memristor import AreaSeries, ClosedForm, IonMemristor, Lindblad, run, stream
from twin.phonons import Motion
from twin.phonons import planned as plan_motion
from twin.pulses import Gaussian
from twin.register import Register, gaussian_shares

IONS, CYCLES = 4, 13
PHASES = np.array([0.0, 0.3, 0.55, 0.9])
X = np.sin(np.pi * (np.arange(CYCLES)[:, None] / 12 + PHASES)) ** 2


def ion(**more):
    given = {"memory": MovingAverage(4.0), "rabi_scale_1": np.array([1.0, 0.96, 1.03, 0.99]), "rabi_scale_2": 1.02,
             "detuning_1_hz": np.array([200.0, -300.0, 0.0, 100.0]), "laser_linewidth_hz": 40.0}  # fmt: skip
    return IonMemristor(**(given | more))


def alone(device, k):
    """Ion k of a register as a device of its own."""
    pick = lambda a: a[k] if np.shape(a) == (IONS,) else a
    fields = {f.name: pick(getattr(device, f.name)) for f in dataclasses.fields(device)
              if f.name not in ("memory", "method", "motion") and not f.metadata.get("static", False)}  # fmt: skip
    return dataclasses.replace(device, **{name: value for name, value in fields.items() if value is not None})


def test_without_crosstalk_each_ion_is_a_memristor_of_its_own():
    together = run(Register(ion(), IONS), X)
    for k in range(IONS):
        single = run(alone(ion(), k), X[:, k])
        np.testing.assert_allclose(together.x[:, k], single.x, atol=2e-8)
        np.testing.assert_allclose(together.y[:, k], single.y, atol=2e-8)
        np.testing.assert_allclose(together.r[:, k], single.r, atol=2e-8)


@pytest.mark.parametrize("phase", [0.0, 1.1])
def test_fields_add_before_they_act(phase):
    # Resonant pulses apart in time: x = sin^2 of half the modulus of the summed area.
    share = np.array(gaussian_shares(jnp.arange(IONS) * 5e-6, jnp.asarray(3.5e-6)))
    device = ion(method=ClosedForm(), detuning_1_hz=0.0, laser_linewidth_hz=0.0)
    loop = run(Register(device, IONS, share, share, phase_rad=phase), X)
    theta = 2 * np.arcsin(np.sqrt(X)) * np.asarray(device.rabi_scale_1)
    field = share * np.exp(1j * phase * (1 - np.eye(IONS)))
    np.testing.assert_allclose(loop.x, np.sin(np.abs(theta @ field.T) / 2) ** 2, atol=1e-12)
    theta_2 = 2 * np.arcsin(np.sqrt(np.asarray(loop.r))) * 1.02
    kept = np.cos(np.abs(theta_2 @ field.T) / 2) ** 2
    np.testing.assert_allclose(loop.y, loop.x * kept, atol=1e-12)
    assert np.max(np.abs(loop.x - run(Register(device, IONS), X).x)) > 0.05


def test_against_the_integrated_sum_of_three_beams():
    """The Lindblad equation of one ion under its own and both neighbours' pulses, as separate couplings of one line."""
    share = np.array([[1.0, 0.05, 0.0, 0.0], [0.05, 1.0, 0.05, 0.0], [0.0, 0.05, 1.0, 0.05], [0.0, 0.0, 0.05, 1.0]])
    device = ion(method=Lindblad(1e-8))
    loop = run(Register(device, IONS, share, share), X, np.full_like(X, 0.4))
    k, cycle = 2, 5
    own = alone(device, k)
    system = own.system(0.0, 0.0)
    v_s, s_m = system.couplings
    system = dataclasses.replace(system, couplings=(v_s,) * 3 + (s_m,) * 3)
    scale, pulses = np.asarray(device.rabi_scale_1), []
    theta_1 = 2 * np.arcsin(np.sqrt(X[cycle])) * scale
    theta_2 = np.full(IONS, 2 * math.asin(math.sqrt(0.4)) * 1.02)
    for theta, center in ((theta_1, 0.0), (theta_2, float(own.separation_s))):
        for j in (k - 1, k, k + 1):
            pulses.append(Gaussian.from_area(share[k, j] * theta[j], center_s=center, sigma_s=20e-6))
    solution = evolve(system, tuple(pulses), start="v", window_s=own.window(False), method=StaticGrid(error=1e-9))
    assert float(loop.y[cycle, k]) == pytest.approx(float(solution.populations[0, 1]), abs=3e-8)


def test_nearest_neighbours_by_their_measured_share():
    explicit = np.eye(IONS) + 0.03 * (np.abs(np.subtract.outer(np.arange(IONS), np.arange(IONS))) == 1)
    device = ion(method=ClosedForm())
    by_share = run(Register(device, IONS, explicit, explicit), X)
    by_number = run(Register(device, IONS, crosstalk_1=0.03, crosstalk_2=0.03), X)
    np.testing.assert_allclose(by_share.y, by_number.y, atol=1e-14)


def test_a_beam_that_misses_its_ion():
    positions = jnp.arange(3) * 5e-6
    share = gaussian_shares(positions, jnp.asarray(2e-6), jnp.array([0.0, 1e-6, 0.0]))
    assert float(share[1, 1]) == pytest.approx(math.exp(-0.25))
    assert float(share[2, 1]) == pytest.approx(math.exp(-((4 / 2) ** 2)))
    assert float(share[0, 1]) == pytest.approx(math.exp(-((6 / 2) ** 2)))
    assert float(share[0, 0]) == 1.0


def test_cycle_by_cycle_is_the_same():
    register = Register(ion(method=AreaSeries(StaticGrid(error=1e-8))), IONS, crosstalk_1=0.02, crosstalk_2=0.04)
    np.testing.assert_allclose(stream(register, X).y, run(register, X).y, atol=1e-10)


def test_each_ion_may_remember_for_a_time_of_its_own():
    windows = np.array([2.0, 3.5, 5.0, 8.0])
    loop = run(Register(ion(memory=MovingAverage(windows), method=ClosedForm()), IONS, crosstalk_1=0.02), X)
    for k, window in enumerate(windows):
        fed = MovingAverage(window).filter(loop.p_x[:, k])
        np.testing.assert_allclose(loop.r[:, k], fed, atol=1e-12)


def test_moving_ions_slow_every_beam_that_they_see():
    motion = plan_motion(Motion(np.array([[0.05] * IONS, [0.03, 0.06, 0.06, 0.03]])), 2.0, 4.0, 1e-8)
    series, given = AreaSeries(StaticGrid(error=1e-8)), np.full_like(X, 0.3)
    device = ion(motion=motion, n_bar=2.0, method=series)
    loop = run(Register(device, IONS, crosstalk_1=0.02), X, given)
    still = run(Register(ion(method=series), IONS, crosstalk_1=0.02), X, given)
    direct = dataclasses.replace(device, method=StaticGrid(error=1e-9))
    exact = run(Register(direct, IONS, crosstalk_1=0.02), X[:3], given[:3])
    np.testing.assert_allclose(loop.y[:3], exact.y, atol=2e-8)
    assert np.max(np.abs(loop.y - still.y)) > 1e-3


def test_a_dark_ion_sees_its_neighbours():
    dark = ion(method=Lindblad(1e-8), rabi_scale_1=np.array([1.0, 0.0, 1.0, 1.0]))
    loop = run(Register(dark, IONS, crosstalk_1=0.1), X, np.full_like(X, 0.3))
    assert bool(jnp.all(loop.valid))
    assert 0.005 < float(jnp.max(loop.x[:, 1])) < 0.2


def test_thermal_averages_hold_for_the_light_of_all_beams():
    # Laid for the ion's own area: with all neighbours on, cycles are flagged, not wrong.
    motion = plan_motion(Motion(np.full((1, IONS), 0.12)), 5.0, 3.2, 1e-8)
    device = ion(motion=motion, n_bar=5.0, method=ClosedForm(), rabi_scale_1=1.0, rabi_scale_2=1.0)
    share = np.full((IONS, IONS), 0.8) + 0.2 * np.eye(IONS)
    full = np.ones((2, IONS))
    assert bool(jnp.all(run(device, full, full).valid))
    assert not bool(jnp.any(run(Register(device, IONS, share, share), full, full).valid))


def test_gradients_against_finite_differences():
    planned = Register(ion(method=AreaSeries(StaticGrid(error=1e-8))), IONS, crosstalk_1=0.05, crosstalk_2=0.05)
    planned = planned.prepared(jnp.asarray(X), Settings())

    @jax.jit
    def mean(v):
        scales = jnp.array([1.0, 0.96, 1.03, 0.99]) * v[0]
        device = dataclasses.replace(planned.ion, rabi_scale_1=scales)
        register = dataclasses.replace(planned, ion=device, crosstalk_1=v[1], crosstalk_2=v[2], phase_rad=v[3])
        return jnp.mean(run(register, X).y[:, 1])

    at = jnp.array([1.0, 0.02, 0.03, 0.4])
    slope = np.asarray(jax.grad(mean)(at))
    for k in range(4):
        step = 1e-4 * np.eye(4)[k]
        finite = float(mean(at + step) - mean(at - step)) / 2e-4
        assert slope[k] == pytest.approx(finite, abs=3e-6), k


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"`share_1` must have shape \(4, 4\)"):
        Register(ion(), IONS, np.eye(3))
    with pytest.raises(ValueError, match=r"`sigma_1_s` differs from ion to ion"):
        Register(ion(sigma_1_s=np.array([2e-5, 2e-5, 2e-5, 3e-5])), IONS, crosstalk_1=0.01)
    with pytest.raises(ValueError, match=r"`crosstalk_2` must be zero or positive"):
        Register(ion(), IONS, crosstalk_2=-0.1)
    Register(ion(sigma_1_s=np.array([2e-5, 2e-5, 2e-5, 3e-5])), IONS)


@pytest.mark.slow
def test_a_register_of_300_ions_and_1000_cycles_is_one_batch():
    rng = np.random.default_rng(0)
    many = 300
    spread = lambda width: 1 + width * rng.normal(size=many)
    device = IonMemristor(memory=MovingAverage(10.0), rabi_scale_1=spread(0.05), rabi_scale_2=spread(0.05),
                          detuning_1_hz=300 * rng.normal(size=many), laser_linewidth_hz=50.0)  # fmt: skip
    x = np.sin(np.pi * (np.arange(1000)[:, None] / 40 + rng.random(many))) ** 2
    register = Register(device, many, crosstalk_1=0.02, crosstalk_2=0.02)
    loop = run(register, x)
    assert loop.y.shape == (1000, many) and bool(jnp.all(loop.valid))
    assert float(jnp.max(loop.error_estimate)) < 1e-8
    # An ion and its neighbours, alone.
    few = slice(100, 105)
    own = {name: getattr(device, name)[few] for name in ("rabi_scale_1", "rabi_scale_2", "detuning_1_hz")}
    part = Register(dataclasses.replace(device, **own), 5, crosstalk_1=0.02, crosstalk_2=0.02)
    np.testing.assert_allclose(loop.x[:, 102], run(part, x[:, few]).x[:, 2], atol=2e-8)

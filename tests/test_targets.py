"""Targets of pulse optimization: each against its closed form, their sums, and their slopes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

from calibration.control import apply_commands
from calibration.targets import (
    Duration,
    Energy,
    Inputs,
    Leakage,
    LoopCurve,
    LoopShape,
    Obedience,
    Retention,
    Roughness,
    Transfer,
    Weighted,
    disobedience,
    loop_target,
    parts,
    settled_periods,
)
from twin.hysteresis import form_factor
from twin.loop import Settings, run, sine_input
from twin.memristor import ClosedForm, IonMemristor, Lindblad, PhotonicMemristor

NOW = (jnp.zeros(()), jnp.zeros(()))
SIGMA, APART = 20e-6, 120e-6


def ion(**changes) -> IonMemristor:
    given = {"method": ClosedForm(), "sigma_1_s": SIGMA, "sigma_2_s": SIGMA, "separation_s": APART,
             "source": "model"} | changes  # fmt: skip
    return tables.ion(**given)


def test_transfer_is_what_is_missing_in_a_level():
    device = ion(rabi_scale_1=0.9, rabi_scale_2=1.1)
    s, m = np.sin(0.9 * np.pi / 2) ** 2, np.sin(1.1 * np.pi / 2) ** 2
    np.testing.assert_allclose(Transfer("m").value(device, NOW), 1 - s * m, atol=1e-12)
    np.testing.assert_allclose(Transfer("s", 1.0, 0.0).value(device, NOW), 1 - s, atol=1e-12)
    with pytest.raises(ValueError, match="one of v, s, m, but is 'l'"):
        Transfer("l").value(device, NOW)


@pytest.mark.slow
def test_leakage_is_what_a_decaying_top_loses():
    """All that pulse 2 moves, x r, is lost from the top of the ladder: a quarter of the population in the mean."""
    device = ion(scheme="ladder", m_lifetime_s=50e-6, method=Lindblad(1e-7), lifetime_s=math.inf, tail_s=200e-6)
    ready = device.prepared(jnp.ones(400), Settings.of(0.0, 0.0, ()))
    # Fast decay of the top weakens the pulse that drives it (Zeno), so somewhat less than a quarter arrives there.
    assert 0.2 < float(Leakage().value(ready, NOW)) < 0.25


def test_what_nothing_leaks_from():
    assert float(Leakage().value(ion(), NOW)) == 0.0


def test_retention_is_exponential():
    device = ion(lifetime_s=0.05)
    lost = (1 - math.exp(-0.01 / 0.05)) / 3
    np.testing.assert_allclose(Retention(0.01).value(device, NOW), lost, rtol=1e-12)
    # In the V scheme s is the ground state: it gains what v and m lose to it.
    gains = ion(scheme="v", lifetime_s=0.05, branching=0.4)
    x, r, weight = Inputs.square()
    expected = 0.4 * (1 - math.exp(-0.2)) * np.sqrt(np.sum(weight * (1 - (1 - r) * x) ** 2))
    np.testing.assert_allclose(Retention(0.01).value(gains, NOW), expected, rtol=1e-12)


def test_costs_of_gaussian_pulses():
    device = ion(lead_s=8 * SIGMA, tail_s=8 * SIGMA)
    peak, window = math.pi / (math.sqrt(2 * math.pi) * SIGMA), 16 * SIGMA + APART
    np.testing.assert_allclose(Energy().value(device, NOW), 2 * peak**2 * SIGMA * math.sqrt(math.pi), rtol=1e-9)
    # |Omega|^2 of each is a Gaussian of width sigma / sqrt 2; the step of the envelope adds its own.
    step = window / 201
    spread = SIGMA**2 / 2 + APART**2 / 4 + step**2 / 12
    np.testing.assert_allclose(Duration().value(device, NOW), math.sqrt(12 * spread), rtol=1e-9)
    slope = 2 * peak**2 * math.sqrt(math.pi) / (2 * SIGMA)
    np.testing.assert_allclose(Roughness().value(device, NOW), math.sqrt(slope / window), rtol=1e-2)
    units = {target.name: target.unit for target in (Energy(), Duration(), Roughness())}
    assert units == {"energy": "rad^2/s", "duration": "s", "roughness": "rad/s^2"}


def test_loops_are_those_of_the_device():
    device = ion()
    target = loop_target("form_factor", device, cycles_per_period=20)
    loop = run(device, sine_input(periods=target.periods, cycles_per_period=20))
    x, y = loop.x[-21:-1], loop.y[-21:-1]
    np.testing.assert_allclose(target.value(device, NOW), form_factor(x, y), rtol=1e-12)
    np.testing.assert_allclose(loop_target("saturation", device, cycles_per_period=20).value(device, NOW), np.max(y))
    periods = settled_periods(device, 20)
    assert float(LoopCurve(x, y, periods).value(device, NOW)) < 1e-12
    np.testing.assert_allclose(LoopCurve(x + 0.03, y - 0.04, periods).value(device, NOW), 0.05, rtol=1e-9)
    with pytest.raises(ValueError, match="area, form_factor, saturation, but is 'size'"):
        LoopShape("size")


def test_obedience_over_the_commands_of_a_loop():
    device = ion(rabi_scale_1=0.95)
    loop = run(PhotonicMemristor(device.memory, source="model"), sine_input(periods=3, cycles_per_period=20))
    inputs = Inputs.of_loop(loop, 20)
    expected = np.sqrt(np.mean(np.square(disobedience(device, inputs.x_set, inputs.r_set, NOW))))
    np.testing.assert_allclose(Obedience(inputs).value(device, NOW), expected, rtol=1e-12)
    assert abs(float(Obedience(inputs).value(device, NOW)) - float(Obedience().value(device, NOW))) > 1e-4


def test_sums_have_weights_and_signs():
    device = ion(rabi_scale_1=0.9)
    loop = loop_target("area", device, cycles_per_period=20)
    total = Weighted((Obedience(), Energy(), loop), [2.0, 1e-9, 0.5])
    obedience, energy, area = (part.value(device, NOW) for part in parts(total))
    expected = 2 * obedience + 1e-9 * energy - 0.5 * area
    np.testing.assert_allclose(total.value(device, NOW), expected, rtol=1e-12)
    assert not total.is_gain and not total.is_error
    for target in (total, Obedience(), loop, Weighted((Obedience(), Energy()), [1.0, 1e-9])):
        loss = float(target.loss(device, NOW))
        np.testing.assert_allclose(target.of_loss(loss), target.value(device, NOW), rtol=1e-12)
    # Lower losses are better: smaller errors, larger gains.
    assert float(Obedience().loss(ion(), NOW)) < float(Obedience().loss(device, NOW))
    np.testing.assert_allclose(loop.loss(device, NOW), -loop.value(device, NOW))
    with pytest.raises(ValueError, match="one weight a target"):
        Weighted((Obedience(),), [1.0, 2.0])


@pytest.mark.parametrize("target", [Obedience(), Retention(1e-3), Leakage()], ids=lambda t: t.name)
def test_perfect_devices_have_losses_and_slopes(target):
    """An error of exactly zero ends a search; it does not break it."""
    at = lambda scale: target.loss(ion(rabi_scale_1=scale, lifetime_s=math.inf), NOW)
    value, slope = jax.value_and_grad(at)(jnp.ones(()))
    assert np.isfinite(value) and np.isfinite(slope)
    assert target.of_loss(float(value)) < 1e-12


TARGETS = {
    "transfer": Transfer("m"), "retention": Retention(1e-2), "energy": Energy(), "duration": Duration(),
    "roughness": Roughness(), "obedience": Obedience(), "saturation": LoopShape("saturation", 20, 3),
    "sum": Weighted((Obedience(), Energy()), [1.0, 1e-9]),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_slopes(name):
    """Along a direction in amplitudes and separation."""
    device = dataclasses.replace(ion(), nominal_sigma_1_s=jnp.asarray(SIGMA), nominal_sigma_2_s=jnp.asarray(SIGMA))

    def loss(t):
        commands = {"amplitude_1": 0.93 + t, "amplitude_2": 1.05 - t, "sigma_1_s": SIGMA * (1 + 0.3 * t)}
        return TARGETS[name].loss(*apply_commands(device, commands))

    slope, step = jax.grad(loss)(jnp.zeros(())), jnp.asarray(1e-5)
    np.testing.assert_allclose(slope, (loss(step) - loss(-step)) / (2 * step), rtol=1e-6, atol=1e-9)

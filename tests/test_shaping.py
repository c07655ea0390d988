"""Sampled pulses within the limits of the hardware: what they reach, that others agree, and the verb."""

import dataclasses
import functools
import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import qutip
import tables

from calibration.hardware import Hardware
from calibration.shaping import Layout, Shaped, gaussian_pulses, on_hardware, rescored, shape
from calibration.targets import Obedience, loop_target
from twin.loop import Settings
from twin.memristor import IonMemristor, Lindblad
from twin.slices import taylor

DEVICE = {"rabi_scale_1": 0.966, "rabi_scale_2": 1.048, "detuning_1_hz": 1150.0, "detuning_2_hz": -830.0}
STD = {"rabi_scale_1": 0.0046, "rabi_scale_2": 0.015, "detuning_1_hz": 65.0, "detuning_2_hz": 120.0}
LAYOUT = Layout(samples=30, delay=30)


def ion(**changes) -> IonMemristor:
    given = {"method": Lindblad(1e-7), "laser_linewidth_hz": 200.0, "tail_s": 10e-6} | DEVICE
    return tables.ion(**(given | changes))


def hardware(**changes) -> Hardware:
    full = 2 * math.pi * 40e3
    return Hardware(**({"sample_s": 2e-6, "largest_rad_s": (full, full), "slew_rad_s2": (full / 4e-6,) * 2,
                        "bits": 12, "real_only": True} | changes))  # fmt: skip


@functools.cache
def found() -> Shaped:
    return shape(ion(), hardware(), Obedience(), LAYOUT, iterations=150)


def score(one: Shaped, limits=None, target=None, layout=LAYOUT) -> float:
    """The target's number of the samples, by matrix exponentials."""
    target = Obedience() if target is None else target
    return rescored(ion(), limits or hardware(), target, layout, one.waveform, one.offsets_hz)


def test_gaussians_of_area_pi_begin_the_search():
    pulses = gaussian_pulses(hardware(), 30)
    np.testing.assert_allclose(pulses.area_rad, np.pi, rtol=1e-12)
    assert not np.any(pulses.real_rad_s[jnp.array([0, -1])])
    placed = Layout(30, 10).placed(pulses)
    assert placed.samples == 40
    np.testing.assert_array_equal(placed.real_rad_s[:30, 0], pulses.real_rad_s[:, 0])
    np.testing.assert_array_equal(placed.real_rad_s[10:, 1], pulses.real_rad_s[:, 1])
    assert not np.any(placed.real_rad_s[30:, 0]) and not np.any(placed.real_rad_s[:10, 1])


def test_samples_obey_ten_times_better_within_every_limit():
    one = found()
    assert score(one) < one.before / 10
    # Twelve bits move an error this small by a per cent or two.
    assert score(one) == pytest.approx(one.after, rel=0.05)
    assert set(hardware().violations(one.waveform).values()) == {0.0}
    assert one.offsets_hz == (-1150.0, 830.0)


def test_a_modulator_and_a_free_phase_take_part():
    with_rise = hardware(rise_s=1e-6, real_only=False, mixing_real=np.array([[1.0, 0.03], [0.02, 1.0]]))
    layout = dataclasses.replace(LAYOUT, oversampling=2)
    one = shape(ion(), with_rise, Obedience(), layout, iterations=60)
    # Light of pulse 2 on line 1 cannot be undone by pulse 1, whose size is another command.
    assert score(one, with_rise, layout=layout) < one.before / 3
    assert set(with_rise.violations(one.waveform).values()) == {0.0}


def test_exported_samples_against_qutip():
    """Every slice as the exponential of a Liouvillian."""
    one, device = found(), ion()
    levels = "vsm"
    ket = {level: qutip.basis(3, k) for k, level in enumerate(levels)}
    move = lambda a, b: ket[a] * ket[b].dag()
    d1, d2 = (2 * math.pi * (getattr(device, f"detuning_{k}_hz") + one.offsets_hz[k - 1]) for k in (1, 2))
    rate, width = 1 / device.lifetime_s, 2 * math.pi * device.laser_linewidth_hz
    jumps = [math.sqrt(rate * device.branching) * move("v", "s"),
             math.sqrt(rate * (1 - device.branching)) * move("m", "s"), math.sqrt(width) * move("s", "s")]  # fmt: skip
    still = float(-d1) * move("s", "s") + float(d2 - d1) * move("m", "m")
    x, r = np.array([0.2, 0.7, 1.0]), np.array([0.5, 0.9, 0.3])
    expected = []
    for theta_1, theta_2 in zip(2 * np.arcsin(np.sqrt(x)), 2 * np.arcsin(np.sqrt(r)), strict=True):
        rho = qutip.operator_to_vector(move("v", "v"))
        areas = device.rabi_scale_1 * theta_1 / math.pi, device.rabi_scale_2 * theta_2 / math.pi
        for omega_1, omega_2 in np.asarray(one.waveform.real_rad_s):
            drive = 0.5 * float(areas[0] * omega_1) * move("s", "v") + 0.5 * float(areas[1] * omega_2) * move("m", "s")
            rho = (qutip.liouvillian(still + drive + drive.dag(), jumps) * 2e-6).expm() * rho
        rho = (qutip.liouvillian(still, jumps) * float(device.tail_s)).expm() * rho
        expected.append(qutip.expect(move("s", "s"), qutip.vector_to_operator(rho)))
    device = on_hardware(device, hardware(), LAYOUT, one.waveform, error=1e-12, offsets_hz=one.offsets_hz)
    got = device.under(settings_of(one))(jnp.asarray(x), jnp.asarray(r), alone=False).populations[1]
    np.testing.assert_allclose(got, expected, atol=1e-9)


def settings_of(one: Shaped):
    return Settings(*one.offsets_hz)


def test_they_are_better_on_draws_of_the_posterior():
    """Devices scattered by the errors of the demo's fit, beside nominal Gaussians on the same hardware."""
    one, rng = found(), np.random.default_rng(3)
    nominal = on_hardware(ion(), hardware(), LAYOUT, LAYOUT.placed(gaussian_pulses(hardware(), 30)), error=1e-7)
    number = eqx.filter_jit(lambda device, offsets: Obedience().value(device, offsets))
    shaped = on_hardware(ion(), hardware(), LAYOUT, one.waveform, error=1e-7, offsets_hz=one.offsets_hz)
    rivals = (roomy(shaped), pair(one.offsets_hz)), (roomy(nominal), pair((0, 0)))
    better = 0
    for _ in range(40):
        values = {name: jnp.asarray(rng.normal(DEVICE[name], STD[name])) for name in DEVICE}
        other = lambda device, values=values: dataclasses.replace(device, ion=dataclasses.replace(device.ion, **values))
        shaped, plain = (number(other(device), offsets) for device, offsets in rivals)
        better += bool(shaped < plain)
    assert better >= 38


def pair(offsets):
    return tuple(jnp.asarray(float(offset)) for offset in offsets)


def roomy(device):
    """A polynomial with room for values that differ a little."""
    return dataclasses.replace(device, action=2 * device.action, rule=taylor(2 * device.action, 1e-10))


@pytest.mark.slow
def test_a_loop_is_opened():
    device = ion(source="model")
    target = loop_target("area", device, cycles_per_period=20)
    one = shape(device, hardware(), target, LAYOUT, iterations=25)
    assert score(one, target=target) > one.before + 1e-3

"""Targets over many devices: members, their mean and worst case, searches, and what limits them."""

import dataclasses
import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from test_shaping import LAYOUT, hardware, ion

from calibration.limits import ideal_value, limits, robustness, value_of_recalibrating
from calibration.robust import Robust, drawn_changes, parameter_draws
from calibration.shaping import gaussian_pulses, on_hardware, player_of, rescored, shape
from calibration.targets import Obedience, loop_target
from twin.memristor import ClosedForm, IonMemristor
from twin.waveform import Waveform

NOW = (jnp.zeros(()), jnp.zeros(()))


def plain(**changes) -> IonMemristor:
    return tables.ion(**({"method": ClosedForm(), "source": "model"} | changes))


CHANGES = {"rabi_scale_1": jnp.array([0.0, 0.05, -0.08]), "rabi_scale_2": jnp.array([0.02, 0.0, 0.01])}


@pytest.mark.parametrize("gain", [False, True])
def test_mean_and_worst_of_members(gain):
    target = loop_target("area", plain(), cycles_per_period=20) if gain else Obedience()
    values = [
        float(target.value(plain(rabi_scale_1=1 + a, rabi_scale_2=1 + b), NOW))
        for a, b in zip(*CHANGES.values(), strict=True)
    ]
    mean, worst = Robust(target, CHANGES), Robust(target, CHANGES, worst=True)
    np.testing.assert_allclose(mean.each(plain(), NOW), values, rtol=1e-12)
    np.testing.assert_allclose(mean.value(plain(), NOW), np.mean(values), rtol=1e-12)
    np.testing.assert_allclose(worst.value(plain(), NOW), min(values) if gain else max(values), rtol=1e-12)
    assert worst.name == f"worst_{target.name}" and mean.is_gain is gain
    loss = float(mean.loss(plain(), NOW))
    np.testing.assert_allclose(mean.of_loss(loss), np.mean(values), rtol=1e-12)
    np.testing.assert_allclose(mean.box(plain())["rabi_scale_1"], (0.92, 1.05))


def test_what_drifts_is_drawn_as_told():
    device = plain(rabi_scale_1=0.9, detuning_1_hz=100.0, phonon_nodes=8, n_bar=0.1, eta_1=0.05)
    drawn = drawn_changes(device, 512, intensity_std=0.04, detuning_std_hz=300.0, n_bar=(1.0, 3.0))
    # Rabi frequencies follow the root of the power, and both lines have one laser.
    factor = np.asarray(drawn["rabi_scale_1"]) / 0.9
    np.testing.assert_allclose(np.std(factor), 0.02, rtol=0.03)
    np.testing.assert_allclose(factor, drawn["rabi_scale_2"], atol=1e-12)
    np.testing.assert_array_equal(drawn["detuning_1_hz"], drawn["detuning_2_hz"])
    np.testing.assert_allclose(np.std(drawn["detuning_1_hz"]), 300.0, rtol=0.03)
    values = 0.1 + np.asarray(drawn["n_bar"])
    assert np.min(values) >= 1 and np.max(values) <= 3 and abs(np.mean(values) - 2) < 0.01
    assert abs(np.corrcoef(factor, drawn["detuning_1_hz"])[0, 1]) < 0.05
    posterior = {"rabi_scale_1": np.array([0.8, 1.0])}
    np.testing.assert_allclose(drawn_changes(device, 2, posterior=posterior)["rabi_scale_1"], [-0.1, 0.1])


def test_noise_comes_on_top_of_the_posterior():
    """Power scales the drawn Rabi frequency; a range of n_bar takes the place of the posterior's."""
    device = plain(phonon_nodes=8, n_bar=5.0, eta_1=0.05)
    posterior = {"rabi_scale_1": np.full(4, 0.5), "n_bar": np.array([3.0, 5.0, 6.0, 7.0])}
    drawn = drawn_changes(device, 4, posterior=posterior, intensity_std=0.1, n_bar=(0.0, 2.0))
    factor = 1 + np.asarray(drawn["rabi_scale_2"])
    np.testing.assert_allclose(1 + np.asarray(drawn["rabi_scale_1"]), 0.5 * factor, rtol=1e-12)
    values = 5 + np.asarray(drawn["n_bar"])
    assert np.min(values) >= 0 and np.max(values) <= 2


def test_draws_of_a_calibration_stay_in_their_boxes():
    covariance = np.array([[4e-4, 3e-2], [3e-2, 9.0]])
    drawn = parameter_draws(("a", "b"), np.array([1.0, 5.0]), covariance, count=4000, boxes={"b": (4.0, 100.0)})
    assert np.min(drawn["b"]) >= 4.0
    free = parameter_draws(("a", "b"), np.array([1.0, 5.0]), covariance, count=4000)
    np.testing.assert_allclose(np.cov(free["a"], free["b"]), covariance, rtol=0.1)


def test_what_is_refused():
    with pytest.raises(ValueError, match="nothing varies"):
        drawn_changes(plain(), 4)
    with pytest.raises(ValueError, match="made without motion"):
        drawn_changes(plain(), 4, n_bar=(0.0, 1.0))
    with pytest.raises(ValueError, match="one change a member"):
        Robust(Obedience(), {"rabi_scale_1": jnp.zeros(2), "rabi_scale_2": jnp.zeros(3)})


def test_the_robustness_map_is_the_target_elsewhere():
    w = LAYOUT.placed(hardware().quantized(gaussian_pulses(hardware(), 30)))
    power, detuning_hz = np.array([-0.1, 0.0]), np.array([0.0, 700.0])
    found = robustness(ion(), hardware(), Obedience(), LAYOUT, w, (-500.0, 300.0), power=power, detuning_hz=detuning_hz)
    assert found.value.shape == (2, 2)
    now = ion()
    other = dataclasses.replace(
        now, rabi_scale_1=now.rabi_scale_1 * math.sqrt(0.9), rabi_scale_2=now.rabi_scale_2 * math.sqrt(0.9),
        detuning_1_hz=now.detuning_1_hz + 700, detuning_2_hz=now.detuning_2_hz + 700,
    )  # fmt: skip
    expected = rescored(other, hardware(), Obedience(), LAYOUT, w, (-500.0, 300.0))
    np.testing.assert_allclose(found.value[0, 1], expected, atol=1e-6)


@pytest.mark.slow
def test_the_worst_device_is_served_better():
    changes = drawn_changes(ion(), 8, posterior=None, detuning_std_hz=1500.0)
    robust = Robust(Obedience(), changes, worst=True)
    nominal = shape(ion(), hardware(), Obedience(), LAYOUT, iterations=300)
    found = shape(ion(), hardware(), robust, LAYOUT, begin_at=nominal.point, iterations=300)
    scores = [rescored(ion(), hardware(), robust, LAYOUT, one.waveform, one.offsets_hz) for one in (nominal, found)]
    assert scores[1] < 0.95 * scores[0]
    assert found.after == pytest.approx(scores[1], rel=0.03)

    player, _, offsets_hz = player_of(ion(), hardware(), robust, LAYOUT)
    known = value_of_recalibrating(player, robust, found.point, offsets_hz, 3, iterations=200)
    each = robust.each(player(jnp.asarray(found.point)), tuple(jnp.asarray(f) for f in offsets_hz))
    np.testing.assert_allclose(known.common, each[:3], rtol=1e-9)
    assert np.all(known.own < 0.7 * known.common)
    # Retuned, they are the same device.
    np.testing.assert_allclose(known.own, known.own[0], rtol=1e-3)


@pytest.mark.slow
def test_floors_of_decay_and_of_the_hardware():
    noisy = ion(lifetime_s=2e-3)
    found = shape(noisy, hardware(), Obedience(), LAYOUT, iterations=300)
    reached = rescored(noisy, hardware(), Obedience(), LAYOUT, found.waveform, found.offsets_hz)
    bounds = limits(noisy, hardware(), Obedience(), LAYOUT, found.point, iterations=300)
    assert bounds.ideal is None
    # Wrong scales and detunings are undone: what is left is the floor of decay and dephasing.
    assert bounds.decay_and_dephasing < 1.2 * reached and reached < 1.2 * bounds.decay_and_dephasing
    assert bounds.hardware < 0.1 * bounds.decay_and_dephasing


@pytest.mark.slow
def test_the_form_factor_of_an_ideal_device_is_reached():
    device = ion(source="model")
    target = loop_target("form_factor", device, cycles_per_period=20)
    found = shape(device, hardware(), target, LAYOUT, iterations=60)
    reached = rescored(device, hardware(), target, LAYOUT, found.waveform, found.offsets_hz)
    assert reached > 0.99 * ideal_value(device, target)
    # Where decay forbids it, the same search says so: without decay it would be reached.
    fast = ion(source="model", lifetime_s=1e-4)
    found = shape(fast, hardware(), target, LAYOUT, iterations=60)
    bounds = limits(fast, hardware(), target, LAYOUT, found.point, iterations=60)
    assert bounds.decay_and_dephasing < 0.97 * bounds.ideal < bounds.hardware


def test_members_may_wait_differently_long():
    robust = Robust(Obedience(), {"tail_s": jnp.array([0.0, 40e-6]), "n_bar": jnp.array([0.0, 2.0])})
    moving = ion(phonon_nodes=4, n_bar=0.5, eta_1=0.06, eta_2=0.06, lifetime_s=1e-3)
    w = LAYOUT.placed(hardware().quantized(gaussian_pulses(hardware(), 30)))
    roomy = on_hardware(moving, hardware(), LAYOUT, w, room_for=robust.all_members(moving))
    other = dataclasses.replace(moving, tail_s=moving.tail_s + 40e-6, n_bar=jnp.asarray(2.5))
    expected = rescored(other, hardware(), Obedience(), LAYOUT, w, (0.0, 0.0))
    np.testing.assert_allclose(eqx.filter_jit(robust.each)(roomy, NOW)[1], expected, atol=1e-7)


def test_samples_that_break_limits_are_solved_all_the_same():
    """Beyond full scale, and with a phase where the hardware has none."""
    w = LAYOUT.placed(hardware().quantized(gaussian_pulses(hardware(), 30)))
    loud = Waveform(3 * w.real_rad_s, w.imag_rad_s, w.sample_s)
    assert np.isfinite(rescored(ion(), hardware(), Obedience(), LAYOUT, loud, (0.0, 0.0)))
    # On resonance a common phase changes no population.
    still = ion(detuning_1_hz=0.0, detuning_2_hz=0.0)
    turned = Waveform(w.imag_rad_s, w.real_rad_s, w.sample_s)
    scores = [rescored(still, hardware(), Obedience(), LAYOUT, one, (0.0, 0.0)) for one in (w, turned)]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-9)


def test_members_fit_into_the_slices():
    """Devices far from the nominal one are solved, not refused."""
    changes = {"detuning_1_hz": jnp.array([0.0, 20e3]), "rabi_scale_1": jnp.array([0.0, 0.4])}
    robust = Robust(Obedience(), changes)
    w = LAYOUT.placed(hardware().quantized(gaussian_pulses(hardware(), 30)))
    tight = on_hardware(ion(), hardware(), LAYOUT, w)
    roomy = on_hardware(ion(), hardware(), LAYOUT, w, room_for=robust.all_members(ion()))
    each = eqx.filter_jit(robust.each)
    assert np.isnan(each(tight, NOW)[1]) and np.all(np.isfinite(each(roomy, NOW)))

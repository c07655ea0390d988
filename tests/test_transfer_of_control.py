"""Control moved between platforms: exact between ideal devices, and its loss between imperfect, calibrated ones."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import settings

from calibration.angles import angles_for, first_angle, population_estimate, second_angle, signal_of
from calibration.intervals import mean_interval
from calibration.transfer_of_control import (
    DESIGNED_ON,
    features,
    image,
    law_loop,
    law_loss,
    losses,
    map_loss,
    pairs,
    second_order_map,
    side,
    task,
)
from twin.area_series import AreaSeries
from twin.dynamics import StaticGrid
from twin.memory import MovingAverage
from twin.memristor import ClosedForm, IonMemristor, Lindblad, PhotonicMemristor, planned, run
from twin.transfer import to_photonic

MEMORY = MovingAverage(5.0)
TABLE = settings((5.0, 8.0), cycles=41, period=20, shots=400)
ASKED = task(MEMORY, shots=400, periods=3, cycles_per_period=20, nodes=6, points=5)
SOURCE = {"rabi_scale_1": (0.9, 1.1), "rabi_scale_2": (0.9, 1.1), "readout_error_dark": (0.0, 0.05)}
TARGET = {
    **{"phase_scale_1": (0.9, 1.1), "phase_scale_2": (0.9, 1.1), "phase_offset_1_rad": (-0.1, 0.1)},
    **{"visibility_2": (0.95, 1.0), "efficiency": (0.8, 1.0)},
}


def ion(**fields) -> IonMemristor:
    return IonMemristor(**({"memory": MEMORY, "method": ClosedForm(), "lifetime_s": np.inf} | fields))


def element(**fields) -> PhotonicMemristor:
    return PhotonicMemristor(memory=MEMORY, **fields)


IMPERFECT = {
    **{"phase_scale_1": 0.95, "phase_scale_2": 1.04, "phase_offset_1_rad": 0.1, "visibility_1": 0.97},
    **{"phase_noise_2_rad": 0.1, "loss": 0.04, "loss_input": 0.02, "efficiency": 0.9, "dark_counts": 0.01},
}


# ------------------------------------------------------------------------------------------------ angles


def test_angles_are_those_that_commands_stand_for():
    device, x, r = element(**IMPERFECT), jnp.linspace(0, 1, 9), jnp.linspace(1, 0, 9)
    played = run(device, x, r)
    area = lambda share: 2 * jnp.arcsin(jnp.sqrt(share))
    np.testing.assert_allclose(signal_of(device, area(x), 0 * x, alone=True), played.x, atol=1e-14)
    np.testing.assert_allclose(signal_of(device, area(x), area(r), alone=False), played.y, atol=1e-14)
    np.testing.assert_allclose(device.assigned_of(played.y), played.p_y, atol=1e-14)
    np.testing.assert_allclose(population_estimate(device, device.assigned_of(played.y)), played.y, atol=1e-14)


@pytest.mark.parametrize(
    "device", [ion(rabi_scale_1=0.93, rabi_scale_2=1.08), element(**IMPERFECT)], ids=["ion", "chip"]
)
def test_angles_give_what_is_wanted_where_the_device_can(device):
    x, r = (jnp.asarray(grid.ravel()) for grid in np.meshgrid(np.linspace(0.1, 0.85, 6), np.linspace(0.15, 0.9, 6)))
    one, two = angles_for(device, x, r)
    np.testing.assert_allclose(signal_of(device, one, 0 * x, alone=True), x, atol=1e-12)
    np.testing.assert_allclose(signal_of(device, one, two, alone=False), (1 - r) * x, atol=1e-12)


def test_what_cannot_be_given_is_given_as_nearly_as_possible():
    device = element(visibility_1=0.9, loss=0.1)
    one, two = angles_for(device, jnp.array([0.0, 1.0]), jnp.zeros(2))
    np.testing.assert_allclose(one, [0.0, np.pi], atol=1e-12)
    assert two[1] == pytest.approx(0.0, abs=1e-12)
    # Light that leaks through stage 1 at its darkest is sent away by stage 2.
    assert two[0] == pytest.approx(np.pi, abs=1e-12)


@pytest.mark.parametrize("offset", [-0.3, 0.2])
def test_angles_reach_the_ends_of_a_stage_with_an_offset(offset):
    device = element(phase_offset_1_rad=offset, phase_offset_2_rad=min(offset, 0.0), phase_scale_1=1.1)
    one, two = angles_for(device, jnp.array([0.0, 1.0, 1.0]), jnp.array([0.0, 0.0, 1.0]))
    # Phases do not run backwards: a stage in front of its dark point cannot reach it.
    rest = np.sin(max(offset, 0.0) / 2) ** 2
    np.testing.assert_allclose(signal_of(device, one, 0 * one, alone=True)[0], rest, atol=1e-12)
    np.testing.assert_allclose(one[0], max(0.0, -offset / 1.1), atol=1e-7)
    np.testing.assert_allclose(signal_of(device, one, two, alone=False)[1:], [1.0, 0.0], atol=1e-12)


@pytest.mark.parametrize(
    "device",
    [pytest.param(ion(method=AreaSeries(StaticGrid(1e-6))), marks=pytest.mark.slow), element(**IMPERFECT)],
    ids=["ion", "chip"],
)
def test_what_is_not_a_number_has_no_angle_and_leaves_the_other_lanes(device):
    if isinstance(device, IonMemristor):
        device = planned(device, {"rabi_scale_1": (0.9, 1.1)})
    wanted, good = jnp.array([0.3, jnp.nan, 0.6]), np.array([0, 2])
    one = first_angle(device, wanted)
    assert np.isnan(one).tolist() == [False, True, False]
    # The series of the ion ends at the largest angle that is tried, and is as good as its grid.
    np.testing.assert_allclose(one[good], first_angle(device, wanted[good]), atol=1e-6)
    two = second_angle(device, one, jnp.array([0.2, 0.2, 0.2]))
    assert np.isnan(two).tolist() == [False, True, False]
    np.testing.assert_allclose(two[good], second_angle(device, one[good], jnp.array([0.2, 0.2])), atol=1e-6)
    assert np.isnan(second_angle(device, one, jnp.array([0.2, 0.2, jnp.nan])))[2]


BLIND = {"chip": element(efficiency=0.0), "ion": ion(readout_error_bright=0.3, readout_error_dark=0.7)}


@pytest.mark.parametrize("device", BLIND.values(), ids=BLIND)
def test_a_read_out_that_tells_nothing_is_refused_where_known_and_no_number_where_not(device):
    share = jnp.array([0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match=r"with the same probability, .* so that counts tell nothing"):
        population_estimate(device, share)
    with pytest.raises(ValueError, match="counts tell nothing"):
        side(device, {}, TABLE)
    assert np.all(np.isnan(eqx.filter_jit(population_estimate)(device, share)))
    # A pair of which this becomes known as it is played could not be played.
    assert np.isnan(eqx.filter_jit(law_loss)(device, device, ASKED, jax.random.key(0)))


def test_a_read_out_is_judged_in_its_box():
    """What the device says of a parameter that has a box does not matter."""
    assert side(element(efficiency=0.0), {"efficiency": (0.5, 1.0)}, TABLE).names == ("efficiency",)


OF_CHIP = ("phase_scale_1", "visibility_1", "phase_offset_2_rad", "loss")
SLOPES = {
    "chip": (lambda p: element(**IMPERFECT | dict(zip(OF_CHIP, p, strict=True))), (0.95, 0.97, -0.1, 0.04)),
    "ion": (lambda p: ion(rabi_scale_1=p[0], rabi_scale_2=p[1]), (0.93, 1.08)),
}


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_of_angles_are_those_of_finite_differences(name):
    of_values, at = SLOPES[name]
    wanted = jnp.array([0.3, 0.6, 0.45, 0.2])

    @jax.jit
    def angles(p):
        device, share = of_values(p[:-4]), p[-4:]
        return jnp.concatenate(angles_for(device, share, share[::-1]))

    at = jnp.concatenate([jnp.array(at), wanted])
    forward, back = jax.jit(jax.jacfwd(angles))(at), jax.jit(jax.jacrev(angles))(at)
    h = 1e-5
    expected = np.stack([(angles(at + e) - angles(at - e)) / (2 * h) for e in h * np.eye(len(at))], axis=1)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(forward, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(back, forward, rtol=1e-9, atol=1e-12)


def test_an_end_moves_with_the_device_and_not_with_what_is_wanted():
    # Beyond what the stage can give; exactly the ends of an ideal one, where derivatives by what is wanted diverge.
    for visibility, wanted in ((0.9, [0.01, 0.99]), (1.0, [0.0, 1.0])):
        angles = lambda p, v=visibility: first_angle(element(phase_scale_1=p[0], visibility_1=v), p[1:])
        slopes = jax.jacrev(angles)(jnp.array([0.95, *wanted]))
        np.testing.assert_allclose(slopes, [[0, 0, 0], [-np.pi / 0.95**2, 0, 0]], atol=1e-9)


def test_slopes_of_the_loss_of_a_map_by_what_is_believed():
    real = element(phase_scale_1=0.97, visibility_2=0.9, loss=0.03)
    loss = jax.jit(lambda p: map_loss(element(phase_scale_1=p[0], visibility_2=p[1], loss=0.01), real, 5))
    at, h = jnp.array([0.99, 0.95]), 1e-5
    expected = [(loss(at + e) - loss(at - e)) / (2 * h) for e in h * np.eye(2)]
    assert np.abs(expected).min() > 0.01
    np.testing.assert_allclose(jax.grad(loss)(at), expected, rtol=1e-5)


def test_an_ion_that_starts_in_s_is_refused():
    with pytest.raises(ValueError, match="scheme is 'v'"):
        side(ion(scheme="v"), SOURCE, TABLE)


def test_a_parameter_of_the_other_platform_is_refused():
    with pytest.raises(ValueError, match="`phase_scale_1` is no parameter of IonMemristor"):
        side(ion(), TARGET, TABLE)


# ------------------------------------------------------------------------------------------------ exact transfer


@pytest.mark.parametrize("fields", [{}, {"rabi_scale_1": 1.07, "rabi_scale_2": 0.9, "readout_error_bright": 0.02}])
def test_a_command_map_is_moved_exactly_where_the_dictionary_is(fields):
    # Between ideal devices, and between devices that differ in the exact block only.
    source, loss = ion(**fields), eqx.filter_jit(map_loss)
    target = to_photonic(source)
    assert loss(image(source, target), target, 7) < 1e-10
    assert loss(source, target, 7) < 1e-10
    assert loss(image(target, source), source, 7) < 1e-10


@pytest.mark.parametrize("fields", [{}, {"detuning_1_hz": 400.0, "laser_linewidth_hz": 200.0}])
def test_an_ion_in_closed_form_is_moved_without_what_that_ignores(fields):
    # Its decay, in 52.7 ms unless another lifetime is named, is one of these things.
    source = IonMemristor(memory=MEMORY, method=ClosedForm(), rabi_scale_1=1.03, **fields)
    there = image(source, element())
    assert isinstance(there, PhotonicMemristor)
    assert float(there.loss) == float(there.loss_input) == 0
    assert eqx.filter_jit(map_loss)(source, there, 7) < 1e-10


def test_the_image_of_a_chip_without_contrast_keeps_its_scales():
    imperfect = {"visibility_1": 0.9, "visibility_2": 0.8, "phase_noise_1_rad": 0.1, "loss": 0.1, "loss_input": 0.2}
    found = image(element(efficiency=0.9, **imperfect), ion())
    assert isinstance(found, IonMemristor)
    assert float(found.rabi_scale_1) == 1.0
    assert float(found.rabi_scale_2) == 1.0
    assert float(found.readout_error_dark) == pytest.approx(0.1)


def test_a_strong_ion_obeys_the_map_of_a_weak_chip():
    rabi, weak = {"rabi_scale_1": (0.95, 1.05), "rabi_scale_2": (0.95, 1.05)}, element(phase_scale_1=0.8)
    strong = lambda **more: side(ion(method=Lindblad(1e-6)), rabi, TABLE, **more).at(jnp.array([1.05, 1.05]))
    loss = eqx.filter_jit(map_loss)
    assert np.isnan(loss(image(weak, ion()), strong(), 3))
    assert loss(image(weak, ion()), strong(weakest=0.8), 3) < 0.3
    with pytest.raises(ValueError, match="begin above 0"):
        strong(weakest=0.0)


def test_a_feedback_law_without_shot_noise_is_moved_exactly():
    asked = task(MEMORY, shots=10**9, periods=2, cycles_per_period=20, nodes=2, points=3)
    source = ion(rabi_scale_1=1.05, readout_error_dark=0.03)
    r, y = eqx.filter_jit(law_loop)(image(source, element()), to_photonic(source), asked, jax.random.key(0))
    wanted = MEMORY.filter(asked.x)
    np.testing.assert_allclose(r, wanted, atol=2e-4)  # of a billion shots
    np.testing.assert_allclose(y, (1 - wanted) * asked.x, atol=2e-4)


# ------------------------------------------------------------------------------------------------ the reservoir


def test_second_order_map_is_merlins_recursion():
    u, z = (np.asarray(a) for a in second_order_map(jax.random.key(1), 30))
    padded = np.concatenate([[0.190983006, 0.190983006], z])
    for k in range(30):
        now, before = padded[k + 1], padded[k]
        expected = 0.4 * now + 0.4 * now * before + 0.6 * u[k] ** 3 + 0.1
        assert padded[k + 2] == pytest.approx(expected, abs=1e-9)


def test_features_have_the_mean_of_the_devices_own_run():
    device = element(**IMPERFECT)
    asked = task(MEMORY, shots=10**10, periods=2, cycles_per_period=20, nodes=4, points=3)
    u = jnp.asarray(np.random.default_rng(2).uniform(0, 0.5, 40))
    found = np.asarray(eqx.filter_jit(features)(device, asked, u, jax.random.key(3)))
    for k in range(4):
        own = PhotonicMemristor(memory=MovingAverage(float(asked.windows[k])), **IMPERFECT)
        np.testing.assert_allclose(found[:, k], run(own, asked.bias[k] + asked.gain[k] * u).p_y, atol=1e-4)


def test_a_reservoir_learns_the_more_the_more_shots():
    known, keys = side(element(), {}, TABLE), jax.random.split(jax.random.key(4), 2)
    drawn = pairs(known, known, keys)
    few, many = (
        np.asarray(losses(known, known, drawn, asked, "reservoir", keys)).mean(axis=0)
        for asked in (
            task(MEMORY, shots=shots, periods=2, cycles_per_period=20, nodes=10, points=3) for shots in (400, 10**8)
        )
    )
    # Ten nodes leave a fifth of the variance whatever the shots.
    assert np.all(many < 0.3)
    assert np.all(few > 0.3)
    assert np.all(few < 1)
    # Source and target are one known device here.
    np.testing.assert_allclose(few, few[0], rtol=1e-9)


# ------------------------------------------------------------------------------------------------ the study


@pytest.fixture(scope="module")
def study():
    source, target = side(ion(), SOURCE, TABLE), side(element(), TARGET, TABLE)
    keys = jax.random.split(jax.random.key(0), 20)
    drawn = pairs(source, target, keys)
    return source, target, drawn, keys


def test_calibrations_find_the_devices(study):
    source, target, drawn, _ = study
    for one, truth, found in ((source, drawn.source, drawn.source_found), (target, drawn.target, drawn.target_found)):
        width = np.asarray(one.high - one.low)
        assert np.all((truth >= one.low) & (truth <= one.high))
        error = np.sqrt(np.mean((np.asarray(found) - np.asarray(truth)) ** 2, axis=0))
        # One start would end in a rival optimum of scale and offset in every third table. Visibility stays weak.
        assert np.all(error[:3] < 0.15 * width[:3])
        assert np.all(error < 0.65 * width)
        assert np.std(np.asarray(truth), axis=0) == pytest.approx(width / np.sqrt(12), rel=0.4)


def test_recalibration_recovers_what_the_move_loses(study):
    found = np.asarray(losses(*study[:3], ASKED, "command_map", study[3]))
    assert found.shape == (20, len(DESIGNED_ON))
    mean = dict(zip(DESIGNED_ON, found.mean(axis=0), strict=True))
    # The source has nothing outside the exact block, so that its own image obeys.
    assert mean["image"] < 1e-10
    assert mean["native"] <= mean["recalibrated"] < 0.5 * mean["moved"]
    assert mean_interval(found[:, 2] - found[:, 4]).low > 0


def test_a_law_pays_for_shot_noise_as_well(study):
    law = np.asarray(losses(*study[:3], ASKED, "feedback", study[3]))
    mean = dict(zip(DESIGNED_ON, law.mean(axis=0), strict=True))
    assert mean["recalibrated"] < 0.5 * mean["moved"]
    # Counts of 400 shots move r by sqrt(x (1 - x)/(N n_w)), and y by x of that; 0.0044 for this loop.
    expected = np.sqrt(np.mean(np.asarray(ASKED.x) ** 2) * 0.125 / (400 * 5))
    assert 0.5 * expected < mean["image"] < 2 * expected


def test_a_device_that_is_known_is_not_calibrated():
    one = side(element(), {}, TABLE)
    assert one.calibrated(jax.random.key(0), jnp.zeros(0)).shape == (0,)
    known = side(ion(), SOURCE, TABLE, (np.array([1.0, 1.0, 0.02]), np.diag([1e-4, 1e-4, 1e-6])))
    np.testing.assert_array_equal(known.calibrated(jax.random.key(0), jnp.ones(3)), [1.0, 1.0, 0.02])
    draws = np.stack([known.drawn(key) for key in jax.random.split(jax.random.key(1), 300)])
    np.testing.assert_allclose(draws.std(axis=0), [1e-2, 1e-2, 1e-3], rtol=0.15)


def test_devices_of_a_fit_are_drawn_from_the_gaussian_within_the_boxes():
    names, low, high = tuple(SOURCE), *(np.array([box[k] for box in SOURCE.values()]) for k in (0, 1))
    correlation = np.array([[1.0, 0.6, 0.0], [0.6, 1.0, 0.0], [0.0, 0.0, 1.0]])
    std = np.array([0.05, 0.05, np.nan])
    known = side(ion(), SOURCE, TABLE, (np.array([1.05, 1.0, 0.0]), correlation * np.outer(std, std)), names[2:])
    draws = np.asarray(jax.vmap(known.drawn)(jax.random.split(jax.random.key(1), 4000)))
    rng = np.random.default_rng(2)
    free = np.array([1.05, 1.0]) + rng.multivariate_normal([0, 0], 0.05**2 * correlation[:2, :2], 200_000)
    kept = free[np.all((free >= low[:2]) & (free <= high[:2]), axis=1)]
    assert np.all((draws > low) & (draws < high))
    np.testing.assert_allclose(draws[:, :2].mean(axis=0), kept.mean(axis=0), atol=3e-3)
    np.testing.assert_allclose(np.cov(draws[:, :2].T), np.cov(kept.T), rtol=0.15)
    # What the fit says little about is uniform in its box.
    np.testing.assert_allclose(np.quantile(draws[:, 2], [0.25, 0.5, 0.75]), [0.0125, 0.025, 0.0375], atol=2e-3)
    with pytest.raises(ValueError, match="wider boxes"):
        side(ion(), SOURCE, TABLE, (np.array([1.0, 1.0, 0.02]), np.diag([25.0, 25.0, 1.0])))


def test_an_unknown_kind_of_control_is_refused(study):
    with pytest.raises(ValueError, match="`control` must be one of"):
        losses(*study[:3], ASKED, "pulses", study[3])

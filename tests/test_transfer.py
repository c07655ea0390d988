"""The dictionary between ion and photonic memristor: exact where it says so, first order where it says so."""

from inspect import unwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.special import i0
from scipy.stats import norm

from twin.memory import Exponential, MovingAverage
from twin.memristor import ClosedForm, IonMemristor, Lindblad, PhotonicMemristor, run
from twin.remainder import remainder
from twin.slow_noise import SlowNoise, noisy_populations
from twin.transfer import (
    EXACT,
    ION_NAMES,
    PHOTONIC_NAMES,
    carrier_moments,
    jacobian_to_ion,
    jacobian_to_photonic,
    projections,
    propagated_covariance,
    to_ion,
    to_photonic,
    values_of,
    with_values,
)

MEMORY = MovingAverage(7.5)
SCALED = {"rabi_scale_1": 1.06, "rabi_scale_2": 0.94, "readout_error_bright": 0.012, "readout_error_dark": 0.03}
X, R = (grid.ravel() for grid in np.meshgrid(*2 * [np.linspace(0, 1, 8)]))


def ideal(**fields) -> IonMemristor:
    return IonMemristor(**({"memory": MEMORY, "method": ClosedForm(), "lifetime_s": np.inf} | fields))


def imperfect(**fields) -> IonMemristor:
    noise = SlowNoise(amplitude_noise_1=0.01, amplitude_noise_2=0.02)
    own = {"laser_linewidth_1_hz": 300.0, "laser_linewidth_2_hz": 500.0, "slow_noise": noise, "lifetime_s": 40e-3}
    return IonMemristor(**({"memory": MEMORY, **SCALED, **own} | fields))


# ------------------------------------------------------------------------------------------------ the exact block


@pytest.mark.parametrize("scheme", ["lambda", "v", "ladder"])
def test_exact_block_gives_the_same_populations_and_counts(scheme):
    ion = ideal(scheme=scheme, sigma_1_s=21e-6, nominal_sigma_1_s=20e-6, amplitude_2=1.02, **SCALED)
    element = to_photonic(ion)
    one, other = run(ion, X, R), run(element, X, R)
    for name in ("x", "y", "p_x", "p_y"):
        # An offset of stage 2 would open it while stage 1 is read alone; there is none here.
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-14)


def test_exact_block_runs_the_same_loop_through_the_memory():
    ion = ideal(**SCALED)
    x_set = np.sin(np.pi * np.arange(60) / 20) ** 2
    one, other = run(ion, x_set), run(to_photonic(ion), x_set)
    np.testing.assert_allclose(one.r, other.r, atol=1e-14)
    np.testing.assert_allclose(one.y, other.y, atol=1e-14)


@pytest.mark.parametrize("memory", [MEMORY, Exponential(3.25)])
def test_round_trip_of_the_ion_is_the_identity(memory):
    ion = imperfect(memory=memory)
    names = (*ION_NAMES, "window_cycles")
    back = to_ion(to_photonic(ion), ion)
    np.testing.assert_allclose(values_of(back, names), values_of(ion, names), rtol=1e-12)


def test_round_trip_of_the_element_is_the_identity_but_for_offsets():
    names = ("phase_scale_1", "phase_scale_2", "visibility_1", "visibility_2", "phase_noise_1_rad", "efficiency",
             "phase_noise_2_rad", "dark_counts")  # fmt: skip
    element = PhotonicMemristor(
        memory=MEMORY, phase_scale_1=1.05, phase_scale_2=0.97, visibility_1=0.98, visibility_2=0.99,
        phase_noise_1_rad=0.05, phase_noise_2_rad=0.02, efficiency=0.9, dark_counts=0.01, loss=0.03, loss_input=0.05,
        phase_offset_1_rad=0.1,
    )  # fmt: skip
    back = to_photonic(to_ion(element))
    np.testing.assert_allclose(values_of(back, names), values_of(element, names), rtol=1e-12)
    kept = lambda one: float((1 - one.loss) * (1 - one.loss_input))
    assert kept(back) == pytest.approx(kept(element), rel=1e-12)
    # The offset was not carried: what stands there is what the linewidth brings.
    assert float(back.phase_offset_1_rad) < 0


def test_element_without_faults_is_an_ion_without_faults():
    ion = to_ion(PhotonicMemristor(memory=MEMORY))
    assert ion.slow_noise is None
    assert np.isinf(ion.lifetime_s)
    np.testing.assert_array_equal(values_of(ion, ("rabi_scale_1", "laser_linewidth_1_hz")), [1.0, 0.0])


# ------------------------------------------------------------------------------------------------ first order


def best_element(x: np.ndarray, phi: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """1 - V, scale - 1 and offset of the interferometer nearest to a transfer curve, by scipy."""
    law = lambda p: 0.5 * (1 - (1 - p[0]) * np.cos((1 + p[1]) * phi + p[2]))
    return least_squares(lambda p: np.sqrt(weights) * (law(p) - x), np.zeros(3), xtol=1e-14, ftol=1e-14).x


@pytest.fixture(scope="module")
def curves():
    """Inputs of a dephased and of a detuned ion (lanes) at Gauss-Legendre phases."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    phi = (nodes + 1) * np.pi / 2
    ion = IonMemristor(
        memory=MEMORY, lifetime_s=np.inf, method=Lindblad(1e-11), lead_s=180e-6, tail_s=180e-6,
        laser_linewidth_hz=np.array([8.0, 0.0]), detuning_1_hz=np.array([0.0, 60.0]),
    )  # fmt: skip
    return phi, weights, ion, run(ion, np.repeat(np.sin(phi / 2)[:, None] ** 2, 2, axis=1)).x


@pytest.mark.parametrize("lane", [0, 1])
def test_contrast_scale_and_offset_are_those_of_the_nearest_interferometer(curves, lane):
    phi, weights, ion, x = curves
    element = to_photonic(ion)
    fields = (1 - element.visibility_1, element.phase_scale_1 - 1, element.phase_offset_1_rad)
    mine = [np.asarray(field)[lane] for field in fields]
    # First order in effects of 5e-4 (linewidth) and 6e-5 (detuning); the next order moves the scale by 10 d and 30 d.
    np.testing.assert_allclose(mine, best_element(x[:, lane], phi, weights), rtol=0.02)


def test_amplitude_noise_is_projected_in_the_same_way():
    nodes, weights = np.polynomial.legendre.leggauss(20)
    phi = (nodes + 1) * np.pi / 2
    noise = SlowNoise(amplitude_noise_1=0.02)
    x = 1 - np.asarray(noisy_populations(phi, 0.0, noise)[0])
    element = to_photonic(imperfect(slow_noise=noise, laser_linewidth_1_hz=0.0, rabi_scale_1=1.0))
    contrast = 1 - np.exp(-(float(element.phase_noise_1_rad) ** 2) / 2)
    mine = [contrast, float(element.phase_scale_1) - 1, float(element.phase_offset_1_rad)]
    np.testing.assert_allclose(mine, best_element(x, phi, weights), rtol=0.01)


def test_motion_slows_the_area_and_spreads_it_as_the_thermal_law_says():
    n_bar, eta = 6.0, 0.12
    ion = ideal(n_bar=n_bar, eta_1=eta, eta_2=0.05, phonon_nodes=16)
    means, squares = carrier_moments(ion)
    mean = np.exp(-(eta**2) * (n_bar + 0.5))
    assert float(means[0]) == pytest.approx(mean, rel=1e-12)
    ratio = i0(2 * eta**2 * np.sqrt(n_bar * (n_bar + 1)))
    assert float(squares[0]) == pytest.approx(mean**2 * ratio, rel=1e-12)
    element = to_photonic(ion)
    nu, alpha, _ = projections()["noise"]
    assert float(element.phase_scale_1) == pytest.approx(mean + alpha * (ratio - 1), rel=1e-12)
    assert float(element.phase_noise_1_rad) == pytest.approx(np.sqrt(2 * nu * (ratio - 1)), rel=1e-9)
    # In the ground state nothing is spread, and the zero point slows the area.
    cold = to_photonic(ideal(eta_1=eta))
    assert float(cold.phase_noise_1_rad) == 0
    assert float(cold.phase_scale_1) == pytest.approx(np.exp(-(eta**2) / 2), rel=1e-14)


# ------------------------------------------------------------------------------------------------ uncertainty


def test_jacobian_agrees_with_finite_differences_and_inverts():
    ion = imperfect()
    names = ("rabi_scale_1", "laser_linewidth_2_hz", "amplitude_noise_1", "lifetime_s", "readout_error_dark",
             "window_cycles")  # fmt: skip
    found, photonic = np.asarray(jacobian_to_photonic(ion, names)), (*PHOTONIC_NAMES, "window_cycles")
    image = lambda values: np.asarray(values_of(to_photonic(with_values(ion, names, values)), photonic))
    at = np.asarray(values_of(ion, names))
    for k, value in enumerate(at):
        step = 1e-5 * value * np.eye(len(at))[k]
        slope = (image(jnp.asarray(at + step)) - image(jnp.asarray(at - step))) / (2e-5 * value)
        np.testing.assert_allclose(found[:, k], slope, rtol=1e-7, atol=1e-12)
    to, back = tuple(EXACT.values()), tuple(EXACT)
    there = jacobian_to_photonic(ion, back, to)
    again = jacobian_to_ion(to_photonic(ion), to, back, ion)
    np.testing.assert_allclose(again @ there, np.eye(len(back)), atol=1e-12)


def test_covariance_is_that_of_drawn_devices():
    ion = ideal(**SCALED)
    names = ("rabi_scale_1", "readout_error_bright", "readout_error_dark")
    root = np.diag([2e-3, 1e-4, 3e-4]) @ np.array([[1, 0, 0], [0.3, 0.9, 0], [-0.4, 0.2, 0.8]])
    to = ("phase_scale_1", "efficiency", "dark_counts")
    mine = np.asarray(propagated_covariance(jacobian_to_photonic(ion, names, to), root @ root.T))
    draws = np.asarray(values_of(ion, names)) + np.random.default_rng(1).normal(size=(20_000, 3)) @ root.T
    image = jax.vmap(lambda values: values_of(to_photonic(with_values(ion, names, values)), to))
    drawn = np.cov(np.asarray(image(jnp.asarray(draws))).T)
    scale = np.sqrt(np.outer(np.diag(drawn), np.diag(drawn)))
    np.testing.assert_allclose(mine / scale, drawn / scale, atol=0.04)


def test_derivatives_without_noise_and_without_losses():
    slope = jacobian_to_photonic(ideal(), ("amplitude_noise_1",), ("phase_noise_1_rad", "phase_scale_1"))
    np.testing.assert_allclose(slope[:, 0], [np.sqrt(2 * projections()["noise"].contrast), 0.0], rtol=1e-12)
    back = jacobian_to_ion(PhotonicMemristor(memory=MEMORY), ("phase_noise_1_rad", "phase_scale_1", "loss"))
    assert np.all(np.isfinite(back))
    assert back[ION_NAMES.index("amplitude_noise_1"), 0] * slope[0, 0] == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------ the remainder


@pytest.fixture(scope="module")
def left():
    own = {"slow_noise": None, "laser_linewidth_2_hz": 0.0, "detuning_1_hz": 500.0}
    return remainder(imperfect(scheme="ladder", m_lifetime_s=1e-3, **own), points=4)


def test_remainder_names_its_causes(left):
    assert set(left.with_only) == {"detuning", "linewidth", "decay", "overlap of pulses"}
    # Pulses are cut five widths from their centres.
    assert left.baseline.y < 1e-6
    assert left.total.y > left.with_all_but["linewidth"].y
    for gap in left.with_only.values():
        assert gap.y > 5 * left.baseline.y
        assert gap.rms_y < gap.y


def test_remainder_of_a_linewidth_is_the_light_that_zero_area_does_not_lose(left):
    # At x_set = 0 the ion is exact, and an interferometer of visibility V lets (1 - V)/2 pass.
    dephasing = np.pi * 300.0 * 20e-6
    nu = projections()["dephasing"].contrast
    assert left.with_only["linewidth"].x == pytest.approx(0.5 * nu * dephasing, rel=0.2)


@pytest.mark.parametrize("separation_s", [80e-6, 120e-6])
def test_decay_alone_is_that_between_the_pulses_as_they_stand(separation_s):
    # At x = r = 1 the ion waits in s, where (1 - branching) of what decays falls to m, which pulse 2 brings back to s.
    lifetime_s, branching = 20e-3, 0.4
    ion = ideal(method=Lindblad(1e-8), lifetime_s=lifetime_s, branching=branching, separation_s=separation_s)
    found = remainder(ion, points=3)
    back = (1 - branching) * -np.expm1(-separation_s / lifetime_s) * np.exp(-float(ion.tail_s) / lifetime_s)
    # Pulses of 20 us take a part of the wait.
    assert 0.85 * back < found.with_only["decay"].y < back
    # Overlap and decay are small here, and add up.
    apart = found.with_all_but["overlap of pulses"]
    assert apart.y == pytest.approx(found.with_only["decay"].y, rel=1e-9)
    assert apart.rms_y == pytest.approx(found.with_only["decay"].rms_y, rel=1e-9)


def test_states_that_are_not_carried(left):
    # m holds R x until it is repumped; of the ladder it falls into a leak level within a millisecond.
    assert 0.5 < left.missing < 1
    assert left.leak > 0.05
    assert left.coherence > 0.01
    assert left.phase_rad > 0.1


@pytest.mark.parametrize("detuning_hz", [50.0, -1800.0])
def test_phase_of_the_output_is_that_of_the_wait(detuning_hz):
    # To first order {v, s} turns by delta int sin(v(t)) dt / sin(theta), v the area up to t: by the wait from the
    # middle of pulse 1 to the read-out, and a little more at large areas. -1800 Hz turn it beyond pi/2.
    ion = ideal(method=Lindblad(1e-9), detuning_1_hz=detuning_hz)
    t, theta = np.linspace(-8, 8, 4001), 2 * np.pi / 3  # the largest of 4 x 4 commands with coherence left
    more = np.trapezoid(np.sin(theta * norm.cdf(t)) / np.sin(theta) - (t > 0), t) * 20e-6
    expected = 2 * np.pi * abs(detuning_hz) * float(ion.separation_s + ion.tail_s + more)
    assert remainder(ion, points=4).phase_rad == pytest.approx(expected, rel=0.01)


def test_an_ideal_ion_leaves_nothing():
    found = remainder(ideal(**SCALED, separation_s=400e-6), points=4)
    assert found.with_only == {}
    assert found.total.y < 1e-14
    assert found.coherence < 1e-14
    assert found.phase_rad < 1e-14


# ------------------------------------------------------------------------------------------------ bad input


def test_a_detector_that_always_clicks_is_refused_by_its_own_name():
    with pytest.raises(ValueError, match=r"`dark_counts` must be below 1 .* is 1\.0; a detector"):
        to_ion(PhotonicMemristor(memory=MEMORY, dark_counts=1.0))
    for scheme, name in (("lambda", "readout_error_bright"), ("v", "readout_error_dark")):
        with pytest.raises(ValueError, match=f"`{name}` must be below 1"):
            to_photonic(ideal(scheme=scheme, **{name: 1.0}))


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        remainder(ideal(), points=1)
    with pytest.raises(ValueError, match="at rest"):
        to_ion(PhotonicMemristor(memory=MEMORY), ideal(n_bar=2.0, eta_1=0.1, phonon_nodes=4))
    with pytest.raises(ValueError, match="batch axes"):
        remainder(ideal(rabi_scale_1=np.ones(3)))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("visibility_1", 0.0, "`visibility_1` must be above 0 .* is 0.0; no finite linewidth"),
        ("visibility_2", np.array([0.9, 0.0]), "`visibility_2` must be above 0"),
        ("loss", 1.0, "`loss` must be below 1 .* is 1.0; no lifetime"),
        ("loss_input", 1.0, "`loss_input` must be below 1"),
    ],
)
def test_what_no_ion_can_stand_for_is_refused_in_the_words_of_the_element(name, value, said):
    with pytest.raises(ValueError, match=said):
        to_ion(PhotonicMemristor(memory=MEMORY, **{name: value}))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            lambda: unwrap(to_photonic)(to_photonic(ideal())),
            "`to_photonic` takes one IonMemristor, but was given: Photonic",
        ),
        (lambda: unwrap(to_ion)(ideal()), "`to_ion` takes one PhotonicMemristor, but was given: IonMemristor"),
        (lambda: unwrap(jacobian_to_photonic)(to_photonic(ideal()), ("loss",)), "was given: PhotonicMemristor"),
        (lambda: unwrap(jacobian_to_ion)(ideal(), ("loss",)), "was given: IonMemristor"),
        (lambda: jacobian_to_photonic(ideal(), ("loss",)), "`names` has 'loss', which is no parameter of IonMemristor"),
        (lambda: jacobian_to_photonic(ideal(), ("nothing",)), "`names` has 'nothing', which is no parameter of Ion"),
        (lambda: jacobian_to_photonic(ideal(), "rabi_scale_1"), r"is one string: write \('rabi_scale_1',\)"),
        (
            lambda: jacobian_to_photonic(ideal(), ("rabi_scale_1",), ("eta_1",)),
            "`photonic_names` has 'eta_1', which is",
        ),
        (lambda: jacobian_to_ion(to_photonic(ideal()), ("eta_1",)), "`names` has 'eta_1', which is no parameter of Ph"),
        (lambda: jacobian_to_ion(to_photonic(ideal()), ("loss",), ("loss",)), "`ion_names` has 'loss', which is no"),
    ],
)
def test_what_the_dictionary_does_not_have_is_refused_by_name(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()

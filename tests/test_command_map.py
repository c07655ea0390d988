"""The command map: exact for an ideal ion, right under another solver for others, honest where it cannot reach."""

import dataclasses
import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from test_sampled import gaussians

from calibration.area_inverse import invert, laid
from calibration.command_map import CommandMap, clenshaw_curtis, command_map, mapped
from calibration.robust import parameter_draws
from calibration.targets import Obedience
from experiments import command_map_files
from experiments.command_map_files import CommandMapError
from twin.memristor import IonMemristor, Lindblad
from twin.sampled import sampled

FAULTS = {"rabi_scale_1": 1.06, "rabi_scale_2": 0.93, "detuning_1_hz": 800.0, "detuning_2_hz": -600.0,
          "laser_linewidth_hz": 200.0, "lifetime_s": 20e-3}  # fmt: skip
OFFSETS = (-700.0, 650.0)


def faulty(**changes) -> IonMemristor:
    return tables.ion(**({"method": Lindblad(1e-8)} | FAULTS | changes))


@functools.cache
def found() -> CommandMap:
    draws = {"rabi_scale_1": np.array([1.05, 1.06, 1.075]), "detuning_2_hz": np.array([-500.0, -600.0, -800.0])}
    return command_map(faulty(), OFFSETS, points=7, draws=draws)


# ------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.2])
def test_an_ideal_ion_is_inverted_exactly(scale):
    one = command_map(tables.ion(rabi_scale_1=scale, rabi_scale_2=1 / scale))
    phi = np.pi * np.arange(11) / 10
    np.testing.assert_allclose(one.x_set, np.sin(phi / 2) ** 2, atol=1e-15)
    np.testing.assert_allclose(one.theta_1, phi / scale, atol=1e-9)
    np.testing.assert_allclose(one.theta_2, np.tile(phi * scale, (11, 1)), atol=1e-9)
    assert np.all(one.reached_1) and np.all(one.reached_2)
    assert one.rms_mapped < 1e-12 and one.polynomial.error < 1e-9
    assert one.polynomial.coefficients_2.shape == (2, 2)


def test_the_v_scheme_is_inverted_too():
    """It starts in s, so that pulse 1 takes away."""
    one = command_map(tables.ion(scheme="v", rabi_scale_1=0.9), points=5)
    np.testing.assert_allclose(one.theta_1, (np.pi - np.pi * np.arange(5) / 4) / 0.9, atol=1e-9)
    assert one.rms_plain > 0.02 and one.rms_mapped < 1e-12


def test_areas_beyond_today_are_relative_to_todays_amplitude():
    one = command_map(tables.ion(amplitude_1=0.8), points=5)
    np.testing.assert_allclose(one.theta_1, np.pi * np.arange(5) / 4 / 0.8, atol=1e-9)


def test_what_hardware_cannot_command_is_not_reached():
    """A Rabi frequency 20 % too low, and no more than today's full command."""
    one = command_map(tables.ion(rabi_scale_1=0.8), points=5, largest_rad=math.pi)
    assert not one.reached_1[-1] and np.all(one.reached_1[:-1])
    np.testing.assert_allclose(one.theta_1[-1], np.pi, atol=1e-12)
    np.testing.assert_allclose(one.residual_1[-1], np.sin(0.4 * np.pi) ** 2 - 1, atol=1e-12)


def test_means_over_the_square_compare_with_obedience():
    weights = clenshaw_curtis(11)
    x = np.sin(np.pi * np.arange(11) / 20) ** 2
    np.testing.assert_allclose(weights @ np.exp(x), math.e - 1, rtol=1e-9)
    now = (jnp.zeros(()), jnp.zeros(()))
    device = tables.ion(rabi_scale_1=1.08)
    np.testing.assert_allclose(command_map(device).rms_plain, Obedience().value(device, now), rtol=0.01)


# ------------------------------------------------------------------------------------------------ imperfect


def test_an_imperfect_device_obeys_wherever_it_can():
    one = found()
    assert one.rms_plain > 0.03
    assert one.rms_reached < 1e-6  # by the adaptive solver
    assert one.rms_mapped < one.rms_plain / 20
    assert np.all(one.reached_1[:-1]) and np.all(one.reached_2[:-1, 1:-1])


def test_corners_that_cannot_be_reached_are_flagged_with_what_is_missing():
    """Dephasing leaves some of s behind at full transfer, and s decays between the pulses."""
    one = found()
    assert not one.reached_1[-1] and -0.05 < one.residual_1[-1] < -1e-3
    assert not np.any(one.reached_2[1:, -1]) and np.all(one.residual_2[1:, -1] > 1e-5)
    assert not np.any(one.reached_2[1:, 0]) and np.all(one.residual_2[1:, 0] < -1e-5)
    np.testing.assert_array_equal(one.theta_2[:, 0], 0.0)


def test_the_polynomial_keeps_its_stated_error_where_it_was_not_fitted():
    one, rng = found(), np.random.default_rng(0)
    assert one.polynomial.error < 1e-4
    x, r = rng.uniform(0.02, 0.9, 49), rng.uniform(0.02, 0.9, 49)
    got_x, got_y = mapped(faulty(), one, jnp.asarray(x), jnp.asarray(r))
    assert np.max(np.abs(got_x - x)) < 1.5 * one.polynomial.error
    assert np.max(np.abs(got_y - (1 - r) * x)) < 1.5 * one.polynomial.error
    assert np.max(np.abs(got_y - (1 - r) * x)) > 1e-12


def test_bands_are_those_of_maps_made_anew():
    one = found()
    assert one.bands is not None
    own = [command_map(faulty(rabi_scale_1=a, detuning_2_hz=d), OFFSETS, points=7) for a, d in
           ((1.05, -500.0), (1.06, -600.0), (1.075, -800.0))]  # fmt: skip
    np.testing.assert_allclose(one.bands.theta_1_std, np.std([m.theta_1 for m in own], axis=0), atol=1e-6)
    np.testing.assert_allclose(one.bands.theta_2_std, np.std([m.theta_2 for m in own], axis=0), atol=2e-5)
    np.testing.assert_allclose(one.bands.rms_of_own, [m.rms_mapped for m in own], rtol=1e-4)
    # The map is at home on the second device, and wrong by 1 % of an area on the first.
    np.testing.assert_allclose(one.bands.rms_of_map[1], one.rms_mapped, rtol=1e-4)
    assert one.bands.rms_of_map[0] > 3 * one.bands.rms_of_own[0]


def test_derivatives_of_areas_in_closed_form():
    """theta = phi / s, also where full transfer is a turning point, and without an input."""
    x, r = jnp.array([0.0, 0.4, 1.0]), jnp.array([0.0, 0.3, 1.0])

    def areas(scale):
        one = invert(tables.ion(rabi_scale_1=scale, rabi_scale_2=scale**2), x, r, largest_rad=1.5 * math.pi)
        return one.theta_1, one.theta_2

    (theta_1, theta_2), (slope_1, slope_2) = jax.jit(lambda s: jax.jvp(areas, (s,), (1.0,)))(1.1)
    np.testing.assert_allclose(slope_1, -theta_1 / 1.1, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(slope_2, -2 * theta_2 / 1.1, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_derivatives_are_finite_differences():
    device = laid(faulty(), largest_rad=1.5 * math.pi, boxes={"detuning_1_hz": (700.0, 900.0)}, error=1e-11)
    x, r = jnp.array([0.0, 0.4, 1.0]), jnp.array([0.3, 1.0])

    @eqx.filter_jit
    def areas(values):
        changed = dataclasses.replace(device, rabi_scale_1=values[0], detuning_1_hz=values[1])
        one = invert(changed, x, r, largest_rad=1.5 * math.pi)
        return jnp.concatenate([one.theta_1, one.theta_2.ravel()])

    at = jnp.array([1.06, 800.0])
    slopes = jax.jit(jax.jacfwd(areas))(at)
    for k, h in enumerate((1e-3, 5.0)):
        step = h * (jnp.arange(2) == k)
        np.testing.assert_allclose(slopes[:, k], (areas(at + step) - areas(at - step)) / (2 * h), rtol=1e-3, atol=3e-7)
    np.testing.assert_allclose(slopes[1, 0], -areas(at)[1] / 1.06, rtol=1e-9)


@pytest.mark.slow
def test_samples_are_mapped_as_well():
    device = sampled(faulty(tail_s=0.0), gaussians(8e-6), alone_slices=25)
    one = command_map(device, (0.0, 0.0), points=3, error=1e-8)
    assert one.rms_plain > 0.03
    # Matrix exponentials of every slice are another solver, not other samples.
    assert one.rms_reached < 1e-6 and one.reached_2[1, 1]


# ------------------------------------------------------------------------------------------------ draws and refusals


def test_draws_have_the_mean_and_covariance_of_the_calibration():
    covariance = np.array([[1e-4, 8e-3], [8e-3, 1.0]])
    draws = parameter_draws(("a", "b"), np.array([1.0, 5.0]), covariance, count=4000)
    np.testing.assert_allclose(np.cov(list(draws.values())), covariance, rtol=0.1)
    inside = parameter_draws(("a", "b"), np.array([1.0, 5.0]), covariance, boxes={"b": (5.0, 9.0)})
    assert np.all(inside["b"] >= 5.0) and inside["a"].shape == (40,)
    with pytest.raises(ValueError, match="only 0 of 4000 draws lie in the boxes"):
        parameter_draws(("a",), np.array([1.0]), np.array([[1e-8]]), boxes={"a": (2.0, 3.0)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 2}, "`points` must be at least 3, but is 2"),
        ({"draws": {"rabi_scale_1": np.ones(3), "rabi_scale_2": np.ones(2)}}, "rabi_scale_1: 3, rabi_scale_2: 2"),
        ({"draws": {"rabi_scale_1": np.array([1.0, math.nan])}}, "`draws` of rabi_scale_1 must be finite"),
        ({"draws": {"colour": np.ones(2)}}, "`colour` is no parameter"),
        ({"largest_rad": -1.0}, "`largest_rad` must be positive, but is -1"),
    ],
)
def test_wrong_questions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        command_map(tables.ion(), **options)


# ------------------------------------------------------------------------------------------------ files


@functools.cache
def small() -> CommandMap:
    return command_map(tables.ion(rabi_scale_1=0.8), (0.0, 12.5), points=4, largest_rad=math.pi,
                       draws={"rabi_scale_2": np.array([0.99, 1.02])})  # fmt: skip


@pytest.mark.parametrize("bands", [True, False])
@pytest.mark.parametrize("name", ["map.csv", "map.nc"])
def test_files_hold_every_digit(tmp_path, name, bands):
    one = small() if bands else dataclasses.replace(small(), bands=None)
    command_map_files.write(tmp_path / name, one)
    back = command_map_files.read(tmp_path / name)
    jax.tree.map(np.testing.assert_array_equal, dataclasses.asdict(back), dataclasses.asdict(one))
    assert back.reached_2.dtype == bool and (back.bands is None) == (not bands)
    x = jnp.array([0.3, 0.9])
    np.testing.assert_array_equal(back.polynomial.areas(x, x)[1], one.polynomial.areas(x, x)[1])


def test_a_csv_says_its_units_and_offsets(tmp_path):
    text = command_map_files.to_csv(small()).decode()
    assert "(0.0, 12.5) Hz" in text and "x_set,r_set,theta_1_rad,theta_2_rad,residual_1" in text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.replace("command-map-1", "command-map-9"), "the format is 'command-map-9'"),
        (lambda t: t.replace("theta_1_rad", "theta_1_deg", 1), "the header is .* must be x_set,r_set,theta_1_rad"),
        (lambda t: "\n".join(t.splitlines()[:-1]), "no full grid"),
        (lambda t: t.replace("\n0.0,0.0,", "\n0.0,0.0,soup,", 1), r"line \d+ has 11 fields where the header has 10"),
        (lambda t: t.replace("\n0.0,0.0,0.0", "\n0.0,0.0,soup", 1), r"line \d+, theta_1_rad is 'soup'"),
        (lambda t: t.replace("\n0.0,0.0,0.0", "\n0.0,0.0,nan", 1), "theta_1 holds numbers that are not finite"),
        (lambda t: t.replace('"x_range": [', '"x_range": [3, '), "the numbers of the map are not whole"),
        (lambda t: t.replace("# largest_rad = ", "# largest_rad = x"), "largest_rad is 'x3.14.*' *, which is not JSON"),
        (lambda t: "", "the header is ''"),
    ],
)
def test_wrong_csv_files_are_refused(tmp_path, spoil, message):
    path = tmp_path / "map.csv"
    path.write_text(spoil(command_map_files.to_csv(small()).decode()))
    with pytest.raises(CommandMapError, match=message):
        command_map_files.read(path)


def test_other_wrong_files_are_refused(tmp_path):
    import xarray as xr

    (tmp_path / "map.nc").write_bytes(b"no netcdf")
    with pytest.raises(CommandMapError, match="no NetCDF-4 of a command map"):
        command_map_files.read(tmp_path / "map.nc")
    (tmp_path / "good.nc").write_bytes(command_map_files.to_netcdf(small()))
    dataset = xr.load_dataset(tmp_path / "good.nc", engine="h5netcdf")
    dataset.drop_vars("theta_2").to_netcdf(tmp_path / "less.nc", engine="h5netcdf")
    with pytest.raises(CommandMapError, match="the variable theta_2 is missing"):
        command_map_files.read(tmp_path / "less.nc")
    dataset["theta_1"].attrs["units"] = "degree"
    dataset.to_netcdf(tmp_path / "degrees.nc", engine="h5netcdf")
    with pytest.raises(CommandMapError, match="variable theta_1 is in 'degree', but must be in 'rad'"):
        command_map_files.read(tmp_path / "degrees.nc")
    with pytest.raises(CommandMapError, match=r"a map is a \.csv or a \.nc file"):
        command_map_files.write(tmp_path / "map.txt", small())
    with pytest.raises(CommandMapError, match="cannot be read"):
        command_map_files.read(tmp_path / "none.csv")

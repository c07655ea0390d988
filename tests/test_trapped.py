"""Trap, chain, motion and crosstalk from the configuration to the loop."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from experiments import cli
from experiments.build import device_from
from experiments.config import ConfigError, parse_config
from experiments.trapped import apparatus_from, modes_of
from twin.apparatus import Apparatus
from twin.dynamics import StaticGrid
from twin.hysteresis import signed_area
from twin.ion import YB171
from twin.loop import Settings
from twin.memory import MovingAverage
from twin.memristor import AreaSeries, ClosedForm, IonMemristor, run, sine_input
from twin.phonons import planned
from twin.register import Register
from twin.trap import HarmonicTrap, LinearTrap

HARMONIC = {"kind": "harmonic", "secular_hz": [3.1e6, 2.9e6, 1.0e6]}
RODS = {"kind": "linear", "rf_voltage_v": 1000.0, "rf_hz": 22e6, "r0_m": 0.45e-3, "dc_voltage_v": 180.0, "z0_m": 2.5e-3,
        "kappa": 0.3}  # fmt: skip


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    return stop.value.code


def config(**tables):
    return parse_config({"trap": HARMONIC, **tables})


# ------------------------------------------------------------------------------------------------ the apparatus


def test_one_ion_on_the_axis_has_the_published_lamb_dicke_factor():
    device = device_from(config(device={"n_bar": 0.5}))
    assert device.motion.eta_1.shape == (1,) and device.motion.eta_2 is None
    assert float(device.motion.eta_1[0]) == pytest.approx(0.078445, rel=1e-5)
    # The same loop as with the number written into [device].
    by_hand = device_from(parse_config({"device": {"n_bar": 0.5, "eta_1": 0.0784448, "eta_2": 0.0784448}}))
    x = sine_input(periods=1, cycles_per_period=12)
    np.testing.assert_allclose(run(device, x).y, run(by_hand, x).y, atol=3e-7)


def test_a_beam_across_two_directions_feels_both():
    device = device_from(config(motion={"beam_1": [3.0, 0.0, 3.0]}, device={"n_bar": 0.5}))
    eta = np.asarray(device.motion.eta_1)
    lamb_dicke = [YB171.lamb_dicke("436", f, math.sqrt(0.5)) for f in (3.1e6, 1.0e6)]
    np.testing.assert_allclose(eta, lamb_dicke, rtol=1e-9)
    np.testing.assert_allclose(device.motion.frequency_ratio, [3.1, 1.0], rtol=1e-12)


def test_field_noise_heats_the_centre_of_mass_modes_alone():
    given = config(trap={**HARMONIC, "field_noise_v2_per_m2_hz": 1e-12}, chain={"ions": 3},
                   motion={"beam_1": [1.0, 0.0, 1.0]})  # fmt: skip
    device = device_from(given)
    assert float(device.heating_rate_per_s) == pytest.approx(34.121, rel=1e-4)  # e^2 S_E / (4 m hbar omega)
    shares = np.asarray(device.motion.heating_share)
    ratio = np.asarray(device.motion.frequency_ratio)
    # White noise: three ions take up three times the power of one, over the frequency.
    com = np.isclose(ratio, 1.0) | np.isclose(ratio, 3.1)
    np.testing.assert_allclose(shares[com], 3 / ratio[com], rtol=1e-9)
    np.testing.assert_allclose(shares[~com], 0, atol=1e-12)


def test_a_stray_field_takes_from_the_carrier():
    given = config(trap={**RODS, "stray_field_v_per_m": [150.0, 0.0, 0.0]}, motion={"beam_1": [1.0, 0.0, 0.0]},
                   device={"n_bar": 0.0, "engine": "closed_form"})  # fmt: skip
    device = device_from(given)
    factor = float(device.motion.carrier_1)
    assert 0.5 < factor < 0.99
    resting = math.exp(-float(jnp.sum(device.motion.eta_1**2)) / 2)
    loop = run(device, jnp.array([0.7]))
    theta = 2 * math.asin(math.sqrt(0.7))
    assert float(loop.x[0]) == pytest.approx(math.sin(theta * factor * resting / 2) ** 2, abs=1e-8)


def test_the_area_of_a_loop_has_a_slope_with_respect_to_a_trap_voltage():
    x = sine_input(periods=2, cycles_per_period=12)
    apparatus = Apparatus(LinearTrap(1000.0, 22e6, 0.45e-3, 180.0, 2.5e-3, 0.3), 3, (1.0, 0.0, 1.0))
    motion = planned(apparatus.motion(apparatus.chain().modes(), 1, heated=False), 20.0, 3.5, 1e-9)
    device = IonMemristor(memory=MovingAverage(4.0), n_bar=10.0, motion=motion, method=ClosedForm())

    @jax.jit
    def area(voltages):
        trap = dataclasses.replace(apparatus.trap, rf_voltage_v=voltages[0], dc_voltage_v=voltages[1])
        there = dataclasses.replace(apparatus, trap=trap)
        moved = there.motion(there.chain().modes(), 1, heated=False)
        moved = dataclasses.replace(moved, factors=motion.factors, numbers=motion.numbers, error=motion.error)
        loop = run(dataclasses.replace(device, motion=moved), x)
        return signed_area(loop.x[-12:], loop.y[-12:])

    at = jnp.array([1000.0, 180.0])
    slope = np.asarray(jax.grad(area)(at))
    for k in (0, 1):
        step = 1e-3 * at[k] * np.eye(2)[k]
        finite = (8 * (area(at + step) - area(at - step)) - (area(at + 2 * step) - area(at - 2 * step))) / (
            12 * 1e-3 * at[k]
        )
        assert slope[k] == pytest.approx(float(finite), rel=1e-5)
    assert abs(slope[1]) > 1e-7


def test_slopes_of_mode_frequencies_with_respect_to_trap_voltages():
    trap = LinearTrap(1000.0, 22e6, 0.45e-3, 180.0, 2.5e-3, 0.3)

    @jax.jit
    def frequencies(voltages):
        there = dataclasses.replace(trap, rf_voltage_v=voltages[0], dc_voltage_v=voltages[1])
        return Apparatus(there, 5).chain().modes().frequencies_hz

    at = jnp.array([1000.0, 180.0])
    slopes = np.asarray(jax.jacrev(frequencies)(at))
    for k in (0, 1):
        step = 2e-3 * at[k] * np.eye(2)[k]
        one, two = (frequencies(at + j * step) - frequencies(at - j * step) for j in (1, 2))
        finite = np.asarray(8 * one - two) / (12 * 2e-3 * float(at[k]))
        np.testing.assert_allclose(slopes[:, k], finite, rtol=1e-6, atol=1e-6 * np.max(np.abs(finite)))
    assert np.min(np.abs(slopes[:10, 0])) > 100  # the radial modes follow the rf


def test_surface_traps_turn_beams_into_their_axes():
    given = parse_config({
        "trap": {"kind": "surface", "rf_voltage_v": 100.0, "rf_hz": 22e6, "center_width_m": 40e-6,
                 "left_width_m": 400e-6, "right_width_m": 160e-6, "gap_m": 6e-6, "axial_hz": 0.6e6},
        "motion": {"beam_1": [1.0, 0.0, 0.0]},
    })  # fmt: skip
    apparatus = apparatus_from(given)
    wavevector = np.asarray(apparatus.wavevector_rad_m(1))
    size = YB171.transition("436").wavenumber_rad_m
    assert np.linalg.norm(wavevector) == pytest.approx(size, rel=1e-9)
    assert abs(wavevector[1]) == pytest.approx(size * abs(math.sin(float(apparatus.trap.tilt_rad))), rel=1e-9)
    assert wavevector[2] == pytest.approx(0, abs=1e-3)


# ------------------------------------------------------------------------------------------------ registers


def test_a_register_has_its_crosstalk_from_waist_and_positions():
    given = config(chain={"ions": 4, "memristors": "all", "each": {"rabi_scale_1": [1.0, 0.9, 1.1, 1.0]}},
                   crosstalk={"beam_waist_1_m": 3e-6, "neighbour_2": 0.02})  # fmt: skip
    register = device_from(given)
    assert isinstance(register, Register) and register.count == 4
    z = np.asarray(modes_of(given).equilibrium.positions_m)
    np.testing.assert_allclose(register.shares(1)[0], np.exp(-((np.subtract.outer(z, z) / 3e-6) ** 2)), rtol=1e-12)
    np.testing.assert_allclose(register.shares(2)[0][1], [0.02, 1.0, 0.02, 0.0])
    np.testing.assert_allclose(register.ion.rabi_scale_1, [1.0, 0.9, 1.1, 1.0])
    assert register.ion.motion.eta_1.shape[1:] == (4,)


def test_the_register_is_simulated_at_once(tmp_path):
    given = tmp_path / "register.toml"
    given.write_text(
        '[trap]\nkind = "harmonic"\nsecular_hz = [3.1e6, 2.9e6, 0.6e6]\n'
        '[chain]\nions = 3\nmemristors = "all"\n[chain.each]\nwindow_cycles = [3, 4, 5.5]\n'
        "[crosstalk]\nneighbour_1 = 0.03\n"
        '[device]\nengine = "closed_form"\n'
        "[[simulate.loops]]\nperiods = 2\ncycles_per_period = 12\nshots = 100\ndelay_cycles = 2\n"
    )
    assert call("simulate", given, "--out", tmp_path / "run") == 0
    arrays = xr.load_dataset(tmp_path / "run" / "arrays.nc", engine="h5netcdf")
    labels = arrays.loop.values.astype(str)
    assert list(dict.fromkeys(labels.tolist())) == ["A 1", "A 2", "A 3"]
    second = arrays.isel(row=labels == "A 2")
    np.testing.assert_allclose(second.x_set, np.sin(np.pi * (np.arange(25) - 2) / 12) ** 2, atol=1e-12)
    assert set(second.window_cycles.values) == {4.0}
    register = device_from(parse_config_file(given))
    x = np.stack([arrays.x_set.values[labels == label] for label in ("A 1", "A 2", "A 3")], axis=1)
    np.testing.assert_allclose(second.x, run(register, x, np.full_like(x, 0.5)).x[:, 1], atol=1e-12)
    assert (tmp_path / "run" / "table.csv").is_file()


def parse_config_file(path):
    from experiments.config import load_config

    return load_config(path)


# ------------------------------------------------------------------------------------------------ the verb


def test_the_verb_prints_and_draws(tmp_path, capsys):
    given = tmp_path / "trap.toml"
    given.write_text(
        '[trap]\nkind = "linear"\nrf_voltage_v = 1000.0\nrf_hz = 22e6\nr0_m = 0.45e-3\ndc_voltage_v = 180.0\n'
        "z0_m = 2.5e-3\nkappa = 0.3\nstray_field_v_per_m = [5.0, 0.0, 0.0]\n[chain]\nions = 3\n"
        "[motion]\nbeam_1 = [1.0, 0.0, 1.0]\n[device]\nn_bar = 0.5\n"
    )
    assert call("trap", given, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["trap"]["q"][0] == pytest.approx(0.291762, rel=1e-5)
    z = result["trap"]["secular_hz"][2]
    axial = result["chain"]["frequencies_hz"][6:]
    np.testing.assert_allclose(axial, [z, math.sqrt(3) * z, math.sqrt(5.8) * z], rtol=1e-10)
    assert call("trap", given, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    for part in ("secular (MHz)", "zigzag: straight above", "Modes (", "carrier of beam 1, mean"):
        assert part in said
    arrays = xr.load_dataset(tmp_path / "run" / "arrays.nc", engine="h5netcdf")
    assert arrays.eta_1.shape == (3, 9)
    for name in ("stability", "chain", "modes", "lamb_dicke"):
        assert (tmp_path / "run" / "figures" / f"{name}.svg").is_file()
    assert "Lamb-Dicke parameters" in (tmp_path / "run" / "report.html").read_text()
    # The lone mode that the middle ion does not feel is none of its business.
    assert float(arrays.eta_felt[7]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({"trap": {**RODS, "rf_voltage_v": 4000.0}}, r"does not hold the ion along x: .* lower the rf voltage"),
        ({"chain": {"ions": 20}}, r"the straight chain of 20 ions is not stable along x \(zigzag\)"),
        ({"trap": {**RODS, "stray_field_v_per_m": [1e6, 0.0, 0.0]}}, r"trap.stray_field_v_per_m pushes the ions"),
        ({"trap": {**HARMONIC, "rf_hz": 5e6}}, r"trap.secular_hz must be below half of trap.rf_hz"),
        ({"device": {"n_bar": 9e3}, "trap": {"kind": "harmonic", "secular_hz": [1e5, 1e5, 5e4]}},
         r"lower the occupation or the area"),
    ],
)  # fmt: skip
def test_what_is_not_stable_or_too_hot_is_refused(tables, sentence):
    with pytest.raises(ValueError, match=sentence):
        device_from(config(**tables))


@pytest.mark.parametrize(
    ("tables", "path"),
    [
        ({"trap": {"kind": "linear", "rf_hz": 1e7}}, "trap.rf_voltage_v is missing"),
        ({"trap": {**HARMONIC, "r0_m": 1e-3}}, "trap.r0_m has no meaning"),
        ({"trap": {**HARMONIC, "stray_field_v_per_m": [1.0, 0.0, 0.0]}}, "trap.rf_hz is missing"),
        ({"trap": {"kind": "harmonic", "secular_hz": [1e6, -1e6, 1e6]}}, "trap.secular_hz is"),
        ({"chain": {"ions": 3, "memristor": 4}}, "chain.memristor is 4"),
        ({"chain": {"ions": 3, "masses_u": [171.0]}}, "chain.masses_u must be 3"),
        ({"chain": {"ions": 2, "each": {"rabi_scale_1": [1, 1]}}}, "chain.each needs memristors = 'all'"),
        ({"chain": {"ions": 2, "memristors": "all", "each": {"rabi_scale_1": [1.0]}}}, "chain.each.rabi_scale_1 has 1"),
        ({"motion": {"beam_1": [0.0, 0.0, 0.0]}}, "motion.beam_1 is [0, 0, 0]"),
        ({"crosstalk": {"neighbour_1": 0.1}}, "crosstalk needs the ions of a register"),
        ({"device": {"eta_1": 0.1}}, "device.eta_1 is given, but [trap]"),
        ({"chain": {"ions": 3, "masses_u": [171.0, 9.0, 171.0]}}, "masses_u makes the memristor, ion 2, one of 9 u"),
        ({"device": {"engine": "closed_form", "detuning_noise_1_hz": 9.0}}, "device.engine is 'closed_form'"),
        ({"chain": {"masses_u": 171.0}}, "chain.masses_u is 171.0, but must be a list of numbers"),
        ({"fit": {"free": {"eta_1": [0.0, 0.1]}}}, "fit.free.eta_1 follows from [trap]"),
        ({"chain": {"ions": 3, "memristors": "all"}, "sweep": {"parameters": {"n_bar": [0.0, 1.0]}}},
         "sweep is made for one memristor"),
        ({"chain": {"ions": 3, "memristors": "all"}, "simulate": {"loops": [{"label": "A"}, {"label": "B"}]}},
         "simulate.loops has 2 loops"),
    ],
)  # fmt: skip
def test_tables_that_contradict_each_other_are_refused(tables, path):
    with pytest.raises(ConfigError) as refused:
        config(**tables)
    assert path in str(refused.value)


def test_tables_without_a_trap_are_refused():
    with pytest.raises(ConfigError, match=r"trap is missing, which \[chain\] needs"):
        parse_config({"chain": {"ions": 2}})


def test_the_same_program_serves_other_voltages():
    traces = []

    @jax.jit
    def frequencies(v):
        traces.append(1)
        apparatus = Apparatus(LinearTrap(v, 22e6, 0.45e-3, 180.0, 2.5e-3, 0.3), 4)
        return apparatus.chain().modes().frequencies_hz

    assert np.all(np.isfinite(frequencies(jnp.asarray(1000.0))))
    frequencies(jnp.asarray(900.0))
    assert len(traces) == 1


def test_the_tables_reach_a_sweep_and_a_search(tmp_path):
    given = tmp_path / "both.toml"
    given.write_text(
        '[trap]\nkind = "harmonic"\nsecular_hz = [3.1e6, 2.9e6, 1.0e6]\n[chain]\nions = 2\n'
        '[device]\nengine = "closed_form"\nn_bar = 1.0\n'
        "[sweep]\npoints = 3\nmemory_mb = 16384\n[sweep.parameters]\nn_bar = [0.0, 4.0]\n"
        "[sweep.loop]\nperiods = 2\ncycles_per_period = 12\n"
    )
    assert call("sweep", given, "--out", tmp_path / "s.zarr") == 0
    areas = xr.open_zarr(tmp_path / "s.zarr").signed_area.values.ravel()
    device = device_from(parse_config_file(given))
    for area, n_bar in zip(areas, (0.0, 2.0, 4.0), strict=True):
        loop = run(dataclasses.replace(device, n_bar=jnp.asarray(n_bar)), sine_input(periods=2, cycles_per_period=12))
        assert area == pytest.approx(float(signed_area(loop.x[12:24], loop.y[12:24])), abs=1e-9)
    assert len(set(np.round(areas, 6))) == 3


def test_planned_devices_of_a_trap_may_be_traced():
    device = device_from(config(motion={"beam_1": [1.0, 0.0, 1.0], "beam_2": [0.0, 1.0, 1.0]}, device={"n_bar": 1.0}))
    device = dataclasses.replace(device, method=AreaSeries(StaticGrid(error=1e-7)))
    x = sine_input(periods=1, cycles_per_period=8)
    device = device.prepared(x, Settings())
    mean = jax.jit(lambda n: jnp.mean(run(dataclasses.replace(device, n_bar=n), x).y))
    slope = float(jax.grad(mean)(1.0))
    assert slope == pytest.approx(float(mean(1.001) - mean(0.999)) / 0.002, rel=1e-4)


def test_frequencies_as_measured_need_no_rf():
    trap = HarmonicTrap((3e6, 2.9e6, 1e6))
    assert np.all(np.isfinite(Apparatus(trap, 3).chain().modes().frequencies_hz))
    with pytest.raises(ValueError, match="`beam_1` must have a direction"):
        Apparatus(trap, 1, (0.0, 0.0, 0.0))

"""Simulation: the configured device, its loops with and without shots, and the table that a fit reads."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.data import read_table
from calibration.likelihood import Experiment, pearson_chi2, predict
from calibration.parameters import value_of
from experiments import simulate
from experiments.build import device_from, memory_from, settings_table
from experiments.config import Config, parse_config
from experiments.records import Run, RunFolder
from experiments.schema_device import PHOTONIC, Device
from twin.memory import Exponential, MovingAverage
from twin.memristor import Automatic, ClosedForm, IonMemristor, Lindblad, PhotonicMemristor

ROOT = Path(__file__).parents[1]
LOOP = {"label": "A", "cycles_per_period": 40, "periods": 2, "window_cycles": 10.0}


def config(*loops: dict[str, Any], memory: dict[str, Any] | None = None, **device: Any) -> Config:
    tables = {"device": {"engine": "closed_form", **device}, "memory": {"source": "model", **(memory or {})}}
    return parse_config({**tables, "simulate": {"loops": list(loops) or [LOOP]}}, verb="simulate")


def simulated(path: Path, settings: Config, seed: int = 1) -> tuple[dict[str, Any], Run]:
    with RunFolder(path) as out:
        out.write_config(settings.to_toml())
        result = simulate.run(settings, out, seed)
    return result, Run(path)


@pytest.mark.parametrize(
    ("engine", "method"), [("auto", Automatic), ("closed_form", ClosedForm), ("lindblad", Lindblad)]
)
def test_the_engine_is_the_method(engine, method):
    device = device_from(config(engine=engine, error=1e-6))
    assert isinstance(device, IonMemristor)
    assert isinstance(device.method, method)
    if method is not ClosedForm:
        assert float(device.method.error) == 1e-6


def test_every_number_of_the_device_table_reaches_the_device():
    others = ("platform", "engine", "scheme", "error", *PHOTONIC)
    table = {name: 0.3 for name in Device.model_fields if name not in others}
    table |= {name: 1e-4 for name in table if name.endswith("_s")}
    table |= {name: 7.0 for name in table if name.endswith("_hz") and name != "laser_linewidth_hz"}
    table |= {name: 0.1 for name in table if name.startswith("amplitude_noise")}
    del table["laser_linewidth_hz"]
    table |= {"laser_linewidth_1_hz": 5.0, "laser_linewidth_2_hz": 6.0}
    numbers = {name: value * (1 + k / 100) for k, (name, value) in enumerate(table.items())}
    device = device_from(config(engine="lindblad", scheme="ladder", **numbers))
    assert isinstance(device, IonMemristor)
    assert device.scheme == "ladder"
    assert {name: float(value_of(device, name)) for name in numbers} == numbers
    assert float(device.laser_linewidth_hz) == 0.0


@pytest.mark.parametrize(
    ("tables", "nodes"),
    [
        ({}, 1),
        ({"device": {"n_bar": 2.0}}, 8),
        ({"device": {"heating_rate_per_s": 10.0}}, 8),
        ({"fit": {"free": {"n_bar": [0.0, 20.0]}}}, 8),
        ({"sweep": {"parameters": {"n_bar": [0.0, 20.0]}}}, 8),
    ],
)
def test_a_moving_ion_is_averaged_over_phonons(tables, nodes):
    device = device_from(parse_config(tables))
    assert isinstance(device, IonMemristor)
    assert device.phonon_nodes == nodes


def test_every_number_of_a_chip_reaches_the_device():
    numbers = {name: 0.3 + k / 100 for k, name in enumerate(PHOTONIC)}
    device = device_from(config(platform="photonic", **numbers))
    assert {name: float(value_of(device, name)) for name in numbers} == numbers
    assert {f.name for f in dataclasses.fields(device)} == {"memory", "source", *PHOTONIC}


def test_the_photonic_platform_and_the_kernels():
    device = device_from(parse_config({"device": {"platform": "photonic", "loss": 0.1, "efficiency": 0.9}}))
    assert isinstance(device, PhotonicMemristor)
    assert (float(device.loss), float(device.efficiency)) == (0.1, 0.9)
    exponential = parse_config({"memory": {"kernel": "exponential", "window_cycles": 4.0}})
    assert isinstance(memory_from(exponential), Exponential)
    assert float(value_of(device_from(exponential), "window_cycles")) == 4.0
    assert isinstance(memory_from(parse_config({}), 3.5), MovingAverage)
    assert float(memory_from(parse_config({}), 3.5).window_cycles) == 3.5


@pytest.mark.parametrize("platform", ["ion", "photonic"])
def test_an_exact_loop_has_the_area_of_the_discrete_formula(tmp_path, platform):
    result, run = simulated(tmp_path / "run", config(platform=platform))
    found = result["loops"]["A"]
    assert found["signed_area"] == pytest.approx(0.2680153507, abs=1e-9)
    assert found["form_factor"] == pytest.approx(0.56275702, abs=1e-8)
    assert found["lobe_area"] == pytest.approx(found["signed_area"], abs=1e-12)
    assert found["pinch_offset"] == pytest.approx(0.0, abs=1e-12)
    assert found["rms_obedience"] == pytest.approx(0.0, abs=1e-12)
    assert found["method"] == "closed form"
    assert "signed_area_measured" not in found
    assert not (run.path / "table.csv").exists()
    assert json.loads((run.path / "result.json").read_text())["loops"]["A"]["cycles"] == 81
    arrays = run.arrays
    assert arrays.sizes == {"row": 81, "level": 3}
    assert {str(array.attrs["units"]) for array in arrays.data_vars.values()} == {"1", "Hz", "cycles"}
    np.testing.assert_allclose(arrays.y, (1 - arrays.r) * arrays.x, atol=1e-12)
    np.testing.assert_allclose(arrays.populations_2.sum("level"), 1.0, atol=1e-12)
    assert np.all(np.isnan(arrays.x_measured))
    assert result["precision"] == "float64"
    assert set(result["seconds"]) == {"import", "compile", "solve"}
    assert (run.path / "figures" / "loops.svg").is_file()


def test_the_bound_of_a_closed_form_that_was_asked_for_is_told(tmp_path):
    result, _ = simulated(tmp_path / "run", config(detuning_1_hz=2e3))
    assert result["loops"]["A"]["error_estimate"] > 0.1
    assert "the closed form was asked for" in " ".join(result["notes"])


SHOTS = (
    {**LOOP, "label": "exact"},
    {**LOOP, "label": "noisy", "shots": 300, "detuning_2_set_hz": 50.0},
    {**LOOP, "label": "other", "shots": 300, "window_cycles": 14.8},
)
NOISY = {"readout_error_bright": 0.01, "readout_error_dark": 0.02, "memory": {"source": "measured"}}


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    settings = config(*SHOTS, **NOISY)
    return settings, *simulated(tmp_path_factory.mktemp("noisy") / "run", settings)


def test_the_table_holds_what_was_counted(noisy):
    _, result, run = noisy
    table = read_table(run.path / "table.csv")
    assert table.labels == ("noisy", "other")
    assert "exact" in " ".join(result["notes"])
    arrays = run.arrays
    rows = arrays.isel(row=arrays.loop.values == "other")
    mine = table.rows("other")
    assert table.n_y is not None
    assert table.r_set is not None
    np.testing.assert_array_equal(table.n_y[mine], rows.n_y)
    np.testing.assert_array_equal(table.r_set[mine], rows.r)
    # The controller fed back what it measured: with 14.8 cycles, 14 of them and 0.8 of the fifteenth.
    k, x = 60, rows.x_measured.values
    assert table.r_set[mine][k] == pytest.approx((x[k - 14 : k].sum() + 0.8 * x[k - 15]) / 14.8, abs=1e-12)


def test_the_device_explains_its_own_table(noisy):
    settings, _, run = noisy
    experiment = Experiment.from_table(read_table(run.path / "table.csv"))
    prediction = eqx.filter_jit(predict)(device_from(settings), experiment)
    chi2 = float(pearson_chi2(experiment, prediction)) / experiment.n_data
    assert 0.8 < chi2 < 1.2
    rows = run.arrays.isel(row=run.arrays.shots.values > 0)
    np.testing.assert_allclose(prediction.p_y, rows.p_y, atol=1e-12)
    pulls = (rows.y_measured - rows.p_y) / rows.y_error
    assert 0.8 < float((pulls**2).where(rows.y_error > 0).mean()) < 1.2


def test_the_area_as_measured_has_an_honest_error(noisy):
    _, result, _ = noisy
    found = result["loops"]["noisy"]
    # From 300 shots and 10 cycles of memory, as in 5.1 of the physics: 0.0125 at 100 shots for 15 cycles.
    assert 0.004 < found["signed_area_measured_std"] < 0.012
    # Readout errors shrink both axes.
    shrunk = found["signed_area"] * (1 - 0.01 - 0.02) ** 2
    assert abs(found["signed_area_measured"] - shrunk) < 4 * found["signed_area_measured_std"]


def test_seeds(noisy, tmp_path):
    settings, _, run = noisy
    for seed, same in ((1, True), (2, False)):
        _, again = simulated(tmp_path / f"run{seed}", settings, seed)
        assert ((again.path / "table.csv").read_bytes() == (run.path / "table.csv").read_bytes()) is same


@pytest.mark.parametrize(
    ("kernel", "window", "steady"),
    [
        ("moving_average", 40.0, True),
        ("moving_average", 40.5, False),
        ("exponential", 5.0, True),
        ("exponential", 6.0, False),
    ],
)
def test_a_loop_that_is_not_steady_is_called_so(kernel, window, steady):
    settings = config(memory={"kernel": kernel})
    assert settings.simulate is not None
    assert simulate.settled(settings, settings.simulate.loops[0], window) is steady


def test_an_unsteady_loop_has_a_note(tmp_path):
    result, run = simulated(tmp_path / "run", config({**LOOP, "window_cycles": 60.0}))
    assert "not yet steady" in " ".join(result["notes"])
    assert "not yet steady" in (run.path / "report.html").read_text()


def test_an_open_loop_has_no_area():
    x = jnp.linspace(0.0, 1.0, 9)
    assert np.isnan(simulate.loop_metrics(x, x**2)["signed_area"])


def test_cycles_that_were_not_solved_fail_the_run(tmp_path, monkeypatch):
    def spoiled(*args, **kwargs):
        loop = play(*args, **kwargs)
        bad = jnp.arange(loop.x_set.size) == 3
        return dataclasses.replace(loop, valid=~bad, y=jnp.where(bad, jnp.nan, loop.y))

    play = simulate.run_loop
    monkeypatch.setattr(simulate, "run_loop", spoiled)
    result, run = simulated(tmp_path / "run", config())
    assert result["status"] == "failed: 1 of 81 cycles were not solved to the error asked for"
    assert "1 of 81 cycles" in " ".join(run.result["notes"])


def test_the_verb(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(config({**LOOP, "shots": 100}).to_toml())
    command = [
        sys.executable,
        "-m",
        "experiments",
        "simulate",
        path,
        "--out",
        tmp_path / "run",
        "--seed",
        "7",
        "--json",
    ]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seed"] == 7
    names = {"arrays.nc", "config.toml", "figures", "log.txt", "report.html", "result.json", "table.csv"}
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == names


def test_a_loop_without_a_window_of_its_own_has_that_of_the_memory():
    bare = {key: value for key, value in LOOP.items() if key != "window_cycles"}
    settings = config(LOOP | {"window_cycles": 4.0}, bare | {"label": "B", "shots": 7}, memory={"window_cycles": 6.5})
    table = settings_table(settings, windows=True)
    np.testing.assert_array_equal(table.window_cycles, np.where(table.loop == "A", 4.0, 6.5))
    np.testing.assert_array_equal(table.shots, np.where(table.loop == "A", 1, 7))
    np.testing.assert_allclose(table.x_set, np.tile(np.sin(np.pi * np.arange(81) / 40) ** 2, 2), atol=1e-15)
    assert settings_table(settings, windows=False).window_cycles is None

"""`iontwin optimize` with samples: what it leaves, reads back, goes on with, and refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from test_track import call, place  # noqa: F401 - a fixture

from experiments import command_map_files, shape, waveform_files
from experiments.build import hardware_from
from experiments.checkpoint import Checkpoint, same_but_iterations
from experiments.config import ConfigError, load_config, parse_config
from experiments.fitted import with_fit
from experiments.records import Run
from experiments.targets import posterior_of, read_curve

ROOT = Path(__file__).parents[1]
CONFIG = """
[device]
tail_s = 10e-6
detuning_1_hz = 1000.0
rabi_scale_2 = 1.05

[optimize]
iterations = 300

[optimize.weights]
energy = 1e-12

[optimize.shape]
samples = 30
delay_samples = 30

[hardware]
sample_s = 2e-6
largest_rabi_hz = [40e3, 40e3]
bits = 12
carrier_hz = [80e6, 80e6]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shape")
    (folder / "c.toml").write_text(CONFIG)
    assert call("optimize", folder / "c.toml", "--out", folder / "run") == 0
    return folder / "run"


def test_the_verb_exports_what_it_found(run):
    result = Run(run).result
    metric = result["metric"]
    assert metric["recomputed"] < metric["before"] / 10
    assert set(result["files"]) == {"waveform.csv", "waveform.nc", "waveform.qasm", "waveform.py"}
    # The DDS has amplitude steps of its own.
    np.testing.assert_allclose(list(result["files"].values()), metric["recomputed"], rtol=0.02)
    terms = {name: one["value"] for name, one in result["terms"].items()}
    np.testing.assert_allclose(metric["recomputed"], terms["obedience_rms"] + 1e-12 * terms["energy"], rtol=1e-9)
    arrays = Run(run).arrays
    samples = waveform_files.read(run / "waveform.csv")
    np.testing.assert_allclose(arrays["rabi_2_after_hz"], samples.real_rad_s[:, 1] / (2 * np.pi), atol=1e-6)
    assert np.max(np.abs(arrays.error_after)) < np.max(np.abs(arrays.error_before)) / 5
    # The middle of the robustness map is the device itself; far from it pulses are worse.
    robustness = arrays.robustness_after.sel(power_error=0.0, detuning_error_hz=0.0, method="nearest")
    np.testing.assert_allclose(robustness, metric["recomputed"], rtol=1e-2)
    assert float(arrays.robustness_after.max()) > 3 * float(robustness)
    page = (run / "report.html").read_text()
    assert "Spectra" in page and "Robustness" in page
    assert not list(run.parent.glob(".run.search*"))


def test_files_are_solved_as_they_stand(run, tmp_path):
    for name, same in (("waveform.qasm", 1e-6), ("waveform.py", 0.02)):
        out = tmp_path / name
        chosen = f"optimize.shape.start={json.dumps(str(run / name))}"
        assert (
            call("optimize", run.parent / "c.toml", "--out", out, "--set", chosen, "--set", "optimize.iterations=0")
            == 0
        )
        again, first = Run(out).result, Run(run).result
        np.testing.assert_allclose(again["metric"]["recomputed"], first["metric"]["recomputed"], rtol=same)
        assert again["offsets_hz"] == pytest.approx(first["offsets_hz"], abs=1e-3)
        assert again["limits"] is None and again["status"] == "done"


@pytest.mark.slow
def test_a_killed_search_goes_on(tmp_path):
    (tmp_path / "c.toml").write_text(CONFIG.replace("iterations = 300", "iterations = 100000"))
    sets = ["--set", "optimize.shape.samples=300", "--set", "optimize.shape.delay_samples=300",
            "--set", "hardware.sample_s=2e-7", "--set", "hardware.phase=free"]  # fmt: skip
    command = [sys.executable, "-m", "experiments", "optimize", tmp_path / "c.toml", "--out", tmp_path / "run", *sets]
    kept = tmp_path / ".run.search.npz"
    first = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if kept.exists() or first.poll() is not None:
            break
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGTERM)
    first.communicate(timeout=60)
    assert kept.exists() and not (tmp_path / "run").exists()
    again = [*command, "--set", "optimize.iterations=200"]
    second = subprocess.run(list(map(str, again)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert "goes on after" in second.stderr and not kept.exists()
    # The first value after going on is better than the start by far.
    history = json.loads((tmp_path / "run" / "result.json").read_text())["history"]["shape"]
    assert history[0] < 0.01


def test_a_checkpoint_belongs_to_its_search(tmp_path):
    bounds = {"amplitude_1": [0.9, 1.1]}
    text, longer = (parse_config({"optimize": {"bounds": bounds, "iterations": n}}).to_toml() for n in (7, 70))
    of, twin = same_but_iterations(text, []), tmp_path / "twin.json"
    assert same_but_iterations(longer, [twin]) == of
    twin.write_text("{}")
    with_twin = same_but_iterations(text, [twin])
    twin.write_text("{ }")
    assert len({of, with_twin, same_but_iterations(text, [twin])}) == 3
    kept = Checkpoint(tmp_path / "run", of)
    assert kept.load() is None
    kept.keep("shape", 20, np.arange(3.0))
    kept.keep("shape", 30, np.arange(4.0))  # too soon
    stage, done, point = Checkpoint(tmp_path / "run", of).load()
    assert (stage, done) == ("shape", 20)
    np.testing.assert_array_equal(point, np.arange(3.0))
    kept.keep("robust", 10, np.arange(5.0), at_once=True)
    assert kept.load()[0] == "robust"
    assert Checkpoint(tmp_path / "run", of + " ").load() is None
    kept.path.write_bytes(b"broken")
    assert kept.load() is None
    kept.remove()
    assert not kept.path.exists()


@pytest.mark.slow
def test_many_devices_and_a_map(place, tmp_path):  # noqa: F811
    """A fit's errors, the noise of a laser, what recalibration would gain, and the command map with its bands."""
    (tmp_path / "c.toml").write_text(CONFIG.replace("[optimize.weights]\nenergy = 1e-12\n", """
[optimize.robust]
members = 4
detuning_std_hz = 400.0
recalibrate = 2

[optimize.command_map]
points = 5
draws = 3
"""))  # fmt: skip
    out = tmp_path / "run"
    assert call("optimize", tmp_path / "c.toml", "--from", place / "fit", "--out", out) == 0
    result = Run(out).result
    robust = result["robust"]
    assert robust["name"] == "mean_obedience_rms" and robust["members"] == 4
    assert robust["recomputed"] < robust["before"] / 2
    again = robust["recalibrated"]
    assert np.all(np.array(again["own"]) < again["common"])
    table = result["command_map"]
    assert table["rms_mapped"] < table["rms_plain"] and table["draws"]["count"] == 3
    assert table["draws"]["rms_of_own_maps"] < table["draws"]["rms_of_map"]
    found = command_map_files.read(out / "command_map.nc")
    assert found.bands.theta_1_std.shape == (5,)
    page = (out / "report.html").read_text()
    assert "What is lost by not knowing better" in page and "Command map" in page


def test_draws_are_those_of_the_fit(place):  # noqa: F811
    import tables

    drawn = posterior_of(place / "fit", tables.ion(), 500, seed=1)
    assert set(drawn) == set(tables.SCALES)  # read-out errors move no pulse
    rows = Run(place / "fit").result["parameters"]
    for name, values in drawn.items():
        np.testing.assert_allclose(np.mean(values), rows[name]["value"], atol=4 * rows[name]["std"] / 22)
        np.testing.assert_allclose(np.std(values), rows[name]["std"], rtol=0.15)


REFUSED = {
    "optimize.weights.enrgy=1.0": "optimize.weights.enrgy is not a key; did you mean energy?",
    "optimize.weights.obedience=1.0": "is the target itself",
    "optimize.target=curve": "optimize.curve",
    "optimize.shape.start=xy8": "neither gaussian, nor one of bb1, sk1, corpse, nor a file",
    "optimize.iterations=0": "0 only solves samples of a file",
    "optimize.shape.start=nothing.csv": "name an existing waveform file",
    "optimize.shape.start=bb1": "bb1 turns the phase",
    "optimize.shape.family=drag": "DRAG turns the phase",
    "optimize.robust.members=8": "there is no calibration; give one with --from",
    "optimize.target=transfer optimize.level=q": "'q' is no level of this scheme",
    "hardware.mixing=[[1.0,0.1]]": "hardware.mixing",
}


@pytest.mark.parametrize("sets", REFUSED)
def test_what_is_refused_in_one_sentence(sets, tmp_path, capsys):
    (tmp_path / "c.toml").write_text(CONFIG)
    given = [part for one in sets.split(" ") for part in ("--set", one)]
    assert call("optimize", tmp_path / "c.toml", "--out", tmp_path / "run", *given) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("iontwin: ") and REFUSED[sets] in said
    assert [p.name for p in tmp_path.iterdir()] == ["c.toml"]


def test_files_that_do_not_fit_are_refused(run, tmp_path, capsys):
    chosen = f"optimize.shape.start={json.dumps(str(run / 'waveform.csv'))}"
    for change, words in (
        ("optimize.shape.samples=31", "has 60 samples, but samples and delay_samples make 61"),
        ("hardware.sample_s=1e-6", "the clock of the file is 2e-06 s, but hardware.sample_s is 1e-06"),
    ):
        arguments = ("--set", chosen, "--set", change)
        assert call("optimize", run.parent / "c.toml", "--out", tmp_path / "run", *arguments) == 2
        assert words in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"robust": {"recalibrate": 2}, "bounds": {"amplitude_1": [0.9, 1.1]}}, "repeats a search of samples"),
        ({"robust": {}, "command_map": {}}, "there is a command map alone"),
        ({"weights": {"energy": 1.0}, "command_map": {}}, "there is a command map alone"),
        ({"robust": {"posterior": False}, "command_map": {}}, "do not differ"),
        ({"bounds": {"amplitude_1": [0.9, 1.1]}, "enough": 0.1}, "stops a search of samples"),
    ],
)
def test_tables_that_would_be_ignored_are_refused(table, words):
    with pytest.raises(ConfigError, match=words):
        parse_config({"optimize": table})


def test_channels_go_by_their_names(run):
    samples = waveform_files.read(run / "waveform.csv")
    config = load_config(run.parent / "c.toml", verb="optimize")
    limits = hardware_from(config)
    swapped = dataclasses.replace(
        samples, channels=samples.channels[::-1], real_rad_s=samples.real_rad_s[:, ::-1],
        imag_rad_s=samples.imag_rad_s[:, ::-1],
    )  # fmt: skip
    got = shape._as_waveform(swapped, limits, "w.csv")
    np.testing.assert_array_equal(got.real_rad_s, samples.real_rad_s)
    with pytest.raises(ConfigError, match="laser_offset_1_hz = 'left', which is no number"):
        shape._offset_hz(dataclasses.replace(samples, attributes={"laser_offset_1_hz": "left"}), "laser_offset_1_hz")


def test_a_fit_of_the_motion_brings_its_nodes():
    import tables

    rows = {"n_bar": {"value": 3.0, "verdict": "identified"}}
    fit = SimpleNamespace(path=Path("fit"), result={"status": "converged", "parameters": rows})
    device, _ = with_fit(parse_config({}), tables.ion(eta_1=0.05), fit)
    assert device.phonon_nodes == 8 and float(device.n_bar) == 3.0


def test_curves_are_read_and_checked(tmp_path):
    good = tmp_path / "good.csv"
    good.write_text("x,y\n" + "\n".join(f"{k / 10},{k / 20}" for k in range(10)))
    x, y = read_curve(good)
    np.testing.assert_allclose(x, np.arange(10) / 10)
    np.testing.assert_allclose(y, np.arange(10) / 20)
    for text, words in (
        ("x,y\n0.1,0.2\n", "has 1 rows"),
        ("x,y\n" + "0.1,1.2\n" * 5, "line 2 has y = '1.2'"),
        ("x,z\n" + "0.1,0.2\n" * 5, "line 2 has y = None"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_curve(tmp_path / "bad.csv")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_curve(tmp_path / "none.csv")


def test_paths_of_a_configuration_are_relative_to_it(tmp_path):
    text = CONFIG.replace("[optimize]", "[optimize]\ntarget = 'curve'\ncurve = 'wanted.csv'")
    (tmp_path / "c.toml").write_text(text.replace("[optimize.shape]", "[optimize.shape]\nstart = 'w.csv'"))
    config = load_config(tmp_path / "c.toml", verb="optimize")
    assert config.optimize.curve == str(tmp_path / "wanted.csv")
    assert config.optimize.shape.start == str(tmp_path / "w.csv")


def test_a_map_alone(tmp_path):
    (tmp_path / "c.toml").write_text("[device]\nrabi_scale_1 = 0.95\nengine = 'closed_form'\n[optimize.command_map]\n")
    assert call("optimize", tmp_path / "c.toml", "--out", tmp_path / "run") == 0
    result = Run(tmp_path / "run").result
    assert result["status"] == "done" and result["metric"]["before"] > 0.01 and result["metric"]["after"] < 1e-9
    assert "map_theta_1" in xr.load_dataset(tmp_path / "run" / "arrays.nc", engine="h5netcdf")

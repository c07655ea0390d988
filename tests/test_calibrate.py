"""`iontwin fit` from files to files: two tables with parameters of their own, and every kind of interval."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tables
import xarray as xr

from calibration.data import synthesize, write_table

ROOT = Path(__file__).parents[1]
CONFIG = """
[device]
engine = "closed_form"
lead_s = 200e-6
separation_s = 400e-6
tail_s = 200e-6

[data]
table = "monday.csv"
name = "monday"
[data.more]
tuesday = "tuesday.csv"

[fit]
starts = 2
per_table = ["rabi_scale_2"]
optimizer = "levenberg_marquardt"
sampling = "sobol"
[fit.free]
rabi_scale_1 = [0.7, 1.3]
rabi_scale_2 = [0.7, 1.3]
readout_error_bright = [0.0, 0.05]
readout_error_dark = [0.0, 0.05]

[uncertainty]
profile = ["rabi_scale_2", "readout_error_dark"]
posterior = true
chains = 2
draws = 400
warmup = 300
bootstrap = 40
"""
TRUTH = {"rabi_scale_1": 1.06, "rabi_scale_2@monday": 0.95, "rabi_scale_2@tuesday": 0.98,
         "readout_error_bright": 0.012, "readout_error_dark": 0.02}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    device = tables.ion(**tables.TRUTH, lead_s=200e-6, separation_s=400e-6, tail_s=200e-6)
    for k, day in enumerate(("monday", "tuesday")):
        own = dataclasses.replace(device, rabi_scale_2=TRUTH[f"rabi_scale_2@{day}"])
        table = synthesize(own, tables.settings((5.0,), cycles=41), jax.random.key(k))
        write_table(table, folder / f"{day}.csv")
    (folder / "lab.toml").write_text(CONFIG)
    command = [sys.executable, "-m", "experiments", "fit", str(folder / "lab.toml"), "--out", str(folder / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
def test_parameters_of_their_own_are_found_by_table(run):
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "converged"
    assert [n for n, one in result["parameters"].items() if one["verdict"] != "fixed"] == list(TRUTH)
    for name, truth in TRUTH.items():
        one = result["parameters"][name]
        assert abs(one["value"] - truth) < 4 * one["std"], name
        assert one["ci95"][0] <= one["value"] <= one["ci95"][1]
    assert "rabi_scale_2" not in result["parameters"]
    assert set(result["data_sha256"]) == {"monday", "tuesday"}
    assert result["n_data"] == 4 * 41


@pytest.mark.slow
def test_every_kind_of_interval_is_there(run):
    result = json.loads((run / "result.json").read_text())
    methods = result["intervals"]
    assert list(methods) == ["laplace", "profile", "bootstrap", "posterior"]
    profiled = ["rabi_scale_2@monday", "rabi_scale_2@tuesday", "readout_error_dark"]
    assert list(methods["profile"]) == profiled
    for method in ("laplace", "bootstrap", "posterior"):
        assert list(methods[method]) == list(TRUTH)
    for name in TRUTH:
        low, high = methods["laplace"][name]
        for method, found in methods.items():
            if name in found:
                a, b = found[name]
                assert 0.6 < (b - a) / (high - low) < 1.6, (method, name)
    notes = " ".join(result["notes"])
    assert "40 refits are too few for percentiles; take 100 or more." in notes
    assert "The bootstrap gives" not in notes, "chance is no disagreement"
    about = result["uncertainty"]
    assert about["names"] == list(TRUTH)
    assert about["bootstrap"]["refits"] == 40
    assert about["bootstrap"]["settled"] == 1.0
    assert (about["posterior"]["chains"], about["posterior"]["draws"]) == (2, 400)
    assert all(len(about["posterior"][key]) == 5 for key in ("mean", "std", "rhat", "effective"))


@pytest.mark.slow
def test_curves_and_draws_are_kept(run):
    with xr.open_dataset(run / "arrays.nc") as arrays:
        assert arrays["posterior"].dims == ("chain", "draw", "parameter")
        assert arrays["posterior"].shape == (2, 400, 5)
        assert arrays["bootstrap"].shape == (40, 5)
        assert [str(name) for name in arrays["parameter"].values] == list(TRUTH)
        for name in ("rabi_scale_2@monday", "readout_error_dark"):
            held, deviance = arrays[f"profile_{name}"].values, arrays[f"deviance_{name}"].values
            assert np.all(np.diff(held) > 0)
            assert deviance.min() == 0.0
        assert set(np.unique(arrays["table"].values.astype(str))) == {"monday", "tuesday"}
        assert arrays.sizes["row"] == 82


@pytest.mark.slow
def test_the_report_shows_them(run):
    text = (run / "report.html").read_text()
    assert "<h2>Intervals</h2>" in text
    assert text.count("<th>profile</th>") == text.count("<th>posterior</th>") == 1
    assert {"profiles.svg", "posterior.svg", "intervals.svg"} <= {path.name for path in (run / "figures").iterdir()}

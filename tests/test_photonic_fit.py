"""Calibration of the photonic twin: from a configuration to counts and back, and what counts leave open."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

from calibration import identifiability, twin_file
from calibration.data import synthesize
from calibration.fit import fit
from calibration.posing import pose
from calibration.problem import informed
from calibration.uncertainty import covariance, estimates
from experiments.build import device_from, settings_table
from experiments.config import load_config
from twin.memory import MovingAverage
from twin.memristor import PhotonicMemristor

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "experiments" / "configs" / "photonic.toml"


def assert_recovered(config, found, n_data):
    """Every parameter is identified, and all together are as far from the truth as their errors say."""
    far = []
    for name in config.fit.free:
        assert found[name].verdict == "identified", name
        far.append((found[name].value - getattr(config.device, name)) / found[name].std)
    assert np.max(np.abs(far)) < 3.5, far
    assert n_data == 2 * 3 * 81


def test_nine_parameters_are_recovered_from_counts():
    """The configuration that ships, its loops simulated and fitted."""
    config = load_config(CONFIG, verb="fit")
    table = synthesize(device_from(config), settings_table(config, windows=True), jax.random.key(3), keep_r_set=False)
    result = fit(PhotonicMemristor(MovingAverage(10.0), "command"), table, config.fit.free, starts=3,
                 optimizer="levenberg_marquardt")  # fmt: skip
    assert result.converged
    assert abs(result.chi2_per_dof - 1) < 5 * np.sqrt(2 / (result.n_data - result.n_free))
    assert result.basins[0].starts == 3
    assert_recovered(config, result.parameters, result.n_data)


@pytest.mark.slow
def test_simulate_and_fit_leave_a_chip_that_can_be_used(tmp_path):
    """The two commands at the head of the configuration."""
    for arguments in (("simulate", "--out", "loops"), ("fit", "--data", "loops/table.csv", "--out", "fit")):
        command = [sys.executable, "-m", "experiments", arguments[0], str(CONFIG), *arguments[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                              text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "fit" / "result.json").read_text())
    assert result["status"] == "converged"
    told = {name: SimpleNamespace(**one) for name, one in result["parameters"].items()}
    assert_recovered(load_config(CONFIG), told, result["n_data"])
    assert {name for name, one in told.items() if one.verdict == "fixed"} == {
        "loss_input", "phase_noise_1_rad", "phase_noise_2_rad"
    }  # fmt: skip
    assert told["phase_offset_1_rad"].unit == "rad"
    loaded = twin_file.load(tmp_path / "fit")
    assert loaded.warnings == ()
    assert isinstance(loaded.device, PhotonicMemristor)
    for name in loaded.names:
        assert float(getattr(loaded.device, name)) == told[name].value


# --------------------------------------------------------------------------------------------- what counts leave open

TRUTH = {"phase_offset_1_rad": 0.1, "visibility_1": 0.93, "visibility_2": 0.9, "phase_noise_1_rad": 0.2,
         "phase_noise_2_rad": 0.3, "loss_input": 0.1, "loss": 0.15, "efficiency": 0.7, "dark_counts": 0.01}  # fmt: skip
BOXES = {"phase_scale_1": (0.7, 1.3), "phase_offset_1_rad": (-1.0, 1.0), "visibility_1": (0.6, 1.0),
         "visibility_2": (0.6, 1.0), "phase_noise_1_rad": (0.0, 0.9), "phase_noise_2_rad": (0.0, 0.9),
         "loss_input": (0.0, 0.5), "loss": (0.0, 0.5), "efficiency": (0.4, 1.0),
         "dark_counts": (0.0, 0.05)}  # fmt: skip


def left_open(settings, *names):
    """Groups that the expected information of a table at the truth leaves open, and the estimates."""
    device = PhotonicMemristor(memory=MovingAverage(5.0), source="command", **TRUTH)
    table = synthesize(device, settings, jax.random.key(0))
    problem = pose(device, table, {name: BOXES[name] for name in names}).problem
    truth = np.array([TRUTH.get(name, 1.0) for name in names])
    information = np.asarray(informed(problem, jnp.asarray(truth)).information)
    width = np.asarray(problem.free.width)
    found = estimates(problem.free, truth, covariance(information, width))
    return identifiability.degeneracies(problem, truth, information), found


@pytest.mark.parametrize(
    ("pair", "why", "remedy"),
    [
        (("efficiency", "loss_input"), "thin the same counts", "take the efficiency from a source of known rate"),
        (("visibility_2", "phase_noise_2_rad"), r"contrast V exp\(-sigma\^2/2\)", "faster than the phase moves"),
    ],
)
def test_no_number_of_shots_separates_what_enters_as_one(pair, why, remedy):
    groups, _ = left_open(tables.settings((5.0,), cycles=21, shots=10**7), *pair, "loss")
    (group,) = groups
    assert set(group.names) == set(pair)
    assert group.structural
    assert why.replace("\\", "") in group.sentence
    assert remedy in group.sentence
    assert "no number of shots would separate them" in group.sentence


def test_efficiency_and_output_loss_are_one_where_only_y_is_counted():
    settings = tables.settings((5.0,), cycles=21, shots=10**6)
    (group,), _ = left_open(tables.changed(settings, n_x=None), "efficiency", "loss")
    assert group.structural
    assert "thin the same counts" in group.sentence
    assert left_open(settings, "efficiency", "loss")[0] == []


def test_scale_and_offset_are_one_over_a_narrow_range():
    narrow = tables.settings((5.0,), cycles=21, shots=400, x_set=0.5 + 0.02 * np.sin(np.arange(21)))
    (group,), _ = left_open(narrow, "phase_scale_1", "phase_offset_1_rad")
    assert set(group.names) == {"phase_scale_1", "phase_offset_1_rad"}
    assert "let the commands of that stage reach from 0 to 1" in group.sentence
    assert group.direction[group.names[1]] < 0
    assert left_open(tables.settings((5.0,), cycles=21, shots=400), "phase_scale_1", "phase_offset_1_rad")[0] == []


def test_inputs_alone_know_a_floor_and_a_height_but_three_parameters_make_them():
    """n_x = N (A - B cos phi_1): dark counts, visibility and efficiency are two numbers; outputs tell them apart."""
    settings, names = tables.settings((5.0,), cycles=21, shots=10**6), ("visibility_1", "dark_counts", "efficiency")
    (group,), found = left_open(tables.changed(settings, n_y=None), *names)
    assert set(group.names) == set(names)
    assert group.structural
    assert "both lift the smallest count rate; fix one, or count clicks with the source blocked" in group.sentence
    assert found["dark_counts"].verdict == "not identified"
    assert left_open(settings, *names)[0] == []

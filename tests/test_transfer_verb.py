"""`iontwin transfer`: both directions, from a fit, its run folder, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from calibration.data import write_table
from calibration.transfer_of_control import DESIGNED_ON
from experiments.cli import main
from experiments.records import Run

SMALL = """
[memory]
window_cycles = 4.0
[transfer]
seeds = 4
shots = 200
periods = 2
cycles_per_period = 12
points = 3
nodes = 3
"""
TO_CHIP = """
[device]
engine = "closed_form"
rabi_scale_1 = 1.05
readout_error_dark = 0.03
lifetime_s = 1e9
"""
CHIP = """
to = "photonic"
[transfer.target]
phase_scale_1 = [0.9, 1.1]
efficiency = [0.8, 1.0]
visibility_1 = 0.98
"""
SOURCE = "[transfer.source]\nrabi_scale_2 = [0.9, 1.1]\n"
FIT = """
[data]
table = 'loops.csv'
[fit]
starts = 2
[fit.free]
rabi_scale_1 = [0.8, 1.2]
readout_error_dark = [0.0, 0.1]
"""
ION_TO = "[device]\nplatform = 'photonic'\nengine = 'closed_form'\n[transfer]\nto = 'ion'\n"
CLOSED_TO_CHIP = "[device]\nengine = 'closed_form'\n[transfer]\nto = 'photonic'\n"
CONFIGS = Path(__file__).parents[1] / "experiments" / "configs"


def called(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def to_chip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("to_chip")
    what = "what = ['device', 'command_map']\n"
    assert called("transfer", written(folder, TO_CHIP + SMALL + what + CHIP + SOURCE), "--out", folder / "run") == 0
    return Run(folder / "run")


def test_the_dictionary_of_the_device_is_told(to_chip):
    rows = {row["name"]: row for row in to_chip.result["dictionary"]}
    assert rows["phase_scale_1"]["value"] == pytest.approx(1.05)
    assert rows["efficiency"]["value"] == pytest.approx(0.97)
    assert rows["efficiency"]["relation"] == "exact"
    assert rows["visibility_1"] == {"name": "visibility_1", "value": 1.0, "std": None, "verdict": None,
                                    "unit": "", "relation": "first order"}  # fmt: skip
    states = to_chip.result["remainder"]["states"]
    assert states["share R x that {v, s} lacks until m is repumped"] > 0.9
    # Next to no decay, and pulses six widths apart, which the closed form takes for farther.
    assert to_chip.result["remainder"]["populations"]["all together"]["y"] < 1e-5


def test_losses_have_intervals_and_seeds(to_chip):
    checked(to_chip, ("command_map",))
    assert len(np.unique(to_chip.arrays["loss_command_map"].values[:, 2])) == 4


@pytest.mark.slow
def test_every_kind_of_control_is_moved(tmp_path):
    assert called("transfer", written(tmp_path, TO_CHIP + SMALL + CHIP + SOURCE), "--out", tmp_path / "run") == 0
    checked(Run(tmp_path / "run"), ("command_map", "feedback", "reservoir"))


def checked(run: Run, kinds: tuple[str, ...]) -> None:
    result, arrays = run.result, run.arrays
    assert tuple(result["control"]) == kinds
    assert result["ideal"] < 1e-10
    for what, losses in result["control"].items():
        assert tuple(losses) == DESIGNED_ON
        every = arrays[f"loss_{what}"].values
        assert every.shape == (4, len(DESIGNED_ON))
        for k, one in enumerate(losses.values()):
            assert one["mean"] == pytest.approx(every[:, k].mean())
            assert one["ci95"][0] <= one["mean"] <= one["ci95"][1]
    assert result["control"]["command_map"]["native"]["mean"] < result["control"]["command_map"]["moved"]["mean"]


def test_the_run_folder_has_report_and_figures(to_chip):
    report = (to_chip.path / "report.html").read_text()
    for piece in ("Transfer between platforms", "Dictionary", "phase_scale_1", "What is not carried over",
                  "Loss of the command map", "recalibrated", "data sheet, the middle"):  # fmt: skip
        assert piece in report
    assert {path.name for path in (to_chip.path / "figures").iterdir()} >= {"images.svg", "losses.svg"}
    assert to_chip.config.transfer is not None
    assert any("moved without recalibration" in note for note in to_chip.result["notes"])


def test_a_chip_is_moved_to_an_ion(tmp_path, capsys):
    chip = "[device]\nplatform = 'photonic'\nphase_scale_1 = 0.97\nphase_offset_2_rad = 0.1\nloss = 0.05\n"
    ion = "to = 'ion'\nwhat = ['device']\n[transfer.target]\nrabi_scale_1 = [0.9, 1.1]\n"
    config = written(tmp_path, chip + SMALL + ion)
    assert called("transfer", config, "--out", tmp_path / "run", "--seed", 3, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row["value"] for row in result["dictionary"]}
    assert rows["rabi_scale_1"] == pytest.approx(0.97)
    # exp(-(120 + 100) us / lifetime) = 0.95
    assert rows["lifetime_s"] == pytest.approx(220e-6 / -np.log(0.95))
    assert result["seed"] == 3
    assert result["remainder"]["states"] == {}
    # Of an offset of 0.1 rad in stage 2 nothing is carried: up to sin(0.1)/2 in y.
    assert 0.02 < result["remainder"]["populations"]["all together"]["y"] < 0.06
    assert result["control"] == {}


@pytest.mark.slow
def test_control_of_a_chip_is_moved_to_an_ion(tmp_path):
    chip = "[device]\nplatform = 'photonic'\nphase_scale_1 = 0.97\n"
    ion = "to = 'ion'\nwhat = ['command_map', 'feedback']\n[transfer.target]\nrabi_scale_1 = [0.9, 1.1]\n"
    lines = "detuning_1_hz = [-500.0, 500.0]\n[transfer.source]\nvisibility_1 = [0.9, 1.0]\n"
    config = written(tmp_path, chip + SMALL + ion + lines)
    assert called("transfer", config, "--out", tmp_path / "run", "--set", "device.engine=lindblad") == 0
    control = Run(tmp_path / "run").result["control"]
    assert set(control) == {"command_map", "feedback"}
    assert control["command_map"]["recalibrated"]["mean"] < control["command_map"]["moved"]["mean"]


@pytest.mark.slow
def test_a_fit_gives_device_and_errors(tmp_path):
    from tables import settings

    table = settings((4.0, 8.0), cycles=25, period=12, shots=300)
    rng = np.random.default_rng(0)
    x = np.sin(1.05 * np.arcsin(np.sqrt(table.x_set))) ** 2
    counts = rng.binomial(300, x)
    r = np.where(np.arange(len(x)) % 2, 0.3, 0.7)
    table = settings((4.0, 8.0), cycles=25, period=12, shots=300, n_x=counts.astype(float), r_set=r,
                     n_y=rng.binomial(300, (1 - r) * x).astype(float))  # fmt: skip
    write_table(table, tmp_path / "loops.csv")
    device = TO_CHIP.replace("rabi_scale_1 = 1.05\n", "")
    config = written(tmp_path, device + SMALL + "what = ['device', 'command_map']\n" + CHIP + FIT)
    assert called("fit", config, "--out", tmp_path / "fit") == 0
    assert called("transfer", config, "--from", tmp_path / "fit", "--out", tmp_path / "run") == 0
    result, fitted = Run(tmp_path / "run").result, Run(tmp_path / "fit").result["parameters"]
    rows = {row["name"]: row for row in result["dictionary"]}
    assert rows["phase_scale_1"]["value"] == pytest.approx(fitted["rabi_scale_1"]["value"])
    assert rows["phase_scale_1"]["std"] == pytest.approx(fitted["rabi_scale_1"]["std"], rel=1e-6)
    assert rows["phase_scale_1"]["verdict"] == fitted["rabi_scale_1"]["verdict"]
    assert rows["phase_scale_2"]["std"] is rows["phase_scale_2"]["verdict"] is None  # nothing freed moves it
    assert rows["efficiency"]["std"] == pytest.approx(fitted["readout_error_dark"]["std"], rel=1e-6)
    assert result["from"] == "fit"
    both = written(tmp_path, device + SMALL + CHIP + SOURCE)
    assert called("transfer", both, "--from", tmp_path / "fit", "--out", tmp_path / "other") == 2
    assert not (tmp_path / "other").exists()
    # The errors of the fit are what the source may differ by.
    assert result["control"]["command_map"]["home"]["mean"] < 0.02


def test_what_a_fit_freed_of_its_likelihood_is_no_part_of_the_device(tmp_path):
    from experiments.build import device_from
    from experiments.fitted import calibrated

    fit = FIT.replace("[fit]", "[fit]\nnoise = 'beta_binomial'") + "overdispersion = [0.0, 0.1]\n"
    written(tmp_path, TO_CHIP + SMALL + CHIP + fit)
    one = {"value": 0.03, "std": 0.01, "verdict": "identified"}
    names = ["rabi_scale_1", "readout_error_dark", "overdispersion"]
    found = {"kind": "fit", "status": "converged", "parameters": dict.fromkeys(names, one),
             "correlation": {"names": names, "matrix": np.eye(3).tolist()}}  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(found))
    run = Run(tmp_path)
    device, boxes, (mean, covariance), _ = calibrated(run.config, device_from(run.config), run)
    assert float(device.rabi_scale_1) == 0.03
    assert set(boxes) == {"rabi_scale_1", "readout_error_dark"}
    np.testing.assert_allclose(covariance, 1e-4 * np.eye(2))
    np.testing.assert_array_equal(mean, 0.03)


def test_errors_and_verdicts_are_carried_as_far_as_they_go():
    from experiments.transfer import _dictionary
    from twin.memory import MovingAverage
    from twin.photonic import PhotonicMemristor

    chip = PhotonicMemristor(memory=MovingAverage(4.0), phase_scale_1=0.97, efficiency=0.7, loss=0.05, loss_input=0.1)
    verdicts = {"phase_scale_1": "identified", "efficiency": "weak", "loss": "not identified"}
    rows = {row["name"]: row for row in _dictionary(chip, verdicts, np.diag([1e-4, 4e-4, 1e8]))["dictionary"]}
    told = {name: (row["std"], row["verdict"]) for name, row in rows.items() if row["verdict"]}
    assert set(told) == {"rabi_scale_1", "readout_error_dark", "lifetime_s"}
    assert told["rabi_scale_1"] == (pytest.approx(0.01), "identified")
    assert told["readout_error_dark"] == (pytest.approx(0.02), "weak")
    assert told["lifetime_s"] == (None, "not identified")  # an error of 1e4 in a share
    assert all(row["std"] is None for name, row in rows.items() if name not in told)


def test_remainder_of_a_closed_form_has_what_that_ignores(tmp_path):
    lines = TO_CHIP + "detuning_1_hz = 800.0\n" + SMALL + "what = ['device']\n" + CHIP
    for engine in ("closed_form", "lindblad"):
        config = written(tmp_path, lines.replace("closed_form", engine))
        assert called("transfer", config, "--out", tmp_path / engine) == 0
    one, other = (Run(tmp_path / engine).result["remainder"] for engine in ("closed_form", "lindblad"))
    assert one["populations"] == other["populations"]
    assert one["populations"]["detuning"]["y"] > 1e-3


def test_the_example_is_valid():
    from experiments.config import load_config

    config = load_config(CONFIGS / "transfer.toml", verb="transfer")
    assert config.transfer is not None
    assert config.transfer.seeds >= 20


@pytest.mark.parametrize(
    "text",
    [
        "[device]\nscheme = 'v'\n[memory]\nwindow_cycles = 1e6\n[transfer]\nto = 'photonic'\nwhat = ['device']\n",
        ION_TO.replace("[transfer]", "visibility_1 = 0.0\nloss = 1.0\n[transfer]") + "what = ['command_map']\n",
    ],
)
def test_what_only_another_part_cannot_move_is_taken(tmp_path, text):
    from experiments.config import load_config

    assert load_config(written(tmp_path, text), verb="transfer").transfer is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[device]\nplatform = 'photonic'\n[transfer]\nto = 'photonic'\n", "transfer.to"),
        ("[transfer]\nto = 'photonic'\n[transfer.target]\nrabi_scale_1 = 1.0\n", "transfer.target.rabi_scale_1"),
        ("[transfer]\nto = 'photonic'\n[transfer.target]\nvisibility_3 = 1.0\n", "visibility_3"),
        ("[transfer]\nto = 'photonic'\n[transfer.target]\nvisibility_1 = 1.2\n", "between 0 and 1"),
        ("[transfer]\nto = 'photonic'\n[transfer.target]\nvisibility_1 = [1.0, 0.9]\n", "low below high"),
        ("[transfer]\nto = 'photonic'\n[transfer.source]\nrabi_scale_1 = 1.0\n", "belongs into [device]"),
        ("[transfer]\nto = 'photonic'\nwhat = ['pulses']\n", "transfer.what"),
        ("[transfer]\nto = 'photonic'\nseeds = 1\n", "transfer.seeds"),
        ("[device]\nscheme = 'v'\n[transfer]\nto = 'photonic'\nwhat = ['feedback']\n", "device.scheme is 'v'"),
        ("[memory]\nwindow_cycles = 1e6\n[transfer]\nto = 'photonic'\n", "memory.window_cycles is 1e+06"),
        (ION_TO.replace("[transfer]", "visibility_1 = 0.0\n[transfer]"), "device.visibility_1 is 0, for which no ion"),
        (ION_TO.replace("[transfer]", "loss = 1.0\n[transfer]"), "device.loss is 1, for which no ion"),
        ("[device]\n", "[transfer]"),
        ("[transfer]\nto = 'photonic'\n[transfer.source]\nn_bar = [0.0, 1.0]\n", "transfer.source.n_bar"),
        (f"{ION_TO}[transfer.target]\nn_bar = 1.0\n", "one temperature"),
        (f"{ION_TO}[transfer.target]\nlaser_linewidth_hz = 9.0\nlaser_linewidth_1_hz = 9.0\n", "is given beside"),
        (f"{ION_TO}[transfer.target]\nlifetime_s = 1.0\n", "transfer.target.lifetime_s"),
        (f"{CLOSED_TO_CHIP}[transfer.source]\ndetuning_1_hz = [0.0, 9.0]\n", "ignored by device.engine"),
        ("[transfer]\nto = 'photonic'\n[transfer.source]\nlaser_linewidth_1_hz = [0.0, 9.0]\n", "two sources"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, capsys, text, said):
    assert called("transfer", written(tmp_path, text), "--out", tmp_path / "run") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_no_fit_is_refused(tmp_path, capsys, to_chip):
    config = to_chip.path / "config.toml"
    assert called("transfer", config, "--from", to_chip.path, "--out", tmp_path / "run") == 2
    assert "no fit" in capsys.readouterr().err

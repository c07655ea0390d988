"""The demo's recorded loops: the file that was handed over, what stands in it, and what the demo's fit makes of it."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from calibration.data import read_table
from calibration.fit import fit
from experiments.build import device_from
from experiments.config import load_config, load_table

FOLDER = Path(__file__).parents[1] / "experiments"
DEMO = FOLDER / "data" / "ion_loops.csv"
CONFIG = FOLDER / "configs" / "demo.toml"
SHA256 = "5ea9111d944cb6bfc8642749e41c7f2e8405f326845c9427f11f293c81aadda1"
LOOPS = {"A": (10, 0.0, 0.0), "B": (15, 3000.0, 0.0), "C": (20, 0.0, -3000.0)}  # window, laser offsets in Hz


def test_the_file_is_the_one_that_was_recorded():
    assert hashlib.sha256(DEMO.read_bytes()).hexdigest() == SHA256
    assert read_table(DEMO).sha256 == SHA256


def test_three_loops_of_121_cycles():
    table = read_table(DEMO)
    assert len(table) == 363
    assert table.labels == tuple(LOOPS)
    for label, (window, offset_1, offset_2) in LOOPS.items():
        rows = table.rows(label)
        np.testing.assert_array_equal(table.cycle[rows], np.arange(121))
        # three periods of sin^2 in 40 cycles each, to the nine digits of the file
        np.testing.assert_allclose(table.x_set[rows], np.sin(np.pi * np.arange(121) / 40) ** 2, atol=1e-9)
        assert set(table.window_cycles[rows]) == {window}
        assert set(table.detuning_1_set_hz[rows]) == {offset_1}
        assert set(table.detuning_2_set_hz[rows]) == {offset_2}
    assert set(table.shots) == {400}
    assert not np.any(np.isnan(table.n_x) | np.isnan(table.n_y))


@pytest.mark.parametrize("label", list(LOOPS))
def test_transfers_are_the_mean_of_the_previous_measured_inputs(label):
    """The current one excluded, with a history of 1/2 before the first cycle."""
    table = read_table(DEMO)
    rows, window = table.rows(label), LOOPS[label][0]
    history = np.concatenate([np.full(window, 0.5), table.n_x[rows] / table.shots[rows]])
    expected = [np.mean(history[k : k + window]) for k in range(121)]
    np.testing.assert_allclose(table.r_set[rows], expected, rtol=0, atol=1e-9)


def test_the_demo_reads_this_file():
    config = load_config(CONFIG, verb="fit")
    assert load_table(config).sha256 == SHA256
    assert config.fit is not None
    assert config.fit.starts == 16
    assert list(config.fit.free) == [
        *("rabi_scale_1", "rabi_scale_2", "detuning_1_hz", "detuning_2_hz"),
        *("laser_linewidth_hz", "readout_error_bright", "readout_error_dark"),
    ]


@pytest.mark.slow
def test_the_demo_calibrates():
    """Sixteen random starts; and it says what these data do not determine."""
    config = load_config(CONFIG, verb="fit")
    assert config.fit is not None
    starts, seed = config.fit.starts, config.fit.seed
    found = fit(device_from(config), load_table(config), config.fit.free, starts=starts, seed=seed)
    assert found.status == "converged"
    assert 0.85 <= found.chi2_per_dof <= 1.15
    assert found.n_data == 726
    verdicts = {name: estimate.verdict for name, estimate in found.parameters.items()}
    for name in ("rabi_scale_1", "rabi_scale_2", "detuning_1_hz", "detuning_2_hz", "readout_error_bright"):
        assert verdicts[name] == "identified"
    # At these settings a dark ion read bright and a broad line both lower the contrast of the dark outcome.
    for name in ("laser_linewidth_hz", "readout_error_dark"):
        assert verdicts[name] in ("weak", "not identified")
        assert any(f"`{name}`" in note and "determine" in note for note in found.notes)
    together = "`readout_error_dark` and `laser_linewidth_hz` both take contrast from the loop; fix one, or add"
    assert any(note.startswith(together) for note in found.notes)
    assert found.basins[0].starts >= 8

"""Synthetic tables: counts of the right law, and transfers as a controller would have commanded them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

from calibration.data import LoopTable, synthesize
from calibration.likelihood import Experiment, predict
from twin.loop import run
from twin.memory import Exponential, MovingAverage
from twin.memristor import IonMemristor, PhotonicMemristor

WINDOWS = {"A": 5.0, "B": 7.4}
SETTINGS = tables.settings(tuple(WINDOWS.values()), cycles=41, shots=1000)


def truth(**parameters) -> IonMemristor:
    return tables.ion(**(tables.TRUTH | parameters))


def transfers(memory, table: LoopTable, inputs) -> np.ndarray:
    """The memory of each loop, with the window of the table, applied to these inputs."""
    r = np.full(len(table), np.nan)
    for label, window in WINDOWS.items():
        rows = table.rows(label)
        r[rows] = memory(window).filter(jnp.asarray(inputs)[rows])
    return r


def test_the_same_key_gives_the_same_table():
    first, again, other = (synthesize(truth(), SETTINGS, jax.random.key(k)) for k in (3, 3, 4))
    for name, values in first.columns.items():
        np.testing.assert_array_equal(values, again.columns[name])
    assert first.sha256 == again.sha256 != other.sha256
    assert np.mean(first.n_x != other.n_x) > 0.5
    assert np.mean(first.n_y != other.n_y) > 0.5
    # the two columns are not one stream of random numbers: at x_set = 0 both hold readout errors alone
    assert np.any(first.n_x != first.n_y)


def test_settings_are_kept_and_the_given_table_is_left_alone():
    synthetic = synthesize(truth(), SETTINGS, jax.random.key(0))
    for name in ("loop", "cycle", "x_set", "window_cycles", "detuning_1_set_hz", "detuning_2_set_hz", "shots"):
        np.testing.assert_array_equal(synthetic.columns[name], SETTINGS.columns[name])
    assert synthetic.kind == "counts"
    assert synthetic.sha256 != SETTINGS.sha256
    assert SETTINGS.r_set is None
    assert np.all(SETTINGS.n_x == 0)


@pytest.mark.parametrize(
    "device",
    [truth(), truth(memory=Exponential(4.0)), truth(source="model"), PhotonicMemristor(MovingAverage(3.0), loss=0.1)],
    ids=["measured", "exponential", "model", "photonic"],
)
def test_counts_are_drawn_from_the_device(device):
    """Mean and mean square of the standardized residuals at the truth; cells near certainty are not normal."""
    residuals = []
    for k in range(4):
        experiment = Experiment.from_table(synthesize(device, SETTINGS, jax.random.key(k)))
        prediction = predict(device, experiment)
        for column, p in ((experiment.x, prediction.p_x), (experiment.y, prediction.p_y)):
            residuals.append(np.asarray(column.residual(p))[np.asarray(p * (1 - p)) * 1000 > 5])
    z = np.concatenate(residuals)
    assert len(z) > 400
    assert abs(np.mean(z)) < 4.5 / np.sqrt(len(z))
    assert abs(np.mean(z**2) - 1) < 4.5 * np.sqrt(2 / len(z))


@pytest.mark.parametrize("memory", [MovingAverage, Exponential])
def test_transfers_follow_the_synthetic_counts_as_a_controller_would(memory):
    synthetic = synthesize(truth(memory=memory(3.0)), SETTINGS, jax.random.key(1))
    expected = transfers(memory, synthetic, synthetic.n_x / 1000)
    np.testing.assert_allclose(synthetic.r_set, expected, atol=1e-12)
    # not the expectation: the memory has seen the shot noise
    expectation = predict(truth(memory=memory(3.0)), Experiment.from_table(SETTINGS)).p_x
    assert np.max(np.abs(synthetic.r_set - transfers(memory, synthetic, expectation))) > 1e-3


@pytest.mark.parametrize("source", ["model", "command"])
def test_other_sources_do_not_see_the_counts(source):
    device = truth(source=source)
    synthetic = synthesize(device, SETTINGS, jax.random.key(1))
    x = SETTINGS.x_set if source == "command" else run(device, SETTINGS.x_set).x
    np.testing.assert_allclose(synthetic.r_set, transfers(MovingAverage, synthetic, x), atol=1e-12)


def test_a_table_without_windows_has_the_memory_of_the_device():
    device = truth(memory=MovingAverage(3.3))
    synthetic = synthesize(device, tables.changed(SETTINGS, window_cycles=None), jax.random.key(1))
    assert synthetic.window_cycles is None
    rows = synthetic.rows("B")
    expected = MovingAverage(3.3).filter(jnp.asarray(synthetic.n_x[rows] / 1000))
    np.testing.assert_allclose(synthetic.r_set[rows], expected, atol=1e-12)


def test_recorded_transfers_are_played_again_on_request():
    r_set = np.random.default_rng(0).uniform(size=len(SETTINGS))
    recorded = tables.changed(SETTINGS, r_set=r_set)
    kept = synthesize(truth(), recorded, jax.random.key(1), keep_r_set=True)
    np.testing.assert_array_equal(kept.r_set, r_set)
    played = run(truth(), SETTINGS.x_set, r_set)
    z = (kept.n_y / 1000 - played.p_y) / np.sqrt(played.p_y * (1 - played.p_y) / 1000)
    assert abs(np.mean(np.asarray(z) ** 2) - 1) < 5 * np.sqrt(2 / len(z))
    # otherwise they are forgotten
    np.testing.assert_array_equal(
        synthesize(truth(), recorded, jax.random.key(1)).r_set, synthesize(truth(), SETTINGS, jax.random.key(1)).r_set
    )


def test_cells_that_were_not_measured_stay_empty():
    n_x, n_y = np.zeros(len(SETTINGS)), np.zeros(len(SETTINGS))
    n_x[[0, 7, 60]] = np.nan
    n_y[[1, 7]] = np.nan
    shots = np.where(np.arange(len(SETTINGS)) == 7, 0, 1000)
    synthetic = synthesize(truth(), tables.changed(SETTINGS, n_x=n_x, n_y=n_y, shots=shots), jax.random.key(1))
    np.testing.assert_array_equal(np.isnan(synthetic.n_x), np.isnan(n_x))
    np.testing.assert_array_equal(np.isnan(synthetic.n_y), np.isnan(n_y))
    # a controller without a count has nothing to feed back but what it expects
    p_x = predict(truth(), Experiment.from_table(SETTINGS)).p_x
    fed = np.where(np.isnan(n_x), p_x, synthetic.n_x / 1000)
    np.testing.assert_allclose(synthetic.r_set, transfers(MovingAverage, synthetic, fed), atol=1e-12)


def test_a_missing_column_stays_missing():
    synthetic = synthesize(truth(), tables.changed(SETTINGS, n_x=None), jax.random.key(1))
    assert synthetic.n_x is None
    assert synthetic.n_y is not None


@pytest.mark.parametrize("x", [0.0, 1.0])
def test_a_saturated_input_is_no_transfer_outside_the_unit_interval(x):
    """A rounding error above 1 would be refused by the table's own rules."""
    windows = (1.0, 3.0, 3.7, 7.4, 10.0, 13.3, 24.9)
    settings = tables.settings(windows, cycles=60, x_set=np.full(60 * len(windows), x))
    synthetic = synthesize(tables.ion(), settings, jax.random.key(0))
    np.testing.assert_allclose(synthetic.r_set[synthetic.cycle >= 40], x, atol=1e-14)


def test_values_with_errors_cannot_be_synthesized():
    values = {"x": np.full(82, 0.5), "x_err": np.full(82, 0.01)}
    table = tables.changed(SETTINGS, shots=None, n_x=None, n_y=None, **values)
    with pytest.raises(ValueError, match="synthetic counts need `shots`; this table has values with errors"):
        synthesize(truth(), table, jax.random.key(0))


def test_a_device_that_cannot_be_solved_is_refused():
    with pytest.raises(ValueError, match="cannot be solved under these settings"):
        synthesize(PhotonicMemristor(MovingAverage(3.0)), _impossible(), jax.random.key(0), keep_r_set=True)


def _impossible() -> LoopTable:
    """A transfer that no beam splitter has; the table itself would refuse it."""
    table = tables.changed(SETTINGS, r_set=np.full(82, 0.5))
    object.__setattr__(table, "r_set", np.full(82, 1.5))
    return table

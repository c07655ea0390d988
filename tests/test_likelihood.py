"""Likelihoods against SciPy's distributions, predictions against `run`, gradients against finite differences."""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from scipy import stats

from calibration.data import LoopTable, read_table
from calibration.likelihood import (
    Experiment,
    Observations,
    cells,
    log_likelihood,
    log_likelihood_of,
    pearson_chi2,
    predict,
    prepared,
    replace_observations,
)
from calibration.parameters import FreeParameters, anchored, with_parameters
from twin.dynamics import StaticGrid
from twin.loop import AbstractMemristor, run
from twin.memory import AbstractMemory, Exponential, MovingAverage
from twin.memristor import IonMemristor

DEMO = Path(__file__).parents[1] / "experiments" / "data" / "ion_loops.csv"
RNG = np.random.default_rng(11)


def counted(blanks: bool = False, **columns) -> LoopTable:
    """Two loops with invented counts; with `blanks`, some cells were not measured."""
    table = tables.settings((5.0, 7.4), cycles=21)
    rng = np.random.default_rng(5)
    n_x, n_y = (np.floor(rng.uniform(0, 401, len(table))) for _ in range(2))
    if blanks:
        n_x[[0, 3, 4, 17, 30]] = np.nan
        n_y[[2, 3, 41]] = np.nan
    return tables.changed(table, **({"n_x": n_x, "n_y": n_y} | columns))


def valued(blanks: bool = False) -> LoopTable:
    rng = np.random.default_rng(6)
    rows = len(counted())
    columns = {c: rng.uniform(-0.05, 1.05, rows) for c in "xy"}
    columns |= {f"{c}_err": rng.uniform(0.01, 0.05, rows) for c in "xy"}
    if blanks:
        for c, where in (("x", [1, 2, 40]), ("y", [0, 2])):
            columns[c][where] = columns[f"{c}_err"][where] = np.nan
    return counted(shots=None, n_x=None, n_y=None, **columns)


def realistic(**parameters) -> IonMemristor:
    return tables.ion(**(tables.TRUTH | parameters))


# ------------------------------------------------------------------------------------------------ distributions


@pytest.mark.parametrize("blanks", [False, True])
def test_counts_are_binomial(blanks):
    table, device = counted(blanks), realistic()
    experiment = Experiment.from_table(table)
    prediction = predict(device, experiment)
    expected = 0.0
    for n, p in ((table.n_x, prediction.p_x), (table.n_y, prediction.p_y)):
        expected += np.nansum(stats.binom.logpmf(n, np.where(np.isnan(n), np.nan, 400), np.asarray(p)))
    np.testing.assert_allclose(log_likelihood(device, experiment), expected, rtol=1e-12)
    np.testing.assert_allclose(log_likelihood_of(experiment, prediction), expected, rtol=1e-12)
    assert experiment.n_data == 84 - (8 if blanks else 0)


@pytest.mark.parametrize("blanks", [False, True])
def test_values_are_normal(blanks):
    table, device = valued(blanks), realistic()
    experiment = Experiment.from_table(table)
    prediction = predict(device, experiment)
    expected = 0.0
    for value, error, p in (
        (table.x, table.x_err, prediction.p_x),
        (table.y, table.y_err, prediction.p_y),
    ):
        expected += np.nansum(stats.norm.logpdf(value, np.asarray(p), error))
    np.testing.assert_allclose(log_likelihood(device, experiment), expected, rtol=1e-12)
    assert experiment.n_data == 84 - (5 if blanks else 0)


@pytest.mark.parametrize("column", ["x", "y"])
def test_a_table_with_one_column_counts_that_column_alone(column):
    other = {"x": "y", "y": "x"}[column]
    table = counted(**{f"n_{other}": None})
    experiment, device = Experiment.from_table(table), realistic()
    assert (experiment.x is None) == (column == "y")
    p = getattr(predict(device, experiment), f"p_{column}")
    n = getattr(table, f"n_{column}")
    np.testing.assert_allclose(log_likelihood(device, experiment), np.sum(stats.binom.logpmf(n, 400, p)), rtol=1e-12)
    assert experiment.n_data == len(table)
    assert cells(experiment, predict(device, experiment))[0].shape == (len(table),)


@pytest.mark.parametrize("table", [counted(True), valued(True)], ids=["counts", "values"])
def test_what_stands_in_unmeasured_cells_never_enters(table):
    device = realistic(source="command")
    free = FreeParameters.from_boxes(tables.SCALES | tables.READOUT)
    values = jnp.array([1.02, 0.98, 0.01, 0.02])

    @eqx.filter_jit
    def everything(experiment):
        at = lambda v: log_likelihood(free.apply(device, v), experiment)
        prediction = predict(device, experiment)
        return jax.value_and_grad(at)(values), pearson_chi2(experiment, prediction), cells(experiment, prediction)

    experiment = Experiment.from_table(table)
    before = everything(experiment)
    for junk in (-3.0, 1e9, np.nan, np.inf):
        dirty = experiment
        for name in ("x", "y"):
            column = getattr(experiment, name)
            assert not bool(jnp.all(column.measured))
            value = jnp.where(column.measured, column.value, junk)
            dirty = dataclasses.replace(dirty, **{name: dataclasses.replace(column, value=value)})
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(everything(dirty)), strict=True):
            assert np.array_equal(a, b), junk
    assert np.all(np.isfinite(before[0][1]))


def test_an_outcome_that_never_occurred_has_a_finite_term():
    """x_set = 0 leaves the ion bright and x_set = 1 makes it dark, for certain; 0 and 400 of 400 were read dark."""
    column = Observations(jnp.array([0.0, 400.0]), jnp.full(2, 400.0), jnp.ones(2, bool), True)
    p = jnp.array([0.0, 1.0])
    value, slope = jax.value_and_grad(column.log_likelihood)(p)
    np.testing.assert_allclose(value, 0.0, atol=1e-9)
    np.testing.assert_allclose(slope, [-400.0, 400.0])
    impossible = dataclasses.replace(column, value=jnp.array([1.0, 399.0]))
    assert float(impossible.log_likelihood(p)) == -np.inf


def test_a_perfect_device_at_rest_has_a_finite_gradient():
    rows = 3
    table = LoopTable(
        loop=np.full(rows, "A"), cycle=np.arange(rows), shots=np.full(rows, 400),
        x_set=np.array([0.0, 0.5, 1.0]), r_set=np.array([0.5, 0.0, 1.0]),
        detuning_1_set_hz=np.zeros(rows), detuning_2_set_hz=np.zeros(rows),
        n_x=np.array([0.0, 190.0, 400.0]), n_y=np.array([0.0, 210.0, 0.0]),
    )  # fmt: skip
    experiment, device = Experiment.from_table(table), tables.ion()
    names = (*tables.SCALES, *tables.READOUT)

    def at(values):
        return log_likelihood(with_parameters(device, dict(zip(names, values, strict=True))), experiment)

    value, slope = jax.value_and_grad(at)(jnp.array([1.0, 1.0, 0.0, 0.0]))
    expected = stats.binom.logpmf(190, 400, 0.5) + stats.binom.logpmf(210, 400, 0.5)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    assert np.all(np.isfinite(slope))
    # 400 shots each of pulse 1 at x_set = 0, both at x_set = 0, and both at r_set = 1 read dark a little less often
    assert slope[2] < -1100


# ------------------------------------------------------------------------------------------------ Pearson's statistic


def test_pearson_by_hand():
    table, device = counted(True), realistic()
    experiment = Experiment.from_table(table)
    prediction = predict(device, experiment)
    total = 0.0
    for n, p in ((table.n_x, np.asarray(prediction.p_x)), (table.n_y, np.asarray(prediction.p_y))):
        total += np.nansum((n - 400 * p) ** 2 / (400 * p * (1 - p)))
    np.testing.assert_allclose(pearson_chi2(experiment, prediction), total, rtol=1e-12)


def test_pearson_of_values_by_hand():
    table, device = valued(True), realistic()
    experiment = Experiment.from_table(table)
    prediction = predict(device, experiment)
    total = np.nansum(((table.x - prediction.p_x) / table.x_err) ** 2)
    total += np.nansum(((table.y - prediction.p_y) / table.y_err) ** 2)
    np.testing.assert_allclose(pearson_chi2(experiment, prediction), total, rtol=1e-12)


def test_a_certain_outcome_that_occurred_adds_nothing_to_pearson():
    """A loop begins at x_set = 0, where a twin without readout errors allows no dark count."""
    column = Observations(jnp.array([0.0, 100.0]), jnp.full(2, 400.0), jnp.ones(2, bool), True)
    np.testing.assert_allclose(column.residual(jnp.array([0.0, 0.25])), 0.0)
    table = tables.changed(counted(), n_x=np.zeros(42), n_y=None, x_set=np.where(np.arange(42) < 40, 0.0, 0.1))
    experiment = Experiment.from_table(table)
    p = 0.1
    chi2 = pearson_chi2(experiment, predict(tables.ion(), experiment))
    np.testing.assert_allclose(chi2, 2 * 400 * p / (1 - p), rtol=1e-9)


def test_cells_are_probabilities_with_their_variances():
    table, device = counted(True), realistic()
    experiment = Experiment.from_table(table)
    prediction = predict(device, experiment)
    p, variance = cells(experiment, prediction)
    np.testing.assert_array_equal(p, jnp.concatenate([prediction.p_x, prediction.p_y]))
    unmeasured = np.isnan(np.concatenate([table.n_x, table.n_y]))
    assert np.all(np.isinf(variance[unmeasured]))
    np.testing.assert_allclose(variance[~unmeasured], (p * (1 - p) / 400)[~unmeasured], rtol=1e-13)


# ------------------------------------------------------------------------------------------------ shared runs


class Recorder(AbstractMemristor):
    """Any device; the sizes of its batches are noted in a list."""

    memory: AbstractMemory
    source: str
    inner: AbstractMemristor
    solved: list

    def prepared(self, x_set, settings):
        return self

    def under(self, settings):
        respond = self.inner.under(settings)

        def noted(x_set, r_set, **how):
            self.solved.append(x_set.size)
            return respond(x_set, r_set, **how)

        return noted

    def signal(self, populations):
        return self.inner.signal(populations)

    def assigned(self, populations):
        return self.inner.assigned(populations)


def test_runs_of_pulse_1_that_share_their_settings_are_listed_once():
    table = read_table(DEMO)
    experiment = Experiment.from_table(table)
    assert experiment.first_x_set.shape == (42,)
    assert len({*zip(table.x_set.tolist(), table.detuning_1_set_hz.tolist(), strict=True)}) == 42
    np.testing.assert_array_equal(experiment.first_x_set[experiment.first_of], table.x_set)
    laser_1 = experiment.settings.detuning_1_hz[experiment.first_setting]
    np.testing.assert_array_equal(laser_1[experiment.first_of], table.detuning_1_set_hz)
    assert experiment.n_data == 2 * 363


@pytest.mark.parametrize(
    ("source", "recorded", "lanes"),
    [
        ("measured", True, [42 + 363]),
        ("measured", False, [42 + 363]),  # every input was measured
        ("command", False, [42 + 363]),
        ("model", True, [42 + 363]),
        ("model", False, [42, 363]),
    ],
)
def test_they_are_solved_once_in_one_batch_where_the_transfers_allow(source, recorded, lanes):
    table = read_table(DEMO)
    table = table if recorded else tables.changed(table, r_set=None)
    device = realistic(source=source)
    recorder = Recorder(device.memory, source, device, [])
    prediction = predict(recorder, Experiment.from_table(table))
    assert recorder.solved == lanes
    # every row got its own run
    alone = device.respond(
        jnp.asarray(table.x_set), jnp.zeros(363), jnp.asarray(table.detuning_1_set_hz), jnp.zeros(363), alone=True
    )
    np.testing.assert_allclose(prediction.p_x, device.assigned(alone.populations), rtol=1e-14)


def test_the_merged_batch_equals_separate_solves():
    """With everything on: one batch of both kinds of run against `run`, which solves one kind after the other."""
    table = tables.changed(
        tables.pieces(counted(), slice(0, 6)),
        r_set=np.array([0.0, 0.2, 0.5, 0.8, 1.0, 0.4]),
        detuning_1_set_hz=np.array([0, 0, 3e3, 3e3, -1e3, 0.0]),
        detuning_2_set_hz=np.array([0, 2e3, 0, 2e3, -1e3, 500.0]),
    )
    device = realistic(method=StaticGrid(), detuning_1_hz=900.0, laser_linewidth_hz=300.0, separation_s=100e-6)
    experiment = Experiment.from_table(table)
    prediction = predict(prepared(device, experiment), experiment)
    loop = run(
        device,
        table.x_set,
        table.r_set,
        detuning_1_set_hz=table.detuning_1_set_hz,
        detuning_2_set_hz=table.detuning_2_set_hz,
    )
    np.testing.assert_allclose(prediction.p_x, loop.p_x, atol=2e-8)
    np.testing.assert_allclose(prediction.p_y, loop.p_y, atol=2e-8)
    assert bool(jnp.all(prediction.valid))


# ------------------------------------------------------------------------------------------------ the memory


def interleaved(table: LoopTable) -> LoopTable:
    """Rows of the loops in turn: A0 B0 A1 B1 ..."""
    return tables.pieces(table, np.argsort(table.cycle, kind="stable"))


@pytest.mark.parametrize("memory", [MovingAverage, Exponential])
@pytest.mark.parametrize("source", ["model", "command", "measured"])
def test_without_transfers_the_prediction_is_that_of_run(source, memory):
    """Loop by loop with the window of the table. No input was measured, so `measured` feeds its expectation back."""
    table = interleaved(counted(n_x=None))
    prediction = predict(realistic(source=source, memory=memory(3.0)), Experiment.from_table(table))
    for label, window in (("A", 5.0), ("B", 7.4)):
        rows = table.rows(label)
        loop = run(realistic(source=source, memory=memory(window)), table.x_set[rows])
        np.testing.assert_allclose(prediction.r[rows], loop.r, atol=1e-13)
        np.testing.assert_allclose(prediction.p_x[rows], loop.p_x, atol=1e-13)
        np.testing.assert_allclose(prediction.p_y[rows], loop.p_y, atol=1e-13)
        assert np.ptp(loop.r) > 0.1


def test_measured_inputs_are_fed_back_as_they_were_counted():
    table = interleaved(counted())
    prediction = predict(realistic(), Experiment.from_table(table))
    for label, window in (("A", 5.0), ("B", 7.4)):
        rows = table.rows(label)
        expected = MovingAverage(window).filter(jnp.asarray(table.n_x[rows] / 400))
        np.testing.assert_allclose(prediction.r[rows], expected, atol=1e-14)


def test_unmeasured_inputs_are_fed_back_as_expected_counts():
    table = counted(True)
    prediction = predict(realistic(), Experiment.from_table(table))
    fed = np.where(np.isnan(table.n_x), prediction.p_x, table.n_x / 400)
    rows = table.rows("A")
    by_hand = [np.mean(np.concatenate([np.full(5, 0.5), fed[rows]])[k : k + 5]) for k in range(len(rows))]
    np.testing.assert_allclose(prediction.r[rows], by_hand, atol=1e-14)


def test_values_are_fed_back_too():
    table = valued()
    prediction = predict(realistic(), Experiment.from_table(table))
    rows = table.rows("B")
    np.testing.assert_allclose(prediction.r[rows], MovingAverage(7.4).filter(jnp.asarray(table.x[rows])), atol=1e-14)


def test_recorded_transfers_are_played_as_they_are():
    table = counted(r_set=RNG.uniform(size=42))
    experiment = Experiment.from_table(table)
    for own_window in (False, True):
        np.testing.assert_array_equal(predict(realistic(), experiment, own_window=own_window).r, table.r_set)


def test_a_freed_window_overrides_that_of_the_table():
    experiment = Experiment.from_table(counted())
    device = realistic(memory=MovingAverage(3.3))
    own = predict(device, experiment, own_window=True)
    given = predict(device, experiment)
    a, b = (jnp.asarray(counted().n_x[counted().rows(label)] / 400) for label in "AB")
    np.testing.assert_allclose(own.r[:21], MovingAverage(3.3).filter(a), atol=1e-14)
    np.testing.assert_allclose(own.r[21:], MovingAverage(3.3).filter(b), atol=1e-14)
    np.testing.assert_allclose(given.r[21:], MovingAverage(7.4).filter(b), atol=1e-14)


def test_a_table_without_windows_leaves_the_device_its_own():
    experiment = Experiment.from_table(counted(window_cycles=None))
    device = realistic(memory=MovingAverage(3.3))
    expected = predict(device, experiment, own_window=True)
    np.testing.assert_array_equal(predict(device, experiment).r, expected.r)
    assert not np.allclose(expected.r, predict(device, Experiment.from_table(counted())).r)


def test_new_counts_replace_the_inputs_that_the_memory_averages():
    table = counted(True)
    experiment = Experiment.from_table(table)
    n_x = jnp.full(42, 100.0)
    replaced = replace_observations(experiment, n_x)
    expected = np.where(np.isnan(table.n_x), np.nan, 0.25)
    np.testing.assert_array_equal(replaced.fed_x, expected)
    np.testing.assert_array_equal(replaced.x.measured, experiment.x.measured)
    np.testing.assert_array_equal(replaced.y.value, experiment.y.value)
    both = replace_observations(experiment, n_x, jnp.full(42, 7.0))
    np.testing.assert_array_equal(both.y.value, 7.0)
    with_column = Experiment.from_table(counted(True, n_x=np.where(np.isnan(table.n_x), np.nan, 100.0)))
    device = realistic()
    np.testing.assert_array_equal(log_likelihood(device, replaced), log_likelihood(device, with_column))


# ------------------------------------------------------------------------------------------------ gradients and traces


def gradients(device: IonMemristor, experiment: Experiment, values: dict[str, float], step: float):
    """Reverse-mode gradient, and five-point central differences of fourth order."""
    names = tuple(values)

    def at(v):
        twin = with_parameters(device, dict(zip(names, v, strict=True)))
        return log_likelihood(twin, experiment, own_window="window_cycles" in names)

    point = jnp.array(list(values.values()))
    exact = np.asarray(eqx.filter_jit(jax.grad(at))(point))
    jitted = eqx.filter_jit(at)
    differences = []
    for k in range(len(names)):
        h = step * abs(values[names[k]])
        f = [float(jitted(point.at[k].add(m * h))) for m in (-2, -1, 1, 2)]
        differences.append((f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h))
    return exact, np.array(differences)


def test_the_gradient_in_closed_form_with_every_parameter():
    """Blanks among the measured inputs, so that r depends on the model too; the window is not an integer."""
    device = anchored(realistic(phonon_nodes=8, n_bar=0.8, eta_1=0.05, eta_2=0.06, heating_rate_per_s=40.0))
    values = tables.TRUTH | {
        "amplitude_1": 0.98, "amplitude_2": 1.03, "sigma_1_s": 20.4e-6, "sigma_2_s": 19.3e-6, "n_bar": 0.8,
        "eta_1": 0.05, "eta_2": 0.06, "heating_rate_per_s": 40.0, "window_cycles": 6.4,
    }  # fmt: skip
    exact, differences = gradients(device, Experiment.from_table(counted(True)), values, 1e-4)
    assert np.all(np.abs(exact) > 0)
    np.testing.assert_allclose(exact, differences, rtol=2e-6)


def test_the_gradient_through_the_dynamics_with_every_parameter():
    table = counted(r_set=None, n_x=np.where(np.arange(42) % 3, np.nan, counted().n_x))
    table = tables.changed(tables.pieces(table, slice(2, 8)), detuning_1_set_hz=np.array([0, 0, 2e3, 2e3, -1e3, 0.0]))
    experiment = Experiment.from_table(table)
    values = tables.TRUTH | {
        "detuning_1_hz": 1100.0, "detuning_2_hz": -800.0, "laser_linewidth_hz": 250.0, "laser_linewidth_1_hz": 80.0,
        "laser_linewidth_2_hz": 60.0, "sigma_1_s": 20.4e-6, "sigma_2_s": 19.3e-6, "separation_s": 104e-6,
        "lead_s": 90e-6, "tail_s": 95e-6, "lifetime_s": 5e-3, "branching": 0.4, "window_cycles": 3.3,
    }  # fmt: skip
    device = anchored(realistic(method=StaticGrid(1e-10), memory=MovingAverage(3.3)))
    device = dataclasses.replace(device, **{k: v for k, v in values.items() if k != "window_cycles"})
    exact, differences = gradients(prepared(device, experiment), experiment, values, 3e-3)
    assert np.all(np.abs(exact) > 0)
    # The static grid's error of 1e-8 is not smooth: steps shorter than this difference its noise.
    np.testing.assert_allclose(exact, differences, rtol=5e-5)


def test_a_new_value_or_new_counts_do_not_retrace():
    traces = 0

    @eqx.filter_jit
    def evaluate(device, experiment):
        nonlocal traces
        traces += 1
        return log_likelihood(device, experiment)

    experiment = Experiment.from_table(counted())
    values = {float(evaluate(realistic(), experiment))}
    values.add(float(evaluate(realistic(rabi_scale_1=0.9, readout_error_dark=0.04), experiment)))
    values.add(float(evaluate(realistic(memory=MovingAverage(4.0)), experiment)))
    other = tables.changed(counted(), n_x=np.arange(42.0), window_cycles=np.repeat([3.7, 9.0], 21))
    values.add(float(evaluate(realistic(), Experiment.from_table(other))))
    assert traces == 1
    assert len(values) == 3  # the table's windows stand above the device's

"""Calibration on closed-form tables whose truth is known: what is recovered, and what is said when it is not."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

from calibration import fit as module
from calibration import problem, uncertainty
from calibration.data import LoopTable, synthesize
from calibration.fit import FitResult, fit
from calibration.likelihood import Experiment, log_likelihood, pearson_chi2, predict
from calibration.parameters import FreeParameters, anchored
from twin.memory import MovingAverage
from twin.memristor import PhotonicMemristor

FREE = tables.SCALES | tables.READOUT
SETTINGS = tables.settings((5.0, 9.0), cycles=43, shots=400)


@functools.cache
def recorded(key: int = 0) -> LoopTable:
    """Counts of the ion of `tables.TRUTH`, with the transfers that its controller commanded."""
    return synthesize(tables.ion(**tables.TRUTH), SETTINGS, jax.random.key(key))


@functools.cache
def calibrated(key: int = 0) -> FitResult:
    return fit(tables.ion(), recorded(key), FREE, starts=3, seed=key)


def note_with(result: FitResult, text: str) -> str:
    (note,) = (note for note in result.notes if text in note)
    return note


# ------------------------------------------------------------------------------------------------ a good fit


def test_the_truth_is_recovered():
    result = calibrated()
    assert result.status == "converged"
    assert result.converged
    for name, truth in tables.TRUTH.items():
        estimate = result.parameters[name]
        assert abs(estimate.value - truth) < 4 * estimate.std, name
        assert estimate.std < 0.01
        assert estimate.ci95[0] < estimate.value < estimate.ci95[1]
        assert FREE[name][0] <= estimate.ci95[0]
        assert estimate.ci95[1] <= FREE[name][1]
        assert float(getattr(result.device, name)) == estimate.value
    assert result.parameters["rabi_scale_1"].verdict == "identified"
    assert result.parameters["rabi_scale_2"].verdict == "identified"


def test_the_estimate_is_the_optimum():
    """The slope of log L there is far below one standard error, and L is above that of the truth."""
    result = calibrated()
    experiment = Experiment.from_table(recorded())
    parameters = FreeParameters.from_boxes(FREE)
    values = jnp.array([e.value for e in result.parameters.values()])
    at = lambda v: log_likelihood(parameters.apply(anchored(tables.ion()), v), experiment)
    value, slope = eqx.filter_jit(jax.value_and_grad(at))(values)
    np.testing.assert_allclose(value, result.log_likelihood, rtol=1e-12)
    assert float(slope @ jnp.asarray(result.covariance) @ slope) < 1e-3
    excess = result.log_likelihood - float(at(jnp.array(list(tables.TRUTH.values()))))
    assert 0 < excess < 12  # half a chi-squared of four degrees of freedom


def test_errors_are_those_of_the_information_at_the_optimum():
    result = calibrated()
    parameters = FreeParameters.from_boxes(FREE)
    values = jnp.array([e.value for e in result.parameters.values()])
    experiment = Experiment.from_table(recorded())
    information = uncertainty.fisher_information(anchored(tables.ion()), experiment, parameters, values)
    np.testing.assert_allclose(result.covariance, np.linalg.inv(information), rtol=1e-6)
    std = np.array([e.std for e in result.parameters.values()])
    np.testing.assert_allclose(std, np.sqrt(np.diag(result.covariance)))
    np.testing.assert_allclose(result.correlation, result.covariance / np.outer(std, std))


def test_what_else_the_result_holds():
    result, experiment = calibrated(), Experiment.from_table(recorded())
    assert list(result.parameters) == list(FREE)
    assert result.n_data == 4 * 43 == experiment.n_data
    assert result.n_free == 4
    prediction = predict(result.device, experiment)
    np.testing.assert_allclose(result.prediction.p_x, prediction.p_x, rtol=1e-12)
    np.testing.assert_allclose(result.prediction.p_y, prediction.p_y, rtol=1e-12)
    chi2 = float(pearson_chi2(experiment, prediction)) / (4 * 43 - 4)
    np.testing.assert_allclose(result.chi2_per_dof, chi2, rtol=1e-9)
    assert abs(chi2 - 1) < 5 * np.sqrt(2 / (4 * 43 - 4))
    assert set(result.history) == {"search", "descend", "polish"}
    assert set(result.seconds) == {"prepare", "search", "descend", "polish", "uncertainty"}
    assert all(seconds >= 0 for seconds in result.seconds.values())
    for stage in ("descend", "polish"):
        assert result.history[stage] == sorted(result.history[stage])
    np.testing.assert_allclose(result.history["polish"][-1], result.log_likelihood, atol=1e-3)


def test_basins_are_ranked_and_count_their_starts():
    result = calibrated()
    assert sum(basin.starts for basin in result.basins) <= 3
    assert [b.log_likelihood for b in result.basins] == sorted((b.log_likelihood for b in result.basins), reverse=True)
    best = result.basins[0]
    note = note_with(result, "starts ended in the best basin")
    assert note.startswith(f"{best.starts} of 3 starts")
    for name, estimate in result.parameters.items():
        assert abs(best.values[name] - estimate.value) < 0.2 * estimate.std
    np.testing.assert_allclose(best.log_likelihood, result.log_likelihood, atol=0.02)


def test_the_same_seed_gives_the_same_result():
    again = fit(tables.ion(), recorded(), FREE, starts=3, seed=0)
    assert again.parameters == calibrated().parameters
    assert again.history == calibrated().history
    other = fit(tables.ion(), recorded(), FREE, starts=3, seed=5)
    assert other.history != calibrated().history
    for name, estimate in other.parameters.items():
        assert abs(estimate.value - calibrated().parameters[name].value) < 0.05 * estimate.std


def test_progress_is_told_stage_by_stage():
    told = []
    fit(tables.ion(), recorded(), FREE, starts=3, on_progress=lambda *news: told.append(news))
    assert list(dict.fromkeys(stage for stage, *_ in told)) == ["search", "descend", "polish"]
    for stage in ("search", "descend", "polish"):
        done, most, best = zip(*((d, m, b) for s, d, m, b in told if s == stage), strict=True)
        assert done[0] == 0
        assert list(done) == sorted(done)
        assert set(most) == {most[0]}
        assert done[-1] <= most[0]
        assert all(np.isfinite(best[1:]))


def test_new_data_boxes_and_device_values_trace_nothing(monkeypatch):
    """A table asks its device by the name `predict` in the module, each time it is traced and never else."""
    traces = 0

    def counting(*args, **kwargs):
        nonlocal traces
        traces += 1
        return predict(*args, **kwargs)

    calibrated()
    # Counts are drawn from predictions, so all are drawn before any is counted.
    one, two, three = recorded(1), recorded(2), recorded()
    longer = synthesize(tables.ion(**tables.TRUTH), tables.settings((5.0, 9.0), cycles=46), jax.random.key(9))
    monkeypatch.setattr(problem, "predict", counting)
    first = fit(tables.ion(), one, FREE, starts=3, seed=1)
    wider = {name: (low, 1.1 * high) for name, (low, high) in FREE.items()}
    second = fit(tables.ion(amplitude_1=0.97, memory=MovingAverage(4.0)), two, wider, starts=3, seed=2)
    assert traces == 0
    assert first.parameters != second.parameters
    result = fit(tables.ion(), longer, FREE, starts=3)  # a longer table fills the same arrays
    assert traces == 0
    assert result.prediction is not None
    assert len(result.prediction.p_y) == len(longer)
    fit(tables.ion(), three, tables.SCALES, starts=2)  # another problem does count
    assert traces > 0


def test_values_with_errors_are_fitted_as_well():
    truth = predict(tables.ion(**tables.TRUTH), Experiment.from_table(recorded()))
    rng = np.random.default_rng(4)
    columns = {"shots": None, "n_x": None, "n_y": None}
    for name, p in (("x", truth.p_x), ("y", truth.p_y)):
        columns[f"{name}_err"] = rng.uniform(0.005, 0.02, len(SETTINGS))
        columns[name] = np.asarray(p) + columns[f"{name}_err"] * rng.normal(size=len(SETTINGS))
    columns["x"][3] = columns["x_err"][3] = np.nan
    result = fit(tables.ion(), tables.changed(recorded(), **columns), FREE, starts=2)
    assert result.converged
    assert result.n_data == 4 * 43 - 1
    assert abs(result.chi2_per_dof - 1) < 5 * np.sqrt(2 / result.n_data)
    for name, value in tables.TRUTH.items():
        assert abs(result.parameters[name].value - value) < 4 * result.parameters[name].std, name


def test_the_photonic_memristor_is_fitted_through_the_same_door():
    truth = PhotonicMemristor(MovingAverage(5.0), loss=0.12, efficiency=0.9, dark_counts=0.02)
    table = synthesize(truth, SETTINGS, jax.random.key(0))
    boxes = {"loss": (0.0, 0.4), "efficiency": (0.5, 1.0), "dark_counts": (0.0, 0.05)}
    result = fit(PhotonicMemristor(MovingAverage(5.0)), table, boxes, starts=2)
    assert result.converged
    for name in boxes:
        assert abs(result.parameters[name].value - float(getattr(truth, name))) < 4 * result.parameters[name].std
    assert result.parameters["loss"].verdict == "identified"


@pytest.mark.slow
def test_a_window_is_recovered_where_the_memory_is_used():
    """No recorded transfer: the twin's memory averages the recorded counts over a window that is not an integer."""
    settings = tables.changed(SETTINGS, window_cycles=None)
    table = synthesize(tables.ion(**tables.TRUTH, memory=MovingAverage(6.4)), settings, jax.random.key(3))
    table = tables.changed(table, r_set=None)
    boxes = tables.SCALES | {"window_cycles": (3.0, 12.0)}
    device = tables.ion(readout_error_bright=0.012, readout_error_dark=0.02)
    result = fit(device, table, boxes, starts=4)
    window = result.parameters["window_cycles"]
    assert result.converged
    assert window.verdict == "identified"
    assert window.unit == "cycles"
    assert abs(window.value - 6.4) < 4 * window.std
    assert not any("memory is never used" in note for note in result.notes)


# ------------------------------------------------------------------------------------------------ what cannot be known


def test_width_and_scale_of_one_pulse_cannot_be_told_apart():
    """Resonant and apart, populations depend on areas: amplitude and width are one parameter."""
    boxes = {**tables.SCALES, "sigma_1_s": (15e-6, 25e-6)}
    device = tables.ion(readout_error_bright=0.012, readout_error_dark=0.02)
    for seed in range(3):
        result = fit(device, recorded(), boxes, starts=3, seed=seed)
        verdicts = {name: estimate.verdict for name, estimate in result.parameters.items()}
        assert verdicts["rabi_scale_2"] == "identified"
        assert verdicts["rabi_scale_1"] != "identified", (seed, result.parameters)
        assert verdicts["sigma_1_s"] != "identified", (seed, result.parameters)
        note = note_with(result, "pulse area")
        assert "`rabi_scale_1`" in note
        assert "`sigma_1_s`" in note
        assert "`rabi_scale_2`" not in note
        assert "no number of shots would separate them" in note
        (group,) = result.degeneracies
        assert set(group.names) == {"rabi_scale_1", "sigma_1_s"}
        assert group.structural
        # their product is known all the same
        ((name, (area, std)),) = result.areas.items()
        assert name == "area_scale_1"
        assert abs(area - 1.06) < 4 * std
        assert std < 0.006


def test_a_window_has_no_bearing_on_recorded_transfers():
    boxes = tables.SCALES | {"window_cycles": (3.0, 12.0)}
    device = tables.ion(readout_error_bright=0.012, readout_error_dark=0.02)
    result = fit(device, recorded(), boxes, starts=2)
    assert result.converged
    assert result.parameters["window_cycles"].verdict == "not identified"
    assert "the table records `r_set`, so the memory is never used" in note_with(result, "`window_cycles` cannot be")
    assert result.parameters["rabi_scale_1"].verdict == "identified"
    assert 3.0 <= result.parameters["window_cycles"].ci95[0] <= result.parameters["window_cycles"].ci95[1] <= 12.0


def test_a_parameter_stopped_by_its_box_is_said_to_be():
    boxes = FREE | {"rabi_scale_1": (0.7, 1.0)}
    result = fit(tables.ion(), recorded(), boxes, starts=3)
    assert result.parameters["rabi_scale_1"].verdict == "at bound"
    assert 0.9997 < result.parameters["rabi_scale_1"].value <= 1.0
    assert "stopped by the prior box at `rabi_scale_1`" in note_with(result, "stopped by the prior box")
    assert result.parameters["rabi_scale_2"].verdict == "identified"


def test_data_that_the_model_does_not_describe_are_not_trusted():
    other = np.roll(recorded().n_y, 11)
    result = fit(tables.ion(), tables.changed(recorded(), n_y=other), FREE, starts=3)
    assert result.chi2_per_dof > 5
    assert "does not describe these data" in note_with(result, "Pearson chi2/dof is")
    assert not any("Pearson" in note for note in calibrated().notes)


def test_impossible_counts_leave_a_result_with_the_reason():
    """Dark counts of an ion at rest, and a twin whose readout cannot err."""
    n_x = recorded().n_x.copy()
    n_x[0] = 3
    result = fit(tables.ion(), tables.changed(recorded(), n_x=n_x), tables.SCALES, starts=2)
    assert result.status.startswith("not converged: the likelihood is not finite from any start")
    assert not result.converged
    assert result.parameters == {}
    assert result.prediction is None
    assert result.basins == []
    assert result.notes
    assert "readout errors" in result.notes[0]
    assert result.covariance.shape == (2, 2)
    assert np.all(np.isnan(result.covariance))
    assert np.isnan(result.chi2_per_dof)
    assert result.n_data == 4 * 43
    assert set(result.history) == {"search", "descend"}


def test_a_perfect_ion_at_rest_has_a_finite_chi2():
    """x_set = 0 and no readout error: p = 0 and no count, as it must be."""
    table = synthesize(tables.ion(rabi_scale_1=1.06), SETTINGS, jax.random.key(0))
    result = fit(tables.ion(), table, tables.SCALES, starts=2)
    assert result.converged
    assert 0.5 < result.chi2_per_dof < 1.5


def test_a_polish_that_is_cut_short_is_not_called_converged(monkeypatch):
    monkeypatch.setattr(module, "_POLISH", module._POLISH._replace(iterations=1))
    device = tables.ion(readout_error_bright=0.012, readout_error_dark=0.02)
    result = fit(device, recorded(), tables.SCALES, starts=2)
    assert result.status == "not converged: the polish still moved after 1 iterations"
    assert set(result.parameters) == set(tables.SCALES)
    assert result.prediction is not None


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ({}, "at least one parameter must be free"),
        ({"rabi_scale_1": (1.3, 0.7)}, "box of `rabi_scale_1` must be finite with low below high"),
        ({"rabi_scale_3": (0.7, 1.3)}, "`rabi_scale_3` is no parameter of IonMemristor"),
        ({"n_bar": (0.0, 2.0)}, "`phonon_nodes` must be larger than 1"),
        ({"readout_error_dark": (1.0, 3.0)}, "`readout_error_dark` must be in"),
    ],
    ids=["none", "empty box", "unknown", "moving ion", "no probability"],
)
def test_what_cannot_be_free_is_refused_before_anything_is_computed(boxes, message):
    with pytest.raises(ValueError, match=message):
        fit(tables.ion(), recorded(), boxes)

"""Levenberg-Marquardt against the other optimizer, on the demo and where boxes, held parameters and laws stop it."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from test_demo_data import DEMO

from calibration import problem as problems
from calibration.data import LoopTable, read_table, synthesize
from calibration.fit import FitResult, fit, solve
from calibration.least_squares import descend, descend_one
from calibration.parameters import FreeParameters
from calibration.posing import pose
from twin.memristor import Lindblad

FREE = tables.SCALES | tables.READOUT


@functools.cache
def recorded(key: int = 0) -> LoopTable:
    return synthesize(tables.ion(**tables.TRUTH), tables.settings((5.0,), cycles=41), jax.random.key(key))


@functools.cache
def demo():
    return pose(tables.ion(method=Lindblad()), read_table(DEMO), tables.DEMO)


@functools.cache
def calibrated(optimizer: str) -> FitResult:
    return solve(demo(), optimizer=optimizer, starts=4, seed=1, sampling="sobol")


# ------------------------------------------------------------------------------------------------ one optimum


@pytest.mark.slow
def test_both_optimizers_end_in_one_optimum():
    """On the demo's recorded loops, seven parameters, two of them hardly determined."""
    one, other = calibrated("levenberg_marquardt"), calibrated("adam+lbfgs")
    assert one.converged, one.status
    assert other.converged, other.status
    assert abs(one.log_likelihood - other.log_likelihood) < 1e-4
    for name, estimate in one.parameters.items():
        assert abs(estimate.value - other.parameters[name].value) < 1e-2 * estimate.std, name
        assert estimate.verdict == other.parameters[name].verdict
    np.testing.assert_allclose(one.covariance, other.covariance, rtol=0.02, atol=1e-3 * np.abs(one.covariance).max())
    assert set(one.history) == {"descend", "polish"}
    assert set(one.seconds) >= {"descend", "polish", "uncertainty"}


@pytest.mark.slow
def test_the_demo_is_emulated_well_enough():
    """The optimum is checked against the device's own method, whose device is the one handed out."""
    found = calibrated("levenberg_marquardt")
    assert found.emulation["error"] <= 1e-6
    assert found.emulation["largest_shift_in_std"] < 1e-3
    assert not any("too coarse" in note for note in found.notes)
    reference = eqx.filter_jit(lambda p, v: p.log_likelihood(v))(demo().problem, jnp.asarray(found.values))
    np.testing.assert_allclose(found.log_likelihood, reference, rtol=0, atol=1e-3)
    assert float(found.device.detuning_1_hz) == found.parameters["detuning_1_hz"].value


# ------------------------------------------------------------------------------------------------ what it cannot do


@pytest.mark.parametrize("noise", ["student_t", "beta_binomial"])
def test_a_law_that_is_no_sum_of_squares_is_refused(noise):
    with pytest.raises(ValueError, match=rf"sum of squares, which the noise '{noise}' is not; use the optimizer"):
        fit(tables.ion(), recorded(), FREE, optimizer="levenberg_marquardt", noise=noise)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"`optimizer` must be one of .* but is 'newton'"):
        solve(pose(tables.ion(), recorded(), FREE), optimizer="newton")


# ------------------------------------------------------------------------------------------------ held, and at the edge


def test_held_coordinates_stay():
    """And the others go where they go if the held ones are not free at all."""
    problem = pose(tables.ion(), recorded(), FREE).problem
    held = jnp.array([True, False, False, True])
    start = jnp.array([1.055, 1.0, 0.02, 0.018])
    found = eqx.filter_jit(descend_one)(problem, start, held)
    np.testing.assert_array_equal(found.values[held], start[held])
    assert bool(found.converged)
    known = tables.ion(rabi_scale_1=1.055, readout_error_dark=0.018)
    fewer = pose(known, recorded(), {n: FREE[n] for n in ("rabi_scale_2", "readout_error_bright")}).problem
    expected = descend(fewer, jnp.array([[1.0, 0.02]]))
    np.testing.assert_allclose(found.values[~held], expected.values[0], rtol=1e-5)
    np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood[0], rtol=0, atol=1e-6)


def test_an_optimum_at_the_edge_of_a_box_is_one():
    boxes = FREE | {"rabi_scale_1": (0.7, 1.0)}
    found = fit(tables.ion(), recorded(), boxes, starts=2, optimizer="levenberg_marquardt")
    assert found.parameters["rabi_scale_1"].verdict == "at bound"
    assert found.status == "converged" or found.status.startswith("not converged: ")
    other = fit(tables.ion(), recorded(), boxes, starts=2)
    assert found.converged
    assert abs(found.log_likelihood - other.log_likelihood) < 0.05
    for name in ("rabi_scale_2", "readout_error_bright", "readout_error_dark"):
        assert abs(found.parameters[name].value - other.parameters[name].value) < 0.05 * other.parameters[name].std


def test_a_search_cut_short_is_not_called_converged():
    problem = pose(tables.ion(), recorded(), FREE).problem
    start = problem.free.unbounded(jnp.array([0.75, 1.25, 0.04, 0.04]))
    found = eqx.filter_jit(functools.partial(descend_one, steps=1))(problem, start)
    assert not bool(found.converged)
    assert np.isfinite(found.log_likelihood)


def test_it_is_not_compiled_again_for_other_data(monkeypatch):
    traces = 0

    def counting(*args, **kwargs):
        nonlocal traces
        traces += 1
        return predict(*args, **kwargs)

    predict = problems.predict
    options = {"starts": 2, "optimizer": "levenberg_marquardt"}
    first = fit(tables.ion(), recorded(), FREE, **options)
    other = recorded(3)
    monkeypatch.setattr(problems, "predict", counting)
    second = fit(tables.ion(amplitude_1=0.98), other, FREE | {"rabi_scale_1": (0.8, 1.2)}, **options)
    assert traces == 0
    assert first.parameters != second.parameters


# ------------------------------------------------------------------------------------------------ starts


def test_starts_are_spread_evenly():
    """Each axis has one point in each eighth of its box; random ones do not."""
    free = FreeParameters.from_boxes(FREE)
    points = np.asarray((free.spread(3, 8) - free.low) / free.width)
    for column in points.T:
        np.testing.assert_array_equal(np.sort(np.floor(8 * column)), np.arange(8))
    np.testing.assert_array_equal(free.spread(3, 8), free.spread(3, 8))
    assert not np.array_equal(free.spread(3, 8), free.spread(4, 8))
    assert free.spread(0, 5).shape == (5, 4)
    assert free.spread(0, 1).shape == (1, 4)


# ------------------------------------------------------------------------------------------------ a day's drift


@pytest.mark.slow
def test_each_table_has_its_own_detuning():
    """One drifting line, one pulse, two days: small tables under the full dynamics."""
    settings = tables.settings((5.0,), cycles=24, shots=1000, detuning_1_set_hz=np.where(np.arange(24) % 2, 3e3, -3e3))
    device = tables.ion(method=Lindblad(1e-7), readout_error_bright=0.01)
    days = {"monday": 1500.0, "tuesday": -900.0}
    real = {day: dataclasses.replace(device, rabi_scale_1=1.04, detuning_1_hz=hz) for day, hz in days.items()}
    named = {day: synthesize(real[day], settings, jax.random.key(k)) for k, day in enumerate(days)}
    boxes = {"rabi_scale_1": (0.7, 1.3), "detuning_1_hz": (-5e3, 5e3)}
    options = {"starts": 4, "optimizer": "levenberg_marquardt"}
    found = fit(device, named, boxes, per_table=["detuning_1_hz"], **options)
    assert found.converged
    assert list(found.parameters) == ["rabi_scale_1", "detuning_1_hz@monday", "detuning_1_hz@tuesday"]
    for day, hz in days.items():
        own = found.parameters[f"detuning_1_hz@{day}"]
        assert abs(own.value - hz) < 4 * own.std
        assert own.verdict == "identified"
        assert own.unit == "Hz"
        assert len(found.predictions[day].p_y) == 24
    scale = found.parameters["rabi_scale_1"]
    assert abs(scale.value - 1.04) < 4 * scale.std
    assert abs(found.chi2_per_dof - 1) < 5 * np.sqrt(2 / found.n_data)
    assert found.n_data == 4 * 24

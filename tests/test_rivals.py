"""Rival laws of the transfer: each is what its equation says, and the data find the one they came from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from scipy.integrate import solve_ivp

from calibration.data import synthesize
from calibration.rivals import (
    CLASSICAL,
    CLOSED,
    CONSTANT,
    FULL,
    INSTANTANEOUS,
    KERNEL,
    ClassicalMemristor,
    LinearDrift,
    Memoryless,
    compare,
    rivals,
)
from experiments.studies.checks import design
from twin.closed_form import set_area
from twin.loop import run, stream
from twin.memory import Exponential, MovingAverage
from twin.memristor import ClosedForm, PhotonicMemristor

BOXES = tables.SCALES | {"readout_error_dark": (0.0, 0.05)}
DRIFT = LinearDrift(0.3, 0.45, 0.4, 0.1, 0.8)


def small():
    return design((24, 12), cycles=37, shots=400)


def made(device, seed=0, **columns):
    """A table of a device, transfers not recorded."""
    return tables.changed(synthesize(device, small(), jax.random.key(seed)), r_set=None, **columns)


def test_drift_solves_its_equation():
    """Constant drive: dw/dt = mu (x - rest) 4 w (1 - w), integrated by someone else."""
    x = jnp.full(12, 0.9)
    slope = lambda _, w: 0.3 * (0.9 - 0.45) * (1 - (2 * w - 1) ** 2)
    w = solve_ivp(slope, (0, 11), [0.4], t_eval=np.arange(12), rtol=1e-11, atol=1e-12).y[0]
    np.testing.assert_allclose(DRIFT.filter(x), 0.1 + 0.7 * w, atol=1e-9)


def test_drift_is_causal_and_streams_as_it_filters():
    x = jax.random.uniform(jax.random.key(0), (9, 2))
    state, read = DRIFT.init((2,)), []
    for row in x:
        read.append(DRIFT.read(state))
        state = DRIFT.update(state, row)
    np.testing.assert_allclose(DRIFT.filter(x), jnp.stack(read), atol=1e-12)
    np.testing.assert_array_equal(DRIFT.filter(x)[:5], DRIFT.filter(x.at[5:].set(0.0))[:5])


def test_a_classical_device_runs_and_streams_alike():
    device = ClassicalMemristor(mobility_per_cycle=0.2, r_on=0.9)
    x = jnp.sin(jnp.pi * jnp.arange(13) / 12) ** 2
    loop = run(device, x)
    np.testing.assert_allclose(loop.y, stream(device, x).y, atol=1e-12)
    np.testing.assert_allclose(loop.y, (1 - loop.r) * loop.x, atol=1e-12)


def test_memoryless_devices_ignore_the_transfer():
    x = jnp.linspace(0, 1, 7)
    one = Memoryless(rabi_scale_1=1.1, r_at_0=0.2, r_at_1=0.6)
    loop = run(one, x, jnp.full(7, 0.9))
    expected = jnp.sin(1.1 * set_area(x) / 2) ** 2
    np.testing.assert_allclose(loop.y, expected * (1 - 0.2 - 0.4 * x), atol=1e-12)
    np.testing.assert_allclose(run(dataclasses.replace(one, r_at_1=None), x).y, expected * 0.8, atol=1e-12)


@pytest.fixture(scope="module")
def of_the_ion():
    device = tables.ion(rabi_scale_1=1.05, readout_error_dark=0.02)
    table = made(device)
    field, notes = rivals(device, table, BOXES)
    return field, compare(field, table, starts=3, notes=notes)


@pytest.mark.slow
def test_the_data_of_an_ion_prefer_it(of_the_ion):
    field, found = of_the_ion
    assert {rival.name for rival in field} == {FULL, KERNEL, CONSTANT, INSTANTANEOUS, CLASSICAL}
    best, *rest = found.ranking
    assert best.name == FULL and best.difference == 0
    assert all(one.told and one.aic > best.aic and one.bic > best.bic for one in rest)
    assert any("The data prefer the full twin to the constant transfer" in s for s in found.sentences)
    assert any("so the two are one" in s for s in found.sentences)


@pytest.mark.slow
def test_criteria_are_what_they_are_called(of_the_ion):
    one = of_the_ion[1].ranking[0]
    cells = 2 * 74
    assert one.aic == pytest.approx(2 * one.n_free - 2 * one.log_likelihood)
    assert one.bic == pytest.approx(one.n_free * np.log(cells) - 2 * one.log_likelihood)
    # Predicting what was not fitted is harder.
    assert one.held_out < one.log_likelihood
    assert one.values["rabi_scale_1"] == pytest.approx(1.05, abs=0.03)


@pytest.mark.parametrize(
    ("truth", "winner"),
    [
        pytest.param(
            ClassicalMemristor(mobility_per_cycle=0.3, r_off=0.1, r_on=0.9), CLASSICAL, marks=pytest.mark.slow
        ),
        (Memoryless(r_at_0=0.2, r_at_1=0.7), INSTANTANEOUS),
    ],
    ids=["classical", "instantaneous"],
)
def test_data_of_a_rival_prefer_the_rival(truth, winner):
    table = made(truth, seed=1)
    device = tables.ion(memory=MovingAverage(8.0))
    wanted = {FULL, winner, CONSTANT}
    field = [rival for rival in rivals(device, table, BOXES)[0] if rival.name in wanted]
    assert compare(field, table, starts=4).ranking[0].name == winner


def test_equal_models_cannot_be_told_apart():
    """A constant transfer is an instantaneous one without slope."""
    table = made(Memoryless(r_at_0=0.4), seed=2)
    field = [r for r in rivals(tables.ion(), table, BOXES)[0] if r.name in (CONSTANT, INSTANTANEOUS)]
    found = compare(field, table, starts=3)
    assert not found.ranking[1].told
    assert "cannot be told apart" in found.sentences[0]


def test_the_other_kernel_has_the_same_mean_lag():
    table = made(tables.ion(), window_cycles=np.full(74, 9.0))
    field, _ = rivals(tables.ion(), table, BOXES)
    (part,) = next(r for r in field if r.name == KERNEL).problem.parts
    assert isinstance(part.device.memory, Exponential)
    assert float(part.device.memory.tau_cycles) == 5.5
    fed = np.asarray(table.n_x / table.shots)[:37]
    r = part.data.prediction(part.device, False).r[:37]
    np.testing.assert_allclose(r, Exponential(5.0).filter(jnp.asarray(fed)), atol=1e-12)


def test_recorded_transfers_hide_the_kernel():
    device = tables.ion()
    table = synthesize(device, small(), jax.random.key(0))
    field, notes = rivals(device, table, BOXES)
    assert KERNEL not in {rival.name for rival in field}
    assert any("records `r_set`" in note for note in notes)


def test_the_closed_form_drops_what_it_does_not_know():
    device = tables.ion(separation_s=60e-6)
    device = dataclasses.replace(device, method=ClosedForm())
    boxes = BOXES | {"detuning_1_hz": (-1e3, 1e3)}
    table = made(device)
    from twin.memristor import StaticGrid

    field, _ = rivals(dataclasses.replace(device, method=StaticGrid()), table, boxes)
    names = {rival.name: rival.problem.names for rival in field}
    assert "detuning_1_hz" in names[FULL] and "detuning_1_hz" not in names[CLOSED]


def test_photonic_devices_have_no_rivals_here():
    with pytest.raises(ValueError, match="PhotonicMemristor"):
        rivals(PhotonicMemristor(MovingAverage(5.0)), small(), BOXES)

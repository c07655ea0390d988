"""A new value never compiles again: traces are counted through a probe inside the device's own memory."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import tables

from calibration._minimize import Stage, minimize
from twin.dynamics import StaticGrid
from twin.memory import AbstractMemory, MovingAverage
from twin.memristor import ClosedForm, IonMemristor, planned, run, sine_input

TRACES = []


class Counting(AbstractMemory):
    """A memory that notes each time Python runs through it."""

    inner: MovingAverage

    def filter(self, x):
        TRACES.append(1)
        return self.inner.filter(x)

    def init(self, shape=()):
        return self.inner.init(shape)

    def read(self, state):
        return self.inner.read(state)

    def update(self, state, x):
        return self.inner.update(state, x)


BOX = {
    **tables.SCALES,
    **tables.LINES,
    "sigma_1_s": (15e-6, 25e-6),
    "sigma_2_s": (15e-6, 25e-6),
    "separation_s": (100e-6, 140e-6),
}
VALUES = {
    "rabi_scale_1": 1.2,
    "rabi_scale_2": 0.8,
    "detuning_1_hz": 3e3,
    "detuning_2_hz": -2e3,
    "laser_linewidth_hz": 500.0,
    "laser_linewidth_1_hz": 50.0,
    "laser_linewidth_2_hz": 70.0,
    "readout_error_bright": 0.01,
    "readout_error_dark": 0.02,
    "sigma_1_s": 18e-6,
    "sigma_2_s": 22e-6,
    "separation_s": 110e-6,
    "lead_s": 90e-6,
    "tail_s": 95e-6,
    "lifetime_s": 0.1,
    "branching": 0.5,
    "amplitude_1": 0.9,
    "amplitude_2": 1.1,
    "eta_1": 0.05,
    "eta_2": 0.06,
}


@pytest.fixture(scope="module", params=["closed form", "static grid"])
def device(request):
    plain = IonMemristor(memory=Counting(MovingAverage(3.0)))
    if request.param == "closed form":
        return dataclasses.replace(plain, method=ClosedForm())
    return planned(dataclasses.replace(plain, method=StaticGrid(error=1e-6)), BOX)


def test_new_values_of_every_parameter_reuse_the_program(device):
    x = sine_input(periods=1, cycles_per_period=8)
    before = np.asarray(run(device, x).y)
    TRACES.clear()
    changed = 0
    for name, value in VALUES.items():
        y = np.asarray(run(dataclasses.replace(device, **{name: value}), x).y)
        assert np.all(np.isfinite(y)), name
        changed += not np.array_equal(y, before)
    for window in (2.5, 4.0):
        y = np.asarray(run(dataclasses.replace(device, memory=Counting(MovingAverage(window))), x).y)
        changed += not np.array_equal(y, before)
    assert TRACES == []
    assert changed >= 6  # the values did arrive


def test_another_shape_does_compile(device):
    TRACES.clear()
    run(device, sine_input(periods=1, cycles_per_period=9))
    assert len(TRACES) == 1


def test_search_traces_its_loss_once():
    seen = []

    def loss(point, args, each):
        seen.append(1)
        return jnp.sum((point - args) ** 2) + 0 * each

    stage = Stage("adam", 20, 1e-6, 0.3)
    for target in (1.0, -2.0):
        starts = jnp.zeros((2, 3))
        minimize(loss, jnp.asarray(target), starts, stage, each=jnp.zeros(2))
        count = len(seen)
        minimize(loss, jnp.asarray(target + 1), starts + 1, stage, each=jnp.ones(2))
        assert len(seen) == count
    assert eqx.is_array(starts)

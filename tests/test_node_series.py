"""Nodes of a network read off polynomials: the same numbers as the device gives to a loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twin.loop import Settings
from twin.memory import MovingAverage
from twin.memristor import AreaSeries, ClosedForm, IonMemristor, PhotonicMemristor
from twin.node_series import node_series
from twin.slow_noise import SlowNoise

X = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (40, 3)))
R = jnp.asarray(np.random.default_rng(1).uniform(0, 1, (40, 3)))


def ions(**fields) -> IonMemristor:
    given = {
        "rabi_scale_1": jnp.array([0.95, 1.0, 1.06]), "rabi_scale_2": jnp.array([1.03, 1.0, 0.97]),
        "detuning_1_hz": jnp.array([0.0, 300.0, -500.0]), "laser_linewidth_hz": 80.0, "readout_error_bright": 0.01,
        "readout_error_dark": jnp.array([0.02, 0.0, 0.03]), "method": AreaSeries(),
    }  # fmt: skip
    return IonMemristor(memory=MovingAverage(4.0), **(given | fields)).prepared(X, Settings())


@pytest.mark.parametrize(
    "fields", [{"separation_s": 180e-6}, {}, {"scheme": "v"}], ids=["apart", "overlapping", "v, with a leak"]
)
def test_nodes_answer_as_the_device_does(fields):
    device = ions(**fields)
    series = node_series(device, Settings())
    assert series is not None
    assert (len(series.residual[0]) > 0) == ("separation_s" not in fields)
    respond = device.under(Settings())
    alone, both = respond(X, jnp.zeros_like(X), alone=True), respond(X, R, alone=False)
    for response, answer in ((alone, series.after_first(X)), (both, series.after_both(X, R))):
        assert np.all(answer.valid) and np.all(response.valid)
        np.testing.assert_allclose(answer.signal, device.signal(response.populations), rtol=0, atol=2e-14)
        np.testing.assert_allclose(answer.assigned, device.assigned(response.populations), rtol=0, atol=2e-14)


def test_gradients_are_those_of_the_device():
    device = ions()

    def by_series(scale):
        series = node_series(dataclasses.replace(device, rabi_scale_1=scale), Settings())
        return jnp.sum(series.after_both(X, R).signal)

    def by_device(scale):
        changed = dataclasses.replace(device, rabi_scale_1=scale)
        return jnp.sum(changed.under(Settings())(X, R, alone=False).populations[1])

    one, other = (jax.grad(f)(device.rabi_scale_1) for f in (by_series, by_device))
    np.testing.assert_allclose(one, other, rtol=1e-11)


def test_bad_commands_stay_in_their_node():
    answer = node_series(ions(), Settings()).after_both(X.at[:, 1].set(1.2), R)
    assert np.all(np.asarray(answer.valid) == [True, False, True])
    assert np.all(np.isnan(answer.signal[:, 1]))


def test_other_devices_answer_for_themselves():
    others = [
        PhotonicMemristor(memory=MovingAverage(4.0)),
        IonMemristor(memory=MovingAverage(4.0), method=ClosedForm()),
        dataclasses.replace(ions(), slow_noise=SlowNoise(amplitude_noise_1=0.01)),
    ]
    assert [node_series(device, Settings()) for device in others] == [None] * 3

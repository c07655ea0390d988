"""Known truth in, honest intervals out: 40 tables that the twin made up, and the Cramér-Rao bound of the demo."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from test_demo_data import DEMO

from calibration import uncertainty
from calibration._minimize import minimize
from calibration.data import read_table, synthesize
from calibration.fit import _POLISH, _loss, _scales, fit
from calibration.posing import pose
from twin.dynamics import StaticGrid
from twin.memristor import Lindblad, planned

BOXES = {
    **tables.SCALES,
    "detuning_1_hz": (-5e3, 5e3),
    "detuning_2_hz": (-5e3, 5e3),
    "laser_linewidth_hz": (0.0, 2e3),
    **tables.READOUT,
}
TRUTH = {
    "rabi_scale_1": 0.96,
    "rabi_scale_2": 1.05,
    "detuning_1_hz": 1200.0,
    "detuning_2_hz": -800.0,
    "laser_linewidth_hz": 600.0,
    "readout_error_bright": 0.01,
    "readout_error_dark": 0.02,
}


def assert_intervals_cover(device, settings, boxes, truth, *, starts: int, least: int, fewest: int):
    """Fits 40 synthetic tables; of each parameter's intervals that are called identified, 85 % to 100 % hold the truth.

    `least` parameters must be identified in `fewest` tables or more, so that something was tested.
    """
    real = dataclasses.replace(device, **truth)
    covered, judged = dict.fromkeys(boxes, 0), dict.fromkeys(boxes, 0)
    for k in range(40):
        table = synthesize(real, settings, jax.random.key(k))
        found = fit(device, table, boxes, starts=starts, seed=k)
        assert found.converged, (k, found.status)
        for name, estimate in found.parameters.items():
            if estimate.verdict == "identified":
                judged[name] += 1
                covered[name] += estimate.ci95[0] <= truth[name] <= estimate.ci95[1]
    print({name: f"{covered[name]}/{judged[name]}" for name in boxes})
    assert sum(count >= fewest for count in judged.values()) >= least, judged
    for name, count in judged.items():
        if count >= fewest:
            assert 0.85 <= covered[name] / count <= 1.0, (name, covered[name], count)


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """Closed form: Rabi scales and readout errors."""
    boxes = tables.SCALES | tables.READOUT
    settings = tables.settings((10.0,), cycles=81, period=40, shots=1000)
    truth = {name: TRUTH[name] for name in boxes}
    assert_intervals_cover(tables.ion(), settings, boxes, truth, starts=2, least=4, fewest=36)


@pytest.mark.slow
def test_intervals_of_the_full_dynamics_cover_the_truth():
    """Lindblad: all seven parameters of the demo, under its settings."""
    device = tables.ion(method=Lindblad())
    assert_intervals_cover(device, read_table(DEMO), BOXES, TRUTH, starts=3, least=5, fewest=20)


@pytest.mark.slow
def test_scatter_of_200_refits_is_the_cramer_rao_bound():
    """The demo's settings and transfers; every refit begins at the truth, in coordinates whitened there."""
    posed = pose(tables.ion(method=Lindblad(1e-7)), read_table(DEMO), BOXES)
    free, reference = posed.problem.free, posed.reference.parts[0]
    truth = jnp.array([TRUTH[name] for name in free.names])
    origin = free.unbounded(truth)[None]
    scales = _scales(posed.problem, origin)
    values = []
    for k in range(200):
        simulated = posed.problem.simulated(jax.random.key(k), truth)
        found = minimize(_loss, simulated, jnp.zeros_like(origin), _POLISH, each=(origin, scales))
        assert bool(found.converged[0]), k
        values.append(np.asarray(free.bounded(origin[0] + scales[0] @ found.points[0])))
    scatter = np.std(values, axis=0, ddof=1)
    fisher = uncertainty.fisher_information(reference.device, reference.data.experiment, free, truth)
    bound = np.sqrt(np.diag(np.linalg.inv(fisher)))
    print({name: f"{scatter[k] / bound[k]:.3f}" for k, name in enumerate(free.names)})
    low, high = np.asarray(free.low), np.asarray(free.high)
    inside = (truth - 3 * bound > low) & (truth + 3 * bound < high)
    # The bound is one of estimates that no prior box cuts off.
    assert np.sum(inside) >= 5
    for k, name in enumerate(free.names):
        if inside[k]:
            assert 0.8 <= scatter[k] / bound[k] <= 1.2, name
            assert abs(np.mean(np.asarray(values)[:, k]) - truth[k]) < 4 * bound[k] / np.sqrt(200), name


def test_planned_devices_serve_their_box():
    device = planned(tables.ion(method=StaticGrid()), BOXES, detuning_set_hz=3e3)
    worst = dataclasses.replace(
        device, rabi_scale_1=1.3, rabi_scale_2=1.3, detuning_1_hz=5e3, detuning_2_hz=-5e3, laser_linewidth_hz=2e3
    )
    one, offset = jnp.ones(1), jnp.full(1, 3e3)
    assert bool(worst.respond(one, one, offset, -offset, alone=False).valid[0])
    beyond = dataclasses.replace(worst, detuning_1_hz=60e3)
    assert not bool(beyond.respond(one, one, offset, -offset, alone=False).valid[0])

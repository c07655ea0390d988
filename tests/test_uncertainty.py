"""Fisher information against finite differences and simulated scores; verdicts at their thresholds."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

from calibration import uncertainty
from calibration.likelihood import Experiment, cells, log_likelihood, predict, prepared, replace_observations
from calibration.parameters import FreeParameters
from calibration.uncertainty import Estimate
from twin.dynamics import StaticGrid
from twin.memory import AbstractMemory, MovingAverage
from twin.memristor import AreaSeries, PhotonicMemristor
from twin.planning import forward_mode

FREE = FreeParameters.from_boxes(tables.SCALES | tables.READOUT)
TRUTH = jnp.array([tables.TRUTH[name] for name in FREE.names])


def experiment(**columns) -> Experiment:
    rng = np.random.default_rng(2)
    table = tables.settings((5.0,), cycles=21)
    n_x = np.where(np.arange(21) % 4 == 1, np.nan, np.floor(rng.uniform(0, 401, 21)))
    n_y = np.where(np.arange(21) % 7 == 2, np.nan, np.floor(rng.uniform(0, 401, 21)))
    return Experiment.from_table(tables.changed(table, **({"n_x": n_x, "n_y": n_y} | columns)))


def by_differences(device, data: Experiment, free: FreeParameters, values, step: float) -> np.ndarray:
    """sum_i dp_i dp_i^T / v_i with five-point differences of the cells' probabilities."""
    own_window = "window_cycles" in free.names

    @eqx.filter_jit
    def at(v):
        return cells(data, predict(free.apply(device, v), data, own_window=own_window))

    slopes = []
    for k in range(values.size):
        h = step * float(free.width[k])
        f = [np.asarray(at(values.at[k].add(m * h))[0]) for m in (-2, -1, 1, 2)]
        slopes.append((f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h))
    slopes = np.stack(slopes)
    return (slopes / np.asarray(at(values)[1])) @ slopes.T


def assert_close(information, expected, rtol: float):
    """Relative to the diagonal: entries have many units."""
    scale = np.sqrt(np.diag(expected))
    np.testing.assert_allclose(information / np.outer(scale, scale), expected / np.outer(scale, scale), atol=rtol)


# ------------------------------------------------------------------------------------------------ information


def test_information_is_the_sum_of_squared_slopes_over_variances():
    """With the memory in the way: unmeasured inputs feed the model's own back, and the window is free."""
    free = FreeParameters.from_boxes(tables.SCALES | tables.READOUT | {"window_cycles": (2.0, 9.0)})
    values = jnp.append(TRUTH, 6.4)
    device, data = tables.ion(), experiment()
    information = np.asarray(uncertainty.fisher_information(device, data, free, values))
    expected = by_differences(device, data, free, values, 1e-3)
    assert np.all(np.diag(expected) > 0)
    assert_close(information, expected, 1e-7)
    np.testing.assert_allclose(information, information.T, rtol=1e-12)


def test_information_through_the_dynamics():
    free = FreeParameters.from_boxes(
        {"rabi_scale_2": (0.7, 1.3), "detuning_1_hz": (-5e3, 5e3), "laser_linewidth_hz": (0.0, 2e3)}
    )
    values = jnp.array([1.04, 1100.0, 300.0])
    data = Experiment.from_table(tables.pieces(tables.settings((5.0,), cycles=21), slice(3, 8)))
    device = tables.ion(**tables.TRUTH, method=StaticGrid(), laser_linewidth_hz=400.0, detuning_1_hz=2e3)
    device = prepared(device, data)
    information = np.asarray(uncertainty.fisher_information(device, data, free, values))
    assert_close(information, by_differences(device, data, free, values, 1e-3), 1e-5)


def test_information_is_the_expected_curvature():
    """log L is linear in the counts, so its Hessian at the expected counts is the expected Hessian, exactly."""
    device, data = tables.ion(source="command"), experiment()
    prediction = predict(FREE.apply(device, TRUTH), data)
    expected_counts = replace_observations(data, 400 * prediction.p_x, 400 * prediction.p_y)
    at = lambda v: log_likelihood(FREE.apply(device, v), expected_counts)
    curvature = np.asarray(eqx.filter_jit(jax.hessian(at))(TRUTH))
    information = np.asarray(uncertainty.fisher_information(device, data, FREE, TRUTH))
    assert_close(information, -curvature, 1e-10)


def test_information_is_the_covariance_of_the_score():
    """4,000 simulated tables: the gradient of log L at the truth has mean zero and the information as covariance."""
    device, data = tables.ion(source="command"), experiment()
    prediction = predict(FREE.apply(device, TRUTH), data)
    draws = 4000
    key_x, key_y = jax.random.split(jax.random.key(8))
    n_x = jax.random.binomial(key_x, 400.0, prediction.p_x, (draws, 21))
    n_y = jax.random.binomial(key_y, 400.0, prediction.p_y, (draws, 21))

    @eqx.filter_jit
    def scores(n_x, n_y):
        at = lambda v, x, y: log_likelihood(FREE.apply(device, v), replace_observations(data, x, y))
        return jax.vmap(jax.grad(at), in_axes=(None, 0, 0))(TRUTH, n_x, n_y)

    information = np.asarray(uncertainty.fisher_information(device, data, FREE, TRUTH))
    whitened = np.linalg.solve(np.linalg.cholesky(information), np.asarray(scores(n_x, n_y)).T)
    assert np.max(np.abs(np.mean(whitened, axis=1))) < 4.5 / np.sqrt(draws)
    assert np.max(np.abs(np.cov(whitened) - np.eye(4))) < 4.5 * np.sqrt(2 / draws)


def test_values_with_errors_carry_the_information_of_their_errors():
    rng = np.random.default_rng(3)
    x_err = rng.uniform(0.01, 0.05, 21)
    x_err[4] = np.nan
    columns = {"shots": None, "n_x": None, "n_y": None, "x": np.where(np.isnan(x_err), np.nan, 0.5), "x_err": x_err}
    data = experiment(**columns)
    device = tables.ion()
    information = np.asarray(uncertainty.fisher_information(device, data, FREE, TRUTH))
    jacobian = jax.jacfwd(lambda v: predict(FREE.apply(device, v), data).p_x)(TRUTH)
    kept = ~np.isnan(x_err)
    expected = (jacobian[kept].T / x_err[kept] ** 2) @ jacobian[kept]
    assert_close(information + np.eye(4), expected + np.eye(4), 1e-12)
    np.testing.assert_allclose(information[1], 0.0, atol=1e-20)  # pulse 2 has no bearing on x


def test_certain_outcomes_carry_no_weight():
    """A perfect device: x_set = 0 gives p = 0 with no variance and no slope in the Rabi scales."""
    free = FreeParameters.from_boxes(tables.SCALES)
    information = np.asarray(uncertainty.fisher_information(tables.ion(), experiment(), free, jnp.ones(2)))
    assert np.all(np.isfinite(information))
    assert np.all(np.diag(information) > 0)


def test_a_new_value_or_table_does_not_retrace():
    traces = []

    class Counting(AbstractMemory):
        """Notes when it is traced."""

        def filter(self, x):
            traces.append(None)
            return jnp.full_like(x, 0.5)

        def init(self, shape=()):
            return jnp.zeros(shape)

        def read(self, state):
            return state

        def update(self, state, x):
            return state

    device = tables.ion(memory=Counting())
    data = experiment(window_cycles=None)
    first = uncertainty.fisher_information(device, data, FREE, TRUTH)
    seen = len(traces)
    stronger = dataclasses.replace(device, amplitude_1=0.9)
    fewer = dataclasses.replace(data, y=dataclasses.replace(data.y, scale=data.y.scale / 4))
    for twin, table, values in ((device, data, 1.01 * TRUTH), (stronger, data, TRUTH), (device, fewer, TRUTH)):
        assert not np.allclose(uncertainty.fisher_information(twin, table, FREE, values), first)
    assert len(traces) == seen > 0


def test_forward_mode_is_asked_of_grids_alone():
    direct, series = (forward_mode(tables.ion(method=method)).method for method in (StaticGrid(), AreaSeries()))
    assert direct.differentiation == series.grid.differentiation == "forward"
    for other in (tables.ion(), PhotonicMemristor(memory=MovingAverage(3.0))):
        assert forward_mode(other) is other


# ------------------------------------------------------------------------------------------------ covariance


def random_information(n: int) -> np.ndarray:
    a = np.random.default_rng(n).normal(size=(n, 2 * n))
    return a @ a.T


def test_covariance_is_the_inverse_whatever_the_units():
    width = np.array([0.6, 1e4, 2e-5, 0.05])
    information = random_information(4) / np.outer(width, width)
    cov = uncertainty.covariance(information, width)
    np.testing.assert_allclose(cov / np.outer(width, width), np.linalg.inv(random_information(4)), rtol=1e-9)


def test_a_direction_without_information_is_a_million_boxes_wide():
    width = np.array([2.0, 0.5, 100.0])
    direction = np.array([1.0, 1.0, 0.0]) / np.sqrt(2)
    scaled = 100.0 * (np.eye(3) - np.outer(direction, direction))
    cov = uncertainty.covariance(scaled / np.outer(width, width), width)
    np.testing.assert_allclose(np.sqrt(np.diag(cov)), [2e6 / np.sqrt(2), 0.5e6 / np.sqrt(2), 10.0], rtol=1e-6)
    np.testing.assert_allclose(uncertainty.correlation(cov)[0, 1], 1.0, atol=1e-6)
    nothing = uncertainty.covariance(np.zeros((2, 2)), np.ones(2))
    np.testing.assert_allclose(nothing, 1e12 * np.eye(2))


def test_correlation_has_a_unit_diagonal():
    cov = np.linalg.inv(random_information(5))
    matrix = uncertainty.correlation(cov)
    np.testing.assert_allclose(np.diag(matrix), 1.0)
    np.testing.assert_allclose(matrix[1, 3], cov[1, 3] / np.sqrt(cov[1, 1] * cov[3, 3]))


# ------------------------------------------------------------------------------------------------ verdicts

BOX = {"detuning_1_hz": (-50.0, 150.0)}


def estimate(value: float, share: float) -> Estimate:
    """One parameter whose 95 % interval has this share of a box 200 Hz wide."""
    free = FreeParameters.from_boxes(BOX)
    std = share * 200.0 / (2 * 1.959963984540054)
    return uncertainty.estimates(free, np.array([value]), np.array([[std**2]]))["detuning_1_hz"]


@pytest.mark.parametrize(
    ("value", "share", "verdict"),
    [
        (50.0, 0.0001, "identified"),
        (50.0, 0.2499, "identified"),
        (50.0, 0.2501, "weak"),
        (50.0, 0.7499, "weak"),
        (50.0, 0.7501, "not identified"),
        (50.0, 1e6, "not identified"),
        # a short interval that reaches over the edge
        (-49.0, 0.02, "weak"),
        (149.0, 0.02, "weak"),
        (-47.0, 0.02, "identified"),
        (147.0, 0.02, "identified"),
        # within a thousandth of the box of its edge
        (-49.81, 1e-6, "at bound"),
        (149.81, 1e-6, "at bound"),
        (-49.79, 1e-6, "identified"),
        (149.79, 1e-6, "identified"),
        (149.81, 1.0, "at bound"),
    ],
)
def test_verdicts_at_their_thresholds(value, share, verdict):
    assert estimate(value, share).verdict == verdict


def test_the_interval_is_of_95_percent_and_ends_at_the_box():
    middle = estimate(50.0, 0.1)
    np.testing.assert_allclose(middle.ci95, (40.0, 60.0))
    np.testing.assert_allclose(middle.std, 20 / 2 / 1.959963984540054)
    assert middle.value == 50.0
    assert middle.unit == "Hz"
    np.testing.assert_allclose(estimate(-45.0, 0.1).ci95, (-50.0, -35.0))
    np.testing.assert_allclose(estimate(145.0, 0.1).ci95, (135.0, 150.0))
    np.testing.assert_allclose(estimate(0.0, 100.0).ci95, (-50.0, 150.0))

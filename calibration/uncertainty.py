"""How well a table determines its parameters: Fisher information, intervals and verdicts.

The expected Fisher information of independent cells with probability p_i and variance v_i is
F = sum_i (dp_i/dtheta)(dp_i/dtheta)^T / v_i; its inverse bounds the covariance of any unbiased estimate (Cramér-Rao).
"""

from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from calibration.likelihood import Experiment, Prediction, cells, log_likelihood_of, pearson_chi2, predict
from calibration.parameters import FreeParameters, unit_of
from twin.loop import AbstractMemristor
from twin.planning import forward_mode

Z95 = 1.959963984540054
"""Standard deviations from the middle of a 95 % interval to its end."""
# Closer to an edge than this share of the box, and the search was stopped by the box.
_AT_EDGE = 1e-3


@dataclass(frozen=True)
class Estimate:
    """One parameter: value, standard error, 95 % interval within its box, unit, verdict."""

    value: float
    std: float
    ci95: tuple[float, float]
    unit: str
    verdict: str


class Evaluation(NamedTuple):
    """A device at some values: what it predicts, how well that fits, and the expected Fisher information."""

    prediction: Prediction
    log_likelihood: Float[Array, ""]
    pearson_chi2: Float[Array, ""]
    information: Float[Array, "parameters parameters"]


@eqx.filter_jit
def evaluate(
    device: AbstractMemristor, experiment: Experiment, free: FreeParameters, values: Float[Array, " parameters"]
) -> Evaluation:
    """Everything that is asked of a device at one point, by forward-mode derivatives; one program to compile.

    Cells whose probability is exactly 0 or 1 carry no weight: their variance vanishes together with their slope.
    """
    device = forward_mode(device)
    own_window = "window_cycles" in free.names
    predicted = lambda v: predict(free.apply(device, v), experiment, own_window=own_window)
    # One direction after another: the loop over solver stages is slow under vmap.
    probabilities = lambda v: cells(experiment, predicted(v))[0]
    slopes = jax.lax.map(lambda v: jax.jvp(probabilities, (values,), (v,))[1], jnp.eye(values.size))
    prediction = predicted(values)
    variance = cells(experiment, prediction)[1]
    weights = jnp.where(variance > 0, 1 / variance, 0.0)
    value, chi2 = log_likelihood_of(experiment, prediction), pearson_chi2(experiment, prediction)
    return Evaluation(prediction, value, chi2, (weights * slopes) @ slopes.T)


def fisher_information(
    device: AbstractMemristor, experiment: Experiment, free: FreeParameters, values: Float[Array, " parameters"]
) -> Float[Array, "parameters parameters"]:
    """Expected Fisher information of the free parameters at `values`."""
    return evaluate(device, experiment, free, values).information


def covariance(fisher: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Inverse of the information, computed in units of the boxes.

    Directions without information get a standard deviation of a million boxes rather than infinity. A parameter that
    its box stopped is not taken as known: that would make the intervals of all that correlate with it too short.
    """
    values, vectors = np.linalg.eigh(fisher * np.outer(width, width))
    return (vectors / np.maximum(values, 1e-12)) @ vectors.T * np.outer(width, width)


def at_edge(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Which values the box itself stopped."""
    share = (values - low) / (high - low)
    return (share < _AT_EDGE) | (share > 1 - _AT_EDGE)


def estimates(free: FreeParameters, values: np.ndarray, cov: np.ndarray) -> dict[str, Estimate]:
    """Value, standard error, interval and verdict of each free parameter.

    Verdicts: "at bound": stopped by the box. "identified": the 95 % interval is shorter than a quarter of the box and
    inside it. "weak": shorter than three quarters. "not identified": otherwise.
    """
    low, high = np.asarray(free.low), np.asarray(free.high)
    edge = at_edge(values, low, high)
    result = {}
    for k, name in enumerate(free.names):
        std = float(np.sqrt(cov[k, k]))
        a, b = values[k] - Z95 * std, values[k] + Z95 * std
        share = (b - a) / (high[k] - low[k])
        if edge[k]:
            verdict = "at bound"
        elif share < 0.25 and a > low[k] and b < high[k]:
            verdict = "identified"
        else:
            verdict = "weak" if share < 0.75 else "not identified"
        interval = (float(max(a, low[k])), float(min(b, high[k])))
        result[name] = Estimate(float(values[k]), std, interval, unit_of(name), verdict)
    return result


def correlation(cov: np.ndarray) -> np.ndarray:
    """Correlation matrix of a covariance."""
    std = np.sqrt(np.diag(cov))
    return cov / np.outer(std, std)

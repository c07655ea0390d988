"""Tasks for reservoirs: seeded series with targets, each described so that others can make the same.

Every generator takes a seed and gives inputs and targets of the same length, target k belonging to the inputs up to k.
No series is scaled to its own largest value in the test part: `scaled` takes fixed limits, alike for every model.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.integrate import solve_ivp


class Series(NamedTuple):
    """One run of a task.

    Attributes:
        inputs: shape (steps,). targets: shape (steps,).
        low, high: limits that the inputs never leave, for scaling them to [0, 1].
    """

    inputs: Float[np.ndarray, " steps"]
    targets: Float[np.ndarray, " steps"]
    low: float
    high: float

    @property
    def scaled(self) -> Float[np.ndarray, " steps"]:
        """Inputs in [0, 1]."""
        return (self.inputs - self.low) / (self.high - self.low)


def second_order_narma(seed: int, steps: int) -> Series:
    """The map that the MerLin project calls NARMA10, which is of second order.

        y_{k+1} = 0.4 y_k + 0.4 y_k y_{k-1} + 0.6 x_k^3 + 0.1,    x uniform in [0, 0.5],    y_0 = y_{-1} = 0

    Target of step k is y_{k+1}.

    References: MerLin `papers/qrc_memristor`, `utils/datasets.py`, after Selimovic et al., arXiv:2504.18694.
    """
    x = np.random.default_rng(seed).uniform(0.0, 0.5, steps)
    y = np.zeros(steps + 2)  # y[k + 1] is y_k
    for k in range(steps):
        y[k + 2] = 0.4 * y[k + 1] + 0.4 * y[k + 1] * y[k] + 0.6 * x[k] ** 3 + 0.1
    return Series(x, y[2:], 0.0, 0.5)


def narma_10(seed: int, steps: int) -> Series:
    """The tenth-order map of Atiya and Parlos.

        y_{k+1} = 0.3 y_k + 0.05 y_k (y_k + ... + y_{k-9}) + 1.5 x_{k-9} x_k + 0.1,    x uniform in [0, 0.5]

    It diverges for a few inputs in a million steps; such a record is drawn again. Target of step k is y_{k+1}.

    References: Atiya and Parlos, IEEE Trans. Neural Netw. 11, 697 (2000).
    """
    rng = np.random.default_rng(seed)
    while True:
        x = rng.uniform(0.0, 0.5, steps)
        early = np.concatenate([np.zeros(9), x])  # early[k] is x_{k-9}
        y = np.zeros(steps + 10)  # y[k + 9] is y_k
        for k in range(steps):
            now = y[k + 9]
            y[k + 10] = 0.3 * now + 0.05 * now * y[k : k + 10].sum() + 1.5 * early[k] * x[k] + 0.1
            if now > 2.0:
                break
        else:
            return Series(x, y[10:], 0.0, 0.5)


def mackey_glass(seed: int, steps: int, *, horizon: int = 6, step: float = 0.1, delay: float = 17.0) -> Series:
    """The Mackey-Glass equation, to be predicted `horizon` samples ahead.

        dx/dt = 0.2 x(t - delay) / (1 + x(t - delay)^10) - 0.1 x(t),    one sample a unit of time

    Runge-Kutta of fourth order with `step`; the delayed value between steps is the cubic through values and slopes. The
    history is a constant between 0.5 and 1.3, which the seed draws, and the first 200 samples are left out.

    References: Mackey and Glass, Science 197, 287 (1977); parameters as usual in the field.
    """
    rng = np.random.default_rng(seed)
    series = mackey_glass_from(rng.uniform(0.5, 1.3), 200 + steps + horizon, step=step, delay=delay)[200:]
    return Series(series[:steps], series[horizon : horizon + steps], 0.0, 1.6)


def mackey_glass_from(history: float, samples: int, *, step: float, delay: float) -> Float[np.ndarray, " samples"]:
    """Solution at t = 0, 1, 2, ... from a constant history.

    Raises:
        ValueError: a step that does not divide one sample and the delay.
    """
    a_sample, lag = round(1 / step), round(delay / step)
    if not (math.isclose(a_sample * step, 1.0) and math.isclose(lag * step, delay)):
        raise ValueError(f"`step` must divide 1 and the delay of {delay:g}, but is {step:g}.")
    count = (samples - 1) * a_sample
    x = np.full(lag + count + 1, history)
    slope = np.zeros_like(x)  # of the history: none, also at its end, where the solution's own begins
    change = lambda now, then: 0.2 * then / (1 + then**10) - 0.1 * now
    for k in range(count):
        now, then, after = x[lag + k], x[k], x[k + 1]
        middle = (then + after) / 2 + step / 8 * (slope[k] - slope[k + 1] * (k + 1 != lag))
        k1 = change(now, then)
        slope[lag + k] = k1
        k2 = change(now + step / 2 * k1, middle)
        k3 = change(now + step / 2 * k2, middle)
        k4 = change(now + step * k3, after)
        x[lag + k + 1] = now + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x[lag::a_sample]


# Intensity of the highest of 256 levels of the laser series; the largest among 20 records of 2,000 samples was 34.
_LASER_FULL_SCALE = 48.0


def laser(seed: int, steps: int, *, horizon: int = 1) -> Series:
    """Intensity of a chaotic laser, to be predicted: of the kind of the Santa Fe competition's series A, and not it.

    That series is a measurement of a far-infrared ammonia laser, and cannot be shipped with this project. Here the
    Lorenz-Haken equations of a single-mode laser are integrated instead,

        dE/dt = -2 (E - P),    dP/dt = -P + E (15 - D),    dD/dt = -0.25 D + E P,

    with parameters near those used for that laser, and E^2 is sampled every 0.45 units of time, about 8 samples a
    pulse, and rounded to 256 levels as a digitizer does. Numbers obtained with it compare with each other only.

    References: Haken, Phys. Lett. A 53, 77 (1975); Weiss et al., Appl. Phys. B 61, 223 (1995), for the laser.
    """
    start = np.random.default_rng(seed).uniform([0.5, 0.5, 8.0], [2.0, 2.0, 14.0])
    times = 0.45 * np.arange(500 + steps + horizon)
    rate = lambda _, s: [-2 * (s[0] - s[1]), -s[1] + s[0] * (15 - s[2]), -0.25 * s[2] + s[0] * s[1]]
    solution = solve_ivp(rate, (0.0, times[-1]), start, method="DOP853", t_eval=times, rtol=1e-9, atol=1e-9)
    intensity = solution.y[0][500:] ** 2
    levels = np.round(intensity * (255 / _LASER_FULL_SCALE))
    return Series(levels[:steps], levels[horizon : horizon + steps], 0.0, 255.0)


def fourth_power(seed: int, steps: int) -> Series:
    """x^4 of the present input, uniform in [0, 1]: a task without memory, where remembering can only disturb."""
    x = np.random.default_rng(seed).uniform(0.0, 1.0, steps)
    return Series(x, x**4, 0.0, 1.0)


def sine_or_square(seed: int, steps: int, *, points: int = 8) -> Series:
    """Whole periods of a sine or a square wave in random order; the target is 1 during a square wave.

    Both waves lie between -1 and 1 and have `points` samples a period; a sample at the top is the same in both, so that
    single inputs do not tell.

    References: Paquot et al., Sci. Rep. 2, 287 (2012), for the task.
    """
    square = np.random.default_rng(seed).integers(0, 2, -(-steps // points))
    phase = 2 * math.pi * np.arange(points) / points
    sine = np.sin(phase)
    waves = np.stack([sine, np.where(np.arange(points) < points / 2, 1.0, -1.0)])
    return Series(waves[square].ravel()[:steps], np.repeat(square, points)[:steps].astype(float), -1.0, 1.0)


def uniform_inputs(seed: int, steps: int) -> Float[np.ndarray, " steps"]:
    """Independent inputs in [-1, 1], for capacities."""
    return np.random.default_rng(seed).uniform(-1.0, 1.0, steps)


def digits(seed: int) -> tuple[Float[np.ndarray, "images rows columns"], Int[np.ndarray, " images"]]:
    """The 1,797 handwritten digits of scikit-learn (8 x 8 pixels in [0, 1]) in an order that the seed draws.

    Raises:
        ImportError: scikit-learn is missing.

    References: Alpaydin and Kaynak, UCI repository, "Optical Recognition of Handwritten Digits" (1998).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "ion-memristor-twin[reservoirs]".') from error
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    return data.images[order] / 16.0, data.target[order]


SERIES: dict[str, Callable[[int, int], Series]] = {
    "second-order NARMA": second_order_narma,
    "NARMA-10": narma_10,
    "Mackey-Glass": mackey_glass,
    "laser": laser,
    "x^4": fourth_power,
    "sine or square": sine_or_square,
}
"""Tasks with one input and one target a step."""

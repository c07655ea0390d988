"""How many shots a closed loop takes, with the twin's slopes and without: ``docs/closed_loop.md``.

The real device is hidden from both searches: other Rabi frequencies and detunings than its twin, another linewidth, and
thermal motion, which the twin does not have. Both start where the twin would put the pulses. Seeds are fixed.
"""

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import least_squares

from calibration.closed_loop import AbstractSearch, CmaEs
from calibration.control import apply_commands
from calibration.twin_guided import TwinGuided, laid_for, pulse_model
from twin.loop import Settings
from twin.memory import MovingAverage
from twin.memristor import IonMemristor

BOXES = {
    "amplitude_1": (0.7, 1.3), "amplitude_2": (0.7, 1.3),
    "detuning_1_set_hz": (-4e3, 4e3), "detuning_2_set_hz": (-4e3, 4e3),
}  # fmt: skip
TWIN = {"rabi_scale_1": 1.03, "rabi_scale_2": 0.96, "detuning_1_hz": 600.0, "detuning_2_hz": -400.0,
        "laser_linewidth_hz": 50.0}  # fmt: skip
HIDDEN = {"rabi_scale_1": 1.12, "rabi_scale_2": 0.88, "detuning_1_hz": 1700.0, "detuning_2_hz": -1500.0,
          "laser_linewidth_hz": 120.0, "n_bar": 4.0, "eta_1": 0.07, "eta_2": 0.06, "phonon_nodes": 6,
          "readout_error_bright": 0.01, "readout_error_dark": 0.02}  # fmt: skip
# Gauss-Legendre nodes a side over the square of commands, measured at each point.
NODES = 4
GOALS = (0.02, 0.01)
"""A search has arrived when the true rms of what it calls best is at most this."""


def square(nodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x_set, r_set and weight of the nodes."""
    at, weights = np.polynomial.legendre.leggauss(nodes)
    x, r = (a.ravel() for a in np.meshgrid((at + 1) / 2, (at + 1) / 2, indexing="ij"))
    return x, r, np.outer(weights, weights).ravel() / 4


def weighted(device: IonMemristor, boxes, nodes: int) -> Callable:
    """Residuals whose sum of squares is the mean over the square."""
    x, r, weight = square(nodes)
    plain = pulse_model(device, boxes, x, r)
    return lambda values: jnp.sqrt(jnp.asarray(weight)) * plain(values)


class Laboratory:
    """A device that answers with counts, corrected for the known errors of its readout."""

    def __init__(self):
        self.device = laid_for(IonMemristor(memory=MovingAverage(10.0), **HIDDEN), BOXES)
        self.x, self.r, self.weight = square(NODES)
        self._assigned = jax.jit(self._played)
        self._truth = jax.jit(weighted(self.device, BOXES, 6))

    def _played(self, values):
        device, offsets = apply_commands(self.device, dict(zip(BOXES, values, strict=True)))
        respond = device.under(Settings(*offsets))
        return device.assigned(respond(jnp.asarray(self.x), jnp.asarray(self.r), alone=False).populations)

    def measure(self, points: np.ndarray, shots: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Residuals and standard errors, shape (points, commands)."""
        p = np.clip([np.asarray(self._assigned(values)) for values in points], 0.0, 1.0)
        counts = rng.binomial(shots, p)
        bright, dark = HIDDEN["readout_error_bright"], HIDDEN["readout_error_dark"]
        y = (counts / shots - bright) / (1 - bright - dark)
        # Without shots of one kind there still is an error.
        share = (counts + 1) / (shots + 2)
        errors = np.sqrt(share * (1 - share) / shots) / (1 - bright - dark)
        return np.sqrt(self.weight) * (y - (1 - self.r) * self.x), np.sqrt(self.weight) * errors

    def rms(self, values: np.ndarray) -> float:
        """True rms of y - (1 - r) x over the square."""
        return float(np.sqrt(np.sum(np.asarray(self._truth(values)) ** 2)))


def optimum(model: Callable) -> np.ndarray:
    """Least squares of a model without noise, within the boxes."""
    low, high = (np.array([box[k] for box in BOXES.values()]) for k in (0, 1))
    shares = jax.jit(lambda u: model(low + (high - low) * u))
    slopes = jax.jit(jax.jacfwd(lambda u: model(low + (high - low) * u)))
    start = np.full(len(BOXES), 0.5)
    found = least_squares(lambda u: np.asarray(shares(u)), start, jac=lambda u: np.asarray(slopes(u)), bounds=(0, 1))
    return low + (high - low) * found.x


def shots_to_arrive(search: AbstractSearch, lab: Laboratory, shots: int, seed: int, most: float) -> list[float]:
    """Shots until the best values are as good as each of `GOALS`; infinite if that takes more than `most`."""
    rng, spent, arrived = np.random.default_rng(seed), 0, [np.inf] * len(GOALS)
    while spent < most and not all(np.isfinite(arrived)):
        points = search.ask()
        search.tell(points, *lab.measure(points, shots, rng))
        spent += len(points) * len(lab.x) * shots
        error = lab.rms(search.best)
        arrived = [spent if error <= goal and not np.isfinite(a) else a for a, goal in zip(arrived, GOALS, strict=True)]
    return arrived


def row(name: str, arrived: np.ndarray, most: float) -> str:
    """Median, and the interval that holds eight of ten runs."""
    cells = []
    for column in arrived.T:
        low, median, high = np.quantile(column, [0.1, 0.5, 0.9], method="nearest")
        said = [f"{value / 1e3:.1f}" if np.isfinite(value) else f"> {most / 1e3:.0f}" for value in (median, low, high)]
        cells.append(f"{said[0]} ({said[1]} to {said[2]})")
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    quick = "--quick" in sys.argv
    seeds, most = 3 if quick else 10, 2e5
    lab = Laboratory()
    twin = weighted(IonMemristor(memory=MovingAverage(10.0), **TWIN), BOXES, NODES)
    start = dict(zip(BOXES, optimum(twin).tolist(), strict=True))
    least = lab.rms(optimum(weighted(lab.device, BOXES, 6)))
    begun = lab.rms(np.array(list(start.values())))
    print(f"rms at the twin's own optimum {begun:.4f}, at the device's {least:.4f}\n")
    print("| search, shots a setting | " + " | ".join(f"thousand shots to {goal:.4f}" for goal in GOALS) + " |")
    print("|---" * (1 + len(GOALS)) + "|")
    guided = functools.partial(TwinGuided, BOXES, twin, start=start, patience=10**6)
    blind = functools.partial(CmaEs, BOXES, start=start, sigma=0.1)
    for name, make, shots in (
        ("TwinGuided, 100", lambda seed: guided(), 100),
        ("CmaEs, 25", lambda seed: blind(seed=seed), 25),
        ("CmaEs, 100", lambda seed: blind(seed=seed), 100),
    ):
        arrived = [shots_to_arrive(make(seed + 1), lab, shots, seed, most) for seed in range(seeds)]
        print(row(name, np.array(arrived), most), flush=True)


if __name__ == "__main__":
    main()

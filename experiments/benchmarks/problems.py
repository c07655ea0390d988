"""The random devices of the benchmarks, as arrays that every engine can build its own model from."""

from typing import NamedTuple

import numpy as np

from twin.levels import LAMBDA, LevelSystem
from twin.pulses import Gaussian

LIFETIME_S, BRANCHING = 52.7e-3, 0.4
WINDOW_S = (-100e-6, 300e-6)
SAVES = 200


class Devices(NamedTuple):
    """Three-level Lindblad ions under two Gaussian pulses; one entry a device, SI units."""

    detuning_1_hz: np.ndarray
    detuning_2_hz: np.ndarray
    linewidth_hz: np.ndarray
    area_1_rad: np.ndarray
    area_2_rad: np.ndarray
    sigma_1_s: np.ndarray
    sigma_2_s: np.ndarray
    separation_s: np.ndarray

    def first(self, n: int) -> "Devices":
        """The first n of them."""
        return Devices(*(a[:n] for a in self))


def devices(n: int, seed: int = 20260701) -> Devices:
    """Areas 0.3 to 3 pi, widths 15 to 25 us, 80 to 180 us apart, detunings within 5 kHz, linewidths up to 2 kHz."""
    rng = np.random.default_rng(seed)
    uniform = lambda low, high: rng.uniform(low, high, n)
    return Devices(
        uniform(-5e3, 5e3),
        uniform(-5e3, 5e3),
        uniform(0, 2e3),
        uniform(0.3, 3 * np.pi),
        uniform(0.3, 3 * np.pi),
        uniform(15e-6, 25e-6),
        uniform(15e-6, 25e-6),
        uniform(80e-6, 180e-6),
    )


def save_times() -> np.ndarray:
    """Equally spaced over the window, both ends included, s."""
    return np.linspace(*WINDOW_S, SAVES)


def as_twin(d: Devices) -> tuple[LevelSystem, tuple[Gaussian, Gaussian]]:
    """The level graph and pulses of `twin.dynamics.evolve`."""
    system = LAMBDA.system(
        detuning_1_hz=d.detuning_1_hz,
        detuning_2_hz=d.detuning_2_hz,
        lifetime_s=LIFETIME_S,
        branching=BRANCHING,
        shared_linewidth_hz=d.linewidth_hz,
    )
    pulses = (
        Gaussian.from_area(d.area_1_rad, center_s=0.0, sigma_s=d.sigma_1_s),
        Gaussian.from_area(d.area_2_rad, center_s=d.separation_s, sigma_s=d.sigma_2_s),
    )
    return system, pulses

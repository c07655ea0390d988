"""What steering can reach where a level decays: the tables of docs/steering.md.

Run it with ``python -m experiments.studies.steering``.
"""

import dataclasses
import math

import numpy as np

from calibration.goals import StateTransfer
from calibration.hardware import Hardware
from calibration.steering import judged, steer
from twin.levels import LADDER, Decay, LevelSystem
from twin.waveform import Waveform

# Rabi limit of the second line in Hz, and a window in which the largest population of m is reached, s.
LIMITS = ((40e3, 1.2e-6), (1e6, 0.4e-6), (10e6, 0.1e-6))
MOVED_S = (10e-6, 100e-6)
TOP_LIFETIME_S = 38e-9
SAMPLES = 20


def limits_of(full_hz: float, window_s: float, samples: int) -> Hardware:
    """Two real channels without other limits than their full scale."""
    full = 2 * math.pi * full_hz
    return Hardware(
        sample_s=window_s / samples, largest_rad_s=(full, full), slew_rad_s2=(math.inf, math.inf), real_only=True,
        zero_ends=False,
    )  # fmt: skip


def ladder(full_hz: float, end: str, window_s: float) -> float:
    """Largest population of a level of the ladder at the end of the window, from s."""
    graph = LADDER.system(
        detuning_1_hz=0.0, detuning_2_hz=0.0, lifetime_s=52.7e-3, branching=0.4, m_lifetime_s=TOP_LIFETIME_S
    )
    limits = limits_of(full_hz, window_s, SAMPLES)
    # Line 1 would take the ion back to v.
    light = 0.98 * np.asarray(limits.largest_rad_s) * np.array([0.0, 1.0]) * np.ones((SAMPLES, 1))
    constant = Waveform(light, np.zeros_like(light), limits.sample_s)
    return 1 - steer(graph, limits, StateTransfer("s", end), SAMPLES, start=constant, starts=2).recomputed[0]


def passage() -> tuple[float, float, float]:
    """Transfers by the found pulses, in the found order and backwards, and by how much pulse 2 is earlier, s."""
    rate_per_s = 1e7
    graph = LevelSystem(
        ("v", "s", "m", "l"), (("v", "s"), ("s", "m")), np.zeros(4), (Decay("s", "l", rate_per_s),)
    )  # fmt: skip
    limits, goal = limits_of(1e6, 20e-6, 40), StateTransfer("v", "m")
    found = steer(graph, limits, goal, 40, starts=4, iterations=1000)
    backwards = dataclasses.replace(found.waveform, real_rad_s=found.waveform.real_rad_s[::-1])
    (lost,) = judged(graph, limits, [goal], backwards)
    weights = np.asarray(found.waveform.real_rad_s) ** 2
    first, second = np.arange(40) @ weights / weights.sum(axis=0)
    return 1 - found.recomputed[0], 1 - lost, float(first - second) * limits.sample_s


def main() -> None:
    """Prints the tables."""
    print(
        "| Rabi limit of line 2, MHz | largest P_m | " + " | ".join(f"P_l after {t * 1e6:g} us" for t in MOVED_S) + " |"
    )
    print("|---|---|" + "---|" * len(MOVED_S))
    for full_hz, window_s in LIMITS:
        moved = " | ".join(f"{ladder(full_hz, 'l', t):.3g}" for t in MOVED_S)
        print(f"| {full_hz / 1e6:g} | {ladder(full_hz, 'm', window_s):.2e} | {moved} |")
    right, wrong, earlier_s = passage()
    print(f"passage: {right:.4f}, backwards {wrong:.4f}, pulse 2 earlier by {earlier_s * 1e6:.1f} us")


if __name__ == "__main__":
    main()

"""How soon drifts are flagged, how seldom clean loops are, and which bad tables are named: ``docs/drift.md``.

Streams of the demo device (three loops a table, seven free parameters) under its own settings. Every stream has a
reference of its own, drawn with the error of a calibration by `CALIBRATED_WITH` tables. Seeds are fixed.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from calibration.data import LoopTable
from calibration.drift import Reference, Step, Tracker, threshold
from calibration.posing import pose
from calibration.problem import Problem
from experiments.build import device_from
from experiments.config import load_config, load_table

CALIBRATED_WITH = 3
CLEAN_BEFORE = 5
TRUTH = {
    "rabi_scale_1": 1.04, "rabi_scale_2": 0.95, "detuning_1_hz": 800.0, "detuning_2_hz": -600.0,
    "laser_linewidth_hz": 600.0, "readout_error_bright": 0.01, "readout_error_dark": 0.015,
}  # fmt: skip


class Laboratory:
    """A device of known parameters whose tables are drawn, and references that calibrations would have left."""

    def __init__(self):
        config = load_config(Path(__file__).parents[1] / "configs" / "demo.toml", verb="fit")
        assert config.fit is not None
        self.table: LoopTable = load_table(config)
        self.boxes = dict(config.fit.free)
        self.names = tuple(self.boxes)
        self.truth = np.array([TRUTH[name] for name in self.names])
        self.device = device_from(config)
        self.posed = pose(self.device, self.table, self.boxes)
        self.problem: Problem = self.posed.problem
        self.information = np.asarray(self.problem.information(jnp.asarray(self.truth)))
        width = np.array([high - low for low, high in self.boxes.values()])
        self.errors = np.sqrt(np.diag(np.linalg.inv(self.information + np.diag(12 / width**2))))
        self.covariance = np.linalg.inv(CALIBRATED_WITH * self.information + np.diag(12 / width**2))
        self.level = threshold(np.linalg.inv(self.covariance), self.information)
        self._draw = jax.jit(lambda key, values: self.problem.simulated(key, values).observed)

    def reference(self, seed: int) -> Reference:
        """A draw that lies in the boxes, as a calibration's would."""
        rng = np.random.default_rng(seed)
        while True:
            mean = rng.multivariate_normal(self.truth, self.covariance)
            if all(low < m < high for m, (low, high) in zip(mean, self.boxes.values(), strict=True)):
                return Reference(self.names, mean, self.covariance, self.boxes)

    def drawn(self, seed: int, loop: int, values: np.ndarray) -> Problem:
        """One table of a device with these values."""
        key = jax.random.fold_in(jax.random.key(seed), loop)
        return self.problem.with_observed(self._draw(key, jnp.asarray(values)))

    def stream(self, seed: int, path: Callable[[int], np.ndarray], loops: int) -> Iterator[Step]:
        """Steps until the first one that is not "still valid"."""
        tracker = Tracker(self.device, self.reference(seed), threshold=self.level)
        for k in range(loops):
            step = tracker.take(self.drawn(seed, k, path(k)), self.table)
            yield step
            if step.verdict != "still valid":
                return

    def fits(self, change: np.ndarray) -> bool:
        """Whether the device stays in the boxes of the fit."""
        ends = zip(self.truth + change, self.boxes.values(), strict=True)
        return all(low < value < high for value, (low, high) in ends)


def clean(lab: Laboratory, loops: int) -> str:
    """Verdicts over clean loops; after an alarm the stream starts anew, as it would after a calibration."""
    done, counts, seed = 0, {"still valid": 0, "recalibrate": 0, "data bad": 0}, 10_000
    while done < loops:
        for step in lab.stream(seed, lambda _: lab.truth, min(250, loops - done)):
            counts[step.verdict] += 1
            done += 1
        seed += 1
    return f"| {done} | {counts['recalibrate']} | {counts['data bad']} |"


def change(lab: Laboratory, which: int, streams: int, step_size: float | None) -> str:
    """When a step (or, for None, a drift of one standard error a loop) of one parameter is flagged and named."""
    sign = 1.0
    most = step_size if step_size is not None else 10.0
    unit = np.eye(len(lab.names))[which] * lab.errors[which]
    if not lab.fits(most * unit):
        sign = -1.0
    if not lab.fits(sign * most * unit):
        return "leaves its box"

    def path(loop: int) -> np.ndarray:
        grown = max(0.0, loop - CLEAN_BEFORE + 1.0) if step_size is None else step_size * (loop >= CLEAN_BEFORE)
        return lab.truth + sign * grown * unit

    after, named, bad = [], 0, 0
    for s in range(streams):
        seen = list(lab.stream(100 * which + s, path, CLEAN_BEFORE + 10))
        flagged = seen[-1].verdict != "still valid"
        after.append(len(seen) - CLEAN_BEFORE if flagged else 99)
        bad += seen[-1].verdict == "data bad"
        named += f"`{lab.names[which]}`" in seen[-1].reason
    within = sum(1 <= a <= (2 if step_size is not None else 10) for a in after)
    said = f"{within} of {streams}, median {np.median(after):.0f}, named {named}"
    return f"{said}, called bad {bad}" if bad else said


def _mirrored(counts: np.ndarray) -> np.ndarray:
    """Branches of a loop of three periods of 40 cycles exchanged."""
    k = np.arange(len(counts))
    return counts[np.minimum(k - k % 40 + (40 - k % 40) % 40, len(counts) - 1)]


FAULTS: dict[str, tuple[str, tuple[str, ...], Callable[[np.ndarray], np.ndarray]]] = {
    "columns slipped by one cycle": ("phase slip", ("n_x", "n_y"), lambda n: np.roll(n, 1)),
    "columns slipped by five cycles from the middle on": (
        "phase slip", ("n_x", "n_y"), lambda n: np.concatenate([n[:60], n[55:-5]])),
    "branches of the output exchanged": ("branches", ("n_y",), _mirrored),
    "counts end at 90 % of the shots": ("saturation", ("n_x", "n_y"), lambda n: np.minimum(n, 360)),
    "counts end at 80 % of the shots": ("saturation", ("n_x", "n_y"), lambda n: np.minimum(n, 320)),
    "half a period of y not measured": (
        "part of a period is missing", ("n_y",), lambda n: np.where((np.arange(len(n)) // 20) == 1, np.nan, n)),
}  # fmt: skip


def fault(lab: Laboratory, kind: str, tables: int) -> str:
    """How many tables of one loop gone bad in this way are called bad, and rightly named."""
    said, columns, spoil = FAULTS[kind]
    called = named = 0
    for s in range(tables):
        observed = lab.drawn(50_000, s, lab.truth).observed[0]
        new = {name: np.array(n)[: len(lab.table)] for name, n in zip(("n_x", "n_y"), observed, strict=True)}
        rows = lab.table.rows(lab.table.labels[0])
        for name in columns:
            new[name][rows] = spoil(new[name][rows])
        table = dataclasses.replace(lab.table, **new, sha256="")
        step = Tracker(lab.device, lab.reference(s), threshold=lab.level).adopt(lab.posed, lab.table).update(table)
        called += step.verdict == "data bad"
        named += said in step.reason
    return f"| {kind} | {called} of {tables} | {named} |"


def main() -> None:
    """Print the tables."""
    streams = 4 if "--quick" in sys.argv else 20
    lab = Laboratory()
    print(f"Threshold: {lab.level:.2f} standard deviations.\n")
    print("| clean loops | false alarms | called bad |\n|---|---|---|")
    print(clean(lab, 200 if "--quick" in sys.argv else 1000), flush=True)
    print("\n| fault of one loop of three | called bad | named |\n|---|---|---|")
    for kind in FAULTS:
        print(fault(lab, kind, streams), flush=True)
    print("\n| parameter | one standard error | step of five: flagged within two loops | one a loop: within ten |")
    print("|---|---|---|---|")
    for which, name in enumerate(lab.names):
        step, drift = change(lab, which, streams, 5.0), change(lab, which, streams, None)
        print(f"| `{name}` | {lab.errors[which]:.2g} | {step} | {drift} |", flush=True)


if __name__ == "__main__":
    main()

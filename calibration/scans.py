"""Auxiliary scans as data of a calibration: what a device says about each row, and how probable the counts are.

A `Scan` is to a scan's table what `calibration.likelihood.Experiment` is to a loop table. Scans share their parameters
with the loops, so their log-likelihoods add.
"""

import dataclasses
import math
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from calibration.likelihood import Observations
from calibration.scan_tables import KINDS, ScanTable, read_scan, write_scan
from twin.memristor import IonMemristor
from twin.readout import sample_counts
from twin.scans import AbstractScan, PulseScan, RamseyScan, ReadoutScan

__all__ = ["KINDS", "Scan", "ScanTable", "read_scan", "synthesize_scan", "write_scan"]


class Scan(eqx.Module):
    """A table of a scan in the form a device is asked with.

    The rows of a Rabi, frequency or Ramsey scan are those of the table, and the counted outcome is "assigned to s". A
    readout has a row for each prepared state, bright first, and the counted outcome is the wrong one: shots on the
    wrong side of the threshold are binomial in `readout_error_bright` and `readout_error_dark`, preparation taken as
    ideal; how the photons are distributed on either side does not enter.

    Attributes:
        observed: the measured counts or values of each row.
        parts: the rows that are solved together, and `places` where they stand.
        kind: "rabi", "frequency", "ramsey" or "readout".
    """

    observed: Observations
    parts: tuple[AbstractScan, ...]
    places: tuple[Int[Array, "_"], ...]
    kind: str = eqx.field(static=True)

    @classmethod
    def from_table(cls, table: ScanTable) -> "Scan":
        """Prepares a validated table."""
        if table.kind == "readout":
            bright, observed = _readout(table)
            return cls(observed, (ReadoutScan(bright),), (jnp.arange(len(bright)),), table.kind)
        offset = table.filled("detuning_set_hz", 0.0)
        parts: list[AbstractScan] = []
        if table.kind == "ramsey":
            places = [np.arange(len(table))]
            area = table.filled("area_rad", math.pi / 2)
            parts.append(RamseyScan(table["wait_s"], table.filled("phase_rad", 0.0), area, offset))
        else:
            area = table.area_rad if table.area_rad is not None else np.full(len(table), math.pi)
            width = table.get("sigma_s")
            places = [rows for k in (1, 2) if len(rows := np.flatnonzero(table["pulse"] == k))]
            for rows in places:
                sigma = None if width is None else width[rows]
                parts.append(PulseScan(int(table["pulse"][rows[0]]), area[rows], sigma, offset[rows]))
        return cls(_observations(table), tuple(parts), tuple(map(jnp.asarray, places)), table.kind)

    def planned(self, device: IonMemristor, boxes: Mapping[str, tuple[float, float]]) -> "Scan":
        """The scan planned for prior boxes, so that `predict` works where parameters are traced.

        Args:
            device: supplies the parameters outside the boxes and the error of its method; all values known. Anchor it
                first (`calibration.parameters.anchored`) if widths are free.
            boxes: (low, high) of each parameter that will vary; those that no scan depends on are ignored.

        Returns:
            The same scan; devices outside the boxes may come out NaN.
        """
        return dataclasses.replace(self, parts=tuple(part.planned(device, boxes) for part in self.parts))

    def predict(self, device: IonMemristor) -> Float[Array, " rows"]:
        """Probability of the counted outcome of a shot in each row; NaN where the device cannot be solved."""
        p = jnp.zeros(len(self.observed.value))
        for part, rows in zip(self.parts, self.places, strict=True):
            p = p.at[rows].set(part.probability(device))
        return p

    def log_likelihood(self, device: IonMemristor) -> Float[Array, ""]:
        """Log-likelihood of the table under a device, nats; differentiable in every parameter."""
        return self.observed.log_likelihood(self.predict(device))

    @property
    def n_data(self) -> int:
        """Number of measured cells."""
        return int(np.sum(np.asarray(self.observed.measured)))


def synthesize_scan(
    device: IonMemristor, settings: ScanTable, key: PRNGKeyArray, shots: int | None = None
) -> ScanTable:
    """A table of counts that a device might have produced under the settings of another one.

    Args:
        device: all values known.
        settings: commands and shots; its counts are not looked at, except that cells not measured there stay empty. Of
            a readout the counts tell how photons are distributed on either side of the threshold.
        key: random key of the counts.
        shots: repetitions of every row (of each prepared state, for a readout); None for those of the settings.

    Returns:
        The same settings with new counts.

    Raises:
        ValueError: a table of values without `shots`, a device that cannot be solved under these settings, or a readout
            whose settings have no row on one side of the threshold.
    """
    scan = Scan.from_table(settings)
    p = scan.predict(device)
    if bool(jnp.any(jnp.isnan(p))):
        raise ValueError("the device cannot be solved under these settings to the error its method asks for.")
    if shots is None and not scan.observed.counted:
        raise ValueError(f"{settings.name}: synthetic counts need `shots`; this table has values with errors.")
    repetitions = np.asarray(scan.observed.scale) if shots is None else np.full(len(p), float(shots))
    n = np.asarray(sample_counts(key, p, repetitions))
    columns = dict(settings.columns)
    if settings.kind == "readout":
        columns["count"] = _histogram(settings, n, repetitions, jax.random.fold_in(key, 1))
    else:
        measured = np.asarray(scan.observed.measured)
        columns["n"] = np.where(measured, n, np.nan)
        columns["shots"] = np.where(measured, repetitions, 0.0) if shots is None else repetitions
        columns = {name: values for name, values in columns.items() if name not in ("p", "p_err")}
    return ScanTable(kind=settings.kind, columns=columns, name=f"synthetic {settings.kind} scan")


def _observations(table: ScanTable) -> Observations:
    counted = "n" in table.columns
    value, scale = (table["n"], table["shots"]) if counted else (table["p"], table["p_err"])
    measured = np.isfinite(value)
    return Observations(
        jnp.asarray(np.where(measured, value, 0.0), float),
        jnp.asarray(np.where(measured, scale, 1.0), float),
        jnp.asarray(measured),
        counted,
    )


def _sides(table: ScanTable, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a prepared state on the wrong and on the right side of the threshold."""
    rows = table["prepared"] == which
    wrong = (table["photons"] < table["threshold"]) == (which == "bright")
    return np.flatnonzero(rows & wrong), np.flatnonzero(rows & ~wrong)


def _readout(table: ScanTable):
    """Which states were prepared, and the shots of each that were called wrong."""
    states = [which for which in ("bright", "dark") if np.any(table["prepared"] == which)]
    sums = [[float(np.sum(table["count"][rows])) for rows in _sides(table, which)] for which in states]
    wrong, right = np.array(sums).T
    shots = jnp.asarray(wrong + right)
    return (
        jnp.array([which == "bright" for which in states]),
        Observations(jnp.asarray(wrong), shots, jnp.ones(len(states), bool), counted=True),
    )


def _histogram(settings: ScanTable, wrong: np.ndarray, shots: np.ndarray, key: PRNGKeyArray) -> np.ndarray:
    """Shots of each row: those of either side fall on its rows as the counts of the settings do."""
    counts = np.zeros(len(settings), np.int64)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    states = [which for which in ("bright", "dark") if np.any(settings["prepared"] == which)]
    for which, n, total in zip(states, wrong, shots, strict=True):
        for rows, some in zip(_sides(settings, which), (int(n), int(total - n)), strict=True):
            if some and not len(rows):
                raise ValueError(
                    f"{settings.name}: an ion prepared {which} needs a row of photons on either side of the threshold."
                )
            if some:
                weight = settings["count"][rows] + (0.0 if settings["count"][rows].any() else 1.0)
                counts[rows] = rng.multinomial(some, weight / weight.sum())
    return counts

"""Timing and records: candidates take turns in one process, compilation is kept apart, medians are reported."""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import jax
import numpy as np

from experiments.provenance import versions

_PEERS = ("dynamiqs", "qiskit-dynamics", "qutip")


@dataclasses.dataclass(frozen=True)
class Result:
    """One number: of which work and engine, its unit, the error measured in the same run, and seconds it took.

    `error` is None where the work has none; `note` says what was measured on a part and scaled, and how.
    """

    work: str
    engine: str
    value: float
    unit: str
    error: float | None
    seconds: float
    note: str = ""

    def record(self) -> dict[str, Any]:
        """The entry of results.json."""
        return {**dataclasses.asdict(self), "versions": all_versions(), "device": device()}


def all_versions() -> dict[str, str]:
    """Versions of the package and of the peers that are installed."""
    found = versions()
    for name in _PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device() -> str:
    """What it ran on, with the load of the machine: others may have used it too."""
    first = jax.devices()[0]
    kind = platform.processor() or platform.machine() if first.platform == "cpu" else first.device_kind
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{first.platform}: {kind}, {os.cpu_count()} cores{load}"


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """(median seconds, seconds of the first call, which compiles) of each candidate; all take turns."""
    first, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        first[name] = _seconds(call)
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(_seconds(call))
    return {name: (median(times[name]), first[name]) for name in calls}


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def largest_difference(a, b) -> float:
    """Largest absolute difference; infinite where a number is missing, so that a failed lane is never a small error."""
    difference = np.abs(np.asarray(a, float) - np.asarray(b, float))
    return float(np.max(np.where(np.isfinite(difference), difference, np.inf)))

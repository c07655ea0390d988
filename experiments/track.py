"""`iontwin track`: a stream of loop tables tells whether a calibrated twin is still valid.

Leaves ``result.json`` (a verdict for each table, estimates, alarms, and the state that a later call goes on from),
``arrays.nc`` (estimates against the number of the loop) and the report. The folder is replaced in one step.
"""

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from calibration.data import LoopTable, TableError, read_table
from calibration.drift import LOOPS_PER_FALSE_ALARM, Reference, Tracker
from calibration.parameters import unit_of
from experiments import report
from experiments.build import device_from
from experiments.provenance import Stopwatch, provenance
from experiments.records import OutputError, Run, RunFolder
from experiments.schema import Config

Open = Callable[[], AbstractContextManager[RunFolder]]


def run(
    config: Config,
    fit_run: Path,
    tables: Sequence[LoopTable],
    earlier: Mapping[str, Any] | None,
    open_folder: Open,
    watch: Path | None = None,
    interval_s: float = 10.0,
) -> dict[str, Any]:
    """Track tables, then those that appear in a watched folder until interrupted.

    Args:
        config: its [device] and [memory] are those of the fit; [data.columns] says how files are read.
        fit_run: folder of the calibration.
        tables: in the order in which they were measured.
        earlier: ``result.json`` of the run that this one goes on with.
        open_folder: the run folder, opened anew for every batch of tables.
        watch: folder whose new files are tracked. interval_s: seconds between looks at it.
    """
    clock = Stopwatch()
    stream = _Stream(config, fit_run, earlier)
    if watch is None:
        stream.take(tables, open_folder, clock)
    else:
        appearing = _appearing(watch, interval_s, config.data.mapping() if config.data else {}, stream.files)
        try:
            for batch in itertools.chain([tables] if tables else [], appearing):
                with whole():
                    stream.take(batch, open_folder, clock)
        except KeyboardInterrupt:
            # A watched stream is ended this way; what was tracked stands already.
            if not stream.result:
                raise
    clock.stop()
    return stream.result


@contextlib.contextmanager
def whole() -> Generator[None]:
    """Holds an interrupt back until the block is done: tables are tracked and written together, or not at all.

    A second interrupt is not held back.
    """
    held: list[int] = []

    def hold(number: int, frame: Any) -> None:
        del frame
        held.append(number)
        signal.signal(signal.SIGINT, earlier)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    earlier = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)
    if held:
        raise KeyboardInterrupt


class _Stream:
    def __init__(self, config: Config, fit_run: Path, earlier: Mapping[str, Any] | None):
        self.config, self.fit_run = config, fit_run
        self.reference = reference_of(fit_run)
        device = device_from(config)
        self.result: dict[str, Any] = dict(earlier or {})
        self.steps: list[dict[str, Any]] = list(earlier["tables"]) if earlier else []
        self.tracker = Tracker(device, self.reference)
        if earlier:
            self.tracker = Tracker.resumed(device, self.reference, earlier["state"])
        self.seen = {step["sha256"] for step in self.steps}
        self.files = {step["table"] for step in self.steps}

    def take(self, batch: Sequence[LoopTable | TableError], open_folder: Open, clock: Stopwatch) -> None:
        with open_folder() as out:
            for table in batch:
                if isinstance(table, LoopTable) and table.sha256 in self.seen:
                    out.log(f"{table.name}: tracked before")
                    continue
                self._one(table, out)
            self.result = self._result(clock)
            out.write_result(self.result)
            if self.steps:
                out.write_arrays(_arrays(self.reference, self.steps))
            report.write(out)

    def _one(self, table: LoopTable | TableError, out: RunFolder) -> None:
        names = self.reference.names
        if isinstance(table, TableError):
            self.tracker.loops += 1
            step = self._row(str(table).partition(":")[0], "", "data bad", f"it cannot be read: {table}")
        else:
            found = self.tracker.update(table)
            self.seen.add(table.sha256)
            step = self._row(table.name, table.sha256, found.verdict, found.reason)
            step |= {
                "own": dict(zip(names, found.own.tolist(), strict=True)),
                "statistic": found.statistic,
                "misfit": found.misfit,
            }
        self.steps.append(step)
        out.log(f"loop {step['loop']} ({Path(step['table']).name}): {_sentence(step)}")

    def _row(self, name: str, sha256: str, verdict: str, reason: str) -> dict[str, Any]:
        tracker, std = self.tracker, np.sqrt(np.diag(self.tracker.covariance))
        estimates = {
            name: {"value": float(m), "std": float(s)}
            for name, m, s in zip(self.reference.names, tracker.mean, std, strict=True)
        }
        nothing = dict.fromkeys(self.reference.names)
        return {"loop": tracker.loops, "table": name, "sha256": sha256, "verdict": verdict, "reason": reason,
                "estimates": estimates, "own": nothing, "statistic": None, "misfit": None}  # fmt: skip

    def _result(self, clock: Stopwatch) -> dict[str, Any]:
        last = self.steps[-1] if self.steps else None
        bad = [step["loop"] for step in self.steps if step["verdict"] == "data bad"]
        first = next((step for step in self.steps if step["verdict"] == "recalibrate"), None)
        notes = [f"Loop {first['loop']} raised the alarm: {_sentence(first)}."] if first else []
        if bad:
            notes.append(f"Bad tables did not move the estimates: loop {', '.join(map(str, bad))}.")
        notes.append(f"The alarm's threshold is {self.tracker.threshold:.2f} standard deviations, laid for one false "
                     f"alarm in {LOOPS_PER_FALSE_ALARM} clean loops.")  # fmt: skip
        return {
            "kind": "track",
            "status": "done",
            "verdict": _sentence(last) if last else "no table yet",
            "from": str(self.fit_run),
            "reference": {
                name: {"value": float(m), "std": float(s), "unit": unit_of(name)}
                for name, m, s in zip(self.reference.names, self.reference.mean,
                                      np.sqrt(np.diag(self.reference.covariance)), strict=True)
            },
            "tables": self.steps,
            "notes": notes,
            "state": self.tracker.state(),
            "seconds": clock.seconds(),
            **provenance(),
        }  # fmt: skip


def _sentence(step: Mapping[str, Any]) -> str:
    return f"{step['verdict']} because {step['reason']}" if step["reason"] else step["verdict"]


def reference_of(fit_run: Path) -> Reference:
    """The posterior that a fit left.

    Raises:
        OutputError: the run is no fit, found no optimum, or has parameters for each table.
    """
    run_ = Run(fit_run)
    result, fit = run_.result, run_.config.fit
    names = result.get("correlation", {}).get("names", [])
    matrix = np.array(result.get("correlation", {}).get("matrix", ()), float)
    if fit is None or not names or matrix.shape != (len(names), len(names)):
        raise OutputError(f"{fit_run}: this run is no fit with an optimum; name the folder of a fit that converged.")
    if any("@" in name for name in names) or not set(names) <= set(fit.free):
        raise OutputError(f"{fit_run}: parameters of single tables cannot be tracked; fit them for all together.")
    found = result["parameters"]
    mean, std = (np.array([found[name][key] for name in names], float) for key in ("value", "std"))
    return Reference(tuple(names), mean, matrix * np.outer(std, std), {name: fit.free[name] for name in names})


def _appearing(
    folder: Path, interval_s: float, columns: Mapping[str, Any], seen: set[str]
) -> Iterator[list[LoopTable | TableError]]:
    """New files of a folder by name, each once it has stood unchanged between two looks."""
    sizes: dict[Path, tuple[int, int]] = {}
    while True:
        ready: list[LoopTable | TableError] = []
        for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
            stat = path.stat()
            now = (stat.st_size, stat.st_mtime_ns)
            if str(path) in seen:
                continue
            if sizes.get(path) == now:
                seen.add(str(path))
                try:
                    ready.append(read_table(path, columns))
                except TableError as error:
                    ready.append(error)
            sizes[path] = now
        if ready:
            yield ready
        time.sleep(interval_s)


def _arrays(reference: Reference, steps: Sequence[Mapping[str, Any]]) -> xr.Dataset:
    """One row a table: estimates with standard errors, the table's own estimate, and the verdict."""
    pick = lambda key: np.array([[s["estimates"][n][key] for n in reference.names] for s in steps], float)
    own = np.array([[s["own"][n] for n in reference.names] for s in steps], float)
    one = lambda key: np.array([s[key] for s in steps], float)
    return xr.Dataset(
        {
            "estimate": (("table", "parameter"), pick("value")),
            "std": (("table", "parameter"), pick("std")),
            "own": (("table", "parameter"), own, {"long_name": "own estimate minus reference, in standard errors"}),
            "statistic": ("table", one("statistic")),
            "misfit": ("table", one("misfit")),
            "verdict": ("table", np.array([s["verdict"] for s in steps], object)),
            "reference": ("parameter", reference.mean),
            "reference_std": ("parameter", np.sqrt(np.diag(reference.covariance))),
        },
        coords={"loop": ("table", np.array([s["loop"] for s in steps])), "parameter": list(reference.names)},
    )

"""`iontwin predict` and `iontwin compare`: what a twin file expects, and which of two twins new loops speak for."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from calibration import twin_file, twin_use
from calibration.data import LoopTable
from experiments import report
from experiments.provenance import Stopwatch, provenance
from experiments.records import RunFolder
from experiments.schema import Config


def predict(twin: Path, config: Config | None, table: LoopTable | None, out: RunFolder) -> dict[str, Any]:
    """Populations with 95 % bands for the loops of [simulate], or for the settings of a table."""
    clock = Stopwatch()
    loaded = twin_file.load(twin)
    if table is None:
        assert config is not None
        table = _settings(config)
    bands = twin_use.predict(loaded, table)
    result = {
        "kind": "predict", "status": "done", "from": str(twin), "notes": [*loaded.warnings, *bands.warnings],
        "rows": len(table), "largest_band": float(np.max(bands.y_high - bands.y_low)),
        "seconds": clock.stop(), **provenance(),
    }  # fmt: skip
    for note in result["notes"]:
        out.log(note)
    out.write_result(result)
    columns: dict[str, np.ndarray] = {"loop": table.loop.astype(object), "cycle": table.cycle, "x_set": table.x_set}
    columns |= {name: value for name, value in bands._asdict().items() if name != "warnings"}
    out.write_arrays(xr.Dataset({name: ("row", values) for name, values in columns.items()}))
    report.write(out)
    return result


def compare(incumbent: Path, candidate: Path, tables: Sequence[LoopTable]) -> dict[str, Any]:
    """Verdict and evidence, and what loading the twins had to say."""
    old, new = twin_file.load(incumbent), twin_file.load(candidate)
    found = twin_use.compare(old, new, tables)
    return {"status": "done", **found._asdict(), "notes": [*old.warnings, *new.warnings]}


def _settings(config: Config) -> LoopTable:
    """The loops of [simulate] as settings; nothing is measured, so the memory reads the model."""
    assert config.simulate is not None
    parts: list[dict[str, np.ndarray]] = []
    for loop in config.simulate.loops:
        cycles = loop.periods * loop.cycles_per_period + 1
        window = loop.window_cycles if loop.window_cycles is not None else config.memory.window_cycles
        parts.append({
            "loop": np.full(cycles, loop.label), "cycle": np.arange(cycles),
            "x_set": np.sin(np.pi * np.arange(cycles) / loop.cycles_per_period) ** 2,
            "window_cycles": np.full(cycles, float(window)), "shots": np.ones(cycles, int),
            "detuning_1_set_hz": np.full(cycles, loop.detuning_1_set_hz),
            "detuning_2_set_hz": np.full(cycles, loop.detuning_2_set_hz),
            "n_y": np.zeros(cycles),
        })  # fmt: skip
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return dataclasses.replace(LoopTable(**joined), name="[simulate]")

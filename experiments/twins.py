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
from experiments.build import settings_table
from experiments.provenance import Stopwatch, provenance
from experiments.records import RunFolder
from experiments.schema import Config


def predict(twin: Path, config: Config | None, table: LoopTable | None, out: RunFolder) -> dict[str, Any]:
    """Populations with 95 % bands for the loops of [simulate], or for the settings of a table."""
    clock = Stopwatch()
    loaded = twin_file.load(twin)
    if table is None:
        assert config is not None
        # Nothing is measured, so that the memory reads the model.
        table = dataclasses.replace(settings_table(config, windows=True), n_x=None, name="[simulate]", sha256="")
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

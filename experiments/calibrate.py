"""`iontwin fit`: a loop table calibrates the twin.

Leaves ``result.json`` (parameters, verdicts, notes), ``arrays.nc`` (every row measured and modelled) and the report. A
search that fails leaves them too, with the reason.
"""

from typing import Any

import numpy as np
import xarray as xr

from calibration.data import LoopTable
from calibration.fit import FitResult, fit
from calibration.likelihood import Experiment, Observations
from calibration.parameters import unit_of
from experiments import report
from experiments.build import device_from
from experiments.progress import search_progress
from experiments.provenance import Stopwatch, provenance
from experiments.records import RunFolder
from experiments.schema import Config

# Parameters of the device that are reported as fixed where they are not free.
_FIXED = (
    *("rabi_scale_1", "rabi_scale_2", "detuning_1_hz", "detuning_2_hz"),
    *("laser_linewidth_hz", "laser_linewidth_1_hz", "laser_linewidth_2_hz", "n_bar", "eta_1", "eta_2"),
    *("readout_error_bright", "readout_error_dark", "sigma_1_s", "sigma_2_s", "separation_s"),
    *("lifetime_s", "branching", "lead_s", "tail_s"),
)


def run(config: Config, table: LoopTable, out: RunFolder, seed: int) -> dict[str, Any]:
    """Calibrate the configured device to a table.

    Args:
        config: with a table [fit].
        table: the recorded loops.
        out: the run folder.
        seed: of the random starts.

    Returns:
        What ``result.json`` holds.
    """
    assert config.fit is not None
    clock = Stopwatch()
    out.log(f"{table.name}: {len(table)} cycles; {len(config.fit.free)} free parameters, {config.fit.starts} starts")
    device = device_from(config)
    with search_progress(out, "log-likelihood") as progress:
        found = fit(device, table, config.fit.free, starts=config.fit.starts, seed=seed, on_progress=progress)
    seconds = clock.stop()
    out.log(
        f"{found.status}; chi2/dof {found.chi2_per_dof:.3f}; "
        + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    )
    result = {
        "kind": "fit",
        "status": found.status,
        "parameters": _parameters(config, found),
        "correlation": {
            "names": list(config.fit.free),
            "matrix": found.correlation.tolist() if found.parameters else [],
        },
        "log_likelihood": found.log_likelihood,
        "chi2_per_dof": found.chi2_per_dof,
        "n_data": found.n_data,
        "n_free": found.n_free,
        "notes": found.notes,
        "basins": [{"log_likelihood": b.log_likelihood, "starts": b.starts, "values": b.values} for b in found.basins],
        "history": found.history,
        "seed": seed,
        "seconds": seconds,
        "seconds_by_stage": found.seconds,
        **provenance(),
        "data_sha256": table.sha256,
    }
    out.write_result(result)  # first: what follows cannot lose it
    if found.prediction is not None:
        out.write_arrays(_arrays(table, found))
    report.write(out)
    for name, one in result["parameters"].items():
        if one["verdict"] != "fixed":
            out.log(f"  {name:<22} {one['value']: .6g} ± {one['std']:.2g} {one['unit']:<7} {one['verdict']}")
    for note in found.notes:
        out.log(f"  {note}")
    return result


def _parameters(config: Config, found: FitResult) -> dict[str, Any]:
    """Free parameters with their verdicts, then the fixed ones that the device has."""
    rows: dict[str, Any] = {
        name: {"value": e.value, "std": e.std, "ci95": list(e.ci95), "unit": e.unit, "verdict": e.verdict}
        for name, e in found.parameters.items()
    }
    for name in _FIXED:
        value = getattr(config.device, name)
        if name in rows or value is None or name in (config.fit.free if config.fit else ()):
            continue
        if config.device.platform == "ion" or name.startswith("readout"):
            rows[name] = {"value": value, "std": 0.0, "ci95": [value, value], "unit": unit_of(name), "verdict": "fixed"}
    return rows


def _arrays(table: LoopTable, found: FitResult) -> xr.Dataset:
    """Each row of the table: settings, what was measured, and the calibrated twin's probabilities."""
    assert found.prediction is not None
    experiment = Experiment.from_table(table)
    prediction = found.prediction
    columns: dict[str, np.ndarray] = {
        "loop": table.loop.astype(object),
        "cycle": table.cycle,
        "x_set": table.x_set,
        "detuning_1_set_hz": table.detuning_1_set_hz,
        "detuning_2_set_hz": table.detuning_2_set_hz,
        "r": np.asarray(prediction.r),
        "p_x": np.asarray(prediction.p_x),
        "p_y": np.asarray(prediction.p_y),
        "valid": np.asarray(prediction.valid),
    }
    for name, observed, p in (("x", experiment.x, prediction.p_x), ("y", experiment.y, prediction.p_y)):
        nothing = np.full(len(table), np.nan)
        columns[f"{name}_measured"] = nothing if observed is None else np.asarray(observed.estimate())
        columns[f"{name}_error"] = nothing if observed is None else _standard_errors(observed, np.asarray(p))
        columns[f"residual_{name}"] = nothing if observed is None else np.asarray(observed.residual(p))
    dataset = xr.Dataset({name: ("row", values) for name, values in columns.items()})
    for name in dataset.data_vars:
        dataset[name].attrs["units"] = "Hz" if str(name).endswith("_hz") else "1"
    return dataset


def _standard_errors(observed: Observations, p: np.ndarray) -> np.ndarray:
    return np.where(np.asarray(observed.measured), np.sqrt(np.asarray(observed.variance(p))), np.nan)

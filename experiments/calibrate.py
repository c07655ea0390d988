"""`iontwin fit`: a loop table calibrates the twin.

Leaves ``result.json`` (parameters, verdicts, notes), ``arrays.nc`` (every row measured and modelled), the calibrated
device as ``twin.json``, and the report. A search that fails leaves the result and the report, with the reason.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import xarray as xr

from calibration import intervals, twin_file
from calibration.data import LoopTable
from calibration.fit import FitResult, fit
from calibration.likelihood import Experiment, Prediction
from calibration.observations import Observations
from calibration.parameters import anchored, unit_of, value_of
from calibration.posterior import sample
from calibration.problem import NOISE_PARAMETERS, Scanned
from calibration.scan_tables import ScanTable
from experiments import report
from experiments.build import device_from
from experiments.progress import search_progress, work_progress
from experiments.provenance import Stopwatch, hashes_of, provenance, versions
from experiments.records import RunFolder
from experiments.schema import Config, Uncertainty
from experiments.schema_device import PHOTONIC
from twin.loop import AbstractMemristor
from twin.register import Register

# Parameters of the ion that are reported as fixed where they are not free.
_FIXED = (
    *("rabi_scale_1", "rabi_scale_2", "detuning_1_hz", "detuning_2_hz"),
    *("laser_linewidth_hz", "laser_linewidth_1_hz", "laser_linewidth_2_hz", "n_bar", "eta_1", "eta_2"),
    *("readout_error_bright", "readout_error_dark", "sigma_1_s", "sigma_2_s", "separation_s"),
    *("lifetime_s", "branching", "lead_s", "tail_s"),
)

# Below, the end of a bootstrap interval is uncertain by more than an eighth of the half-width.
_ENOUGH_REFITS = 100


def run(config: Config, tables: dict[str, LoopTable | ScanTable], out: RunFolder, seed: int) -> dict[str, Any]:
    """Calibrate the configured device to recorded tables.

    Args:
        config: with a table [fit].
        tables: the recorded loops and scans by name.
        out: the run folder.
        seed: of the starts.

    Returns:
        What ``result.json`` holds.
    """
    assert config.fit is not None
    settings = config.fit
    clock = Stopwatch()
    for table in tables.values():
        out.log(f"{table.name}: {len(table)} {'cycles' if isinstance(table, LoopTable) else f'rows ({table.kind})'}")
    out.log(f"{len(settings.free)} free parameters, {settings.starts} starts")
    device = device_from(config)
    with search_progress(out, "log-likelihood") as progress:
        found = fit(
            device,
            tables,
            settings.free,
            optimizer=settings.optimizer,
            starts=settings.starts,
            sampling=settings.sampling,
            per_table=settings.per_table,
            per_ion=settings.per_ion,
            noise=settings.noise,
            seed=seed,
            on_progress=progress,
        )
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
            "names": list(found.problem.names),
            "matrix": found.correlation.tolist() if found.parameters else [],
        },
        "log_likelihood": found.log_likelihood,
        "chi2_per_dof": found.chi2_per_dof,
        "n_data": found.n_data,
        "n_free": found.n_free,
        "notes": found.notes,
        "degeneracies": [
            {"names": g.names, "direction": g.direction, "span": g.span, "structural": g.structural}
            for g in found.degeneracies
        ],
        "areas": {name: {"value": value, "std": std} for name, (value, std) in found.areas.items()},
        "basins": [{"log_likelihood": b.log_likelihood, "starts": b.starts, "values": b.values} for b in found.basins],
        "history": found.history,
        "emulation": found.emulation,
        "seed": seed,
        "seconds": seconds,
        "seconds_by_stage": found.seconds,
        **provenance(),
        "data_sha256": hashes_of(tables),
    }
    out.write_result(result)  # first: what follows cannot lose it
    arrays = _arrays(tables, found) if found.predictions else None
    if arrays is not None and found.converged:
        arrays = arrays.merge(_intervals(config.uncertainty, found, out, result))
        out.write_result(result)
    if arrays is not None:
        out.write_arrays(arrays)
    if found.converged and not settings.per_table and not isinstance(device, Register):
        twin_file.save(out.work, _twin(anchored(device), tables, found, arrays))
    report.write(out)
    for name, one in result["parameters"].items():
        if one["verdict"] != "fixed":
            out.log(f"  {name:<22} {one['value']: .6g} ± {one['std']:.2g} {one['unit']:<7} {one['verdict']}")
    for note in result["notes"]:
        out.log(f"  {note}")
    return result


def _twin(
    device: AbstractMemristor,
    tables: dict[str, LoopTable | ScanTable],
    found: FitResult,
    arrays: xr.Dataset | None,
) -> twin_file.Twin:
    """What later runs use: the device's own parameters; those of the noise belong to the tables."""
    names = list(found.problem.names)
    own = [k for k, name in enumerate(names) if name not in NOISE_PARAMETERS]
    draws = None
    if arrays is not None and "posterior" in arrays:
        draws = arrays["posterior"].values.reshape(-1, len(names))[:, own]
    boxes = found.problem.free.boxes
    return twin_file.make(
        device,
        [names[k] for k in own],
        found.values[own],
        found.covariance[np.ix_(own, own)],
        boxes,
        [table for table in tables.values() if isinstance(table, LoopTable)],
        versions(),
        draws,
    )


def _intervals(wanted: Uncertainty, found: FitResult, out: RunFolder, result: dict[str, Any]) -> xr.Dataset:
    """What the table [uncertainty] asks for: added to `result`, its curves and draws as arrays."""
    problem, names = found.problem, list(found.problem.names)
    methods: dict[str, dict[str, tuple[float, float]]] = {
        "laplace": {name: e.ci95 for name, e in found.parameters.items()}
    }
    arrays: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    notes = list(found.notes)
    with work_progress(out) as progress:
        profiled = intervals.chosen(names, wanted.profile)
        for k, name in enumerate(profiled):
            progress("profiles", k, len(profiled))
            one = intervals.profile(problem, found.values, found.covariance, name)
            methods.setdefault("profile", {})[name] = one.ci95
            arrays[f"profile_{name}"] = (f"point_of_{name}", one.values)
            arrays[f"deviance_{name}"] = (f"point_of_{name}", one.deviance)
            if one.gain > 0.01:
                notes.append(f"Holding `{name}` elsewhere found a likelihood {one.gain:.2f} nats higher: the search "
                             "missed the optimum; use more starts.")  # fmt: skip
            progress("profiles", k + 1, len(profiled))
        if wanted.bootstrap:
            boot = intervals.bootstrap(
                problem, found.values, refits=wanted.bootstrap, seed=wanted.seed, on_progress=progress
            )
            methods["bootstrap"] = _by_name(names, boot.ci95)
            summary["bootstrap"] = {"refits": wanted.bootstrap, "settled": boot.settled, "std": boot.std.tolist(),
                                    "bias": boot.bias.tolist()}  # fmt: skip
            arrays["bootstrap"] = (("refit", "parameter"), boot.draws)
            if boot.settled < 0.9:
                notes.append(f"Only {boot.settled:.0%} of the refits of the bootstrap reached an optimum.")
        if wanted.posterior:
            posterior = sample(
                problem,
                jnp.asarray(found.values),
                chains=wanted.chains,
                draws=wanted.draws,
                warmup=wanted.warmup,
                seed=wanted.seed,
                on_progress=progress,
            )
            methods["posterior"] = _by_name(names, posterior.interval())
            summary["posterior"] = {
                "mean": posterior.flat.mean(0).tolist(),
                "std": posterior.flat.std(0).tolist(),
                "rhat": posterior.rhat.tolist(),
                "effective": posterior.effective.tolist(),
                "divergences": posterior.divergences,
                "chains": wanted.chains,
                "draws": wanted.draws,
            }
            arrays["posterior"] = (("chain", "draw", "parameter"), posterior.draws)
            notes += posterior.doubts(problem.names)
    if len(methods) == 1:
        return xr.Dataset()
    boxes = problem.free.boxes
    # Percentiles of a few refits differ from any other interval by chance.
    few = 0 < wanted.bootstrap < _ENOUGH_REFITS
    notes += intervals.disagreements({m: one for m, one in methods.items() if not (few and m == "bootstrap")}, boxes)
    if few:
        notes.append(f"{wanted.bootstrap} refits are too few for percentiles; take {_ENOUGH_REFITS} or more.")
    result["intervals"] = methods
    result["uncertainty"] = {"names": names, **summary}
    result["notes"] = notes
    return xr.Dataset(arrays, coords={"parameter": np.array(names, dtype=object)})


def _by_name(names: list[str], ends: np.ndarray) -> dict[str, tuple[float, float]]:
    return {name: (float(low), float(high)) for name, low, high in zip(names, *ends, strict=True)}


def _parameters(config: Config, found: FitResult) -> dict[str, Any]:
    """Free parameters with their verdicts, then the fixed ones that the device has."""
    rows: dict[str, Any] = {
        name: {"value": e.value, "std": e.std, "ci95": list(e.ci95), "unit": e.unit, "verdict": e.verdict}
        for name, e in found.parameters.items()
    }
    free = config.fit.free if config.fit else ()
    if isinstance(found.device, Register):
        ions = found.problem.parts[0].ions
        for name in (*_FIXED, "crosstalk_1", "crosstalk_2"):
            if name not in free:
                values = np.asarray(value_of(found.device, name))
                places = [name] if values.ndim == 0 else [f"{name}@{ion}" for ion in ions]
                rows |= {place: _fixed(name, float(v)) for place, v in zip(places, values.ravel(), strict=True)}
        return rows
    for name in PHOTONIC if config.device.platform == "photonic" else _FIXED:
        value = getattr(config.device, name)
        if value is not None and name not in free:
            rows[name] = _fixed(name, value)
    return rows


def _fixed(name: str, value: float) -> dict[str, Any]:
    return {"value": value, "std": 0.0, "ci95": [value, value], "unit": unit_of(name), "verdict": "fixed"}


def _arrays(tables: dict[str, LoopTable | ScanTable], found: FitResult) -> xr.Dataset:
    """Each row of each table: settings, what was measured, and the calibrated twin's probabilities."""
    loops = {name: _rows(table, p) for (name, table), p in zip(tables.items(), found.predictions.values(), strict=True)
             if isinstance(table, LoopTable) and isinstance(p, Prediction)}  # fmt: skip
    if len(loops) > 1:
        for name, rows in loops.items():
            loops[name] = rows.assign(table=("row", np.full(rows.sizes["row"], name, object)))
    scans: dict[str, Any] = {}
    for part in found.problem.parts:
        if isinstance(part.data, Scanned):
            (observed,), p = part.data.observed, np.asarray(found.predictions[part.name])
            columns = {
                "measured": np.asarray(observed.estimate()),
                "error": _standard_errors(observed, p),
                "p": p,
                "residual": np.asarray(observed.residual(p)),
            }
            scans |= {f"scan_{part.name}_{what}": (f"row_of_{part.name}", one) for what, one in columns.items()}
            for setting, values in _settings(tables[part.name], len(p)).items():
                scans[f"scan_{part.name}_{setting}"] = (f"row_of_{part.name}", values)
    return xr.merge([*([xr.concat(list(loops.values()), dim="row")] if loops else []), xr.Dataset(scans)])


def _settings(table: LoopTable | ScanTable, rows: int) -> dict[str, np.ndarray]:
    """Columns of a scan that were set; a histogram is reduced to its prepared states, which have none."""
    if isinstance(table, LoopTable) or len(table) != rows or table.kind == "readout":
        return {}
    return {name: table[name] for name in table.columns if name not in ("shots", "n", "p", "p_err")}


def _rows(table: LoopTable, prediction: Prediction) -> xr.Dataset:
    experiment = Experiment.from_table(table)
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
    measured = [("x", experiment.x, prediction.p_x), ("y", experiment.y, prediction.p_y)]
    if experiment.m is not None:
        columns["p_m"] = np.asarray(prediction.p_m)
        measured.append(("m", experiment.m, prediction.p_m))
    for name, observed, p in measured:
        nothing = np.full(len(table), np.nan)
        columns[f"{name}_measured"] = nothing if observed is None else np.asarray(observed.estimate())
        columns[f"{name}_error"] = nothing if observed is None else _standard_errors(observed, np.asarray(p))
        columns[f"residual_{name}"] = nothing if observed is None else np.asarray(observed.residual(p))
    dataset = xr.Dataset({name: ("row", values) for name, values in columns.items()})
    for name in dataset.data_vars:
        dataset[name].attrs["units"] = "Hz" if str(name).endswith("_hz") else "1"
    return dataset


def _standard_errors(observed: Observations, p: np.ndarray) -> np.ndarray:
    return np.where(np.asarray(observed.measured), np.sqrt(np.asarray(observed.variance(jnp.asarray(p)))), np.nan)

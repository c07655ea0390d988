"""`iontwin check`: is the model of a fit right? Residual tests, predictive checks, held-out loops and rivals.

Leaves ``result.json`` (tests with p-values, verdict, sentences), ``arrays.nc`` (residuals, smooth part) and the
report.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from calibration import checks, predictive
from calibration import rivals as others
from calibration.data import LoopTable
from calibration.least_squares import descend
from calibration.problem import Loops, Problem, pose
from experiments import report
from experiments.build import device_from
from experiments.provenance import Stopwatch, provenance
from experiments.records import RunFolder
from experiments.schema import Config


def run(
    config: Config, table: LoopTable, fitted: Mapping[str, Any], out: RunFolder, with_rivals: bool, seed: int
) -> dict[str, Any]:
    """Check a fit against a table.

    Args:
        config: of the fit, with a table [fit].
        table: the loops to be explained.
        fitted: ``result.json`` of the fit; its parameters are where the search starts.
        out: the run folder.
        with_rivals: also fit and rank the rival explanations.
        seed: of simulated tables and random starts.

    Returns:
        What ``result.json`` holds.
    """
    assert config.fit is not None
    clock = Stopwatch()
    out.log(f"{table.name}: {len(table)} cycles; the fit's {len(config.fit.free)} free parameters")
    device = device_from(config)
    problem = pose(device, table, config.fit.free).problem
    start = np.array([fitted["parameters"][name]["value"] for name in problem.names], float)
    low, width = np.asarray(problem.free.low), np.asarray(problem.free.width)
    start = low + width * np.clip((start - low) / width, 1e-6, 1 - 1e-6)
    descent = descend(problem, problem.free.unbounded(start)[None], rounds=2)
    values = problem.free.bounded(descent.points[0])
    found = checks.check(problem, table, values)
    left = predictive.held_out(problem, table, values, seed=seed)
    made = predictive.posterior_predictive(problem, table, values, seed=seed)
    said = [*found.sentences, *(one.sentence for one in left), *(one.sentence for one in made)]
    comparison = None
    if with_rivals:
        out.log("fitting rival explanations")
        field, notes = others.rivals(device, table, config.fit.free, full=problem)
        comparison = others.compare(field, table, seed=seed, notes=notes)
        said += comparison.sentences
    result = {
        "kind": "check",
        "status": "done",
        "rejected": found.rejected,
        "p_value": found.p_value,
        "tests": found.tests,
        "directions": found.directions,
        "held_out": [dataclasses.asdict(one) for one in left],
        "posterior_predictive": [dataclasses.asdict(one) for one in made],
        "rivals": [dataclasses.asdict(one) for one in comparison.ranking] if comparison else [],
        "sentences": said,
        "notes": said[1:],
        "seed": seed,
        "seconds": clock.stop(),
        **provenance(),
        "data_sha256": table.sha256,
    }
    out.write_result(result)
    out.write_arrays(_arrays(problem, table, values, found))
    report.write(out)
    for sentence in said:
        out.log(f"  {sentence}")
    return result


def _arrays(problem: Problem, table: LoopTable, values, found: checks.Check) -> xr.Dataset:
    """Each row: phase of the input in turns, measured minus model, and the smooth part of it."""
    (part,) = problem.parts
    assert isinstance(part.data, Loops)
    prediction = part.data.prediction(problem.device(part, values), problem.own_window(part))
    half = np.arccos(np.clip(1 - 2 * table.x_set, -1, 1)) / (2 * np.pi)
    columns: dict[str, np.ndarray] = {
        "loop": table.loop.astype(object),
        "cycle": table.cycle,
        "x_set": table.x_set,
        "phase": np.where(checks.direction(table) < 0, 1 - half, half),
    }
    for name, misfit in found.misfit[part.name].items():
        observed, p = getattr(part.data.experiment, name), getattr(prediction, f"p_{name}")
        columns[f"gap_{name}"] = np.asarray(observed.estimate() - p)[: part.rows]
        columns[f"misfit_{name}"] = misfit
    dataset = xr.Dataset({name: ("row", column) for name, column in columns.items()})
    for name in dataset.data_vars:
        dataset[name].attrs["units"] = "1"
    return dataset

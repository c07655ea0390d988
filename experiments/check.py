"""`iontwin check`: is the model of a fit right? Residual tests, predictive checks, held-out loops and rivals.

Leaves ``result.json`` (tests with p-values, verdict, sentences), ``arrays.nc`` (residuals, smooth part) and the report.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import xarray as xr

from calibration import checks, predictive
from calibration import rivals as others
from calibration.data import LoopTable
from calibration.least_squares import descend
from calibration.posing import pose
from calibration.problem import Loops, Problem
from experiments import report
from experiments.build import device_from
from experiments.provenance import Stopwatch, hashes_of, provenance
from experiments.records import RunFolder
from experiments.schema import Config


def run(
    config: Config,
    tables: dict[str, LoopTable],
    fitted: Mapping[str, Any],
    out: RunFolder,
    with_rivals: bool,
    seed: int,
) -> dict[str, Any]:
    """Check a fit against tables.

    Args:
        config: of the fit, with a table [fit].
        tables: the loops to be explained, by name.
        fitted: ``result.json`` of the fit; its parameters are where the search starts.
        out: the run folder.
        with_rivals: also fit and rank the rival explanations.
        seed: of simulated tables and random starts.

    Returns:
        What ``result.json`` holds.
    """
    assert config.fit is not None
    settings = config.fit
    clock = Stopwatch()
    for table in tables.values():
        out.log(f"{table.name}: {len(table)} cycles")
    device = device_from(config)
    problem = pose(device, tables, settings.free, per_table=settings.per_table, noise=settings.noise).problem
    values = descend(problem, _start(problem, fitted)[None], rounds=2).values[0]
    found = checks.check(problem, tables, values)
    left = predictive.held_out(problem, tables, values, seed=seed)
    made = predictive.posterior_predictive(problem, tables, values, seed=seed)
    said = [*found.sentences, *(one.sentence for one in left), *(one.sentence for one in made)]
    ranking: list[others.Ranked] = []
    if with_rivals:
        out.log("fitting rival explanations")
        (table,) = tables.values()
        field, notes = others.rivals(device, table, settings.free, full=problem, noise=settings.noise)
        comparison = others.compare(field, table, seed=seed, notes=notes)
        ranking = comparison.ranking
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
        "rivals": [dataclasses.asdict(one) for one in ranking],
        "sentences": said,
        "notes": said[1:],
        "seed": seed,
        "seconds": clock.stop(),
        **provenance(),
        "data_sha256": hashes_of(tables),
    }
    out.write_result(result)  # first: what follows cannot lose it
    out.write_arrays(_arrays(problem, tables, values, found))
    report.write(out)
    for sentence in said:
        out.log(f"  {sentence}")
    return result


def _start(problem: Problem, fitted: Mapping[str, Any]) -> Any:
    """The estimates of the fit, inside the box."""
    given = jnp.array([fitted["parameters"][name]["value"] for name in problem.names], float)
    return jnp.clip(given, problem.free.low, problem.free.high)


def _arrays(problem: Problem, tables: dict[str, LoopTable], values, found: checks.Check) -> xr.Dataset:
    """Each row of each table: phase of the input in turns, measured minus model, and the smooth part of it."""
    parts = []
    for part, (name, table) in zip(problem.parts, tables.items(), strict=True):
        assert isinstance(part.data, Loops)
        prediction = part.data.prediction(problem.device(part, values), problem.own_window(part))
        half = np.arccos(np.clip(1 - 2 * table.x_set, -1, 1)) / (2 * np.pi)
        label = table.loop if len(tables) == 1 else [f"{loop} of {name}" for loop in table.loop]
        columns: dict[str, np.ndarray] = {
            "loop": np.asarray(label, object),
            "cycle": table.cycle,
            "x_set": table.x_set,
            "phase": np.where(checks.direction(table) < 0, 1 - half, half),
        }
        for column in ("x", "y", "m"):
            observed, nothing = getattr(part.data.experiment, column), np.full(len(table), np.nan)
            if any(column in misfit for misfit in found.misfit.values()):
                gap = nothing if observed is None else observed.estimate() - getattr(prediction, f"p_{column}")
                columns[f"gap_{column}"] = np.asarray(gap)[: len(table)]
                columns[f"misfit_{column}"] = found.misfit[name].get(column, nothing)
        parts.append(xr.Dataset({key: ("row", column) for key, column in columns.items()}))
    dataset = xr.concat(parts, dim="row")
    for key in dataset.data_vars:
        dataset[key].attrs["units"] = "1"
    return dataset

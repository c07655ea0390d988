"""The run of a fit, as other verbs take it with ``--from``: checked before anything is computed with it."""

import math
import os
from collections.abc import Mapping
from typing import Any

from experiments.config import ConfigError
from experiments.records import CONFIG, RESULT, OutputError, Run
from experiments.schema import Fit

_VERDICTS = ("identified", "weak", "not identified", "at bound", "fixed")
# Of a correlation or of a box: what rounding may do to its ends.
_ROUNDING = 1e-6


def finished_fit(path: str | os.PathLike[str], platform: str | None = None) -> Run:
    """The run of a fit that found parameters, whose two files are whole and belong together.

    Args:
        path: the run folder.
        platform: of the configuration that goes on from there; None takes either.

    Raises:
        OutputError: it is no run folder, no fit, its search failed, a file of it is damaged or belongs to another fit,
            or its device is of the other platform.
    """
    try:
        run = Run(path)
    except ConfigError as error:
        raise OutputError(f"{str(error).rstrip('.')}; this is the configuration of a fit: fit again.") from None
    if run.result.get("kind") != "fit" or not run.result.get("parameters"):
        raise OutputError(f"{path}: this run is no fit with parameters; name the folder of a fit that ended well.")
    device = run.config.device.platform
    if platform is not None and device != platform:
        raise OutputError(
            f"{run.path / CONFIG}: device.platform is '{device}', but the configuration that goes on from this fit has "
            f"'{platform}'; name a fit of that platform, or set device.platform = '{device}'."
        )
    if run.config.fit is None:
        raise OutputError(f"{run.path / CONFIG}: the table [fit] is missing, so nothing was fitted; fit again.")
    if wrong := _wrong(run.result, run.config.fit):
        raise OutputError(f"{run.path / RESULT}: {wrong}; fit again.")
    if found := _of_another(run.result, run.config.fit):
        raise OutputError(f"{run.path / CONFIG}: {found} in {RESULT}, so the two are of different fits; fit again.")
    return run


def _wrong(result: Mapping[str, Any], fit: Fit) -> str:
    """What is damaged in the result of a fit; empty when nothing is."""
    parameters = result["parameters"]
    if not isinstance(parameters, dict):
        return f"parameters is {_shown(parameters)}, but must be a table of parameters by name"
    for name, one in parameters.items():
        if not isinstance(one, dict):
            return f"parameters.{name} is {_shown(one)}, but must be a table with value, std and verdict"
        if one.get("verdict") not in _VERDICTS:
            return f"parameters.{name}.verdict {_is(one, 'verdict')}, but must be one of {', '.join(_VERDICTS)}"
        for key in ("value", "std"):
            if not _number(one.get(key)) and not (one["verdict"] == "fixed" and one.get(key) is None):
                return f"parameters.{name}.{key} {_is(one, key)}, but must be a finite number"
        if one["verdict"] != "fixed" and one["std"] < 0:
            return f"parameters.{name}.std is {one['std']:g}, but must not be negative"
    free = [name for name, one in parameters.items() if one["verdict"] != "fixed"]
    if not free:
        return f"this fit found no parameters ({result.get('status')})"
    correlation = result.get("correlation")
    if not isinstance(correlation, dict):
        return f"correlation {_is(result, 'correlation')}, but must be a table with names and matrix"
    names, matrix = correlation.get("names"), correlation.get("matrix")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or sorted(names) != sorted(free):
        return f"correlation.names {_is(correlation, 'names')}, but must name the free ones of parameters, each once"
    square = isinstance(matrix, list) and len(matrix) == len(names)
    if not square or not all(isinstance(row, list) and len(row) == len(names) for row in matrix):
        return f"correlation.matrix {_is(correlation, 'matrix')}, but must be {len(names)} rows of {len(names)} numbers"
    for k, row in enumerate(matrix):
        for j, one in enumerate(row):
            if not _number(one) or abs(one) > 1 + _ROUNDING:
                return f"correlation.matrix.{k}.{j} is {_shown(one)}, but must be a number between -1 and 1"
    for name in free:
        low, high = fit.free.get(name.partition("@")[0], (-math.inf, math.inf))
        value, edge = parameters[name]["value"], _ROUNDING * (high - low) if math.isfinite(high - low) else 0.0
        if not low - edge <= value <= high + edge:
            return f"parameters.{name}.value is {value:g}, which lies outside its box [{low:g}, {high:g}] in {CONFIG}"
    return ""


def _of_another(result: Mapping[str, Any], fit: Fit) -> str:
    """What the configuration frees and the result does not have, or the other way round; empty when they agree."""
    found = {name.partition("@")[0] for name, one in result["parameters"].items() if one["verdict"] != "fixed"}
    if missing := [name for name in fit.free if name not in found]:
        return f"fit.free.{missing[0]} was not found free"
    if more := [name for name in sorted(found) if name not in fit.free]:
        return f"fit.free has no {more[0]}, which was found free"
    return ""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is(table: Mapping[str, Any], key: str) -> str:
    return f"is {_shown(table[key])}" if key in table else "is missing"


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"

"""The report of a run: one HTML file with its figures inside, drawn from the saved run folder alone.

`write` is called by every pipeline when its results are saved; `rewrite` does the same to a finished run. Whatever a
failed run lacks is left out.
"""

import base64
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from calibration.formats import write_atomic
from experiments import control_plots, plots, reproduce_plots, transfer_plots, trap_plots
from experiments.listings import captions, listing
from experiments.records import ARRAYS, CONFIG, FIGURES, REPORT, Run, RunFolder

_TEMPLATES = Path(__file__).parent / "templates"
# What a target's number is called for readers.
_QUANTITIES = {
    "obedience_rms": "rms of y − (1 − r_set) x_set",
    "area": "loop area",
    "form_factor": "form factor of the loop",
    "saturation": "largest output of the loop",
    "curve_rms": "rms distance from the wanted loop",
    "lost_in_hold": "rms change of y while it is held",
    "weighted_sum": "weighted sum of the terms",
}
_TITLES = {
    "fit": "Calibration",
    "simulate": "Simulation",
    "optimize": "Pulse design",
    "track": "Tracking",
    "check": "Check of the model",
    "coverage": "Coverage of intervals",
    "design": "Next measurement",
    "predict": "Prediction",
    "trap": "Trap, chain and modes",
    "reproduce": "Reproduced numbers",
    "transfer": "Transfer between platforms",
}


class Picture(NamedTuple):
    """A figure with its file name, title and caption."""

    name: str
    title: str
    caption: str
    figure: Figure


def write(out: RunFolder) -> None:
    """Write the figures and ``report.html`` of a run whose result and arrays are saved."""
    _write(out.work)


def rewrite(run: str | os.PathLike[str]) -> None:
    """Write the figures and ``report.html`` of a finished run again.

    Args:
        run: the run folder.

    Raises:
        OutputError: it is no run folder, or one of its files is damaged.
    """
    _write(Path(run))


def _write(folder: Path) -> None:
    run = Run(folder)
    columns = {str(k): v.values for k, v in run.arrays.variables.items()} if (folder / ARRAYS).is_file() else {}
    shown = []
    (folder / FIGURES).mkdir(exist_ok=True)
    for picture in pictures(run, columns):
        data = plots.svg(picture.figure)
        write_atomic(folder / FIGURES / f"{picture.name}.svg", data)
        shown.append({**picture._asdict(), "uri": "data:image/svg+xml;base64," + base64.b64encode(data).decode()})
    write_atomic(folder / REPORT, _html(run, shown).encode())


def pictures(run: Run, columns: Mapping[str, np.ndarray]) -> Iterator[Picture]:
    """The figures that what was saved allows.

    Args:
        run: the run folder.
        columns: the arrays of ``arrays.nc`` by name.
    """
    result = run.result
    if {"p_x", "p_y", "x_measured", "y_measured"} <= set(columns):
        model = "fitted twin" if result.get("kind") == "fit" else "twin"
        yield Picture(
            "loops",
            "Hysteresis loops",
            f"Points: what was measured, with standard errors. Line: the {model}; arrows show the order of the cycles.",
            plots.loops(columns, model),
        )
    if result.get("kind") == "predict":
        yield Picture(
            "bands",
            "Predicted loops",
            "Line: the input x and output y of the twin, as fractions read as s. Band: 95 %, what the calibration left "
            "open; shot noise comes on top.",
            plots.bands(columns),
        )
    if {"residual_x", "residual_y"} <= set(columns):
        yield Picture(
            "residuals",
            "Residuals",
            "Measured minus model in units of the standard error. 95 % of the points belong into the grey band, "
            "without a trend.",
            plots.residuals(columns),
        )
    free = run.config.fit.free if run.config.fit else {}
    # NAME@TABLE and NAME@ION have the box of NAME.
    bases = {name: name.partition("@")[0] for name in result.get("parameters", {})}
    boxes = {name: free[base] for name, base in bases.items() if base in free}
    if result.get("kind") == "fit" and boxes:
        yield Picture(
            "intervals",
            "Parameters in their prior boxes",
            "Black mark: estimate. Coloured bar: 95 % interval. Grey bar: the prior box.",
            plots.intervals(result["parameters"], boxes),
        )
    units = {name: str(one.get("unit", "")) for name, one in result.get("parameters", {}).items()}
    curves = {
        name.removeprefix("profile_"): (values, columns[f"deviance_{name.removeprefix('profile_')}"])
        for name, values in columns.items()
        if name.startswith("profile_")
    }
    if curves:
        yield Picture(
            "profiles",
            "Profile likelihoods",
            "Twice the log-likelihood lost where one parameter is held and all others are fitted again. The 95 % "
            "interval lies below the dashed line.",
            plots.profiles(curves, units),
        )
    if "posterior" in columns:
        draws = np.asarray(columns["posterior"])
        names = list(result["uncertainty"]["names"])
        yield Picture(
            "posterior",
            "Posterior",
            "Marginals with median and central 95 % interval (grey)"
            + ("; last: draws of the two parameters that are tied the most." if len(names) > 1 else "."),
            plots.posterior(names, draws.reshape(-1, draws.shape[-1]), units),
        )
    matrix = np.array(result.get("correlation", {}).get("matrix", ()), float)
    if len(matrix) > 1:
        yield Picture(
            "correlation",
            "Correlations",
            "Parameters with a correlation near ±1 can move together at little cost.",
            plots.correlation(result["correlation"]["names"], matrix),
        )
    if result.get("kind") == "optimize":
        yield from _control_pictures(result, columns)
    if result.get("kind") == "check":
        yield from _check_pictures(result, columns)
    if result.get("kind") == "trap":
        yield from (Picture(*picture) for picture in trap_plots.pictures(result, columns))
    if result.get("kind") == "reproduce":
        yield from (Picture(*picture) for picture in reproduce_plots.pictures(result, columns))
    if result.get("kind") == "transfer":
        yield from (Picture(*picture) for picture in transfer_plots.pictures(result, columns))
    stages = result.get("history")
    stages = {"search": stages} if isinstance(stages, list) else stages or {}
    if any(stages.values()):
        quantity = "log-likelihood (nats)" if result.get("kind") == "fit" else "objective"
        yield Picture(
            "history",
            "Convergence",
            "Distance of the best value from the final one, stage by stage.",
            plots.history(stages, quantity),
        )
    if result.get("kind") == "track" and "estimate" in columns:
        yield Picture(
            "drift",
            "Estimates loop by loop",
            "Line and band: the filter's estimate and its 95 % interval. Grey: the reference. Triangles: the twin "
            "should be calibrated again. Crosses: bad tables, which move nothing.",
            plots.drift(columns),
        )


def heading(run: Run) -> str:
    """The title of a report: the kind of run, and of what."""
    kind = run.result.get("kind", "")
    title = _TITLES.get(kind, "Run")
    if kind == "reproduce":
        return f"{title}: {', '.join(run.result['names'])}"
    if kind in ("transfer", "trap"):
        return title
    # The twin of a prediction is that of its file, not of the configuration of the run.
    platform = "" if kind == "predict" else {"ion": "ion ", "photonic": "photonic "}[run.config.device.platform]
    return f"{title} of {'an' if platform == 'ion ' else 'a'} {platform}memristor twin"


def verdict(result: Mapping[str, Any]) -> str:
    """The outcome of a run in one paragraph."""
    kind, status = result.get("kind"), str(result.get("status", "unknown"))
    parts = [f"Status: {status}."]
    if kind == "fit" and result.get("log_likelihood") is not None:
        parts.append(_fit_in_words(result))
    if kind == "simulate":
        methods = sorted({loop["method"] for loop in result["loops"].values()})
        errors = [loop["error_estimate"] for loop in result["loops"].values() if loop["error_estimate"] is not None]
        bound = f", populations to {max(errors):.0e}" if errors else ""
        many = "loop" if len(result["loops"]) == 1 else "loops"
        parts.append(f"{len(result['loops'])} {many} of the device as configured, by {' and '.join(methods)}{bound}.")
    if kind == "check":
        parts += result.get("sentences", [])[:1]
    if kind == "optimize":
        parts += _design_in_words(result)
    if kind == "coverage":
        held = sum(row["verdict"] == "holds" for row in result["rows"])
        parts.append(f"{held} of {len(result['rows'])} rows hold what 95 % intervals promise.")
    if kind == "reproduce":
        passed = sum(row["verdict"] == "pass" for row in result["rows"])
        parts.append(f"{passed} of {len(result['rows'])} numbers are within their tolerance.")
        parts.append("Origin of what is expected: published, stated by a paper or by published code; exact, a law in "
                     "closed form; derived here, computed by this project before.")  # fmt: skip
    if kind == "predict":
        parts.append(f"{result['rows']} cycles; the widest 95 % band of y is {result['largest_band']:.2g}.")
    if kind in ("design", "trap", "transfer"):
        parts += result["notes"][:1]
    if kind == "track":
        parts.append(f"After {len(result['tables'])} tables: {result['verdict']}.")
    return " ".join(parts)


def _fit_in_words(result: Mapping[str, Any]) -> str:
    verdicts = [one["verdict"] for one in result["parameters"].values() if one["verdict"] != "fixed"]
    counts = {v: verdicts.count(v) for v in dict.fromkeys(verdicts)}
    found = [f"{count} {'is' if count == 1 else 'are'} {v}" for v, count in counts.items()]
    dof = result["n_data"] - result["n_free"]
    chi2 = result.get("chi2_per_dof")
    if chi2 is None:
        return f"There are too few data for a χ². Of {len(verdicts)} free parameters, {', '.join(found)}."
    spread = math.sqrt(2 / dof)
    fits = "as it should be" if abs(chi2 - 1) < 3 * spread else "which the model does not explain"
    return (
        f"χ²/dof = {chi2:.3f}, where 1 ± {spread:.3f} is expected: {fits} ({result['n_data']} measurements, "
        f"{result['n_free']} free parameters). Of the parameters, {', '.join(found)}."
    )


def _design_in_words(result: Mapping[str, Any]) -> list[str]:
    parts = []
    for one in _metrics(result):
        recomputed = f" (recomputed: {number(one['recomputed'])})" if one.get("recomputed") is not None else ""
        parts.append(f"{one['name']}: {number(one['before'])} before, {number(one['after'])} after{recomputed}.")
    stuck = [name for name, one in result.get("commands", {}).items() if one.get("at_bound")]
    if stuck:
        parts.append(f"At their bounds: {', '.join(stuck)}.")
    return parts


def _metrics(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a pulse design improved."""
    if "metric" not in result:
        return []
    metric = result["metric"]
    return [{**metric, "name": _QUANTITIES.get(metric["name"], metric["name"])}]


def _intervals(result: Mapping[str, Any]) -> dict[str, Any]:
    """Methods, and for each parameter the interval of each, in a unit that suits it."""
    methods = result.get("intervals", {})
    if not methods:
        return {}
    rows = {}
    for name, one in result["parameters"].items():
        if name not in methods["laplace"]:
            continue
        ends = {m: found[name] for m, found in methods.items() if name in found}
        flat = {f"{m}_{k}": end for m, pair in ends.items() for k, end in enumerate(pair)}
        scaled = _readable({"unit": one["unit"], "std": one["std"], **flat})
        rows[name] = {
            "unit": scaled["unit"],
            "std": scaled["std"],
            "ends": [[scaled[f"{m}_0"], scaled[f"{m}_1"]] if m in ends else None for m in methods],
        }
    return {"methods": list(methods), "rows": rows}


def _readable(one: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a row, those in seconds in the unit that suits the largest of them."""
    rows = {key: value for key, value in one.items() if isinstance(value, float | int) and not isinstance(value, bool)}
    largest = max((abs(value) for value in rows.values()), default=0.0)
    if one.get("unit") != "s" or not 0 < largest < 1:
        return dict(one)
    scale, unit = (1e3, "ms") if largest >= 1e-3 else (1e6, "µs") if largest >= 1e-6 else (1e9, "ns")
    scaled: dict[str, Any] = {key: float(f"{value * scale:.14g}") for key, value in rows.items()}
    if "ci95" in one:
        scaled["ci95"] = [None if value is None else value * scale for value in one["ci95"]]
    return {**one, **scaled, "unit": unit}


def number(value: Any, std: Any = None) -> str:
    """A number for reading: down to the second digit of its standard error, else five digits."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    text = f"{value:.5g}"
    if std and value:
        last = math.floor(math.log10(std)) - 1  # power of ten of the last digit that is worth reading
        digits = max(1, math.floor(math.log10(abs(value))) - last + 1)
        text = f"{value:.{max(0, -last)}f}" if 1e-3 <= abs(value) < 1e7 else f"{value:.{digits}g}"
    return text.replace("-", "−")


def _code(sentence: str) -> Markup:
    """A sentence with its `names` as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(sentence))))


def _valid(result: Mapping[str, Any]) -> bool:
    """Whether a tracked twin still is."""
    tracked = result.get("tables", []) if result.get("kind") == "track" else []
    return not tracked or tracked[-1]["verdict"] == "still valid"


def _html(run: Run, shown: list[dict[str, Any]]) -> str:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "code": _code}
    result = run.result
    parameters = result.get("parameters", {}) if result.get("kind") == "fit" else {}
    status = str(result.get("status", "unknown"))
    return environment.get_template("report.html.j2").render(
        title=heading(run),
        good=(status in ("converged", "done") or status.startswith("stopped: "))
        and not result.get("rejected", False)
        and _valid(result),
        verdict=verdict(result),
        result=result,
        parameters={name: _readable(one) for name, one in parameters.items() if one["verdict"] != "fixed"},
        fixed={name: _readable(one) for name, one in parameters.items() if one["verdict"] == "fixed"},
        commands={name: _readable(one) for name, one in result.get("commands", {}).items()},
        metrics=_metrics(result),
        loops=result.get("loops", {}),
        basins=result.get("basins", [])[:6],
        tracked=result["tables"][-200:] if result.get("kind") == "track" else [],
        tests=result.get("tests", {}) if result.get("kind") == "check" else {},
        intervals=_intervals(result),
        listing=listing(result),
        captions=captions(result),
        notes=result.get("notes", []),
        pictures=shown,
        seconds={**result.get("seconds", {}), **result.get("seconds_by_stage", {})},
        config=(run.path / CONFIG).read_text(encoding="utf-8"),
        facts={
            key: result[key]
            for key in ("device", "precision", "seed", "from", "data_sha256")
            if result.get(key) is not None
        },
    )


def _check_pictures(result: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> Iterator[Picture]:
    """Residuals with their smooth part, and how much worse each rival predicts held-out loops."""
    if "misfit_y" in columns or "misfit_x" in columns:
        yield Picture(
            "shape",
            "Residuals against the phase of the input",
            "Measured minus model. Line: the smooth part that the test of shape found, beyond what the parameters "
            "can take up. x_set rises over the left half of each panel and falls over the right one.",
            plots.misfit(columns),
        )
    if len(result.get("rivals", [])) > 1:
        yield Picture(
            "rivals",
            "Rival explanations",
            "Held-out log-likelihood of each model minus that of the best one, with two standard errors.",
            plots.rivals(result["rivals"]),
        )


def _control_pictures(result: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> Iterator[Picture]:
    quantity = _metrics(result)[0]["name"]
    if "rabi_1_before_hz" in columns:
        yield Picture("pulses", "Pulses", "Rabi frequencies of both pulses at full transfer, before and after.",
                      control_plots.pulses(columns))  # fmt: skip
    if "frequency_hz" in columns:
        yield Picture("spectra", "Spectra", "Spectra of the samples at full transfer, each relative to its largest "
                      "value.", control_plots.spectra(columns))  # fmt: skip
    if "error_before" in columns:
        maps = (columns[name] for name in ("x_set", "r_set", "error_before", "error_after"))
        yield Picture("errors", "What the device does with its commands", "Output minus command over the square of "
                      "commands.", control_plots.error_maps(*maps))  # fmt: skip
    if "y_before" in columns:
        yield Picture("loop", "The loop", "One period, before and after.", control_plots.loops_before_after(columns))
    if "robustness_before" in columns:
        yield Picture("robustness", "Robustness", "The target where the laser is not as calibrated: both Rabi "
                      "frequencies follow the root of its power, both detunings its frequency.",
                      control_plots.robustness(columns, quantity))  # fmt: skip
    again = (result.get("robust") or {}).get("recalibrated")
    if again:
        yield Picture("members", "What is lost by not knowing better", "Devices that the calibration cannot tell "
                      "apart: under the common pulses, and under pulses searched for each as if it were known.",
                      control_plots.members(np.array(again["common"]), np.array(again["own"]), quantity))  # fmt: skip
    if "map_theta_1" in columns:
        yield Picture("command_map", "Command map", "Pulse areas that really give what is wanted, pi being full "
                      "command; the table and its polynomial are in command_map.csv and .nc.",
                      control_plots.command_map(columns))  # fmt: skip

"""Figures of a run, drawn from saved arrays alone: plain functions of arrays that return a Matplotlib figure.

Colours are those of Okabe and Ito, told apart with any colour vision; what differs in colour differs in marker or dash.
Figures are built without pyplot, so that drawing changes no global state.
"""

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
VERDICT_COLOURS = {"identified": GREEN, "weak": "#E69F00", "not identified": ORANGE, "at bound": "#CC79A7"}

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "svg.hashsalt": "iontwin",  # the same run gives the same bytes
}
_PANEL_IN = 3.4  # width of one panel
_COLUMNS = 3
_CHI2_95 = 3.841458820694124  # quantile of chi2 with one degree of freedom

P = ParamSpec("P")
T = TypeVar("T")
Columns = Mapping[str, np.ndarray]


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """The function in our style, which its caller's settings neither see nor change."""

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
            return draw(*args, **kwargs)

    return wrapped


@styled
def svg(figure: Figure) -> bytes:
    """The figure as SVG, without a date."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def figure_of(panels: int, height_in: float, width_in: float = _PANEL_IN, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, at most three side by side."""
    across = min(panels, _COLUMNS)
    down = math.ceil(panels / across)
    figure = Figure(figsize=(width_in * across, height_in * down), layout="constrained")
    axes = np.atleast_1d(figure.subplots(down, across, **options)).ravel().tolist()
    for spare in axes[panels:]:
        spare.remove()
    for ax in axes[:panels]:
        ax.grid(True)
    return figure, axes[:panels]


def _each_loop(columns: Columns, *names: str) -> list[tuple[str, Columns]]:
    """The named columns of each loop, in the order in which the loops first appear."""
    labels = np.asarray(columns["loop"]).astype(str)
    return [
        (label, {name: np.asarray(columns[name])[labels == label] for name in names})
        for label in dict.fromkeys(labels.tolist())
    ]


def arrows(ax: Axes, x: np.ndarray, y: np.ndarray, colour: str, count: int = 11) -> None:
    """Heads along a curve that show the direction of time."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    length = np.hypot(np.diff(x), np.diff(y))
    if length.sum() == 0:
        return
    # Evenly spaced along the curve, each on the step that holds its place.
    along = np.cumsum(length)
    steps = np.unique(np.searchsorted(along, along[-1] * (np.arange(count) + 0.5) / count))
    for k in steps:
        head = {"arrowstyle": "-|>,head_length=0.55,head_width=0.28", "color": colour, "lw": 0.5, "mutation_scale": 12}
        ax.annotate("", (x[k + 1], y[k + 1]), (x[k], y[k]), arrowprops={**head, "shrinkA": 0, "shrinkB": 0}, zorder=4)


@styled
def loops(columns: Columns, model: str = "fitted twin") -> Figure:
    """Each hysteresis loop: measured points with error bars over the loop of the model.

    Args:
        columns: one value a row: `loop`, `p_x`, `p_y`, and `x_measured`, `x_error`, `y_measured`, `y_error` (NaN where
            not measured; a point without its x stands at the x of the model).
        model: what the line is called.
    """
    groups = _each_loop(columns, "p_x", "p_y", "x_measured", "x_error", "y_measured", "y_error")
    figure, axes = figure_of(len(groups), 3.5, sharex=True, sharey=True)
    for ax, (label, rows) in zip(axes, groups, strict=True):
        x, y = rows["p_x"], rows["p_y"]
        measured = np.isfinite(rows["y_measured"])
        if measured.any():
            has_x = np.isfinite(rows["x_measured"])
            ax.errorbar(
                np.where(has_x, rows["x_measured"], x)[measured],
                rows["y_measured"][measured],
                xerr=np.where(has_x, rows["x_error"], 0.0)[measured],
                yerr=rows["y_error"][measured],
                fmt="o", ms=3, lw=0.8, color=ORANGE, alpha=0.75, label="measured, ± one standard error", zorder=2,
            )  # fmt: skip
        ax.plot(x, y, color=BLUE, lw=1.3, label=model, zorder=3)
        arrows(ax, x, y, BLUE)
        ax.set(title=f"loop {label}", xlabel="input x (fraction read as s)", ylabel="output y (fraction read as s)")
        ax.label_outer()
    axes[0].legend(loc="upper left", fontsize=8)
    return figure


@styled
def bands(columns: Columns) -> Figure:
    """Predicted input and output of each loop, cycle by cycle, with their 95 % bands.

    Args:
        columns: one value a row: `loop`, `cycle`, and `p_`, `_low` and `_high` of x and y.
    """
    names = ("cycle", "p_x", "x_low", "x_high", "p_y", "y_low", "y_high")
    groups = _each_loop(columns, *names)
    figure, axes = figure_of(len(groups), 3.0, sharey=True)
    for ax, (label, rows) in zip(axes, groups, strict=True):
        for name, colour in (("x", BLUE), ("y", ORANGE)):
            ax.fill_between(rows["cycle"], rows[f"{name}_low"], rows[f"{name}_high"], color=colour, alpha=0.3, lw=0)
            ax.plot(rows["cycle"], rows[f"p_{name}"], color=colour, lw=1.0, label=name)
        ax.set(title=f"loop {label}", xlabel="cycle", ylabel="fraction read as s")
        ax.label_outer()
    axes[0].legend(loc="upper left", fontsize=8)
    return figure


@styled
def residuals(columns: Columns) -> Figure:
    """Standardized residuals of x and y against the cycle, for each loop.

    Args:
        columns: one value a row: `loop`, `cycle`, `residual_x`, `residual_y` (NaN where not measured).
    """
    groups = _each_loop(columns, "cycle", "residual_x", "residual_y")
    figure, axes = figure_of(len(groups), 2.8, sharey=True)
    for ax, (label, rows) in zip(axes, groups, strict=True):
        ax.axhspan(-1.96, 1.96, color="#eeeeee", zorder=0)
        ax.axhline(0, color=GREY, lw=0.8)
        for name, colour, marker in (("x", GREEN, "s"), ("y", BLUE, "o")):
            values = rows[f"residual_{name}"]
            if np.isfinite(values).any():
                ax.plot(rows["cycle"], values, marker, ms=2.8, color=colour, label=name, alpha=0.85)
        ax.set(title=f"loop {label}", xlabel="cycle", ylabel="residual / standard error")
        ax.label_outer()
        ax.xaxis.set_tick_params(labelbottom=True)
    axes[0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize=8, borderpad=0)
    return figure


@styled
def correlation(names: Sequence[str], matrix: np.ndarray) -> Figure:
    """Correlations of the estimates as a coloured and numbered matrix.

    Args:
        names: parameters.
        matrix: shape (parameters, parameters).
    """
    n = len(names)
    figure, (ax,) = figure_of(1, 1.0 + 0.48 * n, 2.2 + 0.62 * n)
    ax.grid(False)
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for i in range(n):
        for j in range(n):
            value = matrix[i, j]
            text = "–" if not np.isfinite(value) else f"{value:+.2f}" if i != j else "1"
            ax.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if abs(value) > 0.6 else "black")
    ax.set_xticks(range(n), names, rotation=40, ha="right")
    ax.set_yticks(range(n), names)
    ax.spines[:].set_visible(False)
    figure.colorbar(image, ax=ax, label="correlation")
    return figure


@styled
def intervals(parameters: Mapping[str, Mapping[str, Any]], boxes: Mapping[str, Sequence[float]]) -> Figure:
    """Each estimate with its 95 % interval within its prior box, the box drawn from 0 to 1.

    Args:
        parameters: {name: {"value", "ci95", "unit", "verdict"}}.
        boxes: {name: (low, high)}.
    """
    names = [name for name in parameters if name in boxes]
    figure, (ax,) = figure_of(1, 1.0 + 0.42 * len(names), 7.6)
    seen = set()
    for row, name in enumerate(names):
        one, (low, high) = parameters[name], boxes[name]
        place, (a, b) = ((np.asarray(v, float) - low) / (high - low) for v in (one["value"], one["ci95"]))
        colour = VERDICT_COLOURS.get(one["verdict"], GREY)
        ax.plot([0, 1], [row, row], color="#cccccc", lw=7, solid_capstyle="butt", zorder=1)
        label = one["verdict"] if one["verdict"] not in seen else None
        seen.add(one["verdict"])
        ax.plot([a, b], [row, row], color=colour, lw=3, solid_capstyle="butt", zorder=2, label=label)
        ax.plot([place], [row], "|", ms=13, mew=1.2, color="black", zorder=3)
        ax.text(-0.015, row, f"{low:g}", ha="right", va="center", fontsize=8)
        ax.text(1.015, row, f"{high:g} {one['unit']}".rstrip(), ha="left", va="center", fontsize=8)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", pad=38, length=0)
    ax.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5), xlabel="place in the prior box")
    ax.spines[:].set_visible(False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=8)
    return figure


def _label(name: str, units: Mapping[str, str]) -> tuple[str, float]:
    """A parameter with its unit, and the factor to it; times are drawn in microseconds."""
    unit = units.get(name, "")
    return (f"{name} (µs)", 1e6) if unit == "s" else (f"{name} ({unit})" if unit else name, 1.0)


@styled
def profiles(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], units: Mapping[str, str]) -> Figure:
    """Deviance against the held value of each profiled parameter, with the line that bounds the 95 % interval.

    Args:
        curves: {name: (values, deviance)}.
        units: {name: unit}.
    """
    figure, axes = figure_of(len(curves), 2.7, sharey=True)
    for ax, (name, (values, deviance)) in zip(axes, curves.items(), strict=True):
        ax.axhline(_CHI2_95, color=ORANGE, lw=1, ls="--", label="95 %: 3.84")
        label, scale = _label(name, units)
        ax.plot(scale * np.asarray(values), deviance, "o-", ms=3, lw=1.2, color=BLUE)
        ax.set(ylabel="deviance", ylim=(-0.3, 10))
        ax.label_outer()
        ax.set_xlabel(label)
        ax.xaxis.set_tick_params(labelbottom=True)
        ax.xaxis.set_major_locator(MaxNLocator(4))
    axes[0].legend(loc="upper center", fontsize=8)
    return figure


@styled
def posterior(names: Sequence[str], draws: np.ndarray, units: Mapping[str, str]) -> Figure:
    """Marginal of each parameter, and the draws of the pair that is tied the most.

    Args:
        names: parameters.
        draws: shape (draws, parameters).
        units: {name: unit}.
    """
    named, scales = zip(*(_label(name, units) for name in names), strict=True)
    draws = np.asarray(draws) * scales
    panels = len(names) + (len(names) > 1)
    figure, axes = figure_of(panels, 2.5)
    for ax, label, values in zip(axes, named, draws.T, strict=False):
        low, middle, high = np.quantile(values, [0.025, 0.5, 0.975])
        ax.hist(values, bins=40, density=True, color=BLUE, alpha=0.35, histtype="stepfilled")
        ax.axvspan(low, high, color="#eeeeee", zorder=0)
        ax.axvline(middle, color=BLUE, lw=1.2)
        ax.set(xlabel=label, yticks=[])
    if len(names) > 1:
        matrix = np.abs(np.corrcoef(draws.T)) - np.eye(len(names))
        i, j = sorted(int(k) for k in np.unravel_index(np.nanargmax(matrix), matrix.shape))
        some = draws[:: max(1, len(draws) // 2000)]
        axes[-1].plot(some[:, i], some[:, j], ".", ms=2, alpha=0.4, color=ORANGE, rasterized=True)
        axes[-1].set_xlabel(named[i])
        axes[-1].set_ylabel(named[j], fontsize=8)
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(4))
    return figure


@styled
def history(stages: Mapping[str, Sequence[float | None]], quantity: str) -> Figure:
    """How far the best value still was from the final one, as the search went on.

    Args:
        stages: {stage: best value after each report}, in order.
        quantity: what the value is, with its unit.
    """
    figure, (ax,) = figure_of(1, 3.0, 6.0)
    numbers = {name: np.array([np.nan if v is None else v for v in values], float) for name, values in stages.items()}
    finite = [v for values in numbers.values() for v in values[np.isfinite(values)]]
    final = finite[-1] if finite else 0.0
    done = 0
    for (name, values), colour, marker in zip(
        numbers.items(), (BLUE, ORANGE, GREEN, GREY) * 3, "osD^" * 3, strict=False
    ):
        ax.plot(
            done + np.arange(1, len(values) + 1), np.abs(values - final), marker + "-", ms=4, color=colour, label=name
        )
        done += len(values)
    distances = [d for v in finite if (d := abs(v - final)) > 0] or [1.0]
    ax.set_yscale("symlog", linthresh=max(min(distances), 1e-6 * max(distances)))
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="progress report", ylabel=f"|{quantity} − final|")
    ax.legend(fontsize=8)
    return figure


@styled
def drift(columns: Columns) -> Figure:
    """Tracked estimates with 95 % bands against the number of the loop, over the reference; alarms are marked.

    Args:
        columns: `loop`, `verdict`, `parameter`, `reference`, `reference_std`, and `estimate`, `std` of shape (tables,
            parameters).
    """
    names = [str(name) for name in columns["parameter"]]
    figure, axes = figure_of(len(names), 2.5, sharex=True)
    loop, verdict = np.asarray(columns["loop"]), np.asarray(columns["verdict"]).astype(str)
    for k, (ax, name) in enumerate(zip(axes, names, strict=True)):
        value, std = np.asarray(columns["estimate"])[:, k], np.asarray(columns["std"])[:, k]
        middle, width = float(columns["reference"][k]), 1.96 * float(columns["reference_std"][k])
        ax.axhspan(middle - width, middle + width, color="#eeeeee", zorder=0, label="reference, 95 %")
        ax.fill_between(loop, value - 1.96 * std, value + 1.96 * std, color=BLUE, alpha=0.2, lw=0, label="95 %")
        ax.plot(loop, value, "o-", ms=2.5, lw=1, color=BLUE, label="estimate")
        for what, colour, marker in (("recalibrate", ORANGE, "^"), ("data bad", GREY, "x")):
            at = verdict == what
            if at.any():
                ax.plot(loop[at], value[at], marker, ms=5, color=colour, label=what)
        ax.set(title=name, xlabel="loop")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(fontsize=7)
    return figure


@styled
def misfit(columns: Columns) -> Figure:
    """Residuals of each measured column against the phase of the input, with their smooth part.

    Args:
        columns: one value a row: `phase` in turns, and `gap_x`, `misfit_x`, `gap_y`, `misfit_y` where measured.
    """
    names = [name for name in ("x", "y", "m") if f"misfit_{name}" in columns]
    figure, axes = figure_of(len(names), 3.0, 4.4)
    for ax, name in zip(axes, names, strict=True):
        for (label, rows), colour, marker in zip(
            _each_loop(columns, "phase", f"gap_{name}", f"misfit_{name}"),
            (BLUE, ORANGE, GREEN, GREY) * 25, "osD^" * 25, strict=False,
        ):  # fmt: skip
            order = np.argsort(rows["phase"], kind="stable")
            phase = rows["phase"][order]
            ax.plot(phase, rows[f"gap_{name}"][order], marker, ms=2.5, color=colour, alpha=0.35)
            ax.plot(phase, rows[f"misfit_{name}"][order], color=colour, lw=1.3, label=f"loop {label}")
        ax.axhline(0, color="black", lw=0.6)
        ax.set(title=name, xlabel="phase of the input (turns)", ylabel="measured minus model")
    axes[0].legend(fontsize=8)
    return figure


@styled
def rivals(ranking: Sequence[Mapping[str, Any]]) -> Figure:
    """Held-out log-likelihood of each model minus that of the best one.

    Args:
        ranking: {"name", "difference", "error"} of each model, best first.
    """
    figure, (ax,) = figure_of(1, 1.0 + 0.4 * len(ranking), 6.6)
    places = np.arange(len(ranking))
    errors = [2 * one["error"] for one in ranking]
    ax.barh(places, [one["difference"] for one in ranking], xerr=errors, color=BLUE, ecolor=ORANGE, height=0.55)
    ax.set_yticks(places, [one["name"] for one in ranking])
    ax.invert_yaxis()
    ax.set_xscale("symlog", linthresh=10)
    ax.set(xlabel="held-out log-likelihood minus that of the best model (nats)")
    return figure

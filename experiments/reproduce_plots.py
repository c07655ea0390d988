"""Figures of reproduced numbers, drawn from saved arrays alone; `DRAWINGS` has one for each name."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.plots import BLUE, GREEN, GREY, ORANGE, Columns, arrows, figure_of, styled


class Drawing(NamedTuple):
    """How a name is drawn.

    Attributes:
        title, caption: in the report.
        draw: of the arrays of `experiments.reproduced.Reproduced`, by their own names.
    """

    title: str
    caption: str
    draw: Callable[[Columns], Figure]


def pictures(result: Mapping[str, Any], columns: Columns) -> Iterator[tuple[str, str, str, Figure]]:
    """Name, title, caption and figure of each name that was computed."""
    for name in result["names"]:
        prefix = f"{name.replace('-', '_')}__"
        own = {key.removeprefix(prefix): np.asarray(v) for key, v in columns.items() if key.startswith(prefix)}
        if own and name in DRAWINGS:
            drawing = DRAWINGS[name]
            yield name.replace("-", "_"), drawing.title, drawing.caption, drawing.draw(own)


@styled
def separated(columns: Columns) -> Figure:
    """RSD of y against the separation of the pulses.

    Args:
        columns: `separation_sigma`, `rsd_percent`; `given_separation_sigma`, `given_rsd_percent`.
    """
    figure, (ax,) = figure_of(1, 3.4, 4.8)
    ax.semilogy(columns["separation_sigma"], columns["rsd_percent"], color=BLUE, label="integrated again")
    ax.plot(columns["given_separation_sigma"], columns["given_rsd_percent"], "o", color=ORANGE, ms=5, mfc="none",
            label="our earlier integration")  # fmt: skip
    ax.axhline(0.03, color=GREY, ls="--", lw=1, label="0.03 %, as stated by the papers")
    ax.set(xlabel="separation of the pulses (σ)", ylabel="RSD of y (%)", ylim=(1e-8, 2e2))
    ax.legend()
    return figure


@styled
def simultaneous(columns: Columns) -> Figure:
    """P_s over both areas, for both starts.

    Args:
        columns: `theta_1`, `theta_2`, `p_s_from_v`, `p_s_from_s`, shape (areas, areas).
    """
    figure, axes = figure_of(2, 3.2, 3.6, sharey=True, sharex=True)
    image = None
    for ax, start in zip(axes, "vs", strict=True):
        ax.grid(False)
        x, y = columns["theta_1"] / np.pi, columns["theta_2"] / np.pi
        image = ax.pcolormesh(x, y, columns[f"p_s_from_{start}"], vmin=0, vmax=1, cmap="viridis", shading="nearest")
        ax.set(title=f"start in {start}", xlabel="area of pulse 1 (π)", ylabel="area of pulse 2 (π)")
        ax.label_outer()
    figure.colorbar(image, ax=axes, label="population of s")
    return figure


@styled
def photonic_loop(columns: Columns) -> Figure:
    """Loops of the ideal memristor, and their areas and form factors.

    Args:
        columns: `window`, `x`, `y` of shape (windows, points); `area_window`, `area`, `form_factor`.
    """
    figure, (left, right) = figure_of(2, 3.4, 4.2)
    shades = (GREY, BLUE, GREEN, ORANGE, "#CC79A7", "black")
    styles = ("-", "--", "-", "-.", "--", ":")
    for window, x, y, colour, style in zip(columns["window"], columns["x"], columns["y"], shades, styles, strict=False):
        left.plot(x, y, color=colour, ls=style, lw=1.3, label=f"{window:.3g}")
    left.set(xlabel="input x", ylabel="output y", title="loops")
    left.legend(title="T/T$_{osc}$", fontsize=8)
    t = np.linspace(1e-3, 1.6, 400)
    right.plot(t, np.pi / 8 * np.sin(np.pi * t) ** 2 / (np.pi * t), color=BLUE, label="(π/8) sin²φ/φ, φ = πT/T$_{osc}$")
    right.plot(columns["area_window"], columns["area"], "o", color=BLUE, label="area")
    right.plot(columns["area_window"], columns["form_factor"], "s", color=ORANGE, label="form factor 4πA/P²")
    right.set(xlabel="memory T/T$_{osc}$", ylabel="area, form factor", title="areas and form factors")
    right.legend(fontsize=8)
    return figure


@styled
def crossed_pair(columns: Columns) -> Figure:
    """Intra and inter loops of crossed pairs, and the form factor over memory and phase.

    Args:
        columns: `window`, `phase_rad` (pairs,); `x_a`, `x_b`, `y_a` (pairs, points); `map_window`, `map_phase_rad`,
            `map_form_factor` (phases, windows).
    """
    pairs = len(columns["window"])
    across = min(pairs, 3)
    rows = -(-pairs // across)
    figure = Figure(figsize=(3.4 * across, 3.2 * rows + 3.2), layout="constrained")
    # The map has a figure of its own: its colour bar would widen one column of the loops.
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(rows, 1)).ravel().tolist()
    grid = np.atleast_1d(upper.subplots(rows, across)).ravel().tolist()
    axes = grid[:pairs]
    for spare in grid[pairs:]:
        spare.remove()
    for k, ax in enumerate(axes):
        ax.grid(True)
        for name, colour, style, label in (("x_b", BLUE, "-", "over $x_B$"), ("x_a", ORANGE, "--", "over $x_A$")):
            x, y = columns[name][k], columns["y_a"][k]
            ax.plot(x, y, color=colour, ls=style, lw=1.3, label=label)
            arrows(ax, x, y, colour, 5)
        ax.set(title=f"T/T$_{{osc}}$ = {columns['window'][k]:g}, Φ = {columns['phase_rad'][k] / np.pi:.3g} π",
               xlabel="input", ylabel="output $y_A$", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))  # fmt: skip
    axes[0].legend(fontsize=8)
    ax = lower.subplots()
    ax.grid(False)
    levels = np.linspace(0, 1, 11)
    image = ax.contourf(columns["map_window"], columns["map_phase_rad"] / np.pi, columns["map_form_factor"], levels)
    at = np.unravel_index(np.argmax(columns["map_form_factor"]), columns["map_form_factor"].shape)
    ax.plot(columns["map_window"][at[1]], columns["map_phase_rad"][at[0]] / np.pi, "+", color="white", ms=9, mew=2)
    ax.set(title="form factor over $x_B$", xlabel="memory T/T$_{osc}$", ylabel="B leads by Φ (π)")
    lower.colorbar(image, ax=ax)
    return figure


@styled
def merlin_narma(columns: Columns) -> Figure:
    """Errors of MerLin's models against the memory of the memristor, and one prediction.

    Args:
        columns: `tau_cycles`, `error` of shape (tau, seeds); `merlin_tau_cycles`, `merlin_error`; `classical_error`,
            shape (models, seeds); `target`, `predicted`, shape (steps,).
    """
    figure, (left, right) = figure_of(2, 3.4, 4.6)
    error = columns["error"]
    left.errorbar(columns["tau_cycles"], error.mean(axis=1), error.std(axis=1), fmt="o-", color=BLUE, capsize=3,
                  label="memristor")  # fmt: skip
    left.plot(columns["merlin_tau_cycles"], columns["merlin_error"], "x", color="black", ms=9, label="MerLin")
    for name, errors, style in zip(("L", "Q", "L+M", "Q+M"), columns["classical_error"], ("-", "--", "-.", ":"),
                                   strict=True):  # fmt: skip
        left.axhline(errors.mean(), color=GREY, ls=style, lw=1.2, label=name)
    left.set(xscale="log", yscale="log", xlabel="τ (cycles)", ylabel="test MSE", ylim=(1.4e-5, 2e-3))
    left.legend(fontsize=8, ncols=2, loc="upper right")
    part = slice(-100, -40)
    steps = np.arange(len(columns["target"]))[part]
    right.plot(steps, columns["target"][part], color="black", lw=1.2, label="target")
    right.plot(steps, columns["predicted"][part], "o", color=BLUE, ms=4, mfc="none", label="read-out, τ = 5")
    right.set(xlabel="step", ylabel="y", title="part of the test")
    right.legend(fontsize=8)
    return figure


@styled
def fourth_power(columns: Columns) -> Figure:
    """What the models of x^4 say, and how the errors of the memristor scatter over its runs.

    Args:
        columns: `x`, `linear`, `no_memristor`, `memristor`, shape (points,); `first_test_x`; `error`, `best_error`.
    """
    figure, (left, right) = figure_of(2, 3.4, 4.6)
    x = columns["x"]
    left.plot(x, x**4, color="black", label="x⁴")
    for name, colour, style in (("linear", GREY, ":"), ("no_memristor", ORANGE, "--"), ("memristor", BLUE, "o")):
        left.plot(x, columns[name], style, color=colour, ms=3, label=name.replace("_", " "))
    left.axvline(columns["first_test_x"] - (x[1] - x[0]) / 2, color=GREY, lw=0.8)
    left.set(xlabel="x", ylabel="read-out", title="test: right of the line")
    left.legend(fontsize=8)
    error, best = columns["error"], columns["best_error"]
    bins = np.geomspace(error.min(), error.max(), 30)
    right.hist(error, bins, color=BLUE, alpha=0.5, label=f"{error.size} runs")
    right.hist(best, bins, color=ORANGE, label="best of ten")
    right.axvline(1.5e-3, color="black", ls="--", label="MerLin")
    right.set(xscale="log", xlabel="test MSE of the memristor", ylabel="runs")
    right.legend(fontsize=8)
    return figure


DRAWINGS: dict[str, Drawing] = {
    "separated-pulses": Drawing(
        "Separated pulses",
        "How far the closed form is from the integrated dynamics, against the separation.",
        separated,
    ),
    "simultaneous-pulses": Drawing("Simultaneous pulses", "Population of s after both pulses at once.", simultaneous),
    "photonic-loop": Drawing(
        "Loops of the ideal memristor",
        "Left: one period in the steady state. Right: line: closed form of the area; marks: expected values.",
        photonic_loop,
    ),
    "crossed-pair": Drawing(
        "Crossed memristors",
        "Loops of A over the input of B (line) and over its own (dashed), played as networks; arrows show the order of "
        "the cycles. Last: form factor of the former by the closed form; cross: the largest one of this grid.",
        crossed_pair,
    ),
    "merlin-narma": Drawing(
        "MerLin's NARMA task",
        "Left: errors against the memory; bars: one standard deviation over the seeds; x: as MerLin reports them. "
        "Right: target and read-out of one seed.",
        merlin_narma,
    ),
    "x4": Drawing(
        "MerLin's function task",
        "Left: the models, the memristor as the best of ten runs in a group of median best. Right: all runs, and the "
        "best of each ten.",
        fourth_power,
    ),
}

"""Figures of traps, chains and modes, drawn from saved arrays alone."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.plots import BLUE, GREEN, GREY, ORANGE, Columns, figure_of, styled

_COLOURS = {"x": BLUE, "y": ORANGE, "z": GREEN}
_MARKERS = {"x": "s", "y": "^", "z": "o"}


def pictures(result: Mapping[str, Any], columns: Columns) -> Iterator[tuple[str, str, str, Figure]]:
    """Name, title, caption and figure of what was saved."""
    if "pseudopotential_ev" in columns:
        yield ("pseudopotential", "Pseudopotential", "Energy of the ion across the trap; cross: the rf null, triangle: "
               "the saddle over which it leaves.", pseudopotential(columns, result))  # fmt: skip
    if result["trap"].get("q") is not None:
        yield ("stability", "Stability", "The first region of Mathieu's equation, and both radial axes of the trap in "
               "it.", stability(columns, result["trap"]))  # fmt: skip
    many = len(columns["position_m"]) > 1
    if many:
        yield "chain", "The chain", "Ions at rest; filled: memristors.", chain(columns)
    yield ("modes", "Modes", "Of every mode what a memristor feels, the largest of its ions and of both beams, and the "
           "mean phonon number.", modes(columns))  # fmt: skip
    if many:
        yield ("lamb_dicke", "Lamb-Dicke parameters", "Of each ion and mode, for both beams; modes along x, then y, "
               "then z, each by rising frequency.", lamb_dicke(columns))  # fmt: skip


@styled
def pseudopotential(columns: Columns, result: Mapping[str, Any]) -> Figure:
    """Energy across a surface trap.

    Args:
        columns: `x_m`, `y_m`, `pseudopotential_ev` of shape (y, x), `null_m`, `saddle_m`.
        result: for the depth.
    """
    figure, (ax,) = figure_of(1, 3.6, 4.8)
    x, y, energy = (np.asarray(columns[name]) for name in ("x_m", "y_m", "pseudopotential_ev"))
    depth = result["trap"]["more"].get("depth (eV)", float(np.nanmedian(energy)))
    levels = depth * np.array([0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.5, 2.5])
    ax.grid(False)
    image = ax.contourf(x * 1e6, y * 1e6, energy, levels=np.append(0, levels), cmap="viridis", extend="max")
    ax.contour(x * 1e6, y * 1e6, energy, levels=[depth], colors="white", linewidths=1)
    for name, marker in (("null_m", "x"), ("saddle_m", "^")):
        at = np.asarray(columns[name]) * 1e6
        ax.plot(*at, marker, color="white" if marker == "x" else ORANGE, ms=7, mew=2)
    ax.set(xlabel="along the surface x (µm)", ylabel="height y (µm)", aspect="equal")
    figure.colorbar(image, ax=ax, label="energy (eV)")
    return figure


@styled
def stability(columns: Columns, trap: Mapping[str, Any]) -> Figure:
    """The first stability region of Mathieu's equation with the radial axes of a trap.

    Args:
        columns: `edge_a`, `edge_low`, `edge_high`: the region between two q for each a.
        trap: `a` and `q` of each axis.
    """
    figure, (ax,) = figure_of(1, 3.2, 4.4)
    a, low, high = (np.asarray(columns[name]) for name in ("edge_a", "edge_low", "edge_high"))
    low = np.where(np.isfinite(low), low, 0.0)
    inside = np.isfinite(high)
    ax.fill_betweenx(a[inside], low[inside], high[inside], color=GREEN, alpha=0.18, lw=0, label="stable")
    for k, axis in enumerate("xy"):
        ax.plot(abs(trap["q"][k]), trap["a"][k], _MARKERS[axis], color=_COLOURS[axis], label=f"along {axis}", ms=6)
    ax.set(xlabel="|q|", ylabel="a", xlim=(0, 1.4), ylim=(-0.6, 0.9))
    ax.legend(fontsize=8, loc="upper right")
    return figure


@styled
def chain(columns: Columns) -> Figure:
    """Ions at rest along the axis."""
    z = np.asarray(columns["position_m"]) * 1e6
    memristor = np.asarray(columns["memristor"], bool)
    figure, (ax,) = figure_of(1, 1.5, 7.2)
    ax.plot(z, np.zeros_like(z), "-", color=GREY, lw=0.6)
    ax.plot(z[~memristor], np.zeros(np.sum(~memristor)), "o", mfc="white", color=BLUE, ms=7 if len(z) < 60 else 3)
    ax.plot(z[memristor], np.zeros(np.sum(memristor)), "o", color=BLUE, ms=7 if len(z) < 60 else 3)
    ax.set(xlabel="position z (µm)", yticks=[], ylim=(-1, 1))
    return figure


@styled
def modes(columns: Columns) -> Figure:
    """Spectrum of the modes: what is felt of each, and its occupation."""
    figure, axes = figure_of(2, 2.9, 3.7)
    frequency = np.asarray(columns["frequency_hz"]) / 1e6
    direction = np.asarray(columns["direction"]).astype(str)
    for axis in "xyz":
        own = direction == axis
        for ax, name in zip(axes, ("eta_felt", "n_bar"), strict=True):
            values = np.asarray(columns[name], float)[own]
            ax.vlines(frequency[own], 0, np.nan_to_num(values), color=_COLOURS[axis], lw=0.9)
            ax.plot(frequency[own], values, _MARKERS[axis], color=_COLOURS[axis], ms=4, label=f"along {axis}")
    axes[0].set(xlabel="frequency (MHz)", ylabel="Lamb-Dicke parameter felt", ylim=(0, None))
    axes[1].set(xlabel="frequency (MHz)", ylabel="mean phonon number", ylim=(0, None))
    axes[0].legend(fontsize=8)
    return figure


@styled
def lamb_dicke(columns: Columns) -> Figure:
    """Lamb-Dicke matrices of both beams."""
    figure, axes = figure_of(2, 3.0, 3.9, sharey=True)
    both = [np.asarray(columns[f"eta_{k}"]) for k in (1, 2)]
    largest = float(np.max(np.abs(both))) or 1.0
    for ax, eta, beam in zip(axes, both, (1, 2), strict=True):
        ax.grid(False)
        ions, count = eta.shape
        image = ax.pcolormesh(
            np.arange(1, count + 1), np.arange(1, ions + 1), eta, cmap="RdBu_r", vmin=-largest, vmax=largest,
            shading="nearest", rasterized=True,
        )  # fmt: skip
        for edge in (ions, 2 * ions):
            ax.axvline(edge + 0.5, color=GREY, lw=0.6)
        ax.set(title=f"beam {beam}", xlabel="mode", ylabel="ion")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.label_outer()
    figure.colorbar(image, ax=axes, label="Lamb-Dicke parameter")
    return figure

"""Figures of a move between platforms, drawn from saved arrays alone."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.listings import DESIGNED_ON
from experiments.plots import BLUE, GREEN, GREY, ORANGE, Columns, figure_of, styled

_COLOURS = {"image": GREY, "home": GREY, "moved": ORANGE, "data sheet": ORANGE, "recalibrated": BLUE, "native": GREEN}


def pictures(result: Mapping[str, Any], columns: Columns) -> Iterator[tuple[str, str, str, Figure]]:
    """Name, title, caption and figure of what was saved."""
    if "y_image" in columns:
        yield ("images", "The loop of the device and of its image", "One period without shots; right: output of the "
               "device minus that of its image.", images(columns))  # fmt: skip
    if len(result.get("remainder", {}).get("without", ())) > 0:
        yield ("remainder", "What is not carried over", "Difference of device and image over the square of commands, "
               "with one imperfection alone.", remainder(result["remainder"]["populations"]))  # fmt: skip
    if result.get("control"):
        yield ("losses", "Loss of control by what it was designed on", "Points: seeds. Bar: mean with its 95 % "
               f"interval. {DESIGNED_ON}", losses(result, columns))  # fmt: skip


@styled
def images(columns: Columns) -> Figure:
    """Both loops, and their difference against the cycle.

    Args:
        columns: `x_device`, `y_device`, `x_image`, `y_image`, one period each.
    """
    figure, (left, right) = figure_of(2, 3.2, 3.9)
    for name, colour, dash in (("device", BLUE, "-"), ("image", ORANGE, "--")):
        left.plot(columns[f"x_{name}"], columns[f"y_{name}"], dash, color=colour, label=name)
    left.set(xlabel="input x", ylabel="output y")
    left.legend(fontsize=8)
    right.axhline(0.0, color=GREY, lw=0.8)
    right.plot(np.asarray(columns["y_device"]) - np.asarray(columns["y_image"]), "o-", color=BLUE, ms=3)
    right.set(xlabel="cycle of the period", ylabel="y of device − y of image")
    return figure


@styled
def remainder(populations: Mapping[str, Mapping[str, float]]) -> Figure:
    """Largest and rms difference of y of each cause.

    Args:
        populations: {cause: {"y", "rms_y"}}.
    """
    names = sorted(populations, key=lambda name: populations[name]["y"])
    figure, (ax,) = figure_of(1, 0.9 + 0.32 * len(names), 6.0)
    for key, colour, marker, label in (("y", ORANGE, "o", "largest"), ("rms_y", BLUE, "s", "rms")):
        values = [max(populations[name][key], 1e-16) for name in names]
        ax.plot(values, range(len(names)), marker, color=colour, label=label)
    ax.set(xscale="log", xlabel="difference in the output y", yticks=range(len(names)), yticklabels=names)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.legend(fontsize=8)
    return figure


@styled
def losses(result: Mapping[str, Any], columns: Columns) -> Figure:
    """Seeds and means of each kind of control, on a logarithmic scale.

    Args:
        result: for means and intervals.
        columns: `designed_on`, and `loss_CONTROL` of shape (seeds, designed_on).
    """
    names = [str(name) for name in columns["designed_on"]]
    control = result["control"]
    figure, axes = figure_of(len(control), 3.3, 3.9)
    for ax, (what, means) in zip(axes, control.items(), strict=True):
        every = np.asarray(columns[f"loss_{what}"])
        for k, name in enumerate(names):
            spread = np.linspace(-0.22, 0.22, len(every))
            # What is exact is drawn at the rounding of 64-bit numbers.
            ax.plot(k + spread, np.maximum(every[:, k], 1e-16), ".", color=_COLOURS[name], ms=4, alpha=0.5)
            low, high = means[name]["ci95"]
            mean = max(means[name]["mean"], 1e-16)
            ax.errorbar(
                k, mean, [[max(mean - low, 0.0)], [max(high - mean, 0.0)]], fmt="_", color="black", ms=14, lw=1.5
            )
        ax.set(yscale="log", title=what.replace("_", " "), ylabel="loss", xticks=range(len(names)))
        ax.set_xticklabels(names, rotation=35, ha="right")
    return figure

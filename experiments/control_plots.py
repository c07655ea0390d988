"""Figures of pulse optimization, drawn from saved arrays alone."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.plots import BLUE, GREEN, GREY, ORANGE, arrows, figure_of, styled

Columns = Mapping[str, np.ndarray]


@styled
def pulses(columns: Columns) -> Figure:
    """Rabi frequency of both pulses against time, before and after.

    Args:
        columns: `t_s`, and `rabi_1_before_hz`, `rabi_2_before_hz`, `rabi_1_after_hz`, `rabi_2_after_hz`; with free
            phases `rabi_1_after_imag_hz` and so on.
    """
    figure, axes = figure_of(2, 2.8, 3.9, sharex=True, sharey=True)
    t_us = np.asarray(columns["t_s"]) * 1e6
    for ax, when in zip(axes, ("before", "after"), strict=True):
        for k, colour, dash in ((1, BLUE, "-"), (2, ORANGE, "--")):
            rabi_khz = np.asarray(columns[f"rabi_{k}_{when}_hz"]) / 1e3
            ax.plot(t_us, rabi_khz, dash, color=colour, label=f"pulse {k}")
            ax.fill_between(t_us, rabi_khz, color=colour, alpha=0.12, lw=0)
            quadrature = np.asarray(columns.get(f"rabi_{k}_{when}_imag_hz", 0.0)) / 1e3
            if np.any(quadrature):
                ax.plot(t_us, quadrature, ":", color=colour, lw=1, label=f"pulse {k}, quadrature")
        ax.set(title=when, xlabel="time (µs)", ylabel="Rabi frequency / 2π (kHz)")
        ax.label_outer()
    axes[-1].legend(fontsize=8)
    return figure


@styled
def error_maps(x_set: np.ndarray, r_set: np.ndarray, before: np.ndarray, after: np.ndarray) -> Figure:
    """y − (1 − r_set) x_set over the square of commands, before and after, on one scale.

    Args:
        x_set, r_set: axes of the square.
        before, after: shape (x_set, r_set).
    """
    figure, axes = figure_of(2, 3.1, 3.7, sharex=True, sharey=True)
    largest = float(np.nanmax(np.abs([before, after])))
    for ax, title, values in ((axes[0], "before", before), (axes[1], "after", after)):
        ax.grid(False)
        image = ax.pcolormesh(
            x_set, r_set, np.asarray(values).T, cmap="RdBu_r", vmin=-largest, vmax=largest, shading="nearest",
            rasterized=True,
        )  # fmt: skip
        worst = float(np.nanmax(np.abs(values)))
        ax.set(title=f"{title}: at most {worst:.2g}", xlabel="commanded input x_set", ylabel="commanded transfer r_set")
        ax.label_outer()
    figure.colorbar(image, ax=axes, label="y − (1 − r_set) x_set")
    return figure


@styled
def loops_before_after(columns: Columns) -> Figure:
    """The loop before and after an optimization of its shape.

    Args:
        columns: `x_before`, `y_before`, `x_after`, `y_after`, one value a cycle of one period.
    """
    figure, (ax,) = figure_of(1, 3.6, 4.4)
    for when, colour, dash in (("before", GREY, "--"), ("after", BLUE, "-")):
        x, y = (np.append(values := np.asarray(columns[f"{name}_{when}"]), values[0]) for name in "xy")
        ax.plot(x, y, dash, color=colour, label=when)
        arrows(ax, x, y, colour)
    if "x_wanted" in columns:
        x, y = (np.append(values := np.asarray(columns[f"{name}_wanted"]), values[0]) for name in "xy")
        ax.plot(x, y, ":", color=ORANGE, label="wanted")
    ax.set(xlabel="input x (population of s)", ylabel="output y (population of s)")
    ax.legend(fontsize=8)
    return figure


@styled
def spectra(columns: Columns) -> Figure:
    """Spectra of both pulses, before and after, relative to the largest value.

    Args:
        columns: `frequency_hz`, and `spectrum_1_before`, ..., `spectrum_2_after`, rad.
    """
    figure, axes = figure_of(2, 2.8, 3.9, sharex=True, sharey=True)
    khz = np.asarray(columns["frequency_hz"]) / 1e3
    for ax, when in zip(axes, ("before", "after"), strict=True):
        for k, colour, dash in ((1, BLUE, "-"), (2, ORANGE, "--")):
            amplitude = np.asarray(columns[f"spectrum_{k}_{when}"])
            shown = 20 * np.log10(np.maximum(amplitude / np.max(amplitude), 1e-6))
            ax.plot(khz, shown, dash, color=colour, label=f"pulse {k}", lw=1)
        ax.set(title=when, xlabel="frequency from the carrier (kHz)", ylabel="amplitude (dB)", ylim=(-110, 5))
        ax.label_outer()
    axes[0].legend(fontsize=8)
    return figure


@styled
def robustness(columns: Columns, quantity: str) -> Figure:
    """The target's number against errors of the laser, before and after, on one scale.

    Args:
        columns: `power_error`, `detuning_error_hz`, `robustness_before`, `robustness_after`.
        quantity: what the number is.
    """
    figure, axes = figure_of(2, 3.1, 3.7, sharex=True, sharey=True)
    both = [np.asarray(columns[f"robustness_{when}"]) for when in ("before", "after")]
    low, high = float(np.nanmin(both)), float(np.nanmax(both))
    for ax, when, values in zip(axes, ("before", "after"), both, strict=True):
        ax.grid(False)
        image = ax.pcolormesh(
            np.asarray(columns["detuning_error_hz"]) / 1e3, 100 * np.asarray(columns["power_error"]), values,
            cmap="viridis", vmin=low, vmax=high, shading="nearest", rasterized=True,
        )  # fmt: skip
        ax.set(title=when, xlabel="error of the laser frequency (kHz)", ylabel="error of the laser power (%)")
        ax.label_outer()
    figure.colorbar(image, ax=axes, label=quantity)
    return figure


@styled
def members(common: np.ndarray, own: np.ndarray, quantity: str) -> Figure:
    """What is lost because devices are not told apart: common pulses against pulses of their own.

    Args:
        common, own: the target's number of each device.
        quantity: what the number is.
    """
    figure, (ax,) = figure_of(1, 3.0, 4.4)
    at = np.arange(len(common))
    ax.plot(at, common, "o", color=ORANGE, label="pulses common to all")
    ax.plot(at, own, "s", color=GREEN, label="pulses of its own")
    ax.vlines(at, own, common, color=GREY, lw=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="device", ylabel=quantity, ylim=(min(0.0, float(np.min([common, own]))), None))
    ax.legend(fontsize=8)
    return figure


@styled
def command_map(columns: Columns) -> Figure:
    """Areas that really give what is wanted, as changes of the plain ones, with bands of the calibration's errors.

    Args:
        columns: `map_x_set`, `map_r_set`, `map_theta_1`, `map_theta_2`, and, where drawn, `map_theta_1_std`.
    """
    figure, (left, right) = figure_of(2, 3.1, 3.7)
    x, r = np.asarray(columns["map_x_set"]), np.asarray(columns["map_r_set"])
    plain = lambda wanted: 2 * np.arcsin(np.sqrt(wanted))
    theta_1 = np.asarray(columns["map_theta_1"])
    left.plot(x, plain(x), "--", color=GREY, label="without a map")
    left.plot(x, theta_1, "-", color=BLUE, label="map")
    if "map_theta_1_std" in columns:
        band = 1.96 * np.asarray(columns["map_theta_1_std"])
        left.fill_between(x, theta_1 - band, theta_1 + band, color=BLUE, alpha=0.2, lw=0, label="95 %")
    left.set(title="pulse 1", xlabel="wanted input x_set", ylabel="commanded area θ₁ (rad)")
    left.legend(fontsize=8)
    right.grid(False)
    change = (np.asarray(columns["map_theta_2"]) - plain(r)).T
    largest = float(np.nanmax(np.abs(change[:, 1:])))
    image = right.pcolormesh(
        x[1:], r, change[:, 1:], cmap="RdBu_r", vmin=-largest, vmax=largest, shading="nearest", rasterized=True
    )
    right.set(title="pulse 2", xlabel="wanted input x_set", ylabel="wanted transfer r_set")
    figure.colorbar(image, ax=right, label="change of the area θ₂ (rad)")
    return figure

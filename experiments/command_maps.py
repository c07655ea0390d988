"""[optimize.command_map]: the map of a device beside its pulses, as ``command_map.csv`` and ``.nc`` of the run."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from calibration.command_map import LARGEST_RAD, CommandMap, command_map
from experiments import command_map_files
from experiments.records import RunFolder
from experiments.schema import Config
from experiments.targets import posterior_of
from twin.memristor import IonMemristor
from twin.sampled import SampledIon

FILES = ("command_map.csv", "command_map.nc")


def add(
    config: Config, device: IonMemristor | SampledIon, offsets_hz: tuple[float, float], fit_run: Path | None,
    out: RunFolder, result: dict[str, Any], headroom: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compute the map, write its files, and put its numbers into the result.

    Args:
        config: with a table [optimize.command_map], or nothing is done.
        device: what plays the pulses. offsets_hz: laser offsets that go with them.
        fit_run: where it was calibrated; the bands are of its errors.
        out: the run folder. result: what it will hold; gains ``command_map``.
        headroom: full scale over the peak of the pulses, the factor by which a command may exceed pi.

    Returns:
        Columns for the figure.
    """
    assert config.optimize is not None
    wanted = config.optimize.command_map
    if wanted is None:
        return {}
    ion = device.ion if isinstance(device, SampledIon) else device
    draws = None
    if fit_run is not None and wanted.draws:
        draws = posterior_of(fit_run, ion, wanted.draws, config.optimize.seed)
    largest_rad = LARGEST_RAD if headroom is None else min(LARGEST_RAD, math.pi * headroom)
    out.log(f"command map: {wanted.points} x {wanted.points} commands")
    found = command_map(device, offsets_hz, points=wanted.points, largest_rad=largest_rad, draws=draws)
    for name in FILES:
        command_map_files.write(out.work / name, found)
    result["command_map"] = _numbers(found)
    result["notes"] = [*result["notes"], _in_words(found)]
    columns: dict[str, Any] = {
        "map_x_set": ("map_x_set", found.x_set), "map_r_set": ("map_r_set", found.r_set),
        "map_theta_1": ("map_x_set", found.theta_1), "map_theta_2": (("map_x_set", "map_r_set"), found.theta_2),
    }  # fmt: skip
    if found.bands is not None:
        columns["map_theta_1_std"] = ("map_x_set", found.bands.theta_1_std)
        columns["map_theta_2_std"] = (("map_x_set", "map_r_set"), found.bands.theta_2_std)
    return columns


def _numbers(found: CommandMap) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "points": len(found.x_set), "largest_rad": found.largest_rad, "rms_plain": found.rms_plain,
        "rms_mapped": found.rms_mapped, "rms_reached": found.rms_reached,
        "reached": float(np.mean(found.reached_2)),
        "polynomial": {"degree": len(found.polynomial.coefficients_1) - 1, "error": found.polynomial.error},
    }  # fmt: skip
    if found.bands is not None:
        numbers["draws"] = {
            "count": found.bands.draws,
            "rms_of_map": float(np.mean(found.bands.rms_of_map)),
            "rms_of_own_maps": float(np.mean(found.bands.rms_of_own)),
        }
    return numbers


def _in_words(found: CommandMap) -> str:
    text = (
        f"Under the command map the rms of y - (1 - r_set) x_set is {found.rms_mapped:.2g} in place of "
        f"{found.rms_plain:.2g}, and {found.rms_reached:.1g} where the device can give what is wanted "
        f"({100 * float(np.mean(found.reached_2)):.0f} % of the grid); its polynomial of degree "
        f"{len(found.polynomial.coefficients_1) - 1} changes no population by more than {found.polynomial.error:.1g}"
    )
    if found.bands is None:
        return text + "."
    return (
        f"{text}. On {found.bands.draws} devices that the calibration leaves possible the one map has "
        f"{np.mean(found.bands.rms_of_map):.2g} in the mean, maps of their own "
        f"{np.mean(found.bands.rms_of_own):.2g}."
    )

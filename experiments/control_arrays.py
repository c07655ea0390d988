"""What an optimization of pulses saves for its figures: samples, spectra, error maps or loops, robustness."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import xarray as xr

from calibration.hardware import Hardware
from calibration.limits import robustness
from calibration.shaping import Layout, Shaped, on_hardware, pair
from calibration.targets import AbstractTarget, LoopCurve, Obedience, Offsets, Playing, disobedience, parts
from experiments.targets import loop_in
from twin.memristor import IonMemristor
from twin.waveform import Waveform

_MAP_POINTS = 21
# Errors of the laser over which pulses are shown.
_POWER = np.linspace(-0.1, 0.1, 11)
_DETUNING_HZ = np.linspace(-2000.0, 2000.0, 11)
_PADDING = 8  # zeros behind the samples, in their number, so that spectra are smooth


def arrays_of_samples(
    found: Shaped, ion: IonMemristor, hardware: Hardware, target: AbstractTarget, layout: Layout
) -> xr.Dataset:
    """Samples before and after, their spectra, what the target looks like, and how it bears errors of the laser."""
    t_s = np.arange(found.waveform.samples) * float(found.waveform.sample_s)
    data: dict[str, Any] = {"t_s": ("time", t_s, {"units": "s"})}
    cases = {"before": (found.start, (0.0, 0.0)), "after": (found.waveform, found.offsets_hz)}
    devices: dict[str, tuple[Playing, Offsets]] = {}
    for when, (waveform, offsets_hz) in cases.items():
        for part, suffix in ((waveform.real_rad_s, ""), (waveform.imag_rad_s, "_imag")):
            for k in range(2):
                rabi_hz = np.asarray(part[:, k]) / (2 * np.pi)
                data[f"rabi_{k + 1}_{when}{suffix}_hz"] = ("time", rabi_hz, {"units": "Hz"})
        padded = Waveform(*(jnp.pad(part, [(0, _PADDING * len(part)), (0, 0)])
                            for part in (waveform.real_rad_s, waveform.imag_rad_s)), waveform.sample_s)  # fmt: skip
        spectrum = padded.spectrum()
        data["frequency_hz"] = ("frequency", np.asarray(spectrum.frequency_hz), {"units": "Hz"})
        for k in range(2):
            data[f"spectrum_{k + 1}_{when}"] = ("frequency", np.asarray(spectrum.amplitude_rad[:, k]), {"units": "rad"})
        device = on_hardware(ion, hardware, layout, waveform, offsets_hz=offsets_hz)
        devices[when] = device, pair(offsets_hz)
        bears = robustness(ion, hardware, target, layout, waveform, offsets_hz, power=_POWER, detuning_hz=_DETUNING_HZ)
        data["power_error"] = ("power_error", bears.power, {"units": "1"})
        data["detuning_error_hz"] = ("detuning_error_hz", bears.detuning_hz, {"units": "Hz"})
        data[f"robustness_{when}"] = (("power_error", "detuning_error_hz"), bears.value, {"units": target.unit})
    return xr.Dataset(data | seen(target, devices))


def seen(target: AbstractTarget, devices: Mapping[str, tuple[Playing, Offsets]]) -> dict[str, Any]:
    """What a target looks at, before and after: errors over the square of commands, or loops."""
    data: dict[str, Any] = {}
    if any(isinstance(part, Obedience) for part in parts(target)):
        grid = np.linspace(0, 1, _MAP_POINTS)
        x, r = (jnp.asarray(a.ravel()) for a in np.meshgrid(grid, grid, indexing="ij"))
        data |= {"x_set": ("x_set", grid, {"units": "1"}), "r_set": ("r_set", grid, {"units": "1"})}
        for when, (device, offsets) in devices.items():
            error = np.asarray(disobedience(device, x, r, offsets)).reshape(_MAP_POINTS, _MAP_POINTS)
            data[f"error_{when}"] = (("x_set", "r_set"), error, {"units": "1"})
    loop = loop_in(target)
    if loop is not None:
        for when, (device, offsets) in devices.items():
            x, y = loop.loop(device, offsets)
            data[f"x_{when}"] = ("cycle", np.asarray(x), {"units": "1"})
            data[f"y_{when}"] = ("cycle", np.asarray(y), {"units": "1"})
        if isinstance(loop, LoopCurve):
            data |= {"x_wanted": ("cycle", np.asarray(loop.x)), "y_wanted": ("cycle", np.asarray(loop.y))}
    return data

"""`iontwin optimize` with [optimize.shape]: sampled pulses within the limits of [hardware].

Leaves ``result.json`` (the target's number before and after, and of every exported file, read back and solved again),
``arrays.nc`` (samples, error maps or loops), the report, and the samples as ``waveform.csv``, ``.nc``, ``.qasm`` and
``.py`` (ARTIQ), in radians per second at full command.
"""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array

from calibration.control import LoopShape, Obedience, Target, disobedience
from calibration.hardware import Hardware
from calibration.shaping import Layout, Shaped, gaussian_pulses, on_hardware, shape
from experiments import report, waveform_files
from experiments.build import hardware_from
from experiments.progress import search_progress
from experiments.provenance import Stopwatch, provenance
from experiments.records import RunFolder
from experiments.schema import Config
from experiments.waveform_files import Samples, WaveformError
from twin.memristor import IonMemristor
from twin.sampled import SampledIon
from twin.waveform import Waveform

_FILES = ("waveform.csv", "waveform.nc", "waveform.qasm", "waveform.py")
_MAP_POINTS = 21


def run(
    config: Config, ion: IonMemristor, target: Target, notes: list[str], fit_run: Path | None, out: RunFolder,
    clock: Stopwatch,
) -> dict[str, Any]:  # fmt: skip
    """Optimize the samples of both pulses.

    Args:
        config: with tables [optimize.shape] and [hardware].
        ion: the device, as configured or calibrated. target: what is wanted of it.
        notes: sentences about the device. fit_run: where it was calibrated.
        out: the run folder. clock: running since the start.

    Returns:
        What ``result.json`` holds.
    """
    assert config.optimize is not None
    assert config.optimize.shape is not None
    assert config.hardware is not None
    wanted, hardware = config.optimize.shape, hardware_from(config)
    layout = Layout(wanted.samples, wanted.delay_samples, wanted.oversampling)
    free = _free_numbers(hardware, layout)
    out.log(f"target {config.optimize.target}, {free} free numbers in {layout.samples} samples a pulse")
    with search_progress(out, target.name) as progress:
        found = shape(ion, hardware, target, layout, iterations=config.optimize.iterations, on_progress=progress)
    carrier_hz = None if config.hardware.carrier_hz is None else tuple(config.hardware.carrier_hz)
    files, losses = _exported(found, ion, hardware, target, layout, out, carrier_hz)
    seconds = clock.stop()
    result = {
        "kind": "optimize",
        "status": found.status,
        "target": config.optimize.target,
        "metric": {
            "name": found.metric, "before": found.before, "after": found.after, "recomputed": found.exported
        },
        "offsets_hz": list(found.offsets_hz),
        "free_numbers": free,
        "violations": hardware.violations(found.waveform),
        "files": files,
        "notes": notes + _notes(found, hardware) + losses,
        "history": {"shape": found.history},
        "from": None if fit_run is None else Path(fit_run).name,
        "seed": config.optimize.seed,
        "seconds": seconds,
        **provenance(),
    }  # fmt: skip
    out.write_result(result)  # first: what follows cannot lose it
    out.write_arrays(_arrays(found, ion, hardware, target, layout))
    report.write(out)
    out.log(
        f"{found.status}; {found.metric} {found.before:.4g} before, {found.after:.4g} after, {found.exported:.4g} as "
        "exported; " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    )
    for note in result["notes"]:
        out.log(f"  {note}")
    return result


def _free_numbers(hardware: Hardware, layout: Layout) -> int:
    """Numbers that are free: parts, channels and raw samples."""
    return hardware.raw_samples(layout.samples) * hardware.channels * (1 if hardware.real_only else 2)


def _exported(
    found: Shaped,
    ion: IonMemristor,
    hardware: Hardware,
    target: Target,
    layout: Layout,
    out: RunFolder,
    carrier_hz: tuple[float, ...] | None,
) -> tuple[dict[str, float], list[str]]:
    """Writes every file that can hold the samples; the target's number of each as it is read back, and why not."""
    w = found.waveform
    samples = Samples(
        real_rad_s=np.asarray(w.real_rad_s),
        imag_rad_s=np.asarray(w.imag_rad_s),
        sample_s=float(w.sample_s),
        channels=("line_1", "line_2"),
        full_scale_rad_s=hardware.largest_rad_s,
        bits=hardware.bits,
        carrier_hz=carrier_hz,
        attributes={"laser_offset_1_hz": found.offsets_hz[0], "laser_offset_2_hz": found.offsets_hz[1]},
    )
    offsets = _pair(found.offsets_hz)
    score = eqx.filter_jit(lambda device: target.value(device, offsets))
    values: dict[str, float] = {}
    notes: list[str] = []
    for name in _FILES:
        try:
            waveform_files.write(out.work / name, samples)
            again = waveform_files.read(out.work / name)
        except WaveformError as error:
            notes.append(f"{name} is not there: {str(error).partition(': ')[2] or error}")
            continue
        played = on_hardware(
            ion, hardware, layout, Waveform(again.real_rad_s, again.imag_rad_s, again.sample_s),
            offsets_hz=found.offsets_hz,
        )  # fmt: skip
        values[name] = float(score(played))
    return values, notes


def _notes(found: Shaped, hardware: Hardware) -> list[str]:
    peaks = np.asarray(found.waveform.peak_rad_s) / np.asarray(hardware.largest_rad_s)
    at_limit = [f"line {k + 1}" for k, share in enumerate(peaks) if share > 0.99]
    notes = [
        "The lasers are offset by {:+.1f} and {:+.1f} Hz, onto the calibrated lines.".format(*found.offsets_hz),
        f"Rounding, finer slices and a tighter solver change the number by {abs(found.exported - found.after):.1e}.",
    ]
    if at_limit:
        notes.append(f"{' and '.join(at_limit)} reaches full scale; more power would gain more.")
    return notes


def _arrays(found: Shaped, ion: IonMemristor, hardware: Hardware, target: Target, layout: Layout) -> xr.Dataset:
    """Samples before and after, and what the target looks like, for both."""
    start = layout.placed(hardware.quantized(hardware.allowed(*hardware.unconstrained(
        gaussian_pulses(hardware, layout.samples)))))  # fmt: skip
    before = on_hardware(ion, hardware, layout, start)
    t_s = np.arange(found.waveform.samples) * float(found.waveform.sample_s)
    data: dict[str, Any] = {"t_s": ("time", t_s, {"units": "s"})}
    for when, w in (("before", start), ("after", found.waveform)):
        for part, suffix in ((w.real_rad_s, ""), (w.imag_rad_s, "_imag")):
            for k in range(2):
                rabi_hz = np.asarray(part[:, k]) / (2 * np.pi)
                data[f"rabi_{k + 1}_{when}{suffix}_hz"] = ("time", rabi_hz, {"units": "Hz"})
    data |= _seen(target, {"before": (before, (0.0, 0.0)), "after": (found.device, found.offsets_hz)})
    return xr.Dataset(data)


def _seen(target: Target, devices: dict[str, tuple[SampledIon, tuple[float, float]]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if isinstance(target, Obedience):
        grid = np.linspace(0, 1, _MAP_POINTS)
        x, r = (jnp.asarray(a.ravel()) for a in np.meshgrid(grid, grid, indexing="ij"))
        data |= {"x_set": ("x_set", grid, {"units": "1"}), "r_set": ("r_set", grid, {"units": "1"})}
        for when, (device, offsets_hz) in devices.items():
            error = np.asarray(disobedience(device, x, r, _pair(offsets_hz))).reshape(_MAP_POINTS, _MAP_POINTS)
            data[f"error_{when}"] = (("x_set", "r_set"), error, {"units": "1"})
    if isinstance(target, LoopShape):
        for when, (device, offsets_hz) in devices.items():
            x, y = target.loop(device, _pair(offsets_hz))
            data |= {f"x_{when}": ("cycle", np.asarray(x)), f"y_{when}": ("cycle", np.asarray(y))}
    return data


def _pair(offsets_hz: tuple[float, float]) -> tuple[Array, Array]:
    return jnp.asarray(offsets_hz[0], float), jnp.asarray(offsets_hz[1], float)

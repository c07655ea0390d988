"""`iontwin optimize`: pulse commands for the device as configured, or as a fit found it.

Leaves ``result.json`` (commands before and after, the target's number recomputed by the reference solver),
``arrays.nc`` (waveforms, and error maps or loops) and the report.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import xarray as xr

from calibration.control import Design, optimize
from calibration.shaping import pair
from calibration.targets import AbstractTarget
from experiments import command_maps, report, shape
from experiments.build import device_from, memory_from
from experiments.control_arrays import seen
from experiments.fitted import with_fit
from experiments.progress import search_progress
from experiments.provenance import Stopwatch, provenance
from experiments.records import Run, RunFolder
from experiments.schema import Config
from experiments.targets import robust_from, target_from
from twin.memristor import IonMemristor

_WAVEFORM_POINTS = 801


def run(config: Config, fit_run: Path | None, out: RunFolder, seed: int) -> dict[str, Any]:
    """Optimize the commands of [optimize].

    Args:
        config: with a table [optimize].
        fit_run: folder of a fit whose parameters replace those of [device]; None for the device as configured.
        out: the run folder.
        seed: of the random starts.

    Returns:
        What ``result.json`` holds.
    """
    assert config.optimize is not None
    clock = Stopwatch()
    device = device_from(config)
    notes = []
    if fit_run is not None:
        device, note = with_fit(config, device, Run(fit_run))
        notes.append(note)
    if not isinstance(device, IonMemristor):
        raise ValueError("optimize designs laser pulses, but device.platform is 'photonic'; choose 'ion'.")
    if config.optimize.window_cycles is not None:
        device = dataclasses.replace(device, memory=memory_from(config, config.optimize.window_cycles))
    if not config.optimize.bounds and config.optimize.shape is None:
        return _mapped(config, device, notes, fit_run, out, seed, clock)
    target = target_from(config, device)
    robust = robust_from(config, device, target, fit_run)
    if config.optimize.shape is not None:
        return shape.run(config, device, target, robust, notes, fit_run, out, clock)
    out.log(f"target {config.optimize.target}, commands {', '.join(config.optimize.bounds)}")
    with search_progress(out, (robust or target).name) as progress:
        design = optimize(
            device,
            target if robust is None else robust,
            config.optimize.bounds,
            iterations=config.optimize.iterations,
            seed=seed,
            on_progress=progress,
        )
    seconds = clock.stop()
    notes += _notes(design)
    out.log(
        f"{design.status}; {design.metric} {design.before:.4g} before, {design.after:.4g} after, "
        f"{design.recomputed:.4g} by the reference solver; "
        + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    )
    result = {
        "kind": "optimize",
        "status": design.status,
        "target": config.optimize.target,
        "metric": {
            "name": design.metric,
            "before": design.before,
            "after": design.after,
            "recomputed": design.recomputed,
        },
        "commands": {name: dataclasses.asdict(command) for name, command in design.commands.items()},
        "notes": notes,
        "history": {"optimize": design.history},
        "from": None if fit_run is None else Path(fit_run).name,
        "seed": seed,
        "seconds": seconds,
        **provenance(),
    }
    out.write_result(result)  # first: what follows cannot lose it
    arrays = _arrays(device, design, target)
    arrays = arrays.assign(command_maps.add(config, design.device, design.offsets_hz, fit_run, out, result))
    out.write_result(result)
    out.write_arrays(arrays)
    report.write(out)
    for name, command in design.commands.items():
        bound = " (at its bound)" if command.at_bound else ""
        out.log(f"  {name:<18} {command.before: .6g} -> {command.after: .6g} {command.unit}{bound}")
    return result


def _mapped(
    config: Config, device: IonMemristor, notes: list[str], fit_run: Path | None, out: RunFolder, seed: int,
    clock: Stopwatch,
) -> dict[str, Any]:  # fmt: skip
    """The command map alone: pulses stay as they are, and lasers are tuned onto the lines."""
    offsets_hz = (-float(device.detuning_1_hz), -float(device.detuning_2_hz))
    result: dict[str, Any] = {
        "kind": "optimize", "status": "done", "target": "command map", "offsets_hz": list(offsets_hz),
        "notes": [*notes, "Pulses are unchanged; the lasers are offset by {:+.1f} and {:+.1f} Hz.".format(*offsets_hz)],
        "from": None if fit_run is None else Path(fit_run).name, "seed": seed, **provenance(),
    }  # fmt: skip
    columns = command_maps.add(config, device, offsets_hz, fit_run, out, result)
    table = result["command_map"]
    result["metric"] = {"name": "obedience_rms", "unit": "1", "before": table["rms_plain"],
                        "after": table["rms_mapped"], "recomputed": table["rms_mapped"]}  # fmt: skip
    result["seconds"] = clock.stop()
    out.write_result(result)
    out.write_arrays(xr.Dataset(columns))
    report.write(out)
    for note in result["notes"]:
        out.log(f"  {note}")
    return result


def _notes(design: Design) -> list[str]:
    notes = []
    stopped = [name for name, command in design.commands.items() if command.at_bound]
    if stopped:
        notes.append(
            f"Stopped by their bounds: {', '.join(stopped)}. Wider bounds, if the hardware allows, would gain more."
        )
    gap = abs(design.recomputed - design.after)
    notes.append(f"The reference solver differs from the optimizer's own number by {gap:.1e}.")
    return notes


def _arrays(device: IonMemristor, design: Design, target: AbstractTarget) -> xr.Dataset:
    """Waveforms of full transfers before and after, and what the target looks like."""
    after = design.device
    # The shared device of before: planned like the new one, so both run on the same grid.
    before = dataclasses.replace(device, method=after.method, steps=after.steps, phonon_nodes=after.phonon_nodes)
    late = float(max(before.separation_s + before.tail_s, after.separation_s + after.tail_s))
    t_s = np.linspace(-float(before.lead_s), late, _WAVEFORM_POINTS)
    data: dict[str, Any] = {"t_s": ("time", t_s, {"units": "s"})}
    for which, twin in (("before", before), ("after", after)):
        for k, pulse in enumerate(twin.pulses(*twin.largest_areas)):
            rabi_hz = np.asarray(pulse.drive(jnp.asarray(t_s), jnp.asarray(t_s)).real) / (2 * np.pi)
            data[f"rabi_{k + 1}_{which}_hz"] = ("time", rabi_hz, {"units": "Hz"})
    cases = {"before": (before, pair((0.0, 0.0))), "after": (after, pair(design.offsets_hz))}
    return xr.Dataset(data | seen(target, cases))

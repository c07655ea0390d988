"""`iontwin simulate`: loops of a device as configured, with or without shot noise.

Leaves ``arrays.nc`` with every cycle of every loop, ``result.json`` with the metrics of each loop's last period, the
report, and, where shots were taken, ``table.csv``: a loop table that `iontwin fit` reads.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from calibration.data import LoopTable, write_table
from calibration.parameters import value_of
from experiments import report
from experiments.build import device_from, memory_from
from experiments.provenance import Stopwatch, provenance
from experiments.records import RunFolder
from experiments.schema import Config
from experiments.schema import Loop as LoopSettings
from twin import hysteresis
from twin.levels import SCHEMES
from twin.loop import AbstractMemristor, Loop, sine_input
from twin.loop import run as run_loop
from twin.memristor import IonMemristor, planned
from twin.planning import SOLVES_OF_CYCLE
from twin.readout import standard_error
from twin.register import Register

TABLE = "table.csv"

# The sum of the lobes compares every side of the loop with every other one.
_MOST_LOBE_POINTS = 2000

# Weight of the history before the first cycle below which an exponential memory counts as settled.
_FORGOTTEN = 1e-3

UNITS = {"window_cycles": "cycles", "detuning_1_set_hz": "Hz", "detuning_2_set_hz": "Hz"}
MEANINGS = {
    "x_set": "commanded input",
    "r": "commanded transfer, the memory's mean of earlier inputs",
    "x": "population of s after pulse 1 alone",
    "y": "population of s after both pulses",
    "p_x": "probability that a shot is assigned to s after pulse 1 alone",
    "p_y": "probability that a shot is assigned to s after both pulses",
    "x_measured": "counts over shots after pulse 1 alone",
    "y_measured": "counts over shots after both pulses",
    "x_error": "binomial standard error of x_measured",
    "y_error": "binomial standard error of y_measured",
    "coherence": "l1 coherence of the output state in {v, s}",
    "purity": "purity of the output state in {v, s} after incoherent repump of m",
}


def run(config: Config, out: RunFolder, seed: int) -> dict[str, Any]:
    """Run the loops of [[simulate.loops]].

    Args:
        config: with a table [simulate].
        out: the run folder.
        seed: of the shot noise; each loop has its own key.

    Returns:
        What ``result.json`` holds.
    """
    assert config.simulate is not None
    clock = Stopwatch()
    settings = config.loops
    largest = max(max(abs(s.detuning_1_set_hz), abs(s.detuning_2_set_hz)) for s in settings)
    # One grid for the offsets of all loops, so that loops of one length are one program.
    cycles = min(one.periods * one.cycles_per_period + 1 for one in settings)
    device = device_from(config)
    if isinstance(device, Register):
        devices, loops = _register_loops(config, device, settings, out, seed)
    else:
        device = planned(device, {}, detuning_set_hz=largest, solves=SOLVES_OF_CYCLE * cycles)
        devices, loops = list[AbstractMemristor](), list[Loop]()
        for k, one in enumerate(settings):
            out.log(f"loop {k + 1} of {len(settings)}, {one.label!r}: {one.periods * one.cycles_per_period + 1} cycles")
            devices.append(dataclasses.replace(device, memory=memory_from(config, one.window_cycles)))
            loops.append(_loop(devices[-1], one, jax.random.fold_in(jax.random.key(seed), k)))
    metrics = {one.label: _metrics(twin, one, loop) for one, twin, loop in zip(settings, devices, loops, strict=True)}
    arrays = _arrays(settings, devices, loops)
    out.write_arrays(arrays)
    if any(one.shots for one in settings):
        write_table(_table(arrays), out.work / TABLE)
    invalid = int(sum(np.sum(~np.asarray(loop.valid)) for loop in loops))
    cycles = sum(loop.valid.size for loop in loops)
    result = {
        "kind": "simulate",
        "status": f"failed: {invalid} of {cycles} cycles were not solved to the error asked for" if invalid else "done",
        "loops": metrics,
        "notes": _notes(config, settings, metrics),
        "seed": seed,
        "seconds": clock.stop(),
        **provenance(),
    }
    out.write_result(result)
    report.write(out)
    return result


def _loop(device: AbstractMemristor, settings: LoopSettings, key: jax.Array) -> Loop:
    return run_loop(
        device,
        _input(settings),
        detuning_1_set_hz=settings.detuning_1_set_hz,
        detuning_2_set_hz=settings.detuning_2_set_hz,
        shots=settings.shots or None,
        key=key if settings.shots else None,
    )


def _register_loops(
    config: Config, register: Register, settings: list[LoopSettings], out: RunFolder, seed: int
) -> tuple[Sequence[AbstractMemristor], list[Loop]]:
    """All ions of a register at the same time; for each ion a device that has its memory, and its loop."""
    cycles = settings[0].periods * settings[0].cycles_per_period + 1
    out.log(f"{register.count} ions at the same time: {cycles} cycles")
    own = np.broadcast_to(np.asarray(value_of(register.ion, "window_cycles")), (register.count,))
    windows = [w if one.window_cycles is None else one.window_cycles for one, w in zip(settings, own, strict=True)]
    every = np.array(windows) if len(set(windows)) > 1 else windows[0]
    register = dataclasses.replace(register, ion=dataclasses.replace(register.ion, memory=memory_from(config, every)))
    column = lambda name: np.array([[getattr(one, name) for one in settings]])
    offsets = {name: np.broadcast_to(column(name), (cycles, register.count)) if np.any(column(name)) else 0.0
               for name in ("detuning_1_set_hz", "detuning_2_set_hz")}  # fmt: skip
    shots = settings[0].shots or None
    together = run_loop(
        register,
        jnp.stack([_input(one) for one in settings], axis=-1),
        shots=shots,
        key=jax.random.key(seed) if shots else None,
        **offsets,
    )
    pick = lambda k: jax.tree.map(lambda a: a[..., k], together)
    devices = [dataclasses.replace(register.ion, memory=memory_from(config, float(w))) for w in windows]
    return devices, [pick(k) for k in range(register.count)]


def _input(settings: LoopSettings) -> jax.Array:
    return sine_input(
        periods=settings.periods, cycles_per_period=settings.cycles_per_period, delay_cycles=settings.delay_cycles
    )


def last_period(settings: LoopSettings) -> slice:
    """The cycles of the last period: one closed polygon, its first point not repeated."""
    begin = (settings.periods - 1) * settings.cycles_per_period
    return slice(begin, begin + settings.cycles_per_period)


def settled(config: Config, settings: LoopSettings, window_cycles: float) -> bool:
    """Whether the history before the first cycle is forgotten when the last period begins."""
    before = (settings.periods - 1) * settings.cycles_per_period
    if config.memory.kernel == "exponential":
        return math.exp(-before / window_cycles) < _FORGOTTEN
    return window_cycles <= before


@eqx.filter_jit
def loop_metrics(x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    """Metrics of one period; NaN where it does not close."""
    found = {
        "signed_area": hysteresis.signed_area(x, y),
        "perimeter": hysteresis.perimeter(x, y),
        "form_factor": hysteresis.form_factor(x, y),
        "pinch_offset": hysteresis.pinch_offset(x, y),
    }
    if x.size <= _MOST_LOBE_POINTS:
        found["lobe_area"] = hysteresis.lobe_area(x, y)
    return found


@eqx.filter_jit
def _area_error(x: jax.Array, y: jax.Array, x_error: jax.Array, y_error: jax.Array) -> jax.Array:
    """Standard error of the polygon's area for independent errors of its points."""
    by_x, by_y = jax.grad(hysteresis.signed_area, argnums=(0, 1))(x, y)
    return jnp.sqrt(jnp.sum((by_x * x_error) ** 2 + (by_y * y_error) ** 2))


def _metrics(device: AbstractMemristor, settings: LoopSettings, loop: Loop) -> dict[str, Any]:
    last = last_period(settings)
    error = jnp.max(loop.error_estimate)
    if isinstance(device, IonMemristor) and loop.method == "closed form":
        offsets = (settings.detuning_1_set_hz, settings.detuning_2_set_hz)
        error = jnp.max(device.closed_form_error(loop.x_set, loop.r, *offsets))
    found = {
        "cycles": loop.x_set.size,
        "cycles_per_period": settings.cycles_per_period,
        "window_cycles": value_of(device, "window_cycles"),
        "shots": settings.shots,
        "method": loop.method,
        "error_estimate": error,
        "invalid_cycles": int(jnp.sum(~loop.valid)),
        **loop_metrics(loop.x[last], loop.y[last]),
        "rms_obedience": jnp.sqrt(jnp.mean((loop.y - (1 - loop.r) * loop.x_set)[last] ** 2)),
    }
    if loop.n_x is not None and loop.n_y is not None:
        x, y = loop.n_x[last] / settings.shots, loop.n_y[last] / settings.shots
        errors = (standard_error(p[last], settings.shots) for p in (loop.p_x, loop.p_y))
        found["signed_area_measured"] = loop_metrics(x, y)["signed_area"]
        found["signed_area_measured_std"] = _area_error(x, y, *errors)
    return {name: value if isinstance(value, int | str) else float(value) for name, value in found.items()}


def _arrays(settings: list[LoopSettings], devices: Sequence[AbstractMemristor], loops: list[Loop]) -> xr.Dataset:
    """Every cycle of every loop as one row; NaN where nothing was measured."""
    parts = []
    for one, device, loop in zip(settings, devices, loops, strict=True):
        cycles = loop.x_set.size
        columns = {
            "loop": np.full(cycles, one.label, object),
            "cycle": np.arange(cycles),
            "window_cycles": np.full(cycles, float(value_of(device, "window_cycles"))),
            "detuning_1_set_hz": np.full(cycles, one.detuning_1_set_hz),
            "detuning_2_set_hz": np.full(cycles, one.detuning_2_set_hz),
            "shots": np.full(cycles, one.shots),
            **{name: np.asarray(getattr(loop, name)) for name in ("x_set", "r", "x", "y", "p_x", "p_y")},
            **{name: np.asarray(getattr(loop, name)) for name in ("coherence", "purity", "valid", "error_estimate")},
        }
        for name, counts, p in (("x", loop.n_x, loop.p_x), ("y", loop.n_y, loop.p_y)):
            taken = counts is not None
            columns[f"n_{name}"] = np.asarray(counts) if taken else np.full(cycles, np.nan)
            columns[f"{name}_measured"] = columns[f"n_{name}"] / one.shots if taken else np.full(cycles, np.nan)
            columns[f"{name}_error"] = np.asarray(standard_error(p, one.shots)) if taken else np.full(cycles, np.nan)
        populations = [np.asarray(p) for p in (loop.populations_1, loop.populations_2)]
        parts.append((columns, populations))
    dataset = xr.Dataset(
        {name: ("row", np.concatenate([columns[name] for columns, _ in parts])) for name in parts[0][0]}
        | {
            f"populations_{k + 1}": (("level", "row"), np.concatenate([p[k] for _, p in parts], axis=1))
            for k in range(2)
        },
        coords={"level": list(levels_of(devices[0]))},
    )
    for name, array in dataset.data_vars.items():
        array.attrs["units"] = UNITS.get(str(name), "1")
        if name in MEANINGS:
            array.attrs["long_name"] = MEANINGS[str(name)]
    return dataset


def levels_of(device: AbstractMemristor) -> tuple[str, ...]:
    """Names of the levels, in the order of the device's populations."""
    return SCHEMES[device.scheme].levels if isinstance(device, IonMemristor) else ("v", "s", "m")


def _table(arrays: xr.Dataset) -> LoopTable:
    """The loops with shots as a laboratory would record them: counts, and the transfers that were set."""
    taken = arrays.isel(row=arrays.shots.values > 0)
    same = ("loop", "cycle", "x_set", "window_cycles", "detuning_1_set_hz", "detuning_2_set_hz", "shots", "n_x", "n_y")
    return LoopTable(r_set=taken.r.values, **{name: taken[name].values for name in same})


def _notes(config: Config, loops: list[LoopSettings], metrics: dict[str, Any]) -> list[str]:
    """What a reader must know to trust the numbers, in sentences."""
    notes = []
    for settings, (label, found) in zip(loops, metrics.items(), strict=True):
        if found["invalid_cycles"]:
            notes.append(
                f"Loop {label}: {found['invalid_cycles']} of {found['cycles']} cycles were not solved to the error "
                "asked for and are NaN; raise `device.error`, or look for pulses outside the window."
            )
        elif math.isnan(found["signed_area"]):
            notes.append(f"Loop {label}: its last period does not close, so it has no area; take more cycles a period.")
        if not settled(config, settings, found["window_cycles"]):
            notes.append(
                f"Loop {label}: its last period is not yet steady, the memory of {found['window_cycles']:g} cycles "
                "still holds the history before the first cycle; take more periods."
            )
        if found["method"] == "closed form" and found["error_estimate"] > config.device.error:
            notes.append(
                f"Loop {label}: the closed form was asked for, but its error may be as large as "
                f"{found['error_estimate']:.1e}: it leaves out detuning, overlap, decay and dephasing."
            )
        if "lobe_area" not in found:
            notes.append(f"Loop {label}: lobes are summed for at most {_MOST_LOBE_POINTS} cycles a period only.")
    without = [s.label for s in loops if not s.shots]
    if 0 < len(without) < len(metrics):
        notes.append(f"Loops without shots hold exact values and are not in {TABLE}: {', '.join(without)}.")
    return notes

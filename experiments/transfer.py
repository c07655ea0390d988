"""`iontwin transfer`: a device, or control designed on it, moved to the other platform by the dictionary.

Leaves ``result.json`` (the dictionary, what it leaves out, losses with intervals), ``arrays.nc`` (loops of the device
and of its image, losses of every seed) and the report.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray as xr

from calibration.data import LoopTable
from calibration.intervals import mean_interval
from calibration.parameters import unit_of
from calibration.transfer_of_control import (
    CONTROLS,
    DESIGNED_ON,
    Side,
    image,
    losses,
    map_loss,
    pairs,
    side,
    task,
)
from experiments import report
from experiments.build import device_from, memory_from
from experiments.fitted import calibrated
from experiments.provenance import Stopwatch, provenance
from experiments.records import Run, RunFolder
from experiments.schema import Config
from experiments.schema_device import PARAMETERS
from experiments.schema_transfer import Transfer
from twin.loop import AbstractMemristor, sine_input
from twin.loop import run as played
from twin.memristor import ClosedForm, IonMemristor, Lindblad
from twin.photonic import PhotonicMemristor
from twin.remainder import population_gap, remainder
from twin.slow_noise import SlowNoise
from twin.transfer import (
    EXACT,
    ION_NAMES,
    PHOTONIC_NAMES,
    jacobian_to_ion,
    jacobian_to_photonic,
    to_ion,
    to_photonic,
    values_of,
)

_SCALES = ("phase_scale_1", "phase_scale_2", "rabi_scale_1", "rabi_scale_2")
_WORSE = ("identified", "at bound", "weak", "not identified")
_LOSSES = {
    "command_map": "rms of y - (1 - r) x over the square of commands",
    "feedback": "rms of y against the ideal loop",
    "reservoir": "mean squared error over the variance of the target",
}
_STATES = {
    "missing": "share R x that {v, s} lacks until m is repumped",
    "leak": "population of the leak level",
    "coherence": "l1 coherence after repump, device minus image",
    "phase_rad": "phase of the output's coherence (rad)",
}


def run(config: Config, fit_run: Path | None, out: RunFolder, seed: int) -> dict[str, Any]:
    """Move what [transfer] names.

    Args:
        config: with a table [transfer].
        fit_run: folder of a fit whose device, with its errors, is the source; None for the device as configured.
        out: the run folder.
        seed: of devices and shot noise.

    Returns:
        What ``result.json`` holds.

    Raises:
        RuntimeError: devices of the study that cannot be solved.
    """
    wanted = config.transfer
    assert wanted is not None
    clock = Stopwatch()
    device, notes = device_from(config), []
    boxes: dict[str, tuple[float, float]] = {k: v for k, v in wanted.source.items() if isinstance(v, tuple)}
    found, verdicts = None, {}
    if fit_run is not None:
        fitted = Run(fit_run)
        device, boxes, found, note = calibrated(config, device, fitted)
        verdicts = {name: str(fitted.result["parameters"][name]["verdict"]) for name in boxes}
        notes.append(note)
    result: dict[str, Any] = {"kind": "transfer", "status": "done", "to": wanted.to, "losses": {}, "control": {}}
    columns: dict[str, Any] = {}
    parts = []
    if "device" in wanted.what:
        out.log(f"dictionary to {wanted.to}")
        parts.append(_device_part(config, wanted, device, verdicts, None if found is None else found[1]))
    controls = [what for what in CONTROLS if what in wanted.what]
    if controls:
        table = _settings(config, wanted)
        out.log(f"{wanted.seeds} pairs of devices, {wanted.shots} shots")
        weak = [name for name, verdict in verdicts.items() if verdict in ("weak", "not identified")]
        source = side(device, boxes, table, found, weak)
        target = _target(config, wanted, table, _weakest(device, boxes))
        parts.append(_control_part(config, wanted, source, target, controls, seed, out))
    for more, arrays, said in parts:
        result |= more
        columns |= arrays
        notes += said
    result |= {
        "notes": notes, "seeds": wanted.seeds, "shots": wanted.shots, "seed": seed, "seconds": clock.stop(),
        "from": None if fit_run is None else Path(fit_run).name, **provenance(),
    }  # fmt: skip
    out.write_result(result)  # first: what follows cannot lose it
    out.write_arrays(xr.Dataset(columns))
    report.write(out)
    for note in notes:
        out.log(f"  {note}")
    return result


class _Part(NamedTuple):
    """What one part of the verb adds to ``result.json``, to ``arrays.nc`` and to the notes."""

    result: dict[str, Any]
    columns: dict[str, Any]
    notes: list[str]


def _device_part(
    config: Config, wanted: Transfer, device: AbstractMemristor, verdicts: dict[str, str], covariance
) -> _Part:
    """The dictionary, what it leaves out, and the loops of the device and of its image.

    Args:
        verdicts, covariance: by name and in that order, of a calibration whose errors are carried over; none without.
    """
    dictionary = _dictionary(device, verdicts, covariance)
    if isinstance(device, IonMemristor) and isinstance(device.method, ClosedForm):
        # The dictionary counts what the closed form ignores, so that the ion beside the image must have it.
        device = dataclasses.replace(device, method=Lindblad(config.device.error))
    left = _remainder(device)
    return _Part({**dictionary, "remainder": left}, _loops(device, wanted), _left_out(left))


def _control_part(
    config: Config, wanted: Transfer, source: Side, target: Side, controls: list[str], seed: int, out: RunFolder
) -> _Part:
    """The study: losses of each kind of control, seed by seed.

    Raises:
        RuntimeError: devices that cannot be solved.
    """
    keys, of_devices = jax.random.split(jax.random.key(seed), (2, wanted.seeds))
    drawn = pairs(source, target, of_devices)
    asked = task(
        memory_from(config), shots=wanted.shots, periods=wanted.periods, nodes=wanted.nodes,
        cycles_per_period=wanted.cycles_per_period, points=wanted.points,
    )  # fmt: skip
    told, columns, notes = {}, {}, []
    for control in controls:
        out.log(f"{control}: {_LOSSES[control]}")
        every = np.asarray(losses(source, target, drawn, asked, control, keys))
        if not np.all(np.isfinite(every)):
            bad = int(np.sum(~np.all(np.isfinite(every), axis=1)))
            raise RuntimeError(f"{bad} of {len(every)} pairs of devices could not be played under the {control}; "
                               "narrow the ranges of transfer.source and transfer.target.")  # fmt: skip
        told[control] = {name: _interval_json(every[:, k]) for k, name in enumerate(DESIGNED_ON)}
        columns[f"loss_{control}"] = (("seed", "designed_on"), every)
        notes.append(_lost(control, every))
    columns["designed_on"] = ("designed_on", np.array(DESIGNED_ON, object))
    ideal = _ideal(source.device, wanted)
    notes.append(f"Between ideal devices the command map is moved to {ideal:.1g}.")
    result = {"losses": {control: _LOSSES[control] for control in controls}, "control": told, "ideal": ideal}
    return _Part(result, columns, notes)


def _dictionary(device: AbstractMemristor, verdicts: dict[str, str], covariance) -> dict[str, Any]:
    """Rows of what the image is, with the errors and verdicts of a calibration carried over."""
    there = image_of(device)
    to = (*(PHOTONIC_NAMES if isinstance(device, IonMemristor) else ION_NAMES), "window_cycles")
    values, errors = np.asarray(values_of(there, to)), [(None, None)] * len(to)
    if covariance is not None:
        # What the fit freed but a device does not have, such as a noise parameter, moves nothing.
        jacobian = jacobian_to_photonic if isinstance(device, IonMemristor) else jacobian_to_ion
        derivatives = np.asarray(jacobian(device, tuple(verdicts), to))
        errors = [_carried(name, row, verdicts, covariance) for name, row in zip(to, derivatives, strict=True)]
    exact, rows = {*EXACT, *EXACT.values()}, []
    for name, value, (std, verdict) in zip(to, values.tolist(), errors, strict=True):
        relation = "exact" if name in exact else "first order"
        # The nearest interferometer to a pulse that lost contrast turns a little further.
        relation = "exact, but for what contrast shifts" if name in _SCALES else relation
        rows.append({"name": name, "value": value if np.isfinite(value) else None, "std": std, "verdict": verdict,
                     "unit": unit_of(name), "relation": relation})  # fmt: skip
    return {"dictionary": rows}


def _carried(name: str, slopes: np.ndarray, verdicts: dict[str, str], covariance) -> tuple[float | None, str | None]:
    """Standard error and verdict of a number of the image, by its slopes on what the calibration freed.

    The verdict is the worst one of what makes up more than a tenth of the error. There is no error where nothing freed
    moves the number, and none where it is not identified or its range is narrower: no linear law describes that.
    """
    if not np.any(slopes):
        return None, None
    covariance = np.asarray(covariance)
    std = float(np.sqrt(max(slopes @ covariance @ slopes, 0.0)))
    allowed = PARAMETERS[name]
    shares = np.abs(slopes) * np.sqrt(np.diag(covariance))
    told = [verdict for verdict, share in zip(verdicts.values(), shares, strict=True) if share > 0.1 * std]
    verdict = max(told, key=_WORSE.index, default=None)
    if verdict == "not identified" or not std <= allowed.high - allowed.low:
        return None, "not identified"
    return std, verdict


def image_of(device: AbstractMemristor) -> AbstractMemristor:
    """The whole image of a device, an ion with the linewidth, noise and decay that stand for contrast and loss."""
    return to_photonic(device) if isinstance(device, IonMemristor) else to_ion(device)


def _remainder(device: AbstractMemristor) -> dict[str, Any]:
    if not isinstance(device, IonMemristor):
        total = population_gap(device, image_of(device))
        return {"populations": {"all together": total._asdict()}, "without": {}, "states": {}}
    left = remainder(device)
    gaps = {name: gap._asdict() for name, gap in left.with_only.items()}
    gaps |= {"all together": left.total._asdict(), "none of these": left.baseline._asdict()}
    return {
        "populations": gaps,
        "without": {name: gap._asdict() for name, gap in left.with_all_but.items()},
        "states": {title: getattr(left, name) for name, title in _STATES.items()},
    }


def _left_out(left: dict[str, Any]) -> list[str]:
    gaps = left["populations"]
    total = gaps["all together"]
    text = f"Device and image differ by at most {total['y']:.2g} in y (rms {total['rms_y']:.2g})"
    causes = sorted(((gap["y"], name) for name, gap in gaps.items() if name in left["without"]), reverse=True)
    if causes:
        text += "; by itself " + ", ".join(f"{name} leaves {size:.2g}" for size, name in causes)
    return [text + "."]


def _loops(device: AbstractMemristor, wanted: Transfer) -> dict[str, Any]:
    """The last period of the loop of the device and of its image, without shots."""
    x_set = np.asarray(sine_input(periods=wanted.periods, cycles_per_period=wanted.cycles_per_period))
    last = slice(-wanted.cycles_per_period - 1, None)
    columns = {}
    for name, one in (("device", device), ("image", image_of(device))):
        loop = played(one, x_set)
        columns[f"x_{name}"] = ("cycle", np.asarray(loop.x)[last])
        columns[f"y_{name}"] = ("cycle", np.asarray(loop.y)[last])
    return columns


def _settings(config: Config, wanted: Transfer) -> LoopTable:
    """The loops of a calibration: one at the window of [memory], and one at twice that."""
    x = np.asarray(sine_input(periods=wanted.periods, cycles_per_period=wanted.cycles_per_period))
    rows, window = 2 * len(x), config.memory.window_cycles
    zeros = np.zeros(rows)
    return LoopTable(
        loop=np.repeat(["A", "B"], len(x)), cycle=np.tile(np.arange(len(x)), 2), x_set=np.tile(x, 2),
        window_cycles=np.repeat([window, 2 * window], len(x)), detuning_1_set_hz=zeros, detuning_2_set_hz=zeros,
        shots=np.full(rows, wanted.shots), n_x=zeros, n_y=zeros, name="calibration",
    )  # fmt: skip


def _weakest(device: AbstractMemristor, boxes: dict[str, tuple[float, float]]) -> float:
    """Smallest phase scale of a photonic source: its full command is an area of pi over that on an ion."""
    if not isinstance(device, PhotonicMemristor):
        return 1.0
    names = ("phase_scale_1", "phase_scale_2")
    return min(boxes[name][0] if name in boxes else float(getattr(device, name)) for name in names)


def _target(config: Config, wanted: Transfer, table: LoopTable, weakest: float) -> Side:
    """The device that is moved to, in the middle of its ranges."""
    boxes = {name: value for name, value in wanted.target.items() if isinstance(value, tuple)}
    values: dict[str, Any] = {k: 0.5 * (v[0] + v[1]) if isinstance(v, tuple) else v for k, v in wanted.target.items()}
    memory = memory_from(config)
    if wanted.to == "photonic":
        return side(PhotonicMemristor(memory=memory, source="measured", **values), boxes, table)
    noise = {name: values.pop(name) for name in SlowNoise.parameters() if name in values}
    method = {"closed_form": ClosedForm()}.get(config.device.engine, Lindblad(1e-8))
    slow = SlowNoise(**noise) if noise else None
    ideal = {"lifetime_s": np.inf, "source": "measured"}
    ion = IonMemristor(memory=memory, method=method, slow_noise=slow, **ideal | values)
    return side(ion, boxes, table, weakest=weakest)


def _ideal(device: AbstractMemristor, wanted: Transfer) -> float:
    """Loss of the command map of an ideal device of this platform on an ideal one of the other."""
    ion = IonMemristor(memory=device.memory, method=ClosedForm(), lifetime_s=np.inf)
    chip = PhotonicMemristor(memory=device.memory)
    one, other = (ion, chip) if wanted.to == "photonic" else (chip, ion)
    return float(map_loss(image(one, other), other, wanted.points))


def _interval_json(values: np.ndarray) -> dict[str, Any]:
    """Mean of losses with its 95 % interval, and the central 95 % of the seeds."""
    found = mean_interval(values)
    seeds = [float(end) for end in np.quantile(values, [0.025, 0.975])]
    return {"mean": found.mean, "ci95": [found.low, found.high], "seeds95": seeds}


def _lost(control: str, every: np.ndarray) -> str:
    """The price of the move and of not knowing, paired over seeds, in words."""
    column = dict(zip(DESIGNED_ON, every.T, strict=True))
    moved, again = (mean_interval(column[name] - column["native"]) for name in ("moved", "recalibrated"))
    name = control.replace("_", " ").capitalize()
    return (
        f"{name}: {np.mean(column['native']):.2g} where the target is known; moved without recalibration "
        f"{moved.mean:+.2g} ({moved.low:+.2g} to {moved.high:+.2g}), recalibrated {again.mean:+.2g} "
        f"({again.low:+.2g} to {again.high:+.2g})."
    )

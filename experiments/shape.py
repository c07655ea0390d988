"""`iontwin optimize` with [optimize.shape]: sampled pulses within the limits of [hardware].

Leaves ``result.json`` (the target's number before and after, of every exported file, read back and solved again, and
what stands between it and perfection), ``arrays.nc`` (samples, spectra, error maps or loops, robustness), the report,
and the samples as ``waveform.csv``, ``.nc``, ``.qasm`` and ``.py`` (ARTIQ), in radians per second at full command.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.families import COMPOSITES, composite
from calibration.hardware import Hardware
from calibration.limits import Limits, NotKnowing, limits, value_of_recalibrating
from calibration.robust import Robust
from calibration.shaping import Layout, Shaped, gaussian_pulses, on_hardware, player_of, rescored, shape
from calibration.targets import AbstractTarget, parts
from experiments import command_maps, report, waveform_files
from experiments.build import hardware_from
from experiments.checkpoint import Checkpoint, same_but_iterations
from experiments.config import ConfigError
from experiments.control_arrays import arrays_of_samples
from experiments.progress import search_progress
from experiments.provenance import Stopwatch, provenance
from experiments.records import RunFolder
from experiments.schema import Config
from experiments.waveform_files import Samples, WaveformError
from twin.memristor import IonMemristor
from twin.waveform import Waveform

FILES = ("waveform.csv", "waveform.nc", "waveform.qasm", "waveform.py")
LINES = ("line_1", "line_2")
NOMINAL, ROBUST = "shape", "robust"
_NO_LOOP = 1e-6  # a loop number below this is none
_CHUNK = 10  # iterations between two reports of a search


@dataclass(frozen=True)
class Work:
    """What is to be done: an ion, its hardware, what is wanted of them, and when pulses are played."""

    config: Config
    ion: IonMemristor
    hardware: Hardware
    target: AbstractTarget
    robust: Robust | None
    layout: Layout
    start: Waveform | None
    given: Samples | None
    """Samples of a file, as they stand there."""

    @property
    def family(self) -> dict[str, Any]:
        """Arguments of `shape` that say what is free."""
        assert self.config.optimize is not None
        assert self.config.optimize.shape is not None
        wanted = self.config.optimize.shape
        return {"name": wanted.family, "numbers": wanted.numbers, "seed": self.config.optimize.seed}

    def score(self, waveform: Waveform, offsets_hz: tuple[float, float], target: AbstractTarget | None = None) -> float:
        """The target's number of samples, by dense matrix exponentials."""
        return rescored(
            self.ion, self.hardware, self.target if target is None else target, self.layout, waveform, offsets_hz
        )


def run(
    config: Config, ion: IonMemristor, target: AbstractTarget, robust: Robust | None, notes: list[str],
    fit_run: Path | None, out: RunFolder, clock: Stopwatch,
) -> dict[str, Any]:  # fmt: skip
    """Optimize the samples of both pulses, or solve those of a file.

    Args:
        config: with tables [optimize.shape] and [hardware].
        ion: the device, as configured or calibrated. target: what is wanted of it; `robust`: of many like it.
        notes: sentences about the device. fit_run: where it was calibrated.
        out: the run folder. clock: running since the start.

    Returns:
        What ``result.json`` holds.
    """
    assert config.optimize is not None
    work = _work(config, ion, target, robust)
    free = config.optimize.iterations > 0
    checkpoint = _checkpoint(config, fit_run, out)
    found, history = _searched(work, checkpoint, out) if free else (_given(work), {})
    recomputed = work.score(found.waveform, found.offsets_hz)
    # A robust search saw its members: the numbers of the nominal device are computed afterwards.
    before, after = found.before, found.after
    if robust is not None:
        before, after = work.score(found.start, (0.0, 0.0)), recomputed
    bounds, unknown = _limits(work, found, out) if free else (None, None)
    members = _over_members(work, found, unknown)
    files, losses = _exported(found, work, out)
    seconds = clock.stop()
    result = {
        "kind": "optimize",
        "status": found.status,
        "target": config.optimize.target,
        "metric": {
            "name": target.name, "unit": target.unit, "before": before, "after": after, "recomputed": recomputed,
        },
        "terms": {
            part.name: {"unit": part.unit, "value": work.score(found.waveform, found.offsets_hz, part)}
            for part in parts(target)
        },
        "offsets_hz": list(found.offsets_hz),
        "free_numbers": int(found.point.size),
        "violations": work.hardware.violations(found.waveform),
        "files": files,
        "limits": None if bounds is None else bounds._asdict(),
        "robust": members,
        "notes": notes + _notes(found, work, recomputed, members, bounds) + losses,
        "history": history,
        "from": None if fit_run is None else Path(fit_run).name,
        "seed": config.optimize.seed,
        "seconds": seconds,
        **provenance(),
    }  # fmt: skip
    out.write_result(result)  # first: what follows cannot lose it
    arrays = arrays_of_samples(found, work.ion, work.hardware, target, work.layout)
    headroom = np.min(
        np.asarray(work.hardware.largest_rad_s) / np.maximum(np.asarray(found.waveform.peak_rad_s), 1e-300)
    )
    device = on_hardware(work.ion, work.hardware, work.layout, found.waveform, offsets_hz=found.offsets_hz)
    arrays = arrays.assign(
        command_maps.add(config, device, found.offsets_hz, fit_run, out, result, headroom=float(headroom))
    )
    out.write_result(result)
    out.write_arrays(arrays)
    report.write(out)
    if free:
        checkpoint.remove()
    out.log(
        f"{found.status}; {target.name} {before:.4g} before, {after:.4g} after, {recomputed:.4g} as "
        "exported; " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    )
    for note in result["notes"]:
        out.log(f"  {note}")
    return result


def _work(config: Config, ion: IonMemristor, target: AbstractTarget, robust: Robust | None) -> Work:
    assert config.optimize is not None
    assert config.optimize.shape is not None
    wanted, hardware = config.optimize.shape, hardware_from(config)
    start, given = None, None
    if Path(wanted.start).suffix:
        given = waveform_files.read(wanted.start)
        start = _as_waveform(given, hardware, wanted.start)
    elif wanted.start in COMPOSITES:
        start = composite(wanted.start, hardware, wanted.samples)
    elif wanted.start != "gaussian":
        raise ConfigError(
            f"optimize.shape.start: {wanted.start!r} is neither gaussian, nor one of {', '.join(COMPOSITES)}, nor a "
            "file of samples; name one of these."
        )
    if given is None and config.optimize.iterations == 0:
        raise ConfigError("optimize.iterations: 0 only solves samples of a file; name one as optimize.shape.start, or "
                          "give more iterations.")  # fmt: skip
    layout = Layout(wanted.samples, wanted.delay_samples, wanted.oversampling)
    if start is not None and given is not None:
        whole = wanted.samples + wanted.delay_samples
        if start.samples != whole:
            raise ConfigError(
                f"optimize.shape: {wanted.start} has {start.samples} samples, but samples and delay_samples make "
                f"{whole}; change these."
            )
        if config.optimize.iterations > 0:
            start = layout.taken_apart(start)
    return Work(config, ion, hardware, target, robust, layout, start, given)


def _as_waveform(given: Samples, hardware: Hardware, name: str) -> Waveform:
    if given.real_rad_s.shape[1] != hardware.channels:
        raise ConfigError(f"{name}: the file has {given.real_rad_s.shape[1]} channels, but the hardware has "
                          f"{hardware.channels}; give as many.")  # fmt: skip
    if not np.isclose(given.sample_s, hardware.sample_s, rtol=1e-9):
        raise ConfigError(f"{name}: the clock of the file is {given.sample_s:g} s, but hardware.sample_s is "
                          f"{hardware.sample_s:g}; change one.")  # fmt: skip
    order = [given.channels.index(line) for line in LINES] if set(given.channels) == set(LINES) else [0, 1]
    return Waveform(given.real_rad_s[:, order], given.imag_rad_s[:, order], hardware.sample_s)


def _checkpoint(config: Config, fit_run: Path | None, out: RunFolder) -> Checkpoint:
    assert config.optimize is not None
    assert config.optimize.shape is not None
    files = [Path(name) for name in (config.optimize.curve, config.optimize.shape.start) if name]
    files += [] if fit_run is None else [fit_run / "twin.json"]
    return Checkpoint(out.path, same_but_iterations(config.to_toml(), files))


def _searched(work: Work, checkpoint: Checkpoint, out: RunFolder) -> tuple[Shaped, dict[str, list[float]]]:
    """The nominal search, and from its end that over all members, each going on where it was killed."""
    wanted = work.config.optimize
    assert wanted is not None
    before = checkpoint.load()
    if before is not None:
        out.log(f"goes on after {before[1]} iterations of the stage {before[0]}, where it was stopped")
    stages: list[tuple[str, AbstractTarget]] = [(NOMINAL, work.target)]
    if work.robust is not None:
        stages.append((ROBUST, work.robust))
    found, history = None, {}
    for stage, target in stages:
        if before is not None and before[0] == ROBUST and stage == NOMINAL:
            continue  # it was over
        done, begin = 0, None if found is None else found.point
        if before is not None and before[0] == stage:
            done, begin = before[1], before[2]
        with search_progress(out, target.name) as progress:
            found = shape(
                work.ion, work.hardware, target, work.layout, **work.family, start=work.start, begin_at=begin,
                iterations=max(1, wanted.iterations - done), enough=wanted.enough, on_progress=progress,
                on_point=_keeping(checkpoint, stage, done),
            )  # fmt: skip
        history[stage] = found.history
        over = done + _CHUNK * len(found.history)
        following = (ROBUST, 0) if stage == NOMINAL and work.robust is not None else (stage, over)
        checkpoint.keep(*following, found.point, at_once=True)
    assert found is not None
    return found, history


def _keeping(checkpoint: Checkpoint, stage: str, done: int) -> Callable[[np.ndarray], None]:
    chunks = [0]

    def keep(point: np.ndarray) -> None:
        chunks[0] += 1
        checkpoint.keep(stage, done + _CHUNK * chunks[0], point)

    return keep


def _given(work: Work) -> Shaped:
    """The samples of a file as they stand there."""
    assert work.start is not None
    assert work.given is not None
    offsets = tuple(_offset_hz(work.given, f"laser_offset_{k}_hz") for k in (1, 2))
    target = work.target if work.robust is None else work.robust
    value = work.score(work.start, offsets, target)
    raw = work.hardware.unconstrained(gaussian_pulses(work.hardware, work.layout.samples))
    first = work.layout.placed(work.hardware.quantized(work.hardware.allowed(*raw)))
    before = work.score(first, (0.0, 0.0), target)
    return Shaped("done", before, value, work.start, first, np.zeros(0), offsets, [])


def _offset_hz(given: Samples, name: str) -> float:
    value = given.attributes.get(name, 0.0)
    if isinstance(value, str):
        raise ConfigError(f"optimize.shape.start: the file has {name} = {value!r:.40}, which is no number; mend it.")
    return float(value)


def _limits(work: Work, found: Shaped, out: RunFolder) -> tuple[Limits, NotKnowing | None]:
    wanted = work.config.optimize
    assert wanted is not None
    out.log("limits: the same search with decay and dephasing alone, and without them")
    bounds = limits(
        work.ion, work.hardware, work.target, work.layout, found.point, iterations=wanted.iterations, start=work.start,
        **work.family,
    )  # fmt: skip
    if work.robust is None or wanted.robust is None or not wanted.robust.recalibrate:
        return bounds, None
    count = wanted.robust.recalibrate
    out.log(f"recalibration: the search again for {count} members, as if each were known")
    player, _, _ = player_of(work.ion, work.hardware, work.robust, work.layout, **work.family, start=work.start)
    unknown = value_of_recalibrating(
        player, work.robust, found.point, found.offsets_hz, count, iterations=wanted.iterations
    )
    return bounds, unknown


def _over_members(work: Work, found: Shaped, unknown: NotKnowing | None) -> dict[str, Any] | None:
    """The target's number over the members, before and after, and what is lost because they are not told apart."""
    if work.robust is None:
        return None
    result: dict[str, Any] = {
        "name": work.robust.name, "members": work.robust.members,
        "before": found.before, "after": found.after,
        "recomputed": work.score(found.waveform, found.offsets_hz, work.robust),
    }  # fmt: skip
    if unknown is not None:
        result["recalibrated"] = {
            "members": len(unknown.own), "common": unknown.common.tolist(), "own": unknown.own.tolist(),
            "mean_common": float(np.mean(unknown.common)), "mean_own": float(np.mean(unknown.own)),
        }  # fmt: skip
    return result


def _exported(found: Shaped, work: Work, out: RunFolder) -> tuple[dict[str, float], list[str]]:
    """Writes every file that can hold the samples; the target's number of each as it is read back, and why not."""
    table = work.config.hardware
    assert table is not None
    w = found.waveform
    samples = Samples(
        real_rad_s=np.asarray(w.real_rad_s),
        imag_rad_s=np.asarray(w.imag_rad_s),
        sample_s=float(w.sample_s),
        channels=LINES,
        full_scale_rad_s=work.hardware.largest_rad_s,
        bits=work.hardware.bits,
        carrier_hz=None if table.carrier_hz is None else tuple(table.carrier_hz),
        attributes={"laser_offset_1_hz": found.offsets_hz[0], "laser_offset_2_hz": found.offsets_hz[1]},
    )
    values: dict[str, float] = {}
    notes: list[str] = []
    for name in FILES:
        try:
            waveform_files.write(out.work / name, samples)
            again = waveform_files.read(out.work / name)
        except WaveformError as error:
            notes.append(f"{name} is not there: {str(error).partition(': ')[2] or error}")
            continue
        values[name] = work.score(Waveform(again.real_rad_s, again.imag_rad_s, again.sample_s), found.offsets_hz)
    return values, notes


def _notes(
    found: Shaped, work: Work, recomputed: float, members: dict[str, Any] | None, bounds: Limits | None
) -> list[str]:
    peaks = np.asarray(found.waveform.peak_rad_s) / np.asarray(work.hardware.largest_rad_s)
    at_limit = [f"line {k + 1}" for k, share in enumerate(peaks) if share > 0.99]
    offsets = "{:+.1f} and {:+.1f} Hz".format(*found.offsets_hz)
    if bounds is None:
        assert work.given is not None
        named = set(work.given.channels) == set(LINES)
        notes = [f"The samples of the file are solved as they stand, with lasers offset by {offsets}; nothing moved."]
        if not named:
            notes.append(f"Its channels {' and '.join(work.given.channels)} play lines 1 and 2, in this order.")
    else:
        notes = [f"The lasers are offset by {offsets}, onto the calibrated lines."]
        again = recomputed if members is None else members["recomputed"]
        notes.append(f"Rounding and an independent solver change the number by {abs(again - found.after):.1e}.")
        notes.append(_limits_in_words(work.target, recomputed, bounds))
    if members is not None:
        notes.append(_members_in_words(members))
    broken = [name for name, by in work.hardware.violations(found.waveform).items() if by > 0]
    if broken:
        notes.append(f"The samples break limits of the hardware: {', '.join(broken)} (see violations).")
    if at_limit:
        notes.append(f"{' and '.join(at_limit)} reaches full scale; more power would gain more.")
    return notes


def _members_in_words(members: dict[str, Any]) -> str:
    text = (
        f"Over {members['members']} devices {members['name']} is {members['before']:.4g} before and "
        f"{members['recomputed']:.4g} after"
    )
    again = members.get("recalibrated")
    if again is None:
        return text + "."
    return (
        f"{text}. {again['members']} of them, searched again as if each were known, come from "
        f"{again['mean_common']:.4g} to {again['mean_own']:.4g} in the mean: what calibrating each would gain."
    )


def _limits_in_words(target: AbstractTarget, reached: float, bounds: Limits) -> str:
    text = (
        f"{target.name} {reached:.4g}: with decay and dephasing as the only faults the same search reaches "
        f"{bounds.decay_and_dephasing:.4g}, without them {bounds.hardware:.4g}"
    )
    if bounds.ideal is None:
        return text + "."
    text += f"; a device that obeys exactly has {bounds.ideal:.4g}"
    if bounds.ideal < _NO_LOOP:
        return text + "."
    share = reached / bounds.ideal
    text += f", of which {100 * share:.1f} % is reached"
    if share >= 0.99:
        return text + "."
    of = {
        "decay and dephasing": bounds.hardware - bounds.decay_and_dephasing,
        "time and power of the hardware": bounds.ideal - bounds.hardware,
        "the other faults of the device": bounds.decay_and_dephasing - reached,
    }
    return text + f"; most of the rest is due to {max(of, key=lambda name: of[name])}."

"""Posing a calibration: tables, boxes and a device become a `Problem` whose devices are ready to be evaluated."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from calibration.data import LoopTable
from calibration.likelihood import Experiment, bucketed
from calibration.observations import Noise
from calibration.parameters import FreeParameters, anchored, with_parameters
from calibration.problem import NOISE_PARAMETERS, Data, Loops, Part, Problem, Scanned
from calibration.scan_tables import ScanTable
from calibration.scans import Scan
from twin.emulator import EmulationError
from twin.loop import AbstractMemristor
from twin.memristor import AreaSeries, Automatic, IonMemristor, Lindblad
from twin.planning import emulated, planned

# Population error of emulated devices. An estimate moves by less than a thousandth of its standard error for some
# hundred cells of some hundred shots; every fit checks its optimum against the device's own method.
EMULATION_ERROR = 1e-6

MEMORY_UNUSED = "`window_cycles` cannot be identified: the table records `r_set`, so the memory is never used."
"""Note on a free window beside recorded transfers."""


class Posed(NamedTuple):
    """A problem ready to be solved.

    Attributes:
        problem: with devices that are cheap to evaluate. reference: the same with the devices' own method; the two are
            one where nothing is emulated.
        notes: sentences on what was not done as usual.
    """

    problem: Problem
    reference: Problem
    notes: list[str]


def pose(
    device: AbstractMemristor,
    tables: LoopTable | Mapping[str, LoopTable | ScanTable],
    boxes: Mapping[str, tuple[float, float]],
    *,
    per_table: Sequence[str] = (),
    noise: str = "binomial",
    offsets: Sequence[tuple[float, float]] = (),
) -> Posed:
    """The question which parameters of a device make tables most probable, its devices made ready for the boxes.

    Args:
        device: supplies the scheme, the method, and every parameter that is not free. `Lindblad` devices are emulated
            (`twin.emulator`) where a polynomial of bearable size serves the boxes, and planned otherwise.
        tables: one table of loops, or several by name; auxiliary scans among them.
        boxes: (low, high) of each free parameter.
        per_table: free parameters of which each table of loops has its own, reported as ``NAME@TABLE``; scans then have
            one together with the first table of loops.
        noise: law of the scatter, one of `calibration.observations.NOISES`.
        offsets: further laser offsets, Hz, that devices must serve: those of tables to come.

    Raises:
        ValueError: an unknown parameter, an empty box, a noise parameter under another noise.
    """
    named = {"loops": tables} if isinstance(tables, LoopTable) else dict(tables)
    loops = {name: table for name, table in named.items() if isinstance(table, LoopTable)}
    scans = {name: table for name, table in named.items() if isinstance(table, ScanTable)}
    for name in per_table:
        if name not in boxes:
            raise ValueError(f"`{name}` is to differ from table to table, but is not free; give it a box.")
    free: dict[str, tuple[float, float]] = {}
    for name, box in boxes.items():
        free |= {f"{name}@{part}": box for part in loops} if name in per_table and len(loops) > 1 else {name: box}
    check_noise_parameters(boxes, noise)
    parameters = FreeParameters.from_boxes(free)
    of_device = {name: box for name, box in boxes.items() if name not in NOISE_PARAMETERS}
    device = anchored(device)
    with_parameters(device, {name: jnp.asarray(0.5 * (low + high)) for name, (low, high) in of_device.items()})
    if scans and not isinstance(device, IonMemristor):
        raise ValueError(f"scans are measured on an ion, but the device is a {type(device).__name__}; leave them out.")
    if isinstance(device, IonMemristor) and isinstance(device.method, Automatic):
        device = dataclasses.replace(device, method=Lindblad(device.method.error))
    prepared: dict[str, Experiment] = {}
    notes: list[str] = []
    if not loops:
        own = fast = planned(device, of_device)
    else:
        distinct = distinct_offsets(loops.values(), offsets)
        prepared = {name: Experiment.from_table(table, distinct) for name, table in loops.items()}
        settings = next(iter(prepared.values())).settings
        solves = max(data.solves_of_setting for data in prepared.values())
        own = fast = planned(device, of_device, detuning_set_hz=settings.largest_hz, solves=solves)
        if isinstance(device, IonMemristor) and isinstance(device.method, Lindblad | AreaSeries):
            try:
                fast = emulated(device, of_device, settings, error=max(EMULATION_ERROR, _finest(device.method)))
            except EmulationError as error:
                notes.append(f"The dynamics were integrated anew at every step of the search: {error}")
    windows = {"window_cycles", *(f"window_cycles@{name}" for name in loops)} & set(free)
    data: dict[str, Data] = {
        name: Loops(bucketed(own, one, own_window=bool(windows))) for name, one in prepared.items()
    }
    # Scans share the parameters of the first table of loops where tables have their own.
    first = next(iter(loops), "")
    data |= {name: Scanned(Scan.from_table(table).planned(own, of_device)) for name, table in scans.items()}

    def parts(of_loops: AbstractMemristor) -> tuple[Part, ...]:
        return tuple(
            Part(name, of_loops, one, len(loops[name]), name)
            if name in loops
            else Part(name, own, one, len(one.observed[0].value), first)
            for name, one in data.items()
        )

    notes += [MEMORY_UNUSED for one in prepared.values() if windows and one.r_set is not None]
    reference = Problem(parameters, parts(own), Noise(noise))
    problem = reference if fast is own else Problem(parameters, parts(fast), Noise(noise))
    return Posed(problem, reference, notes)


def check_noise_parameters(boxes: Mapping[str, tuple[float, float]], noise: str) -> None:
    """Refuses boxes of a noise that is not the chosen one."""
    for name, law in (("overdispersion", "beta_binomial"), ("outlier_share", "outliers")):
        if name in boxes and noise != law:
            raise ValueError(f"`{name}` is a parameter of the noise '{law}' alone; choose it, or fix the parameter.")


def distinct_offsets(
    tables: Iterable[LoopTable], more: Sequence[tuple[float, float]] = ()
) -> Float[np.ndarray, "settings 2"]:
    """Laser offsets of all tables, Hz, each once, sorted."""
    rows = [np.stack([t.detuning_1_set_hz, t.detuning_2_set_hz], axis=1) for t in tables]
    return np.unique(np.concatenate([*rows, np.asarray(more, float).reshape(-1, 2)]), axis=0)


def _finest(method: Lindblad | AreaSeries) -> float:
    return method.error if isinstance(method, Lindblad) else method.finest_error

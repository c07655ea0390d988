"""A register's loop table as a part of a calibration, and the question which parameters of its ions explain it.

Each loop of the table is an ion, in order of first appearance along the chain; rows of one cycle were played at the
same time. All ions are predicted at once, because light of a neighbour's beam depends on that neighbour's command.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from calibration.columns import TableError
from calibration.data import LoopTable
from calibration.likelihood import Experiment, Prediction, measured, outputs
from calibration.observations import Noise, Observations
from calibration.parameters import FreeParameters, anchored, value_of, with_parameters, with_window
from calibration.posing import MEMORY_UNUSED, Posed, check_noise_parameters, pose
from calibration.problem import NOISE_PARAMETERS, Part, Problem, observed_again, simulated
from twin.batching import batch_shape
from twin.closed_form import flat_root
from twin.dynamics import StaticGrid
from twin.loop import AbstractMemristor, Settings
from twin.memory import AbstractMemory
from twin.memristor import AreaSeries, Automatic, IonMemristor, Lindblad
from twin.planning import SOLVES_OF_CYCLE, forward_mode, planned
from twin.register import Register
from twin.slow_noise import SlowNoise

# They act through the areas alone.
_SCALES = ("rabi_scale_1", "rabi_scale_2", "amplitude_1", "amplitude_2")
# At the upper ends of their boxes areas are largest.
_BRIGHTENING = (*_SCALES, "crosstalk_1", "crosstalk_2")


class RegisterLoops(eqx.Module):
    """The loop table of a register as a part; every array of predictions is in the order of its rows.

    Attributes:
        experiment: the table; its loops are the ions.
        settings: laser offsets of each cycle and ion.
    """

    experiment: Experiment
    settings: Settings

    @classmethod
    def from_table(cls, table: LoopTable, register: Register) -> "RegisterLoops":
        """Prepares a validated table.

        Raises:
            TableError: not one loop for each ion, or loops of different cycles.
        """
        _check(table, register.count)
        rows = np.stack([table.rows(label) for label in table.labels], axis=1)
        offsets = table.detuning_1_set_hz[rows], table.detuning_2_set_hz[rows]
        if all(np.all(offset == offset[0, 0]) for offset in offsets):
            offsets = offsets[0][0, 0], offsets[1][0, 0]
        return cls(Experiment.from_table(table), Settings.of(*offsets, rows.shape))

    @property
    def place(self) -> Int[Array, "cycles ions"]:
        """The row of each cycle of each ion."""
        return jnp.stack(self.experiment.loops, axis=1)

    def solves_of_setting(self, register: Register) -> float:
        """Solves of both pulses that each distinct ion and setting takes; ions of the same physics are one."""
        ion, settings = register.ion, self.settings
        distinct = batch_shape(ion.system(settings.detuning_1_hz, settings.detuning_2_hz), ion.timing)
        return SOLVES_OF_CYCLE * self.place.size / math.prod(distinct)

    def prepared(self, register: Register) -> Register:
        """The register with its method and grid decided for these settings."""
        return register.prepared(self.experiment.x_set[self.place], self.settings)

    def predicted(
        self, device: AbstractMemristor, own_window: bool
    ) -> list[tuple[Observations, Float[Array, " rows"]]]:
        """The measured columns with the probabilities that a register gives them."""
        return measured(self.experiment, self.prediction(device, own_window))

    def prediction(self, device: AbstractMemristor, own_window: bool) -> Prediction:
        """Everything that a register says about the rows."""
        data, place = self.experiment, self.place
        x_set, nothing = data.x_set[place], jnp.zeros(place.shape)
        kinds = jnp.array([True, False]).repeat(len(place))[:, None]
        r = self._known_transfers(device, own_window)
        if r is None:
            first = self._populations(device, x_set, nothing, kinds[: len(place)])
            fed, modelled = data.fed_x[place], device.assigned(first)
            fed = device.signal(first) if device.source == "model" else jnp.where(jnp.isfinite(fed), fed, modelled)
            r = self._memory(device, own_window).filter(fed)
            second = self._populations(device, x_set, r, kinds[len(place) :])
        else:
            # All transfers are known beforehand: both kinds of run are one batch.
            both = self._populations(device, jnp.tile(x_set, (2, 1)), jnp.concatenate([nothing, r]), kinds)
            first, second = both[:, : len(place)], both[:, len(place) :]
        p_y, p_m = outputs(device, data, second)
        valid = jnp.all(jnp.isfinite(first) & jnp.isfinite(second), axis=0)
        in_rows = lambda values: jnp.zeros(data.x_set.shape, values.dtype).at[place].set(values)
        return Prediction(*(in_rows(values) for values in (device.assigned(first), p_y, p_m, r, valid)))

    def _known_transfers(self, device: AbstractMemristor, own_window: bool) -> Float[Array, "cycles ions"] | None:
        """Transfers that do not depend on the model's own inputs; None if they do."""
        data = self.experiment
        if data.r_set is not None:
            return data.r_set[self.place]
        if device.source == "command":
            return self._memory(device, own_window).filter(data.x_set[self.place])
        if device.source == "measured" and data.all_x_measured:
            return self._memory(device, own_window).filter(data.fed_x[self.place])
        return None

    def _memory(self, device: AbstractMemristor, own_window: bool) -> AbstractMemory:
        windows = self.experiment.windows
        return device.memory if windows is None or own_window else with_window(device.memory, jnp.stack(windows))

    def _populations(self, register: Any, x_set, r_set, alone) -> Float[Array, "levels cycles ions"]:
        """After runs of either kind; NaN where the method misses its error."""
        fields = zip(register.ion.areas(x_set, r_set), (register.shares(k) for k in (1, 2)), strict=True)
        areas = [flat_root(sum((theta @ part.T) ** 2 for part in parts)) for theta, parts in fields]
        of_cycle = self.settings.of_cycle
        played = dataclasses.replace(
            self.settings, of_cycle=None if of_cycle is None else jnp.resize(of_cycle, (len(x_set),))
        )
        # One range for all ions: where they share the physics, they share the solves of a series.
        largest = tuple(lax.stop_gradient(jnp.max(theta)) for theta in register.largest_areas)
        scales = {name: lax.stop_gradient(getattr(register.ion, name)) for name in _SCALES}
        return _response(dataclasses.replace(register.ion, **scales), played, largest, *areas, alone)

    @property
    def observed(self) -> tuple[Observations, ...]:
        """The measured columns."""
        return self.experiment.columns

    def with_observed(self, values: Sequence[Array]) -> "RegisterLoops":
        """Other measured numbers, column by column."""
        return dataclasses.replace(self, experiment=observed_again(self.experiment, values))

    def simulated(
        self, key: PRNGKeyArray, device: AbstractMemristor, own_window: bool, noise: Noise
    ) -> "RegisterLoops":
        """The same settings measured on a register; memories follow simulated inputs where nothing recorded them."""
        of = lambda experiment: dataclasses.replace(self, experiment=experiment)
        predicted = lambda experiment: of(experiment).prediction(device, own_window)
        return of(simulated(key, self.experiment, predicted, device.source, noise))


@eqx.filter_custom_jvp
def _response(ion, settings: Settings, largest, theta_1, theta_2, alone) -> Float[Array, "levels cycles ions"]:
    """Populations of ions that see these areas, rad.

    What an ion does depends on its own areas and parameters alone. So one solve along each parameter, for all ions
    together, holds the derivatives by all that ions have of their own; tangents are weighted with it.
    """
    return ion.by_area(settings, largest)(theta_1, theta_2, alone=alone).populations


@_response.def_jvp
def _response_jvp(primals, tangents):
    ion, settings, largest, *thetas, alone = primals
    of_ion, _, _, *of_thetas, _ = tangents
    ion = forward_mode(ion)
    if jax.tree.leaves(of_ion.motion):
        raise ValueError("modes of a register have no derivative in a fit; differentiate `run` of the register.")
    moved = {
        f.name: getattr(of_ion, f.name)
        for f in dataclasses.fields(ion)
        if not f.metadata.get("static", False) and f.name not in ("memory", "method", "motion", "slow_noise")
    }
    if ion.slow_noise is not None and of_ion.slow_noise is not None:
        moved |= {name: getattr(of_ion.slow_noise, name) for name in SlowNoise.parameters()}
    moved = {name: tangent for name, tangent in moved.items() if tangent is not None}
    respond = ion.by_area(settings, largest)

    def by_areas(shift):
        return respond(*(theta + s for theta, s in zip(thetas, shift, strict=True)), alone=alone).populations

    def by_parameters(shift):
        fields = {name: value_of(ion, name) + s for name, s in zip(moved, shift, strict=True)}
        there = with_parameters(ion, fields)
        assert isinstance(there, IonMemristor)
        return there.by_area(settings, largest)(*thetas, alone=alone).populations

    populations = respond(*thetas, alone=alone).populations
    total = jnp.zeros_like(populations)
    for function, weights in ((by_areas, of_thetas), (by_parameters, list(moved.values()))):
        if any(weight is not None for weight in weights):
            slope = lambda direction, of=function: jax.jvp(of, (jnp.zeros_like(direction),), (direction,))[1]
            # One direction after another: the loop over solver stages is slow under vmap.
            for one, weight in zip(lax.map(slope, jnp.eye(len(weights))), weights, strict=True):
                total = total + (0.0 if weight is None else one * weight)
    return populations, total


def _check(table: LoopTable, count: int) -> None:
    labels = table.labels
    if len(labels) != count:
        raise TableError(
            f"{table.name}: a register of {count} ions needs {count} loops, one for each ion in the order of the "
            f"chain, but the table has {len(labels)} ({', '.join(labels)}); relabel the column loop, or change the "
            "number of ions."
        )
    cycles = {label: table.cycle[table.rows(label)] for label in labels}
    for label in labels[1:]:
        for has, lacks in ((labels[0], label), (label, labels[0])):
            missing = np.setdiff1d(cycles[has], cycles[lacks])
            if missing.size:
                raise TableError(
                    f"{table.name}: loop {lacks} has no cycle {missing[0]}, but loop {has} has; ions of a register "
                    "play every cycle together: add the row, its counts empty if nothing was measured, or remove "
                    "that cycle from all loops."
                )


def pose_register(
    register: Register,
    table: LoopTable | Mapping[str, LoopTable],
    boxes: Mapping[str, tuple[float, float]],
    *,
    per_ion: Sequence[str] = (),
    noise: str = "binomial",
) -> Posed:
    """The question which parameters of a register make tables most probable, its ions planned for the boxes.

    Args:
        register: supplies the number of ions, the method, and every parameter that is not free.
        table: each loop an ion; or several tables by name, of the same loops.
        boxes: (low, high) of each free parameter: of the ions, of the register (`crosstalk_1`, `crosstalk_2`), the
            window. One number for all ions, unless
        per_ion: names those of which each ion has its own, reported as ``NAME@ION`` with the label of its loop.
        noise: law of the scatter, one of `calibration.observations.NOISES`.

    Raises:
        ValueError: a table that does not fit the register, an unknown parameter, an empty box, a parameter of the
            register in `per_ion`, pulse shapes of each ion where beams reach neighbours.
    """
    tables = {"loops": table} if isinstance(table, LoopTable) else dict(table)
    data = {name: RegisterLoops.from_table(one, register) for name, one in tables.items()}
    labels = next(iter(tables.values())).labels
    for one in tables.values():
        if one.labels != labels:
            raise TableError(
                f"{one.name}: its loops are {', '.join(one.labels)}, but those of the first table {', '.join(labels)}; "
                "label the ions alike in all tables."
            )
    for name in per_ion:
        if name not in boxes:
            raise ValueError(f"`{name}` is to differ from ion to ion, but is not free; give it a box.")
        if name in NOISE_PARAMETERS or name.startswith("crosstalk"):
            raise ValueError(f"`{name}` belongs to the register as a whole; leave it out of `per_ion`.")
    check_noise_parameters(boxes, noise)
    of_device = {name: box for name, box in boxes.items() if name not in NOISE_PARAMETERS}
    ion: Any = anchored(register.ion)
    if isinstance(ion.method, Automatic):
        ion = dataclasses.replace(ion, method=Lindblad(ion.method.error))
    register = dataclasses.replace(register, ion=ion)
    # Built once with values that differ, so that a register that cannot have them refuses in its own words.
    differing = lambda name, low, high: (
        jnp.linspace(low, high, register.count) if name in per_ion else jnp.asarray(high)
    )
    drawn: Any = with_parameters(register, {name: differing(name, *box) for name, box in of_device.items()})
    free: dict[str, tuple[float, float]] = {}
    for name, box in boxes.items():
        free |= {f"{name}@{ion}": box for ion in labels} if name in per_ion else {name: box}
    worst: Any = with_parameters(
        register, {name: jnp.asarray(high) for name, (_, high) in of_device.items() if name in _BRIGHTENING}
    )
    own = planned(
        worst.brightest,
        of_device,
        detuning_set_hz=max(one.settings.largest_hz for one in data.values()),
        solves=max(one.solves_of_setting(drawn) for one in data.values()),
    )
    register = register.with_method_of(own)
    parts = tuple(Part(name, register, one, len(tables[name]), ions=labels) for name, one in data.items())
    problem = Problem(FreeParameters.from_boxes(free), parts, Noise(noise))
    notes = []
    if isinstance(own.method, AreaSeries | StaticGrid):
        notes.append("The dynamics were integrated anew at every step of the search: registers are not emulated.")
    if "window_cycles" in boxes and any(one.experiment.r_set is not None for one in data.values()):
        notes.append(MEMORY_UNUSED)
    return Posed(problem, problem, notes)


def posed(
    device: AbstractMemristor,
    tables: LoopTable | Mapping[str, Any],
    boxes: Mapping[str, tuple[float, float]],
    *,
    per_table: Sequence[str] = (),
    per_ion: Sequence[str] = (),
    noise: str = "binomial",
) -> Posed:
    """`pose_register` for a register, `calibration.posing.pose` for any other device; arguments as for `fit`."""
    if not isinstance(device, Register):
        if per_ion:
            raise ValueError(
                f"`per_ion` names {', '.join(per_ion)}, but the device is a {type(device).__name__}, one ion; leave it "
                "empty, or give a Register."
            )
        return pose(device, tables, boxes, per_table=per_table, noise=noise)
    if per_table:
        raise ValueError("a register has no parameters of each table; leave `per_table` empty.")
    for name, one in ({} if isinstance(tables, LoopTable) else tables).items():
        if not isinstance(one, LoopTable):
            raise ValueError(
                f"`{name}` is a scan, which is measured on one ion, but the device is a Register; leave it out."
            )
    return pose_register(device, tables, boxes, per_ion=per_ion, noise=noise)

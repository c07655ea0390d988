"""Auxiliary scans: what a laboratory measures beside loops, with the device's own pulses, lines and readout.

A Rabi and a frequency scan are one model: the pulse that is scanned has a commanded area, width and laser offset in
each row (`PulseScan`). A Ramsey sequence is two pulses on line 1 (`RamseyScan`). A readout histogram knows nothing of
pulses (`ReadoutScan`). All of them, but the last, are solved by the full dynamics whatever method the device names for
its cycles, to that method's error: a closed form without detuning has no frequency scan.
"""

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from twin import grid as grids
from twin import phonons, shots, slow_noise
from twin.area_series import AreaSeries
from twin.batching import batch_shape, is_traced, physical, real_array
from twin.dynamics import evolve
from twin.levels import SCHEMES, LevelSystem
from twin.memristor import IonMemristor
from twin.methods import Adaptive, StaticGrid
from twin.motion import carrier_factors, nodes_for
from twin.planning import rounded_up
from twin.pulses import Gaussian
from twin.slow_noise import Nodes, SlowNoise, drawn, slow_quadrature

# The action of a grid grows with the first and shrinks with the second, so that one end of a box decides; the others
# that matter move knots or have a sign, and both ends are tried.
_GROWING = (
    "rabi_scale_1",
    "rabi_scale_2",
    "amplitude_1",
    "amplitude_2",
    "laser_linewidth_hz",
    "laser_linewidth_1_hz",
    "laser_linewidth_2_hz",
)
_SHRINKING = ("lifetime_s", "m_lifetime_s")
_BOTH_ENDS = (
    *("detuning_1_hz", "detuning_2_hz", "stark_1_hz", "stark_2_hz"),
    *("sigma_1_s", "sigma_2_s", "separation_s", "lead_s", "tail_s"),
)
_DEFAULT_ERROR = 1e-8


class Plan(NamedTuple):
    """What is static in the solve of a scan: grid steps, thermal nodes, and the error for which they were laid.

    `motion_nodes` are those of many modes: factors and phonon numbers. `noise_nodes` are those of slow noise, and
    `noise_served` what they serve (`twin.shots.sizes`).
    """

    steps: int
    phonon_nodes: int
    error: float
    motion_nodes: tuple[int, int] | None = None
    noise_nodes: Nodes | None = None
    noise_served: tuple[float, ...] = ()


class Shot(NamedTuple):
    """One pulse of a sequence: area on the ion at rest, rad; actual width and centre, s; phase, rad, or None.

    `beam` is the one that makes it, `gained` the phonons gained before it.
    """

    area_rad: Float[Array, "..."]
    sigma_s: Float[Array, "..."]
    center_s: Float[Array, "..."]
    phase_rad: Float[Array, "..."] | None
    beam: int
    gained: Float[Array, "..."]


class Sequence(NamedTuple):
    """The pulses of all rows, those of shot k on coupling k of the graph, and their window, s."""

    system: LevelSystem
    shots: tuple[Shot, ...]
    window_s: tuple[Float[Array, "..."], Float[Array, "..."]]

    def pulses(self, factors) -> tuple[Gaussian, ...]:
        """Waveforms, slowed by these factors."""
        return tuple(
            Gaussian.from_area(
                factor * shot.area_rad, center_s=shot.center_s, sigma_s=shot.sigma_s, phase_rad=shot.phase_rad
            )
            for shot, factor in zip(self.shots, factors, strict=True)
        )


class AbstractScan(eqx.Module):
    """Rows of a scan: what was commanded, and the probability that a shot is assigned to s."""

    @abc.abstractmethod
    def probability(self, device: IonMemristor) -> Float[Array, "rows ..."]:
        """Probability of the counted outcome in each row, then the device's batch; NaN in rows that failed."""

    @abc.abstractmethod
    def planned(self, device: IonMemristor, box: Mapping[str, tuple[float, float]]) -> "AbstractScan":
        """The scan planned for a box of parameters, so that devices in it may be traced.

        Args:
            device: supplies the parameters outside the box and the error of its method; all values known.
            box: (low, high) of each parameter that will vary.
        """


class PulseScan(AbstractScan):
    """One pulse with its area, width or laser frequency scanned.

    The ion sees the commanded pulse as it sees those of a cycle: peak `amplitude_k rabi_scale_k area / (sqrt(2 pi)
    commanded sigma)`, and the commanded width times the ratio of the device's actual and nominal widths. Pulse 1 is
    played alone on a prepared ion; pulse 2 after the device's own pulse 1 at `x_set` = 1 (V: none is needed). The run
    is read `tail_s` after the scanned pulse's centre; what does not fit into `lead_s` and `tail_s` is cut.

    Args:
        pulse: which one is scanned, 1 or 2.
        area_rad: commanded area, rad, shape (rows,).
        sigma_s: commanded width, s, shape (rows,); None for the device's.
        detuning_set_hz: known offset of the scanned pulse's laser, laser minus line, Hz; the other laser has none.
        plan: static sizes; None lays them from the values at hand.
    """

    pulse: int = eqx.field(static=True)
    area_rad: Float[Array, " rows"] = physical()
    sigma_s: Float[Array, " rows"] | None = physical(default=None)
    detuning_set_hz: Float[Array, "..."] = physical(default=0.0)
    plan: Plan | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.pulse not in (1, 2):
            raise ValueError(f"`pulse` must be 1 or 2, but is {self.pulse!r}.")

    def probability(self, device):
        return _probability(self, device)

    def planned(self, device, box):
        return dataclasses.replace(self, plan=_plan(self, device, box))

    def sequence(self, device: IonMemristor, axes: int) -> Sequence:
        """The sequence of each row; `axes` batch axes of the device follow."""
        k = self.pulse
        area, offset = _rows(self.area_rad, axes), _rows(jnp.broadcast_to(self.detuning_set_hz, self._shape), axes)
        own = {
            name: getattr(device, f"{name}_{k}{unit}")
            for name, unit in (("amplitude", ""), ("rabi_scale", ""), ("sigma", "_s"))
        }
        nominal = getattr(device, f"nominal_sigma_{k}_s")
        ratio = real_array(1.0) if nominal is None else own["sigma"] / nominal
        sigma = own["sigma"] if self.sigma_s is None else ratio * _rows(self.sigma_s, axes)
        early = device.heating_rate_per_s * device.lead_s
        late = early + device.heating_rate_per_s * device.separation_s
        zero = real_array(0.0)
        scanned = Shot(
            own["amplitude"] * own["rabi_scale"] * ratio * area,
            sigma,
            zero if k == 1 else device.separation_s,
            None,
            k,
            early if k == 1 else late,
        )
        none = jnp.zeros_like(offset)
        if k == 1:
            system = device.system(offset, none)
            return Sequence(_couplings(system, system.couplings[:1]), (scanned,), device.window(True))
        full = device.areas(real_array(1.0), zero)[0]
        first = Shot(full, device.sigma_1_s, zero, None, 1, early)
        return Sequence(device.system(none, offset), (first, scanned), device.window(False))

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.area_rad.shape


class RamseyScan(AbstractScan):
    """Two equal pulses on line 1 with a wait between their centres and a phase of the second.

    On resonance, with pi/2 pulses short against everything else, the scheme that starts in v gives
    `P_s = (1 + exp(-damping) cos(delta_1 wait + phase)) / 2`. Pulses may overlap.

    A wait takes no steps but for its damping: to 1e-8, one of 10 ms takes 44 in all at a linewidth of 100 Hz and 108 at
    2 kHz, where one of 0.3 ms takes 40.

    Args:
        wait_s: from centre to centre, s, shape (rows,).
        phase_rad: laser phase of the second pulse, rad, shape (rows,) or one number.
        area_rad: commanded area of each pulse, rad.
        detuning_set_hz: known offset of laser 1, laser minus line, Hz.
        plan: static sizes; None lays them from the values at hand.
    """

    wait_s: Float[Array, " rows"] = physical()
    phase_rad: Float[Array, "..."] = physical(default=0.0)
    area_rad: Float[Array, "..."] = physical(default=math.pi / 2)
    detuning_set_hz: Float[Array, "..."] = physical(default=0.0)
    plan: Plan | None = eqx.field(static=True, default=None)

    def probability(self, device):
        return _probability(self, device)

    def planned(self, device, box):
        return dataclasses.replace(self, plan=_plan(self, device, box))

    def sequence(self, device: IonMemristor, axes: int) -> Sequence:
        """The sequence of each row; `axes` batch axes of the device follow."""
        wait, phase, area, offset = (
            _rows(jnp.broadcast_to(a, self._shape), axes)
            for a in (self.wait_s, self.phase_rad, self.area_rad, self.detuning_set_hz)
        )
        ratio = 1.0 if device.nominal_sigma_1_s is None else device.sigma_1_s / device.nominal_sigma_1_s
        theta = device.amplitude_1 * device.rabi_scale_1 * ratio * area
        early = device.heating_rate_per_s * device.lead_s
        first = Shot(theta, device.sigma_1_s, real_array(0.0), None, 1, early)
        later = early + device.heating_rate_per_s * wait
        second = Shot(theta, device.sigma_1_s, wait, phase, 1, later)
        system = device.system(offset, jnp.zeros_like(offset))
        # Both pulses drive one line: it has two couplings, whose drives add.
        line = system.couplings[0]
        window = -device.lead_s, wait + device.tail_s
        return Sequence(_couplings(system, (line, line)), (first, second), window)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.wait_s.shape


class ReadoutScan(AbstractScan):
    """Prepared ions that are read: the counted outcome is the wrong one. Preparation is taken as ideal.

    Args:
        bright: which level was prepared in each row: one that shines (else a shelved one), shape (rows,).
    """

    bright: Bool[Array, " rows"]

    def probability(self, device):
        bright = _rows(self.bright, len(_batch(device)))
        return jnp.where(bright, device.readout_error_bright, device.readout_error_dark)

    def planned(self, device, box):
        del device, box
        return self


def _rows(values, axes: int):
    """Rows before the batch axes of a device."""
    return values.reshape(values.shape + (1,) * axes)


def _batch(device: IonMemristor) -> tuple[int, ...]:
    fields = [f.name for f in dataclasses.fields(device) if not f.metadata.get("static", False)]
    return batch_shape(*(getattr(device, name) for name in fields if name not in ("memory", "method", "motion")))


def _couplings(system: LevelSystem, couplings) -> LevelSystem:
    return dataclasses.replace(system, couplings=couplings)


def _probability(scan: PulseScan | RamseyScan, device: IonMemristor) -> Float[Array, "rows ..."]:
    plan = scan.plan
    if plan is None and is_traced(scan, device):
        raise ValueError(
            "a scan cannot be planned from traced values; inside jit, grad or vmap use `scan.planned(device, box)` "
            "with the box of values that will occur."
        )
    if plan is None:
        plan = _plan(scan, device, {})
        plan = plan._replace(steps=rounded_up(plan.steps))
    if device.slow_noise is None:
        return _of_each_shot(scan, device, plan)
    if plan.noise_nodes is None:
        raise ValueError("the scan was planned without slow noise; plan it for the device, or for a box that has it.")
    noise = device.slow_noise
    draws = slow_quadrature(noise, plan.noise_nodes)
    lanes = drawn(dataclasses.replace(device, slow_noise=None), draws)
    mean = jnp.sum(draws.weights * _of_each_shot(scan, lanes, plan), axis=-1)
    now = shots.sizes(noise, (1.0, 1.0), (1.0, 1.0))
    beyond = [size > most * (1 + shots.ROUNDING) for size, most in zip(now, plan.noise_served, strict=True)]
    return jnp.where(functools.reduce(jnp.logical_or, beyond), jnp.nan, mean)


def _of_each_shot(scan: PulseScan | RamseyScan, device: IonMemristor, plan: Plan) -> Float[Array, "rows ..."]:
    """Probabilities of a device without slow noise."""
    axes = len(_batch(device))
    sequence = scan.sequence(device, axes)
    factors, weights = _carriers(device, plan, sequence, 1 + axes)
    if weights is None:
        factors = [factor[0] for factor in factors]
    solution = evolve(
        sequence.system,
        sequence.pulses(factors),
        start=SCHEMES[device.scheme].start,
        window_s=sequence.window_s,
        method=_method(device, plan),
    )
    populations = solution.populations[0]
    if weights is not None:
        populations = jnp.sum(weights * populations, axis=1)
    return device.assigned(populations)


def _carriers(device: IonMemristor, plan: Plan, sequence: Sequence, axes: int):
    """Debye-Waller factors of the shots at each node of the thermal average, and its weights; None at rest."""
    if device.motion is not None:
        pulses = [(shot.beam, shot.gained) for shot in sequence.shots]
        # On one beam the areas of all shots add up to one angle.
        area = jnp.max(jnp.stack([jnp.max(jnp.abs(lax.stop_gradient(shot.area_rad))) for shot in sequence.shots]))
        assert plan.motion_nodes is not None
        factors, numbers = plan.motion_nodes
        motion = dataclasses.replace(device.motion, factors=factors, numbers=numbers, error=plan.error)
        return phonons.carrier_factors(motion, device.n_bar, pulses, axes, area)
    carriers = [((device.eta_1, device.eta_2)[shot.beam - 1], shot.gained) for shot in sequence.shots]
    factors, weights = carrier_factors(device.n_bar, plan.phonon_nodes, carriers, axes)
    return factors, weights if plan.phonon_nodes > 1 else None


def _method(device: IonMemristor, plan: Plan) -> StaticGrid | Adaptive:
    """The device's own solver where it names one, with the steps of the plan."""
    method = device.method
    if isinstance(method, Adaptive):
        return method
    grid = method.grid if isinstance(method, AreaSeries) else method
    if isinstance(grid, StaticGrid):
        # A coarser error walks a share of the steps, a finer one has too few of them and is flagged.
        return dataclasses.replace(grid, steps=plan.steps, finest=plan.error, shared=False)
    return StaticGrid(error=plan.error, steps=plan.steps)


def _error(device: IonMemristor) -> float:
    """The finest population error that the device's method will be asked for."""
    grid = device.method.grid if isinstance(device.method, AreaSeries) else device.method
    if isinstance(grid, StaticGrid) and grid.finest is not None:
        return grid.finest
    return float(getattr(grid, "error", _DEFAULT_ERROR))


def _plan(scan: PulseScan | RamseyScan, device: IonMemristor, box: Mapping[str, tuple[float, float]]) -> Plan:
    """Steps and nodes that serve every row and every ion of a box."""
    noise = device.slow_noise
    names = [name for name in box if name in SlowNoise.parameters()]
    if noise is None and not names:
        return _quiet_plan(scan, device, box)
    still = dataclasses.replace(device, slow_noise=None)
    own = {name: interval for name, interval in box.items() if name not in names}
    most = shots.largest_noise(SlowNoise() if noise is None else noise, box)
    nodes = _noise_nodes(scan, still, most, own)
    reached = shots.reach(dataclasses.replace(still, slow_noise=dataclasses.replace(most, nodes=nodes)), {})
    loud = {f"rabi_scale_{k}": factor for k, factor in ((1, reached.factor_1), (2, reached.factor_2))}
    for name, factor in loud.items():
        low, high = own.get(name, (0.0, _largest(getattr(device, name), None)))
        own[name] = low, factor * high
    for name in ("detuning_1_hz", "detuning_2_hz"):
        now = np.asarray(getattr(device, name))
        low, high = own.get(name, (float(np.min(now)), float(np.max(now))))
        own[name] = low - reached.detuning_hz, high + reached.detuning_hz
    served = tuple(_largest(size, None) for size in shots.sizes(most, (1.0, 1.0), (1.0, 1.0)))
    return _quiet_plan(scan, still, own)._replace(noise_nodes=nodes, noise_served=served)


def _noise_nodes(scan: PulseScan | RamseyScan, device: IonMemristor, most: SlowNoise, box) -> Nodes:
    """Nodes of the average over shots; between two pulses of one line a detuning turns a phase for all of the wait."""
    error = _error(device)
    sequence = _at_corners(scan, device, box)
    of_beam = lambda k: [shot for shot in sequence.shots if shot.beam == k]
    areas = tuple(sum(_largest(jnp.abs(shot.area_rad), None) for shot in of_beam(k)) for k in (1, 2))
    widths = tuple(max((_largest(shot.sigma_s, None) for shot in of_beam(k)), default=0.0) for k in (1, 2))
    nodes = slow_noise.nodes_for(most, areas, widths, error)
    if len(of_beam(1)) < 2:
        return nodes
    wait_s = max(_largest(shot.center_s, None) for shot in sequence.shots)
    # The mean of a cosine of this phase is that of one of an area.
    phase = SlowNoise(2 * math.pi * wait_s * shots.sizes(most, (1.0, 1.0), (1.0, 1.0))[2])
    waiting = slow_noise.nodes_for(phase, (1.0, 0.0), (0.0, 0.0), error)
    return (*nodes[:2], max(nodes[2], waiting[0]), nodes[3])


def _at_corners(scan: PulseScan | RamseyScan, device: IonMemristor, box: Mapping[str, tuple[float, float]]) -> Sequence:
    """The sequence of all rows at the corners of a box, which come first."""
    axes = len(_batch(device))
    fixed = {name: box[name][1] for name in _GROWING if name in box}
    fixed |= {name: box[name][0] for name in _SHRINKING if name in box}
    names = [name for name in _BOTH_ENDS if name in box]
    corners = np.array(list(itertools.product(*(box[name] for name in names))), float)
    # Corners come before the rows, and those before the device's own batch.
    columns = {n: real_array(c.reshape((-1,) + (1,) * (1 + axes))) for n, c in zip(names, corners.T, strict=True)}
    spread = dataclasses.replace(device, **fixed, **columns)
    return scan.sequence(spread, axes)


def _quiet_plan(scan: PulseScan | RamseyScan, device: IonMemristor, box: Mapping[str, tuple[float, float]]) -> Plan:
    """The plan of a device without slow noise."""
    error, sequence = _error(device), _at_corners(scan, device, box)
    pulses = sequence.pulses([1.0] * len(sequence.shots))
    shape = batch_shape(sequence.system, pulses, sequence.window_s)
    largest = lambda *names: max(_largest(getattr(device, name), box.get(name)) for name in names)
    hot, eta = largest("n_bar"), largest("eta_1", "eta_2")
    area = sum(_largest(shot.area_rad, None) for shot in sequence.shots)
    # The errors of steps were measured on pulses of a turn or so; those of many turns add up.
    own = error * min(1.0, math.pi / area) if area > 0 else error
    steps = grids.plan_steps(sequence.system, pulses, sequence.window_s, own, shape)
    if device.motion is not None:
        gained = max(_largest(shot.gained, None) for shot in sequence.shots)
        motion = phonons.planned(device.motion, hot + gained, area, error)
        return Plan(steps, 1, error, (motion.factors, motion.numbers))
    nodes = nodes_for(hot, eta, area, error) if hot * eta * area > 0 else 1
    return Plan(steps, nodes, error)


def _largest(values, interval: tuple[float, float] | None) -> float:
    return float(np.max(np.asarray(values))) if interval is None else float(interval[1])

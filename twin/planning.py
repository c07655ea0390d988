"""Methods by which an ion answers a cycle, and what must be decided of them before values are traced.

Grids have a static number of steps and series a static number of nodes. Both are laid for the largest values that will
occur: a box of parameters, or the values at hand, rounded up so that nearby ones share one compiled program.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfc
from jaxtyping import Array, Float

from twin import emulator, shots
from twin import grid as grids
from twin.area_series import SOLVE_SHARE, AreaSeries, choose_nodes, light_phases, reach, starts_of
from twin.batching import batch_shape, is_traced, real_array
from twin.closed_form import overlap_bound
from twin.dynamics import Adaptive, StaticGrid
from twin.emulator import EmulatedSeries
from twin.methods import ClosedForm
from twin.slow_noise import SlowNoise, without_detuning


class Lindblad(eqx.Module):
    """The full dynamics: `AreaSeries` where the cycles of a setting outnumber its nodes, else `StaticGrid`.

    Both reach the same `error`; the loop reports which one ran.
    """

    error: float = eqx.field(static=True, default=1e-8)


class Automatic(eqx.Module):
    """`ClosedForm` where its error is below `error`, else `Lindblad(error)`; the loop reports which one ran.

    The choice needs known values: inside `jit` name the method instead.
    """

    error: float = eqx.field(static=True, default=1e-8)


Method = ClosedForm | Lindblad | Automatic | StaticGrid | AreaSeries | EmulatedSeries | Adaptive

# A run of pulse 1 alone costs half of one of both pulses; a series has work of its own beside its solves.
SOLVES_OF_CYCLE, _WORTH = 1.5, 0.7


def closed_form_error(ion, x_set, r_set, detuning_1_set_hz=0.0, detuning_2_set_hz=0.0) -> Float[Array, "..."]:
    """Bound on the error of `ClosedForm` in any population: overlap + cut tails + detuning + decay + dephasing.

        |w| + theta_k erfc(edge / sqrt 2 sigma_k) / 4 + 2 (delta_k sigma_k)^2 + time / lifetime + 2 D_k sigma_k

    Overlap and tails are rigorous; decay is (one jump at most matters); detuning and dephasing are the leading orders
    with factors above those of a pi pulse (1.11 and 0.73). delta_k is the detuning and, on top, the light shift at the
    peak. Motion costs nothing: both methods average it. `r_set` None bounds the run of pulse 1 alone.
    """
    both = r_set is not None
    areas = ion.areas(x_set, r_set if both else jnp.zeros_like(x_set))
    offsets = (detuning_1_set_hz, detuning_2_set_hz)
    total = overlap_bound(*areas, ion.separation_s, ion.sigma_1_s, ion.sigma_2_s)
    tail_s = ion.tail_s + (ion.separation_s if both else 0.0)
    for k, theta, offset_hz in zip((1, 2) if both else (1,), areas, offsets, strict=False):
        sigma_s, detuning_hz, linewidth_hz, stark_hz, nominal_s = (
            getattr(ion, f"{name}_{k}_{unit}")
            for name, unit in (("sigma", "s"), ("detuning", "hz"), ("laser_linewidth", "hz"), ("stark", "hz"),
                               ("nominal_sigma", "s"))
        )  # fmt: skip
        before, after = (ion.lead_s, tail_s) if k == 1 else (ion.lead_s + ion.separation_s, ion.tail_s)
        cut = erfc(before / (math.sqrt(2) * sigma_s)) + erfc(after / (math.sqrt(2) * sigma_s))
        off_hz = jnp.abs(detuning_hz + offset_hz)
        if stark_hz is not None:
            peak = theta / math.pi * (1.0 if nominal_s is None else nominal_s / sigma_s)
            off_hz = off_hz + jnp.abs(stark_hz) * peak**2
        if ion.slow_noise is not None:
            theta = theta * (1 + getattr(ion.slow_noise, f"amplitude_noise_{k}"))
        dephasing = jnp.pi * (linewidth_hz + ion.laser_linewidth_hz)
        total = total + theta * cut / 4 + 2 * (2 * jnp.pi * off_hz * sigma_s) ** 2 + 2 * dephasing * sigma_s
    return total + (ion.lead_s + tail_s) * (1 / ion.lifetime_s + 1 / ion.m_lifetime_s)


def chosen(ion, x_set, settings) -> ClosedForm | Lindblad:
    """What `Automatic` stands for, for cycles with these inputs.

    Raises:
        ValueError: traced values.
    """
    error = ion.method.error
    noise = ion.slow_noise
    if noise is not None and not is_traced(noise):
        noises = (noise.detuning_noise_1_hz, noise.detuning_noise_2_hz)
        if any(np.any(np.asarray(n) > 0) for n in noises):
            return Lindblad(error)  # the closed form has no mean over detunings
    bound = closed_form_error(ion, x_set, jnp.ones_like(x_set), *settings.by_cycle())
    if is_traced(bound):
        raise ValueError(
            "`Automatic` cannot choose from traced values; inside jit, grad or vmap name the method: "
            "ClosedForm() or StaticGrid()."
        )
    return ClosedForm() if bool(jnp.all(bound <= error)) else Lindblad(error)


def ready(ion, *, cycles: int, detuning_set_hz: float):
    """An ion of known values whose method can run: a `Lindblad` decided, steps and nodes laid, rounded up generously.

    Args:
        ion: an `IonMemristor`.
        cycles: how many cycles share one setting.
        detuning_set_hz: largest magnitude of the laser offsets, Hz.

    Raises:
        ValueError: detuning noise with `ClosedForm`.
    """
    if ion.slow_noise is not None and isinstance(ion.method, ClosedForm):
        without_detuning(ion.slow_noise)
    if ion.slow_noise is not None and ion.slow_noise.nodes is None:
        ion = _with_draws(ion, {})
    if isinstance(ion.method, Lindblad):
        series = _series(ion, {}, detuning_set_hz, ion.method.error, generous=True)
        if pays(ion, series, SOLVES_OF_CYCLE * cycles):
            return dataclasses.replace(ion, method=series)
        ion = dataclasses.replace(ion, method=StaticGrid(error=ion.method.error))
    if isinstance(ion.method, AreaSeries) and ion.method.nodes is None:
        error = float(ion.method.grid.error)
        return dataclasses.replace(ion, method=_series(ion, {}, detuning_set_hz, error, generous=True))
    if isinstance(ion.method, StaticGrid) and ion.method.steps is None and ion.steps is None:
        steps = plan_steps(ion, {}, detuning_set_hz=detuning_set_hz, error=float(ion.method.error))
        return dataclasses.replace(ion, steps=tuple(rounded_up(n) for n in steps))
    return ion


def planned(device, box: Mapping[str, tuple[float, float]], *, detuning_set_hz: float = 0.0, solves: float = 1.0):
    """The device planned for a box, so that values in it may be traced; devices without a grid pass unchanged.

    Args:
        device: any memristor; supplies the parameters outside the box, all values known.
        box: (low, high) of each parameter that will vary.
        detuning_set_hz: largest magnitude of the commanded laser offsets, Hz.
        solves: solves of both pulses that one setting takes directly; decides a `Lindblad`.
    """
    method = getattr(device, "method", None)
    if hasattr(device, "slow_noise"):
        device = _with_draws(device, box)
    if isinstance(method, Lindblad):
        series = _series(device, box, detuning_set_hz, method.error)
        method = series if pays(device, series, solves) else StaticGrid(error=method.error)
    elif isinstance(method, AreaSeries):
        method = _series(device, box, detuning_set_hz, float(method.grid.error))
    if isinstance(method, StaticGrid):
        error = float(method.error)
        steps = plan_steps(device, box, detuning_set_hz=detuning_set_hz, error=error)
        return dataclasses.replace(device, steps=steps, method=dataclasses.replace(method, finest=error))
    return dataclasses.replace(device, method=method) if isinstance(method, AreaSeries) else device


# The solves' part of an emulator's error.
_TABLE_SHARE = 0.3


def emulated(ion, boxes: Mapping[str, tuple[float, float]], settings, *, error: float):
    """The ion with its dynamics solved beforehand for a box of parameters: see `twin.emulator`.

    Args:
        ion: an `IonMemristor` of known scalar values.
        boxes: (low, high) of each parameter that will vary.
        settings: the laser offsets that will occur, as `Settings` with `of_cycle`.
        error: of populations.

    Raises:
        EmulationError: no polynomial of bearable size serves the box.
    """
    ion = _with_draws(ion, boxes)
    reached = shots.reach(ion, boxes)
    if reached.detuning_hz > 0:
        raise emulator.EmulationError("each draw of a detuning noise is a device of its own, which is not emulated.")
    series = _series(ion, boxes, settings.largest_hz, _TABLE_SHARE * error)
    louder = {f"amplitude_{k}": factor for k, factor in ((1, reached.factor_1), (2, reached.factor_2))}
    loud = dataclasses.replace(
        ion, slow_noise=None, **{name: factor * getattr(ion, name) for name, factor in louder.items()}
    )
    own = {n: b for n, b in boxes.items() if n not in SlowNoise.parameters()}
    own |= {name: (own[name][0], factor * own[name][1]) for name, factor in louder.items() if name in own}
    made = emulator.emulated(loud, series, own, settings, error=error)
    return dataclasses.replace(ion, method=made.method)


def coarsened(device, error: float):
    """A planned device at a larger solver error: fewer steps of the same compiled program; others pass unchanged."""
    return _with_grid(device, error=jnp.asarray(error, float))


def forward_mode(device):
    """The device with its solver set for forward-mode derivatives; others pass unchanged."""
    return _with_grid(device, differentiation="forward")


def _with_grid(device, **changes):
    method = getattr(device, "method", None)
    if isinstance(method, StaticGrid):
        return dataclasses.replace(device, method=dataclasses.replace(method, **changes))
    if isinstance(method, AreaSeries):
        grid = dataclasses.replace(method.grid, **changes)
        return dataclasses.replace(device, method=dataclasses.replace(method, grid=grid))
    return device


def pays(ion, series: AreaSeries, solves: float) -> bool:
    """Whether a series takes clearly fewer solves than the cycles themselves."""
    assert series.nodes is not None
    # A series is read for each draw of the areas, and averaged over modes once; cycles are solved for each of them.
    solves = solves * shots.amplitude_draws(ion) * (1 if ion.motion is None else ion.motion.nodes)
    return series.nodes.lanes(len(starts_of(ion.system(0.0, 0.0)))) < _WORTH * solves


def plan_steps(
    device, box: Mapping[str, tuple[float, float]], *, detuning_set_hz: float = 0.0, error: float
) -> tuple[int, int]:
    """Grid steps of the two kinds of run that serve every ion in a box of parameters.

    Args:
        device: an `IonMemristor`; supplies the parameters outside the box; all values known.
        box: (low, high) of each parameter that will vary.
        detuning_set_hz: largest magnitude of the commanded laser offsets, Hz.
        error: population error aimed at.

    Returns:
        Steps for pulse 1 alone, and for both pulses. Devices outside the box may come out invalid (NaN, flagged).
    """
    spread, system = _corners(device, box, detuning_set_hz)
    theta_1, theta_2 = spread.largest_areas
    steps = []
    for second, couplings in ((None, 1), (theta_2, 2)):
        part = dataclasses.replace(system, couplings=system.couplings[:couplings])
        pulses, window = spread.pulses(theta_1, second), spread.window(second is None)
        steps.append(grids.plan_steps(part, pulses, window, error, batch_shape(part, pulses, window)))
    return steps[0], steps[1]


def _series(ion, box, detuning_set_hz: float, error: float, generous: bool = False) -> AreaSeries:
    spread, system = _corners(ion, box, detuning_set_hz)
    timing, areas = spread.timing, spread.largest_areas
    overlap = _largest(overlap_bound(*areas, timing.separation_s, timing.sigma_1_s, timing.sigma_2_s))
    theta_1, theta_2 = (_largest(theta) for theta in areas)
    phase = max((_largest(phase) for phase in light_phases(system, timing, areas) or ()), default=0.0)
    if generous:
        theta_1, theta_2 = (math.ceil(1.05 * theta / (math.pi / 4)) * math.pi / 4 for theta in (theta_1, theta_2))
        overlap = 0.0 if overlap == 0 else 10 ** math.ceil(math.log10(overlap))
        phase = math.ceil(2 * phase) / 2
    sigmas = reach(error)
    cut = bool(jnp.any(timing.tail_s < sigmas * timing.sigma_1_s))
    nodes = choose_nodes(theta_1, theta_2, overlap, error, cut, phase)
    windows, zero = timing.windows(sigmas), jnp.zeros_like(areas[0])

    def steps_of(window: str, thetas) -> int:
        pulses = timing.pulses(*thetas)
        shape = batch_shape(system, pulses, windows[window])
        steps = grids.plan_steps(system, pulses, windows[window], SOLVE_SHARE * error, shape)
        return rounded_up(steps) if generous else steps

    one = max(steps_of("first", (areas[0], zero)), steps_of("second", (zero, areas[1])))
    both = steps_of("both", areas) if nodes.overlap else one
    return AreaSeries(StaticGrid(error=error, finest=error), nodes, (one, both))


def _corners(ion, box: Mapping[str, tuple[float, float]], detuning_set_hz: float):
    """The ion and its level graph at the corners of the box and laser offsets of either sign, on a new first axis.

    Where shots differ, it is the ion of the largest areas that are drawn, and offsets reach as far as detunings do.
    """
    reached = shots.reach(ion, box)
    ion, detuning_set_hz = dataclasses.replace(ion, slow_noise=None), abs(detuning_set_hz) + reached.detuning_hz
    names = [name for name in box if hasattr(ion, name)]
    ranges = [box[name] for name in names] + [(-abs(detuning_set_hz), abs(detuning_set_hz))] * 2
    corners = np.array(list(itertools.product(*ranges)), float)
    axes = len(batch_shape(ion.system(0.0, 0.0), ion.pulses(ion.rabi_scale_1, ion.rabi_scale_2)))
    columns = [real_array(column.reshape((-1,) + (1,) * axes)) for column in corners.T]
    spread = dataclasses.replace(ion, **dict(zip(names, columns, strict=False)))
    system = spread.system(*columns[-2:])
    louder = (reached.factor_1 * spread.amplitude_1, reached.factor_2 * spread.amplitude_2)
    return dataclasses.replace(spread, amplitude_1=louder[0], amplitude_2=louder[1]), system


def _with_draws(ion, box: Mapping[str, tuple[float, float]]):
    """The ion with the nodes of its slow noise laid for a box."""
    if ion.slow_noise is None and not any(name in box for name in SlowNoise.parameters()):
        return ion
    spread, _ = _corners(dataclasses.replace(ion, slow_noise=None), box, 0.0)
    grid = getattr(ion.method, "grid", ion.method)
    error = getattr(grid, "finest", None) or getattr(grid, "error", None)
    sigmas = (spread.sigma_1_s, spread.sigma_2_s)
    return shots.laid(ion, box, spread.largest_areas, sigmas, None if error is None else float(error))


def _largest(values) -> float:
    """Of those that are numbers: a bad device comes out invalid in its own lane, and decides nothing for the others."""
    values = np.asarray(values)
    return float(np.max(values[np.isfinite(values)], initial=0.0))


def rounded_up(size: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: sizes of compiled programs, so that similar problems share one."""
    power = 16 * 2 ** max(0, math.ceil(math.log2(size / 16)))
    return power * 3 // 4 if power > 16 and size <= power * 3 // 4 else power

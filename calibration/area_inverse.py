"""Which pulse areas really give what is wanted: the device inverted, lane by lane.

Pulse 1 alone must leave x in s, and both pulses (1 - r) x. In its area a population rises from zero area to the first
turning point and no further, so each lane has a bracket, and Newton within it cannot get lost. What lies beyond the
turning point the device cannot give; the turning point is then the nearest. Derivatives with respect to the device come
from the implicit function theorem, not from the iterations.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from calibration.parameters import anchored
from calibration.targets import Playing, ion_of
from twin.closed_form import set_area
from twin.dynamics import StaticGrid
from twin.loop import Settings
from twin.memristor import ClosedForm, IonMemristor
from twin.planning import forward_mode, planned
from twin.sampled import SampledIon, sampled
from twin.waveform import Waveform

Offsets = tuple[float | Array, float | Array]
Curve = Callable[[Float[Array, " lanes"]], Float[Array, " lanes"]]
# Parameters that make a slice harder to solve as they grow, or as they shrink.
_SHORT_IS_WORSE = ("lifetime_s", "m_lifetime_s")
_WORST = ("rabi_scale_1", "rabi_scale_2", "tail_s", "laser_linewidth_hz", "laser_linewidth_1_hz",
          "laser_linewidth_2_hz", *_SHORT_IS_WORSE)  # fmt: skip
# Points between zero area and the largest among which the first turning point is looked for.
_SCAN = 24
_HALVINGS, _STEPS, _STANDS_RAD = 44, 60, 1e-13
# Slope over curvature, rad, below which an end is a turning point.
_LEVEL = 1e-6
# Without an input the second pulse does nothing: its area is that of this small input.
_SMALL_X = 1e-3
# A population this close to the turning point's is the turning point's, to rounding.
_ROUNDING = 4e-16


class Inverse(NamedTuple):
    """Areas that give what is wanted, or come nearest.

    Attributes:
        theta_1: commanded area of pulse 1, rad, shape (inputs,). theta_2: of pulse 2, shape (inputs, transfers).
        residual_1: population of s after pulse 1 alone, minus x_set. residual_2: after both, minus (1 - r_set) x_set.
    """

    theta_1: Float[Array, " inputs"]
    theta_2: Float[Array, "inputs transfers"]
    residual_1: Float[Array, " inputs"]
    residual_2: Float[Array, "inputs transfers"]


def plain_areas(
    device: Playing, x_set: Float[Array, "..."], r_set: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """What the controller commands without a map, rad: 2 asin sqrt(x_set) (V: 2 acos), 2 asin sqrt(r_set)."""
    return set_area(x_set if ion_of(device).start == "v" else 1 - x_set), set_area(r_set)


def signal_at(
    device: Playing, theta_1: Float[Array, " lanes"], theta_2: Float[Array, " lanes"], offsets_hz: Offsets, *,
    alone: bool,
) -> Float[Array, " lanes"]:  # fmt: skip
    """Population of s for commanded areas, rad, pi being full command today; areas beyond it are allowed."""
    # Full command at another amplitude: a set point ends at pi, an amplitude does not.
    ion = ion_of(device)
    shares = {"amplitude_1": ion.amplitude_1 * theta_1 / math.pi, "amplitude_2": ion.amplitude_2 * theta_2 / math.pi}
    full = jnp.ones(theta_1.shape)
    playing = _with_ion(device, dataclasses.replace(ion, **shares))
    response = playing.under(Settings(*offsets_hz))(full if ion.start == "v" else 0 * full, full, alone=alone)
    return device.signal(response.populations)


def laid(
    device: Playing,
    offsets_hz: Offsets = (0.0, 0.0),
    *,
    largest_rad: float,
    boxes: Mapping[str, tuple[float, float]] | None = None,
    error: float = 1e-9,
) -> Playing:
    """The device with room for areas up to `largest_rad` and for parameters in boxes, so that values may be traced.

    Args:
        device: of known scalar values. offsets_hz: laser offsets.
        largest_rad: commanded area that is still played. boxes: (low, high) of parameters that will vary.
        error: of populations.
    """
    boxes, reach = dict(boxes or {}), largest_rad / math.pi
    offset_hz = max(abs(float(offset)) for offset in offsets_hz)
    ion = cast(IonMemristor, anchored(ion_of(device)))
    louder = {name: reach * getattr(ion, name) for name in ("amplitude_1", "amplitude_2")}
    if isinstance(device, SampledIon):
        worst = {name: box[0 if name in _SHORT_IS_WORSE else 1] for name, box in boxes.items() if name in _WORST}
        off_hz = [abs(edge - float(getattr(ion, name))) for name in ("detuning_1_hz", "detuning_2_hz")
                  for edge in boxes.get(name, ())]  # fmt: skip
        real = device.imag_rad_s is None
        imag = jnp.zeros_like(device.real_rad_s) if device.imag_rad_s is None else device.imag_rad_s
        roomy = sampled(
            dataclasses.replace(ion, **louder, **worst), Waveform(device.real_rad_s, imag, device.slice_s),
            alone_slices=device.alone_slices, largest_hz=offset_hz + max(off_hz, default=0.0), error=error,
            real_only=real,
        )  # fmt: skip
        return dataclasses.replace(roomy, ion=device.ion)
    if isinstance(ion.method, ClosedForm):
        return ion
    roomy = planned(
        dataclasses.replace(ion, **louder, method=StaticGrid(error=error), steps=None), boxes, detuning_set_hz=offset_hz
    )
    own = {"method": roomy.method, "steps": roomy.steps, "slow_noise": roomy.slow_noise}
    return forward_mode(dataclasses.replace(ion, **own))


def invert(
    device: Playing,
    x_set: Float[Array, " inputs"],
    r_set: Float[Array, " transfers"],
    offsets_hz: Offsets = (0.0, 0.0),
    *,
    largest_rad: float,
) -> Inverse:
    """Areas for every input and every transfer; inside jit, with derivatives by `jax.jacfwd`.

    Args:
        device: as `laid` for areas up to `largest_rad`.
        x_set, r_set: wanted inputs and transfers in [0, 1].
        offsets_hz: laser offsets.
        largest_rad: commanded areas that may be used, from zero.
    """
    theta_1, theta_2 = _areas(device, offsets_hz, x_set, r_set, largest_rad)
    wanted = jnp.outer(x_set, 1 - r_set)
    residual_1 = _first(device, offsets_hz)(theta_1) - x_set
    residual_2 = _second(device, offsets_hz, _grid(theta_1, r_set))(theta_2.ravel()) - wanted.ravel()
    return Inverse(theta_1, theta_2, residual_1, residual_2.reshape(wanted.shape))


# Where a lane ended: within its bracket, at the turning point, or at zero area, which does not move with the device.
_INNER, _TOP, _ZERO = 0, 1, 2


@eqx.filter_custom_jvp
def _areas(device: Playing, offsets_hz: Offsets, x_set, r_set, largest_rad):
    (theta_1, _, theta_2), _ = _found(device, offsets_hz, x_set, r_set, largest_rad)
    return theta_1, theta_2.reshape(x_set.size, r_set.size)


@_areas.def_jvp
def _areas_jvp(primals, tangents):
    ends, places = _found(*primals)

    def moving(device, offsets_hz, x_set, r_set, largest_rad):
        del largest_rad
        grid = lambda column: _grid(column, r_set)
        low_x = jnp.maximum(x_set, _SMALL_X)
        theta_1 = _implicit(_first(device, offsets_hz), ends[0], places[0], x_set)
        low_1 = _implicit(_first(device, offsets_hz), ends[1], places[1], low_x)
        wanted = jnp.outer(low_x, 1 - r_set).ravel()
        theta_2 = _implicit(_second(device, offsets_hz, grid(low_1)), ends[2], places[2], wanted)
        return theta_1, theta_2.reshape(x_set.size, r_set.size)

    return eqx.filter_jvp(moving, primals, tangents)


def _found(device: Playing, offsets_hz: Offsets, x_set, r_set, largest_rad):
    """Areas of pulse 1 for each input, for inputs that are not small, and of pulse 2 for these; where they ended."""
    rises = ion_of(device).start == "v"
    low_x = jnp.maximum(x_set, _SMALL_X)
    curve = _first(device, offsets_hz)
    top = _turning_point(curve, jnp.zeros(1), rises, largest_rad)
    wanted = jnp.concatenate([x_set, low_x])
    theta, place = _bracketed(curve, wanted, rises, jnp.broadcast_to(top, wanted.shape))
    (theta_1, low_1), (place_1, place_low) = jnp.split(theta, 2), jnp.split(place, 2)
    top = _turning_point(_second(device, offsets_hz, low_1), jnp.zeros_like(low_1), False, largest_rad)
    wanted = jnp.outer(low_x, 1 - r_set).ravel()
    curve = _second(device, offsets_hz, _grid(low_1, r_set))
    theta_2, place_2 = _bracketed(curve, wanted, False, _grid(top, r_set))
    return (theta_1, low_1, theta_2), (place_1, place_low, place_2)


def _first(device: Playing, offsets_hz: Offsets) -> Curve:
    return lambda theta: signal_at(device, theta, jnp.zeros_like(theta), offsets_hz, alone=True)


def _second(device: Playing, offsets_hz: Offsets, theta_1) -> Curve:
    return lambda theta: signal_at(device, theta_1, theta, offsets_hz, alone=False)


def _grid(column, r_set) -> Float[Array, " lanes"]:
    return jnp.repeat(column, r_set.size)


def _slope(curve: Curve, theta: Float[Array, " lanes"]) -> tuple[Float[Array, " lanes"], Float[Array, " lanes"]]:
    return jax.jvp(curve, (theta,), (jnp.ones_like(theta),))


def _turning_point(curve: Curve, like: Float[Array, " lanes"], rises: bool, largest_rad: float) -> Array:
    """First area at which a population turns, or the largest one if it turns nowhere: a scan, then bisection."""
    step_rad = largest_rad / _SCAN

    # One loop for both, as each use of the curve in a program is another solver to compile.
    def narrow(_, ends):
        low, high = ends
        scanned = jnp.minimum(low + step_rad, largest_rad)
        theta = jnp.where(jnp.isinf(high), scanned, 0.5 * (low + high))
        rising = (_slope(curve, theta)[1] > 0) == rises
        return jnp.where(rising, theta, low), jnp.where(rising, high, theta)

    low, high = lax.fori_loop(0, _SCAN + _HALVINGS, narrow, (jnp.zeros_like(like), jnp.full_like(like, jnp.inf)))
    return jnp.where(jnp.isinf(high), largest_rad, 0.5 * (low + high))


def _bracketed(curve: Curve, wanted, rises: bool, top) -> tuple[Array, Array]:
    """The area between zero and the turning point that gives what is wanted, or the nearer end; and where it ended.

    Newton, and bisection where a step would leave the bracket; first of all it looks at both ends.
    """
    sign = 1.0 if rises else -1.0
    missing = lambda theta: sign * (curve(theta) - wanted)
    zero = jnp.zeros_like(top)

    def unfinished(state):
        step, _, _, _, moved, _ = state
        return (step < _STEPS) & jnp.any(moved > _STANDS_RAD)

    def advance(state):
        step, theta, low, high, _, place = state
        value, slope = _slope(missing, theta)
        place = jnp.where((step == 0) & (value >= -_ROUNDING), _ZERO, place)
        place = jnp.where((step == 1) & (value <= _ROUNDING) & (place != _ZERO), _TOP, place)
        low = jnp.where((value < 0) & (step > 1), theta, low)
        high = jnp.where((value >= 0) & (step > 1), theta, high)
        new = theta - value / jnp.where(slope == 0, jnp.inf, slope)
        within = (new >= low) & (new <= high) & (slope > 0) & (step > 1)
        new = jnp.where(within, new, jnp.where(step == 0, top, 0.5 * (low + high)))
        new = jnp.where((place == _ZERO) & (step > 0), 0.0, jnp.where((place == _TOP) & (step > 0), top, new))
        moved = jnp.where(step == 0, jnp.inf, jnp.abs(new - theta))
        return step + 1, new, low, high, moved, place

    begin = (0, zero, zero, top, zero + jnp.inf, jnp.full(top.shape, _INNER))
    state = lax.while_loop(unfinished, advance, begin)
    return state[1], state[5]


def _implicit(curve: Curve, theta, place, wanted) -> Float[Array, " lanes"]:
    """The same areas, moving with whatever the curve depends on: curve = wanted, or slope = 0 at a turning point.

    A turning point that is the largest area allowed has no slope of zero, and does not move.
    """
    (value, slope), (_, curvature) = jax.jvp(lambda t: _slope(curve, t), (theta,), (jnp.ones_like(theta),))
    moved = lambda condition, by: (lax.stop_gradient(condition) - condition) / lax.stop_gradient(by)
    turns = (place == _TOP) & (jnp.abs(slope) < _LEVEL * jnp.abs(curvature))
    inner = moved(value - wanted, jnp.where(place == _INNER, slope, 1.0))
    turning = moved(slope, jnp.where(turns, curvature, 1.0))
    return theta + jnp.where(place == _INNER, inner, jnp.where(turns, turning, 0.0))


def _with_ion(device: Playing, ion: IonMemristor) -> Playing:
    return dataclasses.replace(device, ion=ion) if isinstance(device, SampledIon) else ion

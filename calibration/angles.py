"""Pulse areas of an ion, or phases of a photonic element, that give wanted populations.

Both are angles; at the nominal scale, pi is full transfer. What a controller wants is a population of s after pulse
(stage) 1, and another after both; from no transfer (zero angle, or beyond it where a negative offset must be undone
first) up to full transfer both are monotone in the angle that makes them, so that a bisection finds the angle to the
last digit, or the nearest end where the device cannot give what is wanted. What is not a number has no angle: NaN.
Its derivatives are those of the equation that it solves, -(df/dp)/(df/dangle), or those of the end that is taken.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from twin.batching import is_traced
from twin.loop import AbstractMemristor, Settings
from twin.memristor import IonMemristor
from twin.photonic import PhotonicMemristor
from twin.transfer import carrier_moments

_HALVINGS = 52
# An angle this near to an end, rad, is that end: populations, flat there, do not tell the two apart. A slope below the
# other is that of a device which gives the same at any angle.
_END_RAD, _FLAT = 1e-7, 1e-9
# Probabilities of being assigned to s closer than this are told apart by rounding only.
_SAME = 1e-12


def signal_of(
    device: AbstractMemristor, angle_1: Float[Array, " lanes"], angle_2: Float[Array, " lanes"], *, alone: bool
) -> Float[Array, " lanes"]:
    """Population of s for commanded angles, rad, lane by lane; without laser offsets.

    Args:
        device: an ion whose method serves traced values (`ClosedForm`, or planned or emulated for these angles), or a
            photonic element; of scalar parameters.
        angle_1, angle_2: areas or phases that an ideal device would give. alone: whether pulse 1 is played alone.
    """
    if isinstance(device, PhotonicMemristor):
        # Full command at another scale: a set point ends at pi, a scale does not.
        scales = {"phase_scale_1": device.phase_scale_1 * angle_1 / math.pi,
                  "phase_scale_2": device.phase_scale_2 * angle_2 / math.pi}  # fmt: skip
        one = jnp.ones_like(angle_1)
        response = dataclasses.replace(device, **scales).under(Settings())(one, one, alone=alone)
        return device.signal(response.populations)
    assert isinstance(device, IonMemristor)
    settings = Settings(jnp.zeros(1), jnp.zeros(1), jnp.zeros(angle_1.size, int))
    scale_1, scale_2 = _area_scales(device)
    # An angle that is no number spoils its own lane, not the series of all.
    respond = device.by_area(settings, (scale_1 * jnp.nanmax(angle_1), scale_2 * jnp.nanmax(angle_2)))
    response = respond(scale_1 * angle_1, scale_2 * angle_2, alone=alone)
    return device.signal(response.populations)


def full_angles(device: AbstractMemristor) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Commanded angles of full transfer, rad: pi less the offset, over the scale (of a hot ion, the mean one)."""
    if isinstance(device, PhotonicMemristor):
        return (
            (math.pi - device.phase_offset_1_rad) / device.phase_scale_1,
            (math.pi - device.phase_offset_2_rad) / device.phase_scale_2,
        )
    assert isinstance(device, IonMemristor)
    (scale_1, scale_2), (mean_1, mean_2) = _area_scales(device), carrier_moments(device)[0]
    return math.pi / (scale_1 * mean_1), math.pi / (scale_2 * mean_2)


def least_transfer_angles(device: AbstractMemristor) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Commanded angles of least transfer, rad: those that undo a negative offset, and 0 without one."""
    if not isinstance(device, PhotonicMemristor):
        return jnp.zeros(()), jnp.zeros(())

    def undone(offset, scale):
        behind = offset < 0
        return jnp.where(behind, -offset / jnp.where(behind, scale, 1.0), 0.0)

    return (
        undone(device.phase_offset_1_rad, device.phase_scale_1),
        undone(device.phase_offset_2_rad, device.phase_scale_2),
    )


def check_starts_in_v(device: AbstractMemristor) -> None:
    """Refuses an ion that is prepared in s, whose input falls with the area.

    Raises:
        ValueError: see above.
    """
    if isinstance(device, IonMemristor) and device.start != "v":
        raise ValueError(f"control is moved between devices that start in v, but scheme is {device.scheme!r}; use "
                         "'lambda' or 'ladder'.")  # fmt: skip


def angles_for(
    device: AbstractMemristor, x: Float[Array, " lanes"], r: Float[Array, " lanes"]
) -> tuple[Float[Array, " lanes"], Float[Array, " lanes"]]:
    """Angles that leave x in s after pulse 1 alone, and (1 - r) x after both, or come nearest.

    Args:
        device: what the controller believes it has: as for `signal_of`. Its preparation must be v.
        x, r: what is wanted, in [0, 1].

    Raises:
        ValueError: an ion prepared in s, whose input falls with the area.
    """
    angle_1 = first_angle(device, x)
    return angle_1, second_angle(device, angle_1, (1 - r) * x)


def first_angle(device: AbstractMemristor, x: Float[Array, " lanes"]) -> Float[Array, " lanes"]:
    """Angle of pulse 1 that leaves x in s, or comes nearest: see `angles_for`."""
    check_starts_in_v(device)
    zero = jnp.zeros_like(x)
    rising = lambda angle: signal_of(device, angle, zero, alone=True) - x
    return _bisected(rising, full_angles(device)[0], zero + least_transfer_angles(device)[0])


def second_angle(
    device: AbstractMemristor, angle_1: Float[Array, " lanes"], y: Float[Array, " lanes"]
) -> Float[Array, " lanes"]:
    """Angle of pulse 2 that leaves y in s behind a pulse 1 of `angle_1`, or comes nearest."""
    rising = lambda angle: y - signal_of(device, angle_1, angle, alone=False)
    return _bisected(rising, full_angles(device)[1], jnp.zeros_like(y) + least_transfer_angles(device)[1])


def check_read_out(device: AbstractMemristor) -> None:
    """Refuses a device whose counts, where known, do not depend on the population of s.

    Raises:
        ValueError: see above.
    """
    none, all_ = _assigned_ends(device)
    if not is_traced(none, all_) and _same(none, all_):
        raise ValueError(
            f"this {type(device).__name__} assigns a shot to s with the same probability, {float(none):.3g}, in s and "
            "outside it, so that counts tell nothing; correct its readout errors, or efficiency and dark counts."
        )


def population_estimate(device: AbstractMemristor, share: Float[Array, " lanes"]) -> Float[Array, " lanes"]:
    """Estimate of the population of s from the share of shots assigned to it, within [0, 1].

    Shot noise carries an estimate beyond the ends, where no command lies; a controller then takes the end. Of a device
    whose counts turn out to tell nothing while it is traced, the estimate is NaN.

    Raises:
        ValueError: a device whose counts are known to tell nothing.
    """
    check_read_out(device)
    none, all_ = _assigned_ends(device)
    return jnp.clip((share - none) / jnp.where(_same(none, all_), jnp.nan, all_ - none), 0.0, 1.0)


def _assigned_ends(device: AbstractMemristor) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Probabilities that a shot is assigned to s outside s and in it."""
    none, all_ = device.assigned_of(jnp.array([0.0, 1.0]))
    return none, all_


def _same(none: Float[Array, ""], all_: Float[Array, ""]) -> Bool[Array, ""]:
    return jnp.abs(all_ - none) < _SAME


def _area_scales(device: IonMemristor) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Area over commanded area of both pulses, the ion at rest."""
    ratios = [
        1.0 if nominal is None else sigma / nominal
        for sigma, nominal in (
            (device.sigma_1_s, device.nominal_sigma_1_s),
            (device.sigma_2_s, device.nominal_sigma_2_s),
        )
    ]
    return (
        jnp.asarray(device.amplitude_1 * device.rabi_scale_1 * ratios[0]),
        jnp.asarray(device.amplitude_2 * device.rabi_scale_2 * ratios[1]),
    )


def _bisected(rising, top, bottom) -> Float[Array, " lanes"]:
    """Where a rising function crosses zero between `bottom` (lanes) and `top`, or the end that comes nearest.

    NaN in the lanes where the function was NaN at an angle that was tried. First derivatives are those of the crossing,
    or of the end; what is wanted does not move an end, towards which its derivative may diverge.
    """
    top = jnp.zeros_like(bottom) + top

    def halve(_, state):
        low, high, failed = state
        middle = 0.5 * (low + high)
        value = rising(middle)
        above = value > 0
        return jnp.where(above, low, middle), jnp.where(above, middle, high), failed | jnp.isnan(value)

    ends = lax.stop_gradient(bottom), lax.stop_gradient(top)
    low, high, failed = lax.fori_loop(0, _HALVINGS, halve, (*ends, jnp.zeros(bottom.shape, bool)))
    found = lax.stop_gradient(0.5 * (low + high))
    # Halvings have no derivative but that of the ends: a step of Newton's has, and leaves the value as it is.
    # Traced, as the halvings are, so that an angle that is no number spoils its own lane here too.
    value, slope = jax.jit(lambda angle: jax.jvp(rising, (angle,), (jnp.ones_like(angle),)))(found)
    slope = lax.stop_gradient(slope)
    steep = slope > _FLAT
    step = jnp.where(steep, value / jnp.where(steep, slope, 1.0), 0.0)
    at_bottom, at_top = found - ends[0] < _END_RAD, ends[1] - found < _END_RAD
    moved = jnp.where(at_bottom, bottom, jnp.where(at_top, top, -step))
    return jnp.where(failed, jnp.nan, found + (moved - lax.stop_gradient(moved)))

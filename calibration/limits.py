"""What stands between the pulses found and perfect ones: decay and dephasing, the hardware, and what is not known.

The same search is repeated on ions without some of the faults. What is left with decay and dephasing alone is the floor
that they set for pulses of this length on this hardware; what is left without them is the hardware's own.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from calibration.hardware import Hardware
from calibration.robust import Robust, changed
from calibration.shaping import Layout, Player, descend, on_hardware, pair, rescored, shape
from calibration.targets import AbstractTarget, LoopShape
from twin.loop import run, sine_input
from twin.memristor import IonMemristor, PhotonicMemristor
from twin.waveform import Waveform


class Limits(NamedTuple):
    """The target's number where only some faults are left.

    Attributes:
        decay_and_dephasing: after a search with these and the limits of the hardware, but no wrong scale, detuning,
            motion or crosstalk.
        hardware: after a search without decay and dephasing either.
        ideal: of the law y = (1 - r) x itself, whatever pulses make it; None where the target does not follow from it.
    """

    decay_and_dephasing: float
    hardware: float
    ideal: float | None


def limits(
    ion: IonMemristor,
    hardware: Hardware,
    target: AbstractTarget,
    layout: Layout,
    point: Float[np.ndarray, " numbers"],
    *,
    iterations: int,
    **family: Any,
) -> Limits:
    """Searches again on ions with fewer faults, from the pulses found last and from the start; the better one counts.

    Args:
        ion, hardware, target, layout, iterations, family: as of `calibration.shaping.shape`.
        point: numbers of the family where that search ended.
    """
    zero, clean = jnp.zeros(()), dataclasses.replace(hardware, mixing_real=None, mixing_imag=None)
    noisy = dataclasses.replace(
        ion, rabi_scale_1=jnp.ones(()), rabi_scale_2=jnp.ones(()), detuning_1_hz=zero, detuning_2_hz=zero, n_bar=zero,
        heating_rate_per_s=zero, eta_1=zero, eta_2=zero, phonon_nodes=1, motion=None,
    )  # fmt: skip
    silent = dataclasses.replace(
        noisy, lifetime_s=jnp.asarray(math.inf), m_lifetime_s=jnp.asarray(math.inf), laser_linewidth_hz=zero,
        laser_linewidth_1_hz=zero, laser_linewidth_2_hz=zero,
    )  # fmt: skip
    values = []
    best = max if target.is_gain else min
    for one in (noisy, silent):
        tried = [
            shape(one, clean, target, layout, begin_at=begin, iterations=iterations, **family)
            for begin in (point, None)
        ]
        scores = [rescored(one, clean, target, layout, found.waveform, found.offsets_hz) for found in tried]
        values.append(best(scores))
        point = tried[scores.index(values[-1])].point
    return Limits(values[0], values[1], ideal_value(ion, target))


def ideal_value(ion: IonMemristor, target: AbstractTarget) -> float | None:
    """The number of a loop target for a device that obeys the law y = (1 - r) x, with the memory of this one."""
    if not isinstance(target, LoopShape):
        return None
    inputs = sine_input(periods=target.periods, cycles_per_period=target.cycles_per_period)
    loop = run(PhotonicMemristor(ion.memory, source="model"), inputs)
    last = slice(-target.cycles_per_period - 1, -1)
    return float(target.of_loop(loop.x[last], loop.y[last]))


class NotKnowing(NamedTuple):
    """The target's number of some members: under the common pulses, and under pulses of their own.

    Attributes:
        common, own: shape (members,).
    """

    common: Float[np.ndarray, " members"]
    own: Float[np.ndarray, " members"]


def value_of_recalibrating(
    player: Player,
    robust: Robust,
    point: Float[np.ndarray, " numbers"],
    offsets_hz: tuple[float, float],
    count: int,
    *,
    iterations: int,
) -> NotKnowing:
    """What is lost because the members are not told apart: each is searched again as if it were known.

    Args:
        player: laid for all members. robust: the target and its members.
        point, offsets_hz: of the common pulses. count: members searched again, the first ones.
        iterations: most iterations of each search.
    """
    offsets = pair(offsets_hz)
    value = eqx.filter_jit(lambda target, player, point, offsets: target.value(player(point), offsets))
    common, own = [], []
    for k in range(count):
        changes = jax.tree.map(lambda change, k=k: change[k], robust.changes)
        member = eqx.tree_at(lambda p: p.device, player, changed(player.device, changes))
        ion = member.device.ion
        tuned = (-float(ion.detuning_1_hz), -float(ion.detuning_2_hz))
        common.append(float(value(robust.target, member, jnp.asarray(point), offsets)))
        best, _, _ = descend(member, robust.target, jnp.asarray(point), tuned, iterations)
        own.append(float(value(robust.target, member, best, pair(tuned))))
    return NotKnowing(np.array(common), np.array(own))


class Robustness(NamedTuple):
    """The target's number against errors of the laser.

    Attributes:
        power: relative errors of its power, shape (powers,). detuning_hz: errors of its frequency, shape (detunings,).
        value: shape (powers, detunings).
    """

    power: Float[np.ndarray, " powers"]
    detuning_hz: Float[np.ndarray, " detunings"]
    value: Float[np.ndarray, "powers detunings"]


def robustness(
    ion: IonMemristor,
    hardware: Hardware,
    target: AbstractTarget,
    layout: Layout,
    waveform: Waveform,
    offsets_hz: tuple[float, float],
    *,
    power: Float[np.ndarray, " powers"],
    detuning_hz: Float[np.ndarray, " detunings"],
) -> Robustness:
    """Solves a device for errors of the one laser of both lines; Rabi frequencies follow the root of its power.

    Args:
        ion, hardware, target, layout, waveform, offsets_hz: as of `calibration.shaping.rescored`.
        power: relative errors, above -1. detuning_hz: errors, Hz.
    """
    factors, shifts = (a.ravel() for a in np.meshgrid(np.sqrt(1 + power) - 1, detuning_hz, indexing="ij"))
    members = Robust(target, {
        "rabi_scale_1": jnp.asarray(float(ion.rabi_scale_1) * factors),
        "rabi_scale_2": jnp.asarray(float(ion.rabi_scale_2) * factors),
        "detuning_1_hz": jnp.asarray(shifts),
        "detuning_2_hz": jnp.asarray(shifts),
    })  # fmt: skip
    room = members.all_members(ion)
    device = on_hardware(ion, hardware, layout, waveform, error=1e-7, offsets_hz=offsets_hz, room_for=room)
    offsets = pair(offsets_hz)
    values = eqx.filter_jit(members.each)(device, offsets)
    return Robustness(power, detuning_hz, np.asarray(values).reshape(len(power), len(detuning_hz)))

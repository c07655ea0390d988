"""From the tables [trap], [chain], [motion] and [crosstalk] to the apparatus, the motion of its ions, and registers."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import constants

from experiments.schema import Config
from experiments.schema_trap import Chain, Motion
from twin.apparatus import Apparatus
from twin.chain import Modes
from twin.memory import Exponential, MovingAverage
from twin.memristor import IonMemristor
from twin.phonons import planned
from twin.register import Register, gaussian_shares
from twin.surface_trap import SurfaceTrap
from twin.trap import AbstractTrap, HarmonicTrap, LinearTrap

_NAMES = {
    LinearTrap: ("rf_voltage_v", "rf_hz", "r0_m", "dc_voltage_v", "z0_m", "kappa", "asymmetry_voltage_v"),
    SurfaceTrap: (
        *("rf_voltage_v", "rf_hz", "center_width_m", "left_width_m", "right_width_m", "axial_hz"),
        *("gap_m", "static_asymmetry"),
    ),
}


def trap_from(config: Config) -> AbstractTrap:
    """The trap of a configuration.

    Raises:
        ValueError: it does not hold an ion.
    """
    table = config.trap
    assert table is not None
    kinds = {"linear": LinearTrap, "surface": SurfaceTrap}
    if table.kind == "harmonic":
        given = {} if table.rf_hz is None else {"rf_hz": table.rf_hz}
        try:
            trap: AbstractTrap = HarmonicTrap(table.secular_hz, **given)
        except ValueError as error:
            raise ValueError(
                str(error).replace("`frequencies_hz`", "trap.secular_hz").replace("`rf_hz`", "trap.rf_hz")
            ) from None
    else:
        kind = kinds[table.kind]
        given = {name: getattr(table, name) for name in _NAMES[kind] if getattr(table, name) is not None}
        trap = kind(**given)
    trap.check()
    return trap


def apparatus_from(config: Config) -> Apparatus:
    """Trap, chain and beams of a configuration; the chain may still be unstable (`Modes.check`)."""
    trap, chain, motion = trap_from(config), config.chain or Chain(), config.motion or Motion()
    assert config.trap is not None
    return Apparatus(
        trap,
        chain.ions,
        motion.beam_1,
        motion.beam_2,
        motion.wavelength_1_m,
        None if motion.wavelength_2_m == motion.wavelength_1_m else motion.wavelength_2_m,
        chain.quartic_v_per_m4,
        None if chain.masses_u is None else np.array(chain.masses_u) * constants.atomic_mass,
        config.trap.stray_field_v_per_m,
        config.trap.field_noise_v2_per_m2_hz,
        motion.coherent or None,
    )


def place_of(config: Config) -> int | None:
    """Place of the memristor in its chain, from 0; None where all ions are memristors."""
    chain = config.chain or Chain()
    if chain.memristors == "all":
        return None
    return (chain.ions - 1) // 2 if chain.memristor is None else chain.memristor - 1


def moving_in_trap(config: Config, hottest: float) -> dict[str, Any]:
    """Fields of an `IonMemristor` that the trap tells: its motion, and the heating of the reference mode.

    Args:
        config: with a table [trap].
        hottest: largest mean phonon number of the reference mode at preparation.

    Raises:
        ValueError: a trap or a chain that is not stable; an occupation beyond what the average serves.
    """
    apparatus = apparatus_from(config)
    modes = apparatus.chain().modes().check()
    for mass in sorted(set(config.chain.masses_u or ()) if config.chain else ()):
        radial = np.asarray(apparatus.trap.secular_hz_for(mass * constants.atomic_mass))[:2]
        if np.all(np.isfinite(np.asarray(apparatus.trap.q))) and not np.all(np.isfinite(radial)):
            raise ValueError(f"chain.masses_u: the trap does not hold an ion of {mass:g} u; lower the rf voltage.")
    _check_stray_field(apparatus)
    device = config.device
    rate = device.heating_rate_per_s
    if config.trap is not None and config.trap.field_noise_v2_per_m2_hz > 0:
        rate = float(apparatus.heating_rate_per_s(modes))
    motion = apparatus.motion(modes, place_of(config), heated=rate > 0)
    motion = planned(motion, _warmest(motion, hottest, rate * (device.lead_s + device.separation_s)),
                     _largest_area(config), device.error)  # fmt: skip
    return {"motion": motion, "heating_rate_per_s": rate}


def _largest_area(config: Config) -> float:
    from experiments.build import largest_area  # which builds devices of traps

    return largest_area(config)


def _check_stray_field(apparatus: Apparatus) -> None:
    """Refuses a stray field that pushes ions to where the trap is no quadrupole, or the modulation is too deep."""
    if not np.any(np.asarray(apparatus.stray_field_v_per_m)):
        return
    trap, wavevector = apparatus.trap, apparatus.wavevector_rad_m(1)
    seen = trap.excess_micromotion(apparatus.along_axes(apparatus.stray_field_v_per_m), wavevector)
    away = float(jnp.linalg.norm(seen.displacement_m))
    size = getattr(trap, "r0_m", getattr(trap, "height_m", np.inf))
    carriers = [float(apparatus.carrier_factor(pulse)) for pulse in (1, 2)]
    if not np.all(np.isfinite(carriers)) or away > 0.1 * float(size):
        raise ValueError(
            f"trap.stray_field_v_per_m pushes the ions {away * 1e6:.3g} um off the rf null, beyond what is described "
            "here (a tenth of the way to the electrodes, a modulation index of 30); compensate the field."
        )


def _warmest(motion, n_bar: float, gained: float) -> float:
    """An occupation of the reference mode at which every mode is at least as warm as after its heating."""
    if motion.heating_share is None:
        return n_bar
    # Modes heat by their own shares; warmer all of them by the largest, in units of the slope of their occupation.
    slope = np.asarray(motion.occupation(jnp.asarray(n_bar + 1.0)) - motion.occupation(jnp.asarray(float(n_bar))))
    share = np.max(np.asarray(motion.heating_share).reshape(len(slope), -1), axis=1)
    return n_bar + gained * float(np.max(share / np.maximum(slope.reshape(len(slope), -1)[:, 0], 1e-3)))


def register_from(config: Config, ion: IonMemristor, hottest: float) -> Register:
    """All ions of the chain as memristors, with their own parameters and their neighbours' light.

    Args:
        config: with [chain], and [crosstalk] if beams leak.
        ion: the device that they are alike in.
        hottest: largest mean phonon number of the reference mode at preparation.
    """
    assert config.chain is not None
    own: dict[str, Any] = {name: np.array(values) for name, values in config.chain.each.items()}
    window = own.pop("window_cycles", None)
    if window is not None:
        own["memory"] = Exponential(window) if config.memory.kernel == "exponential" else MovingAverage(window)
    ion = dataclasses.replace(ion, **own)
    count, table = config.chain.ions, config.crosstalk
    if table is None:
        return Register(ion=ion, count=count)  # ty: ignore[missing-argument]
    shares: list = [None, None]
    waists = (table.beam_waist_1_m, table.beam_waist_2_m)
    if waists != (None, None):
        positions = modes_of(config).equilibrium.positions_m
        pointing = 0.0 if table.pointing_m is None else jnp.asarray(table.pointing_m)
        shares = [None if w is None else gaussian_shares(positions, jnp.asarray(w), pointing) for w in waists]
    register = Register(  # ty: ignore[missing-argument]
        ion=ion,
        count=count,
        share_1=shares[0],
        share_2=shares[1],
        phase_rad=table.phase_rad,
        crosstalk_1=table.neighbour_1,
        crosstalk_2=table.neighbour_2,
    )
    if ion.motion is None:
        return register
    # Neighbours' light adds to the areas for which the thermal average was laid.
    brighter = float(max(jnp.max(a) for a in register.largest_areas) / max(jnp.max(a) for a in ion.largest_areas))
    gained = float(ion.heating_rate_per_s) * (config.device.lead_s + config.device.separation_s)
    area = _largest_area(config) * max(1.0, brighter)
    motion = planned(ion.motion, _warmest(ion.motion, hottest, gained), area, config.device.error)
    return dataclasses.replace(register, ion=dataclasses.replace(ion, motion=motion))


def modes_of(config: Config) -> Modes:
    """Normal modes of the chain of a configuration."""
    return apparatus_from(config).chain().modes().check()

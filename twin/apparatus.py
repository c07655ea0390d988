"""From voltages, geometry and beams to what the memristor feels: trap, chain, modes and the motion of an ion.

Everything is differentiable: the slope of a loop's area with respect to a trap voltage is one `jax.grad`.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy import constants

from twin.batching import check_not_negative, check_positive, check_values, is_traced, physical
from twin.chain import Chain, Modes
from twin.ion import YB171
from twin.phonons import Motion
from twin.surface_trap import SurfaceTrap
from twin.trap import AbstractTrap, heating_rate_per_s

# Modes whose eta^2 is below this share of the largest do nothing that a response could show.
_NEGLIGIBLE = 1e-12


class Apparatus(eqx.Module):
    """A trap with its chain of ions, and the two beams.

    Args:
        trap: one of `twin.trap` and `twin.surface_trap`, for an ion of 171Yb+.
        ions: N, static.
        beam_1, beam_2: directions of the beams of both pulses, of any length, shape (3,), along x, y, z; in a surface
            trap x lies in the surface, y is its normal. `beam_2` None: that of pulse 1.
        wavelength_1_m, wavelength_2_m: vacuum wavelengths, m; the default is that of the E2 line at 435.5 nm, and that
            of pulse 1 for pulse 2.
        quartic_v_per_m4, masses_kg: of the chain: `twin.chain.Chain`.
        stray_field_v_per_m: static field that pushes ions off the rf null, shape (3,), V/m.
        field_noise_v2_per_m2_hz: single-sided density S_E of electric-field noise, white, (V/m)^2/Hz.
        coherent: mean phonon number of a displacement of the lowest axial mode, of random phase; None for none.
    """

    trap: AbstractTrap
    ions: int = eqx.field(static=True, default=1)
    beam_1: Float[Array, "3"] = physical(None, default=(0.0, 0.0, 1.0))
    beam_2: Float[Array, "3"] | None = physical(None, default=None)
    wavelength_1_m: Float[Array, ""] = physical(default=YB171.transition("436").wavelength_m)
    wavelength_2_m: Float[Array, ""] | None = physical(default=None)
    quartic_v_per_m4: Float[Array, ""] = physical(default=0.0)
    masses_kg: Float[Array, " ions"] | None = physical(None, default=None)
    stray_field_v_per_m: Float[Array, "3"] = physical(None, default=(0.0, 0.0, 0.0))
    field_noise_v2_per_m2_hz: Float[Array, ""] = physical(default=0.0)
    coherent: Float[Array, ""] | None = physical(default=None)

    def __check_init__(self):
        for name in ("beam_1", "beam_2"):
            beam = getattr(self, name)
            if beam is not None and not is_traced(beam):
                check_values(name, beam, np.isfinite, "three finite numbers", "give x, y, z")
                if not np.any(np.asarray(beam)):
                    raise ValueError(f"`{name}` must have a direction, but is (0, 0, 0); give x, y, z.")
        for name in ("wavelength_1_m", "wavelength_2_m"):
            check_positive(name, getattr(self, name), "metres")
        check_values("stray_field_v_per_m", self.stray_field_v_per_m, np.isfinite, "finite", "give it in V/m")
        check_not_negative("field_noise_v2_per_m2_hz", self.field_noise_v2_per_m2_hz, "(V/m)^2/Hz")
        check_not_negative("coherent", self.coherent, "phonons")

    @property
    def same_beam(self) -> bool:
        """Whether one wave vector serves both pulses."""
        return self.beam_2 is None and self.wavelength_2_m is None

    def wavevector_rad_m(self, pulse: int) -> Float[Array, "3"]:
        """Wave vector of pulse 1 or 2 along the axes of the trap, rad/m."""
        direction = self.beam_1 if pulse == 1 or self.beam_2 is None else self.beam_2
        wavelength = self.wavelength_1_m if pulse == 1 or self.wavelength_2_m is None else self.wavelength_2_m
        return 2 * jnp.pi / wavelength * self.along_axes(direction / jnp.linalg.norm(direction))

    def along_axes(self, vector: Float[Array, "3"]) -> Float[Array, "3"]:
        """A vector of the laboratory along the axes of the trap."""
        return self.trap.axes @ vector if isinstance(self.trap, SurfaceTrap) else vector

    def chain(self) -> Chain:
        """The ions; static fields of the trap act on other masses as on ours, the rf does not."""
        static = constants.elementary_charge * self.trap.static_curvature_v_per_m2[0]
        known = not is_traced(static) and bool(np.isfinite(np.asarray(static)))
        secular = self.trap.secular_hz
        # Equal masses feel the sum alone, and a trap given by its frequencies does not know the parts.
        parts = static if self.masses_kg is not None and (known or is_traced(static)) else None
        return Chain(self.ions, secular, self.masses_kg, self.quartic_v_per_m4, parts, self.trap.mass_kg)

    def lamb_dicke(self, modes: Modes, pulse: int) -> Float[Array, "ions modes"]:
        """Lamb-Dicke parameters of all ions and modes for the beam of pulse 1 or 2; signs are those of the modes."""
        wavevector = self.wavevector_rad_m(pulse)
        size = jnp.linalg.norm(wavevector)
        return modes.lamb_dicke(size, wavevector / size)

    def carrier_factor(self, pulse: int) -> Float[Array, ""]:
        """What excess micromotion leaves of the carrier's Rabi frequency: J_0 of the modulation index."""
        if not is_traced(self.stray_field_v_per_m) and not np.any(np.asarray(self.stray_field_v_per_m)):
            return jnp.ones(())
        field = self.along_axes(self.stray_field_v_per_m)
        return self.trap.excess_micromotion(field, self.wavevector_rad_m(pulse)).carrier_factor

    def heating_rate_per_s(self, modes: Modes) -> Float[Array, ""]:
        """Phonons a second that field noise gives one ion at the frequency of the reference mode."""
        return heating_rate_per_s(self.field_noise_v2_per_m2_hz, self.reference_hz(modes), self.trap.mass_kg)

    def reference_hz(self, modes: Modes) -> Float[Array, ""]:
        """Frequency of the mode whose phonon number a device names: the lowest axial one."""
        return modes.frequencies_hz[2 * self.ions]

    def felt(self, modes: Modes, ion: int | None) -> Bool[np.ndarray, " modes"]:
        """Modes that some beam sees on this ion, or on some ion; all of them for traced values."""
        etas = [self.lamb_dicke(modes, pulse)[slice(None) if ion is None else slice(ion, ion + 1)] for pulse in (1, 2)]
        if is_traced(etas):
            return np.ones(3 * self.ions, bool)
        largest = np.max([np.max(np.abs(np.asarray(eta)), axis=0) for eta in etas], axis=0)
        return largest**2 > _NEGLIGIBLE * max(np.max(largest) ** 2, 1e-300)

    def motion(self, modes: Modes, ion: int | None, *, heated: bool) -> Motion:
        """The motion that one ion feels (counted from 0), or all of them (None; the batch axis is the ion).

        Args:
            modes: of the chain.
            ion: its place, or None.
            heated: whether modes gain phonons at some rate, here or in the device.
        """
        keep = self.felt(modes, ion)
        pick = lambda eta: jnp.abs(eta.T if ion is None else eta[ion])[keep]
        share = None
        if heated:
            # White noise heats with 1 / frequency; a uniform field moves centre-of-mass modes only.
            share = (modes.heating_shares() * self.reference_hz(modes) / modes.frequencies_hz)[keep]
        coherent = None
        if self.coherent is not None:
            coherent = jnp.zeros(3 * self.ions).at[2 * self.ions].set(self.coherent)[keep]
        return Motion(
            pick(self.lamb_dicke(modes, 1)),
            None if self.same_beam else pick(self.lamb_dicke(modes, 2)),
            (modes.frequencies_hz / self.reference_hz(modes))[keep],
            share,
            coherent,
            self.carrier_factor(1),
            self.carrier_factor(2),
        )

"""The ion memristor whose pulses are sampled waveforms in place of two Gaussians.

The controller scales the samples of channel k by `theta_k(command) / pi`, as it scales the Gaussians: a waveform is
what is played at full command, where the commanded area is pi. Channels may overlap in time, carry a phase, and leak
into each other's line. Commands, memory, motion and read-out are those of the `IonMemristor` it is made of.
"""

import dataclasses
import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twin.batching import physical
from twin.loop import AbstractMemristor, Responder, Response, Settings, averaged
from twin.memory import AbstractMemory
from twin.memristor import IonMemristor
from twin.slices import Dense, Slices, Taylor, action_of, largest_action, propagate, taylor
from twin.waveform import Waveform

# Arrays none of whose axes is one of devices.
_NO_LANES = {"leading": None}


class SampledIon(AbstractMemristor):
    """An ion under sampled waveforms, one slice after another (`twin.slices`); made by `sampled`.

    Attributes:
        ion: the device; its Gaussian pulses, widths, separation and lead are not used.
        real_rad_s, imag_rad_s: drive of each line while one channel plays alone at full command, rad/s, shape
            (slices, lines, channels).
        slice_s: length of a slice, s.
        alone_slices: slices after which the run of channel 1 alone is over, but for the tail.
        tail_slices: parts of the time from the last slice to read-out, `ion.tail_s`.
        action: largest action of a slice that `rule` is laid for; cycles beyond it are flagged, and NaN.
        rule: Taylor polynomial of a slice, or `Dense()`. error: of populations, which the rule keeps.
    """

    ion: IonMemristor
    real_rad_s: Float[Array, "slices lines channels"] = eqx.field(metadata=_NO_LANES)
    imag_rad_s: Float[Array, "slices lines channels"] | None = eqx.field(metadata=_NO_LANES)
    alone_slices: int = eqx.field(static=True)
    tail_slices: int = eqx.field(static=True)
    action: float = eqx.field(static=True)
    rule: Taylor | Dense = eqx.field(static=True)
    error: float = eqx.field(static=True)
    slice_s: Float[Array, "..."] = physical()

    @property
    def memory(self) -> AbstractMemory:
        """That of the ion."""
        return self.ion.memory

    @property
    def source(self) -> str:
        """That of the ion."""
        return self.ion.source

    @property
    def unwrapped(self) -> IonMemristor:
        """The ion."""
        return self.ion

    def playing(self, drives: Waveform) -> "SampledIon":
        """The same with other samples of the same number; for use inside an optimization."""
        return dataclasses.replace(self, **_parts(drives, self.imag_rad_s is None))

    def prepared(self, x_set, settings: Settings) -> "SampledIon":
        del x_set, settings  # all is laid by `sampled`
        return self

    def under(self, settings: Settings) -> Responder:
        def respond(x_set, r_set, *, alone, of_cycle=None) -> Response:
            now = settings if of_cycle is None else dataclasses.replace(settings, of_cycle=of_cycle)
            factor_1, factor_2, weights = self.ion.carrier_factors(jnp.ndim(x_set), self._largest_area())
            theta_1, theta_2 = self.ion.areas(x_set, r_set)
            if not self.ion.moves:
                factor_1, factor_2 = factor_1[0], factor_2[0]
            theta_2 = jnp.where(alone, 0.0, factor_2 * theta_2)
            response = self._solve(factor_1 * theta_1, theta_2, *now.by_cycle(), alone)
            return averaged(response, weights) if self.ion.moves else response

        return respond

    def signal(self, populations) -> Float[Array, "..."]:
        return self.ion.signal(populations)

    def assigned(self, populations) -> Float[Array, "..."]:
        return self.ion.assigned(populations)

    def assigned_next(self, populations) -> Float[Array, "..."]:
        return self.ion.assigned_next(populations)

    def _largest_area(self) -> Float[Array, ""]:
        """Of the modulus of all channels together on the line that sees most, rad, at full command."""
        imag = 0.0 if self.imag_rad_s is None else self.imag_rad_s
        modulus = jnp.sqrt(self.real_rad_s**2 + imag**2)
        full = jnp.stack([jnp.max(theta) for theta in self.ion.largest_areas]) / math.pi
        return jnp.max(jnp.sum(modulus @ full, axis=0)) * jnp.max(self.slice_s)

    def _solve(self, theta_1, theta_2, detuning_1_set_hz, detuning_2_set_hz, alone) -> Response:
        theta_1, theta_2 = jnp.broadcast_arrays(theta_1, theta_2)
        shares = jnp.stack([theta_1, theta_2]) / math.pi
        cycles = (1,) * theta_1.ndim
        dark = jnp.zeros((self.tail_slices, len(shares), *theta_1.shape))
        lit = lambda part: jnp.concatenate([jnp.tensordot(part, shares, 1), dark])
        real, imag = lit(self.real_rad_s), None if self.imag_rad_s is None else lit(self.imag_rad_s)
        number = np.arange(len(self.real_rad_s)).reshape(-1, *cycles)
        length_s = jnp.where(jnp.asarray(alone) & (number >= self.alone_slices), 0.0, self.slice_s)
        tail_s = jnp.broadcast_to(self.ion.tail_s / max(self.tail_slices, 1), (self.tail_slices, *length_s.shape[1:]))
        slices = Slices(real, imag, jnp.concatenate([length_s, tail_s]))
        system = self.ion.system(detuning_1_set_hz, detuning_2_set_hz)
        path = propagate(system, slices, self.ion.start, self.rule)
        n = len(system.levels)
        fine = action_of(system, slices) <= self.action * (1 + 1e-9)
        valid = fine & jnp.all(jnp.isfinite(path.populations), axis=0)
        populations, coherence = (jnp.where(valid, a, jnp.nan) for a in (path.populations, path.state[n : n + 2]))
        return Response(populations, coherence, valid, jnp.full(valid.shape, self.error), "sampled")


def sampled(
    ion: IonMemristor,
    drives: Waveform,
    *,
    alone_slices: int,
    largest_rad_s: tuple[float, ...] | None = None,
    largest_hz: float = 0.0,
    error: float = 1e-9,
    real_only: bool = False,
) -> SampledIon:
    """An ion under sampled waveforms, laid for the values at hand.

    Args:
        ion: the device, of known values.
        drives: drive of each line while one channel plays alone at full command: samples of shape
            (slices, lines, channels), the batch axis being the channel.
        alone_slices: slices after which the run of channel 1 alone is over.
        largest_rad_s: bound on the drives of each line with all channels on; that of `drives` where not given. Give
            what the hardware allows before samples are changed (`SampledIon.playing`).
        largest_hz: how far detunings may go beyond those of the ion, such as laser offsets.
        error: of populations.
        real_only: whether the imaginary parts are zero and are left out.

    Raises:
        ValueError: drives without the axis of channels, or fewer of them than lines; an ion with light shifts or
            slow noise.
    """
    shape = drives.real_rad_s.shape
    ion.system(0.0, 0.0).refuse_light_shifts("an ion under sampled waveforms")
    if ion.slow_noise is not None:
        raise ValueError("sampled waveforms are not averaged over `slow_noise`; leave it out, or use Gaussian pulses.")
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(f"`drives` must have samples of shape (slices, lines, channels), but they have {shape}; "
                         "light one channel at a time.")  # fmt: skip
    ion = dataclasses.replace(ion, nominal_sigma_1_s=None, nominal_sigma_2_s=None)
    full = [float(jnp.max(theta)) / math.pi for theta in ion.largest_areas]
    if largest_rad_s is None:
        modulus = np.hypot(np.asarray(drives.real_rad_s), np.asarray(drives.imag_rad_s))
        largest_rad_s = tuple(np.max(modulus @ np.array(full), axis=0))
    else:
        largest_rad_s = tuple(largest * share for largest, share in zip(largest_rad_s, full, strict=True))
    system = ion.system(largest_hz, -largest_hz), ion.system(-largest_hz, largest_hz)
    slice_s = float(drives.sample_s)
    action = float(max(largest_action(one, math.hypot(*largest_rad_s), slice_s) for one in system))
    longest_s = float(jnp.max(ion.tail_s))
    idle = max(largest_action(one, 0.0, longest_s) for one in system)
    tail_slices = math.ceil(idle / action) if longest_s > 0 else 0
    steps = shape[0] + tail_slices
    return SampledIon(
        ion, **_parts(drives, real_only), slice_s=slice_s, alone_slices=alone_slices, tail_slices=tail_slices,
        action=action, rule=taylor(action, error / steps), error=error,
    )  # fmt: skip


def _parts(drives: Waveform, real_only: bool) -> dict[str, Float[Array, "..."] | None]:
    return {"real_rad_s": drives.real_rad_s, "imag_rad_s": None if real_only else drives.imag_rad_s}

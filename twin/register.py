"""A register: memristors in one chain, played at the same time, whose beams reach the neighbours as well.

The batch axis that comes last is the ion. Each ion has its own commands, memory and parameters. Beam j, meant for ion
j, meets ion i with a share C_ij of its field, so that ion i sees the field of all beams together:

    Omega_i(t) = | sum_j C_ij s_j theta_j(command of ion j) | g(t),      s_j: power of beam j (`rabi_scale`)

with one envelope g of both pulses for all ions. Areas add as complex numbers, and a common phase is a choice of gauge.
Pulses of unequal widths or times do not add to one envelope, and are refused where beams leak.
"""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twin.batching import check_not_negative, check_values, is_traced, physical
from twin.closed_form import flat_root
from twin.loop import AbstractMemristor, Responder, Response, Settings
from twin.memory import AbstractMemory
from twin.memristor import IonMemristor


def gaussian_shares(
    positions_m: Float[Array, " ions"],
    waist_m: Float[Array, "..."],
    pointing_m: Float[Array, "..."] | float = 0.0,
) -> Float[Array, "ions ions"]:
    """Field of beam j at ion i over that at its own centre: C_ij = exp(-(z_i - z_j - p_j)^2 / w^2).

    Args:
        positions_m: of the ions along the chain, m.
        waist_m: 1/e^2 radius of the intensity, m: where the field has fallen to 1/e.
        pointing_m: how far each beam misses its ion, m. Of an ion's own beam, C_ii < 1 is left then.
    """
    miss = positions_m[:, None] - positions_m[None] - jnp.broadcast_to(pointing_m, positions_m.shape)
    return jnp.exp(-((miss / waist_m) ** 2))


class Register(AbstractMemristor):
    """N ion memristors side by side; inputs and parameters have the trailing axis (ions,).

    Args:
        ion: the device; parameters of shape () are shared, those of shape (ions,) belong to each ion.
        share_1, share_2: field of beam j at ion i for each pulse, shape (ions, ions); None for no crosstalk but
            `crosstalk`.
        crosstalk_1, crosstalk_2: further shares of the two nearest neighbours, as measured.
        phase_rad: phase of a neighbour's light against that of the own beam, rad, one number or shape (ions, ions).
        count: number of ions.

    Raises:
        ValueError: shares of another shape; pulses of unequal widths or times where beams leak; parameters of another
            length.
    """

    ion: IonMemristor
    count: int = eqx.field(static=True)
    share_1: Float[Array, "ions ions"] | None = physical(None, default=None)
    share_2: Float[Array, "ions ions"] | None = physical(None, default=None)
    phase_rad: Float[Array, "..."] = physical(None, default=0.0)
    crosstalk_1: Float[Array, ""] = physical(default=0.0)
    crosstalk_2: Float[Array, ""] = physical(default=0.0)

    def __check_init__(self):
        for name in ("share_1", "share_2"):
            share = getattr(self, name)
            if share is not None and jnp.shape(share) != (self.count, self.count):
                raise ValueError(
                    f"`{name}` must have shape ({self.count}, {self.count}), field of beam j at ion i, "
                    f"but has {jnp.shape(share)}."
                )
            check_values(name, share, lambda v: (v >= 0) & (v <= 1), "in [0, 1]", "it is a share of a field")
        for name in ("crosstalk_1", "crosstalk_2"):
            check_not_negative(name, getattr(self, name), "a share of the field")
        for name in ("sigma_1_s", "sigma_2_s", "separation_s"):
            values = getattr(self.ion, name)
            if not is_traced(values) and self._leaks and np.ptp(np.asarray(values)) > 0:
                raise ValueError(
                    f"`{name}` differs from ion to ion, but pulses that reach neighbours must have one envelope; "
                    "give all ions the same, or leave crosstalk out."
                )

    # ------------------------------------------------------------------------------------------------ optics

    @property
    def _leaks(self) -> bool:
        if self.count == 1 or is_traced(self.share_1, self.share_2, self.crosstalk_1, self.crosstalk_2):
            return False
        off = ~np.eye(self.count, dtype=bool)
        shares = [np.asarray(s)[off] for s in (self.share_1, self.share_2) if s is not None]
        return bool(self.crosstalk_1 > 0 or self.crosstalk_2 > 0 or any(np.any(s > 0) for s in shares))

    def shares(self, beam: int) -> tuple[Float[Array, "ions ions"], Float[Array, "ions ions"]]:
        """Real and imaginary part of C_ij for pulse 1 or 2."""
        share, nearest = ((self.share_1, self.crosstalk_1), (self.share_2, self.crosstalk_2))[beam - 1]
        place = np.arange(self.count)
        neighbours = jnp.asarray(np.abs(place[:, None] - place[None]) == 1, float)
        total = (jnp.eye(self.count) if share is None else share) + nearest * neighbours
        own = jnp.eye(self.count)
        phase = jnp.broadcast_to(self.phase_rad, total.shape) * (1 - own)
        return total * jnp.cos(phase), total * jnp.sin(phase)

    def _mixed(self, theta: Float[Array, "... ions"], beam: int) -> Float[Array, "... ions"]:
        real, imag = (theta @ part.T for part in self.shares(beam))
        # The modulus, with a slope at zero: fields that cancel leave no pulse. Without a phase the sign stays.
        if not is_traced(self.phase_rad) and not np.any(np.asarray(self.phase_rad)):
            return real
        return flat_root(real**2 + imag**2)

    @property
    def largest_areas(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Areas at full command of every ion, rad."""
        theta_1, theta_2 = (jnp.broadcast_to(a, (*jnp.shape(a)[:-1], self.count)) for a in self.ion.largest_areas)
        return theta_1 @ jnp.hypot(*self.shares(1)).T, theta_2 @ jnp.hypot(*self.shares(2)).T

    # ------------------------------------------------------------------------------------------------ the contract

    @property
    def coupled(self) -> bool:
        """Ions see each other's beams."""
        return True

    @property
    def unwrapped(self) -> IonMemristor:
        """The ion that all are made of."""
        return self.ion

    @property
    def lanes(self) -> int:
        """The ions, which may share all their parameters."""
        return self.count

    @property
    def memory(self) -> AbstractMemory:
        """That of the ions; a window of shape (ions,) is each ion's own."""
        return self.ion.memory

    @property
    def source(self) -> str:
        """That of the ions."""
        return self.ion.source

    def prepared(self, x_set, settings: Settings) -> "Register":
        if is_traced(self, settings):
            return self
        return self.with_method_of(self.brightest.prepared(x_set, settings))

    @property
    def brightest(self) -> IonMemristor:
        """The ions with all beams on at full command, for which grids and series are laid."""
        changed = {}
        for k, own, all_on in zip((1, 2), self.ion.largest_areas, self.largest_areas, strict=True):
            # An ion may be dark, and be reached by its neighbours' light all the same.
            most = jnp.max(own)
            changed[f"rabi_scale_{k}"] = jnp.max(getattr(self.ion, f"rabi_scale_{k}"))
            changed[f"amplitude_{k}"] = jnp.max(getattr(self.ion, f"amplitude_{k}")) * jnp.where(
                most > 0, jnp.max(all_on) / jnp.where(most > 0, most, 1.0), 1.0
            )
        return dataclasses.replace(self.ion, **changed)

    def with_method_of(self, planned: IonMemristor) -> "Register":
        """The register whose ions are solved as those of a planned device."""
        own = {"method": planned.method, "steps": planned.steps, "slow_noise": planned.slow_noise}
        ion = dataclasses.replace(self.ion, **own)
        return dataclasses.replace(self, ion=ion)

    def under(self, settings: Settings) -> Responder:
        by_area = self.ion.by_area(settings, self.largest_areas)

        def respond(x_set, r_set, *, alone, of_cycle=None) -> Response:
            theta_1, theta_2 = self.ion.areas(x_set, r_set)
            shape = jnp.broadcast_shapes(theta_1.shape, (*theta_1.shape[:-1], self.count))
            theta_1, theta_2 = (jnp.broadcast_to(theta, shape) for theta in (theta_1, theta_2))
            return by_area(self._mixed(theta_1, 1), self._mixed(theta_2, 2), alone=alone, of_cycle=of_cycle)

        return respond

    def signal(self, populations) -> Float[Array, "..."]:
        return self.ion.signal(populations)

    def assigned(self, populations) -> Float[Array, "..."]:
        return self.ion.assigned(populations)

    def assigned_next(self, populations) -> Float[Array, "..."]:
        return self.ion.assigned_next(populations)

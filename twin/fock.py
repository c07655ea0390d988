"""Level graph and motion in truncated Fock space: the modes, the sizes of a solve, and its right-hand side.

The state turns with the energies of the levels and the frequencies of the modes, so that only the pulses move it. The
displacement operator acts band by band, as one shifted array each; in the basis i^n |n> its elements are real.
"""

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from twin.batching import check_not_negative, check_positive, check_values, real_array
from twin.levels import LevelSystem
from twin.pulses import AbstractPulse
from twin.sidebands import displacement_bands


def _per_mode(value) -> Float[Array, "modes"] | None:
    return None if value is None else jnp.atleast_1d(real_array(value))


def _modal(**options) -> Any:
    return eqx.field(converter=_per_mode, metadata={"leading": 1}, **options)


class Modes(eqx.Module):
    """One or two modes of the motion and their state at the beginning: thermal, displaced by alpha, and heated.

    Every number is given per mode, shape (modes,), or as one number for all of them.

    Args:
        secular_hz: secular frequencies, Hz.
        eta_1, eta_2: Lamb-Dicke parameters of the first and second pulse.
        n_bar: mean phonon number of the thermal part.
        alpha_real, alpha_imag: coherent displacement in the rotating frame; None for none.
        heating_rate_per_s: phonons gained a second; None for none (kets may then do).
    """

    secular_hz: Float[Array, "modes"] = _modal()
    eta_1: Float[Array, "modes"] = _modal()
    eta_2: Float[Array, "modes"] = _modal(default=0.0)
    n_bar: Float[Array, "modes"] = _modal(default=0.0)
    alpha_real: Float[Array, "modes"] | None = _modal(default=None)
    alpha_imag: Float[Array, "modes"] | None = _modal(default=None)
    heating_rate_per_s: Float[Array, "modes"] | None = _modal(default=None)

    def __check_init__(self):
        check_positive("secular_hz", self.secular_hz, "Hz")
        for name in ("eta_1", "eta_2", "n_bar"):
            check_not_negative(name, getattr(self, name), "a plain number")
        check_not_negative("heating_rate_per_s", self.heating_rate_per_s, "phonons a second")
        for name in ("alpha_real", "alpha_imag"):
            check_values(name, getattr(self, name), lambda v: v == v, "finite", "it is a plain number")
        if self.secular_hz.shape[0] not in (1, 2):
            raise ValueError(f"`secular_hz` must name one or two modes, but has shape {self.secular_hz.shape}.")
        for name in ("eta_1", "eta_2", "n_bar", "alpha_real", "alpha_imag", "heating_rate_per_s"):
            value = getattr(self, name)
            if value is not None and value.shape[0] not in (1, self.count):
                raise ValueError(f"`{name}` must have one number a mode, {self.count}, but has shape {value.shape}.")

    @property
    def count(self) -> int:
        """Number of modes."""
        return self.secular_hz.shape[0]

    def each(self, name: str) -> Float[Array, "modes"]:
        """A number of every mode; zero where it is None."""
        value = getattr(self, name)
        return jnp.broadcast_to(jnp.zeros(1) if value is None else value, (self.count,))

    def eta(self, pulse: int) -> Float[Array, "modes"]:
        """Lamb-Dicke parameters of a pulse, the first is 0."""
        return self.each(("eta_1", "eta_2")[pulse])


class Plan(eqx.Module):
    """What must be known before a solve is compiled: sizes, from the largest values that will occur.

    Args:
        cutoff: Fock states of each mode.
        bands: last band of the displacement operator, for each mode.
        steps: time steps, an even number.
        terms: Fock states of each mode's thermal mixture that are carried.
        pure: whether kets do: nothing jumps.
        error: population error aimed at; a solve that misses it is flagged.
    """

    cutoff: tuple[int, ...] = eqx.field(static=True)
    bands: tuple[int, ...] = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    terms: tuple[int, ...] = eqx.field(static=True)
    pure: bool = eqx.field(static=True)
    error: float = eqx.field(static=True)


@eqx.filter_jit
def band_table(eta: Float[Array, ""], bands: int, cutoff: int) -> Float[Array, "bands cutoff"]:
    """Bands that stay inside the cutoff: row s, n < cutoff - s."""
    inside = jnp.arange(cutoff) < cutoff - jnp.arange(bands + 1)[:, None]
    return jnp.where(inside, displacement_bands(eta, bands, cutoff), 0.0)


class Equation(eqx.Module):
    """d state / dt of a state (2, levels, *cutoff, columns), real and imaginary part first."""

    system: LevelSystem
    pulses: tuple[AbstractPulse, ...]
    omega_rad_s: Float[Array, "modes"]
    tables: tuple[tuple[Float[Array, "_ _"], ...], ...]
    damping_per_s: Float[Array, "states states"] | None
    heating_rate_per_s: Float[Array, "modes"]
    heated: bool = eqx.field(static=True)
    plan: Plan = eqx.field(static=True)

    def rhs(self, t_s, state):
        """The slope, 1/s."""
        slope = self._commutator(t_s, state)
        if self.plan.pure:
            return slope
        size = state.shape[-1]
        flat = slope.reshape(2, size, size)
        adjoint = jnp.stack([flat[0].T, -flat[1].T])
        return (flat + adjoint + self._jumps(state.reshape(flat.shape))).reshape(state.shape)

    def _commutator(self, t_s, state):
        """-i H state, in the frame that turns with the modes and the levels."""
        numbers = [jnp.arange(float(n)) for n in self.plan.cutoff]
        angle = sum(w * n for w, n in zip(self.omega_rad_s, jnp.meshgrid(*numbers, indexing="ij"), strict=True)) * t_s
        cos, sin = lax.optimization_barrier((jnp.cos(angle)[..., None], jnp.sin(angle)[..., None]))
        out: list = [None] * len(self.system.levels)
        add = lambda j, term: out.__setitem__(j, term if out[j] is None else out[j] + term)
        energies = self.system.energies_rad_s
        for pulse, names, tables in zip(self.pulses, self.system.couplings, self.tables, strict=False):
            source, target = (self.system.index(name) for name in names)
            drive = pulse.drive(t_s, t_s)
            phase = (energies[target] - energies[source]) * t_s
            c, s = 0.5 * jnp.cos(phase), 0.5 * jnp.sin(phase)
            imag = 0.0 if drive.imag is None else drive.imag
            real, imag = drive.real * c - imag * s, drive.real * s + imag * c
            for here, there, sign in ((source, target, 1.0), (target, source, -1.0)):
                # The drive times e^{-i omega n t}; for the adjoint, the conjugate of the drive.
                re, im = real * cos + sign * imag * sin, sign * imag * cos - real * sin
                turned = jnp.stack(
                    [re * state[0, here] - im * state[1, here], re * state[1, here] + im * state[0, here]]
                )
                add(there, self._displaced(tables, turned, sign))
        zero = jnp.zeros_like(state[:, 0])
        # Without the barriers the compiler computes the bands anew for each part that uses them.
        re, im = lax.optimization_barrier(jnp.stack([zero if term is None else term for term in out], axis=1))
        # Turned back by e^{i omega n t}, times -i.
        return jnp.stack([im * cos + re * sin, im * sin - re * cos])

    def _displaced(self, tables, x, sign: float):
        """D x, or D^+ x for the sign -1: in this basis bands below the diagonal and above differ by (-1)^s."""
        for axis, (table, bands, cutoff) in enumerate(zip(tables, self.plan.bands, self.plan.cutoff, strict=True), 1):
            padding = [(bands, bands) if a == axis else (0, 0) for a in range(x.ndim)]
            padded = lax.optimization_barrier(jnp.pad(x, padding))
            along = lambda row, after=x.ndim - 1 - axis: row.reshape((-1,) + (1,) * after)
            shifted = lambda s, x=padded, a=axis, b=bands, n=cutoff: lax.slice_in_dim(x, b + s, b + s + n, axis=a)
            total = along(table[0]) * shifted(0)
            for s in range(1, bands + 1):
                total = total + along(sign**s * jnp.roll(table[s], s)) * shifted(-s)
                total = total + along((-sign) ** s * table[s]) * shifted(s)
            x = total
        return x

    def _jumps(self, rho):
        """Damping of every element, decays and heating, of the density matrix (2, rows, columns)."""
        out = self.damping_per_s * rho
        size, rows = math.prod(self.plan.cutoff), rho.shape[1]
        for decay in self.system.decays:
            first, to = (size * self.system.index(name) for name in (decay.source, decay.target))
            fed = decay.rate_per_s * rho[:, first : first + size, first : first + size]
            around = (to, rows - size - to, 0)
            out = out + lax.pad(fed, jnp.zeros(()), ((0, 0, 0), around, around))
        if self.heated:
            for m, cutoff in enumerate(self.plan.cutoff):
                # A phonon more or less is one shift of rows and columns; the roots are zero where it leaves the cutoff.
                apart = math.prod(self.plan.cutoff[m + 1 :])
                n = np.arange(rows) // apart % cutoff
                padded = lax.optimization_barrier(jnp.pad(rho, ((0, 0), (apart, apart), (apart, apart))))
                for shift, root in ((2 * apart, np.sqrt((n + 1) % cutoff)), (0, np.sqrt(n))):
                    moved = padded[:, shift : shift + rows, shift : shift + rows]
                    out = out + (self.heating_rate_per_s[m] * root[:, None]) * root * moved
        return out


def damping_rates(system: LevelSystem, modes: Modes, plan: Plan) -> Float[Array, "states states"]:
    """Rate at which each element of the density matrix decays, negative."""
    levels = len(system.levels)
    loss = jnp.zeros(levels)
    for decay in system.decays:
        loss = loss.at[system.index(decay.source)].add(decay.rate_per_s)
    between = 0.5 * (loss[:, None] + loss)
    for d in system.dephasings:
        w = np.asarray(d.weights)
        between = between + d.rate_per_s * (w[:, None] - w) ** 2
    side = jnp.zeros(plan.cutoff)
    for m, cutoff in enumerate(plan.cutoff):
        n = np.arange(cutoff)
        # a^+ leads nowhere from the last state, so that the trace is kept.
        row = jnp.asarray(n + np.where(n < cutoff - 1, n + 1, 0), float)
        after = (1,) * (len(plan.cutoff) - 1 - m)
        side = side + 0.5 * modes.each("heating_rate_per_s")[m] * row.reshape(-1, *after)
    lead = (1,) * len(plan.cutoff)
    between = between.reshape(levels, *lead, levels, *lead)
    rates = between + side.reshape(1, *plan.cutoff, 1, *lead) + side.reshape(1, *lead, 1, *plan.cutoff)
    size = levels * math.prod(plan.cutoff)
    return -rates.reshape(size, size)

"""Piecewise-constant drives, slice by slice: the engine of controls that a sample clock plays.

Within a slice the generator L of the Schrödinger or Lindblad equation is constant, so the slice is exp(h L) exactly.
Its Taylor polynomial acts on the state, in equal parts of the slice where one polynomial would need too many terms; no
matrix is formed. With a = h |L| / parts the remainder of a part is below a^(d + 1) / (d + 1)! / (1 - a / (d + 2)), so
degree and parts follow from bounds on the drives before anything is traced (`taylor`). Derivatives are those of the
polynomial, and as exact as it is.

`Dense` forms the matrix of each slice instead, and its Padé exponential: slower, and independent of all the above but
the right-hand side. It recomputes what a search has found.
"""

import math
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from twin import magnus
from twin.batching import batch_shape, broadcast_batch, physical
from twin.dynamics import initial_components
from twin.levels import LevelSystem
from twin.master_equation import lindblad_components, reached, schroedinger_components
from twin.pulses import Drive

_LARGEST_DEGREE = 24
_SQUARINGS = 40


class Slices(eqx.Module):
    """Rabi frequencies of all couplings of a graph, constant within each slice.

    Args:
        real_rad_s: real part of `Omega exp(-i phi)`, rad/s, shape (slices, couplings, *batch).
        imag_rad_s: imaginary part, the same shape; None where all are real.
        length_s: length of each slice, s, shape (slices, *batch); zero skips a slice.
    """

    real_rad_s: Float[Array, "slices couplings ..."] = physical(2)
    imag_rad_s: Float[Array, "slices couplings ..."] | None = physical(2)
    length_s: Float[Array, "slices ..."] = physical(1)

    def __check_init__(self):
        rows = {a.shape[0] for a in (self.real_rad_s, self.imag_rad_s, self.length_s) if a is not None}
        if len(rows) != 1:
            raise ValueError(f"drives and lengths must have as many slices, but have {sorted(rows)}.")


class Taylor(NamedTuple):
    """Degree of the polynomial, and equal parts of a slice."""

    degree: int
    parts: int


class Dense(NamedTuple):
    """Exponentials of the matrices of the slices."""


class Path(NamedTuple):
    """State after the last slice, or after each one.

    Attributes:
        state: real components (`twin.master_equation`), shape (components, *batch) or (slices, components, *batch).
        populations: of each level, shape (levels, *batch) or (slices, levels, *batch).
    """

    state: Float[Array, "..."]
    populations: Float[Array, "..."]


def taylor(action: float, error: float) -> Taylor:
    """The cheapest polynomial for slices whose h |L| is at most `action`, and an error of the state a slice."""
    if not (math.isfinite(action) and action >= 0 and 0 < error < 1):
        raise ValueError(f"the action must be finite and the error in (0, 1), but they are {action:g} and {error:g}.")
    found = []
    for degree in range(2, _LARGEST_DEGREE + 1):
        parts = max(1, math.ceil(action / (degree + 1)))
        while parts * _remainder(action / parts, degree) > error:
            parts = math.ceil(1.1 * parts + 0.5)
        found.append((degree * parts, degree, parts))
    _, degree, parts = min(found)
    return Taylor(degree, parts)


def largest_action(system: LevelSystem, largest_rad_s: float, longest_s: float, *, pure: bool = False) -> float:
    """Bound on h |L| of a slice, for the norm of its Rabi frequencies and its length; known values only.

    Half of the spectral width of H, twice that for a density matrix, and twice the sum of all rates.
    """
    system.refuse_light_shifts("the propagation of slices")
    energies = np.asarray(system.energies_rad_s)
    width = float(np.max(energies.max(0) - energies.min(0))) + largest_rad_s
    rates = sum(float(np.max(d.rate_per_s)) for d in system.decays)
    rates += sum(float(np.max(d.rate_per_s)) * np.ptp(d.weights) ** 2 for d in system.dephasings)
    return longest_s * (0.5 * width if pure else width + 2 * rates)


def action_of(system: LevelSystem, slices: Slices) -> Float[Array, "..."]:
    """The same bound on the largest h |L| of each lane, of a density matrix, for values of any kind."""
    energies = system.energies_rad_s
    square = slices.real_rad_s**2 + (0.0 if slices.imag_rad_s is None else slices.imag_rad_s**2)
    rates = sum((d.rate_per_s for d in system.decays), jnp.zeros(()))
    rates = rates + sum((d.rate_per_s * np.ptp(d.weights) ** 2 for d in system.dephasings), jnp.zeros(()))
    constant = jnp.max(energies, axis=0) - jnp.min(energies, axis=0) + 2 * rates
    return jnp.max(slices.length_s * (constant + jnp.sqrt(jnp.sum(square, axis=1))), axis=0)


def propagate(
    system: LevelSystem, slices: Slices, start: str | np.ndarray, rule: Taylor | Dense, *, saved: bool = False
) -> Path:
    """Carries a state through all slices.

    Args:
        system: the graph, in its rotating frame; a closed one with a pure start is solved as a ket.
        slices: the drives of its couplings. All numbers may have trailing batch axes.
        start: a level's name, a ket of shape (levels,), or a Hermitian matrix of shape (levels, levels, *batch).
        rule: from `taylor`, or `Dense()`.
        saved: whether the state after each slice is returned, in place of the last one.

    Raises:
        ValueError: a graph with light shifts.
    """
    system.refuse_light_shifts("the propagation of slices")
    shape = batch_shape(system, slices)
    pure = system.closed and (isinstance(start, str) or np.ndim(start) == 1)
    first = initial_components(system, start, pure)
    kept = reached(system, np.flatnonzero(np.any(first.reshape(len(first), -1), axis=1)).tolist(), pure=pure)
    system = broadcast_batch(system, shape)
    state = tuple(jnp.broadcast_to(first[k], shape) for k in kept)
    right_side = partial(schroedinger_components if pure else lindblad_components, rotating=True)

    def slopes(scaled: LevelSystem, drives: list[Drive], y: magnus.State) -> list[Float[Array, "..."]]:
        present = dict(zip(kept, y, strict=True))
        full = right_side(scaled, drives, [present.get(k) for k in range(len(first))])
        zero = jnp.zeros(shape)
        return [zero if full[k] is None else jnp.broadcast_to(full[k], shape) for k in kept]

    def advance(y: magnus.State, row) -> magnus.State:
        real, imag, length_s = row
        part_s = length_s / (1 if isinstance(rule, Dense) else rule.parts)
        scaled = magnus.times(system, part_s)
        drives = [
            Drive(real[k] * part_s, None if imag is None else imag[k] * part_s) for k in range(len(system.couplings))
        ]
        if isinstance(rule, Dense):
            units = [tuple(row) for row in jnp.eye(len(kept))]
            matrix = jnp.stack([jnp.stack(slopes(scaled, drives, unit)) for unit in units], axis=1)
            whole = jax.scipy.linalg.expm(jnp.moveaxis(matrix, (0, 1), (-2, -1)), max_squarings=_SQUARINGS)
            ahead = (whole @ jnp.stack(y, axis=-1)[..., None])[..., 0]
            return tuple(jnp.moveaxis(ahead, -1, 0))
        part = lambda v: magnus.exponential(lambda w: slopes(scaled, drives, w), v, rule.degree)
        return part(y) if rule.parts == 1 else lax.fori_loop(0, rule.parts, lambda _, v: part(v), y)

    keep = np.arange(len(slices.length_s)) if saved else None
    rows = (slices.real_rad_s, slices.imag_rad_s, slices.length_s)
    path = magnus.walk(advance, jnp.stack(state), rows, keep)
    whole = jnp.zeros((len(path), len(first), *shape)).at[:, np.array(kept)].set(path)
    n = len(system.levels)
    populations = whole[:, :n] ** 2 + whole[:, n:] ** 2 if pure else whole[:, :n]
    return Path(whole, populations) if saved else Path(whole[0], populations[0])


def _remainder(a: float, degree: int) -> float:
    if a >= degree + 2:
        return math.inf
    return math.exp((degree + 1) * math.log(a) - math.lgamma(degree + 2)) / (1 - a / (degree + 2)) if a > 0 else 0.0

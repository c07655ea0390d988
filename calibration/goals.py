"""What a drive of a level graph shall achieve, and at what price: terms of the loss of `calibration.steering`.

Every goal is a formula of the samples and of the density matrix on its way. Who carries the density matrix is left to
`Play`, so that the optimizer's engine and an independent solve are judged by the same formula.
"""

import abc
from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from calibration.hardware import Hardware
from twin.batching import physical
from twin.master_equation import pack_density
from twin.waveform import Waveform


class Play(NamedTuple):
    """One performance of a waveform.

    Attributes:
        levels: names, in the order of the graph.
        hardware: limits of the samples.
        waveform: the samples.
        states: `states(start)` gives the density matrix of each start after every slice, as real components
            (`twin.master_equation`), shape (slices, components, starts); start: Hermitian matrices, shape
            (levels, levels, starts). `states(start, last=True)` gives only those at the end, without the first axis.
    """

    levels: tuple[str, ...]
    hardware: Hardware
    waveform: Waveform
    states: Callable[..., Float[Array, "..."]]


class AbstractGoal(eqx.Module):
    """A number that shall be small."""

    @abc.abstractmethod
    def value(self, play: Play) -> Float[Array, ""]:
        """The number of one performance."""


def _frozen(state) -> Any:
    """Level names stay names; kets and matrices become tuples: a start is part of the program."""
    if isinstance(state, str):
        return state
    array = np.asarray(state, complex)
    return tuple(array.tolist()) if array.ndim == 1 else tuple(map(tuple, array.tolist()))


class StateTransfer(AbstractGoal):
    """Infidelity `1 - <end| rho |end>` of a state carried to another, a probability.

    Args:
        start: level's name, ket, or density matrix.
        end: level's name or ket.
    """

    start: str | tuple = eqx.field(static=True, converter=_frozen)
    end: str | tuple = eqx.field(static=True, converter=_frozen)

    def __check_init__(self):
        if np.ndim(self.end) == 2:
            raise ValueError("`end` of a transfer must be a level's name or a ket, but is a matrix; give a pure state.")

    def value(self, play: Play) -> Float[Array, ""]:
        """The infidelity at the end."""
        rho = play.states(density(play.levels, self.start)[..., None], last=True)
        return 1 - jnp.sum(_dual(density(play.levels, self.end)) * rho[:, 0])


class MapTransfer(AbstractGoal):
    """Infidelity of the map of a subspace of d levels to a unitary V on it: the entanglement infidelity, a probability.

        1 - sum_k tr( V B_k V^+ E(B_k) ) / d^2

    over the d^2 orthonormal Hermitian matrices of the subspace: |a><a|, (|a><b| + |b><a|) / sqrt 2 and
    i (|a><b| - |b><a|) / sqrt 2. It is what a maximally entangled state of the subspace and a bystander loses. For a
    closed graph it is 1 - |tr(V^+ U)|^2 / d^2. Leakage and decay count as loss, a global phase does not.

    Args:
        unitary: V, shape (d, d), columns are images.
        levels: names of the d levels, in the order of the rows of V.
    """

    unitary: tuple = eqx.field(static=True, converter=_frozen)
    levels: tuple[str, ...] = eqx.field(static=True, converter=tuple)

    def __check_init__(self):
        v, d = np.asarray(self.unitary), len(self.levels)
        if v.shape != (d, d) or not np.allclose(v.conj().T @ v, np.eye(d), atol=1e-9):
            raise ValueError(
                f"`unitary` must be a unitary matrix of shape {(d, d)}, one row for each of {self.levels}, but has "
                f"shape {v.shape} or columns that are not orthonormal."
            )

    def value(self, play: Play) -> Float[Array, ""]:
        """The infidelity at the end."""
        d, places = len(self.levels), [_index(play.levels, name) for name in self.levels]
        v, inside = np.asarray(self.unitary), np.zeros((d, len(play.levels)))
        inside[np.arange(d), places] = 1
        basis = _hermitian_basis(d)
        spread = lambda b: inside.T @ b @ inside
        ends = play.states(np.stack([spread(b) for b in basis], axis=-1), last=True)
        duals = np.stack([_dual(spread(v @ b @ v.conj().T)) for b in basis], axis=-1)
        return 1 - jnp.sum(duals * ends) / d**2


class Leakage(AbstractGoal):
    """Mean over the ends of all slices of the population in some levels, a probability.

    Args:
        levels: names of levels to be avoided.
        start: level's name, ket, or density matrix from which the population comes.
    """

    levels: tuple[str, ...] = eqx.field(static=True, converter=tuple)
    start: str | tuple = eqx.field(static=True, converter=_frozen)

    def value(self, play: Play) -> Float[Array, ""]:
        """The mean population."""
        path = play.states(density(play.levels, self.start)[..., None])
        avoided = np.array([_index(play.levels, name) for name in self.levels])
        return jnp.mean(jnp.sum(path[:, avoided, 0], axis=1))


class Energy(AbstractGoal):
    """Integral of |Omega|^2 over time, summed over the channels, rad^2/s."""

    def value(self, play: Play) -> Float[Array, ""]:
        """The integral over the samples of the generator."""
        w = play.waveform
        return jnp.sum(w.real_rad_s**2 + w.imag_rad_s**2) * w.sample_s


class Roughness(AbstractGoal):
    """Mean square of the second differences of the samples in units of full scale, zero before and after; no unit."""

    def value(self, play: Play) -> Float[Array, ""]:
        """The mean over samples and channels."""
        full, w = np.asarray(play.hardware.largest_rad_s), play.waveform
        bend = lambda part: jnp.diff(jnp.pad(part / full, ((1, 1), (0, 0))), 2, axis=0)
        return jnp.mean(bend(w.real_rad_s) ** 2 + bend(w.imag_rad_s) ** 2)


class Weighted(eqx.Module):
    """A goal and its weight in the sum, in one over the goal's unit; a new weight does not recompile."""

    goal: AbstractGoal
    weight: Float[Array, ""] = physical(default=1.0)


def density(levels: tuple[str, ...], state: str | tuple) -> Complex[np.ndarray, "levels levels"]:
    """The density matrix of a level's name, a ket or a matrix.

    Raises:
        ValueError: a name or a shape that the graph does not have, or a ket without unit norm.
    """
    n = len(levels)
    array = np.eye(n, dtype=complex)[_index(levels, state)] if isinstance(state, str) else np.asarray(state, complex)
    rho = np.outer(array, array.conj()) if array.ndim == 1 else array
    if rho.shape != (n, n) or abs(np.trace(rho) - 1) > 1e-9:
        raise ValueError(
            f"a state must be one of the levels {levels}, a ket ({n},) or a density matrix ({n}, {n}), but has shape "
            f"{array.shape} and trace {np.trace(rho).real:g}; normalize it to one."
        )
    return rho


def _index(levels: tuple[str, ...], name: str) -> int:
    if name not in levels:
        raise ValueError(f"level `{name}` is not in the graph {levels}; name one of these.")
    return levels.index(name)


def _dual(matrix: Complex[np.ndarray, "levels levels"]) -> Float[np.ndarray, " components"]:
    """Weights w with tr(A rho) = w . components of rho, for Hermitian A: every coherence stands for two."""
    packed = pack_density(matrix)
    return np.concatenate([packed[: len(matrix)], 2 * packed[len(matrix) :]])


def _hermitian_basis(d: int) -> list[Complex[np.ndarray, "d d"]]:
    """The d^2 orthonormal Hermitian matrices."""
    unit = np.eye(d * d, dtype=complex).reshape(d, d, d, d)
    basis = [unit[a, a] for a in range(d)]
    for a, b in combinations(range(d), 2):
        basis += [(unit[a, b] + unit[b, a]) / np.sqrt(2), 1j * (unit[a, b] - unit[b, a]) / np.sqrt(2)]
    return basis

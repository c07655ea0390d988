"""Nodes of a network as power series in the squares of both areas.

The series of an `AreaTable` give all levels and the coherence. A network needs two linear functionals of the
populations only, signal and probability of its assignment: polynomials so few that a hundred ions take microseconds.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from twin import area_table
from twin.area_series import AreaSeries
from twin.loop import AbstractMemristor, Responder, Settings
from twin.memory import AbstractMemory
from twin.memristor import IonMemristor
from twin.trigonometry import transfer_area

# Orders up to which powers are as good as Chebyshev polynomials: coefficients fall faster than powers grow.
_ORDERS = 16


def _of_quantity(leading: int) -> Any:
    """A field whose first axes are no batch: see `twin.batching`."""
    return eqx.field(metadata={"leading": leading})


class Answer(NamedTuple):
    """Signal and probability of its assignment, each of the shape of the commands, and whether they are good."""

    signal: Float[Array, "..."]
    assigned: Float[Array, "..."]
    valid: Bool[Array, "..."]


class NodeSeries(eqx.Module):
    """Polynomials of nodes whose parameters have the batch shape (*S,), for commands of shape (*cycles, *S).

    Attributes:
        inverted: whether pulse 1 is commanded what it leaves behind (V scheme).
        good: whether each run was tabulated to its error, two of shape (*S,).
        reach_1, reach_2: argument of the series over the area of a command, 1/rad.
        alone: of signal and assignment after pulse 1 alone, two of shape (orders, *S).
        first: populations where the map of pulse 2 begins, shape (orders, levels, *S).
        second: of signal and assignment out of each level, two of shape (orders, levels, *S).
        residual: what overlap adds, two of shape (rest, rest, *S).
    """

    inverted: bool = eqx.field(static=True)
    good: tuple[Bool[Array, "..."], Bool[Array, "..."]]
    reach_1: Float[Array, "..."]
    reach_2: Float[Array, "..."]
    alone: tuple[Float[Array, "orders ..."], Float[Array, "orders ..."]] = _of_quantity(1)
    first: Float[Array, "orders levels ..."] = _of_quantity(2)
    second: tuple[Float[Array, "orders levels ..."], Float[Array, "orders levels ..."]] = _of_quantity(2)
    residual: tuple[Float[Array, "rest rest ..."], Float[Array, "rest rest ..."]] = _of_quantity(2)

    def _arguments(self, x_set, r_set=None) -> tuple[Array, ...]:
        u = self.reach_1 * transfer_area(1 - x_set if self.inverted else x_set)
        return (2 * u**2 - 1,) if r_set is None else (2 * u**2 - 1, 2 * (self.reach_2 * transfer_area(r_set)) ** 2 - 1)

    def after_first(self, x_set: Float[Array, "..."]) -> Answer:
        """Pulse 1 alone."""
        (t,) = self._arguments(x_set)
        signal, assigned = (_horner(series, t) for series in self.alone)
        return _answer(signal, assigned, self.good[0])

    def after_both(self, x_set: Float[Array, "..."], r_set: Float[Array, "..."]) -> Answer:
        """Both pulses."""
        t_1, t_2 = self._arguments(x_set, r_set)
        levels = range(self.first.shape[1])
        reached = [_horner(self.first[:, level], t_1) for level in levels]

        def functional(second: Array, residual: Array) -> Array:
            total = jnp.asarray(sum(_horner(second[:, level], t_2) * reached[level] for level in levels))
            return total + _horner([_horner(row, t_2) for row in residual], t_1) if len(residual) else total

        signal, assigned = (functional(*pair) for pair in zip(self.second, self.residual, strict=True))
        return _answer(signal, assigned, self.good[1])


class SolvedIon(AbstractMemristor):
    """An ion whose series are solved: its parameters do not change any more, and a network plays it at once.

    Args:
        memory, source: as for every memristor; these may still change.
        ion: as it was when its series were solved.
        series: what stands for it.
    """

    memory: AbstractMemory
    source: str = eqx.field(static=True)
    ion: IonMemristor
    series: NodeSeries

    @classmethod
    def of(cls, ion: IonMemristor, series: NodeSeries) -> "SolvedIon":
        """The ion with its series, and its memory and source."""
        return cls(ion.memory, ion.source, ion, series)

    @property
    def unwrapped(self) -> IonMemristor:
        """The ion."""
        return self.ion

    def prepared(self, x_set, settings: Settings) -> "SolvedIon":
        del x_set, settings
        return self

    def under(self, settings: Settings) -> Responder:
        return self.ion.under(settings)

    def signal(self, populations) -> Float[Array, "..."]:
        return self.ion.signal(populations)

    def assigned(self, populations) -> Float[Array, "..."]:
        return self.ion.assigned(populations)


def has_series(device: AbstractMemristor) -> bool:
    """Whether the device is an ion whose responses are series in the areas, not averaged cycle by cycle."""
    if not isinstance(device, IonMemristor) or not isinstance(device.method, AreaSeries):
        return False
    return device.slow_noise is None and (device.motion is not None or not device.moves)


def node_series(device: AbstractMemristor, settings: Settings) -> NodeSeries | None:
    """The polynomials of a prepared device.

    Returns:
        None for a device that answers in another way: not an ion with series in the areas, averaged over phonon numbers
        cycle by cycle or over noise from shot to shot, or with areas so large that powers lose digits.
    """
    if not has_series(device) or settings.of_cycle is not None:
        return None
    assert isinstance(device, IonMemristor) and isinstance(device.method, AreaSeries)
    folded = device.motion is not None
    largest = device.largest_areas
    table = device.tabulated(settings, largest)
    if folded:
        table = area_table.averaged(table, *device.carrier_factors(table.theta_1.ndim, jnp.maximum(*largest)))
    if max(len(table.first), len(table.alone), len(table.residual)) > _ORDERS:
        return None
    seen = largest if folded else device.at_rest(*largest)
    levels = table.alone.shape[1]
    unit = jnp.eye(levels).reshape((levels, levels) + (1,) * table.theta_1.ndim)
    # Both are linear in the populations, which sum to one: their values on pure levels tell all.
    weights = [jnp.broadcast_to(f(unit), (levels, *table.theta_1.shape)) for f in (device.signal, device.assigned)]
    contracted = lambda a, axis: tuple(jnp.sum(_at(w, a.ndim, axis) * a, axis=axis) for w in weights)
    requested = device.method.grid.error
    return NodeSeries(
        reach_1=seen[0] / (np.pi * table.theta_1),
        reach_2=seen[1] / (np.pi * table.theta_2),
        alone=contracted(_powers(table.alone), 1),
        first=_powers(table.first),
        second=contracted(_powers(table.second), 1),
        residual=contracted(_powers(_powers(table.residual), axis=1), 2),
        inverted=device.start != "v",
        good=(table.valid & (table.error_alone <= requested), table.valid & (table.error_both <= requested)),
    )


def _at(weight: Array, ndim: int, axis: int) -> Array:
    """Weights (levels, *S) against an array whose axis `axis` is that of the levels and whose last axes are S."""
    batch = weight.ndim - 1
    return weight.reshape((1,) * axis + weight.shape[:1] + (1,) * (ndim - axis - 1 - batch) + weight.shape[1:])


def _powers(coefficients: Array, axis: int = 0) -> Array:
    """Coefficients of powers of t from those of T_j(t); T_2j(u) = T_j(2 u^2 - 1)."""
    orders = coefficients.shape[axis]
    matrix = np.zeros((orders, orders))
    for j in range(orders):
        matrix[: j + 1, j] = np.polynomial.chebyshev.cheb2poly([0] * j + [1])
    return jnp.moveaxis(jnp.tensordot(jnp.asarray(matrix), coefficients, (1, axis)), 0, axis)


def _horner(coefficients: Any, t: Array) -> Array:
    total = coefficients[-1] + jnp.zeros_like(t)
    for c in reversed(coefficients[:-1]):
        total = total * t + c
    return total


def _answer(signal: Array, assigned: Array, good: Array) -> Answer:
    valid = good & jnp.isfinite(signal)
    return Answer(jnp.where(valid, signal, jnp.nan), jnp.where(valid, assigned, jnp.nan), valid)

"""What a network asks of an ion in every cycle, read off its area series with as few operations as possible.

A step of a network is short: what costs is the number of operations, not their size. Only two numbers a run are wanted,
the population of s and the probability that s is assigned. Both are affine in the populations, so they are taken of the
coefficients beforehand, and Clenshaw's recurrence sums each series without writing its basis down.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from twin.area_series import AreaSeries
from twin.area_table import AreaTable
from twin.batching import physical
from twin.loop import AbstractMemristor, Responder, Settings
from twin.memory import AbstractMemory
from twin.memristor import IonMemristor


class AreaReader(eqx.Module):
    """Series of population of s and of its assignment, for one ion or one of each lane (*S, at least one axis).

    Attributes:
        valid_alone, valid_both: whether the series reach the requested error.
        scale_1, scale_2: from areas of the ion at rest to the range of the series.
        alone: after pulse 1 alone, shape (orders, 2, *S).
        first: populations before pulse 2, shape (orders, levels, *S).
        second: by pulse 2, shape (orders, 2, levels, *S).
        residual: what overlap adds, shape (orders of pulse 1, orders of pulse 2, 2, *S).
        offset: constants, shape (2, *S).
    """

    valid_alone: Bool[Array, "..."] = eqx.field(metadata={"leading": None})
    valid_both: Bool[Array, "..."] = eqx.field(metadata={"leading": None})
    scale_1: Float[Array, "..."] = physical(None)
    scale_2: Float[Array, "..."] = physical(None)
    alone: Float[Array, "orders 2 ..."] = physical(None)
    first: Float[Array, "orders levels ..."] = physical(None)
    second: Float[Array, "orders 2 levels ..."] = physical(None)
    residual: Float[Array, "rest rest 2 ..."] = physical(None)
    offset: Float[Array, "2 ..."] = physical(None)

    def x(self, theta_1: Float[Array, "..."]) -> tuple[Array, Array, Array]:
        """Population and assignment after pulse 1 alone, and where they are valid."""
        return self._judged(_summed(self.alone, theta_1 * self.scale_1, 1), self.valid_alone)

    def y(self, theta_1: Float[Array, "..."], theta_2: Float[Array, "..."]) -> tuple[Array, Array, Array]:
        """The same after both pulses."""
        u, w = theta_1 * self.scale_1, theta_2 * self.scale_2
        both = jnp.sum(_summed(self.second, w, 2) * _summed(self.first, u, 1), axis=1)
        if len(self.residual):
            inner = _summed(jnp.swapaxes(self.residual, 0, 1), w, 2)
            both = both + _summed(inner, u, 1, spread=True)
        return self._judged(both, self.valid_both)

    def _judged(self, values: Array, good: Array) -> tuple[Array, Array, Array]:
        offset = self.offset.reshape((2,) + (1,) * (values.ndim - self.offset.ndim) + self.offset.shape[1:])
        population, assigned = values + offset
        return population, assigned, good & jnp.isfinite(population)


def _summed(coefficients: Array, u: Array, lead: int, spread: bool = False) -> Array:
    """sum_k c_k T_2k(u); coefficients (orders, `lead` axes, *S), and with `spread` also the cycles of u before S."""
    n = len(coefficients)
    batch = coefficients.ndim - 1 - lead
    more = 0 if spread else u.ndim - batch
    shape = coefficients.shape
    c = coefficients.reshape(*shape[: 1 + lead], *(1,) * more, *shape[1 + lead :])
    z = 2 * u**2 - 1
    if n == 1:
        return c[0] + 0 * z
    after, last = jnp.zeros_like(c[0]), c[n - 1] + 0 * z
    for k in range(n - 2, 0, -1):
        after, last = last, c[k] + 2 * z * last - after
    return c[0] + z * last - after


class Tabulated(AbstractMemristor):
    """An ion whose series are solved: its parameters do not change any more, and a network plays it at once.

    Args:
        memory, source: as for every memristor; these may still change.
        ion: as it was when `tabulated` solved it.
        reader: its series.
    """

    memory: AbstractMemory
    source: str = eqx.field(static=True)
    ion: IonMemristor
    reader: AreaReader

    @classmethod
    def of(cls, ion: IonMemristor, reader: AreaReader) -> "Tabulated":
        """The ion with its series, and its memory and source."""
        return cls(ion.memory, ion.source, ion, reader)

    def prepared(self, x_set, settings: Settings) -> "Tabulated":
        del x_set, settings
        return self

    def under(self, settings: Settings) -> Responder:
        return self.ion.under(settings)

    def signal(self, populations) -> Float[Array, "..."]:
        return self.ion.signal(populations)

    def assigned(self, populations) -> Float[Array, "..."]:
        return self.ion.assigned(populations)


def readable(device: AbstractMemristor) -> bool:
    """Whether an `AreaReader` can stand for this device."""
    return (
        isinstance(device, IonMemristor)
        and isinstance(device.method, AreaSeries)
        and device.method.nodes is not None
        and device.slow_noise is None
        and not device.moves
    )


def tabulated(ion: IonMemristor) -> AreaReader:
    """Solves the nodes of an ion's series without laser offsets, and takes from them what a network asks for."""
    assert isinstance(ion.method, AreaSeries)
    largest = ion.largest_areas
    table: AreaTable = ion.tabulated(Settings(), largest)
    levels = table.first.shape[1]
    lanes = table.theta_1.ndim
    if lanes == 0:  # one lane for all nodes
        table = AreaTable(**{name: getattr(table, name)[..., None] for name in table.__dataclass_fields__})
        lanes = 1
    batch = table.theta_1.shape
    # Signal and assignment of each level, one more level standing for none.
    pure = jnp.concatenate([jnp.eye(levels), jnp.zeros((levels, 1))], axis=1)
    each = [ion.signal, ion.assigned]
    affine = jnp.stack([
        jnp.stack([jnp.broadcast_to(f(_spread(pure[:, k], lanes, levels, batch)), batch) for k in range(levels + 1)])
        for f in each
    ])  # fmt: skip
    offset, weights = affine[:, -1], affine[:, :-1] - affine[:, -1:]
    at_rest = ion.at_rest(jnp.ones(batch), jnp.ones(batch))
    take = lambda series: jnp.einsum("rl...,kl...->kr...", weights, series)
    requested = ion.method.grid.error
    return AreaReader(
        scale_1=at_rest[0] / table.theta_1,
        scale_2=at_rest[1] / table.theta_2,
        alone=take(table.alone),
        first=table.first,
        second=jnp.einsum("rt...,ktf...->krf...", weights, table.second),
        residual=jnp.einsum("rl...,jkl...->jkr...", weights, table.residual),
        offset=offset,
        valid_alone=table.valid & (table.error_alone <= requested),
        valid_both=table.valid & (table.error_both <= requested),
    )


def _spread(column: Array, lanes: int, levels: int, batch: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(column.reshape((levels,) + (1,) * lanes), (levels, *batch))

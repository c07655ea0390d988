"""Chebyshev series in two pulse areas: coefficients from values at nodes, and the table that reads cycles off them.

Series are even or odd in the area, on [-theta_max, theta_max] with u = theta / theta_max. Nodes are the positive
extrema of T_2n; zero, the next one, is known without a solve.
"""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from twin.loop import Response


class AreaTable(eqx.Module):
    """Series of one device at its settings; S are the batch axes of parameters and settings.

    Attributes:
        theta_1, theta_2: largest areas, rad, shape (*S).
        alone, alone_coherence: after pulse 1 alone at its read-out, shape (orders, levels or 2, *S).
        first, first_coherence: after pulse 1, carried freely to where the solve of pulse 2 begins.
        second: map of populations by pulse 2 up to read-out, shape (orders, to, from, *S).
        second_coherence: complex factor of rho_vs, shape (orders, 2, *S).
        residual, residual_coherence: what overlap adds, shape (orders, orders, levels or 2, *S).
        valid: whether every node was solved to its error; the factor of rho_vs has solves of its own, NaN if they fail.
        error_alone, error_both: population error expected.
    """

    theta_1: Float[Array, "..."]
    theta_2: Float[Array, "..."]
    alone: Float[Array, "orders levels ..."]
    alone_coherence: Float[Array, "odd 2 ..."]
    first: Float[Array, "orders levels ..."]
    first_coherence: Float[Array, "odd 2 ..."]
    second: Float[Array, "orders_2 levels levels ..."]
    second_coherence: Float[Array, "orders_2 2 ..."]
    residual: Float[Array, "rest rest levels ..."]
    residual_coherence: Float[Array, "odd_rest rest 2 ..."]
    valid: Bool[Array, "..."]
    error_alone: Float[Array, "..."]
    error_both: Float[Array, "..."]

    def after_first(
        self, theta_1: Float[Array, "..."], setting: Int[Array, " cycles"] | None = None
    ) -> tuple[Float[Array, "levels ..."], Float[Array, "2 ..."]]:
        """Populations and rho_vs after pulse 1 alone.

        Args:
            theta_1: areas, shape (*cycles, *S); with `setting`, shape (*before, cycles, *S without its first axis).
            setting: the place of each cycle on the first axis of S.
        """
        place = _Place(self.theta_1.ndim, setting)
        u = place.spread(theta_1) / self.theta_1
        populations = place.sum(self.alone, even_basis(u, len(self.alone)))
        return place.pick(populations), place.pick(place.sum(self.alone_coherence, _odd(u, len(self.alone_coherence))))

    def after_both(
        self, theta_1: Float[Array, "..."], theta_2: Float[Array, "..."], setting: Int[Array, " cycles"] | None = None
    ) -> tuple[Float[Array, "levels ..."], Float[Array, "2 ..."]]:
        """Populations and rho_vs after both pulses; arguments as for `after_first`."""
        place = _Place(self.theta_1.ndim, setting)
        u, w = place.spread(theta_1) / self.theta_1, place.spread(theta_2) / self.theta_2
        even, odd = even_basis(u, len(self.first)), _odd(u, len(self.first_coherence))
        even_2 = even_basis(w, len(self.second))
        populations = jnp.sum(place.sum(self.second, even_2) * place.sum(self.first, even), axis=1)
        coherence = times(place.sum(self.second_coherence, even_2), place.sum(self.first_coherence, odd))
        if len(self.residual):
            n, m = len(self.residual_coherence), self.residual.shape[1]
            even, odd, even_2 = even_basis(u, m), _odd(u, n), even_basis(w, m)
            by_first = [place.sum(r, even_2, axis=1) for r in (self.residual, self.residual_coherence)]
            populations = populations + jnp.sum(by_first[0] * even[:, None], axis=0)
            coherence = coherence + jnp.sum(by_first[1] * odd[:, None], axis=0)
        return place.pick(populations), place.pick(coherence)

    def respond(self, theta_1, theta_2, of_cycle, alone, requested: Float[Array, ""]) -> Response:
        """Cycles read off the series; those that miss the requested error are flagged and NaN."""
        at = lambda values: values if of_cycle is None else values[of_cycle]
        read = []
        if alone is not False:
            read.append((*self.after_first(theta_1, of_cycle), at(self.error_alone)))
        if alone is not True:
            read.append((*self.after_both(theta_1, theta_2, of_cycle), at(self.error_both)))
        if len(read) == 2:
            read = [tuple(jnp.where(alone, a, b) for a, b in zip(*read, strict=True))]
        populations, coherence, error = read[0]
        cycles = populations.shape[1:]
        good = at(self.valid) & (error <= requested)
        valid = jnp.broadcast_to(good, cycles) & jnp.all(jnp.isfinite(populations), axis=0)
        populations, coherence = (jnp.where(valid, values, jnp.nan) for values in (populations, coherence))
        return Response(populations, coherence, valid, jnp.broadcast_to(error, cycles), "area series")


def averaged(
    table: AreaTable,
    factor_1: Float[Array, "draws ..."],
    factor_2: Float[Array, "draws ..."],
    weights: Float[Array, "draws ..."],
) -> AreaTable:
    """The table of mean responses of a device whose areas are multiplied by random factors, none above one.

    A mean of series in `theta factor` is a series in theta with the same number of orders, found from its values at the
    nodes. It does not factor any more, and stands in the residual whole.

    Args:
        table: of the device at rest.
        factor_1, factor_2, weights: of each draw, shape (draws, *S); NaN weights make the table invalid.
    """
    size = max(len(table.first), len(table.residual))
    nodes = np.append(points(size - 1), 0.0)
    at = lambda factor: jnp.asarray(nodes).reshape((-1,) + (1,) * factor.ndim) * factor
    own = table.theta_1.shape
    shape = jnp.broadcast_shapes(factor_1.shape[1:], factor_2.shape[1:], weights.shape[1:], own)

    def spread(a: Array, batch: tuple[int, ...]) -> Array:
        """Leading axes before the whole batch."""
        lead = a.shape[: a.ndim - len(batch)]
        return jnp.broadcast_to(a.reshape(lead + (1,) * (len(shape) - len(batch)) + batch), lead + shape)

    table = jax.tree.map(lambda a: spread(a, own), table)
    factor_1, factor_2, weights = (spread(f, f.shape[1:]) for f in (factor_1, factor_2, weights))
    # Basis functions of each draw at the nodes, shape (orders, nodes, draws, *S).
    even, odd = even_basis(at(factor_1), size), _odd(at(factor_1), size)
    even_2 = even_basis(at(factor_2), size)
    grown = lambda a, k, axes: jnp.pad(a, [(0, k - a.shape[i]) if i < axes else (0, 0) for i in range(a.ndim)])
    full = jnp.einsum("ktv...,jv...->jkt...", grown(table.second, size, 1), grown(table.first, size, 1))
    first, second = (grown(c, size, 1) for c in (table.first_coherence, table.second_coherence))
    product = lambda a, b: jnp.einsum("j...,k...->jk...", first[:, a], second[:, b])
    turned = jnp.stack([product(0, 0) - product(1, 1), product(0, 1) + product(1, 0)], axis=2)
    if len(table.residual):
        full = full + grown(table.residual, size, 2)
        turned = turned + grown(table.residual_coherence, size, 2)

    def both(coefficients: Array, basis: Array) -> Array:
        """Mean values at the nodes (of area 1, of area 2)."""
        by_second = jnp.einsum("jkl...,kbd...->jlbd...", coefficients, even_2)
        return jnp.einsum("jlbd...,jad...,d...->abl...", by_second, basis, weights)

    def one(coefficients: Array, basis: Array) -> Array:
        return jnp.einsum("jl...,jad...,d...->al...", coefficients, basis[: len(coefficients)], weights)

    series = lambda values: even_series(values[:-1], values[-1])
    by_second = lambda values: jnp.swapaxes(series(jnp.swapaxes(values, 0, 1)), 0, 1)
    alone, alone_coherence = one(table.alone, even), one(table.alone_coherence, odd)
    residual, residual_coherence = both(full, even), both(turned, odd)
    complete = jnp.isfinite(jnp.sum(weights, axis=0))
    return dataclasses.replace(
        table,
        alone=series(alone),
        alone_coherence=odd_series(alone_coherence[:-1]),
        first=jnp.zeros_like(table.first),
        first_coherence=jnp.zeros_like(table.first_coherence),
        second=jnp.zeros_like(table.second),
        second_coherence=jnp.zeros_like(table.second_coherence),
        residual=series(by_second(residual)),
        residual_coherence=odd_series(by_second(residual_coherence)[:-1]),
        valid=table.valid & complete,
    )


class _Place(NamedTuple):
    """Where the axes lie: `axes` of S, the settings first among them.

    Cycles are evaluated in every setting, and then their own is picked: settings are few, and gathering coefficients
    would copy the series for every cycle.
    """

    axes: int
    setting: Int[Array, " cycles"] | None

    def spread(self, theta: Array) -> Array:
        return theta if self.setting is None else jnp.expand_dims(theta, theta.ndim - self.axes + 1)

    def pick(self, values: Array) -> Array:
        if self.setting is None:
            return values
        axis = values.ndim - self.axes
        index = self.setting.reshape((1,) * (axis - 1) + (-1,) + (1,) * self.axes)
        return jnp.take_along_axis(values, index, axis=axis).squeeze(axis)

    def sum(self, coefficients: Array, basis: Array, axis: int = 0) -> Array:
        """Contracts axis `axis` of (..., *S) with the first of (k, *cycles, *S); cycles come out just before S."""
        lead = coefficients.ndim - self.axes
        cycles = basis.ndim - 1 - self.axes
        shape = coefficients.shape[:lead] + (1,) * cycles + coefficients.shape[lead:]
        order = (*range(1, axis + 1), 0, *range(axis + 1, lead))
        aligned = jnp.expand_dims(basis, tuple(range(1, lead))).transpose(
            (*order, *range(lead, lead + cycles + self.axes))
        )
        return jnp.sum(coefficients.reshape(shape) * aligned, axis=axis)


def even_basis(u: Array, n: int) -> Array:
    """T_0, T_2, ... T_{2n-2} at u, on a new first axis."""
    w = 2 * u**2 - 1
    rows = [jnp.ones_like(w), w]
    while len(rows) < n:
        rows.append(2 * w * rows[-1] - rows[-2])
    return jnp.stack(rows[:n])


def _odd(u: Array, n: int) -> Array:
    """T_1, T_3, ... T_{2n-1} at u, on a new first axis."""
    w = 2 * u**2 - 1
    rows = [u, u * (2 * w - 1)]
    while len(rows) < n:
        rows.append(2 * w * rows[-1] - rows[-2])
    return jnp.stack(rows[:n])


def points(n: int) -> np.ndarray:
    """u of the nodes: the n positive extrema of T_2n, 1 first; the next one is zero."""
    return np.cos(np.arange(n) * np.pi / (2 * max(n, 1)))


def even_series(values: Float[Array, "nodes ..."], at_zero: Float[Array, "..."]) -> Float[Array, "orders ..."]:
    """Coefficients of T_0, T_2, ... T_2n from the values at `points(n)` and at zero."""
    u = np.append(points(len(values)), 0.0)
    matrix = np.linalg.inv(np.cos(np.arccos(u)[:, None] * 2 * np.arange(len(u))))
    return jnp.tensordot(jnp.asarray(matrix), jnp.concatenate([values, at_zero[None]]), 1)


def odd_series(values: Float[Array, "nodes ..."]) -> Float[Array, "orders ..."]:
    """Coefficients of T_1, T_3, ... T_{2n-1} from the values at `points(n)`; at zero there is nothing."""
    u = points(len(values))
    matrix = np.linalg.inv(np.cos(np.arccos(u)[:, None] * (2 * np.arange(len(u)) + 1)))
    return jnp.tensordot(jnp.asarray(matrix), values, 1)


def times(a: Array, b: Array) -> Array:
    """Product of complex numbers given as (real, imaginary) on the first axis."""
    return jnp.stack([a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]])


def judged(table: AreaTable, phases: tuple[Float[Array, "..."], Float[Array, "..."]] | None = None) -> AreaTable:
    """The table with the truncation of its series added to its errors, extrapolated from the last coefficients.

    `phases`: what light shifts turn at the largest areas, rad; None without.
    """

    def left_out(series: Array, pulse: int) -> Array:
        theta, n = (table.theta_1, table.theta_2)[pulse], len(series) - 1
        sizes = [jnp.max(jnp.abs(a).reshape((-1, *theta.shape)), axis=0) for a in (series[-1], series[-2])]
        if phases is None:
            # Ratio of successive even Bessel functions, doubled for what is folded back.
            return 2 * (theta / 2) ** 2 / ((2 * n + 2) * (2 * n + 1)) * sizes[0]
        # Saddle point of exp(theta rho / 2 + phase rho^2 / 4) / rho^j; j = 2 theta / rho without phase, as above.
        step = (theta / 2 + jnp.sqrt((theta / 2) ** 2 + 2 * phases[pulse] * (2 * n + 2))) / 2
        ratio = step**2 / ((2 * n + 2) * (2 * n + 1))
        # Coefficients of a complex phase come and go: of the last two, the one that promises less.
        last = jnp.maximum(sizes[0], ratio * sizes[1])
        return jnp.where(ratio < 1, 2 * ratio / (1 - jnp.minimum(ratio, 0.99)) * last, jnp.inf)

    alone = table.error_alone + left_out(table.alone, 0)
    both = table.error_both + left_out(table.first, 0) + left_out(table.second, 1)
    if len(table.residual) > 1:
        both = both + left_out(jnp.sum(jnp.abs(table.residual), axis=1), 0)
        both = both + left_out(jnp.sum(jnp.abs(table.residual), axis=0), 1)
    return dataclasses.replace(table, error_alone=alone, error_both=both)

"""Area series as polynomials in the parameters: a device solved beforehand for a whole box of them.

What calibration asks of a device, at one point after another, is the table of `twin.area_series`. Its coefficients are
smooth functions of the few parameters that enter the equations of motion (detunings, linewidths, widths, times);
all others (Rabi scales, phonons, readout errors) act outside the table. So the table is solved at some hundred points
of the box, and a Chebyshev polynomial stands for it from there on: no solver is left in what is evaluated, or
differentiated. The error is measured against tables solved at other points, the corners of the box among them.
"""

import dataclasses
import itertools
import math
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.stats import qmc

from twin.area_series import AreaSeries
from twin.area_table import even_basis
from twin.loop import Response

# Parameters that the equations of motion contain; all others act outside the tables.
DYNAMICAL = (
    *("detuning_1_hz", "detuning_2_hz", "laser_linewidth_hz", "laser_linewidth_1_hz", "laser_linewidth_2_hz"),
    *("sigma_1_s", "sigma_2_s", "separation_s", "lead_s", "tail_s", "lifetime_s", "branching", "m_lifetime_s"),
    *("stark_1_hz", "stark_2_hz"),
)
# Fields of a table that populations need, with the number of their axes before the settings.
_FIELDS = {"alone": 2, "first": 2, "second": 3, "residual": 3}
# Points solved by one call of one compiled program, and degrees at which an axis is probed.
_BLOCK, _LARGEST_DEGREE = 32, 20
_LARGEST_TERMS = 4000
# Areas, as shares of the largest, at which populations are compared.
_SHARES = (0.35, 0.7, 1.0)
_ATTEMPTS, _JUDGES = 4, 24
# Points a term, and the share of the error at which coefficients are left out.
_OVERSAMPLING, _PROBE_SHARE = 1.5, 0.5
# Arrays none of whose axes is one of devices.
_NO_LANES = {"leading": None}


class EmulationError(ValueError):
    """No polynomial of allowed size serves the box; the message says how far it came."""


class EmulatedSeries(eqx.Module):
    """A method: populations by area series whose coefficients are polynomials of the device's parameters.

    Made by `emulated` for one list of laser offsets; a device whose parameters leave the box answers NaN, flagged.
    Coherences are not emulated: they are NaN.

    Attributes:
        names: the parameters that vary in the tables.
        low, high: their box, shape (names,).
        degrees: degree in each parameter of each term, shape (terms, names).
        coefficients: of each field of a table that populations need, shape (terms, *field, settings).
        theta_1, theta_2: largest areas, rad.
        offsets: laser offsets the tables are made for, Hz, shape (2, settings).
        error: requested of solves, series and polynomial together.
        error_of_tables: largest error of the solved tables.
        deviation: largest population error of the polynomial, measured at points it was not made from.
        points: tables that were solved.
    """

    names: tuple[str, ...] = eqx.field(static=True)
    low: Float[Array, " names"] = eqx.field(metadata=_NO_LANES)
    high: Float[Array, " names"] = eqx.field(metadata=_NO_LANES)
    degrees: Int[Array, "terms names"] = eqx.field(metadata=_NO_LANES)
    coefficients: dict[str, Float[Array, "..."]] = eqx.field(metadata=_NO_LANES)
    theta_1: Float[Array, ""]
    theta_2: Float[Array, ""]
    offsets: Float[Array, "2 settings"] = eqx.field(metadata=_NO_LANES)
    error: float = eqx.field(static=True)
    error_of_tables: Float[Array, ""]
    deviation: Float[Array, ""]
    points: int = eqx.field(static=True)
    largest_degree: int = eqx.field(static=True)

    def table(self, device, settings) -> "EmulatedTable":
        """The table of a device of scalar parameters, under the offsets that this emulator was made for."""
        if settings.detuning_1_hz.shape != self.offsets.shape[1:]:
            raise ValueError(
                f"this device is emulated for laser offsets of shape {self.offsets.shape[1:]}, but is asked for "
                f"{settings.detuning_1_hz.shape}; emulate it again for these settings."
            )
        # Offsets others than those emulated are not refused while tracing: their cycles come out invalid.
        inside = jnp.all(jnp.stack([settings.detuning_1_hz, settings.detuning_2_hz]) == self.offsets, axis=0)
        basis = jnp.ones(len(self.degrees))
        for k, name in enumerate(self.names):
            value = getattr(device, name)
            u = (2 * (0.0 if value is None else value) - self.low[k] - self.high[k]) / (self.high[k] - self.low[k])
            inside = inside & (jnp.abs(u) <= 1 + 1e-9)
            basis = basis * _chebyshev(u, self.largest_degree)[self.degrees[:, k]]
        fields = {name: jnp.tensordot(basis, c, 1) for name, c in self.coefficients.items()}
        return EmulatedTable(
            theta_1=self.theta_1,
            theta_2=self.theta_2,
            valid=inside,
            error=self.error_of_tables + self.deviation,
            **fields,
        )


class EmulatedTable(eqx.Module):
    """Series in the areas at one point of the box, as `twin.area_table.AreaTable` has them; settings last.

    Cycles are matrix products: all settings are read for every cycle, and then each picks its own.
    """

    theta_1: Float[Array, ""]
    theta_2: Float[Array, ""]
    valid: Bool[Array, " settings"]
    error: Float[Array, ""]
    alone: Float[Array, "orders levels settings"]
    first: Float[Array, "orders levels settings"]
    second: Float[Array, "orders_2 levels levels settings"]
    residual: Float[Array, "rest rest levels settings"]

    def respond(
        self,
        theta_1: Float[Array, "*before cycles"],
        theta_2: Float[Array, "*before cycles"],
        setting: Int[Array, " cycles"] | None,
        alone: bool | Bool[Array, "..."],
    ) -> Response:
        """Cycles of these areas; invalid ones are NaN, and so are all coherences, which are not emulated.

        Without `setting`, each cycle has offsets of its own, in their order.
        """
        setting = jnp.arange(len(self.valid)) if setting is None else setting
        if alone is True:
            populations = self.after_first(theta_1, setting)
        elif alone is False:
            populations = self.after_both(theta_1, theta_2, setting)
        else:
            both = self.after_both(theta_1, theta_2, setting)
            populations = jnp.where(alone, self.after_first(theta_1, setting), both)
        cycles = populations.shape[1:]
        inside = (jnp.abs(theta_1) <= self.theta_1 * (1 + 1e-9)) & (
            alone | (jnp.abs(theta_2) <= self.theta_2 * (1 + 1e-9))
        )
        valid = jnp.broadcast_to(self.valid[setting] & inside, cycles)
        populations = jnp.where(valid, populations, jnp.nan)
        error = jnp.broadcast_to(self.error, cycles)
        return Response(populations, jnp.full((2, *cycles), jnp.nan), valid, error, "emulated series")

    def after_first(self, theta_1: Float[Array, "*before cycles"], setting: Int[Array, " cycles"]) -> Array:
        """Populations after pulse 1 alone, shape (levels, *before, cycles)."""
        even = even_basis(theta_1 / self.theta_1, len(self.alone))
        return self._picked(jnp.tensordot(self.alone, even, [[0], [0]]), setting)

    def after_both(
        self,
        theta_1: Float[Array, "*before cycles"],
        theta_2: Float[Array, "*before cycles"],
        setting: Int[Array, " cycles"],
    ) -> Array:
        """Populations after both pulses, shape (levels, *before, cycles)."""
        u, w = theta_1 / self.theta_1, theta_2 / self.theta_2
        first = jnp.tensordot(self.first, even_basis(u, len(self.first)), [[0], [0]])
        second = jnp.tensordot(self.second, even_basis(w, len(self.second)), [[0], [0]])
        both = jnp.sum(second * first, axis=1)
        if rest := len(self.residual):
            by_second = jnp.tensordot(self.residual, even_basis(w, rest), [[1], [0]])
            even = even_basis(u, rest)
            both = both + jnp.sum(by_second * even[:, None, None], axis=0)
        return self._picked(both, setting)

    def _picked(self, values: Float[Array, "levels settings *before cycles"], setting) -> Array:
        own = jnp.arange(values.shape[1])[:, None] == setting
        own = own.reshape(own.shape[:1] + (1,) * (values.ndim - 3) + own.shape[1:])
        return jnp.sum(jnp.where(own, values, 0.0), axis=1)


def emulated(ion, series: AreaSeries, boxes: Mapping[str, tuple[float, float]], settings, *, error: float):
    """The ion with its dynamics solved beforehand for a box of parameters.

    Args:
        ion: an `IonMemristor` of known scalar values; its method does not matter.
        series: how tables are solved, planned for the box to a part of the error (`twin.planning.emulated`).
        boxes: (low, high) of each parameter that will vary, those outside the equations of motion among them.
        settings: the laser offsets, as `Settings` with `of_cycle`.
        error: of populations.

    Returns:
        The ion with an `EmulatedSeries`.

    Raises:
        EmulationError: the polynomial would need too many terms.
    """
    names = tuple(name for name in boxes if name in DYNAMICAL)
    low, high = (np.array([boxes[name][k] for name in names], float) for k in (0, 1))
    solve = _Tables(dataclasses.replace(ion, method=series), names, low, high, settings, _largest_areas(ion, boxes))
    degrees = _probed_degrees(solve, _PROBE_SHARE * error)
    # Corners, and points from the inside that no polynomial is made from, judge.
    judges = np.concatenate([_corners(len(names)), _spread(_JUDGES, len(names), seed=1)])
    judged = solve(judges)
    points, tables = np.zeros((0, len(names))), {}
    for _ in range(_ATTEMPTS):
        index = _terms(degrees)
        if len(index) > _LARGEST_TERMS:
            break
        # A longer sequence begins with the shorter one, so what was solved serves again.
        more = _spread(max(math.ceil(_OVERSAMPLING * len(index)), 8), len(names), seed=0)[len(points) :]
        if not len(more):
            break
        points, solved = np.concatenate([points, more]), solve(more)
        tables = {name: np.concatenate([tables[name], one]) if tables else one for name, one in solved.items()}
        coefficients = _fitted(points, tables, index)
        deviation = _deviation(_evaluated(coefficients, index, judges), judged)
        own = max(float(np.max(tables[name])) for name in ("error_alone", "error_both"))
        if deviation + own <= error:
            made = EmulatedSeries(
                names=names,
                low=jnp.asarray(low),
                high=jnp.asarray(high),
                degrees=jnp.asarray(index),
                coefficients={k: jnp.asarray(c) for k, c in coefficients.items()},
                theta_1=jnp.asarray(solve.largest[0]),
                theta_2=jnp.asarray(solve.largest[1]),
                offsets=jnp.stack([settings.detuning_1_hz, settings.detuning_2_hz]),
                error=error,
                error_of_tables=jnp.asarray(own),
                deviation=jnp.asarray(deviation),
                points=solve.count,
                largest_degree=int(index.max(initial=0)),
            )
            return dataclasses.replace(ion, method=made)
        degrees = [math.ceil(1.2 * d) + 1 for d in degrees]
    size = str(_LARGEST_TERMS if len(index) > _LARGEST_TERMS else len(index))
    raise EmulationError(
        f"more than {size} terms in {len(names)} parameters are needed for the error {error:g}; "
        "narrow the boxes or free fewer parameters."
    )


class _Tables:
    """Solves tables at points of the unit box [-1, 1]^k, block after block of one compiled program."""

    def __init__(self, ion, names, low, high, settings, largest):
        self.ion, self.names, self.low, self.high, self.settings, self.largest = (
            ion, names, low, high, settings, largest)  # fmt: skip
        self.count, self.compiled = 0, False

    def __call__(self, points: Float[np.ndarray, "points names"]) -> dict[str, np.ndarray]:
        """Fields of the tables, the point as first axis."""
        values = self.low + (points + 1) * (self.high - self.low) / 2
        self.count += len(points)
        # The ends of the box must not round to just outside of what a parameter may be.
        values = np.clip(values, self.low, self.high)

        def solved(begin: int) -> dict[str, np.ndarray]:
            block = values[begin : begin + _BLOCK]
            full = np.concatenate([block, np.repeat(block[-1:], _BLOCK - len(block), axis=0)])
            found = _solved(self.ion, self.names, jnp.asarray(full), self.settings, self.largest)
            return {name: np.asarray(field)[: len(block)] for name, field in found.items()}

        begins = list(range(0, len(values), _BLOCK))
        # The very first block compiles; the others share the cores.
        blocks = [] if self.compiled else [solved(begins.pop(0))]
        self.compiled = True
        with ThreadPoolExecutor(multiprocessing.cpu_count()) as pool:
            blocks += pool.map(solved, begins)
        found = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
        if not np.all(found.pop("valid")):
            raise EmulationError("a device in the box cannot be solved to the requested error; plan it for the box.")
        return found


@eqx.filter_jit
def _solved(ion, names, values, settings, largest) -> dict[str, Array]:
    shape = (*settings.detuning_1_hz.shape, len(values))
    ion = dataclasses.replace(ion, **{name: values[:, k] for k, name in enumerate(names)})
    column = lambda a: a[..., None]
    settings = dataclasses.replace(
        settings, detuning_1_hz=column(settings.detuning_1_hz), detuning_2_hz=column(settings.detuning_2_hz)
    )
    table = ion.tabulated(settings, tuple(jnp.broadcast_to(theta, shape) for theta in largest))
    fields = {name: jnp.moveaxis(getattr(table, name), -1, 0) for name in (*_FIELDS, "valid", "error_alone")}
    return {**fields, "error_both": jnp.moveaxis(table.error_both, -1, 0)}


def _largest_areas(ion, boxes) -> tuple[float, float]:
    """Areas at full command that no device in the box exceeds, rad."""
    names = [name for name in boxes if hasattr(ion, name)]
    corners = np.array(list(itertools.product(*(boxes[name] for name in names))))
    spread = dataclasses.replace(ion, **{name: jnp.asarray(corners[:, k]) for k, name in enumerate(names)})
    first, second = (float(np.max(np.abs(theta))) for theta in spread.largest_areas)
    return first, second


def _chebyshev(u, degree: int):
    """T_0 ... T_degree at u, on a new first axis."""
    rows = [jnp.ones_like(u), u]
    while len(rows) <= degree:
        rows.append(2 * u * rows[-1] - rows[-2])
    return jnp.stack(rows[: degree + 1])


def _probed_degrees(solve: _Tables, error: float) -> list[int]:
    """Degree that each parameter alone needs, the others in the middle of the box."""
    nodes = np.cos(np.pi * (np.arange(_LARGEST_DEGREE) + 0.5) / _LARGEST_DEGREE)
    transform = np.linalg.inv(np.polynomial.chebyshev.chebvander(nodes, _LARGEST_DEGREE - 1))
    axes = len(solve.names)
    points = np.concatenate([nodes[:, None] * np.eye(axes)[k] for k in range(axes)]) if axes else np.zeros((0, 0))
    if not axes:
        return []
    tables = solve(points)
    degrees = []
    for k in range(axes):
        rows = slice(k * _LARGEST_DEGREE, (k + 1) * _LARGEST_DEGREE)
        size = np.zeros(_LARGEST_DEGREE)
        for name in _FIELDS:
            values = tables[name][rows].reshape(_LARGEST_DEGREE, -1)
            if values.size:
                size = np.maximum(size, np.max(np.abs(transform @ values), axis=1))
        needed = np.flatnonzero(size > error)
        degrees.append(int(needed[-1]) + 1 if len(needed) else 1)
    return degrees


def _terms(degrees: list[int]) -> Int[np.ndarray, "terms names"]:
    """Multi-indices j with sum_k j_k / d_k <= 1: mixed terms fall like the product of what each axis needs."""
    if not degrees:
        return np.zeros((1, 0), int)
    found: list[tuple[int, ...]] = []

    def extend(prefix: tuple[int, ...], left: float) -> None:
        if len(found) > _LARGEST_TERMS:
            return
        if len(prefix) == len(degrees):
            found.append(prefix)
            return
        d = degrees[len(prefix)]
        for j in range(int(left * d + 1e-9) + 1):
            extend((*prefix, j), left - j / d)

    extend((), 1.0)
    return np.array(found, int)


def _corners(axes: int) -> Float[np.ndarray, "corners names"]:
    if axes == 0:
        return np.zeros((1, 0))
    return np.array(list(itertools.product((-1.0, 1.0), repeat=min(axes, 6))), float).reshape(-1, min(axes, 6)) @ (
        np.eye(min(axes, 6), axes)
    )


def _spread(count: int, axes: int, *, seed: int) -> Float[np.ndarray, "points names"]:
    """Quasi-random points dense at the edges, where polynomials want them."""
    if axes == 0:
        return np.zeros((1, 0))
    unit = qmc.Sobol(axes, rng=np.random.default_rng(seed)).random(2 ** math.ceil(math.log2(count)))[:count]
    return np.cos(np.pi * unit)


def _vandermonde(points, index) -> np.ndarray:
    rows = np.ones((len(points), len(index)))
    for k in range(points.shape[1]):
        rows = rows * np.polynomial.chebyshev.chebvander(points[:, k], index[:, k].max(initial=0))[:, index[:, k]]
    return rows


def _fitted(points, tables, index) -> dict[str, np.ndarray]:
    """Least squares; points dense at the edges make it as good as interpolation."""
    basis, triangle = np.linalg.qr(_vandermonde(points, index))
    solver = np.linalg.solve(triangle, basis.T)
    return {name: np.tensordot(solver, tables[name], 1) for name in _FIELDS}


def _evaluated(coefficients, index, points) -> dict[str, np.ndarray]:
    rows = _vandermonde(points, index)
    return {name: np.tensordot(rows, coefficients[name], 1) for name in _FIELDS}


def _deviation(made: Mapping[str, np.ndarray], solved: Mapping[str, np.ndarray]) -> float:
    """Largest difference of a population over the probed areas."""
    largest = 0.0
    for share_1 in _SHARES:
        differences = [_populations(t, share_1, None) for t in (made, solved)]
        largest = max(largest, float(np.max(np.abs(differences[0] - differences[1]))))
        for share_2 in _SHARES:
            differences = [_populations(t, share_1, share_2) for t in (made, solved)]
            largest = max(largest, float(np.max(np.abs(differences[0] - differences[1]))))
    return largest


def _populations(table: Mapping[str, np.ndarray], share_1: float, share_2: float | None) -> np.ndarray:
    """Populations of all points at these shares of the largest areas, (points, levels, settings)."""
    even = lambda share, n: np.cos(2 * np.arange(n) * np.arccos(share))
    if share_2 is None:
        return np.einsum("pols,o->pls", table["alone"], even(share_1, table["alone"].shape[1]))
    first = np.einsum("pols,o->pls", table["first"], even(share_1, table["first"].shape[1]))
    second = np.einsum("potfs,o->ptfs", table["second"], even(share_2, table["second"].shape[1]))
    rest = table["residual"]
    both = np.einsum("ptfs,pfs->pts", second, first)
    if rest.shape[1]:
        both = both + np.einsum("pabls,a,b->pls", rest, even(share_1, rest.shape[1]), even(share_2, rest.shape[2]))
    return both

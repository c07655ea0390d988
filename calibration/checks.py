"""Is the model right? Tests of what a fit left over, with honest p-values, and the findings in words.

Three tests look at the standardized residuals z of a fit, each blind to what its parameters could take up:

    scatter     is the sum of z^2 what counting allows?
    shape       do smooth functions of the settings explain z?       T = z' B (B' (1 - H) B)^+ B' z  ~  chi2
    sequence    do residuals of neighbouring cycles resemble each other?

H projects on the slopes of the fitted parameters, so that B' (1 - H) z does not depend on them to first order, wherever
in its box the search ended (Neyman's C(alpha)). The verdict is Holm's: three times the smallest p-value. All arrays of
`residual_tests` come from one program that can be jitted and vmapped, so that hundreds of tables are tested at once.

References:
    [1] Farrington, J. R. Statist. Soc. B 58, 349 (1996): Pearson's statistic of sparse counts.
    [2] Neyman, in Probability and Statistics (1959): tests orthogonal to fitted parameters.
    [3] Rayner, Thas and Best, Smooth Tests of Goodness of Fit (2009).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaincc
from jax.scipy.stats import norm
from jaxtyping import Array, Bool, Float, Int

from calibration.data import LoopTable
from calibration.problem import Loops, Problem

LEVEL = 0.01
"""p-value below which a model is rejected."""
DIRECTIONS = 16
"""Most directions of the test of shape: each one more costs the others power."""
LAGS = 3
"""Cycles across which residuals are compared."""
TESTS = ("scatter", "shape", "sequence")


def _area(u):
    """Area of the pulse that moves (1 + u) / 2 of a population, rad."""
    return jnp.arccos(jnp.clip(-u, -1.0, 1.0))


# Which smooth functions are looked for, the most telling ones first: u = 2 x_set - 1 and s are cosine and sine of the
# phase of a sin^2 input (s > 0 where x_set rises), w = 2 r - 1, d the laser offsets over the largest of them.
_SHAPES = {
    "a constant": lambda u, w, s, d: jnp.ones_like(u),
    "x": lambda u, w, s, d: u,
    "r": lambda u, w, s, d: w,
    "x r": lambda u, w, s, d: u * w,
    "branch": lambda u, w, s, d: s,
    "x^2": lambda u, w, s, d: 2 * u**2 - 1,
    "r^2": lambda u, w, s, d: 2 * w**2 - 1,
    "x branch": lambda u, w, s, d: u * s,
    "x^2 r": lambda u, w, s, d: (2 * u**2 - 1) * w,
    "x r^2": lambda u, w, s, d: u * (2 * w**2 - 1),
    "r branch": lambda u, w, s, d: w * s,
    # What separated pulses neglect when they overlap: theta_1 theta_2 sin theta_1 sin theta_2.
    "overlap": lambda u, w, s, d: _area(u) * jnp.sin(_area(u)) * _area(w) * jnp.sin(_area(w)),
    "offset 1": lambda u, w, s, d: d[0],
    "offset 2": lambda u, w, s, d: d[1],
}
_ORDER = (
    *(("y", "a constant"), ("y", "x"), ("x", "a constant"), ("x", "x"), ("y", "r"), ("y", "x r"), ("y", "branch")),
    *(("x", "x^2"), ("x", "branch"), ("y", "x^2"), ("y", "r^2"), ("m", "a constant"), ("m", "x"), ("m", "r")),
    *(("y", "overlap"), ("y", "offset 2"), ("x", "offset 1"), ("y", "x branch"), ("y", "x^2 r"), ("y", "x r^2")),
    ("y", "r branch"),
)
_COLUMNS = {"x": "input x", "y": "output y", "m": "third population m"}
# Of a direction this share must be left when the parameters have taken theirs; less is the parameters' own.
_LEFT = 0.02
_INDEPENDENT = 1e-6


class Layout(eqx.Module):
    """Where the cells of a problem stand: settings of each, and its neighbours in time.

    Attributes:
        directions: (column, shape) of each smooth direction.
        columns: measured columns of each part, in the order of the cells.
        u, s, offsets: 2 x_set - 1, signed sine of the phase, and scaled laser offsets of each row, by part.
        pairs: cells that follow each other at 1 ... `LAGS` cycles, shape (pairs, 2), all lags together.
        row, column: of each cell: the row of its table (-1 for filler), and the number of its column.
    """

    directions: tuple[tuple[str, str], ...] = eqx.field(static=True)
    columns: tuple[tuple[str, ...], ...] = eqx.field(static=True)
    u: tuple[Float[Array, " rows"], ...]
    s: tuple[Float[Array, " rows"], ...]
    offsets: tuple[Float[Array, "2 rows"], ...]
    pairs: Int[Array, "pairs 2"]
    part: Int[np.ndarray, " cells"]
    row: Int[np.ndarray, " cells"]
    column: tuple[str, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, problem: Problem, tables: LoopTable | Mapping[str, LoopTable]) -> "Layout":
        """The layout of a problem that was posed for these tables.

        Raises:
            ValueError: a part that is no loop table.
        """
        named = {"loops": tables} if isinstance(tables, LoopTable) else dict(tables)
        largest = [max(float(np.max(np.abs(getattr(t, f"detuning_{k}_set_hz")))) for t in named.values())
                   for k in (1, 2)]  # fmt: skip
        vary = [len({*np.concatenate([getattr(t, f"detuning_{k}_set_hz") for t in named.values()])}) > 1
                for k in (1, 2)]  # fmt: skip
        columns, u, s, offsets, pairs = [], [], [], [], []
        part_of, row_of, column_of, begin = [], [], [], 0
        for number, part in enumerate(problem.parts):
            if not isinstance(part.data, Loops):
                raise ValueError(f"the part {part.name!r} is no loop table; check the loops alone.")
            table, data = named[part.name], part.data.experiment
            size, rows = len(data.x_set), len(table)
            pad = lambda a, size=size, rows=rows: np.pad(np.asarray(a, float), (0, size - rows), mode="edge")
            u.append(jnp.asarray(pad(2 * table.x_set - 1)))
            s.append(jnp.asarray(pad(direction(table) * 2 * np.sqrt(table.x_set * (1 - table.x_set)))))
            offsets.append(jnp.asarray([pad(getattr(table, f"detuning_{k}_set_hz") / (largest[k - 1] or 1.0))
                                        for k in (1, 2)]))  # fmt: skip
            columns.append(tuple(name for name in ("x", "y", "m") if getattr(data, name) is not None))
            for name in columns[-1]:
                pairs += [begin + pair for pair in _neighbours(table)]
                part_of += [number] * size
                row_of += [*range(rows), *[-1] * (size - rows)]
                column_of += [name] * size
                begin += size
        there = {name for names in columns for name in names}
        known = [(c, shape) for c, shape in _ORDER if c in there and not _constant_offset(shape, vary)]
        return cls(
            directions=tuple(known[:DIRECTIONS]),
            columns=tuple(columns),
            u=tuple(u),
            s=tuple(s),
            offsets=tuple(offsets),
            pairs=jnp.asarray(np.concatenate(pairs) if pairs else np.zeros((0, 2), int)),
            part=np.asarray(part_of),
            row=np.asarray(row_of),
            column=tuple(column_of),
        )

    def basis(self, problem: Problem, values: Float[Array, " parameters"]) -> Float[Array, "cells directions"]:
        """The smooth directions, one column each, in units of the cells' standard errors."""
        blocks = []
        for k, part in enumerate(problem.parts):
            assert isinstance(part.data, Loops)
            r = part.data.prediction(problem.device(part, values), problem.own_window(part)).r
            shapes = {
                name: shape(self.u[k], 2 * r - 1, self.s[k], self.offsets[k])
                for name, shape in _SHAPES.items()
                if any(name == wanted for _, wanted in self.directions)
            }
            none = jnp.zeros_like(r)
            for column in self.columns[k]:
                rows = [shapes[name] if own == column else none for own, name in self.directions]
                blocks.append(jnp.stack(rows, axis=1))
        return jnp.concatenate(blocks)


def _constant_offset(shape: str, vary: list[bool]) -> bool:
    return shape.startswith("offset") and not vary[int(shape[-1]) - 1]


def direction(table: LoopTable) -> np.ndarray:
    """+1 where x_set rises, -1 where it falls, 0 where neither."""
    direction = np.zeros(len(table))
    for label in table.labels:
        rows = table.rows(label)
        if len(rows) > 1:
            direction[rows] = np.sign(np.gradient(table.x_set[rows]))
    return direction


def _neighbours(table: LoopTable) -> list[np.ndarray]:
    """Rows of the same loop that lie 1 ... `LAGS` cycles apart."""
    found = []
    for label in table.labels:
        rows = table.rows(label)
        found += [np.stack([rows[lag:], rows[:-lag]], axis=1) for lag in range(1, LAGS + 1) if len(rows) > lag]
    return found


class ResidualTests(NamedTuple):
    """What the tests of one fit found; arrays, one leading axis more for each vmap.

    Attributes:
        p: p-value of each of `TESTS`. p_value: of all of them together (Holm).
        scatter: sum of squares over what is expected. cells: how many were judged.
        statistic, freedom: T of the test of shape, and its degrees of freedom.
        sequence: mean product of neighbouring residuals, in standard deviations.
        strength: of each direction alone, in standard deviations.
        misfit: the smooth part of the residuals, as a probability, cell by cell.
    """

    p: Float[Array, " tests"]
    p_value: Float[Array, ""]
    scatter: Float[Array, ""]
    cells: Int[Array, ""]
    statistic: Float[Array, ""]
    freedom: Int[Array, ""]
    sequence: Float[Array, ""]
    strength: Float[Array, " directions"]
    misfit: Float[Array, " cells"]
    there: Bool[Array, " cells"]


def residual_tests(problem: Problem, layout: Layout, values: Float[Array, " parameters"]) -> ResidualTests:
    """The three tests at an optimum; for use inside jit and vmap."""
    if problem.noise.kind == "student_t":
        raise ValueError(
            "the noise 'student_t' makes no claim on how far outliers lie; check a fit with another noise."
        )
    noise, pairs = problem.noise_at(values), problem.predicted(values)
    variance = jnp.concatenate([column.variance(q, noise) for column, q in pairs])
    there = jnp.concatenate([column.measured for column, _ in pairs]) & (variance > 0)
    error = jnp.sqrt(jnp.where(there, variance, 1.0))
    z = jnp.where(there, problem.residuals(values), 0.0)
    slopes = jnp.where(there[:, None], problem.slopes(values) / error[:, None], 0.0) * problem.free.width
    tangent, taken = _orthonormal(slopes, 1e-10)
    left_over = lambda b: b - tangent @ (tangent.T @ b)
    cells = jnp.sum(there)

    scatter, p_scatter = _scatter(problem, pairs, z, there, cells, taken)
    basis, _ = _orthonormal(jnp.where(there[:, None], layout.basis(problem, values), 0.0), _INDEPENDENT)
    free = left_over(basis)
    share, axes = jnp.linalg.eigh(free.T @ free)
    kept = share > _LEFT
    own = free @ axes / jnp.sqrt(jnp.where(kept, share, 1.0)) * kept
    along = own.T @ z
    statistic, freedom = jnp.sum(along**2), jnp.sum(kept)
    p_shape = gammaincc(jnp.maximum(freedom, 1) / 2, statistic / 2)
    sequence, p_sequence = _sequence(layout.pairs, z, there, tangent)

    every = jnp.stack([p_scatter, p_shape, p_sequence])
    single = left_over(jnp.where(there[:, None], layout.basis(problem, values), 0.0))
    norms = jnp.linalg.norm(single, axis=0)
    strength = jnp.where(norms > 1e-6, single.T @ z / jnp.where(norms > 1e-6, norms, 1.0), 0.0)
    return ResidualTests(
        p=every,
        p_value=jnp.minimum(1.0, len(TESTS) * jnp.min(every)),
        scatter=scatter,
        cells=cells,
        statistic=statistic,
        freedom=freedom,
        sequence=sequence,
        strength=strength,
        misfit=own @ along * error,
        there=there,
    )


def _orthonormal(columns: Float[Array, "cells n"], tolerance: float) -> tuple[Float[Array, "cells n"], Int[Array, ""]]:
    """Orthonormal columns that span the given ones, zeros in place of dependent ones; and how many there are."""
    norms = jnp.linalg.norm(columns, axis=0)
    unit = columns / jnp.where(norms > 0, norms, 1.0)
    size, axes = jnp.linalg.eigh(unit.T @ unit)
    kept = size > tolerance * jnp.maximum(size[-1], 1e-300)
    return unit @ axes / jnp.sqrt(jnp.where(kept, size, 1.0)) * kept, jnp.sum(kept)


def _scatter(problem: Problem, pairs, z, there, cells, taken) -> tuple[Array, Array]:
    """Pearson's statistic over its expectation, and its two-sided p-value.

        X = sum z^2 - gamma z,   gamma = (1 - 2p) / sqrt(N p (1 - p)) for counts, 0 for values

    With the skewness gamma of each cell taken off, the variance of a cell is 2 (N - 1) / N at any p, however small the
    counts, and the statistic does not change to first order when p is estimated [1]. Mean n - k and variance
    (1 - k/n) sum 2 (N - 1) / N are matched by a scaled chi-square.
    """
    skewness, variance = [], []
    for column, p in pairs:
        exact = column.counted and problem.noise.kind == "binomial"
        shots = jnp.where(column.measured, column.scale, 1.0) if exact else jnp.full_like(p, jnp.inf)
        spread = jnp.sqrt(jnp.where(p * (1 - p) > 0, shots * p * (1 - p), jnp.inf))
        skewness.append((1 - 2 * p) / spread)
        variance.append(2 * (1 - 1 / shots))
    total = jnp.sum(jnp.where(there, z**2 - jnp.concatenate(skewness) * z, 0.0))
    mean = jnp.maximum(cells - taken, 1)
    spread = mean / jnp.maximum(cells, 1) * jnp.sum(jnp.where(there, jnp.concatenate(variance), 0.0))
    upper = gammaincc(mean**2 / spread, jnp.maximum(total, 0.0) * mean / spread)
    return total / mean, 2 * jnp.minimum(upper, 1 - upper)


def _sequence(pairs: Int[Array, "pairs 2"], z, there, tangent) -> tuple[Array, Array]:
    """Sum of z_i z_j over neighbours in standard deviations, and its two-sided p-value.

    A quadratic form z' W z / 2 of residuals (1 - H) e: mean tr (1-H)W / 2, variance tr ((1-H)W)^2 / 2.
    """
    weight = jnp.where(there[pairs[:, 0]] & there[pairs[:, 1]], 1.0, 0.0)
    first, second = pairs[:, 0], pairs[:, 1]

    def applied(q: Float[Array, "cells n"]) -> Float[Array, "cells n"]:
        given = weight[:, None]
        return jnp.zeros_like(q).at[first].add(given * q[second]).at[second].add(given * q[first])

    neighbours = applied(tangent)
    inner = tangent.T @ neighbours
    total = jnp.sum(weight * z[first] * z[second])
    mean = -0.5 * jnp.trace(inner)
    variance = jnp.sum(weight) - jnp.sum(neighbours**2) + 0.5 * jnp.sum(inner * inner.T)
    deviation = (total - mean) / jnp.sqrt(jnp.maximum(variance, 1e-12))
    deviation = jnp.where(jnp.sum(weight) > 0, deviation, 0.0)
    return deviation, 2 * norm.sf(jnp.abs(deviation))


# ------------------------------------------------------------------------------------------------ in words


@dataclass(frozen=True)
class Check:
    """The verdict on a fit.

    Attributes:
        p_value: of all tests together. rejected: whether it lies below `LEVEL`.
        tests: {test: {"p_value", "statistic", "finding"}}.
        sentences: the verdict first, then what deviates, where, and by how much.
        directions: {"column: shape": strength in standard deviations}.
        misfit: smooth part of the residuals as a probability, {part: {column: (rows,)}}; NaN where not measured.
    """

    p_value: float
    rejected: bool
    tests: dict[str, dict[str, float | str]]
    sentences: list[str]
    directions: dict[str, float]
    misfit: dict[str, dict[str, np.ndarray]]


_jitted = eqx.filter_jit(residual_tests)


def check(problem: Problem, tables: LoopTable | Mapping[str, LoopTable], values) -> Check:
    """Tests a fit and says in words what was found.

    Args:
        problem: as posed for the tables, or `FitResult.problem`.
        tables: one table, or several by name, as they were fitted.
        values: the optimum, in the order of the problem's names.

    Raises:
        ValueError: a noise law that makes no claim to be tested.
    """
    values = jnp.asarray(values, float)
    layout = Layout.of(problem, tables)
    found = _jitted(problem, layout, values)
    p = dict(zip(TESTS, np.asarray(found.p).tolist(), strict=True))
    misfit = np.where(np.asarray(found.there), np.asarray(found.misfit), np.nan)
    rejected = bool(found.p_value < LEVEL)
    limit = LEVEL / len(TESTS)
    scatter, sequence = float(found.scatter), float(found.sequence)
    findings = {
        "scatter": f"Residuals scatter {scatter:.3f} times as much as their errors allow (sum of squares, p = "
        f"{p['scatter']:.2g}).",
        "shape": _where(problem, layout, tables, found, misfit, p["shape"]),
        "sequence": f"Residuals of neighbouring cycles are {'alike' if sequence > 0 else 'opposed'} by "
        f"{abs(sequence):.1f} standard deviations (p = {p['sequence']:.2g}).",
    }
    statistics = {"scatter": scatter, "shape": float(found.statistic), "sequence": sequence}
    if rejected:
        head = f"The model is rejected (p = {float(found.p_value):.2g} of three tests together)."
        said = [findings[test] for test in TESTS if p[test] < limit]
    else:
        head = (
            f"Nothing speaks against the model: scatter, shape and sequence of {int(found.cells)} residuals are as "
            f"they should be (p = {float(found.p_value):.2g})."
        )
        said = []
    return Check(
        p_value=float(found.p_value),
        rejected=rejected,
        tests={t: {"p_value": p[t], "statistic": statistics[t], "finding": findings[t]} for t in TESTS},
        sentences=[head, *said],
        directions={
            f"{column}: {shape}": float(size)
            for (column, shape), size in zip(layout.directions, found.strength, strict=True)
        },
        misfit={
            part.name: {
                column: _cells_of(layout, number, column, misfit)[: int(part.rows)] for column in layout.columns[number]
            }
            for number, part in enumerate(problem.parts)
        },
    )


def _cells_of(layout: Layout, part: int, column: str, values: np.ndarray) -> np.ndarray:
    return values[(layout.part == part) & (np.array(layout.column) == column)]


def _where(problem: Problem, layout: Layout, tables, found: ResidualTests, misfit: np.ndarray, p: float) -> str:
    """Which column deviates, where it does most, and by how much."""
    named = {"loops": tables} if isinstance(tables, LoopTable) else dict(tables)
    rms = {}
    for column in dict.fromkeys(layout.column):
        own = misfit[(np.array(layout.column) == column) & np.isfinite(misfit)]
        if len(own):
            rms[column] = float(np.sqrt(np.mean(own**2)))
    if not rms:
        return "There is nothing to test."
    column = max(rms, key=lambda name: rms[name])
    own = np.where(np.array(layout.column) == column, np.abs(np.nan_to_num(misfit)), 0.0)
    cell = int(np.argmax(own))
    table = named[problem.parts[int(layout.part[cell])].name]
    row = int(layout.row[cell])
    way = {1.0: "rising ", -1.0: "falling "}.get(float(direction(table)[row]), "")
    strengths = {d: float(s) for d, s in zip(layout.directions, found.strength, strict=True) if d[0] == column}
    (_, shape), size = max(strengths.items(), key=lambda item: abs(item[1]))
    offset = ""
    if len({*table.detuning_1_set_hz, *table.detuning_2_set_hz}) > 1:
        offset = f", lasers set {table.detuning_1_set_hz[row]:+g} and {table.detuning_2_set_hz[row]:+g} Hz off"
    return (
        f"The {_COLUMNS[column]} deviates smoothly from the model, beyond what its parameters can take up, by "
        f"{rms[column]:.2g} (rms) and most, by {misfit[cell]:+.2g}, on the {way}branch of loop {table.loop[row]} "
        f"at x_set = {table.x_set[row]:.2f} (cycle {table.cycle[row]}{offset}); the clearest direction is "
        f"{shape!r} with {size:+.1f} standard deviations (p = {p:.2g})."
    )

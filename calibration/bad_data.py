"""What is wrong with a loop table that no values of the parameters explain.

    missing half cycle   part of a period has no rows, or no measurements of a column that is measured elsewhere
    phase slip           the measured columns, moved by k cycles from some cycle on, are explained much better
    branch swap          outputs of the rising and falling branches, exchanged, are explained much better
    saturation           counts pile at a ceiling or floor that the twin does not predict

The first is read off the settings. The others are compared by likelihood, each side with the parameters it likes best,
and only where the table fits badly or would raise an alarm. A drift is explained by parameters and gains nothing. A
kind is named if it gains more than `MUCH_BETTER` nats and takes away most of the misfit.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import equinox as eqx
import numpy as np
from scipy.special import gammaln
from scipy.stats import binom, norm

from calibration import least_squares
from calibration.data import LoopTable
from calibration.problem import Problem

SUSPICIOUS = 5.0
"""Excess of chi-squared, in standard deviations, above which a table is looked at closely."""
MUCH_BETTER = 25.0
"""Nats by which another reading of the table must explain it better."""
UNEXPLAINED = 10.0
"""Excess of chi-squared above which a table is bad although nothing is known that explains it."""
# The share of the misfit that the right kind may leave.
_LEFT = 0.4
# A gap is missing data when it is longer than this share of a period.
_GAP = 0.25
# Ties at one value that make a ceiling or floor; values closer than this share of the range are tied.
_LEAST_TIES = 4
# Nats that ties of one column of one loop must gain to be counted: some tie by chance.
_GAIN_OF_TIES = 6.0
_ITERATIONS = 8


@dataclass(frozen=True)
class Cells:
    """Every measured cell under the twin at some values; columns (x, y, m) one after another, rows inside.

    Attributes:
        values: at which the twin was evaluated.
        p, variance, slopes: probability, variance of its estimate, derivatives.
        there: which cells are measured. value, scale: counts and shots, or values and standard errors.
        counted: which cells hold counts. columns: number of columns.
    """

    values: np.ndarray
    p: np.ndarray
    variance: np.ndarray
    slopes: np.ndarray
    there: np.ndarray
    value: np.ndarray
    scale: np.ndarray
    counted: np.ndarray
    columns: int

    @property
    def _used(self) -> np.ndarray:
        return self.there & (self.variance > 0)

    @property
    def _difference(self) -> np.ndarray:
        return np.where(self.counted, self.value / self.scale, self.value) - self.p

    @property
    def _weights(self) -> np.ndarray:
        return np.where(self._used, 1 / np.where(self._used, self.variance, 1.0), 0.0)

    @property
    def information(self) -> np.ndarray:
        """Fisher information."""
        return self.slopes.T @ (self._weights[:, None] * self.slopes)

    @property
    def score(self) -> np.ndarray:
        """Derivative of the log-likelihood."""
        return self.slopes.T @ (self._weights * self._difference)

    @property
    def misfit(self) -> float:
        """Excess of Pearson's chi-squared over its expectation, in standard deviations.

        The variance of a squared residual is 2 plus the excess kurtosis of its law, (1 - 6 p q) / (N p q) of counts.
        """
        impossible = self.there & (self.variance <= 0) & (np.abs(self._difference) > 0)
        if not np.all(np.isfinite(self.p)) or np.any(impossible):
            return float("inf")
        spread = np.where(self._used, self.p * (1 - self.p), 1.0)
        kurtosis = np.where(self.counted, (1 - 6 * spread) / (self.scale * spread), 0.0)
        squares = self._weights * self._difference**2
        return float(np.sum((squares - 1)[self._used]) / np.sqrt(np.sum((2 + kurtosis)[self._used]) or 1.0))

    @property
    def terms(self) -> np.ndarray:
        """Log-likelihood of each cell up to a constant of the data; 0 where not measured."""
        p = np.clip(self.p, 1e-12, 1 - 1e-12)
        counts = self.value * np.log(p) + (self.scale - self.value) * np.log1p(-p)
        return np.where(self.there, np.where(self.counted, counts, -0.5 * self._difference**2 / self.variance), 0.0)

    def read_as(self, rows: np.ndarray) -> "Cells":
        """The same measured numbers as those of other cells; -1: of none."""
        take = np.maximum(rows, 0)
        # The variance belongs to the shots of the cell itself.
        p = self.p[take]
        variance = np.where(self.counted, p * (1 - p) / self.scale, self.variance)
        return dataclasses.replace(
            self, p=p, slopes=self.slopes[take], variance=variance, there=self.there & (rows >= 0)
        )

    def only(self, which: np.ndarray) -> "Cells":
        """Some of the cells."""
        return dataclasses.replace(self, there=self.there & which)


Look = Callable[[np.ndarray], Cells]


@eqx.filter_jit
def evaluated(problem: Problem, values):
    """Probability, variance, presence and slopes of the cells, and what was measured; compiled once for a stream."""
    problem = least_squares.forward(problem)
    p, variance, there = problem.cells(values)
    columns = [column for part in problem.parts for column in part.data.observed]
    return p, variance, there, problem.slopes(values), [(c.value, c.scale) for c in columns]


def look(problem: Problem, values: np.ndarray) -> Cells:
    """The cells of a problem at some values inside its boxes."""
    p, variance, there, slopes, columns = evaluated(problem, values)
    counted = np.concatenate([np.full(len(c.value), c.counted) for part in problem.parts for c in part.data.observed])
    value, scale = (np.concatenate([np.asarray(pair[k]) for pair in columns]) for k in (0, 1))
    return Cells(np.asarray(values), np.asarray(p), np.asarray(variance), np.asarray(slopes), np.asarray(there), value,
                 scale, counted, len(columns))  # fmt: skip


def refit(
    look: Look, start: np.ndarray, prior: np.ndarray, reading: Callable[[Cells], Cells] = lambda cells: cells
) -> tuple[np.ndarray, Cells]:
    """Fisher scoring from a start, with halved steps; the values, and the cells there.

    Args:
        look: the cells at some values. prior: information about the start.
        reading: how the cells are to be understood.
    """
    value = lambda cells, v: np.sum(cells.terms) - 0.5 * (v - start) @ prior @ (v - start)
    here = start
    cells = reading(look(here))
    for _ in range(_ITERATIONS):
        move = np.linalg.solve(cells.information + prior, cells.score - prior @ (here - start))
        for _ in range(4):
            then = reading(look(here + move))
            if value(then, here + move) >= value(cells, here):
                break
            move = 0.5 * move
        else:
            break
        gained = value(then, here + move) - value(cells, here)
        here, cells = here + move, then
        if gained < 0.01:
            break
    return here, cells


# ------------------------------------------------------------------------------------------------ structure


def period_of(x_set: np.ndarray) -> int:
    """Cycles of one period of a periodic input; 0 if it has none that repeats at least once."""
    n = len(x_set)
    scale = float(np.ptp(x_set))
    if scale == 0:
        return 0
    for period in range(4, n // 2 + 1):
        if np.max(np.abs(x_set[period:] - x_set[:-period])) < 1e-3 * scale:
            return period
    return 0


def missing(table: LoopTable, lengths: Mapping[str, int] | None = None) -> str:
    """Which part of a period has no data, in words; empty if none.

    Args:
        table: the loops. lengths: cycles that each loop had in earlier tables.
    """
    for label in table.labels:
        rows = table.rows(label)
        cycle = table.cycle[rows] - table.cycle[rows[0]]
        x_set = np.full(cycle[-1] + 1, np.nan)
        x_set[cycle] = table.x_set[rows]
        period = _period_with_gaps(x_set)
        if not period:
            continue
        longest = max(2, int(_GAP * period))
        for name in ("n_x", "n_y", "n_m", "x", "y"):
            column = getattr(table, name)
            if column is None or not np.any(np.isfinite(column)):
                continue
            there = np.zeros(len(x_set), bool)
            there[cycle[np.isfinite(column[rows])]] = True
            begin, length = _longest_gap(there)
            if length >= longest:
                first = int(begin + table.cycle[rows[0]])
                return (f"part of a period is missing: loop {label} has no {name} from cycle {first} to "
                        f"{first + length - 1}, {length} of the {period} cycles of a period")  # fmt: skip
        expected = (lengths or {}).get(label)
        rest = (len(x_set) - 1) % period
        cut = expected is not None and expected - len(rows) >= longest
        if cut or (expected is None and longest <= rest <= period - longest):
            return (f"part of a period is missing: loop {label} ends at cycle {int(table.cycle[rows[-1]])}, "
                    f"{period - rest} cycles before its period of {period} does")  # fmt: skip
    return ""


def _period_with_gaps(x_set: np.ndarray) -> int:
    """`period_of`, blind to missing cycles; half a period may be all that is known twice."""
    n, scale = len(x_set), np.nanmax(x_set) - np.nanmin(x_set)
    for period in range(4, n - 1):
        apart = np.abs(x_set[period:] - x_set[:-period])
        known = np.isfinite(apart)
        if np.sum(known) >= max(4, period // 4) and scale > 0 and np.max(apart[known]) < 1e-3 * scale:
            return period
    return 0


def _longest_gap(there: np.ndarray) -> tuple[int, int]:
    edges = np.flatnonzero(np.diff(np.concatenate([[1], there.astype(int), [1]])))
    gaps = edges.reshape(-1, 2)
    if not len(gaps):
        return 0, 0
    k = int(np.argmax(gaps[:, 1] - gaps[:, 0]))
    return int(gaps[k, 0]), int(gaps[k, 1] - gaps[k, 0])


# ------------------------------------------------------------------------------------------------ other readings


@dataclass(frozen=True)
class _Reading:
    """Another way to understand the cells; `gain` compares, for cells that it leaves out, it with the plain way."""

    said: str
    reading: Callable[[Cells], Cells]
    gain: Callable[[Cells, Cells], float] = lambda then, plain: 0.0


def explain(table: LoopTable, look: Look, starts: tuple[np.ndarray, ...], best: Cells) -> str:
    """Why a table fits badly, in words; empty if it does not fit badly enough to be called bad.

    Args:
        table: the loops.
        look: the cells at some values. starts: values worth trying: those expected, and those that fit best.
        best: the cells at the values that fit best.
    """
    prior = np.diag(np.maximum(np.diag(best.information), 1e-12) * 1e-4)
    found: list[tuple[float, str]] = []
    for start in starts:
        cells = look(start)
        for kind in (_slipped, _swapped, _saturated):
            if (reading := kind(table, cells)) is None:
                continue
            at, then = refit(look, start, prior, reading.reading)
            # The same cells, as they stand and as they are read.
            gain = float(np.sum(then.terms) - np.sum(best.only(then.there).terms)) + reading.gain(look(at), best)
            settled = not then.misfit > max(SUSPICIOUS, _LEFT * best.misfit)
            if gain > MUCH_BETTER and settled:
                found.append((gain, f"{reading.said} (better by {gain:.0f} nats)"))
    if found:
        return max(found)[1]
    if best.misfit > UNEXPLAINED:
        return (f"no values of the free parameters explain it: chi-squared lies {best.misfit:.0f} standard deviations "
                "above its expectation, and no known fault of the data does better")  # fmt: skip
    return ""


def _rows(cells: Cells) -> int:
    return len(cells.p) // cells.columns


def _spread(cells: Cells, of_row: np.ndarray, columns: list[int]) -> np.ndarray:
    """A map of rows as a map of cells: the named columns follow it, the others stay."""
    n = _rows(cells)
    full = np.arange(n)
    full[: len(of_row)] = of_row
    maps = [np.where(full >= 0, full + c * n, -1) if c in columns else np.arange(n) + c * n
            for c in range(cells.columns)]  # fmt: skip
    return np.concatenate(maps)


def _by_row(cells: Cells, values: np.ndarray, rows: int) -> np.ndarray:
    return values.reshape(cells.columns, -1).sum(axis=0)[:rows]


def _slipped(table: LoopTable, cells: Cells) -> _Reading | None:
    """Measured columns moved by k cycles from some cycle of a loop on."""
    best: tuple[float, int, np.ndarray, str, int] | None = None
    plain = _by_row(cells, cells.terms, len(table))
    reach = [period_of(table.x_set[table.rows(label)]) or 40 for label in table.labels]
    every = list(range(cells.columns))
    for k in [s * d for d in range(1, max(reach) // 2 + 1) for s in (1, -1)]:
        of_row = np.arange(len(table))
        first = None
        for label in table.labels:
            rows = table.rows(label)
            place = {int(c): int(r) for c, r in zip(table.cycle[rows], rows, strict=True)}
            of_row[rows] = [place.get(int(c) - k, -1) for c in table.cycle[rows]]
        moved = _by_row(cells, cells.read_as(_spread(cells, of_row, every)).terms, len(table))
        gains = np.where(of_row >= 0, moved - plain, 0.0)
        keep = np.arange(len(table))
        for label in table.labels:
            rows = table.rows(label)
            rest = np.cumsum(gains[rows][::-1])[::-1]
            begin = int(np.argmax(rest))
            if rest[begin] > MUCH_BETTER / 2:
                keep[rows[begin:]] = of_row[rows[begin:]]
                first = first or (label, int(table.cycle[rows[begin]]))
        if first is None:
            continue
        # What is left unexplained decides, not the gain: cells at the edge, without a partner, gain nothing.
        left = cells.read_as(_spread(cells, keep, every)).misfit
        if best is None or left < best[0]:
            best = (left, k, keep, *first)
    if best is None:
        return None
    _, k, keep, label, cycle = best
    said = (f"of a phase slip: from cycle {cycle} of loop {label} on, what was measured belongs to settings "
            f"{abs(k)} cycle{'s' if abs(k) > 1 else ''} {'earlier' if k > 0 else 'later'}")  # fmt: skip
    return _Reading(said, lambda c: c.read_as(_spread(c, keep, every)))


def _swapped(table: LoopTable, cells: Cells) -> _Reading | None:
    """Outputs of the rising branch read as those of the falling one, and the other way round."""
    outputs = [c for c, name in enumerate(_names(table)) if name != "x"]
    of_row, loops = np.arange(len(table)), []
    plain = _by_row(cells, cells.terms, len(table))
    for label in table.labels:
        rows = table.rows(label)
        partner = _other_branch(table.x_set[rows])
        if partner is None:
            continue
        trial = np.arange(len(table))
        trial[rows] = rows[partner]
        gain = np.sum(_by_row(cells, cells.read_as(_spread(cells, trial, outputs)).terms, len(table)) - plain)
        if gain > MUCH_BETTER / 2:
            of_row[rows] = trial[rows]
            loops.append(label)
    if not loops:
        return None
    said = f"forward and backward branches of loop {', '.join(loops)} are exchanged in the outputs"
    return _Reading(said, lambda c: c.read_as(_spread(c, of_row, outputs)))


def _other_branch(x_set: np.ndarray) -> np.ndarray | None:
    """For each cycle the one of its period with the same input on the other branch; None without periods."""
    period = period_of(x_set)
    if not period:
        return None
    k = np.arange(len(x_set))
    # Periods are counted from the first extremum, about which a symmetric input mirrors.
    lowest = int(np.argmin(x_set[:period]))
    place = (k - lowest) % period
    mirror = k - place + (period - place) % period
    ok = (mirror >= 0) & (mirror < len(x_set))
    mirror = np.where(ok, mirror, k)
    return mirror if np.max(np.abs(x_set[mirror] - x_set)) < 0.05 * np.ptp(x_set) else None


def _saturated(table: LoopTable, cells: Cells) -> _Reading | None:
    """Cells tied at the largest or smallest value, read as "at least" and "at most" it."""
    share = np.where(cells.counted, cells.value / cells.scale, cells.value)
    best: tuple[float, _Reading] | None = None
    for sign in (1, -1):
        every, parts = np.zeros(len(cells.p), bool), []
        for column, label in itertools.product(range(cells.columns), table.labels):
            inside = np.zeros(len(cells.p), bool)
            inside[column * _rows(cells) + table.rows(label)] = True
            inside &= cells.there
            level = float(np.max(sign * share, where=inside, initial=-np.inf) * sign)
            tied = inside & (share == level)
            # All or none of the shots is where counts end anyway.
            ends = level in (0.0, 1.0) and bool(np.any(cells.counted))
            if np.sum(tied) < _LEAST_TIES or ends or _gain_of_censoring(cells, cells, tied, sign) < _GAIN_OF_TIES:
                continue
            every |= tied
            parts.append(f"{int(np.sum(tied))} cells of {_names(table)[column]} at {level:.3g} in loop {label}")
        if not parts:
            continue
        gained = _gain_of_censoring(cells, cells, every, sign)
        if best is None or gained > best[0]:
            said = f"of saturation: counts pile at a {'ceiling' if sign > 0 else 'floor'}, {', '.join(parts)}"
            compare = lambda then, plain, t=every, s=sign: _gain_of_censoring(then, plain, t, s)
            best = (gained, _Reading(said, lambda c, t=every: c.only(~t), compare))
    return best[1] if best else None


def _gain_of_censoring(then: Cells, plain: Cells, tied: np.ndarray, sign: int) -> float:
    """Nats gained by reading tied cells as having reached a level or passed it, against as they stand."""
    return _censored(then, tied, sign) - float(np.sum((plain.terms + _constant(plain))[tied]))


def _names(table: LoopTable) -> list[str]:
    """The measured columns in the order of the cells."""
    return [n for n in "xym" if getattr(table, f"n_{n}" if table.kind == "counts" else n, None) is not None]


def _constant(cells: Cells) -> np.ndarray:
    """What `Cells.terms` leaves out: the binomial coefficient, or the norm of a Gaussian in its own width."""
    choose = gammaln(cells.scale + 1) - gammaln(cells.value + 1) - gammaln(cells.scale - cells.value + 1)
    return np.where(cells.counted, choose, -0.5 * np.log(2 * np.pi))


def _censored(cells: Cells, tied: np.ndarray, sign: int) -> float:
    """Log-probability that the tied cells reached the level or passed it."""
    p, n, shots = np.clip(cells.p, 1e-12, 1 - 1e-12)[tied], cells.value[tied], cells.scale[tied]
    z = sign * (n - cells.p[tied]) / np.sqrt(cells.variance[tied])
    tail = binom.logsf(n - 1, shots, p) if sign > 0 else binom.logcdf(n, shots, p)
    return float(np.sum(np.where(cells.counted[tied], tail, norm.logsf(z))))

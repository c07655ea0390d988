"""What a calibrated device would show next: held-out loops, and posterior predictive checks of loop area and form.

Held out: a loop is left out of the fit and then predicted; its log-likelihood is compared with that of loops which the
model itself makes up, at parameters drawn from what the others allow. Posterior predictive: whole tables are made up at
parameters drawn from the posterior and compared with the measured one. As the same data served the fit, such p-values
are too large rather than too small; they belong to no verdict.

References: Gelman, Meng and Stern, Statistica Sinica 6, 733 (1996). Vehtari, Gelman and Gabry, Stat. Comput. 27, 1413
(2017): paired differences of held-out terms and their standard error.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from calibration import least_squares
from calibration.data import LoopTable
from calibration.problem import Loops, Problem
from twin.hysteresis import form_factor, signed_area

# Blocks of cycles that take the place of loops where there is only one.
_BLOCKS = 5
_STEPS = 15
_BATCH = 10
# Commands of two periods are equal if they differ by less: tables hold some nine digits.
_SAME_COMMAND = 1e-6


class Fold(NamedTuple):
    """What is left out at once: its name for readers, and its rows in each part (without filler)."""

    name: str
    rows: tuple[np.ndarray, ...]


def folds(problem: Problem, tables: LoopTable | Mapping[str, LoopTable]) -> list[Fold]:
    """One fold a loop; of a single loop, blocks of neighbouring cycles."""
    named = {"loops": tables} if isinstance(tables, LoopTable) else dict(tables)
    every = [(part.name, label, named[part.name].rows(label)) for part in problem.parts
             for label in named[part.name].labels]  # fmt: skip
    if len(every) == 1:
        part, label, rows = every[0]
        blocks = [piece for piece in np.array_split(rows, _BLOCKS) if len(piece)]
        cycles = [named[part].cycle[piece] for piece in blocks]
        every = [(part, f"{label}, cycles {c[0]} to {c[-1]}", piece) for c, piece in zip(cycles, blocks, strict=True)]
    found = []
    for part, label, rows in every:
        masks = tuple(np.isin(np.arange(int(p.rows)), rows) & (p.name == part) for p in problem.parts)
        found.append(Fold(f"loop {label}" + (f" of {part}" if len(named) > 1 else ""), masks))
    return found


def left_out(problem: Problem, found: Sequence[Fold]) -> Bool[Array, "folds cells"]:
    """Which cells each fold leaves out; filler belongs to none."""
    rows = []
    for fold in found:
        parts = []
        for part, mask in zip(problem.parts, fold.rows, strict=True):
            for column in part.data.observed:
                parts.append(np.pad(mask, (0, len(column.value) - len(mask))))
        rows.append(np.concatenate(parts))
    return jnp.asarray(np.array(rows))


def masked(problem: Problem, keep: Bool[Array, " cells"]) -> Problem:
    """The problem with some cells not measured; inputs that a memory averages stay known."""
    parts, begin = [], 0
    for part in problem.parts:
        assert isinstance(part.data, Loops)
        changed = {}
        for name in ("x", "y", "m"):
            column = getattr(part.data.experiment, name)
            if column is not None:
                own = keep[begin : begin + len(column.value)]
                begin += len(column.value)
                changed[name] = dataclasses.replace(column, measured=column.measured & own)
        data = Loops(dataclasses.replace(part.data.experiment, **changed))
        parts.append(dataclasses.replace(part, data=data))
    return dataclasses.replace(problem, parts=tuple(parts))


def terms(problem: Problem, values: Float[Array, " parameters"]) -> Float[Array, " cells"]:
    """Log-likelihood of each cell, nats."""
    noise = problem.noise_at(values)
    return jnp.concatenate([column.terms(p, noise) for column, p in problem.predicted(values)])


def drawn(
    problem: Problem, values: Float[Array, " parameters"], key: PRNGKeyArray, count: int
) -> Float[Array, "count n"]:
    """Values from the Laplace approximation of the posterior, in coordinates in which the prior is normal.

    They never leave the box.
    """
    z = problem.free.to_normal(_inside(problem, values))
    values, slopes = jax.jvp(problem.free.from_normal, (z,), (jnp.ones_like(z),))
    precision = slopes[:, None] * problem.information(values) * slopes + jnp.eye(z.size)
    size, axes = jnp.linalg.eigh(precision)
    steps = jax.random.normal(key, (count, z.size)) / jnp.sqrt(jnp.maximum(size, 1.0))
    return problem.free.from_normal(z + steps @ axes.T)


@dataclass(frozen=True)
class HeldOut:
    """One fold: predictive log-likelihood, what the model expects of it with its spread, and the share below it."""

    name: str
    log_likelihood: float
    expected: float
    spread: float
    p_value: float

    @property
    def z(self) -> float:
        """Distance from what is expected, in standard deviations."""
        return (self.log_likelihood - self.expected) / self.spread

    @property
    def sentence(self) -> str:
        """The finding in words."""
        verdict = "as well as it should be" if self.p_value >= 0.01 else "worse than it should be"
        return (
            f"The {self.name}, left out of the fit, is predicted {verdict}: log-likelihood {self.log_likelihood:.1f}, "
            f"where the model expects {self.expected:.1f} ± {self.spread:.1f} ({self.z:+.1f} standard deviations)."
        )


def held_out(
    problem: Problem, tables: LoopTable | Mapping[str, LoopTable], values, *, draws: int = 200, seed: int = 0
) -> list[HeldOut]:
    """Fits all folds but one, for each of them, and judges how the left-out one is predicted.

    Args:
        problem: as posed for the tables, with plain noise.
        values: the optimum of all data, from which the fits begin.
        draws: synthetic folds that tell what is expected. seed: of these.
    """
    found = folds(problem, tables)
    start = jnp.asarray(values, float)
    scores = np.asarray(_held_out(problem, left_out(problem, found), start, jax.random.key(seed), draws))
    result = []
    for fold, (own, *expected) in zip(found, scores, strict=True):
        below = (1 + np.sum(np.array(expected) <= own)) / (1 + len(expected))
        spread = max(float(np.std(expected)), 1e-9)
        result.append(HeldOut(fold.name, float(own), float(np.mean(expected)), spread, float(below)))
    return result


@eqx.filter_jit
def _held_out(problem: Problem, out, start, key, draws: int):
    problem = least_squares.forward(problem)

    def one(given):
        left, key = given
        train = masked(problem, ~left)
        values = least_squares.descend_one(train, start, steps=_STEPS).values
        score = lambda asked: jnp.sum(jnp.where(left, terms(asked, values), 0.0))
        keys = jax.random.split(key, draws + 1)
        real = drawn(train, values, keys[0], draws)
        made = lax.map(lambda a: score(problem.simulated(*a)), (keys[1:], real), batch_size=_BATCH)
        return jnp.concatenate([score(problem)[None], made])

    return lax.map(one, (out, jax.random.split(key, len(out))))


def _inside(problem: Problem, values) -> Float[Array, " parameters"]:
    """Values moved off the edges of the box, where normal coordinates are infinite."""
    low, width = problem.free.low, problem.free.width
    return low + width * jnp.clip((jnp.asarray(values, float) - low) / width, 1e-6, 1 - 1e-6)


# ------------------------------------------------------------------------------------------------ posterior predictive


@dataclass(frozen=True)
class Predictive:
    """One number of the measured table beside what draws of the calibrated device give; two-sided p-value."""

    name: str
    measured: float
    expected: float
    spread: float
    p_value: float

    @property
    def sentence(self) -> str:
        """The finding in words."""
        return (
            f"The {self.name} is {self.measured:.4g}, where tables made up by the calibrated device have "
            f"{self.expected:.4g} ± {self.spread:.2g} (posterior predictive p = {self.p_value:.2g})."
        )


def posterior_predictive(
    problem: Problem,
    tables: LoopTable | Mapping[str, LoopTable],
    values,
    *,
    draws: Float[Array, "draws parameters"] | int = 400,
    seed: int = 0,
) -> list[Predictive]:
    """Area and form factor of the last period of each loop, and the sum of squared residuals.

    Loops whose inputs are not periodic, or not measured throughout, have no area.

    Args:
        problem: as posed for the tables.
        values: the optimum.
        draws: of the posterior, shape (draws, parameters); or how many to take of its Laplace approximation.
        seed: of the draws and of the tables.
    """
    periods = _periods(problem, tables)
    key, sampling = jax.random.split(jax.random.key(seed))
    if isinstance(draws, int):
        draws = _drawn(problem, jnp.asarray(values, float), sampling, draws)
    numbers, chi2 = _replicated(problem, [rows for _, _, rows in periods], jnp.asarray(draws), key)
    own, made = np.asarray(numbers[0][0]), np.asarray(numbers[1])
    result = []
    for k, (name, _, _) in enumerate(periods):
        for which, quantity in enumerate(("area", "form factor")):
            result.append(_compared(f"{quantity} of {name}", own[k, which], made[:, k, which]))
    squares, expected = (np.asarray(a) for a in chi2)
    result.append(_compared("sum of squared residuals", squares, expected))
    return result


def _compared(name: str, own: np.ndarray | np.floating, made: np.ndarray) -> Predictive:
    above = np.mean(np.concatenate([np.atleast_1d(made >= own), [True]]))
    below = np.mean(np.concatenate([np.atleast_1d(made <= own), [True]]))
    p = min(1.0, 2 * float(min(above, below)))
    return Predictive(name, float(np.mean(own)), float(np.mean(made)), float(np.std(made)), p)


def _periods(problem: Problem, tables) -> list[tuple[str, int, tuple[int, np.ndarray]]]:
    """Name, part and rows of the last period of each loop that has one."""
    named = {"loops": tables} if isinstance(tables, LoopTable) else dict(tables)
    found = []
    for number, part in enumerate(problem.parts):
        assert isinstance(part.data, Loops)
        table, data = named[part.name], part.data.experiment
        if data.x is None or data.y is None:
            continue
        both = np.asarray(data.x.measured & data.y.measured)
        for label in table.labels:
            rows = table.rows(label)
            period = period_of(table.x_set[rows])
            if period and np.all(both[rows[-period:]]):
                name = f"loop {label}" + (f" of {part.name}" if len(named) > 1 else "")
                found.append((name, number, (number, rows[-period:])))
    return found


def period_of(x_set: np.ndarray) -> int:
    """Cycles after which commanded inputs repeat; 0 if they do not."""
    for period in range(4, len(x_set)):
        if np.max(np.abs(x_set[period:] - x_set[:-period])) < _SAME_COMMAND:
            return period
    return 0


@eqx.filter_jit
def _drawn(problem: Problem, values, key, count: int):
    return drawn(least_squares.forward(problem), values, key, count)


@eqx.filter_jit
def _replicated(problem: Problem, periods, draws, key):
    """Metrics of the measured table and of one made up at each draw; chi-square of both at that draw."""

    def metrics(asked: Problem):
        rows = []
        for number, cycles in periods:
            data = asked.parts[number].data.experiment
            x, y = data.x.estimate()[cycles], data.y.estimate()[cycles]
            rows.append(jnp.stack([signed_area(x, y), form_factor(x, y)]))
        return jnp.stack(rows) if rows else jnp.zeros((0, 2))

    def chi2(asked: Problem, values):
        residuals = asked.residuals(values)
        return jnp.sum(jnp.where(jnp.isfinite(residuals), residuals, 0.0) ** 2)

    def one(given):
        values, key = given
        made = problem.simulated(key, values)
        return metrics(made), chi2(problem, values), chi2(made, values)

    made, own, expected = lax.map(one, (draws, jax.random.split(key, len(draws))), batch_size=_BATCH)
    return (metrics(problem)[None], made), (own, expected)

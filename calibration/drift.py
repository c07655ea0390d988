"""Whether a calibrated twin is still valid: a stream of loops tracked by a Kalman filter, with change-point alarms.

Two estimators share one linearization of each loop, its score s and Fisher information F:

    filter   random walk of the parameters; P += Q, then  P^-1 += F,  P^-1 m += F t + s(t),  t the point of
             linearization, iterated. This is the extended Kalman filter in information form, and Fisher scoring with a
             Gaussian prior. The counts are binomial, so their covariance depends on the state; F holds it.
    alarm    generalized likelihood ratio. For each of some possible times of change, the mean of the loops after it
             against all that was known before it: the reference posterior, whose noise counts, and the loops since.

The alarm asks, for each parameter, whether it alone has changed, and once whether any has. Its threshold is laid by
simulation of clean streams, so that false alarms are as rare as `LOOPS_PER_FALSE_ALARM` says. Loops that no values of
the parameters explain are data gone bad (`calibration.bad_data`): they are named first and never move the filter.

Dynamax and cuthbert were considered. The conditional-moments filter of dynamax states this model, but it inverts a
covariance of cells by cells where ours is parameters by parameters, knows no missing cells, and brings TensorFlow
Probability; neither has the alarm. What is left for a library is a dozen lines on `Problem`.

References: Basseville and Nikiforov, Detection of Abrupt Changes (1993), sections 2.4 and 7.2 (GLR, linear models).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import chi2, norm

from calibration import bad_data
from calibration.data import LoopTable
from calibration.likelihood import Experiment, bucketed
from calibration.parameters import unit_of
from calibration.posing import Posed, distinct_offsets, pose
from calibration.problem import Loops, Part, Problem
from twin.loop import AbstractMemristor

LOOPS_PER_FALSE_ALARM = 2000
# Loops after a possible change; the time since the stream began is always among them.
_AGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_STREAMS, _LOOPS = 600, 250
# Steps of the random walk, in standard errors of one loop's own estimate: before an alarm, and after it.
_WALK, _WALK_AFTER_ALARM = 0.1, 1.0
# The twin is evaluated this far inside its boxes, in shares of them.
_INSIDE = 1e-3
_ITERATIONS, _SETTLED = 5, 0.02
# A change of one parameter leaves less than this unexplained, or others are named beside it (p-value).
_REST = 1e-3


@dataclass(frozen=True)
class Reference:
    """What a calibration left: names, mean and covariance of its posterior, and the prior boxes."""

    names: tuple[str, ...]
    mean: np.ndarray
    covariance: np.ndarray
    boxes: dict[str, tuple[float, float]]

    @property
    def width(self) -> np.ndarray:
        """Width of each box."""
        return np.array([self.boxes[name][1] - self.boxes[name][0] for name in self.names])

    @property
    def information(self) -> np.ndarray:
        """Inverse covariance; a uniform box has the variance width^2 / 12, which bounds what is not identified."""
        values, vectors = np.linalg.eigh(self.covariance / np.outer(self.width, self.width))
        inverse = (vectors / np.maximum(values, 1e-14)) @ vectors.T + 12 * np.eye(len(self.names))
        return inverse / np.outer(self.width, self.width)


@dataclass(frozen=True)
class Step:
    """What one loop table said.

    Attributes:
        verdict: "still valid", "recalibrate" or "data bad". reason: "" or what follows "because", in words.
        mean, std: of the filter after this table. own: of this table alone, minus the reference, in standard errors.
        statistic: the largest of the alarm's statistics, as standard deviations of a Gaussian of the same p-value.
        misfit: excess of Pearson's chi-squared over its expectation, in standard deviations.
    """

    verdict: str
    reason: str
    mean: np.ndarray
    std: np.ndarray
    own: np.ndarray
    statistic: float
    misfit: float

    @property
    def sentence(self) -> str:
        """Verdict and reason."""
        return f"{self.verdict} because {self.reason}" if self.reason else self.verdict


class _Change(NamedTuple):
    """A change after `since` loops: statistic, per-parameter g and its covariance P (see `_glr`)."""

    statistic: float
    since: int
    g: np.ndarray
    cov: np.ndarray


@dataclass
class Tracker:
    """Tracks a stream of loop tables against a reference calibration.

    Args:
        device: as it was calibrated; supplies every parameter that is not free.
        reference: posterior of that calibration.
        threshold: of the alarm, in standard deviations; 0 to have it laid by the first loop.

    Everything else is the state that `resumed` restores.

    Example:
        >>> tracker = Tracker(device, Reference(names, mean, covariance, boxes))
        >>> print(tracker.update(read_table("today.csv")).sentence)
    """

    device: AbstractMemristor
    reference: Reference
    threshold: float = 0.0
    loops: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    covariance: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    scale: np.ndarray | None = None
    history: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    older: tuple[np.ndarray, np.ndarray] | None = None
    alarm: dict[str, Any] | None = None
    lengths: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        self._posed: tuple[np.ndarray, Problem, Problem] | None = None
        if not self.mean.size:
            self.mean = np.array(self.reference.mean, float)
            self.covariance = np.linalg.inv(self.reference.information)

    # -------------------------------------------------------------------------------------------- one table

    def update(self, table: LoopTable) -> Step:
        """Takes one table in; says whether the twin is still valid, or what is wrong."""
        structure = bad_data.missing(table, self.lengths)
        if structure:
            self.loops += 1
            return self._bad(structure)
        step = self.take(self.problem(table), table)
        if step.verdict != "data bad":
            self.lengths = {label: len(table.rows(label)) for label in table.labels}
        return step

    def take(self, problem: Problem, table: LoopTable) -> Step:
        """The same for a problem that is posed; `table` has its settings, by which bad data are recognized."""
        self.loops += 1
        look = lambda values: bad_data.look(problem, np.minimum(np.maximum(values, self._low), self._high))
        misfit, change = look(self.mean).misfit, None
        at_reference = look(self.reference.mean)
        information = at_reference.information
        # A reference at the edge of its box is linearized just inside of it.
        score = at_reference.score + information @ (at_reference.values - self.reference.mean)
        self._learn_scale(information)
        alarmed = self.alarm is not None
        self.history.append((self.loops, information, score))
        if not alarmed:
            change = self._largest_change()
        alarming = change is not None and change.statistic > self.threshold
        if alarming or not misfit < bad_data.SUSPICIOUS:
            # Before data are called bad, the parameters may take any values: a drift explains its own misfit.
            free, best = bad_data.refit(look, self.mean, np.diag(12 / self.reference.width**2))
            misfit = best.misfit
            if why := bad_data.explain(table, look, (self.mean, free), best):
                self.history.pop()
                return self._bad(why, misfit)
        if alarming:
            self._raise(change)
        self._forget()
        self._filter(look, jump=self.alarm is not None and not alarmed)
        own = np.linalg.solve(information + np.diag(12 / self.reference.width**2), score)
        statistic = change.statistic if change else self._said()[0]
        verdict, reason = ("still valid", "") if self.alarm is None else ("recalibrate", self._said()[1])
        std = np.sqrt(np.diag(self.covariance))
        return Step(verdict, reason, self.mean.copy(), std, own / self.scale, float(statistic), float(misfit))

    def adopt(self, posed: Posed, table: LoopTable) -> "Tracker":
        """Takes over a device that was emulated for this table and these boxes before."""
        self._posed = (distinct_offsets([table]), posed.problem, posed.reference)
        return self

    def problem(self, table: LoopTable) -> Problem:
        """The reference's question about another table; one device, emulated once, serves all with the same offsets."""
        own = distinct_offsets([table])
        if self._posed is None or not all(np.any(np.all(self._posed[0] == row, axis=1)) for row in own):
            self.adopt(pose(self.device, table, self.reference.boxes), table)
        assert self._posed is not None
        offsets, template, slow = self._posed
        window = "window_cycles" in self.reference.names
        data = bucketed(slow.parts[0].device, Experiment.from_table(table, offsets), own_window=window)
        part = Part("loops", template.parts[0].device, Loops(data), len(data.x_set))
        return dataclasses.replace(template, parts=(part,))

    # -------------------------------------------------------------------------------------------- the filter

    def _filter(self, look, jump: bool) -> None:
        assert self.scale is not None
        prior = self.covariance + np.diag((_WALK if self.alarm is None else _WALK_AFTER_ALARM) * self.scale) ** 2
        if jump:
            # A change was found: the prior no longer excludes what the loops since then say.
            moved = self._moved()[0]
            prior = prior + np.outer(moved, moved)
        information = np.linalg.inv(prior)
        mean = self.mean
        for _ in range(_ITERATIONS):
            before, cells = mean, look(mean)
            posterior = information + cells.information
            mean = np.linalg.solve(posterior, information @ self.mean + cells.information @ cells.values + cells.score)
            if np.all(np.abs(mean - before) < _SETTLED * self.scale):
                break
        self.mean, self.covariance = mean, np.linalg.inv(posterior)

    def _learn_scale(self, information: np.ndarray) -> None:
        """Standard errors of one loop's own estimate, and the threshold that goes with them; from the first loop."""
        if self.scale is None:
            alone = information + np.diag(12 / self.reference.width**2)
            self.scale = np.sqrt(np.diag(np.linalg.inv(alone)))
            self.threshold = self.threshold or threshold(self.reference.information, information)

    @property
    def _low(self) -> np.ndarray:
        low = np.array([self.reference.boxes[name][0] for name in self.reference.names])
        return low + _INSIDE * self.reference.width

    @property
    def _high(self) -> np.ndarray:
        high = np.array([self.reference.boxes[name][1] for name in self.reference.names])
        return high - _INSIDE * self.reference.width

    # -------------------------------------------------------------------------------------------- the alarm

    def _sums(self, entries) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.reference.names)
        start = (np.zeros((n, n)), np.zeros(n))
        return sum((f for _, f, _ in entries), start[0]), sum((s for _, _, s in entries), start[1])

    def _largest_change(self) -> _Change:
        ages = [a for a in _AGES if a < len(self.history)] + [len(self.history)]
        older = self.older or self._sums([])
        # Sums over the last a loops, for every a.
        last = [np.cumsum(np.stack([entry[k] for entry in self.history[::-1]]), axis=0) for k in (1, 2)]
        after = [sums[np.array(ages) - 1] for sums in last]
        before = [whole + sums[-1] - some for whole, sums, some in zip(older, last, after, strict=True)]
        for k in (0, 1):  # the last age stands for a change before the first loop
            after[k][-1], before[k][-1] = after[k][-1] + older[k], 0.0
        g, cov = _glr(self.reference.information + before[0], before[1], *after)
        largest, total = _statistics(g, cov)
        found = np.maximum(largest, _as_gaussian(total, g.shape[-1]))
        best = int(np.argmax(found))
        since = self.history[-ages[best]][0] if best < len(ages) - 1 else 1
        return _Change(float(found[best]), since, g[best], cov[best])

    def _raise(self, change: _Change) -> None:
        before = [entry for entry in self.history if entry[0] < change.since]
        after = [entry for entry in self.history if entry[0] >= change.since]
        older = self.older or self._sums([])
        # A change since the first loop leaves nothing before it but the reference.
        f0, s0 = self._sums(before)
        f1, s1 = self._sums(after)
        if change.since == 1:
            f1, s1 = f1 + older[0], s1 + older[1]
        else:
            f0, s0 = f0 + older[0], s0 + older[1]
        self.alarm = {
            "loop": self.loops, "since": change.since, "members": _members(change.g, change.cov),
            "before": [self.reference.information + f0, s0], "after": [f1, s1],
        }  # fmt: skip

    def _forget(self) -> None:
        """Loops too old for a change of their own are summed; those after an alarm go to its evidence."""
        if self.alarm is not None:
            if self.alarm["loop"] < self.loops:
                _, f, s = self.history[-1]
                self.alarm["after"] = [self.alarm["after"][0] + f, self.alarm["after"][1] + s]
            self.history = []
            return
        while len(self.history) > _AGES[-1] + 1:
            _, f, s = self.history.pop(0)
            older = self.older or self._sums([])
            self.older = (older[0] + f, older[1] + s)

    def _moved(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Change of each named parameter and its standard error, the others unchanged; and which are named."""
        assert self.alarm is not None
        g, cov = _glr(*self.alarm["before"], *self.alarm["after"])
        members = list(self.alarm["members"])
        moved, errors = np.zeros(len(g)), np.zeros(len(g))
        inverse = np.linalg.inv(cov[np.ix_(members, members)])
        moved[members], errors[members] = inverse @ g[members], np.sqrt(np.diag(inverse))
        return moved, errors, members

    def _said(self) -> tuple[float, str]:
        assert self.alarm is not None
        moved, errors, members = self._moved()
        names, mean = self.reference.names, self.reference.mean
        parts = [
            f"`{names[k]}` has moved by {_amount(names[k], moved[k], mean[k])} "
            f"({abs(moved[k]) / errors[k]:.1f} standard errors)"
            for k in members
        ]
        largest = max(abs(moved[k]) / errors[k] for k in members)
        return largest, " and ".join(parts) + f" since loop {self.alarm['since']}"

    def _bad(self, why: str, misfit: float = float("nan")) -> Step:
        nothing = np.full(len(self.mean), np.nan)
        return Step("data bad", why, self.mean.copy(), np.sqrt(np.diag(self.covariance)), nothing, float("nan"), misfit)

    # -------------------------------------------------------------------------------------------- kept between runs

    def state(self) -> dict[str, Any]:
        """Everything a later `resumed` needs, as numbers and lists."""

        def plain(value):
            if isinstance(value, list | tuple):
                return [plain(entry) for entry in value]
            return value.tolist() if isinstance(value, np.ndarray) else value

        alarm = None if self.alarm is None else {key: plain(value) for key, value in self.alarm.items()}
        return {
            "names": list(self.reference.names), "reference": plain(self.reference.mean), "loops": self.loops,
            "threshold": self.threshold, "mean": plain(self.mean), "covariance": plain(self.covariance),
            "scale": None if self.scale is None else plain(self.scale), "history": plain(self.history),
            "older": None if self.older is None else plain(self.older), "alarm": alarm, "lengths": self.lengths,
        }  # fmt: skip

    @classmethod
    def resumed(cls, device: AbstractMemristor, reference: Reference, state: Mapping[str, Any]) -> "Tracker":
        """The tracker that left this state.

        Raises:
            ValueError: the state belongs to another reference.
        """
        if tuple(state["names"]) != reference.names or not np.allclose(state["reference"], reference.mean, rtol=1e-9):
            raise ValueError("the stream was tracked against another calibration; start a new one for this reference.")
        pair = lambda v: (np.array(v[0]), np.array(v[1]))
        alarm = state["alarm"]
        if alarm is not None:
            alarm = {**alarm, "before": list(pair(alarm["before"])), "after": list(pair(alarm["after"]))}
        return cls(
            device, reference, threshold=state["threshold"], loops=state["loops"], mean=np.array(state["mean"]),
            covariance=np.array(state["covariance"]),
            scale=None if state["scale"] is None else np.array(state["scale"]),
            history=[(k, *pair(rest)) for k, *rest in state["history"]],
            older=None if state["older"] is None else pair(state["older"]), alarm=alarm,
            lengths=dict(state["lengths"]),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the statistic


def _glr(j0, b0, j1, b1) -> tuple[np.ndarray, np.ndarray]:
    """Difference d of two estimates, as g = P d with P the inverse covariance of d.

    Estimates are given by information j and information times mean b. Where loops say nothing about a direction, j1 is
    singular there; g and P = j0 (j0 + j1)^-1 j1 vanish, and nothing is inverted that cannot be. Under no change
    g ~ N(0, P). The change of parameter k alone is g_k / P_kk, with variance 1 / P_kk.
    """
    both = np.linalg.inv(j0 + j1)
    g = _times(j0 @ both, b1) - _times(j1 @ both, b0)
    cov = j0 @ both @ j1
    return g, 0.5 * (cov + np.swapaxes(cov, -1, -2))


def _times(matrix, vector):
    return np.einsum("...ij,...j->...i", matrix, vector)


def _statistics(g: np.ndarray, cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest |z_k|, z_k = g_k / sqrt(P_kk) that of parameter k alone, and the chi-squared of all together."""
    scale = np.sqrt(np.maximum(np.einsum("...kk->...k", cov), 1e-300))
    z = g / scale
    values, vectors = np.linalg.eigh(cov / (scale[..., :, None] * scale[..., None, :]))
    turned = np.einsum("...ji,...j->...i", vectors, z)
    enough = values > 1e-9 * values[..., -1:]
    total = np.sum(np.where(enough, turned**2 / np.where(enough, values, 1.0), 0.0), axis=-1)
    return np.max(np.abs(z), axis=-1), total


def _as_gaussian(total: np.ndarray, freedom: int) -> np.ndarray:
    """The |z| that is as improbable as a chi-squared."""
    p = chi2.logsf(total, freedom) - np.log(2)
    return np.where(p > -600, norm.isf(np.exp(np.maximum(p, -600))), np.sqrt(total))


def _members(g: np.ndarray, cov: np.ndarray) -> list[int]:
    """Parameters whose change explains g: the best one, then those that explain what is left."""
    found = [int(np.argmax(np.abs(g) / np.sqrt(np.diag(cov))))]
    total = float(g @ np.linalg.pinv(cov, rcond=1e-9, hermitian=True) @ g)
    while len(found) < min(3, len(g)):
        explained = lambda s: float(g[s] @ np.linalg.solve(cov[np.ix_(s, s)], g[s]))
        rest = total - explained(found)
        others = [k for k in range(len(g)) if k not in found]
        gains = [explained([*found, k]) - explained(found) for k in others]
        if chi2.sf(rest, len(g) - len(found)) > _REST or chi2.sf(max(gains), 1) > _REST:
            break
        found.append(others[int(np.argmax(gains))])
    return found


def threshold(reference: np.ndarray, information: np.ndarray, loops: float = LOOPS_PER_FALSE_ALARM) -> float:
    """The threshold at which clean streams alarm once in so many loops.

    Streams of loops with one Fisher information are simulated from references of the given information, each stream
    with an error of the reference of its own, until the first alarm. Fixed seed.

    Args:
        reference: information of the reference. information: of one loop.
        loops: loops for one false alarm.
    """
    rng = np.random.default_rng(0)
    n = len(reference)
    root = np.linalg.cholesky(information + 1e-12 * np.diag(np.diag(information)))
    wrong = np.linalg.solve(np.linalg.cholesky(reference).T, rng.normal(size=(n, _STREAMS))).T
    scores = rng.normal(size=(_STREAMS, _LOOPS, n)) @ root.T + (wrong @ information)[:, None, :]
    sums = np.concatenate([np.zeros((_STREAMS, 1, n)), np.cumsum(scores, axis=1)], axis=1)
    highest = np.zeros((2, _STREAMS, _LOOPS))
    for t in range(1, _LOOPS + 1):
        for age in [a for a in _AGES if a < t] + [t]:
            before, after = sums[:, t - age], sums[:, t] - sums[:, t - age]
            found = _statistics(*_glr(reference + (t - age) * information, before, age * information, after))
            highest[:, :, t - 1] = np.maximum(highest[:, :, t - 1], found)
    record = np.maximum.accumulate(np.maximum(highest[0], _as_gaussian(highest[1], n)), axis=1)
    # An alarm ends its stream: loops that all streams lived through, over streams that alarmed.
    for level in np.arange(3.0, 6.5, 0.02):
        alarmed = record > level
        if np.sum(~alarmed) >= loops * np.sum(alarmed[:, -1]):
            return float(level)
    return 6.5


def _amount(name: str, moved: float, value: float) -> str:
    """A change in the words of its parameter: scales in percent, numbers with a unit in it."""
    unit = unit_of(name)
    if name.startswith("rabi_scale") and value:
        return f"{100 * moved / value:+.2g} %"
    return f"{moved:+.3g} {unit}".rstrip()

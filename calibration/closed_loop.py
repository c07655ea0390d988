"""Optimization where the numbers come from the real device: ask for points, measure them, tell what was found.

What is measured at a point is a vector of residuals, such as y - (1 - r) x for a list of commands, with standard
errors; the search makes the sum of their squares small. A search is a function of what it was told: told the same again
it asks the same, which is how a laboratory goes on the next day (`AbstractSearch.replay`).
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

# Share of a box by which a told point may differ from the asked one.
_SAME = 1e-6


class Round(NamedTuple):
    """What was measured at the points that were asked for together.

    Attributes:
        points: values of the parameters, shape (points, parameters).
        measured: residuals, shape (points, residuals). standard_errors: of these, the same shape; 0 without noise.
    """

    points: Float[np.ndarray, "points parameters"]
    measured: Float[np.ndarray, "points residuals"]
    standard_errors: Float[np.ndarray, "points residuals"]

    @property
    def values(self) -> Float[np.ndarray, " points"]:
        """Sums of squared residuals, less what noise adds to them."""
        return np.sum(self.measured**2 - self.standard_errors**2, axis=1)


class AbstractSearch(abc.ABC):
    """A search over a box; implementations set `names`, `low`, `high` and an empty `history`.

    Example:
        >>> while not search.done:
        ...     points = search.ask()
        ...     search.tell(points, *measure(points))
        >>> search.named(search.best)
    """

    names: tuple[str, ...]
    low: Float[np.ndarray, " parameters"]
    high: Float[np.ndarray, " parameters"]
    history: list[Round]

    @property
    @abc.abstractmethod
    def best(self) -> Float[np.ndarray, " parameters"]:
        """The values to use, from all that was told."""

    @property
    @abc.abstractmethod
    def done(self) -> str:
        """Why nothing more needs to be measured; empty while the search goes on."""

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain numbers that the search was made with: another search must not be told its rounds."""

    @abc.abstractmethod
    def _shares(self) -> Float[np.ndarray, "points parameters"]:
        """What to measure next, as shares of the box; the same until told."""

    @abc.abstractmethod
    def _learn(self, told: Round) -> None:
        """Takes in a round, which stands at the end of the history already."""

    def ask(self) -> Float[np.ndarray, "points parameters"]:
        """Points to measure next, within the bounds; asked twice, they are the same."""
        return np.clip(self.low + (self.high - self.low) * self._shares(), self.low, self.high)

    def tell(self, points, measured, standard_errors) -> None:
        """What was measured at the points of `ask`.

        Args:
            points: as asked for, shape (points, parameters).
            measured: residuals, shape (points, residuals).
            standard_errors: of these; one shape, or a number for all.

        Raises:
            ValueError: other points than those asked for, unlike shapes, or numbers that are not finite.
        """
        points, measured, asked = np.asarray(points, float), np.asarray(measured, float), self.ask()
        if points.shape != asked.shape:
            raise ValueError(
                f"`points` have the shape {points.shape}, but {asked.shape} was asked for; tell all of them."
            )
        far = np.abs(points - asked) > _SAME * (self.high - self.low)
        if np.any(far | ~np.isfinite(points)):
            row, column = np.argwhere(far | ~np.isfinite(points))[0]
            raise ValueError(
                f"`{self.names[column]}` of point {row} is {points[row, column]:g}, but {asked[row, column]:g} was "
                "asked for; measure there."
            )
        residuals = self.history[0].measured.shape[1] if self.history else measured.shape[-1] if measured.ndim else 0
        if measured.shape != (len(points), residuals) or not residuals:
            raise ValueError(
                f"`measured` has the shape {measured.shape}, but must have one row a point and one column a residual, "
                f"({len(points)}, {residuals or 'residuals'}); tell a point's residuals together."
            )
        try:
            errors = np.broadcast_to(np.asarray(standard_errors, float), measured.shape)
        except ValueError:
            shape = np.shape(standard_errors)
            raise ValueError(f"`standard_errors` have the shape {shape}, but must fit {measured.shape}.") from None
        if not np.all(np.isfinite(measured)):
            raise ValueError("`measured` holds numbers that are not finite; measure these points again.")
        if not np.all(np.isfinite(errors) & (errors >= 0)):
            raise ValueError("`standard_errors` must be finite and not negative; 0 stands for no noise.")
        self.history.append(Round(points, measured, np.array(errors)))
        self._learn(self.history[-1])

    def named(self, values: Float[np.ndarray, " parameters"]) -> dict[str, float]:
        """{name: value}, for `control.apply_commands` or an instrument."""
        return {name: float(value) for name, value in zip(self.names, values, strict=True)}

    def replay(self, rounds: Sequence[Round]) -> None:
        """Tells a fresh search what another of the same making was told.

        Raises:
            ValueError: the search is not fresh, or asks for other points: it was made otherwise.
        """
        if self.history:
            raise ValueError(f"this search has been told {len(self.history)} rounds already; make a fresh one.")
        for number, told in enumerate(rounds, 1):
            try:
                self.tell(*told)
            except ValueError as error:
                raise ValueError(f"round {number} does not fit: {error} Make the search as it was made.") from None


def box_of(boxes: Mapping[str, tuple[float, float]]) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """(names, low, high) of {name: (low, high)}.

    Raises:
        ValueError: no names, or a box that is empty or not finite.
    """
    if not boxes:
        raise ValueError("at least one parameter must be free; name it with its bounds: {'amplitude_1': (0.8, 1.2)}.")
    low, high = (np.array([box[k] for box in boxes.values()], float) for k in (0, 1))
    for name, a, b in zip(boxes, low, high, strict=True):
        if not (np.isfinite(a) and np.isfinite(b) and a < b):
            raise ValueError(f"the bounds of `{name}` must be finite with low below high, but are [{a:g}, {b:g}].")
    return tuple(boxes), low, high


def start_share(names, low, high, start: Mapping[str, float] | None) -> Float[np.ndarray, " parameters"]:
    """Where a search begins, as shares of the box; the middle by default.

    Raises:
        ValueError: a start that lacks a parameter, or lies outside its bounds.
    """
    if start is None:
        return np.full(len(names), 0.5)
    if set(start) != set(names):
        raise ValueError(f"`start` names {sorted(start)}, but the bounds name {sorted(names)}; give each its value.")
    values = np.array([start[name] for name in names], float)
    for name, value, a, b in zip(names, values, low, high, strict=True):
        if not a <= value <= b:
            raise ValueError(f"`start` has {name} = {value:g} outside its bounds [{a:g}, {b:g}]; move one of them.")
    return (values - low) / (high - low)


class CmaEs(AbstractSearch):
    """Covariance matrix adaptation, without a model and without gradients (library `cmaes`).

    Args:
        boxes: {name: (low, high)}.
        start: where it begins; the middle by default.
        sigma: first standard deviation, as a share of the box.
        population: points of a generation; None leaves it to the library.
        seed: of the points.

    References: Hansen, arXiv:1604.00772 (2016).
    """

    def __init__(self, boxes, *, start=None, sigma: float = 0.25, population: int | None = None, seed: int = 0):
        from cmaes import CMA

        self.names, self.low, self.high = box_of(boxes)
        self.history: list[Round] = []
        middle = start_share(self.names, self.low, self.high, start)
        self._made = {"sigma": sigma, "population": population, "seed": seed, "start": middle.tolist()}
        bounds = np.tile([0.0, 1.0], (len(self.names), 1))
        self._library = CMA(mean=middle, sigma=sigma, bounds=bounds, seed=seed, population_size=population)
        self._generation = self._drawn()

    @property
    def best(self) -> Float[np.ndarray, " parameters"]:
        """Mean of the distribution: single points are chosen by their noise."""
        return self.low + (self.high - self.low) * np.clip(self._library.mean, 0.0, 1.0)

    @property
    def done(self) -> str:
        """The library's own criteria."""
        return "the distribution does not move any more" if self._library.should_stop() else ""

    @property
    def settings(self) -> dict[str, Any]:
        return self._made

    def _shares(self) -> Float[np.ndarray, "points parameters"]:
        return self._generation

    def _learn(self, told: Round) -> None:
        self._library.tell(list(zip(self._generation, told.values.tolist(), strict=True)))
        self._generation = self._drawn()

    def _drawn(self) -> Float[np.ndarray, "points parameters"]:
        return np.array([self._library.ask() for _ in range(self._library.population_size)])

"""What a calibration asks: which parameters are free, in which boxes, and which tables speak about them.

A table is a part. Parts share every free parameter except those named ``NAME@PART``, which belong to one part alone
(say, the detuning of each day). The prior is uniform in the boxes; searches and samplers walk in unbounded coordinates.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from calibration.likelihood import Experiment, Prediction, measured, predict, replace_observations
from calibration.observations import Noise, Observations
from calibration.parameters import FreeParameters, method_of, with_ion, with_parameters
from calibration.scans import Scan
from twin.emulator import EmulatedSeries
from twin.loop import AbstractMemristor
from twin.memristor import ClosedForm, IonMemristor
from twin.planning import forward_mode

NOISE_PARAMETERS = ("overdispersion", "outlier_share")
"""Free parameters of the noise, not of the device."""


# Methods without a solver: all directions of a derivative are one batch.
_LOOPLESS = (EmulatedSeries, ClosedForm, type(None))


@runtime_checkable
class Data(Protocol):
    """What a part holds: settings and measured columns of a table."""

    def predicted(
        self, device: AbstractMemristor, own_window: bool
    ) -> list[tuple[Observations, Float[Array, " rows"]]]:
        """The measured columns with the probabilities that a device gives them."""
        ...

    def prediction(self, device: AbstractMemristor, own_window: bool) -> Any:
        """Everything that a device says about the rows."""
        ...

    @property
    def observed(self) -> tuple[Observations, ...]:
        """The measured columns."""
        ...

    def with_observed(self, values: Sequence[Array]) -> "Data":
        """Other measured numbers, column by column."""
        ...

    def simulated(self, key: PRNGKeyArray, device: AbstractMemristor, own_window: bool, noise: Noise) -> "Data":
        """The same settings measured on a device."""
        ...


def observed_again(experiment: Experiment, values: Sequence[Array]) -> Experiment:
    """The same settings with other measured numbers, column by column."""
    names = [name for name in ("x", "y", "m") if getattr(experiment, name) is not None]
    return replace_observations(experiment, **dict(zip(names, values, strict=True)))


def simulated(
    key: PRNGKeyArray,
    data: Experiment,
    predicted: Callable[[Experiment], Prediction],
    source: str,
    noise: Noise,
) -> Experiment:
    """The same settings measured on what predicts them; the memory follows the simulated inputs unless recorded."""
    keys = jax.random.split(key, 3)
    prediction = predicted(data)
    if data.x is not None:
        data = replace_observations(data, x=data.x.sample(keys[0], prediction.p_x, noise))
        if data.r_set is None and source == "measured":
            prediction = predicted(data)
    if data.y is not None:
        data = replace_observations(data, y=data.y.sample(keys[1], prediction.p_y, noise))
    if data.m is not None:
        data = replace_observations(data, m=data.m.sample(keys[2], prediction.p_m, noise))
    return data


class Loops(eqx.Module):
    """A loop table as a part."""

    experiment: Experiment

    def predicted(
        self, device: AbstractMemristor, own_window: bool
    ) -> list[tuple[Observations, Float[Array, " rows"]]]:
        return measured(self.experiment, predict(device, self.experiment, own_window=own_window))

    def prediction(self, device: AbstractMemristor, own_window: bool) -> Prediction:
        """Everything that a device says about the rows."""
        return predict(device, self.experiment, own_window=own_window)

    @property
    def observed(self) -> tuple[Observations, ...]:
        """The measured columns."""
        return self.experiment.columns

    def with_observed(self, values: Sequence[Array]) -> "Loops":
        """Other measured numbers, column by column."""
        return Loops(observed_again(self.experiment, values))

    def simulated(self, key: PRNGKeyArray, device: AbstractMemristor, own_window: bool, noise: Noise) -> "Loops":
        """The same settings measured on a device; the memory follows the simulated inputs where nothing recorded it."""
        predicted = lambda data: predict(device, data, own_window=own_window)
        return Loops(simulated(key, self.experiment, predicted, device.source, noise))


class Scanned(eqx.Module):
    """An auxiliary scan as a part; always solved by the device's full dynamics."""

    scan: Scan

    def predicted(
        self, device: AbstractMemristor, own_window: bool
    ) -> list[tuple[Observations, Float[Array, " rows"]]]:
        return [(self.scan.observed, self.prediction(device, own_window))]

    def prediction(self, device: AbstractMemristor, own_window: bool) -> Float[Array, " rows"]:
        """Probability of the counted outcome of each row."""
        del own_window  # a scan has no memory
        assert isinstance(device, IonMemristor)
        return self.scan.predict(device)

    @property
    def observed(self) -> tuple[Observations, ...]:
        """The one measured column."""
        return (self.scan.observed,)

    def with_observed(self, values: Sequence[Array]) -> "Scanned":
        """Other measured numbers."""
        (value,) = values
        return Scanned(dataclasses.replace(self.scan, observed=dataclasses.replace(self.scan.observed, value=value)))

    def simulated(self, key: PRNGKeyArray, device: AbstractMemristor, own_window: bool, noise: Noise) -> "Scanned":
        """The same settings measured on a device."""
        return self.with_observed([self.scan.observed.sample(key, self.prediction(device, own_window), noise)])


class Part(eqx.Module):
    """One table with the device that is to explain it, planned or emulated for the boxes.

    `rows` counts those of the table; arrays may hold filler after them. A part that `shares` those of another has the
    parameters ``NAME@OTHER``; without, its own. Of a register, each of the `ions` may have ``NAME@ION``.
    """

    name: str = eqx.field(static=True)
    device: AbstractMemristor
    data: Data
    rows: Int[Array, ""] = eqx.field(converter=lambda rows: jnp.asarray(rows, int))
    shares: str = eqx.field(static=True, default="")
    ions: tuple[str, ...] = eqx.field(static=True, default=())


class Problem(eqx.Module):
    """Free parameters, the tables that speak about them, and how measured numbers scatter.

    Attributes:
        free: names and boxes; a name with ``@PART`` belongs to that part alone.
        parts: tables with their devices.
        noise: the law of the scatter; its parameters may be free as well.
    """

    free: FreeParameters
    parts: tuple[Part, ...]
    noise: Noise = eqx.field(default_factory=Noise)

    @property
    def names(self) -> tuple[str, ...]:
        """Free parameters, in the order of every array of values."""
        return self.free.names

    def device(self, part: Part, values: Float[Array, " parameters"]) -> AbstractMemristor:
        """The device of a part at some values."""
        own, of_ions = {}, {}
        for name, value in zip(self.names, values, strict=True):
            base, _, place = name.partition("@")
            if base in NOISE_PARAMETERS:
                continue
            if place in part.ions:
                of_ions.setdefault(base, {})[place] = value
            elif place in ("", part.shares or part.name):
                own[base] = value
        rows = {base: jnp.stack([of_ion[ion] for ion in part.ions]) for base, of_ion in of_ions.items()}
        return with_parameters(part.device, own | rows)

    def noise_at(self, values: Float[Array, " parameters"]) -> Noise:
        """The noise at some values."""
        own = {name: values[k] for k, name in enumerate(self.names) if name in NOISE_PARAMETERS}
        return dataclasses.replace(self.noise, **own)

    def own_window(self, part: Part) -> bool:
        """Whether the device's window, rather than the table's, supplies the transfers of a part."""
        places = ("", part.shares or part.name, *part.ions)
        split = (name.partition("@") for name in self.names)
        return any(base == "window_cycles" and place in places for base, _, place in split)

    def predicted(self, values: Float[Array, " parameters"]) -> list[tuple[Observations, Float[Array, " rows"]]]:
        """Measured columns of all parts with their model probabilities."""
        return [
            pair
            for part in self.parts
            for pair in part.data.predicted(self.device(part, values), self.own_window(part))
        ]

    def log_likelihood(self, values: Float[Array, " parameters"]) -> Float[Array, ""]:
        """Of all tables, nats."""
        noise = self.noise_at(values)
        return sum((column.log_likelihood(p, noise) for column, p in self.predicted(values)), jnp.zeros(()))

    def log_density(self, z: Float[Array, " parameters"]) -> Float[Array, ""]:
        """Log posterior density in the coordinates of `FreeParameters.from_normal`, where the prior is normal."""
        return self.log_likelihood(self.free.from_normal(z)) - 0.5 * jnp.sum(z**2)

    def deviance_residuals(self, values: Float[Array, " parameters"]) -> Float[Array, " cells"]:
        """Residuals whose half sum of squares is the negative log-likelihood up to a constant; plain noise only."""
        return jnp.concatenate([column.deviance_residual(p) for column, p in self.predicted(values)])

    def cells(
        self, values: Float[Array, " parameters"]
    ) -> tuple[Float[Array, " cells"], Float[Array, " cells"], Bool[Array, " cells"]]:
        """Probability, variance of its estimate, and presence, of every cell."""
        noise, pairs = self.noise_at(values), self.predicted(values)
        p = jnp.concatenate([p for _, p in pairs])
        variance = jnp.concatenate([column.variance(p, noise) for column, p in pairs])
        return p, variance, jnp.concatenate([column.measured for column, _ in pairs])

    def inliers(self, values: Float[Array, " parameters"]) -> Float[Array, " cells"]:
        """Probability of each cell to be no outlier, under that noise; 1 where not measured."""
        noise = self.noise_at(values)
        return jnp.concatenate([column.inliers(p, noise) for column, p in self.predicted(values)])

    def residuals(self, values: Float[Array, " parameters"]) -> Float[Array, " cells"]:
        """Standardized residuals; NaN where not measured."""
        noise = self.noise_at(values)
        return jnp.concatenate([column.residual(p, noise) for column, p in self.predicted(values)])

    def slopes(self, values: Float[Array, " parameters"]) -> Float[Array, "cells parameters"]:
        """Derivatives of the cells' probabilities."""

        def of(part: Part) -> Array:
            pairs = lambda v: part.data.predicted(self.device(part, v), self.own_window(part))
            p = lambda v: jnp.concatenate([p for _, p in pairs(v)])
            # A register's derivatives are made once for all directions (`calibration.register`).
            if part.ions or isinstance(method_of(part.device), _LOOPLESS):
                return jax.jacfwd(p)(values)
            # One direction after another: the loop over solver stages is slow under vmap.
            return lax.map(lambda v: jax.jvp(p, (values,), (v,))[1], jnp.eye(values.size)).T

        return jnp.concatenate([of(part) for part in self.parts])

    def information(self, values: Float[Array, " parameters"]) -> Float[Array, "parameters parameters"]:
        """Expected Fisher information of independent cells with probability p and variance v.

            F = sum (dp/dtheta)(dp/dtheta)^T / v,   plus (dv/drho)^2 / 2 v^2 for an overdispersion rho,
            plus cells / (s (1 - s)) for an outlier share s

        Cells whose probability is exactly 0 or 1 carry no weight: variance and slope vanish together.
        """
        _, variance, there = self.cells(values)
        slopes = self.slopes(values)
        weights = jnp.where(there & (variance > 0), 1 / jnp.where(variance > 0, variance, 1.0), 0.0)
        fisher = slopes.T @ (weights[:, None] * slopes)
        for k, name in enumerate(self.names):
            if name == "outlier_share":
                # A count of outliers among the cells that are there.
                share = values[k]
                fisher = fisher.at[k, k].add(jnp.sum(there) / (share * (1 - share)))
            if name == "overdispersion":
                direction = jnp.zeros_like(values).at[k].set(1.0)
                change = jax.jvp(lambda v: self.cells(v)[1], (values,), (direction,))[1]
                fisher = fisher.at[k, k].add(0.5 * jnp.sum((weights * change) ** 2))
        return fisher

    @property
    def n_data(self) -> int:
        """Number of measured cells."""
        return sum(int(np.sum(column.measured)) for part in self.parts for column in part.data.observed)

    @property
    def observed(self) -> tuple[tuple[Array, ...], ...]:
        """Measured numbers, part by part and column by column."""
        return tuple(tuple(column.value for column in part.data.observed) for part in self.parts)

    def with_observed(self, observed: Sequence[Sequence[Array]]) -> "Problem":
        """The same question about other measured numbers."""
        return self._with_data([part.data.with_observed(v) for part, v in zip(self.parts, observed, strict=True)])

    def simulated(self, key: PRNGKeyArray, values: Float[Array, " parameters"]) -> "Problem":
        """The same question about numbers that a device with these values could have shown."""
        noise = self.noise_at(values)
        return self._with_data(
            [
                part.data.simulated(k, self.device(part, values), self.own_window(part), noise)
                for k, part in zip(jax.random.split(key, len(self.parts)), self.parts, strict=True)
            ]
        )

    def _with_data(self, data: Sequence[Data]) -> "Problem":
        parts = tuple(dataclasses.replace(part, data=d) for part, d in zip(self.parts, data, strict=True))
        return dataclasses.replace(self, parts=parts)

    def with_devices(self, change: Callable[[AbstractMemristor, Data], AbstractMemristor]) -> "Problem":
        """The same question with the device of each part changed."""
        parts = tuple(dataclasses.replace(part, device=change(part.device, part.data)) for part in self.parts)
        return dataclasses.replace(self, parts=parts)


class Informed(NamedTuple):
    """Everything first-order about a problem at one point, cell by cell.

    Attributes:
        information: Fisher information. slopes: of the cells' probabilities p. weights: one over their variances.
        residuals: standardized; NaN where not measured.
    """

    information: Float[Array, "parameters parameters"]
    slopes: Float[Array, "cells parameters"]
    p: Float[Array, " cells"]
    weights: Float[Array, " cells"]
    residuals: Float[Array, " cells"]


@eqx.filter_jit
def informed(problem: Problem, values: Float[Array, " parameters"]) -> Informed:
    """Information, slopes, weights and residuals of a problem at some values."""
    problem = problem.with_devices(lambda device, _: with_ion(device, forward_mode))
    p, variance, there = problem.cells(values)
    weights = jnp.where(there & (variance > 0), 1 / jnp.where(variance > 0, variance, 1.0), 0.0)
    return Informed(problem.information(values), problem.slopes(values), p, weights, problem.residuals(values))

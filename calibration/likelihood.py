"""How probable a loop table is for a device: its rows as runs of the device, and what the device predicts for them."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from calibration.data import LoopTable
from calibration.observations import Noise, Observations
from calibration.parameters import with_window
from twin.emulator import EmulatedSeries
from twin.loop import AbstractMemristor, Settings
from twin.planning import rounded_up


class Experiment(eqx.Module):
    """A loop table in the form a device is run with: runs of pulse 1 that share their settings are listed once.

    Attributes:
        x_set, r_set: commands of each row; `r_set` None if not recorded.
        settings: the distinct pairs of laser offsets, and which of them each row has.
        first_x_set, first_setting: the distinct runs of pulse 1 alone; `first_of` maps rows to them.
        loops: rows of each loop in order, and its memory window (None: the device's own).
        x, y, m: the measured columns; None where the table lacks them. m counts among the shots not assigned to s.
        fed_x: measured input of each row for the feedback; NaN where not measured.
        all_x_measured: no row of `fed_x` is NaN.
    """

    x_set: Float[Array, " rows"]
    settings: Settings
    r_set: Float[Array, " rows"] | None
    first_x_set: Float[Array, " runs"]
    first_setting: Int[Array, " runs"]
    first_of: Int[Array, " rows"]
    loops: tuple[Int[Array, " cycles"], ...]
    windows: tuple[Float[Array, ""], ...] | None
    x: Observations | None
    y: Observations | None
    m: Observations | None
    fed_x: Float[Array, " rows"]
    all_x_measured: bool = eqx.field(static=True)

    @classmethod
    def from_table(cls, table: LoopTable, offsets: Float[np.ndarray, "settings 2"] | None = None) -> "Experiment":
        """Prepares a validated table; `offsets` lists those of several tables that share a device, sorted."""
        own = np.stack([table.detuning_1_set_hz, table.detuning_2_set_hz], axis=1)
        offsets = np.unique(own, axis=0) if offsets is None else offsets
        setting = np.array([np.flatnonzero(np.all(offsets == row, axis=1))[0] for row in own])
        # Laser 2 plays no part in a run of pulse 1 alone: any setting with the same laser 1 will do.
        runs = np.stack([table.x_set, table.detuning_1_set_hz], axis=1)
        _, rows_of_runs, first_of = np.unique(runs, axis=0, return_index=True, return_inverse=True)
        labels = list(dict.fromkeys(table.loop.tolist()))
        rows = [np.flatnonzero(table.loop == label) for label in labels]
        windows = None
        if table.window_cycles is not None:
            windows = tuple(jnp.asarray(table.window_cycles[r[0]], float) for r in rows)
        x = _observations(table, "x")
        return cls(
            x_set=jnp.asarray(table.x_set),
            settings=Settings(offsets[:, 0], offsets[:, 1], jnp.asarray(setting)),
            r_set=None if table.r_set is None else jnp.asarray(table.r_set),
            first_x_set=jnp.asarray(table.x_set[rows_of_runs]),
            first_setting=jnp.asarray(setting[rows_of_runs]),
            first_of=jnp.asarray(first_of.reshape(-1)),
            loops=tuple(jnp.asarray(r) for r in rows),
            windows=windows,
            x=x,
            y=_observations(table, "y"),
            m=_third(table),
            fed_x=jnp.full(len(table), jnp.nan) if x is None else x.estimate(),
            all_x_measured=x is not None and bool(np.all(x.measured)),
        )

    @property
    def columns(self) -> tuple[Observations, ...]:
        """The measured columns: x, y, m."""
        return tuple(column for column in (self.x, self.y, self.m) if column is not None)

    @property
    def n_data(self) -> int:
        """Number of measured cells."""
        return int(sum(np.sum(np.asarray(column.measured)) for column in self.columns))

    @property
    def solves_of_setting(self) -> float:
        """Solves of both pulses that a setting takes on average; a run of pulse 1 alone is half of one."""
        return (len(self.x_set) + 0.5 * len(self.first_x_set)) / self.settings.count


def _observations(table: LoopTable, column: str) -> Observations | None:
    counted = table.kind == "counts"
    value = getattr(table, f"n_{column}" if counted else column)
    if value is None:
        return None
    scale = table.shots if counted else getattr(table, f"{column}_err")
    measured = np.isfinite(value)
    if counted:
        measured = measured & (np.asarray(scale) > 0)
    return Observations(
        jnp.asarray(np.where(measured, value, 0.0), float),
        jnp.asarray(np.where(measured, scale, 1.0), float),
        jnp.asarray(measured),
        counted,
    )


def _third(table: LoopTable) -> Observations | None:
    """Counts of m among the shots that were not assigned to s."""
    if table.n_m is None:
        return None
    assert table.shots is not None and table.n_y is not None
    left = table.shots - table.n_y
    measured = np.isfinite(table.n_m) & np.isfinite(left) & (left > 0)
    fill = lambda a, other: jnp.asarray(np.where(measured, a, other), float)
    return Observations(fill(table.n_m, 0.0), fill(left, 1.0), jnp.asarray(measured), True)


class Prediction(eqx.Module):
    """Model probabilities of the measured columns, and the transfer used, shape (rows,).

    `p_m` is the probability of m for a shot that was not assigned to s after both pulses.
    """

    p_x: Float[Array, " rows"]
    p_y: Float[Array, " rows"]
    p_m: Float[Array, " rows"]
    r: Float[Array, " rows"]
    valid: Bool[Array, " rows"]


def predict(device: AbstractMemristor, experiment: Experiment, *, own_window: bool = False) -> Prediction:
    """Probability that a shot is assigned to s, for each row of an experiment.

    Recorded transfers are used as they are, and the cycles are independent. Otherwise the device's memory supplies
    them loop by loop, from the source that the device names; `measured` takes the recorded inputs.

    Args:
        device: any memristor.
        experiment: the prepared table.
        own_window: use the device's `window_cycles` even where the table states one (a freed parameter).
    """
    respond = device.under(experiment.settings)
    first_x, first_setting = experiment.first_x_set, experiment.first_setting
    none = jnp.zeros_like(first_x)
    r = _known_transfers(device, experiment, own_window)
    if r is None:
        first = respond(first_x, none, alone=True, of_cycle=first_setting)
        p_x, x = (device.assigned(first.populations), device.signal(first.populations))
        p_x, x = p_x[experiment.first_of], x[experiment.first_of]
        fed = x if device.source == "model" else jnp.where(jnp.isfinite(experiment.fed_x), experiment.fed_x, p_x)
        r = _transfers(device, experiment, fed, own_window)
        second = respond(experiment.x_set, r, alone=False)
        valid = first.valid[experiment.first_of] & second.valid
        return Prediction(p_x, *outputs(device, experiment, second.populations), r, valid)
    if isinstance(getattr(device, "method", None), EmulatedSeries):
        # Nothing is solved, so nothing is gained by one batch of both kinds.
        first = respond(first_x, none, alone=True, of_cycle=first_setting)
        second = respond(experiment.x_set, r, alone=False)
        valid = first.valid[experiment.first_of] & second.valid
        p_x = device.assigned(first.populations)[experiment.first_of]
        return Prediction(p_x, *outputs(device, experiment, second.populations), r, valid)
    # All transfers are known beforehand: both kinds of run are one batch.
    every = respond(
        jnp.concatenate([first_x, experiment.x_set]),
        jnp.concatenate([none, r]),
        alone=jnp.arange(len(first_x) + len(experiment.x_set)) < len(first_x),
        of_cycle=jnp.concatenate([first_setting, experiment.settings.of_cycle]),
    )
    split = len(first_x)
    p_x = device.assigned(every.populations[:, :split])[experiment.first_of]
    valid = every.valid[:split][experiment.first_of] & every.valid[split:]
    return Prediction(p_x, *outputs(device, experiment, every.populations[:, split:]), r, valid)


def outputs(device: AbstractMemristor, experiment: Experiment, populations) -> tuple[Array, Array]:
    """Probability of s after both pulses, and of m where s was not found (NaN if nobody counted)."""
    p_y = device.assigned(populations)
    if experiment.m is None:
        return p_y, jnp.full_like(p_y, jnp.nan)
    left = 1 - p_y
    return p_y, device.assigned_next(populations) / jnp.where(left > 0, left, 1.0)


def bucketed(device: AbstractMemristor, experiment: Experiment, *, own_window: bool = False) -> Experiment:
    """The same likelihood in arrays of rounded-up length, so that a table of similar length compiles nothing.

    Filler rows repeat the last one, unmeasured. Where transfers depend on what is calibrated, or follow the measured
    inputs (which a simulation replaces), the table stays as it is: the memory is run over each loop, which has a length
    of its own.
    """
    r = experiment.r_set if own_window else _known_transfers(device, experiment, own_window)
    if r is None or (experiment.r_set is None and device.source == "measured"):
        return experiment
    rows, runs = len(experiment.x_set), len(experiment.first_x_set)
    pad = lambda a: jnp.pad(a, (0, rounded_up(rows) - rows), mode="edge")
    pad_run = lambda a: jnp.pad(a, (0, rounded_up(runs) - runs), mode="edge")

    def column(data: Observations | None) -> Observations | None:
        if data is None:
            return None
        measured = jnp.pad(data.measured, (0, rounded_up(rows) - rows))
        return dataclasses.replace(data, value=pad(data.value), scale=pad(data.scale), measured=measured)

    return dataclasses.replace(
        experiment,
        x_set=pad(experiment.x_set),
        settings=dataclasses.replace(experiment.settings, of_cycle=pad(experiment.settings.of_cycle)),
        r_set=pad(r),
        first_x_set=pad_run(experiment.first_x_set),
        first_setting=pad_run(experiment.first_setting),
        first_of=pad(experiment.first_of),
        loops=(),
        windows=None,
        x=column(experiment.x),
        y=column(experiment.y),
        m=column(experiment.m),
        fed_x=pad(experiment.fed_x),
    )


def _known_transfers(
    device: AbstractMemristor, experiment: Experiment, own_window: bool
) -> Float[Array, " rows"] | None:
    """Transfers that do not depend on the model's own inputs; None if they do."""
    if experiment.r_set is not None:
        return experiment.r_set
    if device.source == "command":
        return _transfers(device, experiment, experiment.x_set, own_window)
    if device.source == "measured" and experiment.all_x_measured:
        return _transfers(device, experiment, experiment.fed_x, own_window)
    return None


def _transfers(device: AbstractMemristor, experiment: Experiment, fed, own_window: bool) -> Float[Array, " rows"]:
    """The memory applied to each loop's own inputs."""
    r = jnp.zeros_like(experiment.x_set)
    for k, rows in enumerate(experiment.loops):
        memory = device.memory
        if experiment.windows is not None and not own_window:
            memory = with_window(memory, experiment.windows[k])
        r = r.at[rows].set(memory.filter(fed[rows]))
    return r


def log_likelihood(
    device: AbstractMemristor, experiment: Experiment, *, own_window: bool = False, noise: Noise | None = None
) -> Float[Array, ""]:
    """Log-likelihood of a table under a device, nats; differentiable in every parameter."""
    return log_likelihood_of(experiment, predict(device, experiment, own_window=own_window), noise)


def measured(experiment: Experiment, prediction: Prediction) -> list[tuple[Observations, Float[Array, " rows"]]]:
    """The measured columns with their model probabilities: x, y, m."""
    pairs = ((experiment.x, prediction.p_x), (experiment.y, prediction.p_y), (experiment.m, prediction.p_m))
    return [(column, p) for column, p in pairs if column is not None]


def log_likelihood_of(experiment: Experiment, prediction: Prediction, noise: Noise | None = None) -> Float[Array, ""]:
    """Log-likelihood of a table under predicted probabilities, nats."""
    return sum((column.log_likelihood(p, noise) for column, p in measured(experiment, prediction)), jnp.zeros(()))


def cells(
    experiment: Experiment, prediction: Prediction, noise: Noise | None = None
) -> tuple[Float[Array, " cells"], Float[Array, " cells"]]:
    """Model probability and variance of every measured cell, x first (unmeasured ones have infinite variance)."""
    pairs = measured(experiment, prediction)
    variance = [jnp.where(column.measured, column.variance(p, noise), jnp.inf) for column, p in pairs]
    return jnp.concatenate([p for _, p in pairs]), jnp.concatenate(variance)


def pearson_chi2(experiment: Experiment, prediction: Prediction, noise: Noise | None = None) -> Float[Array, ""]:
    """Pearson's statistic: the sum of squared standardized residuals over measured cells."""
    squares = [
        jnp.sum(jnp.where(column.measured, column.residual(p, noise) ** 2, 0.0))
        for column, p in measured(experiment, prediction)
    ]
    return sum(squares, jnp.zeros(()))


def replace_observations(
    experiment: Experiment,
    x: Float[Array, " rows"] | None = None,
    y: Float[Array, " rows"] | None = None,
    m: Float[Array, " rows"] | None = None,
) -> Experiment:
    """The same settings with other measured numbers, for synthetic data; the inputs that the memory averages follow.

    Columns that the table lacks stay lacking. New counts of s change how many shots are left to be m.
    """
    changed = {}
    for name, value in (("x", x), ("y", y), ("m", m)):
        column = getattr(experiment, name)
        if column is not None and value is not None:
            changed[name] = dataclasses.replace(column, value=jnp.asarray(value))
    third, second = changed.get("m", experiment.m), changed.get("y", experiment.y)
    if third is not None and second is not None and y is not None:
        left = second.scale - second.value
        some = third.measured & (left > 0)
        changed["m"] = dataclasses.replace(third, scale=jnp.where(some, left, 1.0), measured=some)
    fed = changed["x"].estimate() if "x" in changed else experiment.fed_x
    return dataclasses.replace(experiment, **changed, fed_x=fed)


def prepared(device: AbstractMemristor, experiment: Experiment) -> AbstractMemristor:
    """The device with its method and grid decided for the settings of a table."""
    return device.prepared(experiment.x_set, experiment.settings)

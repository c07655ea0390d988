"""From [optimize] to what is wanted of the pulses, and to the devices it is wanted of."""

import csv
import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from calibration import twin_file
from calibration.robust import Robust, drawn_changes, parameter_draws
from calibration.targets import (
    AbstractTarget,
    Duration,
    Energy,
    Inputs,
    Leakage,
    LoopCurve,
    LoopShape,
    Obedience,
    Retention,
    Roughness,
    Transfer,
    Weighted,
    loop_target,
    parts,
    settled_periods,
)
from experiments.config import ConfigError
from experiments.records import OutputError
from experiments.schema import Config
from twin.loop import run, sine_input
from twin.memristor import IonMemristor, PhotonicMemristor

_TWIN = "twin.json"
_FEWEST_POINTS = 4


def target_from(config: Config, device: IonMemristor) -> AbstractTarget:
    """The target of [optimize], and the sum where it has weights."""
    assert config.optimize is not None
    main = _one(config.optimize.target, config, device)
    if not config.optimize.weights:
        return main
    further = tuple(_one(name, config, device) for name in config.optimize.weights)
    return Weighted((main, *further), jnp.array([1.0, *config.optimize.weights.values()]))


def loop_in(target: AbstractTarget) -> LoopShape | LoopCurve | None:
    """The first term that looks at a loop."""
    return next((part for part in parts(target) if isinstance(part, LoopShape | LoopCurve)), None)


def _one(name: str, config: Config, device: IonMemristor) -> AbstractTarget:
    wanted = config.optimize
    assert wanted is not None
    cycles = wanted.cycles_per_period
    if name == "obedience":
        return Obedience(None if wanted.inputs == "square" else _commands_of_loop(device, cycles))
    if name == "curve":
        assert wanted.curve is not None
        x, y = read_curve(Path(wanted.curve))
        return LoopCurve(x, y, settled_periods(device, len(x)))
    if name == "transfer":
        levels = device.system(0.0, 0.0).levels
        if wanted.level not in levels:
            raise ConfigError(f"optimize.level: {wanted.level!r} is no level of this scheme; name one of "
                              f"{', '.join(levels)}.")  # fmt: skip
        return Transfer(wanted.level, wanted.x_set, wanted.r_set)
    if name in ("area", "form_factor", "saturation"):
        return loop_target(name, device, cycles_per_period=cycles)
    made = {
        "leakage": Leakage, "retention": lambda: Retention(wanted.hold_s), "energy": Energy, "roughness": Roughness,
        "duration": Duration,
    }  # fmt: skip
    return made[name]()


def _commands_of_loop(device: IonMemristor, cycles: int) -> Inputs:
    """The commands that a device which obeys meets in the last period of its loop."""
    inputs = sine_input(periods=settled_periods(device, cycles), cycles_per_period=cycles)
    return Inputs.of_loop(run(PhotonicMemristor(device.memory, source="model"), inputs), cycles)


def read_curve(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Columns x and y of a CSV file, one row a cycle of one period.

    Raises:
        ConfigError: the file cannot be read, or a value is no population.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path}: the curve cannot be read ({reason}); name a CSV file.") from None
    if len(rows) < _FEWEST_POINTS:
        raise ConfigError(f"{path}: the curve has {len(rows)} rows; give a header with x and y, and one row a cycle, "
                          f"at least {_FEWEST_POINTS}.")  # fmt: skip
    columns = []
    for name in ("x", "y"):
        values = []
        for line, row in enumerate(rows, start=2):
            try:
                value = float(row.get(name) or "nothing")
            except ValueError:
                value = math.nan
            if not 0 <= value <= 1:
                raise ConfigError(f"{path}: line {line} has {name} = {row.get(name)!r}, which is no population; "
                                  "give a number from 0 to 1.")  # fmt: skip
            values.append(value)
        columns.append(np.array(values))
    return columns[0], columns[1]


def robust_from(config: Config, ion: IonMemristor, target: AbstractTarget, fit_run: Path | None) -> Robust | None:
    """The target over the members of [optimize.robust]; None without that table.

    Raises:
        ConfigError: the posterior of a fit is wanted, but there is none.
    """
    assert config.optimize is not None
    wanted = config.optimize.robust
    if wanted is None:
        return None
    posterior = None
    if wanted.posterior:
        if fit_run is None:
            raise ConfigError("optimize.robust.posterior: there is no calibration; give one with --from, or set it to "
                              "false.")  # fmt: skip
        posterior = posterior_of(fit_run, ion, wanted.members, config.optimize.seed)
    changes = drawn_changes(
        ion, wanted.members, posterior=posterior, intensity_std=wanted.intensity_std,
        detuning_std_hz=wanted.detuning_std_hz, n_bar=wanted.n_bar, seed=config.optimize.seed,
    )  # fmt: skip
    return Robust(target, changes, wanted.worst)


def posterior_of(fit_run: Path, ion: IonMemristor, members: int, seed: int) -> dict[str, np.ndarray]:
    """Draws of the parameters that pulses depend on: of the fit's sampler, else of its covariance, inside its boxes.

    Raises:
        OutputError: the run has no twin file.
    """
    if not (fit_run / _TWIN).is_file():
        raise OutputError(f"{fit_run}: this fit left no {_TWIN}; fit again.")
    twin = twin_file.load(fit_run / _TWIN)
    fields = {field.name for field in dataclasses.fields(ion)}
    names = [n for n in twin.names if n in fields and not n.startswith("readout_error")]
    own = [twin.names.index(name) for name in names]
    if not own:
        raise OutputError(f"{fit_run}: no parameter of this fit moves pulses; set optimize.robust.posterior = false.")
    if twin.draws is not None:
        chosen = twin.draws[np.linspace(0, len(twin.draws) - 1, members).round().astype(int)][:, own]
        return dict(zip(names, chosen.T, strict=True))
    covariance = twin.covariance[np.ix_(own, own)]
    boxes = {name: twin.boxes[name] for name in names}
    return parameter_draws(tuple(names), twin.mean[own], covariance, count=members, seed=seed, boxes=boxes)

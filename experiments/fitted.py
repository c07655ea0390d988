"""The device that a fit found, for verbs that go on from there with ``--from``."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from calibration.parameters import with_parameters
from calibration.problem import NOISE_PARAMETERS
from experiments.build import PHONON_NODES, largest_area
from experiments.records import OutputError, Run
from experiments.schema import Config
from twin.loop import AbstractMemristor
from twin.memristor import IonMemristor
from twin.phonons import planned as planned_motion

Found = tuple[np.ndarray, np.ndarray]


def with_fit(config: Config, device: AbstractMemristor, run: Run) -> tuple[Any, str]:
    """The device with the parameters of a fit in place."""
    # What a fit frees of its likelihood is no part of the device.
    found = {
        name: one["value"]
        for name, one in run.result["parameters"].items()
        if one["verdict"] != "fixed" and name not in NOISE_PARAMETERS
    }
    if not found or any(value is None for value in found.values()):
        raise ValueError(f"{run.path}: this fit found no parameters ({run.result.get('status')}); fit again.")
    verdicts = [name for name, one in run.result["parameters"].items() if one["verdict"] in ("weak", "not identified")]
    note = f"The device is that of the fit {run.path.name} ({run.result['status']})."
    if verdicts:
        note += f" Its {', '.join(verdicts)} rest on weak evidence, and so does whatever follows from them."
    if "n_bar" in found and isinstance(device, IonMemristor):
        if device.motion is None:
            device = dataclasses.replace(device, phonon_nodes=max(device.phonon_nodes, PHONON_NODES))
        else:
            area = largest_area(config)
            motion = planned_motion(device.motion, max(found["n_bar"], float(device.n_bar)), area, device.motion.error)
            device = dataclasses.replace(device, motion=motion)
    return with_parameters(device, {name: jnp.asarray(value, float) for name, value in found.items()}), note


def calibrated(
    config: Config, device: AbstractMemristor, run: Run
) -> tuple[Any, dict[str, tuple[float, float]], Found, str]:
    """The device of a fit, the prior boxes of its parameters, their values with covariance, and a sentence.

    Args:
        config: tells the rest of the device. device: as configured. run: the fit.

    Raises:
        OutputError: a fit of several tables or ions with parameters of their own.
    """
    own = [name for name in run.result["correlation"]["names"] if "@" in name]
    if own:
        raise OutputError(
            f"{run.path}: `{own[0]}` differs from table to table, but one device is moved; fit without it."
        )
    device, note = with_fit(config, device, run)
    names = [name for name in run.result["correlation"]["names"] if name not in (*NOISE_PARAMETERS, "window_cycles")]
    every = list(run.result["correlation"]["names"])
    rows = [every.index(name) for name in names]
    parameters = [run.result["parameters"][name] for name in names]
    std = np.array([one["std"] for one in parameters], float)
    correlation = np.array(run.result["correlation"]["matrix"], float)[np.ix_(rows, rows)]
    assert run.config.fit is not None
    boxes = {name: run.config.fit.free[name] for name in names}
    mean = np.array([one["value"] for one in parameters], float)
    return device, boxes, (mean, correlation * np.outer(std, std)), note

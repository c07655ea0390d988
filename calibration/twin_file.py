"""The twin as a file: what a calibration found, what it was found from, and how far it may be trusted.

``twin.json`` holds the device, parameters with their covariance, prior boxes, the range of settings calibrated with,
hashes of the data, versions of the code, and predictions for a small design, frozen when it was written: a code that
predicts otherwise says so. Draws of the posterior, if there are any, stand beside it as NetCDF. Documents carry a
version; older ones are brought up to date when they are read (`_UPGRADES`).
"""

import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import h5netcdf
import jax.numpy as jnp
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from calibration.data import LoopTable
from calibration.formats import write_atomic
from calibration.likelihood import Experiment, prepared
from calibration.likelihood import predict as predicted
from calibration.parameters import anchored, with_parameters
from twin import memory as memories
from twin import memristor as memristors
from twin.loop import AbstractMemristor
from twin.phonons import Motion
from twin.planning import Automatic, ClosedForm, Lindblad
from twin.slow_noise import SlowNoise

SCHEMA, VERSION = "ion-memristor-twin", 3
FILE, POSTERIOR = "twin.json", "twin_posterior.nc"
FROZEN_TOLERANCE = 1e-5
"""Largest change of a frozen population that a new code may make without a word."""
_FROZEN_X, _FROZEN_R = (0.05, 0.25, 0.5, 0.75, 0.95), (0.0, 0.3, 0.6)
_SETTINGS = ("x_set", "r_set", "window_cycles", "detuning_1_set_hz", "detuning_2_set_hz", "shots")
_METHODS = {"ClosedForm": ClosedForm, "Lindblad": Lindblad, "Automatic": Automatic}
_MEMORIES = {"MovingAverage": memories.MovingAverage, "Exponential": memories.Exponential}
_DEVICES = {"IonMemristor": memristors.IonMemristor, "PhotonicMemristor": memristors.PhotonicMemristor}
_PARTS = {"Motion": Motion}


class TwinError(ValueError):
    """A twin file cannot be read; the message is one sentence."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_Range = tuple[float, float]
_Row = Annotated[list[float], Field(min_length=1)]


class Parameters(_Table):
    """Posterior of the free parameters: order, mean, covariance, and the prior boxes."""

    names: Annotated[list[str], Field(min_length=1)]
    mean: _Row
    covariance: list[_Row]
    boxes: dict[str, _Range]


class Validity(_Table):
    """Range of each setting that the calibration saw; null where the tables had none."""

    settings: dict[str, _Range | None]


class Source(_Table):
    """One table of the calibration."""

    name: str
    sha256: str
    rows: int


class Frozen(_Table):
    """Predictions of the mean at the time of writing, cycle by cycle, without laser offsets."""

    x_set: _Row
    r_set: _Row
    p_x: _Row
    p_y: _Row
    tolerance: float = FROZEN_TOLERANCE


class Document(_Table):
    """The file, at the version that is written today."""

    schema_name: Literal["ion-memristor-twin"] = Field(SCHEMA, alias="schema")
    version: Literal[3] = VERSION
    device: dict[str, Any]
    parameters: Parameters
    posterior: str | None = None
    validity: Validity
    data: list[Source]
    code: dict[str, str]
    frozen: Frozen


def json_schema() -> dict[str, Any]:
    """The document as JSON Schema."""
    schema = Document.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@dataclasses.dataclass(frozen=True)
class Twin:
    """A calibrated device with its uncertainty.

    Attributes:
        device: with the mean of the parameters in place.
        document: what the file holds. draws: of the posterior, shape (draws, parameters), or None.
        warnings: what was found on loading, in sentences.
    """

    device: AbstractMemristor
    document: Document
    draws: np.ndarray | None = None
    warnings: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Free parameters, in the order of mean and covariance."""
        return tuple(self.document.parameters.names)

    @property
    def mean(self) -> np.ndarray:
        """Mean of the posterior."""
        return np.array(self.document.parameters.mean)

    @property
    def covariance(self) -> np.ndarray:
        """Covariance of the posterior."""
        return np.array(self.document.parameters.covariance)

    @property
    def inside(self) -> np.ndarray:
        """The mean, where a rounding error or an edge must not carry it out of its box."""
        low, high = (np.array([self.boxes[name][k] for name in self.names]) for k in (0, 1))
        return np.minimum(np.maximum(self.mean, low), high)

    @property
    def boxes(self) -> dict[str, tuple[float, float]]:
        """Prior boxes, {name: (low, high)}."""
        return {name: tuple(self.document.parameters.boxes[name]) for name in self.names}


# ------------------------------------------------------------------------------------------------ writing, reading


def make(
    device: AbstractMemristor,
    names: Sequence[str],
    mean: np.ndarray,
    covariance: np.ndarray,
    boxes: Mapping[str, tuple[float, float]],
    tables: Sequence[LoopTable],
    versions: Mapping[str, str] | None = None,
    draws: np.ndarray | None = None,
) -> Twin:
    """The twin that a calibration leaves.

    Args:
        device: as it was calibrated, with a method that is not planned or emulated (`ClosedForm`, `Lindblad`,
            `Automatic`); its free parameters are replaced by the mean.
        names, mean, covariance, boxes: posterior and prior of the free parameters, `FitResult.values` and
            `FitResult.covariance` in the order of its problem.
        tables: what it was calibrated with.
        versions: of the code, by package. draws: of the posterior, shape (draws, parameters).
    """
    mean = np.asarray(mean, float)
    described = _described(device)
    device = _at(_device(described), names, mean)
    x_set, r_set = (grid.ravel() for grid in np.meshgrid(_FROZEN_X, _FROZEN_R, indexing="ij"))
    p_x, p_y = _populations(device, x_set, r_set)
    document = Document(
        device=described,
        parameters=Parameters(
            names=list(names), mean=mean.tolist(), covariance=np.asarray(covariance, float).tolist(),
            boxes={name: tuple(map(float, boxes[name])) for name in names},
        ),
        posterior=None if draws is None else POSTERIOR,
        validity=Validity(settings=_ranges(tables)),
        data=[Source(name=Path(t.name).name, sha256=t.sha256, rows=len(t)) for t in tables],
        code=dict(versions or {}),
        frozen=Frozen(x_set=x_set.tolist(), r_set=r_set.tolist(), p_x=p_x, p_y=p_y),
    )  # fmt: skip
    return Twin(device, document, draws)


def save(path: str | os.PathLike[str], twin: Twin) -> None:
    """Writes ``twin.json`` into a folder, and the draws beside it, each file atomically."""
    folder = Path(path)
    if twin.draws is not None:
        write_atomic(folder / POSTERIOR, _draws_to_netcdf(twin.names, twin.draws))
    text = json.dumps(twin.document.model_dump(by_alias=True), indent=2, allow_nan=False)
    write_atomic(folder / FILE, (text + "\n").encode())


def load(path: str | os.PathLike[str]) -> Twin:
    """Reads a twin of this or an earlier version, and compares its frozen predictions with this code's.

    Args:
        path: ``twin.json`` or the folder that holds it.

    Raises:
        TwinError: no such file, or one that is no twin.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TwinError(f"{path}: this cannot be read ({error.strerror}); name a {FILE} or the run of a fit.") from None
    except ValueError as error:
        raise TwinError(f"{path}: this is no JSON ({error}); name a {FILE} or the run of a fit.") from None
    document = upgraded(document, os.fspath(path))
    try:
        found = Document.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise TwinError(f"{path}: {place} is refused ({first['msg'].lower()}); write the twin again.") from None
    n = len(found.parameters.names)
    if len(found.parameters.mean) != n or np.shape(found.parameters.covariance) != (n, n):
        raise TwinError(f"{path}: parameters.covariance does not fit the {n} names; write the twin again.")
    device = _at(_device(found.device), found.parameters.names, np.array(found.parameters.mean))
    draws = _read_draws(path.parent / found.posterior, n) if found.posterior else None
    return Twin(device, found, draws, tuple(_changed(device, found)))


def _changed(device: AbstractMemristor, document: Document) -> list[str]:
    frozen = document.frozen
    now = _populations(device, np.array(frozen.x_set), np.array(frozen.r_set))
    sentences = []
    for name, old, new in (("p_x", frozen.p_x, now[0]), ("p_y", frozen.p_y, now[1])):
        apart = np.abs(np.array(new) - np.array(old))
        if not np.max(apart) <= frozen.tolerance:
            k = int(np.argmax(np.where(np.isnan(apart), np.inf, apart)))
            sentences.append(
                f"This code predicts {name} = {new[k]:.6f} at x_set {frozen.x_set[k]:g} and r_set {frozen.r_set[k]:g}, "
                f"where the twin was frozen at {old[k]:.6f}: the model has changed since; calibrate again."
            )
    return sentences


def _first_to_second(old: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had standard errors and correlations in place of a covariance, and no draws."""
    new = {key: value for key, value in old.items() if key not in ("parameters", "correlation")}
    names, given = list(old["parameters"]), old["parameters"]
    std = np.array([given[name]["std"] for name in names])
    new["parameters"] = {
        "names": names, "mean": [given[name]["value"] for name in names],
        "covariance": (np.array(old["correlation"]) * np.outer(std, std)).tolist(),
        "boxes": {name: given[name]["box"] for name in names},
    }  # fmt: skip
    return {**new, "version": 2, "posterior": None}


def _second_to_third(old: dict[str, Any]) -> dict[str, Any]:
    """Version 2 gave photonic detectors the readout errors of an ion; now they have efficiency and dark counts."""
    device = dict(old["device"])
    if device.get("kind") != "PhotonicMemristor":
        return {**old, "version": 3}
    if any(name.startswith("readout_error") for name in old["parameters"]["names"]):
        raise ValueError("an efficiency and dark counts that were calibrated as such")
    dark = device.pop("readout_error_bright")
    clicks = 1 - device.pop("readout_error_dark")
    if clicks < dark:
        raise ValueError("a detector that clicks more often with a photon than without")
    efficiency = (clicks - dark) / (1 - dark) if dark < 1 else 1.0
    return {**old, "version": 3, "device": device | {"efficiency": efficiency, "dark_counts": dark}}


_UPGRADES = {1: _first_to_second, 2: _second_to_third}


def upgraded(document: Any, name: str = "twin") -> dict[str, Any]:
    """A document of any known version as one of today's."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise TwinError(f"{name}: this is no twin, its `schema` is not '{SCHEMA}'; name a {FILE} or the run of a fit.")
    while (version := document.get("version")) != VERSION:
        if version not in _UPGRADES:
            raise TwinError(f"{name}: version {version} of the twin file is unknown here, which reads 1 to {VERSION}; "
                            "update this package.")  # fmt: skip
        try:
            document = _UPGRADES[version](document)
        except (KeyError, TypeError, ValueError) as error:
            raise TwinError(f"{name}: this twin of version {version} lacks {error}; write it again.") from None
    return document


# ------------------------------------------------------------------------------------------------ the device as text


def _described(device: AbstractMemristor) -> dict[str, Any]:
    """Type, plain fields, memory and method of a device of known scalars."""
    device = anchored(device)
    found: dict[str, Any] = {"kind": type(device).__name__}
    for f in dataclasses.fields(device):
        value = getattr(device, f.name)
        if f.name == "memory":
            name = "tau_cycles" if isinstance(value, memories.Exponential) else "window_cycles"
            found["memory"] = {"kind": type(value).__name__, "window_cycles": float(getattr(value, name))}
        elif f.name == "method":
            if type(value).__name__ not in _METHODS:
                raise ValueError(
                    f"a device solved by {type(value).__name__} cannot be written; write it as configured."
                )
            found["method"] = {"kind": type(value).__name__, "error": getattr(value, "error", None)}
        elif f.name == "slow_noise":
            if value is not None:
                found[f.name] = {name: float(getattr(value, name)) for name in SlowNoise.parameters()}
        elif isinstance(value, str | int):
            found[f.name] = value
        elif isinstance(value, eqx.Module):
            found[f.name] = _part(value)
        elif value is not None and f.name != "steps":
            found[f.name] = _plain(value)
    return found


def _part(part: eqx.Module) -> dict[str, Any]:
    """A module that a device holds, such as its motion: type and fields."""
    fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    plain = {name: v if isinstance(v, str | int | float) else _plain(v) for name, v in fields.items() if v is not None}
    return {"kind": type(part).__name__, **plain}


def _plain(value: Any) -> Any:
    """A number, or nested lists of them."""
    if np.ndim(value):
        return np.asarray(value).tolist()
    number = float(value)
    return "infinite" if np.isinf(number) else number


def _device(described: Mapping[str, Any]) -> AbstractMemristor:
    fields = dict(described)
    try:
        kind = _DEVICES[fields.pop("kind")]
        memory = fields.pop("memory")
        kept = {name: np.inf if value == "infinite" else value for name, value in fields.items() if name != "method"}
        if "slow_noise" in kept:
            kept["slow_noise"] = SlowNoise(**kept["slow_noise"])
        for name, value in kept.items():
            if isinstance(value, Mapping) and "kind" in value:
                part = {key: np.array(v) if isinstance(v, list) else v for key, v in value.items() if key != "kind"}
                kept[name] = _PARTS[value["kind"]](**part)
        kept["memory"] = _MEMORIES[memory["kind"]](memory["window_cycles"])
        if (method := fields.get("method")) is not None:
            kept["method"] = _METHODS[method["kind"]](*([] if method["error"] is None else [method["error"]]))
        return kind(**kept)
    except (KeyError, TypeError) as error:
        raise TwinError(f"the device of the twin cannot be built here ({error}); update this package.") from None


def _at(device: AbstractMemristor, names: Sequence[str], mean: np.ndarray) -> AbstractMemristor:
    return with_parameters(device, {name: jnp.asarray(v) for name, v in zip(names, mean, strict=True)})


def _populations(device: AbstractMemristor, x_set: np.ndarray, r_set: np.ndarray) -> tuple[list[float], list[float]]:
    """Probabilities of s for single cycles, by the device's own method."""
    rows = len(x_set)
    table = LoopTable(loop=np.full(rows, "A"), cycle=np.arange(rows), x_set=x_set, r_set=r_set,
                      detuning_1_set_hz=np.zeros(rows), detuning_2_set_hz=np.zeros(rows), shots=np.ones(rows, int),
                      n_x=np.zeros(rows), n_y=np.zeros(rows))  # fmt: skip
    experiment = Experiment.from_table(table)
    found = predicted(prepared(device, experiment), experiment)
    return np.asarray(found.p_x).tolist(), np.asarray(found.p_y).tolist()


def _ranges(tables: Sequence[LoopTable]) -> dict[str, tuple[float, float] | None]:
    found: dict[str, tuple[float, float] | None] = {}
    for name in _SETTINGS:
        columns = [getattr(t, name) for t in tables]
        known = [c for c in columns if c is not None]
        found[name] = (float(min(c.min() for c in known)), float(max(c.max() for c in known))) if known else None
    return found


def _draws_to_netcdf(names: Sequence[str], draws: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with h5netcdf.File(buffer, "w") as file:
        file.dimensions = {"draw": len(draws)}
        for k, name in enumerate(names):
            file.create_variable(name, ("draw",), data=np.asarray(draws[:, k], float))
        file.attrs["names"] = json.dumps(list(names))
    return buffer.getvalue()


def _read_draws(path: Path, n: int) -> np.ndarray:
    try:
        with h5netcdf.File(path, "r") as file:
            names = json.loads(file.attrs["names"])
            draws = np.stack([np.asarray(file.variables[name]) for name in names], axis=1)
    except (OSError, KeyError, ValueError) as error:
        raise TwinError(f"{path}: draws of the posterior cannot be read ({error}); restore it beside {FILE}.") from None
    if draws.shape[1] != n:
        raise TwinError(f"{path}: these are draws of {draws.shape[1]} parameters, but the twin has {n}.")
    return draws

"""The Zarr store of a sweep, which xarray opens: one dimension `point`, its design, its numbers, a status per point.

A store comes to be whole: it is laid out in a hidden folder beside its place, with its design and the status "pending"
everywhere, and then renamed. A chunk of points is a chunk of every array, a file each, which Zarr replaces in one step.
The statuses of a chunk are written after its numbers, so they say that these are there, whenever the process is killed.
"""

import json
import os
import secrets
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from calibration.parameters import unit_of
from experiments import designs
from experiments.records import OutputError
from experiments.schema import Config, Sweep

PENDING, OK, INVALID = 0, 1, 2
FLAGS = {"flag_values": [PENDING, OK, INVALID], "flag_meanings": "pending ok invalid"}
METRICS = {
    "signed_area": "closed integral of y dx over the last period",
    "form_factor": "4 pi |area| / perimeter^2 of the last period",
    "pinch_offset": "distance of the loop from the origin",
    "rms_obedience": "rms of y - (1 - r) x_set over the cycles of the last period",
}
_FORMAT: Any = 2  # of Zarr: the one whose consolidated metadata every reader knows
_BLOCK = 65536
# Tables of a configuration that change the numbers, and keys in them that do not.
_TABLES, _FREE = ("device", "memory", "sweep"), ("memory_mb",)


class SweepStore:
    """A store that has been laid out.

    Args:
        path: of the store.

    Attributes:
        chunk: points of a chunk.
        method: method that the sweep was begun with.
        status: status of every point, shape (points,); `write` keeps it up to date.
    """

    def __init__(self, path: Path):
        self._group = zarr.open_group(path, mode="r+", zarr_format=_FORMAT)
        self.path, self.chunk, self.method = path, int(_array(self._group, "status").chunks[0]), self._text("method")
        self.status = np.asarray(_array(self._group, "status")[:])
        self._columns = [_array(self._group, name) for name in json.loads(self._text("axes"))]

    @classmethod
    def begun(cls, path: Path, config: Config, seed: int) -> "SweepStore | None":
        """The store that the same sweep has begun; None if nothing stands there.

        Raises:
            OutputError: the store is of another sweep, of something else, or cannot be read.
        """
        if not path.is_dir() or not any(path.iterdir()):
            return None
        try:
            attributes = zarr.open_group(path, mode="r").attrs.asdict()
            found = cls(path) if {"config", "seed"} <= attributes.keys() else None
        except (OSError, ValueError, KeyError) as error:
            raise OutputError(f"{path}: this Zarr store cannot be read ({error}); name a new one with --out.") from None
        if found is None:
            raise OutputError(f"{path}: this Zarr store is not one of a sweep; name a new one with --out.")
        then, now = tomllib.loads(str(attributes["config"])), tomllib.loads(config.to_toml())
        key = _difference(_relevant(then), _relevant(now)) or ("seed" if attributes["seed"] != seed else "")
        if key:
            raise OutputError(
                f"{path}: this sweep was begun with another {key}; resume it with its own configuration, "
                "or name a new store with --out."
            )
        return found

    @classmethod
    def lay_out(
        cls, path: Path, config: Config, seed: int, *, chunk: int, method: str, facts: Mapping[str, Any]
    ) -> "SweepStore":
        """Create the store with its design and nothing done, whole or not at all.

        Args:
            path: of the store; nothing stands there.
            config: with a table [sweep].
            seed: of the design.
            chunk: points of a chunk.
            method: that will compute the numbers.
            facts: where they come from; attributes of the store.

        Raises:
            OutputError: it cannot be written.
        """
        new = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_design(new, config, seed, chunk, {"method": method, **_flat(facts)})
            os.replace(new, path)
        except OSError as error:
            raise OutputError(f"{path}: this cannot be written ({error.strerror}); name another with --out.") from None
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return cls(path)

    def pending(self) -> Iterator[tuple[int, np.ndarray]]:
        """Chunks that are not done: number of the first point and coordinates, shape (points, parameters)."""
        for begin in range(0, self.status.size, self.chunk):
            region = slice(begin, begin + self.chunk)
            if np.any(self.status[region] == PENDING):
                yield begin, np.stack([np.asarray(column[region]) for column in self._columns], axis=1)

    def write(self, begin: int, numbers: Mapping[str, np.ndarray]) -> None:
        """Keep the numbers of one chunk, and then their statuses."""
        region = slice(begin, begin + len(numbers["status"]))
        for name in (*METRICS, "status"):
            self._put(name, region, numbers[name])
        self.status[region] = numbers["status"]

    def _put(self, name: str, region: slice, values: np.ndarray) -> None:
        _array(self._group, name)[region] = values

    def _text(self, name: str) -> str:
        return str(self._group.attrs[name])


def _write_design(path: Path, config: Config, seed: int, chunk: int, facts: Mapping[str, str]) -> None:
    assert config.sweep is not None
    sweep, size = config.sweep, designs.size_of(config.sweep)
    group = zarr.create_group(
        path,
        zarr_format=_FORMAT,
        attributes={
            "config": config.to_toml(),
            "design": sweep.design,
            "axes": json.dumps(_axes(sweep)),
            "seed": seed,
            "coordinates": " ".join(sweep.parameters),
            **facts,
        },
    )

    def create(name: str, dtype: type, fill: Any, attributes: dict[str, Any]) -> Any:
        attributes = {"_ARRAY_DIMENSIONS": ["point"], **attributes}
        return group.create_array(
            name, shape=(size,), dtype=dtype, chunks=(min(chunk, size),), fill_value=fill, attributes=attributes
        )

    for name, text in METRICS.items():
        create(name, float, np.nan, {"units": "1", "long_name": text})
    create("status", np.int8, None, FLAGS)[:] = np.full(size, PENDING, np.int8)
    columns = [create(name, float, None, {"units": unit_of(name) or "1"}) for name in sweep.parameters]
    rows = chunk * max(1, _BLOCK // chunk)  # whole chunks, so that each is written once
    for begin, values in designs.blocks(sweep, seed, rows):
        for column, numbers in zip(columns, values.T, strict=True):
            column[begin : begin + len(numbers)] = numbers
    zarr.consolidate_metadata(path, zarr_format=_FORMAT)


def _array(group: zarr.Group, name: str) -> zarr.Array:
    found = group[name]
    assert isinstance(found, zarr.Array)
    return found


def _axes(sweep: Sweep) -> dict[str, Any]:
    points = sweep.points if sweep.design == "grid" else None
    return {name: [axis.low, axis.high, axis.points or points] for name, axis in sweep.parameters.items()}


def _flat(facts: Mapping[str, Any]) -> dict[str, str]:
    """Attributes of a store are plain text."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def _relevant(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {k: v for k, v in tables[name].items() if k not in _FREE} for name in _TABLES if name in tables}


def _difference(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Path of the first key that differs; empty if none does."""
    for name in dict.fromkeys([*begun, *now]):
        a, b = begun.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            if inner := _difference(a, b):
                return f"{name}.{inner}"
        elif a != b:
            return name
    return ""

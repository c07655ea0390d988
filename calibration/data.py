"""The loop table: what a laboratory records, one row a cycle, and the rules it must keep.

    loop, cycle, x_set, r_set, window_cycles, detuning_1_set_hz, detuning_2_set_hz   settings
    shots, n_x, n_y, n_m                                                             counts, or instead
    x, x_err, y, y_err                                                               values with standard errors

Settings other than `cycle` and `x_set` are optional; an optional setting is given in every row or in none. Any
measurement may be missing. Nothing is dropped, rounded or clipped: a table that breaks a rule is refused with its file,
line (row, where the file has no lines), column and value.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration import lab_formats
from calibration.columns import COLUMNS, MappingError, TableError, sources_from
from calibration.formats import cell, kind_of, read_csv, to_csv, write_atomic

__all__ = [
    "LoopTable",
    "MappingError",
    "TableError",
    "read_table",
    "synthesize",
    "table_from_dataset",
    "write_table",
]

_LARGEST_DETUNING_HZ = 1e8
_LARGEST_WINDOW = 1e6
_LARGEST_EXCURSION = 0.5  # how far outside [0, 1] noise may carry a measured population before it is a slip of units


@dataclass(frozen=True, eq=False, kw_only=True)
class LoopTable:
    """Recorded loops as columns; axis 0 of every column is the row, in file order.

    Args:
        loop: label of the independent loop a row belongs to, shape (rows,).
        cycle: cycle number, increasing within a loop, shape (rows,).
        x_set: commanded input in [0, 1], shape (rows,).
        r_set: commanded transfer in [0, 1], or None when it was not recorded (the twin's memory then supplies it).
        window_cycles: memory window of the loop, >= 1 and constant within a loop, or None.
        detuning_1_set_hz: known offset of laser 1, laser minus line, in Hz.
        detuning_2_set_hz: known offset of laser 2, laser minus line, in Hz.
        shots: repetitions behind each count (0 where nothing was counted), or None for a table of values.
        n_x: counts assigned to s after pulse 1 alone; NaN where not measured; or None.
        n_y: counts assigned to s after both pulses; NaN where not measured; or None.
        n_m: counts assigned to m by a second detection after both pulses, of shots not in `n_y`; or None.
        x: measured input population; NaN where not measured; or None. Noise may carry it slightly outside [0, 1].
        x_err: standard error of `x`; NaN where not measured; or None.
        y: measured output population; NaN where not measured; or None.
        y_err: standard error of `y`; NaN where not measured; or None.
        name: where the table came from, used in messages.
        sha256: hash of the file (of the CSV text when the table was not read from a file).
        lines: line of the file each row stands on, used in messages; None when the table was not read from a file.

    Raises:
        TableError: a column breaks a rule.
    """

    loop: np.ndarray
    cycle: np.ndarray
    x_set: np.ndarray
    r_set: np.ndarray | None = None
    window_cycles: np.ndarray | None = None
    detuning_1_set_hz: np.ndarray
    detuning_2_set_hz: np.ndarray
    shots: np.ndarray | None = None
    n_x: np.ndarray | None = None
    n_y: np.ndarray | None = None
    n_m: np.ndarray | None = None
    x: np.ndarray | None = None
    x_err: np.ndarray | None = None
    y: np.ndarray | None = None
    y_err: np.ndarray | None = None
    name: str = "loop table"
    sha256: str = ""
    lines: np.ndarray | None = None

    def __post_init__(self):
        for column in COLUMNS:
            if getattr(self, column) is not None:
                object.__setattr__(self, column, self._column(column))
        _check(self)
        if not self.sha256:
            object.__setattr__(self, "sha256", hashlib.sha256(to_csv(self.columns).encode()).hexdigest())

    def _column(self, column: str) -> np.ndarray:
        """A read-only copy of one column in its type."""
        given = np.asarray(getattr(self, column))
        if given.ndim != 1 or given.shape != np.shape(self.loop):
            raise TableError(f"{self.name}: column {column} has shape {given.shape}, but needs one value for each row.")
        try:
            with np.errstate(invalid="ignore"):
                values = given.astype(
                    np.str_ if column == "loop" else np.int64 if column in ("cycle", "shots") else np.float64
                )
        except (TypeError, ValueError):
            raise TableError(f"{self.name}: column {column} has type {given.dtype}, but needs numbers.") from None
        if values.dtype == np.int64 and np.any(wrong := given != values):
            row = int(np.flatnonzero(wrong)[0])
            raise TableError(f"{self.name}: row {row}, column {column} is {given[row]}, but must be an integer.")
        values.flags.writeable = False
        return values

    def __len__(self) -> int:
        return len(self.cycle)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The columns that are there, by name, in the order of the file format."""
        return {column: getattr(self, column) for column in COLUMNS if getattr(self, column) is not None}

    @property
    def kind(self) -> str:
        """What was recorded: "counts" (shots, n_x, n_y) or "values" (x, y with standard errors)."""
        return "values" if self.shots is None else "counts"

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the loops, in the order in which they first appear."""
        return tuple(dict.fromkeys(self.loop.tolist()))

    def rows(self, label: str) -> np.ndarray:
        """Indices of the rows of one loop, in the order of its cycles, shape (cycles,)."""
        return np.flatnonzero(self.loop == label)


def read_table(path: str | os.PathLike[str], columns: Mapping[str, Any] | None = None) -> LoopTable:
    """Read and validate a loop table; the first bytes of the file say what it is, not its name.

    Args:
        path: CSV in UTF-8 (a byte-order mark is accepted), HDF5 (among it ARTIQ results), NetCDF (among it QCoDeS
            exports) or Parquet.
        columns: where the file holds a column of ours: its name there, or ``{"name": ..., "unit": ...}``, or
            ``{"constant": ...}``. Columns that are not mapped are found under our names. Other variables of the file
            are ignored, except that a CSV file without a mapping may hold none.

    Returns:
        The table, its rows in file order; those of a grid in the order of its dimensions, the last running fastest.

    Raises:
        TableError: the file cannot be read, is no such file, or breaks a rule of the table.
        MappingError: `columns` is refused, or names what the file does not hold.

    Example:
        >>> table = read_table("000000042-Loop.h5", {"n_y": "datasets/dark", "shots": {"constant": 400}})
    """
    sources, kind, lines = sources_from(columns), kind_of(path), None
    if kind == "CSV":
        found, lines, sha256 = read_csv(path, sources)
    else:
        found, sha256 = lab_formats.read(kind, path, sources)
    return _table(found, name=os.fspath(path), sha256=sha256, lines=lines)


def table_from_dataset(dataset: Any, columns: Mapping[str, Any] | None = None, name: str = "dataset") -> LoopTable:
    """A validated loop table from an `xarray.Dataset`, by the same rules as from a NetCDF file.

    Args:
        dataset: variables along one dimension (the row), or on a grid such as (loop, cycle).
        columns: as in `read_table`.
        name: how messages call the dataset.

    Returns:
        The table; its hash is that of its CSV text.

    Raises:
        TableError: not such a dataset, or it breaks a rule of the table.
        MappingError: `columns` is refused, or names what the dataset does not hold.
    """
    return _table(lab_formats.from_dataset(dataset, sources_from(columns), name), name=name)


def _table(columns: dict[str, np.ndarray], **facts: Any) -> LoopTable:
    """A table of the columns that were read, and the defaults of those that may be missing."""
    rows = len(columns["cycle"])
    columns.setdefault("loop", np.full(rows, "A"))
    for column in ("detuning_1_set_hz", "detuning_2_set_hz"):
        columns.setdefault(column, np.zeros(rows))
    return LoopTable(**columns, **facts)


def write_table(table: LoopTable, path: str | os.PathLike[str]) -> None:
    """Write a loop table, atomically and with every digit: reading it back gives the same table.

    Args:
        table: what to write.
        path: file to create or replace: NetCDF-4 if its name ends in ``.nc``, Parquet if in ``.parquet`` (both with
            units as attributes), else CSV.

    Raises:
        TableError: Parquet without pyarrow.
        OSError: the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".nc":
        data = lab_formats.to_netcdf(table.columns)
    elif suffix == ".parquet":
        data = lab_formats.to_parquet(table.columns, os.fspath(path))
    else:
        data = to_csv(table.columns).encode()
    write_atomic(path, data)


def synthesize(device: Any, settings: LoopTable, key: Any, *, keep_r_set: bool = False) -> LoopTable:
    """A table that `device` might have produced under the settings of another one (imports JAX).

    Args:
        device: an `AbstractMemristor`; of a `Register`, each loop is an ion.
        settings: commands, laser offsets, windows and shots; its counts are not looked at, except that cells not
            measured there stay empty.
        key: random key of the counts.
        keep_r_set: play the recorded transfers again. Otherwise the device's memory supplies them, from the synthetic
            counts if its source is "measured", as a controller would.

    Returns:
        The same settings with new counts, and with the transfers that were used in `r_set`.

    Raises:
        ValueError: a table without shots, or a device that cannot be solved under these settings.
    """
    import jax

    from calibration.likelihood import Experiment, prepared, replace_observations
    from calibration.problem import Loops
    from calibration.register import RegisterLoops
    from twin.readout import sample_counts
    from twin.register import Register

    if settings.shots is None:
        raise ValueError(f"{settings.name}: synthetic counts need `shots`; this table has values with errors.")
    if isinstance(device, Register):
        data = RegisterLoops.from_table(settings, device)
        device = data.prepared(device)
    else:
        data = Loops(Experiment.from_table(settings))
        device = prepared(device, data.experiment)
    if not keep_r_set:
        data = replace(data, experiment=replace(data.experiment, r_set=None))
    key_x, key_y, key_m = jax.random.split(key, 3)
    first = data.prediction(device, False)
    n_x = sample_counts(key_x, first.p_x, settings.shots)
    if not keep_r_set:
        # Only now are the inputs known that the memory averages.
        data = replace(data, experiment=replace_observations(data.experiment, n_x))
    second = data.prediction(device, False)
    if not bool(np.all(np.asarray(second.valid))):
        raise ValueError("the device cannot be solved under these settings to the error its method asks for.")
    n_y = sample_counts(key_y, second.p_y, settings.shots)
    n_m = None if settings.n_m is None else sample_counts(key_m, second.p_m, settings.shots - n_y)
    blank = lambda n, old: None if old is None else np.where(np.isnan(old), np.nan, np.asarray(n))
    return replace(
        settings,
        r_set=np.asarray(second.r),
        n_x=blank(n_x, settings.n_x),
        n_y=blank(n_y, settings.n_y),
        n_m=blank(n_m, settings.n_m),
        name="synthetic table",
        sha256="",
        lines=None,
    )


def _check(table: LoopTable) -> None:
    """The rules that values must keep, wherever the table came from."""
    if len(table) == 0:
        raise TableError(f"{table.name}: the table has no rows, but one row a cycle is needed.")
    labels = table.loop.tolist()
    bad = np.array([not label.isprintable() or label != label.strip() or label[:1] in ("", "#") for label in labels])
    _refuse(table, bad, "loop", "a label is printable text that does not begin with '#'")
    for column in ("x_set", "r_set"):
        if (values := getattr(table, column)) is not None:
            rule = "a set point lies in [0, 1]; give the commanded fraction"
            _refuse(table, ~((values >= 0) & (values <= 1)), column, rule)
    if table.window_cycles is not None:
        outside = ~((table.window_cycles >= 1) & (table.window_cycles <= _LARGEST_WINDOW))
        _refuse(table, outside, "window_cycles", f"a window lies in [1, {_LARGEST_WINDOW:g}]; give it in cycles")
    for column in ("detuning_1_set_hz", "detuning_2_set_hz"):
        outside = ~(np.abs(getattr(table, column)) <= _LARGEST_DETUNING_HZ)
        _refuse(table, outside, column, f"it lies within ±{_LARGEST_DETUNING_HZ:g} Hz; give laser minus line in Hz")
    _check_loops(table)
    measured = _check_counts(table) if table.kind == "counts" else _check_values(table)
    if not measured.any():
        raise TableError(f"{table.name}: no row holds a measurement; fill n_x or n_y, or x or y, in at least one row.")


def _refuse(table: LoopTable, bad: np.ndarray, column: str, rule: str) -> None:
    """Refuse the table for the first row where `bad` holds, if there is one."""
    if not np.any(bad):
        return
    row = int(np.flatnonzero(bad)[0])
    place = f"row {row}" if table.lines is None else f"line {table.lines[row]}"
    value = getattr(table, column)[row]
    text = repr(str(value)) if column == "loop" else cell(column, value)
    raise TableError(f"{table.name}: {place}, column {column} is {text or 'empty'}, but {rule}.")


def _check_loops(table: LoopTable) -> None:
    step = np.full(len(table), 1)
    changes = np.zeros(len(table), bool)
    for label in table.labels:
        rows = table.rows(label)
        step[rows[1:]] = np.diff(table.cycle[rows])
        if table.window_cycles is not None:
            changes[rows] = table.window_cycles[rows] != table.window_cycles[rows[0]]
    rule = "the cycles of a loop must increase, each number once; sort the rows or label a new loop"
    _refuse(table, step <= 0, "cycle", rule)
    if table.r_set is None:
        rule = "cycles are missing before it and without r_set the memory needs them all; add them or give r_set"
        _refuse(table, step > 1, "cycle", rule)
    _refuse(table, changes, "window_cycles", "the loop began with another; keep it constant or label a new loop")


def _check_counts(table: LoopTable) -> np.ndarray:
    """Which rows hold a measurement, after the rules of counts."""
    if table.shots is None or table.x is not None or table.y is not None or (table.n_x is None and table.n_y is None):
        raise TableError(f"{table.name}: a table with shots needs n_x or n_y, and no x or y; keep one kind of data.")
    _refuse(table, table.shots < 0, "shots", "a number of shots cannot be negative; give the repetitions")
    measured = np.zeros(len(table), bool)
    for column in ("n_x", "n_y", "n_m"):
        if (counts := getattr(table, column)) is None:
            continue
        given = ~np.isnan(counts)
        measured |= given
        rule = "counts are non-negative integers; give what was recorded, or leave the cell empty"
        _refuse(table, given & ((counts != np.floor(counts)) | (counts < 0)), column, rule)
        rule = f"{column} is given; give the number of shots behind it, at least 1"
        _refuse(table, given & (table.shots == 0), "shots", rule)
        _refuse(table, given & (counts > table.shots), column, "counts cannot exceed the shots of the row; check both")
    if table.n_m is not None:
        if table.n_y is None:
            raise TableError(f"{table.name}: n_m counts shots that n_y left, so it needs the column n_y; add it.")
        rule = "n_y of the row is missing; m is counted among the shots that n_y leaves"
        _refuse(table, np.isfinite(table.n_m) & np.isnan(table.n_y), "n_m", rule)
        rule = "n_y and n_m together cannot exceed the shots of the row; check all three"
        _refuse(table, table.n_y + table.n_m > table.shots, "n_m", rule)
    return measured


def _check_values(table: LoopTable) -> np.ndarray:
    """Which rows hold a measurement, after the rules of values with standard errors."""
    if table.n_x is not None or table.n_y is not None:
        raise TableError(f"{table.name}: n_x and n_y need the column shots; add it.")
    measured = np.zeros(len(table), bool)
    for column, error in (("x", "x_err"), ("y", "y_err")):
        values, errors = getattr(table, column), getattr(table, error)
        if (values is None) != (errors is None):
            raise TableError(f"{table.name}: {column} and {error} belong together; give both or none.")
        if values is None:
            continue
        given = ~np.isnan(values)
        measured |= given
        rule = "a population lies in [0, 1] up to noise; give it as a fraction"
        _refuse(table, given & ~(np.abs(values - 0.5) <= 0.5 + _LARGEST_EXCURSION), column, rule)
        _refuse(table, ~given & ~np.isnan(errors), column, f"{error} is given; give the value too, or leave both empty")
        rule = f"{column} is given; give its standard error, a positive number"
        _refuse(table, given & ~((errors > 0) & (errors < np.inf)), error, rule)
    return measured

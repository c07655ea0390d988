"""Tables of auxiliary scans: what a laboratory records beside loops, one row a setting, and the rules of each kind.

    rabi        pulse, area_rad (or rabi_hz with sigma_s), sigma_s, detuning_set_hz; shots, n or p, p_err
    frequency   pulse, detuning_set_hz, area_rad (default pi), sigma_s;              shots, n or p, p_err
    ramsey      wait_s, phase_rad, detuning_set_hz, area_rad (default pi/2);         shots, n or p, p_err
    readout     prepared, photons, count, threshold

Any measurement may be missing, an optional setting is given in every row or in none. Nothing is dropped, rounded or
clipped: a table that breaks a rule is refused with its file, line, column and value. Works without JAX.
"""

import csv
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from calibration.formats import TableError, check_names, number, read_records, write_atomic, written

_MEASUREMENTS = ("shots", "n", "p", "p_err")
_PARTNERS = {"n": "shots", "p": "p_err", "p_err": "p"}
_INTEGERS = ("pulse", "photons", "count", "threshold", "shots", "n")
_PREPARED = ("bright", "dark")
_ROWS = "one row a setting"
# (low, high, what it is) of each setting; slips of units end up outside.
_RANGES = {
    "area_rad": (0.0, 300.0, "an area lies in [0, 300] rad"),
    "rabi_hz": (0.0, 1e8, "a commanded peak Rabi frequency lies in [0, 1e+08] Hz"),
    "sigma_s": (1e-9, 1e-1, "a width lies in [1e-09, 0.1] s"),
    "wait_s": (0.0, 100.0, "a wait between centres lies in [0, 100] s"),
    "phase_rad": (-1e3, 1e3, "a phase lies within ±1000 rad"),
    "detuning_set_hz": (-1e8, 1e8, "an offset lies within ±1e+08 Hz, laser minus line"),
    "pulse": (1, 2, "a pulse is 1 or 2"),
    "photons": (0, 1e9, "a number of photons is not negative"),
    "count": (0, 2**53, "a count of shots is not negative"),
    "threshold": (1, 1e9, "shots with fewer photons than the threshold are called dark, so it is at least 1"),
}


class Kind(NamedTuple):
    """Columns of one kind of scan: settings, those that every table needs, and what is measured."""

    settings: tuple[str, ...]
    required: tuple[str, ...]
    measured: tuple[str, ...] = _MEASUREMENTS

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns, in the order of the file format."""
        return self.settings + self.measured


KINDS = {
    "rabi": Kind(("pulse", "area_rad", "rabi_hz", "sigma_s", "detuning_set_hz"), ("pulse",)),
    "frequency": Kind(("pulse", "detuning_set_hz", "area_rad", "sigma_s"), ("pulse", "detuning_set_hz")),
    "ramsey": Kind(("wait_s", "phase_rad", "detuning_set_hz", "area_rad"), ("wait_s",)),
    "readout": Kind(("prepared", "photons", "count", "threshold"), ("prepared", "photons", "count", "threshold"), ()),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class ScanTable:
    """One recorded scan as columns.

    Args:
        kind: "rabi", "frequency", "ramsey" or "readout".
        columns: values by name, shape (rows,) each: text for `prepared`, integers for the counted settings and
            `shots` (0 where nothing was counted), floats for all others (NaN where not measured).
        name: where the table came from, used in messages.
        sha256: hash of the file (of the CSV text when the table was not read from a file).
        lines: line of the file each row stands on, used in messages; None when the table was not read from a file.

    Raises:
        TableError: a column breaks a rule.
    """

    kind: str
    columns: Mapping[str, Any]  # anything that NumPy makes a column of; read-only arrays afterwards
    name: str = "scan"
    sha256: str = ""
    lines: np.ndarray | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise TableError(f"{self.name}: a scan of kind {self.kind!r} is unknown; name one of {', '.join(KINDS)}.")
        check_columns(list(self.columns), self.name, self.kind)
        order = [column for column in KINDS[self.kind].columns if column in self.columns]
        columns = {column: self._typed(column, np.asarray(self.columns[column])) for column in order}
        object.__setattr__(self, "columns", MappingProxyType(columns))
        _check(self)
        if not self.sha256:
            object.__setattr__(self, "sha256", hashlib.sha256(to_csv(self).encode()).hexdigest())

    def _typed(self, column: str, given: np.ndarray) -> np.ndarray:
        """A read-only copy of one column in its type."""
        if given.ndim != 1 or given.shape != np.shape(next(iter(self.columns.values()))):
            raise TableError(f"{self.name}: column {column} has shape {given.shape}, but needs one value for each row.")
        if column == "prepared":
            values = given.astype(np.str_)
        elif not np.issubdtype(given.dtype, np.number) or np.iscomplexobj(given):
            raise TableError(f"{self.name}: column {column} has type {given.dtype}, but needs numbers.")
        else:
            whole = column in _INTEGERS and column != "n"
            with np.errstate(invalid="ignore"):
                values = given.astype(np.int64 if whole else np.float64)
            if whole and np.any(wrong := given != values):
                row = int(np.flatnonzero(wrong)[0])
                raise TableError(f"{self.name}: row {row}, column {column} is {given[row]}, but must be an integer.")
        values.flags.writeable = False
        return values

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    def get(self, column: str) -> np.ndarray | None:
        """A column, or None where the table lacks it."""
        return self.columns.get(column)

    def filled(self, column: str, default: float) -> np.ndarray:
        """A column; where the table lacks it, `default` in every row."""
        return self.columns[column] if column in self.columns else np.full(len(self), default)

    @property
    def area_rad(self) -> np.ndarray | None:
        """Commanded areas, rad, also of a scan that gives Rabi frequencies: sqrt(2 pi) 2 pi rabi_hz sigma_s."""
        if "rabi_hz" in self.columns:
            return np.sqrt(2 * np.pi) * 2 * np.pi * self["rabi_hz"] * self["sigma_s"]
        return self.get("area_rad")


def read_scan(path: str | os.PathLike[str], kind: str | None = None) -> ScanTable:
    """Read and validate the table of a scan.

    Args:
        path: CSV file in UTF-8 (a byte-order mark is accepted).
        kind: of the scan; None tells it from the columns: `photons` is a readout, `wait_s` a Ramsey scan, `area_rad` or
            `rabi_hz` a Rabi scan, and a frequency scan has `detuning_set_hz` without these.

    Returns:
        The table, its rows in file order.

    Raises:
        TableError: the file cannot be read, is not such a CSV, or breaks a rule of the table.
    """
    name = os.fspath(path)
    if kind is not None and kind not in KINDS:
        raise TableError(f"{name}: a scan of kind {kind!r} is unknown; name one of {', '.join(KINDS)}.")
    if not Path(path).exists():
        raise TableError(f"{name}: there is no such file; name the table of a scan (a CSV file).")
    if Path(path).is_dir():
        raise TableError(f"{name}: this is a folder; name the table of a scan (a CSV file).")
    found = []

    def check_header(header: list[str], where: str) -> None:
        every = list(dict.fromkeys(column for k in KINDS.values() for column in k.columns))
        check_names(header, where, every if kind is None else KINDS[kind].columns)
        found.append(kind or _kind_of(header, where))
        check_columns(header, where, found[0])

    header, rows, lines, sha256 = read_records(path, _ROWS, check_header)
    columns = {}
    for column, *texts in zip(header, *rows, strict=True):
        if (values := _parse(column, texts, lines, name, KINDS[found[0]])) is not None:
            columns[column] = values
    return ScanTable(kind=found[0], columns=columns, name=name, sha256=sha256, lines=lines)


def write_scan(table: ScanTable, path: str | os.PathLike[str]) -> None:
    """Write the table of a scan as CSV, atomically and with every digit: reading it back gives the same table.

    Args:
        table: what to write.
        path: file to create or replace.

    Raises:
        OSError: the file cannot be written.
    """
    write_atomic(path, to_csv(table).encode())


def to_csv(table: ScanTable) -> str:
    """CSV text of a scan; numbers keep every digit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(zip(*([_cell(c, v) for v in values] for c, values in table.columns.items()), strict=True))
    return text.getvalue()


def _cell(column: str, value) -> str:
    return str(value) if column == "prepared" else written(float(value), integer=column in _INTEGERS)


def _kind_of(header: Sequence[str], where: str) -> str:
    tells = {"photons": "readout", "wait_s": "ramsey", "area_rad": "rabi", "rabi_hz": "rabi"}
    for column, kind in (tells | {"detuning_set_hz": "frequency"}).items():
        if column in header:
            return kind
    raise TableError(
        f"{where} does not tell the kind of scan; add area_rad or rabi_hz (rabi), detuning_set_hz (frequency), wait_s "
        "(ramsey) or photons (readout)."
    )


def check_columns(header: Sequence[str], where: str, kind: str) -> None:
    """Refuse a set of columns that cannot be a scan of this kind.

    Raises:
        TableError: a column is missing, unknown, or does not go with another.
    """
    own = KINDS[kind]
    for column in header:
        if column not in own.columns:
            raise TableError(
                f"{where} has the column {column}, which a {kind} scan has not; its columns are "
                f"{', '.join(own.columns)}."
            )
    for column in own.required:
        if column not in header:
            raise TableError(f"{where} lacks the column {column}; add it, every row of a {kind} scan needs it.")
    if kind == "rabi" and ("area_rad" in header) == ("rabi_hz" in header):
        raise TableError(f"{where} needs either area_rad or rabi_hz, and not both; keep one of them.")
    if "rabi_hz" in header and "sigma_s" not in header:
        raise TableError(f"{where} lacks the column sigma_s, which rabi_hz needs for the area; add it.")
    if not own.measured:
        return
    counts, values = ([c for c in pair if c in header] for pair in (("shots", "n"), ("p", "p_err")))
    if counts and values:
        raise TableError(f"{where} mixes counts ({', '.join(counts)}) and values ({', '.join(values)}); keep one kind.")
    for column, partner in _PARTNERS.items():
        if column in header and partner not in header:
            raise TableError(f"{where} lacks the column {partner}, which {column} needs; add it.")
    if not {"n", "p"} & set(header):
        raise TableError(f"{where} lacks the measurements; add shots, n or p, p_err.")


def _parse(column: str, texts: Sequence[str], lines: np.ndarray, name: str, kind: Kind) -> np.ndarray | None:
    """One column from its texts; None for an optional setting that is empty in every row."""
    empty = [not text for text in texts]
    if column in kind.settings and any(empty):
        needed = column in kind.required or column == "rabi_hz"
        if all(empty) and not needed:
            return None
        remedy = "give it in every row" + ("." if needed else ", or in none.")
        raise TableError(f"{name}: line {lines[empty.index(True)]}, column {column} is empty; {remedy}")
    if column == "prepared":
        return np.array(texts)
    missing = 0.0 if column == "shots" else np.nan
    return np.array(
        [
            number(text, column, f"{name}: line {line}, column {column} is {text[:40]!r}", kind.settings, _INTEGERS)
            if text
            else missing
            for text, line in zip(texts, lines, strict=True)
        ]
    )


def _refuse(table: ScanTable, bad: np.ndarray, column: str, rule: str) -> None:
    """Refuse the table for the first row where `bad` holds, if there is one."""
    if not np.any(bad):
        return
    row = int(np.flatnonzero(bad)[0])
    place = f"row {row}" if table.lines is None else f"line {table.lines[row]}"
    value = table[column][row]
    text = repr(str(value)) if column == "prepared" else _cell(column, value)
    raise TableError(f"{table.name}: {place}, column {column} is {text or 'empty'}, but {rule}.")


def _check(table: ScanTable) -> None:
    """The rules that values must keep, wherever the table came from."""
    if len(table) == 0:
        raise TableError(f"{table.name}: the table has no rows, but {_ROWS} is needed.")
    if table.kind == "rabi" and table.area_rad is None:
        raise TableError(f"{table.name}: column area_rad is empty in every row; give the commanded areas.")
    for column, (low, high, rule) in _RANGES.items():
        if (values := table.get(column)) is not None:
            _refuse(table, ~((values >= low) & (values <= high)), column, f"{rule}; check its unit")
    if table.kind == "readout":
        _check_readout(table)
    else:
        _check_measurements(table)


def _check_readout(table: ScanTable) -> None:
    prepared, photons = table["prepared"], table["photons"]
    _refuse(table, ~np.isin(prepared, _PREPARED), "prepared", "an ion is prepared 'bright' or 'dark'")
    seen: set = set()
    pairs = list(zip(prepared.tolist(), photons.tolist(), strict=True))
    twice = np.array([pair in seen or seen.add(pair) is not None for pair in pairs])
    rule = "this number of photons was counted before for the same preparation; add the counts up in one row"
    _refuse(table, twice, "photons", rule)
    rule = "the table began with another; keep it constant, or split the table"
    _refuse(table, table["threshold"] != table["threshold"][0], "threshold", rule)
    for which in _PREPARED:
        rows = prepared == which
        if rows.any() and not table["count"][rows].any():
            _refuse(table, rows, "count", f"no shot of an ion prepared {which} was counted; give its histogram")


def _check_measurements(table: ScanTable) -> None:
    if "n" in table.columns:
        n, shots = table["n"], table["shots"]
        given = ~np.isnan(n)
        _refuse(table, shots < 0, "shots", "a number of shots cannot be negative; give the repetitions")
        rule = "counts are non-negative integers; give what was recorded, or leave the cell empty"
        _refuse(table, given & ((n != np.floor(n)) | (n < 0)), "n", rule)
        _refuse(table, given & (shots == 0), "shots", "n is given; give the number of shots behind it, at least 1")
        _refuse(table, given & (n > shots), "n", "counts cannot exceed the shots of the row; check both")
    else:
        p, p_err = table["p"], table["p_err"]
        given = ~np.isnan(p)
        rule = "a probability lies in [0, 1] up to noise; give it as a fraction"
        _refuse(table, given & ~(np.abs(p - 0.5) <= 1.0), "p", rule)
        _refuse(table, ~given & ~np.isnan(p_err), "p", "p_err is given; give the value too, or leave both empty")
        rule = "p is given; give its standard error, a positive number"
        _refuse(table, given & ~((p_err > 0) & (p_err < np.inf)), "p_err", rule)
    if not given.any():
        raise TableError(f"{table.name}: no row holds a measurement; fill n or p in at least one row.")

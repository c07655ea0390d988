"""File formats of the loop table: bytes to columns and back. The rules of the values are in `calibration.data`.

CSV in UTF-8: a header row, one row a cycle, fields separated by commas, a point as decimal mark; lines that begin with
``#`` are comments, blank lines separate. Nothing is dropped silently: whatever is not such a file is refused with its
line, column and text. HDF5, NetCDF and Parquet are read in `calibration.lab_formats`.
"""

import csv
import difflib
import hashlib
import io
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibration.columns import (
    COLUMNS,
    INTEGERS,
    REQUIRED,
    SETTINGS,
    Source,
    TableError,
    check_complete,
    choose,
    converted,
    units_of,
)

_LARGEST_INTEGER = 2**53  # beyond this a float no longer holds every integer
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip or spreadsheet (.xlsx, .ods) file",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet (.xls) file",
    b"\x1f\x8b": "a gzip-compressed file",
}
_BINARY = {  # how files begin that `calibration.lab_formats` reads
    b"\x89HDF": "HDF5",
    b"CDF\x01": "NetCDF",
    b"CDF\x02": "NetCDF",
    b"CDF\x05": "NetCDF",
    b"PAR1": "Parquet",
}
_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}


def kind_of(path: str | os.PathLike[str]) -> str:
    """What a file is by its first bytes: "HDF5" (which NetCDF-4 is too), "NetCDF", "Parquet", or else "CSV".

    Raises:
        TableError: the file cannot be read.
    """
    head = _read_bytes(Path(path), os.fspath(path), 4)
    return next((kind for mark, kind in _BINARY.items() if head.startswith(mark)), "CSV")


def read_csv(
    path: str | os.PathLike[str], sources: Mapping[str, Source]
) -> tuple[dict[str, np.ndarray], np.ndarray, str]:
    """Columns of a loop table in CSV.

    Args:
        path: CSV file in UTF-8 (a byte-order mark is accepted).
        sources: which column of the file is which of ours; if empty, all must bear our names.

    Returns:
        The columns by name, shape (rows,) each: labels as text, ``cycle`` and ``shots`` as integers (empty shots are
        0), all others as floats (NaN where a measurement is empty); a setting that is empty in every row is left out.
        The line of the file each row stands on, shape (rows,). The SHA-256 of the file.

    Raises:
        TableError: the file cannot be read or is no such CSV.
    """
    name = os.fspath(path)
    chosen: dict[str, Source] = {}
    choose_from = lambda header, where: chosen.update(_check_header(header, sources, where, name))
    header, rows, lines, sha256 = read_records(path, "one row a cycle", choose_from)
    texts = dict(zip(header, zip(*rows, strict=True), strict=False))
    columns = {}
    for column, source in chosen.items():
        if source.name is None:
            values = np.full(len(lines), source.constant)
        else:
            values = _parse(column, texts[source.name], lines, name)
        if values is not None:
            columns[column] = converted(values, units_of(column).get(source.unit, 1.0))
    return columns, lines, sha256


def read_records(
    path: str | os.PathLike[str], rows_needed: str, check_header: Callable[[list[str], str], Any]
) -> tuple[list[str], list[list[str]], np.ndarray, str]:
    """Texts of a CSV file, whatever its table.

    Args:
        path: CSV file in UTF-8 (a byte-order mark is accepted).
        rows_needed: what such a table must have, for messages ("one row a cycle").
        check_header: called with the header and where it stands, before any row is looked at; refuses a wrong one.

    Returns:
        The header; the fields of each row, as many as the header has; the line of the file each row stands on, shape
        (rows,); the SHA-256 of the file.

    Raises:
        TableError: the file cannot be read or is no such CSV.
    """
    name = os.fspath(path)
    data = _read_bytes(Path(path), name)
    text = re.split(r"\r\n|\n|\r", _decode(data, name, rows_needed))
    records = [(k, _split(line, k, name)) for k, line in enumerate(text, 1) if line.strip() and line.lstrip()[0] != "#"]
    if not records:
        raise TableError(f"{name}: the file holds only comments, but a header row and {rows_needed} are needed.")
    header = records[0][1]
    check_header(header, f"{name}: line {records[0][0]} (header)")
    if len(records) == 1:
        raise TableError(f"{name}: line {records[0][0]} is a header without rows, but {rows_needed} is needed.")
    for line, fields in records[1:]:
        if len(fields) != len(header):
            raise TableError(
                f"{name}: line {line} has {len(fields)} fields where the header has {len(header)}; write one field for "
                "each column (empty if not measured), with a point as decimal mark."
            )
    lines = np.array([line for line, _ in records[1:]])
    return header, [fields for _, fields in records[1:]], lines, hashlib.sha256(data).hexdigest()


def to_csv(columns: Mapping[str, np.ndarray]) -> str:
    """CSV text of the columns of a loop table; numbers keep every digit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(
        zip(*([cell(column, value) for value in values] for column, values in columns.items()), strict=True)
    )
    return text.getvalue()


def cell(column: str, value: Any) -> str:
    """Text of one entry of a column: the shortest that reads back as the same number, empty for NaN."""
    if column == "loop":
        return str(value)
    return written(float(value), integer=column in INTEGERS)


def written(value: float, *, integer: bool) -> str:
    """The shortest text that reads back as the same number, empty for NaN."""
    if math.isnan(value):
        return ""
    return str(int(value)) if integer and float(value).is_integer() else repr(value)


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a killed process leaves the old file or the new one, never half of one.

    Args:
        path: file to create or replace.
        data: its content.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{secrets.token_hex(8)}")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read_bytes(path: Path, name: str, count: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except FileNotFoundError:
        raise TableError(f"{name}: there is no such file; name an existing loop table.") from None
    except IsADirectoryError:
        raise TableError(f"{name}: this is a folder; name a loop table (a file).") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TableError(f"{name}: the file cannot be read ({reason}); check its path and permissions.") from None


def _decode(data: bytes, name: str, rows_needed: str) -> str:
    for mark, what in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise TableError(f"{name}: the file is encoded as {what}; save it as CSV in UTF-8.")
    for mark, what in _OTHER_FORMATS.items():
        if data.startswith(mark):
            raise TableError(f"{name}: this is {what}; export the table as CSV in UTF-8.")
    if not data.removeprefix(b"\xef\xbb\xbf").strip():
        raise TableError(f"{name}: the file is empty, but a header row and {rows_needed} are needed.")
    if (null := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, null) + 1
        raise TableError(
            f"{name}: line {line} holds a null byte, so this is no text; export the table as CSV in UTF-8."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise TableError(
            f"{name}: line {line} holds byte 0x{byte:02x}, which is not UTF-8; save it as UTF-8."
        ) from None


def _split(line: str, number: int, name: str) -> list[str]:
    try:
        (fields,) = csv.reader([line], strict=True)
    except csv.Error as error:
        raise TableError(f"{name}: line {number} is not valid CSV ({error}); check its quotation marks.") from None
    return [field.strip() for field in fields]


def _check_header(header: list[str], sources: Mapping[str, Source], where: str, name: str) -> dict[str, Source]:
    """What is read of which column; without a mapping every column must be one of ours."""
    if sources:
        _check_separator(header, where)
    else:
        check_names(header, where, COLUMNS, "remove it, or say in [data.columns] what to read")
    named = [column for column in header if column]
    chosen = choose(named, lambda column: column if column in named else None, sources, name)
    for source in chosen.values():
        if source.name is not None and header.count(source.name) > 1:
            raise TableError(
                f"{where} has the column {source.name} {header.count(source.name)} times; keep one of them."
            )
    check_complete(chosen, where, named if sources else ())
    return chosen


def check_names(header: list[str], where: str, known: Sequence[str], otherwise: str = "remove it") -> None:
    """Refuse a header that is not separated by commas, or names a column twice, not at all or unknown."""
    _check_separator(header, where)
    for column in header:
        if not column:
            raise TableError(f"{where} has a column without a name; name it or remove the surplus comma.")
        if column not in known:
            close = difflib.get_close_matches(column.lower(), known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"{otherwise}; the columns are {', '.join(known)}."
            raise TableError(f"{where} has the unknown column {column[:40]!r}; {remedy}")
        if header.count(column) > 1:
            raise TableError(f"{where} has the column {column} {header.count(column)} times; keep one of them.")


def _check_separator(header: list[str], where: str) -> None:
    for mark, what in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and mark in header[0]:
            raise TableError(f"{where} separates columns by {what}; use commas, and a point as decimal mark.")


def _parse(column: str, texts: Sequence[str], lines: np.ndarray, name: str) -> np.ndarray | None:
    """One column from its texts; None for an optional setting that is empty in every row."""
    empty = [not text for text in texts]
    if column in SETTINGS and any(empty):
        if all(empty) and column not in REQUIRED:
            return None
        remedy = "give it in every row" + ("." if column in REQUIRED else ", or in none.")
        raise TableError(f"{name}: line {lines[empty.index(True)]}, column {column} is empty; {remedy}")
    if column == "loop":
        return np.array(texts)
    missing = 0.0 if column == "shots" else np.nan
    numbers = [
        number(text, column, f"{name}: line {line}, column {column} is {text[:40]!r}") if text else missing
        for text, line in zip(texts, lines, strict=True)
    ]
    return np.array(numbers).astype(np.int64 if column in ("cycle", "shots") else np.float64)


def number(
    text: str, column: str, where: str, settings: Sequence[str] = SETTINGS, integers: Sequence[str] = INTEGERS
) -> float:
    """The number that a field holds; `settings` and `integers` name the columns that are such."""
    if not _NUMBER.fullmatch(text):
        if text.lower().lstrip("+-") in ("nan", "inf", "infinity"):
            remedy = "a setting must be given" if column in settings else "leave the cell empty if not measured"
            raise TableError(f"{where}, which is not a finite number; {remedy}.")
        remedy = "write a point as decimal mark" if _DECIMAL_COMMA.fullmatch(text) else "write a plain number"
        raise TableError(f"{where}, which is not a number; {remedy}.")
    value = float(text)
    if column in integers and not value.is_integer():
        raise TableError(f"{where}, but {column} must be an integer; write the number that was recorded.")
    if abs(value) > (_LARGEST_INTEGER if column in integers else np.finfo(np.float64).max):
        raise TableError(f"{where}, which is too large; check the value.")
    return value

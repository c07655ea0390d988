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
from collections.abc import Mapping, Sequence
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
    data = _read_bytes(Path(path), name)
    text = re.split(r"\r\n|\n|\r", _decode(data, name))
    records = [(k, _split(line, k, name)) for k, line in enumerate(text, 1) if line.strip() and line.lstrip()[0] != "#"]
    if not records:
        raise TableError(f"{name}: the file holds only comments, but a header row and one row a cycle are needed.")
    header = records[0][1]
    chosen = _check_header(header, sources, f"{name}: line {records[0][0]} (header)", name)
    if len(records) == 1:
        raise TableError(f"{name}: line {records[0][0]} is a header without rows, but one row a cycle is needed.")
    for line, fields in records[1:]:
        if len(fields) != len(header):
            raise TableError(
                f"{name}: line {line} has {len(fields)} fields where the header has {len(header)}; write one field for "
                "each column (empty if not measured), with a point as decimal mark."
            )
    lines = np.array([line for line, _ in records[1:]])
    texts = dict(zip(header, zip(*(fields for _, fields in records[1:]), strict=True), strict=False))
    columns = {}
    for column, source in chosen.items():
        if source.name is None:
            values = np.full(len(lines), source.constant)
        else:
            values = _parse(column, texts[source.name], lines, name)
        if values is not None:
            columns[column] = converted(values, units_of(column).get(source.unit, 1.0))
    return columns, lines, hashlib.sha256(data).hexdigest()


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
    number = float(value)
    if math.isnan(number):
        return ""
    return str(int(number)) if column in INTEGERS and number.is_integer() else repr(number)


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


def _decode(data: bytes, name: str) -> str:
    for mark, what in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise TableError(f"{name}: the file is encoded as {what}; save it as CSV in UTF-8.")
    for mark, what in _OTHER_FORMATS.items():
        if data.startswith(mark):
            raise TableError(f"{name}: this is {what}; export the table as CSV in UTF-8.")
    if not data.removeprefix(b"\xef\xbb\xbf").strip():
        raise TableError(f"{name}: the file is empty, but a header row and one row a cycle are needed.")
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
    for mark, what in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and mark in header[0]:
            raise TableError(f"{where} separates columns by {what}; use commas, and a point as decimal mark.")
    for column in () if sources else header:
        if not column:
            raise TableError(f"{where} has a column without a name; name it or remove the surplus comma.")
        if column not in COLUMNS:
            close = difflib.get_close_matches(column.lower(), COLUMNS, n=1)
            remedy = (
                f"did you mean {close[0]}?"
                if close
                else f"remove it, or say in [data.columns] what to read; the columns are {', '.join(COLUMNS)}."
            )
            raise TableError(f"{where} has the unknown column {column[:40]!r}; {remedy}")
    named = [column for column in header if column]
    chosen = choose(named, lambda column: column if column in named else None, sources, name)
    for source in chosen.values():
        if source.name is not None and header.count(source.name) > 1:
            raise TableError(
                f"{where} has the column {source.name} {header.count(source.name)} times; keep one of them."
            )
    check_complete(chosen, where, named if sources else ())
    return chosen


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
        _number(text, column, f"{name}: line {line}, column {column} is {text[:40]!r}") if text else missing
        for text, line in zip(texts, lines, strict=True)
    ]
    return np.array(numbers).astype(np.int64 if column in ("cycle", "shots") else np.float64)


def _number(text: str, column: str, where: str) -> float:
    if not _NUMBER.fullmatch(text):
        if text.lower().lstrip("+-") in ("nan", "inf", "infinity"):
            remedy = "a setting must be given" if column in SETTINGS else "leave the cell empty if not measured"
            raise TableError(f"{where}, which is not a finite number; {remedy}.")
        remedy = "write a point as decimal mark" if _DECIMAL_COMMA.fullmatch(text) else "write a plain number"
        raise TableError(f"{where}, which is not a number; {remedy}.")
    number = float(text)
    if column in INTEGERS and not number.is_integer():
        raise TableError(f"{where}, but {column} must be an integer; write the number that was recorded.")
    if abs(number) > (_LARGEST_INTEGER if column in INTEGERS else np.finfo(np.float64).max):
        raise TableError(f"{where}, which is too large; check the value.")
    return number

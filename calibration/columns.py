"""The columns of the loop table, and where a file holds them: other names, other units, values it does not hold.

A mapping names, for columns of ours, the variable of the file: ``{"n_x": "datasets/dark_counts_1"}``. It may state the
unit of the stored numbers, ``{"name": "det", "unit": "kHz"}``, or give a value that the file does not hold,
``{"constant": 400}``. In a configuration it is the table [data.columns].
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SETTINGS = ("loop", "cycle", "x_set", "r_set", "window_cycles", "detuning_1_set_hz", "detuning_2_set_hz")
COUNTS = ("shots", "n_x", "n_y", "n_m")
VALUES = ("x", "x_err", "y", "y_err")
COLUMNS = SETTINGS + COUNTS + VALUES
MEASUREMENTS = ("n_x", "n_y", "x", "y")
REQUIRED = ("cycle", "x_set")
INTEGERS = ("cycle", "shots", "n_x", "n_y", "n_m")

_PARTNERS = {"n_x": "shots", "n_y": "shots", "n_m": "n_y", "x": "x_err", "y": "y_err", "x_err": "x", "y_err": "y"}
_LARGEST = 1e300  # of a constant, so that no unit carries it to infinity
_HERTZ = {"Hz": 1.0, "mHz": 1e-3, "kHz": 1e3, "MHz": 1e6, "GHz": 1e9}
_FRACTION = {"1": 1.0, "%": 1e-2}
_NUMBER = dict.fromkeys(("1", "counts", "cycles", "shots"), 1.0)


class TableError(ValueError):
    """A loop table breaks a rule; the message is one sentence with file, place (line or row), column, value, remedy."""


class MappingError(TableError):
    """A column mapping is refused; `reason` goes on after its `key` ("is 'kHZ', but must be ...")."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"columns.{key} {reason}" + ("" if reason.endswith("?") else "."))
        self.key, self.reason = key, reason


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one column comes from.

    Args:
        name: variable of the file, or None for a constant.
        unit: unit of the stored numbers or of the constant; empty: that of the file, or else ours.
        constant: value of every row, or None.
        mapped: whether the user named it; False for a variable found under our own name.
    """

    name: str | None = None
    unit: str = ""
    constant: float | str | None = None
    mapped: bool = True


def units_of(column: str) -> dict[str, float]:
    """Units that a column may be stored in, with their size in ours; none for `loop`, which holds labels."""
    if column.endswith("_hz"):
        return _HERTZ
    if column in ("x_set", "r_set", *VALUES):
        return _FRACTION
    return {} if column == "loop" else _NUMBER


def converted(values: np.ndarray, factor: float) -> np.ndarray:
    """Numbers times the size of their unit; a unit below 1 divides, so that 57 % is the float nearest to 0.57."""
    if factor == 1:
        return values
    return values * factor if factor > 1 else values / (1 / factor)


def sources_from(columns: Mapping[str, Any] | None) -> dict[str, Source]:
    """Check a mapping.

    Args:
        columns: for columns of ours the name in the file, or a mapping with ``name`` and perhaps ``unit``, or with
            ``constant``.

    Returns:
        The sources by column.

    Raises:
        MappingError: a column, key, unit or value that is none.
    """
    sources = {}
    for column, given in (columns or {}).items():
        if column not in COLUMNS:
            close = difflib.get_close_matches(str(column).lower(), COLUMNS, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"the columns are {', '.join(COLUMNS)}"
            shown = str(column) if str(column).isprintable() else repr(column)
            raise MappingError(shown, f"is not a column of the loop table; {remedy}")
        sources[column] = _source(column, {"name": given} if isinstance(given, str) else given)
    return sources


def _source(column: str, given: Any) -> Source:
    if not isinstance(given, Mapping) or not given:
        raise MappingError(
            column, f"is {given!r:.60}, but must be a name in the file, or a table with name or constant"
        )
    for key in given:
        if key not in ("name", "unit", "constant"):
            raise MappingError(column, f"has {key!r:.60}, which is not a key; keys are name, unit, constant")
    name, unit, constant = (given.get(key) for key in ("name", "unit", "constant"))
    if (name is None) == (constant is None):
        raise MappingError(column, f"has {'neither' if name is None else 'both'} name and constant; give one of them")
    if name is not None and (not isinstance(name, str) or not name):
        raise MappingError(f"{column}.name", f"is {name!r:.60}, but must be the name of a variable in the file")
    if unit is not None:
        factor_of(column, unit, lambda reason: MappingError(f"{column}.unit", reason))
    if column == "loop":
        constant = str(constant) if isinstance(constant, int) and not isinstance(constant, bool) else constant
        right, what = constant is None or isinstance(constant, str), "a label"
    else:
        number = isinstance(constant, int | float) and not isinstance(constant, bool)
        right, what = constant is None or (number and -_LARGEST < constant < _LARGEST), "a finite number"
    if not right:
        raise MappingError(f"{column}.constant", f"is {constant!r:.60}, but must be {what}")
    return Source(name=name, unit=unit or "", constant=constant)


def factor_of(column: str, unit: Any, error: Callable[[str], TableError]) -> float:
    """Size of a unit in that of the column; `error` makes the refusal of a unit that the column does not take."""
    units = units_of(column)
    if isinstance(unit, str) and unit in units:
        return units[unit]
    if not units:
        raise error(f"is {unit!r:.60}, but {column} holds labels, which have no unit; remove it")
    names = {name.lower(): name for name in units}
    close = difflib.get_close_matches(str(unit).lower(), names, n=1)
    hint = f"; did you mean {names[close[0]]!r}?" if close else ""
    raise error(f"is {unit!r:.60}, but {column} takes {', '.join(repr(name) for name in units)}{hint}")


def choose(
    names: Sequence[str], find: Callable[[str], str | None], sources: Mapping[str, Source], file: str
) -> dict[str, Source]:
    """What is read of a file: mapped columns, and variables that bear our names and serve no mapped column.

    A mapping to counts leaves values aside that are not mapped themselves, and the other way round: a laboratory file
    may well hold an `x` of its own.

    Args:
        names: what the file holds, for suggestions.
        find: the full name of a variable, None where the file holds none.
        sources: a checked mapping.
        file: how messages call the file.

    Returns:
        The source of each column, under the full name of its variable.

    Raises:
        MappingError: a mapped variable is not there.
    """
    chosen = {}
    for column, source in sources.items():
        if source.name is None:
            chosen[column] = source
        elif (found := find(source.name)) is None:
            reason = f"is {source.name!r}, but {file} holds no such variable; {_suggest(source.name, names)}"
            raise MappingError(column, reason)
        else:
            chosen[column] = Source(name=found, unit=source.unit)
    taken = {source.name for source in chosen.values()}
    aside = {column for kind, other in ((COUNTS, VALUES), (VALUES, COUNTS)) if set(kind) & set(sources)
             for column in other}  # fmt: skip
    for column in COLUMNS:
        if column in chosen or column in aside or (found := find(column)) is None or found in taken:
            continue
        chosen[column] = Source(name=found, mapped=False)
    return chosen


def check_complete(columns: Iterable[str], where: str, names: Sequence[str] = ()) -> None:
    """Refuse a file without the columns that belong together.

    Args:
        columns: the columns it gives.
        where: how messages call the place.
        names: what the file holds under other names, for suggestions.

    Raises:
        TableError: columns are missing, or counts are mixed with values.
    """
    header = list(columns)
    add = lambda column: f"add it{_mapping_hint(column, names)}"
    for column in REQUIRED:
        if column not in header:
            reason = f"every cycle needs {' and '.join(REQUIRED)}"
            raise TableError(f"{where} lacks the column {column}; {add(column)}, {reason}.")
    counts, values = ([column for column in kind if column in header] for kind in (COUNTS, VALUES))
    if counts and values:
        raise TableError(f"{where} mixes counts ({', '.join(counts)}) and values ({', '.join(values)}); keep one kind.")
    for column, partner in _PARTNERS.items():
        if column in header and partner not in header:
            raise TableError(f"{where} lacks the column {partner}, which {column} needs; {add(partner)}.")
    if not set(MEASUREMENTS) & set(header):
        raise TableError(f"{where} lacks the measurements; add shots with n_x or n_y, or x, x_err or y, y_err.")


def _mapping_hint(column: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    close = _close(column, names)
    return " or map it in [data.columns]" + (f", such as {column} = {close[0]!r}" if close else "")


def _suggest(name: str, names: Sequence[str]) -> str:
    if close := _close(name, names):
        return f"did you mean {close[0]!r}?"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"it holds {', '.join(names[:8])}{more}" if names else "it holds none"


def _close(name: str, names: Sequence[str]) -> list[str]:
    """Full names that resemble a name, or whose last part does."""
    known = {full.rpartition("/")[2].lower(): full for full in names} | {full.lower(): full for full in names}
    tail = name.rpartition("/")[2].lower()
    matches = [*difflib.get_close_matches(name.lower(), known, n=1), *difflib.get_close_matches(tail, known, n=1)]
    return [known[match] for match in matches]

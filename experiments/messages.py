"""Refusals of a configuration in one sentence: the path, the value, what is allowed and what to do.

Knows nothing of the tables themselves: it reads ranges and units from the fields of the models.
"""

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

SCALES: dict[str, dict[str, float]] = {
    "s": {"s": 1.0, "sec": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9, "ps": 1e-12},
    "hz": {"hz": 1.0, "khz": 1e3, "mhz": 1e6, "ghz": 1e9, "rad_s": 1 / (2 * math.pi), "rad_per_s": 1 / (2 * math.pi)},
}
"""Size of each unit in the unit that the configuration uses for its kind."""


class Allowed(NamedTuple):
    """The range of a number, ends included, in a unit ("" for none)."""

    low: float
    high: float
    unit: str

    def __str__(self) -> str:
        return f"{self.low:g} and {self.high:g} {self.unit}".rstrip()


class ConfigError(ValueError):
    """A configuration is refused; the message is one sentence that names the path, the value and what is allowed."""


class Refusal(ValueError):
    """Raised by a model about the key `key` below it; `reason` goes on after the path ("is 3, but must be 2")."""

    def __init__(self, key: str, reason: str):
        super().__init__(reason)
        self.key = key


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The sentence for the first thing that is wrong; misspelt keys come first, since they cause missing ones."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda entry: entry["type"] != "extra_forbidden")
    others = f" ({len(errors) - 1} more like this)" if len(errors) > 1 else ""
    sentence = _sentence(first, model) + others
    return sentence if sentence.endswith("?") else f"{sentence}."


def unknown_key(key: str, value: Any, known: Sequence[str]) -> str:
    """What to say of a key that is not there: the unit that is meant, the nearest name, or all names."""
    for unit, scales in SCALES.items():
        for suffix, scale in sorted(scales.items(), key=lambda item: -len(item[0])):
            right = key[: -len(suffix)] + unit
            if key.lower().endswith(f"_{suffix}") and right in known and right != key:
                name = "seconds" if unit == "s" else "Hz"
                written = f": write {right} = {value * scale:g}" if _is_number(value) else ""
                return f"is not a key; {right} is given in {name}{written}"
    close = difflib.get_close_matches(key.lower(), known, n=1)
    return f"is not a key; did you mean {close[0]}?" if close else f"is not a key; keys are {', '.join(known)}"


def allowed_range(field: FieldInfo) -> Allowed:
    """The range and unit that the field of a number declares."""
    low = next((mark.ge for mark in field.metadata if isinstance(mark, Ge)), -math.inf)
    high = next((mark.le for mark in field.metadata if isinstance(mark, Le)), math.inf)
    unit = field.json_schema_extra.get("unit", "") if isinstance(field.json_schema_extra, dict) else ""
    return Allowed(float(low), float(high), str(unit))


def _sentence(entry: Any, model: type[BaseModel]) -> str:
    loc, value, kind = entry["loc"], entry["input"], entry["type"]
    path = ".".join(str(part) for part in loc)
    if isinstance(refusal := entry.get("ctx", {}).get("error"), Refusal):
        return f"{'.'.join(part for part in (path, refusal.key) if part)} {refusal}"
    if kind == "extra_forbidden":
        return f"{path} {_unknown(loc, value, model)}"
    field = _field(loc, model)
    if kind == "missing" and field is not None:
        return f"{path} is missing; add it ({_meaning(field)})"
    if kind in ("missing", "too_long") and field is None:  # of a tuple
        loc, value = (loc[:-1], list(value)) if kind == "missing" else (loc, list(value))
        path = ".".join(str(part) for part in loc)
    allowed = _allowed(field, loc[-1])
    if isinstance(value, str) and "number" in allowed and (written := _with_unit(value, str(loc[-1]))):
        return f"{path} is the text {value!r}, but must be {allowed}; write {written}"
    if isinstance(value, str) and field is not None and (choices := _choices(field)):
        close = difflib.get_close_matches(value.lower(), choices, n=1)
        return f"{path} is {value!r}, but must be {allowed}" + (f"; did you mean {close[0]!r}?" if close else "")
    return f"{path} is {_show(value)}, but must be {allowed}"


def _unknown(loc: Sequence[str | int], value: Any, model: type[BaseModel]) -> str:
    key = str(loc[-1])
    parent = _model(loc[:-1], model)
    known = list(parent.model_fields) if parent is not None else []
    said = unknown_key(key, value, known)
    if "did you mean" in said or "given in" in said:
        return said
    for table, field in model.model_fields.items():
        inner = _inner_model(field.annotation)
        if inner is not None and key in inner.model_fields:
            return f"is not a key of this table; it belongs in [{table}]"
    return said


def _field(loc: Sequence[str | int], model: type[BaseModel]) -> FieldInfo | None:
    """The field at a path; None below a field that is not a table."""
    parent = _model(loc[:-1], model)
    return parent.model_fields.get(str(loc[-1])) if parent is not None else None


def _model(loc: Sequence[str | int], model: type[BaseModel]) -> type[BaseModel] | None:
    annotation: Any = model
    for part in loc:
        inner = _inner_model(annotation)
        if inner is not None and isinstance(part, str) and part in inner.model_fields:
            annotation = inner.model_fields[part].annotation
        elif get_origin(annotation) in (list, dict):
            annotation = get_args(annotation)[-1]
        else:
            return None
    return _inner_model(annotation)


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation such as ``Fit | None`` stands for."""
    candidates = [annotation, *get_args(annotation)] if get_origin(annotation) not in (list, dict) else []
    return next((part for part in candidates if isinstance(part, type) and issubclass(part, BaseModel)), None)


def _choices(field: FieldInfo) -> tuple[str, ...]:
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def _meaning(field: FieldInfo) -> str:
    return field.description or ""


def _allowed(field: FieldInfo | None, key: str | int) -> str:
    if field is None:
        return "a number" if isinstance(key, int) else "a pair [low, high] of numbers"
    if choices := _choices(field):
        return "one of " + ", ".join(repr(choice) for choice in choices)
    parts = {field.annotation, *get_args(field.annotation)}
    if any(get_origin(part) is tuple for part in parts):
        return f"a list of numbers: {_meaning(field)}"
    if not parts & {int, float}:
        kind = "a text" if field.annotation is str else "a table"
        kind = "a list of tables" if get_origin(field.annotation) is list else kind
        return f"{kind}: {_meaning(field)}"
    limits = allowed_range(field)
    what = "an integer" if int in parts else "a number"
    return what if math.isinf(limits.low) else f"{what} between {limits}"


def _with_unit(text: str, key: str) -> str:
    """``sigma_1_s = 2e-05`` for the text "20 us"; empty when the text is no number with a unit of the key's kind."""
    match = re.fullmatch(r"\s*([+-]?[\d.]+(?:[eE][+-]?\d+)?)\s*([A-Za-zµμ]*)\s*", text)
    if not match:
        return ""
    unit = key.rpartition("_")[2]
    scales = SCALES.get(unit, {})
    scale = scales.get(match[2].lower(), 1.0 if not match[2] else None)
    try:
        return f"{key} = {float(match[1]) * scale:g}" if scale is not None else ""
    except ValueError:
        return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if _is_number(value):
        return repr(value)[:60]
    text = repr(value)
    return f"the text {text[:60]}" if isinstance(value, str) else text[:60]

"""Refusals of a configuration in one sentence: the path, the value, what is allowed and what to do.

Knows nothing of the tables themselves: it reads ranges and units from the fields of the models.
"""

import difflib
import math
import re
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Le, MaxLen, MinLen
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
    errors = _told_once(error.errors(include_url=False), model)
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
    annotation, field = _at(loc, model)
    if kind == "missing" and field is not None:
        return f"{path} is missing; add it ({_meaning(field)})"
    if kind in ("missing", "too_long") and field is None:  # of a tuple
        loc, value = (loc[:-1], list(value)) if kind == "missing" else (loc, list(value))
        path = ".".join(str(part) for part in loc)
        annotation, field = _at(loc, model)
    allowed = _allowed(annotation, field, isinstance(loc[-1], str))
    if _is_infinite(value):
        allowed = allowed.replace("number", "finite number")
    if isinstance(value, str) and "number" in allowed and (written := _with_unit(value, str(loc[-1]))):
        return f"{path} is the text {value!r}, but must be {allowed}; write {written}"
    if isinstance(value, str) and (choices := _choices(annotation)):
        close = difflib.get_close_matches(value.lower(), choices, n=1)
        return f"{path} is {value!r}, but must be {allowed}" + (f"; did you mean {close[0]!r}?" if close else "")
    if isinstance(value, str) and any(value in _choices(_entry(member)) for member in _members(annotation)):
        return f"{path} is the text {value!r}, but must be {allowed}; write [{value!r}]"
    return f"{path} is {_show(value)}, but must be {allowed}"


def _told_once(errors: Sequence[Any], model: type[BaseModel]) -> list[Any]:
    """The errors, of which what fits no member of a union is one, at the place of the union, and not one a member."""
    told: dict[tuple[Any, ...], Any] = {}
    for entry in errors:
        loc = entry["loc"]
        depth = next((k for k in range(len(loc)) if _is_union(_at(loc[:k], model)[0])), len(loc))
        # The member that refuses the whole value shows it; another may complain of a part of it.
        if depth == len(loc) or loc[:depth] not in told or len(told[loc[:depth]]["loc"]) > depth + 1:
            told[loc if depth == len(loc) else loc[:depth]] = entry
    return [{**entry, "loc": loc} for loc, entry in told.items()]


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


def _at(loc: Sequence[str | int], model: type[BaseModel]) -> tuple[Any, FieldInfo | None]:
    """The annotation at a path, and its field where the last part names one of a table; (None, None) for no place."""
    annotation, field = model, None
    for part in loc:
        inner = _inner_model(annotation)
        if inner is not None and isinstance(part, str) and part in inner.model_fields:
            field = inner.model_fields[part]
            annotation = field.annotation
            continue
        annotation, field = next((e for m in _members(annotation) if (e := _entry(m)) is not None), None), None
        if annotation is None:
            return None, None
    return annotation, field


def _model(loc: Sequence[str | int], model: type[BaseModel]) -> type[BaseModel] | None:
    return _inner_model(_at(loc, model)[0])


def _members(annotation: Any) -> tuple[Any, ...]:
    """What an annotation such as ``Fit | None`` may be, without validators and None."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(member for part in get_args(annotation) for member in _members(part))
    return () if annotation in (None, NoneType) else (annotation,)


def _is_union(annotation: Any) -> bool:
    return len(_members(annotation)) > 1


def _entry(annotation: Any) -> Any:
    """What the entries of a list, a tuple or a table of names are; None for anything else."""
    return get_args(annotation)[-1] if get_origin(annotation) in (list, dict, tuple) else None


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation such as ``Fit | None`` stands for."""
    return next((part for part in _members(annotation) if isinstance(part, type) and issubclass(part, BaseModel)), None)


def _choices(annotation: Any) -> tuple[str, ...]:
    return next((get_args(member) for member in _members(annotation) if get_origin(member) is Literal), ())


def _meaning(field: FieldInfo) -> str:
    return field.description or ""


def _allowed(annotation: Any, field: FieldInfo | None, named: bool) -> str:
    """What may stand at a place, whose last part is a name, or a number in a list."""
    said = " or ".join(_kind(member, field, named) for member in _members(annotation)) or "something else"
    members = {get_origin(member) or member for member in _members(annotation)}
    plain = members <= {int, float, bool, Literal} or any(_choices(_entry(member)) for member in _members(annotation))
    return said if field is None or plain else f"{said}: {_meaning(field)}"


def _kind(member: Any, field: FieldInfo | None, named: bool) -> str:
    origin = get_origin(member)
    if origin is Literal:
        return f"one of {_listed(member)}"
    if member in (int, float):
        what, limits = ("an integer" if member is int else "a number"), allowed_range(field) if field else None
        return what if limits is None or math.isinf(limits.low) else f"{what} between {limits}"
    if origin is tuple:
        parts = get_args(member)
        if len(parts) != 2 or Ellipsis in parts:
            return f"a list of {'' if Ellipsis in parts else f'{len(parts)} '}numbers"
        return "a pair [low, high] of numbers" if named else "a pair of numbers"
    if origin is list:
        return _list_of(member, field)
    if isinstance(member, type) and issubclass(member, BaseModel) and {"low", "high"} <= set(member.model_fields):
        return "a pair [low, high] of numbers or a table with low and high"
    return {str: "a text", bool: "true or false"}.get(member, "a table")


def _list_of(member: Any, field: FieldInfo | None) -> str:
    entry = next(iter(_members(_entry(member))), None)
    marks = field.metadata if field else []
    least, most = (next((getattr(m, key) for m in marks if isinstance(m, kind)), None)
                   for kind, key in ((MinLen, "min_length"), (MaxLen, "max_length")))  # fmt: skip
    if get_origin(entry) is Literal:
        return f"a list of {'one or more' if least else 'any'} of {_listed(entry)}"
    plural = {float: "numbers", int: "integers", str: "texts", tuple: "pairs of numbers", list: "lists"}
    count = f"{least} " if least is not None and least == most else ""
    return f"a list of {count}{plural.get(get_origin(entry) or entry, 'tables')}"


def _listed(choices: Any) -> str:
    return ", ".join(repr(choice) for choice in get_args(choices))


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


def _is_infinite(value: Any) -> bool:
    """Whether it is a float that is not finite, or a list with one."""
    return any(
        isinstance(one, float) and not math.isfinite(one) for one in (value if isinstance(value, list) else [value])
    )


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if _is_number(value):
        return repr(value)[:60]
    text = repr(value)
    return f"the text {text[:60]}" if isinstance(value, str) else text[:60]

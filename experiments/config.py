"""The configuration of a run: a TOML file, replacements from the command line, the resolved tables.

`load_config` reads a file, `Config.to_toml` writes the resolved configuration back, `describe` and `json_schema` tell
what may stand in it. The tables themselves are in `experiments.schema`.
"""

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from calibration.data import LoopTable, MappingError, read_table
from calibration.scan_tables import ScanTable, read_scan
from experiments.messages import ConfigError, explain
from experiments.schema import TABLES, Config, Loop
from experiments.schema_control import CommandMap, Hardware, Optimize, Robust, Shape
from experiments.schema_device import COMMANDS, PARAMETERS, Column, Table

__all__ = [
    "COMMANDS",
    "PARAMETERS",
    "Config",
    "ConfigError",
    "describe",
    "json_schema",
    "load_config",
    "load_table",
    "load_tables",
    "parse_config",
]

VERBS: dict[str, tuple[str, ...]] = {
    "simulate": ("device", "memory", "simulate"),
    "trap": ("trap",),
    "fit": ("device", "memory", "data", "fit", "uncertainty"),
    "coverage": ("device", "memory", "fit", "simulate", "coverage"),
    "design": ("device", "memory", "design"),
    "optimize": ("device", "memory", "optimize"),
    "sweep": ("device", "memory", "sweep"),
    "track": ("device", "memory"),
    "transfer": ("device", "memory", "transfer"),
}
"""Tables that a verb reads; the optional ones among them must be given."""
_TRAPPED = ("simulate", "fit", "optimize", "sweep", "trap")


def load_config(
    path: str | os.PathLike[str],
    *,
    verb: str | None = None,
    sets: Sequence[str] = (),
    data: str | os.PathLike[str] | None = None,
    seed: int | None = None,
) -> Config:
    """Read and validate a configuration.

    Args:
        path: TOML file; the loop table is found relative to it.
        verb: verb whose tables must be there, and whose seed `seed` replaces; None asks for nothing.
        sets: replacements as ``table.key=value``, value in TOML (plain text that is no TOML value counts as a string).
        data: loop table, relative to the working folder, in place of ``data.table``.
        seed: replaces the seed of the verb.

    Returns:
        The resolved configuration.

    Raises:
        ConfigError: the file cannot be read, or a key or value is refused; one sentence that names its path.
    """
    name = os.fspath(path)
    document = _read_toml(name)
    for text in sets:
        _set(document, text)
    if data is not None:
        _set_value(document, ["data", "table"], os.path.abspath(data), "--data")
    if seed is not None and verb is not None:
        _set_value(document, [verb, "seed"], seed, "--seed")
    return parse_config(document, base=Path(name).parent, verb=verb, name=name)


def parse_config(
    document: Mapping[str, Any], *, base: Path = Path(), verb: str | None = None, name: str = "configuration"
) -> Config:
    """Validate a configuration given as nested dictionaries.

    Args:
        document: the tables.
        base: folder that relative paths refer to.
        verb: verb whose tables must be there.
        name: how messages call the document.

    Returns:
        The resolved configuration.

    Raises:
        ConfigError: a key or value is refused; one sentence that names its path.
    """
    try:
        config = Config.model_validate(dict(document))
    except ValidationError as error:
        raise ConfigError(f"{name}: {explain(error, Config)}") from None
    for table in VERBS.get(verb or "", ()):
        if getattr(config, table) is None:
            option = " or give --data" if table == "data" else ""
            raise ConfigError(f"{name}: the table [{table}] is missing, which `iontwin {verb}` needs; add it{option}.")
    if config.data is not None:
        place = lambda path: os.path.abspath(base / path)
        every = lambda given: {name: place(path) for name, path in given.items()}
        paths = {"table": place(config.data.table), "more": every(config.data.more), "scans": every(config.data.scans)}
        config = config.model_copy(update={"data": config.data.model_copy(update=paths)})
    if config.optimize is not None:
        config = config.model_copy(update={"optimize": _placed(config.optimize, base)})
    return config


def _placed(optimize: Optimize, base: Path) -> Optimize:
    """The table with its files as absolute paths."""
    update: dict[str, Any] = {}
    if optimize.curve is not None:
        update["curve"] = os.path.abspath(base / optimize.curve)
    if optimize.shape is not None and Path(optimize.shape.start).suffix:
        start = os.path.abspath(base / optimize.shape.start)
        update["shape"] = optimize.shape.model_copy(update={"start": start})
    return optimize.model_copy(update=update)


def load_tables(config: Config) -> dict[str, LoopTable | ScanTable]:
    """Read the tables of a configuration, by name, and check that the configured memory can work with the loops.

    Args:
        config: a configuration with a table [data].

    Raises:
        TableError: a table breaks a rule.
        ConfigError: the configuration names no table, or one that does not hold what is mapped or what the memory
            remembers.
    """
    if config.data is None:
        raise ConfigError("data.table is missing; name a loop table.")
    paths = {config.data.name: config.data.table, **config.data.more}
    loops = {name: _load(config, path) for name, path in paths.items()}
    return {**loops, **{name: read_scan(path) for name, path in config.data.scans.items()}}


def load_table(config: Config) -> LoopTable:
    """The first loop table of a configuration; as `load_tables`."""
    if config.data is None:
        raise ConfigError("data.table is missing; name a loop table.")
    return _load(config, config.data.table)


def _load(config: Config, path: str) -> LoopTable:
    assert config.data is not None
    try:
        table = read_table(path, config.data.mapping())
    except MappingError as error:
        raise ConfigError(f"data.{error}") from None
    inputs = table.n_x if table.kind == "counts" else table.x
    if config.memory.source == "measured" and table.r_set is None:
        unknown = np.ones(len(table), bool) if inputs is None else np.isnan(inputs)
        if unknown.any():
            row = int(np.flatnonzero(unknown)[0])
            place = f"row {row}" if table.lines is None else f"line {table.lines[row]}"
            raise ConfigError(
                f"{table.name}: {place} has no measured input and the table no r_set, but memory.source is "
                "'measured'; add r_set, or set memory.source to 'model' or 'command'."
            )
    return table


def _read_toml(name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(name).read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no such file; name an existing configuration (TOML).") from None
    except IsADirectoryError:
        raise ConfigError(f"{name}: this is a folder; name a configuration (a TOML file).") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: byte {error.start} is not UTF-8, so this is no TOML; save it as UTF-8.") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{name}: this is not valid TOML ({str(error).rstrip('.')}); mend that place.") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{name}: the file cannot be read ({reason}); check its path and permissions.") from None


def _set(document: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(re.fullmatch(r"[A-Za-z0-9_-]+", part) for part in parts):
        raise ConfigError(f"--set {text}: this must read table.key=value, such as device.sigma_1_s=2e-5.")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")
    except (tomllib.TOMLDecodeError, RecursionError):
        parsed = {"value": value.strip()}
    if list(parsed) != ["value"]:
        raise ConfigError(f"--set {key.strip()}: this sets more than one key; use one --set for each.")
    _set_value(document, parts, parsed["value"], f"--set {text}")


def _set_value(document: Any, parts: list[str], value: Any, option: str) -> None:
    """Replace one value; a number in the path counts entries of a list from 0."""
    for part, then in zip(parts, [*parts[1:], None], strict=True):
        if isinstance(document, list) and part.isdecimal() and int(part) < len(document):
            step = int(part)
        elif isinstance(document, dict):
            step = part
        else:
            raise ConfigError(f"{option}: there is no {'.'.join(parts)} in the configuration; check the path.")
        if then is None:
            document[step] = value
        elif isinstance(document, dict):
            document = document.setdefault(step, {})
        else:
            document = document[step]


def describe(verb: str) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """The schema of a verb's tables as text.

    Args:
        verb: "simulate", "fit", "optimize" or "sweep".

    Returns:
        For each table its name, its purpose, and a pair (key with default, meaning with unit and range) for each key.
    """
    tables = [(f"[{name}]", TABLES[name]) for name in VERBS[verb]]
    if verb == "fit":
        tables.insert(VERBS[verb].index("data") + 1, ("[data.columns.NAME]", Column))
    if verb in ("simulate", "coverage"):
        tables.append(("[[simulate.loops]]", Loop))
    if verb == "optimize":
        tables += [
            ("[optimize.shape]", Shape), ("[optimize.robust]", Robust), ("[optimize.command_map]", CommandMap),
            ("[hardware]", Hardware),
        ]  # fmt: skip
    if verb == "sweep":
        tables.append(("[sweep.loop]", Loop))
    if verb in _TRAPPED:
        tables += [(f"[{name}]", TABLES[name]) for name in ("trap", "chain", "motion", "crosstalk")
                   if name not in VERBS[verb]]  # fmt: skip
    return [
        (title, model.__doc__ or "", [_describe_key(*item) for item in _properties(model)]) for title, model in tables
    ]


def _properties(model: type[Table]) -> list[tuple[str, dict[str, Any], bool]]:
    schema = model.model_json_schema()
    required = schema.get("required", [])
    return [(key, entry, key in required) for key, entry in schema["properties"].items()]


def _describe_key(key: str, entry: Mapping[str, Any], required: bool) -> tuple[str, str]:
    default = entry.get("default")
    shown = (
        "" if default is None or isinstance(default, dict) else f" = {json.dumps(default).replace('Infinity', 'inf')}"
    )
    number = next((part for part in (entry, *entry.get("anyOf", ())) if "minimum" in part), None)
    allowed = ""
    if "enum" in entry:
        allowed = " | ".join(json.dumps(choice) for choice in entry["enum"])
    elif number is not None:
        allowed = f"{number['minimum']:g} to {number.get('maximum', math.inf):g} {entry.get('unit', '')}".rstrip()
    elif "propertyNames" in entry:
        allowed = "names: " + ", ".join(entry["propertyNames"]["enum"])
    notes = [note for note in ("required" if required else "", allowed) if note]
    return key + shown, entry["description"] + (f" ({'; '.join(notes)})" if notes else "")


def json_schema() -> dict[str, Any]:
    """The configuration as JSON Schema."""
    schema = Config.model_json_schema()
    tables = schema["$defs"]
    del tables["Device"]["properties"]["m_lifetime_s"]["default"]  # infinity, which JSON cannot write
    pair = tables["Fit"]["properties"]["free"]["additionalProperties"]
    axes = tables["Sweep"]["properties"]["parameters"]
    axes["additionalProperties"] = {"anyOf": [pair, axes["additionalProperties"]]}
    columns = tables["Data"]["properties"]["columns"]
    columns["additionalProperties"] = {"anyOf": [{"type": "string"}, columns["additionalProperties"]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

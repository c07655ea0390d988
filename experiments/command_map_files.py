"""Command maps as tables: CSV, for people and controllers, and NetCDF, which xarray opens.

Both hold the whole map, with its offsets, its polynomial and its bands, and are read back to the last digit.
"""

import csv
import io
import json
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibration.command_map import AreaPolynomial, Bands, CommandMap
from calibration.formats import write_atomic

FORMAT = "command-map-1"
_COMMENT = re.compile(r"#\s*(\w+)\s*=\s*(.*)")
# Numbers of a map: unit, and whether they belong to the inputs or to inputs and transfers.
_ALONG = {"theta_1": ("rad", 1), "theta_2": ("rad", 2), "residual_1": ("1", 1), "residual_2": ("1", 2),
          "reached_1": ("1", 1), "reached_2": ("1", 2),
          "theta_1_std": ("rad", 1), "theta_2_std": ("rad", 2)}  # fmt: skip
_STD = ("theta_1_std", "theta_2_std")
_FLAGS = ("reached_1", "reached_2")
_PLAIN = ("largest_rad", "rms_plain", "rms_mapped", "rms_reached")


class CommandMapError(ValueError):
    """A file of a command map is refused; the message is one sentence with place, value and remedy."""


def write(path: str | Path, commands: CommandMap) -> None:
    """Write a map whole or not at all; the name ends in ``.csv`` or ``.nc``.

    Raises:
        CommandMapError: another ending.
    """
    path = Path(path)
    write_atomic(path, _format(path)[0](commands))


def read(path: str | Path) -> CommandMap:
    """The map of a file that `write` wrote.

    Raises:
        CommandMapError: it cannot be read, or holds no whole map.
    """
    path = Path(path)
    decode = _format(path)[1]
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise CommandMapError(f"{path}: this cannot be read ({error.strerror}); name a file of a map.") from None
    except CommandMapError as error:
        raise CommandMapError(f"{path}: {error}") from None


def to_csv(commands: CommandMap) -> bytes:
    """Comments ``# key = value`` (JSON), a header with units, and a row for each input and transfer."""
    text, columns = io.StringIO(), _columns(commands)
    text.write(
        "# Areas that give P_s = x_set after pulse 1 alone and (1 - r_set) x_set after both; pi is full command.\n"
    )
    text.write(f"# The lasers are set off their calibrated tuning by {commands.offsets_hz} Hz (lines 1, 2).\n")
    for key, value in _metadata(commands).items():
        text.write(f"# {key} = {json.dumps(value)}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["x_set", "r_set", *map(_header, columns)])
    for i, x in enumerate(commands.x_set.tolist()):
        for j, r in enumerate(commands.r_set.tolist()):
            cells = [values[i] if values.ndim == 1 else values[i, j] for values in columns.values()]
            row = [x, r, *(int(cell) if cell.dtype == bool else float(cell) for cell in cells)]
            writer.writerow([repr(cell) for cell in row])
    return text.getvalue().encode()


def from_csv(data: bytes) -> CommandMap:
    """The map of such a CSV.

    Raises:
        CommandMapError: it is no such CSV.
    """
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CommandMapError(f"byte {error.start} is not UTF-8; save the file as CSV in UTF-8.") from None
    metadata: dict[str, Any] = {}
    for number, line in enumerate(lines, 1):
        if line.startswith("#") and (match := _COMMENT.fullmatch(line.rstrip())):
            try:
                metadata[match[1]] = json.loads(match[2])
            except ValueError:
                raise CommandMapError(
                    f"line {number}: {match[1]} is {match[2]!r:.60}, which is not JSON; restore the line."
                ) from None
    rows = [(number, line.split(",")) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    known = ["x_set", "r_set", *map(_header, _ALONG)]
    header = rows[0][1] if rows else []
    wanted = known if len(header) == len(known) else known[: -len(_STD)]
    if header != wanted:
        raise CommandMapError(f"the header is {','.join(header)!r:.90}, but must be {','.join(wanted)}; restore it.")
    values = np.empty((len(rows) - 1, len(header)))
    for k, (number, fields) in enumerate(rows[1:]):
        if len(fields) != len(header):
            raise CommandMapError(
                f"line {number} has {len(fields)} fields where the header has {len(header)}; add them."
            )
        for column, (name, field) in enumerate(zip(header, fields, strict=True)):
            try:
                values[k, column] = float(field)
            except ValueError:
                raise CommandMapError(f"line {number}, {name} is {field!r:.40}; write a number there.") from None
    x, r = (np.unique(values[:, k]) for k in (0, 1))
    if values.size == 0 or not np.array_equal(values[:, :2], np.stack([np.repeat(x, len(r)), np.tile(r, len(x))], 1)):
        raise CommandMapError("the rows are no full grid of x_set and r_set in ascending order; restore all of them.")
    cube = values[:, 2:].reshape(len(x), len(r), -1)
    columns = {name: cube[:, 0, k] if _ALONG[name][1] == 1 else cube[:, :, k] for k, name in
               enumerate(list(_ALONG)[: cube.shape[2]])}  # fmt: skip
    return _map(metadata, x, r, columns)


def to_netcdf(commands: CommandMap) -> bytes:
    """NetCDF-4 along (x_set, r_set), each variable with its unit, the rest of the map in the attribute ``map``."""
    import xarray as xr

    dims = ("x_set", "r_set")
    variables = {
        name: (
            dims[: values.ndim],
            values.astype(np.int8 if values.dtype == bool else float),
            {"units": _ALONG[name][0]},
        )
        for name, values in _columns(commands).items()
    }
    coordinates = {name: (name, getattr(commands, name), {"units": "1"}) for name in dims}
    dataset = xr.Dataset(variables, coordinates, {"map": json.dumps(_metadata(commands))})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "map.nc"
        dataset.to_netcdf(path, engine="h5netcdf", encoding={name: {"_FillValue": None} for name in variables})
        return path.read_bytes()


def from_netcdf(data: bytes) -> CommandMap:
    """The map of such a NetCDF file.

    Raises:
        CommandMapError: it is no such NetCDF.
    """
    import xarray as xr

    try:
        with xr.open_dataset(io.BytesIO(data), engine="h5netcdf") as dataset:
            dataset.load()
        metadata = json.loads(dataset.attrs["map"])
        x, r = (dataset[name].values for name in ("x_set", "r_set"))
        names = [name for name in _ALONG if name in dataset]
        columns = {name: dataset[name].transpose(*("x_set", "r_set")[: _ALONG[name][1]]).values for name in names}
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise CommandMapError(f"this is no NetCDF-4 of a command map ({reason:.120}); write it again.") from None
    for name in names:
        if (unit := dataset[name].attrs.get("units")) != _ALONG[name][0]:
            raise CommandMapError(
                f"variable {name} is in {unit!r:.40}, but must be in {_ALONG[name][0]!r}; convert it."
            )
    return _map(metadata, x, r, columns)


def _format(path: Path):
    formats = {".csv": (to_csv, from_csv), ".nc": (to_netcdf, from_netcdf)}
    if path.suffix not in formats:
        raise CommandMapError(f"{path}: a map is a .csv or a .nc file; name one of these.")
    return formats[path.suffix]


def _header(name: str) -> str:
    return f"{name}_rad" if _ALONG[name][0] == "rad" else name


def _columns(commands: CommandMap) -> dict[str, np.ndarray]:
    source = {name: getattr(commands, name) for name in _ALONG if name not in _STD}
    return source if commands.bands is None else source | {name: getattr(commands.bands, name) for name in _STD}


def _metadata(commands: CommandMap) -> dict[str, Any]:
    series = commands.polynomial
    found: dict[str, Any] = {"format": FORMAT, "offsets_hz": list(commands.offsets_hz)}
    found |= {name: getattr(commands, name) for name in _PLAIN}
    found["polynomial"] = {name: np.asarray(value).tolist() for name, value in series._asdict().items()}
    if commands.bands is not None:
        found["rms_of_map"], found["rms_of_own"] = (
            column.tolist() for column in (commands.bands.rms_of_map, commands.bands.rms_of_own)
        )
    return found


def _map(metadata: Mapping[str, Any], x, r, columns: Mapping[str, np.ndarray]) -> CommandMap:
    if metadata.get("format") != FORMAT:
        raise CommandMapError(f"the format is {metadata.get('format')!r:.40}, but must be {FORMAT!r}; write it again.")
    for name in _ALONG:
        if name not in columns and name not in _STD:
            raise CommandMapError(f"the variable {name} is missing; write the map again.")
        if name in columns and not np.all(np.isfinite(columns[name])):
            raise CommandMapError(f"{name} holds numbers that are not finite; write the map again.")
    try:
        series = {name: metadata["polynomial"][name] for name in AreaPolynomial._fields}
        polynomial = AreaPolynomial(
            np.array(series["coefficients_1"], float), np.array(series["coefficients_2"], float),
            _pair(series["x_range"]), _pair(series["r_range"]), float(series["error"]),
        )  # fmt: skip
        plain = {name: float(metadata[name]) for name in _PLAIN}
        offsets = _pair(metadata["offsets_hz"])
        bands = None
        if _STD[0] in columns:
            own, of_map = (np.array(metadata[name], float) for name in ("rms_of_own", "rms_of_map"))
            bands = Bands(len(own), *(columns[name] for name in _STD), of_map, own)
    except (KeyError, TypeError, ValueError) as error:
        raise CommandMapError(f"the numbers of the map are not whole ({error!s:.60}); write the map again.") from None
    values = {name: columns[name].astype(bool) if name in _FLAGS else columns[name] for name in _ALONG
              if name not in _STD}  # fmt: skip
    return CommandMap(x_set=x, r_set=r, offsets_hz=offsets, polynomial=polynomial, bands=bands, **values, **plain)


def _pair(values) -> tuple[float, float]:
    low, high = (float(value) for value in values)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("two finite numbers are needed")
    return low, high

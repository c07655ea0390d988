"""Loop tables as laboratories store them: HDF5 (ARTIQ results), NetCDF (QCoDeS exports), xarray datasets, Parquet.

Each reader lists what a file holds and reads a variable by its name; `_columns` then makes the columns of the loop
table of it, one way for all: it converts units, spreads grids over rows and refuses what is no column of numbers. Heavy
libraries are imported where a file of their kind is met.
"""

import hashlib
import io
import math
import os
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.columns import (
    MEASUREMENTS,
    REQUIRED,
    SETTINGS,
    Source,
    TableError,
    check_complete,
    choose,
    converted,
    factor_of,
)

_ROW = "row"  # the dimension of files that do not name theirs
_ARTIQ_SCALES = {"mHz": 1e-3, "Hz": 1.0, "kHz": 1e3, "MHz": 1e6, "GHz": 1e9}  # artiq/language/units.py


@dataclass(frozen=True, kw_only=True)
class _Variable:
    """A variable of a file: values, the names of their axes, its unit, and the stored number that means one unit."""

    values: np.ndarray
    dims: tuple[str, ...]
    unit: str = ""
    one: float = 1.0


@dataclass(frozen=True, kw_only=True)
class _Store:
    """What a file holds: all names, the full name of a variable if it is there, and the variable itself."""

    names: Sequence[str]
    find: Callable[[str], str | None]
    read: Callable[[str], _Variable]


def read(kind: str, path: str | os.PathLike[str], sources: Mapping[str, Source]) -> tuple[dict[str, np.ndarray], str]:
    """Columns of a loop table in a binary file.

    Args:
        kind: "HDF5", "NetCDF" or "Parquet", see `calibration.formats.kind_of`.
        path: the file.
        sources: where it holds which column.

    Returns:
        The columns by name, shape (rows,) each, as `calibration.formats.read_csv` gives them. The SHA-256 of the file.

    Raises:
        TableError: the file is damaged, or lacks or misstates a column.
    """
    name = os.fspath(path)
    columns = {"HDF5": _read_hdf5, "NetCDF": _read_netcdf, "Parquet": _read_parquet}[kind](name, sources)
    with open(path, "rb") as file:
        return columns, hashlib.file_digest(file, "sha256").hexdigest()


def from_dataset(dataset: Any, sources: Mapping[str, Source], name: str) -> dict[str, np.ndarray]:
    """Columns of a loop table in an `xarray.Dataset`; `name` is what messages call it.

    Raises:
        TableError: it is no dataset, or lacks or misstates a column.
    """
    import xarray as xr

    if not isinstance(dataset, xr.Dataset):
        raise TableError(f"{name}: this is a {type(dataset).__name__}, but must be an xarray.Dataset; give one.")
    gathered = _gathered(dataset)

    def variable(full: str) -> _Variable:
        found = dataset.variables[full]
        values, dims = np.asarray(found.values), tuple(str(dim) for dim in found.dims)
        if full in gathered and dims == (full,):
            dim, indices = gathered[full]
            values, dims = values[indices], (dim,)
        return _Variable(values=values, dims=dims, unit=_unit(found.attrs))

    return _columns(_store([str(variable) for variable in dataset.variables], variable), sources, name)


def _gathered(dataset: Any) -> dict[str, tuple[str, np.ndarray]]:
    """Coordinates that are gathered along another dimension: name -> (dimension, index of the value of each entry).

    QCoDeS exports a grid that is not full so, as the CF conventions (section 8.2, "Compression by gathering") lay down:
    a variable with the attribute `compress` holds places in the grid of the dimensions it names, last fastest.
    """
    found = {}
    for dim, variable in dataset.variables.items():
        names = str(variable.attrs.get("compress", "")).split()
        if names and variable.dims == (dim,) and all(name in dataset.sizes for name in names):
            places = np.unravel_index(np.asarray(variable.values, int), [dataset.sizes[name] for name in names])
            found |= {name: (str(dim), indices) for name, indices in zip(names, places, strict=True)}
    return found


def _read_hdf5(name: str, sources: Mapping[str, Source]) -> dict[str, np.ndarray]:
    """NetCDF-4 by xarray; anything else as datasets by their path, of which ARTIQ results are a case.

    ARTIQ (artiq/master/worker_impl.py `write_results`, worker_db.py `DatasetManager.write_hdf5`) puts what an
    experiment set into the group `datasets`, what it read of others into `archive`, and beside them artiq_version, rid,
    start_time, run_time and expid. A name without its group is looked for in `datasets`, then in `archive`.

    Since ARTIQ 8 the attributes unit, scale and precision of `set_dataset` stand at each dataset. They concern display
    alone: the stored value is in SI base units, and what the dashboard shows is value / scale with the unit behind it,
    scale being that of the unit (artiq/language/units.py) where none is given (artiq/tools.py `scale_from_metadata`,
    `short_format`). So 3000.0 with the unit kHz is 3 kHz, and 0.5 with the unit % and the scale 0.01 is 50 %. In other
    files a unit is the unit of the stored numbers.
    """
    import h5py

    with _reading(name, "HDF5"), h5py.File(name) as file:
        names: list[str] = []
        file.visititems(lambda path, item: names.append(path) if isinstance(item, h5py.Dataset) else None)
        if "_NCProperties" in file.attrs or any("DIMENSION_LIST" in file[path].attrs for path in names):
            return _read_netcdf(name, sources, engine="h5netcdf")
        groups = {group for group in ("datasets", "archive") if isinstance(file.get(group), h5py.Group)}
        artiq = "datasets" in groups and ("archive" in groups or "artiq_version" in file)

        def find(given: str) -> str | None:
            path = given.strip("/")
            places = [f"datasets/{path}", f"archive/{path}", path] if artiq else [path]
            return next((place for place in places if path and isinstance(file.get(place), h5py.Dataset)), None)

        def variable(path: str) -> _Variable:
            data = file[path]
            if data.ndim > 1 or data.shape is None or data.dtype.names:
                what = f"the fields {', '.join(data.dtype.names)}" if data.dtype.names else f"the shape {data.shape}"
                raise TableError(
                    f"{name}: variable {path!r} has {what}, but a column has one value a row; store it so."
                )
            values = np.asarray(data.asstr()[()] if h5py.check_string_dtype(data.dtype) else data[()])
            unit = _unit(data.attrs)
            one = data.attrs.get("scale", _ARTIQ_SCALES.get(unit, 1.0)) if artiq else 1.0
            if not isinstance(one, float | int | np.number) or not 0 < one < math.inf:
                raise TableError(
                    f"{name}: the scale of variable {path!r} is {one!r:.60}, but must be a positive number."
                )
            return _Variable(values=values, dims=(_ROW,) * data.ndim, unit=unit, one=float(one))

        return _columns(_Store(names=names, find=find, read=variable), sources, name)


def _read_netcdf(name: str, sources: Mapping[str, Source], engine: str = "scipy") -> dict[str, np.ndarray]:
    """NetCDF-3 (scipy) or NetCDF-4 (h5netcdf), fill values and packed numbers decoded, times left as numbers."""
    import xarray as xr

    with _reading(name, "NetCDF"):
        # scipy would map the file into memory, which a file that is cut off meanwhile does not survive.
        file = io.BytesIO(Path(name).read_bytes()) if engine == "scipy" else name
        with xr.open_dataset(file, engine=engine, decode_times=False) as dataset:
            return from_dataset(dataset, sources, name)


def _read_parquet(name: str, sources: Mapping[str, Source]) -> dict[str, np.ndarray]:
    """Parquet; an attribute `unit` or `units` of a field is the unit of its numbers, a null is an empty cell."""
    pa, parquet = _pyarrow(name)
    with _reading(name, "Parquet"), parquet.ParquetFile(name) as file:
        schema = file.schema_arrow

        def variable(column: str) -> _Variable:
            field = schema.field(column)
            data = file.read(columns=[column]).column(column)
            if pa.types.is_null(field.type):
                data = data.cast(pa.float64())
            if pa.types.is_dictionary(field.type):  # pandas' categories
                data = data.cast(field.type.value_type)
            unit = _unit({key.decode(): text for key, text in (field.metadata or {}).items()})
            return _Variable(values=data.to_numpy(), dims=(_ROW,), unit=unit)

        return _columns(_store(schema.names, variable), sources, name)


def to_netcdf(columns: Mapping[str, np.ndarray]) -> bytes:
    """NetCDF-4 of the columns of a loop table, along the dimension `row`, with their units."""
    import xarray as xr

    dataset = xr.Dataset(
        {
            column: (_ROW, values.astype(object) if column == "loop" else values, _attributes(column))
            for column, values in columns.items()
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.nc"
        dataset.to_netcdf(path, engine="h5netcdf")
        return path.read_bytes()


def to_parquet(columns: Mapping[str, np.ndarray], name: str) -> bytes:
    """Parquet of the columns of a loop table, with their units; what was not measured is null.

    Raises:
        TableError: pyarrow is missing; the message begins with `name`.
    """
    pa, parquet = _pyarrow(name)
    arrays = {
        column: pa.array(values.tolist() if column == "loop" else values, from_pandas=True)
        for column, values in columns.items()
    }
    fields = [pa.field(column, array.type, metadata=_attributes(column)) for column, array in arrays.items()]
    data = io.BytesIO()
    parquet.write_table(pa.table(list(arrays.values()), schema=pa.schema(fields)), data)
    return data.getvalue()


def _attributes(column: str) -> dict[str, str]:
    return {} if column == "loop" else {"units": "Hz" if column.endswith("_hz") else "1"}


def _pyarrow(name: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TableError(f"{name}: Parquet needs pyarrow; run pip install 'ion-memristor-twin[labs]'.") from None
    return pyarrow, pyarrow.parquet


@contextmanager
def _reading(name: str, kind: str) -> Generator[None, None, None]:
    """Turn what the libraries say of a damaged file into one sentence."""
    try:
        yield
    except TableError:
        raise
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise TableError(
            f"{name}: this {kind} file cannot be read ({reason}); it is damaged, incomplete or still being written, "
            "copy it again."
        ) from error


def _store(names: Sequence[str], variable: Callable[[str], _Variable]) -> _Store:
    return _Store(names=names, find=lambda given: given if given in names else None, read=variable)


def _unit(attributes: Mapping[str, Any]) -> str:
    """The attribute `unit` or `units` as text; empty where there is none."""
    for key in ("unit", "units"):
        value = np.asarray(attributes.get(key, "")).reshape(-1)
        text = value[0] if value.size == 1 else ""
        if text := (text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)).strip():
            return text
    return ""


def _columns(store: _Store, sources: Mapping[str, Source], name: str) -> dict[str, np.ndarray]:
    """The columns that are there, one value a row, in our units."""
    chosen = choose(store.names, store.find, sources, name)
    check_complete(chosen, f"{name}: the file", store.names)
    variables = {column: store.read(source.name) for column, source in chosen.items() if source.name is not None}
    sizes = _rows(variables, chosen, name)
    columns = {}
    for column, source in chosen.items():
        if source.name is None:
            values, factor = np.full(tuple(sizes.values()), source.constant), _factor(column, source, None, name)
        else:
            variable = variables[column]
            values, factor = _spread(variable, sizes), _factor(column, source, variable, name)
        checked = _checked(column, values.reshape(-1), name)
        if checked is not None:
            columns[column] = checked if column == "loop" else converted(checked, factor)
    return columns


def _rows(variables: Mapping[str, _Variable], chosen: Mapping[str, Source], name: str) -> dict[str, int]:
    """The dimensions whose product are the rows, with their sizes: those of the measurements."""
    measured = [column for column in MEASUREMENTS if column in variables] or ["cycle"]
    base = max(measured, key=lambda column: len(variables[column].dims) if column in variables else -1)
    if base not in variables or not variables[base].dims:
        raise TableError(
            f"{name}: no measurement has more than one value, so there are no rows; map what was measured."
        )
    sizes = dict(zip(variables[base].dims, variables[base].values.shape, strict=True))
    for column, variable in variables.items():
        here, source = f"{name}: variable {chosen[column].name!r}", chosen[column]
        if not variable.dims and not source.mapped:
            raise TableError(
                f"{here} is a single value; if it holds for every row, say so: {column} = {source.name!r} in "
                "[data.columns]."
            )
        shape = dict(zip(variable.dims, variable.values.shape, strict=True))
        allowed = shape.items() <= sizes.items()
        if not allowed or (variable.dims and column not in SETTINGS and column != "shots" and shape != sizes):
            raise TableError(
                f"{here} is {_shape(shape)}, but {chosen[base].name!r} is {_shape(sizes)}; a column needs one value "
                "for each row."
            )
    return sizes


def _shape(sizes: Mapping[str, int]) -> str:
    return " by ".join(f"{size} ({dim})" for dim, size in sizes.items()) or "a single value"


def _spread(variable: _Variable, sizes: Mapping[str, int]) -> np.ndarray:
    """The values over all rows, shape of `sizes`; along dimensions that the variable lacks they repeat."""
    order = [dim for dim in sizes if dim in variable.dims]
    values = variable.values.transpose([variable.dims.index(dim) for dim in order])
    shape = tuple(size if dim in order else 1 for dim, size in sizes.items())
    return np.broadcast_to(values.reshape(shape), tuple(sizes.values()))


def _factor(column: str, source: Source, variable: _Variable | None, name: str) -> float:
    """Size in our unit of the number 1 as it is stored; the unit of the mapping goes before that of the file."""
    refuse = lambda reason: TableError(
        f"{name}: the unit of variable {source.name!r} {reason}; name it in the mapping."
    )
    if column == "loop":
        return 1.0
    if source.unit:
        return factor_of(column, source.unit, refuse)
    if variable is None:
        return 1.0
    if not variable.unit and variable.one != 1:
        raise refuse(f"is not stated beside its scale {variable.one:g}")
    if not variable.unit:
        return 1.0
    return factor_of(column, variable.unit, refuse) / variable.one


def _checked(column: str, values: np.ndarray, name: str) -> np.ndarray | None:
    """The values of one column in the types `read_csv` gives; None for an optional setting that is empty throughout."""
    if column == "loop":
        return np.array([_label(value, f"{name}: row {row}, column loop") for row, value in enumerate(values.tolist())])
    if values.dtype.kind in "OSUT":
        for row, value in enumerate(values.tolist()):
            if isinstance(value, str | bytes):
                raise TableError(f"{name}: row {row}, column {column} is the text {value!r:.60}; store it as a number.")
    if values.dtype.kind not in "iuf":
        raise TableError(f"{name}: column {column} has the type {values.dtype}, but needs numbers; store it so.")
    if values.dtype.kind == "f" and (empty := np.isnan(values)).any():
        if column in SETTINGS:
            if empty.all() and column not in REQUIRED:
                return None
            remedy = "give it in every row" + ("." if column in REQUIRED else ", or in none.")
            raise TableError(f"{name}: row {int(np.flatnonzero(empty)[0])}, column {column} is empty; {remedy}")
        if column == "shots":
            return np.where(empty, 0, values)
    return values


def _label(value: Any, where: str) -> str:
    """A label as text: a whole number without its point, since QCoDeS stores every number as a float."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int | str) and not isinstance(value, bool):
        return str(value)
    raise TableError(f"{where} is {value!r:.60}, but must be a text or a number that tells one loop from another.")

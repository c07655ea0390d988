"""Pulse samples as tables: CSV, for people and any program, and NetCDF, which xarray opens."""

import csv
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.waveform_samples import Samples, WaveformError, attributes_from, check_times

_COMMENT = re.compile(r"#\s*(\w+)\s*=\s*(.*)")
_KEYS = ("sample_s", "start_s", "full_scale_rad_s", "carrier_hz", "bits", "attributes")
_PARTS = ("real_rad_s", "imag_rad_s")
_VARIABLES = {  # of a NetCDF file: dimensions and unit
    "real_rad_s": (("time", "channel"), "rad/s"),
    "imag_rad_s": (("time", "channel"), "rad/s"),
    "time": (("time",), "s"),
    "channel": (("channel",), ""),
}


def to_csv(samples: Samples) -> bytes:
    """CSV in UTF-8: comments ``# key = value`` (JSON), a header, and a row a sample; numbers keep every digit."""
    text = io.StringIO()
    for key in _KEYS:
        if (value := getattr(samples, key)) is not None:
            text.write(f"# {key} = {json.dumps(value)}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_header(samples.channels))
    waves = np.stack([samples.real_rad_s, samples.imag_rad_s], axis=2).reshape(len(samples.real_rad_s), -1)
    writer.writerows(map(repr, row) for row in np.column_stack([samples.times_s, waves]).tolist())
    return text.getvalue().encode()


def from_csv(data: bytes) -> Samples:
    """The samples of such a CSV; without ``sample_s`` or ``start_s`` among the comments, the times say them.

    Raises:
        WaveformError: it is no such CSV.
    """
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise WaveformError(f"byte {error.start} is not UTF-8; save the file as CSV in UTF-8.") from None
    metadata, rows = {}, []
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            if (match := _COMMENT.fullmatch(line.rstrip())) and match[1] in _KEYS:
                metadata[match[1]] = _value(match[2], f"line {number}, {match[1]}")
        elif line.strip():
            rows.append((number, line.split(",")))
    if len(rows) < 2:
        raise WaveformError("the file holds no samples; write a header row and one row a sample.")
    numbers, table = [number for number, _ in rows[1:]], []
    header = [name.strip() for name in rows[0][1]]
    channels = tuple(name.removesuffix("_real_rad_s") for name in header[1::2])
    if header != _header(channels):
        place = f"line {rows[0][0]} (header) is {','.join(header)!r:.90}"
        raise WaveformError(f"{place}, but must be time_s and, a channel, NAME_real_rad_s and NAME_imag_rad_s.")
    for number, fields in rows[1:]:
        if len(fields) != len(header):
            remedy = "write one for each column, with a point as decimal mark"
            raise WaveformError(f"line {number} has {len(fields)} fields where the header has {len(header)}; {remedy}.")
        table.append([_float(text, f"line {number}, column {name}")
                      for text, name in zip(fields, header, strict=True)])  # fmt: skip
    values = np.array(table)
    waves = {part: values[:, 1 + k :: 2] for k, part in enumerate(_PARTS)}
    return _samples(metadata, channels, waves, values[:, 0], lambda k: f"line {numbers[k]}, column time_s")


def to_netcdf(samples: Samples) -> bytes:
    """NetCDF-4: ``real_rad_s`` and ``imag_rad_s`` along (time, channel), full scale and carrier along channel."""
    import xarray as xr

    unit = {"units": "rad/s"}
    variables: dict[str, Any] = {part: (("time", "channel"), getattr(samples, part), unit) for part in _PARTS}
    variables["full_scale_rad_s"] = ("channel", list(samples.full_scale_rad_s), unit)
    if samples.carrier_hz is not None:
        variables["carrier_hz"] = ("channel", list(samples.carrier_hz), {"units": "Hz"})
    coordinates = {
        "time": ("time", samples.times_s, {"units": "s", "long_name": "start of the sample after the trigger"}),
        "channel": ("channel", np.array(samples.channels, dtype=object)),
    }
    attributes: dict[str, Any] = {"sample_s": samples.sample_s, "start_s": samples.start_s}
    attributes["attributes"] = json.dumps(dict(samples.attributes))
    if samples.bits is not None:
        attributes["bits"] = samples.bits
    dataset = xr.Dataset(variables, coordinates, attributes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.nc"
        # A sample is never missing: without a fill value no reader looks for any.
        plain = {name: {"_FillValue": None} for name in (*variables, "time")}
        dataset.to_netcdf(path, engine="h5netcdf", encoding=plain)
        return path.read_bytes()


def from_netcdf(data: bytes) -> Samples:
    """The samples of such a NetCDF file.

    Raises:
        WaveformError: it is no such NetCDF.
    """
    import xarray as xr

    try:
        with xr.open_dataset(io.BytesIO(data), engine="h5netcdf", decode_times=False) as dataset:
            dataset.load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise WaveformError(f"this is no NetCDF-4 that can be read ({reason:.120}); write it again.") from None
    for name, (dims, unit) in _VARIABLES.items():
        if name not in dataset.variables:
            raise WaveformError(f"the file lacks the variable {name}; write it along ({', '.join(dims)}).")
        if set(dataset[name].dims) != set(dims):
            found = ", ".join(map(str, dataset[name].dims))
            raise WaveformError(f"variable {name} is along ({found}), but must be along ({', '.join(dims)}).")
        if (found := dataset[name].attrs.get("units", unit)) != unit:
            raise WaveformError(f"variable {name} is in {found!r:.60}, but must be in {unit!r}; convert it.")
    if dataset["time"].dtype.kind not in "iuf":
        raise WaveformError(f"variable time has the type {dataset['time'].dtype}; store seconds as numbers.")
    metadata: dict[str, Any] = {key: dataset.attrs[key] for key in ("sample_s", "start_s") if key in dataset.attrs}
    metadata |= {
        key: np.atleast_1d(dataset[key].values) for key in ("full_scale_rad_s", "carrier_hz") if key in dataset
    }
    if "bits" in dataset.attrs:
        bits = dataset.attrs["bits"]
        metadata["bits"] = int(bits) if isinstance(bits, np.integer) else bits
    if "attributes" in dataset.attrs:
        metadata["attributes"] = attributes_from(dataset.attrs["attributes"])
    waves = {part: dataset[part].transpose("time", "channel").values for part in _PARTS}
    channels = tuple(map(str, dataset["channel"].values.tolist()))
    return _samples(metadata, channels, waves, dataset["time"].values, lambda k: f"entry {k} of time")


def _samples(metadata: dict, channels: tuple[str, ...], waves: dict, times_s: np.ndarray, row: Any) -> Samples:
    if "full_scale_rad_s" not in metadata:
        raise WaveformError("full_scale_rad_s is missing; state the Rabi frequency at full scale, a number a channel.")
    if not len(times_s):
        raise WaveformError("the file holds no samples; write at least one.")
    if "sample_s" not in metadata and len(times_s) < 2:
        raise WaveformError("sample_s is missing, and one row alone does not say it; state it.")
    metadata.setdefault("start_s", times_s[0])
    metadata.setdefault("sample_s", (times_s[-1] - times_s[0]) / max(len(times_s) - 1, 1))
    samples = Samples(channels=channels, **waves, **metadata)
    check_times(times_s, samples.start_s, samples.sample_s, row)
    return samples


def _header(channels: tuple[str, ...]) -> list[str]:
    return ["time_s", *(f"{channel}_{part}" for channel in channels for part in _PARTS)]


def _value(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        remedy = 'write a number, a list [1.0, 2.0] or an object {"key": "text"}'
        raise WaveformError(f"{where} is {text!r:.60}, which is not JSON; {remedy}.") from None


def _float(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise WaveformError(f"{where} is {text.strip()!r:.60}, which is not a number; write one.") from None

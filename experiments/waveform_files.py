"""Pulse samples in files: CSV and NetCDF tables, OpenQASM 3 with OpenPulse, ARTIQ experiments for AD9910 channels.

The suffix of a file says its format: ``.csv``, ``.nc``, ``.qasm``, ``.py``. What a format cannot hold exactly, it says
in the samples that it reads back: `bits` is 14 after an AD9910, whose amplitudes have as many.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from calibration.formats import write_atomic
from experiments import waveform_artiq, waveform_openpulse, waveform_tables
from experiments.waveform_samples import Samples, WaveformError

__all__ = ["KINDS", "Samples", "WaveformError", "read", "write"]


class _Format(NamedTuple):
    suffix: str
    pack: Callable[[Samples], bytes]
    unpack: Callable[[bytes], Samples]


_FORMATS = {
    "csv": _Format(".csv", waveform_tables.to_csv, waveform_tables.from_csv),
    "netcdf": _Format(".nc", waveform_tables.to_netcdf, waveform_tables.from_netcdf),
    "openqasm": _Format(".qasm", waveform_openpulse.to_openqasm, waveform_openpulse.from_openqasm),
    "artiq": _Format(".py", waveform_artiq.to_artiq, waveform_artiq.from_artiq),
}
KINDS = tuple(_FORMATS)
"""Kinds of files."""


def write(path: str | os.PathLike[str], samples: Samples, kind: str | None = None) -> None:
    """Write pulse samples; the file is there whole or not at all.

    Args:
        path: file to create or replace, with the suffix of its kind.
        samples: what to write.
        kind: one of `KINDS`; None takes that of the suffix.

    Raises:
        WaveformError: an unknown kind or suffix, samples that the format cannot hold, or a file that cannot be written.

    Example:
        >>> write("pulse.qasm", samples)
        >>> read("pulse.qasm").channels
    """
    name, found = os.fspath(path), _kind(path)
    if kind is not None and kind != found:
        if kind not in _FORMATS:
            raise WaveformError(f"{name}: kind is {kind!r:.60}, but must be one of {', '.join(KINDS)}.")
        raise WaveformError(
            f"{name}: kind is {kind}, but the suffix is that of {found}; end in {_FORMATS[kind].suffix}."
        )
    data = _named(name, lambda: _FORMATS[found].pack(samples))
    try:
        write_atomic(path, data)
    except OSError as error:
        raise WaveformError(f"{name}: cannot be written ({error.strerror}); name a file in a folder you own.") from None


def read(path: str | os.PathLike[str]) -> Samples:
    """Read pulse samples that `write` wrote, or that stand in such a file; nothing in it is executed.

    Args:
        path: file with the suffix of its kind.

    Returns:
        The samples; `bits` says how finely the file holds their amplitudes, None for full precision.

    Raises:
        WaveformError: the file cannot be read or is not of its kind.
    """
    name, kind = os.fspath(path), _kind(path)
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise WaveformError(f"{name}: cannot be read ({reason}); name an existing waveform file.") from None
    return _named(name, lambda: _FORMATS[kind].unpack(data))


def _kind(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    for kind, form in _FORMATS.items():
        if form.suffix == suffix:
            return kind
    known = ", ".join(f"{form.suffix} ({kind})" for kind, form in _FORMATS.items())
    raise WaveformError(
        f"{os.fspath(path)}: the suffix {suffix!r} is not that of a waveform file; end in one of {known}."
    )


def _named(name: str, work):
    """The result of `work`, whose refusals get the name of the file."""
    try:
        return work()
    except WaveformError as error:
        raise WaveformError(f"{name}: {error}") from None

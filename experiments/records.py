"""Run folders: what a run leaves behind, whole or not at all.

A run folder holds ``config.toml`` (resolved), ``result.json``, ``arrays.nc``, ``figures/``, ``report.html`` and
``log.txt``. It grows in a hidden folder beside its place and is renamed when the run is done, so a killed run leaves
no half result, only a folder named ``.NAME.partial-…`` that can be deleted.
"""

import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibration.formats import write_atomic

RESULT = "result.json"
CONFIG = "config.toml"
ARRAYS = "arrays.nc"
REPORT = "report.html"
LOG = "log.txt"
FIGURES = "figures"


class OutputError(ValueError):
    """An output cannot be written, or a run folder cannot be read; the message is one sentence."""


class RunFolder:
    """The output folder of one run, to be used as a context.

    Leaving the context without an exception renames the hidden folder to `path`; leaving it with one removes it, so
    that nothing was written.

    Args:
        path: the folder to create; it must not exist, or be empty.
        replace: whether it may be an earlier run, which stays until this one is done.

    Raises:
        OutputError: the folder cannot be written or already holds something.
    """

    def __init__(self, path: str | os.PathLike[str], *, replace: bool = False):
        check_output(path, replace=replace)
        self.replace = replace
        self.path = Path(os.path.realpath(path))
        self.work = self.path.with_name(f".{self.path.name}.partial-{secrets.token_hex(4)}")
        self._made: list[Path] = []

    def __enter__(self) -> "RunFolder":
        missing = [parent for parent in self.path.parents if not parent.exists()]
        try:
            for folder in (*reversed(missing), self.work, self.work / FIGURES):
                folder.mkdir(exist_ok=folder in missing)  # runs side by side may share new parents
                self._made.append(folder)
        except OSError as error:
            self._remove()
            raise _unwritable(self.path, error) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._remove()
            return
        old = self.work.with_suffix(".old")
        try:
            if self.replace and is_run(self.path):
                os.replace(self.path, old)
            os.replace(self.work, self.path)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:  # something has come to stand there: the work of a long run is not thrown away
            raise RuntimeError(
                f"{self.path}: the run is done but cannot be moved here ({error.strerror}); it stands in {self.work}."
            ) from None

    def _remove(self) -> None:
        """Take back every folder made, but no parent that meanwhile holds something else."""
        shutil.rmtree(self.work, ignore_errors=True)
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:
                continue

    @property
    def figures(self) -> Path:
        """Where figures are saved while the run goes on."""
        return self.work / FIGURES

    def write_config(self, config_toml: str) -> None:
        """Write the resolved configuration, `Config.to_toml()`."""
        write_atomic(self.work / CONFIG, config_toml.encode())

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``; numbers that are not finite become null and are named under ``not_finite``."""
        write_atomic(self.work / RESULT, to_json(result).encode())

    def write_arrays(self, arrays: Any) -> None:
        """Write an `xarray.Dataset` as ``arrays.nc`` (NetCDF-4); xarray is imported by whoever made it."""
        arrays.to_netcdf(self.work / ARRAYS, engine="h5netcdf")

    def write_report(self, html: str) -> None:
        """Write ``report.html``."""
        write_atomic(self.work / REPORT, html.encode())

    def log(self, message: str) -> None:
        """Say one line on stderr and keep it, with the time, in ``log.txt``."""
        print(message, file=sys.stderr, flush=True)
        with open(self.work / LOG, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {message}\n")


class Run:
    """A finished run folder, read back.

    Args:
        path: the run folder.

    Raises:
        OutputError: it is no run folder, or one of its files is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        from experiments.config import load_config

        self.path = Path(path)
        if not is_run(self.path):
            raise OutputError(f"{self.path}: this is no run folder, with {CONFIG} and {RESULT}; name one of a run.")
        self.config = load_config(self.path / CONFIG)
        try:
            result = json.loads((self.path / RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.path / RESULT}: this cannot be read ({error}); run it again.") from None
        if not isinstance(result, dict):
            raise OutputError(f"{self.path / RESULT}: this holds no JSON object; run it again.")
        self.result: dict[str, Any] = result

    @property
    def arrays(self) -> Any:
        """The arrays of the run as an `xarray.Dataset` in memory; xarray is imported only now."""
        import xarray as xr

        path = self.path / ARRAYS
        if not path.is_file():
            raise OutputError(f"{self.path}: this run folder has no {ARRAYS}; run it again.")
        return xr.load_dataset(path, engine="h5netcdf")


def is_run(path: Path) -> bool:
    """Whether a folder holds a run."""
    return (path / CONFIG).is_file() and (path / RESULT).is_file()


def check_output(path: str | os.PathLike[str], *, replace: bool = False, resumable: bool = False) -> None:
    """Refuse, before anything is computed, an output folder that cannot be written or holds something already.

    Args:
        path: the folder that a run is to create.
        replace: whether it may be a run folder that the run replaces.
        resumable: whether it may be a Zarr store that the run goes on with.

    Raises:
        OutputError: one sentence that says what to do.
    """
    try:
        path = Path(os.path.realpath(path))
        if path.is_dir():
            entries = {entry.name for entry in path.iterdir()}
            store = resumable and entries & {"zarr.json", ".zgroup"}
            if entries and not store and not (replace and is_run(path)):
                what = "already holds a run" if is_run(path) else "is not empty"
                raise OutputError(f"{path}: this folder {what}; name a new one with --out, or remove it first.")
            if os.path.ismount(path):
                raise OutputError(f"{path}: this is a mount point, which a run cannot replace; name a folder in it.")
        elif os.path.lexists(path):
            raise OutputError(f"{path}: this is a file, but the output is a folder; name another with --out.")
        nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    except OSError as error:
        raise _unwritable(Path(path), error) from None
    except ValueError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{os.fspath(path)!r}: this is no path ({error}); name another with --out.") from None
    if not nearest.is_dir():
        raise OutputError(f"{path}: {nearest} is not a folder, so nothing can be written below it; use another --out.")
    folder = path.parent if nearest == path else nearest
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: {folder} cannot be written; mend its permissions or use another --out.")


def to_json(value: Any) -> str:
    """Valid JSON of nested dictionaries, sequences, arrays and numbers.

    Args:
        value: what to write; NaN and infinities become null, and the object gains ``not_finite``, their paths and
            values.

    Returns:
        The text, ending in a newline.
    """
    lost: dict[str, str] = {}
    plain = _plain(value, "", lost)
    if lost:
        plain = {**plain, "not_finite": lost} if isinstance(plain, dict) else {"value": plain, "not_finite": lost}
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any, path: str, lost: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{path}.{key}".lstrip("."), lost) for key, entry in value.items()}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, list | tuple | int | float):
        value = np.asarray(value).tolist()  # arrays and scalars of numpy and JAX
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{path}.{k}".lstrip("."), lost) for k, entry in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost[path] = "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
        return None
    if not isinstance(value, bool | int | float | str):
        raise TypeError(f"{path or 'the value'} has type {type(value).__name__}, which JSON cannot hold.")
    return value


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: this cannot be written ({error.strerror}); name another folder with --out.")

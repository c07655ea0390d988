"""`iontwin sweep`: one loop at many points of named parameters, in batches, into a Zarr store.

The store has one dimension, `point`. It is laid out whole with the first batch, with the status "pending" everywhere;
each batch fills its region and then its statuses, so that a sweep that was interrupted goes on where it was.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import sys
import tomllib
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from calibration.parameters import anchored, unit_of, with_parameters
from experiments.build import device_from, memory_from
from experiments.provenance import Stopwatch, provenance
from experiments.records import OutputError
from experiments.schema import Axis, Config, Loop, Sweep
from experiments.simulate import last_period, settled
from twin import hysteresis
from twin.dynamics import StaticGrid
from twin.loop import AbstractMemristor, sine_input
from twin.loop import run as run_loop
from twin.memristor import AreaSeries, Automatic, ClosedForm, IonMemristor, Lindblad, planned

PENDING, OK, INVALID = 0, 1, 2
METRICS = {
    "signed_area": "closed integral of y dx over the last period",
    "form_factor": "4 pi |area| / perimeter^2 of the last period",
    "pinch_offset": "distance of the loop from the origin",
    "rms_obedience": "rms of y - (1 - r) x_set over the cycles of the last period",
}
_FORMAT: Any = 2  # of Zarr: the one whose consolidated metadata every reader knows
_BOUND_SLICE = 100_000


def run(config: Config, store: Path, seed: int) -> dict[str, Any]:
    """Run the sweep of a configuration, or what is left of it.

    Args:
        config: with a table [sweep].
        store: Zarr store to create, or one that the same configuration has begun.
        seed: of the random design and of the shot noise; every point has its own key.

    Returns:
        {"status", "store", "points", "ok", "invalid", "resumed_at", "method", "seconds", ...}.

    Raises:
        OutputError: the store is of another configuration, or of something else.
    """
    assert config.sweep is not None
    clock = Stopwatch()
    sweep, store = config.sweep, Path(store)
    points = design(sweep, seed)
    names, size = tuple(points), len(next(iter(points.values())))
    begun = store.is_dir() and any(store.iterdir())
    status = _statuses(store, config) if begun else np.full(size, PENDING, np.int8)
    resumed = int(np.sum(status != PENDING))
    device = _device(config, points)
    key = jax.random.key(seed)
    with _progress(size, resumed) as update:
        for begin in range(0, size, sweep.chunk):
            region = slice(begin, min(begin + sweep.chunk, size))
            if np.all(status[region] != PENDING):
                continue
            # The last batch repeats its last point, so that every batch is the same program.
            index = np.minimum(np.arange(begin, begin + sweep.chunk), size - 1)
            values = np.stack([points[name][index] for name in names], axis=1)
            found = _batch(device, sweep.loop, names, jnp.asarray(values), jnp.asarray(index), key)
            kept = {name: np.asarray(value)[: region.stop - begin] for name, value in found.items()}
            if not begun:  # what fails before its first numbers leaves nothing behind
                _create(store, config, points)
                begun = True
            status[region] = np.where(kept.pop("valid"), OK, INVALID)
            _fill(store, region, kept)
            _fill(store, region, {"status": status[region]})
            update(int(np.sum(status != PENDING)))
    return {
        "status": "done",
        "store": store,
        "points": size,
        "ok": int(np.sum(status == OK)),
        "invalid": int(np.sum(status == INVALID)),
        "resumed_at": resumed,
        "method": _method(device),
        "notes": _notes(config, points),
        "seed": seed,
        "seconds": clock.stop(),
        **provenance(),
    }


def design(sweep: Sweep, seed: int) -> dict[str, np.ndarray]:
    """Every parameter at every point: a full grid (the last parameter changes fastest) or uniformly random points.

    Args:
        sweep: parameters with their ranges.
        seed: of the random points.

    Returns:
        {name: values}, shape (points,) each.
    """
    axes: Mapping[str, Axis] = sweep.parameters
    if sweep.design == "random":
        rng = np.random.default_rng(seed)
        return {name: rng.uniform(axis.low, axis.high, sweep.points) for name, axis in axes.items()}
    lines = [np.linspace(axis.low, axis.high, axis.points or sweep.points) for axis in axes.values()]
    return {name: grid.ravel() for name, grid in zip(axes, np.meshgrid(*lines, indexing="ij"), strict=True)}


def _device(config: Config, points: dict[str, np.ndarray]) -> AbstractMemristor:
    """The device with method and grid settled for every point, so that points may be traced.

    A swept width is the actual one; the controller goes on believing in the configured one, as in a fit.
    """
    assert config.sweep is not None
    loop, device = config.sweep.loop, device_from(config)
    device = anchored(dataclasses.replace(device, memory=memory_from(config, loop.window_cycles)))
    if not isinstance(device, IonMemristor):
        return device
    if isinstance(device.method, Automatic):
        error = device.method.error
        resolved = ClosedForm() if _largest_error(device, config.sweep, points) <= error else Lindblad(error)
        device = dataclasses.replace(device, method=resolved)
    box = {name: (float(values.min()), float(values.max())) for name, values in points.items()}
    offset = max(abs(loop.detuning_1_set_hz), abs(loop.detuning_2_set_hz))
    cycles = loop.periods * loop.cycles_per_period + 1
    return planned(device, box, detuning_set_hz=offset, cycles=cycles)


def _largest_error(device: IonMemristor, sweep: Sweep, points: dict[str, np.ndarray]) -> float:
    """Largest error of the closed form at any point, whatever is commanded: it grows with the areas."""
    own = {name: values for name, values in points.items() if name != "window_cycles"}
    size, worst = len(next(iter(points.values()))), 0.0
    offsets = (sweep.loop.detuning_1_set_hz, sweep.loop.detuning_2_set_hz)
    for begin in range(0, size, _BOUND_SLICE):
        values = {name: jnp.asarray(column[begin : begin + _BOUND_SLICE]) for name, column in own.items()}
        some = dataclasses.replace(device, **values)
        for x in (0.0, 1.0):  # the V scheme's pulse 1 is longest for x = 0
            worst = max(worst, float(jnp.max(some.closed_form_error(jnp.asarray(x), jnp.asarray(1.0), *offsets))))
    return worst


def _notes(config: Config, points: dict[str, np.ndarray]) -> list[str]:
    """What a reader must know to trust the numbers, in sentences."""
    assert config.sweep is not None
    loop = config.sweep.loop
    longest = float(np.max(points.get("window_cycles", loop.window_cycles or config.memory.window_cycles)))
    if settled(config, loop, longest):
        return []
    return [
        f"Where the window is long ({longest:g} cycles at most), the last of {loop.periods} periods is not yet steady: "
        "the memory still holds the history before the first cycle; take more periods."
    ]


def _method(device: AbstractMemristor) -> str:
    names = {StaticGrid: "static grid", AreaSeries: "area series"}
    return names.get(type(getattr(device, "method", None)), "closed form")


@eqx.filter_jit
def _batch(
    device: AbstractMemristor, loop: Loop, names: tuple[str, ...], values: jax.Array, index: jax.Array, key: jax.Array
) -> dict[str, jax.Array]:
    """Metrics and validity of a batch of points; a bad point is NaN and spoils no other."""
    x_set = sine_input(periods=loop.periods, cycles_per_period=loop.cycles_per_period)
    last = last_period(loop)

    def one(point) -> dict[str, jax.Array]:
        numbers, k = point
        played = run_loop(
            with_parameters(device, {name: numbers[j] for j, name in enumerate(names)}),
            x_set,
            detuning_1_set_hz=loop.detuning_1_set_hz,
            detuning_2_set_hz=loop.detuning_2_set_hz,
            shots=loop.shots or None,
            key=jax.random.fold_in(key, k) if loop.shots else None,
        )
        x, y = played.x[last], played.y[last]
        found = {
            "signed_area": hysteresis.signed_area(x, y),
            "form_factor": hysteresis.form_factor(x, y),
            "pinch_offset": hysteresis.pinch_offset(x, y),
            "rms_obedience": jnp.sqrt(jnp.mean((y - (1 - played.r[last]) * x_set[last]) ** 2)),
        }
        # A loop that does not close within its periods has no area.
        return {**found, "valid": jnp.all(played.valid) & jnp.isfinite(found["signed_area"])}

    # One point after another: the cycles of a point fill the vector units, and its arrays stay in the cache. Under vmap
    # the loop over solver stages runs ten times slower.
    return jax.lax.map(one, (values, index))


def _create(store: Path, config: Config, points: dict[str, np.ndarray]) -> None:
    """Lay out the store with its design and nothing done, whole or not at all."""
    sweep = config.sweep
    assert sweep is not None
    size = len(next(iter(points.values())))
    numbers = {
        name: ("point", np.full(size, np.nan), {"units": "1", "long_name": text}) for name, text in METRICS.items()
    }
    flags = {"flag_values": [PENDING, OK, INVALID], "flag_meanings": "pending ok invalid"}
    dataset = xr.Dataset(
        {**numbers, "status": ("point", np.full(size, PENDING, np.int8), flags)},
        coords={name: ("point", values, {"units": unit_of(name) or "1"}) for name, values in points.items()},
        attrs={
            "config": config.to_toml(),
            "design": sweep.design,
            "axes": json.dumps(_axes(sweep)),
            **_flat(provenance()),
        },
    )
    new = store.with_name(f".{store.name}.partial-{secrets.token_hex(4)}")
    encoding = {str(name): {"chunks": (min(sweep.chunk, size),)} for name in dataset.variables}
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        dataset.to_zarr(new, mode="w", zarr_format=_FORMAT, consolidated=True, encoding=encoding)
        os.replace(new, store)
    except OSError as error:
        raise OutputError(f"{store}: this cannot be written ({error.strerror}); name another with --out.") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _axes(sweep: Sweep) -> dict[str, Any]:
    points = None if sweep.design == "random" else sweep.points
    return {name: [axis.low, axis.high, axis.points or points] for name, axis in sweep.parameters.items()}


def _flat(facts: Mapping[str, Any]) -> dict[str, str]:
    """Attributes of a store are plain text."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def _statuses(store: Path, config: Config) -> np.ndarray:
    """What is done of a store that this configuration has begun."""
    try:
        with xr.open_zarr(store) as found:
            begun, status = found.attrs.get("config"), found["status"].values.copy() if "status" in found else None
    except (OSError, ValueError, KeyError) as error:
        raise OutputError(f"{store}: this Zarr store cannot be read ({error}); name a new one with --out.") from None
    if begun is None or status is None:
        raise OutputError(f"{store}: this Zarr store is not one of a sweep; name a new one with --out.")
    key = _difference(tomllib.loads(begun), tomllib.loads(config.to_toml()))
    if key:
        raise OutputError(
            f"{store}: this sweep was begun with another {key}; resume it with its own configuration, "
            "or name a new store with --out."
        )
    return status


def _difference(
    begun: Mapping[str, Any], now: Mapping[str, Any], tables: tuple[str, ...] = ("device", "memory", "sweep")
):
    """Path of the first key that differs in the tables of a sweep; empty if none does."""
    for name in dict.fromkeys([*begun, *now]):
        if tables and name not in tables:
            continue
        a, b = begun.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            if inner := _difference(a, b, ()):
                return f"{name}.{inner}"
        elif a != b:
            return name
    return ""


def _fill(store: Path, region: slice, columns: Mapping[str, np.ndarray]) -> None:
    dataset = xr.Dataset({name: ("point", values) for name, values in columns.items()})
    dataset.to_zarr(store, region={"point": region}, zarr_format=_FORMAT, consolidated=False)


@contextlib.contextmanager
def _progress(size: int, done: int) -> Generator[Callable[[int], None]]:
    """Yields a function of the points done: a bar on a terminal, a line for each tenth elsewhere."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("points"))
    bar = Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    task = bar.add_task("sweep", total=size, completed=done)
    told = -1

    def update(done: int) -> None:
        nonlocal told
        bar.update(task, completed=done)
        if not console.is_terminal and (tenth := 10 * done // size) > told:
            told = tenth
            print(f"sweep: {done} of {size} points", file=sys.stderr, flush=True)

    with bar:
        update(done)
        yield update

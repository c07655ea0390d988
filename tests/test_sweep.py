"""Sweeps: the same numbers as single runs and in chunks of any size, and stores that are whole or go on."""

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from calibration.parameters import with_parameters
from experiments import batch, designs, store, sweep
from experiments.build import device_from, memory_from
from experiments.config import Config, parse_config
from experiments.records import OutputError
from twin import hysteresis
from twin.dynamics import StaticGrid
from twin.loop import run as run_loop
from twin.loop import sine_input
from twin.memristor import ClosedForm

LOOP = {"periods": 2, "cycles_per_period": 8, "window_cycles": 3.0}
BOX = {"window_cycles": [1.5, 7.0], "rabi_scale_1": [0.8, 1.2]}
AXES = {"window_cycles": [1.5, 7.0], "rabi_scale_1": {"low": 0.8, "high": 1.2, "points": 3}}


def config(
    device: dict[str, Any] | None = None, loop: dict[str, Any] | None = None, source: str = "model", **table: Any
) -> Config:
    # Memory: the process may already hold the programs of a thousand other tests.
    few = {"parameters": AXES, "points": 4, "chunk": 5, "memory_mb": 1e5}
    tables = {**few, **table, "loop": {**LOOP, **(loop or {})}}
    device = {"engine": "closed_form", **(device or {})}
    return parse_config({"device": device, "memory": {"source": source}, "sweep": tables}, verb="sweep")


def job(settings: Config, seed: int = 0, chunk: int = 5, method: str = batch.CLOSED_FORM) -> batch.Job:
    return batch.Job(settings.to_toml(), seed, chunk, method)


def points_of(settings: Config, seed: int = 0) -> np.ndarray:
    assert settings.sweep is not None
    return next(designs.blocks(settings.sweep, seed, 1000))[1]


def stored(path: Path) -> xr.Dataset:
    with xr.open_zarr(path) as found:
        return found.load()


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    path = tmp_path_factory.mktemp("grid") / "new" / "sweep.zarr"
    return sweep.run(config(), path, 0), path


def test_a_grid_holds_what_single_runs_give(grid):
    result, path = grid
    found = stored(path)
    assert (result["points"], result["ok"], result["invalid"], result["resumed_at"]) == (12, 12, 0, 0)
    assert found.sizes == {"point": 12}
    np.testing.assert_array_equal(found.window_cycles, np.repeat(np.linspace(1.5, 7.0, 4), 3))
    np.testing.assert_allclose(found.rabi_scale_1, np.tile([0.8, 1.0, 1.2], 4))
    np.testing.assert_array_equal(found.status, store.OK)
    assert found.status.dtype == np.int8
    assert found.window_cycles.attrs["units"] == "cycles"
    assert found.status.attrs["flag_meanings"] == "pending ok invalid"
    assert found.design == "grid"
    assert "rabi_scale_1" in found.attrs["config"]
    device, x_set = device_from(config()), sine_input(periods=2, cycles_per_period=8)
    for k in (0, 4, 11):
        point = {name: jnp.asarray(found[name].values[k]) for name in ("window_cycles", "rabi_scale_1")}
        loop = run_loop(with_parameters(device, point), x_set)
        x, y, r = loop.x[8:16], loop.y[8:16], loop.r[8:16]
        assert found.signed_area.values[k] == pytest.approx(float(hysteresis.signed_area(x, y)), abs=1e-13)
        assert found.form_factor.values[k] == pytest.approx(float(hysteresis.form_factor(x, y)), abs=1e-13)
        assert found.pinch_offset.values[k] == pytest.approx(float(hysteresis.pinch_offset(x, y)), abs=1e-13)
        rms = float(jnp.sqrt(jnp.mean((y - (1 - r) * x_set[8:16]) ** 2)))
        assert found.rms_obedience.values[k] == pytest.approx(rms, abs=1e-13)


def test_progress_is_told_where_there_is_no_terminal(capsys, monkeypatch):
    moments = iter([0.0, 2.0, 100.0])
    monkeypatch.setattr(sweep.time, "monotonic", lambda: next(moments))
    with sweep._progress(40, 3) as update:
        for done in (4, 5, 8, 40):
            update(done)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "sweep: 3 of 40 points",
        "sweep: 4 of 40 points, about 72 s left",
        "sweep: 8 of 40 points, about 10.7 min left",
        "sweep: 40 of 40 points",
    ]
    assert captured.out == ""


def test_it_unstacks_into_its_axes(grid):
    axes = stored(grid[1]).set_index(point=["window_cycles", "rabi_scale_1"]).unstack()
    assert axes.signed_area.shape == (4, 3)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [1, 4, 5, 6, 10])
def test_a_killed_sweep_goes_on(grid, tmp_path, monkeypatch, moment):
    """Killed after so many arrays were written: after the numbers of a chunk, or after its statuses."""
    writes = 0

    def put(*arguments):
        nonlocal writes
        write(*arguments)
        writes += 1
        if writes == moment:
            raise Killed

    write = store.SweepStore._put
    monkeypatch.setattr(store.SweepStore, "_put", put)
    path = tmp_path / "sweep.zarr"
    with pytest.raises(Killed):
        sweep.run(config(), path, 0)
    done = 5 * (moment // 5)
    assert int((stored(path).status != store.PENDING).sum()) == done
    monkeypatch.setattr(store.SweepStore, "_put", write)
    result = sweep.run(config(), path, 0)
    assert (result["resumed_at"], result["ok"]) == (done, 12)
    drop = ["versions"]
    xr.testing.assert_identical(stored(path).drop_attrs(), stored(grid[1]).drop_attrs())
    assert {k: v for k, v in stored(path).attrs.items() if k not in drop} == {
        k: v for k, v in stored(grid[1]).attrs.items() if k not in drop
    }


def test_the_same_command_goes_on_after_sigkill(tmp_path):
    """A real process, killed without warning once some chunks are done."""
    table = {"loop": {"cycles_per_period": 200, "periods": 2}, "design": "sobol", "points": 4096, "chunk": 32}
    table["parameters"] = BOX
    (tmp_path / "sweep.toml").write_text(config(**table).to_toml())

    def start(path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "experiments", "sweep", str(tmp_path / "sweep.toml"), "--out", str(path)]
        root = str(Path(__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": root}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    with start(tmp_path / "killed.zarr") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if re.match(r"sweep: [1-9]\d* of", line):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    done = int((stored(tmp_path / "killed.zarr").status != store.PENDING).sum())
    assert 0 < done < 4096
    with start(tmp_path / "killed.zarr") as process:
        _, said = process.communicate()
    assert process.returncode == 0, said
    resumed = re.search(r"sweep: (\d+) of 4096", said)
    assert resumed is not None
    assert int(resumed[1]) == done
    sweep.run(config(**table), tmp_path / "whole.zarr", 0)
    xr.testing.assert_identical(
        stored(tmp_path / "killed.zarr").drop_attrs(), stored(tmp_path / "whole.zarr").drop_attrs()
    )


@pytest.mark.parametrize("cut", [(5, 5, 2), (3, 4, 5), (1,) * 12])
def test_a_point_is_the_same_in_every_chunk_of_one_shape(cut):
    """Wherever it stands and whatever stands beside it, bit for bit, the shot noise included."""
    settings = config(source="measured", loop={"shots": 50})
    values, begins = points_of(settings), np.cumsum((0, *cut))
    parts = [batch.compute(job(settings), int(a), values[a:b]) for a, b in itertools.pairwise(begins)]
    whole = [batch.compute(job(settings), a, values[a : a + 5]) for a in (0, 5, 10)]
    for name in (*store.METRICS, "status"):
        np.testing.assert_array_equal(*(np.concatenate([part[name] for part in some]) for some in (parts, whole)))


@pytest.mark.parametrize("engine", ["closed_form", "lindblad"])
def test_the_size_of_a_chunk_does_not_change_a_number(engine):
    settings = config(device={"engine": engine, "error": 1e-5}, loop={"cycles_per_period": 4})
    method = {"closed_form": batch.CLOSED_FORM, "lindblad": batch.LINDBLAD}[engine]
    values = points_of(settings)[:6]
    first = batch.compute(job(settings, chunk=2, method=method), 0, values[:2])
    program = batch._program(job(settings, chunk=6, method=method))
    other = program.compute(0, values)
    if engine == "closed_form":  # all side by side, as on an accelerator
        program.together = True
    beside = program.compute(0, values)
    for name in store.METRICS:
        assert np.max(np.abs(other[name][:2] - first[name])) <= 1e-13
        assert np.max(np.abs(beside[name] - other[name])) <= 1e-13


def test_a_chunk_is_what_the_memory_allows(monkeypatch):
    monkeypatch.setattr(batch.jax, "default_backend", lambda: "gpu")  # where all points of a chunk are in memory
    found = {}
    for limit in (1000.0, 2.0):
        settings = config(
            chunk=None,
            memory_mb=limit,
            design="random",
            points=100_000,
            parameters=BOX,
            loop={"cycles_per_period": 100},
        )
        found[limit] = batch.prepare(batch.Job(settings.to_toml(), 0))
    sizes = {limit: plan.job.chunk for limit, plan in found.items()}
    assert sizes[1000.0] == 1024  # a 64th of the sweep
    assert 1 <= sizes[2.0] < 1024 and sizes[2.0] & (sizes[2.0] - 1) == 0
    assert found[2.0].memory_mb <= 2.0 < found[1000.0].memory_mb
    assert found[2.0].probed == sizes[2.0]


def test_too_little_memory_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"^sweep.memory_mb is 9, but the process takes \d+ MB .*; raise it\.$"):
        sweep.run(config(memory_mb=9.0), tmp_path / "sweep.zarr", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"chunk": 4096, "memory_mb": 2.0}, "4096 points at once .* raise it or lower sweep.chunk"),
        ({"chunk": None, "memory_mb": 1.0, "loop": {"cycles_per_period": 100_000}}, "1 point at once .*; raise it"),
        ({"chunk": 8, "memory_mb": 2.0, "design": "latin_hypercube"}, "drawing the design .* or take design = 'sobol'"),
    ],
)
def test_what_needs_too_much_memory_is_named(monkeypatch, table, message):
    monkeypatch.setattr(batch.jax, "default_backend", lambda: "gpu")
    table = {"design": "random", "points": 100_000, "parameters": BOX, **table}
    with pytest.raises(ValueError, match=f"^sweep.memory_mb is .*{message}") as error:
        batch.prepare(batch.Job(config(**table).to_toml(), 0))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_memory_and_time_are_told_before_the_start(tmp_path, capsys):
    settings = config(memory_mb=1e5)
    result = sweep.run(settings, tmp_path / "sweep.zarr", 0)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("sweep: 12 points in 3 chunks of 5 by the closed form on cpu")
    assert "by the compiler's account; limit 100000 MB" in said[1]
    assert said[2].endswith("timed on 5)")
    assert said[3] == "sweep: 0 of 12 points"
    estimate = result["estimate"]
    assert estimate["seconds"] == pytest.approx(12 * estimate["seconds_a_point"])
    assert 100 < estimate["memory_mb"] < 1e4


def test_a_finished_sweep_computes_nothing(grid, monkeypatch):
    monkeypatch.setattr(sweep, "batch", None)
    result = sweep.run(config(memory_mb=3.0), grid[1], 0)  # what it may take is not what it is
    assert (result["resumed_at"], result["ok"], result["estimate"]) == (12, 12, None)


def test_what_fails_at_once_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no")

    monkeypatch.setattr(batch, "_timed", refuse)
    with pytest.raises(ValueError, match="no"):
        sweep.run(config(), tmp_path / "sweep.zarr", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"chunk": 4}, "sweep.chunk"),
        ({"device": {"rabi_scale_2": 0.9}}, "device.rabi_scale_2"),
        ({"loop": {"periods": 3}}, "sweep.loop.periods"),
        ({"parameters": {"window_cycles": [1.5, 7.0]}}, "sweep.parameters.rabi_scale_1"),
    ],
)
def test_the_store_of_another_sweep_is_refused(grid, other, key):
    with pytest.raises(OutputError, match=f"begun with another {key}") as error:
        sweep.run(config(**other), grid[1], 0)
    assert str(error.value).count("\n") == 0


def test_the_store_of_another_seed_is_refused(grid):
    with pytest.raises(OutputError, match="begun with another seed"):
        sweep.run(config(), grid[1], 1)


def test_a_store_that_is_no_sweep_is_refused(tmp_path):
    xr.Dataset({"x": ("point", np.arange(3.0))}).to_zarr(tmp_path / "s.zarr", zarr_format=2)
    with pytest.raises(OutputError, match="not one of a sweep"):
        sweep.run(config(), tmp_path / "s.zarr", 0)
    (tmp_path / "t.zarr").mkdir()
    (tmp_path / "t.zarr" / "zarr.json").write_text("{")
    with pytest.raises(OutputError, match="cannot be read"):
        sweep.run(config(), tmp_path / "t.zarr", 0)


def test_all_points_are_one_program(tmp_path, monkeypatch):
    traces = 0

    def counted(*args, **kwargs):
        nonlocal traces
        traces += 1
        return play(*args, **kwargs)

    play = batch.run_loop
    monkeypatch.setattr(batch, "run_loop", counted)
    loop = {"cycles_per_period": 9}  # a program that no other test has compiled
    for seed, low in ((0, 0.8), (1, 0.9)):
        axes = {"window_cycles": [1.5, 7.0], "rabi_scale_1": [low, 1.2]}
        sweep.run(config(loop=loop, parameters=axes, design="random", points=12), tmp_path / f"{seed}.zarr", seed)
    assert traces == 1


def test_a_bad_point_spoils_no_other(tmp_path, monkeypatch):
    """A grid of steps laid for seven tenths of the box: beyond it the detuning is too fast, and the point says so."""
    lay = batch.planned

    def shorter(device, box, **options):
        return lay(device, {name: (0.0, 0.7 * high) for name, (_, high) in box.items()}, **options)

    settings = config(
        device={"engine": "lindblad", "error": 1e-5}, loop={"cycles_per_period": 4, "periods": 2},
        parameters={"detuning_1_hz": [0.0, 4e4]}, points=4, chunk=4, source="command",
    )  # fmt: skip
    monkeypatch.setattr(batch, "planned", shorter)
    result = sweep.run(settings, tmp_path / "part.zarr", 0)
    found = stored(tmp_path / "part.zarr")
    bad = np.isnan(found.signed_area.values)
    assert bad.tolist() == [False, False, False, True]
    np.testing.assert_array_equal(found.status, np.where(bad, store.INVALID, store.OK))
    assert (result["ok"], result["invalid"], result["method"]) == (3, 1, "lindblad")


def test_shot_noise_belongs_to_the_point():
    """Two points alike have counts of their own, and another seed other ones."""
    settings = config(source="measured", loop={"shots": 50}, parameters={"rabi_scale_1": [0.9, 1.1]})
    values = np.array([[0.9], [1.0], [1.0], [1.1]])
    first, other = (batch.compute(job(settings, seed), 0, values)["signed_area"] for seed in (1, 2))
    assert first[1] != first[2]
    assert np.all(other != first)


@pytest.mark.parametrize(
    ("device", "method"), [({"lifetime_s": 1e12, "error": 1e-3}, "closed form"), ({"lifetime_s": 0.05}, "lindblad")]
)
def test_auto_holds_for_all_points(device, method):
    settings = config(device={"engine": "auto", **device}, parameters={"separation_s": [1.2e-4, 2.4e-4]})
    assert batch._method(settings, 0) == method
    assert isinstance(batch._settled(settings, method).method, ClosedForm if method == "closed form" else StaticGrid)
    near = config(device={"engine": "auto", **device}, parameters={"separation_s": [2e-5, 2.4e-4]})
    assert batch._method(near, 0) == "lindblad"


def test_what_weakens_a_sweep_is_noted(grid):
    assert grid[0]["notes"] == []
    assert "not yet steady" in sweep._notes(config(parameters={"window_cycles": [2.0, 9.0]}))[0]
    assert "take 512 or 1024" in sweep._notes(config(design="sobol", points=1000, parameters={"n_bar": [0.0, 9.0]}))[0]


def test_a_swept_width_is_the_actual_one():
    """The controller goes on believing in the configured width, so the area changes with the actual one."""
    settings = config(parameters={"sigma_1_s": [1e-5, 4e-5]})
    device = batch._settled(settings, batch.CLOSED_FORM)
    theta_1, _ = with_parameters(device, {"sigma_1_s": jnp.asarray(1e-5)}).areas(jnp.asarray(1.0), jnp.asarray(1.0))
    assert float(theta_1) == pytest.approx(np.pi / 2)
    assert float(memory_from(settings).window_cycles) == 10.0

"""Sweeps: the same numbers as single runs, one program for all points, and stores that are whole or go on."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from calibration.parameters import with_parameters
from experiments import sweep
from experiments.build import device_from, memory_from
from experiments.config import Config, parse_config
from experiments.records import OutputError
from twin import hysteresis
from twin.loop import run as run_loop
from twin.loop import sine_input

LOOP = {"periods": 2, "cycles_per_period": 8, "window_cycles": 3.0}
AXES = {"window_cycles": [1.5, 7.0], "rabi_scale_1": {"low": 0.8, "high": 1.2, "points": 3}}


def config(
    device: dict[str, Any] | None = None, loop: dict[str, Any] | None = None, source: str = "model", **table: Any
) -> Config:
    tables = {"parameters": AXES, "points": 4, "chunk": 5, **table, "loop": {**LOOP, **(loop or {})}}
    device = {"engine": "closed_form", **(device or {})}
    return parse_config({"device": device, "memory": {"source": source}, "sweep": tables}, verb="sweep")


def stored(store: Path) -> xr.Dataset:
    with xr.open_zarr(store) as found:
        return found.load()


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    store = tmp_path_factory.mktemp("grid") / "new" / "sweep.zarr"
    return sweep.run(config(), store, 0), store


def test_a_grid_holds_what_single_runs_give(grid):
    result, store = grid
    found = stored(store)
    assert (result["points"], result["ok"], result["invalid"], result["resumed_at"]) == (12, 12, 0, 0)
    assert found.sizes == {"point": 12}
    np.testing.assert_array_equal(found.window_cycles, np.repeat(np.linspace(1.5, 7.0, 4), 3))
    np.testing.assert_allclose(found.rabi_scale_1, np.tile([0.8, 1.0, 1.2], 4))
    np.testing.assert_array_equal(found.status, sweep.OK)
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


def test_progress_is_told_where_there_is_no_terminal(capsys):
    with sweep._progress(40, 3) as update:
        for done in (4, 5, 8, 40):
            update(done)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"sweep: {done} of 40 points" for done in (3, 4, 8, 40)]
    assert captured.out == ""


def test_it_unstacks_into_its_axes(grid):
    axes = stored(grid[1]).set_index(point=["window_cycles", "rabi_scale_1"]).unstack()
    assert axes.signed_area.shape == (4, 3)


def test_a_random_design_is_that_of_its_seed():
    table = config(design="random", parameters={"rabi_scale_1": [0.8, 1.2], "n_bar": [0.0, 9.0]}, points=1000).sweep
    assert table is not None
    first, again, other = (sweep.design(table, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first["n_bar"], again["n_bar"])
    assert not np.array_equal(first["n_bar"], other["n_bar"])
    assert 0.8 <= first["rabi_scale_1"].min() < 0.81
    assert 1.19 < first["rabi_scale_1"].max() <= 1.2
    assert abs(np.corrcoef(first["n_bar"], first["rabi_scale_1"])[0, 1]) < 0.1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [1, 2, 3, 4])
def test_a_killed_sweep_goes_on(grid, tmp_path, monkeypatch, moment):
    """Killed after so many writes: after the numbers of a batch, or after its statuses."""
    writes = 0

    def fill(*arguments):
        nonlocal writes
        write(*arguments)
        writes += 1
        if writes == moment:
            raise Killed

    write = sweep._fill
    monkeypatch.setattr(sweep, "_fill", fill)
    store = tmp_path / "sweep.zarr"
    with pytest.raises(Killed):
        sweep.run(config(), store, 0)
    done = 5 * (moment // 2)
    assert int((stored(store).status != sweep.PENDING).sum()) == done
    monkeypatch.setattr(sweep, "_fill", write)
    result = sweep.run(config(), store, 0)
    assert (result["resumed_at"], result["ok"]) == (done, 12)
    drop = ["versions"]
    xr.testing.assert_identical(stored(store).drop_attrs(), stored(grid[1]).drop_attrs())
    assert {k: v for k, v in stored(store).attrs.items() if k not in drop} == {
        k: v for k, v in stored(grid[1]).attrs.items() if k not in drop
    }


def test_a_finished_sweep_computes_nothing(grid, monkeypatch):
    monkeypatch.setattr(sweep, "_batch", None)
    assert sweep.run(config(), grid[1], 0)["resumed_at"] == 12


def test_what_fails_at_once_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no")

    monkeypatch.setattr(sweep, "_batch", refuse)
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

    play = sweep.run_loop
    monkeypatch.setattr(sweep, "run_loop", counted)
    loop = {"cycles_per_period": 9}  # a program that no other test has compiled
    for seed, low in ((0, 0.8), (1, 0.9)):
        axes = {"window_cycles": [1.5, 7.0], "rabi_scale_1": [low, 1.2]}
        sweep.run(config(loop=loop, parameters=axes, design="random", points=12), tmp_path / f"{seed}.zarr", seed)
    assert traces == 1


def test_a_bad_point_spoils_no_other(tmp_path, monkeypatch):
    """A grid of steps laid for seven tenths of the box: beyond it the detuning is too fast, and the point says so."""
    lay = sweep.planned

    def shorter(device, box, **options):
        return lay(device, {name: (0.0, 0.7 * high) for name, (_, high) in box.items()}, **options)

    settings = config(
        device={"engine": "lindblad", "error": 1e-5}, loop={"cycles_per_period": 4, "periods": 2},
        parameters={"detuning_1_hz": [0.0, 4e4]}, points=4, chunk=4, source="command",
    )  # fmt: skip
    monkeypatch.setattr(sweep, "planned", shorter)
    result = sweep.run(settings, tmp_path / "part.zarr", 0)
    found = stored(tmp_path / "part.zarr")
    bad = np.isnan(found.signed_area.values)
    assert bad.tolist() == [False, False, False, True]
    np.testing.assert_array_equal(found.status, np.where(bad, sweep.INVALID, sweep.OK))
    assert (result["ok"], result["invalid"], result["method"]) == (3, 1, "static grid")


def test_shot_noise_belongs_to_the_point():
    """Wherever it stands in a batch, a point has the counts of its number and of the seed."""
    settings = config(source="measured", loop={"shots": 50})
    assert settings.sweep is not None
    device, values = device_from(settings), jnp.array([[0.9], [1.0], [1.0], [1.1]])

    def areas(values, index, seed):
        found = sweep._batch(device, settings.sweep.loop, ("rabi_scale_1",), values, index, jax.random.key(seed))
        return np.asarray(found["signed_area"])

    first, index = areas(values, jnp.arange(4), 1), jnp.arange(4)
    np.testing.assert_array_equal(areas(values[::-1], index[::-1], 1)[::-1], first)
    assert first[1] != first[2]
    assert np.all(areas(values, index, 2) != first)


@pytest.mark.parametrize(
    ("device", "method"), [({"lifetime_s": 1e12, "error": 1e-3}, "closed form"), ({"lifetime_s": 0.05}, "static grid")]
)
def test_auto_holds_for_all_points(device, method):
    settings = config(device={"engine": "auto", **device}, parameters={"separation_s": [1.2e-4, 2.4e-4]})
    assert settings.sweep is not None
    assert sweep._method(sweep._device(settings, sweep.design(settings.sweep, 0))) == method
    near = config(device={"engine": "auto", **device}, parameters={"separation_s": [2e-5, 2.4e-4]})
    assert near.sweep is not None
    assert sweep._method(sweep._device(near, sweep.design(near.sweep, 0))) == "static grid"


def test_windows_that_are_too_long_are_noted(grid):
    assert grid[0]["notes"] == []
    settings = config(parameters={"window_cycles": [2.0, 9.0]})
    assert settings.sweep is not None
    assert "not yet steady" in sweep._notes(settings, sweep.design(settings.sweep, 0))[0]


def test_a_swept_width_is_the_actual_one():
    """The controller goes on believing in the configured width, so the area changes with the actual one."""
    settings = config(parameters={"sigma_1_s": [1e-5, 4e-5]})
    assert settings.sweep is not None
    device = with_parameters(sweep._device(settings, sweep.design(settings.sweep, 0)), {"sigma_1_s": jnp.asarray(1e-5)})
    theta_1, _ = device.areas(jnp.asarray(1.0), jnp.asarray(1.0))
    assert float(theta_1) == pytest.approx(np.pi / 2)
    assert float(memory_from(settings).window_cycles) == 10.0

"""The verbs track, predict and compare, from the command line to the run folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
import xarray as xr

from calibration import drift, twin_file
from calibration.data import synthesize, write_table
from calibration.parameters import with_parameters
from calibration.posing import pose
from experiments import cli
from experiments.config import parse_config
from experiments.records import RunFolder
from experiments.track import whole

ROOT = Path(__file__).parents[1]
FREE = tables.SCALES | tables.READOUT
NAMES = tuple(FREE)
TRUTH = np.array([tables.TRUTH[name] for name in NAMES])
SETTINGS = tables.settings((5.0,), cycles=41, shots=400)
CONFIG = {
    "device": {"engine": "closed_form"},
    "fit": {"free": {name: list(box) for name, box in FREE.items()}},
    "simulate": {"loops": [{"periods": 2, "cycles_per_period": 20, "window_cycles": 5.0}]},
}


def recorded(seed: int, values=TRUTH):
    device = with_parameters(tables.ion(), {n: jnp.asarray(v) for n, v in zip(NAMES, values, strict=True)})
    return synthesize(device, SETTINGS, jax.random.key(seed))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A configuration, the run of a fit with its twin, six clean tables, three of a device that has changed."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "config.toml").write_text(parse_config(CONFIG).to_toml())
    information = np.asarray(pose(tables.ion(), recorded(0), FREE).problem.information(jnp.asarray(TRUTH)))
    cov = np.linalg.inv(4 * information)
    std = np.sqrt(np.diag(cov))
    rows = {n: {"value": v, "std": s, "ci95": [v - 2 * s, v + 2 * s], "unit": "", "verdict": "identified"}
            for n, v, s in zip(NAMES, TRUTH, std, strict=True)}  # fmt: skip
    correlation = {"names": NAMES, "matrix": cov / np.outer(std, std)}
    with RunFolder(folder / "fit") as run:
        run.write_config(parse_config(CONFIG).to_toml())
        run.write_result({"kind": "fit", "status": "converged", "parameters": rows, "correlation": correlation})
        made = twin_file.make(tables.ion(), NAMES, TRUTH, cov, FREE, [recorded(0)])
        twin_file.save(run.work, made)
        (run.work / "off").mkdir()
        off = TRUTH + 8 * cov[0] / std[0]
        twin_file.save(run.work / "off", twin_file.make(tables.ion(), NAMES, off, cov, FREE, [recorded(0)]))
    for k in range(6):
        write_table(recorded(k + 1), folder / f"clean-{k}.csv")
    for k in range(3):
        write_table(recorded(k + 10, TRUTH + np.array([0.05, 0, 0, 0])), folder / f"moved-{k}.csv")
    return folder


@pytest.fixture(autouse=True)
def _laid_once(monkeypatch):
    monkeypatch.setattr(drift, "threshold", lambda *_: 4.36)


def call(*arguments: object) -> int:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as left:
            cli.main([str(a) for a in arguments])
    finally:
        signal.signal(signal.SIGTERM, handler)
    return left.value.code


def track(place: Path, out: Path, *more: object) -> int:
    return call("track", place / "config.toml", "--from", place / "fit", "--out", out, *more)


def test_a_stream_is_tracked_and_continued(place, tmp_path, capsys):
    out = tmp_path / "stream"
    assert track(place, out, *(place / f"clean-{k}.csv" for k in range(3))) == 0
    assert capsys.readouterr().out == "still valid\n"
    # The second call goes on: tables that were tracked before are left out.
    rest = [place / name for name in ("clean-2.csv", "clean-3.csv", "moved-0.csv", "moved-1.csv")]
    assert track(place, out, *rest, "--json") == 0
    said = capsys.readouterr()
    result = json.loads((out / "result.json").read_text())
    assert json.loads(said.out)["verdict"] == result["verdict"]
    assert "clean-2.csv: tracked before" in said.err
    assert [step["verdict"] for step in result["tables"]] == ["still valid"] * 4 + ["recalibrate"] * 2
    assert result["verdict"].startswith("recalibrate because `rabi_scale_1` has moved by +")
    assert result["verdict"].endswith("since loop 5")
    arrays = xr.load_dataset(out / "arrays.nc", engine="h5netcdf")
    assert arrays.estimate.shape == (6, 4)
    assert list(arrays.parameter.values) == list(NAMES)
    assert np.all(np.isfinite(arrays.estimate))
    html = (out / "report.html").read_text()
    assert "Table by table" in html
    assert "moved-1.csv" in html
    assert "<code>rabi_scale_1</code> has moved" in html
    assert 'class="verdict bad"' in html
    assert (out / "figures" / "drift.svg").is_file()
    assert call("report", out) == 0


def test_all_at_once_gives_the_same(place, tmp_path):
    files = [place / f"clean-{k}.csv" for k in range(4)]
    assert track(place, tmp_path / "one", *files) == 0
    assert track(place, tmp_path / "two", *files[:2]) == 0
    assert track(place, tmp_path / "two", *files[2:]) == 0
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["state"] == two["state"]
    assert one["tables"] == two["tables"]


@pytest.mark.parametrize("stopped_by", [signal.SIGINT])
def test_a_watched_folder_is_tracked_until_interrupted(place, tmp_path, stopped_by):
    inbox, out = tmp_path / "inbox", tmp_path / "stream"
    inbox.mkdir()
    inbox.joinpath("a.csv").write_bytes((place / "clean-0.csv").read_bytes())
    code = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from experiments.cli import main; main()")  # fmt: skip
    command = [sys.executable, "-c", code, "track", place / "config.toml", "--from", place / "fit", "--out", out,
               "--watch", inbox, "--interval", "0.2"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def wait_for(count: int) -> list[dict]:
        for _ in range(600):
            if (out / "result.json").is_file():
                found = json.loads((out / "result.json").read_text())["tables"]
                if len(found) == count:
                    return found
            time.sleep(0.2)
        raise AssertionError("the watched table was not tracked")

    with subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True) as process:
        wait_for(1)
        inbox.joinpath("b.csv").write_text("cycle,x_set\n0,2\n")
        steps = wait_for(2)
        process.send_signal(stopped_by)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert steps[0]["verdict"] == "still valid"
    assert steps[1]["verdict"] == "data bad"
    assert "it cannot be read" in steps[1]["reason"]
    assert said.startswith("data bad because it cannot be read")
    assert (out / "report.html").is_file()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.fixture
def interruptible():
    """A process started in the background ignores interrupts."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_the_tables_at_hand():
    earlier, done = signal.getsignal(signal.SIGINT), []

    def write(interrupts: int) -> None:
        with whole():
            for _ in range(interrupts):
                signal.raise_signal(signal.SIGINT)
            done.append(interrupts)

    with pytest.raises(KeyboardInterrupt):
        write(1)
    assert done == [1]
    with pytest.raises(KeyboardInterrupt):
        write(2)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is earlier


def test_wrong_input_is_refused_before_anything_is_computed(place, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "bad.csv").write_text("cycle,x_set,shots,n_y\n0,2,9,1\n")
    config, fit = place / "config.toml", place / "fit"
    for arguments, part in (
        (["track", config, "--from", fit, "--out", out], "nothing to track"),
        (["track", config, "--from", fit, "--out", out, tmp_path / "bad.csv"], "column x_set is 2"),
        (["track", config, "--from", fit, "--out", out, tmp_path / "no.csv"], "there is no such file"),
        (["track", config, "--from", tmp_path, "--out", out, place / "clean-0.csv"], "no run folder"),
        (["track", config, "--from", fit, "--out", fit, place / "clean-0.csv"], "already holds a run"),
        (["track", config, "--from", fit, "--out", out, "--watch", tmp_path / "no"], "this is no folder"),
        (["predict", fit, "--out", out], "either a configuration"),
        (["predict", tmp_path, config, "--out", out], "cannot be read"),
        (["compare", fit, tmp_path, place / "clean-0.csv"], "cannot be read"),
    ):
        assert call(*arguments) == 2
        assert part in capsys.readouterr().err
        assert not out.exists()


def test_predictions_with_bands(place, tmp_path, capsys):
    assert call("predict", place / "fit", place / "config.toml", "--out", tmp_path / "a", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == 41
    assert 0 < result["largest_band"] < 0.1
    arrays = xr.load_dataset(tmp_path / "a" / "arrays.nc", engine="h5netcdf")
    assert np.all((arrays.y_low <= arrays.p_y) & (arrays.p_y <= arrays.y_high))
    assert (
        call("predict", place / "fit" / "twin.json", "--settings", place / "clean-0.csv", "--out", tmp_path / "b") == 0
    )
    again = xr.load_dataset(tmp_path / "b" / "arrays.nc", engine="h5netcdf")
    np.testing.assert_allclose(again.p_x, arrays.p_x, atol=1e-6)
    html = (tmp_path / "b" / "report.html").read_text()
    assert "Predicted loops" in html and "41 cycles; the widest 95 % band" in html
    assert "Resolved configuration" not in html  # there was none


def test_two_twins_are_compared(place, capsys):
    new = [place / f"clean-{k}.csv" for k in range(4)]
    assert call("compare", place / "fit" / "off", place / "fit", *new, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] == "improved"
    assert len(result["tables"]) == 4
    assert call("compare", place / "fit", place / "fit", *new) == 0
    assert "inconclusive: 4 new tables are 0.0" in capsys.readouterr().out

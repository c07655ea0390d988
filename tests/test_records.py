"""Run folders: whole or not at all, and never over another run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from experiments.config import parse_config
from experiments.records import OutputError, Run, RunFolder, check_output, to_json

ROOT = Path(__file__).parents[1]


def fill(folder: RunFolder) -> None:
    folder.write_config(parse_config({"memory": {"window_cycles": 7.5}}).to_toml())
    folder.write_result({"status": "converged", "value": np.float64(0.1)})
    folder.write_arrays(xr.Dataset({"x": ("cycle", np.arange(3.0))}))
    folder.write_report("<html>\u03b8</html>")
    (folder.figures / "loop.svg").write_text("<svg/>")


def test_a_run_folder_is_whole_and_reads_back(tmp_path, capsys):
    out = tmp_path / "new" / "run"
    with RunFolder(out) as folder:
        fill(folder)
        folder.log("one")
        folder.log("two")
        assert not out.exists()
    assert sorted(path.name for path in out.iterdir()) == [
        *("arrays.nc", "config.toml", "figures", "log.txt", "report.html", "result.json")
    ]
    assert [path.name for path in out.parent.iterdir()] == ["run"]
    run = Run(out)
    assert run.config.memory.window_cycles == 7.5
    assert run.result == {"status": "converged", "value": 0.1}
    np.testing.assert_array_equal(run.arrays.x, [0.0, 1.0, 2.0])
    assert (out / "report.html").read_text(encoding="utf-8") == "<html>\u03b8</html>"
    lines = (out / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["one", "two"]
    captured = capsys.readouterr()
    assert captured.err == "one\ntwo\n"
    assert captured.out == ""


def test_an_empty_folder_may_become_the_run(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with RunFolder(out) as folder:
        fill(folder)
    assert (out / "result.json").is_file()


def test_a_link_to_an_empty_folder_leads_the_run_there(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with RunFolder(tmp_path / "run") as folder:
        fill(folder)
    assert (tmp_path / "disk" / "result.json").is_file()
    assert (tmp_path / "run").is_symlink()


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_run_that_ends_early_leaves_nothing(tmp_path, error):
    out = tmp_path / "new" / "deeper" / "run"

    def end_early() -> None:
        with RunFolder(out) as folder:
            fill(folder)
            raise error("stop")

    with pytest.raises(error):
        end_early()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_only_a_hidden_partial_folder(tmp_path):
    code = (
        "import os, signal; from experiments.records import RunFolder\n"
        f"with RunFolder({str(tmp_path / 'run')!r}) as folder:\n"
        "    folder.write_result({'status': 'converged'})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".run.partial-")
    with RunFolder(tmp_path / "run") as folder:
        fill(folder)
    assert (tmp_path / "run" / "result.json").is_file()


def test_what_already_stands_there_is_refused_and_untouched(tmp_path):
    run = tmp_path / "run"
    with RunFolder(run) as folder:
        fill(folder)
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(OutputError, match="already holds a run"):
        RunFolder(run)
    assert sorted(path.name for path in run.iterdir()) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        RunFolder(other)
    with pytest.raises(OutputError, match="this is a file"):
        RunFolder(other / "notes.txt")
    with pytest.raises(OutputError, match=r"notes.txt is not a folder"):
        RunFolder(other / "notes.txt" / "run")
    link = tmp_path / "link"
    link.symlink_to(run)
    with pytest.raises(OutputError, match="already holds a run"):
        RunFolder(link)
    assert (other / "notes.txt").read_text() == "mine"


def test_an_earlier_run_is_replaced_only_when_the_new_one_is_done(tmp_path):
    run = tmp_path / "run"
    with RunFolder(run) as folder:
        fill(folder)
    (run / "figures" / "old.svg").touch()

    def replace(result: dict, error: BaseException | None = None) -> None:
        with RunFolder(run, replace=True) as folder:
            fill(folder)
            folder.write_result(result)
            assert Run(run).result["status"] == "converged"
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        replace({"status": "interrupted"}, KeyboardInterrupt())
    assert Run(run).result["status"] == "converged"
    assert (run / "figures" / "old.svg").exists()
    replace({"status": "done"})
    assert Run(run).result == {"status": "done"}
    assert not (run / "figures" / "old.svg").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (run / "result.json").unlink()
    with pytest.raises(OutputError, match="is not empty"):
        RunFolder(run, replace=True)


def test_places_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    for path in (tmp_path / ("x" * 300), tmp_path / "null\0", Path("/proc/none/run")):
        with pytest.raises(OutputError):
            RunFolder(path).__enter__()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os.path, "ismount", lambda _: True)
    with pytest.raises(OutputError, match="mount point"):
        RunFolder(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="cannot be written; mend its permissions"):
        RunFolder(tmp_path / "run")


def test_a_finished_run_is_not_lost_when_its_place_was_taken(tmp_path):
    out = tmp_path / "run"

    def lose_the_race() -> None:
        with RunFolder(out) as folder:
            fill(folder)
            out.mkdir()
            (out / "theirs").touch()

    with pytest.raises(RuntimeError, match="it stands in") as caught:
        lose_the_race()
    kept = Path(str(caught.value).rsplit(" ", 1)[1].rstrip("."))
    assert (kept / "result.json").is_file()
    assert [path.name for path in out.iterdir()] == ["theirs"]


def test_only_a_resumable_output_may_be_a_zarr_store(tmp_path):
    store = tmp_path / "sweep.zarr"
    store.mkdir()
    (store / "zarr.json").write_text("{}")
    check_output(store, resumable=True)
    check_output(tmp_path / "new.zarr", resumable=True)
    with pytest.raises(OutputError, match="is not empty"):
        check_output(store)
    (store / "zarr.json").rename(store / "other.json")
    with pytest.raises(OutputError, match="is not empty"):
        check_output(store, resumable=True)


def test_only_a_run_folder_is_read(tmp_path):
    with pytest.raises(OutputError, match="this is no run folder"):
        Run(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(OutputError, match="this is no run folder"):
        Run(tmp_path)
    for damaged in ("{", "[1]"):
        (tmp_path / "result.json").write_text(damaged)
        with pytest.raises(OutputError, match="run it again"):
            Run(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(OutputError, match=r"has no arrays.nc"):
        Run(tmp_path).arrays  # noqa: B018


def test_json_is_valid_and_says_what_was_not_finite():
    text = to_json(
        {
            "a": float("nan"),
            "b": {"c": [1.0, np.inf, -np.inf], "d": np.array([[1, 2], [3, 4]])},
            "e": jnp.float64(0.25),
            "f": np.bool_(True),
            "g": None,
            "h": Path("run"),
            "i": (np.int64(3), "text", True),
            7: jnp.array([0.5, jnp.nan]),
        }
    )
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == {
        "a": None,
        "b": {"c": [1.0, None, None], "d": [[1, 2], [3, 4]]},
        "e": 0.25,
        "f": True,
        "g": None,
        "h": "run",
        "i": [3, "text", True],
        "7": [0.5, None],
        "not_finite": {"a": "not a number", "b.c.1": "infinite", "b.c.2": "minus infinite", "7.1": "not a number"},
    }
    assert "not_finite" not in to_json({"a": 1.0})
    with pytest.raises(TypeError, match=r"a.b has type complex"):
        to_json({"a": {"b": 1j}})
    with pytest.raises(TypeError, match="has type object"):
        to_json({"a": object()})

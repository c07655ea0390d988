"""Sweeps on real worker processes: what one of them loses is computed again, and into the store once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import distributed
import numpy as np
import pytest
import xarray as xr

from experiments import batch, cluster, store, sweep
from experiments.config import Config, parse_config

ROOT = str(Path(__file__).parents[1])


def config(cycles: int = 500, points: int = 1024) -> Config:
    loop = {"periods": 2, "cycles_per_period": cycles, "window_cycles": 3.0, "shots": 50}
    box = {"window_cycles": [1.5, 7.0], "rabi_scale_1": [0.8, 1.2]}
    # Memory: this process may already hold the programs of a thousand other tests.
    tables = {"design": "sobol", "parameters": box, "points": points, "chunk": points // 16, "memory_mb": 1e5}
    tables["loop"] = loop
    return parse_config({"device": {"engine": "closed_form"}, "memory": {}, "sweep": tables}, verb="sweep")


def stored(path: Path) -> xr.Dataset:
    with xr.open_zarr(path) as found:
        return found.load()


@pytest.fixture(scope="module")
def scheduler():
    """A cluster that is not ours, in whose workers JAX would compute with 32 bits unless the sweep says otherwise."""
    options = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
    options["env"] = {"PYTHONPATH": ROOT, "JAX_ENABLE_X64": "0"}
    with distributed.LocalCluster(n_workers=2, processes=True, **options) as running:
        yield running.scheduler_address


def settings() -> dict[str, object]:
    import jax

    return {
        "x64": jax.config.read("jax_enable_x64"),
        "platform": jax.default_backend(),
        "environment": {name: os.environ.get(name) for name in ("JAX_PLATFORMS", "JAX_ENABLE_X64", "NPROC")},
    }


def test_a_killed_worker_loses_nothing_and_nothing_is_stored_twice(scheduler, tmp_path, monkeypatch):
    here = sweep.run(config(), tmp_path / "here.zarr", 0)
    written, killed = [], {}

    def write_and_kill(self, begin, numbers):
        written.append(begin)
        write(self, begin, numbers)
        if len(written) == 3:
            client = distributed.default_client()
            pids, busy = client.run(os.getpid), client.processing()
            victim = max(busy, key=lambda address: len(busy[address]))
            killed.update(pid=pids[victim], tasks=[str(task) for task in busy[victim]])
            os.kill(pids[victim], signal.SIGKILL)

    write = store.SweepStore.write
    monkeypatch.setattr(store.SweepStore, "write", write_and_kill)
    there = sweep.run(config(), tmp_path / "there.zarr", 0, scheduler=scheduler)
    assert killed["tasks"], "the worker had nothing to lose"
    assert sorted(written) == list(range(0, 1024, 64))
    assert (there["ok"], there["method"]) == (1024, here["method"])
    xr.testing.assert_identical(*(stored(tmp_path / name).drop_attrs() for name in ("there.zarr", "here.zarr")))
    with distributed.Client(scheduler) as client:
        # A new worker stands in the place of the killed one, and has its device set too.
        client.wait_for_workers(2, timeout=30)
        assert killed["pid"] not in client.run(os.getpid).values()
        for found in client.run(settings).values():
            assert found == {
                "x64": True,
                "platform": "cpu",
                "environment": {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "NPROC": "1"},
            }


def test_the_command_starts_workers_of_its_own_and_needs_no_device_itself(tmp_path):
    program = """
import sys
from jax._src import xla_bridge
from experiments import cli
try:
    cli.main(sys.argv[1:])
finally:
    print("backends:", xla_bridge.backends_are_initialized(), file=sys.stderr)
"""
    (tmp_path / "sweep.toml").write_text(config(cycles=8, points=32).to_toml())
    (tmp_path / "main.py").write_text(f"if __name__ == '__main__':{program}".replace("\n", "\n    "))
    command = [tmp_path / "main.py", "sweep", tmp_path / "sweep.toml", "--out", tmp_path / "s.zarr", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sweep: 32 of 32 points" in done.stderr
    assert done.stderr.endswith("backends: False\n")
    assert np.all(stored(tmp_path / "s.zarr").status == store.OK)


def test_an_address_without_a_scheduler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_CONNECT_S", 0.5)
    with pytest.raises(ValueError, match=r"^--scheduler tcp://127.0.0.1:9: no Dask scheduler answers there") as error:
        sweep.run(config(), tmp_path / "s.zarr", 0, scheduler="tcp://127.0.0.1:9")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_dask_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "experiments.cluster")
    monkeypatch.delattr("experiments.cluster")
    with pytest.raises(ValueError, match=r"^--workers needs Dask .*pip install 'ion-memristor-twin\[cluster\]'"):
        sweep.run(config(), tmp_path / "s.zarr", 0, workers=2)


class FakeWorker:
    address, name = "tcp://worker", 1

    class state:
        nthreads = 3


@pytest.mark.parametrize(
    ("before", "numbered", "after"),
    [
        ({}, True, {"JAX_PLATFORMS": "cpu", "NPROC": "3", "JAX_ENABLE_X64": "1"}),
        ({"JAX_PLATFORMS": "rocm"}, True, {"JAX_PLATFORMS": "rocm"}),
        ({"CUDA_VISIBLE_DEVICES": "4,7"}, True, {"JAX_PLATFORMS": "cuda", "JAX_CUDA_VISIBLE_DEVICES": "1"}),
        ({"CUDA_VISIBLE_DEVICES": "4,7"}, False, {"JAX_PLATFORMS": "cuda", "JAX_CUDA_VISIBLE_DEVICES": "0"}),
    ],
)
def test_a_worker_computes_where_it_was_told_to(monkeypatch, before, numbered, after):
    for name in ("JAX_PLATFORMS", "NPROC", "CUDA_VISIBLE_DEVICES", "JAX_CUDA_VISIBLE_DEVICES", "JAX_ENABLE_X64"):
        monkeypatch.setenv(name, before.get(name, ""))
    monkeypatch.delitem(sys.modules, "jax")
    cluster.SetDevice(numbered).setup(FakeWorker())
    assert {name: os.environ[name] for name in after} == after


def test_a_worker_that_has_imported_jax_otherwise_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "0")
    with pytest.raises(RuntimeError, match="JAX was imported in this worker before JAX_ENABLE_X64 = '1'"):
        cluster.SetDevice().setup(FakeWorker())


def test_more_local_workers_than_gpus_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(ValueError, match="--workers is 2, but CUDA_VISIBLE_DEVICES names 1"):
        sweep.run(config(), tmp_path / "s.zarr", 0, workers=2)


def test_a_chunk_that_kills_its_workers_is_named(monkeypatch):
    def died(**_):
        yield from ()
        raise distributed.scheduler.KilledWorker("sweep-ab12-4096", None, 3)

    monkeypatch.setattr(cluster, "as_completed", died)
    monkeypatch.setattr(cluster, "threads", lambda _: 1)
    with pytest.raises(RuntimeError, match=r"^several workers died of one task \(sweep-ab12-4096\)"):
        list(cluster.computed(None, batch.Job("", 0), []))

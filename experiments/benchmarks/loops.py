"""B2 to B6: loops, likelihoods, the command line and growth, through the public API as a user calls it."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from calibration.data import read_table
from calibration.likelihood import Experiment, log_likelihood, predict, prepared, replace_observations
from calibration.parameters import with_parameters
from experiments.benchmarks import peers
from experiments.benchmarks.measure import Result, interleaved, largest_difference
from experiments.benchmarks.problems import WINDOW_S, as_twin, devices
from experiments.benchmarks.trajectories import populations
from experiments.config import load_config
from twin.batch import evolve_batch, in_blocks
from twin.batching import Rows
from twin.dynamics import Adaptive, Magnus
from twin.memory import MovingAverage
from twin.memristor import ClosedForm, IonMemristor, planned, run, sine_input

_ROOT = Path(__file__).parent.parent
_DEMO = _ROOT / "configs" / "demo.toml"


@cache
def _box() -> dict[str, tuple[float, float]]:
    """Seven parameters of the demo and their boxes."""
    fit = load_config(_DEMO).fit
    assert fit is not None
    return fit.free


def _random(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(20260701 + seed)
    return {name: rng.uniform(*box, count) for name, box in _box().items()}


def cycles(quick: bool) -> list[Result]:
    """B2: devices x 800 cycles with feedback from the twin's memory, pulses 9 and 4 sigma apart."""
    return [*(_cycles(separation, quick) for separation in (9, 4)), *_peer_cycles(quick)]


def _fleet(count: int, separation: float, **changes) -> IonMemristor:
    numbers = {k: v for k, v in _random(1000).items() if not k.startswith("readout")}
    some = {name: value[:count] for name, value in numbers.items()}
    return IonMemristor(memory=MovingAverage(20.0), source="model", separation_s=separation * 20e-6, **some, **changes)


def _cycles(separation: int, quick: bool) -> Result:
    x = np.asarray(sine_input(periods=10, cycles_per_period=80))[:, None]
    count = 100 if quick else 1000
    fleet = _fleet(count, separation)
    seconds = interleaved({"run": lambda: run(fleet, x)}, 5)["run"][0]
    # Some cycles of this very run by the reference solver, at the transfers that the memory commanded.
    loop, few, some = run(fleet, x), slice(0, None, 40), 4
    exact = run(_fleet(some, separation, method=Adaptive()), loop.x_set[few, :some], loop.r[few, :some])
    error = max(largest_difference(loop.x[few, :some], exact.x), largest_difference(loop.y[few, :some], exact.y))
    note = "" if count == 1000 else f"on {count} of 1,000 devices"
    work = f"B2 1,000 devices x 800 cycles, {separation} sigma apart"
    return Result(work, "twin, default method", count * len(x) / seconds, "cycles/s", error, seconds, note)


def _peer_cycles(quick: bool) -> list[Result]:
    """A peer called once a cycle: two solves (pulse 1 alone, and both) of one device each."""
    d = devices(1)
    calls = {}
    for name, make in (("dynamiqs, Tsit5, per cycle", peers.dynamiqs_tsit5), ("QuTiP, per cycle", peers.qutip)):
        try:
            calls[name] = make(d, 1e-9)
        except ImportError as missing:
            print(f"B2: {name} is left out: {missing}")
    seconds = interleaved(calls, 3 if quick else 9)
    note = "one solve measured, two a cycle, scaled to all cycles"
    work = "B2 1,000 devices x 800 cycles"
    return [Result(work, name, 0.5 / run_s, "cycles/s", None, run_s, note) for name, (run_s, _) in seconds.items()]


class _Counts(eqx.Module):
    """Expected counts of a table at some parameters."""

    device: IonMemristor
    experiment: Experiment

    def __call__(self, batched, shared):
        del shared
        predicted = predict(with_parameters(self.device, _named(batched.number)), self.experiment)
        shots = [column.scale for column in self.experiment.columns]
        return tuple(jnp.round(n * p)[:, None] for n, p in zip(shots, (predicted.p_x, predicted.p_y), strict=True))


class _Value(eqx.Module):
    """Log-likelihood of one table at its own parameters."""

    device: IonMemristor
    experiment: Experiment

    def of(self, point, n_x, n_y):
        return log_likelihood(
            with_parameters(self.device, _named(point)),
            replace_observations(self.experiment, n_x.number[:, 0], n_y.number[:, 0]),
        )

    def __call__(self, batched, shared):
        del shared
        point, *counts = batched
        return self.of(point.number, *counts)[None]


class _ValueAndGradient(_Value):
    """The same with its gradient."""

    def __call__(self, batched, shared):
        del shared
        point, *counts = batched
        value, gradient = jax.value_and_grad(self.of)(point.number, *counts)
        return value[None], gradient


def _named(point) -> dict:
    return {name: point[k, 0] for k, name in enumerate(_box())}


def likelihood(quick: bool) -> list[Result]:
    """B3: value and gradient of the likelihood of tables of 363 cycles at 7 parameters."""
    tables = 20 if quick else 1000
    experiment = Experiment.from_table(read_table(_ROOT / "data" / "ion_loops.csv"))
    device = prepared(planned(IonMemristor(memory=MovingAverage(10.0), source="measured"), _box()), experiment)
    # A table each: its own parameters, and counts that other parameters made.
    points, truths = (jnp.stack([jnp.asarray(v) for v in _random(tables, seed=k).values()]) for k in (1, 2))
    counts = in_blocks(_Counts(device, experiment), Rows(truths), (tables,), block=1)
    batched = (Rows(points), *(Rows(c) for c in counts))
    calls = {
        name: lambda f=function: in_blocks(f(device, experiment), batched, (tables,), block=1)
        for name, function in (("value", _Value), ("both", _ValueAndGradient))
    }
    seconds = interleaved(calls, 3)
    of = jax.jit(lambda values: log_likelihood(with_parameters(device, values), experiment))
    ratio = seconds["both"][0] / seconds["value"][0]
    one = {name: points[k, 0] for k, name in enumerate(_box())}
    step = 1e-4
    up, down = (of(one | {"rabi_scale_1": one["rabi_scale_1"] + s}) for s in (step, -step))
    slope = (up - down) / (2 * step)
    error = float(abs(jax.grad(of)(one)["rabi_scale_1"] / slope - 1))
    work = "B3 likelihood of tables of 363 cycles, 7 parameters"
    note = "" if tables == 1000 else f"on {tables} of 1,000 tables"
    found = [
        Result(work, "twin, value", tables / seconds["value"][0], "tables/s", None, seconds["value"][0], note),
        Result(
            work, "twin, value and gradient", tables / seconds["both"][0], "tables/s", error, seconds["both"][0], note
        ),
        Result(work, "twin, value and gradient over value", ratio, "ratio", None, seconds["both"][0], note),
    ]
    if not quick:
        try:
            calls = dict(zip(("value", "both"), peers.dynamiqs_gradient(devices(363), 1e-8), strict=True))
        except ImportError as missing:
            print(f"B3: dynamiqs is left out: {missing}")
            return found
        peer = interleaved(calls, 3)
        note = "final populations of 363 devices as one table"
        found += [
            Result(work, "dynamiqs, value and gradient", 1 / peer["both"][0], "tables/s", None, peer["both"][0], note),
            Result(
                work, "dynamiqs, value and gradient over value", peer["both"][0] / peer["value"][0], "ratio", None,
                peer["both"][0], note,
            ),
        ]  # fmt: skip
    return found


def command_line(quick: bool) -> list[Result]:
    """B4: `iontwin fit` on the demo, in new processes with an empty and a filled cache."""
    del quick
    found = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache")}
        for name in ("cold", "warm"):
            out = Path(folder) / name
            command = [
                sys.executable,
                "-m",
                "experiments",
                "fit",
                str(_DEMO),
                "--out",
                str(out),
            ]
            began = time.perf_counter()
            subprocess.run(command, env=environment, check=True, capture_output=True)
            seconds = time.perf_counter() - began
            parts = json.loads((out / "result.json").read_text()).get("seconds", {})
            note = ", ".join(f"{k} {v:.1f} s" for k, v in parts.items() if isinstance(v, int | float))
            found.append(Result("B4 iontwin fit, demo, 16 starts", name, seconds, "s", None, seconds, note))
    return found


def growth(quick: bool) -> list[Result]:
    """B5: time and memory of batches and of long loops, each in its own process; batches only when quick."""
    sizes = {"batch": [10**3, 10**4] if quick else [10**3, 10**4, 10**5, 10**6]}
    sizes["cycles"] = [] if quick else [10**2, 10**3, 10**4, 10**5]
    found = []
    for kind, counts in sizes.items():
        for n in counts:
            command = [sys.executable, "-m", "experiments.benchmarks.loops", kind, str(n)]
            try:
                done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as failure:
                print(f"B5: {kind} of {n} failed: {failure}")
                break
            seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
            unit = "trajectories/s" if kind == "batch" else "cycles/s"
            note = f"{megabytes:.0f} MB above an idle process, compilation included"
            found.append(Result(f"B5 {kind} of {n:,}", "twin", n / seconds, unit, None, seconds, note))
    return found


def _peak_megabytes() -> float:
    """Largest resident memory of this process so far."""
    # Not `getrusage`, which starts at the peak of the process that started this one.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM; this benchmark needs Linux")


def _grow(kind: str, n: int) -> None:
    """One size in this process: prints (seconds, megabytes)."""
    jax.block_until_ready(jnp.zeros(3) + 1)
    idle = _peak_megabytes()
    if kind == "batch":
        system, pulses = as_twin(devices(n))
        call = lambda: evolve_batch(
            system, pulses, start="v", window_s=WINDOW_S, method=Magnus(1e-6, steps=140), reduce=populations
        )
    else:
        device = IonMemristor(memory=MovingAverage(20.0), source="model")
        x = 0.5 + 0.4 * np.sin(2 * np.pi * np.arange(n) / 80)
        call = lambda: run(device, x).y
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    print(json.dumps((time.perf_counter() - began, _peak_megabytes() - idle)))


def closed_form(quick: bool) -> list[Result]:
    """B6: the closed form, and how much of the memory's speed its numbers use."""
    fleet = dataclasses.replace(_fleet(200 if quick else 1000, 9), method=ClosedForm())
    x = np.asarray(sine_input(periods=10, cycles_per_period=80))[:, None]
    loop = run(fleet, x)
    moved = sum(leaf.nbytes for leaf in jax.tree.leaves(loop))
    a = jnp.ones(20_000_000)
    # Reads one array and writes another.
    copy = jax.jit(lambda v: v + 1.0)
    seconds = interleaved({"run": lambda: run(fleet, x), "copy": lambda: copy(a)}, 5)
    bandwidth = 2 * a.nbytes / seconds["copy"][0]
    run_s = seconds["run"][0]
    count = x.size * fleet.detuning_1_hz.size
    work = "B6 closed form"
    note = f"{moved / run_s / 1e9:.2f} of {bandwidth / 1e9:.1f} GB/s measured on a copy; counts what the loop returns"
    return [
        Result(work, "twin, ClosedForm", count / run_s, "cycles/s", None, run_s, f"{fleet.detuning_1_hz.size} x 800"),
        Result(work, "twin, ClosedForm", moved / run_s / bandwidth, "fraction of bandwidth", None, run_s, note),
    ]


if __name__ == "__main__":
    _grow(sys.argv[1], int(sys.argv[2]))

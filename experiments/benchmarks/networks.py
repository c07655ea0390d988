"""B10: a hundred memristors at once, beside MerLin's memristive layer of as many elements.

The ions are solved by the Lindblad engine at 1e-8, each with Rabi scales, detunings and linewidth of its own. Coupled
all to all or in a ring, cycle has to follow cycle. MerLin's elements are the batch of one layer, without couplings, as
its layers have none; the photonic row without couplings plays the same problem, and MerLin's error is the difference.
"""

import json
import os
import subprocess
from pathlib import Path
from statistics import median

import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.measure import Result, interleaved, largest_difference
from twin.graph import Graph, all_to_all, ring, uncoupled
from twin.memory import Exponential
from twin.memristor import IonMemristor, PhotonicMemristor
from twin.network import Encoding, Network, play

_NODES, _STEPS, _TAU = 100, 10_000, 4.0
_MERLIN_STEPS = 200
_ROOT = Path(__file__).parents[2]
_MERLIN = "IONTWIN_MERLIN_PYTHON"


def throughput(quick: bool) -> list[Result]:
    """B10: node-cycles a second; what is asked of each is x and y of every node and cycle."""
    steps = _STEPS // 10 if quick else _STEPS
    inputs = np.random.default_rng(0).uniform(0.0, 1.0, (steps, _NODES))
    graphs = {
        "ions, all to all": all_to_all(_NODES, 0.3 / _NODES),
        "ions, ring": ring(_NODES, 0.3),
        "ions, uncoupled": uncoupled(_NODES),
    }
    networks = {name: _ions(graph) for name, graph in graphs.items()}
    photons = PhotonicMemristor(memory=Exponential(jnp.full(_NODES, _TAU)), source="model")
    networks["photonic elements, all to all"] = Network((photons,), graphs["ions, all to all"], _encoding(0.6))
    networks["photonic elements, uncoupled"] = Network((photons,), uncoupled(_NODES), _encoding(1.0))
    solves = interleaved({name: lambda n=network: n.solved().devices for name, network in networks.items()}, 3)
    networks = {name: network.solved() for name, network in networks.items()}
    calls = {name: lambda n=network: play(n, inputs, keep=("x", "y")).y for name, network in networks.items()}
    times = interleaved(calls, 3 if quick else 9)
    rows = []
    for name, (seconds, first) in times.items():
        note = f"{steps:,} cycles; first call {first:.1f} s"
        if "ions" in name:
            note += f"; dynamics solved before in {solves[name][0]:.2g} s, at first {solves[name][1]:.1f} s"
        rows.append(_row(f"twin, {name}", inputs.size / seconds, seconds, note, None))
    try:
        return rows + _merlin(inputs[:_MERLIN_STEPS], networks["photonic elements, uncoupled"], quick)
    except FileNotFoundError as missing:
        print(f"B10: {missing}")
        return rows


def _encoding(gain: float) -> Encoding:
    return Encoding(gain * jnp.eye(_NODES))


def _ions(graph: Graph) -> Network:
    rng = np.random.default_rng(1)
    draw = lambda low, high: jnp.asarray(rng.uniform(low, high, _NODES))
    ions = IonMemristor(
        memory=Exponential(jnp.full(_NODES, _TAU)), source="model", rabi_scale_1=draw(0.95, 1.0),
        rabi_scale_2=draw(0.95, 1.05), detuning_1_hz=draw(-500, 500), detuning_2_hz=draw(-500, 500),
        laser_linewidth_hz=draw(0, 100),
    )  # fmt: skip
    return Network((ions,), graph, _encoding(0.6))


def _row(engine: str, value: float, seconds: float, note: str, error: float | None) -> Result:
    return Result(f"B10 network of {_NODES} memristors", engine, value, "node-cycles/s", error, seconds, note)


def _merlin(inputs: np.ndarray, same: Network, quick: bool) -> list[Result]:
    """MerLin in a process of its own, whose interpreter `IONTWIN_MERLIN_PYTHON` names."""
    python = os.environ.get(_MERLIN, str(_ROOT / ".venv-merlin" / "bin" / "python"))
    if not Path(python).exists():
        raise FileNotFoundError(f"MerLin has no interpreter; run `make bench`, or name one in {_MERLIN}")
    trace = play(same, inputs, keep=("x", "y"))
    x, y = np.asarray(trace.x), np.asarray(trace.y)
    expected = np.stack([1 - x, y, x - y], axis=-1)
    rows = []
    for bits in (64, 32):
        found = {}
        for threads in range(1, (os.cpu_count() or 1) + 1):
            problem = {
                "x": inputs.tolist(), "tau": _TAU, "threads": threads, "bits": bits, "repeats": 3 if quick else 9,
            }  # fmt: skip
            done = subprocess.run(
                [python, str(Path(__file__).with_name("merlin_peer.py"))], input=json.dumps(problem), check=True,
                capture_output=True, text=True,
            )  # fmt: skip
            found[threads] = json.loads(done.stdout.splitlines()[-1])
        threads, best = min(found.items(), key=lambda item: median(item[1]["seconds"][1:]))
        seconds = median(best["seconds"][1:])
        note = f"MerLin {best['version']}, {threads} of {len(found)} threads, the faster; uncoupled"
        error = largest_difference(best["probabilities"], expected)
        rows.append(_row(f"MerLin layer, {bits} bits", inputs.size / seconds, seconds, note, error))
    return rows

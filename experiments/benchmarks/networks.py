"""B10: a hundred memristors at once, beside MerLin's memristive layer of as many elements.

The ions are solved by the Lindblad engine at 1e-8, each with Rabi scales, detunings and linewidth of its own. Coupled
all to all or in a ring, cycle has to follow cycle. Their dynamics are solved once for all cycles: rows tell what that
makes of long and short records, and what remains of a network solved before. Their error is against adaptive solves,
cycle by cycle, of what some nodes were commanded.

MerLin's elements are the batch of one layer, without couplings, as its layers have none; the photonic row without
couplings plays the same problem, and MerLin's error is the difference. Two lengths show that its rate has no part that
is paid once.
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.measure import Result, interleaved, largest_difference
from twin.graph import Graph, all_to_all, ring, uncoupled
from twin.memory import Exponential
from twin.memristor import IonMemristor, PhotonicMemristor, run
from twin.methods import Adaptive
from twin.network import Encoding, Network, play

_NODES, _TAU = 100, 4.0
_LONG, _SHORT = 100_000, 10_000
_MERLIN_STEPS = (200, 800)
_ROOT = Path(__file__).parents[2]
_MERLIN = "IONTWIN_MERLIN_PYTHON"


def throughput(quick: bool) -> list[Result]:
    """B10: node-cycles a second; what is asked of each is x and y of every node and cycle."""
    inputs = np.random.default_rng(0).uniform(0.0, 1.0, (_LONG // (10 if quick else 1), _NODES))
    short = inputs[: _SHORT // (10 if quick else 1)]
    photons = PhotonicMemristor(memory=Exponential(jnp.full(_NODES, _TAU)), source="model")
    coupled, alone = all_to_all(_NODES, 0.3 / _NODES), uncoupled(_NODES)
    ions = {
        "ions, all to all": _ions(coupled), "ions, ring": _ions(ring(_NODES, 0.3)), "ions, uncoupled": _ions(alone),
    }  # fmt: skip
    elements = {
        "photonic elements, all to all": Network((photons,), coupled, _encoding(0.6)),
        "photonic elements, uncoupled": Network((photons,), alone, _encoding(1.0)),
    }
    solving, _ = interleaved({"": lambda: ions["ions, all to all"].solved().devices}, 3 if quick else 9)[""]
    works = {name: (network, inputs, "solved in the call") for name, network in ions.items()}
    works["ions, all to all, short"] = (ions["ions, all to all"], short, "solved in the call")
    works["ions, all to all, solved before"] = (
        *(ions["ions, all to all"].solved(), short), f"dynamics of all ions solved before in {solving:.2g} s",
    )  # fmt: skip
    works |= {name: (network, inputs, "") for name, network in elements.items()}
    calls = {name: lambda n=n, u=u: play(n, u, keep=("x", "y")).y for name, (n, u, _) in works.items()}
    times = interleaved(calls, 3 if quick else 9)
    rows = []
    for name, (seconds, first) in times.items():
        network, driven, note = works[name]
        error = _error(network) if "ions" in name else None
        note = f"{len(driven):,} cycles; {note + '; ' if note else ''}first call {first:.1f} s"
        rows.append(_row(f"twin, {name}", driven.size / seconds, seconds, note, error))
    try:
        return rows + _merlin(inputs, elements["photonic elements, uncoupled"], quick)
    except FileNotFoundError as missing:
        print(f"B10: {missing}")
        return rows


def _error(network: Network) -> float:
    """Largest error in x and y of every tenth ion over some cycles, against adaptive solves of its own commands."""
    trace = play(network, np.random.default_rng(2).uniform(0.0, 1.0, (6, _NODES)), keep=("x_set", "r", "x", "y"))
    some = slice(None, None, 10)
    x_set, r, x, y = (jnp.asarray(field)[:, some] for field in (trace.x_set, trace.r, trace.x, trace.y))
    ion = network.devices[0].unwrapped
    few = jax.tree.map(lambda leaf: leaf[some] if np.shape(leaf) == (_NODES,) else leaf, ion)
    reference = dataclasses.replace(few, method=Adaptive(rtol=1e-11, atol=1e-12))
    loop = run(reference, x_set, r)
    return max(largest_difference(x, loop.x), largest_difference(y, loop.y))


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
    rows = []
    for bits, steps in ((64, _MERLIN_STEPS[0]), (64, _MERLIN_STEPS[1]), (32, _MERLIN_STEPS[1])):
        driven = inputs[:steps]
        trace = play(same, driven, keep=("x", "y"))
        x, y = np.asarray(trace.x), np.asarray(trace.y)
        expected = np.stack([1 - x, y, x - y], axis=-1)
        found = {}
        for threads in range(1, (os.cpu_count() or 1) + 1):
            problem = {
                "x": driven.tolist(), "tau": _TAU, "threads": threads, "bits": bits, "repeats": 3 if quick else 9,
            }  # fmt: skip
            done = subprocess.run(
                [python, str(Path(__file__).with_name("merlin_peer.py"))], input=json.dumps(problem), check=True,
                capture_output=True, text=True,
            )  # fmt: skip
            found[threads] = json.loads(done.stdout.splitlines()[-1])
        threads, best = min(found.items(), key=lambda item: median(item[1]["seconds"][1:]))
        seconds = median(best["seconds"][1:])
        note = f"{steps} cycles; MerLin {best['version']}, {threads} of {len(found)} threads, the faster; uncoupled"
        error = largest_difference(best["probabilities"], expected)
        rows.append(_row(f"MerLin layer, {bits} bits", driven.size / seconds, seconds, note, error))
    return rows

"""Reservoirs whose devices are trained, beside the same before: a table of docs/reservoirs.md.

Run it with ``python -m experiments.studies.trained [--seeds N]``. A ring starts from the setting that the validation
part prefers without shot noise (`experiments.studies.reservoirs`), with exponential memories in place of windows, whose
gradients are cheaper. Time constants, and the phases that both interferometers add to what is commanded, are then
trained node by node on the validation part; edges and encoding stay. The read-out is solved anew for each number of
shots. The test part decides nothing.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from calibration.intervals import mean_interval
from calibration.train import Free, Reservoir, train_devices, train_readout
from experiments import tasks
from experiments.studies.reservoirs import LONGEST, MODELS, NODES, SEEDS, SHOTS, SPLIT, STEPS, nodes
from twin.graph import ring
from twin.memory import Exponential
from twin.memristor import PhotonicMemristor
from twin.network import Encoding, Network

_RING = "memristors in a ring"
_SHORTEST = 1.05  # cycles, of a time constant: training starts inside its bounds


def _of_nodes(network: Network) -> Any:
    """All nodes are one device with an axis."""
    return network.devices[0]


FREE = {
    "time constant": Free(lambda n: _of_nodes(n).memory.tau_cycles, 1.0, float(LONGEST)),
    "phase 1": Free(lambda n: _of_nodes(n).phase_offset_1_rad, -1.5, 1.5),
    "phase 2": Free(lambda n: _of_nodes(n).phase_offset_2_rad, -1.5, 1.5),
}
"""What is trained of every node."""


class Errors(NamedTuple):
    """Normalized test errors of one seed, by shots."""

    before: dict[int | None, float]
    after: dict[int | None, float]


def errors(task: str, seed: int, iterations: int) -> Errors:
    """One series and one ring, before and after its devices are trained."""
    series = tasks.SERIES[task](seed, STEPS)
    inputs, targets = jnp.asarray(series.scaled)[:, None], jnp.asarray(series.targets)
    found = [train_readout(reservoir, inputs, targets, SPLIT) for reservoir in rings(seed)]
    plain, chosen = min(found, key=lambda pair: float(pair[1].validation))
    ridge = float(chosen.ridge)
    trained = train_devices(plain, inputs, targets, SPLIT, FREE, ridge=ridge, iterations=iterations).reservoir

    def by_shots(reservoir: Reservoir) -> dict[int | None, float]:
        key = jax.random.key(seed)
        drawn = lambda shots: {} if shots is None else {"shots": shots, "key": key}
        return {
            shots: float(train_readout(reservoir, inputs, targets, SPLIT, **drawn(shots))[1].test) for shots in SHOTS
        }

    return Errors(by_shots(plain), by_shots(trained))


def rings(seed: int) -> Iterator[Reservoir]:
    """The rings of the study's settings."""
    for setting in MODELS[_RING]:
        windows, weights, bias = (jnp.asarray(part) for part in nodes(setting, seed, 1))
        tau, none = jnp.maximum(windows, _SHORTEST), jnp.zeros(NODES)
        element = PhotonicMemristor(memory=Exponential(tau), phase_offset_1_rad=none, phase_offset_2_rad=none)
        yield Reservoir(Network((element,), ring(NODES, setting.coupling), Encoding(weights, bias)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--only", nargs="*", default=list(tasks.SERIES), choices=list(tasks.SERIES))
    given = parser.parse_args()
    heads = [f"{name}, N = {shots or '∞'}" for shots in SHOTS for name in ("before", "trained")]
    print("| task | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|", sep="\n")
    console = Console(stderr=True)
    for task in given.only:
        found = [errors(task, s, given.iterations) for s in track(range(given.seeds), task, console=console)]
        cells = [
            mean_interval(np.array([getattr(e, when)[n] for e in found])) for n in SHOTS for when in Errors._fields
        ]
        print(
            f"| {task} | " + " | ".join(f"{m:.3g} ({low:.3g} to {high:.3g})" for m, low, high in cells) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()

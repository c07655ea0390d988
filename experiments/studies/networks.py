"""How fast networks are played: the table of docs/networks.md.

Run it with ``python -m experiments.studies.networks [--quick]``. A node-cycle is one cycle of one node. Compilation is
timed apart: it is the first call less the second. So is the solution of the ions' dynamics (`Network.solved`).
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from twin import graph
from twin.graph import Graph
from twin.loop import AbstractMemristor
from twin.memory import Exponential, MovingAverage
from twin.memristor import IonMemristor, PhotonicMemristor
from twin.network import Encoding, Network, play


class Case(NamedTuple):
    """One row."""

    label: str
    device: Callable[[int], AbstractMemristor]
    edges: Callable[[int], Graph]
    nodes: int
    steps: int
    form: str


def ion(nodes: int) -> AbstractMemristor:
    """Ions that differ, full dynamics."""
    spread = np.linspace(-1.0, 1.0, nodes)
    return IonMemristor(memory=Exponential(5.0 + 2 * spread), rabi_scale_1=1 + 0.01 * spread,
                        rabi_scale_2=1 - 0.01 * spread, detuning_2_hz=300 * spread)  # fmt: skip


def photonic(nodes: int) -> AbstractMemristor:
    """Photonic elements that differ, exponential memory."""
    return PhotonicMemristor(memory=Exponential(np.linspace(2.0, 10.0, nodes)), loss=0.05)


def averaging(nodes: int) -> AbstractMemristor:
    """Photonic elements with moving averages over up to 40 cycles."""
    return PhotonicMemristor(memory=MovingAverage(np.linspace(2.0, 40.0, nodes)), loss=0.05)


CASES = (
    Case("ions, Lindblad, ring", ion, lambda n: graph.ring(n, 0.3), 100, 5_000, "scan"),
    Case("ions, Lindblad, all to all", ion, lambda n: graph.all_to_all(n, 0.3 / n), 100, 5_000, "scan"),
    Case("ions, Lindblad, no edges", ion, graph.uncoupled, 100, 5_000, "parallel"),
    Case("ions, Lindblad, no edges", ion, graph.uncoupled, 2, 5_000, "scan"),
    Case("ions, Lindblad, no edges", ion, graph.uncoupled, 2, 5_000, "parallel"),
    Case("photonic, ring", photonic, lambda n: graph.ring(n, 0.3), 100, 20_000, "scan"),
    Case("photonic, all to all", photonic, lambda n: graph.all_to_all(n, 0.3 / n), 100, 20_000, "scan"),
    Case("photonic, all to all", photonic, lambda n: graph.all_to_all(n, 0.3 / n), 1_000, 2_000, "scan"),
    Case("photonic, moving average, ring", averaging, lambda n: graph.ring(n, 0.3), 100, 20_000, "scan"),
    Case("photonic, ring", photonic, lambda n: graph.ring(n, 0.3), 1_000, 20_000, "scan"),
    Case("photonic, no edges", photonic, graph.uncoupled, 1_000, 100_000, "scan"),
    Case("photonic, no edges", photonic, graph.uncoupled, 1_000, 100_000, "parallel"),
)


def timed(case: Case, quick: bool) -> dict[str, float]:
    """Seconds of compilation and of solving the devices, and node-cycles a second."""
    steps = max(100, case.steps // 20) if quick else case.steps
    rng = np.random.default_rng(0)
    encoding = Encoding(rng.uniform(0.1, 0.6, (case.nodes, 1)), 0.05)
    made = Network((case.device(case.nodes),), case.edges(case.nodes), encoding, nodes_per_device=(case.nodes,))
    solve_s = []
    for _ in range(2):  # with its compilation, and without
        start = time.perf_counter()
        network = jax.block_until_ready(made.solved())
        solve_s.append(time.perf_counter() - start)
    inputs = rng.uniform(0, 1, (steps, 1))

    def once() -> float:
        start = time.perf_counter()
        y = jax.block_until_ready(play(network, inputs, form=case.form, keep=("y",)).y)
        seconds = time.perf_counter() - start
        assert bool(np.all(np.isfinite(y[-1])))
        return seconds

    first = once()
    seconds = min(once() for _ in range(1 if quick else 3))
    return {"compile_s": max(0.0, first - seconds), "solve_s": solve_s[1], "steps": steps,
            "rate": case.nodes * steps / seconds}  # fmt: skip


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the steps")
    parser.add_argument("--only", default="", help="rows whose label holds this")
    arguments = parser.parse_args()
    print("| network | nodes | steps | form | node-cycles/s | µs a step | compile, s | solve, s |\n" + "|---" * 8 + "|")
    for case in CASES:
        if arguments.only in case.label:
            found = timed(case, arguments.quick)
            us = 1e6 * case.nodes / found["rate"]
            print(f"| {case.label} | {case.nodes} | {found['steps']} | {case.form} | {found['rate']:.2e} | {us:.3g} | "
                  f"{found['compile_s']:.1f} | {found['solve_s']:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

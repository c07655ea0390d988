"""MerLin's memristive layer on a problem read from standard input as JSON; writes what it gave and how long it took.

A script of its own, for MerLin needs torch: run it with an interpreter that has merlinquantum. The element has three
modes and one photon in the first: an interferometer of modes 0 and 1 sends it on with probability x, one of modes 1
and 2 takes it away with probability R. R moves by (x - R)/tau, and the elements are the batch of one layer.
"""

import json
import math
import sys
import time
import warnings
from importlib.metadata import version

import merlin as ml
import torch


def beam_splitter(builder, first: int) -> None:
    """A balanced beam splitter of modes `first` and `first + 1`."""
    builder.add_superpositions(targets=(first, first + 1), theta=math.pi / 2)


def layer(tau: float, dtype) -> ml.QuantumLayer:
    """One element; the photon leaves in modes 0, 1, 2 with probability 1 - x, x (1 - R), x R."""

    def phase(state, output):
        # A photon stays in its mode with probability sin^2(phi/2).
        r = torch.cos(state / 2) ** 2
        r = r + (output[:, 1] + output[:, 2] - r) / tau
        return 2 * torch.acos(torch.sqrt(r.clamp(0, 1)))

    builder = ml.CircuitBuilder(n_modes=3)
    beam_splitter(builder, 0)
    builder.add_angle_encoding(modes=[0], name="input")
    beam_splitter(builder, 0)
    beam_splitter(builder, 1)
    builder.add_memristive_ps(mode=1, update_rule=phase, initial_state=math.pi / 2, name="memory")
    beam_splitter(builder, 1)
    return ml.QuantumLayer(
        input_size=1, builder=builder, input_state=[1, 0, 0], dtype=dtype,
        measurement_strategy=ml.MeasurementStrategy.probs(ml.ComputationSpace.FOCK),
    )  # fmt: skip


def main() -> None:
    """Time the layer on the problem from stdin and print the answer as JSON."""
    warnings.simplefilter("ignore")
    problem = json.load(sys.stdin)
    torch.set_num_threads(problem["threads"])
    dtype = {32: torch.float32, 64: torch.float64}[problem["bits"]]
    x = torch.tensor(problem["x"], dtype=dtype)
    # A photon stays in mode 0 with probability sin^2(phi/2).
    phases = 2 * torch.acos(torch.sqrt(x))
    element = layer(problem["tau"], dtype)
    seconds = []
    with torch.no_grad():
        for _ in range(problem["repeats"] + 1):
            element.reset(batch_size=x.shape[1])
            began = time.perf_counter()
            outputs = [element(phases[k][:, None]) for k in range(len(x))]
            seconds.append(time.perf_counter() - began)
    found = torch.stack(outputs).tolist()
    print(json.dumps({"seconds": seconds, "probabilities": found, "version": version("merlinquantum")}))


if __name__ == "__main__":
    main()

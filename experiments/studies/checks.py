"""How often right and wrong models are rejected: the table of docs/checks.md.

Run it with ``python -m experiments.studies.checks [--quick]``.

Every row is a batch of synthetic tables of one design, each fitted and tested, all in one vmapped program. Wrong models
come with their strength, so that the smallest one that is still caught can be read off.
"""

import argparse
import dataclasses
import time
from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from calibration.checks import LEVEL, Layout, ResidualTests, residual_tests
from calibration.data import LoopTable
from calibration.least_squares import descend_one
from calibration.likelihood import Experiment
from calibration.posing import pose
from calibration.problem import Loops, Part, Problem
from twin.batching import physical
from twin.loop import AbstractMemristor, Responder, Response, Settings
from twin.memory import AbstractMemory, Exponential, MovingAverage
from twin.memristor import ClosedForm, IonMemristor, Lindblad

WINDOW = 15.0
SCALES = {"rabi_scale_1": (0.7, 1.3), "rabi_scale_2": (0.7, 1.3)}
READOUT = {"readout_error_bright": (0.0, 0.05), "readout_error_dark": (0.0, 0.05)}
TRUTH = {"rabi_scale_1": 1.04, "rabi_scale_2": 0.96, "readout_error_bright": 0.012, "readout_error_dark": 0.02}
TABLES_WRONG, TABLES_RIGHT = 100, 300
_STEPS, _BATCH = 12, 20


def design(periods=(60, 30, 20), *, cycles: int = 121, shots: int = 400) -> LoopTable:
    """Loops of sin^2 inputs of these periods, without recorded transfers; a window of 15 cycles is 1/4, 1/2 and 3/4."""
    k = np.tile(np.arange(cycles), len(periods))
    rows = len(k)
    return LoopTable(
        loop=np.repeat([chr(ord("A") + i) for i in range(len(periods))], cycles),
        cycle=k,
        x_set=np.sin(np.pi * k / np.repeat(periods, cycles)) ** 2,
        detuning_1_set_hz=np.zeros(rows),
        detuning_2_set_hz=np.zeros(rows),
        shots=np.full(rows, shots),
        n_x=np.zeros(rows),
        n_y=np.zeros(rows),
    )


class Blend(AbstractMemory):
    """A moving average of which a share is replaced by exponential forgetting of equal mean lag, tau = (T + 1) / 2."""

    window_cycles: Float[Array, ""] = physical()
    share: Float[Array, ""] = physical(default=1.0)

    def filter(self, x):
        forgetting = Exponential((self.window_cycles + 1) / 2).filter(x)
        return (1 - self.share) * MovingAverage(self.window_cycles).filter(x) + self.share * forgetting

    def init(self, shape=()):
        raise NotImplementedError("a blend is not streamed.")

    def read(self, state):
        raise NotImplementedError("a blend is not streamed.")

    def update(self, state, x):
        raise NotImplementedError("a blend is not streamed.")


class Leaking(AbstractMemristor):
    """An ion that loses a share of s between the pulses to a fourth level l, which shines as v and m do."""

    ion: IonMemristor
    memory: AbstractMemory
    source: str = eqx.field(static=True)
    leak: Float[Array, ""] = physical(default=0.0)

    def prepared(self, x_set, settings: Settings) -> "Leaking":
        return self

    def under(self, settings: Settings) -> Responder:
        respond = self.ion.under(settings)

        def leaking(x_set, r_set, *, alone, of_cycle=None) -> Response:
            response = respond(x_set, r_set, alone=alone, of_cycle=of_cycle)
            v, s, m = response.populations
            # Pulse 2 acts on what is left, so both of its outputs shrink alike; l takes the rest.
            kept = 1 - jnp.where(alone, 0.0, self.leak)
            populations = jnp.stack([v, kept * s, kept * m, (1 - kept) * (s + m)])
            return eqx.tree_at(lambda one: one.populations, response, populations)

        return leaking

    def signal(self, populations):
        return populations[1]

    def assigned(self, populations):
        return self.ion.assigned(populations[:3] + jnp.zeros_like(populations[:3]).at[0].set(populations[3]))


class Case(NamedTuple):
    """A truth, the model that is fitted to its tables, and what is wrong with it."""

    name: str
    strength: str
    truth: Problem
    true_values: Array
    model: Problem
    start: Array
    layout: Layout


def question(device: AbstractMemristor, table: LoopTable, boxes: Mapping[str, tuple[float, float]]) -> Problem:
    """A problem whose memory follows the inputs of each synthetic table, which `pose` alone would settle beforehand."""
    problem = pose(device, table, boxes).problem
    (part,) = problem.parts
    data = Loops(Experiment.from_table(table))
    return dataclasses.replace(problem, parts=(Part(part.name, part.device, data, part.rows),))


def ion(**parameters) -> IonMemristor:
    """The closed-form ion of the study at its true values."""
    return IonMemristor(**({"memory": MovingAverage(WINDOW), "method": ClosedForm()} | TRUTH | parameters))


def case(name: str, strength: str, truth: AbstractMemristor, *, model: IonMemristor | None = None, table=None,
         boxes=None) -> Case:  # fmt: skip
    """A case of one design; the truth has a parameter in the tiniest box, because a problem needs one."""
    table = design() if table is None else table
    boxes = SCALES | READOUT if boxes is None else boxes
    model = ion() if model is None else model
    fitted = question(model, table, boxes)
    start = jnp.array([float(TRUTH.get(n, WINDOW if n == "window_cycles" else 0.0)) for n in boxes])
    if isinstance(truth, Leaking):
        real, values = question(truth, table, {"leak": (0.0, 1.0)}), jnp.array([float(truth.leak)])
    else:
        real, values = question(truth, table, {"detuning_1_hz": (-1.0, 1.0)}), jnp.zeros(1)
    return Case(name, strength, real, values, fitted, start, Layout.of(fitted, table))


def tested(case: Case, keys) -> tuple[ResidualTests, Array]:
    """Tests of one synthetic table a key, each at the optimum of its own fit; and whether that was found."""
    return _tested(case[2:], keys)


@eqx.filter_jit
def _tested(setup, keys):
    truth, true_values, model, start, layout = setup

    def one(key):
        problem = model.with_observed(truth.simulated(key, true_values).observed)
        found = descend_one(problem, start, steps=_STEPS)
        return residual_tests(problem, layout, found.values), found.converged

    return jax.lax.map(one, keys, batch_size=_BATCH)


def overlapping(separation: float, **parameters) -> IonMemristor:
    """The ion whose pulses lie this many widths apart, by the full dynamics without decay."""
    return ion(method=Lindblad(1e-7), separation_s=20e-6 * separation, lead_s=160e-6, tail_s=160e-6,
               lifetime_s=np.inf, **parameters)  # fmt: skip


def leaking(share: float) -> Leaking:
    """The ion that leaks this share of s."""
    device = ion()
    return Leaking(device, device.memory, device.source, share)


def moved(case: Case) -> float:
    """Rms of what the flaw moves before a fit, in probability of the output y, under the inputs of one table."""
    observed = case.truth.simulated(jax.random.key(0), case.true_values).observed
    truth, model = case.truth.with_observed(observed), case.model.with_observed(observed)
    gap = truth.predicted(case.true_values)[1][1] - model.predicted(case.start)[1][1]
    return float(jnp.sqrt(jnp.mean(gap**2)))


def cases(quick: bool = False) -> list[Case]:
    """The right model, then each wrong one at several strengths."""
    kernel = (1.0, 0.2) if quick else (1.0, 0.2, 0.15, 0.1, 0.05)
    leak = (0.06,) if quick else (0.06, 0.05, 0.04, 0.02)
    separations = ((4000, 2.5),) if quick else ((4000, 2.5), (4000, 3.0), (400, 2.5))
    return [
        case("right model", "", ion()),
        *(case("exponential memory, fitted as a window", f"{a:.0%} exchanged", ion(memory=Blend(WINDOW, a)))
          for a in kernel),
        *(case("s leaks between the pulses", f"{a:.0%} of s", leaking(a)) for a in leak),
        *(case("pulses overlap, fitted as the closed form", f"{sigma} sigma, {shots} shots", overlapping(sigma),
               table=design(shots=shots)) for shots, sigma in separations),
    ]  # fmt: skip


def main(arguments=None) -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.checks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer tables and strengths")
    quick = parser.parse_args(arguments).quick
    print(
        "| truth | strength | y moved by (rms) | tables | rejected at p < 0.01 | scatter | shape | sequence | seconds |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for one in cases(quick):
        count = (TABLES_WRONG if one.strength else TABLES_RIGHT) // (5 if quick else 1)
        began = time.perf_counter()
        found, converged = tested(one, jax.random.split(jax.random.key(1), count))
        if not bool(jnp.all(converged)):
            raise RuntimeError(f"{int(jnp.sum(~converged))} of {count} fits of {one.name!r} did not converge.")
        alone = [f"{float(share):.1%}" for share in jnp.mean(found.p < LEVEL / 3, axis=0)]
        shift = f"{moved(one):.4f}" if one.strength else "0"
        rejected = f"{float(jnp.mean(found.p_value < LEVEL)):.1%}"
        cells = [one.name, one.strength, shift, str(count), rejected, *alone, f"{time.perf_counter() - began:.0f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

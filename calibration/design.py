"""Which measurement next: the loop that takes most from a named uncertainty in a minute of laboratory time.

Information adds: what a loop would contribute is known before it is measured, F_next = F_now + F_loop, both at the
present optimum. The forecast is checked by simulation: tables as the laboratory has them are simulated and fitted with
and without the loop, and the scatter of the estimates is compared.
"""

import dataclasses
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from calibration.data import LoopTable
from calibration.least_squares import descend_one, forward
from calibration.likelihood import Experiment
from calibration.posing import Posed, distinct_offsets, pose
from calibration.problem import Loops, Part, Problem
from calibration.uncertainty import covariance
from twin.loop import AbstractMemristor, sine_input

_CHUNK = 25
# No start lies closer to an edge of the box than this share of it.
_EDGE = 1e-4


class Candidate(NamedTuple):
    """A loop that could be measured: x_set = amplitude sin^2, so that the largest area of pulse 1 is commanded.

    Attributes:
        window_cycles: memory window. cycles_per_period, periods: of the input.
        detuning_1_set_hz, detuning_2_set_hz: laser offsets, Hz.
        amplitude: largest commanded input, in (0, 1].
        shots: repetitions of each setting.
    """

    window_cycles: float
    cycles_per_period: int
    periods: int
    detuning_1_set_hz: float
    detuning_2_set_hz: float
    amplitude: float
    shots: int

    @property
    def cycles(self) -> int:
        """Rows of its table."""
        return self.periods * self.cycles_per_period + 1

    def minutes(self, shot_s: float, overhead_s: float) -> float:
        """Laboratory time: both kinds of run of every cycle, and what a loop takes to set up."""
        return (2 * self.cycles * self.shots * shot_s + overhead_s) / 60

    def table(self) -> LoopTable:
        """Its settings, without counts; the memory supplies the transfers."""
        x = self.amplitude * np.asarray(sine_input(periods=self.periods, cycles_per_period=self.cycles_per_period))
        same = lambda value: np.full(len(x), value)
        return LoopTable(
            loop=np.full(len(x), "next"),
            cycle=np.arange(len(x)),
            x_set=x,
            window_cycles=same(self.window_cycles),
            detuning_1_set_hz=same(self.detuning_1_set_hz),
            detuning_2_set_hz=same(self.detuning_2_set_hz),
            shots=same(self.shots),
            n_x=same(0.0),
            n_y=same(0.0),
            name="next measurement",
        )


class Proposal(NamedTuple):
    """What a candidate promises.

    Attributes:
        reduction: share of the target's variance that it takes away, 1 - var_next / var_now.
        minutes: laboratory time. rate: logarithm of var_now / var_next, a minute.
        std: standard error of the target afterwards.
    """

    candidate: Candidate
    reduction: float
    minutes: float
    rate: float
    std: float


class Verification(NamedTuple):
    """Forecast against simulation, over tables whose searches settled.

    Attributes:
        predicted, realized: reduction of the target's variance.
        low, high: 95 % interval of the realized one, from the scatter of the simulations.
        simulations: how many settled, of `asked`.
    """

    predicted: float
    realized: float
    low: float
    high: float
    simulations: int
    asked: int


class Designer:
    """The present calibration, and the loops that could be added to it.

    Args:
        device: as for `fit`. tables: what has been measured. boxes: prior boxes of the free parameters.
        values: the present optimum, by name.
        candidates: loops that could be measured.
        noise: law of the scatter.
    """

    def __init__(
        self,
        device: AbstractMemristor,
        tables: LoopTable | Mapping[str, LoopTable],
        boxes: Mapping[str, tuple[float, float]],
        values: Mapping[str, float],
        candidates: Sequence[Candidate],
        *,
        noise: str = "binomial",
    ):
        offsets = [(c.detuning_1_set_hz, c.detuning_2_set_hz) for c in candidates]
        named = {"loops": tables} if isinstance(tables, LoopTable) else dict(tables)
        self.posed: Posed = pose(device, named, boxes, noise=noise, offsets=offsets)
        self.problem = self.posed.problem
        self.candidates = list(candidates)
        self._offsets = distinct_offsets(named.values(), offsets)
        width = np.asarray(self.problem.free.width)
        low = np.asarray(self.problem.free.low)
        at = np.array([values[name] for name in self.problem.names])
        # Candidates are judged inside the box: at an edge, pulses and errors may have no slope.
        self.values = np.clip(at, low + _EDGE * width, low + (1 - _EDGE) * width)
        self.information = np.asarray(_information(self.problem, jnp.asarray(self.values)))

    def with_loop(self, candidate: Candidate) -> Problem:
        """The present question with a candidate as one more table."""
        part = self._part(candidate)
        return dataclasses.replace(self.problem, parts=(*self.problem.parts, part))

    def _part(self, candidate: Candidate) -> Part:
        data = Experiment.from_table(candidate.table(), self._offsets)
        # Every row its own run of pulse 1, so that candidates of one length are one program.
        data = dataclasses.replace(
            data,
            first_x_set=data.x_set,
            first_setting=data.settings.of_cycle,
            first_of=jnp.arange(len(data.x_set)),
        )
        # Inputs that nobody has measured yet: the memory averages what the model expects.
        data = dataclasses.replace(data, fed_x=jnp.full(len(data.x_set), jnp.nan), all_x_measured=False)
        first = self.problem.parts[0]
        return Part("next", first.device, Loops(data), candidate.cycles, first.name)

    def proposals(
        self,
        target: str,
        *,
        shot_s: float,
        overhead_s: float,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> list[Proposal]:
        """All candidates, the fastest way to reduce the variance of `target` first."""
        k, width = self.problem.names.index(target), np.asarray(self.problem.free.width)
        now = covariance(self.information, width)[k, k]
        told = on_progress or (lambda what, done, most: None)
        found = []
        for count, candidate in enumerate(self.candidates):
            told("candidates", count, len(self.candidates))
            alone = dataclasses.replace(self.problem, parts=(self._part(candidate),))
            more = np.asarray(_information(alone, jnp.asarray(self.values)))
            then = covariance(self.information + more, width)[k, k]
            minutes = candidate.minutes(shot_s, overhead_s)
            rate = float(np.log(now / then)) / minutes
            found.append(Proposal(candidate, 1 - then / now, minutes, rate, float(np.sqrt(then))))
        told("candidates", len(self.candidates), len(self.candidates))
        return sorted(found, key=lambda one: -one.rate)

    def verified(
        self,
        proposal: Proposal,
        target: str,
        *,
        simulations: int = 500,
        seed: int = 0,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> Verification:
        """Refits simulated tables with and without a proposed loop, and compares the scatter with the forecast."""
        k = self.problem.names.index(target)
        told = on_progress or (lambda what, done, most: None)
        chunks = -(-simulations // _CHUNK)
        keys = jax.random.split(jax.random.key(seed), chunks * _CHUNK).reshape(chunks, _CHUNK)
        both, start = self.with_loop(proposal.candidate), jnp.asarray(self.values)
        one: Any = _refitted
        found = [one(both, start, keys[0])]
        with ThreadPoolExecutor(multiprocessing.cpu_count()) as pool:
            for more in pool.map(lambda key: jax.block_until_ready(one(both, start, key)), keys[1:]):
                found.append(more)
                told("simulations", min(len(found) * _CHUNK, simulations), simulations)
        before, after, settled = (np.concatenate([np.asarray(f[i]) for f in found])[:simulations] for i in range(3))
        pairs = np.stack([before[settled][:, k], after[settled][:, k]])
        rng = np.random.default_rng(seed)
        again = [
            1 - np.var(pairs[1, rows], ddof=1) / np.var(pairs[0, rows], ddof=1)
            for rows in rng.integers(0, pairs.shape[1], (2000, pairs.shape[1]))
        ]
        realized = 1 - float(np.var(pairs[1], ddof=1) / np.var(pairs[0], ddof=1))
        low, high = (float(q) for q in np.quantile(again, [0.025, 0.975]))
        return Verification(proposal.reduction, realized, low, high, int(np.sum(settled)), simulations)


@eqx.filter_jit
def _information(problem: Problem, values) -> Float[jax.Array, "parameters parameters"]:
    return forward(problem).information(values)


@eqx.filter_jit
def _refitted(problem: Problem, truth, keys):
    """Optimum without the last table, and with it, for each key; whether both are optima."""
    problem = forward(problem)

    def one(key):
        asked = problem.simulated(key, truth)
        fewer = descend_one(dataclasses.replace(asked, parts=asked.parts[:-1]), truth)
        every = descend_one(asked, truth)
        return fewer.values, every.values, fewer.converged & every.converged

    return jax.lax.map(one, keys)

"""One chunk of a sweep on this process: the compiled program, what it needs, and the numbers of the points.

Every chunk of a sweep is the same program, on whichever process and wherever the chunk begins. On a CPU the points are
computed one after another, since the cycles of a point fill the vector units and its arrays stay in the cache (under
`vmap` the loop over solver stages is slow); on an accelerator all points of a chunk go side by side.
"""

import dataclasses
import functools
import re
import resource
import sys
import time
import tomllib
from pathlib import Path
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from calibration.parameters import anchored, with_parameters
from experiments import designs
from experiments.build import device_from, memory_from
from experiments.config import parse_config
from experiments.provenance import provenance
from experiments.schema import Config, Loop, Sweep
from experiments.simulate import last_period
from experiments.store import INVALID, METRICS, OK
from twin import hysteresis
from twin.loop import AbstractMemristor, sine_input
from twin.loop import run as run_loop
from twin.memristor import Automatic, ClosedForm, IonMemristor, Lindblad, planned
from twin.planning import SOLVES_OF_CYCLE

CLOSED_FORM, LINDBLAD = "closed form", "lindblad"
_LARGEST, _LEAST, _SHARE = 4096, 16, 64  # points of a chunk, and chunks of a sweep: what a killed process loses
_PROBED, _PROBE_S = 16, 0.1
_BOUND_SLICE = 100_000
_MB = 1e6


class Job(NamedTuple):
    """What a process must know to compute chunks; text and numbers, so that it travels and keys a cache.

    Attributes:
        config: TOML of a configuration with a table [sweep].
        seed: of the shot noise; every point has its own key.
        chunk: points of a chunk; 0 before it is chosen.
        method: CLOSED_FORM or LINDBLAD; empty before it is chosen.
    """

    config: str
    seed: int
    chunk: int = 0
    method: str = ""


class Plan(NamedTuple):
    """What a sweep will need, measured on a process that will compute it.

    Attributes:
        job: with chunk and method.
        memory_mb: predicted peak of a process.
        process_mb: of this, the peak of the process so far, with the program compiled.
        chunk_mb: of this, what the compiled program takes for one chunk by the compiler's account.
        seconds_a_point: timed.
        probed: points that were timed.
        facts: device, precision and versions there.
    """

    job: Job
    memory_mb: float
    process_mb: float
    chunk_mb: float
    seconds_a_point: float
    probed: int
    facts: dict[str, Any]


def prepare(job: Job) -> Plan:
    """Choose method and chunk, compile, and time a few points.

    The chunk is the largest power of two that the memory allows, and no more than is lightly lost with its process.

    Raises:
        ValueError: one point, or the chunk that is asked for, needs more memory than sweep.memory_mb.
    """
    config = parse_config(tomllib.loads(job.config), verb="sweep")
    sweep = _sweep(config)
    size, limit = designs.size_of(sweep), sweep.memory_mb
    job = job._replace(method=job.method or _method(config, job.seed))
    chosen = job.chunk or sweep.chunk
    chunk = min(chosen or _below(min(_LARGEST, max(_LEAST, size // _SHARE))), size)
    drawing = designs.memory_bytes(sweep) / _MB
    while True:
        program = Program(job._replace(chunk=chunk), config)
        chunk_mb, process_mb = program.memory_bytes() / _MB, _process_mb()
        memory = process_mb + max(chunk_mb, drawing)
        if memory <= limit:
            break
        room = limit - process_mb
        if chosen or chunk == 1 or room <= 0 or drawing > room:
            raise ValueError(_too_little(limit, chunk, process_mb, chunk_mb, drawing))
        chunk = _below(max(1, min(chunk // 2, int(chunk * room / chunk_mb))))
    seconds, probed = _timed(program, sweep, size)
    return Plan(program.job, memory, process_mb, chunk_mb, seconds, probed, provenance())


def compute(job: Job, begin: int, values: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers and statuses of one chunk.

    Args:
        job: with chunk and method.
        begin: number of the first point.
        values: coordinates, shape (points, parameters), at most a chunk.

    Returns:
        {name: values} of METRICS and "status", shape (points,) each.
    """
    return _program(job).compute(begin, values)


class Program:
    """The program of all chunks of a job.

    Args:
        job: with chunk and method.
        config: the configuration of the job, parsed.
    """

    def __init__(self, job: Job, config: Config):
        sweep = _sweep(config)
        self.job, self._loop, self._names = job, sweep.loop, tuple(sweep.parameters)
        self._device = _settled(config, job.method)
        self._key = jax.random.key(job.seed)
        self.together = jax.default_backend() != "cpu"

    def compute(self, begin: int, values: np.ndarray) -> dict[str, np.ndarray]:
        """As `experiments.batch.compute`."""
        points = len(values)
        found = {name: np.asarray(v)[:points] for name, v in _batch(*self._arguments(begin, values)).items()}
        numbers = {name: found[name] for name in METRICS}
        return {**numbers, "status": np.where(found["valid"], OK, INVALID).astype(np.int8)}

    def memory_bytes(self) -> int:
        """What the compiled program takes for its chunk, by the compiler's account."""
        # A call of the same program later finds it compiled.
        lowered = cast(Any, _batch).lower(*self._arguments(0, np.zeros((1, len(self._names)))))
        used = lowered.compile().compiled.memory_analysis()
        return used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes

    def _arguments(self, begin: int, values: np.ndarray) -> tuple[Any, ...]:
        # A short chunk is filled up with its last point, so that every chunk has one shape.
        rows = np.minimum(np.arange(self.job.chunk), len(values) - 1)
        filled, index = jnp.asarray(values[rows]), jnp.asarray(begin + rows)
        count = jnp.asarray(len(values))
        return self._device, self._loop, self._names, filled, index, count, self._key, self.together


@functools.lru_cache(maxsize=2)
def _program(job: Job) -> Program:
    return Program(job, parse_config(tomllib.loads(job.config), verb="sweep"))


@eqx.filter_jit
def _batch(
    device: AbstractMemristor,
    loop: Loop,
    names: tuple[str, ...],
    values: jax.Array,
    index: jax.Array,
    count: jax.Array,
    key: jax.Array,
    together: bool,
) -> dict[str, jax.Array]:
    """Metrics and validity of the first `count` points of a chunk; a bad point is NaN and spoils no other."""
    x_set = sine_input(periods=loop.periods, cycles_per_period=loop.cycles_per_period, delay_cycles=loop.delay_cycles)
    last = last_period(loop)

    def one(numbers, k) -> dict[str, jax.Array]:
        played = run_loop(
            with_parameters(device, {name: numbers[j] for j, name in enumerate(names)}),
            x_set,
            detuning_1_set_hz=loop.detuning_1_set_hz,
            detuning_2_set_hz=loop.detuning_2_set_hz,
            shots=loop.shots or None,
            key=jax.random.fold_in(key, k) if loop.shots else None,
        )
        x, y = played.x[last], played.y[last]
        found = {
            "signed_area": hysteresis.signed_area(x, y),
            "form_factor": hysteresis.form_factor(x, y),
            "pinch_offset": hysteresis.pinch_offset(x, y),
            "rms_obedience": jnp.sqrt(jnp.mean((y - (1 - played.r[last]) * x_set[last]) ** 2)),
        }
        # A loop that does not close within its periods has no area.
        return {**found, "valid": jnp.all(played.valid) & jnp.isfinite(found["signed_area"])}

    if together:
        return jax.vmap(one)(values, index)

    def step(j, found):
        return {name: found[name].at[j].set(number) for name, number in one(values[j], index[j]).items()}

    blank = {name: jnp.full(len(values), jnp.nan) for name in METRICS}
    # The number of rounds is a value: one program computes a chunk, a short last one, and the points that are timed.
    return jax.lax.fori_loop(0, count, step, {**blank, "valid": jnp.zeros(len(values), bool)})


def _settled(config: Config, method: str) -> AbstractMemristor:
    """The device with method and grid settled for every point, so that points may be traced.

    A swept width is the actual one; the controller goes on believing in the configured one, as in a fit.
    """
    sweep, device = _sweep(config), _device(config)
    if not isinstance(device, IonMemristor):
        return device
    if isinstance(device.method, Automatic):
        error = device.method.error
        device = dataclasses.replace(device, method=ClosedForm() if method == CLOSED_FORM else Lindblad(error))
    box = {name: (axis.low, axis.high) for name, axis in sweep.parameters.items()}
    loop = sweep.loop
    offset = max(abs(loop.detuning_1_set_hz), abs(loop.detuning_2_set_hz))
    cycles = loop.periods * loop.cycles_per_period + 1
    return planned(device, box, detuning_set_hz=offset, solves=SOLVES_OF_CYCLE * cycles)


def _device(config: Config) -> AbstractMemristor:
    device = device_from(config)
    return anchored(dataclasses.replace(device, memory=memory_from(config, _sweep(config).loop.window_cycles)))


def _method(config: Config, seed: int) -> str:
    """The method of a configuration; of "auto" the closed form, if its error allows it at every point."""
    device = _device(config)
    if not isinstance(device, IonMemristor) or isinstance(device.method, ClosedForm):
        return CLOSED_FORM
    if isinstance(device.method, Automatic) and _largest_error(device, _sweep(config), seed) <= device.method.error:
        return CLOSED_FORM
    return LINDBLAD


def _largest_error(device: IonMemristor, sweep: Sweep, seed: int) -> float:
    """Largest error of the closed form at any point, whatever is commanded: it grows with the areas."""
    worst, offsets = 0.0, (sweep.loop.detuning_1_set_hz, sweep.loop.detuning_2_set_hz)
    for _, values in designs.blocks(sweep, seed, _BOUND_SLICE):
        columns = dict(zip(sweep.parameters, jnp.asarray(values.T), strict=True))
        columns.pop("window_cycles", None)
        some = dataclasses.replace(device, **columns)
        for x in (0.0, 1.0):  # the V scheme's pulse 1 is longest for x = 0
            worst = max(worst, float(jnp.max(some.closed_form_error(jnp.asarray(x), jnp.asarray(1.0), *offsets))))
    return worst


def _timed(program: Program, sweep: Sweep, size: int) -> tuple[float, int]:
    """Seconds a point, and the points timed: so many that the call itself does not count, at most a chunk."""
    most = min(size, program.job.chunk)
    _, values = next(designs.blocks(sweep, program.job.seed, most))
    program.compute(0, values[:1])
    points = most if program.together else min(most, _PROBED)  # side by side, a few take as long as a whole chunk
    while True:
        began = time.perf_counter()
        program.compute(0, values[:points])
        seconds = time.perf_counter() - began
        if seconds > _PROBE_S or points == most:
            return seconds / points, points
        points = min(4 * points, most)


def _process_mb() -> float:
    """Peak of this process in its host's memory; 0 on an accelerator, whose memory holds the chunk alone."""
    if jax.default_backend() != "cpu":
        return 0.0
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands the peak of `getrusage` down from the process that started this one.
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) / _MB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MB if sys.platform == "darwin" else peak * 1024 / _MB


def _too_little(limit: float, chunk: int, process_mb: float, chunk_mb: float, drawing: float) -> str:
    needs, remedy = f"the process takes {process_mb:.0f} MB with its program", "raise it"
    if process_mb < limit and drawing > chunk_mb:
        needs += f" and drawing the design another {drawing:.3g} MB"
        remedy += ", or take design = 'sobol' or 'random', which are drawn in parts"
    elif process_mb < limit:
        needs += f" and {'1 point' if chunk == 1 else f'{chunk} points'} at once another {chunk_mb:.3g} MB"
        remedy += " or lower sweep.chunk" if chunk > 1 else ""
    return f"sweep.memory_mb is {limit:g}, but {needs}; {remedy}."


def _below(number: int) -> int:
    """The largest power of two that is not above a positive number."""
    return 1 << (number.bit_length() - 1)


def _sweep(config: Config) -> Sweep:
    assert config.sweep is not None
    return config.sweep

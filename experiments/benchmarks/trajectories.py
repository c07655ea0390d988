"""B1 and B7: random devices under two pulses, saved in time, beside other codes and the arithmetic of the CPU."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import peers
from experiments.benchmarks.measure import Result, interleaved, largest_difference
from experiments.benchmarks.problems import SAVES, WINDOW_S, Devices, as_twin, devices, save_times
from twin import magnus
from twin.batch import evolve_batch
from twin.dynamics import Magnus, StaticGrid, evolve
from twin.master_equation import lindblad_components
from twin.pulses import Drive

_ERROR = 1e-6
_SAMPLE = 100


def populations(solution):
    """What is kept of a batch; one function object, so that it compiles once."""
    return solution.populations


def _twin(d: Devices, method, **options):
    system, pulses = as_twin(d)
    keep = {"window_s": WINDOW_S, "save_s": save_times(), "start": "v", "method": method}
    return lambda: evolve_batch(system, pulses, reduce=populations, **keep, **options)


def reference(d: Devices) -> np.ndarray:
    """Populations to 1e-12, shape (devices, saves, 3)."""
    system, pulses = as_twin(d)
    method = StaticGrid(1e-12)
    solution = evolve(system, pulses, start="v", window_s=WINDOW_S, save_s=save_times(), method=method)
    return np.moveaxis(np.asarray(solution.populations), -1, 0)


def batch(quick: bool) -> list[Result]:
    """B1: trajectories a second at a measured error of at most 1e-6, candidates interleaved."""
    lanes, part, few = (10_000, _SAMPLE, 8) if quick else (10_000, 2_000, 40)
    d = devices(lanes)
    exact = reference(d.first(_SAMPLE))
    calls, counts, errors, notes = {}, {}, {}, {}

    def add(name, call, count, error, note=""):
        calls[name], counts[name], errors[name], notes[name] = call, count, error, note

    ours: list[tuple] = [
        ("twin, Magnus", Magnus(_ERROR), lanes, {}),
        ("twin, Magnus, one core", Magnus(_ERROR), lanes, {"shards": 1}),
        ("twin, Magnus, single precision", Magnus(_ERROR, precision="single"), lanes, {}),
        ("twin, StaticGrid", StaticGrid(_ERROR), _SAMPLE, {}),
    ]
    if quick:
        ours = ours[:2]
    for name, method, count, options in ours:
        call = _twin(d.first(count), method, **options)
        got = np.moveaxis(np.asarray(call())[..., :_SAMPLE], -1, 0)
        add(name, call, count, largest_difference(got, exact), "" if count == lanes else f"on {count} devices")
    others = {  # with the loosest tolerance that kept the error when this was written, tried first
        "dynamiqs, Dopri8, vectorized": (partial(peers.dynamiqs, solver="Dopri8"), part, 3e-8),
        "dynamiqs, Tsit5, vectorized": (partial(peers.dynamiqs, solver="Tsit5"), part, 1e-7),
        "Qiskit Dynamics, Diffrax Dopri8": (peers.qiskit_dynamics, part, 3e-8),
        "QuTiP": (peers.qutip, few, 1e-8),
        "plain Diffrax, Dopri8, vmap": (peers.plain_diffrax, part, 3e-8),
    }
    for name, (make, count, tolerance) in others.items():
        try:
            call = make(d.first(count), tolerance)
            while (error := _error(call, exact)) > _ERROR and tolerance > 1e-10:
                tolerance /= 3
                call = make(d.first(count), tolerance)
        except ImportError as missing:
            print(f"B1: {name} is left out: {missing}")
            continue
        add(name, call, count, error, f"tolerance {tolerance:.0e}, on {count} devices")
    seconds = interleaved(calls, 3 if quick else 5)
    return [
        Result(
            "B1 batch of 10,000, 200 saves",
            name,
            counts[name] / run,
            "trajectories/s",
            errors[name],
            run,
            "; ".join(filter(None, (notes[name], f"first call {first:.1f} s"))),
        )
        for name, (run, first) in seconds.items()
    ]


def _error(call, exact: np.ndarray) -> float:
    got = np.asarray(call())[: len(exact)]
    return largest_difference(got, exact[: len(got)])


def loop(quick: bool) -> list[Result]:
    """The same Magnus step in a bare scan and in Diffrax's loop: what the loop costs in run and compile time."""
    d = devices(128)
    calls = {
        "bare scan": peers.magnus_steps(d, peers.bare_scan),
        "Diffrax's loop": peers.magnus_steps(d, peers.diffrax_loop),
    }
    differ = largest_difference(*(call() for call in calls.values()))
    jax.clear_caches()
    seconds = interleaved(calls, 5 if quick else 21)
    return [
        Result("loop around a Magnus step, 128 lanes", name, run, "s", differ, run, f"first call {first:.2f} s")
        for name, (run, first) in seconds.items()
    ]


def floor(quick: bool) -> list[Result]:
    """B7: arithmetic of B1 as a fraction of what one core does in a matrix product."""
    lanes = 2_000 if quick else 10_000
    d = devices(lanes)
    per_step = 2 * magnus.DEGREE * (_operations() + 18)
    call = _twin(d, Magnus(_ERROR, steps=1), shards=1)
    seconds = interleaved({"twin": call}, 5)["twin"][0]
    rate = per_step * (SAVES - 1) * lanes / seconds
    peak = _matrix_product_rate()
    note = f"{per_step} operations a step, {rate / 1e9:.1f} of {peak / 1e9:.1f} GFLOP/s on one core"
    return [
        Result("B7 distance to the floor of B1", "twin, Magnus, one core", rate / peak, "fraction", None, seconds, note)
    ]


def _operations() -> int:
    """Additions and multiplications of one generator acting on one state."""
    system, _ = as_twin(devices(1))
    system = jax.tree.map(lambda a: a.reshape(*a.shape[: max(a.ndim - 1, 0)], 1), system)
    drive = Drive(jnp.ones(1), None)
    slopes = lambda v: lindblad_components(system, [drive, drive], v, rotating=True)
    jaxpr = jax.make_jaxpr(slopes)(tuple(jnp.ones((9, 1))))
    return sum(e.primitive.name in ("mul", "add", "sub") for e in jaxpr.jaxpr.eqns)


def _matrix_product_rate(size: int = 768) -> float:
    """Floating-point operations a second of one core, from NumPy's product of two 64-bit matrices."""
    a = np.random.default_rng(0).normal(size=(size, size))
    best = np.inf
    for _ in range(9):
        # Processor time adds up the threads of the product.
        began = time.process_time()
        a @ a
        best = min(best, time.process_time() - began)
    return 2 * size**3 / best

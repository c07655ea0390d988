"""Reservoirs of memristors beside their controls, task by task: the tables of docs/reservoirs.md.

Run it with ``python -m experiments.studies.reservoirs --out DIR [--seeds N]``; the same command goes on where it was
stopped. ``--scale`` times large reservoirs instead.

All models have `NODES` features, see the same inputs in [0, 1], choose among the same ridges and three settings by
the validation part, and are judged on the test part, which decides nothing. Shot noise acts on what the memories
average and on what the read-out sees; a classical model has none.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scipy import sparse

from calibration.capacity import capacities, memory_capacity, terms_up_to
from calibration.formats import write_atomic
from calibration.intervals import mean_interval
from calibration.ridge import Split, chosen_readout
from calibration.train import Reservoir, reservoir_nmse
from experiments import tasks
from twin.graph import ring, uncoupled
from twin.memory import Exponential, MovingAverage
from twin.memristor import PhotonicMemristor
from twin.network import Encoding, Network, play

NODES, STEPS, SEEDS = 50, 1500, 20
SPLIT = Split(100, 600, 300, 500)
IMAGES = Split(0, 500, 150, 250)
SHOTS: tuple[int | None, ...] = (100, 1000, None)
# Delays that capacities look back: linear memory; information processing by total degree.
LINEAR, PRODUCTS = 60, (30, 12, 6)
LONGEST = 50  # cycles, of a window


class Setting(NamedTuple):
    """One choice of the few numbers that a model's nodes are drawn from.

    Args:
        reach: longest window or time constant, cycles; of an echo state network, its spectral radius.
        coupling: weight of the edges of a ring; of an echo state network, the scale of its inputs.
    """

    reach: float
    coupling: float = 0.0


MODELS: dict[str, tuple[Setting, ...]] = {
    "memristors, uncoupled": tuple(Setting(reach) for reach in (5, 15, 50)),
    "memristors in a ring": (Setting(5, 0.3), Setting(20, 0.3), Setting(20, 0.7)),
    "no memory (R = 1/2)": (Setting(1),),
    "exponential memory": tuple(Setting(reach) for reach in (3, 15, 60)),
    "echo state network": (Setting(0.7, 0.1), Setting(0.95, 0.1), Setting(0.95, 0.5)),
}
PHYSICAL = tuple(name for name in MODELS if "memristors" in name or "no memory" in name)


def nodes(setting: Setting, seed: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows, input weights (nodes, channels) and biases of one draw; commands stay in [0, 1] for inputs in [0, 1]."""
    rng = np.random.default_rng([seed, 7])
    room = 1.0 - setting.coupling
    swing = room * rng.uniform(0.2, 1.0, NODES)
    share = rng.dirichlet(np.ones(channels), NODES)
    up = rng.choice([-1.0, 1.0], (NODES, channels))
    weights = swing[:, None] * share * up
    # The smallest command of a node is its bias plus its negative weights.
    bias = (room - swing) * rng.uniform(0.0, 1.0, NODES) - np.minimum(weights, 0.0).sum(axis=1)
    windows = rng.permutation(np.linspace(1.0, setting.reach, NODES))
    return windows, weights, bias


@eqx.filter_jit
def _played(coupled: bool, remembers: bool, windows, weights, bias, coupling, inputs, shots, keys) -> Array:
    """What is measured, shape (runs, steps, nodes), of runs that each have their own draw and inputs."""

    def one(windows, weights, bias, inputs, key):
        # No window reaches further back than the record.
        longest = min(LONGEST, inputs.shape[0])
        memory = (
            MovingAverage(jnp.minimum(windows, longest), capacity=longest + 2)
            if remembers
            else Exponential(1e12 * windows)  # A time constant beyond any record: R stays at 1/2.
        )
        graph = ring(NODES, coupling) if coupled else uncoupled(NODES)
        network = Network((PhotonicMemristor(memory=memory),), graph, Encoding(weights, bias))
        # Counts are drawn a step at a time: all at once the sampler waits for its slowest lane.
        form = "auto" if shots is None else "scan"
        return Reservoir(network).features(inputs, shots=shots, key=key, form=form)

    return jax.vmap(one, in_axes=(0, 0, 0, 0, None if keys is None else 0))(windows, weights, bias, inputs, keys)


def features(
    model: str, setting: Setting, seeds: range, inputs: Float[np.ndarray, "runs steps channels"], shots: int | None
) -> Float[np.ndarray, "runs steps nodes"]:
    """Features of one model for many runs; runs beyond the seeds share their draw, in order."""
    each = len(inputs) // len(seeds)
    channels = inputs.shape[2]
    if model == "exponential memory":
        tau = np.geomspace(1.0, setting.reach, NODES)
        return np.asarray(_remembered(jnp.asarray(tau), jnp.asarray(inputs)))
    if model == "echo state network":
        return np.concatenate(
            [echo_states(setting, seed, inputs[k * each : (k + 1) * each]) for k, seed in enumerate(seeds)]
        )
    draws = [nodes(setting, seed, channels) for seed in seeds for _ in range(each)]
    windows, weights, bias = (jnp.asarray(np.stack(part)) for part in zip(*draws, strict=True))
    keys = None if shots is None else jax.random.split(jax.random.key(seeds[0]), len(inputs))
    count = None if shots is None else jnp.asarray(float(shots))
    return np.asarray(
        _played(
            "ring" in model, "no memory" not in model, windows, weights, bias, jnp.asarray(setting.coupling),
            jnp.asarray(inputs), count, keys,
        )
    )  # fmt: skip


@jax.jit
def _remembered(tau: Float[Array, " nodes"], inputs: Float[Array, "runs steps channels"]) -> Array:
    """Exponential averages that include the present input; channels are dealt to the nodes in turn."""
    dealt = inputs[..., jnp.arange(NODES) % inputs.shape[2]]

    def step(state, now):
        state = state + (now - state) / tau
        return state, state

    rows = jnp.moveaxis(dealt, 1, 0)
    return jnp.moveaxis(jax.lax.scan(step, jnp.full_like(rows[0], 0.5), rows)[1], 0, 1)


def echo_states(setting: Setting, seed: int, inputs: Float[np.ndarray, "runs steps channels"]) -> np.ndarray:
    """States of reservoirpy's echo state network: tanh nodes, sparse random weights, inputs and a constant 1.

    Its matrices, and its update x <- tanh(W x + W_in (u, 1)), for all runs at once.
    """
    from reservoirpy.nodes import Reservoir as EchoState

    fed = np.concatenate([inputs, np.ones((*inputs.shape[:2], 1))], axis=2)
    node = EchoState(
        units=NODES, sr=setting.reach, lr=1.0, input_scaling=setting.coupling, input_connectivity=1.0, seed=seed
    )
    node.initialize(fed[0])
    own, driven = (sparse.csr_array(m).toarray() for m in (node.W, node.Win))
    state, states = np.zeros((len(fed), NODES)), []
    for k in range(fed.shape[1]):
        state = np.tanh(state @ own.T + fed[:, k] @ driven.T)
        states.append(state)
    return np.stack(states, axis=1)


_said: Any = jax.vmap(lambda readout, features: readout(features))
_solve: Any = jax.jit(jax.vmap(lambda f, t: chosen_readout(f, t, SPLIT)))


@functools.cache
def _runs(task: str, seeds: range) -> list[tasks.Series]:
    return [tasks.SERIES[task](seed, STEPS) for seed in seeds]


def series_errors(task: str, model: str, shots: int | None, seeds: range) -> list[float]:
    """Test errors, seed by seed: normalized error, or the share of wrong steps where classes are told apart."""
    runs = _runs(task, seeds)
    inputs = np.stack([run.scaled for run in runs])[..., None]
    targets = jnp.asarray(np.stack([run.targets for run in runs]))
    found = []
    for setting in MODELS[model]:
        seen = jnp.asarray(features(model, setting, seeds, inputs, shots))
        chosen = _solve(seen, targets)
        errors = chosen.test
        if task == "sine or square":
            test = SPLIT.parts[2]
            said = _said(chosen.readout, seen[:, test])
            errors = jnp.mean((said > 0.5) != (targets[:, test] > 0.5), axis=1)
        found.append((np.asarray(chosen.validation), np.asarray(errors)))
    return _best(found)


def _best(found: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Test scores under the setting of the smallest validation error, seed by seed."""
    validation, scores = (np.stack(part) for part in zip(*found, strict=True))
    if not (np.all(np.isfinite(validation)) and np.all(np.isfinite(scores))):
        raise ValueError("a reservoir left its range: a command was outside [0, 1].")
    return scores[np.argmin(validation, axis=0), np.arange(scores.shape[1])].tolist()


def capacity_scores(kind: str, model: str, shots: int | None, seeds: range) -> list[float]:
    """Capacities, seed by seed, of the setting with the largest one on another record of inputs."""
    terms, found = terms_up_to(PRODUCTS), []

    def total(seen: np.ndarray, inputs: np.ndarray) -> float:
        if kind == "linear memory":
            return memory_capacity(seen, inputs, LINEAR, washout=100)
        return capacities(seen, inputs, terms, washout=100).total

    for setting in MODELS[model]:
        totals = []
        for shift in (1000, 0):
            inputs, seen = _driven(model, setting, shots, seeds, shift)
            totals.append(np.array([total(f, u) for f, u in zip(seen, inputs, strict=True)]))
        found.append((-totals[0], totals[1]))
    return _best(found)


@functools.cache
def _driven(model: str, setting: Setting, shots: int | None, seeds: range, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Independent inputs and the features under them, which both kinds of capacity use."""
    inputs = np.stack([tasks.uniform_inputs(seed + shift, STEPS) for seed in seeds])
    return inputs, features(model, setting, seeds, ((inputs + 1) / 2)[..., None], shots)


def digit_errors(model: str, shots: int | None, seeds: range) -> list[float]:
    """Share of wrong digits, which are shown row by row and read out after the last row."""
    found, count, test = [], sum(IMAGES), IMAGES.parts[2]
    images, labels = (np.stack(part) for part in zip(*(tasks.digits(seed) for seed in seeds), strict=True))
    images, labels = images[:, :count], labels[:, :count]
    for setting in MODELS[model]:
        seen = features(model, setting, seeds, images.reshape(-1, *images.shape[2:]), shots)[:, -1]
        validation, scores = [], []
        for own, of in zip(seen.reshape(len(seeds), count, NODES), labels, strict=True):
            chosen = chosen_readout(jnp.asarray(own), jnp.asarray(np.eye(10)[of]), IMAGES)
            validation.append(float(chosen.validation))
            scores.append(float(np.mean(np.argmax(chosen.readout(own[test]), axis=1) != of[test])))
        found.append((np.array(validation), np.array(scores)))
    return _best(found)


TASKS: dict[str, Callable[[str, int | None, range], list[float]]] = {
    **{name: functools.partial(series_errors, name) for name in tasks.SERIES},
    "linear memory": functools.partial(capacity_scores, "linear memory"),
    "information processing": functools.partial(capacity_scores, "information processing"),
    "digits": digit_errors,
}
MEASURES = {"sine or square": "share of wrong steps", "digits": "share of wrong images"} | dict.fromkeys(
    ("linear memory", "information processing"), "capacity, larger is better"
)


def cells() -> Iterator[tuple[str, str, int | None]]:
    """Task, model and shots of every cell; classical models have no shots."""
    for task in TASKS:
        for model in MODELS:
            for shots in SHOTS if model in PHYSICAL else (None,):
                yield task, model, shots


def label(task: str, model: str, shots: int | None) -> str:
    """Key of a cell in the file."""
    return f"{task} | {model} | {shots or 'inf'}"


def compute(out: Path, seeds: range, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """All cells, kept in ``out/scores.json`` one by one."""
    path = out / "scores.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    todo = [cell for cell in cells() if not only or cell[0] in only]
    columns = (TextColumn("{task.description:<60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        job = bar.add_task("", total=len(todo))
        for cell in todo:
            bar.update(job, description=label(*cell))
            kept = done.get(label(*cell))
            if kept is None or kept["seeds"] != len(seeds):
                began = time.perf_counter()
                scores = TASKS[cell[0]](cell[1], cell[2], seeds)
                spent = round(time.perf_counter() - began, 2)
                done[label(*cell)] = {"seeds": len(seeds), "scores": scores, "seconds": spent}
                write_atomic(path, json.dumps(done, indent=1).encode())
            bar.advance(job)
    lines = ["task,model,shots,mean,low,high,seeds"]
    for cell in todo:
        numbers = mean_interval(done[label(*cell)]["scores"])
        lines.append(",".join([cell[0], f'"{cell[1]}"', str(cell[2] or "inf"), *(f"{v:.6g}" for v in numbers)]))
        lines[-1] += f",{len(seeds)}"
    write_atomic(out / "scores.csv", ("\n".join(lines) + "\n").encode())
    return done


def table(done: dict[str, Any]) -> str:
    """Markdown: a row a task, mean and interval; the best of each row, and what its interval does not exclude, bold."""
    columns = [(m, s) for m in MODELS for s in (SHOTS if m in PHYSICAL else (None,))]
    heads = [f"{m}, N = {s or '∞'}" if m in PHYSICAL else m for m, s in columns]
    lines = ["| task | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for task in TASKS:
        if not all(label(task, *c) in done for c in columns):
            continue
        found = [mean_interval(done[label(task, *c)]["scores"]) for c in columns]
        sign = -1 if "capacity" in MEASURES.get(task, "") else 1
        best = min(found, key=lambda f: sign * f.mean)
        near = [f.low <= best.high and f.high >= best.low for f in found]
        text = [f"{m:.3g} ({low:.3g} to {high:.3g})" for m, low, high in found]
        lines.append(f"| {task} ({MEASURES.get(task, 'NMSE')}) | " + " | ".join(
            f"**{t}**" if n else t for t, n in zip(text, near, strict=True)) + " |")  # fmt: skip
    return "\n".join(lines)


def scale() -> None:
    """Times 1,000 nodes over 100,000 steps, and a batch of hyper-parameters of 100 nodes."""
    steps, count, block = 100_000, 1000, 4
    u = jnp.asarray(tasks.second_order_narma(0, steps).scaled)[:, None]
    tau = jnp.geomspace(1.0, 300.0, count).reshape(-1, block)

    @jax.jit
    def outputs(tau, u):
        """Last row of outputs and their mean: nodes go in blocks that stay in the cache, nothing else is written."""

        def one(own):
            network = Network((PhotonicMemristor(memory=Exponential(own)),), uncoupled(block))
            y: Any = play(network, jnp.broadcast_to(u, (steps, block)), keep=("y",)).y
            return y[-1], y.mean(axis=0)

        return jax.lax.map(one, tau)

    timed: list[tuple[str, Any, tuple, float]] = [
        (f"{count} nodes, {steps} steps, uncoupled", outputs, (tau, u), count * steps),
        (
            "256 hyper-parameters, 100 nodes, 2,000 steps, with read-out",
            _many,
            (jnp.geomspace(2, 200, 256),),
            256 * 2e5,
        ),
    ]
    for name, work, args, size in timed:
        began = time.perf_counter()
        jax.block_until_ready(work(*args))
        first = time.perf_counter() - began
        began = time.perf_counter()
        jax.block_until_ready(work(*args))
        spent = time.perf_counter() - began
        print(f"{name}: {spent:.2f} s ({size / spent:.3g} node-cycles/s), first call {first:.2f} s")


@eqx.filter_jit
def _many(reach: Float[Array, " batch"]) -> Array:
    """Validation errors of uncoupled memristors for many longest time constants."""
    run = tasks.second_order_narma(0, 2000)
    u, wanted = jnp.asarray(run.scaled)[:, None], jnp.asarray(run.targets)

    def one(reach):
        tau = reach ** jnp.linspace(0.0, 1.0, 100)
        encoding = Encoding(jnp.linspace(0.2, 0.9, 100)[:, None])
        network = Network((PhotonicMemristor(memory=Exponential(tau)),), uncoupled(100), encoding)
        return reservoir_nmse(Reservoir(network), u, wanted, Split(100, 1000, 500, 400), 1e-6)

    return jax.lax.map(one, reach)


def main() -> None:
    """Computes what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--tasks", nargs="*", default=(), help="some of them; all by default")
    parser.add_argument("--scale", action="store_true")
    given = parser.parse_args()
    if given.scale:
        scale()
        return
    if given.out is None:
        parser.error("--out DIR is needed for the tables")
    unknown = [name for name in given.tasks if name not in TASKS]
    if unknown or given.seeds < 2:
        parser.error(f"tasks are {', '.join(TASKS)}, and at least two seeds are needed")
    given.out.mkdir(parents=True, exist_ok=True)
    done = compute(given.out, range(given.seeds), tuple(given.tasks))
    print(table(done))
    print(f"\n{sum(cell['seconds'] for cell in done.values()):.0f} s in all")


if __name__ == "__main__":
    main()

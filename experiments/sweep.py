"""`iontwin sweep`: one loop at many points of named parameters, in chunks, into a Zarr store.

What it needs is told before it starts. Killed at any moment it goes on where it was: `experiments.store` says which
chunks are done. They are computed here (`experiments.batch`) or by the workers of a cluster (`experiments.cluster`).
"""

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments import batch, designs
from experiments.provenance import Stopwatch, provenance
from experiments.schema import Config
from experiments.simulate import settled
from experiments.store import INVALID, METRICS, OK, PENDING, SweepStore

Computed = Iterator[tuple[int, dict[str, np.ndarray]]]


def run(config: Config, store: Path, seed: int, workers: int = 0, scheduler: str = "") -> dict[str, Any]:
    """Run the sweep of a configuration, or what is left of it.

    Args:
        config: with a table [sweep].
        store: Zarr store to create, or one that the same configuration has begun.
        seed: of the design and of the shot noise; every point has its own key.
        workers: processes of a Dask cluster to start on this machine; 0 computes in this process.
        scheduler: address of a running Dask scheduler whose workers compute.

    Returns:
        {"status", "store", "points", "ok", "invalid", "resumed_at", "method", "estimate", "seconds", ...}.

    Raises:
        OutputError: the store is of another configuration, or of something else.
        ValueError: the memory is too little, or there is no such cluster.
    """
    assert config.sweep is not None
    clock, path, size = Stopwatch(), Path(store), designs.size_of(config.sweep)
    begun = SweepStore.begun(path, config, seed)
    resumed = 0 if begun is None else int(np.sum(begun.status != PENDING))
    estimate, facts = None, {}
    if begun is None or resumed < size:
        with _computer(workers, scheduler) as (prepare, compute, processes):
            job = batch.Job(config.to_toml(), seed)
            plan = prepare(job if begun is None else job._replace(chunk=begun.chunk, method=begun.method))
            estimate, facts = _estimate(plan, size - resumed, processes()), plan.facts
            print(_told(plan, config, estimate), file=sys.stderr, flush=True)
            job = plan.job
            if begun is None:  # what fails before its first numbers leaves nothing behind
                begun = SweepStore.lay_out(path, config, seed, chunk=job.chunk, method=job.method, facts=facts)
            with _progress(size, done := resumed) as update:
                for begin, numbers in compute(job, begun.pending()):
                    begun.write(begin, numbers)
                    update(done := done + len(numbers["status"]))
    status = begun.status
    return {
        "status": "done",
        "store": path,
        "points": size,
        "ok": int(np.sum(status == OK)),
        "invalid": int(np.sum(status == INVALID)),
        "resumed_at": resumed,
        "method": begun.method,
        "estimate": estimate,
        "notes": _notes(config),
        "seed": seed,
        "seconds": clock.stop(),
        **(facts or provenance()),
    }


@contextlib.contextmanager
def _computer(workers: int, scheduler: str) -> Generator[tuple[Callable, Callable[..., Computed], Callable[[], int]]]:
    """Yields what makes the plan, what computes chunks, and the number of chunks that are computed at once."""
    if not workers and not scheduler:
        yield batch.prepare, _here, lambda: 1
        return
    try:
        from experiments import cluster
    except ModuleNotFoundError as error:
        option = "--workers" if workers else "--scheduler"
        raise ValueError(
            f"{option} needs Dask ({error.name} is missing); pip install 'ion-memristor-twin[cluster]'."
        ) from None
    with cluster.connected(workers, scheduler) as client:
        yield (
            lambda job: cluster.plan(client, job),
            lambda job, chunks: cluster.computed(client, job, chunks),
            lambda: max(1, cluster.threads(client)),
        )


def _here(job: batch.Job, chunks: Iterator[tuple[int, np.ndarray]]) -> Computed:
    for begin, values in chunks:
        yield begin, batch.compute(job, begin, values)


def _estimate(plan: batch.Plan, left: int, processes: int) -> dict[str, Any]:
    return {
        "chunk": plan.job.chunk,
        "memory_mb": plan.memory_mb,
        "seconds_a_point": plan.seconds_a_point,
        "points_timed": plan.probed,
        "processes": processes,
        "seconds": plan.seconds_a_point * left / processes,
    }


def _told(plan: batch.Plan, config: Config, estimate: dict[str, Any]) -> str:
    """The estimate in words, with how it was obtained."""
    assert config.sweep is not None
    size, chunk, processes = designs.size_of(config.sweep), plan.job.chunk, estimate["processes"]
    columns = len(METRICS) + len(config.sweep.parameters)
    where = f"{processes} workers, {plan.facts['device']}" if processes > 1 else plan.facts["device"]
    return (
        f"sweep: {size} points in {-(-size // chunk)} chunks of {chunk} by the {plan.job.method} on {where}\n"
        f"sweep: memory about {plan.memory_mb:.0f} MB a process ({plan.process_mb:.0f} MB so far, "
        f"{plan.chunk_mb:.2g} MB for a chunk by the compiler's account; limit {config.sweep.memory_mb:g} MB), "
        f"store at most {size * (8 * columns + 1) / 1e6:.3g} MB\n"
        f"sweep: time about {_duration(estimate['seconds'])} "
        f"({1e3 * plan.seconds_a_point:.3g} ms a point, timed on {plan.probed})"
    )


def _notes(config: Config) -> list[str]:
    """What a reader must know to trust the numbers, in sentences."""
    assert config.sweep is not None
    sweep, loop = config.sweep, config.sweep.loop
    notes = [said for said in (designs.remark(sweep),) if said]
    swept = sweep.parameters.get("window_cycles")
    longest = swept.high if swept else loop.window_cycles or config.memory.window_cycles
    if not settled(config, loop, longest):
        notes.append(
            f"Where the window is long ({longest:g} cycles at most), the last of {loop.periods} periods is not yet "
            "steady: the memory still holds the history before the first cycle; take more periods."
        )
    return notes


@contextlib.contextmanager
def _progress(size: int, done: int) -> Generator[Callable[[int], None]]:
    """Yields a function of the points done: a bar on a terminal, a line for each tenth elsewhere."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("points"))
    bar = Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=3600.0,  # s; a chunk may take longer than the 30 s over which the speed is else averaged
    )
    task = bar.add_task("sweep", total=size, completed=done)
    told, first, began = -1, done, time.monotonic()

    def update(done: int) -> None:
        nonlocal told
        bar.update(task, completed=done)
        if not console.is_terminal and (tenth := 10 * done // size) > told:
            told = tenth
            left = ""
            if first < done < size:
                left = f", about {_duration((time.monotonic() - began) * (size - done) / (done - first))} left"
            print(f"sweep: {done} of {size} points{left}", file=sys.stderr, flush=True)

    with bar:
        update(done)
        yield update


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"

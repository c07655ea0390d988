"""Progress of a search: a bar on a terminal, a line a stage elsewhere."""

import contextlib
import time
from collections.abc import Callable, Generator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from experiments.records import RunFolder

Report = Callable[[str, int, int, float], None]


@contextlib.contextmanager
def search_progress(out: RunFolder, quantity: str) -> Generator[Report]:
    """Yields `report(stage, iterations done, most iterations, best value)`.

    Args:
        out: the run folder whose log keeps the end of each stage.
        quantity: what `best value` is.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[best]}"),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}
    last: dict[str, tuple[int, float]] = {}
    began = time.perf_counter()

    def close(stage: str) -> None:
        done, best = last[stage]
        bar.update(tasks[stage], total=max(done, 1))
        out.log(f"{stage}: {done} iterations, {quantity} {best:.6g}, {time.perf_counter() - began:.1f} s so far")

    def report(stage: str, done: int, most: int, best: float) -> None:
        if stage not in tasks:
            if tasks:
                close(list(tasks)[-1])
            tasks[stage] = bar.add_task(stage, total=most, best="compiling")
            if not console.is_terminal:
                out.log(f"{stage}: begins (the first iterations include compilation)")
        last[stage] = (done, best)
        if done:
            bar.update(tasks[stage], completed=done, best=f"{quantity} {best:.6g}")

    with bar:
        yield report
        if tasks:
            close(list(tasks)[-1])


Work = Callable[[str, int, int], None]


@contextlib.contextmanager
def work_progress(out: RunFolder) -> Generator[Work]:
    """Yields `report(what, done, of how many)`: a bar for each kind of work, its end kept in the log.

    Args:
        out: the run folder.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}
    began: dict[str, float] = {}

    def report(what: str, done: int, most: int) -> None:
        if what not in tasks:
            tasks[what], began[what] = bar.add_task(what, total=most), time.perf_counter()
        bar.update(tasks[what], completed=done, total=most)
        if done >= most:
            out.log(f"{what}: {done} in {time.perf_counter() - began[what]:.1f} s")

    with bar:
        yield report

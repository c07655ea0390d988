"""Chunks of a sweep on the worker processes of a Dask cluster; imported only when one is asked for.

Every chunk is one task. Its numbers come back here, and this process alone writes them: a worker that dies takes no
part of the store with it, its tasks are computed again by another, and a result is handed over once, whoever computed
it. This module does not import JAX, so that a worker can set its device first, and this process needs none.
"""

import contextlib
import os
import secrets
import sys
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from distributed import Client, LocalCluster, Worker, WorkerPlugin, as_completed
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker

if TYPE_CHECKING:
    from experiments.batch import Job, Plan

_CONNECT_S = 30
_AHEAD = 2  # tasks a thread: one is computed while the next is on its way
Numbers = dict[str, np.ndarray]


class SetDevice(WorkerPlugin):
    """Settles what JAX reads from the environment, in each worker before it imports JAX.

    The platform is JAX_PLATFORMS, if the worker's environment has it; else "cuda" where CUDA_VISIBLE_DEVICES names
    devices, and "cpu" elsewhere: a worker computes where it was told to or fails, and never falls back. Of several
    visible devices it takes one, or JAX would reserve memory on all.

    Args:
        numbered: whether this is the device with the worker's number, as local workers have one; else it is the first,
            where dask-cuda puts the worker's own.
    """

    name = "iontwin-device"

    def __init__(self, numbered: bool = False):
        self._numbered = numbered

    def setup(self, worker: Worker) -> None:
        """Called by Dask in every worker, also in those that come later."""
        gpus = _visible_gpus()
        wanted = {
            "JAX_ENABLE_X64": "1",
            "JAX_PLATFORMS": _platform(),
            # As many threads of XLA as Dask counts for the worker, or the workers of a machine are in each other's way.
            "NPROC": str(worker.state.nthreads),
        }
        if gpus:
            wanted["JAX_CUDA_VISIBLE_DEVICES"] = str(worker.name) if self._numbered else "0"
        different = [name for name, value in wanted.items() if os.environ.get(name) != value]
        if "jax" in sys.modules and different:
            raise RuntimeError(
                f"{worker.address}: JAX was imported in this worker before {different[0]} = {wanted[different[0]]!r} "
                "could be set; restart the worker."
            )
        os.environ.update(wanted)


@contextlib.contextmanager
def connected(workers: int, scheduler: str) -> Generator[Client]:
    """A client of a new local cluster, or of a running scheduler, with at least one worker.

    Args:
        workers: processes to start on this machine; 0 with a scheduler.
        scheduler: address of a running Dask scheduler; empty with workers.

    Raises:
        ValueError: nothing answers at the address, or there are more local workers than GPUs.
    """
    with contextlib.ExitStack() as stack:
        if workers:
            gpus = _visible_gpus()
            if gpus and _platform() == "cuda" and workers > len(gpus):
                raise ValueError(
                    f"--workers is {workers}, but CUDA_VISIBLE_DEVICES names {len(gpus)}; one worker each."
                )
            # A process is given no limit by Dask, which would kill it for the memory that compiling takes; the plan
            # of the sweep refuses what does not fit.
            options: dict[str, Any] = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
            target: Any = stack.enter_context(LocalCluster(n_workers=workers, processes=True, **options))
        else:
            target = scheduler
        try:
            client = stack.enter_context(Client(target, timeout=_CONNECT_S))
        except (OSError, ValueError) as error:
            said = str(error).splitlines()[0]
            raise ValueError(f"--scheduler {scheduler}: no Dask scheduler answers there ({said}); check it.") from None
        client.register_plugin(SetDevice(numbered=workers > 0))
        if not threads(client):
            print(f"sweep: waiting for a worker of {scheduler}", file=sys.stderr, flush=True)
        client.wait_for_workers(max(workers, 1))
        yield client


def threads(client: Client) -> int:
    """Chunks that the workers of now compute at once."""
    return sum(client.nthreads().values())


def plan(client: Client, job: "Job") -> "Plan":
    """`experiments.batch.prepare` on a worker; raises as that, and as `computed`."""
    with _in_words():
        return client.submit(_prepare, job, pure=False).result()


def computed(client: Client, job: "Job", chunks: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, Numbers]]:
    """The numbers of chunks, each once, in the order in which workers finish them.

    Args:
        client: of `connected`.
        job: with chunk and method.
        chunks: number of the first point and coordinates.

    Raises:
        RuntimeError: several workers died of a chunk, or the scheduler is gone.
    """
    run, waiting, begins = secrets.token_hex(4), iter(chunks), {}
    done = as_completed(with_results=True)

    def submit() -> None:
        # Few are under way at a time: ten million points are thousands of tasks, and workers may come and go.
        while len(begins) < _AHEAD * max(threads(client), 1) and (chunk := next(waiting, None)) is not None:
            begin, values = chunk
            future = client.submit(_compute, job, begin, values, key=f"sweep-{run}-{begin}")
            begins[future.key] = begin
            done.add(future)

    submit()
    with _in_words():
        for future, numbers in done:
            yield begins.pop(future.key), numbers
            submit()


@contextlib.contextmanager
def _in_words() -> Generator[None]:
    """What Dask raises, as one sentence."""
    try:
        yield
    except KilledWorker as error:
        raise RuntimeError(
            f"several workers died of one task ({error.task}), probably of too little memory; lower sweep.memory_mb or "
            "give workers more, and resume with the same command."
        ) from None
    except (CommClosedError, FutureCancelledError):
        raise RuntimeError("the Dask scheduler is gone; start it again and resume with the same command.") from None


def _visible_gpus() -> list[str]:
    return [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]


def _platform() -> str:
    return os.environ.get("JAX_PLATFORMS") or ("cuda" if _visible_gpus() else "cpu")


def _prepare(job: "Job") -> "Plan":
    from experiments.batch import prepare

    return prepare(job)


def _compute(job: "Job", begin: int, values: np.ndarray) -> Numbers:
    from experiments.batch import compute

    return compute(job, begin, values)

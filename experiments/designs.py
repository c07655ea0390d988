"""Points of a sweep: full grids and uniformly random, Sobol and Latin-hypercube sets.

The points come as blocks of rows, so that ten million of them need no more than a block at a time (a Latin hypercube,
whose every column is one permutation, needs its columns). Where a block begins and ends changes no coordinate.
"""

import math
import warnings
from collections.abc import Iterator

import numpy as np
from scipy.stats import qmc

from experiments.schema import Sweep

_FLOAT = np.dtype(float).itemsize


def size_of(sweep: Sweep) -> int:
    """Number of points."""
    return math.prod(_counts(sweep)) if sweep.design == "grid" else sweep.points


def blocks(sweep: Sweep, seed: int, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """All points of a design, a block at a time.

    Args:
        sweep: parameters with their ranges, and the kind of design; of a grid the last parameter changes fastest.
        seed: of every design but a grid.
        rows: points of a block; the last one may be shorter.

    Returns:
        Pairs of the number of the first point and the coordinates, shape (points, parameters) in the order of
        `sweep.parameters`.
    """
    size, axes = size_of(sweep), list(sweep.parameters.values())
    low, high = np.array([axis.low for axis in axes]), np.array([axis.high for axis in axes])
    draw = {"grid": _grid, "random": _random, "sobol": _sobol, "latin_hypercube": _latin_hypercube}[sweep.design]
    begin = 0
    for unit in draw(sweep, seed, [min(rows, size - first) for first in range(0, size, rows)]):
        # The sum can round to just above the upper end, where a probability would be refused.
        yield begin, np.minimum(low + (high - low) * unit, high)
        begin += len(unit)


def memory_bytes(sweep: Sweep) -> int:
    """Bytes that are held at once while the points are drawn, blocks aside."""
    if sweep.design != "latin_hypercube":
        return 0
    # Besides the columns: the permutation of one, its uniform numbers and its result.
    return (len(sweep.parameters) + 3) * sweep.points * _FLOAT


def remark(sweep: Sweep) -> str:
    """What weakens the design, in one sentence; empty if nothing does."""
    if sweep.design != "sobol" or sweep.points & (sweep.points - 1) == 0:
        return ""
    below = 2 ** int(math.log2(sweep.points))
    return (
        f"A Sobol set is balanced at powers of two only: in place of {sweep.points} take {below} or {2 * below} points."
    )


def _counts(sweep: Sweep) -> tuple[int, ...]:
    return tuple(axis.points or sweep.points for axis in sweep.parameters.values())


def _grid(sweep: Sweep, seed: int, lengths: list[int]) -> Iterator[np.ndarray]:
    del seed
    counts = _counts(sweep)
    lines, begin = [np.linspace(0.0, 1.0, count) for count in counts], 0
    for length in lengths:
        places = np.unravel_index(np.arange(begin, begin + length), counts)
        yield np.stack([line[place] for line, place in zip(lines, places, strict=True)], axis=1)
        begin += length


def _random(sweep: Sweep, seed: int, lengths: list[int]) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    return (rng.random((length, len(sweep.parameters))) for length in lengths)


def _sobol(sweep: Sweep, seed: int, lengths: list[int]) -> Iterator[np.ndarray]:
    engine = qmc.Sobol(len(sweep.parameters), rng=np.random.default_rng(seed))
    for length in lengths:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The balance properties of Sobol", UserWarning)  # `remark` says it
            yield engine.random(length)


def _latin_hypercube(sweep: Sweep, seed: int, lengths: list[int]) -> Iterator[np.ndarray]:
    # Columns are independent permutations; drawn one by one, they need a fraction of the memory of all at once.
    streams = np.random.default_rng(seed).spawn(len(sweep.parameters))
    columns = [qmc.LatinHypercube(1, rng=stream).random(sweep.points)[:, 0] for stream in streams]
    begin = 0
    for length in lengths:
        yield np.stack([column[begin : begin + length] for column in columns], axis=1)
        begin += length

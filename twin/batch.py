"""Large batches: blocks of lanes that fit the cache, and shards of blocks, some for each core or device.

XLA on CPU runs a loop over a batch on one core, and streams a large batch through memory at every step. Blocks keep the
state of a step in the cache. Shards are calls of one compiled program from several threads, so that one CPU device
computes on all cores without forced host devices; several local devices take shards in turn. A wider vector and fast
arithmetic gained nothing.
"""

import dataclasses
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from twin.batching import Rows, broadcast_batch, is_traced
from twin.dynamics import Adaptive, Magnus, Problem, Solution, StaticGrid, pose, solve
from twin.levels import LevelSystem
from twin.pulses import AbstractPulse

# Lanes in a block of `evolve_batch`: larger blocks leave the first-level cache, smaller ones wait for their loops.
BLOCK = 128
# More shards than cores: the first one runs alone, and a core that others keep busy holds up less of the batch.
_SHARDS_PER_CORE = 8
# Memory that a block of a device may take, in copies of the numbers that go in and come out: a guess, not measured.
_WORKING_COPIES = 8
# Lanes on which the error of single precision is measured.
_SAMPLE = 64


def in_blocks(
    function: Callable[..., Any],
    batched: Any,
    shape: tuple[int, ...],
    *,
    shared: Any = None,
    block: int | None = None,
    shards: int | None = None,
) -> Any:
    """`function(batched, shared)` of a batch of any size, block by block; lanes never influence each other.

    Main arguments:
        function: of a block, to a tree of arrays whose last axis is the block's lanes. A module with numbers, or the
            same function object each time: another one compiles again.
        batched: modules and arrays whose trailing axes are, or broadcast to, the batch; a block has one lane axis.
        shape: of the batch.

    Other arguments:
        shared: what all lanes have in common.
        block: lanes in a block; None takes a whole shard, or as many as fit the memory that a device reports.
        shards: parts computed at the same time; None takes some for each core of a CPU, one for each other device.
            Inside `jit` or a derivative there is one.

    Returns:
        What `function` returns, with the batch axes last.

    Raises:
        ValueError: no lanes; a block or shards below one.
    """
    lanes = math.prod(shape)
    if shape == () or lanes == 0:
        raise ValueError(f"a batch needs lanes, but its shape is {shape}; call the function of one lane instead.")
    for name, value in (("block", block), ("shards", shards)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {value}; None chooses it.")
    devices = jax.local_devices()
    on_cpu = devices[0].platform == "cpu"
    if is_traced(function, batched, shared):
        shards = 1
    elif shards is None:
        shards = max(len(devices), _SHARDS_PER_CORE * multiprocessing.cpu_count()) if on_cpu else len(devices)
    if block is None:
        block = min(math.ceil(lanes / shards), _fitting(function, batched, shared, shape, devices[0]))
    block = min(lanes, block)
    shards = min(shards, math.ceil(lanes / block))
    cut = _cut(batched, shape, block, shards)
    if shards == 1:
        return _join([_run(function, cut[0], shared)], shape)
    # Dispatched here, so that it is traced and compiled once and not by several threads; it runs meanwhile.
    first = _placed(function, cut[0], shared, devices[0], devices[0])
    with ThreadPoolExecutor(max(len(devices), multiprocessing.cpu_count())) as pool:
        call = lambda k: jax.block_until_ready(_placed(function, cut[k], shared, devices[k % len(devices)], devices[0]))
        return _join([first, *pool.map(call, range(1, shards))], shape)


def _fitting(function, batched, shared, shape: tuple[int, ...], device) -> int:
    """Lanes whose numbers, in and out, fill a share of a device's memory; all of them if it reports none (a CPU)."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return math.prod(shape)
    arrays, rest = eqx.partition((function, batched, shared), eqx.is_array)

    def one_lane(arrays):
        function, batched, shared = eqx.combine(arrays, rest)
        one = jax.tree.map(lambda a: a[0], _cut(batched, shape, 1, 1)[0])
        return one, jax.tree.map(jnp.asarray, eqx.filter(function(one, shared), eqx.is_array))

    lane_bytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(one_lane, arrays)))
    return max(1, int(limit / (_WORKING_COPIES * lane_bytes)))


def _placed(function, rows, shared, device, home) -> Any:
    """Result of a shard, computed on its device and brought home; not waited for."""
    if device is home:
        return _run(function, rows, shared)
    function, rows, shared = (_put(tree, device) for tree in (function, rows, shared))
    return jax.device_put(_run(function, rows, shared), home)


def _put(tree, device):
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, device), rest)


@eqx.filter_jit
def _cut(batched: Any, shape: tuple[int, ...], block: int, shards: int) -> list:
    """Spreads everything over all lanes, cuts it into shards of blocks (the first axis), the last lane filling up."""
    lanes = math.prod(shape)
    blocks = math.ceil(lanes / block / shards)

    def pieces(leaf):
        lead = leaf.shape[: leaf.ndim - len(shape)]
        flat = leaf.reshape(*lead, lanes)
        flat = jnp.pad(flat, [(0, 0)] * len(lead) + [(0, shards * blocks * block - lanes)], mode="edge")
        return jnp.moveaxis(flat.reshape(*lead, shards, blocks, block), (-3, -2), (0, 1))

    pieced = jax.tree.map(pieces, broadcast_batch(batched, shape))
    return [jax.tree.map(lambda a, k=k: a[k], pieced) for k in range(shards)]


@eqx.filter_jit
def _run(function, rows, shared) -> Any:
    """What a shard gives, its lanes last."""
    side_by_side = lambda a: jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], -1)
    return jax.tree.map(side_by_side, lax.map(lambda one: function(one, shared), rows))


@eqx.filter_jit
def _join(parts: list, shape: tuple[int, ...]) -> Any:
    """Shards side by side, without the lanes that filled the last block."""

    def side_by_side(*pieces):
        whole = jnp.concatenate(pieces, axis=-1) if len(pieces) > 1 else pieces[0]
        return whole[..., : math.prod(shape)].reshape(*whole.shape[:-1], *shape)

    return jax.tree.map(side_by_side, *parts)


class _Solve(eqx.Module):
    """The function of a block for `evolve_batch`."""

    method: StaticGrid | Magnus | Adaptive
    pure: bool = eqx.field(static=True)
    kept: tuple[int, ...] = eqx.field(static=True)
    at_end: bool = eqx.field(static=True)
    reduce: Callable[[Solution], Any] | None = eqx.field(static=True)

    def __call__(self, batched, shared) -> Any:
        system, pulses, window, state, save_s = batched
        saves = save_s.number if shared is None else shared
        problem = Problem(system, pulses, window, self.pure, self.kept, saves, state.number)
        solution = solve(problem, window[0].shape, self.method, self.at_end)[0]
        return solution if self.reduce is None else self.reduce(solution)


def evolve_batch(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    *,
    start: str | np.ndarray,
    window_s: tuple,
    save_s=None,
    method: StaticGrid | Magnus | Adaptive | None = None,
    reduce: Callable[[Solution], Any] | None = None,
    block: int | None = None,
    shards: int | None = None,
) -> Any:
    """`evolve` of a batch of any size, block by block; lanes never influence each other.

    Main arguments:
        system, pulses, start, window_s, save_s: as for `evolve`; something must have a batch axis.
        method: `Magnus()` by default.
        reduce: what to keep of the `Solution` of a block, for example its populations: arrays whose last axis is the
            block's lanes. Only this is kept, so that memory grows with it alone. Give the same function object each
            time: another one compiles again. None keeps all.

    Other arguments:
        block: lanes in a block; None takes `BLOCK` on CPU and a whole shard on other devices.
        shards: as for `in_blocks`.

    Returns:
        What `reduce` keeps, with the batch axes last. With `Magnus(precision="single")` the largest population
        difference from double precision is measured on some lanes and printed.

    Raises:
        ValueError: as `evolve`, and without a batch axis.
    """
    method = Magnus() if method is None else method
    problem, shape, method = pose(system, pulses, start=start, window_s=window_s, save_s=save_s, method=method)
    # Save times that all lanes share are kept apart: once a lane they would outweigh all other numbers together.
    apart = math.prod(problem.save_s.shape[1:]) == 1
    save = None if apart else Rows(problem.save_s)
    batched = (problem.system, problem.pulses, problem.window_s, Rows(problem.state), save)
    function = _Solve(method, problem.pure, problem.kept, save_s is None, reduce)
    shared = problem.save_s.reshape(-1) if apart else None
    if block is None and jax.local_devices()[0].platform == "cpu":
        block = BLOCK
    kept = in_blocks(function, batched, shape, shared=shared, block=block, shards=shards)
    if isinstance(method, Magnus) and method.precision == "single" and not is_traced(problem, method):
        print(_single_precision(problem, shape, method, save_s is None))
    return kept


def _single_precision(problem: Problem, shape: tuple[int, ...], method: Magnus, at_end: bool) -> str:
    """Measures single against double precision on lanes spread over the batch."""
    lanes = math.prod(shape)
    chosen = np.unique(np.linspace(0, lanes - 1, min(lanes, _SAMPLE)).astype(int))
    spread = broadcast_batch(problem, shape)
    sample = jax.tree.map(lambda a: a.reshape(*a.shape[: a.ndim - len(shape)], lanes)[..., chosen], spread)
    single, double = (
        solve(sample, chosen.shape, dataclasses.replace(method, precision=precision), at_end)[0].populations
        for precision in ("single", "double")
    )
    error = float(np.nanmax(np.abs(np.asarray(single, float) - np.asarray(double)), initial=0.0))
    return f"single precision: largest population difference {error:.1e} from double, on {chosen.size} of {lanes} lanes"

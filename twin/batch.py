"""Large batches: `evolve` in blocks of lanes that fit the cache, and in shards, one or more for each core or device.

XLA runs a loop over a batch on one core, and streams a large batch through memory at every step. Blocks keep the state
of a step in the cache. Shards are calls of one compiled program from several threads, so that one CPU device may
compute on several cores without forced host devices. A plain jitted function gained 1.8 times so on two free cores; the
gain of this module is not measured yet, for want of a free second core. A wider vector and fast arithmetic
gained nothing.
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
from jaxtyping import Array, Float

from twin.batching import broadcast_batch, is_traced
from twin.dynamics import Adaptive, Magnus, Problem, Solution, StaticGrid, pose, solve
from twin.levels import LevelSystem
from twin.pulses import AbstractPulse

# Lanes in a block: 64 to 160 are within 10 % of each other, larger ones leave the first-level cache.
BLOCK = 128
# More shards than cores: a core that others keep busy then holds up less of the batch.
_SHARDS_PER_CORE = 2
# Lanes on which the error of single precision is measured.
_SAMPLE = 64


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
        shards: parts computed at the same time; None takes two for each core of a CPU, one for each other device.
            Inside `jit` or a derivative there is one.

    Returns:
        What `reduce` keeps, with the batch axes last. With `Magnus(precision="single")` the largest population
        difference from double precision is measured on some lanes and printed.

    Raises:
        ValueError: as `evolve`, and without a batch axis.
    """
    method = Magnus() if method is None else method
    problem, shape, method = pose(system, pulses, start=start, window_s=window_s, save_s=save_s, method=method)
    lanes = math.prod(shape)
    if shape == () or lanes == 0:
        raise ValueError(f"`evolve_batch` needs lanes, but the batch shape is {shape}; use `evolve` for one solution.")
    for name, value in (("block", block), ("shards", shards)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {value}; None chooses it.")
    devices = jax.local_devices()
    on_cpu = devices[0].platform == "cpu"
    if is_traced(problem, method):
        shards = 1
    elif shards is None:
        shards = max(len(devices), _SHARDS_PER_CORE * multiprocessing.cpu_count()) if on_cpu else len(devices)
    block = min(lanes, block or (BLOCK if on_cpu else math.ceil(lanes / shards)))
    shards = min(shards, math.ceil(lanes / block))
    cut = _cut(problem, shape, block, shards)
    if shards == 1:
        parts = [_run(cut[0], method, save_s is None, reduce)]
    else:
        # Dispatched here, so that it is traced and compiled once and not by several threads; it runs meanwhile.
        first = _placed(cut[0], devices, 0, method, save_s is None, reduce)
        with ThreadPoolExecutor(max(len(devices), multiprocessing.cpu_count())) as pool:
            call = lambda k: jax.block_until_ready(_placed(cut[k], devices, k, method, save_s is None, reduce))
            parts = [first, *pool.map(call, range(1, shards))]
    if isinstance(method, Magnus) and method.precision == "single" and not is_traced(problem, method):
        print(_single_precision(problem, shape, method, save_s is None))
    return _join(parts, shape)


def _placed(shard, devices, k: int, method, at_end: bool, reduce):
    """Result of shard k, computed on its device and brought to the first one; not waited for."""
    if len(devices) > 1:
        shard = jax.device_put(shard, devices[k % len(devices)])
    kept = _run(shard, method, at_end, reduce)
    return jax.device_put(kept, devices[0]) if len(devices) > 1 else kept


class _Shard(eqx.Module):
    """Problems of the blocks of a shard: system, pulses, window and save times with blocks along the first axis.

    Save times that all lanes share are kept apart: once a lane they would be larger than all other numbers together.
    """

    rows: tuple
    shared_save_s: Float[Array, "saves"] | None
    pure: bool = eqx.field(static=True)
    kept: tuple[int, ...] = eqx.field(static=True)


@eqx.filter_jit
def _cut(problem: Problem, shape: tuple[int, ...], block: int, shards: int) -> list[_Shard]:
    """Spreads the problem over all lanes, cuts it into shards of blocks, and fills the last with its last lane."""
    lanes = math.prod(shape)
    blocks = math.ceil(lanes / block / shards)
    shared = problem.save_s.reshape(-1) if math.prod(problem.save_s.shape[1:]) == 1 else None
    save_s = None if shared is not None else broadcast_batch(problem.save_s, shape, 1)
    rows = (*broadcast_batch((problem.system, problem.pulses, problem.window_s), shape), save_s, problem.state)

    def pieces(leaf):
        lead = leaf.shape[: leaf.ndim - len(shape)]
        flat = leaf.reshape(*lead, lanes)
        flat = jnp.pad(flat, [(0, 0)] * len(lead) + [(0, shards * blocks * block - lanes)], mode="edge")
        return jnp.moveaxis(flat.reshape(*lead, shards, blocks, block), (-3, -2), (0, 1))

    pieced = jax.tree.map(pieces, rows)
    rows_of = lambda k: jax.tree.map(lambda a: a[k], pieced)
    return [_Shard(rows_of(k), shared, problem.pure, problem.kept) for k in range(shards)]


@eqx.filter_jit
def _run(shard: _Shard, method, at_end: bool, reduce) -> Any:
    """What is kept of a shard, its lanes last."""

    def one(rows):
        system, pulses, window, save_s, state = rows
        saves = shard.shared_save_s if save_s is None else save_s
        problem = Problem(system, pulses, window, shard.pure, shard.kept, saves, state)
        solution = solve(problem, window[0].shape, method, at_end)[0]
        return solution if reduce is None else reduce(solution)

    side_by_side = lambda a: jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], -1)
    return jax.tree.map(side_by_side, lax.map(one, shard.rows))


@eqx.filter_jit
def _join(parts: list, shape: tuple[int, ...]) -> Any:
    """Shards side by side, without the lanes that filled the last block."""

    def side_by_side(*pieces):
        whole = jnp.concatenate(pieces, axis=-1) if len(pieces) > 1 else pieces[0]
        return whole[..., : math.prod(shape)].reshape(*whole.shape[:-1], *shape)

    return jax.tree.map(side_by_side, *parts)


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

"""The one optimization loop of the project: Optax from many starts, each stopping by itself.

Calibration and pulse design both come here. Starts are dealt to groups, one thread a core computes group after group,
and the starts of a group run in `lax.map`, not `vmap`: a start's line search then costs only its own evaluations, and
one start's arrays fit the cache. Both optimizers are one program, because compiling the loss is what a user waits for.
"""

import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# Called as (stage, iterations done, most iterations, best value so far).
Progress = Callable[[str, int, int, float], None]


class Stage(NamedTuple):
    """One optimizer and when to stop it.

    Args:
        optimizer: "adam", or "lbfgs" with a backtracking line search.
        iterations: most iterations a start may take; each is one evaluation of the loss and its gradient.
        tolerance: a start is done when its loss fell by less than this in each of two iterations.
        learning_rate: of Adam, decaying by a cosine to a tenth.
    """

    optimizer: str
    iterations: int
    tolerance: float
    learning_rate: float = 0.1


class Minimum(NamedTuple):
    """Where each start ended.

    Attributes:
        points: shape (starts, parameters). values: losses, shape (starts,); NaN where the loss failed.
        converged: starts that met the tolerance. iterations: taken by each start.
    """

    points: Float[Array, "starts parameters"]
    values: Float[Array, " starts"]
    converged: Bool[Array, " starts"]
    iterations: Int[Array, " starts"]


class _Walker(NamedTuple):
    """Where a start stands, and where it will look next: at `point + scale * move`."""

    point: Float[Array, "*starts parameters"]
    value: Float[Array, "*starts"]
    gradient: Float[Array, "*starts parameters"]
    move: Float[Array, "*starts parameters"]
    scale: Float[Array, "*starts"]
    state: Any
    stalls: Int[Array, "*starts"]
    taken: Int[Array, "*starts"]


# Decrease that a step must reach, as a share of what the slope promises (Armijo).
_DECREASE = 1e-4
# More groups than cores: starts take different times.
_GROUPS_A_CORE = 4
_ADAM = optax.scale_by_adam(b2=0.95)
_LBFGS = optax.scale_by_lbfgs()


class _Rules(NamedTuple):
    """A `Stage` as numbers, so that all stages are one program."""

    adam: Bool[Array, ""]
    iterations: Int[Array, ""]
    tolerance: Float[Array, ""]
    learning_rate: Float[Array, ""]


def minimize(
    loss: Callable[[Float[Array, " parameters"], Any, Any], Float[Array, ""]],
    args: Any,
    starts: Float[Array | np.ndarray, "starts parameters"],
    stage: Stage,
    *,
    each: Any = (),
    active: Bool[np.ndarray, " starts"] | None = None,
    chunk: int = 10,
    on_progress: Callable[[int, Float[np.ndarray, " starts"]], None] | None = None,
    go_on: Callable[[Float[np.ndarray, "starts parameters"]], bool] | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> Minimum:
    """Minimizes `loss(point, args, each_k)` from every start k.

    Args:
        loss: a module-level function (its identity keys the compiled program), differentiable in reverse mode.
        args: its data, a pytree; new values do not recompile.
        starts: initial points, unbounded coordinates.
        active: starts to run (all by default); the others stay where they are, with loss NaN. One number of starts is
            one compiled program, so a stage on the best few keeps the places of all.
        each: further data with a leading axis of starts, one slice for each.
        stage: optimizer and stopping rule.
        chunk: iterations between calls of `on_progress`.
        on_progress: called with the iterations done and the losses.
        go_on: called after that with the points; the search ends when it returns False.
        meanwhile: work for another core while the loss compiles; it is done when this returns.
    """
    running = np.ones(len(starts), bool) if active is None else active
    groups = _deal(running)
    rules = _Rules(
        jnp.asarray(stage.optimizer == "adam"),
        jnp.asarray(stage.iterations),
        jnp.asarray(stage.tolerance, float),
        jnp.asarray(stage.learning_rate, float),
    )
    # A filler is a copy of the first start that does not run.
    everything = jax.tree.map(np.asarray, (starts, each))
    data = [jax.tree.map(lambda a, own=group: jnp.asarray(a[own]), everything) for group in groups]
    runs = [running[group] & (group >= 0) for group in groups]
    walkers = [_begin(points, jnp.asarray(run)) for (points, _), run in zip(data, runs, strict=True)]
    advance = lambda length, k: _advance(loss, rules, jnp.asarray(length), args, data[k][1], walkers[k])
    lowered = _advance.lower(loss, rules, jnp.asarray(0), args, data[0][1], walkers[0])
    with ThreadPoolExecutor(multiprocessing.cpu_count()) as pool, ThreadPoolExecutor(1) as aside:
        # Not before the loss is lowered: Python traces one program at a time.
        other = None if meanwhile is None else aside.submit(meanwhile)
        # Compiled here, so that no two threads compile the same; calls find it.
        lowered.compile()
        for done in range(0, stage.iterations, chunk):
            length = min(chunk, stage.iterations - done)
            run = lambda k, length=length: jax.block_until_ready(advance(length, k))
            moving = [k for k, w in enumerate(walkers) if not _all_finished(w)]
            for k, walker in zip(moving, pool.map(run, moving), strict=True):
                walkers[k] = walker
            if on_progress is not None:
                on_progress(min(done + chunk, stage.iterations), _in_order(walkers, groups).value)
            if go_on is not None and not go_on(_in_order(walkers, groups).point):
                break
            if all(_all_finished(w) for w in walkers):
                break
        if other is not None:
            other.result()
    end = _in_order(walkers, groups)
    return Minimum(*(jnp.asarray(a) for a in (end.point, end.value, np.asarray(end.stalls) >= 2, end.taken)))


def _deal(active: Bool[np.ndarray, " starts"]) -> list[Int[np.ndarray, " group"]]:
    """Groups of equally many starts, active ones spread over them; -1 fills up."""
    count = len(active)
    size = math.ceil(count / (_GROUPS_A_CORE * multiprocessing.cpu_count()))
    number = math.ceil(count / size)
    order = np.concatenate([np.argsort(~active, kind="stable"), np.full(number * size - count, -1)])
    return [order[k::number] for k in range(number)]


def _in_order(walkers: list[_Walker], groups: list[Int[np.ndarray, " group"]]) -> _Walker:
    place = np.concatenate(groups)
    back = np.argsort(place)[np.sum(place < 0) :]
    return jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts])[back], *walkers)


def _all_finished(walker: _Walker) -> bool:
    return bool(jnp.all(_finished(walker)))


def _finished(walker: _Walker) -> Bool[Array, "*starts"]:
    return (walker.stalls >= 2) | jnp.isnan(walker.value)


@eqx.filter_jit
def _begin(starts: Float[Array, "starts parameters"], active: Bool[Array, " starts"]) -> _Walker:
    state = (jax.vmap(_ADAM.init)(starts), jax.vmap(_LBFGS.init)(starts))
    zero, none = jnp.zeros(starts.shape[0], int), jnp.zeros_like(starts)
    value = jnp.where(active, jnp.inf, jnp.nan)
    walkers = _Walker(starts, value, none, none, jnp.ones(starts.shape[0]), state, zero, zero)
    # Weakly typed numbers become strong in the first chunk, and would have the second one compiled again.
    return jax.tree.map(lambda a: jnp.asarray(a, a.dtype), walkers)


def _iterate(loss, rules: _Rules, iterations: Int[Array, ""], args, each, walkers: _Walker) -> _Walker:
    """Some iterations of every start; an iteration is one evaluation, so that the loss is compiled once."""

    def one(walker_and_data) -> _Walker:
        walker, data = walker_and_data

        def step(w: _Walker) -> _Walker:
            trial = w.point + w.scale * w.move
            value, gradient = jax.value_and_grad(loss)(trial, args, data)
            begins = jnp.isinf(w.value)
            stalled = jnp.abs(w.value - value) < rules.tolerance
            stalls = jnp.where(stalled, w.stalls + 1, 0)
            accepted = _accept(rules, w, trial, value, gradient, begins)._replace(stalls=stalls)
            slope = jnp.vdot(w.gradient, w.move)
            lower = value <= w.value + _DECREASE * w.scale * slope
            good = rules.adam | begins | (lower & jnp.all(jnp.isfinite(gradient)))
            # The minimum of the parabola through both values and the slope; a third where there is none.
            bend = value - w.value - w.scale * slope
            best = jnp.where(bend > 0, -0.5 * slope * w.scale / jnp.where(bend > 0, bend, 1.0), 0.3)
            closer = w.scale * jnp.where(jnp.isfinite(value), jnp.clip(best, 0.1, 0.5), 0.3)
            stays = w._replace(scale=closer, stalls=stalls, taken=w.taken + 1)
            return jax.tree.map(lambda a, b: jnp.where(good, a, b), accepted, stays)

        def unfinished(carry):
            i, w = carry
            return (i < iterations) & ~_finished(w)

        return lax.while_loop(unfinished, lambda carry: (carry[0] + 1, step(carry[1])), (0, walker))[1]

    return lax.map(one, (walkers, each))


_advance: Any = eqx.filter_jit(_iterate)


def _accept(rules: _Rules, w: _Walker, trial, value, gradient, begins) -> _Walker:
    """The walker at its trial, with the next move."""
    # Pairs that curve the wrong way spoil the memory of L-BFGS, which then begins anew.
    curved = begins | (jnp.vdot(gradient - w.gradient, w.move) > 0)
    memory = jax.tree.map(lambda old, new: jnp.where(curved, old, new), w.state[1], _LBFGS.init(trial))
    ahead, memory = _LBFGS.update(gradient, memory, trial)
    scaled, moments = _ADAM.update(gradient, w.state[0], trial)
    # The rate of Adam falls by a cosine to a tenth.
    rate = rules.learning_rate * (0.55 + 0.45 * jnp.cos(jnp.pi * jnp.minimum(w.taken / rules.iterations, 1.0)))
    move = -jnp.where(rules.adam, rate * jnp.asarray(scaled), jnp.asarray(ahead))
    return _Walker(trial, value, gradient, move, jnp.ones_like(w.scale), (moments, memory), w.stalls, w.taken + 1)

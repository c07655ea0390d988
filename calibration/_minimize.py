"""The one optimization loop of the project: Optax from many starts, one start after another, each stopping by itself.

Calibration and pulse design both come here. Starts run in `lax.map`, not `vmap`: a start's line search then costs only
its own evaluations, and one start's arrays fit the cache.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
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


@lru_cache
def _optimizer(stage: Stage) -> optax.GradientTransformation:
    if stage.optimizer == "lbfgs":
        return optax.chain(optax.scale_by_lbfgs(), optax.scale(-1.0))
    rate = optax.cosine_decay_schedule(stage.learning_rate, stage.iterations, alpha=0.1)
    return optax.adam(rate, b2=0.95)


def minimize(
    loss: Callable[[Float[Array, " parameters"], Any, Any], Float[Array, ""]],
    args: Any,
    starts: Float[Array, "starts parameters"],
    stage: Stage,
    *,
    each: Any = (),
    active: Bool[Array, " starts"] | None = None,
    chunk: int = 10,
    on_progress: Callable[[int, Float[Array, " starts"]], None] | None = None,
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
    """
    # The tolerance is traced: stages that differ in nothing else are one program.
    tolerance, stage = jnp.asarray(stage.tolerance, float), stage._replace(tolerance=0.0)
    walkers = _begin(stage, starts, jnp.ones(len(starts), bool) if active is None else active)
    for done in range(0, stage.iterations, chunk):
        length = jnp.asarray(min(chunk, stage.iterations - done))
        walkers = _advance(loss, stage, length, tolerance, args, each, walkers)
        if on_progress is not None:
            on_progress(min(done + chunk, stage.iterations), walkers.value)
        if bool(jnp.all(_finished(walkers))):
            break
    return Minimum(walkers.point, walkers.value, walkers.stalls >= 2, walkers.taken)


def _finished(walker: _Walker) -> Bool[Array, "*starts"]:
    return (walker.stalls >= 2) | jnp.isnan(walker.value)


@eqx.filter_jit
def _begin(stage: Stage, starts: Float[Array, "starts parameters"], active: Bool[Array, " starts"]) -> _Walker:
    state = jax.vmap(_optimizer(stage).init)(starts)
    zero, none = jnp.zeros(starts.shape[0], int), jnp.zeros_like(starts)
    value = jnp.where(active, jnp.inf, jnp.nan)
    walkers = _Walker(starts, value, none, none, jnp.ones(starts.shape[0]), state, zero, zero)
    # Weakly typed numbers become strong in the first chunk, and would have the second one compiled again.
    return jax.tree.map(lambda a: jnp.asarray(a, a.dtype), walkers)


@eqx.filter_jit
def _advance(
    loss, stage: Stage, iterations: Int[Array, ""], tolerance: Float[Array, ""], args, each, walkers: _Walker
) -> _Walker:
    """Some iterations of every start; an iteration is one evaluation, so that the loss is compiled once."""
    optimizer = _optimizer(stage)

    def one(walker_and_data) -> _Walker:
        walker, data = walker_and_data

        def step(w: _Walker) -> _Walker:
            trial = w.point + w.scale * w.move
            value, gradient = jax.value_and_grad(loss)(trial, args, data)
            begins = jnp.isinf(w.value)
            stalled = jnp.abs(w.value - value) < tolerance
            stalls = jnp.where(stalled, w.stalls + 1, 0)
            accepted = _accept(optimizer, w, trial, value, gradient, begins)._replace(stalls=stalls)
            if stage.optimizer == "adam":
                return accepted
            slope = jnp.vdot(w.gradient, w.move)
            lower = value <= w.value + _DECREASE * w.scale * slope
            good = begins | (lower & jnp.all(jnp.isfinite(gradient)))
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


def _accept(optimizer, w: _Walker, trial, value, gradient, begins) -> _Walker:
    """The walker at its trial, with the next move."""
    # Pairs that curve the wrong way spoil the memory of L-BFGS, which then begins anew.
    curved = begins | (jnp.vdot(gradient - w.gradient, w.move) > 0)
    fresh = optimizer.init(trial)
    if not isinstance(w.state[0], optax.ScaleByLBFGSState):
        curved = True
    state = jax.tree.map(lambda old, new: jnp.where(curved, old, new), w.state, fresh)
    move, state = optimizer.update(gradient, state, trial)
    return _Walker(trial, value, gradient, move, jnp.ones_like(w.scale), state, w.stalls, w.taken + 1)

"""Levenberg-Marquardt: the fast way to the bottom of a basin, for noise whose likelihood is a sum of squares.

Deviance residuals make least squares the same as maximum likelihood, and their Gauss-Newton matrix the Fisher
information. Optimistix does the steps. One descent is a function for `jit` and `vmap`, so that profiles, bootstraps and
studies of hundreds of tables are batches of it.
"""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from calibration.parameters import with_ion
from calibration.problem import Problem
from twin.planning import forward_mode

STEPS = 25
# A point is an optimum when a Newton step from it would gain less than this, in nats.
_GAIN = 1e-4
# Share of the box within which an edge may have stopped a parameter.
_AT_EDGE = 1e-3
_TOLERANCE = 1e-7


class Descent(NamedTuple):
    """Where each start ended: values in the box, log-likelihood, whether it is an optimum, steps taken."""

    values: Float[Array, "*starts parameters"]
    log_likelihood: Float[Array, "*starts"]
    converged: Bool[Array, "*starts"]
    steps: Int[Array, "*starts"]


def serves(problem: Problem) -> str:
    """Why this method cannot serve; empty if it can."""
    if problem.noise.kind != "binomial":
        return (
            f"Levenberg-Marquardt needs a likelihood that is a sum of squares, which the noise '{problem.noise.kind}' "
            "is not; use the optimizer 'adam+lbfgs'."
        )
    return ""


def descend(problem: Problem, starts: Float[Array, "starts parameters"], rounds: int = 1) -> Descent:
    """From every start to the bottom of its basin.

    Args:
        problem: the question.
        starts: values inside the box.
        rounds: of at most `STEPS` steps each; a start that stands takes no further one.
    """
    one: Any = _jitted_one

    def whole(start) -> Descent:
        found = one(problem, start)
        for _ in range(rounds - 1):
            if bool(found.converged):
                break
            found = one(problem, found.values)._replace(steps=found.steps + STEPS)
        return found

    first = whole(starts[0])  # compiles; the others share the cores
    with ThreadPoolExecutor(multiprocessing.cpu_count()) as pool:
        every = [first, *pool.map(whole, starts[1:])]
    return jax.tree.map(lambda *rows: jnp.stack(rows), *every)


@eqx.filter_jit
def _jitted_one(problem: Problem, start: Float[Array, " parameters"]) -> Descent:
    return descend_one(forward(problem), start)


def forward(problem: Problem) -> Problem:
    """The problem with devices set for forward-mode derivatives."""
    return problem.with_devices(lambda device, _: with_ion(device, forward_mode))


def descend_one(
    problem: Problem,
    start: Float[Array, " parameters"],
    held: Bool[Array, " parameters"] | None = None,
    steps: int = STEPS,
) -> Descent:
    """One start, values inside the box; those that are `held` stay where they are. For use inside jit and vmap.

    Noise that Levenberg-Marquardt cannot serve is minimized by BFGS.
    """
    free = problem.free
    held = jnp.zeros(start.shape, bool) if held is None else held
    place = lambda phi: jnp.where(held, start, free.folded(phi))
    phi = free.unfolded(start)
    if serves(problem):
        quasi = optx.BFGS(rtol=_TOLERANCE, atol=_TOLERANCE)
        loss = lambda phi, _: -problem.log_likelihood(place(phi))
        found = optx.minimise(loss, quasi, phi, max_steps=8 * steps, throw=False)
    else:
        solver = optx.LevenbergMarquardt(rtol=_TOLERANCE, atol=_TOLERANCE)
        residuals = lambda phi, _: problem.deviance_residuals(place(phi))
        found = optx.least_squares(residuals, solver, phi, max_steps=steps, throw=False)
    values = place(found.value)
    value, gain = _still_to_gain(problem, values, held)
    return Descent(values, value, gain < _GAIN, found.stats["num_steps"])


def _still_to_gain(problem: Problem, values: Float[Array, " parameters"], held: Bool[Array, " parameters"]):
    """Log-likelihood, and what a Newton step would add to it; a parameter that an edge stops counts its way there."""
    free = problem.free
    scaled = lambda share: problem.log_likelihood(free.low + free.width * share)
    share = (values - free.low) / free.width
    gradient = jax.jacfwd(scaled)(share)
    to_edge = jnp.where(gradient > 0, 1 - share, share)
    stopped = (to_edge < _AT_EDGE) & ~held
    moving = ~(stopped | held)
    information = free.width[:, None] * problem.information(values) * free.width
    # The variance 1/12 of the uniform prior keeps flat directions from counting as far from done.
    information = jnp.where(moving[:, None] & moving, information, 0.0) + 12 * jnp.eye(values.size)
    slope = jnp.where(moving, gradient, 0.0)
    newton = 0.5 * slope @ jnp.linalg.solve(information, slope)
    return scaled(share), newton + jnp.sum(jnp.where(stopped, jnp.abs(gradient) * to_edge, 0.0))

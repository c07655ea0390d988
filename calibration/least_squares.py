"""Levenberg-Marquardt: the fast way to the bottom of a basin, for noise whose likelihood is a sum of squares.

Deviance residuals make least squares the same as maximum likelihood, and their Gauss-Newton matrix the Fisher
information. Optimistix does the steps.
"""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from calibration.problem import Problem
from twin.planning import forward_mode

STEPS = 25
# A point is an optimum when a Newton step from it would gain less than this, in nats.
_GAIN = 1e-4
_TOLERANCE = 1e-7


class Descent(NamedTuple):
    """Where each start ended: unbounded coordinates, log-likelihood, whether it is an optimum, steps taken."""

    points: Float[Array, "*starts parameters"]
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
    """From every start to the bottom of its basin, in unbounded coordinates.

    Args:
        problem: with plain noise (`serves`).
        starts: initial points.
        rounds: of at most `STEPS` steps each; a start that stands takes no further one.
    """
    one: Any = _jitted_one

    def whole(start) -> Descent:
        found = one(problem, start)
        for _ in range(rounds - 1):
            if bool(found.converged):
                break
            found = one(problem, found.points)._replace(steps=found.steps + STEPS)
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
    return problem.with_devices(lambda device, _: forward_mode(device))


def descend_one(
    problem: Problem,
    start: Float[Array, " parameters"],
    held: Bool[Array, " parameters"] | None = None,
    steps: int = STEPS,
) -> Descent:
    """One start; coordinates that are `held` stay where they are. For use inside jit and vmap."""

    def residuals(u, _):
        return problem.deviance_residuals(problem.free.bounded(u if held is None else jnp.where(held, start, u)))

    solver = optx.LevenbergMarquardt(rtol=_TOLERANCE, atol=_TOLERANCE)
    found = optx.least_squares(residuals, solver, start, max_steps=steps, throw=False)
    r, slope = residuals(found.value, None), jax.jacfwd(residuals)(found.value, None)
    # The prior's own curvature keeps flat directions from counting as far from done.
    information = slope.T @ slope + 3 / jnp.pi**2 * jnp.eye(start.size)
    gradient = slope.T @ r
    gain = 0.5 * gradient @ jnp.linalg.solve(information, gradient)
    value = problem.log_likelihood(problem.free.bounded(found.value))
    return Descent(found.value, value, gain < _GAIN, found.stats["num_steps"])

"""The optimization loop on losses with known minima: every start for itself, every program compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration._minimize import Stage, minimize

ADAM = Stage("adam", iterations=400, tolerance=1e-10, learning_rate=0.3)
LBFGS = Stage("lbfgs", iterations=80, tolerance=1e-12)
STAGES = pytest.mark.parametrize("stage", [ADAM, LBFGS], ids=["adam", "lbfgs"])
# Adam's steps shrink to a tenth and no further: it settles near the bottom, L-BFGS at it.
NEAR = {"adam": 5e-3, "lbfgs": 1e-4}


def quadratic(point, args, each):
    """A bowl at `center + each`, `stretch` times steeper along each axis than along the one before."""
    center, stretch = args
    steepness = stretch ** jnp.arange(point.size)
    return jnp.sum(steepness * (point - center - each) ** 2)


def rosenbrock(point, args, each):
    a, b = args
    x, y = point
    return (a - x) ** 2 + b * (y - x**2) ** 2


def broken_for_some(point, args, each):
    """A bowl; NaN where `each` says so."""
    return jnp.where(each > 0, jnp.nan, jnp.sum((point - args) ** 2))


def beyond_an_edge(point, args, each):
    """`z - log z`, whose minimum is 1; not a number for z <= 0."""
    z = point[0]
    return jnp.where(z > 0, z - jnp.log(jnp.where(z > 0, z, 1.0)), jnp.nan)


def starts(n: int, parameters: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(n).normal(size=(n, parameters)))


@STAGES
def test_every_start_finds_the_bottom_of_a_bowl(stage):
    center = jnp.array([0.7, -1.3, 2.0])
    found = minimize(quadratic, (center, 5.0), starts(4, 3), stage, each=jnp.zeros((4, 3)))
    np.testing.assert_allclose(found.points, jnp.broadcast_to(center, (4, 3)), atol=NEAR[stage.optimizer])
    np.testing.assert_allclose(found.values, 0.0, atol=25 * NEAR[stage.optimizer] ** 2)
    assert bool(jnp.all(found.converged)) or stage is ADAM


def test_the_curved_valley():
    """Rosenbrock's function, minimum 0 at (a, a^2)."""
    found = minimize(rosenbrock, (jnp.array(1.2), jnp.array(100.0)), 2 * starts(5), LBFGS)
    assert bool(jnp.all(found.converged))
    np.testing.assert_allclose(found.points, np.broadcast_to([1.2, 1.44], (5, 2)), atol=1e-4)


def test_each_start_has_its_own_data():
    each = jnp.arange(8.0).reshape(4, 2)
    found = minimize(quadratic, (jnp.zeros(2), 3.0), starts(4), LBFGS, each=each)
    np.testing.assert_allclose(found.points, each, atol=1e-5)


@STAGES
def test_a_failing_start_does_not_touch_the_others(stage):
    center = jnp.array([0.3, 0.4])
    healthy = minimize(broken_for_some, center, starts(4), stage, each=jnp.zeros(4))
    broken = minimize(broken_for_some, center, starts(4), stage, each=jnp.array([0.0, 1.0, 0.0, 0.0]))
    assert np.isnan(broken.values[1])
    assert not bool(broken.converged[1])
    others = np.array([0, 2, 3])
    for name in ("points", "values", "converged", "iterations"):
        np.testing.assert_array_equal(getattr(broken, name)[others], getattr(healthy, name)[others])


def test_a_start_that_is_not_a_number_does_not_touch_the_others():
    points = starts(3)
    healthy = minimize(quadratic, (jnp.zeros(2), 2.0), points, LBFGS, each=jnp.zeros((3, 2)))
    broken = minimize(quadratic, (jnp.zeros(2), 2.0), points.at[0].set(jnp.nan), LBFGS, each=jnp.zeros((3, 2)))
    assert np.isnan(broken.values[0])
    np.testing.assert_array_equal(broken.points[1:], healthy.points[1:])


def test_a_line_search_that_steps_into_the_undefined_comes_back():
    found = minimize(beyond_an_edge, None, jnp.array([[0.02], [0.5], [3.0], [40.0]]), LBFGS)
    assert bool(jnp.all(found.converged))
    np.testing.assert_allclose(found.points[:, 0], 1.0, atol=1e-5)


@STAGES
def test_inactive_starts_stay_where_they_are(stage):
    points = starts(4)
    active = np.array([True, False, True, False])
    found = minimize(quadratic, (jnp.ones(2), 2.0), points, stage, each=jnp.zeros((4, 2)), active=active)
    np.testing.assert_array_equal(found.points[~active], points[~active])
    assert np.all(np.isnan(found.values[~active]))
    assert not np.any(found.converged[~active])
    np.testing.assert_array_equal(found.iterations[~active], 0)
    np.testing.assert_allclose(found.points[active], 1.0, atol=NEAR[stage.optimizer])
    everyone = minimize(quadratic, (jnp.ones(2), 2.0), points, stage, each=jnp.zeros((4, 2)))
    np.testing.assert_array_equal(found.points[active], everyone.points[active])


def test_each_start_stops_by_itself():
    """One begins at the bottom; how long it takes does not depend on its neighbours."""
    points = jnp.array([[1.0, 1.0], [30.0, -20.0]])
    args, each = (jnp.ones(2), 40.0), jnp.zeros((2, 2))
    found = minimize(quadratic, args, points, LBFGS, each=each)
    assert found.iterations[0] < found.iterations[1] < LBFGS.iterations
    swapped = minimize(quadratic, args, points[::-1], LBFGS, each=each)
    np.testing.assert_array_equal(swapped.points[::-1], found.points)
    np.testing.assert_array_equal(swapped.iterations[::-1], found.iterations)


def test_running_out_of_iterations_is_not_convergence():
    stage = LBFGS._replace(iterations=4)
    found = minimize(rosenbrock, (1.0, 100.0), jnp.array([[-1.2, 1.0]]), stage)
    assert not bool(found.converged[0])
    assert int(found.iterations[0]) == 4
    assert float(found.values[0]) > 1e-3


@STAGES
def test_the_loss_reported_is_that_of_the_point(stage):
    args = (jnp.array(1.0), jnp.array(100.0))
    found = minimize(rosenbrock, args, starts(3), stage._replace(iterations=17))
    there = jax.vmap(lambda p: rosenbrock(p, args, ()))(found.points)
    np.testing.assert_allclose(found.values, there, rtol=1e-12)


@STAGES
def test_an_iteration_is_one_evaluation(stage):
    """The loss stands once in each program."""
    traces = []

    def counting(point, args, each):
        traces.append(None)
        return quadratic(point, args, each)

    minimize(counting, (jnp.zeros(2), 3.0), starts(2), stage._replace(iterations=3), each=jnp.zeros((2, 2)))
    assert len(traces) == 1


def test_progress_is_told_after_each_chunk():
    told = []
    stage = LBFGS._replace(iterations=25, tolerance=0.0)
    report = lambda done, losses: told.append((done, float(losses[0])))
    minimize(rosenbrock, (1.0, 100.0), jnp.array([[-1.2, 1.0]]), stage, on_progress=report)
    assert [n for n, _ in told] == [10, 20, 25]
    losses = [v for _, v in told]
    assert losses == sorted(losses, reverse=True)


@STAGES
def test_chunks_do_not_change_the_walk(stage):
    args, points = (1.0, 100.0), starts(2)
    stage = stage._replace(iterations=20, tolerance=0.0)
    one, many = (minimize(rosenbrock, args, points, stage, chunk=chunk) for chunk in (20, 3))
    np.testing.assert_array_equal(one.points, many.points)
    np.testing.assert_array_equal(one.values, many.values)


@STAGES
def test_the_loss_is_traced_in_the_first_chunk_and_never_again(stage):
    """Not by a later chunk, new data, new starts, other numbers of iterations, or another tolerance."""
    traces = 0

    def counting(point, args, each):
        nonlocal traces
        traces += 1
        return quadratic(point, args, each)

    seen = []
    stage = stage._replace(iterations=20, tolerance=0.0)
    args, each = (jnp.zeros(2), jnp.array(3.0)), jnp.zeros((3, 2))
    minimize(counting, args, starts(3), stage, each=each, chunk=7, on_progress=lambda *_: seen.append(traces))
    assert seen[0] > 0
    assert seen == [seen[0]] * 3
    other = (jnp.ones(2), jnp.array(7.0))
    minimize(counting, other, 2 * starts(3), stage._replace(tolerance=1e-6), each=each + 1, chunk=20)
    minimize(counting, other, starts(3), stage, each=each, active=np.array([True, False, True]))
    assert traces == seen[0]

"""Crossed memristors and cascades: closed forms against networks that are played, and against each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from twin import graph, hysteresis
from twin.crossed import CrossedPair, cascade_outputs
from twin.memory import MovingAverage
from twin.memristor import PhotonicMemristor
from twin.network import Network, play

K = 40
# Windows in cycles and phases of B against A, in cycles too, so that its zeros stay on the grid.
CASES = ((10, -10), (10, 10), (20, -10), (15, -3), (10, 0), (6, 13), (20, 0))


@pytest.fixture(scope="module")
def played():
    """Last period of a crossed pair; B leads by `lead` cycles."""

    def once(n, lead):
        k = np.arange(4 * K)
        x_set = np.stack([np.sin(np.pi * k / K) ** 2, np.sin(np.pi * (k + lead) / K) ** 2], axis=1)
        device = PhotonicMemristor(memory=MovingAverage(np.full(2, float(n)), capacity=21), source="model")
        trace = play(Network((device,), graph.crossed()), x_set)
        return {name: np.asarray(getattr(trace, name))[3 * K :] for name in ("x", "r", "y")}

    return once


@pytest.mark.parametrize(("n", "lead"), CASES)
def test_a_played_pair_follows_its_closed_forms(n, lead, played):
    pair = CrossedPair(n / K, 2 * np.pi * lead / K, K)
    found = played(n, lead)
    points = pair.points(2 * np.pi * np.arange(K) / K)
    for which in ("x", "r", "y"):
        for i, node in enumerate("ab"):
            np.testing.assert_allclose(found[which][:, i], points[f"{which}_{node}"], rtol=0, atol=1e-13)
    x_a, x_b, y_a = found["x"][:, 0], found["x"][:, 1], found["y"][:, 0]
    assert hysteresis.signed_area(jnp.array(x_a), jnp.array(y_a)) == pytest.approx(float(pair.intra_area), abs=1e-13)
    assert hysteresis.signed_area(jnp.array(x_b), jnp.array(y_a)) == pytest.approx(float(pair.inter_area), abs=1e-13)


def polygon(pair, points=4000):
    found = pair.points(jnp.arange(points) * (2 * jnp.pi / points))
    return found["x_b"], found["y_a"]


def test_the_continuum_is_the_limit_of_many_cycles():
    coarse, fine = CrossedPair(0.25, -1.0, 4000), CrossedPair(0.25, -1.0)
    for name in ("intra_area", "inter_area", "crossing_x"):
        np.testing.assert_allclose(getattr(coarse, name), getattr(fine, name), atol=1e-3)


@pytest.mark.parametrize(
    ("window", "phase", "expected_crossing"),
    [(0.4, 0.3, True), (0.25, 0.5, True), (0.3, -0.2, False), (0.6, 0.0, False)],
)
def test_width_crossing_and_lobes_are_those_of_the_loop(window, phase, expected_crossing):
    pair = CrossedPair(window, phase)
    assert bool(pair.crosses_itself) == expected_crossing
    x, y = polygon(pair)
    s = np.array([0.4, 1.2, 2.0, 2.8])
    width = hysteresis.branch_width(x, y, (1 - np.cos(s)) / 2)
    np.testing.assert_allclose(width, pair.inter_width(s), atol=1e-5)
    if expected_crossing:
        grid = np.linspace(1e-3, 1 - 1e-3, 2001)
        widths = np.asarray(hysteresis.branch_width(x, y, grid))
        at = grid[np.flatnonzero(np.diff(np.sign(widths)))]
        assert np.min(np.abs(at - float(pair.crossing_x))) < 1e-3
        assert 0 < pair.crossing_x < 1
    else:
        assert np.isnan(pair.crossing_x)
    coarse = polygon(pair, 200)
    lower, upper = (float(a) for a in pair.lobe_areas)
    assert hysteresis.lobe_area(*coarse) == pytest.approx(abs(lower) + abs(upper), abs=2e-4)
    assert lower + upper == pytest.approx(float(pair.inter_area), abs=1e-15)


def test_lobes_of_a_polygon_are_refused():
    with pytest.raises(ValueError, match=r"`cycles_per_period` is 40"):
        _ = CrossedPair(0.4, 0.3, K).lobe_areas


def form(window, phase):
    return hysteresis.form_factor(*polygon(CrossedPair(window, phase)))


def test_form_factors_at_known_windows_and_phases():
    for window, phase, expected in (
        (0.5, -np.pi / 2, 0.95152),
        (0.25, -np.pi / 2, 0.88715),
        (0.01, -np.pi / 2, 0.66940),
    ):
        assert form(window, phase) == pytest.approx(expected, abs=6e-6)


def test_the_largest_form_factor_is_at_negative_phase():
    loss = jax.jit(jax.value_and_grad(lambda v: -form(v[0], v[1])))
    best = minimize(lambda v: [np.asarray(a) for a in loss(v)], [0.4, -1.4], jac=True, tol=1e-12)
    assert -best.fun == pytest.approx(0.9516, abs=1e-4)
    assert -best.fun == pytest.approx(0.951581, abs=1e-6)
    assert best.x[0] == pytest.approx(0.49139, abs=1e-4)
    assert best.x[1] == pytest.approx(-1.56018, abs=1e-4)
    windows, phases = np.meshgrid(np.linspace(0.05, 1.5, 30), np.linspace(-np.pi, np.pi, 40))
    everywhere = jax.jit(jax.vmap(lambda w, p: hysteresis.form_factor(*polygon(CrossedPair(w, p), 200))))
    forms = np.asarray(everywhere(windows.ravel(), phases.ravel())).reshape(windows.shape)
    assert np.max(forms) < 0.9517
    assert np.max(forms[phases > 0]) < 0.9 < np.max(forms[phases < 0])


@pytest.mark.parametrize(("n_a", "n_b"), [(100, 100), (50, 170)])
def test_a_played_cascade_tends_to_its_closed_form(n_a, n_b):
    """Errors of first order in the cycle, taken out by Richardson."""
    errors = []
    for m in (1, 2, 4):
        k = np.arange(4 * 200 * m)
        memory = MovingAverage(np.array([n_a, n_b], float) * m)
        x_set = np.stack([np.sin(np.pi * k / (200 * m)) ** 2, np.zeros(k.size)], axis=1)
        trace = play(Network((PhotonicMemristor(memory=memory, source="model"),), graph.cascade(2)), x_set)
        last = slice(3 * 200 * m, None, m)
        errors.append(np.asarray(trace.y)[last])
    first = [2 * fine - coarse for coarse, fine in itertools.pairwise(errors)]
    limit = (4 * first[1] - first[0]) / 3
    y_a, y_b = cascade_outputs(n_a / 200, n_b / 200, 2 * np.pi * np.arange(200) / 200)
    np.testing.assert_allclose(limit, np.stack([y_a, y_b], axis=1), rtol=0, atol=1e-7)

"""Closed-loop searches: one contract for all, exact toys, a device hidden from its twin, and going on another day."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from scipy.optimize import least_squares

from calibration.closed_loop import AbstractSearch, CmaEs, Round
from calibration.twin_guided import TwinGuided, pulse_model
from experiments import closed_loop_files
from experiments.closed_loop_files import ClosedLoopError

BOXES = {"a": (-1.0, 1.0), "b": (0.0, 4.0)}
START = {"a": 0.8, "b": 1.0}
SLOPES = np.array([[1.0, 0.15], [0.2, 0.4], [0.5, -0.2]])
OFF = np.array([0.3, 0.9, -0.4])


def device(values):
    """Bent, and with residuals that do not all vanish at its optimum."""
    a, b = values
    return SLOPES @ values - OFF + 0.1 * np.array([a**2, a * (b - 2), (b - 2) ** 2])


def twin(values):
    """Straight, and wrong in its slopes by 15 % and in its offsets."""
    return jnp.asarray(SLOPES * np.array([1.15, 0.85])) @ values - jnp.asarray(OFF + np.array([0.1, -0.1, 0.05]))


BEST = least_squares(device, [0.0, 2.0], xtol=1e-14, ftol=1e-14).x
# Every search must pass what follows.
SEARCHES = {
    "twin-guided": lambda: TwinGuided(BOXES, twin, start=START),
    "cma-es": lambda: CmaEs(BOXES, start=START, seed=3),
}
every = pytest.mark.parametrize("name", SEARCHES)


def measured(points, error=0.0, rng=None):
    exact = np.array([device(values) for values in points])
    return exact if rng is None else exact + error * rng.normal(size=exact.shape)


def advance(search: AbstractSearch, rounds: int, error=0.0, seed=0) -> AbstractSearch:
    """Noise of each round has a seed of its own, so that a search may be interrupted."""
    for _ in range(rounds):
        if search.done:
            break
        points = search.ask()
        rng = np.random.default_rng([seed, len(search.history)])
        search.tell(points, measured(points, error, rng if error else None), error)
    return search


# ------------------------------------------------------------------------------------------------ the contract


@every
def test_points_are_within_bounds_and_the_same_until_told(name):
    search = SEARCHES[name]()
    for _ in range(5):
        points = search.ask()
        np.testing.assert_array_equal(search.ask(), points)
        assert points.shape[1] == 2
        assert np.all(points >= search.low) and np.all(points <= search.high)
        advance(search, 1)


@every
def test_a_search_ends_at_the_optimum_of_the_device(name):
    search = advance(SEARCHES[name](), 200)
    assert search.done
    np.testing.assert_allclose(search.best, BEST, atol=1e-4)
    assert search.named(search.best) == {"a": search.best[0], "b": search.best[1]}


@every
def test_noise_leaves_the_optimum_uncertain_and_no_more(name):
    search = advance(SEARCHES[name](), 20, error=0.02)
    assert np.linalg.norm(device(search.best)) < np.linalg.norm(device(BEST)) + 0.01
    assert np.linalg.norm(device(np.array([0.8, 1.0]))) > np.linalg.norm(device(BEST)) + 0.1


@every
def test_an_optimum_outside_the_bounds_is_met_at_them(name):
    boxes = BOXES | {"b": (0.0, 1.5)}
    search = TwinGuided(boxes, twin) if name == "twin-guided" else CmaEs(boxes, seed=1)
    advance(search, 120)
    expected = least_squares(device, [0.0, 1.0], bounds=([-1, 0], [1, 1.5]), xtol=1e-14).x
    assert expected[1] > 1.499
    np.testing.assert_allclose(search.best, expected, atol=2e-3)


@every
def test_saved_and_loaded_in_the_middle_it_ends_the_same(name, tmp_path):
    whole = advance(SEARCHES[name](), 12, error=0.01)
    half = advance(SEARCHES[name](), 5, error=0.01)
    asked = half.ask()
    closed_loop_files.save(tmp_path / "search.json", half)
    again = SEARCHES[name]()
    closed_loop_files.load(tmp_path / "search.json", again)
    np.testing.assert_array_equal(again.ask(), asked)
    advance(again, 12 - len(again.history), error=0.01)
    np.testing.assert_array_equal(again.best, whole.best)
    assert again.done == whole.done and len(again.history) == len(whole.history)


@every
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p, m, e: (p[:, :1], m, e), r"`points` have the shape .* was asked for; tell all of them"),
        (lambda p, m, e: (p + np.array([0.01, 0.0]), m, e), r"`a` of point 0 is .* was asked for; measure there"),
        (lambda p, m, e: (p * np.nan, m, e), "`a` of point 0 is nan"),
        (lambda p, m, e: (p, m[:, :2], e), r"`measured` has the shape \(\d+, 2\), but"),
        (lambda p, m, e: (p, m[0], e), "`measured` has the shape"),
        (lambda p, m, e: (p, m * np.inf, e), "`measured` holds numbers that are not finite"),
        (lambda p, m, e: (p, m, -0.1), "`standard_errors` must be finite and not negative"),
        (lambda p, m, e: (p, m, np.nan), "`standard_errors` must be finite"),
        (lambda p, m, e: (p, m, np.ones(7)), r"`standard_errors` have the shape \(7,\)"),
    ],
)
def test_wrong_tells_are_refused_and_change_nothing(name, spoil, message):
    search = advance(SEARCHES[name](), 1)
    points = search.ask()
    with pytest.raises(ValueError, match=message):
        search.tell(*spoil(points, measured(points), 0.0))
    np.testing.assert_array_equal(search.ask(), points)
    assert len(search.history) == 1


@every
@pytest.mark.parametrize(
    ("boxes", "start", "message"),
    [
        ({}, None, "at least one parameter must be free"),
        ({"a": (1.0, 1.0)}, None, r"bounds of `a` must be finite with low below high, but are \[1, 1\]"),
        (BOXES, {"a": 0.0}, r"`start` names \['a'\], but the bounds name \['a', 'b'\]"),
        (BOXES, {"a": 2.0, "b": 1.0}, r"`start` has a = 2 outside its bounds \[-1, 1\]"),
    ],
)
def test_wrong_boxes_are_refused(name, boxes, start, message):
    make = functools.partial(TwinGuided, model=twin) if name == "twin-guided" else CmaEs
    with pytest.raises(ValueError, match=message):
        make(boxes, start=start)


# ------------------------------------------------------------------------------------------------ each its own


def test_a_straight_device_with_a_true_twin_is_done_in_two_steps():
    straight = lambda values: jnp.asarray(SLOPES) @ values - jnp.asarray(OFF)
    exact = np.linalg.lstsq(SLOPES, OFF, rcond=None)[0]
    search = TwinGuided(BOXES, straight, radius=1.0)
    for _ in range(2):
        points = search.ask()
        search.tell(points, points @ SLOPES.T - OFF, 0.0)
    np.testing.assert_allclose(search.best, exact, atol=1e-7)


def test_the_twins_own_optimum_was_off():
    """The twin's slopes lead to a wrong point too; only the device's own slopes, probed, lead to its optimum."""
    own = least_squares(lambda v: np.asarray(twin(v)), [0.0, 2.0]).x
    assert np.max(np.abs(own - BEST)) > 0.1
    with_offset = least_squares(lambda v: np.asarray(twin(v) - twin(BEST)) + device(BEST), BEST).x
    assert np.max(np.abs(with_offset - BEST)) > 1e-3
    search = advance(SEARCHES["twin-guided"](), 200)
    assert sum(len(told.points) for told in search.history) < 40
    assert "expected gain" in search.done


def test_patience_averages_the_noise_away():
    def error(patience):
        ends = [
            advance(TwinGuided(BOXES, twin, start=START, patience=patience), 200, 0.05, seed).best for seed in range(8)
        ]
        return np.sqrt(np.mean((np.array(ends) - BEST) ** 2))

    assert error(20) < 0.6 * error(1)


def test_values_are_freed_of_what_noise_adds():
    told = Round(np.zeros((1, 1)), np.array([[3.0, 4.0]]), np.array([[1.0, 2.0]]))
    np.testing.assert_allclose(told.values, 25 - 5)


# ------------------------------------------------------------------------------------------------ files


def test_files_of_other_searches_are_refused(tmp_path):
    path = tmp_path / "search.json"
    closed_loop_files.save(path, advance(SEARCHES["cma-es"](), 2))
    for search, message in (
        (TwinGuided(BOXES, twin), "its search is 'CmaEs', but that of this search is 'TwinGuided'"),
        (CmaEs(BOXES, start=START, seed=4), "its settings is .* make the search as it was made"),
        (CmaEs(BOXES | {"b": (0.0, 5.0)}, start=START, seed=3), r"its high is \[1.0, 4.0\]"),
        (advance(SEARCHES["cma-es"](), 1), "has been told 1 rounds already; make a fresh one"),
    ):
        with pytest.raises(ClosedLoopError, match=message):
            closed_loop_files.load(path, search)
    with pytest.raises(ClosedLoopError, match="cannot be read"):
        closed_loop_files.load(tmp_path / "none.json", SEARCHES["cma-es"]())
    content = json.loads(path.read_text())
    content["rounds"][1]["points"][0][0] += 0.1
    path.write_text(json.dumps(content))
    with pytest.raises(ClosedLoopError, match="round 2 does not fit: `a` of point 0"):
        closed_loop_files.load(path, SEARCHES["cma-es"]())
    path.write_text("{}")
    with pytest.raises(ClosedLoopError, match="no file of a search"):
        closed_loop_files.load(path, SEARCHES["cma-es"]())


# ------------------------------------------------------------------------------------------------ a hidden device

PULSES = {"amplitude_1": (0.7, 1.3), "amplitude_2": (0.7, 1.3)}
X, R = (a.ravel() for a in np.meshgrid([0.2, 0.5, 0.9], [0.1, 0.5, 0.8]))
HIDDEN = {"rabi_scale_1": 1.12, "rabi_scale_2": 0.86, "n_bar": 4.0, "eta_1": 0.07, "eta_2": 0.06, "phonon_nodes": 6}
SHOTS, GOAL = 100, 0.02


@functools.cache
def pulses():
    """Residuals of the twin, and of the device, which moves and is otherwise scaled."""
    models = (pulse_model(tables.ion(**changes), PULSES, X, R) for changes in ({"rabi_scale_1": 1.03}, HIDDEN))
    own, hidden = models
    return own, jax.jit(hidden)


def shots_needed(search: AbstractSearch, seed: int) -> float:
    _, hidden = pulses()
    rng, spent = np.random.default_rng(seed), 0
    while spent < 2e5:
        points = search.ask()
        y = np.array([np.asarray(hidden(values)) for values in points]) + (1 - R) * X
        counts = rng.binomial(SHOTS, np.clip(y, 0.0, 1.0))
        share = (counts + 1) / (SHOTS + 2)
        search.tell(points, counts / SHOTS - (1 - R) * X, np.sqrt(share * (1 - share) / SHOTS))
        spent += points.shape[0] * len(X) * SHOTS
        if np.sqrt(np.mean(np.asarray(hidden(search.best)) ** 2)) < GOAL:
            return spent
    return np.inf


def test_the_twins_slopes_save_shots_on_a_hidden_device():
    own, hidden = pulses()
    assert np.sqrt(np.mean(np.asarray(hidden(jnp.array([1 / 1.03, 1.0]))) ** 2)) > 2 * GOAL
    guided = [shots_needed(TwinGuided(PULSES, own), seed) for seed in range(5)]
    blind = [shots_needed(CmaEs(PULSES, seed=seed + 1), seed) for seed in range(5)]
    assert np.median(guided) < 0.5 * np.median(blind)
    assert np.isfinite(np.median(blind))


def test_an_unknown_command_is_refused():
    with pytest.raises(ValueError, match="`rabi_scale_1` is no pulse command; choose among amplitude_1"):
        pulse_model(tables.ion(), {"rabi_scale_1": (0.5, 1.5)}, X, R)

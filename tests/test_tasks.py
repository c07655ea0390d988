"""Tasks: their maps hold step by step, their equations against SciPy, their seeds and their limits."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from experiments import tasks


@pytest.mark.parametrize("name", tasks.SERIES)
def test_every_task_is_a_function_of_its_seed_within_its_limits(name):
    make = tasks.SERIES[name]
    one, same, other = make(3, 400), make(3, 400), make(4, 400)
    np.testing.assert_array_equal(one.inputs, same.inputs)
    np.testing.assert_array_equal(one.targets, same.targets)
    assert not np.array_equal(one.inputs, other.inputs)
    assert one.inputs.shape == one.targets.shape == (400,)
    assert one.scaled.min() >= 0
    assert one.scaled.max() <= 1
    assert np.var(one.targets) > 0


def test_second_order_narma_follows_its_map():
    run = tasks.second_order_narma(0, 500)
    y = run.targets
    following = 0.4 * y[1:-1] + 0.4 * y[1:-1] * y[:-2] + 0.6 * run.inputs[2:] ** 3 + 0.1
    np.testing.assert_allclose(y[2:], following, rtol=1e-14)
    assert y[0] == pytest.approx(0.1 + 0.6 * run.inputs[0] ** 3)
    # Without inputs y rests where y = 0.4 y + 0.4 y^2 + 0.1; with them it stays above.
    assert np.roots([0.4, -0.6, 0.1]).min() == pytest.approx(0.190983006)
    assert y[30:].min() > 0.190983006


def test_its_variance_is_that_of_the_reference():
    variance = np.mean([np.var(tasks.second_order_narma(seed, 1000).targets[20:]) for seed in range(60)])
    assert variance == pytest.approx(6.423e-4, rel=0.02)


def test_narma_10_follows_its_map():
    run = tasks.narma_10(5, 300)
    y, u = run.targets, run.inputs
    for k in range(10, 300):
        expected = 0.3 * y[k - 1] + 0.05 * y[k - 1] * y[k - 10 : k].sum() + 1.5 * u[k - 9] * u[k] + 0.1
        assert y[k] == pytest.approx(expected, rel=1e-13)


def test_a_diverging_narma_10_is_drawn_again(monkeypatch):
    """Larger inputs than the task has make it diverge; the next draw is used."""

    class Draws:
        def __init__(self):
            self.scales = iter((1.0, 0.3))

        def uniform(self, low, high, size):
            return np.full(size, next(self.scales))

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Draws())
    assert tasks.narma_10(0, 200).inputs[0] == 0.3


def test_mackey_glass_against_solutions_interval_by_interval():
    """Within one delay the delayed value is known, so that a plain solver does each interval."""
    history, delay = 1.2, 17.0
    pieces = [lambda t: np.full_like(t, history)]
    start = history
    for k in range(3):
        then = pieces[-1]
        rate = lambda t, x, then=then, k=k: 0.2 * then(t - delay) / (1 + then(t - delay) ** 10) - 0.1 * x
        solution = solve_ivp(
            rate, (k * delay, (k + 1) * delay), [start], method="DOP853", dense_output=True, rtol=1e-11, atol=1e-12
        )
        pieces.append(lambda t, solution=solution: solution.sol(t)[0])
        start = solution.y[0, -1]
    found = tasks.mackey_glass_from(history, 51, step=0.1, delay=delay)
    exact = np.concatenate([pieces[1 + k](np.arange(17 * k, 17 * (k + 1)).astype(float)) for k in range(3)])
    np.testing.assert_allclose(found, exact, atol=2e-8)
    halves = [tasks.mackey_glass_from(history, 51, step=h, delay=delay)[40] for h in (0.2, 0.1, 0.05)]
    assert (halves[0] - halves[1]) / (halves[1] - halves[2]) == pytest.approx(16, rel=0.1)  # fourth order


def test_mackey_glass_is_asked_some_samples_ahead():
    run = tasks.mackey_glass(0, 300, horizon=6)
    np.testing.assert_array_equal(run.targets[:-6], run.inputs[6:])
    with pytest.raises(ValueError, match="`step` must divide 1"):
        tasks.mackey_glass_from(1.0, 10, step=0.3, delay=17.0)


def test_the_laser_pulses_and_is_not_linearly_predictable():
    run = tasks.laser(1, 3000)
    levels = run.inputs
    np.testing.assert_array_equal(run.targets[:-1], levels[1:])
    assert np.all(levels == np.round(levels))
    assert 100 < levels.max() < 255
    spectrum = np.abs(np.fft.rfft(levels - levels.mean())) ** 2
    samples_a_pulse = 3000 / np.argmax(spectrum)
    assert 6.5 < samples_a_pulse < 9.5
    # The best line through this level and the next explains less than half of it.
    assert np.corrcoef(levels[:-1], levels[1:])[0, 1] ** 2 < 0.5


def test_sine_and_square_come_in_whole_periods():
    run = tasks.sine_or_square(0, 800)
    periods = run.inputs.reshape(-1, 8)
    square = run.targets.reshape(-1, 8)
    assert np.all(square == square[:, :1])
    sine = np.sin(2 * np.pi * np.arange(8) / 8)
    np.testing.assert_allclose(periods[square[:, 0] == 0], np.tile(sine, (np.sum(square[:, 0] == 0), 1)), atol=1e-15)
    assert np.all(np.abs(periods[square[:, 0] == 1]) == 1)
    # A sample at the top does not tell.
    at_top = np.isclose(run.inputs, 1.0)
    assert 0.2 < run.targets[at_top].mean() < 1.0


def test_digits_are_all_there_in_another_order():
    pytest.importorskip("sklearn")
    images, labels = tasks.digits(0)
    assert images.shape == (1797, 8, 8)
    assert (images.min(), images.max()) == (0.0, 1.0)
    again, others = tasks.digits(1)
    assert not np.array_equal(labels, others)
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(others))
    assert images.sum() == pytest.approx(again.sum())

"""Feedback kernels against their definition, an exact convolution, and finite differences."""

from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twin.memory import AbstractMemory, Exponential, MovingAverage

# One table, every kernel, one contract. The integer window and the shortest ones are the delicate values.
MEMORIES = {
    "average_1": MovingAverage(1.0),
    "average_1.4": MovingAverage(1.4),
    "average_10": MovingAverage(10.0),
    "average_10.3": MovingAverage(10.3),
    "average_longer_than_record": MovingAverage(512.5),  # floor has no binary digit below the length of the records
    "exponential_1": Exponential(1.0),
    "exponential_6.4": Exponential(6.4),
}
memories = pytest.mark.parametrize("memory", list(MEMORIES.values()), ids=list(MEMORIES))


def inputs(cycles: int, *batch: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(cycles, *batch)))


@eqx.filter_jit
def whole(memory: AbstractMemory, x: jax.Array) -> jax.Array:
    """All cycles at once."""
    return memory.filter(x)


@eqx.filter_jit
def scan(memory: AbstractMemory, state: jax.Array, x: jax.Array) -> jax.Array:
    def cycle(state, x_k):
        return memory.update(state, x_k), memory.read(state)

    return jax.lax.scan(cycle, state, x)[1]


def stream(memory: AbstractMemory, x: jax.Array) -> jax.Array:
    """All cycles through init, read, update."""
    return scan(memory, memory.init(x.shape[1:]), x)


def weights(window: float, lags: int) -> np.ndarray:
    """The definition of the fractional window, written once more in its own way."""
    j = np.arange(1, lags + 1)
    return np.where(window >= j, 1.0, np.where(window >= j - 1, window - (j - 1), 0.0)) / window


# ------------------------------------------------------------------------------------------------ the contract


@memories
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_filter_and_streaming_agree(memory, batch):
    x = inputs(300, *batch)
    np.testing.assert_allclose(whole(memory, x), stream(memory, x), rtol=1e-14, atol=0)


@pytest.mark.parametrize("window", [1.5, 37.0, 900.25])
def test_filter_keeps_its_digits_over_a_long_biased_record(window):
    # The running mean of u = x - 1/2 grows without bound here; a difference of plain cumulative sums fails this.
    x = 0.9 + 0.1 * inputs(5000)
    memory = MovingAverage(window)
    np.testing.assert_allclose(whole(memory, x), stream(memory, x), rtol=1e-14, atol=0)


@memories
def test_first_cycle_sees_the_history_alone(memory):
    assert memory.read(memory.init()) == 0.5
    assert whole(memory, inputs(5))[0] == 0.5


@memories
def test_transfer_is_causal_and_excludes_the_current_input(memory):
    x = inputs(40)
    changed = x.at[25:].set(1.0 - x[25:])
    r, r_changed = whole(memory, x), whole(memory, changed)
    np.testing.assert_array_equal(r[:26], r_changed[:26])
    assert r[26] != r_changed[26]


@memories
def test_transfer_stays_between_zero_and_one(memory):
    x = jnp.asarray(np.random.default_rng(1).integers(0, 2, size=(400, 5)), float)
    r = whole(memory, x)
    assert r.min() >= -1e-15
    assert r.max() <= 1 + 1e-15


@memories
def test_constant_half_stays_half(memory):
    np.testing.assert_array_equal(whole(memory, jnp.full(50, 0.5)), 0.5)


@memories
def test_lanes_do_not_influence_each_other(memory):
    x = inputs(60, 4)
    np.testing.assert_array_equal(whole(memory, x)[:, [0, 1, 3]], whole(memory, x.at[:, 2].set(jnp.nan))[:, [0, 1, 3]])


@memories
def test_empty_record(memory):
    assert whole(memory, inputs(0, 3)).shape == (0, 3)


# ------------------------------------------------------------------------------------------------ moving average


@pytest.mark.parametrize("window", [1.0, 1.75, 4.0, 7.125])
def test_moving_average_is_the_stated_convolution(window):
    x = inputs(30)
    padded = np.concatenate([np.full(40, 0.5), x])
    w = weights(window, 40)
    expected = [w @ padded[40 + k - np.arange(1, 41)] for k in range(30)]
    assert w.sum() == pytest.approx(1.0, abs=1e-15)
    np.testing.assert_allclose(whole(MovingAverage(window), x), expected, rtol=1e-14)


def test_moving_average_in_exact_arithmetic():
    # Dyadic inputs and a window of 5/2: every term is a binary fraction, so the answer is known to the last digit.
    x = [Fraction(n, 8) for n in (1, 7, 3, 8, 0, 5)]
    r_5 = (x[4] + x[3] + x[2] / 2) / Fraction(5, 2)
    r_1 = (x[0] + Fraction(1, 2) + Fraction(1, 4)) / Fraction(5, 2)
    r = whole(MovingAverage(2.5), jnp.asarray([float(v) for v in x]))
    assert r[5] == pytest.approx(float(r_5), rel=1e-16)
    assert r[1] == pytest.approx(float(r_1), rel=1e-16)


def test_nan_input_leaves_the_window_again():
    x = inputs(30).at[5].set(jnp.nan)
    r = whole(MovingAverage(3.5), x)
    np.testing.assert_array_equal(jnp.isnan(r), [6 <= k <= 9 for k in range(30)])
    np.testing.assert_array_equal(jnp.isnan(stream(MovingAverage(3.5), x)), jnp.isnan(r))


@pytest.mark.parametrize("form", ["filter", "stream"])
@pytest.mark.parametrize("kernel", ["average", "exponential"])
def test_derivative_between_integers_is_the_finite_difference(kernel, form):
    x = inputs(60)

    def last(t):
        memory = MovingAverage(t, capacity=20) if kernel == "average" else Exponential(t)
        return (whole(memory, x) if form == "filter" else stream(memory, x))[-1]

    for t in (1.3, 5.5, 12.71):
        h = 1e-5
        difference = float(last(t + h) - last(t - h)) / (2 * h)
        assert jax.grad(last)(t) == pytest.approx(difference, rel=1e-7)


@pytest.mark.parametrize("form", ["filter", "stream"])
@pytest.mark.parametrize("window", [1, 2, 7])
def test_derivative_at_an_integer_window_is_the_right_one(window, form):
    x = inputs(40)

    def last(t):
        memory = MovingAverage(t, capacity=20)
        return (whole(memory, x) if form == "filter" else stream(memory, x))[-1]

    gradient = jax.grad(last)(float(window))
    assert gradient == pytest.approx(float(x[-1 - window - 1] - last(float(window))) / window, rel=1e-12)
    assert gradient == pytest.approx(float(last(window + 1e-6) - last(float(window))) / 1e-6, rel=1e-5)
    assert jax.jacfwd(last)(float(window)) == gradient
    if window > 1:
        left = (last(float(window)) - last(window - 1e-6)) / 1e-6
        assert abs(gradient - left) > 1e-3


@memories
def test_derivative_with_respect_to_the_inputs(memory):
    x, weight = inputs(20), inputs(20, seed=3)
    gradient = jax.grad(lambda v: weight @ whole(memory, v))(x)
    # The kernel is affine in x, so the difference of two values is exact.
    expected = [weight @ (whole(memory, x.at[k].add(1.0)) - whole(memory, x)) for k in range(20)]
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-14)


def test_a_window_for_each_lane():
    x, windows = inputs(80, 3), jnp.array([1.0, 4.4, 70.0])
    for memory in (MovingAverage(windows), MovingAverage(windows[None])):
        lanes = x if memory.window_cycles.ndim == 1 else x[:, None]
        r = whole(memory, lanes).reshape(80, 3)
        for lane, window in enumerate(windows):
            np.testing.assert_allclose(r[:, lane], whole(MovingAverage(window), x[:, lane]), rtol=1e-14)
        np.testing.assert_allclose(stream(memory, lanes).reshape(80, 3), r, rtol=1e-14)
    vmapped = eqx.filter_vmap(lambda t: whole(MovingAverage(t), x[:, 0]))(windows)
    np.testing.assert_allclose(vmapped[1], whole(MovingAverage(windows[1]), x[:, 0]), rtol=1e-14)


def test_steady_state_of_a_sine_input():
    # R_k = 1/2 - S_d cos(w k - lag)/2 is the mean of the n cosines before cycle k, a geometric sum.
    K, n = 40, 10
    k = np.arange(25 * K)
    w = 2 * np.pi / K
    r = whole(MovingAverage(n), jnp.asarray(np.sin(np.pi * k / K) ** 2))
    s_d = np.sin(n * w / 2) / (n * np.sin(w / 2))
    np.testing.assert_allclose(r[n:], (0.5 - 0.5 * s_d * np.cos(w * k - w * (n + 1) / 2))[n:], rtol=0, atol=1e-13)
    assert r[20 * K + 7] == pytest.approx(0.0618294105, abs=1e-8)


# ------------------------------------------------------------------------------------------------ exponential


def test_exponential_is_its_recursion():
    x = inputs(50)
    r, expected = 0.5, []
    for x_k in np.asarray(x):
        expected.append(r)
        r = r + (x_k - r) / 3.7
    np.testing.assert_allclose(whole(Exponential(3.7), x), expected, rtol=1e-14)


def test_exponential_of_one_cycle_is_the_previous_input():
    x = inputs(20)
    np.testing.assert_allclose(whole(Exponential(1.0), x)[1:], x[:-1], rtol=1e-15)
    np.testing.assert_allclose(whole(MovingAverage(1.0), x)[1:], x[:-1], rtol=1e-15)


# ------------------------------------------------------------------------------------------------ refusals and traces


@pytest.mark.parametrize("value", [0.999, 0.0, -3.0, np.nan, np.inf, [4.0, 0.5]], ids=str)
@pytest.mark.parametrize("kernel", [MovingAverage, Exponential])
def test_bad_windows_are_refused_in_a_sentence(kernel, value):
    with pytest.raises(ValueError, match="must be finite and at least one cycle, but is"):
        kernel(jnp.asarray(value))


@pytest.mark.parametrize(
    "kernel", [lambda t: MovingAverage(t, capacity=9), Exponential], ids=["average", "exponential"]
)
def test_traced_bad_windows_are_nan_in_their_lane(kernel):
    x, values = inputs(12), jnp.array([3.5, 0.5, jnp.nan, jnp.inf, -1.0])
    for form in (lambda memory: whole(memory, x), lambda memory: stream(memory, x)):
        r = jax.vmap(lambda t, form=form: form(kernel(t)))(values)
        np.testing.assert_array_equal(jnp.isnan(r).all(axis=1), [False, True, True, True, True])
        assert not jnp.isnan(r[0]).any()


def test_buffer_too_short_for_the_window():
    with pytest.raises(ValueError, match="`capacity` must be at least 8 cycles"):
        MovingAverage(7.0, capacity=7)
    x = inputs(12)
    r = jax.vmap(lambda t: stream(MovingAverage(t, capacity=7), x))(jnp.array([6.9, 7.0]))
    assert not jnp.isnan(r[0]).any()
    assert jnp.isnan(r[1]).all()


def test_streaming_a_traced_window_asks_for_a_capacity():
    with pytest.raises(ValueError, match="`capacity` must be given"):
        jax.jit(lambda t: MovingAverage(t).init())(3.0)
    known = MovingAverage(6.5)
    assert jax.jit(lambda start: known.init((2,)) + start)(0.0).shape == (7, 2)


def test_window_shape_must_fit_the_batch():
    with pytest.raises(ValueError, match="does not broadcast to the batch shape"):
        MovingAverage(jnp.array([2.0, 3.0])).filter(inputs(5))


@pytest.mark.parametrize("kernel", [MovingAverage, Exponential])
def test_a_new_window_does_not_recompile(kernel):
    traces = []

    @eqx.filter_jit
    def run(memory, x):
        traces.append(None)
        return whole(memory, x)

    for window in (2.0, 2.5, 17.3, 900):
        run(kernel(window), inputs(30))
    assert len(traces) == 1

"""The ridge read-out is the exact minimum, its gradient is right, and its ridge is chosen without the test part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.ridge import LinearReadout, Split, chosen_readout, mse, nmse, ridge_path, ridge_readout

RNG = np.random.default_rng(0)
FEATURES = jnp.asarray(RNG.normal(size=(60, 5)) + 3.0)
TARGETS = jnp.asarray(RNG.normal(size=(60, 2)) - 7.0)


def objective(readout: LinearReadout, ridge: float):
    return jnp.sum((readout(FEATURES) - TARGETS) ** 2) + ridge * jnp.sum(readout.weights**2)


@pytest.mark.parametrize("solver", ["qr", "gram"])
@pytest.mark.parametrize("ridge", [0.0, 0.3, 50.0])
def test_the_objective_is_at_rest_in_weights_and_bias(ridge, solver):
    """Its gradient vanishes there, with a bias that carries no penalty."""
    readout = ridge_readout(FEATURES, TARGETS, ridge, solver=solver)
    slope = jax.grad(objective)(readout, ridge)
    assert jnp.max(jnp.abs(slope.weights)) < 1e-10
    assert jnp.max(jnp.abs(slope.bias)) < 1e-10


def test_scikit_learn_finds_the_same():
    linear_model = pytest.importorskip("sklearn.linear_model")
    peer = linear_model.Ridge(alpha=0.7).fit(np.asarray(FEATURES), np.asarray(TARGETS))
    readout = ridge_readout(FEATURES, TARGETS, 0.7)
    np.testing.assert_allclose(readout.weights, peer.coef_.T, rtol=1e-10)
    np.testing.assert_allclose(readout.bias, peer.intercept_, rtol=1e-10)


def test_a_shift_of_the_features_changes_the_bias_alone():
    one, other = (ridge_readout(f, TARGETS, 5.0) for f in (FEATURES, FEATURES + 100.0))
    np.testing.assert_allclose(one.weights, other.weights, rtol=1e-9)
    np.testing.assert_allclose(one(FEATURES), other(FEATURES + 100.0), rtol=1e-9)


def test_qr_keeps_the_digits_that_products_lose():
    """Two features that differ by one part in a hundred million, told apart exactly by their weights."""
    common, own = RNG.normal(size=(2, 200))
    features = jnp.stack([jnp.asarray(common), jnp.asarray(common + 1e-8 * own)], axis=1)
    wanted = jnp.asarray(own)
    assert mse(ridge_readout(features, wanted, 0.0)(features), wanted) < 1e-12
    assert not mse(ridge_readout(features, wanted, 0.0, solver="gram")(features), wanted) < 1e-3


def test_features_that_repeat_have_no_unique_readout_without_a_ridge():
    twice = jnp.concatenate([FEATURES, FEATURES], axis=1)
    assert jnp.all(jnp.isnan(ridge_readout(twice, TARGETS, 0.0).weights))
    halves = ridge_readout(twice, TARGETS, 0.2).weights
    np.testing.assert_allclose(halves[:5], halves[5:], rtol=1e-9)


def test_a_path_is_many_readouts():
    readouts, ridges = ridge_path(FEATURES, TARGETS, jnp.array([1e-6, 1e-2, 1.0]))
    for k, ridge in enumerate(ridges):
        alone = ridge_readout(FEATURES, TARGETS, ridge)
        np.testing.assert_allclose(readouts.weights[k], alone.weights, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(readouts.bias[k], alone.bias, rtol=1e-8)


def test_gradients_go_through_the_solution():
    def loss(stretch):
        features = jnp.tanh(stretch * (FEATURES - 3.0))
        readout = ridge_readout(features[:40], TARGETS[:40, 0], 0.1)
        return nmse(readout(features[40:]), TARGETS[40:, 0])

    step = 1e-5
    difference = (loss(0.8 + step) - loss(0.8 - step)) / (2 * step)
    assert jax.grad(loss)(0.8) == pytest.approx(float(difference), rel=1e-7)


def test_readouts_are_solved_in_batches():
    batch = jnp.stack([FEATURES, FEATURES**2])
    together = jax.vmap(ridge_readout, in_axes=(0, None, None))(batch, TARGETS, 0.1)
    np.testing.assert_allclose(together.weights[1], ridge_readout(FEATURES**2, TARGETS, 0.1).weights, rtol=1e-9)


def test_the_test_part_decides_nothing():
    split = Split(5, 25, 15, 15)
    one = chosen_readout(FEATURES, TARGETS[:, 0], split)
    other = chosen_readout(FEATURES, TARGETS[:, 0].at[45:].set(RNG.normal(size=15)), split)
    assert one.ridge == other.ridge
    np.testing.assert_array_equal(one.readout.weights, other.readout.weights)
    assert one.test != other.test


def test_the_ridge_with_the_smallest_validation_error_is_chosen():
    split, wanted = Split(5, 25, 15, 15), TARGETS[:, 0]
    relative_ridges = jnp.array([1e-8, 1e-2, 1.0, 100.0])
    path, _ = ridge_path(FEATURES[5:30], wanted[5:30], relative_ridges)
    errors = [
        nmse(LinearReadout(w, b)(FEATURES[30:45]), wanted[30:45]) for w, b in zip(path.weights, path.bias, strict=True)
    ]
    chosen = chosen_readout(FEATURES, wanted, split, tuple(relative_ridges.tolist()))
    assert chosen.validation == pytest.approx(float(min(errors)), rel=1e-9)
    best = int(np.argmin(errors))
    _, ridges = ridge_path(FEATURES[5:45], wanted[5:45], relative_ridges)
    assert chosen.ridge == pytest.approx(float(ridges[best]))


def test_parts_of_a_record():
    assert Split(2, 3, 4, 5).parts == (slice(2, 5), slice(5, 9), slice(9, 14))
    Split(2, 3, 4, 5).check(14)
    with pytest.raises(ValueError, match="take 14 steps, but the record has 13"):
        Split(2, 3, 4, 5).check(13)
    with pytest.raises(ValueError, match="at least one step"):
        Split(2, 3, 4, 0).check(13)
    with pytest.raises(ValueError, match="validation part"):
        chosen_readout(FEATURES, TARGETS, Split(2, 3, 0, 5))


def test_measures_of_error():
    targets = jnp.array([[0.0], [1.0], [2.0], [3.0]])
    assert nmse(jnp.full((4, 1), 1.5), targets) == pytest.approx(1.0)
    assert mse(targets + 0.5, targets) == pytest.approx(0.25)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="`ridge` must be zero or positive"):
        ridge_readout(FEATURES, TARGETS, -1.0)
    with pytest.raises(ValueError, match='"qr" or "gram"'):
        ridge_readout(FEATURES, TARGETS, 1.0, solver="svd")
    with pytest.raises(ValueError, match="features have 60 steps, targets 59"):
        ridge_readout(FEATURES, TARGETS[1:], 1.0)

"""Capacities: exact for delay lines and their products, nothing for noise, and never more than there are features."""

import numpy as np
import pytest

from calibration.capacity import capacities, memory_capacity, target, terms_up_to, total_degree
from experiments.tasks import uniform_inputs

INPUTS = uniform_inputs(0, 4000)
WASHOUT = 20


def delayed(*delays: int) -> np.ndarray:
    return np.stack([np.roll(INPUTS, delay) for delay in delays], axis=1)


def test_targets_are_orthonormal():
    """By exact integration over inputs: Gauss-Legendre nodes in place of random ones."""
    nodes, weights = np.polynomial.legendre.leggauss(6)
    a, b = (m.ravel() for m in np.meshgrid(nodes, nodes, indexing="ij"))
    weight = np.outer(weights, weights).ravel() / 4
    terms = terms_up_to((1, 1, 1))
    series = np.stack([a, b], axis=1).ravel()  # a at even steps is the input before b
    values = np.stack([target(series, term, 1)[::2] for term in terms])
    np.testing.assert_allclose((values * weight) @ values.T, np.eye(len(terms)), atol=1e-13)


@pytest.mark.parametrize(("longest", "count"), [((4,), 5), ((4, 4), 5 + 5 + 10), ((2, 2, 2), 3 + 6 + 10)])
def test_every_product_is_there_once(longest, count):
    terms = terms_up_to(longest)
    assert len(terms) == len(set(terms)) == count
    assert max(map(total_degree, terms)) == len(longest)


def test_a_delay_line_has_one_capacity_for_each_tap():
    found = capacities(delayed(0, 3, 7), INPUTS, terms_up_to((10, 5)), washout=WASHOUT)
    np.testing.assert_allclose([found.values[found.terms.index(((d, 1),))] for d in (0, 3, 7)], 1.0, rtol=1e-12)
    assert found.total == pytest.approx(3.0, abs=0.05)  # others reach the threshold by chance at most
    assert found.rank == 3
    assert memory_capacity(delayed(0, 3, 7), INPUTS, 10, washout=WASHOUT) == pytest.approx(2.0, abs=0.02)


def test_a_product_is_of_second_degree():
    product = delayed(1) * delayed(4)
    found = capacities(product, INPUTS, terms_up_to((10, 5)), washout=WASHOUT)
    assert found.of_degree(1) < 0.02
    assert found.of_degree(2) == pytest.approx(1.0, abs=0.02)


def test_noise_has_none():
    noise = np.random.default_rng(1).normal(size=(4000, 30))
    found = capacities(noise, INPUTS, terms_up_to((15, 8, 4)), washout=WASHOUT)
    assert found.total < 2 * found.threshold
    # Without the threshold chance would give about a capacity of 30/4000 to each of the targets.
    assert found.threshold > 30 / 4000


def test_there_is_no_more_than_there_are_features():
    mixed = np.tanh(delayed(*range(12)) @ np.random.default_rng(2).normal(size=(12, 9)))
    found = capacities(mixed, INPUTS, terms_up_to((14, 8, 5)), washout=WASHOUT)
    assert 5.0 < found.total < 9.0 * 1.02


def test_repeated_features_count_once():
    once = capacities(delayed(2), INPUTS, terms_up_to((5,)), washout=WASHOUT)
    twice = capacities(delayed(2, 2), INPUTS, terms_up_to((5,)), washout=WASHOUT)
    assert twice.rank == 1
    np.testing.assert_allclose(twice.values, once.values, atol=1e-12)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least the longest delay, 10 steps, but is 5"):
        capacities(delayed(1), INPUTS, terms_up_to((10,)), washout=5)
    with pytest.raises(ValueError, match="too few for 3 features"):
        capacities(delayed(0, 1, 2)[:25], INPUTS[:25], terms_up_to((10,)), washout=WASHOUT)
    broken = delayed(0, 1)
    broken[[3, 40], 1] = np.nan  # the first of them is washed out
    with pytest.raises(ValueError, match="that of column 1 is not in step 40"):
        capacities(broken, INPUTS, terms_up_to((5,)), washout=WASHOUT)
    for constant in (0.0, 0.3):
        with pytest.raises(ValueError, match="all 2 columns are constant after the washout"):
            capacities(np.full((len(INPUTS), 2), constant), INPUTS, terms_up_to((5,)), washout=WASHOUT)

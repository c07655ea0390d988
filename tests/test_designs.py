"""Designs of a sweep: where the points lie, and that blocks do not move them."""

import numpy as np
import pytest
from scipy.stats import qmc

from experiments import designs
from experiments.schema import Sweep

AXES = {"rabi_scale_1": [0.8, 1.2], "n_bar": [0.0, 9.0], "separation_s": [1e-4, 2e-4]}
DESIGNS = ["grid", "random", "sobol", "latin_hypercube"]


def table(design: str, points: int, **more: object) -> Sweep:
    return Sweep.model_validate({"design": design, "points": points, "parameters": AXES, **more})


def drawn(sweep: Sweep, seed: int = 0, rows: int = 10**6) -> np.ndarray:
    return np.concatenate([values for _, values in designs.blocks(sweep, seed, rows)])


def unit(values: np.ndarray) -> np.ndarray:
    low, high = np.array(list(AXES.values())).T
    return (values - low) / (high - low)


@pytest.mark.parametrize("design", DESIGNS)
def test_blocks_move_no_point(design):
    sweep = table(design, 9 if design == "grid" else 700)
    whole, begins = drawn(sweep), [begin for begin, _ in designs.blocks(sweep, 0, 100)]
    assert begins == list(range(0, designs.size_of(sweep), 100))
    assert whole.shape == (designs.size_of(sweep), 3)
    for rows in (1, 64, 101):
        np.testing.assert_array_equal(drawn(sweep, rows=rows), whole)


@pytest.mark.parametrize("design", DESIGNS[1:])
def test_a_set_is_that_of_its_seed_and_fills_the_box(design):
    sweep = table(design, 1024)
    first, again, other = (drawn(sweep, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.any(first == other)
    assert np.all((unit(first) > -1e-12) & (unit(first) < 1 + 1e-12))
    assert np.all(first <= [0.0 + high for _, high in AXES.values()])
    assert np.max(np.abs(unit(first).mean(axis=0) - 0.5)) < 0.05
    assert np.max(np.abs(np.corrcoef(first.T) - np.eye(3))) < 0.15


def test_a_grid_counts_its_last_parameter_fastest():
    sweep = table("grid", 2, parameters={"n_bar": {"low": 0, "high": 9, "points": 4}, "rabi_scale_1": [0.8, 1.2]})
    found = drawn(sweep)
    np.testing.assert_allclose(found[:, 0], np.repeat([0.0, 3.0, 6.0, 9.0], 2), rtol=1e-15)
    np.testing.assert_allclose(found[:, 1], np.tile([0.8, 1.2], 4), rtol=1e-15)


def test_a_latin_hypercube_has_one_point_in_every_slice_of_every_axis():
    slices = np.floor(unit(drawn(table("latin_hypercube", 500))) * 500 + 1e-9)
    for column in slices.T:
        np.testing.assert_array_equal(np.sort(column), np.arange(500))


def test_a_sobol_set_is_far_more_even_than_random_points():
    discrepancy = {design: qmc.discrepancy(np.clip(unit(drawn(table(design, 512))), 0, 1)) for design in DESIGNS[1:]}
    assert discrepancy["sobol"] < 0.1 * discrepancy["random"]
    assert discrepancy["latin_hypercube"] < discrepancy["random"]


def test_a_sobol_set_of_another_size_than_a_power_of_two_is_remarked():
    assert designs.remark(table("sobol", 1024)) == designs.remark(table("random", 1000)) == ""
    assert "take 512 or 1024" in designs.remark(table("sobol", 1000))

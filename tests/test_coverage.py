"""The study of our own intervals: its counts, its verdicts at their thresholds, and that a killed run goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from scipy.stats import binom

from calibration import coverage
from calibration.posing import pose
from experiments.coverage import _Parts, table

FREE = tables.SCALES | tables.READOUT
TRUTH = jnp.array([tables.TRUTH[name] for name in FREE])


@pytest.fixture(scope="module")
def found() -> coverage.Trials:
    problem = pose(tables.ion(), tables.settings((5.0,), cycles=41), FREE).problem
    return coverage.trials(problem, TRUTH, jax.random.split(jax.random.key(1), 120), profile=True)


def test_intervals_of_the_closed_form_hold_the_truth(found):
    """Feedback of measured inputs included; both methods, four parameters."""
    assert np.mean(found.settled) > 0.98
    rows = coverage.coverages(found, np.asarray(TRUTH), tuple(FREE))
    assert [(row.method, row.parameter) for row in rows] == [(m, n) for m in ("laplace", "profile") for n in FREE]
    assert all(row.holds for row in rows), rows
    # The scatter of the estimates is what their standard errors say.
    z = (np.asarray(found.estimate) - np.asarray(TRUTH)) / np.asarray(found.std)
    np.testing.assert_allclose(np.std(z, axis=0), 1.0, atol=0.25)


def test_intervals_that_are_too_short_are_found_out(found):
    short = found._replace(std=0.5 * found.std, deviance=4 * found.deviance)
    rows = coverage.coverages(short, np.asarray(TRUTH), tuple(FREE))
    assert not any(row.holds for row in rows)
    assert all(row.high < 0.95 for row in rows)


def test_searches_that_did_not_settle_count_against_the_intervals(found):
    none = coverage.coverages(found._replace(settled=jnp.zeros(120, bool)), np.asarray(TRUTH), tuple(FREE))
    assert {row.held for row in none} == {0}


def test_the_interval_of_a_coverage_is_exact():
    """Clopper-Pearson: at its ends, what was counted has the probability that is allowed."""
    row = coverage._counted("a", "laplace", 1890, 2000, 5)
    assert binom.cdf(1890, 2000, row.high) == pytest.approx(1e-3 / 5 / 2, rel=1e-6)
    assert binom.sf(1889, 2000, row.low) == pytest.approx(1e-3 / 5 / 2, rel=1e-6)
    assert coverage._counted("a", "laplace", 2000, 2000, 5).high == 1.0
    assert coverage._counted("a", "laplace", 0, 2000, 5).low == 0.0


@pytest.mark.slow
def test_ranks_of_the_posterior_are_uniform():
    """Forty tables whose truth is drawn from the prior, two parameters that may lean on their bounds."""
    boxes = {"rabi_scale_1": (0.7, 1.3), "readout_error_dark": (0.0, 0.05)}
    problem = pose(tables.ion(), tables.settings((5.0,), cycles=21, shots=100), boxes).problem
    ranks = coverage.ranks(problem, jax.random.split(jax.random.key(2), 40), draws=99, thin=2, warmup=150)
    assert ranks.shape == (40, 2)
    assert np.all((np.asarray(ranks) >= 0) & (np.asarray(ranks) <= 99))
    assert np.all(coverage.uniformity(np.asarray(ranks), 99) > 1e-3)


def test_ranks_that_are_not_uniform_are_found_out():
    rng = np.random.default_rng(0)
    uniform, narrow = rng.integers(0, 100, (200, 50)), np.clip(rng.normal(50, 15, (200, 3)), 0, 99).astype(int)
    p = coverage.uniformity(uniform, 99)
    assert 0.3 < np.mean(p) < 0.7
    assert np.all(coverage.uniformity(narrow, 99) < 1e-4)


def test_finished_blocks_are_not_computed_again(tmp_path):
    """And those of another configuration are."""
    keys, told = jax.random.split(jax.random.key(0), 7), []
    count = lambda block: {"sum": np.arange(len(block)) + len(told)}
    parts = _Parts(tmp_path / "run.parts", "a")

    def killed(block):
        if len(told) >= 2:
            raise KeyboardInterrupt
        told.append(len(block))
        return count(block)

    quiet = lambda what, done, most: None
    with pytest.raises(KeyboardInterrupt):
        parts.computed("tables", killed, keys, 2, quiet)
    assert len(list((tmp_path / "run.parts").iterdir())) == 2
    more = []
    result = parts.computed("tables", lambda block: more.append(1) or count(block), keys, 2, quiet)
    assert len(more) == 2
    assert result["sum"].shape == (7,)
    other = []
    _Parts(tmp_path / "run.parts", "b").computed(
        "tables", lambda block: other.append(1) or count(block), keys, 2, quiet
    )
    assert len(other) == 4
    parts.remove()
    assert not (tmp_path / "run.parts").exists()


def test_table_in_words():
    row = {"parameter": "a", "method": "laplace", "held": 95, "tables": 100, "coverage": 0.95, "low": 0.9, "high": 1.0}
    ranked = {"parameter": "a", "method": "posterior", "tables": 20, "coverage": 0.95, "p_value": 0.25}
    text = table({"rows": [row | {"verdict": "holds"}, ranked | {"verdict": "holds"}]})
    assert "| `a` | laplace | 100 | 0.9500 | 0.9000 to 1.0000 | holds |" in text
    assert "| `a` | posterior | 20 | 0.9500 | p = 0.250 | holds |" in text

"""Tests of the model: uniform p-values where it is right, rejection where it is wrong, and what is said about it."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from scipy import stats

from calibration import checks, predictive
from calibration.checks import LEVEL, TESTS, Layout, check, residual_tests
from calibration.data import synthesize, write_table
from calibration.least_squares import descend_one
from calibration.posing import pose
from experiments.studies import checks as study

ROOT = Path(__file__).parents[1]
BOXES = tables.SCALES | tables.READOUT


def small() -> study.LoopTable:
    return study.design((40, 20), cycles=81)


@eqx.filter_jit
def fitted(problem):
    return descend_one(problem, jnp.array([tables.TRUTH[name] for name in problem.names])).values


def flawed(*, kernel: float = 0.0, leak: float = 0.0) -> study.Leaking:
    """The study's ion with both flaws in one form, so that one compiled program tests them all."""
    return study.Leaking(study.ion(), study.Blend(study.WINDOW, kernel), "measured", leak)


def outcomes(truth):
    case = study.case("of the tests", "", truth, table=small())
    found, converged = study.tested(case, jax.random.split(jax.random.key(4), 200))
    assert bool(jnp.all(converged))
    return found


@pytest.fixture(scope="module")
def right():
    """Tests of 200 tables of the model itself."""
    return outcomes(flawed())


@pytest.fixture(scope="module")
def table():
    """A table of the study's ion, transfers recorded."""
    return synthesize(study.ion(), small(), jax.random.key(2))


@pytest.mark.slow
@pytest.mark.parametrize("test", range(len(TESTS)), ids=TESTS)
def test_p_values_of_the_right_model_are_uniform(right, test):
    assert stats.kstest(np.asarray(right.p)[:, test], "uniform").pvalue > 0.005


@pytest.mark.slow
def test_the_right_model_is_rarely_rejected(right):
    assert np.mean(np.asarray(right.p_value) < LEVEL) <= 0.03
    assert np.all(np.asarray(right.p_value) >= np.min(np.asarray(right.p), axis=1))


@pytest.mark.parametrize(
    "flaw",
    [pytest.param({"kernel": 0.4}, marks=pytest.mark.slow), {"leak": 0.1}],
    ids=["40 % of the kernel", "10 % of s leaks"],
)
def test_wrong_models_are_rejected(flaw):
    assert np.mean(np.asarray(outcomes(flawed(**flaw)).p_value) < LEVEL) >= 0.95


@pytest.mark.slow
def test_the_study_keeps_what_it_promises():
    """100 tables of each wrong model, 300 of the right one, at the strengths that docs/checks.md calls caught."""
    for one in study.cases(quick=True):
        count = study.TABLES_WRONG if one.strength else study.TABLES_RIGHT
        found, _ = study.tested(one, jax.random.split(jax.random.key(1), count))
        rejected = float(jnp.mean(found.p_value < LEVEL))
        print(one.name, one.strength, rejected)
        assert rejected >= 0.95 if one.strength else rejected <= 0.03, one.name


def test_scatter_is_exact_where_counts_are_small():
    """Twelve shots at probabilities of some per cent: the naive law of Pearson's statistic is wrong there."""
    few = study.design((40, 20), cycles=81, shots=12)
    few = tables.changed(few, x_set=0.06 * few.x_set)
    case = study.case("few", "", study.ion(), table=few, boxes={"rabi_scale_1": (0.7, 1.3)})

    def one(key):
        problem = case.model.with_observed(case.truth.simulated(key, case.true_values).observed)
        naive = jnp.sum(problem.residuals(case.start) ** 2)
        return residual_tests(problem, case.layout, case.start).p[0], naive

    p, naive = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 400))
    wrong = stats.chi2(df=len(few) * 2 - 1).sf(np.asarray(naive))
    assert stats.kstest(np.asarray(p), "uniform").pvalue > 1e-3
    assert np.mean(np.asarray(p) < 0.05) < 0.085
    assert np.mean(wrong < 0.05) > 0.12


@pytest.mark.slow
def test_the_shape_does_not_depend_on_where_the_search_ended(table):
    """Neyman's C(alpha): half a standard error beside the optimum, the statistic is the same to second order."""
    problem = pose(study.ion(), table, BOXES).problem
    layout, values = Layout.of(problem, table), fitted(problem)
    std = jnp.sqrt(jnp.diag(jnp.linalg.inv(problem.information(values))))
    jitted = eqx.filter_jit(residual_tests)
    at = lambda v: float(jitted(problem, layout, v).statistic)
    for k in range(len(values)):
        assert abs(at(values + 0.5 * std * jnp.eye(4)[k]) - at(values)) < 0.15
    # The sum of squares, in contrast, must grow, as every optimum is one.
    assert float(jitted(problem, layout, values + 2 * std).scatter) > float(jitted(problem, layout, values).scatter)


def test_shape_is_the_smallest_of_its_kind(table):
    """T of a basis equals the drop of the sum of squares when residuals are regressed on it and on the slopes."""
    problem = pose(study.ion(), table, BOXES).problem
    layout, values = Layout.of(problem, table), fitted(problem)
    found = eqx.filter_jit(residual_tests)(problem, layout, values)
    there = np.asarray(found.there)
    _, variance, _ = problem.cells(values)
    slopes = np.asarray(problem.slopes(values) / jnp.sqrt(variance)[:, None])[there]
    basis = np.asarray(layout.basis(problem, values))[there]
    z = np.asarray(problem.residuals(values))[there]
    left = lambda a: np.sum((z - a @ np.linalg.lstsq(a, z, rcond=None)[0]) ** 2)
    both = np.concatenate([slopes, basis], axis=1)
    dropped = np.linalg.matrix_rank(both) - np.linalg.matrix_rank(slopes) - int(found.freedom)
    # Directions that are nearly the parameters' own are left out, so the regression may explain that much more.
    assert 0 <= dropped <= 3
    assert float(found.statistic) <= left(slopes) - left(both) + 1e-6


def test_findings_say_what_deviates_and_where():
    table = dataclasses.replace(synthesize(study.leaking(0.15), small(), jax.random.key(3)), sha256="")
    problem = pose(study.ion(), table, BOXES).problem
    found = check(problem, table, fitted(problem))
    assert found.rejected
    assert found.sentences[0].startswith("The model is rejected")
    (sentence,) = [s for s in found.sentences if "deviates smoothly" in s]
    assert re.search(r"output y .* branch of loop [AB] at x_set = \d\.\d\d", sentence)
    assert set(found.misfit["loops"]) == {"x", "y"}
    assert found.misfit["loops"]["y"].shape == (len(table),)


def test_a_right_model_is_called_so(table):
    problem = pose(study.ion(), table, BOXES).problem
    found = check(problem, table, fitted(problem))
    assert not found.rejected
    assert found.sentences[0].startswith("Nothing speaks against the model")
    assert len(found.directions) == len(Layout.of(problem, table).directions) <= checks.DIRECTIONS


def test_laser_settings_are_directions_where_they_vary(table):
    apart = tables.changed(table, detuning_2_set_hz=np.where(table.loop == "A", 2e3, 0.0))
    problem = pose(study.ion(), apart, BOXES).problem
    assert ("y", "offset 2") in Layout.of(problem, apart).directions
    assert ("x", "offset 1") not in Layout.of(problem, apart).directions


def test_a_law_of_outliers_is_not_tested(table):
    problem = pose(study.ion(), table, BOXES, noise="student_t").problem
    with pytest.raises(ValueError, match="student_t"):
        check(problem, table, problem.free.middle)


@pytest.mark.slow
def test_held_out_loops_are_predicted_as_expected_or_worse(table):
    problem = pose(study.ion(), table, BOXES).problem
    found = predictive.held_out(problem, table, fitted(problem), draws=100)
    assert [one.name for one in found] == ["loop A", "loop B"]
    assert all(one.p_value > LEVEL and abs(one.z) < 3.5 for one in found)
    # One loop measured on another device: the others cannot predict it.
    other = synthesize(study.ion(rabi_scale_2=1.1), small(), jax.random.key(3))
    mixed = tables.changed(
        table, **{n: np.where(table.loop == "A", getattr(table, n), getattr(other, n)) for n in ("n_x", "n_y", "r_set")}
    )
    problem = pose(study.ion(), mixed, BOXES).problem
    worse = predictive.held_out(problem, mixed, fitted(problem), draws=100)
    assert all(one.z < -4 for one in worse)
    assert "worse than it should be" in worse[1].sentence


def test_one_loop_is_left_out_in_blocks(table):
    one = tables.pieces(table, table.rows("A"))
    problem = pose(study.ion(), one, BOXES).problem
    found = predictive.folds(problem, one)
    assert len(found) == 5
    assert np.all(np.sum([fold.rows[0] for fold in found], axis=0) == 1)


@pytest.mark.slow
def test_area_and_form_belong_to_the_last_period(table):
    problem = pose(study.ion(), table, BOXES).problem
    found = {one.name: one for one in predictive.posterior_predictive(problem, table, fitted(problem), draws=100)}
    x, y = (getattr(table, n)[table.rows("B")][-20:] / 400 for n in ("n_x", "n_y"))
    area = 0.5 * np.sum(y * np.roll(x, -1) - x * np.roll(y, -1))
    assert found["area of loop B"].measured == pytest.approx(area, abs=1e-12)
    assert all(one.p_value > 0.01 for one in found.values())
    assert predictive.period_of(np.array([0.1, 0.5, 0.2, 0.9, 0.3, 0.7])) == 0


def test_the_verb_checks_a_fit(tmp_path, table):
    write_table(table, tmp_path / "loops.csv")
    config = tmp_path / "fit.toml"
    boxes = "\n".join(f"{name} = [{low}, {high}]" for name, (low, high) in BOXES.items())
    config.write_text(
        f'[device]\nengine = "closed_form"\n[data]\ntable = "loops.csv"\n[fit]\nstarts = 2\n[fit.free]\n{boxes}\n'
    )
    assert _ran("fit", config, "--out", tmp_path / "fit").returncode == 0
    done = _ran("check", tmp_path / "fit", "--out", tmp_path / "check", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kind"] == "check" and not result["rejected"]
    assert set(result["tests"]) == set(TESTS)
    assert len(result["held_out"]) == 2
    assert (tmp_path / "check" / "figures" / "shape.svg").is_file()
    assert "Nothing speaks against the model" in (tmp_path / "check" / "report.html").read_text()
    # A check is no fit, so it cannot be checked.
    refused = _ran("check", tmp_path / "check", "--out", tmp_path / "again")
    assert refused.returncode == 2 and "name the folder of a fit" in refused.stderr
    assert not (tmp_path / "again").exists()
    fitted = tmp_path / "fit" / "config.toml"
    fitted.write_text(fitted.read_text().replace("[data.scans]\n", '[data.scans]\nrabi = "rabi.csv"\n'))
    refused = _ran("check", tmp_path / "fit", "--out", tmp_path / "again")
    assert refused.returncode == 2 and "this fit has scans" in refused.stderr


def _ran(*arguments) -> subprocess.CompletedProcess:
    """The program by itself, without the checks of types that the tests switch on."""
    command = [sys.executable, "-m", "experiments", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

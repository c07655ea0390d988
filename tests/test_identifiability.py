"""What data leave open, in words: sentences at their thresholds, and planted degeneracies that must be named."""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from test_demo_data import DEMO

from calibration import identifiability, uncertainty
from calibration.data import read_table, synthesize
from calibration.identifiability import Degeneracy
from calibration.least_squares import descend_one, forward
from calibration.parameters import FreeParameters
from calibration.posing import pose
from calibration.problem import Problem
from twin.memristor import Lindblad

# ------------------------------------------------------------------------------------------------ sentences

THREE = {"rabi_scale_1": (0.5, 1.5), "sigma_1_s": (10e-6, 30e-6), "detuning_2_hz": (-1e3, 1e3)}


def told(cov_in_boxes, values=(1.0, 20e-6, 0.0), boxes=THREE) -> tuple[list[str], list[Degeneracy]]:
    """Sentences and groups of a covariance; a problem without tables, which these spans do not ask about."""
    free = FreeParameters.from_boxes(boxes)
    width = np.asarray(free.width)
    cov = np.asarray(cov_in_boxes) * np.outer(width, width)
    found = uncertainty.estimates(free, np.array(values), cov)
    information = np.linalg.inv(np.asarray(cov_in_boxes)) / np.outer(width, width)
    groups = identifiability.degeneracies(Problem(free, ()), np.array(values), information)
    notes = identifiability.sentences(free, found, cov, groups)
    for note in notes:
        assert note[0].isupper() or note[0] == "`"
        assert note.endswith((".", ".)"))
        assert "nan" not in note
    return notes, groups


def sentences(*arguments, **options) -> list[str]:
    return told(*arguments, **options)[0]


def valley(along, *, length: float = 1.0, width: float = 0.01) -> np.ndarray:
    """Covariance that is long in one direction and narrow in all others."""
    unit = np.asarray(along, float) / np.linalg.norm(along)
    return length**2 * np.outer(unit, unit) + width**2 * (np.eye(len(unit)) - np.outer(unit, unit))


def test_well_determined_parameters_need_no_words():
    assert sentences(np.diag([0.01, 0.02, 0.03]) ** 2) == []


def test_undetermined_and_weak_parameters_are_named():
    notes = sentences(np.diag([0.01, 0.5, 0.1]) ** 2)
    assert len(notes) == 2
    assert re.search(r"do not determine `sigma_1_s`: ", notes[0])
    assert re.search(r"determine `detuning_2_hz` only weakly", notes[1])
    (both,) = sentences(np.diag([1.0, 1.0, 0.01]) ** 2)
    assert "do not determine `rabi_scale_1` and `sigma_1_s`" in both


def test_a_parameter_at_its_bound_is_named():
    (note,) = sentences(np.diag([0.01, 0.02, 0.03]) ** 2, values=(1.4999, 20e-6, 0.0))
    assert "stopped by the prior box at `rabi_scale_1`" in note


def test_a_valley_of_constant_area_is_told_with_its_reason():
    """Width times scale is known to a percent, their ratio is not."""
    notes, (group,) = told(valley([1.0, -1.0, 0.0]))
    assert set(group.names) == {"rabi_scale_1", "sigma_1_s"}
    assert not group.structural
    (note,) = (note for note in notes if "pulse area" in note)
    assert note == group.sentence
    assert note.startswith("`sigma_1_s` and `rabi_scale_1` enter only as a pulse area; fix one, or add a detuned loop")
    # boxes are 1 and 20 us wide: one unit of scale goes with -20 us, and one second with -50,000
    combinations = ("(`rabi_scale_1` + 1, `sigma_1_s` -2e-05 s)", "(`sigma_1_s` + 1 s, `rabi_scale_1` -5e+04)")
    assert any(combination in note for combination in combinations)
    assert "spans 3.9 of the prior box" in note
    assert "more data of this kind separate them slowly" in note
    assert not any("correlation" in other for other in notes), "said once"


def test_a_valley_along_which_the_area_changes_has_another_reason():
    notes, (group,) = told(valley([1.0, 1.0, 0.0]))
    assert "pulse area" not in group.sentence
    assert re.search(r"cannot tell `(rabi_scale_1|sigma_1_s)` and `(rabi_scale_1|sigma_1_s)` apart", group.sentence)
    assert group.sentence in notes


def test_names_of_one_table_are_explained_as_well():
    boxes = {"rabi_scale_1": (0.5, 1.5), "sigma_1_s@monday": (10e-6, 30e-6)}
    _, (group,) = told(valley([1.0, -1.0]), values=(1.0, 20e-6), boxes=boxes)
    assert "`sigma_1_s@monday` and `rabi_scale_1` enter only as a pulse area" in group.sentence


def test_a_narrow_valley_and_a_mild_correlation_are_not_worth_words():
    cov = np.array([[1.0, 0.85, 0.0], [0.85, 1.0, 0.0], [0.0, 0.0, 1.0]]) * 0.02**2
    assert sentences(cov) == []


def test_a_narrow_valley_with_a_strong_correlation_is_mentioned():
    """Known to a tenth of the box, so no group; but they can trade."""
    for sign, words in ((1, "together"), (-1, "in opposite directions")):
        notes, groups = told(valley([1.0, sign, 0.0], length=0.05, width=0.002))
        assert groups == []
        assert notes == [
            f"`rabi_scale_1` and `sigma_1_s` can move {words} at little cost (correlation {sign * 0.9968:+.2f})."
        ]


def test_units_of_a_device_without_them():
    boxes = {"rabi_scale_1": (0.0, 1.0), "rabi_scale_2": (0.0, 1.0)}
    notes, _ = told(np.array([[1.0, -0.999], [-0.999, 1.0]]), values=(0.5, 0.5), boxes=boxes)
    (note,) = (note for note in notes if "cannot tell" in note)
    assert re.search(r"\(`rabi_scale_[12]` \+ 1, `rabi_scale_[12]` -1\)", note)


# ------------------------------------------------------------------------------------------------ planted


@eqx.filter_jit
def _refitted(problem: Problem, truth, keys):
    """Each simulated table fitted again from the truth: optimum and information there."""

    def one(key):
        simulated = forward(problem.simulated(key, truth))
        values = descend_one(simulated, truth).values
        return values, simulated.information(values)

    return jax.lax.map(one, keys)


def found_in(problem: Problem, truth: dict[str, float], studied: int, seed: int = 0) -> list[list[Degeneracy]]:
    """Groups found in each of some simulated tables."""
    at = jnp.array([truth[name] for name in problem.names])
    values, information = map(np.asarray, _refitted(problem, at, jax.random.split(jax.random.key(seed), studied)))
    return [identifiability.degeneracies(problem, v, f) for v, f in zip(values, information, strict=True)]


LOOPS = tables.settings((5.0, 9.0), cycles=43)
TRUTH = tables.TRUTH | {"sigma_1_s": 20.5e-6, "n_bar": 8.0} | dict.fromkeys(("detuning_1_hz", "detuning_2_hz"), 900.0)


def posed(device, settings, *names: str) -> Problem:
    boxes = tables.SCALES | tables.READOUT | {
        "sigma_1_s": (15e-6, 25e-6), "n_bar": (0.0, 20.0), "laser_linewidth_hz": (0.0, 2e3),
        "detuning_1_hz": (-5e3, 5e3), "detuning_2_hz": (-5e3, 5e3),
    }  # fmt: skip
    device = dataclasses.replace(device, **{n: v for n, v in tables.TRUTH.items() if n not in names})
    table = synthesize(device, settings, jax.random.key(0))
    return pose(device, table, {name: boxes[name] for name in names}).problem


@pytest.mark.slow
def test_width_against_rabi_scale_is_an_area_for_any_number_of_shots():
    problem = posed(tables.ion(), LOOPS, "rabi_scale_1", "rabi_scale_2", "sigma_1_s")
    for groups in found_in(problem, TRUTH, 6):
        (group,) = groups
        assert set(group.names) == {"rabi_scale_1", "sigma_1_s"}
        assert group.structural
        assert group.span > 25
        assert "`sigma_1_s` and `rabi_scale_1` enter only as a pulse area" in group.sentence
        assert "add a detuned loop" in group.sentence
        assert "no number of shots would separate them" in group.sentence


@pytest.mark.slow
def test_a_detuned_loop_tells_width_from_rabi_scale():
    """The width of a line is set by the duration alone."""
    offsets = {"detuning_1_set_hz": np.repeat([0.0, 9e3], 21)}
    settings = tables.settings((5.0, 9.0), cycles=21, shots=2000, **offsets)
    device = tables.ion(method=Lindblad(1e-6))
    problem = posed(device, settings, "rabi_scale_1", "sigma_1_s")
    assert found_in(problem, TRUTH, 6) == [[]] * 6


@pytest.mark.slow
def test_phonons_against_rabi_scales():
    """A hot ion looks like a weaker laser; its loop loses a little contrast as well, so more data would help."""
    device = tables.ion(phonon_nodes=8, eta_1=0.06, eta_2=0.06)
    for groups in found_in(posed(device, LOOPS, "rabi_scale_1", "rabi_scale_2", "n_bar"), TRUTH, 6):
        (group,) = groups
        assert set(group.names) == {"n_bar", "rabi_scale_1", "rabi_scale_2"}
        assert not group.structural
        for k in (1, 2):
            assert f"`rabi_scale_{k}` and `n_bar` both scale the Rabi frequency: a hot ion" in group.sentence
            assert group.direction[f"rabi_scale_{k}"] * group.direction["n_bar"] > 0
        assert "more data of this kind separate them slowly" in group.sentence


@pytest.mark.slow
def test_phonons_are_known_where_rabi_scales_are():
    device = tables.ion(phonon_nodes=8, eta_1=0.06, eta_2=0.06)
    assert found_in(posed(device, LOOPS, "n_bar", "readout_error_bright"), TRUTH, 6) == [[]] * 6


@pytest.mark.slow
def test_linewidth_against_readout_on_the_demo():
    """Settings of the demo: what both take from the contrast differs a little, so more data would help."""
    device = tables.ion(method=Lindblad())
    boxes = ("rabi_scale_1", "rabi_scale_2", "detuning_1_hz", "detuning_2_hz", "laser_linewidth_hz")
    problem = posed(device, read_table(DEMO), *boxes, *tables.READOUT)
    for groups in found_in(problem, TRUTH | {"laser_linewidth_hz": 600.0}, 10):
        (group,) = groups
        assert set(group.names) == {"laser_linewidth_hz", "readout_error_dark"}
        assert not group.structural
        assert "`readout_error_dark` and `laser_linewidth_hz` both take contrast from the loop" in group.sentence
        assert "Ramsey scan" in group.sentence
        assert "more data of this kind separate them slowly" in group.sentence


@pytest.mark.slow
@pytest.mark.parametrize("studied", [100])
def test_a_well_posed_question_raises_no_alarm(studied):
    """Settings of the demo without the linewidth."""
    device = tables.ion(method=Lindblad(), laser_linewidth_hz=300.0)
    names = ("rabi_scale_1", "rabi_scale_2", "detuning_1_hz", "detuning_2_hz", "readout_error_bright")
    problem = posed(device, read_table(DEMO), *names)
    alarms = [[group.names for group in groups] for groups in found_in(problem, TRUTH, studied) if groups]
    assert len(alarms) <= studied // 100, alarms


# ------------------------------------------------------------------------------------------------ areas


@pytest.mark.slow
def test_an_area_is_known_where_its_factors_are_not():
    """Value and error of the product as when the width is fixed, though the pair's own covariance is singular."""
    problem = posed(tables.ion(), LOOPS, "rabi_scale_1", "rabi_scale_2", "sigma_1_s")
    alone = posed(tables.ion(), LOOPS, "rabi_scale_1", "rabi_scale_2")
    values = np.array([1.06 / 1.1, 0.95, 1.1 * 20e-6])
    ((name, (area, std)),) = identifiability.areas(
        problem, values, np.asarray(problem.information(jnp.asarray(values)))
    ).items()
    information = np.asarray(alone.information(jnp.array([1.06, 0.95])))
    assert name == "area_scale_1"
    np.testing.assert_allclose(area, 1.06)
    np.testing.assert_allclose(std, np.sqrt(np.linalg.inv(information)[0, 0]), rtol=1e-5)
    assert identifiability.areas(alone, np.array([1.06, 0.95]), information) == {}

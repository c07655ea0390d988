"""The study of reservoirs: fair draws, controls that are what they say, and a table that can be gone on with."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import reproduce_reservoirs as merlin
from experiments.studies import reservoirs as study
from experiments.studies.reservoirs import MODELS, NODES, Setting


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("coupling", [0.0, 0.7])
def test_commands_stay_in_range_whatever_the_inputs(channels, coupling):
    """Smallest and largest command over the corners of the inputs, with outputs of at most 1 coming back."""
    _, weights, bias = study.nodes(Setting(20, coupling), 3, channels)
    low = bias + np.minimum(weights, 0).sum(axis=1)
    high = bias + np.maximum(weights, 0).sum(axis=1) + coupling
    assert low.min() >= -1e-12
    assert high.max() <= 1 + 1e-12
    assert np.any(weights < 0) and np.any(weights > 0)


def test_draws_depend_on_the_seed_alone():
    a, b, c = (study.nodes(Setting(20, 0.3), seed, 1) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a[1], b[1])
    assert not np.array_equal(a[1], c[1])
    assert sorted(a[0]) == sorted(c[0])  # windows are the same, in another order


def test_echo_states_are_those_of_reservoirpy():
    nodes = pytest.importorskip("reservoirpy.nodes")
    inputs = np.random.default_rng(0).uniform(size=(2, 40, 1))
    node = nodes.Reservoir(units=NODES, sr=0.9, lr=1.0, input_scaling=0.4, input_connectivity=1.0, seed=5)
    expected = node.run(np.concatenate([inputs[0], np.ones((40, 1))], axis=1))
    found = study.echo_states(Setting(0.9, 0.4), 5, inputs)
    np.testing.assert_allclose(found[0], expected, atol=1e-13)
    assert not np.allclose(found[1], expected)


def test_exponential_memories_include_the_present_input():
    u = np.random.default_rng(0).uniform(size=(1, 30, 1))
    found = study.features("exponential memory", Setting(10), range(1), u, None)
    np.testing.assert_allclose(found[0, :, 0], u[0, :, 0], rtol=1e-12)  # tau = 1
    state = 0.5
    for value in u[0, :, 0]:
        state += (value - state) / 10
    assert found[0, -1, -1] == pytest.approx(state)


def test_a_device_without_memory_scales_its_input():
    """R stays at 1/2, so that y is half the command."""
    u = np.random.default_rng(0).uniform(size=(2, 30, 1))
    still = study.features("no memory (R = 1/2)", Setting(1), range(2), u, None)
    for k in range(2):
        _, weights, bias = study.nodes(Setting(1), k, 1)
        np.testing.assert_allclose(still[k], (bias + u[k] @ weights.T) / 2, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["no memory (R = 1/2)", "memristors in a ring"])
def test_counts_scatter_about_their_expectation(model):
    """Where nothing that is measured comes back, as a binomial does; features are whole counts over shots."""
    u = np.random.default_rng(0).uniform(size=(2, 30, 1))
    still, counted = (study.features(model, Setting(5, 0.3), range(2), u, shots) for shots in (None, 100))
    np.testing.assert_allclose(counted * 100, np.round(counted * 100), atol=1e-9)
    pulls = (counted - still) / np.sqrt(still * (1 - still) / 100)
    assert np.std(pulls) == pytest.approx(1.0, abs=0.06) if "no" in model else np.std(pulls) > 1.0


def test_settings_are_chosen_by_validation_and_scored_by_test():
    found = [(np.array([1.0, 5.0]), np.array([0.1, 0.2])), (np.array([2.0, 4.0]), np.array([0.3, 0.4]))]
    assert study._best(found) == [0.1, 0.4]
    with pytest.raises(ValueError, match="left its range"):
        study._best([(np.array([np.nan]), np.array([0.1]))])


@pytest.fixture
def counted(monkeypatch):
    """Two tasks whose scores are made up, and how often each was asked for."""
    asked: list[str] = []

    def make(task: str, good: bool):
        def scores(model, shots, seeds):
            asked.append(study.label(task, model, shots))
            worse = list(MODELS).index(model) + (0 if shots is None else 100 / shots)
            return [(1 / (1 + worse) if good else worse) + 0.001 * seed for seed in seeds]

        return scores

    monkeypatch.setattr(study, "TASKS", {"NARMA-10": make("NARMA-10", False), "linear memory": make("l", True)})
    return asked


def test_a_study_goes_on_where_it_stopped(counted, tmp_path):
    study.compute(tmp_path, range(3), ("NARMA-10",))
    assert len(counted) == len(set(counted)) == 11
    done = study.compute(tmp_path, range(3))
    assert len(counted) == 22  # only the other task
    study.compute(tmp_path, range(4))
    assert len(counted) == 44  # other seeds are another study
    kept = json.loads((tmp_path / "scores.json").read_text())
    assert set(kept) == set(done)
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert len(lines) == 23
    assert not list(tmp_path.glob(".partial*"))


def test_the_best_of_a_row_is_bold_and_capacities_are_better_when_larger(counted, tmp_path):
    _, _, first, second = study.table(study.compute(tmp_path, range(3))).splitlines()
    for line, name in ((first, "NARMA-10 (NMSE)"), (second, "linear memory (capacity, larger is better)")):
        fields = [field.strip() for field in line.strip("|").split("|")]
        assert fields[0] == name
        bold = [k for k, field in enumerate(fields) if field.startswith("**")]
        assert bold == [3]  # the first model without shot noise


def test_merlins_memristor_averages_its_own_output():
    """By the recurrence of its program, written out."""
    u = jnp.asarray(np.random.default_rng(0).uniform(0, 0.5, (50, 1)))
    modes = np.asarray(merlin.own_output(jnp.array([4.0]), 1 - u**2))[..., 0]
    np.testing.assert_allclose(modes.sum(axis=1), 1.0, rtol=1e-13)
    np.testing.assert_allclose(modes[:, 0], np.asarray(u[:, 0]) ** 2, atol=1e-15)
    r = 0.5
    for k in range(50):  # R += (p_1 - R)/tau with p_1 = (1 - u^2)(1 - R)
        p = (1 - float(u[k, 0]) ** 2) * (1 - r)
        assert modes[k, 1] == pytest.approx(p, rel=1e-12)
        r += (p - r) / 4.0


def test_the_first_step_of_x4_is_that_of_the_circuit_matrices():
    """By the matrices of Perceval's beam splitter and phase shifter, mode by mode."""
    splitter = np.array([[1, 1j], [1j, 1]]) / np.sqrt(2)
    u, transfer, phase, mixing = 0.6, 0.5, 0.7, 1.1

    def on(modes, matrix):
        whole = np.eye(3, dtype=complex)
        whole[np.ix_(modes, modes)] = matrix
        return whole

    shift = lambda mode, angle: on([mode], np.array([[np.exp(1j * angle)]]))
    encode = on([0, 1], splitter) @ shift(1, 2 * np.arccos(u)) @ on([0, 1], splitter)
    memory = on([1, 2], splitter) @ shift(1, 2 * np.arccos(np.sqrt(transfer))) @ on([1, 2], splitter)
    mix = on([0, 1], splitter) @ shift(1, mixing) @ on([0, 1], splitter)
    circuit = mix @ shift(1, phase) @ memory @ encode
    expected = np.abs(circuit[:, 1]) ** 2
    parameters = {"a": jnp.asarray(0.3), "b": jnp.asarray(0.1), "phase": jnp.asarray(phase)}
    found = merlin.x4_modes(parameters | {"mixing": jnp.asarray(mixing)}, jnp.array([u]))
    np.testing.assert_allclose(found[0], expected, atol=1e-12)

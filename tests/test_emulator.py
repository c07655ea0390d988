"""Emulated devices against the dynamics solved directly: the stated error holds in the box, and nothing outside it."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from test_demo_data import DEMO

from calibration.data import read_table
from calibration.least_squares import forward
from calibration.parameters import with_parameters
from calibration.posing import EMULATION_ERROR, pose
from twin import emulator
from twin.dynamics import StaticGrid
from twin.emulator import EmulatedSeries, EmulationError
from twin.loop import Settings
from twin.memory import MovingAverage
from twin.memristor import IonMemristor, Lindblad, planned, run
from twin.planning import emulated

# The demo's laser offsets, Hz.
OFFSETS = (jnp.array([0.0, 0.0, 3000.0]), jnp.array([-3000.0, 0.0, 0.0]))
ERROR = 1e-6
# Device, box, and how many parameters the tables depend on.
CASES = {
    "demo": ({}, tables.DEMO, 3),
    "v": ({"scheme": "v", "laser_linewidth_1_hz": 100.0}, tables.DEMO, 3),
    "shapes": (
        {},
        {**tables.SCALES, "detuning_1_hz": (-2e3, 2e3), "sigma_1_s": (18e-6, 22e-6), "separation_s": (100e-6, 140e-6)},
        3,
    ),
    "warm": (
        {"phonon_nodes": 8, "eta_1": 0.06, "eta_2": 0.05, "heating_rate_per_s": 50.0},
        # The level m of this scheme never decays, and the memory is no matter of a table.
        {"n_bar": (0.0, 20.0), "detuning_2_hz": (-5e3, 5e3), "m_lifetime_s": (0.01, 1.0), "window_cycles": (2.0, 9.0)},
        2,
    ),
    "nothing": ({}, {**tables.SCALES, **tables.READOUT}, 0),
}


def ion(**parameters) -> IonMemristor:
    return IonMemristor(**({"memory": MovingAverage(5.0)} | parameters))


@functools.cache
def made(case: str) -> IonMemristor:
    parameters, boxes, _ = CASES[case]
    return emulated(ion(**parameters), boxes, Settings(*OFFSETS, jnp.array([0])), error=ERROR)


def points_of(case: str, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values of the box, and each parameter at either end in turn with the others at random ends."""
    rng = np.random.default_rng(seed)
    boxes = {name: box for name, box in CASES[case][1].items() if name != "window_cycles"}
    ends = rng.integers(0, 2, (16, len(boxes)))
    return {
        name: np.concatenate([rng.uniform(*box, count), np.asarray(box)[ends[:, k]]])
        for k, (name, box) in enumerate(boxes.items())
    }


def commands(cycles: int = 12, seed: int = 3):
    """Set points, 0 and 1 among them, and the setting of each cycle."""
    rng = np.random.default_rng(seed)
    x, r = (jnp.asarray(np.concatenate([ends, rng.uniform(0, 1, cycles - 3)])) for ends in ([0, 1, 1.0], [1, 1.0, 0]))
    return x, r, jnp.asarray(np.arange(cycles) % 3)


@eqx.filter_jit
def by_emulator(device, values, x, r, of_cycle, alone):
    """Every device of a list of values, one vmap lane each: responses with the device first."""

    def one(own):
        return with_parameters(device, own).under(Settings(*OFFSETS, of_cycle))(x, r, alone=alone)

    return jax.vmap(one)(values)


def assert_within_the_stated_error(case: str, count: int):
    parameters, boxes, _ = CASES[case]
    values = {name: jnp.asarray(v) for name, v in points_of(case, count).items()}
    x, r, of_cycle = commands()
    method = made(case).method
    assert isinstance(method, EmulatedSeries)
    assert float(method.deviation + method.error_of_tables) <= method.error == ERROR
    box = {name: b for name, b in boxes.items() if name != "window_cycles"}
    direct = planned(ion(method=StaticGrid(1e-10), **parameters), box, detuning_set_hz=3e3)
    direct = dataclasses.replace(direct, **values)
    # Both kinds of run in one batch: one program to compile each.
    alone = jnp.arange(len(x)) < 5
    shape = (len(x), count + 16)
    lanes = [jnp.broadcast_to(a[:, None], shape) for a in (x, r, OFFSETS[0][of_cycle], OFFSETS[1][of_cycle])]
    found = by_emulator(made(case), values, x, r, of_cycle, alone)
    expected = eqx.filter_jit(direct.respond)(*lanes, alone=jnp.broadcast_to(alone[:, None], shape))
    assert bool(jnp.all(found.valid)), case
    assert bool(jnp.all(expected.valid)), case
    error = jnp.abs(jnp.moveaxis(found.populations, 0, -1) - expected.populations)
    assert float(jnp.max(error)) <= ERROR
    assert float(jnp.max(found.error_estimate)) <= ERROR
    np.testing.assert_allclose(jnp.sum(found.populations, axis=1), 1.0, atol=3 * ERROR)


@pytest.mark.parametrize(
    "case", ["demo", *(pytest.param(one, marks=pytest.mark.slow) for one in ("v", "shapes", "warm"))]
)
def test_random_devices_and_corners(case):
    """Against the static grid at a ten-thousandth of the error; some of the values never enter the equations."""
    assert_within_the_stated_error(case, 60)
    method = made(case).method
    assert len(method.names) == CASES[case][2]
    assert method.degrees.shape == (len(method.degrees), CASES[case][2])


def test_a_box_without_dynamics_is_one_term():
    """Nothing in it enters the equations of motion; the emulator of the lines, tested above, says the same."""
    method = made("nothing").method
    assert method.degrees.shape == (1, 0)
    assert method.points < 20
    x, r, of_cycle = commands()
    values = {"rabi_scale_1": jnp.array([0.7, 1.1, 1.3]), "rabi_scale_2": jnp.array([1.3, 0.9, 0.7])}
    one, other = (by_emulator(made(c), values, x, r, of_cycle, jnp.arange(12) < 5) for c in ("nothing", "demo"))
    assert bool(jnp.all(one.valid & other.valid))
    np.testing.assert_allclose(one.populations, other.populations, rtol=0, atol=2 * ERROR)


def test_a_parameter_without_influence_does_not_cost_terms():
    method = made("warm").method
    k = method.names.index("m_lifetime_s")
    assert int(np.max(np.asarray(method.degrees)[:, k])) <= 1


def test_mixed_runs_are_those_of_either_kind():
    x, r, of_cycle = commands()
    alone = jnp.arange(12) % 2 == 0
    respond = made("demo").under(Settings(*OFFSETS, of_cycle))
    mixed, first, both = (respond(x, r, alone=a).populations for a in (alone, True, False))
    np.testing.assert_array_equal(mixed, jnp.where(alone, first, both))


# ------------------------------------------------------------------------------------------------ where it ends


@pytest.mark.parametrize("name", [*tables.LINES])
def test_outside_the_box_there_is_no_answer(name):
    x, r, of_cycle = commands()
    low, high = tables.LINES[name]
    for value in (low - 1e-3 * (high - low), high + 1e-3 * (high - low)):
        if name == "laser_linewidth_hz" and value < 0:
            continue
        for alone in (True, False):
            beyond = dataclasses.replace(made("demo"), **{name: value})
            found = beyond.under(Settings(*OFFSETS, of_cycle))(x, r, alone=alone)
            assert not bool(jnp.any(found.valid)), (name, value)
            assert bool(jnp.all(jnp.isnan(found.populations)))
    for value in (low, high):
        at = dataclasses.replace(made("demo"), **{name: value})
        assert bool(jnp.all(at.under(Settings(*OFFSETS, of_cycle))(x, r, alone=False).valid))


def test_areas_beyond_those_of_the_box_have_no_answer():
    """A scale outside its box is no matter of its own: only what it makes of the areas is."""
    x, r, of_cycle = jnp.array([1.0, 0.3]), jnp.array([0.3, 1.0]), jnp.array([0, 1])
    strong = dataclasses.replace(made("demo"), rabi_scale_1=1.31)
    respond = strong.under(Settings(*OFFSETS, of_cycle))
    np.testing.assert_array_equal(respond(x, r, alone=True).valid, [False, True])
    np.testing.assert_array_equal(respond(x, r, alone=False).valid, [False, True])
    second = dataclasses.replace(made("demo"), rabi_scale_2=1.31).under(Settings(*OFFSETS, of_cycle))
    np.testing.assert_array_equal(second(x, r, alone=False).valid, [True, False])
    np.testing.assert_array_equal(second(x, r, alone=True).valid, [True, True])
    assert bool(jnp.all(jnp.isnan(respond(x, r, alone=False).populations[:, 0])))


def test_lanes_outside_do_not_touch_their_neighbours():
    x, r, of_cycle = commands()
    values = {"detuning_1_hz": jnp.array([100.0, 6e3, -400.0])}
    found = by_emulator(made("demo"), values, x, r, of_cycle, False)
    np.testing.assert_array_equal(jnp.all(found.valid, axis=1), [True, False, True])
    alone = by_emulator(made("demo"), {"detuning_1_hz": values["detuning_1_hz"][::2]}, x, r, of_cycle, False)
    np.testing.assert_allclose(found.populations[::2], alone.populations, rtol=0, atol=1e-15)


def test_other_laser_offsets_are_refused_or_invalid():
    x, r, of_cycle = commands()
    device = made("demo")
    # Another number of offsets shows in the shapes; other values do only when they are known.
    with pytest.raises(ValueError, match="emulated for laser offsets of shape"):
        device.under(Settings(OFFSETS[0][:2], OFFSETS[1][:2], of_cycle % 2))(x, r, alone=False)
    with pytest.raises(ValueError, match="emulated for laser offsets of shape"):
        run(device, x, r)
    with pytest.raises(ValueError, match="emulated for laser offsets of shape"):
        device.respond(x[0], r[0], jnp.zeros(()), jnp.zeros(()), alone=False)
    moved = Settings(OFFSETS[0].at[1].add(1.0), OFFSETS[1], of_cycle)
    found = device.under(moved)(x, r, alone=False)
    np.testing.assert_array_equal(found.valid, of_cycle != 1)
    assert bool(jnp.all(jnp.isnan(found.populations[:, of_cycle == 1])))
    assert bool(jnp.all(jnp.isfinite(found.populations[:, of_cycle != 1])))


def test_cycles_with_offsets_of_their_own():
    """Without `of_cycle` offsets belong to the cycles in order; those it was made for are answered."""
    x, r, _ = commands(3)
    device = made("demo")
    found = device.respond(x, r, *OFFSETS, alone=False)
    expected = device.under(Settings(*OFFSETS, jnp.arange(3)))(x, r, alone=False)
    np.testing.assert_array_equal(found.populations, expected.populations)
    assert bool(jnp.all(found.valid))


def test_coherence_is_not_claimed():
    x, r, of_cycle = commands()
    for alone in (True, False):
        found = made("demo").under(Settings(*OFFSETS, of_cycle))(x, r, alone=alone)
        assert found.coherence_vs.shape == (2, 12)
        assert bool(jnp.all(jnp.isnan(found.coherence_vs)))
        assert found.method == "emulated series"


def test_a_box_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(emulator, "_LARGEST_TERMS", 20)
    with pytest.raises(EmulationError, match=r"more than 20 terms in 3 parameters .* 1e-06; narrow the boxes"):
        emulated(ion(), tables.DEMO, Settings(*OFFSETS, jnp.array([0])), error=ERROR)


# ------------------------------------------------------------------------------------------------ in a calibration


def every_eighth():
    """Every eighth cycle of each loop of the demo."""
    table = read_table(DEMO)
    return tables.pieces(table, np.flatnonzero(table.cycle % 8 == 0))


@functools.cache
def posed():
    """The question of the demo, its seven free parameters, for fewer cycles."""
    return pose(ion(method=Lindblad(1e-9)), every_eighth(), tables.DEMO)


VALUES = jnp.array([1.02, 0.97, 900.0, -600.0, 500.0, 0.011, 0.018])


def test_gradients_are_those_of_finite_differences_and_of_the_dynamics():
    problem, reference = posed().problem, posed().reference
    assert problem.names == tuple(tables.DEMO)
    at = eqx.filter_jit(lambda problem, v: problem.log_likelihood(v))
    slope = np.asarray(eqx.filter_jit(jax.grad(lambda v, p: p.log_likelihood(v)))(VALUES, problem))
    for k, width in enumerate(np.asarray(problem.free.width)):
        h = 1e-3 * width
        f = [float(at(problem, VALUES.at[k].add(m * h))) for m in (-3, -2, -1, 1, 2, 3)]
        expected = (-f[0] + 9 * f[1] - 45 * f[2] + 45 * f[3] - 9 * f[4] + f[5]) / (60 * h)
        np.testing.assert_allclose(slope[k], expected, rtol=1e-6)
    # Forward through the dynamics along a few directions, in standard errors: what the error means for an estimate.
    std = np.sqrt(np.diag(np.linalg.inv(eqx.filter_jit(lambda p: p.information(VALUES))(problem))))
    along = eqx.filter_jit(lambda p, v: jax.jvp(forward(p).log_likelihood, (VALUES,), (v,)))
    for direction in np.random.default_rng(0).normal(size=(4, 7)) * std:
        value, expected = along(reference, jnp.asarray(direction))
        np.testing.assert_allclose(slope @ direction, expected, rtol=0, atol=2e-3)
        np.testing.assert_allclose(at(problem, VALUES), value, rtol=0, atol=1e-3)
        np.testing.assert_allclose(slope @ direction, along(problem, jnp.asarray(direction))[1], rtol=1e-9)


def test_lanes_of_a_batch_are_those_alone():
    problem = posed().problem
    points = problem.free.draw(jax.random.key(2), 5)
    at = eqx.filter_jit(lambda problem, v: problem.log_likelihood(v))
    batch = eqx.filter_jit(lambda problem, v: jax.vmap(problem.log_likelihood)(v))(problem, points)
    np.testing.assert_allclose(batch, [at(problem, p) for p in points], rtol=1e-12)


def test_new_values_boxes_and_counts_do_not_retrace():
    """An emulator is arrays: another one of the same sizes is evaluated by the same program."""
    traces = 0

    @eqx.filter_jit
    def evaluate(problem, values):
        nonlocal traces
        traces += 1
        return problem.log_likelihood(values)

    problem = posed().problem
    found = {float(evaluate(problem, VALUES)), float(evaluate(problem, 0.99 * VALUES))}
    other = [[jnp.roll(v, 1) for v in part] for part in problem.observed]
    found.add(float(evaluate(problem.with_observed(other), VALUES)))
    shifted = problem.with_devices(lambda device, _: dataclasses.replace(device, lead_s=99e-6, amplitude_1=0.99))
    found.add(float(evaluate(shifted, VALUES)))
    assert traces == 1
    assert len(found) == 4
    assert all(np.isfinite([*found]))


def test_the_emulator_is_made_for_what_a_fit_needs():
    method = posed().problem.parts[0].device.method
    assert isinstance(method, EmulatedSeries)
    assert method.error == EMULATION_ERROR
    assert posed().notes == []
    assert not isinstance(posed().reference.parts[0].device.method, EmulatedSeries)


def test_a_fit_without_an_emulator_says_so_and_goes_on(monkeypatch):
    """Boxes that no polynomial serves: the dynamics are integrated at every step of the search, and a note tells."""
    monkeypatch.setattr(emulator, "_LARGEST_TERMS", 20)
    found = pose(ion(method=Lindblad(1e-9)), every_eighth(), tables.DEMO)
    (note,) = found.notes
    assert note.startswith("The dynamics were integrated anew at every step of the search: ")
    assert found.problem is found.reference

"""Tracking: what is flagged and when, what is not, and which tables are called bad."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

from calibration import bad_data, drift
from calibration.data import LoopTable, synthesize
from calibration.drift import Reference, Tracker
from calibration.parameters import with_parameters
from calibration.posing import pose
from calibration.problem import Problem

FREE = tables.SCALES | tables.READOUT
NAMES = tuple(FREE)
TRUTH = np.array([tables.TRUTH[name] for name in NAMES])
SETTINGS = tables.settings((5.0, 9.0), cycles=41, shots=400)
CALIBRATED_WITH = 3  # loops


@functools.cache
def template() -> tuple[LoopTable, Problem]:
    table = recorded(0)
    return table, pose(tables.ion(), table, FREE).problem


@functools.cache
def information() -> np.ndarray:
    return np.asarray(template()[1].information(jnp.asarray(TRUTH)))


LAID = drift.threshold


@functools.cache
def usual_threshold() -> float:
    return LAID(reference().information, information())


@pytest.fixture(autouse=True)
def _laid_once(monkeypatch):
    """References here differ in their mean alone; their thresholds differ by less than the grid of levels."""
    monkeypatch.setattr(drift, "threshold", lambda *_: usual_threshold())


def errors() -> np.ndarray:
    """Standard errors of one loop's own estimate."""
    return np.sqrt(np.diag(np.linalg.inv(information())))


def reference(seed: int | None = None) -> Reference:
    """What a calibration with a few loops would have found; without a seed, the truth."""
    cov = np.linalg.inv(CALIBRATED_WITH * information())
    mean = TRUTH if seed is None else np.random.default_rng(seed).multivariate_normal(TRUTH, cov)
    return Reference(NAMES, mean, cov, FREE)


@functools.cache
def drawn():
    """Compiled once: counts of a device with some values, under one table's settings."""
    problem = template()[1]
    return jax.jit(lambda key, values: problem.simulated(key, values).observed)


def watched(tracker: Tracker, path, seed: int, loops: int):
    """Steps of a stream whose device has the values `path(loop)`."""
    table, problem = template()
    for k in range(loops):
        observed = drawn()(jax.random.fold_in(jax.random.key(seed), k), jnp.asarray(path(k)))
        yield tracker.take(problem.with_observed(observed), table)


def first_alarm(path, seed: int, loops: int, clean: int) -> tuple[int, drift.Step]:
    """Loops from the first changed one to the alarm, counted from 1; `clean` loops come before."""
    tracker = Tracker(tables.ion(), reference(seed))
    for k, step in enumerate(watched(tracker, path, seed, loops)):
        if step.verdict != "still valid":
            return k + 1 - clean, step
    return loops, step


def recorded(seed: int, values: np.ndarray = TRUTH, settings: LoopTable = SETTINGS) -> LoopTable:
    device = with_parameters(tables.ion(), {n: jnp.asarray(v) for n, v in zip(NAMES, values, strict=True)})
    return synthesize(device, settings, jax.random.key(seed))


# ------------------------------------------------------------------------------------------------ change points


@pytest.mark.slow
@pytest.mark.parametrize("which", range(4), ids=NAMES)
@pytest.mark.parametrize(("kind", "most"), [("step of five", 2), ("drift of one a loop", 10)])
def test_changes_are_flagged_in_time_and_named(kind, most, which):
    clean, size = 6, np.eye(4)[which] * errors()[which]
    grown = (lambda k: 5.0) if "step" in kind else (lambda k: k - clean + 1.0)
    path = lambda k: TRUTH if k < clean else TRUTH + grown(k) * size
    for seed in range(3):
        after, step = first_alarm(path, 100 + seed, clean + 12, clean)
        assert step.verdict == "recalibrate"
        assert 1 <= after <= most
        assert f"`{NAMES[which]}` has moved by +" in step.reason


def test_clean_loops_raise_no_alarm():
    """100 loops from each of two references; the slow test has 3,000."""
    for seed in range(2):
        steps = list(watched(Tracker(tables.ion(), reference(seed)), lambda k: TRUTH, seed, 100))
        assert {step.verdict for step in steps} == {"still valid"}
        own = np.array([step.own for step in steps])
        # Each loop's own estimate scatters by its stated error about the truth, the reference's error in the middle.
        assert np.all(np.abs(np.std(own, axis=0) - 1) < 0.3)
        assert np.all(np.abs(np.mean([step.misfit for step in steps])) < 0.4)


@pytest.mark.slow
def test_three_thousand_clean_loops():
    alarms = 0
    for seed in range(30):
        tracker = Tracker(tables.ion(), reference(1000 + seed))
        for step in watched(tracker, lambda k: TRUTH, 1000 + seed, 100):
            assert step.verdict != "data bad"
            if step.verdict == "recalibrate":
                alarms += 1
                break
    assert alarms <= 5  # one in 3,000 is what the threshold is laid for; six happen once in 1,600


@pytest.mark.slow
@pytest.mark.parametrize("which", range(4), ids=NAMES)
def test_rates_of_detection(which):
    size = np.eye(4)[which] * errors()[which]
    steps = [first_alarm(lambda k: TRUTH + 5 * size * (k >= 10), 2000 + s, 12, 10)[0] for s in range(40)]
    drifts = [first_alarm(lambda k: TRUTH + max(0, k - 9) * size, 3000 + s, 20, 10)[0] for s in range(20)]
    assert np.mean(np.array(steps) <= 2) >= 0.95
    assert max(drifts) <= 10


def test_the_threshold_keeps_its_rate():
    """Gaussian streams that the threshold was not laid with."""
    ref, one = reference().information, information()
    level = usual_threshold()
    assert 4.0 < level < 5.0
    assert level > LAID(ref, one, loops=300) + 0.3
    # A reference as good as known: its noise is no source of alarms, and none that hides changes.
    assert abs(LAID(1e4 * ref, one) - level) < 0.3


def test_the_noise_of_the_reference_is_accounted_for():
    """A reference that is wrong by 2.5 of its own standard errors is no reason to recalibrate; one of eight is."""
    ref = reference()
    direction = ref.covariance[0] / np.sqrt(ref.covariance[0, 0])
    for off, verdict in ((2.5, "still valid"), (8.0, "recalibrate")):
        wrong = Reference(NAMES, TRUTH + off * direction, ref.covariance, FREE)
        steps = list(watched(Tracker(tables.ion(), wrong), lambda k: TRUTH, 5, 30))
        assert steps[-1].verdict == verdict


def test_several_parameters_that_change_are_all_named():
    change = np.array([8.0, -8.0, 0.0, 0.0]) * errors()
    _, step = first_alarm(lambda k: TRUTH + change * (k >= 5), 7, 12, 5)
    assert "`rabi_scale_1` has moved by +" in step.reason
    assert "`rabi_scale_2` has moved by -" in step.reason
    assert "since loop 6" in step.reason


def test_the_filter_follows():
    """After the alarm the estimate stands where the device is, within its errors, and the words with it."""
    change = np.array([6.0, 0.0, 0.0, 0.0]) * errors()
    steps = list(watched(Tracker(tables.ion(), reference(3)), lambda k: TRUTH + change * (k >= 5), 3, 25))
    before, last = steps[4], steps[-1]
    assert np.all(np.abs(before.mean - TRUTH) < 4 * before.std)
    assert np.all(np.abs(last.mean - TRUTH - change) < 4 * last.std)
    assert np.all(before.std < errors())
    # At the alarm the estimate jumps; without that it would come halfway, and say that it was sure.
    first = next(step for step in steps if step.verdict == "recalibrate")
    assert np.all(np.abs(first.mean - TRUTH - change) < 2.5 * first.std)
    percent = float(last.reason.split("by ")[1].split(" %")[0])
    assert abs(percent - 100 * change[0] / TRUTH[0]) < 0.5


def test_a_stream_compiles_once():
    tracker = Tracker(tables.ion(), reference())
    tracker.update(recorded(20))
    before = bad_data.evaluated._cached._cache_size()
    for seed in range(21, 24):
        tracker.update(recorded(seed))
    assert bad_data.evaluated._cached._cache_size() == before


# ------------------------------------------------------------------------------------------------ bad data


def each_loop(table: LoopTable, change, columns=("n_x", "n_y"), loops=("A", "B")) -> LoopTable:
    """The table with the measured columns of some loops changed."""
    new = {name: np.array(getattr(table, name)) for name in columns}
    for label in loops:
        rows = table.rows(label)
        for name in columns:
            new[name][rows] = change(new[name][rows])
    return tables.changed(table, **new)


def slipped(table: LoopTable, k: int, begin: int = 0) -> LoopTable:
    return each_loop(table, lambda a: np.concatenate([a[:begin], np.roll(a[begin:], k)]))


def mirrored(a: np.ndarray) -> np.ndarray:
    k = np.arange(len(a))
    return a[np.minimum(k - k % 20 + (20 - k % 20) % 20, len(a) - 1)]


FAULTS = {
    "slip of 1": (lambda t: slipped(t, 1), "phase slip: from cycle 0 of loop A on", "1 cycle earlier"),
    "slip of -3": (lambda t: slipped(t, -3), "phase slip", "3 cycles later"),
    "slip of half a period": (lambda t: slipped(t, 10), "phase slip", "10 cycles"),
    "slip later on": (lambda t: slipped(t, 4, 20), "phase slip", "4 cycles earlier"),
    "branches": (lambda t: each_loop(t, mirrored, ("n_y",)), "forward and backward branches of loop A, B", "exchanged"),
    "branches of one loop": (lambda t: each_loop(t, mirrored, ("n_y",), ("B",)), "branches of loop B", "exchanged"),
    "ceiling": (lambda t: each_loop(t, lambda a: np.minimum(a, 350)), "saturation", "cells of x at 0.875"),
    "low ceiling": (lambda t: each_loop(t, lambda a: np.minimum(a, 200)), "saturation", "ceiling"),
    "ceiling of one loop": (lambda t: each_loop(t, lambda a: np.minimum(a, 350), loops=("B",)), "saturation", "loop B"),
    "faint ceiling": (lambda t: each_loop(t, lambda a: np.minimum(a, 376)), "saturation", "ceiling"),
    "floor": (lambda t: each_loop(t, lambda a: np.maximum(a, 40)), "saturation", "floor"),
    "no y": (lambda t: each_loop(t, lambda a: np.where(np.arange(41) // 10 == 2, np.nan, a), ("n_y",)),
             "loop A has no n_y from cycle 20 to 29", "10 of the 20 cycles"),
    "no rows": (lambda t: tables.pieces(t, t.cycle // 10 != 1), "loop A has no n_x from cycle 10 to 19", "missing"),
    "no end": (lambda t: tables.pieces(t, t.cycle <= 30), "loop A ends at cycle 30", "missing"),
    "no end of one loop": (lambda t: tables.pieces(t, (t.cycle <= 28) | (t.loop == "A")), "loop B ends at 28", ""),
    "noise": (lambda t: each_loop(t, lambda a: np.random.default_rng(0).permutation(a), ("n_y",)), "no values", ""),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_tables_are_named_and_move_nothing(fault):
    spoil, *parts = FAULTS[fault]
    tracker = Tracker(tables.ion(), reference(1))
    for seed in (30, 31):
        assert tracker.update(recorded(seed)).verdict == "still valid"
    before = tracker.state()
    step = tracker.update(spoil(recorded(32)))
    assert step.verdict == "data bad"
    for part in parts:
        assert part.replace("at 28", "at cycle 28") in step.sentence
    assert {**tracker.state(), "loops": 2} == before
    assert tracker.update(recorded(33)).verdict == "still valid"


def test_a_first_table_is_checked_as_well():
    assert Tracker(tables.ion(), reference()).update(tables.pieces(recorded(34), recorded(34).cycle <= 30)).verdict == (
        "data bad"
    )


@pytest.mark.parametrize("size", [5, 20, -20])
@pytest.mark.parametrize("which", range(4), ids=NAMES)
def test_a_drift_is_not_called_bad_data(which, size):
    low, high = FREE[NAMES[which]]
    values = TRUTH.copy()
    values[which] = np.clip(values[which] + size * errors()[which], low + 1e-4, high - 1e-4)
    tracker = Tracker(tables.ion(), reference())
    for seed in (40, 41):
        assert tracker.update(recorded(seed, values)).verdict != "data bad"


def test_a_table_without_recorded_transfers_is_tracked_too():
    settings = recorded(0)
    tracker = Tracker(tables.ion(), reference())
    for seed in (50, 51):
        table = tables.changed(recorded(seed, settings=settings), r_set=None)
        assert tracker.update(table).verdict == "still valid"


def test_values_with_errors_are_tracked_too():
    counts = recorded(60)
    error = np.sqrt(np.clip(counts.n_y / 400, 0.02, 0.98) * (1 - np.clip(counts.n_y / 400, 0.02, 0.98)) / 400)
    values = tables.changed(counts, shots=None, n_x=None, n_y=None, y=counts.n_y / 400, y_err=error)
    tracker = Tracker(tables.ion(), reference())
    assert tracker.update(values).verdict == "still valid"
    assert tracker.update(each_loop(values, lambda a: np.roll(a, 3), ("y",))).verdict == "data bad"
    assert tracker.update(each_loop(values, lambda a: np.minimum(a, 0.3), ("y",))).verdict == "data bad"


def test_periods():
    k = np.arange(41)
    assert bad_data.period_of(np.sin(np.pi * k / 20) ** 2) == 20
    assert bad_data.period_of(np.random.default_rng(0).random(60)) == 0
    assert bad_data.period_of(np.full(30, 0.5)) == 0


# ------------------------------------------------------------------------------------------------ resumed


def test_a_stream_goes_on_where_it_was():
    change = np.array([6.0, 0.0, 0.0, 0.0]) * errors()
    stream = [recorded(70 + k, TRUTH + change * (k >= 3)) for k in range(8)]
    whole = Tracker(tables.ion(), reference(8))
    steps = [whole.update(table) for table in stream]
    assert steps[-1].verdict == "recalibrate"
    for cut in (2, 7):
        part = Tracker(tables.ion(), reference(8))
        for table in stream[:cut]:
            part.update(table)
        again = Tracker.resumed(tables.ion(), reference(8), json.loads(json.dumps(part.state())))
        assert [again.update(table).sentence for table in stream[cut:]] == [step.sentence for step in steps[cut:]]
        np.testing.assert_allclose(again.mean, whole.mean, rtol=1e-10)


def test_a_state_of_another_reference_is_refused():
    tracker = Tracker(tables.ion(), reference(8))
    tracker.update(recorded(80))
    with pytest.raises(ValueError, match="another calibration"):
        Tracker.resumed(tables.ion(), reference(9), tracker.state())

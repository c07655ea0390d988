"""Registers calibrated from tables: each loop an ion, parameters of all and of each, crosstalk between them."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

from calibration.columns import TableError
from calibration.data import synthesize
from calibration.fit import fit
from calibration.parameters import anchored, value_of, with_parameters
from calibration.posing import MEMORY_UNUSED
from calibration.register import RegisterLoops, pose_register
from twin.memory import Exponential, MovingAverage
from twin.memristor import AreaSeries, ClosedForm, IonMemristor, Lindblad, run
from twin.register import Register

IONS, CYCLES = 5, 24
PHASES = np.array([0.0, 0.31, 0.55, 0.9, 0.17])
SCALES_1, SCALES_2 = np.array([1.0, 0.96, 1.04, 0.98, 1.03]), np.array([0.97, 1.02, 1.0, 1.05, 0.95])
BOXES = {"rabi_scale_1": (0.7, 1.3), "rabi_scale_2": (0.7, 1.3), "crosstalk_1": (0.0, 0.2), "crosstalk_2": (0.0, 0.2)}
OF_ION = ("rabi_scale_1", "rabi_scale_2")
LABELS = tuple("abcde")


def register(method, ions=IONS, **more):
    """What the tables come from."""
    given = {"memory": MovingAverage(4.0), "rabi_scale_1": np.resize(SCALES_1, ions),
             "rabi_scale_2": np.resize(SCALES_2, ions), "readout_error_bright": 0.01,
             "readout_error_dark": 0.02, "method": method}  # fmt: skip
    crosstalk = {f"crosstalk_{k}": more.pop(f"crosstalk_{k}", share) for k, share in ((1, 0.03), (2, 0.05))}
    return Register(IonMemristor(**(given | more)), ions, **crosstalk)


def settings(ions=IONS, cycles=CYCLES, shots=400, **columns):
    """Inputs of a phase of its own for each ion; nothing counted yet."""
    phases = np.resize(PHASES, ions) + 0.07 * (np.arange(ions) // IONS)
    x = np.sin(np.pi * (np.arange(cycles) / 12 + phases[:, None])) ** 2
    rows = ions * cycles
    loops = [LABELS[k] if ions == IONS else f"ion{k}" for k in range(ions)]
    given = {"loop": np.repeat(loops, cycles), "cycle": np.tile(np.arange(cycles), ions), "x_set": x.ravel(),
             "window_cycles": None, "detuning_1_set_hz": np.zeros(rows), "detuning_2_set_hz": np.zeros(rows),
             "shots": np.full(rows, shots), "n_x": np.zeros(rows), "n_y": np.zeros(rows)}  # fmt: skip
    return tables.LoopTable(**(given | columns))


def recorded(device, key=0, *, transfers=True, **columns):
    """A synthetic table of the device, with or without the transfers that were played."""
    table = synthesize(device, settings(device.count, **columns), jax.random.key(key))
    return table if transfers else tables.changed(table, r_set=None)


def unknowing(device, **more):
    """The device before its calibration."""
    values = dict.fromkeys(OF_ION, 1.0) | {"crosstalk_1": 0.0, "crosstalk_2": 0.0} | more
    return with_parameters(device, {name: jnp.asarray(value) for name, value in values.items()})


def truth_of(device, name):
    base, _, ion = name.partition("@")
    value = np.asarray(value_of(device, base))
    return float(value[list(LABELS).index(ion)] if value.ndim else value)


def assert_found(found, device):
    assert found.converged, found.status
    for name, one in found.parameters.items():
        assert abs(one.value - truth_of(device, name)) < 4 * one.std, (name, one)
    dof = found.n_data - found.n_free
    assert abs(found.chi2_per_dof - 1) < 4 * np.sqrt(2 / dof)


# ------------------------------------------------------------------------------------------------ prediction


@pytest.mark.parametrize("transfers", [True, False])
def test_rows_are_what_the_register_does_in_their_order(transfers):
    """Against `twin.loop.run`, which knows nothing of tables; rows are shuffled, so that their order is tested too."""
    device, rows = register(ClosedForm(), source="model"), IONS * CYCLES
    r_set = np.random.default_rng(0).random(rows) if transfers else None
    plain = settings(r_set=r_set, window_cycles=np.repeat([2.0, 3.5, 5.0, 8.0, 4.0], CYCLES))
    order = np.arange(rows).reshape(IONS, CYCLES).T.ravel()  # cycle by cycle
    table = tables.pieces(plain, order)
    part = RegisterLoops.from_table(table, device)
    predicted = part.prediction(part.prepared(device), False)
    grid = lambda values: np.asarray(values).reshape(CYCLES, IONS)
    alone = dataclasses.replace(device, ion=dataclasses.replace(device.ion, memory=MovingAverage([2.0, 3.5, 5, 8, 4])))
    loop = run(alone, grid(table.x_set), None if r_set is None else grid(table.r_set))
    for name in ("p_x", "p_y", "r"):
        np.testing.assert_allclose(grid(getattr(predicted, name)), getattr(loop, name), atol=1e-12, err_msg=name)
    assert bool(np.all(predicted.valid))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "of ions", "of cycles", "of both"])
def test_one_range_of_areas_serves_all_ions(kind):
    """Ions of the same physics share the series; the answers stay those of each ion's own."""
    device = register(AreaSeries(), detuning_1_hz=700.0)
    rows = np.arange(IONS * CYCLES)
    of_ions, of_cycles = 200.0 * (rows // CYCLES), 900.0 * (rows % 2)
    offsets = {"none": 0.0 * rows, "of ions": of_ions, "of cycles": of_cycles, "of both": of_ions + of_cycles}[kind]
    table = settings(r_set=np.random.default_rng(0).random(len(rows)), detuning_1_set_hz=offsets)
    part = RegisterLoops.from_table(table, device)
    predicted = part.prediction(part.prepared(device), False)
    grid = lambda values: np.asarray(values).reshape(IONS, CYCLES).T
    loop = run(device, grid(table.x_set), grid(table.r_set), detuning_1_set_hz=grid(table.detuning_1_set_hz))
    np.testing.assert_allclose(grid(predicted.p_y), loop.p_y, atol=2e-8)
    np.testing.assert_allclose(grid(predicted.p_x), loop.p_x, atol=2e-8)


def test_the_memory_follows_what_was_measured():
    device = register(ClosedForm())
    table = recorded(device, transfers=False)
    part = RegisterLoops.from_table(table, device)
    x = (table.n_x / table.shots).reshape(IONS, CYCLES).T
    r = MovingAverage(4.0).filter(jnp.asarray(x))
    np.testing.assert_allclose(part.prediction(device, False).r.reshape(IONS, CYCLES).T, r, atol=1e-14)
    some = tables.changed(table, n_x=np.where(np.arange(len(table)) % 7 == 0, np.nan, table.n_x))
    part = RegisterLoops.from_table(some, device)
    predicted = part.prediction(device, False)
    filled = np.where(np.isnan(some.n_x), predicted.p_x, some.n_x / some.shots).reshape(IONS, CYCLES).T
    np.testing.assert_allclose(
        predicted.r.reshape(IONS, CYCLES).T, MovingAverage(4.0).filter(jnp.asarray(filled)), atol=1e-14
    )


def test_synthetic_counts_scatter_about_the_prediction():
    device = register(ClosedForm())
    table = recorded(device, shots=100_000)
    part = RegisterLoops.from_table(table, device)
    z = [np.asarray(column.residual(p)) for column, p in part.predicted(device, False)]
    assert abs(np.mean(np.square(z)) - 1) < 5 * np.sqrt(2 / np.size(z))


def test_simulated_problems_scatter_about_the_prediction():
    device = register(ClosedForm())
    problem = pose_register(unknowing(device), recorded(device, transfers=False), BOXES, per_ion=OF_ION).problem
    at = jnp.asarray([truth_of(device, name) for name in problem.names])
    new = problem.simulated(jax.random.key(8), at)
    z = np.asarray(new.residuals(at))
    assert abs(np.mean(z**2) - 1) < 5 * np.sqrt(2 / z.size)
    kept = problem.with_observed(new.observed)
    assert float(kept.log_likelihood(at)) == float(new.log_likelihood(at))
    assert float(kept.log_likelihood(at)) != float(problem.log_likelihood(at))


# ------------------------------------------------------------------------------------------------ refusals


def test_tables_that_are_no_register_are_refused():
    device, table = register(ClosedForm()), settings(r_set=np.full(IONS * CYCLES, 0.4))
    with pytest.raises(TableError, match=r"3 ions needs 3 loops.*but the table has 5 \(a, b, c, d, e\)"):
        RegisterLoops.from_table(table, register(ClosedForm(), 3))
    keep = ~((table.loop == "c") & (table.cycle == 7))
    with pytest.raises(TableError, match=r"loop c has no cycle 7, but loop a has; .* add the row"):
        RegisterLoops.from_table(tables.pieces(table, keep), device)
    keep = ~((table.loop == "a") & (table.cycle == 9))
    with pytest.raises(TableError, match=r"loop a has no cycle 9, but loop b has"):
        RegisterLoops.from_table(tables.pieces(table, keep), device)
    other = tables.changed(table, loop=np.repeat(list("abcdf"), CYCLES))
    with pytest.raises(TableError, match="label the ions alike"):
        pose_register(device, {"monday": table, "tuesday": other}, BOXES)


@pytest.mark.parametrize(
    ("boxes", "options", "message"),
    [
        (BOXES, {"per_ion": ["detuning_1_hz"]}, "`detuning_1_hz` is to differ from ion to ion, but is not free"),
        (BOXES, {"per_ion": ["crosstalk_1"]}, "`crosstalk_1` belongs to the register as a whole"),
        (BOXES | {"rabi_scale_3": (0.0, 1.0)}, {}, "`rabi_scale_3` is no parameter of"),
        (BOXES | {"sigma_1_s": (1e-5, 3e-5)}, {"per_ion": ["sigma_1_s"]}, "`sigma_1_s` differs from ion to ion"),
        (BOXES, {"per_table": ["rabi_scale_1"]}, "a register has no parameters of each table"),
    ],
    ids=["not free", "of the register", "unknown", "envelopes", "per table"],
)
def test_a_question_without_sense_is_refused(boxes, options, message):
    device = register(ClosedForm())
    with pytest.raises(ValueError, match=message):
        fit(device, settings(r_set=np.full(IONS * CYCLES, 0.4)), boxes, **options)


def test_one_ion_has_no_parameters_of_each():
    with pytest.raises(ValueError, match="`per_ion` names rabi_scale_1, but the device is a IonMemristor, one ion"):
        fit(tables.ion(), tables.settings(), tables.SCALES, per_ion=["rabi_scale_1"])


# ------------------------------------------------------------------------------------------------ parameters


def test_parameters_reach_the_register_or_its_ions():
    device = register(ClosedForm(), memory=Exponential(3.0), sigma_1_s=22e-6)
    values = {"crosstalk_1": 0.07, "rabi_scale_2": np.arange(5.0), "window_cycles": 6.0}
    new = with_parameters(device, {name: jnp.asarray(value) for name, value in values.items()})
    for name, value in values.items():
        np.testing.assert_array_equal(value_of(new, name), value)
    assert float(new.crosstalk_2) == 0.05
    assert float(anchored(new).ion.nominal_sigma_1_s) == 22e-6


def test_names_carry_the_labels_of_the_loops():
    device = register(ClosedForm())
    boxes = BOXES | {"window_cycles": (2.0, 8.0)}
    posed = pose_register(device, recorded(device), boxes, per_ion=("rabi_scale_1", "window_cycles"))
    problem = posed.problem
    assert problem.names == (
        *(f"rabi_scale_1@{ion}" for ion in LABELS), "rabi_scale_2", "crosstalk_1", "crosstalk_2",
        *(f"window_cycles@{ion}" for ion in LABELS),
    )  # fmt: skip
    at = jnp.arange(1.0, 14.0) / 20
    at = at.at[8:].add(2.0)
    placed = problem.device(problem.parts[0], at)
    np.testing.assert_array_equal(placed.ion.rabi_scale_1, at[:5])
    np.testing.assert_array_equal(placed.ion.memory.window_cycles, at[8:])
    assert float(placed.ion.rabi_scale_2) == float(at[5])
    assert (float(placed.crosstalk_1), float(placed.crosstalk_2)) == (float(at[6]), float(at[7]))
    assert problem.own_window(problem.parts[0])
    assert MEMORY_UNUSED in posed.notes


# ------------------------------------------------------------------------------------------------ derivatives


def assert_slopes(problem, at, rtol):
    of = eqx.filter_jit(lambda p, v: p.log_likelihood(v))
    reverse = np.asarray(eqx.filter_jit(lambda p, v: jax.grad(p.log_likelihood)(v))(problem, at))
    forward = np.asarray(eqx.filter_jit(lambda p, v: jax.jacfwd(p.log_likelihood)(v))(problem, at))
    width = np.asarray(problem.free.width)
    for k, name in enumerate(problem.names):
        step = 1e-4 * width[k]
        f = [float(of(problem, at.at[k].add(n * step))) for n in (-2, -1, 1, 2)]
        central = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * step)
        scale = abs(central) + np.max(np.abs(reverse * width)) * 1e-2 / width[k]
        assert abs(reverse[k] - central) < rtol * scale, (name, reverse[k], central)
        assert abs(forward[k] - reverse[k]) < 1e-8 * scale, name


@pytest.mark.parametrize("source", ["measured", "model"])
def test_gradient_of_the_likelihood(source):
    device = register(ClosedForm(), source=source)
    boxes = BOXES | {"readout_error_dark": (0.0, 0.1), "window_cycles": (2.0, 6.0)}
    table = recorded(device, transfers=False)
    problem = pose_register(device, table, boxes, per_ion=(*OF_ION, "window_cycles", "readout_error_dark")).problem
    rng = np.random.default_rng(1)
    at = problem.free.low + problem.free.width * (0.4 + 0.2 * jnp.asarray(rng.random(len(problem.names))))
    assert_slopes(problem, at, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("transfers", [True, False])
@pytest.mark.parametrize("method", [AreaSeries(), Lindblad(1e-8)], ids=["series", "decided"])
def test_gradient_of_the_likelihood_of_the_full_dynamics(method, transfers):
    device = register(method, 3, detuning_1_hz=np.array([800.0, 300.0, 500.0]), laser_linewidth_hz=50.0)
    boxes = BOXES | {"detuning_1_hz": (0.0, 2e3), "laser_linewidth_hz": (0.0, 500.0), "sigma_2_s": (15e-6, 25e-6)}
    table = recorded(device, transfers=transfers, cycles=12)
    problem = pose_register(device, table, boxes, per_ion=(*OF_ION, "detuning_1_hz")).problem
    rng = np.random.default_rng(2)
    at = problem.free.low + problem.free.width * (0.4 + 0.2 * jnp.asarray(rng.random(len(problem.names))))
    assert_slopes(problem, at, 1e-6)


# ------------------------------------------------------------------------------------------------ recovery


@pytest.mark.parametrize("transfers", [pytest.param(True, marks=pytest.mark.slow), False])
def test_crosstalk_and_scales_are_found(transfers):
    device = register(ClosedForm())
    boxes = BOXES | tables.READOUT
    result = fit(unknowing(device), recorded(device, transfers=transfers), boxes, per_ion=OF_ION, starts=2,
                 optimizer="levenberg_marquardt")  # fmt: skip
    assert_found(result, device)
    assert all(result.parameters[f"rabi_scale_1@{ion}"].verdict == "identified" for ion in LABELS)
    assert len(result.prediction.p_y) == IONS * CYCLES


@pytest.mark.slow
def test_adam_and_lbfgs_end_where_levenberg_marquardt_does():
    device = register(ClosedForm(), 3)
    table = recorded(device, cycles=13)
    one, other = (fit(unknowing(device), table, BOXES, per_ion=OF_ION, starts=2, optimizer=optimizer)
                  for optimizer in ("adam+lbfgs", "levenberg_marquardt"))  # fmt: skip
    assert one.converged and other.converged
    for name, estimate in one.parameters.items():
        assert abs(estimate.value - other.parameters[name].value) < 0.02 * estimate.std, name


@pytest.mark.slow
def test_leaving_out_the_crosstalk_shows():
    device = register(ClosedForm())
    table = recorded(device, shots=1000)
    scales = {name: BOXES[name] for name in OF_ION}
    options = {"per_ion": OF_ION, "starts": 1, "optimizer": "levenberg_marquardt"}
    right = fit(unknowing(device), table, BOXES, **options)
    wrong = fit(unknowing(device), table, scales, **options)
    assert_found(right, device)
    assert wrong.chi2_per_dof > 1.5
    assert wrong.log_likelihood < right.log_likelihood - 50
    off = [(one.value - truth_of(device, name)) / one.std for name, one in wrong.parameters.items()]
    assert np.max(np.abs(off)) > 5
    assert any("Pearson chi2/dof" in note for note in wrong.notes)


@pytest.mark.slow
def test_neighbours_that_play_alike_cannot_be_told_from_crosstalk():
    device = register(ClosedForm(), 3)
    alike = np.tile(np.sin(np.pi * np.arange(CYCLES) / 12) ** 2, 3)
    table = recorded(device, x_set=alike, n_y=None)
    boxes = {name: BOXES[name] for name in ("rabi_scale_1", "crosstalk_1")}
    result = fit(unknowing(device, rabi_scale_2=1.0), table, boxes, per_ion=["rabi_scale_1"], starts=2,
                 optimizer="levenberg_marquardt")  # fmt: skip
    (group,) = result.degeneracies
    assert set(group.names) == set(result.parameters)
    assert "make one field where neighbours play the same commands" in group.sentence
    assert group.sentence.count("make one field") == 1


@pytest.mark.slow
@pytest.mark.parametrize("transfers", [True, False])
def test_the_full_dynamics_are_found(transfers):
    device = register(Lindblad(1e-6), detuning_1_hz=800.0, laser_linewidth_hz=50.0)
    boxes = BOXES | {"detuning_1_hz": (0.0, 5e3)}
    result = fit(unknowing(device, detuning_1_hz=0.0), recorded(device, transfers=transfers), boxes, per_ion=OF_ION,
                 starts=2, optimizer="levenberg_marquardt")  # fmt: skip
    assert_found(result, device)
    assert any("registers are not emulated" in note for note in result.notes)

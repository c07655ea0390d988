"""Light shifts: against QuTiP with a detuning that follows the pulse, between methods, limits, gradients, refusals."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import qutip

from calibration.parameters import value_of, with_parameters
from twin import area_series, runge_kutta
from twin.dynamics import Adaptive, Magnus, StaticGrid, evolve
from twin.levels import LAMBDA, SCHEMES, LightShift, side_by_side
from twin.master_equation import unpack_density
from twin.memory import MovingAverage
from twin.memristor import AreaSeries, Automatic, ClosedForm, IonMemristor, Lindblad, planned, run
from twin.phase_noise import filtered, laser_noise
from twin.pulses import Gaussian
from twin.sampled import sampled
from twin.scans import PulseScan, RamseyScan
from twin.slices import Dense, Slices, propagate
from twin.spectra import White
from twin.waveform import Waveform

SIGMA_S = 20e-6
X_SET, R_SET = np.array([0.05, 0.4, 0.8, 1.0]), np.array([0.9, 0.3, 1.0, 0.6])
QUIET = {"detuning_1_hz": 0.0, "detuning_2_hz": 0.0, "lifetime_s": math.inf, "branching": 0.4}


def device(**changes):
    defaults = {"memory": MovingAverage(5.0), "stark_1_hz": 3000.0, "stark_2_hz": -2000.0, "separation_s": 160e-6}
    return IonMemristor(**(defaults | changes))


def coefficient(stark_hz, sigma_s=SIGMA_S):
    """From the definition: stark_hz at the peak of a pi pulse."""
    return 2 * np.pi * stark_hz / (np.pi / (np.sqrt(2 * np.pi) * sigma_s)) ** 2


# ------------------------------------------------------------------------------------------------ against QuTiP

CASES: dict[str, tuple[float, tuple[float, float]]] = {  # separation in sigma, areas
    "apart": (9.0, (2.9, 1.7)),
    "overlapping": (1.5, (2.2, 3.0)),
    "single": (0.0, (3.3, 0.0)),
}


def qutip_state(scheme, separation_s, areas, shifts_hz, numbers):
    """Density matrix of a device whose detunings follow the pulses, operators from the oracle."""
    h, jumps = oracle.ion(scheme, **numbers)
    levels = oracle.LEVELS[scheme]
    terms = [qutip.Qobj(h)]
    for k, (area, shift) in enumerate(zip(areas, shifts_hz, strict=True)):
        envelope = lambda t, k=k: np.exp(-((t - k * separation_s) ** 2) / (2 * SIGMA_S**2))
        peak = area / (np.sqrt(2 * np.pi) * SIGMA_S)
        units = (1.0, 0.0) if k == 0 else (0.0, 1.0)
        terms.append([qutip.Qobj(oracle.drive(levels, *units)), lambda t, e=envelope, p=peak: p * e(t)])
        # The detuning of line k falls by what its frequency rises.
        falling, _ = oracle.ion(scheme, **{f"detuning_{k + 1}_hz": 1.0})
        size = -shift * (area / np.pi) ** 2
        terms.append([qutip.Qobj(falling), lambda t, e=envelope, s=size: s * e(t) ** 2])
    start = qutip.ket2dm(qutip.basis(len(levels), levels.index(SCHEMES[scheme].start)))
    options = {"method": "dop853", "rtol": 1e-11, "atol": 1e-13, "nsteps": 100_000, "max_step": SIGMA_S / 3}
    times = [-7 * SIGMA_S, separation_s + 7 * SIGMA_S]
    return qutip.mesolve(terms, start, times, c_ops=[qutip.Qobj(j) for j in jumps], options=options).states[-1].full()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_against_qutip(scheme, case):
    numbers = {"detuning_1_hz": 900.0, "detuning_2_hz": -1500.0, "lifetime_s": 3e-3, "m_lifetime_s": 1e-3,
               "shared_linewidth_hz": 200.0}  # fmt: skip
    separation, areas = CASES[case]
    separation_s, shifts_hz = separation * SIGMA_S, (4000.0, -2500.0)
    expected = qutip_state(scheme, separation_s, areas, shifts_hz, numbers)
    system = SCHEMES[scheme].system(
        **(QUIET | numbers), light_shift_1_s=coefficient(4000.0), light_shift_2_s=coefficient(-2500.0)
    )
    pulses = tuple(Gaussian.from_area(a, center_s=k * separation_s, sigma_s=SIGMA_S) for k, a in enumerate(areas))
    window = -7 * SIGMA_S, separation_s + 7 * SIGMA_S
    for method in (StaticGrid(1e-10), Adaptive()):
        solution = evolve(system, pulses, start=SCHEMES[scheme].start, window_s=window, method=method)
        found = np.asarray(unpack_density(solution.state[0], len(system.levels)))
        np.testing.assert_allclose(found, expected, atol=1e-8)
    plain = evolve(
        dataclasses.replace(system, light_shifts=()), pulses, start=SCHEMES[scheme].start, window_s=window
    ).populations[0]
    assert np.max(np.abs(plain - np.diag(expected).real)) > 1e-3


def test_phases_do_not_matter_and_kets_agree():
    system = LAMBDA.system(**QUIET, light_shift_1_s=coefficient(4000.0), light_shift_2_s=coefficient(1000.0))
    pulses = lambda a, b: (
        Gaussian.from_area(2.0, center_s=0.0, sigma_s=SIGMA_S, phase_rad=a),
        Gaussian.from_area(1.5, center_s=2 * SIGMA_S, sigma_s=SIGMA_S, phase_rad=b),
    )
    window = -7 * SIGMA_S, 9 * SIGMA_S
    solve = lambda start, *phases: evolve(
        system, pulses(*phases), start=start, window_s=window, method=StaticGrid(1e-11)
    )
    ket = solve("v", None, None).populations[0]
    np.testing.assert_allclose(solve("v", 0.7, -2.0).populations[0], ket, atol=1e-9)
    np.testing.assert_allclose(solve(np.diag([1.0, 0, 0]), 0.7, None).populations[0], ket, atol=1e-9)


# ------------------------------------------------------------------------------------------------ methods of a device


@functools.cache
def loops(scheme, separation_s):
    ion = device(scheme=scheme, separation_s=separation_s, detuning_1_hz=700.0, laser_linewidth_hz=150.0)
    methods = {"grid": StaticGrid(1e-9), "series": AreaSeries(StaticGrid(1e-9)), "adaptive": Adaptive()}
    return {name: run(dataclasses.replace(ion, method=m), X_SET, R_SET) for name, m in methods.items()}


@pytest.mark.slow
@pytest.mark.parametrize("separation_s", [70e-6, 160e-6])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_methods_agree(scheme, separation_s):
    found = loops(scheme, separation_s)
    for name in ("grid", "series"):
        assert np.all(found[name].valid) and np.all(found[name].error_estimate <= 1e-9)
        np.testing.assert_allclose(found[name].populations_2, found["adaptive"].populations_2, atol=3e-9)
        np.testing.assert_allclose(found[name].populations_1, found["adaptive"].populations_1, atol=3e-9)
        np.testing.assert_allclose(found[name].coherence, found["adaptive"].coherence, atol=1e-7)


@pytest.mark.parametrize(
    ("stark_hz", "error"),
    [(5e3, 1e-8), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((500.0, 1e-5), (2e4, 1e-5), (2e4, 1e-8)))],
)
def test_series_keeps_its_error_and_states_it(stark_hz, error):
    rng = np.random.default_rng(2)
    x_set, r_set = rng.uniform(0, 1, (2, 40))
    ion = device(stark_1_hz=stark_hz, stark_2_hz=-stark_hz, rabi_scale_1=1.2)
    series, grid = (
        run(dataclasses.replace(ion, method=m), x_set, r_set)
        for m in (AreaSeries(StaticGrid(error)), StaticGrid(1e-11))
    )
    assert np.all(series.valid)
    assert np.max(np.abs(series.populations_2 - grid.populations_2)) < error
    assert np.max(np.abs(series.populations_1 - grid.populations_1)) < error


def test_too_few_nodes_are_flagged():
    plain = planned(device(stark_1_hz=None, stark_2_hz=None, method=AreaSeries(StaticGrid(1e-8))), {})
    shifted = dataclasses.replace(plain, stark_1_hz=2e4, stark_2_hz=2e4)
    steps = planned(dataclasses.replace(shifted, method=AreaSeries(StaticGrid(1e-8))), {}).method.steps
    few = dataclasses.replace(shifted, method=dataclasses.replace(plain.method, steps=steps))
    assert not np.any(run(few, X_SET, R_SET).valid)


def test_nodes_grow_with_the_shift_and_stay_without():
    assert area_series.truncation(3.5, 9) == area_series.truncation(3.5, 9, 0.0)
    # The series of a vanishing phase is Bessel's.
    assert area_series.truncation(3.5, 5, 1e-9) == pytest.approx(area_series.truncation(3.5, 5), rel=1e-6)
    nodes = [area_series.nodes_for(3.5, 1e-9, phase) for phase in (0.0, 0.5, 2.0, 8.0)]
    assert nodes == sorted(set(nodes))


@pytest.mark.parametrize("error", [pytest.param(1e-6, marks=pytest.mark.slow), 1e-9])
def test_grids_keep_their_error(error):
    rng = np.random.default_rng(4)
    lanes = {"stark_1_hz": rng.uniform(-2e4, 2e4, 24), "stark_2_hz": rng.uniform(-2e4, 2e4, 24),
             "separation_s": rng.uniform(20e-6, 160e-6, 24), "rabi_scale_1": rng.uniform(0.5, 1.5, 24)}  # fmt: skip
    x_set, r_set = rng.uniform(0, 1, (2, 3, 24))
    coarse, fine = (run(device(method=StaticGrid(e), **lanes), x_set, r_set) for e in (error, 1e-12))
    assert np.all(coarse.valid)
    assert np.max(np.abs(coarse.populations_2 - fine.populations_2)) < error


# ------------------------------------------------------------------------------------------------ limits


def test_small_shift_is_an_averaged_detuning():
    """First order in the detuning, the loss of a pi pulse is |int delta(t) sin(theta(t)) dt|^2 / 4."""
    t = np.linspace(-8, 8, 4001) * SIGMA_S
    area = np.pi / 2 * np.array([math.erfc(-u / (math.sqrt(2) * SIGMA_S)) for u in t])
    delta = 2 * np.pi * 200.0 * np.exp(-((t / SIGMA_S) ** 2))
    loss = (np.sum(delta * np.sin(area)) * (t[1] - t[0]) / 2) ** 2
    ion = device(stark_1_hz=200.0, stark_2_hz=None, lifetime_s=math.inf, method=StaticGrid(1e-12))
    lead = {"lead_s": 8 * SIGMA_S, "tail_s": 8 * SIGMA_S}
    found = run(dataclasses.replace(ion, **lead), np.ones(1), np.zeros(1))
    assert 1 - found.x[0] == pytest.approx(loss, rel=1e-3)
    constant = run(dataclasses.replace(ion, stark_1_hz=None, detuning_1_hz=200.0, **lead), np.ones(1), np.zeros(1))
    assert 0.3 < loss / (1 - constant.x[0]) < 1
    # A laser above the line meets it where the light has moved it to: the signs are opposite.
    tuned = run(dataclasses.replace(ion, detuning_1_hz=150.0, **lead), np.ones(1), np.zeros(1))
    assert 1 - tuned.x[0] < 0.1 * loss


def test_shift_is_of_the_power():
    """The same line at half of the amplitude has a quarter of the shift; the width does not matter if anchored."""
    ion = device(stark_2_hz=None, lifetime_s=math.inf)
    weak = dataclasses.replace(ion, rabi_scale_1=0.5)
    c = lambda one: (
        one.system(0.0, 0.0).light_shifts[0].coefficient_s * one.pulses(*one.largest_areas)[0].peak_rad_s ** 2
    )
    assert c(ion) == pytest.approx(2 * np.pi * 3000.0) and c(weak) == pytest.approx(2 * np.pi * 750.0)
    wide = dataclasses.replace(ion, sigma_1_s=30e-6, nominal_sigma_1_s=20e-6)
    assert c(wide) == pytest.approx(2 * np.pi * 3000.0)


def test_none_is_no_shift_at_all():
    none, zero = device(stark_1_hz=None, stark_2_hz=None), device(stark_1_hz=0.0, stark_2_hz=0.0)
    assert none.system(0.0, 0.0).light_shifts == () and len(zero.system(0.0, 0.0).light_shifts) == 2
    a, b = (run(dataclasses.replace(d, method=StaticGrid(1e-10)), X_SET, R_SET) for d in (none, zero))
    np.testing.assert_allclose(a.populations_2, b.populations_2, atol=1e-13)


def test_closed_form_bound_holds():
    for stark in (100.0, 500.0):
        ion = device(stark_1_hz=stark, stark_2_hz=stark, lifetime_s=math.inf, separation_s=200e-6, lead_s=200e-6,
                     tail_s=200e-6)  # fmt: skip
        exact = run(dataclasses.replace(ion, method=StaticGrid(1e-11)), X_SET, R_SET)
        closed = run(dataclasses.replace(ion, method=ClosedForm()), X_SET, R_SET)
        bound = ion.closed_form_error(jnp.asarray(X_SET), jnp.asarray(R_SET))
        assert np.all(np.abs(exact.y - closed.y) <= bound) and np.max(bound) < 1e-1
        # Not by far either: the bound follows the shift.
        assert np.max(np.abs(exact.y - closed.y)) > 0.02 * np.max(bound)
    assert run(dataclasses.replace(ion, method=Automatic(1e-8)), X_SET, R_SET).method != "closed form"


# ------------------------------------------------------------------------------------------------ scans


def test_frequency_scan_moves():
    """A pi pulse's resonance moves up by the mean shift, for line 1 and line 2."""
    offsets = np.linspace(-1500.0, 4500.0, 25)
    for pulse in (1, 2):
        ion = device(**{f"stark_{pulse}_hz": 1500.0, f"stark_{3 - pulse}_hz": None}, lifetime_s=math.inf)
        scan = PulseScan(pulse, np.full(25, math.pi), None, offsets)
        p = np.asarray(scan.probability(ion))
        best = offsets[np.argmax(p) if pulse == 1 else np.argmin(p)]
        assert 500.0 < best < 1500.0


def test_ramsey_pulses_share_a_line():
    """Two overlapping pulses on one line shift it by the square of their sum; QuTiP with that detuning agrees."""
    ion = device(stark_1_hz=4000.0, lifetime_s=math.inf, lead_s=140e-6, tail_s=140e-6)
    found = RamseyScan(np.array([30e-6]), 0.0, math.pi / 2).probability(ion)[0]
    peak = math.pi / 2 / (np.sqrt(2 * np.pi) * SIGMA_S)
    omega = lambda t: peak * (np.exp(-(t**2) / (2 * SIGMA_S**2)) + np.exp(-((t - 30e-6) ** 2) / (2 * SIGMA_S**2)))
    x = qutip.basis(2, 1) @ qutip.basis(2, 0).dag()
    h = [[(x + x.dag()) / 2, omega], [qutip.basis(2, 1).proj(), lambda t: coefficient(4000.0) * omega(t) ** 2]]
    options = {"method": "dop853", "rtol": 1e-11, "atol": 1e-13, "max_step": 5e-6}
    state = qutip.sesolve(h, qutip.basis(2, 0), [-140e-6, 170e-6], options=options).states[-1]
    assert found == pytest.approx(abs(state.full()[1, 0]) ** 2, abs=1e-8)


# ------------------------------------------------------------------------------------------------ derivatives, values


@pytest.mark.parametrize(
    "method",
    [StaticGrid(1e-10), pytest.param(AreaSeries(StaticGrid(1e-10)), marks=pytest.mark.slow)],
    ids=["grid", "series"],
)
def test_gradient_is_a_difference(method):
    box = {"stark_1_hz": (-4e3, 4e3), "stark_2_hz": (-4e3, 4e3), "sigma_1_s": (18e-6, 22e-6)}
    ion = planned(device(separation_s=100e-6, method=method, nominal_sigma_1_s=20e-6), box)
    scale = np.array([1e3, 1e3, 1e-6])

    @jax.jit
    def output(a):
        own = with_parameters(ion, dict(zip(box, a * scale, strict=True)))
        return jnp.sum(jnp.array([0.3, 1.0]) @ run(own, X_SET[1:3], R_SET[1:3]).y)

    at, step = np.array([2.0, -1.5, 20.5]), 1e-3
    slopes = jax.grad(output)(jnp.asarray(at))
    for k in range(3):
        move = step * np.eye(3)[k]
        difference = float(output(at + move) - output(at - move)) / (2 * step)
        assert slopes[k] == pytest.approx(difference, rel=1e-6, abs=1e-8) and abs(difference) > 1e-4


def test_free_shifts_need_no_compilation(monkeypatch):
    traces, rhs = [], runge_kutta._stage_drives
    monkeypatch.setattr(runge_kutta, "_stage_drives", lambda *a: (traces.append(1), rhs(*a))[1])
    ion = planned(device(stark_1_hz=None, stark_2_hz=None), {"stark_1_hz": (-5e3, 5e3)}, solves=1e3)
    assert isinstance(ion.method, AreaSeries) and value_of(ion, "stark_1_hz") == 0
    output = lambda s: float(run(with_parameters(ion, {"stark_1_hz": jnp.asarray(s)}), X_SET, R_SET).y[1])
    first, solves = output(0.0), len(traces)
    assert solves > 0 and len({first, output(2e3), output(-5e3)}) == 3 and len(traces) == solves


def test_lanes_of_graphs_side_by_side():
    first = LAMBDA.system(**QUIET, light_shift_1_s=1e-10)
    second = LAMBDA.system(**QUIET)
    both = side_by_side([first, second], ())
    np.testing.assert_allclose(both.light_shifts[0].coefficient_s, [1e-10, 0.0])
    alone, order = first.alone(1)
    assert alone.light_shifts == () and order == [1, 2, 0]
    assert first.alone(0)[0].light_shifts[0].weights == (0.0, 1.0, 1.0)


# ------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_follow_a_shift_refuses():
    ion = device()
    system, pulses = ion.system(0.0, 0.0), ion.pulses(*ion.largest_areas)
    window = ion.window(False)
    with pytest.raises(ValueError, match=r"Magnus.*light shifts"):
        evolve(system, pulses, start="v", window_s=window, method=Magnus())
    with pytest.raises(ValueError, match="light shifts"):
        propagate(system, Slices(np.ones((3, 2)), None, np.ones(3) * 1e-6), "v", Dense())
    noise = [laser_noise(LAMBDA, 1, White(100.0))]
    with pytest.raises(ValueError, match="light shifts"):
        filtered(dataclasses.replace(system, decays=(), dephasings=()), pulses, noise, start="v", window_s=window)
    with pytest.raises(ValueError, match="light shifts"):
        sampled(ion, Waveform(np.ones((4, 2, 2)), np.zeros((4, 2, 2)), 1e-6), alone_slices=2)
    with pytest.raises(ValueError, match="stark_1_hz"):
        device(stark_1_hz=math.nan)
    with pytest.raises(ValueError, match="`weights` must have 3"):
        dataclasses.replace(system, light_shifts=(LightShift(("v", "s"), (1.0, 0.0), 1e-10),))
    with pytest.raises(ValueError, match="not in the graph"):
        dataclasses.replace(system, light_shifts=(LightShift(("v", "x"), (1.0, 0.0, 0.0), 1e-10),))


def test_lindblad_is_decided_as_ever():
    assert run(device(method=Lindblad(1e-7)), np.linspace(0, 1, 60)).method == "area series"

"""Samples that steer level graphs: optima that are known exactly, gradients, and other codes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import qutip

from calibration import steering
from calibration.goals import Energy, Leakage, MapTransfer, Play, Roughness, StateTransfer
from calibration.hardware import Hardware
from calibration.steering import Steered, Tuning, judged, steer
from twin.levels import LADDER, LAMBDA, Decay, LevelSystem
from twin.waveform import Waveform

FULL = 2 * math.pi * 40e3
PAIR = LevelSystem(("v", "s"), (("v", "s"),), np.zeros(2))
THREE = LevelSystem(("v", "s", "m"), (("v", "s"), ("s", "m")), np.zeros(3))


def hardware(channels=2, full=FULL, **changes) -> Hardware:
    """A generator without other limits than its full scale."""
    given = {"sample_s": 1e-6, "largest_rad_s": (full,) * channels, "slew_rad_s2": (math.inf,) * channels,
             "real_only": True, "zero_ends": False}  # fmt: skip
    return Hardware(**(given | changes))


@pytest.mark.parametrize("time", [0.97, 1.01])
def test_the_speed_limit_of_a_transfer_is_reached(time):
    """A resonant pi pulse takes pi / Omega: below it the best is sin^2(Omega T / 2), one per cent above it is whole."""
    samples = 50
    fast = hardware(sample_s=time * math.pi / FULL / samples)
    best = steer(THREE, fast, StateTransfer("v", "s"), samples, starts=2, tolerance=1e-12)
    limit = math.cos(time * math.pi / 2) ** 2 if time < 1 else 0.0
    np.testing.assert_allclose([best.seen[0], best.recomputed[0]], limit, atol=2e-4)


BAND = {"channels": 1, "bandwidth_hz": 200e3, "attenuation_db": 30.0}


@pytest.mark.parametrize("missing", [0, 1])
def test_the_shortest_pulse_of_limited_band_has_the_area_of_its_raw_samples(missing):
    """The kernel has unit sum, so that the area is at most full scale x raw samples x clock, whatever the band."""
    raws = 12
    full = 1.02 * math.pi / (raws * 1e-6)
    limited = hardware(full=full, **BAND)
    samples = 60 - limited.raw_samples(60) + raws - missing
    assert limited.raw_samples(samples) == raws - missing < samples
    best = steer(PAIR, limited, StateTransfer("v", "s"), samples, starts=2, tolerance=1e-12)
    area = full * (raws - missing) * 1e-6
    assert best.recomputed[0] == pytest.approx(math.cos(area / 2) ** 2 if area < math.pi else 0.0, abs=2e-4)


def test_the_pi_pulse_of_limited_band_and_least_energy():
    """Among raw samples of a given sum, the least |H w|^2 is a linear equation; the optimizer finds its energy."""
    full, samples = 25 * FULL, 16
    limited = hardware(1, full, bandwidth_hz=100e3, attenuation_db=20.0)
    raws = limited.raw_samples(samples)
    columns = [np.convolve(row, limited._kernels[:, 0]) for row in np.eye(raws)]
    h = np.stack(columns, axis=1)
    y = np.linalg.solve(h.T @ h, np.ones(raws))
    w = math.pi / 1e-6 * y / np.sum(y)
    exact = float(np.sum((h @ w) ** 2) * 1e-6)
    assert np.max(np.abs(w)) < 0.8 * full  # the amplitude bound does not bind
    flat = math.pi**2 / (samples * 1e-6)
    assert exact > 1.1 * flat  # the band does
    best = steer(PAIR, limited, [(StateTransfer("v", "s"), 1.0), (Energy(), 1e-3 / exact)], samples, iterations=2000,
                 tolerance=1e-12)  # fmt: skip
    assert best.recomputed[0] < 1e-5
    assert best.recomputed[1] == pytest.approx(exact, rel=0.01)
    np.testing.assert_allclose(best.waveform.area_rad, np.pi, rtol=2e-3)


def lossy() -> LevelSystem:
    """A lambda graph whose middle level is lost to a fourth one within 100 ns."""
    return LevelSystem(("v", "s", "m", "l"), (("v", "s"), ("s", "m")), np.zeros(4), (Decay("s", "l", 1e7),))


def fast() -> Hardware:
    return hardware(full=2 * math.pi * 1e6, sample_s=0.5e-6)


@functools.cache
def passage() -> Steered:
    return steer(lossy(), fast(), StateTransfer("v", "m"), 40, starts=2, seed=1, iterations=200, tolerance=1e-6)


def centers(waveform: Waveform) -> np.ndarray:
    weights = np.asarray(waveform.real_rad_s) ** 2
    return np.arange(waveform.samples) @ weights / weights.sum(axis=0)


def test_the_order_of_stimulated_raman_passage_is_found():
    """Pulse 2 comes before pulse 1: in the dark state the lossy level stays empty. The other order loses it."""
    one = passage()
    first, second = centers(one.waveform)
    assert second < first - 4
    assert one.recomputed[0] < 0.1
    backwards = dataclasses.replace(one.waveform, real_rad_s=one.waveform.real_rad_s[::-1])
    (lost,) = judged(lossy(), fast(), [StateTransfer("v", "m")], backwards)
    assert lost > 0.9


def ladder(detuning_2_hz=0.0) -> LevelSystem:
    return LADDER.system(detuning_1_hz=0.0, detuning_2_hz=detuning_2_hz, lifetime_s=52.7e-3, branching=0.4,
                         m_lifetime_s=38e-9)  # fmt: skip


def best_on_the_ladder(rabi_hz: float, end: str, window_s: float, samples: int = 20) -> float:
    """Largest population of a level at the end, from s, under a bound on the second line."""
    limits = hardware(full=2 * math.pi * rabi_hz, sample_s=window_s / samples)
    # Line 1 would take the ion back to v.
    light = 0.9 * np.asarray(limits.largest_rad_s) * np.array([0.0, 1.0]) * np.ones((samples, 1))
    constant = Waveform(light, np.zeros_like(light), limits.sample_s)
    return 1 - steer(ladder(), limits, StateTransfer("s", end), samples, start=constant, starts=2).recomputed[0]


# Rabi limit of the second line in Hz, and a window in which the largest population of m is reached.
@pytest.mark.parametrize(("rabi_hz", "window_s"), [(40e3, 1.2e-6), (1e6, 0.4e-6), (10e6, 0.1e-6)])
def test_what_the_top_of_the_ladder_can_hold(rabi_hz, window_s):
    """s-m is a pair with amplitude decay: the constant drive is best, and its largest population is a formula."""
    omega, rate = 2 * math.pi * rabi_hz, 1 / 38e-9
    t = np.linspace(0, window_s, 20001)
    root = np.sqrt(complex(rate**2 / 4 - omega**2))
    exact = np.max(np.abs(omega / root * np.sinh(root * t / 2)) ** 2 * np.exp(-rate * t / 2))
    best = best_on_the_ladder(rabi_hz, "m", window_s)
    assert exact * 0.98 < best < exact * 1.02


def test_what_passes_the_top_of_the_ladder():
    """Weak light empties s through m at Omega^2 / Gamma."""
    omega, rate = 2 * math.pi * 40e3, 1 / 38e-9
    moved = best_on_the_ladder(40e3, "l", 50e-6)
    assert moved == pytest.approx(1 - math.exp(-(omega**2) / rate * 50e-6), abs=2e-3)


GOALS = {
    "state": StateTransfer("v", "m"),
    "ket": StateTransfer(np.array([1, 1j, 0]) / math.sqrt(2), np.array([0, 1, -1j]) / math.sqrt(2)),
    "map": MapTransfer(np.array([[0, 1j], [1, 0]]), ("v", "m")),
    "leakage": Leakage(("s",), "v"),
    "energy": Energy(),
    "roughness": Roughness(),
}


def ion(**changes) -> LevelSystem:
    noise = {"detuning_1_hz": 2e3, "detuning_2_hz": -3e3, "lifetime_s": 2e-3, "branching": 0.4,
             "shared_linewidth_hz": 100.0}  # fmt: skip
    return LAMBDA.system(**(noise | changes))


def closed_ion() -> LevelSystem:
    return dataclasses.replace(ion(), decays=(), dephasings=())


@pytest.mark.parametrize(
    ("system", "names"),
    [
        (ion(), ["state"]),
        (closed_ion(), ["ket", "leakage", "roughness"]),
        pytest.param(ion(), list(GOALS), marks=pytest.mark.slow),
        pytest.param(closed_ion(), list(GOALS), marks=pytest.mark.slow),
    ],
)
def test_gradients_through_everything(system, names):
    """Hardware with a band limit, a modulator, crosstalk and a free phase, the engine, and the goals."""
    limits = hardware(real_only=False, bandwidth_hz=300e3, attenuation_db=40.0, rise_s=0.5e-6,
                      mixing_real=np.array([[1, 0.1], [0.05, 1]]))  # fmt: skip
    terms = tuple(steering.Weighted(goal) for goal in map(GOALS.get, names))
    problem = steering.posed(system, limits, terms, 30, Tuning(LAMBDA.slopes, 4e3), 2, 1e-13)
    point = jnp.asarray(problem.starting_points(None, 1, 3)[0])
    values = jax.jit(lambda p: jnp.stack(steering._goal_values(problem, p)))
    along = jnp.asarray(np.random.default_rng(0).normal(size=point.shape))
    steps = [values(point + h * along) for h in (2e-3, 1e-3, -1e-3, -2e-3)]
    differences = (8 * (steps[1] - steps[2]) - (steps[0] - steps[3])) / 12e-3
    slopes = jax.jacrev(values)(point) @ along
    np.testing.assert_allclose(slopes, differences, rtol=1e-6)
    assert np.all(np.abs(slopes) > 1e-4 * np.abs(values(point)))


@pytest.mark.parametrize("system", [ion(), closed_ion()], ids=["open", "closed"])
def test_the_dense_solve_agrees_with_the_engine(system):
    """Both are judged by one formula; they share no propagation."""
    limits = hardware(real_only=False, rise_s=0.5e-6)
    tuning = Tuning(LAMBDA.slopes, 4e3)
    terms = tuple(steering.Weighted(goal) for goal in GOALS.values())
    problem = steering.posed(system, limits, terms, 30, tuning, 2, 1e-13)
    point = jnp.asarray(problem.starting_points(None, 1, 5)[0])
    other = judged(system, limits, list(GOALS.values()), problem.waveform(point), tuning=tuning,
                   offsets_hz=problem.offsets_hz(point), oversampling=2)  # fmt: skip
    np.testing.assert_allclose(steering._values(problem, point), other, rtol=1e-10, atol=1e-11)


def test_the_entanglement_infidelity_of_a_closed_map():
    """1 - |tr(V^+ U)|^2 / d^2, U from one exponential of the Hamiltonian."""
    limits = hardware(real_only=False)
    waveform = Waveform([[1e5, 5e4]], [[2e4, -6e4]], 1e-6)
    drive = np.asarray(waveform.real_rad_s + 1j * waveform.imag_rad_s)[0]
    h = oracle.ion("lambda", detuning_1_hz=2e3, detuning_2_hz=-3e3)[0] + oracle.drive("vsm", *drive)
    u = oracle.expm(-1j * h * 1e-6)[np.ix_([0, 2], [0, 2])]
    v = np.asarray(GOALS["map"].unitary) @ np.diag([1, 1j])
    expected = 1 - abs(np.trace(v.conj().T @ u)) ** 2 / 4
    (got,) = judged(closed_ion(), limits, [MapTransfer(v, ("v", "m"))], waveform)
    assert got == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected < 1


@pytest.mark.slow
def test_a_gate_is_found_and_qutip_agrees():
    """A swap of the ends of the graph with free phases and free detunings, on twelve bits."""
    limits, tuning = hardware(bits=12, real_only=False), Tuning(LAMBDA.slopes, 5e3)
    goals = [(MapTransfer(np.array([[0, 1], [1, 0]]), ("v", "m")), 1.0), (Roughness(), 1e-4)]
    one = steer(ion(), limits, goals, 40, starts=2, iterations=100, tuning=tuning)
    assert one.recomputed[0] < 0.05
    assert set(limits.violations(one.waveform).values()) == {0.0}
    assert np.all(np.abs(one.offsets_hz) < 5e3)
    ket = {level: qutip.basis(3, k) for k, level in enumerate("vsm")}
    move = lambda a, b: ket[a] * ket[b].dag()
    d1, d2 = (2 * math.pi * (own + float(off)) for own, off in zip((2e3, -3e3), one.offsets_hz, strict=True))
    jumps = [math.sqrt(0.4 / 2e-3) * move("v", "s"), math.sqrt(0.6 / 2e-3) * move("m", "s"),
             math.sqrt(2 * math.pi * 100) * move("s", "s")]  # fmt: skip
    u = qutip.qeye(9)
    for omega_1, omega_2 in np.asarray(one.waveform.real_rad_s + 1j * one.waveform.imag_rad_s):
        drive = complex(omega_1 / 2) * move("s", "v") + complex(omega_2 / 2) * move("m", "s")
        h = -d1 * move("s", "s") + (d2 - d1) * move("m", "m") + drive + drive.dag()
        u = (qutip.liouvillian(h, jumps) * 1e-6).expm().full() @ np.asarray(
            u if isinstance(u, np.ndarray) else u.full()
        )
    # |vm> and |mv>, bras and kets swapped, summed over all four products of the subspace; QuTiP stacks columns.
    inside = {"v": "m", "m": "v"}
    vec = lambda a, b: move(a, b).full().ravel(order="F")
    total = sum(vec(inside[a], inside[b]) @ u @ vec(a, b) for a in "vm" for b in "vm")
    assert one.recomputed[0] == pytest.approx(1 - total.real / 4, abs=1e-9)


def test_leakage_is_traded_for_infidelity():
    """A weight on the middle level empties it: the transfer then goes by the dark state."""
    plain, emptier = (
        steer(closed_ion(), hardware(), [(StateTransfer("v", "m"), 1.0), (Leakage(("s",), "v"), weight)], 40, starts=2,
              iterations=100)
        for weight in (0.0, 0.3)
    )  # fmt: skip
    assert emptier.recomputed[1] < 0.8 * plain.recomputed[1]


def test_a_given_start_is_the_first_one():
    start = Waveform(np.full((20, 1), math.pi / 20e-6), np.zeros((20, 1)), 1e-6)
    one = steer(PAIR, hardware(1), StateTransfer("v", "s"), 20, start=start, starts=0, iterations=1)
    assert one.recomputed[0] < 1e-4
    assert one.losses.shape == (1,)
    assert one.iterations == 1


def test_one_program_for_new_weights_and_numbers():
    traces = []

    class Counted(Energy):
        def value(self, play: Play):
            traces.append(1)
            return super().value(play)

    counts = []
    for weight, shift in ((0.0, 0.0), (1e-9, 1e3), (1e-8, -2e3)):
        goals = [(StateTransfer("v", "s"), 1.0), (Counted(), weight)]
        pair = dataclasses.replace(PAIR, energies_rad_s=np.array([0.0, shift]))
        steer(pair, hardware(1), goals, 10, starts=1, iterations=2)
        counts.append(len(traces))
    # The dense solve of the result calls the goal once more each time.
    assert counts[2] - counts[1] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: steer(THREE, hardware(1), StateTransfer("v", "s"), 10), "2 couplings"),
        (lambda: steer(PAIR, hardware(1), StateTransfer("v", "s"), 10, starts=0), "`starts`"),
        (lambda: steer(PAIR, hardware(1), StateTransfer("v", "x"), 10), "level `x`"),
        (lambda: steer(PAIR, hardware(1), StateTransfer("v", np.array([1.0, 1.0])), 10), "normalize"),
        (lambda: StateTransfer("v", np.eye(2) / 2), "pure state"),
        (lambda: MapTransfer(np.ones((2, 2)), ("v", "s")), "unitary matrix"),
        (lambda: steer(ion(detuning_1_hz=np.zeros(3)), hardware(), StateTransfer("v", "s"), 10), "one graph"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()

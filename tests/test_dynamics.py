"""`evolve` against exact solutions, reference values and independent operators; its grids, flags and gradients."""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from twin.closed_form import partial_area, separated_amplitudes, separated_populations, simultaneous_populations
from twin.dynamics import Adaptive, StaticGrid, evolve
from twin.levels import LADDER, LAMBDA, LevelSystem
from twin.master_equation import unpack_density
from twin.pulses import Gaussian, PiecewiseConstant, Sech

ENGINES = {"adaptive": Adaptive(), "static grid": StaticGrid()}
engines = pytest.mark.parametrize("engine", list(ENGINES))
# What each engine promises for a population: the reference solver, and the static grid at its default.
PROMISE = {"adaptive": 1e-10, "static grid": 1e-8}
SIGMA = 20e-6
PI = math.pi


def lossless(energies=(0.0, 0.0, 0.0)):
    """v, s, m without jumps: Schroedinger's equation."""
    return LevelSystem(("v", "s", "m"), (("v", "s"), ("s", "m")), np.asarray(energies, float))


def ion(**changes):
    """The Lambda graph of 171Yb+, quiet unless changed: Lindblad's equation."""
    quiet = {"detuning_1_hz": 0.0, "detuning_2_hz": 0.0, "lifetime_s": math.inf, "branching": 0.4}
    return LAMBDA.system(**(quiet | changes))


def pair(theta_1, theta_2, separation, sigma=SIGMA, **phases):
    """Two Gaussians, the first at time zero; `separation` in s."""
    return (
        Gaussian.from_area(theta_1, center_s=0.0, sigma_s=sigma, phase_rad=phases.get("phase_1_rad")),
        Gaussian.from_area(theta_2, center_s=separation, sigma_s=sigma, phase_rad=phases.get("phase_2_rad")),
    )


def around(separation, sigma=SIGMA):
    """Eight widths on each side: what is cut is below 1e-14."""
    return -8 * sigma, separation + 8 * sigma


def populations(solution):
    assert np.all(solution.valid)
    return np.asarray(solution.populations[-1])


# ------------------------------------------------------------------------------------------------ exact solutions

RNG = np.random.default_rng(20260701)
GRID_1, GRID_2 = (a.ravel() for a in np.meshgrid(*[np.linspace(0.1, PI - 0.05, 15)] * 2, indexing="ij"))

# PHYSICS section 6: (row, theta_1, theta_2, DT/sigma, d_v sigma) and the populations.
REFERENCE_V = {
    "row 4": (PI / 2, PI / 2, 2, 0.0, (0.5041948112, 0.2741327549, 0.2216724339)),
    "row 5": (PI, PI, 2, 0.0, (0.0013465530, 0.0019125407, 0.9967409063)),
    "row 6": (PI, PI, 0, 0.0, (0.0388681487, 0.3165638355, 0.6445680158)),
    "row 8": (PI / 2, PI / 2, 4, 0.0, (0.5000409782, 0.2507196016, 0.2492394201)),
    "row 10": (PI / 2, PI / 2, 8, 0.3, (0.5439623059, 0.2280188475, 0.2280188466)),
    "row 1": (2 * math.asin(math.sqrt(0.6)), 2 * math.asin(math.sqrt(0.3)), 13, 0.0, (0.4, 0.42, 0.18)),
}
REFERENCE_S = {"row 7": (PI / 2, PI / 2, 2, 0.0, (0.4935761142, 0.2322911309, 0.2741327549))}
RANDOM_1, RANDOM_2 = RNG.uniform(0, PI, (2, 60))
# One batch for each start: reference rows, separated pulses, simultaneous pulses, and both orders of an overlapping
# pair ((theta_1, theta_2) = (1.1, 2.3) at +1.5 and at -1.5 sigma).
SPLIT = np.cumsum([60, 60, 2])


@functools.cache
def solved(engine, start, equation):
    rows = list((REFERENCE_V if start == "v" else REFERENCE_S).values())
    theta_1 = np.concatenate([[r[0] for r in rows], RANDOM_1, RANDOM_1, [1.1, 1.1]])
    theta_2 = np.concatenate([[r[1] for r in rows], RANDOM_2, RANDOM_2, [2.3, 2.3]])
    separation = SIGMA * np.concatenate([[r[2] for r in rows], np.full(60, 13.0), np.zeros(60), [1.5, -1.5]])
    energy = np.concatenate([[r[3] for r in rows], np.zeros(122)]) / SIGMA
    if equation == "schroedinger":
        system = lossless(np.stack([energy, 0 * energy, 0 * energy]))
    else:
        system = ion(detuning_1_hz=energy / (2 * PI), lifetime_s=math.inf)
        # Lambda: E_s = -d1, E_m = -d1 + d2. A shift of v alone is a detuning of line 1 alone.
        np.testing.assert_allclose(system.energies_rad_s[0] - system.energies_rad_s[1:], [energy] * 2, atol=1e-6)
    low, high = np.minimum(0, separation) - 8 * SIGMA, np.maximum(0, separation) + 8 * SIGMA
    pulses = pair(theta_1, theta_2, separation)
    result = populations(evolve(system, pulses, start=start, window_s=(low, high), method=ENGINES[engine]))
    return np.split(result, len(rows) + np.concatenate([[0], SPLIT]), axis=1)[:4]


everywhere = pytest.mark.parametrize(
    ("engine", "start", "equation"),
    [(e, s, q) for e in ENGINES for s, q in (("v", "schroedinger"), ("v", "lindblad"), ("s", "schroedinger"))],
)


@everywhere
def test_reference_populations(engine, start, equation):
    rows = REFERENCE_V if start == "v" else REFERENCE_S
    expected = np.array([row[-1] for row in rows.values()]).T
    np.testing.assert_allclose(solved(engine, start, equation)[0], expected, atol=1e-8, rtol=0)
    if start == "v":
        last = solved(engine, start, equation)[0][1, -1]
        assert last == pytest.approx(0.42, abs=1e-9)


@everywhere
def test_closed_form_at_thirteen_sigma(engine, start, equation):
    # Row 2.
    expected = np.array(separated_populations(RANDOM_1, RANDOM_2, start))
    np.testing.assert_allclose(solved(engine, start, equation)[1], expected, atol=PROMISE[engine], rtol=0)


@everywhere
def test_simultaneous_pulses_are_exact(engine, start, equation):
    expected = np.array(simultaneous_populations(RANDOM_1, RANDOM_2, start))
    np.testing.assert_allclose(solved(engine, start, equation)[2], expected, atol=PROMISE[engine], rtol=0)


@engines
def test_swapping_the_order_leaves_the_untouched_population(engine):
    # PHYSICS 6: (start v, order 1-2) P_v equals (order 2-1) P_v. The other two populations differ.
    for equation in ("schroedinger", "lindblad"):
        one, other = solved(engine, "v", equation)[3].T
        assert one[0] == pytest.approx(other[0], abs=2 * PROMISE[engine])
        assert abs(one[1] - other[1]) > 0.05


@engines
def test_separated_pulses_resolved_in_time(engine):
    theta_1, theta_2 = RANDOM_1[:6], RANDOM_2[:6]
    times = np.linspace(-7 * SIGMA, 20 * SIGMA, 41)
    for start in ("v", "s"):
        solution = evolve(
            lossless(),
            pair(theta_1, theta_2, 13 * SIGMA),
            start=start,
            window_s=around(13 * SIGMA),
            save_s=times,
            method=ENGINES[engine],
        )
        partial_1 = partial_area(times[:, None], theta_1, 0.0, SIGMA)
        partial_2 = partial_area(times[:, None], theta_2, 13 * SIGMA, SIGMA)
        expected = np.stack(separated_populations(partial_1, partial_2, start), axis=1)
        assert np.all(solution.valid)
        np.testing.assert_allclose(solution.populations, expected, atol=PROMISE[engine], rtol=0)
        np.testing.assert_array_equal(solution.t_s, np.broadcast_to(times[:, None], (41, 6)))


@engines
def test_amplitudes_and_laser_phases(engine):
    phases = {"phase_1_rad": 0.9, "phase_2_rad": -1.7}
    for start in ("v", "s"):
        solution = evolve(
            lossless(),
            pair(1.3, 2.1, 13 * SIGMA, **phases),
            start=start,
            window_s=around(13 * SIGMA),
            method=ENGINES[engine],
        )
        amplitudes = np.asarray(solution.state[0, :3] + 1j * solution.state[0, 3:])
        expected = np.array(separated_amplitudes(1.3, 2.1, start, **phases))
        np.testing.assert_allclose(amplitudes, expected, atol=PROMISE[engine])


@pytest.mark.parametrize("start", ["v", "s"])
def test_populations_do_not_depend_on_laser_phases(start):
    # No closed loop: the phases are gauge, whatever the overlap and the detuning.
    phase = np.array([[0.0, 0.0], [1.2, 0.0], [0.0, -2.9], [4.0, 2.0]]).T
    solution = evolve(
        lossless(np.array([0.2, 0.0, -0.3]) / SIGMA),
        pair(2.0, 1.4, 1.3 * SIGMA, phase_1_rad=phase[0], phase_2_rad=phase[1]),
        start=start,
        window_s=around(1.3 * SIGMA),
    )
    result = populations(solution)
    np.testing.assert_allclose(result, np.repeat(result[:, :1], 4, axis=1), atol=1e-13)
    assert np.ptp(solution.state[0], axis=1).max() > 0.1


# ------------------------------------------------------------------------------------------------ overlap


def deviation(method, separation_sigmas):
    """Largest |dP|, largest |dP_v| and RSD(y) of the closed form on the grid of areas; one row a separation."""
    separation = SIGMA * np.asarray(separation_sigmas, float)[:, None]
    solution = evolve(
        lossless(), pair(GRID_1, GRID_2, separation), start="v", window_s=around(separation), method=method
    )
    exact = np.array(separated_populations(GRID_1, GRID_2))[:, None]
    difference = populations(solution) - exact
    rsd = np.sqrt(np.mean(difference[1] ** 2, axis=-1)) / np.mean(exact[1])
    return np.abs(difference).max(axis=(0, 2)), np.abs(difference[0]).max(axis=-1), rsd


@engines
def test_relative_deviation_of_three_in_ten_thousand_at_4_71_sigma(engine):
    # Row 13: RSD(y) = 0.03 % at DT = 4.71 sigma, within one per cent.
    around_it = 4.71 * np.array([0.99, 1.01])
    rsd = deviation(ENGINES[engine], around_it)[2]
    crossing = np.interp(-math.log(3e-4), -np.log(rsd), around_it)
    assert rsd[1] < 3e-4 < rsd[0]
    assert crossing == pytest.approx(4.71, abs=0.01)


# PHYSICS 2.5: DT/sigma, max |dP|, max |dP_v|, RSD(y).
TABLE = [
    (8, 3.2e-9, 7e-12, 5e-9),
    (7, 1.5e-7, 1.3e-9, 2.5e-7),
    (6, 4.6e-6, 1.3e-7, 8e-6),
    (5, 8.8e-5, 6.6e-6, 1.42e-4),
    (4.5, 3.3e-4, 3.8e-5, 5.18e-4),
    (4, 1.1e-3, 1.8e-4, 1.69e-3),
    (3, 8.8e-3, 2.6e-3, 1.32e-2),
    (2, 4.8e-2, 1.9e-2, 7.0e-2),
    (1, 0.18, 0.066, 0.27),
    (0, 0.46, 0.10, 0.74),
]


@pytest.mark.parametrize(
    "method", [StaticGrid(1e-13), pytest.param(Adaptive(1e-13, 1e-15), marks=pytest.mark.slow)], ids=list(ENGINES)[::-1]
)
def test_table_of_overlap(method):
    separation, *expected = np.array(TABLE).T
    # The table gives one or two digits: half a unit of the last is up to 7 %. Its smallest entries carry the rounding
    # of the solver it was made with.
    for got, column in zip(deviation(method, separation), expected, strict=True):
        np.testing.assert_allclose(got, column, rtol=0.08, atol=1e-12)


# ------------------------------------------------------------------------------------------------ detuned, dephased


@engines
def test_detuned_gaussian_pulses(engine):
    # PHYSICS 2.7 and row 15; a detuning of either sign.
    table = [
        (PI, 0.05, 0.99722942),
        (PI, 0.1, 0.98896266),
        (PI, 0.2, 0.95656088),
        (PI, 0.5, 0.75707799),
        (PI, -0.2, 0.95656088),
        (PI / 2, 0.2, 0.47996314),
    ]
    theta, detuning, expected = np.array(table).T
    weak, weak_detuning = 1e-3, np.array([0.0, 0.7, 1.5])
    theta = np.concatenate([theta, np.full(3, weak)])
    detuning = np.concatenate([detuning, weak_detuning])
    pulse = Gaussian.from_area(theta, center_s=0.0, sigma_s=SIGMA)
    system = ion(detuning_1_hz=detuning / (2 * PI * SIGMA))
    solution = evolve(system, (pulse,), start="v", window_s=(-8 * SIGMA, 8 * SIGMA), method=ENGINES[engine])
    p_v, p_s, p_m = populations(solution)
    np.testing.assert_allclose(p_s[:6], expected, atol=1e-8)
    np.testing.assert_allclose(p_s[6:], weak**2 / 4 * np.exp(-(weak_detuning**2)), atol=weak**4 + 1e-10)
    np.testing.assert_array_equal(p_m, 0.0)
    assert (1 - p_s[0]) / 0.05**2 == pytest.approx(1.11, abs=0.005)


@engines
def test_rosen_zener(engine):
    # Row 14 and its neighbours: P = sin^2(theta/2) sech^2(pi delta tau/2).
    tau = 7e-6
    theta, detuning = np.array([2.0, PI, 1.0, 5.0]), np.array([0.7, 0.4, -1.1, 0.2])
    system = lossless(np.stack([0 * detuning, -detuning, 0 * detuning]) / tau)
    # Wings of the sech beyond 30 tau hold 1e-13 of the area.
    solution = evolve(
        system,
        (Sech.from_area(theta, center_s=0.0, tau_s=tau),),
        start="v",
        window_s=(-30 * tau, 30 * tau),
        method=ENGINES[engine],
    )
    expected = (np.sin(theta / 2) / np.cosh(PI * detuning / 2)) ** 2
    assert expected[0] == pytest.approx(0.2545211644, abs=1e-10)
    np.testing.assert_allclose(populations(solution)[1], expected, atol=PROMISE[engine], rtol=0)


@engines
def test_dephasing_of_a_pi_pulse(engine):
    # Rows 17 and 18: D sigma = 1e-3 costs 7.2808e-4, no decay; first order (D sigma/2) 1.45721730.
    rate_sigma = np.array([1e-3, 1e-5])
    system = ion(shared_linewidth_hz=rate_sigma / (PI * SIGMA))
    pulse = Gaussian.from_area(PI, center_s=0.0, sigma_s=SIGMA)
    method = Adaptive() if engine == "adaptive" else StaticGrid(1e-11)
    solution = evolve(system, (pulse,), start="v", window_s=(-8 * SIGMA, 8 * SIGMA), method=method)
    infidelity = 1 - populations(solution)[1]
    assert infidelity[0] == pytest.approx(7.2808e-4, rel=1e-4)
    assert infidelity[1] / (rate_sigma[1] / 2) == pytest.approx(1.45721730, rel=2e-5)


@functools.cache
def staggered():
    """Two overlapping step functions, their slices and the graph that they drive."""
    real_1, imag_1 = np.array([[5e4, -9e4, 2e4, 0.0, 7e4], [1e4, 3e4, -6e4, 0.0, 2e4]])
    real_2 = np.array([8e4, -3e4, 6e4])
    first = PiecewiseConstant(real_1, imag_1, -20e-6, 50e-6)
    second = PiecewiseConstant(real_2, None, 7e-6, 33e-6)
    noise = {"detuning_1_hz": 4e3, "detuning_2_hz": -2.5e3, "lifetime_s": 3e-4, "branching": 0.3}
    h, jumps = oracle.ion("lambda", **noise, shared_linewidth_hz=900.0)
    edges = [-30e-6, *(-20e-6 + 10e-6 * np.arange(6)), *(7e-6 + 11e-6 * np.arange(4)), 55e-6]
    rho = np.diag([1.0, 0.0, 0.0]).astype(complex)
    for a, b in zip(sorted(edges), sorted(edges)[1:], strict=False):
        k, n = math.floor(((a + b) / 2 + 20e-6) / 10e-6), math.floor(((a + b) / 2 - 7e-6) / 11e-6)
        one = real_1[k] + 1j * imag_1[k] if 0 <= k < 5 else 0.0
        two = real_2[n] if 0 <= n < 3 else 0.0
        rho = oracle.evolved(rho, h + oracle.drive("vsm", one, two), jumps, b - a)
    return ion(**noise, shared_linewidth_hz=900.0), (first, second), rho


@engines
def test_piecewise_constant_pulses_against_matrix_exponentials(engine):
    system, pulses, expected = staggered()
    solution = evolve(system, pulses, start="v", window_s=(-30e-6, 55e-6), method=ENGINES[engine])
    got = unpack_density(solution.state[0], 3)
    assert bool(solution.valid)
    np.testing.assert_allclose(got, expected, atol=PROMISE[engine])


def test_a_batch_of_piecewise_constant_pulses_is_its_lanes():
    # As many lanes as slices, and as many as Runge-Kutta stages: shapes that could be mistaken for each other.
    system, (first, second), expected = staggered()
    for lanes in (5, 13):
        scale = np.linspace(0.4, 1.0, lanes)
        batch = PiecewiseConstant(
            first.real_rad_s[:, None] * scale, first.imag_rad_s[:, None] * scale, first.start_s, first.duration_s
        )
        solution = evolve(system, (batch, second), start="v", window_s=(-30e-6, 55e-6))
        np.testing.assert_allclose(solution.populations[0, :, -1], np.diag(expected).real, atol=1e-8)
        lane = PiecewiseConstant(first.real_rad_s * 0.4, first.imag_rad_s * 0.4, first.start_s, first.duration_s)
        alone = evolve(system, (lane, second), start="v", window_s=(-30e-6, 55e-6))
        np.testing.assert_allclose(solution.populations[..., 0], alone.populations, atol=2e-8)


def test_a_stiff_rate_takes_the_population_to_the_leak_level():
    # The ladder's top lives for 38 ns under square pulses of 40 us: a product of exponentials is exact.
    stiff = {"detuning_1_hz": 3e3, "detuning_2_hz": 2e3, "lifetime_s": 52.7e-3, "branching": 0.4, "m_lifetime_s": 38e-9}
    one, two = 5e4, 2e6
    pulses = (
        PiecewiseConstant.square(one * 40e-6, center_s=20e-6, duration_s=40e-6),
        PiecewiseConstant.square(two * 40e-6, center_s=70e-6, duration_s=40e-6),
    )
    rho = np.diag([1.0, 0, 0, 0]).astype(complex)
    h, jumps = oracle.ion("ladder", **stiff)
    for omega_1, omega_2, duration in ((one, 0.0, 40e-6), (0.0, 0.0, 10e-6), (0.0, two, 40e-6)):
        rho = oracle.evolved(rho, h + oracle.drive("vsml", omega_1, omega_2), jumps, duration)
    expected = np.diag(rho).real
    assert expected[3] > 0.5
    for method, error in ((Adaptive(1e-9, 1e-10, stiff=True), 1e-7), (StaticGrid(), 1e-8)):
        solution = evolve(LADDER.system(**stiff), pulses, start="v", window_s=(0.0, 90e-6), method=method)
        np.testing.assert_allclose(populations(solution), expected, atol=error)


# ------------------------------------------------------------------------------------------------ invariants


@pytest.mark.parametrize("n", [3, 4])
def test_trace_hermiticity_and_positivity(n):
    rng = np.random.default_rng(n)
    lanes = 30
    uniform = lambda low, high: rng.uniform(low, high, lanes)
    scheme = LAMBDA if n == 3 else LADDER
    system = scheme.system(
        detuning_1_hz=uniform(-9e3, 9e3),
        detuning_2_hz=uniform(-9e3, 9e3),
        lifetime_s=uniform(1e-4, 1e-2),
        branching=uniform(0, 1),
        m_lifetime_s=uniform(1e-5, 1e-3),
        shared_linewidth_hz=uniform(0, 3e3),
        linewidth_2_hz=uniform(0, 3e3),
    )
    pulses = pair(uniform(0, 7), uniform(0, 7), uniform(0, 8) * SIGMA, phase_1_rad=0.4)
    window = (-6 * SIGMA, 15 * SIGMA)
    solution = evolve(system, pulses, start="v", window_s=window, save_s=np.linspace(*window, 9))
    assert np.all(solution.valid)
    np.testing.assert_allclose(solution.populations.sum(axis=1), 1, atol=1e-13)
    rho = np.moveaxis(np.array([unpack_density(state, n) for state in solution.state]), (1, 2), (-2, -1))
    np.testing.assert_array_equal(rho, np.conj(np.swapaxes(rho, -1, -2)))
    assert np.linalg.eigvalsh(rho).min() > -1e-8
    purity = np.einsum("...ij,...ji->...", rho, rho).real
    assert purity.max() < 1 + 1e-8
    assert purity[-1].min() < 0.7


def test_norm_of_a_closed_system():
    window = around(3 * SIGMA)
    solution = evolve(
        lossless(np.array([1.0, 0.0, -2.0]) / SIGMA),
        pair(6.0, 5.0, 3 * SIGMA),
        start="v",
        window_s=window,
        save_s=np.linspace(*window, 9),
    )
    np.testing.assert_allclose(solution.populations.sum(axis=1), 1, atol=1e-8)


# ------------------------------------------------------------------------------------------------ doors


def test_starts_may_be_a_level_a_ket_or_a_density_matrix():
    ket = np.array([0.6, 0.8j, 0.0])
    pulses, window = pair(1.0, 2.0, 6 * SIGMA), around(6 * SIGMA)
    level = evolve(ion(), pulses, start="v", window_s=window)
    np.testing.assert_array_equal(level.state, evolve(ion(), pulses, start=np.eye(3)[0], window_s=window).state)
    pure = evolve(lossless(), pulses, start=ket, window_s=window).populations
    np.testing.assert_allclose(evolve(ion(), pulses, start=ket, window_s=window).populations, pure, atol=2e-8)
    mixed = np.outer(ket, ket.conj())
    np.testing.assert_allclose(evolve(lossless(), pulses, start=mixed, window_s=window).populations, pure, atol=2e-8)


def test_fewer_pulses_than_couplings_leave_the_last_undriven():
    window = (-8 * SIGMA, 8 * SIGMA)
    first = pair(2.0, 0.0, 0.0)[0]
    alone = evolve(ion(), (first,), start="v", window_s=window)
    np.testing.assert_allclose(alone.populations[0], [math.cos(1) ** 2, math.sin(1) ** 2, 0.0], atol=1e-8)
    nothing = evolve(ion(), (), start="s", window_s=window)
    np.testing.assert_allclose(nothing.populations[0], [0, 1, 0], atol=1e-15)


@engines
def test_saved_times_of_each_lane(engine):
    separation = np.array([5.0, 9.0]) * SIGMA
    saves = np.stack([separation, separation + 8 * SIGMA, np.full(2, -8 * SIGMA)])  # in no order
    solution = evolve(
        ion(),
        pair(2.0, 1.0, separation),
        start="v",
        window_s=around(separation),
        save_s=saves[[2, 0, 1]],
        method=ENGINES[engine],
    )
    end = evolve(ion(), pair(2.0, 1.0, separation), start="v", window_s=around(separation), method=ENGINES[engine])
    np.testing.assert_array_equal(solution.t_s, saves[[2, 0, 1]])
    np.testing.assert_array_equal(solution.populations[0], [[1, 1], [0, 0], [0, 0]])
    np.testing.assert_allclose(solution.populations[2], end.populations[0], atol=2 * PROMISE[engine])
    # Half of pulse 2 at its centre.
    expected = separated_populations(2.0, 0.5)
    np.testing.assert_allclose(solution.populations[1, :, 1], expected, atol=1e-7)


@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
def test_numbers_of_few_axes_spread_over_the_batch(lanes):
    # A graph without batch axes under a batch of pulses, also of as many lanes as levels: 3 energies are no 3 lanes.
    areas = np.linspace(0.5, 2.5, lanes)
    system = ion(detuning_1_hz=6e3, detuning_2_hz=-9e3)
    batch = evolve(system, pair(areas, 1.0, 6 * SIGMA), start="v", window_s=around(6 * SIGMA))
    spread = ion(detuning_1_hz=np.full(lanes, 6e3), detuning_2_hz=np.full(lanes, -9e3))
    expected = evolve(spread, pair(areas, 1.0, 6 * SIGMA), start="v", window_s=around(6 * SIGMA))
    np.testing.assert_array_equal(batch.populations, expected.populations)


def test_two_batch_axes():
    areas, detuning = np.linspace(0.5, 2.5, 4)[:, None], np.array([0.0, 3e3, 8e3])
    solution = evolve(ion(detuning_1_hz=detuning), pair(areas, 1.0, 6 * SIGMA), start="v", window_s=around(6 * SIGMA))
    assert solution.populations.shape == (1, 3, 4, 3)
    assert solution.coverage.shape == (2, 4, 3)
    assert solution.valid.shape == solution.error_estimate.shape == (4, 3)
    lane = evolve(ion(detuning_1_hz=8e3), pair(2.5, 1.0, 6 * SIGMA), start="v", window_s=around(6 * SIGMA))
    np.testing.assert_allclose(solution.populations[0, :, 3, 2], lane.populations[0], atol=2e-8)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"start": "d"}, r"`start` must be one of the levels \('v', 's', 'm'\), but is 'd'"),
        ({"start": np.ones(4)}, r"`start` must be a ket \(3,\) or a density matrix \(3, 3\), but has shape \(4,\)"),
        ({"start": np.triu(np.ones((3, 3)))}, r"density matrix must be Hermitian"),
        ({"window_s": (1e-3, -1e-3)}, r"`window_s` must end after it begins.*times are in seconds"),
        ({"window_s": (0.0, 0.0)}, r"`window_s` must end after it begins"),
        ({"pulses": pair(1.0, 1.0, 1e-4) * 2}, r"4 pulses for 2 couplings"),
        ({"save_s": [1.0]}, r"`save_s`"),
        ({"save_s": [-1.0, 0.0]}, r"`save_s`"),
    ],
)
def test_a_bad_call_is_refused_in_a_sentence(call, sentence):
    right = {"pulses": pair(1.0, 1.0, 1e-4), "start": "v", "window_s": (-1e-4, 2e-4)}
    arguments = right | call
    with pytest.raises(ValueError, match=sentence):
        evolve(ion(), arguments.pop("pulses"), **arguments)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: StaticGrid(error=0.1), r"`error` must (be|lie) between 1e-13 and 1e-3"),
        (lambda: StaticGrid(error=1e-15), r"`error` must (be|lie) between 1e-13 and 1e-3"),
        (lambda: StaticGrid(error=math.nan), r"`error` must (be|lie) between 1e-13 and 1e-3"),
        (lambda: StaticGrid(steps=0), r"`steps` must be at least 1, but is 0"),
        (lambda: StaticGrid(differentiation="both"), r"`differentiation` must be 'reverse' .* or 'forward'"),
    ],
)
def test_a_bad_grid_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_single_precision_is_refused_once_and_clearly():
    code = (
        "from twin.dynamics import evolve\nfrom twin.levels import LAMBDA\nfrom twin.pulses import Gaussian\n"
        "s = LAMBDA.system(detuning_1_hz=0.0, detuning_2_hz=0.0, lifetime_s=1.0, branching=0.4)\n"
        "p = (Gaussian.from_area(1.0, center_s=0.0, sigma_s=1e-5),)\n"
        "try:\n    evolve(s, p, start='v', window_s=(-1e-4, 1e-4))\nexcept ValueError as e:\n    print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_ENABLE_X64": "0"},
        check=True,
    )
    assert done.stdout.startswith("64-bit JAX is switched off")
    assert "JAX_ENABLE_X64=1" in done.stdout
    assert done.stdout.count("\n") == 1


# ------------------------------------------------------------------------------------------------ steps and errors


def test_the_error_falls_with_the_eighth_power_of_the_step():
    pulse = Gaussian.from_area(2.7, center_s=0.0, sigma_s=SIGMA)
    # Detuned, so that nothing cancels. The window is the pulse's support: every step falls on the pulse.
    system = lossless(np.array([0.0, 1.2, 0.0]) / SIGMA)
    window = tuple(float(t) for t in pulse.support_s)
    solve = lambda method: populations(evolve(system, (pulse,), start="v", window_s=window, method=method))
    exact = solve(StaticGrid(1e-13))
    np.testing.assert_allclose(exact, solve(Adaptive(1e-13, 1e-15)), atol=1e-12)
    # Two segments of no length, outside the support, take one step each.
    steps = np.array([16, 24, 32])
    coarse = np.array([solve(StaticGrid(1e-3, steps=int(n) + 2)) for n in (*steps, *(2 * steps))])
    error = np.abs(coarse - exact).max(axis=1)
    order = np.log2(error[:3] / error[3:])
    assert np.all(order > 7.3)
    assert np.all(order < 9.2)


LANES = 200


@functools.cache
def random_devices():
    """Lambda ions all over the box: widths, overlap, detunings, noise."""
    rng = np.random.default_rng(7)
    uniform = lambda low, high: rng.uniform(low, high, LANES)
    sigma_1, sigma_2 = 10e-6 * 3 ** uniform(0, 1), 10e-6 * 3 ** uniform(0, 1)
    separation = uniform(0, 8) * np.hypot(sigma_1, sigma_2)
    system = ion(
        detuning_1_hz=uniform(-1e4, 1e4),
        detuning_2_hz=uniform(-1e4, 1e4),
        shared_linewidth_hz=uniform(0, 2e3),
        linewidth_1_hz=uniform(0, 2e3),
        linewidth_2_hz=uniform(0, 2e3),
        lifetime_s=10 ** uniform(-4, -1),
    )
    pulses = (
        Gaussian.from_area(uniform(0, 1.5 * PI), center_s=0.0, sigma_s=sigma_1),
        Gaussian.from_area(uniform(0, 1.5 * PI), center_s=separation, sigma_s=sigma_2),
    )
    return system, pulses, (-uniform(3, 7) * sigma_1, separation + uniform(3, 7) * np.maximum(sigma_1, sigma_2))


@functools.cache
def precise(count=LANES):
    system, pulses, window = random_devices()
    return evolve(system, pulses, start="v", window_s=window, method=StaticGrid(1e-13))


@pytest.mark.parametrize("error", [1e-6, 1e-8])
def test_static_grid_keeps_the_requested_error(error):
    system, pulses, window = random_devices()
    solution = evolve(system, pulses, start="v", window_s=window, method=StaticGrid(error))
    true = np.abs(populations(solution) - populations(precise())).max(axis=0)
    assert true.max() < error
    assert np.asarray(solution.error_estimate).max() <= error * (1 + 1e-6)


def test_error_estimates_hold_lane_by_lane():
    # Far fewer steps than the hungriest lane asks for: estimates from 1e-9 to 1e-3, the rest is refused.
    system, pulses, window = random_devices()
    for steps in (24, 48):
        solution = evolve(system, pulses, start="v", window_s=window, method=StaticGrid(1e-3, steps=steps))
        valid, estimate = np.asarray(solution.valid), np.asarray(solution.error_estimate)
        assert valid.sum() > 50
        np.testing.assert_array_equal(valid, estimate <= 1e-3)
        true = np.abs(solution.populations[0] - precise().populations[0]).max(axis=0)
        assert np.isnan(true[~valid]).all()
        assert np.all(true[valid] <= 3 * estimate[valid] + 1e-13)
        # Nor so careful that the grid is wasteful: somewhere the estimate is reached.
        assert np.max(true[valid] / estimate[valid]) > 0.02


def test_the_two_methods_agree_over_random_devices():
    system, pulses, window = random_devices()
    some = lambda tree: jax.tree.map(lambda a: a[..., :24] if np.shape(a)[-1:] == (LANES,) else a, tree)
    reference = evolve(some(system), some(pulses), start="v", window_s=some(window), method=Adaptive())
    np.testing.assert_allclose(populations(reference), populations(precise())[:, :24], atol=1e-10)


# ------------------------------------------------------------------------------------------------ lanes

PARAMETERS = {
    "theta_1": (0.0, 3.0),
    "theta_2": (0.0, 3.0),
    "sigma_s": (15e-6, 25e-6),
    "separation_s": (60e-6, 130e-6),
    "detuning_1_hz": (-5e3, 5e3),
    "detuning_2_hz": (-5e3, 5e3),
    "linewidth_hz": (0.0, 1e3),
    "lifetime_s": (1e-3, 1e-2),
    "stop_s": (2.0e-4, 2.4e-4),
}
HURT = 2  # the lane that changes


def solve_traced(values, method):
    """`evolve` with every value traced: what a fit does."""
    system = ion(
        detuning_1_hz=values["detuning_1_hz"],
        detuning_2_hz=values["detuning_2_hz"],
        shared_linewidth_hz=values["linewidth_hz"],
        lifetime_s=values["lifetime_s"],
    )
    pulses = pair(values["theta_1"], values["theta_2"], values["separation_s"], values["sigma_s"])
    return evolve(system, pulses, start="v", window_s=(-1e-4, values["stop_s"]), method=method)


solve_jitted = eqx.filter_jit(solve_traced)
LANE_METHODS = {"static grid": StaticGrid(1e-8, steps=128), "adaptive": Adaptive(1e-8, 1e-9, max_steps=1024)}


@functools.cache
def healthy(method):
    rng = np.random.default_rng(3)
    values = {name: jnp.asarray(rng.uniform(*box, 5)) for name, box in PARAMETERS.items()}
    return values, solve_jitted(values, LANE_METHODS[method])


def assert_others_untouched(solution, reference):
    """Bitwise, in everything that a solution says."""
    for one, other in zip(jax.tree.leaves(solution), jax.tree.leaves(reference), strict=True):
        keep = np.arange(5) != HURT
        np.testing.assert_array_equal(np.asarray(one)[..., keep], np.asarray(other)[..., keep])


@pytest.mark.parametrize("method", list(LANE_METHODS))
@pytest.mark.parametrize("name", list(PARAMETERS))
def test_another_value_in_one_lane_does_not_reach_the_others(name, method):
    values, reference = healthy(method)
    low, high = PARAMETERS[name]
    other = low + 0.9 * (high - low)
    solution = solve_jitted(values | {name: values[name].at[HURT].set(other)}, LANE_METHODS[method])
    assert_others_untouched(solution, reference)
    assert np.all(solution.valid)
    assert not np.array_equal(solution.populations[..., HURT], reference.populations[..., HURT])


@pytest.mark.parametrize("method", list(LANE_METHODS))
@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, math.nan) for name in PARAMETERS]
    + [
        ("theta_1", math.inf),
        ("sigma_s", math.inf),
        ("sigma_s", -2e-5),
        ("detuning_1_hz", math.inf),
        ("linewidth_hz", -500.0),
        ("linewidth_hz", math.inf),
        ("lifetime_s", -1e-4),
        ("lifetime_s", 0.0),
        ("stop_s", -2e-4),
        ("stop_s", math.inf),
    ],
)
def test_a_bad_lane_is_nan_and_flagged_and_alone(name, bad, method):
    values, reference = healthy(method)
    solution = solve_jitted(values | {name: values[name].at[HURT].set(bad)}, LANE_METHODS[method])
    assert not bool(solution.valid[HURT])
    assert np.isnan(solution.populations[..., HURT]).all()
    assert np.isnan(solution.state[..., HURT]).all()
    assert_others_untouched(solution, reference)


@pytest.mark.parametrize("bad", [math.nan, 400.0], ids=["NaN", "too many turns for the grid"])
def test_gradients_do_not_cross_lanes(bad):
    values, _ = healthy("static grid")

    @eqx.filter_jit
    def gradient(values):
        def loss(values):
            solution = solve_traced(values, StaticGrid(1e-8, steps=128))
            return jnp.sum(jnp.where(solution.valid, solution.populations[0, 1], 0.0))

        return jax.grad(loss)(values)

    reference = gradient(values)
    hurt = gradient(values | {"theta_1": values["theta_1"].at[HURT].set(bad)})
    keep = np.arange(5) != HURT
    for name in PARAMETERS:
        assert np.all(np.isfinite(reference[name])), name
        np.testing.assert_array_equal(hurt[name][keep], reference[name][keep], err_msg=name)


def test_lanes_that_need_more_steps_are_flagged():
    areas = np.array([1.0, 3.0, 40.0, 2.0, 400.0])
    solution = evolve(
        ion(), pair(areas, 1.0, 6 * SIGMA), start="v", window_s=around(6 * SIGMA), method=StaticGrid(1e-8, steps=64)
    )
    np.testing.assert_array_equal(solution.valid, [True, True, False, True, False])
    np.testing.assert_array_equal(np.isnan(solution.populations).all(axis=(0, 1)), ~np.asarray(solution.valid))
    assert np.all(np.asarray(solution.error_estimate)[[2, 4]] > 1e-8)


def test_a_grid_too_coarse_raises_at_the_unbatched_door():
    with pytest.raises(ValueError, match="the static grid is too coarse for the requested error; raise `steps`"):
        evolve(ion(), pair(40.0, 1.0, 6 * SIGMA), start="v", window_s=around(6 * SIGMA), method=StaticGrid(steps=64))


def test_an_adaptive_solver_without_steps_left_raises_or_flags():
    few = Adaptive(max_steps=8)
    with pytest.raises(ValueError, match=r"the adaptive solver did not reach the end; raise `max_steps`"):
        evolve(ion(), pair(3.0, 1.0, 6 * SIGMA), start="v", window_s=around(6 * SIGMA), method=few)
    batch = evolve(ion(), pair([3.0, 1.0], 1.0, 6 * SIGMA), start="v", window_s=around(6 * SIGMA), method=few)
    assert not np.any(batch.valid)
    assert np.isnan(batch.populations).all()


@engines
def test_a_pulse_that_no_step_has_seen(engine):
    # The window ends before the pulse begins.
    late = (-8 * SIGMA, 20 * SIGMA)
    system = ion()
    with pytest.raises(ValueError, match=r"a pulse was stepped over: .* widen `window_s`"):
        evolve(system, pair(1.0, 1.0, 60 * SIGMA), start="v", window_s=late, method=ENGINES[engine])
    method = ENGINES[engine] if engine == "adaptive" else StaticGrid(steps=64)
    traced = eqx.filter_jit(
        lambda separation: evolve(system, pair(1.0, 1.0, separation), start="v", window_s=late, method=method)
    )
    with pytest.raises(Exception, match="a pulse was stepped over"):
        traced(jnp.asarray(60 * SIGMA)).state.block_until_ready()
    batch = traced(jnp.array([6.0, 60.0]) * SIGMA)
    np.testing.assert_array_equal(batch.valid, [True, False])
    assert np.isnan(batch.populations[..., 1]).all()
    assert batch.coverage[1, 1] == 0
    assert np.all(batch.coverage[:, 0] > 0)


@engines
def test_a_narrow_pulse_in_a_long_window_is_seen(engine):
    # An adaptive solver without knots at the pulse integrates this to exactly nothing.
    pulse = Gaussian.from_area(PI, center_s=3.217e-3, sigma_s=1e-6)
    solution = evolve(ion(), (pulse,), start="v", window_s=(0.0, 10e-3), method=ENGINES[engine])
    assert populations(solution)[1] == pytest.approx(1.0, abs=1e-8)
    assert solution.coverage[0] >= 4
    square = PiecewiseConstant.square(PI, center_s=7.7e-3, duration_s=1e-6)
    solution = evolve(ion(), (square,), start="v", window_s=(0.0, 10e-3), method=ENGINES[engine])
    assert populations(solution)[1] == pytest.approx(1.0, abs=1e-8)
    assert solution.coverage[0] >= 1


def test_coverage_counts_the_steps_under_each_pulse():
    # Nothing but the square pulses takes steps, in proportion to their Rabi frequencies times their lengths.
    pulses = (
        PiecewiseConstant.square(2.0, center_s=0.0, duration_s=10e-6),
        PiecewiseConstant.square(6.0, center_s=50e-6, duration_s=20e-6),
    )
    for steps in (64, 128):
        solution = evolve(lossless(), pulses, start="v", window_s=(-20e-6, 80e-6), method=StaticGrid(1e-3, steps=steps))
        first, second = (int(n) for n in solution.coverage)
        assert steps - 12 <= first + second <= steps
        assert second / first == pytest.approx(3, rel=0.15)
    reference = evolve(lossless(), pulses, start="v", window_s=(-20e-6, 80e-6), method=Adaptive())
    assert np.all(reference.coverage >= 3)


def test_an_adaptive_batch_is_its_lanes():
    theta, separation = np.array([0.4, 2.0, 3.1]), np.array([0.0, 3.0, 9.0]) * SIGMA
    linewidth = np.array([0.0, 300.0, 3e3])
    batch = evolve(
        ion(shared_linewidth_hz=linewidth),
        pair(theta, 1.0, separation),
        start="v",
        window_s=around(separation),
        method=Adaptive(),
    )
    for k in range(3):
        lane = evolve(
            ion(shared_linewidth_hz=linewidth[k]),
            pair(theta[k], 1.0, separation[k]),
            start="v",
            window_s=around(separation[k]),
            method=Adaptive(),
        )
        np.testing.assert_allclose(batch.populations[..., k], lane.populations, atol=1e-13)
        # Each lane has chosen its own steps.
        np.testing.assert_array_equal(batch.coverage[..., k], lane.coverage)


# ------------------------------------------------------------------------------------------------ derivatives

AT = {
    "theta_1": 1.9,
    "theta_2": 1.1,
    "sigma_s": 21e-6,
    "separation_s": 75e-6,
    "detuning_1_hz": 3e3,
    "detuning_2_hz": -2e3,
    "linewidth_hz": 600.0,
    "lifetime_s": 3e-3,
    "stop_s": 2e-4,
}


@functools.cache
def derivatives():
    """d populations / d log(parameter): by central differences, all in one batch."""
    step = 1e-4
    lanes = np.repeat(np.array(list(AT.values()))[:, None], 2 * len(AT), axis=1)
    for k in range(len(AT)):
        lanes[k, 2 * k] *= 1 + step
        lanes[k, 2 * k + 1] *= 1 - step
    values = {name: jnp.asarray(lane) for name, lane in zip(AT, lanes, strict=True)}
    solution = solve_traced(values, StaticGrid(1e-13))
    return (populations(solution)[:, ::2] - populations(solution)[:, 1::2]) / (2 * step)


@functools.cache
def jacobian(differentiation):
    method = StaticGrid(1e-10, steps=192, differentiation=differentiation)
    outputs = lambda values: solve_traced(values, method).populations[0]
    transform = jax.jacrev if differentiation == "reverse" else jax.jacfwd
    values = {name: jnp.asarray(value) for name, value in AT.items()}
    result = eqx.filter_jit(transform(outputs))(values)
    return np.stack([result[name] * AT[name] for name in AT], axis=1)


@pytest.mark.parametrize("differentiation", ["reverse", "forward"])
def test_derivatives_are_the_finite_differences(differentiation):
    expected = derivatives()
    # Each parameter moves something by more than the tolerance.
    assert np.all(np.abs(expected).max(axis=0) > 1e-4)
    np.testing.assert_allclose(jacobian(differentiation), expected, atol=2e-7)


def test_forward_and_reverse_mode_agree():
    np.testing.assert_allclose(jacobian("forward"), jacobian("reverse"), atol=1e-12)


def test_derivatives_of_the_closed_form():
    # dy/dtheta_1 = sin(theta_1) cos^2(theta_2/2)/2, dy/dtheta_2 = -(x/2) sin theta_2: exact, no finite difference.
    output = eqx.filter_jit(
        jax.grad(
            lambda theta: evolve(
                lossless(),
                pair(theta[0], theta[1], 13 * SIGMA),
                start="v",
                window_s=around(13 * SIGMA),
                method=StaticGrid(1e-10, steps=192),
            ).populations[0, 1]
        )
    )
    got = output(jnp.array([1.3, 2.2]))
    expected = [math.sin(1.3) * math.cos(1.1) ** 2 / 2, -(math.sin(0.65) ** 2) / 2 * math.sin(2.2)]
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_derivatives_at_zero_area_are_finite():
    gradient = eqx.filter_jit(
        jax.jacrev(
            lambda a: evolve(
                ion(), pair(a[0], a[1], 6 * SIGMA), start="v", window_s=around(6 * SIGMA), method=StaticGrid(steps=96)
            ).populations[0]
        )
    )(jnp.zeros(2))
    np.testing.assert_allclose(gradient, 0.0, atol=1e-12)

"""`evolve` against exact solutions, reference values and independent operators; its grids, flags and gradients."""

import dataclasses
import functools
import itertools
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

# theta_1, theta_2, DT/sigma, d_v sigma, and the populations: by an integration apart from this code, and exact at
# DT = 0 and far apart.
ROWS_V = {
    "pi/2, pi/2, 2 sigma": (PI / 2, PI / 2, 2, 0.0, (0.5041948112, 0.2741327549, 0.2216724339)),
    "pi, pi, 2 sigma": (PI, PI, 2, 0.0, (0.0013465530, 0.0019125407, 0.9967409063)),
    "pi, pi, at once": (PI, PI, 0, 0.0, (0.0388681487, 0.3165638355, 0.6445680158)),
    "pi/2, pi/2, 4 sigma": (PI / 2, PI / 2, 4, 0.0, (0.5000409782, 0.2507196016, 0.2492394201)),
    "pi/2, pi/2, 8 sigma, detuned": (PI / 2, PI / 2, 8, 0.3, (0.5439623059, 0.2280188475, 0.2280188466)),
    "apart": (2 * math.asin(math.sqrt(0.6)), 2 * math.asin(math.sqrt(0.3)), 13, 0.0, (0.4, 0.42, 0.18)),
}
ROWS_S = {"pi/2, pi/2, 2 sigma": (PI / 2, PI / 2, 2, 0.0, (0.4935761142, 0.2322911309, 0.2741327549))}
# theta, delta sigma, P of one Gaussian pulse, integrated apart from this code; a detuning of either sign.
DETUNED = np.array(
    [
        (PI, 0.05, 0.99722942),
        (PI, 0.1, 0.98896266),
        (PI, 0.2, 0.95656088),
        (PI, 0.5, 0.75707799),
        (PI, -0.2, 0.95656088),
        (PI / 2, 0.2, 0.47996314),
    ]
)
WEAK, WEAK_DETUNING = 1e-3, np.array([0.0, 0.7, 1.5])
# D sigma of a resonant pi pulse.
DEPHASED = np.array([1e-3, 1e-5])
RANDOM_1, RANDOM_2 = RNG.uniform(0, PI, (2, 50))
ORDERS = (1.1, 2.3, np.array([1.5, -1.5]))  # the same two pulses in either order


@functools.cache
def solved(engine, start, equation):
    """All of the above in one batch: populations by name."""
    rows = np.array([row[:4] for row in (*ROWS_V.values(), *ROWS_S.values())])
    zeros = np.zeros_like
    groups = {  # theta_1, theta_2, DT/sigma, delta_1 sigma, D sigma
        "rows": (*rows.T, zeros(rows[:, 0])),
        "separated": (RANDOM_1, RANDOM_2, 13, 0, 0),
        "simultaneous": (RANDOM_1, RANDOM_2, 0, 0, 0),
        "orders": (*ORDERS, 0, 0),
        "detuned": (DETUNED[:, 0], 0, 0, DETUNED[:, 1], 0),
        "weak": (WEAK, 0, 0, WEAK_DETUNING, 0),
        "dephased": (PI, 0, 0, 0, DEPHASED if equation == "lindblad" else zeros(DEPHASED)),
    }
    spread = [np.broadcast_arrays(*(np.asarray(v, float) for v in group)) for group in groups.values()]
    theta_1, theta_2, separation, detuning, rate = np.concatenate(spread, axis=1)
    if equation == "schroedinger":
        system = lossless(np.stack([detuning, zeros(detuning), zeros(detuning)]) / SIGMA)
    else:
        # Lambda: E_v = 0, E_s = -d1, E_m = -d1 + d2. A shift of v alone is a detuning of line 1 alone.
        system = ion(detuning_1_hz=detuning / (2 * PI * SIGMA), shared_linewidth_hz=rate / (PI * SIGMA))
    separation = separation * SIGMA
    window = np.minimum(0, separation) - 8 * SIGMA, np.maximum(0, separation) + 8 * SIGMA
    solution = evolve(system, pair(theta_1, theta_2, separation), start=start, window_s=window, method=ENGINES[engine])
    lengths = np.cumsum([group[0].size for group in spread])
    return dict(zip(groups, np.split(populations(solution), lengths[:-1], axis=1), strict=True))


every_solution = pytest.mark.parametrize(
    ("engine", "start", "equation"),
    [(e, s, q) for e in ENGINES for s, q in (("v", "schroedinger"), ("s", "schroedinger"), ("v", "lindblad"))],
)


@every_solution
def test_reference_populations(engine, start, equation):
    rows, expected = solved(engine, start, equation)["rows"], ROWS_V if start == "v" else ROWS_S
    rows = rows[:, : len(ROWS_V)] if start == "v" else rows[:, len(ROWS_V) :]
    np.testing.assert_allclose(rows.T, [row[-1] for row in expected.values()], atol=1e-8, rtol=0)
    if start == "v":
        assert rows[1, -1] == pytest.approx(0.42, abs=1e-9)


@every_solution
def test_closed_form_at_thirteen_sigma(engine, start, equation):
    # cos^2 and sin^2 of half the areas, one pulse after the other.
    expected = np.array(separated_populations(RANDOM_1, RANDOM_2, start))
    got = solved(engine, start, equation)["separated"]
    np.testing.assert_allclose(got, expected, atol=PROMISE[engine], rtol=0)


@every_solution
def test_simultaneous_pulses_are_exact(engine, start, equation):
    # Equal envelopes turn v, s and m about one axis: rotations by hypot(theta_1, theta_2).
    expected = np.array(simultaneous_populations(RANDOM_1, RANDOM_2, start))
    got = solved(engine, start, equation)["simultaneous"]
    np.testing.assert_allclose(got, expected, atol=PROMISE[engine], rtol=0)


@every_solution
def test_populations_sum_to_one(engine, start, equation):
    for group in solved(engine, start, equation).values():
        # The trace is a linear invariant, which every Runge-Kutta step keeps; the norm of a ket is not.
        error = 1e-13 if equation == "lindblad" else PROMISE[engine]
        np.testing.assert_allclose(group.sum(axis=0), 1, atol=error)
        assert group.min() > -PROMISE[engine]


@pytest.mark.parametrize("equation", ["schroedinger", "lindblad"])
@engines
def test_swapping_the_order_leaves_the_untouched_population(engine, equation):
    # (start v, order 1-2) P_v equals (order 2-1) P_v. The other two populations differ.
    one, other = solved(engine, "v", equation)["orders"].T
    assert one[0] == pytest.approx(other[0], abs=2 * PROMISE[engine])
    assert abs(one[1] - other[1]) > 0.05


@pytest.mark.parametrize("equation", ["schroedinger", "lindblad"])
@engines
def test_detuned_gaussian_pulses(engine, equation):
    p_s = solved(engine, "v", equation)["detuned"][1]
    np.testing.assert_allclose(p_s, DETUNED[:, 2], atol=1e-8 + PROMISE[engine])
    assert (1 - p_s[0]) / 0.05**2 == pytest.approx(1.11, abs=0.005)
    # Perturbation theory: (theta^2/4) exp(-delta^2 sigma^2), up to theta^4.
    weak = WEAK**2 / 4 * np.exp(-(WEAK_DETUNING**2))
    np.testing.assert_allclose(solved(engine, "v", equation)["weak"][1], weak, atol=WEAK**4 + PROMISE[engine] / 10)


@engines
def test_dephasing_of_a_pi_pulse(engine):
    # D sigma = 1e-3 costs 7.2808e-4 without decay; to first order the cost is (D sigma/2) 1.45721730.
    infidelity = 1 - solved(engine, "v", "lindblad")["dephased"][1]
    assert infidelity[0] == pytest.approx(7.2808e-4, rel=1e-4)
    if engine == "adaptive":
        assert infidelity[1] / (DEPHASED[1] / 2) == pytest.approx(1.45721730, rel=2e-5)


@engines
def test_separated_pulses_resolved_in_time(engine):
    # Both starts are lanes of one program; save times differ from lane to lane.
    theta_1, theta_2 = RANDOM_1[:6], RANDOM_2[:6]
    times = np.linspace(-7 * SIGMA, 20 * SIGMA, 28)[:, None] + np.linspace(0, 0.4, 6) * SIGMA
    for start in ("v", "s"):
        solution = evolve(
            lossless(),
            pair(theta_1, theta_2, 13 * SIGMA),
            start=start,
            window_s=around(13 * SIGMA),
            save_s=times,
            method=ENGINES[engine],
        )
        partial_1 = partial_area(times, theta_1, 0.0, SIGMA)
        partial_2 = partial_area(times, theta_2, 13 * SIGMA, SIGMA)
        expected = np.stack(separated_populations(partial_1, partial_2, start), axis=1)
        assert np.all(solution.valid)
        np.testing.assert_allclose(solution.populations, expected, atol=PROMISE[engine], rtol=0)
        np.testing.assert_array_equal(solution.t_s, times)


@pytest.mark.parametrize("start", ["v", "s"])
def test_laser_phases(start):
    # Lanes 1 to 4: no closed loop, so that the phases are gauge, whatever the overlap and the detuning.
    # Last lane: the amplitudes of separated pulses carry them.
    phase = np.array([[0.0, 0.0], [1.2, 0.0], [0.0, -2.9], [4.0, 2.0], [0.9, -1.7]]).T
    separation = SIGMA * np.array([1.3, 1.3, 1.3, 1.3, 13])
    energies = np.array([0.2, 0.0, -0.3])[:, None] / SIGMA * np.array([1.0, 1, 1, 1, 0])
    solution = evolve(
        lossless(energies),
        pair(2.0, 1.4, separation, phase_1_rad=phase[0], phase_2_rad=phase[1]),
        start=start,
        window_s=around(separation),
    )
    overlapping = populations(solution)[:, :4]
    np.testing.assert_allclose(overlapping, np.repeat(overlapping[:, :1], 4, axis=1), atol=1e-13)
    assert np.ptp(solution.state[0, :, :4], axis=1).max() > 0.1
    amplitudes = np.asarray(solution.state[0, :3, 4] + 1j * solution.state[0, 3:, 4])
    expected = np.array(separated_amplitudes(2.0, 1.4, start, phase_1_rad=0.9, phase_2_rad=-1.7))
    np.testing.assert_allclose(amplitudes, expected, atol=1e-8)


@pytest.mark.parametrize("equation", ["schroedinger", "lindblad"])
def test_a_detuned_ion_keeps_its_phase_while_it_waits(equation):
    # Free turns of a coherence cost steps too: five turns between v and s, ten between s and m.
    delta, wait = 2 * PI * 5e3, 1e-3
    energies = np.array([0.0, -delta, delta])
    if equation == "schroedinger":
        system, start = lossless(energies), np.ones(3) / math.sqrt(3)
    else:
        system, start = ion(detuning_1_hz=5e3, detuning_2_hz=10e3), np.full((3, 3), 1 / 3)
    state = evolve(system, (), start=start, window_s=(0.0, wait)).state[0]
    ket = np.exp(-1j * energies * wait) / math.sqrt(3)
    if equation == "schroedinger":
        np.testing.assert_allclose(state[:3] + 1j * state[3:], ket, atol=1e-8)
    else:
        np.testing.assert_allclose(unpack_density(state, 3), np.outer(ket, ket.conj()), atol=1e-8)


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


# DT/sigma, max |dP|, max |dP_v|, RSD(y), by an integration apart from this code.
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


@engines
def test_relative_deviation_of_three_in_ten_thousand_at_4_71_sigma(engine):
    # RSD(y) = 0.03 % at DT = 4.71 sigma, within one per cent.
    around_it = 4.71 * np.array([0.99, 1.01])
    rsd = deviation(Adaptive(1e-9, 1e-10) if engine == "adaptive" else StaticGrid(), around_it)[2]
    crossing = np.interp(-math.log(3e-4), -np.log(rsd), around_it)
    assert rsd[1] < 3e-4 < rsd[0]
    assert crossing == pytest.approx(4.71, abs=0.01)


# ------------------------------------------------------------------------------------------------ other pulse shapes


@engines
def test_rosen_zener(engine):
    # P = sin^2(theta/2) sech^2(pi delta tau/2).
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


# As many lanes as slices, and as many as Runge-Kutta stages: shapes that could be mistaken for each other.
@pytest.mark.parametrize(("engine", "lanes"), [("adaptive", 2), ("static grid", 5), ("static grid", 13)])
def test_piecewise_constant_pulses_against_matrix_exponentials(engine, lanes):
    # Two overlapping step functions, one of complex slices, on a detuned and noisy ion.
    slices_1 = np.array([5e4 + 1e4j, -9e4 + 3e4j, 2e4 - 6e4j, 0.0, 7e4 + 2e4j])[:, None] * np.linspace(0.4, 1, lanes)
    slices_2 = np.array([8e4, -3e4, 6e4])
    pulses = (
        PiecewiseConstant(slices_1.real, slices_1.imag, -20e-6, 50e-6),
        PiecewiseConstant(slices_2, None, 7e-6, 33e-6),
    )
    noise = {"detuning_1_hz": 4e3, "detuning_2_hz": -2.5e3, "lifetime_s": 3e-4, "branching": 0.3}
    noise |= {"shared_linewidth_hz": 900.0}
    window = (-30e-6, 55e-6)
    solution = evolve(ion(**noise), pulses, start="v", window_s=window, method=ENGINES[engine])
    assert np.all(solution.valid)

    h, jumps = oracle.ion("lambda", **noise)
    edges = sorted([*window, *(-20e-6 + 10e-6 * np.arange(6)), *(7e-6 + 11e-6 * np.arange(4))])
    for lane in range(lanes):
        rho = np.diag([1.0, 0.0, 0.0]).astype(complex)
        for a, b in itertools.pairwise(edges):
            k, n = math.floor(((a + b) / 2 + 20e-6) / 10e-6), math.floor(((a + b) / 2 - 7e-6) / 11e-6)
            one, two = slices_1[k, lane] if 0 <= k < 5 else 0.0, slices_2[n] if 0 <= n < 3 else 0.0
            rho = oracle.evolved(rho, h + oracle.drive("vsm", one, two), jumps, b - a)
        got = unpack_density(solution.state[0, :, lane], 3)
        np.testing.assert_allclose(got, rho, atol=PROMISE[engine])


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
    method = Adaptive(1e-9, 1e-10, stiff=True)
    solution = evolve(LADDER.system(**stiff), pulses, start="v", window_s=(0.0, 90e-6), method=method)
    np.testing.assert_allclose(populations(solution), expected, atol=1e-7)


# ------------------------------------------------------------------------------------------------ invariants


def test_trace_hermiticity_and_positivity():
    rng, lanes = np.random.default_rng(4), 30
    uniform = lambda low, high: rng.uniform(low, high, lanes)
    system = LADDER.system(
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
    rho = np.moveaxis(np.array([unpack_density(state, 4) for state in solution.state]), (1, 2), (-2, -1))
    np.testing.assert_array_equal(rho, np.conj(np.swapaxes(rho, -1, -2)))
    assert np.linalg.eigvalsh(rho).min() > -1e-8
    purity = np.einsum("...ij,...ji->...", rho, rho).real
    assert purity.max() < 1 + 1e-8
    assert purity[-1].min() < 0.7


# ------------------------------------------------------------------------------------------------ doors


def test_starts_may_be_a_level_a_ket_or_a_density_matrix():
    ket = np.array([0.6, 0.8j, 0.0])
    pulses, window = pair(1.0, 2.0, 6 * SIGMA), around(6 * SIGMA)
    level = evolve(ion(), pulses, start="v", window_s=window)
    np.testing.assert_array_equal(level.state, evolve(ion(), pulses, start=np.eye(3)[0], window_s=window).state)
    pure = evolve(lossless(), pulses, start=ket, window_s=window).populations
    for start in (ket, np.outer(ket, ket.conj())):
        mixed = evolve(ion(), pulses, start=start, window_s=window).populations
        np.testing.assert_allclose(mixed, pure, atol=2e-8)
    # A mixed state of a closed graph has no ket.
    mixed = evolve(lossless(), pulses, start=np.diag([0.5, 0.5, 0.0]), window_s=window).populations
    assert mixed.sum() == pytest.approx(1, abs=1e-13)


@engines
def test_fewer_pulses_than_couplings_leave_the_last_undriven(engine):
    window = (-8 * SIGMA, 8 * SIGMA)
    alone = evolve(ion(), pair(2.0, 0.0, 0.0)[:1], start="v", window_s=window, method=ENGINES[engine])
    expected = [math.cos(1) ** 2, math.sin(1) ** 2, 0.0]
    np.testing.assert_allclose(alone.populations[0], expected, atol=PROMISE[engine])
    nothing = evolve(ion(), (), start="s", window_s=window, method=ENGINES[engine])
    np.testing.assert_allclose(nothing.populations[0], [0, 1, 0], atol=1e-15)
    assert nothing.coverage.shape == (0,)


def test_a_saved_end_is_the_end():
    pulses, window = pair(2.0, 1.0, 6 * SIGMA), around(6 * SIGMA)
    solution = evolve(ion(), pulses, start="v", window_s=window, save_s=[window[0], 6 * SIGMA, window[1]])
    end = evolve(ion(), pulses, start="v", window_s=window)
    np.testing.assert_array_equal(solution.populations[0], [1, 0, 0])
    np.testing.assert_allclose(solution.populations[2], end.populations[0], atol=2e-8)
    np.testing.assert_array_equal(end.t_s, [window[1]])


def test_numbers_of_few_axes_spread_over_the_batch():
    # A graph without batch axes under as many pulses as it has levels: three energies are no three lanes.
    areas, separation = np.linspace(0.5, 2.5, 12).reshape(4, 3), np.array([6.0, 7.0, 8.0]) * SIGMA
    graphs = [ion(detuning_1_hz=d, detuning_2_hz=-9e3) for d in (6e3, np.full((4, 3), 6e3))]
    few, all_spread = (
        evolve(graph, pair(areas, 1.0, separation), start="v", window_s=around(9 * SIGMA)) for graph in graphs
    )
    np.testing.assert_allclose(few.populations, all_spread.populations, atol=1e-14)
    assert few.populations.shape == (1, 3, 4, 3)
    assert few.state.shape == (1, 9, 4, 3)
    assert few.t_s.shape == (1, 4, 3)
    assert few.coverage.shape == (2, 4, 3)
    assert few.valid.shape == few.error_estimate.shape == (4, 3)


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
    # Two segments of no length, outside the support, take one step each.
    coarse = np.array([solve(StaticGrid(1e-3, steps=n + 2)) for n in (16, 22, 32, 44)])
    error = np.abs(coarse - exact).max(axis=1)
    order = np.log2(error[:2] / error[2:])
    assert np.all(order > 7.3)
    assert np.all(order < 9.2)


LANES = 200


@functools.cache
def random_devices(equation):
    """Ions all over the box: areas, widths, overlap, detunings, noise, and lone pulses."""
    rng = np.random.default_rng(7)
    uniform = lambda low, high: rng.uniform(low, high, LANES)
    sigma_1, sigma_2 = 10e-6 * 3 ** uniform(0, 1), 10e-6 * 3 ** uniform(0, 1)
    separation = uniform(0, 16) * np.hypot(sigma_1, sigma_2)
    detuning_1, detuning_2 = uniform(-1e4, 1e4), uniform(-1e4, 1e4)
    if equation == "lindblad":
        system = ion(
            detuning_1_hz=detuning_1,
            detuning_2_hz=detuning_2,
            shared_linewidth_hz=uniform(0, 2e3),
            linewidth_1_hz=uniform(0, 2e3),
            linewidth_2_hz=uniform(0, 2e3),
            lifetime_s=10 ** uniform(-4, -1),
        )
    else:
        system = lossless(2 * PI * np.stack([0 * detuning_1, -detuning_1, detuning_2 - detuning_1]))
    area_2 = np.where(np.arange(LANES) % 8 == 0, 0.0, uniform(0, 1.5 * PI))
    pulses = (
        Gaussian.from_area(uniform(0, 1.5 * PI), center_s=0.0, sigma_s=sigma_1),
        Gaussian.from_area(area_2, center_s=separation, sigma_s=sigma_2),
    )
    return system, pulses, (-uniform(3, 9) * sigma_1, separation + uniform(3, 9) * np.maximum(sigma_1, sigma_2))


def on_random_devices(equation, method, lanes=LANES):
    some = lambda a: a[..., :lanes] if np.shape(a)[-1:] == (LANES,) else a
    system, pulses, window = jax.tree.map(some, random_devices(equation))
    return evolve(system, pulses, start="v", window_s=window, method=method)


precise = functools.cache(lambda equation: populations(on_random_devices(equation, StaticGrid(1e-13))))


@pytest.mark.parametrize(("equation", "error"), [("lindblad", 1e-6), ("lindblad", 1e-8), ("schroedinger", 1e-8)])
def test_static_grid_keeps_the_requested_error(equation, error):
    solution = on_random_devices(equation, StaticGrid(error))
    true = np.abs(populations(solution) - precise(equation)).max(axis=0)
    assert true.max() < error
    assert np.asarray(solution.error_estimate).max() <= error * (1 + 1e-6)


def test_error_estimates_hold_lane_by_lane():
    # Far fewer steps than the hungriest lane asks for: estimates from 1e-9 to 1e-3, the rest is refused.
    solution = on_random_devices("lindblad", StaticGrid(1e-3, steps=22))
    valid, estimate = np.asarray(solution.valid), np.asarray(solution.error_estimate)
    assert 50 < valid.sum() < LANES
    np.testing.assert_array_equal(valid, estimate <= 1e-3)
    true = np.abs(solution.populations[0] - precise("lindblad")).max(axis=0)
    assert np.isnan(true[~valid]).all()
    assert np.all(true[valid] <= 3 * estimate[valid] + 1e-13)
    # Nor so careful that the grid is wasteful: somewhere the estimate is nearly reached.
    assert np.max(true[valid] / estimate[valid]) > 0.02


def test_the_two_methods_agree_over_random_devices():
    reference = populations(on_random_devices("lindblad", Adaptive(), lanes=24))
    np.testing.assert_allclose(reference, precise("lindblad")[:, :24], atol=1e-10)


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
    return evolve(system, pulses, start="v", window_s=(-8 * SIGMA, values["stop_s"]), method=method)


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


@eqx.filter_jit
@jax.grad
def gradient_of_valid_lanes(values):
    solution = solve_traced(values, LANE_METHODS["static grid"])
    return jnp.sum(jnp.where(solution.valid, solution.populations[0, 1], 0.0))


@pytest.mark.parametrize("bad", [math.nan, 400.0], ids=["NaN", "too many turns for the grid"])
def test_gradients_do_not_cross_lanes(bad):
    values, _ = healthy("static grid")
    reference = gradient_of_valid_lanes(values)
    hurt = gradient_of_valid_lanes(values | {"theta_1": values["theta_1"].at[HURT].set(bad)})
    keep = np.arange(5) != HURT
    for name in PARAMETERS:
        assert np.all(np.isfinite(reference[name])), name
        np.testing.assert_array_equal(hurt[name][keep], reference[name][keep], err_msg=name)


def test_lanes_that_need_more_steps_are_flagged():
    values, _ = healthy("static grid")
    areas = jnp.array([1.0, 3.0, 90.0, 2.0, 400.0])
    solution = solve_jitted(values | {"theta_1": areas}, LANE_METHODS["static grid"])
    np.testing.assert_array_equal(solution.valid, [True, True, False, True, False])
    np.testing.assert_array_equal(np.isnan(solution.populations).all(axis=(0, 1)), ~np.asarray(solution.valid))
    assert np.all(np.asarray(solution.error_estimate)[[2, 4]] > 1e-8)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (StaticGrid(steps=16), "the static grid is too coarse for the requested error; raise `steps`"),
        (Adaptive(max_steps=8), "the adaptive solver did not reach the end; raise `max_steps`"),
    ],
    ids=["static grid", "adaptive"],
)
def test_too_few_steps_raise_at_the_unbatched_door(method, sentence):
    with pytest.raises(ValueError, match=sentence):
        evolve(ion(), pair(3.0, 1.0, 6 * SIGMA), start="v", window_s=around(6 * SIGMA), method=method)


@engines
def test_a_pulse_that_no_step_has_seen(engine):
    # The window ends before pulse 2 begins.
    with pytest.raises(ValueError, match=r"a pulse was stepped over: .* widen `window_s`"):
        evolve(ion(), pair(1.0, 1.0, 60 * SIGMA), start="v", window_s=around(6 * SIGMA), method=ENGINES[engine])
    values, reference = healthy(engine)
    solution = solve_jitted(
        values | {"separation_s": values["separation_s"].at[HURT].set(60 * SIGMA)}, LANE_METHODS[engine]
    )
    np.testing.assert_array_equal(solution.valid, np.arange(5) != HURT)
    assert np.isnan(solution.populations[..., HURT]).all()
    assert solution.coverage[1, HURT] == 0
    assert np.all(np.delete(solution.coverage, HURT, axis=1) > 0)
    assert_others_untouched(solution, reference)


def test_a_pulse_that_no_step_has_seen_raises_inside_jit():
    solve = eqx.filter_jit(
        lambda center: (
            evolve(
                ion(),
                (Gaussian.from_area(1.0, center_s=center, sigma_s=SIGMA),),
                start="v",
                window_s=(-8 * SIGMA, 8 * SIGMA),
                method=StaticGrid(steps=32),
            ).state
        )
    )
    assert np.all(np.isfinite(solve(jnp.asarray(0.0))))
    with pytest.raises(Exception, match="a pulse was stepped over"):
        solve(jnp.asarray(60 * SIGMA)).block_until_ready()


@engines
def test_narrow_pulses_in_a_long_window_are_seen(engine):
    # An adaptive solver without knots at the pulses integrates this to exactly nothing.
    pulses = (
        Gaussian.from_area(PI, center_s=3.217e-3, sigma_s=1e-6),
        PiecewiseConstant.square(PI, center_s=7.7e-3, duration_s=1e-6),
    )
    solution = evolve(ion(), pulses, start="v", window_s=(0.0, 10e-3), method=ENGINES[engine])
    np.testing.assert_allclose(populations(solution), [0, 0, 1], atol=1e-8)
    assert solution.coverage[0] >= 4
    assert solution.coverage[1] >= 1


def test_coverage_counts_the_steps_under_each_pulse():
    # Nothing but the square pulses takes steps, in proportion to their Rabi frequencies times their lengths.
    pulses = (
        PiecewiseConstant.square(2.0, center_s=0.0, duration_s=10e-6),
        PiecewiseConstant.square(6.0, center_s=50e-6, duration_s=20e-6),
    )
    solution = evolve(lossless(), pulses, start="v", window_s=(-20e-6, 80e-6), method=StaticGrid(1e-3, steps=128))
    first, second = (int(n) for n in solution.coverage)
    assert 128 - 12 <= first + second <= 128
    assert second / first == pytest.approx(3, rel=0.1)


def test_an_adaptive_batch_is_its_lanes():
    theta, separation = np.array([0.4, 2.0, 3.1]), np.array([0.0, 3.0, 9.0]) * SIGMA
    linewidth = np.array([0.0, 300.0, 3e3])
    solve = lambda theta, linewidth, separation: evolve(
        ion(shared_linewidth_hz=linewidth),
        pair(theta, 1.0, separation),
        start="v",
        window_s=around(separation),
        method=Adaptive(),
    )
    batch = solve(theta, linewidth, separation)
    lanes = [solve(*lane) for lane in zip(theta, linewidth, separation, strict=True)]
    np.testing.assert_allclose(batch.populations[0].T, [lane.populations[0] for lane in lanes], atol=1e-12)
    # Each lane has chosen its own steps; the last few depend on rounding.
    counts = np.array([lane.coverage for lane in lanes])
    np.testing.assert_allclose(batch.coverage.T, counts, atol=3)
    assert np.ptp(counts, axis=0).max() > 3


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
def differentiated(differentiation):
    """The jitted Jacobian of the populations; values are its argument, so that it compiles once."""
    method = StaticGrid(1e-10, steps=192, differentiation=differentiation)
    transform = jax.jacrev if differentiation == "reverse" else jax.jacfwd
    return eqx.filter_jit(transform(lambda values: solve_traced(values, method).populations[0]))


def jacobian(differentiation, **changes):
    values = {name: jnp.asarray(value) for name, value in (AT | changes).items()}
    return {name: np.asarray(column) for name, column in differentiated(differentiation)(values).items()}


@pytest.mark.parametrize("differentiation", ["reverse", "forward"])
def test_derivatives_are_the_finite_differences(differentiation):
    expected = derivatives()
    # Each parameter moves something by more than the tolerance.
    assert np.all(np.abs(expected).max(axis=0) > 1e-4)
    columns = jacobian(differentiation)
    got = np.stack([columns[name] * AT[name] for name in AT], axis=1)
    np.testing.assert_allclose(got, expected, atol=2e-7)


def test_forward_and_reverse_mode_agree():
    forward, reverse = jacobian("forward"), jacobian("reverse")
    for name, value in AT.items():
        np.testing.assert_allclose(forward[name] * value, reverse[name] * value, atol=1e-12)


RESONANT = {
    "detuning_1_hz": 0.0,
    "detuning_2_hz": 0.0,
    "linewidth_hz": 0.0,
    "lifetime_s": math.inf,
    "sigma_s": SIGMA,
    "separation_s": 13 * SIGMA,
    "stop_s": 21 * SIGMA,
}


def test_derivatives_of_the_closed_form():
    # y = sin^2(theta_1/2) cos^2(theta_2/2) holds no finite difference; the widths do not matter.
    got = jacobian("reverse", **RESONANT, theta_1=1.3, theta_2=2.2)
    expected = {
        "theta_1": math.sin(1.3) * math.cos(1.1) ** 2 / 2,
        "theta_2": -(math.sin(0.65) ** 2) / 2 * math.sin(2.2),
    }
    for name, value in expected.items():
        assert got[name][1] == pytest.approx(value, abs=1e-9)
    for name in ("sigma_s", "separation_s"):
        np.testing.assert_allclose(got[name] * SIGMA, 0, atol=2e-6)


def test_derivatives_at_zero_area_are_finite():
    got = jacobian("reverse", **RESONANT, theta_1=0.0, theta_2=0.0)
    for name in ("theta_1", "theta_2", "sigma_s", "separation_s", "detuning_1_hz", "linewidth_hz"):
        np.testing.assert_allclose(got[name], 0.0, atol=1e-12)


# ------------------------------------------------------------------------------------------------ shared work


@pytest.mark.parametrize("start", ["v", "s", "m"])
@pytest.mark.parametrize("pulses", [1, 2])
def test_only_what_is_reached_is_solved(start, pulses):
    """Components that are left out are zero in a solve that starts from a state with every component."""
    system = ion(detuning_1_hz=900.0, detuning_2_hz=-700.0, lifetime_s=1e-3)
    trains, window = pair(2.2, 1.3, 3 * SIGMA)[:pulses], around(3 * SIGMA)
    at = lambda rho: evolve(system, trains, start=rho, window_s=window, method=StaticGrid(1e-11)).state[0]
    pure = np.eye(3)[:, [system.index(start)]] @ np.eye(3)[[system.index(start)]]
    everywhere = np.full((3, 3), 0.1) + np.diag([0.2, 0.1, 0.3])
    # The equation is linear: a pure start is the difference of two that fill the matrix.
    np.testing.assert_allclose(at(pure), at(everywhere + pure) - at(everywhere), atol=1e-10)


def test_lanes_may_share_a_grid():
    area = jnp.linspace(0.3, 3.0, 5)[:, None] * jnp.array([1.0, 1.1])
    pulse = Gaussian.from_area(area, center_s=0.0, sigma_s=jnp.array([SIGMA, 0.7 * SIGMA]))
    system = ion(detuning_1_hz=np.array([500.0, -900.0]))
    solve = lambda method: evolve(system, (pulse,), start="v", window_s=(-7 * SIGMA, 7 * SIGMA), method=method)
    own, shared = solve(StaticGrid(1e-9)), solve(StaticGrid(1e-9, shared=True))
    assert own.populations.shape == shared.populations.shape
    assert own.t_s.shape == shared.t_s.shape
    np.testing.assert_allclose(shared.populations, own.populations, atol=1e-9)
    assert bool(jnp.all(shared.valid))
    # A lane without a number has no say in the grid of the others.
    spoiled = dataclasses.replace(pulse, peak_rad_s=pulse.peak_rad_s.at[0, 0].set(jnp.nan))
    rest = evolve(system, (spoiled,), start="v", window_s=(-7 * SIGMA, 7 * SIGMA), method=StaticGrid(1e-9, shared=True))
    assert not bool(rest.valid[0, 0])
    np.testing.assert_array_equal(rest.populations[:, :, 1:], shared.populations[:, :, 1:])


def test_lanes_that_share_a_grid_must_share_their_window():
    pulse = Gaussian.from_area(jnp.ones(2), center_s=0.0, sigma_s=SIGMA)
    window = (-7 * SIGMA, jnp.array([6 * SIGMA, 7 * SIGMA]))
    with pytest.raises(ValueError, match="must share window"):
        evolve(ion(), (pulse,), start="v", window_s=window, method=StaticGrid(steps=64, shared=True))


@pytest.mark.parametrize("saved", [False, True])
def test_gradients_of_shared_grids(saved):
    """Reverse mode against forward mode, through what lanes share and what they do not."""
    save_s = jnp.linspace(-2 * SIGMA, 6 * SIGMA, 4) if saved else None

    def total(values, differentiation):
        area, detuning, sigma = values
        pulse = Gaussian.from_area(area * jnp.linspace(0.2, 1.0, 4), center_s=0.0, sigma_s=sigma)
        method = StaticGrid(1e-9, steps=64, differentiation=differentiation, shared=True)
        solution = evolve(
            ion(detuning_1_hz=detuning), (pulse,), start="v", window_s=(-6 * SIGMA, 6 * SIGMA), save_s=save_s,
            method=method,
        )  # fmt: skip
        return jnp.sum(jnp.sin(3 * solution.populations))

    values = jnp.array([2.5, 800.0, SIGMA])
    reverse = jax.grad(lambda v: total(v, "reverse"))(values)
    forward = jax.jacfwd(lambda v: total(v, "forward"))(values)
    np.testing.assert_allclose(reverse, forward, rtol=1e-9)

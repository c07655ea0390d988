"""Coloured noise: filter functions against modulated QuTiP runs, Lindblad and slow noise; trajectories against both."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qutip

from twin.closed_form import pi_pulse_dephasing
from twin.dynamics import evolve
from twin.levels import SCHEMES
from twin.phase_noise import PhaseNoise, filtered, laser_noise, sampled, without_jumps
from twin.pulses import Gaussian, PiecewiseConstant
from twin.slow_noise import SlowNoise, slow_quadrature
from twin.spectra import Flicker, ServoBump, Sum, White, frequency_noise

SIGMA_S = 20e-6
WINDOW_S = (-120e-6, 220e-6)
PULSES = (
    Gaussian.from_area(1.9, center_s=0.0, sigma_s=SIGMA_S),
    Gaussian.from_area(1.1, center_s=90e-6, sigma_s=1.2 * SIGMA_S),
)
PI = (Gaussian.from_area(math.pi, center_s=0.0, sigma_s=SIGMA_S),)
ALONE_S = (-150e-6, 150e-6)
LAMBDA = SCHEMES["lambda"]


def graph(scheme="lambda", **changes):
    defaults = {"detuning_1_hz": 0.0, "detuning_2_hz": 0.0, "lifetime_s": np.inf, "branching": 0.4}
    return SCHEMES[scheme].system(**(defaults | changes))


def closed(scheme="lambda", detuning_1_hz=0.0, detuning_2_hz=0.0):
    return without_jumps(graph(scheme, detuning_1_hz=detuning_1_hz, detuning_2_hz=detuning_2_hz))


def noise(spectrum, laser="shared", scheme="lambda"):
    return laser_noise(SCHEMES[scheme], laser, spectrum)


@functools.cache
def both(spectrum_name, strength=1.0, steps=1024):
    spectrum = {
        "white": White(100.0 * strength),
        "flicker": Flicker(4e4 * strength, 1.0, 1e5),
        "bump": ServoBump(8e3, 100.0 * strength, 1e3),
    }[spectrum_name]
    return filtered(closed(), PULSES, [noise(spectrum)], start="v", window_s=WINDOW_S, steps=steps)


# ------------------------------------------------------------------------------------------------ spectra

SPECTRA = {
    "flicker": (Flicker(1e4, 3.0, 2e4), (1e-7, 1.5e6)),
    "bump": (ServoBump(3e4, 20.0, 4e3), (0, 1e5)),
    "narrow bump": (ServoBump(50.0, 1e4, 0.5), (40, 60)),
    "bump at zero": (ServoBump(500.0, 20.0, 400.0), (0, 5e3)),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_lines_have_the_autocovariance_of_the_spectrum(name):
    spectrum, (low, high) = SPECTRA[name]
    duration_s, cells = 340e-6, 1024
    f, square = spectrum.lines(jnp.asarray(duration_s), cells)
    for tau in duration_s / cells * np.array([0, 1, 40, 1023]):
        edges = np.unique(
            np.concatenate([[low, high], np.geomspace(max(low, 1e-7), high, 400), np.linspace(low, high, 600)])
        )
        x, w = np.polynomial.legendre.leggauss(8)
        half = np.diff(edges)[:, None] / 2
        at = edges[:-1, None] + half * (1 + x)
        exact = np.sum(half * w * np.asarray(spectrum.density(at)) * np.cos(2 * np.pi * at * tau))
        assert np.sum(square * np.cos(2 * np.pi * f * tau)) == pytest.approx(
            exact, rel=2e-6, abs=1e-9 * float(np.sum(square))
        ), tau


def test_mean_squares_in_closed_form():
    low, high = 3.0, 2e4
    _, square = Flicker(1e4, low, high).lines(jnp.asarray(340e-6), 4096)
    exact = 1e4 * high**2 * math.log(high / low) / (high**2 - low**2)
    assert square.sum() == pytest.approx(exact, rel=1e-4)  # the part above Nyquist, 6 MHz, is (h/f)^2/2
    _, square = ServoBump(3e4, 20.0, 4e3).lines(jnp.asarray(340e-6), 1024)
    assert square.sum() == pytest.approx(math.sqrt(2 * math.pi) * 20 * 4e3, rel=1e-10)


def test_white_lines_are_white_on_the_grid():
    duration_s, cells = 340e-6, 256
    f, square = White(50.0).lines(jnp.asarray(duration_s), cells)
    lags = duration_s / cells * np.arange(cells)[:, None]
    covariance = np.cos(2 * np.pi * lags * f) @ square
    assert covariance[0] == pytest.approx(50 / math.pi * cells / (2 * duration_s), rel=1e-9)
    assert np.max(np.abs(covariance[1:])) < 1e-9 * covariance[0]


def test_random_noise_has_its_covariance():
    spectrum = ServoBump(2e4, 50.0, 3e3) + Flicker(1e5, 1.0, 1e5)
    assert isinstance(spectrum, Sum)
    paths = frequency_noise(spectrum, 340e-6, 256, 4_000, jax.random.key(1))
    f, square = spectrum.lines(jnp.asarray(340e-6), 256)
    for lag in (0, 10, 100):
        exact = float(np.sum(square * np.cos(2 * np.pi * f * lag * 340e-6 / 256)))
        products = np.asarray(paths[20] * paths[20 + lag])
        assert products.mean() == pytest.approx(exact, abs=4 * products.std() / math.sqrt(4_000))
    assert abs(np.mean(paths[20])) < 4 * np.std(paths[20]) / math.sqrt(4_000)


# ------------------------------------------------------------------------------------------------ filter functions


def modulated(scheme, pulses, window_s, energies, weights, depth_hz, f_hz):
    """Mean shift of QuTiP's populations under 2 pi depth cos(2 pi f t + phase), over four phases: A^2/2 F and A^4."""
    n, names = len(SCHEMES[scheme].levels), SCHEMES[scheme].levels
    ket = [qutip.basis(n, j) for j in range(n)]
    place = {name: j for j, name in enumerate(names)}
    h = [sum(e * k.proj() for e, k in zip(energies, ket, strict=True))]
    for pulse, (a, b) in zip(pulses, (("v", "s"), ("s", "m")), strict=False):
        flip = ket[place[b]] * ket[place[a]].dag()
        peak, center, sigma = (float(x) for x in (pulse.peak_rad_s, pulse.center_s, pulse.sigma_s))
        envelope = lambda t, p=peak, c=center, s=sigma: p * math.exp(-0.5 * ((t - c) / s) ** 2)
        h.append([(flip + flip.dag()) / 2, envelope])
    shaken = sum(w * k.proj() for w, k in zip(weights, ket, strict=True))
    options = {"atol": 1e-13, "rtol": 1e-11, "max_step": 2e-6, "nsteps": 10**6}

    def populations(depth, phase):
        wave = [shaken, lambda t: 2 * math.pi * depth * math.cos(2 * math.pi * f_hz * t + phase)]
        state = qutip.sesolve([*h, wave], ket[place[SCHEMES[scheme].start]], list(window_s), options=options).states[-1]
        return np.abs(state.full().ravel()) ** 2

    phases = np.array([0, 0.5, 1, 1.5]) * math.pi + 0.3
    return np.mean([populations(depth_hz, phase) for phase in phases], axis=0) - populations(0.0, 0.0)


CASES = {
    "lambda, one source": ("lambda", "shared", (0.0, 0.0), 0.0),
    "lambda, slow": ("lambda", 2, (0.0, 0.0), 400.0),
    "lambda, at the Rabi frequency": ("lambda", 1, (0.0, 0.0), 6e3),
    "lambda, detuned": ("lambda", "shared", (4e3, -2e3), 9e3),
    "v": ("v", "shared", (0.0, 0.0), 5e3),
    "ladder": ("ladder", "shared", (-3e3, 1e3), 5e3),
}


@pytest.mark.parametrize("case", CASES)
def test_filter_function_is_the_answer_to_a_modulation(case):
    # Against an independent code, overlapping pulses and populations far from 0 and 1.
    scheme, laser, detunings, f_hz = CASES[case]
    system, source = closed(scheme, *detunings), noise(White(1.0), laser, scheme)
    found = filtered(system, PULSES, [source], start=SCHEMES[scheme].start, window_s=WINDOW_S)
    depth_hz = 40.0
    energies = np.asarray(system.energies_rad_s)
    shift = modulated(scheme, PULSES, WINDOW_S, energies, source.weights, depth_hz, f_hz)
    # A cosine of random phase has the mean square A^2/2; at f = 0 the four phases have it too.
    expected = -(depth_hz**2) / 2 * np.asarray(found.filters[0](f_hz))
    assert np.max(np.abs(expected)) > 1e-6
    np.testing.assert_allclose(shift, expected, atol=3e-3 * np.max(np.abs(expected)))


def test_white_noise_is_the_first_order_of_lindblad():
    # By Lindblad to first order, 1 - F = 0.72861 D sigma for a pi pulse.
    found = filtered(closed(), PI, [noise(White(10.0))], start="v", window_s=ALONE_S)
    law = float(pi_pulse_dephasing(SIGMA_S, math.pi * 10.0))
    assert law == pytest.approx(0.72861 * math.pi * 10 * SIGMA_S, rel=1e-5)
    np.testing.assert_allclose(found.shift, [law, -law, 0], rtol=5e-6, atol=1e-15)


@pytest.mark.parametrize(("scheme", "laser"), [("lambda", "shared"), ("lambda", 2), ("v", 1), ("ladder", "shared")])
def test_white_noise_against_the_lindblad_engine(scheme, laser):
    start = SCHEMES[scheme].start
    name = "shared_linewidth_hz" if laser == "shared" else f"linewidth_{laser}_hz"
    solve = lambda width: np.asarray(
        evolve(graph(scheme, **{name: width}), PULSES, start=start, window_s=WINDOW_S).populations[0]
    )
    found = filtered(closed(scheme), PULSES, [noise(White(1.0), laser, scheme)], start=start, window_s=WINDOW_S)
    np.testing.assert_allclose(found.ideal, solve(0.0), atol=1e-7)
    # First order in the linewidth, the second extrapolated away.
    h = 4.0
    slope = (4 * solve(h) - solve(2 * h) - 3 * solve(0.0)) / (2 * h)
    np.testing.assert_allclose(found.shift, slope, atol=2e-5 * np.max(np.abs(slope)))


def test_slow_noise_is_shot_to_shot_noise():
    # A bump far below 1/T: the curvature of a static detuning, by Gauss-Hermite nodes of the engine.
    std_hz = 50.0
    width_hz = 0.5
    spectrum = ServoBump(3.0, std_hz**2 / (math.sqrt(2 * math.pi) * width_hz), width_hz)
    found = filtered(closed(), PULSES, [noise(spectrum, 1)], start="v", window_s=WINDOW_S)
    draws = slow_quadrature(SlowNoise(detuning_noise_1_hz=std_hz), (1, 1, 5, 1))
    shots = closed(detuning_1_hz=draws.detuning_1_hz)
    populations = evolve(shots, PULSES, start="v", window_s=WINDOW_S).populations[0] @ draws.weights
    assert abs(float(found.shift[1])) > 1e-5
    # The fourth order is what is left.
    np.testing.assert_allclose(found.ideal + found.shift, populations, atol=float(found.error_estimate) + 2e-8)


@pytest.mark.parametrize("name", ["white", "flicker", "bump"])
def test_populations_are_conserved_and_the_grid_has_converged(name):
    found, fine = both(name), both(name, steps=2048)
    assert found.shift.sum() == pytest.approx(0, abs=1e-14) and bool(found.valid)
    assert found.shift[0] > 1e-3
    np.testing.assert_allclose(found.shift, fine.shift, rtol=3e-4)
    np.testing.assert_allclose(found.populations, found.ideal + found.shift, atol=0)


def test_shift_is_the_integral_over_the_filter_function():
    found, spectrum = both("bump"), ServoBump(8e3, 100.0, 1e3)
    f = np.linspace(2e3, 14e3, 2001)
    integral = np.trapezoid(np.asarray(spectrum.density(f) * found.filters[0](f)), f, axis=1)
    np.testing.assert_allclose(found.shift, -integral, rtol=1e-7)
    assert np.all(np.isnan(found.filters[0](1e7)))


def test_noise_outside_the_pulses_counts_for_nothing():
    spectrum = Flicker(4e4, 1.0, 1e5)
    short = filtered(closed(), PULSES, [noise(spectrum)], start="v", window_s=(-120e-6, 220e-6), steps=680)
    long = filtered(closed(), PULSES, [noise(spectrum)], start="v", window_s=(-220e-6, 420e-6), steps=1280)
    np.testing.assert_allclose(short.shift, long.shift, rtol=1e-5)


def test_sources_add():
    one, two = Flicker(4e4, 1.0, 1e5), White(30.0)
    apart = [filtered(closed(), PULSES, [n], start="v", window_s=WINDOW_S) for n in (noise(one, 1), noise(two, 2))]
    found = filtered(closed(), PULSES, [noise(one, 1), noise(two, 2)], start="v", window_s=WINDOW_S)
    np.testing.assert_allclose(found.shift, sum(a.shift for a in apart), rtol=1e-12)
    summed = filtered(closed(), PULSES, [noise(one + two)], start="v", window_s=WINDOW_S)
    parts = [filtered(closed(), PULSES, [noise(s)], start="v", window_s=WINDOW_S).shift for s in (one, two)]
    np.testing.assert_allclose(summed.shift, sum(parts), rtol=1e-12)


# ------------------------------------------------------------------------------------------------ trajectories


@pytest.mark.parametrize("name", ["white", "flicker", "bump"])
def test_weak_noise_trajectories_agree_with_the_filter_function(name):
    spectrum = {"white": White(100.0), "flicker": Flicker(4e4, 1.0, 1e5), "bump": ServoBump(8e3, 100.0, 1e3)}[name]
    found = both(name)
    mean = sampled(
        closed(), PULSES, [noise(spectrum)], start="v", window_s=WINDOW_S, key=jax.random.key(2), trajectories=3000
    )
    assert bool(mean.valid)
    tolerance = 4 * np.asarray(mean.standard_error) + float(found.error_estimate)
    assert np.all(np.abs(mean.populations - found.populations) < tolerance)
    # Sharp enough to see the shift.
    assert np.all(np.abs(found.shift) > 5 * np.asarray(mean.standard_error))


def test_strong_white_noise_is_lindblad_and_no_second_order():
    width_hz = 4000.0
    exact = evolve(graph(shared_linewidth_hz=width_hz), PULSES, start="v", window_s=WINDOW_S).populations[0]
    mean = sampled(
        closed(),
        PULSES,
        [noise(White(width_hz))],
        start="v",
        window_s=WINDOW_S,
        key=jax.random.key(3),
        trajectories=4000,
    )
    assert bool(mean.valid)
    assert np.all(np.abs(mean.populations - exact) < 4 * np.asarray(mean.standard_error) + 2e-4)
    found = filtered(closed(), PULSES, [noise(White(width_hz))], start="v", window_s=WINDOW_S)
    assert not bool(found.valid) and np.all(np.isnan(found.populations))
    assert np.max(np.abs(found.ideal + found.shift - exact)) > 0.02


@pytest.mark.parametrize("width_hz", [100.0, 500.0, 1500.0, 4000.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_estimate_covers_what_the_second_order_leaves_out(scheme, width_hz):
    start = SCHEMES[scheme].start
    exact = evolve(graph(scheme, shared_linewidth_hz=width_hz), PULSES, start=start, window_s=WINDOW_S).populations[0]
    found = filtered(closed(scheme), PULSES, [noise(White(width_hz), scheme=scheme)], start=start, window_s=WINDOW_S)
    left = float(np.max(np.abs(found.ideal + found.shift - exact)))
    assert 0.02 * float(found.error_estimate) < left < float(found.error_estimate)


def test_error_estimate_covers_slow_noise():
    for std_hz in (200.0, 800.0, 2000.0):
        spectrum = ServoBump(3.0, std_hz**2 / (math.sqrt(2 * math.pi) * 0.5), 0.5)
        found = filtered(closed(), PULSES, [noise(spectrum, 1)], start="v", window_s=WINDOW_S)
        draws = slow_quadrature(SlowNoise(detuning_noise_1_hz=std_hz), (1, 1, 24, 1))
        solution = evolve(closed(detuning_1_hz=draws.detuning_1_hz), PULSES, start="v", window_s=WINDOW_S)
        left = np.max(np.abs(found.ideal + found.shift - solution.populations[0] @ draws.weights))
        assert left < float(found.error_estimate)


def test_decay_acts_on_trajectories():
    system = graph(lifetime_s=3e-4, shared_linewidth_hz=200.0)
    exact = evolve(system, PULSES, start="v", window_s=WINDOW_S).populations[0]
    mean = sampled(
        system, PULSES, [noise(White(0.0))], start="v", window_s=WINDOW_S, key=jax.random.key(0), trajectories=2
    )
    np.testing.assert_allclose(mean.populations, exact, atol=1e-6)
    assert np.all(mean.standard_error < 1e-14)


# ------------------------------------------------------------------------------------------------ derivatives, checks


def shifted(a):
    pulses = (Gaussian.from_area(a[0], center_s=0.0, sigma_s=a[1] * 1e-5), PULSES[1])
    spectrum = ServoBump(1e4 * a[2], 100.0 * a[3], 1e3) + Flicker(1e4 * a[4], 1.0, 1e5) + White(10.0 * a[5])
    system = closed(detuning_1_hz=1e3 * a[6])
    noises = [noise(spectrum)]
    return filtered(system, pulses, noises, start="v", window_s=WINDOW_S, steps=512).populations[1]


def test_derivatives_of_the_filter_function():
    at, step = np.array([1.9, 2.0, 0.8, 1.0, 1.0, 1.0, 0.5]), 1e-4
    slopes, value = jax.jit(jax.grad(shifted))(jnp.asarray(at)), jax.jit(shifted)
    for k in range(len(at)):
        move = step * np.eye(len(at))[k]
        difference = float(value(at + move) - value(at - move)) / (2 * step)
        assert slopes[k] == pytest.approx(difference, rel=1e-5, abs=1e-10), k
    silent = jax.jit(jax.grad(shifted))(jnp.asarray([1.9, 2.0, 0.8, 0.0, 0.0, 0.0, 0.5]))
    assert np.all(np.isfinite(silent)) and np.all(silent[3:6] < -1e-5)


def averaged(a):
    pulses = (Gaussian.from_area(a[0], center_s=0.0, sigma_s=SIGMA_S), PULSES[1])
    source = noise(ServoBump(1e4 * a[1], 1e3 * a[2], 1e3))
    mean = sampled(
        closed(), pulses, [source], start="v", window_s=WINDOW_S, key=jax.random.key(0), trajectories=8, steps=256
    )
    return mean.populations[1]


def test_derivatives_of_a_mean_over_trajectories():
    at, step = np.array([1.9, 0.8, 1.0]), 1e-5
    slopes, value = jax.jit(jax.grad(averaged))(jnp.asarray(at)), jax.jit(averaged)
    for k in range(3):
        move = step * np.eye(3)[k]
        assert slopes[k] == pytest.approx(float(value(at + move) - value(at - move)) / (2 * step), rel=1e-6), k
    silent = jax.jit(jax.grad(averaged))(jnp.array([1.9, 0.8, 0.0]))
    assert np.all(np.isfinite(silent)) and silent[2] == 0


def test_batches_by_vmap():
    areas = jnp.array([1.0, 1.9])
    run = lambda area: filtered(
        closed(), (Gaussian.from_area(area, center_s=0.0, sigma_s=SIGMA_S),), [noise(White(50.0))], start="v",
        window_s=ALONE_S, steps=256,
    ).shift  # fmt: skip
    np.testing.assert_allclose(jax.vmap(run)(areas), jnp.stack([run(a) for a in areas]), atol=1e-15)


def test_new_values_do_not_compile_again():
    traces = []

    class Counting(White):
        def density(self, f_hz):
            traces.append(1)
            return jnp.full(jnp.shape(f_hz), self.linewidth_hz / jnp.pi)

    for width in (10.0, 20.0):
        filtered(closed(), PI, [noise(Counting(width))], start="v", window_s=ALONE_S, steps=256)
    assert len(traces) == 1


STEP = PiecewiseConstant([1e4, 2e4, 1e4], None, start_s=-30e-6, duration_s=60e-6)


def test_jumps_lie_on_edges_of_cells():
    found = filtered(closed(), (STEP,), [noise(White(5.0))], start="v", window_s=(-60e-6, 60e-6), steps=600)
    assert bool(found.valid)
    with pytest.raises(ValueError, match="edges of cells"):
        filtered(closed(), (STEP,), [noise(White(5.0))], start="v", window_s=(-60e-6, 60e-6), steps=601)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"system": graph(shared_linewidth_hz=3.0)}, "`system` must be closed"),
        ({"noises": [PhaseNoise((1.0, 0.0), White(1.0))]}, "`weights` must have 3 entries"),
        ({"noises": [noise(ServoBump(1e6, 1.0, 1e3))], "steps": 128}, "do not resolve"),
        ({"pulses": (*PULSES, *PULSES)}, "at most one pulse a coupling"),
        ({"window_s": (1e-4, -1e-4)}, "must end after it begins"),
        ({"steps": 64}, "raise `steps`"),
        ({"steps": 10}, "at least 64"),
        ({"window_s": (np.zeros(2), np.ones(2))}, "two numbers"),
    ],
)
def test_wrong_arguments_are_explained(changes, sentence):
    arguments = {
        "system": closed(),
        "pulses": PULSES,
        "noises": [noise(White(1.0))],
        "start": "v",
        "window_s": WINDOW_S,
    }
    with pytest.raises(ValueError, match=sentence):
        filtered(**(arguments | changes))


def test_wrong_spectra_are_explained():
    with pytest.raises(ValueError, match="`linewidth_hz` must be"):
        White(-1.0)
    with pytest.raises(ValueError, match="`low_hz` must be below"):
        Flicker(1.0, 10.0, 5.0)
    with pytest.raises(ValueError, match="`width_hz` must be"):
        ServoBump(1e3, 1.0, 0.0)
    with pytest.raises(ValueError, match="`laser` must be"):
        laser_noise(LAMBDA, 3, White(1.0))
    with pytest.raises(ValueError, match="at least 2"):
        sampled(closed(), PI, [], start="v", window_s=ALONE_S, key=jax.random.key(0), trajectories=1)


def test_traced_values_outside_the_grid_are_flagged():
    unresolved = jax.jit(
        lambda f: filtered(closed(), PI, [noise(ServoBump(f, 1.0, 1e3))], start="v", window_s=ALONE_S, steps=256)
    )
    assert bool(unresolved(1e4).valid)
    far = unresolved(2e6)
    assert not bool(far.valid) and np.all(np.isnan(far.populations))
    strong = jax.jit(
        lambda width: sampled(
            closed(),
            PI,
            [noise(White(width))],
            start="v",
            window_s=ALONE_S,
            key=jax.random.key(0),
            trajectories=2,
            steps=128,
        )
    )
    assert bool(strong(100.0).valid)
    assert not bool(strong(1e5).valid) and np.all(np.isnan(strong(1e5).populations))

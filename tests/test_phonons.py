"""Many modes under two pulses: averages against direct sums over all phonon numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from scipy.special import eval_laguerre
from scipy.stats import poisson

from twin import phonons
from twin.dynamics import StaticGrid
from twin.memory import MovingAverage
from twin.memristor import AreaSeries, ClosedForm, IonMemristor, run, sine_input
from twin.motion import thermal_error
from twin.phonons import Motion
from twin.scans import PulseScan, RamseyScan


def thermal(n_bar, count=700):
    n = np.arange(count)
    p = np.exp(n * math.log(n_bar / (n_bar + 1))) / (n_bar + 1) if n_bar > 0 else 1.0 * (n == 0)
    return n[p > 1e-18], p[p > 1e-18]


def direct(modes, transfer):
    """Sum over all phonon numbers of modes given as (eta_1, eta_2, numbers, probabilities)."""
    first, second, p = np.ones(1), np.ones(1), np.ones(1)
    for eta_1, eta_2, n, p_n in modes:
        slow = lambda eta, n=n: np.exp(-(eta**2) / 2) * eval_laguerre(n, eta**2)
        first, second, p = (np.outer(a, b).ravel() for a, b in ((first, slow(eta_1)), (second, slow(eta_2)), (p, p_n)))
        first, second, p = (a[p > 1e-20] for a in (first, second, p))
    return float(np.sum(p * transfer(first, second)))


def x_and_y(first, second, areas=(3.1, 2.2)):
    x = np.sin(areas[0] * first / 2) ** 2
    return x, x * np.cos(areas[1] * second / 2) ** 2


CASES = {
    "one mode, one beam": ([0.0784], None, [1.0], 9.8),
    "one mode, two beams": ([0.0784], [0.05], [1.0], 9.8),
    "two modes, one beam": ([0.06, 0.05], None, [1.0, math.sqrt(3)], 9.8),
    "two modes, two beams": ([0.06, 0.05], [0.02, 0.07], [1.0, 1.7], 5.0),
    "hot": ([0.11, 0.1], [0.1, 0.11], [1.0, 1.2], 20.0),
    "cold": ([0.06, 0.05, 0.04], [0.02, 0.07, 0.01], [1.0, 1.7, 2.4], 0.05),
    "ground state": ([0.1, 0.2], None, [1.0, 2.0], 0.0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("error", [1e-6, 1e-10])
def test_averages_are_the_direct_sums(case, error):
    eta_1, eta_2, ratio, n_bar = CASES[case]
    motion = Motion(np.array(eta_1), None if eta_2 is None else np.array(eta_2), np.array(ratio))
    motion = phonons.planned(motion, n_bar, math.pi, error)
    (first, second), weights = phonons.carrier_factors(motion, jnp.asarray(n_bar), [(1, 0.0), (2, 0.0)], 0, np.pi)
    assert first.shape == (motion.nodes,)
    occupied = np.asarray(motion.occupation(jnp.asarray(n_bar)))
    modes = [(a, b, *thermal(n)) for a, b, n in zip(eta_1, eta_2 or eta_1, occupied, strict=True)]
    for k in (0, 1):
        exact = direct(modes, lambda f, g, k=k: x_and_y(f, g)[k])
        assert float(jnp.sum(weights * x_and_y(first, second)[k])) == pytest.approx(exact, abs=error), k
    # Averaged jointly, not as a product of means, where the difference is one.
    if n_bar >= 5:
        x, y = (jnp.sum(weights * a) for a in x_and_y(first, second))
        kept = jnp.sum(weights * jnp.cos(1.1 * second) ** 2)
        assert abs(x * kept - y) > 2e-5


def test_one_temperature_means_bose_occupations():
    motion = Motion(np.full(3, 0.05), frequency_ratio=np.array([1.0, 2.0, 5.0]))
    for n_bar in (0.1, 3.0, 80.0):
        beta = math.log1p(1 / n_bar)
        np.testing.assert_allclose(
            motion.occupation(jnp.asarray(n_bar)), 1 / np.expm1(beta * np.array([1, 2, 5])), rtol=1e-12
        )
    assert np.all(np.asarray(motion.occupation(jnp.asarray(0.0))) < 1e-12)


@pytest.mark.parametrize(("n_bar", "alpha2"), [(0.0, 4.0), (2.0, 4.0), (2.0, 0.0)])
def test_displaced_thermal_numbers(n_bar, alpha2):
    qutip = pytest.importorskip("qutip")
    size = 160
    shift = qutip.displace(size, math.sqrt(alpha2))
    expected = np.real((shift * qutip.thermal_dm(size, n_bar) * shift.dag()).diag())
    p = np.asarray(phonons.displaced_thermal(jnp.asarray(n_bar), jnp.asarray(alpha2), 100))
    np.testing.assert_allclose(p, expected[:100], atol=1e-11)
    if n_bar == 0:
        np.testing.assert_allclose(p, poisson.pmf(np.arange(100), alpha2), atol=1e-14)


def test_a_coherent_and_a_thermal_mode():
    motion = Motion(np.array([0.0784, 0.06]), coherent=np.array([9.0, 0.0]), frequency_ratio=np.array([1.0, 1.5]))
    motion = phonons.planned(motion, 1.5, math.pi, 1e-10)
    (first, second), weights = phonons.carrier_factors(motion, jnp.asarray(1.5), [(1, 0.0), (2, 0.0)], 0, np.pi)
    n_1, n_2 = np.asarray(motion.occupation(jnp.asarray(1.5)))
    numbers = np.arange(400)
    p = np.asarray(phonons.displaced_thermal(jnp.asarray(n_1), jnp.asarray(9.0), 400))
    exact = direct([(0.0784, 0.0784, numbers, p), (0.06, 0.06, *thermal(n_2))], lambda f, g: x_and_y(f, g)[1])
    assert float(jnp.sum(weights * x_and_y(first, second)[1])) == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize("alpha2", [900.0, 30.0])
def test_large_displacements_neither_cancel_nor_underflow(alpha2):
    eta = 0.1 if alpha2 > 100 else 0.5
    motion = phonons.planned(Motion(np.array([eta]), coherent=np.array([alpha2])), 0.0, math.pi, 1e-8)
    (first, _), weights = phonons.carrier_factors(motion, jnp.asarray(0.0), [(1, 0.0), (2, 0.0)], 0, np.pi)
    n = np.arange(1600)
    exact = direct([(eta, eta, n, poisson.pmf(n, alpha2))], lambda f, g: np.cos(3 * f))
    assert float(jnp.sum(weights * jnp.cos(3 * first))) == pytest.approx(exact, abs=1e-9)


def test_the_stated_errors_are_bounds():
    for n_bar, eta, area, nodes in [
        (20.0, 0.08, math.pi, 8), (20.0, 0.08, 8 * math.pi, 8), (9.8, 0.0784, math.pi, 6), (5.0, 0.05, math.pi, 4),
        (0.05, 0.08, math.pi, 2), (1.0, 0.1, 2 * math.pi, 3), (50.0, 0.1, 2 * math.pi, 20),
    ]:  # fmt: skip
        angle = jnp.asarray(area * eta**2 * math.sqrt(n_bar * (n_bar + 1)))
        assert thermal_error(n_bar, eta, area, nodes) <= float(phonons.quadrature_error(angle, nodes)), (n_bar, nodes)
    u = np.linspace(-1, 1, 999)
    for count, angle in ((4, 0.5), (8, 2.0), (14, 3.0), (20, 6.0)):
        at = np.cos(np.pi * (np.arange(count) + 0.5) / count)
        for phase in (0.0, 0.7):
            fit = np.polynomial.chebyshev.chebfit(at, np.cos(angle * at + phase), count - 1)
            left = np.max(np.abs(np.polynomial.chebyshev.chebval(u, fit) - np.cos(angle * u + phase)))
            assert left <= float(phonons.truncation(jnp.asarray(angle), count)) < 1e3 * left + 1e-12


def test_too_few_nodes_are_flagged():
    motion = Motion(np.array([0.0784]), factors=6, numbers=12, error=1e-8)
    at = lambda n_bar: phonons.carrier_factors(motion, jnp.asarray(n_bar), [(1, 0.0)], 0, np.pi)[1]
    assert np.all(np.isfinite(at(0.01)))
    assert np.all(np.isnan(at(9.8)))
    assert np.all(np.isnan(at(500.0)))
    # Numbers too few for a coherent state.
    few = Motion(np.array([0.05]), coherent=np.array([30.0]), numbers=20)
    assert np.all(np.isnan(phonons.carrier_factors(few, jnp.asarray(0.0), [(1, 0.0)], 0, np.pi)[1]))


@pytest.mark.parametrize("line", [True, False])
def test_gradients_against_finite_differences(line):
    def mean(v):
        motion = Motion(v[0] * jnp.array([0.06, 0.05]), None if line else v[1] * jnp.array([0.02, 0.07]),
                        v[2] * jnp.array([1.0, 1.7]), factors=14, numbers=8)  # fmt: skip
        (first, second), weights = phonons.carrier_factors(motion, v[3], [(1, 0.0), (2, 0.0)], 0, np.pi)
        x = jnp.sin(1.5 * first) ** 2
        return jnp.sum(weights * x * jnp.cos(second) ** 2)

    mean = jax.jit(mean)
    for n_bar in (2.0, 0.0):
        at = jnp.array([1.0, 1.0, 1.0, n_bar])
        slope = np.asarray(jax.grad(mean)(at))
        for k in range(4):
            if n_bar == 0 and k > 1:
                continue
            step = 1e-5 * np.eye(4)[k]
            assert slope[k] == pytest.approx(float(mean(at + step) - mean(at - step)) / 2e-5, abs=2e-9), (n_bar, k)
        if n_bar == 0:
            # One-sided: an occupation cannot be negative. The faster mode goes with n_bar^1.7.
            assert slope[3] == pytest.approx(float(mean(at.at[3].add(1e-6)) - mean(at)) / 1e-6, rel=5e-3)


# ------------------------------------------------------------------------------------------------ in the device

X = sine_input(periods=1, cycles_per_period=12)
PLAIN = {"memory": MovingAverage(4.0), "detuning_1_hz": 300.0, "laser_linewidth_hz": 50.0, "separation_s": 90e-6}


def moving(motion, **more):
    motion = phonons.planned(motion, more.get("n_bar", 0.0), 3.5, 1e-9)
    return IonMemristor(**PLAIN, motion=motion, **more)


def test_one_mode_is_todays_thermal_average():
    old = run(IonMemristor(**PLAIN, n_bar=5.0, eta_1=0.0784, eta_2=0.05, phonon_nodes=12), X)
    one = Motion(np.array([0.0784]), np.array([0.05]))
    for method in (AreaSeries(StaticGrid(error=1e-9)), ClosedForm()):
        new = run(moving(one, n_bar=5.0, method=method), X)
        if isinstance(method, ClosedForm):
            old = run(IonMemristor(**PLAIN, n_bar=5.0, eta_1=0.0784, eta_2=0.05, phonon_nodes=12, method=method), X)
        for name in ("x", "y", "coherence", "purity"):
            np.testing.assert_allclose(getattr(new, name), getattr(old, name), atol=3e-9)
        assert bool(jnp.all(new.valid))


def test_a_series_averaged_once_is_the_average_of_its_cycles():
    two = Motion(np.array([0.06, 0.05]), np.array([0.02, 0.07]), np.array([1.0, 1.7]), np.array([1.0, 0.3]))
    device = moving(two, n_bar=3.0, heating_rate_per_s=300.0)
    folded = run(dataclasses.replace(device, method=AreaSeries(StaticGrid(error=1e-9))), X)
    direct = run(dataclasses.replace(device, method=StaticGrid(error=1e-10)), X)
    for name in ("x", "y", "coherence"):
        np.testing.assert_allclose(getattr(folded, name), getattr(direct, name), atol=3e-9)


def test_a_resting_mode_slows_the_carrier_all_the_same():
    device = moving(Motion(np.array([0.1, 0.2])), method=ClosedForm())
    slowed = math.exp(-0.05 / 2)
    exact = run(IonMemristor(**PLAIN, rabi_scale_1=slowed, rabi_scale_2=slowed, method=ClosedForm()), X)
    np.testing.assert_allclose(run(device, X).y, exact.y, atol=1e-9)


@pytest.mark.slow
def test_devices_of_other_temperatures_as_a_batch():
    two = Motion(np.array([0.06, 0.05]), None, np.array([1.0, 1.7]))
    n_bars = np.array([0.1, 2.0, 6.0])
    motion = phonons.planned(two, 6.0, 3.5, 1e-9)
    device = IonMemristor(**PLAIN, motion=motion, n_bar=n_bars)
    together = run(device, jnp.broadcast_to(X[:, None], (len(X), 3)))
    for k, n_bar in enumerate(n_bars):
        alone = run(IonMemristor(**PLAIN, motion=motion, n_bar=n_bar), X)
        np.testing.assert_allclose(together.y[:, k], alone.y, atol=1e-8)


def test_scans_of_a_moving_ion():
    one = Motion(np.array([0.07]), np.array([0.05]))
    method = StaticGrid(error=1e-9)
    new = tables.ion(n_bar=6.0, motion=phonons.planned(one, 6.0, 3.5, 1e-9), method=method, phonon_nodes=1)
    old = tables.ion(n_bar=6.0, eta_1=0.07, eta_2=0.05, phonon_nodes=12, method=method)
    rabi = PulseScan(pulse=2, area_rad=np.linspace(0, 6 * np.pi, 5), sigma_s=None, detuning_set_hz=0.0)
    ramsey = RamseyScan(wait_s=np.array([1e-4, 3e-4]), phase_rad=0.3)
    for scan in (rabi, ramsey):
        np.testing.assert_allclose(scan.probability(new), scan.probability(old), atol=1e-8)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"`eta_2` must have the leading axis 2, one a mode"):
        Motion(np.array([0.1, 0.1]), np.array([0.1, 0.1, 0.1]))
    with pytest.raises(ValueError, match=r"`coherent` must be zero or positive"):
        Motion(np.array([0.1]), coherent=np.array([-1.0]))
    with pytest.raises(ValueError, match=r"`frequency_ratio` must be positive"):
        Motion(np.array([0.1]), frequency_ratio=np.array([0.0]))
    with pytest.raises(ValueError, match=r"leave eta_1, eta_2 and phonon_nodes out"):
        IonMemristor(**PLAIN, motion=Motion(np.array([0.1])), eta_1=0.1)
    with pytest.raises(ValueError, match=r"lower the occupation or the area"):
        phonons.planned(Motion(np.array([0.2])), 5e3, 3.5, 1e-10)
    with pytest.raises(ValueError, match=r"lower the occupation or the area"):
        phonons.planned(Motion(np.array([0.1])), 400.0, 3.3, 1e-8)
    with pytest.raises(ValueError, match=r"at most two pulses"):
        phonons.carrier_factors(Motion(np.array([0.1])), jnp.asarray(1.0), [(1, 0.0)] * 3, 0, np.pi)

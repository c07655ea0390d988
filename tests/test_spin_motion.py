"""The full solve of ion and motion against QuTiP, exact limits, and the thermal averages that it judges."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qutip

from twin.closed_form import separated_populations
from twin.levels import LAMBDA, LevelSystem
from twin.memory import MovingAverage
from twin.memristor import ClosedForm, IonMemristor, Lindblad, Settings
from twin.pulses import Gaussian, PiecewiseConstant
from twin.sidebands import displaced_states, displacement_bands, needed_cutoff, sideband_bound
from twin.spin_motion import Modes, Plan, plan_solve, solve

SIGMA_S = 2e-6
WINDOW_S = (-6 * SIGMA_S, 11 * SIGMA_S)
OPEN = LAMBDA.system(
    detuning_1_hz=4e3, detuning_2_hz=-6e3, lifetime_s=2e-4, branching=0.4, shared_linewidth_hz=500.0, linewidth_1_hz=1e3
)
CLOSED = dataclasses.replace(OPEN, decays=(), dephasings=())
RESONANT = dataclasses.replace(CLOSED, energies_rad_s=np.zeros(3))


def pulses(area_1=2.0, area_2=1.3, sigma_s=SIGMA_S, apart=5.0):
    return (
        Gaussian.from_area(area_1, center_s=0.0, sigma_s=sigma_s, phase_rad=0.4),
        Gaussian.from_area(area_2, center_s=apart * sigma_s, sigma_s=sigma_s),
    )


def qutip_populations(system: LevelSystem, pair, modes: Modes, cutoffs, start: str, window_s):
    """Populations and phonon numbers of `mesolve` in the laboratory frame of the motion, in microseconds.

    The displacement operator is the exact one, cut: the exponential of a longer ladder.
    """
    unit, levels = 1e-6, system.levels
    long = 80

    def on(which, op):
        """An operator of one mode, or of the levels (-1)."""
        parts = [qutip.qeye(len(levels))] + [qutip.qeye(n) for n in cutoffs]
        parts[which + 1] = op
        return qutip.tensor(parts)

    def cut_displacement(eta, n):
        ladder = qutip.destroy(long)
        return qutip.Qobj((1j * eta * (ladder + ladder.dag())).expm().full()[:n, :n])

    ket = lambda name: qutip.basis(len(levels), levels.index(name))
    h = on(-1, qutip.Qobj(np.diag(np.asarray(system.energies_rad_s) * unit)))
    jumps = [on(-1, np.sqrt(float(d.rate_per_s) * unit) * ket(d.target) * ket(d.source).dag()) for d in system.decays]
    noise = [(np.sqrt(2 * float(d.rate_per_s) * unit), np.diag(d.weights)) for d in system.dephasings]
    jumps += [on(-1, size * qutip.Qobj(weights)) for size, weights in noise]
    pure = system.closed and not np.any(modes.each("n_bar"))
    rho = ket(start) if pure else qutip.ket2dm(ket(start))
    for m, n in enumerate(cutoffs):
        ladder = qutip.destroy(n)
        h = h + on(m, 2 * np.pi * float(modes.secular_hz[m]) * unit * ladder.dag() * ladder)
        rate = float(modes.each("heating_rate_per_s")[m]) * unit
        jumps += [on(m, np.sqrt(rate) * ladder), on(m, np.sqrt(rate) * ladder.dag())] if rate else []
        alpha = complex(modes.each("alpha_real")[m], modes.each("alpha_imag")[m])
        n_bar = float(modes.each("n_bar")[m])
        moved = qutip.displace(long, alpha)
        if pure:
            # A coherent state is a ket, which QuTiP solves so much faster.
            rho = qutip.tensor(rho, qutip.Qobj((moved * qutip.basis(long, 0)).full()[:n]).unit())
        else:
            part = (moved * qutip.thermal_dm(long, n_bar) * moved.dag()).full()[:n, :n]
            rho = qutip.tensor(rho, qutip.Qobj(part / np.trace(part)))
    parts: list = [h]
    for k, (pulse, (source, target)) in enumerate(zip(pair, system.couplings, strict=True)):
        phase = 0.0 if pulse.phase_rad is None else float(pulse.phase_rad)
        kick = qutip.tensor(
            ket(target) * ket(source).dag(),
            *(cut_displacement(float(modes.eta(k)[m]), n) for m, n in enumerate(cutoffs)),
        )
        term = 0.5 * np.exp(-1j * phase) * kick
        peak, center, sigma = (float(x) for x in (pulse.peak_rad_s * unit, pulse.center_s / unit, pulse.sigma_s / unit))
        envelope = lambda t, p=peak, c=center, s=sigma: p * np.exp(-((t - c) ** 2) / (2 * s**2))
        parts.append([term + term.dag(), envelope])
    options = {"method": "dop853", "rtol": 1e-10, "atol": 1e-12, "nsteps": 10**6}
    times = [window_s[0] / unit, window_s[1] / unit]
    end = qutip.mesolve(qutip.QobjEvo(parts), rho, times, c_ops=jumps, options=options).states[-1]
    p = [float(qutip.expect(on(-1, ket(name).proj()), end)) for name in levels]
    return np.array(p), np.array([float(qutip.expect(on(m, qutip.num(n)), end)) for m, n in enumerate(cutoffs)])


# ------------------------------------------------------------------------------------------------ independent code


@pytest.mark.parametrize("kind", ["closed", "open"])
def test_one_mode_against_qutip(kind):
    modes = Modes(1e6, 0.1, 0.15, n_bar=0.3, heating_rate_per_s=None if kind == "closed" else 5e3)
    system = CLOSED if kind == "closed" else OPEN
    found = solve(system, pulses(), modes, start="v", window_s=WINDOW_S, cutoff=20)
    p, n = qutip_populations(system, pulses(), modes, (20,), "v", WINDOW_S)
    assert found.plan.pure == (kind == "closed")
    np.testing.assert_allclose(found.populations, p, atol=1e-7, rtol=0)
    np.testing.assert_allclose(found.n_mean, n, atol=1e-6, rtol=0)
    # Everything took part: the motion alone moves more than the tolerance by far.
    still = solve(system, pulses(), dataclasses.replace(modes, eta_1=0.0, eta_2=0.0), start="v", window_s=WINDOW_S)
    assert np.max(np.abs(found.populations - still.populations)) > 1e-3


@pytest.mark.slow
def test_coherent_state_against_qutip():
    modes = Modes(0.8e6, 0.1, 0.12, n_bar=0.1, alpha_real=0.5, alpha_imag=-0.7)
    found = solve(CLOSED, pulses(), modes, start="v", window_s=WINDOW_S)
    p, n = qutip_populations(CLOSED, pulses(), modes, found.plan.cutoff, "v", WINDOW_S)
    np.testing.assert_allclose(found.populations, p, atol=1e-7, rtol=0)
    np.testing.assert_allclose(found.n_mean, n, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_two_modes_against_qutip():
    modes = Modes([1e6, 1.7e6], [0.1, 0.06], [0.05, 0.12], n_bar=[0.02, 0.01], heating_rate_per_s=[2e3, 1e3])
    short = (-5 * SIGMA_S, 8 * SIGMA_S)
    pair = pulses(apart=3.0)
    # Cut where QuTiP is cut; the steps are those of the error compared.
    tight = plan_solve(OPEN, pair, modes, window_s=short, cutoff=(6, 5), error=1e-7)
    plan = dataclasses.replace(tight, error=1e-3)
    found = solve(OPEN, pair, modes, start="v", window_s=short, plan=plan)
    p, n = qutip_populations(OPEN, pair, modes, (6, 5), "v", short)
    np.testing.assert_allclose(found.populations, p, atol=1e-7, rtol=0)
    np.testing.assert_allclose(found.n_mean, n, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_two_modes_of_kets_against_qutip():
    modes = Modes([1e6, 1.7e6], [0.1, 0.06], [0.05, 0.12], alpha_real=[0.2, 0.3], alpha_imag=[-0.1, 0.2])
    short = (-5 * SIGMA_S, 8 * SIGMA_S)
    pair = pulses(apart=3.0)
    found = solve(CLOSED, pair, modes, start="v", window_s=short, cutoff=(8, 9), error=1e-6)
    p, n = qutip_populations(CLOSED, pair, modes, (8, 9), "v", short)
    np.testing.assert_allclose(found.populations, p, atol=1e-7, rtol=0)
    np.testing.assert_allclose(found.n_mean, n, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------- exact limits


def test_without_lamb_dicke_parameter_the_motion_does_not_matter():
    modes = Modes(1e6, 0.0, 0.0, n_bar=1.0)
    found = solve(RESONANT, pulses(apart=10), modes, start="v", window_s=(-7 * SIGMA_S, 17 * SIGMA_S))
    expected = separated_populations(jnp.asarray(2.0), jnp.asarray(1.3), start="v")
    np.testing.assert_allclose(found.populations, expected, atol=1e-7)
    np.testing.assert_allclose(found.n_mean, 1.0, atol=1e-5)


def test_heating_raises_the_phonon_number_by_its_rate():
    modes = Modes(1e6, 0.0, 0.0, n_bar=0.2, heating_rate_per_s=1e4)
    found = solve(RESONANT, pulses(), modes, start="v", window_s=WINDOW_S)
    assert not found.plan.pure
    assert float(found.n_mean[0]) == pytest.approx(0.2 + 1e4 * (WINDOW_S[1] - WINDOW_S[0]), abs=1e-5)


@pytest.mark.slow
def test_kets_and_density_matrix_agree():
    modes = Modes(1e6, 0.1, 0.15, n_bar=0.2)
    kets = solve(CLOSED, pulses(), modes, start="v", window_s=WINDOW_S, cutoff=14)
    p = kets.plan
    plan = Plan(p.cutoff, p.bands, p.steps, p.cutoff, False, p.error)
    density = solve(CLOSED, pulses(), modes, start="v", window_s=WINDOW_S, plan=plan)
    np.testing.assert_allclose(kets.populations, density.populations, atol=1e-8)


def test_a_pulse_on_the_blue_sideband():
    # Half a turn of |v, 0> <-> |s, 1> at eta exp(-eta^2/2) Omega, slow beside the secular frequency.
    eta, sigma_s, secular_hz = 0.1, 60e-6, 1e6
    blue = dataclasses.replace(RESONANT, energies_rad_s=np.array([0.0, -2 * np.pi * secular_hz, 0.0]))
    pulse = Gaussian.from_area(np.pi / (eta * np.exp(-(eta**2) / 2)), center_s=0.0, sigma_s=sigma_s)
    found = solve(blue, (pulse,), Modes(secular_hz, eta), start="v", window_s=(-6 * sigma_s, 6 * sigma_s), cutoff=8)
    # The carrier, off resonance, shifts the line: the transfer is nearly, not wholly, complete.
    assert float(found.populations[1]) > 0.8
    assert float(found.n_mean[0]) == pytest.approx(float(found.populations[1]), abs=2e-3)


# ----------------------------------------------------------------------------------------------- thermal averages

SECULAR_HZ = 1e6


def compared(sigma_s, n_bar, *, eta=0.08, x=0.6, r=0.3, heating=0.0):
    """Largest difference of populations between the thermal average and the full solve, and the bound on sidebands."""
    device = IonMemristor(
        MovingAverage(3.0), method=ClosedForm(), phonon_nodes=8, n_bar=n_bar, eta_1=eta, eta_2=eta, lifetime_s=np.inf,
        heating_rate_per_s=heating, sigma_1_s=sigma_s, sigma_2_s=sigma_s, separation_s=10 * sigma_s,
        lead_s=6 * sigma_s, tail_s=6 * sigma_s,
    )  # fmt: skip
    average = device.under(Settings())(jnp.array([x]), jnp.array([r]), alone=False).populations[:, 0]
    areas = device.areas(jnp.asarray(x), jnp.asarray(r))
    modes = Modes(SECULAR_HZ, eta, eta, n_bar=n_bar, heating_rate_per_s=heating or None)
    window_s = (-6 * sigma_s, 16 * sigma_s)
    full = solve(RESONANT, device.pulses(*areas), modes, start="v", window_s=window_s, error=1e-6)
    slowed = np.exp(-(eta**2) * (n_bar + 0.5))
    bound = sum(float(sideband_bound(slowed * area, sigma_s, SECULAR_HZ, eta, n_bar)) for area in areas)
    return float(jnp.max(jnp.abs(average - full.populations))), bound


@pytest.mark.parametrize(("sigma_s", "n_bar"), [(10e-6, 0.5), (3e-6, 0.5), (1e-6, 0.5), (3e-6, 3.0)])
def test_thermal_averages_hold_where_the_pulse_is_slow(sigma_s, n_bar):
    difference, bound = compared(sigma_s, n_bar)
    assert difference < 1e-4
    assert difference < bound + 1e-6
    # The bound is no empty one.
    assert bound < 5 * difference + 1e-6


@pytest.mark.slow
def test_thermal_averages_of_the_lindblad_engine_against_qutip():
    """Decay, detuning and dephasing beside the motion, against the full solve of an independent code."""
    sigma_s, eta, n_bar = 1e-6, 0.08, 0.5
    device = IonMemristor(
        MovingAverage(3.0), method=Lindblad(1e-9), phonon_nodes=8, n_bar=n_bar, eta_1=eta, eta_2=eta,
        lifetime_s=2e-4, branching=0.4, detuning_1_hz=4e3, detuning_2_hz=-6e3, laser_linewidth_hz=500.0,
        laser_linewidth_1_hz=1e3, sigma_1_s=sigma_s, sigma_2_s=sigma_s, separation_s=10 * sigma_s,
        lead_s=6 * sigma_s, tail_s=6 * sigma_s,
    )  # fmt: skip
    x, r = jnp.array([0.6]), jnp.array([0.3])
    average = device.prepared(x, Settings()).under(Settings())(x, r, alone=False).populations[:, 0]
    pair = device.pulses(*(area[0] for area in device.areas(x, r)))
    modes = Modes(SECULAR_HZ, eta, eta, n_bar=n_bar)
    p, _ = qutip_populations(OPEN, pair, modes, (14,), "v", (-6 * sigma_s, 16 * sigma_s))
    np.testing.assert_allclose(average, p, atol=1e-4, rtol=0)
    # The average took part.
    still = dataclasses.replace(device, n_bar=0.0, eta_1=0.0, eta_2=0.0).prepared(x, Settings()).under(Settings())
    assert np.max(np.abs(np.asarray(still(x, r, alone=False).populations[:, 0]) - p)) > 1e-3


def test_thermal_averages_fail_where_the_pulse_is_as_fast_as_the_motion():
    difference, bound = compared(0.3e-6, 3.0, x=0.99, r=0.99)
    assert 0.01 < difference < bound


def test_thermal_averages_fail_where_the_ion_is_heated_fast():
    # 0.66 phonons within the run.
    difference, _ = compared(1e-6, 0.1, eta=0.15, heating=3e4)
    calm, _ = compared(1e-6, 0.1, eta=0.15)
    assert calm < 1e-4 < difference


@pytest.mark.slow
def test_the_bound_holds_over_a_grid():
    for sigma_s in (0.3e-6, 0.6e-6, 1e-6, 4e-6):
        for n_bar, eta in ((0.0, 0.1), (0.0, 0.4), (0.5, 0.1), (0.5, 0.25), (3.0, 0.1)):
            for x, r in ((0.2, 0.7), (0.6, 0.3), (0.95, 0.95), (1.0, 1.0)):
                difference, bound = compared(sigma_s, n_bar, eta=eta, x=x, r=r)
                print(sigma_s, n_bar, eta, x, r, difference, bound)
                assert difference < bound + 1e-6, (sigma_s, n_bar, eta, x, r)


def test_the_bound_is_nan_out_of_its_range():
    assert np.isfinite(sideband_bound(3.0, 1e-6, 1e6, 0.1, 5.0))
    assert np.isnan(sideband_bound(3.0, 1e-6, 1e6, 0.1, 20.0))
    assert np.isnan(sideband_bound(3.0, 1e-3, 1e6, 0.1, 5.0))


# --------------------------------------------------------------------------------------------- cutoffs and gradients


@pytest.mark.parametrize(("n_bar", "alpha"), [(0.0, 0.0), (0.7, 0.0), (5.0, 0.0), (0.0, 1.5), (0.3, 2.0)])
def test_needed_cutoff(n_bar, alpha):
    moved = qutip.displace(160, alpha)
    p = (moved * qutip.thermal_dm(160, n_bar) * moved.dag()).diag().real
    n = needed_cutoff(n_bar, alpha, error=1e-6)
    assert p[n:].sum() < 1e-6
    # The bound wastes a few states, no more.
    assert p[max(0, n - 20) :].sum() > 1e-6


def test_displaced_fock_states():
    table = displaced_states(jnp.asarray(0.7), jnp.asarray(-1.1), 5, 30)
    np.testing.assert_allclose(table, qutip.displace(90, 0.7 - 1.1j).full()[:30, :5], atol=1e-11)


def test_bands_are_the_displacement_operator():
    ladder = qutip.destroy(90)
    exact = (0.3j * (ladder + ladder.dag())).expm().full()[:30, :30]
    bands = np.asarray(displacement_bands(jnp.asarray(0.3), 6, 30))
    for s in range(7):
        np.testing.assert_allclose(1j**s * bands[s, : 30 - s], np.diagonal(exact, -s), atol=1e-12)


def test_a_cutoff_too_small_is_refused_with_one_that_serves():
    modes = Modes(1e6, 0.1, 0.1, n_bar=1.0)
    with pytest.raises(ValueError, match=r"`cutoff` must hold the motion, but \(6,\)") as refused:
        solve(CLOSED, pulses(), modes, start="v", window_s=WINDOW_S, cutoff=6)
    serves = int(str(refused.value).split("aimed at is 1e-07; (")[1].split(",")[0])
    assert solve(CLOSED, pulses(), modes, start="v", window_s=WINDOW_S, cutoff=serves).valid


def test_traced_values_are_flagged_in_batches_and_need_a_plan():
    modes = Modes(1e6, 0.1, 0.1, n_bar=0.1)
    plan = plan_solve(CLOSED, pulses(), modes, window_s=WINDOW_S, error=1e-6)

    def run(n_bar, plan=plan):
        warm = dataclasses.replace(modes, n_bar=n_bar)
        return solve(CLOSED, pulses(), warm, start="v", window_s=WINDOW_S, plan=plan)

    found = jax.vmap(run)(jnp.array([0.1, 1.5]))
    assert found.valid.tolist() == [True, False]
    assert np.all(np.isfinite(found.populations[0])) and np.all(np.isnan(found.populations[1]))
    with pytest.raises(ValueError, match="plan=plan_solve"):
        jax.vmap(lambda n: run(n, None))(jnp.array([0.1]))


@pytest.mark.parametrize("kind", ["closed", pytest.param("open", marks=pytest.mark.slow)])
def test_gradient_against_finite_differences(kind):
    system = CLOSED if kind == "closed" else OPEN
    point = {
        "secular_hz": 1e6,
        "eta_1": 0.1,
        "eta_2": 0.15,
        "n_bar": 0.05,
        "alpha_real": 0.2,
        "area": 2.0,
        "sigma": 1.0,
    }
    if kind == "open":
        point |= {"heating_rate_per_s": 1e3}

    def pieces(p):
        p = dict(p)
        area, sigma = p.pop("area"), p.pop("sigma")
        # A width of its own for pulse 1 only.
        pair = (Gaussian.from_area(area, center_s=0.0, sigma_s=sigma * SIGMA_S, phase_rad=0.4), pulses()[1])
        return pair, Modes(**p)

    pair, modes = pieces(point)
    plan = plan_solve(system, pair, modes, window_s=WINDOW_S, cutoff=12, error=1e-7)

    @jax.jit
    def p_s(p):
        pair, modes = pieces(p)
        return solve(system, pair, modes, start="v", window_s=WINDOW_S, plan=plan).populations[1]

    values = {name: jnp.asarray(value) for name, value in point.items()}
    gradient = jax.jit(jax.grad(p_s))(values)
    for name, value in point.items():
        step = 1e-3 * value
        central = (p_s(values | {name: value + step}) - p_s(values | {name: value - step})) / (2 * step)
        assert float(gradient[name]) * value == pytest.approx(float(central) * value, rel=2e-4, abs=3e-7), name


def test_wrong_arguments_are_told():
    modes = Modes(1e6, 0.1)
    with pytest.raises(ValueError, match="one or two modes"):
        Modes([1e6, 2e6, 3e6], 0.1)
    with pytest.raises(ValueError, match="`start` must be one of"):
        solve(CLOSED, pulses()[:1], modes, start="w", window_s=WINDOW_S)
    square = PiecewiseConstant.square(1.0, center_s=0.0, duration_s=1e-6)
    with pytest.raises(ValueError, match="must be smooth"):
        solve(CLOSED, (square,), modes, start="v", window_s=WINDOW_S)
    with pytest.raises(ValueError, match="`n_bar` must be zero or positive"):
        needed_cutoff(-1.0)

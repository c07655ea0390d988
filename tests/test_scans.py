"""Auxiliary scans: pulses, fringes and thermal averages against solvers, exact formulas and independent code."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import qutip
import tables
from scipy.special import eval_laguerre

from twin.dynamics import StaticGrid
from twin.levels import SCHEMES
from twin.memory import MovingAverage
from twin.memristor import Automatic, ClosedForm, IonMemristor, Lindblad, coarsened, planned
from twin.methods import Adaptive
from twin.motion import nodes_for, thermal_error
from twin.scans import PulseScan, RamseyScan, ReadoutScan

SIGMA_S = 20e-6
ION = IonMemristor(
    memory=MovingAverage(10.0),
    rabi_scale_1=1.07,
    rabi_scale_2=0.93,
    detuning_1_hz=300.0,
    detuning_2_hz=-500.0,
    laser_linewidth_hz=150.0,
    laser_linewidth_1_hz=40.0,
    laser_linewidth_2_hz=60.0,
    readout_error_bright=0.01,
    readout_error_dark=0.02,
    nominal_sigma_1_s=19e-6,
    nominal_sigma_2_s=21e-6,
    m_lifetime_s=5e-3,
)
WAITS_S = jnp.array([2, 4, 8, 15, 60, 150, 500]) * SIGMA_S
SCANS = {
    "rabi 1": PulseScan(1, jnp.linspace(0, 20, 7), jnp.linspace(15e-6, 30e-6, 7), 700.0),
    "rabi 2": PulseScan(2, jnp.linspace(0, 20, 7), None, jnp.linspace(-900, 900, 7)),
    "frequency 1": PulseScan(1, jnp.full(7, np.pi), None, jnp.linspace(-2.5e4, 2.5e4, 7)),
    "frequency 2": PulseScan(2, jnp.full(7, np.pi), jnp.full(7, 25e-6), jnp.linspace(-2.5e4, 2.5e4, 7)),
    "ramsey": RamseyScan(WAITS_S, jnp.linspace(-3, 3, 7), detuning_set_hz=150.0),
}
BOX = {
    **tables.DEMO,
    "sigma_1_s": (15e-6, 25e-6),
    "separation_s": (100e-6, 140e-6),
}


def ion(scheme="lambda", **changes) -> IonMemristor:
    return dataclasses.replace(ION, scheme=scheme, **changes)


@pytest.mark.parametrize(("scheme", "kind"), [("lambda", kind) for kind in SCANS] + [("v", "ramsey")])
def test_static_grid_against_adaptive(scheme, kind):
    scan, device = SCANS[kind], ion(scheme)
    p = scan.probability(device)
    assert p.shape == (7,)
    np.testing.assert_allclose(p, scan.probability(ion(scheme, method=Adaptive())), atol=3e-9, rtol=0)
    assert np.ptp(p) > 0.3


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_against_qutip(scheme, kind):
    """Two rows of each kind, as dense matrices: operators, envelopes and commands written anew from the docstrings."""
    scan, device, levels = SCANS[kind], ion(scheme), oracle.LEVELS[scheme]
    p = scan.probability(device)
    for row in (3, 5):
        offset = float(jnp.broadcast_to(scan.detuning_set_hz, 7)[row])
        second = isinstance(scan, PulseScan) and scan.pulse == 2
        h, jumps = oracle.ion(
            scheme,
            detuning_1_hz=300.0 + (0.0 if second else offset),
            detuning_2_hz=-500.0 + (offset if second else 0.0),
            lifetime_s=52.7e-3,
            m_lifetime_s=5e-3,
            shared_linewidth_hz=150.0,
            linewidth_1_hz=40.0,
            linewidth_2_hz=60.0,
        )

        def gaussian(area, sigma, center):
            return lambda t: area / (np.sqrt(2 * np.pi) * sigma) * np.exp(-((t - center) ** 2) / (2 * sigma**2))

        def shot(line, area, sigma, center, phase=0.0):
            """Area at the nominal width; both widths are stretched as the actual one is."""
            scale, ratio = ((1.07, 20 / 19), (0.93, 20 / 21))[line - 1]
            turned = oracle.drive(levels, *(np.exp(-1j * phase) if line == k else 0.0 for k in (1, 2)))
            return [qutip.Qobj(turned), gaussian(scale * ratio * area, ratio * sigma, center)]

        end = 100e-6
        if isinstance(scan, RamseyScan):
            wait, phase = float(scan.wait_s[row]), float(scan.phase_rad[row])
            drives, end = [shot(1, np.pi / 2, 19e-6, 0.0), shot(1, np.pi / 2, 19e-6, wait, phase)], end + wait
        else:
            sigma = (19e-6, 21e-6)[scan.pulse - 1] if scan.sigma_s is None else float(scan.sigma_s[row])
            drives = [shot(scan.pulse, float(scan.area_rad[row]), sigma, 120e-6 if second else 0.0)]
            if second:
                drives, end = [*drives, shot(1, 0.0 if scheme == "v" else np.pi, 19e-6, 0.0)], end + 120e-6
        rho = qutip.mesolve(
            [qutip.Qobj(h), *drives],
            qutip.ket2dm(qutip.basis(len(levels), levels.index(SCHEMES[scheme].start))),
            [-100e-6, end],
            c_ops=[qutip.Qobj(jump) for jump in jumps],
            options={"method": "dop853", "rtol": 1e-10, "atol": 1e-12, "nsteps": 100_000, "max_step": SIGMA_S / 2},
        ).states[-1]
        populations = dict(zip(levels, np.diag(rho.full()).real, strict=True))
        shelved = sum(populations[name] for name in ("vm" if scheme == "v" else "s"))
        dark = 0.98 * shelved + 0.01 * (1 - shelved)
        assert p[row] == pytest.approx(1 - dark if scheme == "v" else dark, abs=1e-7)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resonant_rabi_scan_is_a_sine_of_the_commanded_area(scheme):
    still = {"detuning_1_hz": 0.0, "detuning_2_hz": 0.0, "lifetime_s": np.inf, "m_lifetime_s": np.inf}
    still |= dict.fromkeys(("laser_linewidth_hz", "laser_linewidth_1_hz", "laser_linewidth_2_hz"), 0.0)
    still |= dict.fromkeys(("readout_error_bright", "readout_error_dark"), 0.0)
    device = ion(scheme, **still, separation_s=400e-6, lead_s=200e-6, tail_s=200e-6, amplitude_1=0.9)
    area = jnp.linspace(0, 15, 16)
    sine = jnp.sin(0.9 * 1.07 * 20 / 19 * area / 2) ** 2
    p = PulseScan(1, area).probability(device)
    np.testing.assert_allclose(p, sine if scheme != "v" else 1 - sine, atol=1e-8)
    left = 1.0 if scheme == "v" else np.sin(0.9 * 1.07 * 20 / 19 * np.pi / 2) ** 2
    moved = jnp.sin(0.93 * 20 / 21 * area / 2) ** 2
    # V: m is dark as v is, s alone shines.
    np.testing.assert_allclose(PulseScan(2, area).probability(device), left * (1 - moved), atol=1e-8)


def test_ramsey_fringe_of_hard_pulses():
    """pi/2 pulses short against everything: P = (1 + e^(-damping) cos(delta T + phase)) / 2, damping pi Dnu T."""
    sigma, linewidth, detuning = 1e-9, 90.0, 400.0
    device = IonMemristor(
        memory=MovingAverage(1.0), sigma_1_s=sigma, lead_s=1e-8, tail_s=1e-8, lifetime_s=np.inf, detuning_1_hz=250.0,
        laser_linewidth_hz=60.0, laser_linewidth_1_hz=30.0,
    )  # fmt: skip
    wait, phase = jnp.linspace(1e-4, 1e-2, 40), jnp.linspace(-5, 5, 40)
    p = RamseyScan(wait, phase, detuning_set_hz=150.0).probability(device)
    fringe = 0.5 * (1 + jnp.exp(-jnp.pi * linewidth * wait) * jnp.cos(2 * jnp.pi * detuning * wait + phase))
    np.testing.assert_allclose(p, fringe, atol=1e-5)
    # Decay on top: populations of s, and the coherence with half the rate.
    lifetime = 8e-3
    p = RamseyScan(wait, phase, detuning_set_hz=150.0).probability(dataclasses.replace(device, lifetime_s=lifetime))
    decayed = jnp.exp(-wait / lifetime)
    v, s = 0.5 + 0.5 * 0.4 * (1 - decayed), 0.5 * decayed
    contrast = jnp.exp(-jnp.pi * linewidth * wait) * jnp.sqrt(decayed)
    fringe = 0.5 * (v + s + contrast * jnp.cos(2 * jnp.pi * detuning * wait + phase))
    np.testing.assert_allclose(p, fringe, atol=1e-5)


def test_ramsey_pulses_that_coincide_are_one_pulse():
    device = ion(lead_s=200e-6, tail_s=200e-6)
    two = RamseyScan(jnp.zeros(2), area_rad=jnp.array([0.8, 1.4])).probability(device)
    np.testing.assert_allclose(two, PulseScan(1, jnp.array([1.6, 2.8])).probability(device), atol=3e-9)


@pytest.mark.slow
def test_a_cycle_at_full_command_is_a_row_of_the_scan():
    """The scans see the pulses of the device's own cycles."""
    for scheme in SCHEMES:
        device = ion(scheme, n_bar=6.0, eta_1=0.07, eta_2=0.05, heating_rate_per_s=900.0, phonon_nodes=12,
                     method=StaticGrid(error=1e-9), steps=(160, 160))  # fmt: skip
        response = device.respond(jnp.ones(1), jnp.ones(1), jnp.array(0.0), jnp.array(400.0), alone=False)
        row = PulseScan(2, jnp.full(1, np.pi), None, 400.0).probability(device)
        np.testing.assert_allclose(row, device.assigned(response.populations), atol=1e-8)


@pytest.mark.slow
def test_hot_ions_are_averaged_over_fock_states():
    area, wait, eta = jnp.linspace(2, 20, 7), jnp.linspace(1e-4, 1e-3, 7), 0.08
    hot = ion(n_bar=12.0, eta_1=eta, eta_2=0.06, phonon_nodes=2, heating_rate_per_s=0.0)
    n = np.arange(400)
    weight = (12 / 13) ** n / 13
    slow = lambda z: np.exp(-z / 2) * eval_laguerre(n, z)
    for scan in (PulseScan(1, area), PulseScan(2, area), RamseyScan(wait, area_rad=area / 8)):
        at_rest = jax.vmap(
            lambda f1, f2, scan=scan: scan.planned(ion(), {"rabi_scale_1": (0, 1.3)}).probability(
                ion(rabi_scale_1=1.07 * f1, rabi_scale_2=0.93 * f2)
            )
        )(slow(eta**2), slow(0.06**2))
        np.testing.assert_allclose(scan.probability(hot), weight @ np.asarray(at_rest), atol=3e-8)


def test_thermal_nodes_reach_the_error_they_promise():
    for n_bar, eta, area in ((0.05, 0.1, 30.0), (5.0, 0.08, np.pi), (20.0, 0.08, np.pi), (20.0, 0.08, 8 * np.pi)):
        nodes = nodes_for(n_bar, eta, area, 1e-8)
        assert thermal_error(n_bar, eta, area, nodes) <= 1e-8
        assert nodes < 100
    # The device's eight nodes serve its own cycles, and not a scan of many turns.
    assert thermal_error(20.0, 0.08, np.pi, 8) < 1e-9
    assert thermal_error(20.0, 0.08, 8 * np.pi, 8) > 1e-3
    assert nodes_for(0.0, 0.08, 100.0, 1e-8) == nodes_for(9.0, 0.0, 100.0, 1e-8) == 1
    with pytest.raises(ValueError, match="needs more than 128 thermal nodes"):
        nodes_for(50.0, 0.2, 300.0, 1e-8)


@pytest.mark.parametrize(
    "kind", [pytest.param(one, marks=() if one in ("rabi 1", "ramsey") else pytest.mark.slow) for one in SCANS]
)
def test_gradients_against_finite_differences(kind):
    names = ("rabi_scale_1", "rabi_scale_2", "detuning_1_hz", "detuning_2_hz", "laser_linewidth_hz", "sigma_1_s",
             "sigma_2_s", "nominal_sigma_1_s", "separation_s", "lead_s", "tail_s", "lifetime_s", "n_bar", "eta_1",
             "readout_error_bright", "readout_error_dark", "amplitude_1")  # fmt: skip
    device = ion(n_bar=3.0, eta_1=0.06, eta_2=0.05, phonon_nodes=6, heating_rate_per_s=400.0)
    point = jnp.stack([getattr(device, name) for name in names])
    scale = jnp.where(jnp.abs(point) > 0, jnp.abs(point), 1.0)
    box = {name: (float(v) - abs(float(v)) / 100, float(v) + abs(float(v)) / 100)
           for name, v in zip(names, point, strict=True)}  # fmt: skip
    device = dataclasses.replace(device, method=StaticGrid(error=1e-12))
    scan = SCANS[kind].planned(device, box)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=7))

    @jax.jit
    def total(relative):
        values = dict(zip(names, relative * scale, strict=True))
        return weights @ scan.probability(dataclasses.replace(device, **values))

    at = point / scale
    slope = jax.grad(total)(at)
    for k, name in enumerate(names):
        step = 3e-4 * (np.arange(len(names)) == k)
        coarse, fine = ((total(at + h * step) - total(at - h * step)) / (6e-4 * h) for h in (1.0, 0.5))
        assert slope[k] == pytest.approx(float((4 * fine - coarse) / 3), rel=2e-6, abs=2e-8), name
    # Forward mode agrees.
    forward = dataclasses.replace(device, method=StaticGrid(error=1e-12, differentiation="forward"))
    tangent = lambda r: (
        weights @ scan.probability(dataclasses.replace(forward, **dict(zip(names, r * scale, strict=True))))
    )
    _, along = jax.jvp(tangent, (at,), (jnp.ones_like(at),))
    assert along == pytest.approx(float(jnp.sum(slope)), rel=1e-8)


@pytest.mark.slow
def test_commanded_numbers_have_gradients():
    scan = SCANS["rabi 1"].planned(ion(), {})
    for name, size in (("area_rad", 1.0), ("sigma_s", 1e-5), ("detuning_set_hz", 1e3)):
        slope = jax.grad(lambda v, name=name: jnp.sum(dataclasses.replace(scan, **{name: v}).probability(ion())))(
            jnp.broadcast_to(getattr(scan, name), 7)
        )
        assert np.all(np.isfinite(slope))
        assert np.max(np.abs(slope)) * size > 1e-3


@pytest.mark.parametrize("kind", SCANS)
def test_every_ion_in_the_box_is_solved_under_jit(kind):
    scan, lane = SCANS[kind].planned(ion(), BOX), np.random.default_rng(1).uniform(size=(12, len(BOX)))
    lane = np.concatenate([lane, np.round(lane)])  # corners too
    low, high = np.array(list(BOX.values())).T
    make = lambda row: ion(**dict(zip(BOX, row, strict=True)))
    values = low + (high - low) * lane
    p = jax.jit(jax.vmap(lambda row: scan.probability(make(row))))(values)
    assert np.all(np.isfinite(p))
    exact = SCANS[kind].probability(dataclasses.replace(make(values[-1]), method=Adaptive()))
    np.testing.assert_allclose(p[-1], exact, atol=2e-8)


def test_new_values_reuse_the_program():
    traces = []

    @jax.jit
    def probability(scan, values):
        traces.append(1)
        return scan.probability(ion(**values))

    for scan in (SCANS["rabi 1"], SCANS["ramsey"]):
        scan = scan.planned(ion(), BOX)
        first = probability(scan, {"rabi_scale_1": 1.1, "detuning_1_hz": 100.0})
        traces.clear()
        second = probability(scan, {"rabi_scale_1": 0.8, "detuning_1_hz": -2e3})
        moved = eqx.tree_at(lambda s: s.detuning_set_hz, scan, scan.detuning_set_hz + 20.0)
        third = probability(moved, {"rabi_scale_1": 0.8, "detuning_1_hz": -2e3})
        assert traces == []
        assert len({float(jnp.sum(p)) for p in (first, second, third)}) == 3


def test_methods_of_the_device_set_the_error():
    scan = SCANS["rabi 1"]
    exact = scan.probability(ion(method=Adaptive()))
    for method, error in ((Lindblad(1e-5), 1e-5), (Automatic(1e-6), 1e-6), (ClosedForm(), 1e-8), (StaticGrid(), 1e-8)):
        device = ion(method=method)
        assert scan.planned(device, {}).plan.error == error
        np.testing.assert_allclose(scan.probability(device), exact, atol=error)
    # A device planned for loops and coarsened walks fewer steps of the same program.
    device = planned(ion(method=Lindblad(1e-9)), BOX, solves=1000.0)
    assert scan.planned(device, BOX).plan.error == 1e-9
    rough = scan.planned(device, BOX).probability(coarsened(device, 1e-4))
    assert 1e-10 < np.max(np.abs(rough - exact)) < 1e-4


def test_a_batch_of_devices_goes_behind_the_rows():
    scales = jnp.array([0.9, 1.0, 1.2])
    for kind in ("rabi 2", "ramsey"):
        scan = SCANS[kind]
        batch = scan.probability(ion(rabi_scale_1=scales))
        assert batch.shape == (7, 3), kind
        for k in (0, 2):
            one = scan.probability(ion(rabi_scale_1=float(scales[k])))
            np.testing.assert_allclose(batch[:, k], one, atol=1e-8, err_msg=kind)
    readout = ReadoutScan(jnp.array([True, False])).probability(ion(rabi_scale_1=scales))
    np.testing.assert_array_equal(readout[:, 0], [0.01, 0.02])


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="`pulse` must be 1 or 2, but is 3"):
        PulseScan(3, jnp.ones(2))
    with pytest.raises(ValueError, match="cannot be planned from traced values"):
        jax.jit(lambda s: SCANS["ramsey"].probability(ion(rabi_scale_1=s)))(1.0)
    # Outside of the box for which it was planned, a row is NaN and never wrong.
    scan = SCANS["frequency 1"].planned(ion(), {})
    assert np.all(np.isnan(scan.probability(ion(sigma_1_s=200e-6, nominal_sigma_1_s=200e-6, detuning_1_hz=9e4))[::6]))

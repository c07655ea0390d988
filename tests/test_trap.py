"""Paul traps: reference rows, motion in their potentials step by step, gradients, traps that do not hold."""

import dataclasses
import functools
import math
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import constants
from scipy.integrate import quad, solve_ivp
from scipy.ndimage import label
from scipy.special import jv

from twin import mathieu
from twin.ion import YB171
from twin.micromotion import bessel_j
from twin.surface_trap import SurfaceTrap
from twin.trap import HarmonicTrap, LinearTrap, heating_rate_per_s

E, M = constants.elementary_charge, YB171.mass_kg
LINEAR = LinearTrap(
    rf_voltage_v=1500.0, rf_hz=22e6, r0_m=500e-6, dc_voltage_v=60.0, z0_m=2e-3, kappa=0.3, asymmetry_voltage_v=8.0
)
# The asymmetric trap of arXiv:2407.14195, table 1; its axial frequency is ours.
SURFACE = SurfaceTrap(
    rf_voltage_v=100.0,
    rf_hz=22e6,
    center_width_m=40e-6,
    left_width_m=160e-6,
    right_width_m=400e-6,
    gap_m=6e-6,
    axial_hz=0.5e6,
    static_asymmetry=0.4,
)
MEASURED = HarmonicTrap(np.array([1.1e6, 0.9e6, 0.4e6]), rf_hz=10.1e6)
TRAPS = {"linear": LINEAR, "surface": SURFACE, "measured": MEASURED}
contract = pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS)


# ------------------------------------------------------------------------------------------------ reference rows


def test_row_59():
    # q = 0.3 at 22 MHz: 2.33345 MHz to lowest order, 2.37665 MHz exactly.
    voltage = 0.3 * M * (500e-6 * 2 * math.pi * 22e6) ** 2 / (2 * E)
    trap = LinearTrap(voltage, 22e6, 500e-6, 0.0, 2e-3, 0.3)
    np.testing.assert_allclose(trap.q, [0.3, -0.3, 0], rtol=1e-14)
    np.testing.assert_allclose(trap.pseudopotential_hz[:2], 2.33345e6, rtol=3e-6)
    np.testing.assert_allclose(trap.secular_hz[:2], 2.37665e6, rtol=3e-6)


def test_berkeland_example():
    # 171Yb+ at 1 MHz in 10.1 MHz, 1 V/m, 369.5 nm along the field.
    trap = HarmonicTrap(np.array([1e6, 1e6, 100.0]), rf_hz=10.1e6)
    assert trap.q[0] == pytest.approx(0.27576, abs=5e-6)
    beam = [2 * math.pi / 369.5e-9, 0, 0]
    seen = trap.excess_micromotion([1.0, 0, 0], beam)
    assert abs(seen.index) == pytest.approx(0.0346, abs=5e-5)
    assert seen.carrier_factor == pytest.approx(jv(0, float(seen.index)), abs=1e-15)
    lowest = trap.excess_micromotion([1.0, 0, 0], beam, lowest_order=True)
    u_0 = E / (M * (2 * math.pi * 1e6) ** 2)
    assert lowest.displacement_m[0] == pytest.approx(u_0, rel=1e-12)
    assert lowest.amplitude_m[0] == pytest.approx(-float(trap.q[0]) / 2 * u_0, rel=1e-12)
    assert abs(lowest.index) == pytest.approx(0.03352, abs=1e-5)


def test_heating_rates_of_rows_62_and_63():
    beryllium = 9.0121831 * constants.atomic_mass - constants.electron_mass
    assert heating_rate_per_s(2.225e-13, 3.6e6, beryllium) == pytest.approx(40.0, rel=1e-3)
    assert heating_rate_per_s(1e-12, 1e6, M) == pytest.approx(34.121, rel=1e-5)


def test_surface_trap_of_the_reference():
    np.testing.assert_allclose(SURFACE.null_m * 1e6, [-9.65, 76.52], atol=5e-3)
    assert SURFACE.q[0] == pytest.approx(0.2934, abs=5e-5)
    assert SURFACE.depth_ev == pytest.approx(0.1104, abs=5e-5)
    bare = dataclasses.replace(SURFACE, gap_m=0.0)
    np.testing.assert_allclose(bare.null_m * 1e6, [-8.57, 69.99], atol=5e-3)
    assert bare.q[0] == pytest.approx(0.3420, abs=5e-5)
    assert bare.depth_ev == pytest.approx(0.1286, abs=5e-5)


# ------------------------------------------------------------------------------------------------ the ion's motion


@functools.cache
def curvatures(trap_name):
    trap = TRAPS[trap_name]
    return np.asarray(trap.static_curvature_v_per_m2), np.asarray(trap.rf_curvature_v_per_m2)


def moved(trap, axis, state, field=0.0, times=None):
    """One axis through one rf period in SI units, from the trap's curvatures alone."""
    static, rf = (x[axis] for x in curvatures(next(name for name, other in TRAPS.items() if other is trap)))
    omega, m = 2 * math.pi * float(trap.rf_hz), float(trap.mass_kg)
    force = lambda t, u: [u[1], E / m * (field - (static + rf * math.cos(omega * t)) * u[0])]
    period = 1 / float(trap.rf_hz)
    solution = solve_ivp(
        force, (0, period), state, method="DOP853", rtol=1e-13, atol=1e-30, t_eval=times, max_step=period / 20
    )
    return solution.y if times is not None else solution.y[:, -1]


@contract
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_secular_frequencies_of_the_integrated_motion(trap, axis):
    # Phase advance over one rf period T: 2 pi f T, from half the trace of the map of (u, du/dt).
    trace = moved(trap, axis, [1.0, 0.0])[0] + moved(trap, axis, [0.0, 1.0])[1]
    phase = math.acos(trace / 2)
    assert trap.secular_hz[axis] == pytest.approx(phase / (2 * math.pi) * float(trap.rf_hz), rel=1e-9)


@contract
@pytest.mark.parametrize("axis", [0, 1])
def test_excess_micromotion_of_the_integrated_motion(trap, axis):
    # A static field E drives a periodic motion: the fixed point of the affine map of one period.
    field = 3.0
    columns = [moved(trap, axis, state) for state in ([1.0, 0.0], [0.0, 1.0])]
    offset = moved(trap, axis, [0.0, 0.0], field)
    start = np.linalg.solve(np.eye(2) - np.stack(columns, 1), offset)
    times = (np.arange(64) / 64) / float(trap.rf_hz)
    u = moved(trap, axis, start, field, times)[0]
    vector = field * np.eye(3)[axis]
    excess = trap.excess_micromotion(vector, np.eye(3)[axis])
    assert excess.displacement_m[axis] == pytest.approx(u.mean(), rel=1e-8)
    cosine = 2 * (u * np.cos(2 * math.pi * np.arange(64) / 64)).mean()
    assert excess.amplitude_m[axis] == pytest.approx(cosine, rel=1e-8)
    assert excess.index == pytest.approx(cosine, rel=1e-8)


@contract
def test_intrinsic_micromotion_of_the_integrated_motion(trap):
    # Even solution u = sum C_n cos[(omega + n Om) t]: fitted over many rf periods.
    a, q = float(trap.a[0]), float(trap.q[0])
    xi = np.linspace(0, 40 * math.pi, 4001)
    f = lambda t, u: [u[1], -(a - 2 * q * math.cos(2 * t)) * u[0]]
    u = solve_ivp(f, (0, xi[-1]), [1.0, 0.0], method="DOP853", rtol=1e-12, atol=1e-14, t_eval=xi).y[0]
    basis = np.cos((float(trap.beta[0]) + 2 * np.arange(-3, 4)) * xi[:, None])
    c = np.linalg.lstsq(basis, u)[0]
    assert trap.micromotion_ratio[0] == pytest.approx(-(c[2] + c[4]) / c[3], rel=1e-6)


def test_intrinsic_micromotion_is_half_of_q_to_lowest_order():
    weak = dataclasses.replace(LINEAR, rf_voltage_v=30.0, dc_voltage_v=0.01, asymmetry_voltage_v=0.0)
    np.testing.assert_allclose(weak.micromotion_ratio[:2], weak.q[:2] / 2, rtol=1e-4)
    assert weak.micromotion_ratio[2] == 0


def test_motion_above_the_strips():
    # Small steps off the null in the potential of the strips, Newton's equations in the plane with the static field
    # along the tilted axes: the trace of the map of one rf period gives both radial frequencies.
    trap, period = SURFACE, 1 / 22e6
    null, axes = np.asarray(trap.null_m), np.asarray(trap.axes)[:2, :2]
    edges = np.array([-189e-6, -23e-6, 23e-6, 429e-6])
    static = axes.T @ np.diag(np.asarray(trap.static_curvature_v_per_m2)[:2]) @ axes

    def rf_field(r):
        x, y = r[0] - edges, r[1]
        signs, square = np.array([-1, 1, -1, 1]) * 100 / math.pi, x**2 + y**2
        # -grad of (V/pi) sum s atan((e - x)/y)
        return np.array([(signs * y / square).sum(), -(signs * x / square).sum()])

    def force(t, u):
        field = rf_field(null + u[:2]) * math.cos(2 * math.pi * 22e6 * t) - static @ u[:2]
        return np.concatenate([u[2:], E / M * field])

    size = np.array([1e-10, 1e-10, 1e-2, 1e-2])
    columns = []
    for k in range(4):
        start = size[k] * np.eye(4)[k]
        end = solve_ivp(force, (0, period), start, method="DOP853", rtol=1e-12, atol=1e-12 * size).y[:, -1]
        columns.append(end / size)
    phases = np.abs(np.angle(np.linalg.eigvals(np.stack(columns, 1))))
    expected = 2 * math.pi * np.asarray(trap.secular_hz)[:2] * period
    np.testing.assert_allclose(np.sort(phases)[::2], np.sort(expected), rtol=1e-5)


# ------------------------------------------------------------------------------------------------ every trap


@contract
def test_static_fields_obey_laplace(trap):
    assert jnp.sum(trap.a) == pytest.approx(0, abs=1e-12)
    assert jnp.sum(trap.q) == 0
    assert trap.q[2] == 0 and trap.q[0] > 0


@contract
def test_other_masses(trap):
    same = trap.secular_hz_for(M)
    np.testing.assert_allclose(same, trap.secular_hz, rtol=1e-11)
    # A little heavier: the static part scales as 1/m, that of the rf nearly as 1/m^2; z, without rf, exactly.
    scale = 0.98
    heavier = trap.secular_hz_for(M / scale)
    np.testing.assert_allclose(heavier**2, trap.static_hz2 * scale + trap.rf_hz2 * scale**2, rtol=3e-3)
    assert heavier[2] == pytest.approx(float(trap.secular_hz[2]) * math.sqrt(scale), rel=1e-12)


def test_other_masses_by_the_trap_itself():
    calcium = 40 * constants.atomic_mass
    weak = dataclasses.replace(LINEAR, rf_voltage_v=500.0)
    np.testing.assert_allclose(
        weak.secular_hz_for(calcium), dataclasses.replace(weak, mass_kg=calcium).secular_hz, rtol=1e-12
    )


@contract
def test_many_stray_fields_at_once(trap):
    fields = np.zeros((3, 5))
    fields[0] = np.linspace(0, 100, 5)
    seen = trap.excess_micromotion(fields, np.array([1.7e7, 0, 0])[:, None])
    assert seen.index.shape == (5,)
    one = trap.excess_micromotion(fields[:, 3], np.array([1.7e7, 0, 0]))
    assert seen.index[3] == pytest.approx(float(one.index), rel=1e-13)
    assert seen.carrier_factor[0] == 1 and seen.sideband_factor[0] == pytest.approx(0, abs=1e-16)


def test_numbers_of_a_batch():
    many = dataclasses.replace(LINEAR, rf_voltage_v=np.array([1000.0, 1500.0]), dc_voltage_v=np.array([[60.0], [80.0]]))
    assert many.secular_hz.shape == (3, 2, 2) and many.stable.shape == (2, 2) and many.depth_ev.shape == (2, 2)
    np.testing.assert_allclose(many.secular_hz[:, 0, 1], LINEAR.secular_hz, rtol=1e-12)
    wide = dataclasses.replace(SURFACE, left_width_m=np.array([100e-6, 160e-6, 200e-6]))
    assert wide.axes.shape == (3, 3, 3) and wide.depth_ev.shape == (3,)
    assert wide.depth_ev[1] == pytest.approx(float(SURFACE.depth_ev), rel=1e-12)


def test_new_values_do_not_recompile():
    traces = []

    @eqx.filter_jit
    def frequencies(trap):
        traces.append(1)
        return trap.secular_hz

    for voltage in (900.0, 1000.0):
        frequencies(dataclasses.replace(LINEAR, rf_voltage_v=voltage))
    assert len(traces) == 1


# ------------------------------------------------------------------------------------------------ gradients


def numbers(trap):
    seen = trap.excess_micromotion([3.0, 2.0, 1.0], [1.2e7, -0.9e7, 0.4e7])
    parts = [trap.secular_hz / 1e6, trap.pseudopotential_hz / 1e6, trap.micromotion_ratio]
    return jnp.concatenate([*parts, jnp.stack([seen.index, seen.carrier_factor])])


@contract
def test_gradients_against_finite_differences(trap):
    # By relative changes of every parameter, so that steps have the right size.
    changed = lambda relative, name: dataclasses.replace(trap, **{name: getattr(trap, name) * (1 + relative)})
    f = eqx.filter_jit(lambda t: numbers(t))
    for name in (field.name for field in dataclasses.fields(trap)):
        slope = jax.jvp(lambda r, name=name: numbers(changed(r, name)), (0.0,), (1.0,))[1]
        step = 2e-5
        difference = (f(changed(step, name)) - f(changed(-step, name))) / (2 * step)
        np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-7, err_msg=name)


def test_gradients_of_depth_height_and_tilt():
    def geometry(left):
        trap = dataclasses.replace(SURFACE, left_width_m=left * 160e-6)
        return jnp.stack([trap.depth_ev * 10, trap.height_m * 1e4, trap.tilt_rad, trap.efficiency])

    step = 1e-5
    difference = (geometry(1 + step) - geometry(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.jacrev(geometry)(1.0), difference, rtol=1e-6)
    depth = lambda v: dataclasses.replace(LINEAR, rf_voltage_v=v).depth_ev
    assert jax.grad(depth)(1500.0) == pytest.approx(float(depth(1500.1) - depth(1499.9)) / 0.2, rel=1e-6)


# ------------------------------------------------------------------------------------------------ linear trap


def test_depth_of_a_linear_trap():
    # e V q/8 at the rods, or the endcaps' kappa U, whichever is less; endcaps far away leave the radial motion alone.
    long = dataclasses.replace(LINEAR, rf_voltage_v=200.0, z0_m=1e3, kappa=1.0, asymmetry_voltage_v=0.0)
    assert dataclasses.replace(long, dc_voltage_v=100.0).depth_ev == pytest.approx(200 * float(long.q[0]) / 8, rel=1e-6)
    assert dataclasses.replace(long, dc_voltage_v=0.1).depth_ev == pytest.approx(0.1, rel=1e-6)


def test_the_asymmetry_voltage_splits_x_from_y():
    plain = dataclasses.replace(LINEAR, asymmetry_voltage_v=0.0)
    assert plain.secular_hz[0] == pytest.approx(float(plain.secular_hz[1]), rel=1e-12)
    assert LINEAR.secular_hz[0] > plain.secular_hz[0] > LINEAR.secular_hz[1]


# ------------------------------------------------------------------------------------------------ measured frequencies


def test_measured_frequencies_give_back_the_trap():
    known = HarmonicTrap(LINEAR.secular_hz, rf_hz=22e6)
    np.testing.assert_allclose(known.a, LINEAR.a, atol=1e-13)
    np.testing.assert_allclose(known.q, LINEAR.q, atol=1e-13)


@pytest.mark.parametrize("betas", [(0.98, 0.97, 0.9), (0.01, 0.9, 0.01), (0.99, 0.05, 0.3), (0.02, 0.01, 0.5)])
def test_any_exponents_have_a_trap(betas):
    trap = HarmonicTrap(np.array(betas) * 5e6, rf_hz=10e6)
    np.testing.assert_allclose(mathieu.characteristic_exponent(trap.a, trap.q), betas, atol=1e-11)
    assert jnp.sum(trap.a) == pytest.approx(0, abs=1e-12)


def test_without_the_rf_only_frequencies_are_known():
    trap = HarmonicTrap([1e6, 1e6, 3e5])
    trap.check()
    assert trap.stable
    np.testing.assert_array_equal(trap.secular_hz, [1e6, 1e6, 3e5])
    for unknown in (trap.a, trap.q[:2], trap.micromotion_ratio, trap.secular_hz_for(2 * M), trap.depth_ev):
        assert np.all(np.isnan(unknown))
    assert np.isnan(trap.excess_micromotion([1.0, 0, 0], [1e7, 0, 0]).index)


# ------------------------------------------------------------------------------------------------ surface trap


@pytest.mark.parametrize("strips", [(40e-6, 160e-6, 400e-6), (100e-6, 100e-6, 100e-6), (80e-6, 300e-6, 50e-6)])
def test_null_and_curvature_of_the_potential(strips):
    trap = SurfaceTrap(100.0, 30e6, *strips, axial_hz=1e5)
    potential = lambda r: trap.rf_potential_v(r[0], r[1])
    field, hessian = jax.grad(potential)(trap.null_m), jax.hessian(potential)(trap.null_m)
    np.testing.assert_allclose(field * trap.height_m, 0, atol=1e-10)
    turned = trap.axes[:2, :2] @ hessian @ trap.axes[:2, :2].T
    size = abs(turned[0, 0])
    np.testing.assert_allclose(turned, np.diag([1, -1]) * turned[0, 0], atol=1e-9 * size)
    assert trap.q[0] == pytest.approx(2 * E * float(size) / (M * (2 * math.pi * 30e6) ** 2), rel=1e-10)
    assert trap.efficiency == pytest.approx(float(size * trap.height_m**2) / 100, rel=1e-10)


def test_potential_is_the_integral_over_the_strips():
    # phi = (y/pi) int V(s)/((x - s)^2 + y^2) ds, the Poisson integral of the half plane.
    for x, y in [(0.0, 80e-6), (-50e-6, 10e-6), (200e-6, 300e-6)]:
        kernel = lambda s, x=x, y=y: y / math.pi / ((x - s) ** 2 + y**2)
        expected = sum(100 * quad(kernel, *strip, epsabs=1e-12)[0] for strip in [(-189e-6, -23e-6), (23e-6, 429e-6)])
        assert SURFACE.rf_potential_v(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("strips", [(40e-6, 160e-6, 400e-6), (100e-6, 100e-6, 100e-6), (80e-6, 700e-6, 20e-6)])
def test_the_saddle_is_the_pass_out_of_the_trap(strips):
    trap = SurfaceTrap(100.0, 30e6, *strips, axial_hz=1e5)
    energy = lambda r: trap.pseudopotential_ev(r[0], r[1])
    depth, scale = energy(trap.saddle_m), trap.height_m
    np.testing.assert_allclose(jax.grad(energy)(trap.saddle_m) * scale / depth, 0, atol=1e-9)
    low, high = np.linalg.eigvalsh(jax.hessian(energy)(trap.saddle_m))
    assert low < 0 < high
    # Below the saddle's energy the ion stays near the null, above it there is a way to the edge of the table.
    x, y = np.linspace(-4, 4, 300) * float(scale) + float(trap.null_m[0]), np.linspace(0.02, 8, 300) * float(scale)
    table = np.asarray(trap.pseudopotential_ev(x[:, None], y))
    home = tuple(np.abs(axis - float(at)).argmin() for axis, at in zip((x, y), trap.null_m, strict=True))
    for level, leaves in [(0.98, False), (1.02, True)]:
        parts = label(table < level * float(depth))[0]
        mine = parts == parts[home]
        assert (mine[0].any() or mine[-1].any() or mine[:, 0].any() or mine[:, -1].any()) == leaves


def test_energy_of_the_pseudopotential_near_the_null():
    # m omega^2 u^2/2 with the lowest-order frequency, without the static field.
    trap = dataclasses.replace(SURFACE, axial_hz=1.0)
    step = 1e-9
    energy = trap.pseudopotential_ev(trap.null_m[0] + step, trap.null_m[1]) * E
    omega = 2 * math.pi * float(trap.pseudopotential_hz[0])
    assert energy == pytest.approx(0.5 * M * omega**2 * step**2, rel=1e-4)


def test_equal_strips_have_no_tilt_and_the_best_efficiency():
    trap = SurfaceTrap(100.0, 30e6, 100e-6, 150e-6, 150e-6, axial_hz=1e5)
    assert trap.tilt_rad == pytest.approx(0, abs=1e-12) and trap.null_m[0] == pytest.approx(0, abs=1e-18)
    best = (1 + math.sqrt(2)) * 100e-6
    for left, right in [(1, 1), (1.05, 1), (1, 0.95), (1.1, 1.1)]:
        efficiency = dataclasses.replace(trap, left_width_m=left * best, right_width_m=right * best).efficiency
        assert efficiency == pytest.approx(1 / math.pi, rel=1e-12) if left == right == 1 else efficiency < 1 / math.pi


def test_mirrored_strips_turn_the_other_way():
    mirrored = dataclasses.replace(SURFACE, left_width_m=400e-6, right_width_m=160e-6)
    assert mirrored.tilt_rad == pytest.approx(-float(SURFACE.tilt_rad), rel=1e-10)
    assert mirrored.null_m[0] == pytest.approx(-float(SURFACE.null_m[0]), rel=1e-10)
    assert mirrored.depth_ev == pytest.approx(float(SURFACE.depth_ev), rel=1e-12)


def test_axial_confinement():
    assert SURFACE.secular_hz[2] == pytest.approx(0.5e6, rel=1e-12)
    free = dataclasses.replace(SURFACE, axial_hz=1.0, static_asymmetry=0.0)
    lost = jnp.mean(free.pseudopotential_hz[:2] ** 2 - SURFACE.pseudopotential_hz[:2] ** 2)
    assert lost == pytest.approx(0.5e6**2 / 2, rel=1e-6)
    split = SURFACE.pseudopotential_hz[1] ** 2 - SURFACE.pseudopotential_hz[0] ** 2
    assert split == pytest.approx(0.4 * 0.5e6**2, rel=1e-6)


# ------------------------------------------------------------------------------------------ traps that do not hold


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rf_voltage_v": 5000.0}, r"along x: a = .*, q = 1\.\d+, but q must lie between 0 and 0\.9.*lower the rf"),
        ({"rf_voltage_v": 10.0}, r"along y: a = .*, q = -0\.00.*, but q must lie between 0\.\d+ and .*raise the rf"),
        ({"asymmetry_voltage_v": 4e4}, r"along x: a = .*no q is stable with this a; lower the static"),
        ({"dc_voltage_v": -1.0}, r"along z: a = -.*without rf it needs 0 < a < 1; change the static voltage"),
    ],
)
def test_known_traps_that_do_not_hold_are_refused(change, message):
    trap = dataclasses.replace(LINEAR, **change)
    with pytest.raises(ValueError, match=message):
        trap.check()
    assert not trap.stable
    assert np.isnan(trap.depth_ev)
    bad = ~np.isfinite(trap.secular_hz)
    assert np.all(np.isnan(trap.pseudopotential_hz[bad])) and np.all(np.isnan(trap.micromotion_ratio[bad]))
    field = np.where(bad, 1.0, 0.0)
    assert np.isnan(trap.excess_micromotion(field, field).index)


@contract
def test_traps_that_hold_pass(trap):
    trap.check()
    assert trap.stable


def test_an_unstable_trap_in_a_batch_is_flagged_alone():
    voltages = np.array([1500.0, 5000.0])
    batch = eqx.filter_jit(lambda v: dataclasses.replace(LINEAR, rf_voltage_v=v).secular_hz)(voltages)
    np.testing.assert_allclose(batch[:, 0], LINEAR.secular_hz, rtol=1e-12)
    assert np.all(np.isnan(batch[:2, 1]))
    total = lambda v: jnp.nansum(dataclasses.replace(LINEAR, rf_voltage_v=v).secular_hz)
    assert np.all(np.isfinite(jax.grad(total)(voltages)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(LINEAR, rf_hz=-1.0), "`rf_hz` must be positive and finite, but is -1.0"),
        (lambda: dataclasses.replace(LINEAR, kappa=1.5), "`kappa` must be above 0 and at most 1, but is 1.5"),
        (lambda: dataclasses.replace(SURFACE, gap_m=-1e-6), "`gap_m` must be zero or positive, and finite"),
        (lambda: dataclasses.replace(SURFACE, axial_hz=0.0), "`axial_hz` must be positive"),
        (lambda: HarmonicTrap([1e6, 1e6]), r"`frequencies_hz` must have shape \(3, ...\).*but has \(2,\)"),
        (lambda: HarmonicTrap([6e6, 1e6, 1e6], rf_hz=1e7), "`frequencies_hz` must be below half of `rf_hz`"),
        (lambda: LINEAR.secular_hz_for(-1.0), "`mass_kg` must be positive"),
        (lambda: LINEAR.excess_micromotion([1.0], [1.0, 0, 0]), "`stray_field_v_per_m` must have shape"),
        (lambda: heating_rate_per_s(1e-12, -1e6, M), "`secular_hz` must be positive"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------ Bessel functions


@pytest.mark.parametrize("order", [0, 1, 2, 10])
def test_bessel_functions(order):
    x = np.concatenate([np.linspace(-3, 3, 41), [15.0, 29.9]])
    np.testing.assert_allclose(bessel_j(order, x), jv(order, x), atol=1e-14)


def test_derivatives_of_bessel_functions():
    for x in (0.0, 0.0346, 2.4):
        assert jax.grad(bessel_j, 1)(0, x) == pytest.approx(-jv(1, x), abs=1e-14)
        assert jax.grad(jax.grad(bessel_j, 1), 1)(0, x) == pytest.approx((jv(2, x) - jv(0, x)) / 2, abs=1e-14)


# ------------------------------------------------------------------------------------------------ the page


@pytest.mark.slow
def test_the_example_of_the_page(capsys):
    page = (Path(__file__).parent.parent / "docs" / "trap.md").read_text(encoding="utf-8")
    code, printed = page.split("```python\n")[1].split("```\n")[0], page.split("\n```\n")[2]
    exec(compile(code, "docs/trap.md", "exec"), {})
    assert capsys.readouterr().out.strip() == printed.strip()
    with pytest.raises(ValueError) as refused:
        dataclasses.replace(SURFACE, rf_voltage_v=400.0).check()
    assert str(refused.value) in page.replace("\n", " ")

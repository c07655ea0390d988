"""Two memristors on one ion: products of cosines, crossed pairs, QuTiP on seven levels, and all five lines at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qutip
from scipy.integrate import solve_ivp

from twin import hysteresis
from twin.master_equation import unpack_density
from twin.memory import MovingAverage
from twin.memory_inputs import CROSSED, OWN
from twin.memristor import sine_input
from twin.methods import ClosedForm, StaticGrid
from twin.star import LEVELS, SUBLEVELS, ZEEMAN_HZ_PER_TESLA, Star, quadrupole_beam, run_star

SIGMA_S = 20e-6
WINDOWS = (5.0, 3.0)
# Pulses nine sigma apart, windows of eight, nothing decays: the closed form but for 1e-10.
IDEAL = Star(
    memories=tuple(MovingAverage(w) for w in WINDOWS),
    separation_s=9 * SIGMA_S,
    lead_s=8 * SIGMA_S,
    tail_s=8 * SIGMA_S,
    lifetime_s=np.inf,
)
CLOSED = dataclasses.replace(IDEAL, method=ClosedForm())
U = sine_input(periods=1, cycles_per_period=16)
X_SET = jnp.stack([U, 0.9 - 0.8 * U])


def by_hand(x_set, memory_inputs, cascade):
    """x, y, r of both memristors in plain numbers."""
    fed, rows = [], []
    for u_a, u_b in np.asarray(x_set).T:
        past = np.array([[0.5, 0.5]] * 5 + fed)
        r_a, r_b = (past[-int(w) :].mean(axis=0) @ np.array(memory_inputs[k]) for k, w in enumerate(WINDOWS))
        x_a, y_a = u_a, (1 - r_a) * u_a
        x_b = u_b * y_a if cascade else u_b
        rows.append([(x_a, x_b), (y_a, (1 - r_b) * x_b), (r_a, r_b)])
        fed.append([x_a, x_b])
    return np.moveaxis(np.array(rows), 0, -1)


@pytest.mark.parametrize("memory_inputs", [OWN, CROSSED, ((0.5, 0.5), (0.2, 0.8))])
@pytest.mark.parametrize("cascade", [True, False])
def test_closed_form_against_plain_numbers(memory_inputs, cascade):
    loop = run_star(dataclasses.replace(CLOSED, memory_inputs=memory_inputs, cascade=cascade), X_SET)
    x, y, r = by_hand(X_SET, memory_inputs, cascade)
    np.testing.assert_allclose(loop.x, x, atol=1e-12)
    np.testing.assert_allclose(loop.y, y, atol=1e-12)
    np.testing.assert_allclose(loop.r, r, atol=1e-12)
    np.testing.assert_allclose(np.sum(loop.populations, axis=0), 1, atol=1e-12)


@pytest.mark.parametrize("cascade", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_dynamics_of_separated_pulses_are_the_closed_form(cascade):
    star = dataclasses.replace(IDEAL, memory_inputs=CROSSED, cascade=cascade)
    loop = run_star(star, X_SET)
    x, y, r = by_hand(X_SET, CROSSED, cascade)
    assert bool(loop.valid.all())
    for found, expected in ((loop.x, x), (loop.y, y), (loop.r, r)):
        np.testing.assert_allclose(found, expected, atol=1e-10)
    closed = run_star(dataclasses.replace(star, method=ClosedForm()), X_SET)
    np.testing.assert_allclose(loop.populations, closed.populations, atol=1e-10)


def test_crossed_feedback_has_the_areas_of_two_crossed_memristors():
    """Both inputs on one ion that is prepared anew: pi/8 S sin(lag - Phi), and pi/8 (S sin lag - sin Phi)."""
    cycles, window, lead = 80, 24, 17
    star = dataclasses.replace(
        CLOSED,
        memory_inputs=CROSSED,
        cascade=False,
        memories=(MovingAverage(float(window)), MovingAverage(float(window))),
    )
    u = [sine_input(periods=2, cycles_per_period=cycles, delay_cycles=-shift) for shift in (0, lead)]
    loop = run_star(star, jnp.stack(u))
    period = slice(cycles, 2 * cycles)
    w = 2 * np.pi / cycles
    size, lag, phi = np.sin(window * w / 2) / (window * np.sin(w / 2)), w * (window + 1) / 2, w * lead
    # The polygon of a band-limited loop loses this factor.
    scale = np.pi / 8 * np.sin(w) / w
    x_a, x_b, y_a, y_b = (values[period] for values in (*loop.x, *loop.y))
    np.testing.assert_allclose(hysteresis.signed_area(x_a, y_a), scale * size * np.sin(lag - phi), atol=1e-12)
    np.testing.assert_allclose(hysteresis.signed_area(x_b, y_b), scale * size * np.sin(lag + phi), atol=1e-12)
    np.testing.assert_allclose(hysteresis.signed_area(x_b, y_a), scale * (size * np.sin(lag) - np.sin(phi)), atol=1e-12)


# ------------------------------------------------------------------------------------------------- the real dynamics

ROUGH = Star(
    memories=(MovingAverage(4.0), MovingAverage(4.0)),
    sublevels_a=(0, 2),
    sublevels_b=(-1, -2),
    separation_s=4 * SIGMA_S,
    lead_s=5 * SIGMA_S,
    tail_s=4 * SIGMA_S,
    lifetime_s=2e-3,
    branching=0.3,
    laser_linewidth_hz=700.0,
    detunings_hz=(900.0, -1500.0, 2500.0, 400.0),
    field_offset_tesla=1e-7,
    rabi_scales=(1.1, 0.9, 1.05, 0.8),
    beam=quadrupole_beam(0.7, 0.6),
    field_tesla=2e-5,
    method=StaticGrid(1e-10),
)


def op(ket, bra):
    matrix = np.zeros((7, 7))
    matrix[LEVELS.index(ket), LEVELS.index(bra)] = 1
    return qutip.Qobj(matrix)


def test_density_matrix_of_seven_levels_against_qutip():
    """Overlapping, detuned pulses with decay, linewidth and light shifts, for all four runs."""
    x_set, r = np.array([0.35, 0.7]), np.array([0.6, 0.25])
    solution = ROUGH.prepared().respond(jnp.asarray(x_set), jnp.asarray(r))
    assert bool(solution.valid.all())
    rays, slope = ("0", "+2", "-1", "-2"), 2 * np.pi * 8.418741317635651e9
    x_a, x_b, r_a, r_b = *x_set, *r
    areas = [2 * np.arccos(np.sqrt(x_a)), 2 * np.arcsin(np.sqrt(r_a))]
    areas += [2 * np.arccos(np.sqrt(x_b)), 2 * np.arcsin(np.sqrt(r_b))]
    h = sum(op(ray, ray) * (slope * 1e-7 * int(ray)) for ray in rays)
    h = h - sum(op(ray, ray) * (2 * np.pi * d) for ray, d in zip(rays, (900.0, -1500.0, 2500.0, 400.0), strict=True))
    jumps = [np.sqrt(rate / 2e-3) * op(end, ray) for ray in rays for end, rate in (("s", 0.3), ("l", 0.7))]
    jumps.append(np.sqrt(2 * np.pi * 700.0) * sum(op(ray, ray) for ray in rays))
    beam = np.asarray(quadrupole_beam(0.7, 0.6))
    drives = []
    for k, (ray, area, scale) in enumerate(zip(rays, areas, (1.1, 0.9, 1.05, 0.8), strict=True)):
        ratios = {m: beam[m + 2] / beam[int(ray) + 2] for m in range(-2, 3) if m != int(ray)}
        lines = [(q, slope * 2e-5 * (int(ray) - m)) for m, q in ratios.items()]
        shift = sum(q**2 / (4 * d) for q, d in lines)
        peak = scale * area / (np.sqrt(2 * np.pi) * SIGMA_S)
        # The dressed level is driven more slowly: the integral of Omega^3 is taken off the area.
        cube = peak**3 * SIGMA_S * np.sqrt(2 * np.pi / 3)
        peak *= 1 - sum(q**2 / (8 * d**2) for q, d in lines) * cube / (scale * area)
        envelope = lambda t, k=k, peak=peak: peak * np.exp(-((t - 4 * k * SIGMA_S) ** 2) / (2 * SIGMA_S**2))
        drives.append(((op(ray, "s") + op("s", ray)) / 2, op("s", "s") * shift, envelope))
    found = np.asarray(unpack_density(solution.state[0], 7))
    for run in range(4):
        terms = []
        for drive, shift, envelope in drives[: run + 1]:
            terms += [[drive, envelope], [shift, lambda t, envelope=envelope: envelope(t) ** 2]]
        reference = qutip.mesolve(
            [h, *terms],
            qutip.ket2dm(qutip.basis(7, 0)),
            [-5 * SIGMA_S, (4 * run + 4) * SIGMA_S],
            c_ops=jumps,
            options={"method": "dop853", "rtol": 1e-10, "atol": 1e-12, "nsteps": 100_000, "max_step": SIGMA_S / 2},
        ).states[-1]
        np.testing.assert_allclose(found[..., run], reference.full(), atol=1e-7)
    assert np.diag(found[..., 3]).real.min() == 0  # the ray that nobody uses
    assert np.sort(np.diag(found[..., 3]).real)[1] > 0.005


def all_lines(star, areas, sigma_s=SIGMA_S):
    """Final populations of six levels with the light of every pulse on all five lines, as it is."""
    beam, spacing = np.asarray(star.beam), 2 * np.pi * ZEEMAN_HZ_PER_TESLA * float(star.field_tesla)
    separation_s = float(star.separation_s)
    areas, used = np.asarray(areas), np.array(star.sublevels[: len(areas)])
    centers = separation_s * np.arange(len(areas))
    peaks = areas / (np.sqrt(2 * np.pi) * sigma_s)
    ratios = beam / beam[used + 2][:, None]
    detunings = 2 * np.pi * np.asarray(star.detunings_hz)[: len(areas), None]
    above = spacing * (used[:, None] - np.array(SUBLEVELS)) + detunings

    def slope(t, c):
        omega = peaks * np.exp(-((t - centers) ** 2) / (2 * sigma_s**2))
        half = 0.5 * omega @ (ratios * np.exp(-1j * above * t))
        return -1j * np.concatenate([[half.conj() @ c[1:]], half * c[0]])

    times = (-8 * sigma_s, separation_s * (len(areas) - 1) + 8 * sigma_s)
    solution = solve_ivp(slope, times, np.eye(6)[0] + 0j, method="DOP853", rtol=1e-9, atol=1e-11, max_step=sigma_s / 4)
    return np.abs(solution.y[:, -1]) ** 2


@pytest.fixture(scope="module")
def shifted():
    # Detuned, so that the sign of a shift matters.
    detunings_hz = jnp.array([4e3, -3e3, 5e3, 3e3])
    field_tesla = 150e3 / ZEEMAN_HZ_PER_TESLA
    return dataclasses.replace(
        IDEAL, beam=quadrupole_beam(0.7, 0.6), field_tesla=field_tesla, detunings_hz=detunings_hz
    )


def test_neighbouring_lines_shift_the_common_level(shifted):
    """With light shift and dressing nearly all of what the other lines do is there."""
    x_set, r = jnp.array([0.35, 0.7]), jnp.array([0.6, 0.25])
    exact = all_lines(shifted, np.asarray(IDEAL.areas(x_set, r)))
    solution = shifted.prepared().respond(x_set, r)
    with_shift = np.asarray(solution.populations[0, :6, 3])
    alone = dataclasses.replace(shifted, beam=None).prepared()
    without = np.asarray(alone.respond(x_set, r).populations[0, :6, 3])
    missing = np.abs(without - exact).max()
    assert missing > 5e-4
    assert np.abs(with_shift - exact).max() < 0.05 * missing
    assert np.all(np.asarray(shifted.off_resonant_transfer()) < 1e-30)


def test_off_resonant_transfer_is_estimated(shifted):
    close = dataclasses.replace(
        shifted, detunings_hz=jnp.zeros(4), field_tesla=2.2 / (2 * np.pi * SIGMA_S) / ZEEMAN_HZ_PER_TESLA
    )
    area = 0.2
    exact = all_lines(close, [area])
    strays = 1 - exact[0] - exact[SUBLEVELS.index(-1) + 1]
    np.testing.assert_allclose(close.off_resonant_transfer(area)[0], strays, rtol=0.03)
    assert strays > 1e-4


def test_a_field_offset_detunes_every_line():
    field = 3e-8
    offset = dataclasses.replace(IDEAL, field_offset_tesla=jnp.asarray(field)).prepared()
    lines = -ZEEMAN_HZ_PER_TESLA * field * np.array(IDEAL.sublevels)
    detuned = dataclasses.replace(offset, field_offset_tesla=jnp.zeros(()), detunings_hz=jnp.asarray(lines))
    commands = jnp.array([0.4, 0.6]), jnp.array([0.3, 0.5])
    found, expected = (star.respond(*commands).populations for star in (offset, detuned))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.abs(np.asarray(found[0, :, 3]) - np.asarray(CLOSED.closed_form(*commands)[:, 3])).max() > 1e-4


def test_the_beam_is_the_tensor_of_its_field_gradient():
    rng = np.random.default_rng(3)
    for f, g in rng.uniform(0, np.pi, (5, 2)):
        beam = np.array([np.sin(f), 0, np.cos(f)])
        field = np.cos(g) * np.array([np.cos(f), 0, -np.sin(f)]) + np.sin(g) * np.array([0, 1, 0])
        t = (np.outer(beam, field) + np.outer(field, beam)) / 2
        parts = [t[0, 0] - t[1, 1] - 2j * t[0, 1], 2 * (t[0, 2] - 1j * t[1, 2]), np.sqrt(6) * t[2, 2]]
        parts += [2 * (t[0, 2] + 1j * t[1, 2]), t[0, 0] - t[1, 1] + 2j * t[0, 1]]
        size = np.abs(parts)
        np.testing.assert_allclose(quadrupole_beam(f, g), size / np.linalg.norm(size), atol=1e-12)


# ------------------------------------------------------------------------------------------ noise, batches, gradients


def test_shots_enter_the_memories():
    star = dataclasses.replace(CLOSED, readout_error_bright=jnp.asarray(0.03), readout_error_dark=jnp.asarray(0.08))
    loop = run_star(star, X_SET, shots=50, key=jax.random.key(1))
    assert loop.n_x is not None
    n_x = np.asarray(loop.n_x)
    assert n_x.shape == X_SET.shape
    assert np.all(n_x == np.round(n_x))
    fed = np.concatenate([np.full((2, 5), 0.5), n_x / 50], axis=1)
    for k, w in enumerate(WINDOWS):
        expected = [fed[k, 5 + c - int(w) : 5 + c].mean() for c in range(X_SET.shape[1])]
        np.testing.assert_allclose(loop.r[k], expected, atol=1e-12)
    # Without shots the memory averages the expectation: s is bright.
    expectation = run_star(star, X_SET)
    x = np.asarray(expectation.x[:, 0])
    first = (4 * 0.5 + 0.97 * x[0] + 0.08 * (1 - x[0])) / 5
    np.testing.assert_allclose(expectation.r[0, 1], first, atol=1e-12)


def test_devices_side_by_side(shifted):
    """Every number of a lane of its own, in the full dynamics."""
    lanes = {
        "rabi_scales": np.array([[1.0, 1.1], [1.0, 0.9], [1.0, 1.0], [1.0, 0.95]]),
        "detunings_hz": np.array([[4e3, 0.0], [-3e3, 100.0], [0.0, 0.0], [3e3, 0.0]]),
        "sigma_s": SIGMA_S * np.array([1.0, 0.9]),
        "field_tesla": np.array([2e-5, 5e-5]),
    }
    commands = jnp.array([0.4, 0.6]), jnp.array([0.3, 0.5])
    both = dataclasses.replace(shifted, **{name: jnp.asarray(value) for name, value in lanes.items()}).prepared()
    found = both.respond(*commands).populations
    for k in (0, 1):
        own = {name: jnp.asarray(value[..., k]) for name, value in lanes.items()}
        alone = dataclasses.replace(both, **own).respond(*commands)
        np.testing.assert_allclose(found[..., k], alone.populations, atol=1e-9)
    # The memories too.
    windows = np.array([3.0, 4.0])
    closed = dataclasses.replace(
        CLOSED, rabi_scales=jnp.asarray(lanes["rabi_scales"]), memories=(MovingAverage(windows), MovingAverage(3.0))
    )
    loop = run_star(closed, X_SET[..., None])
    for k in (0, 1):
        alone = dataclasses.replace(
            CLOSED,
            rabi_scales=jnp.asarray(lanes["rabi_scales"][:, k]),
            memories=(MovingAverage(windows[k]), MovingAverage(3.0)),
        )
        np.testing.assert_allclose(loop.y[..., k], run_star(alone, X_SET).y, atol=1e-12)


@pytest.mark.parametrize("base", [CLOSED, IDEAL], ids=["closed form", "dynamics"])
def test_a_bad_input_spoils_its_cycle_and_those_that_remember_it(base):
    """A remembers five cycles. In a cascade B lives on y_A, and remembers the last bad one for three more.

    A moving average holds one cycle beyond a whole window, of weight 0 and with a derivative: NaN stays as long.
    """
    bad = X_SET.at[0, 3].set(1.2)
    for cascade, good_again in ((False, 10), (True, 14)):
        loop = run_star(dataclasses.replace(base, cascade=cascade), bad)
        assert loop.valid[:3].all()
        assert not loop.valid[3:good_again].any()
        assert loop.valid[good_again:].all()
        # A command that is good gives a good input, whatever the memory holds.
        assert np.flatnonzero(np.isnan(loop.x[0])).tolist() == [3]
        assert np.flatnonzero(np.isnan(loop.y[0])).tolist() == list(range(3, 10))
        # B's memory has weight 0 on what A was fed.
        assert np.flatnonzero(np.isnan(loop.r[1])).tolist() == (list(range(4, 14)) if cascade else [])


def test_gradient_through_the_dynamics_and_both_memories():
    base = dataclasses.replace(IDEAL, memory_inputs=CROSSED, lifetime_s=jnp.asarray(52.7e-3)).prepared()
    x_set = X_SET[:, 3:8]

    @jax.jit
    def last(scale, window, linewidth):
        star = dataclasses.replace(
            base,
            rabi_scales=jnp.array([1.0, scale, 1.0, 1.0]),
            memories=(MovingAverage(window, capacity=6), MovingAverage(3.0, capacity=4)),
            laser_linewidth_hz=linewidth,
        )
        return run_star(star, x_set).y[1, -1]

    at = (1.03, 2.4, 60.0)
    found = jax.jit(jax.grad(last, argnums=(0, 1, 2)))(*at)
    for k, h in enumerate((1e-5, 1e-5, 1e-1)):
        up, down = list(at), list(at)
        up[k], down[k] = at[k] + h, at[k] - h
        np.testing.assert_allclose(found[k], (last(*up) - last(*down)) / (2 * h), rtol=2e-6)


def test_refusals():
    memories = IDEAL.memories
    with pytest.raises(ValueError, match=r"four different m_F"):
        Star(memories=memories, sublevels_a=(-1, 1), sublevels_b=(1, 2))
    with pytest.raises(ValueError, match=r"`beam` needs `field_tesla`"):
        Star(memories=memories, beam=quadrupole_beam(0.7, 0.6))
    with pytest.raises(ValueError, match=r"`beam` must be positive"):
        Star(memories=memories, beam=quadrupole_beam(0.0, 0.6), field_tesla=1e-4)
    with pytest.raises(ValueError, match=r"leading axis 4"):
        Star(memories=memories, rabi_scales=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"`source` must be"):
        Star(memories=memories, source="command")
    with pytest.raises(ValueError, match=r"\(2, cycles, \*batch\)"):
        run_star(CLOSED, U)
    with pytest.raises(ValueError, match=r"go together"):
        run_star(CLOSED, X_SET, shots=10)
    for shots in (0, 2.5):
        with pytest.raises(ValueError, match=rf"`shots` must be whole and at least 1, but is {shots}"):
            run_star(CLOSED, X_SET, shots=shots, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"neighbouring lines are left out"):
        CLOSED.off_resonant_transfer()

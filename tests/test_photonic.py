"""The photonic memristor against dense linear optics with explicit mismatch, loss modes and quadrature over phases."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twin import closed_form
from twin.hysteresis import signed_area
from twin.memory import Exponential, MovingAverage
from twin.memristor import PhotonicMemristor, run, sine_input, stream
from twin.photonic import interferometer

MEMORY = MovingAverage(6.0)
NONE = jnp.zeros(())
REAL = {
    "phase_scale_1": 0.94,
    "phase_scale_2": 1.07,
    "phase_offset_1_rad": 0.13,
    "phase_offset_2_rad": -0.21,
    "visibility_1": 0.93,
    "visibility_2": 0.88,
    "phase_noise_1_rad": 0.15,
    "phase_noise_2_rad": 0.32,
    "loss_input": 0.08,
    "loss": 0.17,
    "efficiency": 0.71,
    "dark_counts": 0.013,
}
COMMANDS = [(0.0, 0.0), (0.37, 0.62), (0.8, 0.05), (1.0, 1.0), (0.5, 0.5)]


def photonic(**fields) -> PhotonicMemristor:
    return PhotonicMemristor(**({"memory": MEMORY} | fields))


# ----------------------------------------------------------------------------------------------- dense linear optics


def on_modes(i, j, matrix):
    """A 2 x 2 transformation of two of five path modes."""
    full = np.eye(5, dtype=complex)
    full[np.ix_([i, j], [i, j])] = matrix
    return full


def mach_zehnder(i, j, phase, visibility):
    """On path and an internal degree of freedom of its own: beam splitter, arms with phases and mismatch, its inverse.

    The arms turn the internal state by +- b, where cos 2b = V is their overlap; other modes keep it.
    """
    splitter = np.array([[1, 1], [1j, -1j]]) / np.sqrt(2)
    b = 0.5 * np.arccos(visibility)
    turn = lambda angle: np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    arms = np.zeros((10, 10), complex)
    for mode in range(5):
        which = {i: 1, j: -1}.get(mode, 0)
        path = np.zeros((5, 5))
        path[mode, mode] = 1
        arms += np.kron(path, np.exp(-0.5j * which * phase) * turn(which * b))
    inside = np.kron(on_modes(i, j, splitter), np.eye(2))
    return inside @ arms @ inside.conj().T


def dense(device, x, r, alone):
    """State of three modes and of both loss modes: averaged over phases node by node, internal degrees traced out."""
    f = {name: float(getattr(device, name)) for name in REAL}
    r, lost_after = (0.0, 0.0) if alone else (r, f["loss"])
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    loses = lambda mode, into, p: on_modes(mode, into, np.sqrt([[1 - p, p], [p, 1 - p]]) * [[1, 1], [-1, 1]])
    commanded = [f[f"phase_scale_{k}"] * 2 * np.arcsin(np.sqrt(c)) + f[f"phase_offset_{k}_rad"]
                 for k, c in ((1, x), (2, r))]  # fmt: skip

    def stage(k, i, j, rho):
        total = np.zeros_like(rho)
        for node, weight in zip(nodes, weights, strict=True):
            u = mach_zehnder(i, j, commanded[k - 1] + f[f"phase_noise_{k}_rad"] * node, f[f"visibility_{k}"])
            internal = np.zeros((2, 2))
            internal[0, 0] = 1  # each stage mismatches in a degree of freedom of its own
            out = u @ np.kron(rho, internal) @ u.conj().T
            total += weight * np.einsum("aibi->ab", out.reshape(5, 2, 5, 2))
        return total

    start = np.zeros((5, 5), complex)
    start[0, 0] = 1
    rho = stage(1, 0, 1, start)
    u = loses(1, 3, f["loss_input"])
    rho = stage(2, 1, 2, u @ rho @ u.conj().T)
    u = loses(1, 4, lost_after)
    return u @ rho @ u.conj().T


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        REAL,
        {"visibility_1": 0.0, "visibility_2": 0.3, "loss": 1.0},
        *({name: REAL[name]} for name in REAL if name.startswith("phase_scale") or name.startswith("phase_offset")),
    ],
)
def test_states_are_those_of_dense_linear_optics(fields, alone):
    device = photonic(**fields)
    x, r = (jnp.array(column) for column in zip(*COMMANDS, strict=True))
    modes, output = device.mode_state(x, r, alone=alone), device.output_state(x, r, alone=alone)
    response = device.respond(x, r, jnp.zeros(5), jnp.zeros(5), alone=alone)
    for k, (x_k, r_k) in enumerate(COMMANDS):
        rho = dense(device, x_k, r_k, alone)
        np.testing.assert_allclose(rho.imag, 0, atol=1e-13)
        rho = rho.real
        np.testing.assert_allclose(modes[..., k], rho[:3, :3], rtol=0, atol=1e-12)
        assert 1 - np.trace(modes[..., k]) == pytest.approx(rho[3, 3] + rho[4, 4], abs=1e-12)
        single_rail = [[1 - rho[1, 1], rho[0, 1]], [rho[1, 0], rho[1, 1]]]
        np.testing.assert_allclose(output[..., k], single_rail, rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            response.populations[:, k], [1 - rho[1, 1] - rho[2, 2], rho[1, 1], rho[2, 2]], rtol=0, atol=1e-12
        )
        assert float(response.coherence_vs[0, k]) == pytest.approx(rho[0, 1], abs=1e-12)
    assert bool(jnp.all(response.valid))


def test_a_loop_tells_coherence_and_purity_of_the_averaged_state():
    device = photonic(**REAL)
    x, r = jnp.array([0.3, 0.8]), jnp.array([0.6, 0.2])
    loop = run(device, x, r)
    for k in range(2):
        rho = dense(device, float(x[k]), float(r[k]), False)
        state = np.array([[1 - rho[1, 1], rho[0, 1]], [rho[1, 0], rho[1, 1]]])
        assert float(loop.purity[k]) == pytest.approx(np.trace(state @ state).real, abs=1e-12)
        assert float(loop.coherence[k]) == pytest.approx(2 * abs(rho[0, 1]), abs=1e-12)


def test_an_ideal_element_is_the_single_rail_map():
    x, r = jnp.linspace(0, 1, 9), jnp.linspace(1, 0, 9)
    ideal = photonic()
    np.testing.assert_allclose(ideal.output_state(x, r), closed_form.output_state(x, r).real, rtol=0, atol=1e-15)
    psi = jnp.sqrt(jnp.stack([1 - x, x * (1 - r), x * r]))
    np.testing.assert_allclose(ideal.mode_state(x, r), psi[:, None] * psi[None], rtol=0, atol=1e-15)
    np.testing.assert_array_equal(run(ideal, x, r).x, x)


def test_states_are_positive():
    """Random devices, the edges of their ranges among them."""
    rng = np.random.default_rng(0)
    draw = lambda low, high: np.where(rng.random(200) < 0.2, rng.choice([low, high], 200), rng.uniform(low, high, 200))
    noise = {f"phase_noise_{k}_rad": draw(0.0, 3.0) for k in (1, 2)}
    rest = {name: draw(0.0, 1.0) for name in ("visibility_1", "visibility_2", "loss_input", "loss")}
    offsets = {f"phase_offset_{k}_rad": draw(-4.0, 4.0) for k in (1, 2)}
    device = photonic(**noise, **rest, **offsets, phase_scale_1=draw(0.0, 2.0), phase_scale_2=draw(0.0, 2.0))
    x, r = draw(0.0, 1.0), draw(0.0, 1.0)
    for state in (device.mode_state(x, r), device.output_state(x, r)):
        assert np.min(np.linalg.eigvalsh(np.moveaxis(state, -1, 0))) > -1e-14


def test_mismatch_and_noise_take_the_same_contrast_but_not_the_same_coherence():
    """V = e^(-sigma^2/2): no count tells them apart; the coherence with a third mode does."""
    sigma = 0.9
    seen = [interferometer(0.3, 1.1, 0.2, v, s) for v, s in ((np.exp(-(sigma**2) / 2), 0.0), (1.0, sigma))]
    assert float(seen[0].transfer) == pytest.approx(float(seen[1].transfer), abs=1e-15)
    assert float(seen[0].coherence) == pytest.approx(float(seen[1].coherence), abs=1e-15)
    assert abs(float(seen[0].stay) / float(seen[1].stay) - 1) > 0.01


# ------------------------------------------------------------------------------------------------------------- clicks


def test_clicks_are_those_of_two_detectors():
    device = photonic(**REAL)
    rho = dense(device, 0.7, 0.4, False).real
    at = {"output": rho[1, 1], "feedback": rho[2, 2], "nowhere": rho[0, 0] + rho[3, 3] + rho[4, 4]}
    eta, dark = REAL["efficiency"], REAL["dark_counts"]
    joint = dict.fromkeys(itertools.product((0, 1), repeat=2), 0.0)
    for place, probability in at.items():
        p = [1 - (1 - dark) * (1 - eta * (place == detector)) for detector in ("output", "feedback")]
        for clicks in joint:
            joint[clicks] += probability * np.prod([q if c else 1 - q for q, c in zip(p, clicks, strict=True)])
    populations = device.respond(jnp.array([0.7]), jnp.array([0.4]), NONE, NONE, alone=False).populations
    assert float(device.assigned(populations)[0]) == pytest.approx(joint[1, 0] + joint[1, 1], abs=1e-14)
    assert float(device.assigned_next(populations)[0]) == pytest.approx(joint[0, 1], abs=1e-14)


# --------------------------------------------------------------------------------------------------------------- area


def area_of(device, of_clicks=False, n_w=10, cycles_per_period=40):
    device = dataclasses.replace(device, memory=MovingAverage(n_w))
    loop = run(device, sine_input(periods=3, cycles_per_period=cycles_per_period))
    last = slice(2 * cycles_per_period, 3 * cycles_per_period)
    pair = (loop.p_x, loop.p_y) if of_clicks else (loop.x, loop.y)
    return float(signed_area(*(column[last] for column in pair)))


SPOILED = {"visibility_1": 0.9, "visibility_2": 0.8, "phase_noise_1_rad": 0.2, "phase_noise_2_rad": 0.3,
           "loss_input": 0.1, "loss": 0.25, "efficiency": 0.6, "dark_counts": 0.02}  # fmt: skip


@pytest.mark.parametrize("of_clicks", [False, True])
@pytest.mark.parametrize("source", ["command", "model", "measured"])
def test_the_area_of_a_spoiled_loop_is_that_of_the_formula(source, of_clicks):
    device = photonic(source=source, **SPOILED)
    for n_w in (4.5, 10.0):
        expected = area_of(photonic(), n_w=n_w) * float(device.area_factor(of_clicks=of_clicks))
        assert area_of(device, of_clicks, n_w) == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize(
    ("fields", "source", "factor"),
    [
        ({"loss": 0.3}, "model", 0.7),
        ({"loss_input": 0.2}, "command", 0.8**2),
        ({"loss_input": 0.2}, "model", 0.8**3),
        ({"visibility_1": 0.8}, "command", 0.8),
        ({"visibility_1": 0.0}, "command", 0.0),
        ({"visibility_1": 0.8}, "model", 0.8**2),
        ({"visibility_2": 0.8}, "command", 0.8 * 0.9),
        ({"loss_input": 1.0}, "command", 0.0),
        ({"efficiency": 0.5}, "measured", 0.5),
        ({"efficiency": 0.5}, "model", 1.0),
    ],
)
def test_single_imperfections_take_simple_powers_of_the_area(fields, source, factor):
    device = photonic(source=source, **fields)
    assert float(device.area_factor()) == pytest.approx(factor, abs=1e-14)
    # (pi/8) S_d sin(lag) sin(w)/w with w = 2 pi/40, S_d = sin(5 w)/(10 sin(w/2)) and lag = 11 w/2.
    assert area_of(device) == pytest.approx(0.2680153507 * factor, abs=1e-9)


def test_loss_leaves_the_pinch_and_dark_counts_lift_it():
    x = jnp.zeros(3)
    loop = run(photonic(loss=0.4, loss_input=0.2, dark_counts=0.01), x, x)
    np.testing.assert_array_equal(loop.y, 0.0)
    np.testing.assert_allclose(loop.p_y, 0.01, rtol=0, atol=1e-17)


def test_an_area_needs_nominal_phases():
    with pytest.raises(ValueError, match=r"area_factor.*nominal.*`run`"):
        photonic(phase_offset_1_rad=0.1).area_factor()
    traced = jax.jit(lambda offset: photonic(phase_offset_2_rad=offset).area_factor())
    assert np.isnan(traced(0.1))
    assert float(traced(0.0)) == 1.0


# ---------------------------------------------------------------------------------------------------------- contracts


@pytest.mark.parametrize("memory", [MovingAverage(4.5), Exponential(3.0)])
def test_run_equals_stream_for_a_real_chip(memory):
    device = photonic(**REAL | {"memory": memory})
    x = sine_input(periods=2, cycles_per_period=12)
    at_once, one_by_one = run(device, x), stream(device, x)
    for name in ("x", "y", "r", "p_x", "p_y", "coherence", "purity", "populations_1", "populations_2"):
        np.testing.assert_allclose(getattr(one_by_one, name), getattr(at_once, name), rtol=0, atol=1e-14, err_msg=name)


def test_both_kinds_of_run_mix_in_one_batch():
    device, x, r, zero = photonic(**REAL), jnp.array([0.4, 0.4]), jnp.array([0.7, 0.7]), jnp.zeros(2)
    mixed = device.respond(x, r, zero, zero, alone=jnp.array([True, False]))
    for k, alone in enumerate((True, False)):
        own = device.respond(x, r, zero, zero, alone=alone)
        np.testing.assert_allclose(mixed.populations[:, k], own.populations[:, k], rtol=0, atol=1e-16)


def test_lanes_are_devices():
    losses, scales = np.linspace(0, 0.5, 5), np.linspace(0.9, 1.1, 5)
    x = sine_input(periods=1, cycles_per_period=12)
    many = run(photonic(loss=losses, phase_scale_2=scales), x[:, None])
    for k in (0, 2, 4):
        one = run(photonic(loss=losses[k], phase_scale_2=scales[k]), x)
        np.testing.assert_allclose(many.y[:, k], one.y, rtol=0, atol=1e-15)


def test_gradients_equal_differences():
    x = 0.05 + 0.9 * sine_input(periods=1, cycles_per_period=12)

    def mean(fields):
        loop = run(photonic(**fields | {"memory": Exponential(2.0)}), x)
        return jnp.sum(loop.p_y * jnp.cos(jnp.arange(13))) + jnp.sum(loop.coherence * loop.purity)

    mean = jax.jit(mean)
    gradient = jax.grad(mean)(REAL)
    for name, value in REAL.items():
        step = 1e-5
        ends = [float(mean(REAL | {name: value + sign * step})) for sign in (1, -1)]
        assert float(gradient[name]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=2e-8), name


@pytest.mark.parametrize("fields", [{}, REAL, {"loss": 1.0, "loss_input": 1.0, "visibility_1": 0.0, "efficiency": 0.0}])
def test_gradients_are_finite_at_the_edges(fields):
    full = dict.fromkeys(REAL, 0.0) | dict.fromkeys(
        ("phase_scale_1", "phase_scale_2", "visibility_1", "visibility_2", "efficiency"), 1.0
    )

    def total(x, r, values):
        loop = run(photonic(**values), x, r)
        return jnp.sum(loop.p_x + 2 * loop.p_y + 3 * loop.coherence + 4 * loop.purity)

    found = jax.grad(total, argnums=(0, 1, 2))(jnp.array([0.0, 1.0, 0.0, 1.0]), jnp.array([0.0, 0.0, 1.0, 1.0]),
                                               full | fields)  # fmt: skip
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


def test_an_ideal_element_answers_its_commands_to_the_edges():
    slopes = jax.vmap(jax.grad(lambda x, r: run(photonic(), x[None], r[None]).y[0], argnums=(0, 1)))
    by_x, by_r = slopes(jnp.array([0.0, 1.0, 0.3]), jnp.array([0.0, 1.0, 0.6]))
    np.testing.assert_allclose(by_x, [1.0, 0.0, 0.4], rtol=0, atol=1e-15)
    np.testing.assert_allclose(by_r, [0.0, -1.0, -0.3], rtol=0, atol=1e-15)


def test_the_shortcut_of_ideal_phases_has_the_slopes_of_the_long_way():
    x, r = jnp.array([0.2, 0.9]), jnp.array([0.7, 0.4])

    @jax.jit
    def seen(fields):
        response = photonic(**fields).respond(x, r, NONE, NONE, alone=False)
        return jnp.concatenate([response.populations.ravel(), response.coherence_vs[0]])

    nominal = {"phase_scale_1": 1.0, "phase_scale_2": 1.0, "phase_offset_1_rad": 0.0, "phase_offset_2_rad": 0.0}
    slopes = jax.jacfwd(seen)(nominal)
    for name, value in nominal.items():
        ends = [seen(nominal | {name: value + step}) for step in (1e-5, -1e-5)]
        np.testing.assert_allclose(slopes[name], (ends[0] - ends[1]) / 2e-5, rtol=0, atol=1e-9, err_msg=name)


@jax.jit
def _of_lanes(values):
    response = photonic(**values).respond(jnp.array([0.3]), jnp.array([0.6]), NONE, NONE, alone=False)
    return response.populations, response.coherence_vs[0], response.valid


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss", -0.1), ("efficiency", 1.2), ("visibility_1", 2.0), ("dark_counts", np.nan), ("phase_scale_2", -1.0),
     ("phase_noise_1_rad", -0.1), ("phase_offset_2_rad", np.inf), ("loss_input", 1.1)],
)  # fmt: skip
def test_bad_numbers_are_refused_or_flagged(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        photonic(**{name: value})
    lanes = {key: np.full(3, good) for key, good in REAL.items()}
    lanes[name][1] = value
    populations, coherence, valid = _of_lanes(lanes)
    np.testing.assert_array_equal(valid, [True, False, True])
    np.testing.assert_array_equal(np.isnan(populations), np.broadcast_to(~valid, (3, 3)))
    np.testing.assert_array_equal(np.isnan(coherence), ~valid)


def test_commands_outside_are_flagged():
    loop = run(photonic(**REAL), jnp.array([0.5, 1.2, 0.5]), jnp.array([0.5, 0.5, -0.1]))
    np.testing.assert_array_equal(loop.valid, [True, False, False])
    np.testing.assert_array_equal(np.isnan(loop.y), [False, True, True])
    np.testing.assert_array_equal(np.isnan(loop.coherence), [False, True, True])


def test_new_values_compile_nothing():
    counted = []

    @eqx.filter_jit
    def y_of(device, x, r):
        counted.append(1)
        return device.respond(x, r, NONE, NONE, alone=False).populations[1]

    x = jnp.array([0.3, 0.4])
    for loss in (0.0, 0.1, 0.2):
        y_of(photonic(**REAL | {"loss": loss}), x, x)
    assert len(counted) == 1

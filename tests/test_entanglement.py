"""Entanglement of two nodes: closed forms, Kraus operators and full master equations written here, and QuTiP."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import qutip
from scipy.special import ellipe, ellipk

from twin import hysteresis, qubit_pairs
from twin.entanglement import amplitude_damping, node_channel, play_pair, prepared_node, store_pair, through
from twin.memory import MovingAverage
from twin.memory_inputs import CROSSED, OWN
from twin.memristor import ClosedForm, IonMemristor, Lindblad, PhotonicMemristor, run, sine_input
from twin.qubit_pairs import (
    both_or_none,
    concurrence,
    correlations,
    density_matrix,
    excitations,
    l1_coherence,
    negativity,
    one_excitation,
    product_state,
    werner,
    x_concurrence,
)
from twin.slow_noise import SlowNoise

IDEAL = PhotonicMemristor(memory=MovingAverage(10.0))
SIGMA_S = 20e-6
# One shape serves most tests.
X = sine_input(periods=2, cycles_per_period=24)


def random_states(count, rank, seed=0):
    """Density matrices of two qubits of a rank, shape (4, 4, count)."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(4, rank, count)) + 1j * rng.normal(size=(4, rank, count))
    rho = np.einsum("ark,brk->abk", a, a.conj())
    return rho / np.einsum("aak->k", rho)


def peer(name, rho):
    """A measure by QuTiP, for each matrix."""
    pairs = [qutip.Qobj(rho[..., k], dims=[[2, 2], [2, 2]]) for k in range(rho.shape[-1])]
    if name == "concurrence":
        return np.array([qutip.concurrence(pair) for pair in pairs])
    return np.array([qutip.negativity(pair, 1, method="eigenvalues") for pair in pairs])


# ----------------------------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_measures_against_qutip(rank):
    rho = random_states(12, rank, rank)
    t = correlations(rho)
    np.testing.assert_allclose(density_matrix(t), rho, atol=1e-15)
    # QuTiP takes roots of eigenvalues that rounding has left near 1e-16.
    np.testing.assert_allclose(concurrence(t), peer("concurrence", rho), atol=1e-12 if rank == 4 else 5e-8)
    np.testing.assert_allclose(negativity(t), peer("negativity", rho), atol=1e-12)
    off = np.abs(rho).sum(axis=(0, 1)) - np.einsum("aak->k", rho).real
    np.testing.assert_allclose(l1_coherence(t), off, atol=1e-12)
    assert np.any(np.asarray(concurrence(t)) > 0.05)
    # The X-part of any state is no more entangled.
    assert np.all(np.asarray(x_concurrence(t)) <= np.asarray(concurrence(t)) + 1e-12)


def test_pure_states_have_the_concurrence_of_their_amplitudes():
    rng = np.random.default_rng(5)
    c = rng.normal(size=(4, 20)) + 1j * rng.normal(size=(4, 20))
    c /= np.linalg.norm(c, axis=0)
    t = correlations(np.einsum("ak,bk->abk", c, c.conj()))
    np.testing.assert_allclose(concurrence(t), 2 * np.abs(c[0] * c[3] - c[1] * c[2]), atol=1e-12)


def test_named_states():
    x, f = np.array([0.0, 0.2, 0.5, 0.9]), np.array([0.3, -1.0, 2.0, 0.7])
    a, b = np.sqrt(1 - x), np.exp(1j * f) * np.sqrt(x)
    zero = np.zeros(4)
    for state, ket in (
        (one_excitation(x, f), np.stack([zero, a, b, zero])),
        (both_or_none(x, f), np.stack([a, zero, zero, b])),
        (product_state(x, 0.3), np.stack([a * 0.7**0.5, a * 0.3**0.5, abs(b) * 0.7**0.5, abs(b) * 0.3**0.5])),
    ):
        np.testing.assert_allclose(density_matrix(state), np.einsum("ak,bk->abk", ket, ket.conj()), atol=1e-15)
    np.testing.assert_allclose(excitations(one_excitation(x)), np.stack([x, 1 - x]), atol=1e-15)
    np.testing.assert_allclose(concurrence(product_state(x, 0.3)), 0, atol=1e-12)
    weight = np.array([0.2, 1 / 3, 0.6, 1.0])
    expected = np.maximum(0, (3 * weight - 1) / 2)
    for measure in (concurrence, x_concurrence, lambda t: 2 * negativity(t)):
        np.testing.assert_allclose(measure(werner(one_excitation(0.5 + zero), weight)), expected, atol=1e-12)


def test_gradient_of_the_general_concurrence():
    t = correlations(random_states(1, 4, 3)[..., 0] * 0.3 + 0.7 * np.asarray(density_matrix(both_or_none(0.4))))
    direction = np.asarray(correlations(random_states(1, 4, 9)[..., 0]))
    _, slope = jax.jit(lambda t, dt: jax.jvp(concurrence, (t,), (dt,)))(t, jnp.asarray(direction))
    h = 1e-6
    expected = (concurrence(t + h * direction) - concurrence(t - h * direction)) / (2 * h)
    assert abs(expected) > 0.05
    np.testing.assert_allclose(slope, expected, rtol=1e-7)
    gradient = jax.jit(jax.grad(concurrence))(t)
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-7)
    # Three equal eigenvalues: (3 w - 1)/2.
    bell = one_excitation(0.5)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda w: concurrence(werner(bell, w))))(0.8), 1.5, rtol=1e-10)
    # A pure state, rank one kept: C = 2 sqrt(x (1-x)).
    np.testing.assert_allclose(
        jax.jit(jax.grad(lambda x: concurrence(one_excitation(x))))(0.2), (1 - 0.4) / np.sqrt(0.16), rtol=1e-7
    )


# ----------------------------------------------------------------------------------------------------- the ideal node


def kraus(r):
    return np.diag([1, np.sqrt(1 - r)]), np.sqrt(r) * np.array([[0, 1], [0, 0]])


def test_ideal_channels_are_their_kraus_operators():
    rho, r_a, r_b = random_states(1, 4)[..., 0], 0.3, 0.85
    expected = sum(np.kron(a, b) @ rho @ np.kron(a, b).conj().T for a in kraus(r_a) for b in kraus(r_b))
    found = through(amplitude_damping(r_a), amplitude_damping(r_b), correlations(rho))
    np.testing.assert_allclose(density_matrix(found), expected, atol=1e-15)


def test_a_response_shows_the_ideal_channel():
    r = jnp.array([0.0, 0.3, 0.99])
    for device in (IDEAL, IonMemristor(memory=MovingAverage(5.0), method=ClosedForm())):
        channel, ideal = node_channel(device, r), amplitude_damping(r)
        np.testing.assert_allclose(channel.population_matrix, ideal.population_matrix, atol=1e-12)
        np.testing.assert_allclose(channel.coherence_factor, ideal.coherence_factor, atol=1e-12)
        assert np.all(np.asarray(channel.residual) < 1e-12)
        assert np.all(np.asarray(channel.smallest_choi_eigenvalue()) > -1e-12)
    lossy = node_channel(dataclasses.replace(IDEAL, loss=jnp.asarray(0.2)), r)
    damped = amplitude_damping(1 - 0.8 * (1 - r))
    np.testing.assert_allclose(lossy.population_matrix, damped.population_matrix, atol=1e-12)


def test_a_noisy_interferometer_shows_the_average_of_its_channels():
    """Stage 2 with phase noise is a mean of dampings, whatever stands in front of it."""
    r, sigma, loss = np.array([0.2, 0.7]), 0.3, 0.1
    device = dataclasses.replace(
        IDEAL, phase_noise_2_rad=jnp.asarray(sigma), loss=jnp.asarray(loss), loss_input=jnp.asarray(0.2)
    )
    channel = node_channel(device, jnp.asarray(r))
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights /= weights.sum()
    half = np.arcsin(np.sqrt(r))[:, None] + 0.5 * sigma * nodes
    kept, factor = (1 - loss) * (np.cos(half) ** 2 @ weights), np.sqrt(1 - loss) * (np.cos(half) @ weights)
    zero = np.zeros(2)
    np.testing.assert_allclose(channel.population_matrix, [[zero + 1, 1 - kept], [zero, kept]], atol=1e-12)
    np.testing.assert_allclose(channel.coherence_factor, [factor, zero], atol=1e-12)
    assert np.all(np.asarray(channel.smallest_choi_eigenvalue()) > -1e-12)
    assert np.all(np.asarray(channel.residual) < 1e-12)


def with_fields(**fields) -> PhotonicMemristor:
    return dataclasses.replace(IDEAL, **{name: jnp.asarray(value) for name, value in fields.items()})


@pytest.mark.parametrize("offset", [-0.12, -0.8])
def test_a_command_that_undoes_an_offset_amplifies_nothing(offset):
    r = jnp.array([0.0, np.sin(offset / 2) ** 2, 0.7])
    channel = node_channel(with_fields(phase_offset_2_rad=offset), r)
    damped = amplitude_damping(jnp.sin(jnp.arcsin(jnp.sqrt(r)) + offset / 2) ** 2)
    np.testing.assert_allclose(channel.population_matrix, damped.population_matrix, atol=1e-12)
    np.testing.assert_allclose(channel.population_matrix[1, 1, 1], 1, atol=1e-12)
    assert np.all(np.asarray(channel.smallest_choi_eigenvalue()) > -1e-12)
    assert bool(channel.valid.all())


def test_no_chip_makes_entanglement():
    node = with_fields(phase_offset_2_rad=-0.8, visibility_2=0.98, phase_noise_2_rad=0.1, loss=0.02)
    for states in (both_or_none(0.05 * X), werner(one_excitation(X), 0.9)):
        trace = play_pair((node, node), states)
        assert bool(trace.valid.all())
        assert np.all(np.asarray(trace.concurrence_out - trace.concurrence_in) < 1e-12)


@pytest.mark.parametrize("source", ["measured", "model", "command"])
def test_a_memory_reads_what_passes_the_open_stage(source):
    """The run of stage 1 alone feeds the memory of a single device in the same way."""
    fields = {"phase_offset_2_rad": -0.6, "visibility_2": 0.9, "phase_noise_2_rad": 0.2, "dark_counts": 0.05}
    node = dataclasses.replace(with_fields(**fields), source=source)
    trace = play_pair((node, node), one_excitation(X))
    np.testing.assert_allclose(trace.r[0], run(node, X).r, atol=1e-12)
    np.testing.assert_allclose(trace.y[0], run(node, X).y, atol=1e-12)


@pytest.mark.parametrize("fields", [{"visibility_1": 0.0}, {"loss_input": 1.0}, {"phase_offset_1_rad": np.pi}])
def test_what_stands_in_front_of_stage_2_is_no_part_of_the_channel(fields):
    r = jnp.array([0.0, 0.3, 1.0])
    channel = node_channel(with_fields(**fields), r)
    np.testing.assert_allclose(channel.population_matrix, amplitude_damping(r).population_matrix, atol=1e-12)
    assert bool(channel.valid.all())


def test_a_channel_that_cannot_be_told_is_not_valid():
    # No area of pulse 1: all three probes are the same.
    ion = IonMemristor(memory=MovingAverage(5.0), method=ClosedForm(), rabi_scale_1=0.0)
    channel = node_channel(ion, jnp.array([0.3]))
    assert not channel.valid.any()
    assert np.isnan(np.asarray(channel.population_matrix)).all()


@pytest.mark.parametrize("memory_inputs", [OWN, CROSSED])
def test_pairs_with_one_excitation(memory_inputs):
    """C_out = C_in sqrt((1-R_A)(1-R_B)); the inputs of the nodes add to one, so own and crossed memories agree."""
    x = X
    trace = play_pair((IDEAL, IDEAL), one_excitation(x, 0.4), memory_inputs=memory_inputs)
    r = np.stack([IDEAL.memory.filter(a) for a in (x, 1 - x)])
    np.testing.assert_allclose(trace.r, r if memory_inputs is OWN else r[::-1], atol=1e-12)
    left = np.sqrt((1 - r[0]) * (1 - r[1]))
    np.testing.assert_allclose(trace.concurrence_out, 2 * np.sqrt(x * (1 - x)) * left, atol=1e-12)
    np.testing.assert_allclose(trace.concurrence_out, trace.concurrence_in * left, atol=1e-12)
    np.testing.assert_allclose(trace.concurrence_out, concurrence(trace.state_out), atol=1e-12)
    np.testing.assert_allclose(trace.y, (1 - trace.r) * np.stack([x, 1 - x]), atol=1e-12)
    np.testing.assert_allclose(trace.kept, 1, atol=1e-12)
    assert bool(trace.valid.all())


def test_pairs_with_both_or_none_lose_entanglement_for_good():
    """C_out = 2 sqrt((1-R_A)(1-R_B) x) max(0, sqrt(1-x) - sqrt(x R_A R_B)): zero before R reaches one."""
    x, r_a, r_b = np.meshgrid([0.1, 0.5, 0.8, 0.95], [0.0, 0.3, 0.9], [0.2, 0.6])
    found = x_concurrence(through(amplitude_damping(r_a), amplitude_damping(r_b), both_or_none(x)))
    expected = 2 * np.sqrt((1 - r_a) * (1 - r_b) * x) * np.maximum(0, np.sqrt(1 - x) - np.sqrt(x * r_a * r_b))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.any((expected == 0) & (r_a < 1))


def test_area_of_the_concurrence_loop():
    """With x = sin^2(u/2), R_A = 1/2 - S/2 cos(u - lag) and C_out = 1/2 sin u sqrt(1 - S^2 cos^2(u - lag)),

    and over half a period of x, one period of C_in = sin u,

        oint C_out dC_in = sin(2 lag) / (6 m) [ (m - 2) E(m) + 2 (1 - m) K(m) ],    m = S^2.
    """
    cycles, window = 1000, 370

    @jax.jit
    def concurrences(x):
        r = [MovingAverage(float(window)).filter(fed) for fed in (x, 1 - x)]
        before = one_excitation(x)
        return x_concurrence(before), x_concurrence(through(amplitude_damping(r[0]), amplitude_damping(r[1]), before))

    before, after = concurrences(sine_input(periods=2, cycles_per_period=cycles))
    half = slice(cycles, cycles + cycles // 2 + 1)
    area = hysteresis.signed_area(before[half], after[half])
    w = 2 * np.pi / cycles
    size, lag = np.sin(window * w / 2) / (window * np.sin(w / 2)), w * (window + 1) / 2
    m = size**2
    expected = np.sin(2 * lag) / (6 * m) * ((m - 2) * ellipe(m) + 2 * (1 - m) * ellipk(m))
    assert abs(expected) > 0.03
    np.testing.assert_allclose(area, expected, rtol=2e-5)


def test_a_stored_pair():
    """The same pair again and again, against the recursion of populations and coherence in plain numbers."""
    nodes = (IDEAL, dataclasses.replace(IDEAL, memory=MovingAverage(2.5)))
    trace = store_pair(nodes, one_excitation(0.3), 12, memory_inputs=CROSSED)
    x_a, x_b, coherence, history = 0.3, 0.7, 2 * np.sqrt(0.21), []
    for k in range(12):
        # A averages ten earlier inputs of B, B two and a half of A; 1/2 before the first.
        past = [*([(0.5, 0.5)] * 10), *history][::-1]
        r_a = np.mean([b for _, b in past[:10]])
        r_b = (past[0][0] + past[1][0] + 0.5 * past[2][0]) / 2.5
        np.testing.assert_allclose(trace.r[:, k], (r_a, r_b), atol=1e-12)
        np.testing.assert_allclose(trace.concurrence_in[k], coherence, atol=1e-12)
        history.append((x_a, x_b))
        x_a, x_b, coherence = (1 - r_a) * x_a, (1 - r_b) * x_b, np.sqrt((1 - r_a) * (1 - r_b)) * coherence
        np.testing.assert_allclose(trace.concurrence_out[k], coherence, atol=1e-12)
        np.testing.assert_allclose(trace.y[:, k], (x_a, x_b), atol=1e-12)


def test_stored_pairs_in_devices_side_by_side():
    loss = np.array([0.0, 0.3])
    lossy = dataclasses.replace(IDEAL, loss=jnp.asarray(loss))
    both = store_pair((lossy, IDEAL), one_excitation(jnp.array([0.3, 0.6])), 5)
    x_a, x_b = np.array([0.3, 0.6]), np.array([0.7, 0.4])
    r = (9 * 0.5 + np.stack([x_a, x_b])) / 10
    np.testing.assert_allclose(both.r[:, 1], r, atol=1e-12)
    np.testing.assert_allclose(both.y[:, 0], [0.5 * (1 - loss) * x_a, 0.5 * x_b], atol=1e-12)
    first = 2 * np.sqrt(x_a * x_b) * 0.5 * np.sqrt(1 - loss)
    np.testing.assert_allclose(both.concurrence_out[0], first, atol=1e-12)
    assert both.valid.shape == (5, 2)


def test_detectors_reach_the_memory_where_it_is_measured():
    noisy = dataclasses.replace(IDEAL, dark_counts=jnp.asarray(0.1), efficiency=jnp.asarray(7 / 9))
    x = X
    trace = play_pair((noisy, IDEAL), one_excitation(x))
    np.testing.assert_allclose(trace.r[0], IDEAL.memory.filter(0.8 * x + 0.1 * (1 - x)), atol=1e-12)
    np.testing.assert_allclose(trace.r[1], IDEAL.memory.filter(1 - x), atol=1e-12)


def test_gradient_through_memory_and_channels():
    x = X

    def left(window, weight):
        node = dataclasses.replace(IDEAL, memory=MovingAverage(window))
        return jnp.sum(play_pair((node, IDEAL), werner(both_or_none(0.5 * x), weight)).concurrence_out)

    found = jax.grad(left, argnums=(0, 1))(4.3, 0.9)
    h = 1e-5
    expected = [
        (left(4.3 + h, 0.9) - left(4.3 - h, 0.9)) / (2 * h),
        (left(4.3, 0.9 + h) - left(4.3, 0.9 - h)) / (2 * h),
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ two real ions

# Pulses ten sigma apart, and tails of nine, so that the cuts of windows do not show.
ION = IonMemristor(
    memory=MovingAverage(4.0),
    method=Lindblad(1e-9),
    separation_s=10 * SIGMA_S,
    lead_s=9 * SIGMA_S,
    tail_s=9 * SIGMA_S,
    lifetime_s=np.inf,
    rabi_scale_2=1.04,
    detuning_1_hz=150.0,
    detuning_2_hz=-400.0,
    laser_linewidth_hz=80.0,
)
OTHER = {"rabi_scale_2": 0.95, "detuning_1_hz": -250.0, "detuning_2_hz": 300.0, "laser_linewidth_hz": 30.0}
R = np.array([0.35, 0.8])


@pytest.fixture(scope="module")
def ion_channels():
    # Two ions as a batch of one.
    device = dataclasses.replace(
        ION, **{name: jnp.array([float(getattr(ION, name)), value]) for name, value in OTHER.items()}
    )
    return node_channel(device, R[None])


def evolved_pair(rho, stop_s, areas):
    """Two ions of three levels each, nine in all: QuTiP from the time of pulse 1, which is over, to `stop_s`."""
    h, jumps, drives = 0, [], []
    for k, area in enumerate(areas):
        place = lambda matrix, k=k: np.kron(matrix, np.eye(3)) if k == 0 else np.kron(np.eye(3), matrix)
        given = {n: float(getattr(ION, n)) if k == 0 else OTHER[n] for n in OTHER}
        own_h, own_jumps = oracle.ion(
            "lambda",
            detuning_1_hz=given["detuning_1_hz"],
            detuning_2_hz=given["detuning_2_hz"],
            shared_linewidth_hz=given["laser_linewidth_hz"],
        )
        h = h + place(own_h)
        jumps += [qutip.Qobj(place(jump)) for jump in own_jumps]
        peak = given["rabi_scale_2"] * area / (np.sqrt(2 * np.pi) * SIGMA_S)
        envelope = lambda t, peak=peak: peak * np.exp(-((t - 10 * SIGMA_S) ** 2) / (2 * SIGMA_S**2))
        drives.append([qutip.Qobj(place(oracle.drive("vsm", 0.0, 1.0))), envelope])
    found = qutip.mesolve(
        [qutip.Qobj(h), *drives],
        qutip.Qobj(rho),
        [0.0, stop_s],
        c_ops=jumps,
        options={"method": "dop853", "rtol": 1e-10, "atol": 1e-12, "nsteps": 100_000, "max_step": SIGMA_S / 2},
    ).states[-1]
    return found.full()


def repumped(rho):
    """{v, s} of each of two three-level ions, m sent to v."""
    stay, send = np.eye(3)[:2], np.array([[0, 0, 1], [0, 0, 0]])
    return sum(np.kron(a, b) @ rho @ np.kron(a, b).T for a in (stay, send) for b in (stay, send))


def test_channels_of_ions_against_the_master_equation_of_both(ion_channels):
    """An entangled pair that is no X-state, in two different ions, nine levels at once."""
    assert np.all(np.asarray(ion_channels.residual) < 1e-8)
    channels = [jax.tree.map(lambda a, k=k: a[..., 0, k], ion_channels) for k in (0, 1)]
    ket = np.array([0.3, 0.7 + 0.1j, 0.5j, -0.2])
    ket /= np.linalg.norm(ket)
    # v, s of each ion are the first two of its three levels.
    whole = np.zeros(9, complex)
    whole[[0, 1, 3, 4]] = ket
    start = np.outer(whole, whole.conj())
    areas = 2 * np.arcsin(np.sqrt(R))
    before = repumped(evolved_pair(start, 9 * SIGMA_S, (0.0, 0.0)))
    after = repumped(evolved_pair(start, 19 * SIGMA_S, areas))
    found = through(*channels, correlations(before))
    np.testing.assert_allclose(density_matrix(found), after, atol=1e-7)
    np.testing.assert_allclose(concurrence(found), qutip.concurrence(qutip.Qobj(after, dims=[[2, 2]] * 2)), atol=1e-7)
    # Not the ideal one.
    ideal = through(amplitude_damping(R[0]), amplitude_damping(R[1]), correlations(before))
    assert np.abs(np.asarray(density_matrix(ideal)) - after).max() > 0.01


def test_channels_of_ions_are_physical(ion_channels):
    assert np.all(np.asarray(ion_channels.smallest_choi_eigenvalue()) > -1e-9)
    np.testing.assert_allclose(np.sum(ion_channels.population_matrix, axis=0), 1, atol=1e-9)


@pytest.mark.slow
def test_a_leak_lowers_the_trace_and_the_residual_tells_of_decay():
    device = IonMemristor(memory=MovingAverage(4.0), scheme="v", method=Lindblad(1e-7), lifetime_s=5e-3)
    channel = node_channel(device, jnp.array([0.3]))
    loop = run(device, jnp.array([0.25]), jnp.array([0.3]))
    kept = np.sum(channel.population_matrix, axis=0)[:, 0]
    assert np.all(kept < 1)
    assert kept[0] < 0.99  # v is an upper level of the V scheme and decays.
    to_s = channel.population_matrix[1]
    y = to_s[0] * (loop.populations_1[0] + loop.populations_1[2]) + to_s[1] * loop.x
    assert 0 < channel.residual[0] < 1e-2
    np.testing.assert_allclose(y, loop.y, atol=2 * float(channel.residual[0]))


def test_platforms_can_be_mixed_and_batches_stand_side_by_side():
    # Its memory averages populations, which its detector does not touch.
    ideal_ion = IonMemristor(
        memory=MovingAverage(10.0), method=ClosedForm(), source="model", readout_error_bright=jnp.asarray(0.1)
    )
    weights = (1.0, 0.4)
    mixed = play_pair((ideal_ion, IDEAL), werner(one_excitation(X[:, None]), np.array(weights)))
    for k, weight in enumerate(weights):
        same = play_pair((IDEAL, IDEAL), werner(one_excitation(X), weight))
        # An ion turns the phase of s as well, which entanglement does not see.
        np.testing.assert_allclose(mixed.concurrence_out[:, k], same.concurrence_out, atol=1e-12)
        np.testing.assert_allclose(mixed.negativity_out[:, k], same.negativity_out, atol=1e-12)
    assert prepared_node(IDEAL, 3) is IDEAL


@pytest.mark.slow
def test_gradient_through_the_dynamics_of_an_ion():
    prepared = prepared_node(dataclasses.replace(ION, laser_linewidth_hz=jnp.asarray(80.0)), 3 * len(X))

    @jax.jit
    def left(scale, linewidth):
        node = dataclasses.replace(prepared, rabi_scale_2=scale, laser_linewidth_hz=linewidth)
        nodes = (node, dataclasses.replace(IDEAL, source="model"))
        return jnp.sum(play_pair(nodes, one_excitation(X)).concurrence_out)

    found = jax.jit(jax.grad(left, argnums=(0, 1)))(1.02, 80.0)
    expected = [
        (left(1.02 + 1e-5, 80.0) - left(1.02 - 1e-5, 80.0)) / 2e-5,
        (left(1.02, 80.1) - left(1.02, 79.9)) / 0.2,
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_refusals():
    states = one_excitation(jnp.full(3, 0.5))
    with pytest.raises(ValueError, match=r"`memory_inputs` must be 2 by 2"):
        play_pair((IDEAL, IDEAL), states, memory_inputs=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"divide each row by its sum"):
        play_pair((IDEAL, IDEAL), states, memory_inputs=((1.0, 1.0), (0.0, 1.0)))
    with pytest.raises(ValueError, match=r"\(4, 4, cycles, \*batch\)"):
        play_pair((IDEAL, IDEAL), one_excitation(0.5))
    with pytest.raises(ValueError, match=r"`source` must be one of"):
        play_pair((dataclasses.replace(IDEAL, source="guess"), IDEAL), states)
    # One detuning per shot turns the coherence before pulse 2 and during it: the average forgets that, populations too.
    shaken = dataclasses.replace(ION, slow_noise=SlowNoise(detuning_noise_1_hz=500.0))
    for refused in (
        lambda: node_channel(shaken, jnp.array([0.5])),
        lambda: play_pair((IDEAL, shaken), states),
        lambda: store_pair((shaken, IDEAL), one_excitation(0.5), 2),
    ):
        with pytest.raises(ValueError, match=r"averaged over `slow_noise` do not show the channel"):
            refused()


def test_the_ideal_node_has_gradients_at_its_edges():
    left = lambda r: jnp.sum(amplitude_damping(r).coherence_factor)
    slope = jax.vmap(jax.grad(left))(jnp.array([0.0, 0.36, 1.0]))
    np.testing.assert_allclose(slope, [-0.5, -0.625, 0.0], atol=1e-15)


def test_a_bad_transfer_spoils_its_own_lane():
    channel = node_channel(IDEAL, jnp.array([0.5, 1.2]))
    assert channel.valid.tolist() == [True, False]
    assert np.isnan(np.asarray(channel.population_matrix)[..., 1]).all()
    assert amplitude_damping(jnp.array([0.5, 1.2])).valid.tolist() == [True, False]
    t = through(channel, channel, qubit_pairs.one_excitation(jnp.full(2, 0.5)))
    assert np.isfinite(np.asarray(t)[..., 0]).all()

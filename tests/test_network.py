"""Networks: against a plain loop over cycles and edges, in both forms, on both platforms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twin import graph
from twin.graph import Graph
from twin.hysteresis import signed_area
from twin.loop import Settings
from twin.memory import Exponential, MovingAverage
from twin.memristor import Automatic, ClosedForm, IonMemristor, PhotonicMemristor, planned, run
from twin.network import FIELDS, Encoding, Network, play

STEPS, N = 30, 5
U = np.random.default_rng(3).uniform(0.0, 0.5, (STEPS, 2))
W_IN = np.random.default_rng(4).uniform(0.2, 0.6, (N, 2))
TAU = np.linspace(1.5, 5.0, N)


def photonic(tau=TAU, **more):
    return PhotonicMemristor(memory=Exponential(tau), **more)


def network(edges, device=None, **more):
    return Network((photonic() if device is None else device,), edges, Encoding(W_IN, 0.1), **more)


def by_hand(edges, loss=0.0):
    """Photonic nodes with exponential memory, cycle by cycle and edge by edge, inputs in order of the nodes."""
    w = edges.topology
    x_set, r, y = (np.zeros((STEPS, N)) for _ in range(3))
    state = np.full(N, 0.5)
    for k in range(STEPS):
        r[k] = state
        for i in range(N):  # zero-delay edges of these tests lead to higher places
            x_set[k, i] = 0.1 + W_IN[i] @ U[k]
            for s, t, d, kind, weight in zip(w.source, w.target, w.delay_cycles, w.kind, edges.weight, strict=True):
                if t == i and kind == 0 and k >= d:
                    x_set[k, i] += weight * y[k - d, s]
            y[k, i] = (1 - loss) * (1 - state[i]) * x_set[k, i]
        fed = x_set[k].copy()
        for i in np.flatnonzero(w.has_memory_edges):
            fed[i] = 0.0
            for s, t, d, kind, carries, weight in zip(
                w.source, w.target, w.delay_cycles, w.kind, w.carries, edges.weight, strict=True
            ):
                if t == i and kind == 1:
                    fed[i] += weight * ((x_set, y)[carries][k - d, s] if k >= d else 0.5)
        state = state + (fed - state) / TAU
    return x_set, r, y


WEIGHTS = np.random.default_rng(5).uniform(0.05, 0.12, N * (N - 1))
GRAPHS = {
    "uncoupled": graph.uncoupled(N),
    "ring": graph.ring(N, 0.3),
    "ring of delay 3": graph.ring(N, 0.3, delay_cycles=3),
    "all to all": graph.all_to_all(N, WEIGHTS),
    "cascade": graph.cascade(N, 0.4),
    "cascade of delay 2": graph.cascade(N, 0.4, delay_cycles=2),
    "neighbours' memories": graph.shared_memory(N, 0.6, 0.2),
    "late memories": graph.ring(N, 0.7, kind="memory", delay_cycles=2),
    "own outputs": graph.self_edges(N, 1.0, kind="memory", carries="y"),
    "everything": graph.cascade(N, 0.2)
    + graph.random_sparse(N, 2, 0.1, seed=2, delay_cycles=2)
    + graph.all_to_all(N, 0.2, kind="memory", carries="y")
    + graph.ring(N, 0.1, kind="memory", delay_cycles=1),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_network_does_what_its_edges_say(name):
    edges = GRAPHS[name]
    forms = ("scan",) if edges.topology.order is None else ("scan", "parallel")
    assert len(forms) == (1 if name in ("ring", "ring of delay 3", "all to all", "own outputs", "everything") else 2)
    for form in forms:
        trace = play(network(edges), U, form=form)
        assert np.all(trace.valid)
        for name_of, expected in zip(("x_set", "r", "y"), by_hand(edges), strict=True):
            np.testing.assert_allclose(getattr(trace, name_of), expected, rtol=0, atol=1e-13, err_msg=form)


def test_an_unconnected_network_is_a_batch_of_memristors():
    device = IonMemristor(memory=MovingAverage(TAU), method=ClosedForm(), readout_error_bright=0.02)
    trace = play(network(graph.uncoupled(N), device), U)
    loop = run(device, np.asarray(trace.x_set))
    for name in ("x", "y", "r", "p_x", "p_y"):
        np.testing.assert_allclose(getattr(trace, name), getattr(loop, name), rtol=0, atol=1e-14)


MIXED = (
    photonic(np.array([2.0, 3.0]), loss=0.1, efficiency=0.98),
    IonMemristor(memory=MovingAverage(3.5), rabi_scale_1=np.array([0.98, 1.01, 1.0]), readout_error_bright=0.01),
)


def mixed(edges, **more):
    devices = (MIXED[0], dataclasses.replace(MIXED[1], **({"method": ClosedForm()} | more)))
    return Network(devices, edges, Encoding(W_IN, 0.1))


@pytest.mark.parametrize("shots", [None, pytest.param(200, marks=pytest.mark.slow)])
def test_both_forms_agree_on_mixed_platforms(shots):
    edges = graph.Graph.from_edges(N, [0, 1], [3, 4], 0.3, delay_cycles=0) + graph.Graph.from_edges(
        N, [0, 1, 0], [2, 4, 3], 0.8, kind="memory", delay_cycles=1
    )
    key = None if shots is None else jax.random.key(7)
    scan, parallel = (play(mixed(edges), U, form=form, shots=shots, key=key) for form in ("scan", "parallel"))
    for name in (*FIELDS, *(() if shots is None else ("n_x", "n_y"))):
        np.testing.assert_allclose(getattr(scan, name), getattr(parallel, name), rtol=0, atol=1e-12, err_msg=name)
    assert np.all(scan.valid)
    assert np.any(scan.x[:, 2:] != scan.p_x[:, 2:])


def test_sampled_memories_see_counts():
    trace = play(network(graph.ring(N, 1.0, kind="memory")),
                 U, shots=50, key=jax.random.key(1))  # fmt: skip
    fed = np.roll(np.asarray(trace.n_x) / 50, 1, axis=1)
    r = np.full(N, 0.5)
    for k in range(STEPS):
        np.testing.assert_allclose(trace.r[k], r, atol=1e-14)
        r = r + (fed[k] - r) / TAU
    assert np.std(np.asarray(trace.n_x) / 50 - np.asarray(trace.p_x)) == pytest.approx(0.06, abs=0.02)


def test_a_bad_node_spoils_only_what_it_reaches():
    """The second input overdrives node 1; its neighbour in the ring follows a cycle later, the others not yet."""
    for edges in (graph.ring(N, 0.1), graph.all_to_all(N, 0.01)):
        bias = np.full(N, 0.1)
        trace = play(
            Network((photonic(),), edges, Encoding(np.eye(N), bias)), np.eye(N)[[1] * 3] * [[0.0], [2.0], [0.0]]
        )
        assert np.all(trace.valid[0])
        assert np.array_equal(np.asarray(trace.valid[1]), np.arange(N) != 1)
        assert np.isnan(trace.y[1, 1])
        reached = edges.topology.target[edges.topology.source == 1].tolist()
        assert np.array_equal(np.asarray(trace.valid[2]), [i not in (1, *reached) for i in range(N)])


def test_gradients_are_those_of_finite_differences():
    """Ten nodes of both platforms for 200 steps: device parameters, edge weights, inputs' weights and a window."""
    n, steps = 10, 200
    rng = np.random.default_rng(8)
    u = rng.uniform(0, 1, (steps, 1))
    edges = (
        graph.ring(n, 0.2) + graph.nearest_neighbours(n, 0.3, kind="memory") + graph.self_edges(n, 0.4, kind="memory")
    )
    weights = rng.normal(size=(steps, n))

    def loss(v):
        devices = (
            photonic(jnp.full(4, 3.0) + v["tau"], loss=v["loss"]),
            IonMemristor(
                memory=MovingAverage(v["window"], capacity=8),
                method=ClosedForm(),
                rabi_scale_1=v["rabi"] + jnp.zeros(6),
            ),
        )
        made = Network(
            devices, Graph(edges.topology, edges.weight * v["edge"]), Encoding(v["w_in"] * jnp.ones((n, 1)), 0.2)
        )
        return jnp.sum(weights * play(made, u, keep=("y",)).y)

    at = {"tau": 0.3, "loss": 0.05, "window": 4.4, "rabi": 0.97, "edge": 0.9, "w_in": 0.4}
    at = {name: jnp.asarray(value) for name, value in at.items()}
    value = jax.jit(loss)
    slopes = jax.jit(jax.grad(loss))(at)
    h = 1e-4
    for name in at:
        step = lambda k, name=name: value(at | {name: at[name] + k * h})
        numeric = (8 * (step(1) - step(-1)) - (step(2) - step(-2))) / (12 * h)
        assert abs(slopes[name]) > 1e-2
        np.testing.assert_allclose(slopes[name], numeric, rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_the_full_dynamics_in_sequence_is_that_of_run():
    device = IonMemristor(memory=MovingAverage(3.5), rabi_scale_1=np.linspace(0.97, 1.02, N), detuning_2_hz=800.0)
    trace = play(network(graph.uncoupled(N), device), U, form="scan")
    loop = run(device, np.asarray(trace.x_set))
    assert np.all(trace.valid)
    for name in ("x", "y", "r"):
        np.testing.assert_allclose(getattr(trace, name), getattr(loop, name), rtol=0, atol=2e-8)
    assert np.max(np.abs(trace.x - trace.x_set)) > 1e-3


TRACES = []


class Counting(Exponential):
    """A memory that notes each time Python runs through it."""

    def read(self, state):
        TRACES.append(1)
        return super().read(state)


def test_new_values_do_not_compile_again():
    def once(value, inputs):
        device = PhotonicMemristor(memory=Counting(TAU + value), loss=0.1 * value)
        edges = graph.ring(N, 0.2 * value) + graph.ring(N, 0.5 * value, kind="memory")
        return play(Network((device,), edges, Encoding(W_IN * value, 0.1 * value)), inputs).y

    first = once(1.0, U)
    traced = len(TRACES)
    second = once(0.8, 0.5 * U)
    assert len(TRACES) == traced > 0
    assert np.max(np.abs(first - second)) > 0.01


class CountingAverage(MovingAverage):
    """A moving average that notes each time Python runs through it."""

    def read(self, state):
        TRACES.append(1)
        return super().read(state)


def test_a_new_window_that_fits_the_buffer_does_not_compile_again():
    def traces(*windows, capacity=None):
        TRACES.clear()
        for window in windows:
            device = PhotonicMemristor(memory=CountingAverage(window, capacity=capacity))
            assert np.all(play(network(graph.ring(N, 0.15), device), U).valid)
        return len(TRACES)

    once = traces(5.0, capacity=17)
    assert once > 0
    assert traces(5.5, 9.0, 16.9, capacity=17) == 0
    assert traces(5.0) == once
    assert traces(5.5, 5.999) == 0
    assert traces(6.0) == once  # its buffer is longer


def test_hyper_parameters_are_batched_by_vmap():
    taus = np.array([1.5, 3.0, 6.0])
    one = lambda tau: play(network(graph.ring(N, 0.3), photonic(tau + jnp.zeros(N))), U).y
    together = jax.vmap(one)(jnp.asarray(taus))
    for tau, y in zip(taus, together, strict=True):
        np.testing.assert_allclose(y, one(tau), rtol=0, atol=1e-14)


def test_only_what_is_asked_for_is_kept():
    trace = play(network(graph.ring(N, 0.3)), U, keep=("y",))
    assert trace.y.shape == (STEPS, N)
    assert trace.x is None and trace.valid is None and trace.n_y is None


def test_commands_within_rounding_of_the_edge_are_the_edge():
    trace = play(
        Network((photonic(3.0),), graph.cascade(2, 1.0), Encoding(np.eye(2)[:, :1], [1e-14, 0.0])), np.ones((4, 1))
    )
    assert np.all(trace.valid)
    assert np.all(trace.x_set[:, 0] == 1.0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: graph.cascade(3, 1.0) + Graph.from_edges(3, 2, 0, delay_cycles=0), "form an algebraic loop"),
        (lambda: Graph.from_edges(3, 0, 3), "`target` must hold whole numbers from 0 to below 3, but has 3"),
        (lambda: Graph.from_edges(3, 0, 1, delay_cycles=-1), "`delay_cycles` must hold"),
        (lambda: Graph.from_edges(3, 0, 1, kind="feedback"), "`kind` must be one of"),
        (lambda: Graph.from_edges(3, [0, 1], [1, 2], [0.1, 0.2, 0.3]), "for each of 2 edges, but has shape \\(3,\\)"),
        (lambda: graph.ring(3, [0.1, 0.2]), "for each of 3 edges"),
        (lambda: Graph.from_edges(3, 0, 1, carries="x"), "'y' for input edges"),
        (lambda: graph.ring(3) + graph.ring(4), "cannot be joined"),
        (lambda: graph.random_sparse(3, 3, seed=0), "`degree` must be from 1 to 2"),
        (lambda: network(graph.ring(N + 1)), "the graph has 6"),
        (lambda: Network((photonic(),), graph.ring(N), Encoding(np.ones((3, 1)))), "one row for each of 5 nodes"),
        (lambda: Network((photonic(),), graph.ring(N), Encoding(np.ones(N))), "one row for each of 5 nodes and one"),
        (lambda: Network((photonic(),), graph.ring(N), Encoding(W_IN, np.ones(2))), "but has \\(2,\\)"),
        (lambda: Network((photonic(),), graph.ring(N), Encoding(W_IN, np.ones((N, 1)))), "`bias` must be one number"),
        (lambda: Network((photonic(),), graph.ring(N), nodes_per_device=(2, 3)), "one number for each of 1 devices"),
        (lambda: network(graph.ring(N), photonic(source="guess")), "`source` must be one of"),
        (lambda: play(network(graph.ring(N)), U[:, :1]), "`inputs` must have shape"),
        (lambda: play(Network((photonic(),), graph.ring(N)), U), "give the network an `encoding`"),
        (lambda: play(network(graph.ring(N)), U[:0]), "have no steps"),
        (lambda: play(network(graph.ring(N)), U, shots=10), "go together"),
        (
            lambda: play(network(graph.ring(N)), U, shots=0, key=jax.random.key(0)),
            "`shots` must be whole and at least 1",
        ),
        (lambda: play(network(graph.ring(N)), U, shots=2.5, key=jax.random.key(0)), "but is 2.5"),
        (lambda: play(network(graph.ring(N)), U, form="fast"), "`form` must be one of"),
        (lambda: play(network(graph.ring(N)), U, form="parallel"), "use form 'scan'"),
        (lambda: play(network(graph.ring(N)), U, keep=("z",)), "`keep` may name"),
        (lambda: play(network(graph.ring(N)), U, checkpoint_cycles=0), "`checkpoint_cycles` must be at least 1"),
    ],
)
def test_bad_input_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()


@pytest.mark.parametrize("lanes", [N, pytest.param(1, marks=pytest.mark.slow)])
def test_series_read_in_a_network_are_those_of_the_device(lanes):
    """The reader of two numbers a run against all levels of `respond`; overlapping pulses, readout errors."""
    spread = np.linspace(0.97, 1.02, N) if lanes == N else 0.98
    device = IonMemristor(memory=Exponential(TAU if lanes == N else 3.0), rabi_scale_1=spread, detuning_2_hz=800.0,
                          readout_error_bright=0.02, readout_error_dark=0.01, separation_s=100e-6)  # fmt: skip
    made = network(graph.uncoupled(N), device, nodes_per_device=(N,))
    solved = made.solved()
    trace = play(solved, U, form="scan")
    (ion,) = made.prepared().devices

    @jax.jit
    def both(x, r):
        respond = ion.under(Settings())
        return [
            f(respond(x, r, alone=alone).populations) for alone in (True, False) for f in (ion.signal, ion.assigned)
        ]

    for name, expected in zip(("x", "p_x", "y", "p_y"), both(trace.x_set, trace.r), strict=True):
        np.testing.assert_allclose(getattr(trace, name), expected, rtol=0, atol=1e-13, err_msg=name)
    assert np.all(trace.valid)
    np.testing.assert_array_equal(play(made, U, form="scan").y, trace.y)


def test_checkpoints_change_no_number():
    edges = graph.ring(N, 0.3)
    loss = lambda w, every: jnp.sum(
        play(network(Graph(edges.topology, w * edges.weight)), U, checkpoint_cycles=every).y ** 2
    )
    plain, stored = (jax.value_and_grad(loss)(0.9, every) for every in (None, 7))
    np.testing.assert_allclose(stored, plain, rtol=1e-13)


@pytest.mark.slow
def test_gradients_through_the_full_dynamics():
    """Ten ions, 200 steps: a traced Rabi scale, of a device planned for its box, and a traced window of a known one."""
    u = np.random.default_rng(11).uniform(0, 1, (200, 1))
    device = IonMemristor(memory=MovingAverage(2.5, capacity=8), detuning_2_hz=800.0)
    laid = planned(device, {"rabi_scale_1": (0.9, 1.1)}, solves=1e6)

    def loss(v):
        devices = (
            dataclasses.replace(laid, rabi_scale_1=v["rabi"] + jnp.zeros(4)),
            dataclasses.replace(device, memory=MovingAverage(v["window"] + jnp.zeros(6), capacity=8)),
        )
        encoding = Encoding(jnp.linspace(0.2, 0.6, 10)[:, None], 0.1)
        return jnp.sum(play(Network(devices, graph.ring(10, 0.3), encoding), u).y)

    at = {"rabi": jnp.asarray(0.98), "window": jnp.asarray(3.4)}
    value, slopes = jax.jit(loss), jax.jit(jax.grad(loss))(at)
    for name in at:
        step = lambda k, name=name: value(at | {name: at[name] + 1e-4 * k})
        numeric = (8 * (step(1) - step(-1)) - (step(2) - step(-2))) / (12 * 1e-4)
        np.testing.assert_allclose(slopes[name], numeric, rtol=1e-6, err_msg=name)


def test_known_devices_are_laid_inside_jit():
    """`Automatic` needs known values, which they are when only the edges are differentiated."""
    device = IonMemristor(memory=MovingAverage(np.linspace(2.0, 4.5, N)), method=Automatic(error=0.05))
    loss = lambda w: jnp.mean(play(network(graph.ring(N, w), device), U).y)
    slope = jax.jit(jax.grad(loss))(0.3)
    assert float(slope) == pytest.approx(float((loss(0.3001) - loss(0.2999)) / 2e-4), rel=1e-6)


def test_shared_memories_turn_areas_by_the_phase_of_the_neighbours():
    """Inputs that lag node by node by a tenth of a period: the neighbours' mean is shorter by cos(2 pi / 10)."""
    cycles, nodes, window = 40, 10, 10.0
    x = np.sin(np.pi * np.arange(3 * cycles)[:, None] / cycles - np.pi * np.arange(nodes) / 10) ** 2
    device = PhotonicMemristor(memory=MovingAverage(np.full(nodes, window)), source="model")
    for own in (1.0, 0.5, 0.0):
        trace = play(Network((device,), graph.shared_memory(nodes, own, (1 - own) / 2)), x)
        areas = jax.vmap(signed_area, in_axes=1)(trace.x[2 * cycles :], trace.y[2 * cycles :])
        np.testing.assert_allclose(areas, 0.2680153507 * (own + (1 - own) * np.cos(np.pi / 5)), rtol=1e-9)


@pytest.mark.parametrize("source", ["measured", "model", "command"])
def test_an_edge_carries_what_a_controller_sees(source):
    made = network(graph.ring(N, 0.5), photonic(source=source, efficiency=0.8, dark_counts=0.05))
    for more in ({}, {"shots": 50, "key": jax.random.key(0)}):
        trace = play(made, U, **more)
        sent = trace.y if source == "model" else trace.n_y / 50 if more else trace.p_y
        drive = 0.1 + U @ W_IN.T
        np.testing.assert_allclose(trace.x_set[1:], drive[1:] + 0.5 * np.roll(sent[:-1], 1, axis=1), rtol=1e-12)

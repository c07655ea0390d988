"""Networks: against a plain loop over cycles and edges, in both forms, on both platforms."""

import dataclasses

import jax
import numpy as np
import pytest

from twin import graph
from twin.memory import Exponential, MovingAverage
from twin.memristor import ClosedForm, IonMemristor, PhotonicMemristor, run
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
    w = edges.wiring
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
        for i in np.flatnonzero(w.remembers_others):
            fed[i] = 0.0
            for s, t, d, kind, of, weight in zip(
                w.source, w.target, w.delay_cycles, w.kind, w.of, edges.weight, strict=True
            ):
                if t == i and kind == 1:
                    fed[i] += weight * ((x_set, y)[of][k - d, s] if k >= d else 0.5)
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
    "own outputs": graph.self_edges(N, 1.0, kind="memory", of="y"),
    "everything": graph.cascade(N, 0.2)
    + graph.random_sparse(N, 2, 0.1, seed=2, delay_cycles=2)
    + graph.all_to_all(N, 0.2, kind="memory", of="y")
    + graph.ring(N, 0.1, kind="memory", delay_cycles=1),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_network_does_what_its_edges_say(name):
    edges = GRAPHS[name]
    forms = ("scan",) if edges.wiring.order is None else ("scan", "parallel")
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
    photonic(np.array([2.0, 3.0]), loss=0.1, readout_error_dark=0.02),
    IonMemristor(memory=MovingAverage(3.5), rabi_scale_1=np.array([0.98, 1.01, 1.0]), readout_error_bright=0.01),
)


def mixed(edges, **more):
    devices = (MIXED[0], dataclasses.replace(MIXED[1], **({"method": ClosedForm()} | more)))
    return Network(devices, edges, Encoding(W_IN, 0.1))


@pytest.mark.parametrize("shots", [None, 200])
def test_both_forms_agree_on_mixed_platforms(shots):
    edges = graph.cascade(N, 0.3) + graph.Graph.of(N, [0, 1, 0], [2, 4, 3], 0.8, kind="memory", delay_cycles=1)
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
        reached = edges.wiring.target[edges.wiring.source == 1].tolist()
        assert np.array_equal(np.asarray(trace.valid[2]), [i not in (1, *reached) for i in range(N)])

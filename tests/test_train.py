"""Reservoirs: what the read-out sees, gradients through network and solution, and training that lowers the error."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.ridge import Split
from calibration.train import Free, Reservoir, _with, reservoir_nmse, train_devices, train_readout
from experiments.tasks import second_order_narma
from twin.graph import ring, uncoupled
from twin.memory import Exponential, MovingAverage
from twin.memristor import ClosedForm, IonMemristor, PhotonicMemristor
from twin.network import Encoding, Network, play

RUN = second_order_narma(0, 400)
INPUTS, TARGETS = jnp.asarray(RUN.scaled)[:, None], jnp.asarray(RUN.targets)
SPLIT = Split(20, 150, 130, 100)


def reservoir(nodes=4, tau=None, weight=0.0, graph=None, **more) -> Reservoir:
    tau = jnp.linspace(1.5, 8.0, nodes) if tau is None else tau
    graph = graph or (ring(nodes, weight) if weight else uncoupled(nodes))
    encoding = Encoding(jnp.linspace(0.2, 0.6, nodes)[:, None], jnp.linspace(0.05, 0.2, nodes))
    return Reservoir(Network((PhotonicMemristor(memory=Exponential(tau)),), graph, encoding), **more)


FREE = {
    "tau": Free(lambda n: n.devices[0].memory.tau_cycles, 1.0, 30.0),
    "encoding": Free(lambda n: n.encoding.weights, 0.0, 0.7),
}


def test_the_read_out_sees_what_is_measured():
    """Errors of a detector belong to the features; counts estimate them."""
    ion = IonMemristor(memory=Exponential(jnp.linspace(1.5, 8.0, 4)), method=ClosedForm(), readout_error_dark=0.1)
    with_errors = eqx.tree_at(lambda r: r.network.devices, reservoir(seen=("x", "y")), (ion,))
    trace = play(with_errors.network, INPUTS)
    features = with_errors.features(INPUTS)
    # Another program than that of all fields: alike to rounding.
    np.testing.assert_allclose(features, jnp.concatenate([trace.p_x, trace.p_y], axis=1), rtol=1e-14)
    np.testing.assert_allclose(features, 0.9 * jnp.concatenate([trace.x, trace.y], axis=1), rtol=1e-12)
    shots = 200
    counted = with_errors.features(INPUTS, shots=shots, key=jax.random.key(0))
    np.testing.assert_allclose(counted * shots, jnp.round(counted * shots), atol=1e-10)
    pull = (counted[:, :4] - features[:, :4]) / jnp.sqrt(features[:, :4] * (1 - features[:, :4]) / shots)
    assert jnp.std(pull) == pytest.approx(1.0, abs=0.1)


def test_commands_outside_their_range_are_not_read_out():
    bad = eqx.tree_at(lambda r: r.network.encoding.bias, reservoir(), jnp.array([0.1, 0.9, 0.1, 0.1]))
    features = bad.features(INPUTS)
    assert jnp.any(jnp.isnan(features[:, 1]))
    assert jnp.all(jnp.isfinite(features[:, 0]))
    assert jnp.isnan(reservoir_nmse(bad, INPUTS, TARGETS, SPLIT, 1e-6))


def test_a_trained_reservoir_predicts():
    trained, chosen = train_readout(reservoir(), INPUTS, TARGETS, SPLIT)
    predicted = trained(INPUTS)
    test = SPLIT.parts[2]
    error = jnp.mean((predicted[test] - TARGETS[test]) ** 2) / jnp.var(TARGETS[test])
    assert chosen.test == pytest.approx(float(error), rel=1e-9)
    assert chosen.test < 0.45
    with pytest.raises(ValueError, match="no read-out yet"):
        reservoir()(INPUTS)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_gradients_go_through_network_and_solution(weight):
    """Of the validation error, by finite differences, with outputs that come back and without."""
    whole, free = reservoir(weight=weight), tuple(FREE.values())
    point = jnp.asarray(np.random.default_rng(1).normal(size=8))
    loss = eqx.filter_jit(lambda p: reservoir_nmse(_with(whole, free, p), INPUTS, TARGETS, SPLIT, 1e-4))
    slope, step = eqx.filter_jit(jax.grad(loss))(point), 1e-5
    for k in range(8):
        move = step * jnp.eye(8)[k]
        difference = (loss(point + move) - loss(point - move)) / (2 * step)
        assert slope[k] == pytest.approx(float(difference), rel=1e-6, abs=1e-9)


def test_training_lowers_the_error_of_both_parts():
    start = reservoir(tau=jnp.array([20.0, 21.0, 22.0, 23.0]))
    told = []
    training = train_devices(
        start, INPUTS, TARGETS, SPLIT, FREE, iterations=40, on_progress=lambda done, _: told.append(done)
    )
    assert training.after < 0.7 * training.before
    assert training.test_after < 0.8 * training.test_before
    assert training.before == pytest.approx(float(reservoir_nmse(start, INPUTS, TARGETS, SPLIT, 1e-6)))
    tau = training.reservoir.network.devices[0].memory.tau_cycles
    assert jnp.all((tau > 1.0) & (tau < 30.0))
    test = SPLIT.parts[2]
    predicted = training.reservoir(INPUTS)[test]
    assert jnp.mean((predicted - TARGETS[test]) ** 2) / jnp.var(TARGETS[test]) == pytest.approx(training.test_after)
    assert told[-1] == 40


def averaging(nodes: int, graph, window) -> Reservoir:
    """Moving averages, whose buffers have a length that is known when a program is compiled."""
    device = PhotonicMemristor(memory=MovingAverage(window))
    return Reservoir(Network((device,), graph, Encoding(jnp.linspace(0.2, 0.6, nodes)[:, None], 0.1)))


@pytest.mark.parametrize(
    ("nodes", "graph"), [(2, ring(2, 0.1)), (8, uncoupled(8) + ring(8, 0.1, delay_cycles=2))], ids=["few", "many"]
)
def test_known_windows_need_no_capacity_in_training(nodes, graph):
    free = {"edges": Free(lambda n: n.graph.weight, 0.0, 0.3)}
    plain, roomy = averaging(nodes, graph, 5.0), averaging(nodes, graph, 5.0)
    roomy = eqx.tree_at(lambda r: r.network.devices[0].memory, roomy, MovingAverage(5.0, capacity=6))
    a, b = (train_devices(r, INPUTS, TARGETS, SPLIT, free, iterations=3) for r in (plain, roomy))
    assert a.after < a.before
    np.testing.assert_array_equal(a.reservoir.network.graph.weight, b.reservoir.network.graph.weight)
    assert a[1:] == b[1:]
    # What comes back is the network that was given but for what was trained.
    assert a.reservoir.network.devices[0].memory.capacity is None
    assert b.reservoir.network.devices[0].memory.capacity == 6


def test_a_free_window_has_room_up_to_its_bound():
    free = {"window": Free(lambda n: n.devices[0].memory.window_cycles, 1.0, 12.0)}
    found = train_devices(averaging(2, ring(2, 0.1), [8.5, 2.0]), INPUTS, TARGETS, SPLIT, free, iterations=25, starts=3)
    assert found.after < 0.9 * found.before
    memory = found.reservoir.network.devices[0].memory
    assert memory.capacity is None
    assert jnp.all((memory.window_cycles > 1.0) & (memory.window_cycles < 12.0))
    assert found.test_after == pytest.approx(
        float(reservoir_nmse(found.reservoir, INPUTS, TARGETS, SPLIT, 1e-6, part="test")), rel=1e-9
    )
    # Each start had a loss: a buffer that is too short would have given NaN.
    values = []
    train_devices(
        averaging(2, ring(2, 0.1), [8.5, 2.0]), INPUTS, TARGETS, SPLIT, free, iterations=10, starts=4,
        on_progress=lambda _, losses: values.append(losses),
    )  # fmt: skip
    assert np.all(np.isfinite(values[-1]))


def test_hyper_parameters_are_judged_in_batches():
    """A mapped error is the error of each; so are windows of moving averages, which are traced there."""

    def of(window):
        whole = reservoir()
        memory = MovingAverage(window * jnp.ones(4))
        return reservoir_nmse(
            eqx.tree_at(lambda r: r.network.devices[0].memory, whole, memory), INPUTS, TARGETS, SPLIT, 1e-6, part="test"
        )

    windows = jnp.array([1.0, 3.5, 9.0])
    together = eqx.filter_vmap(of)(windows)
    assert together.shape == (3,)
    np.testing.assert_allclose(together, [of(w) for w in windows], rtol=1e-6)


def test_an_output_of_its_own_memory_is_a_network_too():
    """MerLin's node, whose memory averages its own output: by the network and by its recurrence."""
    from experiments.reproduce_reservoirs import own_output
    from twin.graph import self_edges

    x = 1 - jnp.asarray(RUN.inputs[:60, None]) ** 2 * jnp.ones(2)
    tau = jnp.array([3.0, 5.0])
    network = Network(
        (PhotonicMemristor(memory=Exponential(tau), source="model"),), self_edges(2, kind="memory", carries="y")
    )
    y = play(network, x).y
    np.testing.assert_allclose(y, own_output(tau, x)[:, 1], rtol=1e-13)
    r, rows = 0.5, []
    for x_k in np.asarray(x[:, 1]):
        rows.append((1 - r) * x_k)
        r += (rows[-1] - r) / 5.0
    np.testing.assert_allclose(y[:, 1], rows, rtol=1e-13)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="`seen` must name some of"):
        reservoir(seen=())
    with pytest.raises(ValueError, match="`free` names no parameter"):
        train_devices(reservoir(), INPUTS, TARGETS, SPLIT, {})
    narrow = {"tau": Free(FREE["tau"].where, 1.0, 5.0)}
    with pytest.raises(ValueError, match="'tau' must lie between its bounds 1 and 5, but is"):
        train_devices(reservoir(), INPUTS, TARGETS, SPLIT, narrow)
    with pytest.raises(ValueError, match="`part` must be"):
        reservoir_nmse(reservoir(), INPUTS, TARGETS, Split(20, 150, 0, 60), 1e-6)
    with pytest.raises(ValueError, match="but the record has 400"):
        reservoir_nmse(reservoir(), INPUTS, TARGETS, Split(20, 150, 130, 101), 1e-6)
    outside = eqx.tree_at(lambda r: r.network.encoding.bias, reservoir(), jnp.array([0.1, 0.9, 0.1, 0.1]))
    with pytest.raises(ValueError, match=r"that of column 1 is not in step \d+: keep the commands"):
        train_readout(outside, INPUTS, TARGETS, SPLIT)
    with pytest.raises(ValueError, match="NaN at every start: keep the commands"):
        train_devices(outside, INPUTS, TARGETS, SPLIT, {"tau": FREE["tau"]}, iterations=2)


@pytest.mark.parametrize("verb", ["train_readout", "train_devices", "reservoir_nmse"])
def test_targets_that_nothing_can_be_learned_from_are_refused(verb):
    run = {
        "train_readout": lambda targets, split=SPLIT: train_readout(reservoir(), INPUTS, targets, split),
        "train_devices": lambda targets, split=SPLIT: train_devices(
            reservoir(), INPUTS, targets, split, FREE, iterations=1
        ),
        "reservoir_nmse": lambda targets, split=SPLIT: reservoir_nmse(
            reservoir(), INPUTS, targets, split, 1e-6, part="test"
        ),
    }[verb]
    wrong = {
        r"targets must be finite, but that of step 30, in the train part, is nan": TARGETS.at[30].set(jnp.nan),
        r"targets must be finite, but that of step 399, in the test part, is inf": TARGETS.at[399].set(jnp.inf),
        r"targets must vary in the (validation|test) part, .* are all \[0.3\]": jnp.full(400, 0.3),
        r"one row for each of 400 steps, but have shape \(399,\)": TARGETS[1:],
        r"one row for each of 400 steps, but have shape \(\)": jnp.asarray(0.3),
    }
    for says, targets in wrong.items():
        with pytest.raises(ValueError, match=says):
            run(targets)
    with pytest.raises(ValueError, match=r"`washout` of a split must be a whole number of steps, but is 5\.5"):
        run(TARGETS, SPLIT._replace(washout=5.5))
    if verb != "reservoir_nmse":
        with pytest.raises(ValueError, match="the validation part, which has no steps"):
            run(TARGETS, Split(20, 150, 0, 60))


def test_targets_that_are_not_looked_at_may_be_anything():
    """Those of the washout; and one output that does not vary beside another."""
    washed = TARGETS.at[:20].set(jnp.nan)
    assert train_readout(reservoir(), INPUTS, washed, SPLIT)[1].test < 0.45
    two = jnp.stack([TARGETS, jnp.ones(400)], axis=1)
    assert jnp.isfinite(train_readout(reservoir(), INPUTS, two, SPLIT)[1].test)
    # Where they are traced, what they are is not known.
    error = jax.jit(lambda t: reservoir_nmse(reservoir(), INPUTS, t, SPLIT, 1e-6))(jnp.full(400, jnp.nan))
    assert jnp.isnan(error)

"""Networks: memristors of either platform on a directed graph with delays.

In cycle k node i is commanded

    x_set_i[k] = bias_i + sum_c w_in[i, c] inputs[k, c] + sum over its input edges of w y_source[k - delay]

and its memory takes in its own input x, or, where memory edges lead to the node, the weighted sum of what their sources
send. `play` computes this cycle by cycle, or for all cycles at once where no output comes back to an input or a memory
that it depends on. Before the first cycle outputs that input edges carry are 0, and what memory edges carry is 1/2.
"""

import dataclasses
import numbers
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from twin.batching import batch_shape, is_traced, physical, real_array
from twin.coupling import Coupling, couplings
from twin.graph import CARRIED, Graph
from twin.loop import SOURCES, AbstractMemristor, within_rounding
from twin.memory import HISTORY
from twin.node_series import has_series
from twin.player import Player, prepared, solved
from twin.readout import check_shots, sample_counts

FORMS = ("auto", "scan", "parallel")
FIELDS = ("x_set", "r", "x", "y", "p_x", "p_y", "valid")
# How far outside [0, 1] the rounding of a weighted sum may carry a command.
_ROUNDING = 1e-12
# Nodes from which on a CPU is faster cycle by cycle than all at once, where it streams through memory.
_MANY = 8
# Input that stands for one not known yet; its cycle is computed and thrown away.
_SAFE = 0.5


class Encoding(eqx.Module):
    """How inputs become commands: `bias + weights @ inputs`.

    Args:
        weights: shape (nodes, channels).
        bias: shape (nodes,), or one number.
    """

    weights: Float[Array, "nodes channels"] = physical(None)
    bias: Float[Array, "..."] = physical(None, default=0.0)


class Network(eqx.Module):
    """Memristors, and the edges between them.

    Args:
        devices: each stands for as many nodes as its parameters have lanes, in this order. Platforms may be mixed.
        graph: edges between all the nodes.
        encoding: None for inputs that are commands already, one channel a node.
        nodes_per_device: where the parameters do not say; without it one device alone stands for all nodes.

    Raises:
        ValueError: parameters that do not fit `nodes_per_device`, numbers that do not add up to the nodes of the graph,
            an encoding of another shape, an unknown memory source, devices that are not in a tuple.
    """

    devices: tuple[AbstractMemristor, ...]
    graph: Graph
    encoding: Encoding | None
    nodes_per_device: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        devices: tuple[AbstractMemristor, ...],
        graph: Graph,
        encoding: Encoding | None = None,
        nodes_per_device: tuple[int, ...] | None = None,
    ):
        if isinstance(devices, AbstractMemristor):
            raise ValueError("`devices` must be a tuple of memristors, but is one: write `(device,)`.")
        if nodes_per_device is None:
            lanes = tuple(device.lanes for device in devices)
            nodes_per_device = (graph.nodes,) if lanes == (1,) else lanes
        self.devices, self.graph, self.encoding, self.nodes_per_device = devices, graph, encoding, nodes_per_device

    def __check_init__(self):
        total = self.graph.nodes
        if len(self.nodes_per_device) != len(self.devices):
            raise ValueError(
                f"`nodes_per_device` must have one number for each of {len(self.devices)} devices, "
                f"but is {self.nodes_per_device}."
            )
        if sum(self.nodes_per_device) != total:
            raise ValueError(
                f"the devices stand for {self.nodes_per_device} nodes, but the graph has {total}; "
                "give `nodes_per_device`, or parameters of that many lanes."
            )
        for device, count in zip(self.devices, self.nodes_per_device, strict=True):
            shape = batch_shape(device)
            if shape not in ((), (1,), (count,)):
                raise ValueError(
                    f"parameters of shape {shape} do not fit {count} nodes; give each a number or ({count},)."
                )
            if device.source not in SOURCES:
                raise ValueError(f"the memory's `source` must be one of {SOURCES}, but is {device.source!r}.")
        if self.encoding is not None:
            w, b = self.encoding.weights.shape, self.encoding.bias.shape
            if len(w) != 2 or w[0] != total:
                raise ValueError(
                    f"the encoding's `weights` must have one row for each of {total} nodes and one column a channel, "
                    f"but have shape {w}."
                )
            if b not in ((), (total,)):
                raise ValueError(f"the encoding's `bias` must be one number or have shape ({total},), but has {b}.")

    @property
    def groups(self) -> tuple[slice, ...]:
        """Places of the nodes of each device among all of them."""
        ends = np.cumsum(self.nodes_per_device)
        return tuple(slice(int(e) - c, int(e)) for e, c in zip(ends, self.nodes_per_device, strict=True))

    def commands(self, inputs: Float[Array, "steps channels"]) -> Float[Array, "steps nodes"]:
        """What inputs alone command, before edges add to it."""
        if self.encoding is None:
            if inputs.ndim != 2 or inputs.shape[1] not in (1, self.graph.nodes):
                raise ValueError(
                    f"`inputs` must have shape (steps, {self.graph.nodes}), but have {inputs.shape}; "
                    "give the network an `encoding` to feed it with other channels."
                )
            return jnp.broadcast_to(inputs, (inputs.shape[0], self.graph.nodes))
        if inputs.ndim != 2 or inputs.shape[1] != self.encoding.weights.shape[1]:
            raise ValueError(
                f"`inputs` must have shape (steps, {self.encoding.weights.shape[1]}), one column for each channel of "
                f"the encoding, but have {inputs.shape}."
            )
        return inputs @ self.encoding.weights.T + self.encoding.bias

    def prepared(self) -> "Network":
        """The network with the methods of its devices decided and laid; devices with traced values pass."""
        # Known values stay known where the caller differentiates or compiles something else.
        with jax.ensure_compile_time_eval():
            return self._with(tuple(prepared(device) for device in self.devices))

    def solved(self) -> "Network":
        """The network with the full dynamics of its ions solved beforehand, for many records of the same devices.

        Ions that `node_series` can stand for become `SolvedIon`; others, and traced ones, pass. Edges, encoding and
        memories may change afterwards.
        """
        laid = self.prepared()
        with jax.ensure_compile_time_eval():
            known = (has_series(d) and not is_traced(d) for d in laid.devices)
            return self._with(tuple(solved(d) if k else d for d, k in zip(laid.devices, known, strict=True)))

    def _with(self, devices: tuple[AbstractMemristor, ...]) -> "Network":
        same = all(new is old for new, old in zip(devices, self.devices, strict=True))
        return self if same else dataclasses.replace(self, devices=devices)


class Trace(eqx.Module):
    """What happened at every node, shape (steps, nodes); None for what was not kept.

    Attributes:
        x_set, r: what was commanded, and what the memory held.
        x, y: population of s after pulse 1 alone, and after both pulses.
        p_x, p_y: probability that a shot is assigned to s.
        valid: commands in [0, 1], and cycles solved to the requested error; x, y, p_x, p_y are NaN in the others.
        n_x, n_y: sampled counts; None without shots.
    """

    x_set: Float[Array, "steps nodes"] | None
    r: Float[Array, "steps nodes"] | None
    x: Float[Array, "steps nodes"] | None
    y: Float[Array, "steps nodes"] | None
    p_x: Float[Array, "steps nodes"] | None
    p_y: Float[Array, "steps nodes"] | None
    valid: Bool[Array, "steps nodes"] | None
    n_x: Float[Array, "steps nodes"] | None
    n_y: Float[Array, "steps nodes"] | None


def play(
    network: Network,
    inputs,
    *,
    shots=None,
    key: PRNGKeyArray | None = None,
    form: str = "auto",
    keep: Sequence[str] = FIELDS,
    checkpoint_cycles: int | None = None,
) -> Trace:
    """All cycles of a network.

    Main arguments:
        network: devices on a graph.
        inputs: shape (steps, channels) with an encoding; else commands in [0, 1], shape (steps, nodes) or (steps, 1).
        shots, key: repetitions of each setting, perhaps node by node, and random key; None for expectation values.

    Other arguments:
        form: "scan" goes cycle by cycle; "parallel" takes all cycles at once, node after node along the edges; "auto"
            is parallel where that is possible and faster: on an accelerator, or for few nodes.
        keep: fields of the trace to write; a long record of a large network may not fit with all of them.
        checkpoint_cycles: of a scan, for reverse-mode derivatives of long records: states are stored once in so many
            cycles, and what lies between is computed again. None stores every cycle; the parallel form ignores it.

    Returns:
        A `Trace`. What a node sends is what a controller sees: by the device's source counts over shots or their
        expectation ("measured"), populations ("model"); "command" sends the command in place of x, and y as measured.

    Raises:
        ValueError: inputs of another shape, or complex; shots below 1, fractional, of another shape, or without a
            key; an unknown form or field; checkpoints that are not whole cycles; "parallel" where outputs come back.

    Example:
        >>> network = Network((PhotonicMemristor(memory=MovingAverage(10.0)),), ring(10, 0.2), Encoding(w_in, 0.3))
        >>> features = play(network, u[:, None]).y
    """
    check_shots(shots, key)
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {FORMS}, but is {form!r}.")
    if checkpoint_cycles is not None and not (
        isinstance(checkpoint_cycles, numbers.Integral) and checkpoint_cycles > 0
    ):
        raise ValueError(
            f"`checkpoint_cycles` must be at least 1 and whole, but is {checkpoint_cycles!r}; None stores all cycles."
        )
    nodes = network.graph.nodes
    if np.shape(shots) not in ((), (nodes,)):
        raise ValueError(
            f"`shots` must be one number, or one for each of {nodes} nodes, but has shape {np.shape(shots)}."
        )
    if np.iscomplexobj(inputs):
        raise ValueError("`inputs` must be real, but are complex; give real and imaginary part a channel each.")
    unknown = [name for name in keep if name not in FIELDS]
    if unknown:
        raise ValueError(f"`keep` may name {FIELDS}, but has {unknown[0]!r}.")
    order = network.graph.topology.order
    if form == "parallel" and order is None:
        raise ValueError("outputs come back in this graph, so that cycles must follow each other; use form 'scan'.")
    inputs = real_array(inputs)
    if inputs.ndim == 2 and inputs.shape[0] == 0:
        raise ValueError("`inputs` have no steps; give at least one row.")
    network = network.solved()  # apart: a program of its own serves every graph and length
    keep = tuple(name for name in FIELDS if name in keep)
    shots = None if shots is None else real_array(shots)
    many = network.graph.nodes >= _MANY and jax.local_devices()[0].platform == "cpu"
    if form == "scan" or order is None or (form == "auto" and many):
        # The length of a buffer is static, so memories start outside jit, where a known window is known.
        states = tuple(d.memory.init((c,)) for d, c in zip(network.devices, network.nodes_per_device, strict=True))
        return _in_sequence(network, states, inputs, shots, key, keep, checkpoint_cycles)
    return _all_at_once(network, inputs, shots, key, keep)


class _Board:
    """Values of all nodes as they become known, device by device."""

    def __init__(self, network: Network, rows: tuple[int, ...]):
        self.groups, self.shapes = network.groups, [(*rows, c) for c in network.nodes_per_device]
        self.values: list[dict[str, Array]] = [{} for _ in self.groups]

    def put(self, group: int, here: np.ndarray, new: dict[str, Array]) -> None:
        """Values of those nodes of a device that are `here`; their two runs must both be valid."""
        old = self.values[group]
        for name, value in new.items():
            if name in old:
                value = old[name] & value if name == "valid" else value
                value = value if here.all() else jnp.where(here, value, old[name])
            old[name] = value

    def all(self, name: str) -> Array:
        """Values of all nodes.

        Nodes not evaluated yet hold 0 or the answer to a placeholder input; callers use those that were.
        """
        known = [v.get(name, None) for v in self.values]
        rows = [jnp.zeros(s) if k is None else k for k, s in zip(known, self.shapes, strict=True)]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=-1)


def _split(values: Array, network: Network) -> list[Array]:
    return [values[..., group] for group in network.groups]


def _own(shots, group: slice):
    """Shots of the nodes of one device."""
    return shots if shots is None or shots.ndim == 0 else shots[group]


def _trace(known: dict[str, Array]) -> Trace:
    return Trace(**{name: known.get(name) for name in (*FIELDS, "n_x", "n_y")})


def _evaluate(board: _Board, players, here: np.ndarray, x_set: Array, r: Array | None, shots, key) -> None:
    """Plays pulse 1 alone (`r` None) or both pulses on the nodes that are `here`, and puts down what came out."""
    run = "x" if r is None else "y"
    concerned = [(g, player, group) for g, (player, group) in enumerate(zip(players, board.groups, strict=True))
                 if here[group].any()]  # fmt: skip
    for g, player, group in concerned:
        own = [None if a is None else a[..., group] for a in (x_set, r)]
        safe = [a if a is None or here[group].all() else jnp.where(here[group], a, _SAFE) for a in own]
        set_point = {"x_set": own[0]} if own[1] is None else {"r": own[1]}
        board.put(g, here[group], set_point | player.play(*safe))
    if key is not None:
        # All nodes draw together, each cycle with a key of its own: both forms draw the same.
        p = board.all(f"p_{run}")
        draw = lambda k, p: sample_counts(jax.random.fold_in(k, run == "y"), p, shots)
        counts = draw(key, p) if p.ndim == 1 else jax.vmap(draw)(key, p)
        for g, _, group in concerned:
            board.put(g, here[group], {f"n_{run}": counts[..., group]})
    for g, player, group in concerned:
        board.put(g, here[group], {f"sent_{run}": player.sent(run, board.values[g], _own(shots, group))})


@eqx.filter_jit
def _in_sequence(
    network: Network, states, inputs, shots, key, keep: tuple[str, ...], checkpoint_cycles: int | None
) -> Trace:
    n, topology = network.graph.nodes, network.graph.topology
    edges, players = couplings(network.graph), [Player(device) for device in network.devices]
    to_input, to_memory = ([e for e in edges if e.kind == kind] for kind in ("input", "memory"))
    ranks = topology.step_ranks

    def buffer(kind: str, carries: str) -> Array:
        longest = max((e.delay_cycles for e in edges if (e.kind, e.carries) == (kind, carries)), default=0)
        return jnp.full((longest, n), HISTORY if kind == "memory" else 0.0)

    past = {group: buffer(*group) for group in (("input", "y"), ("memory", "x"), ("memory", "y"))}

    def cycle(carry, now):
        (states, past), (drive, key) = carry, now
        held = [d.memory.read(s) for d, s in zip(network.devices, states, strict=True)]
        r = within_rounding(held[0] if len(held) == 1 else jnp.concatenate(held), _ROUNDING)
        for edge in to_input:
            if edge.delay_cycles > 0:
                drive = drive + edge(past["input", "y"][edge.delay_cycles - 1])
        board = _Board(network, ())
        for rank in range(int(ranks.max()) + 1):
            x_set = drive
            for edge in to_input:
                if edge.delay_cycles == 0 and rank > 0:
                    x_set = x_set + edge(board.all("sent_y"))
            x_set = within_rounding(x_set, _ROUNDING)
            _evaluate(board, players, ranks == rank, x_set, None, shots, key)
            _evaluate(board, players, ranks == rank, x_set, r, shots, key)
        sent = {output: board.all(f"sent_{output}") for output in CARRIED}
        fed = sent["x"]
        if to_memory:
            at = lambda e: sent[e.carries] if e.delay_cycles == 0 else past["memory", e.carries][e.delay_cycles - 1]
            total = sum(edge(at(edge)) for edge in to_memory)
            fed = jnp.where(topology.has_memory_edges, within_rounding(total, _ROUNDING), fed)
        states = tuple(
            d.memory.update(s, m) for d, s, m in zip(network.devices, states, _split(fed, network), strict=True)
        )
        # The newest first; a buffer of no rows stays empty.
        past = {k: jnp.concatenate([sent[k[1]][None], rows])[: rows.shape[0]] for k, rows in past.items()}
        return (states, past), {name: board.all(name) for name in _asked(keep, shots)}

    drive = network.commands(inputs)
    keys = None if key is None else jax.random.split(key, drive.shape[0])
    return _trace(_scanned(cycle, (states, past), (drive, keys), checkpoint_cycles))


def _scanned(cycle, start, rows, checkpoint_cycles: int | None) -> dict[str, Array]:
    """What a scan writes, its states stored every `checkpoint_cycles` for derivatives."""
    if checkpoint_cycles is None:
        return jax.lax.scan(cycle, start, rows)[1]
    steps = rows[0].shape[0]
    many = steps // checkpoint_cycles
    whole = many * checkpoint_cycles
    stretch = jax.checkpoint(lambda carry, now: jax.lax.scan(cycle, carry, now))
    cut = jax.tree.map(lambda a: a[:whole].reshape(many, checkpoint_cycles, *a.shape[1:]), rows)
    carry, known = jax.lax.scan(stretch, start, cut)
    _, rest = jax.lax.scan(cycle, carry, jax.tree.map(lambda a: a[whole:], rows))
    side_by_side = lambda a, b: jnp.concatenate([a.reshape(whole, *a.shape[2:]), b])
    return jax.tree.map(side_by_side, known, rest)


@eqx.filter_jit
def _all_at_once(network: Network, inputs, shots, key, keep: tuple[str, ...]) -> Trace:
    topology = network.graph.topology
    edges, players = couplings(network.graph), [Player(device) for device in network.devices]
    to_input, to_memory = ([e for e in edges if e.kind == kind] for kind in ("input", "memory"))
    drive = network.commands(inputs)
    steps = drive.shape[0]
    keys = None if key is None else jax.random.split(key, steps)
    assert topology.order is not None
    rank_x, rank_y = topology.order
    board = _Board(network, (steps,))

    def later(edge: Coupling, before: float) -> Array:
        """What an edge brings in every cycle."""
        sent = board.all(f"sent_{edge.carries}")
        delay = min(edge.delay_cycles, steps)
        return edge(jnp.concatenate([jnp.full((delay, sent.shape[1]), before), sent[: steps - delay]]))

    for rank in range(int(rank_y.max()) + 1):
        if (rank_x == rank).any():
            x_set = within_rounding(drive + sum(later(e, 0.0) for e in to_input), _ROUNDING)
            _evaluate(board, players, rank_x == rank, x_set, None, shots, keys)
        if (rank_y == rank).any():
            fed = board.all("sent_x")
            if to_memory:
                total = within_rounding(sum(later(e, HISTORY) for e in to_memory), _ROUNDING)
                fed = jnp.where(topology.has_memory_edges, total, fed)
            held = [d.memory.filter(m) for d, m in zip(network.devices, _split(fed, network), strict=True)]
            r = within_rounding(jnp.concatenate(held, axis=-1), _ROUNDING)
            _evaluate(board, players, rank_y == rank, board.all("x_set"), r, shots, keys)
    return _trace({name: board.all(name) for name in _asked(keep, shots)})


def _asked(keep: tuple[str, ...], shots) -> tuple[str, ...]:
    return keep if shots is None else (*keep, "n_x", "n_y")

"""Directed graphs of memristors: which output reaches which input or memory, with what weight and how much later.

Edges are arrays. Where they lead is known when a program is compiled, their weights are numbers like any other.
"""

import functools
import math
import numbers
from graphlib import CycleError, TopologicalSorter

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twin.batching import check_values, physical, real_array

KINDS = ("input", "memory")
CARRIED = ("x", "y")


class Topology:
    """Where edges lead: fixed when a program is compiled, compared by content.

    Attributes:
        nodes: number of nodes.
        source, target, delay_cycles: integers, shape (edges,).
        kind: places in `KINDS`; carries: places in `CARRIED`; shape (edges,).
    """

    def __init__(self, nodes: int, source, target, delay_cycles, kind, carries):
        self.nodes = nodes
        self.source, self.target, self.delay_cycles, self.kind, self.carries = (
            np.asarray(a, np.int64) for a in (source, target, delay_cycles, kind, carries)
        )
        self._content = (nodes, *(a.tobytes() for a in (self.source, self.target, self.delay_cycles)))
        self._content += (self.kind.tobytes(), self.carries.tobytes())
        self._hash = hash(self._content)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other) -> bool:
        return isinstance(other, Topology) and (self is other or self._content == other._content)

    def __repr__(self) -> str:
        return f"Topology({self.nodes} nodes, {self.source.size} edges)"

    @functools.cached_property
    def edge_groups(self) -> tuple[tuple[str, str, int, np.ndarray], ...]:
        """(kind, carried output, delay, places of the edges) of each sort of edge that occurs."""
        found = {}
        keys = zip(self.kind.tolist(), self.carries.tolist(), self.delay_cycles.tolist(), strict=True)
        for place, key in enumerate(keys):
            found.setdefault(key, []).append(place)
        return tuple((KINDS[k], CARRIED[o], d, np.array(places)) for (k, o, d), places in sorted(found.items()))

    @functools.cached_property
    def has_memory_edges(self) -> np.ndarray:
        """Nodes whose memory is fed by edges, their own perhaps, in place of the input x; shape (nodes,)."""
        named = np.zeros(self.nodes, bool)
        named[self.target[self.kind == KINDS.index("memory")]] = True
        return named

    @functools.cached_property
    def step_ranks(self) -> np.ndarray:
        """Place of each node in the order of a cycle: zero-delay edges on the longest way to it, shape (nodes,)."""
        now = (self.kind == KINDS.index("input")) & (self.delay_cycles == 0)
        pairs = list(zip(self.source[now].tolist(), self.target[now].tolist(), strict=True))
        ranks = _ranks(self.nodes, pairs)
        if ranks is None:
            raise ValueError(
                "input edges with `delay_cycles` 0 form an algebraic loop: an output would reach its own input within "
                "the same cycle. Give one of them a delay of at least 1."
            )
        return ranks

    @functools.cached_property
    def order(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Ranks of all x and of all y, each over the whole record, shapes (nodes,); None where one needs itself."""
        n, pairs = self.nodes, []
        x, y = np.arange(n), n + np.arange(n)
        pairs += list(zip(x.tolist(), y.tolist(), strict=True))
        for kind, carries, _, places in self.edge_groups:
            start = self.source[places] + (n if carries == "y" else 0)
            end = self.target[places] + (n if kind == "memory" else 0)
            pairs += list(zip(start.tolist(), end.tolist(), strict=True))
        ranks = _ranks(2 * n, pairs)
        return None if ranks is None else (ranks[:n], ranks[n:])


def _ranks(vertices: int, pairs: list[tuple[int, int]]) -> np.ndarray | None:
    """Length of the longest way to each vertex; None where there is a cycle of edges."""
    before = {v: set() for v in range(vertices)}
    for start, end in pairs:
        before[end].add(start)
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError:
        return None
    ranks = np.zeros(vertices, int)
    for vertex in order:
        ranks[vertex] = max((ranks[b] + 1 for b in before[vertex]), default=0)
    return ranks


class Graph(eqx.Module):
    """Edges between nodes; make it with `Graph.from_edges` or a helper, and add graphs to join their edges.

    Attributes:
        topology: where the edges lead.
        weight: shape (edges,).
    """

    topology: Topology = eqx.field(static=True)
    weight: Float[Array, " edges"] = physical(None)

    def __check_init__(self):
        check_values("weight", self.weight, np.isfinite, "finite", "leave out the edges that carry nothing")

    @classmethod
    def from_edges(
        cls, nodes: int, source=(), target=(), weight=1.0, *, delay_cycles=None, kind: str = "input", carries: str = ""
    ) -> "Graph":
        """Edges of one kind.

        Args:
            nodes: number of nodes.
            source, target: nodes at the ends of each edge, shape (edges,).
            weight: shape (edges,), or one number for all.
            delay_cycles: whole cycles from source to target, shape (edges,) or one number. An input edge has 1 by
                default; 0 acts within the cycle. A memory edge has 0: the cycle enters the memory as it ends.
            kind: "input" adds `weight` times the output of the source to the commanded input of the target; "memory"
                adds `weight` times what the source sends to what enters the target's memory.
            carries: what a memory edge sends, "x" (default) or "y" of the source. An input edge sends y.

        Raises:
            ValueError: no nodes; an unknown kind or `carries`; nodes or delays that are out of range; weights that are
                not finite where known, or not as many as the edges; input edges without delay that form an algebraic
                loop.
        """
        _check_nodes(nodes)
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {KINDS}, but is {kind!r}; see `Graph.from_edges`.")
        carries = carries or ("y" if kind == "input" else "x")
        if carries not in CARRIED or (kind == "input" and carries != "y"):
            raise ValueError(f"`carries` must be 'x' or 'y' for memory edges, 'y' for input edges, but is {carries!r}.")
        delay_cycles = (1 if kind == "input" else 0) if delay_cycles is None else delay_cycles
        source, target, delays = np.broadcast_arrays(source, target, delay_cycles)
        source, target, delays = (np.atleast_1d(a) for a in (source, target, delays))
        source, target, delays = (a[:0] if np.size(source) == 0 else a for a in (source, target, delays))
        for name, values, low, high in (
            ("source", source, 0, nodes),
            ("target", target, 0, nodes),
            ("delay_cycles", delays, 0, math.inf),
        ):
            bad = ~((values >= low) & (values < high) & (values == np.floor(values)))
            if np.any(bad):
                raise ValueError(
                    f"`{name}` must hold whole numbers from {low} to below {high}, but has {values[bad].flat[0]}; "
                    f"this graph has {nodes} nodes."
                )
        like = np.ones(source.shape, int)
        topology = Topology(nodes, source, target, delays, KINDS.index(kind) * like, CARRIED.index(carries) * like)
        _ = topology.step_ranks  # refuses algebraic loops
        weight = real_array(weight)
        if weight.shape not in ((), source.shape):
            raise ValueError(
                f"`weight` must be one number or one for each of {source.size} edges, but has shape {weight.shape}."
            )
        return cls(topology, jnp.broadcast_to(weight, source.shape))

    def __add__(self, other: "Graph") -> "Graph":
        """The edges of both."""
        a, b = self.topology, other.topology
        if a.nodes != b.nodes:
            raise ValueError(f"graphs with {a.nodes} and {b.nodes} nodes cannot be joined; give both the same `nodes`.")
        fields = ("source", "target", "delay_cycles", "kind", "carries")
        topology = Topology(a.nodes, *(np.concatenate([getattr(a, f), getattr(b, f)]) for f in fields))
        _ = topology.step_ranks
        return Graph(topology, jnp.concatenate([self.weight, other.weight]))

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.topology.nodes


def _check_nodes(nodes: int) -> None:
    if not isinstance(nodes, numbers.Integral) or nodes < 1:
        raise ValueError(f"`nodes` of a graph must be a whole number of at least 1, but is {nodes!r}.")


def uncoupled(nodes: int) -> Graph:
    """No edges."""
    return Graph.from_edges(nodes)


def ring(nodes: int, weight=1.0, **more) -> Graph:
    """Node i reaches node i + 1, the last one the first.

    `**more`: `delay_cycles`, `kind` and `carries` of `Graph.from_edges`.
    """
    i = np.arange(nodes)
    return Graph.from_edges(nodes, i, (i + 1) % nodes, weight, **more)


def all_to_all(nodes: int, weight=1.0, **more) -> Graph:
    """Each node reaches all others; weights of shape (edges,) go source by source.

    `**more`: `delay_cycles`, `kind` and `carries` of `Graph.from_edges`.
    """
    _check_nodes(nodes)
    source, target = np.nonzero(~np.eye(nodes, dtype=bool))
    return Graph.from_edges(nodes, source, target, weight, **more)


def cascade(nodes: int, weight=1.0, *, delay_cycles=0, **more) -> Graph:
    """Node i reaches node i + 1, within the cycle by default. `**more`: `kind` and `carries` of `Graph.from_edges`."""
    i = np.arange(nodes - 1)
    return Graph.from_edges(nodes, i, i + 1, weight, delay_cycles=delay_cycles, **more)


def nearest_neighbours(nodes: int, weight=1.0, **more) -> Graph:
    """Neighbours in a line reach each other. `**more`: `delay_cycles`, `kind` and `carries` of `Graph.from_edges`."""
    i = np.arange(nodes - 1)
    return Graph.from_edges(nodes, np.concatenate([i, i + 1]), np.concatenate([i + 1, i]), weight, **more)


def self_edges(nodes: int, weight=1.0, **more) -> Graph:
    """Each node reaches itself. `**more`: `delay_cycles`, `kind` and `carries` of `Graph.from_edges`."""
    return Graph.from_edges(nodes, np.arange(nodes), np.arange(nodes), weight, **more)


def random_sparse(nodes: int, degree: int, weight=1.0, *, seed: int, **more) -> Graph:
    """Each node is reached by `degree` others, drawn without repetition.

    `**more`: `delay_cycles`, `kind` and `carries` of `Graph.from_edges`.

    Raises:
        ValueError: a degree below 1, or above the number of other nodes.
    """
    if not 1 <= degree < nodes:
        raise ValueError(f"`degree` must be from 1 to {nodes - 1} other nodes, but is {degree}.")
    rng = np.random.default_rng(seed)
    others = [rng.choice(nodes - 1, degree, replace=False) for _ in range(nodes)]
    source = np.concatenate([np.where(o >= i, o + 1, o) for i, o in enumerate(others)])
    return Graph.from_edges(nodes, source, np.repeat(np.arange(nodes), degree), weight, **more)


def crossed(weight=1.0) -> Graph:
    """Two nodes, each of which remembers the inputs of the other."""
    return Graph.from_edges(2, [0, 1], [1, 0], weight, kind="memory")


def shared_memory(nodes: int, own, neighbours) -> Graph:
    """A ring in which each node remembers `own` times its input plus `neighbours` times that of the two beside it.

    Transfers stay in [0, 1] where own + 2 neighbours = 1 and both are not negative.
    """
    i = np.arange(nodes)
    beside = np.concatenate([(i + 1) % nodes, (i - 1) % nodes])
    around = Graph.from_edges(nodes, np.concatenate([i, i]), beside, neighbours, kind="memory")
    return self_edges(nodes, own, kind="memory") + around

"""Edges at work: weighted sums over what nodes send, now or some cycles ago."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twin.graph import Graph

# Above this share of all pairs a full matrix is faster than a gather.
_DENSE = 0.25


class Coupling(eqx.Module):
    """Edges of one kind and delay, ready to be summed.

    Attributes:
        kind, carries, delay_cycles: of all its edges.
        sources: node that each place sums, shape (nodes, most edges to a node); `nodes` where there is none. None for a
            full matrix.
        weight: shape (nodes, most edges to a node), or the matrix (to, from).
        reached: pairs joined by an edge, shape (to, from), for a full matrix.
    """

    kind: str = eqx.field(static=True)
    carries: str = eqx.field(static=True)
    delay_cycles: int = eqx.field(static=True)
    sources: Array | None
    weight: Float[Array, "nodes places"]
    reached: Array | None

    def __call__(self, sent: Float[Array, "... nodes"]) -> Float[Array, "... nodes"]:
        """Sum over the edges of what their sources sent; NaN reaches those nodes alone to which an edge leads."""
        if self.reached is not None:
            reached, bad = self.reached.T, jnp.isnan(sent)
            total = jnp.where(bad, 0.0, sent) @ self.weight.T
            # A matrix would carry one NaN to all nodes; most of the time there is none, and nothing to sort out.
            spoilt = lambda: bad.astype(sent.dtype) @ reached > 0
            return jnp.where(jax.lax.cond(jnp.any(bad), spoilt, lambda: jnp.zeros(total.shape, bool)), jnp.nan, total)
        padded = jnp.concatenate([sent, jnp.zeros_like(sent[..., :1])], axis=-1)
        return jnp.sum(self.weight * padded[..., self.sources], axis=-1)


def couplings(graph: Graph) -> tuple[Coupling, ...]:
    """One coupling for each sort of edge of the graph."""
    topology, made = graph.topology, []
    n = topology.nodes
    for kind, carries, delay, places in topology.edge_groups:
        source, target, weight = topology.source[places], topology.target[places], graph.weight[places]
        if places.size > _DENSE * n**2 and n > 2:
            matrix = jnp.zeros((n, n)).at[target, source].add(weight)
            reached = np.zeros((n, n))
            reached[target, source] = 1.0
            made.append(Coupling(kind, carries, delay, None, matrix, jnp.asarray(reached)))
            continue
        # Place of each edge among those that lead to the same node.
        order = np.argsort(target, kind="stable")
        counts = np.bincount(target, minlength=n)
        column = np.empty(places.size, int)
        column[order] = np.arange(places.size) - np.repeat(np.cumsum(counts) - counts, counts)
        sources = np.full((n, counts.max()), n)
        sources[target, column] = source
        padded = jnp.zeros(sources.shape).at[target, column].set(weight)
        made.append(Coupling(kind, carries, delay, jnp.asarray(sources), padded, None))
    return tuple(made)

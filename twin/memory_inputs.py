"""Whose inputs a memory averages, for two memristors side by side."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twin.batching import is_traced, real_array

# Row: whose memory; column: whose input enters it.
OWN = ((1.0, 0.0), (0.0, 1.0))
CROSSED = ((0.0, 1.0), (1.0, 0.0))


def checked_memory_inputs(memory_inputs) -> Float[Array, "2 2"]:
    """Weights of the two inputs in each of the two memories, checked.

    Args:
        memory_inputs: `OWN`, `CROSSED`, or any 2 by 2 numbers that are not negative and whose rows sum to one, so that
            a mean of inputs stays in [0, 1].

    Raises:
        ValueError: another shape, or rows that are no averages.
    """
    weights = real_array(memory_inputs)
    if weights.shape != (2, 2):
        raise ValueError(
            f"`memory_inputs` must be 2 by 2, memory by input, but has shape {weights.shape}; OWN is one of them."
        )
    if not is_traced(weights):
        known = np.asarray(weights)
        if not np.all(known >= 0) or not np.allclose(known.sum(axis=1), 1.0, atol=1e-12, rtol=0):
            raise ValueError(
                "each row of `memory_inputs` must average inputs, not negative and with sum one, but they are "
                f"{known.tolist()}; divide each row by its sum."
            )
    return weights


def into_memories(weights: Float[Array, "2 2"], x: Float[Array, "2 ..."]) -> Float[Array, "2 ..."]:
    """What enters the two memories, for the inputs of the two memristors; NaN only where a weight is not zero."""

    def share(weight, own):
        return weight * jnp.where((weight == 0) & jnp.isnan(own), 0.0, own)

    return jnp.stack([share(row[0], x[0]) + share(row[1], x[1]) for row in weights])

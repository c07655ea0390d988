"""The photonic quantum memristor, whose parameters read like those of the ion."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from twin.batching import physical
from twin.closed_form import flat_root
from twin.loop import AbstractMemristor, Responder, Response, Settings
from twin.memory import AbstractMemory
from twin.readout import assignment_probability


class PhotonicMemristor(AbstractMemristor):
    """The photonic quantum memristor: amplitude damping of a single-rail state by a tunable beam splitter, with loss.

        n_out = (1 - loss) (1 - R) n_in,        rho_01 -> sqrt((1 - loss) (1 - R)) rho_01

    Levels: v = vacuum in the output mode, s = one photon there, m = the photon in the feedback detector. A lost photon
    counts as vacuum.

    Args:
        memory, source: as for every memristor.
        loss: probability that a photon is lost between beam splitter and output detector, in [0, 1].
        readout_error_bright: probability of a click without a photon ("bright" stands for no photon: not s).
        readout_error_dark: probability of no click with one.

    References: PHYSICS conventions of the single-rail map, K_0 = diag(1, sqrt(1-R)), K_1 = sqrt(R) |0><1|.
    """

    memory: AbstractMemory
    source: str = eqx.field(static=True, default="measured")
    loss: Float[Array, "..."] = physical(default=0.0)
    readout_error_bright: Float[Array, "..."] = physical(default=0.0)
    readout_error_dark: Float[Array, "..."] = physical(default=0.0)

    def prepared(self, x_set, settings: Settings) -> "PhotonicMemristor":
        del x_set, settings
        return self

    def under(self, settings: Settings) -> Responder:
        del settings  # a beam splitter has no line
        return self._respond

    def _respond(self, x_set, r_set, *, alone, of_cycle=None) -> Response:
        del of_cycle
        r_set = jnp.where(alone, 0.0, r_set)
        kept = (1 - jnp.where(alone, 0.0, self.loss)) * (1 - r_set)
        s, m = kept * x_set, r_set * x_set
        coherence = flat_root(kept * x_set * (1 - x_set))
        valid = (x_set >= 0) & (x_set <= 1) & (r_set >= 0) & (r_set <= 1)
        populations = jnp.where(valid, jnp.stack([1 - s - m, s, m]), jnp.nan)
        return Response(
            populations,
            jnp.stack([coherence, jnp.zeros_like(coherence)]),
            valid,
            jnp.zeros_like(s),
            "closed form",
        )

    def signal(self, populations) -> Float[Array, "..."]:
        return populations[1]

    def assigned(self, populations) -> Float[Array, "..."]:
        return assignment_probability(populations[1], self.readout_error_bright, self.readout_error_dark)

    def assigned_next(self, populations) -> Float[Array, "..."]:
        # The feedback detector clicks for m; a photon is in one of the two arms only.
        bright, dark = self.readout_error_bright, self.readout_error_dark
        v, s, m = populations
        return (1 - bright) * ((1 - dark) * m + bright * v) + dark * bright * s

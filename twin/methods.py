"""Methods, and what each promises: `evolve` takes one of those that integrate."""

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float

from twin.batching import check_values, physical


class StaticGrid(eqx.Module):
    """Eighth-order steps on a static grid.

    Args:
        error: largest population error aimed at; lanes that need more steps than there are become NaN and are flagged.
        steps: length of the compiled program. None lays it from the values at hand, which must then be known (outside
            `jit`); give a number (`twin.grid.plan_steps` over the largest values) where they are traced.
        finest: the error for which `steps` were laid, if `error` is larger: then only a share of them is walked, and
            `error` may change without compiling again.
        differentiation: "reverse" for `jax.grad` (one state a step is kept, stages are recomputed), "forward" for
            `jax.jvp` and `jax.jacfwd`.
        shared: whether lanes along the first batch axis share one grid, the hungriest lane's. They must share window
            and save times. Worth it where they share pulse shapes as well, which are then computed once.
    """

    error: Float[Array, ""] = physical(default=1e-8)
    steps: int | None = eqx.field(static=True, default=None)
    finest: float | None = eqx.field(static=True, default=None)
    differentiation: str = eqx.field(static=True, default="reverse")
    shared: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        within = "between 1e-13 and 1e-3"
        check_values("error", self.error, lambda v: (v >= 1e-13) & (v <= 1e-3), within, "the default is 1e-8")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, but is {self.steps}; None lays the number from the pulses.")
        if self.differentiation not in ("reverse", "forward"):
            raise ValueError(
                "`differentiation` must be 'reverse' (jax.grad) or 'forward' (jax.jvp), "
                f"but is {self.differentiation!r}."
            )


class Magnus(eqx.Module):
    """Commutator-free Magnus steps of fourth order: see `twin.magnus`. Differentiable in both modes.

    Args:
        error: largest population error aimed at, between 1e-10 and 1e-6; a lane that needs shorter steps is flagged.
        steps: steps in each interval between saves (one number for all, or one each), or up to the end without saves.
            None lays them from the values at hand, which must then be known (outside `jit`).
        precision: "double", or "single": 32-bit numbers throughout, whose rounding adds 1e-6 to 1e-5 to any `error`.
    """

    error: Float[Array, ""] = physical(default=1e-6)
    steps: int | tuple[int, ...] | None = eqx.field(static=True, default=None)
    precision: str = eqx.field(static=True, default="double")

    def __check_init__(self):
        within = "between 1e-10 and 1e-6"
        check_values("error", self.error, lambda v: (v >= 1e-10) & (v <= 1e-6), within, "the default is 1e-6")
        if self.steps is not None and np.min(self.steps) < 1:
            raise ValueError(f"`steps` must be at least 1, but is {self.steps}; None lays the number from the pulses.")
        if self.precision not in ("double", "single"):
            raise ValueError(f"`precision` must be 'double' or 'single', but is {self.precision!r}.")


class Adaptive(eqx.Module):
    """Diffrax with error control and knots at the pulses, lane by lane: the reference.

    Args:
        rtol, atol: tolerances of a step; the error of a solution is some ten times larger.
        stiff: Kvaerno5 in place of Dopri8, for rates far above the Rabi frequencies.
        max_steps: a lane that needs more is flagged and NaN.
    """

    rtol: float = eqx.field(static=True, default=1e-12)
    atol: float = eqx.field(static=True, default=1e-13)
    stiff: bool = eqx.field(static=True, default=False)
    max_steps: int = eqx.field(static=True, default=16384)


class ClosedForm(eqx.Module):
    """Resonant pulses far apart in time, no decay and no dephasing: exact there, wrong elsewhere.

    Motion and readout are kept; detunings, overlap, decay and linewidth are ignored (`closed_form_error` bounds them).
    """

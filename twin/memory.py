"""Feedback kernels: the transfer of each cycle from the inputs of the cycles before it."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

# Mean input before the first cycle. Kernels work on x - 1/2, for which that history is zero and needs no storage.
HISTORY = 0.5


def _as_float(value) -> Array:
    return jnp.asarray(value, dtype=float)


def _require_at_least_one_cycle(name: str, value: Array) -> None:
    """Refuse a bad window where its value is known; a traced one becomes NaN in its own lane where it is used."""
    if isinstance(value, Tracer):
        return
    bad = ~(np.isfinite(value) & (np.asarray(value) >= 1.0))
    if bad.any():
        raise ValueError(
            f"`{name}` must be finite and at least one cycle, but is {np.asarray(value)[bad].flat[0]:g}. "
            "It counts previous cycles, the current one excluded: divide a time in seconds by the cycle time."
        )


def _cycles_held(windows: Array) -> int:
    """Inputs that the longest of known windows holds: floor(T) + 1, the last for the derivative where T is whole."""
    return int(np.floor(np.max(np.asarray(windows)))) + 1


def _lagged(u: Float[Array, "cycles *batch"], index: Int[Array, "cycles *lanes"]) -> Float[Array, "cycles *batch"]:
    """Rows of u by index, zero for the rows before the first."""
    return jnp.where(index >= 0, jnp.take_along_axis(u, jnp.maximum(index, 0), axis=0), 0.0)


def _sum_of_previous(u: Float[Array, "cycles *batch"], count: Int[Array, "*lanes"]) -> Float[Array, "cycles *batch"]:
    """Sum of the `count` rows before each row.

    A difference of cumulative sums, taken by doubling: sums of 1, 2, 4, ... rows are added where the binary digits of
    `count` ask for them. A plain cumulative sum over a long record loses digits in that difference, and carries one
    NaN to every later cycle; this one adds only the rows inside the window.
    """
    cycles = u.shape[0]
    row = jnp.arange(cycles).reshape(-1, *(1,) * (u.ndim - 1))

    def add_block(carry, bit):
        total, behind, block = carry
        digit = (count >> bit) & 1
        total = total + jnp.where(digit == 1, _lagged(block, row - 1 - behind), 0.0)
        return (total, behind + (digit << bit), block + _lagged(block, row - (1 << bit))), None

    start = (jnp.zeros_like(u), jnp.zeros_like(count), u)  # block[k] is the sum of the 2^bit rows ending at k
    (total, _, _), _ = jax.lax.scan(add_block, start, jnp.arange(cycles.bit_length()))
    return total


class AbstractMemory(eqx.Module):
    """Causal feedback kernel: r_k from the inputs x_0 ... x_{k-1}, with a history of 1/2 before the first.

    The current input is excluded, as a controller has to set pulse 2 before it knows the outcome of the cycle. `filter`
    gives all cycles at once; `init`, `read`, `update` give the same numbers one cycle at a time.
    """

    @abc.abstractmethod
    def filter(self, x: Float[Array, "cycles *batch"]) -> Float[Array, "cycles *batch"]:
        """Transfer of every cycle from the inputs of all cycles.

        Args:
            x: input of each cycle, in [0, 1], shape (cycles, *batch).

        Returns:
            r of each cycle, in [0, 1] if x is; same shape.
        """

    @abc.abstractmethod
    def init(self, shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """State before the first cycle, for inputs of the given shape."""

    @abc.abstractmethod
    def read(self, state: Float[Array, "..."]) -> Float[Array, "..."]:
        """Transfer r of the coming cycle."""

    @abc.abstractmethod
    def update(self, state: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
        """State after a cycle of input x."""


class MovingAverage(AbstractMemory):
    """Mean of the previous T inputs, T fractional.

        r_k = (1/T) sum_j w_j x_{k-j},    w_j = 1 for j <= T,  T - (j - 1) for j - 1 <= T < j,  0 beyond

    which is the cumulative sum of x, linearly interpolated, at k minus at k - T, so that
    dr_k/dT = (x_{k-1-floor(T)} - r_k)/T exists. It jumps where T is an integer: there the derivative given is the
    *right* one, in both forms.

    Args:
        window_cycles: T >= 1 in cycles, scalar or broadcastable to the batch shape of the inputs.
        capacity: static length in cycles of the streaming buffer, at least floor(T) + 1, which is the default. Needed
            where a traced window is streamed; windows streamed with one `capacity` share a compiled program.

    Raises:
        ValueError: a window below one cycle or not finite, or a capacity too short for it. A traced window that is
            bad, or too long for its buffer, gives NaN in its lane.
    """

    window_cycles: Float[Array, "*window"] = eqx.field(converter=_as_float)
    capacity: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        _require_at_least_one_cycle("window_cycles", self.window_cycles)
        if self.capacity is not None and not isinstance(self.window_cycles, Tracer):
            needed = _cycles_held(self.window_cycles)
            if self.capacity < needed:
                raise ValueError(
                    f"`capacity` must be at least {needed} cycles for this window, but is {self.capacity}."
                )

    def _whole_and_part(self) -> tuple[Float[Array, "*window"], Float[Array, "*window"]]:
        # floor has derivative zero, so dT flows through the fraction alone: the right derivative at integers.
        whole = jnp.floor(self.window_cycles)
        return whole, self.window_cycles - whole

    def _average(
        self, total: Float[Array, "*batch"], fits: Bool[Array, "*window"] | bool = True
    ) -> Float[Array, "*batch"]:
        valid = jnp.isfinite(self.window_cycles) & (self.window_cycles >= 1.0) & fits
        return jnp.where(valid, HISTORY + total / self.window_cycles, jnp.nan)

    def filter(self, x: Float[Array, "cycles *batch"]) -> Float[Array, "cycles *batch"]:
        window, batch = self.window_cycles.shape, x.shape[1:]
        if np.broadcast_shapes(window, batch) != batch:
            raise ValueError(f"`window_cycles` of shape {window} does not broadcast to the batch shape {batch} of `x`.")
        whole, part = self._whole_and_part()
        # Windows longer than the record reach into the history only; the bound keeps the count an integer.
        count = jnp.minimum(whole, x.shape[0]).astype(int)
        u = x - HISTORY
        oldest = jnp.arange(x.shape[0]).reshape(-1, *(1,) * len(batch)) - 1 - count
        return self._average(_sum_of_previous(u, count) + part * _lagged(u, oldest))

    @property
    def buffer_cycles(self) -> int:
        """Length of the streaming buffer: `capacity`, or what the window needs.

        Raises:
            ValueError: a traced window without a `capacity`.
        """
        if self.capacity is not None:
            return self.capacity
        if isinstance(self.window_cycles, Tracer):
            raise ValueError(
                "`capacity` must be given to stream a traced `window_cycles`: the length of the buffer is static. "
                "Build MovingAverage(window_cycles, capacity=longest window in cycles + 1)."
            )
        return _cycles_held(self.window_cycles)

    def init(self, shape: tuple[int, ...] = ()) -> Float[Array, "capacity *batch"]:
        return jnp.zeros((self.buffer_cycles, *shape), self.window_cycles.dtype)

    def read(self, state: Float[Array, "capacity *batch"]) -> Float[Array, "*batch"]:
        whole, part = self._whole_and_part()
        lag = jnp.arange(1, state.shape[0] + 1).reshape(-1, *(1,) * (state.ndim - 1))
        inside = jnp.where(lag <= whole, state, jnp.where(lag == whole + 1, part * state, 0.0))
        return self._average(inside.sum(axis=0), whole + 1 <= state.shape[0])

    def update(
        self, state: Float[Array, "capacity *batch"], x: Float[Array, "*batch"]
    ) -> Float[Array, "capacity *batch"]:
        return jnp.concatenate([(x - HISTORY)[None], state[:-1]])


class Exponential(AbstractMemory):
    """Exponential forgetting, r_{k+1} = r_k + (x_k - r_k)/tau, r_0 = 1/2.

    Args:
        tau_cycles: tau >= 1 in cycles, scalar or broadcastable to the batch shape of the inputs; tau = 1 remembers
            the previous input alone.

    Raises:
        ValueError: tau below one cycle or not finite. A traced one that is bad gives NaN in its lane.

    References:
        [1] Selimovic et al., arXiv:2504.18694 (2025), as reproduced in the MerLin project.
    """

    tau_cycles: Float[Array, "*window"] = eqx.field(converter=_as_float)

    def __check_init__(self):
        _require_at_least_one_cycle("tau_cycles", self.tau_cycles)

    def _checked(self, r: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        return jnp.where(jnp.isfinite(self.tau_cycles) & (self.tau_cycles >= 1.0), r, jnp.nan)

    def filter(self, x: Float[Array, "cycles *batch"]) -> Float[Array, "cycles *batch"]:
        gain = 1.0 / self.tau_cycles
        row = jnp.arange(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1))

        def double(carry, bit):
            after, decay = carry
            return (after + decay * _lagged(after, row - (1 << bit)), decay**2), None

        # `after` holds the sum over the last 1, 2, 4, ... inputs, weighted with (1 - gain)^lag.
        start = (gain * (x - HISTORY), 1.0 - gain)
        (after, _), _ = jax.lax.scan(double, start, jnp.arange(x.shape[0].bit_length()))
        before = _lagged(after, row - 1)
        return self._checked(HISTORY + before)

    def init(self, shape: tuple[int, ...] = ()) -> Float[Array, "*batch"]:
        return jnp.full(shape, HISTORY, self.tau_cycles.dtype)

    def read(self, state: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        return self._checked(state)

    def update(self, state: Float[Array, "*batch"], x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        return state + (x - state) / self.tau_cycles

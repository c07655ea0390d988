"""The memristor contract: a device turns commanded inputs into a hysteresis loop.

In cycle k the controller commands an input `x_set[k]` and a transfer `r_set[k]`, the memory's mean of earlier inputs.
Input x is the population of s after pulse 1 alone, output y that after both pulses. The memory acts on *inputs*, so
all x are computed at once, then all r, then all y (`run`); `stream` does the same cycle by cycle, as a controller does.
"""

import abc
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from twin.batch import in_blocks
from twin.batching import Rows, batch_shape, is_traced, physical, real_array
from twin.closed_form import flat_root
from twin.memory import AbstractMemory
from twin.readout import check_shots, sample_counts

SOURCES = ("measured", "model", "command")
# Devices in a block of a large batch: larger blocks leave the cache, smaller ones wait for their loops.
_BLOCK = 16
# How far outside [0, 1] rounding of a solver may carry a population.
_ROUNDING = 1e-5


class Response(eqx.Module):
    """What one kind of run (pulse 1 alone, or both pulses) does to the ion, cycle by cycle.

    Attributes:
        populations: shape (levels, *cycles), order of the device's levels.
        coherence_vs: real and imaginary part of rho_vs, shape (2, *cycles).
        valid: shape (*cycles); invalid cycles are NaN.
        error_estimate: population error expected of the method, shape (*cycles).
        method: the method that ran: "closed form", "static grid (N steps)" or "adaptive".
    """

    populations: Float[Array, "levels ..."]
    coherence_vs: Float[Array, "2 ..."]
    valid: Bool[Array, "..."]
    error_estimate: Float[Array, "..."]
    method: str = eqx.field(static=True)


def averaged(response: Response, weights: Float[Array, "..."], axis: int = 1) -> Response:
    """The mean of a response over one of its batch axes; valid where all of them are.

    `axis` is that of the populations, 1 (the first) or -1 (the last).
    """
    mean = lambda values: jnp.sum(weights * values, axis=axis)
    own = axis - 1 if axis > 0 else axis
    return Response(
        mean(response.populations),
        mean(response.coherence_vs),
        # Weights are NaN where their average does not serve.
        jnp.all(response.valid, axis=own) & jnp.all(jnp.isfinite(weights), axis=0 if axis > 0 else -1),
        jnp.max(response.error_estimate, axis=own),
        response.method,
    )


class Settings(eqx.Module):
    """Known laser offsets, laser minus line, and which of them each cycle has.

    Args:
        detuning_1_hz, detuning_2_hz: shape (settings, *batch) with `of_cycle`; without, they broadcast to the cycles.
        of_cycle: the setting of each cycle, shape (cycles,).
    """

    detuning_1_hz: Float[Array, "..."] = physical(default=0.0)
    detuning_2_hz: Float[Array, "..."] = physical(default=0.0)
    of_cycle: Int[Array, " cycles"] | None = None

    @classmethod
    def of(cls, detuning_1_hz, detuning_2_hz, shape: tuple[int, ...]) -> "Settings":
        """Settings of cycles of this shape; known offsets that cycles share are listed once."""
        offsets = [real_array(d) for d in (detuning_1_hz, detuning_2_hz)]
        if all(d.ndim < max(1, len(shape)) for d in offsets):
            return cls(*offsets)
        if is_traced(offsets):
            return cls(*(jnp.broadcast_to(d, shape) for d in offsets), jnp.arange(shape[0]))
        rows = np.stack([np.broadcast_to(np.asarray(d), shape) for d in offsets], axis=1)
        distinct, of_cycle = np.unique(rows, axis=0, return_inverse=True)
        first, second = distinct[:, 0], distinct[:, 1]
        return cls(first[0], second[0]) if len(distinct) == 1 else cls(first, second, jnp.asarray(of_cycle.ravel()))

    @property
    def count(self) -> int:
        """Number of settings among which cycles are shared out."""
        return 1 if self.of_cycle is None else self.detuning_1_hz.shape[0]

    @property
    def largest_hz(self) -> float:
        """Largest magnitude of the offsets, Hz."""
        return max(float(jnp.max(jnp.abs(d))) for d in (self.detuning_1_hz, self.detuning_2_hz))

    def by_cycle(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Both offsets, cycle by cycle."""
        if self.of_cycle is None:
            return self.detuning_1_hz, self.detuning_2_hz
        return self.detuning_1_hz[self.of_cycle], self.detuning_2_hz[self.of_cycle]


@runtime_checkable
class Responder(Protocol):
    """Independent cycles of a device under its settings; of commands, or of pulse areas (`IonMemristor.by_area`).

    Where `alone`, pulse 1 is played alone and read out after it; else both pulses are. An array mixes both kinds of run
    in one batch. `of_cycle` replaces that of the settings.
    """

    def __call__(
        self,
        x_set: Float[Array, "..."],
        r_set: Float[Array, "..."],
        /,
        *,
        alone: bool | Bool[Array, "..."],
        of_cycle: Int[Array, " cycles"] | None = None,
    ) -> Response: ...


class AbstractMemristor(eqx.Module):
    """One contract for both platforms; `run` and `stream` are written against it.

    `memory` is the feedback kernel, `source` names the inputs it averages: "measured" (counts over shots, not corrected
    for readout errors; their expectation where nothing is sampled), "model" (populations) or "command" (`x_set`).
    """

    memory: eqx.AbstractVar[AbstractMemory]
    source: eqx.AbstractVar[str]

    @property
    def coupled(self) -> bool:
        """Whether devices along the batch axes influence each other, so that a batch must not be cut."""
        return False

    @property
    def unwrapped(self) -> "AbstractMemristor":
        """The device inside, of one that is made of another: the ion of a register, for example."""
        return self

    @property
    def lanes(self) -> int:
        """Number of devices side by side, over all batch axes."""
        return math.prod(batch_shape(self))

    @abc.abstractmethod
    def prepared(self, x_set, settings: Settings) -> "AbstractMemristor":
        """The device with everything decided that must be decided from values (method, grid); traced values pass."""

    @abc.abstractmethod
    def under(self, settings: Settings) -> Responder:
        """What answers cycles under these laser offsets; work that all of them share is done here, once."""

    def respond(
        self,
        x_set: Float[Array, "..."],
        r_set: Float[Array, "..."],
        detuning_1_set_hz: Float[Array, "..."],
        detuning_2_set_hz: Float[Array, "..."],
        *,
        alone: bool | Bool[Array, "..."],
    ) -> Response:
        """Independent cycles, each under its own laser offsets: see `Responder`."""
        return self.under(Settings(detuning_1_set_hz, detuning_2_set_hz))(x_set, r_set, alone=alone)

    @abc.abstractmethod
    def signal(self, populations: Float[Array, "levels ..."]) -> Float[Array, "..."]:
        """Population of s."""

    @abc.abstractmethod
    def assigned(self, populations: Float[Array, "levels ..."]) -> Float[Array, "..."]:
        """Probability that the readout assigns s."""

    @property
    def level_count(self) -> int:
        """Number of levels of `Response.populations`; v, s and m come first."""
        return 3 if self.unwrapped is self else self.unwrapped.level_count

    def assigned_of(self, signal: Float[Array, "..."]) -> Float[Array, "..."]:
        """Probability that the readout assigns s where the population of s is `signal`, and the rest is in v."""
        empty = [jnp.zeros_like(signal)] * (self.level_count - 2)
        return self.assigned(jnp.stack([1 - signal, signal, *empty]))

    def assigned_next(self, populations: Float[Array, "levels ..."]) -> Float[Array, "..."]:
        """Probability that a shot is not assigned to s, and then to m by a second detection."""
        raise NotImplementedError(f"{type(self).__name__} has no second detection stage.")


class Loop(eqx.Module):
    """One hysteresis loop, arrays of shape (cycles, *batch).

    Attributes:
        x_set, r: what was commanded; `r` is the recorded transfer, or the memory's.
        x, y: population of s after pulse 1 alone, and after both pulses.
        p_x, p_y: probability that a shot is assigned to s, in the two kinds of run.
        n_x, n_y: sampled counts (whole floats); None without shots.
        populations_1, populations_2: shape (levels, cycles, *batch), after pulse 1 alone, and after both.
        coherence, purity: l1 coherence and purity of the output state in {v, s} after incoherent repump of m to v.
            A leak level is not repumped: its population is missing from the trace.
        valid: cycles that were solved to the requested error; the others are NaN.
        error_estimate: population error expected of the method.
        method: the method that was chosen.
    """

    x_set: Float[Array, "cycles ..."]
    r: Float[Array, "cycles ..."]
    x: Float[Array, "cycles ..."]
    y: Float[Array, "cycles ..."]
    p_x: Float[Array, "cycles ..."]
    p_y: Float[Array, "cycles ..."]
    n_x: Float[Array, "cycles ..."] | None
    n_y: Float[Array, "cycles ..."] | None
    populations_1: Float[Array, "levels cycles ..."]
    populations_2: Float[Array, "levels cycles ..."]
    coherence: Float[Array, "cycles ..."]
    purity: Float[Array, "cycles ..."]
    valid: Bool[Array, "cycles ..."]
    error_estimate: Float[Array, "cycles ..."]
    method: str = eqx.field(static=True)


def run(
    device: AbstractMemristor,
    x_set,
    r_set=None,
    *,
    detuning_1_set_hz=0.0,
    detuning_2_set_hz=0.0,
    shots=None,
    key: PRNGKeyArray | None = None,
) -> Loop:
    """All cycles of a loop at once.

    Main arguments:
        device: an `IonMemristor` or `PhotonicMemristor`.
        x_set: commanded inputs in [0, 1], shape (cycles, *batch).
        r_set: recorded transfers in [0, 1], the same shape; None lets the device's memory supply them.

    Other arguments:
        detuning_1_set_hz, detuning_2_set_hz: known laser offsets, laser minus line, Hz; broadcast to the cycles.
        shots: repetitions of each setting, with `key`; None for expectation values.
        key: random key of the sampled counts.

    Returns:
        A `Loop`.

    Raises:
        ValueError: shots below 1, fractional, without a key, or a key without shots; an unknown memory source.

    Example:
        >>> device = IonMemristor(memory=MovingAverage(10.0), method=ClosedForm())
        >>> loop = run(device, sine_input(periods=3, cycles_per_period=40))
    """
    check_shots(shots, key)
    if device.source not in SOURCES:
        raise ValueError(f"the memory's `source` must be one of {SOURCES}, but is {device.source!r}.")
    x_set = real_array(x_set)
    settings = Settings.of(detuning_1_set_hz, detuning_2_set_hz, x_set.shape)
    r_set = None if r_set is None else jnp.broadcast_to(real_array(r_set), x_set.shape)
    shots = None if shots is None else real_array(shots)
    device = device.prepared(x_set, settings)
    shape = batch_shape(device, Rows(x_set))
    blocks = math.prod(shape) >= 2 * _BLOCK and key is None and settings.of_cycle is None and not device.coupled
    if blocks and not is_traced(device, x_set, r_set, settings) and jax.local_devices()[0].platform == "cpu":
        own: Any = jax.tree.map(lambda _: True, device)
        if hasattr(device, "method"):
            # The numbers of a method, such as its error, belong to no lane.
            own = eqx.tree_at(lambda d: d.method, own, jax.tree.map(lambda _: False, device.method))
        own, common = eqx.partition(device, own)
        batched = (own, Rows(x_set), None if r_set is None else Rows(r_set))
        return in_blocks(_run_block, batched, shape, shared=(common, settings), block=_BLOCK)
    return _run(device, x_set, r_set, settings, shots, key)


def _run_block(batched, shared) -> Loop:
    (own, x_set, r_set), (common, settings) = batched, shared
    return _run(eqx.combine(own, common), x_set.number, None if r_set is None else r_set.number, settings, None, None)


@eqx.filter_jit
def _run(device: AbstractMemristor, x_set, r_set, settings: Settings, shots, key) -> Loop:
    keys = (None, None) if key is None else tuple(jax.random.split(key))
    respond = device.under(settings)
    first = respond(x_set, jnp.zeros_like(x_set), alone=True)
    p_x, n_x = _measure(device, first, shots, keys[0])
    if r_set is None:
        r = device.memory.filter(feedback(device, x_set, device.signal(first.populations), p_x, n_x, shots))
    else:
        r = r_set
    second = respond(x_set, r, alone=False)
    p_y, n_y = _measure(device, second, shots, keys[1])
    return _loop(device, x_set, r, first, second, (p_x, p_y), (n_x, n_y))


def stream(device: AbstractMemristor, x_set, *, detuning_1_set_hz=0.0, detuning_2_set_hz=0.0) -> Loop:
    """The same loop cycle by cycle: read the memory, play the cycle, update the memory.

    Sequential, for controllers and for networks whose outputs feed inputs; without shot noise equal to `run`.
    Arguments and returns as for `run`.
    """
    x_set = real_array(x_set)
    settings = Settings.of(detuning_1_set_hz, detuning_2_set_hz, x_set.shape)
    # The buffer's length is static, so the memory starts outside jit, where a known window is known.
    state = device.memory.init(x_set.shape[1:])
    return _stream(device.prepared(x_set, settings), state, x_set, settings)


@eqx.filter_jit
def _stream(device: AbstractMemristor, state, x_set, settings: Settings) -> Loop:
    respond = device.under(settings)

    def cycle(state, now):
        x_k, setting = now
        r_k = device.memory.read(state)
        # One cycle is a loop of one, whose axis is taken away again.
        first = respond(x_k[None], jnp.zeros_like(x_k)[None], alone=True, of_cycle=setting)
        second = respond(x_k[None], r_k[None], alone=False, of_cycle=setting)
        first, second = (_only_cycle(response) for response in (first, second))
        p_x, p_y = device.assigned(first.populations), device.assigned(second.populations)
        fed = feedback(device, x_k, device.signal(first.populations), p_x, None, None)
        return device.memory.update(state, fed), (r_k, first, second, p_x, p_y)

    of_cycle = None if settings.of_cycle is None else settings.of_cycle[:, None]
    _, (r, first, second, p_x, p_y) = jax.lax.scan(cycle, state, (x_set, of_cycle))
    first, second = (_cycles_after_components(response) for response in (first, second))
    return _loop(device, x_set, r, first, second, (p_x, p_y), (None, None))


def sine_input(*, periods: int, cycles_per_period: int, delay_cycles: float = 0.0) -> Float[Array, " cycles"]:
    """Commanded inputs `x = sin^2(pi (k - delay) / K)`, k = 0 ... periods K: a linear ramp of the area of pulse 1."""
    k = jnp.arange(periods * cycles_per_period + 1) - delay_cycles
    return jnp.sin(jnp.pi * k / cycles_per_period) ** 2


def _measure(device: AbstractMemristor, response: Response, shots, key):
    p = device.assigned(response.populations)
    return p, None if key is None else sample_counts(key, p, shots)


def feedback(device: AbstractMemristor, x_set, x, p_x, n_x, shots) -> Float[Array, "..."]:
    """What the device's memory takes in of a cycle, by its source; `n_x` None where nothing is sampled."""
    if device.source == "command":
        return x_set
    if n_x is not None and device.source == "measured":
        return n_x / shots
    return within_rounding(x if device.source == "model" else p_x)


def within_rounding(fed: Float[Array, "..."], rounding: float = _ROUNDING) -> Float[Array, "..."]:
    """Numbers in [0, 1] that rounding may have carried just outside.

    A solver may leave an empty level at -1e-9, and a transfer below zero has no pulse area. Anything further out is an
    error and stays one.
    """
    fed = jnp.where((fed < 0) & (fed > -rounding), 0.0, fed)
    return jnp.where((fed > 1) & (fed < 1 + rounding), 1.0, fed)


def _only_cycle(response: Response) -> Response:
    return Response(
        response.populations[:, 0],
        response.coherence_vs[:, 0],
        response.valid[0],
        response.error_estimate[0],
        response.method,
    )


def _cycles_after_components(response: Response) -> Response:
    move: Callable = lambda a: jnp.moveaxis(a, 0, 1)
    return Response(
        move(response.populations),
        move(response.coherence_vs),
        response.valid,
        response.error_estimate,
        response.method,
    )


def _loop(device: AbstractMemristor, x_set, r, first: Response, second: Response, p, n) -> Loop:
    square = jnp.sum(second.coherence_vs**2, axis=0)
    y = device.signal(second.populations)
    repumped = second.populations[0] + second.populations[2]
    return Loop(
        x_set=jnp.broadcast_to(x_set, y.shape),
        r=jnp.broadcast_to(r, y.shape),
        x=device.signal(first.populations),
        y=y,
        p_x=p[0],
        p_y=p[1],
        n_x=n[0],
        n_y=n[1],
        populations_1=first.populations,
        populations_2=second.populations,
        coherence=2 * flat_root(square),
        purity=repumped**2 + y**2 + 2 * square,
        valid=first.valid & second.valid,
        error_estimate=jnp.maximum(first.error_estimate, second.error_estimate),
        method=second.method,
    )

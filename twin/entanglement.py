"""Two independent memristors fed by one entangled state: memristive dynamics of entanglement.

Node A receives the first qubit of a pair, node B the second; each acts on its own qubit alone, with a transfer R that
its memory makes of earlier inputs. An ideal node damps the amplitude of s,

    K_0 = diag(1, sqrt(1 - R)),   K_1 = sqrt(R) |v><s|,

and a real one is the qubit channel that its own responses show (`node_channel`). Neither creates entanglement (a real
one beyond its `residual`), but how much is left depends on the past: concurrence out against concurrence in is a loop.
Of the pair state

    sqrt(1 - x) |v s> + sqrt(x) |s v>:   C_out = C_in sqrt((1 - R_A)(1 - R_B)).

How the pair was made is not the business of this module. A. Ferrara and R. Lo Franco, arXiv:2409.08979 (2024), say
that the entanglement of two independent photonic quantum memristors has memristive dynamics; only their abstract was
read, and no figure of theirs is claimed.
"""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from twin import qubit_pairs
from twin.batching import real_array
from twin.closed_form import flat_root
from twin.loop import SOURCES, AbstractMemristor, Responder, Response, Settings
from twin.memory_inputs import OWN, checked_memory_inputs, into_memories
from twin.memristor import IonMemristor
from twin.photonic import PhotonicMemristor
from twin.qubit_pairs import Correlations

# Inputs by which a node shows its channel: nothing, everything, and an even superposition.
_PROBES = (0.0, 1.0, 0.5)
# Of a chip, what stands in front of stage 2, made ideal: the pair arrives behind it.
_IDEAL_FRONT = {
    **{"phase_scale_1": 1.0, "phase_offset_1_rad": 0.0, "visibility_1": 1.0, "phase_noise_1_rad": 0.0},
    "loss_input": 0.0,
}
# Negative eigenvalues of the Choi matrix that rounding leaves, and that a map read off with a residual may have.
_ROUNDING, _RESIDUALS = 1e-9, 4.0


class QubitChannel(eqx.Module):
    """What a node does to the qubit {v, s}: populations mix among themselves, rho_vs is multiplied by a number.

    No other map treats all phases of the input alike (it commutes with turning s against v). Population that leaks to a
    level that is not repumped is missing: the trace falls.

    Attributes:
        population_matrix: populations out (first axis) of populations in, order v, s; shape (2, 2, *batch).
        coherence_factor: real and imaginary part of the factor of rho_vs, shape (2, *batch).
        residual: by how much the device's own output populations differ from this map for an input that was not used
            to find it; shape (*batch). Zero where pulses are apart and do not share noise. The factor is not checked.
        valid: shape (*batch); NaN elsewhere. Finite, and completely positive as far as can be told: an eigenvalue of
            the Choi matrix may be negative by 1e-9, the error of the method, and four times the residual.
    """

    population_matrix: Float[Array, "2 2 ..."]
    coherence_factor: Float[Array, "2 ..."]
    residual: Float[Array, "..."]
    valid: Bool[Array, "..."]

    def pauli(self) -> Float[Array, "4 4 ..."]:
        """The channel as a real matrix on (I, X, Y, Z): (P_v + P_s, 2 Re rho_vs, -2 Im rho_vs, P_v - P_s)."""
        (vv, vs), (sv, ss) = self.population_matrix
        real, imag = self.coherence_factor
        zero = jnp.zeros_like(real)
        return 0.5 * jnp.stack(
            [
                jnp.stack([vv + sv + vs + ss, zero, zero, vv + sv - vs - ss]),
                jnp.stack([zero, 2 * real, 2 * imag, zero]),
                jnp.stack([zero, -2 * imag, 2 * real, zero]),
                jnp.stack([vv - sv + vs - ss, zero, zero, vv - sv - vs + ss]),
            ]
        )

    def smallest_choi_eigenvalue(self) -> Float[Array, "..."]:
        """Smallest eigenvalue of the Choi matrix: not negative for a completely positive map."""
        (vv, vs), (sv, ss) = self.population_matrix
        both, apart = 0.5 * (vv + ss), 0.5 * (vv - ss)
        size = jnp.sqrt(apart**2 + self.coherence_factor[0] ** 2 + self.coherence_factor[1] ** 2)
        return jnp.minimum(both - size, jnp.minimum(vs, sv))


def amplitude_damping(r) -> QubitChannel:
    """The ideal node, amplitude damping with transfer r in [0, 1], shape (*batch).

    The derivative of its factor diverges at r = 1 and is given as 0 exactly there: see `twin.closed_form.flat_root`.
    """
    r = real_array(r)
    valid = (r >= 0) & (r <= 1)
    r = jnp.where(valid, r, jnp.nan)
    zero, one = jnp.zeros_like(r), jnp.ones_like(r)
    matrix = jnp.stack([jnp.stack([one, r]), jnp.stack([zero, 1 - r])])
    return QubitChannel(matrix, jnp.stack([flat_root(1 - r), zero]), zero, valid)


def node_channel(device: AbstractMemristor, r) -> QubitChannel:
    """The qubit channel of a device at given transfers.

    Of an ion the input is the qubit {v, s} as the run of pulse 1 alone shows it; of a chip it is the photon where it
    enters stage 2, so that the channel is that of stage 2 and the losses behind it, whatever stands in front. The
    output is what both pulses leave; m is repumped to v in both. Both depend linearly on what was prepared, so the
    commands x = 0 and x = 1 give the populations, and x = 1/2 the coherence and, as a check, populations again
    (`residual`).

    Args:
        device: an `IonMemristor` or `PhotonicMemristor` without batch axes of its own beyond those of r.
        r: transfers in [0, 1], shape (cycles, *batch).

    Returns:
        A `QubitChannel` of the shape of r.

    Raises:
        ValueError: as `run`; an ion with `slow_noise`; traced values of a method that must be planned.
    """
    r = real_array(r)
    return _node_channel(prepared_node(device, r.shape[0]), r)


@eqx.filter_jit
def _node_channel(device: AbstractMemristor, r) -> QubitChannel:
    return _channel_of(_responders(device), r)


class _Responders(NamedTuple):
    """What answers cycles with the qubit that enters a node, and with the one that leaves it."""

    before: Responder
    after: Responder


def _responders(device: AbstractMemristor) -> _Responders:
    if not isinstance(device, PhotonicMemristor):
        respond = device.under(Settings())
        return _Responders(respond, respond)
    # Its own run of stage 1 alone passes the open stage 2. A command that undoes an offset leaks less than that one.
    behind = dataclasses.replace(device, **_IDEAL_FRONT)
    return _Responders(PhotonicMemristor(memory=device.memory).under(Settings()), behind.under(Settings()))


def prepared_node(device: AbstractMemristor, cycles: int) -> AbstractMemristor:
    """The device with its method decided for that many cycles; needed before `jit` and `grad`."""
    ion = device.unwrapped
    if isinstance(ion, IonMemristor) and ion.slow_noise is not None:
        # One draw rules both pulses: a ratio of averages is not the average of the factors.
        raise ValueError(
            "responses averaged over `slow_noise` do not show the channel of a node; leave it out, or play devices of "
            "drawn parameters side by side and average `state_out`."
        )
    return device.prepared(jnp.linspace(0.0, 1.0, len(_PROBES) * cycles), Settings())


def _channel_of(respond: _Responders, r: Float[Array, "cycles ..."]) -> QubitChannel:
    """The channel at transfers r of what answers cycles: see `node_channel`."""
    cycles = r.shape[0]
    x = jnp.concatenate([jnp.full_like(r, probe) for probe in _PROBES])
    before = respond.before(x, jnp.zeros_like(x), alone=True)
    after = respond.after(x, jnp.concatenate([r] * len(_PROBES)), alone=False)
    # (v and m repumped, s) for each probe.
    (off_in, on_in, half_in), (off, on, half) = (_by_probe(run, cycles) for run in (before, after))
    determinant = off_in[0] * on_in[1] - on_in[0] * off_in[1]
    rows = [
        [(off[k] * on_in[1] - on[k] * off_in[1]) / determinant, (on[k] * off_in[0] - off[k] * on_in[0]) / determinant]
        for k in (0, 1)
    ]
    (a, b), (c, d) = (run.coherence_vs[:, 2 * cycles :] for run in (before, after))
    square = a**2 + b**2
    factor = jnp.stack([(c * a + d * b) / square, (d * a - c * b) / square])
    matrix = jnp.stack([jnp.stack(row) for row in rows])
    missed = [jnp.abs(rows[k][0] * half_in[0] + rows[k][1] * half_in[1] - half[k]) for k in (0, 1)]
    of_probes = lambda values: jnp.broadcast_to(values, x.shape).reshape((len(_PROBES), *r.shape))
    valid = jnp.all(of_probes(before.valid & after.valid), axis=0)
    error = jnp.max(of_probes(before.error_estimate + after.error_estimate), axis=0)
    found = QubitChannel(matrix, factor, jnp.maximum(*missed), valid)
    # No comparison with NaN holds.
    lowest = -(_ROUNDING + error + _RESIDUALS * found.residual)
    valid = valid & jnp.isfinite(lowest) & (found.smallest_choi_eigenvalue() >= lowest)
    return QubitChannel(*(jnp.where(valid, a, jnp.nan) for a in (matrix, factor, found.residual)), valid)


def _by_probe(response: Response, cycles: int) -> list[tuple[Float[Array, "..."], Float[Array, "..."]]]:
    populations = response.populations
    parts = [populations[:, k * cycles : (k + 1) * cycles] for k in range(len(_PROBES))]
    return [(p[0] + p[2], p[1]) for p in parts]


def through(channel_a: QubitChannel, channel_b: QubitChannel, state: Correlations) -> Correlations:
    """The pair after each node has acted on its own qubit."""
    return jnp.einsum("ik...,kl...,jl...->ij...", channel_a.pauli(), state, channel_b.pauli())


class PairTrace(eqx.Module):
    """What two nodes did to a pair, cycle by cycle; the first axis of x, y, r is node A, B.

    Attributes:
        state_in, state_out: correlations, shape (4, 4, cycles, *batch).
        x, y: population of s at each node before and after it, shape (2, cycles, *batch).
        r: transfer of each node, the same shape.
        concurrence_in, concurrence_out, negativity_in, negativity_out, coherence_in, coherence_out: of the pair, shape
            (cycles, *batch); as it is, not divided by the trace.
        kept: probability that nothing has leaked.
        residual: largest of the two nodes' channels, see `QubitChannel`.
        valid: shape (cycles, *batch).
    """

    state_in: Correlations
    state_out: Correlations
    x: Float[Array, "2 cycles ..."]
    y: Float[Array, "2 cycles ..."]
    r: Float[Array, "2 cycles ..."]
    concurrence_in: Float[Array, "cycles ..."]
    concurrence_out: Float[Array, "cycles ..."]
    negativity_in: Float[Array, "cycles ..."]
    negativity_out: Float[Array, "cycles ..."]
    coherence_in: Float[Array, "cycles ..."]
    coherence_out: Float[Array, "cycles ..."]
    kept: Float[Array, "cycles ..."]
    residual: Float[Array, "cycles ..."]
    valid: Bool[Array, "cycles ..."]


def play_pair(
    nodes: tuple[AbstractMemristor, AbstractMemristor], states: Correlations, *, memory_inputs=OWN
) -> PairTrace:
    """A new pair in each cycle through two nodes, whose memories average the populations that they were fed.

    Args:
        nodes: A and B, of either platform each. Their `source` says what enters a memory: "command", the population of
            the reduced input; "model", what of it a run without pulse 2 shows (of a chip, what passes the open stage
            2); "measured", the probability that this is assigned to s.
        states: the pair of each cycle, shape (4, 4, cycles, *batch): see `twin.qubit_pairs`.
        memory_inputs: `OWN`, `CROSSED` (each memory averages what the other node was fed), or weights.

    Returns:
        A `PairTrace`.

    Raises:
        ValueError: states of another shape, `memory_inputs` that are no averages, an unknown source, or an ion with
            `slow_noise`.

    Example:
        >>> nodes = (PhotonicMemristor(memory=MovingAverage(10.0)),) * 2
        >>> trace = play_pair(nodes, one_excitation(sine_input(periods=3, cycles_per_period=40)))
    """
    _check(nodes, states, 3)
    weights = checked_memory_inputs(memory_inputs)
    prepared = tuple(prepared_node(node, states.shape[2]) for node in nodes)
    return _play_pair(prepared, states, weights)


@eqx.filter_jit
def _play_pair(nodes, states, weights) -> PairTrace:
    fed = into_memories(weights, _fed(nodes, states))
    r = jnp.stack([node.memory.filter(fed[k]) for k, node in enumerate(nodes)])
    channels = [_channel_of(_responders(node), r[k]) for k, node in enumerate(nodes)]
    return _trace(states, through(*channels, states), r, channels)


def store_pair(
    nodes: tuple[AbstractMemristor, AbstractMemristor], state: Correlations, cycles: int, *, memory_inputs=OWN
) -> PairTrace:
    """One pair that passes the nodes again and again, each cycle's output the next cycle's input.

    Args, raises: as `play_pair`, but for one `state` of shape (4, 4, *batch) and the number of `cycles`.

    Returns:
        A `PairTrace` whose `state_in` of a cycle is `state_out` of the one before.
    """
    _check(nodes, state, 2)
    weights = checked_memory_inputs(memory_inputs)
    # The buffer's length is static, so the memories start outside jit, where a known window is known.
    memories = tuple(node.memory.init(state.shape[2:]) for node in nodes)
    return _store_pair(tuple(prepared_node(node, 1) for node in nodes), memories, state, cycles, weights)


@eqx.filter_jit
def _store_pair(nodes, memories, state, cycles: int, weights) -> PairTrace:
    respond = [_responders(node) for node in nodes]

    def cycle(carry, _):
        state, memories = carry
        r = jnp.stack([node.memory.read(memory) for node, memory in zip(nodes, memories, strict=True)])
        # One cycle is a loop of one, whose axis is taken away again.
        channels = [_channel_of(respond[k], jnp.broadcast_to(r[k], state.shape[2:])[None]) for k in (0, 1)]
        channels = [jax.tree.map(lambda a: jnp.squeeze(a, a.ndim - state.ndim + 1), channel) for channel in channels]
        out = through(*channels, state)
        fed = into_memories(weights, _fed(nodes, state))
        memories = tuple(node.memory.update(m, fed[k]) for k, (node, m) in enumerate(zip(nodes, memories, strict=True)))
        return (out, memories), (state, out, r, channels)

    _, (states, outs, r, channels) = jax.lax.scan(cycle, (state, memories), None, length=cycles)
    states, outs = (jnp.moveaxis(a, 0, 2) for a in (states, outs))
    channels = [
        QubitChannel(
            jnp.moveaxis(c.population_matrix, 0, 2), jnp.moveaxis(c.coherence_factor, 0, 1), c.residual, c.valid
        )
        for c in channels
    ]
    return _trace(states, outs, jnp.moveaxis(r, 0, 1), channels)


def _check(nodes, states: Correlations, axes: int) -> None:
    if len(nodes) != 2:
        raise ValueError(f"`nodes` must be two devices, A and B, but has {len(nodes)}.")
    for node in nodes:
        if node.source not in SOURCES:
            raise ValueError(f"the memory's `source` must be one of {SOURCES}, but is {node.source!r}.")
    if states.shape[:2] != (4, 4) or states.ndim < axes:
        what = "(4, 4, cycles, *batch)" if axes == 3 else "(4, 4, *batch)"
        raise ValueError(
            f"states of pairs must have shape {what}, but have {states.shape}; `twin.qubit_pairs` makes them."
        )


def _fed(nodes, states: Correlations) -> Float[Array, "2 ..."]:
    """What each node's own input looks like to a controller."""
    return jnp.stack([_seen(node, own) for node, own in zip(nodes, qubit_pairs.excitations(states), strict=True)])


def _seen(node, own: Float[Array, "..."]) -> Float[Array, "..."]:
    if node.source == "command":
        return own
    shown = node.passed_open * own if isinstance(node, PhotonicMemristor) else own
    return node.assigned_of(shown) if node.source == "measured" else shown


def _trace(states, outs, r, channels) -> PairTrace:
    a, b = channels
    valid = a.valid & b.valid
    both = jnp.concatenate([states, outs], axis=2)
    cycles = states.shape[2]
    measured = [measure(both) for measure in (_concurrence, qubit_pairs.negativity, qubit_pairs.l1_coherence)]
    measures = [(value[:cycles], value[cycles:]) for value in measured]
    valid = jnp.broadcast_to(valid, measures[0][0].shape)
    return PairTrace(
        states,
        outs,
        qubit_pairs.excitations(states),
        qubit_pairs.excitations(outs),
        jnp.broadcast_to(r, (2, *valid.shape)),
        *(value for pair in measures for value in pair),
        kept=outs[0, 0],
        residual=jnp.broadcast_to(jnp.maximum(a.residual, b.residual), valid.shape),
        valid=valid,
    )


# Where a state is no X-state: entries that an X-state lacks.
_ELSEWHERE = np.array([[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]], bool)


def _concurrence(t: Correlations) -> Float[Array, "..."]:
    """The closed form for X-states, which phase-covariant nodes keep; Wootters' for others."""
    x_like = jnp.all(t[_ELSEWHERE] == 0, axis=0)
    # Both are computed, but the derivative of the one not taken must not reach the result as NaN.
    return jnp.where(x_like, qubit_pairs.x_concurrence(t), qubit_pairs.concurrence(t))

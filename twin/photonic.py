"""The photonic quantum memristor: one photon, two Mach-Zehnder interferometers, and what makes a real chip differ.

The photon starts in the reference mode. Stage 1 moves the share x of it into the signal mode, stage 2 the share R of
that into the feedback mode, whose detector keeps the memory. Logical vacuum (v) is the photon anywhere but in signal or
feedback mode; logical one (s) is the photon in the signal mode; m is the photon in the feedback mode.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from twin.batching import check_not_negative, check_values, is_traced, physical, real_array
from twin.closed_form import flat_root, set_area
from twin.loop import AbstractMemristor, Responder, Response, Settings
from twin.memory import AbstractMemory
from twin.readout import assignment_probability
from twin.trigonometry import cos_sin

_PROBABILITIES = ("visibility_1", "visibility_2", "loss_input", "loss", "efficiency", "dark_counts")


class Interferometer(NamedTuple):
    """A Mach-Zehnder interferometer with the photon in one input.

    Attributes:
        transfer: probability that the photon leaves by the other port, (1 - V <cos phi>) / 2.
        coherence: between both ports, V <sin phi> / 2, real in the frame of a symmetric drive.
        stay, move: what is left of the coherence with a third mode, in the same port and in the other one:
            sqrt((1 + V) / 2) <cos (phi/2)> and sqrt((1 + V) / 2) <sin (phi/2)>.
    """

    transfer: Float[Array, "..."]
    coherence: Float[Array, "..."]
    stay: Float[Array, "..."]
    move: Float[Array, "..."]


def interferometer(command, scale, offset_rad, visibility, noise_rad) -> Interferometer:
    """A Mach-Zehnder interferometer that was told to transfer the share `command`.

        phi = scale * 2 asin(sqrt(command)) + offset,   <cos phi> = cos(phi) e^(-sigma^2/2)

    Both arms are driven by half the phase with opposite signs, so that noise turns the beam splitter and nothing else.
    Visibility V below 1 is a mismatch of the arms in a degree of freedom that nobody looks at: their states overlap by
    V, and each overlaps by sqrt((1 + V) / 2) with a third mode that lies halfway between them.

    Args:
        command: transfer asked for, in [0, 1]; NaN outside.
        scale: actual over nominal phase. offset_rad: added to it. visibility: V in [0, 1].
        noise_rad: standard deviation sigma of a phase that is Gaussian from shot to shot, rad.

    Returns:
        Averages over the noise. At scale 1 without offset the transfer is the command to the last digit, and so is its
        derivative; elsewhere the derivative with respect to a command of exactly 0 or 1, which diverges, is given
        without its diverging part, as in `set_area`.
    """
    command, scale, offset_rad, visibility, noise_rad = map(
        real_array, (command, scale, offset_rad, visibility, noise_rad)
    )
    return _interferometer(command, _half_turn(command, scale, offset_rad), visibility, noise_rad)


def _interferometer(command, half_turn, visibility, noise_rad) -> Interferometer:
    """The same, from cosine and sine of half of what phi has more than its nominal value."""
    cos, sin = half_turn
    stay, move = flat_root(1 - command), flat_root(command)
    cos_full, sin_full = cos * cos - sin * sin, 2 * cos * sin
    sharp = command * cos_full + sin * sin + stay * move * sin_full
    noise = noise_rad * noise_rad
    contrast = visibility * jnp.exp(-0.5 * noise)
    third = flat_root(0.5 * (1 + visibility)) * jnp.exp(-0.125 * noise)
    return Interferometer(
        0.5 * (1 - contrast) + contrast * sharp,
        contrast * (stay * move * cos_full + 0.5 * (1 - 2 * command) * sin_full),
        third * (stay * cos - move * sin),
        third * (move * cos + stay * sin),
    )


def _half_turn(command, scale, offset_rad) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    return cos_sin(0.5 * ((scale - 1) * set_area(command) + offset_rad))


@jax.custom_jvp
def _no_turn(command, scale, offset_rad) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`_half_turn` where scale is 1 and offset 0: constants, with the same derivatives."""
    shape = jnp.broadcast_shapes(command.shape, scale.shape, offset_rad.shape)
    return jnp.ones(shape), jnp.zeros(shape)


@_no_turn.defjvp
def _no_turn_jvp(primals, tangents):
    return jax.jvp(_half_turn, primals, tangents)


class PhotonicMemristor(AbstractMemristor):
    """The photonic quantum memristor: amplitude damping of a single-rail state by a tunable beam splitter.

        x = (1 - loss_input) T_1(x_set) (1 - T_2(0)),   y = (1 - loss) (1 - loss_input) T_1(x_set) (1 - T_2(R)),
        T_k(c) = (1 - V_k e^(-sigma_k^2/2) cos(scale_k 2 asin(sqrt c) + offset_k)) / 2

    A chip cannot take stage 2 away: in a run of stage 1 alone the photon passes the open stage (R = 0), which leaks
    where its offset or visibility is not ideal. It is then read out in front of the lossy output arm, so `loss` is in
    y alone; loss that both runs meet belongs to `efficiency`. Lost photons count as vacuum.

    A detector that sees n photons clicks with probability 1 - (1 - dark_counts) (1 - efficiency)^n, the same law for
    output and feedback detector.

    Args:
        memory, source: as for every memristor.
        phase_scale_1, phase_scale_2: actual over nominal phase of the two stages.
        phase_offset_1_rad, phase_offset_2_rad: added to these phases, rad.
        visibility_1, visibility_2: of the two stages, in [0, 1]: see `interferometer`.
        phase_noise_1_rad, phase_noise_2_rad: standard deviation of the phases from shot to shot, rad.
        loss_input: probability that a photon of the signal mode is lost between the stages.
        loss: probability that a photon is lost between stage 2 and the output detector.
        efficiency: probability that a photon makes the detector click.
        dark_counts: probability of a click without a photon, per shot.

    Raises:
        ValueError: a number outside its range; NaN and `valid` False in its lane while tracing.

    References: amplitude damping with K_0 = diag(1, sqrt(1-R)), K_1 = sqrt(R) |0><1|. Mode mismatch and the symmetric
        drive are our modelling choices.
    """

    memory: AbstractMemory
    source: str = eqx.field(static=True, default="measured")
    phase_scale_1: Float[Array, "..."] = physical(default=1.0)
    phase_scale_2: Float[Array, "..."] = physical(default=1.0)
    phase_offset_1_rad: Float[Array, "..."] = physical(default=0.0)
    phase_offset_2_rad: Float[Array, "..."] = physical(default=0.0)
    visibility_1: Float[Array, "..."] = physical(default=1.0)
    visibility_2: Float[Array, "..."] = physical(default=1.0)
    phase_noise_1_rad: Float[Array, "..."] = physical(default=0.0)
    phase_noise_2_rad: Float[Array, "..."] = physical(default=0.0)
    loss_input: Float[Array, "..."] = physical(default=0.0)
    loss: Float[Array, "..."] = physical(default=0.0)
    efficiency: Float[Array, "..."] = physical(default=1.0)
    dark_counts: Float[Array, "..."] = physical(default=0.0)

    def __check_init__(self):
        for name in _PROBABILITIES:
            check_values(name, getattr(self, name), lambda v: (v >= 0) & (v <= 1), "in [0, 1]", "it is a fraction")
        for k in (1, 2):
            check_not_negative(f"phase_scale_{k}", getattr(self, f"phase_scale_{k}"), "units of the nominal phase")
            check_not_negative(f"phase_noise_{k}_rad", getattr(self, f"phase_noise_{k}_rad"), "rad")
            check_values(f"phase_offset_{k}_rad", getattr(self, f"phase_offset_{k}_rad"), np.isfinite, "finite",
                         "give it in rad")  # fmt: skip

    def prepared(self, x_set, settings: Settings) -> "PhotonicMemristor":
        del x_set, settings
        return self

    def under(self, settings: Settings) -> Responder:
        del settings  # an interferometer has no line
        return self._respond

    def _respond(self, x_set, r_set, *, alone, of_cycle=None) -> Response:
        del of_cycle
        x_set, r_set = real_array(x_set), real_array(r_set)

        valid = self._valid(x_set, r_set, alone)

        def answer(half_turn):
            block = self._block(x_set, r_set, alone, half_turn)
            s, m = block.signal, block.feedback
            populations = jnp.stack(jnp.broadcast_arrays(1 - s - m, s, m))
            return jnp.where(valid, populations, jnp.nan), jnp.where(valid, block.reference_signal, jnp.nan)

        # Nominal phases need no trigonometry, which would take most of the time.
        nominal = jnp.all(jnp.stack([jnp.all(phase == 0) for phase in self._phase_errors]))
        populations, coherence = lax.cond(nominal, lambda: answer(_no_turn), lambda: answer(_half_turn))
        return Response(
            populations,
            jnp.stack([coherence, jnp.zeros_like(coherence)]),
            jnp.broadcast_to(valid, coherence.shape),
            jnp.zeros_like(coherence),
            "closed form",
        )

    def signal(self, populations) -> Float[Array, "..."]:
        return populations[1]

    def assigned(self, populations) -> Float[Array, "..."]:
        return assignment_probability(populations[1], self.dark_counts, 1 - self._click)

    def assigned_next(self, populations) -> Float[Array, "..."]:
        # The feedback detector clicks for m; a photon is in one of the two arms only.
        v, s, m = populations
        return (1 - self.dark_counts) * (self._click * m + self.dark_counts * v) + (1 - self._click) * (
            self.dark_counts * s
        )

    @property
    def _click(self) -> Float[Array, "..."]:
        """Probability of a click with one photon there."""
        return self.dark_counts + (1 - self.dark_counts) * self.efficiency

    def output_state(self, x_set, r_set, *, alone=False) -> Float[Array, "2 2 ..."]:
        """Density matrix of the output mode in {vacuum, one photon}: feedback mode and losses traced out.

        Args:
            x_set, r_set: commands in [0, 1]. alone: whether stage 1 is played alone.

        Returns:
            Shape (2, 2, *batch), trace 1, real in the frame of a symmetric drive; NaN outside the ranges.
        """
        x_set, r_set = real_array(x_set), real_array(r_set)
        block, valid = self._block(x_set, r_set, alone), self._valid(x_set, r_set, alone)
        one, between = block.signal, block.reference_signal
        return _matrix([[1 - one, between], [between, one]], valid)

    def mode_state(self, x_set, r_set, *, alone=False) -> Float[Array, "3 3 ..."]:
        """The same with nothing traced but losses and mismatch: the block in which the photon is still there.

        Args:
            x_set, r_set: commands in [0, 1]. alone: whether stage 1 is played alone.

        Returns:
            Shape (3, 3, *batch) over reference, signal and feedback mode; its trace is the probability that the photon
            is not lost. Without imperfections it is the projector on (sqrt(1-x), sqrt(x (1-R)), sqrt(x R)).
        """
        x_set, r_set = real_array(x_set), real_array(r_set)
        b, valid = self._block(x_set, r_set, alone), self._valid(x_set, r_set, alone)
        return _matrix(
            [
                [b.reference, b.reference_signal, b.reference_feedback],
                [b.reference_signal, b.signal, b.signal_feedback],
                [b.reference_feedback, b.signal_feedback, b.feedback],
            ],
            valid,
        )

    def area_factor(self, *, of_clicks: bool = False) -> Float[Array, "..."]:
        """Area of the loop over that of the ideal element, for x_set = sin^2 and a steady memory; exact.

            c_k = V_k e^(-sigma_k^2/2),  q = (1 + c_2)/2 (what the open stage 2 lets pass),  l = 1 - loss_input
            A / A_ideal = (1 - loss) q l^2 c_1 c_2 g
            g = 1 (memory of commands), q l c_1 (of populations), (1 - dark_counts) efficiency q l c_1 (of counts)

        Losses and contrast scale x, y and the swing of R. A constant added to R adds no area. A constant floor under x
        adds area, which the smaller swing of x cancels. Holds for sampled loops too (four or more points a period) and
        for every kernel; not for phases that are not the nominal ones.

        Args:
            of_clicks: of the loop of click probabilities p_y over p_x in place of the populations y over x.

        Raises:
            ValueError: a phase scale other than 1, or an offset: the loop has no closed form then (NaN while tracing).

        References: derived here. Entropy 28, 507 (2026), which is known by its abstract, says that loss deforms the
            pinched loop.
        """
        phases = self._phase_errors
        if not is_traced(phases) and any(np.any(np.asarray(phase)) for phase in phases):
            raise ValueError("`area_factor` needs phase scales of 1 and no offsets, but a phase is not nominal here; "
                             "take the area of `run` instead.")  # fmt: skip
        nominal = jnp.all(jnp.stack(jnp.broadcast_arrays(*phases)) == 0, axis=0)
        c_1, c_2 = (
            visibility * jnp.exp(-0.5 * noise**2)
            for visibility, noise in (
                (self.visibility_1, self.phase_noise_1_rad),
                (self.visibility_2, self.phase_noise_2_rad),
            )
        )
        passed, kept = 0.5 * (1 + c_2), 1 - self.loss_input
        counted = (1 - self.dark_counts) * self.efficiency
        seen = passed * kept * c_1
        swing = {"command": 1.0, "model": seen, "measured": counted * seen}[self.source]
        area = (1 - self.loss) * passed * kept**2 * c_1 * c_2 * swing
        return jnp.where(nominal, area * counted**2 if of_clicks else area, jnp.nan)

    @property
    def passed_open(self) -> Float[Array, "..."]:
        """Share of the photon in the signal mode that passes the open stage 2, 1 - T_2(0)."""
        own = self.phase_scale_2, self.phase_offset_2_rad, self.visibility_2, self.phase_noise_2_rad
        return 1 - interferometer(0.0, *own).transfer

    @property
    def _phase_errors(self) -> tuple[Float[Array, "..."], ...]:
        """What vanishes where phases are nominal."""
        return self.phase_scale_1 - 1, self.phase_scale_2 - 1, self.phase_offset_1_rad, self.phase_offset_2_rad

    def _valid(self, x_set, r_set, alone) -> Bool[Array, "..."]:
        """Commands in [0, 1]; parameters, which may be traced, in their ranges."""
        r_set = jnp.where(alone, 0.0, r_set)
        valid = (x_set >= 0) & (x_set <= 1) & (r_set >= 0) & (r_set <= 1)
        for name in _PROBABILITIES:
            value = getattr(self, name)
            valid = valid & (value >= 0) & (value <= 1)
        for value in (self.phase_scale_1, self.phase_scale_2, self.phase_noise_1_rad, self.phase_noise_2_rad):
            valid = valid & (value >= 0)
        return valid & jnp.isfinite(self.phase_offset_1_rad + self.phase_offset_2_rad)

    def _block(self, x_set, r_set, alone, half_turn: Callable = _half_turn) -> "_Block":
        # Known beforehand, the open stage is solved once and not in every cycle.
        r_set = jnp.zeros(()) if alone is True else jnp.where(alone, 0.0, r_set)
        one, two = (
            _interferometer(command, half_turn(command, scale, offset), visibility, noise)
            for command, scale, offset, visibility, noise in (
                (x_set, self.phase_scale_1, self.phase_offset_1_rad, self.visibility_1, self.phase_noise_1_rad),
                (r_set, self.phase_scale_2, self.phase_offset_2_rad, self.visibility_2, self.phase_noise_2_rad),
            )
        )
        arrived = 1 - self.loss_input
        left = 1 - jnp.where(alone, 0.0, self.loss)
        photon, with_reference = arrived * one.transfer, one.coherence * flat_root(arrived)
        amplitude = flat_root(left)
        return _Block(
            1 - one.transfer,
            left * (1 - two.transfer) * photon,
            two.transfer * photon,
            with_reference * two.stay * amplitude,
            with_reference * two.move,
            photon * two.coherence * amplitude,
        )


class _Block(NamedTuple):
    """Populations of the three modes, and the coherences between them."""

    reference: Float[Array, "..."]
    signal: Float[Array, "..."]
    feedback: Float[Array, "..."]
    reference_signal: Float[Array, "..."]
    reference_feedback: Float[Array, "..."]
    signal_feedback: Float[Array, "..."]


def _matrix(rows: list[list[Array]], valid: Bool[Array, "..."]) -> Array:
    """Rows of entries as one array, matrix axes first; NaN where not valid."""
    entries = jnp.broadcast_arrays(*(entry for row in rows for entry in row))
    matrix = jnp.stack(entries).reshape(len(rows), len(rows), *entries[0].shape)
    return jnp.where(valid, matrix, jnp.nan)

"""Two memristors on the Zeeman sublevels of one ion: a star of six levels.

The common level s is 2S1/2 F=0, where the ion is prepared; the five rays are the sublevels m_F = -2 ... 2 of 2D3/2 F=2,
each with its own line at 435.5 nm. Memristor A uses two of them, B two others, each as in the V scheme:

    pulses A1 (s - v_A), A2 (s - m_A), B1 (s - v_B), B2 (s - m_B), at equal distances in time

Every pulse meets an empty ray, so that far apart in time each multiplies the population of s by cos^2(theta/2):

    x_A = u_A,   y_A = (1 - R_A) x_A,   x_B = u_B y_A,   y_B = (1 - R_B) x_B          (cascade)

with u the commanded inputs. Without cascade the ion is prepared anew before B1, and x_B = u_B. The memories average own
inputs, or those of the other memristor (crossed feedback), or both. Decay ends in s or in a leak level l (2S1/2 F=1).

The light of a pulse also falls on the four lines it is not meant for, a multiple of the Zeeman splitting away. Two
things are followed, both of which move populations by some (Omega / Delta)^2 (effective Hamiltonian of s and the driven
ray, to third order):

    s is shifted by sum_j Omega_j^2 / (4 Delta_j),   Delta_j = omega_laser - omega_j,
    and, being dressed, driven more slowly:   Omega (1 - sum_j Omega_j^2 / (8 Delta_j^2))

The phases that other rays gain are not followed: no later pulse sees them. What light moves to other sublevels is
estimated (`Star.off_resonant_transfer`) and left out. The scheme is ours: how a laboratory coupled its memristors on
one ion is not known.
"""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from twin.batching import batch_shape, check_not_negative, check_positive, check_values, is_traced, physical, real_array
from twin.closed_form import set_area
from twin.dynamics import Solution, evolve
from twin.grid import plan_steps
from twin.ion import YB171
from twin.levels import Decay, Dephasing, LevelSystem, LightShift
from twin.loop import within_rounding
from twin.memory import AbstractMemory
from twin.memory_inputs import OWN, checked_memory_inputs, into_memories
from twin.methods import ClosedForm, StaticGrid
from twin.pulses import Gaussian
from twin.readout import assignment_probability, check_shots, sample_counts

SUBLEVELS = (-2, -1, 0, 1, 2)
LEVELS = ("s", *(f"{m:+d}" if m else "0" for m in SUBLEVELS), "l")
# Hz per tesla and m_F in 2D3/2 F=2; 2S1/2 F=0 has no linear shift.
ZEEMAN_HZ_PER_TESLA = YB171.zeeman_hz_per_tesla("D3/2", 2, 1)
# Pulses (columns A1, A2, B1, B2) of the runs whose ends are x_A, y_A, x_B, y_B.
_CASCADE = np.tril(np.ones((4, 4)))
_APART = np.array([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])


class Star(eqx.Module):
    """Two memristors on one ion.

    Args:
        memories: of A and B.
        sublevels_a, sublevels_b: m_F of (v, m) of each memristor, four different numbers from -2 to 2.
        cascade: whether B works on what A leaves; else the ion is prepared anew in between.
        memory_inputs: whose inputs each memory averages: `OWN`, `CROSSED` of `twin.memory_inputs`, or weights, shape
            (memory, input).
        source: "measured" (what the readout assigns to s, the leak included) or "model" (population of s).
        method: `StaticGrid()`, or `ClosedForm()`: pulses apart and resonant, nothing decays.
        rabi_scales: actual over nominal Rabi frequency of each pulse, shape (4, *batch), order A1, A2, B1, B2.
        detunings_hz: laser minus line of each pulse, Hz, shape (4, *batch).
        field_offset_tesla: by how much the magnetic field is above the one that the lines were measured at; line m_F
            rises by 8.42 GHz per tesla and m_F.
        sigma_s: width of the Rabi envelopes, s. separation_s: between centres of consecutive pulses, s.
        lead_s, tail_s: time before the first centre, and from the last centre of a run to its read-out, s.
        laser_linewidth_hz: FWHM linewidth of the one laser, Hz.
        lifetime_s: of 2D3/2 F=2, s. branching: fraction of its decay to s.
        readout_error_bright, readout_error_dark: bright ion read dark, dark ion read bright; s and l are bright.
        beam: relative Rabi frequencies on the lines m_F = -2 ... 2, shape (5, *batch): `quadrupole_beam`. None leaves
            the neighbouring lines out.
        field_tesla: magnetic field, T; needed with `beam`.

    Raises:
        ValueError: sublevels that are not four, numbers outside their ranges, a beam without a field.
    """

    memories: tuple[AbstractMemory, AbstractMemory]
    sublevels_a: tuple[int, int] = eqx.field(static=True, default=(-1, 1))
    sublevels_b: tuple[int, int] = eqx.field(static=True, default=(-2, 2))
    cascade: bool = eqx.field(static=True, default=True)
    memory_inputs: Float[Array, "2 2"] = eqx.field(
        converter=checked_memory_inputs, metadata={"leading": None}, default=OWN
    )
    source: str = eqx.field(static=True, default="measured")
    method: StaticGrid | ClosedForm = eqx.field(default_factory=StaticGrid)
    rabi_scales: Float[Array, "4 ..."] = physical(1, default=(1.0, 1.0, 1.0, 1.0))
    detunings_hz: Float[Array, "4 ..."] = physical(1, default=(0.0, 0.0, 0.0, 0.0))
    field_offset_tesla: Float[Array, "..."] = physical(default=0.0)
    sigma_s: Float[Array, "..."] = physical(default=20e-6)
    separation_s: Float[Array, "..."] = physical(default=160e-6)
    lead_s: Float[Array, "..."] = physical(default=120e-6)
    tail_s: Float[Array, "..."] = physical(default=120e-6)
    laser_linewidth_hz: Float[Array, "..."] = physical(default=0.0)
    lifetime_s: Float[Array, "..."] = physical(default=52.7e-3)
    branching: Float[Array, "..."] = physical(default=0.4)
    readout_error_bright: Float[Array, "..."] = physical(default=0.0)
    readout_error_dark: Float[Array, "..."] = physical(default=0.0)
    beam: Float[Array, "5 ..."] | None = physical(1, default=None)
    field_tesla: Float[Array, "..."] | None = physical(default=None)

    def __check_init__(self):
        used = (*self.sublevels_a, *self.sublevels_b)
        if len(used) != 4 or len(set(used)) != 4 or not set(used) <= set(SUBLEVELS):
            raise ValueError(
                "`sublevels_a` and `sublevels_b` must name four different m_F from -2 to 2, "
                f"but are {self.sublevels_a} and {self.sublevels_b}."
            )
        if len(self.memories) != 2:
            raise ValueError(f"`memories` must be two, of A and of B, but are {len(self.memories)}.")
        if self.source not in ("measured", "model"):
            raise ValueError(f"`source` must be 'measured' or 'model', but is {self.source!r}.")
        for name in ("rabi_scales", "detunings_hz"):
            if getattr(self, name).shape[:1] != (4,):
                shape = getattr(self, name).shape
                raise ValueError(f"`{name}` must have the leading axis 4, one a pulse, but has shape {shape}.")
        for name in ("sigma_s", "separation_s"):
            check_positive(name, getattr(self, name), "seconds")
        for name in ("lead_s", "tail_s"):
            check_not_negative(name, getattr(self, name), "seconds")
        check_not_negative("rabi_scales", self.rabi_scales, "a plain number")
        check_not_negative("laser_linewidth_hz", self.laser_linewidth_hz, "Hz")
        check_values(
            "lifetime_s", 1 / self.lifetime_s, lambda v: v >= 0, "positive (its inverse finite)", "use seconds"
        )
        for name in ("branching", "readout_error_bright", "readout_error_dark"):
            check_values(name, getattr(self, name), lambda v: (v >= 0) & (v <= 1), "in [0, 1]", "it is a probability")
        if self.beam is not None:
            if self.beam.shape[:1] != (5,):
                raise ValueError(f"`beam` must have the leading axis 5, one a sublevel, but has {self.beam.shape}.")
            if self.field_tesla is None:
                raise ValueError("`beam` needs `field_tesla`, which sets the lines apart; give it in tesla.")
            check_positive("field_tesla", self.field_tesla, "tesla")
            own = self.beam[np.array([SUBLEVELS.index(m) for m in used])]
            check_positive("beam", own, "a plain number, above zero on each line that is used")

    @property
    def sublevels(self) -> tuple[int, int, int, int]:
        """m_F of the ray of each pulse."""
        return (*self.sublevels_a, *self.sublevels_b)

    # --------------------------------------------------------------------------------------------------- the ion

    def system(self) -> LevelSystem:
        """The star with numbers; E_s = 0 and E_j = -delta_k on the ray of pulse k, in the frame of its laser."""
        field_shift = 2 * jnp.pi * ZEEMAN_HZ_PER_TESLA * self.field_offset_tesla
        shape = jnp.broadcast_shapes(self.detunings_hz.shape[1:], field_shift.shape)
        energies = [jnp.zeros(shape)] * len(LEVELS)
        for m in SUBLEVELS:
            energies[_level(m)] = jnp.broadcast_to(m * field_shift, shape)
        for k, m in enumerate(self.sublevels):
            energies[_level(m)] = energies[_level(m)] - 2 * jnp.pi * self.detunings_hz[k]
        rate = 1 / self.lifetime_s
        names = [LEVELS[_level(m)] for m in self.sublevels]
        decays = [Decay(name, "s", rate * self.branching) for name in names]
        decays += [Decay(name, "l", rate * (1 - self.branching)) for name in names]
        # One laser: each line carries its phase once.
        weights = tuple(float(name not in ("s", "l")) for name in LEVELS)
        only_s = tuple(float(name == "s") for name in LEVELS)
        shifts = ()
        if self.beam is not None:
            rows = zip(names, self.common_level_shift_coefficients(), strict=True)
            shifts = tuple(LightShift(("s", name), only_s, coefficient) for name, coefficient in rows)
        return LevelSystem(
            LEVELS,
            tuple(("s", name) for name in names),
            jnp.stack(energies),
            tuple(decays),
            (Dephasing(weights, jnp.pi * self.laser_linewidth_hz),),
            shifts,
        )

    def _neighbours(self) -> list[list[tuple[Float[Array, "..."], Float[Array, "..."]]]]:
        """(relative Rabi frequency, laser minus line in rad/s) on each other line, for each pulse."""
        if self.beam is None or self.field_tesla is None:
            raise ValueError("the neighbouring lines are left out; give `beam` and `field_tesla`.")
        rows = []
        for m in self.sublevels:
            own = self.beam[SUBLEVELS.index(m)]
            spacing = 2 * jnp.pi * ZEEMAN_HZ_PER_TESLA * self.field_tesla
            rows.append(
                [(self.beam[j] / own, spacing * (m - other)) for j, other in enumerate(SUBLEVELS) if other != m]
            )
        return rows

    def common_level_shift_coefficients(self) -> Float[Array, "4 ..."]:
        """Shift of s by the neighbouring lines during each pulse, over its squared Rabi frequency, s/rad.

        Returns:
            Shape (4, *batch).
        """
        return jnp.stack([sum(ratio**2 / (4 * delta) for ratio, delta in row) for row in self._neighbours()])

    def off_resonant_transfer(self, area_rad=math.pi) -> Float[Array, "4 ..."]:
        """Population that a pulse of this area moves to sublevels it is not meant for: an estimate, of each pulse.

        First order in the drive of each neighbouring line, Gaussian envelope: sum_j (area ratio_j / 2)^2
        exp(-(Delta_j sigma)^2). Negligible once the Zeeman splitting is some multiples of 1/sigma; Raman transfer
        between two rays is as far off resonance. Good where the sum is small.
        """
        rows = self._neighbours()
        return jnp.stack(
            [sum((area_rad * q / 2) ** 2 * jnp.exp(-((d * self.sigma_s) ** 2)) for q, d in row) for row in rows]
        )

    def pulses(self, areas_rad: Float[Array, "4 ..."]) -> tuple[Gaussian, ...]:
        """The four waveforms, the centre of A1 at time zero."""
        return tuple(
            Gaussian.from_area(areas_rad[k], center_s=k * self.separation_s, sigma_s=self.sigma_s) for k in range(4)
        )

    def areas(self, x_set, r) -> Float[Array, "4 ..."]:
        """Areas that the ion sees for commanded inputs and transfers, each of shape (2, ...), rad."""
        nominal = (set_area(1 - x_set[0]), set_area(r[0]), set_area(1 - x_set[1]), set_area(r[1]))
        rows = [self.rabi_scales[k] * theta for k, theta in enumerate(nominal)]
        areas = jnp.stack(jnp.broadcast_arrays(*rows))
        if self.beam is None:
            return areas
        # int Omega^3 dt = theta^3 / (2 pi sqrt(3) sigma^2) of a Gaussian.
        dressing = [sum(ratio**2 / (8 * delta**2) for ratio, delta in row) for row in self._neighbours()]
        scale = 1 / (2 * math.pi * math.sqrt(3) * self.sigma_s**2)
        rows = [theta * (1 - scale * d * theta**2) for theta, d in zip(areas, dressing, strict=True)]
        return jnp.stack(jnp.broadcast_arrays(*rows))

    def respond(self, x_set, r) -> Solution:
        """One cycle: all four runs, as the first batch axis of a `Solution`; x_set and r of shape (2, *batch)."""
        areas, played, axes = self._played(x_set, r)
        runs = jnp.arange(4.0).reshape((4,) + (1,) * axes)
        assert isinstance(self.method, StaticGrid)
        return evolve(
            self.system(),
            self.pulses(_in_each_run(areas, played)),
            start="s",
            window_s=(-self.lead_s, runs * self.separation_s + self.tail_s),
            method=self.method,
        )

    def _played(self, x_set, r) -> tuple[Float[Array, "4 ..."], Float[Array, "4 4 ..."], int]:
        """Areas, which pulses each run plays (pulses, runs, ...), and the number of batch axes."""
        areas = self.areas(x_set, r)
        axes = max(areas.ndim - 1, len(batch_shape(self)))
        areas = areas.reshape((4,) + (1,) * (axes + 1 - areas.ndim) + areas.shape[1:])
        played = (_CASCADE if self.cascade else _APART).T
        return areas, real_array(played.reshape((4, 4) + (1,) * axes)), axes

    def closed_form(self, x_set, r) -> Float[Array, "levels 4 ..."]:
        """Populations at the end of the four runs, pulses apart and resonant and nothing decaying."""
        areas, played, _ = self._played(x_set, r)
        moved = jnp.sin(_in_each_run(areas, played) / 2) ** 2
        left = jnp.ones_like(moved[0])
        rows = [jnp.zeros_like(left)] * len(LEVELS)
        for k, m in enumerate(self.sublevels):
            rows[_level(m)] = left * moved[k]
            left = left * (1 - moved[k])
        rows[0] = left
        return jnp.stack(rows)

    def assigned(self, populations: Float[Array, "levels ..."]) -> Float[Array, "..."]:
        """Probability that the readout assigns s: bright, as the leak level is."""
        bright = populations[0] + populations[-1]
        return assignment_probability(bright, self.readout_error_dark, self.readout_error_bright)

    def prepared(self) -> "Star":
        """The device with the steps of its grid laid for the largest areas: before `jit` and `grad`."""
        if isinstance(self.method, ClosedForm) or self.method.steps is not None:
            return self
        full = jnp.ones(2)
        pulses = self.pulses(self.areas(1 - full, full))
        window = (-self.lead_s, 3 * self.separation_s + self.tail_s)
        shape = batch_shape(self)
        steps = plan_steps(self.system(), pulses, window, float(self.method.error), shape)
        # Each run adds a knot at its own end.
        return dataclasses.replace(self, method=dataclasses.replace(self.method, steps=steps + 4))


class StarLoop(eqx.Module):
    """Loops of both memristors; the first axis of x_set, r, x, y, n_x, n_y is A, B, the next the cycles.

    Attributes:
        x_set: commanded inputs u; in a cascade x_B is u_B y_A.
        r: transfers that the memories gave.
        x, y: population of s after the first and after the second pulse of each memristor.
        n_x, n_y: counts assigned to s; None without shots.
        populations: shape (levels, runs, cycles, *batch), levels as `LEVELS`, runs ending at x_A, y_A, x_B, y_B.
        valid, error_estimate: of each cycle.
    """

    x_set: Float[Array, "2 cycles ..."]
    r: Float[Array, "2 cycles ..."]
    x: Float[Array, "2 cycles ..."]
    y: Float[Array, "2 cycles ..."]
    n_x: Float[Array, "2 cycles ..."] | None
    n_y: Float[Array, "2 cycles ..."] | None
    populations: Float[Array, "levels 4 cycles ..."]
    valid: Bool[Array, "cycles ..."]
    error_estimate: Float[Array, "cycles ..."]


def run_star(star: Star, x_set, *, shots=None, key: PRNGKeyArray | None = None) -> StarLoop:
    """Both loops, cycle by cycle, as crossed feedback in a cascade has no other order.

    Args:
        star: the device.
        x_set: commanded inputs of A and B in [0, 1], shape (2, cycles, *batch).
        shots: repetitions of each of the four runs of a cycle, with `key`; None for expectation values.
        key: random key of the counts.

    Returns:
        A `StarLoop`.

    Raises:
        ValueError: inputs of another shape; shots below 1, fractional, without a key, or a key without shots; traced
            numbers of a star that is not `prepared()`.

    Example:
        >>> star = Star(memories=(MovingAverage(10.0), MovingAverage(10.0)), memory_inputs=CROSSED)
        >>> u = sine_input(periods=2, cycles_per_period=40)
        >>> loop = run_star(star, jnp.stack([u, u]))
    """
    check_shots(shots, key)
    x_set = real_array(x_set)
    if x_set.ndim < 2 or x_set.shape[0] != 2:
        raise ValueError(f"`x_set` must have shape (2, cycles, *batch), A first, but has {x_set.shape}.")
    if not is_traced(star):
        star = star.prepared()
    shape = jnp.broadcast_shapes(batch_shape(star), x_set.shape[2:])
    # The buffer's length is static, so the memories start outside jit, where a known window is known.
    memories = tuple(memory.init(shape) for memory in star.memories)
    x_set = jnp.broadcast_to(
        x_set.reshape(x_set.shape[:2] + (1,) * (len(shape) + 2 - x_set.ndim) + x_set.shape[2:]),
        (*x_set.shape[:2], *shape),
    )
    return _run_star(star, memories, x_set, None if shots is None else real_array(shots), key)


@eqx.filter_jit
def _run_star(star: Star, memories, x_set, shots, key) -> StarLoop:
    keys = None if key is None else jax.random.split(key, x_set.shape[1])

    def cycle(memories, now):
        x_k, key_k = now
        r = jnp.stack([memory.read(state) for memory, state in zip(star.memories, memories, strict=True)])
        if isinstance(star.method, ClosedForm):
            populations = star.closed_form(x_k, r)
            valid, error = jnp.all(jnp.isfinite(populations), axis=(0, 1)), jnp.zeros(x_k.shape[1:])
        else:
            solution = star.respond(x_k, r)
            populations = solution.populations[0]
            valid, error = jnp.all(solution.valid, axis=0), jnp.max(solution.error_estimate, axis=0)
        p = star.assigned(populations)
        counts = None if key_k is None else sample_counts(key_k, p, shots)
        if star.source == "model":
            fed = populations[0, ::2]
        else:
            fed = p[::2] if counts is None else counts[::2] / shots
        into = into_memories(star.memory_inputs, within_rounding(fed))
        memories = tuple(
            m.update(state, into[k]) for k, (m, state) in enumerate(zip(star.memories, memories, strict=True))
        )
        return memories, (r, populations, counts, valid, error)

    _, (r, populations, counts, valid, error) = jax.lax.scan(cycle, memories, (jnp.moveaxis(x_set, 1, 0), keys))
    r, populations = jnp.moveaxis(r, 0, 1), jnp.moveaxis(populations, 0, 2)
    counts = None if counts is None else jnp.moveaxis(counts, 0, 1)
    return StarLoop(
        x_set,
        r,
        populations[0, ::2],
        populations[0, 1::2],
        None if counts is None else counts[::2],
        None if counts is None else counts[1::2],
        populations,
        valid,
        error,
    )


def quadrupole_beam(field_angle_rad, polarization_angle_rad) -> Float[Array, "5 ..."]:
    """Relative Rabi frequencies on the lines F=0 to F=2, m_F = -2 ... 2, of a linearly polarized beam.

        m = 0:   sqrt(3)/2 |cos g sin 2f|,      m = +-1:  sqrt( (cos g cos 2f)^2 + (sin g cos f)^2 ) / sqrt 2,
        m = +-2: sqrt( (cos g sin 2f / 2)^2 + (sin g sin f)^2 ) / sqrt 2;     their squares sum to one.

    The size of the spherical components of the field gradient, a symmetric tensor of second rank: an electric
    quadrupole line from F=0 has no other geometry.

    Args:
        field_angle_rad: f, between beam and magnetic field.
        polarization_angle_rad: g, between the polarization and the plane of beam and field.

    Returns:
        Shape (5, *batch).

    References:
        [1] D. F. V. James, Appl. Phys. B 66, 181 (1998).
    """
    f, g = jnp.broadcast_arrays(real_array(field_angle_rad), real_array(polarization_angle_rad))
    none = math.sqrt(3) / 2 * jnp.abs(jnp.cos(g) * jnp.sin(2 * f))
    one = jnp.sqrt(((jnp.cos(g) * jnp.cos(2 * f)) ** 2 + (jnp.sin(g) * jnp.cos(f)) ** 2) / 2)
    two = jnp.sqrt(((jnp.cos(g) * jnp.sin(2 * f) / 2) ** 2 + (jnp.sin(g) * jnp.sin(f)) ** 2) / 2)
    return jnp.stack([two, one, none, one, two])


def _in_each_run(areas: Float[Array, "4 ..."], played: Float[Array, "4 4 ..."]) -> Float[Array, "4 4 ..."]:
    """Areas of the pulses in the runs that play them, zero in the others; a bad area reaches no run without it."""
    return jnp.where(played > 0, areas[:, None], 0.0)


def _level(m: int) -> int:
    return 1 + SUBLEVELS.index(m)

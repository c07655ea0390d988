"""Level graphs: levels, couplings and jumps, and the three schemes of the ion memristor.

    drho/dt = -i [H, rho] + sum_j ( L_j rho L_j^+ - {L_j^+ L_j, rho} / 2 )
    H = sum_j E_j |j><j| + 1/2 sum_k ( Omega_k exp(-i phi_k) |to_k><from_k| + h.c. )        (hbar = 1, rad/s, RWA)
    E_j(t) = E_j + sum_i w_ij c_i |Omega_i(t)|^2 with light shifts

Roles: v ("vacuum"), s ("signal"), m ("memory", the measured arm), l (leak). Pulse 1 drives v-s, pulse 2 drives s-m.
Detunings are laser minus line, delta_k = 2 pi detuning_k_hz. The phase of laser k enters the rotating frame as the
detuning does, so white frequency noise of that laser has the jump operator sqrt(2 D) sum_j (dE_j / d delta_k) |j><j|
with D = pi * FWHM linewidth; one source for both lines adds the two derivatives before squaring.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twin.batching import check_not_negative, check_values, physical, real_array


class Decay(eqx.Module):
    """Spontaneous decay, jump operator `sqrt(rate) |target><source|`.

    Args:
        source, target: level names.
        rate_per_s: rate, 1/s, shape (*batch).
    """

    source: str = eqx.field(static=True)
    target: str = eqx.field(static=True)
    rate_per_s: Float[Array, "..."] = physical()

    def __check_init__(self):
        check_not_negative("rate_per_s", self.rate_per_s, "1/s")


class Dephasing(eqx.Module):
    """White frequency noise, jump operator `sqrt(2 D) sum_j w_j |j><j|`: rho_jk is damped at `D (w_j - w_k)^2`.

    Args:
        weights: one number a level, in the order of the graph.
        rate_per_s: D in 1/s, shape (*batch); `pi` times the FWHM linewidth in Hz for weight one.
    """

    weights: tuple[float, ...] = eqx.field(static=True)
    rate_per_s: Float[Array, "..."] = physical()

    def __check_init__(self):
        check_not_negative("rate_per_s", self.rate_per_s, "1/s")


class LightShift(eqx.Module):
    """AC Stark shift by the light of a line: level j rises by `w_j coefficient |Omega(t)|^2` at once.

    Args:
        coupling: the two levels of the line. Omega is the sum of all drives between them; none, no shift.
        weights: w_j, one number a level, in the order of the graph.
        coefficient_s: rad/s of energy for each (rad/s)^2 of Rabi frequency, shape (*batch); either sign.
    """

    coupling: tuple[str, str] = eqx.field(static=True)
    weights: tuple[float, ...] = eqx.field(static=True)
    coefficient_s: Float[Array, "..."] = physical()

    def __check_init__(self):
        check_values(
            "coefficient_s", self.coefficient_s, lambda v: v == v, "finite", "give it in s, rad/s for rad^2/s^2"
        )

    @property
    def spread_s(self) -> Float[Array, "..."]:
        """Largest coefficient by which two levels move apart, s."""
        return (max(self.weights) - min(self.weights)) * jnp.abs(self.coefficient_s)


class LevelSystem(eqx.Module):
    """A small level graph in its rotating frame.

    Args:
        levels: names.
        couplings: `(from, to)` of each pulse, in the order in which pulses are given to `evolve`.
        energies_rad_s: rotating-frame energy of each level, rad/s, shape (levels, *batch).
        decays, dephasings: the jumps; none for a closed system.
        light_shifts: what the drives do to the energies.
    """

    levels: tuple[str, ...] = eqx.field(static=True)
    couplings: tuple[tuple[str, str], ...] = eqx.field(static=True)
    energies_rad_s: Float[Array, "levels ..."] = physical(1)
    decays: tuple[Decay, ...] = ()
    dephasings: tuple[Dephasing, ...] = ()
    light_shifts: tuple[LightShift, ...] = ()

    def __check_init__(self):
        if len(set(self.levels)) != len(self.levels):
            raise ValueError(f"`levels` must have distinct names, but is {self.levels}.")
        named = [n for pair in self.couplings for n in pair]
        named += [n for d in self.decays for n in (d.source, d.target)]
        named += [n for shift in self.light_shifts for n in shift.coupling]
        for name in named:
            if name not in self.levels:
                raise ValueError(f"level `{name}` is not in the graph {self.levels}; name one of these.")
        for pair in self.couplings:
            if pair[0] == pair[1]:
                raise ValueError(f"a coupling must join two levels, but {pair} joins one to itself.")
        for weighted in (*self.dephasings, *self.light_shifts):
            if len(weighted.weights) != len(self.levels):
                raise ValueError(
                    f"`weights` must have {len(self.levels)} entries, one a level, but has {len(weighted.weights)}."
                )
        if self.energies_rad_s.shape[:1] != (len(self.levels),):
            raise ValueError(
                f"`energies_rad_s` must have the leading axis {len(self.levels)}, one a level, "
                f"but has shape {self.energies_rad_s.shape}."
            )

    def index(self, level: str) -> int:
        """Position of a level in the graph."""
        return self.levels.index(level)

    def alone(self, k: int) -> tuple["LevelSystem", list[int]]:
        """The graph with coupling k only, its two levels in front and all named by place; and where each level was."""
        driven = [self.index(level) for level in self.couplings[k]]
        order = driven + [j for j in range(len(self.levels)) if j not in driven]
        name = {self.levels[j]: str(place) for place, j in enumerate(order)}
        decays = tuple(Decay(name[d.source], name[d.target], d.rate_per_s) for d in self.decays)
        dephasings = tuple(Dephasing(tuple(d.weights[j] for j in order), d.rate_per_s) for d in self.dephasings)
        # Light of other lines is off.
        shifts = tuple(
            LightShift(("0", "1"), tuple(shift.weights[j] for j in order), shift.coefficient_s)
            for shift in self.light_shifts
            if set(shift.coupling) == set(self.couplings[k])
        )
        levels = tuple(str(place) for place in range(len(order)))
        energies = self.energies_rad_s[np.array(order)]
        return LevelSystem(levels, (("0", "1"),), energies, decays, dephasings, shifts), order

    def refuse_light_shifts(self, solver: str) -> None:
        """Raises where a solver would leave light shifts out.

        Raises:
            ValueError: the graph has light shifts.
        """
        if self.light_shifts:
            raise ValueError(
                f"{solver} cannot follow light shifts, which change with the drive; leave `light_shifts` out "
                "(`stark_1_hz`, `stark_2_hz` of a device), or solve by StaticGrid, AreaSeries or Adaptive."
            )

    @property
    def closed(self) -> bool:
        """True without any jump operator: the Schrödinger equation holds."""
        return not (self.decays or self.dephasings)


def side_by_side(systems: Sequence[LevelSystem], shape: tuple[int, ...]) -> LevelSystem:
    """Graphs of the same levels and couplings as one batch, shape (systems, *shape).

    A jump that a graph lacks has rate zero there, and a light shift the coefficient zero.
    """
    stack = lambda row: jnp.stack([jnp.broadcast_to(value, shape) for value in row])

    def sums(terms: list, key: Callable, number: Callable) -> dict:
        """Number of each kind of term in each graph."""
        found: dict = {}
        for k, some in enumerate(terms):
            for term in some:
                row = found.setdefault(key(term), [jnp.zeros(())] * len(systems))
                row[k] = row[k] + number(term)
        return found

    rate = lambda jump: jump.rate_per_s
    decays = sums([s.decays for s in systems], lambda d: (d.source, d.target), rate)
    dephasings = sums([s.dephasings for s in systems], lambda d: d.weights, rate)
    shifts = sums([s.light_shifts for s in systems], lambda a: (a.coupling, a.weights), lambda a: a.coefficient_s)
    first = systems[0]
    return LevelSystem(
        first.levels,
        first.couplings,
        jnp.stack([stack([s.energies_rad_s[j] for s in systems]) for j in range(len(first.levels))]),
        tuple(Decay(source, target, stack(row)) for (source, target), row in decays.items()),
        tuple(Dephasing(weights, stack(row)) for weights, row in dephasings.items()),
        tuple(LightShift(coupling, weights, stack(row)) for (coupling, weights), row in shifts.items()),
    )


class Scheme(eqx.Module):
    """A way to make a memristor of the ion: roles, frame and read-out of one topology (static data).

    Attributes:
        levels: names, roles first.
        start: level in which the ion is prepared; `v`: theta_1 = 2 asin sqrt(x), `s`: theta_1 = 2 acos sqrt(x).
        slopes: dE_j / d delta_k for each laser k and level j.
        decays: (source, target, which) with `which` naming lifetime and branch: see `system`.
        dark: levels that do not fluoresce at 369.5 nm (the 2D3/2 ones).
    """

    name: str = eqx.field(static=True)
    levels: tuple[str, ...] = eqx.field(static=True)
    start: Literal["v", "s"] = eqx.field(static=True)
    slopes: tuple[tuple[float, ...], tuple[float, ...]] = eqx.field(static=True)
    decays: tuple[tuple[str, str, str], ...] = eqx.field(static=True)
    dark: tuple[str, ...] = eqx.field(static=True)

    def system(
        self,
        *,
        detuning_1_hz,
        detuning_2_hz,
        lifetime_s,
        branching,
        m_lifetime_s=math.inf,
        shared_linewidth_hz=None,
        linewidth_1_hz=None,
        linewidth_2_hz=None,
        light_shift_1_s=None,
        light_shift_2_s=None,
    ) -> LevelSystem:
        """The level graph with numbers.

        Args:
            detuning_1_hz, detuning_2_hz: laser minus line, Hz, shape (*batch).
            lifetime_s: lifetime of the 2D3/2 F=2 level(s), s; infinite switches decay off.
            branching: fraction of that decay to 2S1/2 F=0 (0.4).
            m_lifetime_s: lifetime of the ladder's top level, s, all of it lost to `l`.
            shared_linewidth_hz: FWHM linewidth of the one source of both lines, Hz; None for two sources.
            linewidth_1_hz, linewidth_2_hz: FWHM linewidths of two independent sources, Hz.
            light_shift_1_s, light_shift_2_s: rise of the line's own frequency by the light of its pulse, rad/s for each
                (rad/s)^2 of Rabi frequency; the detuning falls by as much. None for no shift.
        """
        delta = [2 * jnp.pi * real_array(d) for d in (detuning_1_hz, detuning_2_hz)]
        shape = jnp.broadcast_shapes(delta[0].shape, delta[1].shape)
        energies = jnp.stack(
            [jnp.broadcast_to(a * delta[0] + b * delta[1], shape) for a, b in zip(*self.slopes, strict=True)]
        )
        rate = 1 / real_array(lifetime_s)
        rates = {
            "to F=0": rate * real_array(branching),
            "to F=1": rate * (1 - real_array(branching)),
            "top": 1 / real_array(m_lifetime_s),
        }
        decays = tuple(Decay(a, b, rates[which]) for a, b, which in self.decays)
        dephasings = []
        if shared_linewidth_hz is not None:
            weights = tuple(a + b for a, b in zip(*self.slopes, strict=True))
            dephasings.append(Dephasing(weights, jnp.pi * real_array(shared_linewidth_hz)))
        for slopes, linewidth in zip(self.slopes, (linewidth_1_hz, linewidth_2_hz), strict=True):
            if linewidth is not None:
                dephasings.append(Dephasing(slopes, jnp.pi * real_array(linewidth)))
        couplings = (("v", "s"), ("s", "m"))
        shifts = tuple(
            # A line that rises is a detuning that falls.
            LightShift(coupling, tuple(-slope for slope in slopes), coefficient)
            for coupling, slopes, coefficient in zip(
                couplings, self.slopes, (light_shift_1_s, light_shift_2_s), strict=True
            )
            if coefficient is not None
        )
        return LevelSystem(self.levels, couplings, energies, decays, tuple(dephasings), shifts)

    @property
    def signal_is_dark(self) -> bool:
        """Whether "assigned to s" means "read dark"."""
        return "s" in self.dark

    def assigned_with_signal(self, populations: Float[Array, "levels ..."]) -> Float[Array, "..."]:
        """Population of the levels that the detection cannot tell from s: all dark ones, or all bright ones."""
        same = np.array([(name in self.dark) == self.signal_is_dark for name in self.levels])
        return jnp.sum(populations[same], axis=0)


# E_v = 0, E_s = -d1, E_m = -d1 + d2. v = 2S1/2 F=0, s = 2D3/2 F=2, m = 2S1/2 F=1: closed with three levels.
LAMBDA = Scheme(
    name="lambda",
    levels=("v", "s", "m"),
    start="v",
    slopes=((0.0, -1.0, -1.0), (0.0, 0.0, 1.0)),
    decays=(("s", "v", "to F=0"), ("s", "m", "to F=1")),
    dark=("s",),
)

# E_s = 0, E_v = -d1, E_m = -d2. s = 2S1/2 F=0; v and m are Zeeman sublevels of 2D3/2 F=2; l = 2S1/2 F=1.
V = Scheme(
    name="v",
    levels=("v", "s", "m", "l"),
    start="s",
    slopes=((-1.0, 0.0, 0.0, 0.0), (0.0, 0.0, -1.0, 0.0)),
    decays=(("v", "s", "to F=0"), ("v", "l", "to F=1"), ("m", "s", "to F=0"), ("m", "l", "to F=1")),
    dark=("v", "m"),
)

# E_v = 0, E_s = -d1, E_m = -d1 - d2. v = 2S1/2 F=0, s = 2D3/2 F=2, m = 3[3/2]1/2, which decays to `l` (2S1/2) and so
# counts as bright.
LADDER = Scheme(
    name="ladder",
    levels=("v", "s", "m", "l"),
    start="v",
    slopes=((0.0, -1.0, -1.0, 0.0), (0.0, 0.0, -1.0, 0.0)),
    decays=(("s", "v", "to F=0"), ("s", "l", "to F=1"), ("m", "l", "top")),
    dark=("s",),
)

SCHEMES = {scheme.name: scheme for scheme in (LAMBDA, V, LADDER)}

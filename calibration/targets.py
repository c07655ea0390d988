"""What pulses are wanted for: targets with units, additive with weights.

Each target is a number of a device under its commands, with a unit: an error, never negative and better small, or a
gain. `Weighted` adds them; a weight is "per unit of the target". Searches descend `loss`, the logarithm of a sum of
errors, so that steps stay useful however small it gets; with a gain in it, the sum itself.
"""

import math
from abc import abstractmethod
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twin.closed_form import flat_root
from twin.hysteresis import form_factor, signed_area
from twin.loop import Loop, Settings, run, sine_input
from twin.memristor import IonMemristor
from twin.planning import SOLVES_OF_CYCLE
from twin.sampled import SampledIon

# Gauss-Legendre nodes a side over the commanded square; 12 change the rms of the demo device by less than 1e-6.
_NODES = 10
_ENVELOPE_POINTS = 201
# An error of exactly zero has a logarithm all the same.
_NOTHING = 1e-30
_LOOPS = {
    "area": signed_area,
    "form_factor": form_factor,
    "saturation": lambda x, y: jnp.max(y),
}
# Whatever plays both pulses, and the laser offsets that are set with them, Hz.
Playing = IonMemristor | SampledIon
Offsets = tuple[Array, Array]


class AbstractTarget(eqx.Module):
    """A number that pulses are to make small (an error) or large (a gain)."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the number is called in results."""

    @property
    def unit(self) -> str:
        """Its unit; 1 for a plain number."""
        return "1"

    @property
    def is_gain(self) -> bool:
        """Whether it is better large; an error is better small."""
        return False

    @property
    def is_error(self) -> bool:
        """Whether it is never negative, and better small."""
        return not self.is_gain

    @property
    @abstractmethod
    def solves(self) -> float:
        """Solves of both pulses in one evaluation."""

    @abstractmethod
    def value(self, device: Playing, offsets: Offsets) -> Float[Array, ""]:
        """The number itself, in `unit`."""

    def cost(self, device: Playing, offsets: Offsets) -> Float[Array, ""]:
        """The number to descend, in `unit`: an error, or a gain with its sign changed."""
        value = self.value(device, offsets)
        return -value if self.is_gain else value

    def loss(self, device: Playing, offsets: Offsets) -> Float[Array, ""]:
        """What a search descends."""
        cost = self.cost(device, offsets)
        return jnp.log(cost + _NOTHING) if self.is_error else cost

    def of_loss(self, loss: float) -> float:
        """The number that belongs to a loss."""
        if self.is_error:
            return math.exp(min(loss, 700.0))
        return -loss if self.is_gain else loss


class Inputs(NamedTuple):
    """Commands and their weights, which sum to one, shape (commands,) each."""

    x_set: Float[Array, " n"]
    r_set: Float[Array, " n"]
    weight: Float[Array, " n"]

    @classmethod
    def square(cls) -> "Inputs":
        """The commanded square, by Gauss-Legendre quadrature."""
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        x, r = (a.ravel() for a in np.meshgrid((nodes + 1) / 2, (nodes + 1) / 2, indexing="ij"))
        return cls(*(jnp.asarray(a) for a in (x, r, np.outer(weights, weights).ravel() / 4)))

    @classmethod
    def of_loop(cls, loop: Loop, cycles: int) -> "Inputs":
        """The commands of the last `cycles` cycles of a loop, each as often as it comes."""
        weight = jnp.full(cycles, 1 / cycles)
        return cls(loop.x_set[-cycles:], loop.r[-cycles:], weight)


class Obedience(AbstractTarget):
    """The rms of `y - (1 - r_set) x_set` over a distribution of commands, the square where none is given."""

    inputs: Inputs | None = None

    @property
    def name(self) -> str:
        return "obedience_rms"

    @property
    def solves(self) -> float:
        return float(_NODES**2 if self.inputs is None else len(self.inputs.weight))

    def value(self, device: Playing, offsets: Offsets) -> Float[Array, ""]:
        x, r, weight = Inputs.square() if self.inputs is None else self.inputs
        return flat_root(jnp.sum(weight * disobedience(device, x, r, offsets) ** 2))


class LoopShape(AbstractTarget):
    """A number of the steady-state loop of a sin^2 input, fed back through the device's memory.

    Args:
        kind: "area", "form_factor", or "saturation", the largest output.
        cycles_per_period: cycles in one period of the input.
        periods: periods run; the last one is measured, so the window must fit in those before it.
    """

    kind: str = eqx.field(static=True)
    cycles_per_period: int = eqx.field(static=True, default=40)
    periods: int = eqx.field(static=True, default=2)

    def __check_init__(self):
        if self.kind not in _LOOPS:
            raise ValueError(f"`kind` must be one of {', '.join(_LOOPS)}, but is {self.kind!r}.")

    @property
    def name(self) -> str:
        return self.kind

    @property
    def is_gain(self) -> bool:
        return True

    @property
    def solves(self) -> float:
        return _loop_solves(self.periods, self.cycles_per_period)

    def value(self, device: Playing, offsets: Offsets) -> Float[Array, ""]:
        return self.of_loop(*self.loop(device, offsets))

    def of_loop(self, x: Float[Array, " cycles"], y: Float[Array, " cycles"]) -> Float[Array, ""]:
        """The number of a loop."""
        return _LOOPS[self.kind](x, y)

    def loop(self, device: Playing, offsets: Offsets) -> tuple[Array, Array]:
        """x and y of the last period."""
        return last_period(device, offsets, self.periods, self.cycles_per_period)


class LoopCurve(AbstractTarget):
    """The rms distance of the steady-state loop of a sin^2 input from a given one, cycle by cycle.

    Args:
        x, y: the wanted loop, one point a cycle of a period of the input.
        periods: periods run; the last one is compared.
    """

    x: Float[Array, " cycles"]
    y: Float[Array, " cycles"]
    periods: int = eqx.field(static=True, default=2)

    @property
    def name(self) -> str:
        return "curve_rms"

    @property
    def solves(self) -> float:
        return _loop_solves(self.periods, len(self.x))

    def value(self, device: Playing, offsets: Offsets) -> Float[Array, ""]:
        x, y = self.loop(device, offsets)
        return flat_root(jnp.mean((x - self.x) ** 2 + (y - self.y) ** 2))

    def loop(self, device: Playing, offsets: Offsets) -> tuple[Array, Array]:
        """x and y of the last period."""
        return last_period(device, offsets, self.periods, len(self.x))


class Transfer(AbstractTarget):
    """The population that is not in one level after the commands (x_set, r_set): infidelity of a state transfer."""

    level: str = eqx.field(static=True)
    x_set: float = eqx.field(static=True, default=1.0)
    r_set: float = eqx.field(static=True, default=1.0)

    @property
    def name(self) -> str:
        return "infidelity"

    @property
    def solves(self) -> float:
        return 1.0

    def value(self, device: Playing, offsets: Offsets) -> Float[Array, ""]:
        levels = ion_of(device).system(*offsets).levels
        if self.level not in levels:
            raise ValueError(f"`level` must be one of {', '.join(levels)}, but is {self.level!r}.")
        point = jnp.full(1, self.x_set), jnp.full(1, self.r_set)
        populations = device.under(Settings(*offsets))(*point, alone=False).populations
        return 1 - populations[levels.index(self.level), 0]


class Leakage(AbstractTarget):
    """Population outside the levels in use: v and s after pulse 1 alone, v, s and m after both; mean of the square."""

    @property
    def name(self) -> str:
        return "leakage"

    @property
    def solves(self) -> float:
        return float(SOLVES_OF_CYCLE * _NODES**2)

    def value(self, device: Playing, offsets: Offsets) -> Float[Array, ""]:
        x, r, weight = Inputs.square()
        respond = device.under(Settings(*offsets))
        alone = respond(x, r, alone=True).populations
        both = respond(x, r, alone=False).populations
        return jnp.sum(weight * (jnp.sum(alone[2:], axis=0) + jnp.sum(both[3:], axis=0)))


class Retention(AbstractTarget):
    """The rms over the square of the change of y when it is read `hold_s` later, in the dark.

    Without drives populations obey the rate equations of the decays alone, which are solved exactly.
    """

    hold_s: Float[Array, ""] = eqx.field(converter=jnp.asarray)

    @property
    def name(self) -> str:
        return "lost_in_hold"

    @property
    def solves(self) -> float:
        return float(_NODES**2)

    def value(self, device: Playing, offsets: Offsets) -> Float[Array, ""]:
        x, r, weight = Inputs.square()
        system = ion_of(device).system(*offsets)
        rates = jnp.zeros((len(system.levels),) * 2)
        for decay in system.decays:
            source, target = system.index(decay.source), system.index(decay.target)
            rates = rates.at[target, source].add(decay.rate_per_s).at[source, source].add(-decay.rate_per_s)
        populations = device.under(Settings(*offsets))(x, r, alone=False).populations
        later = jax.scipy.linalg.expm(rates * self.hold_s) @ populations
        change = device.signal(later) - device.signal(populations)
        return flat_root(jnp.sum(weight * change**2))


class AbstractPrice(AbstractTarget):
    """A number of the drives at full command alone; nothing is solved for it."""

    @property
    def solves(self) -> float:
        return 0.0

    def value(self, device: Playing, offsets: Offsets) -> Float[Array, ""]:
        del offsets
        return self.of_drives(*_full_command(device))

    @abstractmethod
    def of_drives(self, drives: Float[Array, "steps ..."], step_s: Float[Array, ""]) -> Float[Array, ""]:
        """The number of drives in rad/s, real and imaginary parts beside each other, and of their step in time."""


class Energy(AbstractPrice):
    """The integral of |Omega|^2 at full command, each channel by itself, added up."""

    @property
    def name(self) -> str:
        return "energy"

    @property
    def unit(self) -> str:
        return "rad^2/s"

    def of_drives(self, drives: Float[Array, "steps ..."], step_s: Float[Array, ""]) -> Float[Array, ""]:
        return jnp.sum(drives**2) * step_s


class Roughness(AbstractPrice):
    """The rms slope of the drives of both pulses at full command: small for smooth pulses.

    Of sampled pulses it is that from slice to slice, which grows as the root of the slices a held sample is cut into.
    """

    @property
    def name(self) -> str:
        return "roughness"

    @property
    def unit(self) -> str:
        return "rad/s^2"

    def of_drives(self, drives: Float[Array, "steps ..."], step_s: Float[Array, ""]) -> Float[Array, ""]:
        steps = jnp.diff(drives, axis=0, prepend=0.0, append=0.0)
        return jnp.sqrt(jnp.sum(steps**2) / len(steps)) / step_s


class Duration(AbstractPrice):
    """How long both pulses take: sqrt(12) times the rms spread in time of |Omega|^2, exact for one square pulse."""

    @property
    def name(self) -> str:
        return "duration"

    @property
    def unit(self) -> str:
        return "s"

    def of_drives(self, drives: Float[Array, "steps ..."], step_s: Float[Array, ""]) -> Float[Array, ""]:
        n = len(drives)
        power = jnp.sum(drives.reshape(n, -1) ** 2, axis=1)
        share = power / jnp.sum(power)
        t = jnp.arange(n) * step_s
        spread = jnp.sum(share * (t - jnp.sum(share * t)) ** 2)
        return jnp.sqrt(12 * spread + step_s**2)  # within its step the drive is constant


class Weighted(AbstractTarget):
    """A sum of targets, each with its weight per unit; gains count with a minus.

    Args:
        targets: what is added. weights: one each, positive.
    """

    targets: tuple[AbstractTarget, ...]
    weights: Float[Array, " targets"] = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        if len(self.targets) != len(self.weights):
            raise ValueError(f"give one weight a target, not {len(self.weights)} for {len(self.targets)}.")

    @property
    def name(self) -> str:
        return "weighted_sum"

    @property
    def is_error(self) -> bool:
        return all(target.is_error for target in self.targets)

    @property
    def solves(self) -> float:
        return sum(target.solves for target in self.targets)

    def value(self, device: Playing, offsets: Offsets) -> Float[Array, ""]:
        costs = [target.cost(device, offsets) for target in self.targets]
        return jnp.sum(self.weights * jnp.stack(costs))


def loop_target(name: str, device: Playing, *, cycles_per_period: int = 40) -> LoopShape:
    """A `LoopShape` with enough periods for the device's memory to reach its steady state."""
    return LoopShape(name, cycles_per_period, settled_periods(device, cycles_per_period))


def settled_periods(device: Playing, cycles_per_period: int) -> int:
    """Periods to run, of which the last one is steady."""
    window = float(getattr(device.memory, "window_cycles", 8 * getattr(device.memory, "tau_cycles", 1.0)))
    return 2 + math.ceil(window / cycles_per_period)


def last_period(device: Playing, offsets: Offsets, periods: int, cycles_per_period: int) -> tuple[Array, Array]:
    """x and y of the last period of a sin^2 input."""
    inputs = sine_input(periods=periods, cycles_per_period=cycles_per_period)
    loop = run(device, inputs, detuning_1_set_hz=offsets[0], detuning_2_set_hz=offsets[1])
    last = slice(-cycles_per_period - 1, -1)
    return loop.x[last], loop.y[last]


def disobedience(
    device: Playing, x_set: Float[Array, " n"], r_set: Float[Array, " n"], offsets: Offsets
) -> Float[Array, " n"]:
    """`y - (1 - r_set) x_set`: how far the output population is from what was commanded."""
    response = device.under(Settings(*offsets))(x_set, r_set, alone=False)
    return device.signal(response.populations) - (1 - r_set) * x_set


def ion_of(device: Playing) -> IonMemristor:
    """The ion that plays the pulses."""
    return device.ion if isinstance(device, SampledIon) else device


def parts(target: AbstractTarget) -> tuple[AbstractTarget, ...]:
    """The terms of a sum, or the target itself."""
    return target.targets if isinstance(target, Weighted) else (target,)


def _loop_solves(periods: int, cycles: int) -> float:
    return SOLVES_OF_CYCLE * (periods * cycles + 1)


def _full_command(device: Playing) -> tuple[Float[Array, "steps ..."], Float[Array, ""]]:
    """Drives at full command, real and imaginary parts beside each other, rad/s, and the step in time, s."""
    if isinstance(device, SampledIon):
        parts = [device.real_rad_s] + ([] if device.imag_rad_s is None else [device.imag_rad_s])
        return jnp.stack(parts, axis=-1), device.slice_s
    begin, end = device.window(False)
    step_s = (end - begin) / _ENVELOPE_POINTS
    t = begin + step_s * (0.5 + jnp.arange(_ENVELOPE_POINTS))
    pulses = device.pulses(*device.largest_areas)
    return jnp.stack([pulse.drive(t, t).real for pulse in pulses], axis=-1), step_s

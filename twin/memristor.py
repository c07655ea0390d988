"""The memristor on one trapped ion; beside it stands the photonic element of `twin.photonic`.

`run`, `stream` and `Loop` of `twin.loop`, and the methods of `twin.planning`, are offered here too, so that one import
is enough.
"""

import dataclasses
import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twin import area_table, phonons, planning, shots
from twin import motion as single_mode
from twin.area_series import AreaSeries, Timing, tabulate
from twin.area_table import AreaTable
from twin.batching import (
    batch_shape,
    check_not_negative,
    check_positive,
    check_values,
    is_traced,
    physical,
    real_array,
)
from twin.closed_form import separated_coherence, separated_populations, set_area
from twin.dynamics import Adaptive, Solution, StaticGrid, evolve
from twin.emulator import EmulatedSeries, EmulatedTable
from twin.levels import SCHEMES, LevelSystem, Scheme
from twin.loop import AbstractMemristor, Loop, Responder, Response, Settings, averaged, run, sine_input, stream
from twin.memory import AbstractMemory
from twin.phonons import Motion
from twin.photonic import PhotonicMemristor
from twin.planning import Automatic, ClosedForm, Lindblad, Method, coarsened, plan_steps, planned, ready
from twin.pulses import Gaussian
from twin.readout import assignment_probability
from twin.slow_noise import SlowNoise

__all__ = [
    "AbstractMemristor",
    "AreaSeries",
    "Automatic",
    "ClosedForm",
    "IonMemristor",
    "Lindblad",
    "Loop",
    "PhotonicMemristor",
    "Settings",
    "coarsened",
    "plan_steps",
    "planned",
    "run",
    "sine_input",
    "stream",
]


class IonMemristor(AbstractMemristor):
    """The memristor on one trapped 171Yb+ ion: two Gaussian pulses on three (or four) levels.

    The controller sets the areas theta_1 and theta_2 from `x_set` and `r_set` for its *nominal* widths; the ion sees

        peak_k = amplitude_k rabi_scale_k theta_k / (sqrt(2 pi) nominal_sigma_k_s),   times the Debye-Waller factor

    at the actual width `sigma_k_s` and the detuning 2 pi (`detuning_k_hz` + `detuning_k_set_hz`), laser minus line.

    Args:
        memory, source: feedback kernel, and the inputs it averages: see `AbstractMemristor`.
        scheme: "lambda" (default), "v" or "ladder": `twin.levels`.
        method: `Lindblad()` (default), `ClosedForm()`, `Automatic()`, or by name `StaticGrid()`, `AreaSeries()`,
            `Adaptive()`.
        steps: number of grid steps of the two kinds of run, for `StaticGrid` with traced values: `plan_steps`.
        phonon_nodes: quadrature nodes of the thermal average; 1 only for `n_bar` = 0 and no heating.
        rabi_scale_1, rabi_scale_2: actual over nominal Rabi frequency.
        detuning_1_hz, detuning_2_hz: laser minus line, Hz.
        laser_linewidth_hz: FWHM linewidth of one source shared by both lines, Hz.
        laser_linewidth_1_hz, laser_linewidth_2_hz: FWHM linewidths of two independent sources, Hz.
        n_bar: mean phonon number at preparation.
        heating_rate_per_s: phonons gained a second. Pulse k sees the mean number at its centre; the spread that
            heating adds between the pulses, of second order in eta^2, is neglected.
        eta_1, eta_2: Lamb-Dicke parameters of the two beams; 0 leaves the motion out.
        readout_error_bright, readout_error_dark: bright ion read dark, dark ion read bright.
        sigma_1_s, sigma_2_s: actual widths of the Rabi envelopes, s.
        nominal_sigma_1_s, nominal_sigma_2_s: widths that the controller believes in, s; None for the actual ones, so
            that the area does not depend on the width.
        separation_s: centre of pulse 2 minus centre of pulse 1, s.
        lead_s, tail_s: time from preparation to the first centre, and from the last centre to read-out, s. A run of
            pulse 1 alone is read `tail_s` after that pulse.
        lifetime_s: of 2D3/2 F=2, s; infinite for no decay. branching: fraction of it to 2S1/2 F=0.
        m_lifetime_s: of the ladder's top level, s.
        stark_1_hz, stark_2_hz: light shift of each line by its own pulse, Hz: at the peak of a pulse of area pi and the
            nominal width. The line's frequency rises by `stark_k_hz (Omega_k(t) / Omega_pi,k)^2` and the detuning falls
            by it. Omega_k is that of the carrier, slowed by the motion; the true shift is not, a difference of second
            order in eta. None for no shift, which costs nothing.
        amplitude_1, amplitude_2: commanded factors on the nominal Rabi frequencies (1 unless pulses are optimized).
        motion: the modes that carry the ion, where one mode with `eta_1`, `eta_2` and `phonon_nodes` does not describe
            them; `n_bar` and `heating_rate_per_s` are then those of its reference mode.
        slow_noise: of amplitudes and detunings, new in each shot; responses are averaged over it (`twin.shots`).
    """

    memory: AbstractMemory
    source: str = eqx.field(static=True, default="measured")
    scheme: str = eqx.field(static=True, default="lambda")
    method: Method = eqx.field(default_factory=Lindblad)
    steps: tuple[int, int] | None = eqx.field(static=True, default=None)
    phonon_nodes: int = eqx.field(static=True, default=1)
    rabi_scale_1: Float[Array, "..."] = physical(default=1.0)
    rabi_scale_2: Float[Array, "..."] = physical(default=1.0)
    detuning_1_hz: Float[Array, "..."] = physical(default=0.0)
    detuning_2_hz: Float[Array, "..."] = physical(default=0.0)
    laser_linewidth_hz: Float[Array, "..."] = physical(default=0.0)
    laser_linewidth_1_hz: Float[Array, "..."] = physical(default=0.0)
    laser_linewidth_2_hz: Float[Array, "..."] = physical(default=0.0)
    n_bar: Float[Array, "..."] = physical(default=0.0)
    heating_rate_per_s: Float[Array, "..."] = physical(default=0.0)
    eta_1: Float[Array, "..."] = physical(default=0.0)
    eta_2: Float[Array, "..."] = physical(default=0.0)
    readout_error_bright: Float[Array, "..."] = physical(default=0.0)
    readout_error_dark: Float[Array, "..."] = physical(default=0.0)
    sigma_1_s: Float[Array, "..."] = physical(default=20e-6)
    sigma_2_s: Float[Array, "..."] = physical(default=20e-6)
    nominal_sigma_1_s: Float[Array, "..."] | None = physical(default=None)
    nominal_sigma_2_s: Float[Array, "..."] | None = physical(default=None)
    separation_s: Float[Array, "..."] = physical(default=120e-6)
    lead_s: Float[Array, "..."] = physical(default=100e-6)
    tail_s: Float[Array, "..."] = physical(default=100e-6)
    lifetime_s: Float[Array, "..."] = physical(default=52.7e-3)
    branching: Float[Array, "..."] = physical(default=0.4)
    m_lifetime_s: Float[Array, "..."] = physical(default=math.inf)
    stark_1_hz: Float[Array, "..."] | None = physical(default=None)
    stark_2_hz: Float[Array, "..."] | None = physical(default=None)
    amplitude_1: Float[Array, "..."] = physical(default=1.0)
    amplitude_2: Float[Array, "..."] = physical(default=1.0)
    motion: Motion | None = None
    slow_noise: SlowNoise | None = None

    def __check_init__(self):
        if self.scheme not in SCHEMES:
            raise ValueError(f"`scheme` must be one of {tuple(SCHEMES)}, but is {self.scheme!r}.")
        for name in ("sigma_1_s", "sigma_2_s", "nominal_sigma_1_s", "nominal_sigma_2_s"):
            check_positive(name, getattr(self, name), "seconds")
        for name in ("rabi_scale_1", "rabi_scale_2", "amplitude_1", "amplitude_2", "n_bar", "eta_1", "eta_2"):
            check_not_negative(name, getattr(self, name), "a plain number")
        for name in ("laser_linewidth_hz", "laser_linewidth_1_hz", "laser_linewidth_2_hz"):
            accept = lambda v: v >= 0
            check_values(
                name, getattr(self, name), accept, "finite and, for a linewidth, not negative", "give it in Hz"
            )
        for name in ("detuning_1_hz", "detuning_2_hz", "stark_1_hz", "stark_2_hz"):
            check_values(name, getattr(self, name), lambda v: v == v, "finite", "give it in Hz")
        for name in ("separation_s", "lead_s", "tail_s"):
            check_not_negative(name, getattr(self, name), "seconds")
        check_not_negative("heating_rate_per_s", self.heating_rate_per_s, "phonons a second")
        for name in ("readout_error_bright", "readout_error_dark", "branching"):
            check_values(name, getattr(self, name), lambda v: (v >= 0) & (v <= 1), "in [0, 1]", "it is a probability")
        for name in ("lifetime_s", "m_lifetime_s"):
            # Infinite is allowed here, no decay; its inverse, the rate, is what must be finite.
            with np.errstate(divide="ignore"):
                rate = None if is_traced(getattr(self, name)) else 1 / np.asarray(getattr(self, name))
            check_values(name, rate, lambda v: v >= 0, "positive (its inverse, the rate, finite)", "give it in seconds")
        if self.motion is not None:
            own = [eta for eta in (self.eta_1, self.eta_2) if not is_traced(eta)]
            if self.phonon_nodes > 1 or any(np.any(np.asarray(eta) > 0) for eta in own):
                raise ValueError(
                    "`motion` has Lamb-Dicke parameters of its own; leave eta_1, eta_2 and phonon_nodes out."
                )
        elif self.phonon_nodes == 1 and not is_traced(self.n_bar, self.heating_rate_per_s):
            moving = np.any(np.asarray(self.n_bar) > 0) or np.any(np.asarray(self.heating_rate_per_s) > 0)
            if moving:
                raise ValueError(
                    "`phonon_nodes` must be larger than 1 for a moving ion (`n_bar` or `heating_rate_per_s` above 0), "
                    "but is 1; 8 nodes serve mean phonon numbers up to 20."
                )

    # ------------------------------------------------------------------------------------------------ the contract

    def prepared(self, x_set, settings: Settings) -> "IonMemristor":
        device = self
        if isinstance(device.method, Automatic):
            device = dataclasses.replace(device, method=planning.chosen(device, x_set, settings))
        cycles = x_set.shape[0] // settings.count if jnp.ndim(x_set) else 1
        if is_traced(device, settings):
            return device  # what must be planned is refused where it is needed
        return ready(device, cycles=cycles, detuning_set_hz=settings.largest_hz)

    def under(self, settings: Settings) -> Responder:
        by_area = self.by_area(settings, self.largest_areas)

        def respond(x_set, r_set, *, alone, of_cycle=None) -> Response:
            return by_area(*self.areas(x_set, r_set), alone=alone, of_cycle=of_cycle)

        return respond

    def by_area(self, settings: Settings, largest: tuple[Float[Array, "..."], Float[Array, "..."]]) -> Responder:
        """What answers areas, rad, in place of commands: those that an ion at rest would see, up to `largest`."""
        method = self.method
        if isinstance(method, Automatic | Lindblad):
            raise ValueError(
                f"`{type(method).__name__}` is decided from known values by `run`, `prepared` and `planned`; "
                "inside jit, grad or vmap name the method: AreaSeries or StaticGrid, planned for the values to come."
            )
        if self.slow_noise is not None:
            return shots.averaging(self, settings, largest)
        table = self.tabulated(settings, largest) if isinstance(method, AreaSeries) else None
        # With many nodes it pays to average the series, once, rather than every cycle.
        folded = table is not None and self.motion is not None
        if folded:
            table = area_table.averaged(table, *self.carrier_factors(len(batch_shape(self)), jnp.maximum(*largest)))
        if isinstance(method, EmulatedSeries):
            table = method.table(self, settings)
        moves = self.moves and not folded

        def respond(theta_1, theta_2, *, alone, of_cycle=None) -> Response:
            now = settings if of_cycle is None else dataclasses.replace(settings, of_cycle=of_cycle)
            if moves:
                factor_1, factor_2, weights = self.carrier_factors(jnp.ndim(theta_1), jnp.maximum(*largest))
                theta_1, theta_2 = factor_1 * theta_1, factor_2 * theta_2
            elif not folded:
                theta_1, theta_2 = self.at_rest(theta_1, theta_2)
            if isinstance(table, AreaTable) and isinstance(method, AreaSeries):
                response = table.respond(theta_1, theta_2, now.of_cycle, alone, method.grid.error)
            elif isinstance(table, EmulatedTable):
                response = table.respond(theta_1, theta_2, now.of_cycle, alone)
            elif isinstance(method, ClosedForm):
                response = self._closed_form(theta_1, None if alone is True else jnp.where(alone, 0.0, theta_2))
            else:
                theta_2 = None if alone is True else jnp.where(alone, 0.0, theta_2)
                response = self._solve(method, theta_1, theta_2, *now.by_cycle(), alone)
            return averaged(response, weights) if moves else response

        return respond

    def signal(self, populations) -> Float[Array, "..."]:
        return populations[1]

    def assigned(self, populations) -> Float[Array, "..."]:
        scheme = self._scheme
        # Whatever shines like s is assigned to s: all dark levels, or all bright ones.
        p = scheme.assigned_with_signal(populations)
        bright, dark = self.readout_error_bright, self.readout_error_dark
        if scheme.signal_is_dark:
            return assignment_probability(p, bright, dark)
        return assignment_probability(p, dark, bright)

    @property
    def level_count(self) -> int:
        return len(self._scheme.levels)

    def assigned_next(self, populations) -> Float[Array, "..."]:
        scheme = self._scheme
        if "top" in {which for _, _, which in scheme.decays}:
            raise ValueError("the ladder's m decays at once, so that no second detection finds it; leave n_m out.")
        bright, dark = self.readout_error_bright, self.readout_error_dark
        # A pulse exchanges s and m, and the ion is detected again.
        exchanged = {"s": "m", "m": "s"}
        total = jnp.zeros_like(populations[0])
        for level, population in zip(scheme.levels, populations, strict=True):
            first, second = level in scheme.dark, exchanged.get(level, level) in scheme.dark
            read_dark = [1 - dark if is_dark else bright for is_dark in (first, second)]
            # Not s at first, then m: bright, then dark where s is dark; the other way round where s is bright.
            both = [1 - read_dark[0], read_dark[1]] if scheme.signal_is_dark else [read_dark[0], 1 - read_dark[1]]
            total = total + population * both[0] * both[1]
        return total

    # ------------------------------------------------------------------------------------------------ set points

    @property
    def start(self) -> str:
        """The level that the ion is prepared in."""
        return self._scheme.start

    @property
    def _scheme(self) -> Scheme:
        return SCHEMES[self.scheme]

    def areas(self, x_set, r_set) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Areas that the ion at rest sees for these commands, rad: theta_1 = 2 asin sqrt(x) (V: 2 acos), theta_2."""
        commanded = set_area(x_set if self.start == "v" else 1 - x_set)
        ratio_1 = 1.0 if self.nominal_sigma_1_s is None else self.sigma_1_s / self.nominal_sigma_1_s
        ratio_2 = 1.0 if self.nominal_sigma_2_s is None else self.sigma_2_s / self.nominal_sigma_2_s
        theta_1 = self.amplitude_1 * self.rabi_scale_1 * ratio_1 * commanded
        return theta_1, self.amplitude_2 * self.rabi_scale_2 * ratio_2 * set_area(r_set)

    @property
    def moves(self) -> bool:
        """Whether responses are averaged over phonon numbers."""
        return self.phonon_nodes > 1 or self.motion is not None

    def carrier_factors(
        self, axes: int, area_rad=None
    ) -> tuple[Float[Array, "nodes ..."], Float[Array, "nodes ..."], Float[Array, "nodes ..."]]:
        """Debye-Waller factor of each pulse at each node of the thermal average, and the weights.

        Nodes come first, before the `axes` axes of the cycles and their batch. `area_rad` is the largest area of a
        pulse, where it is not one of the two Gaussians'.
        """
        gained = [self.heating_rate_per_s * t for t in (self.lead_s, self.lead_s + self.separation_s)]
        if self.motion is None:
            pulses = list(zip((self.eta_1, self.eta_2), gained, strict=True))
            (first, second), weights = single_mode.carrier_factors(self.n_bar, self.phonon_nodes, pulses, axes)
        else:
            pulses = list(zip((1, 2), gained, strict=True))
            area = jnp.maximum(*self.largest_areas) if area_rad is None else area_rad
            (first, second), weights = phonons.carrier_factors(self.motion, self.n_bar, pulses, axes, area)
        return first, second, weights

    def at_rest(self, theta_1, theta_2) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Areas slowed by the zero-point motion alone: those of an ion whose modes are all in their ground state."""
        factor_1, factor_2, _ = self.carrier_factors(jnp.ndim(theta_1))
        return factor_1[0] * theta_1, factor_2[0] * theta_2

    def system(self, detuning_1_set_hz, detuning_2_set_hz) -> LevelSystem:
        """The level graph at these laser offsets."""
        return self._scheme.system(
            detuning_1_hz=self.detuning_1_hz + detuning_1_set_hz,
            detuning_2_hz=self.detuning_2_hz + detuning_2_set_hz,
            lifetime_s=self.lifetime_s,
            branching=self.branching,
            m_lifetime_s=self.m_lifetime_s,
            shared_linewidth_hz=self.laser_linewidth_hz,
            linewidth_1_hz=self.laser_linewidth_1_hz,
            linewidth_2_hz=self.laser_linewidth_2_hz,
            light_shift_1_s=self._light_shift_s(1),
            light_shift_2_s=self._light_shift_s(2),
        )

    def _light_shift_s(self, pulse: int) -> Float[Array, "..."] | None:
        """2 pi stark / Omega_pi^2 with Omega_pi = pi / (sqrt(2 pi) nominal sigma)."""
        stark_hz, nominal_s = getattr(self, f"stark_{pulse}_hz"), getattr(self, f"nominal_sigma_{pulse}_s")
        sigma_s = getattr(self, f"sigma_{pulse}_s") if nominal_s is None else nominal_s
        return None if stark_hz is None else 4 * stark_hz * sigma_s**2

    def pulses(self, theta_1, theta_2=None) -> tuple[Gaussian, ...]:
        """The waveforms of these areas, the centre of pulse 1 at time zero; pulse 1 alone without `theta_2`."""
        both = self.timing.pulses(theta_1, 0.0 if theta_2 is None else theta_2)
        return both[:1] if theta_2 is None else both

    def window(self, alone) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """From preparation to read-out, s."""
        return -self.lead_s, self.tail_s + jnp.where(alone, 0.0, self.separation_s)

    @property
    def timing(self) -> Timing:
        """Widths and times of both pulses."""
        return Timing(self.sigma_1_s, self.sigma_2_s, self.separation_s, self.lead_s, self.tail_s)

    @property
    def largest_areas(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Areas at full command, rad, of the ion at rest."""
        full = real_array(1.0)
        return self.areas(full if self.start == "v" else 1 - full, full)

    # ------------------------------------------------------------------------------------------------ solving

    def tabulated(self, settings: Settings, largest) -> AreaTable:
        """Series of an `AreaSeries` device at its settings, for areas up to `largest`, rad."""
        system = self.system(settings.detuning_1_hz, settings.detuning_2_hz)
        assert isinstance(self.method, AreaSeries)
        return tabulate(self.method, system, self.timing, largest, self.start)

    def _closed_form(self, theta_1, theta_2) -> Response:
        areas = (theta_1, 0.0 if theta_2 is None else theta_2, self.start)
        populations = list(separated_populations(*areas))
        zero = jnp.zeros_like(populations[0])
        stacked = jnp.stack(populations + [zero] * (len(self._scheme.levels) - 3))
        return Response(
            stacked,
            jnp.stack([zero, separated_coherence(*areas)]),
            jnp.all(jnp.isfinite(stacked), axis=0),
            zero,
            "closed form",
        )

    def _solve(self, method: StaticGrid | Adaptive, theta_1, theta_2, d1, d2, alone) -> Response:
        if isinstance(method, StaticGrid) and method.steps is None and self.steps is not None:
            method = dataclasses.replace(method, steps=self.steps[0 if alone is True else 1])
        solution: Solution = evolve(
            self.system(d1, d2),
            self.pulses(theta_1, theta_2),
            start=self.start,
            window_s=self.window(alone),
            method=method,
        )
        n = len(self._scheme.levels)
        name = "adaptive" if isinstance(method, Adaptive) else "static grid"
        # v and s are the first two levels, so their coherence is the first pair.
        return Response(
            solution.populations[0], solution.state[0, n : n + 2], solution.valid, solution.error_estimate, name
        )

    # ------------------------------------------------------------------------------------------------ choosing

    def closed_form_error(self, x_set, r_set, detuning_1_set_hz=0.0, detuning_2_set_hz=0.0) -> Float[Array, "..."]:
        """Bound on the error of `ClosedForm` in any population: see `twin.planning.closed_form_error`."""
        return planning.closed_form_error(self, x_set, r_set, detuning_1_set_hz, detuning_2_set_hz)

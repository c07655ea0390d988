"""The two memristors: one trapped ion, and the photonic element whose parameters read alike.

`run`, `stream` and `Loop` of `twin.loop` are offered here too, so that one import is enough.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfc
from jaxtyping import Array, Float

from twin import grid as grids
from twin.batching import batch_shape, check_not_negative, check_positive, check_values, is_traced, physical, real_array
from twin.closed_form import flat_root, overlap_bound, separated_amplitudes, set_area
from twin.dynamics import Adaptive, Solution, StaticGrid, evolve
from twin.levels import SCHEMES, LevelSystem, Scheme
from twin.loop import AbstractMemristor, Loop, Response, run, sine_input, stream
from twin.memory import AbstractMemory
from twin.motion import carrier_factor, thermal_quadrature
from twin.pulses import Gaussian
from twin.readout import assignment_probability

__all__ = [
    "AbstractMemristor",
    "Automatic",
    "ClosedForm",
    "IonMemristor",
    "Loop",
    "PhotonicMemristor",
    "run",
    "sine_input",
    "stream",
]


class ClosedForm(eqx.Module):
    """Resonant pulses far apart in time, no decay and no dephasing: exact there, wrong elsewhere.

    Motion and readout are kept; detunings, overlap, decay and linewidth are ignored (`closed_form_error` bounds them).
    """


class Automatic(eqx.Module):
    """`ClosedForm` where its error is below `error`, else `StaticGrid(error)`; the loop reports which one ran.

    The choice needs known values: inside `jit` name the method instead.
    """

    error: float = eqx.field(static=True, default=1e-8)


class IonMemristor(AbstractMemristor):
    """The memristor on one trapped 171Yb+ ion: two Gaussian pulses on three (or four) levels.

    The controller sets the areas theta_1 and theta_2 from `x_set` and `r_set` for its *nominal* widths; the ion sees

        peak_k = amplitude_k rabi_scale_k theta_k / (sqrt(2 pi) nominal_sigma_k_s),   times the Debye-Waller factor

    at the actual width `sigma_k_s` and the detuning 2 pi (`detuning_k_hz` + `detuning_k_set_hz`), laser minus line.

    Args:
        memory, source: feedback kernel, and the inputs it averages: see `AbstractMemristor`.
        scheme: "lambda" (default), "v" or "ladder": `twin.levels`.
        method: `ClosedForm()`, `StaticGrid()` (default), `Adaptive()` or `Automatic()`.
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
        amplitude_1, amplitude_2: commanded factors on the nominal Rabi frequencies (1 unless pulses are optimized).
    """

    memory: AbstractMemory
    source: str = eqx.field(static=True, default="measured")
    scheme: str = eqx.field(static=True, default="lambda")
    method: ClosedForm | StaticGrid | Adaptive | Automatic = eqx.field(default_factory=StaticGrid)
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
    amplitude_1: Float[Array, "..."] = physical(default=1.0)
    amplitude_2: Float[Array, "..."] = physical(default=1.0)

    def __check_init__(self):
        if self.scheme not in SCHEMES:
            raise ValueError(f"`scheme` must be one of {tuple(SCHEMES)}, but is {self.scheme!r}.")
        for name in ("sigma_1_s", "sigma_2_s", "nominal_sigma_1_s", "nominal_sigma_2_s"):
            check_positive(name, getattr(self, name), "seconds")
        for name in ("rabi_scale_1", "rabi_scale_2", "amplitude_1", "amplitude_2", "n_bar", "eta_1", "eta_2"):
            check_not_negative(name, getattr(self, name), "a plain number")
        for name in ("laser_linewidth_hz", "laser_linewidth_1_hz", "laser_linewidth_2_hz", "detuning_1_hz"):
            accept = (lambda v: v == v) if name.startswith("detuning") else (lambda v: v >= 0)
            check_values(
                name, getattr(self, name), accept, "finite and, for a linewidth, not negative", "give it in Hz"
            )
        check_values("detuning_2_hz", self.detuning_2_hz, lambda v: v == v, "finite", "give it in Hz")
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
        if self.phonon_nodes == 1 and not is_traced(self.n_bar, self.heating_rate_per_s):
            moving = np.any(np.asarray(self.n_bar) > 0) or np.any(np.asarray(self.heating_rate_per_s) > 0)
            if moving:
                raise ValueError(
                    "`phonon_nodes` must be larger than 1 for a moving ion (`n_bar` or `heating_rate_per_s` above 0), "
                    "but is 1; 8 nodes serve mean phonon numbers up to 20."
                )

    # ------------------------------------------------------------------------------------------------ the contract

    def prepared(self, x_set, detuning_1_set_hz, detuning_2_set_hz) -> "IonMemristor":
        device = self
        if isinstance(device.method, Automatic):
            method = device._choose(
                x_set, jnp.ones_like(x_set), detuning_1_set_hz, detuning_2_set_hz, device.method.error
            )
            device = dataclasses.replace(device, method=method)
        undecided = isinstance(device.method, StaticGrid) and device.method.steps is None and device.steps is None
        if undecided and not is_traced(device, detuning_1_set_hz, detuning_2_set_hz):
            largest = max(float(jnp.max(jnp.abs(d))) for d in (detuning_1_set_hz, detuning_2_set_hz))
            # The grid is laid for full areas and rounded up generously: nearby values share one compiled program.
            steps = plan_steps(device, {}, detuning_set_hz=largest, error=float(device.method.error))
            device = dataclasses.replace(device, steps=tuple(_round_up(n) for n in steps))
        return device

    def respond(self, x_set, r_set, detuning_1_set_hz, detuning_2_set_hz, *, alone) -> Response:
        theta_1, theta_2 = self.areas(x_set, r_set)
        factor_1, factor_2, weights = self._factors(jnp.ndim(x_set))
        if self.phonon_nodes == 1:
            factor_1, factor_2 = factor_1[0], factor_2[0]
        theta_1, theta_2 = factor_1 * theta_1, factor_2 * theta_2
        theta_2 = None if alone is True else jnp.where(alone, 0.0, theta_2)
        if isinstance(self.method, ClosedForm):
            response = self._closed_form(theta_1, theta_2)
        elif isinstance(self.method, Automatic):
            raise ValueError("`Automatic` is decided by `run` and `prepared`; here name ClosedForm() or StaticGrid().")
        else:
            response = self._solve(self.method, theta_1, theta_2, detuning_1_set_hz, detuning_2_set_hz, alone)
        if self.phonon_nodes == 1:
            return response
        return Response(
            jnp.tensordot(weights, jnp.moveaxis(response.populations, 1, 0), 1),
            jnp.tensordot(weights, jnp.moveaxis(response.coherence_vs, 1, 0), 1),
            jnp.all(response.valid, axis=0),
            jnp.max(response.error_estimate, axis=0),
            response.method,
        )

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

    # ------------------------------------------------------------------------------------------------ set points

    @property
    def _scheme(self) -> Scheme:
        return SCHEMES[self.scheme]

    def areas(self, x_set, r_set) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Areas that the ion at rest sees for these commands, rad: theta_1 = 2 asin sqrt(x) (V: 2 acos), theta_2."""
        commanded = set_area(x_set if self._scheme.start == "v" else 1 - x_set)
        ratio_1 = 1.0 if self.nominal_sigma_1_s is None else self.sigma_1_s / self.nominal_sigma_1_s
        ratio_2 = 1.0 if self.nominal_sigma_2_s is None else self.sigma_2_s / self.nominal_sigma_2_s
        theta_1 = self.amplitude_1 * self.rabi_scale_1 * ratio_1 * commanded
        return theta_1, self.amplitude_2 * self.rabi_scale_2 * ratio_2 * set_area(r_set)

    def _factors(
        self, axes: int
    ) -> tuple[Float[Array, "nodes ..."], Float[Array, "nodes ..."], Float[Array, " nodes"]]:
        """Debye-Waller factor of each pulse at each phonon number of the quadrature, and the weights.

        Phonon numbers come first, before the `axes` batch axes.
        """
        numbers, weights = thermal_quadrature(self.n_bar, self.phonon_nodes)
        numbers = numbers.reshape((-1,) + (1,) * axes)
        early = numbers + self.heating_rate_per_s * self.lead_s
        late = early + self.heating_rate_per_s * self.separation_s
        return carrier_factor(self.eta_1, early), carrier_factor(self.eta_2, late), weights

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
        )

    def pulses(self, theta_1, theta_2=None) -> tuple[Gaussian, ...]:
        """The waveforms of these areas, the centre of pulse 1 at time zero."""
        first = Gaussian.from_area(theta_1, center_s=0.0, sigma_s=self.sigma_1_s)
        if theta_2 is None:
            return (first,)
        return first, Gaussian.from_area(theta_2, center_s=self.separation_s, sigma_s=self.sigma_2_s)

    def _window(self, alone) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        return -self.lead_s, self.tail_s + jnp.where(alone, 0.0, self.separation_s)

    # ------------------------------------------------------------------------------------------------ solving

    def _closed_form(self, theta_1, theta_2) -> Response:
        amplitudes = separated_amplitudes(theta_1, 0.0 if theta_2 is None else theta_2, self._scheme.start)
        populations = [jnp.abs(c.real) ** 2 + c.imag**2 for c in amplitudes]
        populations += [jnp.zeros_like(populations[0])] * (len(self._scheme.levels) - 3)
        coherence = amplitudes[0] * amplitudes[1].conj()
        stacked = jnp.stack(populations)
        return Response(
            stacked,
            jnp.stack([coherence.real, coherence.imag]),
            jnp.all(jnp.isfinite(stacked), axis=0),
            jnp.zeros_like(populations[0]),
            "closed form",
        )

    def _solve(self, method: StaticGrid | Adaptive, theta_1, theta_2, d1, d2, alone) -> Response:
        if isinstance(method, StaticGrid) and method.steps is None and self.steps is not None:
            method = dataclasses.replace(method, steps=self.steps[0 if alone is True else 1])
        solution: Solution = evolve(
            self.system(d1, d2),
            self.pulses(theta_1, theta_2),
            start=self._scheme.start,
            window_s=self._window(alone),
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
        """Bound on the error of `ClosedForm` in any population: overlap + cut tails + detuning + decay + dephasing.

            |w| + theta_k erfc(edge / sqrt 2 sigma_k) / 4 + 2 (delta_k sigma_k)^2 + time / lifetime + 2 D_k sigma_k

        Overlap and tails are rigorous; decay is (one jump at most matters); detuning and dephasing are the leading
        orders with factors above those of a pi pulse (1.11 and 0.73). Motion costs nothing: both methods average it.
        `r_set` None bounds the run of pulse 1 alone.
        """
        both = r_set is not None
        theta_1, theta_2 = self.areas(x_set, r_set if both else jnp.zeros_like(x_set))
        used = [(theta_1, self.sigma_1_s, self.detuning_1_hz + detuning_1_set_hz, self.laser_linewidth_1_hz)]
        if both:
            used.append((theta_2, self.sigma_2_s, self.detuning_2_hz + detuning_2_set_hz, self.laser_linewidth_2_hz))
        total = overlap_bound(theta_1, theta_2, self.separation_s, self.sigma_1_s, self.sigma_2_s)
        tail_s = self.tail_s + (self.separation_s if both else 0.0)
        for k, (theta, sigma_s, detuning_hz, linewidth_hz) in enumerate(used):
            before, after = (self.lead_s, tail_s) if k == 0 else (self.lead_s + self.separation_s, self.tail_s)
            cut = erfc(before / (math.sqrt(2) * sigma_s)) + erfc(after / (math.sqrt(2) * sigma_s))
            delta = 2 * jnp.pi * detuning_hz
            dephasing = jnp.pi * (linewidth_hz + self.laser_linewidth_hz)
            total = total + theta * cut / 4 + 2 * (delta * sigma_s) ** 2 + 2 * dephasing * sigma_s
        return total + (self.lead_s + tail_s) * (1 / self.lifetime_s + 1 / self.m_lifetime_s)

    def _choose(self, x_set, r_set, d1, d2, error: float) -> ClosedForm | StaticGrid:
        bound = self.closed_form_error(x_set, r_set, d1, d2)
        if is_traced(bound):
            raise ValueError(
                "`Automatic` cannot choose from traced values; inside jit, grad or vmap name the method: "
                "ClosedForm() or StaticGrid()."
            )
        return ClosedForm() if bool(jnp.all(bound <= error)) else StaticGrid(error=error)


def _round_up(steps: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ..."""
    power = 16 * 2 ** max(0, math.ceil(math.log2(steps / 16)))
    return power * 3 // 4 if power > 16 and steps <= power * 3 // 4 else power


def plan_steps(
    device: IonMemristor, box: Mapping[str, tuple[float, float]], *, detuning_set_hz: float = 0.0, error: float
) -> tuple[int, int]:
    """Grid steps of the two kinds of run that serve every device in a box of parameters.

    Args:
        device: supplies the parameters outside the box; all values known.
        box: (low, high) of each parameter that will vary.
        detuning_set_hz: largest magnitude of the commanded laser offsets, Hz.
        error: population error aimed at.

    Returns:
        Steps for pulse 1 alone, and for both pulses. Devices outside the box may come out invalid (NaN, flagged).
    """
    names = [name for name in box if hasattr(device, name)]
    # Corners of the box, and laser offsets of either sign on either line, on a new first batch axis.
    ranges = [box[name] for name in names] + [(-abs(detuning_set_hz), abs(detuning_set_hz))] * 2
    corners = np.array(list(itertools.product(*ranges)), float)
    axes = len(batch_shape(device.system(0.0, 0.0), device.pulses(device.rabi_scale_1, device.rabi_scale_2)))
    columns = [real_array(column.reshape((-1,) + (1,) * axes)) for column in corners.T]
    spread = dataclasses.replace(device, **dict(zip(names, columns, strict=False)))
    # Full areas of both pulses: the V scheme's pulse 1 is longest for x = 0.
    full = real_array(1.0)
    theta_1, theta_2 = spread.areas(full if spread._scheme.start == "v" else 1 - full, full)
    system = spread.system(*columns[-2:])
    steps = []
    for second, couplings in ((None, 1), (theta_2, 2)):
        part = dataclasses.replace(system, couplings=system.couplings[:couplings])
        pulses, window = spread.pulses(theta_1, second), spread._window(second is None)
        steps.append(grids.plan_steps(part, pulses, window, error, batch_shape(part, pulses, window)))
    return steps[0], steps[1]


def planned(device, box: Mapping[str, tuple[float, float]], *, detuning_set_hz: float = 0.0):
    """The device with its grid planned for a box, so that values in it may be traced; others pass unchanged."""
    if not isinstance(device, IonMemristor) or not isinstance(device.method, StaticGrid):
        return device
    error = float(device.method.error)
    steps = plan_steps(device, box, detuning_set_hz=detuning_set_hz, error=error)
    return dataclasses.replace(device, steps=steps, method=dataclasses.replace(device.method, finest=error))


def coarsened(device, error: float):
    """A planned device at a larger solver error: fewer steps of the same compiled program; others pass unchanged."""
    if not isinstance(device, IonMemristor) or not isinstance(device.method, StaticGrid):
        return device
    return dataclasses.replace(device, method=dataclasses.replace(device.method, error=jnp.asarray(error, float)))


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

    def prepared(self, x_set, detuning_1_set_hz, detuning_2_set_hz) -> "PhotonicMemristor":
        del x_set, detuning_1_set_hz, detuning_2_set_hz
        return self

    def respond(self, x_set, r_set, detuning_1_set_hz, detuning_2_set_hz, *, alone) -> Response:
        del detuning_1_set_hz, detuning_2_set_hz  # a beam splitter has no line
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

"""Sampled pulses within what the hardware allows.

The optimizer moves the numbers of a family (`calibration.families`), which makes unconstrained samples of them;
`Hardware.allowed` turns these into samples that obey every limit, `Hardware.played` into what reaches the ion, and
`twin.sampled` into the memristor that plays it. The second pulse is on the same clock as the first,
`delay` samples later; the samples of a channel outside its own pulse are zero.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from calibration._minimize import Progress, Stage, minimize
from calibration.families import AbstractFamily, family
from calibration.hardware import Hardware
from calibration.robust import Robust
from calibration.targets import AbstractTarget
from twin.memristor import IonMemristor
from twin.sampled import SampledIon, sampled
from twin.slices import Dense
from twin.waveform import Waveform

# What a reference states of its matrix exponentials, and how many slices it takes for one of the search.
_REFERENCE_ERROR, _FINER = 1e-13, 4
# Of the loss, which is the logarithm of an error, or a number of order one.
_TOLERANCE = 1e-6


class Layout(eqx.Module):
    """When the samples are played.

    Args:
        samples: of each pulse, zero ends included.
        delay: samples from the beginning of pulse 1 to that of pulse 2; pulses overlap below `samples`.
        oversampling: slices a sample in the optimizer.
    """

    samples: int = eqx.field(static=True)
    delay: int = eqx.field(static=True)
    oversampling: int = eqx.field(static=True, default=1)

    def placed(self, pulses: Waveform) -> Waveform:
        """Both pulses, each a channel of the same samples, at their times."""

        def place(part):
            first = jnp.pad(part[:, :1], [(0, self.delay), (0, 0)])
            return jnp.concatenate([first, jnp.pad(part[:, 1:], [(self.delay, 0), (0, 0)])], axis=1)

        return Waveform(place(pulses.real_rad_s), place(pulses.imag_rad_s), pulses.sample_s, pulses.start_s)

    def taken_apart(self, waveform: Waveform) -> Waveform:
        """The inverse: both pulses, beginning together.

        Raises:
            ValueError: a channel that is not dark outside its own pulse.
        """

        def take(part):
            outside = jnp.abs(part[self.samples :, 0]), jnp.abs(part[: self.delay, 1])
            if any(one.size and float(jnp.max(one)) > 0 for one in outside):
                raise ValueError("a channel plays outside its own pulse; give pulses of this layout, or another one.")
            return jnp.stack([part[: self.samples, 0], part[self.delay :, 1]], axis=1)

        return Waveform(take(waveform.real_rad_s), take(waveform.imag_rad_s), waveform.sample_s, waveform.start_s)


class Player(eqx.Module):
    """What makes a device of the numbers of a family; its slices have room for whatever a search may try."""

    device: SampledIon
    hardware: Hardware
    family: AbstractFamily
    layout: Layout

    def waveform(self, point: Float[Array, " numbers"]) -> Waveform:
        """The samples, at their times, not yet rounded."""
        return self.layout.placed(self.hardware.allowed(*self.family.raw(point)))

    def __call__(self, point: Float[Array, " numbers"]) -> SampledIon:
        return self.device.playing(_lit(self.hardware, self.layout, self.waveform(point)))


@dataclass(frozen=True)
class Shaped:
    """What an optimization of samples found.

    Attributes:
        status: "converged", "stopped: WHY" or "not converged: WHY".
        before: the target's number of the pulses at the start, without offsets; `after` as the optimizer saw it at the
            end.
        waveform: the samples, quantized; full command plays them as they are.
        start: those at the start, quantized.
        point: numbers of the family at the end.
        offsets_hz: laser offsets that go with them.
        history: value of the target after each chunk of iterations.
    """

    status: str
    before: float
    after: float
    waveform: Waveform
    start: Waveform
    point: Float[np.ndarray, " numbers"]
    offsets_hz: tuple[float, float]
    history: list[float]


def gaussian_pulses(hardware: Hardware, samples: int, *, edge_sigmas: float = 3.5) -> Waveform:
    """Both pulses as Gaussians of area pi that fill their time, `edge_sigmas` on either side; where a search begins."""
    t = np.linspace(-edge_sigmas, edge_sigmas, samples)
    envelope = np.exp(-0.5 * t**2)
    envelope = np.where((np.arange(samples) % (samples - 1) == 0) & hardware.zero_ends, 0.0, envelope)
    real = np.pi * envelope / (np.sum(envelope) * hardware.sample_s)
    return Waveform(*(np.stack(2 * [part], axis=1) for part in (real, 0 * real)), hardware.sample_s)


def on_hardware(
    ion: IonMemristor, hardware: Hardware, layout: Layout, waveform: Waveform, *, error: float = 1e-9,
    offsets_hz: tuple[float, float] = (0.0, 0.0), room_for: IonMemristor | None = None,
) -> SampledIon:  # fmt: skip
    """The ion under a waveform as the hardware plays it.

    Args:
        ion: the (calibrated) device.
        waveform: samples of both channels at their times (`Layout.placed`).
        error: of populations. offsets_hz: laser offsets that will be set.
        room_for: a batch of ions that will take the place of this one; slices are laid for all of them.
    """
    drives = _lit(hardware, layout, waveform)
    # The response of the modulator lies on both sides of the samples.
    around = len(drives.real_rad_s) - layout.oversampling * (layout.samples + layout.delay)
    alone = layout.oversampling * layout.samples + around
    shares = np.eye(2) if hardware.mixing_real is None else np.abs(np.asarray(hardware.mixing_real))
    shares = shares + (0.0 if hardware.mixing_imag is None else np.abs(np.asarray(hardware.mixing_imag)))
    # Samples from elsewhere may break the limits, and have phases that the hardware has not.
    own = np.hypot(np.asarray(drives.real_rad_s), np.asarray(drives.imag_rad_s)).sum(axis=2).max(axis=0)
    largest = tuple(np.maximum(shares @ np.asarray(hardware.largest_rad_s), own))
    laid = sampled(
        ion if room_for is None else room_for, drives, alone_slices=alone, largest_rad_s=largest, error=error,
        real_only=_real(hardware) and not np.any(drives.imag_rad_s),
        largest_hz=max(abs(offset) for offset in offsets_hz),
    )  # fmt: skip
    nominal = dataclasses.replace(ion, nominal_sigma_1_s=None, nominal_sigma_2_s=None)
    return laid if room_for is None else dataclasses.replace(laid, ion=nominal)


def shape(
    ion: IonMemristor,
    hardware: Hardware,
    target: AbstractTarget,
    layout: Layout,
    *,
    name: str = "samples",
    numbers: int = 12,
    seed: int = 0,
    start: Waveform | None = None,
    begin_at: Float[np.ndarray, " numbers"] | None = None,
    offsets_hz: tuple[float, float] | None = None,
    iterations: int = 300,
    enough: float | None = None,
    error: float = 1e-7,
    on_progress: Progress | None = None,
    on_point: Callable[[Float[np.ndarray, " numbers"]], None] | None = None,
) -> Shaped:
    """Finds samples that serve the target best on this device.

    Main arguments:
        ion: the (calibrated) device, of known values.
        hardware: its two channels.
        target: of `calibration.targets`, or `Robust` over many devices.
        layout: lengths and times of the pulses.

    Other arguments:
        name, numbers, seed: of the family (`calibration.families.family`).
        start: pulses where the search begins, shape (samples, 2); Gaussians by default.
        begin_at: numbers of the family to go on from, in place of those of `start`.
        offsets_hz: laser offsets; None tunes both lasers onto the lines.
        iterations: most iterations of L-BFGS.
        enough: the search stops when the target's number is this good.
        error: of populations in the search.
        on_progress: called as (stage, iterations done, most iterations, best value so far).
        on_point: called with the present numbers of the family, so that a search can go on from them.

    Raises:
        ValueError: hardware without two channels, pulses too short for its limits, or a start that is not finite.
    """
    player, first, offsets_hz = player_of(
        ion, hardware, target, layout, name=name, numbers=numbers, seed=seed, start=start, offsets_hz=offsets_hz,
        error=error,
    )  # fmt: skip
    begin = first if begin_at is None else jnp.asarray(begin_at)
    if begin.shape != first.shape:
        raise ValueError(f"the search cannot go on from {begin.size} numbers, for it has {first.size}; begin anew.")
    value = eqx.filter_jit(lambda target, player, point, offsets: target.value(player(point), offsets))
    before = float(value(target, player, first, (jnp.zeros(()), jnp.zeros(()))))
    point, status, history = descend(player, target, begin, offsets_hz, iterations, enough, on_progress, on_point)
    return Shaped(
        status=status,
        before=before,
        after=float(value(target, player, point, pair(offsets_hz))),
        waveform=hardware.quantized(player.waveform(point)),
        start=hardware.quantized(player.waveform(first)),
        point=np.asarray(point),
        offsets_hz=offsets_hz,
        history=history,
    )


def player_of(
    ion: IonMemristor,
    hardware: Hardware,
    target: AbstractTarget,
    layout: Layout,
    *,
    name: str = "samples",
    numbers: int = 12,
    seed: int = 0,
    start: Waveform | None = None,
    offsets_hz: tuple[float, float] | None = None,
    error: float = 1e-7,
) -> tuple[Player, Float[Array, " numbers"], tuple[float, float]]:
    """What a search plays, the numbers where it begins, and the laser offsets; arguments are those of `shape`."""
    if hardware.channels != 2:
        raise ValueError(f"the memristor has two lines, but the hardware has {hardware.channels} channels; give two.")
    offsets_hz = (-float(ion.detuning_1_hz), -float(ion.detuning_2_hz)) if offsets_hz is None else offsets_hz
    first = gaussian_pulses(hardware, layout.samples) if start is None else start
    raw = hardware.unconstrained(first)
    shapes = family(name, hardware, raw, numbers=numbers, seed=seed)
    room = target.all_members(ion) if isinstance(target, Robust) else None
    device = on_hardware(
        ion, hardware, layout, layout.placed(hardware.allowed(*raw)), error=error, offsets_hz=offsets_hz, room_for=room
    )
    return Player(device, hardware, shapes, layout), shapes.first(raw), offsets_hz


def descend(
    player: Player,
    target: AbstractTarget,
    point: Float[Array, " numbers"],
    offsets_hz: tuple[float, float],
    iterations: int,
    enough: float | None = None,
    on_progress: Progress | None = None,
    on_point: Callable[[Float[np.ndarray, " numbers"]], None] | None = None,
) -> tuple[Float[Array, " numbers"], str, list[float]]:
    """L-BFGS from a point: where it ended, why, and the target's number after each chunk of iterations.

    Raises:
        ValueError: the target is not finite at the point.
    """
    history: list[float] = []

    def report(done, losses):
        history.append(target.of_loss(float(losses[0])))
        if on_progress is not None:
            on_progress("shape", done, iterations, history[-1])

    reached = lambda: enough is not None and bool(history) and (
        history[-1] >= enough if target.is_gain else history[-1] <= enough
    )  # fmt: skip

    def go_on(points) -> bool:
        if on_point is not None:
            on_point(points[0])
        return not reached()

    stage = Stage("lbfgs", iterations, _TOLERANCE)
    args = (player, target, pair(offsets_hz))
    found = minimize(_loss, args, point[None], stage, on_progress=report, go_on=go_on)
    if not np.isfinite(found.values[0]):
        raise ValueError("the target is not finite at the starting pulses; start from others.")
    status = "not converged: the search still moved at its last iteration"
    if bool(found.converged[0]):
        status = "converged"
    elif reached():
        status = f"stopped: {target.name} is as good as {enough:g}"
    return found.points[0], status, history


def rescored(
    ion: IonMemristor, hardware: Hardware, target: AbstractTarget, layout: Layout, waveform: Waveform,
    offsets_hz: tuple[float, float],
) -> float:  # fmt: skip
    """The target's number of samples as they are, by dense matrix exponentials: independent of a search's polynomials.

    Behind a modulator with a rise time slices are `_FINER` times as many.
    """
    fine = dataclasses.replace(layout, oversampling=layout.oversampling * (_FINER if hardware.rise_s > 0 else 1))
    room = target.all_members(ion) if isinstance(target, Robust) else None
    device = on_hardware(ion, hardware, fine, waveform, offsets_hz=offsets_hz, room_for=room)
    exact = dataclasses.replace(device, rule=Dense(), error=_REFERENCE_ERROR)
    return float(eqx.filter_jit(target.value)(exact, pair(offsets_hz)))


def _lit(hardware: Hardware, layout: Layout, waveform: Waveform) -> Waveform:
    """What reaches each line while one channel plays alone, shape (slices, lines, channels)."""
    one = lambda part: part[:, :, None] * jnp.eye(2)
    alone = Waveform(one(waveform.real_rad_s), one(waveform.imag_rad_s), waveform.sample_s, waveform.start_s)
    return hardware.played(alone, layout.oversampling)


def _real(hardware: Hardware) -> bool:
    return hardware.real_only and hardware.mixing_imag is None


def _loss(point: Float[Array, " numbers"], args, each) -> Float[Array, ""]:
    del each
    player, target, offsets = args
    return target.loss(player(point), offsets)


def pair(offsets_hz: tuple[float, float]) -> tuple[Array, Array]:
    """Laser offsets as arrays."""
    return jnp.asarray(offsets_hz[0], float), jnp.asarray(offsets_hz[1], float)

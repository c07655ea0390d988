"""Sampled pulses: every sample is free, within what the hardware allows.

The optimizer moves raw numbers; `Hardware.allowed` makes samples of them that obey every limit, `Hardware.played` what
reaches the ion, and `twin.sampled` the memristor that plays it. The second pulse is on the same clock as the first,
`delay` samples later; the samples of a channel outside its own pulse are zero.
"""

import dataclasses
import math
from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from calibration._minimize import Progress, Stage, minimize
from calibration.control import Obedience, Target
from calibration.hardware import Hardware
from twin.memristor import IonMemristor
from twin.sampled import SampledIon, sampled
from twin.waveform import Waveform

# What the reference of a result has beyond the optimizer: error of its polynomial, and slices a sample.
_REFERENCE_ERROR, _FINER = 1e-12, 4
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


@dataclass(frozen=True)
class Shaped:
    """What an optimization of samples found.

    Attributes:
        status: "converged" or "not converged: WHY".
        metric: name of the target's number: of the pulses at the start without offsets (`before`), as the optimizer saw
            it at the end (`after`), and of the exported samples, quantized, by finer slices and a tighter solver
            (`exported`).
        waveform: the samples, quantized; full command plays them as they are.
        device: the ion that plays them.
        offsets_hz: laser offsets that go with them.
        history: value of the target after each chunk of iterations.
    """

    status: str
    metric: str
    before: float
    after: float
    exported: float
    waveform: Waveform
    device: SampledIon
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
    offsets_hz: tuple[float, float] = (0.0, 0.0),
) -> SampledIon:  # fmt: skip
    """The ion under a waveform as the hardware plays it.

    Args:
        ion: the (calibrated) device.
        waveform: samples of both channels at their times (`Layout.placed`).
        error: of populations. offsets_hz: laser offsets that will be set.
    """
    drives = _lit(hardware, layout, waveform)
    # The response of the modulator lies on both sides of the samples.
    around = len(drives.real_rad_s) - layout.oversampling * (layout.samples + layout.delay)
    alone = layout.oversampling * layout.samples + around
    shares = np.eye(2) if hardware.mixing_real is None else np.abs(np.asarray(hardware.mixing_real))
    shares = shares + (0.0 if hardware.mixing_imag is None else np.abs(np.asarray(hardware.mixing_imag)))
    largest = tuple(shares @ np.asarray(hardware.largest_rad_s))
    return sampled(
        ion, drives, alone_slices=alone, largest_rad_s=largest, error=error, real_only=_real(hardware),
        largest_hz=max(abs(offset) for offset in offsets_hz),
    )  # fmt: skip


def shape(
    ion: IonMemristor,
    hardware: Hardware,
    target: Target,
    layout: Layout,
    *,
    start: Waveform | None = None,
    offsets_hz: tuple[float, float] | None = None,
    iterations: int = 300,
    error: float = 1e-7,
    on_progress: Progress | None = None,
) -> Shaped:
    """Finds samples that serve the target best on this device.

    Main arguments:
        ion: the (calibrated) device, of known values.
        hardware: its two channels.
        target: `Obedience()` or a `LoopShape`.
        layout: lengths and times of the pulses.

    Other arguments:
        start: pulses where the search begins, shape (samples, 2); Gaussians by default.
        offsets_hz: laser offsets; None tunes both lasers onto the lines.
        iterations: most iterations of L-BFGS.
        error: of populations in the search.
        on_progress: called as (stage, iterations done, most iterations, best value so far).

    Raises:
        ValueError: hardware without two channels, or pulses too short for its limits.
    """
    if hardware.channels != 2:
        raise ValueError(f"the memristor has two lines, but the hardware has {hardware.channels} channels; give two.")
    offsets_hz = (-float(ion.detuning_1_hz), -float(ion.detuning_2_hz)) if offsets_hz is None else offsets_hz
    first = gaussian_pulses(hardware, layout.samples) if start is None else start
    raw = hardware.unconstrained(first)
    device = on_hardware(
        ion, hardware, layout, layout.placed(hardware.allowed(*raw)), error=error, offsets_hz=offsets_hz
    )
    offsets = tuple(jnp.asarray(offset) for offset in offsets_hz)
    args = (device, hardware, layout, target, offsets)
    point = jnp.concatenate([part.ravel() for part in raw if part is not None])
    value = eqx.filter_jit(lambda args, point: _value(args, point))
    history: list[float] = []

    def report(done, losses):
        history.append(_value_of_loss(target, float(losses[0])))
        if on_progress is not None:
            on_progress("shape", done, iterations, history[-1])

    found = minimize(_loss, args, point[None], Stage("lbfgs", iterations, _TOLERANCE), on_progress=report)
    if not np.isfinite(found.values[0]):
        raise ValueError("the target is not finite at the starting pulses; start from others.")
    best = found.points[0]
    waveform = hardware.quantized(_waveform(hardware, layout, best))
    finer = dataclasses.replace(layout, oversampling=_FINER * layout.oversampling)
    exported = on_hardware(ion, hardware, finer, waveform, error=_REFERENCE_ERROR, offsets_hz=offsets_hz)
    still = "the search still moved at its last iteration"
    return Shaped(
        status="converged" if bool(found.converged[0]) else f"not converged: {still}",
        metric=target.name,
        before=float(value((*args[:4], (jnp.zeros(()), jnp.zeros(()))), point)),
        after=float(value(args, best)),
        exported=float(eqx.filter_jit(target.value)(exported, offsets)),
        waveform=waveform,
        device=exported,
        offsets_hz=offsets_hz,
        history=history,
    )


def _waveform(hardware: Hardware, layout: Layout, point: Float[Array, " numbers"]) -> Waveform:
    parts = point.reshape(1 if hardware.real_only else 2, hardware.raw_samples(layout.samples), 2)
    return layout.placed(hardware.allowed(parts[0], None if hardware.real_only else parts[1]))


def _lit(hardware: Hardware, layout: Layout, waveform: Waveform) -> Waveform:
    """What reaches each line while one channel plays alone, shape (slices, lines, channels)."""
    one = lambda part: part[:, :, None] * jnp.eye(2)
    alone = Waveform(one(waveform.real_rad_s), one(waveform.imag_rad_s), waveform.sample_s, waveform.start_s)
    return hardware.played(alone, layout.oversampling)


def _real(hardware: Hardware) -> bool:
    return hardware.real_only and hardware.mixing_imag is None


def _value(args, point) -> Float[Array, ""]:
    return args[3].value(_played(args, point), args[4])


def _loss(point: Float[Array, " numbers"], args, each) -> Float[Array, ""]:
    del each
    return args[3].loss(_played(args, point), args[4])


def _played(args, point) -> SampledIon:
    device, hardware, layout, _, _ = args
    return device.playing(_lit(hardware, layout, _waveform(hardware, layout, point)))


def _value_of_loss(target: Target, loss: float) -> float:
    return math.exp(loss) if isinstance(target, Obedience) else -loss

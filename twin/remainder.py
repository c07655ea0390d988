"""What the dictionary does not carry over from an ion to a photonic element, measured cause by cause.

Populations: the element of `twin.transfer.to_photonic` is played beside the ion over the square of commands, with one
imperfection of the ion at a time and with all but one. Pulses that overlap stay where they are, as further apart they
would decay for longer: what overlap alone does is taken off the differences, command by command. States: an ion whose m
is not repumped leaves a block in {v, s} of trace 1 - R x, which no photonic element has; decay fills a leak level;
detuning turns the phase of the output.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twin.loop import AbstractMemristor, Settings
from twin.memristor import IonMemristor
from twin.slow_noise import SlowNoise
from twin.transfer import to_photonic

# Pulses this many widths apart do not overlap to 1e-9.
_APART, _OVERLAP = 9.0, "overlap of pulses"
_NO_OFFSET = Settings()
# l1 coherence of the resonant ion below which a phase says little: it turns where the coherence passes through zero.
_SEEN = 0.1


class Gap(NamedTuple):
    """Largest and rms difference of populations, ion minus element, over the square of commands."""

    x: float
    y: float
    rms_y: float


class Remainder(NamedTuple):
    """What is left between an ion and the element that stands for it.

    Attributes:
        total: with the ion as it is. baseline: with every imperfection below switched off: the error of the solver,
            and of pulses cut at the ends of the window.
        with_only: {cause: gap with this imperfection alone}. with_all_but: {cause: gap with all others}.
        missing: largest share R x that the block in {v, s} lacks until m is repumped. leak: largest population of a
            leak level. coherence: largest difference of the l1 coherence after repump. phase_rad: largest angle in
            [0, pi] by which the output's coherence is turned against that of the ion with every imperfection below
            switched off, where the latter's l1 coherence is at least 0.1.
    """

    total: Gap
    baseline: Gap
    with_only: dict[str, Gap]
    with_all_but: dict[str, Gap]
    missing: float
    leak: float
    coherence: float
    phase_rad: float


def imperfections(ion: IonMemristor) -> dict[str, Callable[[IonMemristor], IonMemristor]]:
    """What an ion has that the dictionary carries over incompletely, each with the change that switches it off."""
    noise = ion.slow_noise
    quiet = lambda **fields: (
        lambda one: dataclasses.replace(one, slow_noise=dataclasses.replace(one.slow_noise, **fields))
    )
    plain = lambda **fields: lambda one: dataclasses.replace(one, **fields)
    on = lambda value: value is not None and bool(np.any(np.asarray(value) != 0))
    found: dict[str, Callable[[IonMemristor], IonMemristor]] = {}
    if on(ion.detuning_1_hz) or on(ion.detuning_2_hz):
        found["detuning"] = plain(detuning_1_hz=0.0, detuning_2_hz=0.0)
    linewidths = ("laser_linewidth_hz", "laser_linewidth_1_hz", "laser_linewidth_2_hz")
    if any(on(getattr(ion, name)) for name in linewidths):
        found["linewidth"] = plain(**dict.fromkeys(linewidths, 0.0))
    if on(1 / ion.lifetime_s) or on(1 / ion.m_lifetime_s):
        found["decay"] = plain(lifetime_s=np.inf, m_lifetime_s=np.inf)
    if ion.moves and (on(ion.n_bar) or on(ion.heating_rate_per_s)):
        found["motion"] = plain(n_bar=0.0, heating_rate_per_s=0.0)
    if noise is not None and (on(noise.amplitude_noise_1) or on(noise.amplitude_noise_2)):
        found["amplitude noise"] = quiet(amplitude_noise_1=0.0, amplitude_noise_2=0.0)
    if noise is not None and (on(noise.detuning_noise_1_hz) or on(noise.detuning_noise_2_hz)):
        found["detuning noise"] = quiet(detuning_noise_1_hz=0.0, detuning_noise_2_hz=0.0)
    if on(ion.stark_1_hz) or on(ion.stark_2_hz):
        found["light shift"] = plain(stark_1_hz=0.0, stark_2_hz=0.0)
    far = _APART * jnp.maximum(ion.sigma_1_s, ion.sigma_2_s)
    if bool(np.any(np.asarray(ion.separation_s) < np.asarray(far))):
        found[_OVERLAP] = plain(separation_s=jnp.maximum(ion.separation_s, far))
    return found


def remainder(ion: IonMemristor, points: int = 7) -> Remainder:
    """Plays an ion and its photonic image over the square of commands.

    Args:
        ion: of known scalar values; solved by its own method, all variants in one batch.
        points: commands a side, equally spaced in the plain angle.

    Raises:
        ValueError: a grid without room, or an ion with batch axes.
    """
    if points < 2:
        raise ValueError(f"`points` must be at least 2, but is {points}; a grid needs its ends.")
    causes = imperfections(ion)
    variants = [ion, _off(ion, causes, set(causes))]
    variants += [_off(ion, causes, set(causes) - {one, _OVERLAP}) for one in causes]
    variants += [_off(ion, causes, {one} - {_OVERLAP}) for one in causes]
    x, r = (grid.ravel() for grid in np.meshgrid(*2 * [np.sin(np.pi * np.arange(points) / (2 * points - 2)) ** 2]))
    lanes = lambda command: np.repeat(command[:, None], len(variants), axis=1)
    batch = _stacked(variants)
    played, element = (_play(device, lanes(x), lanes(r)) for device in (batch, to_photonic(batch)))
    names, count = list(causes), len(causes)
    x_off, y_off = _differences(played, element)
    if _OVERLAP in causes:
        of_overlap = 2 + names.index(_OVERLAP)
        without = [2 + k for k in range(count) if 2 + k != of_overlap] + [of_overlap + count]
        for off in (x_off, y_off):
            off[:, without] -= off[:, [of_overlap]] - off[:, [1]]
    gaps = _gaps(x_off, y_off)
    own = lambda values: np.asarray(values)[..., 0]
    populations = own(played.populations)
    turned, resonant = (np.asarray(played.coherence_vs)[0, :, k] + 1j * np.asarray(played.coherence_vs)[1, :, k]
                        for k in (0, 1))  # fmt: skip
    size = [2 * np.hypot(*own(one.coherence_vs)) for one in (played, element)]
    leak = populations[3] if len(populations) > 3 else np.zeros_like(populations[0])
    return Remainder(
        total=gaps[0],
        baseline=gaps[1],
        with_only=dict(zip(names, gaps[2 : 2 + count], strict=True)),
        with_all_but=dict(zip(names, gaps[2 + count :], strict=True)),
        missing=float(np.max(populations[2])),
        leak=float(np.max(leak)),
        coherence=float(np.max(np.abs(size[0] - size[1]))),
        phase_rad=float(np.max(np.abs(np.angle(turned * resonant.conj()))[2 * abs(resonant) >= _SEEN], initial=0.0)),
    )


def population_gap(one: AbstractMemristor, other: AbstractMemristor, points: int = 7) -> Gap:
    """Largest and rms difference of two devices over the square of commands, the first minus the second."""
    x, r = (grid.ravel() for grid in np.meshgrid(*2 * [np.sin(np.pi * np.arange(points) / (2 * points - 2)) ** 2]))
    return _gaps(*_differences(*(_play(device, x[:, None], r[:, None]) for device in (one, other))))[0]


def _off(ion: IonMemristor, causes, switched: set[str]) -> IonMemristor:
    for name in causes:
        if name in switched:
            ion = causes[name](ion)
    return ion


def _stacked(variants: list[IonMemristor]) -> IonMemristor:
    """Devices that differ in numbers as one with a batch axis; numbers that all share stay scalars."""
    first = variants[0]

    def together(values: list[Any]) -> Any:
        arrays = [np.asarray(value) for value in values]
        same = all(np.array_equal(array, arrays[0]) for array in arrays)
        return values[0] if same else jnp.asarray(np.stack(arrays))

    fields: dict[str, Any] = {}
    for f in dataclasses.fields(first):
        values = [getattr(one, f.name) for one in variants]
        if f.name == "slow_noise" and first.slow_noise is not None:
            parts = {name: together([getattr(v, name) for v in values]) for name in SlowNoise.parameters()}
            fields[f.name] = dataclasses.replace(first.slow_noise, **parts)
        elif f.metadata.get("leading", None) == 0 and values[0] is not None:
            if np.ndim(values[0]):
                raise ValueError(f"`{f.name}` has batch axes, but one ion is compared at a time; take a single one.")
            fields[f.name] = together(values)
    return dataclasses.replace(first, **fields)


class _Played(NamedTuple):
    """Inputs, outputs, and populations and coherence of the output, shape (..., commands, variants)."""

    x: Float[Array, "..."]
    y: Float[Array, "..."]
    populations: Float[Array, "..."]
    coherence_vs: Float[Array, "..."]


def _play(device: AbstractMemristor, x_set: Float[np.ndarray, "..."], r_set: Float[np.ndarray, "..."]) -> _Played:
    commands = jnp.asarray(x_set), jnp.asarray(r_set)
    return _played(device.prepared(commands[0], _NO_OFFSET), *commands)


@eqx.filter_jit
def _played(device: AbstractMemristor, x_set, r_set) -> _Played:
    respond = device.under(_NO_OFFSET)
    first, second = respond(x_set, jnp.zeros_like(x_set), alone=True), respond(x_set, r_set, alone=False)
    signal = device.signal
    return _Played(signal(first.populations), signal(second.populations), second.populations, second.coherence_vs)


def _differences(played: _Played, element: _Played) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Of x and of y, shape (commands, variants)."""
    return np.asarray(played.x) - np.asarray(element.x), np.asarray(played.y) - np.asarray(element.y)


def _gaps(x_off: Float[np.ndarray, "..."], y_off: Float[np.ndarray, "..."]) -> list[Gap]:
    largest = lambda off: np.max(np.abs(off), axis=0).tolist()
    rms = np.sqrt(np.mean(y_off**2, axis=0)).tolist()
    return [Gap(*row) for row in zip(largest(x_off), largest(y_off), rms, strict=True)]

"""Coloured frequency noise of the lasers: filter functions of second order, and sampled trajectories.

A laser of frequency noise dnu(t) shifts level j by 2 pi dnu(t) w_j, where w_j = dE_j/d delta_k for laser k
(`twin.levels`). S(f) is the one-sided spectrum of dnu (`twin.spectra`). White noise is the only kind that a Lindblad
term describes.

Let W(t) = U(t)^+ diag(w) U(t) be the weights in the frame of the noiseless evolution, psi the start and
q_j = U(T)^+ |j>. To second order in the noise (Dyson series; the first order averages out)

    <P_j> = P_j + int_0^T C(tau) G_j(tau) dtau = P_j - int_0^inf S(f) F_j(f) df,      C = (2 pi)^2 <dnu dnu>
    G_j(tau) = 2 Re int dt { <psi|W(t + tau)|q_j> <q_j|W(t)|psi> - <psi|q_j> <q_j|W(t + tau) W(t)|psi> }

The second term keeps the order of times: at populations that are neither 0 nor 1 the commutator [W(t + tau), W(t)]
counts. w may be replaced by w - w_j for output j, a global phase, after which noise behind the last pulse drops out.

Trajectories draw dnu(t) from the same spectral lines that the filter function is summed over, on the same time grid,
and turn the phases of the drives with it; they hold for any strength, within the standard error that they report.

References: T. J. Green, J. Sastrawan, H. Uys and M. J. Biercuk, New J. Phys. 15, 095004 (2013), for infidelities.
"""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Complex, Float, PRNGKeyArray

from twin.batching import is_traced, real_array
from twin.levels import LevelSystem, Scheme
from twin.pulses import AbstractPulse
from twin.slices import Slices, Taylor, action_of, propagate
from twin.spectra import AbstractSpectrum, frequency_noise

# Degree eight leaves 1e-11 of a slice that turns the state by no more than this.
_TAYLOR, _LARGEST_ACTION = Taylor(8, 1), 0.25
# Cells must be shorter than this share of a pulse's shortest time.
_CELL_SHARE = 0.25
# The neglected orders are up to this times the square of the second: see tests/test_phase_noise.py.
_NEXT_ORDER = 4.0


class PhaseNoise(eqx.Module):
    """Frequency noise of one source.

    Args:
        weights: how far each level moves, in units of the frequency noise: `laser_noise` has those of the schemes.
        spectrum: of the source.
    """

    weights: tuple[float, ...] = eqx.field(static=True)
    spectrum: AbstractSpectrum


def laser_noise(scheme: Scheme, laser: int | str, spectrum: AbstractSpectrum) -> PhaseNoise:
    """The noise of laser 1, laser 2, or of the "shared" source of both lines, on the levels of a scheme."""
    if laser not in (1, 2, "shared"):
        raise ValueError(f"`laser` must be 1, 2 or 'shared', but is {laser!r}.")
    first, second = scheme.slopes
    weights = tuple(a + b for a, b in zip(first, second, strict=True))
    return PhaseNoise({1: first, 2: second}.get(laser, weights), spectrum)


# ------------------------------------------------------------------------------------------------ time grid


def _check_grid(system, pulses, noises: Sequence[PhaseNoise], window_s, steps: int) -> tuple[LevelSystem, Array]:
    """The graph with the couplings in use, and the window; refuses what a value or a shape shows to be wrong."""
    system.refuse_light_shifts("the average over coloured noise")
    if len(pulses) > len(system.couplings):
        raise ValueError(
            f"{len(pulses)} pulses for {len(system.couplings)} couplings; give at most one pulse a coupling."
        )
    for noise in noises:
        if len(noise.weights) != len(system.levels):
            raise ValueError(
                f"`weights` must have {len(system.levels)} entries, one a level, but has {len(noise.weights)}."
            )
    if steps < 64:
        raise ValueError(f"`steps` must be at least 64, but is {steps}; the default is 1024.")
    window = jnp.stack([real_array(t) for t in window_s])
    if window.ndim > 1:
        raise ValueError("the window must be two numbers; use `jax.vmap` for batches.")
    if not is_traced(window) and not window[1] > window[0]:
        raise ValueError(f"`window_s` must end after it begins, but is {window_s}; times are in seconds.")
    system = LevelSystem(
        system.levels, system.couplings[: len(pulses)], system.energies_rad_s, system.decays, system.dephasings
    )
    if not is_traced(system, pulses, noises, window):
        cell_s = float(window[1] - window[0]) / steps
        if not bool(_resolved(system, pulses, noises, window, steps)):
            raise ValueError(
                f"`steps` = {steps} cells of {cell_s:g} s do not resolve the pulses, their jumps, the detunings or a "
                "spectrum's frequencies; raise `steps`, or shorten the window. Jumps must lie on the edges of cells."
            )
    return system, window


def _resolved(system, pulses, noises, window, steps: int) -> Bool[Array, ""]:
    cell_s = (window[1] - window[0]) / steps
    real, imag = _drives(pulses, window, steps)
    action = 0.5 * action_of(system, Slices(real, imag, jnp.full(steps, cell_s)))
    good = action <= _LARGEST_ACTION
    for pulse in pulses:
        good = good & (cell_s <= _CELL_SHARE * pulse.timescale_s)
        for jump_s in pulse.breakpoints_s:
            place = (jump_s - window[0]) / cell_s
            good = good & (jnp.abs(place - jnp.round(place)) < 1e-6)
    for noise in noises:
        good = good & (noise.spectrum.needs_hz <= 0.5 / cell_s)
    return good


def _drives(pulses, window, slices: int) -> tuple[Float[Array, "slices pulses"], Float[Array, "slices pulses"]]:
    """Real and imaginary part of the Rabi frequencies at the centres of equal slices."""
    t_s = window[0] + (window[1] - window[0]) / slices * (jnp.arange(slices) + 0.5)
    drives = [pulse.drive(t_s, t_s) for pulse in pulses]
    real = jnp.stack([jnp.broadcast_to(d.real, t_s.shape) for d in drives], axis=1)
    zero = jnp.zeros(t_s.shape)
    imag = jnp.stack([zero if d.imag is None else jnp.broadcast_to(d.imag, t_s.shape) for d in drives], axis=1)
    return real, imag


# ------------------------------------------------------------------------------------------------ filter functions


class FilterFunction(eqx.Module):
    """F_j(f) of one source of noise: <P_j> = P_j - int_0^inf S(f) F_j(f) df to second order.

    Attributes:
        kernel_per_hz2: weight of the autocovariance of the frequency noise at each lag, shape (levels, lags).
        lag_s: step of the lags, s.
    """

    kernel_per_hz2: Float[Array, "levels lags"]
    lag_s: Float[Array, ""]

    def __call__(self, f_hz: ArrayLike) -> Float[Array, "levels ..."]:
        """F_j in 1/Hz^2 at frequencies in Hz, which must lie below the Nyquist frequency 1/(2 lag)."""
        f = real_array(f_hz)
        lags_s = self.lag_s * jnp.arange(self.kernel_per_hz2.shape[1])
        values = -jnp.tensordot(self.kernel_per_hz2, jnp.cos(2 * jnp.pi * lags_s[:, None] * f.ravel()), 1)
        return jnp.where(f <= 0.5 / self.lag_s * (1 + 1e-12), values.reshape((-1, *f.shape)), jnp.nan)


class Filtered(eqx.Module):
    """Populations with noise to second order.

    Attributes:
        populations: of each level, shape (levels,); NaN where not `valid`.
        ideal: without noise.
        shift: the second order alone, also where it is too large to be all.
        error_estimate: size of the neglected orders, 4 E^2 with E the largest int S |F_j| df.
        valid: the grid resolves all, and the estimate is below the error allowed.
        filters: the filter function of each source.
    """

    populations: Float[Array, " levels"]
    ideal: Float[Array, " levels"]
    shift: Float[Array, " levels"]
    error_estimate: Float[Array, ""]
    valid: Bool[Array, ""]
    filters: tuple[FilterFunction, ...]


def filtered(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    noises: Sequence[PhaseNoise],
    *,
    start: str,
    window_s: tuple,
    steps: int = 1024,
    error: float = 1e-2,
) -> Filtered:
    """Populations under weak coloured noise, by filter functions; use `jax.vmap` for batches.

    Main arguments:
        system: a closed level graph (no decays or dephasings: their rates are not part of the second order); its
            energies hold static detunings.
        pulses: one a coupling.
        noises: independent sources.

    Other arguments:
        start: name of the first level.
        window_s: beginning and end, s.
        steps: cells of the time grid. Noise above its Nyquist frequency is left out.
        error: what the neglected orders may be, by their estimate.

    Raises:
        ValueError: an open graph, a grid that resolves too little, a jump of a pulse inside a cell.
    """
    if not system.closed:
        raise ValueError(
            "`system` must be closed, but has decays or dephasings; leave them out (`without_jumps`), or use `sampled`."
        )
    system, window = _check_grid(system, pulses, noises, window_s, steps)
    return _filtered(system, tuple(pulses), tuple(noises), start, window, steps, real_array(error))


def without_jumps(system: LevelSystem) -> LevelSystem:
    """The graph without its decays and dephasings."""
    return dataclasses.replace(system, decays=(), dephasings=())


@eqx.filter_jit
def _filtered(system, pulses, noises, start: str, window, steps: int, error) -> Filtered:
    n, duration_s = len(system.levels), window[1] - window[0]
    lag_s = duration_s / steps
    # Two slices a cell, so that there is a state at the centre of each.
    u = _evolution(system, pulses, window, 2 * steps)
    first = system.index(start)
    ideal = jnp.abs(u[-1, :, first]) ** 2
    shift, size, filters = jnp.zeros(n), jnp.zeros(n), []
    for noise in noises:
        kernel = (2 * jnp.pi * lag_s) ** 2 * _lag_kernel(u[::2], u[-1], first, np.array(noise.weights))
        filters.append(FilterFunction(kernel, lag_s))
        f_hz, square_hz2 = noise.spectrum.lines(duration_s, steps)
        parts = square_hz2 * filters[-1](jnp.abs(f_hz))
        shift, size = shift - jnp.sum(parts, axis=1), size + jnp.sum(jnp.abs(parts), axis=1)
    estimate = _NEXT_ORDER * jnp.max(size) ** 2
    valid = _resolved(system, pulses, noises, window, steps) & (estimate <= error)
    return Filtered(jnp.where(valid, ideal + shift, jnp.nan), ideal, shift, estimate, valid, tuple(filters))


def _evolution(system, pulses, window, slices: int) -> Complex[Array, "slices levels levels"]:
    """The evolution operator after each slice: Taylor polynomials of all slices at once, then their products."""
    n, slice_s = len(system.levels), (window[1] - window[0]) / slices
    energies = system.energies_rad_s - (jnp.max(system.energies_rad_s) + jnp.min(system.energies_rad_s)) / 2
    h = jnp.broadcast_to(jnp.diag(energies + 0j), (slices, n, n))
    real, imag = _drives(pulses, window, slices)
    for k, (source, target) in enumerate(system.couplings):
        a, b, half = system.index(source), system.index(target), (real[:, k] + 1j * imag[:, k]) / 2
        h = h.at[:, b, a].add(half).at[:, a, b].add(half.conj())
    factors = one = jnp.eye(n, dtype=complex)
    for k in range(_TAYLOR.degree, 0, -1):
        factors = one - 1j * slice_s / k * h @ factors
    step = lambda u, factor: (factor @ u,) * 2
    return jax.lax.scan(step, one, factors)[1]


def _lag_kernel(
    u: Complex[Array, "cells levels levels"], end: Complex[Array, "levels levels"], first: int, weights: np.ndarray
) -> Float[Array, "levels lags"]:
    """G_j over pairs of cells: entry m for those m cells apart, half of it at m = 0, where no order of times is."""
    cells, moved = len(u), weights[None, :] - weights[:, None]
    psi, back = u[:, :, first], u @ end.conj().T
    by_psi, by_back = moved[:, None] * psi, moved[:, None] * jnp.moveaxis(back, 2, 0)
    overlap = jnp.einsum("iaj,jia->ji", back.conj(), by_psi)
    early = jnp.einsum("iba,jib->jai", u.conj(), by_psi)
    late = jnp.einsum("iba,jib->jai", u.conj(), by_back)

    def correlated(x, y):
        """sum_i conj(x_(i + m)) y_i for m >= 0, by transforms of twice the length."""
        x, y = jnp.fft.fft(x, 2 * cells), jnp.fft.fft(y, 2 * cells)
        return jnp.fft.ifft(x * y.conj())[..., :cells].conj()

    amplitude = end[:, first]
    kernel = 2 * (correlated(overlap, overlap) - amplitude.conj()[:, None] * correlated(late, early).sum(1)).real
    return kernel.at[:, 0].multiply(0.5)


# ------------------------------------------------------------------------------------------------ trajectories


class Sampled(eqx.Module):
    """Means over trajectories.

    Attributes:
        populations: shape (levels,); NaN where not `valid`.
        standard_error: of these means, shape (levels,).
        valid: the grid resolves pulses and spectra, and the noise turns no phase by more than half a radian (rms)
            within a cell.
    """

    populations: Float[Array, " levels"]
    standard_error: Float[Array, " levels"]
    valid: Bool[Array, ""]


def sampled(
    system: LevelSystem,
    pulses: tuple[AbstractPulse, ...],
    noises: Sequence[PhaseNoise],
    *,
    start: str,
    window_s: tuple,
    key: PRNGKeyArray,
    trajectories: int = 1000,
    steps: int = 1024,
) -> Sampled:
    """Populations under coloured noise of any strength: the mean over random trajectories.

    Each level's phase 2 pi w_j int dnu dt is moved into the drives, whose slices are then exact exponentials. Decays
    and dephasings of the graph act as well.

    Args:
        key: random key; the same key draws the same trajectories whatever the values, so means are differentiable.
        trajectories: at least 2; the standard error falls with their root.
        system, pulses, noises, start, window_s, steps: as for `filtered`.
    """
    if trajectories < 2:
        raise ValueError(f"`trajectories` must be at least 2 for a standard error, but is {trajectories}.")
    system, window = _check_grid(system, pulses, noises, window_s, steps)
    return _sampled(system, tuple(pulses), tuple(noises), start, window, key, trajectories, steps)


@eqx.filter_jit
def _sampled(system, pulses, noises, start: str, window, key, trajectories: int, steps: int) -> Sampled:
    cell_s = (window[1] - window[0]) / steps
    real, imag = (a[..., None] for a in _drives(pulses, window, steps))
    turned, turn = jnp.zeros((steps, len(pulses), trajectories)), jnp.zeros(())
    for noise, own in zip(noises, jax.random.split(key, max(1, len(noises))), strict=False):
        detuning = 2 * jnp.pi * frequency_noise(noise.spectrum, steps * cell_s, steps, trajectories, own)
        phase = cell_s * (jnp.cumsum(detuning, axis=0) - detuning / 2)
        differ = [noise.weights[system.index(b)] - noise.weights[system.index(a)] for a, b in system.couplings]
        turned = turned + phase[:, None] * np.array(differ)[:, None]
        _, square_hz2 = noise.spectrum.lines(steps * cell_s, steps)
        turn = turn + (2 * jnp.pi * cell_s * np.max(np.abs(differ))) ** 2 * jnp.sum(square_hz2)
    cos, sin = jnp.cos(turned), jnp.sin(turned)
    slices = Slices(real * cos - imag * sin, real * sin + imag * cos, jnp.full((steps, 1), cell_s))
    populations = propagate(system, slices, start, _TAYLOR).populations
    valid = _resolved(system, pulses, noises, window, steps) & (turn <= 0.25)
    mean, error = jnp.mean(populations, axis=1), jnp.std(populations, axis=1, ddof=1) / jnp.sqrt(trajectories)
    return Sampled(jnp.where(valid, mean, jnp.nan), jnp.where(valid, error, jnp.nan), valid)

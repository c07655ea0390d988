"""What a laser does to the motion: the displacement operator by its bands, Fock cutoffs, and what sidebands cost.

    <n+s| exp[i eta (a + a^+)] |n> = i^s exp(-eta^2/2) eta^s sqrt(n!/(n+s)!) L_n^s(eta^2),   s >= 0, symmetric

A carrier pulse also drives the sidebands, off resonance by the secular frequency. To second order in eta and all
orders in Omega / omega, with theta(t) the area until t, a resonant pulse on |n> moves into other Fock states at most

    eta^2 (2 n + 1) / 4 ( |C|^2 + |S|^2 ),    C, S = int Omega e^{i omega t} {cos, sin} theta dt

and is turned too far by the angle eta^2 (2 n + 1) / 2 J, where

    J = int int_{t' < t} Omega Omega' cos(omega (t - t')) sin(theta - theta') dt' dt

or |J| ~ int Omega^3 / (omega^2 - Omega^2) dt for a slow pulse

(derived in `docs/spin_motion.md`). The light shifts of both levels are equal to this order, and move no population.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import erf
from jaxtyping import Array, Complex, Float

from twin.batching import real_array

# For terms of fourth order in eta, while eta^2 (2 n_bar + 1) is below `SIDEBAND_RANGE`.
_MARGIN = 1.5
SIDEBAND_RANGE = 0.2
# What sidebands may move beyond the state's own spread.
_MARGIN_STATES = 4
_MOST_STATES = 100_000


def displacement_bands(eta: Float[Array, ""], bands: int, cutoff: int) -> Float[Array, "bands cutoff"]:
    """Moduli, with sign, of the bands: row s holds `<n+s|D|n> / i^s` for n = 0 .. cutoff - 1, s = 0 .. bands.

    Args:
        eta: Lamb-Dicke parameter (for `exp(alpha a^+ - alpha^* a)`: |alpha|).
        bands: number of the last band.
        cutoff: number of Fock states n.
    """
    return jnp.exp(-(eta**2) / 2) * _powers(eta, bands)[:, None] * laguerre_functions(eta**2, bands, cutoff)


def _powers(x, last: int):
    """x^0 .. x^last by products, whose slopes are finite at zero."""
    return jnp.cumprod(jnp.concatenate([jnp.ones(1), jnp.broadcast_to(x, (last,))]))


def laguerre_functions(x: Float[Array, ""], bands: int, cutoff: int) -> Float[Array, "bands cutoff"]:
    """`sqrt(n!/(n+s)!) L_n^s(x)` for s = 0 .. bands and n = 0 .. cutoff - 1, by the recursion in n."""
    s = jnp.arange(bands + 1.0)
    first = jnp.exp(-0.5 * jnp.cumsum(jnp.log(jnp.maximum(s, 1.0))))

    def next_one(carry, n):
        before, now = carry
        after = ((2 * n + 1 + s - x) * now - jnp.sqrt(n * (n + s)) * before) / jnp.sqrt((n + 1) * (n + 1 + s))
        return (now, after), now

    return lax.scan(next_one, (jnp.zeros_like(first), first), jnp.arange(float(cutoff)))[1].T


def displaced_states(
    alpha_real: Float[Array, ""], alpha_imag: Float[Array, ""], terms: int, cutoff: int
) -> Complex[Array, "cutoff terms"]:
    """Displaced Fock states: `<n| exp(alpha a^+ - alpha^* a) |k>`, n below the cutoff, k below `terms`."""
    # <n|D|k> = alpha^(n-k) exp(-|alpha|^2/2) sqrt(k!/n!) L_k^(n-k), and (-alpha^*)^(k-n) below the diagonal.
    square = alpha_real**2 + alpha_imag**2
    table = jnp.exp(-square / 2) * laguerre_functions(square, cutoff - 1, cutoff)
    n, k = np.arange(cutoff)[:, None], np.arange(terms)
    up = _powers(alpha_real + 1j * alpha_imag, cutoff - 1)
    down = _powers(-alpha_real + 1j * alpha_imag, cutoff - 1)
    apart = np.abs(n - k)
    return table[apart, np.minimum(n, k)] * jnp.where(n >= k, up[apart], down[apart])


def needed_cutoff(n_bar: float = 0.0, alpha: float = 0.0, heating: float = 0.0, error: float = 1e-7) -> int:
    """Number of Fock states of one mode that leaves out at most `error` of its population.

    A thermal ion that is displaced and heated has the generating function
    `E[z^n] = exp(|alpha|^2 (z - 1) / (1 - m (z - 1))) / (1 - m (z - 1))`, m = n_bar + heating; where it is displaced,
    Chernoff's bound `E[z^n] / z^N` is used, else the tail of the geometric distribution itself.

    Args:
        n_bar: mean phonon number of the thermal part.
        alpha: modulus of the displacement.
        heating: phonons gained by the end of the run.
        error: probability that may be left out.

    Returns:
        The cutoff, four states above that bound, for what the sidebands move.

    Raises:
        ValueError: a negative or infinite number, an error outside (0, 1), or more than 100,000 states.
    """
    for name, value in (("n_bar", n_bar), ("alpha", alpha), ("heating", heating)):
        if not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be zero or positive, and finite, but is {value}; give a plain number.")
    if not 0 < error < 1:
        raise ValueError(f"`error` must lie between 0 and 1, but is {error}; it is a probability.")
    m = n_bar + heating
    if alpha == 0:
        states = math.ceil(math.log(error) / math.log(m / (m + 1))) if m > 0 else 1
    else:
        # z - 1 up to where the generating function ends.
        u = np.geomspace(1e-3, 1e3, 4001) if m == 0 else (1 - np.geomspace(1e-6, 1 - 1e-6, 4001)) / m
        log_g = alpha**2 * u / (1 - m * u) - np.log1p(-m * u)
        states = math.ceil(float(np.min((log_g - math.log(error)) / np.log1p(u))))
    if states > _MOST_STATES:
        raise ValueError(f"n_bar = {m:g} and alpha = {alpha:g} need {states} Fock states; cool the ion.")
    return max(states, 1) + _MARGIN_STATES


def sideband_bound(area_rad, sigma_s, secular_hz, eta, n_bar=0.0, points: int = 16384) -> Float[Array, "..."]:
    """Bound on what off-resonant sidebands change in any population, for a resonant Gaussian pulse.

    It is eta^2 (2 n_bar + 1) [ |J| / 4 + 3/4 (|C|^2 + |S|^2) ] times 1.5 for what is of fourth order in eta; the second
    term counts transfers of two pulses that interfere. Bounds of pulses and of modes add.

    Args:
        area_rad: area on the carrier, rad.
        sigma_s: of the Rabi envelope, s.
        secular_hz: secular frequency of the mode, Hz.
        eta, n_bar: Lamb-Dicke parameter and mean phonon number at the pulse.
        points: of the time grid over 16 sigma; they must resolve the motion.

    Returns:
        The bound; NaN outside its range: eta^2 (2 n_bar + 1) above 0.2, or fewer than 16 points a period.
    """
    area, sigma, eta, n_bar = (real_array(x) for x in (area_rad, sigma_s, eta, n_bar))
    omega = 2 * jnp.pi * real_array(secular_hz)
    axis = lambda x: x[..., None]
    # Times in units of sigma.
    u = jnp.linspace(-8.0, 8.0, points)
    du = 16.0 / (points - 1)
    rabi = axis(area) / math.sqrt(2 * math.pi) * jnp.exp(-0.5 * u**2)
    theta = 0.5 * axis(area) * (1 + erf(u / math.sqrt(2)))
    motion = axis(omega * sigma) * u
    integral = lambda f: jnp.sum(rabi * f, axis=-1) * du
    moved = sum(integral(a(motion) * b(theta)) ** 2 for a in (jnp.cos, jnp.sin) for b in (jnp.cos, jnp.sin))

    def ordered(sign):
        """int Omega sin(phase - phase') Omega' over t' < t, with the phase theta + sign omega t."""
        phase = theta + sign * motion
        until = lambda f: jnp.cumsum(rabi * f, axis=-1) * du - 0.5 * du * rabi * f
        return integral(jnp.sin(phase) * until(jnp.cos(phase)) - jnp.cos(phase) * until(jnp.sin(phase)))

    turned = 0.5 * (ordered(1) + ordered(-1))
    size = eta**2 * (2 * n_bar + 1)
    bound = _MARGIN * size * (0.25 * jnp.abs(turned) + 0.75 * moved)
    resolved = omega * sigma * du < 2 * math.pi / 16
    return jnp.where(resolved & (size <= SIDEBAND_RANGE), bound, jnp.nan)

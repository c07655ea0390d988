"""Many motional modes under two pulses: the joint distribution of their Debye-Waller factors, mode by mode.

Phonon numbers n_m slow the carrier of pulse k by F_k = prod_m exp(-eta_km^2 / 2) L_(n_m)(eta_km^2), the same numbers
for both pulses of a cycle. A response is an entire function of theta_1 F_1 and theta_2 F_2 that oscillates no faster
than a cosine, so its average needs the means of polynomials only. Those are found mode by mode: on a grid of Chebyshev
nodes of F_1 and F_2 stand weights that give the mean of every polynomial below the number of nodes; one more mode
multiplies F_k by an independent number, which maps polynomials to polynomials of the same degree. Work grows with the
number of modes, not with the product of their phonon numbers.

Two pulses along one beam (`eta_2` None, no heating) have F_1 = F_2, and the grid is a line.
"""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from scipy.special import jv

from twin.batching import check_not_negative, check_positive, is_traced, physical, real_array
from twin.motion import carrier_factor, thermal_quadrature

# exp(-33) = 5e-15 of a thermal distribution is left out where a grid ends.
_TAIL = 33.0
# The least value of J_0, where it lies, and a margin for what J_0(2 sqrt(n) eta) leaves out of L_n(eta^2).
_LEAST, _LEAST_AT, _MARGIN = -0.402760, 3.670, 0.02
_MOST_NUMBERS = 4000
# n eta^2 up to which the series of a Laguerre polynomial keeps ten digits.
_SERIES_REACH = 60.0


class Motion(eqx.Module):
    """Modes that carry the ion, at one temperature or each displaced to a coherent state as well.

    The device's `n_bar` is the mean phonon number of a *reference* mode, `heating_rate_per_s` the phonons that it gains
    a second; the others follow: occupation by the same temperature, heating by `heating_share`.

    Args:
        eta_1: Lamb-Dicke parameters of beam 1, shape (modes, *batch).
        eta_2: those of beam 2; None for the same beam.
        frequency_ratio: frequency of each mode over that of the reference mode.
        heating_share: phonons that each mode gains while the reference mode gains one; None without heating.
        coherent: mean phonon numbers |alpha|^2 of the displacements, of random phase against the pulses; None for none.
        carrier_1, carrier_2: what excess micromotion leaves of each beam's carrier, a factor of its Rabi frequency.
        factors: nodes of the grid for each pulse: `factors_for`.
        numbers: phonon numbers of each mode: nodes of a Gauss quadrature, or 0 ... numbers - 1 with `coherent`.
        error: of populations; averages whose stated error is larger are flagged, and NaN.
    """

    eta_1: Float[Array, "modes ..."] = physical(1)
    eta_2: Float[Array, "modes ..."] | None = physical(1, default=None)
    frequency_ratio: Float[Array, "modes ..."] = physical(1, default=(1.0,))
    heating_share: Float[Array, "modes ..."] | None = physical(1, default=None)
    coherent: Float[Array, "modes ..."] | None = physical(1, default=None)
    carrier_1: Float[Array, "..."] = physical(default=1.0)
    carrier_2: Float[Array, "..."] = physical(default=1.0)
    factors: int = eqx.field(static=True, default=20)
    numbers: int = eqx.field(static=True, default=12)
    error: float = eqx.field(static=True, default=1e-8)

    def __check_init__(self):
        modes = self.eta_1.shape[0] if self.eta_1.ndim else 0
        for name in ("eta_1", "eta_2", "frequency_ratio", "heating_share", "coherent"):
            value = getattr(self, name)
            if value is not None and (value.ndim == 0 or value.shape[0] not in (1, modes)):
                raise ValueError(f"`{name}` must have the leading axis {modes}, one a mode, but has {value.shape}.")
            if name in ("heating_share", "coherent"):
                check_not_negative(name, value, "a plain number")
        check_positive("frequency_ratio", self.frequency_ratio, "a plain number")

    @property
    def line(self) -> bool:
        """Whether both pulses have one factor."""
        return self.eta_2 is None and self.heating_share is None

    @property
    def nodes(self) -> int:
        """Number of nodes of the joint distribution."""
        return self.factors if self.line else self.factors**2

    def occupation(self, n_bar: Float[Array, "..."]) -> Float[Array, "modes ..."]:
        """Mean thermal phonon number of each mode when the reference mode has `n_bar`: Bose's, of one temperature."""
        n_bar = jnp.asarray(n_bar)
        rows = (self.eta_1, self.eta_2, self.frequency_ratio, self.heating_share, self.coherent)
        axes = max(n_bar.ndim, *(row.ndim - 1 for row in rows if row is not None))
        modes = len(self.eta_1)
        ratio = _aligned(self.frequency_ratio, axes)
        ratio = jnp.broadcast_to(ratio, (modes, *jnp.broadcast_shapes(ratio.shape[1:], n_bar.shape)))
        # 1 / ((1 + 1/n)^r - 1) without the pole at n = 0; the shift keeps the derivative of a power finite there.
        n_bar = n_bar + 1e-30
        power = jnp.exp(-ratio * jnp.log1p(1 / n_bar))
        return power / -jnp.expm1(-ratio * jnp.log1p(1 / n_bar))

    def lamb_dicke(self, beam: int) -> Float[Array, "modes ..."]:
        """Lamb-Dicke parameters of beam 1 or 2."""
        return self.eta_1 if beam == 1 or self.eta_2 is None else self.eta_2


def _aligned(rows: Float[Array, "rows ..."], axes: int) -> Float[Array, "rows ..."]:
    """Rows before this many axes."""
    return rows.reshape(rows.shape[:1] + (1,) * (axes + 1 - rows.ndim) + rows.shape[1:])


def displaced_thermal(
    n_bar: Float[Array, "..."], coherent: Float[Array, "..."], count: int
) -> Float[Array, "count ..."]:
    """Probabilities of 0 ... count - 1 phonons in a displaced thermal state, with |alpha|^2 = `coherent`.

        p_n = n_bar^n / (n_bar + 1)^(n + 1) exp(-|alpha|^2 / (n_bar + 1)) L_n(-|alpha|^2 / (n_bar (n_bar + 1)))

    by the recurrence of L_n, all of whose terms are positive; n_bar = 0 is Poisson's distribution.
    """
    # Terms are kept near one, and the logarithm of their scale beside them: exp(-|alpha|^2) may underflow.
    n_bar, coherent = jnp.broadcast_arrays(real_array(n_bar), real_array(coherent))
    q, u = n_bar / (n_bar + 1), coherent / (n_bar + 1) ** 2

    def step(carry, n):
        now, before, scale = carry
        following = ((q * (2 * n + 1) + u) * now - q**2 * n * before) / (n + 1)
        size = lax.stop_gradient(jnp.maximum(following, 1e-30))
        return (following / size, now / size, scale + jnp.log(size)), now * jnp.exp(scale)

    one = jnp.ones_like(q)
    first = -coherent / (n_bar + 1) - jnp.log(n_bar + 1)
    return lax.scan(step, (one, jnp.zeros_like(one), first), jnp.arange(count, dtype=float))[1]


def _whole_laguerre(eta: Float[Array, "modes ..."], count: int) -> Float[Array, "count modes ..."]:
    """L_n(eta^2) for n = 0 ... count - 1 by its recurrence, which does not cancel."""
    z = eta**2

    def step(pair, n):
        now, before = pair
        return (((2 * n + 1 - z) * now - n * before) / (n + 1), now), now

    return lax.scan(step, (jnp.ones_like(z), jnp.zeros_like(z)), jnp.arange(count, dtype=float))[1]


def carrier_factors(
    motion: Motion, n_bar, pulses: Sequence[tuple], axes: int, area_rad
) -> tuple[list[Float[Array, "nodes ..."]], Float[Array, "nodes ..."]]:
    """Debye-Waller factors of one or two pulses at the nodes of their joint distribution, and the weights.

    Args:
        motion: the modes.
        n_bar: mean phonon number of the reference mode at preparation, shape (*batch).
        pulses: (beam, phonons that the reference mode gained before it) of each pulse; the numbers broadcast to the
            axes below. Heating keeps a thermal state thermal up to the first pulse, and then raises each phonon number
            by its mean; the spread of the second pulse, of second order in eta^2, is neglected.
        axes: how many axes (cycles or rows, then their batch) follow that of the nodes.
        area_rad: largest area of a pulse, for which the stated error must hold.

    Returns:
        Factors of each pulse and weights, shape (nodes, *axes). Weights are NaN where the `stated_error` is larger than
        `motion.error`.
    """
    if len(pulses) > 2:
        raise ValueError(f"at most two pulses share phonon numbers here, but {len(pulses)} were given.")
    spread = lambda a: _aligned(a, axes)
    share = None if motion.heating_share is None else spread(motion.heating_share)
    thermal = spread(motion.occupation(real_array(n_bar)))
    if share is not None:
        thermal = thermal + share * pulses[0][1]
    if motion.coherent is None:
        numbers, p = thermal_quadrature(thermal, motion.numbers)
    else:
        p = displaced_thermal(thermal, spread(motion.coherent), motion.numbers)
        numbers = jnp.arange(motion.numbers, dtype=float).reshape((-1,) + (1,) * thermal.ndim)
    beams, beyond = [], jnp.zeros(())
    for beam, gained in pulses[:1] if motion.line else pulses:
        eta = spread(motion.lamb_dicke(beam))
        later = 0.0 if share is None else share * (gained - pulses[0][1])
        # L_n alone, which is 1 for a mode at rest; shape (numbers, modes, *axes).
        if motion.coherent is not None and share is None:
            slowed = _whole_laguerre(eta, motion.numbers)
        else:
            # Far nodes weigh nothing, and their series cancels.
            near = numbers * lax.stop_gradient(eta) ** 2 < _SERIES_REACH
            at_rest = carrier_factor(eta, jnp.where(near, numbers, 0.0) + later) * jnp.exp(eta**2 / 2)
            slowed = jnp.where(near, at_rest, 0.0)
            beyond = beyond + jnp.sum(jnp.where(near, 0.0, p), axis=(0, 1))
        low = lowest(eta, thermal + later, None if motion.coherent is None else spread(motion.coherent))
        beams.append((slowed, low, jnp.exp(-jnp.sum(eta**2, axis=0) / 2)))
    weights = _weights([(jnp.swapaxes(slowed, 0, 1), low) for slowed, low, _ in beams], jnp.swapaxes(p, 0, 1), motion)
    grids = [_grid(low, motion.factors) * scale for _, low, scale in beams]
    area = lax.stop_gradient(jnp.abs(real_array(area_rad)))
    each = area * len(pulses) / len(beams)
    stated = sum(truncation(each * (1 - low) / 2, motion.factors) for _, low, _ in beams) + 2 * beyond
    if motion.coherent is None:
        width = jnp.sqrt(lax.stop_gradient(thermal * (thermal + 1)))
        heat = [spread(motion.lamb_dicke(beam)) ** 2 * width for beam, _ in pulses]
        stated = stated + jnp.sum(quadrature_error(area * sum(heat), motion.numbers), axis=0)
    if len(beams) == 1:
        factors = grids * len(pulses)
    else:
        shape = jnp.broadcast_shapes(grids[0].shape, grids[1].shape)
        first, second = (jnp.broadcast_to(grid, shape) for grid in grids)
        n = motion.factors
        factors = [jnp.repeat(first, n, axis=0), jnp.tile(second, (n,) + (1,) * (second.ndim - 1))]
    carriers = (motion.carrier_1, motion.carrier_2)
    factors = [carriers[beam - 1] * factor for (beam, _), factor in zip(pulses, factors, strict=True)]
    complete = jnp.abs(jnp.sum(weights, axis=0) - 1) <= 10 * motion.error
    return factors, jnp.where((stated <= motion.error) & complete, weights, jnp.nan)


def lowest(
    eta: Float[Array, "modes ..."], n_bar: Float[Array, "modes ..."], coherent: Float[Array, "modes ..."] | None
) -> Float[Array, "..."]:
    """Where a grid of prod_m L_(n_m)(eta_m^2) begins: all but some 1e-14 of the distribution lies above.

    L_n(z) is J_0(2 sqrt(n z)) but for corrections of order z; of products, J_0 of the summed n z is a lower bound. No
    derivative: where the nodes lie is a choice.
    """
    z, n = lax.stop_gradient(eta) ** 2, lax.stop_gradient(n_bar) + 1e-12
    tail = z * _TAIL / jnp.log1p(1 / n)
    far = jnp.sum(z * n, axis=0) + jnp.max(tail, axis=0) + 6 * jnp.sqrt(jnp.sum(z**2 * n * (n + 1), axis=0))
    if coherent is not None:
        c = lax.stop_gradient(coherent)
        # Poisson's tail, and that of the beat of displacement and thermal amplitude.
        far = far + jnp.sum(z * c, axis=0) + 8.5 * jnp.sqrt(jnp.sum(z**2 * c * (2 * n + 1), axis=0)) + jnp.max(
            z * 12 * (c > 0), axis=0
        )  # fmt: skip
    s = jnp.minimum(far, _LEAST_AT)
    k = jnp.arange(1.0, 25.0).reshape((-1,) + (1,) * s.ndim)
    bessel = 1 + jnp.sum(jnp.cumprod(-s / k**2, axis=0), axis=0)
    return jnp.where(far >= _LEAST_AT, _LEAST, bessel) - _MARGIN


def truncation(angle: Float[Array, "..."], count: int) -> Float[Array, "..."]:
    """Error of interpolating a cosine of this angle at the end of [-1, 1] by `count` Chebyshev nodes.

    Coefficients left out, 2 J_j(angle) for j >= count, count twice; J_j(a) <= (a / 2)^j / j!, summed.
    """
    log_factorial = float(np.sum(np.log(np.arange(1, count + 1))))
    ratio = jnp.minimum(angle / 2 / (count + 1), 0.5)
    return 4 * jnp.exp(count * jnp.log(jnp.maximum(angle, 1e-12) / 2) - log_factorial) / (1 - ratio)


def quadrature_error(angle: Float[Array, "..."], numbers: int) -> Float[Array, "..."]:
    """Error of a Gauss quadrature of a thermal mean, angle = area eta^2 sqrt(n_bar (n_bar + 1)).

    50 (a / (1 + sqrt(1 + a^2)))^(2 numbers): the rate is Gauss and Laguerre's for a cosine of an exponential variable,
    the factor covers direct sums (tested).
    """
    angle = lax.stop_gradient(angle)
    return 50 * (angle / (1 + jnp.sqrt(1 + angle**2))) ** (2 * numbers)


def factors_for(low: float, area_rad: float, error: float) -> int:
    """Fewest nodes whose `truncation` is below `error` for areas up to `area_rad`, on a grid that begins at `low`."""
    angle = area_rad * (1 - low) / 2
    for count in range(2, 200):
        if 4 * np.sum(np.abs(jv(count + np.arange(60), angle))) <= error and count > angle:
            return count
    raise ValueError(f"an area of {area_rad:g} rad needs more than 200 nodes for an error of {error:g}; lower it.")


def _chebyshev(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in [-1, 1], and the matrix from means of T_0 ... to weights on the nodes."""
    angle = np.pi * (np.arange(count) + 0.5) / count
    matrix = 2 / count * np.cos(np.outer(angle, np.arange(count)))
    matrix[:, 0] /= 2
    return np.cos(angle), matrix


def _grid(low: Float[Array, "..."], count: int) -> Float[Array, "count ..."]:
    u = _chebyshev(count)[0].reshape((-1,) + (1,) * jnp.ndim(low))
    return low + (1 - low) * (u + 1) / 2


def _weights(beams: list[tuple], p: Float[Array, "modes numbers ..."], motion: Motion) -> Float[Array, "nodes ..."]:
    """Weights on the grid of one or two beams, given as (L_n of shape (modes, numbers, *axes), low)."""
    count, (_, matrix) = motion.factors, _chebyshev(motion.factors)
    shape = jnp.broadcast_shapes(p.shape[2:], *(slowed.shape[2:] for slowed, _ in beams))
    grids = [_grid(jnp.broadcast_to(low, shape), count) for _, low in beams]
    # Before any mode, all weight lies at F = 1, the upper end, where every T_j is one.
    start = jnp.asarray(matrix @ np.ones(count)).reshape((-1,) + (1,) * len(shape))
    weights = jnp.broadcast_to(start, (count, *shape))
    if len(beams) == 2:
        weights = weights[:, None] * weights[None]

    def basis(slowed: Float[Array, "numbers ..."], k: int) -> Float[Array, "orders nodes numbers ..."]:
        """T_j at each grid point times each factor of the mode."""
        low = beams[k][1]
        u = (2 * grids[k][:, None] * slowed[None] - 1 - low) / (1 - low)
        _, rows = lax.scan(lambda t, _: ((t[1], 2 * u * t[1] - t[0]), t[0]), (jnp.ones_like(u), u), length=count)
        return rows

    @jax.checkpoint
    def add(weights, mode):
        slowed, p = mode
        if len(beams) == 1:
            means = jnp.einsum("jkn...,k...,n...->j...", basis(slowed[0], 0), weights, p)
            return jnp.einsum("kj,j...->k...", matrix, means), None
        partial = jnp.einsum("jkn...,kl...->jln...", basis(slowed[0], 0), weights)
        means = jnp.einsum("jln...,iln...,n...->ji...", partial, basis(slowed[1], 1), p)
        return jnp.einsum("kj,li,ji...->kl...", matrix, matrix, means), None

    full = lambda a: jnp.broadcast_to(a, (*a.shape[:2], *shape))
    modes = max(a.shape[0] for a in (p, *(slowed for slowed, _ in beams)))
    rows = [jnp.broadcast_to(full(a), (modes, a.shape[1], *shape)) for a in (*(s for s, _ in beams), p)]
    weights = lax.scan(add, weights, (tuple(rows[:-1]), rows[-1]))[0]
    return weights.reshape((-1, *shape))


def planned(motion: Motion, n_bar, area_rad: float, error: float) -> Motion:
    """The motion with as many nodes as known values need.

    Args:
        motion: of known values.
        n_bar: largest mean phonon number of the reference mode, gains by heating included.
        area_rad: largest area of a pulse.
        error: of populations.

    Raises:
        ValueError: traced values, or an occupation that asks for more nodes than are sensible.
    """
    if is_traced(motion, n_bar):
        raise ValueError("nodes of the thermal average cannot be laid from traced values; plan before jit or grad.")
    n = motion.occupation(real_array(n_bar))
    each = area_rad * (2 if motion.line else 1)
    coherent = None if motion.coherent is None else _aligned(motion.coherent, n.ndim - 1)
    lows, heat = [], jnp.zeros(())
    for beam in (1, 2):
        eta = _aligned(motion.lamb_dicke(beam), n.ndim - 1)
        lows.append(float(jnp.min(lowest(eta, n, coherent))))
        heat = heat + eta**2 * jnp.sqrt(n * (n + 1))
    factors = factors_for(min(lows), each, error / 4)
    if coherent is not None:
        numbers = int(jnp.max(n + coherent + _TAIL * (n + 1) + 10 * jnp.sqrt(coherent * (2 * n + 1)) + 12))
    else:
        modes = len(motion.eta_1)
        sizes = (k for k in range(2, 129) if modes * quadrature_error(area_rad * jnp.max(heat), k) <= error / 4)
        numbers = next(sizes, 0)
    hottest = max(float(jnp.max(_aligned(motion.lamb_dicke(beam), n.ndim - 1) ** 2 * n)) for beam in (1, 2))
    if not 0 < numbers <= _MOST_NUMBERS or hottest * _TAIL > _SERIES_REACH:
        raise ValueError(
            f"a mean phonon number of {float(jnp.max(n)):g} at an area of {area_rad:g} rad asks for too many phonon "
            f"numbers in the thermal average; lower the occupation or the area, or raise the error of {error:g}."
        )
    return dataclasses.replace(motion, factors=factors, numbers=numbers, error=error)

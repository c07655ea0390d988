"""The calibrated command map: from what is wanted, (x_set, r_set), to the pulse areas that really give it.

A controller without a map commands theta = 2 asin sqrt(x), which an ideal ion obeys. The map inverts the device as it
is (`calibration.area_inverse`), and is kept as a table on the square of commands and as a Chebyshev polynomial in the
plain angles, which a controller evaluates with a few multiplications.

The grid is equally spaced in the plain angle: in x_set and r_set these are Chebyshev points, so that means over the
square of commands are Clenshaw-Curtis sums, and the numbers here compare with `targets.Obedience`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from calibration.area_inverse import Inverse, invert, laid, plain_areas, signal_at
from calibration.parameters import with_parameters
from calibration.targets import Playing, ion_of
from twin.dynamics import Adaptive
from twin.memristor import ClosedForm, IonMemristor
from twin.sampled import SampledIon
from twin.slices import Dense

LARGEST_RAD = 1.5 * math.pi
# A population this close to what is wanted is what is wanted: well above the solver's error.
_REACHED = 1e-7
_MOST_DEGREE = 9
# Weight in the fit of an area that the population does not feel to first order.
_FLOOR = 0.02


class AreaPolynomial(NamedTuple):
    """Areas as Chebyshev series in plain angles of what the device can give.

        x' = min(max(x_set, x_low), x_high),    r' = 1 - (1 - r_set) x_set / x', bounded by r_low and r_high likewise
        s = 4 / pi asin sqrt((z' - z_low) / (z_high - z_low)) - 1 for z = x, r
        theta_1 = sum c_j T_j(s_1),    theta_2 = sum c_jk T_j(s_1) T_k(s_2)

    Near what it can give at most, the area of a device turns as a square root, which the angle takes away.

    Attributes:
        coefficients_1: of theta_1, rad, shape (terms,). coefficients_2: of theta_2, rad, shape (terms, terms).
        x_range, r_range: inputs and transfers that the device can give.
        error: largest change of a population by the polynomials in place of the map, at its points and between them.
    """

    coefficients_1: Float[np.ndarray, " terms"]
    coefficients_2: Float[np.ndarray, "terms1 terms2"]
    x_range: tuple[float, float]
    r_range: tuple[float, float]
    error: float

    def areas(self, x_set: Float[Array, "..."], r_set: Float[Array, "..."]) -> tuple[Array, Array]:
        """(theta_1, theta_2) in rad for commands of one shape; never negative."""
        s_1, s_2 = _angles(x_set, r_set, self.x_range, self.r_range)
        t_1, t_2 = (_chebyshev(s, n) for s, n in zip((s_1, s_2), self.coefficients_2.shape, strict=True))
        theta_1 = jnp.tensordot(self.coefficients_1, _chebyshev(s_1, len(self.coefficients_1)), 1)
        theta_2 = jnp.einsum("jk,j...,k...->...", self.coefficients_2, t_1, t_2)
        return jnp.maximum(theta_1, 0.0), jnp.maximum(theta_2, 0.0)


class Bands(NamedTuple):
    """What an uncertain device does to a map.

    Attributes:
        draws: how many devices.
        theta_1_std, theta_2_std: standard deviation of the areas over the devices' own maps, rad.
        rms_of_map: rms of y - (1 - r) x over the square for each device under the one map, shape (draws,).
        rms_of_own: the same under each device's own map: the difference is what not knowing better costs.
    """

    draws: int
    theta_1_std: Float[np.ndarray, " inputs"]
    theta_2_std: Float[np.ndarray, "inputs transfers"]
    rms_of_map: Float[np.ndarray, " draws"]
    rms_of_own: Float[np.ndarray, " draws"]


@dataclasses.dataclass(frozen=True)
class CommandMap:
    """Areas to command for each input and transfer, rad, where pi is full command today.

    Attributes:
        x_set, r_set: the grid, shapes (inputs,) and (transfers,). offsets_hz: laser offsets that go with it.
        theta_1, theta_2: areas, shapes (inputs,) and (inputs, transfers).
        residual_1, residual_2: x - x_set and y - (1 - r_set) x_set under the map.
        reached_1, reached_2: where the device can give what is wanted; elsewhere the areas come nearest.
        largest_rad: area that was allowed.
        rms_plain, rms_mapped: rms of y - (1 - r) x over the square, without and with the map, by an independent solver;
            `rms_reached`: with the map, where it reaches.
        polynomial: the map for controllers. bands: what is uncertain, where draws were given.
    """

    x_set: Float[np.ndarray, " inputs"]
    r_set: Float[np.ndarray, " transfers"]
    offsets_hz: tuple[float, float]
    theta_1: Float[np.ndarray, " inputs"]
    theta_2: Float[np.ndarray, "inputs transfers"]
    residual_1: Float[np.ndarray, " inputs"]
    residual_2: Float[np.ndarray, "inputs transfers"]
    reached_1: Bool[np.ndarray, " inputs"]
    reached_2: Bool[np.ndarray, "inputs transfers"]
    largest_rad: float
    rms_plain: float
    rms_mapped: float
    rms_reached: float
    polynomial: AreaPolynomial
    bands: Bands | None = None


def command_map(
    device: Playing,
    offsets_hz: tuple[float, float] = (0.0, 0.0),
    *,
    points: int = 11,
    largest_rad: float = LARGEST_RAD,
    polynomial_error: float = 1e-4,
    draws: Mapping[str, Float[np.ndarray, " draws"]] | None = None,
    error: float = 1e-9,
) -> CommandMap:
    """Inverts a device on the square of commands.

    Main arguments:
        device: the (calibrated) device, of known scalar values. Automatic methods are replaced by a static grid.
        offsets_hz: laser offsets that will be set.

    Other arguments:
        points: of the grid a side.
        largest_rad: area that hardware can command; pi is full command today.
        polynomial_error: change of a population that the polynomial may make; its degree is the least that keeps it,
            or at most nine, and its error is stated either way.
        draws: {parameter: values}, devices that a calibration left possible (`robust.parameter_draws`), for bands.
        error: of populations.

    Raises:
        ValueError: a grid without room, draws of unlike lengths, or a device that cannot be solved.
    """
    if points < 3:
        raise ValueError(f"`points` must be at least 3, but is {points}; a map needs its ends and what lies between.")
    if not largest_rad > 0:
        raise ValueError(f"`largest_rad` must be positive, but is {largest_rad:g}; pi is full command today.")
    offsets = (float(offsets_hz[0]), float(offsets_hz[1]))
    drawn = {name: np.asarray(values, float) for name, values in (draws or {}).items()}
    if len({values.shape for values in drawn.values()}) > 1:
        lengths = ", ".join(f"{name}: {values.size}" for name, values in drawn.items())
        raise ValueError(f"`draws` must hold as many values of each parameter, but holds {lengths}; draw them jointly.")
    for name, values in drawn.items():
        if values.size == 0 or not np.all(np.isfinite(values)):
            raise ValueError(f"`draws` of {name} must be finite numbers, but are {values}; leave out what is not.")
        if not hasattr(ion_of(device), name):
            raise ValueError(f"`{name}` is no parameter of the ion; draw what a calibration frees.")
    boxes = {name: (float(values.min()), float(values.max())) for name, values in drawn.items()}
    boxes = {name: (min(low, now), max(high, now)) for name, (low, high) in boxes.items()
             for now in [float(getattr(ion_of(device), name))]}  # fmt: skip
    roomy = laid(device, offsets, largest_rad=largest_rad, boxes=boxes, error=error)
    x = _commands(points)
    found = _inverted(roomy, x, offsets, largest_rad)
    if not all(np.all(np.isfinite(part)) for part in found):
        raise ValueError(
            f"the device has no finite answer for areas up to {largest_rad:.3g} rad; lower `largest_rad`, or give "
            "parameters that can be solved."
        )
    theta_1, theta_2, residual_1, residual_2 = found
    checked = reference(roomy)
    before = _disobeyed(checked, *plain_areas(device, *_square(x)), x, offsets)
    after = _disobeyed(checked, _rows(theta_1, x), theta_2.ravel(), x, offsets)
    reached_1, reached_2 = (np.abs(residual) <= _REACHED for residual in (residual_1, residual_2))
    return CommandMap(
        x, x, offsets, theta_1, theta_2, residual_1, residual_2, reached_1, reached_2, float(largest_rad),
        rms_plain=_rms(before), rms_mapped=_rms(after), rms_reached=_rms(after, reached_2),
        polynomial=_polynomial(roomy, x, found, offsets, largest_rad, polynomial_error),
        bands=_bands(roomy, x, found, drawn, offsets, largest_rad) if drawn else None,
    )  # fmt: skip


def mapped(
    device: Playing, commands: CommandMap, x_set: Float[Array, " cycles"], r_set: Float[Array, " cycles"]
) -> tuple[Array, Array]:
    """Populations of s of a device with the map's polynomial in place: x after pulse 1 alone, y after both.

    Args:
        device: any device, such as the one that the map was made for; it is laid for the map's areas.
        commands: the map. x_set, r_set: what is wanted, in [0, 1], one shape.
    """
    roomy = laid(device, commands.offsets_hz, largest_rad=commands.largest_rad)
    theta_1, theta_2 = commands.polynomial.areas(jnp.asarray(x_set, float), jnp.asarray(r_set, float))
    theta_1, theta_2 = (jnp.minimum(theta, commands.largest_rad) for theta in (theta_1, theta_2))
    x, y = (_play(roomy, theta_1, theta_2, commands.offsets_hz, alone) for alone in (True, False))
    return x, y


def reference(device: Playing) -> Playing:
    """The same laid device under another solver: adaptive, or matrix exponentials of every slice."""
    if isinstance(device, SampledIon):
        return dataclasses.replace(device, rule=Dense())
    if isinstance(device.method, ClosedForm):
        return device
    return dataclasses.replace(device, method=Adaptive(rtol=1e-11, atol=1e-12))


def _commands(points: int) -> Float[np.ndarray, " points"]:
    return np.sin(np.pi * np.arange(points) / (2 * (points - 1))) ** 2


def _square(x) -> tuple[Array, Array]:
    return jnp.repeat(jnp.asarray(x), len(x)), jnp.tile(jnp.asarray(x), len(x))


def _rows(theta_1, x) -> Array:
    return jnp.repeat(jnp.asarray(theta_1), len(x))


def _inverted(device, x, offsets, largest_rad) -> Inverse:
    return Inverse(*(np.asarray(part) for part in _invert(device, jnp.asarray(x), offsets, largest_rad)))


@eqx.filter_jit
def _invert(device, x, offsets, largest_rad) -> Inverse:
    return invert(device, x, x, offsets, largest_rad=largest_rad)


def _played(device, theta_1, theta_2, offsets, alone: bool) -> Float[np.ndarray, " lanes"]:
    return np.asarray(_play(device, jnp.asarray(theta_1), jnp.asarray(theta_2), offsets, alone))


@eqx.filter_jit
def _play(device, theta_1, theta_2, offsets, alone: bool) -> Array:
    return signal_at(device, theta_1, theta_2, offsets, alone=alone)


def _disobeyed(device, theta_1, theta_2, x, offsets) -> Float[np.ndarray, "inputs transfers"]:
    return _played(device, theta_1, theta_2, offsets, False).reshape(len(x), len(x)) - np.outer(x, 1 - x)


def _rms(residuals, where=True) -> float:
    weights = clenshaw_curtis(len(residuals))
    weights = np.outer(weights, weights) * where
    return float(np.sqrt(np.sum(weights * residuals**2) / np.sum(weights)))


def clenshaw_curtis(points: int) -> Float[np.ndarray, " points"]:
    """Weights of a mean over [0, 1] at the Chebyshev points (1 - cos(pi j / (points - 1))) / 2."""
    n = points - 1
    j, k = np.arange(points), np.arange(0, points, 2)
    moments = np.where((k == 0) | (k == n), 0.5, 1.0) / (1.0 - k**2)
    ends = np.where((j == 0) | (j == n), 0.5, 1.0)
    return 2 * ends / n * (np.cos(np.pi * np.outer(j, k) / n) @ moments)


def _angles(x, r, x_range: tuple[float, float], r_range: tuple[float, float]) -> tuple[Array, Array]:
    """Both angles in [-1, 1]."""
    given = jnp.clip(x, *x_range)
    asked = jnp.clip(1 - (1 - r) * jnp.where(given > 0, x / jnp.where(given > 0, given, 1.0), 1.0), *r_range)
    shares = ((z - low) / (high - low) for z, (low, high) in ((given, x_range), (asked, r_range)))
    s_1, s_2 = (4 * jnp.arcsin(jnp.sqrt(jnp.clip(share, 0.0, 1.0))) / math.pi - 1 for share in shares)
    return s_1, s_2


def _chebyshev(s, terms: int) -> Array:
    return jnp.cos(jnp.arange(terms).reshape((-1,) + (1,) * jnp.ndim(s)) * jnp.arccos(jnp.clip(s, -1.0, 1.0)))


def _polynomial(device, x, found: Inverse, offsets, largest_rad, wanted_error: float) -> AreaPolynomial:
    """Series of the least degree that serves, fitted where populations feel the areas."""
    # Halfway between the points in the plain angle; full command once more keeps the shapes, and the programs.
    between = np.append(_commands(2 * len(x) - 1)[1::2], 1.0)
    true = [_populations(device, grid, one.theta_1, one.theta_2.ravel(), offsets) for grid, one in
            ((x, found), (between, _inverted(device, between, offsets, largest_rad)))]  # fmt: skip
    # Weights need no digits: finite differences.
    step = 1e-4
    moved = _populations(device, x, found.theta_1 + step, found.theta_2.ravel(), offsets)
    weight_1 = np.abs(moved[0] - true[0][0]) / step + _FLOOR
    moved = _populations(device, x, found.theta_1, found.theta_2.ravel() + step, offsets)
    weight_2 = np.abs(moved[1] - true[0][1]) / step + _FLOOR
    given = x + found.residual_1
    x_range = (float(given[0]), float(given[-1]))
    # Hardly different from input to input.
    ends = np.sum(np.outer(x, [1.0, 0.0]) + found.residual_2[:, [0, -1]], axis=0) / np.sum(given)
    r_range = (float(1 - ends[0]), float(1 - ends[1]))
    s_1, s_2 = (np.asarray(s) for s in _angles(*_square(x), x_range, r_range))
    tried: list[AreaPolynomial] = []
    for degree in range(1, min(_MOST_DEGREE, len(x) - 2) + 1):
        one, other = (np.polynomial.chebyshev.chebvander(s, degree) for s in (s_1, s_2))
        both = np.einsum("ij,ik->ijk", one, other).reshape(len(one), -1)
        fit = lambda basis, weight, theta: np.linalg.lstsq(weight[:, None] * basis, weight * theta, rcond=None)[0]
        c_1, c_2 = fit(one[:: len(x)], weight_1, found.theta_1), fit(both, weight_2, found.theta_2.ravel())
        series = AreaPolynomial(c_1, c_2.reshape(degree + 1, degree + 1), x_range, r_range, math.inf)
        error = 0.0
        for grid, wanted in zip((x, between), true, strict=True):
            theta_1, theta_2 = series.areas(*_square(grid))
            got = _populations(device, grid, theta_1[:: len(x)], theta_2, offsets)
            error = max(error, *(float(np.max(np.abs(a - b))) for a, b in zip(got, wanted, strict=True)))
        tried.append(series._replace(error=error))
        if error <= wanted_error:
            break
    return min(tried, key=lambda series: series.error)


def _populations(device, x, theta_1, theta_2, offsets) -> tuple[np.ndarray, np.ndarray]:
    """After pulse 1 alone, for each input; after both pulses, for each input and transfer."""
    alone = _played(device, theta_1, np.zeros(len(x)), offsets, True)
    return alone, _played(device, _rows(theta_1, x), theta_2, offsets, False)


def _bands(device, x, found: Inverse, drawn, offsets, largest_rad) -> Bands:
    rows = []
    for values in zip(*drawn.values(), strict=True):
        changed = _with(device, {name: jnp.asarray(value) for name, value in zip(drawn, values, strict=True)})
        own = _inverted(changed, x, offsets, largest_rad)
        of_map = _disobeyed(changed, _rows(found.theta_1, x), found.theta_2.ravel(), x, offsets)
        rows.append((own.theta_1, own.theta_2, _rms(of_map), _rms(own.residual_2)))
    theta_1, theta_2, of_map, of_own = (np.array(column) for column in zip(*rows, strict=True))
    return Bands(len(rows), np.std(theta_1, axis=0), np.std(theta_2, axis=0), of_map, of_own)


def _with(device: Playing, values) -> Playing:
    if isinstance(device, SampledIon):
        return dataclasses.replace(device, ion=cast(IonMemristor, with_parameters(device.ion, values)))
    return cast(IonMemristor, with_parameters(device, values))

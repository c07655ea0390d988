"""Metrics of a hysteresis loop y(x), given as one closed period of points; pure and differentiable.

Every function takes the points of one period in order of time, closes the polygon from the last point to the first, and
leaves the axes as they are. Batch with `jax.vmap`. A loop that does not close, that is, whose closing side is more
than twice its longest other side, is refused: its area would depend on the missing piece.
"""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real

# A closing side up to this many longest sides still passes as one more step around the loop.
OPEN_END_RATIO = 2.0

# lobe_area works on the sheared loop (x + SHEAR y, y). Areas are the same, but repeated inputs no longer make vertical
# sides or columns of vertices, where the derivative would be one-sided. Any value far from a ratio of steps will do.
SHEAR = 0.3183098861837907


def _sides(x: Float[Array, " points"], y: Float[Array, " points"]) -> tuple[Array, Array]:
    return jnp.roll(x, -1) - x, jnp.roll(y, -1) - y


def _length(dx: Array, dy: Array) -> Array:
    """Euclidean length, with derivative 0 instead of 0/0 where the length is exactly 0."""
    square = dx**2 + dy**2
    return jnp.where(square == 0, 0.0, jnp.sqrt(jnp.where(square == 0, 1.0, square)))


def _is_closed(x: Float[Array, " points"], y: Float[Array, " points"]) -> Bool[Array, ""]:
    """Whether the polygon closes; a known open end is refused here, a traced one becomes NaN in its lane."""
    if x.size < 3:
        raise ValueError(f"A loop needs at least 3 points, but has {x.size}.")
    length = _length(*jax.lax.stop_gradient(_sides(x, y)))
    closing, longest = length[-1], length[:-1].max()
    if not isinstance(closing, Tracer) and closing > OPEN_END_RATIO * longest:
        raise ValueError(
            f"The loop is open: its last point is {closing:.3g} from its first, but its longest step is {longest:.3g}. "
            "Pass exactly one period, in order of time and in the steady state."
        )
    # False for a NaN anywhere in the loop, which could else vanish with a side that drops out of a sum.
    return closing <= OPEN_END_RATIO * longest


def signed_area(x: Float[Array, " points"], y: Float[Array, " points"]) -> Float[Array, ""]:
    """Signed area of the loop, the closed integral of y dx.

        A = 1/2 sum_k (y_k x_{k+1} - x_k y_{k+1})

    Positive where the branch of rising x lies above, as in the memristor with lagging feedback; the lobes of a
    self-crossing loop count with their own signs, see `lobe_area`.

    Args:
        x, y: input and output of one period, shape (points,).

    Returns:
        Area in units of x times y, scalar.

    Raises:
        ValueError: an open loop, or fewer than three points. An open loop while tracing gives NaN, as does a NaN point.
    """
    closed = _is_closed(x, y)
    dx, _ = _sides(x, y)
    return jnp.where(closed, jnp.sum((y + jnp.roll(y, -1)) / 2 * dx), jnp.nan)


def lobe_area(x: Float[Array, " points"], y: Float[Array, " points"], max_crossings: int = 16) -> Float[Array, ""]:
    """Sum of the lobes of a self-crossing loop without their signs: the integral of |winding number| over the plane.

    The plane is cut into columns at the abscissae of all vertices and of up to `max_crossings` self-crossings. Inside
    a column the sides are straight and keep their order, so the height sum_i |w_i| (y_{i+1} - y_i) between consecutive
    sides is linear in x, and the midpoint is exact. The result is the exact area of the polygon, to rounding, as long
    as it crosses itself no more often than that. Each further crossing lies inside a column of width h and costs at
    most kappa h^2/4, kappa the difference of the two slopes (columns and slopes in the sheared axes, see `SHEAR`). A
    loop that retraces itself crosses itself everywhere and has area 0 all the same. Regions that the loop goes around
    twice count twice.

    Args:
        x, y: input and output of one period, shape (points,).
        max_crossings: number of self-crossings that are located exactly (static).

    Returns:
        Area in units of x times y, scalar; |signed_area| for a loop that does not cross itself.

    Raises:
        ValueError: as `signed_area`.
    """
    closed = _is_closed(x, y)
    a = x + SHEAR * y
    da, dy = _sides(a, y)
    # The height is continuous, so moving a cut changes the integral at second order only: cuts carry no derivative.
    cuts = jax.lax.stop_gradient(jnp.sort(jnp.concatenate([a, _crossings(a, y, da, dy, max_crossings)])))
    middle, width = (cuts[1:] + cuts[:-1])[:, None] / 2, jnp.diff(cuts)
    start, end = a, a + da
    direction = jnp.where((start < middle) & (middle < end), 1, jnp.where((end < middle) & (middle < start), -1, 0))
    # A side that does not cross the column takes part with direction 0 at height 0, which changes no winding number.
    fraction = (middle - start) / jnp.where(da == 0, 1.0, da)
    height = jnp.where(direction == 0, 0.0, y + fraction * dy)
    order = jnp.argsort(jax.lax.stop_gradient(height), axis=1)
    height = jnp.take_along_axis(height, order, axis=1)
    winding = jnp.cumsum(jnp.take_along_axis(direction, order, axis=1), axis=1)[:, :-1]
    column = jnp.sum(jnp.abs(winding) * jnp.diff(height, axis=1), axis=1)
    return jnp.where(closed, jnp.sum(width * column), jnp.nan)


def _crossings(
    a: Float[Array, " points"], y: Float[Array, " points"], da: Array, dy: Array, most: int
) -> Float[Array, " crossings"]:
    """Abscissae where two sides cross, padded with the largest abscissa of the loop."""
    apart_a, apart_y = a - a[:, None], y - y[:, None]  # from side i (row) to side j (column)
    cross = da[:, None] * dy - dy[:, None] * da
    divisor = jnp.where(cross == 0, 1.0, cross)
    along_i = (apart_a * dy - apart_y * da) / divisor
    along_j = (apart_a * dy[:, None] - apart_y * da[:, None]) / divisor
    hit = (cross != 0) & (along_i > 0) & (along_i < 1) & (along_j > 0) & (along_j < 1)
    # Each pair once; neighbours meet at their vertex, which is a cut already.
    pair = jnp.triu(hit, k=2).at[0, -1].set(False)
    return jnp.sort(jnp.where(pair, a[:, None] + along_i * da[:, None], a.max()).ravel())[:most]


def perimeter(x: Float[Array, " points"], y: Float[Array, " points"]) -> Float[Array, ""]:
    """Perimeter of the closed polygon, axes not rescaled.

    Args:
        x, y: input and output of one period, shape (points,).

    Returns:
        P = sum_k sqrt(dx_k^2 + dy_k^2), scalar. A repeated point adds 0, with derivative 0.

    Raises:
        ValueError: as `signed_area`.
    """
    closed = _is_closed(x, y)
    return jnp.where(closed, jnp.sum(_length(*_sides(x, y))), jnp.nan)


def form_factor(x: Float[Array, " points"], y: Float[Array, " points"]) -> Float[Array, ""]:
    """Form factor F = 4 pi |A| / P^2: 1 for a circle, 0 for a line retraced.

    Args:
        x, y: input and output of one period, shape (points,).

    Returns:
        F in [0, 1], scalar, from the signed area; NaN for a loop that is a single point.

    Raises:
        ValueError: as `signed_area`.

    References:
        [1] Baldazzi et al., arXiv:2602.14736 (2026); the definition is inferred from their maximum of about 0.95, which
            it reproduces for two crossed memristors.
    """
    return 4 * jnp.pi * jnp.abs(signed_area(x, y)) / perimeter(x, y) ** 2


def pinch_offset(x: Float[Array, " points"], y: Float[Array, " points"]) -> Float[Array, ""]:
    """Distance of the closed polygon from the origin: 0 for a loop pinched there.

    Args:
        x, y: input and output of one period, shape (points,).

    Returns:
        Distance in the units of x and y, scalar. The derivative has length one off the origin and is 0 on it, the mean
        over all directions of leaving it.

    Raises:
        ValueError: as `signed_area`.
    """
    closed = _is_closed(x, y)
    dx, dy = _sides(x, y)
    square = dx**2 + dy**2
    # The nearest point of each side; by the envelope theorem its place on the side carries no derivative.
    along = jax.lax.stop_gradient(jnp.clip(-(x * dx + y * dy) / jnp.where(square > 0, square, 1.0), 0.0, 1.0))
    return jnp.where(closed, jnp.min(_length(x + along * dx, y + along * dy)), jnp.nan)


def branch_width(
    x: Float[Array, " points"], y: Float[Array, " points"], at: Real[ArrayLike, "*places"]
) -> Float[Array, "*places"]:
    """Height between the branches of rising and of falling x at an input.

    Args:
        x, y: input and output of one period, shape (points,).
        at: input at which the loop is cut, any shape.

    Returns:
        Mean y of the sides that cross x = at upwards minus mean y of those that cross it downwards, the polygon
        linearly interpolated; NaN where the loop does not reach. Shape of `at`.

    Raises:
        ValueError: as `signed_area`.
    """
    closed = _is_closed(x, y)
    place = jnp.asarray(at, x.dtype)[..., None]
    dx, dy = _sides(x, y)
    end = jnp.roll(x, -1)
    rising = (x <= place) & (place < end)
    falling = (end <= place) & (place < x)
    height = y + (place - x) / jnp.where(dx == 0, 1.0, dx) * dy

    def mean(chosen: Array) -> Array:
        count = chosen.sum(axis=-1)
        return jnp.where(
            count > 0, jnp.where(chosen, height, 0.0).sum(axis=-1) / jnp.where(count > 0, count, 1), jnp.nan
        )

    return jnp.where(closed, mean(rising) - mean(falling), jnp.nan)

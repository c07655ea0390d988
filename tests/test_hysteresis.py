"""Loop metrics against polygons of known area, the closed formulas of the ideal memristor, and finite differences."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twin import hysteresis
from twin.memory import Exponential, MovingAverage

METRICS = {
    "signed_area": hysteresis.signed_area,
    "lobe_area": hysteresis.lobe_area,
    "perimeter": hysteresis.perimeter,
    "form_factor": hysteresis.form_factor,
    "pinch_offset": hysteresis.pinch_offset,
    "branch_width": lambda x, y: hysteresis.branch_width(x, y, 0.43),
}
metrics = pytest.mark.parametrize("metric", list(METRICS.values()), ids=list(METRICS))

signed_area, perimeter, form_factor, pinch_offset, branch_width = (
    jax.jit(f)
    for f in (
        hysteresis.signed_area,
        hysteresis.perimeter,
        hysteresis.form_factor,
        hysteresis.pinch_offset,
        hysteresis.branch_width,
    )
)
lobe_area = jax.jit(hysteresis.lobe_area, static_argnames="max_crossings")


@eqx.filter_jit
def ideal_loop(memory, points, periods=4):
    """One steady period of x = sin^2(pi k/K) and y = (1 - r) x."""
    x = jnp.sin(jnp.pi * jnp.arange(periods * points) / points) ** 2
    y = (1 - memory.filter(x)) * x
    return x[-points:], y[-points:]


def averaged(metric, points, window):
    """A metric of the ideal loop with a moving average."""
    return metric(*ideal_loop(MovingAverage(window), points))


def continuum(metric, ratio, base=200, levels=4):
    """Limit K -> infinity at T/T_osc = ratio, by Richardson extrapolation in powers of 1/K."""
    points = base * 2 ** np.arange(levels)
    return extrapolate([averaged(metric, int(K), ratio * K) for K in points])


def extrapolate(values):
    """Neville's scheme at 1/K = 0 for values at K, 2K, 4K, ..."""
    table = [float(v) for v in values]
    for order in range(1, len(table)):
        table = [(2**order * b - a) / (2**order - 1) for a, b in itertools.pairwise(table)]
    return table[0]


def polygon(*points):
    x, y = zip(*points, strict=True)
    return jnp.asarray(x, float), jnp.asarray(y, float)


def curve(points, x_of_t, y_of_t, start=0.0):
    t = start + 2 * jnp.pi * jnp.arange(points) / points
    return x_of_t(t), y_of_t(t)


# ------------------------------------------------------------------------------------------------ known polygons

SQUARE = polygon((0, 0), (0, 1), (1, 1), (1, 0))  # up on the left: rising x on the upper side
BOW_TIE = polygon((0, 0), (1, 1), (1, 0), (0, 1))
# One lobe of area 4, one of area 1, crossing at a vertex that is visited twice.
TWO_LOBES = polygon((0, 0), (-2, -2), (-2, 2), (0, 0), (1, -1), (1, 1))
TWICE_ROUND = tuple(jnp.concatenate([c, c]) for c in SQUARE)
PENTAGRAM = tuple(c[jnp.arange(5) * 2 % 5] for c in curve(5, jnp.sin, jnp.cos))


def test_square():
    assert signed_area(*SQUARE) == 1
    assert lobe_area(*SQUARE) == pytest.approx(1, rel=1e-15)
    assert signed_area(SQUARE[0][::-1], SQUARE[1][::-1]) == -1
    assert perimeter(*SQUARE) == 4
    assert form_factor(*SQUARE) == pytest.approx(np.pi / 4, rel=1e-15)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_lobes_count_without_their_sign(shift):
    for loop, signed, lobes in [(BOW_TIE, 0, 0.5), (TWO_LOBES, 3, 5), (TWICE_ROUND, 2, 2)]:
        x, y = loop[0] + shift * loop[1], loop[1] + shift  # an affine map of determinant one
        assert signed_area(x, y) == pytest.approx(signed, abs=1e-14)
        assert lobe_area(x, y) == pytest.approx(lobes, rel=1e-14)


def test_lobe_area_counts_windings():
    # A pentagram covers its tips once and its inner pentagon twice: the shoelace formula says the same.
    assert lobe_area(*PENTAGRAM) == pytest.approx(abs(float(signed_area(*PENTAGRAM))), rel=1e-14)
    # A square with a smaller one inside, run through backwards by way of a bridge: once leaves a hole, twice a -1.
    outer, inner = [(0, 0), (0, 3), (3, 3), (3, 0), (0, 0)], [(1, 1), (2, 1), (2, 2), (1, 2)]
    for rounds, signed, lobes in [(1, 8, 8), (2, 7, 9)]:
        loop = polygon(*outer, *inner * rounds, (1, 1))
        assert signed_area(*loop) == pytest.approx(signed, rel=1e-14)
        assert lobe_area(*loop) == pytest.approx(lobes, rel=1e-14)


def test_figure_eight_of_known_area():
    # x = sin t, y = sin 2t: two lobes of 4/3 each, polygon error of second order.
    loops = [curve(51 * 2**n, jnp.sin, lambda t: jnp.sin(2 * t), start=0.1) for n in range(3)]
    assert signed_area(*loops[0]) == pytest.approx(0, abs=1e-14)
    errors = [abs(float(lobe_area(*loop)) - 8 / 3) for loop in loops]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 4, rtol=0.02)


@pytest.mark.parametrize("start", [0.0, 0.1, 0.77])
def test_lobe_area_is_exact_when_branches_cross_inside_a_column(start):
    # Unequal lobes; each lobe is measured on its own, as a polygon cut at the crossing.
    t = start + 2 * np.pi * np.arange(41) / 41
    x, y = np.sin(t) + 0.2 * np.cos(2 * t), np.sin(2 * t) + 0.1 * np.sin(t)
    expected = winding_integral(x, y)
    assert lobe_area(jnp.asarray(x), jnp.asarray(y)) == pytest.approx(expected, rel=1e-12)


def winding_integral(x, y):
    """The same integral by another way: split the polygon at its one crossing and add two shoelace areas."""
    z = x + 1j * y
    n = len(z)
    for i in range(n):
        for j in range(i + 2, n - (i == 0)):
            a, b, c, d = z[i], z[(i + 1) % n], z[j], z[(j + 1) % n]
            u, v = np.linalg.solve(
                [[(b - a).real, (c - d).real], [(b - a).imag, (c - d).imag]], [(c - a).real, (c - a).imag]
            )
            if 0 <= u < 1 and 0 <= v < 1:
                cut = a + u * (b - a)
                first, second = np.r_[cut, z[i + 1 : j + 1]], np.r_[cut, z[j + 1 :], z[: i + 1]]
                return sum(
                    abs(np.sum(w.real * np.roll(w.imag, -1) - w.imag * np.roll(w.real, -1))) / 2
                    for w in (first, second)
                )
    raise AssertionError("this loop was made to cross itself once")


def test_error_of_a_crossing_that_is_not_located():
    # Bow tie: one column of width h, slopes that differ by kappa in the sheared axes, error up to kappa h^2/4.
    x, y = curve(50, jnp.sin, lambda t: jnp.sin(2 * t), start=0.1)
    error = abs(float(lobe_area(x, y, max_crossings=0) - lobe_area(x, y)))
    a = np.sort(np.asarray(x) + np.asarray(y) / np.pi)
    h = np.diff(a)[np.searchsorted(a, 0.0) - 1]
    kappa = 2 / (1 + 2 / np.pi) - (-2) / (1 - 2 / np.pi)
    assert 0 < error <= abs(kappa) * h**2 / 4 * 1.1


def test_retraced_line_has_no_area():
    x = jnp.sin(jnp.pi * jnp.arange(40) / 40) ** 2
    assert lobe_area(x, x / 2) == pytest.approx(0, abs=1e-15)
    assert lobe_area(x, 0.3 + x / 3) == pytest.approx(0, abs=1e-15)
    assert signed_area(x, x / 2) == pytest.approx(0, abs=1e-15)
    assert perimeter(x, x / 2) == pytest.approx(np.sqrt(5), rel=1e-14)


def test_circle_has_form_factor_one():
    loops = [curve(20 * 2**n, jnp.sin, jnp.cos) for n in range(4)]
    assert extrapolate([form_factor(*loop) for loop in loops]) == pytest.approx(1, rel=1e-6)


def test_pinch_offset():
    assert pinch_offset(*BOW_TIE) == 0
    assert pinch_offset(SQUARE[0] + 0.3, SQUARE[1] - 0.5) == pytest.approx(0.3, rel=1e-15)  # a side is nearest
    assert pinch_offset(SQUARE[0] + 0.3, SQUARE[1] + 0.4) == pytest.approx(0.5, rel=1e-15)  # a vertex is nearest
    gradient = jax.grad(pinch_offset, argnums=(0, 1))
    np.testing.assert_array_equal(gradient(*BOW_TIE), np.zeros((2, 4)))
    np.testing.assert_allclose(
        gradient(SQUARE[0] + 0.3, SQUARE[1] + 0.4), [[0.6, 0, 0, 0], [0.8, 0, 0, 0]], rtol=0, atol=1e-15
    )


def test_branch_width_of_a_square_and_off_the_loop():
    np.testing.assert_allclose(branch_width(*SQUARE, jnp.array([0.0, 0.25, 0.9])), 1.0)
    assert np.isnan(branch_width(*SQUARE, 1.5))
    assert branch_width(*BOW_TIE, 0.25) == pytest.approx(-0.5)
    assert branch_width(*BOW_TIE, 0.75) == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------ the ideal memristor


@pytest.mark.parametrize(
    ("n_w", "area", "form"), [(10, 0.2680153507, 0.56275702), (15, 0.2919843430, None), (20, 0.2484610426, None)]
)
def test_forty_points(n_w, area, form):
    x, y = ideal_loop(MovingAverage(n_w), 40)
    assert signed_area(x, y) == pytest.approx(area, rel=1e-8)
    assert lobe_area(x, y) == pytest.approx(area, rel=1e-8)
    if form is not None:
        assert form_factor(x, y) == pytest.approx(form, rel=1e-8)


@pytest.mark.parametrize(("points", "n_w"), [(40, 10), (40, 37), (41, 6), (64, 100)])
def test_area_of_the_discrete_loop(points, n_w):
    # (pi/8) S_d sin(lag) of the smooth loop, times sin(w)/w of its polygon with w = 2 pi/K.
    w = 2 * np.pi / points
    s_d, lag = np.sin(n_w * w / 2) / (n_w * np.sin(w / 2)), w * (n_w + 1) / 2
    expected = np.pi / 8 * s_d * np.sin(lag) * np.sin(w) / w
    loop = ideal_loop(MovingAverage(n_w), points, periods=6)
    assert signed_area(*loop) == pytest.approx(expected, abs=1e-12)
    assert lobe_area(*loop) == pytest.approx(abs(expected), abs=1e-12)


@pytest.mark.parametrize(("ratio", "area"), [(1 / 4, 1 / 4), (1 / 2, 1 / 4), (3 / 4, 1 / 12), (5 / 2, 1 / 20)])
def test_area_in_the_continuum(ratio, area):
    assert continuum(signed_area, ratio) == pytest.approx(area, rel=1e-6)


@pytest.mark.parametrize("periods", [1, 2])
def test_no_area_when_the_window_is_a_whole_number_of_periods(periods):
    loop = ideal_loop(MovingAverage(40 * periods), 40)
    assert abs(signed_area(*loop)) < 1e-12
    assert lobe_area(*loop) < 1e-12
    assert perimeter(*loop) == pytest.approx(np.sqrt(5), rel=1e-6)  # y = x/2, there and back
    np.testing.assert_allclose(loop[1], loop[0] / 2, rtol=0, atol=1e-14)


def test_largest_area():
    # tan(phi) = 2 phi: T/T_osc = 0.3710096482. The discrete loop at 371/1000 is 5e-11 below the maximum.
    assert continuum(signed_area, 0.371, base=1000) == pytest.approx(0.2845542132, rel=1e-8)


def test_place_of_the_largest_area():
    # Continuous-time memory at K points; Newton's step from 0.371 by the derivatives of signed_area itself.
    def area(ratio, points=64):
        phase, phi = 2 * jnp.pi * jnp.arange(points) / points, jnp.pi * ratio
        x, r = (1 - jnp.cos(phase)) / 2, 0.5 - 0.5 * jnp.sin(phi) / phi * jnp.cos(phase - phi)
        return signed_area(x, (1 - r) * x)

    newton = jax.jit(lambda t: t - jax.grad(area)(t) / jax.grad(jax.grad(area))(t))
    ratio = newton(newton(newton(0.371)))
    assert float(ratio) == pytest.approx(0.3710096482, rel=1e-8)
    polygon_factor = np.sin(2 * np.pi / 64) / (2 * np.pi / 64)
    assert float(area(ratio)) / polygon_factor == pytest.approx(0.2845542132, rel=1e-8)


def test_derivative_of_the_area_with_respect_to_the_window():
    # dA/dT = (pi/2 - 1)/T_osc at T_osc/4; the right derivative at each integer window converges to it.
    points = 40 * 2 ** np.arange(5)

    def slope(K):
        return K * jax.jit(jax.grad(lambda t: signed_area(*ideal_loop(MovingAverage(t), K))))(K / 4)

    assert extrapolate([slope(int(K)) for K in points]) == pytest.approx(np.pi / 2 - 1, rel=1e-6)


def test_transfer_while_the_history_still_counts():
    # R(5 T_osc) for T = 0.37 T_osc.
    def transfer(K):
        x = jnp.sin(jnp.pi * jnp.arange(5 * K + 1) / K) ** 2
        return jax.jit(lambda t: MovingAverage(t).filter(x)[-1])(0.37 * K)

    assert extrapolate([transfer(100 * 2**n) for n in range(6)]) == pytest.approx(0.343217621, rel=1e-8)


def test_largest_area_of_the_exponential_kernel():
    # A = (pi/8) z/(1 + z^2) with z = 2 pi tau/T_osc: pi/16 at z = 1, where the derivative vanishes.
    def area(tau, K):
        return signed_area(*ideal_loop(Exponential(tau), K, periods=8))

    points = (40, 80, 160, 320, 640)
    pairs = [jax.jit(jax.value_and_grad(lambda tau, K=K: area(tau, K)))(K / (2 * np.pi)) for K in points]
    assert extrapolate([value for value, _ in pairs]) == pytest.approx(np.pi / 16, rel=1e-6)
    slopes = [K * float(slope) for K, (_, slope) in zip(points, pairs, strict=True)]
    assert extrapolate(slopes) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "form"),
    [
        (0.05, 0.144359),
        (0.1, 0.275799),
        (0.2, 0.473834),
        (0.25, 0.535095),
        (0.5, 0.505863),
        (0.75, 0.183998),
        (1.5, 0.201344),
    ],
)
def test_form_factor_table(ratio, form):
    assert continuum(form_factor, ratio) == pytest.approx(form, abs=1e-6)


def test_largest_form_factor():
    values = [continuum(form_factor, ratio) for ratio in (0.35, 0.355, 0.36)]
    curvature, slope = np.polyfit([-1, 0, 1], values, 2)[:2]
    assert values[1] - slope**2 / (4 * curvature) == pytest.approx(0.583662, abs=1e-6)
    assert 0.355 - 0.005 * slope / (2 * curvature) == pytest.approx(0.35346, abs=3e-5)


def test_branch_width_law():
    # Dy(x) = 2 S_d sin(lag) x sqrt(x (1 - x)) at the vertices; its continuum is 2 sin^2(phi)/phi x sqrt(x (1 - x)).
    points, n_w = 40, 15
    x, y = ideal_loop(MovingAverage(n_w), points)
    w = 2 * np.pi / points
    s_d, lag = np.sin(n_w * w / 2) / (n_w * np.sin(w / 2)), w * (n_w + 1) / 2
    at = x[1:20]
    np.testing.assert_allclose(
        branch_width(x, y, at), 2 * s_d * np.sin(lag) * at * np.sqrt(at * (1 - at)), rtol=0, atol=1e-12
    )

    phi = np.pi / 4
    # x = 3/4, the widest place, is a vertex of every K that is a multiple of three.
    widest = extrapolate([averaged(lambda x, y: branch_width(x, y, 0.75), K, K / 4) for K in (60, 120, 240, 480, 960)])
    assert widest == pytest.approx(0.649519 * np.sin(phi) ** 2 / phi, rel=2e-6)


def test_ideal_loop_is_pinched():
    assert pinch_offset(*ideal_loop(MovingAverage(10), 40)) < 1e-16


# ------------------------------------------------------------------------------------------------ crossed pair


def crossed_loop(ratio, phase, points=400):
    """Inter-memristor loop y_A(x_B): R_A is the moving average of x_B = [1 - cos(u + phase)]/2, x_A = (1 - cos u)/2."""
    u, phi = 2 * jnp.pi * jnp.arange(points) / points, jnp.pi * ratio
    x_a, x_b = (1 - jnp.cos(u)) / 2, (1 - jnp.cos(u + phase)) / 2
    return x_b, x_a / 2 * (1 + jnp.sin(phi) / phi * jnp.cos(u + phase - phi))


@pytest.mark.parametrize(
    ("ratio", "phase", "form"),
    [(0.491, -1.560, 0.9516), (0.5, -np.pi / 2, 0.95152), (0.25, -np.pi / 2, 0.88715), (0.01, -np.pi / 2, 0.66940)],
)
def test_form_factor_of_a_crossed_pair(ratio, phase, form):
    assert form_factor(*crossed_loop(ratio, phase)) == pytest.approx(form, rel=1e-3)


def test_largest_form_factor_of_a_crossed_pair():
    def form(place):
        return form_factor(*crossed_loop(place[0], place[1]))

    slope, curvature = jax.jit(jax.grad(form)), jax.jit(jax.hessian(form))
    place = jnp.array([0.491, -1.560])
    for _ in range(3):
        place = place - jnp.linalg.solve(curvature(place), slope(place))
    assert form_factor(*crossed_loop(*place)) == pytest.approx(0.9516, abs=1e-4)
    np.testing.assert_allclose(place, [0.491, -1.560], rtol=0, atol=2e-3)
    assert np.linalg.eigvalsh(curvature(place)).max() < 0


def test_crossed_pair_area_and_self_intersection():
    # Inter loop (pi/8)[S sin phi - sin Phi]; branches cross where cos s* = (S sin phi - sin Phi)/(S sin(Phi + phi)).
    ratio, phase, points = 0.5, 0.5, 400
    phi = np.pi * ratio
    s = np.sin(phi) / phi
    x, y = crossed_loop(ratio, phase, points)
    w = 2 * np.pi / points
    assert signed_area(x, y) == pytest.approx(np.pi / 8 * (s * np.sin(phi) - np.sin(phase)) * np.sin(w) / w, rel=1e-12)
    cosine = (s * np.sin(phi) - np.sin(phase)) / (s * np.sin(phase + phi))
    assert abs(cosine) < 1
    assert branch_width(x, y, (1 - cosine) / 2) == pytest.approx(0, abs=1e-5)
    # Lobes in the continuum: the integral of |1/2 sin s [c - S cos s sin(Phi + phi)]| sin(s)/2 over 0..pi.
    angle = (np.arange(20000) + 0.5) * np.pi / 20000
    width = np.sin(angle) / 2 * (s * np.sin(phi) - np.sin(phase) - s * np.cos(angle) * np.sin(phase + phi))
    lobes = np.sum(np.abs(width) * np.sin(angle) / 2) * np.pi / 20000
    assert lobe_area(x, y) == pytest.approx(lobes, rel=2e-4)
    assert lobe_area(x, y) > 1.5 * abs(float(signed_area(x, y)))


# ------------------------------------------------------------------------------------------------ derivatives


def loops_for_gradients():
    noise = np.random.default_rng(4)
    x, y = ideal_loop(MovingAverage(6.5), 24)
    rough = tuple(jnp.asarray(np.asarray(c) + 0.01 * noise.normal(size=24)) for c in (x, y + 0.1))
    eight = curve(
        25,
        lambda t: 0.5 + jnp.sin(t) / 2 + 0.1 * jnp.cos(2 * t),
        lambda t: 0.6 + jnp.sin(2 * t) / 2 + 0.1 * jnp.sin(t),
        start=0.13,
    )
    # Equal inputs in consecutive cycles: vertical sides at both ends of the loop.
    k = jnp.arange(24) + 0.5
    steps = jnp.sin(jnp.pi * k / 24) ** 2
    steps = steps.at[12:].set(steps[11::-1])
    vertical = (steps, steps * (0.5 + 0.3 * jnp.sin(2 * jnp.pi * k / 24 - 0.1)) + 0.05)
    return {"rough": rough, "figure_eight": eight, "vertical_sides": vertical}


@metrics
@pytest.mark.parametrize("loop", list(loops_for_gradients().values()), ids=list(loops_for_gradients()))
def test_gradient_is_the_finite_difference(metric, loop):
    loop, h = jnp.stack(loop), 1e-6
    step = h * jnp.eye(loop.size).reshape(-1, *loop.shape)
    values = jax.jit(jax.vmap(lambda d: metric(*(loop + d))))
    difference = (values(step) - values(-step)).reshape(loop.shape) / (2 * h)
    gradient = jax.jit(jax.grad(lambda points: metric(*points)))(loop)
    np.testing.assert_allclose(gradient, difference, rtol=0, atol=1e-8 * max(1.0, float(abs(difference).max())))


def test_gradient_stays_finite_on_degenerate_loops():
    point = (jnp.zeros(5), jnp.zeros(5))
    repeated = tuple(jnp.repeat(c, 2) for c in SQUARE)
    for name, metric in METRICS.items():
        loops = [repeated] if name == "form_factor" else [repeated, point]
        for loop in loops:
            gradient = jax.jit(jax.grad(metric, argnums=(0, 1)))(*loop)
            assert np.isfinite(gradient).all(), name


# ------------------------------------------------------------------------------------------------ refusals and batches


@metrics
def test_open_end_is_refused(metric):
    x, y = ideal_loop(MovingAverage(10), 40)
    with pytest.raises(ValueError, match="The loop is open"):
        metric(x[:20], y[:20] + 0.2)
    with pytest.raises(ValueError, match="at least 3 points"):
        metric(x[:2], y[:2])
    assert np.isnan(jax.jit(metric)(x[:20], y[:20] + 0.2))


@metrics
def test_a_nan_point_is_a_nan_metric(metric):
    x, y = ideal_loop(MovingAverage(10), 40)
    for loop in ((x.at[7].set(jnp.nan), y), (x, y.at[0].set(jnp.nan))):
        assert np.isnan(metric(*loop))
        assert np.isnan(jax.jit(metric)(*loop))


@metrics
def test_repeated_end_point_changes_nothing(metric):
    x, y = ideal_loop(MovingAverage(10.5), 40)
    metric = jax.jit(metric)
    closed = metric(jnp.append(x, x[0]), jnp.append(y, y[0]))
    assert closed == pytest.approx(float(metric(x, y)), rel=1e-14)


@metrics
def test_batch_by_vmap(metric):
    metric, lanes = jax.jit(metric), [ideal_loop(MovingAverage(n), 40) for n in (5, 11.5, 24)]
    x, y = (jnp.stack(c) for c in zip(*lanes, strict=True))
    np.testing.assert_allclose(jax.vmap(metric)(x, y), [metric(*lane) for lane in lanes], rtol=1e-13)

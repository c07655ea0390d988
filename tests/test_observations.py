"""Laws of the scatter against SciPy's distributions, deviance residuals against the likelihood, draws against both."""

import dataclasses

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import integrate, stats

from calibration.observations import Noise, Observations, m_estimation

# Certain outcomes, and counts at either end among the others.
P = np.array([0.3, 0.01, 0.999, 0.5, 0.5, 0.0, 1.0, 0.7])
SHOTS = np.array([400.0, 50, 50, 1, 200, 20, 20, 400])
COUNTS = np.array([130.0, 0, 50, 1, 0, 0, 20, 280])
INSIDE = (P > 0) & (P < 1)


def column(value, scale, counted: bool = True, measured=None) -> Observations:
    value, scale = (jnp.asarray(a, float) for a in np.broadcast_arrays(value, scale))
    measured = jnp.ones(value.shape, bool) if measured is None else jnp.asarray(measured)
    return Observations(value, scale, measured, counted)


COUNTED = column(COUNTS, SHOTS)
VALUES = column([0.31, -0.02, 0.9], [0.02, 0.03, 0.5], counted=False)
P_VALUES = jnp.array([0.3, 0.0, 1.0])


# ------------------------------------------------------------------------------------------------ laws


def test_counts_are_binomial():
    terms = COUNTED.terms(jnp.asarray(P))
    np.testing.assert_allclose(terms, stats.binom.logpmf(COUNTS, SHOTS, P), rtol=1e-11, atol=1e-12)
    impossible = column([1.0, 19.0], [20.0, 20.0]).terms(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(impossible, -np.inf)


@pytest.mark.parametrize("rho", [1e-3, 0.02, 0.3, 0.9])
def test_overdispersed_counts_are_beta_binomial(rho):
    """rho is the correlation of two shots of a row: a + b = (1 - rho) / rho."""
    terms = np.asarray(COUNTED.terms(jnp.asarray(P), Noise("beta_binomial", rho)))
    strength = (1 - rho) / rho
    a, b = P[INSIDE] * strength, (1 - P[INSIDE]) * strength
    np.testing.assert_allclose(terms[INSIDE], stats.betabinom.logpmf(COUNTS[INSIDE], SHOTS[INSIDE], a, b), rtol=1e-10)
    np.testing.assert_allclose(terms[~INSIDE], 0.0, atol=1e-12)  # certain, and so it came
    impossible = column([1.0, 19.0], [20.0, 20.0]).terms(jnp.array([0.0, 1.0]), Noise("beta_binomial", rho))
    np.testing.assert_array_equal(impossible, -np.inf)


def test_beta_binomial_becomes_binomial_without_a_jump():
    """First order in rho: [n (n-1) / p + (N-n) (N-n-1) / (1-p) - N (N-1)] / 2."""
    n, shots, p = COUNTS[INSIDE], SHOTS[INSIDE], P[INSIDE]
    data = column(n, shots)
    at = lambda rho: np.asarray(data.terms(jnp.asarray(p), Noise("beta_binomial", rho)))
    slope = (n * (n - 1) / p + (shots - n) * (shots - n - 1) / (1 - p) - shots * (shots - 1)) / 2
    plain = np.asarray(data.terms(jnp.asarray(p)))
    np.testing.assert_array_equal(at(0.0), plain)
    for rho in (3e-8, 0.99e-7, 1.01e-7, 1e-6):
        np.testing.assert_allclose(at(rho), plain + rho * slope, rtol=0, atol=1e-7 * np.max(np.abs(slope)) + 1e-6)
    np.testing.assert_allclose((at(3e-6) - plain) / 3e-6, slope, rtol=0.05, atol=1.0)
    log_likelihood = lambda rho: data.log_likelihood(jnp.asarray(p), Noise("beta_binomial", rho))
    for rho in (0.0, 1e-9, 1e-7, 1e-5, 0.1):
        assert np.isfinite(jax.grad(log_likelihood)(rho))


def test_outliers_have_a_student_law():
    """Of four degrees of freedom, in residuals whose variance is that of counts and of their rounding."""
    deviation = np.sqrt(SHOTS * P * (1 - P) + 1 / 12)
    expected = stats.t.logpdf(COUNTS, 4, loc=SHOTS * P, scale=deviation)
    np.testing.assert_allclose(COUNTED.terms(jnp.asarray(P), Noise("student_t")), expected, rtol=1e-11)
    expected = stats.t.logpdf(VALUES.value, 4, loc=P_VALUES, scale=VALUES.scale)
    np.testing.assert_allclose(VALUES.terms(P_VALUES, Noise("student_t")), expected, rtol=1e-11)
    far = column([200.0], [400.0]).log_likelihood(jnp.array([0.5]), Noise("student_t"))
    outlier = column([300.0], [400.0]).log_likelihood(jnp.array([0.5]), Noise("student_t"))
    assert 5 < far - outlier < 10  # ten standard errors cost 50 nats of a Gaussian


def test_values_are_normal_with_the_excess_of_their_probability():
    np.testing.assert_allclose(
        VALUES.terms(P_VALUES), stats.norm.logpdf(VALUES.value, P_VALUES, VALUES.scale), rtol=1e-12
    )
    scale = np.sqrt(np.asarray(VALUES.scale) ** 2 + 0.1 * np.asarray(P_VALUES * (1 - P_VALUES)))
    terms = VALUES.terms(P_VALUES, Noise("beta_binomial", 0.1))
    np.testing.assert_allclose(terms, stats.norm.logpdf(VALUES.value, P_VALUES, scale), rtol=1e-12)


def test_two_columns_of_one_readout_are_a_multinomial():
    """n_y of N shots, then n_m of those that are left: the product is the law of three outcomes."""
    rng = np.random.default_rng(0)
    populations = rng.dirichlet([1.0, 2.0, 1.5], 50)
    shots = rng.integers(1, 500, 50)
    counts = np.array([rng.multinomial(n, p) for n, p in zip(shots, populations, strict=True)])
    n_y, n_m, _ = counts.T
    p_y, p_m, _ = populations.T
    left = shots - n_y
    both = column(n_y, shots).terms(jnp.asarray(p_y))
    both = both + column(n_m, np.maximum(left, 1), measured=left > 0).terms(jnp.asarray(p_m / (1 - p_y)))
    expected = [stats.multinomial.logpmf(c, n, p) for c, n, p in zip(counts, shots, populations, strict=True)]
    np.testing.assert_allclose(both, expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["binomial", "beta_binomial", "outliers", "student_t"])
def test_cells_that_were_not_measured_say_nothing(kind):
    noise = Noise(kind, 0.05)
    holed = dataclasses.replace(
        COUNTED,
        measured=jnp.arange(8) % 2 == 0,
        value=COUNTED.value.at[1].set(jnp.nan),
        scale=COUNTED.scale.at[3].set(0),
    )
    p = jnp.asarray(np.clip(P, 1e-3, 1 - 1e-3))
    terms = np.asarray(holed.terms(p, noise))
    np.testing.assert_array_equal(terms[1::2], 0.0)
    np.testing.assert_array_equal(terms[::2], np.asarray(COUNTED.terms(p, noise))[::2])
    assert np.all(np.isfinite(jax.grad(lambda q: holed.log_likelihood(q, noise))(p)))


def test_an_unknown_law_is_refused():
    with pytest.raises(ValueError, match=r"the noise must be one of .* but is 'poisson'"):
        Noise("poisson")


# ------------------------------------------------------------------------------------------------ deviance residuals


def test_half_their_squares_are_the_likelihood_lost():
    rng = np.random.default_rng(1)
    shots = rng.integers(1, 1000, 400).astype(float)
    n = np.floor(rng.uniform(0, shots + 1))
    n[:20], n[20:40] = 0, shots[20:40]
    data, p = column(n, shots), jnp.asarray(rng.uniform(1e-6, 1 - 1e-6, 400))
    saturated = data.terms(jnp.asarray(n / shots))
    residual = data.deviance_residual(p)
    np.testing.assert_allclose(saturated - 0.5 * residual**2, data.terms(p), rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(jnp.sign(residual), jnp.sign(n / shots - p))
    values = VALUES.deviance_residual(P_VALUES)
    constant = VALUES.terms(VALUES.value)
    np.testing.assert_allclose(constant - 0.5 * values**2, VALUES.terms(P_VALUES), rtol=1e-12)


def slope_of(n: float, shots: float, p):
    """Derivative of the deviance residual."""
    one = lambda q: column([n], [shots]).deviance_residual(q[None])[0]
    return jax.jit(jax.vmap(jax.grad(one)))(jnp.atleast_1d(jnp.asarray(p, float)))


@pytest.mark.parametrize(("n", "shots"), [(130.0, 400.0), (1.0, 50.0), (399.0, 400.0), (1.0, 2.0), (37.0, 100.0)])
def test_their_slope_passes_smoothly_through_zero(n, shots):
    """Value and slope cancel to nothing at p = n / N; against 50 digits on both sides and in the middle."""
    share = n / shots
    spread = np.sqrt(share * (1 - share) / shots)

    def exact(p):
        s, q = mpmath.mpf(n) / shots, mpmath.mpf(p)
        loss = 2 * shots * (s * mpmath.log(s / q) + (1 - s) * mpmath.log((1 - s) / (1 - q)))
        return float(-shots * abs(s - q) / (q * (1 - q)) / mpmath.sqrt(loss))

    with mpmath.workdps(50):
        for distance in (1e-9, 1e-6, 1e-5, 9e-5, 1.1e-4, 1e-3, 1e-2, 0.1, 0.5):
            points = [share + side * distance * spread for side in (-1, 1)]
            np.testing.assert_allclose(slope_of(n, shots, points), [exact(p) for p in points], rtol=1e-4)
    np.testing.assert_allclose(slope_of(n, shots, share), -1 / spread, rtol=1e-12)
    for distance in (-1.5, -0.3, 0.3, 1.5):
        p, h = share + distance * min(share, 1 - share) / 2, 1e-4 * spread
        f = column([n] * 4, [shots] * 4).deviance_residual(p + h * jnp.array([-2.0, -1.0, 1.0, 2.0]))
        np.testing.assert_allclose(slope_of(n, shots, p), (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h), rtol=1e-6)


def test_their_slope_is_never_nan():
    p = np.concatenate([10.0 ** np.arange(-300, 0, 7), 1 - 10.0 ** np.arange(-16, -1), np.linspace(0.0, 1.0, 1001)])
    for n, shots in [(0.0, 400.0), (400.0, 400.0), (1.0, 400.0), (200.0, 400.0), (0.0, 1.0), (1.0, 1.0), (5.0, 10.0)]:
        slope = np.asarray(slope_of(n, shots, p))
        assert not np.any(np.isnan(slope)), (n, shots)
        assert np.all(slope <= 0)


def test_squares_have_the_gradient_of_the_likelihood():
    """r r' = - d log L / dp, whatever n: what makes Levenberg-Marquardt maximum likelihood."""
    p = jnp.linspace(0.02, 0.98, 49)
    for n in (0.0, 1.0, 49.0, 50.0, 51.0, 99.0, 100.0):
        data = column(np.full(49, n), 100.0)
        half = lambda q, data=data: 0.5 * jnp.sum(data.deviance_residual(q) ** 2)
        slope = jax.grad(lambda q, data=data: -data.log_likelihood(q))(p)
        np.testing.assert_allclose(jax.grad(half)(p), slope, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ draws

DRAWS = 20_000


@pytest.mark.parametrize("kind", ["binomial", "beta_binomial", "outliers", "student_t"])
@pytest.mark.parametrize("counted", [True, False], ids=["counts", "values"])
@pytest.mark.parametrize("p", [0.004, 0.5, 0.83])
def test_draws_have_the_stated_mean_and_variance(kind, counted, p):
    noise = Noise(kind, 0.03 if kind == "beta_binomial" else 0.0)
    data = column(np.zeros(DRAWS), 120.0 if counted else 0.04, counted)
    drawn = np.asarray(data.sample(jax.random.key(5), jnp.full(DRAWS, p), noise)) / (120.0 if counted else 1.0)
    variance = float(data.variance(jnp.full(DRAWS, p), noise)[0])
    assert abs(np.mean(drawn) - p) < 5 * np.sqrt(variance / DRAWS)
    kurtosis = stats.kurtosis(drawn, fisher=False)
    assert abs(np.var(drawn) / variance - 1) < 5 * np.sqrt((kurtosis - 1) / DRAWS)
    if counted:
        np.testing.assert_allclose(drawn * 120, np.round(drawn * 120), rtol=1e-12)


def test_draws_follow_the_law_that_is_assumed():
    """The mean log-likelihood of draws is the negative entropy of the law."""
    noise = Noise("beta_binomial", 0.05)
    data = column(np.zeros(DRAWS), 30.0)
    p = jnp.full(DRAWS, 0.2)
    drawn = dataclasses.replace(data, value=data.sample(jax.random.key(1), p, noise))
    terms = np.asarray(drawn.terms(p, noise))
    law = stats.betabinom(30, 0.2 * 19, 0.8 * 19)
    log_p = law.logpmf(np.arange(31))
    assert abs(np.mean(terms) - np.sum(np.exp(log_p) * log_p)) < 5 * np.std(terms) / np.sqrt(DRAWS)
    held = dataclasses.replace(data, measured=jnp.arange(DRAWS) % 2 == 0)
    np.testing.assert_array_equal(held.sample(jax.random.key(1), p, noise)[1::2], 0.0)


def test_standardized_residuals():
    noise = Noise("beta_binomial", 0.02)
    p = P[INSIDE]
    data = column(COUNTS[INSIDE], SHOTS[INSIDE])
    variance = p * (1 - p) * (1 + 0.02 * (SHOTS[INSIDE] - 1)) / SHOTS[INSIDE]
    np.testing.assert_allclose(data.variance(jnp.asarray(p), noise), variance, rtol=1e-12)
    expected = (COUNTS[INSIDE] / SHOTS[INSIDE] - p) / np.sqrt(variance)
    np.testing.assert_allclose(data.residual(jnp.asarray(p), noise), expected, rtol=1e-12)


# ------------------------------------------------------------------------------------------------ Huber's factor


def psi(z):
    return 5 * z / (4 + z**2)


def test_the_factor_of_gaussian_residuals():
    z = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    mean = lambda f: integrate.quad(lambda t: f(t) * stats.norm.pdf(t), -12, 12, epsabs=1e-12)[0]
    slope = mean(lambda t: 5 * (4 - t**2) / (4 + t**2) ** 2)
    np.testing.assert_allclose(m_estimation(z), mean(lambda t: psi(t) ** 2) / slope**2, rtol=1e-4)
    assert 1.0 < m_estimation(z) < 1.2


@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_the_factor_is_the_variance_of_an_estimated_mean(outliers):
    """10,000 means of 100 numbers by the t-law; a tenth of the numbers may have ten times the error."""
    rng = np.random.default_rng(7)
    z = rng.normal(size=(10_000, 100)) * np.where(rng.uniform(size=(10_000, 100)) < outliers, 10.0, 1.0)
    mean = np.median(z, axis=1, keepdims=True)
    for _ in range(60):  # iterated reweighting: a fixed point is the estimate
        weight = 5 / (4 + (z - mean) ** 2)
        mean = np.sum(weight * z, axis=1, keepdims=True) / np.sum(weight, axis=1, keepdims=True)
    np.testing.assert_allclose(100 * np.var(mean), m_estimation(z.ravel()), rtol=0.08)


def test_contaminated_law_is_the_mixture():
    """And the probability of a cell to be no outlier is Bayes' rule."""
    noise, p = Noise("outliers", outlier_share=0.1), jnp.array([0.3, 0.3, 0.0])
    counts = column([125.0, 300.0, 3.0], [400.0, 400.0, 400.0])
    inside = 0.9 * stats.binom.pmf([125, 300, 3], 400, np.asarray(p))
    np.testing.assert_allclose(counts.terms(p, noise), np.log(inside + 0.1 / 401), rtol=1e-11)
    np.testing.assert_allclose(counts.inliers(p, noise), inside / (inside + 0.1 / 401), atol=1e-12)

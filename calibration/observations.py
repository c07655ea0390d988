"""One measured column and how it scatters about the model: counts or values, plain, over-dispersed or with outliers.

Readout errors act inside the model (the probability that a shot is assigned to s), never by inverting them on the data.
Three populations read together are two columns: n_y of N shots, and n_m of the N - n_y that are left. A multinomial is
the product of the two binomials.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from twin.batching import physical
from twin.readout import sample_counts

NOISES = ("binomial", "beta_binomial", "outliers", "student_t")
# Student's t with four degrees of freedom: an outlier of ten standard errors costs 9 nats instead of 50.
_FREEDOM = 4.0
# Below this overdispersion the beta-binomial law is the binomial one to rounding.
_LEAST_DISPERSION = 1e-7
# Variance of rounding to whole counts: a residual at p = 0 stays finite.
_ROUNDING_VARIANCE = 1 / 12


class Noise(eqx.Module):
    """The law by which measured numbers scatter.

    Args:
        kind: "binomial": quantum projection noise for counts, a Gaussian of the given error for values.
            "beta_binomial": the probability itself fluctuates from row to row, with variance rho p (1 - p).
            "outliers": a share of the cells is anything at all, uniform over the counts (over [-1/2, 3/2] for values).
            "student_t": t of four degrees of freedom in the standardized residual; for values, and for counts that are
            not small, whose scatter is symmetric.
        overdispersion: rho in [0, 1): correlation of the shots of one row, for "beta_binomial".
        outlier_share: of the cells, in [0, 1), for "outliers".
    """

    kind: str = eqx.field(static=True, default="binomial")
    overdispersion: Float[Array, ""] = physical(default=0.0)
    outlier_share: Float[Array, ""] = physical(default=0.02)

    def __check_init__(self):
        if self.kind not in NOISES:
            raise ValueError(f"the noise must be one of {NOISES}, but is {self.kind!r}.")


class Observations(eqx.Module):
    """One measured column: counts of `shots`, or values with standard errors.

    Unmeasured cells have `measured` False; their numbers are placeholders that never enter.

    Args:
        value: counts n, or the values, shape (rows,).
        scale: shots N, or the standard errors, shape (rows,).
        measured: which cells hold a measurement.
        counted: True for counts.
    """

    value: Float[Array, " rows"]
    scale: Float[Array, " rows"]
    measured: Bool[Array, " rows"]
    counted: bool = eqx.field(static=True)

    def log_likelihood(self, p: Float[Array, " rows"], noise: Noise | None = None) -> Float[Array, ""]:
        """Sum over measured cells of the log probability (counts) or log density (values), nats."""
        return jnp.sum(self.terms(p, noise))

    def terms(self, p: Float[Array, " rows"], noise: Noise | None = None) -> Float[Array, " rows"]:
        """Log-likelihood of each cell, nats; 0 where not measured."""
        noise = Noise() if noise is None else noise
        value, scale = self._filled()
        if noise.kind == "student_t":
            deviation = jnp.sqrt(_count_variance(p, scale)) if self.counted else scale
            z = (value - (scale * p if self.counted else p)) / deviation
            terms = _student_t(z) - jnp.log(deviation)
        elif not self.counted:
            deviation = jnp.sqrt(scale**2 + _excess(noise, p))
            terms = -0.5 * ((value - p) / deviation) ** 2 - jnp.log(deviation * np.sqrt(2 * np.pi))
        else:
            choose = gammaln(scale + 1) - gammaln(value + 1) - gammaln(scale - value + 1)
            terms = choose + _binomial(value, scale, p)
            if noise.kind == "beta_binomial":
                rho = noise.overdispersion
                wide = rho > _LEAST_DISPERSION
                terms = jnp.where(wide, choose + _beta_binomial(value, scale, p, jnp.where(wide, rho, 0.5)), terms)
        if noise.kind == "outliers":
            terms = jnp.logaddexp(jnp.log1p(-noise.outlier_share) + terms, self._anything(noise))
        return jnp.where(self.measured, terms, 0.0)

    def inliers(self, p: Float[Array, " rows"], noise: Noise) -> Float[Array, " rows"]:
        """Probability that a cell is no outlier, under "outliers"; 1 where not measured."""
        outlier = jnp.exp(self._anything(noise) - self.terms(p, noise))
        return jnp.where(self.measured, 1 - outlier, 1.0)

    def _anything(self, noise: Noise) -> Float[Array, " rows"]:
        """Log probability of an outlier of this very number."""
        width = self._filled()[1] + 1 if self.counted else 2.0
        return jnp.log(noise.outlier_share) - jnp.log(width + jnp.zeros_like(self.value))

    def variance(self, p: Float[Array, " rows"], noise: Noise | None = None) -> Float[Array, " rows"]:
        """Variance of the estimate of p in each cell; outliers not included."""
        noise = Noise() if noise is None else noise
        if not self.counted:
            return self.scale**2 + _excess(noise, p)
        return p * (1 - p) / self.scale + _excess(noise, p) * (self.scale - 1) / self.scale

    def estimate(self) -> Float[Array, " rows"]:
        """The measured probability: n / N, or the value; NaN where not measured."""
        return jnp.where(self.measured, self.value / self.scale if self.counted else self.value, jnp.nan)

    def residual(self, p: Float[Array, " rows"], noise: Noise | None = None) -> Float[Array, " rows"]:
        """Standardized residuals, (measured - p) / sqrt(variance); NaN where not measured, 0 where certain."""
        difference, variance = self.estimate() - p, self.variance(p, noise)
        certain = (difference == 0) & (variance == 0)
        return jnp.where(certain, 0.0, difference / jnp.sqrt(jnp.where(certain, 1.0, variance)))

    def deviance_residual(self, p: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """Signed root of twice the log-likelihood lost against p = n / N; 0 where not measured.

        Half the sum of their squares is the negative log-likelihood up to a constant, so that least squares of them
        *is* maximum likelihood. Binomial counts and Gaussian values only.
        """
        value, scale = self._filled()
        if self.counted:
            terms = _deviance(value / scale, scale, p)
        else:
            terms = (value - p) / scale
        return jnp.where(self.measured, terms, 0.0)

    def sample(self, key: PRNGKeyArray, p: Float[Array, " rows"], noise: Noise | None = None) -> Float[Array, " rows"]:
        """Numbers that this column could have shown; 0 where not measured.

        "student_t" is a law against outliers, not of them: it samples the plain scatter.
        """
        noise = Noise() if noise is None else noise
        scale = jnp.where(self.measured, self.scale, 1.0)
        inner, outer = jax.random.split(key)
        if not self.counted:
            deviation = jnp.sqrt(scale**2 + _excess(noise, p))
            drawn = p + deviation * jax.random.normal(outer, p.shape)
        else:
            if noise.kind == "beta_binomial":
                rho = jnp.maximum(noise.overdispersion, _LEAST_DISPERSION)
                strength = (1 - rho) / rho
                inside = jnp.clip(p, 1e-12, 1 - 1e-12)
                p = jax.random.beta(inner, inside * strength, (1 - inside) * strength)
            drawn = sample_counts(outer, p, scale)
        return jnp.where(self.measured, drawn, 0.0)

    def _filled(self) -> tuple[Array, Array]:
        return jnp.where(self.measured, self.value, 0.0), jnp.where(self.measured, self.scale, 1.0)


def m_estimation(z: Float[np.ndarray, " cells"]) -> float:
    """Factor on the variance of an estimate that the t-law makes from standardized residuals z (Huber's estimator).

        <psi^2> / <psi'>^2,  psi = (nu + 1) z / (nu + z^2)

    About 1.1 for Gaussian residuals; outliers raise it.

    References: Huber and Ronchetti, Robust Statistics (2009), section 7.6.
    """
    psi = (_FREEDOM + 1) * z / (_FREEDOM + z**2)
    slope = (_FREEDOM + 1) * (_FREEDOM - z**2) / (_FREEDOM + z**2) ** 2
    return float(np.mean(psi**2) / np.mean(slope) ** 2)


def _excess(noise: Noise, p: Array) -> Array:
    """Variance of the probability itself."""
    return noise.overdispersion * p * (1 - p) if noise.kind == "beta_binomial" else jnp.zeros_like(p)


def _count_variance(p: Array, shots: Array) -> Array:
    return shots * p * (1 - p) + _ROUNDING_VARIANCE


def _student_t(z: Array) -> Array:
    norm = gammaln((_FREEDOM + 1) / 2) - gammaln(_FREEDOM / 2) - 0.5 * np.log(_FREEDOM * np.pi)
    return norm - 0.5 * (_FREEDOM + 1) * jnp.log1p(z**2 / _FREEDOM)


def _binomial(n: Array, shots: Array, p: Array) -> Array:
    # An outcome that never occurred has no term, so its logarithm (and its slope) must not be taken at p = 0.
    seen, unseen = n > 0, n < shots
    return n * jnp.log(jnp.where(seen, p, 1.0)) + (shots - n) * jnp.log1p(-jnp.where(unseen, p, 0.0))


def _beta_binomial(n: Array, shots: Array, p: Array, rho: Array) -> Array:
    strength = (1 - rho) / rho
    rising = lambda a, k: jnp.where(k > 0, gammaln(jnp.where(k > 0, a, 1.0) + k) - gammaln(jnp.where(k > 0, a, 1.0)), 0)
    return rising(p * strength, n) + rising((1 - p) * strength, shots - n) - rising(strength + 0 * p, shots)


@jax.custom_jvp
def _deviance(share: Array, shots: Array, p: Array) -> Array:
    """Signed root of the deviance 2 N [s log(s / p) + (1 - s) log((1 - s) / (1 - p))] of a measured share s."""
    plain = lambda a, b: jnp.where(a > 0, a * jnp.log(jnp.where(a > 0, a, 1.0) / jnp.where(a > 0, b, 1.0)), 0.0)
    loss = plain(share, p) + plain(1 - share, 1 - p)
    return jnp.sign(share - p) * jnp.sqrt(2 * shots * jnp.maximum(loss, 0.0))


@_deviance.defjvp
def _deviance_jvp(primals, tangents):
    share, shots, p = primals
    residual = _deviance(share, shots, p)
    # r r' = -N (s - p) / (p (1 - p)); where both vanish, the limit is that of the standardized residual. An impossible
    # outcome (p = 0 or 1) has no slope to offer.
    variance = p * (1 - p)
    near = jnp.abs(residual) < 1e-4
    limit = jnp.sqrt(shots / jnp.where(variance > 0, variance, jnp.inf))
    ratio = shots * (share - p) / (jnp.where(variance > 0, variance, jnp.inf) * jnp.where(near, 1.0, residual))
    return residual, -jnp.where(near, limit, ratio) * tangents[2]

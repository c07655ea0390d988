"""Noise that is constant within a shot and new in the next one: of intensity, and of detuning.

Each shot draws relative errors e_1, e_2 of the two Rabi frequencies and offsets of the two detunings, Gaussian and with
a correlation each, as one laser or two make them. The same draw meets both pulses of a cycle, so x and y are averaged
jointly: <y> = <x (1 - R)>, not <x> <1 - R>. Only Gaussian white noise within a shot is a linewidth; what is slower
than a shot belongs here, and what lies between in `twin.phase_noise`.
"""

import dataclasses
import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from twin.batching import check_not_negative, check_values, is_traced, physical, real_array, with_last_axis
from twin.closed_form import Input, Output, Populations, Start
from twin.emulator import EmulatedSeries
from twin.loop import Response, Settings
from twin.methods import ClosedForm

# Keeps the derivative of sqrt(1 - correlation^2) finite at full correlation; means move by less than this.
_CORRELATION_SHIFT = 1e-14
_MOST_NODES = 48
Nodes = tuple[int, ...]


class SlowNoise(eqx.Module):
    """Standard deviations from shot to shot; all may have batch axes.

    Args:
        amplitude_noise_1, amplitude_noise_2: of each pulse's Rabi frequency, relative to it. That of intensity is twice
            as large for one-photon lines.
        amplitude_correlation: of the two, in [-1, 1]; 1 for pulses cut from one beam.
        detuning_noise_1_hz, detuning_noise_2_hz: of each detuning, Hz.
        detuning_correlation: of the two, in [-1, 1]; 1 for one laser that drives both lines.
        nodes: of the average in a device: `slow_quadrature`. None lets `run` and `planned` choose them.
        served: chosen with them: spread of each area, rad, and of each detuning times its width, for which they serve.
        error: of populations, by the average with these nodes.
    """

    amplitude_noise_1: Float[Array, "..."] = physical(default=0.0)
    amplitude_noise_2: Float[Array, "..."] = physical(default=0.0)
    amplitude_correlation: Float[Array, "..."] = physical(default=0.0)
    detuning_noise_1_hz: Float[Array, "..."] = physical(default=0.0)
    detuning_noise_2_hz: Float[Array, "..."] = physical(default=0.0)
    detuning_correlation: Float[Array, "..."] = physical(default=0.0)
    nodes: Nodes | None = eqx.field(static=True, default=None)
    served: Float[Array, "4 ..."] | None = physical(1, default=None)
    error: float = eqx.field(static=True, default=0.0)

    @classmethod
    def parameters(cls) -> tuple[str, ...]:
        """Names of the numbers that describe the noise."""
        return tuple(f.name for f in dataclasses.fields(cls) if f.name not in ("nodes", "served", "error"))

    def __check_init__(self):
        for k in (1, 2):
            name = f"amplitude_noise_{k}"
            check_not_negative(name, getattr(self, name), "units of the Rabi frequency, 0.01 for one per cent")
            check_not_negative(f"detuning_noise_{k}_hz", getattr(self, f"detuning_noise_{k}_hz"), "Hz")
        for name in ("amplitude_correlation", "detuning_correlation"):
            accept = lambda v: np.abs(v) <= 1
            check_values(name, getattr(self, name), accept, "in [-1, 1]", "1 is one laser, 0 two independent ones")


class Draws(NamedTuple):
    """Shots, or the nodes of a quadrature over them; draws are the last axis, after the batch of the noise.

    Attributes:
        factor_1, factor_2: 1 + e_k, factors on the Rabi frequencies.
        detuning_1_hz, detuning_2_hz: offsets, Hz.
        weights: sum to one.
    """

    factor_1: Float[Array, "... draws"]
    factor_2: Float[Array, "... draws"]
    detuning_1_hz: Float[Array, "... draws"]
    detuning_2_hz: Float[Array, "... draws"]
    weights: Float[Array, " draws"]


# ------------------------------------------------------------------------------------------------ exact averages


def _mean_phase(theta_1, theta_2, noise: SlowNoise, a: float, b: float) -> tuple[Array, Array]:
    """Mean phase and damping of exp[i (a theta_1 (1 + e_1) + b theta_2 (1 + e_2))]."""
    spread_1, spread_2 = a * theta_1 * noise.amplitude_noise_1, b * theta_2 * noise.amplitude_noise_2
    variance = spread_1**2 + spread_2**2 + 2 * noise.amplitude_correlation * spread_1 * spread_2
    return a * theta_1 + b * theta_2, jnp.exp(-variance / 2)


def noisy_populations(theta_1: Input, theta_2: Input, noise: SlowNoise, start: Start = "v") -> Populations:
    """Populations after separated resonant pulses, averaged over amplitude noise; exact.

    By the characteristic function of the normal distribution <cos[theta (1 + e)]> = cos(theta) exp(-theta^2 s^2/2), so

        <x> = [1 -+ cos(theta_1) exp(-theta_1^2 s_1^2/2)]/2.

    The product of two cosines in y = x (1 - R) is the mean of those of theta_1 +- theta_2, whose variances are
    theta_1^2 s_1^2 + theta_2^2 s_2^2 +- 2 c theta_1 theta_2 s_1 s_2 with the correlation c.

    Args:
        theta_1, theta_2: mean areas, rad.
        noise: the noise; its detunings have no closed form here and must be zero.
        start: level of the ion before the pulses.

    Returns:
        (P_v, P_s, P_m), broadcast shape; theta_2 = 0 leaves the input x in P_s. NaN where detuning noise is traced and
        not zero.

    Raises:
        ValueError: detuning noise that is known and not zero.
    """
    theta_1, theta_2, silent = real_array(theta_1), real_array(theta_2), without_detuning(noise)

    def mean_cosine(a: float, b: float) -> Array:
        phase, damping = _mean_phase(theta_1, theta_2, noise, a, b)
        return jnp.cos(phase) * damping

    sign = -1.0 if start == "v" else 1.0  # x = (1 + sign cos theta_1)/2
    first, second = sign * mean_cosine(1.0, 0.0) + silent, mean_cosine(0.0, 1.0)
    both = sign * (mean_cosine(1.0, 1.0) + mean_cosine(1.0, -1.0)) / 2
    means = (1 - first) / 2, (1 + first + second + both) / 4, (1 + first - second - both) / 4
    p_v, p_s, p_m = jnp.broadcast_arrays(*means)
    return p_v, p_s, p_m


def noisy_coherence(theta_1: Input, theta_2: Input, noise: SlowNoise, start: Start = "v") -> Output:
    """Imaginary part of rho_vs after separated resonant pulses, averaged over amplitude noise; exact.

    The mean of `separated_coherence`, +-sin(theta_1) cos(theta_2/2)/2. Args and errors: as `noisy_populations`.
    """
    theta_1, theta_2, silent = real_array(theta_1), real_array(theta_2), without_detuning(noise)
    pairs = [_mean_phase(theta_1, theta_2, noise, 1.0, b) for b in (0.5, -0.5)]
    mean = sum((jnp.sin(phase) * damping for phase, damping in pairs), silent)
    return (0.25 if start == "v" else -0.25) * mean


def without_detuning(noise: SlowNoise) -> Array:
    """Zero; NaN where a traced detuning noise is not."""
    noises = (noise.detuning_noise_1_hz, noise.detuning_noise_2_hz)
    if not is_traced(noises) and any(np.any(np.asarray(n) > 0) for n in noises):
        raise ValueError(
            "the closed form has no average over `detuning_noise_1_hz` and `detuning_noise_2_hz`, which must be 0; "
            "use `slow_average` with a method that integrates."
        )
    return jnp.where((noises[0] == 0) & (noises[1] == 0), 0.0, jnp.nan)


# ------------------------------------------------------------------------------------------------ draws


def slow_quadrature(noise: SlowNoise, nodes: Nodes) -> Draws:
    """Gauss-Hermite quadrature over the shots, a tensor grid of up to four independent normal variables.

    With z_i of variance one, e_1 = s_1 z_1 and e_2 = s_2 (c z_1 + sqrt(1 - c^2) z_2), the Cholesky factor of the
    covariance; the same for the detunings and z_3, z_4. Polynomials of degree 2 nodes - 1 in each z are exact.

    Args:
        noise: shape (*batch).
        nodes: for z_1 to z_4; `nodes_for` finds how many. One node leaves that variable out, which is right where its
            share of the noise is zero, and refused elsewhere (traced: NaN).

    Returns:
        `Draws`, the product of the nodes in number. Differentiable, at zero noise and at full correlation too.
    """
    if len(nodes) != 4 or min(nodes) < 1:
        raise ValueError(f"`nodes` must be four numbers of at least 1, one for each normal variable, but is {nodes}.")
    rules = [np.polynomial.hermite_e.hermegauss(n) for n in nodes]
    z = [real_array(axis.ravel()) for axis in np.meshgrid(*(at for at, _ in rules), indexing="ij")]
    weights = [w / np.sum(w) for _, w in rules]
    weight = np.einsum("i,j,k,l->ijkl", *weights).ravel()
    shares = _shares(noise)
    missing = [share for share, n in zip(shares, nodes, strict=True) if n == 1]
    for share in missing:
        if not is_traced(share) and np.any(np.asarray(share) > 0):
            raise ValueError(
                f"`nodes` must be larger than 1 for every variable that has noise, but is {nodes}; "
                "take the numbers from `nodes_for`."
            )
    draws = _scaled(noise, z)
    lost = sum((jnp.where(share > 0, jnp.nan, 0.0) for share in missing), jnp.zeros(()))
    return Draws(*(values + lost[..., None] for values in draws), real_array(weight))


def slow_samples(noise: SlowNoise, draws: int, key: PRNGKeyArray) -> Draws:
    """Random shots in place of a quadrature: what a laboratory has, and the check of the latter."""
    z = jax.random.normal(key, (4, draws))
    return Draws(*_scaled(noise, list(z)), jnp.full(draws, 1 / draws))


def _root(correlation: Array) -> Array:
    return jnp.sqrt(1 - correlation**2 + _CORRELATION_SHIFT)


def _rest(correlation: Array) -> Array:
    """What the first of two correlated variables does not explain of the second."""
    return jnp.sqrt(jnp.maximum(1 - correlation**2, 0.0))


def _shares(noise: SlowNoise) -> tuple[Array, Array, Array, Array]:
    """Largest relative amplitude error, or detuning in Hz, that one standard deviation of each z makes alone."""
    e_1, e_2, d_1, d_2 = _stds(noise)
    rest_e, rest_d = _rest(noise.amplitude_correlation), _rest(noise.detuning_correlation)
    return (
        jnp.maximum(e_1, e_2 * jnp.abs(noise.amplitude_correlation)),
        e_2 * rest_e,
        jnp.maximum(d_1, d_2 * jnp.abs(noise.detuning_correlation)),
        d_2 * rest_d,
    )


def _stds(noise: SlowNoise) -> tuple[Array, Array, Array, Array]:
    return noise.amplitude_noise_1, noise.amplitude_noise_2, noise.detuning_noise_1_hz, noise.detuning_noise_2_hz


def _scaled(noise: SlowNoise, z: list[Array]) -> tuple[Array, Array, Array, Array]:
    e_1, e_2, d_1, d_2 = (std[..., None] for std in _stds(noise))
    c_e, c_d = noise.amplitude_correlation[..., None], noise.detuning_correlation[..., None]
    second_e, second_d = c_e * z[0] + _root(c_e) * z[1], c_d * z[2] + _root(c_d) * z[3]
    return 1 + e_1 * z[0], 1 + e_2 * second_e, d_1 * z[2], d_2 * second_d


# ------------------------------------------------------------------------------------------------ how many nodes


def amplitude_error(std_rad: float, nodes: int) -> float:
    """Error of Gauss-Hermite nodes in <cos(phase)> for phases that spread by up to `std_rad`; exact by e^(-std^2/2)."""
    spread = np.linspace(0, std_rad, 33)[:, None]
    at, weights = np.polynomial.hermite_e.hermegauss(nodes)
    found = np.cos(spread * at) @ (weights / np.sum(weights))
    return float(np.max(np.abs(found - np.exp(-(spread[:, 0] ** 2) / 2))))


def detuning_error(std_hz: float, sigma_s: float, area_rad: float, nodes: int) -> float:
    """Error of Gauss-Hermite nodes in the mean transfer of one detuned Gaussian pulse, against 192 nodes.

    The largest over areas up to `area_rad`, and over mean detunings of 0, 1/2 and 1 over 2 pi sigma.
    """
    areas = np.linspace(0, area_rad, 13)[1:]
    centers = np.array([0.0, 0.5, 1.0])[:, None]
    rules = [np.polynomial.hermite_e.hermegauss(n) for n in (nodes, 192)]
    means = [
        _transfer(areas, centers + 2 * np.pi * std_hz * sigma_s * at) @ (weights / np.sum(weights))
        for at, weights in rules
    ]
    return float(np.max(np.abs(means[0] - means[1])))


def _transfer(areas: np.ndarray, detunings: np.ndarray) -> np.ndarray:
    """Transfer of Gaussian pulses of width one, shape (areas, *detunings): two-level slices in closed form."""
    t, step = np.linspace(-6, 6, 193, retstep=True)
    shape = (-1,) + (1,) * detunings.ndim
    peak = areas.reshape(shape) / math.sqrt(2 * math.pi)
    lower, upper = np.ones((len(areas), *detunings.shape), complex), np.zeros((len(areas), *detunings.shape), complex)
    for now in t:
        omega = peak * np.exp(-(now**2) / 2)
        norm = np.maximum(np.sqrt(omega**2 + detunings**2), 1e-300)
        c, s = np.cos(norm * step / 2), np.sin(norm * step / 2) / norm
        lower, upper = (
            (c + 1j * s * detunings) * lower - 1j * s * omega * upper,
            (c - 1j * s * detunings) * upper - 1j * s * omega * lower,
        )
    return np.abs(upper) ** 2


def nodes_for(noise: SlowNoise, areas_rad: tuple, sigmas_s: tuple, error: float) -> Nodes:
    """Fewest nodes of each normal variable whose errors in populations sum to less than `error`.

    An estimate: the variables are judged one by one, on separated Gaussian pulses.

    Args:
        noise: known values; the largest of a batch decide.
        areas_rad: largest areas of the two pulses.
        sigmas_s: widths of their Rabi envelopes, the largest of a batch.
        error: of the populations.

    Raises:
        ValueError: traced values, or noise so large that 48 nodes do not serve.
    """
    if is_traced(noise, areas_rad, sigmas_s):
        raise ValueError("`nodes_for` needs known values; inside jit, grad or vmap give `nodes`, found beforehand.")
    largest = lambda values: float(np.max(np.abs(np.asarray(values)), initial=0.0))
    e_1, e_2, d_1, d_2 = map(largest, _stds(noise))
    theta_1, theta_2 = map(largest, areas_rad)
    sigma_1, sigma_2 = map(largest, sigmas_s)
    joint_e, joint_d = (largest(c) for c in (noise.amplitude_correlation, noise.detuning_correlation))
    own_e, own_d = (largest(_rest(c)) for c in (noise.amplitude_correlation, noise.detuning_correlation))
    pair = max(d_1 * sigma_1, joint_d * d_2 * sigma_2)
    area = max(theta_1, theta_2)
    rules = [
        (e_1 * theta_1 + joint_e * e_2 * theta_2, lambda std, n: 0.75 * amplitude_error(std, n)),
        (e_2 * theta_2 * own_e, lambda std, n: 0.75 * amplitude_error(std, n)),
        # x and 1 - R vary together: twice the error of one of them.
        (pair, lambda std, n: 2 * detuning_error(std, 1.0, area, n)),
        (d_2 * sigma_2 * own_d, lambda std, n: detuning_error(std, 1.0, area, n)),
    ]
    return tuple(_fewest(std, rule, error / 4) for std, rule in rules)


def _fewest(std: float, rule, error: float) -> int:
    if std == 0:
        return 1
    for nodes in (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, _MOST_NODES):
        if rule(std, nodes) <= error:
            return nodes
    raise ValueError(
        f"slow noise needs more than {_MOST_NODES} nodes of one variable for an error of {error:g}; lower the noise, "
        "raise `error`, or average over `slow_samples`."
    )


# ------------------------------------------------------------------------------------------------ devices


def drawn(device, draws: Draws):
    """An `IonMemristor` in each of the draws: a batch whose last axis they are, behind the device's own.

    Rabi frequencies of negative factors come out positive, which no population sees: there is no closed loop of
    couplings, so their sign is a choice of phases. rho_vs has the sign of `factor_1` then.
    """
    device = with_last_axis(device)
    return dataclasses.replace(
        device,
        rabi_scale_1=device.rabi_scale_1 * jnp.abs(draws.factor_1),
        rabi_scale_2=device.rabi_scale_2 * jnp.abs(draws.factor_2),
        detuning_1_hz=device.detuning_1_hz + draws.detuning_1_hz,
        detuning_2_hz=device.detuning_2_hz + draws.detuning_2_hz,
    )


def mean_response(response: Response, draws: Draws) -> Response:
    """The mean of a `drawn` device's response over its last axis; valid where every draw is."""
    mean = lambda values: jnp.sum(draws.weights * values, axis=-1)
    return Response(
        mean(response.populations),
        mean(jnp.where(draws.factor_1 < 0, -1.0, 1.0) * response.coherence_vs),
        jnp.all(response.valid, axis=-1),
        jnp.max(response.error_estimate, axis=-1),
        response.method,
    )


def slow_average(
    device,
    x_set,
    r_set,
    noise: SlowNoise,
    *,
    nodes: Nodes | None = None,
    error: float = 1e-6,
    detuning_1_set_hz=0.0,
    detuning_2_set_hz=0.0,
) -> tuple[Response, Response]:
    """Responses of a device to pulse 1 alone and to both pulses, averaged over slow noise: <x> and <y> of every cycle.

    Main arguments:
        device: an `IonMemristor`; all draws are one batch of it. For traced values name a method planned for what the
            draws reach, several standard deviations around the device's own Rabi scales and detunings.
        x_set, r_set: commands in [0, 1], shape (cycles, *batch).
        noise: shape (*batch).

    Other arguments:
        nodes: of `slow_quadrature`; None for as many as `error` takes, which needs known values.
        error: of the quadrature, added to that of the method in `error_estimate`; without effect if `nodes` are given.
        detuning_1_set_hz, detuning_2_set_hz: known laser offsets, Hz.

    Returns:
        (after pulse 1 alone, after both), each of shape (levels, cycles, *batch) without the draws.

    Raises:
        ValueError: detuning noise with `ClosedForm`, which knows no detuning; an `EmulatedSeries`; see `nodes_for`.
    """
    if isinstance(device.method, EmulatedSeries):
        raise ValueError("`EmulatedSeries` was solved for one box and batch; average with AreaSeries or StaticGrid.")
    silent = without_detuning(noise) if isinstance(device.method, ClosedForm) else jnp.zeros(())
    added = real_array(0.0 if nodes is not None else error)
    if nodes is None:
        nodes = nodes_for(noise, device.largest_areas, (device.sigma_1_s, device.sigma_2_s), error)
    draws = slow_quadrature(noise, nodes)
    lanes = drawn(device, draws)
    x_set, r_set = jnp.broadcast_arrays(real_array(x_set), real_array(r_set))
    if x_set.ndim == 0:
        raise ValueError("`x_set` must have an axis of cycles, but is a number; give an array of one.")
    x_set, r_set = (jnp.repeat(a[..., None], len(draws.weights), axis=-1) for a in (x_set, r_set))
    offsets = [real_array(d) for d in (detuning_1_set_hz, detuning_2_set_hz)]
    settings = Settings.of(*(d[..., None] if d.ndim else d for d in offsets), x_set.shape)
    return _responses(lanes.prepared(x_set, settings), x_set, r_set, settings, draws, silent, added)


@eqx.filter_jit
def _responses(lanes, x_set, r_set, settings: Settings, draws: Draws, silent, added) -> tuple[Response, Response]:
    respond = lanes.under(settings)
    runs = respond(x_set, jnp.zeros_like(x_set), alone=True), respond(x_set, r_set, alone=False)
    first, second = (mean_response(run, draws) for run in runs)
    judge = lambda r: Response(
        r.populations + silent, r.coherence_vs + silent, r.valid & (silent == 0), r.error_estimate + added, r.method
    )
    return judge(first), judge(second)

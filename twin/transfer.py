"""The dictionary between ion and photonic memristors: which parameter of one is which parameter of the other.

Both are a chain of two rotations: theta_k = area of pulse k, phi_k = phase of Mach-Zehnder interferometer k, with

    transfer_k = (1 - V_k exp(-sigma_k^2/2) cos phi_k) / 2,    phi_k = phase_scale_k phi_set,k + phase_offset_k_rad

on the photonic side and theta_k = rabi_scale_k theta_set,k on the ion's. **Exact**: areas and phases, readout errors
and detectors, memories. **To first order**: what takes contrast from a pulse (dephasing D_k = pi linewidth, detuning
delta_k, noise s_k of the area) takes it from the interferometer as well, but with another dependence on the phase. A
Gaussian pulse of width sigma leaves w = cos(theta) + delta w with

    dephasing  D sigma k(theta),        k = int sin(v) sin(theta - v) dt / sigma
    detuning   (delta sigma)^2 q(theta), q = int_{t1<t2} sin(v(t1)) sin(theta - v(t2)) dt1 dt2 / sigma^2
    noise      -s^2 theta^2 cos(theta)/2

with v(t) the area delivered so far. These are projected, by least squares over phi_set uniform in [0, pi], on what an
interferometer can do: -nu cos(phi) (contrast), -alpha phi sin(phi) (scale), -beta sin(phi) (offset). `projections`
has the nine numbers. **No counterpart** have those of `twin.remainder`, where all that is left is measured.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.stats import norm

from twin.batching import batch_shape, check_values, is_traced
from twin.closed_form import flat_root
from twin.memory import AbstractMemory, Exponential, MovingAverage
from twin.memristor import IonMemristor
from twin.photonic import PhotonicMemristor
from twin.slow_noise import SlowNoise

PHOTONIC_NAMES = (
    *("phase_scale_1", "phase_scale_2", "phase_offset_1_rad", "phase_offset_2_rad", "visibility_1", "visibility_2"),
    *("phase_noise_1_rad", "phase_noise_2_rad", "loss_input", "loss", "efficiency", "dark_counts"),
)
"""What the dictionary gives of a photonic element."""
ION_NAMES = (
    *("rabi_scale_1", "rabi_scale_2", "laser_linewidth_1_hz", "laser_linewidth_2_hz"),
    *("amplitude_noise_1", "amplitude_noise_2", "lifetime_s", "readout_error_bright", "readout_error_dark"),
)
"""What the dictionary gives of an ion."""
EXACT = {
    "rabi_scale_1": "phase_scale_1",
    "rabi_scale_2": "phase_scale_2",
    "readout_error_bright": "dark_counts",
    "readout_error_dark": "efficiency",
    "window_cycles": "window_cycles",
}
"""The block in which both devices give the same populations; of `efficiency` both readout errors are needed."""
_ALWAYS_CLICKS = "a detector that clicks in every shot tells nothing, and has no efficiency"
# Gauss-Legendre phases; half-width of the time grid in sigma; its points.
_POINTS, _REACH, _STEPS = 24, 8.0, 1601


class Projection(NamedTuple):
    """What an interferometer makes of a cause of lost contrast, per unit of that cause.

    Attributes:
        contrast: nu, of exp(-nu cause). scale: alpha, added to the phase scale. offset_rad: beta, added to the phase.
    """

    contrast: float
    scale: float
    offset_rad: float


@functools.lru_cache(maxsize=1)
def projections() -> dict[str, Projection]:
    """What an interferometer makes of D sigma ("dephasing"), (delta sigma)^2 ("detuning") and s^2 ("noise")."""
    t, step = np.linspace(-_REACH, _REACH, _STEPS, retstep=True)
    done, rate = norm.cdf(t), norm.pdf(t)
    x, weights = np.polynomial.legendre.leggauss(_POINTS)
    phi = (x + 1) * np.pi / 2

    def dephasing(theta: float) -> float:
        return step * np.sum(np.sin(theta * done) * np.sin(theta * (1 - done)))

    def detuning(theta: float) -> float:
        f = np.sin(theta * done)
        # Trapezoidal sums up to each time, corrected at the upper end.
        inner = step * (np.cumsum(f) - 0.5 * f) - step**2 / 12 * np.cos(theta * done) * theta * rate
        return step * np.sum(inner * np.sin(theta * (1 - done)))

    causes = {"dephasing": dephasing, "detuning": detuning, "noise": lambda theta: -(theta**2) * np.cos(theta) / 2}
    root = np.sqrt(weights)
    basis = root[:, None] * np.stack([-np.cos(phi), -phi * np.sin(phi), -np.sin(phi)], axis=1)
    fitted = {}
    for name, response in causes.items():
        coefficients = np.linalg.lstsq(basis, root * np.array([response(p) for p in phi]), rcond=None)[0]
        fitted[name] = Projection(*coefficients.tolist())
    return fitted


# ------------------------------------------------------------------------------------------------ ion to photonic


def to_photonic(ion: IonMemristor) -> PhotonicMemristor:
    """The photonic element that stands for an ion: same memory, same source, parameters by the dictionary.

        phase_scale_k = amplitude_k rabi_scale_k (sigma_k/nominal) <f_k> + first order
        visibility_k = exp(-nu_D D_k sigma_k - nu_d (delta_k^2 + s_delta^2) sigma_k^2)
        phase_noise_k^2 = 2 nu_s s_k^2,    1 + s_k^2 = (1 + s_amplitude^2) <f_k^2>/<f_k>^2
        loss_input = 1 - exp(-tail/lifetime),    loss = 1 - exp(-separation/lifetime)
        dark_counts = e_0,    efficiency = 1 - e_1/(1 - e_0)

    f_k is the Debye-Waller factor of pulse k over the phonons; e_0 and e_1 are the probabilities that an ion outside s
    is read as s, and one in s is not. Both runs wait for `tail_s` before they are read, and only the one with both
    pulses for `separation_s` as well: so the first is `loss_input`, which x and y meet, and the second `loss`, which y
    meets alone. In the V scheme, theta_1 = rabi_scale_1 (pi - phi_set), there is an offset pi (1 - phase_scale_1), and
    decay, of levels other than s, has no counterpart.

    Args:
        ion: any `IonMemristor`; numbers may have batch axes or be traced.

    Returns:
        The element; differentiable in every number. Where the phase noise of a moving ion is 0, its derivatives are
        given as 0, as by `flat_root`.

    Raises:
        ValueError: another device than an ion; known readout errors that no detector has, e_0 + e_1 > 1 or e_0 = 1.

    Example:
        >>> element = to_photonic(IonMemristor(memory=MovingAverage(10.0), rabi_scale_1=1.03))
    """
    _check_is(ion, IonMemristor, "to_photonic")
    values: dict[str, Any] = {}
    fitted = projections()
    means, squares = carrier_moments(ion)
    for k in (1, 2):
        nominal, sigma = getattr(ion, f"nominal_sigma_{k}_s"), getattr(ion, f"sigma_{k}_s")
        ratio = 1.0 if nominal is None else sigma / nominal
        scale = getattr(ion, f"amplitude_{k}") * getattr(ion, f"rabi_scale_{k}") * ratio * means[k - 1]
        noise = SlowNoise() if ion.slow_noise is None else ion.slow_noise
        spread = (1 + getattr(noise, f"amplitude_noise_{k}") ** 2) * squares[k - 1] / means[k - 1] ** 2 - 1
        linewidth_hz = ion.laser_linewidth_hz + getattr(ion, f"laser_linewidth_{k}_hz")
        detuning_hz2 = getattr(ion, f"detuning_{k}_hz") ** 2 + getattr(noise, f"detuning_noise_{k}_hz") ** 2
        causes = {"dephasing": jnp.pi * linewidth_hz * sigma, "detuning": (2 * jnp.pi * sigma) ** 2 * detuning_hz2}
        # Rounding may leave a variance of -1e-16.
        causes["noise"] = jnp.where(spread > 1e-15, spread, 0.0)
        scale = scale + sum(fitted[name].scale * cause for name, cause in causes.items())
        offset = sum(fitted[name].offset_rad * cause for name, cause in causes.items())
        if ion.start == "s" and k == 1:
            offset = jnp.pi * (1 - scale) - offset
        values[f"phase_scale_{k}"], values[f"phase_offset_{k}_rad"] = scale, offset
        lost = (fitted[name].contrast * causes[name] for name in ("dephasing", "detuning"))
        values[f"visibility_{k}"] = jnp.exp(-sum(lost))
        # Of an ion at rest the spread is that of the laser, whose root has a derivative at 0 as well.
        root = flat_root(causes["noise"]) if ion.moves else getattr(noise, f"amplitude_noise_{k}")
        values[f"phase_noise_{k}_rad"] = float(np.sqrt(2 * fitted["noise"].contrast)) * root
    decays = ion.start == "v"
    values["loss_input"] = -jnp.expm1(-ion.tail_s / ion.lifetime_s) if decays else 0.0
    values["loss"] = -jnp.expm1(-ion.separation_s / ion.lifetime_s) if decays else 0.0
    appears, hides = readout_errors(ion)
    check_values(f"readout_error_{'bright' if s_is_dark(ion) else 'dark'}", appears, lambda v: v < 1,
                 "below 1 for an element to stand for the ion", _ALWAYS_CLICKS)  # fmt: skip
    values["dark_counts"], values["efficiency"] = appears, 1 - hides / (1 - appears)
    return PhotonicMemristor(memory=ion.memory, source=ion.source, **values)


def carrier_moments(ion: IonMemristor) -> tuple[list[Float[Array, "..."]], list[Float[Array, "..."]]]:
    """Mean and mean square of the Debye-Waller factor of each pulse, over the average that the ion makes itself.

    Of one thermal mode exp(-eta^2 (n_bar + 1/2)), and its square times I_0(2 eta^2 sqrt(n_bar (n_bar + 1))).
    """
    first, second, weights = ion.carrier_factors(len(batch_shape(ion)))
    if not ion.moves:
        first, second, weights = first[:1], second[:1], jnp.ones_like(weights[:1])
    total = lambda values: jnp.sum(weights * values, axis=0)
    return [total(f) for f in (first, second)], [total(f**2) for f in (first, second)]


def readout_errors(ion: IonMemristor) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(e_0, e_1): that an ion outside s is read as s, and that one in s is not; bright and dark by the scheme."""
    errors = ion.readout_error_bright, ion.readout_error_dark
    return errors if s_is_dark(ion) else (errors[1], errors[0])


def s_is_dark(ion: IonMemristor) -> bool:
    """Whether s is what the detector sees dark."""
    return ion.scheme != "v"


# ------------------------------------------------------------------------------------------------ photonic to ion


def to_ion(photonic: PhotonicMemristor, template: IonMemristor | None = None) -> IonMemristor:
    """The ion that stands for a photonic element: the inverse of `to_photonic`.

    Loss of visibility becomes the linewidth of two lasers, phase noise that of the areas, losses a lifetime, which is
    one number for both: (separation + tail)/lifetime = -log[(1 - loss_input) (1 - loss)]. A phase offset beyond what
    these bring has no counterpart and is left out; a command map takes it up.

    Args:
        photonic: the element, whose `dark_counts` must be below 1.
        template: supplies scheme, method, pulse widths and times, and decay branching. It must be at rest, as the
            dictionary cannot tell motion from noise. Default: a Lambda ion in which s decays to v.

    Returns:
        The ion; to_photonic of it gives back all numbers but phase offsets and the share of each loss, and to_ion of
        to_photonic of an ion with nothing but `ION_NAMES` gives that ion.

    Raises:
        ValueError: another device than a photonic element; a template that moves; a known visibility of 0, or a known
            loss of 1, which no linewidth and no lifetime can bring about.
    """
    _check_is(photonic, PhotonicMemristor, "to_ion")
    ion = IonMemristor(memory=photonic.memory, branching=1.0) if template is None else template
    if ion.moves:
        raise ValueError("`template` must be an ion at rest, but is averaged over phonons; set n_bar and heating to 0.")
    for name in ("visibility_1", "visibility_2"):
        check_values(name, getattr(photonic, name), lambda v: v > 0, "above 0 for an ion to stand for the element",
                     "no finite linewidth takes all contrast away")  # fmt: skip
    for name in ("loss_input", "loss") if ion.start == "v" else ():
        check_values(name, getattr(photonic, name), lambda v: v < 1, "below 1 for an ion to stand for the element",
                     "no lifetime above 0 loses everything")  # fmt: skip
    means, _ = carrier_moments(ion)
    values: dict[str, Any] = {"laser_linewidth_hz": 0.0, "detuning_1_hz": 0.0, "detuning_2_hz": 0.0}
    noise: dict[str, Any] = {}
    fitted = projections()
    for k in (1, 2):
        nominal, sigma = getattr(ion, f"nominal_sigma_{k}_s"), getattr(ion, f"sigma_{k}_s")
        ratio = 1.0 if nominal is None else sigma / nominal
        dephasing = -jnp.log(getattr(photonic, f"visibility_{k}")) / fitted["dephasing"].contrast
        variance = getattr(photonic, f"phase_noise_{k}_rad") ** 2 / (2 * fitted["noise"].contrast)
        scale = getattr(photonic, f"phase_scale_{k}")
        scale = scale - fitted["dephasing"].scale * dephasing - fitted["noise"].scale * variance
        values[f"rabi_scale_{k}"] = scale / (getattr(ion, f"amplitude_{k}") * ratio * means[k - 1])
        values[f"laser_linewidth_{k}_hz"] = dephasing / (jnp.pi * sigma)
        per_amplitude = np.sqrt(2 * fitted["noise"].contrast)
        noise[f"amplitude_noise_{k}"] = getattr(photonic, f"phase_noise_{k}_rad") / per_amplitude
    kept = -jnp.log1p(-photonic.loss_input) - jnp.log1p(-photonic.loss)
    if ion.start == "v":
        lost = kept > 0
        values["lifetime_s"] = jnp.where(lost, (ion.separation_s + ion.tail_s) / jnp.where(lost, kept, 1.0), jnp.inf)
    check_values("dark_counts", photonic.dark_counts, lambda v: v < 1, "below 1 for an ion to stand for the element",
                 _ALWAYS_CLICKS)  # fmt: skip
    appears, hides = photonic.dark_counts, (1 - photonic.dark_counts) * (1 - photonic.efficiency)
    bright, dark = (appears, hides) if s_is_dark(ion) else (hides, appears)
    values |= {"readout_error_bright": bright, "readout_error_dark": dark}
    noisy = is_traced(noise) or any(np.any(np.asarray(spread) != 0) for spread in noise.values())
    values["slow_noise"] = SlowNoise(**noise) if noisy else None
    return dataclasses.replace(ion, memory=photonic.memory, source=photonic.source, **values)


# ------------------------------------------------------------------------------------------------ uncertainty


def _check_is(device: Any, platform: type, function: str) -> None:
    """Refuses a device of another platform than a function moves from."""
    if not isinstance(device, platform):
        raise ValueError(f"`{function}` takes one {platform.__name__}, but was given: {type(device).__name__}.")


def _check_names(platform: type, names: Sequence[str], argument: str) -> None:
    """Refuses names of which a device of this platform has no number."""
    if isinstance(names, str):
        raise ValueError(f"`{argument}` must be a tuple of names, but is one string: write ({names!r},).")
    modules = {"memory", "method", "motion", "slow_noise"}
    known = {f.name for f in dataclasses.fields(platform) if not f.metadata.get("static", False)} - modules
    known |= {"window_cycles"} | (set(SlowNoise.parameters()) if platform is IonMemristor else set())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"`{argument}` has {unknown[0]!r}, which is no parameter of {platform.__name__}.")


def with_values(device: Any, names: Sequence[str], values: Float[Array, " names"]) -> Any:
    """A device with named numbers replaced; `window_cycles` is its memory's, names of `SlowNoise` its noise's."""
    given: dict[str, Any] = dict(zip(names, values, strict=True))
    if "window_cycles" in given:
        given["memory"] = _with_window(device.memory, given.pop("window_cycles"))
    noise = {name: given.pop(name) for name in SlowNoise.parameters() if name in given}
    if noise:
        given["slow_noise"] = dataclasses.replace(device.slow_noise or SlowNoise(), **noise)
    return dataclasses.replace(device, **given)


def values_of(device: Any, names: Sequence[str]) -> Float[Array, " names"]:
    """Named numbers of a device, in order; the inverse of `with_values`."""

    def one(name: str) -> Any:
        if name == "window_cycles":
            memory = device.memory
            return memory.tau_cycles if isinstance(memory, Exponential) else memory.window_cycles
        if name in SlowNoise.parameters():
            return getattr(device.slow_noise or SlowNoise(), name)
        return getattr(device, name)

    return jnp.stack([jnp.asarray(one(name), float) for name in names])


def jacobian_to_photonic(
    ion: IonMemristor, names: Sequence[str], photonic_names: Sequence[str] = (*PHOTONIC_NAMES, "window_cycles")
) -> Float[Array, "photonic ion"]:
    """Derivatives of the photonic parameters (rows) with respect to named ones of the ion (columns).

    Raises:
        ValueError: another device than an ion, names of no parameters.
    """
    _check_is(ion, IonMemristor, "jacobian_to_photonic")
    _check_names(IonMemristor, names, "names")
    _check_names(PhotonicMemristor, photonic_names, "photonic_names")
    image = lambda values: values_of(to_photonic(with_values(ion, names, values)), photonic_names)
    return jax.jacfwd(image)(values_of(ion, names))


def jacobian_to_ion(
    photonic: PhotonicMemristor,
    names: Sequence[str],
    ion_names: Sequence[str] = (*ION_NAMES, "window_cycles"),
    template: IonMemristor | None = None,
) -> Float[Array, "ion photonic"]:
    """Derivatives of the ion's parameters (rows) with respect to named photonic ones (columns).

    Without losses the lifetime is infinite, and its derivatives are given as 0.

    Raises:
        ValueError: another device than a photonic element, names of no parameters.
    """
    _check_is(photonic, PhotonicMemristor, "jacobian_to_ion")
    _check_names(PhotonicMemristor, names, "names")
    _check_names(IonMemristor, ion_names, "ion_names")
    image = lambda values: values_of(to_ion(with_values(photonic, names, values), template), ion_names)
    return jax.jacfwd(image)(values_of(photonic, names))


def propagated_covariance(
    derivatives: Float[Array, "new old"], covariance: Float[np.ndarray, "old old"] | Float[Array, "old old"]
) -> Float[Array, "new new"]:
    """Covariance of what a dictionary makes of uncertain parameters, J C J^T: to first order in their errors."""
    return derivatives @ jnp.asarray(covariance) @ derivatives.T


def _with_window(memory: AbstractMemory, window_cycles) -> AbstractMemory:
    if isinstance(memory, Exponential):
        return Exponential(window_cycles)
    if isinstance(memory, MovingAverage):
        return MovingAverage(window_cycles, capacity=memory.capacity)
    raise ValueError(f"the memory {type(memory).__name__} has no window; use MovingAverage or Exponential.")

"""Single-ion Paul traps: from voltages and geometry to Mathieu parameters, frequencies, depth and micromotion.

Axis i of a singly charged ion of mass m obeys, with Om the rf in rad/s,

    m u_i'' = -(m Om^2/4) [a_i - 2 q_i cos(Om t)] u_i + e E_i

Axes are x, y (radial) and z (axial, without rf); every number of a trap has them first, shape (3, *batch). Frequencies
are exact, by `twin.mathieu`; where an axis is not stable they are NaN and `stable` is False, and `check()` says so in a
sentence. Crossed axes (a static quadrupole turned against that of the rf) are left out.

References:
    [1] D. J. Berkeland, J. D. Miller, J. C. Bergquist, W. M. Itano, D. J. Wineland, J. Appl. Phys. 83, 5025 (1998).
    [2] D. Leibfried, R. Blatt, C. Monroe, D. Wineland, Rev. Mod. Phys. 75, 281 (2003).
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy import constants

from twin import mathieu
from twin.batching import (
    batch_shape,
    broadcast_batch,
    check_not_negative,
    check_positive,
    check_values,
    is_traced,
    physical,
    real_array,
)
from twin.ion import YB171
from twin.micromotion import ExcessMicromotion

Axes = Float[Array, "3 ..."]
_AXES = ("x", "y", "z")
_ELECTRON_VOLT = constants.elementary_charge
# Newton steps from the pseudopotential to a trap whose frequencies were measured.
_NEWTON_STEPS = 12


def along_axes(shape: tuple[int, ...], *numbers: Array) -> Axes:
    """Numbers of x, y and z, spread over the batch before they are stacked: their own batches may have fewer axes."""
    return jnp.stack([jnp.broadcast_to(x, shape) for x in numbers])


def _vector(name: str, value) -> Axes:
    vector = real_array(value)
    if vector.ndim == 0 or vector.shape[0] != 3:
        raise ValueError(f"`{name}` must have shape (3, ...), along x, y, z, but has {vector.shape}.")
    return vector


def heating_rate_per_s(noise_v2_per_m2_hz, secular_hz, mass_kg) -> Float[Array, "..."]:
    """Phonons a second that noise of the electric field heats a mode with: e^2 S_E/(4 m hbar omega).

    Args:
        noise_v2_per_m2_hz: single-sided spectral density S_E at the secular frequency, along the mode, (V/m)^2/Hz.
        secular_hz: omega/2 pi, Hz. mass_kg: of the singly charged ion, kg. All broadcast.

    References: M. Brownnutt, M. Kumph, P. Rabl, R. Blatt, Rev. Mod. Phys. 87, 1419 (2015).
    """
    check_not_negative("noise_v2_per_m2_hz", noise_v2_per_m2_hz, "(V/m)^2/Hz, single-sided")
    check_positive("secular_hz", secular_hz, "Hz")
    check_positive("mass_kg", mass_kg, "kilograms")
    noise, frequency, mass = real_array(noise_v2_per_m2_hz), real_array(secular_hz), real_array(mass_kg)
    # hbar omega = h f; the squares of charge and density would underflow in another order.
    return (constants.elementary_charge / mass) * (constants.elementary_charge / (4 * constants.h)) * noise / frequency


class AbstractTrap(eqx.Module):
    """What every trap says of one singly charged ion."""

    rf_hz: eqx.AbstractVar[Float[Array, "..."]]
    mass_kg: eqx.AbstractVar[Float[Array, "..."]]

    @property
    @abc.abstractmethod
    def a(self) -> Axes:
        """Static Mathieu parameters, shape (3, *batch); they add up to zero."""

    @property
    @abc.abstractmethod
    def q(self) -> Axes:
        """Mathieu parameters of the rf, shape (3, *batch): (q, -q, 0), the rf's phase such that q > 0."""

    @property
    @abc.abstractmethod
    def depth_ev(self) -> Float[Array, "..."]:
        """Energy in eV that takes the ion out of the trap; NaN where it is not stable or the geometry is not known."""

    @property
    @abc.abstractmethod
    def secular_hz(self) -> Axes:
        """Secular frequencies beta f_rf/2 in Hz, exact; NaN for an axis that is not stable."""

    @property
    def beta(self) -> Axes:
        """Exact characteristic exponents, NaN for an axis that is not stable."""
        return 2 * self.secular_hz / self.rf_hz

    @property
    def pseudopotential_hz(self) -> Axes:
        """Secular frequencies to lowest order, sqrt(a + q^2/2) f_rf/2; NaN where the exact ones are."""
        lowest = mathieu.pseudopotential_exponent(self.a, self.q) * self.rf_hz / 2
        return jnp.where(mathieu.stable(self.a, self.q), lowest, jnp.nan)

    @property
    def stable(self) -> Bool[Array, "..."]:
        """Whether all three axes are in the first stability region, shape (*batch)."""
        return jnp.all(jnp.isfinite(self.secular_hz), axis=0)

    @property
    def static_hz2(self) -> Axes:
        """What static fields add to the squares of the secular frequencies, a f_rf^2/4 in Hz^2; scales as 1/m."""
        return self.a * self.rf_hz**2 / 4

    @property
    def rf_hz2(self) -> Axes:
        """The rest of the squares, in Hz^2: q^2 f_rf^2/8 to lowest order, when it scales as 1/m^2."""
        return self.secular_hz**2 - self.static_hz2

    @property
    def static_curvature_v_per_m2(self) -> Axes:
        """Second derivatives of the static potential, a m Om^2/(4 e) in V/m^2, along the axes."""
        return self.a * self.mass_kg * (2 * jnp.pi * self.rf_hz) ** 2 / (4 * constants.elementary_charge)

    @property
    def rf_curvature_v_per_m2(self) -> Axes:
        """Second derivatives of the rf potential's amplitude in V/m^2: it is `rf_curvature` u^2/2 cos(Om t) an axis."""
        return -self.q * self.mass_kg * (2 * jnp.pi * self.rf_hz) ** 2 / (2 * constants.elementary_charge)

    @property
    def micromotion_ratio(self) -> Axes:
        """Intrinsic micromotion: amplitude of the modulation of u = u_1 cos(omega t) [1 - ratio cos(Om t) ...], exact.

        The sum of both first Floquet coefficients, with the sign turned: q/2 to lowest order, and the sign of q.
        """
        c = mathieu.floquet_coefficients(self.a, self.q, harmonics=1)
        return -(c[0] + c[2])

    def secular_hz_for(self, mass_kg) -> Axes:
        """Exact secular frequencies in Hz that a singly charged ion of another mass has in the same fields.

        a and q both scale as 1/m. Args: mass_kg: in kg, shape (*batch).
        """
        check_positive("mass_kg", mass_kg, "kilograms")
        scale = self.mass_kg / real_array(mass_kg)
        a, q = broadcast_batch((self.a, self.q), jnp.broadcast_shapes(batch_shape(self), scale.shape), 1)
        return mathieu.characteristic_exponent(a * scale, q * scale) * self.rf_hz / 2

    def excess_micromotion(self, stray_field_v_per_m, wavevector_rad_m, *, lowest_order=False) -> ExcessMicromotion:
        """Micromotion of an ion that a static field pushes off the rf null, and what a laser beam sees of it.

        The mean displacement is u_0 = e E/(m omega^2), the amplitude (q/2) u_0 to lowest order (omega the exact secular
        frequency); the exact answer is the periodic solution of the driven Mathieu equation. The rf has one phase on
        all electrodes.

        Args:
            stray_field_v_per_m: static field at the ion along the trap's axes, V/m, shape (3, *batch).
            wavevector_rad_m: of the beam along the trap's axes, rad/m, shape (3, *batch).
            lowest_order: take the textbook's formulas, to compare.

        Returns:
            Displacements, amplitudes, modulation index and Bessel factors; NaN along axes that are not stable.
        """
        field = _vector("stray_field_v_per_m", stray_field_v_per_m)
        wavevector = _vector("wavevector_rad_m", wavevector_rad_m)
        shape = jnp.broadcast_shapes(batch_shape(self), field.shape[1:], wavevector.shape[1:])
        a, q, secular, field, wavevector = broadcast_batch(
            (self.a, self.q, self.secular_hz, field, wavevector), shape, 1
        )
        acceleration = constants.elementary_charge * field / self.mass_kg
        if lowest_order:
            displacement = acceleration / (2 * jnp.pi * secular) ** 2
            amplitude = -q / 2 * displacement
        else:
            d = mathieu.driven_coefficients(a, q, harmonics=1)
            displacement, amplitude = d * acceleration / (jnp.pi * self.rf_hz) ** 2
        return ExcessMicromotion(displacement, amplitude, jnp.sum(wavevector * amplitude, axis=0))

    def check(self) -> None:
        """Refuses a trap that does not hold the ion. For known values; traced ones are judged by `stable`.

        Raises:
            ValueError: which axis, its a and q, the boundary, and what to do.
        """
        if is_traced(self) or np.all(self.stable):
            return
        a, q = np.asarray(self.a), np.asarray(self.q)
        at = tuple(np.argwhere(~np.isfinite(self.secular_hz))[0])
        low, high = float(mathieu.smallest_stable_q(a[at])), float(mathieu.largest_stable_q(a[at]))
        if at[0] == 2:
            where, remedy = "without rf it needs 0 < a < 1", "change the static voltage along the axis"
        elif np.isnan(high):
            where, remedy = "no q is stable with this a", "lower the static voltages"
        else:
            where = f"q must lie between {low:.4g} and {high:.4g} for this a"
            strong = abs(q[at]) >= high
            remedy = (
                "lower the rf voltage or raise the rf" if strong else "raise the rf voltage or lower the static ones"
            )
        axis = f"along {_AXES[at[0]]}: a = {a[at]:.4g}, q = {q[at]:.4g}"
        raise ValueError(f"The trap does not hold the ion {axis}, but {where}; {remedy}.")


class LinearTrap(AbstractTrap):
    """Linear trap of four rods and two endcaps, in the form of Berkeland et al. [1].

        rf potential  (V/2) [1 + (x^2 - y^2)/r0^2] cos(Om t),   static  kappa U [z^2 - (x^2 + y^2)/2]/z0^2
        q_x = -q_y = 2 e V/(m r0^2 Om^2),   a_z = 8 e kappa U/(m z0^2 Om^2),   a_x = -a_z/2 + s,  a_y = -a_z/2 - s

    V is the amplitude (not rms, not peak to peak) of the rf on one pair of rods, the other pair being grounded; with
    +-V/2 on both pairs the field is the same. s = 4 e W/(m r0^2 Om^2) is that of a static voltage W between the pairs.

    Args:
        rf_voltage_v: V, volt. rf_hz: Om/2 pi, Hz. r0_m: from the axis to the rods' surface, m.
        dc_voltage_v: U on the endcaps, volt. z0_m: half the distance of the endcaps, m.
        kappa: geometric factor of the endcaps, 0 to 1.
        asymmetry_voltage_v: W, volt; raises a_x and lowers a_y.
        mass_kg: of the singly charged ion, kg; default 171Yb+.
    """

    rf_voltage_v: Float[Array, "..."] = physical()
    rf_hz: Float[Array, "..."] = physical()
    r0_m: Float[Array, "..."] = physical()
    dc_voltage_v: Float[Array, "..."] = physical()
    z0_m: Float[Array, "..."] = physical()
    kappa: Float[Array, "..."] = physical()
    asymmetry_voltage_v: Float[Array, "..."] = physical(default=0.0)
    mass_kg: Float[Array, "..."] = physical(default=YB171.mass_kg)

    def __check_init__(self):
        for name, unit in [("rf_voltage_v", "volt"), ("rf_hz", "Hz"), ("r0_m", "metres"), ("z0_m", "metres")]:
            check_positive(name, getattr(self, name), unit)
        check_positive("mass_kg", self.mass_kg, "kilograms")
        check_values(
            "kappa", self.kappa, lambda v: (v > 0) & (v <= 1), "above 0 and at most 1", "it is a geometric factor"
        )
        for name in ("dc_voltage_v", "asymmetry_voltage_v"):
            check_values(name, getattr(self, name), np.isfinite, "finite", "give it in volt")

    def _scaled(self, voltage: Array, length: Array) -> Array:
        return constants.elementary_charge * voltage / (self.mass_kg * (length * 2 * jnp.pi * self.rf_hz) ** 2)

    @property
    def a(self) -> Axes:
        """Static Mathieu parameters, see the class."""
        axial = 8 * self._scaled(self.kappa * self.dc_voltage_v, self.z0_m)
        split = 4 * self._scaled(self.asymmetry_voltage_v, self.r0_m)
        return along_axes(batch_shape(self), -axial / 2 + split, -axial / 2 - split, axial)

    @property
    def q(self) -> Axes:
        """Mathieu parameters of the rf, see the class."""
        q = 2 * self._scaled(self.rf_voltage_v, self.r0_m)
        return along_axes(batch_shape(self), q, -q, jnp.zeros_like(q))

    @property
    def secular_hz(self) -> Axes:
        """Exact secular frequencies in Hz, NaN for an axis that is not stable."""
        return mathieu.characteristic_exponent(self.a, self.q) * self.rf_hz / 2

    @property
    def depth_ev(self) -> Float[Array, "..."]:
        """The least of the (pseudo)potentials of the quadrupoles at r0 along x and y and at z0 along z, in eV.

        Without static fields e V q/8 [2]. Real electrodes make it somewhat different.
        """
        reach = along_axes(batch_shape(self), self.r0_m, self.r0_m, self.z0_m)
        energies = self.mass_kg * (2 * jnp.pi * self.pseudopotential_hz * reach) ** 2 / 2
        return jnp.where(self.stable, jnp.min(energies, axis=0) / _ELECTRON_VOLT, jnp.nan)


@jax.jit
def _q_of_exponents(x: Array, y: Array, z: Array) -> Array:
    """The q at which the a that belong to three exponents add up to zero."""
    trace = lambda q: mathieu.characteristic_value(x, q) + mathieu.characteristic_value(y, q) + z**2

    def newton(q):
        value, slope = jax.jvp(trace, (q,), (jnp.ones_like(q),))
        return q - value / slope

    # Concave and falling in q, so that Newton's steps converge from anywhere.
    start = jax.lax.stop_gradient(jnp.sqrt(x**2 + y**2 + z**2))
    q = jax.lax.stop_gradient(jax.lax.fori_loop(0, _NEWTON_STEPS, lambda _, q: newton(q), start))
    # Two more bring first and second derivatives.
    return newton(newton(q))


class HarmonicTrap(AbstractTrap):
    """A trap known by its measured secular frequencies.

    With the rf known as well, a and q follow: a_z = beta_z^2, and both radial exponents give q and a_x - a_y, as the a
    add up to zero and there is no rf along z. This inverts the exact exponents, for any beta below 1.

    Args:
        frequencies_hz: measured secular frequencies along (x, y, z), Hz, shape (3, *batch), below `rf_hz`/2.
        rf_hz: Om/2 pi in Hz. NaN, the default, where it is not known: then all that depends on it (a, q, micromotion,
            frequencies of other masses) is NaN.
        mass_kg: of the ion they were measured with, kg; default 171Yb+.
    """

    frequencies_hz: Float[Array, "3 ..."] = physical(1)
    rf_hz: Float[Array, "..."] = physical(default=np.nan)
    mass_kg: Float[Array, "..."] = physical(default=YB171.mass_kg)

    def __check_init__(self):
        _vector("frequencies_hz", self.frequencies_hz)
        check_positive("frequencies_hz", self.frequencies_hz, "Hz")
        check_positive("mass_kg", self.mass_kg, "kilograms")
        if is_traced(self.rf_hz) or np.all(np.isnan(self.rf_hz)):
            return
        check_positive("rf_hz", self.rf_hz, "Hz")
        if not is_traced(self):
            check_values(
                "frequencies_hz", self.frequencies_hz, lambda f: f < self.rf_hz / 2, "below half of `rf_hz`", "lower it"
            )

    @property
    def secular_hz(self) -> Axes:
        """The frequencies as given."""
        return jnp.broadcast_to(self.frequencies_hz, (3, *batch_shape(self)))

    @property
    def a(self) -> Axes:
        """Static Mathieu parameters; NaN without `rf_hz`."""
        x, y, z = self.beta
        q = _q_of_exponents(x, y, z)
        return jnp.stack([mathieu.characteristic_value(x, q), mathieu.characteristic_value(y, q), z**2])

    @property
    def q(self) -> Axes:
        """Mathieu parameters of the rf; NaN without `rf_hz`."""
        x, y, z = self.beta
        q = _q_of_exponents(x, y, z)
        return jnp.stack([q, -q, jnp.zeros_like(q)])

    @property
    def depth_ev(self) -> Float[Array, "..."]:
        """NaN: frequencies alone do not say how far the electrodes are."""
        return jnp.full(batch_shape(self), jnp.nan)

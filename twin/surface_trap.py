"""Five-wire surface trap in the gapless-plane approximation.

Everything lies in the plane y = 0 and is long along z. Two rf strips stand left and right of a grounded centre strip,
and ground covers the rest. Cut at the middle of its gaps, the plane has no gaps, and its potential above is exact:

    phi = sum over strips of (V/pi) [atan((x_2 - x)/y) - atan((x_1 - x)/y)] = Im F(x + i y),
    F' = (V/pi) sum_k s_k/(zeta - e_k),      edges e_k with signs s_k = -, +, -, +

With the centre strip on 0 < x < a, and strips of widths c to its left and b to its right, the field vanishes at [1]

    x_0 = a c/(b + c),      y_0 = sqrt(a b c (a + b + c))/(b + c).

References:
    [1] M. G. House, Phys. Rev. A 78, 033402 (2008).
    [2] J. H. Wesenberg, Phys. Rev. A 78, 063410 (2008).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float
from scipy import constants

from twin import mathieu
from twin.batching import (
    batch_shape,
    broadcast_batch,
    check_not_negative,
    check_positive,
    check_values,
    physical,
    real_array,
)
from twin.ion import YB171
from twin.trap import AbstractTrap, Axes, along_axes

_NEWTON_STEPS = 40


class SurfaceTrap(AbstractTrap):
    """Five-wire trap: two rf strips beside a grounded centre strip, in the form of House [1].

    x is across the strips, 0 at the middle of the centre strip; y is the height; z is along the strips. The trap's
    axes x and y are the principal axes of the rf quadrupole, turned by `tilt_rad`. To quadratic order its
    pseudopotential is round, so that a static field alone splits the radial frequencies, and it is taken to have the
    same axes: a_x = -a_z (1 + s)/2 and a_y = -a_z (1 - s)/2.

    Args:
        rf_voltage_v: amplitude on both strips, volt. rf_hz: Om/2 pi, Hz.
        center_width_m, left_width_m, right_width_m: widths of the metal, m.
        gap_m: between neighbouring metal, and outside of the rf strips; half of it is given to each side.
        axial_hz: secular frequency along z, from static voltages that are not modelled, Hz.
        static_asymmetry: s, the share by which the static field's radial curvatures differ; 0 for a round one.
        mass_kg: of the singly charged ion, kg; default 171Yb+.
    """

    rf_voltage_v: Float[Array, "..."] = physical()
    rf_hz: Float[Array, "..."] = physical()
    center_width_m: Float[Array, "..."] = physical()
    left_width_m: Float[Array, "..."] = physical()
    right_width_m: Float[Array, "..."] = physical()
    axial_hz: Float[Array, "..."] = physical()
    gap_m: Float[Array, "..."] = physical(default=0.0)
    static_asymmetry: Float[Array, "..."] = physical(default=0.0)
    mass_kg: Float[Array, "..."] = physical(default=YB171.mass_kg)

    def __check_init__(self):
        for name in ("center_width_m", "left_width_m", "right_width_m"):
            check_positive(name, getattr(self, name), "metres")
        check_not_negative("gap_m", self.gap_m, "metres")
        check_positive("rf_voltage_v", self.rf_voltage_v, "volt")
        check_positive("rf_hz", self.rf_hz, "Hz")
        check_positive("axial_hz", self.axial_hz, "Hz")
        check_positive("mass_kg", self.mass_kg, "kilograms")
        check_values("static_asymmetry", self.static_asymmetry, lambda v: v == v, "finite", "0 is a round field")

    @property
    def _widths(self) -> tuple[Array, Array, Array]:
        """Centre, left and right strip with the halves of the gaps."""
        widths = along_axes(batch_shape(self), self.center_width_m, self.left_width_m, self.right_width_m)
        center, left, right = widths + self.gap_m
        return center, left, right

    @property
    def _edges(self) -> Float[Array, "4 ..."]:
        center, left, right = self._widths
        return jnp.stack([-center / 2 - left, -center / 2, center / 2, center / 2 + right])

    @property
    def null_m(self) -> Float[Array, "2 ..."]:
        """Where the rf field vanishes: x from the middle of the centre strip and height y, m, shape (2, *batch)."""
        center, left, right = self._widths
        across = center * left / (left + right) - center / 2
        return jnp.stack([across, jnp.sqrt(center * left * right * (center + left + right)) / (left + right)])

    @property
    def height_m(self) -> Float[Array, "..."]:
        """Distance h of the ion from the plane, m."""
        return self.null_m[1]

    @property
    def _quadrupole(self) -> Complex[Array, "..."]:
        """F'' at the null over the voltage, 1/m^2: its size is the curvature along the axes, its phase turns them."""
        x, y = self.null_m
        return -_moments(self._edges, x + 1j * y, 2) / jnp.pi

    @property
    def tilt_rad(self) -> Float[Array, "..."]:
        """Angle from x to the trap's x axis, towards y, within +-pi/4; 0 for equal strips.

        Near the null phi = |F''| r^2 sin(2 theta + arg F'')/2, with principal axes where the sine is +-1.
        """
        angle = (jnp.pi / 2 - jnp.angle(self._quadrupole)) / 2
        return (angle + jnp.pi / 4) % (jnp.pi / 2) - jnp.pi / 4

    @property
    def axes(self) -> Float[Array, "3 3 ..."]:
        """The trap's axes as rows, in (x, y, z) of the electrodes: turns fields and wave vectors into the trap's."""
        cos, sin = jnp.cos(self.tilt_rad), jnp.sin(self.tilt_rad)
        zero, one = jnp.zeros_like(cos), jnp.ones_like(cos)
        return jnp.stack([jnp.stack(row) for row in ((cos, sin, zero), (-sin, cos, zero), (zero, zero, one))])

    @property
    def efficiency(self) -> Float[Array, "..."]:
        """eps of q = 2 eps e V/(m h^2 Om^2): curvature of the rf over that of an ideal quadrupole of size h.

        At most 1/pi: equal strips, 1 + sqrt(2) times as wide as the centre.
        """
        return jnp.abs(self._quadrupole) * self.height_m**2

    @property
    def a(self) -> Axes:
        """Static Mathieu parameters, see the class; a_z = (2 f_z/f_rf)^2 is exact, as z has no rf."""
        axial = (2 * self.axial_hz / self.rf_hz) ** 2
        split = self.static_asymmetry
        return along_axes(batch_shape(self), -axial * (1 + split) / 2, -axial * (1 - split) / 2, axial)

    @property
    def q(self) -> Axes:
        """Mathieu parameters of the rf along its principal axes, 2 e V |F''|/(m Om^2) and the opposite."""
        curvature = self.rf_voltage_v * jnp.abs(self._quadrupole)
        q = 2 * constants.elementary_charge * curvature / (self.mass_kg * (2 * jnp.pi * self.rf_hz) ** 2)
        return along_axes(batch_shape(self), q, -q, jnp.zeros_like(q))

    @property
    def secular_hz(self) -> Axes:
        """Exact secular frequencies in Hz, NaN for an axis that is not stable."""
        return mathieu.characteristic_exponent(self.a, self.q) * self.rf_hz / 2

    def rf_potential_v(self, x_m, y_m) -> Float[Array, "..."]:
        """Amplitude of the rf potential above the plane, V. Args: x_m, y_m: m, they broadcast against the batch."""
        x, y = jnp.broadcast_arrays(real_array(x_m), real_array(y_m))
        angles = jnp.arctan2(self._edges_for(x) - x, y)
        return self.rf_voltage_v / jnp.pi * (angles[1] - angles[0] + angles[3] - angles[2])

    def pseudopotential_ev(self, x_m, y_m) -> Float[Array, "..."]:
        """Pseudopotential e |E|^2/(4 m Om^2) of the rf alone, eV; |E| = |F'|. Args: as `rf_potential_v`."""
        zeta = real_array(x_m) + 1j * real_array(y_m)
        field = self.rf_voltage_v / jnp.pi * jnp.abs(_moments(self._edges_for(zeta), zeta, 1))
        return constants.elementary_charge * field**2 / (4 * self.mass_kg * (2 * jnp.pi * self.rf_hz) ** 2)

    def _edges_for(self, points: Array) -> Float[Array, "4 ..."]:
        return broadcast_batch(self._edges, jnp.broadcast_shapes(batch_shape(self), points.shape), 1)

    @property
    def saddle_m(self) -> Float[Array, "2 ..."]:
        """Where ions escape: the zero of F'' above the plane, of which there is one, m, shape (2, *batch).

        F'' = 0 is an equation of fifth order in zeta; three roots are real. From twice the
        null's height Newton's steps reached it for all of 20,000 pairs of strips, 0.003 to 300 times as wide as the
        centre; NaN should they not.
        """
        x, y = self.null_m
        zeta = _critical_point(self._edges, x + 2j * y)
        good = (zeta.imag > y) & (
            jnp.abs(_moments(self._edges, zeta, 2)) < 1e-9 * jnp.abs(_moments(self._edges, zeta, 3)) * y
        )
        return jnp.where(good, jnp.stack([zeta.real, zeta.imag]), jnp.nan)

    @property
    def depth_ev(self) -> Float[Array, "..."]:
        """Pseudopotential of the rf at the saddle, eV (0 at the null). Static fields, not modelled there, lower it."""
        depth = self.pseudopotential_ev(*self.saddle_m)
        return jnp.where(self.stable, depth, jnp.nan)


def _moments(edges: Array, zeta: Array, power: int) -> Array:
    """Sum of s_k/(zeta - e_k)^power."""
    inverse = 1 / (zeta - edges) ** power
    return -inverse[0] + inverse[1] - inverse[2] + inverse[3]


@jax.jit
def _critical_point(edges: Array, start: Array) -> Array:
    """The zero of F'' that Newton's steps reach from `start`."""

    def newton(zeta):
        return zeta + _moments(edges, zeta, 2) / (2 * _moments(edges, zeta, 3))

    zeta = jax.lax.stop_gradient(start)
    zeta = jax.lax.stop_gradient(jax.lax.fori_loop(0, _NEWTON_STEPS, lambda _, zeta: newton(zeta), zeta))
    # Two more bring first and second derivatives.
    return newton(newton(zeta))

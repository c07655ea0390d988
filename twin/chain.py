"""Linear chains of trapped ions: normal modes in all three directions, where they are stable, and how light sees them.

Ions at rest at z_i on the axis of a linear Paul trap (`twin.equilibrium`) move by small q_i along x, y or z, and

    V = 1/2 sum_d sum_ij K^d_ij q_i q_j,
    K^z = diag(k_z + 12 e c4 z_i^2) + A,
    K^x = diag(k_rf,x m_ref/m_i + k_static,x - 6 e c4 z_i^2) - A/2,   and likewise y,

with A the second derivatives of the Coulomb energy along the axis (minus half of them across it). The radiofrequency's
pseudopotential is stiffer for light ions, static potentials push every ion alike; k_static,x + k_static,y = -k_z by
Laplace's equation, and c4 brings with it c4 (z^4 - 3 z^2 r^2 + 3 r^4/8). A mode m has the frequency omega_m and the
participation b_im, the orthonormal eigenvectors of K_ij/sqrt(m_i m_j), so that q_i = b_im Q_m/sqrt(m_i).
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float
from scipy import constants

from twin.batching import check_positive, check_values, is_traced, physical, real_array
from twin.equilibrium import COULOMB_N_M2, Equilibrium, axial_spring_n_per_m, coulomb_stiffness, equilibrium
from twin.ion import YB171

DIRECTIONS = ("x", "y", "z")
# Eigenvalues below this share of their direction's largest are rounding, and gaps between them are no gaps.
_ROUNDING = 1e-12


class Chain(eqx.Module):
    """Singly charged ions in a row in a linear Paul trap, named from low z to high z.

    Args:
        ions: N, static.
        secular_hz: (3,), secular frequencies along x, y and z (the axis) of one ion of `reference_kg` at the centre,
            Hz. A negative one along z stands for a potential that pushes away from the centre with that magnitude.
        masses_kg: (N,), kg; None for N ions of `reference_kg`.
        quartic_v_per_m4: c4 of the axial potential c4 z^4, V/m^4.
        static_x_n_per_m: k_static,x, N/m; None for half of -k_z. y gets the rest. Matters for other masses only.
        reference_kg: mass that `secular_hz` is said of, kg; 171Yb+ by default.

    Example:
        modes = Chain(5, (3e6, 2.8e6, 1e6)).modes().check()
        eta = modes.lamb_dicke(wavenumber_rad_m=1.44e7, direction=(0.0, 0.0, 1.0))  # (5 ions, 15 modes)
    """

    ions: int = eqx.field(static=True)
    secular_hz: Float[Array, "..."] = physical(1)
    masses_kg: Float[Array, "..."] | None = physical(1, default=None)
    quartic_v_per_m4: Float[Array, "..."] = physical(default=0.0)
    static_x_n_per_m: Float[Array, "..."] | None = physical(default=None)
    reference_kg: Float[Array, "..."] = physical(default=YB171.mass_kg)

    def __check_init__(self):
        if not isinstance(self.ions, int) or self.ions < 1:
            raise ValueError(f"`ions` must be a positive integer, but is {self.ions!r}; give the number of ions.")
        if self.secular_hz.shape != (3,):
            raise ValueError(
                f"`secular_hz` must be three numbers, but has shape {self.secular_hz.shape}; give them along x, y, z."
            )
        if self.masses_kg is not None and self.masses_kg.shape != (self.ions,):
            raise ValueError(
                f"`masses_kg` must be one number for each of the {self.ions} ions, but has shape "
                f"{self.masses_kg.shape}; give them from low z to high z, or None for equal ions."
            )
        if is_traced(self):
            return
        check_positive("secular_hz[:2]", self.secular_hz[:2], "Hz")
        if self.quartic_v_per_m4 > 0:
            check_values("secular_hz[2]", self.secular_hz[2], np.isfinite, "finite", "give it in Hz")
        else:
            check_values(
                "secular_hz[2]",
                self.secular_hz[2],
                lambda v: v > 0,
                "positive and finite where no positive `quartic_v_per_m4` confines the ions",
                "give it in Hz",
            )
        check_values("quartic_v_per_m4", self.quartic_v_per_m4, np.isfinite, "finite", "give it in V/m^4")
        check_values("static_x_n_per_m", self.static_x_n_per_m, np.isfinite, "finite", "give it in N/m")
        check_positive("masses_kg", self.masses_kg, "kg")
        check_positive("reference_kg", self.reference_kg, "kg")

    def equilibrium(self) -> Equilibrium:
        """Positions on the axis; they do not depend on the masses."""
        return equilibrium(
            self.ions,
            axial_hz=self.secular_hz[2],
            quartic_v_per_m4=self.quartic_v_per_m4,
            reference_kg=self.reference_kg,
        )

    def modes(self) -> "Modes":
        """Normal modes about the equilibrium. Compiled once for each number of ions."""
        return _modes(self)

    def mass_of_each_kg(self) -> Float[Array, " ions"]:
        """Masses from low z to high z, kg."""
        return jnp.broadcast_to(self.reference_kg if self.masses_kg is None else self.masses_kg, (self.ions,))


class Modes(eqx.Module):
    """The 3N normal modes of a chain: those along x, then y, then z, each by rising frequency.

    Frequencies have the right derivatives also where modes are degenerate (of each single one, where a parameter does
    not mix them; of their sum, always). Participations have them where modes are apart; within a degenerate set they
    are one choice of many, and their derivative leaves out the turn within the set. Of a batch made by `jax.vmap`, ask
    for properties inside it: they are those of one chain.

    Args:
        chain: what was solved.
        equilibrium: its ions at rest.
        squares_hz2: (3N,), squared frequencies, Hz^2; negative along a direction in which the chain is not stable.
        vectors: (N ions, 3N modes), participation b_im, orthonormal within a direction. The first ion with at least
            half of the largest |b_im| of a mode moves towards positive coordinates: all ions in a centre-of-mass mode.
    """

    chain: Chain
    equilibrium: Equilibrium
    squares_hz2: Float[Array, " modes"]
    vectors: Float[Array, "ions modes"]

    @property
    def directions(self) -> np.ndarray:
        """(3N,), 0, 1 or 2 for a mode along x, y or z."""
        return np.repeat(np.arange(3), self.chain.ions)

    @property
    def direction_is_stable(self) -> Bool[Array, "3"]:
        """(3,), whether all modes along x, y and z oscillate; false where no equilibrium was found."""
        return jnp.all(self._oscillates.reshape(3, -1), axis=1)

    @property
    def linear_is_stable(self) -> Bool[Array, ""]:
        """Whether the straight chain is an equilibrium, and a stable one in every direction."""
        return self.equilibrium.converged & jnp.all(self.direction_is_stable)

    @property
    def frequencies_hz(self) -> Float[Array, " modes"]:
        """(3N,), Hz; NaN for a mode that does not oscillate."""
        good = self._oscillates
        return jnp.where(good, jnp.sqrt(jnp.where(good, self.squares_hz2, 1.0)), jnp.nan)

    @property
    def _oscillates(self) -> Bool[Array, " modes"]:
        squares = self.squares_hz2.reshape(3, -1)
        # A comparison with NaN is false.
        return (squares > _ROUNDING * jnp.max(jnp.abs(squares), axis=1, keepdims=True)).ravel()

    def lamb_dicke(
        self, wavenumber_rad_m: ArrayLike, direction: ArrayLike | Sequence[float]
    ) -> Float[Array, "ions modes"]:
        """Lamb-Dicke parameters eta_im = k (n . e_m) b_im sqrt(hbar/(2 m_i omega_m)), with the sign of b_im.

        Args:
            wavenumber_rad_m: k of the light, or of the difference of two beams, rad/m.
            direction: (3,), along k; of any length but zero.

        Returns:
            (N ions, 3N modes); NaN for modes that do not oscillate.

        Raises:
            ValueError: `direction` is zero, not finite, or not three numbers.

        References:
            [1] D. F. V. James, Appl. Phys. B 66, 181 (1998), Eqs. 22-31, which leave out the sign and the masses.
        """
        n = real_array(direction)
        if n.shape != (3,):
            raise ValueError(
                f"`direction` must be three numbers, but has shape {n.shape}; give those along x, y and z."
            )
        length = jnp.linalg.norm(n)
        if not is_traced(length) and not (length > 0 and jnp.isfinite(length)):
            raise ValueError(f"`direction` must be finite and not zero, but is {n}; give a vector along the light's k.")
        along = real_array(wavenumber_rad_m) * (n / length)[self.directions]
        angular = 2 * jnp.pi * self.frequencies_hz
        sizes_m = jnp.sqrt(constants.hbar / (2 * self.chain.mass_of_each_kg()[:, None] * angular))
        return along * self.vectors * sizes_m

    def heating_shares(self) -> Float[Array, " modes"]:
        """How a field that is the same for all ions heats each mode, |sum_i b_im sqrt(m_ref/m_i)|^2.

        A mode gains share e^2 S_E(omega_m)/(4 m_ref hbar omega_m) phonons a second from a field along its direction
        with the single-sided spectral density S_E. For equal masses in a harmonic trap: N in the centre-of-mass modes,
        and nothing elsewhere. NaN for modes that do not oscillate.
        """
        chain = self.chain
        shares = (jnp.sqrt(chain.reference_kg / chain.mass_of_each_kg()) @ self.vectors) ** 2
        return jnp.where(self._oscillates, shares, jnp.nan)

    def check(self) -> "Modes":
        """The same modes, where they are those of a stable chain. Under a transformation of JAX it looks at nothing.

        Raises:
            ValueError: no equilibrium was found, or the straight chain is not stable there.
        """
        if is_traced(self):
            return self
        chain, squares = self.chain, self.squares_hz2.reshape(3, -1)
        if not self.equilibrium.converged:
            raise ValueError(
                f"no equilibrium of {chain.ions} ions was found: a force of {float(self.equilibrium.residual):.3g} is "
                "left on an ion (in units of the Coulomb force at the trap's length); raise `secular_hz[2]` or "
                "`quartic_v_per_m4`, as the axial potential does not hold this chain, or holds it on the brink."
            )
        stable = np.asarray(self.direction_is_stable)
        if not stable[2]:
            raise ValueError(
                f"a chain at rest with {chain.ions} ion(s) is not stable along z: a mode has the squared frequency "
                f"{float(squares[2].min()):.6g} Hz^2; raise `secular_hz[2]`, or take another number of ions, so that "
                "none sits on top of a barrier."
            )
        for axis in np.flatnonzero(~stable):
            # A higher k_rf lifts every squared frequency by at least what it lifts that of the heaviest ion alone.
            heaviest = float(jnp.max(chain.mass_of_each_kg()) / chain.reference_kg)
            secular, lowest = float(chain.secular_hz[axis]), float(squares[axis].min())
            enough = (secular**2 + abs(lowest) * heaviest**2) ** 0.5
            raise ValueError(
                f"the straight chain of {chain.ions} ions is not stable along {DIRECTIONS[axis]} (zigzag): a mode has "
                f"the squared frequency {lowest:.6g} Hz^2; raise `secular_hz[{axis}]` from {secular:.6g} Hz above "
                f"{enough:.6g} Hz, weaken the axial potential, or take fewer ions."
            )
        return self


@eqx.filter_jit
def zigzag_ratio(ions: int) -> Float[Array, ""]:
    """Ratio of transverse to axial secular frequency below which a harmonic chain of equal ions buckles.

    sqrt((mu_N - 1)/2), with mu_N the square of the highest axial mode over that of the centre of mass; 0 for one ion.
    """
    unit = (COULOMB_N_M2 / axial_spring_n_per_m(1e6, YB171.mass_kg)) ** (1 / 3)
    u = equilibrium(ions, axial_hz=1e6).positions_m / unit
    # Rounding must not make the one ion's zero negative.
    return jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(coulomb_stiffness(u))[-1], 0.0) / 2)


@eqx.filter_jit
def _modes(chain: Chain) -> Modes:
    rest = chain.equilibrium()
    masses, z = chain.mass_of_each_kg(), rest.positions_m
    spring_z = axial_spring_n_per_m(chain.secular_hz[2], chain.reference_kg)
    static_x = -spring_z / 2 if chain.static_x_n_per_m is None else chain.static_x_n_per_m
    static = jnp.stack([static_x, -spring_z - static_x])
    pseudo = chain.reference_kg * (2 * jnp.pi * chain.secular_hz[:2]) ** 2 - static
    bend = 6 * constants.e * chain.quartic_v_per_m4 * z**2
    across = pseudo[:, None] * chain.reference_kg / masses + static[:, None] - bend
    coulomb = COULOMB_N_M2 * coulomb_stiffness(z)
    roots = jnp.sqrt(masses)
    squares, vectors = [], []
    for springs, share in ((across[0], -0.5), (across[1], -0.5), (spring_z + 2 * bend, 1.0)):
        stiffness = jnp.diag(springs) + share * coulomb
        values, columns = _eigenmodes(stiffness / (roots[:, None] * roots))
        squares.append(values / (4 * jnp.pi**2))
        vectors.append(columns)
    return Modes(chain, rest, jnp.concatenate(squares), jnp.concatenate(vectors, axis=1))


@jax.custom_jvp
def _eigenmodes(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, rising, and eigenvectors with the sign that `Modes` states."""
    values, vectors = jnp.linalg.eigh(matrix)
    sizes = jnp.abs(vectors)
    first = jnp.argmax(sizes >= 0.5 * jnp.max(sizes, axis=0), axis=0)
    return values, vectors * jnp.sign(jnp.take_along_axis(vectors, first[None], axis=0))


@_eigenmodes.defjvp
def _eigenmodes_jvp(primals, tangents):
    """First-order perturbation theory; nothing for pairs closer than rounding, where JAX's own rule divides by 0."""
    (matrix,), (change,) = primals, tangents
    values, vectors = _eigenmodes(matrix)
    coupling = vectors.T @ change @ vectors
    gaps = values[None, :] - values[:, None]
    apart = jnp.abs(gaps) > _ROUNDING * jnp.max(jnp.abs(values))
    mixing = jnp.where(apart, coupling / jnp.where(apart, gaps, 1.0), 0.0)
    return (values, vectors), (jnp.diag(coupling), vectors @ mixing)

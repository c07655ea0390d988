"""Where ions sit on the axis of a linear trap: equilibrium of Coulomb chains, with implicit derivatives.

N ions of one elementary charge in the axial potential energy

    U(z) = k z^2/2 + e c4 z^4,        k = m_ref (2 pi f_z)^2  (static: the same spring for every mass)

repel each other by C/|z_i - z_j|, C = e^2/(4 pi eps0). In a unit of length L, u = z/L, the force on ion i in C/L^2 is

    F_i = -kappa u_i - Q u_i^3 + sum_j (u_i - u_j)/|u_i - u_j|^3,    kappa = k L^3/C,   Q = 4 e c4 L^5/C.

For kappa, Q >= 0 the energy of an ordered chain is strictly convex, so there is one equilibrium. With a negative kappa
(double well) or Q there may be several, or none; which one was found is for the modes of `twin.chain` to judge.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float
from scipy import constants

from twin.batching import real_array
from twin.ion import YB171

COULOMB_N_M2 = constants.e**2 / (4 * np.pi * constants.epsilon_0)
# Largest force left on an ion, in C/L^2, at which a chain counts as found.
LARGEST_RESIDUAL = 1e-10
_MOST_STEPS = 60


class Equilibrium(eqx.Module):
    """Ions at rest on the axis.

    Args:
        positions_m: ascending, m; NaN where no equilibrium was found.
        residual: largest force left on an ion, in units of C/L^2 with L the shorter of the harmonic length
            (C/|k|)^(1/3) and the quartic length (C/|4 e c4|)^(1/5).
        converged: residual below `LARGEST_RESIDUAL` and ions in order. Says nothing on stability. Rounding alone leaves
            6e-12 on 300 ions in a harmonic well and 5e-11 in a quartic one, and too much on 400 there.
        steps: of Newton's method.
    """

    positions_m: Float[Array, " ions"]
    residual: Float[Array, ""]
    converged: Bool[Array, ""]
    steps: Array

    @property
    def spacing_m(self) -> Float[Array, ""]:
        """Smallest distance of two ions, m; infinite for one ion."""
        return jnp.min(jnp.diff(self.positions_m), initial=jnp.inf)


def equilibrium(
    ions: int,
    *,
    axial_hz: ArrayLike,
    quartic_v_per_m4: ArrayLike = 0.0,
    reference_kg: ArrayLike = YB171.mass_kg,
) -> Equilibrium:
    """Equilibrium positions of a chain, by a damped Newton method from the continuum's density.

    Derivatives are implicit: one more linear solve with the chain's stiffness, whatever the number of steps was. New
    values for the same `ions` do not compile again; `jax.vmap` makes batches.

    Args:
        ions: N, static.
        axial_hz: axial secular frequency f_z of an ion of `reference_kg`, Hz; negative for an axial force that pushes
            away from the centre with that |f_z| (double well).
        quartic_v_per_m4: c4, V/m^4. A negative one is a finite well, where the chain may not exist.
        reference_kg: mass that `axial_hz` is said of, kg; 171Yb+ by default.

    Returns:
        `Equilibrium`; NaN and `converged` false where none was found.

    Raises:
        ValueError: `ions` is not a positive integer.

    Example:
        equilibrium(2, axial_hz=1e6).spacing_m  # 3.45316e-06

    References:
        [1] D. F. V. James, Appl. Phys. B 66, 181 (1998), Eqs. 3-5 and Table 1.
    """
    if not isinstance(ions, int) or ions < 1:
        raise ValueError(f"`ions` must be a positive integer, but is {ions!r}; give the number of ions of the chain.")
    spring = axial_spring_n_per_m(axial_hz, reference_kg)
    return _equilibrium(ions, spring, 4 * constants.e * real_array(quartic_v_per_m4))


@eqx.filter_jit
def _equilibrium(ions: int, spring: Array, cubic: Array) -> Equilibrium:
    """The chain in k z + 4 e c4 z^3, in numbers of order one."""
    # The unit of length carries no derivative: results do not depend on it, and its own diverges at c4 = 0.
    inverse = jnp.maximum((jnp.abs(spring) / COULOMB_N_M2) ** (1 / 3), (jnp.abs(cubic) / COULOMB_N_M2) ** 0.2)
    unit = jax.lax.stop_gradient(1 / inverse)
    potential = spring * unit**3 / COULOMB_N_M2, cubic * unit**5 / COULOMB_N_M2
    solution = optx.root_find(
        lambda u, args: _pull(u, *args),
        _DampedNewton(rtol=1e-8, atol=1e-8),
        jax.lax.stop_gradient(_guess(ions, *potential)),
        potential,
        max_steps=_MOST_STEPS,
        adjoint=optx.ImplicitAdjoint(linear_solver=lx.Cholesky()),
        throw=False,
        tags=frozenset({lx.positive_semidefinite_tag}),
    )
    u = solution.value
    residual = jnp.max(jnp.abs(_pull(u, *potential)))
    # A comparison with NaN is false.
    converged = (residual < LARGEST_RESIDUAL) & jnp.all(jnp.diff(u) > 0)
    return Equilibrium(jnp.where(converged, u * unit, jnp.nan), residual, converged, solution.stats["num_steps"])


def axial_spring_n_per_m(axial_hz: ArrayLike, mass_kg: ArrayLike) -> Float[Array, "..."]:
    """Spring constant k = +-m (2 pi f_z)^2 in N/m, with the sign of `axial_hz`."""
    axial = real_array(axial_hz)
    return real_array(mass_kg) * (2 * jnp.pi) ** 2 * axial * jnp.abs(axial)


def coulomb_stiffness(u: Float[Array, " ions"]) -> Float[Array, "ions ions"]:
    """Second derivatives of sum_{i<j} 1/|u_i - u_j|: row i has -2/|u_i - u_j|^3 at j and minus their sum at i."""
    weights = 2 * _inverse_cubes(u)
    return jnp.diag(jnp.sum(weights, axis=1)) - weights


def _inverse_cubes(u: Array) -> Array:
    itself = jnp.eye(u.size, dtype=bool)
    return jnp.where(itself, 0.0, 1 / jnp.abs(jnp.where(itself, 1.0, u[:, None] - u[None, :])) ** 3)


@jax.custom_jvp
def _pull(u: Array, kappa: Array, quartic: Array) -> Array:
    """Gradient of the energy, -F_i. Its Jacobian is written out, so that N tangents cost one matrix, not N^3 pairs."""
    return kappa * u + quartic * u**3 - jnp.sum((u[:, None] - u[None, :]) * _inverse_cubes(u), axis=1)


@_pull.defjvp
def _pull_jvp(primals, tangents):
    (u, kappa, quartic), (du, dkappa, dquartic) = primals, tangents
    stiffness = coulomb_stiffness(u) + jnp.diag(_curvature(u, kappa, quartic))
    return _pull(u, kappa, quartic), stiffness @ du + dkappa * u + dquartic * u**3


def _curvature(u: Array, kappa: Array, quartic: Array) -> Array:
    return kappa + 3 * quartic * u**2


def _guess(ions: int, kappa: Array, quartic: Array) -> Array:
    """Quantiles of the density of a long chain, stretched to where the virial of their forces vanishes.

    To leading order in log N the density is proportional to U(edge) - U(u) [D. H. E. Dubin, Phys. Rev. E 55, 4017
    (1997)]; the parabola's is taken for every potential.
    """
    share = (2 * np.arange(ions) + 1 - ions) / ions
    shape = 2 * np.sin(np.arcsin(share) / 3)  # 3 s/2 - s^3/2 = share
    first, second = np.triu_indices(ions, 1)
    repulsion = np.sum(1 / (shape[second] - shape[first]))
    # kappa A a^3 + Q B a^5 = repulsion, from above, where Newton's method goes down to the root and never past it.
    a_kappa, b_quartic = kappa * np.sum(shape**2), jnp.maximum(quartic, 0.0) * np.sum(shape**4)
    harmonic = (repulsion / jnp.where(a_kappa > 0, a_kappa, 1.0)) ** (1 / 3)
    soft = jnp.where(b_quartic > 0, b_quartic, 1.0)
    anharmonic = (repulsion / soft) ** 0.2 + jnp.sqrt(jnp.maximum(-a_kappa, 0.0) / soft)
    bound = jnp.minimum(jnp.where(a_kappa > 0, harmonic, jnp.inf), jnp.where(b_quartic > 0, anharmonic, jnp.inf))

    def newton(_, a):
        value = a_kappa * a**3 + b_quartic * a**5 - repulsion
        return a - value / (3 * a_kappa * a**2 + 5 * b_quartic * a**4)

    scale = jax.lax.fori_loop(0, 12, newton, bound) if ions > 1 else jnp.ones_like(bound)
    return scale * shape


class _NewtonState(eqx.Module):
    change: Array
    result: optx.RESULTS


class _DampedNewton(optx.AbstractRootFinder):
    """Newton steps, cut so that no gap between neighbours loses more than a share of its length.

    Where the stiffness is not positive (away from the equilibrium of a double well) it is shifted until it is. Ends
    after a step that changes no gap by more than `rtol`; the error after it is of the order of its square.
    """

    rtol: float
    atol: float
    norm: Callable = optx.max_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        return _NewtonState(jnp.full((), jnp.inf, y.dtype), optx.RESULTS.successful)

    def step(self, fn, y, args, options: dict[str, Any], state, tags):
        pull, aux = fn(y, args)
        stiffness = lx.JacobianLinearOperator(lambda u, a: fn(u, a)[0], y, args, tags=tags).as_matrix()
        newton = self._solve(stiffness, pull, tags)
        shift = jnp.maximum(-2 * jnp.min(_curvature(y, *args)), 0.0)
        move = jax.lax.cond(
            jnp.all(jnp.isfinite(newton)),
            lambda: newton,
            lambda: self._solve(stiffness + shift * jnp.eye(y.size), pull, tags),
        )
        # A single ion without a spring already rests.
        move = jnp.where(jnp.all(pull == 0), 0.0, move)
        change = jnp.diff(move) / jnp.diff(y)
        # A single ion has no gap; its step is measured by the unit of length.
        size = jnp.max(jnp.abs(change)) if y.size > 1 else jnp.abs(move[0])
        shrinks = jnp.max(change, initial=0.0)
        kept = jnp.minimum(1.0, 0.7 / jnp.maximum(shrinks, 0.7))
        return y - kept * move, _NewtonState(size, optx.RESULTS.successful), aux

    def _solve(self, matrix, vector, tags):
        return lx.linear_solve(lx.MatrixLinearOperator(matrix, tags), vector, lx.Cholesky(), throw=False).value

    def terminate(self, fn, y, args, options, state, tags):
        return state.change < self.rtol, state.result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return y, aux, {}

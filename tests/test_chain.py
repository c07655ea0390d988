"""Chains of ions: James's numbers, exact relations, SciPy, the full potential's Hessian, finite differences."""

import math
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import constants, optimize

from twin import equilibrium as equilibrium_module
from twin.chain import Chain, _eigenmodes, zigzag_ratio
from twin.equilibrium import COULOMB_N_M2, coulomb_stiffness, equilibrium
from twin.ion import YB171

MASS = YB171.mass_kg
LENGTH = (COULOMB_N_M2 / (MASS * (2 * math.pi * 1e6) ** 2)) ** (1 / 3)
# A quartic that is as strong as 1 MHz one length off the centre.
QUARTIC = MASS * (2 * math.pi * 1e6) ** 2 / (4 * constants.e * LENGTH**2)
# Right halves in units of the length, ascending; squared axial frequencies. James 1998, Table 1, with more digits.
POSITIONS = {
    2: [0.629961],
    3: [1.077217],
    4: [0.454379, 1.436802],
    5: [0.822101, 1.742903],
    6: [0.369921, 1.136125, 2.012275],
    7: [0.686943, 1.412917, 2.254544],
    8: [0.318021, 0.967008, 1.662062, 2.475820],
    10: [0.282104, 0.853779, 1.450381, 2.100031, 2.870825],
}
SQUARES = {
    2: [1, 3],
    3: [1, 3, 5.8],
    4: [1, 3, 5.80994, 9.30835],
    5: [1, 3, 5.81770, 9.33215, 13.47484],
    6: [1, 3, 5.82400, 9.35193, 13.51388, 18.26571],
    7: [1, 3, 5.82927, 9.36875, 13.54753, 18.32057, 23.65583],
    8: [1, 3, 5.83377, 9.38334, 13.57703, 18.36900, 23.72678, 29.62538],
    10: [1, 3, 5.84113, 9.40761, 13.62673, 18.45140, 23.84827, 29.79186, 36.26162, 43.24051],
}


def potential(q, chain):
    """Energy in J of ions at q (3, N)."""
    (x, y, z), heavier = q, chain.mass_of_each_kg() / chain.reference_kg
    x_hz, y_hz, z_hz = chain.secular_hz
    spring = lambda f: chain.reference_kg * (2 * math.pi) ** 2 * f * jnp.abs(f)
    k_z, r2 = spring(z_hz), x**2 + y**2
    static_x = -k_z / 2 if chain.static_x_n_per_m is None else chain.static_x_n_per_m
    static_y = -k_z - static_x
    across = ((spring(x_hz) - static_x) * x**2 + (spring(y_hz) - static_y) * y**2) / heavier
    trap = across + static_x * x**2 + static_y * y**2 + k_z * z**2
    quartic = constants.e * chain.quartic_v_per_m4 * (z**4 - 3 * z**2 * r2 + 3 * r2**2 / 8)
    first, second = np.triu_indices(chain.ions, 1)
    distances = jnp.sqrt(jnp.sum((q[:, first] - q[:, second]) ** 2, axis=0))
    return jnp.sum(trap / 2 + quartic) + jnp.sum(COULOMB_N_M2 / distances)


# ------------------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("ions", POSITIONS)
def test_james_positions_and_modes(ions):
    modes = Chain(ions, (40e6, 50e6, 1e6)).modes()
    u = np.asarray(modes.equilibrium.positions_m) / LENGTH
    right = POSITIONS[ions]
    expected = [-v for v in reversed(right)] + [0.0] * (ions % 2) + right
    np.testing.assert_allclose(u, expected, atol=1e-6)
    np.testing.assert_allclose(modes.squares_hz2[2 * ions :] / 1e12, SQUARES[ions], rtol=2e-6)
    assert modes.linear_is_stable


def test_two_and_three_ions_exactly():
    # (e^2 / (4 pi eps0 m omega^2))^(1/3) at 1 MHz; spacings of two and three ions are cube roots of it.
    assert pytest.approx(2.740775e-6, rel=2e-7) == LENGTH
    pair, triple = (equilibrium(n, axial_hz=1e6) for n in (2, 3))
    assert pair.spacing_m == pytest.approx(3.45316e-6, rel=2e-6)
    assert pair.positions_m[1] / LENGTH == pytest.approx(0.25 ** (1 / 3), rel=1e-14)
    assert triple.positions_m[2] / LENGTH == pytest.approx(1.25 ** (1 / 3), rel=1e-14)
    assert equilibrium(1, axial_hz=1e6).spacing_m == math.inf
    # In z^4 alone, 4 e c4 z^3 = C/(2 z)^2.
    pair = equilibrium(2, axial_hz=0.0, quartic_v_per_m4=QUARTIC)
    exact = (COULOMB_N_M2 / (16 * constants.e * QUARTIC)) ** 0.2
    assert pair.positions_m[1] == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize(
    ("ions", "axial_hz", "quartic"), [(3, 0.0, 1.0), (12, 0.0, 1.0), (9, 1e6, 0.05), (10, -5e5, 0.3), (8, 1e6, -1e-3)]
)
def test_positions_against_scipy(ions, axial_hz, quartic):
    kappa = axial_hz * abs(axial_hz) / 1e12

    def energy(u):
        pairs = sum(1 / abs(u[i] - u[j]) for i in range(ions) for j in range(i))
        return np.sum(kappa * u**2 / 2 + quartic * u**4 / 4) + pairs

    def force(u):
        apart = u[:, None] - u + np.eye(ions)
        return kappa * u + quartic * u**3 - np.sum(np.sign(apart) / apart**2 * (1 - np.eye(ions)), axis=1)

    start = np.linspace(-1, 1, ions) * (1.5 if quartic > 0.02 else 2.2)
    best = optimize.minimize(energy, start, jac=force, method="BFGS", options={"gtol": 1e-6, "maxiter": 500}).x
    expected = optimize.root(force, best, tol=1e-13).x
    found = equilibrium(ions, axial_hz=axial_hz, quartic_v_per_m4=quartic * QUARTIC)
    assert found.converged
    np.testing.assert_allclose(found.positions_m / LENGTH, np.sort(expected), atol=1e-9)


@pytest.mark.parametrize(("axial_hz", "quartic"), [(1e6, 0.0), (0.0, 1.0), (1e6, 0.01), (-1e6, 1.0)])
def test_every_length_of_chain_is_found_in_a_few_steps(axial_hz, quartic):
    for ions in (1, 17, 300):
        found = equilibrium(ions, axial_hz=axial_hz, quartic_v_per_m4=quartic * QUARTIC)
        assert found.converged and found.residual < 1e-10, ions
        assert found.steps <= 8, ions
        assert jnp.all(jnp.diff(found.positions_m) > 0)


def test_the_residual_is_the_force_on_an_ion():
    found = equilibrium(30, axial_hz=1e6)
    chain = Chain(30, (30e6, 30e6, 1e6))
    on_axis = lambda z: potential(jnp.stack([0 * z, 0 * z, z]), chain)
    force = jax.grad(on_axis)(found.positions_m) * LENGTH**2 / COULOMB_N_M2
    assert np.max(np.abs(force)) < 2e-12
    off = found.positions_m.at[3].add(1e-3 * LENGTH)
    assert np.max(np.abs(jax.grad(on_axis)(off))) * LENGTH**2 / COULOMB_N_M2 > 1e-3


@pytest.mark.parametrize("ions", [1, 2, 3, 33, 300])
def test_centre_of_mass_and_breathing_mode(ions):
    frequencies = Chain(ions, (3e8, 2e8, 1e6)).modes().frequencies_hz.reshape(3, ions)
    assert frequencies[2, 0] == pytest.approx(1e6, rel=1e-10)
    assert frequencies[0, -1] == pytest.approx(3e8, rel=1e-12)
    assert frequencies[1, -1] == pytest.approx(2e8, rel=1e-12)
    if ions > 1:
        assert frequencies[2, 1] == pytest.approx(math.sqrt(3) * 1e6, rel=1e-10)


def test_three_hundred_ions_are_fast():
    solve = lambda f: jax.block_until_ready(Chain(300, (1.1e8, 1.2e8, f)).modes())
    solve(1e6)
    seconds = []
    for f in (1.01e6, 1.02e6, 1.03e6):
        start = time.perf_counter()
        modes = solve(f)
        seconds.append(time.perf_counter() - start)
    # The best of three, as other work may share the cores.
    assert min(seconds) < 2
    assert modes.linear_is_stable and modes.equilibrium.residual < 1e-10


def test_new_values_do_not_compile_again():
    traces = []

    @eqx.filter_jit
    def lowest(chain):
        traces.append(None)
        return chain.modes().frequencies_hz[0]

    values = [
        lowest(Chain(4, (f, 5e6, 1e6), quartic_v_per_m4=c4, masses_kg=[m] * 4))
        for f, c4, m in ((6e6, 0.0, 1e-25), (7e6, 1e14, 2e-25), (8e6, 2e14, 3e-25))
    ]
    assert len(traces) == 1 and len(set(map(float, values))) == 3
    jax.block_until_ready(equilibrium(6, axial_hz=1e6))
    before = equilibrium_module._equilibrium._cached._cache_size()
    for f in (1.1e6, 0.7e6):
        equilibrium(6, axial_hz=f, quartic_v_per_m4=f)
    assert equilibrium_module._equilibrium._cached._cache_size() == before


# ------------------------------------------------------------------------------------------------ modes


CALCIUM = 40 * constants.atomic_mass
MIXED = {
    "equal": Chain(4, (4e6, 5e6, 1e6)),
    "mixed": Chain(4, (4e6, 5e6, 1e6), masses_kg=[MASS, CALCIUM, MASS, 1.1 * MASS]),
    "quartic": Chain(
        5, (5e6, 4.5e6, 0.0), masses_kg=[CALCIUM, MASS, MASS, CALCIUM, MASS], quartic_v_per_m4=QUARTIC / 3
    ),
    "split": Chain(3, (4e6, 4.5e6, 1e6), masses_kg=[MASS, 0.5 * MASS, MASS], static_x_n_per_m=-9.0e-12),
    "double well": Chain(4, (5e6, 4.5e6, -1e6), quartic_v_per_m4=QUARTIC),
    "buckled": Chain(6, (4e6, 2e6, 1e6), masses_kg=[MASS, CALCIUM, MASS, MASS, MASS, MASS]),
}


@pytest.mark.parametrize("name", MIXED)
def test_modes_against_the_hessian_of_the_full_potential(name):
    chain = MIXED[name]
    n, modes = chain.ions, chain.modes()
    rest = jnp.stack([jnp.zeros(n), jnp.zeros(n), modes.equilibrium.positions_m])
    stiffness = jax.jit(jax.hessian(lambda q: potential(q.reshape(3, n), chain)))(rest.ravel())
    roots = np.sqrt(np.tile(chain.mass_of_each_kg(), 3))
    dynamical = np.asarray(stiffness) / np.outer(roots, roots)
    squares = np.linalg.eigvalsh(dynamical) / (4 * math.pi**2)
    np.testing.assert_allclose(np.sort(modes.squares_hz2), squares, rtol=1e-9, atol=1e3)
    # Each mode's vector, put into its direction, is an eigenvector of all 3N coordinates.
    for m, direction in enumerate(modes.directions):
        full = np.zeros((3, n))
        full[direction] = modes.vectors[:, m]
        image = dynamical @ full.ravel() / (4 * math.pi**2)
        np.testing.assert_allclose(image, modes.squares_hz2[m] * full.ravel(), atol=1e-9 * squares.max())
    assert bool(modes.linear_is_stable) == (squares.min() > 0) == (name != "buckled")


def test_transverse_frequencies_follow_from_the_axial_ones():
    modes = Chain(10, (6e6, 5e6, 1e6)).modes()
    x, y, z = np.asarray(modes.squares_hz2).reshape(3, 10)
    np.testing.assert_allclose(x[::-1], 36e12 - (z - 1e12) / 2, rtol=1e-12)
    np.testing.assert_allclose(y[::-1], 25e12 - (z - 1e12) / 2, rtol=1e-12)
    np.testing.assert_array_equal(modes.directions, [0] * 10 + [1] * 10 + [2] * 10)


def test_vectors_are_orthonormal_and_their_sign_is_fixed():
    for chain in MIXED.values():
        modes, n = chain.modes(), chain.ions
        vectors = np.asarray(modes.vectors)
        for block in np.split(vectors, 3, axis=1):
            np.testing.assert_allclose(block.T @ block, np.eye(n), atol=1e-13)
        for column in vectors.T:
            assert column[np.flatnonzero(np.abs(column) >= 0.5 * np.abs(column).max())[0]] > 0
    np.testing.assert_allclose(MIXED["equal"].modes().vectors[:, [3, 7, 8]], 0.5, atol=1e-12)
    np.testing.assert_allclose(Chain(2, (4e6, 5e6, 1e6)).modes().vectors[:, 5], [0.5**0.5, -(0.5**0.5)], atol=1e-12)


def test_two_ions_of_different_mass():
    # Axial modes of masses m and mu m in one static spring: omega^2 = omega_z^2 (1 + 1/mu -+ sqrt(1 + 1/mu^2 - 1/mu)).
    mu = 40 / 171
    modes = Chain(2, (40e6, 50e6, 1e6), masses_kg=[MASS, mu * MASS]).modes()
    root = math.sqrt(1 + 1 / mu**2 - 1 / mu)
    exact = [1 + 1 / mu - root, 1 + 1 / mu + root]
    np.testing.assert_allclose(modes.squares_hz2[4:] / 1e12, exact, rtol=1e-12)


# ------------------------------------------------------------------------------------------------ stability


def test_zigzag_ratio():
    # sqrt((mu_N - 1)/2) of the largest axial eigenvalue mu_N; mu_30 = 288.6657.
    assert zigzag_ratio(1) == 0
    assert zigzag_ratio(2) == pytest.approx(1, rel=1e-12)
    assert zigzag_ratio(3) == pytest.approx(math.sqrt(12 / 5), rel=1e-12)
    for ions, ratio in {5: 2.49748, 10: 4.59568}.items():
        assert zigzag_ratio(ions) == pytest.approx(ratio, abs=6e-6)
    assert 2 * zigzag_ratio(30) ** 2 + 1 == pytest.approx(288.6657, rel=2e-7)


@pytest.mark.parametrize("axis", [0, 1])
def test_both_sides_of_the_zigzag_limit(axis):
    limit = float(zigzag_ratio(7)) * 1e6
    for side in (1 + 1e-6, 1 - 1e-6):
        secular = [9e6, 9e6, 1e6]
        secular[axis] = side * limit
        modes = Chain(7, secular).modes()
        stable = side > 1
        assert bool(modes.linear_is_stable) == stable
        expected = [True] * 3
        expected[axis] = stable
        assert modes.direction_is_stable.tolist() == expected
        lost = np.isnan(modes.frequencies_hz)
        assert lost.sum() == (0 if stable else 1) and (stable or modes.directions[lost][0] == axis)
        eta = modes.lamb_dicke(1e7, (1.0, 1.0, 1.0))
        np.testing.assert_array_equal(np.isnan(eta), np.broadcast_to(lost, eta.shape))
        np.testing.assert_array_equal(np.isnan(modes.heating_shares()), lost)
        if stable:
            assert modes.check() is modes
        else:
            with pytest.raises(ValueError, match=rf"not stable along {'xy'[axis]} \(zigzag\).*`secular_hz\[{axis}\]`"):
                modes.check()


@pytest.mark.parametrize("masses", [None, [1.2 * MASS] * 6, [MASS, CALCIUM, MASS, 1.3 * MASS, MASS, MASS]])
def test_the_remedy_of_the_error_is_enough(masses):
    with pytest.raises(ValueError, match="zigzag") as error:
        Chain(6, (1.5e6, 40e6, 1e6), masses_kg=masses).modes().check()
    enough = float(str(error.value).split("above ")[1].split(" Hz")[0])
    Chain(6, (enough * (1 + 1e-5), 40e6, 1e6), masses_kg=masses).modes().check()
    if masses is None:
        # Exact for equal ions.
        assert enough == pytest.approx(float(zigzag_ratio(6)) * 1e6, rel=1e-5)


def test_an_ion_on_a_barrier_is_not_stable():
    modes = Chain(3, (9e6, 9e6, -2e6), quartic_v_per_m4=QUARTIC).modes()
    assert modes.equilibrium.converged and not modes.linear_is_stable
    assert modes.direction_is_stable.tolist() == [True, True, False]
    with pytest.raises(ValueError, match="not stable along z"):
        modes.check()
    # One ion in z^4 alone has no axial frequency.
    flat = Chain(1, (2e6, 3e6, 0.0), quartic_v_per_m4=QUARTIC).modes()
    assert flat.equilibrium.positions_m == 0 and np.isnan(flat.frequencies_hz).tolist() == [False, False, True]


@pytest.mark.parametrize(("axial_hz", "quartic"), [(-1e6, 0.0), (0.0, 0.0), (1e6, -1.0), (math.nan, 0.0)])
def test_no_equilibrium_is_flagged_and_nan(axial_hz, quartic):
    @jax.jit
    def solve(z):
        modes = Chain(4, jnp.stack([5e6, 5e6, z]), quartic_v_per_m4=quartic * QUARTIC).modes()
        return modes, modes.linear_is_stable, modes.frequencies_hz

    modes, stable, frequencies = solve(axial_hz)
    assert not modes.equilibrium.converged and not stable
    assert np.all(np.isnan(modes.equilibrium.positions_m)) and np.all(np.isnan(frequencies))
    with pytest.raises(ValueError, match="no equilibrium of 4 ions"):
        modes.check()


def test_one_bad_lane_leaves_the_others_alone():
    solve = lambda secular: (lambda m: (m.frequencies_hz, m.linear_is_stable))(Chain(5, secular).modes())
    secular = jnp.array([[5e6, 4e6, 1e6], [5e6, 4e6, -1e6], [5e6, 1e6, 1e6], [6e6, 5e6, 2e6]])
    frequencies, stable = jax.vmap(solve)(secular)
    assert stable.tolist() == [True, False, False, True]
    for lane in (0, 2, 3):
        np.testing.assert_allclose(frequencies[lane], solve(secular[lane])[0], rtol=1e-12)
    assert np.isnan(frequencies[1]).all() and np.isnan(frequencies[2]).any()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"ions": 0}, "`ions` must be a positive integer"),
        ({"secular_hz": (1e6, 1e6)}, "`secular_hz` must be three numbers"),
        ({"secular_hz": (-1e6, 1e6, 1e6)}, r"`secular_hz\[:2\]` must be positive"),
        ({"secular_hz": (3e6, 3e6, -1e6)}, r"`secular_hz\[2\]` must be positive"),
        ({"secular_hz": (3e6, 3e6, math.nan), "quartic_v_per_m4": 1.0}, r"`secular_hz\[2\]` must be finite"),
        ({"masses_kg": [MASS]}, "`masses_kg` must be one number for each of the 2 ions"),
        ({"masses_kg": [MASS, 0.0]}, "`masses_kg` must be positive"),
        ({"quartic_v_per_m4": math.inf}, "`quartic_v_per_m4` must be finite"),
    ],
)
def test_wrong_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Chain(**{"ions": 2, "secular_hz": (3e6, 3e6, 1e6)} | arguments)


def test_wrong_number_of_ions_and_directions():
    with pytest.raises(ValueError, match="`ions` must be a positive integer"):
        equilibrium(0, axial_hz=1e6)
    modes = Chain(2, (3e6, 3e6, 1e6)).modes()
    with pytest.raises(ValueError, match="`direction` must be finite and not zero"):
        modes.lamb_dicke(1e7, (0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="`direction` must be three numbers"):
        modes.lamb_dicke(1e7, (0.0, 1.0))


# ------------------------------------------------------------------------------------------------ light and heating


def test_lamb_dicke_anchors():
    # A published chain code; mode of the centre of mass, |dk| = 3.5398227e7 per m, 3.045 MHz.
    for ions, expected in {1: 0.1103011324, 5: 0.0493281660, 17: 0.0267519541}.items():
        modes = Chain(ions, (60e6, 60e6, 3.045e6)).modes().check()
        eta = modes.lamb_dicke(3.5398227e7, (0.0, 0.0, 1.0))
        np.testing.assert_allclose(eta[:, 2 * ions], expected, rtol=1e-8)
        np.testing.assert_array_equal(eta[:, : 2 * ions], 0)
    # One ion at 1 MHz on the axis of a beam at 435.5 nm.
    eta = Chain(1, (3e6, 3e6, 1e6)).modes().lamb_dicke(YB171.transition("436").wavenumber_rad_m, (0.0, 0.0, 2.0))
    assert eta[0, 2] == pytest.approx(0.078445, abs=1e-6)


def test_lamb_dicke_of_an_oblique_beam_and_of_other_masses():
    chain = MIXED["mixed"]
    modes = chain.modes()
    direction = np.array([1.0, -2.0, 0.5])
    eta = np.asarray(modes.lamb_dicke(1.3e7, direction))
    masses = np.asarray(chain.mass_of_each_kg())
    for m in range(12):
        along = direction[m // 4] / np.sqrt(direction @ direction)
        omega = 2 * math.pi * float(modes.frequencies_hz[m])
        for i in range(4):
            size = math.sqrt(constants.hbar / (2 * masses[i] * omega))
            assert eta[i, m] == pytest.approx(1.3e7 * along * float(modes.vectors[i, m]) * size, rel=1e-12, abs=1e-15)
    # Commutator [q_i, p_i] = i hbar: sum over modes of 2 m_i omega_m q_im^2 / hbar = 1 for each ion and direction.
    sizes = eta[:, 8:] / (1.3e7 * direction[2] / np.linalg.norm(direction))
    weights = 2 * masses[:, None] * 2 * math.pi * np.asarray(modes.frequencies_hz)[8:] / constants.hbar
    np.testing.assert_allclose(np.sum(weights * sizes**2, axis=1), 1, rtol=1e-12)


def test_only_the_centre_of_mass_heats():
    shares = np.asarray(Chain(6, (5e6, 4e6, 1e6)).modes().heating_shares())
    expected = np.zeros(18)
    expected[[5, 11, 12]] = 6
    np.testing.assert_allclose(shares, expected, atol=1e-12)
    mixed = MIXED["mixed"]
    shares = np.asarray(mixed.modes().heating_shares()).reshape(3, 4)
    assert np.sum(shares[2] > 1e-3) > 1
    # Each direction's shares add to what the free ions would gain, sum of m_ref/m_i.
    np.testing.assert_allclose(shares.sum(axis=1), np.sum(MASS / mixed.mass_of_each_kg()), rtol=1e-12)


# ------------------------------------------------------------------------------------------------ derivatives


def _build(p):
    return Chain(
        4,
        p[:3] * 1e6,
        quartic_v_per_m4=p[3] * QUARTIC,
        static_x_n_per_m=-p[4] * 1e-12,
        masses_kg=MASS * jnp.stack([1.0, p[5], 1.0, 1.0]),
    ).modes()


def _outputs(p):
    modes = _build(p)
    return {
        "frequencies": modes.frequencies_hz / 1e6,
        "participation": modes.vectors.ravel(),
        "Lamb-Dicke": 10 * modes.lamb_dicke(1e7, (1.0, 1.0, 1.0)).ravel(),
        "positions": modes.equilibrium.positions_m / LENGTH,
        "heating": modes.heating_shares(),
    }


def test_derivatives_against_finite_differences():
    outputs, p = jax.jit(_outputs), jnp.array([4.0, 4.7, 1.0, 0.02, 5.0, 0.6])
    slopes, forward = jax.jit(jax.jacrev(_outputs))(p), jax.jit(jax.jacfwd(_outputs))(p)
    for name, slope in slopes.items():
        np.testing.assert_allclose(slope, forward[name], atol=1e-11)
    for i in range(p.size):
        step = 2e-4 * float(p[i])
        near, far = ([outputs(p.at[i].add(k * s * step)) for s in (1, -1)] for k in (1, 2))
        for name, slope in slopes.items():
            # Fourth order, so that 1e-7 of the slope is within reach.
            first, second = (pair[0][name] - pair[1][name] for pair in (near, far))
            np.testing.assert_allclose(slope[:, i], (8 * first - second) / (12 * step), rtol=1e-7, atol=2e-9)
    # x and y see every parameter, the positions only those of the axis.
    assert np.all(np.max(np.abs(slopes["frequencies"]), axis=0) > 1e-3)
    np.testing.assert_array_equal(np.max(np.abs(slopes["positions"]), axis=0) > 1e-3, [0, 0, 1, 1, 0, 0])


def test_a_soft_quartic_has_a_derivative_at_zero():
    mean_square = lambda c: (
        jnp.mean(_build(jnp.array([4.0, 4.7, 1.0, c, 5.0, 0.6])).equilibrium.positions_m ** 2) / LENGTH**2
    )
    slope = jax.grad(mean_square)(0.0)
    assert slope == pytest.approx(float(mean_square(1e-5) - mean_square(-1e-5)) / 2e-5, rel=1e-6)
    assert slope < -0.1


def test_degenerate_modes_have_derivatives():
    # Two equal eigenvalues split by a perturbation: their sum has a slope, and so has their mixing with the third.
    matrix = jnp.diag(jnp.array([2.0, 2.0, 5.0]))
    trace = lambda t: jnp.sum(_eigenmodes(matrix + t * jnp.array([[0.3, 0.2, 0], [0.2, 0.1, 0], [0, 0, 1.0]]))[0][:2])
    assert jax.grad(trace)(0.0) == pytest.approx(0.4, rel=1e-12)
    vectors = jax.jacrev(lambda t: _eigenmodes(matrix + t * jnp.ones((3, 3)))[1])(0.0)
    assert np.all(np.isfinite(vectors))
    np.testing.assert_allclose(np.abs(vectors[2, :2]), 1 / 3, rtol=1e-12)


@pytest.mark.slow
def test_second_derivatives():
    frequency = lambda p: _build(p).frequencies_hz[-1] / 1e6
    p = jnp.array([4.0, 4.7, 1.0, 0.02, 5.0, 0.6])
    second = jax.jit(jax.hessian(frequency))(p)
    slope = jax.jit(jax.grad(frequency))
    for i in (2, 3, 5):
        step = 1e-4 * float(p[i])
        difference = (slope(p.at[i].add(step)) - slope(p.at[i].add(-step))) / (2 * step)
        np.testing.assert_allclose(second[i], difference, rtol=1e-5, atol=1e-6)


def test_gradient_of_a_long_chain():
    highest = jax.jit(lambda f: Chain(60, (80e6, 81e6, f), quartic_v_per_m4=1e-4 * QUARTIC).modes().frequencies_hz[-1])
    slope = jax.jit(jax.grad(highest))(1e6)
    assert slope == pytest.approx(float(highest(1.0001e6) - highest(0.9999e6)) / 200, rel=1e-6)


def test_the_stiffness_of_the_coulomb_energy():
    u = jnp.array([-1.3, -0.2, 0.5, 2.0])
    energy = lambda v: sum(1 / jnp.abs(v[i] - v[j]) for i in range(4) for j in range(i))
    np.testing.assert_allclose(coulomb_stiffness(u), jax.hessian(energy)(u), rtol=1e-12)

"""Piecewise-constant propagation against matrix exponentials, its gradients, its error bound and its lanes."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from twin.levels import SCHEMES
from twin.master_equation import unpack_density
from twin.slices import Dense, Slices, Taylor, largest_action, propagate, taylor

SLICES, LENGTH_S = 7, 9e-6
CLOSED = {"detuning_1_hz": 4e3, "detuning_2_hz": -2.5e3}
NOISE = CLOSED | {"lifetime_s": 3e-4, "branching": 0.3, "shared_linewidth_hz": 900.0, "linewidth_2_hz": 50.0}


def system(scheme="lambda", **changes):
    defaults = {"lifetime_s": np.inf, "branching": 0.4, "m_lifetime_s": np.inf, "shared_linewidth_hz": 0.0,
                "linewidth_1_hz": 0.0, "linewidth_2_hz": 0.0, "detuning_1_hz": 0.0, "detuning_2_hz": 0.0}  # fmt: skip
    return SCHEMES[scheme].system(**(defaults | changes))


def drives(*lanes: int, seed: int = 0, size: float = 1e5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(size * rng.normal(size=(SLICES, 2, *lanes)) for _ in range(2))


def rule_of(graph, real, imag, error=1e-12, pure=False) -> Taylor:
    norm = float(np.max(np.sqrt(np.sum(real**2 + imag**2, axis=1))))
    return taylor(largest_action(graph, norm, LENGTH_S, pure=pure), error)


def lengths() -> np.ndarray:
    return LENGTH_S * np.array([1, 0.5, 1, 0, 1, 0.25, 1])


def exact(scheme: str, noise: dict, real, imag) -> np.ndarray:
    """The density matrix after every slice, by dense exponentials."""
    h, jumps = oracle.ion(scheme, **noise)
    levels = oracle.LEVELS[scheme]
    rho = oracle.op(levels, SCHEMES[scheme].start, SCHEMES[scheme].start)
    found = []
    for one, two, length_s in zip(*(real + 1j * imag).T, lengths(), strict=True):
        rho = oracle.evolved(rho, h + oracle.drive(levels, *driven(scheme, one, two)), jumps, length_s)
        found.append(rho)
    return np.array(found)


def driven(scheme: str, one: complex, two: complex) -> tuple[complex, complex]:
    """What the oracle calls the drives of v->s and s->m, whichever way the couplings of the graph point."""
    couplings = system(scheme).couplings
    return tuple(z if pair in (("v", "s"), ("s", "m")) else np.conj(z)
                 for z, pair in zip((one, two), couplings, strict=True))  # fmt: skip


@pytest.mark.parametrize("dense", [False, True], ids=["taylor", "dense"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("noise", [CLOSED, NOISE], ids=["closed", "open"])
def test_every_slice_against_matrix_exponentials(scheme, noise, dense):
    real, imag = drives()
    graph = system(scheme, **noise)
    start = np.asarray(oracle.op(oracle.LEVELS[scheme], SCHEMES[scheme].start, SCHEMES[scheme].start))
    rule = Dense() if dense else rule_of(graph, real, imag)
    path = propagate(graph, Slices(real, imag, lengths()), start, rule, saved=True)
    expected = exact(scheme, noise, real, imag)
    got = np.stack([unpack_density(state, len(expected[0])) for state in path.state])
    np.testing.assert_allclose(got, expected, atol=1e-11)
    np.testing.assert_allclose(path.populations, np.einsum("njj->nj", expected).real, atol=1e-11)


def test_a_closed_graph_is_solved_as_a_ket():
    real, imag = drives()
    graph = dataclasses.replace(system(**CLOSED), decays=(), dephasings=())
    path = propagate(graph, Slices(real, imag, lengths()), "v", rule_of(graph, real, imag, pure=True))
    assert path.state.shape == (6,)
    ket = np.asarray(path.state[:3] + 1j * path.state[3:])
    np.testing.assert_allclose(np.outer(ket, ket.conj()), exact("lambda", CLOSED, real, imag)[-1], atol=1e-11)
    np.testing.assert_allclose(path.populations, np.abs(ket) ** 2, atol=1e-14)


def test_lanes_are_their_own():
    real, imag = drives(4)
    graph, rule = system(**NOISE), Taylor(12, 1)
    together = propagate(graph, Slices(real, imag, lengths()), "v", rule)
    for lane in range(4):
        alone = propagate(graph, Slices(real[..., lane], imag[..., lane], lengths()), "v", rule)
        np.testing.assert_allclose(together.state[:, lane], alone.state, atol=1e-14)
    real[2, 0, 1] = np.nan
    broken = propagate(graph, Slices(real, imag, lengths()), "v", rule)
    assert np.isnan(broken.populations[:, 1]).all()
    np.testing.assert_array_equal(np.delete(broken.state, 1, axis=1), np.delete(together.state, 1, axis=1))


@pytest.mark.parametrize("noise", [CLOSED, NOISE], ids=["closed", "open"])
def test_gradients_are_finite_differences(noise):
    """In both parts of every slice, the lengths and the parameters of the graph."""
    real, imag = drives()
    rule = Taylor(16, 1)

    @jax.jit
    def transferred(real, imag, length_s, numbers):
        graph = system(**(noise | numbers))
        return propagate(graph, Slices(real, imag, length_s), "v", rule).populations[1]

    numbers = {name: jnp.asarray(noise[name]) for name in noise if name != "lifetime_s"}
    args = (jnp.asarray(real), jnp.asarray(imag), jnp.asarray(lengths() + 1e-7), numbers)
    slope = jax.grad(transferred, argnums=(0, 1, 2, 3))(*args)
    leaves, tree = jax.tree.flatten(args)
    for k, (leaf, got) in enumerate(zip(leaves, jax.tree.leaves(slope), strict=True)):
        step = 1e-4 * float(jnp.max(jnp.abs(leaf)))
        for place in list(np.ndindex(leaf.shape))[:: 5 if leaf.ndim > 1 else 1]:
            values = [transferred(*tree.unflatten([*leaves[:k], leaf.at[place].add(d), *leaves[k + 1 :]]))
                      for d in (step, -step)]  # fmt: skip
            np.testing.assert_allclose(got[place] * step, (values[0] - values[1]) / 2, rtol=1e-4, atol=1e-11)


@pytest.mark.parametrize("error", [1e-2, 1e-5, 1e-12])
@pytest.mark.parametrize("action", [0.03, 2.0, 37.0])
def test_the_error_is_the_one_asked_for(action, error):
    # A resonant pulse on one line, where |L| h is the angle.
    graph = system()
    assert largest_action(graph, action, 1.0) == pytest.approx(action)
    got = propagate(graph, Slices([[action, 0.0]], None, [1.0]), "v", taylor(action, error))
    assert abs(float(got.populations[1]) - np.sin(action / 2) ** 2) <= error + 1e-14 * action


def test_the_rule_grows_with_the_action_and_refuses_nonsense():
    cost = [np.prod(taylor(action, 1e-10)) for action in (0.01, 0.1, 1.0, 10.0, 100.0)]
    assert cost == sorted(cost)
    assert taylor(0.0, 1e-10) == Taylor(2, 1)
    for action, error in ((np.inf, 1e-9), (-1.0, 1e-9), (1.0, 0.0), (np.nan, 1e-9)):
        with pytest.raises(ValueError, match="must be finite"):
            taylor(action, error)
    with pytest.raises(ValueError, match="as many slices"):
        Slices(np.zeros((3, 2)), None, np.zeros(4))


def test_new_values_trace_nothing():
    traces = []

    @eqx.filter_jit
    def run(graph, slices):
        traces.append(None)
        return propagate(graph, slices, "v", Taylor(8, 2))

    for seed in range(3):
        real, imag = drives(seed=seed)
        run(system(**(NOISE | {"detuning_1_hz": float(seed)})), Slices(real, imag, lengths()))
    assert len(traces) == 1

"""Level graphs: frames, jumps and read-out of the three schemes, and what a graph refuses."""

import math

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from twin.dynamics import StaticGrid, evolve
from twin.levels import LADDER, LAMBDA, SCHEMES, Decay, Dephasing, LevelSystem, V
from twin.master_equation import unpack_density

ALL = pytest.mark.parametrize("name", list(SCHEMES))
QUIET = {"detuning_1_hz": 0.0, "detuning_2_hz": 0.0, "lifetime_s": math.inf, "branching": 0.4}
T_S = 3e-4
# No drive: the graph is left alone for a time, from an equal superposition of v, s and m.
NOISY = {
    "detuning_1_hz": 700.0,
    "detuning_2_hz": -450.0,
    "lifetime_s": 2e-3,
    "branching": 0.3,
    "m_lifetime_s": 4e-4,
    "shared_linewidth_hz": 210.0,
    "linewidth_1_hz": 330.0,
    "linewidth_2_hz": 120.0,
}


def left_alone(system: LevelSystem, duration_s: float = T_S) -> np.ndarray:
    start = superposition(len(system.levels))
    solution = evolve(system, (), start=start, window_s=(0.0, duration_s), method=StaticGrid(1e-12))
    return np.asarray(unpack_density(solution.state[0], len(system.levels)))


def superposition(n: int) -> np.ndarray:
    rho = np.zeros((n, n))
    rho[:3, :3] = 1 / 3
    return rho


# ------------------------------------------------------------------------------------------------ frames and jumps


@pytest.mark.parametrize(
    ("name", "energies"),
    [
        ("lambda", lambda d1, d2: (0.0, -d1, -d1 + d2)),
        ("v", lambda d1, d2: (-d1, 0.0, -d2, 0.0)),
        ("ladder", lambda d1, d2: (0.0, -d1, -d1 - d2, 0.0)),
    ],
)
def test_signs_of_the_rotating_frame(name, energies):
    d1, d2 = np.array([300.0, -20.0]), 70.0
    system = SCHEMES[name].system(**(QUIET | {"detuning_1_hz": d1, "detuning_2_hz": d2}))
    expected = [np.broadcast_to(e, 2) for e in energies(2 * np.pi * d1, 2 * np.pi * d2)]
    np.testing.assert_allclose(system.energies_rad_s, expected, rtol=1e-15)


@ALL
def test_undriven_graph_against_its_operators(name):
    system = SCHEMES[name].system(**NOISY)
    h, jumps = oracle.ion(name, **NOISY)
    expected = oracle.evolved(superposition(len(h)), h, jumps, T_S)
    np.testing.assert_allclose(left_alone(system), expected, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "damping_of_vm"),
    # In units of D: common phase of both arms, or two photons' worth of it at the top of the ladder.
    [("lambda", 0.0), ("v", 0.0), ("ladder", 4.0)],
)
def test_a_shared_source_leaves_the_arms_coherent_where_they_share_its_phase(name, damping_of_vm):
    system = SCHEMES[name].system(**QUIET, shared_linewidth_hz=250.0)
    rho, d = left_alone(system), math.pi * 250.0
    assert 3 * rho[0, 2] == pytest.approx(math.exp(-damping_of_vm * d * T_S), rel=1e-10)
    for other in (0, 2):  # either line alone feels the whole linewidth
        assert 3 * rho[other, 1] == pytest.approx(math.exp(-d * T_S), rel=1e-10)
    if damping_of_vm == 0.0:
        assert all(w[0] == w[2] for w in (dephasing.weights for dephasing in system.dephasings))


@ALL
def test_two_sources_dephase_their_own_line_and_both_dephase_the_arms(name):
    system = SCHEMES[name].system(**QUIET, linewidth_1_hz=250.0, linewidth_2_hz=90.0)
    rho = left_alone(system)
    for (a, b), linewidth in {(0, 1): 250.0, (1, 2): 90.0, (0, 2): 340.0}.items():
        assert 3 * rho[a, b] == pytest.approx(math.exp(-math.pi * linewidth * T_S), rel=1e-10)


@pytest.mark.parametrize(
    ("name", "source", "targets"),
    [("lambda", "s", "vm"), ("v", "v", "sl"), ("v", "m", "sl"), ("ladder", "s", "vl")],
)
def test_a_metastable_level_decays_with_its_branching(name, source, targets):
    system = SCHEMES[name].system(**(QUIET | {"lifetime_s": 52.7e-3, "branching": 0.4}))
    end = evolve(system, (), start=source, window_s=(0.0, 20e-3), method=StaticGrid(1e-12)).populations[0]
    stays = math.exp(-20 / 52.7)
    levels = system.levels
    expected = {source: stays, targets[0]: 0.4 * (1 - stays), targets[1]: 0.6 * (1 - stays)}
    np.testing.assert_allclose(end, [expected.get(level, 0.0) for level in levels], atol=1e-11)


def test_the_top_of_the_ladder_is_lost_to_the_leak_level():
    system = LADDER.system(**QUIET, m_lifetime_s=38e-9)
    end = evolve(system, (), start="m", window_s=(0.0, 38e-9), method=StaticGrid(1e-12)).populations[0]
    np.testing.assert_allclose(end, [0, 0, math.exp(-1), 1 - math.exp(-1)], atol=1e-11)


def test_infinite_lifetimes_switch_decay_off():
    for scheme in (LAMBDA, V, LADDER):
        assert all(float(decay.rate_per_s) == 0.0 for decay in scheme.system(**QUIET).decays)


# ------------------------------------------------------------------------------------------------ roles


def test_preparation_belongs_to_the_scheme():
    assert (LAMBDA.start, V.start, LADDER.start) == ("v", "s", "v")


@ALL
def test_pulse_1_drives_v_s_and_pulse_2_drives_s_m(name):
    assert SCHEMES[name].system(**QUIET).couplings == (("v", "s"), ("s", "m"))
    assert SCHEMES[name].levels[:3] == ("v", "s", "m")


@pytest.mark.parametrize(
    ("name", "dark", "shines_like_s"), [("lambda", True, "s"), ("v", False, "sl"), ("ladder", True, "s")]
)
def test_readout_sees_dark_and_bright_only(name, dark, shines_like_s):
    scheme = SCHEMES[name]
    assert scheme.signal_is_dark is dark
    for k, level in enumerate(scheme.levels):
        populations = jnp.zeros((len(scheme.levels), 2)).at[k].set(1.0)
        np.testing.assert_array_equal(scheme.assigned_with_signal(populations), float(level in shines_like_s))


def test_a_graph_without_jumps_is_closed():
    graph = LevelSystem(("a", "b"), (("a", "b"),), np.zeros(2))
    assert graph.closed
    assert not LevelSystem(("a", "b"), (("a", "b"),), np.zeros(2), decays=(Decay("b", "a", 1.0),)).closed
    assert not LevelSystem(("a", "b"), (("a", "b"),), np.zeros(2), dephasings=(Dephasing((0.0, 1.0), 1.0),)).closed
    assert (graph.index("a"), graph.index("b")) == (0, 1)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LevelSystem(("v", "v"), (), np.zeros(2)), r"`levels` must have distinct names, but is \('v', 'v'\)"),
        (lambda: LevelSystem(("v", "s"), (("v", "d"),), np.zeros(2)), r"level `d` is not in the graph \('v', 's'\)"),
        (
            lambda: LevelSystem(("v", "s"), (("v", "v"),), np.zeros(2)),
            r"a coupling must join two levels, but .* itself",
        ),
        (
            lambda: LevelSystem(("v", "s"), (), np.zeros(2), decays=(Decay("s", "x", 1.0),)),
            r"level `x` is not in the graph",
        ),
        (
            lambda: LevelSystem(("v", "s"), (), np.zeros(2), decays=(Decay("x", "s", 1.0),)),
            r"level `x` is not in the graph",
        ),
        (
            lambda: LevelSystem(("v", "s"), (), np.zeros(2), dephasings=(Dephasing((1.0,), 1.0),)),
            r"`weights` must have 2 entries, one a level, but has 1",
        ),
        (lambda: LevelSystem(("v", "s"), (), np.zeros(3)), r"`energies_rad_s` must have the leading axis 2, .*\(3,\)"),
        (lambda: LevelSystem(("v", "s"), (), np.float64(0)), r"`energies_rad_s` must have the leading axis 2"),
        (lambda: Decay("s", "v", -1.0), r"`rate_per_s` must be zero or positive, and finite, but is -1\.0"),
        (lambda: Decay("s", "v", math.nan), r"`rate_per_s` must be zero or positive, and finite, but is nan"),
        (lambda: Dephasing((0.0, 1.0), -3.0), r"`rate_per_s` must be zero or positive, and finite, but is -3\.0"),
        (lambda: Dephasing((0.0, 1.0), math.inf), r"`rate_per_s` must be zero or positive, and finite, but is inf"),
        (lambda: LAMBDA.system(**(QUIET | {"lifetime_s": -1.0})), r"`rate_per_s` must be zero or positive"),
        (lambda: LAMBDA.system(**QUIET, shared_linewidth_hz=-5.0), r"`rate_per_s` must be zero or positive"),
        (lambda: LAMBDA.system(**(QUIET | {"lifetime_s": 1.0, "branching": 1.5})), r"`rate_per_s` must be zero or pos"),
    ],
)
def test_a_bad_graph_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()

"""Independent code: ten random open systems against QuTiP, operators built here level by level."""

import functools

import numpy as np
import oracle
import pytest
import qutip

from twin.dynamics import StaticGrid, evolve
from twin.levels import SCHEMES
from twin.master_equation import unpack_density
from twin.pulses import Gaussian

SIGMA_S = 20e-6
LANES = {"lambda": 4, "v": 3, "ladder": 3}
CASES = [(scheme, lane) for scheme, lanes in LANES.items() for lane in range(lanes)]


@functools.cache
def draw(scheme):
    """Random devices of a scheme: everything at once, from strong overlap to pulses apart."""
    rng, lanes = np.random.default_rng(list(LANES).index(scheme) + 11), LANES[scheme]
    uniform = lambda low, high: rng.uniform(low, high, lanes)
    device = {
        "detuning_1_hz": uniform(-6e3, 6e3),
        "detuning_2_hz": uniform(-6e3, 6e3),
        "lifetime_s": 10 ** uniform(-4, -2),
        "branching": uniform(0, 1),
        "m_lifetime_s": 10 ** uniform(-5, -3),
        "shared_linewidth_hz": uniform(0, 2e3),
        "linewidth_1_hz": uniform(0, 2e3),
        "linewidth_2_hz": uniform(0, 2e3),
    }
    # One lane with the shared source alone, one with two sources alone.
    device["linewidth_1_hz"][0] = device["linewidth_2_hz"][0] = 0.0
    device["shared_linewidth_hz"][1] = 0.0
    pulses = {
        "area_rad": rng.uniform(0.3, 1.4 * np.pi, (2, lanes)),
        "phase_rad": rng.uniform(-np.pi, np.pi, (2, lanes)),
        "sigma_s": SIGMA_S * rng.uniform(0.7, 1.4, (2, lanes)),
        "center_s": np.stack([np.zeros(lanes), SIGMA_S * np.linspace(0, 7, lanes)]),
    }
    return device, pulses


@functools.cache
def solved(scheme):
    """Density matrices of all devices of a scheme, after the second pulse."""
    device, p = draw(scheme)
    pulses = tuple(
        Gaussian.from_area(
            p["area_rad"][k], center_s=p["center_s"][k], sigma_s=p["sigma_s"][k], phase_rad=p["phase_rad"][k]
        )
        for k in (0, 1)
    )
    solution = evolve(
        SCHEMES[scheme].system(**device),
        pulses,
        start=SCHEMES[scheme].start,
        window_s=window(p),
        method=StaticGrid(1e-10),
    )
    assert np.all(solution.valid)
    return np.asarray(unpack_density(solution.state[0], len(SCHEMES[scheme].levels)))


def window(p):
    return -5 * SIGMA_S, p["center_s"][1] + 6 * SIGMA_S


@pytest.mark.parametrize(("scheme", "lane"), CASES)
def test_density_matrix_against_qutip(scheme, lane):
    device, p = draw(scheme)
    h, jumps = oracle.ion(scheme, **{name: value[lane] for name, value in device.items()})
    levels = oracle.LEVELS[scheme]
    start, stop = (np.broadcast_to(t, LANES[scheme])[lane] for t in window(p))

    def envelope(k):
        area, sigma, center = (p[name][k, lane] for name in ("area_rad", "sigma_s", "center_s"))
        peak = area / (np.sqrt(2 * np.pi) * sigma)
        return lambda t: peak * np.exp(-((t - center) ** 2) / (2 * sigma**2))

    drives = []
    for k, unit in enumerate(((1.0, 0.0), (0.0, 1.0))):
        # Omega exp(-i phi) |to><from| / 2 + h.c.
        turned = oracle.drive(levels, *(u * np.exp(-1j * p["phase_rad"][k, lane]) for u in unit))
        drives.append([qutip.Qobj(turned), envelope(k)])
    ket = qutip.basis(len(levels), levels.index(SCHEMES[scheme].start))
    reference = qutip.mesolve(
        [qutip.Qobj(h), *drives],
        qutip.ket2dm(ket),
        [start, stop],
        c_ops=[qutip.Qobj(jump) for jump in jumps],
        options={"method": "dop853", "rtol": 1e-10, "atol": 1e-12, "nsteps": 100_000, "max_step": SIGMA_S / 2},
    ).states[-1]
    np.testing.assert_allclose(solved(scheme)[..., lane], reference.full(), atol=1e-7, rtol=0)
    # The case is no trivial one: every level and coherence took part.
    assert np.diag(reference.full()).real.max() < 0.98


def test_the_starts_are_those_of_the_schemes():
    assert {name: scheme.start for name, scheme in SCHEMES.items()} == {"lambda": "v", "v": "s", "ladder": "v"}

"""Pulse families: what they contain, where they begin, and that composite pulses correct what they promise."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from calibration.families import COMPOSITES, FAMILIES, composite, family
from calibration.hardware import Hardware
from calibration.shaping import gaussian_pulses
from twin.levels import LevelSystem
from twin.slices import Slices, propagate, taylor

FULL = 2 * math.pi * 40e3


def hardware(**changes) -> Hardware:
    return Hardware(**({"sample_s": 1e-6, "largest_rad_s": (FULL, FULL), "slew_rad_s2": (FULL / 4e-6,) * 2} | changes))


def test_splines_contain_every_cubic():
    t = np.linspace(-1, 1, 40)
    raw = jnp.asarray(np.stack([1 - t + 2 * t**3, t**2], axis=1))
    splines = family("splines", hardware(real_only=True), (raw, None), numbers=6)
    got, none = splines.raw(splines.first((raw, None)))
    np.testing.assert_allclose(got, raw, atol=1e-12)
    assert none is None and splines.first((raw, None)).size == 12


def test_a_fourier_series_is_added_to_the_start():
    raw = hardware().unconstrained(gaussian_pulses(hardware(), 60))
    crab = family("fourier", hardware(), raw, numbers=6, seed=3)
    begin = crab.first(raw)
    np.testing.assert_allclose(begin, np.zeros(24), atol=1e-12)
    for got, given in zip(crab.raw(begin), raw, strict=True):
        np.testing.assert_allclose(got, given, atol=1e-12)
    # One number is one sine of its channel and part, of some real number of periods.
    moved = crab.raw(begin.at[1].set(1.0))[0] - raw[0]
    assert np.all(moved[:, 0] == 0.0) and 0.6 < np.max(np.abs(moved[:, 1])) <= 1.0
    other = family("fourier", hardware(), raw, numbers=6, seed=4)
    assert np.max(np.abs(other.basis - crab.basis)) > 0.1


def test_drag_turns_the_phase_along_slope_and_square():
    raw = hardware().unconstrained(gaussian_pulses(hardware(), 60))
    drag = family("drag", hardware(), raw, numbers=8)
    begin = drag.first(raw)
    assert begin.size == 2 * 8 + 4
    u, nothing = drag.raw(begin)
    assert np.all(nothing == 0.0)
    # The quadrature of channel 2.
    real, imag = drag.raw(begin.at[-3].set(0.01))
    np.testing.assert_allclose(real, u, atol=1e-12)
    np.testing.assert_allclose(imag[:, 1], 0.01 * len(u) * np.gradient(u[:, 1]), atol=1e-12)
    # A chirp keeps the modulus.
    real, imag = drag.raw(begin.at[-2:].set(7.0))
    np.testing.assert_allclose(np.hypot(real, imag), np.abs(u), atol=1e-12)
    assert np.max(np.abs(imag)) > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_limits_hold_in_every_family(name):
    limits = hardware(bits=10)
    raw = limits.unconstrained(gaussian_pulses(limits, 60))
    some = family(name, limits, raw, numbers=8)
    point = some.first(raw)
    far = point + 3 * np.random.default_rng(0).normal(size=point.size)
    waveform = limits.quantized(limits.allowed(*some.raw(far)))
    assert set(limits.violations(waveform).values()) == {0.0}
    assert np.max(np.abs(np.asarray(waveform.real_rad_s))) > 0.2 * FULL


def infidelity(name: str, rabi_error: float = 0.0, detuning_rad_s: float = 0.0) -> float:
    """Of a composite pi pulse of constant Rabi frequency on a two-level system."""
    flat = Hardware(sample_s=1e-6, largest_rad_s=FULL, slew_rad_s2=math.inf, zero_ends=False)
    w = composite(name, flat, 130)
    graph = LevelSystem(("v", "s"), (("v", "s"),), np.array([0.0, -detuning_rad_s]))
    slices = Slices((1 + rabi_error) * w.real_rad_s, (1 + rabi_error) * w.imag_rad_s, jnp.full(130, 1e-6))
    return 1 - float(propagate(graph, slices, "v", taylor(0.3, 1e-14)).populations[1])


def test_composite_pulses_have_their_areas():
    flat = Hardware(sample_s=1e-6, largest_rad_s=FULL, slew_rad_s2=math.inf, zero_ends=False)
    for name, pieces in COMPOSITES.items():
        w = composite(name, flat, 130)
        z = np.asarray(w.real_rad_s + 1j * w.imag_rad_s)[:, 0] * 1e-6
        np.testing.assert_allclose(np.sum(z), sum(angle * np.exp(1j * phase) for angle, phase in pieces), atol=1e-9)


# Of the population, which hides what is left in the phase: SK1 and CORPSE promise the fourth order of every state.
@pytest.mark.parametrize(("name", "order"), [("bb1", 6), ("sk1", 4)])
def test_wrong_rabi_frequencies_are_corrected(name, order):
    small, large = (infidelity(name, rabi_error=e) - infidelity(name) for e in (0.1, 0.2))
    assert math.log2(large / small) > order - 0.7
    assert large < np.sin(0.1 * np.pi) ** 2 / 10


def test_detunings_are_corrected_by_corpse():
    rabi = 13 * np.pi / 3 / 130e-6
    small, large = (infidelity("corpse", detuning_rad_s=share * rabi) - infidelity("corpse") for share in (0.1, 0.2))
    assert math.log2(large / small) > 3.3
    assert large < 0.2**2 / 4


def test_what_a_family_refuses():
    real = hardware(real_only=True)
    raw = real.unconstrained(gaussian_pulses(real, 60))
    with pytest.raises(ValueError, match="one of samples, splines, fourier, drag, but is 'grape'"):
        family("grape", real, raw)
    with pytest.raises(ValueError, match="give 4 to"):
        family("splines", real, raw, numbers=500)
    with pytest.raises(ValueError, match="DRAG turns the phase"):
        family("drag", real, raw)
    with pytest.raises(ValueError, match="bb1 turns the phase"):
        composite("bb1", real, 60)
    with pytest.raises(ValueError, match="one of bb1, sk1, corpse, but is 'xy8'"):
        composite("xy8", hardware(), 60)
    assert np.all(np.asarray(composite("corpse", real, 60).imag_rad_s) < 1e-9)

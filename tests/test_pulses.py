"""Every waveform through one contract, the conventions of the Gaussian's width, and the refusal of bad values."""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from twin.pulses import AbstractPulse, Gaussian, PiecewiseConstant, Sech

SIGMA_S = 20e-6


class Case(NamedTuple):
    pulse: AbstractPulse
    area_rad: float  # what `area_rad` must say
    envelope: object  # signed envelope of time, rad/s, written down here a second time


def _slices(*values):
    """Envelope of 5 us slices that start at -7 us."""
    return lambda t: values[int((t + 7e-6) // 5e-6)] if 0 <= t + 7e-6 < 5e-6 * len(values) else 0.0


CASES = {
    "gaussian": Case(
        Gaussian(6e4, 3e-6, SIGMA_S),
        6e4 * SIGMA_S * math.sqrt(2 * math.pi),
        lambda t: 6e4 * math.exp(-((t - 3e-6) ** 2) / (2 * SIGMA_S**2)),
    ),
    "gaussian, negative, with phase": Case(
        Gaussian.from_area(-2.5, center_s=0.0, sigma_s=SIGMA_S, phase_rad=0.7),
        -2.5,
        lambda t: -2.5 / (math.sqrt(2 * math.pi) * SIGMA_S) * math.exp(-(t**2) / (2 * SIGMA_S**2)),
    ),
    "sech": Case(Sech(5e4, -4e-6, SIGMA_S), math.pi * 5e4 * SIGMA_S, lambda t: 5e4 / math.cosh((t + 4e-6) / SIGMA_S)),
    "sech, with phase": Case(
        Sech.from_area(3.0, center_s=0.0, tau_s=SIGMA_S, phase_rad=-2.0),
        3.0,
        lambda t: 3.0 / (math.pi * SIGMA_S) / math.cosh(t / SIGMA_S),
    ),
    "square": Case(
        PiecewiseConstant.square(2.0, center_s=1e-6, duration_s=3e-5),
        2.0,
        lambda t: 2.0 / 3e-5 if abs(t - 1e-6) < 1.5e-5 else 0.0,
    ),
    "square, with phase": Case(
        PiecewiseConstant.square(2.0, center_s=0.0, duration_s=3e-5, phase_rad=1.1),
        2.0,
        lambda t: 2.0 / 3e-5 if abs(t) < 1.5e-5 else 0.0,
    ),
    "slices of either sign": Case(
        PiecewiseConstant(np.array([1e5, -2e5, 0.0, 4e5]), None, -7e-6, 20e-6), 1.5, _slices(1e5, -2e5, 0.0, 4e5)
    ),
    "complex slices": Case(
        PiecewiseConstant(np.array([3e5, 0.0, -8e4]), np.array([4e5, 1e5, 6e4]), -7e-6, 15e-6),
        3.5,
        _slices(5e5, 1e5, 1e5),
    ),
}
waveforms = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))
PHASES = {"gaussian, negative, with phase": 0.7, "sech, with phase": -2.0, "square, with phase": 1.1}


def value(pulse, t, within=None):
    """The complex drive at a time."""
    t = jnp.asarray(t, float)
    real, imag = pulse.drive(t, t if within is None else jnp.asarray(within, float))
    return np.asarray(real) + 1j * (0.0 if imag is None else np.asarray(imag))


def times(pulse, number=2001):
    """Times across the support and beyond, none of them a breakpoint."""
    low, high = (float(t) for t in pulse.support_s)
    return np.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), number) + 1e-12


def integral(f, low, high, edges=()):
    """Integral with a resolved middle: quad alone may miss what is narrow."""
    middle = sorted({low, high, 0.0 if low < 0 < high else low, *(e for e in edges if low < e < high)})
    return math.fsum(quad(f, a, b, epsabs=0, epsrel=1e-12, limit=200)[0] for a, b in itertools.pairwise(middle))


# ------------------------------------------------------------------------------------------------ the contract


@waveforms
def test_drive_is_the_envelope(case):
    t = times(case.pulse)
    envelope = np.array([case.envelope(s) for s in t])
    if case.pulse.drive(jnp.asarray(0.0), jnp.asarray(0.0)).imag is None:
        np.testing.assert_allclose(value(case.pulse, t), envelope, rtol=1e-12, atol=1e-6)
    else:
        np.testing.assert_allclose(abs(value(case.pulse, t)), abs(envelope), rtol=1e-12, atol=1e-6)


@waveforms
def test_area_is_the_integral(case):
    low, high = (float(t) for t in case.pulse.support_s)
    reach = high - low  # three supports wide: beyond that nothing is left
    edges = [float(b) for b in case.pulse.breakpoints_s]
    whole = integral(case.envelope, low - reach, high + reach, edges)
    assert whole == pytest.approx(case.area_rad, rel=1e-10)
    assert float(case.pulse.area_rad) == pytest.approx(case.area_rad, rel=1e-13)


@waveforms
def test_support_holds_all_but_a_billionth(case):
    low, high = (float(t) for t in case.pulse.support_s)
    reach = high - low
    outside = quad(case.envelope, low - reach, low)[0] + quad(case.envelope, high, high + reach)[0]
    assert abs(outside) <= 1e-9 * abs(case.area_rad)
    # Not wider than needed either: a tenth less loses more than that.
    inner = low + 0.1 * reach, high - 0.1 * reach
    left_out = quad(lambda t: abs(case.envelope(t)), low, inner[0])[0]
    left_out += quad(lambda t: abs(case.envelope(t)), inner[1], high)[0]
    assert left_out > 1e-9 * abs(case.area_rad)


@waveforms
def test_core_holds_nine_tenths_and_lies_in_the_support(case):
    (low, high), (core_low, core_high) = case.pulse.support_s, case.pulse.core_s
    assert low <= core_low < core_high <= high
    edges = [float(b) for b in case.pulse.breakpoints_s]
    inside = integral(case.envelope, float(core_low), float(core_high), edges)
    assert abs(inside) > 0.9 * abs(case.area_rad)


@waveforms
def test_peak_is_the_largest_magnitude(case):
    largest = abs(value(case.pulse, np.append(times(case.pulse), float(sum(case.pulse.support_s)) / 2))).max()
    assert abs(float(case.pulse.peak_rad_s)) == pytest.approx(largest, rel=1e-12)


@waveforms
def test_timescale_is_that_of_the_steepest_slope(case):
    t = times(case.pulse, 20001)
    envelope = np.array([case.envelope(s) for s in t])
    slope = np.abs(np.diff(envelope)) / np.diff(t)
    timescale, peak = float(case.pulse.timescale_s), abs(float(case.pulse.peak_rad_s))
    if case.pulse.breakpoints_s:
        assert timescale == math.inf
    else:
        assert 0.4 * peak / timescale < slope.max() <= peak / timescale


@waveforms
def test_the_waveform_jumps_at_its_breakpoints_and_nowhere_else(case):
    breaks = [float(b) for b in case.pulse.breakpoints_s]
    step = 1e-13
    for b in breaks:
        # Stages at the same time belong to the piece of their step.
        before, after = value(case.pulse, b, b - step), value(case.pulse, b, b + step)
        assert abs(before) == pytest.approx(abs(case.envelope(b - step)))
        assert abs(after) == pytest.approx(abs(case.envelope(b + step)))
        assert before != after
    t = np.array([t for t in times(case.pulse) if all(abs(t - b) > 10 * step for b in breaks)])
    jumps = abs(value(case.pulse, t + step) - value(case.pulse, t - step))
    assert jumps.max() <= 1e-7 * abs(float(case.pulse.peak_rad_s))


@waveforms
def test_a_phase_turns_the_drive_clockwise(case):
    name = next(name for name, other in CASES.items() if other is case)
    t = times(case.pulse, 101)
    if name in PHASES:
        turned = value(case.pulse, t) * np.exp(1j * PHASES[name])
        np.testing.assert_allclose(turned, [case.envelope(s) for s in t], atol=1e-9 * abs(case.pulse.peak_rad_s))
    elif name != "complex slices":
        assert case.pulse.drive(jnp.asarray(0.0), jnp.asarray(0.0)).imag is None


@waveforms
def test_every_number_is_a_64_bit_leaf(case):
    leaves = jax.tree.leaves(case.pulse)
    assert len(leaves) >= 3
    assert all(leaf.dtype == jnp.float64 for leaf in leaves)


@waveforms
def test_a_batch_is_its_lanes(case):
    # Different batch axes in different fields: (3, 1) in the first, (2,) in the others.
    names = [f.name for f in dataclasses.fields(case.pulse) if getattr(case.pulse, f.name) is not None]
    scale = jnp.array([[1.0], [0.5], [-2.0]])
    changes, lanes = {}, {}
    for k, name in enumerate(names):
        number = getattr(case.pulse, name)
        if name in ("real_rad_s", "imag_rad_s"):
            changes[name] = number[:, None, None] * scale
            lanes[name] = lambda i, j, n=number: n * scale[i, 0]
        elif k == 0:
            changes[name] = number * scale
            lanes[name] = lambda i, j, n=number: n * scale[i, 0]
        else:
            changes[name] = number * jnp.array([1.0, 1.5])
            lanes[name] = lambda i, j, n=number: n * (1.0, 1.5)[j]
    batch = dataclasses.replace(case.pulse, **changes)
    assert np.broadcast_shapes((3, 2), np.shape(batch.area_rad)) == (3, 2)
    for i in range(3):
        for j in range(2):
            lane = dataclasses.replace(case.pulse, **{name: lanes[name](i, j) for name in names})
            t = float(lane.support_s[0]) + 0.37 * float(lane.support_s[1] - lane.support_s[0])
            spread = jnp.full((3, 2), t)
            assert value(batch, spread)[i, j] == pytest.approx(value(lane, t), rel=1e-14)
            for attribute in ("area_rad", "peak_rad_s", "timescale_s"):
                got = np.broadcast_to(getattr(batch, attribute), (3, 2))[i, j]
                assert got == pytest.approx(float(getattr(lane, attribute)), rel=1e-14)
            for attribute in ("support_s", "core_s", "breakpoints_s"):
                for got, expected in zip(getattr(batch, attribute), getattr(lane, attribute), strict=True):
                    assert np.broadcast_to(got, (3, 2))[i, j] == pytest.approx(float(expected), rel=1e-14)


@waveforms
def test_gradients_are_the_finite_differences(case):
    low, high = (float(t) for t in case.pulse.support_s)
    t = jnp.asarray(low + np.array([0.31, 0.47, 0.62]) * (high - low))
    leaves, treedef = jax.tree.flatten(case.pulse)
    peak = float(case.pulse.peak_rad_s)  # everything in units of order one

    @jax.jit
    def outputs(leaves):
        pulse = jax.tree.unflatten(treedef, leaves)
        real, imag = pulse.drive(t, t)
        drive = jnp.concatenate([real, jnp.zeros(3) if imag is None else imag]) / peak
        return jnp.append(drive, pulse.area_rad / case.area_rad)

    jacobian = jax.jit(jax.jacrev(outputs))(leaves)
    for k, leaf in enumerate(leaves):
        for index in np.ndindex(leaf.shape):
            step = 1e-6 * max(float(jnp.abs(leaf).max()), SIGMA_S)
            shifted = lambda h, k=k, i=index: [v.at[i].add(h) if n == k else v for n, v in enumerate(leaves)]
            expected = (outputs(shifted(step)) - outputs(shifted(-step))) / (2 * step)
            scale = np.abs(expected).max() + 1e-12
            np.testing.assert_allclose(jacobian[k][(slice(None), *index)], expected, rtol=1e-5, atol=1e-6 * scale)


# ------------------------------------------------------------------------------------------------ conventions


def test_peak_of_a_pi_pulse():
    # sqrt(2 pi) Om0 sigma = pi: Om0 sigma = sqrt(pi/2), and 20 us gives 9.97356 kHz.
    pulse = Gaussian.from_area(math.pi, center_s=0.0, sigma_s=SIGMA_S)
    assert float(pulse.peak_rad_s) * SIGMA_S == pytest.approx(1.253314137, abs=1e-9)
    assert float(pulse.peak_rad_s) / (2 * math.pi) == pytest.approx(9973.56, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "envelope"),
    [
        (lambda w: Gaussian.from_area(2.0, center_s=0.0, sigma_s=w), lambda t, w: math.exp(-(t**2) / (2 * w**2))),
        (lambda w: Gaussian.from_tau(2.0, center_s=0.0, tau_s=w), lambda t, w: math.exp(-(t**2) / w**2)),
        (lambda w: Gaussian.from_field_fwhm(2.0, center_s=0.0, fwhm_s=w), lambda t, w: 0.5 ** ((2 * t / w) ** 2)),
        (
            lambda w: Gaussian.from_intensity_fwhm(2.0, center_s=0.0, fwhm_s=w),
            lambda t, w: math.sqrt(0.5 ** ((2 * t / w) ** 2)),
        ),
    ],
    ids=["sigma", "tau", "FWHM of the field", "FWHM of the intensity"],
)
def test_conventions_of_the_width(make, envelope):
    width = 31e-6
    pulse = make(width)
    assert float(pulse.area_rad) == pytest.approx(2.0, rel=1e-14)
    for t in (0.0, 7e-6, width / 2, width):
        ratio = value(pulse, t).real / float(pulse.peak_rad_s)
        assert ratio == pytest.approx(envelope(t, width), rel=1e-12)


def test_conversion_factors():
    tau = Gaussian.from_tau(1.0, center_s=0.0, tau_s=1.0)
    assert float(tau.sigma_s) == pytest.approx(1 / math.sqrt(2), rel=1e-15)
    # theta = sqrt(pi) Om0 tau
    assert float(tau.peak_rad_s) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-15)
    assert float(Gaussian.from_field_fwhm(1.0, center_s=0.0, fwhm_s=2.354820).sigma_s) == pytest.approx(1, rel=1e-6)
    assert float(Gaussian.from_intensity_fwhm(1.0, center_s=0.0, fwhm_s=1.665109).sigma_s) == pytest.approx(1, rel=1e-6)


def test_sech_does_not_overflow_far_away():
    pulse = Sech(1.0, 0.0, 1e-6)
    t = jnp.asarray([-1.0, 1.0])
    assert np.array_equal(pulse.drive(t, t).real, [0.0, 0.0])
    assert np.all(np.isfinite(jax.jacfwd(lambda s: pulse.drive(s, s).real)(t)))


def test_an_empty_slice_keeps_the_gradient_finite():
    def area(real, imag):
        return PiecewiseConstant(real, imag, 0.0, 1e-5).area_rad

    gradient = jax.grad(area, argnums=(0, 1))(jnp.array([0.0, 1e5]), jnp.array([0.0, 2e5]))
    assert np.all(np.isfinite(np.asarray(gradient)))


# ------------------------------------------------------------------------------------------------ bad values


@pytest.mark.parametrize("bad", [0.0, -2e-5, math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("sigma_s", lambda w: Gaussian(1.0, 0.0, w)),
        ("sigma_s", lambda w: Gaussian.from_area(1.0, center_s=0.0, sigma_s=w)),
        ("tau_s", lambda w: Gaussian.from_tau(1.0, center_s=0.0, tau_s=w)),
        ("fwhm_s", lambda w: Gaussian.from_field_fwhm(1.0, center_s=0.0, fwhm_s=w)),
        ("fwhm_s", lambda w: Gaussian.from_intensity_fwhm(1.0, center_s=0.0, fwhm_s=w)),
        ("tau_s", lambda w: Sech(1.0, 0.0, w)),
        ("tau_s", lambda w: Sech.from_area(1.0, center_s=0.0, tau_s=w)),
        ("duration_s", lambda w: PiecewiseConstant(np.ones(2), None, 0.0, w)),
        ("duration_s", lambda w: PiecewiseConstant.square(1.0, center_s=0.0, duration_s=w)),
        ("sigma_s", lambda w: Gaussian(1.0, 0.0, jnp.array([1e-5, w]))),
    ],
)
def test_a_bad_width_is_refused_in_a_sentence(name, make, bad):
    with pytest.raises(ValueError, match=rf"^`{name}` must be positive and finite, but is .*; give it in seconds\.$"):
        make(bad)


def test_slices_without_an_axis_are_refused():
    with pytest.raises(ValueError, match=r"`real_rad_s` must have a leading axis of slices"):
        PiecewiseConstant(1.0, None, 0.0, 1e-5)

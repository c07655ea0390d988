"""Limits of the generator hold exactly for every raw number, and what is played follows from exact integrals."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from scipy.integrate import quad
from scipy.special import ndtr

from calibration.hardware import Hardware
from calibration.smoothing import box, kaiser_window, smoothing_kernel
from twin.waveform import Waveform

SAMPLE_S = 1e-7
FULL = (2e6, 5e5)  # rad/s
# The slew of a swing across full scale in 25 and in 10.4 samples.
HARDWARE = Hardware(SAMPLE_S, FULL, (2 * FULL[0] / 25 / SAMPLE_S, 2 * FULL[1] / 10.4 / SAMPLE_S))
RIM = np.pi / 2  # modulus of raw numbers at the rim of the disc
BANDED = dataclasses.replace(HARDWARE, bandwidth_hz=1e6, attenuation_db=50.0, bits=14)


def raw_numbers(seed, samples, batch=(), size=1.0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(size * rng.normal(size=(samples, 2, *batch))) for _ in range(2))


@st.composite
def limits(draw):
    bits = draw(st.sampled_from([None, 8, 10, 14, 16]))
    real_only = draw(st.booleans())
    lsb = 0.0 if bits is None else 1 / (2 ** (bits - 1) - 1)
    slew = []
    for full in FULL:
        # Of full scale in one sample: from no limit down to little more than the rounding.
        share = draw(st.one_of(st.just(math.inf), st.floats(0.02, 2.5)))
        slew.append((share + 1.5 * lsb) * full / SAMPLE_S)
    worst_db = 20 * math.log10(1 / lsb) if lsb else 90.0
    return {
        "sample_s": SAMPLE_S,
        "largest_rad_s": FULL,
        "slew_rad_s2": tuple(slew),
        "bandwidth_hz": draw(st.one_of(st.none(), st.floats(0.03, 0.49).map(lambda share: share / SAMPLE_S))),
        "attenuation_db": draw(st.floats(5.0, worst_db - 1)),
        "real_only": real_only,
        "zero_ends": draw(st.booleans()),
        "bits": bits,
    }


def excess(hardware, waveform):
    """Largest relative excess over each limit, written down here a second time, on other frequencies."""
    x = np.asarray(waveform.real_rad_s) + 1j * np.asarray(waveform.imag_rad_s)
    full = np.asarray(hardware.largest_rad_s)[:, None]
    slew = np.asarray(hardware.slew_rad_s2)[:, None]
    steps = np.abs(np.diff(np.concatenate([0 * x[:1], x, 0 * x[:1]]), axis=0))
    worst = [np.max(np.abs(x) / full), np.max(steps / (slew * hardware.sample_s))]
    if hardware.bandwidth_hz is not None:
        cycles = np.linspace(hardware.bandwidth_hz * hardware.sample_s, 0.5, 173)
        cycles = np.concatenate([cycles, -cycles])
        transform = np.tensordot(np.exp(-2j * np.pi * np.outer(cycles, np.arange(len(x)))), x, 1)
        worst.append(np.max(np.abs(transform) / full) / len(x) * 10 ** (hardware.attenuation_db / 20))
    return max(worst) - 1


@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(limits(), st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 30.0, 1e200]), st.booleans())
def test_limits_hold_for_all_raw_numbers_before_and_after_rounding(limits, seed, size, bang_bang):
    hardware = Hardware(**limits)
    real, imag = raw_numbers(seed, 23, (2,), size)
    if bang_bang:
        real, imag = (size * jnp.sign(raw) for raw in (real, imag))
    waveform = hardware.allowed(real, None if hardware.real_only else imag)
    rounded = hardware.quantized(waveform)
    assert hardware.raw_samples(waveform.samples) == 23
    for version in (waveform, rounded):
        assert excess(hardware, version) <= 1e-12
        broken = hardware.violations(version)
        if hardware.bits is not None and version is waveform:
            assert broken.pop("levels_rad_s") > 0
        assert broken == dict.fromkeys(broken, 0.0)
        if hardware.zero_ends:
            assert not np.any(version.real_rad_s[jnp.array([0, -1])])
        if hardware.real_only:
            assert not np.any(version.imag_rad_s)


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([6, 8, 12]), st.booleans(), st.floats(0.05, 1.9))
def test_the_worst_swing_stays_within_the_slew_after_rounding(bits, real_only, share):
    lsb = 1 / (2 ** (bits - 1) - 1)
    hardware = Hardware(1.0, (1.0,), (share + 1.5 * lsb,), real_only=real_only, bits=bits)
    half = len(hardware.allowed(jnp.zeros((1, 1)), None if real_only else jnp.zeros((1, 1))).real_rad_s)
    # Every phase of the swing against the levels, and every direction.
    scale = jnp.linspace(1.2, RIM, 40)
    swing = jnp.concatenate([-jnp.ones((half, 1, 1)), jnp.ones((half, 1, 1))]) * scale
    angle = 0.0 if real_only else jnp.linspace(-1.5, 1.5, 40)
    turned = None if real_only else swing * jnp.sin(angle)
    swing = swing * jnp.cos(angle)
    assert excess(hardware, hardware.quantized(hardware.allowed(swing, turned))) <= 1e-12


@pytest.mark.parametrize("bits", [None, 9])
def test_tones_in_the_stop_band_just_keep_the_attenuation(bits):
    hardware = Hardware(1.0, (1.0,), (math.inf,), bandwidth_hz=0.2, attenuation_db=40.0, bits=bits)
    tones = 2 * np.pi * np.outer(np.arange(150), np.linspace(0.2, 0.5, 61))[:, None]
    waveform = hardware.allowed(jnp.asarray(RIM * np.cos(tones)), jnp.asarray(RIM * np.sin(tones)))
    assert -0.25 - 0.5 * (bits is not None) < excess(hardware, waveform) <= 1e-12
    assert excess(hardware, hardware.quantized(waveform)) <= 1e-12
    assert hardware.violations(hardware.quantized(waveform))["stop_band_db"] == 0


def test_rounding_has_its_share_of_the_stop_band():
    # A leak of half a bit is rounded to a whole one, 1/7 of full scale: more than 17.7 dB.
    for edge in (0.3, 0.4, 0.45):
        hardware = Hardware(1.0, (1.0,), (math.inf,), edge, 17.7, real_only=True, bits=4)
        tones = 2 * np.pi * np.outer(np.arange(150), np.linspace(edge, 0.5, 61))[:, None]
        assert excess(hardware, hardware.quantized(hardware.allowed(jnp.asarray(np.arcsin(np.cos(tones)))))) <= 1e-12


def test_bang_bang_reaches_full_scale_and_the_slew_limit():
    for hardware in (HARDWARE, dataclasses.replace(HARDWARE, real_only=True)):
        raw = jnp.concatenate([jnp.full((80, 2), -RIM), jnp.full((80, 2), RIM)])
        waveform = hardware.allowed(raw, None if hardware.real_only else jnp.zeros_like(raw))
        full, slew = np.asarray(FULL), np.asarray(hardware.slew_rad_s2)
        np.testing.assert_array_less(0.999 * full, waveform.peak_rad_s)
        np.testing.assert_array_less(waveform.peak_rad_s, full)
        np.testing.assert_allclose(waveform.largest_slew_rad_s2, slew, rtol=2e-6)
        np.testing.assert_array_less(waveform.largest_slew_rad_s2, slew)


def test_full_scale_is_a_level():
    hardware = Hardware(SAMPLE_S, FULL, (math.inf, math.inf), real_only=True, bits=5)
    rounded = hardware.quantized(hardware.allowed(jnp.full((4, 2), RIM)))
    np.testing.assert_array_equal(rounded.peak_rad_s, FULL)


@pytest.mark.parametrize("zero_ends", [True, False])
def test_no_limit_but_the_disc_costs_no_time(zero_ends):
    free = Hardware(SAMPLE_S, FULL, (math.inf, math.inf), zero_ends=zero_ends)
    real, imag = raw_numbers(1, 7)
    waveform = free.allowed(real, imag)
    assert waveform.samples == 7 + 2 * zero_ends
    inner = waveform.real_rad_s[1:-1] if zero_ends else waveform.real_rad_s
    np.testing.assert_allclose(
        inner, np.asarray(FULL) * real * np.sinc(np.hypot(real, imag) / np.pi), rtol=1e-11, atol=1e-9
    )


@pytest.mark.parametrize("edge_cycles", [0.45, 0.21, 0.02])
@pytest.mark.parametrize("attenuation_db", [6.0, 30.0, 70.0, 120.0])
def test_kernels_are_nonnegative_and_attenuate(edge_cycles, attenuation_db):
    leak = 10 ** (-attenuation_db / 20)
    for largest in (math.inf, 0.013):
        kernel = smoothing_kernel(largest, edge_cycles, leak)
        assert np.all(kernel >= 0) and np.sum(kernel) == pytest.approx(1, abs=1e-14)
        np.testing.assert_allclose(kernel, kernel[::-1], rtol=0, atol=1e-16)
        rise = np.diff(kernel[: len(kernel) // 2 + 1])
        assert len(kernel) % 2 and np.all(rise >= -1e-16)  # unimodal: the slew is twice the largest weight
        assert np.max(kernel) <= largest * (1 + 1e-14)
        cycles = np.linspace(edge_cycles, 0.5, 1501)
        assert np.max(np.abs(np.exp(-2j * np.pi * np.outer(cycles, np.arange(len(kernel)))) @ kernel)) <= leak
    # A shorter window of this shape would not do: the next one down leaks at the edge, if not beyond.
    assert len(kaiser_window(edge_cycles, leak)) <= 3 + (attenuation_db / 20 + 2) / edge_cycles


def test_box_is_the_mean_over_any_width():
    np.testing.assert_allclose(box(1.0), [1.0])
    np.testing.assert_allclose(box(2.0), [0.25, 0.5, 0.25])
    np.testing.assert_allclose(box(3.5), np.array([0.25, 1, 1, 1, 0.25]) / 3.5)


@pytest.mark.parametrize("size", [0.0, 0.7, 50.0])
def test_gradient_of_allowed(size):
    hardware = dataclasses.replace(BANDED, bandwidth_hz=3e6, attenuation_db=30.0)
    real, imag = raw_numbers(3, 6, size=size)

    def scaled(a, b):
        waveform = hardware.allowed(jnp.asarray(a), jnp.asarray(b))
        return waveform.real_rad_s / 1e6, waveform.imag_rad_s / 1e6

    check_grads(scaled, (real, imag), order=2 if size == 0.7 else 1, modes=["rev"], atol=1e-5, rtol=1e-5, eps=1e-4)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.jacobian(scaled, (0, 1))(real, imag)[0])


def test_gradient_stays_finite_for_huge_numbers():
    loss = lambda raw: jnp.sum(HARDWARE.allowed(raw, raw).real_rad_s ** 2)
    assert np.all(np.isfinite(jax.grad(loss)(jnp.full((3, 2), 1e100))))


def test_a_waveform_at_rest_has_finite_gradients():
    def loss(raw):
        waveform = HARDWARE.played(HARDWARE.allowed(raw, raw), 2)
        amplitude = waveform.spectrum().amplitude_rad
        return jnp.sum(waveform.peak_rad_s) + jnp.sum(waveform.largest_slew_rad_s2) + jnp.sum(amplitude)

    assert np.all(np.isfinite(jax.grad(loss)(jnp.zeros((3, 2)))))


def test_start_from_a_feasible_waveform():
    t = np.arange(300) * SAMPLE_S
    envelope = np.exp(-0.5 * ((t - t.mean()) / 3.3e-6) ** 2) * np.linspace(0, 1, 300)
    target = 0.7 * np.stack([envelope, envelope], axis=1) * np.asarray(FULL)
    target[[0, -1]] = 0.0
    for hardware, phase in ((BANDED, 0.4), (dataclasses.replace(BANDED, real_only=True), 0.0)):
        waveform = Waveform(target * np.cos(phase), target * np.sin(phase), SAMPLE_S)
        again = hardware.allowed(*hardware.unconstrained(waveform))
        assert again.samples == 300
        for part in ("real_rad_s", "imag_rad_s"):
            error = np.asarray(getattr(again, part) - getattr(waveform, part)) / FULL
            assert np.max(np.abs(error)) < 2e-3


def test_a_start_from_too_much_is_the_nearest_that_is_allowed():
    square = jnp.full((120, 2), 1.5) * jnp.asarray(FULL)
    raw, _ = HARDWARE.unconstrained(Waveform(square, 0 * square, SAMPLE_S))
    waveform = HARDWARE.allowed(raw, 0 * raw)
    assert np.all(np.isfinite(raw))
    np.testing.assert_array_less(0.98 * np.asarray(FULL), waveform.peak_rad_s)


def test_rounding_error_is_half_a_bit_at_most():
    waveform = BANDED.allowed(*raw_numbers(5, 40, (3,)))
    rounded = BANDED.quantized(waveform)
    bit = np.asarray(BANDED.bit_rad_s)[:, None]
    np.testing.assert_allclose(bit[:, 0] * (2**13 - 1), FULL)
    for part in ("real_rad_s", "imag_rad_s"):
        error = np.abs(getattr(rounded, part) - getattr(waveform, part)) / bit
        assert 0.45 < np.max(error) <= 0.5 * (1 + 1e-9)
        codes = np.asarray(getattr(rounded, part)) / bit
        np.testing.assert_allclose(codes, np.rint(codes), atol=1e-9)
    assert BANDED.quantized(rounded).real_rad_s.tolist() == rounded.real_rad_s.tolist()
    assert HARDWARE.quantized(waveform) is waveform


def test_straight_through_has_the_gradient_of_no_rounding():
    real, imag = (part * 1e5 for part in raw_numbers(6, 5))
    through = lambda a, flag: BANDED.quantized(Waveform(a, imag, SAMPLE_S), straight_through=flag).real_rad_s
    assert through(real, True).tolist() == through(real, False).tolist()
    weights = jnp.arange(10.0).reshape(5, 2)
    gradient = lambda flag: jax.grad(lambda a: jnp.sum(weights * through(a, flag)))(real)
    np.testing.assert_array_equal(gradient(True), weights)
    np.testing.assert_array_equal(gradient(False), 0 * weights)


def test_played_step_rises_as_stated():
    hardware = dataclasses.replace(HARDWARE, rise_s=3e-7)
    step = jnp.ones((60, 2)) * jnp.asarray([1e5, 2e5])
    played = hardware.played(Waveform(step, -step, SAMPLE_S, 5e-6), 50)
    fine_s = SAMPLE_S / 50
    middle_s = played.start_s + fine_s * (np.arange(played.samples) + 0.5)
    rising = np.asarray(played.real_rad_s[:, 1] / 2e5)[: played.samples // 2]
    at_10, at_90 = np.interp([0.1, 0.9], rising, middle_s[: len(rising)])
    assert at_90 - at_10 == pytest.approx(3e-7, rel=1e-4)
    assert 0.5 * (at_10 + at_90) == pytest.approx(5e-6, abs=1e-10)
    np.testing.assert_allclose(rising, hardware.step_response(middle_s[: len(rising)] - 5e-6), atol=1e-5)
    np.testing.assert_allclose(played.imag_rad_s, -played.real_rad_s, atol=1e-9)


@pytest.mark.parametrize("oversampling", [1, 4])
def test_played_samples_are_means_of_the_smoothed_drive(oversampling):
    hardware = dataclasses.replace(HARDWARE, rise_s=1.3e-7)
    held = np.array([0.0, 3e5, -1e5, 2e5, 0.0])
    played = hardware.played(Waveform(np.stack([held, held], 1), np.zeros((5, 2)), SAMPLE_S), oversampling)
    sigma_s = 1.3e-7 / 2.5631031310892007
    drive = lambda t: sum(
        height * (ndtr((t - k * SAMPLE_S) / sigma_s) - ndtr((t - (k + 1) * SAMPLE_S) / sigma_s))
        for k, height in enumerate(held)
    )
    fine_s = SAMPLE_S / oversampling
    edges = float(played.start_s) + fine_s * np.arange(played.samples + 1)
    means = [quad(drive, a, b, epsabs=1e-9)[0] / fine_s for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(played.real_rad_s[:, 0], means, atol=1e-9 * 3e5)


def test_played_keeps_the_area_and_mixes_the_channels():
    mixing = np.array([[1.0, 0.03j], [-0.02 + 0.01j, 0.9]])
    hardware = dataclasses.replace(HARDWARE, rise_s=2e-7, mixing_real=mixing.real, mixing_imag=mixing.imag)
    waveform = hardware.allowed(*raw_numbers(8, 12, (2,)))
    played = hardware.played(waveform, 3)
    total = lambda w: np.sum(np.asarray(w.real_rad_s) + 1j * np.asarray(w.imag_rad_s), axis=0) * float(w.sample_s)
    np.testing.assert_allclose(total(played), mixing @ total(waveform), rtol=1e-12)
    np.testing.assert_allclose(played.area_rad, (mixing @ total(waveform)).real, rtol=1e-12)
    assert played.duration_s > waveform.duration_s


def test_a_perfect_modulator_repeats_the_samples():
    waveform = HARDWARE.allowed(*raw_numbers(9, 4))
    played = HARDWARE.played(waveform, 3)
    assert played.real_rad_s.tolist() == np.repeat(waveform.real_rad_s, 3, axis=0).tolist()
    assert float(played.start_s) == 0 and float(played.sample_s) == pytest.approx(SAMPLE_S / 3)
    np.testing.assert_array_equal(HARDWARE.step_response(jnp.array([-1.0, 0.0, 1.0])), [0, 0.5, 1])


def test_gradient_of_played():
    base = dataclasses.replace(HARDWARE, rise_s=2e-7)

    def drive(real, imag, share_real, share_imag):
        hardware = dataclasses.replace(base, mixing_real=share_real, mixing_imag=share_imag)
        played = hardware.played(Waveform(real, imag, SAMPLE_S), 2)
        return played.real_rad_s, played.imag_rad_s

    matrices = jnp.array([[1.0, 0.1], [0.2, 0.8]]), jnp.array([[0.0, 0.3], [-0.1, 0.2]])
    check_grads(drive, (*raw_numbers(10, 4), *matrices), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_violations_name_what_is_broken_and_by_how_much():
    hardware = Hardware(1.0, (1.0,), (0.5,), bandwidth_hz=0.25, attenuation_db=14.0, real_only=True, bits=3)
    x = np.array([0.0, 0.0, 1.25, 0.0, 0.1])[:, None]
    broken = hardware.violations(Waveform(x, 0.2 * (x > 1), 2.0))
    modulus = math.hypot(1.25, 0.2)
    assert broken["sample_s"] == 1.0
    assert broken["largest_rad_s"] == pytest.approx(modulus - 1)
    assert broken["slew_rad_s2"] == pytest.approx(modulus / 2 - 0.5)
    assert broken["zero_ends_rad_s"] == pytest.approx(0.1)
    assert broken["imag_rad_s"] == pytest.approx(0.2)
    assert broken["levels_rad_s"] == pytest.approx(math.hypot(1.25 - 4 / 3, 0.2 - 1 / 3))
    # A single sample has a flat spectrum; the last one adds to it, at most, its own height.
    assert (
        20 * math.log10((modulus - 0.1) / 5) + 14 < broken["stop_band_db"] < 20 * math.log10((modulus + 0.1) / 5) + 14
    )
    # The steps from zero and to zero count, each on the clock of the waveform.
    for fast in ([0.4, 0.3, 0.2], [0.2, 0.3, 0.4]):
        fast = np.array(fast)[:, None]
        assert hardware.violations(Waveform(fast, 0 * fast, 0.5))["slew_rad_s2"] == pytest.approx(0.3)


def test_waveform_describes_itself():
    x, y = np.array([[0.0, 0.0], [3.0, 1.0], [-1.0, 0.0], [2.0, 0.0]]), np.zeros((4, 2))
    y[1, 0] = 4.0
    waveform = Waveform(x, y, 0.5, -1.0)
    assert (waveform.samples, waveform.channels, float(waveform.duration_s)) == (4, 2, 2.0)
    np.testing.assert_allclose(waveform.area_rad, [2.0, 0.5])
    np.testing.assert_allclose(waveform.peak_rad_s, [5.0, 1.0])
    np.testing.assert_allclose(waveform.largest_slew_rad_s2, [2 * math.hypot(4, 4), 2.0])
    np.testing.assert_allclose(Waveform(x[1:], y[1:], 0.5).largest_slew_rad_s2, [2 * math.hypot(4, 4), 2.0])
    ends = np.array([[3.0], [2.5], [2.6]])
    np.testing.assert_allclose(Waveform(ends, 0 * ends, 0.5).largest_slew_rad_s2, [6.0])
    np.testing.assert_allclose(Waveform(ends[::-1], 0 * ends, 0.5).largest_slew_rad_s2, [6.0])
    frequency_hz, amplitude_rad = waveform.spectrum()
    np.testing.assert_allclose(frequency_hz, [-1.0, -0.5, 0.0, 0.5])
    np.testing.assert_allclose(amplitude_rad[2], np.hypot([2.0, 0.5], [2.0, 0.0]))
    tone = np.exp(2j * np.pi * 0.5 * 0.5 * np.arange(4))[:, None]
    np.testing.assert_allclose(
        Waveform(tone.real, tone.imag, 0.5).spectrum().amplitude_rad[:, 0], [0, 0, 0, 2], atol=1e-12
    )


def test_batches_may_have_clocks_of_their_own():
    x = jnp.ones((3, 2, 4))
    waveform = Waveform(x, x, jnp.array([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(waveform.area_rad, [[3.0, 6.0, 9.0, 12.0]] * 2)
    frequency_hz, amplitude_rad = waveform.spectrum()
    assert frequency_hz.shape == (3, 4) and amplitude_rad.shape == (3, 2, 4)
    np.testing.assert_allclose(waveform.largest_slew_rad_s2[0], math.sqrt(2) / np.arange(1, 5))


def changed(**fields):
    return lambda: dataclasses.replace(HARDWARE, **fields)


ONES = np.ones((4, 2))
REFUSED = [
    (changed(sample_s=0.0), r"`sample_s` must be positive and finite, but is 0.0; give it in seconds\."),
    (changed(largest_rad_s=(1.0, -1.0)), r"`largest_rad_s` must be positive and finite, but is -1.0; give it in rad/s"),
    (changed(slew_rad_s2=(1e12, math.nan)), r"`slew_rad_s2` must be positive, but is nan; give infinity"),
    (changed(slew_rad_s2=(1e12,)), r"`slew_rad_s2` has 1 values for 2 channels; give one a channel\."),
    (changed(rise_s=-1e-9), r"`rise_s` must be zero or positive, and finite, but is -1e-09"),
    (
        changed(bandwidth_hz=5e6),
        r"`bandwidth_hz` must be .* half the sample clock, 5e\+06 Hz, but is 5e\+06; give None",
    ),
    (changed(attenuation_db=0.0), r"`attenuation_db` must be positive and at most 200, but is 0.0"),
    (changed(bits=1), r"`bits` must lie between 2 and 32, but is 1; give None for no levels\."),
    (changed(mixing_real=np.eye(3)), r"`mixing_real` must have shape \(2, 2\), but has \(3, 3\)"),
    (changed(mixing_imag=np.full((2, 2), np.nan)), r"`mixing_imag` must be finite, but is nan"),
    (
        changed(bits=4),
        r"`slew_rad_s2` of channel 0 allows 160000 rad/s a sample, .* bits of 285714 rad/s; give a higher",
    ),
    (changed(bits=9, bandwidth_hz=1e6), r"`attenuation_db` of 60 lies below the rounding of 9 bits, 51.1 dB at worst"),
    (changed(bits=9, bandwidth_hz=1e6, attenuation_db=51.2), r"lies below the rounding of 9 bits"),
    (lambda: HARDWARE.raw_samples(28), r"a waveform of 28 samples has no time to rise and fall .*; give at least 29"),
    (lambda: HARDWARE.allowed(jnp.ones((4, 3)), jnp.ones((4, 3))), r"`raw_real` must have shape \(raw samples, 2, "),
    (
        lambda: HARDWARE.allowed(jnp.ones((4, 2))),
        r"`raw_imag` must be None if and only .*; give the imaginary part too\.",
    ),
    (
        lambda: changed(real_only=True)().allowed(jnp.ones((4, 2)), jnp.ones((4, 2))),
        r"`raw_imag` must .*; leave it out\.",
    ),
    (
        lambda: HARDWARE.played(Waveform(ONES, ONES, 2e-7), 2),
        r"`sample_s` of the waveform is 2e-07, .* hardware 1e-07; ",
    ),
    (lambda: HARDWARE.played(Waveform(ONES, ONES, SAMPLE_S), 0), r"`oversampling` must be at least 1, but is 0"),
    (
        lambda: HARDWARE.violations(Waveform(ONES[:, :1], ONES[:, :1], 1.0)),
        r"the waveform has 1 channels, but .* 2; give",
    ),
    (
        lambda: BANDED.quantized(Waveform(6e5 * ONES, ONES, SAMPLE_S)),
        r"`real_rad_s / largest_rad_s` must be .* is 1.2; ",
    ),
    (lambda: Waveform(np.ones(3), np.ones(3), 1.0), r"`real_rad_s` must have axes of samples and channels, .* \(3,\)"),
    (
        lambda: Waveform(ONES, ONES[:3], 1.0),
        r"`imag_rad_s` must have the shape \(4, 2\) .*, but has \(3, 2\); give zeros",
    ),
    (
        lambda: Waveform(ONES * np.inf, ONES, 1.0),
        r"`real_rad_s` must be finite, but is inf; give every sample a number",
    ),
    (lambda: Waveform(ONES, ONES, -1.0), r"`sample_s` must be positive and finite, but is -1.0"),
    (
        lambda: Waveform(ONES, ONES, np.ones(2)),
        r"`sample_s` has the batch shape \(2,\), but the samples have \(\); give",
    ),
]


@pytest.mark.parametrize(("wrong", "sentence"), REFUSED)
def test_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong()

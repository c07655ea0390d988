"""The ion under sampled waveforms: against Gaussian pulses solved otherwise, its flags, motion and gradients."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

from twin.loop import Settings, run, sine_input, stream
from twin.memristor import IonMemristor, Lindblad
from twin.sampled import SampledIon, sampled
from twin.waveform import Waveform

SIGMA_S, SEPARATION_S = 20e-6, 120e-6
DEVICE = {"rabi_scale_1": 1.05, "rabi_scale_2": 0.96, "detuning_1_hz": 900.0, "detuning_2_hz": -600.0,
          "laser_linewidth_hz": 300.0, "readout_error_bright": 0.01, "readout_error_dark": 0.02}  # fmt: skip
X, R = (a.ravel() for a in np.meshgrid(np.linspace(0, 1, 4), np.linspace(0, 1, 3)))


def ion(**changes) -> IonMemristor:
    return tables.ion(**({"method": Lindblad(1e-9)} | DEVICE | changes))


def gaussians(slice_s: float, leak: float = 0.0) -> Waveform:
    """Two Gaussians of area pi over the window of the device, as means over slices; part of each on the other line."""
    edges = np.arange(round((2 * 100e-6 + SEPARATION_S) / slice_s) + 1) * slice_s - 100e-6
    cdf = lambda center: np.array([0.5 * math.erf((t - center) / (math.sqrt(2) * SIGMA_S)) for t in edges])
    one, two = (math.pi * np.diff(cdf(center)) / slice_s for center in (0.0, SEPARATION_S))
    lit = np.zeros((len(one), 2, 2))
    lit[:, 0, 0], lit[:, 1, 1] = one, two
    lit[:, 1, 0], lit[:, 0, 1] = leak * one, leak * two
    return Waveform(lit, np.zeros_like(lit), slice_s, -100e-6)


def made(slice_s=1e-6, device=None, **options) -> SampledIon:
    # A run of pulse 1 alone is read 100 us after its centre: no tail beyond the samples.
    device = dataclasses.replace(ion() if device is None else device, tail_s=0.0)
    return sampled(device, gaussians(slice_s), alone_slices=round(200e-6 / slice_s), **options)


@pytest.mark.parametrize("alone", [True, False])
def test_fine_samples_of_gaussians_are_gaussian_pulses(alone):
    """The error falls as the square of the sample time."""
    device = ion()
    exact = responses(device, alone).populations
    errors = []
    for slice_s in (2e-6, 1e-6):
        got = responses(made(slice_s), alone)
        assert np.all(got.valid)
        errors.append(np.max(np.abs(got.populations - exact)))
    assert errors[1] < 2e-5
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)


def responses(device, alone):
    settings = Settings(200.0, -100.0)
    x, r = jnp.asarray(X), jnp.asarray(R)
    return device.prepared(x, settings).under(settings)(x, r, alone=alone)


def test_a_tail_is_time_in_the_dark():
    short = made()
    long = sampled(ion(lifetime_s=2e-3), gaussians(1e-6), alone_slices=200, largest_hz=500.0)
    assert long.tail_slices > 0
    none = sampled(ion(lifetime_s=2e-3, tail_s=0.0), gaussians(1e-6), alone_slices=200)
    assert short.tail_slices == none.tail_slices == 0
    kept = responses(long, False).populations[1] / responses(none, False).populations[1]
    np.testing.assert_allclose(kept[X > 0], math.exp(-100e-6 / 2e-3), rtol=1e-6)


def test_loops_run_and_stream_alike():
    device = dataclasses.replace(made(device=ion(source="model")), tail_slices=0)
    x = sine_input(periods=1, cycles_per_period=8)
    whole = run(device, x)
    assert np.all(whole.valid) and whole.method == "sampled"
    np.testing.assert_allclose(stream(device, x).y, whole.y, atol=1e-12)


def test_thermal_motion_is_averaged_as_for_gaussians():
    warm = ion(n_bar=3.0, eta_1=0.08, eta_2=0.06, phonon_nodes=6)
    got = responses(made(device=warm), False).populations
    np.testing.assert_allclose(got, responses(warm, False).populations, atol=3e-5)


def test_leaked_light_drives_the_other_line():
    leaking = sampled(ion(tail_s=0.0), gaussians(1e-6, leak=0.1), alone_slices=200)
    clean, leaked = (responses(device, True).populations for device in (made(), leaking))
    # Pulse 1 alone now moves some of s on to m.
    assert np.all(leaked[2][X > 0] > 2 * clean[2][X > 0])


def test_cycles_beyond_what_was_laid_are_flagged():
    device = made()
    loud = Waveform(1.5 * device.real_rad_s, 1.5 * device.imag_rad_s, 1e-6)
    got = responses(device.playing(loud), False)
    full = (X == 1) & (R == 1)
    assert not np.any(got.valid[full])
    assert np.all(got.valid[(X < 0.3) & (R < 0.3)])
    assert np.isnan(got.populations[:, full]).all()
    roomy = made(largest_rad_s=tuple(2 * np.max(np.abs(device.real_rad_s), axis=(0, 2))))
    assert np.all(responses(roomy.playing(loud), False).valid)


def test_gradients_of_samples_and_device_are_finite_differences():
    device = made(4e-6)

    @jax.jit
    def output(size, scale, detuning_hz):
        one = Waveform(size * device.real_rad_s, device.imag_rad_s, 4e-6)
        played = dataclasses.replace(
            device.playing(one),
            ion=dataclasses.replace(device.ion, rabi_scale_1=scale, detuning_2_hz=detuning_hz),
        )
        return jnp.sum(jnp.where(jnp.asarray(R) < 1, responses_sum(played), 0.0))

    args = (jnp.asarray(0.9), jnp.asarray(0.95), jnp.asarray(-500.0))
    slopes = jax.grad(output, argnums=(0, 1, 2))(*args)
    for k, (value, slope) in enumerate(zip(args, slopes, strict=True)):
        step = 1e-4 * abs(float(value))
        high, low = (output(*(v + d * (j == k) for j, v in enumerate(args))) for d in (step, -step))
        assert float(slope) == pytest.approx(float(high - low) / (2 * step), rel=1e-4)


def responses_sum(device):
    return device.under(Settings(0.0, 0.0))(jnp.asarray(X), jnp.asarray(R), alone=False).populations[1]


def test_drives_without_the_axis_of_channels_are_refused():
    flat = Waveform(np.ones((5, 2)), np.zeros((5, 2)), 1e-6)
    with pytest.raises(ValueError, match="light one channel at a time"):
        sampled(ion(), flat, alone_slices=3)

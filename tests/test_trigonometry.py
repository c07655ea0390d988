"""Sine, cosine and areas of our own against NumPy's, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twin.trigonometry import cos_sin, transfer_area


@pytest.mark.parametrize("largest", [1e-3, 1.0, 10.0, 1e3, 1e6])
def test_values(largest):
    angle = np.random.default_rng(0).uniform(-largest, largest, 20_000)
    cos, sin = jax.jit(cos_sin)(angle)
    np.testing.assert_allclose(cos, np.cos(angle), rtol=0, atol=3e-16)
    np.testing.assert_allclose(sin, np.sin(angle), rtol=0, atol=3e-16)


def test_multiples_of_a_quarter_turn():
    angle = np.arange(-40, 41) * np.pi / 2
    np.testing.assert_allclose(np.stack(cos_sin(jnp.asarray(angle))), [np.cos(angle), np.sin(angle)], atol=3e-16)


def test_derivatives_in_both_modes():
    angle = jnp.linspace(-20.0, 20.0, 101)
    for k, expected in ((0, -jnp.sin(angle)), (1, jnp.cos(angle))):
        forward = jax.jvp(lambda a, k=k: cos_sin(a)[k], (angle,), (jnp.ones_like(angle),))[1]
        reverse = jax.grad(lambda a, k=k: jnp.sum(cos_sin(a)[k]))(angle)
        np.testing.assert_allclose(forward, expected, atol=1e-15)
        np.testing.assert_allclose(reverse, expected, atol=1e-15)
    second = jax.vmap(jax.hessian(lambda a: cos_sin(a)[0]))(angle)
    np.testing.assert_allclose(second, -jnp.cos(angle), atol=1e-15)


def test_what_is_no_number_stays_none():
    assert np.isnan(cos_sin(jnp.array([jnp.nan, jnp.inf]))).all()


def test_areas_of_transfers():
    x = np.concatenate([np.linspace(0, 1, 20_001), np.logspace(-300, -1, 300)])
    expected = 2 * np.arctan2(np.sqrt(x), np.sqrt(1 - x))
    found = np.asarray(jax.jit(transfer_area)(x))
    np.testing.assert_allclose(found, expected, rtol=3e-15, atol=0)
    # Near a full transfer it is the rest that counts.
    rest = np.logspace(-12, -1, 100)
    np.testing.assert_allclose(
        np.pi - np.asarray(transfer_area(jnp.asarray(1 - rest))), 2 * np.arcsin(np.sqrt(1 - (1 - rest))), atol=5e-16
    )


def test_derivatives_of_areas():
    x = jnp.linspace(0.0, 1.0, 101)
    inside = slice(1, -1)
    slope, bend = (jax.vmap(f)(x) for f in (jax.grad(transfer_area), jax.grad(jax.grad(transfer_area))))
    np.testing.assert_allclose(slope[inside], 1 / np.sqrt(x * (1 - x))[inside], rtol=1e-14)
    np.testing.assert_allclose(
        bend[inside], -0.5 * ((1 - 2 * x) / (x * (1 - x)) ** 1.5)[inside], rtol=1e-12, atol=1e-12
    )
    assert np.all(np.asarray(slope)[[0, -1]] == 0) and np.all(np.isfinite(np.asarray(bend)))

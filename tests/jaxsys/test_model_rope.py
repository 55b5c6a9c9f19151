"""Rotary embedding against the formula written out pair by pair."""

import dataclasses
import math

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxsys.model import DecoderConfig, preset
from jaxsys.model.rope import Llama3RopeScaling, Rope, inverse_frequencies, rotary_tables, rotate

SCALING = Llama3RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)


def rope_of(config: DecoderConfig) -> Rope:
    rope = config.rope()
    assert rope is not None
    return rope


def plain_frequency(index, config):
    """The inverse frequency of pair `index`, as Llama 3.1 describes it, case by case."""
    frequency = 1.0 / config.rope_theta ** (2 * index / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    original = scaling.original_max_positions
    if wavelength < original / scaling.high_freq_factor:
        return frequency
    if wavelength > original / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


@pytest.mark.parametrize("scaling", [None, SCALING])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotation_is_the_formula(scaling, theta):
    config = dataclasses.replace(
        preset("tiny"), head_dim=64, rope_theta=theta, rope_scaling=scaling
    )
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 5, 3, 64)).astype(np.float32)
    positions = generator.integers(0, 3000, size=(2, 5)).astype(np.int32)
    expected = np.zeros_like(x)
    half = config.head_dim // 2
    for b, t, n in np.ndindex(2, 5, 3):
        for i in range(half):
            angle = positions[b, t] * plain_frequency(i, config)
            first, second = x[b, t, n, i], x[b, t, n, i + half]
            expected[b, t, n, i] = first * math.cos(angle) - second * math.sin(angle)
            expected[b, t, n, i + half] = second * math.cos(angle) + first * math.sin(angle)
    typed = jaxtyping.jaxtyped(rotate, typechecker=beartype.beartype)
    got = typed(jnp.asarray(x), *rotary_tables(jnp.asarray(positions), rope_of(config)))
    # float32 holds angles up to 3000 to 1.2e-4 radians.
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_llama_31_scaling_touches_all_three_bands():
    config = dataclasses.replace(
        preset("tiny"), head_dim=128, rope_theta=500000.0, rope_scaling=SCALING
    )
    ratio = inverse_frequencies(rope_of(dataclasses.replace(config, rope_scaling=None))) / (
        inverse_frequencies(rope_of(config))
    )
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(8.0)
    assert np.sum((ratio > 1.0001) & (ratio < 7.9999)) > 0
    assert np.all(np.diff(ratio) >= -1e-12)


def test_rotation_keeps_bfloat16_but_angles_do_not_suffer():
    config = dataclasses.replace(preset("tiny"), head_dim=64)
    positions = jnp.full((1, 1), 4097, jnp.int32)  # not representable in bfloat16
    x = jnp.ones((1, 1, 1, 64), jnp.bfloat16)
    got = rotate(x, *rotary_tables(positions, rope_of(config)))
    wide = rotate(x.astype(jnp.float32), *rotary_tables(positions, rope_of(config)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), wide, atol=2**-7)


@pytest.mark.parametrize(
    "rope",
    [
        Rope(theta=10000.0, width=128),
        Rope(theta=500000.0, width=64, scaling=SCALING),
        Rope(theta=10.0, width=16, interleaved=True),
    ],
)
def test_angles_are_exact_at_any_position(rope):
    """Within 1e-6 of float64's, compiled or not, where float32 products are off by 0.3."""
    places = [0, 1, 4095, 99_999, 100_003, 999_999, 9_999_999, 10_000_000, 2**31 - 2, -1, -70_000]
    positions = np.array([places], np.int32)
    angles = positions.astype(np.float64)[..., None, None] * inverse_frequencies(rope)
    for made in (rotary_tables, jax.jit(rotary_tables, static_argnums=1)):
        cosines, sines = made(jnp.asarray(positions), rope)
        np.testing.assert_allclose(cosines, np.cos(angles), atol=1e-6, rtol=0)
        np.testing.assert_allclose(sines, np.sin(angles), atol=1e-6, rtol=0)

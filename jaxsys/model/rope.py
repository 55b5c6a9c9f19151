"""Rotary position embedding: pairs (i, i + K/2) of a head turn by position / theta^(2i/K).

    y[i]       = x[i] cos(p w_i) - x[i + K/2] sin(p w_i)
    y[i + K/2] = x[i + K/2] cos(p w_i) + x[i] sin(p w_i),    w_i = theta^(-2i/K)

The half-split pairing is that of Hugging Face checkpoints. Su et al., arXiv 2104.09864; the
stretching of long wavelengths is Llama 3.1's. Angles are float32 whatever the model's dtype.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsys.model.config import DecoderConfig


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """w_i in radians a position, [K/2], float64 on the host: a constant of the compiled step."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    # 0 where the wavelength exceeds original/low, 1 below original/high, linear between.
    keep = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    keep = np.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotary_tables(
    positions: Int[Array, "B T"], config: DecoderConfig
) -> tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]:
    """Cosines and sines of every position, float32 [B, T, 1, K/2], ready to meet [B, T, N, K]."""
    frequencies = jnp.asarray(inverse_frequencies(config), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N K"], cosines: jax.Array, sines: jax.Array
) -> Float[Array, "B T N K"]:
    """Turns the heads of `x` [B, T, N, K]; computed in float32, returned in the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)

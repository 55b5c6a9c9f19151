"""Eight-bit floats: what a device computes with them, and the scale that makes numbers fit.

    x ~ values * scale,  scale = max |x| / largest, over the whole array or each row of it

e4m3fn reaches to 448 with three bits behind the point, e5m2 to 57344 with two (Micikevicius et al.,
2209.05433). The scale is taken from the numbers at hand ("current scaling"). Casts in JAX give NaN
past the largest number, where those of PyTorch stop at it: what is scaled never passes it, and what
is not a number stays none.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxsys.mesh import Device

E4M3 = jnp.float8_e4m3fn
E5M2 = jnp.float8_e5m2
FRACTION_BITS = 23
"""Of float32, behind the point."""
LEAST_CAPABILITY = (8, 9)
"""CUDA compute capability from which tensor cores multiply eight-bit floats (Ada, Hopper)."""


class Answer(NamedTuple):
    """Whether a device multiplies eight-bit floats, and why in words."""

    computes: bool
    reason: str


def answer(device: Device) -> Answer:
    """Whether products of two eight-bit floats run on `device` as such."""
    if device.platform not in ("gpu", "cuda"):
        return Answer(False, f"{device.platform} has no products of float8")
    capability = str(getattr(device, "compute_capability", "0.0"))
    major, _, minor = capability.partition(".")
    if (int(major), int(minor or 0)) < LEAST_CAPABILITY:
        return Answer(False, f"compute capability {capability} is below 8.9")
    return Answer(True, f"compute capability {capability}")


def largest(dtype: DTypeLike) -> float:
    """The largest finite number of an eight-bit float or integer."""
    dtype = jnp.dtype(dtype)
    info = jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype)
    return float(info.max)


def scaled(
    x: jax.Array,
    dtype: DTypeLike,
    axis: int | tuple[int, ...] | None = None,
    *,
    powers: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """x as small numbers and float32 scales.

    Args:
        x: any shape.
        dtype: an eight-bit float, or int8.
        axis: over which a scale is shared; None: one for all.
        powers: scales are powers of two, see `power_of_two`.

    Returns:
        Values of the shape of `x`, and scales with `axis` kept as 1. All zero where x is; NaN where
        a scale's numbers are not all finite.
    """
    wide = x.astype(jnp.float32)
    scale = scale_of(jnp.max(jnp.abs(wide), axis=axis, keepdims=True), dtype, powers=powers)
    return cast(wide / scale, dtype), scale


def scale_of(most: jax.Array, dtype: DTypeLike, *, powers: bool = False) -> jax.Array:
    """The float32 scale of numbers whose largest is `most`, a power of two if asked for."""
    # A subnormal scale would divide to infinity where the device flushes it to zero.
    scale = jnp.where(most > 0, jnp.maximum(most / largest(dtype), 1e-30), 1.0)
    scale = power_of_two(scale) if powers else scale
    # NaN is above nothing: it must not take the scale of zeros.
    return jnp.where(jnp.isnan(most), most, scale)


def power_of_two(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """The least power of two that is not below a positive float32.

    Times such a scale eight-bit floats are numbers of bfloat16 and float32 as they are, and what is
    scaled again has the same numbers: nothing is rounded twice. A float's steps are as fine
    whatever the scale is, so that only numbers near zero lose up to a bit.
    """
    ones = jnp.uint32((1 << FRACTION_BITS) - 1)
    bits = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + ones) & ~ones, jnp.float32)


def cast(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """float32 to the nearest number of a small form; what is amid two integers goes up."""
    dtype = jnp.dtype(dtype)
    # Kernels of Triton have no rounding to the nearest integer.
    return (jnp.floor(x + 0.5) if jnp.issubdtype(dtype, jnp.integer) else x).astype(dtype)

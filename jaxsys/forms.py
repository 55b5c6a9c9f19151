"""The small forms of matrices: which a matrix takes, and the scales that lose least.

    w ~ number * scale

    fp8   e4m3, a scale an output
    int8  -127 to 127, a scale an output
    int4  -8 to 7, a scale for `GROUP` inputs of an output

Scales are tried: the end of a range costs the largest number its bits, or all others theirs. int4
has one number more below zero than above it, so its scales have the sign that puts a group's
largest there. Among
what is tried is every scale that numbers of the form may have, so that a matrix which was rounded
to it before, with care that a server has no time for (`jaxsys.model.calibration`), or which a file
holds in it, comes back number by number.

Legend: N outputs, K inputs, g inputs that share a scale.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys import float8

Form = Literal["int8", "fp8", "int4"]
FORMS: tuple[Form, ...] = get_args(Form)

GROUP = 32
"""Inputs that share a scale in int4. With 64 SmolLM2 diverges a third more."""
ENDS: dict[Form, tuple[float, ...]] = {
    "int8": (127.0,),
    # The numbers from half the range on.
    "fp8": tuple(float(end) for end in range(448, 255, -32)),
    "int4": (-8.0, -7.0, -7.5, -8.4, -8.9, -9.5, -10.0, *(float(end) for end in range(-6, 0))),
}
"""What the largest number that shares a scale may become; in int4 whatever its own sign is."""


def form_of(path: tuple[str, ...], asked: Form) -> Form:
    """The form of the matrix at a path where one is asked for.

    The head's errors go straight into logits, and those of queries, keys and values, a tenth of a
    layer, were half of what int4 lost: they are int8.
    """
    if path[0] == "head":
        return "int8"
    if asked == "int4" and path[0] == "attention" and path[-1] != "out":
        return "int8"
    return asked


def nearest(numbers: jax.Array, form: Form) -> jax.Array:
    """The nearest number of a form, in the dtype of what is given; past the end its last."""
    if form == "fp8":
        most = float8.largest(float8.E4M3)
        return jnp.clip(numbers, -most, most).astype(float8.E4M3).astype(numbers.dtype)
    least, most = (-8, 7) if form == "int4" else (-127, 127)
    return jnp.clip(jnp.round(numbers), least, most)


def in_store(scale: jax.Array) -> jax.Array:
    """A scale of int4 as it is kept: there are so many that they are bfloat16; float32."""
    return jax.lax.reduce_precision(scale, 8, 7)


def scales(
    groups: Float[Array, "*lead g"], form: Form, importance: jax.Array | float = 1.0
) -> Float[Array, "*lead 1"]:
    """The scale of each group that loses least, by squared error; of int4 maybe below zero.

    Args:
        groups: float32.
        form: what they become.
        importance: of each number's error.
    """
    most = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    sign = 1.0
    if form == "int4":
        sign = jnp.where(jnp.max(groups, axis=-1, keepdims=True) == most, 1.0, -1.0)

    def tried(end: float) -> tuple[jax.Array, jax.Array]:
        # A subnormal scale would divide to infinity where the device flushes it to zero.
        scale = jnp.maximum(most / abs(end), 1e-30)
        if form == "int4":
            scale = in_store(scale * sign * math.copysign(1.0, end))
        scale = jnp.where(most > 0, scale, 1.0)
        error = importance * (nearest(groups / scale, form) * scale - groups) ** 2
        return jnp.sum(error, axis=-1, keepdims=True), scale

    error, scale = tried(ENDS[form][0])
    for end in ENDS[form][1:]:
        other, fresh = tried(end)
        better = other < error
        error, scale = jnp.where(better, other, error), jnp.where(better, fresh, scale)
    # NaN is above nothing: it must not take the scale of zeros.
    return jnp.where(jnp.isnan(most), most, scale)

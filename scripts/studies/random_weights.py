"""Random weights of a shape's size, made where they are computed with, a layer at a time.

What they compute means nothing, but costs the same. A stack of all layers is never formed, since
`serving_weights` keeps each layer in a form of its own: beside the result there is one layer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxsys.layered import Parameters
from jaxsys.model import DecoderConfig
from jaxsys.model.decoder import nest
from jaxsys.model.leaves import Leaf, block_leaves, edge_leaves
from jaxsys.model.packed import BLOCK, Packed

DEVIATION = 0.02


def random_parameters(
    config: DecoderConfig, dtype: DTypeLike, *, packed: bool = False
) -> Parameters:
    """Parameters whose "blocks" are a function of a layer's number, for `serving_weights`.

    Args:
        packed: whether experts' matrices are MXFP4.
    """
    dtype = jnp.dtype(dtype)
    leaves = tuple(edge_leaves(config))
    return {
        "edge": _made(leaves, dtype, False, jax.random.key(0)),
        "blocks": functools.partial(_layer, config, dtype, packed),
    }


def _layer(config: DecoderConfig, dtype: jnp.dtype, packed: bool, layer: int) -> Any:
    leaves = tuple(block_leaves(config, config.kind(layer)))
    return _made(leaves, dtype, packed, jax.random.fold_in(jax.random.key(1), layer))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _made(leaves: tuple[Leaf, ...], dtype: jnp.dtype, packed: bool, key: jax.Array) -> Any:
    """One program makes a layer: a compilation a kind of layer, not one an array."""

    def value(leaf: Leaf, key: jax.Array) -> Any:
        if leaf.fill in ("ones", "zeros"):
            return jnp.full(leaf.shape, 1.0 if leaf.fill == "ones" else 0.0, dtype)
        if packed and leaf.path[0] == "experts" and len(leaf.shape) == 3:
            experts, inputs, outputs = leaf.shape
            codes = jax.random.bits(key, (experts, outputs, inputs // 2), jnp.uint8)
            # Two to the power of -7 times values of up to 6: about as large as the others.
            return Packed(codes, jnp.full((experts, outputs, inputs // BLOCK), 120, jnp.uint8))
        return DEVIATION * jax.random.normal(key, leaf.shape, dtype)

    keys = jax.random.split(key, len(leaves))
    return nest((leaf.path, value(leaf, one)) for leaf, one in zip(leaves, keys, strict=True))

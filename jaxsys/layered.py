"""What a schedule needs to know of a model: how to embed, run one block, and score.

Every schedule runs a model as `head_loss(block(...block(embed(batch))))`. `blocks` are stacked
along a leading layer axis and cut into chunks; `edge` holds what the first and last step need
(embedding, final norm, head). The three functions are pure and see one microbatch at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import jax
import jax.numpy as jnp

PyTree = Any
"""A pytree of arrays; the model's own structure."""


class Parameters(TypedDict):
    """A layered model's parameters: `edge` as the model likes, `blocks` stacked [L, ...]."""

    edge: PyTree
    blocks: PyTree


@dataclass(frozen=True, slots=True, kw_only=True)
class LayeredModel:
    """A model cut where schedules cut it.

    Legend: B sequences in a microbatch, T tokens, D model width, L layers. Nothing here assumes a
    language model: `x` may be any single array, as long as every block maps its shape to itself.
    """

    embed: Callable[[PyTree, PyTree], jax.Array]
    """(edge, microbatch) -> x, e.g. token ids [B, T] -> [B, T, D]."""

    block: Callable[[PyTree, jax.Array, PyTree], jax.Array]
    """(one layer's parameters, x, microbatch) -> x of the same shape and dtype."""

    head_loss: Callable[[PyTree, jax.Array, PyTree], tuple[jax.Array, jax.Array]]
    """(edge, x, microbatch) -> (summed loss, weight), both float32 scalars.

    A step's loss is sum(losses) / sum(weights) over all its microbatches, so that masked tokens
    count rightly however the batch is cut.
    """

    layers: int
    """L, the length of every leading axis in `blocks`."""


def reference_loss(model: LayeredModel, parameters: Parameters, batch: PyTree) -> jax.Array:
    """The loss every schedule must reproduce, on one device and without a schedule.

    Args:
        model: the layered model.
        parameters: its parameters, `blocks` stacked [L, ...].
        batch: leaves [M, ...], M microbatches.

    Returns:
        The scalar float32 loss sum(losses) / sum(weights).
    """
    total = weight = 0.0
    for index in range(jax.tree.leaves(batch)[0].shape[0]):
        microbatch = jax.tree.map(lambda leaf, i=index: leaf[i], batch)
        x = model.embed(parameters["edge"], microbatch)
        for layer in range(model.layers):
            x = model.block(
                jax.tree.map(lambda p, i=layer: p[i], parameters["blocks"]), x, microbatch
            )
        loss, count = model.head_loss(parameters["edge"], x, microbatch)
        total, weight = total + loss, weight + count
    return jnp.asarray(total / weight)

"""The decoder cut where schedules cut it: embed, one block, head and loss, as pure functions.

A microbatch is {"inputs": int32 [B, T], "targets": int32 [B, T]}; targets of -1 do not count.
"""

import jax

from jaxsys.errors import UsageError
from jaxsys.layered import Layer, LayeredModel, PyTree
from jaxsys.model.attention import Implementation
from jaxsys.model.config import DecoderConfig
from jaxsys.model.decoder import bind_block, bind_edge
from jaxsys.model.loss import head_loss


def layered(
    config: DecoderConfig,
    *,
    loss_chunk_tokens: int = 2048,
    implementation: Implementation | None = None,
) -> LayeredModel:
    """A `LayeredModel` over the pytrees that `parameters(model)` returns.

    Args:
        config: the model.
        loss_chunk_tokens: tokens of a microbatch whose logits are held at once.
        implementation: of attention; chosen by device, dtype and shape if not given.
    """
    if loss_chunk_tokens < 1:
        raise UsageError(f"loss_chunk_tokens={loss_chunk_tokens} must be at least 1")

    def embed(edge: PyTree, microbatch: PyTree) -> jax.Array:
        return bind_edge(config, edge).embed(microbatch["inputs"])

    def block(weights: PyTree, x: jax.Array, microbatch: PyTree, layer: Layer) -> jax.Array:
        return bind_block(config, weights)(x, implementation=implementation)

    def score(edge: PyTree, x: jax.Array, microbatch: PyTree) -> tuple[jax.Array, jax.Array]:
        return head_loss(config, edge, x, microbatch["targets"], chunk_tokens=loss_chunk_tokens)

    return LayeredModel(embed=embed, block=block, head_loss=score, layers=config.num_layers)

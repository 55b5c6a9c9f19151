"""The decoder cut where schedules cut it: embed, blocks of kinds, head and loss; pure functions.

A microbatch is {"inputs": int32 [B, T], "targets": int32 [B, T]}; targets of -1 do not count. Where
experts are kept evenly used, the loss of that travels beside the residual:
x = {"residual": [B, T, D], "balance": []}, summed over layers.
"""

import jax
import jax.numpy as jnp

from jaxsys.errors import UsageError
from jaxsys.layered import Block, Layer, LayeredModel, PyTree
from jaxsys.model.attention import Implementation
from jaxsys.model.config import DecoderConfig
from jaxsys.model.decoder import bind_block, bind_edge
from jaxsys.model.kinds import BlockKind
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
    balanced = expert_layers(config) if config.experts and config.experts.balance else 0

    def embed(edge: PyTree, microbatch: PyTree) -> PyTree:
        x = bind_edge(config, edge).embed(microbatch["inputs"])
        return {"residual": x, "balance": jnp.zeros((), jnp.float32)} if balanced else x

    def block(kind: BlockKind) -> Block:
        def run(weights: PyTree, x: PyTree, microbatch: PyTree, layer: Layer) -> PyTree:
            bound = bind_block(config, weights, kind)
            if not balanced:
                return bound(x, implementation=implementation)
            residual, load = bound.run(x["residual"], implementation=implementation)
            balance = x["balance"] if load is None else x["balance"] + load.balance
            return {"residual": residual, "balance": balance}

        return run

    def score(edge: PyTree, x: PyTree, microbatch: PyTree) -> tuple[jax.Array, ...]:
        residual = x["residual"] if balanced else x
        loss, weight = head_loss(
            config, edge, residual, microbatch["targets"], chunk_tokens=loss_chunk_tokens
        )
        if not balanced:
            return loss, weight
        assert config.experts is not None
        balance = x["balance"] / balanced
        # Weighed as the tokens are, so that the step's loss is a mean of both.
        return loss + config.experts.balance * balance * weight, weight

    if not config.pattern:
        only = block(config.kinds[0])
        return LayeredModel(embed=embed, block=only, head_loss=score, layers=config.num_layers)
    blocks = {kind.name: block(kind) for kind in config.kinds}
    return LayeredModel(embed=embed, block=blocks, head_loss=score, pattern=config.pattern)


def expert_layers(config: DecoderConfig) -> int:
    """How many layers have experts."""
    return sum(len(config.layers_of(kind)) for kind in config.kinds if kind.experts)

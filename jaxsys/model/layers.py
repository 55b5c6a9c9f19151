"""The decoder cut where schedules cut it: embed, blocks of kinds, head and loss; pure functions.

A microbatch is {"inputs": int32 [B, T], "targets": int32 [B, T]}; targets of -1 do not count. Where
experts are kept evenly used, the loss of that travels beside the residual:
x = {"residual": [B, T, D], "balance": []}, summed over layers.
"""

import dataclasses
import logging
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxsys.context import ContextSplit
from jaxsys.errors import UsageError
from jaxsys.layered import BlockFunction, Layer, LayeredModel, Parts, PyTree
from jaxsys.model.attention import Implementation
from jaxsys.model.block import BoundBlock, HeldTree
from jaxsys.model.config import DecoderConfig
from jaxsys.model.contract import attention_heads
from jaxsys.model.decoder import bind_edge
from jaxsys.model.float8_products import GPU_OPTIONS, Float8
from jaxsys.model.kinds import BlockKind
from jaxsys.model.leaves import Path, block_leaves
from jaxsys.model.loss import HEAD, head_loss
from jaxsys.model.parts import (
    HeldPart,
    check_parts,
    config_of_part,
    cuts,
    edge_axis,
    embed_part,
)

logger = logging.getLogger(__name__)


def layered(
    config: DecoderConfig,
    *,
    loss_chunk_tokens: int = 2048,
    implementation: Implementation | None = None,
    float8: Float8 | None = None,
) -> LayeredModel:
    """A `LayeredModel` over the pytrees that `parameters(model)` returns.

    Args:
        config: the model.
        loss_chunk_tokens: tokens of a microbatch whose logits are held at once.
        implementation: of attention; chosen by device, dtype and shape if not given.
        float8: which products run in float8, forward and backward; none if not given.

    What the configuration asks of training and is not done (`DecoderConfig.in_training`) is logged.

    Raises:
        UsageError: if `loss_chunk_tokens` is below 1, or `float8` names no matrix of the model.
    """
    if loss_chunk_tokens < 1:
        raise UsageError(f"loss_chunk_tokens={loss_chunk_tokens} must be at least 1")
    if float8 is not None:
        float8.check(matrices(config))
    if config.in_training:
        logger.warning("%s", config.not_applied())
    return _cuttable(config, loss_chunk_tokens, implementation, float8, None)


def _cuttable(
    config: DecoderConfig,
    loss_chunk_tokens: int,
    implementation: Implementation | None,
    float8: Float8 | None,
    context: ContextSplit | None,
) -> LayeredModel:
    """The model, on whole sequences or a device's pieces of them, that says how it is split."""

    def in_parts(sizes: Mapping[str, int]) -> Parts:
        check_parts(config, sizes)
        if context is not None:
            context.check_heads(*attention_heads(config_of_part(config, sizes)))
        part = _layered(config, loss_chunk_tokens, implementation, float8, sizes, context)
        return Parts(model=part, cuts=cuts(config, sizes), whole=model)

    def across(split: ContextSplit) -> LayeredModel:
        split.check_heads(*attention_heads(config))
        if config.experts is not None and config.experts.balance and expert_layers(config):
            raise UsageError(
                f"experts balance={config.experts.balance} is a loss of whole microbatches, and "
                f"context={split.parts} devices each route a part of one; use balance=0, or "
                "context=1"
            )
        return _cuttable(config, loss_chunk_tokens, implementation, float8, split)

    model = _layered(config, loss_chunk_tokens, implementation, float8, {}, context)
    model = dataclasses.replace(
        model,
        in_parts=in_parts,
        across=across,
        sequences={"inputs": 1, "targets": 1},
        gpu_options={} if float8 is None else GPU_OPTIONS,
    )
    return model


def _layered(
    config: DecoderConfig,
    loss_chunk_tokens: int,
    implementation: Implementation | None,
    float8: Float8 | None,
    sizes: Mapping[str, int],
    context: ContextSplit | None,
) -> LayeredModel:
    """The model, or one device's part of it, see `jaxsys.model.parts`."""
    balanced = expert_layers(config) if config.experts and config.experts.balance else 0
    part, axis = config_of_part(config, sizes), edge_axis(sizes)

    def embed(edge: PyTree, microbatch: PyTree) -> PyTree:
        tokens = microbatch["inputs"]
        x = embed_part(config, edge, tokens) if axis else bind_edge(config, edge).embed(tokens)
        return {"residual": x, "balance": jnp.zeros((), jnp.float32)} if balanced else x

    def block(kind: BlockKind) -> BlockFunction:
        def run(weights: PyTree, x: PyTree, microbatch: PyTree, layer: Layer) -> PyTree:
            if sizes:
                held = HeldPart(part, weights, sizes, float8)
            else:
                held = HeldTree(config, weights, float8)
            bound = BoundBlock(part, kind, held)
            if not balanced:
                return bound.run(x, implementation=implementation, context=context)[0]
            residual, load = bound.run(x["residual"], implementation=implementation)
            balance = x["balance"] if load is None else x["balance"] + load.balance
            return {"residual": residual, "balance": balance}

        return run

    def score(edge: PyTree, x: PyTree, microbatch: PyTree) -> tuple[jax.Array, ...]:
        residual = x["residual"] if balanced else x
        loss, weight = head_loss(
            config,
            edge,
            residual,
            microbatch["targets"],
            chunk_tokens=loss_chunk_tokens,
            axis=axis,
            float8=float8,
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


def matrices(config: DecoderConfig) -> list[Path]:
    """Paths of all matrices: those of each kind of block, and the head, tied or not."""
    found = {
        leaf.path: None
        for kind in config.kinds
        for leaf in block_leaves(config, kind)
        if leaf.is_matrix
    }
    return [*found, HEAD]


def expert_layers(config: DecoderConfig) -> int:
    """How many layers have experts."""
    return sum(len(config.layers_of(kind)) for kind in config.kinds if kind.experts)

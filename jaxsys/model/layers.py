"""The decoder cut where schedules cut it: embed, blocks of kinds, head and loss; pure functions.

A microbatch is {"inputs": int32 [B, T], "targets": int32 [B, T]}; targets of -1 do not count. Where
experts are kept evenly used, the loss of that travels beside the residual:
x = {"residual": [B, T, D], "balance": []}, summed over layers.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxsys.axes import JOININGS, Joining
from jaxsys.context import ContextSplit
from jaxsys.errors import UsageError
from jaxsys.layered import BlockFunction, Layer, LayeredModel, Parts, PyTree, WithAgain
from jaxsys.model.attention import Implementation
from jaxsys.model.block import BoundBlock, HeldTree
from jaxsys.model.config import DecoderConfig
from jaxsys.model.contract import attention_heads
from jaxsys.model.decoder import bind_edge
from jaxsys.model.float8_products import GPU_OPTIONS, Float8
from jaxsys.model.kinds import BlockKind
from jaxsys.model.leaves import HEAD, Path, block_leaves
from jaxsys.model.loss import head_loss
from jaxsys.model.parts import (
    HeldPart,
    check_parts,
    config_of_part,
    cuts,
    edge_axis,
    embed_part,
)
from jaxsys.model.pieces import PIECE_TOKENS, pieces_of, run_in_pieces

logger = logging.getLogger(__name__)


def layered(
    config: DecoderConfig,
    *,
    loss_chunk_tokens: int = 2048,
    piece_tokens: int = PIECE_TOKENS,
    implementation: Implementation | None = None,
    float8: Float8 | None = None,
) -> LayeredModel:
    """A `LayeredModel` over the pytrees that `parameters(model)` returns.

    Args:
        config: the model.
        loss_chunk_tokens: tokens of a microbatch whose logits are held at once.
        piece_tokens: of blocks that are computed again, tokens that all but attention goes over at
            once, where a microbatch has at least four such pieces. Experts, features that devices
            share and products in float8 take all tokens at once.
        implementation: of attention; chosen by device, dtype and shape if not given.
        float8: which products run in float8, forward and backward; none if not given.

    What the configuration asks of training and is not done (`DecoderConfig.in_training`) is logged.

    Raises:
        UsageError: if `loss_chunk_tokens` or `piece_tokens` is below 1, or `float8` names no matrix
            of the model.
    """
    for name, count in (("loss_chunk_tokens", loss_chunk_tokens), ("piece_tokens", piece_tokens)):
        if count < 1:
            raise UsageError(f"{name}={count} must be at least 1")
    if float8 is not None:
        float8.check(matrices(config))
    if config.in_training:
        logger.warning("%s", config.not_applied())
    asked = _Asked(
        loss_chunk_tokens=loss_chunk_tokens,
        piece_tokens=piece_tokens,
        implementation=implementation,
        float8=float8,
    )
    return _cuttable(config, asked, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What `layered` was asked for."""

    loss_chunk_tokens: int
    piece_tokens: int
    implementation: Implementation | None
    float8: Float8 | None
    features_by: Joining = "gather"
    """How devices that share features join them."""


def _cuttable(config: DecoderConfig, asked: _Asked, context: ContextSplit | None) -> LayeredModel:
    """The model, on whole sequences or a device's pieces of them, that says how it is split."""

    def in_parts(sizes: Mapping[str, int], by: Joining = "gather") -> Parts:
        check_parts(config, sizes)
        if context is not None:
            context.check_heads(*attention_heads(config_of_part(config, sizes)))
        part = _layered(config, dataclasses.replace(asked, features_by=by), sizes, context)
        return Parts(model=part, cuts=cuts(config, sizes), whole=model)

    def across(split: ContextSplit) -> LayeredModel:
        split.check_heads(*attention_heads(config))
        if config.experts is not None and config.experts.balance and expert_layers(config):
            raise UsageError(
                f"experts balance={config.experts.balance} is a loss of whole microbatches, and "
                f"context={split.parts} devices each route a part of one; use balance=0, or "
                "context=1"
            )
        return _cuttable(config, asked, split)

    model = _layered(config, asked, {}, context)
    model = dataclasses.replace(
        model,
        in_parts=in_parts,
        across=across,
        in_parts_by={by: functools.partial(in_parts, by=by) for by in JOININGS},
        sequences={"inputs": 1, "targets": 1},
        gpu_options={} if asked.float8 is None else GPU_OPTIONS,
    )
    return model


def _layered(
    config: DecoderConfig,
    asked: _Asked,
    sizes: Mapping[str, int],
    context: ContextSplit | None,
) -> LayeredModel:
    """The model, or one device's part of it, see `jaxsys.model.parts`."""
    balanced = expert_layers(config) if config.experts and config.experts.balance else 0
    part, axis = config_of_part(config, sizes), edge_axis(sizes)
    implementation, float8 = asked.implementation, asked.float8

    def embed(edge: PyTree, microbatch: PyTree) -> PyTree:
        tokens = microbatch["inputs"]
        x = embed_part(config, edge, tokens) if axis else bind_edge(config, edge).embed(tokens)
        return {"residual": x, "balance": jnp.zeros((), jnp.float32)} if balanced else x

    def block(kind: BlockKind) -> BlockFunction:
        def bind(weights: PyTree) -> BoundBlock:
            if sizes:
                held = HeldPart(part, weights, sizes, float8, asked.features_by)
            else:
                held = HeldTree(config, weights, float8)
            return BoundBlock(part, kind, held)

        def run(weights: PyTree, x: PyTree, microbatch: PyTree, layer: Layer) -> PyTree:
            bound = bind(weights)
            if not balanced:
                return bound.run(x, implementation=implementation, context=context)[0]
            residual, load = bound.run(x["residual"], implementation=implementation)
            balance = x["balance"] if load is None else x["balance"] + load.balance
            return {"residual": residual, "balance": balance}

        def again(weights: PyTree, x: PyTree, microbatch: PyTree, layer: Layer) -> PyTree:
            residual = run_in_pieces(
                bind,
                weights,
                x["residual"] if balanced else x,
                tokens=asked.piece_tokens,
                implementation=implementation,
                context=context,
            )
            return {**x, "residual": residual} if balanced else residual

        def differ(x: PyTree) -> bool:
            batch, length, _ = (x["residual"] if balanced else x).shape
            return pieces_of(batch * length, asked.piece_tokens) > 1

        # Experts would have the gradients of all of them added in every piece, devices that share
        # features send in every piece, and products in float8 have a scale for each.
        whole = kind.experts or axis is not None or float8 is not None
        return run if whole else WithAgain(run, again, differ)

    def score(edge: PyTree, x: PyTree, microbatch: PyTree) -> tuple[jax.Array, ...]:
        residual = x["residual"] if balanced else x
        loss, weight = head_loss(
            config,
            edge,
            residual,
            microbatch["targets"],
            chunk_tokens=asked.loss_chunk_tokens,
            axis=axis,
            float8=float8,
        )
        if not balanced:
            return loss, weight
        assert config.experts is not None
        balance = x["balance"] / balanced
        # Weighed as the tokens are, so that the step's loss is a mean of both.
        return loss + config.experts.balance * balance * weight, weight

    travels = None if float8 is None or not float8.transfers else float8.travels
    if not config.pattern:
        return LayeredModel(
            embed=embed,
            block=block(config.kinds[0]),
            head_loss=score,
            layers=config.num_layers,
            travels_in_float8=travels,
        )
    return LayeredModel(
        embed=embed,
        block={kind.name: block(kind) for kind in config.kinds},
        head_loss=score,
        pattern=config.pattern,
        travels_in_float8=travels,
    )


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

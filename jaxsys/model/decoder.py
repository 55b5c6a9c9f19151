"""The decoder: a pytree of parameters, what lies outside its blocks, and the whole forward pass.

    x = E[tokens];  x = block(x) for every layer;  logits = norm(x) H

Parameters are a plain pytree {"edge": ..., "blocks": ...}, blocks stacked [L, ...] where all are of
one kind and {kind: stacked} where they are not; schedules and the server work on them. `bind_block`
and `bind_edge` put the mathematics around such pytrees, inside any trace. `Decoder` is the same
pytree as a Flax NNX module.

Legend: B batch, T tokens, V vocabulary, D width, L layers. Kernels are [in, out].
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters, PyTree, seed_key
from jaxsys.model.attention import Implementation
from jaxsys.model.block import BoundBlock, HeldTree, norm
from jaxsys.model.config import DecoderConfig
from jaxsys.model.float8_products import Float8
from jaxsys.model.kinds import BlockKind
from jaxsys.model.leaves import Leaf, block_leaves, edge_leaves

INITIAL_DEVIATION = 0.02
"""Standard deviation of fresh kernels; those that write to the residual take it / sqrt(2 L)."""


class Edge(NamedTuple):
    """What lies outside the blocks, bound to its weights: embedding, final norm, head."""

    config: DecoderConfig
    weights: Mapping[str, Any]

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token ids [B, T] -> [B, T, D].

        The row is read as float32 so that its gradient is summed in float32: a frequent token's
        sum stands still in bfloat16, and GPUs add bfloat16 to one place by compare-and-swap.
        """
        table = self.weights["embed"]["table"]
        wide = jnp.promote_types(table.dtype, jnp.float32)
        x = table.astype(wide)[tokens].astype(table.dtype)
        scale = self.config.embedding_scale
        return x if scale == 1.0 else x * scale

    def norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The final norm."""
        held = self.weights["norm"]
        return norm(self.config, x, held["scale"], held.get("bias"))

    def head_kernel(self) -> Float[Array, "D V"]:
        """The output projection [D, V]: the head's own or the embedding, transposed."""
        if self.config.tie_embeddings:
            return self.weights["embed"]["table"].T
        return self.weights["head"]["kernel"]

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Residual x [B, T, D] -> float32 logits [B, T, V], the final norm included."""
        product = jnp.matmul(self.norm(x), self.head_kernel(), preferred_element_type=jnp.float32)
        return finish_logits(self.config, product)


def finish_logits(config: DecoderConfig, logits: jax.Array) -> jax.Array:
    """Scale and cap of the head's product."""
    if config.logit_scale != 1.0:
        logits = logits * config.logit_scale
    if config.logit_softcap is not None:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    return logits


class Decoder(nnx.Module):
    """A whole decoder as a module; its arrays are those of `parameters`.

    Attributes:
        config: the description.
        embed: token vectors.
        norm: the final norm.
        head: the untied head; absent where it is tied to the embedding.
        blocks: stacked [L, ...], by kind where there are several.
    """

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32
    ) -> None:
        self.config = config
        made = _fresh(config, rngs, param_dtype)
        for name, value in {**made["edge"], "blocks": made["blocks"]}.items():
            setattr(self, name, _as_parameters(value))

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Token ids [B, T] -> float32 logits [B, T, V].

        `positions` turns the rotary embedding only; attention stays causal over the row.
        """
        return forward(self.config, parameters(self), tokens, positions)


def _as_parameters(tree: PyTree) -> Any:
    if isinstance(tree, Mapping):
        return nnx.Dict({name: _as_parameters(value) for name, value in tree.items()})
    return nnx.Param(tree)


def parameters(model: Decoder) -> Parameters:
    """The model's arrays as plain dictionaries: {"edge": ..., "blocks": stacked [L, ...]}."""
    state: dict[str, Any] = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    blocks = state.pop("blocks")
    return {"edge": state, "blocks": blocks}


def abstract_parameters(config: DecoderConfig, dtype: DTypeLike = jnp.float32) -> Parameters:
    """Shapes and dtypes of `parameters` (jax.ShapeDtypeStruct leaves), without making any."""
    dtype = jnp.dtype(dtype)

    def stacked(kind: BlockKind) -> dict[str, Any]:
        layers = len(config.layers_of(kind))
        return nest(
            (leaf.path, jax.ShapeDtypeStruct((layers, *leaf.shape), dtype))
            for leaf in block_leaves(config, kind)
        )

    edge = nest(
        (leaf.path, jax.ShapeDtypeStruct(leaf.shape, dtype)) for leaf in edge_leaves(config)
    )
    return {"edge": edge, "blocks": by_kind(config, {k.name: stacked(k) for k in config.kinds})}


def initial_parameters(
    config: DecoderConfig, *, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> Parameters:
    """Fresh parameters: normal kernels, norms that change nothing, no biases."""
    return _fresh(config, nnx.Rngs(seed_key(seed)), dtype)


def _fresh(config: DecoderConfig, rngs: nnx.Rngs, dtype: DTypeLike) -> Parameters:
    residual = INITIAL_DEVIATION / math.sqrt(2 * config.num_layers)

    def made(leaves: Iterable[Leaf], rngs: nnx.Rngs) -> dict[str, Any]:
        def value(leaf: Leaf) -> jax.Array:
            if leaf.fill in ("ones", "zeros"):
                return jnp.full(leaf.shape, 1.0 if leaf.fill == "ones" else 0.0, dtype)
            deviation = residual if leaf.fill == "residual" else INITIAL_DEVIATION
            # In bfloat16 itself a draw has 128 values, none beyond 2.9 deviations.
            return (deviation * jax.random.normal(rngs.params(), leaf.shape)).astype(dtype)

        return nest((leaf.path, value(leaf)) for leaf in leaves)

    edge = made(edge_leaves(config), rngs)
    blocks = {}
    for kind in config.kinds:
        leaves = block_leaves(config, kind)
        stack = nnx.vmap(functools.partial(made, leaves), in_axes=0, out_axes=0)
        split = nnx.split_rngs(splits=len(config.layers_of(kind)))
        blocks[kind.name] = split(stack)(rngs)
    return {"edge": edge, "blocks": by_kind(config, blocks)}


def nest(leaves: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """Paths and values to nested dictionaries."""
    tree: dict[str, Any] = {}
    for path, value in leaves:
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def by_kind(config: DecoderConfig, blocks: Mapping[str, PyTree]) -> PyTree:
    """{kind: stacked} as the parameters have it: a single kind's stack stands alone."""
    return dict(blocks) if config.pattern else blocks[config.kinds[0].name]


def kind_of_blocks(config: DecoderConfig, blocks: PyTree, kind: BlockKind) -> PyTree:
    """The stack of one kind out of parameters' `blocks`."""
    return blocks[kind.name] if config.pattern else blocks


def layer_of(config: DecoderConfig, blocks: PyTree, layer: int) -> PyTree:
    """One layer's own arrays out of parameters' `blocks`; these may be a function of its number."""
    if callable(blocks):
        return blocks(layer)
    kind = config.kind(layer)
    place = config.layers_of(kind).index(layer)
    return jax.tree.map(lambda leaf: leaf[place], kind_of_blocks(config, blocks, kind))


def build(config: DecoderConfig, parameters: Parameters) -> Decoder:
    """A `Decoder` around existing arrays."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, {**parameters["edge"], "blocks": parameters["blocks"]})


def bind_block(
    config: DecoderConfig,
    layer: PyTree,
    kind: BlockKind | None = None,
    float8: Float8 | None = None,
) -> BoundBlock:
    """A `BoundBlock` around one layer's parameters (no layer axis); of the first kind if not given.

    Args:
        float8: which of its products run in float8.
    """
    return BoundBlock(config, kind or config.kinds[0], HeldTree(config, layer, float8))


def bind_edge(config: DecoderConfig, edge: PyTree) -> Edge:
    """An `Edge` around `parameters["edge"]`."""
    return Edge(config, edge)


def forward(
    config: DecoderConfig,
    parameters: Parameters,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B T V"]:
    """Token ids [B, T] -> float32 logits [B, T, V]; runs of layers of a kind are scanned."""
    if tokens.ndim != 2:
        raise UsageError(f"tokens of shape {tokens.shape} must be [B, T]; add a batch axis")
    edge = bind_edge(config, parameters["edge"])
    x = edge.embed(tokens)
    for kind, first, last in _runs(config):
        stack = kind_of_blocks(config, parameters["blocks"], kind)
        if last - first < len(config.layers_of(kind)):
            stack = jax.tree.map(lambda leaf, a=first, b=last: leaf[a:b], stack)

        def step(x: jax.Array, layer: PyTree, kind: BlockKind = kind) -> tuple[jax.Array, None]:
            block = bind_block(config, layer, kind)
            return block(x, positions, implementation=implementation), None

        x, _ = jax.lax.scan(step, x, stack)
    return edge.logits(x)


def _runs(config: DecoderConfig) -> list[tuple[BlockKind, int, int]]:
    """Layers in a row of one kind: the kind, and the first and past the last of its stack."""
    if not config.pattern:
        return [(config.kinds[0], 0, config.num_layers)]
    kinds = {kind.name: kind for kind in config.kinds}
    used = dict.fromkeys(kinds, 0)
    runs: list[tuple[BlockKind, int, int]] = []
    for name in config.pattern:
        if runs and runs[-1][0].name == name:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((kinds[name], used[name], used[name] + 1))
        used[name] += 1
    return runs

"""The Llama-family decoder in Flax NNX, its blocks stacked along a leading layer axis.

    x = E[tokens];  x += O(attend(rope(Q n), rope(K n), V n)), n = norm(x);
    x += Down(silu(Gate n) * Up n), n = norm(x);  logits = norm(x) H

One object, two faces: `Decoder` is a module, and `parameters(model)` is the plain pytree
{"edge": ..., "blocks": stacked [L, ...]} that schedules and the server work on; `bind_block` and
`bind_edge` put modules back around such pytrees, inside any trace. Compute takes the parameters'
dtype; norms, rotary tables and softmax are float32 inside.

Legend: B batch, T tokens, V vocabulary, D width, F feed-forward, L layers, N heads, G key/value
heads, K head width. Kernels are [in, out].
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters, PyTree
from jaxsys.model.attention import Implementation, attend
from jaxsys.model.config import DecoderConfig
from jaxsys.model.rope import rotary_tables, rotate

INITIAL_DEVIATION = 0.02
"""Standard deviation of fresh kernels; those that write to the residual take it / sqrt(2 L)."""


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, statistics in float32. Zhang & Sennrich, 1910.07467."""

    def __init__(self, config: DecoderConfig, *, param_dtype: DTypeLike = jnp.float32) -> None:
        self.epsilon = config.rms_norm_eps
        self.scale = nnx.Param(jnp.ones((config.hidden_size,), param_dtype))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalises the last axis of `x` [B, T, D]."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normal = (wide * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
        return normal * self.scale[...][None, None, :]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, in pieces a paged cache can come between."""

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32
    ) -> None:
        self.config = config
        width, heads = config.hidden_size, config.num_heads * config.head_dim
        shared = config.num_kv_heads * config.head_dim
        self.query = _kernel(rngs, (width, heads), param_dtype)
        self.key = _kernel(rngs, (width, shared), param_dtype)
        self.value = _kernel(rngs, (width, shared), param_dtype)
        self.out = _kernel(rngs, (heads, width), param_dtype, residual_layers=config.num_layers)

    def project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        """Normalised x [B, T, D] -> q [B, T, N, K], k [B, T, G, K], v [B, T, G, K].

        q and k are already turned by `positions`, int32 [B, T] (or [1, T] for all rows alike).
        """
        config = self.config
        split = (*x.shape[:-1], -1, config.head_dim)
        cosines, sines = rotary_tables(positions, config)
        q = rotate((x @ self.query[...]).reshape(split), cosines, sines)
        k = rotate((x @ self.key[...]).reshape(split), cosines, sines)
        return q, k, (x @ self.value[...]).reshape(split)

    def output(self, o: Float[Array, "B T N K"]) -> Float[Array, "B T D"]:
        """Joins the heads: o [B, T, N, K] -> [B, T, D]."""
        return o.reshape(*o.shape[:-2], -1) @ self.out[...]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        *,
        implementation: Implementation | None = None,
    ) -> Float[Array, "B T D"]:
        """Causal self-attention over whole sequences."""
        q, k, v = self.project(x, positions)
        return self.output(attend(q, k, v, causal=True, implementation=implementation))


class MLP(nnx.Module):
    """SwiGLU: Down(silu(Gate x) * Up x). Shazeer, 2002.05202."""

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32
    ) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        self.gate = _kernel(rngs, (width, inner), param_dtype)
        self.up = _kernel(rngs, (width, inner), param_dtype)
        self.down = _kernel(rngs, (inner, width), param_dtype, residual_layers=config.num_layers)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalised x [B, T, D] -> [B, T, D]."""
        return (jax.nn.silu(x @ self.gate[...]) * (x @ self.up[...])) @ self.down[...]


class Block(nnx.Module):
    """One decoder layer: attention and SwiGLU, each behind a norm and added to the residual."""

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32
    ) -> None:
        self.attention_norm = RMSNorm(config, param_dtype=param_dtype)
        self.attention = Attention(config, rngs=rngs, param_dtype=param_dtype)
        self.mlp_norm = RMSNorm(config, param_dtype=param_dtype)
        self.mlp = MLP(config, rngs=rngs, param_dtype=param_dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        *,
        implementation: Implementation | None = None,
    ) -> Float[Array, "B T D"]:
        """x [B, T, D] -> [B, T, D]; `positions` count from 0 unless given."""
        if positions is None:
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
        x = x + self.attention(self.attention_norm(x), positions, implementation=implementation)
        return x + self.mlp(self.mlp_norm(x))


class Embedding(nnx.Module):
    """Token vectors, read by row, and used as the head where it is tied."""

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32
    ) -> None:
        self.table = _kernel(rngs, (config.vocab_size, config.hidden_size), param_dtype)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token ids [B, T] -> [B, T, D].

        The row is read as float32 so that its gradient is summed in float32: a frequent token's
        sum stands still in bfloat16, and GPUs add bfloat16 to one place by compare-and-swap.
        """
        table = self.table[...]
        wide = jnp.promote_types(table.dtype, jnp.float32)
        return table.astype(wide)[tokens].astype(table.dtype)


class Head(nnx.Module):
    """An untied head, [D, V]."""

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32
    ) -> None:
        self.kernel = _kernel(rngs, (config.hidden_size, config.vocab_size), param_dtype)


class Edge(nnx.Module):
    """What lies outside the blocks: embedding, final norm, head."""

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32
    ) -> None:
        self.embed = Embedding(config, rngs=rngs, param_dtype=param_dtype)
        self.norm = RMSNorm(config, param_dtype=param_dtype)
        if not config.tie_embeddings:
            self.head = Head(config, rngs=rngs, param_dtype=param_dtype)
        self.tied = config.tie_embeddings

    def head_kernel(self) -> Float[Array, "D V"]:
        """The output projection [D, V]: the head's own or the embedding, transposed."""
        return self.embed.table[...].T if self.tied else self.head.kernel[...]

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Residual x [B, T, D] -> float32 logits [B, T, V], the final norm included."""
        return jnp.matmul(self.norm(x), self.head_kernel(), preferred_element_type=jnp.float32)


class Decoder(nnx.Module):
    """A whole decoder.

    Attributes:
        embed: token vectors.
        blocks: one `Block` whose parameters are stacked [L, ...].
        norm: the final norm.
        head: the untied head; absent where it is tied to the embedding.
    """

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32
    ) -> None:
        self.config = config
        edge = Edge(config, rngs=rngs, param_dtype=param_dtype)
        self.embed, self.norm = edge.embed, edge.norm
        if not config.tie_embeddings:
            self.head = edge.head

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs, param_dtype=param_dtype)

        self.blocks = stack(rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Token ids [B, T] -> float32 logits [B, T, V].

        `positions` turns the rotary embedding only; attention stays causal over the row.
        """
        return forward(self.config, parameters(self), tokens, positions)


def parameters(model: Decoder) -> Parameters:
    """The model's arrays as plain dictionaries: {"edge": ..., "blocks": stacked [L, ...]}."""
    state: dict[str, Any] = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    blocks = state.pop("blocks")
    return {"edge": state, "blocks": blocks}


def abstract_parameters(config: DecoderConfig, dtype: DTypeLike = jnp.float32) -> Parameters:
    """Shapes and dtypes of `parameters` (jax.ShapeDtypeStruct leaves), without making any."""
    return jax.eval_shape(lambda: initial_parameters(config, seed=0, dtype=dtype))


def initial_parameters(
    config: DecoderConfig, *, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> Parameters:
    """Fresh parameters of `Decoder(config, rngs=nnx.Rngs(seed))`."""
    return parameters(Decoder(config, rngs=nnx.Rngs(seed), param_dtype=dtype))


def build(config: DecoderConfig, parameters: Parameters) -> Decoder:
    """A `Decoder` around existing arrays."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, {**parameters["edge"], "blocks": parameters["blocks"]})


def bind_block(config: DecoderConfig, layer: PyTree) -> Block:
    """A `Block` around one layer's parameters (no layer axis); cheap, for use while tracing."""
    return nnx.merge(_block_graph(config), layer)


def bind_edge(config: DecoderConfig, edge: PyTree) -> Edge:
    """An `Edge` around `parameters["edge"]`; cheap, for use while tracing."""
    return nnx.merge(_edge_graph(config), edge)


def forward(
    config: DecoderConfig,
    parameters: Parameters,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B T V"]:
    """`Decoder.__call__` on the plain pytree: one `lax.scan` over the stacked blocks."""
    if tokens.ndim != 2:
        raise UsageError(f"tokens of shape {tokens.shape} must be [B, T]; add a batch axis")
    edge = bind_edge(config, parameters["edge"])

    def step(x: jax.Array, layer: PyTree) -> tuple[jax.Array, None]:
        return bind_block(config, layer)(x, positions, implementation=implementation), None

    x, _ = jax.lax.scan(step, edge.embed(tokens), parameters["blocks"])
    return edge.logits(x)


def _kernel(
    rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike, residual_layers: int | None = None
) -> nnx.Param:
    deviation = INITIAL_DEVIATION
    if residual_layers is not None:
        deviation /= math.sqrt(2 * residual_layers)
    return nnx.Param(deviation * jax.random.normal(rngs.params(), shape, dtype))


# Graph definitions hold no arrays: they are values of the configuration, made once.
@functools.lru_cache(maxsize=64)
def _block_graph(config: DecoderConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))


@functools.lru_cache(maxsize=64)
def _edge_graph(config: DecoderConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Edge(config, rngs=nnx.Rngs(0))))

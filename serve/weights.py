"""A decoder's weights as the server computes with them: fused, split by layer, quantised, sharded.

Matrices that read the same input are one: queries, keys and values of a layer as [D, G, R+2, K]
(each key/value head beside the query heads it serves), gate and up as [D, 2, F]. At batch 1 on an
H100 the fused pair ran 20 % faster than apart. Both split evenly over a mesh axis along G and F, so
tensor parallelism needs no other layout.

A quantised matrix (int8, or fp8: e4m3fn) keeps one scale an output column, W = value * scale,
such that the column's largest value is the largest of the form. Values are widened, exactly, to
what the pass computes in on their way into the product, whose result is scaled: a step reads half
the bytes, and activations stay as they are.

Legend: D width, F feed-forward, N query heads, G key/value heads, R = N / G, K head width, V
vocabulary, L layers.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters
from jaxsys.model import DecoderConfig

TENSOR = "tensor"
"""Mesh axis over which heads and feed-forward are split."""

Quantisation = Literal["int8", "fp8"]

QUANTISATIONS: tuple[Quantisation, ...] = get_args(Quantisation)

_FORMS: dict[Quantisation, tuple[Any, float]] = {
    "int8": (jnp.int8, 127.0),
    "fp8": (jnp.float8_e4m3fn, 448.0),
}
"""Dtype and largest value of each."""


class Matrix(NamedTuple):
    """Weights [inputs..., outputs...], with a scale [outputs...] where they are quantised."""

    values: jax.Array
    scale: jax.Array | None = None


class LayerWeights(NamedTuple):
    """One decoder layer."""

    attention_norm: jax.Array
    """[D]."""
    qkv: Matrix
    """[D, G, R+2, K]."""
    out: Matrix
    """[G, R, K, D]."""
    mlp_norm: jax.Array
    """[D]."""
    gate_up: Matrix
    """[D, 2, F]."""
    down: Matrix
    """[F, D]."""


class ServingWeights(NamedTuple):
    """The whole decoder."""

    embedding: jax.Array
    """[V, D]."""
    layers: tuple[LayerWeights, ...]
    norm: jax.Array
    """[D]."""
    head: Matrix | None
    """[D, V]; None where it is the embedding."""

    @property
    def dtype(self) -> jnp.dtype:
        """What the passes compute in."""
        return self.embedding.dtype

    @property
    def step_bytes(self) -> int:
        """Bytes that a decode step must read: all but the embedding, unless it is the head."""
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(self))
        return total if self.head is None else total - self.embedding.nbytes


def serving_weights(
    config: DecoderConfig,
    parameters: Parameters,
    *,
    quantisation: Quantisation | None = None,
    placement: Sharding | None = None,
) -> ServingWeights:
    """Fuses stacked parameters {"edge", "blocks" [L, ...]}, quantises and places them.

    Args:
        placement: one device's sharding, or a `NamedSharding` whose mesh has the axis `TENSOR`;
            where they lie if None.

    Raises:
        UsageError: if the mesh cannot divide the heads or the feed-forward evenly, or the decoder's
            mathematics are not Llama's.
    """
    check_served(config)
    if isinstance(placement, NamedSharding) and isinstance(placement.mesh, Mesh):
        check_tensor_parallel(config, placement.mesh)
    edge, blocks = parameters["edge"], parameters["blocks"]
    groups, width = config.num_kv_heads, config.head_dim
    rows = config.num_heads // groups

    def layer(index: int) -> LayerWeights:
        attention = {name: leaf[index] for name, leaf in blocks["attention"].items()}
        mlp = {name: leaf[index] for name, leaf in blocks["mlp"].items()}
        split = (config.hidden_size, groups, -1, width)
        heads = [attention[name].reshape(split) for name in ("query", "key", "value")]
        qkv = jnp.concatenate(heads, axis=2)
        gate_up = jnp.stack([mlp["gate"], mlp["up"]], axis=1)
        out = attention["out"].reshape(groups, rows, width, config.hidden_size)
        return LayerWeights(
            attention_norm=blocks["attention_norm"]["scale"][index],
            qkv=_matrix(qkv, 1, quantisation),
            out=_matrix(out, 3, quantisation),
            mlp_norm=blocks["mlp_norm"]["scale"][index],
            gate_up=_matrix(gate_up, 1, quantisation),
            down=_matrix(mlp["down"], 1, quantisation),
        )

    specs = layer_specs()
    layers = []
    for index in range(config.num_layers):
        # Placed one by one: never more than one fused layer beside the original.
        layers.append(_place(layer(index), specs, placement))
    head = None
    if not config.tie_embeddings:
        head = _matrix(edge["head"]["kernel"], 1, quantisation)
        head = _place(head, PartitionSpec(None, TENSOR), placement)
    return ServingWeights(
        embedding=_place(edge["embed"]["table"], PartitionSpec(), placement),
        layers=tuple(layers),
        norm=_place(edge["norm"]["scale"], PartitionSpec(), placement),
        head=head,
    )


def check_served(config: DecoderConfig) -> None:
    """Raises UsageError for a decoder that the passes do not compute."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
    more = ("num_kv_heads", "head_dim", "rope_theta", "rope_scaling", "rms_norm_eps", "family")
    kept = (*sizes, *more, "tie_embeddings", "max_positions")
    plain = DecoderConfig(**{name: getattr(config, name) for name in kept})
    fields = (field.name for field in dataclasses.fields(config))
    unlike = [name for name in fields if getattr(config, name) != getattr(plain, name)]
    rope = plain.rope()
    if rope is not None and rope.depends_on_length:
        unlike.append("rope_scaling")
    if unlike:
        raise UsageError(
            f"{config.family} with {unlike[0]}={getattr(config, unlike[0])!r} is not served; "
            "models of Llama's mathematics are"
        )


def layer_specs() -> tuple[PartitionSpec, ...]:
    """How each field of `LayerWeights` is split; a matrix's scale follows its outputs."""
    spec = PartitionSpec
    return (
        spec(),
        spec(None, TENSOR, None, None),
        spec(TENSOR, None, None, None),
        spec(),
        spec(None, None, TENSOR),
        spec(TENSOR, None),
    )


def check_tensor_parallel(config: DecoderConfig, mesh: Mesh) -> None:
    """Raises UsageError where the mesh's `TENSOR` axis does not divide heads and feed-forward."""
    ways = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True)).get(TENSOR)
    if ways is None:
        raise UsageError(f"the mesh has axes {mesh.axis_names}; it needs one named {TENSOR!r}")
    common = math.gcd(config.num_kv_heads, config.intermediate_size, config.vocab_size)
    if common % ways:
        fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
        raise UsageError(
            f"tensor_parallel={ways} does not divide num_kv_heads={config.num_kv_heads}, "
            f"intermediate_size={config.intermediate_size} and vocab_size={config.vocab_size}; "
            f"use {', '.join(fitting)}"
        )


def matmul(
    x: Float[Array, "B T *inputs"],
    matrix: Matrix,
    *,
    inputs: int = 1,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "B T *outputs"]:
    """x times a matrix, over the last `inputs` axes of `x`; accumulated in float32 at least.

    Args:
        dtype: of the result; that of `x` if None.
    """
    values = matrix.values.astype(x.dtype)
    axes = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
    product = jax.lax.dot_general(
        x, values, (axes, ((), ())), preferred_element_type=dtype or x.dtype
    )
    if matrix.scale is not None:
        shape = (1,) * (product.ndim - matrix.scale.ndim) + matrix.scale.shape
        product = (product * matrix.scale.reshape(shape)).astype(product.dtype)
    return product


def _matrix(values: jax.Array, inputs: int, quantisation: Quantisation | None) -> Matrix:
    if quantisation is None:
        return Matrix(values)
    dtype, most = _FORMS[quantisation]
    wide = values.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=tuple(range(inputs)))
    scale = jnp.where(largest > 0, largest, 1.0) / most
    scaled = wide / scale.reshape((1,) * inputs + scale.shape)
    # To an integer the cast would truncate; to a float it rounds to the nearest.
    return Matrix((jnp.round(scaled) if dtype == jnp.int8 else scaled).astype(dtype), scale)


def _place(tree: Any, specs: Any, placement: Sharding | None) -> Any:
    """Puts arrays where they belong; `specs` says how a mesh splits each matrix or vector."""
    if placement is None:
        return tree
    if not isinstance(placement, NamedSharding):
        return jax.device_put(tree, placement)

    def put(spec: PartitionSpec, node: Any) -> Any:
        if not isinstance(node, Matrix):
            return jax.device_put(node, NamedSharding(placement.mesh, spec))
        scale = node.scale
        if scale is not None:
            last = PartitionSpec(*tuple(spec)[len(spec) - scale.ndim :])
            scale = jax.device_put(scale, NamedSharding(placement.mesh, last))
        return Matrix(jax.device_put(node.values, NamedSharding(placement.mesh, spec)), scale)

    if isinstance(specs, PartitionSpec):
        return put(specs, tree)
    return type(tree)(*(put(spec, node) for spec, node in zip(specs, tree, strict=True)))

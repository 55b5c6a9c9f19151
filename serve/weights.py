"""A decoder's weights as the server computes with them: fused, split by layer, quantised, sharded.

Matrices that read the same input are one: queries, keys and values of a layer as [D, G, R+2, K]
(each key/value head beside the query heads it serves), gate and up as [D, 2, F]. At batch 1 on an
H100 the fused pair ran 20 % faster than apart. Both split evenly over a mesh axis along G and F, so
tensor parallelism needs no other layout. Which matrices and vectors a layer has is the model's
description; `HeldFused` is how `jaxsys.model.block` computes with them.

A quantised matrix (int8, or fp8: e4m3fn) keeps one scale an output column, W = value * scale,
such that the column's largest value is the largest of the form. Values are widened, exactly, to
what the pass computes in on their way into the product, whose result is scaled: a step reads half
the bytes, and activations stay as they are.

Legend: D width, F feed-forward, N query heads, G key/value heads, R = N / G, K head width, E
experts, V vocabulary, L layers.
"""

import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters
from jaxsys.mesh import TENSOR
from jaxsys.model import DecoderConfig
from jaxsys.model.block import HeldWhole
from jaxsys.model.decoder import layer_of
from jaxsys.model.experts import Chosen
from jaxsys.model.leaves import Leaf, block_leaves
from jaxsys.serve.expert_weights import ExpertWeights, Grouped, expert_weights, mix
from jaxsys.serve.expert_weights import placed as expert_weights_placed

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
    """One decoder layer, by names that are paths of its leaves, fused ones by a name of their own.

    Matrices: `qkv` [D, G, R+2, K]; `out` [G, R, K, D]; `mlp/up` and `shared/up` [D, 2, F], gate
    first ([D, 1, F] without one); others as the parameters have them. Of
    latent attention: `attention/latent_up` [C, N, P+V], which is multiplied from both sides and
    keeps its bits, and `out` [N, 1, V, D].
    """

    matrices: dict[str, Matrix]
    vectors: dict[str, jax.Array]
    """Norms, biases (fused like their matrices), sinks [G, R], corrections."""
    experts: ExpertWeights | None = None


class ServingWeights(NamedTuple):
    """The whole decoder."""

    embedding: jax.Array
    """[V, D]."""
    layers: tuple[LayerWeights, ...]
    norm: jax.Array
    """[D]."""
    head: Matrix | None
    """[D, V]; None where it is the embedding."""
    norm_bias: jax.Array | None = None
    """[D]."""

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
        parameters: "blocks" may be a function that gives the layer of a number.
        placement: one device's sharding, or a `NamedSharding` whose mesh has the axis `TENSOR`;
            where they lie if None.

    Raises:
        UsageError: if the mesh cannot divide the heads or the feed-forward evenly.
    """
    if isinstance(placement, NamedSharding) and isinstance(placement.mesh, Mesh):
        check_tensor_parallel(config, placement.mesh)
    edge, blocks = parameters["edge"], parameters["blocks"]
    layers = []
    first = None if placement is None else min(placement.device_set, key=lambda one: one.id)
    for index in range(config.num_layers):
        # Fused where they are to lie, and placed one by one: never more than one layer beside the
        # result, or beside the result and the original.
        with jax.default_device(first):
            tree = layer_of(config, blocks, index)
        if first is not None:
            tree = jax.device_put(tree, jax.sharding.SingleDeviceSharding(first))
        leaves = block_leaves(config, config.kind(index))
        layers.append(_place_layer(_fused(config, leaves, tree, quantisation), placement))
    head = None
    if not config.tie_embeddings:
        head = _matrix(edge["head"]["kernel"], 1, quantisation)
        head = _place(head, PartitionSpec(None, TENSOR), placement)
    bias = edge["norm"].get("bias")
    return ServingWeights(
        embedding=_place(edge["embed"]["table"], PartitionSpec(), placement),
        layers=tuple(layers),
        norm=_place(edge["norm"]["scale"], PartitionSpec(), placement),
        head=head,
        norm_bias=None if bias is None else _place(bias, PartitionSpec(), placement),
    )


_QKV = tuple(("attention", name) for name in ("query", "key", "value"))
_FEEDS = ("mlp", "shared")


def _fused(
    config: DecoderConfig,
    leaves: tuple[Leaf, ...],
    tree: Any,
    quantisation: Quantisation | None,
) -> LayerWeights:
    """One layer's leaves, fused where they read the same input, and quantised."""
    groups, width = config.num_kv_heads, config.head_dim
    rows = config.num_heads // groups
    latent = config.latent
    if latent is not None:
        groups, rows, width = config.num_heads, 1, latent.value_dim
    found = {leaf.path: _at(tree, leaf.path) for leaf in leaves}
    matrices: dict[str, Matrix] = {}
    vectors: dict[str, jax.Array] = {}

    def joined(suffix: str, lead: tuple[int, ...]) -> jax.Array:
        heads = [found.pop((a, name + suffix)) for a, name in _QKV]
        return jnp.concatenate([h.reshape(*lead, groups, -1, width) for h in heads], axis=-2)

    if latent is None:
        matrices["qkv"] = _matrix(joined("", (config.hidden_size,)), 1, quantisation)
    else:
        unfolding = found.pop(("attention", "latent_up"))
        matrices["attention/latent_up"] = Matrix(unfolding.reshape(latent.rank, groups, -1))
    if ("attention", "query_bias") in found:
        vectors["qkv_bias"] = joined("_bias", ())
    out = found.pop(("attention", "out")).reshape(groups, rows, width, config.hidden_size)
    matrices["out"] = _matrix(out, 3, quantisation)
    if (sinks := found.pop(("attention", "sinks"), None)) is not None:
        vectors["attention/sinks"] = sinks.reshape(groups, rows)
    for name in _FEEDS:
        for suffix in ("", "_bias"):
            parts = [found.pop((name, part + suffix), None) for part in ("gate", "up")]
            held = [part for part in parts if part is not None]
            if not held:
                continue
            stacked = jnp.stack(held, axis=-2)
            if suffix:
                vectors[f"{name}/up_bias"] = stacked
            else:
                matrices[f"{name}/up"] = _matrix(stacked, 1, quantisation)
    experts = None
    if ("experts", "down") in found:
        experts = expert_weights(found, functools.partial(_of_experts, quantisation))
    is_matrix = {leaf.path: leaf.is_matrix for leaf in leaves}
    for path, value in found.items():
        name = "/".join(path)
        if not is_matrix[path]:
            vectors[name] = value
        else:
            # Routers and gates of one column decide: they keep their bits.
            decides = path[-1] in ("router", "weight")
            matrices[name] = _matrix(value, 1, None if decides else quantisation)
    return LayerWeights(matrices, vectors, experts)


def _of_experts(
    quantisation: Quantisation | None, kernels: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """See `expert_weights.Quantise`: an expert's scale is a column's of that expert."""
    if quantisation is None:
        return kernels, None
    small = _matrix(kernels.swapaxes(0, 1), 1, quantisation)
    return small.values.swapaxes(0, 1), small.scale


def _at(tree: Any, path: tuple[str, ...]) -> jax.Array:
    for name in path:
        tree = tree[name]
    return tree


class HeldFused(HeldWhole):
    """One served layer, for the mathematics of `jaxsys.model.block`: see `Held` there."""

    def __init__(self, config: DecoderConfig, layer: LayerWeights, grouped: Grouped) -> None:
        """`grouped` multiplies by experts."""
        self._config, self._layer, self._grouped = config, layer, grouped

    def vector(self, *path: str) -> jax.Array | None:
        """The vector at `path`, or None."""
        return self._layer.vectors.get("/".join(path))

    def query_key_value(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, T, D] -> q [B, T, G, R, K], k and v [B, T, G, K]: one product."""
        fused = self._biased(matmul(x, self._layer.matrices["qkv"]), "qkv_bias")
        rows = fused.shape[-2] - 2
        return fused[..., :rows, :], fused[..., rows, :], fused[..., rows + 1, :]

    def product(self, x: jax.Array, *path: str) -> jax.Array:
        """The last axis of x times one matrix."""
        name = "/".join(path)
        return self._biased(matmul(x, self._layer.matrices[name]), f"{name}_bias")

    def heads_out(self, o: jax.Array) -> jax.Array:
        """[B, T, G, R, K] -> [B, T, D]."""
        out = self._layer.matrices["out"]
        o = o.reshape(*o.shape[:2], *out.values.shape[:-1])
        return self._biased(matmul(o, out, inputs=3), "attention/out_bias")

    def latent_up(self) -> jax.Array:
        """As it is kept."""
        return self._layer.matrices["attention/latent_up"].values

    def up(self, x: jax.Array, name: str) -> tuple[jax.Array | None, jax.Array]:
        """Gate and up: one product."""
        both = self._biased(matmul(x, self._layer.matrices[f"{name}/up"]), f"{name}/up_bias")
        return (both[..., 0, :] if self._config.gated else None), both[..., -1, :]

    def mix(self, rows: jax.Array, chosen: Chosen) -> jax.Array:
        """The experts used, and no others."""
        experts = self._layer.experts
        assert experts is not None
        return mix(self._config, experts, self._grouped, rows, chosen)

    def _biased(self, product: jax.Array, name: str) -> jax.Array:
        bias = self._layer.vectors.get(name)
        if bias is None:
            return product
        return product + bias.reshape((1,) * (product.ndim - bias.ndim) + bias.shape)


def check_served(config: DecoderConfig, max_length: int | None = None) -> None:
    """Raises UsageError for a decoder that the passes do not compute.

    Args:
        max_length: tokens of the longest request; None does not ask.
    """
    for kind in config.kinds:
        rope = config.rope(kind)
        if rope is None or not rope.depends_on_length:
            continue
        most: int = rope.scaling.original_max_positions  # type: ignore[union-attr]
        if max_length is not None and max_length > most:
            raise UsageError(
                f"max_length={max_length} is past the {most} positions up to which this model's "
                f"rotary scaling does not change with a request's length; use {most} or less"
            )


_SPLIT: dict[str, PartitionSpec] = {
    "qkv": PartitionSpec(None, TENSOR, None, None),
    "qkv_bias": PartitionSpec(TENSOR, None, None),
    "out": PartitionSpec(TENSOR, None, None, None),
    "attention/sinks": PartitionSpec(TENSOR, None),
    "attention/query": PartitionSpec(None, TENSOR),
    "attention/query_up": PartitionSpec(None, TENSOR),
    "attention/latent_up": PartitionSpec(None, TENSOR, None),
    **{f"{name}/up": PartitionSpec(None, None, TENSOR) for name in _FEEDS},
    **{f"{name}/up_bias": PartitionSpec(None, TENSOR) for name in _FEEDS},
    **{f"{name}/down": PartitionSpec(TENSOR, None) for name in _FEEDS},
}
"""How a mesh splits what it splits; all else is whole on each device. A matrix's scale follows its
outputs."""


def check_tensor_parallel(config: DecoderConfig, mesh: Mesh) -> None:
    """Raises UsageError where the mesh's `TENSOR` axis does not divide heads and feed-forward."""
    ways = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True)).get(TENSOR)
    if ways is None:
        raise UsageError(f"the mesh has axes {mesh.axis_names}; it needs one named {TENSOR!r}")
    sizes = {name: getattr(config, name) for name in ("num_kv_heads", "vocab_size")}
    if any(not kind.experts for kind in config.kinds):
        sizes["intermediate_size"] = config.intermediate_size
    if config.experts is not None:
        sizes["hidden_size"] = config.hidden_size
        sizes["experts intermediate_size"] = config.experts.intermediate_size
        if config.experts.shared_size:
            sizes["experts shared_size"] = config.experts.shared_size
    common = math.gcd(*sizes.values())
    if common % ways:
        fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
        said = [f"{name}={value}" for name, value in sizes.items()]
        raise UsageError(
            f"tensor_parallel={ways} does not divide {', '.join(said[:-1])} and {said[-1]}; "
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


def _place_layer(layer: LayerWeights, placement: Sharding | None) -> LayerWeights:
    whole = PartitionSpec()

    def placed(group: dict[str, Any]) -> dict[str, Any]:
        return {
            name: _place(value, _SPLIT.get(name, whole), placement) for name, value in group.items()
        }

    experts = layer.experts
    if experts is not None:
        experts = expert_weights_placed(experts, placement, TENSOR)
    return LayerWeights(placed(layer.matrices), placed(layer.vectors), experts)


def _place(node: Any, spec: PartitionSpec, placement: Sharding | None) -> Any:
    """Puts a matrix or vector where it belongs; `spec` says how a mesh splits it."""
    if placement is None:
        return node
    if not isinstance(placement, NamedSharding):
        return jax.device_put(node, placement)
    if not isinstance(node, Matrix):
        return jax.device_put(node, NamedSharding(placement.mesh, spec))
    scale = node.scale
    if scale is not None:
        axes = tuple(spec) + (None,) * (node.values.ndim - len(spec))
        last = PartitionSpec(*axes[len(axes) - scale.ndim :])
        scale = jax.device_put(scale, NamedSharding(placement.mesh, last))
    return Matrix(jax.device_put(node.values, NamedSharding(placement.mesh, spec)), scale)

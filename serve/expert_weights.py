"""Experts as the server computes with them: outputs first, gate beside up, packed if they came so.

    y = sum over a token's experts e of w_e (down_e act(up_e x))

Products read the experts that a batch uses and no others (`jaxsys.model.grouped`). MXFP4 matrices
stay as they are published, half a byte a number, and are unpacked inside the product; int8 and fp8
keep one scale an output of an expert and are widened there.

Legend: E experts, D width, F feed-forward, U 2 with a gate and 1 without, R tokens, A experts a
token uses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

from jaxsys.model import DecoderConfig
from jaxsys.model import experts as mixture
from jaxsys.model.block import activation
from jaxsys.model.grouped import Way, Work, used_product, work_of
from jaxsys.model.packed import Packed


class ExpertMatrix(NamedTuple):
    """One matrix of every expert."""

    values: jax.Array | Packed
    """[E, U, F, D] or [E, D, F]."""
    scale: jax.Array | None = None
    """Of each output, where values are quantised."""


class ExpertWeights(NamedTuple):
    """The experts of a layer, its router apart."""

    up: ExpertMatrix
    """[E, U, F, D], gate first."""
    down: ExpertMatrix
    """[E, D, F]."""
    up_bias: jax.Array | None = None
    """[E, U, F]."""
    down_bias: jax.Array | None = None
    """[E, D]."""


Quantise = Callable[[jax.Array], tuple[jax.Array, jax.Array | None]]
"""Kernels [E, in, out] -> values [E, in, out] and, where they are scaled, scales [E, out]."""
Grouped = Callable[[jax.Array, Any, Work], jax.Array]
"""`used_product`, by what a device is quickest with."""


def expert_weights(found: dict[tuple[str, ...], Any], quantise: Quantise) -> ExpertWeights:
    """Takes the experts' leaves out of a layer's."""

    def taken(*names: str) -> ExpertMatrix:
        values, packed, scales = [], [], []
        for path in [("experts", name) for name in names]:
            if path not in found:
                continue
            kernels = found.pop(path)
            if isinstance(kernels, Packed):
                packed.append(kernels)
                continue
            value, scale = jax.block_until_ready(quantise(kernels))
            del kernels  # before the next ones are read
            values.append(value)
            scales += [] if scale is None else [scale]
        if packed:
            return ExpertMatrix(jax.tree.map(_beside, *packed))
        return ExpertMatrix(_outputs_first(*values), _beside(*scales) if scales else None)

    def alone(matrix: ExpertMatrix) -> ExpertMatrix:
        """What `_beside` made of one, its axis taken off again."""
        return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], *leaf.shape[2:]), matrix)

    up = jax.block_until_ready(taken("gate", "up"))
    down = alone(taken("down"))
    biases = [found.pop(("experts", f"{name}_bias"), None) for name in ("gate", "up")]
    biases = [bias for bias in biases if bias is not None]
    up_bias = _beside(*biases) if biases else None
    return ExpertWeights(up, down, up_bias, found.pop(("experts", "down_bias"), None))


def _beside(*parts: jax.Array) -> jax.Array:
    return jnp.stack(parts, axis=1)


@jax.jit
def _outputs_first(*kernels: jax.Array) -> jax.Array:
    """[E, in, out] each -> [E, U, out, in], with nothing between."""
    return jnp.stack([kernel.swapaxes(1, 2) for kernel in kernels], axis=1)


def placed(weights: ExpertWeights, placement: Sharding | None, axis: str) -> ExpertWeights:
    """On its devices; a mesh's `axis` cuts each matrix's outputs."""
    if placement is None:
        return weights
    if not isinstance(placement, NamedSharding):
        return jax.device_put(weights, placement)
    mesh = placement.mesh

    def put(node: Any, spec: PartitionSpec) -> Any:
        return jax.device_put(node, NamedSharding(mesh, spec))

    def matrix(node: ExpertMatrix, spec: PartitionSpec) -> ExpertMatrix:
        return jax.tree.map(lambda leaf: put(leaf, spec), node)

    whole = PartitionSpec()
    return ExpertWeights(
        matrix(weights.up, PartitionSpec(None, None, axis)),
        matrix(weights.down, PartitionSpec(None, axis)),
        put(weights.up_bias, whole),
        put(weights.down_bias, whole),
    )


def grouped_over(way: Way, mesh: Mesh | None, axis: str) -> Grouped:
    """Products whose matrices lie whole on a device, or cut over a mesh as `placed` cuts them."""
    if mesh is None:
        return lambda rows, weights, work: used_product(rows, weights, work, way)

    def product(rows: jax.Array, weights: Any, work: Work) -> jax.Array:
        axes = jax.tree.leaves(weights)[0].ndim

        def own(rows: jax.Array, weights: Any, cut: Any) -> jax.Array:
            return used_product(rows, weights, work._replace(cut=cut), way)

        return jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(
                PartitionSpec(),
                PartitionSpec(*(None,) * (axes - 2), axis),
                PartitionSpec(),
            ),
            out_specs=PartitionSpec(*(None,) * (axes - 2), axis),
            check_vma=False,  # loops start from constants, the same on every device
        )(rows, weights, work.cut)

    return product


used_by_walk = grouped_over("walk", None, "")
"""On any one device."""


def mix(
    config: DecoderConfig,
    weights: ExpertWeights,
    grouped: Grouped,
    rows: Float[Array, "R D"],
    chosen: mixture.Chosen,
) -> Float[Array, "R D"]:
    """What each token's experts make of it, weighed and summed."""
    experts = config.experts
    assert experts is not None
    order = work_of(chosen.experts, experts.count)
    x = rows if order.places is None else rows[order.places.rows]

    def times(x: jax.Array, matrix: ExpertMatrix, bias: jax.Array | None, work: Work) -> jax.Array:
        y = grouped(x, matrix.values, work)
        if matrix.scale is not None:
            y = (y * matrix.scale[order.experts]).astype(x.dtype)
        return y if bias is None else y + bias[order.experts]

    both = times(x, weights.up, weights.up_bias, order.work)
    gate = both[:, 0] if config.gated else None
    inner = mixture.activate(experts, lambda a: activation(config.activation, a), gate, both[:, -1])
    fed = times(inner, weights.down, weights.down_bias, order.work._replace(share=1))
    if order.places is not None:
        return mixture.gather(fed, order.places, chosen.weights)
    each = fed.reshape(*chosen.weights.shape, -1)
    return jnp.sum(each * chosen.weights[..., None].astype(fed.dtype), axis=1)

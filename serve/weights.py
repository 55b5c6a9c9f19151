"""A decoder's weights as the server computes with them: fused, split by layer, quantised, sharded.

Matrices that read the same input are one: queries, keys and values of a layer give [G, R+2, K]
(each key/value head beside the query heads it serves), gate and up [W, 2, F / W], each device's
parts together. At batch 1 on an H100 the fused pair ran 20 % faster than apart. Both split evenly
over a mesh axis along G and W, so tensor parallelism needs no other layout. Which matrices and
vectors a layer has is the model's description; `HeldFused` is how `jaxsys.model.block` computes
with them, `matrix` what one of them is and how it multiplies.

Legend: D width, F feed-forward, N query heads, G key/value heads, R = N / G, K head width, E
experts, V vocabulary, L layers, W devices of a mesh.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from jaxsys import float8, forms
from jaxsys.errors import UsageError
from jaxsys.layered import Parameters
from jaxsys.model import DecoderConfig
from jaxsys.model.block import HeldWhole
from jaxsys.model.decoder import layer_of
from jaxsys.model.experts import Chosen
from jaxsys.model.leaves import Leaf, block_leaves, edge_leaves
from jaxsys.serve.expert_weights import ExpertWeights, Grouped, expert_weights, mix
from jaxsys.serve.expert_weights import placed as expert_weights_placed
from jaxsys.serve.matrix import (
    QUANTISATIONS,
    Matrix,
    Quantisation,
    Way,
    matmul,
    plain,
    quantised,
    way,
)
from jaxsys.serve.split import AXIS, FEEDS, SPLIT, check_tensor_parallel, devices_of, placed_as

if TYPE_CHECKING:
    from jaxsys.serve.lora import AdaptedLayer


class LayerWeights(NamedTuple):
    """One decoder layer, by names that are paths of its leaves, fused ones by a name of their own.

    Matrices by what they give: `qkv` [G, R+2, K]; `out` [D]; `mlp/up` and `shared/up`
    [W, 2, F / W], gate first ([W, 1, F / W] without one); others as the parameters have them. Of
    latent attention: `attention/latent_up` [C, N, P+V], which is multiplied from both sides and
    keeps its bits.
    """

    matrices: dict[str, Matrix]
    vectors: dict[str, jax.Array]
    """Norms, biases (in the form of what they are added to), sinks [G, R], corrections."""
    experts: ExpertWeights | None = None


class ServingWeights(NamedTuple):
    """The whole decoder."""

    embedding: jax.Array
    """[V, D]."""
    layers: tuple[LayerWeights, ...]
    norm: jax.Array
    """[D]."""
    head: Matrix | None
    """D to V; None where it is the embedding."""
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
    how: Way | None = None,
) -> ServingWeights:
    """Fuses stacked parameters {"edge", "blocks" [L, ...]}, quantises and places them.

    Args:
        parameters: "blocks" may be a function that gives the layer of a number, and leaves may be
            functions that give arrays.
        placement: one device's sharding, or a `NamedSharding` over a mesh of `jaxsys.serve.split`;
            where they lie if None.
        how: matrices lie and multiply; what suits each one's form and the device if None.

    Raises:
        UsageError: if the mesh cannot divide the heads or the feed-forward evenly.
    """
    ways = 1
    if isinstance(placement, NamedSharding) and isinstance(placement.mesh, Mesh):
        check_tensor_parallel(config, placement.mesh)
        ways = devices_of(placement.mesh)
    blocks = parameters["blocks"]
    form = _Forms(quantisation, ways, how, _device(placement))
    layers = []
    first = None if placement is None else min(placement.device_set, key=lambda one: one.id)
    # Read, fused and quantised where they are to lie, and placed one by one: never more than one
    # layer beside the result, or beside the result and the original.
    for index in range(config.num_layers):
        leaves = block_leaves(config, config.kind(index))
        with jax.default_device(first):
            found = _Found(layer_of(config, blocks, index), [leaf.path for leaf in leaves], first)
            made = _fused(config, leaves, found, form)
        layers.append(_place_layer(made, placement))
        del made
        jax.block_until_ready(layers[-1])  # or the next is read while this one is still apart
    with jax.default_device(first):
        edge = _Found(parameters["edge"], [leaf.path for leaf in edge_leaves(config)], first)
        head = None
        if not config.tie_embeddings:
            path = ("head", "kernel")
            head = placed_as(form.of(edge.pop(path), path), "outputs", placement)
        bias = edge.pop(("norm", "bias"), None)
        return ServingWeights(
            embedding=placed_as(edge.pop(("embed", "table")), PartitionSpec(), placement),
            layers=tuple(layers),
            norm=placed_as(edge.pop(("norm", "scale")), PartitionSpec(), placement),
            head=head,
            norm_bias=None if bias is None else placed_as(bias, PartitionSpec(), placement),
        )


class _Found(dict[tuple[str, ...], Any]):
    """Leaves by their paths, read where they are functions, and brought to a device, when taken."""

    def __init__(self, tree: Any, paths: Sequence[tuple[str, ...]], device: Any) -> None:
        super().__init__({path: _at(tree, path) for path in paths})
        self._device = device

    def pop(self, path: tuple[str, ...], *default: Any) -> Any:
        """The leaf, which is not kept here; or a default."""
        leaf = super().pop(path, *default)
        leaf = leaf() if callable(leaf) else leaf
        if self._device is None or leaf is None:
            return leaf
        return jax.device_put(leaf, jax.sharding.SingleDeviceSharding(self._device))


class _Form(NamedTuple):
    """What a matrix becomes."""

    quantisation: Quantisation
    way: Way
    devices: int


class _Forms:
    """What matrices become, by their paths."""

    def __init__(
        self, asked: Quantisation | None, devices: int, how: Way | None, device: Any
    ) -> None:
        """`devices` share a matrix, of which `device` is one; they multiply by `how`, if given."""
        self.asked: Quantisation | None = asked
        self.devices = devices
        self._how, self._device = how, device

    def of(self, kernel: jax.Array, path: tuple[str, ...]) -> Matrix:
        """The kernel [K, N] at a path."""
        if self.asked is None:
            return plain(kernel)
        form = forms.form_of(path, self.asked)
        how = self._how
        if how is None:
            how = way(form, self._device)
            if self.devices > 1:
                # Kernels for few rows see one device's arrays, which no mesh splits for them.
                how = dataclasses.replace(how, one_row=False, few_rows=0)
        return _in_parts(kernel, _Form(form, how, self.devices))

    def of_experts(self, kernels: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """See `expert_weights.Quantise`; what would be int4 is int8, a scale an output."""
        if self.asked is None:
            return kernels, None
        small = float8.E4M3 if self.asked == "fp8" else jnp.int8
        return _scaled_experts(kernels, small)


_AT_ONCE = 1 << 19
"""Numbers of a matrix that are wide at a time."""


def _in_parts(kernel: jax.Array, form: _Form) -> Matrix:
    """A kernel [K, N] made small some outputs at a time, so that little of it is wide."""
    inputs, outputs = kernel.shape
    step = min(outputs, max(1, _AT_ONCE // inputs))
    values, scale = jax.eval_shape(
        functools.partial(_part, form, step), kernel, jax.ShapeDtypeStruct((), jnp.int32)
    )
    held = [jnp.zeros((outputs, *one.shape[1:]), one.dtype) for one in (values, scale)]
    for first in range(0, outputs, step):
        # The last ones begin earlier, where the step does not divide: some are made twice.
        held = _next_part(form, step, held, kernel, min(first, outputs - step))
    return Matrix(held[0], held[1], (outputs,), True, form.way)


def _part(
    form: _Form, step: int, kernel: jax.Array, first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    some = jax.lax.dynamic_slice_in_dim(kernel, first, step, 1)
    made = quantised(some, form.quantisation, form.way, form.devices)
    assert made.scale is not None
    return made.values, made.scale


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _next_part(
    form: _Form, step: int, held: list[jax.Array], kernel: jax.Array, first: jax.Array
) -> list[jax.Array]:
    put = jax.lax.dynamic_update_slice_in_dim
    made = _part(form, step, kernel, first)
    return [put(old, new, first, 0) for old, new in zip(held, made, strict=True)]


@functools.partial(jax.jit, static_argnums=1)
def _scaled_experts(kernels: jax.Array, small: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Values, and a scale an output [E, N]; one expert after the other, so that little is wide."""
    values, scale = jax.lax.map(lambda kernel: float8.scaled(kernel, small, axis=0), kernels)
    return values, scale[:, 0]


def _device(placement: Sharding | None) -> Any:
    return jax.devices()[0] if placement is None else next(iter(placement.device_set))


FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv": ("attention/query", "attention/key", "attention/value"),
    **{f"{name}/up": (f"{name}/gate", f"{name}/up") for name in FEEDS},
}
"""Matrices that are several kernels in one: those that there are, in this order."""


def fuse(
    config: DecoderConfig,
    name: str,
    parts: Sequence[Any],
    devices: int,
    xp: Any = np,
    *,
    outputs_first: bool = False,
) -> Any:
    """Kernels or biases [..., N], or [N, ...], as the matrix `name` has them.

    Args:
        devices: over which outputs may be split.
        xp: numpy, or its like that the parts are arrays of.
        outputs_first: whether outputs are the first axis, not the last.

    Returns:
        The same with several axes in place of N.
    """
    if name not in FUSED:
        (only,) = parts
        return only
    split = (config.num_kv_heads, -1, config.head_dim) if name == "qkv" else (devices, -1)

    def apart(part: Any) -> Any:
        lead, rest = ((), part.shape[1:]) if outputs_first else (part.shape[:-1], ())
        return part.reshape(*lead, *split, *rest)

    axis = 1 if outputs_first else parts[0].ndim
    join = xp.concatenate if name == "qkv" else xp.stack
    return join([apart(part) for part in parts], axis=axis)


def _fused(
    config: DecoderConfig,
    leaves: tuple[Leaf, ...],
    found: _Found,
    form: _Forms,
) -> LayerWeights:
    """One layer's leaves, fused where they read the same input, and quantised.

    They are taken out of `found` one by one, so that they go when what they become is there.
    """
    groups, latent = config.num_kv_heads, config.latent
    rows = config.num_heads // groups
    matrices: dict[str, Matrix] = {}
    vectors: dict[str, jax.Array] = {}

    def paths(name: str, suffix: str = "") -> list[tuple[str, ...]]:
        those = [tuple(f"{path}{suffix}".split("/")) for path in FUSED[name]]
        return [path for path in those if path in found]

    def fused(name: str, parts: list[jax.Array], *, outputs_first: bool = False) -> jax.Array:
        return fuse(config, name, parts, form.devices, jnp, outputs_first=outputs_first)

    def joined(name: str, where: list[tuple[str, ...]]) -> Matrix:
        if form.asked is None:
            kernels = fused(name, [found.pop(path) for path in where])
            return plain(kernels.reshape(kernels.shape[0], -1), kernels.shape[1:])
        # Each is small before it is put beside the others, of which no output knows.
        small = [jax.block_until_ready(form.of(found.pop(path), path)) for path in where]
        values = [one.values for one in small]
        scales = [one.scale for one in small if one.scale is not None]
        both = fused(name, values, outputs_first=True)
        outputs = both.shape[: both.ndim - values[0].ndim + 1]
        return Matrix(
            both.reshape(-1, *values[0].shape[1:]),
            fused(name, scales, outputs_first=True).reshape(-1, *scales[0].shape[1:]),
            outputs,
            True,
            small[0].way,
        )

    if latent is not None:
        unfolding = found.pop(("attention", "latent_up"))
        unfolding = unfolding.reshape(latent.rank, config.num_heads, -1)
        matrices["attention/latent_up"] = Matrix(unfolding, outputs=unfolding.shape[1:])
    out = ("attention", "out")
    matrices["out"] = form.of(found.pop(out), out)
    if (sinks := found.pop(("attention", "sinks"), None)) is not None:
        vectors["attention/sinks"] = sinks.reshape(groups, rows)
    for name in FUSED:
        if name == "qkv" and latent is not None:  # its queries stand alone
            continue
        if where := paths(name):
            matrices[name] = jax.block_until_ready(joined(name, where))
        if where := paths(name, "_bias"):
            vectors[f"{name}_bias"] = fused(name, [found.pop(path) for path in where])
    experts = None
    if ("experts", "down") in found:
        experts = expert_weights(found, form.of_experts)
    is_matrix = {leaf.path: leaf.is_matrix for leaf in leaves}
    for path in list(found):
        name, value = "/".join(path), found.pop(path)
        if not is_matrix[path]:
            vectors[name] = value
        else:
            # Routers and gates of one column decide: they keep their bits.
            decides = path[-1] in ("router", "weight")
            matrices[name] = (
                plain(value) if decides else jax.block_until_ready(form.of(value, path))
            )
    return LayerWeights(matrices, vectors, experts)


def _at(tree: Any, path: tuple[str, ...]) -> jax.Array:
    for name in path:
        tree = tree[name]
    return tree


__all__ = [
    "FUSED",
    "QUANTISATIONS",
    "HeldFused",
    "LayerWeights",
    "Matrix",
    "Quantisation",
    "ServingWeights",
    "check_served",
    "fuse",
    "longest_served",
    "matmul",
    "serving_weights",
]


class HeldFused(HeldWhole):
    """One served layer, for the mathematics of `jaxsys.model.block`: see `Held` there."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: LayerWeights,
        grouped: Grouped,
        adapted: "AdaptedLayer | None" = None,
    ) -> None:
        """`grouped` multiplies by experts; `adapted` has what adapters add to products."""
        self._config, self._layer, self._grouped = config, layer, grouped
        self._adapted = adapted

    def vector(self, *path: str) -> jax.Array | None:
        """The vector at `path`, or None."""
        return self._layer.vectors.get("/".join(path))

    def query_key_value(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, T, D] -> q [B, T, G, R, K], k and v [B, T, G, K]: one product."""
        fused = self._biased(self._times(x, "qkv"), "qkv_bias")
        rows = fused.shape[-2] - 2
        return fused[..., :rows, :], fused[..., rows, :], fused[..., rows + 1, :]

    def product(self, x: jax.Array, *path: str) -> jax.Array:
        """The last axis of x times one matrix."""
        name = "/".join(path)
        return self._biased(self._times(x, name), f"{name}_bias")

    def heads_out(self, o: jax.Array) -> jax.Array:
        """[B, T, G, R, K] -> [B, T, D]."""
        o = o.reshape(*o.shape[:2], -1)
        return self._biased(self._times(o, "out"), "attention/out_bias")

    def latent_up(self) -> jax.Array:
        """As it is kept."""
        return self._layer.matrices["attention/latent_up"].values

    def up(self, x: jax.Array, name: str) -> tuple[jax.Array | None, jax.Array]:
        """Gate and up: one product."""
        both = self._biased(self._times(x, f"{name}/up"), f"{name}/up_bias")
        gate, up = (both[..., part, :].reshape(*x.shape[:-1], -1) for part in (0, -1))
        return (gate if self._config.gated else None), up

    def mix(self, rows: jax.Array, chosen: Chosen) -> jax.Array:
        """The experts used, and no others."""
        experts = self._layer.experts
        assert experts is not None
        return mix(self._config, experts, self._grouped, rows, chosen)

    def _times(self, x: jax.Array, name: str) -> jax.Array:
        y = matmul(x, self._layer.matrices[name])
        return y if self._adapted is None else self._adapted.added(y, x, name)

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
    most = _unchanged_positions(config)
    if max_length is not None and max_length > most:
        raise UsageError(
            f"max_length={max_length} is past the {most} positions up to which this model's "
            f"rotary scaling does not change with a request's length; use {most} or less"
        )


def longest_served(config: DecoderConfig) -> int:
    """Tokens of the longest request that a server of the decoder takes."""
    return int(min(config.max_positions, _unchanged_positions(config)))


def _unchanged_positions(config: DecoderConfig) -> float:
    """Positions up to which no rotary scaling changes with a request's length."""
    ropes = [config.rope(kind) for kind in config.kinds]
    return min(
        (
            rope.scaling.original_max_positions  # type: ignore[union-attr]
            for rope in ropes
            if rope is not None and rope.depends_on_length
        ),
        default=math.inf,
    )


def _place_layer(layer: LayerWeights, placement: Sharding | None) -> LayerWeights:
    whole = PartitionSpec()

    def placed(group: dict[str, Any]) -> dict[str, Any]:
        named = group.items()
        return {name: placed_as(one, SPLIT.get(name, whole), placement) for name, one in named}

    experts = layer.experts
    if experts is not None:
        experts = expert_weights_placed(experts, placement, AXIS)
    return LayerWeights(placed(layer.matrices), placed(layer.vectors), experts)

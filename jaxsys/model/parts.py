"""A decoder whose blocks several devices compute together.

Along `TENSOR` devices share the features: matrices are cut as their `Leaf.split` says, heads and
feed-forward in parts, and between products each device has its part of the sequence (Megatron's
sequence parallelism, Korthikanti et al., 2205.05198):

    n = norm(x)  [B, T/t, D]     every token-wise operation on a part of the tokens
    g = all_gather(n)            [B, T, D], before products whose columns are cut
    y = psum_scatter(h W)        [B, T/t, D], after products whose rows are cut

Where pieces go round a ring (`jaxsys.model.joins`) both are hops beside these products. Experts,
whose rows are sorted, and latent attention, which squeezes whole sequences, gather as above.

Embedding and head are cut over the vocabulary. Along `EXPERT` devices have different sequences and
share the experts: rows go to their experts' device by all_to_all and come back. As nothing is
dropped, each pair of devices has room for every row that could go that way.

What is said of a device is its part of a sum: see `jaxsys.layered.Parts`.

Legend: B batch, T tokens, t devices of TENSOR, D width, V vocabulary, E experts, A experts a token
uses, R rows.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxsys.axes import EXPERT, TENSOR, Joining
from jaxsys.errors import UsageError
from jaxsys.layered import Parameters, PyTree
from jaxsys.model import experts as mixture
from jaxsys.model.block import Between, HeldTree
from jaxsys.model.config import DecoderConfig
from jaxsys.model.decoder import by_kind, nest
from jaxsys.model.float8_products import Float8
from jaxsys.model.joins import JoiningRing, Pieces
from jaxsys.model.leaves import Leaf, block_leaves, edge_leaves


def check_parts(config: DecoderConfig, sizes: Mapping[str, int]) -> None:
    """Raises UsageError, which names what is legal, where a decoder cannot be split so.

    Args:
        config: the decoder.
        sizes: `TENSOR`, `EXPERT` -> devices.
    """
    ways, shares = sizes.get(TENSOR, 1), sizes.get(EXPERT, 1)
    if ways > 1 and config.qk_norm == "all":
        raise UsageError(
            f"tensor={ways} splits heads, and {config.family} normalises queries and keys over all "
            "of them together; use 1"
        )
    if ways > 1:
        _check_divides("tensor", ways, split_sizes(config))
    if shares > 1:
        if config.experts is None:
            raise UsageError(f"expert={shares}, but {config.family} has no experts; use 1")
        _check_divides("expert", shares, {"experts count": config.experts.count})


def why_not_cut(config: DecoderConfig, sizes: Mapping[str, int]) -> str | None:
    """Why `check_parts` refuses to split a decoder so; None if it does not."""
    try:
        check_parts(config, sizes)
    except UsageError as refused:
        return str(refused).rpartition(";")[0]  # what may be asked for instead is left out
    return None


def ways_to_cut(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """`TENSOR`, `EXPERT` -> over how many devices `check_parts` lets a decoder be split.

    Of features powers of two alone, as nodes have devices.
    """
    count = 1 if config.experts is None else config.experts.count
    wanted = {TENSOR: [2**n for n in range(7)], EXPERT: [n for n in range(1, count + 1)]}

    return {
        axis: tuple(n for n in counts if why_not_cut(config, {axis: n}) is None)
        for axis, counts in wanted.items()
    }


def split_sizes(config: DecoderConfig) -> dict[str, int]:
    """Name -> number, of what the devices of `TENSOR` must divide."""
    heads = "num_kv_heads" if config.latent is None else "num_heads"
    sizes = {name: getattr(config, name) for name in (heads, "vocab_size")}
    if any(not kind.experts for kind in config.kinds):
        sizes["intermediate_size"] = config.intermediate_size
    if config.experts is not None:
        sizes["experts intermediate_size"] = config.experts.intermediate_size
        if config.experts.shared_size:
            sizes["experts shared_size"] = config.experts.shared_size
    return sizes


def _check_divides(name: str, ways: int, sizes: Mapping[str, int]) -> None:
    common = math.gcd(*sizes.values())
    if common % ways:
        legal = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        *most, last = [f"{size}={value}" for size, value in sizes.items()]
        said = f"{', '.join(most)} and {last}" if most else last
        raise UsageError(f"{name}={ways} does not divide {said}; use {legal}")


def cuts(config: DecoderConfig, sizes: Mapping[str, int]) -> Parameters:
    """How parameters lie over the axes: PartitionSpecs of the edge and of one layer of a kind."""
    ways, shares = sizes.get(TENSOR, 1), sizes.get(EXPERT, 1)

    def spec(leaf: Leaf) -> PartitionSpec:
        names: list[str | None] = [None] * len(leaf.shape)
        if ways > 1 and leaf.split is not None:
            names[leaf.split] = TENSOR
        if shares > 1 and leaf.of_experts:
            names[0] = EXPERT
        return PartitionSpec(*names)

    blocks = {
        kind.name: nest((leaf.path, spec(leaf)) for leaf in block_leaves(config, kind))
        for kind in config.kinds
    }
    edge = nest((leaf.path, spec(leaf)) for leaf in edge_leaves(config))
    return {"edge": edge, "blocks": by_kind(config, blocks)}


def edge_axis(sizes: Mapping[str, int]) -> str | None:
    """The axis along which embedding and head are cut, over the vocabulary; None where a device
    has them whole."""
    return TENSOR if sizes.get(TENSOR, 1) > 1 else None


def config_of_part(config: DecoderConfig, sizes: Mapping[str, int]) -> DecoderConfig:
    """What a device computes of attention: its heads."""
    ways = sizes.get(TENSOR, 1)
    heads = config.num_heads // ways
    shared = heads if config.latent is not None else config.num_kv_heads // ways
    return dataclasses.replace(config, num_heads=heads, num_kv_heads=shared)


class HeldPart(HeldTree):
    """One device's part of a layer; what goes in and comes out is its part of the tokens."""

    def __init__(
        self,
        config: DecoderConfig,
        tree: PyTree,
        sizes: Mapping[str, int],
        float8: Float8 | None = None,
        by: Joining = "gather",
    ) -> None:
        """
        Args:
            by: how the devices of `TENSOR` join what they share; see `jaxsys.model.joins`.
        """
        super().__init__(config, tree, float8)
        self._ways, self._shares = sizes.get(TENSOR, 1), sizes.get(EXPERT, 1)
        rings = by == "ring" and self._ways > 1
        self._ring = JoiningRing(ways=self._ways, axis=TENSOR) if rings else None

    def length(self, x: jax.Array) -> int:
        """Of all devices' parts."""
        return self._ways * x.shape[1]

    def query_key_value(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of whole sequences [B, T/t, D], this device's heads."""
        ring, heads = self._ring, super().query_key_value
        if ring is None:
            return heads(self._gathered(x))
        made = [(offset, heads(piece)) for offset, piece in ring.gathered(x)]
        q, k, v = (ring.in_order({o: three[n] for o, three in made}) for n in range(3))
        return q, k, v

    def heads_out(self, o: jax.Array) -> jax.Array:
        """Heads of this device -> tokens of this device."""
        return self._row_product(o.reshape(*o.shape[:-2], -1), "attention", "out")

    def up(self, x: jax.Array, name: str) -> tuple[jax.Array | None, jax.Array]:
        """This device's features of whole sequences."""
        return super().up(self._gathered(x), name)

    def feed(self, x: jax.Array, name: str, between: Between) -> jax.Array:
        """Piece by piece where pieces travel: no order of tokens matters to it. What is shared
        beside experts is of what was gathered for them."""
        ring, up = self._ring, super().up
        if ring is None or name == "shared":
            return super().feed(x, name, between)
        inner = {offset: between(*up(piece, name)) for offset, piece in ring.gathered(x)}
        return self._summed(ring, inner, name, "down")

    def product(self, x: jax.Array, *path: str) -> jax.Array:
        """As the matrix is cut. Latent attention squeezes whole sequences on every device."""
        if path[-1] == "down":
            return self._row_product(x, *path)
        if self._config.latent is not None and path in _OF_LATENT:
            x = self._gathered(x)
        return super().product(x, *path)

    def routed(self, n: jax.Array) -> jax.Array:
        """Whole sequences: every device has a part of every expert's features."""
        return self._gathered(n)

    def joined(self, fed: jax.Array) -> jax.Array:
        """Parts of features added up, and cut into parts of tokens."""
        return self._scattered(fed)

    def _by_experts(self, x: jax.Array, groups: mixture.Groups) -> jax.Array:
        """Sent to the experts' devices, and back."""
        here = super()._by_experts
        if self._shares == 1:
            return here(x, groups)
        experts = self._config.experts
        assert experts is not None
        tokens = x.shape[0] // experts.active
        room = tokens * min(experts.active, experts.count // self._shares)
        return exchanged(x, groups.sizes, here, devices=self._shares, room=room)

    def _grouped(self, rows: jax.Array, name: str, groups: mixture.Groups) -> jax.Array:
        y = super()._grouped(rows, name, groups)
        if self._shares == 1:
            return y
        # Behind the rows that came there is room for more, which kernels need not write.
        real = jnp.arange(y.shape[0]) < jnp.sum(groups.sizes)
        return jnp.where(real[:, None], y, 0)

    def _expert_bias(self, name: str, bias: jax.Array) -> jax.Array:
        """Of sums over devices each adds its share."""
        return bias / self._ways if name == "down" else bias

    def _row_product(self, x: jax.Array, *path: str) -> jax.Array:
        if self._ring is not None and path[0] != "shared":
            return self._summed(self._ring, self._ring.in_pieces(x), *path)
        return self._biased(self._scattered(self._times(x, self._kernel(*path), *path)), *path)

    def _summed(self, ring: JoiningRing, pieces: Pieces, *path: str) -> jax.Array:
        """Of every device's piece a product whose rows are cut; the sum over devices of its own."""
        kernel = self._kernel(*path)
        made = ring.summed(lambda offset: self._times(pieces[offset], kernel, *path))
        return self._biased(made, *path)

    def _kernel(self, *path: str) -> jax.Array:
        return self._tree[path[0]][path[-1]]

    def _biased(self, y: jax.Array, *path: str) -> jax.Array:
        node = self._tree[path[0]]
        bias = node.get(f"{path[-1]}_bias")
        return y if bias is None else y + bias[None, None]

    def _gathered(self, x: jax.Array) -> jax.Array:
        return lax.all_gather(x, TENSOR, axis=1, tiled=True) if self._ways > 1 else x

    def _scattered(self, y: jax.Array) -> jax.Array:
        if self._ways == 1:
            return y
        return lax.psum_scatter(y, TENSOR, scatter_dimension=1, tiled=True)


_OF_LATENT = tuple(("attention", name) for name in ("query", "query_down", "latent_down"))
"""What latent attention multiplies its input with."""


RunExperts = Callable[[jax.Array, mixture.Groups], jax.Array]
"""Rows [R, D] of experts in groups -> [R, D]."""


def exchanged(
    rows: Float[Array, "R D"],
    sizes: Int[Array, " E"],
    run: RunExperts,
    *,
    devices: int,
    room: int,
) -> Float[Array, "R D"]:
    """`run` on rows sorted by expert, where their experts are.

    Args:
        rows: this device's, in the order of their experts, E / devices of which are on each device.
        sizes: rows of each expert.
        run: of the experts that are here, on groups of rows of all devices.
        devices: of `EXPERT`.
        room: the most rows that can go from one device to another.
    """
    here = sizes.shape[0] // devices
    sent = sizes.reshape(devices, here)
    ends = jnp.cumsum(jnp.sum(sent, axis=1))
    starts = ends - jnp.sum(sent, axis=1)
    places = starts[:, None] + jnp.arange(room, dtype=starts.dtype)[None]
    goes = places < ends[:, None]
    there = jnp.where(goes[..., None], rows[jnp.minimum(places, rows.shape[0] - 1)], 0)
    came = lax.all_to_all(there, EXPERT, 0, 0, tiled=True).reshape(devices * room, -1)
    counts = lax.all_to_all(sent, EXPERT, 0, 0, tiled=True)
    # Of each device's rows the expert here; past its last row none, which sorts behind all.
    steps = jnp.cumsum(counts, axis=1)
    within = jnp.arange(room, dtype=steps.dtype)
    own = jnp.sum(within[None, :, None] >= steps[:, None, :], axis=-1).reshape(-1)
    order = jnp.argsort(own, stable=True)
    back = jnp.argsort(order)
    groups = mixture.Groups(
        jnp.sum(counts, axis=0).astype(jnp.int32), jnp.minimum(own[order], here - 1)
    )
    made = run(came[order], groups)[back].reshape(devices, room, -1)
    returned = lax.all_to_all(made, EXPERT, 0, 0, tiled=True).reshape(devices * room, -1)
    to = jnp.searchsorted(ends, jnp.arange(rows.shape[0], dtype=ends.dtype), side="right")
    return returned[to * room + jnp.arange(rows.shape[0], dtype=to.dtype) - starts[to]]


def embed_part(
    config: DecoderConfig, edge: PyTree, tokens: Int[Array, "B T"]
) -> Float[Array, "B t D"]:
    """Token ids -> this device's part of the tokens, from its part of the vocabulary.

    Raises:
        UsageError: if the devices do not divide the sequences.
    """
    ways, length = lax.axis_size(TENSOR), tokens.shape[1]
    if length % ways:
        common = math.gcd(length, *split_sizes(config).values())
        legal = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise UsageError(
            f"tensor={ways} does not divide sequences of {length} tokens; use {legal}, or "
            f"sequence_length={length - length % ways or ways}"
        )
    table = edge["embed"]["table"]
    local = tokens - lax.axis_index(TENSOR) * table.shape[0]
    here = (local >= 0) & (local < table.shape[0])
    # As `decoder.Edge.embed`: the gradient of a row is summed in float32.
    wide = jnp.promote_types(table.dtype, jnp.float32)
    found = table.astype(wide)[jnp.where(here, local, 0)].astype(table.dtype)
    found = jnp.where(here[..., None], found, 0)
    x = lax.psum_scatter(found, TENSOR, scatter_dimension=1, tiled=True)
    return x if config.embedding_scale == 1.0 else x * config.embedding_scale

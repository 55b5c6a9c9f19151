"""Which arrays a decoder's description asks for: their places, shapes, first values and use.

Stated once, for fresh parameters, files, counting, and whoever fuses, splits or quantises matrices.
Kernels are [in, out], experts' [E, in, out].

Legend: V vocabulary, D width, F feed-forward, N heads, G key/value heads, K head width, E experts.
"""

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the configuration counts its leaves
    from jaxsys.model.config import DecoderConfig
    from jaxsys.model.kinds import BlockKind

Path = tuple[str, ...]
Fill = Literal["normal", "residual", "ones", "zeros"]

HEAD: Path = ("head", "kernel")
"""What rules on paths call the head, also where it is the embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One array of the edge, or of one layer."""

    path: Path
    shape: tuple[int, ...]
    """Of one layer."""
    fill: Fill = "normal"
    """First values; `residual` kernels write to the residual and start smaller."""
    reads: str | None = None
    """What a matrix multiplies; those of a block that read the same may be fused. None: a vector,
    a bias, a table."""
    split: int | None = None
    """The axis that tensor parallelism may cut: heads, feed-forward or vocabulary; None: whole."""
    active: float = 1.0
    """The part of it that one token uses."""
    turning_heads: int | None = None
    """Heads whose channels rotary turns, on the last axis."""
    of_experts: bool = False
    """Whether its first axis is the experts, which devices may share."""

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it takes part in products as such: what quantisation and adapters are for."""
        return self.reads is not None


def edge_leaves(config: "DecoderConfig") -> list[Leaf]:
    """Leaves outside the blocks."""
    table = (config.vocab_size, config.hidden_size)
    leaves = [Leaf(path=("embed", "table"), shape=table, split=0), *_norm(config, "norm")]
    if not config.tie_embeddings:
        leaves.append(Leaf(path=HEAD, shape=table[::-1], reads="final", split=1))
    return leaves


@functools.lru_cache(maxsize=256)
def block_leaves(config: "DecoderConfig", kind: "BlockKind") -> tuple[Leaf, ...]:
    """Leaves of one block of a kind."""
    before, after = config.norm_places != "after", config.norm_places != "before"
    leaves: list[Leaf] = []
    if before:
        leaves += _norm(config, "attention_norm")
        leaves += [] if config.parallel else _norm(config, "mlp_norm")
    if after:
        leaves += _norm(config, "attention_post_norm") + _norm(config, "mlp_post_norm")
    leaves += _attention(config) if config.latent is None else _latent_attention(config)
    if kind.experts:
        return (*leaves, *_experts(config))
    width, inner = config.hidden_size, config.intermediate_size
    return (*leaves, *_feed_forward(config, "mlp", width, inner, config.mlp_bias))


def _norm(config: "DecoderConfig", name: str) -> list[Leaf]:
    shape = (config.hidden_size,)
    leaves = [Leaf(path=(name, "scale"), shape=shape, fill=_scale_fill(config))]
    if config.norm_bias:
        leaves.append(Leaf(path=(name, "bias"), shape=shape, fill="zeros"))
    return leaves


def _scale_fill(config: "DecoderConfig") -> Fill:
    return "zeros" if config.norm_plus_one else "ones"


def _attention(config: "DecoderConfig") -> list[Leaf]:
    width, own, shared = config.hidden_size, config.num_heads, config.num_kv_heads
    leaves = []
    for name, heads in (("query", own), ("key", shared), ("value", shared)):
        columns = heads * config.head_dim
        turning = heads if name != "value" else None
        leaves.append(
            Leaf(
                path=("attention", name),
                shape=(width, columns),
                reads="attention",
                split=1,
                turning_heads=turning,
            )
        )
        if config.qkv_bias:
            leaves.append(
                Leaf(
                    path=("attention", f"{name}_bias"),
                    shape=(columns,),
                    fill="zeros",
                    split=0,
                    turning_heads=turning,
                )
            )
    leaves.append(
        Leaf(
            path=("attention", "out"),
            shape=(own * config.head_dim, width),
            fill="residual",
            reads="heads",
            split=0,
        )
    )
    if config.out_bias:
        leaves.append(Leaf(path=("attention", "out_bias"), shape=(width,), fill="zeros"))
    if config.qk_norm is not None:
        for name, heads in (("query", own), ("key", shared)):
            shape = {
                "head": (config.head_dim,),
                "each": (heads, config.head_dim),
                "all": (heads * config.head_dim,),
            }[config.qk_norm]
            leaves.append(
                Leaf(
                    path=("attention", f"{name}_norm"),
                    shape=shape,
                    fill=_scale_fill(config),
                    split=None if config.qk_norm == "head" else 0,
                )
            )
    if config.sinks:
        leaves.append(Leaf(path=("attention", "sinks"), shape=(own,), fill="zeros", split=0))
    return leaves


def _latent_attention(config: "DecoderConfig") -> list[Leaf]:
    latent, width, heads = config.latent, config.hidden_size, config.num_heads
    assert latent is not None
    queries = heads * (latent.plain_dim + latent.rotary_dim)

    def matrix(name: str, shape: tuple[int, int], reads: str, split: int | None) -> Leaf:
        fill: Fill = "residual" if name == "out" else "normal"
        path = ("attention", name)
        return Leaf(path=path, shape=shape, fill=fill, reads=reads, split=split)

    def norm(name: str, size: int) -> Leaf:
        return Leaf(path=("attention", name), shape=(size,), fill=_scale_fill(config))

    def bias(name: str, size: int, wanted: bool) -> list[Leaf]:
        path = ("attention", f"{name}_bias")
        return [Leaf(path=path, shape=(size,), fill="zeros")] if wanted else []

    leaves = []
    if latent.query_rank is None:
        leaves.append(matrix("query", (width, queries), "attention", 1))
    else:
        leaves.append(matrix("query_down", (width, latent.query_rank), "attention", None))
        leaves += bias("query_down", latent.query_rank, config.qkv_bias)
        leaves.append(norm("query_down_norm", latent.query_rank))
        leaves.append(matrix("query_up", (latent.query_rank, queries), "query", 1))
    narrow = latent.rank + latent.rotary_dim
    unfolded = heads * (latent.plain_dim + latent.value_dim)
    return [
        *leaves,
        matrix("latent_down", (width, narrow), "attention", None),
        *bias("latent_down", narrow, config.qkv_bias),
        norm("latent_norm", latent.rank),
        matrix("latent_up", (latent.rank, unfolded), "latent", 1),
        matrix("out", (heads * latent.value_dim, width), "heads", 0),
        *bias("out", width, config.out_bias),
    ]


def _feed_forward(
    config: "DecoderConfig",
    name: str,
    width: int,
    inner: int,
    bias: bool,
    experts: int | None = None,
    active: float = 1.0,
) -> list[Leaf]:
    lead = () if experts is None else (experts,)
    axes = len(lead)
    leaves = []
    for part in ("gate", "up", "down") if config.gated else ("up", "down"):
        down = part == "down"
        leaves.append(
            Leaf(
                path=(name, part),
                shape=(*lead, inner, width) if down else (*lead, width, inner),
                fill="residual" if down else "normal",
                reads=f"{name} inner" if down else name,
                split=axes if down else axes + 1,
                active=active,
                of_experts=experts is not None,
            )
        )
        if bias:
            leaves.append(
                Leaf(
                    path=(name, f"{part}_bias"),
                    shape=(*lead, width if down else inner),
                    fill="zeros",
                    split=None if down else axes,
                    active=active,
                    of_experts=experts is not None,
                )
            )
    return leaves


def _experts(config: "DecoderConfig") -> list[Leaf]:
    experts, width = config.experts, config.hidden_size
    assert experts is not None
    leaves = [Leaf(path=("experts", "router"), shape=(width, experts.count), reads="router")]
    for name, wanted in (("router_bias", experts.bias), ("correction", experts.correction)):
        if wanted:
            leaves.append(Leaf(path=("experts", name), shape=(experts.count,), fill="zeros"))
    part = experts.active / experts.count
    leaves += _feed_forward(
        config, "experts", width, experts.intermediate_size, experts.bias, experts.count, part
    )
    if experts.shared_size:
        leaves += _feed_forward(config, "shared", width, experts.shared_size, False)
        if experts.shared_gate:
            leaves.append(Leaf(path=("shared", "weight"), shape=(width, 1), reads="weight"))
    return leaves

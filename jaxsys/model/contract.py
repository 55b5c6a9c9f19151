"""What training, planning and serving may ask of a decoder besides running it.

A decoder is: embed; blocks of named kinds in a row (`DecoderConfig.kinds`, `pattern`); head and
loss. Its mathematics are `jaxsys.model.block`'s, its training cut `jaxsys.model.layers`'. Here it
says, of one kind of block, what a cache keeps for a token and which products there are: what each
multiplies (products of one input may be fused), how it splits over devices, and which part of it a
token uses.

Legend: G key/value heads, K head width, C latent width, R width of the shared turned key.
"""

import math
from dataclasses import dataclass
from typing import Literal

from jaxsys.model.config import DecoderConfig
from jaxsys.model.kinds import BlockKind
from jaxsys.model.leaves import Leaf, block_leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """What one layer keeps of each token it has seen."""

    kind: Literal["whole", "window", "latent"]
    """`whole`: all tokens' keys and values; `window`: the last ones'; `latent`: one narrow vector
    and a shared key of all tokens."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the arrays of one token: keys and values [G, K], or latent vector and key [1, C + R]."""
    window: int | None = None
    """Tokens that are still seen, the newest included; None: all."""
    split: int | None = 0
    """The axis of a token's arrays that tensor parallelism cuts; None: every device keeps all."""

    @property
    def token_numbers(self) -> int:
        """Numbers kept of one token."""
        return sum(math.prod(shape) for shape in self.shapes)

    def tokens(self, length: int) -> int:
        """Tokens of a sequence of `length` that must be kept."""
        return length if self.window is None else min(length, self.window)


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Matrices of one block that multiply the same input; a holder may fuse them into one."""

    reads: str
    """The input's name: attention, heads, mlp, router, experts, ..."""
    leaves: tuple[Leaf, ...]
    grouped: bool
    """Whether each is [E, in, out], a matrix an expert, multiplied by groups of rows."""

    @property
    def parameters(self) -> int:
        """Numbers in all of them."""
        return sum(leaf.size for leaf in self.leaves)

    @property
    def active_parameters(self) -> float:
        """Numbers that one token multiplies."""
        return sum(leaf.size * leaf.active for leaf in self.leaves)

    @property
    def split(self) -> Literal["in", "out"] | None:
        """Whether tensor parallelism cuts what goes in or what comes out; None: it is whole."""
        axis, first = self.leaves[0].split, 1 if self.grouped else 0
        return None if axis is None else ("in" if axis == first else "out")


def layer_cache(config: DecoderConfig, kind: BlockKind) -> LayerCache:
    """What the cache of a layer of this kind keeps."""
    if config.latent is not None:
        shapes = ((1, config.latent.rank + config.latent.rotary_dim),)
        return LayerCache(kind="latent", shapes=shapes, window=kind.window, split=None)
    heads = (config.num_kv_heads, config.head_dim)
    how = "whole" if kind.window is None else "window"
    return LayerCache(kind=how, shapes=(heads, heads), window=kind.window)


def cache_parts(config: DecoderConfig) -> dict[int | None, int]:
    """Numbers kept of one token, all layers together, by how many of the last tokens count.

    Keys are windows; None, which is always there: all tokens count. Server, plans and energy model
    price caches by it.
    """
    parts: dict[int | None, int] = {None: 0}
    for kind in config.kinds:
        cache = layer_cache(config, kind)
        numbers = len(config.layers_of(kind)) * cache.token_numbers
        parts[cache.window] = parts.get(cache.window, 0) + numbers
    return parts


def cache_numbers(config: DecoderConfig, length: int) -> int:
    """Numbers that all layers keep of a sequence of `length` tokens."""
    return sum(
        numbers * (length if window is None else min(length, window))
        for window, numbers in cache_parts(config).items()
    )


def experts_used(config: DecoderConfig, tokens: int) -> float:
    """Experts of a layer that so many tokens use, expected where all are as likely."""
    experts = config.experts
    if experts is None:
        return 0.0
    return experts.count * (1.0 - (1.0 - experts.active / experts.count) ** tokens)


def products(config: DecoderConfig, kind: BlockKind) -> tuple[Product, ...]:
    """The products of one block of a kind, in the order that they run."""
    by_input: dict[str, list[Leaf]] = {}
    for leaf in block_leaves(config, kind):
        if leaf.reads is not None:
            by_input.setdefault(leaf.reads, []).append(leaf)
    return tuple(
        Product(reads=reads, leaves=tuple(leaves), grouped=len(leaves[0].shape) == 3)
        for reads, leaves in by_input.items()
    )


def attention_widths(config: DecoderConfig) -> tuple[int, int]:
    """Channels of all heads' queries, and of their values, that attention multiplies."""
    width = config.head_dim if config.latent is None else config.latent.value_dim
    return config.num_heads * config.head_dim, config.num_heads * width


def attention_heads(config: DecoderConfig) -> tuple[int, int]:
    """Heads of queries, and of keys as attention takes them: a latent's are unfolded to all."""
    shared = config.num_heads if config.latent is not None else config.num_kv_heads
    return config.num_heads, shared


def attended(window: int | None, length: int) -> float:
    """Keys that a query of a sequence of `length` tokens sees in the mean: half of all, or less.

    The causal square counts half; a window w cuts all but w of the later queries' keys off.
    """
    if window is None or window >= length:
        return length / 2
    return window - window * window / (2 * length)

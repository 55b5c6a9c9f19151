"""What one microbatch of a layered model costs, free of any device and any plan.

Per block: products 2 FLOPs per parameter and token, causal attention 2 S N K forward (half of the
full square), elementwise passes counted as bytes through memory, and what its programs keep and
hold, which `jaxsys.lowering.memory` traces. Of a SwiGLU decoder with fused attention (no scores
kept) residuals are

    2 bytes x tokens x (4 D + (2 N + 2 G) K + 3 F) + 4 (N + 4) tokens

that is input and output of both norms, and two sums; q, k, v, the attention's output and its
log-sum-exp; gate, up, and silu(gate) up. Selective recompute keeps its input and what products and
attention made: 2 bytes x tokens x (2 D + (2 N + 2 G) K + 2 F) + 4 N tokens.

Legend: S sequence length, D width, F feed-forward width, N query heads, G key/value heads, K head
width, V vocabulary.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxsys.axes import AROUND, AXES
from jaxsys.context import WAYS, ContextSplit, Way, splits_of
from jaxsys.errors import UsageError, did_you_mean
from jaxsys.layered import (
    LayeredModel,
    Parameters,
    PyTree,
    inside_parts,
    part_shapes,
    parts_of,
)
from jaxsys.lowering import RECOMPUTE_POLICIES, Recompute
from jaxsys.lowering.memory import BlockBytes, block_bytes, head_bytes
from jaxsys.model import abstract_parameters, layered
from jaxsys.model.config import DecoderConfig
from jaxsys.model.contract import attended, attention_heads, attention_widths, products
from jaxsys.model.kinds import BlockKind
from jaxsys.model.leaves import Leaf, block_leaves
from jaxsys.model.parts import ways_to_cut, why_not_cut
from jaxsys.planner.sharing import SharedSequences

PLANNED_RECOMPUTE: tuple[Recompute, ...] = tuple(
    policy for policy in RECOMPUTE_POLICIES if policy != "chunk"
)
"""What a plan may compute again: it says so by layers."""
SHORTEST_PIECE = 1024
"""Tokens of the pieces, two a device, that plans cut sequences into: a pass through shorter ones is
too short for what travels beside it."""
PIECES = 16
"""How many such pieces a sequence has at least that plans cut: of shorter ones attention is a small
part, and there are other ways."""
ATTENTION = "attention"
"""What attention makes, as recompute policies name it."""
NOT_SPLIT: Mapping[str, int] = MappingProxyType({})
"""Mesh axis -> devices, where a device has all of a block."""
Traced = tuple[tuple[Recompute, BlockBytes], ...]
"""What a block keeps and holds by policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joins:
    """Partial sums of one block that split features add up, over all of their devices."""

    forward_bytes: float
    forward_times: float
    backward_bytes: float
    backward_times: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideJoins:
    """One block's products on a microbatch that pieces of joined features travel beside, forward.

    0 where a join has none: experts' rows are sorted, and latent attention squeezes all tokens.
    """

    read_flops: tuple[float, float]
    """That read what is gathered: for attention, and for the feed-forward part."""
    made_flops: tuple[float, float]
    """Whose results are added up, likewise."""
    tokens: int
    moved_bytes: float
    """Read and written to put pieces in order and to take them."""
    matrix_bytes: float
    """Of these products, in the dtype of compute: their gradient is a sum over pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWork:
    """The experts of one block on one microbatch."""

    parameters: float
    """Of all experts, the router aside."""
    count: int
    """E."""
    rows: float
    """Tokens that choose experts."""
    active: int
    """Experts that each chooses."""
    row_bytes: float
    traced: Callable[[Mapping[str, int]], "Traced"]
    """Mesh axis -> devices that share them: what the block's programs keep and hold by policy."""

    def exchanged_bytes(self, devices: int) -> float:
        """What one device sends and keeps of rows: room for all that could go to each device."""
        return devices * self.rows * min(self.active, self.count // devices) * self.row_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWork:
    """One block on one microbatch."""

    parameters: float
    product_flops: float
    """Forward. The backward pass does twice as many."""
    attention_flops: float = 0.0
    """Forward. The backward pass does 2.5 times as many: it forms the scores again."""
    elementwise_bytes: float = 0.0
    """Forward, read and written by what is not a product. The backward pass moves twice as many."""
    residual_bytes: float = 0.0
    """What backward needs when nothing is computed again, the block's input included."""
    selective_bytes: float | None = None
    """What it needs when all but products and attention is computed again; None: not known."""
    attention_bytes: float | None = None
    """What it needs when all but attention is computed again, likewise."""
    work_bytes: float | None = None
    """What a program of the user's holds in its backward pass beside all that a layer makes; None:
    that is made only where it is computed again."""
    tap_bytes: float | None = None
    """What dL/dx leaves for dL/dw; as much as the residual if not given."""
    joins: Joins | None = None
    """What split features send; None: twice a pass around attention and feed-forward part."""
    cut_share: float = 1.0
    """Of residuals and taps, the share that split features cut; the rest is whole everywhere."""
    traced: Traced = ()
    """What its programs keep and hold by policy, where they were traced: in place of the above."""
    trace: Callable[[], Traced] | None = None
    """Finds that when it is asked for."""
    experts: ExpertWork | None = None
    shared: SharedSequences | None = None
    """Its attention, where other devices have the rest of its sequences."""
    selective_flops: float = 0.0
    """Of its products, those that `selective` computes again where it keeps some by name alone."""
    selective_attention: bool = False
    """Whether it computes attention again as well, likewise."""
    selective_join: bool = False
    """Whether it computes what a product writes to the residual again, likewise."""
    features_hidden: float = 0.0
    """The share of what split features send that a program of others sends under its products."""
    beside_joins: BesideJoins | None = None
    """What features that are joined round a ring travel beside; None: they are not joined so."""

    def memory(
        self, policy: str, activation_bytes: float, traced: Traced | None = None
    ) -> BlockBytes:
        """What the block keeps and holds under a policy.

        Args:
            policy: of recompute.
            activation_bytes: of its input.
            traced: what its programs hold where an axis splits them; its own if not given.

        Raises:
            UsageError: if that is not known.
        """
        if traced is None:
            traced = self.trace() if self.trace is not None else self.traced
        for name, found in traced:
            if name == policy:
                return found
        kept = {
            "none": self.residual_bytes,
            "selective": self.selective_bytes,
            "around-attention": self.attention_bytes,
            "block": activation_bytes,
        }[policy]
        if kept is None:
            raise UsageError(f"what {policy} recompute keeps of this block is not known")
        return BlockBytes(
            residual=kept,
            tap=self.residual_bytes if self.tap_bytes is None else self.tap_bytes,
            work=(self.work_bytes or 0.0)
            + (0.0 if policy == "none" and self.work_bytes is None else self.residual_bytes),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeWork:
    """Embedding, final norm, head and loss on one microbatch."""

    parameters: float
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    """Head, loss and its gradients; the loss's own forward pass too, where both are one."""
    workspace_bytes: float = 0.0
    """What the head and the loss hold at their peak."""
    trace: Callable[[], float] | None = None
    """Finds that when it is asked for."""
    head_parameters: float | None = None
    """Of the parameters those that head and loss read; all, if not given."""

    @property
    def read_by_head(self) -> float:
        """Parameters that head and loss read."""
        return self.parameters if self.head_parameters is None else self.head_parameters

    @property
    def held_bytes(self) -> float:
        """What the head and the loss hold at their peak."""
        return self.workspace_bytes if self.trace is None else self.trace()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How a model's sequences can lie over several devices."""

    length: int
    """T."""
    heads: int
    key_heads: int
    by: tuple[Way, ...] = WAYS
    """What may travel."""
    shortest_piece: int = SHORTEST_PIECE

    def allows(self, split: ContextSplit, cut: int = 1) -> bool:
        """Whether the trainer cuts them so, where so many devices share its heads."""
        pieces = max(2 * split.parts, PIECES)
        if split.by not in self.by or self.length < pieces * self.shortest_piece:
            return False
        try:
            split.check_length(self.length)
            split.check_heads(self.heads // cut, max(1, self.key_heads // cut))
        except UsageError:
            return False
        return (self.length // split.parts) % cut == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model and its microbatch."""

    name: str
    blocks: tuple[BlockWork, ...]
    edge: EdgeWork
    activation_bytes: float
    """What passes from block to block."""
    tokens: int
    """Tokens (or examples) in a microbatch."""
    model_flops: float
    """Forward and backward of a microbatch as MFU counts it: nothing twice, half the square."""
    ways: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Axis along which a block itself is split -> over how many devices: the legal counts, where
    there are more than one."""
    unshared: Mapping[str, str] = field(default_factory=dict)
    """Such an axis -> why no devices share its blocks along it, where the model says more than
    nothing."""
    splits_between: bool = True
    """Whether split features also cut embedding and head, and the sequence between blocks."""
    sharing: Sharing | None = None
    """How its sequences can lie over several devices; None: each is whole on one."""
    part_of: Callable[[ContextSplit], "Workload"] | None = None
    """See `part`."""
    keeps_attention: bool = False
    """Whether steps can keep what attention made and compute the rest of a block again."""
    matrices: tuple[tuple[int, ...], ...] = ()
    """Shapes of a block's matrices, where they are known: what is sharded is cut along an axis."""

    def __post_init__(self) -> None:
        if not self.blocks:
            raise UsageError(f"{self.name}: a workload needs at least one block")
        if self.tokens < 1:
            raise UsageError(f"{self.name}: tokens={self.tokens} must be at least 1")

    @property
    def layers(self) -> int:
        """L."""
        return len(self.blocks)

    @property
    def recompute_policies(self) -> tuple[Recompute, ...]:
        """What backward may compute again: the policies whose residuals are known."""
        if not all(block.traced or block.trace or block.selective_bytes for block in self.blocks):
            return ("none", "block")
        known = all(block.attention_bytes is not None for block in self.blocks)
        if self.keeps_attention or known:
            return PLANNED_RECOMPUTE
        return tuple(policy for policy in PLANNED_RECOMPUTE if policy != "around-attention")

    def shares(self, parts: int) -> bool:
        """Whether so many devices, more than one, can share its sequences in any way."""
        if parts == 1 or self.sharing is None:
            return False
        return any(self.sharing.allows(split) for split in splits_of(parts))

    def part(self, split: ContextSplit) -> "Workload":
        """What one of the devices has that share each sequence of the microbatch.

        Raises:
            UsageError: if its sequences cannot be cut so.
        """
        if self.part_of is None:
            raise UsageError(f"{self.name}: context={split.parts}, but sequences are whole here")
        return self.part_of(split)

    def uncut(self, devices: int) -> tuple[int, ...] | None:
        """The shape of a matrix that has no axis to cut over so many devices, if there is one.

        It would rest whole on each of them.
        """
        for shape in self.matrices:
            if all(size % devices for size in shape):
                return shape
        return None

    @property
    def parameters(self) -> float:
        """All parameters."""
        return sum(block.parameters for block in self.blocks) + self.edge.parameters


def decoder_workload(
    name: str,
    config: DecoderConfig,
    *,
    sequence_length: int,
    microbatch_size: int,
    loss_chunk_tokens: int = 2048,
    fused_attention: bool = True,
    dtype: DTypeLike = jnp.bfloat16,
    shortest_piece: int = SHORTEST_PIECE,
    context: ContextSplit | None = None,
    selective: Collection[str] | None = None,
    features_hidden: float = 0.0,
) -> Workload:
    """The workload of a decoder.

    Args:
        name: for tables.
        config: sizes.
        sequence_length: S.
        microbatch_size: sequences in a microbatch.
        loss_chunk_tokens: tokens whose logits are held at once.
        fused_attention: whether the device has a kernel that never forms the scores; there is none
            for 32 bits.
        dtype: of compute.
        shortest_piece: tokens that plans leave in the pieces of a sequence that devices share.
        context: how sequences lie over devices: the work is then one device's part.
        selective: what recompute `selective` keeps, by the names of `kept_names`, as programs of
            others choose; all products and attention, as `jaxsys.train` does, if not given.
        features_hidden: the share of what split features send that a program sends under its
            products.

    Raises:
        UsageError: if a size is not positive, a name is unknown, or sequences cannot be cut so.
    """
    for size, value in (
        ("sequence_length", sequence_length),
        ("microbatch_size", microbatch_size),
        ("loss_chunk_tokens", loss_chunk_tokens),
    ):
        if value < 1:
            raise UsageError(f"{size}={value} must be at least 1")
    c = config
    parts = 1 if context is None else context.parts
    if context is not None:
        context.check_length(sequence_length)
    tokens = sequence_length * microbatch_size // parts
    dtype = jnp.dtype(dtype)
    names = c.pattern or (c.kinds[0].name,)
    traced_with = functools.partial(
        _decoder_memory,
        c,
        sequence_length,
        microbatch_size,
        loss_chunk_tokens,
        fused_attention,
        str(dtype),
        context,
    )

    def traced(kind: BlockKind, sizes: Mapping[str, int] = NOT_SPLIT) -> Traced:
        found, _ = traced_with(tuple(sizes.items()))
        mine = dict(zip(names, found, strict=not c.pattern))[kind.name]
        return mine if selective is None else _kept_by_name(c, kind, selective, tokens, mine)

    def head_held() -> float:
        return traced_with(())[1]

    work = {
        kind.name: replace(
            _block_work(c, kind, sequence_length, tokens, dtype, selective),
            features_hidden=features_hidden,
            traced=traced(kind) if context is None else (),
            # Of the many ways to share sequences few are looked at closely.
            trace=None if context is None else functools.partial(traced, kind),
            shared=None if context is None else _shared(c, context, tokens, dtype),
        )
        for kind in c.kinds
    }
    for kind in c.kinds:
        if c.experts is None or not kind.experts:
            continue
        own = [leaf for leaf in block_leaves(c, kind) if leaf.of_experts]
        experts = ExpertWork(
            parameters=float(sum(leaf.size for leaf in own)),
            count=c.experts.count,
            active=c.experts.active,
            rows=float(tokens),
            row_bytes=float(dtype.itemsize * c.hidden_size),
            traced=functools.partial(traced, kind),
        )
        work[kind.name] = replace(work[kind.name], experts=experts)
    blocks = tuple(work[c.kind(layer).name] for layer in range(c.num_layers))
    head = 2.0 * c.vocab_size * c.hidden_size * tokens
    matrices = dict.fromkeys(
        leaf.shape for kind in c.kinds for product in products(c, kind) for leaf in product.leaves
    )
    return Workload(
        name=name,
        blocks=blocks,
        edge=EdgeWork(
            parameters=c.edge_parameter_count(),
            head_parameters=c.head_parameter_count(),
            # The loss is computed with its gradient, in B.
            backward_flops=3 * head,
            workspace_bytes=head_held() if context is None else 0.0,
            trace=None if context is None else head_held,
        ),
        activation_bytes=float(dtype.itemsize * c.hidden_size * tokens),
        tokens=tokens,
        model_flops=3 * sum(block.product_flops + block.attention_flops for block in blocks)
        + 3 * head,
        matrices=tuple(matrices),
        ways=ways_of(c, sequence_length),
        unshared=unshared_of(c, sequence_length),
        sharing=_sharing(c, sequence_length, fused_attention, shortest_piece),
        part_of=functools.lru_cache(maxsize=None)(
            lambda split: decoder_workload(
                name,
                config,
                sequence_length=sequence_length,
                microbatch_size=microbatch_size,
                loss_chunk_tokens=loss_chunk_tokens,
                fused_attention=fused_attention,
                dtype=dtype,
                shortest_piece=shortest_piece,
                context=split,
                selective=selective,
                features_hidden=features_hidden,
            )
        ),
        keeps_attention=context is not None or (fused_attention and dtype.itemsize == 2),
    )


def _sharing(
    config: DecoderConfig, sequence_length: int, fused: bool, shortest_piece: int
) -> Sharing | None:
    """How a decoder's sequences can lie over devices; None where none of them can be cut."""
    c = config
    if c.experts is not None and c.experts.balance and any(kind.experts for kind in c.kinds):
        return None  # the loss that keeps experts evenly used is of whole microbatches
    heads, key_heads = attention_heads(c)
    # Of pieces a window is plain JAX's, whose rate on a device with a kernel is not known.
    windowed = fused and any(kind.window is not None for kind in c.kinds)
    return Sharing(
        length=sequence_length,
        heads=heads,
        key_heads=key_heads,
        by=("ulysses",) if windowed else WAYS,
        shortest_piece=shortest_piece,
    )


def _shared(
    config: DecoderConfig, split: ContextSplit, tokens: int, dtype: np.dtype
) -> SharedSequences:
    """Attention of a device's tokens."""
    heads, key_heads = attention_heads(config)
    queries, values = attention_widths(config)
    return SharedSequences(
        split=split,
        query_values=float(tokens * queries),
        key_values=float(tokens * key_heads * (queries + values) / heads),
        out_values=float(tokens * values),
        heads=heads,
        key_heads=key_heads,
        itemsize=float(dtype.itemsize),
    )


def ways_of(config: DecoderConfig, sequence_length: int) -> dict[str, tuple[int, ...]]:
    """Axis -> over how many devices the trainer splits a decoder's blocks along it.

    Those of one place share the sequence between blocks as well.
    """
    found = {}
    for name, counts in ways_to_cut(config).items():
        axis = AROUND[name]
        found[axis.name] = tuple(n for n in counts if not axis.within or sequence_length % n == 0)
    return found


def unshared_of(config: DecoderConfig, sequence_length: int) -> dict[str, str]:
    """Axis -> why no devices share a decoder's blocks along it, of those where that is so."""
    found = {}
    for name, counts in ways_of(config, sequence_length).items():
        if counts == (1,):
            why = why_not_cut(config, {str(AXES[name].mesh): 2})
            found[name] = why or f"2 does not divide sequence_length={sequence_length}"
    return found


def _block_work(
    config: DecoderConfig,
    kind: BlockKind,
    sequence_length: int,
    tokens: int,
    dtype: np.dtype,
    selective: Collection[str] | None = None,
) -> BlockWork:
    """One block of a kind: what its tokens multiply, not what it holds."""
    c = config
    queries, values = attention_widths(c)
    shared = c.num_kv_heads * c.head_dim
    inner = c.intermediate_size
    if kind.experts and c.experts is not None:
        inner = c.experts.active * c.experts.intermediate_size + c.experts.shared_size
    passes = (
        4 * c.hidden_size  # both norms read and write
        + 6 * c.hidden_size  # both additions read two and write one
        + 2 * (queries + shared)  # rotary
        + 3 * inner  # silu(gate) * up
    )
    keys = attended(kind.window, sequence_length)
    again: tuple[Leaf, ...] = ()
    if selective is not None:
        again = _made_again(c, kind, selective)
    return BlockWork(
        parameters=c.block_parameter_count(kind),
        product_flops=2.0
        * sum(product.active_parameters for product in products(c, kind))
        * tokens,
        attention_flops=2.0 * keys * (queries + values) * tokens,
        elementwise_bytes=float(dtype.itemsize * passes * tokens),
        selective_flops=2.0 * sum(leaf.size * leaf.active for leaf in again) * tokens,
        selective_attention=selective is not None and ATTENTION not in selective,
        selective_join=any(leaf.fill == "residual" for leaf in again),
        beside_joins=_beside_joins(c, kind, tokens, dtype) if selective is None else None,
    )


def _beside_joins(
    config: DecoderConfig, kind: BlockKind, tokens: int, dtype: np.dtype
) -> BesideJoins:
    """What `jaxsys.model.parts` makes of pieces."""
    latent, mixed = config.latent is not None, kind.experts
    sizes: dict[str, float] = dict.fromkeys(("attention", "heads", "mlp", "inner"), 0.0)
    names = {"query": "attention", "key": "attention", "value": "attention", "out": "heads"}
    names |= {"gate": "mlp", "up": "mlp", "down": "inner"}
    for leaf in block_leaves(config, kind):
        if leaf.reads is None or (mixed and leaf.path[0] != "attention"):
            continue
        name = names.get(leaf.path[-1])
        if name is not None and not (latent and name == "attention"):
            sizes[name] += leaf.size
    queries, values = attention_widths(config)
    heads, shared = attention_heads(config)
    ordered = 0.0 if latent else queries + (queries + values) * shared / heads
    attention, out, mlp, inner = (2.0 * size * tokens for size in sizes.values())
    return BesideJoins(
        read_flops=(attention, mlp),
        made_flops=(out, inner),
        tokens=tokens,
        moved_bytes=2.0 * dtype.itemsize * tokens * (ordered + values),
        matrix_bytes=dtype.itemsize * sum(sizes.values()),
    )


def kept_names(config: DecoderConfig) -> tuple[str, ...]:
    """What a recompute policy of a decoder can keep by name: `attention`, and what each matrix of a
    block makes, such as `query` or `up`; an expert's has the same name."""
    matrices = (
        leaf.path[-1] for kind in config.kinds for leaf in block_leaves(config, kind) if leaf.reads
    )
    return (ATTENTION, *dict.fromkeys(matrices))


def _made_again(config: DecoderConfig, kind: BlockKind, kept: Collection[str]) -> tuple[Leaf, ...]:
    """The matrices of a block whose products are computed again where these are kept.

    What a block adds to the residual last, no backward pass reads.

    Raises:
        UsageError: if a name is unknown.
    """
    known = kept_names(config)
    for name in kept:
        if name not in known:
            raise UsageError(
                f"{name!r} is nothing that a block of this model makes"
                f"{did_you_mean(name, known)}; it makes {', '.join(known)}"
            )
    last = (
        () if config.norm_places != "before" else ("down", "out") if config.parallel else ("down",)
    )
    return tuple(
        leaf
        for leaf in block_leaves(config, kind)
        if leaf.reads is not None and leaf.path[-1] not in (*kept, *last)
    )


def _kept_by_name(
    config: DecoderConfig, kind: BlockKind, kept: Collection[str], tokens: int, traced: Traced
) -> Traced:
    """What a block keeps and holds where `selective` keeps its input and these alone.

    What is made again is held while the block's backward pass runs.
    """
    _, values = attention_widths(config)
    width = dict.fromkeys(kept_names(config), 0.0)
    for leaf in block_leaves(config, kind):
        if leaf.reads is not None:
            width[leaf.path[-1]] += (
                leaf.shape[-1] * leaf.active * (leaf.shape[0] if len(leaf.shape) == 3 else 1)
            )
    width[ATTENTION] = values + 2.0 * config.num_heads  # and a log-sum-exp a head, in float32
    bfloat16 = 2.0 * tokens
    residual = bfloat16 * (config.hidden_size + sum(width[name] for name in set(kept)))
    again = sum(width[leaf.path[-1]] for leaf in _made_again(config, kind, kept))
    again += 0.0 if ATTENTION in kept else width[ATTENTION]
    whole = dict(traced)["selective"]
    found = replace(whole, residual=residual, work=whole.work + bfloat16 * again, freeing=None)
    return tuple((name, found if name == "selective" else one) for name, one in traced)


@functools.lru_cache(maxsize=256)
def _decoder_memory(
    config: DecoderConfig,
    sequence_length: int,
    microbatch_size: int,
    loss_chunk_tokens: int,
    fused: bool,
    dtype: str,
    context: ContextSplit | None = None,
    sizes: tuple[tuple[str, int], ...] = (),
) -> tuple[tuple[Traced, ...], float]:
    model = layered(
        replace(config, in_training=()),  # of which training speaks
        loss_chunk_tokens=loss_chunk_tokens,
        implementation="shapes" if fused and jnp.dtype(dtype).itemsize == 2 else "xla",
    )
    model, mine = model.over(context), sequence_length
    inner = {} if context is None else {context.axis: context.parts}
    if context is not None:
        mine //= context.parts
    ids = jax.ShapeDtypeStruct((microbatch_size, mine), jnp.int32)
    parameters, inside = abstract_parameters(config, dtype), dict(sizes)
    parts = parts_of(model, inside)
    if parts is not None:
        model, parameters = parts.model, part_shapes(parameters, parts, inside)
    batch = {"inputs": ids, "targets": ids}
    return inside_parts({**inner, **inside}, lambda: traced_memory(model, parameters, batch))


def traced_memory(
    model: LayeredModel, parameters: Parameters, microbatch: PyTree
) -> tuple[tuple[Traced, ...], float]:
    """What blocks keep and hold by policy, and what head and loss hold.

    Args:
        model: the layered model.
        parameters: shapes and dtypes, those of compute.
        microbatch: shapes and dtypes of one.

    Returns:
        An entry for each layer of a model with kinds, a single one where blocks are alike.
    """
    edge = parameters["edge"]
    x = jax.eval_shape(model.embed, edge, microbatch)
    of_kind: dict[str, Traced] = {}
    for kind, stack in model.stacks(parameters["blocks"]).items():
        layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stack)
        alone = LayeredModel(
            embed=model.embed, block=model.kinds[kind], head_loss=model.head_loss, layers=1
        )
        of_kind[kind] = tuple(
            (policy, block_bytes(alone, layer, x, microbatch, policy, split=True))
            for policy in PLANNED_RECOMPUTE
        )
    head = head_bytes(model, edge, x, microbatch)
    if model.pattern is None:
        return tuple(of_kind.values()), head
    return tuple(of_kind[kind] for kind in model.pattern), head

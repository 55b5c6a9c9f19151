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
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxsys.errors import UsageError
from jaxsys.layered import (
    LayeredModel,
    Parameters,
    PyTree,
    inside_parts,
    part_shapes,
    parts_of,
)
from jaxsys.lowering import Recompute
from jaxsys.lowering.memory import BlockBytes, block_bytes, head_bytes
from jaxsys.mesh import EXPERT, TENSOR
from jaxsys.model import abstract_parameters, layered
from jaxsys.model.config import DecoderConfig
from jaxsys.model.contract import attended, attention_widths, products
from jaxsys.model.kinds import BlockKind
from jaxsys.model.leaves import block_leaves
from jaxsys.model.parts import check_parts

POLICIES: tuple[Recompute, ...] = ("none", "selective", "block")
"""What a plan may compute again."""
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
    traced: Callable[[int], "Traced"]
    """Devices that share them -> what the block's programs keep and hold by policy."""

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
    tap_bytes: float | None = None
    """What dL/dx leaves for dL/dw; as much as the residual if not given."""
    joins: Joins | None = None
    """What split features send; None: twice a pass around attention and feed-forward part."""
    cut_share: float = 1.0
    """Of residuals and taps, the share that split features cut; the rest is whole everywhere."""
    traced: Traced = ()
    """What its programs keep and hold by policy, where they were traced: in place of the above."""
    experts: ExpertWork | None = None

    def parameters_of(self, experts: int) -> float:
        """What a device has of them where so many share the experts; 0: all but the experts'."""
        if self.experts is None or experts == 1:
            return self.parameters
        mine = self.experts.parameters / experts if experts else 0.0
        return self.parameters - self.experts.parameters + mine

    def memory(self, policy: str, activation_bytes: float, *, experts: int = 1) -> BlockBytes:
        """What the block keeps and holds under a policy, where so many devices share experts.

        Raises:
            UsageError: if that is not known.
        """
        if self.experts is None or experts == 1:
            traced = self.traced
        else:
            traced = self.experts.traced(experts)
        for name, found in traced:
            if name == policy:
                return found
        kept = {
            "none": self.residual_bytes,
            "selective": self.selective_bytes,
            "block": activation_bytes,
        }[policy]
        if kept is None:
            raise UsageError(f"what {policy} recompute keeps of this block is not known")
        return BlockBytes(
            residual=kept,
            tap=self.residual_bytes if self.tap_bytes is None else self.tap_bytes,
            work=0.0 if policy == "none" else self.residual_bytes,
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
    feature_ways: tuple[int, ...] = (1,)
    """In how many parts a block can be split along its features: the legal counts."""
    expert_ways: tuple[int, ...] = (1,)
    """Over how many devices experts can be shared: the legal counts."""
    splits_between: bool = True
    """Whether split features also cut embedding and head, and the sequence between blocks."""
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
        if all(block.traced or block.selective_bytes is not None for block in self.blocks):
            return POLICIES
        return ("none", "block")

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

    Raises:
        UsageError: if a size is not positive.
    """
    for field, value in (
        ("sequence_length", sequence_length),
        ("microbatch_size", microbatch_size),
        ("loss_chunk_tokens", loss_chunk_tokens),
    ):
        if value < 1:
            raise UsageError(f"{field}={value} must be at least 1")
    c = config
    tokens = sequence_length * microbatch_size
    dtype = jnp.dtype(dtype)
    traced, head_held = _decoder_memory(
        c, sequence_length, microbatch_size, loss_chunk_tokens, fused_attention, str(dtype)
    )
    of_kind = dict(zip(c.pattern or (c.kinds[0].name,), traced, strict=not c.pattern))
    work = {
        kind.name: _block_work(c, kind, sequence_length, tokens, dtype, of_kind[kind.name])
        for kind in c.kinds
    }

    def shared(kind: BlockKind, devices: int) -> Traced:
        found, _ = _decoder_memory(
            c,
            sequence_length,
            microbatch_size,
            loss_chunk_tokens,
            fused_attention,
            str(dtype),
            devices,
        )
        names = c.pattern or (c.kinds[0].name,)
        return dict(zip(names, found, strict=not c.pattern))[kind.name]

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
            traced=functools.partial(shared, kind),
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
            # The loss is computed with its gradient, in B.
            backward_flops=3 * head,
            workspace_bytes=head_held,
        ),
        activation_bytes=float(dtype.itemsize * c.hidden_size * tokens),
        tokens=tokens,
        model_flops=3 * sum(block.product_flops + block.attention_flops for block in blocks)
        + 3 * head,
        matrices=tuple(matrices),
        feature_ways=tuple(
            ways for ways in (1, 2, 4, 8, 16, 32, 64) if splits(c, ways, sequence_length)
        ),
        expert_ways=(1,) if c.experts is None else tuple(_divisors(c.experts.count)),
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def splits(config: DecoderConfig, ways: int, sequence_length: int) -> bool:
    """Whether the trainer splits the features of a decoder, and its sequences, in so many parts."""
    try:
        check_parts(config, {TENSOR: ways} if ways > 1 else {})
    except UsageError:
        return False
    return sequence_length % ways == 0


def _block_work(
    config: DecoderConfig,
    kind: BlockKind,
    sequence_length: int,
    tokens: int,
    dtype: np.dtype,
    traced: Traced,
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
    return BlockWork(
        parameters=c.block_parameter_count(kind),
        product_flops=2.0
        * sum(product.active_parameters for product in products(c, kind))
        * tokens,
        attention_flops=2.0 * keys * (queries + values) * tokens,
        elementwise_bytes=float(dtype.itemsize * passes * tokens),
        traced=traced,
    )


@functools.lru_cache(maxsize=256)
def _decoder_memory(
    config: DecoderConfig,
    sequence_length: int,
    microbatch_size: int,
    loss_chunk_tokens: int,
    fused: bool,
    dtype: str,
    experts: int = 1,
) -> tuple[tuple[Traced, ...], float]:
    model = layered(
        config,
        loss_chunk_tokens=loss_chunk_tokens,
        implementation="shapes" if fused and jnp.dtype(dtype).itemsize == 2 else "xla",
    )
    ids = jax.ShapeDtypeStruct((microbatch_size, sequence_length), jnp.int32)
    parameters, sizes = abstract_parameters(config, dtype), {EXPERT: experts} if experts > 1 else {}
    parts = parts_of(model, sizes)
    if parts is not None:
        model, parameters = parts.model, part_shapes(parameters, parts, sizes)
    batch = {"inputs": ids, "targets": ids}
    return inside_parts(sizes, lambda: traced_memory(model, parameters, batch))


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
            for policy in POLICIES
        )
    head = head_bytes(model, edge, x, microbatch)
    if model.pattern is None:
        return tuple(of_kind.values()), head
    return tuple(of_kind[kind] for kind in model.pattern), head

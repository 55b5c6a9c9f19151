"""What one microbatch of a layered model costs, free of any device and any plan.

Per block: products 2 FLOPs per parameter and token, causal attention 2 S N K forward (half of the
full square), elementwise passes counted as bytes through memory, and the residuals that the
backward pass needs when attention is fused (no scores kept):

    residual = 2 bytes x tokens x (4 D + (2 N + 2 G) K + 3 F) + 4 (N + 4) tokens

for a SwiGLU decoder, as `jaxsys.lowering` keeps it: input and output of both norms, and two sums;
q, k, v, the attention's output and its log-sum-exp; gate, up, and silu(gate) up. Selective
recompute keeps its input and what products and attention made: 2 bytes x tokens x
(2 D + (2 N + 2 G) K + 2 F) + 4 N tokens. What dL/dx leaves for dL/dw is the input of every product
and norm and the cotangent of its output, 2 bytes x tokens x (8 D + (2 N + 2 G) K + 3 F).

Legend: S sequence length, D width, F feed-forward width, N query heads, G key/value heads, K head
width, V vocabulary.
"""

from dataclasses import dataclass

from jaxsys.errors import UsageError
from jaxsys.lowering import Recompute
from jaxsys.model.config import LlamaConfig

COMPUTE_BYTES = 2
"""bf16."""


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
        if any(block.selective_bytes is None for block in self.blocks):
            return ("none", "block")
        return ("none", "selective", "block")

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


def llama_workload(
    name: str,
    config: LlamaConfig,
    *,
    sequence_length: int,
    microbatch_size: int,
    loss_chunk_tokens: int = 2048,
) -> Workload:
    """The workload of a Llama-family decoder.

    Args:
        name: for tables.
        config: sizes.
        sequence_length: S.
        microbatch_size: sequences in a microbatch.
        loss_chunk_tokens: tokens whose logits are held at once.

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
    heads, shared = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    matrices = c.block_parameter_count() - 2 * c.hidden_size
    attention = 2.0 * sequence_length * heads * tokens
    passes = (
        4 * c.hidden_size  # both norms read and write
        + 6 * c.hidden_size  # both additions read two and write one
        + 2 * (heads + shared)  # rotary
        + 3 * c.intermediate_size  # silu(gate) * up
    )
    residual = 4 * c.hidden_size + 2 * (heads + shared) + 3 * c.intermediate_size
    taps = 8 * c.hidden_size + 2 * (heads + shared) + 3 * c.intermediate_size
    selective = 2 * c.hidden_size + 2 * (heads + shared) + 2 * c.intermediate_size
    block = BlockWork(
        parameters=c.block_parameter_count(),
        product_flops=2.0 * matrices * tokens,
        attention_flops=attention,
        elementwise_bytes=float(COMPUTE_BYTES * passes * tokens),
        residual_bytes=float((COMPUTE_BYTES * residual + 4 * (c.num_heads + 4)) * tokens),
        selective_bytes=float((COMPUTE_BYTES * selective + 4 * c.num_heads) * tokens),
        tap_bytes=float(COMPUTE_BYTES * taps * tokens),
    )
    head = 2.0 * c.vocab_size * c.hidden_size * tokens
    products = c.num_layers * block.product_flops + head
    return Workload(
        name=name,
        blocks=(block,) * c.num_layers,
        edge=EdgeWork(
            parameters=c.edge_parameter_count(),
            # The loss is computed with its gradient, in B.
            backward_flops=3 * head,
            # float32 logits, their gradient, and the head's: a piece's beside the sum of those
            # before.
            workspace_bytes=2.0 * 4 * min(loss_chunk_tokens, tokens) * c.vocab_size
            + (1 + (tokens > loss_chunk_tokens)) * 4.0 * c.vocab_size * c.hidden_size,
        ),
        activation_bytes=float(COMPUTE_BYTES * c.hidden_size * tokens),
        tokens=tokens,
        model_flops=3 * products + 3 * c.num_layers * attention,
        matrices=(
            (c.hidden_size, heads),
            (c.hidden_size, shared),
            (c.hidden_size, c.intermediate_size),
        ),
        feature_ways=tuple(
            ways
            for ways in (1, 2, 4, 8, 16, 32, 64)
            if c.num_kv_heads % ways == 0
            and c.num_heads % ways == 0
            and c.intermediate_size % ways == 0
            and sequence_length % ways == 0
        ),
    )

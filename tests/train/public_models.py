"""Small models of the kinds that people write, each as its author has it and as jaxsys takes it.

A model is a function of this module that returns a `Made`; `MODELS` holds all by name. What a model
is trained by (masks, schedules, accumulation) is `RULES`, of one of them.

Legend: B samples, T tokens, D width, V vocabulary, H heads, L blocks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from flax.core import freeze
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxsys.train import from_linen, from_nnx
from jaxsys.train.adapt import KEY, Adapted, from_function

V, D, T, H, L = 13, 8, 6, 2, 3
ROWS, SIZE = 4, 2
"""Microbatches of a batch, and samples of each."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model as its author has it."""

    parameters: Any
    loss: Callable[[Any, Any], Any]
    """(parameters, batch) -> what the author's loss returns."""
    adapt: Callable[[Any], Adapted]
    own: Callable[[Any], Any] = lambda tree: tree
    """What `rebuild` gives as the tree of parameters."""
    data: Callable[[int], Any] | None = None
    """Batches of one's own, by number."""


MODELS: dict[str, Callable[[], Made]] = {}
REFUSED: dict[str, str] = {}
"""Models that are refused -> what the line says."""


def kind(function: Callable[[], Made]) -> Callable[[], Made]:
    """Names a model."""
    MODELS[function.__name__] = function
    return function


def refused(says: str) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Names a model that no schedule can run, and what it is told."""

    def named(function: Callable[[], Made]) -> Callable[[], Made]:
        REFUSED[function.__name__] = says
        return kind(function)

    return named


def batch(number: int) -> dict[str, np.ndarray]:
    """Tokens, targets some of which do not count, a weight a sample."""
    rng = np.random.default_rng(number)
    tokens = rng.integers(0, V, (ROWS * SIZE, T + 1)).astype(np.int32)
    targets = tokens[:, 1:].copy()
    targets[rng.random(targets.shape) < 0.2] = -1
    targets[:, 0] = tokens[:, 1]
    return {
        "inputs": tokens[:, :-1].copy(),
        "targets": targets,
        "weights": rng.random(len(tokens)).astype(np.float32),
    }


def each_loss(logits: Any, microbatch: Any) -> Any:
    """Cross-entropy of each token, and which count."""
    targets = microbatch["targets"]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return each, targets >= 0


def masked_mean(logits: Any, microbatch: Any) -> Any:
    """The usual loss of a language model."""
    each, mask = each_loss(logits, microbatch)
    return jnp.sum(each * mask) / jnp.sum(mask)


def masked_sums(logits: Any, microbatch: Any) -> Any:
    """The same as sum and weight."""
    each, mask = each_loss(logits, microbatch)
    return jnp.sum(each * mask), jnp.sum(mask).astype(jnp.float32)


def of_linen(
    module: linen.Module,
    blocks: str,
    *,
    loss: Callable[[Any, Any], Any] = masked_mean,
    rngs: str | tuple[str, ...] = "dropout",
    change: Callable[[Any], Any] = lambda variables: variables,
    **options: Any,
) -> Made:
    """A Linen module with its loss."""
    streams = (rngs,) if isinstance(rngs, str) else rngs
    keys = {name: jax.random.key(n) for n, name in enumerate(("params", *streams))}
    variables = change(module.init(keys, jnp.zeros((SIZE, T), jnp.int32)))
    others = {name: value for name, value in variables.items() if name != "params"}

    def own(params: Any, microbatch: Any) -> Any:
        drawn = {}
        if isinstance(microbatch, Mapping) and KEY in microbatch:
            key = microbatch[KEY]
            several = [jax.random.fold_in(key, n) for n in range(len(streams))]
            drawn["rngs"] = dict(zip(streams, several if len(streams) > 1 else [key], strict=True))
        output = module.apply(
            {"params": params, **others}, microbatch["inputs"], **drawn, **options
        )
        return loss(output, microbatch)

    return Made(
        parameters=variables["params"],
        loss=own,
        adapt=lambda example: from_linen(
            module, variables, example, blocks=blocks, loss=loss, rngs=rngs, **options
        ),
        own=lambda found: found["params"],
    )


def of_nnx(
    module: nnx.Module, blocks: str, *, loss: Callable[[Any, Any], Any] = masked_mean
) -> Made:
    """An NNX module with its loss; one that draws folds the key in as jaxsys does."""
    graph, params, keys, rest = nnx.split(module, nnx.Param, nnx.RngKey, ...)

    def own(pure: Any, microbatch: Any) -> Any:
        drawn = keys
        if isinstance(microbatch, Mapping) and KEY in microbatch:
            words = list(jax.random.key_data(microbatch[KEY]))

            def folded(key: Any) -> Any:
                if key.ndim:
                    return jax.vmap(folded)(key)
                for word in words:
                    key = jax.random.fold_in(key, word)
                return key

            drawn = jax.tree.map(folded, keys)
        mine = nnx.merge(graph, params, drawn, rest, copy=True)
        nnx.update(mine, pure)
        return loss(mine(microbatch["inputs"]), microbatch)

    return Made(
        parameters=nnx.to_pure_dict(params),
        loss=own,
        adapt=lambda example: from_nnx(module, example, blocks=blocks, loss=loss),
        own=lambda found: nnx.to_pure_dict(nnx.state(found, nnx.Param)),
    )


def of_function(loss: Any, parameters: Any, blocks: str, data: Any = None) -> Made:
    """A function of parameters and a microbatch."""
    return Made(
        parameters=parameters,
        loss=loss,
        adapt=lambda example: from_function(loss, parameters, example, blocks=blocks),
        data=data,
    )


def normal(*shape: int, seed: int = 0, scale: float = 0.4) -> np.ndarray:
    """Weights."""
    return (scale * np.random.default_rng((seed, *shape)).standard_normal(shape)).astype(np.float32)


# Linen


class LinenLm(linen.Module):
    """Embedding, blocks by number, tied head."""

    block: Callable[..., linen.Module]
    layers: int = L
    given: tuple[Any, ...] = ()

    @linen.compact
    def __call__(self, tokens: Any, *args: Any) -> Any:
        table = linen.Embed(V, D, name="embed", embedding_init=linen.initializers.normal(0.5))
        x = table(tokens)
        for index in range(self.layers):
            x = self.block(index, name=f"block_{index}")(x, *args)
        return table.attend(linen.LayerNorm(name="final")(x))


class ParallelBlock(linen.Module):
    """Attention and MLP side by side (GPT-J), its layer's number unused."""

    index: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        h = linen.LayerNorm(use_bias=False)(x)
        mask = linen.make_causal_mask(jnp.ones(x.shape[:2]))
        attention = linen.MultiHeadDotProductAttention(H, qkv_features=D)(h, h, mask=mask)
        return x + attention + linen.Dense(D)(jax.nn.silu(linen.Dense(2 * D)(h)))


@kind
def parallel_attention() -> Made:
    """GPT-J's blocks."""
    return of_linen(LinenLm(ParallelBlock), "block_")


class NormedWeights(linen.Module):
    """Weight norm around a dense layer."""

    index: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return x + linen.WeightNorm(linen.Dense(D))(jnp.tanh(x))


@kind
def weight_norm() -> Made:
    """Weight norm."""
    return of_linen(LinenLm(NormedWeights), "block_")


class Spectral(linen.Module):
    """Spectral norm, whose statistics are written in training."""

    index: int
    update: bool = True

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return x + linen.SpectralNorm(linen.Dense(D))(jnp.tanh(x), update_stats=self.update)


@refused("writes to batch_stats")
def spectral_norm_in_training() -> Made:
    """Spectral norm that estimates as it goes."""
    return of_linen(LinenLm(Spectral), "block_", mutable=["batch_stats"])


@kind
def spectral_norm_at_rest() -> Made:
    """Spectral norm with estimates that stay."""
    return of_linen(LinenLm(lambda index, name: Spectral(index, False, name=name)), "block_")


class BatchNormed(linen.Module):
    """Batch norm, with running averages or the batch's own."""

    index: int
    running: bool = True

    @linen.compact
    def __call__(self, x: Any) -> Any:
        h = linen.Conv(D, (3,), padding="SAME")(x)
        return x + linen.relu(linen.BatchNorm(use_running_average=self.running)(h))


@kind
def frozen_batch_norm() -> Made:
    """Running averages that stay."""
    return of_linen(LinenLm(BatchNormed), "block_")


@refused("writes to batch_stats")
def batch_norm_in_training() -> Made:
    """Mutable batch statistics."""
    block = LinenLm(lambda index, name: BatchNormed(index, False, name=name))
    return of_linen(block, "block_", mutable=["batch_stats"])


class Partitioned(linen.Module):
    """Parameters in boxes that name mesh axes."""

    index: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        def init(*names: str | None) -> Any:
            return linen.with_partitioning(linen.initializers.lecun_normal(), names)

        up = linen.Dense(2 * D, kernel_init=init(None, "model"))(x)
        return x + linen.Dense(D, kernel_init=init("model", None))(jnp.tanh(up))


@kind
def partitioned_boxes() -> Made:
    """Metadata boxes around leaves."""
    return of_linen(LinenLm(Partitioned), "block_")


@kind
def logically_partitioned_boxes() -> Made:
    """Logical axis names, and constraints by them in the model's call."""

    class Logical(linen.Module):
        index: int

        @linen.compact
        def __call__(self, x: Any) -> Any:
            init = linen.with_logical_partitioning(
                linen.initializers.lecun_normal(), ("embed", "mlp")
            )
            h = linen.Dense(2 * D, kernel_init=init)(x)
            h = linen.spmd.with_logical_constraint(h, ("batch", "length", "mlp"))
            return x + linen.Dense(D)(jnp.tanh(h))

    return of_linen(LinenLm(Logical), "block_")


class DropPath(linen.Module):
    """Stochastic depth: whole samples skip a block, later blocks more often."""

    index: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        h = linen.Dense(D)(jnp.tanh(linen.LayerNorm()(x)))
        keep = 1.0 - 0.5 * self.index / L
        kept = jax.random.bernoulli(self.make_rng("path"), keep, (x.shape[0], 1, 1))
        h = linen.Dropout(0.2, deterministic=False)(h)
        return x + jnp.where(kept, h / keep, 0.0)


@kind
def stochastic_depth() -> Made:
    """Two streams, a rate by layer, a draw a sample."""
    return of_linen(LinenLm(DropPath), "block_", rngs=("dropout", "path"))


class Switch(linen.Module):
    """A mixture of experts whose balance is sown; a product of means."""

    index: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        gates = jax.nn.softmax(linen.Dense(3, name="router")(x))
        chosen = jax.nn.one_hot(jnp.argmax(gates, -1), 3)
        up = self.param("up", linen.initializers.normal(0.3), (3, D, D))
        each = jnp.einsum("btd,edf->btef", x, up)
        self.sow(
            "losses", "balance", 3 * jnp.sum(jnp.mean(gates, (0, 1)) * jnp.mean(chosen, (0, 1)))
        )
        return x + jnp.einsum("btef,bte->btf", jnp.tanh(each), gates * chosen)


def _with_sown(output: Any, microbatch: Any) -> Any:
    logits, sown = output
    total, weight = masked_sums(logits, microbatch)
    return total + 0.1 * weight * sum(jax.tree.leaves(sown)), weight


def _with_sown_mean(output: Any, microbatch: Any) -> Any:
    logits, sown = output
    return masked_mean(logits, microbatch) + 0.1 * sum(jax.tree.leaves(sown))


@kind
def experts_with_sown_balance() -> Made:
    """Load balancing by the microbatch, as gradient accumulation takes it."""
    return of_linen(
        LinenLm(Switch),
        "block_",
        loss=_with_sown,
        mutable=["losses"],
        change=lambda variables: {"params": variables["params"]},
    )


@refused("return .sum over samples, their number. instead of a mean")
def balance_in_a_mean() -> Made:
    """The same in a mean: another number for the whole batch than for its parts."""
    return of_linen(
        LinenLm(Switch),
        "block_",
        loss=_with_sown_mean,
        mutable=["losses"],
        change=lambda variables: {"params": variables["params"]},
    )


class ScanBody(linen.Module):
    """A block for scans."""

    @linen.compact
    def __call__(self, x: Any, _: Any) -> Any:
        h = linen.LayerNorm()(x)
        h = checkpoint_name(linen.Dense(2 * D)(h), "up")
        return x + linen.Dense(D)(jnp.tanh(h)), None


class Scanned(linen.Module):
    """A scan over layers, unrolled in part, each rematerialised by a named policy."""

    policy: Any
    unroll: int = 1
    axis: int = 0

    @linen.compact
    def __call__(self, tokens: Any) -> Any:
        table = linen.Embed(V, D)
        body = linen.remat(ScanBody, prevent_cse=False, policy=self.policy)
        scan = linen.scan(
            body,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=4,
            unroll=self.unroll,
        )
        x, _ = scan(name="layers")(table(tokens), None)
        return table.attend(x)


@kind
def scan_with_unroll_and_policy() -> Made:
    """`unroll=2`, dots saved."""
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return of_linen(Scanned(policy, unroll=2), "layers")


@kind
def scan_along_axis_one_saving_by_name() -> Made:
    """MaxText's `param_scan_axis=1`, names saved."""
    policy = jax.checkpoint_policies.save_only_these_names("up")
    return of_linen(Scanned(policy, axis=1), "layers")


@kind
def remat_scan() -> Made:
    """`nn.remat_scan`: a scan in a scan."""

    class Inner(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return x + linen.Dense(D)(jnp.tanh(x))

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens: Any) -> Any:
            table = linen.Embed(V, D)
            x = linen.remat_scan(Inner, lengths=(2, 2))(name="layers")(table(tokens))
            return table.attend(x)

    return of_linen(Model(), "layers")


class Heads(linen.Module):
    """Heads by `nn.vmap`, each with its own kernels."""

    index: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        heads = linen.vmap(
            linen.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,  # pyright: ignore[reportArgumentType]
            out_axes=2,
            axis_size=H,
        )
        q, k, v = (heads(D // H, name=name)(x) for name in "qkv")
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / 2.0
        mask = jnp.tril(jnp.ones((T, T), bool))
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(mask, scores, -1e9)), v)
        return x + linen.DenseGeneral(D, axis=(-2, -1))(mixed)


@kind
def vmap_over_heads() -> Made:
    """Parameters with an axis of heads."""
    return of_linen(LinenLm(Heads), "block_")


class Recurrent(linen.Module):
    """A recurrent cell in each block."""

    index: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return x + linen.RNN(linen.GRUCell(D))(x)


@kind
def recurrent_cells() -> Made:
    """`nn.RNN`: a scan over time in each block."""
    return of_linen(LinenLm(Recurrent), "block_")


class LayerScale(linen.Module):
    """A scalar and a vector a layer, initialised by depth."""

    index: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        scalar = self.param("scalar", lambda _: jnp.float32(1.0 / (1 + self.index)))
        vector = self.param("vector", linen.initializers.constant(0.1), (D,))
        return x * scalar + vector * linen.Dense(D)(jax.nn.gelu(linen.Dense(2 * D)(x)))


@kind
def scalars_by_layer() -> Made:
    """Scalars of rank 0 in blocks."""
    return of_linen(LinenLm(LayerScale), "block_")


class Windowed(linen.Module):
    """Attention over a window in all blocks but each third; rotary base by kind."""

    index: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        whole = self.index % 3 == 2
        h = linen.RMSNorm()(x)
        q, k = linen.Dense(D, use_bias=False)(h), linen.Dense(D, use_bias=False)(h)
        q, k = (_rotated(a, 10_000.0 if whole else 100.0) for a in (q, k))
        distance = jnp.arange(T)[:, None] - jnp.arange(T)[None]
        mask = (distance >= 0) & (distance < (T if whole else 2))
        scores = 5.0 * jnp.tanh(jnp.einsum("btd,bsd->bts", q, k) / 5.0)
        h = jax.nn.softmax(jnp.where(mask, scores, -1e30)) @ h
        return x + linen.Dense(D)(linen.RMSNorm()(h))


def _rotated(x: Any, base: float) -> Any:
    half = x.shape[-1] // 2
    angles = jnp.arange(T)[:, None] / base ** (jnp.arange(half) / half)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate(
        [a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], -1
    )


@kind
def alternating_windows() -> Made:
    """Gemma's pattern with a remainder."""
    return of_linen(LinenLm(Windowed, layers=4), "block_")


@kind
def setup_and_frozen_dict() -> Made:
    """`setup` with a list of blocks; variables as a FrozenDict."""

    class Inner(linen.Module):
        def setup(self) -> None:
            self.up, self.down = linen.Dense(2 * D), linen.Dense(D)

        def __call__(self, x: Any) -> Any:
            return x + self.down(jnp.tanh(self.up(x)))

    class Model(linen.Module):
        def setup(self) -> None:
            self.embed = linen.Embed(V, D)
            self.blocks = [Inner() for _ in range(L)]

        def __call__(self, tokens: Any) -> Any:
            x = self.embed(tokens)
            for inner in self.blocks:
                x = inner(x)
            return self.embed.attend(x)

    return of_linen(Model(), "blocks_", change=freeze)


@kind
def sequential_of_blocks() -> Made:
    """`nn.Sequential`, whose blocks are the caller's children."""

    class Inner(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return x + linen.Dense(D)(jnp.tanh(x))

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens: Any) -> Any:
            x = linen.Embed(V, D)(tokens)
            x = linen.Sequential([Inner() for _ in range(L)])(x)
            return linen.Dense(V)(x)

    return of_linen(Model(), "Inner_")


@kind
def positions_shared_with_blocks() -> Made:
    """One learned table of positions, added again in every block."""

    class Inner(linen.Module):
        @linen.compact
        def __call__(self, x: Any, position: Any) -> Any:
            return x + linen.Dense(D)(jnp.tanh(x + position))

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens: Any) -> Any:
            position = self.param("position", linen.initializers.normal(0.2), (T, D))[None]
            table = linen.Embed(V, D)
            x = table(tokens) + position
            for index in range(L):
                x = Inner(name=f"block_{index}")(x, position)
            return table.attend(x)

    return of_linen(Model(), "block_")


@kind
def keys_and_values_of_an_earlier_layer() -> Made:
    """Later blocks attend to what the first made."""

    class Inner(linen.Module):
        first: bool

        @linen.compact
        def __call__(self, x: Any, known: Any) -> Any:
            q = linen.Dense(D)(x)
            if self.first:
                known = linen.Dense(D, name="key")(x), linen.Dense(D, name="value")(x)
            k, v = known
            mask = jnp.tril(jnp.ones((T, T), bool))
            scores = jnp.where(mask, jnp.einsum("btd,bsd->bts", q, k), -1e9)
            return x + jax.nn.softmax(scores) @ v, known

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens: Any) -> Any:
            table, known = linen.Embed(V, D), None
            x = table(tokens)
            for index in range(4):
                x, known = Inner(index == 0, name=f"block_{index}")(x, known)
            return table.attend(x)

    return of_linen(Model(), "block_")


@refused("used whole by dot_general|neither numbered")
def one_block_run_again_and_again() -> Made:
    """ALBERT: there is one block, no row of them."""

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens: Any) -> Any:
            table, block = linen.Embed(V, D), linen.Dense(D, name="block")
            x = table(tokens)
            for _ in range(L):
                x = x + jnp.tanh(block(x))
            return table.attend(x)

    return of_linen(Model(), "block")


@kind
def three_blocks_run_twice() -> Made:
    """A row of blocks that is run twice (a looped transformer)."""

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens: Any) -> Any:
            table = linen.Embed(V, D)
            blocks = [linen.Dense(D, name=f"block_{n}") for n in range(L)]
            x = table(tokens)
            for _ in range(2):
                for block in blocks:
                    x = x + jnp.tanh(block(x))
            return table.attend(x)

    return of_linen(Model(), "block_")


@kind
def streams_between_blocks() -> Made:
    """Hyper-connections: several residual streams, mixed by weights of each layer."""

    class Inner(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            read = self.param("read", linen.initializers.normal(0.5), (3,))
            write = self.param("write", linen.initializers.normal(0.5), (3,))
            mixed = self.param("mixed", linen.initializers.normal(0.5), (3, 3))
            h = linen.Dense(D)(jnp.tanh(jnp.einsum("nbtd,n->btd", x, read)))
            return jnp.einsum("nbtd,nm->mbtd", x, mixed) + write[:, None, None, None] * h[None]

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens: Any) -> Any:
            table = linen.Embed(V, D)
            x = jnp.repeat(table(tokens)[None], 3, 0)
            for index in range(L):
                x = Inner(name=f"block_{index}")(x)
            return table.attend(jnp.sum(x, 0))

    return of_linen(Model(), "block_")


@kind
def two_towers_one_after_another() -> Made:
    """An encoder's blocks, then a decoder's that read its output."""

    class Inner(linen.Module):
        @linen.compact
        def __call__(self, x: Any, context: Any) -> Any:
            h = x + linen.Dense(D)(jnp.tanh(x))
            if context is not None:
                scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", linen.Dense(D)(h), context))
                h = h + scores @ context
            return h

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens: Any) -> Any:
            table = linen.Embed(V, D)
            context = table(tokens[:, ::-1])
            for index in range(2):
                context = Inner(name=f"encoder_{index}")(context, None)
            context, x = linen.LayerNorm()(context), table(tokens)
            for index in range(3):
                x = Inner(name=f"decoder_{index}")(x, context)
            return table.attend(x)

    made = of_linen(Model(), "decoder_")
    both = from_linen_with(Model(), made.parameters, ("encoder_", "decoder_"))
    return replace(made, adapt=both)


def from_linen_with(
    module: linen.Module, params: Any, blocks: tuple[str, ...]
) -> Callable[[Any], Adapted]:
    """An adaptation with several groups of blocks."""
    return lambda example: from_linen(
        module, {"params": params}, example, blocks=blocks, loss=masked_mean
    )


# NNX


class NnxLm(nnx.Module):
    """Embedding, a list of blocks, a tied head."""

    def __init__(self, block: Callable[[int, nnx.Rngs], nnx.Module], layers: int = L) -> None:
        rngs = nnx.Rngs(0, dropout=1)
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.blocks = nnx.List([block(index, rngs) for index in range(layers)])

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x)


class Attending(nnx.Module):
    """NNX's attention with normalised queries, dropout by a model's own streams."""

    def __init__(self, index: int, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(
            H, D, decode=False, dropout_rate=0.2, normalize_qk=True, rngs=rngs
        )
        self.dropout = nnx.Dropout(0.1 * (index + 1), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.dropout(self.attention(x, mask=nnx.make_causal_mask(x[..., 0])))


@kind
def nnx_attention_with_dropout() -> Made:
    """Rates by layer, streams in the state."""
    module = NnxLm(Attending)
    module.train()
    return of_nnx(module, "blocks")


class Rotary(nnx.Module):
    """A rotary table as a variable, a buffer of another kind, and a scale a layer."""

    def __init__(self, index: int, rngs: nnx.Rngs) -> None:
        half = D // 2
        self.table = nnx.Variable(jnp.arange(T)[:, None] / 100.0 ** (jnp.arange(half) / half))
        self.count = nnx.Cache(jnp.int32(index))
        self.scale = nnx.Param(jnp.float32(1.0))
        self.project = nnx.LinearGeneral((D,), (H, D // H), rngs=rngs)
        self.out = nnx.Einsum("bthd,hdf->btf", (H, D // H, D), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        a, b = jnp.split(x, 2, -1)
        c, s = jnp.cos(self.table[...]), jnp.sin(self.table[...])
        h = self.project(jnp.concatenate([a * c - b * s, b * c + a * s], -1))
        return x + self.scale * self.out(jnp.tanh(h)) / (1 + self.count[...])


@kind
def rotary_tables_as_variables() -> Made:
    """Variables beside parameters."""
    return of_nnx(NnxLm(Rotary), "blocks")


@kind
def nnx_sequential() -> Made:
    """`nnx.Sequential` of blocks."""

    class Inner(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.inner = nnx.Linear(D, D, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return x + jnp.tanh(self.inner(x))

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.embed = nnx.Embed(V, D, rngs=rngs)
            self.body = nnx.Sequential(*(Inner(rngs) for _ in range(L)))
            self.head = nnx.Linear(D, V, rngs=rngs)

        def __call__(self, tokens: Any) -> Any:
            return self.head(self.body(self.embed(tokens)))

    return of_nnx(Model(nnx.Rngs(0)), "body.layers")


class Convolved(nnx.Module):
    """ConvNeXt's block along tokens, and a group norm."""

    def __init__(self, index: int, rngs: nnx.Rngs) -> None:
        self.mix = nnx.Conv(D, D, (3,), feature_group_count=D, padding="CAUSAL", rngs=rngs)
        self.norm = nnx.GroupNorm(D, num_groups=2, rngs=rngs)
        self.up, self.down = nnx.Linear(D, 2 * D, rngs=rngs), nnx.Linear(2 * D, D, rngs=rngs)
        self.gamma = nnx.Param(0.1 * jnp.ones(D))

    def __call__(self, x: Any) -> Any:
        return x + self.gamma * self.down(nnx.gelu(self.up(self.norm(self.mix(x)))))


@kind
def nnx_convolutions() -> Made:
    """Depthwise convolutions."""
    return of_nnx(NnxLm(Convolved), "blocks")


class Celled(nnx.Module):
    """An LSTM in each block."""

    def __init__(self, index: int, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(nnx.LSTMCell(D, D, rngs=rngs), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.rnn(x)


@kind
def nnx_recurrent_cells() -> Made:
    """Cells that keep streams for their carries."""
    return of_nnx(NnxLm(Celled), "blocks")


@kind
def nnx_statistics_at_rest() -> Made:
    """`model.eval()` of batch norm."""

    class Inner(nnx.Module):
        def __init__(self, index: int, rngs: nnx.Rngs) -> None:
            self.norm = nnx.BatchNorm(D, rngs=rngs)
            self.inner = nnx.Linear(D, D, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return x + self.inner(jnp.tanh(self.norm(x)))

    module = NnxLm(Inner)
    module.eval()
    return of_nnx(module, "blocks")


@refused("writes to blocks.0.norm.mean")
def nnx_statistics_in_training() -> Made:
    """Batch norm in training."""

    class Inner(nnx.Module):
        def __init__(self, index: int, rngs: nnx.Rngs) -> None:
            self.norm = nnx.BatchNorm(D, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return x + jnp.tanh(self.norm(x))

    return of_nnx(NnxLm(Inner), "blocks")


@kind
def nnx_partitioning_metadata() -> Made:
    """Sharding names on parameters."""

    class Inner(nnx.Module):
        def __init__(self, index: int, rngs: nnx.Rngs) -> None:
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
            self.inner = nnx.Linear(D, D, kernel_init=init, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return x + jnp.tanh(self.inner(x))

    with nnx.use_eager_sharding(False):
        return of_nnx(NnxLm(Inner), "blocks")


@kind
def filters_that_train_adapters_alone() -> Made:
    """`nnx.split` by filter: LoRA parameters train, the rest is closed over."""

    class Inner(nnx.Module):
        def __init__(self, index: int, rngs: nnx.Rngs) -> None:
            self.inner = nnx.LoRALinear(D, D, lora_rank=2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return x + jnp.tanh(self.inner(x))

    module = NnxLm(Inner)
    blocks: Any = module.blocks
    for block in blocks:
        block.inner.lora.lora_b.set_value(normal(2, D))
    graph, trained, rest = nnx.split(module, nnx.LoRAParam, ...)

    def loss(pure: Any, microbatch: Any) -> Any:
        mine = nnx.merge(graph, trained, rest, copy=True)
        nnx.update(mine, pure)
        return masked_mean(mine(microbatch["inputs"]), microbatch)

    return of_function(loss, nnx.to_pure_dict(trained), "blocks")


@kind
def quantised_weights_that_stay() -> Made:
    """uint8 leaves with scales that train."""

    class Inner(nnx.Module):
        def __init__(self, index: int, rngs: nnx.Rngs) -> None:
            words = np.random.default_rng(index).integers(0, 255, (D, D)).astype(np.uint8)
            self.words, self.scale = nnx.Param(jnp.asarray(words)), nnx.Param(0.3 * jnp.ones(D))

        def __call__(self, x: Any) -> Any:
            kernel = (self.words[...].astype(jnp.float32) / 128.0 - 1.0) * self.scale[...]
            return x + jnp.tanh(x @ kernel)

    return of_nnx(NnxLm(Inner), "blocks")


# Functions of plain trees


class Weights(NamedTuple):
    """A block's."""

    up: Any
    down: Any


def _plain(parameters: Any, microbatch: Any, block: Callable[[Any, Any, int], Any]) -> Any:
    """Logits of a list of blocks."""
    table = parameters["table"]
    x = table[microbatch["inputs"]]
    for index, weights in enumerate(parameters["layers"]):
        x = block(weights, x, index)
    return x @ table.T


def _listed() -> dict[str, Any]:
    layers = [Weights(normal(D, 2 * D, seed=n), normal(2 * D, D, seed=n)) for n in range(L)]
    return {"table": normal(V, D), "layers": layers}


def _stacked() -> dict[str, Any]:
    layers = Weights(normal(L, D, 2 * D), normal(L, 2 * D, D))
    return {"table": normal(V, D), "layers": layers}


def _mlp(w: Any, x: Any, index: int = 0) -> Any:
    return x + jnp.tanh(x @ w.up) @ w.down


@kind
def named_tuples_and_weights_of_samples() -> Made:
    """Weights a sample, label smoothing, a penalty on logits."""

    def loss(parameters: Any, microbatch: Any) -> Any:
        logits = _plain(parameters, microbatch, _mlp)
        labels = optax.smooth_labels(jax.nn.one_hot(microbatch["targets"], V), 0.1)
        each = optax.softmax_cross_entropy(logits, labels).mean(-1)
        each = each + 1e-2 * jnp.square(jax.nn.logsumexp(logits, -1)).mean(-1)
        weights = microbatch["weights"]
        return jnp.sum(each * weights) / jnp.sum(weights), {"top": jnp.mean(jnp.max(logits, -1))}

    return of_function(loss, _listed(), "layers")


@kind
def a_mean_of_each_sequences_mean() -> Made:
    """Each sequence by its own length, then a mean over sequences."""

    def loss(parameters: Any, microbatch: Any) -> Any:
        each, mask = each_loss(_plain(parameters, microbatch, _mlp), microbatch)
        return jnp.mean(jnp.sum(each * mask, -1) / jnp.sum(mask, -1))

    return of_function(loss, _listed(), "layers")


@kind
def batches_that_are_tuples() -> Made:
    """(inputs, targets), as many loaders give them."""

    def loss(parameters: Any, microbatch: Any) -> Any:
        inputs, targets = microbatch
        logits = _plain(parameters, {"inputs": inputs}, _mlp)
        return masked_sums(logits, {"targets": targets})

    def data(number: int) -> Any:
        whole = batch(number)
        return whole["inputs"], whole["targets"]

    return of_function(loss, _listed(), "layers", data)


@kind
def leaves_of_other_lengths() -> Made:
    """Packed documents: a microbatch's leaves differ in their first axis."""

    def loss(parameters: Any, microbatch: Any) -> Any:
        each, mask = each_loss(_plain(parameters, microbatch, _mlp), microbatch)
        scale = microbatch["scales"][microbatch["document"]]
        return jnp.sum(each * mask * scale), jnp.sum(mask * scale)

    def data(number: int) -> Any:
        whole = batch(number)
        rng = np.random.default_rng(number)
        documents = rng.integers(0, 3, whole["inputs"].shape).astype(np.int32)
        scales = 0.5 + rng.random(3 * ROWS).astype(np.float32)
        return {**whole, "document": documents, "scales": scales}

    made = of_function(loss, _listed(), "layers", data)
    return made


@kind
def leaves_of_other_lengths_in_a_mean() -> Made:
    """The same with a mean."""

    def loss(parameters: Any, microbatch: Any) -> Any:
        each, mask = each_loss(_plain(parameters, microbatch, _mlp), microbatch)
        bias = jnp.mean(microbatch["scales"])
        return jnp.sum(each * mask) / jnp.sum(mask) * bias

    def data(number: int) -> Any:
        whole = batch(number)
        scales = np.random.default_rng(number).random(3 * ROWS).astype(np.float32)
        return {**whole, "scales": scales}

    return of_function(loss, _listed(), "layers", data)


REFUSED["leaves_of_other_lengths_in_a_mean"] = "not seen to be a mean"


@kind
def stops_of_gradients() -> Made:
    """A target branch behind stop_gradient, in blocks and loss; rounding passed straight on."""

    def block(w: Any, x: Any, index: int) -> Any:
        h = jnp.tanh(x @ w.up)
        h = h + lax.stop_gradient(jnp.round(8 * h) / 8 - h)
        return x + h @ w.down + 0.1 * lax.stop_gradient(x @ w.up @ w.down)

    def loss(parameters: Any, microbatch: Any) -> Any:
        logits = _plain(parameters, microbatch, block)
        each, mask = each_loss(logits, microbatch)
        drift = jnp.sum(jnp.square(logits - lax.stop_gradient(0.9 * logits)), -1)
        return jnp.sum((each + 0.1 * drift) * mask) / jnp.sum(mask)

    return of_function(loss, _listed(), "layers")


@kind
def gradients_inside_the_loss() -> Made:
    """A penalty on the gradient with respect to the embedding."""

    def loss(parameters: Any, microbatch: Any) -> Any:
        def scored(x: Any) -> Any:
            for weights in parameters["layers"]:
                x = _mlp(weights, x)
            each, mask = each_loss(x @ parameters["table"].T, microbatch)
            return jnp.sum(each * mask)

        x = parameters["table"][microbatch["inputs"]]
        value, slope = jax.value_and_grad(scored)(x)
        mask = microbatch["targets"] >= 0
        return value + 0.1 * jnp.sum(jnp.square(slope)), jnp.sum(mask).astype(jnp.float32)

    return of_function(loss, _listed(), "layers")


def _scan_of(reverse: bool) -> Made:
    def loss(parameters: Any, microbatch: Any) -> Any:
        table = parameters["table"]
        keys = jax.random.split(microbatch[KEY], L)
        windows = jnp.array([1, 3, T])

        def body(x: Any, xs: Any) -> Any:
            w, key, window = xs
            distance = jnp.arange(T)[:, None] - jnp.arange(T)[None]
            mask = (distance >= 0) & (distance < window)
            mixed = jnp.einsum("ts,bsd->btd", mask / jnp.sum(mask, 1, keepdims=True), x)
            kept = jax.random.bernoulli(key, 0.8, mixed.shape)
            return x + jnp.where(kept, jnp.tanh(mixed @ w.up) @ w.down, 0.0), None

        stacks = (parameters["layers"], keys, windows)
        x, _ = lax.scan(body, table[microbatch["inputs"]], stacks, reverse=reverse, unroll=2)
        return masked_mean(x @ table.T, microbatch)

    return of_function(loss, jax.tree.map(jnp.asarray, _stacked()), "layers")


@kind
def stacks_with_tables_and_keys() -> Made:
    """A scan whose xs are parameters, a table and keys, unrolled in part."""
    return _scan_of(reverse=False)


@refused("do not run in its order")
def stacks_run_backwards() -> Made:
    """The same from the last layer to the first."""
    return _scan_of(reverse=True)


@kind
def stacks_used_whole_beside_the_scan() -> Made:
    """A penalty on all weights, normed weights, a cast and a scale before the scan."""

    def loss(parameters: Any, microbatch: Any) -> Any:
        table, layers = parameters["table"], parameters["layers"]
        norm = jnp.sqrt(jnp.sum(jnp.square(layers.up), (1, 2), keepdims=True))
        normed = Weights(layers.up / (1 + norm), 0.5 * layers.down)

        def body(x: Any, w: Any) -> Any:
            return _mlp(w, x), None

        x, _ = lax.scan(body, table[microbatch["inputs"]], normed)
        penalty = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(layers))
        largest = jnp.max(jnp.abs(layers.down))
        return masked_mean(x @ table.T, microbatch) + 1e-2 * penalty + 1e-2 * largest

    return of_function(loss, jax.tree.map(jnp.asarray, _stacked()), "layers")


@kind
def skips_between_stacked_layers() -> Made:
    """Each layer of a stack reads all earlier ones; the head reads them too."""

    def loss(parameters: Any, microbatch: Any) -> Any:
        table = parameters["table"]
        outputs = [table[microbatch["inputs"]]]
        for index in range(L):
            w = jax.tree.map(lambda leaf, n=index: leaf[n], parameters["layers"])
            outputs.append(_mlp(w, sum(outputs)))
        return masked_mean(sum(outputs[1:]) @ table.T / L, microbatch)

    return of_function(loss, jax.tree.map(jnp.asarray, _stacked()), "layers")


@kind
def two_stacks_of_the_same_blocks() -> Made:
    """An encoder's stack and a decoder's, alike; each is one leaf still."""
    parameters: dict[str, Any] = {"table": normal(V, D)}
    for name, seed in (("encoder", 1), ("decoder", 2)):
        up, down = normal(L, D, 2 * D, seed=seed), normal(L, 2 * D, D, seed=seed)
        parameters[name] = {"up": jnp.asarray(up), "down": jnp.asarray(down)}

    def loss(parameters: Any, microbatch: Any) -> Any:
        table = parameters["table"]

        def run(name: str, x: Any) -> Any:
            return lax.scan(lambda x, w: (_mlp(Weights(**w), x), None), x, parameters[name])[0]

        x = run("decoder", jnp.tanh(run("encoder", table[microbatch["inputs"]])))
        return masked_mean(x @ table.T, microbatch)

    return Made(
        parameters=parameters,
        loss=loss,
        adapt=lambda example: from_function(
            loss, parameters, example, blocks=("encoder", "decoder")
        ),
    )


@refused("picks its layer by index")
def a_loop_that_picks_by_index() -> Made:
    """`fori_loop` over layers with the whole stack."""

    def loss(parameters: Any, microbatch: Any) -> Any:
        table = parameters["table"]

        def body(index: Any, x: Any) -> Any:
            return _mlp(jax.tree.map(lambda leaf: leaf[index], parameters["layers"]), x)

        x = lax.fori_loop(0, L, body, table[microbatch["inputs"]])
        return masked_mean(x @ table.T, microbatch)

    return of_function(loss, jax.tree.map(jnp.asarray, _stacked()), "layers")


@kind
def samples_by_vmap_with_keys() -> Made:
    """One sample's function under vmap, its key from the microbatch's (Equinox, Haiku)."""

    def loss(parameters: Any, microbatch: Any) -> Any:
        def one(tokens: Any, key: Any) -> Any:
            x = parameters["table"][tokens]
            for weights, own in zip(parameters["layers"], jax.random.split(key, L), strict=True):
                h = jnp.tanh(x @ weights.up) @ weights.down
                x = x + jnp.where(jax.random.bernoulli(own, 0.8, h.shape), h, 0.0)
            return x @ parameters["table"].T

        tokens = microbatch["inputs"]
        keys = jax.random.split(microbatch[KEY], tokens.shape[0])
        return masked_mean(jax.vmap(one)(tokens, keys), microbatch)

    return of_function(loss, _listed(), "layers")


@refused("not seen to be a mean over samples")
def contrastive_loss() -> Made:
    """Every sample against all others."""

    def loss(parameters: Any, microbatch: Any) -> Any:
        x = jnp.mean(_plain(parameters, microbatch, _mlp), 1)
        scores = x @ x.T
        return jnp.mean(jax.nn.logsumexp(scores, -1) - jnp.diag(scores))

    return of_function(loss, _listed(), "layers")


@kind
def leaves_of_several_dtypes() -> Made:
    """Half of the leaves in float16, computed in float32: masters are float32 in any case."""
    parameters = _listed()
    parameters["layers"] = [
        Weights(w.up.astype(np.float16).astype(np.float32), w.down) for w in parameters["layers"]
    ]

    def loss(parameters: Any, microbatch: Any) -> Any:
        return masked_mean(_plain(parameters, microbatch, _mlp), microbatch)

    handed = {
        **parameters,
        "layers": [Weights(w.up.astype(np.float16), w.down) for w in parameters["layers"]],
    }
    return Made(
        parameters=parameters,
        loss=loss,
        adapt=lambda example: from_function(loss, handed, example, blocks="layers"),
    )


@kind
def typed_keys_among_parameters() -> Made:
    """A typed key and a mask in the tree, which stay."""
    parameters = _listed()
    parameters["noise"] = jax.random.key(7)
    parameters["kept"] = np.array([True] * (D - 1) + [False])

    def loss(parameters: Any, microbatch: Any) -> Any:
        noise = jax.random.normal(parameters["noise"], (T, D))

        def block(w: Any, x: Any, index: int) -> Any:
            return _mlp(w, x + 0.1 * noise) * jnp.asarray(parameters["kept"])

        return masked_mean(_plain(parameters, microbatch, block), microbatch)

    return of_function(loss, parameters, "layers")


@refused("complex parameters, which no schedule moves; hold their real and imaginary parts")
def complex_leaves() -> Made:
    """A linear recurrence with complex poles (LRU), by an associative scan."""
    parameters = _listed()
    poles = [0.3 * (normal(D, seed=n) + 1j * normal(D, seed=n + 9)) for n in range(L)]
    parameters["layers"] = [
        {"pole": pole.astype(np.complex64), "up": w.up, "down": w.down}
        for pole, w in zip(poles, parameters["layers"], strict=True)
    ]

    def block(w: Any, x: Any, index: int) -> Any:
        decay = jnp.broadcast_to(w["pole"], x.shape)
        (_, states) = lax.associative_scan(
            lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, x.astype(jnp.complex64)), axis=1
        )
        return x + jnp.tanh(states.real @ w["up"]) @ w["down"]

    def loss(parameters: Any, microbatch: Any) -> Any:
        return masked_mean(_plain(parameters, microbatch, block), microbatch)

    return of_function(loss, parameters, "layers")


@kind
def fourier_mixing() -> Made:
    """FNet: no parameters in what mixes tokens."""

    def block(w: Any, x: Any, index: int) -> Any:
        return _mlp(w, x + 0.3 * jnp.fft.fft2(x, axes=(1, 2)).real)

    def loss(parameters: Any, microbatch: Any) -> Any:
        return masked_mean(_plain(parameters, microbatch, block), microbatch)

    return of_function(loss, _listed(), "layers")


@kind
def loss_by_pieces() -> Made:
    """Cross-entropy over pieces of the sequence, each rematerialised."""

    def loss(parameters: Any, microbatch: Any) -> Any:
        x = parameters["table"][microbatch["inputs"]]
        for weights in parameters["layers"]:
            x = jax.checkpoint(_mlp, policy=jax.checkpoint_policies.nothing_saveable)(weights, x)

        @jax.checkpoint
        def piece(total: Any, rows: Any) -> Any:
            x, targets = rows
            each, mask = each_loss(x @ parameters["table"].T, {"targets": targets})
            return total + jnp.sum(each * mask), None

        def pieces(leaf: Any) -> Any:
            cut = leaf.reshape(leaf.shape[0], 2, T // 2, *leaf.shape[2:])
            return jnp.swapaxes(cut, 0, 1)

        targets = microbatch["targets"]
        total, _ = lax.scan(piece, jnp.float32(0), (pieces(x), pieces(targets)))
        return total, jnp.sum(targets >= 0).astype(jnp.float32)

    return of_function(loss, _listed(), "layers")


@kind
def branches_by_layer_and_depth() -> Made:
    """`lax.cond` and `lax.switch` in blocks; a loss at each depth with weights of its own."""

    def loss(parameters: Any, microbatch: Any) -> Any:
        table = parameters["table"]
        x = table[microbatch["inputs"]]
        total = jnp.float32(0)
        for index, w in enumerate(parameters["layers"]):
            x = lax.cond(
                jnp.int32(index) % 2 == 0, lambda x, w=w: _mlp(w, x), lambda x, w=w: _mlp(w, -x), x
            )
            each, mask = each_loss(x @ table.T, microbatch)
            total = total + (index + 1) / 6 * jnp.sum(each * mask) / jnp.sum(mask)
        return total

    return of_function(loss, _listed(), "layers")


@refused("not seen to be a mean over samples")
def moments_of_the_batch() -> Made:
    """Batch norm without statistics: samples enter each other's parts."""

    def block(w: Any, x: Any, index: int) -> Any:
        h = jnp.tanh(x @ w.up)
        mean, variance = (of(h, (0, 1), keepdims=True) for of in (jnp.mean, jnp.var))
        h = (h - mean) / jnp.sqrt(variance + 1e-3)
        return x + h @ w.down

    def loss(parameters: Any, microbatch: Any) -> Any:
        return masked_mean(_plain(parameters, microbatch, block), microbatch)

    return of_function(loss, _listed(), "layers")


@kind
def depth_by_tokens() -> Made:
    """Mixture of depths: each sequence's best tokens alone go through a block."""

    def block(w: Any, x: Any, index: int) -> Any:
        score = x @ w.up[:, 0]
        _, chosen = lax.top_k(score, T // 2)
        rows = jnp.arange(x.shape[0])[:, None]
        part = _mlp(w, x[rows, chosen]) * jax.nn.sigmoid(score[rows, chosen])[..., None]
        return x.at[rows, chosen].add(part)

    def loss(parameters: Any, microbatch: Any) -> Any:
        return masked_sums(_plain(parameters, microbatch, block), microbatch)

    return of_function(loss, _listed(), "layers")


@kind
def pyramid_of_widths() -> Made:
    """Blocks that widen what they are given: each is a kind of its own."""
    widths = (D, 2 * D, 3 * D)
    parameters = {
        "table": normal(V, D),
        "head": normal(4 * D, V),
        "layers": [{"w": normal(a, a + D)} for a in widths],
    }

    def loss(parameters: Any, microbatch: Any) -> Any:
        x = parameters["table"][microbatch["inputs"]]
        for w in parameters["layers"]:
            x = jnp.tanh(x @ w["w"])
        return masked_mean(x @ parameters["head"], microbatch)

    return of_function(loss, parameters, "layers")


@kind
def halved_sums_of_all_before() -> Made:
    """Each block reads all earlier outputs, halved: what comes from far reads what is near."""

    def loss(parameters: Any, microbatch: Any) -> Any:
        table, outputs = parameters["table"], []
        x = table[microbatch["inputs"]]
        for w in parameters["layers"]:
            x = 0.5 * _mlp(w, x + 0.2 * sum(outputs))
            outputs.append(x)
        return masked_mean(x @ table.T, microbatch)

    return of_function(loss, _listed(), "layers")


# What trains

FROZEN = "frozen"


def _labels(parameters: Any) -> Any:
    """The table stays, vectors decay by none."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            FROZEN
            if "embed" in jax.tree_util.keystr(path)
            else "matrix"
            if jnp.ndim(leaf) > 1
            else "vector"
        ),
        parameters,
    )


def _by_depth(parameters: Any) -> Any:
    """A smaller rate for earlier layers, by the number in the path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: next(
            (f"depth_{n}" for n in range(L) if f"block_{n}" in jax.tree_util.keystr(path)), "rest"
        ),
        parameters,
    )


RULES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "frozen by multi_transform": lambda: optax.multi_transform(
        {FROZEN: optax.set_to_zero(), "matrix": optax.adamw(1e-2), "vector": optax.sgd(1e-2)},
        _labels,
    ),
    "rates by depth": lambda: optax.multi_transform(
        {"rest": optax.sgd(1e-2), **{f"depth_{n}": optax.sgd(1e-2 * 0.8**n) for n in range(L)}},
        _by_depth,
    ),
    "masked": lambda: optax.chain(
        optax.masked(
            optax.add_decayed_weights(0.1), lambda tree: jax.tree.map(lambda a: a.ndim > 1, tree)
        ),
        optax.sgd(1e-2),
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 5), weight_decay=0.1
    ),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2, warmup_steps=2),
    "clip_by_global_norm": lambda: optax.chain(
        optax.clip_by_global_norm(0.1), optax.trace(0.9), optax.scale(-0.1)
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adafactor(1e-2), 2),
}

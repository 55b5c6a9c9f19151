"""What a schedule needs to know of a model: how to embed, run its blocks in a row, and score.

Every schedule runs a model as `head_loss(block(...block(embed(batch))))`. Blocks are alike, or of
some kinds in any pattern; those of a kind are stacked along a leading axis and cut into chunks with
the others. `edge` holds what the first and last step need (embedding, final norm, head). The
functions are pure and see one microbatch at a time.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxsys.context.split import ContextSplit
from jaxsys.errors import UsageError

PyTree = Any
"""A pytree of arrays; the model's own structure."""

ALIKE = "block"
"""The kind of all blocks of a model that names none."""

TOTALS = "jaxsys.totals"
"""The microbatch's leaf that holds what `LayeredModel.totals` sums to over the whole batch."""


class Layer(NamedTuple):
    """Which block of the model runs."""

    index: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] tuple's own is hidden
    """int32 scalar, 0 for the first block. An array, known only when the step runs: compute with
    it, or give blocks kinds where they are made differently."""


BlockFunction = Callable[[PyTree, PyTree, PyTree, Layer], PyTree]
"""(one layer's parameters, x, microbatch, layer) -> x of the same structure, shapes and dtypes. One
that needs no layer may be written without it."""


@dataclass(frozen=True, slots=True)
class WithoutLayer:
    """A block of three arguments as one of four."""

    block: Callable[[PyTree, PyTree, PyTree], PyTree]

    def __call__(self, parameters: PyTree, x: PyTree, microbatch: PyTree, layer: Layer) -> PyTree:
        del layer
        return self.block(parameters, x, microbatch)


@dataclass(frozen=True, slots=True)
class WithAgain:
    """A block, and the form of it that runs where its backward pass computes it again.

    Both have the same values and gradients; the other makes what is made again in pieces.
    """

    block: BlockFunction
    again: BlockFunction
    differ: Callable[[PyTree], bool]
    """Whether they differ for an x of such shapes."""

    def __call__(self, parameters: PyTree, x: PyTree, microbatch: PyTree, layer: Layer) -> PyTree:
        return self.block(parameters, x, microbatch, layer)


def form_of(block: BlockFunction, *, again: bool) -> BlockFunction:
    """The form of a block for steps that compute it again, or for others."""
    if not isinstance(block, WithAgain):
        return block
    return block.again if again else block.block


def each_form(
    wrap: Callable[[BlockFunction], BlockFunction], block: BlockFunction
) -> BlockFunction:
    """`wrap(block)`, in both forms where it has two."""
    if not isinstance(block, WithAgain):
        return wrap(block)
    return WithAgain(wrap(block.block), wrap(block.again), block.differ)


class Parameters(TypedDict):
    """A layered model's parameters.

    Leaves of integers and booleans are constants: they have no gradient.
    """

    edge: PyTree
    """As the model likes."""
    blocks: PyTree
    """Stacked [L, ...]; of a model with kinds, kind -> stacked [layers of this kind, ...]."""


def _of_four(kind: str, block: Any) -> BlockFunction:
    """A block that takes its layer too, which one of three arguments is not told.

    Raises:
        UsageError: if it takes neither three arguments nor four.
    """
    try:
        signature = inspect.signature(block)
    except ValueError:  # some callables do not tell what they take
        return block
    for count in (4, 3):
        try:
            given = signature.bind(*range(count))
        except TypeError:
            continue
        if count == 3:
            return WithoutLayer(block)
        # An option of the block's own, which has a default, is no place for the layer.
        fourth = signature.parameters[list(given.arguments)[-1]]
        if fourth.default is fourth.empty or fourth.name == "layer":
            return block
    raise UsageError(f"{kind} does not take (parameters of one layer, x, microbatch, layer)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayeredModel:
    """A model cut where schedules cut it.

    Legend: B sequences in a microbatch, T tokens, D model width, L layers. Nothing here assumes a
    language model: `x` may be any pytree of arrays, as long as every block maps its structure,
    shapes and dtypes to themselves. What is computed on the way (auxiliary losses, skips to the
    head) or read all the way (an encoder's output) travels in it as leaves of its own.
    """

    embed: Callable[[PyTree, PyTree], PyTree]
    """(edge, microbatch) -> x, e.g. token ids [B, T] -> [B, T, D]."""

    block: BlockFunction | Mapping[str, BlockFunction]
    """One function where blocks are alike, else kind -> function."""

    head_loss: Callable[[PyTree, PyTree, PyTree], tuple[Any, ...]]
    """(edge, x, microbatch) -> (summed loss, weight), both float32 scalars, or these and metrics, a
    dict of scalars.

    A step's loss is sum(losses) / sum(weights) over all its microbatches, so that masked tokens
    count rightly however the batch is cut.
    """

    layers: int = 0
    """L. May be left out where there is a pattern."""

    pattern: tuple[str, ...] | None = None
    """The kinds of the L blocks in their order, where blocks are of kinds."""

    draws: str | None = None
    """The leaf of a microbatch from whose key the model draws random numbers, None if it draws
    none. A trainer puts keys there if the batch has none."""

    totals: Callable[[PyTree], PyTree] | tuple[Callable[[PyTree], PyTree], ...] | None = None
    """Microbatch -> arrays whose sums over all microbatches of a step must be known before the
    first one runs, such as what losses are divided by; `with_totals` puts these sums into the
    microbatch's leaf `TOTALS`. Several: each sees what those before it sum to, a list in `TOTALS`
    (a variance needs the mean first). None: there are none."""

    sequences: Mapping[str, int] | None = None
    """Leaves of a microbatch that have a sequence -> the axis it lies along; of [B, T, ...] 1."""

    across: "Callable[[ContextSplit], LayeredModel] | None" = None
    """How sequences lie over devices -> this model as one of these devices runs it: its functions
    see its pieces of each sequence, attend over all of it, and return its part of the loss; what it
    draws for whole sequences it takes its pieces of (`ContextSplit.pieces`). Raises UsageError
    where it cannot be cut so. None: sequences are whole."""

    evaluation: "LayeredModel | None" = None
    """The model as it is evaluated (without dropout), on the same parameters; None: as it is."""

    gpu_options: Mapping[str, Any] = field(default_factory=dict)
    """XLA options that a step of it wants where it is compiled for GPUs."""

    travels_in_float8: Callable[..., bool] | None = None
    """Names on the way to a leaf of a layer's parameters -> whether it goes from device to device
    in e4m3 times a power of two of its own: its block reads nothing else of it. None: no leaf."""

    def __post_init__(self) -> None:
        """Raises UsageError if blocks, layers and pattern do not fit together."""
        blocks = {kind: _of_four(kind, block) for kind, block in self.kinds.items()}
        if any(blocks[kind] is not block for kind, block in self.kinds.items()):
            object.__setattr__(self, "block", self.blocks(blocks))
        if callable(self.block):
            if self.pattern is not None:
                raise UsageError(
                    "a pattern names kinds of blocks, but `block` is one function; give kind -> "
                    "function, or no pattern"
                )
            if self.layers < 1:
                raise UsageError(f"layers={self.layers} must be at least 1")
            return
        if not self.pattern:
            raise UsageError("blocks of kinds need a pattern: the kind of every layer in order")
        unknown = sorted({*self.pattern} ^ {*self.block})
        if unknown:
            raise UsageError(
                f"kinds {', '.join(map(repr, unknown))} are in one of `block` and `pattern` alone"
            )
        if self.layers not in (0, len(self.pattern)):
            raise UsageError(f"layers={self.layers} but the pattern has {len(self.pattern)}")
        object.__setattr__(self, "pattern", tuple(self.pattern))
        object.__setattr__(self, "layers", len(self.pattern))

    @property
    def kinds(self) -> dict[str, BlockFunction]:
        """Kind -> block; one kind, `ALIKE`, where blocks are alike."""
        return {ALIKE: self.block} if callable(self.block) else dict(self.block)

    @property
    def kind_of(self) -> tuple[str, ...]:
        """The kind of every layer."""
        return self.pattern or (ALIKE,) * self.layers

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        """Layer -> its kind and its row in that kind's stack."""
        counts = dict.fromkeys(self.kinds, 0)
        found = []
        for kind in self.kind_of:
            found.append((kind, counts[kind]))
            counts[kind] += 1
        return tuple(found)

    def stacks(self, blocks: PyTree) -> dict[str, PyTree]:
        """`blocks` by kind."""
        return {ALIKE: blocks} if callable(self.block) else dict(blocks)

    def blocks(self, stacks: Mapping[str, PyTree]) -> PyTree:
        """`stacks` undone."""
        return stacks[ALIKE] if callable(self.block) else dict(stacks)

    def run_layer(self, blocks: PyTree, x: PyTree, microbatch: PyTree, index: int) -> PyTree:
        """Block number `index` with its own parameters out of all of them."""
        kind, row = self.places[index]
        own = jax.tree.map(lambda p: p[row], self.stacks(blocks)[kind])
        return self.kinds[kind](own, x, microbatch, Layer(index=jnp.int32(index)))

    def over(self, split: ContextSplit | None) -> "LayeredModel":
        """The model as one of the devices runs it that share each sequence; itself if none do.

        Raises:
            UsageError: if its sequences cannot be cut, or not so.
        """
        if split is None:
            return self
        if self.across is None or not self.sequences:
            raise UsageError(
                f"context={split.parts} cuts sequences, and this model does not say how it runs on "
                "a part of one; give LayeredModel sequences= and across=, or use context=1"
            )
        return self.across(split)

    in_parts: "Callable[[Mapping[str, int]], Parts] | None" = None
    """(mesh axis -> devices) -> the model as one of so many devices along each axis of
    `jaxsys.axes.INNER` computes it; raises UsageError where it cannot be split so. None: it is
    computed whole."""

    in_parts_by: "Mapping[str, Callable[[Mapping[str, int]], Parts]]" = field(default_factory=dict)
    """Of `jaxsys.axes.JOININGS` -> `in_parts` of devices that join features so. What is not there,
    `gather` left aside, no step does."""

    def joined_by(self, by: str) -> "LayeredModel":
        """The model whose parts join features so.

        Raises:
            UsageError: if none do.
        """
        if by == "gather":
            return self
        if by not in self.in_parts_by:
            raise UsageError(
                f"features_by={by!r}: this model does not say how its parts join features so; "
                "decoders of jaxsys.model.layered do, for others use features_by='gather'"
            )
        return replace(self, in_parts=self.in_parts_by[by])

    view: Callable[[Any], PyTree] | None = None
    """Parameters, blocks stacked in layer order -> the tree that optimizers see: the user's own.

    May place leaves and take layers out of stacks (`leaf[i]`), no more. None: `Parameters` with all
    layers of a stacked leaf side by side in its place.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A model whose blocks several devices compute together.

    The functions of `model` run on one of them, inside a `jax.shard_map` whose mesh has the axes:
    they see their parts of the weights, pass on their part of x, and bring parts together by
    collectives of their own. What they return of loss, weight and metrics is one device's part as
    well: the sum over the devices is meant, and derivatives are taken of it. So a leaf of which
    each device has the whole has its gradient's sum over the devices.
    """

    model: LayeredModel
    cuts: Parameters
    """`jax.sharding.PartitionSpec`s of the parameters over those axes; of blocks one layer's."""
    whole: LayeredModel
    """What it is a part of."""


def parts_of(model: LayeredModel, sizes: Mapping[str, int]) -> Parts | None:
    """The model as one device of so many along each axis computes it; None where it is alone.

    Raises:
        UsageError: if the model does not say how it is split, or cannot be split so.
    """
    if not sizes:
        return None
    asked = ", ".join(f"{name}={count}" for name, count in sizes.items())
    if model.in_parts is None:
        raise UsageError(
            f"{asked}: this model does not say how its blocks are split; decoders of "
            "jaxsys.model.layered do, for others leave it out"
        )
    parts = model.in_parts(sizes)
    for name in ("embed", "block", "head_loss"):
        mine, theirs = getattr(model, name), getattr(parts.whole, name)
        if mine is not theirs and mine != theirs:
            raise UsageError(
                f"{asked}: the model's `{name}` is not the one whose parts `in_parts` makes; "
                "replace both, or leave it out"
            )
    return parts


def part_shapes(parameters: Parameters, parts: Parts, sizes: Mapping[str, int]) -> Parameters:
    """What one device has of parameters in layer order, shapes."""

    def mine(leaf: Any, cut: PartitionSpec, lead: int) -> jax.ShapeDtypeStruct:
        shape = list(leaf.shape)
        for axis, name in enumerate(cut, lead):
            shape[axis] //= 1 if name is None else sizes[name]
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    edge, blocks = (
        jax.tree.map(lambda p, c, n=lead: mine(p, c, n), parameters[part], parts.cuts[part])
        for part, lead in (("edge", 0), ("blocks", 1))
    )
    return Parameters(edge=edge, blocks=blocks)


def inside_parts(sizes: Mapping[str, int], trace: Callable[[], Any]) -> Any:
    """`trace()` where the mesh axes of parts are known, without devices: for shapes and costs."""
    if not sizes:
        return trace()
    found: list[Any] = []

    def run() -> jax.Array:
        found.append(trace())
        return jnp.zeros(())

    jax.make_jaxpr(run, axis_env=list(sizes.items()))()
    return found[0]


def reference_loss(model: LayeredModel, parameters: Parameters, batch: PyTree) -> jax.Array:
    """The loss every schedule must reproduce, on one device and without a schedule.

    Args:
        model: the layered model.
        parameters: its parameters, blocks stacked.
        batch: leaves [M, ...], M microbatches.

    Returns:
        The scalar float32 loss sum(losses) / sum(weights).
    """
    batch = with_totals(model, batch)
    total = weight = 0.0
    for row in range(jax.tree.leaves(batch)[0].shape[0]):
        microbatch = jax.tree.map(lambda leaf, i=row: leaf[i], batch)
        x = model.embed(parameters["edge"], microbatch)
        for index in range(model.layers):
            x = model.run_layer(parameters["blocks"], x, microbatch, index)
        loss, count, *_ = model.head_loss(parameters["edge"], x, microbatch)
        total, weight = total + loss, weight + count
    return jnp.asarray(total / weight)


def with_totals(model: LayeredModel, batch: PyTree) -> PyTree:
    """The batch with what its model must know of all of it, see `LayeredModel.totals`.

    Args:
        model: the layered model.
        batch: leaves [M, B, ...], all microbatches of a step.
    """
    if model.totals is None:
        return batch
    rows = jax.tree.leaves(batch)[0].shape[0]

    def sums(totals: Callable[[PyTree], PyTree]) -> PyTree:
        found = jax.vmap(totals)(batch)
        return jax.tree.map(
            lambda leaf: jnp.repeat(jnp.sum(leaf, 0, keepdims=True), rows, 0), found
        )

    if callable(model.totals):
        return {**batch, TOTALS: sums(model.totals)}
    made: list[PyTree] = []
    for totals in model.totals:
        made = [*made, sums(totals)]
        batch = {**batch, TOTALS: made}
    return batch


# Randomness. A model that draws gets a key with every microbatch, as a leaf of the batch, and folds
# in the layer's index. jax.random.split(key, n)[i] is fold_in(key, i): streams that fold in small
# numbers would meet each other and a model's own splits, so each has a number of its own before.

_STEPS, _MICROBATCHES, _LAYERS = 0x53544550, 0x4D494352, 0x4C415952
SEEDS = 0x53454544
"""Folded in before the upper 32 bits of a seed, in training and in serving."""


def seed_key(seed: int) -> jax.Array:
    """The key of a seed, of all its 64 bits: `jax.random.key` leaves out the upper 32."""
    upper = seed >> 32 & 0xFFFFFFFF
    key = jax.random.key(seed & 0xFFFFFFFF)
    return _folded(key, SEEDS, upper) if upper else key


def step_key(key: jax.Array, step: jax.Array | int) -> jax.Array:
    """The key of a step of a run.

    Args:
        key: the run's, typed (`jax.random.key`) or raw uint32 (`jax.random.PRNGKey`).
        step: batches taken before it.
    """
    return _folded(key, _STEPS, step)


def microbatch_keys(key: jax.Array, count: int) -> jax.Array:
    """The keys of a step's microbatches, a leaf of its batch.

    They depend on a microbatch's number in the whole step alone: not on schedule, devices or
    replicas.

    Args:
        key: the step's, typed or raw.
        count: microbatches of the step, over all replicas.

    Returns:
        Keys [count], or raw ones [count, ...].
    """
    # One after another: some generators' keys come out otherwise under vmap.
    return jax.lax.map(lambda row: _folded(key, _MICROBATCHES, row), jnp.arange(count))


def layer_key(key: jax.Array, index: jax.Array | int) -> jax.Array:
    """The key of a block, from its microbatch's key and `Layer.index`."""
    return _folded(key, _LAYERS, index)


def _folded(key: jax.Array, stream: int, number: jax.Array | int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, stream), number)

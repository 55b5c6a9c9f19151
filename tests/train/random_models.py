"""Small Flax models drawn at random from a seed, as people write them, with their loss and a loop.

`draw(seed)` says what a model is made of; `case(seed)` makes it: the model, its parameters, how it
is handed to jaxsys, and what a plain loop on one device would compute. A model holds several of:
ties, skips to the head and between blocks, shared modules, sown losses, dropout, remat, scans over
layers, unlike blocks, nested paths, blocks that return (x, aux), tables, integer leaves, an
encoder's output, positions, losses that are sums, means or masked means.

Legend: B samples in a microbatch, T tokens, D width, V vocabulary.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from jaxsys.layered import microbatch_keys, step_key
from jaxsys.train import from_linen, from_nnx
from jaxsys.train.adapt import KEY, Adapted, from_function

V, D, T = 11, 8, 4


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What one block is made of; blocks of unequal options are unlike."""

    norm: str = "layer"
    mixer: str = "none"
    mlp: str = "gelu"
    experts: bool = False
    dropout: bool = False
    returns: str = "x"
    sows: bool = False
    gate: bool = False
    table: bool = False
    unused: bool = False
    inner: str = "none"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a model is made of."""

    seed: int
    framework: str
    layers: int
    blocks: tuple[BlockOptions, ...]
    positions: str
    tied: bool
    final_norm: bool
    shared: str
    context: str
    between: str
    skips: str
    wrapper: str
    loss: str
    extra: str
    schedule: str
    microbatches: int
    microbatch_size: int
    recompute: str
    optimizer: str

    def __str__(self) -> str:
        """What differs from block to block is said once a block."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "blocks"}
        usual = BlockOptions()
        blocks = [
            {f.name: getattr(b, f.name) for f in fields(b)
             if getattr(b, f.name) != getattr(usual, f.name)}
            for b in self.blocks
        ]  # fmt: skip
        return f"{own} blocks={blocks}"


def draw(seed: int) -> Options:
    """The options of a seed."""
    rng = random.Random(seed)

    def of(*ways: Any, usual: float = 0.5) -> Any:
        """The first way with chance `usual`, else any of the others."""
        return ways[0] if rng.random() < usual or len(ways) == 1 else rng.choice(ways[1:])

    framework = rng.choice(["linen", "linen", "nnx", "nnx", "function"])
    layers = rng.choice([4, 4, 5])
    wrapper = of("none", "remat", "jit", "checkpoint", "scan", "nested", usual=0.3)

    def block() -> BlockOptions:
        return BlockOptions(
            norm=of("layer", "rms", "none"),
            mixer=of("none", "attention", "convolution", "recurrence", "tokens"),
            mlp=of("gelu", "relu", "gated", "custom", "clipped", usual=0.4),
            experts=of(False, True, usual=0.8),
            dropout=of(False, True, usual=0.7),
            returns=of("x", "aux", "cache", usual=0.7),
            sows=of(False, True, usual=0.8),
            gate=of(False, True, usual=0.8),
            table=of(False, True, usual=0.8),
            unused=of(False, True, usual=0.9),
            inner=of("none", "remat", "jit", usual=0.8) if wrapper != "checkpoint" else "none",
        )

    first = block()
    pattern = of("alike", "alternating", "first", "any", usual=0.6)
    if framework == "function" or wrapper == "scan":
        pattern = "alike"
    # A kind of block returns what its model expects of every block.
    others = [first, BlockOptions(**{**vars(block()), "returns": first.returns}), first]
    blocks = [
        {
            "alike": first,
            "alternating": others[n % 2],
            "first": others[min(n, 1)],
            "any": others[rng.randrange(2)],
        }[pattern]
        for n in range(layers)
    ]
    schedules = ["weipipe-interleave", "1f1b", "zero-3", "dp", "zb-h1", "gpipe", "weipipe-naive",
                 "weipipe-wzb1", "zero-1", "zero-2", "zero-4", "auto"]  # fmt: skip
    return Options(
        seed=seed,
        framework=framework,
        layers=layers,
        blocks=tuple(blocks),
        positions=of("learned", "table", "integers", "none", usual=0.3),
        tied=of(True, False),
        final_norm=of(True, False),
        shared=of("none", "bias", "module", "scale", usual=0.6),
        context=of("none", "encoder", "tokens", usual=0.7),
        between=of("none", "half", "first", "index", usual=0.6),
        skips=of("none", "deep", "mean", "pairs", "dense", usual=0.6),
        wrapper=wrapper,
        loss=of("sum", "mean", "masked", "weighted", "metrics", usual=0.3),
        extra=of("none", "norms", "logits", usual=0.8),
        schedule=rng.choice(schedules),
        microbatches=rng.choice([4, 8]),
        microbatch_size=rng.choice([1, 2]),
        recompute=of("block", "none"),
        optimizer=of("sgd", "adamw", "clipped", usual=0.4),
    )


@dataclass(kw_only=True)
class Case:
    """A model as its author has it."""

    options: Options
    parameters: Any
    output: Callable[[Any, Any], Any]
    """(parameters, batch) -> the model's output, and what it sowed."""
    score: Callable[[Any, Any, Any], Any]
    """(that, batch, parameters) -> what the author's loss returns."""
    adapt: Callable[[Any], Adapted]
    """Handed over with an example of a microbatch."""
    own: Callable[[Any], Any] = field(default=lambda tree: tree)
    """What `rebuild` gives as the tree of the author's parameters."""


def case(seed: int, **changes: Any) -> Case:
    """The model of a seed, or that model with other options."""
    options = replace(draw(seed), **changes)
    options = replace(options, blocks=options.blocks[: options.layers])
    return {"linen": _linen, "nnx": _nnx, "function": _function}[options.framework](options)


def batches(options: Options, count: int) -> list[dict[str, np.ndarray]]:
    """Batches [rows * B, ...] of tokens that one can learn, some of them not counted."""
    rng = np.random.default_rng(options.seed)
    rows = options.microbatches * options.microbatch_size
    found = []
    for _ in range(count):
        tokens = rng.integers(0, V, (rows, T + 1)).astype(np.int32)
        targets = tokens[:, 1:].copy()
        targets[rng.random(targets.shape) < 0.2] = -1
        targets[:, 0] = tokens[:, 1]
        weights = rng.random(rows).astype(np.float32)
        found.append({"inputs": tokens[:, :-1].copy(), "targets": targets, "weights": weights})
    return found


def optimizer(options: Options) -> optax.GradientTransformation:
    """A rule under which small differences stay small."""
    matrices = jax.tree_util.Partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return {
        "sgd": optax.sgd(0.1, momentum=0.9),
        "adamw": optax.adamw(1e-2, eps=1e-2, weight_decay=0.1, mask=matrices),
        "clipped": optax.chain(optax.clip_by_block_rms(0.05), optax.sgd(0.3)),
    }[options.optimizer]


def whole_loss(one: Case, parameters: Any, batch: Any, keys: Any) -> Any:
    """The author's mean over a batch [rows * B, ...], taken of the whole batch at once.

    Where the model draws random numbers each microbatch is run by itself, with its own key of
    `keys`, else None; what is sown are means, so those of microbatches are averaged.
    """
    if keys is None:
        made = one.output(parameters, batch)
    else:
        rows = one.options.microbatches
        cut = jax.tree.map(lambda leaf: leaf.reshape(rows, -1, *leaf.shape[1:]), batch)
        parts = [
            one.output(parameters, {**jax.tree.map(lambda leaf, i=i: leaf[i], cut), KEY: keys[i]})
            for i in range(rows)
        ]
        outputs = jax.tree.map(lambda *each: jnp.concatenate(each), *[part for part, _ in parts])
        sown = jax.tree.map(lambda *each: sum(each) / rows, *[part for _, part in parts])
        made = outputs, sown
    result = one.score(made, batch, parameters)
    total, *rest = result if isinstance(result, tuple) else (result,)
    return total / rest[0] if rest and not isinstance(rest[0], dict) else total


def keys_of(options: Options, seed: int, step: Any) -> Any:
    """A step's keys, as a run of this seed makes them."""
    return microbatch_keys(step_key(jax.random.key(seed), step), options.microbatches)


def plain_loop(one: Case, data: list[Any], seed: int, draws: bool) -> tuple[list[float], Any]:
    """Losses and parameters of the author's own loop on one device."""
    rule = optimizer(one.options)
    moving, still = parted(one.parameters)
    state = rule.init(moving)

    @jax.jit
    def step(moving: Any, state: Any, batch: Any, step: Any) -> Any:
        keys = keys_of(one.options, seed, step) if draws else None
        value, gradients = jax.value_and_grad(
            lambda moving: whole_loss(one, joined(moving, still), batch, keys)
        )(moving)
        updates, state = rule.update(gradients, state, moving)
        return optax.apply_updates(moving, updates), state, value

    losses = []
    for number, batch in enumerate(data):
        moving, state, value = step(moving, state, batch, jnp.int32(number))
        losses.append(float(value))
    return losses, joined(moving, still)


def parted(parameters: Any) -> tuple[Any, Any]:
    """What trains, and the rest (integers); each with None where the other is."""
    trains = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact), parameters)
    moving = jax.tree.map(lambda x, yes: jnp.asarray(x) if yes else None, parameters, trains)
    return moving, jax.tree.map(lambda x, yes: None if yes else x, parameters, trains)


def joined(moving: Any, still: Any) -> Any:
    """`parted` undone."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, moving, still, is_leaf=lambda leaf: leaf is None
    )


# What models of every framework are made of.


def _scored(options: Options, output: Any, batch: Any, sown: Any, parameters: Any) -> Any:
    """The loss as its author wrote it."""
    logits, extra = output
    targets = batch["targets"]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    if options.extra == "logits":
        each = each + 1e-2 * jnp.square(jax.nn.logsumexp(logits, axis=-1))
    penalty = jnp.float32(0)
    if options.extra == "norms":
        penalty = 1e-2 * sum(
            jnp.sum(jnp.square(leaf))
            for leaf in jax.tree.leaves(parameters)
            if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.ndim > 1
        )
    penalty = penalty + sum(jax.tree.leaves(sown))
    if options.loss == "sum":
        weight = jnp.float32(targets.size)
        return jnp.sum(each) + jnp.sum(extra) + weight * penalty, weight
    if options.loss == "mean":
        return jnp.mean(each) + jnp.mean(extra) + penalty
    if options.loss == "weighted":
        weights = batch["weights"]
        return jnp.sum(weights * (jnp.mean(each, 1) + extra)) / jnp.sum(weights) + penalty
    mask = targets >= 0
    loss = jnp.sum(jnp.where(mask, each + extra[:, None], 0.0)) / jnp.maximum(jnp.sum(mask), 1)
    if options.loss == "metrics":
        right = jnp.argmax(logits, -1) == targets
        return loss + penalty, {"accuracy": jnp.sum(right * mask) / jnp.sum(mask)}
    return loss + penalty


def _with_derivative(backward: Callable[[Any, Any], Any]) -> Callable[[jax.Array], jax.Array]:
    @jax.custom_vjp
    def act(x: jax.Array) -> jax.Array:
        return jnp.tanh(x)

    act.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (backward(x, g),))
    return act


_ACT = {
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "gated": jax.nn.silu,
    "custom": _with_derivative(lambda x, g: jnp.cos(x) * g),
    "clipped": _with_derivative(lambda x, g: jnp.cos(x) * jnp.clip(g, -0.01, 0.01)),
}


def _mixed(h: jax.Array, how: str, tokens: jax.Array) -> jax.Array:
    """What a block does between tokens, without parameters; h [B, T, D]."""
    if how == "attention":
        scores = jnp.einsum("btd,bsd->bts", h, h) / D**0.5
        mask = jnp.tril(jnp.ones((T, T), bool))[None]
        return jnp.einsum("bts,bsd->btd", jax.nn.softmax(jnp.where(mask, scores, -1e9)), h)
    if how == "convolution":
        return h + 0.5 * jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    if how == "recurrence":
        last, rows = jax.lax.scan(
            lambda c, row: ((c := 0.5 * c + row), c), h[:, 0], jnp.swapaxes(h, 0, 1)
        )
        return jnp.swapaxes(rows, 0, 1) + 0.1 * last[:, None]
    if how == "tokens":
        return jnp.where((tokens % 2 == 0)[..., None], h, 0.5 * h)
    return h


def _around(
    options: Options, x: jax.Array, run: Callable[[int, jax.Array, Any], tuple[Any, Any]]
) -> tuple[Any, Any, list[Any]]:
    """Runs blocks in a row with what is between them; run(index, x, context) -> (x, aux).

    Returns the last x, the sum of auxiliary values [B] and all outputs.
    """
    extra = jnp.zeros(x.shape[0])
    first, outputs = x, []
    for index in range(options.layers):
        given = x
        if options.skips == "pairs" and index >= (options.layers + 1) // 2:
            given = x + 0.3 * outputs[options.layers - 1 - index]
        if options.skips == "dense":
            given = x + 0.2 * sum(outputs)
        y, aux = run(index, given, None)
        if options.between == "half":
            y = 0.5 * y
        elif options.between == "first":
            y = y + 0.2 * first
        elif options.between == "index":
            y = y * (1.0 - 0.1 * index)
        if aux is not None:
            extra = extra + aux
        outputs.append(y)
        x = y
    return x, extra, outputs


def _ended(options: Options, x: Any, outputs: list[Any], attend: Callable[[Any], Any]) -> Any:
    """Logits, of the last block's output or of more."""
    if options.skips == "deep":
        return sum(attend(y) for y in outputs) / len(outputs)
    if options.skips == "mean":
        return attend(x + 0.5 * jnp.mean(jnp.stack(outputs), 0))
    return attend(x)


TABLE = np.linspace(0.5, 1.5, T, dtype=np.float32)
ORDER = np.arange(V)[::-1].copy()


# Linen


class LinenBlock(linen.Module):
    """One block."""

    options: BlockOptions
    between: str = "none"
    """For scans, where nothing can be done between blocks."""

    @linen.compact
    def __call__(self, x: Any, tokens: Any, bias: Any, context: Any) -> Any:
        o = self.options
        h = {"layer": linen.LayerNorm, "rms": linen.RMSNorm}[o.norm]()(x) if o.norm != "none" else x
        h = _mixed(h, o.mixer, tokens)
        if bias is not None:
            added: Any = bias(h) if callable(bias) else bias
            h = h + added
        if context is not None:
            h = h + 0.3 * jnp.mean(context, 1, keepdims=True)
        if o.table:
            h = h * TABLE[None, :, None]
        if o.unused:
            self.param("unused", linen.initializers.normal(), (3,))
        mlp = {"none": lambda m: m, "remat": linen.remat, "jit": linen.jit}[o.inner](_LinenMlp)
        h = mlp(o.mlp)(h)
        if o.experts:
            gates = jax.nn.softmax(linen.Dense(3)(x))
            h = h * gates[..., :1] + jnp.tanh(linen.Dense(D)(x)) * gates[..., 1:2]
            if o.sows:
                self.sow("losses", "balance", 0.1 * jnp.mean(jnp.square(gates)))
        elif o.sows:
            self.sow("losses", "size", 0.01 * jnp.mean(jnp.square(h)))
        if o.dropout:
            h = linen.Dropout(0.25, deterministic=False)(h)
        if o.gate:
            h = h * self.param("gate", lambda _: jnp.float32(0.7))
        return _returned(o, x + h, h)


class _LinenMlp(linen.Module):
    act: str

    @linen.compact
    def __call__(self, h: Any) -> Any:
        up = _ACT[self.act](linen.Dense(2 * D)(h))
        if self.act == "gated":
            up = up * linen.Dense(2 * D, use_bias=False)(h)
        return linen.Dense(D)(up)


def _returned(o: BlockOptions, x: Any, h: Any) -> Any:
    if o.returns == "aux":
        return x, 0.1 * jnp.mean(jnp.square(h), (1, 2))
    if o.returns == "cache":
        return x, {"keys": h, "length": jnp.int32(T)}
    return x


def _apart(result: Any) -> tuple[Any, Any]:
    """(x, auxiliary value or None) of what a block returns."""
    if not isinstance(result, tuple):
        return result, None
    x, other = result
    return x, None if isinstance(other, dict) else other


class _LinenBody(linen.Module):
    options: Options

    @linen.compact
    def __call__(self, x: Any, tokens: Any, context: Any) -> Any:
        o = self.options
        bias = None
        if o.shared == "bias":
            bias = self.param("bias", linen.initializers.normal(0.5), (T, D))[None]
        elif o.shared == "module":
            bias = linen.Dense(D, name="shared")
        elif o.shared == "scale":
            bias = jnp.tanh(self.param("bias", linen.initializers.normal(0.5), (1, 1, D)))
        if o.wrapper == "scan":

            def body(block: Any, x: Any, _: Any) -> Any:
                x, aux = _apart(block(x, tokens, None, context))
                return x, (x, jnp.zeros(x.shape[0]) if aux is None else aux)

            scan = linen.scan(
                body,
                variable_axes={"params": 0, "losses": 0},
                split_rngs={"params": True, "dropout": True},
                length=o.layers,
            )
            x, (outputs, aux) = scan(LinenBlock(o.blocks[0], name="block"), x, None)
            return x, jnp.sum(aux, 0), list(outputs)
        wrap: Any = {"remat": linen.remat, "jit": linen.jit}.get(o.wrapper, lambda module: module)
        # A module as an argument does not pass linen.jit and remat, as authors find out.
        if callable(bias) and o.wrapper in ("remat", "jit"):
            bias = None
        made = [
            wrap(LinenBlock)(kind, name=f"block_{index}") for index, kind in enumerate(o.blocks)
        ]
        return _around(o, x, lambda n, x, _: _apart(made[n](x, tokens, bias, context)))


class LinenModel(linen.Module):
    """Embedding, blocks, head."""

    options: Options

    @linen.compact
    def __call__(self, tokens: Any) -> Any:
        o = self.options
        table = linen.Embed(V, D, embedding_init=linen.initializers.normal(0.5))
        x = table(tokens)
        if o.positions == "learned":
            x = x + self.param("position", linen.initializers.normal(0.3), (T, D))[None]
        elif o.positions == "table":
            x = x * TABLE[None, :, None]
        elif o.positions == "integers":
            order = self.param("order", lambda _: jnp.asarray(ORDER, jnp.int32))
            x = x + 0.5 * table(order[tokens])
        context = None
        if o.context == "encoder":
            context = jnp.tanh(linen.Dense(D, name="encoder")(x))
        elif o.context == "tokens":
            context = jax.nn.one_hot(tokens % D, D)
        if o.wrapper == "nested":
            x, extra, outputs = _LinenBody(o, name="body")(x, tokens, context)
        else:
            x, extra, outputs = _LinenBody.__call__.__wrapped__(self, x, tokens, context)  # type: ignore[attr-defined]
        norm = linen.LayerNorm(name="final") if o.final_norm else lambda x: x
        head = table.attend if o.tied else linen.Dense(V, name="head")
        return _ended(o, x, outputs, lambda y: head(norm(y))), extra


def _linen(options: Options) -> Case:
    module = LinenModel(options)
    keys = {"params": jax.random.key(options.seed), "dropout": jax.random.key(1)}
    example = jnp.zeros((2, T), jnp.int32)
    variables = module.init(keys, example)
    params = variables["params"]

    def scored(output: Any, batch: Any, params: Any = None) -> Any:
        output, written = output
        return _scored(options, output, batch, written, params)

    def output(params: Any, batch: Any) -> Any:
        rngs = {"dropout": batch[KEY]} if KEY in batch else None
        return module.apply({"params": params}, batch["inputs"], rngs=rngs, mutable=["losses"])

    def own(params: Any, batch: Any) -> Any:
        return scored(output(params, batch), batch, params)

    blocks = "block" if options.wrapper == "scan" else "block_"
    if options.extra == "norms":
        # A loss that reads parameters is no function of the output: the whole function it is.
        return Case(
            options=options,
            parameters=params,
            output=output,
            score=scored,
            adapt=lambda example: from_function(own, params, example, blocks=blocks),
        )
    return Case(
        options=options,
        parameters=params,
        output=output,
        score=scored,
        adapt=lambda example: from_linen(
            module, {"params": params}, example, blocks=blocks, loss=scored, mutable=["losses"]
        ),
        own=lambda variables: variables["params"],
    )


# NNX


class NnxBlock(nnx.Module):
    """One block."""

    def __init__(self, options: BlockOptions, shared: Any, rngs: nnx.Rngs) -> None:
        o = self.options = options
        if o.norm != "none":
            self.norm = {"layer": nnx.LayerNorm, "rms": nnx.RMSNorm}[o.norm](D, rngs=rngs)
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        if o.mlp == "gated":
            self.gated = nnx.Linear(D, 2 * D, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, rngs=rngs)
        if o.experts:
            self.router, self.expert = nnx.Linear(D, 3, rngs=rngs), nnx.Linear(D, D, rngs=rngs)
        if o.dropout:
            self.dropout = nnx.Dropout(0.25, rngs=rngs)
        if o.gate:
            self.gate = nnx.Param(jnp.float32(0.7))
        if o.table:
            self.table = nnx.Variable(jnp.asarray(TABLE)) if o.sows else TABLE
        if o.unused:
            self.unused = nnx.Param(jnp.ones(3))
        self.shared = shared

    def __call__(self, x: Any, tokens: Any, context: Any) -> Any:
        o = self.options
        h = self.norm(x) if o.norm != "none" else x
        h = _mixed(h, o.mixer, tokens)
        if isinstance(self.shared, nnx.Param):
            h = h + jnp.tanh(self.shared[...])[None]
        elif self.shared is not None:
            h = h + self.shared(h)
        if context is not None:
            h = h + 0.3 * jnp.mean(context, 1, keepdims=True)
        if o.table:
            h = h * jnp.asarray(self.table)[None, :, None]
        inner = {
            "none": lambda f: f,
            "remat": lambda f: nnx.remat(f),
            "jit": lambda f: nnx.jit(f),
        }[o.inner]
        h = inner(NnxBlock.mlp)(self, h)
        if o.experts:
            gates = jax.nn.softmax(self.router(x))
            h = h * gates[..., :1] + jnp.tanh(self.expert(x)) * gates[..., 1:2]
        if o.dropout:
            h = self.dropout(h)
        if o.gate:
            h = h * self.gate[...]
        return _returned(o, x + h, h)

    def mlp(self, h: Any) -> Any:
        """The feed-forward part."""
        up = _ACT[self.options.mlp](self.up(h))
        if self.options.mlp == "gated":
            up = up * self.gated(h)
        return self.down(up)


class _NnxBody(nnx.Module):
    def __init__(self, blocks: Any) -> None:
        self.blocks = blocks


class NnxModel(nnx.Module):
    """Embedding, blocks, head."""

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        o = self.options = options
        self.embed = nnx.Embed(V, D, embedding_init=nnx.initializers.normal(0.5), rngs=rngs)
        if o.positions == "learned":
            self.position = nnx.Param(0.3 * jax.random.normal(rngs.params(), (T, D)))
        elif o.positions == "integers":
            self.order = nnx.Param(jnp.asarray(ORDER, jnp.int32))
        shared: Any = None
        if o.shared in ("bias", "scale"):
            shared = nnx.Param(0.5 * jax.random.normal(rngs.params(), (T, D)))
        elif o.shared == "module":
            shared = nnx.Linear(D, D, rngs=rngs)
        if o.wrapper == "scan":
            kind = o.blocks[0]

            @nnx.split_rngs(splits=o.layers)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def stacked(rngs: nnx.Rngs) -> NnxBlock:
                return NnxBlock(kind, None, rngs)

            blocks: Any = stacked(rngs)
        else:
            blocks = nnx.List([NnxBlock(kind, shared, rngs) for kind in o.blocks])
        if o.wrapper == "nested":
            self.body = _NnxBody(blocks)
        else:
            self.blocks = blocks
        if o.context == "encoder":
            self.encoder = nnx.Linear(D, D, rngs=rngs)
        if o.final_norm:
            self.final = nnx.LayerNorm(D, rngs=rngs)
        if not o.tied:
            self.head = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        o = self.options
        x = self.embed(tokens)
        if o.positions == "learned":
            x = x + self.position[...][None]
        elif o.positions == "table":
            x = x * TABLE[None, :, None]
        elif o.positions == "integers":
            x = x + 0.5 * self.embed(self.order[...][tokens])
        context = None
        if o.context == "encoder":
            context = jnp.tanh(self.encoder(x))
        elif o.context == "tokens":
            context = jax.nn.one_hot(tokens % D, D)
        blocks = self.body.blocks if o.wrapper == "nested" else self.blocks
        if o.wrapper == "scan":

            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
            def body(x: Any, block: Any) -> Any:
                x, aux = _apart(block(x, tokens, context))
                return x, (x, jnp.zeros(x.shape[0]) if aux is None else aux)

            x, (stack, aux) = body(x, blocks)
            extra, outputs = jnp.sum(aux, 0), list(stack)
        else:

            def run(index: int, x: Any, _: Any) -> Any:
                block = blocks[index]
                if o.wrapper == "remat":
                    result = nnx.remat(NnxBlock.__call__)(block, x, tokens, context)
                elif o.wrapper == "jit":
                    result = nnx.jit(NnxBlock.__call__)(block, x, tokens, context)
                elif o.wrapper == "checkpoint" and not o.blocks[index].dropout:
                    result = jax.checkpoint(lambda x: block(x, tokens, context))(x)
                else:
                    result = block(x, tokens, context)
                return _apart(result)

            x, extra, outputs = _around(o, x, run)
        norm = self.final if o.final_norm else lambda x: x
        head = self.embed.attend if o.tied else self.head
        return _ended(o, x, outputs, lambda y: head(norm(y))), extra


def _nnx(options: Options) -> Case:
    module = NnxModel(options, nnx.Rngs(options.seed))
    graph, params, keys, rest = nnx.split(module, nnx.Param, nnx.RngKey, ...)
    pure = nnx.to_pure_dict(params)

    def folded(key: Any, words: Any) -> Any:
        if key.ndim:
            return jax.vmap(lambda one: folded(one, words))(key)
        for word in words:
            key = jax.random.fold_in(key, word)
        return key

    def output(pure: Any, batch: Any) -> Any:
        drawn = keys
        if KEY in batch:
            words = list(jax.random.key_data(batch[KEY]))
            drawn = jax.tree.map(lambda key: folded(key, words), keys)
        mine = nnx.merge(graph, params, drawn, rest, copy=True)
        nnx.update(mine, pure)
        return mine(batch["inputs"]), ()

    def score(made: Any, batch: Any, pure: Any) -> Any:
        return _scored(options, made[0], batch, (), pure)

    def own(pure: Any, batch: Any) -> Any:
        return score(output(pure, batch), batch, pure)

    path = "body.blocks" if options.wrapper == "nested" else "blocks"
    if options.extra == "norms":
        return Case(
            options=options,
            parameters=pure,
            output=output,
            score=score,
            adapt=lambda example: from_function(own, pure, example, blocks=path),
        )
    return Case(
        options=options,
        parameters=pure,
        output=output,
        score=score,
        adapt=lambda example: from_nnx(
            module,
            example,
            blocks=path,
            loss=lambda output, batch: _scored(options, output, batch, (), None),
        ),
        own=lambda module: nnx.to_pure_dict(nnx.state(module, nnx.Param)),
    )


# Plain functions of stacked parameters


def _function(options: Options) -> Case:
    o, kind = options, options.blocks[0]
    rng = np.random.default_rng(o.seed)

    def normal(*shape: int) -> np.ndarray:
        return (0.4 * rng.standard_normal(shape)).astype(np.float32)

    parameters: dict[str, Any] = {
        "embed": {"table": normal(V, D)},
        "layers": {"up": normal(o.layers, D, 2 * D), "down": normal(o.layers, 2 * D, D)},
    }
    layers = parameters["layers"]
    if kind.norm != "none":
        layers["scale"] = 1 + normal(o.layers, D)
    if kind.gate:
        layers["gate"] = normal(o.layers)
    if kind.unused:
        layers["unused"] = normal(o.layers, 3)
    if kind.table:
        layers["number"] = np.arange(o.layers, dtype=np.int32)
    if o.positions == "learned":
        parameters["position"] = normal(T, D)
    elif o.positions == "integers":
        parameters["order"] = ORDER.astype(np.int32)
    if o.shared != "none":
        parameters["shared"] = normal(D, D)
    if o.context == "encoder":
        parameters["encoder"] = normal(D, D)
    if not o.tied:
        parameters["head"] = normal(D, V)

    def block(w: Any, x: Any, tokens: Any, shared: Any, context: Any, key: Any) -> Any:
        h = x
        if kind.norm != "none":
            h = h / jnp.sqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 1e-5)
            h = h * w["scale"][None, None]
        h = _mixed(h, kind.mixer, tokens)
        if shared is not None:
            h = h + jnp.tanh(h @ shared)
        if context is not None:
            h = h + 0.3 * jnp.mean(context, 1, keepdims=True)
        if kind.table:
            h = h * (1.0 + 0.1 * w["number"])
        act = _ACT["gelu" if kind.mlp == "gated" else kind.mlp]
        h = act(h @ w["up"]) @ w["down"]
        if kind.dropout:
            h = jnp.where(jax.random.bernoulli(key, 0.75, h.shape), h / 0.75, 0.0)
        if kind.gate:
            h = h * w["gate"]
        return _returned(kind, x + h, h)

    if o.wrapper in ("checkpoint", "remat") or kind.inner == "remat":
        block = jax.checkpoint(block)
    elif o.wrapper == "jit":
        block = jax.jit(block)

    def output(parameters: Any, batch: Any) -> Any:
        tokens, table = batch["inputs"], jnp.asarray(parameters["embed"]["table"])
        x = table[tokens]
        if o.positions == "learned":
            x = x + parameters["position"][None]
        elif o.positions == "table":
            x = x * TABLE[None, :, None]
        elif o.positions == "integers":
            x = x + 0.5 * table[jnp.asarray(parameters["order"])[tokens]]
        context = None
        if o.context == "encoder":
            context = jnp.tanh(x @ parameters["encoder"])
        elif o.context == "tokens":
            context = jax.nn.one_hot(tokens % D, D)
        shared = parameters.get("shared")
        keys: Any = [None] * o.layers
        if kind.dropout:
            keys = jax.random.split(batch[KEY], o.layers)
        if o.wrapper == "scan" or (o.skips == "none" and o.between == "none"):

            def body(x: Any, xs: Any) -> Any:
                w, key = xs
                x, aux = _apart(block(w, x, tokens, shared, context, key))
                return x, (x, jnp.zeros(x.shape[0]) if aux is None else aux)

            stack = (parameters["layers"], keys if kind.dropout else None)
            x, (rows, aux) = jax.lax.scan(body, x, stack)
            extra, outputs = jnp.sum(aux, 0), list(rows)
        else:

            def run(index: int, x: Any, _: Any) -> Any:
                own = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], parameters["layers"])
                return _apart(block(own, x, tokens, shared, context, keys[index]))

            x, extra, outputs = _around(o, x, run)
        head = table.T if o.tied else parameters["head"]
        logits = _ended(o, x, outputs, lambda y: y @ head)
        return (logits, extra), ()

    def score(made: Any, batch: Any, parameters: Any) -> Any:
        return _scored(options, made[0], batch, (), parameters)

    def loss(parameters: Any, batch: Any) -> Any:
        return score(output(parameters, batch), batch, parameters)

    return Case(
        options=options,
        parameters=parameters,
        output=output,
        score=score,
        adapt=lambda example: from_function(loss, parameters, example, blocks="layers"),
    )

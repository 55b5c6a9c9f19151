"""Users' own models, unchanged, give the loss and every gradient of their own call, or are refused.

Whether schedules then compute the same is asked in test_adapt_scripts.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxsys.errors import UsageError
from jaxsys.layered import ALIKE, Layer, microbatch_keys, reference_loss
from jaxsys.train import from_linen, from_nnx, next_token_loss
from jaxsys.train.adapt import KEY, from_function

V, D, T = 11, 8, 5


def batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, V, (2, 2, T + 1)).astype(np.int32)
    targets = tokens[..., 1:].copy()
    targets[0, 0, 2] = -1
    return {"inputs": tokens[..., :-1], "targets": targets}


class LinenBlock(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x, mask, *, scale=1.0):
        scores = jnp.einsum("btd,bsd->bts", linen.Dense(self.width)(x), x)
        scores = jnp.where(mask, scores, -1e9)
        return x + scale * linen.Dense(self.width)(jax.nn.softmax(scores) @ x)


class LinenModel(linen.Module):
    """A compact model with a causal mask made from the tokens, and a tied head."""

    layers: int = 3

    @linen.compact
    def __call__(self, tokens, scale=0.5):
        table = linen.Embed(V, D, name="table")
        x = table(tokens) + self.param("position", linen.initializers.normal(), (T, D))[None]
        mask = jnp.tril(jnp.ones((T, T), bool))[None] & (tokens >= 0)[:, None, :]
        for index in range(self.layers):
            x = LinenBlock(D, name=f"layer_{index}")(x, mask, scale=scale)
        return table.attend(linen.LayerNorm()(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(D, 2 * D, rngs=rngs), nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class NnxModel(nnx.Module):
    def __init__(self, rngs, layers=3):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(D, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(self.norm(x))


def first(batch):
    return jax.tree.map(lambda leaf: leaf[0], batch)


def assert_close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, wanted)


def compare(adapted, loss, parameters, data, user_tree=lambda tree: tree):
    """Asserts loss and every gradient equal `loss(parameters, microbatch)` -> (sum, weight)."""

    def plain(parameters):
        sums = [loss(parameters, jax.tree.map(lambda a, i=i: a[i], data)) for i in range(2)]
        return sum(s for s, _ in sums) / sum(w for _, w in sums)

    def mine(parameters):
        return reference_loss(adapted.model, parameters, data)

    wanted = jax.jit(jax.value_and_grad(plain))(parameters)
    found = jax.jit(jax.value_and_grad(mine))(adapted.parameters)
    assert found[0] == pytest.approx(float(wanted[0]), rel=1e-6)
    assert_close(jax.tree.leaves(user_tree(adapted.rebuild(found[1]))), jax.tree.leaves(wanted[1]))


def compare_linen(module, blocks, loss=next_token_loss, data=None, rngs=None, **options):
    data = batch() if data is None else data
    params = module.init(rngs or jax.random.key(0), data["inputs"][0])["params"]
    adapted = from_linen(
        module, {"params": params}, first(data), blocks=blocks, loss=loss, **options
    )

    def own(params, microbatch):
        drawn = {"rngs": {"dropout": microbatch[KEY]}} if KEY in microbatch else {}
        return loss(
            module.apply({"params": params}, microbatch["inputs"], **drawn, **options), microbatch
        )

    compare(adapted, own, params, data, lambda variables: variables["params"])
    return adapted


def compare_nnx(module, blocks="layers", loss=next_token_loss, **options):
    data = batch()
    adapted = from_nnx(module, first(data), blocks=blocks, loss=loss, **options)
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def own(params, microbatch):
        return loss(
            nnx.merge(graph, params, rest, copy=True)(microbatch["inputs"], **options), microbatch
        )

    compare(adapted, own, params, data, lambda module: nnx.state(module, nnx.Param))
    return adapted


def test_linen_loss_and_gradients():
    adapted = compare_linen(LinenModel(), "layer_")
    assert adapted.model.layers == 3
    module, data = LinenModel(), batch()
    params = module.init(jax.random.key(0), data["inputs"][0])["params"]
    assert_close(adapted.rebuild(adapted.parameters)["params"], params)


def test_nnx_loss_and_gradients():
    compare_nnx(NnxModel(nnx.Rngs(0)))


def test_what_precedes_the_blocks_is_not_run_for_the_head():
    data, module = batch(), LinenModel()
    variables = module.init(jax.random.key(0), data["inputs"][0])
    model = from_linen(module, variables, first(data), blocks="layer_").model
    parameters = from_linen(module, variables, first(data), blocks="layer_").parameters
    compiled = jax.jit(model.kinds[ALIKE]).lower(
        jax.tree.map(lambda leaf: leaf[0], parameters["blocks"]),
        jnp.zeros((2, T, D)),
        first(data),
        Layer(index=jnp.int32(0)),
    )
    # The embedding's gather is traced to find the mask, and must be gone after compilation.
    assert "gather" not in (compiled.compile().as_text() or "gather")


class Dropping(linen.Module):
    """A pre-norm block with dropout, as scans and loops call it."""

    @linen.compact
    def __call__(self, x, _=None):
        h = linen.gelu(linen.Dense(2 * D)(linen.LayerNorm()(x)))
        return x + linen.Dropout(0.25, deterministic=False)(linen.Dense(D)(h)), None


class Wrapped(linen.Module):
    kind: str

    @linen.compact
    def __call__(self, tokens):
        table = linen.Embed(V, D)
        x = table(tokens)
        if self.kind == "scan":
            scan = linen.scan(
                linen.remat(Dropping),
                variable_axes={"params": 1},
                split_rngs={"params": True, "dropout": True},
                length=3,
            )
            x, _ = scan(name="blocks")(x, None)
        else:
            wrap = {"remat": linen.remat, "jit": linen.jit}[self.kind]
            for index in range(3):
                x, _ = wrap(Dropping)(name=f"block_{index}")(x)
        return table.attend(linen.LayerNorm()(x))


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [
        ("scan", "blocks"),
        pytest.param("remat", "block_", marks=pytest.mark.slow),
        pytest.param("jit", "block_", marks=pytest.mark.slow),
    ],
)
def test_wrapped_blocks_with_dropout(kind, blocks):
    data = {**batch(), KEY: microbatch_keys(jax.random.key(7), 2)}
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    adapted = compare_linen(Wrapped(kind), blocks, data=data, rngs=keys)
    assert adapted.draws and adapted.model.pattern is None
    assert adapted.parameters["blocks"]["Dense_0"]["kernel"].shape == (3, D, 2 * D)


class Routed(linen.Module):
    """A block that sows a loss which is no sum over tokens."""

    @linen.compact
    def __call__(self, x):
        gates = linen.softmax(linen.Dense(3)(x))
        self.sow("losses", "balance", jnp.sum(jnp.mean(gates, (0, 1)) ** 2))
        return x + linen.Dense(D)(x) * gates[..., :1]


class Sowing(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        table = linen.Embed(V, D)
        x = table(tokens)
        for index in range(3):
            x = Routed(name=f"layer_{index}")(x)
        return table.attend(x)


def test_sown_losses_reach_the_loss():
    def loss(output, microbatch):
        logits, sown = output
        total, weight = next_token_loss(logits, microbatch)
        return total + weight * sum(jax.tree.leaves(sown)), weight

    adapted = compare_linen(Sowing(), "layer_", loss, mutable=["losses"])
    data = first(batch())
    x = jax.eval_shape(adapted.model.embed, adapted.parameters["edge"], data)
    # The sum over layers travels in one scalar, not in a slot a layer.
    assert sorted(leaf.shape for leaf in jax.tree.leaves(x)) == [(), (2, T, D)]


class Various(nnx.Module):
    """A block with what blocks of real models hold and return."""

    def __init__(self, rngs, kind="", shared=None):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.up, self.down = nnx.Linear(D, 2 * D, rngs=rngs), nnx.Linear(2 * D, D, rngs=rngs)
        self.kind, self.shared = kind, shared
        if kind == "experts":
            self.router = nnx.Linear(D, 2, rngs=rngs)
        self.table = np.linspace(0.5, 1.5, T, dtype=np.float32)
        self.scale = nnx.Variable(jnp.float32(0.5))

    def __call__(self, x, context=None) -> Any:
        h = self.norm(x) * self.table[None, :, None]
        if self.shared is not None:
            h = h + self.shared(jnp.arange(T))[None]
        h = self.down(nnx.gelu(self.up(h))) * self.scale[...]
        if self.kind == "experts":
            h = h * jax.nn.softmax(self.router(x))[..., :1]
        if context is not None:
            h = h + jnp.mean(context, 1, keepdims=True)
        return (x + h, jnp.mean(h)) if self.kind == "auxiliary" else x + h


class Whole(nnx.Module):
    def __init__(self, mode, kinds=("", "", "")):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(V, D, rngs=rngs)
        shared = nnx.Embed(T, D, rngs=rngs) if mode == "shared" else None
        self.layers = nnx.List([Various(rngs, kind, shared) for kind in kinds])
        self.encoder = nnx.Linear(D, D, rngs=rngs)
        self.mode = mode

    def __call__(self, tokens):
        x, extra = self.embed(tokens), jnp.float32(0)
        context = self.encoder(x) if self.mode == "context" else None
        for index, layer in enumerate(self.layers):
            if self.mode == "auxiliary":
                x, mean = layer(x)
                extra = extra + mean
            elif self.mode == "index":
                x = layer(x, jnp.full((1, 1, D), float(index)))
            elif self.mode == "remat":
                x = nnx.remat(lambda layer, x: layer(x))(layer, x) * 0.5
            elif self.mode == "checkpoint":
                x = jax.checkpoint(layer)(x * 0.5)
            elif self.mode == "deep":
                x = layer(x)
                extra = extra + self.embed.attend(x)
            else:
                x = layer(x, context)
        logits = self.embed.attend(x)
        return logits + extra.reshape((1, 1, -1) if self.mode != "deep" else logits.shape)


MODES = ["shared", "deep", "auxiliary", "context", "index", "remat", "checkpoint", "plain"]


@pytest.mark.parametrize(
    "mode", [m if m in MODES[:2] else pytest.param(m, marks=pytest.mark.slow) for m in MODES]
)
def test_what_blocks_are_given_hold_and_return(mode):
    kinds = ("auxiliary",) * 3 if mode == "auxiliary" else ("", "", "")
    adapted = compare_nnx(Whole(mode, kinds))
    assert adapted.model.pattern is None, "alike blocks are one kind"
    if mode == "shared":
        assert adapted.parameters["blocks"].keys() == {"norm", "up", "down"}


def test_unlike_blocks_are_kinds():
    adapted = compare_nnx(Whole("plain", ("", "experts", "", "experts", "experts")))
    kinds = adapted.model.pattern
    assert kinds is not None
    assert [kind == kinds[1] for kind in kinds] == [False, True, False, True, True]


@pytest.mark.slow
def test_any_function_of_parameters():
    """A plain loop over stacked parameters, with a key, an integer table and slashes in names."""
    rng = np.random.default_rng(0)
    parameters = {
        "net/embed": {"w": rng.standard_normal((V, D)).astype(np.float32)},
        "net/layer": {"w": rng.standard_normal((3, D, D)).astype(np.float32)},
        "net/order": np.arange(V)[::-1].copy(),
    }

    def loss(parameters, microbatch):
        x = parameters["net/embed"]["w"][jnp.asarray(parameters["net/order"])[microbatch["inputs"]]]
        x, means = jax.lax.scan(
            lambda x, w: (x + jax.nn.relu(x @ w), jnp.mean(x)), x, parameters["net/layer"]["w"]
        )
        total, weight = next_token_loss(x @ parameters["net/embed"]["w"].T, microbatch)
        return total + weight * jnp.sum(means), weight

    data = batch()
    adapted = from_function(loss, parameters, first(data), blocks="net/layer")
    whole = jax.value_and_grad(lambda p: reference_loss(adapted.model, p, data), allow_int=True)(
        adapted.parameters
    )
    weights = {name: parameters[name] for name in ("net/embed", "net/layer")}
    order = {"net/order": parameters["net/order"]}

    def plain(weights):
        sums = [loss({**weights, **order}, jax.tree.map(lambda a, i=i: a[i], data)) for i in (0, 1)]
        return sum(s for s, _ in sums) / sum(w for _, w in sums)

    wanted = jax.value_and_grad(plain)(weights)
    assert whole[0] == pytest.approx(float(wanted[0]), rel=1e-6)
    rebuilt = adapted.rebuild(whole[1])
    assert (rebuilt["net/order"] == parameters["net/order"]).all()
    assert_close({name: rebuilt[name] for name in weights}, wanted[1])


def test_nnx_dropout_draws_by_layer_and_microbatch():
    module = NnxModel(nnx.Rngs(0))
    for layer in cast(Any, module.layers):
        layer.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(3))  # the same seed for all
    own = NnxBlock.__call__

    def dropping(self: Any, x: Any) -> Any:
        return self.drop(own(self, x))

    try:
        NnxBlock.__call__ = dropping
        adapted = from_nnx(module, first(batch()), blocks="layers")
        assert adapted.draws
        data = {**batch(), KEY: microbatch_keys(jax.random.key(0), 2)}
        losses = [
            float(
                reference_loss(adapted.model, adapted.parameters, {**data, KEY: data[KEY][order]})
            )
            for order in (np.array([0, 1]), np.array([1, 0]))
        ]
        assert losses[0] != losses[1]
        with pytest.raises(UsageError, match="no leaf 'key'"):
            adapted.model.embed(adapted.parameters["edge"], first(batch()))
    finally:
        NnxBlock.__call__ = own


class Pairs(NnxModel):
    """Unlike blocks; the later ones read the outputs of the earlier ones, the nearest last."""

    def __init__(self, rngs, rates=(0.0,) * 5):
        super().__init__(rngs, layers=len(rates))
        self.drops = nnx.List([nnx.Dropout(rate, rngs=rngs) for rate in rates])

    def __call__(self, tokens):
        x, outputs = self.embed(tokens), []
        for index, layer in enumerate(self.layers):
            if index > 2:
                x = x + 0.3 * outputs[4 - index]
            x = layer(jnp.tanh(x) if index % 3 == 1 else x)
            x = self.drops[index](x)
            outputs.append(x)
        return self.embed.attend(self.norm(x))


def test_a_skip_is_there_where_it_is_read():
    compare_nnx(Pairs(nnx.Rngs(0)))


def test_blocks_that_differ_in_dropout_alone_are_evaluated():
    """In training two kinds, in evaluation alike: parameters stay where training has them."""
    module = Pairs(nnx.Rngs(0), rates=(0.0, 0.5, 0.0))
    adapted = from_nnx(module, first(batch()), blocks="layers")
    assert adapted.model.pattern is not None and adapted.model.evaluation is not None
    module.eval()
    data = jax.tree.map(lambda leaf: leaf[:1], batch())
    total, weight = next_token_loss(module(data["inputs"][0]), first(data))
    found = reference_loss(adapted.model.evaluation, adapted.parameters, data)
    assert float(found) == pytest.approx(float(total / weight), rel=1e-6)


def test_names_and_state_are_refused():
    data, module = batch(), LinenModel()
    variables = module.init(jax.random.key(0), data["inputs"][0])
    with pytest.raises(UsageError, match="no parameters named block_0.*the model has .*table"):
        from_linen(module, variables, first(data), blocks="block_")
    with pytest.raises(UsageError, match="writes to losses"):
        from_linen(
            module, {**variables, "losses": {}}, first(data), blocks="layer_", mutable=["losses"]
        )
    model = NnxModel(nnx.Rngs(0))
    with pytest.raises(UsageError, match="no parameters named stages0"):
        from_nnx(model, first(data), blocks="stages")
    model.norm = nnx.BatchNorm(D, rngs=nnx.Rngs(0))  # type: ignore[assignment]
    with pytest.raises(UsageError, match="writes to norm.mean.*model.eval"):
        from_nnx(model, first(data), blocks="layers")


def test_what_cannot_be_cut_is_refused():
    class Skipping(NnxModel):
        def __call__(self, tokens):
            return self.embed.attend(self.layers[0](self.embed(tokens)))

    with pytest.raises(UsageError, match="block 1 has no effect on the loss"):
        from_nnx(Skipping(nnx.Rngs(0)), first(batch()), blocks="layers")

    def averaged(parameters, microbatch):
        start = parameters["embed"] @ jnp.mean(parameters["layers"], 0)  # of all, before any runs
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), start, parameters["layers"])
        return jnp.sum(x[microbatch["inputs"]]), 1.0

    parameters = {"embed": jnp.ones((V, D)), "layers": {"w": jnp.ones((3, D, D))}}
    with pytest.raises(UsageError, match="stacked parameter w is used whole"):
        from_function(
            lambda p, m: averaged({**p, "layers": p["layers"]["w"]}, m),
            parameters,
            first(batch()),
            blocks="layers",
        )


def masked_mean(logits, microbatch):
    total, weight = next_token_loss(logits, microbatch)
    return total / jnp.maximum(weight, 1), {"entropy": -jnp.mean(jax.nn.log_softmax(logits))}


def plain_mean(logits, microbatch):
    chosen = optax.softmax_cross_entropy_with_integer_labels(logits, microbatch["inputs"])
    return chosen.mean() + 0.1 * jnp.square(logits).mean(axis=-1).sum(-1).mean()


def several_means(logits, microbatch):
    counts = microbatch["targets"] > 2
    auxiliary = jnp.sum(jnp.square(logits) * counts[..., None]) / jnp.sum(counts)
    return masked_mean(logits, microbatch)[0] + jnp.mean(logits) + auxiliary, {"seen": 1.0}


def bare_sum(logits, microbatch):
    return 0.001 * jnp.sum(logits)


def nested_sums(logits, microbatch):
    total, weight = next_token_loss(logits, microbatch)
    return total, (weight, {"seen": weight})


@pytest.mark.parametrize("loss", [masked_mean, plain_mean, several_means, bare_sum, nested_sums])
def test_forms_of_losses(loss):
    """A mean over samples, or over a mask, is that of the whole batch however it is cut."""
    data, module = batch(), NnxModel(nnx.Rngs(0), layers=1)
    adapted = from_nnx(module, first(data), blocks="layers", loss=loss)
    whole = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), data)
    logits = module(whole["inputs"])
    wanted = loss(logits, whole)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    if loss is nested_sums:
        wanted = wanted / next_token_loss(logits, whole)[1]
    found = reference_loss(adapted.model, adapted.parameters, data)
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda y, m: jnp.mean(jnp.square(jnp.mean(y, (0, 1)))), "not seen to be a mean"),
        (lambda y, m: jnp.mean(y) + jnp.sum(y) / jnp.sum(jnp.square(y)),
            "divided by what depends on parameters"),
        (lambda y, m: jnp.mean(y, 0), "all scalars"),
        (lambda y, m: jnp.mean(jnp.cumsum(y, 0)), "not seen to be a mean"),
    ],
)  # fmt: skip
def test_losses_that_are_no_mean_are_refused(loss, says):
    with pytest.raises(UsageError, match=says):
        from_nnx(NnxModel(nnx.Rngs(0), layers=1), first(batch()), blocks="layers", loss=loss)

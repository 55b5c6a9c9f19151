"""Users' own Linen and NNX models, unchanged, give the loss and gradients of their own call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxsys.errors import UsageError
from jaxsys.layered import Layer, reference_loss
from jaxsys.train import from_linen, from_nnx, next_token_loss

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


def mean_loss(logits_of, batch) -> jax.Array:
    sums = [
        next_token_loss(logits_of(batch["inputs"][i]), {"targets": batch["targets"][i]})
        for i in range(2)
    ]
    return jnp.sum(jnp.stack([s[0] for s in sums])) / jnp.sum(jnp.stack([s[1] for s in sums]))


def first(batch):
    return jax.tree.map(lambda leaf: leaf[0], batch)


def assert_close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, wanted)


def test_linen_loss_and_gradients():
    data, module = batch(), LinenModel()
    variables = module.init(jax.random.key(0), data["inputs"][0])
    adapted = from_linen(module, variables, first(data), blocks="layer_")
    assert adapted.model.layers == 3
    wanted = jax.value_and_grad(lambda v: mean_loss(lambda t: module.apply(v, t), data))(variables)
    found = jax.value_and_grad(lambda p: reference_loss(adapted.model, p, data))(adapted.parameters)
    assert found[0] == pytest.approx(float(wanted[0]), rel=1e-6)
    assert_close(adapted.rebuild(found[1]), wanted[1])
    assert_close(adapted.rebuild(adapted.parameters), dict(variables))


def test_nnx_loss_and_gradients():
    data, module = batch(), NnxModel(nnx.Rngs(0))
    adapted = from_nnx(module, first(data), blocks="layers")
    graph, state = nnx.split(module, nnx.Param)
    wanted = jax.value_and_grad(lambda s: mean_loss(lambda t: nnx.merge(graph, s)(t), data))(state)
    found = jax.value_and_grad(lambda p: reference_loss(adapted.model, p, data))(adapted.parameters)
    assert found[0] == pytest.approx(float(wanted[0]), rel=1e-6)
    rebuilt = nnx.to_pure_dict(nnx.state(adapted.rebuild(found[1]), nnx.Param))
    assert_close(rebuilt, nnx.to_pure_dict(wanted[1]))


def test_what_precedes_the_blocks_is_not_run_for_the_head():
    data, module = batch(), LinenModel()
    variables = module.init(jax.random.key(0), data["inputs"][0])
    model = from_linen(module, variables, first(data), blocks="layer_").model
    parameters = from_linen(module, variables, first(data), blocks="layer_").parameters
    compiled = jax.jit(model.block).lower(
        jax.tree.map(lambda leaf: leaf[0], parameters["blocks"]),
        jnp.zeros((2, T, D)),
        first(data),
        Layer(index=jnp.int32(0)),
    )
    # The embedding's gather is traced to find the mask, and must be gone after compilation.
    assert "gather" not in (compiled.compile().as_text() or "gather")


def between(between_blocks=False, unlike=False, from_parameters=False):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(V, D)(tokens)
            mask = jnp.ones((1, T, T), bool)
            if from_parameters:
                mask = mask & (x[:, :, :1] > 0)
            for index in range(2):
                width_scale = 1.0 + index if unlike else 1.0
                x = LinenBlock(D, name=f"layer_{index}")(x, mask, scale=width_scale)
                x = x * 2 if between_blocks else x
            return linen.Dense(V)(x)

    return Model()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"between_blocks": True}, "changes x between block 0 and block 1"),
        ({"unlike": True}, "block 1 is called with other arguments than block 0"),
        ({"from_parameters": True}, "depends on parameters outside them"),
    ],
)
def test_what_cannot_be_cut_is_refused(fault, says):
    data, module = batch(), between(**fault)
    variables = module.init(jax.random.key(0), data["inputs"][0])
    with pytest.raises(UsageError, match=says):
        from_linen(module, variables, first(data), blocks="layer_")


def test_names_state_and_unlike_blocks_are_refused():
    data, module = batch(), LinenModel()
    variables = module.init(jax.random.key(0), data["inputs"][0])
    with pytest.raises(UsageError, match="no parameters named block_0.*the model has table"):
        from_linen(module, variables, first(data), blocks="block_")
    with pytest.raises(UsageError, match="keeps batch_stats"):
        from_linen(module, {**variables, "batch_stats": {}}, first(data), blocks="layer_")
    model = NnxModel(nnx.Rngs(0))
    with pytest.raises(UsageError, match="no list of blocks 'stages'"):
        from_nnx(model, first(data), blocks="stages")
    model.dropout = nnx.Dropout(  # type: ignore[attr-defined]
        0.1, rngs=nnx.Rngs(1)
    )
    with pytest.raises(UsageError, match="beside its parameters"):
        from_nnx(model, first(data), blocks="layers")
    model = NnxModel(nnx.Rngs(0))
    model.layers[1].up = nnx.Linear(D, 3 * D, rngs=nnx.Rngs(0))
    with pytest.raises(UsageError, match=r"layers\[1\] is made unlike layers\[0\]"):
        from_nnx(model, first(data), blocks="layers")

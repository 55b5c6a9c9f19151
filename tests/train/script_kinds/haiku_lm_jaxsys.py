"""A decoder in Haiku, as its transformer example writes it: named by scopes, a masked mean."""

import haiku as hk  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsys.train import Trainer, from_function

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 32, 16, 2, 4, 8


def layer_norm(x):
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)


class Block(hk.Module):
    def __call__(self, h, mask):
        init = hk.initializers.VarianceScaling(2 / LAYERS)
        attention = hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=init, model_size=WIDTH)
        normed = layer_norm(h)
        h = h + attention(normed, normed, normed, mask=mask)
        dense = hk.Sequential([
            hk.Linear(4 * WIDTH, w_init=init), jax.nn.gelu, hk.Linear(WIDTH, w_init=init)
        ])  # fmt: skip
        return h + dense(layer_norm(h))


class LanguageModel(hk.Module):
    def __call__(self, tokens):
        init = hk.initializers.TruncatedNormal(stddev=0.3)
        embeddings = hk.Embed(VOCABULARY, WIDTH, w_init=init)(tokens)
        positions = hk.get_parameter("positional", [LENGTH, WIDTH], init=init)
        mask = (tokens > 0)[:, None, None, :] * np.tril(np.ones((1, 1, LENGTH, LENGTH)))
        h = embeddings + positions[None]
        for _ in range(LAYERS):
            h = Block(name="block")(h, mask)
        return hk.Linear(VOCABULARY)(layer_norm(h))


def forward(tokens):
    return LanguageModel(name="lm")(tokens)


model = hk.without_apply_rng(hk.transform(forward))


def get_batch(step, size=16):
    rng = np.random.default_rng(step)
    tokens = rng.integers(1, VOCABULARY, (size, LENGTH + 1)).astype(np.int32)
    lengths = rng.integers(3, LENGTH + 2, size)
    tokens = np.where(np.arange(LENGTH + 1)[None] < lengths[:, None], tokens, 0)
    return {"obs": tokens[:, :-1], "target": tokens[:, 1:]}


def loss_fn(params, data):
    logits = model.apply(params, data["obs"])
    targets = jax.nn.one_hot(data["target"], VOCABULARY)
    mask = jnp.greater(data["obs"], 0)
    log_likelihood = jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)
    return -jnp.sum(log_likelihood * mask) / jnp.sum(mask)


def train(steps=20, schedule="weipipe-interleave"):
    params = model.init(jax.random.PRNGKey(0), get_batch(0)["obs"])
    optimizer = optax.chain(optax.clip_by_global_norm(0.25), optax.adam(1e-3, b1=0.9, b2=0.99))
    adapted = from_function(loss_fn, params, get_batch(0, 2), blocks="lm/block")
    trainer = Trainer(adapted.model, adapted.parameters, optimizer, devices=4, schedule=schedule)

    losses = []
    for step in range(steps):
        losses.append(float(trainer.step(trainer.split(get_batch(step))).loss))
    return losses, adapted.rebuild(trainer.parameters())


if __name__ == "__main__":
    print(train()[0])

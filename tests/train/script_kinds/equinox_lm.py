"""A decoder in Equinox, written for one sequence and mapped over the batch, a mean of means."""

import equinox as eqx  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 32, 16, 2, 4, 8


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        first, second, third = jax.random.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=first)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.up = eqx.nn.Linear(WIDTH, 4 * WIDTH, key=second)
        self.down = eqx.nn.Linear(4 * WIDTH, WIDTH, key=third)

    def __call__(self, x, mask):
        h = jax.vmap(self.norm1)(x)
        x = x + self.attention(h, h, h, mask=mask)
        h = jax.vmap(self.up)(jax.vmap(self.norm2)(x))
        return x + jax.vmap(self.down)(jax.nn.gelu(h))


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    position: jax.Array
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        first, second, third, *keys = jax.random.split(key, 3 + LAYERS)
        self.embedding = eqx.nn.Embedding(VOCABULARY, WIDTH, key=first)
        self.position = 0.3 * jax.random.normal(second, (LENGTH, WIDTH))
        self.blocks = [Block(key) for key in keys]
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, use_bias=False, key=third)

    def __call__(self, tokens):
        x = jax.vmap(self.embedding)(tokens) + self.position
        mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
        for block in self.blocks:
            x = block(x, mask)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


def get_batch(step, size=16):
    tokens = np.random.default_rng(step).integers(0, VOCABULARY, (size, LENGTH + 1), np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def sample_loss(model, inputs, targets):
    logits = model(inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def train(steps=20):
    model = Transformer(jax.random.key(0))
    optimizer = optax.adamw(1e-3)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    opt_state = optimizer.init(params)

    def loss_fn(params, batch):
        model = eqx.combine(params, static)
        losses = jax.vmap(sample_loss, (None, 0, 0))(model, batch["inputs"], batch["targets"])
        return losses.mean()

    @eqx.filter_jit
    def make_step(params, opt_state, batch):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), opt_state, loss

    losses = []
    for step in range(steps):
        params, opt_state, loss = make_step(params, opt_state, get_batch(step))
        losses.append(float(loss))
    return losses, params


if __name__ == "__main__":
    print(train()[0])

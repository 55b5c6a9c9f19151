"""A character model in Flax Linen, trained by a ring of four devices."""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from jaxsys.train import Trainer, from_linen

TOKENS, WIDTH, LAYERS, HEADS, BATCH = 64, 64, 4, 4, 16


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, both before the norm."""

    @nn.compact
    def __call__(self, x, mask):
        """x [B, T, D] -> [B, T, D]."""
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))


class CharacterModel(nn.Module):
    """Next-character logits."""

    vocabulary: int

    @nn.compact
    def __call__(self, tokens):
        """Tokens [B, T] -> logits [B, T, V]."""
        place = self.param("place", nn.initializers.normal(0.02), (TOKENS, WIDTH))
        x = nn.Embed(self.vocabulary, WIDTH)(tokens) + place[None]
        mask = nn.make_causal_mask(tokens)
        for _ in range(LAYERS):
            x = Block()(x, mask)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def batches(text, seed):
    """Random windows of the text, for ever."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - TOKENS - 1, BATCH)
        windows = np.stack([text[s : s + TOKENS + 1] for s in starts])
        yield {"inputs": windows[:, :-1], "targets": windows[:, 1:]}


def loss(logits, batch):
    """Cross-entropy of the next character."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return each.sum(), each.size


def main():
    """Trains and prints the loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8).astype(np.int32)
    model = CharacterModel(vocabulary=256)
    variables = model.init(jax.random.key(0), jnp.zeros((1, TOKENS), jnp.int32))
    optimizer = optax.adamw(1e-3)
    data = batches(text, seed=0)
    adapted = from_linen(model, variables, next(data), blocks="Block_", loss=loss)
    trainer = Trainer(adapted.model, adapted.parameters, optimizer, devices=4)

    for number in range(1, arguments.steps + 1):
        value = trainer.step(trainer.split(next(data))).loss
        if number % 20 == 0 or number == arguments.steps:
            print(f"step {number}  loss {value:.4f}")


if __name__ == "__main__":
    main()

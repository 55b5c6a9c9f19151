"""A character model in Flax NNX, trained by a ring of four devices."""

import argparse
import pathlib

import jax
import numpy as np
import optax
from flax import nnx

from jaxsys.train import Trainer, from_nnx

TOKENS, WIDTH, LAYERS, HEADS, BATCH = 64, 64, 4, 4, 16


class Block(nnx.Module):
    """Causal self-attention and a two-layer perceptron, both before the norm."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        """x [B, T, D] -> [B, T, D]."""
        x = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class CharacterModel(nnx.Module):
    """Next-character logits."""

    def __init__(self, vocabulary, rngs):
        self.table = nnx.Embed(vocabulary, WIDTH, rngs=rngs)
        self.place = nnx.Param(0.02 * jax.random.normal(rngs.params(), (TOKENS, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        """Tokens [B, T] -> logits [B, T, V]."""
        x = self.table(tokens) + self.place[...][None]
        for block in self.blocks:
            x = block(x)
        return self.table.attend(self.norm(x))


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
    model = CharacterModel(vocabulary=256, rngs=nnx.Rngs(0))
    data = batches(text, seed=0)
    adapted = from_nnx(model, next(data), blocks="blocks", loss=loss)
    trainer = Trainer(adapted.model, adapted.parameters, optax.adamw(1e-3), devices=4)

    for number in range(1, arguments.steps + 1):
        value = trainer.step(trainer.split(next(data))).loss
        if number % 20 == 0 or number == arguments.steps:
            print(f"step {number}  loss {value:.4f}")


if __name__ == "__main__":
    main()

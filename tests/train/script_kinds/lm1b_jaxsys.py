"""A decoder in Linen, as Flax's lm1b example writes it: nested names, padding, a weighted loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from jaxsys.train import Trainer, from_linen

VOCABULARY, EMBEDDING, HEADS, MLP, LENGTH, LAYERS = 32, 16, 2, 32, 8, 4


def sinusoidal_table(length, width):
    position = np.arange(length)[:, None]
    rate = np.exp(np.arange(0, width, 2) * -(np.log(10000.0) / width))
    table = np.zeros((length, width), np.float32)
    table[:, 0::2], table[:, 1::2] = np.sin(position * rate), np.cos(position * rate)
    return table[None]


def shift_right(x):
    return jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]


class AddPositionEmbs(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        return inputs + sinusoidal_table(inputs.shape[1], inputs.shape[2])


class MlpBlock(nn.Module):
    dropout_rate: float

    @nn.compact
    def __call__(self, inputs, deterministic):
        x = nn.relu(nn.Dense(MLP, bias_init=nn.initializers.normal(1e-6))(inputs))
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        return nn.Dense(inputs.shape[-1], bias_init=nn.initializers.normal(1e-6))(x)


class EncoderDecoder1DBlock(nn.Module):
    dropout_rate: float

    @nn.compact
    def __call__(self, inputs, mask, deterministic):
        x = nn.LayerNorm()(inputs)
        x = nn.MultiHeadDotProductAttention(HEADS, use_bias=False, deterministic=True)(x, mask=mask)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic) + inputs
        return x + MlpBlock(self.dropout_rate)(nn.LayerNorm()(x), deterministic)


class Decoder(nn.Module):
    shared_embedding: nn.Module
    dropout_rate: float

    @nn.compact
    def __call__(self, inputs, mask, deterministic):
        y = self.shared_embedding(shift_right(inputs.astype("int32")))
        y = AddPositionEmbs(name="posembed_output")(y)
        for layer in range(LAYERS):
            block = EncoderDecoder1DBlock(self.dropout_rate, name=f"encoderdecoderblock_{layer}")
            y = block(y, mask, deterministic)
        y = nn.LayerNorm(name="encoderdecoder_norm")(y)
        return self.shared_embedding.attend(y.astype(jnp.float32)) / jnp.sqrt(y.shape[-1])


class TransformerLM(nn.Module):
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, inputs, deterministic=False):
        embedding = nn.Embed(VOCABULARY, EMBEDDING, embedding_init=nn.initializers.normal(1.0))
        mask = nn.combine_masks(
            nn.make_attention_mask(inputs > 0, inputs > 0), nn.make_causal_mask(inputs)
        )
        return Decoder(embedding, self.dropout_rate, name="decoder")(inputs, mask, deterministic)


def get_batch(step, size=16):
    rng = np.random.default_rng(step)
    tokens = rng.integers(1, VOCABULARY, (size, LENGTH)).astype(np.int32)
    lengths = rng.integers(3, LENGTH + 1, size)
    return {"inputs": np.where(np.arange(LENGTH)[None] < lengths[:, None], tokens, 0)}


def compute_weighted_cross_entropy(logits, targets, weights, label_smoothing=0.1):
    confidence = 1.0 - label_smoothing
    low = (1.0 - confidence) / (VOCABULARY - 1)
    soft = jax.nn.one_hot(targets, VOCABULARY) * (confidence - low) + low
    loss = -jnp.sum(soft * nn.log_softmax(logits), axis=-1) * weights
    return loss.sum(), weights.sum()


def loss_of(logits, batch):
    weights = jnp.where(batch["inputs"] > 0, 1, 0).astype(jnp.float32)
    return compute_weighted_cross_entropy(logits, batch["inputs"], weights)


def train(steps=20, schedule="weipipe-interleave"):
    model = TransformerLM()
    variables = model.init(jax.random.key(0), get_batch(0)["inputs"])
    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.98, eps=1e-9, weight_decay=0.1)
    adapted = from_linen(
        model, variables, get_batch(0, 2), blocks="decoder.encoderdecoderblock_", loss=loss_of
    )
    trainer = Trainer(adapted.model, adapted.parameters, optimizer, devices=4, schedule=schedule)

    losses = []
    for step in range(steps):
        losses.append(float(trainer.step(trainer.split(get_batch(step))).loss))
    return losses, adapted.rebuild(trainer.parameters())["params"]


if __name__ == "__main__":
    print(train()[0])

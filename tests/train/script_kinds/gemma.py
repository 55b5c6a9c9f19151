"""A decoder in NNX, as Flax's gemma writes it: local and global layers, soft caps."""

import enum

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LENGTH, WINDOW = 32, 16, 4, 2, 4, 32, 8, 3


class AttentionType(enum.Enum):
    GLOBAL = 1
    LOCAL_SLIDING = 2


PATTERN = [AttentionType.LOCAL_SLIDING, AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL]
LAYERS = [PATTERN[index % 3] for index in range(5)]


class RMSNorm(nnx.Module):
    def __init__(self, dim, *, rngs):
        self.scale = nnx.Param(nnx.initializers.zeros_init()(rngs.params(), (dim,)))

    def __call__(self, x):
        normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return normed * (1 + jnp.expand_dims(self.scale[...], range(x.ndim - 1)))


class Embedder(nnx.Module):
    def __init__(self, *, rngs):
        init = nnx.initializers.normal(0.3)
        self.input_embedding = nnx.Param(init(rngs.params(), (VOCABULARY, WIDTH)))

    def encode(self, tokens):
        return self.input_embedding[...][tokens] * WIDTH**0.5

    def decode(self, x):
        return jnp.dot(x, self.input_embedding[...].T)


def apply_rope(x, positions, base):
    fraction = 2 * jnp.arange(0, x.shape[-1] // 2) / x.shape[-1]
    angles = positions[..., None] / (base**fraction)[None, None]
    sin, cos = jnp.sin(angles)[..., None, :], jnp.cos(angles)[..., None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    def __init__(self, kind, *, rngs):
        self.kind = kind
        self.q = nnx.Einsum("BTD,DNH->BTNH", (WIDTH, HEADS, HEAD_DIM), rngs=rngs)
        self.kv = nnx.Einsum("BSD,CDKH->CBSKH", (2, WIDTH, KV_HEADS, HEAD_DIM), rngs=rngs)
        self.out = nnx.Einsum("BTNH,NHD->BTD", (HEADS, HEAD_DIM, WIDTH), rngs=rngs)

    def __call__(self, x, positions, mask):
        base = 10_000 if self.kind == AttentionType.LOCAL_SLIDING else 1_000_000
        q, (k, v) = self.q(x), self.kv(x)
        q, k = apply_rope(q, positions, base), apply_rope(k, positions, base)
        q = q.reshape(*q.shape[:2], KV_HEADS, HEADS // KV_HEADS, HEAD_DIM) * HEAD_DIM**-0.5
        logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k)
        logits = jnp.tanh(logits / 50.0) * 50.0
        if self.kind == AttentionType.LOCAL_SLIDING:
            ones = jnp.ones_like(mask)
            mask = mask & jnp.triu(ones, -WINDOW + 1) & jnp.tril(ones, WINDOW - 1)
        probs = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -2.3819763e38), axis=-1)
        encoded = jnp.einsum("BKGTS,BSKH->BTKGH", probs, v)
        return self.out(encoded.reshape(*encoded.shape[:2], HEADS, HEAD_DIM))


class FeedForward(nnx.Module):
    def __init__(self, *, rngs):
        self.gate_proj = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(nnx.gelu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, kind, *, rngs):
        self.pre_attention_norm = RMSNorm(WIDTH, rngs=rngs)
        self.attn = Attention(kind, rngs=rngs)
        self.post_attn_norm = RMSNorm(WIDTH, rngs=rngs)
        self.pre_ffw_norm = RMSNorm(WIDTH, rngs=rngs)
        self.mlp = FeedForward(rngs=rngs)
        self.post_ffw_norm = RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, x, positions, mask):
        attended = self.attn(self.pre_attention_norm(x), positions, mask)
        x = x + self.post_attn_norm(attended)
        return None, x + self.post_ffw_norm(self.mlp(self.pre_ffw_norm(x)))


class Transformer(nnx.Module):
    def __init__(self, *, rngs):
        self.embedder = Embedder(rngs=rngs)
        self.layers = nnx.List([Block(kind, rngs=rngs) for kind in LAYERS])
        self.final_norm = RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        valid = tokens > 0
        positions = jnp.maximum(jnp.cumsum(valid, axis=-1) - 1, 0)
        mask = valid[:, None, :] & jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None]
        x = self.embedder.encode(tokens)
        for layer in self.layers:
            _, x = layer(x, positions, mask)
        logits = self.embedder.decode(self.final_norm(x))
        return jnp.tanh(logits / 30.0) * 30.0


def get_batch(step, size=16):
    rng = np.random.default_rng(step)
    tokens = rng.integers(1, VOCABULARY, (size, LENGTH + 1)).astype(np.int32)
    lengths = rng.integers(3, LENGTH + 2, size)
    tokens = np.where(np.arange(LENGTH + 1)[None] < lengths[:, None], tokens, 0)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def loss_of(logits, batch):
    mask = (batch["targets"] > 0).astype(jnp.float32)
    hot = jax.nn.one_hot(batch["targets"], VOCABULARY) * mask[..., None]
    norm_factor = 1 / (jnp.sum(mask) + 1e-8)
    return -jnp.sum(jax.nn.log_softmax(logits) * hot) * norm_factor


def train(steps=20):
    model = Transformer(rngs=nnx.Rngs(0))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(lambda model: loss_of(model(batch["inputs"]), batch))(
            model
        )
        optimizer.update(model, grads)
        return loss

    losses = []
    for step in range(steps):
        losses.append(float(train_step(model, optimizer, get_batch(step))))
    return losses, nnx.to_pure_dict(nnx.state(model, nnx.Param))


if __name__ == "__main__":
    print(train()[0])

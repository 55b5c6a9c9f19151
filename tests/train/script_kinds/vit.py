"""A vision transformer in Linen: patches, a class token, accuracy beside the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

IMAGE, PATCH, WIDTH, HEADS, LAYERS, CLASSES = 8, 4, 16, 2, 4, 5


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic):
        x = nn.gelu(nn.Dense(2 * WIDTH)(x))
        x = nn.Dropout(0.1)(x, deterministic=deterministic)
        return nn.Dense(WIDTH)(x)


class Encoder1DBlock(nn.Module):
    @nn.compact
    def __call__(self, inputs, *, deterministic):
        x = nn.LayerNorm()(inputs)
        x = nn.MultiHeadDotProductAttention(HEADS, deterministic=deterministic)(x, x)
        x = nn.Dropout(0.1)(x, deterministic=deterministic) + inputs
        return x + MlpBlock()(nn.LayerNorm()(x), deterministic=deterministic)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        init = nn.initializers.normal(0.02)
        x = x + self.param("posembed_input", init, (1, x.shape[1], x.shape[2]))
        for layer in range(LAYERS):
            x = Encoder1DBlock(name=f"encoderblock_{layer}")(x, deterministic=not train)
        return nn.LayerNorm(name="encoder_norm")(x)


class VisionTransformer(nn.Module):
    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH), padding="VALID", name="embedding")(
            images
        )
        x = x.reshape(x.shape[0], -1, WIDTH)
        cls = self.param("cls", nn.initializers.normal(0.3), (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(cls, [x.shape[0], 1, 1]), x], axis=1)
        x = Encoder(name="Transformer")(x, train=train)
        return nn.Dense(CLASSES, name="head", kernel_init=nn.initializers.normal(0.3))(x[:, 0])


def get_batch(step, size=16):
    rng = np.random.default_rng(step)
    images = rng.standard_normal((size, IMAGE, IMAGE, 3)).astype(np.float32)
    return {"image": images, "label": rng.integers(0, CLASSES, size).astype(np.int32)}


def loss_of(logits, batch):
    one_hot = jax.nn.one_hot(batch["label"], CLASSES)
    loss = jnp.mean(optax.softmax_cross_entropy(logits, one_hot))
    return loss, {"accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["label"])}


def train(steps=20):
    model = VisionTransformer()
    params = model.init(jax.random.key(0), get_batch(0)["image"])["params"]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.03, momentum=0.9))
    opt_state = tx.init(params)

    @jax.jit
    def update_fn(params, opt_state, batch):
        def loss_fn(params):
            return loss_of(model.apply({"params": params}, batch["image"]), batch)

        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for step in range(steps):
        params, opt_state, loss = update_fn(params, opt_state, get_batch(step))
        losses.append(float(loss))
    return losses, params


if __name__ == "__main__":
    print(train()[0])

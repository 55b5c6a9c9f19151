"""A GPT in plain JAX, as ports of minGPT write it: dicts of arrays, a scan over stacked layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCABULARY, EMBED, HEADS, BLOCK, LAYERS = 32, 16, 2, 8, 4


def init(key):
    keys = iter(jax.random.split(key, 16))

    def normal(*shape, scale=0.02):
        return scale * jax.random.normal(next(keys), shape)

    blocks = {
        "ln_1": {"g": jnp.ones((LAYERS, EMBED)), "b": jnp.zeros((LAYERS, EMBED))},
        "attn": {
            "c_attn": {"w": normal(LAYERS, EMBED, 3 * EMBED), "b": jnp.zeros((LAYERS, 3 * EMBED))},
            "c_proj": {"w": normal(LAYERS, EMBED, EMBED), "b": jnp.zeros((LAYERS, EMBED))},
        },
        "ln_2": {"g": jnp.ones((LAYERS, EMBED)), "b": jnp.zeros((LAYERS, EMBED))},
        "mlp": {
            "c_fc": {"w": normal(LAYERS, EMBED, 4 * EMBED), "b": jnp.zeros((LAYERS, 4 * EMBED))},
            "c_proj": {"w": normal(LAYERS, 4 * EMBED, EMBED), "b": jnp.zeros((LAYERS, EMBED))},
        },
    }
    return {
        "wte": normal(VOCABULARY, EMBED, scale=0.3),
        "wpe": normal(BLOCK, EMBED, scale=0.3),
        "h": blocks,
        "ln_f": {"g": jnp.ones(EMBED), "b": jnp.zeros(EMBED)},
        "lm_head": normal(EMBED, VOCABULARY, scale=0.3),
    }


def linear(p, x):
    return x @ p["w"] + p["b"][None, None]


def layer_norm(p, x, eps=1e-5):
    mean, variance = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + eps) * p["g"][None, None] + p["b"][None, None]


def attention(p, x):
    batch, length, width = x.shape
    q, k, v = (
        part.reshape(batch, length, HEADS, width // HEADS).transpose(0, 2, 1, 3)
        for part in jnp.split(linear(p["c_attn"], x), 3, axis=-1)
    )
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(width // HEADS)
    scores = jnp.where(jnp.tril(jnp.ones((1, 1, length, length))) == 0, -jnp.inf, scores)
    out = jax.nn.softmax(scores, axis=-1) @ v
    return linear(p["c_proj"], out.transpose(0, 2, 1, 3).reshape(batch, length, width))


def block(x, p):
    x = x + attention(p["attn"], layer_norm(p["ln_1"], x))
    hidden = jax.nn.gelu(linear(p["mlp"]["c_fc"], layer_norm(p["ln_2"], x)))
    return x + linear(p["mlp"]["c_proj"], hidden), None


def gpt(params, tokens):
    x = params["wte"][tokens] + params["wpe"][: tokens.shape[1]][None]
    x, _ = jax.lax.scan(jax.checkpoint(block), x, params["h"])
    return layer_norm(params["ln_f"], x) @ params["lm_head"]


def loss_fn(params, batch):
    logits = gpt(params, batch["x"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return jnp.mean(losses)


def get_batch(step, size=16):
    tokens = np.random.default_rng(step).integers(0, VOCABULARY, (size, BLOCK + 1), np.int32)
    return {"x": tokens[:, :-1], "y": tokens[:, 1:]}


def decay_mask(params):
    # Matrices of linear layers decay; norms, biases and embeddings do not.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "w" or path[-1].key == "lm_head", params
    )


def train(steps=20):
    params = init(jax.random.key(0))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-3, b2=0.95, weight_decay=0.1, mask=decay_mask(params)),
    )
    opt_state = optimizer.init(params)

    @jax.jit
    def update(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for step in range(steps):
        params, opt_state, loss = update(params, opt_state, get_batch(step))
        losses.append(float(loss))
    return losses, params


if __name__ == "__main__":
    print(train()[0])
